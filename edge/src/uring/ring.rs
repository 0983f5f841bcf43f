//! The ring of one data-plane thread.
//!
//! Everything a thread waits for is in this one ring, so that it sleeps in one `io_uring_enter` and each turn
//! costs one system call however much it carries. The ring stays on the thread that made it: the kernel then
//! skips its locks (SINGLE_ISSUER) and runs completion work only when we ask (DEFER_TASKRUN).
//!
//! Kicks are watched with one-shot polls that are armed again on the next turn. A multishot poll would save an
//! entry per kick, but reports changes only: a reader that does not empty its descriptor would sleep for ever.
//!
//! UNSAFETY: submission entries carry raw addresses. They point into an [`Operation`] (header, iovecs, buffers:
//! all on the heap or in the pool, none moves), which stays in `slab` until its completion is reaped, or into the boxes
//! and buffers of a [`Stream`], which stays in `streams` until both its transfers are; dropping the ring waits for
//! the rest.
#![allow(unsafe_code)]

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use io_uring::squeue::Entry;
use io_uring::types::{SubmitArgs, Timespec};
use io_uring::{IoUring, opcode, types as ring_types};
use libc::iovec;
use slab::Slab;
use types::Instant;

use super::MonotonicClock;
use super::operation::{Operation, Place, Progress};
use super::pool::{Buf, Pool};
use super::setup::{fixed_buffer, register_region, set_up};
use super::stream::{Gather, Landing, Passed, Stream, StreamError, StreamSlot, Way};
use super::waker::Waker;
use crate::{Clock, Completion, DiskOp, IoId};

/// Disks that fit the registered file table; further ones work, a little slower.
const REGISTERED_DISKS: u32 = 64;

/// `user_data` of entries whose completion means nothing to us.
const IGNORED: u64 = u64::MAX;

/// How a ring is made.
#[derive(Clone, Debug)]
pub struct RingConfig {
    /// Submission entries, and the most disk operations in the kernel at once; a power of two, 1 to 32,768.
    pub entries: u32,
    /// Where reads take their buffers from.
    pub pool: Pool,
}

/// Why a ring could not be made or extended.
#[derive(Debug, thiserror::Error)]
#[error("{operation}: {source}")]
pub struct RingError {
    /// The system call or its purpose.
    pub operation: &'static str,
    /// The operating system's word.
    #[source]
    pub source: std::io::Error,
}

/// What the kernel granted. Nothing depends on it but speed; worth a line in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingTraits {
    /// SINGLE_ISSUER and DEFER_TASKRUN (Linux 6.1).
    pub is_deferred: bool,
    /// The pool's region is registered (RLIMIT_MEMLOCK or CAP_IPC_LOCK allowed it).
    pub has_registered_buffers: bool,
    /// Disks sit in a registered file table.
    pub has_registered_files: bool,
}

/// Names a disk of one ring. Never names another disk after its removal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DiskSlot(u64);

/// Names a watched descriptor; chosen by the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Token(pub u64);

/// How long a turn may sleep when nothing has happened yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Not at all.
    No,
    /// Until this time of [`MonotonicClock`].
    Until(Instant),
    /// Until something happens.
    Forever,
}

/// What a turn brought.
#[derive(Debug)]
pub enum Event {
    /// A disk operation ended.
    Disk(DiskSlot, Completion<Buf>),
    /// A watched descriptor is readable or hung up. Reported every turn until it is read empty.
    Ready(Token),
    /// Somebody called [`Waker::wake`]; look into the mailbox.
    Woken,
    /// All of a [`Ring::send`] is with the kernel, or the stream is broken. What was sent comes back.
    Sent(StreamSlot, Gather, Result<(), StreamError>),
    /// So many bytes came, none when the other end sends no more; or the stream is broken.
    Received(StreamSlot, Landing, Result<usize, StreamError>),
}

/// One io_uring and what is under way in it. Stays on the thread that made it.
pub struct Ring {
    uring: IoUring,
    pool: Pool,
    traits: RingTraits,
    entries: usize,
    disks: BTreeMap<DiskSlot, DiskEntry>,
    streams: BTreeMap<StreamSlot, Stream>,
    next_slot: u64,
    free_files: Vec<u32>,
    slab: Slab<UnderWay>,
    /// Disk operations that are to go to the kernel, oldest first.
    waiting: VecDeque<usize>,
    /// Transfers on streams that are to go to the kernel.
    transfers: Vec<(StreamSlot, Way)>,
    /// Lists of memory pieces that no write uses now; never more than writes were under way at once.
    spares: Vec<Vec<iovec>>,
    /// Polls that are to be armed.
    unarmed: Vec<usize>,
    /// Polls to take back from the kernel.
    cancels: Vec<usize>,
    watches: BTreeMap<Watched, usize>,
    /// Disk operations the kernel has.
    disk_in_kernel: usize,
    /// Entries of any kind whose completion will name the slab.
    in_kernel: usize,
    enters: u64,
    waker: Waker,
    stays_on_its_thread: PhantomData<*const ()>,
}

struct DiskEntry {
    file: File,
    label: String,
    place: Place,
    under_way: usize,
}

enum UnderWay {
    Disk(DiskSlot, Operation),
    Poll(Poll),
    Transfer(StreamSlot, Way),
}

struct Poll {
    fd: OwnedFd,
    watched: Watched,
    is_armed: bool,
    is_over: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Watched {
    Waker,
    Caller(Token),
}

impl Ring {
    /// Makes a ring for the calling thread.
    ///
    /// # Errors
    /// The kernel has no io_uring, or forbids it, or is out of memory or descriptors.
    pub fn new(config: RingConfig) -> Result<Ring, RingError> {
        assert!(
            config.entries.is_power_of_two() && config.entries <= 32_768,
            "{} entries",
            config.entries
        );
        let (uring, is_deferred) = set_up(config.entries)?;
        let has_registered_files = uring.submitter().register_files_sparse(REGISTERED_DISKS).is_ok();
        let has_registered_buffers = register_region(&uring, &config.pool);
        let waker = Waker::new().map_err(|errno| RingError {
            operation: "eventfd",
            source: errno.into(),
        })?;
        let mut ring = Ring {
            uring,
            pool: config.pool,
            traits: RingTraits {
                is_deferred,
                has_registered_buffers,
                has_registered_files,
            },
            entries: config.entries as usize,
            disks: BTreeMap::new(),
            streams: BTreeMap::new(),
            next_slot: 0,
            free_files: if has_registered_files {
                (0..REGISTERED_DISKS).rev().collect()
            } else {
                Vec::new()
            },
            slab: Slab::with_capacity(config.entries as usize),
            waiting: VecDeque::new(),
            transfers: Vec::new(),
            spares: Vec::new(),
            unarmed: Vec::new(),
            cancels: Vec::new(),
            watches: BTreeMap::new(),
            disk_in_kernel: 0,
            in_kernel: 0,
            enters: 0,
            waker: waker.clone(),
            stays_on_its_thread: PhantomData,
        };
        ring.watch_as(waker.fd(), Watched::Waker)?;
        Ok(ring)
    }

    /// What the kernel granted.
    #[must_use]
    pub fn traits(&self) -> RingTraits {
        self.traits
    }

    /// The pool that reads are filled from.
    #[must_use]
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// System calls made so far to submit, wait and run completions.
    #[must_use]
    pub fn enters(&self) -> u64 {
        self.enters
    }

    /// Wakes this ring from other threads.
    #[must_use]
    pub fn waker(&self) -> Waker {
        self.waker.clone()
    }

    /// Adds a disk; open it with O_DIRECT. `label` appears in panics only.
    ///
    /// # Errors
    /// The kernel refuses to register the file.
    pub fn add_disk(&mut self, file: File, label: &str) -> Result<DiskSlot, RingError> {
        let fd = file.as_raw_fd();
        let place = match self.free_files.pop() {
            Some(index) => {
                let registered = self.uring.submitter().register_files_update(index, &[fd]);
                if let Err(source) = registered {
                    self.free_files.push(index);
                    return Err(RingError {
                        operation: "registering a disk",
                        source,
                    });
                }
                Place::Registered(index)
            }
            None => Place::Plain(fd),
        };
        let slot = DiskSlot(self.next_slot);
        self.next_slot += 1;
        let entry = DiskEntry {
            file,
            label: label.to_owned(),
            place,
            under_way: 0,
        };
        self.disks.insert(slot, entry);
        Ok(slot)
    }

    /// Gives a disk back. Panics when operations are still under way: see [`Ring::under_way`].
    pub fn remove_disk(&mut self, slot: DiskSlot) -> File {
        let disk = self
            .disks
            .remove(&slot)
            .expect("the slot of a disk that was added and not removed");
        assert_eq!(
            disk.under_way, 0,
            "removing disk {} with operations under way",
            disk.label
        );
        if let Place::Registered(index) = disk.place {
            let cleared = self.uring.submitter().register_files_update(index, &[-1]);
            assert!(
                cleared.is_ok(),
                "taking disk {} out of the file table: {cleared:?}",
                disk.label
            );
            self.free_files.push(index);
        }
        disk.file
    }

    /// Operations of this disk that were submitted and whose completion was not yet handed out.
    #[must_use]
    pub fn under_way(&self, slot: DiskSlot) -> usize {
        self.disks.get(&slot).map_or(0, |disk| disk.under_way)
    }

    /// Takes an operation; it goes to the kernel in the next [`Ring::turn`] that has room. Never fails: what does
    /// not fit waits here, and the caller bounds that by bounding what it has under way.
    pub fn submit(&mut self, slot: DiskSlot, id: IoId, operation: DiskOp<Buf>) {
        let disk = self
            .disks
            .get_mut(&slot)
            .expect("the slot of a disk that was added and not removed");
        disk.under_way += 1;
        let key = self.slab.insert(UnderWay::Disk(
            slot,
            Operation::new(id, operation, &mut self.spares),
        ));
        self.waiting.push_back(key);
    }

    /// Reports `token` whenever `fd` is readable, until [`Ring::unwatch`]. The ring keeps its own duplicate.
    ///
    /// # Errors
    /// No descriptor is left to duplicate `fd`.
    pub fn watch(&mut self, fd: BorrowedFd<'_>, token: Token) -> Result<(), RingError> {
        self.watch_as(fd, Watched::Caller(token))
    }

    fn watch_as(&mut self, fd: BorrowedFd<'_>, watched: Watched) -> Result<(), RingError> {
        assert!(
            !self.watches.contains_key(&watched),
            "{watched:?} is watched already"
        );
        let fd = fd.try_clone_to_owned().map_err(|source| RingError {
            operation: "duplicating a descriptor to watch",
            source,
        })?;
        let poll = Poll {
            fd,
            watched,
            is_armed: false,
            is_over: false,
        };
        let key = self.slab.insert(UnderWay::Poll(poll));
        self.watches.insert(watched, key);
        self.unarmed.push(key);
        Ok(())
    }

    /// Stops watching; `token` is not reported again and may be used anew. Does nothing for an unknown one.
    pub fn unwatch(&mut self, token: Token) {
        let Some(key) = self.watches.remove(&Watched::Caller(token)) else {
            return;
        };
        let UnderWay::Poll(poll) = &mut self.slab[key] else {
            panic!("a watch without a poll")
        };
        poll.is_over = true;
        if poll.is_armed {
            self.cancels.push(key);
        } else {
            self.unarmed.retain(|other| *other != key);
            self.slab.remove(key);
        }
    }

    /// Adds a connected stream socket. The ring closes it.
    ///
    /// # Errors
    /// It is no socket.
    pub fn add_stream(&mut self, socket: OwnedFd) -> Result<StreamSlot, RingError> {
        let stream = Stream::new(socket).map_err(|errno| RingError {
            operation: "adding a socket",
            source: errno.into(),
        })?;
        let slot = StreamSlot(self.next_slot);
        self.next_slot += 1;
        self.streams.insert(slot, stream);
        Ok(slot)
    }

    /// Sends all of `gather`; [`Event::Sent`] says when the kernel has it. One at a time.
    pub fn send(&mut self, slot: StreamSlot, gather: Gather) {
        self.stream(slot).start_send(gather);
        self.transfers.push((slot, Way::Send));
    }

    /// Receives what comes, at least a byte; [`Event::Received`] brings it. One at a time.
    pub fn receive(&mut self, slot: StreamSlot, landing: Landing) {
        self.stream(slot).start_receive(landing);
        self.transfers.push((slot, Way::Receive));
    }

    fn stream(&mut self, slot: StreamSlot) -> &mut Stream {
        let stream = self.streams.get_mut(&slot).filter(|stream| !stream.is_over);
        stream.expect("the slot of a stream that was added and not removed")
    }

    /// As [`Ring::remove_stream`], after `words`, if the socket takes them without waiting and nothing is being sent: a
    /// courtesy to the other end.
    pub fn remove_stream_saying(&mut self, slot: StreamSlot, words: &[u8]) {
        if let Some(stream) = self.streams.get(&slot).filter(|stream| !stream.is_over) {
            stream.say(words);
        }
        self.remove_stream(slot);
    }

    /// Ends a stream: nothing of it is reported any more, and it is closed when the kernel has let go of its buffers.
    /// Does nothing for one that was ended.
    pub fn remove_stream(&mut self, slot: StreamSlot) {
        let Some(stream) = self.streams.get_mut(&slot).filter(|stream| !stream.is_over) else {
            return;
        };
        stream.is_over = true;
        stream.shut_down();
        // What the kernel was not given yet is forgotten.
        self.transfers.retain(|(other, way)| {
            if *other == slot {
                stream.forget(*way);
            }
            *other != slot
        });
        if stream.is_idle() {
            self.streams.remove(&slot);
        }
    }

    /// Whether a [`Ring::turn`] would bring something now: two loads, no system call.
    #[must_use]
    pub fn has_news(&mut self) -> bool {
        self.uring.submission().taskrun() || !self.uring.completion().is_empty()
    }

    /// Disk operations that wait for the next [`Ring::flush`] or [`Ring::turn`].
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Hands everything queued to the kernel now; what completes shows in the next turn.
    pub fn flush(&mut self) {
        self.queue_polls();
        self.queue_transfers();
        self.queue_operations();
        self.enter(Wait::No);
    }

    /// Submits everything queued, sleeps as `wait` says if nothing has completed, and appends what happened.
    pub fn turn(&mut self, wait: Wait, events: &mut Vec<Event>) {
        let before = events.len();
        self.reap(events);
        self.queue_polls();
        self.queue_transfers();
        self.queue_operations();
        let wait = if events.len() > before { Wait::No } else { wait };
        self.enter(wait);
        self.reap(events);
    }

    fn queue_polls(&mut self) {
        for key in std::mem::take(&mut self.cancels) {
            let entry = opcode::PollRemove::new(key as u64).build().user_data(IGNORED);
            self.push(&entry);
        }
        // Put back below: arming a poll once per kick is to allocate nothing.
        let mut unarmed = std::mem::take(&mut self.unarmed);
        for key in unarmed.drain(..) {
            let UnderWay::Poll(poll) = &mut self.slab[key] else {
                panic!("arming something else than a poll")
            };
            poll.is_armed = true;
            let fd = ring_types::Fd(poll.fd.as_raw_fd());
            let entry = opcode::PollAdd::new(fd, libc::POLLIN as u32)
                .build()
                .user_data(key as u64);
            self.in_kernel += 1;
            self.push(&entry);
        }
        // Pushing may have entered the kernel, but only a reap adds to the list.
        self.unarmed = unarmed;
    }

    /// Before disk operations: the other end begins while we go on.
    fn queue_transfers(&mut self) {
        let mut transfers = std::mem::take(&mut self.transfers);
        for (slot, way) in transfers.drain(..) {
            let stream = self
                .streams
                .get_mut(&slot)
                .expect("a stream with a transfer stays");
            let entry = stream.entry(way);
            let key = self.slab.insert(UnderWay::Transfer(slot, way));
            self.in_kernel += 1;
            self.push(&entry.user_data(key as u64));
        }
        self.transfers = transfers;
    }

    fn queue_operations(&mut self) {
        while self.disk_in_kernel < self.entries {
            let Some(key) = self.waiting.pop_front() else {
                return;
            };
            let UnderWay::Disk(slot, operation) = &mut self.slab[key] else {
                panic!("a poll among the waiting")
            };
            let place = self.disks[slot].place;
            let fixed = fixed_buffer(self.traits.has_registered_buffers, &self.pool);
            let entry = operation.entry(place, &self.pool, fixed).user_data(key as u64);
            self.disk_in_kernel += 1;
            self.in_kernel += 1;
            self.push(&entry);
        }
    }

    /// Appends to the submission queue, emptying it into the kernel when it is full.
    fn push(&mut self, entry: &Entry) {
        loop {
            // SAFETY: the entry is a poll or its removal, which carries no address, or comes from an operation in
            // `slab` or a stream in `streams`, which keeps every address in it valid and still until its completion
            // (module comment).
            let pushed = unsafe { self.uring.submission().push(entry) };
            if pushed.is_ok() {
                return;
            }
            self.enter(Wait::No);
        }
    }

    /// The one system call of a turn; none when there is nothing to submit, to wait for or to run.
    fn enter(&mut self, wait: Wait) {
        let (is_idle, has_completions) = {
            let queue = self.uring.submission();
            let is_idle = queue.is_empty() && !queue.taskrun() && !queue.cq_overflow();
            drop(queue);
            (is_idle, !self.uring.completion().is_empty())
        };
        let wait = if has_completions { Wait::No } else { wait };
        if wait == Wait::No && is_idle {
            return;
        }
        self.enters += 1;
        let entered = match wait {
            Wait::No => self.uring.submit(),
            Wait::Forever => self.uring.submit_and_wait(1),
            Wait::Until(deadline) => {
                let rest = deadline.since(MonotonicClock.now());
                if rest == Duration::ZERO {
                    self.uring.submit()
                } else {
                    let timespec = Timespec::from(rest);
                    let arguments = SubmitArgs::new().timespec(&timespec);
                    self.uring.submitter().submit_with_args(1, &arguments)
                }
            }
        };
        let Err(error) = entered else { return };
        // Interrupted, timed out, or the kernel is short of memory or of completion room: what was not taken stays
        // in the queue for the next turn.
        match error.raw_os_error() {
            Some(libc::EINTR | libc::ETIME | libc::EAGAIN | libc::EBUSY | libc::ENOMEM) => {}
            _ => panic!("io_uring_enter: {error}"),
        }
    }

    fn reap(&mut self, events: &mut Vec<Event>) {
        loop {
            let next = self.uring.completion().next();
            let Some(completion) = next else { return };
            if completion.user_data() == IGNORED {
                continue;
            }
            self.in_kernel -= 1;
            let key = completion.user_data() as usize;
            match &mut self.slab[key] {
                UnderWay::Disk(..) => self.reap_disk(key, completion.result(), events),
                UnderWay::Poll(_) => self.reap_poll(key, completion.result(), events),
                UnderWay::Transfer(slot, way) => {
                    let (slot, way) = (*slot, *way);
                    self.slab.remove(key);
                    self.reap_transfer(slot, way, completion.result(), events);
                }
            }
        }
    }

    fn reap_disk(&mut self, key: usize, result: i32, events: &mut Vec<Event>) {
        self.disk_in_kernel -= 1;
        let UnderWay::Disk(_, operation) = &mut self.slab[key] else {
            panic!("not a disk operation")
        };
        match operation.advance(result) {
            // Ahead of younger ones: its buffers are held already.
            Progress::Again => self.waiting.push_front(key),
            Progress::Finished(result) => {
                let UnderWay::Disk(slot, operation) = self.slab.remove(key) else {
                    panic!("not a disk operation")
                };
                let disk = self
                    .disks
                    .get_mut(&slot)
                    .expect("a disk with operations is not removed");
                disk.under_way -= 1;
                events.push(Event::Disk(slot, operation.finish(result, &mut self.spares)));
            }
        }
    }

    fn reap_transfer(&mut self, slot: StreamSlot, way: Way, result: i32, events: &mut Vec<Event>) {
        let stream = self
            .streams
            .get_mut(&slot)
            .expect("a stream stays until its last transfer is back");
        let passed = stream.advance(way, result);
        if stream.is_over {
            if stream.is_idle() {
                self.streams.remove(&slot);
            }
            return;
        }
        match passed {
            Passed::Again => self.transfers.push((slot, way)),
            Passed::Sent(gather, result) => events.push(Event::Sent(slot, gather, result)),
            Passed::Received(landing, result) => events.push(Event::Received(slot, landing, result)),
        }
    }

    fn reap_poll(&mut self, key: usize, result: i32, events: &mut Vec<Event>) {
        let UnderWay::Poll(poll) = &mut self.slab[key] else {
            panic!("not a poll")
        };
        if poll.is_over {
            self.cancels.retain(|other| *other != key);
            self.slab.remove(key);
            return;
        }
        poll.is_armed = false;
        let watched = poll.watched;
        self.unarmed.push(key);
        if result < 0 {
            // The kernel could not poll just now; the next turn tries again.
            return;
        }
        match watched {
            Watched::Waker => {
                self.waker.clear();
                events.push(Event::Woken);
            }
            Watched::Caller(token) => events.push(Event::Ready(token)),
        }
    }
}

impl Drop for Ring {
    /// Waits for what the kernel has: it may still fill our buffers. What it has not yet is forgotten.
    fn drop(&mut self) {
        self.waiting.clear();
        self.unarmed.clear();
        for slot in self.streams.keys().copied().collect::<Vec<_>>() {
            self.remove_stream(slot);
        }
        let armed = self
            .slab
            .iter()
            .filter(|(_, it)| matches!(it, UnderWay::Poll(poll) if poll.is_armed));
        self.cancels = armed.map(|(key, _)| key).collect();
        for watched in std::mem::take(&mut self.watches) {
            if let UnderWay::Poll(poll) = &mut self.slab[watched.1] {
                poll.is_over = true;
            }
        }
        self.queue_polls();
        let mut events = Vec::new();
        while self.in_kernel > 0 {
            self.enter(Wait::Forever);
            self.reap(&mut events);
            events.clear();
        }
    }
}

#[cfg(test)]
mod tests;
