//! Segments: the header at the start of each, and the table of what they hold.
//!
//! ```text
//!  Free ──header written and synced──▶ Open ──full──▶ Closed ──nothing in it counts──▶ Emptied
//!   ▲                                                                                     │
//!   └───────── a checkpoint that does not refer to it is durable, and says so in the log ─┘
//! ```

use std::collections::BTreeSet;

use edge::AlignedBlock;
use types::{BLOCK_BYTES, DiskId};

use crate::batch::SegmentKey;
use crate::bytes::{Reader, Writer, crc_without};
use crate::superblock::Superblock;

const MAGIC: u64 = 0x3147_4553_5446_4557; // "WEFTSEG1"
const VERSION: u16 = 1;
const CRC_AT: usize = 12;

/// First block of a segment: written and synced before anything else is put in it, which also makes whatever
/// it held before unreadable, because that carries another secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SegmentHeader {
    pub(crate) disk: DiskId,
    pub(crate) index: u32,
    pub(crate) key: SegmentKey,
    /// The checkpoint that was durable in the index when this segment was taken: an older index may still refer
    /// to what the segment held before. Zero in disks of the first builds, which says nothing.
    pub(crate) checkpoint: u64,
}

impl SegmentHeader {
    pub(crate) fn encode(&self) -> Box<AlignedBlock> {
        let mut block = AlignedBlock::zeroed();
        self.encode_into(&mut block);
        block
    }

    /// Encodes into a block of zeros.
    pub(crate) fn encode_into(&self, block: &mut AlignedBlock) {
        let mut out = Writer::new(&mut block.0);
        out.u64(MAGIC);
        out.u16(VERSION);
        out.u16(0);
        out.u32(0); // crc, below
        out.u128(self.disk.0);
        out.u32(self.index);
        out.u32(0);
        out.u64(self.key.generation);
        out.u64(self.key.secret);
        out.u64(self.checkpoint);
        let crc = crc_without(&block.0, CRC_AT);
        block.0[CRC_AT..CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
    }

    pub(crate) fn decode(block: &[u8]) -> Option<SegmentHeader> {
        let mut fields = Reader::new(block);
        if fields.u64()? != MAGIC || fields.u16()? != VERSION {
            return None;
        }
        fields.u16()?;
        if fields.u32()? != crc_without(block, CRC_AT) {
            return None;
        }
        let disk = DiskId(fields.u128()?);
        let index = fields.u32()?;
        fields.u32()?;
        let generation = fields.u64()?;
        let secret = fields.u64()?;
        let checkpoint = fields.u64()?;
        Some(SegmentHeader {
            disk,
            index,
            key: SegmentKey { secret, generation },
            checkpoint,
        })
    }
}

/// The secret of a segment's generation: what a guest would have to guess to forge a header.
pub(crate) fn secret(base: u64, entropy: u64, generation: u64) -> u64 {
    // splitmix64 over all three; each is unknown to guests.
    let mut x = base ^ entropy.rotate_left(29) ^ generation.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    for _ in 0..3 {
        x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^= x >> 31;
    }
    x
}

/// Where segments lie; block addresses are byte offsets over 4096.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Geometry {
    pub(crate) first_block: u64,
    pub(crate) segment_blocks: u32,
    pub(crate) segments: u32,
}

impl Geometry {
    pub(crate) fn of(superblock: &Superblock) -> Geometry {
        Geometry {
            first_block: superblock.first_segment / BLOCK_BYTES,
            segment_blocks: superblock.segment_blocks(),
            segments: superblock.segments,
        }
    }

    /// Block address of a segment's header.
    pub(crate) fn start(&self, index: u32) -> u64 {
        assert!(index < self.segments, "segment {index} of {}", self.segments);
        self.first_block + u64::from(index) * u64::from(self.segment_blocks)
    }

    /// The segment that holds a block address, if one does.
    pub(crate) fn find(&self, address: u64) -> Option<u32> {
        let index = address.checked_sub(self.first_block)? / u64::from(self.segment_blocks);
        (index < u64::from(self.segments)).then_some(index as u32)
    }
}

/// Where in its life a segment is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Stage {
    #[default]
    Free,
    /// Its header is being written, or it is the next to be filled.
    Prepared,
    Open,
    Closed,
    /// Nothing in it counts; free once a checkpoint says so.
    Emptied,
}

/// What the store knows of one segment.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Segment {
    pub(crate) generation: u64,
    pub(crate) stage: Stage,
    /// Data blocks that the index points at.
    pub(crate) live: u32,
    /// Entries without data in it that cleaning must look at.
    pub(crate) notes: u32,
    /// Appends and reads under way in it.
    pub(crate) pins: u32,
    /// Cleaning could not read all of it: not a victim again until the disk is reopened.
    pub(crate) is_stuck: bool,
}

/// Rows of this many segments are one value in the index, so that a checkpoint writes only what changed.
pub(crate) const ROW_SEGMENTS: u32 = 256;

/// All segments of the disk.
#[derive(Clone, Debug)]
pub(crate) struct SegmentTable {
    pub(crate) geometry: Geometry,
    list: Vec<Segment>,
    free: BTreeSet<u32>,
    dirty_rows: BTreeSet<u32>,
    live_blocks: u64,
    emptied: Vec<u32>,
    /// Dead blocks in segments that are stuck: space that cleaning cannot give back.
    lost_blocks: u64,
    /// Grows with every block that dies and every segment that closes.
    changes: u64,
}

impl SegmentTable {
    pub(crate) fn new(geometry: Geometry) -> SegmentTable {
        SegmentTable {
            geometry,
            list: vec![Segment::default(); geometry.segments as usize],
            free: (0..geometry.segments).collect(),
            dirty_rows: BTreeSet::new(),
            live_blocks: 0,
            emptied: Vec::new(),
            lost_blocks: 0,
            changes: 0,
        }
    }

    pub(crate) fn get(&self, index: u32) -> &Segment {
        &self.list[index as usize]
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u32, &Segment)> {
        (0..).zip(&self.list)
    }

    pub(crate) fn free_count(&self) -> u32 {
        self.free.len() as u32
    }

    pub(crate) fn changes(&self) -> u64 {
        self.changes
    }

    pub(crate) fn live_blocks(&self) -> u64 {
        self.live_blocks
    }

    pub(crate) fn lost_blocks(&self) -> u64 {
        self.lost_blocks
    }

    fn touch(&mut self, index: u32) -> &mut Segment {
        self.dirty_rows.insert(index / ROW_SEGMENTS);
        &mut self.list[index as usize]
    }

    /// Takes the free segment with the lowest number.
    pub(crate) fn take_free(&mut self, generation: u64) -> Option<u32> {
        let index = self.free.pop_first()?;
        self.prepare(index, generation);
        Some(index)
    }

    /// Takes the free segment with the highest number: recovery keeps away from what the dead process took last,
    /// whose header may still be on its way to the disk.
    pub(crate) fn take_last_free(&mut self, generation: u64) -> Option<u32> {
        let index = self.free.pop_last()?;
        self.prepare(index, generation);
        Some(index)
    }

    fn prepare(&mut self, index: u32, generation: u64) {
        *self.touch(index) = Segment {
            generation,
            stage: Stage::Prepared,
            ..Segment::default()
        };
    }

    pub(crate) fn set_stage(&mut self, index: u32, stage: Stage) {
        self.touch(index).stage = stage;
        if stage == Stage::Closed {
            self.changes += 1 << 16;
            self.look_whether_empty(index);
        }
    }

    /// Recovery replays this segment. It counts as open until then: its blocks may all die and others come.
    pub(crate) fn adopt(&mut self, index: u32, generation: u64) {
        let segment = self.touch(index);
        if segment.stage == Stage::Free {
            *segment = Segment {
                generation,
                ..Segment::default()
            };
        }
        assert_eq!(
            segment.generation, generation,
            "segment {index} was replaced unseen"
        );
        segment.stage = Stage::Open;
        self.free.remove(&index);
    }

    /// Recovery is through: what it replayed takes no more.
    pub(crate) fn close_adopted(&mut self) {
        for index in 0..self.geometry.segments {
            if self.get(index).stage == Stage::Open {
                self.set_stage(index, Stage::Closed);
            } else {
                self.look_whether_empty(index);
            }
        }
    }

    /// A row of the index was read back.
    pub(crate) fn restore(&mut self, index: u32, segment: Segment) {
        if segment.stage == Stage::Free {
            self.free.insert(index);
        } else {
            self.free.remove(&index);
        }
        self.live_blocks += u64::from(segment.live);
        self.list[index as usize] = segment;
    }

    pub(crate) fn release(&mut self, index: u32) {
        let segment = self.touch(index);
        assert_eq!(
            (segment.live, segment.pins),
            (0, 0),
            "freed segment {index} is in use"
        );
        segment.stage = Stage::Free;
        segment.notes = 0;
        self.free.insert(index);
    }

    pub(crate) fn add_live(&mut self, address: u64, count: u32) {
        let index = self.geometry.find(address).expect("a block of a segment");
        self.touch(index).live += count;
        self.live_blocks += u64::from(count);
    }

    pub(crate) fn drop_live(&mut self, address: u64) {
        let index = self.geometry.find(address).expect("a block of a segment");
        let segment = self.touch(index);
        assert!(segment.live > 0, "segment {index} has no live block to lose");
        segment.live -= 1;
        let is_stuck = segment.is_stuck;
        if is_stuck && segment.live == 0 {
            // Of its notes those that can be read were moved when it was cleaned; nobody can read the others.
            segment.notes = 0;
        }
        self.lost_blocks += u64::from(is_stuck);
        self.live_blocks -= 1;
        self.changes += 1;
        self.look_whether_empty(index);
    }

    pub(crate) fn add_note(&mut self, index: u32) {
        self.touch(index).notes += 1;
    }

    pub(crate) fn pin(&mut self, index: u32) {
        self.list[index as usize].pins += 1;
    }

    pub(crate) fn unpin(&mut self, index: u32) {
        let segment = &mut self.list[index as usize];
        assert!(segment.pins > 0, "segment {index} is not pinned");
        segment.pins -= 1;
        self.look_whether_empty(index);
    }

    /// Cleaning has moved everything that still counts, or nothing in it counts any more.
    pub(crate) fn forget_notes(&mut self, index: u32) {
        self.touch(index).notes = 0;
        self.look_whether_empty(index);
    }

    pub(crate) fn set_stuck(&mut self, index: u32) {
        let segment = &mut self.list[index as usize];
        assert!(!segment.is_stuck, "segment {index} was cleaned twice");
        segment.is_stuck = true;
        self.lost_blocks += u64::from(self.geometry.segment_blocks - segment.live);
    }

    fn look_whether_empty(&mut self, index: u32) {
        let segment = &mut self.list[index as usize];
        if segment.stage == Stage::Closed && segment.live == 0 && segment.notes == 0 && segment.pins == 0 {
            if std::mem::take(&mut segment.is_stuck) {
                self.lost_blocks -= u64::from(self.geometry.segment_blocks);
            }
            segment.stage = Stage::Emptied;
            self.dirty_rows.insert(index / ROW_SEGMENTS);
            self.emptied.push(index);
        }
    }

    /// Segments that wait for a checkpoint to be free.
    pub(crate) fn emptied(&self) -> usize {
        self.emptied.len()
    }

    pub(crate) fn take_emptied(&mut self) -> Vec<u32> {
        std::mem::take(&mut self.emptied)
    }

    /// Frees the oldest segment that waits for a checkpoint; the newest fences are in the youngest.
    pub(crate) fn release_oldest_emptied(&mut self) {
        let oldest = (0..self.emptied.len()).min_by_key(|at| self.get(self.emptied[*at]).generation);
        if let Some(at) = oldest {
            let index = self.emptied.swap_remove(at);
            self.release(index);
        }
    }

    /// Frees a segment that waits for a checkpoint, which was made just for it.
    pub(crate) fn release_emptied(&mut self, index: u32) {
        let at = self.emptied.iter().position(|emptied| *emptied == index);
        self.emptied
            .swap_remove(at.expect("nothing in it counts any more"));
        self.release(index);
    }

    /// The oldest generation that holds anything; all older segments are free.
    pub(crate) fn floor(&self) -> u64 {
        self.list
            .iter()
            .filter(|segment| !matches!(segment.stage, Stage::Free | Stage::Emptied))
            .map(|segment| segment.generation)
            .min()
            .unwrap_or(u64::MAX)
    }

    /// Rows that changed since the last call, encoded as a checkpoint keeps them.
    pub(crate) fn take_dirty_rows(&mut self) -> Vec<(u32, Vec<u8>)> {
        let rows = std::mem::take(&mut self.dirty_rows);
        rows.into_iter().map(|row| (row, self.encode_row(row))).collect()
    }

    fn encode_row(&self, row: u32) -> Vec<u8> {
        let first = row * ROW_SEGMENTS;
        let last = (first + ROW_SEGMENTS).min(self.geometry.segments);
        let mut out = vec![VERSION as u8];
        for segment in &self.list[first as usize..last as usize] {
            // A prepared segment holds nothing yet: for recovery it is free until batches are found in it.
            let holds = matches!(segment.stage, Stage::Open | Stage::Closed);
            out.extend_from_slice(&segment.generation.to_le_bytes());
            out.extend_from_slice(&segment.live.to_le_bytes());
            out.extend_from_slice(&segment.notes.to_le_bytes());
            out.push(u8::from(holds));
        }
        let crc = crc32c::crc32c(&out);
        out.extend_from_slice(&crc.to_le_bytes());
        out
    }

    /// `None` unless the bytes are a row of this table.
    pub(crate) fn restore_row(&mut self, row: u32, bytes: &[u8]) -> Option<()> {
        let (content, crc) = bytes.split_last_chunk::<4>()?;
        if u32::from_le_bytes(*crc) != crc32c::crc32c(content) {
            return None;
        }
        let mut fields = Reader::new(content);
        if fields.u8()? != VERSION as u8 {
            return None;
        }
        let first = row.checked_mul(ROW_SEGMENTS)?;
        for index in first..first.checked_add(ROW_SEGMENTS)?.min(self.geometry.segments) {
            let generation = fields.u64()?;
            let live = fields.u32()?;
            let notes = fields.u32()?;
            let stage = if fields.u8()? == 1 {
                Stage::Closed
            } else {
                Stage::Free
            };
            if live > self.geometry.segment_blocks || (stage == Stage::Free && live > 0) {
                return None;
            }
            self.restore(
                index,
                Segment {
                    generation,
                    stage,
                    live,
                    notes,
                    ..Segment::default()
                },
            );
        }
        fields.is_empty().then_some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_round_trip_and_flipped_bits() {
        let header = SegmentHeader {
            disk: DiskId(3),
            index: 9,
            key: SegmentKey {
                secret: 5,
                generation: 6,
            },
            checkpoint: 8,
        };
        let mut block = header.encode();
        assert_eq!(SegmentHeader::decode(&block.0), Some(header));
        for bit in 0..88 * 8 {
            block.0[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(SegmentHeader::decode(&block.0), None, "bit {bit}");
            block.0[bit / 8] ^= 1 << (bit % 8);
        }
    }

    #[test]
    fn rows_round_trip_and_flipped_bits_are_noticed() {
        let geometry = Geometry {
            first_block: 256,
            segment_blocks: 256,
            segments: 300,
        };
        let mut table = SegmentTable::new(geometry);
        table.adopt(299, 7);
        table.add_live(geometry.start(299) + 3, 5);
        table.add_note(299);
        let rows = table.take_dirty_rows();
        assert_eq!(rows.len(), 1);
        let mut back = SegmentTable::new(geometry);
        for (row, bytes) in &rows {
            assert!(back.restore_row(*row, bytes).is_some());
            assert!(
                SegmentTable::new(geometry)
                    .restore_row(*row, &bytes[1..])
                    .is_none()
            );
            // Also in a count, which no reader could find wrong.
            for bit in (0..bytes.len() * 8).step_by(7) {
                let mut bytes = bytes.clone();
                bytes[bit / 8] ^= 1 << (bit % 8);
                let restored = SegmentTable::new(geometry).restore_row(*row, &bytes);
                assert!(restored.is_none(), "bit {bit}");
            }
        }
        assert_eq!(
            (back.get(299).live, back.get(299).notes, back.get(299).generation),
            (5, 1, 7)
        );
        assert_eq!((back.live_blocks(), back.free_count(), back.floor()), (5, 299, 7));
    }

    #[test]
    fn addresses_beyond_five_tebibytes_find_their_segment() {
        let geometry = Geometry {
            first_block: 256,
            segment_blocks: 8192,
            segments: 200_000,
        };
        let start = geometry.start(199_999);
        assert!(start * BLOCK_BYTES > 6 << 40);
        assert_eq!(geometry.find(start), Some(199_999));
        assert_eq!(geometry.find(start + 8191), Some(199_999));
        assert_eq!(geometry.find(start + 8192), None);
        assert_eq!(geometry.find(255), None);
    }
}
