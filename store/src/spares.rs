//! Memory of batches that are through, for those to come, so that a turn allocates nothing.
//!
//! As many of each are kept as batches were ever under way at once, which the settings bound.

use edge::AlignedBlock;

use crate::append::{Draft, Flight, Waiter};
use crate::batch::{BATCH_BLOCKS_MAX, ENTRIES_MAX, Entry, Header};
use crate::cache::CacheAt;

/// See the module's comment.
pub(crate) struct Spares<B> {
    lists: Vec<Lists>,
    data: Vec<Vec<B>>,
    /// With the bytes in use of each; the rest is zeros.
    headers: Vec<(Box<AlignedBlock>, usize)>,
}

/// What a batch lists, in memory.
pub(crate) struct Lists {
    pub(crate) entries: Vec<Entry>,
    pub(crate) sums: Vec<u32>,
    pub(crate) inline: Vec<u8>,
    pub(crate) waiters: Vec<Waiter>,
    pub(crate) leaves: Vec<CacheAt>,
}

impl Lists {
    /// With room for the fullest batch: 9 KiB. Growing later would cost each of them an allocation now and then.
    fn new() -> Lists {
        Lists {
            entries: Vec::with_capacity(ENTRIES_MAX),
            sums: Vec::with_capacity(BATCH_BLOCKS_MAX),
            inline: Vec::new(),
            waiters: Vec::with_capacity(ENTRIES_MAX),
            leaves: Vec::with_capacity(ENTRIES_MAX),
        }
    }

    fn clear(&mut self) {
        self.entries.clear();
        self.sums.clear();
        self.inline.clear();
        self.waiters.clear();
        self.leaves.clear();
    }
}

impl<B> Default for Spares<B> {
    fn default() -> Spares<B> {
        Spares {
            lists: Vec::new(),
            data: Vec::new(),
            headers: Vec::new(),
        }
    }
}

impl<B> Spares<B> {
    pub(crate) fn take_lists(&mut self) -> Lists {
        self.lists.pop().unwrap_or_else(Lists::new)
    }

    pub(crate) fn take_data(&mut self) -> Vec<B> {
        self.data.pop().unwrap_or_else(|| Vec::with_capacity(ENTRIES_MAX))
    }

    /// A batch was written: what the disk gave back.
    pub(crate) fn keep_buffers(&mut self, header: Box<AlignedBlock>, header_bytes: usize, mut data: Vec<B>) {
        // Lets go of the content, which others may wait for.
        data.clear();
        self.data.push(data);
        self.headers.push((header, header_bytes));
    }

    /// A batch was applied.
    pub(crate) fn keep_flight(&mut self, flight: Flight) {
        self.keep_lists(Lists {
            entries: flight.entries,
            sums: flight.sums,
            inline: flight.inline,
            waiters: flight.waiters,
            leaves: flight.leaves,
        });
    }

    /// There was nothing to put in it.
    pub(crate) fn keep_draft(&mut self, draft: Draft<B>) {
        self.data.push(draft.data);
        self.keep_lists(Lists {
            entries: draft.entries,
            sums: draft.sums,
            inline: draft.inline,
            waiters: draft.waiters,
            leaves: draft.leaves,
        });
    }

    fn keep_lists(&mut self, mut lists: Lists) {
        lists.clear();
        self.lists.push(lists);
    }

    /// The header as a block to be written.
    pub(crate) fn encode(&mut self, header: &Header) -> Box<AlignedBlock> {
        let (mut block, old_bytes) = self.take_header();
        header.encode_over(&mut block, old_bytes);
        block
    }

    /// A block of zeros, and the vector for what follows it.
    pub(crate) fn blank(&mut self) -> (Box<AlignedBlock>, Vec<B>) {
        let (mut block, old_bytes) = self.take_header();
        block.0[..old_bytes].fill(0);
        (block, self.take_data())
    }

    fn take_header(&mut self) -> (Box<AlignedBlock>, usize) {
        self.headers.pop().unwrap_or_else(|| (AlignedBlock::zeroed(), 0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::{Kind, SegmentKey};
    use types::BLOCK_BYTES;

    fn header(entries: usize) -> Header {
        let entry = |at: usize| Entry {
            kind: Kind::Trim,
            flags: 0xff,
            shard: u64::MAX,
            layer: u32::MAX,
            block: at as u32,
            count: 1,
            seq: u64::MAX,
            birth: u64::MAX,
        };
        Header {
            key: SegmentKey {
                secret: u64::MAX,
                generation: u64::MAX,
            },
            number: 9,
            complete_upto: 8,
            durable_upto: 7,
            entries: (0..entries).map(entry).collect(),
            sums: Vec::new(),
            inline: Vec::new(),
        }
    }

    #[test]
    fn nothing_of_an_older_header_is_left_in_a_block() {
        let mut spares: Spares<types::HeapBlock> = Spares::default();
        for entries in [90, 1, 40, 2, 3, 90, 0] {
            let header = header(entries);
            let block = spares.encode(&header);
            assert!(block == header.encode(), "{entries} entries over an older header");
            spares.keep_buffers(block, header.used_bytes(), Vec::new());
        }
        let (block, _) = spares.blank();
        assert_eq!(block.0, [0; BLOCK_BYTES as usize]);
        assert_eq!(spares.headers.len(), 0, "one block served them all");
    }
}
