//! The world, simulated: disks, index stores, links and clocks that misbehave, all from one seed.
//!
//! Same seed, same run, on every machine: no clock, no thread, no map with a random order in here. The parts
//! implement the traits of `edge`; the worlds put the real `store`, `replication` and `vdi` code on top of
//! them, play guest and fate, and hold an oracle against every answer.

mod boot;
pub mod cleaning;
pub mod content;
mod disk;
mod guest;
mod host;
mod kv;
mod medium;
mod network;
mod past;
mod rng;
pub mod runner;
mod store_oracle;
pub mod trace;
mod vdi_oracle;
pub mod world_cluster;
pub mod world_store;
pub mod world_vdi;

pub use disk::{Damage, Faults, LateWrites, SimDisk};
pub use kv::SimKv;
pub use medium::SECTOR_BYTES;
pub use network::{SimClock, SimNetwork};
pub use rng::{Rng, mix};
