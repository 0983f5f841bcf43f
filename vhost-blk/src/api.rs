//! The seam between a vhost-user device and the data plane that serves it.
//!
//! ```text
//!  guest ── socket ──▶ Server (protocol thread)
//!                        │ Plane::start_ring(Ring)      a ring may run: memory, addresses, enabled
//!                        │ Plane::stop_ring(RingId)     let go of it; the protocol thread waits for its drop
//!                        ▼
//!  guest ── ring ────▶ Ring (on the data-plane thread) ── RingRequest ──▶ VDI ── complete ──▶ Ring
//! ```
//!
//! One turn of the plane for a ring: `ack_kick` and `disable_kicks` when its kick fired, `poll`, hand the requests
//! on, `complete` what is done, `publish` once. Before it sleeps: `enable_kicks`, and poll again if that says so.

use std::fmt;
use std::io;
use std::path::PathBuf;

use types::Payload;
use vdi::Op;

use crate::ring::Ring;

/// The longest read or write of one request; [`vdi::Op`] takes no longer ones.
pub const TRANSFER_BYTES_MAX: u64 = 32 << 20;

/// Bytes that a guest's GET_ID request is answered with.
pub const SERIAL_BYTES: usize = 20;

/// Names a device among all that the plane serves; the caller chooses (a VDI's number, say).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceId(pub u64);

/// One life of one queue. A stopped ring that starts again is another ring: `generation` is never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RingId {
    /// The device.
    pub device: DeviceId,
    /// Which of its queues.
    pub queue: u16,
    /// Counts the starts of all rings of the process.
    pub generation: u64,
}

impl fmt::Display for RingId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "device {} queue {} #{}",
            self.device.0, self.queue, self.generation
        )
    }
}

/// Names a request of a [`Ring`] until it is completed; used again afterwards. Below the queue's size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tag(pub u16);

/// What a device looks like to its guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceConfig {
    /// Capacity, a multiple of the sector.
    pub bytes: u64,
    /// Logical sector: 512 or 4096 bytes.
    pub sector_bytes: u32,
    /// Physical block: a power of two of at least the sector; told to the guest as its topology.
    pub physical_block_bytes: u32,
    /// What the guest had best issue at once, in bytes; 0 says nothing about it.
    pub optimal_io_bytes: u32,
    /// Answer to GET_ID: at most 20 bytes of it are used.
    pub serial: String,
    /// Request queues, 1 to [`QUEUES_MAX`].
    pub queues: u16,
    /// Descriptors of a queue as frontends are expected to set it up, a power of two from 4 to [`QUEUE_SIZE_MAX`]: what
    /// the guest is told of segments follows from it. The protocol has no word for it, so any size up to
    /// [`QUEUE_SIZE_MAX`] is served. QEMU and Cloud Hypervisor use 128 unless told otherwise.
    pub queue_size: u16,
    /// Refuse everything that changes the disk.
    pub is_read_only: bool,
    /// The longest DISCARD in bytes; 0 offers none.
    pub discard_bytes_max: u64,
    /// The granularity at which a DISCARD frees space, in bytes.
    pub discard_granularity_bytes: u32,
    /// The longest WRITE_ZEROES in bytes; 0 offers none.
    pub write_zeroes_bytes_max: u64,
}

/// The most queues of a device.
pub const QUEUES_MAX: u16 = 64;

/// The most descriptors of a queue.
pub const QUEUE_SIZE_MAX: u16 = 1024;

impl DeviceConfig {
    /// A writable device with what suits a VDI of 4 KiB blocks and 1 MiB leaves.
    #[must_use]
    pub fn new(bytes: u64, sector_bytes: u32) -> DeviceConfig {
        DeviceConfig {
            bytes,
            sector_bytes,
            physical_block_bytes: 4096,
            optimal_io_bytes: 1 << 20,
            serial: String::new(),
            queues: 1,
            queue_size: 128,
            is_read_only: false,
            discard_bytes_max: 1 << 30,
            discard_granularity_bytes: 4096,
            write_zeroes_bytes_max: 1 << 30,
        }
    }

    /// Checks what the fields' comments demand.
    ///
    /// # Errors
    /// [`VhostError::Config`] with the first rule that is broken.
    pub fn check(&self) -> Result<(), VhostError> {
        let rules = [
            (
                self.sector_bytes == 512 || self.sector_bytes == 4096,
                "the sector is 512 or 4096 bytes",
            ),
            (
                self.bytes.is_multiple_of(u64::from(self.sector_bytes.max(1))),
                "the capacity is whole sectors",
            ),
            (
                self.physical_block_bytes.is_power_of_two()
                    && self.physical_block_bytes >= self.sector_bytes
                    && self.physical_block_bytes <= 1 << 20,
                "the physical block is a power of two between the sector and 1 MiB",
            ),
            (
                (1..=QUEUES_MAX).contains(&self.queues),
                "there are 1 to 64 queues",
            ),
            (
                self.queue_size.is_power_of_two() && (4..=QUEUE_SIZE_MAX).contains(&self.queue_size),
                "the queue size is a power of two from 4 to 1024",
            ),
        ];
        match rules.iter().find(|(holds, _)| !holds) {
            None => Ok(()),
            Some((_, rule)) => Err(VhostError::Config(rule)),
        }
    }
}

/// The data plane, as the protocol threads of all devices see it. Calls come in order for one ring, and from
/// several threads for several devices.
///
/// An implementor owes: to poll a ring once as soon as it gets it (the kick may have come before); after
/// [`Plane::stop_ring`], to drop the [`Ring`] within bounded time, and to call nothing on it afterwards.
/// It may finish requests first, and should for a moment: a guest that resets its device expects old writes not to
/// land later. But it may drop the ring with requests in flight whenever it likes: completions are published in
/// ring order, so the frontend resumes at the first unpublished request and nothing is lost.
///
/// It may assume: no other thread touches a ring's guest memory structures while the [`Ring`] lives, and the guest's
/// memory stays mapped as long.
pub trait Plane: Send + Sync + 'static {
    /// A ring is ready: it belongs to the plane until it is dropped. Must not block.
    fn start_ring(&self, ring: Ring);

    /// The ring must be dropped: its guest pauses, resets, remaps memory or is gone. Must not block; the caller
    /// waits for the drop itself.
    fn stop_ring(&self, ring: RingId);
}

/// Where the content of guests' writes is copied to.
///
/// An implementor owes: a buffer of exactly the length asked for, filled by `fill` before it is returned, or `None`
/// without having called `fill`; the request then stays in the ring until a later [`Ring::poll`].
pub trait BufferSource {
    /// What a write's data comes in.
    type Buffer: Payload;

    /// A buffer of `length` bytes (a multiple of the sector, at most [`TRANSFER_BYTES_MAX`]), filled by `fill`.
    fn filled(&mut self, length: usize, fill: impl FnOnce(&mut [u8])) -> Option<Self::Buffer>;
}

/// A guest's request, validated: whole sectors inside the disk, and a stable copy of what is to be written.
#[derive(Clone, Debug)]
pub struct RingRequest<B> {
    /// For [`Ring::complete`].
    pub tag: Tag,
    /// What to do.
    pub op: Op<B>,
}

/// What a [`Ring::poll`] left behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Polled {
    /// The ring was empty a moment ago.
    Empty,
    /// The budget ran out: poll again without waiting for a kick.
    More,
    /// [`BufferSource`] had no buffer: poll again when one is free.
    NoBuffer,
}

/// Why a device cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum VhostError {
    /// The configuration contradicts itself.
    #[error("device configuration: {0}")]
    Config(&'static str),
    /// Somebody answers at the socket's path.
    #[error("{0} belongs to a live server")]
    SocketInUse(PathBuf),
    /// The path exists and is no socket.
    #[error("{0} is not a socket")]
    NotASocket(PathBuf),
    /// The operating system refused something.
    #[error("{action} {path}: {source}")]
    Io {
        /// What was being done.
        action: &'static str,
        /// To which file.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
}
