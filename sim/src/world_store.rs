//! One disk's log store on a simulated disk: small segments, so that the log wraps and is cleaned many times,
//! and a crash whenever fate likes.
//!
//! ```text
//!  guest ops ──▶ Store ──▶ SimDisk     crash: power loss or kill, at any event
//!  oracle    ◀──       ──▶ SimKv       recover ──▶ oracle holds the summaries and reads against its marks
//! ```
//! A seed picks a profile. `Clean` has crashes only: no request may ever fail. `KvLost` also deletes the index
//! store or rolls it back to an old copy at a crash, which must change nothing. `Rot`, `Lying` and `Failing` add
//! media faults; what may then be lost is said in `store_oracle.rs`.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use edge::{DiskOp, KvStore};
use store::{
    ClearKind, Effect, Event, IndexRequest, IndexResponse, LeafKey, Origin, ReadPart, Reply, Request, Store,
    StoreError, StoreSettings,
};
use types::{
    BlockNo, DiskId, HeapBlock, Instant, LayerId, LeafNo, Payload, RequestId, Seq, ShardId, ShardNo, VdiId,
};

use crate::store_oracle::{Doubt, ShardModel, Value, address};
use crate::trace::tell;
use crate::{Faults, LateWrites, Rng, SimDisk, SimKv};
use crate::{boot, content};

const SEGMENT_BYTES: u64 = 256 << 10;
const LAYERS: [LayerId; 2] = [LayerId(1), LayerId(2)];
const REQUESTS_MAX: usize = 24;
/// Turns after which a request without an answer, full disk apart, is a hang.
const PATIENCE: u32 = 20_000;

/// Which faults a seed has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Profile {
    Clean,
    KvLost,
    Rot,
    Lying,
    Failing,
}

/// What a run did, so that a thousand runs can be asked whether they went everywhere.
#[derive(Clone, Copy, Debug, Default)]
pub struct StoreSummary {
    /// Requests answered.
    pub answers: u64,
    /// Power losses survived.
    pub power_losses: u64,
    /// Kills survived.
    pub kills: u64,
    /// Reads that rightly said `Corrupt`.
    pub corrupt_reads: u64,
    /// Times the disk failed and was reopened.
    pub failures: u64,
    /// Recoveries that reported damage to the log.
    pub damaged_logs: u64,
    /// Blocks rewritten by cleaning.
    pub cleaned_blocks: u64,
    /// Checkpoints taken.
    pub checkpoints: u64,
    /// Times the store said it was full.
    pub fulls: u64,
    /// Index stores deleted or rolled back.
    pub indexes_lost: u64,
    /// Recoveries that died before they were through.
    pub broken_recoveries: u64,
    /// Runs of a hundred crashes on a full disk.
    pub crash_loops: u64,
}

impl StoreSummary {
    /// By name, for adding up.
    #[must_use]
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("answers", self.answers),
            ("power losses", self.power_losses),
            ("kills", self.kills),
            ("corrupt reads", self.corrupt_reads),
            ("disk failures", self.failures),
            ("damaged logs", self.damaged_logs),
            ("blocks cleaned", self.cleaned_blocks),
            ("checkpoints", self.checkpoints),
            ("times full", self.fulls),
            ("indexes lost", self.indexes_lost),
            ("recoveries broken off", self.broken_recoveries),
            ("crash loops", self.crash_loops),
        ]
    }
}

enum Pending {
    Write {
        shard: ShardId,
        seq: Seq,
    },
    Read {
        shard: ShardId,
        layer: LayerId,
        block: u32,
        count: u32,
        floor: Seq,
    },
    Flush {
        targets: Vec<(ShardId, u64, Seq)>,
    },
    Record {
        shard: ShardId,
        record: Vec<u8>,
    },
    Drop {
        shard: ShardId,
    },
    Versions {
        shard: ShardId,
        layer: LayerId,
        leaf: LeafNo,
        /// What was issued by then: later writes may be done first and be seen or not.
        issued: Seq,
    },
    Leaves {
        shard: ShardId,
        layer: LayerId,
        newer_than: Seq,
        issued: Seq,
    },
}

struct World {
    rng: Rng,
    profile: Profile,
    disk: SimDisk,
    kv: SimKv,
    kv_copy: SimKv,
    store: Store<HeapBlock>,
    settings: StoreSettings,
    now: Instant,
    shards: BTreeMap<ShardId, ShardModel>,
    /// Earlier lives of shards that were dropped.
    dropped: Vec<(ShardId, ShardModel)>,
    shard_count: u32,
    blocks: u32,
    pending: BTreeMap<RequestId, Pending>,
    loads: Vec<(LeafKey, Vec<u8>)>,
    next_request: u64,
    next_version: u64,
    is_full: bool,
    has_failed: bool,
    spares_index: bool,
    /// Pieces of rot since the last recovery.
    rots: u32,
    /// The last writes: offset and bytes.
    recent: VecDeque<(u64, u64)>,
    summary: StoreSummary,
}

/// How many writes count as the tail of the log.
const RECENT_MAX: usize = 6;

/// Runs the world of `seed` for `ops` guest operations; panics, with the reason, when a promise is broken.
pub fn run(seed: u64, ops: u64) -> StoreSummary {
    run_filled(seed, ops, &[10, 40, 65], 48)
}

/// The same on disks that guests would like to fill beyond what they hold: writes wait, and people make room.
pub fn run_full(seed: u64, ops: u64) -> StoreSummary {
    // Half of them far beyond.
    run_filled(
        seed,
        ops,
        &[95, 130],
        if seed.is_multiple_of(2) { 48 } else { 300 },
    )
}

fn run_filled(seed: u64, ops: u64, filled_percent: &[u64], blocks_min: u64) -> StoreSummary {
    let mut world = World::new(seed, filled_percent, blocks_min);
    let mut left = ops;
    while left > 0 {
        let burst = world.rng.between(1, 120).min(left);
        left -= burst;
        world.live(burst);
        if world.profile == Profile::Rot && world.rng.chance(1, 2) {
            world.rot_the_tail();
        }
        if !world.has_failed && world.is_full && world.rng.chance(1, 4) {
            world.crash_again_and_again();
        }
        if world.has_failed {
            world.reopen_failed();
        } else if world.rng.chance(3, 4) {
            world.crash();
        } else {
            world.settle();
            world.audit();
        }
    }
    world.settle();
    if world.has_failed {
        world.reopen_failed();
    }
    world.disk.set_faults(Faults::default());
    world.audit();
    world.finish()
}

impl World {
    fn new(seed: u64, filled: &[u64], blocks_min: u64) -> World {
        let mut rng = Rng::new(seed);
        let profile = match rng.below(8) {
            0..=2 => Profile::Clean,
            3 => Profile::KvLost,
            4 | 5 => Profile::Rot,
            6 => Profile::Lying,
            _ => Profile::Failing,
        };
        let segments = rng.between(16, 40);
        let mut disk = SimDisk::new(segments * SEGMENT_BYTES + (1 << 20), rng.draw());
        disk.set_slowness(rng.between(1, 6));
        let mut kv = SimKv::new();
        let settings = StoreSettings {
            cache_bytes: rng.pick(&[64 << 10, 1 << 20]),
            appends_in_flight: rng.between(1, 8) as usize,
            checkpoint_bytes: rng.pick(&[128 << 10, 512 << 10, 2 << 20]),
            segments_reserved: 3,
            clean_below_free: 6,
            cleaning_bytes: rng.pick(&[128 << 10, 1 << 20]),
        };
        boot::format(&mut rng, &mut disk, &mut kv, DiskId(1), SEGMENT_BYTES);
        let (store, _) = boot::recover(&mut rng, &mut disk, &mut kv, settings);
        let shard_count = rng.between(1, 3) as u32;
        let capacity = store.stats().capacity_bytes / 4096;
        let filled_percent = rng.pick(filled);
        let blocks =
            (capacity * filled_percent / 100 / u64::from(shard_count) / LAYERS.len() as u64).max(blocks_min);
        tell(|| {
            format!(
                "seed {seed}: {profile:?}, {segments} segments, {shard_count} shards of {blocks} blocks, {settings:?}"
            )
        });
        let mut world = World {
            rng,
            profile,
            kv_copy: kv.clone(),
            disk,
            kv,
            store,
            settings,
            now: Instant::default(),
            shards: BTreeMap::new(),
            dropped: Vec::new(),
            shard_count,
            blocks: blocks as u32,
            pending: BTreeMap::new(),
            loads: Vec::new(),
            next_request: 1,
            next_version: 1,
            is_full: false,
            has_failed: false,
            spares_index: false,
            rots: 0,
            recent: VecDeque::new(),
            summary: StoreSummary::default(),
        };
        world.arm();
        world
    }

    fn arm(&mut self) {
        let faults = match self.profile {
            Profile::Lying => Faults {
                budget: 1,
                lost_write_ppm: 3_000,
                misdirected_write_ppm: 3_000,
                ..Faults::default()
            },
            Profile::Failing => Faults {
                budget: 1,
                write_error_ppm: 2_000,
                failed_sync_ppm: 10_000,
                ..Faults::default()
            },
            Profile::Rot => Faults {
                budget: 2,
                read_error_ppm: 2_000,
                ..Faults::default()
            },
            Profile::Clean | Profile::KvLost => Faults::default(),
        };
        self.disk.set_faults(faults);
    }

    fn lies(&self) -> bool {
        matches!(self.profile, Profile::Rot | Profile::Lying)
    }

    // ---- the guest ----

    fn live(&mut self, ops: u64) {
        let mut left = ops;
        let mut patience = i64::from(PATIENCE);
        while left > 0 && !self.has_failed && patience > 0 {
            patience -= if self.is_full { 50 } else { 1 };
            let many = self.rng.below(5).min(left);
            for _ in 0..many {
                if self.pending.len() < REQUESTS_MAX {
                    self.issue();
                    left -= 1;
                }
            }
            self.turn();
            if self.profile == Profile::Rot && self.rng.chance(1, 150) {
                self.rot_somewhere();
            }
        }
    }

    fn rot_somewhere(&mut self) {
        // The first MiB holds the superblocks: losing both is the loss of the disk, not rot.
        let blocks: Vec<u64> = self
            .disk
            .written_blocks()
            .into_iter()
            .filter(|at| *at >= 1 << 20)
            .collect();
        if !blocks.is_empty() {
            let at = self.rng.pick(&blocks) + 512 * self.rng.below(8);
            self.rot_at(at);
        }
    }

    fn rot_at(&mut self, at: u64) {
        tell(|| format!("rot at {at}"));
        self.disk.rot(at);
        self.rots += 1;
    }

    /// Everything is flushed, the store comes to rest, and then one of the last things it wrote rots.
    fn rot_the_tail(&mut self) {
        self.settle();
        self.issue_flush();
        self.settle();
        let mut patience = PATIENCE;
        while !self.store.is_witnessed() && !self.has_failed {
            self.turn();
            patience -= 1;
            assert!(patience > 0, "the log never says how far it is durable");
        }
        if self.has_failed {
            return;
        }
        for model in self.shards.values_mut() {
            model.witnessed = model.durable;
        }
        if self.recent.is_empty() {
            return;
        }
        let at = self.rng.index(self.recent.len());
        let (offset, bytes) = self.recent[at];
        let at = match self.rng.below(6) {
            0 => (offset - (1 << 20)) / SEGMENT_BYTES * SEGMENT_BYTES + (1 << 20),
            1 => offset + self.rng.below(bytes / 4096) * 4096,
            _ => offset,
        };
        // Where the headers have their content.
        let sectors = self.rng.pick(&[1, 1, 1, 8]);
        let sector = self.rng.below(sectors);
        self.rot_at(at + 512 * sector);
    }

    fn shard(&mut self) -> ShardId {
        ShardId {
            vdi: VdiId(7),
            no: ShardNo(self.rng.below(u64::from(self.shard_count)) as u32),
        }
    }

    fn is_quiet(&self, shard: ShardId) -> bool {
        !self.pending.values().any(|p| p.shard() == Some(shard))
    }

    fn issue(&mut self) {
        let shard = self.shard();
        let is_dropping = |p: &Pending| matches!(p, Pending::Drop { shard: s } if *s == shard);
        if self.pending.values().any(is_dropping) {
            return;
        }
        let Some(model) = self.shards.get(&shard) else {
            let mut model = ShardModel::default();
            model.life = self.next_version;
            self.shards.insert(shard, model);
            return self.issue_record(shard);
        };
        if !model.is_known {
            return; // its first record is under way
        }
        match self.rng.below(100) {
            0..=54 => self.issue_write(shard),
            55..=64 => self.issue_clear(shard),
            65..=89 => self.issue_read(shard),
            90..=95 => self.issue_flush(),
            96..=97 => self.issue_record(shard),
            98 if self.is_quiet(shard) => self.issue_versions(shard),
            99 if self.is_quiet(shard) && self.rng.chance(1, 6) => {
                self.send(Request::DropShard { shard }, Pending::Drop { shard });
            }
            _ => self.issue_read(shard),
        }
    }

    /// A range of up to `most` blocks, small ones mostly, hot near the start of the shard.
    fn range(&mut self, most: u32) -> (u32, u32) {
        let count = match self.rng.below(10) {
            0..=6 => self.rng.between(1, 4),
            7 | 8 => self.rng.between(1, 24),
            _ => self.rng.between(1, u64::from(most)),
        } as u32;
        let count = count.min(self.blocks);
        let span = u64::from(self.blocks - count) + 1;
        let span = if self.rng.chance(1, 3) {
            span.div_ceil(8)
        } else {
            span
        };
        (self.rng.below(span) as u32, count)
    }

    fn next_seq(&mut self, shard: ShardId) -> Seq {
        let jump = if self.rng.chance(1, 50) {
            self.rng.below(1000)
        } else {
            0
        };
        Seq(self.shards[&shard].issued.0 + 1 + jump)
    }

    fn issue_write(&mut self, shard: ShardId) {
        // At most what the first batch of a segment holds: longer writes are split and can be torn.
        let (first, count) = self.range(62);
        let layer = self.rng.pick(&LAYERS);
        let seq = self.next_seq(shard);
        let version = self.next_version;
        self.next_version += 1;
        let data = content::sectors(address(shard, layer, first), u64::from(count) * 8, version);
        let crcs = data.bytes().chunks(4096).map(types::crc32c).collect();
        let model = self.shards.get_mut(&shard).expect("known");
        model.issue(seq, layer, BlockNo(first), count, Value::Data(version));
        let request = Request::Write {
            shard,
            layer,
            block: BlockNo(first),
            seq,
            data,
            crcs,
            origin: Origin::Live,
        };
        self.send(request, Pending::Write { shard, seq });
    }

    fn issue_clear(&mut self, shard: ShardId) {
        let (first, count) = self.range(self.blocks);
        let layer = self.rng.pick(&LAYERS);
        let seq = self.next_seq(shard);
        let kind = self.rng.pick(&[ClearKind::Zero, ClearKind::Trim]);
        let model = self.shards.get_mut(&shard).expect("known");
        model.issue(seq, layer, BlockNo(first), count, Value::Clear(kind));
        let request = Request::Clear {
            shard,
            layer,
            block: BlockNo(first),
            count,
            seq,
            kind,
            origin: Origin::Live,
        };
        self.send(request, Pending::Write { shard, seq });
    }

    fn issue_read(&mut self, shard: ShardId) {
        let (first, count) = self.range(200);
        let layer = self.rng.pick(&LAYERS);
        self.send_read(shard, layer, first, count.min(256));
    }

    fn send_read(&mut self, shard: ShardId, layer: LayerId, block: u32, count: u32) {
        let request = Request::Read {
            shard,
            layer,
            block: BlockNo(block),
            count,
        };
        let floor = self.shards[&shard].completed;
        let pending = Pending::Read {
            shard,
            layer,
            block,
            count,
            floor,
        };
        self.send(request, pending);
    }

    fn issue_flush(&mut self) {
        let targets = self
            .shards
            .iter()
            .map(|(shard, model)| (*shard, model.life, model.issued))
            .collect();
        self.send(Request::Flush, Pending::Flush { targets });
    }

    fn issue_record(&mut self, shard: ShardId) {
        if self
            .pending
            .values()
            .any(|p| matches!(p, Pending::Record { shard: s, .. } if *s == shard))
        {
            return;
        }
        let length = self.rng.between(8, 200) as usize;
        let mut record = self.next_version.to_le_bytes().to_vec();
        record.resize(length, 0x5a);
        self.next_version += 1;
        let model = self.shards.get_mut(&shard).expect("known");
        model.records.push(record.clone());
        model.doubt = model.doubt.when_put();
        let request = Request::PutRecord {
            shard,
            record: record.clone(),
        };
        self.send(request, Pending::Record { shard, record });
    }

    fn issue_versions(&mut self, shard: ShardId) {
        let layer = self.rng.pick(&LAYERS);
        let issued = self.shards[&shard].issued;
        if self.rng.chance(1, 2) {
            let leaf = BlockNo(self.rng.below(u64::from(self.blocks)) as u32).leaf();
            self.send(
                Request::LeafVersions { shard, layer, leaf },
                Pending::Versions {
                    shard,
                    layer,
                    leaf,
                    issued,
                },
            );
        } else {
            let newer_than = Seq(self.rng.between(0, self.shards[&shard].issued.0));
            let request = Request::ChangedLeaves {
                shard,
                layer,
                newer_than,
                from: LeafNo(0),
            };
            self.send(
                request,
                Pending::Leaves {
                    shard,
                    layer,
                    newer_than,
                    issued,
                },
            );
        }
    }

    fn send(&mut self, request: Request<HeapBlock>, pending: Pending) {
        let id = RequestId(self.next_request);
        self.next_request += 1;
        tell(|| format!("  {id} {request:?}"));
        self.pending.insert(id, pending);
        self.step(Event::Request(id, request));
    }

    // ---- the loop around the core ----

    fn step(&mut self, event: Event<HeapBlock>) {
        let mut effects = Vec::new();
        self.store.step(self.now, event, &mut effects);
        for effect in effects {
            self.perform(effect);
        }
    }

    fn perform(&mut self, effect: Effect<HeapBlock>) {
        match effect {
            Effect::Reply(id, result) => self.answered(id, result),
            Effect::Disk(id, operation) => {
                tell(|| format!("    {id:?} {}", summary_of(&operation)));
                if let DiskOp::Write { offset, data, .. } = &operation {
                    let bytes: usize = data.iter().map(Payload::length).sum();
                    self.recent.push_back((*offset, 4096 + bytes as u64));
                    if self.recent.len() > RECENT_MAX {
                        self.recent.pop_front();
                    }
                }
                edge::Disk::submit(&mut self.disk, id, operation);
            }
            Effect::Index(IndexRequest::Load { key, encoded }) => self.loads.push((key, encoded)),
            Effect::Index(IndexRequest::Checkpoint { id, batch }) => {
                tell(|| format!("    checkpoint {id}: {} puts", batch.puts.len()));
                self.kv.submit(id, batch);
            }
            Effect::Failed(error) => {
                tell(|| format!("    failed: {error}"));
                assert_eq!(
                    self.profile,
                    Profile::Failing,
                    "the disk failed of itself: {error}"
                );
                self.has_failed = true;
            }
            Effect::Full(is_full) => {
                tell(|| format!("    full: {is_full}"));
                self.is_full = is_full;
                self.summary.fulls += u64::from(is_full);
            }
        }
    }

    fn turn(&mut self) {
        self.now = self.now + Duration::from_micros(self.rng.between(1, 2000));
        let mut completions = Vec::new();
        edge::Disk::poll(&mut self.disk, &mut completions);
        for completion in completions {
            tell(|| format!("    {:?} {}", completion.id, outcome_of(&completion)));
            self.step(Event::Disk(completion));
        }
        while !self.loads.is_empty() && self.rng.chance(2, 3) {
            let at = self.rng.index(self.loads.len());
            let (key, encoded) = self.loads.swap_remove(at);
            let value = self.kv.get(&encoded);
            self.step(Event::Index(IndexResponse::Loaded { key, value }));
        }
        if self.rng.chance(1, 3)
            && let Some(id) = self.kv.complete_one()
        {
            tell(|| format!("    checkpoint {id} done"));
            self.step(Event::Index(IndexResponse::Checkpointed { id, result: Ok(()) }));
            if self.rng.chance(1, 4) {
                self.kv_copy = self.kv.clone();
            }
        }
        if self.rng.chance(1, 4) {
            self.step(Event::Tick);
        }
        self.step(Event::TurnEnd);
    }

    /// Lets everything under way finish; what waits for space is helped by giving space back.
    fn settle(&mut self) {
        let mut patience = PATIENCE;
        let mut has_trimmed = false;
        while !self.pending.is_empty() && !self.has_failed {
            self.turn();
            patience -= 1;
            if self.is_full && patience.is_multiple_of(500) {
                self.make_room(has_trimmed);
                has_trimmed = true;
            }
            assert!(
                patience > 0,
                "{} requests are not answered, full: {}, first {:?}; {:?}",
                self.pending.len(),
                self.is_full,
                self.pending.iter().next().map(|(id, p)| (id, p.name())),
                self.store.stats()
            );
        }
    }

    /// What people do about a full disk: discard what they can, and, where discards wait behind writes that wait for
    /// space, take a shard off the disk.
    fn make_room(&mut self, has_trimmed: bool) {
        let is_dropping = |shard: ShardId| {
            let drops = |p: &Pending| matches!(p, Pending::Drop { shard: s } if *s == shard);
            self.pending.values().any(drops)
        };
        let shards: Vec<ShardId> = self.shards.keys().copied().filter(|s| !is_dropping(*s)).collect();
        if !has_trimmed {
            for shard in shards {
                self.give_space_back(shard);
            }
        } else if let Some(shard) = shards.first().copied() {
            self.send(Request::DropShard { shard }, Pending::Drop { shard });
        }
    }

    fn give_space_back(&mut self, shard: ShardId) {
        for layer in LAYERS {
            let seq = self.next_seq(shard);
            let model = self.shards.get_mut(&shard).expect("known");
            model.issue(seq, layer, BlockNo(0), self.blocks, Value::Clear(ClearKind::Trim));
            let request = Request::Clear {
                shard,
                layer,
                block: BlockNo(0),
                count: self.blocks,
                seq,
                kind: ClearKind::Trim,
                origin: Origin::Live,
            };
            self.send(request, Pending::Write { shard, seq });
        }
    }

    // ---- answers ----

    fn answered(&mut self, id: RequestId, result: Result<Reply<HeapBlock>, StoreError>) {
        let pending = self
            .pending
            .remove(&id)
            .expect("an answer to something asked once");
        self.summary.answers += 1;
        let is_dropped = pending
            .shard()
            .is_some_and(|shard| !self.shards.contains_key(&shard));
        let is_drop = matches!(pending, Pending::Drop { .. });
        if is_dropped && !is_drop && matches!(result, Ok(_) | Err(StoreError::NoShard(_))) {
            return;
        }
        let reply = match result {
            Ok(reply) => reply,
            Err(error) => return self.refused(id, pending, &error),
        };
        tell(|| format!("  {id} done"));
        match pending {
            Pending::Write { shard, seq } => {
                self.shard_mut(shard).completed = seq.max(self.shards[&shard].completed);
            }
            Pending::Read {
                shard,
                layer,
                block,
                count,
                floor,
            } => {
                let Reply::Read(parts) = reply else {
                    panic!("{id}: a read brought {reply:?}")
                };
                self.check_read(id, shard, layer, block, count, floor, &parts);
            }
            Pending::Flush { targets } => self.flushed(id, &targets),
            Pending::Record { shard, record } => {
                // A header that rots takes its record with it, silently if nothing behind it is durable.
                let may_forget = self.lies();
                let model = self.shard_mut(shard);
                let at = model.records.iter().position(|r| *r == record).expect("put");
                if !may_forget {
                    model.records.drain(..at);
                }
                model.is_known = true;
            }
            Pending::Drop { shard } => {
                let model = self.shards.remove(&shard);
                if self.lies() {
                    self.dropped.extend(model.map(|model| (shard, model)));
                }
            }
            Pending::Versions {
                shard,
                layer,
                leaf,
                issued,
            } => {
                let Reply::Versions(versions) = reply else {
                    panic!("{id}: versions brought {reply:?}")
                };
                assert_eq!(versions.len(), 256, "{id}");
                let may_be_lost = self.lies();
                if self.shards[&shard].issued == issued
                    && self.shards[&shard].is_exact()
                    && let Err(why) =
                        self.shards[&shard].check_versions(shard, layer, leaf, &versions, may_be_lost)
                {
                    panic!("{id} versions of shard {shard} layer {layer}: {why}");
                }
            }
            Pending::Leaves {
                shard,
                layer,
                newer_than,
                issued,
            } => {
                let Reply::Leaves(leaves) = reply else {
                    panic!("{id}: leaves brought {reply:?}")
                };
                if self.shards[&shard].issued == issued && self.shards[&shard].is_exact() {
                    let expected = self.shards[&shard].changed_leaves(layer, newer_than);
                    assert_eq!(
                        leaves, expected,
                        "{id} leaves of {shard} layer {layer} above {newer_than}"
                    );
                }
            }
        }
    }

    fn refused(&mut self, id: RequestId, pending: Pending, error: &StoreError) {
        tell(|| format!("  {id} refused: {error}"));
        let is_allowed = match error {
            StoreError::Corrupt { .. } => self.lies() && matches!(&pending, Pending::Read { .. }),
            StoreError::DiskFailed(_) => self.profile == Profile::Failing,
            StoreError::NoShard(shard) => self
                .pending
                .values()
                .any(|p| matches!(p, Pending::Drop { shard: s } if s == shard)),
            StoreError::IndexFailed(_) => false,
        };
        assert!(is_allowed, "{id} ({}) was refused: {error}", pending.name());
        self.summary.corrupt_reads += u64::from(matches!(error, StoreError::Corrupt { .. }));
        match (error, pending) {
            (StoreError::NoShard(_), Pending::Write { shard, seq }) => {
                // Its shard is being dropped: nothing that waits for it waits any longer.
                let model = self.shard_mut(shard);
                model.completed = model.completed.max(seq);
            }
            // A failed disk may have done it all the same: that is open until the disk is back.
            (StoreError::DiskFailed(_), pending) => drop(self.pending.insert(id, pending)),
            _ => {}
        }
    }

    fn shard_mut(&mut self, shard: ShardId) -> &mut ShardModel {
        self.shards.get_mut(&shard).expect("known to the oracle")
    }

    fn check_read(
        &self,
        id: RequestId,
        shard: ShardId,
        layer: LayerId,
        block: u32,
        count: u32,
        floor: Seq,
        parts: &[ReadPart<HeapBlock>],
    ) {
        let mut at = block;
        let mut check = |bytes: Option<&[u8]>| {
            let version = match bytes {
                None => Some(0),
                Some(bytes) => content::block_version(address(shard, layer, at), bytes),
            };
            let result = match version {
                Some(version) => self.shards[&shard].check(layer, at, floor, version),
                None => Err(format!("layer {layer} block {at} holds what nobody wrote there")),
            };
            if let Err(why) = result {
                panic!("{id} read of shard {shard} lied: {why}");
            }
            at += 1;
        };
        for part in parts {
            match part {
                ReadPart::Zeros(blocks) => (0..*blocks).for_each(|_| check(None)),
                ReadPart::Data(data) => data.bytes().chunks(4096).for_each(|bytes| check(Some(bytes))),
            }
        }
        assert_eq!(
            at,
            block + count,
            "{id}: a read of {count} blocks brought {}",
            at - block
        );
    }

    fn flushed(&mut self, id: RequestId, targets: &[(ShardId, u64, Seq)]) {
        for (shard, life, target) in targets {
            let may_prune = !self.lies() && self.is_quiet(*shard);
            let model = self.shards.get_mut(shard).filter(|model| model.life == *life);
            let Some(model) = model else {
                continue;
            };
            assert!(
                model.completed >= *target,
                "flush {id} is done but {shard} is completed to {} only, it was asked for {target}",
                model.completed
            );
            model.durable = model.durable.max(*target);
            if may_prune {
                model.prune(model.durable);
            }
        }
    }

    // ---- crashes ----

    fn crash(&mut self) {
        let is_power_loss = self.rng.chance(1, 2);
        if self.rng.chance(1, 3) {
            // Not always at the end of a turn.
            let mut completions = Vec::new();
            edge::Disk::poll(&mut self.disk, &mut completions);
            for completion in completions {
                self.step(Event::Disk(completion));
            }
        }
        if self.has_failed {
            return self.reopen_failed();
        }
        tell(|| format!("crash: {}", if is_power_loss { "power loss" } else { "kill" }));
        if is_power_loss {
            self.summary.power_losses += 1;
            self.disk.lose_power();
        } else {
            self.summary.kills += 1;
            // The lock on the device outlives the process until its last write has ended (edge::file).
            self.disk.kill(LateWrites::Never);
        }
        self.restart(is_power_loss);
    }

    /// A daemon that dies soon after each start, on a disk that has no space: it must always be able to start again.
    fn crash_again_and_again(&mut self) {
        self.summary.crash_loops += 1;
        // A rebuild knows less of what is free: two faults at once.
        self.spares_index = true;
        for _ in 0..100 {
            // Each life says something: the records of shards that are fenced, and what guests wanted to write.
            for _ in 0..self.rng.below(4) {
                self.issue();
            }
            for shard in self.shards.keys().copied().collect::<Vec<_>>() {
                if self.rng.chance(1, 2) && self.shards[&shard].is_known && self.is_quiet(shard) {
                    self.issue_record(shard);
                }
            }
            for _ in 0..self.rng.below(30) {
                self.turn();
            }
            self.crash();
        }
        self.spares_index = false;
    }

    fn reopen_failed(&mut self) {
        tell(|| "reopened after a failure".into());
        self.summary.failures += 1;
        self.disk.kill(LateWrites::Never);
        self.has_failed = false;
        self.restart(true);
    }

    fn restart(&mut self, mut lost_cache: bool) {
        self.count_stats();
        // A device that fails while it is opened is opened again later.
        self.disk.set_faults(Faults::default());
        self.kv.crash(&mut self.rng);
        if self.profile == Profile::KvLost && !self.spares_index && self.rng.chance(1, 2) {
            self.summary.indexes_lost += 1;
            if self.rng.chance(1, 2) {
                tell(|| "the index is deleted".into());
                self.kv.delete();
            } else {
                tell(|| "the index is rolled back".into());
                self.kv.roll_back_to(&self.kv_copy);
            }
        }
        self.loads.clear();
        self.is_full = false;
        let pending = std::mem::take(&mut self.pending);
        let mut damage = self.recover(&mut lost_cache);
        if self.rng.chance(1, 5) {
            tell(|| "power loss right after recovery".into());
            self.disk.lose_power();
            lost_cache = true;
            damage |= self.recover(&mut lost_cache);
        }
        self.compare_summaries(&pending, lost_cache, damage);
        self.arm();
        if self.rng.chance(1, 2) {
            self.audit();
        }
    }

    /// Recovers, and tells whether the log was found damaged below what was known to be durable. Sometimes the
    /// process dies in the middle of it, again and again.
    fn recover(&mut self, lost_cache: &mut bool) -> bool {
        let mut is_broken_off = false;
        while self.rng.chance(1, 4) {
            is_broken_off = true;
            let operations = self.rng.below(16) as u32;
            self.disk.set_cut_after(Some(operations));
            let result = store::recover(&mut self.disk, &mut self.kv, self.rng.draw());
            self.disk.set_cut_after(None);
            tell(|| {
                format!(
                    "  a recovery that dies after {operations} operations: {}",
                    result.is_err()
                )
            });
            self.summary.broken_recoveries += u64::from(result.is_err());
            if self.rng.chance(1, 2) {
                self.disk.lose_power();
                *lost_cache = true;
            }
        }
        let (store, report) = boot::recover(&mut self.rng, &mut self.disk, &mut self.kv, self.settings);
        self.store = store;
        self.summary.damaged_logs += u64::from(!report.damage.is_empty());
        let is_doubted = self.check_doubt(!report.damage.is_empty(), is_broken_off);
        assert!(
            !is_doubted || self.lies(),
            "a healthy log is called damaged: {report:?}"
        );
        is_doubted
    }

    /// What was found damaged once is said until the shard's record is put again, whatever happens in between. Of a
    /// recovery that was broken off nobody knows what it found; of doubt that there was before, whether it is new.
    fn check_doubt(&mut self, is_damaged: bool, is_broken_off: bool) -> bool {
        let mut is_doubted = is_damaged;
        for summary in self.store.shards() {
            let Some(model) = self.shards.get_mut(&summary.shard) else {
                continue;
            };
            let must_be = is_damaged || model.doubt == Doubt::Open;
            assert!(
                summary.is_doubtful || !must_be,
                "shard {} is trusted again, and nobody put its record",
                summary.shard
            );
            is_doubted |= summary.is_doubtful && (is_broken_off || model.doubt == Doubt::None);
            model.doubt = match summary.is_doubtful {
                true => Doubt::Open,
                false => Doubt::None,
            };
        }
        is_doubted
    }

    fn compare_summaries(
        &mut self,
        pending: &BTreeMap<RequestId, Pending>,
        lost_cache: bool,
        is_damaged: bool,
    ) {
        let damage_allows_loss = self.lies() && !self.disk.damages().is_empty();
        let is_lightly_rotten = self.profile == Profile::Rot && self.rots <= 1 && !is_damaged;
        self.rots = 0;
        let mut found: BTreeMap<ShardId, store::ShardSummary> =
            self.store.shards().into_iter().map(|s| (s.shard, s)).collect();
        tell(|| format!("recovered {found:?}"));
        if is_damaged {
            self.bring_back_dropped(&found);
        }
        for (shard, mut model) in std::mem::take(&mut self.shards) {
            let is_unsure = pending.values().any(|p| match p {
                Pending::Drop { shard: s } => *s == shard,
                Pending::Record { shard: s, .. } => *s == shard && !model.is_known,
                _ => false,
            });
            let floor = match (damage_allows_loss, lost_cache) {
                (true, _) if is_lightly_rotten => model.witnessed,
                (true, _) => Seq(0),
                (false, true) => model.durable,
                (false, false) => model.completed,
            };
            match found.remove(&shard) {
                None => assert!(is_unsure || damage_allows_loss, "shard {shard} is gone"),
                Some(summary) => {
                    if let Err(why) = model.recover(&summary, floor, damage_allows_loss) {
                        panic!("after {}: {why}", if lost_cache { "power loss" } else { "kill" });
                    }
                    if is_damaged {
                        model.tatter();
                    }
                    self.shards.insert(shard, model);
                }
            }
        }
        assert!(
            found.is_empty() || damage_allows_loss,
            "shards nobody made, or that were dropped: {found:?}"
        );
    }

    /// A log that lost its tail, and says so, lost the drops in it as well: a shard may be back as it was before.
    /// Which of its lives it is, its record tells.
    fn bring_back_dropped(&mut self, found: &BTreeMap<ShardId, store::ShardSummary>) {
        for (shard, summary) in found {
            let is_it = |model: &ShardModel| model.records.contains(&summary.record);
            if self.shards.get(shard).is_some_and(is_it) {
                continue;
            }
            let life = self
                .dropped
                .iter()
                .rposition(|(s, model)| s == shard && is_it(model));
            if let Some(life) = life {
                let (_, model) = self.dropped.swap_remove(life);
                self.dropped
                    .extend(self.shards.insert(*shard, model).map(|later| (*shard, later)));
            }
        }
    }

    /// Reads everything and compares versions, data counts and content; nothing else is under way.
    fn audit(&mut self) {
        self.settle();
        for shard in self.shards.keys().copied().collect::<Vec<_>>() {
            for layer in LAYERS {
                let mut block = 0;
                while block < self.blocks && !self.has_failed {
                    let count = (self.blocks - block).min(self.rng.between(1, 256) as u32);
                    self.send_read(shard, layer, block, count);
                    block += count;
                    self.turn();
                }
                self.settle();
            }
        }
        let summaries = self.store.shards();
        for summary in summaries {
            let Some(model) = self.shards.get(&summary.shard) else {
                continue;
            };
            if !self.has_failed && !self.lies() {
                // Cleaning gives up blocks that rotted.
                assert_eq!(
                    summary.data_blocks,
                    model.data_blocks(),
                    "data blocks of {}",
                    summary.shard
                );
            }
        }
    }

    fn count_stats(&mut self) {
        let stats = self.store.stats();
        self.summary.cleaned_blocks += stats.cleaned_blocks;
        self.summary.checkpoints += stats.checkpoints;
    }

    fn finish(mut self) -> StoreSummary {
        self.count_stats();
        self.summary
    }
}

impl Pending {
    fn shard(&self) -> Option<ShardId> {
        match self {
            Pending::Write { shard, .. }
            | Pending::Read { shard, .. }
            | Pending::Record { shard, .. }
            | Pending::Drop { shard }
            | Pending::Versions { shard, .. }
            | Pending::Leaves { shard, .. } => Some(*shard),
            Pending::Flush { .. } => None,
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Pending::Write { .. } => "write",
            Pending::Read { .. } => "read",
            Pending::Flush { .. } => "flush",
            Pending::Record { .. } => "record",
            Pending::Drop { .. } => "drop",
            Pending::Versions { .. } => "versions",
            Pending::Leaves { .. } => "leaves",
        }
    }
}

fn summary_of(operation: &DiskOp<HeapBlock>) -> String {
    match operation {
        DiskOp::Write { offset, data, .. } => {
            let bytes: usize = data.iter().map(Payload::length).sum();
            format!("write at {offset}: 4096+{bytes} B")
        }
        DiskOp::Read { offset, bytes } => format!("read at {offset}: {bytes} B"),
        DiskOp::Sync => "sync".into(),
    }
}

fn outcome_of(completion: &edge::Completion<HeapBlock>) -> String {
    match &completion.result {
        Ok(edge::DiskOutcome::Written { .. }) => "written".into(),
        Ok(edge::DiskOutcome::Read(_)) => "read".into(),
        Ok(edge::DiskOutcome::Synced) => "synced".into(),
        Err(error) => format!("failed: {error}"),
    }
}
