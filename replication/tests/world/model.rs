//! A log store on a map: what `store` promises, at its least convenient.

use std::collections::{BTreeMap, VecDeque};

use store::{
    BlockState, BlockVersion, Effect, Event, LISTED_MAX, Origin, ReadPart, Reply, Request, ShardSummary,
    StoreError, StoreStats,
};
use types::{
    BLOCK_BYTES, HeapBlock, Instant, LEAF_BLOCKS, LayerId, LeafNo, Lineage, Payload, RequestId, Seq, ShardId,
    SumKey,
};
use weft_replication::LogStore;

/// Small, seeded, good enough to shuffle with (xorshift64*).
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Rng {
        Rng(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11
    }

    pub fn below(&mut self, limit: usize) -> usize {
        assert!(limit > 0);
        (self.next() % limit as u64) as usize
    }

    pub fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }
}

#[derive(Clone, Debug, Default)]
struct Shard {
    /// By layer and number.
    blocks: BTreeMap<(LayerId, u32), Block>,
    end: Seq,
    record: Vec<u8>,
}

#[derive(Clone, Debug)]
struct Block {
    version: BlockVersion,
    data: Option<HeapBlock>,
}

type Shards = BTreeMap<ShardId, Shard>;

/// What survives what: `shards` a crash of the process, `durable` a loss of power with any prefix of `since`.
#[derive(Debug)]
pub struct MapStore {
    rng: Rng,
    shards: Shards,
    durable: Shards,
    since: Vec<Request<HeapBlock>>,
    changes: VecDeque<(RequestId, Request<HeapBlock>)>,
    reads: VecDeque<(RequestId, Request<HeapBlock>)>,
}

impl MapStore {
    pub fn new(seed: u64) -> MapStore {
        MapStore {
            rng: Rng::new(seed),
            shards: Shards::new(),
            durable: Shards::new(),
            since: Vec::new(),
            changes: VecDeque::new(),
            reads: VecDeque::new(),
        }
    }

    /// The process dies; what was under way may or may not have reached the device.
    pub fn crash(&self, rng: &mut Rng) -> MapStore {
        let mut after = MapStore::new(rng.next());
        after.shards = self.shards.clone();
        after.durable = self.durable.clone();
        after.since = self.since.clone();
        for (_, request) in self.changes.iter().take(rng.below(self.changes.len() + 1)) {
            apply(&mut after.shards, request);
            after.since.push(request.clone());
        }
        after
    }

    /// The power fails; of what was not flushed a prefix survives.
    pub fn lose_power(&self, rng: &mut Rng) -> MapStore {
        let mut after = MapStore::new(rng.next());
        after.shards = self.durable.clone();
        let kept = rng.below(self.since.len() + 1);
        for request in &self.since[..kept] {
            apply(&mut after.shards, request);
        }
        after.durable = after.shards.clone();
        after
    }

    /// Rots one block of data, if there is any.
    pub fn rot(&mut self, rng: &mut Rng) -> bool {
        let held: Vec<(ShardId, (LayerId, u32))> = self
            .shards
            .iter()
            .flat_map(|(id, shard)| {
                let data = shard.blocks.iter().filter(|(_, block)| block.data.is_some());
                data.map(|(no, _)| (*id, *no))
            })
            .collect();
        if held.is_empty() {
            return false;
        }
        let (shard, no) = held[rng.below(held.len())];
        for shards in [&mut self.shards, &mut self.durable] {
            let block = shards.get_mut(&shard).and_then(|shard| shard.blocks.get_mut(&no));
            if let Some(data) = block.and_then(|block| block.data.as_mut()) {
                *data = data.overlay(8, &HeapBlock::new(&[0xff; 8]));
            }
        }
        true
    }

    /// What each layer holds by block: `Some(None)` where the sum does not match. Which kind of zeros does not matter.
    pub fn content(&self, shard: ShardId) -> BTreeMap<(LayerId, u32), Option<u64>> {
        let Some(held) = self.shards.get(&shard) else {
            return BTreeMap::new();
        };
        let blocks = held.blocks.iter().map(|(place, block)| {
            let value = block.data.as_ref().map_or(Some(0), |data| {
                is_good(shard, *place, block).then_some(value_of(data))
            });
            (*place, value)
        });
        blocks.collect()
    }

    fn answer(&mut self, request: &Request<HeapBlock>) -> Result<Reply<HeapBlock>, StoreError> {
        match request {
            Request::Read {
                shard,
                lineage,
                block,
                count,
            } => self.read(*shard, lineage, block.0, *count),
            Request::ChangedLeaves {
                shard,
                newer_than,
                from,
            } => {
                let held = self.shards.get(shard).ok_or(StoreError::NoShard(*shard))?;
                let mut leaves: Vec<(LayerId, LeafNo)> = held
                    .blocks
                    .iter()
                    .filter(|(_, block)| block.version.seq > *newer_than)
                    .map(|((layer, no), _)| (*layer, LeafNo(no / LEAF_BLOCKS)))
                    .filter(|leaf| leaf >= from)
                    .collect();
                leaves.dedup();
                leaves.truncate(LISTED_MAX);
                Ok(Reply::Leaves(leaves))
            }
            Request::LeafVersions { shard, lineage, leaf } => {
                let held = self.shards.get(shard).ok_or(StoreError::NoShard(*shard))?;
                let first = leaf.first_block().0;
                let absent = BlockVersion {
                    seq: Seq(0),
                    state: BlockState::Absent,
                };
                let version = |no: u32| held.find(lineage, no).map_or(absent, |(_, block)| block.version);
                Ok(Reply::Versions(
                    (first..first + LEAF_BLOCKS).map(version).collect(),
                ))
            }
            Request::Flush { .. }
            | Request::PutRecord { .. }
            | Request::SetEnd { .. }
            | Request::DropLayers { .. }
            | Request::MergeLayers { .. }
            | Request::DropShard { .. } => {
                self.since.push(request.clone());
                apply(&mut self.shards, request);
                self.durable = self.shards.clone();
                self.since.clear();
                Ok(Reply::Done)
            }
            Request::LayersRevision { .. } => panic!("no writer asks for this yet"),
            Request::Write { .. } | Request::Clear { .. } | Request::Void { .. } => {
                self.since.push(request.clone());
                apply(&mut self.shards, request);
                Ok(Reply::Done)
            }
        }
    }

    fn read(
        &self,
        shard: ShardId,
        lineage: &Lineage,
        first: u32,
        count: u32,
    ) -> Result<Reply<HeapBlock>, StoreError> {
        let held = self.shards.get(&shard).ok_or(StoreError::NoShard(shard))?;
        let mut parts = Vec::new();
        for no in first..first + count {
            match held.find(lineage, no) {
                Some((layer, block)) if block.data.is_some() => {
                    if !is_good(shard, (layer, no), block) {
                        let block = types::BlockNo(no);
                        return Err(StoreError::Corrupt { shard, layer, block });
                    }
                    parts.push(ReadPart::Data(block.data.clone().expect("just seen")));
                }
                _ => parts.push(ReadPart::Zeros(1)),
            }
        }
        Ok(Reply::Read(parts.into()))
    }
}

impl Shard {
    /// What the newest layer of a lineage that has the block says.
    fn find(&self, lineage: &Lineage, no: u32) -> Option<(LayerId, &Block)> {
        let layers = lineage
            .steps()
            .iter()
            .flat_map(|step| (step.lowest.0..=step.highest.0).rev());
        let mut held = layers.filter_map(|layer| {
            let layer = LayerId(layer);
            self.blocks.get(&(layer, no)).map(|block| (layer, block))
        });
        held.next()
    }
}

pub fn value_of(data: &HeapBlock) -> u64 {
    u64::from_le_bytes(data.bytes()[..8].try_into().expect("a block is long enough"))
}

fn sum(shard: ShardId, (layer, no): (LayerId, u32), seq: Seq, crc: u32) -> types::BlockSum {
    let key = SumKey {
        shard,
        layer,
        block: types::BlockNo(no),
        seq,
    };
    types::bind(key, crc)
}

fn is_good(shard: ShardId, place: (LayerId, u32), block: &Block) -> bool {
    let bytes = block.data.as_ref().expect("asked of data").bytes();
    block.version.state == BlockState::Data(sum(shard, place, block.version.seq, types::crc32c(bytes)))
}

fn apply(shards: &mut Shards, request: &Request<HeapBlock>) {
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
            let held = shards.get_mut(shard).expect("a shard is made by its record");
            for (index, crc) in crcs.iter().enumerate() {
                let place = (*layer, block.0 + index as u32);
                let new = Block {
                    version: BlockVersion {
                        seq: *seq,
                        state: BlockState::Data(sum(*shard, place, *seq, *crc)),
                    },
                    data: Some(data.slice(index * BLOCK_BYTES as usize, BLOCK_BYTES as usize)),
                };
                put(held, place, new, *origin);
            }
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
            for no in block.0..block.0 + count {
                let new = Block {
                    version: BlockVersion {
                        seq: *seq,
                        state: BlockState::Clear(*kind),
                    },
                    data: None,
                };
                put(held, (*layer, no), new, *origin);
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
        Request::PutRecord { shard, record } => shards.entry(*shard).or_default().record = record.clone(),
        Request::SetEnd { shard, end } => {
            shards.get_mut(shard).expect("a shard is made by its record").end = *end;
        }
        Request::DropShard { shard } => {
            shards.remove(shard);
        }
        _ => {}
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

impl LogStore<HeapBlock> for MapStore {
    fn step(&mut self, _now: Instant, event: Event<HeapBlock>, effects: &mut Vec<Effect<HeapBlock>>) {
        match event {
            Event::Request(id, request) => {
                let is_read = matches!(
                    request,
                    Request::Read { .. } | Request::ChangedLeaves { .. } | Request::LeafVersions { .. }
                );
                if is_read {
                    self.reads.push_back((id, request));
                } else {
                    self.changes.push_back((id, request));
                }
            }
            Event::Tick => {
                // Reads are answered from what is complete, before or after the writes in front of them.
                for _ in 0..self.rng.below(5) {
                    let from_reads = self.changes.is_empty() || self.rng.chance(50);
                    let next = if from_reads {
                        self.reads.pop_front()
                    } else {
                        self.changes.pop_front()
                    };
                    if let Some((id, request)) = next {
                        let result = self.answer(&request);
                        effects.push(Effect::Reply(id, result));
                    }
                }
            }
            Event::Disk(_) | Event::Index(_) | Event::TurnEnd | Event::Closing => {}
        }
    }

    fn shards(&self) -> Vec<ShardSummary> {
        let summary = |(id, shard): (&ShardId, &Shard)| ShardSummary {
            shard: *id,
            end: shard.end,
            record: shard.record.clone(),
            data_blocks: shard.blocks.values().filter(|block| block.data.is_some()).count() as u64,
            is_doubtful: false,
        };
        self.shards.iter().map(summary).collect()
    }

    fn stats(&self) -> StoreStats {
        StoreStats::default()
    }

    fn is_busy(&self) -> bool {
        !self.changes.is_empty() || !self.reads.is_empty()
    }
}
