//! Random operations, with a full copy of every state beside the tree, and replicas that follow at their own pace.
//!
//! One replica does at once what it is told. One is told in any order, late. One is away and hears, when it comes back,
//! only what is unsettled. All three must read every head and every snapshot as the copies have it, after each
//! operation; and what the first still holds must be needed.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::super::nodes::Run;
use super::*;

const BLOCKS: u32 = 6;
const VDIS_MAX: usize = 6;

/// What each block holds; blocks that were never written are absent.
type Content = BTreeMap<u32, u32>;

/// A replica of everything, by VDI and layer.
#[derive(Clone, Debug, Default)]
struct Replica {
    layers: BTreeMap<(VdiId, LayerId), Content>,
    to_do: Vec<Change>,
}

impl Replica {
    fn write(&mut self, vdi: VdiId, layer: LayerId, block: u32, value: u32) {
        self.layers.entry((vdi, layer)).or_default().insert(block, value);
    }

    fn read(&self, lineage: &Lineage) -> Content {
        let mut content = Content::new();
        for step in lineage.steps() {
            let range = (step.vdi, step.lowest)..=(step.vdi, step.highest);
            for (_, layer) in self.layers.range(range).rev() {
                for (block, value) in layer {
                    content.entry(*block).or_insert(*value);
                }
            }
        }
        content
    }

    fn take_out(&mut self, vdi: VdiId, layers: &[LayerRange]) -> Content {
        let mut all = Content::new();
        for range in layers {
            let range = (vdi, range.low)..=(vdi, range.high);
            let keys: Vec<_> = self.layers.range(range).map(|(key, _)| *key).collect();
            for key in keys {
                // Oldest first: a later block takes the place of an earlier one.
                all.extend(self.layers.remove(&key).unwrap());
            }
        }
        all
    }

    fn follow(&mut self, change: &Change) {
        match change {
            Change::One { vdi, layers, called } => {
                let merged = self.take_out(*vdi, layers);
                if !merged.is_empty() {
                    self.layers.insert((*vdi, *called), merged);
                }
            }
            Change::Gone { vdi, layers } => drop(self.take_out(*vdi, layers)),
        }
    }
}

#[derive(Debug, Default)]
struct World {
    tree: Tree,
    prompt: Replica,
    late: Replica,
    away: Replica,
    heads: BTreeMap<VdiId, Content>,
    snapshots: BTreeMap<(VdiId, SnapshotName), Content>,
    /// Up to which revision of each VDI all replicas have followed.
    followed: BTreeMap<VdiId, u64>,
    vdis_made: u32,
    named: u32,
    writes: u32,
}

/// An operation by number, and two numbers that choose on what.
type Op = (u8, usize, usize);

impl World {
    fn vdi(&self, choice: usize) -> Option<VdiId> {
        let count = self.heads.len();
        (count > 0).then(|| *self.heads.keys().nth(choice % count).unwrap())
    }

    fn snapshot(&self, vdi: VdiId, choice: usize) -> Option<SnapshotName> {
        let of_vdi: Vec<_> = self.tree.snapshots(vdi).unwrap().collect();
        (!of_vdi.is_empty()).then(|| of_vdi[choice % of_vdi.len()].1.name.clone())
    }

    fn new_name(&mut self) -> SnapshotName {
        self.named += 1;
        name(&format!("s{}", self.named))
    }

    fn new_vdi(&mut self) -> (VdiId, VdiName) {
        self.vdis_made += 1;
        (VdiId(self.vdis_made), vdi_name(&format!("v{}", self.vdis_made)))
    }

    fn replicas(&mut self) -> [&mut Replica; 3] {
        [&mut self.prompt, &mut self.late, &mut self.away]
    }

    fn tell(&mut self, outcome: Outcome) {
        for change in outcome.changes {
            self.prompt.follow(&change);
            self.late.to_do.push(change);
        }
    }

    /// The one that was away hears what is unsettled, and that some VDIs are gone for good.
    fn comes_back(&mut self) {
        let vdis: BTreeSet<VdiId> = self.heads.keys().copied().collect();
        self.away.layers.retain(|(vdi, _), _| vdis.contains(vdi));
        for vdi in vdis {
            for change in self.tree.unsettled(vdi).unwrap() {
                self.away.follow(&change);
            }
        }
    }

    fn catches_up(&mut self, mut choice: usize, count: usize) {
        for _ in 0..count.min(self.late.to_do.len()) {
            let change = self.late.to_do.swap_remove(choice % self.late.to_do.len());
            self.late.follow(&change);
            choice /= 2;
        }
    }

    fn step(&mut self, (op, a, b): Op) {
        if self.heads.is_empty() || op == 0 && self.heads.len() < VDIS_MAX {
            let (vdi, name) = self.new_vdi();
            self.tree.create(vdi, name);
            self.heads.insert(vdi, Content::new());
            return;
        }
        let vdi = self.vdi(a).unwrap();
        let snapshot = self.snapshot(vdi, b);
        match (op, snapshot) {
            (1..=5, _) => self.write(vdi, b as u32 % BLOCKS),
            (6..=8, _) => self.take(vdi, b),
            (9..=10, Some(to)) => self.roll_back(vdi, &to, op == 9),
            (11..=12, Some(of)) if self.heads.len() < VDIS_MAX => self.clone_of(vdi, &of),
            (13..=14, Some(doomed)) => self.delete(vdi, &[doomed]),
            (15, Some(_)) => {
                let of_vdi = self.tree.snapshots(vdi).unwrap();
                let some: Vec<_> = of_vdi
                    .enumerate()
                    .filter(|(at, _)| b >> (at % 16) & 1 == 1)
                    .map(|(_, (_, snapshot))| snapshot.name.clone())
                    .collect();
                self.delete(vdi, &some);
            }
            (16, _) => self.bring_block(vdi, b as u32 % BLOCKS),
            (17, _) => self.flatten(vdi),
            (18, _) => self.delete_vdi(vdi),
            (19, _) => self.catches_up(b, a % 4),
            (20, _) => self.comes_back(),
            (21, _) => {
                self.catches_up(b, usize::MAX);
                self.comes_back();
                self.followed.insert(vdi, self.tree.revision(vdi).unwrap());
            }
            // Often long after: what changed since is not settled by it.
            (23, _) => {
                let revision = self.followed.get(&vdi).copied().unwrap_or(0);
                self.tree.settle(vdi, revision).unwrap();
            }
            (22, Some(snapshot)) => self.tree.protect(vdi, &snapshot, a.is_multiple_of(2)).unwrap(),
            _ => {}
        }
    }

    fn write(&mut self, vdi: VdiId, block: u32) {
        self.writes += 1;
        let (value, layer) = (self.writes, self.tree.head(vdi).unwrap().layer);
        self.heads.get_mut(&vdi).unwrap().insert(block, value);
        for replica in self.replicas() {
            replica.write(vdi, layer, block, value);
        }
    }

    fn take(&mut self, vdi: VdiId, choice: usize) {
        let name = self.new_name();
        if choice.is_multiple_of(5) {
            let sealed = self.tree.head(vdi).unwrap().layer;
            self.tree.raise(vdi).unwrap();
            self.check_records();
            if choice.is_multiple_of(2) {
                let outcome = self.tree.give_up(vdi, sealed).unwrap();
                return self.tell(outcome);
            }
            self.tree.name_sealed(vdi, sealed, name.clone(), then()).unwrap();
        } else {
            self.tree.take(vdi, name.clone(), then()).unwrap();
        }
        self.snapshots.insert((vdi, name), self.heads[&vdi].clone());
    }

    fn roll_back(&mut self, vdi: VdiId, to: &SnapshotName, keeps: bool) {
        let keep = keeps.then(|| (self.new_name(), then()));
        let before = self.heads[&vdi].clone();
        let (_, outcome) = self.tree.roll_back(vdi, to, keep.clone()).unwrap();
        self.heads.insert(vdi, self.snapshots[&(vdi, to.clone())].clone());
        if let Some((name, _)) = keep {
            self.snapshots.insert((vdi, name), before);
        }
        self.tell(outcome);
    }

    fn clone_of(&mut self, vdi: VdiId, of: &SnapshotName) {
        let (clone, name) = self.new_vdi();
        self.tree.clone_of(vdi, of, clone, name).unwrap();
        let content = self.snapshots[&(vdi, of.clone())].clone();
        self.heads.insert(clone, content);
    }

    fn delete(&mut self, vdi: VdiId, names: &[SnapshotName]) {
        let before = self.tree.clone();
        match self.tree.delete(vdi, names) {
            Ok(outcome) => {
                for name in names {
                    self.snapshots.remove(&(vdi, name.clone()));
                }
                self.tell(outcome);
            }
            Err(Refusal::Protected { .. } | Refusal::ClonesNeed { .. }) => assert_eq!(self.tree, before),
            Err(other) => panic!("{other}"),
        }
    }

    /// A clone brings a block of its ancestors into its layer 0: nobody sees a difference.
    fn bring_block(&mut self, vdi: VdiId, block: u32) {
        let Some(origin) = self.tree.origin(vdi).unwrap() else {
            return;
        };
        let lineage = self.tree.lineage(origin.vdi, origin.layer).unwrap();
        for replica in self.replicas() {
            if let Some(value) = replica.read(&lineage).get(&block) {
                replica.write(vdi, LayerId(0), block, *value);
            }
        }
    }

    fn flatten(&mut self, vdi: VdiId) {
        for block in 0..BLOCKS {
            self.bring_block(vdi, block);
        }
        match self.tree.flattened(vdi) {
            Ok(outcome) => self.tell(outcome),
            Err(refusal) => assert!(matches!(refusal, Refusal::NotAClone(_)), "{refusal}"),
        }
    }

    fn delete_vdi(&mut self, vdi: VdiId) {
        let before = self.tree.clone();
        match self.tree.delete_vdi(vdi) {
            Ok(outcome) => {
                self.heads.remove(&vdi);
                self.snapshots.retain(|(of, _), _| *of != vdi);
                self.tell(outcome);
            }
            Err(_) => assert_eq!(self.tree, before),
        }
    }

    /// What was written down is what there is.
    fn check_records(&self) {
        let saved: Vec<VdiRecords> = self
            .heads
            .keys()
            .map(|vdi| self.tree.save(*vdi).unwrap())
            .collect();
        let (loaded, outcome) = Tree::load(saved).unwrap();
        assert_eq!(outcome, Outcome::default());
        assert_eq!(loaded, self.tree);
    }

    fn check(&mut self) {
        self.check_records();
        for (vdi, layers) in &self.tree.vdis {
            layers.check(*vdi);
        }
        let mut states = Vec::new();
        for (vdi, content) in &self.heads {
            states.push((
                self.tree.head(*vdi).unwrap().lineage,
                content,
                format!("head of {vdi}"),
            ));
        }
        for ((vdi, name), content) in &self.snapshots {
            let layer = self.tree.find(*vdi, name).unwrap();
            let lineage = self.tree.lineage(*vdi, layer).unwrap();
            assert_eq!(lineage.steps()[0].highest, layer);
            states.push((lineage, content, format!("{vdi}@{name}")));
        }
        for (who, replica) in [
            ("prompt", &self.prompt),
            ("late", &self.late),
            ("away", &self.away),
        ] {
            for (lineage, content, what) in &states {
                assert_eq!(replica.read(lineage), **content, "{what}, {who}, by {lineage}");
            }
        }
        for (vdi, layer) in self.prompt.layers.keys() {
            let is_needed = self
                .tree
                .vdis
                .get(vdi)
                .is_some_and(|of| of.nodes.contains_key(layer));
            assert!(is_needed, "layer {layer} of VDI {vdi} is on a disk and nobody's");
        }
    }
}

impl Layers {
    /// What must hold of every tree between two operations.
    fn check(&self, vdi: VdiId) {
        let mut last: Option<(LayerId, Run)> = None;
        for (low, run) in &self.runs {
            assert!(*low <= run.high && run.since <= self.revision);
            if let Some((_, before)) = last {
                assert!(before.high < *low, "runs of VDI {vdi} overlap at {low}");
                let touch = before.high.0 + 1 == low.0 && before.owner == run.owner;
                assert!(!touch, "runs of VDI {vdi} touch at {low}");
            }
            if let Some(owner) = run.owner {
                let below = self.node(owner).below;
                assert!(run.high <= owner && below.is_none_or(|below| below < *low));
            }
            last = Some((*low, *run));
        }
        for (layer, node) in &self.nodes {
            let own = self.runs.range(..=*layer).next_back().expect("its own run").1;
            assert!(own.owner == Some(*layer) && own.high == *layer);
            assert!(
                node.below
                    .is_none_or(|below| self.node(below).above.contains(layer))
            );
            assert!(
                node.above
                    .iter()
                    .all(|above| self.node(*above).below == Some(*layer))
            );
            assert_eq!(node.kind == Kind::Head, *layer == self.head);
            assert_eq!(node.kind == Kind::Base, self.origin.is_some() && layer.0 == 0);
            assert!(
                !node.is_needless(),
                "layer {layer} of VDI {vdi} is needed by nobody"
            );
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn every_state_is_what_it_was(ops in prop::collection::vec((0u8..24, 0usize..1000, 0usize..65536), 1..90)) {
        let mut world = World::default();
        for op in ops {
            world.step(op);
            world.check();
        }
    }
}
