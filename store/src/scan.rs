//! Reading the log back: the batch headers of one segment, stepping over what is not one.

use edge::{AlignedBlock, BlockFile};
use types::BLOCK_BYTES;

use crate::batch::{Header, SegmentKey};
use crate::segment::{Geometry, SegmentHeader};
use crate::superblock::Superblock;

const WINDOW_BLOCKS: u32 = 64;
const BLOCK: usize = BLOCK_BYTES as usize;

/// How the header of a segment was found.
pub(crate) enum SegmentFound {
    Whole(SegmentHeader),
    /// It rotted; the first batch behind it, where no guest's data ever is, says what it said.
    Rescued(SegmentKey),
    None,
}

impl SegmentFound {
    pub(crate) fn key(&self) -> Option<SegmentKey> {
        match self {
            SegmentFound::Whole(header) => Some(header.key),
            SegmentFound::Rescued(key) => Some(*key),
            SegmentFound::None => None,
        }
    }
}

/// Which segment lies at `index`. One bad block does not hide a whole segment.
pub(crate) fn find_segment(disk: &dyn BlockFile, superblock: &Superblock, index: u32) -> SegmentFound {
    let offset = Geometry::of(superblock).start(index) * BLOCK_BYTES;
    let mut block = AlignedBlock::zeroed();
    if disk.read_at(offset, &mut block.0).is_ok() {
        if let Some(header) = SegmentHeader::decode(&block.0) {
            return if header.disk == superblock.disk && header.index == index {
                SegmentFound::Whole(header)
            } else {
                SegmentFound::None
            };
        }
        if block.0.iter().all(|byte| *byte == 0) {
            return SegmentFound::None;
        }
    }
    match disk.read_at(offset + BLOCK_BYTES, &mut block.0) {
        Ok(()) => match Header::decode_any(&block.0) {
            Some(header) => SegmentFound::Rescued(header.key),
            None => SegmentFound::None,
        },
        Err(_) => SegmentFound::None,
    }
}

/// A batch as it lies in its segment.
pub(crate) struct Found {
    pub(crate) header: Header,
    /// Block address of the header on the disk.
    pub(crate) address: u64,
    /// Blocks before it that are not part of a valid batch.
    pub(crate) skipped: u32,
}

/// Walks the batches of a segment in order.
pub(crate) struct SegmentScan {
    start: u64,
    blocks: u32,
    key: SegmentKey,
    at: u32,
    window: Vec<AlignedBlock>,
    window_at: u32,
    /// Blocks that could not be read.
    pub(crate) unreadable: u32,
}

impl SegmentScan {
    pub(crate) fn new(geometry: Geometry, index: u32, key: SegmentKey) -> SegmentScan {
        SegmentScan {
            start: geometry.start(index),
            blocks: geometry.segment_blocks,
            key,
            at: 1,
            window: Vec::new(),
            window_at: 0,
            unreadable: 0,
        }
    }

    fn block(&mut self, disk: &dyn BlockFile, at: u32) -> &[u8] {
        let is_inside = at >= self.window_at && at - self.window_at < self.window.len() as u32;
        if !is_inside {
            self.fill(disk, at);
        }
        &self.window[(at - self.window_at) as usize].0
    }

    fn fill(&mut self, disk: &dyn BlockFile, at: u32) {
        let count = WINDOW_BLOCKS.min(self.blocks - at);
        let mut bytes = vec![0; count as usize * BLOCK];
        let offset = (self.start + u64::from(at)) * BLOCK_BYTES;
        if disk.read_at(offset, &mut bytes).is_err() {
            // One bad block must not hide its neighbours.
            for (index, block) in bytes.chunks_exact_mut(BLOCK).enumerate() {
                if disk.read_at(offset + (index * BLOCK) as u64, block).is_err() {
                    block.fill(0);
                    self.unreadable += 1;
                }
            }
        }
        self.window.clear();
        self.window.extend(
            bytes
                .chunks_exact(BLOCK)
                .map(|block| AlignedBlock(block.try_into().expect("a block"))),
        );
        self.window_at = at;
    }

    /// The next valid batch.
    pub(crate) fn next_batch(&mut self, disk: &dyn BlockFile) -> Option<Found> {
        let key = self.key;
        let mut skipped = 0;
        while self.at < self.blocks {
            let at = self.at;
            let room = self.blocks - at;
            let header = Header::decode(self.block(disk, at), key).filter(|header| header.blocks() <= room);
            let Some(header) = header else {
                self.at += 1;
                skipped += 1;
                continue;
            };
            self.at += header.blocks();
            return Some(Found {
                header,
                address: self.start + u64::from(at),
                skipped,
            });
        }
        None
    }
}

/// Whether the data behind a found header matches its sums.
pub(crate) fn is_whole(disk: &dyn BlockFile, found: &Found) -> bool {
    let mut data = vec![0; found.header.sums.len() * BLOCK];
    let offset = (found.address + 1) * BLOCK_BYTES;
    data.is_empty() || (disk.read_at(offset, &mut data).is_ok() && found.header.data_is_whole(&data))
}
