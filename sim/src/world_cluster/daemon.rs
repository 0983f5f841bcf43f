//! What a daemon does around the cores: where effects go, what the control store said, disks that come and go.

use std::time::Duration;

use replication::ToReplica;
use types::{DiskId, HeapBlock, Incarnation, Instant, RequestId, VdiId};
use vdi::{Effect, Event, Notice, Outcome, Vdi, VdiError, VdiSpec};

use super::machine::{Daemon, FROM_LINK, Open};
use super::records::{Ask, Refused, Said, host_id};
use super::{At, World};
use crate::trace::tell;

/// A few times a second.
const TICK: Duration = Duration::from_millis(200);

impl World {
    pub(super) fn local(&self, at: At) -> Instant {
        self.machines[at].clock.at(self.now)
    }

    pub(super) fn daemon(&mut self, at: At) -> &mut Daemon {
        self.machines[at]
            .daemon
            .as_mut()
            .expect("a daemon that does something runs")
    }

    fn ask(&mut self, at: At, ask: Ask) {
        self.records.ask(at, self.machines[at].life, ask);
    }

    /// The process starts. It serves nothing before the control store has answered.
    pub(super) fn start_daemon(&mut self, at: At) {
        let now = self.local(at);
        let hosts = self.machines.len();
        let machine = &mut self.machines[at];
        machine.life += 1;
        machine.is_off = false;
        machine.daemon = Some(Daemon::new(at, hosts, machine.disks.len(), now));
        tell(|| format!("  host {at} starts"));
    }

    /// One turn of a host's loop.
    pub(super) fn host_turn(&mut self, at: At) {
        if self.machines[at].frozen_until > self.now {
            return;
        }
        if self.machines[at].daemon.is_none() {
            if self.machines[at].starts_at <= self.now {
                self.start_daemon(at);
            }
            return;
        }
        let now = self.local(at);
        self.say_word(at, now);
        if !self.machines[at].has_joined() {
            return;
        }
        self.look(at);
        self.turn_disks(at, now);
        self.tick_vdis(at, now);
        self.dial_peers(at, now);
        self.beat(at, now);
        self.flush_streams(at);
    }

    /// To the control store: that it starts, that it lives.
    fn say_word(&mut self, at: At, now: Instant) {
        let daemon = self.daemon(at);
        if daemon.is_asking || daemon.next_word > now {
            return;
        }
        daemon.is_asking = true;
        let ask = match daemon.lease {
            Some(lease) => Ask::StayAlive {
                incarnation: daemon.incarnation,
                lease,
            },
            None => Ask::Start,
        };
        self.ask(at, ask);
    }

    /// Another host may write a VDI now that is open here.
    fn look(&mut self, at: At) {
        if !self.rng.chance(1, self.hearing[at]) || !self.records.hear(at) {
            return;
        }
        let control = self.records.of(at);
        let open: Vec<(VdiId, u64)> = self
            .daemon(at)
            .vdis
            .iter()
            .map(|(id, open)| (*id, open.incarnation))
            .collect();
        for (id, ours) in open {
            let writer = control.writer(id).expect("what was heard is there");
            if writer.is_some_and(|writer| writer.incarnation.0 > ours) {
                tell(|| format!("  host {at} hears that it writes VDI {id} no more"));
                self.close_vdi(at, id);
            }
        }
    }

    pub(super) fn close_vdi(&mut self, at: At, id: VdiId) {
        self.daemon(at).vdis.remove(&id);
        self.drives.get_mut(&id).expect("a drive").guests.closed(at);
        self.guest_leaves(at, id);
    }

    /// The guest of a VDI at this host is gone.
    pub(super) fn guest_leaves(&mut self, at: At, id: VdiId) {
        if let Some(guest) = self.machines[at].guests.remove(&id) {
            tell(|| format!("  guest {guest} of VDI {id} is gone from host {at}"));
            let is_open = self.machines[at].open(id).is_some();
            let guests = &mut self.drives.get_mut(&id).expect("a drive").guests;
            if is_open {
                guests.leaves(guest, at);
            } else {
                guests.gone(guest);
            }
        }
    }

    fn guest_comes(&mut self, at: At, id: VdiId) {
        self.guest_leaves(at, id);
        let drive = self.drives.get_mut(&id).expect("a drive");
        let guest = drive.guests.attach();
        drive.at = Some(at);
        drive.moving = None;
        self.summary.attachments += 1;
        self.machines[at].guests.insert(id, guest);
        tell(|| format!("  guest {guest} of VDI {id} begins at host {at}"));
    }

    fn turn_disks(&mut self, at: At, now: Instant) {
        for no in 0..self.machines[at].disks.len() {
            let is_tick = self.rng.chance(1, 8);
            let machine = &mut self.machines[at];
            let disk = machine.disks[no].id;
            if machine.disks[no].node.is_none() {
                let daemon = machine.daemon.as_mut().expect("it runs");
                if daemon.opens_at[no] <= now {
                    if machine.disks[no].newer.is_some() && self.is_only_copy(disk) {
                        self.machines[at].disks[no].put_newer_back();
                    }
                    self.machines[at].disks[no].start();
                    tell(|| format!("  disk {disk} is up"));
                    self.drop_leftovers(at, no);
                    self.disk_state(at, disk, true);
                }
                continue;
            }
            machine.disks[no].turn(now, is_tick);
            if machine.disks[no].has_failed {
                self.disk_failed(at, no);
                continue;
            }
            for answer in self.machines[at].disks[no].take_answers() {
                if answer.id.0 & FROM_LINK == 0 {
                    self.step_vdi(at, answer.shard.vdi, Event::Replica(answer));
                } else {
                    self.reply(at, answer);
                }
            }
        }
        while let Some((no, message)) = self.daemon(at).inbox.pop_front() {
            self.machines[at].disks[no].receive(now, message);
        }
    }

    /// A disk of this host came or went: its streams and its VDIs are told.
    pub(super) fn disk_state(&mut self, at: At, disk: DiskId, is_up: bool) {
        for id in self.served_by(at) {
            let end = self
                .end_of(id, super::streams::Side::Server)
                .expect("just listed");
            end.unreach(disk);
            if is_up {
                end.reach(disk);
            }
        }
        if !is_up {
            self.daemon(at).ways.retain(|_, way| way.disk != disk);
        }
        self.tell_vdis(at, disk, is_up);
    }

    pub(super) fn tell_vdis(&mut self, at: At, disk: DiskId, is_up: bool) {
        let open: Vec<VdiId> = self.daemon(at).vdis.keys().copied().collect();
        for id in open {
            self.step_vdi(at, id, Event::DiskState { disk, is_up });
        }
    }

    /// The disk is not served any more, and is opened again later.
    pub(super) fn disk_leaves(&mut self, at: At, no: usize, is_power_loss: bool, pause: Duration) {
        let now = self.local(at);
        let machine = &mut self.machines[at];
        let disk = machine.disks[no].id;
        if machine.disks[no].node.is_some() {
            machine.disks[no].stop(is_power_loss);
        }
        let daemon = machine.daemon.as_mut().expect("it runs");
        daemon.opens_at[no] = now + pause;
        daemon.inbox.retain(|(to, _)| *to != no);
        tell(|| format!("  disk {disk} is down"));
        self.disk_state(at, disk, false);
    }

    fn disk_failed(&mut self, at: At, no: usize) {
        let id = self.machines[at].disks[no].id;
        assert_eq!(self.failing, Some(id), "disk {id} failed of itself");
        self.machines[at].disks[no]
            .disk
            .set_faults(crate::Faults::default());
        let pause = Duration::from_millis(self.rng.between(1, 2000));
        self.disk_leaves(at, no, false, pause);
    }

    fn tick_vdis(&mut self, at: At, now: Instant) {
        let is_due = |open: &mut Open| {
            let is_due = open.next_tick <= now;
            if is_due {
                open.next_tick = now + TICK;
            }
            is_due && open.vdi.is_busy()
        };
        let vdis = self.daemon(at).vdis.iter_mut();
        let due: Vec<VdiId> = vdis
            .filter_map(|(id, open)| is_due(open).then_some(*id))
            .collect();
        for id in due {
            self.step_vdi(at, id, Event::Tick);
        }
    }

    pub(super) fn step_vdi(&mut self, at: At, id: VdiId, event: Event<HeapBlock>) {
        let now = self.local(at);
        // Answers to a VDI that was closed meanwhile have nobody to go to.
        let Some(open) = self.daemon(at).vdis.get_mut(&id) else {
            return;
        };
        let mut effects = Vec::new();
        let incarnation = open.incarnation;
        let had_quorum = open.vdi.status().shards_waiting == 0;
        open.vdi.step(now, event, &mut effects);
        let has_quorum = had_quorum && open.vdi.status().shards_waiting == 0;
        for effect in effects {
            match effect {
                Effect::Done(request, result) => {
                    self.answered(at, id, incarnation, request, result, has_quorum);
                }
                Effect::Send(disk, message) => self.post(at, disk, message),
                Effect::SaveRecord(record) => {
                    tell(|| format!("    host {at} saves {}", short(&record)));
                    self.ask(at, Ask::Save { record, incarnation });
                }
                Effect::Notice(notice) => self.noticed(at, id, incarnation, &notice),
            }
        }
    }

    fn answered(
        &mut self,
        at: At,
        id: VdiId,
        incarnation: u64,
        request: RequestId,
        result: Result<Outcome<HeapBlock>, VdiError>,
        has_quorum: bool,
    ) {
        let drive = self.drives.get_mut(&id).expect("a drive");
        match drive.guests.answered(request, result, has_quorum) {
            Ok(is_flushed) => self.told(id, is_flushed),
            Err(VdiError::Closed) => {
                self.assert_overtaken(at, id, incarnation, "answers that the disk is closed");
                self.guest_leaves(at, id);
            }
            Err(error) => panic!("host {at}: request {request} of VDI {id} failed: {error}"),
        }
    }

    /// Whoever is fenced has a successor in the records.
    fn assert_overtaken(&self, at: At, id: VdiId, incarnation: u64, what: &str) {
        let writer = self.records.writer(id).expect("somebody writes it");
        assert!(
            writer.host != host_id(at) || writer.incarnation.0 != incarnation,
            "host {at} {what}, and it writes VDI {id} with incarnation {incarnation}"
        );
    }

    fn noticed(&mut self, at: At, id: VdiId, incarnation: u64, notice: &Notice) {
        tell(|| format!("    host {at} notice {notice:?}"));
        match notice {
            Notice::Fenced { .. } => {
                self.summary.fenced += 1;
                self.assert_overtaken(at, id, incarnation, "is fenced");
            }
            Notice::Repaired { .. } | Notice::Unreadable { .. } => {
                panic!("host {at}: {notice:?}, and nothing was damaged")
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
                let drive = self.drives.get_mut(&id).expect("a drive");
                drive.last_scrub = Some((*repaired, *unreadable));
            }
            _ => {}
        }
    }

    /// A writer's message on its way to a disk, here or elsewhere.
    fn post(&mut self, at: At, disk: DiskId, message: ToReplica<HeapBlock>) {
        let Some((home, no)) = self.homes.get(&disk).copied() else {
            return;
        };
        tell(|| format!("    host {at} to disk {disk}: {}", short(&message)));
        if home != at {
            self.request(at, home, disk, message);
        } else if self.machines[at].disks[no].node.is_some() {
            self.daemon(at).inbox.push_back((no, message));
        }
    }

    /// What the control store answered.
    pub(super) fn said(&mut self, at: At, said: Said) {
        let now = self.local(at);
        match said {
            Said::Started {
                incarnation,
                lease,
                written_here,
            } => {
                let daemon = self.daemon(at);
                daemon.incarnation = incarnation;
                daemon.lease = Some(lease);
                daemon.words_again(now);
                let pauses: Vec<u64> = (0..daemon.opens_at.len())
                    .map(|_| self.rng.pick(&[0, 0, 20, 800]))
                    .collect();
                let daemon = self.daemon(at);
                for (opens_at, pause) in daemon.opens_at.iter_mut().zip(pauses) {
                    *opens_at = now + Duration::from_millis(pause);
                }
                let guests: Vec<VdiId> = self.machines[at].guests.keys().copied().collect();
                for id in guests.into_iter().filter(|id| !written_here.contains(id)) {
                    self.guest_leaves(at, id);
                }
                for vdi in written_here {
                    let incarnation = Some(incarnation);
                    self.ask(at, Ask::Take { vdi, incarnation });
                }
            }
            Said::Alive { lease } => {
                let daemon = self.daemon(at);
                daemon.lease = Some(lease);
                daemon.words_again(now);
            }
            Said::Taken {
                incarnation,
                record,
                shards,
                sharing,
            } => {
                let id = record.id;
                if self.machines[at]
                    .open(id)
                    .is_some_and(|open| open.incarnation >= incarnation)
                {
                    return;
                }
                if self.machines[at].open(id).is_some() || record.attachments.is_empty() {
                    self.close_vdi(at, id);
                }
                let spec = VdiSpec {
                    sharing,
                    ..self.drives[&id].spec.clone()
                };
                // Before it is asked who can be reached: it may change that.
                self.taken(id, at);
                let up = self.reached_from(at);
                let vdi = Vdi::new(spec, shards, Incarnation(incarnation), up);
                tell(|| format!("  host {at} opens VDI {id} with incarnation {incarnation}"));
                let is_attached = !record.attachments.is_empty();
                let open = Open {
                    vdi,
                    incarnation,
                    next_tick: now + TICK,
                    record: Some(record),
                };
                self.daemon(at).vdis.insert(id, open);
                let far: Vec<DiskId> = self
                    .homes
                    .iter()
                    .filter(|(_, home)| home.0 != at)
                    .map(|(d, _)| *d)
                    .collect();
                for disk in far {
                    self.step_vdi(at, id, Event::Distance { disk, is_far: true });
                }
                self.opened(at, id, is_attached);
            }
            Said::Door { vdi, is_open } => {
                if self.machines[at].open(vdi).is_none() {
                    return;
                }
                if is_open {
                    self.guest_comes(at, vdi);
                } else {
                    self.guest_leaves(at, vdi);
                    self.door_closed(vdi);
                }
            }
            Said::Saved { incarnation, record } => {
                let id = record.shard.vdi;
                if self.machines[at]
                    .open(id)
                    .is_some_and(|open| open.incarnation == incarnation)
                {
                    let shard = record.shard.no;
                    self.step_vdi(at, id, Event::RecordSaved { shard, record });
                }
            }
            Said::Not { asked, why } => self.refused(at, now, asked, &why),
        }
    }

    /// A VDI was just opened: its guest goes on, or another begins, or it waits for one.
    fn opened(&mut self, at: At, id: VdiId, is_attached: bool) {
        if !is_attached {
            let is_wanted = self.drives[&id]
                .moving
                .as_ref()
                .is_some_and(|moving| moving.to == at);
            if is_wanted {
                self.open_door(at, id);
            }
            return;
        }
        let Some(guest) = self.machines[at].guests.get(&id).copied() else {
            return self.guest_comes(at, id);
        };
        for (request, op) in self.drives[&id].guests.replay(guest) {
            self.step_vdi(at, id, Event::Request(request, op));
        }
    }

    /// Asks the control store to let guests in.
    pub(super) fn open_door(&mut self, at: At, id: VdiId) {
        let open = self.daemon(at).vdis.get_mut(&id).expect("open");
        let record = open.record.take();
        self.ask(
            at,
            Ask::Door {
                vdi: id,
                record,
                is_open: true,
            },
        );
    }

    /// Asks the control store for the VDI.
    pub(super) fn take(&mut self, at: At, vdi: VdiId) {
        self.ask(
            at,
            Ask::Take {
                vdi,
                incarnation: None,
            },
        );
    }

    pub(super) fn close_door(&mut self, at: At, id: VdiId) {
        self.ask(
            at,
            Ask::Door {
                vdi: id,
                record: None,
                is_open: false,
            },
        );
    }

    fn refused(&mut self, at: At, now: Instant, asked: Ask, why: &Refused) {
        match asked {
            Ask::Start | Ask::StayAlive { .. } => {
                let daemon = self.daemon(at);
                daemon.is_asking = false;
                daemon.next_word = now + Duration::from_millis(500);
            }
            Ask::Save {
                ref record,
                incarnation,
            } => {
                let id = record.shard.vdi;
                if self.machines[at]
                    .open(id)
                    .is_none_or(|open| open.incarnation != incarnation)
                {
                    return;
                }
                match why {
                    Refused::Unheard => self.records.ask_later(at, self.machines[at].life, asked),
                    Refused::NotTheWriter => self.close_vdi(at, id),
                    Refused::Other(why) => panic!("host {at}: {asked:?} was refused: {why}"),
                }
            }
            Ask::Take {
                vdi,
                incarnation: Some(_),
            } if *why == Refused::Unheard => {
                // The daemon starts: it asks until it is told.
                let incarnation = Some(self.daemon(at).incarnation);
                self.records
                    .ask_later(at, self.machines[at].life, Ask::Take { vdi, incarnation });
            }
            Ask::Take { vdi, incarnation } => {
                if incarnation.is_some() {
                    self.guest_leaves(at, vdi);
                }
                self.try_again(vdi, at);
            }
            Ask::Door { vdi, .. } => self.try_again(vdi, at),
        }
    }
}

/// For the story: without the zeros of small ids.
pub(super) fn short(message: &impl std::fmt::Debug) -> String {
    let mut text = format!("{message:?}").replace("00000000-0000-0000-0000-0000000000", "#");
    text.truncate(text.floor_char_boundary(260));
    text
}
