//! The store of one disk: the state, and who handles which event.
//!
//! ```text
//!  queue ──build──▶ flights ──written, in order──▶ applied to the ledger and leaves ──▶ replied
//!  (append.rs)                 (apply.rs)                                 (flush.rs: and synced)
//!  lookups: read.rs     checkpoints: checkpoint.rs     cleaning: clean.rs
//! ```
//!
//! Invariants no single file shows:
//! * A batch is applied and replied only after every batch with a lower number. So whatever was replied is in a
//!   prefix of the log, and recovery may drop everything behind the first gap that is not known to be durable.
//! * The index in RocksDB is never ahead of what is durable in the log.
//! * A segment is used again only when a checkpoint without it is durable in the index *and* in the log.

use std::collections::{BTreeSet, VecDeque};

use edge::{Completion, DiskError, DiskOp, DiskOutcome, IoId};
use types::{BLOCK_BYTES, InFlight, Instant, Payload, RequestId, ShardId};

use crate::append::{Flight, KEPT_SEGMENTS, Op};
use crate::batch::{SegmentKey, batch_of};
use crate::cache::{Cache, CacheAt};
use crate::checkpoint::Checkpoint;
use crate::clean::{Cleaner, Piece};
use crate::flush::{Syncs, Witness};
use crate::leaf::{Leaf, SLOTS, encode_key};
use crate::ledger::{Ledger, Shard};
use crate::read::{Lookup, Want};
use crate::recover::{OpenSegment, Recovered};
use crate::segment::{SegmentHeader, Stage, secret};
use crate::spares::Spares;
use crate::superblock::Superblock;
use crate::{
    Effect, Event, IndexRequest, IndexResponse, LeafKey, Reply, Request, ShardSummary, StoreError,
    StoreSettings, StoreStats,
};

/// What a disk operation under way is for.
pub(crate) enum Io {
    Append(u64),
    SegmentHeader,
    Sync,
    Read { lookup: u64, span: usize },
    Clean { victim: u32, piece: Piece },
}

/// The segment that will be filled next.
pub(crate) struct NextSegment {
    pub(crate) index: u32,
    pub(crate) key: SegmentKey,
    pub(crate) readiness: Readiness,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Readiness {
    /// Its header is being written.
    Writing,
    /// A sync with this ticket will make the header durable.
    Syncing(u64),
    Ready,
}

/// Where a leaf is.
pub(crate) enum LeafPlace {
    Ready(CacheAt),
    Loading(CacheAt),
    /// It does not exist: every block is absent.
    Nowhere,
    /// There is no memory to load it into now.
    NoMemory,
}

/// Leaves that are asked for beside the one that a fold waits for.
const FOLDED_AHEAD: usize = 8;

/// The log store of one disk. See the module's comment.
pub struct Store<B: Payload> {
    pub(crate) settings: StoreSettings,
    pub(crate) superblock: Superblock,
    pub(crate) ledger: Ledger,
    pub(crate) cache: Cache,
    entropy: u64,
    /// Requests not yet in a batch, oldest first. Bounded by what the layers above have outstanding.
    pub(crate) queue: VecDeque<Op<B>>,
    /// Batches submitted and not yet applied, ascending without a gap.
    pub(crate) flights: VecDeque<Flight>,
    /// Last batch number given out.
    pub(crate) number: u64,
    /// Every batch up to here is written and applied.
    pub(crate) applied: u64,
    /// Of the segment that holds that batch.
    pub(crate) applied_generation: u64,
    pub(crate) open: OpenSegment,
    pub(crate) next: Option<NextSegment>,
    generation: u64,
    io: InFlight<Io>,
    pub(crate) spares: Spares<B>,
    pub(crate) syncs: Syncs,
    pub(crate) witness: Witness,
    pub(crate) lookups: InFlight<Lookup<B>>,
    /// Lookups that wait for memory.
    pub(crate) parked: VecDeque<u64>,
    pub(crate) checkpoint: Checkpoint,
    pub(crate) cleaner: Cleaner<B>,
    /// Shards whose leaves are being emptied after a drop, or folded after a merge.
    pub(crate) purging: VecDeque<LeafKey>,
    pub(crate) failed: Option<StoreError>,
    is_failure_told: bool,
    pub(crate) is_full: bool,
    pub(crate) held_writes: u64,
    /// Shards with a clear behind writes that wait for space: those may use the slack, or the clear that would
    /// make space never came.
    pub(crate) slack_shards: BTreeSet<ShardId>,
    pub(crate) stats: StoreStats,
}

impl<B: Payload> Store<B> {
    /// Goes on from what recovery found.
    #[must_use]
    pub fn open(recovered: Recovered, settings: StoreSettings) -> Store<B> {
        let Recovered {
            superblock,
            ledger,
            entropy,
            number,
            generation,
            checkpoint_id,
            open,
        } = recovered;
        assert!(
            settings.appends_in_flight > 0,
            "at least one append must be allowed"
        );
        let mut store = Store {
            cache: Cache::new(settings.cache_bytes),
            queue: VecDeque::new(),
            flights: VecDeque::new(),
            number,
            applied: number,
            applied_generation: open.key.generation,
            open,
            next: None,
            generation,
            io: InFlight::default(),
            spares: Spares::default(),
            syncs: Syncs::new(number),
            witness: Witness::new(number),
            lookups: InFlight::default(),
            parked: VecDeque::new(),
            checkpoint: Checkpoint::new(checkpoint_id),
            cleaner: Cleaner::default(),
            purging: VecDeque::new(),
            failed: None,
            is_failure_told: false,
            is_full: false,
            held_writes: 0,
            slack_shards: BTreeSet::new(),
            stats: StoreStats::default(),
            settings,
            superblock,
            ledger,
            entropy,
        };
        for shard in store.ledger.shards.values_mut() {
            shard.end_submitted = shard.end;
        }
        let dropped: Vec<ShardId> = store
            .ledger
            .shards
            .iter()
            .filter(|(_, shard)| shard.is_purging)
            .map(|(id, _)| *id)
            .collect();
        dropped.into_iter().for_each(|id| store.start_purge(id));
        store
    }

    /// The one entrance: something happened at `now`; appends to `effects` what to do about it.
    pub fn step(&mut self, _now: Instant, event: Event<B>, effects: &mut Vec<Effect<B>>) {
        if self.failed.is_some() {
            return self.refuse(&event, effects);
        }
        match event {
            Event::Request(id, request) => self.take(id, request, effects),
            Event::Disk(completion) => self.disk_done(completion, effects),
            Event::Index(response) => self.index_done(response, effects),
            Event::TurnEnd => self.pump(effects),
            Event::Tick => {
                self.cleaner.tick();
                self.tick_witness(false);
            }
            Event::Closing => self.tick_witness(true),
        }
        if self.failed.is_some() {
            self.fail_everything(effects);
        }
    }

    /// Figures.
    #[must_use]
    pub fn stats(&self) -> StoreStats {
        StoreStats {
            segments: self.ledger.segments.geometry.segments,
            segments_free: self.free_segments(),
            live_blocks: self.ledger.segments.live_blocks(),
            capacity_bytes: self.ledger.capacity_bytes(self.settings.segments_reserved),
            cached_bytes: self.cache.bytes(),
            waiting_for_space: self.held_writes,
            ..self.stats
        }
    }

    /// What this disk holds of each shard it knows.
    #[must_use]
    pub fn shards(&self) -> Vec<ShardSummary> {
        self.ledger.summaries()
    }

    /// What the disk says of itself.
    #[must_use]
    pub fn superblock(&self) -> &Superblock {
        &self.superblock
    }

    /// Whether anything is pending that [`Event::Tick`] moves on.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        self.failed.is_none()
            && (!self.queue.is_empty()
                || !self.flights.is_empty()
                || !self.io.is_empty()
                || !self.lookups.is_empty()
                || !self.purging.is_empty()
                || self.checkpoint.is_running()
                || self.cleaner.is_running()
                || self.wants_witness()
                || self.wants_cleaning())
    }

    /// Whether the log says of everything that was promised to be durable that it is.
    #[must_use]
    pub fn is_witnessed(&self) -> bool {
        self.failed.is_some() || !self.wants_witness()
    }

    fn take(&mut self, id: RequestId, request: Request<B>, effects: &mut Vec<Effect<B>>) {
        let shard = match &request {
            // Of a shard that is not there everything is durable.
            Request::Flush { .. } => None,
            Request::PutRecord { shard, .. } => {
                self.ledger.shards.entry(*shard).or_default().will_be_known = true;
                None
            }
            Request::Write { shard, .. }
            | Request::Clear { shard, .. }
            | Request::Void { shard, .. }
            | Request::Read { shard, .. }
            | Request::SetEnd { shard, .. }
            | Request::ChangedLeaves { shard, .. }
            | Request::LeafVersions { shard, .. }
            | Request::DropLayers { shard, .. }
            | Request::MergeLayers { shard, .. }
            | Request::LayersRevision { shard }
            | Request::DropShard { shard } => Some(*shard),
        };
        if let Some(shard) = shard
            && !self.ledger.shards.get(&shard).is_some_and(Shard::is_there)
        {
            effects.push(Effect::Reply(id, Err(StoreError::NoShard(shard))));
            return;
        }
        if let Request::DropShard { shard } = &request
            && let Some(shard) = self.ledger.shards.get_mut(shard)
        {
            shard.drops_coming += 1;
            shard.will_be_known = false;
        }
        let lookup = match request {
            Request::Read {
                shard,
                lineage,
                block,
                count,
            } => Lookup::new(id, shard, Want::read(lineage, block, count)),
            Request::ChangedLeaves {
                shard,
                newer_than,
                from,
            } => Lookup::new(id, shard, Want::changed(newer_than, from)),
            Request::LeafVersions { shard, lineage, leaf } => {
                Lookup::new(id, shard, Want::versions(lineage, leaf))
            }
            Request::LayersRevision { shard } => {
                let known = &self.ledger.shards[&shard];
                // What a crash may take back was not applied.
                let is_durable = batch_of(known.revision_birth) <= self.syncs.durable;
                let revision = if is_durable { known.revision } else { 0 };
                return effects.push(Effect::Reply(id, Ok(Reply::Revision(revision))));
            }
            append => return self.queue.push_back(Op::new(id, append)),
        };
        self.start_lookup(lookup, effects);
    }

    fn disk_done(&mut self, completion: Completion<B>, effects: &mut Vec<Effect<B>>) {
        let io = self
            .io
            .remove(completion.id.0)
            .expect("a completion of an operation under way");
        let result = completion.result;
        match io {
            Io::Append(number) => match result {
                Ok(DiskOutcome::Written { header, data }) => self.appended(number, header, data, effects),
                Ok(_) => panic!("a write ended as something else"),
                Err(error) => self.fail(StoreError::DiskFailed(error)),
            },
            Io::SegmentHeader => match result {
                Ok(outcome) => {
                    if let DiskOutcome::Written { header, data } = outcome {
                        self.spares.keep_buffers(header, BLOCK_BYTES as usize, data);
                    }
                    let ticket = self.syncs.want();
                    self.next.as_mut().expect("a segment is being prepared").readiness =
                        Readiness::Syncing(ticket);
                }
                Err(error) => self.fail(StoreError::DiskFailed(error)),
            },
            Io::Sync => match result {
                Ok(_) => self.synced(effects),
                Err(error) => self.fail(StoreError::DiskFailed(error)),
            },
            Io::Read { lookup, span } => self.read_done(lookup, span, data_of(result).as_ref(), effects),
            Io::Clean { victim, piece } => self.clean_read_done(victim, piece, data_of(result), effects),
        }
    }

    fn index_done(&mut self, response: IndexResponse, effects: &mut Vec<Effect<B>>) {
        match response {
            IndexResponse::Loaded { key, value } => match value {
                Ok(value) => self.leaf_loaded(key, value.as_deref(), effects),
                Err(error) => self.fail(StoreError::IndexFailed(error)),
            },
            IndexResponse::Checkpointed { id, result } => match result {
                Ok(()) => self.checkpoint_saved(id),
                Err(error) => self.fail(StoreError::IndexFailed(error)),
            },
        }
    }

    /// The end of a turn: everything that can be started is.
    fn pump(&mut self, effects: &mut Vec<Effect<B>>) {
        self.apply_written(effects);
        self.resume_parked(effects);
        self.purge_some(effects);
        let slack_before = self.slack_shards.len();
        self.build_batches(effects);
        if self.slack_shards.len() > slack_before {
            self.build_batches(effects);
        }
        self.clean(effects);
        self.bear_witness(effects);
        self.drive_checkpoint(effects);
        self.release_flushes(effects);
        self.start_sync(effects);
        self.tell_full(effects);
    }

    pub(crate) fn submit(&mut self, io: Io, operation: DiskOp<B>, effects: &mut Vec<Effect<B>>) {
        let id = self.io.insert(io);
        effects.push(Effect::Disk(IoId(id), operation));
    }

    /// Free segments, the prepared one included.
    pub(crate) fn free_segments(&self) -> u32 {
        self.ledger.segments.free_count() + u32::from(self.next.is_some())
    }

    /// Starts to make the next segment usable, if none is.
    pub(crate) fn prepare_segment(&mut self, effects: &mut Vec<Effect<B>>) {
        // The last free segment belongs to the next recovery, which must open one. A checkpoint that frees others may
        // have it: the index already knows those as free. So may one that frees none, when others wait for the next
        // checkpoint, which cannot begin before this one is through.
        let checkpoint = &self.checkpoint;
        let leads_to_space =
            checkpoint.will_free() || (checkpoint.waits_for_room() && self.ledger.segments.emptied() > 0);
        let kept = if leads_to_space { 0 } else { KEPT_SEGMENTS };
        if self.next.is_some() || self.ledger.segments.free_count() <= kept {
            return;
        }
        let generation = self.generation + 1;
        let index = self.ledger.segments.take_free(generation).expect("counted above");
        self.generation = generation;
        let key = SegmentKey {
            secret: secret(self.superblock.secret_base, self.entropy, generation),
            generation,
        };
        let (mut header, data) = self.spares.blank();
        SegmentHeader {
            disk: self.superblock.disk,
            index,
            key,
            checkpoint: self.checkpoint.saved(),
        }
        .encode_into(&mut header);
        let offset = self.ledger.segments.geometry.start(index) * BLOCK_BYTES;
        self.next = Some(NextSegment {
            index,
            key,
            readiness: Readiness::Writing,
        });
        self.submit(Io::SegmentHeader, DiskOp::Write { offset, header, data }, effects);
    }

    /// Goes over to the prepared segment; false while it is not ready.
    pub(crate) fn switch_segment(&mut self, effects: &mut Vec<Effect<B>>) -> bool {
        self.prepare_segment(effects);
        if !self
            .next
            .as_ref()
            .is_some_and(|next| next.readiness == Readiness::Ready)
        {
            return false;
        }
        let next = self.next.take().expect("just looked");
        self.ledger.segments.set_stage(self.open.index, Stage::Closed);
        self.ledger.segments.set_stage(next.index, Stage::Open);
        self.open = OpenSegment {
            index: next.index,
            key: next.key,
            next: 1,
        };
        true
    }

    /// Brings a leaf to memory, or says what is in the way. `extra`: may exceed the limit by so many leaves. `key` is of a
    /// layer's home; leaves that are to be folded into it come first.
    pub(crate) fn locate(&mut self, key: LeafKey, extra: usize, effects: &mut Vec<Effect<B>>) -> LeafPlace {
        if self.ledger.is_unfolded(key) {
            return self.fold(key, extra, effects);
        }
        self.locate_stored(key, extra, effects)
    }

    /// Takes what other layers have of a leaf into that of their home.
    #[cold]
    fn fold(&mut self, key: LeafKey, extra: usize, effects: &mut Vec<Effect<B>>) -> LeafPlace {
        let at = match self.locate_stored(key, extra, effects) {
            LeafPlace::Ready(at) => at,
            LeafPlace::Nowhere => match self.cache.insert(key, Some(Leaf::empty()), extra) {
                Some(at) => at,
                None => {
                    self.checkpoint.is_memory_wanted = true;
                    return LeafPlace::NoMemory;
                }
            },
            place => return place,
        };
        self.cache.pin(at);
        let place = self.fold_into(key, at, extra, effects);
        self.cache.unpin(at);
        place
    }

    fn fold_into(
        &mut self,
        key: LeafKey,
        at: CacheAt,
        extra: usize,
        effects: &mut Vec<Effect<B>>,
    ) -> LeafPlace {
        let mut missing = None;
        let mut ahead = 0;
        for layer in self.ledger.shards[&key.shard].to_fold(key.layer, key.leaf) {
            let from = LeafKey { layer, ..key };
            // One above what the home's leaf was allowed.
            match self.locate_stored(from, 2 * extra, effects) {
                LeafPlace::Ready(other) => {
                    let leaf = self.cache.take(other);
                    let ledger = &mut self.ledger;
                    self.cache
                        .update(at, 0..SLOTS, |into| ledger.fold(key, into, from, &leaf));
                }
                LeafPlace::Loading(other) => {
                    missing.get_or_insert(LeafPlace::Loading(other));
                    ahead += 1;
                }
                LeafPlace::Nowhere => unreachable!("the layer has the leaf"),
                LeafPlace::NoMemory => {
                    missing.get_or_insert(LeafPlace::NoMemory);
                }
            }
            if ahead > FOLDED_AHEAD || matches!(missing, Some(LeafPlace::NoMemory)) {
                break;
            }
        }
        missing.unwrap_or_else(|| {
            self.ledger.folded(key);
            LeafPlace::Ready(at)
        })
    }

    fn locate_stored(&mut self, key: LeafKey, extra: usize, effects: &mut Vec<Effect<B>>) -> LeafPlace {
        if let Some(at) = self.cache.find(key) {
            return if self.cache.is_ready(at) {
                LeafPlace::Ready(at)
            } else {
                LeafPlace::Loading(at)
            };
        }
        let is_stored = self
            .ledger
            .shards
            .get(&key.shard)
            .is_some_and(|shard| shard.has_leaf(key.layer, key.leaf));
        if !is_stored {
            return LeafPlace::Nowhere;
        }
        match self.cache.insert(key, None, extra) {
            Some(at) => {
                let encoded = encode_key(key).to_vec();
                effects.push(Effect::Index(IndexRequest::Load { key, encoded }));
                LeafPlace::Loading(at)
            }
            None => {
                self.checkpoint.is_memory_wanted = true;
                LeafPlace::NoMemory
            }
        }
    }

    /// As [`Store::locate`], and makes the leaf if it does not exist.
    pub(crate) fn locate_or_make(
        &mut self,
        key: LeafKey,
        extra: usize,
        effects: &mut Vec<Effect<B>>,
    ) -> LeafPlace {
        match self.locate(key, extra, effects) {
            LeafPlace::Nowhere => match self.cache.insert(key, Some(Leaf::empty()), extra) {
                Some(at) => LeafPlace::Ready(at),
                None => {
                    self.checkpoint.is_memory_wanted = true;
                    LeafPlace::NoMemory
                }
            },
            place => place,
        }
    }

    fn leaf_loaded(&mut self, key: LeafKey, value: Option<&[u8]>, effects: &mut Vec<Effect<B>>) {
        let at = self.cache.find(key).expect("a leaf being loaded stays");
        let Some(leaf) = value.and_then(|value| Leaf::decode(key, value)) else {
            let reason = if value.is_some() {
                "it does not decode"
            } else {
                "it is missing"
            };
            return self.fail(StoreError::IndexFailed(edge::KvError {
                operation: "get",
                place: format!("leaf {} of shard {} layer {}", key.leaf.0, key.shard, key.layer),
                reason: format!("{reason}: rebuild the index from the log"),
            }));
        };
        self.cache.fill(at, leaf);
        self.cache.pin(at);
        let ledger = &mut self.ledger;
        self.cache.update(at, 0..SLOTS, |leaf| ledger.purge(key, leaf));
        for lookup in self.cache.take_waiters(at) {
            self.drive(lookup, effects);
        }
        self.apply_written(effects);
        self.cache.unpin(at);
    }

    /// After a drop of a shard or of layers, or a merge: leaves in memory are emptied at once, the others one after another,
    /// and so are leaves folded.
    pub(crate) fn start_purge(&mut self, id: ShardId) {
        self.cache.maps.forget_shard(id);
        for at in self.cache.select(|key| key.shard == id) {
            let ledger = &mut self.ledger;
            let key = self.cache.get(at).key;
            self.cache.update(at, 0..SLOTS, |leaf| ledger.purge(key, leaf));
        }
        let Some(shard) = self.ledger.shards.get(&id) else {
            return;
        };
        let first = shard.void_layers().map(|layer| LeafKey {
            shard: id,
            layer,
            leaf: types::LeafNo(0),
        });
        self.purging.extend(first);
    }

    fn purge_some(&mut self, effects: &mut Vec<Effect<B>>) {
        const LEAVES_PER_TURN: usize = 32;
        for _ in 0..LEAVES_PER_TURN {
            let Some(key) = self.purging.front().copied() else {
                return;
            };
            let leaves = self
                .ledger
                .shards
                .get(&key.shard)
                .and_then(|shard| shard.layers.get(&key.layer));
            let Some(leaf) = leaves.and_then(|leaves| leaves.next(key.leaf)) else {
                self.purging.pop_front();
                self.finish_purge(key.shard);
                continue;
            };
            let layer = self.ledger.home(key.shard, key.layer);
            match self.locate(LeafKey { leaf, layer, ..key }, 0, effects) {
                // Whatever is in memory was purged when it came or when the drop was applied, and is folded now.
                LeafPlace::Ready(_) | LeafPlace::Nowhere => {}
                LeafPlace::Loading(_) | LeafPlace::NoMemory => return,
            }
            self.purging.front_mut().expect("still there").leaf = types::LeafNo(leaf.0 + 1);
        }
    }

    fn finish_purge(&mut self, id: ShardId) {
        if self.purging.iter().any(|key| key.shard == id) {
            return;
        }
        if let Some(shard) = self.ledger.shards.get_mut(&id) {
            shard.is_purging = false;
            self.ledger.dirty_shards.insert(id);
            self.checkpoint.is_due = true;
        }
    }

    pub(crate) fn fail(&mut self, error: StoreError) {
        self.failed.get_or_insert(error);
    }

    /// Answers everything that waits. Nothing is tried again: the disk is reopened and checked first.
    fn fail_everything(&mut self, effects: &mut Vec<Effect<B>>) {
        let error = self.failed.clone().expect("called on failure");
        if std::mem::replace(&mut self.is_failure_told, true) {
            return;
        }
        let mut waiting: Vec<RequestId> = Vec::new();
        for flight in self.flights.drain(..) {
            waiting.extend(flight.waiters.iter().map(|waiter| waiter.id));
        }
        waiting.extend(self.queue.drain(..).filter_map(|op| op.id));
        waiting.extend(self.syncs.waiting());
        waiting.extend(self.lookups.take_all().into_iter().map(|lookup| lookup.id));
        for id in waiting {
            effects.push(Effect::Reply(id, Err(error.clone())));
        }
        effects.push(Effect::Failed(error));
    }

    fn refuse(&mut self, event: &Event<B>, effects: &mut Vec<Effect<B>>) {
        if let Event::Request(id, _) = event {
            let error = self.failed.clone().expect("called after failure");
            effects.push(Effect::Reply(*id, Err(error)));
        }
    }
}

fn data_of<B>(result: Result<DiskOutcome<B>, DiskError>) -> Option<B> {
    match result {
        Ok(DiskOutcome::Read(data)) => Some(data),
        Ok(_) => panic!("a read ended as something else"),
        Err(_) => None,
    }
}

pub(crate) fn done<B>(id: RequestId) -> Effect<B> {
    Effect::Reply(id, Ok(Reply::Done))
}
