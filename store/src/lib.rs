//! The log store: everything a pool keeps on one disk.
//!
//! See `docs/format.md` for the bytes and `api.rs` for what the store is asked and what it answers.

mod api;

pub use api::{
    BlockState, BlockVersion, ClearKind, Effect, Event, IndexRequest, IndexResponse, LeafKey, Origin,
    REQUEST_BLOCKS_MAX, ReadPart, Reply, Request, ShardSummary, StoreError, StoreSettings, StoreStats,
};
