//! The daemon around the open VDI: where its effects go, who holds the records, and the one that was taken over.

use edge::Network;
use replication::{FromReplica, ShardRecord, ToReplica};
use types::{DiskId, HeapBlock, Incarnation, ShardNo};
use vdi::{Effect, Event, Notice, Vdi};

use super::{Ballast, ID, Message, Place, Profile, World};
use crate::trace::tell;

impl World {
    pub(super) fn open(&mut self) {
        self.incarnation += 1;
        self.guest.daemon_gone();
        let up = self.up();
        let records = self.records.values().cloned().collect();
        tell(|| format!("open, incarnation {}, up {up:?}", self.incarnation));
        self.vdi = Some(Vdi::new(
            self.spec.clone(),
            records,
            Incarnation(self.incarnation),
            up,
        ));
        for (id, op) in self.guest.replay() {
            self.step(Event::Request(id, op));
        }
        self.open_ballast();
    }

    pub(super) fn up(&self) -> Vec<DiskId> {
        let up = (0..self.hosts.len()).filter(|i| self.is_linked[*i]);
        up.map(|i| self.hosts[i].id).collect()
    }

    pub(super) fn vdi(&self) -> &Vdi<HeapBlock> {
        self.vdi.as_ref().expect("open")
    }

    pub(super) fn step(&mut self, event: Event<HeapBlock>) {
        let mut effects = Vec::new();
        let vdi = self.vdi.as_mut().expect("open");
        let had_quorum = vdi.status().shards_waiting == 0;
        vdi.step(self.now, event, &mut effects);
        let has_quorum = had_quorum && vdi.status().shards_waiting == 0;
        self.guest.may_see_errors =
            (0..self.records.len()).any(|no| self.is_somebody_away(ShardNo(no as u32)));
        for effect in effects {
            match effect {
                Effect::Done(id, result) => self.guest.answered(id, result, has_quorum),
                Effect::Send(disk, message) => self.send(self.incarnation, disk, message),
                Effect::SaveRecord(record) => {
                    tell(|| format!("    save {record:?}"));
                    self.saves.push_back((self.incarnation, record));
                }
                Effect::Notice(notice) => self.noticed(&notice),
            }
        }
    }

    /// What the daemon does that was taken over: its completions count, its complaints do not.
    pub(super) fn step_zombie(&mut self, event: Event<HeapBlock>) {
        let Some((incarnation, vdi)) = &mut self.zombie else {
            return;
        };
        let incarnation = *incarnation;
        let mut effects = Vec::new();
        vdi.step(self.now, event, &mut effects);
        for effect in effects {
            match effect {
                Effect::Done(id, result) => self.guest.answered_by_zombie(id, result.is_ok()),
                Effect::Send(disk, message) => self.send(incarnation, disk, message),
                Effect::SaveRecord(record) => self.saves.push_back((incarnation, record)),
                Effect::Notice(notice) => tell(|| format!("    zombie notice {notice:?}")),
            }
        }
    }

    pub(super) fn send(&mut self, from: u64, disk: DiskId, message: ToReplica<HeapBlock>) {
        let Some(at) = self.hosts.iter().position(|host| host.id == disk) else {
            return;
        };
        if self.is_linked[at] {
            tell(|| format!("    to {disk}: {}", short(&message)));
            self.net
                .send(Place::Writer(from), Place::Disk(at), Message::To(message));
        }
    }

    pub(super) fn noticed(&mut self, notice: &Notice) {
        tell(|| format!("    notice {notice:?}"));
        match notice {
            Notice::Repaired { blocks, disk, .. } => {
                assert!(
                    self.summary.rotten > 0 || self.profile == Profile::Lying,
                    "{blocks} blocks of disk {disk} were repaired and nothing was damaged"
                );
                self.summary.repaired += blocks;
            }
            Notice::Restored { moved_blocks, .. } => self.summary.resynced += moved_blocks,
            Notice::Degraded { .. } => self.summary.degraded += 1,
            Notice::Scrub {
                done,
                total,
                repaired,
                unreadable,
                ..
            } if done == total => {
                self.summary.scrubs += 1;
                self.last_scrub = Some((*repaired, *unreadable));
            }
            // The damaged disk and another that is away, or not in sync again, are two faults.
            Notice::Unreadable { shard, offset } => assert!(
                self.is_somebody_away(*shard),
                "shard {shard} offset {offset} is unreadable and there is a good copy; disk {} is damaged, {:?}",
                self.hosts[self.victim].id,
                self.records[shard]
            ),
            Notice::Fenced { shard } => panic!("shard {shard} is fenced and nobody else writes it"),
            _ => {}
        }
    }

    /// Whether damage was done and a replica of the shard that has the good copy cannot be reached, or is not in sync: it
    /// was away, and what it holds of the block may be older.
    pub(super) fn is_somebody_away(&self, shard: ShardNo) -> bool {
        let replicas = &self.records[&shard].replicas;
        let is_away = |at: usize| !self.is_linked[at] && replicas.contains(&self.hosts[at].id);
        // In the writer's eyes: it may not have heard yet that the record was saved.
        let is_behind = self.vdi.as_ref().is_some_and(|vdi| {
            let status = vdi.status();
            status.shards_whole < status.shards
        });
        let may_be = self.summary.rotten > 0 || self.profile == Profile::Lying;
        may_be && (is_behind || (0..self.hosts.len()).any(|at| at != self.victim && is_away(at)))
    }

    /// The control store takes or refuses the oldest record that was sent.
    pub(super) fn save_one(&mut self) -> Option<(u64, ShardRecord)> {
        let (from, sent) = self.saves.pop_front()?;
        let records = if sent.shard.vdi == ID {
            &mut self.records
        } else {
            // What was asked for a VDI that is deleted by now is nobody's.
            let is_its = |ballast: &&mut Ballast| ballast.id() == sent.shard.vdi;
            &mut self.ballast.as_mut().filter(is_its)?.records
        };
        let held = records.get_mut(&sent.shard.no).expect("a record of every shard");
        if held.epoch.0 + 1 == sent.epoch.0 {
            *held = sent;
        }
        Some((from, held.clone()))
    }
    /// The guest of the daemon that was taken over goes on for a while.
    pub(super) fn zombie_lives(&mut self) {
        if self.rng.chance(1, 4)
            && let Some((id, op)) = self.guest.zombie_asks()
        {
            self.step_zombie(Event::Request(id, op));
        }
        if self.rng.chance(1, 400) {
            self.end_zombie();
        }
    }

    pub(super) fn end_zombie(&mut self) {
        if let Some((incarnation, _)) = self.zombie.take() {
            tell(|| format!("  the zombie {incarnation} is gone"));
            for at in 0..self.hosts.len() {
                self.net.break_link(Place::Writer(incarnation), Place::Disk(at));
            }
            self.saves.retain(|(from, _)| *from != incarnation);
            self.guest.zombie_gone();
        }
    }

    /// Another daemon takes the VDI over, as control has it: every record by compare-and-swap, a new incarnation.
    pub(super) fn take_over(&mut self) {
        self.end_zombie();
        self.summary.takeovers += 1;
        let old = self.vdi.take().expect("open");
        self.zombie = Some((self.incarnation, old));
        for record in self.records.values_mut() {
            record.epoch.0 += 1;
        }
        tell(|| "  taken over".into());
        self.guest.taken_over();
        self.open();
    }
}

pub(super) fn short(message: &ToReplica<HeapBlock>) -> String {
    let mut text = format!(
        "{:?} {} {:?} {:?}",
        message.token, message.shard, message.id, message.request
    );
    text.truncate(220);
    text
}

pub(super) fn short_answer(answer: &FromReplica<HeapBlock>) -> String {
    let mut text = format!(
        "{:?} {} {:?} {:?}",
        answer.token, answer.shard, answer.id, answer.result
    );
    text.truncate(220);
    text
}
