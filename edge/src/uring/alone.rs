//! A disk alone in its ring, behind the [`Disk`] trait.

use std::fs::File;

use super::pool::Buf;
use super::ring::{DiskSlot, Event, Ring, RingConfig, RingError, Wait};
use crate::{Completion, Disk, DiskOp, IoId};

/// One disk with a ring of its own, behind the [`Disk`] trait: for tests and tools. The daemon puts all disks of
/// a thread into one [`Ring`] instead, which a per-disk trait object cannot express: one system call for all.
pub struct RingDisk {
    ring: Ring,
    slot: DiskSlot,
    events: Vec<Event>,
}

impl RingDisk {
    /// Puts `file` into a new ring of the calling thread.
    ///
    /// # Errors
    /// As [`Ring::new`] and [`Ring::add_disk`].
    pub fn new(config: RingConfig, file: File) -> Result<RingDisk, RingError> {
        let mut ring = Ring::new(config)?;
        let slot = ring.add_disk(file, "of its own")?;
        Ok(RingDisk {
            ring,
            slot,
            events: Vec::new(),
        })
    }

    /// Like `poll`, but sleeps as `wait` says until something arrives.
    pub fn poll_wait(&mut self, wait: Wait, completions: &mut Vec<Completion<Buf>>) {
        self.ring.turn(wait, &mut self.events);
        for event in self.events.drain(..) {
            if let Event::Disk(_, completion) = event {
                completions.push(completion);
            }
        }
    }
}

impl Disk for RingDisk {
    type Buffer = Buf;

    fn submit(&mut self, id: IoId, operation: DiskOp<Buf>) {
        self.ring.submit(self.slot, id, operation);
    }

    fn poll(&mut self, completions: &mut Vec<Completion<Buf>>) {
        self.poll_wait(Wait::No, completions);
    }
}
