//! A disk and an index in memory that crash on demand, and a driver that runs a store over them in an order
//! chosen by a seed.
#![allow(dead_code, reason = "each test file uses its own part")]

use std::collections::{BTreeMap, VecDeque};

use edge::{BlockFile, Completion, DiskError, DiskOp, DiskOutcome, IoId, KvBatch, KvError, KvStore};
use types::{DiskId, HeapBlock, Instant, Payload, PoolId, RequestId};
use weft_store::{
    Effect, Event, FormatParams, IndexRequest, IndexResponse, LeafKey, Recovered, RecoveryReport, Reply,
    Request, Store, StoreError, StoreSettings, format, recover,
};

pub const BLOCK: usize = 4096;
const SECTOR: usize = 512;

/// splitmix64: good enough to choose, and the same everywhere.
#[derive(Clone)]
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

type Sector = [u8; SECTOR];

/// Sparse; remembers which sectors a power cut may take back.
#[derive(Clone, Default)]
pub struct MemDisk {
    pub bytes: u64,
    /// What reads see.
    view: BTreeMap<u64, Sector>,
    durable: BTreeMap<u64, Sector>,
    /// Written, not synced: (order, sector, content).
    unsynced: Vec<(u64, u64, Sector)>,
    order: u64,
    /// Block addresses that fail to read.
    pub unreadable: Vec<u64>,
    pub fails_sync: bool,
}

impl MemDisk {
    pub fn new(bytes: u64) -> MemDisk {
        MemDisk {
            bytes,
            ..MemDisk::default()
        }
    }

    pub fn apply(&mut self, offset: u64, bytes: &[u8]) {
        assert!(
            offset.is_multiple_of(BLOCK as u64) && bytes.len().is_multiple_of(BLOCK),
            "aligned"
        );
        assert!(offset + bytes.len() as u64 <= self.bytes, "inside the disk");
        self.order += 1;
        for (at, sector) in (offset / SECTOR as u64..).zip(bytes.chunks_exact(SECTOR)) {
            self.put(at, sector.try_into().unwrap());
        }
    }

    fn put(&mut self, at: u64, sector: Sector) {
        self.view.insert(at, sector);
        self.unsynced.push((self.order, at, sector));
    }

    fn sync_upto(&mut self, order: u64) {
        for (_, at, sector) in self.unsynced.extract_if(.., |write| write.0 <= order) {
            self.durable.insert(at, sector);
        }
    }

    /// Some sectors of a write that was under way.
    fn tear(&mut self, offset: u64, bytes: &[u8], percent: u64, rng: &mut Rng) {
        self.order += 1;
        for (at, sector) in (offset / SECTOR as u64..).zip(bytes.chunks_exact(SECTOR)) {
            if rng.chance(percent) {
                self.put(at, sector.try_into().unwrap());
            }
        }
    }

    /// Keeps each unsynced sector with this chance.
    pub fn cut_power(&mut self, percent: u64, rng: &mut Rng) {
        for (_, at, sector) in std::mem::take(&mut self.unsynced) {
            if rng.chance(percent) {
                self.durable.insert(at, sector);
            }
        }
        self.view = self.durable.clone();
    }

    pub fn flip_bit(&mut self, byte: u64) {
        let at = byte / SECTOR as u64;
        let sector = self.view.entry(at).or_insert([0; SECTOR]);
        sector[(byte % SECTOR as u64) as usize] ^= 1;
        let sector = *sector;
        self.durable.insert(at, sector);
    }

    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DiskError> {
        let first = offset / BLOCK as u64;
        let last = (offset + buffer.len() as u64) / BLOCK as u64;
        if self.unreadable.iter().any(|block| (first..last).contains(block)) {
            return Err(io_error("read", offset, buffer.len()));
        }
        for (at, sector) in (offset / SECTOR as u64..).zip(buffer.chunks_exact_mut(SECTOR)) {
            match self.view.get(&at) {
                Some(content) => sector.copy_from_slice(content),
                None => sector.fill(0),
            }
        }
        Ok(())
    }
}

pub fn io_error(operation: &'static str, offset: u64, bytes: usize) -> DiskError {
    DiskError::Io {
        operation,
        offset,
        bytes: bytes as u64,
        errno: 5,
        reason: "made up".into(),
    }
}

impl BlockFile for MemDisk {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DiskError> {
        self.read(offset, buffer)
    }

    fn write_at(&mut self, offset: u64, buffer: &[u8]) -> Result<(), DiskError> {
        self.apply(offset, buffer);
        Ok(())
    }

    fn sync(&mut self) -> Result<(), DiskError> {
        if self.fails_sync {
            return Err(io_error("sync", 0, 0));
        }
        self.sync_upto(self.order);
        Ok(())
    }
}

#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct MemKv(pub BTreeMap<Vec<u8>, Vec<u8>>);

impl KvStore for MemKv {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, KvError> {
        Ok(self.0.get(key).cloned())
    }

    fn scan(&self, from: &[u8], to: &[u8], limit: usize) -> Result<Vec<(Vec<u8>, Vec<u8>)>, KvError> {
        let range = self.0.range(from.to_vec()..to.to_vec());
        Ok(range
            .take(limit)
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect())
    }

    fn apply(&mut self, batch: &KvBatch) -> Result<(), KvError> {
        for (from, to) in &batch.delete_ranges {
            self.0.retain(|key, _| !(from..to).contains(&key));
        }
        for key in &batch.deletes {
            self.0.remove(key);
        }
        for (key, value) in &batch.puts {
            self.0.insert(key.clone(), value.clone());
        }
        Ok(())
    }
}

/// How a daemon ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Crash {
    /// The process dies: what was written stays, what was under way is torn.
    Kill,
    /// Power goes: of what was not synced, each sector stays with this chance.
    Power(u64),
}

/// A store over a disk and an index in memory.
pub struct World {
    pub disk: MemDisk,
    pub kv: MemKv,
    pub store: Store<HeapBlock>,
    pub settings: StoreSettings,
    pub rng: Rng,
    /// Operations under way, with the disk's order at submission.
    pub ios: Vec<(IoId, DiskOp<HeapBlock>, u64)>,
    pub index: VecDeque<IndexRequest>,
    pub replies: BTreeMap<u64, Result<Reply<HeapBlock>, StoreError>>,
    pub reply_order: Vec<u64>,
    pub full: Vec<bool>,
    pub failures: Vec<StoreError>,
    pub next_request: u64,
    /// Disk operations in order, for counting.
    pub submitted: Vec<&'static str>,
    /// Leaves that the index was asked for, in order.
    pub loads: Vec<LeafKey>,
}

pub struct Geometry {
    pub segments: u64,
    pub segment_bytes: u64,
}

pub fn small_settings() -> StoreSettings {
    StoreSettings {
        cache_bytes: 0,
        appends_in_flight: 4,
        checkpoint_bytes: 512 << 10,
        segments_reserved: 4,
        clean_below_free: 8,
        cleaning_bytes: 64 << 10,
    }
}

impl World {
    pub fn new(seed: u64, geometry: &Geometry, settings: StoreSettings) -> World {
        let mut disk = MemDisk::new((1 << 20) + geometry.segments * geometry.segment_bytes);
        let mut kv = MemKv::default();
        let params = FormatParams {
            disk: DiskId(77),
            pool: PoolId(1),
            segment_bytes: geometry.segment_bytes,
            secret_base: seed,
        };
        format(&mut disk, &mut kv, params).expect("format");
        let (recovered, _) = recover(&mut disk, &mut kv, seed).expect("first start");
        World::over(disk, kv, recovered, seed, settings)
    }

    pub fn over(disk: MemDisk, kv: MemKv, recovered: Recovered, seed: u64, settings: StoreSettings) -> World {
        World {
            disk,
            kv,
            store: Store::open(recovered, settings),
            settings,
            rng: Rng(seed),
            ios: Vec::new(),
            index: VecDeque::new(),
            replies: BTreeMap::new(),
            reply_order: Vec::new(),
            full: Vec::new(),
            failures: Vec::new(),
            next_request: 1,
            submitted: Vec::new(),
            loads: Vec::new(),
        }
    }

    pub fn step(&mut self, event: Event<HeapBlock>) {
        let mut effects = Vec::new();
        self.store.step(Instant(0), event, &mut effects);
        for effect in effects {
            match effect {
                Effect::Reply(id, result) => {
                    let before = self.replies.insert(id.0, result);
                    assert!(before.is_none(), "request {} was answered twice", id.0);
                    self.reply_order.push(id.0);
                }
                Effect::Disk(id, operation) => {
                    self.submitted.push(match &operation {
                        DiskOp::Write { .. } => "write",
                        DiskOp::Read { .. } => "read",
                        DiskOp::Sync => "sync",
                    });
                    self.ios.push((id, operation, self.disk.order));
                }
                Effect::Index(request) => {
                    if let IndexRequest::Load { key, .. } = &request {
                        self.loads.push(*key);
                    }
                    self.index.push_back(request);
                }
                Effect::Failed(error) => self.failures.push(error),
                Effect::Full(is_full) => self.full.push(is_full),
            }
        }
    }

    /// Hands in a request; the turn goes on.
    pub fn ask(&mut self, request: Request<HeapBlock>) -> u64 {
        let id = self.next_request;
        self.next_request += 1;
        self.step(Event::Request(RequestId(id), request));
        id
    }

    pub fn turn_end(&mut self) {
        self.step(Event::TurnEnd);
    }

    /// Lets one pending thing of the world happen, chosen by the seed. False if there is none.
    pub fn happen(&mut self) -> bool {
        let choices = self.ios.len() + usize::from(!self.index.is_empty());
        if choices == 0 {
            return false;
        }
        let choice = self.rng.below(choices as u64) as usize;
        if choice == self.ios.len() {
            self.index_step();
        } else {
            self.io_step(choice);
        }
        true
    }

    pub fn index_step(&mut self) {
        let response = match self.index.pop_front().expect("a request") {
            IndexRequest::Load { key, encoded } => IndexResponse::Loaded {
                key,
                value: self.kv.get(&encoded),
            },
            IndexRequest::Checkpoint { id, batch } => IndexResponse::Checkpointed {
                id,
                result: self.kv.apply(&batch),
            },
        };
        self.step(Event::Index(response));
    }

    pub fn io_step(&mut self, choice: usize) {
        let (id, operation, order) = self.ios.swap_remove(choice);
        let result = match operation {
            DiskOp::Write { offset, header, data } => {
                self.disk.apply(offset, &joined(&header.0, &data));
                Ok(DiskOutcome::Written { header, data })
            }
            DiskOp::Read { offset, bytes } => {
                let mut buffer = vec![0; bytes as usize];
                self.disk
                    .read(offset, &mut buffer)
                    .map(|()| DiskOutcome::Read(HeapBlock::new(&buffer)))
            }
            DiskOp::Sync if self.disk.fails_sync => Err(io_error("sync", 0, 0)),
            DiskOp::Sync => {
                self.disk.sync_upto(order);
                Ok(DiskOutcome::Synced)
            }
        };
        self.step(Event::Disk(Completion { id, result }));
    }

    /// Runs until nothing is under way.
    pub fn settle(&mut self) {
        self.turn_end();
        let mut ticks = 0;
        for _ in 0..2_000_000 {
            if self.happen() {
                self.turn_end();
            } else if self.store.is_busy() && ticks < 50 {
                ticks += 1;
                self.step(Event::Tick);
                self.turn_end();
            } else {
                return;
            }
        }
        panic!("the world does not come to rest");
    }

    /// Asks, settles and takes the answer.
    pub fn call(&mut self, request: Request<HeapBlock>) -> Result<Reply<HeapBlock>, StoreError> {
        let id = self.ask(request);
        self.settle();
        self.replies.remove(&id).expect("every request is answered")
    }

    /// Ends the process and starts it again.
    pub fn crash(&mut self, crash: Crash) -> RecoveryReport {
        self.crash_and(crash, |_, _| ())
    }

    /// As `crash`, with something happening to disk and index in between.
    pub fn crash_and(
        &mut self,
        crash: Crash,
        meddle: impl FnOnce(&mut MemDisk, &mut MemKv),
    ) -> RecoveryReport {
        let ios = std::mem::take(&mut self.ios);
        for (_, operation, _) in ios {
            if let DiskOp::Write { offset, header, data } = operation {
                let percent = [0, 50, 95, 100][self.rng.below(4) as usize];
                self.disk
                    .tear(offset, &joined(&header.0, &data), percent, &mut self.rng);
            }
        }
        if let Crash::Power(percent) = crash {
            self.disk.cut_power(percent, &mut self.rng);
        }
        // The index thread may or may not have got to what it was asked.
        for request in std::mem::take(&mut self.index) {
            if let IndexRequest::Checkpoint { batch, .. } = request
                && self.rng.chance(50)
            {
                self.kv.apply(&batch).expect("memory");
            }
        }
        meddle(&mut self.disk, &mut self.kv);
        let entropy = self.rng.next();
        let (recovered, report) = recover(&mut self.disk, &mut self.kv, entropy).expect("recovery");
        self.store = Store::open(recovered, self.settings);
        self.replies.clear();
        report
    }
}

fn joined(header: &[u8], data: &[HeapBlock]) -> Vec<u8> {
    let mut bytes = header.to_vec();
    data.iter().for_each(|part| bytes.extend_from_slice(part.bytes()));
    bytes
}

/// The content of a block that the write with this seq gave it.
pub fn content(seq: u64, block: u32) -> Vec<u8> {
    let mut rng = Rng(seq << 32 | u64::from(block));
    let word = rng.next().to_le_bytes();
    word.iter().copied().cycle().take(BLOCK).collect()
}
