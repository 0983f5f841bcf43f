//! What a backup has to do for each chunk, from what its source says of it and what its parent has. Pure.
//!
//! ```text
//!  extents of the source ──▶ Touched, a chunk each ──┐
//!  entry of the parent's page ───────────────────────┴─▶ Action: keep | zeros | read | patch
//! ```

use crate::object::ObjectRef;
use crate::page::Entry;
use crate::patch::{self, BlockSet};
use crate::source::{Extent, What};
use crate::sweep::Suspects;
use crate::{BLOCK_BYTES, CHUNK_BYTES, PAGE_BYTES, chunk_bytes, chunks_of, page_chunks};

/// What the source says of a chunk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Touched {
    /// Blocks to be read.
    pub data: BlockSet,
    /// Blocks that are zeros, none of `data`.
    pub zeros: BlockSet,
}

impl Touched {
    /// Whether the source says nothing of it.
    #[must_use]
    pub fn is_nothing(&self) -> bool {
        self.data.is_empty() && self.zeros.is_empty()
    }
}

/// What to do for a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// It is as in the parent.
    Keep(Entry),
    /// It is all zeros.
    Zeros,
    /// Read these blocks; the others are zeros.
    Read(BlockSet),
    /// Read the blocks of `data` and put them, with the blocks of `zeros`, into a patch on the parent's `base`; the
    /// blocks of the parent's own patch stay in it. If that gets too large, [`Action::Read`] of all blocks.
    Patch {
        /// What the patch is against.
        base: ObjectRef,
        /// The parent's.
        patch: Option<ObjectRef>,
        /// What changed.
        touched: Touched,
    },
}

/// What extents say of the chunks of a page, those of other pages left out.
///
/// A block that an extent of data touches is read whole; one that an extent of zeros covers in part is read as well.
#[must_use]
pub fn touch(disk_bytes: u64, page: u64, extents: &[Extent]) -> Vec<Touched> {
    let mut touched = vec![Touched::default(); page_chunks(disk_bytes, page)];
    let block_bytes = BLOCK_BYTES as u64;
    let (page_start, page_end) = (page * PAGE_BYTES, ((page + 1) * PAGE_BYTES).min(disk_bytes));
    for extent in extents {
        let start = extent.offset.max(page_start);
        let end = extent.offset.saturating_add(extent.bytes).min(page_end);
        let mut block = start / block_bytes;
        while block * block_bytes < end {
            let at = (block * block_bytes - page_start) / CHUNK_BYTES;
            let slot = (block * block_bytes % CHUNK_BYTES / block_bytes) as usize;
            let of_chunk = &mut touched[at as usize];
            let (block_start, block_end) = (block * block_bytes, ((block + 1) * block_bytes).min(disk_bytes));
            let is_covered = start <= block_start && block_end <= end;
            if extent.what == What::Zeros && is_covered {
                of_chunk.zeros.insert(slot);
            } else {
                of_chunk.data.insert(slot);
            }
            block += 1;
        }
    }
    for of_chunk in &mut touched {
        of_chunk.zeros = of_chunk.zeros.without(&of_chunk.data);
    }
    touched
}

/// What is known of a chunk where the source says nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Before {
    /// It is zeros: there is no parent.
    Zeros,
    /// It is as the parent has it.
    Parent(Entry),
    /// It is as the parent has it, but what that is cannot be relied on, or had another length.
    Unknown,
}

/// What to do for a chunk of this length.
#[must_use]
pub fn decide(touched: Touched, before: Before, bytes: usize) -> Action {
    let all = BlockSet::all(bytes);
    if touched.zeros == all {
        return Action::Zeros;
    }
    let entry = match before {
        Before::Unknown => return Action::Read(all.without(&touched.zeros)),
        Before::Zeros | Before::Parent(Entry::Zeros) if touched.data.is_empty() => return Action::Zeros,
        Before::Zeros | Before::Parent(Entry::Zeros) => return Action::Read(touched.data),
        Before::Parent(entry) if touched.is_nothing() => return Action::Keep(entry),
        Before::Parent(entry) => entry,
    };
    if touched.data.union(&touched.zeros).len() > patch::BLOCKS_MAX {
        return Action::Read(all.without(&touched.zeros));
    }
    let (base, patch) = match entry {
        Entry::Chunk(base) => (base, None),
        Entry::Patched { base, patch } => (base, Some(patch)),
        Entry::Zeros => unreachable!("decided above"),
    };
    Action::Patch { base, patch, touched }
}

/// What is known of a chunk of which the parent's page has this entry: none where the parent has no such page.
/// `suspects` must not be relied on. The disk may have grown or shrunk since.
#[must_use]
pub fn before(
    entry: Option<Entry>,
    suspects: &Suspects,
    parent_bytes: u64,
    disk_bytes: u64,
    chunk: u64,
) -> Before {
    let Some(entry) = entry.filter(|_| chunk < chunks_of(parent_bytes)) else {
        // Grown: what the source does not speak of was never written.
        return Before::Zeros;
    };
    let is_as_long = chunk_bytes(parent_bytes, chunk) == chunk_bytes(disk_bytes, chunk);
    if is_as_long && !entry.objects().any(|object| suspects.contains(&object)) {
        Before::Parent(entry)
    } else {
        Before::Unknown
    }
}

/// Whether a page of the parent is one of the disk as well if none of its chunks changed.
#[must_use]
pub fn is_same_page(parent_bytes: u64, disk_bytes: u64, page: u64) -> bool {
    let end = |bytes: u64| bytes.min((page + 1) * PAGE_BYTES);
    end(parent_bytes) == end(disk_bytes) && page * PAGE_BYTES < parent_bytes
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
