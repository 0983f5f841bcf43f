//! What a disk is told of its pool and of the VDIs that have replicas on it, so that it can be read there when the
//! control store is lost.
//!
//! A note is the record of a shard that has no data, under the VDI number 0, which no VDI has: the disk's store and
//! its format know nothing of notes. Number 0 is the [`DiskNote`], number N the [`VdiNote`] of VDI N. Each is JSON in
//! the form of the control records, and at most [`replication::RECORD_BYTES_MAX`] long.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use types::{DiskId, LayerId, Lineage, LineageStep, ShardId, ShardNo, VdiId};

use crate::store::{decode, encode};
use crate::{DiskRecord, PoolRecord, RecordError, VdiRecord};

/// The VDI whose shards are notes.
pub const NOTES: VdiId = VdiId(0);

/// Replicas whose disks a VDI's note names: of its first shard.
const WITNESSES_MAX: usize = 3;

/// Where a VDI's note is on a disk; [`disk_note`] for VDI 0.
#[must_use]
pub fn place_of(vdi: VdiId) -> ShardId {
    ShardId {
        vdi: NOTES,
        no: ShardNo(vdi.0),
    }
}

/// What a disk is told of itself and of its pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskNote {
    /// The pool's record.
    pub pool: PoolRecord,
    /// Its own record.
    pub disk: DiskRecord,
    /// The lowest id that no VDI had when this was noted.
    pub next_vdi_id: u32,
}

/// What a disk is told of a VDI that has replicas on it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VdiNote {
    /// See [`VdiRecord`], here and below.
    pub id: VdiId,
    /// Of the record that this was taken from.
    pub revision: u64,
    /// Its name.
    pub name: String,
    /// Virtual size.
    pub bytes: u64,
    /// Logical sector.
    pub sector_bytes: u32,
    /// 1 to 3.
    pub replicas: u8,
    /// Bytes per shard.
    pub shard_bytes: u64,
    /// The layer that takes the writes.
    pub head: LayerId,
    /// Which layers its head reads, from the newest down: how far below the last that was said the next one is, and how
    /// many follow it. Absent: all from the head down to 0.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub lineage: Vec<u32>,
    /// When.
    pub created: Timestamp,
    /// Deleted by the operator, but shards may be left on disks.
    #[serde(default)]
    pub deleting: bool,
    /// Disks that were told too: one that was there later and does not know the VDI any more has seen it deleted.
    #[serde(default)]
    pub witnesses: Vec<DiskId>,
}

impl VdiNote {
    /// Of a VDI whose first shard has these replicas, and whose head reads `lineage`.
    #[must_use]
    pub fn new(vdi: &VdiRecord, lineage: &Lineage, replicas: &[DiskId]) -> VdiNote {
        VdiNote {
            id: vdi.id,
            revision: vdi.revision,
            name: vdi.name.clone(),
            bytes: vdi.bytes,
            sector_bytes: vdi.sector_bytes,
            replicas: vdi.replicas,
            shard_bytes: vdi.shard_bytes,
            head: vdi.head,
            lineage: told(vdi, lineage),
            created: vdi.created,
            deleting: vdi.deleting,
            witnesses: replicas.iter().copied().take(WITNESSES_MAX).collect(),
        }
    }

    /// What its head reads, of its own layers; absent: no VDI can have noted this.
    #[must_use]
    pub fn lineage(&self) -> Option<Lineage> {
        let whole = [0, self.head.0];
        let told = if self.lineage.is_empty() {
            &whole[..]
        } else {
            &self.lineage
        };
        let (pairs, []) = told.as_chunks::<2>() else {
            return None;
        };
        let mut last = self.head.0;
        let mut steps = Vec::new();
        for [below, more] in pairs {
            let highest = last.checked_sub(*below)?;
            let lowest = highest.checked_sub(*more)?;
            steps.push(LineageStep {
                vdi: self.id,
                lowest: LayerId(lowest),
                highest: LayerId(highest),
            });
            last = lowest;
        }
        let lineage = Lineage::new(&steps).ok()?;
        (lineage.newest() == (self.id, self.head)).then_some(lineage)
    }

    /// The VDI's record again, one revision on, without its attachments.
    #[must_use]
    pub fn to_record(&self) -> VdiRecord {
        VdiRecord {
            id: self.id,
            revision: self.revision + 1,
            name: self.name.clone(),
            bytes: self.bytes,
            sector_bytes: self.sector_bytes,
            replicas: self.replicas,
            shard_bytes: self.shard_bytes,
            head: self.head,
            created: self.created,
            attachments: Vec::new(),
            deleting: false,
        }
    }
}

/// A lineage in the form of [`VdiNote::lineage`].
fn told(vdi: &VdiRecord, lineage: &Lineage) -> Vec<u32> {
    assert_eq!(lineage.newest(), (vdi.id, vdi.head), "what the head reads");
    let own = lineage.steps().iter().filter(|step| step.vdi == vdi.id);
    let mut told = Vec::new();
    let mut last = vdi.head.0;
    for step in own {
        told.extend([last - step.highest.0, step.highest.0 - step.lowest.0]);
        last = step.lowest.0;
    }
    if told == [0, vdi.head.0] { Vec::new() } else { told }
}

/// A note as bytes.
#[must_use]
pub fn note<T: Serialize>(note: &T) -> Vec<u8> {
    encode(note)
}

/// The note of a disk.
///
/// # Errors
/// [`RecordError::Damaged`] or [`RecordError::TooNew`].
pub fn disk_note(bytes: &[u8]) -> Result<DiskNote, RecordError> {
    decode("the disk's note", bytes)
}

/// The note of a VDI.
///
/// # Errors
/// [`RecordError::Damaged`] or [`RecordError::TooNew`].
pub fn vdi_note(vdi: VdiId, bytes: &[u8]) -> Result<VdiNote, RecordError> {
    let key = format!("the note of VDI {vdi}");
    let note: VdiNote = decode(&key, bytes)?;
    let is_possible = note.id == vdi
        && matches!(note.sector_bytes, 512 | 4096)
        && crate::vdi_bytes(note.bytes, note.sector_bytes).is_ok()
        && note.shard_bytes > 0
        && note.shard_bytes.is_multiple_of(1 << 20)
        && crate::shards_fit(note.bytes, note.shard_bytes).is_ok()
        && (1..=3).contains(&note.replicas)
        && note.lineage().is_some();
    if !is_possible {
        return Err(RecordError::Damaged {
            key,
            reason: format!("no VDI can be so: {note:?}"),
        });
    }
    Ok(note)
}
