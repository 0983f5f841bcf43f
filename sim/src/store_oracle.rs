//! What a disk's store may answer.
//!
//! Per shard the writer's stream is a list of numbered operations. The oracle keeps, per block, the operations
//! of the stream that touched it, and three marks in the stream: what was issued, what was completed (replied),
//! what is durable (covered by a completed flush).
//!
//! * A read returns, block by block, the value of the last operation completed before the read was issued, or
//!   of any later one issued by the time of the answer. Through a lineage: that of the newest layer that has one, and of
//!   one below only where every operation on the block above it was still under way.
//! * Layers that were merged are read where their name is: of the latest that has the block.
//! * Layers that are gone say nothing, from the moment on that somebody was told so, whatever crashes; until then
//!   they say all or nothing, and the store says which by the revision it names after a crash.
//! * After a power loss a shard holds exactly a prefix of its stream, named by `ShardSummary::end`, which covers
//!   what is durable. After a kill the prefix covers what was completed.
//! * Where the disk damaged content silently, a read may also say `Corrupt`; and damage to a part of the log
//!   that recovery has to read may cut the prefix shorter, which is why the world then passes a lower bound of
//!   zero; but one piece of rot since the last recovery never takes, unreported, what was durable when the store
//!   last came to rest. What is there must be exactly that prefix all the same, unless recovery itself reports damage: then
//!   each block holds some operation of its history. Nothing ever holds what nobody wrote there.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;

use store::{BlockState, BlockVersion, ClearKind, ShardSummary};
use types::{BlockNo, LayerId, LeafNo, Seq, ShardId};

/// What one operation left in a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Value {
    Data(u64),
    Clear(ClearKind),
}

impl Value {
    pub fn version(self) -> u64 {
        match self {
            Value::Data(version) => version,
            Value::Clear(_) => 0,
        }
    }
}

/// Whether the store must still say that a shard may lack what it completed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Doubt {
    #[default]
    None,
    Open,
    /// A record was put since, which may have reached the disk.
    Perhaps,
}

impl Doubt {
    pub fn when_put(self) -> Doubt {
        match self {
            Doubt::None => Doubt::None,
            Doubt::Open | Doubt::Perhaps => Doubt::Perhaps,
        }
    }
}

/// Which layers of a shard are left after some revision. Revisions are counted in steps of one here.
#[derive(Clone, Debug, Default)]
pub(crate) struct View {
    gone: BTreeSet<LayerId>,
    /// What those that were merged are called.
    names: BTreeMap<LayerId, LayerId>,
}

impl View {
    pub fn is_gone(&self, layer: LayerId) -> bool {
        self.gone.contains(&layer)
    }

    /// What a layer is called.
    pub fn name(&self, layer: LayerId) -> LayerId {
        self.names.get(&layer).copied().unwrap_or(layer)
    }

    fn change(&mut self, change: &LayersChange) {
        match change {
            LayersChange::Drop(layers) => {
                let names: BTreeSet<LayerId> = layers.iter().map(|layer| self.name(*layer)).collect();
                self.gone.extend(layers);
                let parts = self.names.iter().filter(|(_, name)| names.contains(name));
                self.gone.extend(parts.map(|(layer, _)| *layer));
            }
            LayersChange::Merge(layers, called) => {
                for name in self.names.values_mut().filter(|name| layers.contains(name)) {
                    *name = *called;
                }
                self.names.extend(layers.iter().map(|layer| (*layer, *called)));
            }
        }
    }
}

/// What was asked for to come from one revision to the next.
#[derive(Clone, Debug)]
pub(crate) enum LayersChange {
    Drop(Vec<LayerId>),
    /// Those with a name, the highest of which is the last; and that.
    Merge(Vec<LayerId>, LayerId),
}

/// Everything the oracle believes of one shard that the disk knows.
#[derive(Clone, Debug, Default)]
pub(crate) struct ShardModel {
    pub issued: Seq,
    pub completed: Seq,
    pub durable: Seq,
    /// What was durable when the store last came to rest: then the log itself says so, and rot cannot hide it.
    pub witnessed: Seq,
    pub doubt: Doubt,
    /// Tells this stay of the shard on the disk from one that was dropped.
    pub life: u64,
    /// Whether a record was put and answered, so that the disk must know the shard after any crash.
    pub is_known: bool,
    /// Which layer guests write in, counted from the first.
    pub head: usize,
    /// Up to here the log was found damaged: any operation may be missing from what it holds.
    tattered_until: Option<Seq>,
    /// Records that the disk may hold: the last durable one and later ones issued.
    pub records: Vec<Vec<u8>>,
    blocks: BTreeMap<(LayerId, u32), Vec<(Seq, Value)>>,
    /// What was asked of layers so far; the revision counts it.
    pub changes: Vec<LayersChange>,
    /// After so many changes; one more than there are changes, but for a shard that is new.
    views: Vec<View>,
    /// The revision that was answered.
    pub revision: usize,
}

/// Address of a block for [`crate::content`].
pub(crate) fn address(shard: ShardId, layer: LayerId, block: u32) -> u64 {
    (crate::mix(shard.to_u64() ^ u64::from(layer.0) << 40) >> 8) + (u64::from(block) << 3)
}

impl ShardModel {
    pub fn issue(&mut self, seq: Seq, layer: LayerId, first: BlockNo, count: u32, value: Value) {
        assert!(seq > self.issued, "seq {seq} after {}", self.issued);
        self.issued = seq;
        if self.view(self.changes.len()).is_gone(layer) {
            return;
        }
        for block in first.0..first.0 + count {
            self.blocks.entry((layer, block)).or_default().push((seq, value));
        }
    }

    pub fn view(&self, revision: usize) -> &View {
        static NOTHING_GONE: View = View {
            gone: BTreeSet::new(),
            names: BTreeMap::new(),
        };
        match revision {
            0 => &NOTHING_GONE,
            revision => &self.views[revision - 1],
        }
    }

    /// Asks for one more change; which revision that makes.
    pub fn change_layers(&mut self, change: LayersChange) -> usize {
        let mut view = self.view(self.changes.len()).clone();
        view.change(&change);
        self.changes.push(change);
        self.views.push(view);
        self.changes.len()
    }

    /// The revisions that a read may see which was issued at this one.
    pub fn revisions_since(&self, revision: usize) -> RangeInclusive<usize> {
        let first = if self.is_exact() { revision } else { 0 };
        first..=self.changes.len()
    }

    /// What a layer may say of a block to a read that was issued when `floor` was completed: the values of these
    /// operations, and whether it may say nothing.
    pub fn allowed(&self, layer: LayerId, block: u32, floor: Seq) -> (&[(Seq, Value)], bool) {
        let history = self.blocks.get(&(layer, block)).map_or(&[][..], Vec::as_slice);
        let mut from = history.partition_point(|(seq, _)| *seq <= floor);
        if from > 0 && Some(history[from - 1].0) <= self.tattered_until {
            from = 0;
        }
        (&history[from.saturating_sub(1)..], from == 0)
    }

    /// Checks a leaf's versions while nothing is under way.
    pub fn check_versions(
        &self,
        shard: ShardId,
        layer: LayerId,
        leaf: LeafNo,
        got: &[BlockVersion],
        may_be_lost: bool,
    ) -> Result<(), String> {
        let first = leaf.first_block().0;
        let layer = self.view(self.revision).name(layer);
        for (i, version) in got.iter().enumerate() {
            let block = first + i as u32;
            let last = self.last(layer, block);
            let expected = match last {
                None => BlockVersion {
                    seq: Seq(0),
                    state: BlockState::Absent,
                },
                Some((_, seq, Value::Clear(kind))) => BlockVersion {
                    seq,
                    state: BlockState::Clear(kind),
                },
                Some((origin, seq, Value::Data(version))) => BlockVersion {
                    seq,
                    state: BlockState::Data(block_sum(shard, layer, origin, block, seq, version)),
                },
            };
            // What was rotten when its segment was cleaned is known by its seq, and by a sum that fits nothing.
            let lost = BlockVersion {
                seq: expected.seq,
                state: BlockState::Data(types::BlockSum(0)),
            };
            let is_data = matches!(expected.state, BlockState::Data(_));
            if *version != expected && !(may_be_lost && is_data && *version == lost) {
                return Err(format!(
                    "leaf {leaf:?} block {block}: {version:?}, expected {expected:?}"
                ));
            }
        }
        Ok(())
    }

    /// Leaves with a block whose last operation is above `newer_than`, while nothing is under way.
    pub fn changed_leaves(&self, layer: LayerId, newer_than: Seq) -> Vec<LeafNo> {
        let layer = self.view(self.revision).name(layer);
        let blocks: BTreeSet<u32> = self.blocks.keys().map(|(_, block)| *block).collect();
        let is_newer = |block: &u32| {
            self.last(layer, *block)
                .is_some_and(|(_, seq, _)| seq > newer_than)
        };
        let leaves = blocks
            .into_iter()
            .filter(is_newer)
            .map(|block| BlockNo(block).leaf());
        let leaves: BTreeSet<LeafNo> = leaves.collect();
        leaves.into_iter().collect()
    }

    /// What a layer says of a block, and for which of those merged into it that was written. `layer` is a name.
    fn last(&self, layer: LayerId, block: u32) -> Option<(LayerId, Seq, Value)> {
        let view = self.view(self.revision);
        let is_of_it = |part: &LayerId| view.name(*part) == layer && !view.is_gone(*part);
        let parts = crate::world_store::LAYERS.iter().rev().copied().filter(is_of_it);
        let mut said = parts.filter_map(|part| {
            let (seq, value) = *self.blocks.get(&(part, block))?.last()?;
            Some((part, seq, value))
        });
        said.next()
    }

    /// Makes void what a layer says of blocks, unless it was said at `live_from` or later. Nothing is under way.
    pub fn void(&mut self, layer: LayerId, first: u32, count: u32, live_from: Seq) {
        let view = self.view(self.revision).clone();
        for block in first..first + count {
            let said = self.last(view.name(layer), block);
            if said.is_none_or(|(_, seq, _)| seq >= live_from) {
                continue;
            }
            self.blocks
                .retain(|(part, other), _| *other != block || view.name(*part) != view.name(layer));
        }
    }

    /// Forgets what no read can be asked about any more: all but the last operation up to `seq` per block.
    pub fn prune(&mut self, seq: Seq) {
        for history in self.blocks.values_mut() {
            let keep = history.partition_point(|(s, _)| *s <= seq).saturating_sub(1);
            history.drain(..keep);
        }
    }

    /// The disk came back with `summary`: its end must be one that was issued and not below `floor`; the model
    /// becomes exactly that prefix.
    pub fn recover(&mut self, summary: &ShardSummary, floor: Seq, may_forget: bool) -> Result<(), String> {
        if summary.end < floor || summary.end > self.issued {
            return Err(format!(
                "shard {} came back with end {}; completed and kept must be {floor} to {} (issued)",
                summary.shard, summary.end, self.issued
            ));
        }
        let is_forgotten = may_forget && summary.record.is_empty();
        if !is_forgotten && !self.records.contains(&summary.record) {
            return Err(format!(
                "shard {} came back with record {:?}, expected one of {:?}",
                summary.shard, summary.record, self.records
            ));
        }
        if !may_forget {
            self.records = vec![summary.record.clone()];
        }
        self.is_known = true;
        for history in self.blocks.values_mut() {
            history.retain(|(seq, _)| *seq <= summary.end);
        }
        self.blocks.retain(|_, history| !history.is_empty());
        self.issued = summary.end;
        self.completed = summary.end;
        self.durable = summary.end;
        self.witnessed = summary.end;
        Ok(())
    }

    /// The store said that its log is damaged: what it holds of each block is some operation that was logged.
    pub fn tatter(&mut self) {
        self.tattered_until = Some(self.issued);
    }

    /// Whether figures and versions can be foretold, not only content.
    pub fn is_exact(&self) -> bool {
        self.tattered_until.is_none()
    }

    /// Blocks of data the shard holds when nothing is under way.
    pub fn data_blocks(&self) -> u64 {
        let view = self.view(self.revision);
        let blocks: BTreeSet<(LayerId, u32)> = self
            .blocks
            .keys()
            .map(|(layer, block)| (view.name(*layer), *block))
            .collect();
        let is_data = |(layer, block): &&(LayerId, u32)| {
            matches!(self.last(*layer, *block), Some((_, _, Value::Data(_))))
        };
        blocks.iter().filter(is_data).count() as u64
    }
}

fn block_sum(
    shard: ShardId,
    layer: LayerId,
    origin: LayerId,
    block: u32,
    seq: Seq,
    version: u64,
) -> types::BlockSum {
    let content = crate::content::sectors(address(shard, origin, block), 8, version);
    let key = types::SumKey {
        shard,
        layer,
        block: BlockNo(block),
        seq,
    };
    types::bind(key, types::crc32c(types::Payload::bytes(&content)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use types::{ShardNo, VdiId};

    const LAYER: LayerId = LayerId(1);
    const SHARD: ShardId = ShardId {
        vdi: VdiId(1),
        no: ShardNo(0),
    };

    fn model() -> ShardModel {
        let mut model = ShardModel {
            records: vec![vec![]],
            ..ShardModel::default()
        };
        for seq in 1..=3 {
            model.issue(Seq(seq), LAYER, BlockNo(4), 1, Value::Data(seq * 10));
        }
        model
    }

    fn allowed(model: &ShardModel, block: u32, floor: u64) -> (Vec<u64>, bool) {
        let (values, may_be_untouched) = model.allowed(LAYER, block, Seq(floor));
        let versions = values.iter().map(|(_, value)| value.version());
        (versions.collect(), may_be_untouched)
    }

    fn summary(end: u64) -> ShardSummary {
        ShardSummary {
            shard: SHARD,
            end: Seq(end),
            record: vec![],
            data_blocks: 0,
            is_doubtful: false,
        }
    }

    #[test]
    fn a_read_sees_the_last_completed_or_any_later_write() {
        let model = model();
        assert_eq!(allowed(&model, 4, 2), (vec![20, 30], false));
        assert_eq!(allowed(&model, 4, 0), (vec![10, 20, 30], true));
        assert_eq!(allowed(&model, 5, 3), (vec![], true));
    }

    #[test]
    fn recovery_is_a_prefix_that_covers_its_floor() {
        let mut model = model();
        assert!(model.clone().recover(&summary(1), Seq(2), false).is_err());
        assert!(model.clone().recover(&summary(4), Seq(2), false).is_err());
        model.recover(&summary(2), Seq(2), false).unwrap();
        assert_eq!(allowed(&model, 4, 2), (vec![20], false));
        assert_eq!(model.data_blocks(), 1);
    }
}
