//! Checkpoints: the index catches up with the log, and emptied segments become free.
//!
//! ```text
//!  Idle ──capture──▶ Syncing ──log durable──▶ Saving ──index durable──▶ Logging ──said so durably──▶ Idle
//! ```
//! The capture is what the index will say; it waits for a sync, so that the index is never ahead of the log.

use edge::KvBatch;
use types::Payload;

use crate::append::Op;
use crate::meta::{Meta, OPENS_MAX, checkpoint_batch};
use crate::store::Store;
use crate::{Effect, IndexRequest};

enum Phase {
    Idle,
    Syncing {
        ticket: u64,
        batch: Box<KvBatch>,
    },
    Saving,
    /// Its entry is in the queue, or in the batch of this number.
    Logging {
        batch: Option<u64>,
        ticket: Option<u64>,
    },
}

pub(crate) struct Checkpoint {
    phase: Phase,
    /// Of the last one captured.
    id: u64,
    /// Oldest generation that the captured state uses.
    floor: u64,
    /// Free when this checkpoint is through.
    emptied: Vec<u32>,
    /// Bytes appended since the last capture.
    pub(crate) log_bytes: u64,
    /// A request found no room for a leaf.
    pub(crate) is_memory_wanted: bool,
    pub(crate) is_due: bool,
}

impl Checkpoint {
    pub(crate) fn new(id: u64) -> Checkpoint {
        Checkpoint {
            phase: Phase::Idle,
            id,
            floor: 0,
            emptied: Vec::new(),
            log_bytes: 0,
            is_memory_wanted: false,
            is_due: false,
        }
    }

    pub(crate) fn is_running(&self) -> bool {
        !matches!(self.phase, Phase::Idle)
    }

    /// Until the index has it, another cannot be captured. Ends whatever guests do.
    pub(crate) fn is_saving(&self) -> bool {
        matches!(self.phase, Phase::Syncing { .. } | Phase::Saving)
    }

    /// Segments that are free when this checkpoint is through.
    pub(crate) fn emptied_count(&self) -> u32 {
        self.emptied.len() as u32
    }

    /// Its entry waits for room in the log.
    pub(crate) fn waits_for_room(&self) -> bool {
        matches!(self.phase, Phase::Logging { batch: None, .. })
    }

    /// Its entry waits for room in the log, and frees segments once it is there.
    pub(crate) fn will_free(&self) -> bool {
        !self.emptied.is_empty() && self.waits_for_room()
    }

    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    /// The last one that is durable in the index.
    pub(crate) fn saved(&self) -> u64 {
        match self.phase {
            Phase::Syncing { .. } | Phase::Saving => self.id - 1,
            Phase::Idle | Phase::Logging { .. } => self.id,
        }
    }

    pub(crate) fn floor(&self) -> u64 {
        self.floor
    }

    /// The entry went into batch `number`.
    pub(crate) fn logged(&mut self, number: u64) {
        self.phase = Phase::Logging {
            batch: Some(number),
            ticket: None,
        };
    }
}

impl<B: Payload> Store<B> {
    fn is_checkpoint_due(&mut self) -> bool {
        let is_space_short = self.free_segments() <= self.clean_below();
        let is_lot = self.ledger.segments.emptied() >= self.emptied_wanted();
        let checkpoint = &mut self.checkpoint;
        checkpoint.log_bytes >= self.settings.checkpoint_bytes
            || self.cache.is_save_due()
            || (std::mem::take(&mut checkpoint.is_memory_wanted) && self.cache.has_dirty())
            || (is_space_short && is_lot)
            || std::mem::take(&mut checkpoint.is_due)
    }

    pub(crate) fn drive_checkpoint(&mut self, effects: &mut Vec<Effect<B>>) {
        if let Phase::Idle = self.checkpoint.phase
            && self.is_checkpoint_due()
        {
            self.capture();
        }
        match &mut self.checkpoint.phase {
            Phase::Syncing { ticket, batch } if self.syncs.is_done(*ticket) => {
                let batch = std::mem::take(batch.as_mut());
                let id = self.checkpoint.id;
                effects.push(Effect::Index(IndexRequest::Checkpoint { id, batch }));
                self.checkpoint.phase = Phase::Saving;
            }
            Phase::Logging {
                batch: Some(number),
                ticket,
            } if *number <= self.applied => match ticket {
                None if !self.checkpoint.emptied.is_empty() => *ticket = Some(self.syncs.want()),
                Some(ticket) if !self.syncs.is_done(*ticket) => {}
                _ => self.finish_checkpoint(),
            },
            _ => {}
        }
    }

    fn capture(&mut self) {
        self.checkpoint.id += 1;
        self.checkpoint.log_bytes = 0;
        self.checkpoint.emptied = self.ledger.segments.take_emptied();
        self.checkpoint.floor = self.ledger.segments.floor();
        self.ledger.forget_opens(self.checkpoint.floor);
        assert!(
            self.ledger.opens.len() <= OPENS_MAX,
            "{} fences",
            self.ledger.opens.len()
        );
        let meta = Meta {
            disk: self.superblock.disk,
            id: self.checkpoint.id,
            position: self.applied,
            // The segment of that very batch: the one open now may hold nothing durable yet.
            scan_from: self.applied_generation,
            opens: self.ledger.opens.clone(),
            is_rebuilding: false,
        };
        let mut saving: Vec<_> = self.cache.begin_save();
        saving.sort_unstable_by_key(|at| self.cache.get(*at).key);
        let cache = &self.cache;
        let leaves = saving.iter().map(|at| {
            let cached = cache.get(*at);
            (cached.key, cached.leaf.as_deref().expect("dirty leaves are here"))
        });
        let batch = Box::new(checkpoint_batch(&mut self.ledger, &meta, leaves));
        let ticket = self.syncs.want();
        self.checkpoint.phase = Phase::Syncing { ticket, batch };
    }

    pub(crate) fn checkpoint_saved(&mut self, id: u64) {
        assert_eq!(id, self.checkpoint.id, "an answer to another checkpoint");
        self.cache.saved();
        self.stats.checkpoints += 1;
        // In front: what is queued may wait for the space that this frees.
        self.queue.push_front(Op::checkpoint());
        self.checkpoint.phase = Phase::Logging {
            batch: None,
            ticket: None,
        };
    }

    fn finish_checkpoint(&mut self) {
        for index in std::mem::take(&mut self.checkpoint.emptied) {
            self.ledger.segments.release(index);
        }
        self.checkpoint.phase = Phase::Idle;
    }
}
