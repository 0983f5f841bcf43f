//! The real log store behind a disk node.

use store::{Effect, Event, ShardSummary, Store, StoreStats};
use types::{Instant, Payload};

use crate::LogStore;

impl<B: Payload> LogStore<B> for Store<B> {
    fn step(&mut self, now: Instant, event: Event<B>, effects: &mut Vec<Effect<B>>) {
        Store::step(self, now, event, effects);
    }

    fn shards(&self) -> Vec<ShardSummary> {
        Store::shards(self)
    }

    fn stats(&self) -> StoreStats {
        Store::stats(self)
    }

    fn is_busy(&self) -> bool {
        Store::is_busy(self)
    }

    fn is_witnessed(&self) -> bool {
        Store::is_witnessed(self)
    }
}
