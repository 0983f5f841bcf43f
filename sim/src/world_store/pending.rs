//! Requests under way, with what an answer must be held against.

use types::{LayerId, LeafNo, Seq, ShardId};

pub(super) enum Pending {
    Write {
        shard: ShardId,
        seq: Seq,
    },
    Read {
        shard: ShardId,
        layer: LayerId,
        block: u32,
        count: u32,
        floor: Seq,
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
    Versions {
        shard: ShardId,
        layer: LayerId,
        leaf: LeafNo,
        /// What was issued by then: later writes may be done first and be seen or not.
        issued: Seq,
    },
    Leaves {
        shard: ShardId,
        layer: LayerId,
        newer_than: Seq,
        issued: Seq,
    },
}

impl Pending {
    pub(super) fn shard(&self) -> Option<ShardId> {
        match self {
            Pending::Write { shard, .. }
            | Pending::Read { shard, .. }
            | Pending::Record { shard, .. }
            | Pending::Drop { shard }
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
            Pending::Versions { .. } => "versions",
            Pending::Leaves { .. } => "leaves",
        }
    }
}
