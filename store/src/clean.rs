//! Cleaning: what still counts in a segment is logged again, sorted, and the segment becomes free.
//!
//! ```text
//!                                  ┌──────── until all of it was looked at ─────────┐
//!                                  ▼                                                │
//!  victim ──▶ Scanning headers ──▶ choose what lives ──▶ read those runs ──▶ move (sorted by shard, layer, block)
//!             (content skipped)    (leaves)             (at most cleaning_bytes)    │
//!                                                                                   └──▶ Draining ──▶ emptied
//! ```
//! Here is the life of a job and what it reads; `victim.rs` has choice and pace, `moving.rs` what is logged.
//!
//! A block is moved only if it will still be current when everything in flight is applied: so a dead version
//! never comes to lie behind the entry that killed it.

use std::collections::BTreeMap;

use edge::DiskOp;
use types::{BLOCK_BYTES, Payload};

use crate::Effect;
use crate::batch::{Header, SegmentKey};
use crate::moving::{Moving, Step};
use crate::segment::SegmentHeader;
use crate::store::{Io, Store};
use crate::victim::Pace;

/// The longest read.
const RUN_BLOCKS_MAX: u32 = 256;
/// Reads of a megabyte at most that are under way at once.
const RUNS_UNDER_WAY: usize = 4;
/// Dead blocks between live ones that are read rather than skipped by a second read.
const GAP_BLOCKS_MAX: u32 = 8;
/// Headers are looked for in reads of this length, as long as batches are short.
const WINDOW_BLOCKS: u32 = 64;
/// Batches of this length and more are stepped over: one block is read for each.
const LONG_BATCH_BLOCKS: u32 = 16;
/// After finding no victim, look again only when this many blocks died.
const DEATHS_BEFORE_NEXT_LOOK: u64 = 64;

/// Paces cleaning and holds the segment being cleaned.
pub(crate) struct Cleaner<B> {
    job: Option<Job<B>>,
    pub(crate) pace: Pace,
    /// Count of changes at which there was nothing worth cleaning.
    found_nothing_at: Option<u64>,
}

impl<B> Default for Cleaner<B> {
    fn default() -> Cleaner<B> {
        Cleaner {
            job: None,
            pace: Pace::default(),
            found_nothing_at: None,
        }
    }
}

impl<B> Cleaner<B> {
    pub(crate) fn tick(&mut self) {
        self.pace.tick();
        self.found_nothing_at = None;
    }

    pub(crate) fn is_running(&self) -> bool {
        self.job.is_some()
    }
}

/// What a read of cleaning's brings, in blocks from the victim's start.
#[derive(Clone, Copy)]
pub(crate) struct Piece {
    first: u32,
    count: u32,
    /// A block by itself, not a planned run.
    is_alone: bool,
}

impl Piece {
    fn run(first: u32, count: u32) -> Piece {
        Piece {
            first,
            count,
            is_alone: false,
        }
    }
}

/// A segment being cleaned.
struct Job<B> {
    victim: u32,
    content: Content<B>,
    phase: Phase,
}

enum Phase {
    Scanning(Box<Scan>),
    Moving(Box<Moving>),
    /// Everything is logged; waiting for the batch of this number.
    Draining(u64),
}

/// How far the headers are read.
#[derive(Default)]
struct Scan {
    /// Known once the segment's own header is read.
    key: Option<SegmentKey>,
    /// Where the next batch begins, from the segment's start.
    at: u32,
    /// Up to here a read failed: block by block.
    careful_until: u32,
    is_batch_long: bool,
    found: Moving,
}

/// What is in memory of the victim.
pub(crate) struct Content<B> {
    runs: Vec<Run<B>>,
    /// Blocks read by themselves, because their run failed or their sum did; `None` is unreadable.
    alone: BTreeMap<u32, Option<B>>,
    asked: usize,
    under_way: usize,
}

struct Run<B> {
    first: u32,
    count: u32,
    data: Option<B>,
}

/// What is known of a block's content.
pub(crate) enum Found<B> {
    /// As its run brought it.
    InRun(B),
    /// As a read of this block alone brought it.
    Alone(Option<B>),
    /// A read is under way.
    Coming,
}

impl<B> Default for Content<B> {
    fn default() -> Content<B> {
        Content {
            runs: Vec::new(),
            alone: BTreeMap::new(),
            asked: 0,
            under_way: 0,
        }
    }
}

impl<B: Payload> Content<B> {
    /// Plans reads of ascending `positions`; how many of them fit into `budget` blocks.
    pub(crate) fn plan(&mut self, positions: impl Iterator<Item = u32>, budget: u32) -> usize {
        assert!(self.under_way == 0, "the last window is done");
        *self = Content::default();
        let (mut planned, mut blocks) = (0, 0);
        for position in positions {
            let goes_on = self.runs.last().is_some_and(|run| {
                position - (run.first + run.count) <= GAP_BLOCKS_MAX && position - run.first < RUN_BLOCKS_MAX
            });
            let end = self.runs.last().map_or(0, |run| run.first + run.count);
            let more = if goes_on { position + 1 - end } else { 1 };
            if planned > 0 && blocks + more > budget {
                break;
            }
            match self.runs.last_mut().filter(|_| goes_on) {
                Some(run) => run.count += more,
                None => self.runs.push(Run {
                    first: position,
                    count: 1,
                    data: None,
                }),
            }
            blocks += more;
            planned += 1;
        }
        planned
    }

    pub(crate) fn is_here(&self) -> bool {
        self.under_way == 0 && self.asked == self.runs.len()
    }

    pub(crate) fn get(&self, position: u32) -> Found<B> {
        if let Some(block) = self.alone.get(&position) {
            return Found::Alone(block.clone());
        }
        let at = self.runs.partition_point(|run| run.first <= position);
        let run = at.checked_sub(1).map(|at| &self.runs[at]);
        match run.and_then(|run| run.data.as_ref().map(|data| (run, data))) {
            Some((run, data)) if position < run.first + run.count => {
                let bytes = BLOCK_BYTES as usize;
                Found::InRun(data.slice((position - run.first) as usize * bytes, bytes))
            }
            _ => Found::Coming,
        }
    }
}

impl<B: Payload> Store<B> {
    /// Whether the last search found nothing, and nothing much has changed since.
    pub(crate) fn has_no_victim(&self) -> bool {
        let changes = self.ledger.segments.changes();
        self.cleaner
            .found_nothing_at
            .is_some_and(|at| changes < at + DEATHS_BEFORE_NEXT_LOOK)
    }

    pub(crate) fn clean(&mut self, effects: &mut Vec<Effect<B>>) {
        let Some(mut job) = self.cleaner.job.take() else {
            return self.pick_victim(effects);
        };
        if let Phase::Moving(moving) = &mut job.phase {
            let mut moving = std::mem::take(moving);
            let step = self.move_on(job.victim, &mut job.content, &mut moving, effects);
            job.phase = match step {
                Step::Wait => Phase::Moving(moving),
                Step::End => Phase::Draining(moving.last_number),
            };
        }
        if matches!(job.phase, Phase::Draining(upto) if upto <= self.applied) {
            self.finish_victim(&job);
            self.pick_victim(effects);
        } else {
            self.cleaner.job = Some(job);
        }
    }

    fn pick_victim(&mut self, effects: &mut Vec<Effect<B>>) {
        if self.cleaner.job.is_some() || !self.wants_cleaning() {
            return;
        }
        let Some(victim) = self.choose_victim() else {
            self.cleaner.found_nothing_at = Some(self.ledger.segments.changes());
            return;
        };
        self.ledger.segments.pin(victim);
        let mut job = Job {
            victim,
            content: Content::default(),
            phase: Phase::Scanning(Box::new(Scan {
                found: Moving::new(self.number),
                ..Scan::default()
            })),
        };
        self.read_piece(victim, &mut job.content, Piece::run(0, WINDOW_BLOCKS), effects);
        self.cleaner.job = Some(job);
    }

    pub(crate) fn clean_read_done(&mut self, piece: Piece, data: Option<B>, effects: &mut Vec<Effect<B>>) {
        let mut job = self.cleaner.job.take().expect("cleaning reads for a job");
        job.content.under_way -= 1;
        match &job.phase {
            Phase::Scanning(_) => self.scan_on(&mut job, piece, data, effects),
            _ => self.content_read(&mut job, piece, data, effects),
        }
        self.cleaner.job = Some(job);
    }

    // ---- headers ----

    /// Walks the batches in what was read and asks for what comes next.
    fn scan_on(&mut self, job: &mut Job<B>, piece: Piece, data: Option<B>, effects: &mut Vec<Effect<B>>) {
        let Piece { first, count, .. } = piece;
        let Phase::Scanning(scan) = &mut job.phase else {
            unreachable!("called while scanning")
        };
        let mut scan = std::mem::take(scan);
        match data {
            // One bad block must not hide its neighbours.
            None if count > 1 => scan.careful_until = first + count,
            None => scan.at = first + 1,
            Some(data) => self.walk_batches(job.victim, &mut scan, first, data.bytes()),
        }
        let segment_blocks = self.ledger.segments.geometry.segment_blocks;
        let at = scan.at;
        let window = match () {
            () if at < scan.careful_until || scan.is_batch_long => 1,
            () => WINDOW_BLOCKS,
        };
        job.phase = if scan.key.is_none() && at > 0 {
            // Without its secret nothing in the segment can be told from guests' data.
            Phase::Draining(self.applied)
        } else if at < segment_blocks {
            self.read_piece(job.victim, &mut job.content, Piece::run(at, window), effects);
            Phase::Scanning(scan)
        } else {
            Phase::Moving(Box::new(scan.found))
        };
    }

    fn walk_batches(&self, victim: u32, scan: &mut Scan, first: u32, bytes: &[u8]) {
        let blocks: Vec<&[u8]> = bytes.chunks_exact(BLOCK_BYTES as usize).collect();
        while let Some(block) = blocks.get((scan.at - first) as usize) {
            let Some(key) = scan.key else {
                let generation = self.ledger.segments.get(victim).generation;
                let header = SegmentHeader::decode(block);
                scan.key = header
                    .map(|header| header.key)
                    .filter(|key| key.generation == generation);
                scan.at = 1;
                if scan.key.is_none() {
                    return;
                }
                continue;
            };
            match Header::decode(block, key) {
                Some(batch) => {
                    self.sort_out_batch(&batch, scan.at, &mut scan.found);
                    scan.is_batch_long = batch.blocks() >= LONG_BATCH_BLOCKS;
                    scan.at += batch.blocks();
                }
                None => {
                    scan.is_batch_long = false;
                    scan.at += 1;
                }
            }
        }
    }

    // ---- content ----

    /// Asks for as many of the planned runs as may be under way.
    pub(crate) fn read_planned(
        &mut self,
        victim: u32,
        content: &mut Content<B>,
        effects: &mut Vec<Effect<B>>,
    ) {
        while content.asked < content.runs.len() && content.under_way < RUNS_UNDER_WAY {
            let run = &content.runs[content.asked];
            let piece = Piece::run(run.first, run.count);
            content.asked += 1;
            self.read_piece(victim, content, piece, effects);
        }
    }

    /// Reads a block by itself, whatever its run brought.
    pub(crate) fn read_alone(
        &mut self,
        victim: u32,
        content: &mut Content<B>,
        position: u32,
        effects: &mut Vec<Effect<B>>,
    ) {
        let piece = Piece {
            is_alone: true,
            ..Piece::run(position, 1)
        };
        self.read_piece(victim, content, piece, effects);
    }

    fn read_piece(
        &mut self,
        victim: u32,
        content: &mut Content<B>,
        mut piece: Piece,
        effects: &mut Vec<Effect<B>>,
    ) {
        let geometry = self.ledger.segments.geometry;
        piece.count = piece.count.min(geometry.segment_blocks - piece.first);
        content.under_way += 1;
        let operation = DiskOp::Read {
            offset: (geometry.start(victim) + u64::from(piece.first)) * BLOCK_BYTES,
            bytes: piece.count * BLOCK_BYTES as u32,
        };
        self.submit(Io::Clean(piece), operation, effects);
    }

    fn content_read(
        &mut self,
        job: &mut Job<B>,
        piece: Piece,
        data: Option<B>,
        effects: &mut Vec<Effect<B>>,
    ) {
        let content = &mut job.content;
        if piece.is_alone {
            content.alone.insert(piece.first, data);
        } else if data.is_some() {
            let run = content.runs.iter_mut().find(|run| run.first == piece.first);
            run.expect("planned").data = data;
        } else {
            // One bad block must not hide its neighbours.
            for position in piece.first..piece.first + piece.count {
                self.read_alone(job.victim, content, position, effects);
            }
        }
        self.read_planned(job.victim, content, effects);
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
