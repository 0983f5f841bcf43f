//! What the disks of this host are told of the pool and of the VDIs that have replicas on them: all that
//! `weft pool recover` could not know otherwise if the control store were lost (control/src/recover).
//!
//! A new VDI's note is on its way to the disks of this host before any write can be: a log is a prefix of what it was
//! sent, so whoever finds the write finds the name. Everything else follows the records, within a second or so.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use control::recover::notes::{DiskNote, NOTES, VdiNote, note, place_of, vdi_note};
use control::{ApiResult, ControlStore, DiskRecord, VdiRecord};
use replication::{RECORD_BYTES_MAX, ReplicaRequest, ShardRecord, ToReplica};
use store::ShardSummary;
use types::{DiskId, Epoch, LayerId, Lineage, RequestId, Token, VdiId};

use super::Daemon;
use crate::plane::Command;

/// Changes come in crowds: many shards' records change when a disk goes.
const PAUSE: Duration = Duration::from_millis(100);
/// All records are gone through for each crowd; the pauses take so many times as long.
const PAUSES: u32 = 20;

/// The notes on each disk that is served, by number.
pub(super) type Told = BTreeMap<DiskId, BTreeMap<VdiId, Vec<u8>>>;

impl Daemon {
    /// A disk begins to be served, with these notes on it.
    pub(super) fn has_notes(&self, disk: DiskId, shards: &[ShardSummary]) {
        let notes = shards.iter().filter(|summary| summary.shard.vdi == NOTES);
        let notes = notes.map(|summary| (VdiId(summary.shard.no.0), summary.record.clone()));
        self.told.lock().expect("notes").insert(disk, notes.collect());
    }

    /// Keeps the notes as the records are.
    pub(super) async fn keep_telling_disks(self: Arc<Daemon>) {
        let mut changes = ["pool", "disk/", "vdi/", "shard/"].map(|prefix| self.control.watch(prefix));
        loop {
            let began = Instant::now();
            if let Err(error) = self.tell_disks() {
                tracing::warn!(%error, "the disks are not told of the pool");
            }
            tokio::time::sleep(PAUSE.max(began.elapsed() * PAUSES)).await;
            let [pool, disks, vdis, shards] = &mut changes;
            let changed = tokio::select! {
                changed = pool.changed() => changed,
                changed = disks.changed() => changed,
                changed = vdis.changed() => changed,
                changed = shards.changed() => changed,
            };
            if changed.is_err() {
                return;
            }
        }
    }

    /// Makes the notes say what the records say now.
    pub(super) fn tell_disks(&self) -> ApiResult<()> {
        let Some(pool) = self.records(ControlStore::pool)? else {
            return Ok(());
        };
        let next_vdi_id = self.records(ControlStore::next_vdi_id_seen)?;
        let mut wanted: Told = BTreeMap::new();
        for disk in self.records(ControlStore::disks)? {
            let mut notes = BTreeMap::new();
            let its = DiskNote {
                pool: pool.clone(),
                // Where it is found is for whoever finds it to say.
                disk: DiskRecord {
                    path: PathBuf::new(),
                    ..disk.clone()
                },
                next_vdi_id,
            };
            notes.insert(NOTES, note(&its));
            wanted.insert(disk.id, notes);
        }
        let lineages = self.records(ControlStore::head_lineages)?;
        for vdi in self.records(ControlStore::vdis)? {
            // One was heard and the other not yet: when it is, this is gone through again. No note may be left out here,
            // for a note that is not wanted is taken off the disks.
            let Some(lineage) = lineage_of(&vdi, &lineages) else {
                return Ok(());
            };
            let shards = self.records(|control| control.shards(vdi.id))?;
            for (disk, bytes) in notes_of(&vdi, &lineage, &shards) {
                if let Some(notes) = wanted.get_mut(&disk) {
                    notes.insert(vdi.id, bytes);
                }
            }
        }
        let mut told = self.told.lock().expect("notes");
        for (disk, told) in told.iter_mut().filter(|(disk, _)| self.is_up(**disk)) {
            // A disk without a record is about to go, or about to be added.
            let Some(wanted) = wanted.get(disk) else { continue };
            // One that the records never heard of was not deleted: the records are old.
            let is_gone = |vdi: &VdiId| !wanted.contains_key(vdi) && vdi.0 < next_vdi_id;
            for vdi in told.keys().filter(|vdi| is_gone(vdi)) {
                self.to_note(*disk, *vdi, ReplicaRequest::Drop);
            }
            for (vdi, bytes) in wanted.iter().filter(|(vdi, bytes)| told.get(vdi) != Some(bytes)) {
                self.put_note(*disk, *vdi, bytes.clone());
            }
            told.retain(|vdi, _| !is_gone(vdi));
            told.extend(wanted.clone());
        }
        Ok(())
    }

    /// Before a VDI takes its first write, or a new shard or layer of it does, or it is deleted.
    pub(super) fn tell_disks_of(&self, vdi: &VdiRecord, shards: &[ShardRecord]) -> ApiResult<()> {
        let lineage = if vdi.head == LayerId(0) {
            Lineage::of_layer(vdi.id, vdi.head)
        } else {
            let tree = self.records(|control| control.layers_now(vdi.id))?;
            tree.lineage(vdi.id, vdi.head)
                .map_err(control::RecordError::from)?
        };
        let mut told = self.told.lock().expect("notes");
        for (disk, bytes) in notes_of(vdi, &lineage, shards) {
            if let Some(told) = told.get_mut(&disk).filter(|_| self.is_up(disk)) {
                self.put_note(disk, vdi.id, bytes.clone());
                told.insert(vdi.id, bytes);
            }
        }
        Ok(())
    }

    /// A VDI is gone.
    pub(super) fn forget_notes_of(&self, vdi: VdiId) {
        let mut told = self.told.lock().expect("notes");
        for (disk, told) in told.iter_mut().filter(|(disk, _)| self.is_up(**disk)) {
            if told.remove(&vdi).is_some() {
                self.to_note(*disk, vdi, ReplicaRequest::Drop);
            }
        }
    }

    /// The name of a VDI, as a disk was told.
    pub(super) fn noted_name(&self, disk: DiskId, vdi: VdiId) -> Option<String> {
        let told = self.told.lock().expect("notes");
        let bytes = told.get(&disk)?.get(&vdi)?;
        vdi_note(vdi, bytes).ok().map(|note| note.name)
    }

    /// A disk forgets a VDI of which it has nothing any more.
    pub(super) fn drop_note(&self, disk: DiskId, vdi: VdiId) {
        let mut told = self.told.lock().expect("notes");
        if told
            .get_mut(&disk)
            .is_some_and(|notes| notes.remove(&vdi).is_some())
        {
            self.to_note(disk, vdi, ReplicaRequest::Drop);
        }
    }

    fn put_note(&self, disk: DiskId, vdi: VdiId, record: Vec<u8>) {
        assert!(
            record.len() <= RECORD_BYTES_MAX,
            "a note of {} bytes",
            record.len()
        );
        self.to_note(disk, vdi, ReplicaRequest::Fence { record });
    }

    fn to_note(&self, disk: DiskId, vdi: VdiId, request: ReplicaRequest<edge::uring::Buf>) {
        let plane = {
            let disks = self.disks.lock().expect("disks");
            disks.get(&disk).map(|runtime| runtime.plane)
        };
        let Some(plane) = plane else { return };
        // Later lives have higher incarnations; nobody waits for the answer.
        let token = Token {
            epoch: Epoch(1),
            incarnation: self.incarnation,
        };
        let message = ToReplica {
            shard: place_of(vdi),
            token,
            id: RequestId(0),
            request,
        };
        self.planes[plane].send(Command::ToDisk(disk, message));
    }
}

/// What the head of a VDI reads; absent where its layers are not those of its record.
fn lineage_of(vdi: &VdiRecord, lineages: &BTreeMap<VdiId, Lineage>) -> Option<Lineage> {
    match lineages.get(&vdi.id) {
        Some(lineage) => (lineage.newest() == (vdi.id, vdi.head)).then(|| lineage.clone()),
        // Never snapshotted, or the record of its layers is lost: all of them then.
        None => Some(Lineage::of_layers(vdi.id, LayerId(0), vdi.head)),
    }
}

/// What each disk that a VDI has replicas on is to know of it.
fn notes_of(
    vdi: &VdiRecord,
    lineage: &Lineage,
    shards: &[ShardRecord],
) -> impl Iterator<Item = (DiskId, Vec<u8>)> {
    let witnesses = shards.first().map_or(&[][..], |shard| &shard.replicas);
    let bytes = note(&VdiNote::new(vdi, lineage, witnesses));
    let disks: BTreeSet<DiskId> = shards.iter().flat_map(|shard| shard.replicas.clone()).collect();
    disks.into_iter().map(move |disk| (disk, bytes.clone()))
}
