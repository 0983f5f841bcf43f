//! What changes of layers log, and what has to be different where layers were merged.

use std::collections::VecDeque;
use std::ops::RangeInclusive;

use types::{BlockNo, LayerId, Payload, RequestId, ShardId};

use super::{Blocks, Draft, Op, OpKind, Taken, Waiter};
use crate::batch::{ENTRIES_MAX, Entry, FLAG_NO_END, Kind};
use crate::store::Store;
use crate::{Effect, StoreError};

impl<B: Payload> Store<B> {
    /// Whether a change of layers is on its way to the log. What holds leaves of the shard's waits for it to be applied:
    /// afterwards others may have what is said of the same layers.
    pub(crate) fn is_changing(&self, shard: ShardId) -> bool {
        self.ledger.has_fates
            && self
                .ledger
                .shards
                .get(&shard)
                .is_some_and(|shard| shard.changes_coming > 0)
    }

    /// Which entries say that layers are gone, or one, where the log does not say it yet.
    #[allow(clippy::too_many_arguments, reason = "a request's fields")]
    pub(super) fn take_layers(
        &mut self,
        id: RequestId,
        shard: ShardId,
        layers: &[RangeInclusive<LayerId>],
        called: Option<LayerId>,
        revision: u64,
        draft: &mut Draft<B>,
        effects: &mut Vec<Effect<B>>,
    ) -> Taken<B> {
        let Some(known) = self.ledger.shards.get(&shard).filter(|shard| shard.is_there()) else {
            effects.push(Effect::Reply(id, Err(StoreError::NoShard(shard))));
            return Taken::All;
        };
        let entry = |kind, layer: LayerId, seq| Entry {
            kind,
            flags: 0,
            shard: shard.to_u64(),
            layer: layer.0,
            block: 0,
            count: 0,
            seq,
            birth: 0,
        };
        let (ranges, called) = match called {
            Some(called) => known.fates.to_merge(layers, called),
            None => (known.fates.to_drop(layers), None),
        };
        let say = |range: RangeInclusive<LayerId>| {
            let last = u64::from(range.end().0);
            match called {
                Some(called) => entry(Kind::LayersOne, *range.start(), u64::from(called.0) << 32 | last),
                None => entry(Kind::LayersGone, *range.start(), last),
            }
        };
        let mut entries: VecDeque<Entry> = ranges.into_iter().map(say).collect();
        if !entries.is_empty() {
            // The block that made the shard's end may be among what goes, and its segment with it.
            entries.push_back(entry(Kind::SetEnd, LayerId(0), known.end_submitted));
        }
        // Last: what is cut off before it was not applied.
        if revision > known.revision {
            entries.push_back(entry(Kind::LayersRevision, LayerId(0), revision));
        }
        if entries.is_empty() {
            // It was said before; perhaps that is not durable yet.
            self.flush_upto(id, draft);
            return Taken::All;
        }
        self.take_entries(Some(id), entries, draft)
    }

    /// Puts as many entries into the draft as there is room for; the request is answered with the last of them, when it
    /// is durable.
    pub(super) fn take_entries(
        &mut self,
        id: Option<RequestId>,
        mut entries: VecDeque<Entry>,
        draft: &mut Draft<B>,
    ) -> Taken<B> {
        // All or nothing, as far as one batch holds them.
        let is_split = !draft.is_empty() && entries.len() <= ENTRIES_MAX / 2;
        let has_room = !is_split || draft.has_room_for(entries.len());
        while let Some(entry) = entries.front() {
            if !has_room || !draft.has_inline_room(0) {
                let kind = OpKind::Entries(entries);
                return Taken::Rest(Op { id, kind });
            }
            draft.push(*entry);
            if entry.kind.is_of_layers() {
                self.ledger.layers_coming(entry.shard_id());
            }
            entries.pop_front();
        }
        if let Some(id) = id {
            draft.waiters.push(Waiter { id, is_durable: true });
        }
        Taken::All
    }

    /// A void reaches down through all that was merged: an entry for each range of numbers.
    pub(super) fn push_void(&self, blocks: &mut Blocks<B>, index: u32, draft: &mut Draft<B>) -> bool {
        let known = &self.ledger.shards[&blocks.shard];
        let parts = known.fates.parts(blocks.layer);
        let is_one = parts.len() == 1;
        for part in parts.into_iter().skip(blocks.parts) {
            if !draft.has_room_for(1) {
                return false;
            }
            blocks.parts += 1;
            let entry = Entry {
                layer: part.end().0,
                seq: u64::from(part.end().0 - part.start().0),
                ..blocks.entry(index, 1, FLAG_NO_END)
            };
            let last = draft.entries.last_mut().filter(|last| {
                let next = Entry {
                    block: last.block + last.count,
                    count: 1,
                    birth: 0,
                    ..**last
                };
                is_one && next == entry && BlockNo(entry.block).slot() != 0
            });
            match last {
                Some(last) => last.count += 1,
                None => draft.push(entry),
            }
        }
        blocks.parts = 0;
        true
    }
}
