//! Everything in Weft that reads bytes of unknown origin, as functions of arbitrary bytes.
//!
//! ```text
//!  fuzz/corpus/TARGET/*  ──▶ cargo test          every kept input, then some thousands of changes to them
//!                        ──▶ cargo xtask fuzz    libFuzzer, guided by coverage, for as long as one likes
//! ```
//!
//! A function returns for every input; what must not be is a panic. Those that need a crate's insides live in that
//! crate's `fuzz` module; those that need its public face only live here. An input that once failed stays in the
//! corpus for ever.

mod bodies;
#[allow(
    missing_docs,
    dead_code,
    reason = "the daemon's own file: it is a program, and programs export nothing"
)]
#[path = "../../blockd/src/cluster_config.rs"]
mod cluster_config;
#[allow(
    missing_docs,
    dead_code,
    reason = "the daemon's own file: it is a program, and programs export nothing"
)]
#[path = "../../blockd/src/config.rs"]
mod config;
pub mod mutate;
mod records;

/// A target: arbitrary bytes in, nothing out, no panic.
pub type Target = fn(&[u8]);

/// All targets, each with the longest input that is worth trying. A folder of the same name holds its corpus.
pub const TARGETS: &[(&str, Target, usize)] = &[
    // What strangers on a socket say.
    ("nbd_handshake", nbd::fuzz::handshake, 1024),
    ("nbd_request", nbd::fuzz::request, 512),
    ("vhost_ring", vhost_blk::fuzz::ring, 2048),
    ("wire_stream", wire::fuzz::stream, 9000),
    ("rest_body", bodies::rest_body, 1024),
    // What lies on disks.
    ("batch_header", store::fuzz::batch_header, 4096),
    ("segment_header", store::fuzz::segment_header, 128),
    ("superblock", store::fuzz::superblock, 512),
    ("index_value", store::fuzz::index_value, 2048),
    ("shard_record", records::shard_record, 1200),
    // What people write.
    ("config_file", bodies::config_file, 1024),
    ("size", bodies::size, 80),
    ("snapshot_reference", bodies::snapshot_reference, 200),
    ("snapshot_schedule", bodies::snapshot_schedule, 140),
];

/// Runs one target on one input.
///
/// # Panics
/// When there is no such target; when the target found a fault.
pub fn run(name: &str, input: &[u8]) {
    let found = TARGETS.iter().find(|(known, _, _)| *known == name);
    let (_, target, _) = found.unwrap_or_else(|| panic!("no fuzz target {name}"));
    target(input);
}
