//! Reads through several layers: what each depth costs, and random worlds against a plain model.

mod support;

use std::collections::BTreeMap;

use support::{BLOCK, Crash, Geometry, Rng, World, content, small_settings};
use types::{
    BlockNo, HeapBlock, LayerId, LeafNo, Lineage, LineageStep, Payload, Seq, ShardId, ShardNo, SumKey, VdiId,
    crc32c,
};
use weft_store::{
    BlockState, BlockVersion, ClearKind, Event, Origin, ReadPart, Reply, Request, StoreError, recover,
};

const SMALL: Geometry = Geometry {
    segments: 64,
    segment_bytes: 256 << 10,
};

fn shard(vdi: u32, no: u32) -> ShardId {
    ShardId {
        vdi: VdiId(vdi),
        no: ShardNo(no),
    }
}

fn lineage(steps: &[(u32, u32, u32)]) -> Lineage {
    let steps = steps.iter().map(|(vdi, lowest, highest)| LineageStep {
        vdi: VdiId(*vdi),
        lowest: LayerId(*lowest),
        highest: LayerId(*highest),
    });
    Lineage::new(&steps.collect::<Vec<_>>()).expect("in order")
}

/// A change of one layer; the content of a write is made of seq and block.
#[derive(Clone, Copy, Debug)]
struct Change {
    shard: ShardId,
    layer: u32,
    block: u32,
    count: u32,
    seq: u64,
    what: What,
    origin: Origin,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    Data,
    Zeros,
    /// Nothing: as if the layer had never been written there.
    Void,
    /// Layers from the change's to this one are gone.
    Gone(u32),
}

impl Change {
    fn request(self) -> Request<HeapBlock> {
        let Change {
            shard, seq, origin, ..
        } = self;
        let (layer, block, seq_no) = (LayerId(self.layer), BlockNo(self.block), Seq(seq));
        if let (What::Void, Origin::Repair { live_from }) = (self.what, origin) {
            return Request::Void {
                shard,
                layer,
                block,
                count: self.count,
                live_from,
            };
        }
        if let What::Gone(last) = self.what {
            return Request::DropLayers {
                shard,
                layers: vec![layer..=LayerId(last)],
                revision: seq,
            };
        }
        if self.what != What::Data {
            return Request::Clear {
                shard,
                layer,
                block,
                count: self.count,
                seq: seq_no,
                kind: ClearKind::Zero,
                origin,
            };
        }
        let blocks = self.block..self.block + self.count;
        let bytes: Vec<u8> = blocks.flat_map(|block| content(seq, block)).collect();
        Request::Write {
            shard,
            layer,
            block,
            seq: seq_no,
            crcs: bytes.chunks_exact(BLOCK).map(crc32c).collect(),
            data: HeapBlock::new(&bytes),
            origin,
        }
    }

    fn covers(&self, block: u32) -> bool {
        matches!(self.what, What::Gone(_)) || (self.block..self.block + self.count).contains(&block)
    }
}

fn write(vdi: u32, layer: u32, block: u32, count: u32, seq: u64) -> Change {
    Change {
        shard: shard(vdi, 0),
        layer,
        block,
        count,
        seq,
        what: What::Data,
        origin: Origin::Live,
    }
}

fn read(shard: ShardId, lineage: &Lineage, block: u32, count: u32) -> Request<HeapBlock> {
    Request::Read {
        shard,
        lineage: lineage.clone(),
        block: BlockNo(block),
        count,
    }
}

fn blocks_of(reply: Reply<HeapBlock>) -> Vec<Option<Vec<u8>>> {
    let Reply::Read(parts) = reply else {
        panic!("not a read")
    };
    let mut blocks = Vec::new();
    for part in parts {
        match part {
            ReadPart::Zeros(count) => blocks.extend((0..count).map(|_| None)),
            ReadPart::Data(data) => {
                let each = data.bytes().chunks_exact(BLOCK);
                blocks.extend(each.map(|bytes| Some(bytes.to_vec())));
            }
        }
    }
    blocks
}

fn assert_reads(world: &mut World, lineage: &Lineage, block: u32, expected: &[Option<u64>]) {
    let ask = read(shard(1, 0), lineage, block, expected.len() as u32);
    let blocks = blocks_of(world.call(ask).expect("readable"));
    assert_eq!(blocks.len(), expected.len());
    for (block, (bytes, seq)) in (block..).zip(blocks.iter().zip(expected)) {
        let wanted = seq.map(|seq| content(seq, block));
        assert!(*bytes == wanted, "block {block} is not what {seq:?} made it");
    }
}

fn world(vdis: &[u32], shards: u32) -> World {
    let mut world = World::new(1, &SMALL, small_settings());
    for (vdi, no) in vdis.iter().flat_map(|vdi| (0..shards).map(move |no| (*vdi, no))) {
        put_record(&mut world, shard(vdi, no));
    }
    world
}

fn put_record(world: &mut World, shard: ShardId) {
    let record = vec![1; 9];
    world.call(Request::PutRecord { shard, record }).expect("record");
}

fn change(world: &mut World, change: Change) {
    world.call(change.request()).expect("changed");
}

/// Leaves of another shard until no leaf of the first is in memory any more; maps stay.
fn push_out(world: &mut World, seq: &mut u64) {
    for leaf in 0..80 {
        *seq += 1;
        change(world, write(9, 0, leaf * 256, 1, *seq));
    }
}

/// Fills the disk and overwrites a part of each segment, in rounds: how many blocks cleaning moved.
fn churn(world: &mut World, round: u64, writes: u64) -> u64 {
    let before = world.store.stats().cleaned_blocks;
    let mut rng = Rng(round);
    for number in (round - 1) * writes..round * writes {
        let (block, count) = match number < 150 {
            true => (number as u32 * 16, 16),
            false => (rng.below(150 * 16 - 8) as u32, 6),
        };
        change(world, write(9, 0, block, count, 1000 + number));
    }
    world.store.stats().cleaned_blocks - before
}

/// The same until cleaning has been everywhere.
fn clean_everything(world: &mut World, round: u64) {
    let cleaned = churn(world, round, 900);
    assert!(cleaned > 200, "{cleaned} blocks cleaned");
}

const DEPTH: u32 = 100;

/// A leaf of which each of a hundred layers has some blocks, every one but the newest overwritten in part by the next.
fn deep_world() -> (World, Vec<Option<u64>>, u64) {
    let mut world = world(&[1, 9], 1);
    let mut expected = vec![None; 256];
    for layer in 0..DEPTH {
        let seq = u64::from(layer) + 1;
        change(&mut world, write(1, layer, layer * 2, 4, seq));
        expected[layer as usize * 2..layer as usize * 2 + 4].fill(Some(seq));
    }
    (world, expected, u64::from(DEPTH))
}

#[test]
fn a_leaf_of_a_hundred_layers_is_read_right_and_its_depth_is_paid_once() {
    let (mut world, expected, mut seq) = deep_world();
    let all = lineage(&[(1, 0, DEPTH - 1)]);
    push_out(&mut world, &mut seq);
    world.loads.clear();
    assert_reads(&mut world, &all, 0, &expected);
    assert!(world.loads.len() >= DEPTH as usize, "{} loads", world.loads.len());
    for layer in [0, 1, 50, DEPTH - 1] {
        push_out(&mut world, &mut seq);
        world.loads.clear();
        let block = layer as usize * 2 + 1;
        assert_reads(&mut world, &all, block as u32, &expected[block..=block]);
        let layers: Vec<u32> = world.loads.iter().map(|key| key.layer.0).collect();
        assert_eq!(
            layers,
            [layer],
            "block {block} is in one layer, and no other leaf is needed"
        );
    }
    // What is absent in all of them needs none.
    push_out(&mut world, &mut seq);
    world.loads.clear();
    assert_reads(&mut world, &all, 210, &expected[210..240]);
    assert_eq!(world.loads, []);
}

#[test]
fn a_write_to_the_head_keeps_the_map() {
    let (mut world, mut expected, mut seq) = deep_world();
    let all = lineage(&[(1, 0, DEPTH)]);
    assert_reads(&mut world, &all, 0, &expected);
    push_out(&mut world, &mut seq);
    seq += 1;
    change(&mut world, write(1, DEPTH, 40, 3, seq));
    expected[40..43].fill(Some(seq));
    seq += 1;
    let zeros = Change {
        what: What::Zeros,
        ..write(1, DEPTH, 60, 3, seq)
    };
    change(&mut world, zeros);
    expected[60..63].fill(None);
    world.loads.clear();
    assert_reads(&mut world, &all, 40, &expected[40..43]);
    assert_reads(&mut world, &all, 60, &expected[60..63]);
    assert_eq!(world.loads, [], "the leaf of the head is in memory");
    assert_reads(&mut world, &all, 0, &expected);
}

#[test]
fn one_layer_of_many_is_read_as_if_it_were_alone() {
    let mut world = world(&[1, 9], 1);
    change(&mut world, write(1, 3, 5, 1, 1));
    change(&mut world, write(1, 7, 256, 1, 2));
    let before = world.store.stats().cached_bytes;
    let all = lineage(&[(1, 0, 9)]);
    assert_reads(&mut world, &all, 4, &[None, Some(1), None]);
    assert_reads(&mut world, &all, 255, &[None, Some(2)]);
    assert_reads(&mut world, &lineage(&[(1, 0, 6)]), 255, &[None, None]);
    assert_eq!(world.store.stats().cached_bytes, before, "no map is made");
}

#[test]
fn a_rotten_block_is_never_the_block_below() {
    let mut world = world(&[1, 9], 1);
    change(&mut world, write(1, 0, 5, 2, 1));
    change(&mut world, write(1, 1, 5, 1, 2));
    let wanted = content(2, 5);
    let mut buffer = vec![0; BLOCK];
    let at = (0..world.disk.bytes / BLOCK as u64)
        .find(|at| world.disk.read(at * BLOCK as u64, &mut buffer).is_ok() && buffer == wanted);
    world
        .disk
        .flip_bit(at.expect("it is somewhere") * BLOCK as u64 + 7);
    let both = lineage(&[(1, 0, 1)]);
    for round in 1..3 {
        let bad = StoreError::Corrupt {
            shard: shard(1, 0),
            layer: LayerId(1),
            block: BlockNo(5),
        };
        assert_eq!(world.call(read(shard(1, 0), &both, 4, 3)).err(), Some(bad));
        assert_reads(&mut world, &both, 6, &[Some(1)]);
        assert_reads(&mut world, &lineage(&[(1, 0, 0)]), 5, &[Some(1), Some(1)]);
        // Cleaning finds it, and what it logs instead decides as well.
        clean_everything(&mut world, round);
    }
}

#[test]
fn layers_that_are_not_on_this_disk_say_nothing() {
    let mut world = world(&[1], 1);
    change(&mut world, write(1, 0, 5, 1, 1));
    assert_reads(
        &mut world,
        &lineage(&[(1, 0, 4), (77, 0, 100)]),
        4,
        &[None, Some(1), None],
    );
    let asks = read(shard(77, 0), &lineage(&[(77, 0, 4), (1, 0, 4)]), 5, 1);
    assert_eq!(world.call(asks).err(), Some(StoreError::NoShard(shard(77, 0))));
}

fn void(layer: u32, block: u32, count: u32, live_from: u64) -> Change {
    Change {
        what: What::Void,
        origin: Origin::Repair {
            live_from: Seq(live_from),
        },
        ..write(1, layer, block, count, 0)
    }
}

fn states(world: &mut World, layer: u32) -> Vec<BlockState> {
    let ask = Request::LeafVersions {
        shard: shard(1, 0),
        lineage: lineage(&[(1, layer, layer)]),
        leaf: LeafNo(0),
    };
    let Ok(Reply::Versions(versions)) = world.call(ask) else {
        panic!("versions")
    };
    versions.into_iter().map(|version| version.state).collect()
}

/// A dead writer's tail in the newer layer, which its other replicas do not have: what the older layer holds shows again,
/// and what the log still says of the tail never counts again.
#[test]
fn what_is_void_shows_the_layer_below_and_stays_void() {
    let mut world = world(&[1, 9], 1);
    change(&mut world, write(1, 0, 10, 6, 1));
    change(&mut world, write(1, 1, 12, 6, 2));
    // The tail's segment stays as it is, full of what lives; cleaning takes the one with the voids.
    change(&mut world, write(9, 0, 3000, 42, 1));
    for filler in 0..3 {
        change(&mut world, write(9, 0, filler * 16, 16, 2));
    }
    let both = lineage(&[(1, 0, 1)]);
    let before = world.store.stats().live_blocks;
    assert_reads(
        &mut world,
        &both,
        11,
        &[Some(1), Some(2), Some(2), Some(2), Some(2), Some(2)],
    );
    change(&mut world, void(1, 12, 2, 3));
    change(&mut world, void(1, 17, 5, 3));
    // The stream that runs beside it is not replaced.
    change(&mut world, void(1, 15, 1, 2));
    assert_eq!(world.store.stats().live_blocks, before - 3);
    let shown = [
        Some(1),
        Some(1),
        Some(1),
        Some(1),
        Some(2),
        Some(2),
        Some(2),
        None,
    ];
    let check = |world: &mut World| {
        assert_reads(world, &both, 10, &shown);
        let states = states(world, 1);
        assert!(states[12..14].iter().all(|state| *state == BlockState::Absent));
        assert!(matches!(states[14], BlockState::Data(_)) && states[17] == BlockState::Absent);
        let shards = world.store.shards();
        let known = shards.iter().find(|known| known.shard == shard(1, 0));
        assert_eq!(
            known.map(|known| known.end),
            Some(Seq(2)),
            "the end is what it was"
        );
    };
    check(&mut world);
    let mut cleaned = 0;
    for life in 1..40 {
        world.crash_and(Crash::Kill, |_, kv| {
            if life % 2 == 0 {
                kv.0.clear();
            }
        });
        check(&mut world);
        cleaned += churn(&mut world, life, 60);
        check(&mut world);
    }
    assert!(cleaned > 1000, "{cleaned} blocks cleaned");
    change(&mut world, write(1, 1, 12, 1, 3));
    assert_reads(&mut world, &both, 12, &[Some(3), Some(1)]);
}

/// A branch that no lineage has any more: its layers give back their space, and no entry that the log still has of them,
/// nor one that comes late, ever counts again.
#[test]
fn layers_that_are_gone_stay_gone_and_give_their_space_back() {
    let mut world = world(&[1, 9], 1);
    for layer in 0..6 {
        change(&mut world, write(1, layer, 10 + layer, 50, u64::from(layer) + 1));
    }
    let all = lineage(&[(1, 0, 9)]);
    let before = world.store.stats().live_blocks;
    let gone = |first, last| Change {
        what: What::Gone(last),
        ..write(1, first, 0, 1, 0)
    };
    assert_reads(&mut world, &all, 14, &[Some(5), Some(6), Some(6)]);
    change(&mut world, gone(4, 4));
    change(&mut world, gone(2, 3));
    change(&mut world, gone(3, 7));
    assert_eq!(world.store.stats().live_blocks, before - 4 * 50);
    assert_eq!(world.store.shards()[0].data_blocks, 2 * 50);
    change(&mut world, write(1, 3, 0, 20, 7));
    let check = |world: &mut World| {
        assert_reads(world, &all, 8, &[None, None, Some(1), Some(2), Some(2)]);
        assert_reads(world, &all, 59, &[Some(2), Some(2), None]);
        for layer in 2..8 {
            assert!(
                states(world, layer)
                    .iter()
                    .all(|state| *state == BlockState::Absent)
            );
        }
        assert_eq!(world.store.shards()[0].data_blocks, 2 * 50);
    };
    check(&mut world);
    for life in 1..5 {
        world.crash_and(Crash::Kill, |_, kv| {
            if life % 2 == 0 {
                kv.0.clear();
            }
        });
        check(&mut world);
        clean_everything(&mut world, life);
        check(&mut world);
        world
            .call(write(1, 4, 30, 3, 100 + life).request())
            .expect("late");
        check(&mut world);
    }
    // Another life of the shard knows nothing of it.
    world
        .call(Request::DropShard { shard: shard(1, 0) })
        .expect("dropped");
    put_record(&mut world, shard(1, 0));
    change(&mut world, write(1, 4, 30, 1, 1));
    assert_reads(&mut world, &all, 29, &[None, Some(1), None]);
    world.crash_and(Crash::Kill, |_, kv| kv.0.clear());
    assert_reads(&mut world, &all, 29, &[None, Some(1), None]);
}

fn revision(world: &mut World, shard: ShardId) -> u64 {
    let Ok(Reply::Revision(revision)) = world.call(Request::LayersRevision { shard }) else {
        panic!("a revision")
    };
    revision
}

/// The last write of the stream is in a layer that goes, and its segment is emptied with it; another one is written into
/// it late. Whoever rebuilds the index finds the shard's end all the same, and the revision.
#[test]
fn layers_that_go_leave_the_end_of_the_shard() {
    let mut world = world(&[1, 9], 1);
    let repaired = |world: &mut World| {
        for at in 1..9 {
            let live_from = Seq(u64::MAX);
            let origin = Origin::Repair { live_from };
            change(
                world,
                Change {
                    origin,
                    ..write(1, 1, at * 100, 16, 1)
                },
            );
        }
    };
    let in_dead_segments = |world: &mut World, seq| {
        repaired(world);
        change(world, write(1, 1, 0, 16, seq));
        repaired(world);
    };
    let shard = shard(1, 0);
    change(&mut world, write(1, 0, 5, 1, 1));
    in_dead_segments(&mut world, 2);
    assert_eq!(revision(&mut world, shard), 0);
    let drop_it = |revision| Request::DropLayers {
        shard,
        layers: vec![LayerId(3)..=LayerId(4), LayerId(1)..=LayerId(1)],
        revision,
    };
    let batches = |world: &World| world.store.stats().batches;
    world.call(drop_it(7)).expect("dropped");
    let before = batches(&world);
    world.call(drop_it(7)).expect("dropped before");
    world.call(drop_it(6)).expect("dropped before, and said late");
    assert_eq!(batches(&world), before, "nothing new is logged");
    let mut round = 0;
    for seq in 2..5 {
        // Every segment is used again, most of them without having been looked at.
        for _ in 0..20 {
            round += 1;
            churn(&mut world, round, 40);
            world.crash_and(Crash::Kill, |_, kv| kv.0.clear());
            let shards = world.store.shards();
            let known = shards.into_iter().find(|known| known.shard == shard);
            let known = known.expect("it is there");
            let is_left = (known.end, known.data_blocks, revision(&mut world, shard));
            assert_eq!(is_left, (Seq(seq), 1, 7));
        }
        in_dead_segments(&mut world, seq + 1);
    }
}

/// What a crash may take back is not said to be applied.
#[test]
fn a_revision_is_said_when_it_is_durable() {
    let mut world = world(&[1], 1);
    let shard = shard(1, 0);
    let layers = vec![LayerId(1)..=LayerId(1)];
    world.ask(Request::DropLayers {
        shard,
        layers,
        revision: 3,
    });
    let mut before = 0;
    let mut said = Vec::new();
    for _ in 0..40 {
        let id = world.ask(Request::LayersRevision { shard });
        let Some(Ok(Reply::Revision(revision))) = world.replies.remove(&id) else {
            panic!("an answer at once")
        };
        let mut copy = (world.disk.clone(), world.kv.clone());
        copy.0.cut_power(0, &mut Rng(1));
        let (recovered, _) = recover(&mut copy.0, &mut copy.1, 5).expect("recovers");
        let mut after = World::over(copy.0, copy.1, recovered, 5, small_settings());
        let after = self::revision(&mut after, shard);
        assert!(
            revision <= after,
            "{revision} was said, {after} is what a crash leaves"
        );
        assert!(revision >= before);
        before = revision;
        said.push(revision);
        world.turn_end();
        world.happen();
    }
    assert_eq!((said[0], before), (0, 3));
}

fn merge(world: &mut World, ranges: &[(u32, u32)], called: u32, revision: u64) {
    let layers = ranges
        .iter()
        .map(|(first, last)| LayerId(*first)..=LayerId(*last));
    let ask = Request::MergeLayers {
        shard: shard(1, 0),
        layers: layers.collect(),
        called: LayerId(called),
        revision,
    };
    world.call(ask).expect("merged");
}

/// What a replica says of a leaf, to be compared with another's.
fn versions(world: &mut World, layer: u32) -> Vec<BlockVersion> {
    let ask = Request::LeafVersions {
        shard: shard(1, 0),
        lineage: Lineage::of_layer(VdiId(1), LayerId(layer)),
        leaf: LeafNo(0),
    };
    let Ok(Reply::Versions(versions)) = world.call(ask) else {
        panic!("versions")
    };
    versions
}

/// What stands there as it would had it been written for the layer that all of it is called.
fn bound_to(layer: u32, expected: &[Option<u64>]) -> Vec<BlockVersion> {
    let of = |(block, seq): (u32, &Option<u64>)| match seq {
        None => BlockVersion {
            seq: Seq(0),
            state: BlockState::Absent,
        },
        Some(seq) => {
            let key = SumKey {
                shard: shard(1, 0),
                layer: LayerId(layer),
                block: BlockNo(block),
                seq: Seq(*seq),
            };
            BlockVersion {
                seq: Seq(*seq),
                state: BlockState::Data(types::bind(key, crc32c(&content(*seq, block)))),
            }
        }
    };
    (0..).zip(expected).map(of).collect()
}

/// A hundred snapshots are deleted: with memory for fewer leaves than they have of one place.
#[test]
fn a_hundred_layers_become_one() {
    let (mut world, expected, mut seq) = deep_world();
    let all = lineage(&[(1, 0, DEPTH - 1)]);
    push_out(&mut world, &mut seq);
    merge(&mut world, &[(0, 40), (60, 60)], 60, 1);
    merge(&mut world, &[(60, 60), (41, 59)], 60, 2);
    merge(&mut world, &[(0, DEPTH - 1)], DEPTH - 1, 3);
    let live = expected.iter().flatten().count() as u64;
    for life in 1..6 {
        world.settle();
        let known = world
            .store
            .shards()
            .into_iter()
            .find(|known| known.shard == shard(1, 0));
        assert_eq!(
            known.map(|known| known.data_blocks),
            Some(live),
            "what is hidden is not counted"
        );
        assert_reads(&mut world, &all, 0, &expected);
        // By the name, by a number that it had, and through both.
        assert_reads(&mut world, &lineage(&[(1, DEPTH - 1, DEPTH - 1)]), 0, &expected);
        assert_reads(&mut world, &lineage(&[(1, 0, 7)]), 0, &expected);
        assert_eq!(versions(&mut world, DEPTH - 1), bound_to(DEPTH - 1, &expected));
        assert_eq!(versions(&mut world, 4), bound_to(DEPTH - 1, &expected));
        clean_everything(&mut world, life);
        world.crash_and(Crash::Kill, |_, kv| {
            if life % 2 == 0 {
                kv.0.clear();
            }
        });
        let prefix = [&b"l"[..], &shard(1, 0).to_u64().to_be_bytes()].concat();
        let kept = world.kv.0.keys().filter(|key| key.starts_with(&prefix));
        assert_eq!(kept.count(), 1, "the index keeps one leaf");
    }
    assert_eq!(revision(&mut world, shard(1, 0)), 3);
}

/// The last write of the stream comes late for an older number, loses at once, and its segment is used again unseen.
#[test]
fn a_write_that_loses_to_a_later_layer_makes_the_end_all_the_same() {
    let mut world = world(&[1, 9], 1);
    change(&mut world, write(1, 1, 0, 16, 1));
    merge(&mut world, &[(0, 1)], 1, 1);
    let zeros = |seq| Change {
        what: What::Zeros,
        ..write(9, 0, 5000, 128, seq)
    };
    let mut round = 0;
    for seq in 2..5 {
        let filler = |world: &mut World| {
            for at in 0..8 {
                change(world, write(9, 0, 5000 + at * 16, 16, seq));
            }
        };
        filler(&mut world);
        change(&mut world, write(1, 0, 0, 16, seq));
        filler(&mut world);
        change(&mut world, zeros(seq));
        for _ in 0..20 {
            round += 1;
            churn(&mut world, round, 40);
            world.crash_and(Crash::Kill, |_, kv| kv.0.clear());
            let shards = world.store.shards();
            let known = shards.into_iter().find(|known| known.shard == shard(1, 0));
            let is_left = known.map(|known| (known.end, known.data_blocks));
            assert_eq!(is_left, Some((Seq(seq), 16)));
        }
    }
}

/// A void in the newer of two layers that become one: of the older one's block, which shows, and of the void the leaf has to
/// keep both.
#[test]
fn a_void_goes_on_hiding_after_a_merge() {
    let mut world = world(&[1, 9], 1);
    change(&mut world, write(1, 0, 10, 6, 1));
    change(&mut world, write(1, 1, 12, 6, 2));
    // The tail's segment stays as it is, full of what lives; cleaning takes the one with the voids.
    change(&mut world, write(9, 0, 3000, 42, 1));
    for filler in 0..3 {
        change(&mut world, write(9, 0, filler * 16, 16, 2));
    }
    change(&mut world, void(1, 12, 2, 3));
    change(&mut world, void(1, 17, 5, 3));
    merge(&mut world, &[(0, 1)], 1, 1);
    let both = lineage(&[(1, 0, 1)]);
    let shown = [1, 1, 1, 1, 2, 2, 2].map(Some);
    for life in 1..30 {
        world.crash_and(Crash::Kill, |_, kv| {
            if life % 2 == 0 {
                kv.0.clear();
            }
        });
        assert_reads(&mut world, &both, 10, &shown);
        assert_reads(&mut world, &both, 17, &[None, None]);
        churn(&mut world, life, 60);
    }
}

/// Leaves are folded while an append waits to be applied, and there is memory for few of them.
#[test]
fn a_wide_clear_of_what_was_merged_ends() {
    let mut world = world(&[1, 9], 1);
    let mut seq = 0;
    for layer in 0..12 {
        for leaf in 0..16 {
            seq += 1;
            change(&mut world, write(1, layer, leaf * 256 + layer, 2, seq));
        }
    }
    push_out(&mut world, &mut seq);
    merge(&mut world, &[(0, 10)], 11, 1);
    merge(&mut world, &[(0, 11)], 11, 1);
    seq += 1;
    let zeros = Change {
        what: What::Zeros,
        ..write(1, 11, 0, 15 * 256, seq)
    };
    change(&mut world, zeros);
    world.settle();
    assert_eq!(world.store.shards()[0].data_blocks, 13);
    assert_reads(
        &mut world,
        &lineage(&[(1, 0, 11)]),
        15 * 256 - 1,
        &[None, Some(16)],
    );
}

/// What comes for a number that was merged: late writes of the stream stay below later layers, repair and voids mean
/// the whole.
#[test]
fn what_comes_for_a_merged_number_finds_its_place() {
    let mut world = world(&[1, 9], 1);
    change(&mut world, write(1, 0, 9, 6, 1));
    change(&mut world, write(1, 2, 10, 4, 2));
    change(&mut world, write(1, 5, 11, 1, 3));
    // Layer 5 says nothing of block 12, whatever its tail said.
    change(&mut world, write(1, 5, 12, 1, 4));
    change(&mut world, void(5, 12, 1, u64::MAX));
    // Layers 3 and 4 are another branch's.
    change(&mut world, write(1, 4, 10, 8, 5));
    merge(&mut world, &[(2, 2), (5, 5)], 5, 1);
    change(&mut world, write(1, 2, 11, 4, 6));
    let head = lineage(&[(1, 5, 5), (1, 0, 2)]);
    let branch = lineage(&[(1, 0, 4)]);
    let mut shown = [Some(1), Some(2), Some(3), Some(6), Some(6), Some(6)];
    let check = |world: &mut World, shown: &[Option<u64>]| {
        for life in 1..5 {
            assert_reads(world, &head, 9, shown);
            let of_branch = [Some(1), Some(5), Some(5), Some(5), Some(5), Some(5)];
            assert_reads(world, &branch, 9, &of_branch);
            let known = world
                .store
                .shards()
                .into_iter()
                .find(|known| known.shard == shard(1, 0));
            assert_eq!(known.map(|known| known.end), Some(Seq(6)));
            if life % 2 == 0 {
                churn(world, life / 2, 900);
            }
            world.crash_and(Crash::Kill, |_, kv| {
                if life > 2 {
                    kv.0.clear();
                }
            });
        }
    };
    check(&mut world, &shown);
    // The whole of it is void, down to the oldest part; but not below it.
    change(&mut world, void(2, 11, 2, u64::MAX));
    (shown[2], shown[3]) = (Some(1), Some(1));
    check(&mut world, &shown);
    let repair = Change {
        origin: Origin::Repair {
            live_from: Seq(u64::MAX),
        },
        ..write(1, 2, 13, 1, 3)
    };
    change(&mut world, repair);
    shown[4] = Some(3);
    check(&mut world, &shown);
    // What came by repair is later than what comes late for an older part.
    let late = write(1, 2, 13, 1, 6);
    change(&mut world, late);
    check(&mut world, &shown);
}

/// The request is answered when the log says so durably; a crash before that leaves all or nothing.
#[test]
fn a_drop_of_layers_holds_from_its_answer_on() {
    for seed in 0..40 {
        let mut world = World::new(seed, &SMALL, small_settings());
        put_record(&mut world, shard(1, 0));
        change(&mut world, write(1, 0, 5, 1, 1));
        change(&mut world, write(1, 1, 5, 50, 2));
        world
            .call(Request::Flush { shard: shard(1, 0) })
            .expect("flushed");
        let what = What::Gone(1);
        let id = world.ask(
            Change {
                what,
                ..write(1, 1, 0, 1, 0)
            }
            .request(),
        );
        world.turn_end();
        for _ in 0..seed % 8 {
            world.happen();
            world.turn_end();
        }
        let is_answered = world.replies.contains_key(&id);
        world.crash(Crash::Power(50));
        let blocks = world.store.shards()[0].data_blocks;
        world.settle();
        let is_gone = world.store.shards()[0].data_blocks == 1;
        assert!(
            is_gone || (blocks == 51 && !is_answered),
            "seed {seed}: {blocks} blocks"
        );
        let shown = if is_gone {
            [Some(1), None]
        } else {
            [Some(2), Some(2)]
        };
        assert_reads(&mut world, &lineage(&[(1, 0, 1)]), 5, &shown);
    }
}

/// Everything that was asked, and what each lineage must show of it.
struct Model {
    seed: u64,
    world: World,
    rng: Rng,
    seq: u64,
    changes: Vec<(Change, u64)>,
    /// So many of them are answered.
    answered: usize,
    /// Reads under way: what was asked, and how many changes were answered then.
    reads: BTreeMap<u64, (ShardId, Lineage, u32, u32, usize)>,
}

const HEAD_MAX: u32 = 11;
const LEAVES: u32 = 3;
const SHARDS: u64 = 2;

impl Model {
    fn new(seed: u64) -> Model {
        let mut world = World::new(seed, &SMALL, small_settings());
        for (vdi, no) in [(1, 0), (1, 1), (2, 0), (2, 1)] {
            put_record(&mut world, shard(vdi, no));
        }
        Model {
            seed,
            world,
            rng: Rng(seed ^ 0x1a7e5),
            seq: 0,
            changes: Vec::new(),
            answered: 0,
            reads: BTreeMap::new(),
        }
    }

    /// Of VDI 1 the head, a snapshot, the head after a roll-back; of VDI 2, a clone, the same and its parent's.
    fn lineage(&mut self, head: u32) -> Lineage {
        let past = self.rng.below(u64::from(head) + 1) as u32;
        match self.rng.below(5) {
            0 | 1 => lineage(&[(1, 0, head)]),
            2 => lineage(&[(1, 0, past)]),
            3 if past + 1 < head => lineage(&[(1, head, head), (1, 0, past)]),
            _ => lineage(&[(2, 0, head), (1, 0, past)]),
        }
    }

    fn range(&mut self) -> (u32, u32) {
        let leaf = self.rng.below(u64::from(LEAVES)) as u32;
        let slot = self.rng.below(30) as u32;
        let count = [1, 1, 2, 5, 24][self.rng.below(5) as usize];
        // Around the end of a leaf, so that both sides are hit often.
        ((leaf * 256 + 240 + slot).saturating_sub(24), count)
    }

    fn act(&mut self, head: u32) {
        let no = self.rng.below(SHARDS) as u32;
        let (block, count) = self.range();
        if self.rng.chance(45) {
            return self.ask_read(head, no, block, count);
        }
        // Repair writes into layers that are no head any more. What waits for a leaf is passed by others, so nothing but
        // reads is under way then.
        let is_repair = self.rng.chance(8);
        // Layers below the head, of one shard.
        let gone = self.rng.below(u64::from(head) + 1) as u32..head;
        let is_gone = is_repair && !gone.is_empty() && self.rng.chance(15);
        if is_repair {
            self.world.settle();
            self.collect();
            for _ in 0..3 {
                self.ask_read(head, no, block, count);
            }
        }
        self.seq += 1;
        let live_from = Seq(u64::MAX);
        let change = Change {
            shard: shard(1 + self.rng.below(2) as u32, no),
            layer: if is_repair {
                self.rng.below(u64::from(head) + 1) as u32
            } else {
                head
            },
            block,
            count,
            seq: self.seq,
            what: match self.rng.below(8) {
                0 | 1 => What::Zeros,
                2 | 3 if is_repair => What::Void,
                _ => What::Data,
            },
            origin: if is_repair {
                Origin::Repair { live_from }
            } else {
                Origin::Live
            },
        };
        let change = match is_gone {
            true => Change {
                layer: gone.start,
                what: What::Gone(gone.start + self.rng.below(gone.len() as u64) as u32),
                ..change
            },
            false => change,
        };
        let id = self.world.ask(change.request());
        self.changes.push((change, id));
        if is_repair {
            self.world.settle();
        }
    }

    fn ask_read(&mut self, head: u32, no: u32, block: u32, count: u32) {
        let lineage = self.lineage(head);
        let asks = shard(lineage.newest().0.0, no);
        let id = self.world.ask(read(asks, &lineage, block, count));
        self.reads
            .insert(id, (asks, lineage, block, count, self.answered));
    }

    /// What a block holds after so many changes.
    fn holds(&self, asks: ShardId, lineage: &Lineage, block: u32, changes: usize) -> Option<u64> {
        let mut layers = BTreeMap::new();
        let mut gone = Vec::new();
        for (change, _) in &self.changes[..changes] {
            if change.shard.no != asks.no || !change.covers(block) {
                continue;
            }
            let vdi = change.shard.vdi;
            if let What::Gone(last) = change.what {
                for layer in change.layer..=last {
                    gone.push((vdi, layer));
                    let step = lineage.step_of(vdi, LayerId(layer));
                    step.and_then(|step| layers.remove(&(std::cmp::Reverse(step), layer)));
                }
                continue;
            }
            let step = lineage.step_of(vdi, LayerId(change.layer));
            let Some(step) = step.filter(|_| !gone.contains(&(vdi, change.layer))) else {
                continue;
            };
            let rank = (std::cmp::Reverse(step), change.layer);
            match change.what {
                What::Void => layers.remove(&rank),
                _ => layers.insert(rank, change),
            };
        }
        let (_, newest) = layers.pop_last()?;
        (newest.what == What::Data).then_some(newest.seq)
    }

    fn collect(&mut self) {
        while let Some((_, id)) = self.changes.get(self.answered)
            && let Some(result) = self.world.replies.remove(id)
        {
            result.expect("a change succeeds");
            self.answered += 1;
        }
        let is_done = |id: &u64| self.world.replies.contains_key(id);
        let done: Vec<u64> = self.reads.keys().copied().filter(is_done).collect();
        for id in done {
            let (asks, lineage, block, count, from) = self.reads.remove(&id).expect("listed");
            let reply = self
                .world
                .replies
                .remove(&id)
                .expect("listed")
                .expect("a read succeeds");
            let blocks = blocks_of(reply);
            assert_eq!(blocks.len(), count as usize);
            for (block, bytes) in (block..).zip(blocks) {
                let is_it = |changes| {
                    let holds: Option<u64> = self.holds(asks, &lineage, block, changes);
                    bytes == holds.map(|seq| content(seq, block))
                };
                assert!(
                    (from..=self.changes.len()).any(is_it),
                    "seed {}: block {block} of {asks} through {lineage} is none of what it held",
                    self.seed
                );
            }
        }
    }

    fn run(&mut self) {
        for round in 0..HEAD_MAX {
            for _ in 0..60 {
                for _ in 0..self.rng.below(5) {
                    self.act(round);
                }
                self.world.turn_end();
                for _ in 0..self.rng.below(8) {
                    if self.world.happen() {
                        self.world.turn_end();
                    }
                }
                self.collect();
            }
            self.world.step(Event::Tick);
            self.world.settle();
            self.collect();
            assert!(self.reads.is_empty() && self.answered == self.changes.len());
            if self.rng.chance(40) {
                let is_index_lost = self.rng.chance(50);
                self.world.crash_and(Crash::Kill, |_, kv| {
                    if is_index_lost {
                        kv.0.clear();
                    }
                });
            }
        }
    }
}

#[test]
#[allow(
    clippy::disallowed_methods,
    reason = "a test takes its seed from whoever runs it"
)]
fn any_lineage_shows_what_its_layers_hold() {
    let (first, count) = match std::env::var("WEFT_SEED") {
        Ok(seed) => (seed.parse().expect("WEFT_SEED is a number"), 1),
        Err(_) => (0, 24),
    };
    for seed in first..first + count {
        let result = std::panic::catch_unwind(|| Model::new(seed).run());
        if let Err(panic) = result {
            eprintln!(
                "seed {seed}: repeat with WEFT_SEED={seed} cargo test -p weft-store --test layers any_lineage"
            );
            std::panic::resume_unwind(panic);
        }
    }
}
