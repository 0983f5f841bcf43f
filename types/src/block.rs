//! Blocks, leaves and shards: the arithmetic of where a byte of a VDI lives.

use std::fmt;

/// Bytes in a block: the unit of checksums, of the log and of replication.
pub const BLOCK_BYTES: u64 = 4096;

/// Blocks that one index leaf covers (1 MiB): the unit of caching, resync, scrub, diff and backup.
pub const LEAF_BLOCKS: u32 = 256;

/// Bytes of a VDI that one shard covers unless the VDI says otherwise.
pub const SHARD_BYTES_DEFAULT: u64 = 1 << 30;

/// The most blocks a shard may have (64 GiB), so that a block number fits its 32 bits with room to spare.
pub const SHARD_BLOCKS_MAX: u32 = 1 << 24;

/// Number of a block within its shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockNo(pub u32);

impl BlockNo {
    /// The leaf that holds this block's index entry.
    #[must_use]
    pub fn leaf(self) -> LeafNo {
        LeafNo(self.0 / LEAF_BLOCKS)
    }

    /// Position of this block's entry in its leaf, below [`LEAF_BLOCKS`].
    #[must_use]
    pub fn slot(self) -> usize {
        (self.0 % LEAF_BLOCKS) as usize
    }

    /// The block `count` further on. Panics past the end of what a shard can hold: a caller's mistake.
    #[must_use]
    pub fn plus(self, count: u32) -> BlockNo {
        BlockNo(self.0.checked_add(count).expect("block number within a shard"))
    }
}

impl fmt::Display for BlockNo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Number of a leaf within its shard (and layer).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeafNo(pub u32);

impl LeafNo {
    /// The first block the leaf covers.
    #[must_use]
    pub fn first_block(self) -> BlockNo {
        BlockNo(
            self.0
                .checked_mul(LEAF_BLOCKS)
                .expect("leaf number within a shard"),
        )
    }
}

/// Whether `bytes` is a whole number of blocks.
#[must_use]
pub fn is_block_aligned(bytes: u64) -> bool {
    bytes.is_multiple_of(BLOCK_BYTES)
}

/// Blocks needed to hold `bytes`.
#[must_use]
pub fn block_count(bytes: u64) -> u64 {
    bytes.div_ceil(BLOCK_BYTES)
}
