//! Replicas that a disk brings along when it is opened and that do not belong there: dropped where the records say so,
//! kept and reported where they say nothing, until somebody who was told what is lost by it has them dropped.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::time::{Duration, Instant};

use control::recover::notes::NOTES;
use control::{ApiError, ApiResult, Claim, LeftoverInfo, Severity};
use replication::{ReplicaRequest, ShardRecord, ToReplica};
use store::ShardSummary;
use types::{BLOCK_BYTES, ByteSize, DiskId, Epoch, RequestId, ShardId, Token, VdiId};

use super::Daemon;
use crate::plane::Command;

/// How long a disk may take to drop what it was told to.
const DROPPED_WITHIN: Duration = Duration::from_secs(20);
const LOOK_AGAIN: Duration = Duration::from_millis(20);

fn in_words(info: &LeftoverInfo) -> String {
    let name = match info.name.as_str() {
        "" => format!("VDI {}", info.vdi),
        name => format!("VDI {name} ({})", info.vdi),
    };
    format!(
        "{} shards of {name} with {} of data",
        info.shards,
        ByteSize(info.bytes)
    )
}

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

    /// What is kept on a disk of this host, by VDI, with the shards.
    pub(super) async fn kept_on(&self, disk: DiskId) -> ApiResult<Vec<(LeftoverInfo, Vec<ShardId>)>> {
        let record = self.require_disk(disk)?;
        if !self.is_mine(&record) {
            let host = match record.host {
                Some(host) => self.host_name(host)?,
                None => "of another pool".to_owned(),
            };
            let message = format!("disk {disk} is in host {host}");
            return Err(ApiError::conflict(message, format!("ask on host {host}")));
        }
        if !self.is_up(disk) {
            let message = format!("disk {disk} ({}) is not up", record.path.display());
            return Err(ApiError::unavailable(message, "see `weft disk list`"));
        }
        let figures = self.all_figures().await?;
        let held = figures.disks.get(&disk).map_or(&[][..], |(_, shards)| shards);
        let mut kept: BTreeMap<VdiId, (LeftoverInfo, Vec<ShardId>)> = BTreeMap::new();
        for summary in held.iter().filter(|summary| summary.shard.vdi != NOTES) {
            let (shard, vdi) = (summary.shard, summary.shard.vdi);
            let epoch = ShardRecord::decode(&summary.record).map_or(Epoch(0), |record| record.epoch);
            if self.records(|control| control.claim(shard, disk, epoch))? != Claim::Unknown {
                continue;
            }
            let entry = match kept.entry(vdi) {
                Entry::Occupied(entry) => entry.into_mut(),
                Entry::Vacant(entry) => {
                    let record = self.records(|control| control.vdi(vdi))?;
                    let is_known = record.is_some();
                    let name = record
                        .map(|record| record.name)
                        .or_else(|| self.noted_name(disk, vdi));
                    let info = LeftoverInfo {
                        vdi,
                        name: name.unwrap_or_default(),
                        shards: 0,
                        bytes: 0,
                        is_known,
                    };
                    entry.insert((info, Vec::new()))
                }
            };
            entry.0.shards += 1;
            entry.0.bytes += summary.data_blocks * BLOCK_BYTES;
            entry.1.push(shard);
        }
        Ok(kept.into_values().collect())
    }

    /// Drops what is kept on a disk. Without `force` it says what that is, and nothing happens.
    pub(super) async fn drop_kept(&self, disk: DiskId, force: bool) -> ApiResult<Vec<LeftoverInfo>> {
        let kept = self.kept_on(disk).await?;
        if kept.is_empty() {
            return Ok(Vec::new());
        }
        let what: Vec<String> = kept.iter().map(|(info, _)| in_words(info)).collect();
        let what = what.join(", ");
        if !force {
            let message = format!("disk {disk} keeps what the records do not know: {what}");
            let hint = "--force drops it, and what no other disk has of it is lost; if the records are old, `weft pool recover`";
            return Err(ApiError::needs_force(message, hint));
        }
        let plane = {
            let disks = self.disks.lock().expect("disks");
            disks.get(&disk).map_or(0, |runtime| runtime.plane)
        };
        for (info, shards) in &kept {
            for shard in shards {
                self.drop_replica(disk, plane, *shard);
            }
            if !info.is_known {
                self.drop_note(disk, info.vdi);
            }
        }
        let message = format!("disk {disk}: dropped as asked: {what}");
        self.events.add(Severity::Warning, message);
        self.until_dropped(disk, &kept).await?;
        if let Some(runtime) = self.disks.lock().expect("disks").get_mut(&disk) {
            runtime.leftovers = 0;
        }
        Ok(kept.into_iter().map(|(info, _)| info).collect())
    }

    async fn until_dropped(&self, disk: DiskId, kept: &[(LeftoverInfo, Vec<ShardId>)]) -> ApiResult<()> {
        let began = Instant::now();
        loop {
            let figures = self.all_figures().await?;
            let held = figures.disks.get(&disk).map_or(&[][..], |(_, shards)| shards);
            let is_kept = |shard: &ShardId| kept.iter().any(|(_, shards)| shards.contains(shard));
            if !held.iter().any(|summary| is_kept(&summary.shard)) {
                return Ok(());
            }
            if began.elapsed() > DROPPED_WITHIN {
                let message = format!("disk {disk} has not dropped everything yet");
                return Err(ApiError::unavailable(message, "look again in a while"));
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
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
