//! A disk as the log store uses it: positioned reads and writes of whole 4 KiB blocks, and a barrier.

use std::fmt;

use types::{BLOCK_BYTES, Payload};

/// Names an operation until its completion; unique per disk while the operation is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct IoId(pub u64);

/// One 4 KiB block on the heap at an address that direct I/O accepts.
#[derive(Clone, PartialEq, Eq)]
#[repr(C, align(4096))]
pub struct AlignedBlock(pub [u8; BLOCK_BYTES as usize]);

impl AlignedBlock {
    /// A block of zeros.
    #[must_use]
    pub fn zeroed() -> Box<AlignedBlock> {
        Box::new(AlignedBlock([0; BLOCK_BYTES as usize]))
    }
}

impl fmt::Debug for AlignedBlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AlignedBlock(crc {:08x})", types::crc32c(&self.0))
    }
}

/// What a core asks of a disk.
#[derive(Clone, Debug)]
pub enum DiskOp<B> {
    /// Writes `header` and then every part of `data` contiguously from `offset`. All lengths are whole blocks
    /// except that parts may start at any multiple of 512 B in memory.
    Write {
        /// Bytes from the start of the disk, a multiple of 4 KiB.
        offset: u64,
        /// The first block of the write.
        header: Box<AlignedBlock>,
        /// What follows it.
        data: Vec<B>,
    },
    /// Reads `bytes` from `offset` into one buffer.
    Read {
        /// Bytes from the start of the disk, a multiple of 4 KiB.
        offset: u64,
        /// A multiple of 4 KiB.
        bytes: u32,
    },
    /// Makes every write that had completed when this was submitted durable (`fdatasync`).
    Sync,
}

/// What an operation brought.
#[derive(Clone, Debug)]
pub enum DiskOutcome<B> {
    /// All of a [`DiskOp::Write`] is on the device (perhaps in its volatile cache). What it was made of comes back,
    /// to be used again.
    Written {
        /// As it was submitted.
        header: Box<AlignedBlock>,
        /// As it was submitted.
        data: Vec<B>,
    },
    /// All of a [`DiskOp::Read`].
    Read(B),
    /// A [`DiskOp::Sync`] finished.
    Synced,
}

/// Why an operation failed. A short transfer is a failure: implementations retry the rest first.
#[derive(Clone, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum DiskError {
    /// The operating system's word.
    #[error("{operation} of {bytes} B at {offset}: {reason} (errno {errno})")]
    Io {
        /// `read`, `write` or `sync`.
        operation: &'static str,
        /// Where.
        offset: u64,
        /// How much was asked for.
        bytes: u64,
        /// The raw error number.
        errno: i32,
        /// The same in words.
        reason: String,
    },
    /// The device ended before the transfer did.
    #[error("{operation} at {offset}: {done} of {wanted} B")]
    Short {
        /// `read` or `write`.
        operation: &'static str,
        /// Where.
        offset: u64,
        /// Bytes moved.
        done: u64,
        /// Bytes asked for.
        wanted: u64,
    },
}

/// The end of an operation.
#[derive(Clone, Debug)]
pub struct Completion<B> {
    /// Which one.
    pub id: IoId,
    /// How it ended.
    pub result: Result<DiskOutcome<B>, DiskError>,
}

/// A disk in submit and poll form; owned buffers travel with the operation and come back with its completion.
///
/// An implementor owes: every submitted operation completes exactly once; operations under way at the same time
/// may be performed in any order; a full queue makes `submit` hold the operation, never fail it. It may assume
/// offsets and lengths are aligned and inside the disk (the store asserts so).
pub trait Disk {
    /// The buffers this disk fills.
    type Buffer: Payload;

    /// Takes an operation; it starts at the latest at the next `poll`.
    fn submit(&mut self, id: IoId, operation: DiskOp<Self::Buffer>);

    /// Appends the completions that have arrived; never waits.
    fn poll(&mut self, completions: &mut Vec<Completion<Self::Buffer>>);
}

/// A disk in blocking form: formatting, recovery at start, offline inspection. Whole blocks only.
pub trait BlockFile {
    /// Capacity in bytes.
    fn bytes(&self) -> u64;

    /// Fills `buffer` from `offset`.
    ///
    /// # Errors
    /// The device's error, or that it ended early.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DiskError>;

    /// Writes `buffer` at `offset`.
    ///
    /// # Errors
    /// The device's error, or that it ended early.
    fn write_at(&mut self, offset: u64, buffer: &[u8]) -> Result<(), DiskError>;

    /// Makes what was written durable. An error is final: the pages may be lost, and a second call may lie.
    ///
    /// # Errors
    /// The device's error.
    fn sync(&mut self) -> Result<(), DiskError>;
}
