//! The load client: the `blkio` crate's virtio-blk driver over vhost-user, kept at a depth.
//!
//! It sleeps in poll(2) until the device interrupts, as a guest's driver does, and hands over in one batch all
//! that it can: each turn takes every completion that is there and puts a new request in its place.
//!
//! UNSAFETY: the driver's buffers are shared memory named by address; making slices of them, and reading the
//! completions it filled in, is the unsafe code here and nothing else.
#![allow(unsafe_code)]

use std::mem::MaybeUninit;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use blkio::{Blkio, Blkioq, Completion, MemoryRegion, ReqFlags};
use hdrhistogram::Histogram;

use crate::job::{Job, Offsets, Op, PAGE, Pattern, Zone};
use crate::random::Random;

/// Most bytes under way at once.
const BUFFER_BYTES: usize = 64 << 20;

/// Ring entries; a request takes three, so depths up to 42 never wait for the ring.
const QUEUE_SIZE: i32 = 128;

/// A device that completes nothing for this long has lost a request.
const PATIENCE: Duration = Duration::from_secs(60);

/// Stamps are offsets under this, so that zeros or a file's leftovers are no valid stamp.
const STAMP: u64 = 0x5745_4654_0B3A_C4E5;

/// How long a run is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// Load without counting, first.
    pub ramp: Duration,
    /// Load that counts.
    pub measured: Duration,
}

/// What a run gave.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// I/Os that completed in the measured time.
    pub ios: u64,
    /// The measured time.
    pub elapsed: Duration,
    /// Of those I/Os, from submission to completion, in nanoseconds.
    pub latency: Histogram<u64>,
}

/// What is asked again and again.
#[derive(Clone, Copy, Debug)]
pub struct Requests {
    /// What is done at an offset.
    pub op: Op,
    /// Bytes of one.
    pub block: u64,
    /// Under way at once.
    pub depth: usize,
    /// Offsets are below this.
    pub end: u64,
}

impl Requests {
    /// Those of `job`.
    #[must_use]
    pub fn of(job: &Job) -> Requests {
        Requests {
            op: job.op,
            block: job.block,
            depth: job.depth,
            end: job.zone.offset + job.zone.bytes,
        }
    }
}

/// What a load does after some completions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// The next offsets.
    GoOn,
    /// Nothing new; what is under way completes.
    Finish,
    /// Nothing more, not even waiting: the device is gone. The client is good for nothing afterwards.
    Abandon,
}

/// For latencies in nanoseconds.
#[must_use]
pub fn new_histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(100, PATIENCE.as_nanos() as u64, 3).expect("bounds in order, three digits")
}

/// One connection to a vhost-user-blk device, with one queue.
pub struct LoadClient {
    queue: Blkioq,
    region: MemoryRegion,
    blkio: Blkio,
    /// Makes every block that is written differ from all before.
    writes: u64,
}

/// A place for one request and its buffer.
#[derive(Clone, Copy)]
struct Slot {
    offset: u64,
    submitted: Instant,
    flushing: bool,
}

impl LoadClient {
    /// Connects to the device at the socket `path`.
    pub fn connect(path: &Path) -> Result<LoadClient> {
        LoadClient::connect_with(path, BUFFER_BYTES)
    }

    /// As [`LoadClient::connect`], with so many bytes of buffers: few are ready sooner.
    pub fn connect_with(path: &Path, buffer_bytes: usize) -> Result<LoadClient> {
        let path = path.to_str().context("socket path is not UTF-8")?;
        let mut blkio = Blkio::new("virtio-blk-vhost-user").map_err(in_words("driver"))?;
        blkio.set_str("path", path).map_err(in_words("path"))?;
        blkio.connect().map_err(in_words("connect"))?;
        blkio.set_i32("num-queues", 1).map_err(in_words("queues"))?;
        blkio
            .set_i32("queue-size", QUEUE_SIZE)
            .map_err(in_words("queue size"))?;
        let queue = blkio
            .start()
            .map_err(in_words("start"))?
            .queues
            .pop()
            .context("no queue")?;
        let region = blkio
            .alloc_mem_region(buffer_bytes)
            .map_err(in_words("buffers"))?;
        blkio.map_mem_region(&region).map_err(in_words("map buffers"))?;
        let mut client = LoadClient {
            queue,
            region,
            blkio,
            writes: 0,
        };
        Random::new(region.addr as u64).fill(client.buffer(0, buffer_bytes));
        Ok(client)
    }

    /// Bytes of the disk.
    pub fn capacity(&self) -> Result<u64> {
        self.blkio.get_u64("capacity").map_err(in_words("capacity"))
    }

    /// Writes all of `zone` once, in order, and flushes.
    pub fn fill(&mut self, zone: Zone) -> Result<()> {
        let block = 1 << 20;
        let offsets = Offsets::from_start(Pattern::Sequential, zone, block);
        let blocks = usize::try_from(offsets.blocks()).context("blocks of the zone")?;
        let load = Requests {
            op: Op::Write,
            block,
            depth: 8,
            end: zone.offset + zone.bytes,
        };
        self.drive(&load, offsets.take(blocks), |_, _| Next::GoOn)?;
        self.flush()
    }

    /// One FLUSH.
    pub fn flush(&mut self) -> Result<()> {
        self.queue.flush(0, ReqFlags::empty());
        let mut completions = [const { MaybeUninit::uninit() }; 1];
        self.wait(&mut completions).map(drop)
    }

    /// Keeps `job` going at its depth; `probe` is called where the measured time begins and where it ends.
    pub fn run(&mut self, job: &Job, timing: Timing, seed: u64, mut probe: impl FnMut()) -> Result<Outcome> {
        let mut latency = new_histogram();
        let mut ios = 0;
        let begin = Instant::now() + timing.ramp;
        let mut started = None;
        let mut elapsed = None;
        let observe = |now: Instant, latencies: &[Duration]| {
            if started.is_none() && now >= begin {
                probe();
                started = Some(Instant::now());
            } else if let (Some(start), None) = (started, elapsed) {
                for one in latencies {
                    latency.saturating_record(one.as_nanos() as u64);
                }
                ios += latencies.len() as u64;
                if now - start >= timing.measured {
                    elapsed = Some(now - start);
                    probe();
                }
            }
            if elapsed.is_none() {
                Next::GoOn
            } else {
                Next::Finish
            }
        };
        self.drive(&Requests::of(job), Offsets::new(job, seed), observe)?;
        let elapsed = elapsed.expect("the load ends after the measured time");
        ensure!(ios > 0, "{}: nothing completed in {elapsed:?}", job.name);
        Ok(Outcome {
            ios,
            elapsed,
            latency,
        })
    }

    /// Does `requests` at `offsets` until there are no more or `observe` says so. It is called with every handful of
    /// completions: when they were seen, and how long each took.
    pub fn drive(
        &mut self,
        requests: &Requests,
        offsets: impl Iterator<Item = u64>,
        mut observe: impl FnMut(Instant, &[Duration]) -> Next,
    ) -> Result<()> {
        let mut load = Load::new(self, requests, offsets)?;
        let mut under_way = (0..requests.depth).filter(|&slot| load.submit(slot)).count();
        let mut latencies = Vec::with_capacity(requests.depth);
        let mut is_finishing = false;
        while under_way > 0 {
            let done = load.reap()?;
            let now = Instant::now();
            latencies.clear();
            latencies.extend(done.iter().map(|&slot| now - load.slots[slot].submitted));
            under_way -= done.len();
            match observe(now, &latencies) {
                Next::GoOn => {}
                Next::Finish => is_finishing = true,
                Next::Abandon => return Ok(()),
            }
            if !is_finishing {
                under_way += done.into_iter().filter(|&slot| load.submit(slot)).count();
            }
        }
        Ok(())
    }

    fn buffer(&mut self, offset: usize, length: usize) -> &mut [u8] {
        assert!(
            offset + length <= self.region.len,
            "buffer at {offset} + {length}"
        );
        // SAFETY: the region is mapped read-write for as long as the client lives, the range is inside it, and
        // callers look only at buffers of slots that have no request under way.
        unsafe { std::slice::from_raw_parts_mut((self.region.addr + offset) as *mut u8, length) }
    }

    /// Waits for at least one completion and returns the user data of all that are there.
    fn wait<'a>(
        &mut self,
        completions: &'a mut [MaybeUninit<Completion>],
    ) -> Result<impl Iterator<Item = usize> + use<'a>> {
        let mut patience = PATIENCE;
        let count = self
            .queue
            .do_io(completions, 1, Some(&mut patience), None)
            .map_err(in_words("do_io"))?;
        for completion in &completions[..count] {
            // SAFETY: do_io filled the first `count`.
            let completion = unsafe { completion.assume_init_ref() };
            ensure!(
                completion.ret == 0,
                "a request failed with errno {}",
                -completion.ret
            );
        }
        // SAFETY: do_io filled the first `count`.
        Ok(completions[..count]
            .iter()
            .map(|c| unsafe { c.assume_init_ref() }.user_data))
    }
}

/// One run's requests.
struct Load<'a, I> {
    client: &'a mut LoadClient,
    op: Op,
    block: usize,
    end: u64,
    offsets: I,
    slots: Vec<Slot>,
    completions: Vec<MaybeUninit<Completion>>,
}

impl<'a, I: Iterator<Item = u64>> Load<'a, I> {
    fn new(client: &'a mut LoadClient, requests: &Requests, offsets: I) -> Result<Load<'a, I>> {
        let Requests {
            op,
            block,
            depth,
            end,
        } = *requests;
        let block = block as usize;
        let room = client.region.len;
        if block * depth > room {
            bail!("depth {depth} of {block} bytes is more than {room}");
        }
        let capacity = client.capacity()?;
        ensure!(
            capacity >= end,
            "the disk has {capacity} bytes, the load wants {end}"
        );
        let slot = Slot {
            offset: 0,
            submitted: Instant::now(),
            flushing: false,
        };
        Ok(Load {
            client,
            op,
            block,
            end,
            offsets,
            slots: vec![slot; depth],
            completions: (0..depth).map(|_| MaybeUninit::uninit()).collect(),
        })
    }

    /// Puts the next I/O, if there is one, into `slot`; it travels with the next [`reap`](Load::reap).
    fn submit(&mut self, slot: usize) -> bool {
        let Some(offset) = self.offsets.next() else {
            return false;
        };
        assert!(offset + self.block as u64 <= self.end, "offset {offset}");
        if self.op != Op::Read {
            self.stamp(slot, offset);
        }
        let at = self.client.region.addr + slot * self.block;
        self.slots[slot] = Slot {
            offset,
            submitted: Instant::now(),
            flushing: false,
        };
        match self.op {
            Op::Read => self
                .client
                .queue
                .read(offset, at as *mut u8, self.block, slot, ReqFlags::empty()),
            Op::Write | Op::WriteFlush => {
                self.client
                    .queue
                    .write(offset, at as *const u8, self.block, slot, ReqFlags::empty());
            }
        }
        true
    }

    /// Waits for completions; returns the slots whose I/O is done. Reads are checked.
    fn reap(&mut self) -> Result<Vec<usize>> {
        let mut done: Vec<usize> = self.client.wait(&mut self.completions)?.collect();
        match self.op {
            Op::Write => {}
            Op::Read => done.iter().try_for_each(|&slot| self.check(slot))?,
            Op::WriteFlush => done.retain(|&slot| {
                let flushed = std::mem::replace(&mut self.slots[slot].flushing, true);
                if !flushed {
                    self.client.queue.flush(slot, ReqFlags::empty());
                }
                flushed
            }),
        }
        Ok(done)
    }

    fn stamp(&mut self, slot: usize, offset: u64) {
        self.client.writes += 1;
        let count = self.client.writes.to_le_bytes();
        let buffer = self.client.buffer(slot * self.block, self.block);
        for (page, at) in buffer
            .chunks_exact_mut(PAGE as usize)
            .zip((offset..).step_by(PAGE as usize))
        {
            page[..8].copy_from_slice(&(at ^ STAMP).to_le_bytes());
            page[8..16].copy_from_slice(&count);
        }
    }

    fn check(&mut self, slot: usize) -> Result<()> {
        let offset = self.slots[slot].offset;
        let buffer = self.client.buffer(slot * self.block, self.block);
        for (page, at) in buffer
            .chunks_exact(PAGE as usize)
            .zip((offset..).step_by(PAGE as usize))
        {
            let stamp = u64::from_le_bytes(page[..8].try_into().expect("8 bytes"));
            ensure!(
                stamp == at ^ STAMP,
                "the device returned wrong data: the block at {at} carries {stamp:#018x}, written was {:#018x}",
                at ^ STAMP
            );
        }
        Ok(())
    }
}

fn in_words(what: &'static str) -> impl Fn(blkio::Error) -> anyhow::Error {
    move |error| anyhow!("vhost-user client, {what}: {error}")
}
