//! A data-plane thread: one ring, its disks' nodes, its VDIs and their guests' queues.
//!
//! One turn of the loop:
//! ```text
//!  reap (ring) ─▶ mailbox ─▶ guests' rings ─▶ cores step until nothing is left to hand over
//!      ▲                                                     │
//!      └── sleep or submit, one enter ◀── publish to guests ◀── close each disk's batch (TurnEnd)
//! ```
//! The thread owns all it touches; other threads reach it through its mailbox ([`PlaneHandle`]) only. Messages
//! between a VDI and a disk on the same thread go through `inbox`; to another thread, through that one's mailbox.

mod disks;
mod guests;
mod handle;
mod links;
mod patience;
mod vdis;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::Duration;

use edge::Clock;
use edge::uring::{Buf, Event as RingEvent, MonotonicClock, Pool, Ring, StreamSlot, Token as Watch, Wait};
use replication::{FromReplica, ToReplica};
use tokio::sync::mpsc::UnboundedSender;
use types::{DiskId, HostId, InFlight, Instant, VdiId};

use disks::DiskActor;
use guests::Guests;
pub use handle::{
    Command, Hold, Home, LinkFigures, NodeFigures, PlaneFigures, PlaneHandle, Report, VdiFigures,
};
use links::{Link, Way};
pub use links::{LinkRole, LinkStart};
use patience::Patience;
use vdis::VdiActor;

/// How often cores that say they are busy get a Tick.
const TICK: Duration = Duration::from_millis(50);

/// Completions handled before guests hear of them: they go on while we do.
const STRIDE: usize = 8;

/// How long a plane that is to stop waits for its disks' last words; without them nothing is lost but a witness.
const STOP_PATIENCE: Duration = Duration::from_secs(2);

/// Commands taken from the mailbox in one turn: guests and disks must not starve behind it.
const COMMANDS_PER_TURN: usize = 256;

/// What a message between a VDI's writer and a disk's node is on its way to.
enum Letter {
    ToDisk(DiskId, ToReplica<Buf>),
    ToVdi(FromReplica<Buf>),
    Back(Way, FromReplica<Buf>),
}

/// Who wants Ticks.
#[derive(Clone, Copy)]
enum Actor {
    Disk(DiskId),
    Vdi(VdiId),
}

/// The state of one data-plane thread.
pub struct Plane {
    number: usize,
    ring: Ring,
    pool: Pool,
    clock: MonotonicClock,
    now: Instant,
    mailbox: Receiver<Command>,
    peers: Vec<PlaneHandle>,
    reports: UnboundedSender<Report>,
    /// Where a disk is served; the daemon tells every plane before the disk is used.
    homes: BTreeMap<DiskId, Home>,
    disks: BTreeMap<DiskId, DiskActor>,
    vdis: BTreeMap<VdiId, VdiActor>,
    guests: Guests,
    links: BTreeMap<StreamSlot, Link>,
    /// The links that were dialled: where writers here reach the disks of a host.
    hosts: BTreeMap<HostId, StreamSlot>,
    /// Links with something to send, or that are to end.
    touched_links: Vec<StreamSlot>,
    /// Where the answers to links' requests to the disks here go.
    ways: InFlight<Way>,
    /// Disks of this host, on whatever plane, that can be asked.
    disks_up: BTreeSet<DiskId>,
    /// Disks of this host, on whatever plane, whose changes wait for space.
    full_disks: BTreeSet<DiskId>,
    next_beat: Option<Instant>,
    inbox: VecDeque<Letter>,
    /// Kept between steps so that a step allocates nothing.
    vdi_effects: Vec<vdi::Effect<Buf>>,
    node_effects: Vec<replication::NodeEffect<Buf>>,
    letters: Vec<Letter>,
    /// Disks whose batch is open, and cores that want the next Tick; each is in its list once, and says so itself.
    touched_disks: Vec<DiskId>,
    ticking: Vec<Actor>,
    was_ticking: Vec<Actor>,
    next_tick: Option<Instant>,
    /// The mailbox may hold commands.
    has_mail: bool,
    patience: Patience,
    /// Set once the thread is to end; by when it does so in any case.
    stop_by: Option<Instant>,
}

impl Plane {
    /// On the thread that is to run it: `ring` stays there. `poll` bounds how long it looks for news before it sleeps.
    pub fn new(
        number: usize,
        ring: Ring,
        mailbox: Receiver<Command>,
        peers: Vec<PlaneHandle>,
        reports: UnboundedSender<Report>,
        poll: Duration,
    ) -> Plane {
        let clock = MonotonicClock;
        Plane {
            number,
            pool: ring.pool().clone(),
            ring,
            now: clock.now(),
            clock,
            mailbox,
            peers,
            reports,
            homes: BTreeMap::new(),
            disks: BTreeMap::new(),
            vdis: BTreeMap::new(),
            guests: Guests::default(),
            links: BTreeMap::new(),
            hosts: BTreeMap::new(),
            touched_links: Vec::new(),
            ways: InFlight::default(),
            disks_up: BTreeSet::new(),
            full_disks: BTreeSet::new(),
            next_beat: None,
            inbox: VecDeque::new(),
            vdi_effects: Vec::new(),
            node_effects: Vec::new(),
            letters: Vec::new(),
            touched_disks: Vec::new(),
            ticking: Vec::new(),
            was_ticking: Vec::new(),
            next_tick: None,
            has_mail: true,
            patience: Patience::new(poll),
            stop_by: None,
        }
    }

    /// The loop; returns after [`Command::Stop`].
    pub fn run(mut self) {
        let mut events = Vec::with_capacity(256);
        while !self.may_stop() {
            self.turn_ring(&mut events);
            for (number, event) in events.drain(..).enumerate() {
                if number > 0 && number.is_multiple_of(STRIDE) {
                    self.serve_guests();
                }
                match event {
                    RingEvent::Disk(slot, completion) => self.disk_completed(slot, completion),
                    RingEvent::Ready(Watch(slot)) => self.guests.kicked(slot as usize),
                    RingEvent::Woken => self.has_mail = true,
                    RingEvent::Sent(slot, gather, result) => self.link_sent(slot, gather, result),
                    RingEvent::Received(slot, landing, result) => self.link_received(slot, landing, result),
                }
            }
            self.take_commands();
            self.serve_guests();
            self.settle();
            self.publish_guests();
            self.tick();
            self.beat();
        }
    }

    fn may_stop(&self) -> bool {
        self.stop_by
            .is_some_and(|by| self.now >= by || self.are_disks_witnessed())
    }

    /// Submits and reaps. With nothing to do it sleeps until a disk, a guest or the mailbox has something, or a core
    /// that is busy wants its Tick.
    fn turn_ring(&mut self, events: &mut Vec<RingEvent>) {
        let has_work = self.guests.want_poll() || self.has_mail;
        if has_work || self.look_out() || !self.guests.may_sleep() {
            self.ring.turn(Wait::No, events);
            self.now = self.clock.now();
            return;
        }
        let wake_at = self
            .next_tick
            .into_iter()
            .chain(self.stop_by)
            .chain(self.next_beat)
            .min();
        let wait = wake_at.map_or(Wait::Forever, Wait::Until);
        let before = self.clock.now();
        self.ring.turn(wait, events);
        self.now = self.clock.now();
        self.patience.slept(self.now.since(before));
    }

    /// Looks for news where a sleep would likely be short; whether there are any.
    fn look_out(&mut self) -> bool {
        let budget = self.patience.budget();
        if budget.is_zero() || !self.guests.are_shallow() {
            return false;
        }
        self.ring.flush();
        let start = self.clock.now();
        loop {
            if self.ring.has_news() || self.guests.have_news() {
                return true;
            }
            if self.clock.now().since(start) >= budget {
                return false;
            }
            std::hint::spin_loop();
        }
    }

    fn take_commands(&mut self) {
        if !self.has_mail {
            return;
        }
        for _ in 0..COMMANDS_PER_TURN {
            match self.mailbox.try_recv() {
                Ok(command) => self.obey(command),
                Err(TryRecvError::Empty) => {
                    self.has_mail = false;
                    return;
                }
                Err(TryRecvError::Disconnected) => unreachable!("a plane holds a handle to itself"),
            }
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Home { disk, home } => {
                self.set_distance(disk, matches!(home, Home::Host(_)));
                self.set_home(disk, home);
            }
            Command::Link(start) => self.add_link(*start),
            Command::Unlink { host, reason } => self.unlink(host, &reason),
            Command::FromLink(way, message) => self.request_from_link(way, message),
            Command::ToLink(way, message) => self.inbox.push_back(Letter::Back(way, message)),
            Command::AddDisk {
                disk,
                file,
                node,
                index,
                reply,
            } => {
                let _ = reply.send(self.add_disk(disk, file, *node, index));
            }
            Command::RemoveDisk { disk, reply } => self.remove_disk(disk, reply),
            Command::DiskState { disk, is_up, reply } => {
                self.disk_state(disk, is_up);
                self.tell_links(disk, is_up);
                let _ = reply.send(());
            }
            Command::DiskFull { disk, is_full } => self.disk_full(disk, is_full),
            Command::OpenVdi {
                spec,
                records,
                incarnation,
                up,
                reply,
            } => {
                self.open_vdi(spec, records, incarnation, up);
                let _ = reply.send(());
            }
            Command::CloseVdi { vdi, reply } => {
                self.close_vdi(vdi);
                let _ = reply.send(());
            }
            Command::Vdi { vdi, event } => self.step_vdi(vdi, event),
            Command::Hold { vdi, hold, reply } => {
                let is_held = self.hold(vdi, hold);
                let _ = reply.send(is_held);
            }
            Command::Request { vdi, op, reply } => self.request_from_channel(vdi, op, reply),
            Command::ToDisk(disk, message) => self.inbox.push_back(Letter::ToDisk(disk, message)),
            Command::ToVdi(message) => self.inbox.push_back(Letter::ToVdi(message)),
            Command::Index { disk, response } => self.index_answered(disk, response),
            Command::StartRing(ring) => self.start_ring(ring),
            Command::StopRing(ring) => self.guests.stop(ring, self.now),
            Command::Figures { reply } => {
                let figures = self.figures();
                let _ = reply.send(figures);
            }
            Command::Stop => {
                self.stop_by = Some(self.now + STOP_PATIENCE);
                self.close_links();
                self.close_disks();
            }
        }
    }

    /// Hands letters over; batches stay open.
    fn deliver(&mut self) {
        while let Some(letter) = self.inbox.pop_front() {
            match letter {
                Letter::ToDisk(disk, message) => self.message_to_disk(disk, message),
                Letter::ToVdi(message) => {
                    let vdi = message.shard.vdi;
                    self.step_vdi(vdi, vdi::Event::Replica(message));
                }
                Letter::Back(way, message) => self.post_to_link(way, message),
            }
        }
    }

    /// Hands letters over, closes batches and sends to other hosts until no core has anything more to say.
    fn settle(&mut self) {
        loop {
            self.deliver();
            if let Some(disk) = self.touched_disks.pop() {
                self.end_turn(disk);
            } else if self.touched_links.is_empty() {
                return;
            } else {
                self.flush_links();
            }
        }
    }

    fn tick(&mut self) {
        let Some(at) = self.next_tick else {
            if !self.ticking.is_empty() {
                self.next_tick = Some(self.now + TICK);
            }
            return;
        };
        if self.now < at {
            return;
        }
        // Two lists in turn: a core that stays busy enters the other one while this one is emptied.
        let mut due = std::mem::replace(&mut self.ticking, std::mem::take(&mut self.was_ticking));
        for actor in due.drain(..) {
            match actor {
                Actor::Disk(disk) => self.tick_disk(disk),
                Actor::Vdi(vdi) => self.tick_vdi(vdi),
            }
        }
        self.was_ticking = due;
        self.settle();
        self.publish_guests();
        self.next_tick = if self.ticking.is_empty() {
            None
        } else {
            Some(self.now + TICK)
        };
    }

    fn post(&mut self, letter: Letter) {
        let home = match &letter {
            // The disk left; whoever waits for its answer is told by the state change that made it leave.
            Letter::ToDisk(disk, _) => match self.homes.get(disk).copied() {
                Some(home) => home,
                None => return,
            },
            Letter::ToVdi(message) => Home::Plane(PlaneHandle::home_of(message.shard.vdi, self.peers.len())),
            Letter::Back(way, _) => Home::Plane(way.plane()),
        };
        match (home, letter) {
            (Home::Plane(plane), letter) if plane == self.number => self.inbox.push_back(letter),
            (Home::Plane(plane), letter) => self.peers[plane].send(match letter {
                Letter::ToDisk(disk, message) => Command::ToDisk(disk, message),
                Letter::ToVdi(message) => Command::ToVdi(message),
                Letter::Back(way, message) => Command::ToLink(way, message),
            }),
            (Home::Host(host), Letter::ToDisk(disk, message)) => self.post_to_host(host, disk, message),
            (Home::Host(_), _) => unreachable!("only disks are at home at other hosts"),
        }
    }
}
