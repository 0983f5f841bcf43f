//! Signs of life: said where nothing else is, and missed where nothing comes.

use crate::plane::Plane;

/// Signs of life per silence that ends a link.
const BEATS_PER_SILENCE: u32 = 4;

impl Plane {
    /// Says that it lives on links that said nothing lately, and ends those that heard nothing for too long.
    pub(in crate::plane) fn beat(&mut self) {
        if self.next_beat.is_none_or(|at| self.now < at) {
            return;
        }
        for slot in self.links.keys().copied().collect::<Vec<_>>() {
            let now = self.now;
            let link = self.links.get_mut(&slot).expect("just listed");
            if link.is_receiving && now.since(link.heard_at) >= link.silence {
                let reason = format!("nothing was heard for {:.1} s", link.silence.as_secs_f64());
                self.break_link(slot, reason);
                continue;
            }
            let beat = link.silence / BEATS_PER_SILENCE;
            if link.unsent() == 0 && now.since(link.said_at) >= beat {
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
        let shortest = self.links.values().map(|link| link.silence).min();
        self.next_beat = shortest.map(|silence| {
            let at = self.now + silence / BEATS_PER_SILENCE;
            self.next_beat.map_or(at, |before| before.min(at))
        });
    }
}
