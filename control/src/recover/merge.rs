//! From what was found on the disks to records that a pool can go on with.
//!
//! Three things must hold whatever is missing. No token is given twice: incarnations go on above every one that any
//! disk promised or any record names, each shard's epoch too, so whoever wrote before is fenced out. Nothing completed
//! is lost unseen: a disk's record may be older than the last that the control store had, so a replica is taken
//! to be in sync only if no other found has more, and where the replicas found cannot be all that counted the shard
//! is reported, not recovered, until the operator accepts the loss. Nothing deleted comes back unannounced.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use replication::ShardRecord;
use types::{DiskId, Epoch, Incarnation, Lineage, PoolId, ShardId, ShardNo, VdiId};

use super::export::{Export, FoundDisk, FoundShard};
use super::notes::VdiNote;
use crate::placement::{Candidate, DiskMap, weight};
use crate::{DiskRecord, DiskState, PoolRecord, VdiRecord};

/// Above what was found: numbers that were given out and reached no disk that was read. Kept small, as each life of a
/// writer moves its seqs on by its epoch and incarnation.
const INCARNATIONS_SKIPPED: u64 = 1024;
const EPOCHS_SKIPPED: u64 = 16;

/// What the operator said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Asked {
    /// Disks that are lost for good.
    pub without: BTreeSet<DiskId>,
    /// VDIs that shall come back although they look deleted.
    pub undelete: BTreeSet<VdiId>,
    /// What cannot be known to be whole is taken as it is.
    pub accept_lost: bool,
}

/// Why there is nothing to show.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MergeError {
    /// Nothing was given.
    #[error("no disk of a pool was read")]
    NoDisk,
    /// Disks of several pools.
    #[error("disk {disk} ({path}) is of pool {its}, the others are of pool {pool}")]
    OtherPool {
        /// Which.
        disk: DiskId,
        /// Where.
        path: String,
        /// Its pool.
        its: PoolId,
        /// That of the first.
        pool: PoolId,
    },
    /// One disk was read twice, or there is a copy of it.
    #[error("disk {disk} was found twice: {first} and {second}")]
    Twice {
        /// Which.
        disk: DiskId,
        /// Where first.
        first: String,
        /// Where again.
        second: String,
    },
}

/// A pool's records as they can be rebuilt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recovery {
    /// The pool; rebuilt once more often than any disk knew.
    pub pool: PoolRecord,
    /// The disks found.
    pub disks: Vec<DiskRecord>,
    /// The VDIs found, by id, those that are left out too.
    pub vdis: Vec<RecoveredVdi>,
    /// What the next VDI gets.
    pub next_vdi_id: u32,
    /// The highest that may have been given.
    pub incarnation: Incarnation,
    /// Disks that records name and that were not read.
    pub missing: BTreeSet<DiskId>,
    /// Why it must not be written; each with a way out.
    pub problems: Vec<String>,
    /// What the operator should know.
    pub remarks: Vec<String>,
}

/// A VDI as it can be rebuilt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecoveredVdi {
    /// Its record, one revision on.
    pub record: VdiRecord,
    /// What its head reads. Which of its layers were snapshots is not known any more: they are one.
    pub lineage: Lineage,
    /// Its shards, in order; empty if it is left out.
    pub shards: Vec<ShardRecord>,
    /// Shards that some disk holds.
    pub found: usize,
    /// Of those, shards with fewer replicas in sync than replicas: they are caught up when it is opened.
    pub behind: usize,
    /// Shards that may lack what completed.
    pub unsure: usize,
    /// It was deleted, or was being deleted, and is left out.
    pub is_deleted: bool,
}

/// Weighs what was found.
///
/// # Errors
/// When nothing can be made of it at all.
pub fn merge(exports: &[Export], asked: &Asked, now: Timestamp) -> Result<Recovery, MergeError> {
    let found = Found::new(exports)?;
    let mut recovery = Recovery {
        pool: found.pool_record(now),
        disks: found.disk_records(),
        vdis: Vec::new(),
        next_vdi_id: found.next_vdi_id(),
        incarnation: found.highest_incarnation(),
        missing: BTreeSet::new(),
        problems: Vec::new(),
        remarks: Vec::new(),
    };
    let mut placing = Placing::new(&recovery.disks);
    for vdi in found.vdi_ids() {
        let is_wanted = asked.undelete.contains(&vdi);
        let Some(note) = found.vdi_note(vdi, &mut recovery.problems) else {
            let shards = found.copies(vdi).len();
            recovery.problems.push(format!(
                "{shards} shards of VDI {vdi} are there, but no disk knows its name and size: read its other disks too"
            ));
            continue;
        };
        let is_deleted = !is_wanted && found.is_deleted(&note);
        let mut rebuilt = RecoveredVdi {
            record: note.to_record(),
            lineage: note.lineage().expect("checked where it was read"),
            shards: Vec::new(),
            found: 0,
            behind: 0,
            unsure: 0,
            is_deleted,
        };
        if is_deleted {
            rebuilt.found = found.copies(vdi).len();
        } else {
            found.rebuild(&mut rebuilt, asked, &mut placing, &mut recovery);
        }
        recovery.vdis.push(rebuilt);
    }
    recovery.name_apart();
    recovery.judge(&found, asked);
    Ok(recovery)
}

type Copies<'a> = BTreeMap<DiskId, &'a FoundShard>;

/// The disks, indexed.
struct Found<'a> {
    disks: BTreeMap<DiskId, &'a FoundDisk>,
    shards: BTreeMap<ShardId, Copies<'a>>,
}

impl<'a> Found<'a> {
    fn new(exports: &'a [Export]) -> Result<Found<'a>, MergeError> {
        let mut found = Found {
            disks: BTreeMap::new(),
            shards: BTreeMap::new(),
        };
        let shown = |disk: &FoundDisk| disk.path.display().to_string();
        let mut all = exports.iter().flat_map(|export| &export.disks).peekable();
        let pool = all.peek().ok_or(MergeError::NoDisk)?.pool;
        for disk in all {
            if disk.pool != pool {
                return Err(MergeError::OtherPool {
                    disk: disk.disk,
                    path: shown(disk),
                    its: disk.pool,
                    pool,
                });
            }
            if let Some(first) = found.disks.insert(disk.disk, disk) {
                return Err(MergeError::Twice {
                    disk: disk.disk,
                    first: shown(first),
                    second: shown(disk),
                });
            }
            for shard in &disk.shards {
                let copies = found.shards.entry(shard.record.shard).or_default();
                copies.insert(disk.disk, shard);
            }
        }
        Ok(found)
    }

    fn pool_record(&self, now: Timestamp) -> PoolRecord {
        let notes = self.disks.values().filter_map(|disk| disk.note.as_ref());
        let latest = notes.map(|note| &note.pool).max_by_key(|pool| pool.recovered);
        let id = self.disks.values().next().expect("there is one").pool;
        let unnamed = PoolRecord {
            id,
            name: "recovered".to_owned(),
            created: now,
            recovered: 0,
        };
        let latest = latest.unwrap_or(&unnamed);
        PoolRecord {
            id,
            recovered: latest.recovered + 1,
            ..latest.clone()
        }
    }

    fn disk_records(&self) -> Vec<DiskRecord> {
        let records = self.disks.values().map(|disk| {
            let noted = disk.note.as_ref().map(|note| &note.disk);
            let state = match noted.map(|noted| noted.state) {
                Some(DiskState::Removing) => DiskState::Removing,
                _ => DiskState::Active,
            };
            DiskRecord {
                id: disk.disk,
                path: disk.path.clone(),
                bytes: disk.bytes,
                state,
                zone: noted.map_or_else(String::new, |noted| noted.zone.clone()),
                opens: disk.opens,
                host: noted.and_then(|noted| noted.host),
            }
        });
        records.collect()
    }

    fn vdi_ids(&self) -> BTreeSet<VdiId> {
        let noted = self.disks.values().flat_map(|disk| &disk.vdis);
        let held = self.shards.keys().map(|shard| shard.vdi);
        noted.map(|note| note.id).chain(held).collect()
    }

    fn next_vdi_id(&self) -> u32 {
        let notes = self.disks.values().filter_map(|disk| disk.note.as_ref());
        let noted = notes.map(|note| note.next_vdi_id).max().unwrap_or(1);
        let found = self.vdi_ids().last().map_or(0, |last| last.0);
        noted.max(found.saturating_add(1))
    }

    fn highest_incarnation(&self) -> Incarnation {
        let promised = self.disks.values().map(|disk| disk.promised.incarnation);
        let copies = self.shards.values().flat_map(BTreeMap::values);
        let named = copies.flat_map(|copy| [copy.promised.incarnation, copy.record.saved_by]);
        let highest = promised.chain(named).max().unwrap_or_default();
        Incarnation(highest.0.saturating_add(INCARNATIONS_SKIPPED))
    }

    /// The newest note of a VDI.
    fn vdi_note(&self, vdi: VdiId, problems: &mut Vec<String>) -> Option<VdiNote> {
        let notes = self.disks.values().flat_map(|disk| &disk.vdis);
        let notes: Vec<&VdiNote> = notes.filter(|note| note.id == vdi).collect();
        let newest = *notes.iter().max_by_key(|note| note.revision)?;
        let differs =
            |note: &&VdiNote| note.revision == newest.revision && note.to_record() != newest.to_record();
        if let Some(other) = notes.into_iter().find(differs) {
            problems.push(format!(
                "VDI {vdi} is noted in two ways at revision {}: '{}' of {} B and '{}' of {} B; leave out the disks of one",
                newest.revision, newest.name, newest.bytes, other.name, other.bytes
            ));
        }
        Some(newest.clone())
    }

    fn copies(&self, vdi: VdiId) -> BTreeMap<ShardNo, &Copies<'a>> {
        let all = self.shards.iter().filter(|(shard, _)| shard.vdi == vdi);
        all.map(|(shard, copies)| (shard.no, copies)).collect()
    }

    /// Somebody began to delete it, or a disk that should know it was there later and does not.
    fn is_deleted(&self, note: &VdiNote) -> bool {
        let vdi = note.id;
        let notes = || self.disks.values().flat_map(|disk| &disk.vdis);
        if notes().any(|note| note.id == vdi && note.deleting) {
            return true;
        }
        let copies = self.copies(vdi);
        let mut named: BTreeSet<DiskId> = note.witnesses.iter().copied().collect();
        for copies in copies.values() {
            named.extend(newest(copies).record.replicas.iter().copied());
        }
        let has_seen_it_go = |id: &DiskId| {
            self.disks.get(id).is_some_and(|disk| {
                let was_later = disk.note.as_ref().is_some_and(|note| note.next_vdi_id > vdi.0);
                was_later
                    && disk.vdis.iter().all(|note| note.id != vdi)
                    && disk.shards.iter().all(|shard| shard.record.shard.vdi != vdi)
            })
        };
        named.iter().any(has_seen_it_go)
    }

    fn rebuild(
        &self,
        rebuilt: &mut RecoveredVdi,
        asked: &Asked,
        placing: &mut Placing,
        recovery: &mut Recovery,
    ) {
        let vdi = rebuilt.record.id;
        let copies = self.copies(vdi);
        let bytes = rebuilt.record.shard_bytes.min(rebuilt.record.bytes);
        for no in 0..rebuilt.record.shard_count() {
            let shard = ShardId { vdi, no: ShardNo(no) };
            let record = match copies.get(&shard.no) {
                Some(copies) => {
                    rebuilt.found += 1;
                    let base = &newest(copies).record;
                    let named = base.replicas.iter();
                    let missing = named.filter(|disk| !self.disks.contains_key(disk));
                    recovery
                        .missing
                        .extend(missing.filter(|disk| !asked.without.contains(disk)));
                    let weighed = weigh(shard, copies, &self.disks, &mut recovery.problems);
                    rebuilt.unsure += usize::from(!weighed.is_sure);
                    let mut record = weighed.record;
                    placing.replace_missing(&mut record, copies, bytes);
                    rebuilt.behind += usize::from(record.in_sync.len() < record.replicas.len());
                    record
                }
                None => {
                    // Never touched; or all of its replicas were on disks that are lost.
                    rebuilt.unsure += usize::from(!asked.without.is_empty());
                    match placing.place(shard, usize::from(rebuilt.record.replicas), bytes) {
                        Some(disks) => ShardRecord::new(shard, disks),
                        None => {
                            recovery.problems.push(format!(
                                "VDI {} wants {} replicas and there are too few disks: read all of them",
                                rebuilt.record.name, rebuilt.record.replicas
                            ));
                            return;
                        }
                    }
                }
            };
            rebuilt.shards.push(record);
        }
    }
}

/// The copy with the newest record.
fn newest<'a>(copies: &Copies<'a>) -> &'a FoundShard {
    let newest = copies
        .values()
        .max_by_key(|copy| (copy.record.epoch, copy.record.saved_by));
    newest.expect("a shard that was found has a copy")
}

struct Weighed {
    record: ShardRecord,
    /// Everything that completed is certainly among the copies found.
    is_sure: bool,
}

/// The record of one shard from its copies.
///
/// The newest record found may be older than the last one that the control store took, whose fences reached no disk
/// before the writer died. Writes may have completed by that last record: on the only replica it kept, for one. All
/// the same they are on one of the replicas found, in the same writer's stream, and whoever has most of that stream
/// has them. So only those with the furthest end stay in sync, and the others are compared from the beginning.
fn weigh(
    shard: ShardId,
    copies: &Copies<'_>,
    disks: &BTreeMap<DiskId, &FoundDisk>,
    problems: &mut Vec<String>,
) -> Weighed {
    let base = &newest(copies).record;
    let is_other = |copy: &&&FoundShard| copy.record.epoch == base.epoch && copy.record != *base;
    if copies.values().find(is_other).is_some() {
        problems.push(format!(
            "shard {shard} has two records of epoch {}: the control store went back once; leave out the disks of one",
            base.epoch
        ));
    }
    let of = |ids: &[DiskId]| -> Vec<(DiskId, &FoundShard)> {
        let held = ids.iter().filter_map(|id| Some((*id, *copies.get(id)?)));
        held.collect()
    };
    let (present, mut counted) = (of(&base.replicas), of(&base.in_sync));
    let in_sync_found = counted.len();
    // A single replica that moved: the old disk was let go, before the new one heard that it is the one.
    let were_let_go = |id: &DiskId| disks.contains_key(id) && !copies.contains_key(id);
    if counted.is_empty() && base.in_sync.iter().all(were_let_go) {
        counted = present
            .iter()
            .copied()
            .filter(|(_, copy)| copy.is_whole())
            .collect();
    }
    let has_moved = !counted.is_empty() && in_sync_found == 0;
    let rank = |copy: &FoundShard| (copy.good(), copy.is_whole(), copy.end);
    let best = |copies: &[(DiskId, &FoundShard)]| {
        let best = copies.iter().max_by_key(|(_, copy)| rank(copy));
        best.map(|(_, copy)| rank(copy))
    };
    let is_sure = match (base.replicas.len(), in_sync_found) {
        _ if has_moved || !base.was_written => true,
        (3, in_sync) => present.len() >= 2 && in_sync >= base.fence_quorum(),
        (_, in_sync) => in_sync == base.in_sync.len(),
    };
    if counted.is_empty() {
        counted.clone_from(&present);
    }
    if counted.is_empty() {
        // Only disks that the newest record does not name any more have it: they are all there is.
        counted = copies.iter().map(|(id, copy)| (*id, *copy)).collect();
    }
    let furthest = best(&counted).expect("somebody has it");
    let is_ahead = |(_, copy): &&(DiskId, &FoundShard)| copy.is_whole() && copy.good() > furthest.0;
    if let Some((disk, copy)) = present.iter().find(is_ahead) {
        problems.push(format!(
            "shard {shard}: the replica on disk {disk} is not in sync and has more ({}) than those that are ({}); leave it out",
            copy.end, furthest.0
        ));
    }
    let mut record = base.clone();
    record.in_sync = counted
        .iter()
        .filter(|(_, copy)| rank(copy) == furthest)
        .map(|(disk, _)| *disk)
        .collect();
    for disk in &record.in_sync {
        if !record.replicas.contains(disk) {
            record.replicas = vec![*disk];
        }
    }
    let replicas = record.replicas.clone();
    record.in_sync.retain(|disk| replicas.contains(disk));
    // Everything is compared with who leaves or was behind, whatever is known of where they parted.
    record.ended.clear();
    record.was_written |= copies.values().any(|copy| copy.end.0 > 0 || copy.blocks > 0);
    let epochs = copies
        .values()
        .flat_map(|copy| [copy.record.epoch.0, copy.promised.epoch.0]);
    record.epoch = Epoch(epochs.max().unwrap_or(0) + EPOCHS_SKIPPED);
    Weighed { record, is_sure }
}

/// Chooses disks for shards that nobody touched, and in the place of disks that are lost.
struct Placing {
    map: DiskMap,
    bytes: BTreeMap<DiskId, u64>,
    placed: BTreeMap<DiskId, u64>,
}

impl Placing {
    fn new(disks: &[DiskRecord]) -> Placing {
        let may_take = |disk: &DiskRecord| disk.state == DiskState::Active;
        let candidates: Vec<Candidate> = disks
            .iter()
            .map(|disk| Candidate {
                disk: disk.id,
                bytes: if may_take(disk) { disk.bytes } else { 0 },
                host: disk.host.map(|host| host.to_string()).unwrap_or_default(),
                zone: disk.zone.clone(),
            })
            .collect();
        Placing {
            map: DiskMap::new(&candidates),
            bytes: candidates
                .into_iter()
                .map(|disk| (disk.disk, disk.bytes))
                .collect(),
            placed: BTreeMap::new(),
        }
    }

    fn add(&mut self, disk: DiskId, bytes: u64) {
        let placed = self.placed.entry(disk).or_default();
        *placed += bytes;
        if let Some(capacity) = self.bytes.get(&disk).filter(|capacity| **capacity > 0) {
            self.map.set_weight(disk, weight(*capacity, *placed));
        }
    }

    fn place(&mut self, shard: ShardId, replicas: usize, bytes: u64) -> Option<Vec<DiskId>> {
        let disks = self.map.place(shard, replicas).ok()?;
        for disk in &disks {
            self.add(*disk, bytes);
        }
        Some(disks)
    }

    /// Gives the places of disks that were not read to others that hold nothing of the shard; where there are none
    /// the shard has fewer replicas.
    fn replace_missing(&mut self, record: &mut ShardRecord, copies: &Copies<'_>, bytes: u64) {
        let (mut present, missing): (Vec<DiskId>, Vec<DiskId>) = record
            .replicas
            .iter()
            .partition(|disk| self.bytes.contains_key(disk));
        for _ in missing {
            let mut taken = present.clone();
            taken.extend(copies.keys().filter(|disk| !present.contains(disk)));
            if let Ok(disk) = self.map.replace(record.shard, &taken) {
                present.push(disk);
            }
        }
        for disk in &present {
            self.add(*disk, bytes);
        }
        record.replicas = present;
    }
}

impl Recovery {
    /// A name belongs to one VDI: the newest keeps it.
    fn name_apart(&mut self) {
        let mut names = BTreeSet::new();
        for vdi in self.vdis.iter_mut().rev().filter(|vdi| !vdi.is_deleted) {
            if !names.insert(vdi.record.name.clone()) {
                let was = std::mem::take(&mut vdi.record.name);
                vdi.record.name = format!("{}-{}", was.chars().take(50).collect::<String>(), vdi.record.id);
                names.insert(vdi.record.name.clone());
                self.remarks.push(format!(
                    "VDI {} has the name '{was}' of a later one, and is called '{}'",
                    vdi.record.id, vdi.record.name
                ));
            }
        }
    }

    fn judge(&mut self, found: &Found<'_>, asked: &Asked) {
        for disk in found.disks.values() {
            for words in &disk.unreadable {
                let path = disk.path.display();
                self.problems
                    .push(format!("disk {} ({path}): {words}", disk.disk));
            }
        }
        if found.disks.values().all(|disk| disk.note.is_none()) {
            let name = &self.pool.name;
            self.remarks
                .push(format!("no disk knows the pool's name; it is called '{name}'"));
        }
        for disk in &self.missing {
            self.problems.push(format!(
                "disk {disk} has replicas and was not read: read it, or say that it is lost: --without {disk}"
            ));
        }
        for vdi in self.vdis.iter().filter(|vdi| vdi.unsure > 0) {
            let VdiRecord { name, .. } = &vdi.record;
            let words = format!(
                "VDI {name}: {} shards may lack what was written to them",
                vdi.unsure
            );
            if asked.accept_lost {
                self.remarks.push(format!("{words}; that was accepted"));
            } else if self.missing.is_empty() {
                self.problems
                    .push(format!("{words}: read more disks, or accept that: --accept-lost"));
            }
        }
        for vdi in self.vdis.iter().filter(|vdi| vdi.is_deleted) {
            let VdiRecord { name, id, .. } = &vdi.record;
            self.remarks.push(format!(
                "VDI {name} was deleted before, with {} shards left; it stays so, or comes back with --undelete {id}",
                vdi.found
            ));
        }
        self.problems.dedup();
    }
}
