//! A queue as the protocol crate sees it: it tells us what the frontend says, we start and stop the ring.
//!
//! ```text
//!   SET_VRING_KICK ─▶ ready ┐                      ┌─▶ Plane::start_ring(Ring)
//!   SET_VRING_ENABLE ─▶ enabled ┴─▶ may run? ─ yes ┘
//!   GET_VRING_BASE, ENABLE 0, new memory or addresses ─▶ Plane::stop_ring, wait for the drop, remember the position
//! ```
//!
//! Whatever changes under a running ring stops it first and starts another with the new facts. Only the interrupt
//! eventfd is swapped in place: guests mask vectors all the time.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use vhost_user_backend::{VringMutex, VringState, VringStateGuard, VringStateMutGuard, VringT};
use virtio_queue::{Error as QueueError, QueueT};
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryAtomic};

use crate::api::RingId;
use crate::chain::Memory;
use crate::ring::{Gate, Ring, RingParts, lock};
use crate::session::Session;
use crate::split::Layout;

pub(crate) type AtomicMemory = GuestMemoryAtomic<Memory>;

/// Numbers all starts of all rings of the process.
static GENERATION: AtomicU64 = AtomicU64::new(1);

thread_local! {
    /// `VringT::new` is told neither the device nor the queue, and nobody hands its results out. It runs within
    /// `VhostUserDaemon::new`, on our thread: the session it belongs to is left here around that call.
    static SESSION: RefCell<Option<Arc<Session>>> = const { RefCell::new(None) };
}

/// Runs `build`, all vrings of which belong to `session`.
pub(crate) fn with_session<T>(session: &Arc<Session>, build: impl FnOnce() -> T) -> T {
    SESSION.set(Some(Arc::clone(session)));
    let built = build();
    SESSION.set(None);
    built
}

/// One queue of one connection.
#[derive(Clone)]
pub(crate) struct Vring {
    /// The protocol crate's own idea of the queue, which it insists on looking into.
    inner: VringMutex<AtomicMemory>,
    control: Arc<Mutex<Control>>,
}

struct Control {
    session: Arc<Session>,
    memory: AtomicMemory,
    queue: u16,
    kick: Option<File>,
    call: Option<File>,
    has_size: bool,
    has_addresses: bool,
    is_enabled: bool,
    running: Option<(RingId, Arc<Gate>)>,
}

impl Vring {
    /// Stops the ring if it runs. It starts again when the frontend changes anything that lets it.
    pub(crate) fn stop(&self) {
        self.control().stop(&self.inner);
    }

    /// Stops the ring and starts it again with what now is so (a new memory map).
    pub(crate) fn restart(&self) {
        self.change(|_, _| {});
    }

    fn control(&self) -> MutexGuard<'_, Control> {
        lock(&self.control)
    }

    /// Makes a change that a running ring must not see, and runs it again afterwards if it may.
    fn change<T>(&self, change: impl FnOnce(&mut Control, &VringMutex<AtomicMemory>) -> T) -> T {
        let mut control = self.control();
        control.stop(&self.inner);
        let result = change(&mut control, &self.inner);
        control.start_if_possible(&self.inner);
        result
    }
}

impl Control {
    fn stop(&mut self, inner: &VringMutex<AtomicMemory>) {
        if let Some((id, gate)) = self.running.take() {
            self.session.plane.stop_ring(id);
            let position = gate.wait();
            inner.set_queue_next_avail(position);
            tracing::debug!(ring = %id, position, "ring stopped");
        }
    }

    fn start_if_possible(&mut self, inner: &VringMutex<AtomicMemory>) {
        let (layout, next_avail, is_ready) = {
            let state = inner.get_ref();
            let queue = state.get_queue();
            let layout = Layout {
                size: queue.size(),
                table: GuestAddress(queue.desc_table()),
                avail: GuestAddress(queue.avail_ring()),
                used: GuestAddress(queue.used_ring()),
                has_event_idx: queue.event_idx_enabled(),
            };
            (layout, queue.next_avail(), queue.ready())
        };
        if !(is_ready && self.is_enabled && self.has_addresses && self.has_size) {
            return;
        }
        let Some(kick) = self.kick.as_ref().and_then(|kick| kick.try_clone().ok()) else {
            return;
        };
        let call = self.call.as_ref().and_then(|call| call.try_clone().ok());
        let gate = Arc::new(Gate::new(call));
        let id = RingId {
            device: self.session.device.id,
            queue: self.queue,
            generation: GENERATION.fetch_add(1, Ordering::Relaxed),
        };
        let Some(bus_guard) = self.session.bus_guard() else {
            return;
        };
        let ring = Ring::new(RingParts {
            id,
            device: Arc::clone(&self.session.device),
            is_write_through: Arc::clone(&self.session.is_write_through),
            bus_guard,
            memory: self.memory.memory().into_inner(),
            layout,
            next_avail,
            kick,
            gate: Arc::clone(&gate),
        });
        match ring {
            None => tracing::warn!(ring = %id, ?layout, "a ring that is not all guest memory is not started"),
            Some(ring) => {
                tracing::debug!(ring = %id, ?layout, next_avail, "ring started");
                self.running = Some((id, gate));
                self.session.plane.start_ring(ring);
            }
        }
    }
}

/// The frontend's file, if it is what it has to be. Anything else (a pipe nobody reads, a file on a dead server)
/// could block the thread that serves everybody.
fn eventfd(file: File) -> Option<File> {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()));
    let is_eventfd = link.is_ok_and(|target| target.as_os_str() == "anon_inode:[eventfd]");
    if !is_eventfd {
        tracing::warn!("a frontend sent something that is no eventfd for kick or call: ignored");
    }
    is_eventfd.then_some(file)
}

impl<'a> VringStateGuard<'a, AtomicMemory> for Vring {
    type G = MutexGuard<'a, VringState<AtomicMemory>>;
}

impl<'a> VringStateMutGuard<'a, AtomicMemory> for Vring {
    type G = MutexGuard<'a, VringState<AtomicMemory>>;
}

impl VringT<AtomicMemory> for Vring {
    fn new(memory: AtomicMemory, size_max: u16) -> Result<Self, QueueError> {
        let session = SESSION
            .with_borrow(Option::clone)
            .expect("vrings are made within with_session");
        let vring = Vring {
            inner: VringMutex::new(memory.clone(), size_max)?,
            control: Arc::new(Mutex::new(Control {
                session: Arc::clone(&session),
                memory,
                queue: session.vring_count(),
                kick: None,
                call: None,
                has_size: true,
                has_addresses: false,
                is_enabled: false,
                running: None,
            })),
        };
        session.add_vring(vring.clone());
        Ok(vring)
    }

    fn get_ref(&self) -> MutexGuard<'_, VringState<AtomicMemory>> {
        self.inner.get_ref()
    }

    fn get_mut(&self) -> MutexGuard<'_, VringState<AtomicMemory>> {
        self.inner.get_mut()
    }

    // The five that follow are for backends that work on the crate's threads; nobody calls them here.

    fn add_used(&self, head: u16, bytes: u32) -> Result<(), QueueError> {
        self.inner.add_used(head, bytes)
    }

    fn signal_used_queue(&self) -> io::Result<()> {
        self.inner.signal_used_queue()
    }

    fn enable_notification(&self) -> Result<bool, QueueError> {
        self.inner.enable_notification()
    }

    fn disable_notification(&self) -> Result<(), QueueError> {
        self.inner.disable_notification()
    }

    fn needs_notification(&self) -> Result<bool, QueueError> {
        self.inner.needs_notification()
    }

    fn set_enabled(&self, is_enabled: bool) {
        let mut control = self.control();
        if control.is_enabled == is_enabled {
            return;
        }
        control.is_enabled = is_enabled;
        self.inner.set_enabled(is_enabled);
        if is_enabled {
            control.start_if_possible(&self.inner);
        } else {
            control.stop(&self.inner);
        }
    }

    fn set_queue_info(&self, table: u64, avail: u64, used: u64) -> Result<(), QueueError> {
        self.change(|control, inner| {
            let result = inner.set_queue_info(table, avail, used);
            control.has_addresses = result.is_ok();
            result
        })
    }

    fn queue_next_avail(&self) -> u16 {
        self.inner.queue_next_avail()
    }

    fn set_queue_next_avail(&self, base: u16) {
        self.change(|_, inner| inner.set_queue_next_avail(base));
    }

    fn set_queue_next_used(&self, index: u16) {
        // Rings read it from guest memory when they start.
        self.inner.set_queue_next_used(index);
    }

    fn queue_used_idx(&self) -> Result<u16, QueueError> {
        self.inner.queue_used_idx()
    }

    fn set_queue_size(&self, size: u16) {
        self.change(|control, inner| {
            // The queue ignores a size it does not like, and would go on with the one it had.
            inner.set_queue_size(size);
            control.has_size = inner.get_ref().get_queue().size() == size;
        });
    }

    fn set_queue_event_idx(&self, is_on: bool) {
        if self.inner.get_ref().get_queue().event_idx_enabled() != is_on {
            self.change(|_, inner| inner.set_queue_event_idx(is_on));
        }
    }

    fn set_queue_ready(&self, is_ready: bool) {
        self.change(|_, inner| inner.set_queue_ready(is_ready));
    }

    fn set_kick(&self, file: Option<File>) {
        self.change(|control, inner| {
            let file = file.and_then(eventfd);
            inner.set_kick(file.as_ref().and_then(|file| file.try_clone().ok()));
            control.kick = file;
        });
    }

    fn read_kick(&self) -> io::Result<bool> {
        self.inner.read_kick()
    }

    fn set_call(&self, file: Option<File>) {
        let mut control = self.control();
        control.call = file.and_then(eventfd);
        if let Some((_, gate)) = &control.running {
            gate.set_call(control.call.as_ref().and_then(|call| call.try_clone().ok()));
        }
    }

    fn set_err(&self, file: Option<File>) {
        self.inner.set_err(file);
    }
}
