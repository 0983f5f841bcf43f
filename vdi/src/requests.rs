//! Requests under way: what each still has to ask of its writers.

use smallvec::SmallVec;
use store::{BlockVersion, ClearKind, ReadParts as BlockParts};
use types::{Lineage, RequestId, ShardNo};

use crate::VdiError;
use crate::conflict::Claim;
use crate::split::{Blocks, Cut, Edge, Span};

/// Index of a request in the [`Slab`]; used again after the request ended.
pub(crate) type Slot = u32;

/// A front end's request from admission to its answer.
///
/// ```text
///  Waiting ──claim granted──▶ Content ──all pieces done──▶ Syncing (FUA) ──flushed──▶ answered
///                                  └──────────── no FUA, or an error ────────────────▶
/// ```
#[derive(Debug)]
pub(crate) struct Running<B> {
    /// The front end's name for it.
    pub guest: RequestId,
    pub work: Work<B>,
    pub stage: Stage,
    /// Place in the conflict table, while it has one.
    pub claim: Option<Claim>,
    /// Whole blocks not yet asked for.
    pub cut: Cut,
    /// Pieces cut so far.
    pub pieces: u32,
    /// Questions to writers without an answer.
    pub under_way: u32,
    /// Shards still to flush, last first.
    pub to_flush: Vec<ShardNo>,
    /// What went wrong first (of unreadable blocks: the lowest).
    pub error: Option<VdiError>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Earlier requests hold blocks of it.
    Waiting,
    /// Reading, writing, clearing.
    Content,
    /// Flushing: a flush, or the end of a write with FUA.
    Syncing,
}

#[derive(Debug)]
pub(crate) enum Work<B> {
    Read {
        span: Span,
        touched: Blocks,
        of: Option<Lineage>,
        /// Content by piece.
        parts: SmallVec<[BlockParts<B>; 1]>,
    },
    Write {
        span: Span,
        data: B,
        edges: SmallVec<[Edge; 2]>,
        is_fua: bool,
    },
    Clear {
        kind: ClearKind,
        edges: SmallVec<[Edge; 2]>,
        /// All that it changes.
        touched: Blocks,
        is_fua: bool,
    },
    Flush,
    Extents {
        span: Span,
        touched: Blocks,
        of: Option<Lineage>,
        /// Versions by leaf.
        leaves: SmallVec<[Vec<BlockVersion>; 1]>,
    },
}

/// What a writer was asked, as told by the id of the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ask {
    /// Piece `n` of a request: read, write, clear or versions.
    Piece(Slot, u32),
    /// The old content of a request's edge 0 or 1.
    EdgeRead(Slot, u32),
    /// The new content of an edge.
    EdgeWrite(Slot, u32),
    /// A shard's flush, which several requests may share.
    Flush(ShardNo, u32),
}

const TAG_SHIFT: u32 = 62;
const NUMBER_SHIFT: u32 = 32;
/// Numbers of pieces, and of flushes of a shard, are below this.
pub(crate) const NUMBER_MASK: u32 = (1 << (TAG_SHIFT - NUMBER_SHIFT)) - 1;

impl Ask {
    /// The form in which it travels through the writer: two bits of kind, 30 of number, 32 of slot or shard.
    pub fn to_id(self) -> RequestId {
        let (tag, number, low) = match self {
            Ask::Piece(slot, number) => (0u64, number, slot),
            Ask::EdgeRead(slot, number) => (1, number, slot),
            Ask::EdgeWrite(slot, number) => (2, number, slot),
            Ask::Flush(shard, number) => (3, number, shard.0),
        };
        assert!(number <= NUMBER_MASK, "number {number} of a piece");
        RequestId(tag << TAG_SHIFT | u64::from(number) << NUMBER_SHIFT | u64::from(low))
    }

    pub fn from_id(id: RequestId) -> Ask {
        let number = (id.0 >> NUMBER_SHIFT) as u32 & NUMBER_MASK;
        let low = id.0 as u32;
        match id.0 >> TAG_SHIFT {
            0 => Ask::Piece(low, number),
            1 => Ask::EdgeRead(low, number),
            2 => Ask::EdgeWrite(low, number),
            _ => Ask::Flush(ShardNo(low), number),
        }
    }
}

impl<B> Running<B> {
    pub fn new(guest: RequestId, work: Work<B>, cut: Cut) -> Running<B> {
        Running {
            guest,
            work,
            stage: Stage::Waiting,
            claim: None,
            cut,
            pieces: 0,
            under_way: 0,
            to_flush: Vec::new(),
            error: None,
        }
    }

    /// The blocks it must have to itself (`true`) or share with its like, if any.
    pub fn wanted(&self) -> Option<(Blocks, bool)> {
        let (blocks, is_exclusive) = match &self.work {
            // What a snapshot holds does not change.
            Work::Read { of: Some(_), .. } => return None,
            Work::Read {
                touched, of: None, ..
            } => (*touched, false),
            Work::Write { span, .. } => (span.touched(), true),
            Work::Clear { touched, .. } => (*touched, true),
            // Extents may answer with what was true at any moment while they were asked.
            Work::Flush | Work::Extents { .. } => return None,
        };
        (!blocks.is_empty()).then_some((blocks, is_exclusive))
    }

    /// Parts of blocks that it must read, change and write.
    pub fn edges(&self) -> &[Edge] {
        match &self.work {
            Work::Write { edges, .. } | Work::Clear { edges, .. } => edges,
            Work::Read { .. } | Work::Flush | Work::Extents { .. } => &[],
        }
    }

    /// The blocks to have on stable media before the answer.
    pub fn fua(&self) -> Option<Blocks> {
        match &self.work {
            Work::Write {
                span, is_fua: true, ..
            } => Some(span.touched()),
            Work::Clear {
                touched,
                is_fua: true,
                ..
            } => Some(*touched),
            _ => None,
        }
    }

    /// Keeps the first error; of unreadable blocks the lowest, whatever the order of the answers.
    pub fn fail(&mut self, error: VdiError) {
        match (&mut self.error, error) {
            (Some(VdiError::Unreadable { offset }), VdiError::Unreadable { offset: other }) => {
                *offset = other.min(*offset);
            }
            (Some(_), _) => {}
            (none, error) => *none = Some(error),
        }
    }
}

/// Running requests by slot: O(1) in and out, no allocation once it has grown.
#[derive(Debug)]
pub(crate) struct Slab<B> {
    slots: Vec<Option<Running<B>>>,
    free: Vec<Slot>,
}

impl<B> Slab<B> {
    pub fn new() -> Slab<B> {
        Slab {
            slots: Vec::new(),
            free: Vec::new(),
        }
    }

    pub fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    pub fn insert(&mut self, running: Running<B>) -> Slot {
        match self.free.pop() {
            Some(slot) => {
                self.slots[slot as usize] = Some(running);
                slot
            }
            None => {
                self.slots.push(Some(running));
                (self.slots.len() - 1) as Slot
            }
        }
    }

    pub fn get(&self, slot: Slot) -> &Running<B> {
        self.slots[slot as usize].as_ref().expect("a running request")
    }

    pub fn get_mut(&mut self, slot: Slot) -> &mut Running<B> {
        self.slots[slot as usize].as_mut().expect("a running request")
    }

    /// The slots of those that are so.
    pub fn slots_of(&self, is_so: impl Fn(&Running<B>) -> bool) -> impl Iterator<Item = Slot> {
        let all = (0..).zip(&self.slots);
        all.filter_map(move |(slot, running)| running.as_ref().filter(|one| is_so(one)).map(|_| slot))
    }

    pub fn remove(&mut self, slot: Slot) -> Running<B> {
        let running = self.slots[slot as usize].take().expect("a running request");
        assert_eq!(running.under_way, 0, "answered with questions under way");
        self.free.push(slot);
        running
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_name_what_was_asked() {
        for ask in [
            Ask::Piece(0, 0),
            Ask::Piece(u32::MAX, NUMBER_MASK),
            Ask::EdgeRead(4095, 1),
            Ask::EdgeWrite(4095, 0),
            Ask::Flush(ShardNo(u32::MAX), 7),
        ] {
            assert_eq!(Ask::from_id(ask.to_id()), ask);
        }
    }

    #[test]
    fn the_lowest_unreadable_block_is_reported() {
        let mut running: Running<types::HeapBlock> = Running::new(RequestId(1), Work::Flush, Cut::empty());
        for offset in [8192, 4096, 12288] {
            running.fail(VdiError::Unreadable { offset });
        }
        assert_eq!(running.error, Some(VdiError::Unreadable { offset: 4096 }));
    }
}
