//! The VDIs of a plane: each a [`Vdi`] core and the requests it has not answered.

use edge::Clock;
use edge::uring::Buf;
use replication::ShardRecord;
use tokio::sync::oneshot;
use types::{DiskId, Incarnation, RequestId, VdiId};
use vdi::{Effect, Event, Op, Outcome, Vdi, VdiError, VdiSpec};

use super::guests::GuestTag;
use super::{Actor, Hold, Home, Letter, Plane, PlaneFigures, Report, VdiFigures};

/// Who gets the answer of a request.
enum Asker {
    Guest(GuestTag),
    Channel(oneshot::Sender<Result<Outcome<Buf>, VdiError>>),
}

/// Requests under way; ids are slot and generation, so that a late answer cannot meet a new request.
#[derive(Default)]
struct Requests {
    slots: Vec<(u32, Option<Asker>)>,
    free: Vec<u32>,
}

impl Requests {
    fn insert(&mut self, asker: Asker) -> RequestId {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push((0, None));
            u32::try_from(self.slots.len() - 1).expect("fewer than 2^32 requests at once")
        });
        let entry = &mut self.slots[slot as usize];
        entry.1 = Some(asker);
        RequestId(u64::from(entry.0) << 32 | u64::from(slot))
    }

    fn take(&mut self, id: RequestId) -> Asker {
        let entry = &mut self.slots[(id.0 & 0xffff_ffff) as usize];
        assert_eq!(u64::from(entry.0), id.0 >> 32, "request {id} was answered twice");
        entry.0 = entry.0.wrapping_add(1);
        self.free.push(id.0 as u32);
        entry.1.take().expect("a request under way has an asker")
    }
}

/// One VDI of this plane.
pub struct VdiActor {
    core: Vdi<Buf>,
    requests: Requests,
    is_ticking: bool,
}

impl Plane {
    pub(super) fn open_vdi(
        &mut self,
        spec: VdiSpec,
        records: Vec<ShardRecord>,
        incarnation: Incarnation,
        up: Vec<DiskId>,
    ) {
        let id = spec.id;
        let up = up.into_iter().chain(self.disks_reached()).collect();
        let actor = VdiActor {
            core: Vdi::new(spec, records, incarnation, up),
            requests: Requests::default(),
            is_ticking: true,
        };
        assert!(self.vdis.insert(id, actor).is_none(), "VDI {id} is open already");
        self.ticking.push(Actor::Vdi(id));
        let is_far = |(_, home): &(&DiskId, &Home)| matches!(home, Home::Host(_));
        let far: Vec<DiskId> = self.homes.iter().filter(is_far).map(|(disk, _)| *disk).collect();
        for disk in far {
            self.step_vdi(id, Event::Distance { disk, is_far: true });
        }
    }

    /// A disk's home was said: VDIs read from near disks first.
    pub(super) fn set_distance(&mut self, disk: DiskId, is_far: bool) {
        for vdi in self.vdis.keys().copied().collect::<Vec<_>>() {
            self.step_vdi(vdi, Event::Distance { disk, is_far });
        }
    }

    /// Forgets a VDI; whoever still waits for an answer of it gets an error.
    pub(super) fn close_vdi(&mut self, vdi: VdiId) {
        let Some(actor) = self.vdis.remove(&vdi) else {
            return;
        };
        for (_, asker) in actor.requests.slots {
            match asker {
                Some(Asker::Channel(reply)) => {
                    let _ = reply.send(Err(VdiError::Closed));
                }
                Some(Asker::Guest(tag)) => self.guests.complete(tag, Err(VdiError::Closed)),
                None => {}
            }
        }
    }

    /// Begins or ends that a VDI answers nobody; whether it does now.
    pub(super) fn hold(&mut self, vdi: VdiId, hold: Hold) -> bool {
        self.now = self.clock.now();
        match hold {
            Hold::Begin => self.step_vdi(vdi, Event::Hold),
            Hold::Still => {}
            Hold::End => self.step_vdi(vdi, Event::Release),
        }
        let actor = self.vdis.get(&vdi);
        actor.is_some_and(|actor| actor.core.is_holding(self.now))
    }

    pub(super) fn request_from_channel(
        &mut self,
        vdi: VdiId,
        op: Op<Buf>,
        reply: oneshot::Sender<Result<Outcome<Buf>, VdiError>>,
    ) {
        match self.vdis.get_mut(&vdi) {
            Some(actor) => {
                let id = actor.requests.insert(Asker::Channel(reply));
                // See `look_at_guest`.
                self.now = self.clock.now();
                self.step_vdi(vdi, Event::Request(id, op));
            }
            None => {
                let _ = reply.send(Err(VdiError::Closed));
            }
        }
    }

    pub(super) fn request_from_guest(&mut self, vdi: VdiId, tag: GuestTag, op: Op<Buf>) {
        match self.vdis.get_mut(&vdi) {
            Some(actor) => {
                let id = actor.requests.insert(Asker::Guest(tag));
                self.step_vdi(vdi, Event::Request(id, op));
            }
            None => self.guests.complete(tag, Err(VdiError::Closed)),
        }
    }

    pub(super) fn disk_state(&mut self, disk: DiskId, is_up: bool) {
        let vdis: Vec<VdiId> = self.vdis.keys().copied().collect();
        for vdi in vdis {
            self.step_vdi(vdi, Event::DiskState { disk, is_up });
        }
    }

    pub(super) fn tick_vdi(&mut self, vdi: VdiId) {
        if let Some(actor) = self.vdis.get_mut(&vdi) {
            actor.is_ticking = false;
            self.step_vdi(vdi, Event::Tick);
        }
    }

    pub(super) fn step_vdi(&mut self, vdi: VdiId, event: Event<Buf>) {
        // Answers to a VDI that was closed meanwhile have nobody to go to.
        let Some(actor) = self.vdis.get_mut(&vdi) else {
            return;
        };
        let mut effects = std::mem::take(&mut self.vdi_effects);
        actor.core.step(self.now, event, &mut effects);
        if actor.core.is_busy() && !std::mem::replace(&mut actor.is_ticking, true) {
            self.ticking.push(Actor::Vdi(vdi));
        }
        let mut letters = std::mem::take(&mut self.letters);
        for effect in effects.drain(..) {
            match effect {
                Effect::Done(id, result) => match actor.requests.take(id) {
                    Asker::Guest(tag) => self.guests.complete(tag, result),
                    Asker::Channel(reply) => {
                        let _ = reply.send(result);
                    }
                },
                Effect::Send(disk, message) => letters.push(Letter::ToDisk(disk, message)),
                Effect::SaveRecord(record) => {
                    let _ = self.reports.send(Report::SaveRecord(record));
                }
                Effect::Notice(notice) => {
                    let _ = self.reports.send(Report::Notice { vdi, notice });
                }
            }
        }
        for letter in letters.drain(..) {
            self.post(letter);
        }
        (self.vdi_effects, self.letters) = (effects, letters);
    }

    pub(super) fn figures(&self) -> PlaneFigures {
        let vdis = self.vdis.iter().map(|(id, actor)| VdiFigures {
            vdi: *id,
            status: actor.core.status(),
        });
        PlaneFigures {
            disks: self.node_figures(),
            vdis: vdis.collect(),
            links: self.link_figures(),
            guests: self.guests.count(),
            pool: self.pool.counters(),
            allocations: edge::allocations::Allocations::of_this_thread().calls,
            enters: self.ring.enters(),
        }
    }
}
