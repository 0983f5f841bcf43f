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
const WINDOW_BLOCKS: u32 = 256;
/// Such reads under way.
const WINDOWS_UNDER_WAY: usize = 2;
/// Batches of this length and more are stepped over: one block is read for each. Each of these reads waits for the
/// one before, so for shorter batches it takes longer than to read everything.
const LONG_BATCH_BLOCKS: u32 = 64;
/// Segments cleaned at once while guests wait or nearly: one is looked through while another is read or logged.
pub(crate) const JOBS_MAX: usize = 2;
/// After finding no victim, look again only when this many blocks died.
const DEATHS_BEFORE_NEXT_LOOK: u64 = 64;

/// Paces cleaning and holds the segments being cleaned.
pub(crate) struct Cleaner<B> {
    /// The oldest first: it is the next to be emptied.
    jobs: Vec<Job<B>>,
    pub(crate) pace: Pace,
    /// Count of changes at which there was nothing worth cleaning.
    found_nothing_at: Option<u64>,
}

impl<B> Default for Cleaner<B> {
    fn default() -> Cleaner<B> {
        Cleaner {
            jobs: Vec::with_capacity(JOBS_MAX),
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
        !self.jobs.is_empty()
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
    phase: Phase<B>,
}

enum Phase<B> {
    Scanning(Box<Scan<B>>),
    Moving(Box<Moving>),
    /// Everything is logged; waiting for the batch of this number.
    Draining(u64),
}

/// How far the headers are read.
struct Scan<B> {
    /// Known once the segment's own header is read.
    key: Option<SegmentKey>,
    /// Where the next batch begins, from the segment's start.
    at: u32,
    /// The end of what was asked for.
    asked: u32,
    /// What has come and was not looked through yet.
    here: Vec<(Piece, Option<B>)>,
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

impl<B> Scan<B> {
    /// What has come of where the next batch begins. What the walk has stepped over is let go.
    fn take_here(&mut self) -> Option<(Piece, Option<B>)> {
        let at = self.at;
        self.here.retain(|(piece, _)| at < piece.first + piece.count);
        let found = self.here.iter().position(|(piece, _)| piece.first <= at)?;
        Some(self.here.swap_remove(found))
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
        let mut jobs = std::mem::take(&mut self.cleaner.jobs);
        jobs.retain_mut(|job| {
            if let Phase::Moving(moving) = &mut job.phase {
                let mut moving = std::mem::take(moving);
                let step = self.move_on(job.victim, &mut job.content, &mut moving, effects);
                job.phase = match step {
                    Step::Wait => Phase::Moving(moving),
                    Step::End => Phase::Draining(moving.last_number),
                };
            }
            let is_done = matches!(job.phase, Phase::Draining(upto) if upto <= self.applied);
            if is_done {
                self.finish_victim(job);
            }
            !is_done
        });
        self.cleaner.jobs = jobs;
        while self.wants_cleaning() && self.cleaner.jobs.len() < self.jobs_wanted() {
            let Some(victim) = self.choose_victim() else {
                self.cleaner.found_nothing_at = Some(self.ledger.segments.changes());
                return;
            };
            if !self.has_room_to_begin(victim) {
                return;
            }
            self.begin(victim, effects);
        }
    }

    fn jobs_wanted(&self) -> usize {
        if self.is_urgent() { JOBS_MAX } else { 1 }
    }

    /// Beside another one a segment is cleaned only when what lives in all of them fits into what is free beyond the
    /// reserve, or one segment of that: otherwise each could wait for the space that another one is to free, or lives
    /// that end early use up the reserve with halves of work.
    fn has_room_to_begin(&self, victim: u32) -> bool {
        let segments = &self.ledger.segments;
        let victims = self.cleaner.jobs.iter().map(|job| job.victim);
        let live = victims
            .chain([victim])
            .map(|index| u64::from(segments.get(index).live));
        let reserved = self.settings.segments_reserved;
        let spare = (self.free_segments() + 1).saturating_sub(reserved);
        let room = u64::from(spare) * u64::from(segments.geometry.segment_blocks);
        self.cleaner.jobs.is_empty() || live.sum::<u64>() <= room
    }

    pub(crate) fn is_cleaned(&self, index: u32) -> bool {
        self.cleaner.jobs.iter().any(|job| job.victim == index)
    }

    fn begin(&mut self, victim: u32, effects: &mut Vec<Effect<B>>) {
        self.ledger.segments.pin(victim);
        let mut job = Job {
            victim,
            content: Content::default(),
            phase: Phase::Scanning(Box::new(Scan {
                key: None,
                at: 0,
                asked: WINDOW_BLOCKS,
                here: Vec::new(),
                careful_until: 0,
                is_batch_long: false,
                found: Moving::new(self.number),
            })),
        };
        self.read_piece(victim, &mut job.content, Piece::run(0, WINDOW_BLOCKS), effects);
        self.cleaner.jobs.push(job);
    }

    pub(crate) fn clean_read_done(
        &mut self,
        victim: u32,
        piece: Piece,
        data: Option<B>,
        effects: &mut Vec<Effect<B>>,
    ) {
        let mut jobs = std::mem::take(&mut self.cleaner.jobs);
        let job = jobs.iter_mut().find(|job| job.victim == victim);
        let job = job.expect("cleaning reads for a job");
        job.content.under_way -= 1;
        let phase = std::mem::replace(&mut job.phase, Phase::Draining(0));
        job.phase = if let Phase::Scanning(mut scan) = phase {
            scan.here.push((piece, data));
            self.scan_on(victim, &mut job.content, scan, effects)
        } else {
            self.content_read(job, piece, data, effects);
            phase
        };
        self.cleaner.jobs = jobs;
    }

    // ---- headers ----

    /// Walks the batches in what has come and asks for what comes next.
    fn scan_on(
        &mut self,
        victim: u32,
        content: &mut Content<B>,
        mut scan: Box<Scan<B>>,
        effects: &mut Vec<Effect<B>>,
    ) -> Phase<B> {
        while let Some((piece, data)) = scan.take_here() {
            match data {
                // One bad block must not hide its neighbours.
                None if piece.count > 1 => {
                    scan.careful_until = piece.first + piece.count;
                    scan.asked = scan.at;
                }
                None => scan.at = piece.first + 1,
                Some(data) => self.walk_batches(victim, &mut scan, piece.first, data.bytes()),
            }
        }
        let segment_blocks = self.ledger.segments.geometry.segment_blocks;
        if scan.key.is_some() && scan.at < segment_blocks {
            self.read_headers(victim, content, &mut scan, effects);
        } else if scan.key.is_none() && scan.at == 0 {
            // The first block again, by itself.
            self.read_headers(victim, content, &mut scan, effects);
        } else if content.under_way == 0 {
            return match scan.key {
                Some(_) => Phase::Moving(Box::new(scan.found.begin())),
                // Without its secret nothing in the segment can be told from guests' data.
                None => Phase::Draining(self.applied),
            };
        }
        Phase::Scanning(scan)
    }

    fn read_headers(
        &mut self,
        victim: u32,
        content: &mut Content<B>,
        scan: &mut Scan<B>,
        effects: &mut Vec<Effect<B>>,
    ) {
        if scan.at < scan.careful_until || scan.is_batch_long {
            // What is under way may bring it.
            if content.under_way == 0 {
                self.read_piece(victim, content, Piece::run(scan.at, 1), effects);
                scan.asked = scan.at + 1;
            }
            return;
        }
        let segment_blocks = self.ledger.segments.geometry.segment_blocks;
        scan.asked = scan.asked.max(scan.at);
        while scan.asked < segment_blocks && content.under_way < WINDOWS_UNDER_WAY {
            self.read_piece(victim, content, Piece::run(scan.asked, WINDOW_BLOCKS), effects);
            scan.asked += WINDOW_BLOCKS;
        }
    }

    fn walk_batches(&self, victim: u32, scan: &mut Scan<B>, first: u32, bytes: &[u8]) {
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
        self.submit(Io::Clean { victim, piece }, operation, effects);
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

    /// Whether guests have no segment to go on in, and neither cleaning nor a checkpoint is going to free one. What was
    /// held may still go on with the next event, when a checkpoint of this very turn has freed segments.
    pub(crate) fn is_stuck(&self) -> bool {
        let is_at_rest = !self.cleaner.is_running() && !self.checkpoint.is_running();
        self.free_segments() <= self.settings.segments_reserved && is_at_rest && !self.wants_cleaning()
    }

    /// Says when guests begin and cease to wait for space that cleaning cannot make.
    pub(crate) fn tell_full(&mut self, effects: &mut Vec<Effect<B>>) {
        let reserved = self.settings.segments_reserved;
        let is_at_capacity = self.ledger.segments.live_blocks() + 1 >= self.ledger.capacity_blocks(reserved);
        // What a drop leaves is on its way to become space.
        let is_purging = !self.purging.is_empty();
        let is_waiting = self.held_writes > 0 || (!self.queue.is_empty() && self.is_log_full());
        let is_full = is_waiting && !is_purging && (self.is_full || is_at_capacity || self.is_stuck());
        if is_full != self.is_full {
            self.is_full = is_full;
            effects.push(Effect::Full(is_full));
        }
    }
}
