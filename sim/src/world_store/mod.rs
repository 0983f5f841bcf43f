//! One disk's log store on a simulated disk: small segments, so that the log wraps and is cleaned many times,
//! and a crash whenever fate likes.
//!
//! ```text
//!  guest ops ──▶ Store ──▶ SimDisk     crash: power loss or kill, at any event
//!  oracle    ◀──       ──▶ SimKv       recover ──▶ oracle holds the summaries and reads against its marks
//! ```
//! Guests write in one layer after another and read through lineages: the head's, a snapshot's, that of a head rolled
//! back, and of a clone, whose shard lies on the same disk as its parent's. Layers below the head are
//! dropped, and merged with later ones.
//!
//! A seed picks a profile. `Clean` has crashes only: no request may ever fail. `KvLost` also deletes the index
//! store or rolls it back to an old copy at a crash, which must change nothing. `Rot`, `Lying` and `Failing` add
//! media faults; what may then be lost is said in `store_oracle.rs`.

mod answers;
mod guest;
mod misfortune;
mod pending;
mod recovery;
mod summary;

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use edge::{DiskOp, KvStore};
use store::{Effect, Event, IndexRequest, IndexResponse, LeafKey, Store, StoreSettings};
use types::{DiskId, HeapBlock, Instant, LayerId, Payload, RequestId, ShardId};

use crate::store_oracle::ShardModel;
use crate::trace::tell;
use crate::{Faults, Rng, SimDisk, SimKv, boot};
use pending::Pending;
pub use summary::StoreSummary;

const SEGMENT_BYTES: u64 = 256 << 10;
pub(crate) const LAYERS: [LayerId; 6] = [
    LayerId(0),
    LayerId(1),
    LayerId(2),
    LayerId(5),
    LayerId(6),
    LayerId(9),
];
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
        let (store, _) = boot::recover(&mut rng, &mut disk, &mut kv, settings, 0);
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
