//! The control store's record of one shard: who its replicas are and which of them hold everything.

use serde::{Deserialize, Serialize};
use types::{DiskId, Epoch, Seq, ShardId};

/// Where a past epoch ended: what a replica holds of that epoch above `end` was never chosen and is resynced away.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EpochEnd {
    /// The epoch.
    pub epoch: Epoch,
    /// The last seq of it that counts.
    pub end: Seq,
}

/// Changed only by compare-and-swap on `epoch`, which grows by one with every change.
///
/// Invariants, asserted where it is built: `in_sync` is a subset of `replicas`, not empty once the shard has
/// taken a write; with three replicas `in_sync` never has fewer than two members (writes wait instead).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardRecord {
    /// Which shard.
    pub shard: ShardId,
    /// Grows with every change of this record.
    pub epoch: Epoch,
    /// The disks that hold a replica, each on another failure domain where there are enough. One to three.
    pub replicas: Vec<DiskId>,
    /// Those that hold every completed write, up to what the last fence round finds missing.
    pub in_sync: Vec<DiskId>,
    /// Where past epochs ended, oldest first, kept while a replica that knows no later epoch exists; at most 64.
    pub ended: Vec<EpochEnd>,
}

impl ShardRecord {
    /// The record of a shard that was never written: every replica is in sync.
    ///
    /// # Panics
    /// Unless there are one to three different replicas: placement's promise.
    #[must_use]
    pub fn new(shard: ShardId, replicas: Vec<DiskId>) -> ShardRecord {
        assert!((1..=3).contains(&replicas.len()), "{} replicas", replicas.len());
        for (i, disk) in replicas.iter().enumerate() {
            assert!(!replicas[..i].contains(disk), "replica twice on {disk}");
        }
        ShardRecord {
            shard,
            epoch: Epoch(1),
            in_sync: replicas.clone(),
            replicas,
            ended: Vec::new(),
        }
    }

    /// Acks that complete a write: 2 of 3; all that are in sync of 2; 1 of 1.
    #[must_use]
    pub fn write_quorum(&self) -> usize {
        match self.replicas.len() {
            3 => 2,
            2 => self.in_sync.len(),
            _ => 1,
        }
    }

    /// In-sync replicas that must report before the writer knows every completed write.
    #[must_use]
    pub fn fence_quorum(&self) -> usize {
        self.in_sync.len() + 1 - self.write_quorum().min(self.in_sync.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use types::{ShardNo, VdiId};

    #[test]
    fn fence_and_write_quorums_always_meet() {
        let shard = ShardId {
            vdi: VdiId(1),
            no: ShardNo(0),
        };
        for count in 1..=3u128 {
            let replicas: Vec<DiskId> = (1..=count).map(DiskId).collect();
            let mut record = ShardRecord::new(shard, replicas.clone());
            let least = if count == 3 { 2 } else { 1 };
            for in_sync in least..=replicas.len() {
                record.in_sync = replicas[..in_sync].to_vec();
                assert!(record.fence_quorum() + record.write_quorum() > record.in_sync.len());
                assert!(record.fence_quorum() <= record.in_sync.len());
            }
        }
    }
}
