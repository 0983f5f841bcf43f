//! A VDI's part in a snapshot: from which moment writes go to the next layer, when the old one is sealed, and answers that
//! are held back while several VDIs are cut together.
//!
//! Nothing stops for a cut: a write that depends on another is submitted after that one was answered, so no write of the new
//! layer can be needed by one of the old. Across VDIs the same holds if none of them answers between the first cut and the
//! last, which is what [`Event::Hold`](crate::Event) is for (docs/decisions/0018).

use std::collections::BTreeSet;
use std::time::Duration;

use replication::WriterEvent;
use types::{Instant, Lineage, Payload, RequestId};

use crate::requests::{Running, Slot, Stage, Work};
use crate::split::Cut;
use crate::vdi::{Turn, Vdi};
use crate::{Effect, Outcome, VdiError};

/// How long a VDI that is cut together with others answers nobody, at most: what a guest feels of it.
pub const HOLD_MAX: Duration = Duration::from_millis(20);

/// Cuts under way, and answers held back.
#[derive(Debug)]
pub(crate) struct Cuts<B> {
    /// Old layers with writes under way, the oldest first.
    sealing: Vec<Sealing>,
    held: Option<Held<B>>,
}

/// A layer that takes no new writes.
#[derive(Debug)]
struct Sealing {
    /// Who wants to know when all of it is on stable media.
    asker: RequestId,
    /// Requests that began before the cut and may have written to it.
    under_way: BTreeSet<Slot>,
}

#[derive(Debug)]
struct Held<B> {
    until: Instant,
    answers: Vec<(RequestId, Result<Outcome<B>, VdiError>)>,
}

impl<B> Default for Cuts<B> {
    fn default() -> Cuts<B> {
        Cuts {
            sealing: Vec::new(),
            held: None,
        }
    }
}

impl<B> Cuts<B> {
    /// Whether somebody has to look at the clock.
    pub fn is_busy(&self) -> bool {
        self.held.is_some()
    }
}

impl<B: Payload> Vdi<B> {
    /// In one turn for all shards: what is written from the next question on is of the new layer in each of them. `asker` is
    /// answered when all of the old one is complete and on stable media of a quorum.
    pub(crate) fn cut(&mut self, turn: &mut Turn<'_, B>, asker: RequestId, lineage: Lineage) {
        if self.is_closed {
            return self.answer(turn, asker, Err(VdiError::Closed));
        }
        for no in self.touched_shards() {
            let lineage = lineage.clone();
            self.tell(turn, no, WriterEvent::Cut { lineage });
        }
        self.spec.lineage = lineage;
        let began = |running: &Running<B>| {
            let changes = matches!(running.work, Work::Write { .. } | Work::Clear { .. });
            changes && running.stage != Stage::Waiting
        };
        let under_way = self.requests.slots_of(began).collect();
        self.cuts.sealing.push(Sealing { asker, under_way });
        self.seal();
    }

    /// A request has ended: it may be the last that a layer waited for.
    pub(crate) fn ended(&mut self, slot: Slot) {
        if self.cuts.sealing.is_empty() {
            return;
        }
        for sealing in &mut self.cuts.sealing {
            sealing.under_way.remove(&slot);
        }
        self.seal();
    }

    /// Everything of a layer is complete: what is left is the flush that everyone can ask for.
    fn seal(&mut self) {
        let sealing = &mut self.cuts.sealing;
        for sealed in sealing.extract_if(.., |sealing| sealing.under_way.is_empty()) {
            self.queue
                .push_back(Running::new(sealed.asker, Work::Flush, Cut::empty()));
        }
    }

    /// From now on nobody is answered, for [`HOLD_MAX`] at most.
    pub(crate) fn hold(&mut self, turn: &mut Turn<'_, B>) {
        self.release(turn);
        self.cuts.held = Some(Held {
            until: turn.now + HOLD_MAX,
            answers: Vec::new(),
        });
    }

    /// Answers what was held back.
    pub(crate) fn release(&mut self, turn: &mut Turn<'_, B>) {
        let Some(held) = self.cuts.held.take() else {
            return;
        };
        let answers = held.answers.into_iter();
        turn.effects
            .extend(answers.map(|(id, result)| Effect::Done(id, result)));
    }

    /// Whoever held too long goes on, whatever became of those who asked for it.
    pub(crate) fn release_late(&mut self, turn: &mut Turn<'_, B>) {
        if self.cuts.held.is_some() && !self.is_holding(turn.now) {
            self.release(turn);
        }
    }

    /// Whether it answers nobody now.
    #[must_use]
    pub fn is_holding(&self, now: Instant) -> bool {
        self.cuts.held.as_ref().is_some_and(|held| now < held.until)
    }

    /// The answer of a front end's request.
    pub(crate) fn answer(
        &mut self,
        turn: &mut Turn<'_, B>,
        id: RequestId,
        result: Result<Outcome<B>, VdiError>,
    ) {
        match &mut self.cuts.held {
            Some(held) => held.answers.push((id, result)),
            None => turn.effects.push(Effect::Done(id, result)),
        }
    }
}
