//! Each answer of the store, held against what the oracle allows.

use store::{ReadPart, Reply, StoreError};
use types::{HeapBlock, LayerId, Lineage, Payload, RequestId, Seq, ShardId};

use super::pending::{Floor, Pending};
use super::{LAYERS, Profile, World};
use crate::content;
use crate::store_oracle::{ShardModel, address};
use crate::trace::tell;

impl World {
    pub(super) fn answered(&mut self, id: RequestId, result: Result<Reply<HeapBlock>, StoreError>) {
        let pending = self
            .pending
            .remove(&id)
            .expect("an answer to something asked once");
        self.summary.answers += 1;
        let is_dropped = pending
            .shard()
            .is_some_and(|shard| !self.shards.contains_key(&shard));
        let is_drop = matches!(pending, Pending::Drop { .. });
        if is_dropped && !is_drop && matches!(result, Ok(_) | Err(StoreError::NoShard(_))) {
            return;
        }
        let reply = match result {
            Ok(reply) => reply,
            Err(error) => return self.refused(id, pending, &error),
        };
        tell(|| format!("  {id} done"));
        match pending {
            Pending::Write { shard, seq } => {
                self.shard_mut(shard).completed = seq.max(self.shards[&shard].completed);
            }
            Pending::Read {
                lineage,
                block,
                count,
                floors,
                ..
            } => {
                let Reply::Read(parts) = reply else {
                    panic!("{id}: a read brought {reply:?}")
                };
                if floors.iter().all(|floor| self.is_still_there(floor)) {
                    self.check_read(id, &lineage, block, count, &floors, &parts);
                }
            }
            Pending::Flush { shard, life, target } => self.flushed(id, shard, life, target),
            Pending::Record { shard, record } => {
                // A header that rots takes its record with it, silently if nothing behind it is durable.
                let may_forget = self.lies();
                let model = self.shard_mut(shard);
                let at = model.records.iter().position(|r| *r == record).expect("put");
                if !may_forget {
                    model.records.drain(..at);
                }
                model.is_known = true;
            }
            Pending::Drop { shard } => {
                let model = self.shards.remove(&shard);
                if self.lies() {
                    self.dropped.extend(model.map(|model| (shard, model)));
                }
            }
            // Who asked it waits for it.
            Pending::Void { .. } => {}
            Pending::Layers { shard, revision } => {
                self.summary.layers_changed += 1;
                let model = self.shard_mut(shard);
                model.revision = model.revision.max(revision);
            }
            Pending::Revision { shard } => {
                let Reply::Revision(revision) = reply else {
                    panic!("{id}: a revision brought {reply:?}")
                };
                self.learn_revision(shard, revision as usize);
            }
            Pending::Versions {
                shard,
                layer,
                leaf,
                issued,
            } => {
                let Reply::Versions(versions) = reply else {
                    panic!("{id}: versions brought {reply:?}")
                };
                assert_eq!(versions.len(), 256, "{id}");
                let may_be_lost = self.lies();
                if self.shards[&shard].issued == issued
                    && self.shards[&shard].is_exact()
                    && let Err(why) =
                        self.shards[&shard].check_versions(shard, layer, leaf, &versions, may_be_lost)
                {
                    panic!("{id} versions of shard {shard} layer {layer}: {why}");
                }
            }
            Pending::Leaves {
                shard,
                newer_than,
                issued,
            } => {
                let Reply::Leaves(leaves) = reply else {
                    panic!("{id}: leaves brought {reply:?}")
                };
                if self.shards[&shard].issued == issued && self.shards[&shard].is_exact() {
                    let model = &self.shards[&shard];
                    let of_layer = |layer: LayerId| {
                        let leaves = model.changed_leaves(layer, newer_than).into_iter();
                        leaves.map(move |leaf| (layer, leaf))
                    };
                    let view = model.view(model.revision);
                    let names = LAYERS.into_iter().filter(|layer| view.name(*layer) == *layer);
                    let expected: Vec<_> = names.flat_map(of_layer).collect();
                    assert_eq!(leaves, expected, "{id} leaves of {shard} above {newer_than}");
                }
            }
        }
    }

    pub(super) fn refused(&mut self, id: RequestId, pending: Pending, error: &StoreError) {
        tell(|| format!("  {id} refused: {error}"));
        let is_allowed = match error {
            StoreError::Corrupt { .. } => self.lies() && matches!(&pending, Pending::Read { .. }),
            StoreError::DiskFailed(_) => self.profile == Profile::Failing,
            StoreError::NoShard(shard) => self
                .pending
                .values()
                .any(|p| matches!(p, Pending::Drop { shard: s } if s == shard)),
            StoreError::IndexFailed(_) => false,
        };
        assert!(is_allowed, "{id} ({}) was refused: {error}", pending.name());
        self.summary.corrupt_reads += u64::from(matches!(error, StoreError::Corrupt { .. }));
        match (error, pending) {
            (StoreError::NoShard(_), Pending::Write { shard, seq }) => {
                // Its shard is being dropped: nothing that waits for it waits any longer.
                let model = self.shard_mut(shard);
                model.completed = model.completed.max(seq);
            }
            // A failed disk may have done it all the same: that is open until the disk is back.
            (StoreError::DiskFailed(_), pending) => drop(self.pending.insert(id, pending)),
            _ => {}
        }
    }

    /// After a crash: what was answered is applied, and what was not is said again, as a writer would.
    fn learn_revision(&mut self, shard: ShardId, revision: usize) {
        let may_forget = self.lies();
        let model = self.shard_mut(shard);
        let issued = model.changes.len();
        assert!(
            (model.revision <= revision || may_forget) && revision <= issued,
            "{shard} says revision {revision} of its layers; it answered {} of {issued}",
            model.revision
        );
        model.revision = revision;
        for revision in revision + 1..=issued {
            self.send_change_of_layers(shard, revision);
        }
    }

    pub(super) fn shard_mut(&mut self, shard: ShardId) -> &mut ShardModel {
        self.shards.get_mut(&shard).expect("known to the oracle")
    }

    /// Whether a shard is what it was when a read was issued, and not about to go: whoever reads an ancestor's layers
    /// sees to that. A damaged log may also hold shards that the oracle thinks are gone.
    fn is_still_there(&self, floor: &Floor) -> bool {
        let model = self.shards.get(&floor.shard);
        let drops = |p: &Pending| matches!(p, Pending::Drop { shard } if *shard == floor.shard);
        model.map(|model| model.life) == floor.life
            && !self.pending.values().any(drops)
            && (model.is_some() || !self.lies())
    }

    fn check_read(
        &self,
        id: RequestId,
        lineage: &Lineage,
        block: u32,
        count: u32,
        floors: &[Floor],
        parts: &[ReadPart<HeapBlock>],
    ) {
        let mut at = block;
        let mut check = |bytes: Option<&[u8]>| {
            if let Err(why) = self.check_block(lineage, at, floors, bytes) {
                panic!("{id} read through {lineage} lied: block {at} {why}");
            }
            at += 1;
        };
        for part in parts {
            match part {
                ReadPart::Zeros(blocks) => (0..*blocks).for_each(|_| check(None)),
                ReadPart::Data(data) => data.bytes().chunks(4096).for_each(|bytes| check(Some(bytes))),
            }
        }
        assert_eq!(
            at,
            block + count,
            "{id}: a read of {count} blocks brought {}",
            at - block
        );
    }

    /// What a block may hold in any of the revisions that its shards may have had.
    fn check_block(
        &self,
        lineage: &Lineage,
        block: u32,
        floors: &[Floor],
        bytes: Option<&[u8]>,
    ) -> Result<(), String> {
        let revisions = |at: usize| {
            let floor = floors.get(at)?;
            let model = self.shards.get(&floor.shard)?;
            Some(model.revisions_since(floor.revision))
        };
        // The parent's is the last; all before it are of the shard that was asked.
        let (own, parents) = (
            revisions(0).unwrap_or(0..=0),
            revisions(floors.len() - 1).unwrap_or(0..=0),
        );
        let mut result = Ok(());
        for (own, parents) in own.flat_map(|own| parents.clone().map(move |parents| (own, parents))) {
            let revision = |shard: ShardId| if shard == floors[0].shard { own } else { parents };
            result = self.check_block_at(lineage, block, floors, &revision, bytes);
            if result.is_ok() {
                break;
            }
        }
        result
    }

    /// Layer by layer, the newest first: each may say what its operations left, and only where none of them was complete
    /// may it leave the word to the next.
    fn check_block_at(
        &self,
        lineage: &Lineage,
        block: u32,
        floors: &[Floor],
        revision: &dyn Fn(ShardId) -> usize,
        bytes: Option<&[u8]>,
    ) -> Result<(), String> {
        let mut said = Vec::new();
        for (at, (step, floor)) in lineage.steps().iter().zip(floors).enumerate() {
            let Some(model) = self.shards.get(&floor.shard) else {
                continue;
            };
            let view = model.view(revision(floor.shard));
            // What was merged is where its name is; the first number of a lineage means its name.
            let (newest_vdi, newest) = lineage.newest();
            let first =
                Some(view.name(newest)).filter(|name| at == 0 && newest_vdi == step.vdi && *name != newest);
            let names = LAYERS
                .iter()
                .rev()
                .filter(|layer| step.contains(step.vdi, **layer));
            let names = first
                .iter()
                .chain(names.filter(|layer| view.name(**layer) == **layer));
            let parts = names.flat_map(|name| LAYERS.iter().rev().filter(|part| view.name(**part) == *name));
            for layer in parts.filter(|part| !view.is_gone(**part)) {
                let (allowed, may_be_untouched) = model.allowed(*layer, block, floor.completed);
                let got = match bytes {
                    None => Some(0),
                    Some(bytes) => content::block_version(address(floor.shard, *layer, block), bytes),
                };
                if allowed.iter().any(|(_, value)| Some(value.version()) == got) {
                    return Ok(());
                }
                said.push(format!("{} {layer}: {allowed:?}, not {got:?}", floor.shard));
                if !may_be_untouched {
                    return Err(format!("is nothing that was allowed: {said:?}"));
                }
            }
        }
        match bytes {
            None => Ok(()),
            Some(_) => Err(format!("holds what nobody wrote there: {said:?}")),
        }
    }

    pub(super) fn flushed(&mut self, id: RequestId, shard: ShardId, life: u64, target: Seq) {
        let may_prune = !self.lies() && self.is_quiet(shard);
        let model = self.shards.get_mut(&shard).filter(|model| model.life == life);
        let Some(model) = model else {
            return;
        };
        assert!(
            model.completed >= target,
            "flush {id} is done but {shard} is completed to {} only, it was asked for {target}",
            model.completed
        );
        model.durable = model.durable.max(target);
        if may_prune {
            model.prune(model.durable);
        }
    }

    /// Reads everything and compares versions, data counts and content; nothing else is under way.
    pub(super) fn audit(&mut self) {
        self.settle();
        // What is gone is emptied though nobody reads it.
        for _ in 0..300 {
            if !self.store.is_busy() {
                self.compare_counts();
                break;
            }
            self.turn();
        }
        for shard in self.shards.keys().copied().collect::<Vec<_>>() {
            let mut lineages = LAYERS.map(|layer| Lineage::of_layer(shard.vdi, layer)).to_vec();
            lineages.extend([self.lineage(shard), self.lineage(shard)]);
            for lineage in lineages {
                let mut block = 0;
                while block < self.blocks && !self.has_failed {
                    let count = (self.blocks - block).min(self.rng.between(1, 256) as u32);
                    self.send_read(shard, lineage.clone(), block, count);
                    block += count;
                    self.turn();
                }
                self.settle();
            }
        }
        self.compare_counts();
    }

    fn compare_counts(&self) {
        let summaries = self.store.shards();
        let counted: u64 = summaries.iter().map(|summary| summary.data_blocks).sum();
        if !self.has_failed && !self.lies() {
            assert_eq!(
                counted,
                self.store.stats().live_blocks,
                "blocks that live, shard by shard"
            );
        }
        for summary in summaries {
            let Some(model) = self.shards.get(&summary.shard) else {
                continue;
            };
            if !self.has_failed && !self.lies() {
                // Cleaning gives up blocks that rotted.
                assert_eq!(
                    summary.data_blocks,
                    model.data_blocks(),
                    "data blocks of {}",
                    summary.shard
                );
            }
        }
    }
}
