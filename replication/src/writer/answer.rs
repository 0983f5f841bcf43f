//! Whether an answer fits its question: the one place where what a replica says is checked.
//!
//! The wire lets every reply through that has the shape of one. What follows in the writer believes that content has
//! as many blocks as were asked for, that a bad block is one of them, that a listing goes on where the last one ended.
//! A replica that says anything else is broken or is not what it says it is: it counts as gone, like a disk that
//! failed, and nothing of its answer is used.

use store::{LISTED_MAX, ReadPart, StoreError};
use types::{BLOCK_BYTES, BlockNo, LEAF_BLOCKS, LayerId, LeafNo, Payload, Seq};

use super::{MemberState, Purpose, Writer};
use crate::message::{Refusal, ReplicaReply};

/// No write ever gets this seq or a later one. A life has 2^28 of them, so the next choice is far from an overflow.
const SEQ_END: Seq = Seq(1 << 63);

/// What a question can be answered with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Awaited {
    /// Nothing but success; every way to fail that there is was looked at before.
    Done,
    /// Success, or whatever keeps a disk from letting a shard go.
    Gone,
    Promised,
    /// As many blocks, or the word that one of them is bad.
    Blocks(BlockNo, u32),
    Versions,
    /// Leaves from this one on, by layer, each once and in order.
    Leaves((LayerId, LeafNo)),
}

impl<B: Payload> Writer<B> {
    /// Whether `result` can be the answer to what was asked for `purpose`. If nobody waits for it any more, it is:
    /// nothing will come of it.
    pub(super) fn is_answer(&self, purpose: Purpose, result: &Result<ReplicaReply<B>, Refusal>) -> bool {
        match self.awaited(purpose) {
            Some(awaited) => self.fits(awaited, result),
            None => true,
        }
    }

    fn awaited(&self, purpose: Purpose) -> Option<Awaited> {
        match purpose {
            Purpose::Stream { .. } | Purpose::Flush { .. } => Some(Awaited::Done),
            Purpose::Read(no) => Some(self.reads.get(no)?.awaited()),
            Purpose::Fence | Purpose::Refence => Some(Awaited::Promised),
            Purpose::Sync { target, no, part } => match &self.member(target)?.state {
                MemberState::Syncing(sync) => sync.awaited(no, part),
                _ => None,
            },
            Purpose::Repair(no) => Some(self.repairs.get(&no)?.awaited()),
            Purpose::Scrub(no, part) => self.scrub.as_ref()?.awaited(no, part),
            Purpose::Renew(head) => Some(self.renewal_awaits(head)),
            Purpose::Clean | Purpose::Drop => Some(Awaited::Gone),
        }
    }

    fn fits(&self, awaited: Awaited, result: &Result<ReplicaReply<B>, Refusal>) -> bool {
        match (awaited, result) {
            (Awaited::Done | Awaited::Gone, Ok(ReplicaReply::Done)) => true,
            (Awaited::Gone, Err(refusal)) => !matches!(refusal, Refusal::Store(StoreError::Corrupt { .. })),
            (Awaited::Blocks(_, count), Ok(ReplicaReply::Read(parts))) => {
                blocks_of(parts) == Some(u64::from(count))
            }
            (
                Awaited::Blocks(first, count),
                Err(Refusal::Store(StoreError::Corrupt { shard, layer, block })),
            ) => {
                // An ancestor's layers are whatever they are; of its own there is none above the head.
                let is_known = *shard != self.shard || *layer <= self.head();
                shard.no == self.shard.no && is_known && *block >= first && block.0 - first.0 < count
            }
            (Awaited::Promised, Ok(ReplicaReply::Promised { end, .. })) => *end < SEQ_END,
            (Awaited::Versions, Ok(ReplicaReply::Versions(versions))) => {
                versions.len() == LEAF_BLOCKS as usize && versions.iter().all(|version| version.seq < SEQ_END)
            }
            (Awaited::Leaves(from), Ok(ReplicaReply::Leaves(leaves))) => {
                let is_there =
                    |(layer, leaf): &(LayerId, LeafNo)| *layer <= self.head() && *leaf < self.end_leaf();
                leaves.len() <= LISTED_MAX
                    && leaves.first().is_none_or(|first| *first >= from)
                    && leaves.iter().all(is_there)
                    && leaves.is_sorted_by(|a, b| a < b)
            }
            _ => false,
        }
    }

    /// The first leaf number that the shard does not have.
    fn end_leaf(&self) -> LeafNo {
        LeafNo(self.shard_blocks.div_ceil(LEAF_BLOCKS))
    }

    /// Where a listing goes on of which `leaves` was the last answer; `None` when that was all.
    pub(super) fn next_page(&self, leaves: &[(LayerId, LeafNo)]) -> Option<(LayerId, LeafNo)> {
        let (layer, leaf) = *leaves.last().filter(|_| leaves.len() >= LISTED_MAX)?;
        let next = LeafNo(leaf.0 + 1);
        if next < self.end_leaf() {
            return Some((layer, next));
        }
        // A full page may be the last: what is beyond the shard's end, or above the head, cannot be asked for.
        (layer < self.head()).then(|| (LayerId(layer.0 + 1), LeafNo(0)))
    }
}

/// Blocks that a read's parts come to; `None` if one of them is empty or no whole number of blocks.
fn blocks_of<B: Payload>(parts: &[ReadPart<B>]) -> Option<u64> {
    let mut blocks = 0;
    for part in parts {
        let count = match part {
            ReadPart::Data(data) => {
                let bytes = data.length() as u64;
                if !bytes.is_multiple_of(BLOCK_BYTES) {
                    return None;
                }
                bytes / BLOCK_BYTES
            }
            ReadPart::Zeros(count) => u64::from(*count),
        };
        if count == 0 {
            return None;
        }
        blocks += count;
    }
    Some(blocks)
}
