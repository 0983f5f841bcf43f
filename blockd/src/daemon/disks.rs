//! Disks of this host: opened and recovered, added, replaced, removed; what happens when one fails.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use control::placement::{self, Candidate, DiskMap};
use control::{
    ApiError, ApiResult, ControlStore, DISK_BYTES_MIN, DiskAdd, DiskRecord, DiskState, ErrorKind, PoolRecord,
    Severity,
};
use edge::BlockFile;
use edge::file::{Access, OsFile, ProbeReport};
use edge::rocks::Rocks;
use replication::{DiskNode, ShardRecord};
use store::{FormatParams, RebuildReason, RecoveryReport, ShardSummary, Store, Superblock, SuperblockError};
use types::{ByteSize, DiskId, ShardId, ShardNo, VdiId};

use super::cluster::Elsewhere;
use super::{Daemon, ask};
use crate::index::IndexThread;
use crate::plane::{Command, Home};

/// How long a disk that is plugged in again may wait to be noticed.
const MISSING_LOOKED_FOR_EVERY: Duration = Duration::from_secs(3);

/// What the daemon knows of a disk beside its record.
#[derive(Clone, Debug)]
pub struct DiskRuntime {
    /// Served by a plane.
    pub is_up: bool,
    /// The plane that serves (or served) it.
    pub plane: usize,
    /// Why it is not up.
    pub reason: String,
    /// It is not tried again by itself: somebody has to decide.
    pub is_refused: bool,
    /// Replicas there that no record knows; they are kept.
    pub leftovers: u32,
}

/// A disk that is open, checked and ready to be served.
struct Opened {
    superblock: Superblock,
    file: std::fs::File,
    node: DiskNode<edge::uring::Buf, Store<edge::uring::Buf>>,
    index: Rocks,
}

impl Daemon {
    /// Opens every disk of the records, side by side: recovery reads logs.
    pub(super) async fn open_all_disks(self: &Arc<Daemon>) -> anyhow::Result<()> {
        let records = self.records(ControlStore::disks)?;
        let mut openings = Vec::new();
        for record in records.into_iter().filter(|record| self.is_mine(record)) {
            let daemon = Arc::clone(self);
            openings.push(tokio::task::spawn_blocking(move || {
                let opened = daemon.open_disk(&record.path, Some(&record), false);
                (record, opened)
            }));
        }
        for opening in openings {
            let (record, opened) = opening.await?;
            match opened {
                Ok(opened) => {
                    self.serve_disk(opened).await?;
                    self.is_well_again(&record)?;
                }
                Err(error) => self.disk_is_missing(&record, &error),
            }
        }
        Ok(())
    }

    /// Looks for missing disks every few seconds: one that is plugged in again comes back by itself. A disk that
    /// failed does not: somebody has to say that it is well, by `weft disk add`.
    pub(super) async fn watch_for_missing_disks(self: Arc<Daemon>) {
        let mut interval = tokio::time::interval(MISSING_LOOKED_FOR_EVERY);
        interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            interval.tick().await;
            if let Err(error) = self.look_for_missing_disks().await {
                tracing::debug!(%error, "looking for missing disks");
            }
        }
    }

    async fn look_for_missing_disks(self: &Arc<Daemon>) -> ApiResult<()> {
        let is_anyone_away = self
            .disks
            .lock()
            .expect("disks")
            .values()
            .any(|runtime| !runtime.is_up && !runtime.is_refused);
        if !is_anyone_away {
            return Ok(());
        }
        let _one = self.changes.lock().await;
        for record in self.records(ControlStore::disks)? {
            let may_come_back = self.is_mine(&record)
                && record.state != DiskState::Failed
                && !self.is_up_or_refused(record.id);
            if !may_come_back || !record.path.exists() {
                continue;
            }
            let daemon = Arc::clone(self);
            let wanted = record.clone();
            let opening =
                tokio::task::spawn_blocking(move || daemon.open_disk(&wanted.path, Some(&wanted), false));
            let opened = opening
                .await
                .map_err(|error| ApiError::internal(error.to_string(), ""))?;
            match opened {
                Ok(opened) => {
                    self.serve_disk(opened).await?;
                    let message = format!("disk {} ({}) is back", record.id, record.path.display());
                    self.events.add(Severity::Info, message);
                    self.retry_removals().await?;
                }
                Err(error) => {
                    // Said once when it went missing; the reason in `weft disk list` is kept fresh.
                    if let Some(runtime) = self.disks.lock().expect("disks").get_mut(&record.id) {
                        runtime.is_refused = error.kind == ErrorKind::NeedsForce;
                        runtime.reason = error.message;
                    }
                }
            }
        }
        Ok(())
    }

    /// A disk that had failed was reopened and its log checked: it may be used again.
    fn is_well_again(&self, record: &DiskRecord) -> ApiResult<()> {
        if record.state == DiskState::Failed {
            self.records(|control| control.change_disk(record.id, |disk| disk.state = DiskState::Active))?;
            let message = format!("disk {} had failed; it was reopened and checked", record.id);
            self.events.add(Severity::Warning, message);
        }
        Ok(())
    }

    fn disk_is_missing(&self, record: &DiskRecord, error: &ApiError) {
        let runtime = DiskRuntime {
            is_up: false,
            plane: 0,
            reason: error.message.clone(),
            is_refused: error.kind == ErrorKind::NeedsForce,
            leftovers: 0,
        };
        self.disks.lock().expect("disks").insert(record.id, runtime);
        let severity = match error.kind {
            ErrorKind::NeedsForce => Severity::Critical,
            _ => Severity::Warning,
        };
        self.events.add(
            severity,
            format!(
                "disk {} ({}): {}; {}",
                record.id,
                record.path.display(),
                error.message,
                error.hint
            ),
        );
    }

    /// Opens `path` for us alone, recovers its log, and checks that it is the disk it should be. A disk that lost
    /// writes, or is an older copy of itself, and has the only good copy of something is refused unless the operator
    /// said that he accepts it (`accept_old`).
    fn open_disk(&self, path: &Path, wanted: Option<&DiskRecord>, accept_old: bool) -> ApiResult<Opened> {
        let shown = path.display();
        let mut file = OsFile::open(path, Access::ReadWrite).map_err(|error| {
            ApiError::unavailable(
                error.to_string(),
                "see that the disk is there and nobody else uses it",
            )
        })?;
        let superblock = store::read_superblock(&file).map_err(|error| {
            ApiError::conflict(
                format!("{shown}: {error}"),
                "`weft disk fsck` tells more; `weft disk replace` gives its place to another",
            )
        })?;
        if let Some(record) = wanted.filter(|record| record.id != superblock.disk) {
            let message = format!("{shown} holds disk {}, not {}", superblock.disk, record.id);
            return Err(ApiError::conflict(
                message,
                "give the path of the right disk: `weft disk add PATH`",
            ));
        }
        let directory = self.index_directory(superblock.disk);
        let mut index = open_index(&directory)?;
        let opens = wanted.map_or(0, |record| record.opens);
        let recovered = store::recover_known(&mut file, &mut index, entropy(), opens);
        let (recovered, report) = recovered.map_err(|error| {
            ApiError::conflict(format!("{shown}: {error}"), "`weft disk fsck` tells more")
        })?;
        tracing::info!(disk = %superblock.disk, path = %shown, ?report, "recovered");
        let what = what_it_lost(&report);
        if !accept_old {
            self.refuse_only_copies(superblock.disk, path, what, &recovered.shards())?;
        }
        if report.is_doubted() {
            let message = format!(
                "disk {} ({shown}): {what}; its replicas are compared with the others",
                superblock.disk
            );
            self.events.add(Severity::Critical, message);
        }
        let superblock = *recovered.superblock();
        let store = Store::open(recovered, self.store_settings());
        let node = DiskNode::new(superblock.disk, store);
        Ok(Opened {
            superblock,
            file: file.into_file(),
            node,
            index,
        })
    }

    /// Where no other disk has what this one lost, serving it would return old content for writes that completed.
    fn refuse_only_copies(
        &self,
        disk: DiskId,
        path: &Path,
        what: &str,
        shards: &[ShardSummary],
    ) -> ApiResult<()> {
        let mut vdis: BTreeMap<VdiId, usize> = BTreeMap::new();
        for summary in shards.iter().filter(|summary| summary.is_doubtful) {
            let record = self.records(|control| control.shard(summary.shard))?;
            if record.is_some_and(|record| record.was_written && record.in_sync == [disk]) {
                *vdis.entry(summary.shard.vdi).or_default() += 1;
            }
        }
        if vdis.is_empty() {
            return Ok(());
        }
        let mut names = Vec::new();
        for (vdi, shards) in &vdis {
            let record = self.records(|control| control.vdi(*vdi))?;
            let name = record.map_or_else(|| vdi.to_string(), |record| record.name);
            names.push(format!("{name} ({shards} shards)"));
        }
        let path = path.display();
        Err(ApiError::needs_force(
            format!(
                "disk {disk} ({path}): {what}, and it has the only good copy of VDI {}: what completed may be missing",
                names.join(", ")
            ),
            format!(
                "put the right disk there, or `weft disk add {path} --accept-old`: what is lost reads as it was before"
            ),
        ))
    }

    /// Hands an opened disk to a plane and tells every VDI.
    async fn serve_disk(&self, opened: Opened) -> ApiResult<()> {
        let Superblock {
            disk,
            open_count: opens,
            ..
        } = opened.superblock;
        let plane = self.least_loaded_plane();
        let held = opened.node.shards();
        let index = IndexThread::start(disk, Box::new(opened.index), self.planes[plane].clone())
            .map_err(|error| ApiError::internal(format!("cannot start the index thread: {error}"), ""))?;
        for handle in &self.planes {
            let home = Home::Plane(plane);
            handle.send(Command::Home { disk, home });
        }
        let node = Box::new(opened.node);
        ask(&self.planes[plane], |reply| Command::AddDisk {
            disk,
            file: opened.file,
            node,
            index,
            reply,
        })
        .await?
        .map_err(|error| ApiError::internal(error.to_string(), ""))?;
        // Before any writer can reach it: one that is filling a replica here must not be fenced by this.
        let leftovers = self.drop_leftovers(disk, plane, &held);
        let runtime = DiskRuntime {
            is_up: true,
            plane,
            reason: String::new(),
            is_refused: false,
            leftovers,
        };
        self.disks.lock().expect("disks").insert(disk, runtime);
        self.has_notes(disk, &held);
        self.disks_changed();
        self.tell_disk_state(disk, true).await?;
        if let Err(error) = self.remember_opens(disk, opens) {
            // A disk that was opened more often than the records know is no older copy of itself.
            tracing::warn!(%disk, opens, "the records do not know of this opening: {error}");
        }
        Ok(())
    }

    fn remember_opens(&self, disk: DiskId, opens: u64) -> ApiResult<()> {
        self.records(|control| control.change_disk(disk, |record| record.opens = opens))?;
        Ok(())
    }

    fn least_loaded_plane(&self) -> usize {
        let disks = self.disks.lock().expect("disks");
        let load = |plane: usize| {
            disks
                .values()
                .filter(|disk| disk.is_up && disk.plane == plane)
                .count()
        };
        (0..self.planes.len())
            .min_by_key(|plane| load(*plane))
            .expect("at least one plane")
    }

    pub(super) async fn tell_disk_state(&self, disk: DiskId, is_up: bool) -> ApiResult<()> {
        for plane in &self.planes {
            ask(plane, |reply| Command::DiskState { disk, is_up, reply }).await?;
        }
        Ok(())
    }

    /// Formats a new disk, or takes back one of ours that was away.
    pub(super) async fn add_disk(self: &Arc<Daemon>, request: DiskAdd) -> ApiResult<DiskId> {
        let pool = self.records(ControlStore::pool)?.ok_or_else(no_pool)?;
        let daemon = Arc::clone(self);
        let (record, opened) = tokio::task::spawn_blocking(move || daemon.prepare_disk(&pool, &request))
            .await
            .map_err(|error| ApiError::internal(format!("adding the disk: {error}"), ""))??;
        let disk = record.id;
        self.records(|control| control.put_disk(&record))?;
        self.serve_disk(opened).await?;
        if let Err(error) = self.tell_disks() {
            // The disk is in use all the same; it is told with the others as soon as the records can be read.
            tracing::warn!(%disk, %error, "the disk does not know its pool yet");
        }
        self.events.add(
            Severity::Info,
            format!("disk {disk} ({}) is in use", record.path.display()),
        );
        Ok(disk)
    }

    fn prepare_disk(&self, pool: &PoolRecord, request: &DiskAdd) -> ApiResult<(DiskRecord, Opened)> {
        let path = match request.create_bytes {
            Some(bytes) => create_file(&request.path, bytes)?,
            None => std::fs::canonicalize(&request.path).map_err(|error| {
                let hint = "give a block device, or `--size` to make a file";
                ApiError::not_found(format!("{}: {error}", request.path.display()), hint)
            })?,
        };
        let prepared = self.prepare_existing(pool, request, &path);
        if prepared.is_err() && request.create_bytes.is_some() {
            // It was made a moment ago and holds nothing.
            let _ = std::fs::remove_file(&path);
        }
        prepared
    }

    fn prepare_existing(
        &self,
        pool: &PoolRecord,
        request: &DiskAdd,
        path: &Path,
    ) -> ApiResult<(DiskRecord, Opened)> {
        let known = self.records(ControlStore::disks)?;
        let is_here = |disk: &&DiskRecord| self.is_mine(disk) && disk.path == path && self.is_up(disk.id);
        if let Some(disk) = known.iter().find(is_here) {
            return Err(ApiError::conflict(
                format!("{} is disk {} already", path.display(), disk.id),
                "",
            ));
        }
        self.refuse_served_elsewhere(pool, path)?;
        let mut file = OsFile::open(path, Access::ReadWrite)
            .map_err(|error| ApiError::conflict(error.to_string(), "unmount it, or stop what uses it"))?;
        let zone = request
            .zone
            .as_ref()
            .map_or_else(String::new, |zone| zone.as_str().to_owned());
        let read = store::read_superblock(&file);
        if let Ok(superblock) = &read {
            let record = known.iter().find(|disk| disk.id == superblock.disk);
            if let Some(record) = record.filter(|_| superblock.pool == pool.id) {
                if self.is_up(record.id) {
                    let message = format!(
                        "{} is a copy of disk {}, which is in use",
                        path.display(),
                        record.id
                    );
                    return Err(ApiError::conflict(message, "a disk may be there once"));
                }
                drop(file);
                let record = DiskRecord {
                    path: path.to_owned(),
                    state: DiskState::Active,
                    // A disk that was carried to another host is at home there.
                    host: self.host(),
                    ..record.clone()
                };
                let opened = self.open_disk(path, Some(&record), request.accept_old)?;
                return Ok((record, opened));
            }
        }
        let report = edge::file::probe(path).map_err(|error| ApiError::conflict(error.to_string(), ""))?;
        let held = what_it_holds(&read, &report, pool, path, &known);
        if let Some(held) = held.filter(|_| !request.force) {
            return Err(ApiError::needs_force(
                format!("{} {held}", path.display()),
                "--force overwrites it; its data is lost",
            ));
        }
        if file.bytes() < DISK_BYTES_MIN {
            let (have, need) = (ByteSize(file.bytes()), ByteSize(DISK_BYTES_MIN));
            let message = format!(
                "{} has {have}; a disk of the pool has at least {need}",
                path.display()
            );
            return Err(ApiError::invalid(message, ""));
        }
        let id = DiskId(uuid::Uuid::new_v4().as_u128());
        let directory = self.index_directory(id);
        let mut index = open_index(&directory)?;
        let parameters = FormatParams::new(id, pool.id, entropy());
        store::format(&mut file, &mut index, parameters)
            .map_err(|error| ApiError::conflict(format!("{}: {error}", path.display()), ""))?;
        let record = DiskRecord {
            id,
            path: path.to_owned(),
            bytes: file.bytes(),
            state: DiskState::Active,
            zone,
            opens: 0,
            host: self.host(),
        };
        drop((file, index));
        let opened = self.open_disk(path, Some(&record), false)?;
        Ok((record, opened))
    }

    pub(super) fn is_up(&self, disk: DiskId) -> bool {
        self.disks
            .lock()
            .expect("disks")
            .get(&disk)
            .is_some_and(|runtime| runtime.is_up)
    }

    /// Served by this host, or by another one that says so.
    pub(super) fn is_up_anywhere(&self, disk: &DiskRecord, elsewhere: &Elsewhere) -> bool {
        if self.is_mine(disk) {
            return self.is_up(disk.id);
        }
        elsewhere.up.contains_key(&disk.id)
    }

    fn is_up_or_refused(&self, disk: DiskId) -> bool {
        let disks = self.disks.lock().expect("disks");
        disks
            .get(&disk)
            .is_some_and(|runtime| runtime.is_up || runtime.is_refused)
    }

    pub(super) fn up_disks(&self) -> Vec<DiskId> {
        let disks = self.disks.lock().expect("disks");
        disks
            .iter()
            .filter(|(_, runtime)| runtime.is_up)
            .map(|(disk, _)| *disk)
            .collect()
    }

    /// The disks of the pool, weighted by their size and what is placed on them already. Those that take no new
    /// replicas are there too, without weight: what is on them counts where replicas are to be kept apart.
    pub(super) fn disk_map(&self, placed: &BTreeMap<DiskId, u64>) -> ApiResult<DiskMap> {
        let records = self.records(ControlStore::disks)?;
        let elsewhere = self.elsewhere()?;
        let candidates: Vec<Candidate> = records
            .into_iter()
            .map(|disk| {
                let may_take = disk.state == DiskState::Active && self.is_up_anywhere(&disk, &elsewhere);
                let placed = placed.get(&disk.id).copied().unwrap_or(0);
                let bytes = if may_take {
                    placement::weight(disk.bytes, placed)
                } else {
                    0
                };
                Candidate {
                    bytes,
                    ..elsewhere.candidate(&disk)
                }
            })
            .collect();
        Ok(DiskMap::new(&candidates))
    }

    /// Virtual bytes of the shards placed on each disk.
    pub(super) fn placed_bytes(&self) -> ApiResult<BTreeMap<DiskId, u64>> {
        let bytes: BTreeMap<VdiId, u64> = self
            .records(ControlStore::vdis)?
            .into_iter()
            .map(|vdi| (vdi.id, vdi.shard_bytes.min(vdi.bytes)))
            .collect();
        let bytes_of = |(vdi, count): (&VdiId, &u32)| u64::from(*count) * bytes.get(vdi).unwrap_or(&0);
        let placed = self
            .records(ControlStore::replicas_by_disk)?
            .into_iter()
            .map(|(disk, vdis)| (disk, vdis.iter().map(bytes_of).sum()))
            .collect();
        Ok(placed)
    }

    /// Chooses disks for new shards of a VDI, one after the other: each counts for those that follow.
    pub(super) fn place_shards(
        &self,
        vdi: VdiId,
        shards: std::ops::Range<u32>,
        replicas: u8,
        shard_bytes: u64,
    ) -> ApiResult<Vec<ShardRecord>> {
        let mut placed = self.placed_bytes()?;
        let sizes: BTreeMap<DiskId, u64> = self
            .records(ControlStore::disks)?
            .into_iter()
            .map(|disk| (disk.id, disk.bytes))
            .collect();
        let mut map = self.disk_map(&placed)?;
        let mut records = Vec::new();
        for no in shards {
            let shard = ShardId { vdi, no: ShardNo(no) };
            let disks = map.place(shard, usize::from(replicas)).map_err(|error| {
                let hint = "add disks with `weft disk add PATH`, or ask for fewer --replicas";
                ApiError::unavailable(error.to_string(), hint)
            })?;
            for disk in &disks {
                let placed = placed.entry(*disk).or_default();
                *placed += shard_bytes;
                map.set_weight(*disk, placement::weight(sizes[disk], *placed));
            }
            records.push(ShardRecord::new(shard, disks));
        }
        Ok(records)
    }

    /// A disk failed under its plane: it takes no more until it is added again.
    pub(super) async fn disk_failed(&self, disk: DiskId, reason: String) -> ApiResult<()> {
        self.events
            .add(Severity::Critical, format!("disk {disk} failed: {reason}"));
        self.stop_serving(disk, reason).await?;
        self.records(|control| {
            control.change_disk(disk, |record| {
                if record.state == DiskState::Active {
                    record.state = DiskState::Failed;
                }
            })
        })?;
        Ok(())
    }

    pub(super) async fn stop_serving(&self, disk: DiskId, reason: String) -> ApiResult<()> {
        let plane = {
            let mut disks = self.disks.lock().expect("disks");
            let Some(runtime) = disks.get_mut(&disk).filter(|runtime| runtime.is_up) else {
                return Ok(());
            };
            runtime.is_up = false;
            runtime.reason = reason;
            runtime.plane
        };
        self.disks_changed();
        self.tell_disk_state(disk, false).await?;
        let index = ask(&self.planes[plane], |reply| Command::RemoveDisk { disk, reply }).await?;
        // Until the index is closed nobody could open it again.
        tokio::task::block_in_place(|| drop(index));
        Ok(())
    }
}

/// What would be lost with a disk that is none of this pool's. One of Weft's that cannot be read today, because it is
/// damaged, cut or of a newer format, is full of data all the same.
fn what_it_holds(
    read: &Result<Superblock, SuperblockError>,
    report: &ProbeReport,
    pool: &PoolRecord,
    path: &Path,
    known: &[DiskRecord],
) -> Option<String> {
    match read {
        Ok(Superblock { disk, pool: its, .. }) if *its == pool.id => {
            Some(format!("is Weft disk {disk} of this pool, which let it go"))
        }
        Ok(Superblock { disk, pool, .. }) => Some(format!("is Weft disk {disk} of pool {pool}")),
        Err(SuperblockError::NotFormatted) if report.signatures.is_empty() => known
            .iter()
            .find(|record| record.path == path && !report.is_blank)
            .map(|record| format!("is where disk {} belongs; its superblocks are gone", record.id)),
        Err(SuperblockError::NotFormatted) => Some(format!("holds {}", report.signatures.join(", "))),
        Err(error) => Some(format!("is a Weft disk: {error}")),
    }
}

fn what_it_lost(report: &RecoveryReport) -> &'static str {
    if report.rebuilt == Some(RebuildReason::Ahead) {
        "it is an older copy of itself"
    } else if report.is_doubted() {
        "parts of its log are missing"
    } else {
        "parts of its log were missing when it was opened before"
    }
}

pub(super) fn no_pool() -> ApiError {
    ApiError::conflict("there is no pool yet", "make one: `weft pool create NAME`")
}

/// RocksDB is a cache of the log: one that does not open is made anew, and recovery fills it.
fn open_index(directory: &Path) -> ApiResult<Rocks> {
    match Rocks::open_index(directory) {
        Ok(index) => Ok(index),
        Err(error) => {
            tracing::warn!(%error, "the index does not open; it is rebuilt from the log");
            Rocks::destroy(directory)
                .and_then(|()| Rocks::open_index(directory))
                .map_err(|error| {
                    ApiError::internal(error.to_string(), "see that the state directory can be written")
                })
        }
    }
}

fn create_file(path: &Path, bytes: u64) -> ApiResult<PathBuf> {
    if bytes < DISK_BYTES_MIN {
        let message = format!(
            "{} are too few: a disk of the pool has at least {}",
            ByteSize(bytes),
            ByteSize(DISK_BYTES_MIN)
        );
        return Err(ApiError::invalid(message, ""));
    }
    edge::file::create_preallocated(path, bytes).map_err(|error| {
        ApiError::conflict(
            error.to_string(),
            "choose a path that is not there yet, with space",
        )
    })?;
    std::fs::canonicalize(path)
        .map_err(|error| ApiError::internal(format!("{}: {error}", path.display()), ""))
}

/// Random bits for segment secrets.
fn entropy() -> u64 {
    uuid::Uuid::new_v4().as_u64_pair().0 ^ uuid::Uuid::new_v4().as_u64_pair().1
}
