//! Requests under way, with what an answer must be held against.

use types::{LayerId, LeafNo, Lineage, Seq, ShardId};

pub(super) enum Pending {
    Write {
        shard: ShardId,
        seq: Seq,
    },
    Read {
        shard: ShardId,
        lineage: Lineage,
        block: u32,
        count: u32,
        floors: Vec<Floor>,
    },
    Flush {
        shard: ShardId,
        life: u64,
        target: Seq,
    },
    Record {
        shard: ShardId,
        record: Vec<u8>,
    },
    Drop {
        shard: ShardId,
    },
    Layers {
        shard: ShardId,
        revision: usize,
    },
    Revision {
        shard: ShardId,
    },
    Void {
        shard: ShardId,
    },
    Versions {
        shard: ShardId,
        layer: LayerId,
        leaf: LeafNo,
        /// What was issued by then: later writes may be done first and be seen or not.
        issued: Seq,
    },
    Leaves {
        shard: ShardId,
        newer_than: Seq,
        issued: Seq,
    },
}

/// What was completed of a shard when a read was issued.
#[derive(Clone, Copy)]
pub(super) struct Floor {
    pub shard: ShardId,
    /// Which stay of the shard on the disk, if it was there.
    pub life: Option<u64>,
    pub completed: Seq,
    /// Of its layers.
    pub revision: usize,
}

impl Pending {
    /// Whether the answer depends on what this shard holds.
    pub(super) fn touches(&self, shard: ShardId) -> bool {
        match self {
            Pending::Read { floors, .. } => floors.iter().any(|floor| floor.shard == shard),
            other => other.shard() == Some(shard),
        }
    }

    pub(super) fn shard(&self) -> Option<ShardId> {
        match self {
            Pending::Write { shard, .. }
            | Pending::Read { shard, .. }
            | Pending::Record { shard, .. }
            | Pending::Drop { shard }
            | Pending::Layers { shard, .. }
            | Pending::Revision { shard }
            | Pending::Void { shard }
            | Pending::Versions { shard, .. }
            | Pending::Leaves { shard, .. } => Some(*shard),
            Pending::Flush { .. } => None,
        }
    }

    pub(super) fn name(&self) -> &'static str {
        match self {
            Pending::Write { .. } => "write",
            Pending::Read { .. } => "read",
            Pending::Flush { .. } => "flush",
            Pending::Record { .. } => "record",
            Pending::Drop { .. } => "drop",
            Pending::Layers { .. } => "change of layers",
            Pending::Revision { .. } => "revision",
            Pending::Void { .. } => "void",
            Pending::Versions { .. } => "versions",
            Pending::Leaves { .. } => "leaves",
        }
    }
}
