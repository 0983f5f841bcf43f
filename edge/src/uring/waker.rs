//! How other threads wake a data-plane thread that sleeps in its ring.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{EventfdFlags, eventfd};

/// Wakes one ring, from any thread. Put the message into the mailbox first, then wake.
///
/// Many wakes before the ring looks cost one system call together: the flag says that one is already on its
/// way. The ring lowers the flag before it reports [`Event::Woken`](super::Event::Woken), and the owner empties
/// its mailbox after that, so whoever found the flag up had put its message in early enough to be seen.
#[derive(Clone, Debug)]
pub struct Waker {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    eventfd: OwnedFd,
    is_raised: AtomicBool,
}

impl Waker {
    pub(super) fn new() -> rustix::io::Result<Waker> {
        let eventfd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Waker {
            inner: Arc::new(Inner {
                eventfd,
                is_raised: AtomicBool::new(false),
            }),
        })
    }

    /// Makes the ring's current or next [`turn`](super::Ring::turn) return. Never waits.
    pub fn wake(&self) {
        if self.inner.is_raised.swap(true, Ordering::AcqRel) {
            return;
        }
        let written = rustix::io::write(&self.inner.eventfd, &1u64.to_ne_bytes());
        // EAGAIN would mean 2^64 - 2 unread wakes, and the flag allows one.
        assert_eq!(written, Ok(8), "waking a ring");
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.inner.eventfd.as_fd()
    }

    /// Lowers the flag and the eventfd, in an order that keeps a wake which comes in between.
    pub(super) fn clear(&self) {
        let mut count = [0u8; 8];
        match rustix::io::read(&self.inner.eventfd, &mut count) {
            Ok(_) | Err(rustix::io::Errno::AGAIN) => {}
            Err(error) => panic!("reading a ring's own eventfd: {error}"),
        }
        // A swap, not a store: reading what a waker wrote is what makes its message visible to us.
        self.inner.is_raised.swap(false, Ordering::AcqRel);
    }
}
