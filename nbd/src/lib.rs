//! An NBD server for anything that implements [`Export`]: fixed newstyle, structured replies, block status.
//!
//! ```text
//!  Server ──accepts──▶ connection ──▶ handshake (pure) ──▶ reader ─▶ request (pure) ─▶ Export
//!   listen                                                 writer ◀─ reply   (pure) ◀──┘
//! ```
//!
//! Names and section titles quoted in comments are those of the protocol's specification, `doc/proto.md` of
//! the NetworkBlockDevice project. Spoken: all commands but CACHE and RESIZE, which are not advertised; the
//! context `base:allocation`; no extended headers, no TLS (where it would go: `handshake.rs`).
//!
//! Every connection may hold [`Config::requests_max`] requests and [`Config::bytes_max`] bytes of their
//! content, and there are at most [`Config::connections_max`] connections: the product is the memory that
//! clients can make the server use. An idle connection is two tasks that wait for its socket.

mod connection;
mod export;
#[doc(hidden)]
pub mod fuzz;
mod handshake;
mod listen;
mod proto;
mod reply;
mod request;
mod server;

pub use export::{Export, ExportError, ExportInfo, Exports, Extent, NameError, Part};
pub use listen::{Address, BindError};
pub use server::{Config, Server};
