//! Who may write a shard, and when a write is complete. Pure: `step` in, effects out.
//!
//! Two roles. [`Writer`] owns one shard at the one daemon where its VDI is open: it numbers writes, sends each to
//! every replica at once, completes it at its quorum, and brings replicas that fell behind up to date.
//! [`DiskNode`] is the replica side of every shard on one disk: it holds the promises (fencing tokens), refuses
//! who is out of date, and owns the disk's log store. `message.rs` is what they say to each other; whether a
//! thread, a socket or the simulator carries it is nobody's business here.

mod log_store;
mod message;
mod node;
mod record;
mod writer;

pub use message::{FromReplica, Refusal, RepairContent, ReplicaReply, ReplicaRequest, ToReplica};
pub use node::{DiskNode, LogStore, NodeEffect, NodeEvent, RECORD_BYTES_MAX};
pub use record::{EpochEnd, ShardRecord};
pub use writer::{
    LEASE, ShardError, ShardOp, ShardReply, Sharing, TAKE_OVER_WAIT, Writer, WriterEffect, WriterEvent,
    WriterNotice, WriterPhase, WriterStatus,
};
