//! The superblock: what a disk is, in two copies. See `docs/format.md`.

use edge::{AlignedBlock, BlockFile, DiskError};
use types::{BLOCK_BYTES, DiskId, PoolId};

use crate::bytes::{Reader, Writer, crc_without};

/// Byte offsets of the two copies.
pub const SUPERBLOCK_OFFSETS: [u64; 2] = [0, 64 << 10];
/// Where the first segment begins.
pub const FIRST_SEGMENT_OFFSET: u64 = 1 << 20;
/// Segment size unless told otherwise.
pub const SEGMENT_BYTES_DEFAULT: u64 = 32 << 20;
/// A segment must hold its header, a batch header and a few blocks.
pub const SEGMENT_BYTES_MIN: u64 = 64 << 10;
/// The biggest segment: cleaning holds a place for each of its blocks in memory, 24 B.
pub const SEGMENT_BYTES_MAX: u64 = 256 << 20;
/// The fewest segments with which cleaning can work.
pub const SEGMENTS_MIN: u64 = 8;

const MAGIC: u64 = 0x3142_5053_5446_4557; // "WEFTSPB1"
/// Version of the format of a disk that this program writes; see `docs/format.md`. It reads every earlier one, and a disk
/// that it opens has this one from then on.
pub const FORMAT_VERSION: u16 = 3;
const CRC_AT: usize = 12;

/// What a disk says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// Of the format, from 1 to [`FORMAT_VERSION`].
    pub version: u16,
    /// Random, never changes.
    pub disk: DiskId,
    /// The pool it was given to.
    pub pool: PoolId,
    /// Bytes of the disk that Weft uses.
    pub capacity: u64,
    /// Bytes of a segment, a multiple of 4 KiB.
    pub segment_bytes: u64,
    /// Offset of segment 0, bytes.
    pub first_segment: u64,
    /// How many segments there are.
    pub segments: u32,
    /// Grows with every rewrite of the superblock.
    pub generation: u64,
    /// How often the disk was opened for writing: its incarnation.
    pub open_count: u64,
    /// Random; the secrets of segments derive from it.
    pub secret_base: u64,
    /// An index with an older checkpoint than this must not be used: it may refer to what was overwritten.
    pub checkpoint: u64,
    /// The number of a batch, or zero: the log was found damaged or old then, and a shard whose record is not newer
    /// may lack what it once completed.
    pub doubt: u64,
}

/// Why there is no usable superblock.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SuperblockError {
    /// Neither copy could be read.
    #[error("superblock: {0}")]
    Disk(DiskError),
    /// No copy carries the magic number: not a disk of Weft's.
    #[error("no Weft superblock at offsets 0 and 65536: not formatted")]
    NotFormatted,
    /// There was one, and both copies are bad.
    #[error("both superblocks are damaged (at 0: {first}; at 65536: {second})")]
    BothDamaged {
        /// What is wrong with the copy at 0.
        first: &'static str,
        /// What is wrong with the copy at 64 KiB.
        second: &'static str,
    },
    /// Written by a newer Weft.
    #[error("superblock version {found}, this program reads up to {known}")]
    Version {
        /// On the disk.
        found: u16,
        /// The newest this program knows.
        known: u16,
    },
    /// The device is smaller than it was when it was formatted.
    #[error("the disk has {have} B, its superblock needs {need} B")]
    Shrunk {
        /// Bytes there are.
        have: u64,
        /// Bytes there were.
        need: u64,
    },
}

/// One copy, judged.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Copy {
    Good(Superblock),
    Foreign,
    Newer(u16),
    Bad(&'static str),
}

impl Superblock {
    pub(crate) fn encode(&self) -> Box<AlignedBlock> {
        let mut block = AlignedBlock::zeroed();
        let mut out = Writer::new(&mut block.0);
        out.u64(MAGIC);
        out.u16(self.version);
        out.u16(0);
        out.u32(0); // crc, below
        out.u128(self.disk.0);
        out.u128(self.pool.0);
        out.u64(self.capacity);
        out.u64(self.segment_bytes);
        out.u64(self.first_segment);
        out.u32(self.segments);
        out.u32(0);
        out.u64(self.generation);
        out.u64(self.open_count);
        out.u64(self.secret_base);
        out.u64(self.checkpoint);
        out.u64(self.doubt);
        let crc = crc_without(&block.0, CRC_AT);
        block.0[CRC_AT..CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
        block
    }

    pub(crate) fn decode(bytes: &[u8]) -> Copy {
        Superblock::parse(bytes).unwrap_or(Copy::Bad("too short"))
    }

    fn parse(bytes: &[u8]) -> Option<Copy> {
        let mut fields = Reader::new(bytes);
        if fields.u64()? != MAGIC {
            return Some(Copy::Foreign);
        }
        let version = fields.u16()?;
        fields.u16()?;
        let crc = fields.u32()?;
        if crc != crc_without(bytes, CRC_AT) {
            return Some(Copy::Bad("checksum"));
        }
        if !(1..=FORMAT_VERSION).contains(&version) {
            return Some(Copy::Newer(version));
        }
        let disk = DiskId(fields.u128()?);
        let pool = PoolId(fields.u128()?);
        let capacity = fields.u64()?;
        let segment_bytes = fields.u64()?;
        let first_segment = fields.u64()?;
        let segments = fields.u32()?;
        fields.u32()?;
        let superblock = Superblock {
            version,
            disk,
            pool,
            capacity,
            segment_bytes,
            first_segment,
            segments,
            generation: fields.u64()?,
            open_count: fields.u64()?,
            secret_base: fields.u64()?,
            checkpoint: fields.u64()?,
            doubt: fields.u64()?,
        };
        Some(if superblock.is_plausible() {
            Copy::Good(superblock)
        } else {
            Copy::Bad("impossible geometry")
        })
    }

    fn is_plausible(&self) -> bool {
        let end = u64::from(self.segments)
            .checked_mul(self.segment_bytes)
            .and_then(|bytes| bytes.checked_add(self.first_segment));
        self.segment_bytes.is_multiple_of(BLOCK_BYTES)
            && (SEGMENT_BYTES_MIN..=SEGMENT_BYTES_MAX).contains(&self.segment_bytes)
            && self.first_segment.is_multiple_of(BLOCK_BYTES)
            && self.first_segment > SUPERBLOCK_OFFSETS[1]
            && u64::from(self.segments) >= SEGMENTS_MIN
            && end.is_some_and(|end| end <= self.capacity && end < 1 << 60)
    }

    pub(crate) fn segment_blocks(&self) -> u32 {
        (self.segment_bytes / BLOCK_BYTES) as u32
    }

    /// Writes both copies, never both at once: a crash leaves at least one good. The copy not at
    /// `generation % 2` is the older one and goes first.
    pub(crate) fn write(&self, disk: &mut dyn BlockFile) -> Result<(), DiskError> {
        let block = self.encode();
        let first = (self.generation % 2) as usize;
        for copy in [first, 1 - first] {
            disk.write_at(SUPERBLOCK_OFFSETS[copy], &block.0)?;
            disk.sync()?;
        }
        Ok(())
    }
}

/// One copy, if it is good.
pub(crate) fn read_copy(disk: &dyn BlockFile, offset: u64) -> Option<Superblock> {
    let mut block = AlignedBlock::zeroed();
    disk.read_at(offset, &mut block.0).ok()?;
    match Superblock::decode(&block.0) {
        Copy::Good(superblock) => Some(superblock),
        _ => None,
    }
}

/// The newest good copy.
///
/// # Errors
/// See [`SuperblockError`].
pub fn read_superblock(disk: &dyn BlockFile) -> Result<Superblock, SuperblockError> {
    let mut copies = [Copy::Foreign, Copy::Foreign];
    let mut failed = None;
    for (copy, offset) in copies.iter_mut().zip(SUPERBLOCK_OFFSETS) {
        let mut block = AlignedBlock::zeroed();
        *copy = if offset + BLOCK_BYTES > disk.bytes() {
            Copy::Foreign
        } else {
            match disk.read_at(offset, &mut block.0) {
                Ok(()) => Superblock::decode(&block.0),
                Err(error) => {
                    failed = Some(error);
                    Copy::Bad("unreadable")
                }
            }
        };
    }
    let newest = copies
        .iter()
        .filter_map(|copy| match copy {
            Copy::Good(superblock) => Some(*superblock),
            _ => None,
        })
        .max_by_key(|superblock| superblock.generation);
    if let Some(superblock) = newest {
        let have = disk.bytes();
        return if have < superblock.capacity {
            Err(SuperblockError::Shrunk {
                have,
                need: superblock.capacity,
            })
        } else {
            Ok(superblock)
        };
    }
    match (&copies[0], &copies[1]) {
        (Copy::Newer(found), _) | (_, Copy::Newer(found)) => Err(SuperblockError::Version {
            found: *found,
            known: FORMAT_VERSION,
        }),
        (Copy::Foreign, Copy::Foreign) => Err(SuperblockError::NotFormatted),
        (Copy::Bad("unreadable"), Copy::Bad("unreadable")) => Err(SuperblockError::Disk(
            failed.expect("an unreadable copy has its error"),
        )),
        (first, second) => Err(SuperblockError::BothDamaged {
            first: first.fault(),
            second: second.fault(),
        }),
    }
}

impl Copy {
    fn fault(&self) -> &'static str {
        match self {
            Copy::Bad(fault) => fault,
            _ => "no magic number",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(crate) fn example() -> Superblock {
        Superblock {
            version: FORMAT_VERSION,
            disk: DiskId(7),
            pool: PoolId(8),
            capacity: 5 << 40,
            segment_bytes: SEGMENT_BYTES_DEFAULT,
            first_segment: FIRST_SEGMENT_OFFSET,
            segments: 1000,
            generation: 3,
            open_count: 9,
            secret_base: 0x1234,
            checkpoint: 77,
            doubt: 78,
        }
    }

    #[test]
    fn round_trip_and_every_flipped_bit_is_noticed() {
        let superblock = example();
        let mut block = superblock.encode();
        assert_eq!(Superblock::decode(&block.0), Copy::Good(superblock));
        for bit in (0..200 * 8).chain([4095 * 8 + 7]) {
            block.0[bit / 8] ^= 1 << (bit % 8);
            assert!(
                !matches!(Superblock::decode(&block.0), Copy::Good(_)),
                "bit {bit}"
            );
            block.0[bit / 8] ^= 1 << (bit % 8);
        }
    }

    #[test]
    fn earlier_versions_are_read_and_later_ones_have_a_name() {
        for version in 0..5 {
            let superblock = Superblock { version, ..example() };
            let wanted = match version {
                1..=3 => Copy::Good(superblock),
                other => Copy::Newer(other),
            };
            assert_eq!(Superblock::decode(&superblock.encode().0), wanted);
        }
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_safe(bytes: Vec<u8>) {
            let _ = Superblock::decode(&bytes);
        }
    }
}
