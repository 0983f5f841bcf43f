//! Changes of the shard's record: who leaves the in-sync set, who joins it, which disk replaces which.

use types::{DiskId, Instant, Payload, Seq};

use super::{Effects, Member, MemberState, Purpose, Writer, WriterEffect, WriterNotice, WriterPhase};
use crate::message::ReplicaRequest;
use crate::record::{ENDED_MAX, EpochEnd, ShardRecord};

/// A change of the record that was asked for.
#[derive(Clone, Debug, Hash)]
pub(super) struct Saving {
    pub record: ShardRecord,
    pub said_at: Instant,
}

/// A disk that takes another's place.
///
/// While the old one is in sync the new one is filled beside the record, as a newcomer: it gets the stream and counts for
/// nothing, and takes the place when it holds everything completed. So the shard has as many good copies all the
/// time. A place whose disk is gone, or behind, is given away at once, and filled as any replica that is behind.
#[derive(Clone, Copy, Debug, Hash)]
pub(super) struct Replace {
    old: DiskId,
    new: DiskId,
    /// Nothing of an earlier stay is left on the new disk.
    is_clean: bool,
}

/// Replacements under way at once: there are three places.
const REPLACES_MAX: usize = 3;

impl<B: Payload> Writer<B> {
    /// The in-sync set is never made smaller than this.
    pub(super) fn least_in_sync(&self) -> usize {
        if self.record.replicas.len() == 3 { 2 } else { 1 }
    }

    /// Whether the record names members in sync that are gone and that the shard can do without.
    pub(super) fn wants_removal(&self) -> bool {
        let gone = self.gone().count();
        gone > 0 && self.record.in_sync.len() - gone >= self.least_in_sync()
    }

    fn gone(&self) -> impl Iterator<Item = DiskId> {
        let is_gone = |disk: &&DiskId| self.member(**disk).is_none_or(Member::is_gone);
        self.record.in_sync.iter().filter(is_gone).copied()
    }

    /// Asks for the next change of the record, when one is due and safe; one at a time.
    pub(super) fn plan(&mut self, effects: &mut Effects<B>) {
        if self.saving.is_some() {
            return;
        }
        let mut next = self.record.clone();
        if self.chosen.is_some() {
            self.plan_ended(&mut next);
            self.plan_additions(&mut next);
            self.plan_removals(&mut next);
            self.plan_replace(&mut next);
            // Once in a shard's life, and only for those that are written: attaching stays one swap.
            next.was_written |= self.waiting.iter().any(|(_, op)| op.is_stream());
            let is_whole = next.replicas.iter().all(|disk| self.is_whole(*disk));
            if next.in_sync.len() == next.replicas.len() && is_whole {
                next.ended.clear();
            }
        } else if self.wants_epoch {
            // A change there must be, and a lowest end is always right; comparing everything is the price of a disaster.
            self.push_ended(&mut next, Seq(0));
        } else if let Some(end) = self.fork {
            self.push_ended(&mut next, end);
        }
        if next != self.record || self.wants_mark() {
            next.epoch.0 += 1;
            next.saved_by = self.incarnation;
            self.saving = Some(Saving {
                record: next.clone(),
                said_at: self.now,
            });
            self.leases.forget();
            effects.push(WriterEffect::SaveRecord(next));
        }
        let wants_change = self.record.in_sync.len() < self.record.replicas.len()
            || self.gone().next().is_some()
            || !self.replaces.is_empty();
        if self.saving.is_none() && self.chosen.is_some() && wants_change {
            self.plan_flushes(effects);
        }
        self.readmit(effects);
    }

    fn plan_ended(&self, next: &mut ShardRecord) {
        if let Some(chosen) = self.lower_ended {
            for ended in &mut next.ended {
                ended.end = ended.end.min(chosen);
            }
        }
    }

    /// Whether a member holds everything completed.
    pub(super) fn is_whole(&self, disk: DiskId) -> bool {
        self.member(disk)
            .is_some_and(|member| member.is_current() && member.acked >= self.completed)
    }

    /// Whether the record may count on a member: it holds everything completed, and on stable media what flushes
    /// answered for. Those were promised by a quorum of the present record, which need not be one of the next.
    fn is_equal(&self, disk: DiskId) -> bool {
        self.is_whole(disk)
            && self
                .member(disk)
                .is_some_and(|member| member.durable >= self.flushed)
    }

    /// Makes those flush that could be counted on if they had.
    fn plan_flushes(&mut self, effects: &mut Effects<B>) {
        let newcomers = self.replaces.iter().map(|replace| replace.new);
        let lagging: Vec<DiskId> = (self.record.replicas.iter().copied())
            .chain(newcomers.filter(|disk| !self.record.replicas.contains(disk)))
            .filter(|disk| self.is_whole(*disk) && !self.is_equal(*disk))
            .collect();
        for disk in lagging {
            self.flush_for_plan(disk, effects);
        }
    }

    fn plan_additions(&self, next: &mut ShardRecord) {
        let order: Vec<DiskId> = next
            .replicas
            .iter()
            .copied()
            .filter(|disk| next.in_sync.contains(disk) || self.is_equal(*disk))
            .collect();
        if order.len() > next.in_sync.len() {
            next.in_sync = order;
        }
    }

    /// Those that are gone leave, once those that stay hold everything completed.
    fn plan_removals(&self, next: &mut ShardRecord) {
        let gone: Vec<DiskId> = self.gone().collect();
        if gone.is_empty() {
            return;
        }
        let stay: Vec<DiskId> = next
            .in_sync
            .iter()
            .copied()
            .filter(|disk| !gone.contains(disk))
            .collect();
        if stay.len() >= self.least_in_sync() && stay.iter().all(|disk| self.is_equal(*disk)) {
            self.push_ended(next, self.held_by(&stay));
            next.in_sync = stay;
        }
    }

    /// Up to where all of these hold the stream.
    fn held_by(&self, disks: &[DiskId]) -> Seq {
        let acked = |disk: &DiskId| self.member(*disk).map_or(Seq(0), |member| member.acked);
        disks.iter().map(acked).min().unwrap_or_default()
    }

    /// What a member that is not kept up may hold above `end` was perhaps never chosen.
    fn push_ended(&self, next: &mut ShardRecord, end: Seq) {
        if next.ended.len() == ENDED_MAX {
            // Only the lowest matters for whoever is out; keep that, and the newest.
            let lowest = next.ended.iter().map(|ended| ended.end).min().unwrap_or_default();
            next.ended.remove(0);
            next.ended[0].end = lowest;
        }
        next.ended.push(EpochEnd {
            epoch: self.record.epoch,
            end,
        });
    }

    /// The first replacement that can be made now.
    fn plan_replace(&self, next: &mut ShardRecord) {
        for replace in self.replaces.iter().filter(|replace| replace.is_clean) {
            if self.plan_one_replace(*replace, next) {
                return;
            }
        }
    }

    fn plan_one_replace(&self, replace: Replace, next: &mut ShardRecord) -> bool {
        let Replace { old, new, .. } = replace;
        let Some(place) = next.replicas.iter().position(|disk| *disk == old) else {
            return false;
        };
        let mut stay: Vec<DiskId> = next.in_sync.iter().copied().filter(|disk| *disk != old).collect();
        if next.replicas.contains(&new) {
            // A single replica that an earlier version had moved by way of two.
            let may_go = stay == [new] && self.is_equal(new);
            if may_go {
                next.replicas = stay.clone();
                next.in_sync = stay;
            }
            return may_go;
        }
        let is_counted_on = stay.len() < next.in_sync.len();
        if is_counted_on {
            stay.push(new);
        }
        if stay.len() < self.least_in_sync() || !stay.iter().all(|disk| self.is_equal(*disk)) {
            return false;
        }
        if is_counted_on {
            self.push_ended(next, self.held_by(&stay));
        }
        next.replicas[place] = new;
        let in_sync = next.replicas.iter().filter(|disk| stay.contains(disk));
        next.in_sync = in_sync.copied().collect();
        true
    }

    /// Members that were expelled and are out of the record, or that cannot be done without after all, begin again.
    fn readmit(&mut self, effects: &mut Effects<B>) {
        if self.saving.is_some() {
            return;
        }
        let wants_removal = self.wants_removal();
        let again: Vec<DiskId> = self
            .members
            .iter()
            .filter(|member| {
                matches!(member.state, MemberState::Expelled)
                    && self.takes_part(member.disk)
                    && (!self.record.in_sync.contains(&member.disk) || !wants_removal)
            })
            .map(|member| member.disk)
            .collect();
        for disk in again {
            self.lose(disk, effects);
            self.start_fence(disk, effects);
        }
    }

    pub(super) fn record_saved(&mut self, held: &ShardRecord, effects: &mut Effects<B>) {
        if matches!(self.phase, WriterPhase::Fenced | WriterPhase::Closed) || *held == self.record {
            return;
        }
        match self.saving.take() {
            Some(saving) if saving.record == *held => self.record_taken(saving.record, effects),
            _ if held.epoch > self.record.epoch => self.become_fenced(effects),
            // An old answer, or the store could not; the change is asked for again with patience.
            saving => self.saving = saving,
        }
    }

    fn record_taken(&mut self, record: ShardRecord, effects: &mut Effects<B>) {
        let before = std::mem::replace(&mut self.record, record);
        self.leases.forget();
        self.lower_ended = None;
        self.fork = None;
        self.wants_epoch = false;
        for disk in &before.in_sync {
            // One that gave its place away is no replica any more.
            if self.record.replicas.contains(disk) && !self.record.in_sync.contains(disk) {
                effects.push(WriterEffect::Notice(WriterNotice::Degraded { disk: *disk }));
            }
        }
        for disk in &self.record.in_sync {
            if !before.in_sync.contains(disk) {
                let moved_blocks = self.member(*disk).map_or(0, |member| member.moved_blocks);
                effects.push(WriterEffect::Notice(WriterNotice::Restored {
                    disk: *disk,
                    moved_blocks,
                }));
            }
        }
        // The new epoch goes ahead of everything else to everybody who has the old one; nothing waits for the
        // answers: the old promise keeps out everyone whom the new one does.
        let encoded = self.record.encode();
        for index in 0..self.members.len() {
            let member = &self.members[index];
            let disk = member.disk;
            if !member.is_up || !self.takes_part(disk) {
                continue;
            }
            match member.state {
                MemberState::Away => self.start_fence(disk, effects),
                // Fenced by `readmit`, unless it is still wanted.
                MemberState::Expelled => {}
                _ => {
                    let record = encoded.clone();
                    self.send(disk, Purpose::Refence, ReplicaRequest::Fence { record }, effects);
                }
            }
        }
        self.finish_replaces(effects);
    }

    /// Lets go of disks that are no longer in the record.
    fn finish_replaces(&mut self, effects: &mut Effects<B>) {
        let gone: Vec<DiskId> = self
            .replaces
            .iter()
            .map(|replace| replace.old)
            .filter(|old| !self.record.replicas.contains(old))
            .collect();
        self.replaces.retain(|replace| !gone.contains(&replace.old));
        for old in gone {
            let is_up = self.member(old).is_some_and(|member| member.is_up);
            self.lose(old, effects);
            self.members.retain(|member| member.disk != old);
            if is_up {
                self.send(old, Purpose::Drop, ReplicaRequest::Drop, effects);
            }
        }
    }

    pub(super) fn replace_disk(&mut self, old: DiskId, new: DiskId, effects: &mut Effects<B>) {
        let is_known = self
            .replaces
            .iter()
            .any(|replace| replace.old == old || replace.new == new);
        let has = |disk: &DiskId| self.record.replicas.contains(disk);
        // An earlier version moved a single replica by way of two; a daemon that died then left both in the record. The
        // new one was emptied before it came there, and may have been filled since.
        let is_half_done = has(&old) && has(&new) && old != new && self.record.replicas.len() == 2;
        let is_possible = has(&old) && !has(&new) || is_half_done;
        if matches!(self.phase, WriterPhase::Fenced | WriterPhase::Closed)
            || is_known
            || !is_possible
            || self.replaces.len() == REPLACES_MAX
        {
            return;
        }
        self.replaces.push(Replace {
            old,
            new,
            is_clean: is_half_done,
        });
        if is_half_done {
            if self.phase == WriterPhase::Idle {
                self.touch(effects);
            }
            return;
        }
        // The caller chose a disk that it can reach; if not, its failure comes as a DiskState.
        self.members.push(Member::new(new, true));
        if self.phase == WriterPhase::Idle {
            self.touch(effects);
        } else {
            self.clean(new, effects);
        }
    }

    /// Gives up replacements by a disk that takes no replicas any more. One whose change of the record is under way
    /// stays until that is answered: it may have been taken.
    pub(super) fn disk_leaves(
        &mut self,
        disk: DiskId,
        refused: Option<&ShardRecord>,
        effects: &mut Effects<B>,
    ) {
        let is_ending = matches!(self.phase, WriterPhase::Fenced | WriterPhase::Closed);
        if is_ending || self.record.replicas.contains(&disk) {
            return;
        }
        if let Some(saving) = &self.saving
            && saving.record.replicas.contains(&disk)
        {
            if refused != Some(&saving.record) {
                return;
            }
            self.saving = None;
        }
        let before = self.replaces.len();
        self.replaces.retain(|replace| replace.new != disk);
        if self.replaces.len() < before {
            let is_up = self.member(disk).is_some_and(|member| member.is_up);
            self.lose(disk, effects);
            self.members.retain(|member| member.disk != disk);
            if is_up {
                // What it was filled with so far.
                self.send(disk, Purpose::Drop, ReplicaRequest::Drop, effects);
            }
        }
    }

    /// Empties a disk that is to become a replica: what an earlier stay left behind could be mistaken for content.
    pub(super) fn clean(&mut self, disk: DiskId, effects: &mut Effects<B>) {
        let is_wanted = self
            .replaces
            .iter()
            .any(|replace| replace.new == disk && !replace.is_clean);
        if is_wanted {
            self.send(disk, Purpose::Clean, ReplicaRequest::Drop, effects);
        }
    }

    /// A newcomer is empty, and is filled from here on.
    pub(super) fn cleaned(&mut self, disk: DiskId, is_clean: bool, effects: &mut Effects<B>) {
        for replace in &mut self.replaces {
            if replace.new == disk {
                replace.is_clean |= is_clean;
            }
        }
        if self.takes_part(disk) {
            self.start_fence(disk, effects);
        }
    }

    /// Gets the stream, or is being prepared for it: a replica by the record, or an emptied newcomer.
    pub(super) fn takes_part(&self, disk: DiskId) -> bool {
        let is_newcomer = |replace: &Replace| replace.new == disk && replace.is_clean;
        self.record.replicas.contains(&disk) || self.replaces.iter().any(is_newcomer)
    }
}
