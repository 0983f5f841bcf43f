//! Records of layers and snapshots. What an operation on them means is decided by [`snapshot::Tree`]; here it is read
//! from the records, and what it changed is written in one transaction.
//!
//! A VDI is loaded with its relatives, because a clone needs its parent and a parent must know its clones.

use std::collections::{BTreeMap, BTreeSet};

use snapshot::tree::{LayerRange, LayerRecord, Refusal, RunRecord, Tree, VdiLayers, VdiRecords};
use types::{LayerId, Lineage, VdiId};

use super::vdis::vdi_key;
use super::{ControlStore, Held, RecordError, Result, decode, put};
use crate::VdiRecord;
use crate::backend::{Commit, Transaction};

/// Most snapshots that one change may delete: each changes two records at most, and a transaction of etcd is small.
pub const SNAPSHOTS_AT_ONCE: usize = 50;

const LAYERS: &str = "layers/";

pub(super) fn layers_key(id: VdiId) -> String {
    format!("{LAYERS}{:08x}", id.0)
}

pub(super) fn snapshots_prefix(id: VdiId) -> String {
    format!("snapshot/{:08x}/", id.0)
}

fn snapshot_key(id: VdiId, layer: LayerId) -> String {
    format!("{}{:08x}", snapshots_prefix(id), layer.0)
}

/// VDIs with their relatives: as it is written, and as layers.
type Family = BTreeMap<VdiId, (Held<VdiRecord>, VdiRecords)>;

/// From where records are read.
#[derive(Clone, Copy)]
enum From {
    /// As last heard.
    Seen,
    /// The store itself.
    Store,
}

impl ControlStore {
    /// The layers of a VDI and of its relatives, as last heard.
    ///
    /// # Errors
    /// The backend's, [`RecordError::Missing`], or [`RecordError::Damaged`].
    pub fn layers(&self, id: VdiId) -> Result<Tree> {
        let records = self
            .family(id, From::Seen)?
            .into_values()
            .map(|(_, records)| records);
        load(records)
    }

    /// The same, from the store itself and not as last heard.
    ///
    /// # Errors
    /// See [`layers`](Self::layers).
    pub fn layers_now(&self, id: VdiId) -> Result<Tree> {
        let records = self
            .family(id, From::Store)?
            .into_values()
            .map(|(_, records)| records);
        load(records)
    }

    /// What each VDI that ever was snapshotted reads now, as last heard.
    ///
    /// # Errors
    /// The backend's, or [`RecordError::Damaged`].
    pub fn head_lineages(&self) -> Result<BTreeMap<VdiId, Lineage>> {
        let wholes = self.wholes(From::Seen)?;
        let mut found = BTreeMap::new();
        for id in wholes.keys() {
            if found.contains_key(id) {
                continue;
            }
            let family = match self.family_of(*id, &wholes, From::Seen) {
                Ok(family) => family,
                // Deleted while we looked.
                Err(RecordError::Missing(_)) => continue,
                Err(error) => return Err(error),
            };
            let ids: Vec<VdiId> = family.keys().copied().collect();
            let tree = load(family.into_values().map(|(_, records)| records))?;
            for id in ids {
                found.insert(id, tree.head(id)?.lineage);
            }
        }
        Ok(found)
    }

    /// Does an operation on the layers of `vdi`: see [`change_layers_of`](Self::change_layers_of).
    ///
    /// # Errors
    /// See there.
    ///
    /// # Panics
    /// See there.
    pub fn change_layers<T>(
        &self,
        vdi: &VdiRecord,
        operation: impl FnOnce(&mut Tree) -> std::result::Result<T, Refusal>,
    ) -> Result<(VdiRecord, T)> {
        let (mut records, done) = self.change_layers_of(std::slice::from_ref(vdi), operation)?;
        Ok((records.pop().expect("one VDI has one record"), done))
    }

    /// Does an operation on the layers of these VDIs, as read before, and writes down what it changed: all of it or
    /// nothing. Returns the VDIs' records in their order, at least one revision on, and what the operation returned. Who
    /// took a VDI over has raised the revision, so only its writer's copy can be the present one.
    ///
    /// # Errors
    /// The backend's, [`RecordError::Layers`] with the operation's refusal, [`RecordError::Missing`],
    /// [`RecordError::OldRevision`], or [`RecordError::Overtaken`]: a relative was changed meanwhile.
    ///
    /// # Panics
    /// When the operation makes or removes a VDI, or deletes more than [`SNAPSHOTS_AT_ONCE`].
    pub fn change_layers_of<T>(
        &self,
        vdis: &[VdiRecord],
        operation: impl FnOnce(&mut Tree) -> std::result::Result<T, Refusal>,
    ) -> Result<(Vec<VdiRecord>, T)> {
        let wholes = self.wholes(From::Store)?;
        let mut family = BTreeMap::new();
        for vdi in vdis {
            if !family.contains_key(&vdi.id) {
                family.extend(self.family_of(vdi.id, &wholes, From::Store)?);
            }
            let (held, _): &(Held<VdiRecord>, VdiRecords) = &family[&vdi.id];
            if let Some(now) = held.record.as_ref().filter(|now| now.revision != vdi.revision) {
                return Err(RecordError::OldRevision {
                    vdi: vdi.id,
                    held: now.revision,
                    given: vdi.revision,
                });
            }
        }
        let mut tree = load(family.values().map(|(_, records)| records.clone()))?;
        let done = operation(&mut tree)?;
        let mut change = Transaction::default();
        let mut results = BTreeMap::new();
        for (id, (held, before)) in &family {
            let after = tree.save(*id)?;
            let record = held
                .record
                .as_ref()
                .expect("a family is made of VDIs that are there");
            change.compares.push(held.unchanged(&vdi_key(*id)));
            let is_asked = vdis.iter().any(|vdi| vdi.id == *id);
            if after == *before && !is_asked {
                continue;
            }
            let next = VdiRecord {
                revision: record.revision + 1,
                head: after.head,
                ..record.clone()
            };
            put(&mut change, &vdi_key(*id), &next);
            put_layers(&mut change, before, &after);
            results.insert(*id, next);
        }
        if let Some(limits) = self.backend.limits() {
            let operations = change.puts.len() + change.deletes.len();
            assert!(
                operations <= limits.operations,
                "{operations} records in one change"
            );
        }
        match self.commit(&change)? {
            Commit::Done => {
                let of = |vdi: &VdiRecord| results[&vdi.id].clone();
                Ok((vdis.iter().map(of).collect(), done))
            }
            Commit::Refused => Err(RecordError::Overtaken),
        }
    }

    /// The VDI, the parents it began with and the clones that began with any of them, each as it is written.
    fn family(&self, id: VdiId, from: From) -> Result<Family> {
        self.family_of(id, &self.wholes(from)?, from)
    }

    /// What belongs to each VDI as a whole, of those that have layers beside the first.
    fn wholes(&self, from: From) -> Result<BTreeMap<VdiId, VdiLayers>> {
        let mut wholes = BTreeMap::new();
        for (key, value) in self.entries(LAYERS, from)? {
            let digits = key.trim_start_matches(LAYERS);
            let id = u32::from_str_radix(digits, 16).map_err(|error| RecordError::Damaged {
                key: key.clone(),
                reason: error.to_string(),
            })?;
            wholes.insert(VdiId(id), decode(&key, &value)?);
        }
        Ok(wholes)
    }

    fn family_of(&self, id: VdiId, wholes: &BTreeMap<VdiId, VdiLayers>, from: From) -> Result<Family> {
        let mut found = BTreeMap::new();
        let mut to_do = BTreeSet::from([id]);
        while let Some(id) = to_do.pop_first() {
            let key = vdi_key(id);
            let held: Held<VdiRecord> = self.record_of(&key, from)?;
            let Some(record) = &held.record else {
                return Err(RecordError::Missing(key));
            };
            let layers = self.entries(&snapshots_prefix(id), from)?;
            let layers: Vec<LayerRecord> = super::decode_all(&layers)?;
            let whole = wholes.get(&id).cloned();
            let records = VdiRecords {
                vdi: id,
                name: record.name.parse().map_err(|_| RecordError::Damaged {
                    key: key.clone(),
                    reason: format!("'{}' is no name", record.name),
                })?,
                head: record.head,
                whole: whole.unwrap_or_else(|| unwritten(record.head)),
                layers,
            };
            found.insert(id, (held, records));
            let parent = wholes
                .get(&id)
                .and_then(|whole| whole.origin)
                .map(|origin| origin.vdi);
            let clones = wholes
                .iter()
                .filter(|(_, whole)| whole.origin.is_some_and(|origin| origin.vdi == id));
            let relatives = parent.into_iter().chain(clones.map(|(clone, _)| *clone));
            to_do.extend(relatives.filter(|relative| !found.contains_key(relative)));
        }
        Ok(found)
    }

    fn record_of(&self, key: &str, from: From) -> Result<Held<VdiRecord>> {
        match from {
            From::Store => self.held(key),
            From::Seen => Ok(Held {
                record: self.seen(key)?,
                bytes: None,
            }),
        }
    }

    fn entries(&self, prefix: &str, from: From) -> Result<Vec<(String, Vec<u8>)>> {
        Ok(match from {
            From::Store => self.backend.list(prefix)?,
            From::Seen => self.backend.seen_list(prefix)?,
        })
    }
}

/// The record of the layers of a VDI of which only its head's lineage is known: all that it reads are one, and what it does
/// not read is gone.
pub(super) fn layers_of_head(lineage: &Lineage, revision: u64) -> VdiLayers {
    let (vdi, _) = lineage.newest();
    let mut whole = VdiLayers {
        revision,
        ..VdiLayers::default()
    };
    let run = |low: u32, high: u32| RunRecord {
        layers: LayerRange {
            low: LayerId(low),
            high: LayerId(high),
        },
        since: revision,
    };
    let mut next = 0;
    for step in lineage.steps().iter().rev().filter(|step| step.vdi == vdi) {
        if step.lowest.0 > next {
            whole.gone.push(run(next, step.lowest.0 - 1));
        }
        whole.merged.push(run(step.lowest.0, step.highest.0));
        next = step.highest.0 + 1;
    }
    whole
}

/// Of a VDI that has no record of its layers: all up to the head are one, so that nothing is ever hidden.
fn unwritten(head: LayerId) -> VdiLayers {
    let all = RunRecord {
        layers: LayerRange {
            low: LayerId(0),
            high: head,
        },
        since: 0,
    };
    VdiLayers {
        merged: if head == LayerId(0) { Vec::new() } else { vec![all] },
        ..VdiLayers::default()
    }
}

/// What it means that layers are there which nobody needs is written with the next change.
fn load(records: impl IntoIterator<Item = VdiRecords>) -> Result<Tree> {
    let loaded = Tree::load(records).map_err(|damaged| RecordError::Damaged {
        key: layers_key(damaged.vdi),
        reason: damaged.reason,
    })?;
    Ok(loaded.0)
}

fn put_layers(change: &mut Transaction, before: &VdiRecords, after: &VdiRecords) {
    if before.whole != after.whole {
        put(change, &layers_key(after.vdi), &after.whole);
    }
    let by_layer = |records: &VdiRecords| -> BTreeMap<LayerId, LayerRecord> {
        let layers = records.layers.iter();
        layers.map(|record| (record.layer, record.clone())).collect()
    };
    let (old, new) = (by_layer(before), by_layer(after));
    let gone = old.keys().filter(|layer| !new.contains_key(layer));
    change
        .deletes
        .extend(gone.map(|layer| snapshot_key(after.vdi, *layer)));
    for (layer, record) in &new {
        if old.get(layer) != Some(record) {
            put(change, &snapshot_key(after.vdi, *layer), record);
        }
    }
}
