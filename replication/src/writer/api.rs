//! What a writer is told and what it answers.

use store::{BlockVersion, ClearKind, ReadParts};
use types::{BlockCrcs, BlockNo, DiskId, LeafNo, Lineage, RequestId, Seq, Token};

use crate::{FromReplica, ShardRecord, ToReplica};

/// What is asked of one shard. Blocks are inside the shard; two requests under way never touch the same block
/// unless both read (the caller's conflict table sees to it).
#[derive(Clone, Debug, Hash)]
pub enum ShardOp<B> {
    /// Read 1 to 256 blocks.
    Read {
        /// First block.
        block: BlockNo,
        /// How many.
        count: u32,
        /// What a snapshot sees, of layers that take no more writes; `None` for the head.
        of: Option<Lineage>,
    },
    /// Write 1 to 256 whole blocks.
    Write {
        /// First block.
        block: BlockNo,
        /// The content.
        data: B,
        /// crc32c of each block's bytes.
        crcs: BlockCrcs,
    },
    /// Make a range read as zeros.
    Clear {
        /// First block.
        block: BlockNo,
        /// How many, at least one.
        count: u32,
        /// Zeros or discarded.
        kind: ClearKind,
    },
    /// Done when every write completed before this is on stable media of a quorum.
    Flush,
    /// The versions of a leaf's 256 blocks on a current replica, as a reader sees them.
    Versions {
        /// Which leaf.
        leaf: LeafNo,
        /// As for a read.
        of: Option<Lineage>,
    },
}

impl<B> ShardOp<B> {
    /// Whether it takes a number in the stream of writes.
    pub(super) fn is_stream(&self) -> bool {
        matches!(self, ShardOp::Write { .. } | ShardOp::Clear { .. })
    }
}

/// What a request brought.
#[derive(Clone, Debug, Hash)]
pub enum ShardReply<B> {
    /// Write, clear or flush is done.
    Done,
    /// Verified content; the parts add up to the blocks asked for.
    Read(ReadParts<B>),
    /// 256 of them.
    Versions(Vec<BlockVersion>),
}

/// Why a request failed. Missing replicas are not among the reasons: requests wait for them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum ShardError {
    /// No reachable replica has a good copy of this block.
    #[error("no replica has a good copy of block {block}")]
    Unreadable {
        /// The first such block.
        block: BlockNo,
    },
    /// A newer writer holds the shard; this one can complete nothing any more.
    #[error("a newer writer holds the shard")]
    Fenced,
    /// The shard is being dropped.
    #[error("the shard is being dropped")]
    Closed,
}

/// What happened.
#[derive(Clone, Debug, Hash)]
pub enum WriterEvent<B> {
    /// The VDI wants something. Ids are unique among requests not yet answered.
    Request(RequestId, ShardOp<B>),
    /// A replica answered.
    Replica(FromReplica<B>),
    /// A disk came, and its node is ready for a fence; or went, and answers that are missing will not come.
    DiskState {
        /// Which.
        disk: DiskId,
        /// Whether it can be reached.
        is_up: bool,
    },
    /// Where a disk is, seen from the writer: reads go to near ones first. All are near until told.
    Distance {
        /// Which.
        disk: DiskId,
        /// On another host.
        is_far: bool,
    },
    /// What the control store holds after a [`WriterEffect::SaveRecord`]: what was sent when it was taken.
    RecordSaved(ShardRecord),
    /// `old` gives its place to `new`, which is filled by resync.
    ReplaceDisk {
        /// Leaves.
        old: DiskId,
        /// Comes; not yet a replica of this shard.
        new: DiskId,
    },
    /// No replica may come to this disk any more: a replacement by it that has not begun to count is given up.
    DiskLeaves {
        /// Which.
        disk: DiskId,
        /// The change of the record that was refused for that, when one was: the answer to a
        /// [`WriterEffect::SaveRecord`] in place of [`WriterEvent::RecordSaved`].
        refused: Option<ShardRecord>,
    },
    /// A new layer takes the writes from here on, and the head is read through `lineage`, whose newest layer it is. Its
    /// number is above all earlier ones. Writes under way stay in the layer they were sent in: it is sealed when they have
    /// ended.
    Cut {
        /// What the head sees from now on.
        lineage: Lineage,
    },
    /// Read and verify everything on every in-sync replica, compare, repair. Ignored while one runs.
    Scrub,
    /// The shard goes: drop it from every disk that is up, then say [`WriterNotice::Dropped`].
    Drop,
    /// Fence now, in the background, rather than at the first request.
    Touch,
    /// Time passed; a few times a second while [`Writer::is_busy`](crate::Writer::is_busy).
    Tick,
}

/// What to do about it.
#[derive(Clone, Debug, Hash)]
pub enum WriterEffect<B> {
    /// Answer whoever asked.
    Reply(RequestId, Result<ShardReply<B>, ShardError>),
    /// Hand to a disk node.
    Send(DiskId, ToReplica<B>),
    /// Compare-and-swap: the record held now must have the epoch just below. Answered by
    /// [`WriterEvent::RecordSaved`]; may be said again with the same record when no answer came for a while.
    SaveRecord(ShardRecord),
    /// For counters, events and status.
    Notice(WriterNotice),
}

/// Things an operator wants to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WriterNotice {
    /// A replica is no longer in sync.
    Degraded {
        /// Where.
        disk: DiskId,
    },
    /// A replica is in sync again.
    Restored {
        /// Where.
        disk: DiskId,
        /// Blocks that travelled to make it so.
        moved_blocks: u64,
    },
    /// Bad blocks were replaced by good copies.
    Repaired {
        /// Where the bad copy was.
        disk: DiskId,
        /// How many.
        blocks: u64,
    },
    /// No good copy of a block was found.
    Unreadable {
        /// Which.
        block: BlockNo,
    },
    /// Writes wait because too few replicas can be reached (`true`), or go on (`false`).
    NoQuorum(bool),
    /// Reads wait because too few replicas say that no other host has taken the shard over (`true`), or go on (`false`).
    ReadsWait(bool),
    /// A newer writer holds the shard.
    Fenced,
    /// A replica answered what was not asked. It counts as gone, until its disk has gone and come back.
    WrongAnswer {
        /// Where.
        disk: DiskId,
    },
    /// A scrub ended.
    ScrubDone {
        /// Data blocks read and verified, over all replicas.
        blocks: u64,
        /// Blocks repaired.
        repaired: u64,
        /// Blocks without a good copy.
        unreadable: u64,
    },
    /// The shard has left every disk that could be reached.
    Dropped,
}

/// Where a writer is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WriterPhase {
    /// Nobody asked anything yet; no message was sent.
    Idle,
    /// Fencing, or bringing a quorum to the same end.
    Opening,
    /// Serving.
    Open,
    /// A newer writer took over.
    Fenced,
    /// Being dropped, or dropped.
    Closed,
}

/// Figures for status pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WriterStatus {
    /// Where in its life.
    pub phase: WriterPhase,
    /// The right under which it writes.
    pub token: Token,
    /// Last seq given to a write.
    pub last_seq: Seq,
    /// Whether writes wait for replicas.
    pub is_waiting: bool,
    /// Whether reads wait for the word of replicas that no other host has taken the shard over, and have for long.
    pub reads_wait: bool,
    /// Whether it has its fences and waits for nothing but the leases of older writers to end.
    pub keeps_still: bool,
    /// Per replica: the disk, and whether it is in sync by the record.
    pub replicas: Vec<(DiskId, bool)>,
    /// Leaves still to compare in running resyncs.
    pub resync_leaves_left: u64,
    /// Whether a scrub runs.
    pub is_scrubbing: bool,
    /// Requests not yet given to a replica.
    pub waiting: usize,
}
