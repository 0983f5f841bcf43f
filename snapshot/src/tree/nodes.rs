//! The layers of one VDI: those that are left, and what became of the other numbers.

use std::collections::{BTreeMap, BTreeSet};

use types::{LayerId, LineageStep, VdiId};

use super::{Change, LayerRange, Origin, Refusal, SNAPSHOTS_MAX, Snapshot};
use crate::name::{SnapshotName, VdiName};

/// What a layer that is left is there for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Takes the writes.
    Head,
    /// Between the halves of a snapshot.
    Sealed,
    /// A snapshot's.
    Named(Snapshot),
    /// Layer 0 of a clone: takes what it brings from its ancestors.
    Base,
    /// Has no name any more: stays only while several branches or a clone need it.
    Bare,
}

/// A layer that is left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Node {
    pub kind: Kind,
    /// The next older one, of the same VDI.
    pub below: Option<LayerId>,
    /// The next newer ones, of the same VDI.
    pub above: BTreeSet<LayerId>,
    /// VDIs that began with it.
    pub clones: BTreeSet<VdiId>,
}

impl Node {
    /// Whether it can be merged or dropped.
    pub fn is_needless(&self) -> bool {
        self.kind == Kind::Bare && self.clones.is_empty() && self.above.len() <= 1
    }

    pub fn snapshot(&self) -> Option<&Snapshot> {
        match &self.kind {
            Kind::Named(snapshot) => Some(snapshot),
            _ => None,
        }
    }
}

/// Numbers of layers with one fate. Its lowest is its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub high: LayerId,
    /// The node that they are part of, with the highest number of them all; nobody's are gone.
    pub owner: Option<LayerId>,
    /// The revision in which that became so; 0 for a node's own number by itself.
    pub since: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Layers {
    pub name: VdiName,
    pub origin: Option<Origin>,
    /// Also the highest number that was ever given.
    pub head: LayerId,
    pub revision: u64,
    pub nodes: BTreeMap<LayerId, Node>,
    pub names: BTreeMap<SnapshotName, LayerId>,
    /// By their lowest, none touching one of the same owner. What is in none is forgotten: no replica has it.
    pub runs: BTreeMap<LayerId, Run>,
}

fn next(layer: LayerId) -> LayerId {
    LayerId(layer.0 + 1)
}

impl Layers {
    pub fn new(name: VdiName, origin: Option<Origin>) -> Layers {
        let mut layers = Layers {
            name,
            origin,
            head: LayerId(0),
            revision: 0,
            nodes: BTreeMap::new(),
            names: BTreeMap::new(),
            runs: BTreeMap::new(),
        };
        layers.add_node(LayerId(0), None);
        if origin.is_some() {
            layers.node_mut(LayerId(0)).kind = Kind::Base;
            layers.head = LayerId(1);
            layers.add_node(LayerId(1), Some(LayerId(0)));
        }
        layers
    }

    pub fn node(&self, layer: LayerId) -> &Node {
        let node = self.nodes.get(&layer);
        node.unwrap_or_else(|| panic!("VDI '{}' has no layer {layer}", self.name))
    }

    pub fn node_mut(&mut self, layer: LayerId) -> &mut Node {
        let node = self.nodes.get_mut(&layer);
        node.unwrap_or_else(|| panic!("VDI '{}' has no layer {layer}", self.name))
    }

    pub fn named(&self, name: &SnapshotName) -> Result<LayerId, Refusal> {
        let layer = self.names.get(name).copied();
        layer.ok_or_else(|| Refusal::NoSnapshot {
            vdi: self.name.clone(),
            snapshot: name.clone(),
        })
    }

    pub fn check_name(&self, name: &SnapshotName) -> Result<(), Refusal> {
        if self.names.contains_key(name) {
            return Err(Refusal::NameTaken {
                vdi: self.name.clone(),
                snapshot: name.clone(),
            });
        }
        if self.names.len() >= SNAPSHOTS_MAX {
            return Err(Refusal::TooMany(self.name.clone()));
        }
        Ok(())
    }

    /// A new head above `below`. The old one stays a head by its kind until the caller says what it is.
    pub fn grow(&mut self, below: LayerId) -> Result<(), Refusal> {
        if self.head.0 == u32::MAX {
            return Err(Refusal::NumbersExhausted(self.name.clone()));
        }
        self.revision += 1;
        self.head = next(self.head);
        self.add_node(self.head, Some(below));
        Ok(())
    }

    fn add_node(&mut self, layer: LayerId, below: Option<LayerId>) {
        let node = Node {
            kind: Kind::Head,
            below,
            above: BTreeSet::new(),
            clones: BTreeSet::new(),
        };
        self.nodes.insert(layer, node);
        let run = Run {
            high: layer,
            owner: Some(layer),
            since: 0,
        };
        self.runs.insert(layer, run);
        if let Some(below) = below {
            self.node_mut(below).above.insert(layer);
        }
    }

    /// Frees what of these nobody needs, and what is not needed any more because of that. Returns what to tell the
    /// replicas, and which of the given stay without a name.
    pub fn prune(&mut self, vdi: VdiId, layers: &[LayerId]) -> (Vec<Change>, Vec<LayerId>) {
        self.revision += 1;
        let mut merged_into = BTreeSet::new();
        let mut gone = false;
        for layer in layers {
            let mut at = Some(*layer);
            while let Some(layer) = at {
                // A layer that was given may be gone with another.
                let Some(node) = self.nodes.get(&layer) else { break };
                if !node.is_needless() {
                    break;
                }
                let (below, above) = (node.below, node.above.first().copied());
                self.nodes.remove(&layer);
                merged_into.remove(&layer);
                self.give_runs(layer, below, above);
                if let Some(below) = below {
                    let under = self.node_mut(below);
                    under.above.remove(&layer);
                    under.above.extend(above);
                }
                match above {
                    Some(above) => {
                        self.node_mut(above).below = below;
                        merged_into.insert(above);
                        at = None;
                    }
                    None => {
                        gone = true;
                        at = below;
                    }
                }
            }
        }
        let mut changes: Vec<Change> = merged_into.iter().map(|layer| self.one(vdi, *layer)).collect();
        if gone {
            changes.extend(self.gone(vdi, |run| run.since == self.revision));
        }
        let stay = layers.iter().copied().filter(|layer| {
            let node = self.nodes.get(layer);
            node.is_some_and(|node| node.kind == Kind::Bare)
        });
        (changes, stay.collect())
    }

    /// The lowest number that a run of `layer` can have: all of them are above the next older layer, because what was
    /// merged into it was between.
    fn floor(below: Option<LayerId>) -> LayerId {
        below.map_or(LayerId(0), next)
    }

    pub fn runs_of(&self, layer: LayerId) -> impl DoubleEndedIterator<Item = (LayerId, Run)> {
        let floor = Self::floor(self.node(layer).below);
        self.runs
            .range(floor..=layer)
            .filter(move |(_, run)| run.owner == Some(layer))
            .map(|(low, run)| (*low, *run))
    }

    /// The runs of a layer that leaves, over `below`, are another's, or nobody's.
    fn give_runs(&mut self, layer: LayerId, below: Option<LayerId>, to: Option<LayerId>) {
        let moving: Vec<LayerId> = self
            .runs
            .range(Self::floor(below)..=layer)
            .filter(|(_, run)| run.owner == Some(layer))
            .map(|(low, _)| *low)
            .collect();
        for low in moving {
            let run = self.runs.get_mut(&low).expect("just found");
            run.owner = to;
            run.since = self.revision;
            self.join(low);
        }
    }

    /// Joins the run at `low` with the neighbours that have the same owner.
    fn join(&mut self, low: LayerId) {
        let run = self.runs[&low];
        if run.high.0 < u32::MAX
            && let Some(after) = self.runs.get(&next(run.high)).copied()
            && after.owner == run.owner
        {
            self.runs.remove(&next(run.high));
            let joined = Run {
                high: after.high,
                since: run.since.max(after.since),
                ..run
            };
            self.runs.insert(low, joined);
        }
        let run = self.runs[&low];
        if let Some((_, before)) = self.runs.range_mut(..low).next_back()
            && next(before.high) == low
            && before.owner == run.owner
        {
            before.high = run.high;
            before.since = before.since.max(run.since);
            self.runs.remove(&low);
        }
    }

    fn one(&self, vdi: VdiId, called: LayerId) -> Change {
        Change::One {
            vdi,
            layers: self.runs_of(called).map(|(low, run)| range(low, run)).collect(),
            called,
        }
    }

    fn gone(&self, vdi: VdiId, counts: impl Fn(&Run) -> bool) -> Option<Change> {
        let runs = self
            .runs
            .iter()
            .filter(|(_, run)| run.owner.is_none() && counts(run));
        let layers: Vec<LayerRange> = runs.map(|(low, run)| range(*low, *run)).collect();
        (!layers.is_empty()).then_some(Change::Gone { vdi, layers })
    }

    pub fn unsettled(&self, vdi: VdiId) -> Vec<Change> {
        let merged: BTreeSet<LayerId> = self
            .runs
            .iter()
            .filter_map(|(low, run)| run.owner.filter(|owner| owner != low))
            .collect();
        let mut changes: Vec<Change> = merged.into_iter().map(|layer| self.one(vdi, layer)).collect();
        changes.extend(self.gone(vdi, |_| true));
        changes
    }

    pub fn settle(&mut self, revision: u64) {
        let mut own = Vec::new();
        self.runs.retain(|low, run| {
            let is_only_own = run.owner == Some(*low);
            if run.since > revision || is_only_own {
                return true;
            }
            if run.owner == Some(run.high) {
                own.push((run.high, Run { since: 0, ..*run }));
            }
            false
        });
        self.runs.extend(own);
    }

    /// Adds the layer and all below it to the steps of a lineage. A step reaches over numbers that nobody has.
    pub fn descend(&self, vdi: VdiId, layer: LayerId, steps: &mut Vec<LineageStep>) {
        let is_free = |low, high| self.runs.range(low..high).next().is_none();
        let mut at = Some(layer);
        while let Some(layer) = at {
            for (lowest, run) in self.runs_of(layer).rev() {
                let highest = run.high;
                match steps.last_mut() {
                    Some(last) if last.vdi == vdi && is_free(next(highest), last.lowest) => {
                        last.lowest = lowest;
                    }
                    _ => steps.push(LineageStep { vdi, lowest, highest }),
                }
            }
            at = self.node(layer).below;
        }
    }
}

fn range(low: LayerId, run: Run) -> LayerRange {
    LayerRange { low, high: run.high }
}
