//! One promise a test: what the store does on a given day.

mod support;

use support::{BLOCK, Crash, Geometry, MemDisk, MemKv, World, content, small_settings};
use types::{
    BlockNo, DiskId, HeapBlock, LayerId, LeafNo, Lineage, LineageStep, Payload, PoolId, Seq, ShardId,
    ShardNo, VdiId, crc32c,
};
use weft_store::{
    BlockState, ClearKind, Damage, FormatError, FormatParams, Origin, ReadPart, RebuildReason, Reply,
    Request, StoreError, StoreSettings, SuperblockError, format, fsck, inspect, read_superblock,
    rebuild_index, recover, recover_known,
};

const LAYER: LayerId = LayerId(0);
const SMALL: Geometry = Geometry {
    segments: 24,
    segment_bytes: 256 << 10,
};

fn shard(no: u32) -> ShardId {
    ShardId {
        vdi: VdiId(1),
        no: ShardNo(no),
    }
}

fn write_as(no: u32, block: u32, count: u32, seq: u64, origin: Origin) -> Request<HeapBlock> {
    let bytes: Vec<u8> = (block..block + count)
        .flat_map(|block| content(seq, block))
        .collect();
    Request::Write {
        shard: shard(no),
        layer: LAYER,
        block: BlockNo(block),
        seq: Seq(seq),
        crcs: bytes.chunks_exact(BLOCK).map(crc32c).collect(),
        data: HeapBlock::new(&bytes),
        origin,
    }
}

fn write(no: u32, block: u32, count: u32, seq: u64) -> Request<HeapBlock> {
    write_as(no, block, count, seq, Origin::Live)
}

fn flush(no: u32) -> Request<HeapBlock> {
    Request::Flush { shard: shard(no) }
}

fn trim(no: u32, block: u32, count: u32, seq: u64) -> Request<HeapBlock> {
    Request::Clear {
        shard: shard(no),
        layer: LAYER,
        block: BlockNo(block),
        count,
        seq: Seq(seq),
        kind: ClearKind::Trim,
        origin: Origin::Live,
    }
}

fn read(no: u32, block: u32, count: u32) -> Request<HeapBlock> {
    Request::Read {
        shard: shard(no),
        lineage: Lineage::of_layer(shard(no).vdi, LAYER),
        block: BlockNo(block),
        count,
    }
}

fn bytes_of(reply: Reply<HeapBlock>) -> Vec<u8> {
    let Reply::Read(parts) = reply else {
        panic!("not a read")
    };
    let mut bytes = Vec::new();
    for part in parts {
        match part {
            ReadPart::Zeros(count) => bytes.resize(bytes.len() + count as usize * BLOCK, 0),
            ReadPart::Data(data) => bytes.extend_from_slice(data.bytes()),
        }
    }
    bytes
}

fn world() -> World {
    let mut world = World::new(1, &SMALL, small_settings());
    for no in 0..3 {
        put_record(&mut world, no);
    }
    world
}

fn put_record(world: &mut World, no: u32) {
    world
        .call(Request::PutRecord {
            shard: shard(no),
            record: vec![no as u8 + 1; 9],
        })
        .expect("record");
}

fn assert_holds(world: &mut World, no: u32, block: u32, seq: u64) {
    let bytes = bytes_of(world.call(read(no, block, 1)).expect("readable"));
    assert!(
        bytes == content(seq, block),
        "block {block} is not what write {seq} made it"
    );
}

/// Byte offset on the disk where a block's content lies.
fn find_content(world: &World, seq: u64, block: u32) -> u64 {
    let wanted = content(seq, block);
    let mut buffer = vec![0; BLOCK];
    let found = (0..world.disk.bytes / BLOCK as u64)
        .rev()
        .find(|at| world.disk.read(at * BLOCK as u64, &mut buffer).is_ok() && buffer == wanted);
    found.expect("it is somewhere") * BLOCK as u64
}

#[test]
fn one_small_write_is_one_disk_write() {
    let mut world = world();
    world.submitted.clear();
    world.call(write(0, 5, 1, 1)).expect("write");
    assert_eq!(world.submitted, ["write"]);
    world.submitted.clear();
    world.call(flush(0)).expect("flush");
    // At rest a header says in the log what the flush promised, and is synced; once.
    assert_eq!(world.submitted, ["sync", "write", "sync"]);
    world.call(flush(0)).expect("flush");
    assert_eq!(world.submitted.len(), 3, "a flush of nothing new needs no sync");
}

/// Ten writes one after the other lie with a header between each two. One read of the disk brings them, and if
/// nobody can read a header between them that is nobody's loss.
#[test]
fn runs_that_almost_touch_are_one_disk_read() {
    let mut world = world();
    for block in 0..10 {
        world
            .call(write(0, block, 1, u64::from(block) + 1))
            .expect("write");
    }
    world.submitted.clear();
    let content = world.call(read(0, 0, 10)).expect("read");
    assert_eq!(world.submitted, ["read"]);
    let at = find_content(&world, 5, 4);
    world.disk.unreadable.push(at / BLOCK as u64 + 1);
    world.submitted.clear();
    let again = world.call(read(0, 0, 10)).expect("read past a bad header");
    assert_eq!(world.submitted, ["read"; 11]);
    assert_eq!(format!("{content:?}"), format!("{again:?}"));
}

#[test]
fn requests_of_a_turn_share_a_batch_and_flushes_a_sync() {
    let mut world = world();
    world.submitted.clear();
    for block in 0..20 {
        world.ask(write(0, block * 3, 1, u64::from(block) + 1));
        world.ask(flush(0));
    }
    world.settle();
    // The last two are the header that vouches for the flush, written at rest.
    assert_eq!(world.submitted, ["write", "sync", "write", "sync"]);
    assert_eq!(world.replies.len(), 20 * 2);
}

#[test]
fn writes_survive_restart_and_the_loss_of_the_index() {
    for fate in 0..4 {
        let mut world = world();
        world.call(write(0, 250, 20, 1)).expect("write");
        world.call(trim(0, 255, 2, 2)).expect("trim");
        world.call(write(1, 0, 256, 3)).expect("write");
        world
            .call(Request::SetEnd {
                shard: shard(1),
                end: Seq(40),
            })
            .expect("end");
        world.call(flush(0)).expect("flush");
        let report = world.crash_and(Crash::Power(0), |disk, kv| match fate {
            0 => {}
            1 => kv.0.clear(),
            2 => kv.0.values_mut().for_each(|value| value[1] ^= 0x10),
            _ => drop(rebuild_index(disk, kv, 9).expect("rebuild")),
        });
        let expected = [
            None,
            Some(RebuildReason::Missing),
            Some(RebuildReason::Damaged),
            None,
        ][fate];
        assert_eq!(
            (report.rebuilt, &report.damage[..]),
            (expected, &[][..]),
            "fate {fate}"
        );
        let ends: Vec<_> = world
            .store
            .shards()
            .iter()
            .map(|s| (s.end.0, s.record[0], s.data_blocks))
            .collect();
        assert_eq!(ends, [(2, 1, 18), (40, 2, 256), (0, 3, 0)], "fate {fate}");
        for block in [250, 254, 257, 269] {
            assert_holds(&mut world, 0, block, 1);
        }
        assert_eq!(
            bytes_of(world.call(read(0, 255, 2)).expect("zeros")),
            vec![0; 2 * BLOCK]
        );
        assert_holds(&mut world, 1, 255, 3);
    }
}

#[test]
fn an_older_index_is_noticed_and_built_anew() {
    let mut world = world();
    world.call(write(0, 0, 30, 1)).expect("write");
    world.crash(Crash::Power(0));
    let old = world.kv.clone();
    world.call(write(0, 0, 30, 2)).expect("write");
    world.call(flush(0)).expect("flush");
    world.crash(Crash::Power(0));
    let report = world.crash_and(Crash::Power(0), |_, kv| *kv = old);
    assert_eq!(report.rebuilt, Some(RebuildReason::RolledBack));
    assert_holds(&mut world, 0, 7, 2);
}

/// An old copy of the whole disk, index included: what remembers is outside of it. Openings that do not get far must not
/// make it look younger.
#[test]
fn an_older_copy_is_noticed_however_often_it_was_nearly_opened() {
    let mut world = world();
    world.call(write(0, 0, 4, 1)).expect("write");
    world.crash(Crash::Power(0));
    let (mut disk, mut kv) = (world.disk.clone(), world.kv.clone());
    let young_index = world.kv.clone();
    world.call(write(0, 0, 4, 2)).expect("write");
    let known = world.crash_and(Crash::Power(0), |_, _| ()).open_count;
    for _ in 0..3 {
        disk.fails_sync = true;
        assert!(recover_known(&mut disk, &mut kv, 7, known).is_err());
        disk.fails_sync = false;
    }
    for mut kv in [kv, young_index, MemKv::default()] {
        let mut disk = disk.clone();
        for _ in 0..2 {
            let (recovered, report) = recover_known(&mut disk, &mut kv, 7, known).expect("it can be read");
            let shards = recovered.shards();
            assert!(
                !shards.is_empty() && shards.iter().all(|shard| shard.is_doubtful),
                "{report:?}"
            );
        }
    }
}

#[test]
fn real_disks_have_segments_that_hold_any_write_whole() {
    for (bytes, segment_bytes, is_allowed) in [
        (64 << 20, 64 << 10, true),
        (65 << 20, 64 << 10, false),
        (65 << 20, (2 << 20) - 4096, false),
        (65 << 20, 2 << 20, true),
        (64 << 20, 60 << 10, false),
    ] {
        let params = FormatParams {
            segment_bytes,
            ..FormatParams::new(DiskId(5), PoolId(1), 3)
        };
        let result = format(&mut MemDisk::new(bytes), &mut MemKv::default(), params);
        assert_eq!(
            result.is_ok(),
            is_allowed,
            "{segment_bytes} of {bytes}: {result:?}"
        );
    }
}

/// A checkpoint between the request and its batch once said that the shard was gone. A crash kept that and lost
/// the drop: the shard's blocks came back under the next one of its name.
#[test]
fn a_drop_that_is_not_in_the_log_is_not_in_the_index() {
    let settings = StoreSettings {
        cache_bytes: 1 << 20,
        checkpoint_bytes: 64 << 10,
        ..small_settings()
    };
    let mut world = World::new(1, &SMALL, settings);
    put_record(&mut world, 0);
    put_record(&mut world, 1);
    world.call(write(0, 80, 1, 81)).expect("write");
    world.ask(Request::DropShard { shard: shard(0) });
    world.ask(write(1, 0, 20, 1));
    world.turn_end();
    let sync = world
        .ios
        .iter()
        .position(|(_, operation, _)| matches!(operation, edge::DiskOp::Sync));
    world.io_step(sync.expect("the checkpoint wants one"));
    world.turn_end();
    assert_eq!(world.index.len(), 1, "a checkpoint");
    world.index_step();
    assert!(!world.ios.is_empty(), "the drop is under way");
    world.ios.clear();
    world.crash(Crash::Kill);
    assert_eq!(world.store.shards()[0].shard, shard(0));
    assert_holds(&mut world, 0, 80, 81);
}

/// A checkpoint repeats the fence of its own segment, and was once taken for the start of a life, which may skip
/// numbers: a write torn just before it vanished, and what came behind it was adopted.
#[test]
fn a_checkpoint_behind_a_torn_batch_is_dropped() {
    let settings = StoreSettings {
        cache_bytes: 1 << 20,
        checkpoint_bytes: 64 << 10,
        ..small_settings()
    };
    let mut world = World::new(1, &SMALL, settings);
    put_record(&mut world, 0);
    // An older segment in use keeps the fence of the second life in use.
    world.crash(Crash::Kill);
    world.ask(write(0, 0, 20, 1));
    world.turn_end();
    let sync = world
        .ios
        .iter()
        .position(|(_, operation, _)| matches!(operation, edge::DiskOp::Sync));
    world.io_step(sync.expect("the checkpoint wants one"));
    world.turn_end();
    world.index_step();
    world.ask(write(0, 0, 1, 2));
    world.turn_end();
    let is_append = |bytes: usize| {
        move |(_, operation, _): &(_, edge::DiskOp<HeapBlock>, _)| match operation {
            edge::DiskOp::Write { data, .. } => data.iter().map(Payload::length).sum::<usize>() == bytes,
            _ => false,
        }
    };
    let second = world
        .ios
        .iter()
        .position(is_append(BLOCK))
        .expect("with the checkpoint");
    world.io_step(second);
    assert!(
        world.ios.iter().any(is_append(20 * BLOCK)),
        "the first is under way"
    );
    world.ios.clear();
    let report = world.crash(Crash::Kill);
    assert_eq!((report.batches_dropped, report.damage), (1, vec![]));
    assert_eq!(world.store.shards()[0].end, Seq(0));
}

#[test]
fn another_disks_index_is_not_believed() {
    let mut world = world();
    world.call(write(0, 0, 30, 1)).expect("write");
    world.call(flush(0)).expect("flush");
    let mut other = MemDisk::new(64 << 20);
    let mut foreign = MemKv::default();
    let mut params = FormatParams::new(DiskId(5), PoolId(1), 3);
    params.segment_bytes = 256 << 10;
    format(&mut other, &mut foreign, params).expect("format");
    recover(&mut other, &mut foreign, 1).expect("start");
    let report = world.crash_and(Crash::Power(0), |_, kv| *kv = foreign);
    assert_eq!(report.rebuilt, Some(RebuildReason::Foreign));
    assert_holds(&mut world, 0, 7, 1);
}

#[test]
fn a_flipped_bit_is_never_passed_on() {
    let mut world = world();
    world.call(write(0, 10, 4, 1)).expect("write");
    let at = find_content(&world, 1, 12);
    world.disk.flip_bit(at + 100);
    let answer = world.call(read(0, 10, 4));
    assert_eq!(
        answer.unwrap_err(),
        StoreError::Corrupt {
            shard: shard(0),
            layer: LAYER,
            block: BlockNo(12)
        }
    );
    assert_eq!(world.store.stats().corrupt_blocks, 1);
    assert_holds(&mut world, 0, 13, 1);
    // Repair with the same seq puts it right.
    let repair = Origin::Repair { live_from: Seq(2) };
    world.call(write_as(0, 12, 1, 1, repair)).expect("repair");
    assert_holds(&mut world, 0, 12, 1);
    assert!(
        !fsck(&world.disk, &mut |_, _| ()).expect("check").is_clean(),
        "the old copy is still there"
    );
}

#[test]
fn an_unreadable_block_is_corrupt_and_not_a_failed_disk() {
    let mut world = world();
    world.call(write(0, 10, 4, 1)).expect("write");
    let at = find_content(&world, 1, 11);
    world.disk.unreadable.push(at / BLOCK as u64);
    assert!(matches!(
        world.call(read(0, 11, 1)),
        Err(StoreError::Corrupt { .. })
    ));
    assert_holds(&mut world, 0, 10, 1);
    assert_eq!(world.failures, []);
}

#[test]
fn repair_does_not_replace_the_running_stream() {
    let mut world = world();
    world.call(write(0, 0, 4, 9)).expect("write");
    world.call(write(0, 2, 1, 12)).expect("write");
    let repair = write_as(0, 0, 4, 8, Origin::Repair { live_from: Seq(10) });
    // Beside the repair the stream goes on.
    world.ask(write(0, 3, 1, 13));
    world.call(repair).expect("repair");
    for (block, seq) in [(0, 8), (1, 8), (2, 12), (3, 13)] {
        assert_holds(&mut world, 0, block, seq);
    }
    assert_eq!(world.store.shards()[0].end, Seq(13));
    world.call(flush(0)).expect("flush");
    world.crash_and(Crash::Power(0), |_, kv| kv.0.clear());
    for (block, seq) in [(0, 8), (1, 8), (2, 12), (3, 13)] {
        assert_holds(&mut world, 0, block, seq);
    }
    assert_eq!(world.store.shards()[0].end, Seq(13));
}

#[test]
fn a_failed_sync_is_final_and_answers_everyone() {
    let mut world = world();
    world.disk.fails_sync = true;
    let flushes = [
        world.ask(write(0, 0, 1, 1)),
        world.ask(flush(0)),
        world.ask(flush(0)),
    ];
    world.settle();
    world.disk.fails_sync = false;
    assert!(world.replies[&flushes[0]].is_ok());
    for id in &flushes[1..] {
        assert!(matches!(world.replies[id], Err(StoreError::DiskFailed(_))));
    }
    assert_eq!(world.failures.len(), 1);
    assert!(matches!(
        world.call(write(0, 0, 1, 2)),
        Err(StoreError::DiskFailed(_))
    ));
    assert!(matches!(
        world.call(read(0, 0, 1)),
        Err(StoreError::DiskFailed(_))
    ));
    assert_eq!(world.failures.len(), 1);
}

#[test]
fn cleaning_keeps_up_with_overwrites_at_a_high_fill() {
    let mut world = world();
    let capacity = (world.store.stats().capacity_bytes / BLOCK as u64) as u32;
    let blocks = capacity * 9 / 10;
    let mut last = vec![0u64; blocks as usize];
    for seq in 1..=6 * u64::from(blocks) {
        let block = if seq <= u64::from(blocks) {
            seq as u32 - 1
        } else {
            world.rng.below(u64::from(blocks)) as u32
        };
        last[block as usize] = seq;
        world.ask(write(0, block, 1, seq));
        if seq % 8 == 0 {
            world.settle();
        }
    }
    world.settle();
    assert_eq!(world.store.stats().waiting_for_space, 0);
    assert!(world.store.stats().cleaned_blocks > 0);
    assert_eq!(world.full, []);
    world.call(flush(0)).expect("flush");
    for round in 0..2 {
        for block in 0..blocks {
            assert_holds(&mut world, 0, block, last[block as usize]);
        }
        if round == 0 {
            world.crash_and(Crash::Power(0), |_, kv| kv.0.clear());
        }
    }
    assert_eq!(world.store.shards()[0].data_blocks, u64::from(blocks));
    assert_eq!(world.store.stats().live_blocks, u64::from(blocks));
    assert!(fsck(&world.disk, &mut |_, _| ()).expect("check").is_clean());
}

#[test]
fn a_full_disk_waits_and_goes_on_when_a_shard_is_dropped() {
    let mut world = world();
    let capacity = (world.store.stats().capacity_bytes / BLOCK as u64) as u32;
    let mut seq = 0;
    for no in [0, 1] {
        for block in (0..capacity / 2 - 16).step_by(16) {
            seq += 1;
            world.ask(write(no, block, 16, seq));
            world.settle();
        }
    }
    let waiting: Vec<u64> = (0..20)
        .map(|at| world.ask(write(2, at * 16, 16, 1 + u64::from(at))))
        .collect();
    world.settle();
    assert_eq!(world.full, [true]);
    assert!(world.store.stats().waiting_for_space > 0);
    world.call(read(0, 0, 16)).expect("reads go on");
    world
        .call(trim(1, 0, 4, 9999))
        .expect("trims of other shards go on");
    world.call(flush(0)).expect("flushes of other shards go on");
    put_record(&mut world, 3);
    let waits = world.ask(flush(2));
    world.settle();
    assert!(!world.replies.contains_key(&waits), "its writes are not done");
    put_record(&mut world, 1);
    world.call(Request::DropShard { shard: shard(0) }).expect("drop");
    world.settle();
    assert_eq!(world.full, [true, false]);
    for id in waiting.into_iter().chain([waits]) {
        assert!(world.replies.remove(&id).expect("answered").is_ok());
    }
    assert_holds(&mut world, 2, 319, 20);
    assert_eq!(
        world.call(read(0, 0, 1)).unwrap_err(),
        StoreError::NoShard(shard(0))
    );
}

#[test]
fn a_full_disk_goes_on_when_the_guest_that_waits_trims() {
    let mut world = world();
    let capacity = (world.store.stats().capacity_bytes / BLOCK as u64) as u32;
    let mut ids = Vec::new();
    for at in 0..capacity / 16 + 4 {
        ids.push(world.ask(write(0, at * 16, 16, u64::from(at) + 1)));
        world.settle();
    }
    assert!(world.store.stats().waiting_for_space > 0);
    // The trim must not pass the writes before it, so those are let through.
    ids.push(world.ask(trim(0, 0, 256, 9999)));
    world.settle();
    assert_eq!(world.store.stats().waiting_for_space, 0);
    for id in ids {
        assert!(world.replies.remove(&id).expect("answered").is_ok());
    }
}

#[test]
fn a_dropped_shard_stays_dropped_and_may_come_back_empty() {
    for is_rebuilt in [false, true] {
        let mut world = world();
        world.call(write(0, 0, 200, 1)).expect("write");
        world.call(write(1, 0, 50, 1)).expect("write");
        world.crash(Crash::Kill);
        world.call(Request::DropShard { shard: shard(0) }).expect("drop");
        assert_eq!(world.store.stats().live_blocks, 50);
        world.crash_and(Crash::Power(0), |_, kv| {
            if is_rebuilt {
                kv.0.clear();
            }
        });
        assert!(
            world
                .store
                .shards()
                .iter()
                .all(|summary| summary.shard != shard(0))
        );
        put_record(&mut world, 0);
        assert_eq!(
            bytes_of(world.call(read(0, 0, 9)).expect("zeros")),
            vec![0; 9 * BLOCK]
        );
        world.call(write(0, 3, 1, 5)).expect("write");
        world.call(flush(0)).expect("flush");
        world.crash_and(Crash::Power(0), |_, kv| {
            if is_rebuilt {
                kv.0.clear();
            }
        });
        assert_holds(&mut world, 0, 3, 5);
        assert_eq!(
            bytes_of(world.call(read(0, 4, 9)).expect("zeros")),
            vec![0; 9 * BLOCK]
        );
        assert_eq!(world.store.stats().live_blocks, 51);
    }
}

#[test]
fn a_corrupt_block_stays_corrupt_when_its_segment_is_cleaned() {
    let mut world = world();
    // Not in the segment that recovery opened: that is the last to be used again.
    for seq in 1..=400 {
        world.call(write(0, seq as u32 % 300, 1, seq)).expect("write");
    }
    world.call(write(1, 0, 1, 1)).expect("write");
    let at = find_content(&world, 1, 0);
    world.disk.flip_bit(at + 9);
    // Write until its segment has been cleaned and used again.
    for seq in 401..4400 {
        let block = world.rng.below(300) as u32;
        world.call(write(0, block, 1, seq)).expect("write");
    }
    let mut buffer = vec![0; BLOCK];
    world.disk.read(at, &mut buffer).expect("readable");
    let mut rotten = content(1, 0);
    rotten[9] ^= 1;
    assert!(buffer != rotten, "its place was used again");
    let corrupt = StoreError::Corrupt {
        shard: shard(1),
        layer: LAYER,
        block: BlockNo(0),
    };
    assert_eq!(world.call(read(1, 0, 1)).unwrap_err(), corrupt);
    world.call(flush(0)).expect("flush");
    world.crash_and(Crash::Power(0), |_, kv| kv.0.clear());
    assert_eq!(world.call(read(1, 0, 1)).unwrap_err(), corrupt);
}

#[test]
fn a_batch_missing_below_the_durable_point_is_reported_and_the_rest_kept() {
    let mut world = world();
    world.call(write(0, 0, 1, 1)).expect("write");
    world.call(write(0, 1, 1, 2)).expect("write");
    world.call(write(0, 2, 1, 3)).expect("write");
    world.call(flush(0)).expect("flush");
    world.call(write(0, 3, 1, 4)).expect("write");
    world.call(flush(0)).expect("flush");
    let header = find_content(&world, 2, 1) - BLOCK as u64;
    let report = world.crash_and(Crash::Power(100), |disk, _| disk.flip_bit(header + 70));
    assert!(
        matches!(report.damage[..], [Damage::Batches { first, last }] if first == last),
        "{report:?}"
    );
    for (block, seq) in [(0, 1), (2, 3), (3, 4)] {
        assert_holds(&mut world, 0, block, seq);
    }
}

#[test]
fn either_superblock_is_enough_and_two_bad_ones_have_a_name() {
    let world = world();
    let good = read_superblock(&world.disk).expect("good");
    for broken in [0, 64 << 10] {
        let mut disk = world.disk.clone();
        disk.flip_bit(broken + 50);
        assert_eq!(read_superblock(&disk), Ok(good));
        assert!(!fsck(&disk, &mut |_, _| ()).expect("check").is_clean());
    }
    let mut disk = world.disk.clone();
    disk.flip_bit(50);
    disk.flip_bit((64 << 10) + 50);
    assert!(matches!(
        read_superblock(&disk),
        Err(SuperblockError::BothDamaged { .. })
    ));
    assert_eq!(
        read_superblock(&MemDisk::new(64 << 20)),
        Err(SuperblockError::NotFormatted)
    );
}

#[test]
fn a_disk_too_small_is_refused_with_numbers() {
    let mut disk = MemDisk::new(100 << 20);
    let params = FormatParams::new(DiskId(1), PoolId(1), 1);
    let refused = format(&mut disk, &mut MemKv::default(), params).unwrap_err();
    let need = (1 << 20) + 8 * (32 << 20);
    assert_eq!(
        refused,
        FormatError::TooSmall {
            have: 100 << 20,
            need,
            segment_bytes: 32 << 20
        }
    );
}

#[test]
fn offsets_beyond_five_tebibytes_are_right() {
    // 256 MiB segments keep the table small; only the far end of the disk is free to write on.
    let geometry = Geometry {
        segments: 21_000,
        segment_bytes: 256 << 20,
    };
    let mut world = World::new(3, &geometry, small_settings());
    assert!(world.disk.bytes > 5 << 40);
    put_record(&mut world, 0);
    world.call(write(0, 0, 256, 1)).expect("write");
    world.call(flush(0)).expect("flush");
    world.crash(Crash::Power(0));
    assert_holds(&mut world, 0, 255, 1);
    let info = inspect(&world.disk).expect("inspect");
    assert_eq!(
        info.segments
            .iter()
            .map(|segment| segment.data_blocks)
            .sum::<u32>(),
        256
    );
}

#[test]
fn changed_leaves_and_versions_tell_what_resync_needs() {
    let mut world = world();
    world.call(write(0, 0, 1, 1)).expect("write");
    world.call(write(0, 256, 1, 5)).expect("write");
    world.call(trim(0, 1024, 1, 7)).expect("trim");
    world.crash(Crash::Kill);
    let mut ask = |newer, from| {
        let request = Request::ChangedLeaves {
            shard: shard(0),
            newer_than: Seq(newer),
            from: (LAYER, LeafNo(from)),
        };
        match world.call(request) {
            Ok(Reply::Leaves(leaves)) => {
                assert!(leaves.iter().all(|(layer, _)| *layer == LAYER));
                leaves.iter().map(|(_, leaf)| leaf.0).collect::<Vec<_>>()
            }
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(ask(0, 0), [0, 1, 4]);
    assert_eq!(ask(0, 1), [1, 4]);
    assert_eq!(ask(4, 0), [1, 4]);
    assert_eq!(ask(7, 0), Vec::<u32>::new());
    let request = Request::LeafVersions {
        shard: shard(0),
        lineage: Lineage::of_layer(shard(0).vdi, LAYER),
        leaf: LeafNo(4),
    };
    let Ok(Reply::Versions(versions)) = world.call(request) else {
        panic!("versions")
    };
    assert_eq!(
        (versions[0].seq, versions[0].state),
        (Seq(7), BlockState::Clear(ClearKind::Trim))
    );
    assert_eq!(versions[1].state, BlockState::Absent);
}

/// Ten thousand layers of which two hold something are two leaves to a listing; and versions are read through layers
/// as content is.
#[test]
fn layers_that_hold_nothing_are_not_listed_and_versions_are_those_that_a_reader_sees() {
    let mut world = world();
    let in_layer = |layer: u32, request: Request<HeapBlock>| match request {
        Request::Write {
            shard,
            block,
            seq,
            data,
            crcs,
            origin,
            ..
        } => Request::Write {
            shard,
            layer: LayerId(layer),
            block,
            seq,
            data,
            crcs,
            origin,
        },
        other => panic!("{other:?}"),
    };
    world.call(in_layer(1, write(0, 0, 3, 1))).expect("write");
    world.call(in_layer(1, write(0, 600, 1, 2))).expect("write");
    world.call(in_layer(10_000, write(0, 1, 1, 3))).expect("write");
    let list = |world: &mut World, newer: u64, from: (u32, u32)| {
        let request = Request::ChangedLeaves {
            shard: shard(0),
            newer_than: Seq(newer),
            from: (LayerId(from.0), LeafNo(from.1)),
        };
        match world.call(request) {
            Ok(Reply::Leaves(leaves)) => leaves
                .iter()
                .map(|(layer, leaf)| (layer.0, leaf.0))
                .collect::<Vec<_>>(),
            other => panic!("{other:?}"),
        }
    };
    let versions = |world: &mut World, lowest: u32, highest: u32| {
        let step = LineageStep {
            vdi: VdiId(1),
            lowest: LayerId(lowest),
            highest: LayerId(highest),
        };
        let request = Request::LeafVersions {
            shard: shard(0),
            lineage: Lineage::new(&[step]).expect("a range"),
            leaf: LeafNo(0),
        };
        let Ok(Reply::Versions(versions)) = world.call(request) else {
            panic!("versions")
        };
        assert_eq!(versions.len(), 256);
        versions
            .iter()
            .take(4)
            .map(|version| version.seq.0)
            .collect::<Vec<_>>()
    };
    for crash in [false, true] {
        if crash {
            world.crash(Crash::Kill);
        }
        let world = &mut world;
        assert_eq!(list(world, 0, (0, 0)), [(1, 0), (1, 2), (10_000, 0)]);
        assert_eq!(list(world, 1, (0, 0)), [(1, 2), (10_000, 0)]);
        assert_eq!(list(world, 0, (1, 1)), [(1, 2), (10_000, 0)]);
        assert_eq!(list(world, 0, (2, 0)), [(10_000, 0)]);
        assert_eq!(list(world, 0, (10_000, 1)), []);
        assert_eq!(versions(world, 0, 10_000), [1, 3, 1, 0]);
        assert_eq!(versions(world, 0, 9_999), [1, 1, 1, 0]);
        assert_eq!(versions(world, 10_000, 10_000), [0, 3, 0, 0]);
    }
}

#[test]
fn a_late_write_of_a_dead_process_never_joins_the_log() {
    let mut world = world();
    world.call(write(0, 0, 1, 1)).expect("write");
    // A write is under way when the process dies, and reaches the disk only after the next start.
    world.ask(write(0, 0, 1, 2));
    world.turn_end();
    let (_, late, _) = world.ios.pop().expect("an append");
    world.crash(Crash::Kill);
    let edge::DiskOp::Write { offset, header, data } = late else {
        panic!("an append")
    };
    let mut bytes = header.0.to_vec();
    data.iter().for_each(|part| bytes.extend_from_slice(part.bytes()));
    world.disk.apply(offset, &bytes);
    for is_rebuilt in [false, true] {
        world.crash_and(Crash::Power(100), |_, kv| {
            if is_rebuilt {
                kv.0.clear();
            }
        });
        assert_holds(&mut world, 0, 0, 1);
    }
}
