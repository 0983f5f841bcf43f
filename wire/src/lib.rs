//! What hosts say to each other: frames over a byte stream.
//!
//! ```text
//!  host with the VDI                                  host with the replica's disk
//!   Hello ───────────────────────────────────────────▶ check ── Refused, and the end
//!         ◀─────────────────────────────────────────── Welcome
//!         ◀─────────────────────────────── DiskUp {channel, disk}, for each disk
//!   Request {channel, ToReplica} ────────────────────▶ the disk's node
//!         ◀──────────────────────── Reply {channel, …} (or DiskDown {channel}, for all that is not answered)
//! ```
//!
//! Pure: [`Outgoing`] turns messages into bytes and buffers to be sent, [`Incoming`] turns what was received into
//! frames, in memory that its driver gives it; sockets, clocks and threads are the driver's. `docs/wire.md` is the
//! layout of every byte, and its example is a test here.
//!
//! What comes from the other end may be anything. It is checked here, once: lengths before anything is kept, the
//! checksum before anything is believed, every number before it can reach an assertion of the cores.

mod bytes;
mod error;
mod frame;
#[doc(hidden)]
pub mod fuzz;
mod hello;
mod incoming;
mod outgoing;
mod reply;
mod request;

pub use error::WireError;
pub use frame::{
    BLOCKS_MAX, Channel, HEAD_BYTES_MAX, HEADER_BYTES, PAYLOAD_ALIGN, PAYLOAD_BYTES_MAX, VERSION,
};
pub use hello::{Hello, Identity, Refused, RefusedCode, Welcome};
pub use incoming::{Frame, Incoming, LARGE_SPACE, Landing, SMALL_SPACE};
pub use outgoing::{Gather, Outgoing};
pub use reply::Reply;
