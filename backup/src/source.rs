//! What is backed up, and what is restored to.

use std::future::Future;

use bytes::Bytes;

use crate::error::Error;

/// What a run of bytes holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// Something that has to be read.
    Data,
    /// Zeros: never written, trimmed, or written as zeros.
    Zeros,
}

/// A run of bytes of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// The first byte.
    pub offset: u64,
    /// How many; never 0.
    pub bytes: u64,
    /// What they hold.
    pub what: What,
}

/// A disk that stands still: a snapshot, a file that nobody writes.
///
/// An implementor owes that every read of a range gives the same bytes while it lives. It may assume that extents are
/// asked for from the front to the back and that several reads are under way at once.
pub trait Source: Send + Sync {
    /// Size, a multiple of the sector.
    fn bytes(&self) -> u64;

    /// The sector, a power of two from 512 on.
    fn sector_bytes(&self) -> u32;

    /// Whether [`extents`](Self::extents) tells what changed since the backup that is given as the parent. If not, it
    /// tells all that there is.
    fn is_since_parent(&self) -> bool;

    /// Some of the extents that end behind `from`, ascending and apart, at least one if there is any. What lies between
    /// them is as in the parent; without a parent it is zeros.
    fn extents(&self, from: u64) -> impl Future<Output = Result<Vec<Extent>, Error>> + Send;

    /// Exactly these bytes.
    fn read(&self, offset: u64, bytes: usize) -> impl Future<Output = Result<Bytes, Error>> + Send;

    /// Everything was read: fails if it is known that the disk did not stand still.
    fn finish(&self) -> impl Future<Output = Result<(), Error>> + Send;
}

/// A disk that is being restored, on which nobody looks yet.
///
/// An implementor may assume that no byte is written twice and that several writes are under way at once.
pub trait Sink: Send + Sync {
    /// Whether it reads as zeros where nothing was written: then zeros are not written.
    fn is_zeroed(&self) -> bool;

    /// Writes.
    fn write(&self, offset: u64, data: Bytes) -> impl Future<Output = Result<(), Error>> + Send;

    /// Makes these bytes zeros.
    fn zero(&self, offset: u64, bytes: u64) -> impl Future<Output = Result<(), Error>> + Send;

    /// Everything was written: it is durable when this returns.
    fn finish(&self) -> impl Future<Output = Result<(), Error>> + Send;
}
