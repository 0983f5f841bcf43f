//! An index leaf: where the 256 blocks of 1 MiB of a shard and layer are.
//!
//! In memory four parallel arrays, so that a cached leaf is 7 KiB with no padding. In the index a list of runs,
//! because neighbours are mostly written together: a sequentially written leaf takes 1.1 KiB, of which 1 KiB is
//! sums. Every slot carries its birth (see [`crate::batch`]); a later birth always wins, which makes replay,
//! replay twice, and rebuild from any set of segments come to the same content.

use types::{BlockNo, LayerId, LeafNo, ShardId};

use crate::LeafKey;
use crate::bytes::{Reader, put_varint_at};

pub(crate) const SLOTS: usize = types::LEAF_BLOCKS as usize;
const VERSION: u8 = 1;
const ADDRESS_BITS: u32 = 48;
const ADDRESS_MASK: u64 = (1 << ADDRESS_BITS) - 1;
const NO_END: u8 = 0x80;
/// Slot, length and tag, two varints of 64 bits and one of 48.
const RUN_HEAD_MAX: usize = 3 + 10 + 10 + 7;
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
    /// Not there in this layer: as good as never written, and remembered so that older entries stay void.
    Void,
}

impl State {
    /// Whether a layer with this of a block hides what is below.
    pub(crate) fn is_there(self) -> bool {
        !matches!(self, State::Absent | State::Void)
    }

    fn from_u8(value: u8) -> Option<State> {
        Some(match value {
            0 => State::Absent,
            1 => State::Data,
            2 => State::Zero,
            3 => State::Trim,
            4 => State::Lost,
            5 => State::Void,
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
}

/// 256 slots.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Leaf {
    places: [u64; SLOTS],
    seqs: [u64; SLOTS],
    births: [u64; SLOTS],
    sums: [u32; SLOTS],
    used: u16,
}

impl Leaf {
    pub(crate) fn empty() -> Box<Leaf> {
        Box::new(Leaf {
            places: [0; SLOTS],
            seqs: [0; SLOTS],
            births: [0; SLOTS],
            sums: [0; SLOTS],
            used: 0,
        })
    }

    /// Slots that are not absent.
    pub(crate) fn used(&self) -> usize {
        usize::from(self.used)
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
        }
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
            let run: &mut [u8; RUN_HEAD_MAX] = bytes[at..]
                .first_chunk_mut()
                .expect("room for the longest encoding");
            run[..3].copy_from_slice(&[slot as u8, (end - slot - 1) as u8, tag]);
            let mut used = put_varint_at(run, 3, self.seqs[slot]);
            used = put_varint_at(run, used, self.births[slot]);
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
        let crc = sign(key, &bytes[..at]);
        bytes[at..at + 4].copy_from_slice(&crc.to_le_bytes());
        bytes[..at + 4].to_vec()
    }

    /// One past the last slot that continues the run of `first`; addresses go on by `step`.
    fn run_end(&self, first: usize, step: u64) -> usize {
        let (seq, birth) = (self.seqs[first], self.births[first]);
        let mut place = self.places[first];
        let mut next = first + 1;
        while next < SLOTS {
            place += step;
            if self.births[next] != birth || self.places[next] != place || self.seqs[next] != seq {
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
            let mut value = Slot {
                state: State::from_u8(tag & !NO_END)?,
                is_no_end: tag & NO_END != 0,
                seq: fields.varint()?,
                birth: fields.varint()?,
                ..Slot::default()
            };
            let is_data = value.state == State::Data;
            if is_data {
                value.address = fields.varint()?;
            }
            let last_address = value.address.checked_add(length as u64)?;
            if first < least || first + length > SLOTS || last_address > ADDRESS_MASK {
                return None;
            }
            if value.state == State::Absent {
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
        Some(leaf)
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
            0u8..6,
            any::<bool>(),
            0u64..1 << 47,
            0u64..4,
            0u64..4,
            any::<u32>(),
        );
        prop::collection::vec((0..SLOTS, slot), 0..300).prop_map(|list| {
            list.into_iter()
                .map(|(at, (state, is_no_end, address, seq, birth, sum))| {
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
                        },
                        _ => Slot {
                            state,
                            is_no_end,
                            seq,
                            birth,
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
        fn round_trip(list in slots()) {
            let mut leaf = Leaf::empty();
            for (at, slot) in list {
                leaf.set(at, slot);
            }
            let encoded = leaf.encode(key(), &mut [0xff; ENCODED_MAX]);
            let decoded = Leaf::decode(key(), &encoded).expect("own encoding");
            prop_assert!(*decoded == *leaf);
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
