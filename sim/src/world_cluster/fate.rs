//! What befalls the cluster. Each fault has a number and randomness of its own, so that a run that breaks a promise can be
//! tried again without it.
//!
//! A kind marked *alone* loses what was acknowledged: the cluster is whole before it and is made whole after it, because a
//! second fault on top of it is more than is promised. Where the power of single hosts goes at any time (`Power`), only
//! what was flushed is held to be there.

use std::time::Duration;

use types::VdiId;

use super::{At, MILLI, World};
use crate::Rng;
use crate::trace::tell;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Two hosts hear each other no more, or a host nobody.
    Cut,
    /// One way only.
    CutOneWay,
    /// Streams break and are made again.
    Break,
    Slow,
    /// Daemons die; the machines and their guests live on.
    Kill,
    /// Hosts lose power, some or all.
    Power,
    /// A host stands still: SIGSTOP, a paused machine.
    Freeze,
    /// A host reaches the control store no more, or does not get its answers.
    Control,
    /// Detached here, attached there.
    Move,
    /// Attached there as soon as it is let, while the old guest lives on and its host is cut off from the control store.
    TakeOver,
    /// A disk goes, and is opened again.
    DiskAway,
    /// A replica is to move to a disk of another host.
    Replace,
    /// An old copy of one disk, always the same one, is put in its place.
    OldCopy,
    /// Something else fills a disk, and is deleted after a while.
    Full,
    /// *Alone*: one host loses power.
    HostPower,
    /// *Alone*: writes or syncs of one disk fail.
    DiskFails,
}

/// What may befall this cluster.
#[derive(Clone, Debug)]
pub(super) struct Fate {
    kinds: Vec<Kind>,
}

const EVERYWHERE: [Kind; 13] = [
    Kind::Cut,
    Kind::CutOneWay,
    Kind::Break,
    Kind::Slow,
    Kind::Kill,
    Kind::Freeze,
    Kind::Control,
    Kind::Move,
    Kind::TakeOver,
    Kind::DiskAway,
    Kind::Replace,
    Kind::Full,
    Kind::Power,
];

/// A fault that waits for the worst moment: the one at which some guest has just been told that something is done.
#[derive(Clone, Debug)]
pub(super) struct Trap {
    kind: Kind,
    /// Not any guest, but one of this disk that is newer than this.
    newer_than: Option<(VdiId, u64)>,
    /// The host of the guest that was overtaken.
    from: At,
    rng: Rng,
    is_sprung: bool,
}

/// What ends of itself after a time.
#[derive(Clone, Copy, Debug)]
pub(super) enum Undo {
    Heal(At, At),
    Fast(At, At),
    ControlBack(At),
    AnswersBack(At),
    Empty(At, usize),
}

impl Fate {
    /// Some kinds, so that each meets each in some seeds and is by itself in others.
    pub fn choose(rng: &mut Rng, replicas: usize) -> Fate {
        let mut kinds: Vec<Kind> = EVERYWHERE.to_vec();
        rng.shuffle(&mut kinds);
        kinds.truncate(rng.between(1, 5) as usize);
        // Who lives on is what this world is for.
        kinds.push(Kind::TakeOver);
        if replicas > 1 && rng.chance(1, 4) {
            kinds.retain(|kind| *kind != Kind::Power);
            kinds.push(rng.pick(&[Kind::HostPower, Kind::DiskFails, Kind::OldCopy, Kind::OldCopy]));
            if kinds.contains(&Kind::OldCopy) {
                kinds.extend([Kind::Kill, Kind::Kill]);
            }
        }
        Fate { kinds }
    }
}

impl World {
    /// Fault number `no` of this run.
    pub(super) fn befall(&mut self, no: u32, rng: &mut Rng) {
        let kind = rng.pick(&self.fate.kinds);
        let pace = rng.pick(&[MILLI, MILLI, 10 * MILLI, 100 * MILLI, 400 * MILLI]);
        tell(|| format!("fault {no}: {kind:?}, at {} ms", self.now / MILLI));
        self.pace = pace;
        self.trap = None;
        if matches!(kind, Kind::Power | Kind::Kill | Kind::Cut | Kind::TakeOver) && rng.chance(1, 2) {
            self.trap = Some(Trap {
                kind,
                newer_than: None,
                from: 0,
                rng: rng.fork(),
                is_sprung: false,
            });
            return;
        }
        self.strike(kind, rng);
    }

    /// The newest guest of a disk was told that something is done; `is_flushed`: that it is on stable media.
    pub(super) fn told(&mut self, id: VdiId, is_flushed: bool) {
        let newest = self.drives[&id].guests.newest;
        if let Some(trap) = &mut self.trap {
            let is_awaited = trap
                .newer_than
                .is_none_or(|(of, guest)| of == id && newest > guest);
            trap.is_sprung |= is_awaited && (is_flushed || trap.kind != Kind::Power);
        }
    }

    /// What waited for a moment that has come.
    pub(super) fn spring(&mut self) {
        if let Some(mut trap) = self.trap.take_if(|trap| trap.is_sprung) {
            tell(|| format!("  now: {:?}", trap.kind));
            self.summary.traps += 1;
            if trap.newer_than.is_some() {
                return self.let_old_one_ask_first(&mut trap.rng, trap.from);
            }
            self.strike(trap.kind, &mut trap.rng);
        }
    }

    fn strike(&mut self, kind: Kind, rng: &mut Rng) {
        let at = rng.index(self.machines.len());
        let pause = rng.pick(&[20, 300, 2_000, 6_000, 12_000]) * MILLI;
        match kind {
            Kind::Cut => {
                let with = rng.index(self.machines.len());
                for other in 0..self.machines.len() {
                    if other != at && (with == at || with == other) {
                        self.cut(at, other, pause);
                        self.cut(other, at, pause);
                    }
                }
            }
            Kind::CutOneWay => {
                let with = rng.index(self.machines.len());
                let is_from = rng.chance(1, 2);
                for other in 0..self.machines.len() {
                    if other != at && (with == at || with == other) {
                        let (from, to) = if is_from { (at, other) } else { (other, at) };
                        self.cut(from, to, pause);
                    }
                }
            }
            Kind::Break => self.break_streams(rng),
            Kind::Slow => {
                let with = rng.index(self.machines.len());
                let most = rng.pick(&[20, 200, 1_500]) * MILLI;
                if with != at {
                    self.summary.slow += 1;
                    for (from, to) in [(at, with), (with, at)] {
                        self.streams.set_slow(from, to, Some(most));
                        self.undo.push((self.now + pause, Undo::Fast(from, to)));
                    }
                }
            }
            Kind::Kill => {
                let is_all = rng.chance(1, 4);
                for other in 0..self.machines.len() {
                    if is_all || other == at {
                        let pause = rng.pick(&[0, 100, 1_000, 7_000]) * MILLI;
                        self.kill(other, pause);
                    }
                }
            }
            Kind::Power => {
                let is_all = rng.chance(1, 2);
                for drive in self.drives.values_mut() {
                    drive.guests.lose_power();
                }
                for other in 0..self.machines.len() {
                    if is_all || other == at {
                        let pause = rng.pick(&[0, 100, 1_000, 7_000]) * MILLI;
                        self.lose_power(other, pause);
                    }
                }
            }
            Kind::Freeze => {
                self.summary.freezes += 1;
                self.machines[at].frozen_until = self.now + pause.min(7_000 * MILLI);
            }
            Kind::Control => self.lose_control(rng, at, pause),
            Kind::Move => {
                let ids: Vec<VdiId> = self.drives.keys().copied().collect();
                self.move_to(rng.pick(&ids), at);
            }
            Kind::TakeOver => self.take_over(rng, at),
            Kind::DiskAway => {
                let count = self.machines[at].disks.len();
                if self.machines[at].has_joined() && count > 0 {
                    self.summary.disks_away += 1;
                    self.disk_leaves(at, rng.index(count), false, Duration::from_nanos(pause));
                }
            }
            Kind::Replace => self.replace_disk(rng),
            Kind::OldCopy => self.put_old_copy_back(rng),
            Kind::Full => self.fill_disk(rng, pause),
            Kind::HostPower => {
                self.become_whole();
                self.live(rng.below(20));
                self.lose_power(at, pause);
                self.live(rng.below(20));
                self.become_whole();
            }
            Kind::DiskFails => self.disk_fails(rng, at),
        }
    }

    fn cut(&mut self, from: At, to: At, pause: u64) {
        self.summary.cuts += 1;
        tell(|| format!("  cut from host {from} to {to} for {} ms", pause / MILLI));
        self.streams.cut(from, to);
        self.undo.push((self.now + pause, Undo::Heal(from, to)));
    }

    fn break_streams(&mut self, rng: &mut Rng) {
        let ids: Vec<u64> = self.streams.all.keys().copied().collect();
        let seldom = rng.between(1, 4);
        for id in ids {
            if rng.chance(1, seldom) {
                self.summary.breaks += 1;
                self.streams.break_stream(id);
            }
        }
    }

    fn kill(&mut self, at: At, pause: u64) {
        if self.machines[at].daemon.is_none() {
            return;
        }
        tell(|| format!("  the daemon of host {at} dies for {} ms", pause / MILLI));
        self.summary.kills += 1;
        self.drop_streams(at, false);
        self.stop_process(at, pause, false);
    }

    fn lose_power(&mut self, at: At, pause: u64) {
        tell(|| format!("  host {at} loses power for {} ms", pause / MILLI));
        self.summary.power_losses += 1;
        let guests: Vec<VdiId> = self.machines[at].guests.keys().copied().collect();
        for id in guests {
            self.guest_leaves(at, id);
        }
        self.drop_streams(at, true);
        self.stop_process(at, pause, true);
        self.machines[at].is_off = true;
        let now = self.now;
        self.machines[at].clock.restart(now, &mut self.rng);
    }

    fn stop_process(&mut self, at: At, pause: u64, is_power_loss: bool) {
        let now = self.now;
        let machine = &mut self.machines[at];
        machine.daemon = None;
        machine.starts_at = now + pause;
        machine.frozen_until = 0;
        for disk in &mut machine.disks {
            if disk.node.is_some() {
                disk.stop(is_power_loss);
            } else if is_power_loss {
                disk.disk.lose_power();
            }
        }
        self.records.forget(at);
        let ids: Vec<VdiId> = self.drives.keys().copied().collect();
        for id in ids {
            self.drives.get_mut(&id).expect("listed").guests.closed(at);
            self.try_again(id, at);
        }
    }

    fn lose_control(&mut self, rng: &mut Rng, at: At, pause: u64) {
        let is_all = rng.chance(1, 3);
        for other in 0..self.machines.len() {
            if !is_all && other != at {
                continue;
            }
            self.summary.control_away += 1;
            if rng.chance(1, 3) {
                self.records.set_loses_answers(other, true);
                self.undo.push((self.now + pause, Undo::AnswersBack(other)));
            } else {
                self.records.set_away(other, true);
                self.undo.push((self.now + pause, Undo::ControlBack(other)));
            }
        }
    }

    /// The host of some disk's guest is cut off from the control store, perhaps from other hosts too, for longer than its
    /// lease; the disk is attached elsewhere.
    fn take_over(&mut self, rng: &mut Rng, to: At) {
        let ids: Vec<VdiId> = self.drives.keys().copied().collect();
        let id = rng.pick(&ids);
        self.pace = rng.pick(&[10, 100, 400]) * MILLI;
        let mut is_watched = false;
        if let Some(from) = self.drives[&id].at.filter(|from| *from != to) {
            let pause = rng.pick(&[6_000, 8_000, 15_000]) * MILLI;
            match rng.below(5) {
                0 => {
                    self.summary.freezes += 1;
                    self.machines[from].frozen_until = self.now + pause;
                }
                how => {
                    self.summary.control_away += 1;
                    self.records.set_away(from, true);
                    self.undo.push((self.now + pause, Undo::ControlBack(from)));
                    for other in 0..self.machines.len() {
                        if other != from && (how == 1 || how == 2 && rng.chance(1, 2)) {
                            self.cut(from, other, pause);
                            self.cut(other, from, pause);
                        }
                    }
                    // Until then the old writer has everybody's word.
                    is_watched = how == 4;
                    self.cut_when_taken = (how > 2).then_some((id, from, is_watched));
                }
            }
        }
        if is_watched {
            self.attach(id, to);
            return self.watch_take_over(id);
        }
        if rng.chance(1, 3)
            && let Some(from) = self.drives[&id].at
        {
            self.trap = Some(Trap {
                kind: Kind::TakeOver,
                newer_than: Some((id, self.drives[&id].guests.newest)),
                from,
                rng: rng.fork(),
                is_sprung: false,
            });
        }
        self.attach(id, to);
    }

    /// Nothing else happens until the disk is taken, and while leases of its old writer last: both guests ask. Other
    /// faults would come long before a host's lease ends.
    fn watch_take_over(&mut self, id: VdiId) {
        self.pace = 100 * MILLI;
        while self.cut_when_taken.is_some() && self.drives[&id].moving.is_some() {
            if self.rng.chance(1, 8) {
                self.somebody_asks();
            }
            self.turn();
        }
        if self.cut_when_taken.is_some() {
            return;
        }
        self.summary.watched += 1;
        for _ in 0..300 {
            self.somebody_asks();
            self.turn();
        }
    }

    /// A disk was just taken by host `at`: its old host may hear no other host any more from now on.
    pub(super) fn taken(&mut self, id: VdiId, at: At) {
        let is_due = |(of, from, _): &mut (VdiId, At, bool)| *of == id && *from != at;
        let Some((_, from, is_heard)) = self.cut_when_taken.take_if(is_due) else {
            return;
        };
        for other in (0..self.machines.len()).filter(|other| *other != from) {
            self.cut(from, other, 8_000 * MILLI);
            self.cut(other, from, 8_000 * MILLI);
        }
        if is_heard {
            // The new writer does not wait for the old one's disk then, and the old one's leases are young.
            self.hang_up_on(from);
        }
        // Guests have time to ask before it passes.
        self.pace = 10 * MILLI;
    }

    /// The newer guest was told something, and now every daemon but the old one's starts again: what replicas remember of
    /// the newer writer is all that keeps the old one out.
    fn let_old_one_ask_first(&mut self, rng: &mut Rng, old: At) {
        for at in 0..self.machines.len() {
            self.streams.heal(at, old);
            self.streams.heal(old, at);
            if at != old {
                self.kill(at, rng.pick(&[0, 0, 100]) * MILLI);
            }
        }
        self.machines[old].frozen_until = 0;
    }

    pub(super) fn undo_due(&mut self) {
        let now = self.now;
        let (due, rest) = std::mem::take(&mut self.undo)
            .into_iter()
            .partition(|(at, _)| *at <= now);
        self.undo = rest;
        let due: Vec<(u64, Undo)> = due;
        for (_, undo) in due {
            tell(|| format!("  over: {undo:?}"));
            match undo {
                Undo::Heal(from, to) => self.streams.heal(from, to),
                Undo::Fast(from, to) => self.streams.set_slow(from, to, None),
                Undo::ControlBack(at) => self.records.set_away(at, false),
                Undo::AnswersBack(at) => self.records.set_loses_answers(at, false),
                Undo::Empty(at, no) => self.empty_disk(at, no),
            }
        }
    }

    /// Everything is mended at once.
    pub(super) fn mend(&mut self) {
        let now = self.now;
        for (_, undo) in std::mem::take(&mut self.undo) {
            if let Undo::Empty(at, no) = undo {
                self.undo.push((now, Undo::Empty(at, no)));
            }
        }
        self.trap = None;
        self.cut_when_taken = None;
        self.streams.heal_all();
        for (at, machine) in self.machines.iter_mut().enumerate() {
            machine.frozen_until = 0;
            machine.starts_at = machine.starts_at.min(now);
            self.records.set_away(at, false);
            self.records.set_loses_answers(at, false);
        }
    }
}
