//! The batch header: one 4 KiB block that says what an append holds. See `docs/format.md`.
//!
//! Only a header that carries its segment's secret counts. Guests never learn a secret, so no data they write
//! can pass for a header.

use std::ops::RangeInclusive;

use edge::AlignedBlock;
use types::{BLOCK_BYTES, BlockNo, BlockSum, LayerId, Seq, ShardId, SumKey};

use crate::bytes::{Reader, Writer, crc_without};

const MAGIC: u32 = 0x4254_4657; // "WFTB"
const VERSION: u16 = 1;
const CRC_AT: usize = 8;
/// Bytes before the first entry.
pub(crate) const FIXED_BYTES: usize = 96;
/// Bytes of one entry.
pub(crate) const ENTRY_BYTES: usize = 40;
/// The most data blocks in a batch (2 MiB).
pub(crate) const BATCH_BLOCKS_MAX: usize = 512;
/// The most entries in a batch.
pub(crate) const ENTRIES_MAX: usize = (BLOCK_BYTES as usize - FIXED_BYTES) / ENTRY_BYTES;
/// Entries of a batch are numbered by the low bits of a birth.
const BIRTH_SHIFT: u32 = 10;

/// What an entry does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    /// Blocks with data.
    Data = 1,
    /// Blocks that are zeros.
    Zero = 2,
    /// Blocks the guest discarded.
    Trim = 3,
    /// Blocks whose data was found corrupt when their segment was cleaned: they stay unreadable, never zeros.
    Lost = 4,
    /// A shard's record; `count` bytes are inline.
    Record = 5,
    /// The shard and everything older of it is gone.
    Drop = 6,
    /// The shard's end becomes `seq`.
    SetEnd = 7,
    /// Of batches in segments older than generation `shard`, only those up to number `seq` count.
    Open = 8,
    /// Checkpoint `seq` is durable in the index; segments older than generation `shard` are free.
    Checkpoint = 9,
    /// Blocks that are not there in this layer and `seq` more below it (any more): what layers below those hold shows.
    Void = 10,
    /// Layers from `layer` to `seq` of the shard are gone: nothing that any entry says of them counts.
    LayersGone = 11,
    /// Revision `seq` of its VDI's layers is applied to the shard.
    LayersRevision = 12,
    /// Layers from `layer` to the one in the low 32 bits of `seq` are one with the one in the high, which is no lower and
    /// whose name they have.
    LayersOne = 13,
}

impl Kind {
    fn from_u8(value: u8) -> Option<Kind> {
        Some(match value {
            1 => Kind::Data,
            2 => Kind::Zero,
            3 => Kind::Trim,
            4 => Kind::Lost,
            5 => Kind::Record,
            6 => Kind::Drop,
            7 => Kind::SetEnd,
            8 => Kind::Open,
            9 => Kind::Checkpoint,
            10 => Kind::Void,
            11 => Kind::LayersGone,
            12 => Kind::LayersRevision,
            13 => Kind::LayersOne,
            _ => return None,
        })
    }

    /// Whether the entry changes blocks of the index.
    pub(crate) fn is_blocks(self) -> bool {
        matches!(
            self,
            Kind::Data | Kind::Zero | Kind::Trim | Kind::Lost | Kind::Void
        )
    }

    /// Whether the entry says what became of layers.
    pub(crate) fn is_of_layers(self) -> bool {
        matches!(self, Kind::LayersGone | Kind::LayersOne)
    }

    /// Whether cleaning must look at the entry even when its segment holds no live data. Fences and checkpoints
    /// need not be kept: every checkpoint logs all that still count anew before a segment is free.
    pub(crate) fn is_note(self) -> bool {
        !matches!(self, Kind::Data | Kind::Open | Kind::Checkpoint)
    }
}

/// Moved by cleaning; `birth` is that of the original.
pub(crate) const FLAG_RELOCATED: u8 = 1;
/// Does not advance the shard's end: repair, or a part of a split write that is not its last.
pub(crate) const FLAG_NO_END: u8 = 2;

/// One entry of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) kind: Kind,
    pub(crate) flags: u8,
    /// The shard; a generation for [`Kind::Open`] and [`Kind::Checkpoint`].
    pub(crate) shard: u64,
    pub(crate) layer: u32,
    pub(crate) block: u32,
    /// Blocks, or bytes of a record.
    pub(crate) count: u32,
    pub(crate) seq: u64,
    /// Batch number and position of the entry that first said this. Total order of everything logged.
    pub(crate) birth: u64,
}

impl Entry {
    pub(crate) fn shard_id(&self) -> ShardId {
        ShardId::from_u64(self.shard)
    }

    pub(crate) fn is_relocated(&self) -> bool {
        self.flags & FLAG_RELOCATED != 0
    }

    pub(crate) fn advances_end(&self) -> bool {
        self.flags & FLAG_NO_END == 0
    }

    /// Data blocks behind the header.
    pub(crate) fn data_blocks(&self) -> usize {
        if self.kind == Kind::Data {
            self.count as usize
        } else {
            0
        }
    }

    pub(crate) fn inline_bytes(&self) -> usize {
        if self.kind == Kind::Record {
            self.count as usize
        } else {
            0
        }
    }

    /// The name that layers have by a [`Kind::LayersOne`].
    pub(crate) fn called(&self) -> Option<LayerId> {
        (self.kind == Kind::LayersOne).then_some(LayerId((self.seq >> 32) as u32))
    }

    /// The layers that a [`Kind::LayersGone`] or [`Kind::LayersOne`] is about.
    pub(crate) fn layers(&self) -> RangeInclusive<LayerId> {
        LayerId(self.layer)..=LayerId(self.seq as u32)
    }

    /// Identity of the `index`th block.
    pub(crate) fn sum_key(&self, index: u32) -> SumKey {
        SumKey {
            shard: self.shard_id(),
            layer: LayerId(self.layer),
            block: BlockNo(self.block + index),
            seq: Seq(self.seq),
        }
    }
}

/// Names an entry for ever: `number` of its batch, position in it.
pub(crate) fn birth(number: u64, position: usize) -> u64 {
    debug_assert!(position < 1 << BIRTH_SHIFT);
    number << BIRTH_SHIFT | position as u64
}

/// The number of the batch that an entry was born in.
pub(crate) fn batch_of(birth: u64) -> u64 {
    birth >> BIRTH_SHIFT
}

/// Which append of which segment; what a header is checked against.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SegmentKey {
    pub(crate) secret: u64,
    pub(crate) generation: u64,
}

/// A decoded header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) key: SegmentKey,
    pub(crate) number: u64,
    pub(crate) complete_upto: u64,
    pub(crate) durable_upto: u64,
    pub(crate) entries: Vec<Entry>,
    pub(crate) sums: Vec<u32>,
    pub(crate) inline: Vec<u8>,
}

/// Bytes of a header with this much in it.
pub(crate) fn header_bytes(entries: usize, sums: usize, inline: usize) -> usize {
    FIXED_BYTES + entries * ENTRY_BYTES + sums * 4 + inline
}

impl Header {
    /// Blocks of the whole batch, header included.
    pub(crate) fn blocks(&self) -> u32 {
        1 + self.sums.len() as u32
    }

    /// Bytes of the block that are in use; the rest is zeros.
    pub(crate) fn used_bytes(&self) -> usize {
        header_bytes(self.entries.len(), self.sums.len(), self.inline.len())
    }

    pub(crate) fn encode(&self) -> Box<AlignedBlock> {
        let mut block = AlignedBlock::zeroed();
        self.encode_over(&mut block, 0);
        block
    }

    /// Encodes into a block that held another header, of which `old_bytes` were in use.
    pub(crate) fn encode_over(&self, block: &mut AlignedBlock, old_bytes: usize) {
        let bytes = self.used_bytes();
        assert!(bytes as u64 <= BLOCK_BYTES, "batch header of {bytes} B");
        if let Some(rest) = block.0.get_mut(bytes..old_bytes) {
            rest.fill(0);
        }
        let mut out = Writer::new(&mut block.0);
        out.u32(MAGIC);
        out.u16(VERSION);
        out.u16(0);
        out.u32(0); // crc, below
        out.u16(self.entries.len() as u16);
        out.u16(self.sums.len() as u16);
        out.u32(self.inline.len() as u32);
        out.u32(0);
        out.u64(self.key.secret);
        out.u64(self.key.generation);
        out.u64(self.number);
        out.u64(self.complete_upto);
        out.u64(self.durable_upto);
        out.put(&[0; FIXED_BYTES - 64]);
        for entry in &self.entries {
            out.u64(entry.shard);
            out.u64(entry.seq);
            out.u64(if entry.is_relocated() { entry.birth } else { 0 });
            out.u32(entry.layer);
            out.u32(entry.block);
            out.u32(entry.count);
            out.put(&[entry.kind as u8, entry.flags, 0, 0]);
        }
        for sum in &self.sums {
            out.u32(*sum);
        }
        out.put(&self.inline);
        let crc = crc_without(&block.0, CRC_AT);
        block.0[CRC_AT..CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
    }

    /// `None` for anything that is not a whole header of this segment's.
    pub(crate) fn decode(block: &[u8], key: SegmentKey) -> Option<Header> {
        Header::parse(block, Some(key))
    }

    /// A whole header of whichever segment. Only for a block where no guest's data can be.
    pub(crate) fn decode_any(block: &[u8]) -> Option<Header> {
        Header::parse(block, None)
    }

    fn parse(block: &[u8], wanted: Option<SegmentKey>) -> Option<Header> {
        assert_eq!(block.len() as u64, BLOCK_BYTES);
        let mut fields = Reader::new(block);
        // Cheap tests first: scanning for a header past a hole runs them on every block.
        if fields.u32()? != MAGIC || fields.u16()? != VERSION {
            return None;
        }
        fields.u16()?;
        let crc = fields.u32()?;
        let entry_count = usize::from(fields.u16()?);
        let sum_count = usize::from(fields.u16()?);
        let inline_count = fields.u32()? as usize;
        fields.u32()?;
        let key = SegmentKey {
            secret: fields.u64()?,
            generation: fields.u64()?,
        };
        if wanted.is_some_and(|wanted| wanted != key) || crc != crc_without(block, CRC_AT) {
            return None;
        }
        let number = fields.u64()?;
        let complete_upto = fields.u64()?;
        let durable_upto = fields.u64()?;
        fields.take(FIXED_BYTES - 64)?;
        if sum_count > BATCH_BLOCKS_MAX || number >= 1 << (64 - BIRTH_SHIFT) {
            return None;
        }
        let mut entries = Vec::with_capacity(entry_count.min(100));
        for position in 0..entry_count {
            entries.push(decode_entry(&mut fields, number, position)?);
        }
        let sums = (0..sum_count)
            .map(|_| fields.u32())
            .collect::<Option<Vec<u32>>>()?;
        let inline = fields.take(inline_count)?.to_vec();
        let header = Header {
            key,
            number,
            complete_upto,
            durable_upto,
            entries,
            sums,
            inline,
        };
        header.is_consistent().then_some(header)
    }

    fn is_consistent(&self) -> bool {
        let data: usize = self.entries.iter().map(Entry::data_blocks).sum();
        let inline: usize = self.entries.iter().map(Entry::inline_bytes).sum();
        data == self.sums.len()
            && inline == self.inline.len()
            && self.complete_upto < self.number
            && self.durable_upto <= self.complete_upto
    }

    /// Each entry with the position of its first sum and its inline bytes.
    pub(crate) fn walk(&self) -> impl Iterator<Item = (&Entry, usize, &[u8])> {
        let mut sum = 0;
        let mut inline = 0;
        self.entries.iter().map(move |entry| {
            let at = (sum, inline);
            sum += entry.data_blocks();
            inline += entry.inline_bytes();
            (entry, at.0, &self.inline[at.1..inline])
        })
    }

    /// Whether every data block matches its sum; `data` is what follows the header.
    pub(crate) fn data_is_whole(&self, data: &[u8]) -> bool {
        let mut blocks = data.chunks_exact(BLOCK_BYTES as usize);
        for (entry, first_sum, _) in self.walk() {
            for index in 0..entry.data_blocks() {
                let Some(block) = blocks.next() else { return false };
                let sum = types::bind(entry.sum_key(index as u32), types::crc32c(block));
                if sum != BlockSum(self.sums[first_sum + index]) {
                    return false;
                }
            }
        }
        true
    }
}

fn decode_entry(fields: &mut Reader<'_>, number: u64, position: usize) -> Option<Entry> {
    let shard = fields.u64()?;
    let seq = fields.u64()?;
    let stored_birth = fields.u64()?;
    let layer = fields.u32()?;
    let block = fields.u32()?;
    let count = fields.u32()?;
    let kind = Kind::from_u8(fields.u8()?)?;
    let flags = fields.u8()?;
    fields.u16()?;
    let own = birth(number, position);
    let is_relocated = flags & FLAG_RELOCATED != 0;
    let entry = Entry {
        kind,
        flags,
        shard,
        layer,
        block,
        count,
        seq,
        birth: if is_relocated { stored_birth } else { own },
    };
    let is_in_range = match kind {
        Kind::LayersGone => (u64::from(layer)..=u64::from(u32::MAX)).contains(&seq),
        Kind::LayersOne => {
            let (last, called) = (seq as u32, (seq >> 32) as u32);
            layer <= last && last <= called
        }
        kind if kind.is_blocks() => {
            let end = block.checked_add(count);
            let is_deep = kind == Kind::Void && seq > u64::from(layer);
            count > 0 && !is_deep && end.is_some_and(|end| end <= types::SHARD_BLOCKS_MAX)
        }
        _ => true,
    };
    (is_in_range && entry.birth <= own).then_some(entry)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    pub(crate) const KEY: SegmentKey = SegmentKey {
        secret: 0xfeed,
        generation: 12,
    };

    fn example() -> Header {
        let entry = |kind, flags, count, birth| Entry {
            kind,
            flags,
            shard: 1 << 32 | 5,
            layer: 3,
            block: 250,
            count,
            seq: 77,
            birth,
        };
        Header {
            key: KEY,
            number: 9,
            complete_upto: 8,
            durable_upto: 7,
            entries: vec![
                entry(Kind::Data, 0, 2, birth(9, 0)),
                entry(Kind::Record, 0, 3, birth(9, 1)),
                entry(Kind::Trim, FLAG_NO_END, 1 << 20, birth(9, 2)),
                entry(Kind::Data, FLAG_RELOCATED, 1, birth(4, 1)),
            ],
            sums: vec![1, 2, 3],
            inline: vec![7, 8, 9],
        }
    }

    #[test]
    fn round_trip() {
        let header = example();
        let block = header.encode();
        assert_eq!(Header::decode(&block.0, KEY), Some(header));
        assert_eq!(Header::decode(&block.0, SegmentKey { secret: 1, ..KEY }), None);
        assert_eq!(
            Header::decode(&block.0, SegmentKey { generation: 1, ..KEY }),
            None
        );
    }

    #[test]
    fn a_write_of_the_largest_size_fits_one_header() {
        assert!(header_bytes(1, 256, 0) as u64 <= BLOCK_BYTES);
        assert!(header_bytes(1, 0, 3072) as u64 <= BLOCK_BYTES);
        assert!(header_bytes(1, BATCH_BLOCKS_MAX, 0) as u64 <= BLOCK_BYTES);
    }

    proptest! {
        #[test]
        fn no_flipped_bit_passes(bit in 0usize..4096 * 8) {
            let mut block = example().encode();
            block.0[bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(Header::decode(&block.0, KEY), None);
        }

        #[test]
        fn a_resigned_header_of_any_content_is_safe(patch in prop::collection::vec((12usize..4096, any::<u8>()), 1..40)) {
            let mut block = example().encode();
            for (at, byte) in patch {
                if !(24..40).contains(&at) {
                    block.0[at] = byte;
                }
            }
            let crc = crc_without(&block.0, CRC_AT);
            block.0[CRC_AT..CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
            if let Some(header) = Header::decode(&block.0, KEY) {
                for (entry, _, _) in header.walk() {
                    prop_assert!(entry.data_blocks() <= BATCH_BLOCKS_MAX);
                }
            }
        }
    }
}
