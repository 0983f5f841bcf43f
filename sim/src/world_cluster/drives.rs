//! The virtual disks, and the operator who attaches them here and there.

use types::{LayerId, VdiId};
use vdi::{Event, VdiSpec};

use super::guests::Guests;
use super::{At, MILLI, Time, World};
use crate::past::layers;
use crate::trace::tell;

/// One virtual disk.
pub(super) struct Drive {
    pub spec: VdiSpec,
    pub guests: Guests,
    /// The host at which its newest guest was attached.
    pub at: Option<At>,
    pub moving: Option<Moving>,
    pub last_scrub: Option<(u64, u64)>,
}

/// An attach that is under way.
#[derive(Clone, Debug)]
pub(super) struct Moving {
    pub to: At,
    /// The old host has been asked to let its guest go, and has not yet.
    pub from: Option<At>,
    is_asked: bool,
    again_at: Time,
    gives_up_at: Time,
}

impl Moving {
    fn new(to: At, from: Option<At>, now: Time) -> Moving {
        Moving {
            to,
            from,
            is_asked: false,
            again_at: now,
            gives_up_at: now + 15_000 * MILLI,
        }
    }
}

impl Drive {
    pub fn new(spec: VdiSpec, guests: Guests) -> Drive {
        Drive {
            spec,
            guests,
            at: None,
            moving: None,
            last_scrub: None,
        }
    }
}

impl World {
    /// Whether the newest guest of a drive runs, and its daemon does.
    pub(super) fn is_attached(&self, id: VdiId) -> bool {
        let drive = &self.drives[&id];
        drive.at.is_some_and(|at| {
            let machine = &self.machines[at];
            machine.guests.get(&id) == Some(&drive.guests.newest) && machine.open(id).is_some()
        })
    }

    /// What people do so that every disk is attached somewhere.
    pub(super) fn operate(&mut self) {
        let ids: Vec<VdiId> = self.drives.keys().copied().collect();
        for id in ids {
            let now = self.now;
            let Some(moving) = self.drives[&id].moving.clone() else {
                let seldom = if self.drives[&id].at.is_some() { 300 } else { 10 };
                if !self.is_attached(id) && self.rng.chance(1, seldom) {
                    // Where it is open somebody let guests in perhaps, and was not told so.
                    let open: Vec<At> = (0..self.machines.len())
                        .filter(|at| self.machines[*at].open(id).is_some())
                        .collect();
                    let to = match open[..] {
                        [at] if self.rng.chance(1, 2) => at,
                        _ => self.rng.index(self.machines.len()),
                    };
                    self.attach(id, to);
                }
                continue;
            };
            if now >= moving.gives_up_at {
                let drive = self.drives.get_mut(&id).expect("listed");
                drive.moving = None;
                continue;
            }
            if moving.is_asked || now < moving.again_at || !self.machines[moving.to].has_joined() {
                continue;
            }
            if let Some(from) = moving.from {
                // Its door is closed first, if it can be.
                if self.machines[from].has_joined() && self.machines[from].open(id).is_some() {
                    self.is_asked(id);
                    self.close_door(from, id);
                    continue;
                }
                self.drives
                    .get_mut(&id)
                    .expect("listed")
                    .moving
                    .as_mut()
                    .expect("moving")
                    .from = None;
            }
            self.is_asked(id);
            if self.machines[moving.to].open(id).is_some() && self.drives[&id].at == Some(moving.to) {
                self.open_door(moving.to, id);
            } else {
                self.take(moving.to, id);
            }
        }
    }

    fn is_asked(&mut self, id: VdiId) {
        let drive = self.drives.get_mut(&id).expect("a drive");
        drive.moving.as_mut().expect("moving").is_asked = true;
    }

    /// Attaches a disk at a host, whatever there is elsewhere.
    pub(super) fn attach(&mut self, id: VdiId, to: At) {
        tell(|| format!("  VDI {id} is to be attached at host {to}"));
        let now = self.now;
        self.drives.get_mut(&id).expect("a drive").moving = Some(Moving::new(to, None, now));
    }

    /// Detaches it first from where it is.
    pub(super) fn move_to(&mut self, id: VdiId, to: At) {
        let now = self.now;
        let drive = self.drives.get_mut(&id).expect("a drive");
        tell(|| format!("  VDI {id} is to be moved from {:?} to host {to}", drive.at));
        drive.moving = Some(Moving::new(to, drive.at, now));
    }

    pub(super) fn door_closed(&mut self, id: VdiId) {
        let drive = self.drives.get_mut(&id).expect("a drive");
        drive.at = None;
        if let Some(moving) = &mut drive.moving {
            moving.from = None;
            moving.is_asked = false;
        }
    }

    /// What was asked of host `at` for a move was refused, or is lost.
    pub(super) fn try_again(&mut self, id: VdiId, at: At) {
        let pause = self.rng.between(50 * MILLI, 700 * MILLI);
        let now = self.now;
        let drive = self.drives.get_mut(&id).expect("a drive");
        if let Some(moving) = &mut drive.moving
            && (moving.to == at || moving.from == Some(at))
        {
            moving.is_asked = false;
            moving.again_at = now + pause;
        }
    }

    /// The newest guest of a disk asks for snapshots, and takes one now and then: only where no other host has the disk open, as
    /// control lets nobody else count up its layers.
    fn look_back(&mut self, id: VdiId, at: At) {
        let is_elsewhere = |other: At| other != at && self.machines[other].open(id).is_some();
        let is_alone = !(0..self.machines.len()).any(is_elsewhere);
        let (cuts, asks) = (self.rng.chance(1, 100), self.rng.chance(1, 8));
        let drive = self.drives.get_mut(&id).expect("a drive");
        let (guests, spec) = (&mut drive.guests, &mut drive.spec);
        let mut asked = Vec::new();
        if cuts && is_alone && guests.may_cut() {
            let head = spec.lineage.newest().1;
            spec.lineage = layers(id, LayerId(head.0 + 1));
            asked.push(guests.cut(head, spec.lineage.clone()));
        }
        if asks {
            asked.extend(guests.ask_some_past(id));
        }
        for (request, op) in asked {
            self.step_vdi(at, id, Event::Request(request, op));
        }
    }

    /// Some guest of some disk wants something; whether one that is attached did.
    pub(super) fn somebody_asks(&mut self) -> bool {
        let ids: Vec<VdiId> = self.drives.keys().copied().collect();
        let id = self.rng.pick(&ids);
        let newest = self.drives[&id].guests.newest;
        let runs = |at: &At| {
            let machine = &self.machines[*at];
            machine.frozen_until <= self.now && machine.open(id).is_some() && machine.guests.contains_key(&id)
        };
        let hosts: Vec<At> = (0..self.machines.len()).filter(runs).collect();
        if hosts.is_empty() {
            return false;
        }
        let at = self.rng.pick(&hosts);
        let guest = self.machines[at].guests[&id];
        if guest == newest {
            self.look_back(id, at);
        }
        let drive = self.drives.get_mut(&id).expect("listed");
        if !drive.guests.wants_more(guest) {
            return false;
        }
        let (request, op) = drive.guests.ask(guest);
        self.step_vdi(at, id, Event::Request(request, op));
        guest == newest
    }
}
