//! The log store: everything a pool keeps on one disk.
//!
//! See `docs/format.md` for the bytes and `api.rs` for what the store is asked and what it answers.
//! [`format`] makes a disk, [`recover`] brings one to a state to go on from, [`Store`] runs it.

mod api;
mod append;
mod apply;
mod batch;
mod bytes;
mod cache;
mod checkpoint;
mod clean;
mod fates;
mod flush;
mod format;
mod fsck;
#[doc(hidden)]
pub mod fuzz;
mod leaf;
mod ledger;
mod maps;
mod meta;
mod moving;
mod read;
mod recover;
mod resolve;
mod scan;
mod segment;
mod spares;
mod store;
mod superblock;
mod victim;

pub use api::{
    BlockState, BlockVersion, ClearKind, Effect, Event, IndexRequest, IndexResponse, LISTED_MAX, LeafKey,
    Origin, REQUEST_BLOCKS_MAX, ReadPart, ReadParts, Reply, Request, ShardSummary, StoreError, StoreSettings,
    StoreStats,
};
pub use format::{FormatError, FormatParams, format};
pub use fsck::{BadPlace, FsckError, FsckReport, Inspection, SegmentInfo, fsck, inspect};
pub use recover::{
    Damage, RebuildReason, RecoverError, Recovered, RecoveryReport, rebuild_index, recover, recover_known,
};
pub use store::Store;
pub use superblock::{
    FIRST_SEGMENT_OFFSET, FORMAT_VERSION, SEGMENT_BYTES_DEFAULT, SEGMENT_BYTES_MAX, SEGMENT_BYTES_MIN,
    SEGMENTS_MIN, SUPERBLOCK_OFFSETS, Superblock, SuperblockError, read_superblock,
};
