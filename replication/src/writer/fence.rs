//! Taking the shard over: fence, choose where the past ends, open.
//!
//! A seq must never be given twice, not even when the first use reached one replica only and that replica cannot
//! be asked now. The first seq of a life is therefore above every end reported (next multiple of 2^40), plus
//! the low bits of epoch and incarnation (times 2^24), which differ between lives that were told the same ends: such
//! a life completed nothing, so it used fewer than [`WINDOW_ENTRIES`](super::WINDOW_ENTRIES) numbers.

use types::{DiskId, Payload, Seq};

use super::{Effects, Member, MemberState, PATIENCE, Purpose, Report, Writer, WriterPhase};
use crate::message::{Refusal, ReplicaReply, ReplicaRequest};

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
                let is_past = report.end == chosen && !self.is_mixed;
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
            self.is_mixed = false;
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
        if self.chosen.is_some() {
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
        if answered < self.record.fence_quorum() || (answered < up && !self.is_patience_over()) {
            return;
        }
        let (source, best) = *counted()
            .max_by_key(|(_, report)| (report.good(), report.is_whole()))
            .expect("a quorum is at least one");
        let chosen = best.good();
        let furthest = reports
            .iter()
            .map(|(_, report)| report.end)
            .max()
            .unwrap_or(chosen);
        let first = self.first_seq(furthest.max(chosen).max(self.last_seq));
        self.chosen = Some((chosen, first));
        self.last_seq = chosen;
        self.completed = chosen;
        self.lower_ended = self.record.ended.iter().any(|ended| ended.end > chosen);
        if !best.is_whole() {
            // The best there is was being caught up itself: it is the truth now, once it says so durably. The
            // others are compared with it even where their ends are the same.
            self.is_mixed = true;
            self.settle_source(source, effects);
        }
    }

    fn first_seq(&self, above: Seq) -> Seq {
        let lives = (self.record.epoch.0.wrapping_add(self.incarnation.0)) & 0xffff;
        let generation = (above.0 >> 40) + 1;
        Seq((generation << 40) + (lives << 24) + 1)
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
            if !self.record.replicas.contains(&disk) {
                continue;
            }
            let is_past = report.end == chosen && !self.is_mixed;
            let is_ours = is_past || (report.end >= first && report.end <= self.last_seq);
            if self.is_in_sync(disk) && report.is_whole() && is_ours && report.end >= self.completed {
                self.make_current(disk, report.end, effects);
                self.rejoin(disk, report.end, effects);
            } else {
                let since = self.good_since(disk, report);
                self.start_sync(disk, since, effects);
            }
        }
    }

    /// Up to which seq a replica's content is certainly the chosen one.
    fn good_since(&self, disk: DiskId, report: Report) -> Seq {
        let (chosen, first) = self.chosen.expect("called when chosen");
        let mut since = report.good();
        if since > chosen && since < first {
            since = chosen;
        }
        since = since.min(self.last_seq);
        if !self.is_in_sync(disk) {
            // It left at one of these ends; without one nobody knows where.
            let ended = self.record.ended.iter().map(|ended| ended.end).min();
            since = since.min(ended.unwrap_or(Seq(0)));
        }
        since
    }

    /// Opens when what the record names in sync is equal, or will be without doubt, or cannot be had.
    pub(super) fn open(&mut self, effects: &mut Effects<B>) {
        if self.phase != WriterPhase::Opening || self.chosen.is_none() || self.saving.is_some() {
            return;
        }
        if self.lower_ended || self.wants_removal() {
            return;
        }
        let mut current = 0;
        let mut syncing = 0;
        for disk in &self.record.in_sync {
            let member = self.member(*disk).expect("every replica is a member");
            match &member.state {
                MemberState::Current => current += 1,
                MemberState::Syncing(sync) if sync.has_begun() => syncing += 1,
                _ if member.is_gone() || self.is_patience_over() => {}
                _ => return,
            }
        }
        let is_open = current >= self.record.write_quorum() || (current > 0 && syncing == 0);
        if is_open {
            self.phase = WriterPhase::Open;
            self.complete(effects);
        }
    }
}
