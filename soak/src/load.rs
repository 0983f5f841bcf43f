//! Load on one virtual disk through one client: random requests of all kinds, overlapping as they fall, every answer
//! held against the disk's [`Oracle`]. Several loads may share a disk.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use sim::Rng;

use crate::client::{Client, Op};
use crate::oracle::{Change, Oracle};
use crate::{PATIENCE, RETRY};

/// Longest read or write.
pub const TRANSFER_MAX: u64 = 1 << 20;

/// Longest trim or zeroing.
const CLEAR_MAX: u64 = 4 << 20;

/// Half of all requests fall into so many first bytes: they meet.
const HOT_BYTES: u64 = 2 << 20;

/// How long a load waits for answers before it looks at what it was told.
const LOOK: Duration = Duration::from_millis(50);

/// A virtual disk as its loads see it.
pub struct Disk {
    pub name: String,
    pub sector_bytes: u64,
    oracle: Mutex<Oracle>,
}

impl Disk {
    pub fn new(number: u32, name: &str, bytes: u64, sector_bytes: u64) -> Arc<Disk> {
        Arc::new(Disk {
            name: name.to_owned(),
            sector_bytes,
            oracle: Mutex::new(Oracle::new(number, bytes)),
        })
    }

    pub fn oracle(&self) -> MutexGuard<'_, Oracle> {
        self.oracle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a load was told, and what it has to say.
#[derive(Default)]
pub struct Orders {
    is_stopping: AtomicBool,
    /// Wants everything read once from the beginning.
    sweeps_wanted: AtomicU64,
    sweeps_done: AtomicU64,
    answers: AtomicU64,
    sectors_verified: AtomicU64,
    connections: AtomicU64,
    /// Wants a new connection as soon as nothing is under way on this one.
    is_to_reconnect: AtomicBool,
    /// How large the disk can be for the present connection.
    bytes_max: AtomicU64,
    /// Set while requests may have to wait for long: no quorum, no space.
    may_wait: AtomicBool,
}

/// A load that runs on a thread of its own.
pub struct Load {
    pub disk: Arc<Disk>,
    pub kind: &'static str,
    orders: Arc<Orders>,
    thread: Option<JoinHandle<Result<()>>>,
}

/// Makes a connection; called again whenever one is gone.
pub type Connect = Box<dyn FnMut() -> Result<Box<dyn Client>> + Send>;

impl Load {
    pub fn start(disk: &Arc<Disk>, kind: &'static str, seed: u64, connect: Connect) -> Load {
        let orders = Arc::new(Orders::default());
        let worker = Worker {
            disk: Arc::clone(disk),
            orders: Arc::clone(&orders),
            rng: Rng::new(seed),
            connect,
            under_way: BTreeMap::new(),
            per_queue: Vec::new(),
            next_id: 0,
            fixed_bytes: None,
            sweep: None,
            last_answer: Instant::now(),
        };
        let what = format!("{kind} load on {}", disk.name);
        Load {
            disk: Arc::clone(disk),
            kind,
            orders,
            thread: Some(std::thread::spawn(move || worker.run().context(what))),
        }
    }

    /// Answers so far.
    pub fn answers(&self) -> u64 {
        self.orders.answers.load(Ordering::Relaxed)
    }

    /// Sectors read and found right.
    pub fn sectors_verified(&self) -> u64 {
        self.orders.sectors_verified.load(Ordering::Relaxed)
    }

    /// Connections made.
    pub fn connections(&self) -> u64 {
        self.orders.connections.load(Ordering::Relaxed)
    }

    /// Orders a new connection: what is under way ends, then this one does.
    pub fn order_reconnect(&self) {
        self.orders.is_to_reconnect.store(true, Ordering::SeqCst);
    }

    /// How large the disk can be for the present connection; `u64::MAX` if it follows the disk.
    pub fn bytes_max(&self) -> u64 {
        self.orders.bytes_max.load(Ordering::SeqCst)
    }

    /// Orders a reading of the whole disk; returns what [`has_swept`](Load::has_swept) takes.
    pub fn order_sweep(&self) -> u64 {
        self.orders.sweeps_wanted.fetch_add(1, Ordering::SeqCst) + 1
    }

    pub fn has_swept(&self, number: u64) -> bool {
        self.orders.sweeps_done.load(Ordering::SeqCst) >= number
    }

    /// Whether answers may take long from now on.
    pub fn allow_waiting(&self, is_allowed: bool) {
        self.orders.may_wait.store(is_allowed, Ordering::SeqCst);
    }

    /// Fails if the load found something wrong.
    pub fn check(&mut self) -> Result<()> {
        match &self.thread {
            Some(thread) if thread.is_finished() => {
                self.join()?;
                bail!("the {} load on {} ended by itself", self.kind, self.disk.name)
            }
            Some(_) => Ok(()),
            // It was stopped.
            None => Ok(()),
        }
    }

    /// Lets it finish what is under way, and waits for that.
    pub fn stop(&mut self) -> Result<()> {
        self.orders.is_stopping.store(true, Ordering::SeqCst);
        self.join()
    }

    fn join(&mut self) -> Result<()> {
        let Some(thread) = self.thread.take() else {
            return Ok(());
        };
        match thread.join() {
            Ok(result) => result,
            Err(panic) => {
                let text = panic.downcast_ref::<String>().map(String::as_str);
                let text = text.or(panic.downcast_ref::<&str>().copied());
                bail!("the load panicked: {}", text.unwrap_or("without words"))
            }
        }
    }
}

enum UnderWay {
    Read { issued: u64, offset: u64, length: u64 },
    Change(Change),
    Flush,
}

struct Worker {
    disk: Arc<Disk>,
    orders: Arc<Orders>,
    rng: Rng,
    connect: Connect,
    under_way: BTreeMap<u64, (usize, UnderWay)>,
    /// How many are under way on each queue.
    per_queue: Vec<usize>,
    next_id: u64,
    /// Of this connection, if a resize of the disk does not reach it.
    fixed_bytes: Option<u64>,
    /// Where the reading of everything goes on, and how many of its reads wait.
    sweep: Option<Sweep>,
    last_answer: Instant,
}

struct Sweep {
    number: u64,
    next: u64,
    waiting: std::collections::BTreeSet<u64>,
}

impl Worker {
    fn run(mut self) -> Result<()> {
        loop {
            let mut client = self.come_back()?;
            self.per_queue = vec![0; client.queues()];
            if self.serve(client.as_mut())? {
                return Ok(());
            }
            drop(client);
            self.lose_all();
        }
    }

    fn come_back(&mut self) -> Result<Box<dyn Client>> {
        let start = Instant::now();
        loop {
            // Before the connection: an order that comes later is for this one.
            self.orders.is_to_reconnect.store(false, Ordering::SeqCst);
            match (self.connect)() {
                Ok(client) => {
                    self.fixed_bytes = client.fixed_bytes();
                    let bytes = self.fixed_bytes.unwrap_or(u64::MAX);
                    self.orders.bytes_max.store(bytes, Ordering::SeqCst);
                    self.orders.connections.fetch_add(1, Ordering::SeqCst);
                    self.last_answer = Instant::now();
                    return Ok(client);
                }
                Err(error) if start.elapsed() > PATIENCE => return Err(error.context("no connection")),
                Err(_) => std::thread::sleep(RETRY),
            }
        }
    }

    /// Everything under way died with the daemon, which is dead when this is called or will be before anyone
    /// connects again.
    fn lose_all(&mut self) {
        let mut oracle = self.disk.oracle();
        for (_, under_way) in std::mem::take(&mut self.under_way).into_values() {
            match under_way {
                UnderWay::Read { issued, .. } => oracle.forget_read(issued),
                UnderWay::Change(change) => oracle.lose(&change),
                UnderWay::Flush => {}
            }
        }
        if let Some(sweep) = &mut self.sweep {
            sweep.next = 0;
            sweep.waiting.clear();
        }
    }

    /// Loads until it is told to stop (true), or the connection is gone or to be made anew (false).
    fn serve(&mut self, client: &mut dyn Client) -> Result<bool> {
        loop {
            let is_stopping = self.orders.is_stopping.load(Ordering::SeqCst);
            let is_ending = is_stopping || self.orders.is_to_reconnect.load(Ordering::SeqCst);
            if is_ending && self.under_way.is_empty() {
                return Ok(is_stopping);
            }
            self.look_for_sweep();
            if !is_ending && self.submit(client).is_err() {
                return Ok(false);
            }
            let Ok(answers) = client.reap(LOOK) else {
                return Ok(false);
            };
            if !answers.is_empty() {
                self.last_answer = Instant::now();
            }
            for answer in answers {
                self.answered(answer.id, answer.result)?;
            }
            ensure!(
                self.last_answer.elapsed() < PATIENCE || self.orders.may_wait.load(Ordering::SeqCst),
                "no answer for {PATIENCE:?} with {} requests under way",
                self.under_way.len()
            );
        }
    }

    fn look_for_sweep(&mut self) {
        let wanted = self.orders.sweeps_wanted.load(Ordering::SeqCst);
        let done = self.orders.sweeps_done.load(Ordering::SeqCst);
        if self.sweep.is_none() && wanted > done {
            self.sweep = Some(Sweep {
                number: wanted,
                next: 0,
                waiting: std::collections::BTreeSet::new(),
            });
        }
        let bytes = self.bytes();
        if let Some(sweep) = &self.sweep
            && sweep.next >= bytes
            && sweep.waiting.is_empty()
        {
            self.orders.sweeps_done.store(sweep.number, Ordering::SeqCst);
            self.sweep = None;
        }
    }

    fn bytes(&self) -> u64 {
        let bytes = self.disk.oracle().bytes();
        self.fixed_bytes.map_or(bytes, |fixed| fixed.min(bytes))
    }

    /// Fills the queues to a depth drawn each time: sometimes one request alone, sometimes all they take.
    fn submit(&mut self, client: &mut dyn Client) -> Result<(), crate::client::Gone> {
        for queue in 0..client.queues() {
            let depth = 1 + self.rng.below(client.depth() as u64) as usize;
            while self.per_queue[queue] < depth {
                let (op, under_way) = self.draw();
                self.next_id += 1;
                let id = self.next_id;
                if let Some(sweep) = &mut self.sweep
                    && let UnderWay::Read { offset, length, .. } = &under_way
                    && *offset == sweep.next
                {
                    sweep.next += length;
                    sweep.waiting.insert(id);
                }
                self.under_way.insert(id, (queue, under_way));
                self.per_queue[queue] += 1;
                client.submit(queue, id, &op)?;
            }
        }
        Ok(())
    }

    fn draw(&mut self) -> (Op, UnderWay) {
        let bytes = self.bytes();
        let mut oracle = self.disk.oracle();
        // A sweep goes on beside the other load.
        if let Some(sweep) = &self.sweep
            && sweep.next < bytes
            && self.rng.chance(1, 2)
        {
            let (offset, length) = (sweep.next, TRANSFER_MAX.min(bytes - sweep.next));
            let issued = oracle.begin_read();
            return (
                Op::Read { offset, length },
                UnderWay::Read {
                    issued,
                    offset,
                    length,
                },
            );
        }
        match self.rng.below(100) {
            kind @ 0..80 => {
                let (offset, length) = draw_range(&mut self.rng, bytes, self.disk.sector_bytes, TRANSFER_MAX);
                if kind < 38 {
                    let issued = oracle.begin_read();
                    return (
                        Op::Read { offset, length },
                        UnderWay::Read {
                            issued,
                            offset,
                            length,
                        },
                    );
                }
                let (change, data) = oracle.write(offset, length);
                (Op::Write { offset, data }, UnderWay::Change(change))
            }
            80..88 => {
                let (offset, length) = draw_range(&mut self.rng, bytes, self.disk.sector_bytes, CLEAR_MAX);
                let change = oracle.clear(offset, length);
                (Op::WriteZeroes { offset, length }, UnderWay::Change(change))
            }
            88..95 => {
                let (offset, length) = draw_range(&mut self.rng, bytes, self.disk.sector_bytes, CLEAR_MAX);
                // Only whole blocks are let go of.
                let first = offset.next_multiple_of(4096);
                let end = (offset + length) / 4096 * 4096;
                let change = oracle.clear(first, end.saturating_sub(first));
                (Op::Discard { offset, length }, UnderWay::Change(change))
            }
            _ => (Op::Flush, UnderWay::Flush),
        }
    }

    fn answered(&mut self, id: u64, result: Result<Vec<u8>, String>) -> Result<()> {
        let (queue, under_way) = self.under_way.remove(&id).context("an answer to nothing")?;
        self.per_queue[queue] -= 1;
        let mut oracle = self.disk.oracle();
        let data = match result {
            Ok(data) => data,
            Err(error) => {
                let what = match under_way {
                    UnderWay::Read { offset, length, .. } => format!("read of {length} bytes at {offset}"),
                    UnderWay::Change(change) => format!("{change:?}"),
                    UnderWay::Flush => "flush".to_owned(),
                };
                bail!("the disk answered with {error}: {what}");
            }
        };
        match under_way {
            UnderWay::Read {
                issued,
                offset,
                length,
            } => {
                ensure!(data.len() as u64 == length, "{} bytes, not {length}", data.len());
                if let Err(wrong) = oracle.end_read(issued, offset, &data) {
                    bail!("wrong data in a read of {length} bytes at {offset}: {wrong}");
                }
                let sectors = length / crate::oracle::SECTOR;
                self.orders.sectors_verified.fetch_add(sectors, Ordering::Relaxed);
                if let Some(sweep) = &mut self.sweep {
                    sweep.waiting.remove(&id);
                }
            }
            UnderWay::Change(change) => oracle.complete(&change),
            UnderWay::Flush => {}
        }
        self.orders.answers.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

/// Any range of whole sectors; short ones are as likely as long ones, half of them meet in one place.
fn draw_range(rng: &mut Rng, bytes: u64, sector: u64, longest: u64) -> (u64, u64) {
    let exponent = rng.below(u64::from((longest / sector).ilog2()) + 1);
    let length = sector * (1 + rng.below(1 << exponent));
    let room = if rng.chance(1, 2) {
        HOT_BYTES.min(bytes)
    } else {
        bytes
    };
    let length = length.min(room);
    let mut offset = rng.below((room - length) / sector + 1) * sector;
    // Whole blocks and parts of them are as likely.
    if rng.chance(1, 2) {
        offset = offset / 4096 * 4096;
    }
    (offset, length)
}
