//! Syncs: one at a time, shared by everyone who waits for one.

use edge::DiskOp;
use types::{Payload, RequestId};

use crate::Effect;
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

impl<B: Payload> Store<B> {
    /// Answers flushes whose batches are durable and wants a sync for those whose batches are complete.
    pub(crate) fn release_flushes(&mut self, effects: &mut Vec<Effect<B>>) {
        let Syncs { waiters, durable, .. } = &mut self.syncs;
        if waiters.is_empty() {
            return;
        }
        let applied = self.applied;
        let mut needs_sync = false;
        waiters.retain(|waiter| {
            if waiter.upto > applied {
                return true;
            }
            if waiter.upto <= *durable {
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
        if let Some(next) = &mut self.next
            && let Readiness::Syncing(ticket) = next.readiness
            && self.syncs.is_done(ticket)
        {
            next.readiness = Readiness::Ready;
        }
        self.release_flushes(effects);
    }
}
