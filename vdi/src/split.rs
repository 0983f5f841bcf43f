//! Byte arithmetic: from a guest's byte range to blocks, edges and pieces of shards.
//!
//! ```text
//!  span            ....[=====|===========|===========|==]......      bytes, multiples of the sector
//!  touched         |   first | whole     | whole     | last  |       blocks with a byte of the span
//!  edges               ^^^^^                          ^^             parts of blocks: read-modify-write
//!  pieces                    [---- at most N blocks, one shard --]   what a writer is asked
//! ```

use smallvec::SmallVec;
use types::{BLOCK_BYTES, BlockNo, ShardNo};

use crate::{VdiError, VdiSpec};

/// Longest read or write, bytes: bounds the memory that one request of a guest can pin.
pub const REQUEST_BYTES_MAX: u64 = 32 << 20;

/// A range of bytes of the VDI; checked, so that its end does not overflow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    pub offset: u64,
    pub length: u64,
}

/// Blocks counted over the whole VDI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Blocks {
    pub first: u64,
    /// One past the last.
    pub end: u64,
}

/// The part of one block that a span covers without covering the block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Edge {
    /// Which block of the VDI.
    pub block: u64,
    /// First byte within the block.
    pub start: usize,
    /// How many bytes of the block.
    pub length: usize,
    /// Where those bytes are in the span.
    pub at: usize,
}

/// A run of blocks within one shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub shard: ShardNo,
    pub block: BlockNo,
    pub count: u32,
}

/// The one place where a guest's numbers become a [`Span`].
pub(crate) fn check(offset: u64, length: u64, length_max: u64, spec: &VdiSpec) -> Result<Span, VdiError> {
    let sector = u64::from(spec.sector_bytes);
    if !offset.is_multiple_of(sector) || !length.is_multiple_of(sector) {
        return Err(VdiError::Misaligned {
            offset,
            length,
            sector: spec.sector_bytes,
        });
    }
    let is_inside = offset.checked_add(length).is_some_and(|end| end <= spec.bytes);
    if !is_inside || length > length_max {
        return Err(VdiError::OutOfRange {
            offset,
            length,
            size: spec.bytes,
        });
    }
    Ok(Span { offset, length })
}

impl Span {
    pub fn end(self) -> u64 {
        self.offset + self.length
    }

    /// Every block with a byte of the span.
    pub fn touched(self) -> Blocks {
        if self.length == 0 {
            return Blocks { first: 0, end: 0 };
        }
        Blocks {
            first: self.offset / BLOCK_BYTES,
            end: self.end().div_ceil(BLOCK_BYTES),
        }
    }

    /// The blocks that the span covers whole. The last block of a disk whose size is no multiple of a block counts
    /// as whole when the span reaches `disk_bytes`: what lies behind the end is zeros and nobody's.
    pub fn whole(self, disk_bytes: u64) -> Blocks {
        let first = self.offset.div_ceil(BLOCK_BYTES);
        let end = if self.end() == disk_bytes {
            self.end().div_ceil(BLOCK_BYTES)
        } else {
            self.end() / BLOCK_BYTES
        };
        Blocks {
            first,
            end: end.max(first),
        }
    }

    /// Parts of blocks that are touched and not among `whole`: at most the first and the last block.
    pub fn edges(self, whole: Blocks) -> SmallVec<[Edge; 2]> {
        let touched = self.touched();
        let mut edges = SmallVec::new();
        if touched.is_empty() {
            return edges;
        }
        let last = touched.end - 1;
        for block in [touched.first, last] {
            let is_again = block == last && edges.last().is_some_and(|e: &Edge| e.block == block);
            if whole.contains(block) || is_again {
                continue;
            }
            let from = self.offset.max(block * BLOCK_BYTES);
            let to = self.end().min((block + 1) * BLOCK_BYTES);
            edges.push(Edge {
                block,
                start: (from - block * BLOCK_BYTES) as usize,
                length: (to - from) as usize,
                at: (from - self.offset) as usize,
            });
        }
        edges
    }
}

impl Blocks {
    pub fn is_empty(self) -> bool {
        self.first >= self.end
    }

    pub fn contains(self, block: u64) -> bool {
        (self.first..self.end).contains(&block)
    }
}

/// Where a block of the VDI lives.
pub(crate) fn locate(block: u64, shard_blocks: u32) -> (ShardNo, BlockNo) {
    let shard = block / u64::from(shard_blocks);
    let within = block % u64::from(shard_blocks);
    (
        ShardNo(u32::try_from(shard).expect("a block inside the VDI")),
        BlockNo(within as u32),
    )
}

/// Number in the VDI of a block of a shard.
pub(crate) fn global(shard: ShardNo, block: BlockNo, shard_blocks: u32) -> u64 {
    u64::from(shard.0) * u64::from(shard_blocks) + u64::from(block.0)
}

/// Cuts blocks into pieces, in order; each within one shard and no longer than the piece size.
#[derive(Clone, Debug)]
pub(crate) struct Cut {
    left: Blocks,
    shard_blocks: u32,
    piece_blocks: u32,
}

impl Cut {
    pub fn new(blocks: Blocks, shard_blocks: u32, piece_blocks: u32) -> Cut {
        assert!(shard_blocks > 0 && piece_blocks > 0);
        Cut {
            left: blocks,
            shard_blocks,
            piece_blocks,
        }
    }

    pub fn empty() -> Cut {
        Cut::new(Blocks { first: 0, end: 0 }, 1, 1)
    }
}

impl Iterator for Cut {
    type Item = Piece;

    fn next(&mut self) -> Option<Piece> {
        if self.left.is_empty() {
            return None;
        }
        let (shard, block) = locate(self.left.first, self.shard_blocks);
        let in_shard = self.shard_blocks - block.0;
        let most = u64::from(in_shard.min(self.piece_blocks));
        let count = most.min(self.left.end - self.left.first);
        self.left.first += count;
        Some(Piece {
            shard,
            block,
            count: count as u32,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use types::{LayerId, Lineage, VdiId};

    fn spec(bytes: u64) -> VdiSpec {
        VdiSpec {
            id: VdiId(1),
            bytes,
            sector_bytes: 512,
            shard_bytes: 1 << 20,
            lineage: Lineage::of_layer(VdiId(1), LayerId(1)),
            sharing: replication::Sharing::Alone,
        }
    }

    #[test]
    fn guests_may_send_anything() {
        let spec = spec(10_240);
        for (offset, length, is_ok) in [
            (0, 0, true),
            (0, 10_240, true),
            (10_240, 0, true),
            (10_240, 512, false),
            (512, 10_240, false),
            (u64::MAX - 511, 512, false),
            (u64::MAX - 511, u64::MAX - 511, false),
            (1, 512, false),
            (0, 511, false),
            (0, u64::MAX, false),
        ] {
            assert_eq!(
                check(offset, length, REQUEST_BYTES_MAX, &spec).is_ok(),
                is_ok,
                "{offset}+{length}"
            );
        }
        assert!(matches!(
            check(0, 10_240, 4096, &spec),
            Err(VdiError::OutOfRange { .. })
        ));
    }

    #[test]
    fn the_tail_of_an_odd_disk_is_whole_for_those_who_reach_it() {
        let tail = Span {
            offset: 8192,
            length: 1024,
        };
        assert_eq!(tail.whole(9216), Blocks { first: 2, end: 3 });
        assert!(tail.edges(tail.whole(9216)).is_empty());
        assert!(tail.whole(u64::MAX).is_empty());
        assert_eq!(tail.edges(tail.whole(u64::MAX)).len(), 1);
    }

    proptest! {
        /// Whole blocks and edges name every byte of the span once, and pieces every whole block once.
        #[test]
        fn every_byte_has_one_place(sector in 0u64..6000, sectors in 0u64..6000, shard_leaves in 1u32..4, piece in 1u32..300) {
            let span = Span { offset: sector * 512, length: sectors * 512 };
            let shard_blocks = shard_leaves * 256;
            let whole = span.whole(u64::MAX);
            let mut bytes: Vec<(u64, u64)> = Vec::new();
            for edge in span.edges(whole) {
                prop_assert_eq!(edge.block * 4096 + edge.start as u64, span.offset + edge.at as u64);
                prop_assert!(edge.length < 4096);
                bytes.push((span.offset + edge.at as u64, edge.length as u64));
            }
            for piece_ in Cut::new(whole, shard_blocks, piece) {
                prop_assert!(piece_.count >= 1 && piece_.count <= piece);
                prop_assert!(piece_.block.0 + piece_.count <= shard_blocks);
                let block = global(piece_.shard, piece_.block, shard_blocks);
                bytes.push((block * 4096, u64::from(piece_.count) * 4096));
            }
            bytes.sort_unstable();
            let mut at = span.offset;
            for (start, length) in bytes {
                prop_assert_eq!(start, at);
                at += length;
            }
            prop_assert_eq!(at, span.end());
        }
    }
}
