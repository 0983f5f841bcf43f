//! What a writer and a replica say to each other.
//!
//! Between one writer and one replica messages arrive in the order sent or not at all; when a link breaks, both
//! ends are told and the writer fences anew. A replica therefore always holds a prefix of the stream.

use store::{BlockVersion, ClearKind, ReadParts, StoreError};
use types::{BlockCrcs, BlockNo, DiskId, LayerId, LeafNo, Lineage, RequestId, Seq, ShardId, Token};

/// From the writer of a shard to one of its replicas.
#[derive(Clone, Debug, Hash)]
pub struct ToReplica<B> {
    /// Which shard.
    pub shard: ShardId,
    /// The sender's right to write; the replica refuses anything below what it promised.
    pub token: Token,
    /// Echoed in the reply; unique per writer.
    pub id: RequestId,
    /// What.
    pub request: ReplicaRequest<B>,
}

/// What a writer asks of a replica.
#[derive(Clone, Debug, Hash)]
pub enum ReplicaRequest<B> {
    /// Promise to refuse lower tokens, durably; keep `record` (the shard's record as bytes) beside the promise.
    /// First message of every writer to every replica. Answered by [`ReplicaReply::Promised`].
    Fence {
        /// What `weft pool recover` will find on the disk.
        record: Vec<u8>,
    },
    /// A guest's write, in stream order.
    Write {
        /// Which layer.
        layer: LayerId,
        /// First block.
        block: BlockNo,
        /// Its number.
        seq: Seq,
        /// Whole blocks, at most 256.
        data: B,
        /// crc32c of each block's bytes.
        crcs: BlockCrcs,
    },
    /// A guest's discard or write of zeros, in stream order.
    Clear {
        /// Which layer.
        layer: LayerId,
        /// First block.
        block: BlockNo,
        /// How many.
        count: u32,
        /// Its number.
        seq: Seq,
        /// Discarded or zeros.
        kind: ClearKind,
    },
    /// Everything of the stream before this is to be on stable media.
    Flush,
    /// Read verified content, at most 256 blocks.
    Read {
        /// What the reader sees; its newest layer is of the shard's VDI. See [`store::Request::Read`].
        lineage: Lineage,
        /// First block.
        block: BlockNo,
        /// How many.
        count: u32,
    },
    /// Content of one or more blocks from another replica: resync, catching up, repair.
    Repair {
        /// Which layer.
        layer: LayerId,
        /// First block.
        block: BlockNo,
        /// The seq these blocks have at the source.
        seq: Seq,
        /// Content, or how many blocks to clear.
        content: RepairContent<B>,
        /// Do not touch a block whose present seq is this or later.
        live_from: Seq,
    },
    /// The layer holds nothing of these blocks on another replica: what the layers below it hold is to show again. See
    /// [`store::Request::Void`].
    Void {
        /// Which layer.
        layer: LayerId,
        /// First block.
        block: BlockNo,
        /// How many, at least one.
        count: u32,
        /// Do not touch a block whose present seq is this or later.
        live_from: Seq,
    },
    /// After catching up: everything up to `end` is here, durably; the shard's end becomes `end`. From here on
    /// the stream goes on at seqs above it.
    SetEnd {
        /// The chosen end.
        end: Seq,
    },
    /// Resync begins beside the running stream: remember durably that this replica is good only up to `since`.
    BeginResync {
        /// The last seq up to which this replica's content is known to be right.
        since: Seq,
    },
    /// Which leaves, of all layers, hold something newer than `newer_than`? See [`store::Request::ChangedLeaves`].
    ChangedLeaves {
        /// Only above this.
        newer_than: Seq,
        /// From this layer on, and of it from this leaf on.
        from: (LayerId, LeafNo),
    },
    /// The versions of a leaf's blocks. See [`store::Request::LeafVersions`].
    LeafVersions {
        /// As for a read. A single layer tells what that layer itself says, as comparing replicas wants it.
        lineage: Lineage,
        /// Which leaf.
        leaf: LeafNo,
    },
    /// The shard leaves this disk: its VDI was deleted, or another disk has taken its place.
    Drop,
}

/// What a repair puts in place.
#[derive(Clone, Debug, Hash)]
pub enum RepairContent<B> {
    /// Whole blocks, at most 256, with the crc32c of each.
    Data(B, BlockCrcs),
    /// This many blocks read as zeros.
    Clear(u32, ClearKind),
}

/// From a replica to the writer.
#[derive(Clone, Debug, Hash)]
pub struct FromReplica<B> {
    /// Which shard.
    pub shard: ShardId,
    /// Which disk speaks.
    pub disk: DiskId,
    /// The token of the request: replies to a past life of the writer are ignored by it.
    pub token: Token,
    /// Of the request.
    pub id: RequestId,
    /// How it went.
    pub result: Result<ReplicaReply<B>, Refusal>,
}

/// What a replica answers.
#[derive(Clone, Debug, Hash)]
pub enum ReplicaReply<B> {
    /// The promise is durable.
    Promised {
        /// What it had promised before; the default token if this disk did not know the shard.
        previous: Token,
        /// Highest seq of the stream it holds with nothing missing before.
        end: Seq,
        /// Good only up to here because a resync was under way; `None` when it is whole up to `end`.
        good_until: Option<Seq>,
    },
    /// Done; for writes and clears: on the device; for flush, end and resync marks: on stable media.
    Done,
    /// Content; the parts add up to the blocks asked for.
    Read(ReadParts<B>),
    /// See [`store::Reply::Leaves`].
    Leaves(Vec<(LayerId, LeafNo)>),
    /// See [`store::Reply::Versions`].
    Versions(Vec<BlockVersion>),
}

/// Why a replica did not do it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Refusal {
    /// A newer writer was promised: the sender is out of date and can complete nothing.
    #[error("a newer writer holds {promised:?}")]
    Stale {
        /// What the replica promised.
        promised: Token,
    },
    /// The sender did not fence first.
    #[error("no fence came before")]
    NotFenced,
    /// The store below could not.
    #[error(transparent)]
    Store(#[from] StoreError),
}
