//! Taking the shard over: fence, choose where the past ends, open.
//!
//! A seq must never be given twice, and a later life's must be above an earlier one's, even if the earlier life's
//! writes reached one replica only and that replica cannot be asked now. The first seq of a life is therefore
//! computed from two things that every successor sees at least as high: the chosen end, which is durable on a quorum
//! (a node flushes before it answers a fence), and epoch plus incarnation, which grows with every life. Each unit
//! is 2^28 writes: more than a life can complete and lose again without a single flush.

use types::{DiskId, Payload, Seq};

use super::{Effects, Member, MemberState, PATIENCE, Purpose, Report, Writer, WriterPhase};
use crate::message::{Refusal, ReplicaReply, ReplicaRequest};

/// Seqs below this many bits count the writes of a life.
const LIFE_BITS: u32 = 28;

impl<B: Payload> Writer<B> {
    pub(super) fn touch(&mut self, effects: &mut Effects<B>) {
        if self.phase != WriterPhase::Idle {
            return;
        }
        self.phase = WriterPhase::Opening;
        self.started_at = self.now;
        let up: Vec<DiskId> = self
            .members
            .iter()
            .filter(|member| member.is_up)
            .map(|member| member.disk)
            .collect();
        for disk in up {
            self.came_up(disk, effects);
        }
    }

    pub(super) fn start_fence(&mut self, disk: DiskId, effects: &mut Effects<B>) {
        let now = self.now;
        let Some(member) = self.member_mut(disk) else {
            return;
        };
        if !member.is_up {
            return;
        }
        member.state = MemberState::Fencing;
        member.quiet_since = now;
        let record = self.record.encode();
        self.send(disk, Purpose::Fence, ReplicaRequest::Fence { record }, effects);
    }

    pub(super) fn promised(&mut self, disk: DiskId, result: &Result<ReplicaReply<B>, Refusal>) {
        let Ok(ReplicaReply::Promised { end, good_until, .. }) = *result else {
            return;
        };
        if let Some(member) = self.member_mut(disk)
            && matches!(member.state, MemberState::Fencing | MemberState::Expelled)
        {
            member.state = MemberState::Reported(Report { end, good_until });
            // A node makes durable what it reports.
            member.durable = end;
        }
    }

    /// Chooses anew where nobody is left who holds what was chosen: while opening, when the only such replica went;
    /// while open, when every in-sync replica is back and each lost something (a disk that was reopened after it
    /// failed). What was in flight is written again after what is left.
    pub(super) fn reconsider(&mut self) {
        let Some((chosen, first)) = self.chosen else {
            return;
        };
        let is_held = |member: &Member| match &member.state {
            MemberState::Current | MemberState::Syncing(_) => true,
            MemberState::Reported(report) => {
                let is_past = report.end == chosen;
                let is_ours = is_past || (report.end >= first && report.end <= self.last_seq);
                report.is_whole() && is_ours && report.end >= self.completed
            }
            _ => false,
        };
        let in_sync = || {
            self.members
                .iter()
                .filter(|member| self.record.in_sync.contains(&member.disk))
        };
        let is_answered = in_sync().all(|member| matches!(member.state, MemberState::Reported(_)));
        let is_hopeless = self.phase == WriterPhase::Opening || is_answered;
        if self.saving.is_none() && is_hopeless && !self.members.iter().any(is_held) {
            self.chosen = None;
            self.fork = None;
            self.wants_epoch = true;
            self.is_streaming = false;
            self.phase = WriterPhase::Opening;
            self.started_at = self.now;
            self.unsend();
        }
    }

    fn is_patience_over(&self) -> bool {
        self.now.since(self.started_at) >= PATIENCE
    }

    /// Once enough in-sync replicas have reported: the past ends at the furthest of them.
    pub(super) fn choose(&mut self, effects: &mut Effects<B>) {
        if self.chosen.is_some() || self.wants_epoch {
            return;
        }
        let in_sync = &self.record.in_sync;
        let reports: Vec<(DiskId, Report)> = self
            .members
            .iter()
            .filter_map(|member| match member.state {
                MemberState::Reported(report) => Some((member.disk, report)),
                _ => None,
            })
            .collect();
        let counted = || reports.iter().filter(|(disk, _)| in_sync.contains(disk));
        let up = self
            .members
            .iter()
            .filter(|member| member.is_up && in_sync.contains(&member.disk))
            .count();
        let answered = counted().count();
        let vouching = counted().filter(|(_, report)| report.can_vouch()).count();
        // Those that cannot vouch make no quorum, but when nobody else is left to ask they are what there is; if
        // they hold anything. Where all is lost the shard stays shut: its zeros would be a lie.
        let is_everybody = answered == in_sync.len() && !counted().all(|(_, report)| report.is_empty());
        let is_quorum = vouching >= self.record.fence_quorum() || is_everybody;
        if !is_quorum || self.leases.keeps_still(self.now, self.record.saved_by) {
            return;
        }
        if answered < up && !self.is_patience_over() {
            return;
        }
        let (source, best) = *counted()
            .max_by_key(|(_, report)| (report.good(), report.is_whole(), report.end))
            .expect("a quorum is at least one");
        let chosen = best.good();
        let is_fork_recorded = self.record.ended.iter().any(|ended| ended.end <= chosen);
        self.fork = (!best.is_whole() && !is_fork_recorded).then_some(chosen);
        if self.fork.is_some() {
            return;
        }
        let first = self.first_seq(chosen);
        let is_above = self.record.ended.iter().any(|ended| ended.end > chosen);
        self.lower_ended = is_above.then_some(chosen);
        if best.is_whole() {
            self.start_from(chosen, first);
        } else {
            // The best there is was being caught up itself, and holds blocks from above its good end. A number of
            // its own tells it from everybody who has the same end without them.
            self.start_from(first, first.next());
            self.settle_source(source, effects);
        }
    }

    fn start_from(&mut self, chosen: Seq, first: Seq) {
        self.chosen = Some((chosen, first));
        self.last_seq = chosen;
        self.completed = chosen;
        self.flushed = chosen;
    }

    fn first_seq(&self, chosen: Seq) -> Seq {
        let lives = self.record.epoch.0 + self.incarnation.0;
        Seq((((chosen.0 >> LIFE_BITS) + 1 + lives) << LIFE_BITS) + 1)
    }

    /// Decides for each replica that has reported: whole, or to be brought up to date.
    pub(super) fn place_reported(&mut self, effects: &mut Effects<B>) {
        let Some((chosen, first)) = self.chosen else {
            return;
        };
        for index in 0..self.members.len() {
            let member = &self.members[index];
            let MemberState::Reported(report) = member.state else {
                continue;
            };
            let disk = member.disk;
            if !self.takes_part(disk) || self.is_undecided(disk) {
                continue;
            }
            let is_past = report.end == chosen;
            let is_ours = is_past || (report.end >= first && report.end <= self.last_seq);
            if self.is_in_sync(disk) && report.is_whole() && is_ours && report.end >= self.completed {
                self.make_current(disk, report.end, effects);
                self.rejoin(disk, report.end, effects);
            } else {
                let (good, since) = self.good_since(disk, report);
                self.start_sync(disk, good, since, report.end, effects);
            }
        }
    }

    /// Whether the change of the record that is under way decides about this disk. Until then it may be the one that
    /// a successor counts on, so what it vouches for must not be lowered.
    fn is_undecided(&self, disk: DiskId) -> bool {
        self.saving.as_ref().is_some_and(|saving| {
            saving.record.in_sync.contains(&disk) != self.record.in_sync.contains(&disk)
        })
    }

    /// Up to which seq a replica holds everything completed, which it remembers while it is being brought up to
    /// date; and from which on it is compared. The first must not be lowered for a member in sync: a successor
    /// counts on it.
    fn good_since(&self, disk: DiskId, report: Report) -> (Seq, Seq) {
        let (chosen, first) = self.chosen.expect("called when chosen");
        let mut good = report.good();
        if good > chosen && good < first {
            good = chosen;
        }
        let good = good.min(self.last_seq);
        let ended = self.record.ended.iter().map(|ended| ended.end).min();
        if self.is_in_sync(disk) {
            (good, good.min(ended.unwrap_or(good)))
        } else {
            // It left at one of the recorded ends; without one nobody knows where.
            let since = good.min(ended.unwrap_or(Seq(0)));
            (since, since)
        }
    }

    /// Opens for writes when every member the record names in sync starts from what was chosen, or is marked as
    /// behind it; for reads alone when one does and the others cannot be had.
    pub(super) fn open(&mut self) {
        let is_settled = self.saving.is_none() && self.lower_ended.is_none() && !self.wants_removal();
        if self.chosen.is_none() || self.is_streaming || !is_settled {
            return;
        }
        let mut current = 0;
        let mut marked = 0;
        let mut gone = 0;
        for disk in &self.record.in_sync {
            let member = self.member(*disk).expect("every replica is a member");
            match &member.state {
                MemberState::Current => current += 1,
                MemberState::Syncing(sync) if sync.has_begun() => marked += 1,
                _ if member.is_gone() => gone += 1,
                _ => {}
            }
        }
        let in_sync = self.record.in_sync.len();
        self.is_streaming = current >= self.record.write_quorum() && current + marked == in_sync;
        let is_all_there_is = current + gone == in_sync || self.is_patience_over();
        if self.is_streaming || (current > 0 && is_all_there_is) {
            self.phase = WriterPhase::Open;
        }
    }
}
