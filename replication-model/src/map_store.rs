//! What `store` promises, on a map: the log store below a node of the model.
//!
//! A request is done when it comes and answered at once, so that the states of a disk are those of its node; how the
//! real store interleaves its batches is the simulator's business. Where power may be lost it keeps what is on stable
//! media apart, with the changes since, of which any prefix may survive.

use std::collections::BTreeMap;

use replication::LogStore;
use store::{
    BlockState, BlockVersion, Effect, Event, Origin, ReadPart, Reply, Request, ShardSummary, StoreError,
    StoreStats,
};
use types::{BlockSum, Instant, LEAF_BLOCKS, LayerId, LeafNo, Seq, ShardId, SumKey};

use crate::value::Value;

#[derive(Clone, Debug, Default, Hash)]
struct Shard {
    blocks: BTreeMap<u32, Block>,
    end: Seq,
    record: Vec<u8>,
}

#[derive(Clone, Copy, Debug, Hash)]
struct Block {
    version: BlockVersion,
    value: Option<Value>,
}

type Shards = BTreeMap<ShardId, Shard>;

/// What a loss of power leaves.
#[derive(Clone, Debug, Default, Hash)]
struct Stable {
    shards: Shards,
    since: Vec<Request<Value>>,
}

/// See the module.
#[derive(Clone, Debug, Hash)]
pub struct MapStore {
    shards: Shards,
    stable: Option<Stable>,
}

impl MapStore {
    /// An empty disk; `may_lose_power` keeps account of what is stable.
    #[must_use]
    pub fn new(may_lose_power: bool) -> MapStore {
        MapStore {
            shards: Shards::new(),
            stable: may_lose_power.then(Stable::default),
        }
    }

    /// Changes that a loss of power could take.
    #[must_use]
    pub fn unstable(&self) -> usize {
        self.stable.as_ref().map_or(0, |stable| stable.since.len())
    }

    /// The power fails: what was stable and the first `kept` changes since are there.
    #[must_use]
    pub fn lose_power(&self, kept: usize) -> MapStore {
        let stable = self
            .stable
            .as_ref()
            .expect("a scenario with loss of power says so at its start");
        let mut shards = stable.shards.clone();
        for request in &stable.since[..kept] {
            apply(&mut shards, request);
        }
        MapStore {
            shards: shards.clone(),
            stable: Some(Stable {
                shards,
                since: Vec::new(),
            }),
        }
    }

    /// Content by block, the zeros left out; `None` where it does not match its sum.
    #[must_use]
    pub fn content(&self, shard: ShardId) -> BTreeMap<u32, Option<Value>> {
        let blocks = self.shards.get(&shard).map(|held| &held.blocks);
        let blocks = blocks.into_iter().flatten().filter_map(|(no, block)| {
            let value = block.value?;
            Some((*no, is_good(shard, *no, block).then_some(value)))
        });
        blocks.collect()
    }

    fn answer(&mut self, request: Request<Value>) -> Result<Reply<Value>, StoreError> {
        match request {
            Request::Read {
                shard, block, count, ..
            } => self.read(shard, block.0, count),
            Request::ChangedLeaves {
                shard,
                newer_than,
                from,
                ..
            } => {
                let mut leaves: Vec<LeafNo> = self
                    .held(shard)?
                    .blocks
                    .iter()
                    .filter(|(_, block)| block.version.seq > newer_than)
                    .map(|(no, _)| LeafNo(no / LEAF_BLOCKS))
                    .filter(|leaf| *leaf >= from)
                    .collect();
                leaves.dedup();
                Ok(Reply::Leaves(leaves))
            }
            Request::LeafVersions { shard, leaf, .. } => {
                let held = self.held(shard)?;
                let absent = BlockVersion {
                    seq: Seq(0),
                    state: BlockState::Absent,
                };
                let mut versions = vec![absent; LEAF_BLOCKS as usize];
                let first = leaf.first_block().0;
                for (no, block) in held.blocks.range(first..first + LEAF_BLOCKS) {
                    versions[(no - first) as usize] = block.version;
                }
                Ok(Reply::Versions(versions))
            }
            change => {
                apply(&mut self.shards, &change);
                let is_sync = !matches!(
                    change,
                    Request::Write { .. } | Request::Clear { .. } | Request::Void { .. }
                );
                if let Some(stable) = &mut self.stable {
                    if is_sync {
                        stable.shards = self.shards.clone();
                        stable.since.clear();
                    } else {
                        stable.since.push(change);
                    }
                }
                Ok(Reply::Done)
            }
        }
    }

    fn held(&self, shard: ShardId) -> Result<&Shard, StoreError> {
        self.shards.get(&shard).ok_or(StoreError::NoShard(shard))
    }

    fn read(&self, shard: ShardId, first: u32, count: u32) -> Result<Reply<Value>, StoreError> {
        let held = self.held(shard)?;
        let part = |no: u32| match held.blocks.get(&no) {
            Some(
                block @ Block {
                    value: Some(value), ..
                },
            ) => {
                if is_good(shard, no, block) {
                    Ok(ReadPart::Data(*value))
                } else {
                    let block = types::BlockNo(no);
                    Err(StoreError::Corrupt { shard, block })
                }
            }
            _ => Ok(ReadPart::Zeros(1)),
        };
        let parts: Result<_, StoreError> = (first..first + count).map(part).collect();
        Ok(Reply::Read(parts?))
    }
}

fn sum(shard: ShardId, no: u32, seq: Seq, crc: u32) -> BlockSum {
    let key = SumKey {
        shard,
        layer: LayerId(0),
        block: types::BlockNo(no),
        seq,
    };
    types::bind(key, crc)
}

fn is_good(shard: ShardId, no: u32, block: &Block) -> bool {
    let crc = block.value.expect("asked of data").crc();
    block.version.state == BlockState::Data(sum(shard, no, block.version.seq, crc))
}

fn apply(shards: &mut Shards, request: &Request<Value>) {
    match request {
        Request::Write {
            shard,
            block,
            seq,
            data,
            crcs,
            origin,
            ..
        } => {
            assert_eq!(crcs.len(), 1, "a value is one block");
            let held = shards.get_mut(shard).expect("a shard is made by its record");
            let state = BlockState::Data(sum(*shard, block.0, *seq, crcs[0]));
            let version = BlockVersion { seq: *seq, state };
            let value = Some(*data);
            put(held, block.0, Block { version, value }, *origin);
            advance(held, *seq, *origin);
        }
        Request::Clear {
            shard,
            block,
            count,
            seq,
            kind,
            origin,
            ..
        } => {
            let held = shards.get_mut(shard).expect("a shard is made by its record");
            let state = BlockState::Clear(*kind);
            let version = BlockVersion { seq: *seq, state };
            for no in block.0..block.0 + count {
                put(held, no, Block { version, value: None }, *origin);
            }
            advance(held, *seq, *origin);
        }
        Request::Void {
            shard,
            block,
            count,
            live_from,
            ..
        } => {
            let held = shards.get_mut(shard).expect("a shard is made by its record");
            let voided = block.0..block.0 + count;
            held.blocks
                .retain(|no, block| !voided.contains(no) || block.version.seq >= *live_from);
        }
        Request::PutRecord { shard, record } => shards.entry(*shard).or_default().record.clone_from(record),
        Request::SetEnd { shard, end } => {
            shards.get_mut(shard).expect("a shard is made by its record").end = *end;
        }
        Request::DropShard { shard } => {
            shards.remove(shard);
        }
        Request::Flush { .. }
        | Request::Read { .. }
        | Request::ChangedLeaves { .. }
        | Request::LeafVersions { .. } => {}
    }
}

fn put(held: &mut Shard, no: u32, new: Block, origin: Origin) {
    let is_kept = match origin {
        Origin::Live => false,
        Origin::Repair { live_from } => {
            let present = held.blocks.get(&no).map(|block| block.version.seq);
            present.is_some_and(|seq| seq >= live_from)
        }
    };
    if !is_kept {
        held.blocks.insert(no, new);
    }
}

fn advance(held: &mut Shard, seq: Seq, origin: Origin) {
    if origin == Origin::Live {
        assert!(seq > held.end, "stream seq {seq} after end {}", held.end);
        held.end = seq;
    }
}

impl LogStore<Value> for MapStore {
    fn step(&mut self, _now: Instant, event: Event<Value>, effects: &mut Vec<Effect<Value>>) {
        if let Event::Request(id, request) = event {
            let result = self.answer(request);
            effects.push(Effect::Reply(id, result));
        }
    }

    fn shards(&self) -> Vec<ShardSummary> {
        let summary = |(id, shard): (&ShardId, &Shard)| ShardSummary {
            shard: *id,
            end: shard.end,
            record: shard.record.clone(),
            data_blocks: shard
                .blocks
                .values()
                .filter(|block| block.value.is_some())
                .count() as u64,
            is_doubtful: false,
        };
        self.shards.iter().map(summary).collect()
    }

    fn stats(&self) -> StoreStats {
        StoreStats::default()
    }

    fn is_busy(&self) -> bool {
        false
    }
}
