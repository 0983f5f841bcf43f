//! The tree as records, and back: what came from a store or a disk is checked here, once.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use types::{LayerId, VdiId};

use super::nodes::{Kind, Layers, Node, Run};
use super::{LayerRange, Origin, Outcome, Result, SNAPSHOTS_MAX, Snapshot, Tree};
use crate::name::VdiName;

/// What belongs to a VDI as a whole, beside the number of its head. Of a VDI that never was snapshotted: the default.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VdiLayers {
    /// The layer under the head, of the same VDI.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub below: Option<LayerId>,
    /// What a clone began with, until it is flattened.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<Origin>,
    /// Grows with each operation on the layers.
    #[serde(default, skip_serializing_if = "is_none_yet")]
    pub revision: u64,
    /// What was merged into the head and is not settled; absent: nothing.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub merged: Vec<RunRecord>,
    /// What is gone and not settled; absent: nothing.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gone: Vec<RunRecord>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks so")]
fn is_none_yet(revision: &u64) -> bool {
    *revision == 0
}

/// A layer that is left and not the head: one record each.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerRecord {
    /// Its number.
    pub layer: LayerId,
    /// The next older one, of the same VDI.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub below: Option<LayerId>,
    /// Absent: it is no snapshot's (any more), but others need it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<Snapshot>,
    /// Between the halves of a snapshot: it waits for its name, or to be given up.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub sealed: bool,
    /// What was merged into it and is not settled; absent: nothing.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub merged: Vec<RunRecord>,
}

/// Numbers with one fate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunRecord {
    /// Which.
    #[serde(flatten)]
    pub layers: LayerRange,
    /// The revision in which that became so.
    pub since: u64,
}

/// A VDI's layers as records.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VdiRecords {
    /// The VDI.
    pub vdi: VdiId,
    /// Its name.
    pub name: VdiName,
    /// The layer that takes the writes, and the highest number ever given.
    pub head: LayerId,
    /// What else belongs to it as a whole.
    pub whole: VdiLayers,
    /// Every other layer, by number.
    pub layers: Vec<LayerRecord>,
}

/// Records that no operation can have made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the layers of VDI {vdi} cannot be so: {reason}")]
pub struct Damaged {
    /// Whose.
    pub vdi: VdiId,
    /// What is wrong.
    pub reason: String,
}

impl Tree {
    /// The records of a VDI.
    ///
    /// # Errors
    /// No such VDI.
    pub fn save(&self, vdi: VdiId) -> Result<VdiRecords> {
        let layers = self.layers(vdi)?;
        let whole = VdiLayers {
            below: layers.node(layers.head).below,
            origin: layers.origin,
            revision: layers.revision,
            merged: layers.merged(layers.head),
            gone: layers.records_of(|run| run.owner.is_none()),
        };
        let others = layers.nodes.iter().filter(|(layer, _)| **layer != layers.head);
        let others = others.map(|(layer, node)| LayerRecord {
            layer: *layer,
            below: node.below,
            snapshot: node.snapshot().cloned(),
            sealed: node.kind == Kind::Sealed,
            merged: layers.merged(*layer),
        });
        Ok(VdiRecords {
            vdi,
            name: layers.name.clone(),
            head: layers.head,
            whole,
            layers: others.collect(),
        })
    }

    /// A tree of these VDIs, among which must be all parents of clones. Layers that nobody needs (no operation leaves
    /// such) are merged or dropped, which the caller has to write down and tell.
    ///
    /// # Errors
    /// When the records do not fit together.
    pub fn load(vdis: impl IntoIterator<Item = VdiRecords>) -> std::result::Result<(Tree, Outcome), Damaged> {
        let mut tree = Tree::new();
        let mut origins = BTreeMap::new();
        for records in vdis {
            let vdi = records.vdi;
            let damaged = |reason| Damaged { vdi, reason };
            let layers = read(records).map_err(damaged)?;
            origins.extend(layers.origin.map(|origin| (vdi, origin)));
            if tree.vdis.insert(vdi, layers).is_some() {
                return Err(damaged("there are two of them".to_owned()));
            }
        }
        for (clone, origin) in origins {
            // Ids grow and never come again, so this leaves no circle.
            let is_older = origin.vdi < clone;
            let parent = tree.vdis.get_mut(&origin.vdi).filter(|_| is_older);
            let node = parent
                .filter(|parent| parent.head != origin.layer)
                .and_then(|parent| parent.nodes.get_mut(&origin.layer));
            let Some(node) = node.filter(|node| node.kind != Kind::Base) else {
                let reason = format!(
                    "it began with layer {} of VDI {}, which is not there",
                    origin.layer, origin.vdi
                );
                return Err(Damaged { vdi: clone, reason });
            };
            node.clones.insert(clone);
        }
        let mut outcome = Outcome::default();
        for vdi in tree.vdis.keys().copied().collect::<Vec<_>>() {
            let bare = tree.vdis[&vdi].nodes.iter().rev();
            let bare: Vec<LayerId> = bare
                .filter(|(_, node)| node.is_needless())
                .map(|(layer, _)| *layer)
                .collect();
            if !bare.is_empty() {
                outcome.add(tree.prune(vdi, &bare));
            }
        }
        Ok((tree, outcome))
    }
}

impl Layers {
    /// The runs of a layer except its own number by itself.
    fn merged(&self, layer: LayerId) -> Vec<RunRecord> {
        let all: Vec<RunRecord> = self.runs_of(layer).map(|(low, run)| record(low, run)).collect();
        let is_only_own = all.len() == 1 && all[0].layers.low == layer;
        if is_only_own { Vec::new() } else { all }
    }

    fn records_of(&self, is_asked_for: impl Fn(&Run) -> bool) -> Vec<RunRecord> {
        let runs = self.runs.iter().filter(|(_, run)| is_asked_for(run));
        runs.map(|(low, run)| record(*low, *run)).collect()
    }
}

fn record(low: LayerId, run: Run) -> RunRecord {
    let layers = LayerRange { low, high: run.high };
    RunRecord {
        layers,
        since: run.since,
    }
}

fn read(records: VdiRecords) -> std::result::Result<Layers, String> {
    let VdiRecords {
        name,
        head,
        whole,
        layers: others,
        ..
    } = records;
    if others.len() > 2 * SNAPSHOTS_MAX {
        return Err(format!("{} layers are more than there can be", others.len()));
    }
    let mut layers = Layers {
        name,
        origin: whole.origin,
        head,
        revision: whole.revision,
        nodes: BTreeMap::new(),
        names: BTreeMap::new(),
        runs: BTreeMap::new(),
    };
    layers.read_node(head, whole.below, Kind::Head, &whole.merged)?;
    for other in others {
        if other.layer >= layers.head {
            return Err(format!(
                "layer {} is not below the head, {}",
                other.layer, layers.head
            ));
        }
        let is_base = other.layer.0 == 0 && layers.origin.is_some();
        let kind = match other.snapshot {
            Some(_) if is_base || other.sealed => {
                return Err(format!("layer {} is no snapshot's", other.layer));
            }
            Some(snapshot) => {
                let name = snapshot.name.clone();
                if layers.names.insert(name.clone(), other.layer).is_some() {
                    return Err(format!("two snapshots are called '{name}'"));
                }
                Kind::Named(snapshot)
            }
            None if is_base => Kind::Base,
            None if other.sealed => Kind::Sealed,
            None => Kind::Bare,
        };
        layers.read_node(other.layer, other.below, kind, &other.merged)?;
    }
    layers.read_runs(&whole.gone, None, None)?;
    layers.link()?;
    Ok(layers)
}

impl Layers {
    fn read_node(
        &mut self,
        layer: LayerId,
        below: Option<LayerId>,
        kind: Kind,
        merged: &[RunRecord],
    ) -> std::result::Result<(), String> {
        if below.is_some_and(|below| below >= layer) {
            return Err(format!("what is below layer {layer} is not older"));
        }
        let node = Node {
            kind,
            below,
            above: BTreeSet::new(),
            clones: BTreeSet::new(),
        };
        if self.nodes.insert(layer, node).is_some() {
            return Err(format!("layer {layer} is there twice"));
        }
        let own = RunRecord {
            layers: LayerRange {
                low: layer,
                high: layer,
            },
            since: 0,
        };
        let runs = if merged.is_empty() { &[own] } else { merged };
        if runs.last().is_none_or(|last| last.layers.high != layer) {
            return Err(format!("what was merged into layer {layer} does not end with it"));
        }
        self.read_runs(runs, below, Some(layer))
    }

    fn read_runs(
        &mut self,
        runs: &[RunRecord],
        below: Option<LayerId>,
        owner: Option<LayerId>,
    ) -> std::result::Result<(), String> {
        let high_max = owner.unwrap_or(self.head);
        for RunRecord { layers, since } in runs {
            let LayerRange { low, high } = *layers;
            let is_possible = low <= high
                && high <= high_max
                && below.is_none_or(|below| below < low)
                && *since <= self.revision;
            let run = Run {
                high,
                owner,
                since: *since,
            };
            if !is_possible || self.runs.insert(low, run).is_some() {
                return Err(format!("layers {layers} cannot have become one, or be gone"));
            }
        }
        Ok(())
    }

    /// Checks what concerns several layers, and fills in what follows from the rest.
    fn link(&mut self) -> std::result::Result<(), String> {
        let ends: Vec<(LayerId, Run)> = self.runs.iter().map(|(low, run)| (*low, *run)).collect();
        for pair in ends.windows(2) {
            let ((_, before), (low, after)) = (pair[0], pair[1]);
            let touches = before.high.0.checked_add(1) == Some(low.0) && before.owner == after.owner;
            if before.high >= low || touches {
                return Err(format!("layer {low} has two fates"));
            }
        }
        let links: Vec<(LayerId, Option<LayerId>)> = self
            .nodes
            .iter()
            .map(|(layer, node)| (*layer, node.below))
            .collect();
        let mut lowest = 0;
        for (layer, below) in links {
            match below {
                None => lowest += 1,
                Some(below) => {
                    let under = self.nodes.get_mut(&below);
                    let under = under.ok_or_else(|| format!("layer {below} is not there"))?;
                    under.above.insert(layer);
                }
            }
        }
        if lowest != 1 {
            return Err(format!("{lowest} layers have nothing below them"));
        }
        let base = self
            .nodes
            .get(&LayerId(0))
            .is_some_and(|node| node.kind == Kind::Base);
        if self.origin.is_some() != base {
            return Err("a clone has no layer 0".to_owned());
        }
        Ok(())
    }
}
