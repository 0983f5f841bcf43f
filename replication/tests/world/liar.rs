//! Replies of the right shape to the wrong question, and which of them are answers all the same.

use smallvec::smallvec;
use store::{BlockState, BlockVersion, LISTED_MAX, ReadPart, StoreError};
use types::{BlockNo, HeapBlock, LEAF_BLOCKS, LayerId, LeafNo, Seq, ShardId, ShardNo, Token};
use weft_replication::{Refusal, ReplicaReply, ReplicaRequest};

use crate::{SHARD_BLOCKS, shard};

pub type Result = std::result::Result<ReplicaReply<HeapBlock>, Refusal>;

fn corrupt(shard: ShardId, block: u32) -> Result {
    corrupt_in(shard, 0, block)
}

fn corrupt_in(shard: ShardId, layer: u32, block: u32) -> Result {
    let (layer, block) = (LayerId(layer), BlockNo(block));
    Err(Refusal::Store(StoreError::Corrupt { shard, layer, block }))
}

fn leaves(leaves: impl IntoIterator<Item = (u32, u32)>) -> Result {
    let leaves = leaves
        .into_iter()
        .map(|(layer, leaf)| (LayerId(layer), LeafNo(leaf)));
    Ok(ReplicaReply::Leaves(leaves.collect()))
}

fn zeros(count: u32) -> Result {
    Ok(ReplicaReply::Read(smallvec![ReadPart::Zeros(count)]))
}

fn data(bytes: usize) -> Result {
    Ok(ReplicaReply::Read(smallvec![ReadPart::Data(HeapBlock::new(
        &vec![7; bytes]
    ))]))
}

fn versions(count: u32, seq: u64) -> Result {
    let version = BlockVersion {
        seq: Seq(seq),
        state: BlockState::Absent,
    };
    Ok(ReplicaReply::Versions(vec![version; count as usize]))
}

fn promised(end: u64) -> Result {
    Ok(ReplicaReply::Promised {
        previous: Token::default(),
        end: Seq(end),
        good_until: None,
    })
}

/// Everything that the wire lets through, at the edges of what was asked for: `(first, count)` blocks, or a listing
/// from `first` on.
pub fn replies(request: &ReplicaRequest<HeapBlock>, head: LayerId) -> Vec<Result> {
    let (layer, first, count) = range(request);
    let other = ShardId {
        no: ShardNo(77),
        ..shard()
    };
    let leaf_end = SHARD_BLOCKS / LEAF_BLOCKS;
    vec![
        Ok(ReplicaReply::Done),
        promised(0),
        promised(u64::MAX),
        Ok(ReplicaReply::Read(smallvec![])),
        zeros(0),
        zeros(count),
        zeros(count + 1),
        zeros(u32::MAX),
        data(4096 * count as usize),
        data(4096 * (count as usize + 255)),
        data(4096 * count as usize - 512),
        Ok(ReplicaReply::Read(smallvec![
            ReadPart::Zeros(count),
            ReadPart::Zeros(0)
        ])),
        leaves([]),
        leaves([(layer, first)]),
        leaves([(layer, first.wrapping_sub(1))]),
        leaves([(layer.wrapping_sub(1), first)]),
        leaves([(layer, leaf_end)]),
        leaves([(layer, first), (layer, first)]),
        leaves([(layer, 1), (layer, 0)]),
        leaves([(head.0, 0), (0, 1)]),
        leaves(std::iter::repeat_n((layer, first), LISTED_MAX)),
        leaves([(layer, u32::MAX)]),
        leaves([(head.0, leaf_end - 1)]),
        leaves([(head.0 + 1, 0)]),
        versions(LEAF_BLOCKS, 3),
        versions(LEAF_BLOCKS - 1, 3),
        versions(LEAF_BLOCKS, u64::MAX),
        corrupt(shard(), first),
        corrupt(shard(), first + count - 1),
        corrupt(shard(), first + count),
        corrupt(shard(), first.wrapping_sub(1)),
        corrupt(shard(), u32::MAX),
        corrupt(other, first),
        corrupt_in(shard(), head.0, first),
        corrupt_in(shard(), head.0 + 1, first),
    ]
}

/// A layer, and blocks or leaves there.
fn range(request: &ReplicaRequest<HeapBlock>) -> (u32, u32, u32) {
    match request {
        ReplicaRequest::Read { block, count, .. } => (0, block.0, *count),
        ReplicaRequest::ChangedLeaves { from, .. } => (from.0.0, from.1.0, 1),
        _ => (0, 1, 1),
    }
}

/// Whether a reply can be the answer to the request, while this layer is the head.
pub fn is_answer(request: &ReplicaRequest<HeapBlock>, reply: &Result, head: LayerId) -> bool {
    let (_, first, count) = range(request);
    match (request, reply) {
        (ReplicaRequest::Fence { .. }, Ok(ReplicaReply::Promised { end, .. })) => end.0 < 1 << 63,
        (ReplicaRequest::Read { .. }, Ok(ReplicaReply::Read(parts))) => {
            let lengths: Vec<u64> = parts
                .iter()
                .map(|part| match part {
                    ReadPart::Zeros(count) => u64::from(*count) * 4096,
                    ReadPart::Data(data) => types::Payload::length(data) as u64,
                })
                .collect();
            lengths.iter().sum::<u64>() == u64::from(count) * 4096
                && lengths.iter().all(|length| *length > 0 && length % 4096 == 0)
        }
        (
            ReplicaRequest::Read { .. },
            Err(Refusal::Store(StoreError::Corrupt {
                shard: of,
                layer,
                block: bad,
            })),
        ) => *of == shard() && *layer <= head && (first..first + count).contains(&bad.0),
        (ReplicaRequest::ChangedLeaves { from, .. }, Ok(ReplicaReply::Leaves(leaves))) => {
            let end = LeafNo(SHARD_BLOCKS / LEAF_BLOCKS);
            let is_there = |place: &(LayerId, LeafNo)| place >= from && place.0 <= head && place.1 < end;
            leaves.iter().all(is_there) && leaves.windows(2).all(|pair| pair[0] < pair[1])
        }
        (ReplicaRequest::LeafVersions { .. }, Ok(ReplicaReply::Versions(versions))) => {
            versions.len() == LEAF_BLOCKS as usize && versions.iter().all(|version| version.seq.0 < 1 << 63)
        }
        (
            ReplicaRequest::Write { .. }
            | ReplicaRequest::Clear { .. }
            | ReplicaRequest::Flush
            | ReplicaRequest::Repair { .. }
            | ReplicaRequest::Void { .. }
            | ReplicaRequest::SetEnd { .. }
            | ReplicaRequest::BeginResync { .. }
            | ReplicaRequest::Drop,
            Ok(ReplicaReply::Done),
        ) => true,
        _ => false,
    }
}
