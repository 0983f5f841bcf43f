//! A disk in memory: the replica's side of every shard on it, without a log.

use std::collections::{BTreeMap, VecDeque};

use replication::{FromReplica, Refusal, RepairContent, ReplicaReply, ReplicaRequest, ToReplica};
use store::{BlockState, BlockVersion, ClearKind, ReadPart as BlockPart, StoreError};
use types::{BlockNo, BlockSum, DiskId, HeapBlock, Payload, Seq, Token, crc32c};

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
    blocks: BTreeMap<u32, (Seq, Content)>,
    /// Seqs of blocks on stable media.
    pub durable: BTreeMap<u32, Seq>,
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
    fn put(&mut self, block: BlockNo, count: u32, seq: Seq, content: impl Fn(u32) -> Content) {
        for at in 0..count {
            self.rotten.retain(|rotten| *rotten != block.0 + at);
            self.blocks.insert(block.0 + at, (seq, content(at)));
        }
    }

    fn sync(&mut self) {
        self.durable = self
            .blocks
            .iter()
            .map(|(block, (seq, _))| (*block, *seq))
            .collect();
    }

    fn version(&self, block: u32) -> BlockVersion {
        match self.blocks.get(&block) {
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

    fn read(&self, block: BlockNo, count: u32) -> Vec<BlockPart<HeapBlock>> {
        let mut parts: Vec<BlockPart<HeapBlock>> = Vec::new();
        for at in block.0..block.0 + count {
            match (self.blocks.get(&at), parts.last_mut()) {
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
                block,
                seq,
                data,
                crcs,
                ..
            } => {
                assert_eq!(crcs.len() * BLOCK, data.length());
                for (chunk, crc) in data.bytes().chunks(BLOCK).zip(&crcs) {
                    assert_eq!(crc32c(chunk), *crc, "a checksum is not its block's");
                }
                assert!(seq > replica.end, "seq {seq} after {}", replica.end);
                replica.end = seq;
                let cut = |at: u32| Content::Data(data.slice(at as usize * BLOCK, BLOCK));
                replica.put(block, crcs.len() as u32, seq, cut);
            }
            ReplicaRequest::Clear {
                block,
                count,
                seq,
                kind,
                ..
            } => {
                replica.end = seq;
                replica.put(block, count, seq, |_| Content::Clear(kind));
            }
            ReplicaRequest::Flush => replica.sync(),
            ReplicaRequest::Read { block, count, .. } => {
                if let Some(bad) = (block.0..block.0 + count).find(|at| replica.rotten.contains(at)) {
                    return Err(Refusal::Store(StoreError::Corrupt {
                        shard: message.shard,
                        block: BlockNo(bad),
                    }));
                }
                return Ok(ReplicaReply::Read(replica.read(block, count).into()));
            }
            ReplicaRequest::Repair {
                block,
                seq,
                content,
                live_from,
                ..
            } => {
                let count = match &content {
                    RepairContent::Data(data, _) => (data.length() / BLOCK) as u32,
                    RepairContent::Clear(count, _) => *count,
                };
                for at in 0..count {
                    let no = block.0 + at;
                    if replica.blocks.get(&no).is_some_and(|(seq, _)| *seq >= live_from) {
                        continue;
                    }
                    let new = match &content {
                        RepairContent::Data(data, _) => Content::Data(data.slice(at as usize * BLOCK, BLOCK)),
                        RepairContent::Clear(_, kind) => Content::Clear(*kind),
                    };
                    replica.put(BlockNo(no), 1, seq, |_| new.clone());
                }
            }
            ReplicaRequest::SetEnd { end } => {
                replica.end = end;
                replica.good_until = None;
                replica.sync();
            }
            ReplicaRequest::BeginResync { since } => replica.good_until = Some(since),
            ReplicaRequest::ChangedLeaves { newer_than, from, .. } => {
                let mut leaves: Vec<_> = replica
                    .blocks
                    .iter()
                    .filter(|(_, (seq, _))| *seq > newer_than)
                    .map(|(block, _)| BlockNo(*block).leaf())
                    .filter(|leaf| *leaf >= from)
                    .collect();
                leaves.dedup();
                leaves.truncate(1024);
                return Ok(ReplicaReply::Leaves(leaves));
            }
            ReplicaRequest::LeafVersions { leaf, .. } => {
                let first = leaf.first_block().0;
                let versions = (first..first + 256).map(|block| replica.version(block)).collect();
                return Ok(ReplicaReply::Versions(versions));
            }
            ReplicaRequest::Drop => {}
        }
        Ok(ReplicaReply::Done)
    }
}
