//! A whole pool in one process: a guest, an open VDI, the control store, links, and disks with the real log
//! store and replica role on them.
//!
//! ```text
//!  Guest ─▶ Vdi ─▶ SimNetwork ─▶ Host (DiskNode, Store, SimDisk, SimKv)    3 or 4 of them
//!            └──▶ control: records by compare-and-swap, survives everything
//! ```
//! A seed picks the replica count and one profile of faults, which is what the design promises to survive:
//!
//! | profile | what happens |
//! |---|---|
//! | Calm | kills and power losses of everything at once |
//! | Links | and links that break, disks whose process is killed alone, disks that are cut off for long |
//! | DiskPower | and one disk that loses power alone |
//! | DiskFails | and one disk that fails a write or a sync, is reopened, or replaced by another |
//! | Rot | and one disk whose content rots, while a scrub runs now and then |
//! | Noise | and one disk that is overwritten with noise here and there |
//! | Lying | and one disk of three that loses or misplaces writes it acknowledged, and whose syncs lie |
//! | Index | and index directories that are deleted, rolled back or spoiled, and old superblocks that come back |
//! | Full | and a second VDI that fills small disks: writes wait until it is deleted |
//! | Takeover | and a second daemon that takes the VDI over while the first lives on and writes, not knowing it |
//!
//! Under every profile disks lose power in the midst of being opened, the VDI grows, also while the daemon dies, and
//! every fourth guest fights with itself over a few blocks from all its queues.
//!
//! A disk that loses what it had acknowledged (its own power loss, a failed sync, noise over the log's headers)
//! is one fault; the loss of everybody's power on top of it before it was repaired is a second one, which nobody
//! promises to survive. The world therefore waits for the pool to be whole before and after such a fault.

mod ballast;
mod daemon;
mod misfortune;
mod summary;
mod whole;

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use edge::Network;
use replication::{FromReplica, ShardRecord, ToReplica};
use store::StoreSettings;
use types::{DiskId, HeapBlock, Instant, LayerId, ShardId, ShardNo, VdiId};
use vdi::{Event, Vdi, VdiSpec};

use crate::guest::Guest;
use crate::host::Host;
use crate::past::layers;
use crate::trace::tell;
use crate::{Rng, SimDisk, SimNetwork};

use ballast::Ballast;
use daemon::short_answer;
pub use summary::VdiSummary;

const SEGMENT_BYTES: u64 = 512 << 10;
const SHARD_BYTES: u64 = 1 << 20;
const HEAD: LayerId = LayerId(1);
const ID: VdiId = VdiId(5);
/// Turns after which something that should have happened has not.
const PATIENCE: u32 = 60_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Profile {
    Calm,
    Links,
    DiskPower,
    DiskFails,
    Rot,
    Noise,
    Lying,
    Index,
    Full,
    Takeover,
}

/// An endpoint of a link: the writer of an incarnation, or the disk with this index.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Place {
    Writer(u64),
    Disk(usize),
}

#[derive(Clone, Debug)]
enum Message {
    To(ToReplica<HeapBlock>),
    From(FromReplica<HeapBlock>),
}

struct World {
    rng: Rng,
    profile: Profile,
    now: Instant,
    net: SimNetwork<Place, Message>,
    hosts: Vec<Host>,
    /// Whether the writer holds the disk for reachable.
    is_linked: Vec<bool>,
    /// Turns until a disk that is away may come back.
    away: Vec<u32>,
    vdi: Option<Vdi<HeapBlock>>,
    /// A daemon that was taken over and does not know: its incarnation too.
    zombie: Option<(u64, Vdi<HeapBlock>)>,
    spec: VdiSpec,
    incarnation: u64,
    records: BTreeMap<ShardNo, ShardRecord>,
    /// Under way to the control store, and from which incarnation.
    saves: VecDeque<(u64, ShardRecord)>,
    guest: Guest,
    settings: StoreSettings,
    disk_bytes: u64,
    next_disk: u128,
    replicas: usize,
    /// A VDI beside the guest's, where disks are to be full.
    ballast: Option<Ballast>,
    next_vdi: u32,
    /// For how many turns some disk has been full.
    full_turns: u32,
    /// The one disk that bad things happen to.
    victim: usize,
    /// A fault that lost acknowledged data is not repaired yet.
    is_wounded: bool,
    last_scrub: Option<(u64, u64)>,
    turns: u64,
    summary: VdiSummary,
}

/// Runs the world of `seed` for `ops` guest requests; panics when a promise is broken.
pub fn run(seed: u64, ops: u64) -> VdiSummary {
    let mut world = World::new(seed);
    let mut left = ops;
    while left > 0 {
        let burst = world.rng.between(1, 60).min(left);
        left -= burst;
        world.live(burst);
        world.misfortune();
    }
    world.end();
    world.summary.answers = world.guest.answers;
    world.summary.snapshots = world.guest.cuts;
    world.summary.past_answers = world.guest.past_answers;
    world.summary
}

impl World {
    fn new(seed: u64) -> World {
        let mut rng = Rng::new(seed);
        let replicas = rng.pick(&[1, 2, 2, 3, 3, 3]);
        let profile = match replicas {
            1 => rng.pick(&[
                Profile::Calm,
                Profile::Links,
                Profile::Takeover,
                Profile::Index,
                Profile::Full,
            ]),
            _ => rng.pick(&[
                Profile::Calm,
                Profile::Links,
                Profile::Links,
                Profile::Index,
                Profile::Full,
                Profile::Lying,
                Profile::DiskPower,
                Profile::DiskFails,
                Profile::DiskFails,
                Profile::Rot,
                Profile::Noise,
                Profile::Takeover,
                Profile::Takeover,
            ]),
        };
        // With two replicas a disk that lies and any other fault are two, and nobody can tell who is right.
        let profile = match profile {
            Profile::Lying if replicas < 3 => Profile::Noise,
            other => other,
        };
        let settings = StoreSettings {
            cache_bytes: rng.pick(&[64 << 10, 4 << 20]),
            appends_in_flight: rng.between(1, 8) as usize,
            checkpoint_bytes: rng.pick(&[256 << 10, 2 << 20]),
            segments_reserved: 3,
            clean_below_free: 8,
            cleaning_bytes: 128 << 10,
        };
        let is_full = profile == Profile::Full;
        let disk_bytes = (1 << 20) + if is_full { 24 } else { 40 } * SEGMENT_BYTES;
        let count = rng.between(
            replicas as u64 + u64::from(replicas > 1),
            4.max(replicas as u64 + 1),
        ) as usize;
        let count = if is_full { replicas } else { count };
        let hosts: Vec<Host> = (0..count)
            .map(|i| {
                let mut disk = SimDisk::new(disk_bytes, rng.draw());
                disk.set_slowness(rng.pick(&[1, 2, 2, 4, 30]));
                Host::new(DiskId(i as u128 + 1), disk, SEGMENT_BYTES, settings, rng.draw())
            })
            .collect();
        let sector_bytes = rng.pick(&[512, 512, 4096]);
        let shards = rng.between(1, 3);
        let bytes = shards * SHARD_BYTES - rng.below(40) * u64::from(sector_bytes);
        let spec = VdiSpec {
            id: ID,
            bytes,
            sector_bytes,
            shard_bytes: SHARD_BYTES,
            lineage: layers(ID, HEAD),
            sharing: replication::Sharing::Alone,
        };
        tell(|| {
            format!("seed {seed}: {profile:?}, {replicas} replicas on {count} disks, {spec:?}, {settings:?}")
        });
        let mut world = World {
            net: SimNetwork::new(rng.draw(), Duration::from_micros(rng.pick(&[1, 500, 3000]))),
            is_linked: vec![false; count],
            away: vec![0; count],
            hosts,
            profile,
            now: Instant::default(),
            vdi: None,
            zombie: None,
            incarnation: 0,
            records: BTreeMap::new(),
            saves: VecDeque::new(),
            guest: Guest::new(rng.draw(), bytes, u64::from(sector_bytes), SHARD_BYTES),
            settings,
            disk_bytes,
            next_disk: 100,
            ballast: None,
            next_vdi: 1000,
            full_turns: 0,
            replicas,
            victim: rng.index(count),
            is_wounded: false,
            last_scrub: None,
            turns: 0,
            summary: VdiSummary::default(),
            spec,
            rng,
        };
        for no in 0..shards {
            world.place_shard(ShardNo(no as u32));
        }
        if world.rng.chance(1, 4) {
            world.guest.crowd();
        }
        world.open();
        world.lay_ballast();
        world
    }

    fn place_shard(&mut self, no: ShardNo) -> ShardRecord {
        let record = self.chosen_record(ShardId { vdi: ID, no });
        self.records.insert(no, record.clone());
        record
    }

    fn chosen_record(&mut self, shard: ShardId) -> ShardRecord {
        let mut disks: Vec<DiskId> = self.hosts.iter().map(|host| host.id).collect();
        self.rng.shuffle(&mut disks);
        disks.truncate(self.replicas);
        ShardRecord::new(shard, disks)
    }

    fn turn(&mut self) {
        self.turns += 1;
        let micros = self.rng.between(20, 1000);
        self.now = self.now + Duration::from_micros(micros);
        self.net.advance_to(self.now);
        self.come_back();
        let mut arrived = Vec::new();
        self.net.poll(&mut arrived);
        for (_, to, message) in arrived {
            match (to, message) {
                (Place::Disk(at), Message::To(message)) => self.hosts[at].receive(self.now, message),
                (Place::Writer(to), Message::From(message)) if to == self.incarnation => {
                    if message.shard.vdi == ID {
                        self.step(Event::Replica(message));
                    } else if self.record_of(message.shard).is_some() {
                        self.step_ballast(Event::Replica(message));
                    }
                }
                (Place::Writer(_), Message::From(message)) => self.step_zombie(Event::Replica(message)),
                (to, message) => panic!("{message:?} arrived at {to:?}"),
            }
        }
        for at in 0..self.hosts.len() {
            let is_tick = self.rng.chance(1, 10);
            self.hosts[at].turn(self.now, is_tick);
            for answer in self.hosts[at].take_answers() {
                tell(|| format!("    from {}: {}", answer.disk, short_answer(&answer)));
                if self.is_linked[at] {
                    let to = Place::Writer(answer.token.incarnation.0);
                    self.net.send(Place::Disk(at), to, Message::From(answer));
                }
            }
            if self.hosts[at].has_failed {
                self.disk_failed(at);
            }
        }
        if self.rng.chance(1, 6)
            && let Some((to, record)) = self.save_one()
        {
            let is_ballast = record.shard.vdi != ID;
            let shard = record.shard.no;
            let event = Event::RecordSaved { shard, record };
            if is_ballast {
                self.step_ballast(event);
            } else if to == self.incarnation {
                self.step(event);
            } else {
                self.step_zombie(event);
            }
        }
        if self.turns.is_multiple_of(40) {
            // A few times a second; the time between is made up for here.
            self.now = self.now + Duration::from_millis(150);
            self.step(Event::Tick);
            self.step_zombie(Event::Tick);
            self.step_ballast(Event::Tick);
        }
        self.watch_space();
        if self.zombie.is_some() {
            self.zombie_lives();
        }
    }

    /// The head becomes a snapshot under load; the daemon may die before it hears that the counter was raised.
    fn cut_or_die(&mut self) {
        if self.is_wounded || self.rng.chance(9, 10) {
            return self.cut();
        }
        let head = self.spec.lineage.newest().1;
        self.spec.lineage = layers(ID, LayerId(head.0 + 1));
        self.crash_everything();
    }

    fn cut(&mut self) {
        if !self.guest.may_cut() || self.zombie.is_some() {
            return;
        }
        let head = self.spec.lineage.newest().1;
        let lineage = layers(ID, LayerId(head.0 + 1));
        self.spec.lineage = lineage.clone();
        let (id, op) = self.guest.cut(head, lineage);
        self.step(Event::Request(id, op));
    }

    fn ask_past(&mut self) {
        if self.guest.wants_more()
            && let Some((id, op)) = self.guest.ask_some_past(ID)
        {
            self.step(Event::Request(id, op));
        }
    }

    fn live(&mut self, requests: u64) {
        let mut left = requests;
        let (mut patience, mut answers) = (PATIENCE, 0);
        while left > 0 && patience > 0 {
            // Any answer is no silence: a full disk that is also away most of the time is slow, not stuck.
            let before = std::mem::replace(&mut answers, self.answers());
            patience = if answers > before { PATIENCE } else { patience - 1 };
            for _ in 0..self.rng.below(4).min(left) {
                if self.guest.wants_more() {
                    let (id, op) = self.guest.ask();
                    self.step(Event::Request(id, op));
                    left -= 1;
                }
            }
            if self.rng.chance(1, 3) {
                self.ballast_asks();
            }
            self.ask_past();
            if self.rng.chance(1, 150) {
                self.cut_or_die();
            }
            self.turn();
            self.small_misfortune();
        }
        assert!(patience > 0, "no silent stop: {}", self.state());
    }

    fn answers(&self) -> u64 {
        self.guest.answers + self.ballast.as_ref().map_or(0, Ballast::answers)
    }
}
