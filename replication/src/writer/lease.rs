//! When a read may be answered: while nobody else can have become the writer unnoticed.
//!
//! A writer on another host takes the shard over with the promises of a fence quorum, which may be one replica of a
//! pair, or two of three. The old one, cut off and knowing nothing, could go on reading at a replica that has not heard
//! of it. Neither a message to a quorum for every read nor a wall clock keeps it from that, but leases do, which the
//! writer keeps by itself:
//! * An answer of a replica to this writer's token says that the replica had promised nobody newer when it looked, which
//!   was not before the question was sent. From that moment on (`granted`) its lease lasts for [`LEASE`].
//! * A read is answered only while the replicas in sync without a lease make no fence quorum, of the record and of the
//!   change of it that is under way: a successor works from one of the two.
//! * A writer that may have a predecessor on another host serves nothing for [`TAKE_OVER_WAIT`] after it has a fence
//!   quorum.
//!
//! **Why that is enough.** Say this writer answers a read at `now`, and a successor has a fence quorum since `then`. At
//! least one member of that quorum has a lease here: it answered a question that was sent at `granted`, with
//! `now < granted + LEASE`. It looked at that question before it promised the successor, whom it would have told on
//! this writer otherwise; so `granted < then`, and `now < then + LEASE`: the successor has told nobody anything yet.
//! The value was read, in between the guest's asking and this answer, at a replica that held everything this writer had
//! completed, so it was the newest there was. Where there is no successor with a quorum there is nothing to show.
//! Clocks need not agree, they must run equally fast: within [`TAKE_OVER_WAIT`]` / `[`LEASE`]. A process that was
//! stopped looks at its clock when it goes on, before it answers.
//!
//! **Who must wait.** The control store keeps with the VDI the first incarnation after the last take-over from a
//! host that may live on ([`Sharing::Cluster`]). Nobody changes a shard's record before he has waited, so a record that
//! was saved by that incarnation or a later one says that nobody older reads any more. A restart on the same host is not
//! a take-over: where nothing was ever taken over nobody waits. A written shard that was waited for gets a record that
//! says so, once it is open, so that the next restart does not wait again.
//!
//! **What it costs.** While guests read, a short question for each replica in sync and two thirds of [`LEASE`], and none
//! where other questions were answered in that time, nor to a single replica, whose own answer is its lease. None while
//! nobody reads: the first read after that is held until the questions beside it are answered.

use std::time::Duration;

use smallvec::SmallVec;
use types::{DiskId, Incarnation, Instant, LEAF_BLOCKS, LayerId, LeafNo, Payload, Seq};

use super::{Effects, Member, MemberState, Purpose, STALL, ShardReply, Writer, WriterEffect, WriterNotice};
use super::{WriterPhase, answer::Awaited};
use crate::message::ReplicaRequest;
use crate::record::ShardRecord;

/// How long the answer of a replica shows that nobody else is the writer, from the moment it was asked.
pub const LEASE: Duration = Duration::from_secs(2);

/// How long a new writer keeps still, so that every lease of an old one is over: a tenth more, as much as two clocks may
/// differ in speed.
pub const TAKE_OVER_WAIT: Duration = Duration::from_millis(2200);

/// Leases are renewed when they last no longer than this.
const RENEW_BEFORE: Duration = Duration::from_millis(667);

/// A replica that was asked is asked again after this.
const RENEW_AFTER: Duration = Duration::from_millis(1333);

/// Who else may write the shard while this writer lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Sharing {
    /// Nobody: a pool of one host, whose disks are locked by their daemon.
    Alone,
    /// Another host may take the shard over.
    Cluster {
        /// The first incarnation after the VDI was last taken from a host that may live on; writers before that one
        /// may still read. 0: it never was.
        since: Incarnation,
    },
}

/// What a writer knows of leases.
#[derive(Clone, Debug, Hash)]
pub(super) struct Leases {
    sharing: Sharing,
    /// Reads may be answered before this moment; whether they may later has to be looked at.
    until: Instant,
    /// Since when there is a fence quorum.
    quorum_at: Option<Instant>,
    /// Reads whose answer is here and may not be given yet.
    held: usize,
    held_since: Instant,
    /// The world was told that reads wait.
    is_said: bool,
}

impl Leases {
    pub(super) fn new(sharing: Sharing) -> Leases {
        let mut leases = Leases {
            sharing,
            until: Instant(0),
            quorum_at: None,
            held: 0,
            held_since: Instant(0),
            is_said: false,
        };
        leases.forget();
        leases
    }

    /// Has the leases looked at before the next answer: the record decides how many it takes.
    pub(super) fn forget(&mut self) {
        self.until = match self.sharing {
            Sharing::Alone => Instant(u64::MAX),
            Sharing::Cluster { .. } => Instant(0),
        };
    }

    pub(super) fn is_any_read_held(&self) -> bool {
        self.held > 0
    }

    /// Whether the world was told that reads wait.
    pub(super) fn is_said(&self) -> bool {
        self.is_said
    }

    /// Whether there was a fence quorum.
    pub(super) fn has_quorum(&self) -> bool {
        self.quorum_at.is_some()
    }

    /// Nobody waits any more.
    pub(super) fn let_go(&mut self) {
        self.held = 0;
        self.is_said = false;
    }

    /// Whether a writer of before whom nobody waited for may still answer reads; asked when there is a fence quorum.
    /// `saved_by` is whose record it is.
    pub(super) fn keeps_still(&mut self, now: Instant, saved_by: Incarnation) -> bool {
        let quorum_at = *self.quorum_at.get_or_insert(now);
        let may_be_read = match self.sharing {
            Sharing::Alone => false,
            Sharing::Cluster { since } => saved_by < since,
        };
        may_be_read && now.since(quorum_at) < TAKE_OVER_WAIT
    }
}

impl<B: Payload> Writer<B> {
    /// A replica has answered a question that was sent at `at`.
    #[inline]
    pub(super) fn grant(&mut self, disk: DiskId, at: Instant) {
        if self.leases.sharing == Sharing::Alone {
            return;
        }
        if let Some(member) = self.member_mut(disk) {
            member.granted = member.granted.max(Some(at));
        }
    }

    /// Whether a value that a replica has sent may be given to the guest now.
    #[inline]
    pub(super) fn may_answer_reads(&mut self) -> bool {
        self.now < self.leases.until || self.look_again()
    }

    #[cold]
    fn look_again(&mut self) -> bool {
        if self.leases.sharing != Sharing::Alone {
            let mut until = self.leased_until(&self.record);
            if let Some(saving) = &self.saving {
                until = until.min(self.leased_until(&saving.record));
            }
            self.leases.until = until;
        }
        self.now < self.leases.until
    }

    /// Until when the replicas without a lease make no fence quorum of `record`.
    fn leased_until(&self, record: &ShardRecord) -> Instant {
        let granted = |disk: &DiskId| self.member(*disk).and_then(|member| member.granted);
        let mut granted: SmallVec<[Option<Instant>; 3]> = record.in_sync.iter().map(granted).collect();
        granted.sort_unstable_by(|a, b| b.cmp(a));
        let needed = record.in_sync.len() + 1 - record.fence_quorum();
        granted[needed - 1].map_or(Instant(0), |at| at + LEASE)
    }

    /// Asks for leases that end soon, beside the read `no`, whose own answer brings some.
    #[inline]
    pub(super) fn renew_beside(&mut self, no: u64, effects: &mut Effects<B>) {
        if self.now + RENEW_BEFORE >= self.leases.until {
            self.renew(Some(no), effects);
        }
    }

    #[cold]
    fn renew(&mut self, beside: Option<u64>, effects: &mut Effects<B>) {
        self.look_again();
        if self.now + RENEW_BEFORE < self.leases.until {
            return;
        }
        let now = self.now;
        let read = beside.and_then(|no| self.reads.get(no));
        let asked: SmallVec<[DiskId; 3]> = read.map(|read| read.asked().into()).unwrap_or_default();
        for index in 0..self.members.len() {
            let disk = self.members[index].disk;
            let may_fence = self.record.in_sync.contains(&disk)
                || (self.saving.as_ref()).is_some_and(|saving| saving.record.in_sync.contains(&disk));
            let member = &mut self.members[index];
            let last = member.granted.max(member.renewed);
            let is_due = last.is_none_or(|last| now.since(last) >= RENEW_AFTER);
            if !may_fence || !is_due || !member.can_be_asked() {
                continue;
            }
            member.renewed = Some(now);
            if !asked.contains(&disk) {
                member.renewing_since.get_or_insert(now);
                self.send(disk, Purpose::Renew(self.head()), self.renewal(), effects);
            }
        }
    }

    /// A question that every replica answers at once from memory: what there is from the shard's last leaf on.
    fn renewal(&self) -> ReplicaRequest<B> {
        ReplicaRequest::ChangedLeaves {
            newer_than: Seq(0),
            from: (self.head(), self.last_leaf()),
        }
    }

    fn last_leaf(&self) -> LeafNo {
        LeafNo((self.shard_blocks - 1) / LEAF_BLOCKS)
    }

    /// For one that was asked when this was the head.
    pub(super) fn renewal_awaits(&self, head: LayerId) -> Awaited {
        Awaited::Leaves((head, self.last_leaf()))
    }

    pub(super) fn renewed(&mut self, disk: DiskId) {
        if let Some(member) = self.member_mut(disk) {
            member.renewing_since = None;
        }
    }

    /// Keeps what was read until it may be told.
    #[cold]
    pub(super) fn hold(&mut self, no: u64, reply: ShardReply<B>, effects: &mut Effects<B>) {
        let read = self.reads.get_mut(no).expect("a read under way");
        read.held = Some(Box::new(reply));
        if self.leases.held == 0 {
            self.leases.held_since = self.now;
        }
        self.leases.held += 1;
        self.renew(Some(no), effects);
    }

    /// Answers what was held, once it may be.
    pub(super) fn release_held(&mut self, effects: &mut Effects<B>) {
        if self.leases.held == 0 || !self.may_answer_reads() {
            return;
        }
        self.leases.held = 0;
        for no in self.reads.numbers(|read| read.held.is_some()) {
            let held = self.reads.get_mut(no).and_then(|read| read.held.take());
            self.read_done(no, *held.expect("listed just now"), effects);
        }
        if std::mem::take(&mut self.leases.is_said) {
            effects.push(WriterEffect::Notice(WriterNotice::ReadsWait(false)));
        }
    }

    /// Time has passed: leases that did not come are asked for again, and somebody is told.
    pub(super) fn chase_leases(&mut self, effects: &mut Effects<B>) {
        if self.leases.held == 0 {
            return;
        }
        self.renew(None, effects);
        if !self.leases.is_said && self.now.since(self.leases.held_since) >= LEASE {
            self.leases.is_said = true;
            effects.push(WriterEffect::Notice(WriterNotice::ReadsWait(true)));
        }
    }

    /// Whether reads have waited for long because of this member alone, which others would not let them do.
    pub(super) fn withholds_lease(&self, member: &Member) -> bool {
        let is_silent = |since: Instant| self.now.since(since) >= STALL;
        let is_leased = |other: &Member| {
            other.disk != member.disk
                && other.is_current()
                && other.granted.is_some_and(|at| self.now.since(at) < LEASE)
        };
        self.leases.held > 0
            && member.renewing_since.is_some_and(is_silent)
            && self.members.iter().any(is_leased)
    }

    /// Whether the record is to say that this shard was waited for. Not before it is open: the control store may be
    /// away, and guests need not wait for it.
    pub(super) fn wants_mark(&self) -> bool {
        match self.leases.sharing {
            Sharing::Alone => false,
            Sharing::Cluster { since } => {
                self.record.saved_by < since && self.record.was_written && self.phase == WriterPhase::Open
            }
        }
    }
}

impl Member {
    fn can_be_asked(&self) -> bool {
        self.is_up && !matches!(self.state, MemberState::Away | MemberState::Fencing)
    }
}
