//! Requests: a writer's messages to a replica, as frames.

use replication::{RECORD_BYTES_MAX, RepairContent, ReplicaRequest, ToReplica};
use smallvec::SmallVec;
use store::ClearKind;
use types::{
    BLOCK_BYTES, BlockCrcs, BlockNo, LEAF_BLOCKS, LayerId, LeafNo, Lineage, LineageStep, Payload, RequestId,
    SHARD_BLOCKS_MAX, Seq, ShardId, Token, VdiId,
};

use crate::bytes::{Put, Reader};
use crate::frame::{BLOCKS_MAX, Channel, Type};
use crate::{Outgoing, WireError};

/// Seqs are below it. A writer takes 2^28 of them at a fence at most: they last for 2^35 fences.
const SEQ_END: u64 = 1 << 63;

/// What every request and reply begins with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Address {
    pub channel: Channel,
    pub shard: ShardId,
    pub token: Token,
    pub id: RequestId,
}

impl Address {
    pub(crate) fn put(&self, out: &mut Vec<u8>) {
        out.put_u32(self.channel.0);
        out.put_u64(self.shard.to_u64());
        out.put_token(self.token);
        out.put_u64(self.id.0);
    }

    pub(crate) fn take(head: &mut Reader<'_>) -> Result<Address, WireError> {
        Ok(Address {
            channel: Channel(head.u32()?),
            shard: ShardId::from_u64(head.u64()?),
            token: head.token()?,
            id: RequestId(head.u64()?),
        })
    }
}

impl<B: Payload> Outgoing<B> {
    /// Appends a request to the disk of `channel`.
    pub fn request(&mut self, channel: Channel, message: ToReplica<B>) {
        let address = Address {
            channel,
            shard: message.shard,
            token: message.token,
            id: message.id,
        };
        match message.request {
            ReplicaRequest::Fence { record } => self.small(Type::Fence, |out| {
                address.put(out);
                out.put(&record);
            }),
            ReplicaRequest::Write {
                layer,
                block,
                seq,
                data,
                crcs,
            } => self.with_data(Type::Write, [data], |out| {
                address.put(out);
                out.put_u32(layer.0);
                out.put_u32(block.0);
                out.put_u64(seq.0);
                put_crcs(out, &crcs);
            }),
            ReplicaRequest::Clear {
                layer,
                block,
                count,
                seq,
                kind,
            } => self.small(Type::Clear, |out| {
                address.put(out);
                out.put_u32(layer.0);
                out.put_u32(block.0);
                out.put_u64(seq.0);
                put_clear(out, count, kind);
            }),
            ReplicaRequest::Flush => self.small(Type::Flush, |out| address.put(out)),
            ReplicaRequest::Read {
                lineage,
                block,
                count,
            } => self.small(Type::Read, |out| {
                address.put(out);
                out.put_u32(block.0);
                out.put_u32(count);
                put_lineage(out, &lineage);
            }),
            ReplicaRequest::Repair {
                layer,
                block,
                seq,
                content,
                live_from,
            } => {
                let put = |out: &mut Vec<u8>| {
                    address.put(out);
                    out.put_u32(layer.0);
                    out.put_u32(block.0);
                    out.put_u64(seq.0);
                    out.put_u64(live_from.0);
                };
                match content {
                    RepairContent::Data(data, crcs) => self.with_data(Type::RepairData, [data], |out| {
                        put(out);
                        put_crcs(out, &crcs);
                    }),
                    RepairContent::Clear(count, kind) => self.small(Type::RepairClear, |out| {
                        put(out);
                        put_clear(out, count, kind);
                    }),
                }
            }
            ReplicaRequest::Void {
                layer,
                block,
                count,
                live_from,
            } => self.small(Type::Void, |out| {
                address.put(out);
                out.put_u32(layer.0);
                out.put_u32(block.0);
                out.put_u64(live_from.0);
                out.put_u32(count);
            }),
            ReplicaRequest::SetEnd { end } => self.small(Type::SetEnd, |out| {
                address.put(out);
                out.put_u64(end.0);
            }),
            ReplicaRequest::BeginResync { since } => self.small(Type::BeginResync, |out| {
                address.put(out);
                out.put_u64(since.0);
            }),
            ReplicaRequest::ChangedLeaves {
                newer_than,
                from: (layer, leaf),
            } => self.small(Type::ChangedLeaves, |out| {
                address.put(out);
                out.put_u32(layer.0);
                out.put_u64(newer_than.0);
                out.put_u32(leaf.0);
            }),
            ReplicaRequest::LeafVersions { lineage, leaf } => self.small(Type::LeafVersions, |out| {
                address.put(out);
                out.put_u32(leaf.0);
                put_lineage(out, &lineage);
            }),
            ReplicaRequest::Drop => self.small(Type::Drop, |out| address.put(out)),
        }
    }
}

fn put_lineage(out: &mut Vec<u8>, lineage: &Lineage) {
    let steps = lineage.steps();
    out.put_u8(u8::try_from(steps.len()).expect("a lineage is short"));
    for step in steps {
        out.put_u32(step.vdi.0);
        out.put_u32(step.lowest.0);
        out.put_u32(step.highest.0);
    }
}

fn put_crcs(out: &mut Vec<u8>, crcs: &[u32]) {
    for crc in crcs {
        out.put_u32(*crc);
    }
}

fn put_clear(out: &mut Vec<u8>, count: u32, kind: ClearKind) {
    out.put_u32(count);
    out.put_u8(match kind {
        ClearKind::Zero => 0,
        ClearKind::Trim => 1,
    });
}

/// A request whose data, if it has some, is still to come.
pub(crate) struct Pending {
    pub channel: Channel,
    pub message: ToReplica<()>,
}

/// Reads the head of a request with `payload` bytes of data behind it.
pub(crate) fn decode(kind: Type, head: &[u8], payload: usize) -> Result<Pending, WireError> {
    let mut head = Reader::new(kind.name(), head);
    let Address {
        channel,
        shard,
        token,
        id,
    } = Address::take(&mut head)?;
    let request = match kind {
        Type::Fence => {
            let record = head.rest();
            if record.len() > RECORD_BYTES_MAX {
                return Err(head.wrong("record is too long"));
            }
            ReplicaRequest::Fence {
                record: record.to_vec(),
            }
        }
        Type::Write => {
            let (layer, block) = place(&mut head)?;
            let seq = stream_seq(&mut head)?;
            let crcs = crcs(&mut head, payload)?;
            within_shard(&head, block, crcs.len() as u32)?;
            ReplicaRequest::Write {
                layer,
                block,
                seq,
                data: (),
                crcs,
            }
        }
        Type::Clear => {
            let (layer, block) = place(&mut head)?;
            let seq = stream_seq(&mut head)?;
            let (count, kind) = clear(&mut head)?;
            within_shard(&head, block, count)?;
            ReplicaRequest::Clear {
                layer,
                block,
                count,
                seq,
                kind,
            }
        }
        Type::Flush => ReplicaRequest::Flush,
        Type::Read => {
            let (block, count) = (BlockNo(head.u32()?), head.u32()?);
            if count as usize > BLOCKS_MAX {
                return Err(head.wrong("more blocks than one read may ask for"));
            }
            within_shard(&head, block, count)?;
            ReplicaRequest::Read {
                lineage: lineage(&mut head, shard)?,
                block,
                count,
            }
        }
        Type::RepairData => {
            let (layer, block) = place(&mut head)?;
            let (seq, live_from) = (stream_seq(&mut head)?, Seq(head.u64()?));
            let crcs = crcs(&mut head, payload)?;
            within_shard(&head, block, crcs.len() as u32)?;
            ReplicaRequest::Repair {
                layer,
                block,
                seq,
                content: RepairContent::Data((), crcs),
                live_from,
            }
        }
        Type::RepairClear => {
            let (layer, block) = place(&mut head)?;
            let (seq, live_from) = (stream_seq(&mut head)?, Seq(head.u64()?));
            let (count, kind) = clear(&mut head)?;
            within_shard(&head, block, count)?;
            ReplicaRequest::Repair {
                layer,
                block,
                seq,
                content: RepairContent::Clear(count, kind),
                live_from,
            }
        }
        Type::Void => {
            let (layer, block) = place(&mut head)?;
            let (live_from, count) = (Seq(head.u64()?), head.u32()?);
            within_shard(&head, block, count)?;
            ReplicaRequest::Void {
                layer,
                block,
                count,
                live_from,
            }
        }
        Type::SetEnd => ReplicaRequest::SetEnd {
            end: stream_seq(&mut head)?,
        },
        Type::BeginResync => ReplicaRequest::BeginResync {
            since: stream_seq(&mut head)?,
        },
        Type::ChangedLeaves => {
            let layer = LayerId(head.u32()?);
            ReplicaRequest::ChangedLeaves {
                newer_than: Seq(head.u64()?),
                from: (layer, leaf(&mut head)?),
            }
        }
        Type::LeafVersions => ReplicaRequest::LeafVersions {
            leaf: leaf(&mut head)?,
            lineage: lineage(&mut head, shard)?,
        },
        Type::Drop => ReplicaRequest::Drop,
        other => unreachable!("{} is not a request", other.name()),
    };
    head.end()?;
    let message = ToReplica {
        shard,
        token,
        id,
        request,
    };
    Ok(Pending { channel, message })
}

fn place(head: &mut Reader<'_>) -> Result<(LayerId, BlockNo), WireError> {
    Ok((LayerId(head.u32()?), BlockNo(head.u32()?)))
}

/// What a reader of `shard` sees: at least one step, and the newest layer of the shard's own VDI.
fn lineage(head: &mut Reader<'_>, shard: ShardId) -> Result<Lineage, WireError> {
    let count = usize::from(head.u8()?);
    if count > Lineage::STEPS_MAX {
        return Err(head.wrong("lineage of too many steps"));
    }
    let mut steps = SmallVec::<[LineageStep; 4]>::new();
    for _ in 0..count {
        steps.push(LineageStep {
            vdi: VdiId(head.u32()?),
            lowest: LayerId(head.u32()?),
            highest: LayerId(head.u32()?),
        });
    }
    let lineage = Lineage::new(&steps).map_err(|_| head.wrong("steps that are no lineage"))?;
    if lineage.newest().0 != shard.vdi {
        return Err(head.wrong("lineage of another VDI"));
    }
    Ok(lineage)
}

/// A seq of a shard's stream. Both ends count on from what they are told: one so high that counting or a fence's jump
/// could pass the last number has not come about by writing.
pub(crate) fn stream_seq(head: &mut Reader<'_>) -> Result<Seq, WireError> {
    match head.u64()? {
        SEQ_END.. => Err(head.wrong("seq of 2^63 or more")),
        seq => Ok(Seq(seq)),
    }
}

fn clear(head: &mut Reader<'_>) -> Result<(u32, ClearKind), WireError> {
    let count = head.u32()?;
    let kind = match head.u8()? {
        0 => ClearKind::Zero,
        1 => ClearKind::Trim,
        _ => return Err(head.wrong("unknown kind of clearing")),
    };
    Ok((count, kind))
}

fn within_shard(head: &Reader<'_>, block: BlockNo, count: u32) -> Result<(), WireError> {
    match block.0.checked_add(count) {
        Some(end) if count > 0 && end <= SHARD_BLOCKS_MAX => Ok(()),
        _ => Err(head.wrong("blocks outside any shard")),
    }
}

pub(crate) fn leaf(head: &mut Reader<'_>) -> Result<LeafNo, WireError> {
    let leaf = head.u32()?;
    if leaf >= SHARD_BLOCKS_MAX / LEAF_BLOCKS {
        return Err(head.wrong("leaf outside any shard"));
    }
    Ok(LeafNo(leaf))
}

/// A checksum for every block of the data, and at least one.
pub(crate) fn crcs(head: &mut Reader<'_>, payload: usize) -> Result<BlockCrcs, WireError> {
    let crcs: BlockCrcs = head.rest_u32(BLOCKS_MAX)?.collect();
    if crcs.is_empty() || crcs.len() * BLOCK_BYTES as usize != payload {
        return Err(head.wrong("not a checksum for every block"));
    }
    Ok(crcs)
}

impl Pending {
    /// The blocks' checksums, if data follows.
    pub(crate) fn crcs(&self) -> Option<&BlockCrcs> {
        match &self.message.request {
            ReplicaRequest::Write { crcs, .. }
            | ReplicaRequest::Repair {
                content: RepairContent::Data((), crcs),
                ..
            } => Some(crcs),
            _ => None,
        }
    }

    /// The whole message. `data` is there where [`Pending::crcs`] is, and was checked against it.
    pub(crate) fn with_data<B>(self, data: Option<B>) -> (Channel, ToReplica<B>) {
        let data = || data.expect("data was waited for");
        let request = match self.message.request {
            ReplicaRequest::Fence { record } => ReplicaRequest::Fence { record },
            ReplicaRequest::Write {
                layer,
                block,
                seq,
                data: (),
                crcs,
            } => ReplicaRequest::Write {
                layer,
                block,
                seq,
                data: data(),
                crcs,
            },
            ReplicaRequest::Clear {
                layer,
                block,
                count,
                seq,
                kind,
            } => ReplicaRequest::Clear {
                layer,
                block,
                count,
                seq,
                kind,
            },
            ReplicaRequest::Flush => ReplicaRequest::Flush,
            ReplicaRequest::Read {
                lineage,
                block,
                count,
            } => ReplicaRequest::Read {
                lineage,
                block,
                count,
            },
            ReplicaRequest::Repair {
                layer,
                block,
                seq,
                content,
                live_from,
            } => ReplicaRequest::Repair {
                layer,
                block,
                seq,
                content: match content {
                    RepairContent::Data((), crcs) => RepairContent::Data(data(), crcs),
                    RepairContent::Clear(count, kind) => RepairContent::Clear(count, kind),
                },
                live_from,
            },
            ReplicaRequest::Void {
                layer,
                block,
                count,
                live_from,
            } => ReplicaRequest::Void {
                layer,
                block,
                count,
                live_from,
            },
            ReplicaRequest::SetEnd { end } => ReplicaRequest::SetEnd { end },
            ReplicaRequest::BeginResync { since } => ReplicaRequest::BeginResync { since },
            ReplicaRequest::ChangedLeaves { newer_than, from } => {
                ReplicaRequest::ChangedLeaves { newer_than, from }
            }
            ReplicaRequest::LeafVersions { lineage, leaf } => ReplicaRequest::LeafVersions { lineage, leaf },
            ReplicaRequest::Drop => ReplicaRequest::Drop,
        };
        let message = ToReplica {
            shard: self.message.shard,
            token: self.message.token,
            id: self.message.id,
            request,
        };
        (self.channel, message)
    }
}
