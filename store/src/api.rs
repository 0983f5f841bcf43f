//! What the store is asked and what it answers.
//!
//! ```text
//!  Request ──▶ ┌───────┐ ──▶ Reply            (to the replica role above)
//!              │ Store │ ──▶ DiskOp           (to the disk)        ◀── Completion
//!   Tick   ──▶ └───────┘ ──▶ IndexRequest     (to the index thread) ◀── IndexResponse
//! ```

use std::ops::RangeInclusive;

use edge::{Completion, DiskError, DiskOp, IoId, KvBatch, KvError};
use smallvec::SmallVec;
use types::{BlockCrcs, BlockNo, LayerId, LeafNo, Lineage, RequestId, Seq, ShardId};

/// Where a write came from; decides whether it may replace what the index holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Origin {
    /// The writer's stream: always replaces (streams arrive in order).
    Live,
    /// Resync, repair or catching up: replaces a block unless the block's present seq is `live_from` or later,
    /// that is, unless the running stream has already overwritten it. Does not advance the shard's end.
    Repair {
        /// First seq of the stream that runs beside the resync.
        live_from: Seq,
    },
}

/// How a range without data came to be. Both read as zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ClearKind {
    /// Zeros were written.
    Zero,
    /// The guest discarded the range.
    Trim,
}

/// One thing to do. Ranges are of blocks within one shard and inside the shard's size (the caller asserts).
#[derive(Clone, Debug, Hash)]
pub enum Request<B> {
    /// Stores `data`, whole blocks, from `block` on. Replied when its batch and all earlier ones are complete.
    Write {
        /// Whose.
        shard: ShardId,
        /// In which layer.
        layer: LayerId,
        /// First block.
        block: BlockNo,
        /// One number for all its blocks.
        seq: Seq,
        /// The content, a positive whole number of blocks, at most 256 (1 MiB).
        data: B,
        /// crc32c of each block's bytes, computed once where the data entered Weft.
        crcs: BlockCrcs,
        /// Stream or repair.
        origin: Origin,
    },
    /// Makes a range read as zeros without storing data.
    Clear {
        /// Whose.
        shard: ShardId,
        /// In which layer.
        layer: LayerId,
        /// First block.
        block: BlockNo,
        /// How many; at most the shard.
        count: u32,
        /// One number for the range.
        seq: Seq,
        /// Zeros or discarded.
        kind: ClearKind,
        /// Stream or repair.
        origin: Origin,
    },
    /// Makes a range what it was before anything was written to it in this layer: what the layers below hold shows
    /// again. For repair, where a disk holds what the others never had; zeros in its place would hide the layers
    /// below. Replaces a block unless its present seq is `live_from` or later. Does not advance the shard's end.
    Void {
        /// Whose.
        shard: ShardId,
        /// In which layer.
        layer: LayerId,
        /// First block.
        block: BlockNo,
        /// How many; at most the shard.
        count: u32,
        /// First seq of the stream that runs beside the repair.
        live_from: Seq,
    },
    /// Reads at most 256 blocks; each is checked against its sum before the reply. A block holds what the newest layer
    /// of the lineage that has it says: a cleared one hides what is below, and a corrupt one is an error.
    Read {
        /// Who asks; must be on this disk.
        shard: ShardId,
        /// What it sees. The layers of a step are those of the shard of the same number in the step's VDI; those that
        /// this disk does not hold say nothing.
        lineage: Lineage,
        /// First block.
        block: BlockNo,
        /// How many, 1 to 256.
        count: u32,
    },
    /// Makes every request of this shard that was received before this one durable; replied after them. Requests of
    /// other shards may wait for space for ever, and are not waited for.
    Flush {
        /// Whose.
        shard: ShardId,
    },
    /// Keeps `record` (opaque, at most 3 KiB) as the shard's record, replacing the last one. Durable when replied.
    /// Also makes the shard known to this disk.
    PutRecord {
        /// Whose.
        shard: ShardId,
        /// The new record.
        record: Vec<u8>,
    },
    /// Makes the shard's end `end`, be it lower or higher than before: the writer has brought this replica up to
    /// it by repair. Durable when replied.
    SetEnd {
        /// Whose.
        shard: ShardId,
        /// The new end.
        end: Seq,
    },
    /// Forgets the shard and gives its space back. Durable when replied.
    DropShard {
        /// Which.
        shard: ShardId,
    },
    /// Forgets layers of the shard for ever and gives their space back; what is written in them later says nothing
    /// either. Durable when replied. Saying it again changes nothing.
    DropLayers {
        /// Whose.
        shard: ShardId,
        /// Which: ranges in any order, none of them empty.
        layers: Vec<RangeInclusive<LayerId>>,
        /// Which revision of its VDI's layers the shard has applied with this. Of several requests that make up one
        /// revision the last says it, and those before it the revision before.
        revision: u64,
    },
    /// Makes layers one: where several have a block, the latest layer's counts, and whoever names one of them means all. The
    /// space of what is hidden comes back, no data is copied. Durable when replied. Saying it again changes nothing.
    MergeLayers {
        /// Whose.
        shard: ShardId,
        /// Which: ranges in any order, none of them empty or above `called`. Layers between two ranges are others'.
        layers: Vec<RangeInclusive<LayerId>>,
        /// The highest of them, whose name all of them have from now on. In a lineage they are where this one is.
        called: LayerId,
        /// As in [`Request::DropLayers`].
        revision: u64,
    },
    /// Asks which revision of its VDI's layers the shard has applied. Zero if it was never told of any, or if what it was
    /// told last is not durable yet.
    LayersRevision {
        /// Whose.
        shard: ShardId,
    },
    /// Lists leaves of all the shard's layers, ascending by layer and leaf, that hold a block with seq above
    /// `newer_than`; at most [`LISTED_MAX`]. Layers in which the shard holds nothing cost nothing, however many.
    ChangedLeaves {
        /// Whose.
        shard: ShardId,
        /// Only leaves with a block above this; `Seq(0)` lists every leaf that ever held anything.
        newer_than: Seq,
        /// First layer, and first leaf of that layer, to consider.
        from: (LayerId, LeafNo),
    },
    /// The version of each of the 256 blocks of a leaf: that of the newest layer of the lineage that has the block.
    LeafVersions {
        /// Who asks; must be on this disk.
        shard: ShardId,
        /// As in [`Request::Read`]; a single layer tells what that layer itself says.
        lineage: Lineage,
        /// Which leaf.
        leaf: LeafNo,
    },
}

/// What the index knows of one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BlockState {
    /// Never written in this layer, or made void.
    Absent,
    /// Zeros or discarded.
    Clear(ClearKind),
    /// Data with this crc32c of its plain content,
    /// bound to its identity ([`types::bind`]).
    Data(types::BlockSum),
}

/// State and seq of one block; equal versions hold equal content.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockVersion {
    /// Seq of the write that made it; `Seq(0)` where absent.
    pub seq: Seq,
    /// What it holds.
    pub state: BlockState,
}

/// A run of blocks that a read brought, in order.
#[derive(Clone, Debug, Hash)]
pub enum ReadPart<B> {
    /// Whole blocks of verified content.
    Data(B),
    /// This many blocks of zeros (cleared or never written).
    Zeros(u32),
}

/// A read's content, in order. Most are one run.
pub type ReadParts<B> = SmallVec<[ReadPart<B>; 1]>;

/// What this disk holds of one shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardSummary {
    /// Which.
    pub shard: ShardId,
    /// Highest seq of the writer's stream that is in the log without a gap before it.
    pub end: Seq,
    /// The record last put, empty if none.
    pub record: Vec<u8>,
    /// Blocks of data the shard holds on this disk.
    pub data_blocks: u64,
    /// The log was found damaged, or to be an old copy, and the record was not put since: the shard may lack what
    /// it once completed. Said again after every restart until the record is put.
    pub is_doubtful: bool,
}

/// Why a request was not done.
#[derive(Clone, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum StoreError {
    /// The block's content does not match its sum, or could not be read; other blocks may be fine.
    #[error("block {block} of shard {shard} does not match its checksum")]
    Corrupt {
        /// Whose it is: that of an ancestor, where a lineage led there.
        shard: ShardId,
        /// The layer that has it.
        layer: LayerId,
        /// First bad block of the request.
        block: BlockNo,
    },
    /// The disk failed (an I/O error on write, any failed sync): it takes no more until reopened and checked.
    #[error("the disk failed: {0}")]
    DiskFailed(DiskError),
    /// The index failed; as final as a failed disk.
    #[error("the disk's index failed: {0}")]
    IndexFailed(KvError),
    /// No such shard on this disk.
    #[error("shard {0} is not on this disk")]
    NoShard(ShardId),
}

/// The answer to a [`Request`].
#[derive(Clone, Debug)]
pub enum Reply<B> {
    /// Write, clear, flush, record or drop is done.
    Done,
    /// A read's content; the parts add up to the blocks asked for.
    Read(ReadParts<B>),
    /// For [`Request::ChangedLeaves`]; fewer than [`LISTED_MAX`] means there are no more.
    Leaves(Vec<(LayerId, LeafNo)>),
    /// For [`Request::LeafVersions`]: 256 of them.
    Versions(Vec<BlockVersion>),
    /// For [`Request::LayersRevision`].
    Revision(u64),
}

/// Key of an index leaf; sorts as (shard, layer, leaf) in the index.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeafKey {
    /// Whose.
    pub shard: ShardId,
    /// In which layer.
    pub layer: LayerId,
    /// Which.
    pub leaf: LeafNo,
}

/// What the store asks of the thread that owns its index (RocksDB).
#[derive(Clone, Debug)]
pub enum IndexRequest {
    /// Bring the value of `encoded`, the key of `key`.
    Load {
        /// Echoed in the response.
        key: LeafKey,
        /// Its bytes in the index.
        encoded: Vec<u8>,
    },
    /// Apply atomically and durably.
    Checkpoint {
        /// Echoed in the response.
        id: u64,
        /// All of it.
        batch: KvBatch,
    },
}

/// What the index thread answers.
#[derive(Clone, Debug)]
pub enum IndexResponse {
    /// For [`IndexRequest::Load`].
    Loaded {
        /// Which leaf.
        key: LeafKey,
        /// Its value, if it has one.
        value: Result<Option<Vec<u8>>, KvError>,
    },
    /// For [`IndexRequest::Checkpoint`].
    Checkpointed {
        /// Which.
        id: u64,
        /// Whether it is durable.
        result: Result<(), KvError>,
    },
}

/// What happened.
#[derive(Clone, Debug)]
pub enum Event<B> {
    /// Somebody above wants something.
    Request(RequestId, Request<B>),
    /// The disk finished an operation.
    Disk(Completion<B>),
    /// The index thread answered.
    Index(IndexResponse),
    /// The driver has handed over all events of this turn: close the batch and submit it.
    TurnEnd,
    /// Time passed (a few times a second while anything is pending, never needed when idle): pace checkpoints
    /// and cleaning.
    Tick,
    /// The process is about to end: what is durable is to be said in the log now, not at the next tick.
    Closing,
}

/// What to do about it.
#[derive(Clone, Debug)]
pub enum Effect<B> {
    /// Answer whoever asked.
    Reply(RequestId, Result<Reply<B>, StoreError>),
    /// Hand to the disk.
    Disk(IoId, DiskOp<B>),
    /// Hand to the index thread.
    Index(IndexRequest),
    /// The disk just failed; said once.
    Failed(StoreError),
    /// Free space ran out for guests (`true`) or came back (`false`); writes wait in between.
    Full(bool),
}

/// Figures for `weft status` and `/metrics`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoreStats {
    /// Segments on the disk.
    pub segments: u32,
    /// Segments that hold nothing and may be opened.
    pub segments_free: u32,
    /// Blocks of live data.
    pub live_blocks: u64,
    /// Bytes that guests can store in all.
    pub capacity_bytes: u64,
    /// Blocks appended for guests since start.
    pub written_blocks: u64,
    /// Blocks appended by cleaning since start.
    pub cleaned_blocks: u64,
    /// Batches appended since start.
    pub batches: u64,
    /// Syncs since start.
    pub syncs: u64,
    /// Checkpoints since start.
    pub checkpoints: u64,
    /// Blocks whose checksum failed since start.
    pub corrupt_blocks: u64,
    /// Bytes of index leaves in memory.
    pub cached_bytes: u64,
    /// Requests that wait for free space.
    pub waiting_for_space: u64,
}

/// What an operator may choose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoreSettings {
    /// Memory for index leaves and the checkpoints of them, bytes.
    pub cache_bytes: u64,
    /// Appends under way at once.
    pub appends_in_flight: usize,
    /// Log written since the last checkpoint that starts the next, bytes.
    pub checkpoint_bytes: u64,
    /// Segments that only cleaning may use.
    pub segments_reserved: u32,
    /// Cleaning starts when fewer than this many segments are free, or fewer than a 64th of them.
    pub clean_below_free: u32,
    /// Memory for content that cleaning has read and not yet logged, bytes.
    pub cleaning_bytes: u64,
}

impl Default for StoreSettings {
    fn default() -> StoreSettings {
        StoreSettings {
            cache_bytes: 256 << 20,
            appends_in_flight: 8,
            checkpoint_bytes: 256 << 20,
            segments_reserved: 4,
            clean_below_free: 12,
            cleaning_bytes: 8 << 20,
        }
    }
}

/// The most leaves that one answer to [`Request::ChangedLeaves`] lists.
pub const LISTED_MAX: usize = 512;

/// The most blocks one [`Request::Write`] or [`Request::Read`] may name.
pub const REQUEST_BLOCKS_MAX: u32 = 256;
