//! Snapshots as decisions: how they are named, which layers are whose, what a deletion means for the log.
//!
//! ```text
//!  web01@before-upgrade ──▶ name ──▶ tree: VDI 7, layer 4 ──▶ lineage [7:2..4, 3:0..9] ──▶ a replica reads
//!                                      │
//!                        take, roll back, clone, delete, flatten
//!                                      └──▶ changes for the log: "layers 3 to 4 are one now", "5 to 8 are gone"
//! ```
//!
//! Nothing here knows of disks, hosts, records or clocks; `docs/decisions/0018-layers.md` says what a layer is.

pub mod diff;
mod name;
pub mod retention;
pub mod schedule;
pub mod tree;

pub use name::{NAME_BYTES_MAX, ParseReferenceError, Point, Reference, SnapshotName, VdiName, WrongName};
pub use tree::Tree;
