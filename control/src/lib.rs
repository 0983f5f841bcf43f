//! The control plane: records of pool, disks, VDIs and shards; placement; and the REST API's types and router.
//!
//! ```text
//!  weft, curl ──HTTP over DIR/blockd.sock──▶ rest ──checked request──▶ Service (blockd implements it)
//!                                                                        │ placement (pure)
//!                                                                        ▼
//!                                                            ControlStore over a Backend: Embedded | Etcd
//! ```
//!
//! Requests are checked once, where they enter ([`check`]); what reaches a [`Service`] is typed and valid.

mod api;
pub mod backend;
mod check;
mod embedded;
mod error;
#[cfg(feature = "etcd")]
pub mod etcd;
mod memory;
pub mod placement;
mod records;
pub mod recover;
pub mod rest;
mod serve;
mod service;
mod store;
mod watchers;

pub use api::*;
pub use check::*;
pub use embedded::Embedded;
pub use error::{ApiError, ApiResult, ErrorKind, Problem};
pub use memory::MemoryKv;
pub use records::{
    AliveDisk, AttachTarget, Attachment, DiskRecord, DiskState, Frontend, HostAlive, HostRecord, NbdAddress,
    ParseTargetError, PoolRecord, VdiRecord, VdiWriter, shard_count,
};
pub use service::Service;
pub use store::{Claim, ControlStore, Placed, PlacedShard, RecordError, SNAPSHOTS_AT_ONCE};
