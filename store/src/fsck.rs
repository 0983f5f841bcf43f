//! The offline check: every header and every block of the log against its checksum. Reads only.
//!
//! It judges the log alone, as a rebuild of the index would see it: a bad block that the guest has since
//! overwritten is reported too, and says as much about the device.

use edge::{BlockFile, DiskError};
use types::{BLOCK_BYTES, BlockSum, ShardId};

use crate::batch::{Header, Kind};
use crate::scan::{SegmentFound, SegmentScan, find_segment};
use crate::segment::Geometry;
use crate::superblock::{SUPERBLOCK_OFFSETS, Superblock, SuperblockError, read_copy, read_superblock};

/// The most places an [`FsckReport`] lists; the count goes on.
const PLACES_MAX: usize = 1000;

/// Why a check could not run.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FsckError {
    /// There is no usable superblock.
    #[error(transparent)]
    Superblock(#[from] SuperblockError),
    /// The disk failed altogether.
    #[error(transparent)]
    Disk(#[from] DiskError),
}

/// Something wrong, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BadPlace {
    /// One of the two superblocks, at this byte offset.
    Superblock {
        /// Where.
        offset: u64,
    },
    /// The first block of a segment that holds batches. They are found all the same.
    SegmentHeader {
        /// The segment.
        segment: u32,
    },
    /// A block of data that does not match its sum or cannot be read.
    Block {
        /// Byte offset on the disk.
        offset: u64,
        /// Whose it was.
        shard: ShardId,
        /// Number in the shard.
        block: types::BlockNo,
        /// The write that stored it.
        seq: types::Seq,
    },
    /// Blocks between batches that are no batch. At the end of what was written before a crash this is usual.
    Gap {
        /// Byte offset on the disk.
        offset: u64,
        /// How many blocks.
        blocks: u32,
    },
    /// Blocks that could not be read while looking for headers.
    Unreadable {
        /// The segment.
        segment: u32,
        /// How many blocks.
        blocks: u32,
    },
}

impl BadPlace {
    /// False for what a crash leaves behind on a healthy disk.
    #[must_use]
    pub fn is_damage(&self) -> bool {
        !matches!(self, BadPlace::Gap { .. })
    }
}

/// What [`fsck`] found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FsckReport {
    /// The newest good superblock.
    pub superblock: Superblock,
    /// Segments with a valid header.
    pub segments_used: u32,
    /// Valid batches.
    pub batches: u64,
    /// Data blocks checked.
    pub blocks: u64,
    /// Of those, how many are bad.
    pub bad_blocks: u64,
    /// Bytes of segments that hold batches.
    pub filled_bytes: u64,
    /// Highest batch number.
    pub last_batch: u64,
    /// What is wrong, at most 1000 places.
    pub places: Vec<BadPlace>,
}

impl FsckReport {
    /// Nothing is wrong that a crash cannot explain.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        !self.places.iter().any(BadPlace::is_damage)
    }

    fn note(&mut self, place: BadPlace) {
        if self.places.len() < PLACES_MAX {
            self.places.push(place);
        }
    }
}

/// What one segment holds, for `weft disk inspect`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SegmentInfo {
    /// Number on the disk.
    pub segment: u32,
    /// Order of opening.
    pub generation: u64,
    /// First and last batch number, if it holds any.
    pub batches: Option<(u64, u64)>,
    /// How many batches.
    pub count: u64,
    /// Blocks that batches take, headers included.
    pub filled_blocks: u32,
    /// Blocks of data in them, live or dead.
    pub data_blocks: u32,
}

/// What a disk holds, without judging its data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inspection {
    /// The newest good superblock.
    pub superblock: Superblock,
    /// Segments with a valid header, by number on the disk. A free segment shows what it held last.
    pub segments: Vec<SegmentInfo>,
}

/// Checks the whole disk; `on_progress` is told segments done and in all.
///
/// # Errors
/// See [`FsckError`]. Whatever is wrong inside segments is in the report.
pub fn fsck(disk: &dyn BlockFile, on_progress: &mut dyn FnMut(u64, u64)) -> Result<FsckReport, FsckError> {
    let superblock = read_superblock(disk)?;
    let mut report = FsckReport {
        superblock,
        segments_used: 0,
        batches: 0,
        blocks: 0,
        bad_blocks: 0,
        filled_bytes: 0,
        last_batch: 0,
        places: Vec::new(),
    };
    for offset in SUPERBLOCK_OFFSETS {
        if read_copy(disk, offset).is_none_or(|copy| copy.disk != superblock.disk) {
            report.note(BadPlace::Superblock { offset });
        }
    }
    for segment in 0..superblock.segments {
        check_segment(disk, segment, &mut report);
        on_progress(u64::from(segment) + 1, u64::from(superblock.segments));
    }
    Ok(report)
}

fn check_segment(disk: &dyn BlockFile, segment: u32, report: &mut FsckReport) {
    let key = match find_segment(disk, &report.superblock, segment) {
        SegmentFound::Whole(header) => header.key,
        SegmentFound::Rescued(key) => {
            report.note(BadPlace::SegmentHeader { segment });
            key
        }
        SegmentFound::None => return,
    };
    report.segments_used += 1;
    let geometry = Geometry::of(&report.superblock);
    let mut scan = SegmentScan::new(geometry, segment, key);
    while let Some(found) = scan.next_batch(disk) {
        if found.skipped > 0 {
            let offset = (found.address - u64::from(found.skipped)) * BLOCK_BYTES;
            report.note(BadPlace::Gap {
                offset,
                blocks: found.skipped,
            });
        }
        report.batches += 1;
        report.filled_bytes += u64::from(found.header.blocks()) * BLOCK_BYTES;
        report.last_batch = report.last_batch.max(found.header.number);
        check_data(disk, &found.header, found.address + 1, report);
    }
    if scan.unreadable > 0 {
        report.note(BadPlace::Unreadable {
            segment,
            blocks: scan.unreadable,
        });
    }
}

fn check_data(disk: &dyn BlockFile, header: &Header, first: u64, report: &mut FsckReport) {
    let mut data = vec![0; header.sums.len() * BLOCK_BYTES as usize];
    let is_read = data.is_empty() || disk.read_at(first * BLOCK_BYTES, &mut data).is_ok();
    let mut blocks = data.chunks_exact_mut(BLOCK_BYTES as usize);
    for (entry, first_sum, _) in header.walk().filter(|(entry, _, _)| entry.kind == Kind::Data) {
        for index in 0..entry.count {
            let at = first_sum + index as usize;
            let offset = (first + at as u64) * BLOCK_BYTES;
            let block = blocks.next().expect("a sum for every block");
            // One bad block must not hide its neighbours.
            let is_here = is_read || disk.read_at(offset, block).is_ok();
            let key = entry.sum_key(index);
            report.blocks += 1;
            if !is_here || types::bind(key, types::crc32c(block)) != BlockSum(header.sums[at]) {
                report.bad_blocks += 1;
                report.note(BadPlace::Block {
                    offset,
                    shard: key.shard,
                    block: key.block,
                    seq: key.seq,
                });
            }
        }
    }
}

/// Reads the headers of the whole disk.
///
/// # Errors
/// There is no usable superblock.
pub fn inspect(disk: &dyn BlockFile) -> Result<Inspection, SuperblockError> {
    let superblock = read_superblock(disk)?;
    let geometry = Geometry::of(&superblock);
    let mut segments = Vec::new();
    for segment in 0..superblock.segments {
        let Some(key) = find_segment(disk, &superblock, segment).key() else {
            continue;
        };
        let mut info = SegmentInfo {
            segment,
            generation: key.generation,
            batches: None,
            count: 0,
            filled_blocks: 0,
            data_blocks: 0,
        };
        let mut scan = SegmentScan::new(geometry, segment, key);
        while let Some(found) = scan.next_batch(disk) {
            let number = found.header.number;
            info.batches = Some((info.batches.map_or(number, |(first, _)| first), number));
            info.count += 1;
            info.filled_blocks += found.header.blocks();
            info.data_blocks += found.header.sums.len() as u32;
        }
        segments.push(info);
    }
    Ok(Inspection { superblock, segments })
}
