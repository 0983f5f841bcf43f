//! Parts of blocks: bytes out of whole blocks for reads, bytes into a block for writes.

use smallvec::SmallVec;
use store::{ReadPart as BlockPart, ReadParts as BlockParts};
use types::{BLOCK_BYTES, BlockCrcs, Payload, crc32c};

use crate::split::{Blocks, Edge, Span};
use crate::{ReadPart, ReadParts};

const BLOCK: usize = BLOCK_BYTES as usize;

/// The content of one block that was read for an edge, with the edge's bytes replaced: by those of `data` at the
/// edge's place in it, or by zeros.
pub(crate) fn patch<B: Payload>(read: &[BlockPart<B>], edge: Edge, data: Option<&B>) -> B {
    let patch = match data {
        Some(data) => data.slice(edge.at, edge.length),
        None => B::zeroed(edge.length),
    };
    match read {
        [BlockPart::Data(block)] => {
            assert_eq!(block.length(), BLOCK, "one block was asked for");
            block.overlay(edge.start, &patch)
        }
        [BlockPart::Zeros(1)] => B::zeroed(BLOCK).overlay(edge.start, &patch),
        other => panic!("one block was asked for, {} parts came: {other:?}", other.len()),
    }
}

/// crc32c of each block of `data`.
pub(crate) fn crcs<B: Payload>(data: &B) -> BlockCrcs {
    let bytes = data.bytes();
    assert!(bytes.len().is_multiple_of(BLOCK), "{} bytes", bytes.len());
    bytes.chunks_exact(BLOCK).map(crc32c).collect()
}

/// The bytes of `span` out of the content of all blocks it touches, in order.
pub(crate) fn clip<B: Payload>(
    pieces: SmallVec<[BlockParts<B>; 1]>,
    touched: Blocks,
    span: Span,
) -> ReadParts<B> {
    let mut parts = ReadParts::with_capacity(pieces.iter().map(SmallVec::len).sum());
    let mut at = touched.first * BLOCK_BYTES;
    for part in pieces.into_iter().flatten() {
        let length = match &part {
            BlockPart::Data(data) => data.length() as u64,
            BlockPart::Zeros(blocks) => u64::from(*blocks) * BLOCK_BYTES,
        };
        let from = at.max(span.offset);
        let to = (at + length).min(span.end());
        assert!(from < to, "a part at {at}+{length} beside {span:?}");
        match part {
            BlockPart::Data(data) if to - from == length => parts.push(ReadPart::Data(data)),
            BlockPart::Data(data) => {
                let data = data.slice((from - at) as usize, (to - from) as usize);
                parts.push(ReadPart::Data(data));
            }
            BlockPart::Zeros(_) => match parts.last_mut() {
                Some(ReadPart::Zeros(zeros)) => *zeros += to - from,
                _ => parts.push(ReadPart::Zeros(to - from)),
            },
        }
        at += length;
    }
    assert_eq!(at, touched.end * BLOCK_BYTES, "the parts add up to {touched:?}");
    parts
}

#[cfg(test)]
mod tests {
    use super::*;
    use types::HeapBlock;

    fn flat(parts: &[ReadPart<HeapBlock>]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for part in parts {
            match part {
                ReadPart::Data(data) => bytes.extend_from_slice(data.bytes()),
                ReadPart::Zeros(count) => bytes.resize(bytes.len() + *count as usize, 0),
            }
        }
        bytes
    }

    #[test]
    fn clips_both_ends_and_joins_zeros() {
        let content: Vec<u8> = (0..2 * BLOCK).map(|i| (i / 512) as u8 + 1).collect();
        let pieces = || -> SmallVec<[BlockParts<HeapBlock>; 1]> {
            SmallVec::from_vec(vec![
                BlockParts::from_vec(vec![
                    BlockPart::Data(HeapBlock::new(&content)),
                    BlockPart::Zeros(1),
                ]),
                BlockParts::from_vec(vec![BlockPart::Zeros(2)]),
            ])
        };
        let touched = Blocks { first: 10, end: 15 };
        let mut all = content.clone();
        all.resize(5 * BLOCK, 0);
        for (skip, drop) in [(0, 0), (512, 0), (0, 512), (3584, 3584)] {
            let span = Span {
                offset: 10 * BLOCK_BYTES + skip,
                length: 5 * BLOCK_BYTES - skip - drop,
            };
            let parts = clip(pieces(), touched, span);
            assert_eq!(parts.len(), 2);
            assert_eq!(flat(&parts), all[skip as usize..all.len() - drop as usize]);
        }
    }

    #[test]
    fn patches_what_was_read() {
        let edge = Edge {
            block: 3,
            start: 512,
            length: 1024,
            at: 4096,
        };
        let data = HeapBlock::new(&[7; 8192]);
        let old = HeapBlock::new(&[1; BLOCK]);
        let new = patch(&[BlockPart::Data(old.clone())], edge, Some(&data));
        assert_eq!(new.bytes()[511..514], [1, 7, 7]);
        assert_eq!(new.bytes()[1535..1537], [7, 1]);
        let new = patch(&[BlockPart::Data(old)], edge, None);
        assert_eq!(new.bytes()[1535..1537], [0, 1]);
        let new = patch(&[BlockPart::Zeros(1)], edge, Some(&data));
        assert_eq!((new.length(), new.bytes()[0], new.bytes()[512]), (BLOCK, 0, 7));
        assert_eq!(crcs(&new)[..], [crc32c(new.bytes())]);
    }
}
