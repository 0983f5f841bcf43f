//! A guest and its VMM in one, as QEMU is towards vhost-user-blk: memory in a memfd, several queues, and when the
//! backend dies it connects again and goes on at the used index of each ring. Nobody above notices.
//!
//! It does not kick after it connected again: the backend must look into the rings by itself, as it must for QEMU.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::MemfdFlags;
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserVirtioFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend, VhostUserProtocolFeatures};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_WRITE_ZEROES,
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap, MmapRegion};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::client::{Answer, Client, Gone, Op};
use crate::load::TRANSFER_MAX;
use crate::{PATIENCE, RETRY};

const QUEUE_SIZE: u16 = 256;
/// Of one request: its header, data in pieces, its status.
const SLOT_DESCRIPTORS: u16 = 20;
const SLOTS: u16 = QUEUE_SIZE / SLOT_DESCRIPTORS;

/// Guest addresses are not file offsets, and user addresses are neither.
const GUEST_BASE: u64 = 0x4000_0000;
const TABLE: u64 = 0;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
const RING_BYTES: u64 = 0x4000;
/// Header and status, then data.
const HEAD_BYTES: u64 = 0x1000;
const SLOT_BYTES: u64 = HEAD_BYTES + TRANSFER_MAX;
const QUEUE_BYTES: u64 = RING_BYTES + SLOTS as u64 * SLOT_BYTES;

const FEATURES: u64 = 1 << VIRTIO_F_VERSION_1
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | 1 << VIRTIO_BLK_F_FLUSH
    | 1 << VIRTIO_BLK_F_MQ
    | 1 << VIRTIO_BLK_F_DISCARD
    | 1 << VIRTIO_BLK_F_WRITE_ZEROES;

/// Poll token of the connection; queues have their numbers.
const CONNECTION: u64 = u64::MAX;

/// The guest. Its disk may go away and return, its memory stays.
pub struct Guest {
    path: PathBuf,
    memory: GuestMemoryMmap<()>,
    file: File,
    user_base: u64,
    queues: Vec<Queue>,
    frontend: Option<Frontend>,
    epoll: Epoll,
    /// How often it had to connect again.
    pub reconnects: u64,
}

struct Queue {
    base: u64,
    avail: u16,
    used: u16,
    free: Vec<u16>,
    under_way: BTreeMap<u16, (u64, Option<u64>)>,
    kick: EventFd,
    call: EventFd,
}

impl Guest {
    pub fn connect(path: &Path, queues: usize) -> Result<Guest> {
        let bytes = queues as u64 * QUEUE_BYTES;
        let file = File::from(rustix::fs::memfd_create("soak-guest", MemfdFlags::CLOEXEC)?);
        file.set_len(bytes)?;
        let region = MmapRegion::from_file(FileOffset::new(file.try_clone()?, 0), bytes as usize)?;
        let user_base = region.as_ptr() as u64;
        let region =
            vm_memory::GuestRegionMmap::new(region, GuestAddress(GUEST_BASE)).context("guest memory")?;
        let mut guest = Guest {
            path: path.to_owned(),
            memory: GuestMemoryMmap::from_regions(vec![region])?,
            file,
            user_base,
            queues: Vec::new(),
            frontend: None,
            epoll: Epoll::new()?,
            reconnects: 0,
        };
        for number in 0..queues as u64 {
            let queue = Queue {
                base: GUEST_BASE + number * QUEUE_BYTES,
                avail: 0,
                used: 0,
                free: (0..SLOTS).rev().map(|slot| slot * SLOT_DESCRIPTORS).collect(),
                under_way: BTreeMap::new(),
                kick: EventFd::new(EFD_NONBLOCK)?,
                call: EventFd::new(EFD_NONBLOCK)?,
            };
            let event = EpollEvent::new(EventSet::IN, number);
            guest
                .epoll
                .ctl(ControlOperation::Add, queue.call.as_raw_fd(), event)?;
            guest.queues.push(queue);
        }
        guest.come_back()?;
        Ok(guest)
    }

    /// Connects until it holds: a dying backend may still take the connection.
    fn come_back(&mut self) -> Result<()> {
        let start = Instant::now();
        loop {
            match self.shake_hands() {
                Ok(frontend) => {
                    let event = EpollEvent::new(EventSet::IN | EventSet::READ_HANG_UP, CONNECTION);
                    self.epoll
                        .ctl(ControlOperation::Add, frontend.as_raw_fd(), event)?;
                    self.frontend = Some(frontend);
                    return Ok(());
                }
                Err(error) if start.elapsed() > PATIENCE => {
                    return Err(
                        error.context(format!("no way back to {} in {PATIENCE:?}", self.path.display()))
                    );
                }
                Err(_) => std::thread::sleep(RETRY),
            }
        }
    }

    fn shake_hands(&mut self) -> Result<Frontend> {
        // Not Frontend::connect: it sleeps between tries of its own.
        let stream = std::os::unix::net::UnixStream::connect(&self.path)?;
        let mut frontend = Frontend::from_stream(stream, self.queues.len() as u64);
        frontend.set_owner()?;
        let offered = frontend.get_features()?;
        ensure!(
            FEATURES & !offered == 0,
            "features {FEATURES:#x} are not all of {offered:#x}"
        );
        frontend.set_features(FEATURES | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits())?;
        let protocol = frontend.get_protocol_features()?;
        let wanted = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIG;
        frontend.set_protocol_features(protocol & wanted)?;
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        frontend.set_mem_table(&[VhostUserMemoryRegionInfo {
            guest_phys_addr: GUEST_BASE,
            memory_size: self.queues.len() as u64 * QUEUE_BYTES,
            userspace_addr: self.user_base,
            mmap_offset: 0,
            mmap_handle: self.file.as_raw_fd(),
        }])?;
        for number in 0..self.queues.len() {
            frontend.set_vring_num(number, QUEUE_SIZE)?;
        }
        for (number, queue) in self.queues.iter().enumerate() {
            // As QEMU does without INFLIGHT: what is not used is available again.
            frontend.set_vring_base(number, self.used_index(queue))?;
            let user = queue.base - GUEST_BASE + self.user_base;
            let addresses = VringConfigData {
                queue_max_size: QUEUE_SIZE,
                queue_size: QUEUE_SIZE,
                flags: 0,
                desc_table_addr: user + TABLE,
                used_ring_addr: user + USED,
                avail_ring_addr: user + AVAIL,
                log_addr: None,
            };
            frontend.set_vring_addr(number, &addresses)?;
            frontend.set_vring_kick(number, &queue.kick)?;
            frontend.set_vring_call(number, &queue.call)?;
        }
        for number in 0..self.queues.len() {
            frontend.set_vring_enable(number, true)?;
        }
        Ok(frontend)
    }

    fn used_index(&self, queue: &Queue) -> u16 {
        self.memory
            .load(GuestAddress(queue.base + USED + 2), Ordering::Acquire)
            .expect("guest memory")
    }

    fn put<T: vm_memory::ByteValued>(&self, value: T, address: u64) {
        self.memory
            .write_obj(value, GuestAddress(address))
            .expect("guest memory");
    }

    /// Data is cut in pieces of odd sizes: no backend may count on their borders.
    fn describe(&self, queue: &Queue, head: u16, id: u64, kind: u32, sector: u64, data: u64, is_in: bool) {
        let slot = slot_address(queue, head);
        self.put(kind, slot);
        self.put(0u32, slot + 4);
        self.put(sector, slot + 8);
        self.put(0xeeu8, slot + 16);
        let table = queue.base + TABLE;
        let describe = |index: u16, address: u64, length: u64, is_in: bool, is_last: bool| {
            let flags = if is_last { 0 } else { 1 } | if is_in { 2 } else { 0 };
            let raw = u128::from(address)
                | u128::from(length) << 64
                | u128::from(flags as u16) << 96
                | u128::from(if is_last { 0 } else { index + 1 }) << 112;
            self.memory
                .write_slice(&raw.to_le_bytes(), GuestAddress(table + 16 * u64::from(index)))
                .expect("guest memory");
        };
        describe(head, slot, 16, false, false);
        let mut index = head + 1;
        let mut done = 0;
        let pieces = 1 + id % u64::from(SLOT_DESCRIPTORS - 2);
        while done < data {
            let is_last_piece = index == head + SLOT_DESCRIPTORS - 2;
            let piece = if is_last_piece {
                data - done
            } else {
                (data / pieces + 1 + id % 7).min(data - done)
            };
            describe(index, slot + HEAD_BYTES + done, piece, is_in, false);
            done += piece;
            index += 1;
        }
        describe(index, slot + 16, 1, true, true);
    }

    /// Takes what is in the used rings.
    fn take(&mut self, answers: &mut Vec<Answer>) {
        for number in 0..self.queues.len() {
            let index = self.used_index(&self.queues[number]);
            while self.queues[number].used != index {
                let answer = self.take_one(number);
                answers.push(answer);
            }
            let queue = &self.queues[number];
            let event = GuestAddress(queue.base + AVAIL + 4 + 2 * u64::from(QUEUE_SIZE));
            self.memory
                .store(queue.used, event, Ordering::Relaxed)
                .expect("guest memory");
        }
        fence(Ordering::SeqCst);
    }

    fn take_one(&mut self, number: usize) -> Answer {
        let queue = &mut self.queues[number];
        let at = queue.base + USED + 4 + 8 * u64::from(queue.used % QUEUE_SIZE);
        let element: u64 = self.memory.read_obj(GuestAddress(at)).expect("guest memory");
        let head = element as u16;
        let (id, read) = queue
            .under_way
            .remove(&head)
            .unwrap_or_else(|| panic!("queue {number}: head {head} was used and is not under way"));
        queue.used = queue.used.wrapping_add(1);
        queue.free.push(head);
        let slot = slot_address(queue, head);
        let status: u8 = self
            .memory
            .read_obj(GuestAddress(slot + 16))
            .expect("guest memory");
        let wanted = read.unwrap_or(0) + 1;
        let result = if status != 0 {
            Err(format!("status {status}"))
        } else if read.is_some() && element >> 32 != wanted {
            Err(format!("{} bytes used, not {wanted}", element >> 32))
        } else {
            let mut data = vec![0; read.unwrap_or(0) as usize];
            self.memory
                .read_slice(&mut data, GuestAddress(slot + HEAD_BYTES))
                .expect("guest memory");
            Ok(data)
        };
        Answer { id, result }
    }

    fn wait(&mut self, patience: Duration) -> Result<()> {
        let mut events = vec![EpollEvent::default(); self.queues.len() + 1];
        let count = match self.epoll.wait(patience.as_millis() as i32, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => 0,
            Err(error) => bail!("epoll: {error}"),
        };
        for event in &events[..count] {
            if event.data() == CONNECTION {
                let frontend = self.frontend.take().context("a connection")?;
                self.epoll.ctl(
                    ControlOperation::Delete,
                    frontend.as_raw_fd(),
                    EpollEvent::default(),
                )?;
                drop(frontend);
                self.reconnects += 1;
                self.come_back()?;
            } else {
                let _ = self.queues[event.data() as usize].call.read();
            }
        }
        Ok(())
    }
}

fn slot_address(queue: &Queue, head: u16) -> u64 {
    queue.base + RING_BYTES + u64::from(head / SLOT_DESCRIPTORS) * SLOT_BYTES
}

impl Client for Guest {
    fn queues(&self) -> usize {
        self.queues.len()
    }

    fn depth(&self) -> usize {
        usize::from(SLOTS)
    }

    fn submit(&mut self, number: usize, id: u64, op: &Op) -> Result<(), Gone> {
        let head = self.queues[number].free.pop().expect("no more than the depth");
        let queue = &self.queues[number];
        let data = GuestAddress(slot_address(queue, head) + HEAD_BYTES);
        let mut read = None;
        match op {
            Op::Read { offset, length } => {
                read = Some(*length);
                self.describe(queue, head, id, VIRTIO_BLK_T_IN, offset / 512, *length, true);
            }
            Op::Write {
                offset,
                data: content,
            } => {
                self.memory.write_slice(content, data).expect("guest memory");
                let length = content.len() as u64;
                self.describe(queue, head, id, VIRTIO_BLK_T_OUT, offset / 512, length, false);
            }
            Op::Flush => self.describe(queue, head, id, VIRTIO_BLK_T_FLUSH, 0, 0, false),
            Op::Discard { offset, length } | Op::WriteZeroes { offset, length } => {
                let range = u128::from(offset / 512) | u128::from(length / 512) << 64;
                self.memory
                    .write_slice(&range.to_le_bytes(), data)
                    .expect("guest memory");
                let kind = match op {
                    Op::Discard { .. } => VIRTIO_BLK_T_DISCARD,
                    _ => VIRTIO_BLK_T_WRITE_ZEROES,
                };
                self.describe(queue, head, id, kind, 0, 16, false);
            }
        }
        let memory = &self.memory;
        let queue = &mut self.queues[number];
        queue.under_way.insert(head, (id, read));
        let ring = queue.base + AVAIL;
        let entry = GuestAddress(ring + 4 + 2 * u64::from(queue.avail % QUEUE_SIZE));
        memory.write_obj(head, entry).expect("guest memory");
        queue.avail = queue.avail.wrapping_add(1);
        memory
            .store(queue.avail, GuestAddress(ring + 2), Ordering::Release)
            .expect("guest memory");
        fence(Ordering::SeqCst);
        let event = GuestAddress(queue.base + USED + 4 + 8 * u64::from(QUEUE_SIZE));
        let event: u16 = memory.load(event, Ordering::Relaxed).expect("guest memory");
        if queue.avail.wrapping_sub(event).wrapping_sub(1) < 1 {
            queue.kick.write(1).expect("an eventfd that nobody fills");
        }
        Ok(())
    }

    fn reap(&mut self, patience: Duration) -> Result<Vec<Answer>, Gone> {
        let mut answers = Vec::new();
        self.take(&mut answers);
        if answers.is_empty() {
            if let Err(error) = self.wait(patience) {
                eprintln!("the guest gives up: {error:#}");
                return Err(Gone);
            }
            self.take(&mut answers);
        }
        Ok(answers)
    }
}
