//! Random worlds: writes, clears, flushes, reads, crashes, lost and old indexes, cleaning at a high fill. After
//! every crash the disk must hold exactly the state after some prefix of what was asked, and a prefix that
//! contains everything durable.

mod support;

use std::collections::BTreeMap;

use support::{Crash, Geometry, MemKv, Rng, World, content, small_settings};
use types::{BlockNo, HeapBlock, LayerId, LeafNo, Lineage, Payload, Seq, ShardId, ShardNo, VdiId, crc32c};
use weft_store::{BlockState, ClearKind, Event, Origin, ReadPart, Reply, Request};

const BLOCKS: u32 = 700;
const LAYER: LayerId = LayerId(2);

fn shard(no: u32) -> ShardId {
    ShardId {
        vdi: VdiId(3),
        no: ShardNo(no),
    }
}

fn write(shard: ShardId, block: u32, count: u32, seq: u64) -> Request<HeapBlock> {
    let bytes: Vec<u8> = (block..block + count)
        .flat_map(|block| content(seq, block))
        .collect();
    Request::Write {
        shard,
        layer: LAYER,
        block: BlockNo(block),
        seq: Seq(seq),
        crcs: bytes.chunks_exact(support::BLOCK).map(crc32c).collect(),
        data: HeapBlock::new(&bytes),
        origin: Origin::Live,
    }
}

fn clear(shard: ShardId, block: u32, count: u32, seq: u64) -> Request<HeapBlock> {
    Request::Clear {
        shard,
        layer: LAYER,
        block: BlockNo(block),
        count,
        seq: Seq(seq),
        kind: ClearKind::Trim,
        origin: Origin::Live,
    }
}

/// What was asked, in order; its index plus one is the seq.
struct Asked {
    shard: u32,
    block: u32,
    count: u32,
    is_data: bool,
    request: u64,
}

struct Model {
    seed: u64,
    world: World,
    asked: Vec<Asked>,
    /// Everything up to this seq must survive a power cut.
    durable: u64,
    /// Everything up to this seq was answered.
    replied: u64,
    /// Flushes of both shards, and the seq that they cover together.
    flushes: BTreeMap<[u64; 2], u64>,
    reads: BTreeMap<u64, (u32, u32, u32, u64)>,
    old_index: Option<MemKv>,
}

impl Model {
    fn new(seed: u64) -> Model {
        let geometry = Geometry {
            segments: 44,
            segment_bytes: 256 << 10,
        };
        let mut world = World::new(seed, &geometry, small_settings());
        for no in 0..2 {
            world
                .call(Request::PutRecord {
                    shard: shard(no),
                    record: vec![no as u8; 20],
                })
                .expect("record");
        }
        Model {
            seed,
            world,
            asked: Vec::new(),
            durable: 0,
            replied: 0,
            flushes: BTreeMap::new(),
            reads: BTreeMap::new(),
            old_index: None,
        }
    }

    fn act(&mut self, rng: &mut Rng) {
        let no = rng.below(2) as u32;
        let block = rng.below(u64::from(BLOCKS) - 40) as u32;
        match rng.below(100) {
            0..60 => {
                let count = [1, 1, 1, 2, 8, 40][rng.below(6) as usize];
                self.change(no, block, count, true);
            }
            60..70 => self.change(no, block, [1, 5, 40][rng.below(3) as usize], false),
            70..72 => self.change(no, 0, BLOCKS, false),
            72..80 => {
                let ids = [0, 1].map(|no| self.world.ask(Request::Flush { shard: shard(no) }));
                self.flushes.insert(ids, self.asked.len() as u64);
            }
            _ => {
                let count = 1 + rng.below(40) as u32;
                let read = Request::Read {
                    shard: shard(no),
                    lineage: Lineage::of_layer(shard(no).vdi, LAYER),
                    block: BlockNo(block),
                    count,
                };
                let replied = self.replied;
                let id = self.world.ask(read);
                self.reads.insert(id, (no, block, count, replied));
            }
        }
    }

    fn change(&mut self, no: u32, block: u32, count: u32, is_data: bool) {
        let seq = self.asked.len() as u64 + 1;
        let make = if is_data { write } else { clear };
        let request = self.world.ask(make(shard(no), block, count, seq));
        self.asked.push(Asked {
            shard: no,
            block,
            count,
            is_data,
            request,
        });
    }

    fn collect(&mut self) {
        while let Some(next) = self.asked.get(self.replied as usize) {
            match self.world.replies.remove(&next.request) {
                Some(result) => drop(result.expect("a write succeeds")),
                None => break,
            }
            self.replied += 1;
        }
        let is_done = |ids: &[u64; 2]| ids.iter().all(|id| self.world.replies.contains_key(id));
        let done: Vec<[u64; 2]> = self.flushes.keys().copied().filter(is_done).collect();
        for ids in done {
            let covered = self.flushes.remove(&ids).expect("listed");
            assert!(
                self.replied >= covered,
                "a flush was answered before the writes it covers"
            );
            self.durable = self.durable.max(covered);
        }
        let done: Vec<u64> = self
            .reads
            .keys()
            .copied()
            .filter(|id| self.world.replies.contains_key(id))
            .collect();
        for id in done {
            let (no, block, count, from) = self.reads.remove(&id).expect("listed");
            let reply = self
                .world
                .replies
                .remove(&id)
                .expect("listed")
                .expect("a read succeeds");
            for (block, bytes) in (block..block + count).zip(blocks_of(reply)) {
                assert!(
                    self.may_be(no, block, from, &bytes),
                    "seed {}: read of block {block}",
                    self.seed
                );
            }
        }
    }

    /// The last change of a block up to a seq.
    fn last(&self, no: u32, block: u32, upto: u64) -> u64 {
        let changes = (1..).zip(&self.asked).take(upto as usize);
        let touching = changes.filter(|(_, asked)| asked.covers(no, block));
        touching.last().map_or(0, |(seq, _)| seq)
    }

    /// Whether a block may read so when everything up to `from` was answered when the read was asked.
    fn may_be(&self, no: u32, block: u32, from: u64, bytes: &Option<Vec<u8>>) -> bool {
        let first = self.last(no, block, from);
        let later = (1..).zip(&self.asked).skip(first as usize);
        let mut allowed = vec![first];
        allowed.extend(
            later
                .filter(|(_, asked)| asked.covers(no, block))
                .map(|(seq, _)| seq),
        );
        allowed.iter().any(|seq| match (self.is_data(*seq), bytes) {
            (true, Some(bytes)) => content(*seq, block) == *bytes,
            (false, None) => true,
            _ => false,
        })
    }

    fn is_data(&self, seq: u64) -> bool {
        seq > 0 && self.asked[seq as usize - 1].is_data
    }

    fn crash(&mut self, rng: &mut Rng) {
        let crash = if rng.chance(30) {
            Crash::Kill
        } else {
            Crash::Power([0, 50, 90, 100][rng.below(4) as usize])
        };
        let least = if crash == Crash::Kill {
            self.replied.max(self.durable)
        } else {
            self.durable
        };
        let fate = rng.below(10);
        let old = self.old_index.clone();
        let report = self.world.crash_and(crash, |_, kv| match fate {
            0 => kv.0.clear(),
            1 => drop(old.map(|old| *kv = old)),
            2 => {
                if let Some(value) = kv.0.values_mut().next() {
                    value[0] ^= 1;
                }
            }
            _ => {}
        });
        assert_eq!(
            report.damage,
            [],
            "seed {}: {crash:?}, index fate {fate}, {report:?}",
            self.seed
        );
        self.flushes.clear();
        self.reads.clear();
        self.check_prefix(least, &format!("{crash:?}, index fate {fate}, report {report:?}"));
        if rng.chance(40) {
            self.old_index = Some(self.world.kv.clone());
        }
    }

    /// The disk holds the state after some prefix, `least` or longer.
    fn check_prefix(&mut self, least: u64, what: &str) {
        let mut seqs: BTreeMap<(u32, u32), u64> = BTreeMap::new();
        for no in 0..2 {
            for leaf in 0..BLOCKS.div_ceil(256) {
                let ask = Request::LeafVersions {
                    shard: shard(no),
                    lineage: Lineage::of_layer(shard(no).vdi, LAYER),
                    leaf: LeafNo(leaf),
                };
                let Ok(Reply::Versions(versions)) = self.world.call(ask) else {
                    panic!("versions")
                };
                for (block, version) in (leaf * 256..).zip(versions) {
                    assert_eq!(
                        matches!(version.state, BlockState::Data(_)),
                        self.is_data(version.seq.0)
                    );
                    seqs.insert((no, block), version.seq.0);
                }
            }
        }
        let seed = self.seed;
        for shard in self.world.store.shards() {
            // A trim of one shard may pass a write of another that waits for space: a prefix for each shard.
            let no = shard.shard.no.0;
            let of_shard = seqs.iter().filter(|((other, _), _)| *other == no);
            let most = of_shard
                .clone()
                .map(|(_, seq)| *seq)
                .max()
                .unwrap_or(0)
                .max(shard.end.0);
            for ((_, block), seq) in of_shard.filter(|((_, block), _)| *block < BLOCKS) {
                // The one after the prefix may have been split, with a part of it in the log.
                let full = self.last(no, *block, shard.end.0.max(least));
                let part = self.last(no, *block, most);
                assert!(
                    *seq == full || *seq == part,
                    "seed {seed}: {what}: shard {no} block {block} has seq {seq}, not {full} or {part}; \
                     end {}, least {least}, most {most}",
                    shard.end
                );
            }
            for (seq, asked) in (1..).zip(&mut self.asked).filter(|(_, asked)| asked.shard == no) {
                if seq > most {
                    asked.count = 0;
                } else if seq == most {
                    let blocks = asked.block..asked.block + asked.count;
                    asked.count = blocks
                        .filter(|block| seqs.get(&(no, *block)) == Some(&most))
                        .count() as u32;
                }
            }
        }
        self.durable = self.asked.len() as u64;
        self.replied = self.durable;
        self.check_content();
    }

    fn check_content(&mut self) {
        for no in 0..2 {
            for block in (0..BLOCKS).step_by(100) {
                let ask = Request::Read {
                    shard: shard(no),
                    lineage: Lineage::of_layer(shard(no).vdi, LAYER),
                    block: BlockNo(block),
                    count: 100,
                };
                let reply = self.world.call(ask).expect("readable");
                for (block, bytes) in (block..).zip(blocks_of(reply)) {
                    let from = self.asked.len() as u64;
                    assert!(
                        self.may_be(no, block, from, &bytes),
                        "seed {}: block {block}",
                        self.seed
                    );
                }
            }
        }
    }
}

impl Asked {
    fn covers(&self, no: u32, block: u32) -> bool {
        self.shard == no && (self.block..self.block + self.count).contains(&block)
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
                blocks.extend(
                    data.bytes()
                        .chunks_exact(support::BLOCK)
                        .map(|bytes| Some(bytes.to_vec())),
                );
            }
        }
    }
    blocks
}

fn run(seed: u64) {
    let mut rng = Rng(seed);
    let mut model = Model::new(seed);
    for _ in 0..rng.below(6) + 2 {
        for _ in 0..rng.below(400) {
            for _ in 0..rng.below(6) {
                model.act(&mut rng);
            }
            model.world.turn_end();
            for _ in 0..rng.below(6) {
                if model.world.happen() && rng.chance(80) {
                    model.world.turn_end();
                }
            }
            if rng.chance(5) {
                model.world.step(Event::Tick);
                model.world.turn_end();
            }
            model.collect();
        }
        if rng.chance(30) {
            model.world.settle();
            model.collect();
            assert_eq!(
                model.replied,
                model.asked.len() as u64,
                "seed {seed}: everything is answered"
            );
            assert!(model.reads.is_empty() && model.flushes.is_empty());
        }
        model.crash(&mut rng);
    }
}

#[test]
#[allow(
    clippy::disallowed_methods,
    reason = "a test takes its seed from whoever runs it"
)]
fn every_crash_leaves_a_prefix() {
    let (first, count) = match std::env::var("WEFT_SEED") {
        Ok(seed) => (seed.parse().expect("WEFT_SEED is a number"), 1),
        Err(_) => (0, 16),
    };
    for seed in first..first + count {
        let result = std::panic::catch_unwind(|| run(seed));
        if let Err(panic) = result {
            eprintln!("seed {seed}: repeat with WEFT_SEED={seed} cargo test -p weft-store --test random");
            std::panic::resume_unwind(panic);
        }
    }
}
