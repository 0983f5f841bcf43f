//! Disks that are gone for long: what they held is made anew on other disks, by whoever writes the VDI; and how far the
//! emptying of disks is.
//!
//! ```text
//!  up ──gone──▶ waited for ──replace_after_s──▶ overdue: moving.rs makes its replicas anew
//!   ▲               │                              │
//!   └───is back─────┴──────────────────────────────┘  (what was replaced meanwhile is dropped there)
//! ```
//! Each daemon counts the time by its own clock from when it saw the disk go. VDIs that nobody is attached at and whose host is gone as long are taken over by one
//! host, the living one with the lowest id; two that both take themselves for it take over one after the other.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use control::{ApiResult, ControlStore, DiskRecord, DiskState, MoveInfo, Severity};
use types::{DiskId, HostId};

use super::Daemon;

/// How often it is looked who is gone, and what is to move.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// See the module.
#[derive(Default)]
pub(super) struct Replacing {
    gone_disks: BTreeMap<DiskId, Instant>,
    gone_hosts: BTreeMap<HostId, Instant>,
    overdue: BTreeSet<DiskId>,
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
                tokio::select! {
                    () = tokio::time::sleep(LOOK_EVERY) => {}
                    () = daemon.has_room_again.notified() => {}
                }
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
        // The last replica may have been moved by another host.
        self.finish_removals().await?;
        self.forget_hosts()?;
        if let Some(patience) = self.settings.replace_after {
            self.look_for_gone(patience).await?;
        }
        let disks = self.disks_now()?;
        self.plan_rebalancing(&disks)?;
        let overdue = self.replacing.lock().expect("replacing").overdue.clone();
        self.move_some(&disks, &overdue)
    }

    async fn look_for_gone(&self, patience: Duration) -> ApiResult<()> {
        let disks = self.records(ControlStore::disks)?;
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
        self.adopt_orphans(patience).await
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

    /// How far the emptying of disks is, for `weft status`.
    pub(super) fn moves(&self) -> ApiResult<Vec<MoveInfo>> {
        let mut left: BTreeMap<DiskId, u32> = BTreeMap::new();
        for disk in self.leaving_or_overdue()? {
            let shards = self.records(|control| control.shards_on(disk))?;
            left.insert(disk, u32::try_from(shards.len()).unwrap_or(u32::MAX));
        }
        let elsewhere = self.elsewhere()?;
        let mut replacing = self.replacing.lock().expect("replacing");
        let disks = self.records(ControlStore::disks)?;
        let leaves = |disk: &&DiskRecord| left.contains_key(&disk.id);
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

    fn leaving_or_overdue(&self) -> ApiResult<BTreeSet<DiskId>> {
        let mut all = self.replacing.lock().expect("replacing").overdue.clone();
        let disks = self.records(ControlStore::disks)?;
        let leaving = disks.iter().filter(|disk| disk.state == DiskState::Removing);
        all.extend(leaving.map(|disk| disk.id));
        Ok(all)
    }
}
