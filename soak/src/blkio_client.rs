//! The `blkio` crate's virtio-blk driver over vhost-user: a driver that others wrote. It does not survive its backend:
//! what was under way is lost with the connection.
//!
//! UNSAFETY: the driver's buffers are shared memory named by address; copying into them and out of them, and reading
//! the completions it filled in, is the unsafe code here and nothing else.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::mem::MaybeUninit;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use blkio::{Blkio, Blkioq, Completion, MemoryRegion, ReqFlags};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::client::{Answer, Client, Gone, Op};
use crate::load::TRANSFER_MAX;

/// Requests at once on a queue.
const SLOTS: usize = 12;

/// Between two looks at whether the daemon still lives: the driver does not say.
const LOOK: Duration = Duration::from_millis(20);

pub struct BlkioClient {
    // In this order: queues end before the connection, which ends before the memory.
    queues: Vec<Queue>,
    _blkio: Blkio,
    region: MemoryRegion,
    epoll: Epoll,
    life: u64,
    lives: Arc<AtomicU64>,
}

struct Queue {
    driver: Blkioq,
    free: Vec<usize>,
    /// By slot: the caller's id, and the length of a read.
    under_way: BTreeMap<usize, (u64, Option<u64>)>,
}

impl BlkioClient {
    /// Connects; `lives` counts the daemon's deaths.
    pub fn connect(path: &Path, queues: usize, lives: &Arc<AtomicU64>) -> Result<BlkioClient> {
        let life = lives.load(Ordering::SeqCst);
        let path = path.to_str().context("socket path is not UTF-8")?;
        let mut blkio = Blkio::new("virtio-blk-vhost-user").map_err(in_words("driver"))?;
        blkio.set_str("path", path).map_err(in_words("path"))?;
        blkio.connect().map_err(in_words("connect"))?;
        blkio
            .set_i32("num-queues", queues as i32)
            .map_err(in_words("queues"))?;
        blkio.set_i32("queue-size", 128).map_err(in_words("queue size"))?;
        let started = blkio.start().map_err(in_words("start"))?;
        let region = blkio
            .alloc_mem_region(queues * SLOTS * TRANSFER_MAX as usize)
            .map_err(in_words("buffers"))?;
        blkio.map_mem_region(&region).map_err(in_words("map buffers"))?;
        let epoll = Epoll::new()?;
        let mut client = BlkioClient {
            queues: Vec::new(),
            _blkio: blkio,
            region,
            epoll,
            life,
            lives: Arc::clone(lives),
        };
        for (number, mut driver) in started.queues.into_iter().enumerate() {
            driver.set_completion_fd_enabled(true);
            let fd = driver.get_completion_fd().context("a completion eventfd")?;
            let event = EpollEvent::new(EventSet::IN, number as u64);
            client.epoll.ctl(ControlOperation::Add, fd, event)?;
            client.queues.push(Queue {
                driver,
                free: (0..SLOTS).collect(),
                under_way: BTreeMap::new(),
            });
        }
        Ok(client)
    }

    fn buffer(&mut self, queue: usize, slot: usize, length: u64) -> &mut [u8] {
        assert!(length <= TRANSFER_MAX, "{length} bytes");
        let at = (queue * SLOTS + slot) * TRANSFER_MAX as usize;
        assert!(at + length as usize <= self.region.len, "a slot of the region");
        // SAFETY: the region is mapped read-write for as long as the client lives, the range is inside it, and
        // callers look only at buffers of slots that have no request under way.
        unsafe { std::slice::from_raw_parts_mut((self.region.addr + at) as *mut u8, length as usize) }
    }

    fn take(&mut self, number: usize, answers: &mut Vec<Answer>) {
        let mut completions = [const { MaybeUninit::<Completion>::uninit() }; SLOTS];
        // Errors of a dead connection are told apart by the count of lives.
        let Ok(count) = self.queues[number].driver.do_io(&mut completions, 0, None, None) else {
            return;
        };
        for completion in &completions[..count] {
            // SAFETY: do_io filled the first `count`.
            let (slot, code) = unsafe {
                (
                    completion.assume_init_ref().user_data,
                    completion.assume_init_ref().ret,
                )
            };
            let queue = &mut self.queues[number];
            let (id, read) = queue
                .under_way
                .remove(&slot)
                .expect("a request that is under way");
            queue.free.push(slot);
            let result = if code < 0 {
                Err(format!("errno {}", -code))
            } else {
                Ok(self.buffer(number, slot, read.unwrap_or(0)).to_vec())
            };
            answers.push(Answer { id, result });
        }
    }
}

impl Client for BlkioClient {
    fn queues(&self) -> usize {
        self.queues.len()
    }

    fn depth(&self) -> usize {
        SLOTS
    }

    fn submit(&mut self, number: usize, id: u64, op: &Op) -> Result<(), Gone> {
        let slot = self.queues[number].free.pop().expect("no more than the depth");
        let (length, read) = match op {
            Op::Read { length, .. } => (*length, Some(*length)),
            Op::Write { data, .. } => (data.len() as u64, None),
            Op::Flush | Op::Discard { .. } | Op::WriteZeroes { .. } => (0, None),
        };
        let buffer = self.buffer(number, slot, length);
        if let Op::Write { data, .. } = op {
            buffer.copy_from_slice(data);
        }
        let at = buffer.as_mut_ptr();
        let queue = &mut self.queues[number];
        queue.under_way.insert(slot, (id, read));
        let none = ReqFlags::empty();
        match op {
            Op::Read { offset, length } => queue.driver.read(*offset, at, *length as usize, slot, none),
            Op::Write { offset, data } => queue.driver.write(*offset, at, data.len(), slot, none),
            Op::Flush => queue.driver.flush(slot, none),
            Op::Discard { offset, length } => queue.driver.discard(*offset, *length, slot, none),
            Op::WriteZeroes { offset, length } => queue.driver.write_zeroes(*offset, *length, slot, none),
        }
        Ok(())
    }

    fn reap(&mut self, patience: Duration) -> Result<Vec<Answer>, Gone> {
        let mut answers = Vec::new();
        // The first look is also what submits.
        (0..self.queues.len()).for_each(|number| self.take(number, &mut answers));
        if answers.is_empty() {
            let mut events = [EpollEvent::default(); 16];
            let wait = patience.min(LOOK).as_millis() as i32;
            let count = self.epoll.wait(wait, &mut events).unwrap_or(0);
            for event in &events[..count] {
                let fd = self.queues[event.data() as usize]
                    .driver
                    .get_completion_fd()
                    .expect("as before");
                // SAFETY: the descriptor is the queue's, which outlives this borrow.
                let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
                let _ = rustix::io::read(fd, &mut [0; 8]);
            }
            (0..self.queues.len()).for_each(|number| self.take(number, &mut answers));
        }
        if answers.is_empty() && self.lives.load(Ordering::SeqCst) != self.life {
            return Err(Gone);
        }
        Ok(answers)
    }
}

fn in_words(what: &'static str) -> impl Fn(blkio::Error) -> anyhow::Error {
    move |error| anyhow!("blkio, {what}: {error}")
}
