//! Who uses the store: what is asked, of which shards and blocks, and what people do about a full disk.

use std::ops::RangeInclusive;

use store::{ClearKind, Event, Origin, Request};
use types::{
    BlockNo, HeapBlock, LayerId, LeafNo, Lineage, LineageStep, Payload, RequestId, Seq, ShardId, ShardNo,
    VdiId,
};

use super::pending::{Floor, Pending};
use super::{LAYERS, PATIENCE, Profile, REQUESTS_MAX, World};
use crate::content;
use crate::store_oracle::{LayersChange, ShardModel, Value, address};
use crate::trace::tell;

const PARENT: VdiId = VdiId(7);
/// Its shards lie beside those of the parent with the same numbers.
const CLONE: VdiId = VdiId(8);

impl World {
    pub(super) fn live(&mut self, ops: u64) {
        let mut left = ops;
        let mut patience = i64::from(PATIENCE);
        while left > 0 && !self.has_failed && patience > 0 {
            patience -= if self.is_full { 50 } else { 1 };
            let many = self.rng.below(5).min(left);
            for _ in 0..many {
                if self.pending.len() < REQUESTS_MAX {
                    self.issue();
                    left -= 1;
                }
            }
            self.turn();
            if self.profile == Profile::Rot && self.rng.chance(1, 150) {
                self.rot_somewhere();
            }
        }
    }

    pub(super) fn shard(&mut self) -> ShardId {
        let at = self.rng.below(u64::from(self.shard_count)) as u32;
        ShardId {
            vdi: if at.is_multiple_of(2) { PARENT } else { CLONE },
            no: ShardNo(at / 2),
        }
    }

    pub(super) fn is_quiet(&self, shard: ShardId) -> bool {
        !self.pending.values().any(|p| p.touches(shard))
    }

    /// The head, mostly; others as repair does. Now and then there is a new head.
    fn layer_to_write(&mut self, shard: ShardId) -> LayerId {
        let is_snapshotted = self.rng.chance(1, 30);
        let model = self.shards.get_mut(&shard).expect("known");
        if is_snapshotted && model.head + 1 < LAYERS.len() {
            model.head += 1;
        }
        let head = model.head as u64;
        let at = if self.rng.chance(1, 4) {
            self.rng.below(head + 1)
        } else {
            head
        };
        LAYERS[at as usize]
    }

    /// What somebody may see of a shard.
    pub(super) fn lineage(&mut self, shard: ShardId) -> Lineage {
        let highest = LAYERS.len() - 1;
        let head = self.rng.between(0, highest as u64) as usize;
        let past = self.rng.index(head + 1);
        let step = |vdi, lowest: usize, highest: usize| LineageStep {
            vdi,
            lowest: LAYERS[lowest],
            highest: LAYERS[highest],
        };
        let mut steps = match self.rng.below(4) {
            0 => return Lineage::of_layer(shard.vdi, LAYERS[head]),
            1 if past + 1 < head => vec![step(shard.vdi, head, head), step(shard.vdi, 0, past)],
            2 => vec![step(shard.vdi, past, head)],
            _ => vec![step(shard.vdi, 0, highest)],
        };
        if shard.vdi == CLONE {
            let of = self.rng.index(highest + 1);
            steps.push(step(PARENT, 0, of));
        }
        Lineage::new(&steps).expect("newest first")
    }

    pub(super) fn issue(&mut self) {
        let shard = self.shard();
        let is_dropping = |p: &Pending| matches!(p, Pending::Drop { shard: s } if *s == shard);
        if self.pending.values().any(is_dropping) {
            return;
        }
        let Some(model) = self.shards.get(&shard) else {
            let mut model = ShardModel::default();
            model.life = self.next_version;
            self.shards.insert(shard, model);
            return self.issue_record(shard);
        };
        if !model.is_known {
            return; // its first record is under way
        }
        if self.rng.chance(1, 80) {
            return self.issue_change_of_layers(shard);
        }
        if self.rng.chance(1, 200) {
            return self.issue_void(shard);
        }
        match self.rng.below(100) {
            0..=54 => self.issue_write(shard),
            55..=64 => self.issue_clear(shard),
            65..=89 => self.issue_read(shard),
            90..=95 => self.issue_flush(shard),
            96..=97 => self.issue_record(shard),
            98 if self.is_quiet(shard) => self.issue_versions(shard),
            99 if self.is_quiet(shard) && self.rng.chance(1, 6) => {
                self.send(Request::DropShard { shard }, Pending::Drop { shard });
            }
            _ => self.issue_read(shard),
        }
    }

    /// Layers below the head go, some of them perhaps once more; or some are merged with a later one, which may be the head.
    fn issue_change_of_layers(&mut self, shard: ShardId) {
        let head = self.shards[&shard].head;
        let is_compared = |p: &Pending| matches!(p, Pending::Versions { .. } | Pending::Leaves { .. });
        let is_compared = self.pending.values().any(|p| is_compared(p) && p.touches(shard));
        if head == 0 || is_compared {
            return;
        }
        let first = self.rng.index(head);
        let change = if self.rng.chance(1, 4) {
            let last = self.rng.between(first as u64, head as u64 - 1) as usize;
            LayersChange::Drop(LAYERS[first..=last].to_vec())
        } else {
            let model = &self.shards[&shard];
            let view = model.view(model.changes.len()).clone();
            let called = LAYERS[self.rng.between(first as u64 + 1, head as u64) as usize];
            let is_left = |layer: &LayerId| !view.is_gone(*layer) && view.name(*layer) == *layer;
            let mut layers: Vec<LayerId> = LAYERS[first..].iter().copied().filter(is_left).collect();
            layers.retain(|layer| *layer < called && self.rng.chance(2, 3));
            if layers.is_empty() || !is_left(&called) {
                return;
            }
            // Each says all that is true of the layers it names.
            let mut all: Vec<LayerId> = LAYERS.to_vec();
            all.retain(|layer| layers.contains(&view.name(*layer)) || view.name(*layer) == called);
            all.retain(|layer| !view.is_gone(*layer));
            LayersChange::Merge(all, called)
        };
        let revision = self.shard_mut(shard).change_layers(change);
        self.send_change_of_layers(shard, revision);
    }

    pub(super) fn send_change_of_layers(&mut self, shard: ShardId, revision: usize) {
        let change = self.shards[&shard].changes[revision - 1].clone();
        let pending = Pending::Layers { shard, revision };
        let revision = revision as u64;
        let request = match change {
            LayersChange::Drop(layers) => Request::DropLayers {
                shard,
                layers: self.ranges(&layers),
                revision,
            },
            LayersChange::Merge(layers, called) => Request::MergeLayers {
                shard,
                layers: self.ranges(&layers),
                called,
                revision,
            },
        };
        self.send(request, pending);
    }

    /// Neighbours as one range, with the numbers between them; now and then in disorder.
    fn ranges(&mut self, layers: &[LayerId]) -> Vec<RangeInclusive<LayerId>> {
        let place = |layer: &LayerId| LAYERS.iter().position(|other| other == layer);
        let touch = |a: &LayerId, b: &LayerId| place(a).map(|at| at + 1) == place(b);
        let ranges = layers.chunk_by(touch).map(|run| run[0]..=run[run.len() - 1]);
        let mut ranges: Vec<_> = ranges.collect();
        if self.rng.chance(1, 4) {
            ranges.reverse();
        }
        ranges
    }

    /// Repair takes away what others do not have. Nothing else of the shard is under way, and it is flushed.
    fn issue_void(&mut self, shard: ShardId) {
        if !matches!(self.profile, Profile::Clean | Profile::KvLost) {
            return;
        }
        self.settle();
        let Some(model) = self.shards.get(&shard) else {
            return; // people made room
        };
        let issued = model.issued;
        let (block, count) = self.range(200);
        let layer = self.layer_to_write(shard);
        let live_from = match self.rng.chance(1, 2) {
            true => Seq(u64::MAX),
            false => Seq(self.rng.between(0, issued.0)),
        };
        let model = self.shard_mut(shard);
        if model.view(model.revision).is_gone(layer) {
            return;
        }
        let request = Request::Void {
            shard,
            layer,
            block: BlockNo(block),
            count,
            live_from,
        };
        self.summary.voids += 1;
        self.send(request, Pending::Void { shard });
        self.settle();
        self.shard_mut(shard).void(layer, block, count, live_from);
        self.issue_flush(shard);
        self.settle();
    }

    /// A range of up to `most` blocks, small ones mostly, hot near the start of the shard.
    pub(super) fn range(&mut self, most: u32) -> (u32, u32) {
        let count = match self.rng.below(10) {
            0..=6 => self.rng.between(1, 4),
            7 | 8 => self.rng.between(1, 24),
            _ => self.rng.between(1, u64::from(most)),
        } as u32;
        let count = count.min(self.blocks);
        let span = u64::from(self.blocks - count) + 1;
        let span = if self.rng.chance(1, 3) {
            span.div_ceil(8)
        } else {
            span
        };
        (self.rng.below(span) as u32, count)
    }

    pub(super) fn next_seq(&mut self, shard: ShardId) -> Seq {
        let jump = if self.rng.chance(1, 50) {
            self.rng.below(1000)
        } else {
            0
        };
        Seq(self.shards[&shard].issued.0 + 1 + jump)
    }

    pub(super) fn issue_write(&mut self, shard: ShardId) {
        // At most what the first batch of a segment holds: longer writes are split and can be torn.
        let (first, count) = self.range(62);
        let layer = self.layer_to_write(shard);
        let seq = self.next_seq(shard);
        let version = self.next_version;
        self.next_version += 1;
        let data = content::sectors(address(shard, layer, first), u64::from(count) * 8, version);
        let crcs = data.bytes().chunks(4096).map(types::crc32c).collect();
        let model = self.shards.get_mut(&shard).expect("known");
        model.issue(seq, layer, BlockNo(first), count, Value::Data(version));
        let request = Request::Write {
            shard,
            layer,
            block: BlockNo(first),
            seq,
            data,
            crcs,
            origin: Origin::Live,
        };
        self.send(request, Pending::Write { shard, seq });
    }

    pub(super) fn issue_clear(&mut self, shard: ShardId) {
        let (first, count) = self.range(self.blocks);
        let layer = self.layer_to_write(shard);
        let seq = self.next_seq(shard);
        let kind = self.rng.pick(&[ClearKind::Zero, ClearKind::Trim]);
        let model = self.shards.get_mut(&shard).expect("known");
        model.issue(seq, layer, BlockNo(first), count, Value::Clear(kind));
        let request = Request::Clear {
            shard,
            layer,
            block: BlockNo(first),
            count,
            seq,
            kind,
            origin: Origin::Live,
        };
        self.send(request, Pending::Write { shard, seq });
    }

    pub(super) fn issue_read(&mut self, shard: ShardId) {
        let (first, count) = self.range(200);
        let lineage = self.lineage(shard);
        self.send_read(shard, lineage, first, count.min(256));
    }

    pub(super) fn send_read(&mut self, shard: ShardId, lineage: Lineage, block: u32, count: u32) {
        let request = Request::Read {
            shard,
            lineage: lineage.clone(),
            block: BlockNo(block),
            count,
        };
        self.summary.reads_of_layers += u64::from(lineage.only_layer().is_none());
        let floor = |step: &LineageStep| {
            let shard = ShardId {
                vdi: step.vdi,
                ..shard
            };
            let model = self.shards.get(&shard);
            Floor {
                shard,
                life: model.map(|model| model.life),
                completed: model.map_or(Seq(0), |model| model.completed),
                revision: model.map_or(0, |model| model.revision),
            }
        };
        let pending = Pending::Read {
            shard,
            block,
            count,
            floors: lineage.steps().iter().map(floor).collect(),
            lineage,
        };
        self.send(request, pending);
    }

    pub(super) fn issue_flush(&mut self, shard: ShardId) {
        let model = &self.shards[&shard];
        let (life, target) = (model.life, model.issued);
        self.send(Request::Flush { shard }, Pending::Flush { shard, life, target });
    }

    pub(super) fn issue_record(&mut self, shard: ShardId) {
        if self
            .pending
            .values()
            .any(|p| matches!(p, Pending::Record { shard: s, .. } if *s == shard))
        {
            return;
        }
        let length = self.rng.between(8, 200) as usize;
        let mut record = self.next_version.to_le_bytes().to_vec();
        record.resize(length, 0x5a);
        self.next_version += 1;
        let model = self.shards.get_mut(&shard).expect("known");
        model.records.push(record.clone());
        model.doubt = model.doubt.when_put();
        let request = Request::PutRecord {
            shard,
            record: record.clone(),
        };
        self.send(request, Pending::Record { shard, record });
    }

    pub(super) fn issue_versions(&mut self, shard: ShardId) {
        let layer = self.rng.pick(&LAYERS);
        let issued = self.shards[&shard].issued;
        if self.rng.chance(1, 2) {
            let leaf = BlockNo(self.rng.below(u64::from(self.blocks)) as u32).leaf();
            self.send(
                Request::LeafVersions {
                    shard,
                    lineage: Lineage::of_layer(shard.vdi, layer),
                    leaf,
                },
                Pending::Versions {
                    shard,
                    layer,
                    leaf,
                    issued,
                },
            );
        } else {
            let newer_than = Seq(self.rng.between(0, self.shards[&shard].issued.0));
            let request = Request::ChangedLeaves {
                shard,
                newer_than,
                from: (LayerId(0), LeafNo(0)),
            };
            self.send(
                request,
                Pending::Leaves {
                    shard,
                    newer_than,
                    issued,
                },
            );
        }
    }

    pub(super) fn send(&mut self, request: Request<HeapBlock>, pending: Pending) {
        let id = RequestId(self.next_request);
        self.next_request += 1;
        tell(|| format!("  {id} {request:?}"));
        self.pending.insert(id, pending);
        self.step(Event::Request(id, request));
    }

    /// What people do about a full disk: discard what they can, and, where discards wait behind writes that wait for
    /// space, take a shard off the disk.
    pub(super) fn make_room(&mut self, has_trimmed: bool) {
        let is_dropping = |shard: ShardId| {
            let drops = |p: &Pending| matches!(p, Pending::Drop { shard: s } if *s == shard);
            self.pending.values().any(drops)
        };
        let shards: Vec<ShardId> = self.shards.keys().copied().filter(|s| !is_dropping(*s)).collect();
        if !has_trimmed {
            for shard in shards {
                self.give_space_back(shard);
            }
        } else if let Some(shard) = shards.first().copied() {
            self.send(Request::DropShard { shard }, Pending::Drop { shard });
        }
    }

    pub(super) fn give_space_back(&mut self, shard: ShardId) {
        for layer in LAYERS {
            let seq = self.next_seq(shard);
            let model = self.shards.get_mut(&shard).expect("known");
            model.issue(seq, layer, BlockNo(0), self.blocks, Value::Clear(ClearKind::Trim));
            let request = Request::Clear {
                shard,
                layer,
                block: BlockNo(0),
                count: self.blocks,
                seq,
                kind: ClearKind::Trim,
                origin: Origin::Live,
            };
            self.send(request, Pending::Write { shard, seq });
        }
    }
}
