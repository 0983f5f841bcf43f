//! From requests to batches.
//!
//! At the end of a turn everything in the queue that may go shares one batch (or as many as it takes, up to the
//! limit of appends in flight). Order is kept among the writes of a shard; a write that waits for space holds
//! back later writes of its shard and every flush behind it, and nothing else.

mod layers;

use std::collections::VecDeque;
use std::ops::RangeInclusive;

use edge::DiskOp;
use smallvec::SmallVec;
use types::{BLOCK_BYTES, BlockCrcs, BlockNo, LayerId, Payload, RequestId, Seq, ShardId};

use crate::batch::{BATCH_BLOCKS_MAX, Entry, FLAG_NO_END, FLAG_RELOCATED, Header, Kind, birth, header_bytes};
use crate::cache::CacheAt;
use crate::leaf::{Slot, State, pieces};
use crate::recover::fence_entries;
use crate::spares::Lists;
use crate::store::{Io, LeafPlace, Store};
use crate::{ClearKind, Effect, LeafKey, Origin, REQUEST_BLOCKS_MAX, Request, StoreError};

/// The longest record.
const RECORD_BYTES_MAX: usize = 3072;
/// In the store's own words on a shard's end: what it is when they are logged.
const END_AS_IS: u64 = u64::MAX;

/// Something to append.
pub(crate) struct Op<B> {
    /// Who is answered; nobody for the store's own.
    pub(crate) id: Option<RequestId>,
    kind: OpKind<B>,
}

enum OpKind<B> {
    Blocks(Blocks<B>),
    Flush {
        shard: ShardId,
    },
    Record {
        shard: ShardId,
        record: Vec<u8>,
    },
    Drop {
        shard: ShardId,
    },
    Layers {
        shard: ShardId,
        layers: Vec<RangeInclusive<LayerId>>,
        /// What they are called from now on; `None` if they are gone.
        called: Option<LayerId>,
        revision: u64,
    },
    /// What a change of layers logs, perhaps partly in a batch already.
    Entries(VecDeque<Entry>),
    SetEnd {
        shard: ShardId,
        end: u64,
    },
    Checkpoint,
}

/// A write or a clear, perhaps partly in a batch already.
struct Blocks<B> {
    shard: ShardId,
    layer: LayerId,
    block: u32,
    count: u32,
    seq: u64,
    kind: Kind,
    /// With the crc of each block; `None` for a clear.
    data: Option<(B, BlockCrcs)>,
    origin: Origin,
    /// Blocks already dealt with.
    taken: u32,
    /// Of the next block, entries already logged: a void may need several.
    parts: usize,
}

impl<B: Payload> Op<B> {
    /// What is to be appended; `request` is none of those that only look something up.
    pub(crate) fn new(id: RequestId, request: Request<B>) -> Op<B> {
        let kind = match request {
            Request::Write {
                shard,
                layer,
                block,
                seq,
                data,
                crcs,
                origin,
            } => {
                let count = crcs.len();
                assert_eq!(
                    data.length() as u64,
                    count as u64 * BLOCK_BYTES,
                    "a crc for every block"
                );
                assert!(
                    (1..=REQUEST_BLOCKS_MAX as usize).contains(&count),
                    "write of {count} blocks"
                );
                OpKind::Blocks(Blocks {
                    shard,
                    layer,
                    block: block.0,
                    count: count as u32,
                    seq: seq.0,
                    kind: Kind::Data,
                    data: Some((data, crcs)),
                    origin,
                    taken: 0,
                    parts: 0,
                })
            }
            Request::Clear {
                shard,
                layer,
                block,
                count,
                seq,
                kind,
                origin,
            } => OpKind::Blocks(Blocks {
                shard,
                layer,
                block: block.0,
                count,
                seq: seq.0,
                kind: match kind {
                    ClearKind::Zero => Kind::Zero,
                    ClearKind::Trim => Kind::Trim,
                },
                data: None,
                origin,
                taken: 0,
                parts: 0,
            }),
            Request::Void {
                shard,
                layer,
                block,
                count,
                live_from,
            } => OpKind::Blocks(Blocks {
                shard,
                layer,
                block: block.0,
                count,
                seq: 0,
                kind: Kind::Void,
                data: None,
                origin: Origin::Repair { live_from },
                taken: 0,
                parts: 0,
            }),
            Request::Flush { shard } => OpKind::Flush { shard },
            Request::PutRecord { shard, record } => {
                assert!(record.len() <= RECORD_BYTES_MAX, "record of {} B", record.len());
                OpKind::Record { shard, record }
            }
            Request::DropShard { shard } => OpKind::Drop { shard },
            Request::DropLayers {
                shard,
                layers,
                revision,
            } => {
                assert!(layers.iter().all(|range| !range.is_empty()), "layers {layers:?}");
                OpKind::Layers {
                    shard,
                    layers,
                    called: None,
                    revision,
                }
            }
            Request::MergeLayers {
                shard,
                layers,
                called,
                revision,
            } => {
                let is_good = |range: &RangeInclusive<LayerId>| !range.is_empty() && *range.end() <= called;
                assert!(layers.iter().all(is_good), "layers {layers:?} called {called}");
                OpKind::Layers {
                    shard,
                    layers,
                    called: Some(called),
                    revision,
                }
            }
            Request::SetEnd { shard, end } => OpKind::SetEnd { shard, end: end.0 },
            Request::Read { .. }
            | Request::ChangedLeaves { .. }
            | Request::LeafVersions { .. }
            | Request::LayersRevision { .. } => {
                unreachable!("looked up, not appended")
            }
        };
        if let OpKind::Blocks(blocks) = &kind {
            let end = blocks.block.checked_add(blocks.count);
            assert!(
                blocks.count > 0 && end.is_some_and(|end| end <= types::SHARD_BLOCKS_MAX),
                "blocks {}+{} are outside any shard",
                blocks.block,
                blocks.count
            );
        }
        Op { id: Some(id), kind }
    }

    pub(crate) fn checkpoint() -> Op<B> {
        Op {
            id: None,
            kind: OpKind::Checkpoint,
        }
    }
}

/// Who waits for a batch.
pub(crate) struct Waiter {
    pub(crate) id: RequestId,
    /// Answered when durable, not when complete.
    pub(crate) is_durable: bool,
}

/// A batch on its way.
pub(crate) struct Flight {
    pub(crate) number: u64,
    pub(crate) segment: u32,
    pub(crate) generation: u64,
    /// Block address of the header.
    pub(crate) address: u64,
    pub(crate) entries: Vec<Entry>,
    pub(crate) sums: Vec<u32>,
    pub(crate) inline: Vec<u8>,
    pub(crate) waiters: Vec<Waiter>,
    /// Leaves held for its data entries, in order of their pieces.
    pub(crate) leaves: Vec<CacheAt>,
    pub(crate) is_written: bool,
    pub(crate) is_cleaning: bool,
    pub(crate) progress: Progress,
}

/// How far a flight is applied.
#[derive(Clone, Copy, Default)]
pub(crate) struct Progress {
    pub(crate) entry: usize,
    /// Blocks of a wide entry.
    pub(crate) blocks: u32,
    pub(crate) sum: usize,
    pub(crate) inline: usize,
    pub(crate) leaf: usize,
}

/// A batch being put together.
pub(crate) struct Draft<B> {
    pub(crate) number: u64,
    pub(crate) entries: Vec<Entry>,
    pub(crate) sums: Vec<u32>,
    pub(crate) inline: Vec<u8>,
    pub(crate) data: Vec<B>,
    pub(crate) waiters: Vec<Waiter>,
    pub(crate) leaves: Vec<CacheAt>,
    /// Data blocks that fit the open segment.
    blocks_max: usize,
    pub(crate) is_cleaning: bool,
}

impl Flight {
    /// Bytes of its header that are in use.
    pub(crate) fn header_bytes(&self) -> usize {
        header_bytes(self.entries.len(), self.sums.len(), self.inline.len())
    }
}

impl<B: Payload> Draft<B> {
    /// How many data blocks one more entry may have, if one more fits at all.
    pub(crate) fn room(&self) -> Option<usize> {
        let used = header_bytes(self.entries.len() + 1, self.sums.len(), self.inline.len());
        let sums = (BLOCK_BYTES as usize).checked_sub(used)? / 4;
        Some(sums.min(self.blocks_max - self.sums.len()))
    }

    pub(crate) fn has_inline_room(&self, bytes: usize) -> bool {
        header_bytes(self.entries.len() + 1, self.sums.len(), self.inline.len() + bytes) as u64 <= BLOCK_BYTES
    }

    /// Whether so many entries without anything else fit.
    fn has_room_for(&self, entries: usize) -> bool {
        let bytes = header_bytes(self.entries.len() + entries, self.sums.len(), self.inline.len());
        bytes as u64 <= BLOCK_BYTES
    }

    /// Adds an entry; its birth is its own unless it is a moved one.
    pub(crate) fn push(&mut self, mut entry: Entry) {
        if !entry.is_relocated() {
            entry.birth = birth(self.number, self.entries.len());
        }
        self.entries.push(entry);
    }

    pub(crate) fn push_block(&mut self, data: B, sum: u32) {
        self.data.push(data);
        self.sums.push(sum);
    }

    pub(crate) fn hold(&mut self, at: CacheAt) {
        self.leaves.push(at);
    }

    /// An entry with what it carries in the header.
    pub(crate) fn push_note(&mut self, entry: Entry, inline: &[u8]) {
        self.push(entry);
        self.inline.extend_from_slice(inline);
    }

    /// It takes no more data blocks than this.
    pub(crate) fn limit_blocks(&mut self, blocks: usize) {
        self.blocks_max = self.blocks_max.min(blocks);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    pub(crate) fn blocks(&self) -> usize {
        self.sums.len()
    }
}

/// What became of an op.
enum Taken<B> {
    /// All of it is in the draft (or answered).
    All,
    /// The draft is full; the rest goes into the next.
    Rest(Op<B>),
    /// It must wait; later ones may pass.
    Hold(Op<B>),
    /// It must wait, and everything behind it.
    Stop(Op<B>),
}

/// What waits while a turn's batches are built.
#[derive(Default)]
struct Held {
    /// Their stream waits for space.
    shards: SmallVec<[ShardId; 4]>,
    /// A repair of theirs waits for its leaf.
    repairs: SmallVec<[ShardId; 4]>,
    writes: u64,
}

impl Held {
    /// Whether what comes later in the shard's order has to wait as well. Other shards go on.
    fn is_before(&self, shard: ShardId) -> bool {
        self.shards.contains(&shard) || self.repairs.contains(&shard)
    }
}

/// Free segments that appends may not have, unless a checkpoint is about to free others: the next recovery must open one.
pub(crate) const KEPT_SEGMENTS: u32 = 1;

impl<B: Payload> Store<B> {
    /// Starts a draft in the open segment, going over to the next segment if this one is full.
    pub(crate) fn draft(&mut self, effects: &mut Vec<Effect<B>>) -> Option<Draft<B>> {
        if self.flights.len() >= self.settings.appends_in_flight {
            return None;
        }
        let segment_blocks = self.ledger.segments.geometry.segment_blocks;
        if self.open.next + 1 > segment_blocks / 2 {
            self.prepare_segment(effects);
        }
        let kept = self.kept_blocks();
        // A header with no room for data behind it would only serve some requests.
        if self.open.next + 2 + kept > segment_blocks && !self.switch_segment(effects) {
            return None;
        }
        let room = (segment_blocks - self.open.next - 1 - self.kept_blocks()) as usize;
        let Lists {
            entries,
            sums,
            inline,
            waiters,
            leaves,
        } = self.spares.take_lists();
        Some(Draft {
            number: self.number + 1,
            entries,
            sums,
            inline,
            data: self.spares.take_data(),
            waiters,
            leaves,
            blocks_max: room.min(BATCH_BLOCKS_MAX),
            is_cleaning: false,
        })
    }

    /// With no segment to go over to, the end of the open one is for the checkpoint that will free some.
    fn kept_blocks(&self) -> u32 {
        let is_last = self.next.is_none() && self.ledger.segments.free_count() == 0;
        if is_last && !self.checkpoint.will_free() {
            2
        } else {
            0
        }
    }

    /// Whether the log cannot go on: no segment to go over to, and none that is about to be free.
    pub(crate) fn is_log_full(&self) -> bool {
        let segments = &self.ledger.segments;
        self.next.is_none()
            && self.flights.is_empty()
            && segments.free_count() <= KEPT_SEGMENTS
            && segments.emptied() == 0
            && self.checkpoint.emptied_count() == 0
            && self.open.next + 2 + self.kept_blocks() > segments.geometry.segment_blocks
    }

    pub(crate) fn build_batches(&mut self, effects: &mut Vec<Effect<B>>) {
        if self.queue.is_empty() {
            self.held_writes = 0;
            return;
        }
        let mut held = Held::default();
        let mut kept: VecDeque<Op<B>> = VecDeque::new();
        let mut is_stopped = false;
        while !self.queue.is_empty() && !is_stopped {
            let Some(mut draft) = self.draft(effects) else {
                break;
            };
            is_stopped = self.fill(&mut draft, &mut held, &mut kept, effects);
            if draft.is_empty() {
                self.spares.keep_draft(draft);
                if !is_stopped && self.is_rest_given_up() {
                    continue;
                }
                break;
            }
            self.stats.written_blocks += draft.blocks() as u64;
            self.earn_cleaning(draft.blocks() as u32 + 1);
            self.launch(draft, effects);
        }
        // With appends at their limit the rest of the queue was not looked at: what waited there still does.
        self.held_writes = match held.writes {
            0 => self.held_writes.min(self.queue.len() as u64),
            writes => writes,
        };
        if !kept.is_empty() {
            kept.append(&mut self.queue);
            self.queue = kept;
        }
    }

    /// Fills one draft from the queue; true if what is left has to wait.
    fn fill(
        &mut self,
        draft: &mut Draft<B>,
        held: &mut Held,
        kept: &mut VecDeque<Op<B>>,
        effects: &mut Vec<Effect<B>>,
    ) -> bool {
        while let Some(op) = self.queue.pop_front() {
            match self.take_op(op, draft, held, effects) {
                Taken::All => {}
                Taken::Rest(op) => {
                    self.queue.push_front(op);
                    return false;
                }
                Taken::Hold(op) => {
                    kept.push_back(op);
                }
                Taken::Stop(op) => {
                    self.queue.push_front(op);
                    return true;
                }
            }
        }
        false
    }

    fn take_op(
        &mut self,
        op: Op<B>,
        draft: &mut Draft<B>,
        held: &mut Held,
        effects: &mut Vec<Effect<B>>,
    ) -> Taken<B> {
        let Op { id, kind } = op;
        match kind {
            OpKind::Blocks(blocks) => self.take_blocks(id, blocks, draft, held, effects),
            OpKind::Flush { shard } | OpKind::SetEnd { shard, .. } if held.is_before(shard) => {
                Taken::Hold(Op { id, kind })
            }
            OpKind::Flush { .. } => {
                self.flush_upto(id.expect("only requests flush"), draft);
                Taken::All
            }
            OpKind::Checkpoint => self.take_checkpoint(draft),
            OpKind::Layers { shard, .. } if self.is_changing(shard) => Taken::Hold(Op { id, kind }),
            OpKind::Layers {
                shard,
                layers,
                called,
                revision,
            } => {
                let id = id.expect("only requests change layers");
                self.take_layers(id, shard, &layers, called, revision, draft, effects)
            }
            OpKind::Entries(entries) => self.take_entries(id, entries, draft),
            kind => self.take_note(id, kind, draft),
        }
    }

    /// Answers when everything up to now is durable.
    fn flush_upto(&mut self, id: RequestId, draft: &Draft<B>) {
        let upto = if draft.is_empty() {
            self.number
        } else {
            draft.number
        };
        self.syncs.flush(id, upto);
    }

    fn take_checkpoint(&mut self, draft: &mut Draft<B>) -> Taken<B> {
        if !draft.is_empty() {
            return Taken::Rest(Op::checkpoint());
        }
        let (id, floor) = (self.checkpoint.id(), self.checkpoint.floor());
        draft
            .entries
            .extend(fence_entries(&self.ledger, draft.number, id, floor));
        self.checkpoint.logged(draft.number);
        Taken::All
    }

    /// Entries that hold no blocks and are durable when answered.
    fn take_note(&mut self, id: Option<RequestId>, kind: OpKind<B>, draft: &mut Draft<B>) -> Taken<B> {
        let inline_bytes = match &kind {
            OpKind::Record { record, .. } => record.len(),
            _ => 0,
        };
        if !draft.has_inline_room(inline_bytes) {
            return Taken::Rest(Op { id, kind });
        }
        let plain = |kind, shard: ShardId, count, seq| Entry {
            kind,
            flags: 0,
            shard: shard.to_u64(),
            layer: 0,
            block: 0,
            count,
            seq,
            birth: 0,
        };
        let (entry, inline) = match kind {
            OpKind::Record { shard, record } => (plain(Kind::Record, shard, record.len() as u32, 0), record),
            OpKind::Drop { shard } => {
                if let Some(shard) = self.ledger.shards.get_mut(&shard) {
                    shard.end_submitted = 0;
                }
                (plain(Kind::Drop, shard, 0, 0), Vec::new())
            }
            OpKind::SetEnd { shard, end } => {
                let Some(known) = self.ledger.shards.get_mut(&shard) else {
                    return Taken::All;
                };
                let end = if end == END_AS_IS {
                    known.end_submitted
                } else {
                    end
                };
                known.end_submitted = end;
                (plain(Kind::SetEnd, shard, 0, end), Vec::new())
            }
            OpKind::Blocks(_)
            | OpKind::Flush { .. }
            | OpKind::Layers { .. }
            | OpKind::Entries(_)
            | OpKind::Checkpoint => unreachable!("not a note"),
        };
        draft.push_note(entry, &inline);
        draft.waiters.extend(id.map(|id| Waiter { id, is_durable: true }));
        Taken::All
    }

    fn take_blocks(
        &mut self,
        id: Option<RequestId>,
        blocks: Blocks<B>,
        draft: &mut Draft<B>,
        held: &mut Held,
        effects: &mut Vec<Effect<B>>,
    ) -> Taken<B> {
        let shard = blocks.shard;
        let is_data = blocks.data.is_some();
        if !self
            .ledger
            .shards
            .get(&shard)
            .is_some_and(crate::ledger::Shard::is_there)
        {
            // Dropped while it waited.
            let id = id.expect("only requests have blocks");
            effects.push(Effect::Reply(id, Err(StoreError::NoShard(shard))));
            return Taken::All;
        }
        if self.is_changing(shard) {
            if !held.repairs.contains(&shard) {
                held.repairs.push(shard);
            }
            return Taken::Hold(Op {
                id,
                kind: OpKind::Blocks(blocks),
            });
        }
        let is_behind = held.shards.contains(&shard);
        let may_use_slack = self.slack_shards.contains(&shard) && self.has_slack(draft);
        let has_place =
            !is_data || self.has_space(draft) || may_use_slack || self.grows_nothing(&blocks, effects);
        let must_wait = is_behind || !has_place;
        if must_wait {
            if is_behind && !is_data {
                self.slack_shards.insert(shard);
            }
            held.writes += u64::from(is_data);
            if !held.shards.contains(&shard) {
                held.shards.push(shard);
            }
            return Taken::Hold(Op {
                id,
                kind: OpKind::Blocks(blocks),
            });
        }
        if !is_data {
            self.slack_shards.remove(&shard);
        }
        match blocks.origin {
            Origin::Live => self.take_live(id, blocks, draft, effects),
            Origin::Repair { live_from } => self.take_repair(id, blocks, live_from, draft, held, effects),
        }
    }

    /// Whether guests may store one more batch.
    fn has_space(&self, draft: &Draft<B>) -> bool {
        let reserved = self.settings.segments_reserved;
        self.free_segments() > reserved && self.used_blocks(draft) < self.ledger.capacity_blocks(reserved)
    }

    /// Whether a write replaces data only, so that a disk at its capacity takes it all the same. Where a leaf is
    /// not in memory, it is not known yet: the write waits for the leaf.
    fn grows_nothing(&mut self, blocks: &Blocks<B>, effects: &mut Vec<Effect<B>>) -> bool {
        if self.free_segments() <= self.settings.segments_reserved {
            return false;
        }
        let (block, count) = (blocks.block + blocks.taken, blocks.count - blocks.taken);
        let home = self.ledger.home(blocks.shard, blocks.layer);
        pieces(blocks.shard, home, block, count).all(|piece| {
            let LeafPlace::Ready(at) = self.locate(piece.key, 0, effects) else {
                return false;
            };
            let leaf = self.cache.get(at).leaf.as_ref().expect("ready");
            (piece.slot..piece.slot + piece.count).all(|slot| leaf.get(slot).state == State::Data)
        })
    }

    /// Whether a write that a trim waits behind may go beyond what guests may store, short of what cleaning needs to
    /// go on. Where cleaning is still about to make space it waits as all others do, or it would take each segment
    /// before there are enough of them for the others.
    fn has_slack(&self, draft: &Draft<B>) -> bool {
        let reserved = self.settings.segments_reserved;
        let capacity = self.ledger.capacity_blocks(reserved);
        let kept = if self.is_stuck() {
            (reserved / 2).max(2)
        } else {
            reserved
        };
        self.free_segments() > kept && self.used_blocks(draft) < capacity + capacity / 20
    }

    fn used_blocks(&self, draft: &Draft<B>) -> u64 {
        let under_way: usize = self.flights.iter().map(|flight| flight.sums.len()).sum();
        self.ledger.segments.live_blocks() + (under_way + draft.blocks()) as u64
    }

    fn take_live(
        &mut self,
        id: Option<RequestId>,
        mut blocks: Blocks<B>,
        draft: &mut Draft<B>,
        effects: &mut Vec<Effect<B>>,
    ) -> Taken<B> {
        let left = blocks.count - blocks.taken;
        let room = match draft.room() {
            Some(room) if blocks.data.is_none() || room > 0 => room,
            _ => {
                return Taken::Rest(Op {
                    id,
                    kind: OpKind::Blocks(blocks),
                });
            }
        };
        if blocks.data.is_some()
            && blocks.taken == 0
            && (room as u32) < left
            && left <= self.fresh_batch_blocks()
        {
            // Whole or not at all: a part that survives a crash without the rest would be content beyond the
            // shard's end, and replicas that report the same end must hold the same.
            if draft.is_empty() {
                self.give_up_rest();
            }
            return Taken::Rest(Op {
                id,
                kind: OpKind::Blocks(blocks),
            });
        }
        let count = if blocks.data.is_some() {
            left.min(room as u32)
        } else {
            left
        };
        let entry = blocks.entry(blocks.taken, count, if count < left { FLAG_NO_END } else { 0 });
        if blocks.data.is_some() && !self.hold_leaves(&entry, draft, effects) {
            return Taken::Stop(Op {
                id,
                kind: OpKind::Blocks(blocks),
            });
        }
        blocks.push(entry, blocks.taken, draft);
        blocks.taken += count;
        if blocks.taken < blocks.count {
            return Taken::Rest(Op {
                id,
                kind: OpKind::Blocks(blocks),
            });
        }
        if let Some(shard) = self.ledger.shards.get_mut(&blocks.shard) {
            shard.end_submitted = shard.end_submitted.max(blocks.seq);
            if shard.is_gone(blocks.layer) || shard.home(blocks.layer) != blocks.layer {
                // Perhaps no block keeps its segment.
                self.say_end(blocks.shard);
            }
        }
        draft.waiters.extend(id.map(|id| Waiter {
            id,
            is_durable: false,
        }));
        Taken::All
    }

    /// Data blocks that the first batch of a segment can hold. With segments of 2 MiB or more that is any write;
    /// a longer one is split, and its parts can be torn by a crash.
    fn fresh_batch_blocks(&self) -> u32 {
        (BATCH_BLOCKS_MAX as u32).min(self.ledger.segments.geometry.segment_blocks - 2)
    }

    /// The next batch begins in another segment. Costs less than one write per segment.
    fn give_up_rest(&mut self) {
        self.open.next = self.ledger.segments.geometry.segment_blocks;
    }

    fn is_rest_given_up(&self) -> bool {
        self.open.next == self.ledger.segments.geometry.segment_blocks
    }

    /// Logs only the blocks that win, so that replay need not decide again. The leaf is needed for that.
    fn take_repair(
        &mut self,
        id: Option<RequestId>,
        mut blocks: Blocks<B>,
        live_from: Seq,
        draft: &mut Draft<B>,
        held: &mut Held,
        effects: &mut Vec<Effect<B>>,
    ) -> Taken<B> {
        // Who repairs has seen what was merged as one, by whatever name.
        blocks.layer = self.ledger.home(blocks.shard, blocks.layer);
        let rest = blocks.count - blocks.taken;
        for piece in pieces(blocks.shard, blocks.layer, blocks.block + blocks.taken, rest) {
            // The worst case: every other block of the leaf wins. One that does not fit has an emptier draft next.
            let is_roomy = draft.is_empty() || draft.room().is_some_and(|room| room >= piece.count);
            if !is_roomy {
                return Taken::Rest(Op {
                    id,
                    kind: OpKind::Blocks(blocks),
                });
            }
            let at = match self.locate_or_make(piece.key, 0, effects) {
                LeafPlace::Ready(at) => at,
                LeafPlace::Loading(_) => {
                    held.repairs.push(blocks.shard);
                    return Taken::Hold(Op {
                        id,
                        kind: OpKind::Blocks(blocks),
                    });
                }
                LeafPlace::Nowhere | LeafPlace::NoMemory => {
                    return Taken::Stop(Op {
                        id,
                        kind: OpKind::Blocks(blocks),
                    });
                }
            };
            for _ in 0..piece.count {
                let index = blocks.taken;
                let slot = BlockNo(blocks.block + index).slot();
                let present = self.effective(piece.key, at, slot, draft);
                let is_begun = blocks.parts > 0;
                let is_kept = !is_begun
                    && match present.state.is_there() {
                        true => present.seq >= live_from.0,
                        // Nothing takes the place of nothing.
                        false => blocks.kind == Kind::Void,
                    };
                if is_kept {
                    blocks.taken += 1;
                    continue;
                }
                self.keep_end(blocks.shard, present);
                if !self.push_repair(&mut blocks, index, at, draft) {
                    return Taken::Rest(Op {
                        id,
                        kind: OpKind::Blocks(blocks),
                    });
                }
                blocks.taken += 1;
            }
        }
        let id = id.expect("only requests repair");
        if draft.is_empty() && self.flights.is_empty() {
            // Nothing won and nothing is on the way: whatever beat it is already applied.
            effects.push(crate::store::done(id));
        } else if draft.is_empty() {
            let flight = self.flights.back_mut().expect("not empty");
            flight.waiters.push(Waiter {
                id,
                is_durable: false,
            });
        } else {
            draft.waiters.push(Waiter {
                id,
                is_durable: false,
            });
        }
        Taken::All
    }

    /// A repair over the block that made the shard's end: say the end by itself, since that block goes away.
    fn keep_end(&mut self, shard: ShardId, present: Slot) {
        let Some(known) = self.ledger.shards.get(&shard) else {
            return;
        };
        if present.state == State::Absent || present.is_no_end || present.seq != known.end_submitted {
            return;
        }
        self.say_end(shard);
    }

    /// What makes the shard's end does not live, so its segment may be used again: the end is said by itself.
    fn say_end(&mut self, shard: ShardId) {
        let is_said = self.queue.back().is_some_and(
            |op| matches!(op.kind, OpKind::SetEnd { shard: other, end: END_AS_IS } if other == shard),
        );
        if !is_said {
            self.queue.push_back(Op::set_end_as_is(shard));
        }
    }

    fn push_repair(&mut self, blocks: &mut Blocks<B>, index: u32, at: CacheAt, draft: &mut Draft<B>) -> bool {
        let is_data = blocks.data.is_some();
        let block = blocks.block + index;
        let continues = draft.entries.last().is_some_and(|last| {
            last.kind == blocks.kind
                && last.flags == FLAG_NO_END
                && last.shard == blocks.shard.to_u64()
                && last.layer == blocks.layer.0
                && last.seq == blocks.seq
                && last.block + last.count == block
                && BlockNo(block).slot() != 0
        });
        match draft.room() {
            Some(room) if room > 0 || !is_data => {}
            _ => return false,
        }
        if blocks.kind == Kind::Void {
            return self.push_void(blocks, index, draft);
        }
        if continues {
            draft.entries.last_mut().expect("looked at").count += 1;
        } else {
            draft.push(blocks.entry(index, 1, FLAG_NO_END));
            if is_data {
                self.cache.pin(at);
                draft.hold(at);
            }
        }
        if let Some((data, crcs)) = &blocks.data {
            let entry = blocks.entry(index, 1, FLAG_NO_END);
            let bytes = BLOCK_BYTES as usize;
            let sum = types::bind(entry.sum_key(0), crcs[index as usize]);
            draft.push_block(data.slice(index as usize * bytes, bytes), sum.0);
        }
        true
    }

    /// What a block will hold when everything in flight and in the draft is applied.
    pub(crate) fn effective(&self, key: LeafKey, at: CacheAt, slot: usize, draft: &Draft<B>) -> Slot {
        let block = key.leaf.first_block().0 + slot as u32;
        let leaf = self.cache.get(at).leaf.as_ref().expect("a leaf that is here");
        let mut present = leaf.get(slot);
        let under_way = self.flights.iter().flat_map(|flight| &flight.entries);
        for entry in under_way.chain(&draft.entries) {
            if entry.shard != key.shard.to_u64() {
                continue;
            }
            if entry.kind == Kind::Drop && entry.birth >= present.birth {
                present = Slot::default();
            }
            let covers = entry.kind.is_blocks()
                && (entry.block..entry.block + entry.count).contains(&block)
                && self.ledger.home(key.shard, LayerId(entry.layer)) == key.layer;
            if !covers {
                continue;
            }
            let below = key.layer.0 - entry.layer;
            if entry.kind == Kind::Void {
                let reach = below..=below + entry.seq as u32;
                if reach.contains(&present.below) && present.birth < entry.birth {
                    present = Slot::default();
                }
                continue;
            }
            let coming = Slot {
                state: match entry.kind {
                    Kind::Data => State::Data,
                    _ => State::Zero,
                },
                is_no_end: !entry.advances_end(),
                seq: entry.seq,
                birth: entry.birth,
                address: 0,
                sum: 0,
                below,
            };
            if !present.state.is_there() || !present.beats(&coming) {
                present = coming;
            }
        }
        present
    }

    /// Whether no further leaf may be changed now: appends under way hold many, or the next checkpoint would be larger
    /// than there is memory for. Both end without anything new being appended.
    pub(crate) fn must_wait_for_leaves(&self) -> bool {
        let is_pinned = self.cache.is_half_pinned() && !self.flights.is_empty();
        is_pinned || (self.cache.is_save_full() && self.checkpoint.is_saving())
    }

    /// Brings the leaves of a data entry to memory and holds them there until it is applied.
    fn hold_leaves(&mut self, entry: &Entry, draft: &mut Draft<B>, effects: &mut Vec<Effect<B>>) -> bool {
        if self.must_wait_for_leaves() {
            return false;
        }
        let held_before = draft.leaves.len();
        let home = self.ledger.home(entry.shard_id(), LayerId(entry.layer));
        for piece in pieces(entry.shard_id(), home, entry.block, entry.count) {
            match self.locate_or_make(piece.key, 0, effects) {
                // While others are folded into it, one of those is what is waited for.
                LeafPlace::Ready(at) | LeafPlace::Loading(at) if self.cache.get(at).key == piece.key => {
                    self.cache.pin(at);
                    draft.hold(at);
                }
                LeafPlace::Ready(_) | LeafPlace::Loading(_) | LeafPlace::Nowhere | LeafPlace::NoMemory => {
                    for at in draft.leaves.drain(held_before..) {
                        self.cache.unpin(at);
                    }
                    return false;
                }
            }
        }
        true
    }

    /// Numbers the draft and hands it to the disk.
    pub(crate) fn launch(&mut self, draft: Draft<B>, effects: &mut Vec<Effect<B>>) {
        let Draft {
            number,
            entries,
            sums,
            inline,
            data,
            waiters,
            leaves,
            is_cleaning,
            ..
        } = draft;
        assert_eq!(number, self.number + 1, "batches are numbered without a gap");
        self.number = number;
        let header = Header {
            key: self.open.key,
            number,
            complete_upto: self.applied,
            durable_upto: self.syncs.durable,
            entries,
            sums,
            inline,
        };
        self.witness.launched(&header);
        let segment = self.open.index;
        let address = self.ledger.segments.geometry.start(segment) + u64::from(self.open.next);
        self.open.next += header.blocks();
        assert!(
            self.open.next <= self.ledger.segments.geometry.segment_blocks,
            "a batch fits its segment"
        );
        self.ledger.segments.pin(segment);
        self.checkpoint.log_bytes += u64::from(header.blocks()) * BLOCK_BYTES;
        self.stats.batches += 1;
        let block = self.spares.encode(&header);
        self.flights.push_back(Flight {
            number,
            segment,
            generation: header.key.generation,
            address,
            entries: header.entries,
            sums: header.sums,
            inline: header.inline,
            waiters,
            leaves,
            is_written: false,
            is_cleaning,
            progress: Progress::default(),
        });
        let offset = address * BLOCK_BYTES;
        self.submit(
            Io::Append(number),
            DiskOp::Write {
                offset,
                header: block,
                data,
            },
            effects,
        );
    }
}

impl<B: Payload> Op<B> {
    /// Says the shard's end, whatever it is by then.
    pub(crate) fn set_end_as_is(shard: ShardId) -> Op<B> {
        Op {
            id: None,
            kind: OpKind::SetEnd {
                shard,
                end: END_AS_IS,
            },
        }
    }
}

impl<B: Payload> Blocks<B> {
    fn entry(&self, index: u32, count: u32, flags: u8) -> Entry {
        debug_assert_eq!(flags & FLAG_RELOCATED, 0);
        Entry {
            kind: self.kind,
            flags,
            shard: self.shard.to_u64(),
            layer: self.layer.0,
            block: self.block + index,
            count,
            seq: self.seq,
            birth: 0,
        }
    }

    /// Puts an entry with its data, in one piece, into the draft.
    fn push(&self, entry: Entry, index: u32, draft: &mut Draft<B>) {
        draft.push(entry);
        if let Some((data, crcs)) = &self.data {
            let bytes = BLOCK_BYTES as usize;
            let (first, count) = (index as usize, entry.count as usize);
            draft.data.push(data.slice(first * bytes, count * bytes));
            let sums = crcs[first..first + count].iter().zip(0..);
            draft
                .sums
                .extend(sums.map(|(crc, at)| types::bind(entry.sum_key(at), *crc).0));
        }
    }
}
