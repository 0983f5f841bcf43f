//! Recovery: from a disk and perhaps an index to the state the store goes on from.
//!
//! Two passes over the part of the log that is newer than the index. The survey reads every header and learns
//! how far the log is known to be durable, which segments are void and which starts fenced off what. The replay
//! adopts batches in order: up to the durable point whatever is there (a missing batch is damage and is
//! reported), behind it only an unbroken run of whole batches. Then a fresh segment is opened whose first batch
//! says where the adopted log ends: a write of the dead process that lands late can never join it.
//!
//! The index is believed only if it is this disk's, intact and not older than the log says; otherwise it is
//! built anew from the whole log by the very same replay.

mod room;

use std::collections::BTreeMap;

use edge::{BlockFile, DiskError, KvError, KvStore};
use types::{BLOCK_BYTES, LayerId, ShardId};

use crate::LeafKey;
use crate::batch::{Entry, Header, Kind, SegmentKey, birth};
use crate::format::wipe_index;
use crate::leaf::{Leaf, Piece, encode_key, pieces};
use crate::ledger::{Ledger, Shard};
use crate::meta::{LIFE_BITS, META_KEY, Meta, OPENS_MAX, checkpoint_batch};
use crate::scan::{Found, SegmentFound, SegmentScan, find_segment, is_whole};
use crate::segment::{Geometry, ROW_SEGMENTS, SegmentHeader, Stage, secret};
use crate::superblock::{FORMAT_VERSION, Superblock, SuperblockError, read_superblock};

/// Leaves kept in memory while replaying; more are written to the index in between. About 120 MiB.
const LEAVES_MAX: usize = 16 << 10;

/// Free segments below which recovery looks for some that cleaning would find empty.
const FREE_WANTED: usize = 4;

const DECODE: &str = "decode";

/// Why a disk cannot be opened.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecoverError {
    /// There is no usable superblock.
    #[error(transparent)]
    Superblock(#[from] SuperblockError),
    /// The disk failed.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The index failed.
    #[error(transparent)]
    Index(#[from] KvError),
    /// Not one segment is free to go on writing in.
    #[error("none of the {segments} segments is free")]
    NoFreeSegment {
        /// How many there are.
        segments: u32,
    },
}

/// Why the index was built anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RebuildReason {
    /// Somebody asked for it.
    Asked,
    /// There is none (as after format: then there is also nothing to replay).
    Missing,
    /// It does not decode.
    Damaged,
    /// It belongs to another disk.
    Foreign,
    /// The log says that a later checkpoint was durable.
    RolledBack,
    /// The disk is an older copy of itself: its log ends before the checkpoint, or it was opened more often than it
    /// knows of.
    Ahead,
}

/// A part of the log that was durable once and is not there now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Damage {
    /// Batches that should be there: numbers from first to last.
    Batches {
        /// First missing.
        first: u64,
        /// Last missing.
        last: u64,
    },
    /// A segment whose header is unreadable: nothing in it can be told.
    Segment {
        /// Its number on the disk.
        segment: u32,
    },
}

/// What recovery did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RecoveryReport {
    /// How often the disk was opened, this time included.
    pub open_count: u64,
    /// Set if the index was built anew.
    pub rebuilt: Option<RebuildReason>,
    /// Segments read.
    pub segments_read: u32,
    /// Batches applied to the index.
    pub batches_replayed: u64,
    /// Batches behind the end of the unbroken log that were dropped whole.
    pub batches_dropped: u64,
    /// What is missing. Shards on this disk may lack writes they completed: see
    /// [`crate::ShardSummary::is_doubtful`].
    pub damage: Vec<Damage>,
}

impl RecoveryReport {
    /// Whether shards may lack what they completed, for all that this recovery saw.
    #[must_use]
    pub fn is_doubted(&self) -> bool {
        self.rebuilt == Some(RebuildReason::Ahead) || !self.damage.is_empty()
    }
}

/// What [`crate::Store::open`] goes on from.
#[derive(Clone, Debug)]
pub struct Recovered {
    pub(crate) superblock: Superblock,
    pub(crate) ledger: Ledger,
    pub(crate) entropy: u64,
    /// Of the last batch in the log.
    pub(crate) number: u64,
    pub(crate) generation: u64,
    pub(crate) checkpoint_id: u64,
    pub(crate) open: OpenSegment,
}

impl Recovered {
    /// What the disk says of itself.
    #[must_use]
    pub fn superblock(&self) -> &Superblock {
        &self.superblock
    }

    /// The shards found on the disk.
    #[must_use]
    pub fn shards(&self) -> Vec<crate::ShardSummary> {
        self.ledger.summaries()
    }
}

/// The segment that is being filled.
#[derive(Clone, Copy, Debug)]
pub(crate) struct OpenSegment {
    pub(crate) index: u32,
    pub(crate) key: SegmentKey,
    /// First unused block, from the segment's start.
    pub(crate) next: u32,
}

/// Brings a disk and its index into a state to go on from. `entropy` is any random number.
///
/// # Errors
/// See [`RecoverError`]. Nothing is repaired by guessing: damage in the log is reported, not an error.
pub fn recover(
    disk: &mut dyn BlockFile,
    kv: &mut dyn KvStore,
    entropy: u64,
) -> Result<(Recovered, RecoveryReport), RecoverError> {
    open(disk, kv, entropy, None, 0)
}

/// As [`recover`], for a caller who remembers [`RecoveryReport::open_count`] of the last time: a disk that knows of
/// fewer is an older copy of itself, even where its index is gone and cannot tell.
///
/// # Errors
/// See [`RecoverError`].
pub fn recover_known(
    disk: &mut dyn BlockFile,
    kv: &mut dyn KvStore,
    entropy: u64,
    open_count: u64,
) -> Result<(Recovered, RecoveryReport), RecoverError> {
    open(disk, kv, entropy, None, open_count)
}

/// As [`recover`], but trusts the log alone: the index is emptied and built anew.
///
/// # Errors
/// See [`RecoverError`].
pub fn rebuild_index(
    disk: &mut dyn BlockFile,
    kv: &mut dyn KvStore,
    entropy: u64,
) -> Result<(Recovered, RecoveryReport), RecoverError> {
    open(disk, kv, entropy, Some(RebuildReason::Asked), 0)
}

fn open(
    disk: &mut dyn BlockFile,
    kv: &mut dyn KvStore,
    entropy: u64,
    asked: Option<RebuildReason>,
    known_opens: u64,
) -> Result<(Recovered, RecoveryReport), RecoverError> {
    let mut superblock = read_superblock(disk)?;
    superblock.version = FORMAT_VERSION;
    superblock.generation += 1;
    superblock.open_count += 1;
    // What may be an older copy is not counted as opened before its doubt is written as well: opened and killed often
    // enough it would seem to be as old as it should be.
    let may_be_older = superblock.open_count - 1 < known_opens;
    if !may_be_older {
        superblock.write(disk)?;
    }
    // What is read below may still sit in the device's cache; the checkpoint must not get ahead of the log.
    disk.sync()?;
    let mut report = RecoveryReport {
        open_count: superblock.open_count,
        ..RecoveryReport::default()
    };
    let loaded = match asked {
        Some(reason) => Err(reason),
        None => load_index(kv, &superblock)?,
    };
    let mut plan = match loaded {
        Ok((meta, ledger)) => {
            let plan = survey(disk, &superblock, Some(meta.scan_from), ledger, meta, &mut report);
            let is_older = plan.is_older_than(known_opens, &superblock);
            // An index that is older still says nothing of the disk.
            let ahead = is_older.then_some(RebuildReason::Ahead);
            match ahead.or_else(|| plan.distrust(&superblock)) {
                Some(reason) => {
                    let missing = (plan.highest_number < plan.meta.position).then_some(Damage::Batches {
                        first: plan.highest_number + 1,
                        last: plan.meta.position,
                    });
                    let rebuilt = rebuild_plan(disk, kv, &superblock, reason, &mut report)?;
                    if reason == RebuildReason::Ahead {
                        // An older copy, or a log whose last header rotted: what the index knew of is not there.
                        report.damage.extend(missing);
                    }
                    rebuilt
                }
                None => plan,
            }
        }
        Err(reason) => {
            let plan = rebuild_plan(disk, kv, &superblock, reason, &mut report)?;
            if plan.is_older_than(known_opens, &superblock) {
                report.rebuilt = Some(RebuildReason::Ahead);
            }
            plan
        }
    };
    if may_be_older {
        if report.is_doubted() {
            superblock.doubt = superblock.doubt.max(plan.next_number());
        }
        superblock.write(disk)?;
        disk.sync()?;
    }
    if let Err(error) = Replay::run(disk, kv, &mut superblock, &mut plan, &mut report) {
        // A leaf that does not decode: the log has what it should hold.
        if !matches!(&error, RecoverError::Index(kv_error) if kv_error.operation == DECODE) || plan.is_rebuild
        {
            return Err(error);
        }
        report.batches_replayed = 0;
        report.batches_dropped = 0;
        plan = rebuild_plan(disk, kv, &superblock, RebuildReason::Damaged, &mut report)?;
        Replay::run(disk, kv, &mut superblock, &mut plan, &mut report)?;
    }
    plan.ledger.doubt = superblock.doubt;
    if superblock.doubt > 0 && !plan.ledger.summaries().iter().any(|shard| shard.is_doubtful) {
        superblock.doubt = 0;
        superblock.generation += 1;
        superblock.write(disk)?;
    }
    let (mut open, number) = open_fresh_segment(disk, &mut superblock, &mut plan, entropy)?;
    let mut replay = Replay {
        last: number,
        last_generation: open.key.generation,
        next_number: number,
        disk,
        kv,
        superblock: &mut superblock,
        plan: &mut plan,
        report: &mut RecoveryReport::default(),
        leaves: BTreeMap::new(),
        folds: true,
        moved: BTreeMap::new(),
    };
    replay.make_room(&mut open)?;
    let number = replay.last;
    plan.ledger.segments.set_stage(open.index, Stage::Open);
    let recovered = Recovered {
        superblock,
        ledger: plan.ledger,
        entropy,
        number,
        generation: open.key.generation,
        checkpoint_id: plan.meta.id,
        open,
    };
    Ok((recovered, report))
}

fn rebuild_plan(
    disk: &mut dyn BlockFile,
    kv: &mut dyn KvStore,
    superblock: &Superblock,
    reason: RebuildReason,
    report: &mut RecoveryReport,
) -> Result<Plan, RecoverError> {
    report.rebuilt = Some(reason);
    wipe_index(kv)?;
    let meta = Meta {
        disk: superblock.disk,
        id: 0,
        position: 0,
        scan_from: 0,
        opens: Vec::new(),
        is_rebuilding: true,
    };
    let ledger = Ledger::new(Geometry::of(superblock));
    report.damage.clear();
    Ok(survey(disk, superblock, None, ledger, meta, report))
}

/// The checkpoint, or why it cannot be used.
fn load_index(
    kv: &dyn KvStore,
    superblock: &Superblock,
) -> Result<Result<(Meta, Ledger), RebuildReason>, KvError> {
    let Some(value) = kv.get(META_KEY)? else {
        return Ok(Err(RebuildReason::Missing));
    };
    let Some(meta) = Meta::decode(&value) else {
        return Ok(Err(RebuildReason::Damaged));
    };
    if meta.disk != superblock.disk {
        return Ok(Err(RebuildReason::Foreign));
    }
    if meta.is_rebuilding {
        return Ok(Err(RebuildReason::Missing));
    }
    let mut ledger = Ledger::new(Geometry::of(superblock));
    ledger.opens.clone_from(&meta.opens);
    let mut is_intact = true;
    scan_prefix(kv, b's', &mut |key, value| {
        let row = key.try_into().map(u32::from_be_bytes).ok();
        let is_row = row.is_some_and(|row| {
            row <= superblock.segments / ROW_SEGMENTS && ledger.segments.restore_row(row, value).is_some()
        });
        is_intact &= is_row;
    })?;
    scan_prefix(kv, b'h', &mut |key, value| {
        let id = key.try_into().map(u64::from_be_bytes).map(ShardId::from_u64).ok();
        match id.zip(Shard::decode(value)) {
            Some((id, shard)) => {
                ledger.has_fates |= !shard.fates.is_empty();
                ledger.shards.insert(id, shard);
            }
            None => is_intact = false,
        }
    })?;
    Ok(if is_intact {
        Ok((meta, ledger))
    } else {
        Err(RebuildReason::Damaged)
    })
}

fn scan_prefix(kv: &dyn KvStore, prefix: u8, each: &mut dyn FnMut(&[u8], &[u8])) -> Result<(), KvError> {
    const CHUNK: usize = 256;
    let mut from = vec![prefix];
    let to = [prefix + 1];
    loop {
        let found = kv.scan(&from, &to, CHUNK)?;
        for (key, value) in &found {
            each(&key[1..], value);
        }
        match found.last() {
            Some((last, _)) if found.len() == CHUNK => {
                from.clone_from(last);
                from.push(0);
            }
            _ => return Ok(()),
        }
    }
}

/// What the survey learned.
struct Plan {
    ledger: Ledger,
    meta: Meta,
    is_rebuild: bool,
    /// Segments to replay by generation.
    segments: BTreeMap<u64, (u32, SegmentKey)>,
    /// Batches up to here were known to be durable.
    durable: u64,
    highest_number: u64,
    highest_generation: u64,
    /// The last one that an entry of the log or the header of a segment says was durable.
    logged_checkpoint: u64,
    floor: u64,
}

impl Plan {
    /// Why the index must not be used, if so.
    fn distrust(&self, superblock: &Superblock) -> Option<RebuildReason> {
        if self.logged_checkpoint.max(superblock.checkpoint) > self.meta.id {
            Some(RebuildReason::RolledBack)
        } else if (self.highest_number < self.meta.position && self.logged_checkpoint < self.meta.id)
            || (self.meta.life() >= superblock.open_count && self.logged_life() < self.meta.life())
        {
            // A log that knows of this very checkpoint is not older, whatever became of the batches before: a recovery
            // that died may have taken their segment, which was empty.
            Some(RebuildReason::Ahead)
        } else {
            None
        }
    }

    /// The youngest segment holds fences and moves only, none of which the index knows of: so everything moved is
    /// where it was, and this says nothing new. Where no other segment is free it may be taken again. (A rebuild
    /// does not know what the lost index knew.)
    fn forget_moves(&mut self) -> bool {
        let table = &self.ledger.segments;
        let taken = self
            .segments
            .values()
            .filter(|(index, _)| table.get(*index).stage == Stage::Free);
        let is_one_left = table.free_count() as usize > taken.count();
        !is_one_left && !self.is_rebuild && self.segments.pop_last().is_some()
    }

    /// Above any that was seen.
    fn next_number(&self) -> u64 {
        self.highest_number.max(self.meta.position) + 1
    }

    /// The latest opening of the disk that the log knows of: more than the superblocks say if somebody put back old
    /// ones.
    fn logged_life(&self) -> u64 {
        self.logged_checkpoint >> LIFE_BITS
    }

    /// Whether the disk was opened later than it knows of.
    fn is_older_than(&self, known_opens: u64, superblock: &Superblock) -> bool {
        self.logged_life().max(superblock.open_count - 1) < known_opens
    }

    /// In segments of this generation, batches count up to this number.
    fn fence(&self, generation: u64) -> u64 {
        let opens = &self.ledger.opens;
        let later = opens.partition_point(|open| open.0 <= generation);
        opens[later..].iter().map(|open| open.1).min().unwrap_or(u64::MAX)
    }
}

fn survey(
    disk: &dyn BlockFile,
    superblock: &Superblock,
    scan_from: Option<u64>,
    ledger: Ledger,
    meta: Meta,
    report: &mut RecoveryReport,
) -> Plan {
    let mut plan = Plan {
        ledger,
        meta,
        is_rebuild: scan_from.is_none(),
        segments: BTreeMap::new(),
        durable: 0,
        highest_number: 0,
        highest_generation: 0,
        logged_checkpoint: 0,
        floor: 0,
    };
    plan.durable = plan.meta.position;
    find_segments(disk, superblock, scan_from.unwrap_or(0), &mut plan, report);
    let geometry = plan.ledger.segments.geometry;
    // What each segment says is durable, and whether it says anything of its own.
    let mut said = Vec::new();
    for (generation, (index, key)) in plan.segments.clone() {
        let (mut durable, mut is_moves_only) = (0, true);
        let mut scan = SegmentScan::new(geometry, index, key);
        report.segments_read += 1;
        while let Some(Found { header, .. }) = scan.next_batch(disk) {
            plan.highest_number = plan.highest_number.max(header.number);
            durable = durable.max(header.durable_upto);
            for entry in &header.entries {
                plan.learn(entry);
            }
            let is_move =
                |entry: &Entry| matches!(entry.kind, Kind::Open | Kind::Checkpoint) || entry.is_relocated();
            is_moves_only &= header.number > plan.meta.position && header.entries.iter().all(is_move);
        }
        said.push((generation, durable, is_moves_only));
    }
    if said.last().is_some_and(|(_, _, is_moves_only)| *is_moves_only) && plan.forget_moves() {
        said.pop();
    }
    for (generation, durable, _) in said {
        // Batches that a later start fenced off may call each other durable.
        plan.durable = plan.durable.max(durable.min(plan.fence(generation)));
    }
    let floor = plan.floor;
    plan.segments.retain(|generation, _| *generation >= floor);
    plan
}

impl Plan {
    fn learn(&mut self, entry: &Entry) {
        match entry.kind {
            Kind::Open => {
                self.durable = self.durable.max(entry.seq);
                self.ledger.apply_entry(entry, &[], 0);
            }
            Kind::Checkpoint => {
                self.logged_checkpoint = self.logged_checkpoint.max(entry.seq);
                self.floor = self.floor.max(entry.shard);
            }
            _ => {}
        }
    }
}

fn find_segments(
    disk: &dyn BlockFile,
    superblock: &Superblock,
    scan_from: u64,
    plan: &mut Plan,
    report: &mut RecoveryReport,
) {
    for index in 0..superblock.segments {
        let known = *plan.ledger.segments.get(index);
        plan.highest_generation = plan.highest_generation.max(known.generation);
        let is_old = known.stage != Stage::Free && known.generation < scan_from;
        if is_old {
            continue;
        }
        match find_segment(disk, superblock, index) {
            SegmentFound::Whole(header) => {
                plan.highest_generation = plan.highest_generation.max(header.key.generation);
                if header.key.generation >= scan_from {
                    // A segment is taken only after a checkpoint that frees it was logged in one the index knows to
                    // be newer; the entry is there, or that segment was taken as well and its header says so.
                    plan.logged_checkpoint = plan.logged_checkpoint.max(header.checkpoint);
                    plan.segments.insert(header.key.generation, (index, header.key));
                }
            }
            SegmentFound::Rescued(key)
                if known.stage == Stage::Free || known.generation == key.generation =>
            {
                plan.highest_generation = plan.highest_generation.max(key.generation);
                if key.generation >= scan_from {
                    plan.segments.entry(key.generation).or_insert((index, key));
                }
            }
            SegmentFound::Rescued(_) | SegmentFound::None if known.stage != Stage::Free => {
                report.damage.push(Damage::Segment { segment: index });
            }
            SegmentFound::Rescued(_) | SegmentFound::None => {}
        }
    }
}

/// Where an entry without data was moved to: the generation of the segment, and which blocks of it.
struct Moved {
    generation: u64,
    block: u32,
    count: u32,
}

struct Replay<'a> {
    disk: &'a mut dyn BlockFile,
    kv: &'a mut dyn KvStore,
    superblock: &'a mut Superblock,
    plan: &'a mut Plan,
    report: &'a mut RecoveryReport,
    leaves: BTreeMap<LeafKey, (Box<Leaf>, bool)>,
    /// Leaves of layers that were merged are folded into their home's before they are looked at.
    folds: bool,
    moved: BTreeMap<u64, Vec<Moved>>,
    /// Number of the last batch applied, and the generation of its segment.
    last: u64,
    last_generation: u64,
    /// Of the first batch after recovery.
    next_number: u64,
}

impl<'a> Replay<'a> {
    fn run(
        disk: &'a mut dyn BlockFile,
        kv: &'a mut dyn KvStore,
        superblock: &'a mut Superblock,
        plan: &'a mut Plan,
        report: &'a mut RecoveryReport,
    ) -> Result<(), RecoverError> {
        let folds = !plan.is_rebuild;
        let mut replay = Replay {
            last: plan.meta.position,
            last_generation: plan.meta.scan_from,
            next_number: plan.next_number(),
            disk,
            kv,
            superblock,
            plan,
            report,
            leaves: BTreeMap::new(),
            folds,
            moved: BTreeMap::new(),
        };
        // Above any that this disk ever had, also those that a lost index knew alone: an id names one state.
        let first_of_life = replay.superblock.open_count << LIFE_BITS;
        let meta = &mut replay.plan.meta;
        meta.id = meta.id.max(replay.plan.logged_checkpoint).max(first_of_life);
        replay.all()?;
        replay.fold_all()?;
        let (last, durable) = (replay.last, replay.plan.durable);
        if last < durable {
            replay.report.damage.push(Damage::Batches {
                first: last + 1,
                last: durable,
            });
        }
        replay.plan.ledger.segments.close_adopted();
        replay.find_overtaken()?;
        replay.plan.meta.is_rebuilding = false;
        replay.save()
    }

    fn all(&mut self) -> Result<(), RecoverError> {
        let geometry = Geometry::of(self.superblock);
        let segments: Vec<_> = self
            .plan
            .segments
            .iter()
            .map(|(generation, at)| (*generation, *at))
            .collect();
        let mut is_over = false;
        for (generation, (index, key)) in segments {
            let fence = self.plan.fence(generation);
            let mut scan = SegmentScan::new(geometry, index, key);
            while let Some(found) = scan.next_batch(self.disk) {
                let number = found.header.number;
                if number <= self.last || number > fence {
                    continue;
                }
                let is_first = found.address == geometry.start(index) + 1;
                is_over = is_over || !self.is_next(&found.header, is_first) || !self.is_sound(&found);
                if is_over {
                    self.report.batches_dropped += 1;
                } else {
                    self.apply(&found, index)?;
                    self.last_generation = generation;
                }
            }
        }
        Ok(())
    }

    /// Whether the log goes on with this batch. Batches missing before it are reported if they were durable,
    /// and end the log if they were not. `is_first`: it is the first of its segment.
    fn is_next(&mut self, header: &Header, is_first: bool) -> bool {
        let first_missing = self.last + 1;
        // A life begins with the first batch of a segment and skips the numbers it did not adopt. The checkpoints
        // of that segment repeat the fence; what is missing before those is missing.
        let says_start = |entry: &Entry| {
            entry.kind == Kind::Open && entry.shard == header.key.generation && entry.seq <= self.last
        };
        let is_start = is_first && header.entries.iter().any(says_start);
        if header.number == first_missing || is_start {
            return true;
        }
        if first_missing > self.plan.durable {
            // A later header may say that what is missing was complete, thus answered. That is no proof of damage:
            // power loss may take what no sync covered and leave what came after it, and looks the same from here.
            return false;
        }
        // Whole segments are missing from a rebuild because they were cleaned and used again.
        let is_first = self.last == 0;
        let is_reused =
            self.plan.is_rebuild && (is_first || header.key.generation > self.last_generation + 1);
        if !is_reused {
            self.report.damage.push(Damage::Batches {
                first: first_missing,
                last: header.number - 1,
            });
        }
        true
    }

    /// A batch not known to be durable counts only if all of its data is there.
    fn is_sound(&self, found: &Found) -> bool {
        found.header.number <= self.plan.durable || is_whole(self.disk, found)
    }

    fn apply(&mut self, found: &Found, index: u32) -> Result<(), RecoverError> {
        self.plan
            .ledger
            .segments
            .adopt(index, found.header.key.generation);
        for (entry, first_sum, inline) in found.header.walk() {
            if entry.kind.is_note() && entry.is_relocated() {
                let moved = Moved {
                    generation: found.header.key.generation,
                    block: entry.block,
                    // A record counts bytes.
                    count: if entry.kind.is_blocks() { entry.count } else { 1 },
                };
                self.moved.entry(entry.birth).or_default().push(moved);
            }
            if entry.kind.is_blocks() {
                self.apply_blocks(
                    entry,
                    found.address + 1 + first_sum as u64,
                    &found.header.sums[first_sum..],
                )?;
            }
            if self.plan.ledger.apply_entry(entry, inline, index) {
                self.purge_leaves(entry.shard_id());
            }
        }
        self.last = found.header.number;
        self.report.batches_replayed += 1;
        Ok(())
    }

    fn apply_blocks(&mut self, entry: &Entry, address: u64, sums: &[u32]) -> Result<(), RecoverError> {
        for piece in self.pieces_of(entry) {
            if self.leaves.len() >= LEAVES_MAX {
                self.save()?;
            }
            self.load(piece.key)?;
            let (leaf, is_dirty) = self.leaves.get_mut(&piece.key).expect("just loaded");
            let sums = if entry.kind == Kind::Data {
                &sums[piece.index as usize..]
            } else {
                &[]
            };
            let address = address + u64::from(piece.index);
            *is_dirty |= self.plan.ledger.apply_piece(entry, piece, address, sums, leaf);
        }
        Ok(())
    }

    /// After a rebuild every segment that was free holds again what was in it once; and entries without data, unlike
    /// blocks, are not known to be dead by counting. Where few segments are free, looks for some like that: every
    /// crash may take one, until a life lasts long enough to clean.
    fn find_overtaken(&mut self) -> Result<(), RecoverError> {
        let segments = &self.plan.ledger.segments;
        let mut candidates: Vec<(u64, u32)> = segments
            .iter()
            .filter(|(_, segment)| segment.stage == Stage::Closed && segment.live == 0)
            .map(|(index, segment)| (segment.generation, index))
            .collect();
        candidates.sort_unstable();
        for (generation, index) in candidates {
            let segments = &self.plan.ledger.segments;
            if segments.free_count() as usize + segments.emptied() >= FREE_WANTED {
                break;
            }
            let key = find_segment(self.disk, self.superblock, index).key();
            let Some(key) = key.filter(|key| key.generation == generation) else {
                continue;
            };
            let scan = SegmentScan::new(segments.geometry, index, key);
            if self.is_overtaken(scan, generation)? {
                self.plan.ledger.segments.forget_notes(index);
            }
        }
        Ok(())
    }

    /// Whether a segment without live data holds no other entry that is somebody's last word, or only such as were
    /// moved on: a rebuild finds them in both places.
    fn is_overtaken(&mut self, mut scan: SegmentScan, generation: u64) -> Result<bool, RecoverError> {
        while let Some(found) = scan.next_batch(self.disk) {
            for (entry, ..) in found.header.walk() {
                let shard = self.plan.ledger.shards.get(&entry.shard_id());
                let is_current = match (entry.kind, shard) {
                    (Kind::Open | Kind::Checkpoint | Kind::Data, _) | (_, None) => false,
                    (Kind::Record, Some(shard)) => entry.birth == shard.record_birth,
                    (Kind::SetEnd, Some(shard)) => entry.birth == shard.end_birth,
                    (Kind::Drop, Some(shard)) => entry.birth == shard.drop_birth,
                    (Kind::LayersGone | Kind::LayersOne, Some(shard)) => shard.fates.says(entry.birth),
                    (Kind::LayersRevision, Some(shard)) => entry.birth == shard.revision_birth,
                    (Kind::Zero | Kind::Trim | Kind::Lost | Kind::Void, Some(_)) => {
                        if self.is_in_a_leaf(entry, generation)? {
                            return Ok(false);
                        }
                        false
                    }
                };
                if is_current && !self.is_moved_on(entry.birth, generation, entry.block) {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    fn is_moved_on(&self, birth: u64, generation: u64, block: u32) -> bool {
        self.moved.get(&birth).is_some_and(|all| {
            all.iter().any(|moved| {
                let is_there = (moved.block..moved.block + moved.count).contains(&block);
                moved.generation > generation && is_there
            })
        })
    }

    fn is_in_a_leaf(&mut self, entry: &Entry, generation: u64) -> Result<bool, RecoverError> {
        for piece in self.pieces_of(entry) {
            if self.leaves.len() >= LEAVES_MAX {
                self.save()?;
            }
            self.load(piece.key)?;
            let (leaf, _) = self.leaves.get(&piece.key).expect("just loaded");
            for index in 0..piece.count {
                let block = entry.block + piece.index + index as u32;
                let slot = piece.slot + index;
                if (leaf.birth(slot) == entry.birth || leaf.has_void(slot, entry.birth))
                    && !self.is_moved_on(entry.birth, generation, block)
                {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }

    /// A rebuild has heard everything: leaves of layers that were merged become one, so that it is known which segments
    /// hold what counts.
    fn fold_all(&mut self) -> Result<(), RecoverError> {
        if self.folds {
            return Ok(());
        }
        self.folds = true;
        let shards: Vec<ShardId> = self.plan.ledger.shards.keys().copied().collect();
        for shard in shards {
            let known = self.plan.ledger.shards.get_mut(&shard).expect("listed");
            known.find_unfolded();
            while let Some((layer, leaf)) = self.plan.ledger.shards[&shard].next_unfolded() {
                if self.leaves.len() >= LEAVES_MAX {
                    self.save()?;
                }
                self.load(LeafKey { shard, layer, leaf })?;
            }
        }
        Ok(())
    }

    /// The leaves that an entry is about. A rebuild may hear of merges before or after what they are about, so it leaves
    /// each layer's leaf by itself until it has heard everything. There a void concerns every layer it reaches.
    fn pieces_of(&self, entry: &Entry) -> Vec<Piece> {
        let (shard, layer) = (entry.shard_id(), LayerId(entry.layer));
        let pieces_in = |layer| pieces(shard, layer, entry.block, entry.count);
        if self.folds {
            return pieces_in(self.plan.ledger.home(shard, layer)).collect();
        }
        let mut all: Vec<Piece> = pieces_in(layer).collect();
        if entry.kind == Kind::Void
            && let Some(known) = self.plan.ledger.shards.get(&shard)
        {
            let lowest = LayerId(entry.layer - entry.seq as u32);
            for (below, leaves) in known.layers.range(lowest..layer) {
                all.extend(pieces_in(*below).filter(|piece| leaves.contains(piece.key.leaf)));
            }
        }
        all
    }

    fn load(&mut self, key: LeafKey) -> Result<(), RecoverError> {
        self.load_stored(key)?;
        if !self.folds || !self.plan.ledger.is_unfolded(key) {
            return Ok(());
        }
        let (mut into, mut is_dirty) = self.leaves.remove(&key).expect("just loaded");
        for layer in self.plan.ledger.shards[&key.shard].to_fold(key.layer, key.leaf) {
            let from = LeafKey { layer, ..key };
            self.load_stored(from)?;
            let (other, _) = self.leaves.remove(&from).expect("just loaded");
            is_dirty |= self.plan.ledger.fold(key, &mut into, from, &other);
        }
        self.plan.ledger.folded(key);
        self.leaves.insert(key, (into, is_dirty));
        Ok(())
    }

    fn load_stored(&mut self, key: LeafKey) -> Result<(), RecoverError> {
        if self.leaves.contains_key(&key) {
            return Ok(());
        }
        let is_stored = self
            .plan
            .ledger
            .shards
            .get(&key.shard)
            .is_some_and(|s| s.has_leaf(key.layer, key.leaf));
        let mut leaf = match is_stored {
            true => load_leaf(self.kv, key)?,
            false => Leaf::empty(),
        };
        let is_dirty = self.plan.ledger.purge(key, &mut leaf);
        self.leaves.insert(key, (leaf, is_dirty));
        Ok(())
    }

    fn purge_leaves(&mut self, shard: ShardId) {
        for (key, (leaf, is_dirty)) in &mut self.leaves {
            if key.shard == shard {
                *is_dirty |= self.plan.ledger.purge(*key, leaf);
            }
        }
    }

    /// Writes what was replayed as a checkpoint of its own: a crash from here on resumes behind it.
    fn save(&mut self) -> Result<(), RecoverError> {
        self.note_doubt()?;
        let meta = &mut self.plan.meta;
        meta.id += 1;
        meta.position = self.last;
        meta.scan_from = self.last_generation;
        meta.opens.clone_from(&self.plan.ledger.opens);
        let replayed = std::mem::take(&mut self.leaves);
        let dirty = replayed.iter().filter(|(_, (_, is_dirty))| *is_dirty);
        let leaves = dirty.map(|(key, (leaf, _))| (*key, leaf.as_ref()));
        let batch = checkpoint_batch(&mut self.plan.ledger, &self.plan.meta, leaves);
        self.kv.apply(&batch)?;
        Ok(())
    }

    /// The checkpoint about to be saved passes the damage, which the next recovery will not find again.
    fn note_doubt(&mut self) -> Result<(), RecoverError> {
        if self.report.is_doubted() && self.superblock.doubt < self.next_number {
            self.superblock.doubt = self.next_number;
            self.superblock.generation += 1;
            self.superblock.write(self.disk)?;
        }
        Ok(())
    }
}

fn load_leaf(kv: &dyn KvStore, key: LeafKey) -> Result<Box<Leaf>, KvError> {
    let damaged = || KvError {
        operation: DECODE,
        place: format!("leaf {} of shard {} layer {}", key.leaf.0, key.shard, key.layer),
        reason: "missing or damaged; rebuild the index from the log".into(),
    };
    let value = kv.get(&encode_key(key))?.ok_or_else(damaged)?;
    Leaf::decode(key, &value).ok_or_else(damaged)
}

/// Opens the segment the store goes on in, and fences off everything not adopted. Returns it with the number of its
/// first batch.
fn open_fresh_segment(
    disk: &mut dyn BlockFile,
    superblock: &mut Superblock,
    plan: &mut Plan,
    entropy: u64,
) -> Result<(OpenSegment, u64), RecoverError> {
    let number = plan.next_number();
    let generation = plan.highest_generation.max(plan.meta.scan_from) + 1;
    let Plan { ledger, meta, .. } = plan;
    let adopted = meta.position;
    let key = SegmentKey {
        secret: secret(superblock.secret_base, entropy, generation),
        generation,
    };
    let segments = superblock.segments;
    if ledger.segments.free_count() == 0 {
        // After a rebuild segments that were free still hold what was in them once. The index says by now that
        // it counts no more; the log cannot say so before a segment is open, so the superblock does.
        superblock.checkpoint = meta.id;
        superblock.generation += 1;
        superblock.write(disk)?;
        ledger.segments.release_oldest_emptied();
    }
    let index = ledger
        .segments
        .take_last_free(generation)
        .ok_or(RecoverError::NoFreeSegment { segments })?;
    let header = SegmentHeader {
        disk: superblock.disk,
        index,
        key,
        checkpoint: meta.id,
    };
    let offset = ledger.segments.geometry.start(index) * BLOCK_BYTES;
    disk.write_at(offset, &header.encode().0)?;
    disk.sync()?;
    let floor = ledger.segments.floor();
    ledger.forget_opens(floor);
    ledger.opens.push((generation, adopted));
    let surplus = ledger.opens.len().saturating_sub(OPENS_MAX);
    ledger.opens.drain(..surplus);
    let batch = Header {
        key,
        number,
        complete_upto: number - 1,
        durable_upto: adopted,
        entries: fence_entries(ledger, number, meta.id, floor),
        sums: Vec::new(),
        inline: Vec::new(),
    };
    disk.write_at(offset + BLOCK_BYTES, &batch.encode().0)?;
    disk.sync()?;
    // What the replay emptied stays so until the first checkpoint, although index and log say it is free: the dead
    // process was writing there a moment ago, and a device may still perform what it had under way.
    Ok((OpenSegment { index, key, next: 2 }, number))
}

/// What a batch says when a checkpoint is durable: its id, the oldest generation in use, and every fence.
pub(crate) fn fence_entries(ledger: &Ledger, number: u64, checkpoint: u64, floor: u64) -> Vec<Entry> {
    let entry = |kind, generation, seq, position| Entry {
        kind,
        flags: 0,
        shard: generation,
        layer: 0,
        block: 0,
        count: 0,
        seq,
        birth: birth(number, position),
    };
    let mut entries = vec![entry(Kind::Checkpoint, floor, checkpoint, 0)];
    for (generation, adopted) in &ledger.opens {
        entries.push(entry(Kind::Open, *generation, *adopted, entries.len()));
    }
    entries
}
