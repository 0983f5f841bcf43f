//! A queue at work, on the plane's thread: chains in, completions out.
//!
//! Requests are in flight in any order, but their used elements are published in the order in which the guest made
//! them available:
//!
//! ```text
//!   used index          next_avail           avail index (guest)
//!      │  done  wait  done  │   not yet seen      │
//!  ────┴────────────────────┴─────────────────────┴────▶ position
//!       published up to the first that waits
//! ```
//!
//! So a frontend that loses us (killed, updated, disconnected) and resumes at the used index has every unfinished
//! request seen again, without the INFLIGHT messages that the protocol crate refuses. The price is that a slow
//! request holds back the answers of those after it in its own queue; done over, they are harmless (the guest has
//! not been told, so it cannot have relied on the order).

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::OFlags;
use rustix::io::{Errno, ReadWriteFlags};
use types::Payload;
use vdi::{Op, Outcome, ReadPart, VdiError};

use crate::api::{BufferSource, Polled, RingId, RingRequest, SERIAL_BYTES, Tag};
use crate::bus_guard::BusGuard;
use crate::chain::{Chain, Memory};
use crate::device::Device;
use crate::request::{self, HEADER_BYTES, Request, Status};
use crate::split::Layout;

/// What the protocol thread and a ring share while the ring runs.
#[derive(Debug)]
pub(crate) struct Gate {
    /// Frontends swap the interrupt eventfd of a running ring (when they mask the vector).
    call: Mutex<Option<Call>>,
    /// `None` while a ring lives, then the position at which a successor begins.
    resume_at: Mutex<Option<u16>>,
    dropped: Condvar,
}

#[derive(Debug)]
struct Call {
    eventfd: File,
    /// The frontend owns it as well, and may have left it in blocking mode: then it is asked before each write.
    may_block: bool,
}

impl Call {
    fn new(eventfd: File) -> Call {
        let flags = rustix::fs::fcntl_getfl(&eventfd);
        Call {
            may_block: !flags.is_ok_and(|flags| flags.contains(OFlags::NONBLOCK)),
            eventfd,
        }
    }

    fn notify(&self) -> io::Result<()> {
        if self.may_block {
            let mut ready = [PollFd::new(&self.eventfd, PollFlags::OUT)];
            if rustix::event::poll(&mut ready, Some(&Timespec::default()))? == 0 {
                return Ok(());
            }
        }
        match rustix::io::write(&self.eventfd, &1u64.to_ne_bytes()) {
            // A full counter is notice enough.
            Ok(_) | Err(Errno::AGAIN) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

impl Gate {
    pub(crate) fn new(call: Option<File>) -> Gate {
        Gate {
            call: Mutex::new(call.map(Call::new)),
            resume_at: Mutex::new(None),
            dropped: Condvar::new(),
        }
    }

    /// From now on the guest is notified here. Interrupts meant for the old one may have got lost: send one.
    pub(crate) fn set_call(&self, call: Option<File>) {
        *lock(&self.call) = call.map(Call::new);
        // A spurious interrupt is legal, a lost one is a hang.
        let _ = self.notify();
    }

    /// Waits until the plane has dropped the ring; the position of the first request not published.
    pub(crate) fn wait(&self) -> u16 {
        let mut resume_at = lock(&self.resume_at);
        loop {
            if let Some(position) = *resume_at {
                return position;
            }
            resume_at = self
                .dropped
                .wait(resume_at)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn notify(&self) -> io::Result<()> {
        lock(&self.call).as_ref().map_or(Ok(()), Call::notify)
    }
}

/// Poison is of no concern: every value guarded here is whole at any moment.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a ring is made of.
pub(crate) struct RingParts {
    pub(crate) id: RingId,
    pub(crate) device: Arc<Device>,
    /// The guest relies on every completed write being on stable media (no FLUSH agreed on, or cache switched off).
    pub(crate) is_write_through: Arc<AtomicBool>,
    /// Dropped before the memory: fields go in order.
    #[expect(dead_code, reason = "held, not asked")]
    pub(crate) bus_guard: Arc<BusGuard>,
    pub(crate) memory: Arc<Memory>,
    pub(crate) layout: Layout,
    pub(crate) next_avail: u16,
    pub(crate) kick: File,
    pub(crate) gate: Arc<Gate>,
}

/// What a request in flight waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Slot {
    Free,
    /// A read of so many bytes.
    Reading(u64),
    /// Anything else.
    Doing,
    /// Finished, with so many bytes written to the guest; waits to be published.
    Done(u32),
}

struct Entry {
    slot: Slot,
    head: u16,
    chain: Chain,
}

/// One running queue of one device. Made by a [`Server`](crate::Server), given to [`Plane::start_ring`], driven by
/// one thread, and stopped by dropping it.
///
/// [`Plane::start_ring`]: crate::Plane::start_ring
pub struct Ring {
    parts: RingParts,
    next_avail: u16,
    next_used: u16,
    /// Entry of the oldest request in flight; the others follow, in ring order.
    oldest: u16,
    in_flight: u16,
    entries: Box<[Entry]>,
    scratch: Vec<u8>,
    /// The guest broke the ring itself: nothing more is taken from it.
    is_broken: bool,
}

impl Ring {
    /// `None` where the queue's parts are not guest memory.
    pub(crate) fn new(parts: RingParts) -> Option<Ring> {
        if !parts.layout.is_inside(&parts.memory) {
            return None;
        }
        let next_used = parts.layout.used_index(&parts.memory).ok()?;
        let entries = (0..parts.layout.size)
            .map(|_| Entry {
                slot: Slot::Free,
                head: 0,
                chain: Chain::default(),
            })
            .collect();
        Some(Ring {
            next_avail: parts.next_avail,
            next_used,
            oldest: 0,
            in_flight: 0,
            entries,
            scratch: Vec::new(),
            is_broken: false,
            parts,
        })
    }

    /// Which ring this is.
    #[must_use]
    pub fn id(&self) -> RingId {
        self.parts.id
    }

    /// The eventfd that the guest kicks; readable until [`Ring::ack_kick`].
    #[must_use]
    pub fn kick_fd(&self) -> RawFd {
        self.parts.kick.as_raw_fd()
    }

    /// [`Ring::kick_fd`] for callers that like lifetimes.
    #[must_use]
    pub fn kick(&self) -> BorrowedFd<'_> {
        self.parts.kick.as_fd()
    }

    /// Takes back the guest's kicks so far. Never blocks, whatever mode the frontend left the eventfd in.
    pub fn ack_kick(&self) {
        let mut count = [0; 8];
        // Nothing to read is the only error there is, and no news.
        let _ = rustix::io::preadv2(
            &self.parts.kick,
            &mut [IoSliceMut::new(&mut count)],
            u64::MAX,
            ReadWriteFlags::NOWAIT,
        );
    }

    /// Requests taken from the guest and not yet published to it, the completed ones that wait for an older one
    /// included.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        usize::from(self.in_flight)
    }

    /// The most requests that can be in flight; tags are below it.
    #[must_use]
    pub fn size(&self) -> usize {
        self.entries.len()
    }

    /// Whether the guest has broken the ring's rules so that nothing can be taken from it until it is reset.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        self.is_broken
    }

    /// Takes up to `budget` requests from the ring and appends those that the plane has to work on; the others
    /// (malformed, refused, GET_ID) are answered here, and shown to the guest by the next [`Ring::publish`].
    pub fn poll<S: BufferSource>(
        &mut self,
        buffers: &mut S,
        requests: &mut Vec<RingRequest<S::Buffer>>,
        budget: usize,
    ) -> Polled {
        let Some(waiting) = self.waiting() else {
            return Polled::Empty;
        };
        let takes = usize::from(waiting).min(budget);
        for _ in 0..takes {
            match self.take_one(buffers) {
                Ok(Taken::Forward(request)) => requests.push(request),
                Ok(Taken::Answered) => {}
                Ok(Taken::NoBuffer) => return Polled::NoBuffer,
                Err(what) => {
                    self.break_down(&what.to_string());
                    return Polled::Empty;
                }
            }
        }
        if takes < usize::from(waiting) {
            Polled::More
        } else {
            Polled::Empty
        }
    }

    /// Ends a request: what a read brought is copied to the guest. The guest is told by [`Ring::publish`].
    ///
    /// # Panics
    /// When `tag` is not in flight, or the outcome does not fit its request: mistakes of the caller.
    pub fn complete<B: Payload>(&mut self, tag: Tag, result: Result<Outcome<B>, VdiError>) {
        let entry = &self.entries[usize::from(tag.0)];
        let moved = match (entry.slot, result) {
            (Slot::Reading(wanted), Ok(Outcome::Read(parts))) => {
                let moved = self.scatter(entry, &parts);
                assert_eq!(moved, wanted, "a read's parts add up to its length");
                Ok(moved)
            }
            (Slot::Doing, Ok(Outcome::Done)) => Ok(0),
            (Slot::Reading(_) | Slot::Doing, Err(error)) => Err(error),
            (slot, result) => panic!("{slot:?} completed with {:?}", result.map(|_| "another outcome")),
        };
        let (status, moved) = match moved {
            Ok(moved) => (Status::Ok, moved),
            Err(error) => {
                tracing::warn!(ring = %self.parts.id, %error, "a guest's request failed");
                (Status::IoError, 0)
            }
        };
        self.finish(usize::from(tag.0), status, moved);
    }

    /// Shows the guest the completed requests up to the first that is not, and interrupts it if it wants that.
    /// Returns how many. Once a turn is right: it costs two memory fences, and a system call if the guest sleeps.
    ///
    /// # Errors
    /// The interrupt's eventfd could not be written; the completions are visible all the same.
    pub fn publish(&mut self) -> io::Result<usize> {
        let old = self.next_used;
        let mut count = 0;
        let layout = self.parts.layout;
        while self.in_flight > 0 {
            let entry = &mut self.entries[usize::from(self.oldest)];
            let Slot::Done(bytes) = entry.slot else {
                break;
            };
            if layout
                .put_used(&self.parts.memory, self.next_used, entry.head, bytes)
                .is_err()
            {
                self.break_down("the used ring is not guest memory");
                break;
            }
            entry.slot = Slot::Free;
            self.next_used = self.next_used.wrapping_add(1);
            self.oldest = self.entry_after(self.oldest, 1);
            self.in_flight -= 1;
            count += 1;
        }
        if count == 0 {
            return Ok(0);
        }
        match layout.publish(&self.parts.memory, old, self.next_used) {
            Ok(true) => self.parts.gate.notify().map(|()| count),
            Ok(false) => Ok(count),
            Err(_) => {
                self.break_down("the used index is not guest memory");
                Ok(count)
            }
        }
    }

    /// Asks the guest for a kick with its next request. `true` when a request came in the meantime, or some had been
    /// left behind: no kick will come for those, poll again.
    #[must_use]
    pub fn enable_kicks(&mut self) -> bool {
        if self.is_broken {
            return false;
        }
        let enabled = self
            .parts
            .layout
            .enable_kicks(&self.parts.memory, self.next_avail);
        enabled.unwrap_or_else(|_| {
            self.break_down("the ring is not guest memory");
            false
        })
    }

    /// Whether the guest has made something available that was not taken yet: one load of its memory.
    #[must_use]
    pub fn has_news(&self) -> bool {
        let layout = &self.parts.layout;
        !self.is_broken
            && layout
                .avail_index(&self.parts.memory)
                .is_ok_and(|index| index != self.next_avail)
    }

    /// Spares the guest its kicks while the ring is polled anyway. Some may still come.
    pub fn disable_kicks(&mut self) {
        if self.is_broken {
            return;
        }
        let disabled = self
            .parts
            .layout
            .disable_kicks(&self.parts.memory, self.next_avail);
        if disabled.is_err() {
            self.break_down("the used ring is not guest memory");
        }
    }

    /// How many chains the guest has made available beyond those taken; `None` on a broken ring.
    fn waiting(&mut self) -> Option<u16> {
        if self.is_broken {
            return None;
        }
        let waiting = self
            .parts
            .layout
            .avail_index(&self.parts.memory)
            .ok()
            .map(|index| index.wrapping_sub(self.next_avail))
            // 2.7.13.3.1: at most the queue's size, of which those in flight are part.
            .filter(|waiting| *waiting <= self.parts.layout.size - self.in_flight);
        if waiting.is_none() {
            self.break_down("the available index ran away");
        }
        waiting
    }

    fn take_one<S: BufferSource>(&mut self, buffers: &mut S) -> Result<Taken<S::Buffer>, Broken> {
        let layout = self.parts.layout;
        let head = layout
            .head(&self.parts.memory, self.next_avail)
            .map_err(|_| Broken::Outside)?;
        if head >= layout.size {
            return Err(Broken::Head(head));
        }
        let index = usize::from(self.entry_after(self.oldest, self.in_flight));
        let entry = &mut self.entries[index];
        assert_eq!(entry.slot, Slot::Free, "fewer in flight than entries");
        entry.head = head;
        let walked = entry.chain.walk(
            &self.parts.memory,
            layout.table,
            layout.size,
            head,
            &mut self.scratch,
        );
        let parsed = match walked {
            Ok(()) => parse(&self.parts, &entry.chain),
            Err(what) => {
                tracing::debug!(ring = %self.parts.id, %what, "malformed chain");
                Err(Refused::Silently)
            }
        };
        let op = match parsed {
            Ok(request) => match operation(&self.parts, &entry.chain, request, buffers) {
                Operation::NoBuffer => return Ok(Taken::NoBuffer),
                Operation::Answer(status, moved) => Err((status, moved)),
                Operation::Forward(op) => Ok((request, op)),
            },
            Err(Refused::With(status)) => Err((status, 0)),
            Err(Refused::Silently) => {
                entry.slot = Slot::Done(0);
                self.advance();
                return Ok(Taken::Answered);
            }
        };
        self.advance();
        match op {
            Ok((request, op)) => {
                self.entries[index].slot = match request {
                    Request::Read { length, .. } => Slot::Reading(length),
                    _ => Slot::Doing,
                };
                let tag = Tag(index as u16);
                Ok(Taken::Forward(RingRequest { tag, op }))
            }
            Err((status, moved)) => {
                self.finish(index, status, moved);
                Ok(Taken::Answered)
            }
        }
    }

    fn advance(&mut self) {
        self.next_avail = self.next_avail.wrapping_add(1);
        self.in_flight += 1;
    }

    fn entry_after(&self, from: u16, count: u16) -> u16 {
        (from + count) & (self.parts.layout.size - 1)
    }

    fn scatter<B: Payload>(&self, entry: &Entry, parts: &[ReadPart<B>]) -> u64 {
        let mut done = 0;
        let guest = &entry.chain.writable;
        for part in parts {
            match part {
                ReadPart::Data(payload) => {
                    guest.write_payload(&self.parts.memory, done, payload);
                    done += payload.length() as u64;
                }
                ReadPart::Zeros(length) => {
                    guest.write_zeros(&self.parts.memory, done, *length);
                    done += length;
                }
            }
        }
        done
    }

    fn finish(&mut self, index: usize, status: Status, moved: u64) {
        let entry = &mut self.entries[index];
        let status_at = entry.chain.writable.bytes() - 1;
        entry
            .chain
            .writable
            .write(&self.parts.memory, status_at, &[status as u8]);
        entry.slot = Slot::Done(moved as u32 + 1);
    }

    fn break_down(&mut self, what: &str) {
        if !self.is_broken {
            tracing::warn!(ring = %self.parts.id, what, "the guest broke its ring; it is served no more until it is reset");
        }
        self.is_broken = true;
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let resume_at = self.next_avail.wrapping_sub(self.in_flight);
        *lock(&self.parts.gate.resume_at) = Some(resume_at);
        self.parts.gate.dropped.notify_all();
    }
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring")
            .field("id", &self.parts.id)
            .field("next_avail", &self.next_avail)
            .field("next_used", &self.next_used)
            .field("in_flight", &self.in_flight)
            .finish_non_exhaustive()
    }
}

enum Taken<B> {
    Forward(RingRequest<B>),
    Answered,
    NoBuffer,
}

/// The ring itself, not a request in it, is unusable.
#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error("the available ring is not guest memory")]
    Outside,
    #[error("head {0} is beyond the descriptor table")]
    Head(u16),
}

enum Refused {
    With(Status),
    /// There is no status byte to write.
    Silently,
}

fn parse(parts: &RingParts, chain: &Chain) -> Result<Request, Refused> {
    if chain.writable.bytes() == 0 {
        return Err(Refused::Silently);
    }
    request::parse(&parts.memory, chain, &parts.device.config, parts.device.bytes()).map_err(Refused::With)
}

enum Operation<B> {
    Forward(Op<B>),
    Answer(Status, u64),
    NoBuffer,
}

fn operation<S: BufferSource>(
    parts: &RingParts,
    chain: &Chain,
    request: Request,
    buffers: &mut S,
) -> Operation<S::Buffer> {
    let fua = parts.is_write_through.load(Ordering::Relaxed);
    Operation::Forward(match request {
        Request::Read { offset, length } => Op::Read {
            offset,
            length,
            of: None,
        },
        Request::Write { offset, length } => {
            let copied = buffers.filled(length as usize, |target| {
                chain.readable.read(&parts.memory, HEADER_BYTES, target);
            });
            match copied {
                Some(data) => Op::Write { offset, data, fua },
                None => return Operation::NoBuffer,
            }
        }
        Request::Flush => Op::Flush,
        Request::Discard { offset, length } => Op::Discard { offset, length },
        Request::WriteZeroes { offset, length } => Op::WriteZeroes { offset, length, fua },
        Request::Serial => {
            let room = (chain.writable.bytes() - 1).min(SERIAL_BYTES as u64);
            chain
                .writable
                .write(&parts.memory, 0, &parts.device.serial()[..room as usize]);
            return Operation::Answer(Status::Ok, room);
        }
        Request::Nothing => return Operation::Answer(Status::Ok, 0),
    })
}
