//! Bringing one replica up to date, beside the running stream.
//!
//! ```text
//!  Begin ──Done──▶ joins the stream ──▶ ListSource ──▶ ListTarget ──▶ Leaves ──▶ Flushing ──▶ Ending ──▶ Current
//!  good only up to `since`,            what changed since, on either     │         what moved   SetEnd: good
//!  durably                                                               │         is durable   again, durably
//!                             per leaf: versions of both, then what differs: read ▶ repair
//! ```
//!
//! A leaf is one layer's: layers that the shard holds nothing of, as most of many snapshots of an idle one, are not in the
//! lists. Where the source has nothing of a block in a layer and the target has, the target's is made void: zeros
//! would hide what the layers below hold.
//!
//! Nothing from `live_from` on is touched: the stream brings it. The source holds everything before `live_from`
//! when the listing starts, and both lists are taken after the join, so a block is either compared or streamed.
//! A source block that no replica can read is not skipped, which would pass the target's old content off as good:
//! the target gets a block whose checksum does not match, and stays as unreadable as its source.

use std::collections::VecDeque;

use smallvec::SmallVec;
use types::{BLOCK_BYTES, BlockCrcs, BlockNo, DiskId, LEAF_BLOCKS, LayerId, LeafNo, Payload, Seq};

use store::{BlockVersion, ClearKind, ReadPart, ReadParts, StoreError};

use super::answer::Awaited;
use super::repair::{Holds, block_at, is_same};
use super::{Effects, MemberState, Purpose, Writer, WriterEffect, WriterNotice, WriterPhase};
use crate::message::{Refusal, RepairContent, ReplicaReply, ReplicaRequest};

/// Leaves compared at once while no guest writes; one while guests do.
const LEAVES_AT_ONCE: usize = 4;

/// A leaf of one of the shard's layers.
pub(super) type Place = (LayerId, LeafNo);

/// Where a listing begins: a shard may hold something in any layer up to the head.
pub(super) const FIRST: Place = (LayerId(0), LeafNo(0));

/// One replica being brought up to date.
#[derive(Clone, Debug, Hash)]
pub(super) struct Sync {
    no: u64,
    since: Seq,
    /// Stream writes up to here it has, if it is of this stream.
    end: Seq,
    source: DiskId,
    live_from: Seq,
    stage: Stage,
    leaves: VecDeque<Place>,
    jobs: Vec<LeafJob>,
    moved_blocks: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Stage {
    Begin,
    ListSource,
    ListTarget,
    Leaves,
    Flushing,
    Ending(Seq),
}

/// One leaf being compared.
#[derive(Clone, Debug, Hash)]
struct LeafJob {
    place: Place,
    source_versions: Option<Vec<BlockVersion>>,
    target_versions: Option<Vec<BlockVersion>>,
    runs: VecDeque<Run>,
    tried: SmallVec<[DiskId; 3]>,
}

/// Adjacent blocks that differ, written at the source by one write.
#[derive(Clone, Copy, Debug, Hash)]
struct Run {
    block: BlockNo,
    count: u32,
    seq: Seq,
    holds: Holds,
}

/// Which answer is awaited.
#[derive(Clone, Copy, Debug, Hash)]
pub(super) enum SyncPart {
    Begin,
    /// From this leaf on.
    ListSource(Place),
    ListTarget(Place),
    SourceVersions(Place),
    TargetVersions(Place),
    Content(Place),
    Moved(Place),
    Flushed,
    Ended,
}

impl Sync {
    pub(super) fn awaited(&self, no: u64, part: SyncPart) -> Option<Awaited> {
        if no != self.no {
            return None;
        }
        let awaited = match part {
            SyncPart::Begin | SyncPart::Moved(_) | SyncPart::Flushed | SyncPart::Ended => Awaited::Done,
            SyncPart::ListSource(from) | SyncPart::ListTarget(from) => Awaited::Leaves(from),
            SyncPart::SourceVersions(_) | SyncPart::TargetVersions(_) => Awaited::Versions,
            SyncPart::Content(place) => {
                let job = self.jobs.iter().find(|job| job.place == place)?;
                let run = job.runs.front()?;
                Awaited::Blocks(run.block, run.count)
            }
        };
        Some(awaited)
    }

    pub(super) fn leaves_left(&self) -> u64 {
        (self.leaves.len() + self.jobs.len()) as u64
    }

    /// Whether the target has marked, durably, how far it is good.
    pub(super) fn has_begun(&self) -> bool {
        self.stage != Stage::Begin
    }

    /// Whether `disk` is the source and is still needed.
    pub(super) fn copies_from(&self, disk: DiskId) -> bool {
        self.source == disk && matches!(self.stage, Stage::ListSource | Stage::ListTarget | Stage::Leaves)
    }

    fn new(no: u64, since: Seq, end: Seq, source: DiskId, stage: Stage) -> Sync {
        Sync {
            no,
            since,
            end,
            source,
            live_from: Seq(0),
            stage,
            leaves: VecDeque::new(),
            jobs: Vec::new(),
            moved_blocks: 0,
        }
    }
}

impl<B: Payload> Writer<B> {
    fn sync_mut(&mut self, target: DiskId) -> Option<&mut Sync> {
        match &mut self.member_mut(target)?.state {
            MemberState::Syncing(sync) => Some(sync),
            _ => None,
        }
    }

    pub(super) fn sync_is(&mut self, target: DiskId, no: u64) -> bool {
        self.sync_mut(target).is_some_and(|sync| sync.no == no)
    }

    /// Begins, if there is a replica to copy from; the target stays as it is if not.
    pub(super) fn start_sync(
        &mut self,
        target: DiskId,
        good: Seq,
        since: Seq,
        end: Seq,
        effects: &mut Effects<B>,
    ) {
        let Some(source) = self.readable(BlockNo(0)).first().copied() else {
            return;
        };
        let no = self.new_no();
        let member = self.member_mut(target).expect("a target is a member");
        member.acked = Seq(0);
        member.state = MemberState::Syncing(Box::new(Sync::new(no, since, end, source, Stage::Begin)));
        self.send_sync(
            target,
            target,
            SyncPart::Begin,
            ReplicaRequest::BeginResync { since: good },
            effects,
        );
    }

    /// What was chosen holds the truth but does not know it: its own unfinished resync is over.
    pub(super) fn settle_source(&mut self, disk: DiskId, effects: &mut Effects<B>) {
        let no = self.new_no();
        let member = self.member_mut(disk).expect("a source is a member");
        let mut sync = Sync::new(no, Seq(0), Seq(0), disk, Stage::Leaves);
        sync.live_from = Seq(u64::MAX);
        member.state = MemberState::Syncing(Box::new(sync));
        let end = self.completed;
        self.rejoin(disk, end, effects);
        self.sync_leaves(disk, effects);
    }

    fn send_sync(
        &mut self,
        to: DiskId,
        target: DiskId,
        part: SyncPart,
        request: ReplicaRequest<B>,
        effects: &mut Effects<B>,
    ) {
        let no = self.sync_mut(target).expect("a resync under way").no;
        self.send(to, Purpose::Sync { target, no, part }, request, effects);
    }

    pub(super) fn sync_answered(
        &mut self,
        target: DiskId,
        no: u64,
        part: SyncPart,
        from: DiskId,
        result: Result<ReplicaReply<B>, Refusal>,
        effects: &mut Effects<B>,
    ) {
        if !self.sync_is(target, no) {
            return;
        }
        match (part, result) {
            (SyncPart::Begin, Ok(_)) => self.begun(target, effects),
            (SyncPart::ListSource(_), Ok(ReplicaReply::Leaves(leaves))) => {
                self.listed(target, Stage::ListSource, &leaves, effects);
            }
            (SyncPart::ListTarget(_), Ok(ReplicaReply::Leaves(leaves))) => {
                self.listed(target, Stage::ListTarget, &leaves, effects);
            }
            (SyncPart::SourceVersions(place), Ok(ReplicaReply::Versions(versions))) => {
                if let Some(job) = self.job_mut(target, place) {
                    job.source_versions = Some(versions);
                }
                self.compare(target, place, effects);
            }
            (SyncPart::TargetVersions(place), Ok(ReplicaReply::Versions(versions))) => {
                if let Some(job) = self.job_mut(target, place) {
                    job.target_versions = Some(versions);
                }
                self.compare(target, place, effects);
            }
            (SyncPart::Content(place), Ok(ReplicaReply::Read(parts))) => {
                self.move_run(target, place, parts, effects);
            }
            (SyncPart::Content(place), Err(Refusal::Store(StoreError::Corrupt { block, .. }))) => {
                self.bad_source(target, place, block, from, effects);
            }
            (SyncPart::Moved(place), Ok(_)) => {
                self.next_run(target, place, effects);
            }
            (SyncPart::Flushed, Ok(_)) => {
                let end = self.last_seq;
                self.sync_mut(target).expect("checked above").stage = Stage::Ending(end);
                self.send_sync(
                    target,
                    target,
                    SyncPart::Ended,
                    ReplicaRequest::SetEnd { end },
                    effects,
                );
            }
            (SyncPart::Ended, Ok(_)) => self.sync_ended(target, effects),
            // Anything else is a replica that cannot go on: begin again with a fence.
            _ => {
                self.lose(target, effects);
                self.start_fence(target, effects);
            }
        }
    }

    fn begun(&mut self, target: DiskId, effects: &mut Effects<B>) {
        // Chosen now, not earlier: it must hold everything that the stream will not bring.
        let Some(source) = self.readable(BlockNo(0)).first().copied() else {
            self.lose(target, effects);
            self.start_fence(target, effects);
            return;
        };
        let live_from = self.stream_from();
        let sync = self.sync_mut(target).expect("checked by the caller");
        sync.source = source;
        sync.live_from = live_from;
        sync.stage = Stage::ListSource;
        let last_seq = self.last_seq;
        let sync = self.sync_mut(target).expect("checked by the caller");
        let held = if sync.end <= last_seq { sync.end } else { Seq(0) };
        let before = Seq(live_from.0 - 1).max(held);
        self.rejoin(target, before, effects);
        self.list(target, Stage::ListSource, FIRST, effects);
    }

    fn list(&mut self, target: DiskId, stage: Stage, from: Place, effects: &mut Effects<B>) {
        let sync = self.sync_mut(target).expect("a resync under way");
        let newer_than = sync.since;
        let (to, part) = match stage {
            Stage::ListSource => (sync.source, SyncPart::ListSource(from)),
            _ => (target, SyncPart::ListTarget(from)),
        };
        let request = ReplicaRequest::ChangedLeaves { newer_than, from };
        self.send_sync(to, target, part, request, effects);
    }

    fn listed(&mut self, target: DiskId, stage: Stage, leaves: &[Place], effects: &mut Effects<B>) {
        let next = self.next_page(leaves);
        let sync = self.sync_mut(target).expect("checked by the caller");
        sync.leaves.extend(leaves);
        if let Some(from) = next {
            self.list(target, stage, from, effects);
        } else if stage == Stage::ListSource {
            sync.stage = Stage::ListTarget;
            self.list(target, Stage::ListTarget, FIRST, effects);
        } else {
            let leaves = sync.leaves.make_contiguous();
            leaves.sort_unstable();
            let mut last = None;
            sync.leaves.retain(|place| last.replace(*place) != Some(*place));
            sync.stage = Stage::Leaves;
            self.sync_leaves(target, effects);
        }
    }

    /// Guests come first: one leaf at a time while they write.
    pub(super) fn pace_syncs(&mut self, effects: &mut Effects<B>) {
        for index in 0..self.members.len() {
            let member = &self.members[index];
            if matches!(&member.state, MemberState::Syncing(sync) if sync.stage == Stage::Leaves) {
                self.sync_leaves(self.members[index].disk, effects);
            }
        }
    }

    /// Starts as many leaves as may run; ends the resync when none is left.
    fn sync_leaves(&mut self, target: DiskId, effects: &mut Effects<B>) {
        let at_once = if self.window.is_empty() { LEAVES_AT_ONCE } else { 1 };
        loop {
            let sync = self.sync_mut(target).expect("a resync under way");
            if sync.stage != Stage::Leaves || sync.jobs.len() >= at_once {
                return;
            }
            let source = sync.source;
            let Some(place) = sync.leaves.pop_front() else {
                break;
            };
            sync.jobs.push(LeafJob {
                place,
                source_versions: None,
                target_versions: None,
                runs: VecDeque::new(),
                tried: SmallVec::new(),
            });
            let (layer, leaf) = place;
            let lineage = self.layer(layer);
            let request = || ReplicaRequest::LeafVersions {
                lineage: lineage.clone(),
                leaf,
            };
            self.send_sync(
                source,
                target,
                SyncPart::SourceVersions(place),
                request(),
                effects,
            );
            self.send_sync(
                target,
                target,
                SyncPart::TargetVersions(place),
                request(),
                effects,
            );
        }
        let sync = self.sync_mut(target).expect("a resync under way");
        if sync.jobs.is_empty() {
            sync.stage = Stage::Flushing;
            self.send_sync(target, target, SyncPart::Flushed, ReplicaRequest::Flush, effects);
        }
    }

    fn job_mut(&mut self, target: DiskId, place: Place) -> Option<&mut LeafJob> {
        let sync = self.sync_mut(target)?;
        sync.jobs.iter_mut().find(|job| job.place == place)
    }

    fn compare(&mut self, target: DiskId, place: Place, effects: &mut Effects<B>) {
        let Some(sync) = self.sync_mut(target) else {
            return;
        };
        let live_from = sync.live_from;
        let Some(job) = sync.jobs.iter_mut().find(|job| job.place == place) else {
            return;
        };
        let (Some(source), Some(of_target)) = (&job.source_versions, &job.target_versions) else {
            return;
        };
        job.runs = runs_to_move(place.1, source, of_target, live_from);
        self.send_run(target, place, effects);
    }

    /// Moves the leaf's first run, or ends the leaf.
    fn send_run(&mut self, target: DiskId, place: Place, effects: &mut Effects<B>) {
        let layer = place.0;
        let lineage = self.layer(layer);
        let Some(sync) = self.sync_mut(target) else {
            return;
        };
        let source = sync.source;
        let live_from = sync.live_from;
        let Some(job) = sync.jobs.iter_mut().find(|job| job.place == place) else {
            return;
        };
        let Some(run) = job.runs.front().copied() else {
            sync.jobs.retain(|job| job.place != place);
            self.sync_leaves(target, effects);
            return;
        };
        let Run {
            block,
            count,
            seq,
            holds,
        } = run;
        if let Some(request) = holds.without_data(layer, block, count, seq, live_from) {
            self.send_sync(target, target, SyncPart::Moved(place), request, effects);
            return;
        }
        let tried = job.tried.clone();
        let others = self.readable(block);
        let next = std::iter::once(source)
            .chain(others)
            .find(|disk| *disk != target && !tried.contains(disk));
        match next {
            Some(disk) => {
                let request = ReplicaRequest::Read {
                    lineage,
                    block,
                    count,
                };
                self.send_sync(disk, target, SyncPart::Content(place), request, effects);
            }
            None => self.poison_run(target, place, run, effects),
        }
    }

    fn move_run(&mut self, target: DiskId, place: Place, parts: ReadParts<B>, effects: &mut Effects<B>) {
        let Some(sync) = self.sync_mut(target) else {
            return;
        };
        let live_from = sync.live_from;
        let Some(job) = sync.jobs.iter_mut().find(|job| job.place == place) else {
            return;
        };
        let run = job.runs.front_mut().expect("content was asked for a run");
        // The store may answer in several parts; each is one repair, the rest of the run waits its turn.
        let (count, content) = match parts.into_iter().next() {
            Some(ReadPart::Data(data)) => {
                let crcs: BlockCrcs = data
                    .bytes()
                    .chunks(BLOCK_BYTES as usize)
                    .map(types::crc32c)
                    .collect();
                (crcs.len() as u32, RepairContent::Data(data, crcs))
            }
            // Cleared since the versions were read: the stream has told the target.
            Some(ReadPart::Zeros(count)) => (count, RepairContent::Clear(count, ClearKind::Zero)),
            None => unreachable!("a read's parts add up to at least one block"),
        };
        assert!(
            (1..=run.count).contains(&count),
            "{count} blocks for a run of {}",
            run.count
        );
        let request = ReplicaRequest::Repair {
            layer: place.0,
            block: run.block,
            seq: run.seq,
            content,
            live_from,
        };
        run.block = run.block.plus(count - 1);
        run.count -= count - 1;
        sync.moved_blocks += u64::from(count);
        self.send_sync(target, target, SyncPart::Moved(place), request, effects);
    }

    /// The last block of what was asked for has arrived: `move_run` left the run at that block.
    fn next_run(&mut self, target: DiskId, place: Place, effects: &mut Effects<B>) {
        if let Some(job) = self.job_mut(target, place) {
            let run = job.runs.front_mut().expect("a run was moved");
            job.tried.clear();
            if run.holds != Holds::Data || run.count == 1 {
                job.runs.pop_front();
            } else {
                run.block = run.block.plus(1);
                run.count -= 1;
            }
        }
        self.send_run(target, place, effects);
    }

    /// A replica's copy of one block of the run is bad: cut the run around it, then try that block elsewhere.
    fn bad_source(
        &mut self,
        target: DiskId,
        place: Place,
        bad: BlockNo,
        from: DiskId,
        effects: &mut Effects<B>,
    ) {
        let Some(job) = self.job_mut(target, place) else {
            return;
        };
        let run = job.runs.pop_front().expect("content was asked for a run");
        if run.count == 1 {
            job.tried.push(from);
            job.runs.push_front(run);
        } else {
            assert!(
                run.block <= bad && bad.0 < run.block.0 + run.count,
                "outside the read"
            );
            let at = bad.0 - run.block.0;
            for (skip, count) in [(at + 1, run.count - at - 1), (at, 1), (0, at)] {
                if count > 0 {
                    job.runs.push_front(Run {
                        block: run.block.plus(skip),
                        count,
                        ..run
                    });
                }
            }
        }
        self.send_run(target, place, effects);
    }

    fn poison_run(&mut self, target: DiskId, place: Place, run: Run, effects: &mut Effects<B>) {
        assert_eq!(run.count, 1, "only a single block is given up");
        // Another replica on its way back may have a good copy: the next read or scrub tells, and repairs.
        let may_exist = self
            .members
            .iter()
            .any(|member| member.disk != target && self.may_become_readable(member));
        if !may_exist {
            let block = run.block;
            effects.push(WriterEffect::Notice(WriterNotice::Unreadable { block }));
        }
        let zeros = B::zeroed(BLOCK_BYTES as usize);
        let wrong = !types::crc32c(zeros.bytes());
        let live_from = self.sync_mut(target).expect("a resync under way").live_from;
        let request = ReplicaRequest::Repair {
            layer: place.0,
            block: run.block,
            seq: run.seq,
            content: RepairContent::Data(zeros, [wrong].into_iter().collect()),
            live_from,
        };
        self.send_sync(target, target, SyncPart::Moved(place), request, effects);
    }

    fn sync_ended(&mut self, target: DiskId, effects: &mut Effects<B>) {
        let sync = self.sync_mut(target).expect("checked by the caller");
        let Stage::Ending(end) = sync.stage else {
            unreachable!("an end was set that was not asked for");
        };
        let moved_blocks = sync.moved_blocks;
        let member = self.member_mut(target).expect("a target is a member");
        member.moved_blocks = moved_blocks;
        member.durable = end;
        self.make_current(target, end, effects);
        if self.phase == WriterPhase::Open {
            self.complete(effects);
        }
    }
}

/// What must travel so that the target equals the source in everything older than `live_from`.
fn runs_to_move(
    leaf: LeafNo,
    source: &[BlockVersion],
    target: &[BlockVersion],
    live_from: Seq,
) -> VecDeque<Run> {
    assert_eq!(source.len(), LEAF_BLOCKS as usize);
    assert_eq!(target.len(), LEAF_BLOCKS as usize);
    let mut runs: VecDeque<Run> = VecDeque::new();
    for (slot, (from, to)) in source.iter().zip(target).enumerate() {
        if from.seq >= live_from || to.seq >= live_from || is_same(*from, *to) {
            continue;
        }
        let block = block_at(leaf, slot);
        let holds = Holds::of(*from);
        match runs.back_mut() {
            Some(run) if run.block.0 + run.count == block.0 && run.seq == from.seq && run.holds == holds => {
                run.count += 1;
            }
            _ => runs.push_back(Run {
                block,
                count: 1,
                seq: from.seq,
                holds,
            }),
        }
    }
    runs
}
