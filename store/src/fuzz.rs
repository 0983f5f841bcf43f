//! The readers of what lies on a disk, over arbitrary bytes: entrances for `cargo xtask fuzz` and for the tests that
//! replay its corpus. Whatever the bytes are: no panic, and what is accepted is written again as it was read.
//!
//! A checksum would keep nearly all inputs out, and an attacker computes it as well as we do: every input is tried
//! as it is, and once more signed.

use edge::{AlignedBlock, BlockFile, DiskError};
use types::{BLOCK_BYTES, LayerId, LeafNo, ShardNo, VdiId};

use crate::LeafKey;
use crate::batch::{BATCH_BLOCKS_MAX, Header, SegmentKey};
use crate::bytes::crc_without;
use crate::leaf::{self, ENCODED_MAX, Leaf};
use crate::ledger::Shard;
use crate::meta::Meta;
use crate::segment::{Geometry, SegmentHeader};
use crate::superblock::{Copy, SUPERBLOCK_OFFSETS, Superblock, read_superblock};

const BLOCK: usize = BLOCK_BYTES as usize;

/// A block that begins with `input`, as much as there is room for.
fn block_of(input: &[u8]) -> Box<AlignedBlock> {
    let mut block = AlignedBlock::zeroed();
    let length = input.len().min(BLOCK);
    block.0[..length].copy_from_slice(&input[..length]);
    block
}

fn sign_block(block: &mut AlignedBlock, crc_at: usize) {
    let crc = crc_without(&block.0, crc_at);
    block.0[crc_at..crc_at + 4].copy_from_slice(&crc.to_le_bytes());
}

fn number(block: &AlignedBlock, at: usize) -> u64 {
    u64::from_le_bytes(block.0[at..at + 8].try_into().expect("eight bytes"))
}

/// A batch's header, for the segment that it says it belongs to.
pub fn batch_header(input: &[u8]) {
    const CRC_AT: usize = 8;
    let mut block = block_of(input);
    let key = SegmentKey {
        secret: number(&block, 24),
        generation: number(&block, 32),
    };
    let _ = Header::decode(&block.0, key);
    sign_block(&mut block, CRC_AT);
    let Some(header) = Header::decode(&block.0, key) else {
        return;
    };
    let stranger = SegmentKey {
        secret: !key.secret,
        ..key
    };
    assert_eq!(
        Header::decode(&block.0, stranger),
        None,
        "another segment's header"
    );
    assert!(header.sums.len() <= BATCH_BLOCKS_MAX);
    assert_eq!(header.blocks() as usize, header.sums.len() + 1);
    let inline: usize = header.walk().map(|(_, _, bytes)| bytes.len()).sum();
    assert_eq!(inline, header.inline.len());
    for (entry, first_sum, _) in header.walk() {
        let sums = first_sum + entry.data_blocks();
        assert!(sums <= header.sums.len(), "sums of {entry:?}");
        if entry.data_blocks() > 0 {
            let _ = entry.sum_key(entry.count - 1);
        }
    }
    assert!(header.sums.is_empty() || !header.data_is_whole(&[]));
    let _ = header.data_is_whole(&vec![0; header.sums.len() * BLOCK]);
    let again = header.encode();
    assert_eq!(Header::decode(&again.0, key), Some(header));
}

/// The first block of a segment.
pub fn segment_header(input: &[u8]) {
    const CRC_AT: usize = 12;
    let mut block = block_of(input);
    let _ = SegmentHeader::decode(&block.0);
    let _ = SegmentHeader::decode(input);
    sign_block(&mut block, CRC_AT);
    if let Some(header) = SegmentHeader::decode(&block.0) {
        assert_eq!(SegmentHeader::decode(&header.encode().0), Some(header));
    }
}

/// A disk that holds nothing but two superblocks, half of the input each.
struct TwoCopies {
    copies: [Box<AlignedBlock>; 2],
    bytes: u64,
}

impl BlockFile for TwoCopies {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DiskError> {
        let copy = SUPERBLOCK_OFFSETS.iter().position(|at| *at == offset);
        buffer.copy_from_slice(&self.copies[copy.expect("only superblocks are read")].0);
        Ok(())
    }

    fn write_at(&mut self, _: u64, _: &[u8]) -> Result<(), DiskError> {
        unreachable!("a reader does not write")
    }

    fn sync(&mut self) -> Result<(), DiskError> {
        unreachable!("a reader does not write")
    }
}

/// Both superblocks of a disk; the first byte says which of them are signed and how big the disk is.
pub fn superblock(input: &[u8]) {
    const CRC_AT: usize = 12;
    let _ = Superblock::decode(input);
    let Some((control, content)) = input.split_first() else {
        return;
    };
    let (first, second) = content.split_at(content.len() / 2);
    let mut disk = TwoCopies {
        copies: [block_of(first), block_of(second)],
        bytes: 1 << (control >> 2),
    };
    for (index, copy) in disk.copies.iter_mut().enumerate() {
        if control & 1 << index != 0 {
            sign_block(copy, CRC_AT);
        }
        if let Copy::Good(superblock) = Superblock::decode(&copy.0) {
            assert_eq!(Superblock::decode(&superblock.encode().0), Copy::Good(superblock));
        }
    }
    if let Ok(superblock) = read_superblock(&disk) {
        assert!(superblock.capacity <= disk.bytes);
        let geometry = Geometry::of(&superblock);
        let last = geometry.start(geometry.segments - 1);
        assert!((last + u64::from(geometry.segment_blocks)) * BLOCK_BYTES <= disk.bytes);
        assert_eq!(geometry.find(last), Some(geometry.segments - 1));
    }
}

/// A value of the index: the first byte says of which kind of key.
pub fn index_value(input: &[u8]) {
    let Some((kind, content)) = input.split_first() else {
        return;
    };
    let key = LeafKey {
        shard: types::ShardId {
            vdi: VdiId(1),
            no: ShardNo(2),
        },
        layer: LayerId(3),
        leaf: LeafNo(4),
    };
    let _ = (
        Leaf::decode(key, content),
        Shard::decode(content),
        Meta::decode(content),
    );
    let sum = match kind % 3 {
        0 => leaf::sign(key, content),
        _ => crc32c::crc32c(content),
    };
    let signed = [content, &sum.to_le_bytes()[..]].concat();
    match kind % 3 {
        0 => {
            if let Some(leaf) = Leaf::decode(key, &signed) {
                let again = Leaf::decode(key, &leaf.encode(key, &mut [0; ENCODED_MAX]));
                assert!(
                    again.is_some_and(|again| again == leaf),
                    "a leaf is not what it was"
                );
            }
        }
        1 => {
            if let Some(shard) = Shard::decode(&signed) {
                assert_eq!(Shard::decode(&shard.encode()), Some(shard));
            }
        }
        _ => {
            if let Some(meta) = Meta::decode(&signed) {
                assert_eq!(Meta::decode(&meta.encode()), Some(meta));
            }
        }
    }
}
