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
use types::{BlockSum, Instant, LEAF_BLOCKS, LayerId, LeafNo, Lineage, Seq, ShardId, SumKey};

use crate::value::Value;

#[derive(Clone, Debug, Default, Hash)]
struct Shard {
    /// By layer and number.
    blocks: BTreeMap<(LayerId, u32), Block>,
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

    /// What each layer holds by block: a value, or zeros (`Some(None)`); `None` where it does not match its sum.
    #[must_use]
    pub fn content(&self, shard: ShardId) -> BTreeMap<(LayerId, u32), Option<Option<Value>>> {
        let blocks = self.shards.get(&shard).map(|held| &held.blocks);
        let blocks = blocks.into_iter().flatten().map(|(place, block)| {
            let is_good = block.value.is_none() || is_good(shard, *place, block);
            (*place, is_good.then_some(block.value))
        });
        blocks.collect()
    }

    fn answer(&mut self, request: Request<Value>) -> Result<Reply<Value>, StoreError> {
        match request {
            Request::Read {
                shard,
                lineage,
                block,
                count,
            } => self.read(shard, &lineage, block.0, count),
            Request::ChangedLeaves {
                shard,
                newer_than,
                from,
            } => {
                let mut leaves: Vec<(LayerId, LeafNo)> = self
                    .held(shard)?
                    .blocks
                    .iter()
                    .filter(|(_, block)| block.version.seq > newer_than)
                    .map(|((layer, no), _)| (*layer, LeafNo(no / LEAF_BLOCKS)))
                    .filter(|leaf| *leaf >= from)
                    .collect();
                leaves.dedup();
                Ok(Reply::Leaves(leaves))
            }
            Request::LeafVersions { shard, lineage, leaf } => {
                let held = self.held(shard)?;
                let absent = BlockVersion {
                    seq: Seq(0),
                    state: BlockState::Absent,
                };
                let mut versions = vec![absent; LEAF_BLOCKS as usize];
                let first = leaf.first_block().0;
                for layer in layers_of(&lineage) {
                    let (from, end) = ((layer, first), (layer, first + LEAF_BLOCKS));
                    for ((_, no), block) in held.blocks.range(from..end) {
                        versions[(no - first) as usize] = block.version;
                    }
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

    fn read(
        &self,
        shard: ShardId,
        lineage: &Lineage,
        first: u32,
        count: u32,
    ) -> Result<Reply<Value>, StoreError> {
        let held = self.held(shard)?;
        let find = |no: u32| {
            let said = |layer| held.blocks.get(&(layer, no)).map(|block| (layer, block));
            layers_of(lineage).filter_map(said).last()
        };
        let part = |no: u32| match find(no) {
            Some((
                layer,
                block @ Block {
                    value: Some(value), ..
                },
            )) => {
                if is_good(shard, (layer, no), block) {
                    Ok(ReadPart::Data(*value))
                } else {
                    let block = types::BlockNo(no);
                    Err(StoreError::Corrupt { shard, layer, block })
                }
            }
            _ => Ok(ReadPart::Zeros(1)),
        };
        let parts: Result<_, StoreError> = (first..first + count).map(part).collect();
        Ok(Reply::Read(parts?))
    }
}

/// Every layer of a lineage, the oldest first.
fn layers_of(lineage: &Lineage) -> impl Iterator<Item = LayerId> {
    let steps = lineage.steps().iter().rev();
    steps.flat_map(|step| (step.lowest.0..=step.highest.0).map(LayerId))
}

fn sum(shard: ShardId, (layer, no): (LayerId, u32), seq: Seq, crc: u32) -> BlockSum {
    let key = SumKey {
        shard,
        layer,
        block: types::BlockNo(no),
        seq,
    };
    types::bind(key, crc)
}

fn is_good(shard: ShardId, place: (LayerId, u32), block: &Block) -> bool {
    let crc = block.value.expect("asked of data").crc();
    block.version.state == BlockState::Data(sum(shard, place, block.version.seq, crc))
}

fn apply(shards: &mut Shards, request: &Request<Value>) {
    match request {
        Request::Write {
            shard,
            layer,
            block,
            seq,
            data,
            crcs,
            origin,
        } => {
            assert_eq!(crcs.len(), 1, "a value is one block");
            let held = shards.get_mut(shard).expect("a shard is made by its record");
            let state = BlockState::Data(sum(*shard, (*layer, block.0), *seq, crcs[0]));
            let version = BlockVersion { seq: *seq, state };
            let value = Some(*data);
            put(held, (*layer, block.0), Block { version, value }, *origin);
            advance(held, *seq, *origin);
        }
        Request::Clear {
            shard,
            layer,
            block,
            count,
            seq,
            kind,
            origin,
        } => {
            let held = shards.get_mut(shard).expect("a shard is made by its record");
            let state = BlockState::Clear(*kind);
            let version = BlockVersion { seq: *seq, state };
            for no in block.0..block.0 + count {
                put(held, (*layer, no), Block { version, value: None }, *origin);
            }
            advance(held, *seq, *origin);
        }
        Request::Void {
            shard,
            layer,
            block,
            count,
            live_from,
        } => {
            let held = shards.get_mut(shard).expect("a shard is made by its record");
            let voided = block.0..block.0 + count;
            held.blocks.retain(|(of, no), block| {
                of != layer || !voided.contains(no) || block.version.seq >= *live_from
            });
        }
        Request::DropLayers { .. } | Request::MergeLayers { .. } => {
            panic!("no writer asks for this yet: {request:?}")
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
        | Request::LeafVersions { .. }
        | Request::LayersRevision { .. } => {}
    }
}

fn put(held: &mut Shard, place: (LayerId, u32), new: Block, origin: Origin) {
    let is_kept = match origin {
        Origin::Live => false,
        Origin::Repair { live_from } => {
            let present = held.blocks.get(&place).map(|block| block.version.seq);
            present.is_some_and(|seq| seq >= live_from)
        }
    };
    if !is_kept {
        held.blocks.insert(place, new);
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
