//! Signs of life: said where nothing else is, and missed where nothing comes.

use std::time::Duration;

use super::Link;
use crate::plane::Plane;

/// How often it is looked whether to say something: in parts of the silence that ends a link here, and at the longest.
/// What was said just after a look is followed by a sign of life at the second look from there: four signs in
/// a silence of 3 s or more, whatever the other end's silence is.
const BEATS_PER_SILENCE: u32 = 8;
const BEAT_MOST: Duration = Duration::from_millis(375);

/// Silences for which one send may go on while nothing is received. A send ends when all of it is gone, which may
/// take long on a slow way; but an end that takes nothing at all must not keep memory here for ever.
const SILENCES_PER_SEND: u32 = 10;

impl Link {
    fn beat(&self) -> Duration {
        (self.silence / BEATS_PER_SILENCE).min(BEAT_MOST)
    }
}

impl Plane {
    /// Says that it lives on links that said nothing lately, and ends those that heard nothing for too long.
    pub(in crate::plane) fn beat(&mut self) {
        if self.next_beat.is_none_or(|at| self.now < at) {
            return;
        }
        for slot in self.links.keys().copied().collect::<Vec<_>>() {
            let now = self.now;
            // The end of one link may have led to the end of another.
            let Some(link) = self.links.get_mut(&slot) else {
                continue;
            };
            let (heard, said) = (now.since(link.heard_at), now.since(link.said_at));
            if link.is_receiving && heard >= link.silence {
                let reason = format!("nothing was heard for {:.1} s", link.silence.as_secs_f64());
                self.break_link(slot, reason);
            } else if !link.is_receiving && link.is_sending && said >= link.silence * SILENCES_PER_SEND {
                let reason = format!(
                    "{} B were not taken for {:.1} s",
                    link.sending,
                    said.as_secs_f64()
                );
                self.break_link(slot, reason);
            } else if link.unsent() == 0 && said >= link.beat() {
                link.outgoing.ping();
                self.touch_link(slot);
            }
        }
        self.next_beat = None;
        self.set_beat();
        self.settle();
    }

    /// Wakes the plane for its links, all of them at one time: no links, no waking.
    pub(super) fn set_beat(&mut self) {
        let shortest = self.links.values().map(Link::beat).min();
        self.next_beat = shortest.map(|beat| {
            let at = self.now + beat;
            self.next_beat.map_or(at, |before| before.min(at))
        });
    }
}
