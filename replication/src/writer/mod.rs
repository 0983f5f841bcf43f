//! The owner of one shard: it numbers writes, completes them at their quorum, and keeps replicas equal.
//!
//! ```text
//!          Touch or request         quorum reported, chosen          record names only equal members
//!  Idle ───────────────▶ Opening ──────────────────────▶ Opening ───────────────────────────────▶ Open
//!                           a newer token or epoch was seen ─▶ Fenced          Drop ─▶ Closed
//!
//!  one member:   Away ──up──▶ Fencing ──Promised──▶ Reported ──whole──▶ Current ──lags──▶ Expelled
//!                  ▲                                    └─behind──▶ Syncing ──SetEnd──▶ ┘     │
//!                  └───────────────── down, failed ───────────────────────────────────────────┘
//! ```
//!
//! What every part relies on:
//! * A member acknowledges the stream in order, so what it holds is one number, `acked`, and what is completed is
//!   one number too: the quorum-th largest `acked` of the record's in-sync members that are Current.
//! * While a change of the record is under way, a write completes only if both the old and the new record's rule
//!   are met; and a change is asked for only when every member it keeps or adds holds everything completed, and on
//!   stable media everything that a flush answered for. So whichever of the two a successor reads, its fence quorum
//!   meets every completed write, and after power loss every flushed one.
//! * Seqs are never used twice, not even by a life that left nothing behind: see [`fence`].
//! * Every write keeps the layer that was the head when it got its number, also when it is sent again. Cuts only go up,
//!   so what is of a later layer has the later seq; replicas are compared layer by layer.
//! * A member that is neither whole nor far enough is first told, durably, up to where it is good
//!   ([`ReplicaRequest::BeginResync`]), and only then joins the stream.

mod answer;
mod api;
mod fence;
mod lease;
mod plan;
mod read;
mod repair;
mod resync;
mod scrub;
mod stream;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use types::{
    DiskId, InFlight, Incarnation, Instant, LayerId, Lineage, Payload, RequestId, Seq, ShardId, Token,
};

use crate::message::{FromReplica, Refusal, ReplicaReply, ReplicaRequest, ToReplica};
use crate::record::ShardRecord;
use store::StoreError;

pub use api::{
    ShardError, ShardOp, ShardReply, WriterEffect, WriterEvent, WriterNotice, WriterPhase, WriterStatus,
};

pub use lease::{LEASE, Sharing, TAKE_OVER_WAIT};

use lease::Leases;
use plan::{Replace, Saving};
use read::ReadOp;
use repair::RepairJob;
use resync::{Sync, SyncPart};
use scrub::{Scrub, ScrubPart};
use stream::{Entry, FlushOp};

type Effects<B> = Vec<WriterEffect<B>>;

/// How long a replica that is up may take over a fence before the shard opens without it, and how long a save of
/// the record may take before it is said again.
const PATIENCE: Duration = Duration::from_secs(5);

/// A member that acknowledges nothing for this long, while another does, is taken out of sync.
const STALL: Duration = Duration::from_secs(10);

/// Writes not yet complete, and writes that one member may be behind the others.
const WINDOW_ENTRIES: usize = 4096;

/// The same in bytes.
const WINDOW_BYTES: usize = 64 << 20;

/// One disk this writer talks to.
#[derive(Clone, Debug, Hash)]
struct Member {
    disk: DiskId,
    is_up: bool,
    state: MemberState,
    /// Gets the stream.
    is_joined: bool,
    /// Every stream write up to this one is on the device.
    acked: Seq,
    /// Every stream write up to this one is on stable media.
    durable: Seq,
    /// Stream writes sent and not acknowledged.
    lag_entries: usize,
    lag_bytes: usize,
    /// Since when it has acknowledged nothing although it was asked to.
    quiet_since: Instant,
    /// It let a read wait: until then others are asked first.
    slow_until: Instant,
    /// Blocks that the last resync moved, for the notice.
    moved_blocks: u64,
    /// When the last question was sent that it answered: it had promised nobody newer then.
    granted: Option<Instant>,
    /// When it was last asked for that.
    renewed: Option<Instant>,
    /// Since when it has not answered when asked for nothing but that.
    renewing_since: Option<Instant>,
}

#[derive(Clone, Debug, Hash)]
enum MemberState {
    /// Down, or failed, or not yet spoken to.
    Away,
    /// A fence is on its way.
    Fencing,
    /// It promised; not yet decided what it needs.
    Reported(Report),
    /// Being brought up to date.
    Syncing(Box<Sync>),
    /// Holds everything completed, and gets the stream.
    Current,
    /// Up, but too slow: waits to be taken out of the record, then is fenced and resynced.
    Expelled,
}

/// What a replica said to a fence.
#[derive(Clone, Copy, Debug, Hash)]
struct Report {
    end: Seq,
    good_until: Option<Seq>,
}

impl Report {
    /// Up to where its content is right.
    fn good(self) -> Seq {
        self.good_until.map_or(self.end, |good| good.min(self.end))
    }

    fn is_whole(self) -> bool {
        self.good_until.is_none()
    }

    /// Whether it tells anything about where the past ends. A disk that came back empty does not, nor one whose log
    /// has lost parts: what is missing there may be what was completed last.
    fn can_vouch(self) -> bool {
        self.is_whole() || self.good() > Seq(0)
    }

    /// Nothing at all of what the shard once held.
    fn is_empty(self) -> bool {
        !self.is_whole() && self.end == Seq(0)
    }
}

impl Member {
    fn new(disk: DiskId, is_up: bool) -> Member {
        Member {
            disk,
            is_up,
            state: MemberState::Away,
            is_joined: false,
            acked: Seq(0),
            durable: Seq(0),
            lag_entries: 0,
            lag_bytes: 0,
            quiet_since: Instant(0),
            slow_until: Instant(0),
            moved_blocks: 0,
            granted: None,
            renewed: None,
            renewing_since: None,
        }
    }

    fn is_current(&self) -> bool {
        matches!(self.state, MemberState::Current)
    }

    /// Cannot be waited for: down, failed or too slow.
    fn is_gone(&self) -> bool {
        !self.is_up || matches!(self.state, MemberState::Expelled)
    }
}

/// Why a message was sent; found again by its id.
#[derive(Clone, Copy, Debug, Hash)]
enum Purpose {
    Fence,
    /// The same right under a new epoch; nothing depends on the answer but a refusal.
    Refence,
    Stream {
        seq: Seq,
        bytes: usize,
    },
    /// `upto`: what of the stream was sent before it.
    Flush {
        no: u64,
        upto: Seq,
    },
    Read(u64),
    Sync {
        target: DiskId,
        no: u64,
        part: SyncPart,
    },
    Repair(u64),
    Scrub(u64, ScrubPart),
    /// Nothing but an answer is wanted, of what the head's last leaf is: see [`lease`].
    Renew(LayerId),
    /// Empties a disk before it becomes a replica.
    Clean,
    /// The shard leaves this disk.
    Drop,
}

/// A message that was not answered yet.
#[derive(Clone, Copy, Debug, Hash)]
struct Asked {
    disk: DiskId,
    purpose: Purpose,
    at: Instant,
}

/// The owner of one shard.
#[derive(Clone, Debug, Hash)]
pub struct Writer<B> {
    shard: ShardId,
    shard_blocks: u32,
    /// What the head sees: its newest layer takes the writes.
    lineage: Lineage,
    incarnation: Incarnation,
    now: Instant,
    phase: WriterPhase,
    /// What the control store holds.
    record: ShardRecord,
    saving: Option<Saving>,
    replaces: Vec<Replace>,
    members: Vec<Member>,
    /// Disks on other hosts, members or not.
    far: BTreeSet<DiskId>,
    /// Messages without an answer, by their id.
    pending: InFlight<Asked>,
    started_at: Instant,

    /// Where the past ends and the first seq of this life; `None` until the fence round has a quorum.
    chosen: Option<(Seq, Seq)>,
    /// The best replica is itself unfinished: the record must first say that what others hold above this is of a
    /// past that was given up.
    fork: Option<Seq>,
    /// This life chooses a second time: a new epoch tells its seqs from those of the first.
    wants_epoch: bool,
    /// Writes may be numbered: every in-sync member of the record starts from what was chosen, so that no two of
    /// them ever hold different writes above the same past.
    is_streaming: bool,
    /// The record still has past ends above this, which was chosen.
    lower_ended: Option<Seq>,
    last_seq: Seq,
    /// Every write up to here is complete.
    completed: Seq,
    /// Every write up to here was promised to be on stable media of a quorum.
    flushed: Seq,
    window: VecDeque<Entry<B>>,
    window_bytes: usize,
    flushes: Vec<FlushOp>,
    waiting: VecDeque<(RequestId, ShardOp<B>)>,
    is_waiting: bool,

    reads: InFlight<ReadOp<B>>,
    /// Of those, how many wait for somebody to ask.
    parked_reads: usize,
    leases: Leases,
    repairs: BTreeMap<u64, RepairJob>,
    scrub: Option<Scrub>,
    /// Names repairs, flushes and resyncs.
    next_no: u64,
}

impl<B: Payload> Writer<B> {
    /// The writer of `record.shard`, idle until touched. `lineage` is what it sees, and its newest layer the head that
    /// takes the writes; `up` are the disks that can be reached now, `sharing` who else may write it.
    ///
    /// The caller sees to it that no earlier writer's change of the record can still be taken: either the epoch
    /// was raised for this writer, or this is the same daemon's next start with a higher `incarnation`.
    ///
    /// # Panics
    /// When the record breaks its invariants, or the lineage begins with another VDI's layer.
    #[must_use]
    pub fn new(
        record: ShardRecord,
        shard_blocks: u32,
        lineage: Lineage,
        incarnation: Incarnation,
        up: &[DiskId],
        sharing: Sharing,
    ) -> Writer<B> {
        assert!((1..=3).contains(&record.replicas.len()));
        assert!(!record.in_sync.is_empty(), "no replica in sync");
        assert!(record.in_sync.iter().all(|disk| record.replicas.contains(disk)));
        assert_eq!(lineage.newest().0, record.shard.vdi, "the head of another VDI");
        let members = record
            .replicas
            .iter()
            .map(|disk| Member::new(*disk, up.contains(disk)))
            .collect();
        Writer {
            shard: record.shard,
            shard_blocks,
            lineage,
            incarnation,
            now: Instant(0),
            phase: WriterPhase::Idle,
            record,
            saving: None,
            replaces: Vec::new(),
            members,
            far: BTreeSet::new(),
            pending: InFlight::default(),
            started_at: Instant(0),
            chosen: None,
            fork: None,
            wants_epoch: false,
            is_streaming: false,
            lower_ended: None,
            last_seq: Seq(0),
            completed: Seq(0),
            flushed: Seq(0),
            window: VecDeque::new(),
            window_bytes: 0,
            flushes: Vec::new(),
            waiting: VecDeque::new(),
            is_waiting: false,
            reads: InFlight::default(),
            parked_reads: 0,
            leases: Leases::new(sharing),
            repairs: BTreeMap::new(),
            scrub: None,
            next_no: 0,
        }
    }

    /// The disks that are on other hosts, for a writer just made; later [`WriterEvent::Distance`] tells of changes.
    pub fn set_far(&mut self, far: &BTreeSet<DiskId>) {
        self.far.clone_from(far);
    }

    /// Takes one event and says what to do about it.
    pub fn step(&mut self, now: Instant, event: WriterEvent<B>, effects: &mut Effects<B>) {
        self.now = self.now.max(now);
        let was_steady = self.is_steady();
        match event {
            WriterEvent::Request(id, op) => self.request(id, op, effects),
            WriterEvent::Replica(message) => self.replica(message, effects),
            WriterEvent::DiskState { disk, is_up } => self.disk_state(disk, is_up, effects),
            WriterEvent::Distance { disk, is_far } => {
                if is_far {
                    self.far.insert(disk);
                } else {
                    self.far.remove(&disk);
                }
            }
            WriterEvent::RecordSaved(record) => self.record_saved(&record, effects),
            WriterEvent::ReplaceDisk { old, new } => self.replace_disk(old, new, effects),
            WriterEvent::DiskLeaves { disk, refused } => {
                self.disk_leaves(disk, refused.as_ref(), effects);
            }
            WriterEvent::Cut { lineage } => self.cut(lineage),
            WriterEvent::Scrub => self.start_scrub(effects),
            WriterEvent::Drop => self.start_drop(effects),
            WriterEvent::Touch => self.touch(effects),
            WriterEvent::Tick => self.tick(effects),
        }
        // Also after the event that brought peace: what waited for it goes on.
        if !was_steady || !self.is_steady() {
            self.settle(effects);
        }
    }

    /// Whether anything is under way, so that ticks are wanted.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        match self.phase {
            WriterPhase::Idle | WriterPhase::Fenced => false,
            WriterPhase::Opening => true,
            WriterPhase::Closed => !self.pending.is_empty(),
            WriterPhase::Open => {
                self.in_flight() > 0
                    || self.saving.is_some()
                    || !self.replaces.is_empty()
                    || !self.pending.is_empty()
                    || self.scrub.is_some()
                    || self
                        .members
                        .iter()
                        .any(|member| member.is_up && !member.is_current())
            }
        }
    }

    /// Requests not yet answered.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        let reads = self.reads.len();
        self.waiting.len() + self.window.len() + self.flushes.len() + reads
    }

    /// Figures.
    #[must_use]
    pub fn status(&self) -> WriterStatus {
        let leaves_left = |member: &Member| match &member.state {
            MemberState::Syncing(sync) => sync.leaves_left(),
            _ => 0,
        };
        WriterStatus {
            phase: self.phase,
            token: self.token(),
            last_seq: self.last_seq,
            is_waiting: self.is_waiting || (self.phase == WriterPhase::Open && !self.is_streaming),
            reads_wait: self.leases.is_said(),
            keeps_still: self.phase == WriterPhase::Opening && self.leases.has_quorum(),
            replicas: self
                .record
                .replicas
                .iter()
                .map(|disk| (*disk, self.record.in_sync.contains(disk)))
                .collect(),
            resync_leaves_left: self.members.iter().map(leaves_left).sum(),
            is_scrubbing: self.scrub.is_some(),
            waiting: self.waiting.len(),
        }
    }

    /// The record as the control store holds it, as far as this writer knows.
    #[must_use]
    pub fn record(&self) -> &ShardRecord {
        &self.record
    }

    /// Whatever is numbered from now on is of the new layer.
    fn cut(&mut self, lineage: Lineage) {
        let (old, new) = (self.lineage.newest(), lineage.newest());
        assert_eq!(old.0, new.0, "the head of another VDI");
        assert!(old.1 < new.1, "a cut from layer {} to {}", old.1, new.1);
        self.lineage = lineage;
    }

    /// The layer that takes the writes.
    fn head(&self) -> LayerId {
        self.lineage.newest().1
    }

    /// A single layer of the shard's own, for comparing replicas.
    fn layer(&self, layer: LayerId) -> Lineage {
        Lineage::of_layer(self.shard.vdi, layer)
    }

    fn token(&self) -> Token {
        Token {
            epoch: self.record.epoch,
            incarnation: self.incarnation,
        }
    }

    /// Serving, whole, and nothing to arrange: acks and requests need no more than their own handling.
    fn is_steady(&self) -> bool {
        self.phase == WriterPhase::Open
            && self.is_streaming
            && self.saving.is_none()
            && self.replaces.is_empty()
            && self.scrub.as_ref().is_none_or(Scrub::has_begun)
            && self.waiting.is_empty()
            && self.parked_reads == 0
            && !self.leases.is_any_read_held()
            && !self.wants_mark()
            && self.record.in_sync.len() == self.members.len()
            && self.members.iter().all(Member::is_current)
    }

    /// Everything that follows from the state rather than from one event.
    fn settle(&mut self, effects: &mut Effects<B>) {
        if matches!(self.phase, WriterPhase::Opening | WriterPhase::Open) {
            self.reconsider();
            self.choose(effects);
            self.place_reported(effects);
            self.plan(effects);
            self.open();
            self.complete(effects);
            self.serve_waiting(effects);
            self.retry_parked(effects);
            self.release_held(effects);
            self.begin_scrub(effects);
            self.note_quorum(effects);
        }
    }

    fn request(&mut self, id: RequestId, op: ShardOp<B>, effects: &mut Effects<B>) {
        match self.phase {
            WriterPhase::Fenced => effects.push(WriterEffect::Reply(id, Err(ShardError::Fenced))),
            WriterPhase::Closed => effects.push(WriterEffect::Reply(id, Err(ShardError::Closed))),
            WriterPhase::Idle => {
                self.waiting.push_back((id, op));
                self.touch(effects);
            }
            WriterPhase::Opening => self.waiting.push_back((id, op)),
            WriterPhase::Open => self.serve(id, op, effects),
        }
    }

    fn replica(&mut self, message: FromReplica<B>, effects: &mut Effects<B>) {
        let FromReplica {
            shard,
            disk,
            token,
            id,
            result,
        } = message;
        if shard != self.shard || token.incarnation != self.incarnation {
            return;
        }
        let Asked { purpose, at, .. } = match self.pending.get(id.0) {
            Some(asked) if asked.disk == disk => *asked,
            _ => return,
        };
        if matches!(self.phase, WriterPhase::Fenced) {
            return;
        }
        // Where the disk is lost by its answer, the question is still among those that it will not answer.
        match &result {
            Err(Refusal::Stale { promised }) if *promised > self.token() => {
                self.become_fenced(effects);
                return;
            }
            // A stale end of resync, or a node that lost its promise with its disk: begin again with a fence.
            Err(Refusal::Stale { .. } | Refusal::NotFenced | Refusal::Store(StoreError::NoShard(_)))
                if !matches!(purpose, Purpose::Drop | Purpose::Clean) =>
            {
                self.lose(disk, effects);
                self.start_fence(disk, effects);
                return;
            }
            Err(Refusal::Store(StoreError::DiskFailed(_) | StoreError::IndexFailed(_)))
                if !matches!(purpose, Purpose::Drop) =>
            {
                self.disk_state(disk, false, effects);
                return;
            }
            result if !self.is_answer(purpose, result) => {
                effects.push(WriterEffect::Notice(WriterNotice::WrongAnswer { disk }));
                self.disk_state(disk, false, effects);
                return;
            }
            _ => {}
        }
        self.pending.remove(id.0);
        if result.is_ok() {
            self.grant(disk, at);
        }
        self.answered(disk, purpose, result, effects);
    }

    fn answered(
        &mut self,
        disk: DiskId,
        purpose: Purpose,
        result: Result<ReplicaReply<B>, Refusal>,
        effects: &mut Effects<B>,
    ) {
        match purpose {
            Purpose::Stream { seq, bytes } => self.acked(disk, seq, bytes, effects),
            Purpose::Read(no) => self.read_answered(no, disk, result, effects),
            Purpose::Flush { no, upto } => self.flush_answered(no, upto, disk, effects),
            Purpose::Fence => self.promised(disk, &result),
            Purpose::Refence => {}
            Purpose::Renew(_) => self.renewed(disk),
            Purpose::Sync { target, no, part } => {
                self.sync_answered(target, no, part, disk, result, effects);
            }
            Purpose::Repair(no) => self.repair_answered(no, result, effects),
            Purpose::Scrub(no, part) => self.scrub_answered(no, part, result, effects),
            Purpose::Clean => self.cleaned(disk, result.is_ok(), effects),
            Purpose::Drop => self.dropped(effects),
        }
    }

    fn disk_state(&mut self, disk: DiskId, is_up: bool, effects: &mut Effects<B>) {
        let Some(member) = self.member_mut(disk) else {
            if !is_up {
                // A disk that was replaced: its answer to the drop will not come.
                self.forget_messages(disk);
                self.dropped(effects);
            }
            return;
        };
        if is_up {
            let was_up = std::mem::replace(&mut member.is_up, true);
            match self.phase {
                _ if was_up => {}
                WriterPhase::Opening | WriterPhase::Open => self.came_up(disk, effects),
                // It was away when the shard was to go, or went before it had answered: what it holds is nobody's.
                WriterPhase::Closed => self.send(disk, Purpose::Drop, ReplicaRequest::Drop, effects),
                WriterPhase::Idle | WriterPhase::Fenced => {}
            }
        } else {
            member.is_up = false;
            self.lose(disk, effects);
        }
    }

    /// A disk can be reached: fence it if it takes part, empty it if it is to.
    fn came_up(&mut self, disk: DiskId, effects: &mut Effects<B>) {
        if self.takes_part(disk) {
            self.start_fence(disk, effects);
        } else {
            self.clean(disk, effects);
        }
    }

    /// Nothing that was asked of this disk will be answered; what depended on it starts again elsewhere.
    fn lose(&mut self, disk: DiskId, effects: &mut Effects<B>) {
        let lost = self.forget_messages(disk);
        self.set_away(disk);
        let repairs: Vec<u64> = self
            .repairs
            .iter()
            .filter(|(_, job)| job.uses(disk))
            .map(|(no, _)| *no)
            .collect();
        for no in repairs {
            self.repair_ended(no, effects);
        }
        self.scrub_lost(disk, effects);
        for purpose in lost {
            match purpose {
                Purpose::Read(no) => self.read_lost(no, disk, effects),
                // Its source went: the target starts again with whatever source there is then.
                Purpose::Sync { target, no, .. } if target != disk && self.sync_is(target, no) => {
                    self.lose(target, effects);
                    self.start_fence(target, effects);
                }
                Purpose::Drop => self.dropped(effects),
                _ => {}
            }
        }
        // A resync that was asking its target at this moment has lost its source all the same.
        for index in 0..self.members.len() {
            let member = &self.members[index];
            let target = member.disk;
            if matches!(&member.state, MemberState::Syncing(sync) if target != disk && sync.copies_from(disk))
            {
                self.lose(target, effects);
                self.start_fence(target, effects);
            }
        }
    }

    /// The purposes of what this disk was asked, oldest first; an answer finds nothing any more.
    fn forget_messages(&mut self, disk: DiskId) -> Vec<Purpose> {
        let asked = self.pending.numbers(|asked| asked.disk == disk);
        let purpose = |id| self.pending.remove(id).map(|asked| asked.purpose);
        asked.into_iter().filter_map(purpose).collect()
    }

    fn set_away(&mut self, disk: DiskId) {
        if let Some(member) = self.member_mut(disk) {
            member.state = MemberState::Away;
            member.is_joined = false;
            member.acked = Seq(0);
            member.lag_entries = 0;
            member.lag_bytes = 0;
            member.renewed = None;
            member.renewing_since = None;
        }
    }

    fn tick(&mut self, effects: &mut Effects<B>) {
        if let Some(saving) = &mut self.saving
            && self.now.since(saving.said_at) >= PATIENCE
        {
            saving.said_at = self.now;
            effects.push(WriterEffect::SaveRecord(saving.record.clone()));
        }
        self.expel_stalled();
        self.hedge(effects);
        self.chase_leases(effects);
        if self.phase == WriterPhase::Open && !self.is_steady() {
            self.pace_syncs(effects);
        }
    }

    fn become_fenced(&mut self, effects: &mut Effects<B>) {
        self.phase = WriterPhase::Fenced;
        effects.push(WriterEffect::Notice(WriterNotice::Fenced));
        self.fail_all(ShardError::Fenced, effects);
    }

    fn fail_all(&mut self, error: ShardError, effects: &mut Effects<B>) {
        let waiting = self.waiting.drain(..).map(|(id, _)| id);
        let writes = self.window.drain(..).map(|entry| entry.id);
        let flushes = self.flushes.drain(..).map(|flush| flush.id);
        for id in waiting.chain(writes).chain(flushes) {
            effects.push(WriterEffect::Reply(id, Err(error)));
        }
        for read in self.reads.take_all() {
            effects.push(WriterEffect::Reply(read.id, Err(error)));
        }
        self.parked_reads = 0;
        self.leases.let_go();
        self.window_bytes = 0;
        self.saving = None;
        self.replaces.clear();
        self.repairs.clear();
        self.scrub = None;
        self.pending.clear();
        for member in &mut self.members {
            member.state = MemberState::Away;
            member.is_joined = false;
        }
    }

    fn start_drop(&mut self, effects: &mut Effects<B>) {
        if matches!(self.phase, WriterPhase::Fenced | WriterPhase::Closed) {
            return;
        }
        self.phase = WriterPhase::Closed;
        self.fail_all(ShardError::Closed, effects);
        let up: Vec<DiskId> = self
            .members
            .iter()
            .filter(|member| member.is_up)
            .map(|member| member.disk)
            .collect();
        for disk in up {
            self.send(disk, Purpose::Drop, ReplicaRequest::Drop, effects);
        }
        self.dropped(effects);
    }

    /// One disk has let the shard go, or another's answer will not come.
    fn dropped(&mut self, effects: &mut Effects<B>) {
        if self.phase == WriterPhase::Closed && self.pending.is_empty() {
            effects.push(WriterEffect::Notice(WriterNotice::Dropped));
        }
    }

    fn send(&mut self, disk: DiskId, purpose: Purpose, request: ReplicaRequest<B>, effects: &mut Effects<B>) {
        let at = self.now;
        let id = RequestId(self.pending.insert(Asked { disk, purpose, at }));
        effects.push(WriterEffect::Send(
            disk,
            ToReplica {
                shard: self.shard,
                token: self.token(),
                id,
                request,
            },
        ));
    }

    fn member(&self, disk: DiskId) -> Option<&Member> {
        self.members.iter().find(|member| member.disk == disk)
    }

    fn member_mut(&mut self, disk: DiskId) -> Option<&mut Member> {
        self.members.iter_mut().find(|member| member.disk == disk)
    }

    /// Whether `disk` counts as in sync by the record and by the change of it that is under way.
    fn is_in_sync(&self, disk: DiskId) -> bool {
        self.record.in_sync.contains(&disk)
            && self
                .saving
                .as_ref()
                .is_none_or(|saving| saving.record.in_sync.contains(&disk))
    }

    fn new_no(&mut self) -> u64 {
        self.next_no += 1;
        self.next_no
    }
}
