//! An open virtual disk: bytes to shards, partial blocks to whole ones, one request at a time per block.
//!
//! Pure: `Vdi::step` takes what happened and answers what to do. See `api.rs`.

mod api;

pub use api::{Effect, Event, Extent, Notice, Op, Outcome, ReadPart, VdiError, VdiSpec, VdiStatus};
