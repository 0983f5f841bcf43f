//! One host of the cluster: its disks, its clock, the daemon that runs on it and the guests that do.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use control::VdiRecord;
use control::backend::LeaseId;
use replication::ToReplica;
use types::{DiskId, HeapBlock, Instant, RequestId, VdiId};
use vdi::Vdi;
use wire::Channel;

use super::records::LEASE;
use super::{At, Time};
use crate::Rng;
use crate::host::Host;

/// Marks the number that a request of a stream has at the disk's node, as in the daemon: writers here have numbers
/// without it.
pub(super) const FROM_LINK: u64 = 1 << 63;

/// An end that hears nothing for so long gives the stream up.
pub(super) const SILENCE: Duration = Duration::from_secs(3);

const DIAL_PAUSE: Duration = Duration::from_millis(100);
const DIAL_PAUSE_MAX: Duration = Duration::from_secs(5);

/// A clock that runs a little fast or slow and says nothing of what other hosts' clocks say.
#[derive(Clone, Copy, Debug)]
pub(super) struct LocalClock {
    /// Nanoseconds in a millisecond of the world.
    rate: u64,
    zero: Time,
    base: u64,
}

impl LocalClock {
    /// At most 4.5 % fast or slow: any two differ by less than a tenth.
    pub fn new(rng: &mut Rng) -> LocalClock {
        LocalClock {
            rate: rng.between(955_000, 1_045_000),
            zero: 0,
            base: rng.below(1 << 50),
        }
    }

    /// The machine boots: it counts from somewhere else.
    pub fn restart(&mut self, now: Time, rng: &mut Rng) {
        self.zero = now;
        self.base = rng.below(1 << 50);
    }

    pub fn at(&self, now: Time) -> Instant {
        let passed = u128::from(now - self.zero) * u128::from(self.rate) / 1_000_000;
        Instant(self.base + passed as u64)
    }
}

/// Where the answer to a request of a stream is to go.
#[derive(Clone, Copy, Debug)]
pub(super) struct Way {
    pub stream: u64,
    pub channel: Channel,
    pub id: RequestId,
    pub disk: DiskId,
}

/// The stream that a daemon dials to another host.
#[derive(Clone, Copy, Debug)]
pub(super) struct Peer {
    pub stream: Option<u64>,
    pub again_at: Instant,
    pause: Duration,
}

impl Peer {
    pub fn ended(&mut self, now: Instant) {
        self.stream = None;
        self.again_at = now + self.pause;
        self.pause = (self.pause * 2).min(DIAL_PAUSE_MAX);
    }

    pub fn greeted(&mut self) {
        self.pause = DIAL_PAUSE;
    }
}

/// An open virtual disk.
pub(super) struct Open {
    pub vdi: Vdi<HeapBlock>,
    pub incarnation: u64,
    pub next_tick: Instant,
    /// Its record as it was taken, until its door is open.
    pub record: Option<Box<VdiRecord>>,
}

/// The process.
pub(super) struct Daemon {
    /// Zero until the control store has answered.
    pub incarnation: u64,
    pub lease: Option<LeaseId>,
    pub vdis: BTreeMap<VdiId, Open>,
    pub ways: BTreeMap<u64, Way>,
    next_way: u64,
    pub peers: BTreeMap<At, Peer>,
    /// The latest life of each host that called.
    pub lives: BTreeMap<At, u64>,
    /// For disks of this host.
    pub inbox: VecDeque<(usize, ToReplica<HeapBlock>)>,
    /// When it next asks the control store to start, or says that it is alive.
    pub next_word: Instant,
    pub is_asking: bool,
    /// When each disk that is not served may be opened.
    pub opens_at: Vec<Instant>,
}

impl Daemon {
    pub fn new(at: At, hosts: usize, disks: usize, now: Instant) -> Daemon {
        let peer = Peer {
            stream: None,
            again_at: now,
            pause: DIAL_PAUSE,
        };
        Daemon {
            incarnation: 0,
            lease: None,
            vdis: BTreeMap::new(),
            ways: BTreeMap::new(),
            next_way: 0,
            peers: (0..hosts).filter(|to| *to != at).map(|to| (to, peer)).collect(),
            lives: BTreeMap::new(),
            inbox: VecDeque::new(),
            next_word: now,
            is_asking: false,
            opens_at: vec![now; disks],
        }
    }

    pub fn has_joined(&self) -> bool {
        self.incarnation > 0
    }

    /// Notes where the answer is to go; the number to ask with.
    pub fn way(&mut self, way: Way) -> RequestId {
        self.next_way += 1;
        self.ways.insert(self.next_way, way);
        RequestId(FROM_LINK | self.next_way)
    }

    pub fn words_again(&mut self, now: Instant) {
        self.is_asking = false;
        self.next_word = now + LEASE / 3;
    }
}

/// See the module.
pub(super) struct Machine {
    pub disks: Vec<Host>,
    pub clock: LocalClock,
    pub daemon: Option<Daemon>,
    /// Counts the starts of the process.
    pub life: u64,
    /// While there is no process: when it starts again.
    pub starts_at: Time,
    /// No power: nobody answers for it.
    pub is_off: bool,
    /// Stopped until then: it does nothing, and what comes waits.
    pub frozen_until: Time,
    /// The guest of each disk that runs here.
    pub guests: BTreeMap<VdiId, u64>,
}

impl Machine {
    pub fn new(disks: Vec<Host>, clock: LocalClock) -> Machine {
        Machine {
            disks,
            clock,
            daemon: None,
            life: 0,
            starts_at: 0,
            is_off: false,
            frozen_until: 0,
            guests: BTreeMap::new(),
        }
    }

    pub fn has_joined(&self) -> bool {
        self.daemon.as_ref().is_some_and(Daemon::has_joined)
    }

    pub fn open(&self, vdi: VdiId) -> Option<&Open> {
        self.daemon.as_ref()?.vdis.get(&vdi)
    }

    /// Nobody asks it to do anything just now.
    pub fn is_idle(&self) -> bool {
        let is_busy = |disk: &Host| disk.disk.in_flight() > 0 || disk.kv.in_flight() > 0;
        !self.disks.iter().any(is_busy) && self.daemon.as_ref().is_none_or(|daemon| daemon.inbox.is_empty())
    }
}
