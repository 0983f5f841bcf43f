//! Syncs: one at a time, shared by everyone who waits for one; and who says in the log how far it is durable.
//!
//! A header states what was durable when it was submitted, so the last batches before a pause are vouched for by
//! nobody: should one of them rot, recovery would take it for the torn end of the log. A store that has been idle
//! for a tick after a sync therefore appends one header without entries, and syncs it.

use edge::DiskOp;
use types::{Payload, RequestId};

use crate::Effect;
use crate::batch::{Entry, Header, Kind};
use crate::store::{Io, Readiness, Store, done};

/// Somebody who is answered when everything up to a batch is durable.
struct FlushWaiter {
    id: RequestId,
    upto: u64,
}

/// A ticket is the number of a sync that starts after now; it is good when that one has finished.
pub(crate) struct Syncs {
    started: u64,
    finished: u64,
    wanted: u64,
    /// What the sync under way will have made durable.
    covers: u64,
    /// Every batch up to here is durable.
    pub(crate) durable: u64,
    waiters: Vec<FlushWaiter>,
}

impl Syncs {
    pub(crate) fn new(durable: u64) -> Syncs {
        Syncs {
            started: 0,
            finished: 0,
            wanted: 0,
            covers: durable,
            durable,
            waiters: Vec::new(),
        }
    }

    /// Asks for a sync that starts after everything that has completed by now.
    pub(crate) fn want(&mut self) -> u64 {
        self.wanted = self.started + 1;
        self.wanted
    }

    pub(crate) fn is_done(&self, ticket: u64) -> bool {
        self.finished >= ticket
    }

    /// Answers `id` once batches up to `upto` are durable.
    pub(crate) fn flush(&mut self, id: RequestId, upto: u64) {
        self.waiters.push(FlushWaiter { id, upto });
    }

    /// Takes everyone who waits: the disk failed.
    pub(crate) fn waiting(&mut self) -> Vec<RequestId> {
        self.waiters.drain(..).map(|waiter| waiter.id).collect()
    }
}

/// How far the log itself says that it is durable.
pub(crate) struct Witness {
    /// Somebody was told that batches up to here are durable.
    promised: u64,
    /// The last batch that holds anything but fences and checkpoints.
    content: u64,
    /// The highest durable mark in a header that was submitted, and the batch it is in.
    stated: u64,
    stated_in: u64,
    /// The highest mark in a header that is durable itself.
    borne: u64,
    /// The last batch when time last passed: none since means idle.
    at_tick: u64,
    is_due: bool,
    is_sync_wanted: bool,
}

impl Witness {
    /// Recovery's first batch vouches for all before it, and holds nothing itself.
    pub(crate) fn new(number: u64) -> Witness {
        Witness {
            promised: number,
            content: number,
            stated: number,
            stated_in: number,
            borne: number,
            at_tick: number,
            is_due: false,
            is_sync_wanted: false,
        }
    }

    /// A header leaves for the disk.
    pub(crate) fn launched(&mut self, header: &Header) {
        if header.durable_upto > self.stated {
            self.stated = header.durable_upto;
            self.stated_in = header.number;
        }
        let is_content = |entry: &Entry| !matches!(entry.kind, Kind::Open | Kind::Checkpoint);
        if header.entries.iter().any(is_content) {
            self.content = header.number;
        }
    }

    fn synced(&mut self, durable: u64) {
        if self.stated_in <= durable {
            self.borne = self.stated;
        }
    }

    /// What a header that lasts has to say.
    fn owed(&self) -> Option<u64> {
        let owed = self.promised.min(self.content);
        (owed > self.borne).then_some(owed)
    }
}

impl<B: Payload> Store<B> {
    /// Whether something was promised to be durable and no header that is durable itself says so.
    pub(crate) fn wants_witness(&self) -> bool {
        self.witness.owed().is_some()
    }

    /// Time passed. `is_closing`: there will be no other tick.
    pub(crate) fn tick_witness(&mut self, is_closing: bool) {
        let is_idle = self.queue.is_empty() && self.flights.is_empty() && self.witness.at_tick == self.number;
        self.witness.at_tick = self.number;
        self.witness.is_due = self.wants_witness() && (is_idle || is_closing);
    }

    /// Once the store is idle, appends a header that says what is durable, and has it synced.
    pub(crate) fn bear_witness(&mut self, effects: &mut Vec<Effect<B>>) {
        if self.witness.is_sync_wanted && self.witness.stated_in <= self.applied {
            self.witness.is_sync_wanted = false;
            self.syncs.want();
        }
        let Some(owed) = self.witness.owed().filter(|_| self.witness.is_due) else {
            return;
        };
        if !self.queue.is_empty() || !self.flights.is_empty() {
            return;
        }
        if owed > self.witness.stated {
            let Some(draft) = self.draft(effects) else {
                if self.next.is_none() {
                    // A disk so full that not one header fits. The next batch says it.
                    self.witness.promised = self.witness.borne;
                }
                return;
            };
            self.launch(draft, effects);
        }
        self.witness.is_due = false;
        self.witness.is_sync_wanted = true;
    }

    /// Answers flushes whose batches are durable and wants a sync for those whose batches are complete.
    pub(crate) fn release_flushes(&mut self, effects: &mut Vec<Effect<B>>) {
        let Syncs { waiters, durable, .. } = &mut self.syncs;
        if waiters.is_empty() {
            return;
        }
        let witness = &mut self.witness;
        let applied = self.applied;
        let mut needs_sync = false;
        waiters.retain(|waiter| {
            if waiter.upto > applied {
                return true;
            }
            if waiter.upto <= *durable {
                witness.promised = witness.promised.max(waiter.upto);
                effects.push(done(waiter.id));
                return false;
            }
            needs_sync = true;
            true
        });
        if needs_sync {
            self.syncs.want();
        }
    }

    pub(crate) fn start_sync(&mut self, effects: &mut Vec<Effect<B>>) {
        let syncs = &mut self.syncs;
        if syncs.wanted > syncs.started && syncs.finished == syncs.started {
            syncs.started += 1;
            syncs.covers = self.applied;
            self.stats.syncs += 1;
            self.submit(Io::Sync, DiskOp::Sync, effects);
        }
    }

    pub(crate) fn synced(&mut self, effects: &mut Vec<Effect<B>>) {
        self.syncs.finished = self.syncs.started;
        self.syncs.durable = self.syncs.durable.max(self.syncs.covers);
        self.witness.synced(self.syncs.durable);
        if let Some(next) = &mut self.next
            && let Readiness::Syncing(ticket) = next.readiness
            && self.syncs.is_done(ticket)
        {
            next.readiness = Readiness::Ready;
        }
        self.release_flushes(effects);
    }
}
