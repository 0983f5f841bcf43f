//! Replies: a replica's messages to a writer, as frames.

use edge::{DiskError, KvError};
use replication::{FromReplica, Refusal, ReplicaReply};
use store::{BlockState, BlockVersion, ClearKind, LISTED_MAX, ReadPart, ReadParts, StoreError};
use types::{
    BLOCK_BYTES, BlockCrcs, BlockNo, BlockSum, DiskId, LEAF_BLOCKS, LayerId, LeafNo, Payload, RequestId, Seq,
    ShardId, Token,
};

use crate::bytes::{Put, Reader};
use crate::frame::{BLOCKS_MAX, Channel, Type};
use crate::request::{Address, stream_seq};
use crate::{Outgoing, WireError};

/// In a part of a read's content: data, not zeros.
const IS_DATA: u32 = 1 << 31;

/// A reply as it travels: the channel stands for the disk.
#[derive(Clone, Debug)]
pub struct Reply<B> {
    /// Which disk speaks.
    pub channel: Channel,
    /// Which shard.
    pub shard: ShardId,
    /// The token of the request.
    pub token: Token,
    /// Of the request.
    pub id: RequestId,
    /// How it went.
    pub result: Result<ReplicaReply<B>, Refusal>,
}

impl<B> Reply<B> {
    /// For the writer; `disk` is whose channel it is.
    #[must_use]
    pub fn from_disk(self, disk: DiskId) -> FromReplica<B> {
        FromReplica {
            shard: self.shard,
            disk,
            token: self.token,
            id: self.id,
            result: self.result,
        }
    }
}

impl<B: Payload> Outgoing<B> {
    /// Appends a reply of the disk of `channel`. Content is checksummed here, for its way.
    pub fn reply(&mut self, channel: Channel, message: FromReplica<B>) {
        let address = Address {
            channel,
            shard: message.shard,
            token: message.token,
            id: message.id,
        };
        match message.result {
            Ok(ReplicaReply::Promised {
                previous,
                end,
                good_until,
            }) => self.small(Type::Promised, |out| {
                address.put(out);
                out.put_token(previous);
                out.put_u64(end.0);
                out.put_u8(u8::from(good_until.is_some()));
                out.put_u64(good_until.unwrap_or_default().0);
            }),
            Ok(ReplicaReply::Done) => self.small(Type::Done, |out| address.put(out)),
            Ok(ReplicaReply::Read(parts)) => self.content(&address, &parts),
            Ok(ReplicaReply::Leaves(leaves)) => self.small(Type::Leaves, |out| {
                address.put(out);
                for (layer, leaf) in leaves {
                    out.put_u32(layer.0);
                    out.put_u32(leaf.0);
                }
            }),
            Ok(ReplicaReply::Versions(versions)) => self.small(Type::Versions, |out| {
                address.put(out);
                for version in versions {
                    put_version(out, version);
                }
            }),
            Err(refusal) => self.small(Type::Refusal, |out| {
                address.put(out);
                put_refusal(out, &refusal);
            }),
        }
    }

    fn content(&mut self, address: &Address, parts: &ReadParts<B>) {
        let put = |out: &mut Vec<u8>| {
            address.put(out);
            out.put_u16(parts.len() as u16);
            for part in parts {
                out.put_u32(match part {
                    ReadPart::Data(data) => (data.length() / BLOCK_BYTES as usize) as u32 | IS_DATA,
                    ReadPart::Zeros(count) => *count,
                });
            }
            for part in parts {
                if let ReadPart::Data(data) = part {
                    for block in data.bytes().chunks(BLOCK_BYTES as usize) {
                        out.put_u32(types::crc32c(block));
                    }
                }
            }
        };
        let data: Vec<B> = parts
            .iter()
            .filter_map(|part| match part {
                ReadPart::Data(data) => Some(data.clone()),
                ReadPart::Zeros(_) => None,
            })
            .collect();
        self.with_data(Type::Content, data, put);
    }
}

fn put_version(out: &mut Vec<u8>, version: BlockVersion) {
    out.put_u64(version.seq.0);
    let (state, sum) = match version.state {
        BlockState::Absent => (0, 0),
        BlockState::Clear(ClearKind::Zero) => (1, 0),
        BlockState::Clear(ClearKind::Trim) => (2, 0),
        BlockState::Data(sum) => (3, sum.0),
    };
    out.put_u8(state);
    out.put_u32(sum);
}

fn put_refusal(out: &mut Vec<u8>, refusal: &Refusal) {
    match refusal {
        Refusal::Stale { promised } => {
            out.put_u8(1);
            out.put_token(*promised);
        }
        Refusal::NotFenced => out.put_u8(2),
        Refusal::Store(StoreError::Corrupt { shard, layer, block }) => {
            out.put_u8(3);
            out.put_u64(shard.to_u64());
            out.put_u32(layer.0);
            out.put_u32(block.0);
        }
        Refusal::Store(StoreError::NoShard(shard)) => {
            out.put_u8(4);
            out.put_u64(shard.to_u64());
        }
        Refusal::Store(StoreError::DiskFailed(DiskError::Io {
            operation,
            offset,
            bytes,
            errno,
            reason,
        })) => {
            out.put_u8(5);
            out.put_text(operation);
            out.put_u64(*offset);
            out.put_u64(*bytes);
            out.put_u32(errno.cast_unsigned());
            out.put_text(reason);
        }
        Refusal::Store(StoreError::DiskFailed(DiskError::Short {
            operation,
            offset,
            done,
            wanted,
        })) => {
            out.put_u8(6);
            out.put_text(operation);
            out.put_u64(*offset);
            out.put_u64(*done);
            out.put_u64(*wanted);
        }
        Refusal::Store(StoreError::IndexFailed(KvError {
            operation,
            place,
            reason,
        })) => {
            out.put_u8(7);
            out.put_text(operation);
            out.put_text(place);
            out.put_text(reason);
        }
    }
}

/// What a reply's data, if it has some, is to become.
pub(crate) enum Outcome {
    /// There is none.
    Whole(Result<ReplicaReply<()>, Refusal>),
    /// Parts: data or not, and how many blocks; the checksums of all data.
    Content(Vec<(bool, u32)>, BlockCrcs),
}

/// A reply whose data, if it has some, is still to come.
pub(crate) struct Pending {
    address: Address,
    result: Outcome,
}

/// Reads the head of a reply with `payload` bytes of data behind it.
pub(crate) fn decode(kind: Type, head: &[u8], payload: usize) -> Result<Pending, WireError> {
    let mut head = Reader::new(kind.name(), head);
    let address = Address::take(&mut head)?;
    let whole = match kind {
        Type::Promised => {
            let previous = head.token()?;
            let end = stream_seq(&mut head)?;
            let good_until = match (head.u8()?, stream_seq(&mut head)?) {
                (0, Seq(0)) => None,
                (1, good) => Some(good),
                _ => return Err(head.wrong("neither good nor not")),
            };
            Ok(ReplicaReply::Promised {
                previous,
                end,
                good_until,
            })
        }
        Type::Done => Ok(ReplicaReply::Done),
        Type::Content => {
            let (parts, crcs) = content(&mut head, payload)?;
            return Ok(Pending {
                address,
                result: Outcome::Content(parts, crcs),
            });
        }
        Type::Leaves => Ok(ReplicaReply::Leaves(leaves(&mut head)?)),
        Type::Versions => {
            let version = |_| version(&mut head);
            let versions: Result<Vec<_>, WireError> = (0..LEAF_BLOCKS).map(version).collect();
            Ok(ReplicaReply::Versions(versions?))
        }
        Type::Refusal => Err(refusal(&mut head)?),
        other => unreachable!("{} is not a reply", other.name()),
    };
    head.end()?;
    Ok(Pending {
        address,
        result: Outcome::Whole(whole),
    })
}

fn content(head: &mut Reader<'_>, payload: usize) -> Result<(Vec<(bool, u32)>, BlockCrcs), WireError> {
    let count = usize::from(head.u16()?);
    if !(1..=BLOCKS_MAX).contains(&count) {
        return Err(head.wrong("no parts, or more than blocks"));
    }
    let (mut parts, mut blocks, mut data_blocks) = (Vec::with_capacity(count), 0, 0);
    for _ in 0..count {
        let part = head.u32()?;
        let (is_data, count) = (part & IS_DATA != 0, part & !IS_DATA);
        if !(1..=BLOCKS_MAX as u32).contains(&count) {
            return Err(head.wrong("part of no blocks, or of too many"));
        }
        blocks += count as usize;
        data_blocks += if is_data { count as usize } else { 0 };
        parts.push((is_data, count));
    }
    if blocks > BLOCKS_MAX {
        return Err(head.wrong("more blocks than one read may ask for"));
    }
    let crcs: BlockCrcs = head.rest_u32(BLOCKS_MAX)?.collect();
    if crcs.len() != data_blocks || data_blocks * BLOCK_BYTES as usize != payload {
        return Err(head.wrong("not a checksum for every block"));
    }
    Ok((parts, crcs))
}

fn leaves(head: &mut Reader<'_>) -> Result<Vec<(LayerId, LeafNo)>, WireError> {
    let mut numbers = head.rest_u32(2 * LISTED_MAX)?;
    if !numbers.len().is_multiple_of(2) {
        return Err(head.wrong("a layer without a leaf"));
    }
    let mut leaves = Vec::with_capacity(numbers.len() / 2);
    while let (Some(layer), Some(leaf)) = (numbers.next(), numbers.next()) {
        leaves.push((LayerId(layer), LeafNo(leaf)));
    }
    let is_ascending = leaves.is_sorted_by(|a, b| a < b);
    let last_leaf = LeafNo(types::SHARD_BLOCKS_MAX / LEAF_BLOCKS - 1);
    if !is_ascending || leaves.iter().any(|(_, leaf)| *leaf > last_leaf) {
        return Err(head.wrong("leaves out of order, or outside any shard"));
    }
    Ok(leaves)
}

fn version(head: &mut Reader<'_>) -> Result<BlockVersion, WireError> {
    let seq = stream_seq(head)?;
    let state = match (head.u8()?, head.u32()?) {
        (0, 0) => BlockState::Absent,
        (1, 0) => BlockState::Clear(ClearKind::Zero),
        (2, 0) => BlockState::Clear(ClearKind::Trim),
        (3, sum) => BlockState::Data(BlockSum(sum)),
        _ => return Err(head.wrong("unknown state of a block")),
    };
    Ok(BlockVersion { seq, state })
}

/// The word of ours that `text` is: errors carry theirs as constants.
fn word(text: &str) -> &'static str {
    let known = ["read", "write", "sync", "open", "get", "scan", "apply"];
    known
        .into_iter()
        .find(|word| *word == text)
        .unwrap_or("operation")
}

fn refusal(head: &mut Reader<'_>) -> Result<Refusal, WireError> {
    let refusal = match head.u8()? {
        1 => Refusal::Stale {
            promised: head.token()?,
        },
        2 => Refusal::NotFenced,
        3 => Refusal::Store(StoreError::Corrupt {
            shard: ShardId::from_u64(head.u64()?),
            layer: LayerId(head.u32()?),
            block: BlockNo(head.u32()?),
        }),
        4 => Refusal::Store(StoreError::NoShard(ShardId::from_u64(head.u64()?))),
        5 => Refusal::Store(StoreError::DiskFailed(DiskError::Io {
            operation: word(&head.text()?),
            offset: head.u64()?,
            bytes: head.u64()?,
            errno: head.u32()?.cast_signed(),
            reason: head.text()?,
        })),
        6 => Refusal::Store(StoreError::DiskFailed(DiskError::Short {
            operation: word(&head.text()?),
            offset: head.u64()?,
            done: head.u64()?,
            wanted: head.u64()?,
        })),
        7 => Refusal::Store(StoreError::IndexFailed(KvError {
            operation: word(&head.text()?),
            place: head.text()?,
            reason: head.text()?,
        })),
        _ => return Err(head.wrong("unknown refusal")),
    };
    Ok(refusal)
}

impl Pending {
    /// The blocks' checksums, if data follows.
    pub(crate) fn crcs(&self) -> Option<&BlockCrcs> {
        match &self.result {
            Outcome::Content(_, crcs) if !crcs.is_empty() => Some(crcs),
            _ => None,
        }
    }

    /// The whole reply. `data` is there where [`Pending::crcs`] is, and was checked against it.
    pub(crate) fn with_data<B: Payload>(self, data: Option<&B>) -> Reply<B> {
        let result = match self.result {
            Outcome::Whole(Err(refusal)) => Err(refusal),
            Outcome::Whole(Ok(reply)) => Ok(match reply {
                ReplicaReply::Promised {
                    previous,
                    end,
                    good_until,
                } => ReplicaReply::Promised {
                    previous,
                    end,
                    good_until,
                },
                ReplicaReply::Done => ReplicaReply::Done,
                ReplicaReply::Leaves(leaves) => ReplicaReply::Leaves(leaves),
                ReplicaReply::Versions(versions) => ReplicaReply::Versions(versions),
                ReplicaReply::Read(_) => unreachable!("content is not whole without data"),
            }),
            Outcome::Content(parts, _) => {
                let mut end = 0;
                let part = |(is_data, count): (bool, u32)| {
                    if !is_data {
                        return ReadPart::Zeros(count);
                    }
                    let start = end;
                    end += count as usize * BLOCK_BYTES as usize;
                    let data = data.expect("data was waited for");
                    ReadPart::Data(data.slice(start, end - start))
                };
                Ok(ReplicaReply::Read(parts.into_iter().map(part).collect()))
            }
        };
        Reply {
            channel: self.address.channel,
            shard: self.address.shard,
            token: self.address.token,
            id: self.address.id,
            result,
        }
    }
}
