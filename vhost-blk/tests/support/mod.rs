//! A data plane for tests: one thread, a disk in memory, plain poll(2).
#![allow(dead_code)] // every test binary uses its own part

pub mod guest;

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, PollFd, PollFlags};
use types::{HeapBlock, Payload};
use vdi::{Op, Outcome, ReadPart};
use weft_vhost_blk::{BufferSource, Plane, Polled, Ring, RingId, RingRequest, Tag};

pub struct Heap;

impl BufferSource for Heap {
    type Buffer = HeapBlock;

    fn filled(&mut self, length: usize, fill: impl FnOnce(&mut [u8])) -> Option<HeapBlock> {
        let mut bytes = vec![0; length];
        fill(&mut bytes);
        Some(HeapBlock::new(&bytes))
    }
}

/// What the disk of a [`MemoryPlane`] does, and what was asked of it.
pub struct Disk {
    pub bytes: Vec<u8>,
    pub flushes: u64,
    pub discards: u64,
    pub fua_writes: u64,
    pub requests: u64,
    /// While set, requests are taken but not completed.
    pub is_holding: bool,
    /// Complete the requests of a turn in reverse.
    pub is_reversed: bool,
    pub rings_started: u64,
    /// Requests taken from rings, performed or not.
    pub taken: u64,
}

impl Disk {
    pub fn perform(&mut self, op: &Op<HeapBlock>) -> Outcome<HeapBlock> {
        self.requests += 1;
        let range = |offset: u64, length: u64| offset as usize..(offset + length) as usize;
        match op {
            Op::Read { offset, length, .. } => {
                let content = &self.bytes[range(*offset, *length)];
                let half = (*length as usize / 1024) * 512;
                let mut parts = Vec::new();
                for piece in [&content[..half], &content[half..]] {
                    if piece.iter().all(|byte| *byte == 0) {
                        parts.push(ReadPart::Zeros(piece.len() as u64));
                    } else {
                        parts.push(ReadPart::Data(HeapBlock::new(piece)));
                    }
                }
                return Outcome::Read(parts.into());
            }
            Op::Write { offset, data, fua } => {
                self.fua_writes += u64::from(*fua);
                self.bytes[range(*offset, data.length() as u64)].copy_from_slice(data.bytes());
            }
            Op::Flush => self.flushes += 1,
            Op::Discard { offset, length } => {
                self.discards += 1;
                self.bytes[range(*offset, *length)].fill(0);
            }
            Op::WriteZeroes { offset, length, .. } => self.bytes[range(*offset, *length)].fill(0),
            Op::Extents { .. } | Op::Cut { .. } => panic!("guests cannot ask for {op:?}"),
        }
        Outcome::Done
    }
}

enum Order {
    Start(Ring),
    Stop(RingId),
    Look,
    End,
}

pub struct MemoryPlane {
    orders: Mutex<Sender<Order>>,
    wake: Arc<OwnedFd>,
    pub disk: Arc<Mutex<Disk>>,
    turned: Arc<Condvar>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl MemoryPlane {
    pub fn new(bytes: usize) -> Arc<MemoryPlane> {
        let (sender, receiver) = channel();
        let wake = Arc::new(rustix::event::eventfd(0, EventfdFlags::NONBLOCK).unwrap());
        let disk = Arc::new(Mutex::new(Disk {
            bytes: vec![0; bytes],
            flushes: 0,
            discards: 0,
            fua_writes: 0,
            requests: 0,
            is_holding: false,
            is_reversed: false,
            rings_started: 0,
            taken: 0,
        }));
        let turned = Arc::new(Condvar::new());
        let thread = std::thread::spawn({
            let (wake, disk, turned) = (Arc::clone(&wake), Arc::clone(&disk), Arc::clone(&turned));
            move || run(&receiver, &wake, &disk, &turned)
        });
        Arc::new(MemoryPlane {
            orders: Mutex::new(sender),
            wake,
            disk,
            turned,
            thread: Mutex::new(Some(thread)),
        })
    }

    fn order(&self, order: Order) {
        self.orders.lock().unwrap().send(order).unwrap();
        rustix::io::write(&self.wake, &1u64.to_ne_bytes()).unwrap();
    }

    /// Changes the disk's ways and has the thread look at its rings again.
    pub fn change(&self, change: impl FnOnce(&mut Disk)) {
        change(&mut self.disk.lock().unwrap());
        self.order(Order::Look);
    }

    /// Waits until the disk is as `reached` wants it; a guest's hang shows as a panic after ten seconds.
    pub fn wait_until(&self, reached: impl Fn(&Disk) -> bool) {
        let disk = self.disk.lock().unwrap();
        let limit = std::time::Duration::from_secs(10);
        let (_disk, timeout) = self
            .turned
            .wait_timeout_while(disk, limit, |disk| !reached(disk))
            .unwrap();
        assert!(!timeout.timed_out(), "the disk never got there");
    }
}

impl Drop for MemoryPlane {
    fn drop(&mut self) {
        self.order(Order::End);
        let result = self.thread.lock().unwrap().take().unwrap().join();
        assert!(
            result.is_ok() || std::thread::panicking(),
            "the plane's thread panicked"
        );
    }
}

impl Plane for MemoryPlane {
    fn start_ring(&self, ring: Ring) {
        self.order(Order::Start(ring));
    }

    fn stop_ring(&self, ring: RingId) {
        self.order(Order::Stop(ring));
    }
}

struct Running {
    ring: Ring,
    held: Vec<(Tag, Op<HeapBlock>)>,
}

fn run(orders: &Receiver<Order>, wake: &OwnedFd, disk: &Mutex<Disk>, turned: &Condvar) {
    let mut rings: BTreeMap<RingId, Running> = BTreeMap::new();
    loop {
        rustix::io::read(wake, &mut [0; 8]).ok();
        while let Ok(order) = orders.try_recv() {
            match order {
                Order::Start(ring) => {
                    disk.lock().unwrap().rings_started += 1;
                    let held = Vec::new();
                    rings.insert(ring.id(), Running { ring, held });
                }
                Order::Stop(id) => drop(rings.remove(&id)),
                Order::Look => {}
                Order::End => return,
            }
        }
        let mut is_idle = true;
        for running in rings.values_mut() {
            turn(running, &mut disk.lock().unwrap());
            is_idle &= !running.ring.enable_kicks();
        }
        turned.notify_all();
        if is_idle {
            let mut fds = vec![PollFd::new(wake, PollFlags::IN)];
            fds.extend(
                rings
                    .values()
                    .map(|running| PollFd::from_borrowed_fd(running.ring.kick(), PollFlags::IN)),
            );
            rustix::event::poll(&mut fds, None).ok();
        }
    }
}

fn turn(running: &mut Running, disk: &mut Disk) {
    let ring = &mut running.ring;
    ring.ack_kick();
    ring.disable_kicks();
    let mut requests: Vec<RingRequest<HeapBlock>> = Vec::new();
    while ring.poll(&mut Heap, &mut requests, 8) == Polled::More {}
    disk.taken += requests.len() as u64;
    running
        .held
        .extend(requests.into_iter().map(|request| (request.tag, request.op)));
    if !disk.is_holding {
        let mut work = std::mem::take(&mut running.held);
        let mut results: Vec<_> = work.drain(..).map(|(tag, op)| (tag, disk.perform(&op))).collect();
        if disk.is_reversed {
            results.reverse();
        }
        for (tag, outcome) in results {
            ring.complete(tag, Ok(outcome));
        }
    }
    ring.publish().unwrap();
}
