//! Measures Weft beside its peers: the same load, from the same client, on the same file system, in the same run.
//!
//! ```text
//!  runner ── job by job, target by target, in seeded random order, R times
//!    ├─ raw      fio (io_uring, O_DIRECT) on a second half of the peer's file: what the device gives
//!    ├─ qsd      client ── vhost-user-blk ── qemu-storage-daemon ── preallocated, fully written file
//!    └─ weft-R   client ── vhost-user-blk ── blockd ── R disks, each a preallocated, fully written file
//! ```
//! The client is the `blkio` crate's virtio-blk driver, so that no side is measured with a client of its own.
//! Every 4 KiB it writes carries its own offset, and every 4 KiB it reads is checked for it: a target that is
//! fast because it does not do the work fails the run.
//!
//! Absent on purpose: sleeping for a fixed time to let something become ready, and any figure that is not a
//! measurement of this run.

pub mod ceph;
pub mod client;
pub mod cluster;
pub mod cpu;
pub mod interrupt;
pub mod job;
pub mod machine;
pub mod permutation;
pub mod picture;
pub mod prepare;
pub mod priority;
pub mod process;
pub mod random;
pub mod report;
pub mod runner;
pub mod study;
pub mod syscalls;
pub mod target;
pub mod timeline;
pub mod wanted;
pub mod weft;
pub mod zipf;
