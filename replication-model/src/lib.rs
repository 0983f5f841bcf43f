//! Every state of small worlds around the real [`replication::Writer`] and [`replication::DiskNode`].
//!
//! A scenario (`scenarios.rs`) is a shard, what the guests of two or three writers ask of it, and a budget of faults.
//! [`model::World`] hands all that may happen next to stateright, which searches every order of it to the end. What
//! is *not* explored is in docs/model.md.

pub mod map_store;
pub mod model;
pub mod oracle;
pub mod scenarios;
mod sealed;
pub mod search;
pub mod setup;
pub mod value;
pub mod world;
