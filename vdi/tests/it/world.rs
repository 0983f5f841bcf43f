//! A small world around one VDI: disks in memory behind queues, deliveries in any order, and a guest that knows
//! what every read must bring.
//!
//! The check is stricter than linearisability: overlapping requests run in order of arrival, so a read must bring
//! what the requests *submitted* before it left, whatever the order in which replicas answered.

use std::collections::{BTreeMap, VecDeque};

use replication::{FromReplica, ReplicaRequest, ShardRecord, ToReplica};
use types::{
    BlockNo, DiskId, HeapBlock, Incarnation, Instant, LayerId, Lineage, Payload, RequestId, Seq, ShardId,
    ShardNo, VdiId,
};
use weft_vdi::{Effect, Event, Extent, Notice, Op, Outcome, ReadPart, Vdi, VdiError, VdiSpec};

use crate::disk::Disk;

pub const BLOCK: usize = 4096;

/// SplitMix64: a test's only randomness.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

/// Says how to repeat a failure.
pub struct Repeat(pub u64);

impl Drop for Repeat {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!(
                "seed {}: repeat with WEFT_SEED={} cargo test -p weft-vdi",
                self.0, self.0
            );
        }
    }
}

/// The seeds to run: `WEFT_SEED` alone, or `0..count`.
#[expect(
    clippy::disallowed_methods,
    reason = "which seed to repeat is a test's own setting"
)]
pub fn seeds(count: u64) -> Vec<u64> {
    match std::env::var("WEFT_SEED") {
        Ok(seed) => vec![seed.parse().expect("WEFT_SEED is a number")],
        Err(_) => (0..count).collect(),
    }
}

/// What the guest waits for.
#[derive(Debug)]
enum Waiting {
    Bytes(HeapBlock),
    Done,
    /// A write, and the blocks it changes.
    Write(Vec<u64>),
    /// A flush, and what was complete when it was submitted.
    Flush(BTreeMap<u64, Seq>),
    Extents {
        offset: u64,
        length: u64,
    },
    /// It may fail, or bring anything.
    Whatever,
}

pub struct World {
    pub vdi: Vdi<HeapBlock>,
    pub random: Random,
    disks: BTreeMap<DiskId, Disk>,
    answers: Vec<FromReplica<HeapBlock>>,
    saves: VecDeque<ShardRecord>,
    /// Takes no replica any more: a record that adds it is refused.
    pub leaving: Option<DiskId>,
    now: Instant,
    /// What the guest believes the disk holds, were everything submitted done.
    pub model: Vec<u8>,
    waiting: BTreeMap<RequestId, Waiting>,
    /// Seq of each block as last sent to a replica, and as of the last completed write.
    sent: BTreeMap<u64, Seq>,
    completed: BTreeMap<u64, Seq>,
    next_id: u64,
    pub notices: Vec<Notice>,
    pub errors: Vec<VdiError>,
    pub extents: Vec<Extent>,
    quorum: usize,
    shard_blocks: u64,
}

pub fn record(no: u32, replicas: usize) -> ShardRecord {
    let shard = ShardId {
        vdi: VdiId(1),
        no: ShardNo(no),
    };
    ShardRecord::new(shard, (1..=replicas as u128).map(DiskId).collect())
}

pub fn spec(bytes: u64, shard_bytes: u64) -> VdiSpec {
    VdiSpec {
        id: VdiId(1),
        bytes,
        sector_bytes: 512,
        shard_bytes,
        lineage: Lineage::of_layer(VdiId(1), LayerId(1)),
        sharing: replication::Sharing::Alone,
    }
}

impl World {
    pub fn new(seed: u64, bytes: u64, shard_bytes: u64, replicas: usize) -> World {
        let disks: Vec<DiskId> = (1..=replicas as u128).map(DiskId).collect();
        let shards = bytes.div_ceil(shard_bytes) as u32;
        let records = (0..shards).map(|no| record(no, replicas)).collect();
        World {
            vdi: Vdi::new(spec(bytes, shard_bytes), records, Incarnation(1), disks.clone()),
            random: Random(seed),
            disks: disks.into_iter().map(|id| (id, Disk::default())).collect(),
            answers: Vec::new(),
            saves: VecDeque::new(),
            leaving: None,
            now: Instant(0),
            model: vec![0; bytes as usize],
            waiting: BTreeMap::new(),
            sent: BTreeMap::new(),
            completed: BTreeMap::new(),
            next_id: 0,
            notices: Vec::new(),
            errors: Vec::new(),
            extents: Vec::new(),
            quorum: if replicas == 3 { 2 } else { replicas },
            shard_blocks: shard_bytes / BLOCK as u64,
        }
    }

    pub fn step(&mut self, event: Event<HeapBlock>) {
        let mut effects = Vec::new();
        self.now.0 += 1_000_000;
        self.vdi.step(self.now, event, &mut effects);
        for effect in effects {
            match effect {
                Effect::Send(disk, message) => self.send(disk, message),
                Effect::SaveRecord(record) => self.saves.push_back(record),
                Effect::Notice(notice) => self.notices.push(notice),
                Effect::Done(id, result) => self.done(id, result),
            }
        }
    }

    fn send(&mut self, disk: DiskId, message: ToReplica<HeapBlock>) {
        if let ReplicaRequest::Write { block, seq, data, .. } = &message.request {
            self.note_sent(&message, *block, (data.length() / BLOCK) as u32, *seq);
        }
        if let ReplicaRequest::Clear {
            block, count, seq, ..
        } = &message.request
        {
            self.note_sent(&message, *block, *count, *seq);
        }
        let disk = self.disks.get_mut(&disk).expect("a disk of this world");
        if !disk.is_down {
            disk.inbox.push_back(message);
        }
    }

    fn note_sent(&mut self, message: &ToReplica<HeapBlock>, block: BlockNo, count: u32, seq: Seq) {
        let first = u64::from(message.shard.no.0) * self.shard_blocks + u64::from(block.0);
        for block in first..first + u64::from(count) {
            let last = self.sent.entry(block).or_default();
            *last = (*last).max(seq);
        }
    }

    /// One thing happens in the world, chosen at random; `false` if nothing can.
    pub fn turn(&mut self) -> bool {
        let full: Vec<DiskId> = self
            .disks
            .iter()
            .filter(|(_, d)| !d.inbox.is_empty())
            .map(|(id, _)| *id)
            .collect();
        let choices =
            full.len() + usize::from(!self.answers.is_empty()) + usize::from(!self.saves.is_empty());
        if choices == 0 {
            return false;
        }
        let choice = self.random.below(choices as u64) as usize;
        if let Some(id) = full.get(choice) {
            let disk = self.disks.get_mut(id).expect("listed");
            let message = disk.inbox.pop_front().expect("not empty");
            self.answers.push(disk.serve(*id, &message));
        } else if choice == full.len() && !self.answers.is_empty() {
            let at = self.random.below(self.answers.len() as u64) as usize;
            let answer = self.answers.swap_remove(at);
            self.step(Event::Replica(answer));
        } else {
            let record = self.saves.pop_front().expect("not empty");
            let shard = record.shard.no;
            let is_held = |held: &&ShardRecord| held.shard == record.shard;
            let held = self.vdi.records().find(is_held).expect("a shard").clone();
            let is_added = |disk: &DiskId| record.replicas.contains(disk) && !held.replicas.contains(disk);
            match self.leaving.filter(is_added) {
                Some(disk) => self.step(Event::DiskLeaves {
                    disk,
                    refused: Some(record),
                }),
                _ => self.step(Event::RecordSaved { shard, record }),
            }
        }
        true
    }

    /// Lets the world run until nothing moves and no ticks are asked for.
    pub fn run(&mut self) {
        for _ in 0..10_000_000u64 {
            if !self.turn() {
                if !self.vdi.is_busy() {
                    return;
                }
                self.now.0 += 250_000_000;
                self.step(Event::Tick);
            }
        }
        panic!("the world never comes to rest: {:?}", self.vdi.status());
    }

    /// As [`run`](World::run), and every request must be answered.
    pub fn run_dry(&mut self) {
        self.run();
        assert!(self.waiting.is_empty(), "never answered: {:?}", self.waiting);
        assert_eq!(self.vdi.status().in_flight, 0);
    }

    fn submit(&mut self, op: Op<HeapBlock>, waiting: Waiting) -> RequestId {
        self.next_id += 1;
        let id = RequestId(self.next_id);
        self.waiting.insert(id, waiting);
        self.step(Event::Request(id, op));
        id
    }

    /// Any request at all, without opinion on what it brings.
    pub fn ask(&mut self, op: Op<HeapBlock>) -> RequestId {
        self.submit(op, Waiting::Whatever)
    }

    pub fn is_waiting(&self, id: RequestId) -> bool {
        self.waiting.contains_key(&id)
    }

    pub fn read(&mut self, offset: u64, length: u64) -> RequestId {
        let expected = HeapBlock::new(&self.model[offset as usize..(offset + length) as usize]);
        let of = None;
        self.submit(Op::Read { offset, length, of }, Waiting::Bytes(expected))
    }

    /// Reads what a snapshot holds, which must be this.
    pub fn read_of(&mut self, lineage: &Lineage, offset: u64, expected: &[u8]) -> RequestId {
        let (length, of) = (expected.len() as u64, Some(lineage.clone()));
        let expected = HeapBlock::new(expected);
        self.submit(Op::Read { offset, length, of }, Waiting::Bytes(expected))
    }

    /// Cuts; all that went to the old layer must be on stable media when that is answered.
    pub fn cut(&mut self, lineage: Lineage) -> RequestId {
        let old = self.sent.clone();
        self.submit(Op::Cut { lineage }, Waiting::Flush(old))
    }

    pub fn write(&mut self, offset: u64, length: u64, fua: bool) -> RequestId {
        let mut bytes = Vec::with_capacity(length as usize);
        while bytes.len() < length as usize {
            let sector = self.random.next();
            (0..64u64).for_each(|i| bytes.extend_from_slice(&sector.wrapping_add(i).to_le_bytes()));
        }
        self.model[offset as usize..(offset + length) as usize].copy_from_slice(&bytes);
        let data = HeapBlock::new(&bytes);
        let end = if length == 0 {
            0
        } else {
            (offset + length).div_ceil(BLOCK as u64)
        };
        let blocks = offset / BLOCK as u64..end;
        // With FUA another write may change the blocks between content and flush: no opinion on seqs then.
        let waiting = if fua {
            Waiting::Done
        } else {
            Waiting::Write(blocks.collect())
        };
        self.submit(Op::Write { offset, data, fua }, waiting)
    }

    pub fn discard(&mut self, offset: u64, length: u64) -> RequestId {
        let from = offset.next_multiple_of(BLOCK as u64) as usize;
        let end = (offset + length) as usize;
        let to = if end == self.model.len() {
            end
        } else {
            end / BLOCK * BLOCK
        };
        if from < to {
            self.model[from..to].fill(0);
        }
        self.submit(Op::Discard { offset, length }, Waiting::Done)
    }

    pub fn zero(&mut self, offset: u64, length: u64, fua: bool) -> RequestId {
        self.model[offset as usize..(offset + length) as usize].fill(0);
        self.submit(Op::WriteZeroes { offset, length, fua }, Waiting::Done)
    }

    pub fn flush(&mut self) -> RequestId {
        let completed = self.completed.clone();
        self.submit(Op::Flush, Waiting::Flush(completed))
    }

    pub fn ask_extents(&mut self, offset: u64, length: u64) -> RequestId {
        self.submit(
            Op::Extents {
                offset,
                length,
                of: None,
            },
            Waiting::Extents { offset, length },
        )
    }

    fn done(&mut self, id: RequestId, result: Result<Outcome<HeapBlock>, VdiError>) {
        let waiting = self.waiting.remove(&id).expect("answered once");
        if let Waiting::Whatever = waiting {
            self.errors.extend(result.err());
            return;
        }
        let outcome = result.unwrap_or_else(|error| panic!("{waiting:?} failed: {error}"));
        match (waiting, outcome) {
            (Waiting::Bytes(expected), Outcome::Read(parts)) => {
                let bytes = flat(&parts);
                assert_eq!(bytes.len(), expected.length());
                let wrong = bytes
                    .iter()
                    .zip(expected.bytes())
                    .position(|(is, should)| is != should);
                assert_eq!(wrong, None, "wrong byte of {} read by {id}", bytes.len());
            }
            (Waiting::Done, Outcome::Done) => {}
            (Waiting::Write(blocks), Outcome::Done) => {
                for block in blocks {
                    self.completed.insert(block, self.sent[&block]);
                }
            }
            (Waiting::Flush(completed), Outcome::Done) => self.check_durable(&completed),
            (Waiting::Extents { offset, length }, Outcome::Extents(extents)) => {
                self.check_extents(offset, length, &extents);
            }
            (waiting, outcome) => panic!("{waiting:?} brought {outcome:?}"),
        }
    }

    /// Promise 2: what was complete is on stable media of a quorum.
    fn check_durable(&self, completed: &BTreeMap<u64, Seq>) {
        for (block, seq) in completed {
            let shard = (block / self.shard_blocks) as u32;
            let within = (block % self.shard_blocks) as u32;
            let durable = |disk: &Disk| disk.shards.get(&shard)?.durable.get(&within).copied();
            // Resync moves no zeros to where there are zeros, older or not.
            let is_cleared =
                |disk: &Disk| durable(disk).is_some_and(|(held, is_zero)| is_zero && held >= *seq);
            let is_cleared = self.disks.values().any(is_cleared);
            let holds = |disk: &&Disk| {
                durable(disk).is_some_and(|(held, is_zero)| held >= *seq || is_zero && is_cleared)
            };
            let holding = self.disks.values().filter(holds).count();
            assert!(
                holding >= self.quorum,
                "block {block} is durable on {holding} disks"
            );
        }
    }

    fn check_extents(&mut self, offset: u64, length: u64, extents: &[Extent]) {
        assert!(!extents.is_empty());
        assert!(extents.iter().all(|extent| extent.length > 0));
        assert!(extents.windows(2).all(|pair| pair[0].is_data != pair[1].is_data));
        let total: u64 = extents.iter().map(|extent| extent.length).sum();
        assert!(total <= length);
        // Where nothing is under way, what holds no data reads as zeros.
        if self.waiting.is_empty() {
            let mut at = offset as usize;
            for extent in extents {
                let bytes = &self.model[at..at + extent.length as usize];
                assert!(extent.is_data || bytes.iter().all(|byte| *byte == 0));
                at += extent.length as usize;
            }
        }
        self.extents = extents.to_vec();
    }

    pub fn grow(&mut self, bytes: u64, replicas: usize) {
        let old = self.vdi.records().len() as u32;
        let new = bytes.div_ceil(self.vdi.spec().shard_bytes) as u32;
        let added = (old..new).map(|no| record(no, replicas)).collect();
        self.model.resize(bytes as usize, 0);
        self.step(Event::Resized { bytes, added });
    }

    /// A disk vanishes with everything it was about to do or say, or comes back.
    pub fn set_disk(&mut self, id: DiskId, is_up: bool) {
        let disk = self.disks.get_mut(&id).expect("a disk of this world");
        disk.is_down = !is_up;
        disk.inbox.clear();
        self.answers.retain(|answer| answer.disk != id);
        self.step(Event::DiskState { disk: id, is_up });
    }

    /// A new, empty disk.
    pub fn add_disk(&mut self, id: DiskId) {
        self.disks.insert(id, Disk::default());
        self.step(Event::DiskState {
            disk: id,
            is_up: true,
        });
    }

    /// Makes the block bad on a disk.
    pub fn rot(&mut self, disk: DiskId, shard: u32, block: u32) {
        let disk = self.disks.get_mut(&disk).expect("a disk of this world");
        disk.shards
            .get_mut(&shard)
            .expect("a touched shard")
            .rotten
            .push(block);
    }

    /// Another writer takes the shard over, on every disk.
    pub fn take_over(&mut self, shard: u32) {
        for disk in self.disks.values_mut() {
            let replica = disk.shards.get_mut(&shard).expect("a touched shard");
            replica.promised.epoch.0 += 1;
        }
    }

    /// Flushes done by all disks.
    pub fn flushes(&self) -> u64 {
        self.disks.values().map(|disk| disk.flushes).sum()
    }

    /// Messages that wait for a disk.
    pub fn inboxes(&self) -> usize {
        self.disks.values().map(|disk| disk.inbox.len()).sum()
    }

    /// Shards that a disk holds.
    pub fn shards_on(&self, id: DiskId) -> usize {
        self.disks[&id].shards.len()
    }
}

pub fn flat(parts: &[ReadPart<HeapBlock>]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for part in parts {
        match part {
            ReadPart::Data(data) => bytes.extend_from_slice(data.bytes()),
            ReadPart::Zeros(count) => bytes.resize(bytes.len() + *count as usize, 0),
        }
    }
    bytes
}
