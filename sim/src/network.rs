//! Links that delay, break and heal; and the clock they follow.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use edge::{Clock, Network};
use types::Instant;

use crate::Rng;

/// Time that passes when the world says so.
#[derive(Debug, Default)]
pub struct SimClock {
    now: Cell<Instant>,
}

impl SimClock {
    /// Lets time pass.
    pub fn advance(&self, by: Duration) {
        self.now.set(self.now.get() + by);
    }
}

impl Clock for SimClock {
    fn now(&self) -> Instant {
        self.now.get()
    }
}

/// Messages with delays, in order within a pair, in any order between pairs.
///
/// A loss is never silent within a living link: losing one message breaks the link, drops everything under way
/// in both directions, and is told through [`SimNetwork::take_broken`]. That is what a stream socket does.
#[derive(Debug)]
pub struct SimNetwork<N, M> {
    rng: Rng,
    now: Instant,
    queues: BTreeMap<(N, N), VecDeque<(Instant, M)>>,
    cut: BTreeSet<(N, N)>,
    broken: Vec<(N, N)>,
    delay_max: Duration,
    loss_ppm: u32,
}

impl<N: Copy + Ord, M> SimNetwork<N, M> {
    /// No links are cut, no messages are lost, and each is under way for up to `delay_max`.
    #[must_use]
    pub fn new(seed: u64, delay_max: Duration) -> SimNetwork<N, M> {
        SimNetwork {
            rng: Rng::new(seed),
            now: Instant::default(),
            queues: BTreeMap::new(),
            cut: BTreeSet::new(),
            broken: Vec::new(),
            delay_max,
            loss_ppm: 0,
        }
    }

    /// Time is now `now`: what has been under way long enough arrives at the next poll.
    pub fn advance_to(&mut self, now: Instant) {
        self.now = self.now.max(now);
    }

    /// Messages in a million that are lost, each breaking its link.
    pub fn set_loss(&mut self, ppm: u32) {
        self.loss_ppm = ppm;
    }

    /// Breaks the link between `a` and `b` and keeps it so until [`SimNetwork::heal`].
    pub fn cut(&mut self, a: N, b: N) {
        self.break_link(a, b);
        self.cut.insert(pair(a, b));
    }

    /// Lets `a` and `b` talk again.
    pub fn heal(&mut self, a: N, b: N) {
        self.cut.remove(&pair(a, b));
    }

    /// Breaks the link once: everything under way in both directions is gone.
    pub fn break_link(&mut self, a: N, b: N) {
        self.queues.remove(&(a, b));
        self.queues.remove(&(b, a));
        self.broken.push(pair(a, b));
    }

    /// Whether messages between the two are refused.
    #[must_use]
    pub fn is_cut(&self, a: N, b: N) -> bool {
        self.cut.contains(&pair(a, b))
    }

    /// Links that broke since the last call, oldest first: both ends are to be told.
    pub fn take_broken(&mut self) -> Vec<(N, N)> {
        std::mem::take(&mut self.broken)
    }

    /// Messages under way.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.queues.values().map(VecDeque::len).sum()
    }

    /// Whether nothing is under way between the two, in either direction.
    #[must_use]
    pub fn is_quiet(&self, a: N, b: N) -> bool {
        !self.queues.contains_key(&(a, b)) && !self.queues.contains_key(&(b, a))
    }
}

fn pair<N: Ord>(a: N, b: N) -> (N, N) {
    if a <= b { (a, b) } else { (b, a) }
}

impl<N: Copy + Ord, M> Network<N, M> for SimNetwork<N, M> {
    fn send(&mut self, from: N, to: N, message: M) {
        if self.is_cut(from, to) {
            return;
        }
        if self.loss_ppm > 0 && self.rng.chance(u64::from(self.loss_ppm), 1_000_000) {
            self.break_link(from, to);
            return;
        }
        let delay = Duration::from_nanos(self.rng.between(0, self.delay_max.as_nanos() as u64));
        let queue = self.queues.entry((from, to)).or_default();
        let after = queue.back().map_or(self.now, |(at, _)| *at);
        queue.push_back((after.max(self.now + delay), message));
    }

    fn poll(&mut self, arrived: &mut Vec<(N, N, M)>) {
        let mut pairs: Vec<(N, N)> = self.queues.keys().copied().collect();
        self.rng.shuffle(&mut pairs);
        for (from, to) in pairs {
            let queue = self.queues.get_mut(&(from, to)).expect("listed");
            while queue.front().is_some_and(|(at, _)| *at <= self.now) {
                let (_, message) = queue.pop_front().expect("has a front");
                arrived.push((from, to, message));
            }
            if queue.is_empty() {
                self.queues.remove(&(from, to));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_of_a_pair_arrive_in_order_and_of_pairs_in_any() {
        let mut is_mixed = false;
        for seed in 0..50 {
            let mut net = SimNetwork::new(seed, Duration::from_micros(10));
            for i in 0..20 {
                net.send(1, 2, i);
                net.send(1, 3, i);
            }
            let clock = SimClock::default();
            let mut arrived = Vec::new();
            while net.in_flight() > 0 {
                clock.advance(Duration::from_micros(1));
                net.advance_to(clock.now());
                net.poll(&mut arrived);
            }
            for to in [2, 3] {
                let got: Vec<i32> = arrived.iter().filter(|m| m.1 == to).map(|m| m.2).collect();
                assert_eq!(got, (0..20).collect::<Vec<_>>(), "seed {seed}");
            }
            is_mixed |= arrived.windows(2).any(|w| w[0].2 > w[1].2);
        }
        assert!(is_mixed);
    }

    #[test]
    fn a_loss_breaks_the_link_and_is_told() {
        let mut net = SimNetwork::new(1, Duration::ZERO);
        net.send(1, 2, 1);
        net.set_loss(1_000_000);
        net.send(2, 1, 2);
        assert_eq!(net.take_broken(), [(1, 2)]);
        let mut arrived = Vec::new();
        net.poll(&mut arrived);
        assert!(arrived.is_empty(), "{arrived:?}");
        net.set_loss(0);
        net.cut(1, 2);
        net.send(1, 2, 3);
        net.heal(1, 2);
        net.send(1, 2, 4);
        net.poll(&mut arrived);
        assert_eq!(arrived, [(1, 2, 4)]);
    }
}
