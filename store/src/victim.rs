//! Which segment is cleaned next, when, and how fast.
//!
//! Speed follows shortage: where cleaning begins it moves less than guests append, where guests would have to wait
//! it moves sixteen times as much, and in between it settles where what it frees is what they take. So there is no
//! cliff to fall off, and a disk with little to clean is cleaned by little.

use types::Payload;

use crate::segment::{Segment, Stage};
use crate::store::Store;

/// One segment in so many is kept free, if that is more than the setting: what cleaning frees comes in lots, with
/// checkpoints, and the lots grow with the disk.
const FREE_SHARE: u32 = 64;
/// Blocks that may be moved per tick when no guest writes.
const BLOCKS_PER_TICK: u32 = 1024;
/// The most that may be moved on top of what is due: what was not used is not saved up for a burst.
const CREDIT_BLOCKS_MAX: u32 = 2048;
/// In toy segments a sixteenth is less than the headers that moving what is left takes: it would never end.
const DEAD_MIN: u32 = 5;
/// Credit is counted in parts of a block.
const PARTS: u32 = 16;

/// How much cleaning may move now.
#[derive(Default)]
pub(crate) struct Pace {
    parts: u32,
}

impl Pace {
    pub(crate) fn tick(&mut self) {
        self.add(BLOCKS_PER_TICK * PARTS);
    }

    /// Guests appended so many blocks while `short` of `band` segments were missing.
    pub(crate) fn earn(&mut self, blocks: u32, short: u32, band: u32) {
        self.add(blocks.saturating_mul(parts_per_block(short, band)));
    }

    pub(crate) fn spend(&mut self, blocks: u32) {
        self.parts = self.parts.saturating_sub(blocks * PARTS);
    }

    pub(crate) fn blocks(&self) -> u32 {
        self.parts / PARTS
    }

    fn add(&mut self, parts: u32) {
        self.parts = self.parts.saturating_add(parts).min(CREDIT_BLOCKS_MAX * PARTS);
    }
}

/// Parts of a block to move for each that guests append: by the square of the shortage, from a quarter of a block
/// to sixteen.
fn parts_per_block(short: u32, band: u32) -> u32 {
    if short == 0 {
        return 0;
    }
    let (short, band) = (u64::from(short.min(band)), u64::from(band.max(1)));
    4 + (252 * short * short / (band * band)) as u32
}

/// What cleaning a segment is worth: what it frees for what it moves, and the older the better, because what has
/// lived long will live on, while in a young segment more dies for nothing if it is left alone (Rosenblum and
/// Ousterhout 1992, section 3.5). `now` is the youngest generation.
fn benefit(segment: &Segment, segment_blocks: u32, now: u64) -> u128 {
    let age = u128::from(now.saturating_sub(segment.generation) + 1);
    let dead = u128::from(segment_blocks.saturating_sub(segment.live));
    ((age * dead) << 32) / (2 * u128::from(segment.live) + 1)
}

impl<B: Payload> Store<B> {
    /// Cleaning begins when fewer segments are free.
    pub(crate) fn clean_below(&self) -> u32 {
        let share = self.ledger.segments.geometry.segments / FREE_SHARE;
        self.settings.clean_below_free.max(share)
    }

    /// Free segments, and those that are free as soon as a checkpoint says so.
    fn free_soon(&self) -> u32 {
        self.free_segments() + self.ledger.segments.emptied() as u32 + self.checkpoint.emptied_count()
    }

    /// Emptied segments for which a checkpoint is worth its while: not for each of them, unless guests wait.
    pub(crate) fn emptied_wanted(&self) -> usize {
        if self.is_urgent() {
            return 1;
        }
        let band = self.clean_below().saturating_sub(self.settings.segments_reserved);
        (band / 2).max(1) as usize
    }

    /// Whether free segments are short and there is, as far as is known, something to gain.
    pub(crate) fn wants_cleaning(&self) -> bool {
        self.free_soon() < self.clean_below() && !self.has_no_victim()
    }

    /// Guests wait, or nearly: cleaning may use everything.
    pub(crate) fn is_urgent(&self) -> bool {
        self.free_segments() <= self.settings.segments_reserved + 1
    }

    /// Guests appended so many blocks, headers included.
    pub(crate) fn earn_cleaning(&mut self, blocks: u32) {
        let below = self.clean_below();
        let band = below.saturating_sub(self.settings.segments_reserved + 1);
        let short = below.saturating_sub(self.free_soon());
        self.cleaner.pace.earn(blocks, short, band);
    }

    /// The segment to clean. Its batches are all applied, and a sixteenth of it at least is dead: moving less would
    /// cost more than it gains.
    pub(crate) fn choose_victim(&self) -> Option<u32> {
        let table = &self.ledger.segments;
        let blocks = table.geometry.segment_blocks;
        let live_max = blocks - (blocks / 16).max(DEAD_MIN);
        let candidates = table
            .iter()
            .filter(|(_, segment)| segment.stage == Stage::Closed && !segment.is_stuck)
            .filter(|(index, _)| !self.is_cleaned(*index))
            .filter(|(_, segment)| segment.live <= live_max && (segment.live > 0 || segment.notes > 0))
            .filter(|(index, _)| !self.flights.iter().any(|flight| flight.segment == *index));
        let best = if self.free_segments() <= self.settings.segments_reserved {
            // The most space soonest.
            candidates.min_by_key(|(_, segment)| (segment.live, segment.generation))
        } else {
            let now = self.open.key.generation;
            candidates.max_by_key(|(index, segment)| (benefit(segment, blocks, now), u32::MAX - index))
        };
        best.map(|(index, _)| index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn speed_grows_with_shortage_and_without_a_step() {
        assert_eq!(parts_per_block(0, 8), 0);
        assert_eq!(parts_per_block(8, 8), 16 * PARTS);
        assert_eq!(parts_per_block(80, 8), 16 * PARTS);
        let speeds: Vec<u32> = (1..=8).map(|short| parts_per_block(short, 8)).collect();
        assert!(
            speeds
                .windows(2)
                .all(|pair| pair[0] < pair[1] && pair[1] - pair[0] <= 4 * PARTS)
        );
    }

    #[test]
    fn what_is_not_moved_is_not_saved_up() {
        let mut pace = Pace::default();
        (0..100).for_each(|_| pace.tick());
        assert_eq!(pace.blocks(), CREDIT_BLOCKS_MAX);
        pace.spend(CREDIT_BLOCKS_MAX + 5);
        assert_eq!(pace.blocks(), 0);
        pace.earn(3, 1, 8);
        pace.earn(1, 1, 8);
        assert_eq!(pace.blocks(), 1);
    }

    #[test]
    fn old_or_empty_segments_are_worth_cleaning() {
        let segment = |generation, live| Segment {
            generation,
            live,
            ..Segment::default()
        };
        let worth = |generation, live| benefit(&segment(generation, live), 8192, 1000);
        assert!(worth(900, 4000) > worth(990, 4000));
        assert!(worth(990, 100) > worth(990, 4000));
        assert!(
            worth(100, 7000) > worth(995, 4000),
            "cold data is worth less space"
        );
        assert!(worth(1000, 0) > worth(1, 8100));
    }
}
