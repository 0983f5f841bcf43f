//! Giving a disk to the pool.

use edge::{AlignedBlock, BlockFile, DiskError, KvBatch, KvError, KvStore};
use types::{BLOCK_BYTES, DiskId, PoolId};

use crate::scan::{SegmentFound, find_segment};
use crate::superblock::{
    FIRST_SEGMENT_OFFSET, FORMAT_VERSION, SEGMENT_BYTES_DEFAULT, SEGMENT_BYTES_MAX, SEGMENT_BYTES_MIN,
    SEGMENTS_MIN, Superblock,
};

/// The smallest segment in which the longest write fits whole, with room to spare.
const SEGMENT_BYTES_MIN_REAL: u64 = 2 << 20;
/// Disks up to this size may have smaller segments.
const TOY_DISK_BYTES_MAX: u64 = 64 << 20;

/// What the caller decides about a new disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FormatParams {
    /// Random and unique.
    pub disk: DiskId,
    /// The pool it joins.
    pub pool: PoolId,
    /// Bytes of a segment; a multiple of 4 KiB from 2 MiB (from 64 KiB on disks of up to 64 MiB) to 256 MiB.
    pub segment_bytes: u64,
    /// Random: the secrets of segments derive from it.
    pub secret_base: u64,
}

impl FormatParams {
    /// Segments of the default size.
    #[must_use]
    pub fn new(disk: DiskId, pool: PoolId, secret_base: u64) -> FormatParams {
        FormatParams {
            disk,
            pool,
            segment_bytes: SEGMENT_BYTES_DEFAULT,
            secret_base,
        }
    }
}

/// Why a disk was not formatted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// Fewer than eight segments fit.
    #[error("the disk has {have} B; with segments of {segment_bytes} B it needs at least {need} B")]
    TooSmall {
        /// Bytes there are.
        have: u64,
        /// Bytes needed.
        need: u64,
        /// Of one segment.
        segment_bytes: u64,
    },
    /// Not a size a segment can have.
    #[error("segments of {0} B: must be a multiple of 4096 from 2 MiB to 256 MiB")]
    SegmentBytes(u64),
    /// The disk failed.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The index failed.
    #[error(transparent)]
    Index(#[from] KvError),
}

/// Makes an empty disk. Whatever Weft had on it before is gone: the first block of every segment is wiped, so
/// that nothing of an earlier life can be taken for this one's.
///
/// # Errors
/// See [`FormatError`].
pub fn format(
    disk: &mut dyn BlockFile,
    kv: &mut dyn KvStore,
    params: FormatParams,
) -> Result<Superblock, FormatError> {
    let FormatParams { segment_bytes, .. } = params;
    let have = disk.bytes();
    // A write that fits no segment is split, and a crash may keep its first part only. On disks that hold guests
    // every write fits; small worlds that wrap and clean often ask for no longer ones.
    let least = if have <= TOY_DISK_BYTES_MAX {
        SEGMENT_BYTES_MIN
    } else {
        SEGMENT_BYTES_MIN_REAL
    };
    if !segment_bytes.is_multiple_of(BLOCK_BYTES) || !(least..=SEGMENT_BYTES_MAX).contains(&segment_bytes) {
        return Err(FormatError::SegmentBytes(segment_bytes));
    }
    let segments = have.saturating_sub(FIRST_SEGMENT_OFFSET) / segment_bytes;
    if segments < SEGMENTS_MIN {
        return Err(FormatError::TooSmall {
            have,
            need: FIRST_SEGMENT_OFFSET + SEGMENTS_MIN * segment_bytes,
            segment_bytes,
        });
    }
    let superblock = Superblock {
        version: FORMAT_VERSION,
        disk: params.disk,
        pool: params.pool,
        capacity: have / BLOCK_BYTES * BLOCK_BYTES,
        segment_bytes,
        first_segment: FIRST_SEGMENT_OFFSET,
        segments: u32::try_from(segments).unwrap_or(u32::MAX),
        generation: 1,
        open_count: 0,
        secret_base: params.secret_base,
        checkpoint: 0,
        doubt: 0,
    };
    // Segment headers carry the disk's id; a new id alone already makes old ones foreign.
    let wiped = AlignedBlock::zeroed();
    wipe_old_headers(disk, &superblock, &wiped.0)?;
    wipe_index(kv)?;
    superblock.write(disk)?;
    Ok(superblock)
}

fn wipe_old_headers(
    disk: &mut dyn BlockFile,
    superblock: &Superblock,
    zeros: &[u8],
) -> Result<(), DiskError> {
    // A header counts only under this disk's id, so it is wiped only when an id is used again. A batch behind what is
    // no header at all, left by a log with other segments, would be taken for one of a segment whose header rotted.
    for index in 0..superblock.segments {
        if !matches!(find_segment(disk, superblock, index), SegmentFound::None) {
            let offset = superblock.first_segment + u64::from(index) * superblock.segment_bytes;
            disk.write_at(offset, zeros)?;
        }
    }
    disk.sync()
}

/// Empties an index.
pub(crate) fn wipe_index(kv: &mut dyn KvStore) -> Result<(), KvError> {
    kv.apply(&KvBatch {
        delete_ranges: vec![(vec![0], vec![0xff; 32])],
        ..KvBatch::default()
    })
}
