//! The real world of a data-plane thread: one io_uring for its disks, its guests' kicks, its links to other
//! hosts and its mailbox.
//!
//! ```text
//!  other threads ──Waker──┐
//!  guests' kick fds ──────┤ watch                     ┌─► Event::Woken, Event::Ready(token)
//!  Ring::submit(disk) ────┤                            ├─► Event::Disk(slot, completion)
//!  Ring::send, receive ───┴─► Ring::turn(wait) ───────┴─► Event::Sent, Event::Received(slot, …)
//!                             one io_uring_enter
//! ```
//!
//! Buffers come from a [`Pool`] whose region is registered with the ring where the kernel permits.

mod alone;
mod operation;
mod pool;
mod ring;
mod setup;
mod stream;
mod waker;

pub use alone::RingDisk;
pub use pool::{BUFFER_ALIGN, Buf, BufMut, Pool, PoolConfig, PoolCounters, SLOT_BYTES};
pub use ring::{DiskSlot, Event, Ring, RingConfig, RingError, RingTraits, Token, Wait};
pub use stream::{Gather, Landing, StreamError, StreamSlot};
pub use waker::Waker;

use types::Instant;

use crate::Clock;

/// The operating system's monotonic clock; all instances agree.
#[derive(Clone, Copy, Debug, Default)]
pub struct MonotonicClock;

impl Clock for MonotonicClock {
    fn now(&self) -> Instant {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        let seconds = u64::try_from(now.tv_sec).expect("a monotonic clock counts from zero");
        Instant(seconds * 1_000_000_000 + now.tv_nsec as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clock_does_not_go_back() {
        let first = MonotonicClock.now();
        let later = MonotonicClock.now();
        assert!(first > Instant(0) && later >= first);
    }
}
