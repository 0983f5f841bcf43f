//! Replies of the right shape to the wrong question, and which of them are answers all the same.

use smallvec::smallvec;
use store::{BlockState, BlockVersion, ReadPart, StoreError};
use types::{BlockNo, HeapBlock, LEAF_BLOCKS, LeafNo, Seq, ShardId, ShardNo, Token};
use weft_replication::{Refusal, ReplicaReply, ReplicaRequest};

use crate::{SHARD_BLOCKS, shard};

pub type Result = std::result::Result<ReplicaReply<HeapBlock>, Refusal>;

fn corrupt(shard: ShardId, block: u32) -> Result {
    let block = BlockNo(block);
    Err(Refusal::Store(StoreError::Corrupt { shard, block }))
}

fn leaves(leaves: impl IntoIterator<Item = u32>) -> Result {
    Ok(ReplicaReply::Leaves(leaves.into_iter().map(LeafNo).collect()))
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
pub fn replies(request: &ReplicaRequest<HeapBlock>) -> Vec<Result> {
    let (first, count) = range(request);
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
        leaves([first]),
        leaves([first.wrapping_sub(1)]),
        leaves([leaf_end]),
        leaves([0, 0]),
        leaves([1, 0]),
        leaves(std::iter::repeat_n(first, 1024)),
        leaves([u32::MAX]),
        versions(LEAF_BLOCKS, 3),
        versions(LEAF_BLOCKS - 1, 3),
        versions(LEAF_BLOCKS, u64::MAX),
        corrupt(shard(), first),
        corrupt(shard(), first + count - 1),
        corrupt(shard(), first + count),
        corrupt(shard(), first.wrapping_sub(1)),
        corrupt(shard(), u32::MAX),
        corrupt(other, first),
    ]
}

fn range(request: &ReplicaRequest<HeapBlock>) -> (u32, u32) {
    match request {
        ReplicaRequest::Read { block, count, .. } => (block.0, *count),
        ReplicaRequest::ChangedLeaves { from, .. } => (from.0, 1),
        _ => (1, 1),
    }
}

/// Whether a reply can be the answer to the request.
pub fn is_answer(request: &ReplicaRequest<HeapBlock>, reply: &Result) -> bool {
    let (first, count) = range(request);
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
                block: bad,
            })),
        ) => *of == shard() && (first..first + count).contains(&bad.0),
        (ReplicaRequest::ChangedLeaves { .. }, Ok(ReplicaReply::Leaves(leaves))) => {
            let end = SHARD_BLOCKS / LEAF_BLOCKS;
            leaves.iter().all(|leaf| (first..end).contains(&leaf.0))
                && leaves.windows(2).all(|pair| pair[0] < pair[1])
        }
        (ReplicaRequest::LeafVersions { .. }, Ok(ReplicaReply::Versions(versions))) => {
            versions.len() == LEAF_BLOCKS as usize && versions.iter().all(|version| version.seq.0 < 1 << 63)
        }
        (
            ReplicaRequest::Write { .. }
            | ReplicaRequest::Clear { .. }
            | ReplicaRequest::Flush
            | ReplicaRequest::Repair { .. }
            | ReplicaRequest::SetEnd { .. }
            | ReplicaRequest::BeginResync { .. }
            | ReplicaRequest::Drop,
            Ok(ReplicaReply::Done),
        ) => true,
        _ => false,
    }
}
