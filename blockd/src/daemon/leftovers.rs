//! Replicas that a disk brings along when it is opened and that do not belong there: dropped where the records say so,
//! kept and reported where they say nothing.

use std::collections::BTreeMap;

use control::recover::notes::NOTES;
use control::{Claim, Severity};
use replication::{ReplicaRequest, ShardRecord, ToReplica};
use store::ShardSummary;
use types::{DiskId, Epoch, RequestId, ShardId, Token, VdiId};

use super::Daemon;
use crate::plane::Command;

impl Daemon {
    /// Shards that were deleted or moved while the disk was away give their space back. What the records never heard of
    /// may be all that is left after they were lost: it stays. Returns how many replicas that are.
    pub(super) fn drop_leftovers(&self, disk: DiskId, plane: usize, held: &[ShardSummary]) -> u32 {
        let mut kept: BTreeMap<VdiId, u32> = BTreeMap::new();
        for summary in held.iter().filter(|summary| summary.shard.vdi != NOTES) {
            let epoch = ShardRecord::decode(&summary.record).map_or(Epoch(0), |record| record.epoch);
            match self.records(|control| control.claim(summary.shard, disk, epoch)) {
                Ok(Claim::Placed) => {}
                Ok(Claim::NotPlaced) => self.drop_replica(disk, plane, summary.shard),
                Ok(Claim::Unknown) => *kept.entry(summary.shard.vdi).or_default() += 1,
                // Asked again when it is opened next.
                Err(error) => {
                    tracing::warn!(%disk, shard = %summary.shard, "whether it belongs here: {error}");
                }
            }
        }
        if !kept.is_empty() {
            let vdis: Vec<String> = kept
                .iter()
                .map(|(vdi, count)| format!("{vdi} ({count})"))
                .collect();
            let message = format!(
                "disk {disk} holds shards of VDIs that the records do not know: {}; they are kept (if the records are old: `weft pool recover`)",
                vdis.join(", ")
            );
            self.events.add(Severity::Critical, message);
        }
        kept.values().sum()
    }

    fn drop_replica(&self, disk: DiskId, plane: usize, shard: ShardId) {
        // No writer holds a higher token, and none can reach the disk yet.
        let token = Token {
            epoch: Epoch(u64::MAX),
            incarnation: self.incarnation,
        };
        let fence = ReplicaRequest::Fence { record: Vec::new() };
        for (id, request) in [(0, fence), (1, ReplicaRequest::Drop)] {
            let message = ToReplica {
                shard,
                token,
                id: RequestId(id),
                request,
            };
            self.planes[plane].send(Command::ToDisk(disk, message));
        }
        self.events.add(
            Severity::Info,
            format!("disk {disk}: shard {shard} is no longer placed here; dropped"),
        );
    }
}
