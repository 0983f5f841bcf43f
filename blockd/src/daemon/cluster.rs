//! This host as one of a cluster: who it is, that it is alive, and what it sees of the others.
//!
//! ```text
//!  start:  STATE/host-id ─▶ etcd answers ─▶ lease ─▶ name taken, alive ─▶ disks, VDIs
//!  then:   every third of the lease: keep it alive, say which disks are up
//!          at every change of hosts, disks or writers: look again (hosts that came or died, VDIs lost, disks that leave)
//! ```
//! What was seen decides nothing that the data path needs: a host that is taken for dead only has its disks shown as
//! missing, and a VDI is let go only when another writer stands in its record.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use control::backend::{BackendError, LeaseId};
use control::etcd::Etcd;
use control::placement::Candidate;
use control::{
    AliveDisk, ApiError, ApiResult, ControlInfo, ControlStore, DiskRecord, DiskState, HostAlive, HostInfo,
    HostRecord, RecordError, Severity, VdiRecord, VdiWriter,
};
use edge::rocks::Rocks;
use jiff::Timestamp;
use tokio::sync::Notify;
use types::{BLOCK_BYTES, DiskId, HostId, Incarnation, VdiId};

use super::peers::Peers;
use super::{Daemon, ask};
use crate::cluster_config::ClusterSettings;
use crate::config::Settings;
use crate::plane::Command;

/// Between tries to reach etcd at the start.
const START_PAUSE: Duration = Duration::from_secs(2);
/// Figures of a disk are said again when they moved by this part of its capacity.
const WORTH_SAYING: u64 = 100;

/// This host's place in the cluster.
pub struct Membership {
    /// As in the records.
    pub host: HostRecord,
    lease_time: Duration,
    alive: Mutex<HostAlive>,
    /// Hosts seen alive when it was looked last.
    seen: Mutex<BTreeMap<HostId, String>>,
    /// Disks whose leaving the VDIs written here were told of.
    told_leaving: Mutex<BTreeSet<DiskId>>,
    pub(super) peers: Mutex<Peers>,
    say_again: Notify,
}

/// The control store and, in a cluster, this host's membership; and the incarnation of this life.
pub(super) async fn join(settings: &Settings) -> Result<(ControlStore, Option<Membership>, Incarnation)> {
    let id_file = settings.state.join("host-id");
    let own_records = settings.state.join("control");
    let Some(cluster) = &settings.cluster else {
        if id_file.exists() {
            bail!(
                "{} belongs to a host of a cluster: [cluster] is missing in the configuration",
                settings.state.display()
            );
        }
        let records = Rocks::open_records(&own_records).context("control records")?;
        let control = ControlStore::new(Box::new(records));
        let incarnation = control.next_incarnation().context("control records")?;
        return Ok((control, None, incarnation));
    };
    if own_records.exists() {
        bail!(
            "{} has control records of a pool of its own: a host joins a cluster with an empty state directory",
            settings.state.display()
        );
    }
    let id = host_id(&id_file)?;
    let peers = Peers::bind(cluster).await?;
    let control = reach(cluster, &settings.state).await?;
    let (control, membership, incarnation) = tokio::task::block_in_place(|| {
        let incarnation = control.next_incarnation()?;
        let host = HostRecord {
            id,
            name: cluster.host.to_string(),
            address: cluster.advertise.to_string(),
            zone: cluster.zone.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            leaving: false,
            joined: control.host(id)?.map_or_else(Timestamp::now, |host| host.joined),
        };
        let alive = HostAlive {
            host: id,
            incarnation,
            lease: grant(&control, cluster.lease)?,
            address: host.address.clone(),
            disks: Vec::new(),
        };
        control.join(&host, &alive)?;
        match control.clean_unmade()? {
            0 => {}
            count => tracing::warn!(count, "leftovers of VDIs that were never made are removed"),
        }
        let membership = Membership {
            host,
            lease_time: cluster.lease,
            alive: Mutex::new(alive),
            seen: Mutex::default(),
            told_leaving: Mutex::default(),
            peers: Mutex::new(peers),
            say_again: Notify::new(),
        };
        Ok::<_, RecordError>((control, membership, incarnation))
    })
    .with_context(|| format!("joining the cluster as host '{}'", cluster.host))?;
    tracing::info!(host = %membership.host.name, %id, %incarnation, "joined the cluster");
    Ok((control, Some(membership), incarnation))
}

/// Waits for etcd as long as it takes; what it refuses (a password, a certificate) is the end, and so is the etcd of another
/// pool. One that went back is waited for, too, until its records were rebuilt: nothing that they say may be acted on.
async fn reach(cluster: &ClusterSettings, state: &Path) -> Result<ControlStore> {
    loop {
        let (settings, memory) = (cluster.etcd.clone(), state.join("etcd-known.json"));
        let opened = tokio::task::spawn_blocking(move || Etcd::open_remembering(settings, memory)).await?;
        match opened {
            Ok(etcd) => return Ok(ControlStore::over(Arc::new(etcd))),
            Err(error @ (BackendError::Refused { .. } | BackendError::AnotherPool { .. })) => {
                return Err(error).context("settings [cluster]");
            }
            Err(error) => {
                tracing::warn!("waiting for etcd: {error}");
                tokio::time::sleep(START_PAUSE).await;
            }
        }
    }
}

/// Made once, at the first start; whoever copies the state directory to another machine makes the same host of it.
fn host_id(file: &Path) -> Result<HostId> {
    match std::fs::read_to_string(file) {
        Ok(text) => text
            .trim()
            .parse()
            .with_context(|| format!("{} is damaged", file.display())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let id = HostId(uuid::Uuid::new_v4().as_u128());
            let draft = file.with_extension("new");
            let write = || -> std::io::Result<()> {
                use std::io::Write;
                let mut out = std::fs::File::create(&draft)?;
                writeln!(out, "{id}")?;
                out.sync_all()?;
                std::fs::rename(&draft, file)?;
                std::fs::File::open(file.parent().unwrap_or(Path::new(".")))?.sync_all()
            };
            write().with_context(|| format!("cannot write {}", file.display()))?;
            Ok(id)
        }
        Err(error) => Err(error).with_context(|| format!("cannot read {}", file.display())),
    }
}

fn grant(control: &ControlStore, time: Duration) -> Result<LeaseId, RecordError> {
    Ok(control.leases().expect("a cluster has leases").grant(time)?)
}

impl Daemon {
    /// This host's id; `None` in a pool of a single host.
    pub(super) fn host(&self) -> Option<HostId> {
        self.membership.as_ref().map(|membership| membership.host.id)
    }

    /// The disk is in this host.
    pub(super) fn is_mine(&self, disk: &DiskRecord) -> bool {
        disk.host == self.host()
    }

    /// Keeps this host alive for the others, and its view of them fresh, for ever.
    pub(super) fn live(self: &Arc<Daemon>) {
        if self.membership.is_some() {
            tokio::spawn(Arc::clone(self).stay_alive());
            tokio::spawn(Arc::clone(self).look_around());
        }
    }

    /// What `weft status` says of the control store.
    pub(super) fn control_info(&self) -> ControlInfo {
        let health = self.control.health();
        ControlInfo {
            kind: if self.membership.is_some() {
                "etcd"
            } else {
                "embedded"
            }
            .to_owned(),
            unreachable_since: health.unreachable.as_ref().map(|(since, _)| *since),
            reason: health.unreachable.map_or_else(String::new, |(_, reason)| reason),
        }
    }

    /// Says soon that disks came or went.
    pub(super) fn disks_changed(&self) {
        if let Some(membership) = &self.membership {
            membership.say_again.notify_one();
        }
    }

    async fn stay_alive(self: Arc<Daemon>) {
        let membership = self.membership.as_ref().expect("a cluster's");
        let mut was_lost = false;
        loop {
            let pause = tokio::time::sleep(membership.lease_time / 3);
            tokio::select! {
                () = pause => {}
                () = membership.say_again.notified() => {}
            }
            match self.say_alive(membership).await {
                Ok(is_new) => {
                    if is_new || std::mem::take(&mut was_lost) {
                        self.events.add(
                            Severity::Warning,
                            "this host had not been heard for its lease and is alive again".to_owned(),
                        );
                    }
                }
                Err(error) => {
                    tracing::warn!("cannot say that this host is alive: {error}");
                    if error.kind == control::ErrorKind::Conflict && !was_lost {
                        was_lost = true;
                        self.events.add(Severity::Critical, error.message);
                    }
                }
            }
        }
    }

    /// Keeps the lease; `true` when it had ended and a new one was taken.
    async fn say_alive(&self, membership: &Membership) -> ApiResult<bool> {
        let disks = self.alive_disks().await;
        let mut alive = membership.alive.lock().expect("alive").clone();
        let lease = alive.lease;
        let is_kept = self.records(|control| {
            let leases = control.leases().expect("a cluster has leases");
            Ok(leases.keep_alive(lease)?)
        })?;
        let is_worth_saying = differ(&alive.disks, &disks);
        if is_kept && !is_worth_saying {
            return Ok(false);
        }
        alive.disks = disks;
        if is_kept {
            self.records(|control| control.say_alive(&alive))?;
        } else {
            // The name may have been taken meanwhile: it is asked for like at the start.
            alive.lease = self.records(|control| grant(control, membership.lease_time))?;
            self.records(|control| control.join(&membership.host, &alive))?;
        }
        *membership.alive.lock().expect("alive") = alive;
        Ok(!is_kept)
    }

    async fn alive_disks(&self) -> Vec<AliveDisk> {
        let figures = self.all_figures().await;
        self.up_disks()
            .into_iter()
            .map(|disk| {
                let stats = figures.as_ref().ok().and_then(|figures| figures.disks.get(&disk));
                let stats = stats.map(|(stats, _)| *stats).unwrap_or_default();
                AliveDisk {
                    disk,
                    capacity_bytes: stats.capacity_bytes,
                    used_bytes: stats.live_blocks * BLOCK_BYTES,
                }
            })
            .collect()
    }

    async fn look_around(self: Arc<Daemon>) {
        let mut alive = self.control.watch("host-alive/");
        let mut hosts = self.control.watch("host/");
        let mut pool = self.control.watch("pool");
        let mut disks = self.control.watch("disk/");
        let mut writers = self.control.watch("vdi-writer/");
        loop {
            if let Err(error) = self.look().await {
                tracing::warn!("looking at the cluster: {error}");
            }
            let changed = tokio::select! {
                changed = alive.changed() => changed,
                changed = hosts.changed() => changed,
                changed = pool.changed() => changed,
                changed = disks.changed() => changed,
                changed = writers.changed() => changed,
            };
            if changed.is_err() {
                return;
            }
        }
    }

    async fn look(self: &Arc<Daemon>) -> ApiResult<()> {
        self.look_at_peers().await?;
        self.look_at_hosts()?;
        let lost: Vec<(VdiId, VdiWriter)> = {
            let written = self.written.lock().expect("written").clone();
            let mut lost = Vec::new();
            for (vdi, ours) in written {
                let now = self.records(|control| control.writer(vdi))?;
                // Nobody there is not somebody else: an etcd that lost its records takes no VDI from its guests.
                if let Some(now) = now.filter(|now| {
                    Some(*now) != ours && ours.is_some_and(|ours| now.incarnation > ours.incarnation)
                }) {
                    lost.push((vdi, now));
                }
            }
            lost
        };
        for (vdi, now) in lost {
            self.lose_vdi(vdi, now).await?;
        }
        self.look_at_leaving_disks().await
    }

    fn look_at_hosts(&self) -> ApiResult<()> {
        let membership = self.membership.as_ref().expect("a cluster's");
        let names: BTreeMap<HostId, String> = self
            .records(ControlStore::hosts)?
            .into_iter()
            .map(|host| (host.id, host.name))
            .collect();
        let now: BTreeMap<HostId, String> = self
            .records(ControlStore::alive)?
            .into_iter()
            .filter(|alive| alive.host != membership.host.id)
            .map(|alive| (alive.host, names.get(&alive.host).cloned().unwrap_or_default()))
            .collect();
        let before = std::mem::replace(&mut *membership.seen.lock().expect("seen"), now.clone());
        for (host, name) in &now {
            if !before.contains_key(host) {
                self.events.add(Severity::Info, format!("host {name} is alive"));
            }
        }
        for (host, name) in &before {
            if !now.contains_key(host) {
                let message = format!("host {name} is not heard any more: its disks are missing");
                self.events.add(Severity::Critical, message);
            }
        }
        Ok(())
    }

    /// Disks that leave from anywhere: the VDIs written here move their replicas away.
    async fn look_at_leaving_disks(&self) -> ApiResult<()> {
        let membership = self.membership.as_ref().expect("a cluster's");
        let leaving: BTreeSet<DiskId> = self
            .records(ControlStore::disks)?
            .into_iter()
            .filter(|disk| disk.state == DiskState::Removing)
            .map(|disk| disk.id)
            .collect();
        let new: BTreeSet<DiskId> = {
            let mut told = membership.told_leaving.lock().expect("told");
            let new = leaving.difference(&told).copied().collect();
            *told = leaving;
            new
        };
        self.nothing_moves_to(&new);
        self.say_what_cannot_leave(new)?;
        // What could not move before perhaps can, now that something changed.
        self.retry_removals().await?;
        self.forget_hosts()?;
        Ok(())
    }

    /// Another host writes the VDI now: here its guests are hung up on, and nothing of it is kept.
    pub(super) async fn lose_vdi(&self, vdi: VdiId, now: VdiWriter) -> ApiResult<()> {
        if self.written.lock().expect("written").remove(&vdi).is_none() {
            return Ok(());
        }
        let had_guests = self.close_doors_of(vdi).await;
        ask(self.home(vdi), |reply| Command::CloseVdi { vdi, reply }).await?;
        self.sizes.lock().expect("sizes").remove(&vdi);
        self.deleting.lock().expect("deleting").remove(&vdi);
        let name = self
            .records(|control| control.vdi(vdi))?
            .map_or_else(|| vdi.to_string(), |record| record.name);
        let host = self.host_name(now.host)?;
        let severity = if had_guests {
            Severity::Critical
        } else {
            Severity::Info
        };
        self.events
            .add(severity, format!("VDI {name} is written by host {host} now"));
        Ok(())
    }

    pub(super) fn host_name(&self, id: HostId) -> ApiResult<String> {
        let host = self.records(|control| control.host(id))?;
        Ok(host.map_or_else(|| id.to_string(), |host| host.name))
    }

    /// Makes this host the writer of a VDI unless it is, and opens it.
    pub(super) async fn write_here(&self, record: VdiRecord) -> ApiResult<VdiRecord> {
        let is_here = self.written.lock().expect("written").contains_key(&record.id);
        let Some(host) = self.host().filter(|_| !is_here) else {
            return Ok(record);
        };
        let incarnation = self.records(ControlStore::next_incarnation)?;
        self.take_over(record.id, VdiWriter { host, incarnation }).await
    }

    /// In this order: the swap, then the shards' records, then the first fence.
    pub(super) async fn take_over(&self, vdi: VdiId, writer: VdiWriter) -> ApiResult<VdiRecord> {
        let record = self.records(|control| control.take_vdi(vdi, writer.host, writer.incarnation))?;
        let shards = self.records(|control| control.shards_now(&record))?;
        self.open_vdi(&record, shards, Some(writer)).await
    }

    /// All hosts, with whether they are alive.
    pub(super) fn host_infos(&self) -> ApiResult<Vec<HostInfo>> {
        let alive: BTreeMap<HostId, HostAlive> = self
            .records(ControlStore::alive)?
            .into_iter()
            .map(|alive| (alive.host, alive))
            .collect();
        let disks = self.records(ControlStore::disks)?;
        let hosts = self.records(ControlStore::hosts)?;
        Ok(hosts
            .into_iter()
            .map(|host| {
                let now = alive.get(&host.id);
                HostInfo {
                    id: host.id,
                    address: host.address,
                    zone: host.zone,
                    version: host.version,
                    joined: host.joined,
                    is_alive: now.is_some(),
                    is_this: Some(host.id) == self.host(),
                    is_leaving: host.leaving,
                    unreached: self.unreached(host.id),
                    disks: count(disks.iter().filter(|disk| disk.host == Some(host.id)).count()),
                    disks_up: count(now.map_or(0, |now| now.disks.len())),
                    name: host.name,
                }
            })
            .collect())
    }

    /// What other hosts say of their disks that are up, and the names of all hosts.
    pub(super) fn elsewhere(&self) -> ApiResult<Elsewhere> {
        let mut elsewhere = Elsewhere::default();
        if self.membership.is_none() {
            return Ok(elsewhere);
        }
        for host in self.records(ControlStore::hosts)? {
            elsewhere.names.insert(host.id, host.name);
            elsewhere.zones.insert(host.id, host.zone);
        }
        for alive in self.records(ControlStore::alive)? {
            elsewhere.alive.insert(alive.host);
            for disk in alive.disks {
                elsewhere.up.insert(disk.disk, disk);
            }
        }
        Ok(elsewhere)
    }
}

/// See [`Daemon::elsewhere`].
#[derive(Default)]
pub(super) struct Elsewhere {
    pub names: BTreeMap<HostId, String>,
    pub zones: BTreeMap<HostId, String>,
    pub alive: BTreeSet<HostId>,
    pub up: BTreeMap<DiskId, AliveDisk>,
}

impl Elsewhere {
    /// A disk as placement sees it, without weight: in its zone, or its host's.
    pub fn candidate(&self, disk: &DiskRecord) -> Candidate {
        Candidate {
            disk: disk.id,
            bytes: 0,
            host: disk.host.map_or_else(String::new, |host| host.to_string()),
            zone: match disk.host.and_then(|host| self.zones.get(&host)) {
                Some(zone) if disk.zone.is_empty() => zone.clone(),
                _ => disk.zone.clone(),
            },
        }
    }

    /// Why a disk of another host is not up.
    pub fn reason(&self, disk: &DiskRecord) -> String {
        let name = disk.host.and_then(|host| self.names.get(&host));
        let name = name.map_or("of another pool", String::as_str);
        match disk.host.is_some_and(|host| self.alive.contains(&host)) {
            true => format!("host {name} does not serve it"),
            false => format!("host {name} is not heard"),
        }
    }
}

fn count(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

/// Other disks, or other figures by more than others need to know.
fn differ(before: &[AliveDisk], now: &[AliveDisk]) -> bool {
    let moved = |a: &AliveDisk, b: &AliveDisk| {
        a.disk != b.disk
            || a.capacity_bytes != b.capacity_bytes
            || a.used_bytes.abs_diff(b.used_bytes) > b.capacity_bytes / WORTH_SAYING
    };
    before.len() != now.len() || before.iter().zip(now).any(|(a, b)| moved(a, b))
}

/// For a VDI that another host writes.
pub(super) fn not_here(name: &str, host: &str) -> ApiError {
    ApiError::conflict(
        format!("VDI {name} is written by host {host}"),
        format!("do it on host {host}"),
    )
}
