//! Reading the log back: the batch headers of one segment, stepping over what is not one.

use edge::{AlignedBlock, BlockFile};
use types::BLOCK_BYTES;

use crate::batch::{Header, SegmentKey};
use crate::segment::{Geometry, SegmentHeader};
use crate::superblock::Superblock;

const WINDOW_BLOCKS: u32 = 64;
const BLOCK: usize = BLOCK_BYTES as usize;

/// The segment header at `index`, if there is a valid one of this disk.
pub(crate) fn read_segment_header(
    disk: &dyn BlockFile,
    superblock: &Superblock,
    index: u32,
) -> Option<SegmentHeader> {
    let mut block = AlignedBlock::zeroed();
    let offset = Geometry::of(superblock).start(index) * BLOCK_BYTES;
    disk.read_at(offset, &mut block.0).ok()?;
    SegmentHeader::decode(&block.0).filter(|header| header.disk == superblock.disk && header.index == index)
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
pub(crate) struct SegmentScan<'a> {
    disk: &'a dyn BlockFile,
    start: u64,
    blocks: u32,
    key: SegmentKey,
    at: u32,
    window: Vec<AlignedBlock>,
    window_at: u32,
    /// Blocks that could not be read.
    pub(crate) unreadable: u32,
}

impl<'a> SegmentScan<'a> {
    pub(crate) fn new(disk: &'a dyn BlockFile, geometry: Geometry, index: u32, key: SegmentKey) -> Self {
        SegmentScan {
            disk,
            start: geometry.start(index),
            blocks: geometry.segment_blocks,
            key,
            at: 1,
            window: Vec::new(),
            window_at: 0,
            unreadable: 0,
        }
    }

    fn block(&mut self, at: u32) -> &[u8] {
        let is_inside = at >= self.window_at && at - self.window_at < self.window.len() as u32;
        if !is_inside {
            self.fill(at);
        }
        &self.window[(at - self.window_at) as usize].0
    }

    fn fill(&mut self, at: u32) {
        let count = WINDOW_BLOCKS.min(self.blocks - at);
        let mut bytes = vec![0; count as usize * BLOCK];
        let offset = (self.start + u64::from(at)) * BLOCK_BYTES;
        if self.disk.read_at(offset, &mut bytes).is_err() {
            // One bad block must not hide its neighbours.
            for (index, block) in bytes.chunks_exact_mut(BLOCK).enumerate() {
                if self.disk.read_at(offset + (index * BLOCK) as u64, block).is_err() {
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
    pub(crate) fn next_batch(&mut self) -> Option<Found> {
        let key = self.key;
        let mut skipped = 0;
        while self.at < self.blocks {
            let at = self.at;
            let room = self.blocks - at;
            let header = Header::decode(self.block(at), key).filter(|header| header.blocks() <= room);
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

    /// Whether the data behind a found header matches its sums.
    pub(crate) fn is_whole(&self, found: &Found) -> bool {
        let mut data = vec![0; found.header.sums.len() * BLOCK];
        let offset = (found.address + 1) * BLOCK_BYTES;
        data.is_empty() || (self.disk.read_at(offset, &mut data).is_ok() && found.header.data_is_whole(&data))
    }
}
