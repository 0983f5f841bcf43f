//! Backups of disks in object storage: a directory, or a bucket that speaks S3.
//!
//! ```text
//!  backups/ID      a backup: its name, the disk's size, its pages          written last: then the backup exists
//!     └─ pages/    1 GiB of the disk: what each of its chunks is           shared by backups that agree on it
//!          └─ chunks/, patches/    1 MiB of the disk, or what differs      shared by all disks of the repository
//! ```
//!
//! Objects below a backup are named by a hash of their content and never change, so a run that was killed has left
//! nothing but objects that the next run finds there. docs/backup-format.md has every byte, and why an object may be
//! deleted while others write.
//!
//! Pure, and tested as such: [`object`], [`page`], [`patch`], [`manifest`], [`plan`], [`sweep`]. They say what to read,
//! to keep, to delete; [`repository`], [`create()`], [`restore()`], [`verify()`] and [`prune()`] do it.

pub mod create;
pub mod error;
pub mod file;
pub mod format;
pub mod key;
pub mod location;
pub mod manifest;
pub mod nbd;
pub mod object;
pub mod page;
pub mod patch;
pub mod plan;
pub mod progress;
pub mod prune;
pub mod reader;
pub mod repository;
pub mod restore;
pub mod sealed;
pub mod session;
pub mod source;
pub mod sweep;
pub mod verify;

mod bytes_in;

pub use create::{CreateOptions, create};
pub use error::{Damage, Error};
pub use key::Key;
pub use manifest::{BackupId, Manifest};
pub use progress::Progress;
pub use prune::{PruneReport, prune};
pub use reader::Reader;
pub use repository::Repository;
pub use restore::restore;
pub use source::{Extent, Sink, Source, What};
pub use verify::{VerifyReport, verify};

/// Bytes of a chunk: the unit that is named, stored and shared. Part of format 1.
pub const CHUNK_BYTES: u64 = 1 << 20;
/// Chunks of a page: 1 GiB of the disk.
pub const PAGE_CHUNKS: usize = 1024;
/// Bytes of a page's part of the disk.
pub const PAGE_BYTES: u64 = CHUNK_BYTES * PAGE_CHUNKS as u64;
/// Bytes of a block: the unit of what has changed within a chunk.
pub const BLOCK_BYTES: usize = 4096;
/// Blocks of a chunk.
pub const CHUNK_BLOCKS: usize = CHUNK_BYTES as usize / BLOCK_BYTES;
/// The largest disk: what a manifest of the largest size can list.
pub const DISK_BYTES_MAX: u64 = 1 << 50;

/// Chunks of a disk of this size.
#[must_use]
pub fn chunks_of(disk_bytes: u64) -> u64 {
    disk_bytes.div_ceil(CHUNK_BYTES)
}

/// Bytes of a chunk: all have [`CHUNK_BYTES`] but the last of a disk.
///
/// # Panics
/// When the disk has no such chunk.
#[must_use]
pub fn chunk_bytes(disk_bytes: u64, chunk: u64) -> usize {
    assert!(
        chunk < chunks_of(disk_bytes),
        "chunk {chunk} of {disk_bytes} bytes"
    );
    (disk_bytes - chunk * CHUNK_BYTES).min(CHUNK_BYTES) as usize
}

/// Chunks that a page of a disk of this size has: all have [`PAGE_CHUNKS`] but the last.
///
/// # Panics
/// When the disk has no such page.
#[must_use]
pub fn page_chunks(disk_bytes: u64, page: u64) -> usize {
    let first = page * PAGE_CHUNKS as u64;
    assert!(first < chunks_of(disk_bytes), "page {page} of {disk_bytes} bytes");
    (chunks_of(disk_bytes) - first).min(PAGE_CHUNKS as u64) as usize
}

/// Pages of a disk of this size.
#[must_use]
pub fn pages_of(disk_bytes: u64) -> u64 {
    disk_bytes.div_ceil(PAGE_BYTES)
}
