//! What cleaning costs: a disk filled to a share of its capacity and then overwritten, in simulated time.
//!
//! ```text
//!  guest: fill ──▶ overwrite, uniform or Zipf ──▶ read all ──▶ nothing, until the store sleeps ──▶ read all
//!                       └─ write amplification, IOPS, longest wait, free segments, memory: sampled
//! ```
//! The real store runs over a disk that keeps headers only (all content is zeros), so that gigabytes take
//! seconds. The disk serves one operation after the other, each for a fixed time and a time per byte, and answers
//! a little later: much like a flash disk at any depth. No run depends on this machine's speed.

use std::cell::Cell;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::rc::Rc;
use std::time::Duration;

use edge::{AlignedBlock, BlockFile, Completion, DiskError, DiskOp, DiskOutcome, IoId, KvStore};
use store::{
    Effect, Event, FormatParams, IndexRequest, IndexResponse, Origin, Request, Store, StoreSettings,
    StoreStats,
};
use types::{
    BLOCK_BYTES, BlockNo, DiskId, Instant, LayerId, Lineage, Payload, PoolId, RequestId, SHARD_BLOCKS_MAX,
    Seq, ShardId, ShardNo, VdiId,
};

use crate::{Rng, SimKv};

const BLOCK: usize = BLOCK_BYTES as usize;
/// A read or write of any size keeps the disk for so long, and for a byte so much more: 75,000 small ones a
/// second, 4 GB/s of large ones.
const SERVICE_NS: u64 = 12_000;
const BYTES_PER_US: u64 = 4000;
/// It answers so much later, and meanwhile serves others.
const LATENCY_NS: u64 = 15_000;
const SYNC_NS: u64 = 100_000;
const CHECKPOINT_NS: u64 = 5_000_000;
const TICK_NS: u64 = 250_000_000;
const SAMPLES: u64 = 20;
/// A guest that waits longer for one write is wedged.
const PATIENCE_NS: u64 = 60_000_000_000;
static ZEROS: [u8; 4 << 20] = [0; 4 << 20];

/// Where a guest writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Pattern {
    /// Every block as likely.
    Uniform,
    /// The most popular block twice as often as the next, and so on (exponent 0.99), scattered over the disk.
    Zipf,
}

/// What is run.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct Setup {
    /// Share of the capacity that the guest's disk takes, percent.
    #[arg(long, default_value_t = 80)]
    pub fill: u64,
    /// Where it is overwritten.
    #[arg(long, value_enum, default_value = "uniform")]
    pub pattern: Pattern,
    /// Writes under way at once.
    #[arg(long, default_value_t = 32)]
    pub depth: usize,
    /// How often the guest's disk is overwritten, in percent of its size.
    #[arg(long, default_value_t = 300)]
    pub overwrite: u64,
    /// Segments of the disk.
    #[arg(long, default_value_t = 256)]
    pub segments: u64,
    /// Bytes of a segment.
    #[arg(long, default_value_t = 4 << 20)]
    pub segment_bytes: u64,
    /// Seed of the guest's choices.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
}

/// Figures of one stretch of the overwriting.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// Simulated time since the overwriting began, s.
    pub seconds: f64,
    /// Guest writes per second.
    pub iops: f64,
    /// Blocks of log per block written by the guest, headers and cleaning included.
    pub amplification: f64,
    /// Of them, blocks moved by cleaning.
    pub moved: f64,
    /// Free segments at its end, and the fewest.
    pub free: (u32, u32),
    /// The longest that a write took, µs.
    pub longest_us: u64,
}

/// What a run found.
#[derive(Clone, Debug)]
pub struct Report {
    /// Bytes that guests may store.
    pub capacity_bytes: u64,
    /// Share of all blocks of the disk that the guest's data takes.
    pub utilization: f64,
    /// Over time.
    pub samples: Vec<Sample>,
    /// Over the second half of the overwriting.
    pub amplification: f64,
    /// Moved blocks per guest block, as above.
    pub moved: f64,
    /// Disk reads per MiB read in order: after the fill, after the overwriting, and when the store went to sleep.
    pub reads_per_mib: [f64; 3],
    /// Bytes read per byte wanted, likewise.
    pub bytes_per_byte: [f64; 3],
    /// Seconds until the store slept, and blocks it moved in them.
    pub idle: (f64, u64),
    /// The most bytes of read buffers held while no guest read.
    pub memory_bytes_max: u64,
}

/// Content that is zeros unless there are headers in it, and knows whether it still has a holder.
#[derive(Clone, Debug)]
pub struct Blank {
    bytes: Option<Rc<Vec<u8>>>,
    _held: Option<Rc<Held>>,
    start: usize,
    length: usize,
}

#[derive(Debug)]
struct Held {
    bytes: u64,
    total: Rc<Cell<u64>>,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.total.set(self.total.get() - self.bytes);
    }
}

impl Payload for Blank {
    fn bytes(&self) -> &[u8] {
        let all: &[u8] = self.bytes.as_deref().map_or(&ZEROS, Vec::as_slice);
        &all[self.start..self.start + self.length]
    }

    fn slice(&self, start: usize, length: usize) -> Blank {
        assert!(start + length <= self.length, "slice inside");
        Blank {
            start: self.start + start,
            length,
            ..self.clone()
        }
    }

    fn overlay(&self, _: usize, _: &Blank) -> Blank {
        panic!("the store overlays nothing")
    }

    fn zeroed(length: usize) -> Blank {
        Blank {
            bytes: None,
            _held: None,
            start: 0,
            length,
        }
    }

    fn length(&self) -> usize {
        self.length
    }
}

/// A disk that remembers blocks which are not zeros.
struct BlankDisk {
    capacity: u64,
    blocks: BTreeMap<u64, Box<AlignedBlock>>,
    busy_until: u64,
    bytes_per_us: u64,
    held: Rc<Cell<u64>>,
    written_blocks: u64,
    reads: u64,
    read_bytes: u64,
}

impl BlankDisk {
    fn forget(&mut self, first: u64, count: u64) {
        let stale: Vec<u64> = self
            .blocks
            .range(first..first + count)
            .map(|(at, _)| *at)
            .collect();
        for at in stale {
            self.blocks.remove(&at);
        }
    }

    fn read(&mut self, offset: u64, bytes: u32) -> Blank {
        let first = offset / BLOCK_BYTES;
        let count = u64::from(bytes) / BLOCK_BYTES;
        self.reads += 1;
        self.read_bytes += u64::from(bytes);
        self.held.set(self.held.get() + u64::from(bytes));
        let held = Held {
            bytes: u64::from(bytes),
            total: Rc::clone(&self.held),
        };
        let mut content = None;
        for (at, block) in self.blocks.range(first..first + count) {
            let content = content.get_or_insert_with(|| vec![0; bytes as usize]);
            let at = (at - first) as usize * BLOCK;
            content[at..at + BLOCK].copy_from_slice(&block.0);
        }
        Blank {
            bytes: content.map(Rc::new),
            _held: Some(Rc::new(held)),
            start: 0,
            length: bytes as usize,
        }
    }

    /// Performs an operation now and tells when it is answered.
    fn perform(&mut self, now: u64, operation: DiskOp<Blank>) -> (u64, DiskOutcome<Blank>) {
        let (bytes, outcome) = match operation {
            DiskOp::Sync => return (now + SYNC_NS, DiskOutcome::Synced),
            DiskOp::Write { offset, header, data } => {
                let length = BLOCK + data.iter().map(Payload::length).sum::<usize>();
                let (first, count) = (offset / BLOCK_BYTES, (length / BLOCK) as u64);
                self.forget(first, count);
                self.blocks.insert(first, header.clone());
                self.written_blocks += count;
                (length as u64, DiskOutcome::Written { header, data })
            }
            DiskOp::Read { offset, bytes } => (u64::from(bytes), DiskOutcome::Read(self.read(offset, bytes))),
        };
        self.busy_until = self.busy_until.max(now) + SERVICE_NS + bytes * 1000 / self.bytes_per_us;
        (self.busy_until + LATENCY_NS, outcome)
    }
}

impl BlockFile for BlankDisk {
    fn bytes(&self) -> u64 {
        self.capacity
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DiskError> {
        for (at, block) in (offset / BLOCK_BYTES..).zip(buffer.chunks_mut(BLOCK)) {
            match self.blocks.get(&at) {
                Some(content) => block.copy_from_slice(&content.0[..block.len()]),
                None => block.fill(0),
            }
        }
        Ok(())
    }

    fn write_at(&mut self, offset: u64, buffer: &[u8]) -> Result<(), DiskError> {
        for (at, block) in (offset / BLOCK_BYTES..).zip(buffer.chunks(BLOCK)) {
            let mut content = AlignedBlock::zeroed();
            content.0[..block.len()].copy_from_slice(block);
            self.blocks.insert(at, content);
        }
        Ok(())
    }

    fn sync(&mut self) -> Result<(), DiskError> {
        Ok(())
    }
}

enum Due {
    Disk(IoId, DiskOutcome<Blank>),
    Checkpoint(u64),
    Tick,
}

/// Ranks to blocks, after Gray et al., "Quickly generating billion-record synthetic databases".
struct Zipf {
    blocks: u64,
    zeta: f64,
    eta: f64,
}

const EXPONENT: f64 = 0.99;

impl Zipf {
    fn new(blocks: u64) -> Zipf {
        let zeta: f64 = (1..=blocks).map(|rank| (rank as f64).powf(-EXPONENT)).sum();
        let two = 1.0 + 0.5f64.powf(EXPONENT);
        let eta = (1.0 - (2.0 / blocks as f64).powf(1.0 - EXPONENT)) / (1.0 - two / zeta);
        Zipf { blocks, zeta, eta }
    }

    fn draw(&self, rng: &mut Rng) -> u64 {
        let u = (rng.draw() >> 11) as f64 / (1u64 << 53) as f64;
        let scaled = u * self.zeta;
        let rank = if scaled < 1.0 {
            0
        } else if scaled < 1.0 + 0.5f64.powf(EXPONENT) {
            1
        } else {
            (self.blocks as f64 * (self.eta * (u - 1.0) + 1.0).powf(1.0 / (1.0 - EXPONENT))) as u64
        };
        // A prime larger than any disk here: neighbours in rank are not neighbours on the disk.
        let scattered = u128::from(rank.min(self.blocks - 1)) * 2_147_483_647 % u128::from(self.blocks);
        scattered as u64
    }
}

/// The guest, the store, and what is under way between them.
struct World {
    setup: Setup,
    rng: Rng,
    zipf: Option<Zipf>,
    /// Of the guest's disk.
    blocks: u64,
    crc: u32,
    store: Store<Blank>,
    disk: BlankDisk,
    kv: SimKv,
    now: u64,
    due: BinaryHeap<Reverse<(u64, u64)>>,
    what: BTreeMap<u64, Due>,
    serial: u64,
    has_tick: bool,
    /// Requests and when they were asked.
    pending: BTreeMap<RequestId, u64>,
    seqs: BTreeMap<u32, u64>,
    next_request: u64,
    longest_ns: u64,
    free_min: u32,
    held_max: u64,
    is_full: bool,
}

/// Runs it; panics if a write waits for a minute of simulated time.
#[must_use]
pub fn run(setup: Setup) -> Report {
    World::new(setup).run()
}

impl World {
    fn new(setup: Setup) -> World {
        let mut disk = BlankDisk {
            capacity: (1 << 20) + setup.segments * setup.segment_bytes,
            blocks: BTreeMap::new(),
            busy_until: 0,
            bytes_per_us: BYTES_PER_US,
            held: Rc::default(),
            written_blocks: 0,
            reads: 0,
            read_bytes: 0,
        };
        let mut kv = SimKv::new();
        let mut rng = Rng::new(setup.seed);
        let params = FormatParams {
            segment_bytes: setup.segment_bytes,
            ..FormatParams::new(DiskId(1), PoolId(1), rng.draw())
        };
        store::format(&mut disk, &mut kv, params).expect("a disk of sound size");
        let (recovered, _) = store::recover(&mut disk, &mut kv, rng.draw()).expect("an empty disk");
        let store: Store<Blank> = Store::open(recovered, StoreSettings::default());
        let blocks = store.stats().capacity_bytes / BLOCK_BYTES * setup.fill / 100;
        World {
            zipf: (setup.pattern == Pattern::Zipf).then(|| Zipf::new(blocks)),
            setup,
            rng,
            blocks,
            crc: types::crc32c(&ZEROS[..BLOCK]),
            store,
            disk,
            kv,
            now: 0,
            due: BinaryHeap::new(),
            what: BTreeMap::new(),
            serial: 0,
            has_tick: false,
            pending: BTreeMap::new(),
            seqs: BTreeMap::new(),
            next_request: 1,
            longest_ns: 0,
            free_min: u32::MAX,
            held_max: 0,
            is_full: false,
        }
    }

    fn run(mut self) -> Report {
        self.fill();
        let fresh = self.read_all();
        let samples = self.overwrite();
        let memory_bytes_max = self.held_max;
        let aged = self.read_all();
        let (began, moved) = (self.now, self.store.stats().cleaned_blocks);
        self.sleep();
        let idle = (
            (self.now - began) as f64 / 1e9,
            self.store.stats().cleaned_blocks - moved,
        );
        let rested = self.read_all();
        let second_half = &samples[samples.len() / 2..];
        let mean =
            |of: fn(&Sample) -> f64| second_half.iter().map(of).sum::<f64>() / second_half.len() as f64;
        let all_blocks = self.setup.segments * self.setup.segment_bytes / BLOCK_BYTES;
        Report {
            capacity_bytes: self.store.stats().capacity_bytes,
            utilization: self.blocks as f64 / all_blocks as f64,
            amplification: mean(|sample| sample.amplification),
            moved: mean(|sample| sample.moved),
            samples,
            reads_per_mib: [fresh.0, aged.0, rested.0],
            bytes_per_byte: [fresh.1, aged.1, rested.1],
            idle,
            memory_bytes_max,
        }
    }

    fn fill(&mut self) {
        for no in 0..self.blocks.div_ceil(u64::from(SHARD_BLOCKS_MAX)) {
            let shard = shard_of(no * u64::from(SHARD_BLOCKS_MAX));
            self.ask(Request::PutRecord {
                shard,
                record: vec![1],
            });
        }
        self.turns_until(0);
        let mut block = 0;
        while block < self.blocks {
            let count = 256.min(self.blocks - block);
            self.write(block, count as u32);
            block += count;
            self.turns_until(7);
        }
        self.turns_until(0);
    }

    fn overwrite(&mut self) -> Vec<Sample> {
        let total = self.blocks * self.setup.overwrite / 100;
        let began = self.now;
        self.held_max = 0;
        (0..SAMPLES)
            .map(|_| {
                let before = (self.now, self.disk.written_blocks, self.store.stats());
                (self.longest_ns, self.free_min) = (0, u32::MAX);
                for _ in 0..total / SAMPLES {
                    let block = match &self.zipf {
                        Some(zipf) => zipf.draw(&mut self.rng),
                        None => self.rng.below(self.blocks),
                    };
                    self.write(block, 1);
                    self.turns_until(self.setup.depth - 1);
                }
                self.sample(began, before)
            })
            .collect()
    }

    fn sample(&self, began: u64, (then, written, stats): (u64, u64, StoreStats)) -> Sample {
        let now = self.store.stats();
        let guest = (now.written_blocks - stats.written_blocks) as f64;
        Sample {
            seconds: (self.now - began) as f64 / 1e9,
            iops: guest * 1e9 / (self.now - then) as f64,
            amplification: (self.disk.written_blocks - written) as f64 / guest,
            moved: (now.cleaned_blocks - stats.cleaned_blocks) as f64 / guest,
            free: (now.segments_free, self.free_min),
            longest_us: self.longest_ns / 1000,
        }
    }

    /// Reads the guest's disk in order: disk reads per MiB, and bytes read per byte wanted.
    fn read_all(&mut self) -> (f64, f64) {
        self.turns_until(0);
        // Let what cleans anyhow come to an end, or its reads would count.
        let before = (
            self.disk.reads,
            self.disk.read_bytes,
            self.store.stats().cleaned_blocks,
        );
        let mut block = 0;
        while block < self.blocks {
            let count = 256.min(self.blocks - block);
            self.ask(Request::Read {
                shard: shard_of(block),
                lineage: Lineage::of_layer(shard_of(block).vdi, LayerId(1)),
                block: block_of(block),
                count: count as u32,
            });
            block += count;
            self.turns_until(7);
        }
        self.turns_until(0);
        let bytes = (self.blocks * BLOCK_BYTES) as f64;
        (
            (self.disk.reads - before.0) as f64 * f64::from(1 << 20) / bytes,
            (self.disk.read_bytes - before.1) as f64 / bytes,
        )
    }

    /// Nobody asks for anything until the store has nothing more to do.
    fn sleep(&mut self) {
        let began = self.now;
        while self.store.is_busy() || !self.due.is_empty() {
            self.turn();
            assert!(
                self.now < began + 3_600_000_000_000,
                "the store does not come to rest"
            );
        }
    }

    fn write(&mut self, block: u64, count: u32) {
        let shard = shard_of(block);
        let seq = self.seqs.entry(shard.no.0).or_insert(0);
        *seq += 1;
        let seq = Seq(*seq);
        self.ask(Request::Write {
            shard,
            layer: LayerId(1),
            block: block_of(block),
            seq,
            data: Blank::zeroed(count as usize * BLOCK),
            crcs: (0..count).map(|_| self.crc).collect(),
            origin: Origin::Live,
        });
    }

    fn ask(&mut self, request: Request<Blank>) {
        let id = RequestId(self.next_request);
        self.next_request += 1;
        self.pending.insert(id, self.now);
        self.step(Event::Request(id, request));
    }

    /// Turns until at most so many requests are under way.
    fn turns_until(&mut self, pending: usize) {
        while self.pending.len() > pending {
            self.turn();
        }
    }

    /// Closes the turn, and goes on to whatever happens next.
    fn turn(&mut self) {
        self.step(Event::TurnEnd);
        self.free_min = self.free_min.min(self.store.stats().segments_free);
        if !self.has_tick && self.store.is_busy() {
            self.has_tick = true;
            self.later(self.now + TICK_NS, Due::Tick);
        }
        let Some(Reverse((first, _))) = self.due.peek().copied() else {
            return;
        };
        self.now = self.now.max(first);
        while let Some(Reverse((at, serial))) = self.due.peek().copied()
            && at <= self.now
        {
            self.due.pop();
            match self.what.remove(&serial).expect("due once") {
                Due::Disk(id, outcome) => self.step(Event::Disk(Completion {
                    id,
                    result: Ok(outcome),
                })),
                Due::Checkpoint(id) => {
                    assert_eq!(self.kv.complete_one(), Some(id), "checkpoints end in order");
                    self.step(Event::Index(IndexResponse::Checkpointed { id, result: Ok(()) }));
                }
                Due::Tick => {
                    self.has_tick = false;
                    self.step(Event::Tick);
                }
            }
        }
        self.held_max = self.held_max.max(self.disk.held.get());
        let oldest = self.pending.first_key_value().map_or(self.now, |(_, at)| *at);
        assert!(
            self.now < oldest + PATIENCE_NS,
            "a request waits for a minute: {:?}",
            self.store.stats()
        );
    }

    fn later(&mut self, at: u64, what: Due) {
        self.serial += 1;
        self.due.push(Reverse((at, self.serial)));
        self.what.insert(self.serial, what);
    }

    fn step(&mut self, event: Event<Blank>) {
        let mut events = vec![event];
        while let Some(event) = events.pop() {
            let mut effects = Vec::new();
            self.store.step(
                Instant::default() + Duration::from_nanos(self.now),
                event,
                &mut effects,
            );
            for effect in effects {
                match effect {
                    Effect::Reply(id, result) => {
                        assert!(result.is_ok(), "{result:?}");
                        let asked = self.pending.remove(&id).expect("asked once");
                        self.longest_ns = self.longest_ns.max(self.now - asked);
                    }
                    Effect::Disk(id, operation) => {
                        let (at, outcome) = self.disk.perform(self.now, operation);
                        self.later(at, Due::Disk(id, outcome));
                    }
                    Effect::Index(IndexRequest::Load { key, encoded }) => {
                        let value = self.kv.get(&encoded);
                        events.push(Event::Index(IndexResponse::Loaded { key, value }));
                    }
                    Effect::Index(IndexRequest::Checkpoint { id, batch }) => {
                        self.kv.submit(id, batch);
                        self.later(self.now + CHECKPOINT_NS, Due::Checkpoint(id));
                    }
                    Effect::Failed(error) => panic!("the disk failed: {error}"),
                    Effect::Full(is_full) => self.is_full = is_full,
                }
            }
        }
    }
}

fn shard_of(block: u64) -> ShardId {
    ShardId {
        vdi: VdiId(1),
        no: ShardNo((block / u64::from(SHARD_BLOCKS_MAX)) as u32),
    }
}

fn block_of(block: u64) -> BlockNo {
    BlockNo((block % u64::from(SHARD_BLOCKS_MAX)) as u32)
}

impl Report {
    /// As a table, with one line that sums it up.
    pub fn print(&self, setup: &Setup) {
        println!("seconds     IOPS  log/guest  moved/guest  free (fewest)  longest write us");
        for sample in &self.samples {
            println!(
                "{:7.2} {:8.0} {:10.2} {:12.2} {:6} ({:4})  {:12}",
                sample.seconds,
                sample.iops,
                sample.amplification,
                sample.moved,
                sample.free.0,
                sample.free.1,
                sample.longest_us
            );
        }
        println!(
            "{} % {:?} depth {}: capacity {} MiB, disk {:.0} % full; log/guest {:.2}, moved/guest {:.2}; \
             disk reads per MiB {:.1} fresh, {:.1} aged, {:.1} rested (bytes per byte {:.2} {:.2} {:.2}); \
             {:.1} s and {} blocks to rest; {} KiB held at most",
            setup.fill,
            setup.pattern,
            setup.depth,
            self.capacity_bytes >> 20,
            self.utilization * 100.0,
            self.amplification,
            self.moved,
            self.reads_per_mib[0],
            self.reads_per_mib[1],
            self.reads_per_mib[2],
            self.bytes_per_byte[0],
            self.bytes_per_byte[1],
            self.bytes_per_byte[2],
            self.idle.0,
            self.idle.1,
            self.memory_bytes_max >> 10,
        );
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use store::ClearKind;

    use super::*;

    impl World {
        fn trim(&mut self, block: u64, count: u32) {
            let shard = shard_of(block);
            let seq = self.seqs.entry(shard.no.0).or_insert(0);
            *seq += 1;
            let seq = Seq(*seq);
            self.ask(Request::Clear {
                shard,
                layer: LayerId(1),
                block: block_of(block),
                count,
                seq,
                kind: ClearKind::Trim,
                origin: Origin::Live,
            });
        }
    }

    /// Writes and trims of two shards at some depth, and behind them, a MiB at a time, more than the disk holds.
    struct Filling {
        world: World,
        depth: usize,
        hot: BTreeSet<RequestId>,
        cold: BTreeSet<RequestId>,
        filled: u64,
    }

    impl Filling {
        fn new(depth: usize) -> Filling {
            let mut world = World::new(Setup {
                fill: 100,
                pattern: Pattern::Uniform,
                depth,
                overwrite: 0,
                segments: 31,
                segment_bytes: 32 << 20,
                seed: 3,
            });
            // With a faster one cleaning is through before the next write is there.
            world.disk.bytes_per_us = 130;
            for no in 0..3 {
                let shard = shard_of(no * u64::from(SHARD_BLOCKS_MAX));
                world.ask(Request::PutRecord {
                    shard,
                    record: vec![1],
                });
            }
            world.turns_until(0);
            Filling {
                world,
                depth,
                hot: BTreeSet::new(),
                cold: BTreeSet::new(),
                filled: 0,
            }
        }

        /// Panics if one of them waits for a minute although the disk does not say that it is full.
        fn until_full(&mut self, hot_blocks: u64, longest: u64, trims: u64) {
            while !self.world.is_full {
                let Filling { world, hot, cold, .. } = self;
                hot.retain(|id| world.pending.contains_key(id));
                cold.retain(|id| world.pending.contains_key(id));
                while hot.len() < self.depth {
                    let count = 1 + world.rng.below(longest);
                    let shard = world.rng.below(2) * u64::from(SHARD_BLOCKS_MAX);
                    let block = shard + world.rng.below(hot_blocks - count);
                    hot.insert(RequestId(world.next_request));
                    if world.rng.chance(trims, 100) {
                        world.trim(block, count as u32);
                    } else {
                        world.write(block, count as u32);
                    }
                }
                while cold.len() < 16 {
                    cold.insert(RequestId(world.next_request));
                    world.write(2 * u64::from(SHARD_BLOCKS_MAX) + 256 * self.filled, 256);
                    self.filled += 1;
                }
                world.turn();
            }
        }
    }

    #[test]
    fn a_disk_gets_full_while_others_replace_and_trim_what_they_have() {
        for (depth, hot_blocks, longest, trims) in
            [(256, 10_000, 64, 0), (256, 10_000, 64, 5), (512, 20_000, 32, 20)]
        {
            let mut filling = Filling::new(depth);
            filling.until_full(hot_blocks, longest, trims);
            let stats = filling.world.store.stats();
            let capacity = stats.capacity_bytes / BLOCK_BYTES;
            assert!(stats.live_blocks * 100 >= capacity * 98, "{stats:?}");
        }
    }

    fn small(fill: u64, pattern: Pattern, depth: usize) -> Report {
        run(Setup {
            fill,
            pattern,
            depth,
            overwrite: 60,
            segments: 62,
            segment_bytes: 1 << 20,
            seed: 3,
        })
    }

    #[test]
    fn a_disk_that_is_full_goes_on() {
        for (fill, depth) in [(95, 32), (100, 32), (100, 1)] {
            let report = small(fill, Pattern::Uniform, depth);
            assert!(
                report.samples.iter().all(|sample| sample.iops > 100.0),
                "{report:?}"
            );
            assert!(report.amplification < 40.0, "{report:?}");
        }
    }

    #[test]
    fn the_same_setup_is_the_same_run() {
        let run = || format!("{:?}", small(80, Pattern::Zipf, 8));
        assert_eq!(run(), run());
    }
}
