//! The seam between Weft's pure cores and the world: traits for disks, key-value indexes, links and clocks.
//!
//! The cores in `store`, `replication` and `vdi` emit operations as data ([`DiskOp`]) and take completions
//! back; whoever drives them owns an implementation of these traits. There are two of each: the real one
//! (features `uring`, `file` and `rocks` of this crate) and the simulated one (crate `sim`). Keep the traits as small
//! as that: every method here is one more thing a fault can happen in.

#[cfg(feature = "allocations")]
pub mod allocations;
mod disk;
#[cfg(feature = "file")]
pub mod file;
mod kv;
mod link;
#[cfg(feature = "rocks")]
pub mod rocks;
#[cfg(feature = "uring")]
pub mod uring;

pub use disk::{AlignedBlock, BlockFile, Completion, Disk, DiskError, DiskOp, DiskOutcome, IoId};
pub use kv::{KvBatch, KvError, KvStore};
pub use link::{Clock, Network};
