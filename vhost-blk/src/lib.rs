//! vhost-user-blk: a guest's request queues become [`vdi::Op`]s on the data plane's own threads.
//!
//! The `vhost-user-backend` crate speaks the protocol (negotiation, memory maps, ring addresses) on a thread of its
//! own per connection. It would also wait for kicks and call back per queue; it is told that no thread has any queue,
//! and the [`Ring`]s go to a [`Plane`] instead, which polls them among its other work. See `api.rs`.

mod api;
mod bus_guard;
mod chain;
mod device;
#[doc(hidden)]
pub mod fuzz;
mod relay;
mod request;
mod ring;
mod server;
mod session;
mod split;
mod vring;

#[cfg(test)]
mod ring_tests;

pub use api::{
    BufferSource, DeviceConfig, DeviceId, Plane, Polled, QUEUE_SIZE_MAX, QUEUES_MAX, RingId, RingRequest,
    SERIAL_BYTES, TRANSFER_BYTES_MAX, Tag, VhostError,
};
pub use ring::Ring;
pub use server::Server;
