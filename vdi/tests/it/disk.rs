//! A disk in memory: the replica's side of every shard on it, without a log.

use std::collections::{BTreeMap, VecDeque};

use replication::{FromReplica, Refusal, RepairContent, ReplicaReply, ReplicaRequest, ToReplica};
use store::{BlockState, BlockVersion, ClearKind, LISTED_MAX, ReadPart as BlockPart, StoreError};
use types::{BlockNo, BlockSum, DiskId, HeapBlock, LayerId, Lineage, Payload, Seq, Token, crc32c};

use crate::world::BLOCK;

#[derive(Clone, Debug)]
enum Content {
    Data(HeapBlock),
    Clear(ClearKind),
}

#[derive(Debug, Default)]
pub struct Replica {
    pub promised: Token,
    end: Seq,
    good_until: Option<Seq>,
    /// By layer and number.
    blocks: BTreeMap<(LayerId, u32), (Seq, Content)>,
    /// Seqs of blocks on stable media, and whether they are zeros.
    pub durable: BTreeMap<u32, (Seq, bool)>,
    /// Blocks whose content fails its check.
    pub rotten: Vec<u32>,
}

/// One disk: requests are done in order, answers leave in any order.
#[derive(Debug, Default)]
pub struct Disk {
    pub shards: BTreeMap<u32, Replica>,
    pub inbox: VecDeque<ToReplica<HeapBlock>>,
    pub is_down: bool,
    pub flushes: u64,
}

impl Replica {
    fn put(
        &mut self,
        layer: LayerId,
        block: BlockNo,
        count: u32,
        seq: Seq,
        content: impl Fn(u32) -> Content,
    ) {
        for at in 0..count {
            self.rotten.retain(|rotten| *rotten != block.0 + at);
            self.blocks.insert((layer, block.0 + at), (seq, content(at)));
        }
    }

    /// What the newest layer of a lineage that has the block says.
    fn find(&self, lineage: &Lineage, block: u32) -> Option<(LayerId, &(Seq, Content))> {
        let layers = lineage
            .steps()
            .iter()
            .flat_map(|step| (step.lowest.0..=step.highest.0).rev());
        let mut held = layers.filter_map(|layer| {
            let layer = LayerId(layer);
            self.blocks.get(&(layer, block)).map(|held| (layer, held))
        });
        held.next()
    }

    fn sync(&mut self) {
        self.durable = self
            .blocks
            .iter()
            // In the order of layers: the newest stays.
            .map(|((_, block), (seq, content))| (*block, (*seq, matches!(content, Content::Clear(_)))))
            .collect();
    }

    fn version(&self, lineage: &Lineage, block: u32) -> BlockVersion {
        match self.find(lineage, block).map(|(_, held)| held) {
            None => BlockVersion {
                seq: Seq(0),
                state: BlockState::Absent,
            },
            Some((seq, Content::Clear(kind))) => BlockVersion {
                seq: *seq,
                state: BlockState::Clear(*kind),
            },
            Some((seq, Content::Data(data))) => BlockVersion {
                seq: *seq,
                state: BlockState::Data(BlockSum(crc32c(data.bytes()))),
            },
        }
    }

    fn read(&self, lineage: &Lineage, block: BlockNo, count: u32) -> Vec<BlockPart<HeapBlock>> {
        let mut parts: Vec<BlockPart<HeapBlock>> = Vec::new();
        for at in block.0..block.0 + count {
            match (self.find(lineage, at).map(|(_, held)| held), parts.last_mut()) {
                (Some((_, Content::Data(data))), _) => parts.push(BlockPart::Data(data.clone())),
                (_, Some(BlockPart::Zeros(zeros))) => *zeros += 1,
                _ => parts.push(BlockPart::Zeros(1)),
            }
        }
        parts
    }
}

impl Disk {
    pub fn serve(&mut self, id: DiskId, message: &ToReplica<HeapBlock>) -> FromReplica<HeapBlock> {
        let replica = self.shards.entry(message.shard.no.0).or_default();
        let result = if message.token < replica.promised {
            Err(Refusal::Stale {
                promised: replica.promised,
            })
        } else {
            self.flushes += u64::from(matches!(message.request, ReplicaRequest::Flush));
            Self::done(replica, message)
        };
        if matches!(message.request, ReplicaRequest::Drop) {
            self.shards.remove(&message.shard.no.0);
        }
        FromReplica {
            shard: message.shard,
            disk: id,
            token: message.token,
            id: message.id,
            result,
        }
    }

    fn done(
        replica: &mut Replica,
        message: &ToReplica<HeapBlock>,
    ) -> Result<ReplicaReply<HeapBlock>, Refusal> {
        match message.request.clone() {
            ReplicaRequest::Fence { .. } => {
                let previous = replica.promised;
                replica.promised = message.token;
                replica.sync();
                return Ok(ReplicaReply::Promised {
                    previous,
                    end: replica.end,
                    good_until: replica.good_until,
                });
            }
            ReplicaRequest::Write {
                layer,
                block,
                seq,
                data,
                crcs,
            } => {
                assert_eq!(crcs.len() * BLOCK, data.length());
                for (chunk, crc) in data.bytes().chunks(BLOCK).zip(&crcs) {
                    assert_eq!(crc32c(chunk), *crc, "a checksum is not its block's");
                }
                assert!(seq > replica.end, "seq {seq} after {}", replica.end);
                replica.end = seq;
                let cut = |at: u32| Content::Data(data.slice(at as usize * BLOCK, BLOCK));
                replica.put(layer, block, crcs.len() as u32, seq, cut);
            }
            ReplicaRequest::Clear {
                layer,
                block,
                count,
                seq,
                kind,
            } => {
                replica.end = seq;
                replica.put(layer, block, count, seq, |_| Content::Clear(kind));
            }
            ReplicaRequest::Flush => replica.sync(),
            ReplicaRequest::Read {
                lineage,
                block,
                count,
            } => {
                let is_bad = |at: &u32| replica.rotten.contains(at);
                let held = |at| replica.find(&lineage, at).map(|(layer, _)| (at, layer));
                if let Some((bad, layer)) = (block.0..block.0 + count).filter(is_bad).find_map(held) {
                    return Err(Refusal::Store(StoreError::Corrupt {
                        shard: message.shard,
                        layer,
                        block: BlockNo(bad),
                    }));
                }
                return Ok(ReplicaReply::Read(replica.read(&lineage, block, count).into()));
            }
            ReplicaRequest::Repair {
                layer,
                block,
                seq,
                content,
                live_from,
            } => {
                let count = match &content {
                    RepairContent::Data(data, _) => (data.length() / BLOCK) as u32,
                    RepairContent::Clear(count, _) => *count,
                };
                for at in 0..count {
                    let no = block.0 + at;
                    let present = replica.blocks.get(&(layer, no));
                    if present.is_some_and(|(seq, _)| *seq >= live_from) {
                        continue;
                    }
                    let new = match &content {
                        RepairContent::Data(data, _) => Content::Data(data.slice(at as usize * BLOCK, BLOCK)),
                        RepairContent::Clear(_, kind) => Content::Clear(*kind),
                    };
                    replica.put(layer, BlockNo(no), 1, seq, |_| new.clone());
                }
            }
            ReplicaRequest::Void {
                layer,
                block,
                count,
                live_from,
            } => replica.blocks.retain(|(of, no), (seq, _)| {
                *of != layer || !(block.0..block.0 + count).contains(no) || *seq >= live_from
            }),
            ReplicaRequest::SetEnd { end } => {
                replica.end = end;
                replica.good_until = None;
                replica.sync();
            }
            ReplicaRequest::BeginResync { since } => replica.good_until = Some(since),
            ReplicaRequest::ChangedLeaves { newer_than, from } => {
                let mut leaves: Vec<_> = replica
                    .blocks
                    .iter()
                    .filter(|(_, (seq, _))| *seq > newer_than)
                    .map(|((layer, block), _)| (*layer, BlockNo(*block).leaf()))
                    .filter(|leaf| *leaf >= from)
                    .collect();
                leaves.dedup();
                leaves.truncate(LISTED_MAX);
                return Ok(ReplicaReply::Leaves(leaves));
            }
            ReplicaRequest::LeafVersions { lineage, leaf } => {
                let first = leaf.first_block().0;
                let versions = (first..first + 256)
                    .map(|block| replica.version(&lineage, block))
                    .collect();
                return Ok(ReplicaReply::Versions(versions));
            }
            ReplicaRequest::Drop => {}
        }
        Ok(ReplicaReply::Done)
    }
}
