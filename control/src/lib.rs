//! The control plane: records of pool, disks, VDIs and shards; placement; and the REST API's types and router.
//!
//! ```text
//!  weft, curl ──HTTP over DIR/blockd.sock──▶ rest ──checked request──▶ Service (blockd implements it)
//!                                                                        │ placement (pure)
//!                                                                        ▼
//!                                                            ControlStore over an edge::KvStore
//! ```
//!
//! Requests are checked once, where they enter ([`check`]); what reaches a [`Service`] is typed and valid.

mod api;
mod check;
mod error;
mod memory;
pub mod placement;
mod records;
pub mod rest;
mod serve;
mod service;
mod store;

pub use api::*;
pub use check::*;
pub use error::{ApiError, ApiResult, ErrorKind, Problem};
pub use memory::MemoryKv;
pub use records::{
    AttachTarget, Attachment, DiskRecord, DiskState, Frontend, NbdAddress, ParseTargetError, PoolRecord,
    VdiRecord, shard_count,
};
pub use service::Service;
pub use store::{ControlStore, RecordError};
