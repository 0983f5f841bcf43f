//! What is where: segments, shards, and the one rule by which entries of the log change them.
//!
//! Used alike by the running store and by recovery, so that replay cannot decide differently. The rule: of two
//! things said about the same block (or record, or end), the one with the later birth holds; a move keeps its
//! birth and changes only the address; nothing of a shard counts that is older than the shard's drop.

use std::collections::BTreeMap;

use types::{BLOCK_BYTES, LayerId, LeafNo, Seq, ShardId};

use crate::batch::{Entry, Kind, batch_of};
use crate::bytes::{Reader, put_varint};
use crate::fates::{Fates, Said};
use crate::leaf::{Leaf, Piece, SLOTS, Slot, State, Voided};
use crate::segment::{Geometry, SegmentTable};
use crate::{LeafKey, ShardSummary};

/// Which leaves of a layer exist: in the index, or changed in memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct LeafSet {
    words: Vec<u64>,
}

impl LeafSet {
    pub(crate) fn contains(&self, leaf: LeafNo) -> bool {
        let at = leaf.0 as usize;
        self.words
            .get(at / 64)
            .is_some_and(|word| word >> (at % 64) & 1 == 1)
    }

    pub(crate) fn insert(&mut self, leaf: LeafNo) {
        let at = leaf.0 as usize;
        if self.words.len() <= at / 64 {
            self.words.resize(at / 64 + 1, 0);
        }
        self.words[at / 64] |= 1 << (at % 64);
    }

    pub(crate) fn remove(&mut self, leaf: LeafNo) {
        let at = leaf.0 as usize;
        if let Some(word) = self.words.get_mut(at / 64) {
            *word &= !(1 << (at % 64));
        }
        while self.words.last() == Some(&0) {
            self.words.pop();
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.words.is_empty()
    }

    fn add(&mut self, other: &LeafSet) {
        self.words.resize(self.words.len().max(other.words.len()), 0);
        for (word, more) in self.words.iter_mut().zip(&other.words) {
            *word |= more;
        }
    }

    /// The first leaf at or after `from`.
    pub(crate) fn next(&self, from: LeafNo) -> Option<LeafNo> {
        let mut at = from.0 as usize;
        while let Some(word) = self.words.get(at / 64) {
            let rest = word >> (at % 64);
            if rest != 0 {
                return Some(LeafNo((at + rest.trailing_zeros() as usize) as u32));
            }
            at = (at / 64 + 1) * 64;
        }
        None
    }
}

/// What the disk holds of one shard.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Shard {
    /// False for the memory of a dropped shard, and before its record is in the log.
    pub(crate) is_known: bool,
    /// Its record is on the way to the log. Not kept.
    pub(crate) will_be_known: bool,
    /// Drops on the way to the log. Not kept: a checkpoint must not say what the log may never say.
    pub(crate) drops_coming: u32,
    pub(crate) end: u64,
    /// What `end` will be when everything submitted is applied. Not kept.
    pub(crate) end_submitted: u64,
    /// Birth of the last word on `end` that was not a write of the stream.
    pub(crate) end_birth: u64,
    /// Birth and seq of the youngest write of the stream that was seen. Not kept: what a checkpoint knows of, no drop
    /// comes after.
    pub(crate) tip: (u64, u64),
    pub(crate) record: Vec<u8>,
    pub(crate) record_birth: u64,
    /// Everything older is gone.
    pub(crate) drop_birth: u64,
    /// Leaves may still hold what a drop made void.
    pub(crate) is_purging: bool,
    pub(crate) data_blocks: u64,
    pub(crate) layers: BTreeMap<LayerId, LeafSet>,
    /// Which layers are gone, and which were merged.
    pub(crate) fates: Fates,
    /// By home, the leaves that other layers still have of it. Not kept: it follows from the two above.
    pub(crate) unfolded: BTreeMap<LayerId, LeafSet>,
    /// Changes of layers on the way to the log. Not kept.
    pub(crate) changes_coming: u32,
    /// Of its VDI's layers: the last that was applied, and the birth of the entry that says so.
    pub(crate) revision: u64,
    pub(crate) revision_birth: u64,
}

const VERSION: u8 = 1;
/// Words of a leaf set of the largest shard; bounds what a value of the index can make us allocate.
const LEAF_WORDS_MAX: u64 = (types::SHARD_BLOCKS_MAX / types::LEAF_BLOCKS / 64) as u64;

impl Shard {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = vec![VERSION, u8::from(self.is_known) | u8::from(self.is_purging) << 1];
        for value in [
            self.end,
            self.end_birth,
            self.record_birth,
            self.drop_birth,
            self.data_blocks,
            self.record.len() as u64,
        ] {
            put_varint(&mut out, value);
        }
        out.extend_from_slice(&self.record);
        put_varint(&mut out, self.layers.len() as u64);
        for (layer, leaves) in &self.layers {
            put_varint(&mut out, u64::from(layer.0));
            put_varint(&mut out, leaves.words.len() as u64);
            for word in &leaves.words {
                out.extend_from_slice(&word.to_le_bytes());
            }
        }
        // As it was before there was any of this, where there is none.
        if !self.fates.is_empty() || self.revision > 0 {
            put_varint(&mut out, self.revision);
            put_varint(&mut out, self.revision_birth);
            self.fates.encode(&mut out);
        }
        let crc = crc32c::crc32c(&out);
        out.extend_from_slice(&crc.to_le_bytes());
        out
    }

    pub(crate) fn decode(bytes: &[u8]) -> Option<Shard> {
        let (content, crc) = bytes.split_last_chunk::<4>()?;
        if u32::from_le_bytes(*crc) != crc32c::crc32c(content) {
            return None;
        }
        let mut fields = Reader::new(content);
        if fields.u8()? != VERSION {
            return None;
        }
        let bits = fields.u8()?;
        let mut shard = Shard {
            is_known: bits & 1 != 0,
            is_purging: bits & 2 != 0,
            end: fields.varint()?,
            end_birth: fields.varint()?,
            record_birth: fields.varint()?,
            drop_birth: fields.varint()?,
            data_blocks: fields.varint()?,
            ..Shard::default()
        };
        let record = fields.varint()?;
        shard.record = fields.take(usize::try_from(record).ok()?)?.to_vec();
        for _ in 0..fields.varint()? {
            let layer = LayerId(u32::try_from(fields.varint()?).ok()?);
            let words = fields.varint()?;
            if words > LEAF_WORDS_MAX {
                return None;
            }
            let words = (0..words).map(|_| fields.u64()).collect::<Option<Vec<u64>>>()?;
            shard.layers.insert(layer, LeafSet { words });
        }
        if fields.is_empty() {
            return Some(shard);
        }
        shard.revision = fields.varint()?;
        shard.revision_birth = fields.varint()?;
        shard.fates = Fates::decode(&mut fields)?;
        shard.find_unfolded();
        fields.is_empty().then_some(shard)
    }

    /// Whether a layer holds nothing, whatever any entry says of it.
    pub(crate) fn is_gone(&self, layer: LayerId) -> bool {
        !self.fates.is_empty() && self.fates.is_gone(layer)
    }

    /// The layer whose leaves hold what is said of a layer. What is gone is at home where it was, and holds nothing.
    pub(crate) fn home(&self, layer: LayerId) -> LayerId {
        if self.fates.is_empty() {
            return layer;
        }
        self.fates.home(layer).unwrap_or(layer)
    }

    /// Finds the leaves that are still to be folded into those of their homes.
    pub(crate) fn find_unfolded(&mut self) {
        let mut unfolded: BTreeMap<LayerId, LeafSet> = BTreeMap::new();
        for (layer, leaves) in &self.layers {
            let home = self.home(*layer);
            if home != *layer && !leaves.is_empty() {
                unfolded.entry(home).or_default().add(leaves);
            }
        }
        self.unfolded = unfolded;
        // So that whoever looks for layers finds it there.
        for home in self.unfolded.keys() {
            self.layers.entry(*home).or_default();
        }
    }

    /// A leaf that others are to be folded into.
    pub(crate) fn next_unfolded(&self) -> Option<(LayerId, LeafNo)> {
        let (layer, leaves) = self.unfolded.first_key_value()?;
        leaves.next(LeafNo(0)).map(|leaf| (*layer, leaf))
    }

    /// Whether leaves of other layers have to be folded into this one before it is looked at.
    pub(crate) fn is_unfolded(&self, layer: LayerId, leaf: LeafNo) -> bool {
        let leaves = self.unfolded.get(&layer);
        leaves.is_some_and(|leaves| leaves.contains(leaf))
    }

    /// The layers that have such a leaf still.
    pub(crate) fn to_fold(&self, home: LayerId, leaf: LeafNo) -> Vec<LayerId> {
        let parts = self.layers.iter().rev();
        parts
            .filter(|(layer, leaves)| **layer != home && leaves.contains(leaf) && self.home(**layer) == home)
            .map(|(layer, _)| *layer)
            .collect()
    }

    /// Whether a layer shows a leaf to readers: it has it, or what was merged with it has.
    pub(crate) fn shows(&self, layer: LayerId, leaves: &LeafSet, leaf: LeafNo) -> bool {
        (leaves.contains(leaf) && self.home(layer) == layer) || self.is_unfolded(layer, leaf)
    }

    /// What a slot of this layer must not be older than.
    fn void_before(&self, layer: LayerId) -> u64 {
        match self.is_gone(layer) {
            true => u64::MAX,
            false => self.drop_birth,
        }
    }

    /// Layers whose leaves may hold what counts no more, or are to be folded into others.
    pub(crate) fn void_layers(&self) -> impl Iterator<Item = LayerId> + '_ {
        let layers = self.layers.keys().copied();
        layers.filter(|layer| self.void_before(*layer) > 0 || self.home(*layer) != *layer)
    }

    /// Whether it is known, and no drop is on the way.
    fn will_stay(&self) -> bool {
        self.is_known && self.drops_coming == 0
    }

    /// Whether requests may name it.
    pub(crate) fn is_there(&self) -> bool {
        self.will_be_known || self.will_stay()
    }

    /// Whether its record was put by nobody who knew of this doubt.
    pub(crate) fn is_doubtful(&self, doubt: u64) -> bool {
        doubt > 0 && batch_of(self.record_birth) <= doubt
    }

    pub(crate) fn has_leaf(&self, layer: LayerId, leaf: LeafNo) -> bool {
        self.layers
            .get(&layer)
            .is_some_and(|leaves| leaves.contains(leaf))
    }

    /// The first leaf, by layer and number, from `from` on.
    pub(crate) fn next_leaf(&self, from: (LayerId, LeafNo)) -> Option<(LayerId, LeafNo)> {
        let shown = self.layers.range(from.0..);
        let mut shown = shown.filter(|(layer, _)| self.home(**layer) == **layer);
        shown.find_map(|(layer, leaves)| {
            let first = if *layer == from.0 { from.1 } else { LeafNo(0) };
            let others = self.unfolded.get(layer).and_then(|leaves| leaves.next(first));
            let leaf = leaves.next(first).into_iter().chain(others).min();
            leaf.map(|leaf| (*layer, leaf))
        })
    }

    /// Nothing to remember: neither a shard nor the drop of one.
    pub(crate) fn is_void(&self) -> bool {
        !self.is_known
            && !self.is_purging
            && self.drop_birth == 0
            && self.fates.is_empty()
            && self.revision == 0
            && self.layers.values().all(LeafSet::is_empty)
    }
}

/// Segments and shards.
#[derive(Clone, Debug)]
pub(crate) struct Ledger {
    pub(crate) segments: SegmentTable,
    pub(crate) shards: BTreeMap<ShardId, Shard>,
    /// Shards to write at the next checkpoint.
    pub(crate) dirty_shards: std::collections::BTreeSet<ShardId>,
    /// (generation, number): batches in older segments count only up to that number. Oldest first.
    pub(crate) opens: Vec<(u64, u64)>,
    /// Leaves that were folded into others, to leave the index with the next checkpoint.
    pub(crate) folded: std::collections::BTreeSet<LeafKey>,
    /// Some shard may have layers that are gone or merged.
    pub(crate) has_fates: bool,
    /// Shards whose record is in no later batch than this may lack what they completed. Kept in the superblock.
    pub(crate) doubt: u64,
}

impl Ledger {
    pub(crate) fn new(geometry: Geometry) -> Ledger {
        Ledger {
            segments: SegmentTable::new(geometry),
            shards: BTreeMap::new(),
            dirty_shards: std::collections::BTreeSet::new(),
            opens: Vec::new(),
            folded: std::collections::BTreeSet::new(),
            has_fates: false,
            doubt: 0,
        }
    }

    /// The layer whose leaves hold what is said of a layer.
    pub(crate) fn home(&self, shard: ShardId, layer: LayerId) -> LayerId {
        if !self.has_fates {
            return layer;
        }
        self.shards.get(&shard).map_or(layer, |shard| shard.home(layer))
    }

    /// A change of layers leaves for the log.
    pub(crate) fn layers_coming(&mut self, id: ShardId) {
        self.has_fates = true;
        self.shard(id).changes_coming += 1;
    }

    /// It is applied.
    pub(crate) fn layers_came(&mut self, id: ShardId) {
        let shard = self.shard(id);
        shard.changes_coming = shard.changes_coming.saturating_sub(1);
    }

    pub(crate) fn is_unfolded(&self, key: LeafKey) -> bool {
        self.has_fates
            && self
                .shards
                .get(&key.shard)
                .is_some_and(|shard| shard.is_unfolded(key.layer, key.leaf))
    }

    fn shard(&mut self, id: ShardId) -> &mut Shard {
        self.dirty_shards.insert(id);
        self.shards.entry(id).or_default()
    }

    /// Empties slots that a drop of the shard or of the layer made void. Call whenever a leaf came from the index, and
    /// for leaves in memory when the drop is applied; true if anything changed.
    pub(crate) fn purge(&mut self, key: LeafKey, leaf: &mut Leaf) -> bool {
        let id = key.shard;
        let Some(shard) = self.shards.get_mut(&id) else {
            return false;
        };
        let dropped = shard.void_before(key.layer);
        if dropped == 0 {
            return false;
        }
        let mut is_changed = false;
        let voids = leaf.voids().len();
        leaf.forget_voids_before(dropped);
        is_changed |= leaf.voids().len() < voids;
        for at in 0..SLOTS {
            let slot = leaf.get(at);
            if slot.state != State::Absent && slot.birth < dropped {
                if slot.state == State::Data {
                    self.segments.drop_live(slot.address);
                    shard.data_blocks -= 1;
                }
                leaf.set(at, Slot::default());
                is_changed = true;
            }
        }
        if is_changed {
            self.dirty_shards.insert(id);
        }
        is_changed
    }

    /// Takes what a leaf of another layer holds into the leaf of its home: of each block the later layer's counts. True if
    /// the home's changed. The other is empty from now on, and the index is to forget it.
    pub(crate) fn fold(&mut self, key: LeafKey, into: &mut Leaf, from: LeafKey, other: &Leaf) -> bool {
        let Ledger {
            segments,
            shards,
            dirty_shards,
            folded,
            ..
        } = self;
        let shard = shards.get_mut(&key.shard).expect("a shard with layers");
        let mut is_changed = false;
        for void in other.voids() {
            is_changed |= add_void(segments, shard, key, into, *void);
        }
        for at in 0..SLOTS {
            let mut slot = other.get(at);
            if slot.state == State::Absent {
                continue;
            }
            slot.below += key.layer.0 - from.layer.0;
            let old = into.get(at);
            let is_beaten = old.state.is_there() && !slot.beats(&old);
            let origin = LayerId(key.layer.0 - slot.below);
            let dead = match is_beaten || into.is_voided(at, origin, slot.birth) {
                true => slot,
                false => {
                    into.set(at, slot);
                    into.forget_voids(key.layer, at);
                    is_changed = true;
                    old
                }
            };
            if dead.state == State::Data {
                segments.drop_live(dead.address);
                shard.data_blocks -= 1;
            }
        }
        if let Some(leaves) = shard.layers.get_mut(&from.layer) {
            leaves.remove(from.leaf);
            if leaves.is_empty() {
                shard.layers.remove(&from.layer);
            }
        }
        if is_changed {
            shard.layers.entry(key.layer).or_default().insert(key.leaf);
        }
        folded.insert(from);
        dirty_shards.insert(key.shard);
        is_changed
    }

    /// Nothing is left to be folded into a leaf.
    pub(crate) fn folded(&mut self, key: LeafKey) {
        let Some(shard) = self.shards.get_mut(&key.shard) else {
            return;
        };
        if let Some(leaves) = shard.unfolded.get_mut(&key.layer) {
            leaves.remove(key.leaf);
            if leaves.is_empty() {
                shard.unfolded.remove(&key.layer);
            }
        }
    }

    /// Applies what a blocks entry says of one leaf; `address` and `sums` are of the piece's first block.
    /// True if the leaf changed.
    pub(crate) fn apply_piece(
        &mut self,
        entry: &Entry,
        piece: Piece,
        address: u64,
        sums: &[u32],
        leaf: &mut Leaf,
    ) -> bool {
        let id = piece.key.shard;
        let Ledger {
            segments,
            shards,
            dirty_shards,
            ..
        } = self;
        let shard = shards.entry(id).or_default();
        if entry.birth < shard.void_before(piece.key.layer) {
            return false;
        }
        if entry.kind == Kind::Void {
            return self.apply_void(entry, piece, leaf);
        }
        let mut is_changed = false;
        let mut value = Slot {
            state: state_of(entry.kind),
            is_no_end: !entry.advances_end(),
            below: piece.key.layer.0 - entry.layer,
            seq: entry.seq,
            birth: entry.birth,
            ..Slot::default()
        };
        for index in 0..piece.count {
            if value.state == State::Data {
                value.address = address + index as u64;
                value.sum = *sums.get(index).expect("a sum for every block");
            }
            let at = piece.slot + index;
            let Some(old) = leaf.takes(piece.key.layer, at, &value) else {
                continue;
            };
            if old.state == State::Data {
                segments.drop_live(old.address);
                shard.data_blocks -= 1;
            }
            if value.state == State::Data {
                segments.add_live(value.address, 1);
                shard.data_blocks += 1;
            }
            leaf.set(at, value);
            leaf.forget_voids(piece.key.layer, at);
            is_changed = true;
        }
        if is_changed {
            let leaves = shard.layers.entry(piece.key.layer).or_default();
            leaves.insert(piece.key.leaf);
            dirty_shards.insert(id);
        }
        is_changed
    }

    fn apply_void(&mut self, entry: &Entry, piece: Piece, leaf: &mut Leaf) -> bool {
        let Ledger {
            segments,
            shards,
            dirty_shards,
            ..
        } = self;
        let shard = shards.get_mut(&piece.key.shard).expect("the caller has looked");
        let mut is_changed = false;
        for at in piece.slots() {
            let void = Voided {
                slot: at as u8,
                lowest: LayerId(entry.layer - entry.seq as u32),
                // In a rebuild a lower layer's leaf is told of its own part.
                highest: LayerId(entry.layer).min(piece.key.layer),
                birth: entry.birth,
            };
            is_changed |= add_void(segments, shard, piece.key, leaf, void);
        }
        if is_changed {
            let leaves = shard.layers.entry(piece.key.layer).or_default();
            leaves.insert(piece.key.leaf);
            dirty_shards.insert(piece.key.shard);
        }
        is_changed
    }

    /// What an entry says besides its blocks. True if it makes void what leaves hold.
    pub(crate) fn apply_entry(&mut self, entry: &Entry, inline: &[u8], segment: u32) -> bool {
        if entry.kind.is_note() {
            self.segments.add_note(segment);
        }
        let id = entry.shard_id();
        match entry.kind {
            Kind::Data | Kind::Zero | Kind::Trim | Kind::Lost | Kind::Void => {
                let shard = self.shard(id);
                if entry.birth > shard.drop_birth {
                    shard.is_known = true;
                    if entry.advances_end() && entry.birth > shard.end_birth {
                        shard.end = shard.end.max(entry.seq);
                        shard.tip = shard.tip.max((entry.birth, entry.seq));
                    }
                }
            }
            Kind::SetEnd => {
                let shard = self.shard(id);
                if entry.birth > shard.end_birth.max(shard.drop_birth) {
                    shard.is_known = true;
                    shard.end = entry.seq;
                    shard.end_birth = entry.birth;
                }
            }
            Kind::Record => {
                let shard = self.shard(id);
                if entry.birth > shard.record_birth.max(shard.drop_birth) {
                    shard.is_known = true;
                    shard.record = inline.to_vec();
                    shard.record_birth = entry.birth;
                }
            }
            Kind::Drop => return self.apply_drop(id, entry.birth),
            Kind::LayersGone | Kind::LayersOne => return self.apply_fate(entry),
            Kind::LayersRevision => {
                let shard = self.shard(id);
                if entry.birth > shard.drop_birth && entry.seq > shard.revision {
                    shard.is_known = true;
                    shard.revision = entry.seq;
                    shard.revision_birth = entry.birth;
                }
            }
            Kind::Open => self.apply_open(entry),
            Kind::Checkpoint => {}
        }
        false
    }

    fn apply_drop(&mut self, id: ShardId, birth: u64) -> bool {
        let shard = self.shard(id);
        if birth <= shard.drop_birth {
            return false;
        }
        shard.drop_birth = birth;
        shard.drops_coming = shard.drops_coming.saturating_sub(1);
        shard.is_purging = shard.layers.values().any(|leaves| !leaves.is_empty());
        shard.fates.forget_before(birth);
        shard.find_unfolded();
        if shard.revision_birth < birth {
            (shard.revision, shard.revision_birth) = (0, 0);
        }
        // In a rebuild a moved drop can come after what was said later: that stays.
        if shard.record_birth < birth {
            shard.record.clear();
        }
        if shard.end_birth < birth {
            // A stream's seqs grow with its births, so the youngest write of the shard's new life makes its end. Those
            // of its old one may have higher seqs.
            let (tip, seq) = shard.tip;
            shard.end = if tip > birth { seq } else { 0 };
            shard.end_birth = birth;
        }
        shard.is_known = shard.record_birth > birth;
        true
    }

    /// True if leaves have to follow.
    fn apply_fate(&mut self, entry: &Entry) -> bool {
        let shard = self.shard(entry.shard_id());
        let said = Said {
            layers: entry.layers(),
            called: entry.called(),
            birth: entry.birth,
        };
        if entry.birth <= shard.drop_birth || !shard.fates.say(said) {
            return false;
        }
        shard.is_known = true;
        shard.find_unfolded();
        let is_filled = |(layer, leaves): (&LayerId, &LeafSet)| !leaves.is_empty() && shard.is_gone(*layer);
        let must_follow = shard.layers.iter().any(is_filled) || !shard.unfolded.is_empty();
        shard.is_purging |= must_follow;
        self.has_fates = true;
        true
    }

    fn apply_open(&mut self, entry: &Entry) {
        let fence = (entry.shard, entry.seq);
        if let Err(at) = self.opens.binary_search_by_key(&fence.0, |open| open.0) {
            self.opens.insert(at, fence);
        }
    }

    /// Fences older than every segment in use guard nothing.
    pub(crate) fn forget_opens(&mut self, floor: u64) {
        self.opens.retain(|open| open.0 > floor);
    }

    pub(crate) fn summaries(&self) -> Vec<ShardSummary> {
        self.shards
            .iter()
            .filter(|(_, shard)| shard.will_stay())
            .map(|(id, shard)| ShardSummary {
                shard: *id,
                end: Seq(shard.end),
                record: shard.record.clone(),
                data_blocks: shard.data_blocks,
                is_doubtful: shard.is_doubtful(self.doubt),
            })
            .collect()
    }

    /// Blocks of data the disk takes before guests wait. A tenth stays for dead blocks, so that cleaning always
    /// finds a victim with something to gain. What is dead in a segment whose headers cannot be read is not space.
    pub(crate) fn capacity_blocks(&self, reserved: u32) -> u64 {
        let geometry = self.segments.geometry;
        let usable = u64::from(geometry.segments.saturating_sub(reserved + 2));
        // A batch header for every 256 blocks, as cleaning writes them, and the segment's own.
        let packed = u64::from(geometry.segment_blocks - 1) * 256 / 257;
        (usable * packed * 9 / 10).saturating_sub(self.segments.lost_blocks())
    }

    pub(crate) fn capacity_bytes(&self, reserved: u32) -> u64 {
        self.capacity_blocks(reserved) * BLOCK_BYTES
    }
}

/// Makes a block void in a leaf; false if that is known.
fn add_void(
    segments: &mut SegmentTable,
    shard: &mut Shard,
    key: LeafKey,
    leaf: &mut Leaf,
    void: Voided,
) -> bool {
    let at = usize::from(void.slot);
    let slot = leaf.get(at);
    let origin = LayerId(key.layer.0 - slot.below);
    let is_hidden =
        slot.state.is_there() && (void.lowest..=void.highest).contains(&origin) && slot.birth < void.birth;
    if is_hidden {
        if slot.state == State::Data {
            segments.drop_live(slot.address);
            shard.data_blocks -= 1;
        }
        leaf.set(at, Slot::default());
    }
    leaf.add_void(key.layer, void) || is_hidden
}

fn state_of(kind: Kind) -> State {
    match kind {
        Kind::Data => State::Data,
        Kind::Zero => State::Zero,
        Kind::Trim => State::Trim,
        Kind::Lost => State::Lost,
        other => panic!("{other:?} has no blocks"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn leaf_sets() {
        let mut set = LeafSet::default();
        for leaf in [0, 63, 64, 500] {
            set.insert(LeafNo(leaf));
        }
        let mut list = Vec::new();
        let mut from = LeafNo(0);
        while let Some(leaf) = set.next(from) {
            list.push(leaf.0);
            from = LeafNo(leaf.0 + 1);
        }
        assert_eq!(list, [0, 63, 64, 500]);
        set.remove(LeafNo(500));
        assert!(!set.contains(LeafNo(500)) && set.contains(LeafNo(64)));
        for leaf in [0, 63, 64] {
            set.remove(LeafNo(leaf));
        }
        assert!(set.is_empty());
    }

    /// Cleaning moved the drop of a shard behind what its new life said, and a rebuild finds the move alone.
    #[test]
    fn a_drop_that_comes_late_leaves_the_end_of_the_new_life() {
        let mut ledger = Ledger::new(Geometry {
            first_block: 256,
            segment_blocks: 64,
            segments: 8,
        });
        let entry = |kind, seq, birth| Entry {
            kind,
            flags: 0,
            shard: 7,
            layer: 0,
            block: 0,
            count: 1,
            seq,
            birth,
        };
        let id = ShardId::from_u64(7);
        for (seq, birth) in [(900, 10), (901, 11), (1, 30), (2, 31)] {
            ledger.apply_entry(&entry(Kind::Zero, seq, birth), &[], 0);
        }
        ledger.apply_entry(&entry(Kind::Drop, 0, 20), &[], 0);
        assert_eq!(ledger.shards[&id].end, 2);
        ledger.apply_entry(&entry(Kind::Zero, 3, 32), &[], 0);
        assert_eq!(ledger.shards[&id].end, 3);
        ledger.apply_entry(&entry(Kind::Drop, 0, 40), &[], 0);
        assert_eq!(ledger.shards[&id].end, 0);
    }

    proptest! {
        #[test]
        fn shards_round_trip(
            numbers: [u64; 5],
            bits: [bool; 2],
            record: Vec<u8>,
            fates in prop::collection::vec((1u32..90, 0u32..20, prop::option::of(0u32..20), any::<u64>()), 0..4),
            revision: [u64; 2],
            leaves in prop::collection::btree_map(any::<u32>(), prop::collection::vec(0u32..60_000, 1..20), 0..4),
        ) {
            let mut shard = Shard {
                is_known: bits[0],
                will_be_known: false,
                drops_coming: 0,
                end_submitted: 0,
                tip: (0, 0),
                is_purging: bits[1],
                end: numbers[0],
                end_birth: numbers[1],
                record,
                record_birth: numbers[2],
                drop_birth: numbers[3],
                data_blocks: numbers[4],
                layers: BTreeMap::new(),
                fates: Fates::default(),
                unfolded: BTreeMap::new(),
                changes_coming: 0,
                revision: revision[0],
                revision_birth: if revision[0] > 0 { revision[1] } else { 0 },
            };
            for (layer, list) in leaves {
                let set = shard.layers.entry(LayerId(layer)).or_default();
                list.into_iter().for_each(|leaf| set.insert(LeafNo(leaf)));
            }
            for (first, more, up, birth) in fates {
                let last = LayerId(first + more);
                let called = up.map(|up| LayerId(last.0 + up));
                shard.fates.say(Said { layers: LayerId(first)..=last, called, birth });
            }
            shard.find_unfolded();
            let mut bytes = shard.encode();
            prop_assert_eq!(Shard::decode(&bytes), Some(shard));
            bytes[2] ^= 1;
            prop_assert_eq!(Shard::decode(&bytes), None);
        }

        #[test]
        fn any_signed_bytes_are_safe(mut bytes: Vec<u8>) {
            bytes.insert(0, VERSION);
            let crc = crc32c::crc32c(&bytes);
            bytes.extend_from_slice(&crc.to_le_bytes());
            let _ = Shard::decode(&bytes);
        }
    }
}
