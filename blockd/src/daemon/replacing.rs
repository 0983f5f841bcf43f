//! Disks that are gone for long: what they held is made anew on other disks, by whoever writes the VDI; and how far the
//! emptying of disks is.
//!
//! ```text
//!  up ──gone──▶ waited for ──replace_after_s──▶ overdue: a few shards at a time, ReplaceDisk
//!   ▲               │                              │
//!   └───is back─────┴──────────────────────────────┘  (what was replaced meanwhile is dropped there)
//! ```
//! Each daemon counts the time by its own clock from when it saw the disk go, and only moves what it writes; the writer's
//! compare-and-swap settles the rest. VDIs that nobody is attached at and whose host is gone as long are taken over by one
//! host, the living one with the lowest id; two that both take themselves for it take over one after the other.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use control::{ApiResult, ControlStore, DiskRecord, DiskState, MoveInfo, Severity};
use replication::ShardRecord;
use types::{DiskId, HostId, ShardId};

use super::Daemon;
use super::removal::Replacement;

/// How often it is looked who is gone.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Shards that this daemon replaces at once: each copies at most one leaf at a time while guests write.
const AT_ONCE: usize = 2;

/// See the module.
#[derive(Default)]
pub(super) struct Replacing {
    gone_disks: BTreeMap<DiskId, Instant>,
    gone_hosts: BTreeMap<HostId, Instant>,
    overdue: BTreeSet<DiskId>,
    /// Shards on their way, and from which disk.
    under_way: BTreeMap<ShardId, DiskId>,
    /// No new one before: the last one's bytes, at the bandwidth of the settings.
    not_before: Option<Instant>,
    emptying: BTreeMap<DiskId, Emptying>,
}

/// A disk that replicas leave, as seen since this daemon noticed.
struct Emptying {
    since: Instant,
    replicas: u32,
}

impl Daemon {
    /// For ever.
    pub(super) fn replace_what_is_gone(self: &Arc<Daemon>) {
        let daemon = Arc::clone(self);
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(LOOK_EVERY).await;
                let _one = daemon.changes.lock().await;
                if let Err(error) = daemon.look_for_overdue().await {
                    tracing::warn!("replacing what is gone: {error}");
                }
            }
        });
    }

    async fn look_for_overdue(&self) -> ApiResult<()> {
        // Of what is not heard nothing is known: neither who is gone nor since when.
        if self.control.health().unreachable.is_some() {
            return Ok(());
        }
        let disks = self.records(ControlStore::disks)?;
        if disks.iter().any(|disk| disk.state == DiskState::Removing) {
            // The last replica may have been moved by another host.
            self.finish_removals().await?;
        }
        self.forget_hosts()?;
        let Some(patience) = self.settings.replace_after else {
            return Ok(());
        };
        let newly = self.count_the_gone(&disks, patience)?;
        for disk in &newly {
            let message = format!(
                "disk {disk} has been gone for {} s: its replicas are made anew on other disks",
                patience.as_secs()
            );
            self.events.add(Severity::Warning, message);
        }
        if !newly.is_empty() {
            self.nothing_moves_to(&newly);
        }
        self.adopt_orphans(patience).await?;
        self.replace_some()
    }

    /// Disks that became overdue now.
    fn count_the_gone(&self, disks: &[DiskRecord], patience: Duration) -> ApiResult<BTreeSet<DiskId>> {
        let elsewhere = self.elsewhere()?;
        let now = Instant::now();
        let mut replacing = self.replacing.lock().expect("replacing");
        let is_gone =
            |disk: &&DiskRecord| disk.state != DiskState::Removing && !self.is_up_anywhere(disk, &elsewhere);
        let gone: BTreeSet<DiskId> = disks.iter().filter(is_gone).map(|disk| disk.id).collect();
        replacing.gone_disks.retain(|disk, _| gone.contains(disk));
        for disk in gone {
            replacing.gone_disks.entry(disk).or_insert(now);
        }
        let is_dead = |host: &HostId| Some(*host) != self.host() && !elsewhere.alive.contains(host);
        replacing.gone_hosts.retain(|host, _| is_dead(host));
        for host in elsewhere.names.keys().filter(|host| is_dead(host)) {
            replacing.gone_hosts.entry(*host).or_insert(now);
        }
        let long = |since: &Instant| now.duration_since(*since) >= patience;
        let overdue: BTreeSet<DiskId> = replacing
            .gone_disks
            .iter()
            .filter(|(_, since)| long(since))
            .map(|(disk, _)| *disk)
            .collect();
        let newly = overdue.difference(&replacing.overdue).copied().collect();
        replacing.overdue = overdue;
        Ok(newly)
    }

    /// VDIs of hosts that are gone for long and at which nobody is attached: somebody has to look after them.
    async fn adopt_orphans(&self, patience: Duration) -> ApiResult<()> {
        let Some(me) = self.host() else {
            return Ok(());
        };
        let gone: BTreeSet<HostId> = {
            let replacing = self.replacing.lock().expect("replacing");
            let long = |since: &Instant| since.elapsed() >= patience;
            replacing
                .gone_hosts
                .iter()
                .filter(|(_, since)| long(since))
                .map(|(host, _)| *host)
                .collect()
        };
        let lowest = self
            .records(ControlStore::alive)?
            .iter()
            .map(|alive| alive.host)
            .min();
        if gone.is_empty() || lowest != Some(me) {
            return Ok(());
        }
        for vdi in self.records(ControlStore::vdis)? {
            let writer = self.records(|control| control.writer(vdi.id))?;
            let is_orphan = writer.is_some_and(|writer| gone.contains(&writer.host));
            if is_orphan && vdi.attachments.is_empty() {
                let name = vdi.name.clone();
                self.write_here(vdi).await?;
                self.events.add(
                    Severity::Info,
                    format!("VDI {name} is looked after by this host now"),
                );
            }
        }
        Ok(())
    }

    fn replace_some(&self) -> ApiResult<()> {
        let mut replacing = self.replacing.lock().expect("replacing");
        if replacing.overdue.is_empty() {
            replacing.under_way.clear();
            return Ok(());
        }
        let overdue = replacing.overdue.clone();
        let mut map = None;
        let written = self.written.lock().expect("written").clone();
        let mut wanted: BTreeMap<ShardId, (ShardRecord, u64)> = BTreeMap::new();
        for vdi in self.records(ControlStore::vdis)? {
            if !written.contains_key(&vdi.id) || vdi.deleting {
                continue;
            }
            let bytes = vdi.shard_bytes.min(vdi.bytes);
            for shard in self.records(|control| control.shards(vdi.id))? {
                // Without a good copy somewhere there is nothing to make another of.
                let has_source = shard.in_sync.iter().any(|disk| !overdue.contains(disk));
                if has_source && shard.replicas.iter().any(|disk| overdue.contains(disk)) {
                    wanted.insert(shard.shard, (shard, bytes));
                }
            }
        }
        replacing.under_way.retain(|shard, old| {
            wanted
                .get(shard)
                .is_some_and(|(record, _)| record.replicas.contains(old))
        });
        for (id, (shard, bytes)) in wanted {
            let is_early = replacing.not_before.is_some_and(|at| Instant::now() < at);
            if replacing.under_way.len() >= AT_ONCE || is_early {
                break;
            }
            if replacing.under_way.contains_key(&id) {
                continue;
            }
            let map = match &mut map {
                Some(map) => map,
                None => map.insert(self.disk_map(&self.placed_bytes()?)?),
            };
            let present: Vec<DiskId> = shard
                .replicas
                .iter()
                .copied()
                .filter(|disk| !overdue.contains(disk))
                .collect();
            let old = shard
                .replicas
                .iter()
                .copied()
                .find(|disk| overdue.contains(disk))
                .expect("just seen");
            // No place now; perhaps a disk is added.
            let Ok(new) = map.replace(id, &present) else {
                continue;
            };
            replacing.under_way.insert(id, old);
            let seconds = bytes as f64 / self.settings.replace_bytes_s as f64;
            replacing.not_before = Some(Instant::now() + Duration::from_secs_f64(seconds));
            let (vdi, new) = (id.vdi, vec![(id.no, new)]);
            self.replace(vec![Replacement { vdi, old, new }]);
        }
        Ok(())
    }

    /// How far the emptying of disks is, for `weft status`.
    pub(super) fn moves(&self) -> ApiResult<Vec<MoveInfo>> {
        let mut left: BTreeMap<DiskId, u32> = BTreeMap::new();
        for vdi in self.records(ControlStore::vdis)? {
            for shard in self.records(|control| control.shards(vdi.id))? {
                for disk in shard.replicas {
                    *left.entry(disk).or_default() += 1;
                }
            }
        }
        let elsewhere = self.elsewhere()?;
        let mut replacing = self.replacing.lock().expect("replacing");
        let overdue = replacing.overdue.clone();
        let disks = self.records(ControlStore::disks)?;
        let leaves = |disk: &&DiskRecord| disk.state == DiskState::Removing || overdue.contains(&disk.id);
        let leaving: BTreeMap<DiskId, &DiskRecord> =
            disks.iter().filter(leaves).map(|disk| (disk.id, disk)).collect();
        replacing.emptying.retain(|disk, _| leaving.contains_key(disk));
        Ok(leaving
            .into_iter()
            .map(|(id, disk)| {
                let left = left.get(&id).copied().unwrap_or(0);
                let emptying = replacing.emptying.entry(id).or_insert(Emptying {
                    since: Instant::now(),
                    replicas: left,
                });
                emptying.replicas = emptying.replicas.max(left);
                let seconds = emptying.since.elapsed().as_secs_f64();
                let rate = f64::from(emptying.replicas - left) / seconds.max(1.0);
                MoveInfo {
                    disk: id,
                    path: disk.path.display().to_string(),
                    host: disk.host.and_then(|host| elsewhere.names.get(&host).cloned()),
                    replicas: emptying.replicas,
                    replicas_left: left,
                    replicas_per_hour: rate * 3600.0,
                    seconds_left: (rate > 0.0).then(|| (f64::from(left) / rate) as u64),
                }
            })
            .collect())
    }
}
