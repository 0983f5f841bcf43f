//! Figures for people.

use std::collections::BTreeMap;

use types::{DiskId, Payload};

use crate::VdiStatus;
use crate::vdi::Vdi;

impl<B: Payload> Vdi<B> {
    /// Figures over all shards; walks them, so not for every request.
    #[must_use]
    pub fn status(&self) -> VdiStatus {
        let mut disks: BTreeMap<DiskId, (u32, u32)> = BTreeMap::new();
        let mut status = VdiStatus {
            shards: self.shards.len() as u32,
            in_flight: self.requests.len() + self.queue.len(),
            ..VdiStatus::default()
        };
        for shard in &self.shards {
            let replicas = match &shard.writer {
                Some(writer) => {
                    let writer = writer.status();
                    status.shards_waiting += u32::from(writer.is_waiting || writer.reads_wait);
                    let is_flushing = !writer.is_waiting && !shard.flushes.is_empty();
                    status.shards_flushing += u32::from(is_flushing);
                    status.resync_leaves_left += writer.resync_leaves_left;
                    writer.replicas
                }
                None => {
                    let record = &shard.record;
                    let in_sync = |disk: &DiskId| (*disk, record.in_sync.contains(disk));
                    record.replicas.iter().map(in_sync).collect()
                }
            };
            status.shards_whole += u32::from(replicas.iter().all(|(_, is_in_sync)| *is_in_sync));
            for (disk, is_in_sync) in replicas {
                let counts = disks.entry(disk).or_default();
                counts.0 += 1;
                counts.1 += u32::from(is_in_sync);
            }
        }
        status.disks = disks
            .into_iter()
            .map(|(disk, (placed, in_sync))| (disk, placed, in_sync))
            .collect();
        status
    }
}
