//! The leaves in memory, bounded.
//!
//! The setting covers what checkpoints take too. One holds what it captured three times over before it is through: the
//! values themselves, RocksDB's batch of them, RocksDB's table in memory. A value whose blocks were all written by
//! themselves takes up to 5.6 KiB, so that a captured leaf costs more than twice what a cached one does. Half of the
//! memory is for leaves; the other half is enough for checkpoints of at most two fifths of them: a fifth that is dirty
//! starts one, and while one is being saved, writes wait when two fifths are dirty again.
//!
//! Maps of layers (`maps.rs`) may take an eighth of what leaves may, and leaves have so much less.
//!
//! A leaf leaves memory only when it is clean, saved and nobody holds it; second chance by a clock hand. When
//! nothing can leave, the caller waits and starts a checkpoint, which makes dirty leaves clean.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::ops::Range;

use crate::LeafKey;
use crate::leaf::Leaf;
use crate::maps::{Maps, Rank};

/// Multiplies and folds: keys are small integers of our own, not hostile input. Nothing observes the order.
#[derive(Default)]
pub(crate) struct KeyHasher(u64);

impl Hasher for KeyHasher {
    fn finish(&self) -> u64 {
        self.0 ^ (self.0 >> 29)
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_u32(&mut self, value: u32) {
        self.write_u64(u64::from(value));
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = (self.0.rotate_left(23) ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

pub(crate) type FastMap<K, V> = HashMap<K, V, BuildHasherDefault<KeyHasher>>;

/// Memory a cached leaf costs, its slot and its place in the map included.
pub(crate) const LEAF_COST: u64 = size_of::<Leaf>() as u64 + size_of::<Cached>() as u64 + 64;
/// Maps have one part in so many of the memory for leaves.
const MAPS_PART: u64 = 8;
/// Enough for a few requests, whatever the setting says.
const LEAVES_MIN: usize = 64;

/// A leaf in memory, or on its way there.
pub(crate) struct Cached {
    pub(crate) key: LeafKey,
    /// `None` while it is being loaded.
    pub(crate) leaf: Option<Box<Leaf>>,
    /// Requests that look something up in it once it is here.
    pub(crate) waiters: Vec<u64>,
    pins: u32,
    is_dirty: bool,
    /// Part of a checkpoint that is not durable yet: the index still has its old value.
    is_saving: bool,
    is_referenced: bool,
}

impl Cached {
    fn may_leave(&self) -> bool {
        self.leaf.is_some() && self.pins == 0 && !self.is_dirty && !self.is_saving && self.waiters.is_empty()
    }
}

/// Position of a leaf in the cache; good while the leaf is pinned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CacheAt(u32);

pub(crate) struct Cache {
    slots: Vec<Option<Cached>>,
    map: FastMap<LeafKey, u32>,
    vacant: Vec<u32>,
    hand: usize,
    leaves_max: usize,
    may_leave: usize,
    pinned: usize,
    dirty: Vec<u32>,
    saving: Vec<u32>,
    pub(crate) maps: Maps,
}

impl Cache {
    pub(crate) fn new(bytes: u64) -> Cache {
        let leaves = bytes / 2 / LEAF_COST;
        let leaves_max = usize::try_from(leaves)
            .unwrap_or(usize::MAX)
            .clamp(LEAVES_MIN, u32::MAX as usize);
        Cache {
            slots: Vec::new(),
            map: FastMap::default(),
            vacant: Vec::new(),
            hand: 0,
            leaves_max,
            may_leave: 0,
            pinned: 0,
            dirty: Vec::new(),
            saving: Vec::new(),
            maps: Maps::new(leaves_max as u64 * LEAF_COST / MAPS_PART),
        }
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.map.len() as u64 * LEAF_COST + self.maps.bytes()
    }

    /// How many leaves may be here beside the maps. Maps that lookups use may be more than their part for a while.
    fn room(&self) -> usize {
        let maps = self.maps.bytes().div_ceil(LEAF_COST) as usize;
        self.leaves_max - maps.min(self.leaves_max / 2)
    }

    /// Enough is dirty for a checkpoint to be worth its while.
    pub(crate) fn is_save_due(&self) -> bool {
        self.dirty.len() >= self.leaves_max / 5
    }

    /// As much is dirty as the next checkpoint may capture.
    pub(crate) fn is_save_full(&self) -> bool {
        self.dirty.len() >= self.leaves_max / 5 * 2
    }

    /// Appends under way hold half of the cache: let them finish first.
    pub(crate) fn is_half_pinned(&self) -> bool {
        self.pinned >= self.leaves_max / 2
    }

    pub(crate) fn has_dirty(&self) -> bool {
        !self.dirty.is_empty()
    }

    pub(crate) fn find(&mut self, key: LeafKey) -> Option<CacheAt> {
        let at = *self.map.get(&key)?;
        let slot = self.slots[at as usize].as_mut().expect("mapped slots are taken");
        slot.is_referenced = true;
        Some(CacheAt(at))
    }

    pub(crate) fn get(&self, at: CacheAt) -> &Cached {
        self.slots[at.0 as usize].as_ref().expect("a cached leaf")
    }

    /// The content of a leaf that is here.
    pub(crate) fn leaf(&self, at: CacheAt) -> &Leaf {
        self.get(at).leaf.as_deref().expect("a leaf that is here")
    }

    fn change<R>(&mut self, at: CacheAt, change: impl FnOnce(&mut Cached) -> R) -> R {
        let slot = self.slots[at.0 as usize].as_mut().expect("a cached leaf");
        let before = (slot.may_leave(), slot.pins > 0);
        let result = change(slot);
        let after = (slot.may_leave(), slot.pins > 0);
        self.may_leave = self.may_leave + usize::from(after.0) - usize::from(before.0);
        self.pinned = self.pinned + usize::from(after.1) - usize::from(before.1);
        result
    }

    /// Makes room for one more leaf and takes it in, `None` as content meaning that it is being loaded.
    /// `extra` leaves above the limit are allowed. `None` if there is no room now.
    pub(crate) fn insert(&mut self, key: LeafKey, leaf: Option<Box<Leaf>>, extra: usize) -> Option<CacheAt> {
        debug_assert!(!self.map.contains_key(&key));
        let room = self.room();
        while self.map.len() >= room && self.may_leave > 0 {
            self.evict_one();
        }
        if self.map.len() >= room + extra {
            return None;
        }
        let cached = Cached {
            key,
            leaf,
            waiters: Vec::new(),
            pins: 0,
            is_dirty: false,
            is_saving: false,
            is_referenced: true,
        };
        self.may_leave += usize::from(cached.may_leave());
        let at = match self.vacant.pop() {
            Some(at) => at,
            None => {
                self.slots.push(None);
                (self.slots.len() - 1) as u32
            }
        };
        self.slots[at as usize] = Some(cached);
        self.map.insert(key, at);
        Some(CacheAt(at))
    }

    fn evict_one(&mut self) {
        // Ends: something may leave, and the second pass finds it unreferenced.
        loop {
            self.hand = (self.hand + 1) % self.slots.len();
            let Some(slot) = self.slots[self.hand].as_mut().filter(|slot| slot.may_leave()) else {
                continue;
            };
            if std::mem::take(&mut slot.is_referenced) {
                continue;
            }
            self.map.remove(&slot.key);
            self.slots[self.hand] = None;
            self.vacant.push(self.hand as u32);
            self.may_leave -= 1;
            return;
        }
    }

    pub(crate) fn pin(&mut self, at: CacheAt) {
        self.change(at, |slot| slot.pins += 1);
    }

    pub(crate) fn unpin(&mut self, at: CacheAt) {
        self.change(at, |slot| {
            assert!(slot.pins > 0, "unpinned leaf");
            slot.pins -= 1;
        });
    }

    pub(crate) fn wait(&mut self, at: CacheAt, lookup: u64) {
        self.change(at, |slot| slot.waiters.push(lookup));
    }

    pub(crate) fn take_waiters(&mut self, at: CacheAt) -> Vec<u64> {
        self.change(at, |slot| std::mem::take(&mut slot.waiters))
    }

    /// A load arrived.
    pub(crate) fn fill(&mut self, at: CacheAt, leaf: Box<Leaf>) {
        self.change(at, |slot| {
            assert!(slot.leaf.is_none(), "leaf loaded twice");
            slot.leaf = Some(leaf);
        });
    }

    pub(crate) fn is_ready(&self, at: CacheAt) -> bool {
        self.get(at).leaf.is_some()
    }

    /// Changes some slots of a leaf that is here; `change` says whether it did.
    pub(crate) fn update(
        &mut self,
        at: CacheAt,
        slots: Range<usize>,
        change: impl FnOnce(&mut Leaf) -> bool,
    ) {
        let (is_changed, became_dirty) = self.change(at, |slot| {
            let is_changed = change(slot.leaf.as_mut().expect("a leaf that is here"));
            let became_dirty = is_changed && !slot.is_dirty;
            slot.is_dirty |= is_changed;
            (is_changed, became_dirty)
        });
        if became_dirty {
            self.dirty.push(at.0);
        }
        if is_changed && !self.maps.is_empty() {
            let slot = self.slots[at.0 as usize].as_ref().expect("a cached leaf");
            let leaf = slot.leaf.as_deref().expect("a leaf that is here");
            self.maps.note(slot.key, leaf, slots);
        }
    }

    /// Takes the content of a leaf that is here and is nobody's any more; the index need not hear of it by this leaf.
    pub(crate) fn take(&mut self, at: CacheAt) -> Box<Leaf> {
        self.change(at, |slot| {
            let leaf = slot.leaf.as_mut().expect("a leaf that is here");
            std::mem::replace(leaf, Leaf::empty())
        })
    }

    /// Tells a map what the leaf of one of its layers says, if that layer has it.
    pub(crate) fn add_to_map(&mut self, map: u64, rank: Rank, at: Option<CacheAt>) {
        let slot = at.map(|at| self.slots[at.0 as usize].as_ref().expect("a cached leaf"));
        let leaf = slot.map(|slot| slot.leaf.as_deref().expect("a leaf that is here"));
        self.maps.add(map, rank, leaf);
    }

    /// Every leaf in memory of which `want` is true.
    pub(crate) fn select(&self, want: impl Fn(&LeafKey) -> bool) -> Vec<CacheAt> {
        let taken = (0..)
            .zip(&self.slots)
            .filter_map(|(at, slot)| slot.as_ref().map(|slot| (at, slot)));
        taken
            .filter(|(_, slot)| slot.leaf.is_some() && want(&slot.key))
            .map(|(at, _)| CacheAt(at))
            .collect()
    }

    /// Hands out the dirty leaves and holds them until [`Cache::saved`].
    pub(crate) fn begin_save(&mut self) -> Vec<CacheAt> {
        assert!(self.saving.is_empty(), "one checkpoint at a time");
        self.saving = std::mem::take(&mut self.dirty);
        for at in self.saving.clone() {
            self.change(CacheAt(at), |slot| {
                slot.is_dirty = false;
                slot.is_saving = true;
            });
        }
        self.saving.iter().map(|at| CacheAt(*at)).collect()
    }

    /// The checkpoint is durable.
    pub(crate) fn saved(&mut self) {
        for at in std::mem::take(&mut self.saving) {
            self.change(CacheAt(at), |slot| slot.is_saving = false);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use types::{LayerId, LeafNo, ShardId};

    fn key(leaf: u32) -> LeafKey {
        LeafKey {
            shard: ShardId::from_u64(1),
            layer: LayerId(0),
            leaf: LeafNo(leaf),
        }
    }

    #[test]
    fn dirty_saving_and_pinned_leaves_stay() {
        let mut cache = Cache::new(0);
        let max = LEAVES_MIN as u32;
        let all: Vec<CacheAt> = (0..max)
            .map(|n| cache.insert(key(n), Some(Leaf::empty()), 0).expect("room"))
            .collect();
        cache.pin(all[0]);
        for at in &all[1..] {
            cache.update(*at, 0..1, |_| true);
        }
        assert!(cache.insert(key(999), None, 0).is_none());
        assert_eq!(cache.begin_save().len(), all.len() - 1);
        assert!(cache.insert(key(999), None, 0).is_none());
        cache.update(all[1], 0..1, |_| true);
        cache.saved();
        for n in 0..max - 2 {
            assert!(cache.insert(key(1000 + n), None, 0).is_some());
        }
        assert!(cache.insert(key(5000), None, 0).is_none());
        assert!(cache.insert(key(5000), None, 1).is_some());
        assert!(cache.find(key(0)).is_some() && cache.find(key(1)).is_some() && cache.find(key(2)).is_none());
    }
}
