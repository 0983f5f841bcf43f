//! The control records, rebuilt from the disks: what `weft pool recover` does when the store that kept them is lost.
//!
//! ```text
//!  each host, its daemon stopped: disks ──read──▶ Export ─┐
//!                                                         ├─▶ merge ──▶ Recovery (shown) ──▶ ControlStore::put_recovered
//!  running daemons: records ──notes──▶ disks              ┘
//! ```
//! A disk keeps each of its shards' records as the last writer's fence brought it, with the promise. What only the
//! control store knew otherwise (names, sizes, zones) a daemon keeps beside it in [`notes`]. The rules by which records
//! that do not agree are weighed are in [`merge()`]; docs/decisions/0016 argues for them.

mod export;
mod merge;
pub mod notes;

pub use export::{Export, FoundDisk, FoundShard, decode_export};
pub use merge::{Asked, MergeError, RecoveredVdi, Recovery, merge};

#[cfg(test)]
mod tests;
