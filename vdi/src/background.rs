//! What goes on beside the guest's requests: first touches, ticks, scrub, resize, replacing disks, deletion.
//!
//! Scrub and deletion walk over the shards with a bounded number under way; a writer's notice ends its turn and
//! starts the next. First touches are paced by ticks: opening a large VDI must not send a fence for each of its
//! thousands of shards at once, while a guest waits for one of them.

use std::collections::BTreeSet;

use replication::{ShardRecord, WriterEvent, WriterNotice, WriterPhase};
use types::{BLOCK_BYTES, DiskId, Payload, ShardNo};

use crate::split::global;
use crate::vdi::{Turn, Vdi};
use crate::{Effect, Notice, VdiError};

/// Shards that are being fenced at once because nobody has asked for them yet.
const FENCING_MAX: usize = 32;
/// Shards scrubbed at once.
const SCRUBBING_MAX: usize = 2;
/// Shards dropped at once.
const DROPPING_MAX: usize = 64;

#[derive(Debug, Default)]
pub(crate) struct Background {
    /// Shards below this have been touched, or are being.
    touch_next: u32,
    /// Touched by us and not known to have ended.
    fencing: BTreeSet<ShardNo>,
    scrub: Option<Walk>,
    delete: Option<Walk>,
    /// Counts of the running scrub.
    scrubbed: Scrubbed,
}

/// A walk over all shards.
#[derive(Debug, Default)]
struct Walk {
    next: u32,
    under_way: BTreeSet<ShardNo>,
    done: u32,
}

#[derive(Clone, Copy, Debug, Default)]
struct Scrubbed {
    blocks: u64,
    repaired: u64,
    unreadable: u64,
}

impl Walk {
    /// The next shard to start, if one may start.
    fn start(&mut self, total: u32, at_once: usize) -> Option<ShardNo> {
        if self.next == total || self.under_way.len() >= at_once {
            return None;
        }
        let no = ShardNo(self.next);
        self.next += 1;
        self.under_way.insert(no);
        Some(no)
    }

    fn end(&mut self, no: ShardNo) -> bool {
        let was_under_way = self.under_way.remove(&no);
        self.done += u32::from(was_under_way);
        was_under_way
    }
}

impl<B: Payload> Vdi<B> {
    fn total(&self) -> u32 {
        self.shards.len() as u32
    }

    /// Whether `Tick`s are needed. May say so for one tick too long.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        let is_touching = !self.is_closed && self.background.touch_next < self.total();
        is_touching || self.cuts.is_busy() || !self.ticking.is_empty() || !self.background.fencing.is_empty()
    }

    pub(crate) fn tick(&mut self, turn: &mut Turn<'_, B>) {
        for no in std::mem::take(&mut self.ticking) {
            self.shards[no.0 as usize].is_ticking = false;
            // Comes back to the list if it is still busy afterwards.
            self.tell(turn, no, WriterEvent::Tick);
        }
        self.touch(turn);
    }

    /// Touches some shards that no request has touched yet.
    fn touch(&mut self, turn: &mut Turn<'_, B>) {
        let shards = &self.shards;
        self.background.fencing.retain(|no| {
            let writer = shards[no.0 as usize].writer.as_ref();
            // A shard that waits for its disks, or for leases to end, waits without our help and must not hold up the
            // others.
            writer.is_some_and(|writer| {
                let status = writer.status();
                status.phase == WriterPhase::Opening && !status.is_waiting && !status.keeps_still
            })
        });
        while !self.is_closed
            && self.background.touch_next < self.total()
            && self.background.fencing.len() < FENCING_MAX
        {
            let no = ShardNo(self.background.touch_next);
            self.background.touch_next += 1;
            if self.shards[no.0 as usize].writer.is_none() {
                self.background.fencing.insert(no);
                self.tell(turn, no, WriterEvent::Touch);
            }
        }
    }

    pub(crate) fn resize(&mut self, bytes: u64, added: Vec<ShardRecord>) {
        assert!(bytes >= self.spec.bytes, "{} to {bytes} bytes", self.spec.bytes);
        assert!(bytes.is_multiple_of(u64::from(self.spec.sector_bytes)));
        self.spec.bytes = bytes;
        // New shards have seen no write in any life of the daemon: nothing to flush.
        self.add_shards(added, false);
    }

    pub(crate) fn replace_disk(&mut self, turn: &mut Turn<'_, B>, old: DiskId, new: Vec<(ShardNo, DiskId)>) {
        for (no, new) in new {
            assert!(no.0 < self.total(), "shard {no} of {}", self.total());
            self.tell(turn, no, WriterEvent::ReplaceDisk { old, new });
            // A writer takes a new disk for reachable until told.
            if !self.up.contains(&new) {
                let (disk, is_up) = (new, false);
                self.tell(turn, no, WriterEvent::DiskState { disk, is_up });
            }
        }
    }

    pub(crate) fn disk_leaves(
        &mut self,
        turn: &mut Turn<'_, B>,
        disk: DiskId,
        refused: Option<&ShardRecord>,
    ) {
        for no in self.touched_shards() {
            let refused = refused.filter(|record| record.shard.no == no).cloned();
            self.tell(turn, no, WriterEvent::DiskLeaves { disk, refused });
        }
    }

    pub(crate) fn start_scrub(&mut self) {
        if self.background.scrub.is_none() && !self.is_closed {
            self.background.scrub = Some(Walk::default());
            self.background.scrubbed = Scrubbed::default();
        }
    }

    pub(crate) fn start_delete(&mut self, turn: &mut Turn<'_, B>) {
        if self.is_closed {
            return;
        }
        self.is_closed = true;
        self.background.scrub = None;
        self.background.delete = Some(Walk::default());
        for running in std::mem::take(&mut self.queue) {
            let closed = Err(VdiError::Closed);
            self.answer(turn, running.guest, closed);
        }
    }

    /// Starts the next shard of a walk, or ends the walk; `false` when there is nothing to do now.
    pub(crate) fn advance_background(&mut self, turn: &mut Turn<'_, B>) -> bool {
        let total = self.total();
        if let Some(walk) = &mut self.background.delete {
            if let Some(no) = walk.start(total, DROPPING_MAX) {
                self.tell(turn, no, WriterEvent::Drop);
                self.skip_if_fenced(turn, no);
                return true;
            }
            if walk.done == total {
                self.background.delete = None;
                turn.effects.push(Effect::Notice(Notice::Dropped));
            }
        }
        if let Some(walk) = &mut self.background.scrub {
            if let Some(no) = walk.start(total, SCRUBBING_MAX) {
                self.tell(turn, no, WriterEvent::Scrub);
                self.skip_if_fenced(turn, no);
                return true;
            }
            if walk.done == total {
                self.background.scrub = None;
                if total == 0 {
                    self.scrub_progress(turn, 0);
                }
            }
        }
        false
    }

    /// A shard that a newer writer holds is that writer's to scrub or drop: a walk must not wait for it.
    fn skip_if_fenced(&mut self, turn: &mut Turn<'_, B>, no: ShardNo) {
        let writer = self.shards[no.0 as usize].writer.as_ref();
        if writer.is_some_and(|writer| writer.status().phase == WriterPhase::Fenced) {
            self.walks_lost(turn, no);
        }
    }

    fn walks_lost(&mut self, turn: &mut Turn<'_, B>, no: ShardNo) {
        self.scrub_ended(turn, no, Scrubbed::default());
        if let Some(walk) = &mut self.background.delete {
            walk.end(no);
        }
    }

    fn scrub_progress(&self, turn: &mut Turn<'_, B>, done: u32) {
        let counts = self.background.scrubbed;
        turn.effects.push(Effect::Notice(Notice::Scrub {
            done,
            total: self.total(),
            blocks: counts.blocks,
            repaired: counts.repaired,
            unreadable: counts.unreadable,
        }));
    }

    fn scrub_ended(&mut self, turn: &mut Turn<'_, B>, no: ShardNo, counts: Scrubbed) {
        let Some(walk) = &mut self.background.scrub else {
            return;
        };
        if walk.end(no) {
            let done = walk.done;
            let sum = &mut self.background.scrubbed;
            sum.blocks += counts.blocks;
            sum.repaired += counts.repaired;
            sum.unreadable += counts.unreadable;
            self.scrub_progress(turn, done);
        }
    }

    /// A writer's notice in the words of the VDI.
    pub(crate) fn notice(&mut self, turn: &mut Turn<'_, B>, shard: ShardNo, notice: WriterNotice) {
        let said = match notice {
            WriterNotice::Degraded { disk } => Notice::Degraded { shard, disk },
            WriterNotice::Restored { disk, moved_blocks } => Notice::Restored {
                shard,
                disk,
                moved_blocks,
            },
            WriterNotice::Repaired { disk, blocks } => Notice::Repaired { shard, disk, blocks },
            WriterNotice::Unreadable { block } => Notice::Unreadable {
                shard,
                offset: global(shard, block, self.shard_blocks) * BLOCK_BYTES,
            },
            WriterNotice::NoQuorum(is_waiting) => Notice::NoQuorum { shard, is_waiting },
            WriterNotice::ReadsWait(is_waiting) => Notice::ReadsWait { shard, is_waiting },
            WriterNotice::Fenced => {
                self.walks_lost(turn, shard);
                Notice::Fenced { shard }
            }
            WriterNotice::WrongAnswer { disk } => Notice::WrongAnswer { shard, disk },
            WriterNotice::ScrubDone {
                blocks,
                repaired,
                unreadable,
            } => {
                let counts = Scrubbed {
                    blocks,
                    repaired,
                    unreadable,
                };
                return self.scrub_ended(turn, shard, counts);
            }
            WriterNotice::Dropped => {
                if let Some(walk) = &mut self.background.delete {
                    walk.end(shard);
                }
                return;
            }
        };
        turn.effects.push(Effect::Notice(said));
    }
}
