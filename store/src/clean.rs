//! Cleaning: what still counts in a segment is logged again, sorted, and the segment becomes free.
//!
//! ```text
//!  pick victim ──▶ Reading (1 MiB at a time) ──▶ Moving (sorted by shard, layer, block) ──▶ Draining ──▶ emptied
//! ```
//! A block is moved only if it will still be current when everything in flight is applied: so a dead version
//! never comes to lie behind the entry that killed it, and entries may be forgotten with the oldest segment.
//!
//! What is not data is kept as follows. Clears: as long as they are current, like data, because they also hide
//! what layers below hold. Drops: until their segment is the oldest, because older ones may hold what they made
//! void. Records and ends: as long as they are the shard's last word. Data that fails its checksum becomes [`Kind::Lost`]: readers go on being told, and the segment can be used again.

use std::collections::BTreeSet;

use edge::DiskOp;
use types::{BLOCK_BYTES, BlockNo, LayerId, LeafNo, Payload, Seq, ShardId, SumKey};

use crate::append::Draft;
use crate::batch::{Entry, FLAG_NO_END, FLAG_RELOCATED, Header, Kind};
use crate::leaf::{SLOTS, State, pieces};
use crate::read::kind_of;
use crate::segment::{SegmentHeader, Stage};
use crate::store::{Io, LeafPlace, Store};
use crate::{Effect, LeafKey};

const CHUNK_BLOCKS: u32 = 256;
const CHUNKS_UNDER_WAY: usize = 4;
/// Leaves asked for ahead of the block being moved.
const LEAVES_AHEAD: usize = 16;
/// Blocks that may be moved per tick when no guest writes.
const BLOCKS_PER_TICK: u32 = 1024;
const CREDIT_MAX: u32 = 8192;
/// After finding no victim, look again only when this many blocks died.
const DEATHS_BEFORE_NEXT_LOOK: u64 = 64;

/// Paces cleaning and holds the segment being cleaned.
pub(crate) struct Cleaner<B> {
    job: Option<Job<B>>,
    /// Blocks that may be moved.
    credit: u32,
    /// Blocks to move for each that guests append, when space is short.
    ratio: u32,
    /// Count of changes at which there was nothing worth cleaning.
    found_nothing_at: Option<u64>,
}

impl<B> Default for Cleaner<B> {
    fn default() -> Cleaner<B> {
        Cleaner {
            job: None,
            credit: 0,
            ratio: 0,
            found_nothing_at: None,
        }
    }
}

impl<B> Cleaner<B> {
    pub(crate) fn tick(&mut self) {
        self.credit = (self.credit + BLOCKS_PER_TICK).min(CREDIT_MAX);
        self.found_nothing_at = None;
    }

    /// Guests appended so many blocks.
    pub(crate) fn earn(&mut self, blocks: u32) {
        self.credit = (self.credit + blocks.saturating_mul(self.ratio)).min(CREDIT_MAX);
    }

    pub(crate) fn is_running(&self) -> bool {
        self.job.is_some()
    }
}

struct Job<B> {
    victim: u32,
    is_oldest: bool,
    chunks: Vec<Chunk<B>>,
    asked: usize,
    under_way: usize,
    phase: Phase,
}

enum Phase {
    Reading,
    Moving(Box<Moving>),
    /// Everything is logged; waiting for the batch of this number.
    Draining(u64),
}

enum Chunk<B> {
    Missing,
    Whole {
        data: B,
        is_second_try: bool,
    },
    /// It could not be read in one piece: what could be read of it.
    Blocks(Vec<Option<B>>),
}

/// What the segment holds that may still count.
#[derive(Default)]
struct Moving {
    data: Vec<DataItem>,
    data_at: usize,
    clears: Vec<Entry>,
    clears_at: usize,
    /// Blocks of the current clear already dealt with.
    clear_blocks: u32,
    notes: Vec<Entry>,
    notes_at: usize,
    /// Shards whose end must be said again.
    ends: BTreeSet<ShardId>,
    /// Of the last batch with something moved.
    last_number: u64,
}

struct DataItem {
    key: LeafKey,
    slot: usize,
    /// From the segment's start.
    position: u32,
    sum: u32,
    seq: u64,
}

/// Why a draft is not filled further.
#[derive(PartialEq, Eq)]
enum Pause {
    /// It is full, or the credit is used up: send it.
    Full,
    /// A leaf or a chunk is on its way.
    Wait,
    /// Everything was looked at.
    End,
}

impl<B: Payload> Job<B> {
    fn block(&self, position: u32) -> Option<B> {
        let bytes = BLOCK_BYTES as usize;
        let at = (position % CHUNK_BLOCKS) as usize;
        match &self.chunks[(position / CHUNK_BLOCKS) as usize] {
            Chunk::Missing => None,
            Chunk::Whole { data, .. } => Some(data.slice(at * bytes, bytes)),
            Chunk::Blocks(blocks) => blocks[at].clone(),
        }
    }
}

impl<B: Payload> Store<B> {
    /// Whether free segments are short and there is, as far as is known, something to gain.
    pub(crate) fn wants_cleaning(&self) -> bool {
        let coming = self.ledger.segments.emptied() as u32 + self.checkpoint.emptied_count();
        self.free_segments() + coming < self.settings.clean_below_free && !self.has_no_victim()
    }

    /// Whether the last search found nothing, and nothing much has changed since.
    fn has_no_victim(&self) -> bool {
        let changes = self.ledger.segments.changes();
        self.cleaner
            .found_nothing_at
            .is_some_and(|at| changes < at + DEATHS_BEFORE_NEXT_LOOK)
    }

    /// Guests wait: cleaning may use everything.
    fn is_urgent(&self) -> bool {
        self.free_segments() <= self.settings.segments_reserved + 1
    }

    pub(crate) fn clean(&mut self, effects: &mut Vec<Effect<B>>) {
        self.set_ratio();
        let Some(mut job) = self.cleaner.job.take() else {
            return self.pick_victim(effects);
        };
        let is_done = match &mut job.phase {
            Phase::Reading => {
                self.ask_chunks(&mut job, effects);
                false
            }
            Phase::Moving(_) => {
                self.move_some(&mut job, effects);
                false
            }
            Phase::Draining(upto) => *upto <= self.applied,
        };
        if is_done {
            self.finish_victim(&job);
            self.pick_victim(effects);
        } else {
            self.cleaner.job = Some(job);
        }
    }

    fn set_ratio(&mut self) {
        let below = self.settings.clean_below_free;
        let short = below.saturating_sub(self.free_segments());
        // From one for one where cleaning starts to nine for one where guests would have to wait.
        self.cleaner.ratio = if short == 0 {
            0
        } else {
            1 + 8 * short / below.max(1)
        };
    }

    fn pick_victim(&mut self, effects: &mut Vec<Effect<B>>) {
        if self.cleaner.job.is_some() || !self.wants_cleaning() {
            return;
        }
        let geometry = self.ledger.segments.geometry;
        let oldest_in_flight = self.flights.front().map_or(u64::MAX, |flight| flight.generation);
        // Moving nearly full segments gains nothing: a sixteenth must be dead.
        let live_max = geometry.segment_blocks - (geometry.segment_blocks / 16).max(3);
        let victim = self
            .ledger
            .segments
            .iter()
            .filter(|(_, segment)| segment.stage == Stage::Closed && !segment.is_stuck)
            .filter(|(_, segment)| segment.generation < oldest_in_flight && segment.live <= live_max)
            .filter(|(_, segment)| segment.live > 0 || segment.notes > 0)
            .min_by_key(|(_, segment)| (segment.live, segment.generation));
        let Some((victim, segment)) = victim else {
            self.cleaner.found_nothing_at = Some(self.ledger.segments.changes());
            return;
        };
        let is_oldest = segment.generation == self.ledger.segments.floor();
        let chunks = geometry.segment_blocks.div_ceil(CHUNK_BLOCKS);
        self.ledger.segments.pin(victim);
        let mut job = Job {
            victim,
            is_oldest,
            chunks: (0..chunks).map(|_| Chunk::Missing).collect(),
            asked: 0,
            under_way: 0,
            phase: Phase::Reading,
        };
        self.ask_chunks(&mut job, effects);
        self.cleaner.job = Some(job);
    }

    fn chunk_blocks(&self, chunk: usize) -> u32 {
        let first = chunk as u32 * CHUNK_BLOCKS;
        CHUNK_BLOCKS.min(self.ledger.segments.geometry.segment_blocks - first)
    }

    fn ask_chunks(&mut self, job: &mut Job<B>, effects: &mut Vec<Effect<B>>) {
        while job.asked < job.chunks.len() && job.under_way < CHUNKS_UNDER_WAY {
            self.ask_chunk(job, job.asked, effects);
            job.asked += 1;
        }
    }

    fn ask_chunk(&mut self, job: &mut Job<B>, chunk: usize, effects: &mut Vec<Effect<B>>) {
        let first = self.ledger.segments.geometry.start(job.victim) + u64::from(chunk as u32 * CHUNK_BLOCKS);
        let bytes = self.chunk_blocks(chunk) * BLOCK_BYTES as u32;
        job.under_way += 1;
        let operation = DiskOp::Read {
            offset: first * BLOCK_BYTES,
            bytes,
        };
        self.submit(Io::Clean { chunk, block: None }, operation, effects);
    }

    pub(crate) fn clean_read_done(
        &mut self,
        chunk: usize,
        block: Option<usize>,
        data: Option<B>,
        effects: &mut Vec<Effect<B>>,
    ) {
        let mut job = self.cleaner.job.take().expect("cleaning reads for a job");
        job.under_way -= 1;
        match (block, data) {
            (Some(block), data) => {
                let Chunk::Blocks(blocks) = &mut job.chunks[chunk] else {
                    unreachable!("asked block by block")
                };
                blocks[block] = data;
            }
            (None, Some(data)) => {
                let is_second_try = matches!(job.chunks[chunk], Chunk::Whole { .. });
                job.chunks[chunk] = Chunk::Whole { data, is_second_try };
            }
            (None, None) => self.ask_blocks(&mut job, chunk, effects),
        }
        if job.under_way == 0 && job.asked == job.chunks.len() && matches!(job.phase, Phase::Reading) {
            job.phase = self.sort_out(&job);
        }
        self.cleaner.job = Some(job);
    }

    /// One bad block must not hide its neighbours.
    fn ask_blocks(&mut self, job: &mut Job<B>, chunk: usize, effects: &mut Vec<Effect<B>>) {
        let count = self.chunk_blocks(chunk) as usize;
        let first = self.ledger.segments.geometry.start(job.victim) + u64::from(chunk as u32 * CHUNK_BLOCKS);
        job.chunks[chunk] = Chunk::Blocks(vec![None; count]);
        for block in 0..count {
            job.under_way += 1;
            let operation = DiskOp::Read {
                offset: (first + block as u64) * BLOCK_BYTES,
                bytes: BLOCK_BYTES as u32,
            };
            self.submit(
                Io::Clean {
                    chunk,
                    block: Some(block),
                },
                operation,
                effects,
            );
        }
    }

    /// Walks the segment's batches and notes what may still count.
    fn sort_out(&self, job: &Job<B>) -> Phase {
        let mut moving = Moving {
            last_number: self.number,
            ..Moving::default()
        };
        let header = job
            .block(0)
            .and_then(|block| SegmentHeader::decode(block.bytes()));
        let generation = self.ledger.segments.get(job.victim).generation;
        let Some(header) = header.filter(|header| header.key.generation == generation) else {
            return Phase::Draining(self.applied);
        };
        let mut position = 1;
        while position < self.ledger.segments.geometry.segment_blocks {
            let batch = job
                .block(position)
                .and_then(|block| Header::decode(block.bytes(), header.key));
            let Some(batch) = batch else {
                position += 1;
                continue;
            };
            self.sort_out_batch(&batch, position, &mut moving);
            position += batch.blocks();
        }
        moving
            .data
            .sort_unstable_by_key(|item| (item.key, item.slot, item.position));
        Phase::Moving(Box::new(moving))
    }

    fn sort_out_batch(&self, batch: &Header, position: u32, moving: &mut Moving) {
        for (entry, first_sum, _) in batch.walk() {
            let id = entry.shard_id();
            let Some(shard) = self.ledger.shards.get(&id) else {
                continue;
            };
            match entry.kind {
                Kind::Open | Kind::Checkpoint => continue,
                Kind::Drop => {
                    if entry.birth == shard.drop_birth {
                        moving.notes.push(*entry);
                    }
                    continue;
                }
                _ if entry.birth < shard.drop_birth => continue,
                Kind::Record if entry.birth == shard.record_birth => moving.notes.push(*entry),
                Kind::SetEnd if entry.birth == shard.end_birth => drop(moving.ends.insert(id)),
                Kind::Record | Kind::SetEnd => {}
                Kind::Data => sort_out_data(entry, position, &batch.sums[first_sum..], first_sum, moving),
                Kind::Zero | Kind::Trim | Kind::Lost => moving.clears.push(*entry),
            }
            if entry.kind.is_blocks() && entry.advances_end() && entry.seq >= shard.end_submitted {
                moving.ends.insert(id);
            }
        }
    }

    fn move_some(&mut self, job: &mut Job<B>, effects: &mut Vec<Effect<B>>) {
        loop {
            let is_paced = !self.is_urgent();
            if is_paced && self.cleaner.credit == 0 {
                return;
            }
            // The last append in flight is left to guests.
            let limit = self.settings.appends_in_flight;
            if limit > 1 && is_paced && self.flights.len() + 1 >= limit {
                return;
            }
            if self.must_wait_for_leaves() {
                return;
            }
            let Some(mut draft) = self.draft(effects) else {
                return;
            };
            let pause = self.fill_moving(job, &mut draft, effects);
            let moved = draft.blocks() as u32;
            if !draft.is_empty() {
                self.cleaner.credit = self.cleaner.credit.saturating_sub(moved.max(1));
                self.stats.cleaned_blocks += u64::from(moved);
                let Phase::Moving(moving) = &mut job.phase else {
                    unreachable!("called while moving")
                };
                moving.last_number = draft.number;
                self.launch(draft, effects);
            } else {
                self.spares.keep_draft(draft);
            }
            match pause {
                Pause::Full => {}
                Pause::Wait => return,
                Pause::End => {
                    let Phase::Moving(moving) = &job.phase else {
                        unreachable!("called while moving")
                    };
                    job.phase = Phase::Draining(moving.last_number);
                    return;
                }
            }
        }
    }

    fn fill_moving(&mut self, job: &mut Job<B>, draft: &mut Draft<B>, effects: &mut Vec<Effect<B>>) -> Pause {
        let Phase::Moving(moving) = &mut job.phase else {
            unreachable!("called while moving")
        };
        let mut moving = std::mem::take(moving);
        let mut pause = self.fill_data(job, &mut moving, draft, effects);
        if pause == Pause::End {
            pause = self.fill_clears(&mut moving, draft, effects);
        }
        if pause == Pause::End {
            pause = self.fill_notes(job.is_oldest, &mut moving, draft);
        }
        job.phase = Phase::Moving(moving);
        pause
    }

    fn fill_data(
        &mut self,
        job: &mut Job<B>,
        moving: &mut Moving,
        draft: &mut Draft<B>,
        effects: &mut Vec<Effect<B>>,
    ) -> Pause {
        let start = self.ledger.segments.geometry.start(job.victim);
        while let Some(item) = moving.data.get(moving.data_at) {
            let is_used_up = !self.is_urgent() && draft.blocks() as u32 >= self.cleaner.credit;
            if is_used_up || draft.room().is_none_or(|room| room == 0) {
                return Pause::Full;
            }
            let at = match self.locate(item.key, 0, effects) {
                LeafPlace::Ready(at) => at,
                LeafPlace::Nowhere => {
                    moving.data_at += 1;
                    continue;
                }
                LeafPlace::Loading(_) => {
                    self.load_ahead(moving, effects);
                    return Pause::Wait;
                }
                LeafPlace::NoMemory => return Pause::Wait,
            };
            let slot = self.cache.get(at).leaf.as_ref().expect("ready").get(item.slot);
            let address = start + u64::from(item.position);
            let is_current = slot.state == State::Data
                && slot.address == address
                && self.effective(item.key, at, item.slot, draft).birth == slot.birth;
            if !is_current {
                moving.data_at += 1;
                continue;
            }
            let block = BlockNo(item.key.leaf.first_block().0 + item.slot as u32);
            let key = SumKey {
                shard: item.key.shard,
                layer: item.key.layer,
                block,
                seq: Seq(slot.seq),
            };
            debug_assert!(
                slot.sum == item.sum && slot.seq == item.seq,
                "the log and the index agree"
            );
            let data = job.block(item.position);
            let good = data.filter(|data| types::bind(key, types::crc32c(data.bytes())).0 == slot.sum);
            let entry = Entry {
                kind: if good.is_some() { Kind::Data } else { Kind::Lost },
                flags: FLAG_RELOCATED | if slot.is_no_end { FLAG_NO_END } else { 0 },
                shard: key.shard.to_u64(),
                layer: key.layer.0,
                block: block.0,
                count: 1,
                seq: slot.seq,
                birth: slot.birth,
            };
            match good {
                Some(data) => {
                    if !extends(draft, &entry) {
                        draft.push(entry);
                        self.cache.pin(at);
                        draft.hold(at);
                    }
                    draft.push_block(data, slot.sum);
                }
                None => {
                    let chunk = (item.position / CHUNK_BLOCKS) as usize;
                    if matches!(
                        job.chunks[chunk],
                        Chunk::Whole {
                            is_second_try: false,
                            ..
                        }
                    ) {
                        if job.under_way == 0 {
                            self.ask_chunk(job, chunk, effects);
                        }
                        return Pause::Wait;
                    }
                    self.stats.corrupt_blocks += 1;
                    draft.push(entry);
                }
            }
            moving.data_at += 1;
        }
        Pause::End
    }

    fn load_ahead(&mut self, moving: &Moving, effects: &mut Vec<Effect<B>>) {
        let mut last = moving.data[moving.data_at].key;
        let mut asked = 0;
        for item in &moving.data[moving.data_at..] {
            if item.key != last {
                self.locate(item.key, 0, effects);
                last = item.key;
                asked += 1;
                if asked == LEAVES_AHEAD {
                    return;
                }
            }
        }
    }

    fn fill_clears(
        &mut self,
        moving: &mut Moving,
        draft: &mut Draft<B>,
        effects: &mut Vec<Effect<B>>,
    ) -> Pause {
        while let Some(entry) = moving.clears.get(moving.clears_at).copied() {
            let done = moving.clear_blocks;
            let (block, count) = (entry.block + done, entry.count - done);
            for piece in pieces(entry.shard_id(), LayerId(entry.layer), block, count) {
                let at = match self.locate(piece.key, 0, effects) {
                    LeafPlace::Ready(at) => at,
                    LeafPlace::Nowhere => {
                        moving.clear_blocks += piece.count as u32;
                        continue;
                    }
                    LeafPlace::Loading(_) | LeafPlace::NoMemory => return Pause::Wait,
                };
                for slot_at in piece.slot..piece.slot + piece.count {
                    let slot = self.cache.get(at).leaf.as_ref().expect("ready").get(slot_at);
                    let is_current = slot.state != State::Absent
                        && slot.state != State::Data
                        && slot.birth == entry.birth
                        && self.effective(piece.key, at, slot_at, draft).birth == slot.birth;
                    if is_current {
                        if draft.room().is_none() {
                            return Pause::Full;
                        }
                        let moved = Entry {
                            kind: kind_of(slot.state),
                            flags: FLAG_RELOCATED | if slot.is_no_end { FLAG_NO_END } else { 0 },
                            block: piece.key.leaf.first_block().0 + slot_at as u32,
                            count: 1,
                            ..entry
                        };
                        if !extends(draft, &moved) {
                            draft.push(moved);
                        }
                    }
                    moving.clear_blocks += 1;
                }
            }
            moving.clears_at += 1;
            moving.clear_blocks = 0;
        }
        Pause::End
    }

    fn fill_notes(&mut self, is_oldest: bool, moving: &mut Moving, draft: &mut Draft<B>) -> Pause {
        while let Some(entry) = moving.notes.get(moving.notes_at).copied() {
            let Some(shard) = self.ledger.shards.get_mut(&entry.shard_id()) else {
                moving.notes_at += 1;
                continue;
            };
            let is_current = match entry.kind {
                Kind::Record => entry.birth == shard.record_birth && shard.is_known,
                _ => entry.birth == shard.drop_birth,
            };
            let is_forgotten = entry.kind == Kind::Drop && is_oldest && !shard.is_purging;
            if is_current && is_forgotten {
                shard.drop_birth = 0;
                self.ledger.dirty_shards.insert(entry.shard_id());
            } else if is_current {
                let inline: &[u8] = if entry.kind == Kind::Record {
                    &shard.record
                } else {
                    &[]
                };
                if !draft.has_inline_room(inline.len()) {
                    return Pause::Full;
                }
                draft.push_note(
                    Entry {
                        flags: entry.flags | FLAG_RELOCATED,
                        ..entry
                    },
                    inline,
                );
            }
            moving.notes_at += 1;
        }
        while let Some(id) = moving.ends.first().copied() {
            if let Some(shard) = self.ledger.shards.get(&id).filter(|shard| shard.is_there()) {
                if !draft.has_inline_room(0) {
                    return Pause::Full;
                }
                draft.push(Entry {
                    kind: Kind::SetEnd,
                    flags: 0,
                    shard: id.to_u64(),
                    layer: 0,
                    block: 0,
                    count: 0,
                    seq: shard.end_submitted,
                    birth: 0,
                });
            }
            moving.ends.pop_first();
        }
        Pause::End
    }

    fn finish_victim(&mut self, job: &Job<B>) {
        let segments = &mut self.ledger.segments;
        if segments.get(job.victim).live == 0 {
            segments.forget_notes(job.victim);
        } else {
            // Part of it could not be read. What is in it stays where it is, and stays known as unreadable.
            segments.set_stuck(job.victim);
        }
        segments.unpin(job.victim);
        self.cleaner.found_nothing_at = None;
    }

    /// Says when guests begin and cease to wait for space that cleaning cannot make.
    pub(crate) fn tell_full(&mut self, effects: &mut Vec<Effect<B>>) {
        let reserved = self.settings.segments_reserved;
        let is_at_capacity = self.ledger.segments.live_blocks() + 1 >= self.ledger.capacity_blocks(reserved);
        let is_stuck = !self.cleaner.is_running() && !self.checkpoint.is_running() && !self.wants_cleaning();
        let is_full = self.held_writes > 0 && (self.is_full || is_at_capacity || is_stuck);
        if is_full != self.is_full {
            self.is_full = is_full;
            effects.push(Effect::Full(is_full));
        }
    }
}

fn sort_out_data(entry: &Entry, position: u32, sums: &[u32], first_sum: usize, moving: &mut Moving) {
    for index in 0..entry.count {
        let block = BlockNo(entry.block + index);
        moving.data.push(DataItem {
            key: LeafKey {
                shard: entry.shard_id(),
                layer: LayerId(entry.layer),
                leaf: LeafNo(block.0 / SLOTS as u32),
            },
            slot: block.slot(),
            position: position + 1 + first_sum as u32 + index,
            sum: sums[index as usize],
            seq: entry.seq,
        });
    }
}

/// Joins an entry of one block to the draft's last entry if it goes on where that ends, in the same leaf.
fn extends<B: Payload>(draft: &mut Draft<B>, entry: &Entry) -> bool {
    let Some(last) = draft.entries.last_mut() else {
        return false;
    };
    let goes_on = Entry {
        block: entry.block,
        count: 1,
        ..*last
    } == *entry
        && last.block + last.count == entry.block
        && BlockNo(entry.block).slot() != 0;
    last.count += u32::from(goes_on);
    goes_on
}
