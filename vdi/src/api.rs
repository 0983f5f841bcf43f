//! What an open VDI is asked and what it answers.
//!
//! ```text
//!  front ends ──Request──▶ ┌─────┐ ──Done──▶ front ends
//!  disk nodes ──Replica──▶ │ Vdi │ ──Send──▶ disk nodes      (one Writer per shard inside)
//!  control ──RecordSaved─▶ └─────┘ ──SaveRecord──▶ control
//! ```

use replication::{FromReplica, ShardRecord, Sharing, ToReplica};
use smallvec::SmallVec;
use types::{DiskId, Lineage, RequestId, ShardNo, VdiId};

/// What does not change while a VDI is open, and the size and the layers it opens with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VdiSpec {
    /// Which.
    pub id: VdiId,
    /// Virtual size in bytes, a multiple of the sector size.
    pub bytes: u64,
    /// Logical sector: 512 or 4096 bytes.
    pub sector_bytes: u32,
    /// Bytes per shard, a multiple of 1 MiB.
    pub shard_bytes: u64,
    /// What the head sees; its newest layer takes the writes. Changes with [`Op::Cut`].
    pub lineage: Lineage,
    /// Who else may write it while it is open.
    pub sharing: Sharing,
}

/// A front end's request. Offsets and lengths are bytes, multiples of the sector, inside the VDI; anything else
/// is answered with [`VdiError::OutOfRange`] or [`VdiError::Misaligned`], never asserted: guests send these.
#[derive(Clone, Debug)]
pub enum Op<B> {
    /// Read `length` bytes, at most 32 MiB.
    Read {
        /// From here.
        offset: u64,
        /// This many.
        length: u64,
        /// What a snapshot sees, of layers that take no more writes: nothing is waited for. `None` for the head.
        of: Option<Lineage>,
    },
    /// Write `data`, at most 32 MiB.
    Write {
        /// To here.
        offset: u64,
        /// This content; a stable copy, nobody changes it any more.
        data: B,
        /// Complete only when on stable media.
        fua: bool,
    },
    /// Complete when every write completed before this was submitted is on stable media of a quorum. The first one
    /// after the VDI was opened asks every shard: a past life of the daemon may have completed writes too.
    Flush,
    /// The content of the range is no longer needed: its whole blocks read as zeros afterwards and hold nothing;
    /// a block of which it names only a part is left alone.
    Discard {
        /// From here.
        offset: u64,
        /// This many.
        length: u64,
    },
    /// The range shall read as zeros.
    WriteZeroes {
        /// From here.
        offset: u64,
        /// This many.
        length: u64,
        /// Complete only when on stable media.
        fua: bool,
    },
    /// A new layer takes what is written from here on; the head is read through `lineage`, whose newest layer it is and
    /// above all earlier ones. Writes under way may end in the old layer or the new one. Complete when all that is in the
    /// old one is complete and on stable media of a quorum: nothing of it changes any more.
    Cut {
        /// What the head sees from now on.
        lineage: Lineage,
    },
    /// Which parts of the range (not empty) hold data; may answer for a prefix of the range only (at least one
    /// block).
    Extents {
        /// From here.
        offset: u64,
        /// This many.
        length: u64,
        /// As for a read.
        of: Option<Lineage>,
    },
}

/// A run of bytes of a read's answer, in order.
#[derive(Clone, Debug)]
pub enum ReadPart<B> {
    /// Verified content.
    Data(B),
    /// This many zero bytes.
    Zeros(u64),
}

/// A read's answer, in order. Most are one run.
pub type ReadParts<B> = SmallVec<[ReadPart<B>; 1]>;

/// A run of bytes of the same allocation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// How long.
    pub length: u64,
    /// Holds data; otherwise reads as zeros and holds nothing.
    pub is_data: bool,
}

/// What a request brought.
#[derive(Clone, Debug)]
pub enum Outcome<B> {
    /// Write, flush, discard or zeroes: done.
    Done,
    /// The parts add up to the length asked for.
    Read(ReadParts<B>),
    /// Adjacent from the offset asked for.
    Extents(Vec<Extent>),
}

/// Why a request failed. No quorum and a full pool are not among them: requests wait those out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VdiError {
    /// Outside the VDI, or longer than allowed.
    #[error("{length} bytes at {offset} are not inside the disk of {size} bytes")]
    OutOfRange {
        /// Asked for.
        offset: u64,
        /// Asked for.
        length: u64,
        /// The VDI's size.
        size: u64,
    },
    /// Not a multiple of the logical sector.
    #[error("{length} bytes at {offset} are not whole sectors of {sector} bytes")]
    Misaligned {
        /// Asked for.
        offset: u64,
        /// Asked for.
        length: u64,
        /// The logical sector size.
        sector: u32,
    },
    /// No good copy of a block exists on any replica that can be reached.
    #[error("no replica has a good copy of the block at {offset}")]
    Unreadable {
        /// Byte offset of the first such block.
        offset: u64,
    },
    /// The VDI is being closed or has been deleted.
    #[error("the virtual disk is closed")]
    Closed,
}

/// What happened.
#[derive(Clone, Debug)]
pub enum Event<B> {
    /// A front end wants something. Ids are unique among requests not yet done.
    Request(RequestId, Op<B>),
    /// A disk node answered.
    Replica(FromReplica<B>),
    /// A disk came (and its node is ready for a fence) or went (answers that are missing will not come).
    DiskState {
        /// Which.
        disk: DiskId,
        /// Whether it can be reached.
        is_up: bool,
    },
    /// Where a disk is: reads go to disks of this host first. All are near until told.
    Distance {
        /// Which.
        disk: DiskId,
        /// On another host.
        is_far: bool,
    },
    /// The control store took, or (epoch conflict) refused, the record of a [`Effect::SaveRecord`].
    RecordSaved {
        /// Which shard.
        shard: ShardNo,
        /// What the control store now holds; equal to what was sent when it was taken.
        record: ShardRecord,
    },
    /// The VDI was made larger; the new shards' records come along. Control has saved them before.
    Resized {
        /// New size.
        bytes: u64,
        /// Records of shards that did not exist before, in order.
        added: Vec<ShardRecord>,
    },
    /// From now on nobody is answered, for [`HOLD_MAX`](crate::HOLD_MAX) at most: several VDIs are to be cut at one moment.
    Hold,
    /// They are cut: answers go out again, first those that were held back.
    Release,
    /// An operator replaced a disk: in every shard `old` gives its place to `new`, which is filled by resync.
    ReplaceDisk {
        /// Leaves.
        old: DiskId,
        /// Comes, as chosen by placement for that shard.
        new: Vec<(ShardNo, DiskId)>,
    },
    /// No replica may come to this disk any more: replacements by it that have not begun to count are given up.
    DiskLeaves {
        /// Which.
        disk: DiskId,
        /// The change of a shard's record that was refused for that, when one was: the answer to its
        /// [`Effect::SaveRecord`] in place of [`Event::RecordSaved`].
        refused: Option<ShardRecord>,
    },
    /// Read and verify everything, compare replicas, repair. Ignored while one is running.
    Scrub,
    /// Delete: drop every shard from every disk that is up, then say [`Notice::Dropped`].
    Delete,
    /// A few times a second while [`Vdi::is_busy`](crate::Vdi) says so: background fencing, resync pacing.
    Tick,
}

/// What to do about it.
#[derive(Clone, Debug)]
pub enum Effect<B> {
    /// Answer a front end.
    Done(RequestId, Result<Outcome<B>, VdiError>),
    /// Hand to a disk node.
    Send(DiskId, ToReplica<B>),
    /// Compare-and-swap the shard's record: the one held now must have the epoch just below.
    SaveRecord(ShardRecord),
    /// For counters, events and `weft status`.
    Notice(Notice),
}

/// Things an operator wants to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// A replica is no longer in sync.
    Degraded {
        /// Which shard.
        shard: ShardNo,
        /// Which disk.
        disk: DiskId,
    },
    /// A replica is in sync again; `moved_blocks` travelled to make it so.
    Restored {
        /// Which shard.
        shard: ShardNo,
        /// Which disk.
        disk: DiskId,
        /// Blocks copied.
        moved_blocks: u64,
    },
    /// A bad block was replaced by a good copy.
    Repaired {
        /// Which shard.
        shard: ShardNo,
        /// Where the bad copy was.
        disk: DiskId,
        /// Blocks repaired.
        blocks: u64,
    },
    /// No good copy of a block was found.
    Unreadable {
        /// Which shard.
        shard: ShardNo,
        /// Byte offset in the VDI.
        offset: u64,
    },
    /// Writes to a shard wait because too few replicas can be reached (`true`), or go on (`false`).
    NoQuorum {
        /// Which shard.
        shard: ShardNo,
        /// Waiting or not.
        is_waiting: bool,
    },
    /// Reads of a shard wait because too few replicas say that no other host has taken the VDI over (`true`), or go
    /// on (`false`).
    ReadsWait {
        /// Which shard.
        shard: ShardNo,
        /// Waiting or not.
        is_waiting: bool,
    },
    /// A newer writer holds the shard: this one completes nothing any more.
    Fenced {
        /// Which shard.
        shard: ShardNo,
    },
    /// A replica answered what was not asked; the shard goes on without it until its disk has gone and come back.
    WrongAnswer {
        /// Which shard.
        shard: ShardNo,
        /// Which disk.
        disk: DiskId,
    },
    /// A scrub went on or (`done == total`) ended; counts are of this scrub.
    Scrub {
        /// Shards done.
        done: u32,
        /// Shards in all.
        total: u32,
        /// Blocks read and verified, over all replicas.
        blocks: u64,
        /// Blocks repaired.
        repaired: u64,
        /// Blocks without a good copy.
        unreadable: u64,
    },
    /// Every shard has left every disk that could be reached.
    Dropped,
}

/// Figures for `weft vdi show`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VdiStatus {
    /// Shards in all.
    pub shards: u32,
    /// Shards whose replicas are all in sync.
    pub shards_whole: u32,
    /// Shards that cannot complete writes, or reads, now.
    pub shards_waiting: u32,
    /// Shards that can complete writes, and have a flush under way.
    pub shards_flushing: u32,
    /// Per disk: shards placed there, and how many of those are in sync.
    pub disks: Vec<(DiskId, u32, u32)>,
    /// Leaves still to compare in running resyncs.
    pub resync_leaves_left: u64,
    /// Requests under way.
    pub in_flight: usize,
}
