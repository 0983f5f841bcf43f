//! Flushes of shards, shared by the requests that need them.
//!
//! A shard's flush covers every write that the shard completed before the flush was sent. So a request joins the
//! youngest flush under way if nothing was completed since that was sent, sends one if something was, and needs
//! none where all is flushed already.

use replication::{ShardError, ShardOp, ShardReply};
use smallvec::SmallVec;
use types::{Payload, ShardNo};

use crate::requests::{Ask, NUMBER_MASK, Slot};
use crate::vdi::{Turn, Vdi};

/// A flush under way and who waits for it.
#[derive(Debug)]
pub(crate) struct SharedFlush {
    number: u32,
    waiters: SmallVec<[Slot; 4]>,
}

impl<B: Payload> Vdi<B> {
    /// A write or clear of the shard is complete: the next flush has something to do.
    pub(crate) fn mark_dirty(&mut self, no: ShardNo) {
        let shard = &mut self.shards[no.0 as usize];
        if !shard.is_dirty {
            shard.is_dirty = true;
            self.unsynced.insert(no);
        }
    }

    /// Makes `slot` wait for a flush of the shard that covers all completed writes, if there is need of one.
    pub(crate) fn join_flush(&mut self, turn: &mut Turn<'_, B>, slot: Slot, no: ShardNo) {
        let shard = &mut self.shards[no.0 as usize];
        if !shard.is_dirty {
            if let Some(youngest) = shard.flushes.back_mut() {
                youngest.waiters.push(slot);
                self.requests.get_mut(slot).under_way += 1;
            }
            return;
        }
        shard.is_dirty = false;
        shard.flush_number = (shard.flush_number + 1) & NUMBER_MASK;
        let number = shard.flush_number;
        shard.flushes.push_back(SharedFlush {
            number,
            waiters: SmallVec::from_slice(&[slot]),
        });
        self.requests.get_mut(slot).under_way += 1;
        self.ask(turn, no, Ask::Flush(no, number), ShardOp::Flush);
    }

    pub(crate) fn flush_answered(
        &mut self,
        turn: &mut Turn<'_, B>,
        no: ShardNo,
        number: u32,
        result: Result<ShardReply<B>, ShardError>,
    ) {
        let shard = &mut self.shards[no.0 as usize];
        let at = shard.flushes.iter().position(|flush| flush.number == number);
        let flush = shard
            .flushes
            .remove(at.expect("a flush under way"))
            .expect("just found");
        // What a failed flush should have covered is still to be flushed.
        shard.is_dirty |= result.is_err();
        if !shard.is_dirty && shard.flushes.is_empty() {
            self.unsynced.remove(&no);
        }
        let error = result.err().map(|error| self.error_of(no, error));
        for slot in flush.waiters {
            let running = self.requests.get_mut(slot);
            running.under_way -= 1;
            if let Some(error) = &error {
                running.fail(error.clone());
            }
            self.pump(turn, slot);
        }
    }
}
