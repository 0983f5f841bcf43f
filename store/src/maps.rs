//! Maps: which layer has each block of a leaf, for readers that see several layers with that leaf.
//!
//! A map costs the loading of every one of those leaves once; after that a read touches the leaf that has its block and
//! no other, however deep the layers are. It names layers and not addresses: what cleaning moves or a guest overwrites
//! is found in the leaf of its layer as ever, and a map only has to hear when a block of some layer comes to be there, or
//! ceases to be. [`Maps::note`] is told so of every change of a leaf in memory.
//!
//! Maps that are not complete yet are kept right by the same rule: of the layers that were seen to have a block the newest
//! counts, in whatever order they are seen.

use std::collections::VecDeque;
use std::ops::{Bound, Range};

use smallvec::SmallVec;
use types::{InFlight, LayerId, LeafNo, Lineage, ShardId, ShardNo};

use crate::LeafKey;
use crate::cache::FastMap;
use crate::leaf::{Leaf, SLOTS};
use crate::ledger::Ledger;

/// Of a block that no layer has.
const NOBODY: u16 = u16::MAX;
/// Layers that a map names; more, as repair may come to add, and it is made anew.
const NAMED_MAX: usize = 2 * SLOTS;
/// What a map takes beside itself, its layers and its lineage: its places in the tables.
const OVERHEAD: u64 = 128;
/// For each step of its lineage: the step, and a place in a table.
const STEP_COST: u64 = 64;

/// The place of a layer in a lineage; the lower is the newer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Rank {
    pub(crate) step: usize,
    /// Counted down from the highest number there is.
    down: u32,
}

impl Rank {
    fn new(step: usize, layer: LayerId) -> Rank {
        Rank {
            step,
            down: u32::MAX - layer.0,
        }
    }

    pub(crate) fn layer(self) -> LayerId {
        LayerId(u32::MAX - self.down)
    }
}

/// The map of one leaf for one lineage.
pub(crate) struct LayerMap {
    lineage: Lineage,
    no: ShardNo,
    leaf: LeafNo,
    /// What `which` counts.
    named: Vec<Rank>,
    /// By slot, the layer that has it.
    which: [u16; SLOTS],
    undecided: usize,
    /// The last layer that was looked at.
    seen: Option<Rank>,
    is_complete: bool,
    /// Lookups that go by it.
    users: u32,
    is_referenced: bool,
}

impl LayerMap {
    pub(crate) fn is_complete(&self) -> bool {
        self.is_complete
    }

    /// The newest layer that has a block.
    pub(crate) fn decider(&self, slot: usize) -> Option<Rank> {
        self.named.get(usize::from(self.which[slot])).copied()
    }

    /// The key of the leaf that a layer of the lineage has.
    pub(crate) fn key(&self, rank: Rank) -> LeafKey {
        LeafKey {
            shard: ShardId {
                vdi: self.lineage.steps()[rank.step].vdi,
                no: self.no,
            },
            layer: rank.layer(),
            leaf: self.leaf,
        }
    }

    /// The layers with this leaf that are still to be looked at, the newest first.
    pub(crate) fn unseen<'a>(&'a self, ledger: &'a Ledger) -> impl Iterator<Item = Rank> + 'a {
        candidates(ledger, &self.lineage, self.no, self.leaf, self.seen)
    }

    fn cost(&self) -> u64 {
        let named = (self.named.capacity() * size_of::<Rank>()) as u64;
        size_of::<LayerMap>() as u64 + named + OVERHEAD + STEP_COST * self.lineage.steps().len() as u64
    }

    /// A block of a layer is there. False if it cannot be said any more.
    fn set(&mut self, rank: Rank, slot: usize) -> bool {
        match self.decider(slot) {
            Some(decider) if decider <= rank => return true,
            Some(_) => {}
            None => self.undecided -= 1,
        }
        let known = self.named.iter().rposition(|named| *named == rank);
        let at = known.unwrap_or_else(|| {
            self.named.push(rank);
            self.named.len() - 1
        });
        self.which[slot] = at as u16;
        self.named.len() <= NAMED_MAX
    }

    /// A block of a layer is not there (any more). False if what is there instead is not known.
    fn clear(&self, rank: Rank, slot: usize) -> bool {
        self.decider(slot) != Some(rank)
    }
}

/// Layers of a lineage that have a leaf, from the newest that is older than `after`.
fn candidates<'a>(
    ledger: &'a Ledger,
    lineage: &'a Lineage,
    no: ShardNo,
    leaf: LeafNo,
    after: Option<Rank>,
) -> impl Iterator<Item = Rank> + 'a {
    let first = after.map_or(0, |rank| rank.step);
    (first..)
        .zip(&lineage.steps()[first..])
        .flat_map(move |(at, step)| {
            let seen = after.filter(|after| after.step == at).map(Rank::layer);
            let highest = seen.map_or(Bound::Included(step.highest), Bound::Excluded);
            let layers = (Bound::Included(step.lowest), highest);
            let shard = ledger.shards.get(&ShardId { vdi: step.vdi, no });
            shard.into_iter().flat_map(move |shard| {
                let known = shard.layers.range(layers).rev();
                known
                    .filter(move |(layer, leaves)| shard.shows(**layer, leaves, leaf))
                    .map(move |(layer, _)| Rank::new(at, *layer))
            })
        })
}

type Head = (ShardId, LayerId, LeafNo);

fn head_of(lineage: &Lineage, no: ShardNo, leaf: LeafNo) -> Head {
    let (vdi, layer) = lineage.newest();
    (ShardId { vdi, no }, layer, leaf)
}

/// All of them, bounded.
pub(crate) struct Maps {
    maps: InFlight<LayerMap>,
    by_head: FastMap<Head, u64>,
    /// Those that a leaf of any layer of a shard may concern.
    by_place: FastMap<(ShardId, LeafNo), SmallVec<[u64; 1]>>,
    /// Every map, and numbers of some that are gone; the next to leave first, by second chance.
    queue: VecDeque<u64>,
    bytes: u64,
    bytes_max: u64,
}

impl Maps {
    pub(crate) fn new(bytes_max: u64) -> Maps {
        Maps {
            maps: InFlight::default(),
            by_head: FastMap::default(),
            by_place: FastMap::default(),
            queue: VecDeque::new(),
            bytes: 0,
            bytes_max,
        }
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.maps.is_empty()
    }

    /// The map of a leaf for a lineage.
    pub(crate) fn find(&mut self, lineage: &Lineage, no: ShardNo, leaf: LeafNo) -> Option<u64> {
        if self.is_empty() {
            return None;
        }
        let number = *self.by_head.get(&head_of(lineage, no, leaf))?;
        let map = self.maps.get_mut(number).expect("a map that is listed");
        // A clone that was flattened has the head it had, and no parent any more.
        let is_it = map.lineage == *lineage;
        map.is_referenced |= is_it;
        is_it.then_some(number)
    }

    /// Begins a map; it says nothing yet. Others leave for it where there is no room.
    pub(crate) fn begin(&mut self, lineage: &Lineage, no: ShardNo, leaf: LeafNo) -> u64 {
        let map = LayerMap {
            lineage: lineage.clone(),
            no,
            leaf,
            named: Vec::new(),
            which: [NOBODY; SLOTS],
            undecided: SLOTS,
            seen: None,
            is_complete: false,
            users: 0,
            is_referenced: true,
        };
        self.bytes += map.cost();
        self.make_room();
        let number = self.maps.insert(map);
        self.queue.push_back(number);
        let other = self.by_head.insert(head_of(lineage, no, leaf), number);
        // In use it stays, or two readers with a head in common and different ancestors would go on beginning anew.
        let is_used = |other: &u64| self.maps.get(*other).is_some_and(|map| map.users > 0);
        if let Some(other) = other.filter(|other| !is_used(other)) {
            self.remove(other);
        }
        for place in places(lineage, no, leaf) {
            self.by_place.entry(place).or_default().push(number);
        }
        number
    }

    pub(crate) fn get(&self, number: u64) -> Option<&LayerMap> {
        self.maps.get(number)
    }

    /// It stays while somebody uses it, unless it becomes wrong.
    pub(crate) fn hold(&mut self, number: u64) {
        self.maps.get_mut(number).expect("a map that is there").users += 1;
    }

    pub(crate) fn let_go(&mut self, number: u64) {
        if let Some(map) = self.maps.get_mut(number) {
            assert!(map.users > 0, "a map let go of once too often");
            map.users -= 1;
            let head = head_of(&map.lineage, map.no, map.leaf);
            if map.users == 0 && self.by_head.get(&head) != Some(&number) {
                self.remove(number);
            }
        }
        self.make_room();
    }

    /// What a layer's leaf says, `None` if there is no such leaf. To be said of the layers from the newest on.
    pub(crate) fn add(&mut self, number: u64, rank: Rank, leaf: Option<&Leaf>) {
        let is_good = self.change(number, |map| {
            map.seen = Some(rank);
            let is_good =
                leaf.is_none_or(|leaf| (0..SLOTS).all(|slot| !leaf.has(slot) || map.set(rank, slot)));
            map.is_complete |= map.undecided == 0;
            is_good
        });
        if !is_good {
            self.remove(number);
        }
    }

    /// There is no further layer with this leaf.
    pub(crate) fn complete(&mut self, number: u64) {
        self.change(number, |map| map.is_complete = true);
    }

    /// Some slots of a leaf were changed.
    pub(crate) fn note(&mut self, key: LeafKey, leaf: &Leaf, slots: Range<usize>) {
        let Some(numbers) = self.by_place.get(&(key.shard, key.leaf)).cloned() else {
            return;
        };
        for number in numbers {
            let lineage = &self.maps.get(number).expect("a map that is listed").lineage;
            let Some(step) = lineage.step_of(key.shard.vdi, key.layer) else {
                continue;
            };
            let rank = Rank::new(step, key.layer);
            let is_good = self.change(number, |map| {
                slots.clone().all(|slot| match leaf.has(slot) {
                    true => map.set(rank, slot),
                    false => map.clear(rank, slot),
                })
            });
            if !is_good {
                self.remove(number);
            }
        }
    }

    /// Layers of a shard are to hold nothing any more, also what of them is not in memory.
    pub(crate) fn forget_shard(&mut self, shard: ShardId) {
        let is_of_it = |map: &LayerMap| {
            map.no == shard.no && map.lineage.steps().iter().any(|step| step.vdi == shard.vdi)
        };
        let numbers = self.maps.numbers(is_of_it);
        numbers.into_iter().for_each(|number| self.remove(number));
    }

    fn change<R>(&mut self, number: u64, change: impl FnOnce(&mut LayerMap) -> R) -> R {
        let map = self.maps.get_mut(number).expect("a map that is there");
        let before = map.cost();
        let result = change(map);
        self.bytes = self.bytes + map.cost() - before;
        result
    }

    fn make_room(&mut self) {
        // Twice around: the second time nothing is referenced.
        for _ in 0..2 * self.queue.len() {
            if self.bytes <= self.bytes_max {
                break;
            }
            let number = self.queue.pop_front().expect("counted");
            let Some(map) = self.maps.get_mut(number) else {
                continue;
            };
            if map.users > 0 || std::mem::take(&mut map.is_referenced) {
                self.queue.push_back(number);
            } else {
                self.remove(number);
            }
        }
        if self.queue.len() > 2 * self.maps.len() + 16 {
            let maps = &self.maps;
            self.queue.retain(|number| maps.get(*number).is_some());
        }
    }

    fn remove(&mut self, number: u64) {
        let Some(map) = self.maps.remove(number) else {
            return;
        };
        self.bytes -= map.cost();
        let head = head_of(&map.lineage, map.no, map.leaf);
        if self.by_head.get(&head) == Some(&number) {
            self.by_head.remove(&head);
        }
        for place in places(&map.lineage, map.no, map.leaf) {
            let numbers = self
                .by_place
                .get_mut(&place)
                .expect("a map is listed where it was");
            numbers.retain(|other| *other != number);
            if numbers.is_empty() {
                self.by_place.remove(&place);
            }
        }
    }
}

/// The leaves whose changes may concern a map, each once.
fn places(lineage: &Lineage, no: ShardNo, leaf: LeafNo) -> impl Iterator<Item = (ShardId, LeafNo)> {
    let steps = lineage.steps();
    let is_first = move |at: usize| steps[..at].iter().all(|other| other.vdi != steps[at].vdi);
    let vdis = (0..steps.len())
        .filter(move |at| is_first(*at))
        .map(move |at| steps[at].vdi);
    vdis.map(move |vdi| (ShardId { vdi, no }, leaf))
}

/// Where a leaf is to be looked for.
pub(crate) enum Source {
    Nowhere,
    /// One layer alone has it.
    One(LeafKey),
    /// Several, or one among so many that finding it is worth remembering.
    Several,
}

/// Layers and steps that are walked through for every read; where there are more, a map remembers the walk.
const WALKED_MAX: usize = 16;

/// Which layers of a lineage have a leaf.
pub(crate) fn source(
    ledger: &Ledger,
    maps: &mut Maps,
    lineage: &Lineage,
    no: ShardNo,
    leaf: LeafNo,
) -> Source {
    if maps.find(lineage, no, leaf).is_some() {
        return Source::Several;
    }
    let mut found = None;
    let mut walked = 0;
    for step in lineage.steps() {
        walked += 1;
        let shard = ShardId { vdi: step.vdi, no };
        let Some(known) = ledger.shards.get(&shard) else {
            continue;
        };
        for (layer, leaves) in known.layers.range(step.lowest..=step.highest).rev() {
            walked += 1;
            let has_it = known.shows(*layer, leaves, leaf);
            if (has_it && found.is_some()) || walked > WALKED_MAX {
                return Source::Several;
            }
            if has_it {
                let layer = *layer;
                found = Some(LeafKey { shard, layer, leaf });
            }
        }
    }
    found.map_or(Source::Nowhere, Source::One)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::leaf::{Slot, State};
    use crate::segment::Geometry;
    use types::{LineageStep, VdiId};

    fn shard(vdi: u32) -> ShardId {
        ShardId {
            vdi: VdiId(vdi),
            no: ShardNo(3),
        }
    }

    fn key(vdi: u32, layer: u32) -> LeafKey {
        LeafKey {
            shard: shard(vdi),
            layer: LayerId(layer),
            leaf: LeafNo(5),
        }
    }

    fn lineage(steps: &[(u32, u32, u32)]) -> Lineage {
        let steps = steps.iter().map(|(vdi, lowest, highest)| LineageStep {
            vdi: VdiId(*vdi),
            lowest: LayerId(*lowest),
            highest: LayerId(*highest),
        });
        Lineage::new(&steps.collect::<Vec<_>>()).expect("in order")
    }

    fn leaf(slots: &[usize]) -> Box<Leaf> {
        let mut leaf = Leaf::empty();
        for slot in slots {
            let state = State::Zero;
            leaf.set(
                *slot,
                Slot {
                    state,
                    ..Slot::default()
                },
            );
        }
        leaf
    }

    fn ledger(leaves: &[LeafKey]) -> Ledger {
        let mut ledger = Ledger::new(Geometry {
            first_block: 256,
            segment_blocks: 64,
            segments: 8,
        });
        for key in leaves {
            let shard = ledger.shards.entry(key.shard).or_default();
            shard.layers.entry(key.layer).or_default().insert(key.leaf);
        }
        ledger
    }

    fn decider(maps: &Maps, number: u64, slot: usize) -> Option<LeafKey> {
        let map = maps.get(number).expect("it is there");
        map.decider(slot).map(|rank| map.key(rank))
    }

    #[test]
    fn candidates_come_newest_first_and_only_those_of_the_lineage() {
        let ledger = ledger(&[
            key(2, 0),
            key(2, 1),
            key(1, 9),
            key(1, 5),
            key(1, 4),
            key(1, 0),
            key(3, 0),
        ]);
        let lineage = lineage(&[(2, 0, 1), (1, 9, 9), (1, 0, 4)]);
        let all: Vec<Rank> = candidates(&ledger, &lineage, ShardNo(3), LeafNo(5), None).collect();
        let layers: Vec<(usize, u32)> = all.iter().map(|rank| (rank.step, rank.layer().0)).collect();
        assert_eq!(layers, [(0, 1), (0, 0), (1, 9), (2, 4), (2, 0)]);
        for (at, rank) in all.iter().enumerate() {
            let rest = candidates(&ledger, &lineage, ShardNo(3), LeafNo(5), Some(*rank));
            assert!(rest.eq(all[at + 1..].iter().copied()), "after {rank:?}");
        }
        assert_eq!(
            candidates(&ledger, &lineage, ShardNo(3), LeafNo(6), None).count(),
            0
        );
    }

    #[test]
    fn the_newest_that_has_a_block_decides_in_whatever_order_it_is_said() {
        let lineage = lineage(&[(2, 0, 1), (1, 0, 4)]);
        let mut maps = Maps::new(1 << 20);
        let number = maps.begin(&lineage, ShardNo(3), LeafNo(5));
        let first = candidates(&ledger(&[key(2, 1)]), &lineage, ShardNo(3), LeafNo(5), None).next();
        maps.add(number, first.expect("a candidate"), Some(&leaf(&[0])));
        maps.note(key(1, 2), &leaf(&[0, 1, 2]), 0..SLOTS);
        assert_eq!(decider(&maps, number, 1), Some(key(1, 2)));
        maps.note(key(1, 4), &leaf(&[1]), 1..2);
        maps.note(key(1, 0), &leaf(&[1, 2, 3]), 0..SLOTS);
        maps.note(key(1, 7), &leaf(&[4]), 4..5);
        let wanted = [
            Some(key(2, 1)),
            Some(key(1, 4)),
            Some(key(1, 2)),
            Some(key(1, 0)),
            None,
        ];
        assert!((0..5).map(|slot| decider(&maps, number, slot)).eq(wanted));
        // A block that goes from a layer that decided nothing changes nothing; from one that did, all.
        maps.note(key(1, 2), &leaf(&[0, 2]), 1..2);
        assert!(maps.get(number).is_some());
        maps.note(key(1, 4), &leaf(&[]), 1..2);
        assert!(maps.get(number).is_none() && maps.is_empty() && maps.bytes() == 0);
        assert!(maps.by_place.is_empty() && maps.by_head.is_empty());
    }

    #[test]
    fn a_lineage_with_the_same_head_and_other_ancestors_has_its_own_map() {
        let mut maps = Maps::new(1 << 20);
        let (clone, flat) = (lineage(&[(2, 0, 1), (1, 0, 4)]), lineage(&[(2, 0, 1)]));
        let number = maps.begin(&clone, ShardNo(3), LeafNo(5));
        assert_eq!(maps.find(&clone, ShardNo(3), LeafNo(5)), Some(number));
        assert_eq!(maps.find(&flat, ShardNo(3), LeafNo(5)), None);
        maps.hold(number);
        let other = maps.begin(&flat, ShardNo(3), LeafNo(5));
        assert_eq!(maps.find(&flat, ShardNo(3), LeafNo(5)), Some(other));
        assert!(maps.get(number).is_some(), "somebody goes by it");
        maps.let_go(number);
        assert!(maps.get(number).is_none() && maps.get(other).is_some());
        maps.forget_shard(shard(1));
        assert!(maps.get(other).is_some(), "it has nothing of that one");
        maps.forget_shard(shard(2));
        assert!(maps.is_empty() && maps.by_place.is_empty());
    }

    #[test]
    fn memory_is_bounded_and_what_is_used_stays() {
        let mut maps = Maps::new(16 << 10);
        let lineage = lineage(&[(1, 0, 4)]);
        let used = maps.begin(&lineage, ShardNo(0), LeafNo(5));
        maps.hold(used);
        for no in 1..1000 {
            maps.begin(&lineage, ShardNo(no), LeafNo(5));
            assert!(maps.bytes() <= (16 << 10) + 1024, "{} B", maps.bytes());
        }
        assert!(maps.get(used).is_some() && maps.queue.len() < 100);
        maps.let_go(used);
        for no in 1000..1100 {
            maps.begin(&lineage, ShardNo(no), LeafNo(5));
        }
        assert!(maps.get(used).is_none());
        let bytes: u64 = maps.maps.values().map(LayerMap::cost).sum();
        assert_eq!(bytes, maps.bytes());
    }
}
