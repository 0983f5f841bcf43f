//! The tree of layers of all VDIs, and what each change of it means for the log.
//!
//! ```text
//!  VDI 3 "web01"   1 ◀── 4 ◀── 9 head          rolled back to @a; 5 to 8 are gone
//!                  @a    │
//!                        └ @b ◀── VDI 7 "test": 0 ◀── 1 head
//!
//!  lineage of VDI 7's head: 7:0..1, 3:2..4, 3:0..1      (neighbours are one step: 7:0..1, 3:0..4)
//! ```
//!
//! A layer that is left is a node; numbers that are not are in *runs*. A run belongs to the node into which its layers
//! were merged, or to nobody: they are gone. A node's lineage is its runs and those of all nodes below it, so a merge
//! changes no lineage: it is the same list before the log heard of it and after. That is what lets replicas
//! follow when they can. When all have ([`Tree::settle`]) the numbers that are no node's own are forgotten, and
//! a step may reach over them.
//!
//! Costs: a node is some 200 bytes. Taking and deleting cost the logarithm of the number of layers, a lineage the number
//! of nodes below it (10,000 snapshots: see the README).

mod nodes;
mod records;
mod refusal;

use std::collections::BTreeMap;
use std::fmt;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use types::{LayerId, Lineage, VdiId};

use nodes::{Kind, Layers, Node};
pub use records::{Damaged, LayerRecord, RunRecord, VdiLayers, VdiRecords};
pub use refusal::Refusal;

use crate::name::{SnapshotName, VdiName};

/// Most snapshots of one VDI.
pub const SNAPSHOTS_MAX: usize = 65_536;

/// A named state of a VDI.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Unique in its VDI.
    pub name: SnapshotName,
    /// When it was taken.
    pub created: Timestamp,
    /// The VDI's virtual size then.
    pub bytes: u64,
    /// Not to be deleted, by hand or by a schedule.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub protected: bool,
}

/// How a VDI was when a snapshot of it was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taken {
    /// When.
    pub at: Timestamp,
    /// Its virtual size.
    pub bytes: u64,
}

/// A state that a clone began with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Origin {
    /// Of which VDI.
    pub vdi: VdiId,
    /// Its highest layer.
    pub layer: LayerId,
}

/// Where a VDI's writes go from now on, and what its readers see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    /// Of which VDI.
    pub vdi: VdiId,
    /// Never had before.
    pub layer: LayerId,
    /// With `layer` as its newest.
    pub lineage: Lineage,
}

/// Layers from `low` to `high`, both of them among it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct LayerRange {
    /// The oldest.
    pub low: LayerId,
    /// The newest.
    pub high: LayerId,
}

impl fmt::Display for LayerRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.low == self.high {
            return write!(f, "{}", self.low);
        }
        write!(f, "{} to {}", self.low, self.high)
    }
}

/// What every replica of a VDI is to be told. Saying it again, or a later one before an earlier one was heard, does no
/// harm: each says all that is true of the layers it names. Ranges are sorted and do not touch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// These are one layer now. Where two of them have a block, the later one's counts.
    One {
        /// Of which VDI.
        vdi: VdiId,
        /// Which, `called` among them. Layers between two ranges are others'.
        layers: Vec<LayerRange>,
        /// The highest.
        called: LayerId,
    },
    /// Nobody reads these again.
    Gone {
        /// Of which VDI.
        vdi: VdiId,
        /// Which.
        layers: Vec<LayerRange>,
    },
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (vdi, layers) = match self {
            Change::One { vdi, layers, .. } | Change::Gone { vdi, layers } => (vdi, layers),
        };
        write!(f, "VDI {vdi}: layers")?;
        for (at, range) in layers.iter().enumerate() {
            write!(f, "{} {range}", if at == 0 { "" } else { "," })?;
        }
        match self {
            Change::One { called, .. } => write!(
                f,
                " are one, called {called}: whoever reads one of them reads {called} before it"
            ),
            Change::Gone { .. } => f.write_str(" are gone: nobody reads them"),
        }
    }
}

/// A layer that lost its name, and whose data stays for a while.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stays {
    /// Of which VDI.
    pub vdi: VdiId,
    /// Which.
    pub layer: LayerId,
    /// The layers that follow it, each on a branch of its own: until one is left.
    pub branches: Vec<LayerId>,
    /// VDIs that began with it.
    pub clones: Vec<VdiName>,
}

/// What an operation meant for the log.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// To be told to the replicas; sorted by VDI and layer.
    pub changes: Vec<Change>,
    /// What it could not free yet.
    pub stays: Vec<Stays>,
}

/// All VDIs with their layers. An operation that is refused has changed nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tree {
    vdis: BTreeMap<VdiId, Layers>,
}

type Result<T> = std::result::Result<T, Refusal>;

impl Tree {
    /// Without VDIs.
    #[must_use]
    pub fn new() -> Tree {
        Tree::default()
    }

    /// A VDI that begins empty, with layer 0 as its head.
    ///
    /// # Panics
    /// When the id is there already: ids are never used again.
    pub fn create(&mut self, vdi: VdiId, name: VdiName) -> Head {
        self.add(vdi, Layers::new(name, None));
        self.head(vdi).expect("just made")
    }

    /// Takes a snapshot: the head's layer becomes the snapshot's.
    ///
    /// # Errors
    /// The name is taken, or there are too many.
    pub fn take(&mut self, vdi: VdiId, name: SnapshotName, taken: Taken) -> Result<Head> {
        self.layers(vdi)?.check_name(&name)?;
        let sealed = self.layers(vdi)?.head;
        let head = self.raise(vdi)?;
        self.name_sealed(vdi, sealed, name, taken)?;
        Ok(head)
    }

    /// Whether a snapshot of this name can be taken.
    ///
    /// # Errors
    /// The name is taken, or there are too many.
    pub fn require_free(&self, vdi: VdiId, name: &SnapshotName) -> Result<()> {
        self.layers(vdi)?.check_name(name)
    }

    /// The first half of a snapshot under load: from now on writes say a new layer. The old one waits for
    /// [`name_sealed`](Self::name_sealed) or [`give_up`](Self::give_up), and is merged with nothing until then.
    ///
    /// # Errors
    /// No such VDI; its numbers are used up.
    pub fn raise(&mut self, vdi: VdiId) -> Result<Head> {
        let layers = self.layers_mut(vdi)?;
        let sealed = layers.head;
        layers.grow(sealed)?;
        layers.node_mut(sealed).kind = Kind::Sealed;
        self.head(vdi)
    }

    /// The second half: all writes of the old layer are complete and flushed.
    ///
    /// # Errors
    /// The name is taken, or there are too many.
    ///
    /// # Panics
    /// When `layer` was not sealed by [`raise`](Self::raise).
    pub fn name_sealed(
        &mut self,
        vdi: VdiId,
        layer: LayerId,
        name: SnapshotName,
        taken: Taken,
    ) -> Result<()> {
        let layers = self.layers_mut(vdi)?;
        layers.check_name(&name)?;
        let node = layers.node_mut(layer);
        assert_eq!(
            node.kind,
            Kind::Sealed,
            "layer {layer} of VDI {vdi} waits for its name"
        );
        node.kind = Kind::Named(Snapshot {
            name: name.clone(),
            created: taken.at,
            bytes: taken.bytes,
            protected: false,
        });
        layers.names.insert(name, layer);
        Ok(())
    }

    /// The other way to end it: no snapshot, and the old layer goes on in the new one.
    ///
    /// # Errors
    /// No such VDI.
    ///
    /// # Panics
    /// When `layer` was not sealed by [`raise`](Self::raise).
    pub fn give_up(&mut self, vdi: VdiId, layer: LayerId) -> Result<Outcome> {
        let layers = self.layers_mut(vdi)?;
        let node = layers.node_mut(layer);
        assert_eq!(
            node.kind,
            Kind::Sealed,
            "layer {layer} of VDI {vdi} waits for its name"
        );
        node.kind = Kind::Bare;
        Ok(self.prune(vdi, &[layer]))
    }

    /// Goes back to a snapshot: a new head on top of it. What the head held before is kept under `keep`, or gone.
    ///
    /// # Errors
    /// No such snapshot, the name to keep is taken, or the lineage would get too long.
    pub fn roll_back(
        &mut self,
        vdi: VdiId,
        to: &SnapshotName,
        keep: Option<(SnapshotName, Taken)>,
    ) -> Result<(Head, Outcome)> {
        let layers = self.layers(vdi)?;
        let target = layers.named(to)?;
        let left = layers.head;
        if let Some((name, _)) = &keep {
            layers.check_name(name)?;
        }
        self.check_steps(vdi, target)?;
        let layers = self.layers_mut(vdi)?;
        layers.grow(target)?;
        let old_head = layers.node_mut(left);
        let Some((name, taken)) = keep else {
            old_head.kind = Kind::Bare;
            let outcome = self.prune(vdi, &[left]);
            return Ok((self.head(vdi)?, outcome));
        };
        old_head.kind = Kind::Sealed;
        self.name_sealed(vdi, left, name, taken)?;
        Ok((self.head(vdi)?, Outcome::default()))
    }

    /// A new VDI that begins with what a snapshot holds. Its layer 0 is empty, for what it is to have of its
    /// ancestors itself; its head is layer 1.
    ///
    /// # Errors
    /// No such snapshot; the lineage would get too long.
    ///
    /// # Panics
    /// When `clone` is there already.
    pub fn clone_of(
        &mut self,
        vdi: VdiId,
        snapshot: &SnapshotName,
        clone: VdiId,
        name: VdiName,
    ) -> Result<Head> {
        let layer = self.layers(vdi)?.named(snapshot)?;
        self.check_steps(vdi, layer)?;
        self.add(clone, Layers::new(name, Some(Origin { vdi, layer })));
        self.layers_mut(vdi)?.node_mut(layer).clones.insert(clone);
        self.head(clone)
    }

    /// Deletes snapshots of one VDI, all or none; together they mean fewer changes than one by one.
    ///
    /// # Errors
    /// One is not there, is protected, or clones began with it.
    pub fn delete(&mut self, vdi: VdiId, names: &[SnapshotName]) -> Result<Outcome> {
        let layers = self.layers(vdi)?;
        for name in names {
            let node = layers.node(layers.named(name)?);
            if node.snapshot().is_some_and(|snapshot| snapshot.protected) {
                return Err(Refusal::Protected {
                    vdi: layers.name.clone(),
                    snapshot: name.clone(),
                });
            }
            if !node.clones.is_empty() {
                return Err(Refusal::ClonesNeed {
                    vdi: layers.name.clone(),
                    snapshot: Some(name.clone()),
                    clones: self.names_of(&node.clones),
                });
            }
        }
        let layers = self.layers_mut(vdi)?;
        let mut bare = Vec::with_capacity(names.len());
        for name in names {
            // A name that is said twice is gone the second time.
            if let Some(layer) = layers.names.remove(name) {
                layers.node_mut(layer).kind = Kind::Bare;
                bare.push(layer);
            }
        }
        Ok(self.prune(vdi, &bare))
    }

    /// Sets or takes away a snapshot's protection.
    ///
    /// # Errors
    /// No such snapshot.
    pub fn protect(&mut self, vdi: VdiId, name: &SnapshotName, protected: bool) -> Result<()> {
        let layers = self.layers_mut(vdi)?;
        let layer = layers.named(name)?;
        if let Kind::Named(snapshot) = &mut layers.node_mut(layer).kind {
            snapshot.protected = protected;
        }
        Ok(())
    }

    /// A clone has in its layer 0, on every replica, all it had of its ancestors: it needs them no more.
    ///
    /// # Errors
    /// It is no clone.
    pub fn flattened(&mut self, vdi: VdiId) -> Result<Outcome> {
        let layers = self.layers_mut(vdi)?;
        let Some(origin) = layers.origin.take() else {
            return Err(Refusal::NotAClone(layers.name.clone()));
        };
        layers.node_mut(LayerId(0)).kind = Kind::Bare;
        let mut outcome = self.prune(vdi, &[LayerId(0)]);
        outcome.add(self.release(origin, vdi));
        Ok(outcome)
    }

    /// A VDI goes with all of its snapshots.
    ///
    /// # Errors
    /// Clones began with one of them, or one is protected.
    pub fn delete_vdi(&mut self, vdi: VdiId) -> Result<Outcome> {
        let layers = self.layers(vdi)?;
        let clones: Vec<VdiName> = layers
            .nodes
            .values()
            .flat_map(|node| self.names_of(&node.clones))
            .collect();
        if !clones.is_empty() {
            return Err(Refusal::ClonesNeed {
                vdi: layers.name.clone(),
                snapshot: None,
                clones,
            });
        }
        let protected = layers.nodes.values().filter_map(Node::snapshot);
        if let Some(snapshot) = protected.into_iter().find(|snapshot| snapshot.protected) {
            return Err(Refusal::Protected {
                vdi: layers.name.clone(),
                snapshot: snapshot.name.clone(),
            });
        }
        let origin = layers.origin;
        let all = LayerRange {
            low: LayerId(0),
            high: layers.head,
        };
        self.vdis.remove(&vdi);
        let mut outcome = Outcome {
            changes: vec![Change::Gone {
                vdi,
                layers: vec![all],
            }],
            stays: Vec::new(),
        };
        if let Some(origin) = origin {
            outcome.add(self.release(origin, vdi));
        }
        Ok(outcome)
    }

    /// Every replica of the VDI, also those that are away, has followed all changes up to `revision` before it
    /// answers the next read: numbers that are no layer's any more are forgotten.
    ///
    /// # Errors
    /// No such VDI.
    pub fn settle(&mut self, vdi: VdiId, revision: u64) -> Result<()> {
        self.layers_mut(vdi)?.settle(revision);
        Ok(())
    }

    /// All changes that are not settled, as one statement: what a replica is told that was away.
    ///
    /// # Errors
    /// No such VDI.
    pub fn unsettled(&self, vdi: VdiId) -> Result<Vec<Change>> {
        Ok(self.layers(vdi)?.unsettled(vdi))
    }

    /// Grows with each operation that changed what layers there are.
    ///
    /// # Errors
    /// No such VDI.
    pub fn revision(&self, vdi: VdiId) -> Result<u64> {
        Ok(self.layers(vdi)?.revision)
    }

    /// The head of a VDI.
    ///
    /// # Errors
    /// No such VDI.
    pub fn head(&self, vdi: VdiId) -> Result<Head> {
        let layer = self.layers(vdi)?.head;
        Ok(Head {
            vdi,
            layer,
            lineage: self.lineage(vdi, layer)?,
        })
    }

    /// What a clone began with, until it is flattened.
    ///
    /// # Errors
    /// No such VDI.
    pub fn origin(&self, vdi: VdiId) -> Result<Option<Origin>> {
        Ok(self.layers(vdi)?.origin)
    }

    /// The snapshots of a VDI with their layers, the oldest first.
    ///
    /// # Errors
    /// No such VDI.
    pub fn snapshots(&self, vdi: VdiId) -> Result<impl Iterator<Item = (LayerId, &Snapshot)>> {
        let nodes = &self.layers(vdi)?.nodes;
        Ok(nodes
            .iter()
            .filter_map(|(layer, node)| Some((*layer, node.snapshot()?))))
    }

    /// The snapshot of a layer, if it is one's.
    ///
    /// # Errors
    /// No such VDI.
    pub fn snapshot_of(&self, vdi: VdiId, layer: LayerId) -> Result<Option<&Snapshot>> {
        let nodes = &self.layers(vdi)?.nodes;
        Ok(nodes.get(&layer).and_then(Node::snapshot))
    }

    /// Layers that wait for their names, or to be given up: what a writer that died between the halves of a snapshot
    /// left to the next one.
    ///
    /// # Errors
    /// No such VDI.
    pub fn sealed(&self, vdi: VdiId) -> Result<impl Iterator<Item = LayerId>> {
        let nodes = self.layers(vdi)?.nodes.iter();
        Ok(nodes
            .filter(|(_, node)| node.kind == Kind::Sealed)
            .map(|(layer, _)| *layer))
    }

    /// The layer of a snapshot.
    ///
    /// # Errors
    /// No such snapshot.
    pub fn find(&self, vdi: VdiId, name: &SnapshotName) -> Result<LayerId> {
        self.layers(vdi)?.named(name)
    }

    /// The layer under `layer`, of the same VDI or what a clone began with: what a drawing of the tree needs.
    ///
    /// # Errors
    /// No such VDI.
    ///
    /// # Panics
    /// When there is no such layer.
    pub fn below(&self, vdi: VdiId, layer: LayerId) -> Result<Option<Origin>> {
        let layers = self.layers(vdi)?;
        let below = layers.node(layer).below;
        Ok(below.map_or(layers.origin, |layer| Some(Origin { vdi, layer })))
    }

    /// The VDIs that began with a layer.
    ///
    /// # Errors
    /// No such VDI.
    ///
    /// # Panics
    /// When there is no such layer.
    pub fn clones(&self, vdi: VdiId, layer: LayerId) -> Result<impl Iterator<Item = VdiId>> {
        Ok(self.layers(vdi)?.node(layer).clones.iter().copied())
    }

    /// What a reader of a layer sees.
    ///
    /// # Errors
    /// No such VDI.
    ///
    /// # Panics
    /// When there is no such layer.
    pub fn lineage(&self, vdi: VdiId, layer: LayerId) -> Result<Lineage> {
        let mut steps = Vec::new();
        let mut at = Some(Origin { vdi, layer });
        while let Some(Origin { vdi, layer }) = at {
            let layers = self.layers(vdi)?;
            layers.descend(vdi, layer, &mut steps);
            at = layers.origin;
        }
        // No operation makes one too long; records that were read may.
        Lineage::new(&steps).map_err(|_| self.too_deep(vdi))
    }

    fn add(&mut self, vdi: VdiId, layers: Layers) {
        let before = self.vdis.insert(vdi, layers);
        assert!(before.is_none(), "VDI {vdi} is there already");
    }

    fn layers(&self, vdi: VdiId) -> Result<&Layers> {
        self.vdis.get(&vdi).ok_or(Refusal::NoVdi(vdi))
    }

    fn layers_mut(&mut self, vdi: VdiId) -> Result<&mut Layers> {
        self.vdis.get_mut(&vdi).ok_or(Refusal::NoVdi(vdi))
    }

    fn names_of<'a>(&self, vdis: impl IntoIterator<Item = &'a VdiId>) -> Vec<VdiName> {
        vdis.into_iter().map(|vdi| self.vdis[vdi].name.clone()).collect()
    }

    /// One more step on top of this layer has to be allowed.
    fn check_steps(&self, vdi: VdiId, layer: LayerId) -> Result<()> {
        let steps = self.lineage(vdi, layer)?.steps().len();
        if steps < Lineage::STEPS_MAX {
            return Ok(());
        }
        Err(self.too_deep(vdi))
    }

    fn too_deep(&self, vdi: VdiId) -> Refusal {
        let layers = &self.vdis[&vdi];
        Refusal::TooDeep {
            vdi: layers.name.clone(),
            is_clone: layers.origin.is_some(),
        }
    }

    /// A clone needs its origin no more.
    fn release(&mut self, origin: Origin, clone: VdiId) -> Outcome {
        let layers = self.vdis.get_mut(&origin.vdi).expect("a clone's parent is kept");
        let was_there = layers.node_mut(origin.layer).clones.remove(&clone);
        assert!(was_there, "VDI {} does not know its clone {clone}", origin.vdi);
        self.prune(origin.vdi, &[origin.layer])
    }

    /// Merges and drops what of these layers nobody needs.
    fn prune(&mut self, vdi: VdiId, layers: &[LayerId]) -> Outcome {
        let of_vdi = self.vdis.get_mut(&vdi).expect("the caller has looked");
        let (changes, stay) = of_vdi.prune(vdi, layers);
        let of_vdi = &self.vdis[&vdi];
        let stays = stay.into_iter().map(|layer| {
            let node = of_vdi.node(layer);
            Stays {
                vdi,
                layer,
                branches: node.above.iter().copied().collect(),
                clones: self.names_of(&node.clones),
            }
        });
        Outcome {
            changes,
            stays: stays.collect(),
        }
    }
}

impl Outcome {
    fn add(&mut self, other: Outcome) {
        self.changes.extend(other.changes);
        self.stays.extend(other.stays);
    }
}

#[cfg(test)]
mod tests;
