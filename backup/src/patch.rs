//! Patches: the blocks in which a chunk differs from one that is stored already.
//!
//! A guest that changes one block in a hundred, anywhere, touches nearly every chunk. To read and send all of them
//! would cost ninety times what has changed. So a chunk that changed little is stored as the chunk of an earlier
//! backup and a patch. A patch is always against a whole chunk, never against another patch: to read a chunk takes two
//! objects at most, however long the chain of incremental backups is. When a patch would replace more than a quarter
//! of the chunk, the chunk is read and stored whole.

use crate::error::Damage;
use crate::{BLOCK_BYTES, CHUNK_BLOCKS};

/// Bytes of the map of blocks that a patch begins with.
const MAP_BYTES: usize = CHUNK_BLOCKS / 8;

/// A patch of more blocks is not worth it.
pub const BLOCKS_MAX: usize = CHUNK_BLOCKS / 4;

/// Blocks of a chunk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockSet([u64; CHUNK_BLOCKS / 64]);

impl BlockSet {
    /// All blocks that a chunk of this length has.
    #[must_use]
    pub fn all(chunk_bytes: usize) -> BlockSet {
        let mut all = BlockSet::default();
        (0..chunk_bytes.div_ceil(BLOCK_BYTES)).for_each(|block| all.insert(block));
        all
    }

    /// Adds a block.
    ///
    /// # Panics
    /// When a chunk has no such block.
    pub fn insert(&mut self, block: usize) {
        self.0[block / 64] |= 1 << (block % 64);
    }

    /// Whether the block is in it.
    #[must_use]
    pub fn contains(&self, block: usize) -> bool {
        self.0[block / 64] >> (block % 64) & 1 == 1
    }

    /// How many.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == BlockSet::default()
    }

    /// Those of either.
    #[must_use]
    pub fn union(&self, other: &BlockSet) -> BlockSet {
        BlockSet(std::array::from_fn(|word| self.0[word] | other.0[word]))
    }

    /// Those that the other has not.
    #[must_use]
    pub fn without(&self, other: &BlockSet) -> BlockSet {
        BlockSet(std::array::from_fn(|word| self.0[word] & !other.0[word]))
    }

    /// Ascending.
    pub fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        (0..CHUNK_BLOCKS).filter(|block| self.contains(*block))
    }

    /// Runs of blocks that follow each other, over gaps of at most so many blocks, as ranges of bytes in the chunk.
    #[must_use]
    pub fn runs(&self, gap_max: usize, chunk_bytes: usize) -> Vec<std::ops::Range<usize>> {
        let mut runs: Vec<std::ops::Range<usize>> = Vec::new();
        for block in self.iter() {
            let (start, end) = (block * BLOCK_BYTES, ((block + 1) * BLOCK_BYTES).min(chunk_bytes));
            match runs.last_mut() {
                Some(run) if start - run.end <= gap_max * BLOCK_BYTES => run.end = end,
                _ => runs.push(start..end),
            }
        }
        runs
    }
}

/// Bytes of a block: all have [`BLOCK_BYTES`] but the last of a disk.
fn block_range(block: usize, chunk_bytes: usize) -> std::ops::Range<usize> {
    block * BLOCK_BYTES..((block + 1) * BLOCK_BYTES).min(chunk_bytes)
}

/// The patch that takes these blocks from a chunk's content.
#[must_use]
pub fn encode(blocks: &BlockSet, chunk: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(MAP_BYTES + blocks.len() * BLOCK_BYTES);
    out.extend(blocks.0.iter().flat_map(|word| word.to_le_bytes()));
    for block in blocks.iter() {
        out.extend(&chunk[block_range(block, chunk.len())]);
    }
    out
}

/// A patch that was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Patch {
    /// The blocks it replaces.
    pub blocks: BlockSet,
    data: Vec<u8>,
}

impl Patch {
    /// Of a chunk of this length.
    ///
    /// # Errors
    /// When the blocks are not those of such a chunk.
    pub fn decode(bytes: &[u8], chunk_bytes: usize) -> Result<Patch, Damage> {
        let (map, data) = bytes.split_at_checked(MAP_BYTES).ok_or(Damage::Short {
            have: bytes.len(),
            wanted: MAP_BYTES,
        })?;
        let word = |at: usize| u64::from_le_bytes(map[at * 8..][..8].try_into().expect("eight bytes"));
        let blocks = BlockSet(std::array::from_fn(word));
        if !blocks.without(&BlockSet::all(chunk_bytes)).is_empty() {
            return Err(Damage::Content(
                "the patch replaces blocks that the chunk has not",
            ));
        }
        let wanted: usize = blocks
            .iter()
            .map(|block| block_range(block, chunk_bytes).len())
            .sum();
        if data.len() != wanted {
            return Err(Damage::Short {
                have: bytes.len(),
                wanted: MAP_BYTES + wanted,
            });
        }
        Ok(Patch {
            blocks,
            data: data.to_vec(),
        })
    }

    /// Puts its blocks into a chunk.
    pub fn apply(&self, chunk: &mut [u8]) {
        let mut data = &self.data[..];
        for block in self.blocks.iter() {
            let range = block_range(block, chunk.len());
            let target = &mut chunk[range];
            let (head, rest) = data.split_at(target.len());
            target.copy_from_slice(head);
            data = rest;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn set(blocks: impl IntoIterator<Item = usize>) -> BlockSet {
        let mut set = BlockSet::default();
        blocks.into_iter().for_each(|block| set.insert(block));
        set
    }

    proptest! {
        #[test]
        fn a_patch_brings_the_blocks_it_took(
            places in prop::collection::btree_set(0..CHUNK_BLOCKS, 0..20),
            chunk_bytes in 1..=crate::CHUNK_BYTES as usize,
        ) {
            let blocks = set(places.into_iter().filter(|block| block * BLOCK_BYTES < chunk_bytes));
            let new: Vec<u8> = (0..chunk_bytes).map(|at| (at % 251) as u8).collect();
            let patch = Patch::decode(&encode(&blocks, &new), chunk_bytes).unwrap();
            prop_assert_eq!(patch.blocks, blocks);
            let mut old = vec![255; chunk_bytes];
            patch.apply(&mut old);
            for block in 0..chunk_bytes.div_ceil(BLOCK_BYTES) {
                let range = block_range(block, chunk_bytes);
                let expected = if blocks.contains(block) { new[range.clone()].to_vec() } else { vec![255; range.len()] };
                prop_assert_eq!(&old[range], &expected[..]);
            }
        }

        #[test]
        fn arbitrary_bytes_do_no_harm(
            bytes in prop::collection::vec(any::<u8>(), 0..9000),
            chunk_bytes in 1..=crate::CHUNK_BYTES as usize,
        ) {
            if let Ok(patch) = Patch::decode(&bytes, chunk_bytes) {
                patch.apply(&mut vec![0; chunk_bytes]);
            }
        }
    }

    #[test]
    fn runs_go_over_small_gaps() {
        let blocks = set([0, 1, 3, 9, 255]);
        let in_blocks = |gap, bytes| {
            let runs = blocks.runs(gap, bytes);
            runs.iter()
                .map(|r| (r.start / BLOCK_BYTES, r.end))
                .collect::<Vec<_>>()
        };
        let whole = crate::CHUNK_BYTES as usize;
        assert_eq!(
            in_blocks(0, whole),
            [(0, 8192), (3, 16384), (9, 40960), (255, whole)]
        );
        assert_eq!(
            in_blocks(1, whole - 512),
            [(0, 16384), (9, 40960), (255, whole - 512)]
        );
    }

    #[test]
    fn blocks_outside_the_chunk_are_refused() {
        let short = encode(&set([1]), &[7; 2 * BLOCK_BYTES]);
        assert!(Patch::decode(&short, 2 * BLOCK_BYTES).is_ok());
        assert!(Patch::decode(&short, BLOCK_BYTES).is_err());
        assert!(
            Patch::decode(&short, 2 * BLOCK_BYTES - 512).is_err(),
            "its last block is shorter"
        );
        assert!(Patch::decode(&short[..short.len() - 1], 2 * BLOCK_BYTES).is_err());
    }
}
