//! A guest with its VMM in one: memory in a memfd, one queue laid out by hand, the `vhost` crate's frontend. It can
//! do what a real driver never does: kick too early, forget its device, come back with the same memory.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{Ordering, fence};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::MemfdFlags;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserVirtioFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend, VhostUserProtocolFeatures};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestMemoryRegion, MmapRegion};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub const QUEUE_SIZE: u16 = 16;
const MEMORY_BYTES: usize = 1 << 20;
/// Guest addresses are not file offsets, and user addresses are neither.
const GUEST_BASE: u64 = 0x4000_0000;
const TABLE: u64 = GUEST_BASE;
const AVAIL: u64 = GUEST_BASE + 0x1000;
const USED: u64 = GUEST_BASE + 0x2000;
/// Where each head's header, status and data are.
const BUFFERS: u64 = GUEST_BASE + 0x10000;
const BUFFER_BYTES: u64 = 0x2000;

pub struct Guest {
    pub memory: GuestMemoryMmap<()>,
    file: File,
    user_base: u64,
    avail: u16,
    used: u16,
    free: Vec<u16>,
    pub kick: EventFd,
    pub call: EventFd,
    pub frontend: Option<Frontend>,
    /// Agree on these of the device's features.
    pub features: u64,
}

/// A finished request.
#[derive(Debug, PartialEq, Eq)]
pub struct Done {
    pub head: u16,
    pub bytes: u32,
    pub status: u8,
}

impl Guest {
    pub fn new() -> Guest {
        let file = File::from(rustix::fs::memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(MEMORY_BYTES as u64).unwrap();
        let offset = FileOffset::new(file.try_clone().unwrap(), 0);
        let region = MmapRegion::from_file(offset, MEMORY_BYTES).unwrap();
        let user_base = region.as_ptr() as u64;
        let region = vm_memory::GuestRegionMmap::new(region, GuestAddress(GUEST_BASE)).unwrap();
        assert_eq!(region.len(), MEMORY_BYTES as u64);
        Guest {
            memory: GuestMemoryMmap::from_regions(vec![region]).unwrap(),
            file,
            user_base,
            avail: 0,
            used: 0,
            free: (0..QUEUE_SIZE / 3).map(|slot| slot * 3).rev().collect(),
            kick: EventFd::new(EFD_NONBLOCK).unwrap(),
            call: EventFd::new(EFD_NONBLOCK).unwrap(),
            frontend: None,
            features: 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_BLK_F_FLUSH,
        }
    }

    /// Everything up to the ring being ready, except that it is not enabled.
    pub fn connect(&mut self, path: &Path) {
        let mut frontend = Frontend::connect(path, 1).unwrap();
        frontend.set_owner().unwrap();
        let offered = frontend.get_features().unwrap();
        assert_eq!(self.features & !offered, 0, "not all offered");
        frontend
            .set_features(self.features | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits())
            .unwrap();
        let protocol = frontend.get_protocol_features().unwrap();
        assert!(!protocol.contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD));
        frontend
            .set_protocol_features(protocol & (VhostUserProtocolFeatures::all()))
            .unwrap();
        frontend.set_hdr_flags(vhost::vhost_user::message::VhostUserHeaderFlag::NEED_REPLY);
        self.frontend = Some(frontend);
        self.send_memory();
        self.set_ring_up();
    }

    /// The same connection, after [`Guest::stop_ring`].
    pub fn start_again(&mut self) {
        self.set_ring_up();
        self.enable(true);
    }

    /// Claims more requests than the queue has descriptors.
    pub fn run_away(&mut self) {
        self.memory
            .store(
                self.avail.wrapping_add(QUEUE_SIZE + 1),
                GuestAddress(AVAIL + 2),
                Ordering::Release,
            )
            .unwrap();
        self.kick.write(1).unwrap();
    }

    /// The VMM makes the memory's file empty. Our own mapping must not be touched afterwards.
    pub fn shrink_memory(&mut self) {
        self.file.set_len(0).unwrap();
    }

    /// Hangs up.
    pub fn forget(&mut self) {
        self.frontend = None;
    }

    /// Wants its interrupts elsewhere, as when a vector is masked.
    pub fn swap_call(&mut self) {
        self.call = EventFd::new(EFD_NONBLOCK).unwrap();
        self.frontend
            .as_ref()
            .unwrap()
            .set_vring_call(0, &self.call)
            .unwrap();
    }

    fn set_ring_up(&self) {
        let used = self.used_index();
        let user = |address: u64| address - GUEST_BASE + self.user_base;
        let frontend = self.frontend.as_ref().unwrap();
        frontend.set_vring_num(0, QUEUE_SIZE).unwrap();
        // As QEMU does without INFLIGHT: what is not used is available again.
        frontend.set_vring_base(0, used).unwrap();
        let addresses = VringConfigData {
            queue_max_size: QUEUE_SIZE,
            queue_size: QUEUE_SIZE,
            flags: 0,
            desc_table_addr: user(TABLE),
            used_ring_addr: user(USED),
            avail_ring_addr: user(AVAIL),
            log_addr: None,
        };
        frontend.set_vring_addr(0, &addresses).unwrap();
        frontend.set_vring_kick(0, &self.kick).unwrap();
        frontend.set_vring_call(0, &self.call).unwrap();
    }

    pub fn send_memory(&mut self) {
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: GUEST_BASE,
            memory_size: MEMORY_BYTES as u64,
            userspace_addr: self.user_base,
            mmap_offset: 0,
            mmap_handle: self.file.as_raw_fd(),
        };
        self.frontend().set_mem_table(&[region]).unwrap();
    }

    pub fn frontend(&mut self) -> &mut Frontend {
        self.frontend.as_mut().expect("connected")
    }

    pub fn enable(&mut self, is_enabled: bool) {
        self.frontend().set_vring_enable(0, is_enabled).unwrap();
    }

    /// Connects and enables.
    pub fn start(&mut self, path: &Path) {
        self.connect(path);
        self.enable(true);
    }

    /// Stops the ring in the way a VMM does.
    pub fn stop_ring(&mut self) -> u16 {
        self.frontend().get_vring_base(0).unwrap() as u16
    }

    pub fn capacity_sectors(&mut self) -> u64 {
        let (_, config) = self
            .frontend()
            .get_config(0, 8, VhostUserConfigFlags::WRITABLE, &[0; 8])
            .unwrap();
        u64::from_le_bytes(config.try_into().unwrap())
    }

    /// A channel for the device's news.
    pub fn take_news(&mut self) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().unwrap();
        self.frontend()
            .set_backend_request_fd(&theirs.as_fd().as_raw_fd())
            .unwrap();
        ours
    }

    pub fn write(&mut self, sector: u64, content: &[u8]) -> u16 {
        let head = self.prepare(VIRTIO_BLK_T_OUT, sector, content.len() as u32, false);
        self.memory
            .write_slice(content, GuestAddress(self.data(head)))
            .unwrap();
        self.submit(head);
        head
    }

    pub fn read(&mut self, sector: u64, length: u32) -> u16 {
        let head = self.prepare(VIRTIO_BLK_T_IN, sector, length, true);
        self.submit(head);
        head
    }

    pub fn flush(&mut self) -> u16 {
        let head = self.prepare(VIRTIO_BLK_T_FLUSH, 0, 0, false);
        self.submit(head);
        head
    }

    /// What a read brought.
    pub fn content(&self, head: u16, length: usize) -> Vec<u8> {
        let mut content = vec![0; length];
        self.memory
            .read_slice(&mut content, GuestAddress(self.data(head)))
            .unwrap();
        content
    }

    fn data(&self, head: u16) -> u64 {
        BUFFERS + u64::from(head) * BUFFER_BYTES + 32
    }

    fn prepare(&mut self, kind: u32, sector: u64, length: u32, is_read: bool) -> u16 {
        let head = self.free.pop().expect("a free descriptor");
        let base = BUFFERS + u64::from(head) * BUFFER_BYTES;
        let header = u128::from(kind) | u128::from(sector) << 64;
        self.memory
            .write_slice(&header.to_le_bytes(), GuestAddress(base))
            .unwrap();
        self.memory.write_slice(&[0xee], GuestAddress(base + 16)).unwrap();
        self.describe(head, base, 16, 1, head + 1);
        self.describe(
            head + 1,
            self.data(head),
            length,
            1 | if is_read { 2 } else { 0 },
            head + 2,
        );
        self.describe(head + 2, base + 16, 1, 2, 0);
        head
    }

    fn describe(&self, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        let raw = u128::from(address)
            | u128::from(length) << 64
            | u128::from(flags) << 96
            | u128::from(next) << 112;
        self.memory
            .write_slice(&raw.to_le_bytes(), GuestAddress(TABLE + 16 * u64::from(index)))
            .unwrap();
    }

    fn submit(&mut self, head: u16) {
        let slot = u64::from(self.avail % QUEUE_SIZE);
        self.memory
            .write_obj(head, GuestAddress(AVAIL + 4 + 2 * slot))
            .unwrap();
        let old = self.avail;
        self.avail = self.avail.wrapping_add(1);
        self.memory
            .store(self.avail, GuestAddress(AVAIL + 2), Ordering::Release)
            .unwrap();
        fence(Ordering::SeqCst);
        let event: u16 = self
            .memory
            .load(
                GuestAddress(USED + 4 + 8 * u64::from(QUEUE_SIZE)),
                Ordering::Relaxed,
            )
            .unwrap();
        let has_event_idx = self.features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        if !has_event_idx || self.avail.wrapping_sub(event).wrapping_sub(1) < self.avail.wrapping_sub(old) {
            self.kick.write(1).unwrap();
        }
    }

    pub fn avail_index(&self) -> u16 {
        self.avail
    }

    pub fn used_index(&self) -> u16 {
        self.memory
            .load(GuestAddress(USED + 2), Ordering::Acquire)
            .unwrap()
    }

    /// Takes what is in the used ring; asks to be called for the next.
    pub fn reap(&mut self) -> Vec<Done> {
        let mut done = Vec::new();
        while self.used != self.used_index() {
            let slot = u64::from(self.used % QUEUE_SIZE);
            let element: u64 = self.memory.read_obj(GuestAddress(USED + 4 + 8 * slot)).unwrap();
            let head = element as u16;
            let status = self
                .memory
                .read_obj(GuestAddress(BUFFERS + u64::from(head) * BUFFER_BYTES + 16))
                .unwrap();
            done.push(Done {
                head,
                bytes: (element >> 32) as u32,
                status,
            });
            self.free.push(head);
            self.used = self.used.wrapping_add(1);
        }
        self.memory
            .store(
                self.used,
                GuestAddress(AVAIL + 4 + 2 * u64::from(QUEUE_SIZE)),
                Ordering::Relaxed,
            )
            .unwrap();
        fence(Ordering::SeqCst);
        done
    }

    /// Waits for interrupts until `count` requests are done.
    pub fn finish(&mut self, count: usize) -> Vec<Done> {
        let mut done = self.reap();
        while done.len() < count {
            if self.used == self.used_index() {
                let mut fds = [PollFd::from_borrowed_fd(self.call_fd(), PollFlags::IN)];
                let limit = Timespec {
                    tv_sec: 10,
                    tv_nsec: 0,
                };
                let ready = rustix::event::poll(&mut fds, Some(&limit)).unwrap();
                assert!(ready > 0, "no interrupt: {} of {count} done", done.len());
                self.call.read().unwrap();
            }
            done.extend(self.reap());
        }
        done
    }

    fn call_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        #[allow(unsafe_code)]
        // SAFETY: the eventfd lives as long as `self`.
        unsafe {
            std::os::fd::BorrowedFd::borrow_raw(self.call.as_raw_fd())
        }
    }
}
