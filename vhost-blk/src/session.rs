//! One connection of a frontend to a device: what `vhost-user-backend` asks of a backend.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use rustix::net::SendFlags;
use vhost::vhost_user::{Backend, VhostUserProtocolFeatures};
use vhost_user_backend::VhostUserBackend;
use virtio_bindings::virtio_blk::VIRTIO_BLK_F_FLUSH;
use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::EventSet;

use crate::api::{Plane, QUEUE_SIZE_MAX};
use crate::bus_guard::BusGuard;
use crate::device::{CONFIG_WRITEBACK_OFFSET, Device};
use crate::ring::lock;
use crate::vring::{AtomicMemory, Vring};

/// The most that the protocol lets a frontend read of the configuration space at once.
const CONFIG_READ_BYTES_MAX: usize = 256;

/// `VHOST_USER_BACKEND_CONFIG_CHANGE_MSG`, without payload.
const CONFIG_CHANGE_MESSAGE: u32 = 2;
const PROTOCOL_VERSION: u32 = 1;

pub(crate) struct Session {
    pub(crate) device: Arc<Device>,
    pub(crate) plane: Arc<dyn Plane>,
    /// Follows from the features agreed on and from the guest's choice of cache; rings read it.
    pub(crate) is_write_through: Arc<AtomicBool>,
    has_flush: AtomicBool,
    is_write_back_chosen: AtomicBool,
    vrings: Mutex<Vec<Vring>>,
    /// For the memory map of now; the protocol thread reads used indices from it.
    bus_guard: Mutex<Option<Arc<BusGuard>>>,
    /// Our messages to the frontend go here, if it takes any.
    channel: Mutex<Option<OwnedFd>>,
}

impl Session {
    pub(crate) fn new(device: Arc<Device>, plane: Arc<dyn Plane>) -> Session {
        Session {
            device,
            plane,
            is_write_through: Arc::new(AtomicBool::new(true)),
            has_flush: AtomicBool::new(false),
            is_write_back_chosen: AtomicBool::new(true),
            vrings: Mutex::new(Vec::new()),
            bus_guard: Mutex::new(None),
            channel: Mutex::new(None),
        }
    }

    pub(crate) fn set_channel(&self, channel: OwnedFd) {
        *lock(&self.channel) = Some(channel);
    }

    /// Tells the frontend to read the configuration space again. Does not wait: a frontend that lets its channel
    /// fill up has unread news already.
    pub(crate) fn tell_config_changed(&self) {
        let channel = lock(&self.channel);
        let Some(channel) = channel.as_ref() else {
            tracing::info!(
                device = self.device.id.0,
                "the frontend takes no news of a resize: it shows after a reboot"
            );
            return;
        };
        let mut message = [0; 12];
        message[0..4].copy_from_slice(&CONFIG_CHANGE_MESSAGE.to_le_bytes());
        message[4..8].copy_from_slice(&PROTOCOL_VERSION.to_le_bytes());
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        if let Err(error) = rustix::net::send(channel, &message, flags) {
            tracing::warn!(device = self.device.id.0, %error, "the frontend could not be told of a resize");
        }
    }

    pub(crate) fn vring_count(&self) -> u16 {
        lock(&self.vrings).len() as u16
    }

    pub(crate) fn add_vring(&self, vring: Vring) {
        lock(&self.vrings).push(vring);
    }

    /// Stops every ring for good: the frontend is gone. Vrings and session know each other until this is called.
    pub(crate) fn end(&self) {
        let vrings = std::mem::take(&mut *lock(&self.vrings));
        for vring in &vrings {
            vring.stop();
        }
        // The vrings hold the memory: it is unlisted while it is still mapped.
        *lock(&self.bus_guard) = None;
        drop(vrings);
    }

    /// `None` before there is any memory.
    pub(crate) fn bus_guard(&self) -> Option<Arc<BusGuard>> {
        lock(&self.bus_guard).clone()
    }

    fn vrings(&self) -> Vec<Vring> {
        lock(&self.vrings).clone()
    }

    /// Virtio 1.2, 5.2.6.2: the cache is write-back if FLUSH was agreed on, unless the guest switched it off.
    fn refresh_cache_mode(&self) {
        let is_write_back =
            self.has_flush.load(Ordering::Relaxed) && self.is_write_back_chosen.load(Ordering::Relaxed);
        self.is_write_through.store(!is_write_back, Ordering::Relaxed);
    }
}

/// The handle that the protocol crate holds; a newtype because it demands `Clone`.
#[derive(Clone)]
pub(crate) struct SessionBackend(pub(crate) Arc<Session>);

impl VhostUserBackend for SessionBackend {
    type Bitmap = ();
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        usize::from(self.0.device.config.queues)
    }

    fn max_queue_size(&self) -> usize {
        usize::from(QUEUE_SIZE_MAX)
    }

    fn features(&self) -> u64 {
        self.0.device.features()
    }

    fn acked_features(&self, features: u64) {
        let has_flush = features & (1 << VIRTIO_BLK_F_FLUSH) != 0;
        self.0.has_flush.store(has_flush, Ordering::Relaxed);
        self.0.refresh_cache_mode();
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        Device::protocol_features()
    }

    fn set_event_idx(&self, _is_on: bool) {
        // The vrings have been told one by one.
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let is_write_back = self.0.is_write_back_chosen.load(Ordering::Relaxed);
        let space = self.0.device.config_space(is_write_back);
        let (offset, size) = (offset as usize, size as usize);
        if offset.saturating_add(size) > CONFIG_READ_BYTES_MAX {
            return Vec::new();
        }
        // Newer frontends know more fields than we fill: those are zero.
        (offset..offset + size)
            .map(|at| space.get(at).copied().unwrap_or(0))
            .collect()
    }

    fn set_config(&self, offset: u32, content: &[u8]) -> io::Result<()> {
        match (offset as usize, content) {
            (CONFIG_WRITEBACK_OFFSET, [value @ (0 | 1)]) => {
                self.0.is_write_back_chosen.store(*value == 1, Ordering::Relaxed);
                self.0.refresh_cache_mode();
                Ok(())
            }
            _ => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "only the write cache mode can be set",
            )),
        }
    }

    fn update_memory(&self, memory: AtomicMemory) -> io::Result<()> {
        let guard = BusGuard::new(&memory.memory())?;
        *lock(&self.0.bus_guard) = Some(Arc::new(guard));
        for vring in self.0.vrings() {
            vring.restart();
        }
        Ok(())
    }

    fn set_backend_req_fd(&self, _backend: Backend) {
        // The crate's `Backend` cannot send a config change: relay.rs keeps a copy of its socket for that.
    }

    /// No queue is on any thread of the crate: it starts no worker and registers no kick.
    fn queues_per_thread(&self) -> Vec<u64> {
        Vec::new()
    }

    fn handle_event(&self, _event: u16, _set: EventSet, _vrings: &[Vring], _thread: usize) -> io::Result<()> {
        unreachable!("no worker thread was asked for")
    }
}
