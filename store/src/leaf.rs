//! An index leaf: where the 256 blocks of 1 MiB of a shard and layer are.
//!
//! In memory four parallel arrays, so that a cached leaf is 7 KiB with no padding. In the index a list of runs,
//! because neighbours are mostly written together: a sequentially written leaf takes 1.1 KiB, of which 1 KiB is
//! sums. Every slot carries its birth (see [`crate::batch`]); a later birth always wins, which makes replay,
//! replay twice, and rebuild from any set of segments come to the same content.
//!
//! Of layers that were merged one leaf is left. Its slots say how far below the leaf's layer their block was written, and
//! a later layer wins over any birth. What a void hides stands beside the slots: it may be above what a slot holds.

use types::{BlockNo, LayerId, LeafNo, ShardId};

use crate::LeafKey;
use crate::bytes::{Reader, put_varint, put_varint_at};

pub(crate) const SLOTS: usize = types::LEAF_BLOCKS as usize;
const VERSION: u8 = 1;
const ADDRESS_BITS: u32 = 48;
const ADDRESS_MASK: u64 = (1 << ADDRESS_BITS) - 1;
const NO_END: u8 = 0x80;
/// How far below its leaf's layer a slot was written follows.
const BELOW: u8 = 0x40;
/// In the place of a state: blocks that were made void.
const VOID: u8 = 5;
/// More in one leaf is nothing that we wrote.
const VOIDS_MAX: usize = 1 << 16;
/// Slot, length and tag, two varints of 64 bits, one of 32 and one of 48.
const RUN_HEAD_MAX: usize = 3 + 10 + 10 + 5 + 7;
/// Version, a run for every slot, crc; and room for one head more, which is only looked at.
pub(crate) const ENCODED_MAX: usize = 1 + SLOTS * (RUN_HEAD_MAX + 4) + 4 + RUN_HEAD_MAX;

/// What a slot holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum State {
    /// Never written.
    #[default]
    Absent,
    /// Data at the slot's address.
    Data,
    /// Zeros.
    Zero,
    /// Discarded.
    Trim,
    /// Its data was found corrupt.
    Lost,
}

impl State {
    /// Whether a layer with this of a block hides what is below.
    pub(crate) fn is_there(self) -> bool {
        self != State::Absent
    }

    fn from_u8(value: u8) -> Option<State> {
        Some(match value {
            0 => State::Absent,
            1 => State::Data,
            2 => State::Zero,
            3 => State::Trim,
            4 => State::Lost,
            _ => return None,
        })
    }
}

/// One block's place in the index.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Slot {
    pub(crate) state: State,
    /// Set for content that did not come by the writer's stream; see `FLAG_NO_END`.
    pub(crate) is_no_end: bool,
    /// Byte offset on the disk over 4096, for data.
    pub(crate) address: u64,
    pub(crate) seq: u64,
    pub(crate) birth: u64,
    /// Bound checksum, for data.
    pub(crate) sum: u32,
    /// How far below its leaf's layer the one is that it was written for.
    pub(crate) below: u32,
}

impl Slot {
    /// Whether this counts where `other` is said of the same block.
    pub(crate) fn beats(&self, other: &Slot) -> bool {
        (self.below, other.birth) < (other.below, self.birth)
    }
}

/// A block is not there in these layers, whatever older entries say; remembered for as long as it may matter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Voided {
    pub(crate) slot: u8,
    pub(crate) lowest: LayerId,
    pub(crate) highest: LayerId,
    pub(crate) birth: u64,
}

impl Voided {
    fn hides(&self, layer: LayerId, birth: u64) -> bool {
        (self.lowest..=self.highest).contains(&layer) && birth < self.birth
    }

    fn place(&self) -> (u64, LayerId, LayerId, u8) {
        (self.birth, self.highest, self.lowest, self.slot)
    }

    /// Whether it says all that `other` says.
    fn covers(&self, other: &Voided) -> bool {
        self.slot == other.slot
            && self.lowest <= other.lowest
            && other.highest <= self.highest
            && other.birth <= self.birth
    }
}

/// 256 slots.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Leaf {
    places: [u64; SLOTS],
    seqs: [u64; SLOTS],
    births: [u64; SLOTS],
    sums: [u32; SLOTS],
    used: u16,
    /// Of leaves that hold merged blocks.
    belows: Option<Box<[u32; SLOTS]>>,
    /// In no order.
    voids: Vec<Voided>,
}

impl Leaf {
    pub(crate) fn empty() -> Box<Leaf> {
        Box::new(Leaf {
            places: [0; SLOTS],
            seqs: [0; SLOTS],
            births: [0; SLOTS],
            sums: [0; SLOTS],
            used: 0,
            belows: None,
            voids: Vec::new(),
        })
    }

    /// Slots that are not absent, and voids.
    pub(crate) fn used(&self) -> usize {
        usize::from(self.used) + self.voids.len()
    }

    pub(crate) fn voids(&self) -> &[Voided] {
        &self.voids
    }

    /// Whether a void of this birth is remembered.
    pub(crate) fn has_void(&self, slot: usize, birth: u64) -> bool {
        let is_it = |void: &Voided| usize::from(void.slot) == slot && void.birth == birth;
        self.voids.iter().any(is_it)
    }

    /// Whether what was written for a layer is void.
    pub(crate) fn is_voided(&self, slot: usize, layer: LayerId, birth: u64) -> bool {
        let hides = |void: &Voided| usize::from(void.slot) == slot && void.hides(layer, birth);
        self.voids.iter().any(hides)
    }

    /// Remembers a void; false if it is known. `of` is the layer of the leaf. What it hides is the caller's to take out first.
    pub(crate) fn add_void(&mut self, of: LayerId, new: Voided) -> bool {
        if self.voids.iter().any(|void| void.covers(&new)) || self.is_above(of, &new) {
            return false;
        }
        self.voids.retain(|void| !new.covers(void));
        self.voids.push(new);
        true
    }

    /// Forgets voids of a slot that what is there makes needless: nothing below it counts.
    pub(crate) fn forget_voids(&mut self, of: LayerId, slot: usize) {
        if !self.voids.is_empty() {
            let mut voids = std::mem::take(&mut self.voids);
            voids.retain(|void| usize::from(void.slot) != slot || !self.is_above(of, void));
            self.voids = voids;
        }
    }

    fn is_above(&self, of: LayerId, void: &Voided) -> bool {
        let slot = self.get(usize::from(void.slot));
        slot.state.is_there() && void.highest.0 <= of.0 - slot.below
    }

    pub(crate) fn forget_voids_before(&mut self, birth: u64) {
        self.voids.retain(|void| void.birth >= birth);
    }

    pub(crate) fn max_seq(&self) -> u64 {
        self.seqs.iter().copied().max().unwrap_or(0)
    }

    pub(crate) fn birth(&self, slot: usize) -> u64 {
        self.births[slot]
    }

    pub(crate) fn state(&self, slot: usize) -> State {
        let tag = (self.places[slot] >> ADDRESS_BITS) as u8;
        State::from_u8(tag & !NO_END).expect("only states are stored")
    }

    /// Whether the layer says anything of a block.
    pub(crate) fn has(&self, slot: usize) -> bool {
        self.state(slot).is_there()
    }

    pub(crate) fn get(&self, slot: usize) -> Slot {
        let place = self.places[slot];
        let tag = (place >> ADDRESS_BITS) as u8;
        Slot {
            state: self.state(slot),
            is_no_end: tag & NO_END != 0,
            address: place & ADDRESS_MASK,
            seq: self.seqs[slot],
            birth: self.births[slot],
            sum: self.sums[slot],
            below: self.below(slot),
        }
    }

    fn below(&self, slot: usize) -> u32 {
        self.belows.as_ref().map_or(0, |belows| belows[slot])
    }

    pub(crate) fn set(&mut self, slot: usize, value: Slot) {
        assert!(value.address <= ADDRESS_MASK, "block address {}", value.address);
        let was_used = self.get(slot).state != State::Absent;
        let is_used = value.state != State::Absent;
        self.used = self.used - u16::from(was_used) + u16::from(is_used);
        let tag = value.state as u8 | if value.is_no_end { NO_END } else { 0 };
        self.places[slot] = u64::from(tag) << ADDRESS_BITS | value.address;
        self.seqs[slot] = value.seq;
        self.births[slot] = value.birth;
        self.sums[slot] = value.sum;
        if value.below > 0 || self.belows.is_some() {
            self.belows.get_or_insert_with(|| Box::new([0; SLOTS]))[slot] = value.below;
        }
    }

    /// Whether `value` counts in a slot, by what stands there and beside it; `of` is the layer of the leaf. What it takes the
    /// place of; `None` if nothing changes.
    pub(crate) fn takes(&self, of: LayerId, slot: usize, value: &Slot) -> Option<Slot> {
        let old = self.get(slot);
        // A move only ever changes the place of what is there, or says that it is lost.
        let is_beaten = (old.state.is_there() && old.beats(value)) || old == *value;
        let origin = LayerId(of.0 - value.below);
        (!is_beaten && !self.is_voided(slot, origin, value.birth)).then_some(old)
    }

    /// Runs of slots that differ only by position: same write, consecutive addresses. Put together in `bytes`, of
    /// any content: the value is then one allocation of its own length, of which a checkpoint holds thousands.
    pub(crate) fn encode(&self, key: LeafKey, bytes: &mut [u8; ENCODED_MAX]) -> Vec<u8> {
        bytes[0] = VERSION;
        let mut at = 1;
        let mut slot = 0;
        while slot < SLOTS {
            let place = self.places[slot];
            let tag = (place >> ADDRESS_BITS) as u8;
            let state = tag & !NO_END;
            if state == State::Absent as u8 {
                slot += 1;
                continue;
            }
            let is_data = state == State::Data as u8;
            let end = self.run_end(slot, u64::from(is_data));
            let below = self.below(slot);
            let tag = if below > 0 { tag | BELOW } else { tag };
            let run: &mut [u8; RUN_HEAD_MAX] = bytes[at..]
                .first_chunk_mut()
                .expect("room for the longest encoding");
            run[..3].copy_from_slice(&[slot as u8, (end - slot - 1) as u8, tag]);
            let mut used = put_varint_at(run, 3, self.seqs[slot]);
            used = put_varint_at(run, used, self.births[slot]);
            if below > 0 {
                used = put_varint_at(run, used, u64::from(below));
            }
            if is_data {
                used = put_varint_at(run, used, place & ADDRESS_MASK);
            }
            at += used;
            if is_data {
                let sums = &self.sums[slot..end];
                for (bytes, sum) in bytes[at..].chunks_exact_mut(4).zip(sums) {
                    bytes.copy_from_slice(&sum.to_le_bytes());
                }
                at += 4 * sums.len();
            }
            slot = end;
        }
        if !self.voids.is_empty() {
            return self.encode_voids(key, bytes[..at].to_vec());
        }
        let crc = sign(key, &bytes[..at]);
        bytes[at..at + 4].copy_from_slice(&crc.to_le_bytes());
        bytes[..at + 4].to_vec()
    }

    /// Behind the runs of slots, runs of voids of the same entry.
    fn encode_voids(&self, key: LeafKey, mut bytes: Vec<u8>) -> Vec<u8> {
        let mut voids = self.voids.clone();
        let of = |void: &Voided| (void.birth, void.highest, void.lowest);
        voids.sort_unstable_by_key(Voided::place);
        let goes_on = |a: &Voided, b: &Voided| of(a) == of(b) && a.slot.checked_add(1) == Some(b.slot);
        for run in voids.chunk_by(goes_on) {
            let first = run[0];
            let (below, reach) = (key.layer.0 - first.highest.0, first.highest.0 - first.lowest.0);
            let tag = if below > 0 || reach > 0 {
                VOID | BELOW
            } else {
                VOID
            };
            bytes.extend_from_slice(&[first.slot, (run.len() - 1) as u8, tag]);
            put_varint(&mut bytes, 0);
            put_varint(&mut bytes, first.birth);
            if tag != VOID {
                put_varint(&mut bytes, u64::from(below));
                put_varint(&mut bytes, u64::from(reach));
            }
        }
        let crc = sign(key, &bytes);
        bytes.extend_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// One past the last slot that continues the run of `first`; addresses go on by `step`.
    fn run_end(&self, first: usize, step: u64) -> usize {
        let (seq, birth) = (self.seqs[first], self.births[first]);
        let mut place = self.places[first];
        let belows = self.belows.as_deref();
        let mut next = first + 1;
        while next < SLOTS {
            place += step;
            if self.births[next] != birth || self.places[next] != place || self.seqs[next] != seq {
                break;
            }
            if belows.is_some_and(|belows| belows[next] != belows[first]) {
                break;
            }
            next += 1;
        }
        next
    }

    /// `None` for anything that is not the value of this very key.
    pub(crate) fn decode(key: LeafKey, bytes: &[u8]) -> Option<Box<Leaf>> {
        let (content, crc) = bytes.split_last_chunk::<4>()?;
        if u32::from_le_bytes(*crc) != sign(key, content) {
            return None;
        }
        let mut fields = Reader::new(content);
        if fields.u8()? != VERSION {
            return None;
        }
        let mut leaf = Leaf::empty();
        let mut least = 0;
        while !fields.is_empty() {
            let first = usize::from(fields.u8()?);
            let length = usize::from(fields.u8()?) + 1;
            let tag = fields.u8()?;
            if tag & !(NO_END | BELOW) == VOID {
                leaf.decode_voids(key, first, length, tag & BELOW != 0, &mut fields)?;
                continue;
            }
            let mut value = Slot {
                state: State::from_u8(tag & !(NO_END | BELOW))?,
                is_no_end: tag & NO_END != 0,
                seq: fields.varint()?,
                birth: fields.varint()?,
                ..Slot::default()
            };
            if tag & BELOW != 0 {
                value.below = u32::try_from(fields.varint()?).ok()?;
            }
            let is_data = value.state == State::Data;
            if is_data {
                value.address = fields.varint()?;
            }
            let last_address = value.address.checked_add(length as u64)?;
            if first < least || first + length > SLOTS || last_address > ADDRESS_MASK {
                return None;
            }
            if value.state == State::Absent || value.below > key.layer.0 {
                return None;
            }
            for index in 0..length {
                if is_data {
                    value.sum = fields.u32()?;
                }
                leaf.set(first + index, value);
                value.address += u64::from(is_data);
            }
            least = first + length;
        }
        leaf.voids.sort_unstable_by_key(Voided::place);
        Some(leaf)
    }

    fn decode_voids(
        &mut self,
        key: LeafKey,
        first: usize,
        length: usize,
        is_merged: bool,
        fields: &mut Reader<'_>,
    ) -> Option<()> {
        fields.varint()?;
        let birth = fields.varint()?;
        let mut down = |from: LayerId| {
            let by = if is_merged {
                u32::try_from(fields.varint()?).ok()?
            } else {
                0
            };
            from.0.checked_sub(by).map(LayerId)
        };
        let highest = down(key.layer)?;
        let lowest = down(highest)?;
        if first + length > SLOTS || self.voids.len() + length > VOIDS_MAX {
            return None;
        }
        self.voids.extend((first..first + length).map(|slot| Voided {
            slot: slot as u8,
            lowest,
            highest,
            birth,
        }));
        Some(())
    }
}

/// The sum covers the key, so that a value under another leaf's key is noticed.
pub(crate) fn sign(key: LeafKey, content: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&encode_key(key)), content)
}

/// Sorts as (shard, layer, leaf).
pub(crate) fn encode_key(key: LeafKey) -> [u8; 17] {
    let mut out = [0; 17];
    out[0] = b'l';
    out[1..9].copy_from_slice(&key.shard.to_u64().to_be_bytes());
    out[9..13].copy_from_slice(&key.layer.0.to_be_bytes());
    out[13..17].copy_from_slice(&key.leaf.0.to_be_bytes());
    out
}

/// The part of a range of blocks that one leaf holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) key: LeafKey,
    /// First slot.
    pub(crate) slot: usize,
    /// How many slots.
    pub(crate) count: usize,
    /// Position of the first of them in the range.
    pub(crate) index: u32,
}

impl Piece {
    /// Its slots in the leaf.
    pub(crate) fn slots(&self) -> std::ops::Range<usize> {
        self.slot..self.slot + self.count
    }

    /// Its blocks' positions in the range that it is a piece of.
    pub(crate) fn range(&self) -> std::ops::Range<usize> {
        self.index as usize..self.index as usize + self.count
    }
}

/// Cuts a range of blocks at leaf boundaries.
pub(crate) fn pieces(shard: ShardId, layer: LayerId, block: u32, count: u32) -> impl Iterator<Item = Piece> {
    let mut index = 0;
    std::iter::from_fn(move || {
        (index < count).then(|| {
            let at = BlockNo(block + index);
            let length = (SLOTS - at.slot()).min((count - index) as usize);
            let piece = Piece {
                key: LeafKey {
                    shard,
                    layer,
                    leaf: LeafNo(at.leaf().0),
                },
                slot: at.slot(),
                count: length,
                index,
            };
            index += length as u32;
            piece
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use types::{ShardNo, VdiId};

    fn key() -> LeafKey {
        LeafKey {
            shard: ShardId {
                vdi: VdiId(1),
                no: ShardNo(2),
            },
            layer: LayerId(3),
            leaf: LeafNo(4),
        }
    }

    fn slots() -> impl Strategy<Value = Vec<(usize, Slot)>> {
        let slot = (
            0u8..5,
            any::<bool>(),
            0u64..1 << 47,
            0u64..4,
            0u64..4,
            any::<u32>(),
            0u32..3,
        );
        prop::collection::vec((0..SLOTS, slot), 0..300).prop_map(|list| {
            list.into_iter()
                .map(|(at, (state, is_no_end, address, seq, birth, sum, below))| {
                    let state = State::from_u8(state).unwrap();
                    let slot = match state {
                        State::Absent => Slot::default(),
                        State::Data => Slot {
                            state,
                            is_no_end,
                            address,
                            seq,
                            birth,
                            sum,
                            below,
                        },
                        _ => Slot {
                            state,
                            is_no_end,
                            seq,
                            birth,
                            below,
                            ..Slot::default()
                        },
                    };
                    (at, slot)
                })
                .collect()
        })
    }

    #[test]
    fn a_sequential_leaf_is_one_run() {
        let mut leaf = Leaf::empty();
        for slot in 0..SLOTS {
            leaf.set(
                slot,
                Slot {
                    state: State::Data,
                    is_no_end: false,
                    address: 1 << 40 | slot as u64,
                    seq: 9,
                    birth: 1 << 30,
                    sum: slot as u32,
                    below: 0,
                },
            );
        }
        assert!(leaf.encode(key(), &mut [0; ENCODED_MAX]).len() < 1100);
    }

    #[test]
    fn pieces_cover_the_range() {
        let k = key();
        let list: Vec<Piece> = pieces(k.shard, k.layer, 255, 258).collect();
        assert_eq!(
            list.iter()
                .map(|p| (p.key.leaf.0, p.slot, p.count, p.index))
                .collect::<Vec<_>>(),
            [(0, 255, 1, 0), (1, 0, 256, 1), (2, 0, 1, 257)]
        );
    }

    proptest! {
        #[test]
        fn round_trip(
            list in slots(),
            voids in prop::collection::vec((0u8..=255, 0u8..9, 0u32..3, 0u32..2, 0u64..9), 0..20),
        ) {
            let mut leaf = Leaf::empty();
            for (at, slot) in list {
                leaf.set(at, slot);
            }
            for (first, more, below, reach, birth) in voids {
                for slot in first..=first.saturating_add(more) {
                    let highest = LayerId(3 - below);
                    let lowest = LayerId(highest.0 - reach.min(highest.0));
                    leaf.add_void(key().layer, Voided { slot, lowest, highest, birth });
                }
            }
            let encoded = leaf.encode(key(), &mut [0xff; ENCODED_MAX]);
            let decoded = Leaf::decode(key(), &encoded).expect("own encoding");
            prop_assert!((0..SLOTS).all(|slot| decoded.get(slot) == leaf.get(slot)));
            let sorted = |leaf: &Leaf| {
                let mut voids: Vec<_> = leaf.voids.iter().map(|v| (v.slot, v.lowest, v.highest, v.birth)).collect();
                voids.sort_unstable();
                voids
            };
            prop_assert_eq!(sorted(&decoded), sorted(&leaf));
            prop_assert_eq!(decoded.used(), leaf.used());
            let other = LeafKey { leaf: LeafNo(5), ..key() };
            prop_assert!(Leaf::decode(other, &encoded).is_none());
        }

        #[test]
        fn any_signed_bytes_are_safe(mut bytes: Vec<u8>) {
            let _ = Leaf::decode(key(), &bytes);
            bytes.insert(0, VERSION);
            let crc = sign(key(), &bytes);
            bytes.extend_from_slice(&crc.to_le_bytes());
            let _ = Leaf::decode(key(), &bytes);
        }
    }
}
