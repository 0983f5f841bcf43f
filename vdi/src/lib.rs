//! An open virtual disk: bytes to shards, partial blocks to whole ones, one request at a time per block.
//!
//! Pure: [`Vdi::step`] takes what happened and answers what to do. See `api.rs` for the words.
//!
//! ```text
//!  Request ──check──▶ queue ──admit──▶ conflict table ──claim──▶ pieces ──▶ Writer of each shard
//!                     (FIFO)           (overlaps wait)           edges: read, patch, write
//!                                                                 │ all answered
//!                     Done ◀── flush of the touched shards (FUA) ◀┘ claim released
//! ```
//!
//! What one cannot see in the code: no function here calls a writer from inside a writer's step (answers are
//! queued and worked off by `settle`); a request's claim is held while any of its pieces is under way, so
//! a writer never sees two requests under way on one block unless both read; and every block outside the guest's
//! size is zeros, which is what lets the tail of an odd-sized disk be cleared as a whole block.

mod api;
mod background;
mod conflict;
mod cut;
mod extents;
mod flush;
mod partial;
mod requests;
mod run;
mod split;
mod status;
mod vdi;

pub use api::{
    Effect, Event, Extent, Notice, Op, Outcome, ReadPart, ReadParts, VdiError, VdiSpec, VdiStatus,
};
pub use cut::HOLD_MAX;
pub use split::REQUEST_BYTES_MAX;
pub use vdi::{ADMITTED_MAX, Vdi};
