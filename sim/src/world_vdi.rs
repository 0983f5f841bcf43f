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
//! | Takeover | and a second daemon that takes the VDI over while the first lives on and writes, not knowing it |
//!
//! A disk that loses what it had acknowledged (its own power loss, a failed sync, noise over the log's headers)
//! is one fault; the loss of everybody's power on top of it before it was repaired is a second one, which nobody
//! promises to survive. The world therefore waits for the pool to be whole before and after such a fault.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use edge::Network;
use replication::{FromReplica, ReplicaReply, ReplicaRequest, ShardRecord, ToReplica};
use store::{ReadPart, StoreSettings};
use types::{
    BlockNo, DiskId, HeapBlock, Incarnation, Instant, LayerId, Payload, RequestId, ShardId, ShardNo, VdiId,
};
use vdi::{Effect, Event, Notice, Vdi, VdiSpec};

use crate::guest::Guest;
use crate::host::Host;
use crate::trace::tell;
use crate::{Faults, Rng, SimDisk, SimNetwork};

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
    Takeover,
}

/// What a run did.
#[derive(Clone, Copy, Debug, Default)]
pub struct VdiSummary {
    /// Guest requests answered.
    pub answers: u64,
    /// Kills of everything.
    pub kills: u64,
    /// Power losses of everything.
    pub power_losses: u64,
    /// Disks that went away and came back.
    pub disks_away: u64,
    /// Disks replaced by empty ones.
    pub disks_replaced: u64,
    /// Sectors of content damaged.
    pub rotten: u64,
    /// Blocks the VDI said it repaired.
    pub repaired: u64,
    /// Blocks that travelled in resyncs.
    pub resynced: u64,
    /// Replicas that fell out of sync.
    pub degraded: u64,
    /// Scrubs that ended.
    pub scrubs: u64,
    /// Daemons that were taken over and lived on.
    pub takeovers: u64,
}

impl VdiSummary {
    /// By name, for adding up.
    #[must_use]
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("answers", self.answers),
            ("kills", self.kills),
            ("power losses", self.power_losses),
            ("disks away", self.disks_away),
            ("disks replaced", self.disks_replaced),
            ("sectors damaged", self.rotten),
            ("blocks repaired", self.repaired),
            ("blocks resynced", self.resynced),
            ("times degraded", self.degraded),
            ("scrubs", self.scrubs),
            ("takeovers", self.takeovers),
        ]
    }
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
    world.summary
}

impl World {
    fn new(seed: u64) -> World {
        let mut rng = Rng::new(seed);
        let replicas = rng.pick(&[1, 2, 2, 3, 3, 3]);
        let profile = match replicas {
            1 => rng.pick(&[Profile::Calm, Profile::Links, Profile::Takeover]),
            _ => rng.pick(&[
                Profile::Calm,
                Profile::Links,
                Profile::Links,
                Profile::DiskPower,
                Profile::DiskFails,
                Profile::DiskFails,
                Profile::Rot,
                Profile::Noise,
                Profile::Takeover,
                Profile::Takeover,
            ]),
        };
        let settings = StoreSettings {
            cache_bytes: rng.pick(&[64 << 10, 4 << 20]),
            appends_in_flight: rng.between(1, 8) as usize,
            checkpoint_bytes: rng.pick(&[256 << 10, 2 << 20]),
            segments_reserved: 3,
            clean_below_free: 8,
        };
        let disk_bytes = (1 << 20) + 40 * SEGMENT_BYTES;
        let count = rng.between(
            replicas as u64 + u64::from(replicas > 1),
            4.max(replicas as u64 + 1),
        ) as usize;
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
            head: HEAD,
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
        world.open();
        world
    }

    fn place_shard(&mut self, no: ShardNo) -> ShardRecord {
        let mut disks: Vec<DiskId> = self.hosts.iter().map(|host| host.id).collect();
        self.rng.shuffle(&mut disks);
        disks.truncate(self.replicas);
        let record = ShardRecord::new(ShardId { vdi: ID, no }, disks);
        self.records.insert(no, record.clone());
        record
    }

    // ---- the daemon ----

    fn open(&mut self) {
        self.incarnation += 1;
        let up: Vec<DiskId> = (0..self.hosts.len())
            .filter(|i| self.is_linked[*i])
            .map(|i| self.hosts[i].id)
            .collect();
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
    }

    fn vdi(&self) -> &Vdi<HeapBlock> {
        self.vdi.as_ref().expect("open")
    }

    fn step(&mut self, event: Event<HeapBlock>) {
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
    fn step_zombie(&mut self, event: Event<HeapBlock>) {
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

    fn send(&mut self, from: u64, disk: DiskId, message: ToReplica<HeapBlock>) {
        let Some(at) = self.hosts.iter().position(|host| host.id == disk) else {
            return;
        };
        if self.is_linked[at] {
            tell(|| format!("    to {disk}: {}", short(&message)));
            self.net
                .send(Place::Writer(from), Place::Disk(at), Message::To(message));
        }
    }

    fn noticed(&mut self, notice: &Notice) {
        tell(|| format!("    notice {notice:?}"));
        match notice {
            Notice::Repaired { blocks, disk, .. } => {
                assert!(
                    self.summary.rotten > 0,
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
            // The damaged disk and another that is away are two faults: the good copy is on the one that is away.
            Notice::Unreadable { shard, offset } => assert!(
                self.is_somebody_away(*shard),
                "shard {shard} offset {offset} is unreadable and there is a good copy"
            ),
            Notice::Fenced { shard } => panic!("shard {shard} is fenced and nobody else writes it"),
            _ => {}
        }
    }

    /// Whether damage was done and a replica of the shard that has the good copy cannot be reached.
    fn is_somebody_away(&self, shard: ShardNo) -> bool {
        let replicas = &self.records[&shard].replicas;
        let is_away = |at: usize| !self.is_linked[at] && replicas.contains(&self.hosts[at].id);
        self.summary.rotten > 0 && (0..self.hosts.len()).any(|at| at != self.victim && is_away(at))
    }

    /// The control store takes or refuses the oldest record that was sent.
    fn save_one(&mut self) -> Option<(u64, ShardRecord)> {
        let (from, sent) = self.saves.pop_front()?;
        let held = self
            .records
            .get_mut(&sent.shard.no)
            .expect("a record of every shard");
        if held.epoch.0 + 1 == sent.epoch.0 {
            *held = sent;
        }
        Some((from, held.clone()))
    }

    // ---- a turn ----

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
                    self.step(Event::Replica(message));
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
            let shard = record.shard.no;
            let event = Event::RecordSaved { shard, record };
            if to == self.incarnation {
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
        }
        if self.zombie.is_some() {
            self.zombie_lives();
        }
    }

    /// The guest of the daemon that was taken over goes on for a while.
    fn zombie_lives(&mut self) {
        if self.rng.chance(1, 4)
            && let Some((id, op)) = self.guest.zombie_asks()
        {
            self.step_zombie(Event::Request(id, op));
        }
        if self.rng.chance(1, 400) {
            self.end_zombie();
        }
    }

    fn end_zombie(&mut self) {
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
    fn take_over(&mut self) {
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

    fn live(&mut self, requests: u64) {
        let mut left = requests;
        let mut patience = PATIENCE;
        while left > 0 && patience > 0 {
            patience -= 1;
            for _ in 0..self.rng.below(4).min(left) {
                if self.guest.wants_more() {
                    let (id, op) = self.guest.ask();
                    self.step(Event::Request(id, op));
                    left -= 1;
                }
            }
            self.turn();
            self.small_misfortune();
        }
        assert!(patience > 0, "no silent stop: {}", self.state());
    }

    // ---- links and disks that come and go ----

    fn come_back(&mut self) {
        for at in 0..self.hosts.len() {
            if self.is_linked[at] {
                continue;
            }
            if self.away[at] > 0 {
                self.away[at] -= 1;
                continue;
            }
            if self.hosts[at].node.is_none() {
                // Whoever brings a disk back tries until it can be opened.
                self.hosts[at].disk.set_faults(Faults::default());
                self.hosts[at].start();
            }
            self.is_linked[at] = true;
            let disk = self.hosts[at].id;
            tell(|| format!("  disk {disk} is up"));
            self.step(Event::DiskState { disk, is_up: true });
            self.step_zombie(Event::DiskState { disk, is_up: true });
        }
    }

    fn unlink(&mut self, at: usize, turns: u32) {
        self.away[at] = self.away[at].max(turns);
        self.break_links(at);
        self.hosts[at].hang_up();
        if std::mem::replace(&mut self.is_linked[at], false) {
            let disk = self.hosts[at].id;
            tell(|| format!("  disk {disk} is down for {turns} turns"));
            self.summary.disks_away += 1;
            self.step(Event::DiskState { disk, is_up: false });
            self.step_zombie(Event::DiskState { disk, is_up: false });
        }
    }

    fn break_links(&mut self, at: usize) {
        self.net
            .break_link(Place::Writer(self.incarnation), Place::Disk(at));
        if let Some((incarnation, _)) = &self.zombie {
            self.net.break_link(Place::Writer(*incarnation), Place::Disk(at));
        }
    }

    fn stop_host(&mut self, at: usize, is_power_loss: bool, turns: u32) {
        self.unlink(at, turns);
        if self.hosts[at].node.is_some() {
            self.hosts[at].stop(is_power_loss);
        }
    }

    fn disk_failed(&mut self, at: usize) {
        assert_eq!(at, self.victim, "disk {} failed of itself", self.hosts[at].id);
        self.is_wounded = true;
        self.hosts[at].disk.set_faults(Faults::default());
        let turns = self.rng.between(1, 2000) as u32;
        self.stop_host(at, false, turns);
    }

    /// Things that happen in the midst of everything.
    fn small_misfortune(&mut self) {
        if self.profile != Profile::Calm && self.profile != Profile::Noise && self.rng.chance(1, 400) {
            // Where one disk may lose or spoil what it holds, the others stay in reach.
            let at = match self.profile {
                Profile::Rot | Profile::DiskFails | Profile::DiskPower => self.victim,
                _ => self.rng.index(self.hosts.len()),
            };
            let turns = self.rng.pick(&[0, 5, 200, 3000]);
            if self.rng.chance(1, 2) {
                self.unlink(at, turns);
            } else {
                self.stop_host(at, false, turns);
            }
        }
        // Under load in every world: where nothing is damaged it must find nothing.
        if self.rng.chance(1, 500) {
            self.step(Event::Scrub);
        }
    }

    // ---- misfortune between bursts ----

    fn misfortune(&mut self) {
        if self.rng.chance(1, 8) {
            self.grow();
        }
        match self.profile {
            Profile::DiskPower if self.rng.chance(1, 3) => {
                self.become_whole();
                self.live_on(20);
                self.is_wounded = true;
                let turns = self.rng.pick(&[0, 50, 2000]);
                self.stop_host(self.victim, true, turns);
            }
            Profile::DiskFails if self.rng.chance(1, 3) => self.fail_victim(),
            Profile::Noise if self.rng.chance(1, 3) => self.noise(),
            Profile::Takeover if self.rng.chance(1, 2) => self.take_over(),
            Profile::Rot if self.rng.chance(1, 2) => self.rot(),
            _ => {
                if self.is_wounded {
                    self.become_whole();
                }
                if self.rng.chance(1, 2) {
                    self.crash_everything();
                }
            }
        }
    }

    fn live_on(&mut self, most: u64) {
        let burst = self.rng.between(1, most);
        self.live(burst);
    }

    fn fail_victim(&mut self) {
        self.become_whole();
        self.is_wounded = true;
        match self.rng.below(3) {
            0 => {
                tell(|| "  the victim's next writes or syncs fail".into());
                self.hosts[self.victim].disk.set_faults(Faults {
                    budget: 1,
                    write_error_ppm: 100_000,
                    failed_sync_ppm: 300_000,
                    ..Faults::default()
                });
            }
            1 => {
                tell(|| "  the victim comes back empty".into());
                self.stop_host(self.victim, false, 100);
                let id = self.hosts[self.victim].id;
                self.hosts[self.victim] = self.empty_host(id);
            }
            _ => self.replace_victim(),
        }
        self.live_on(80);
        self.hosts[self.victim].disk.set_faults(Faults::default());
    }

    fn empty_host(&mut self, id: DiskId) -> Host {
        self.summary.disks_replaced += 1;
        let disk = SimDisk::new(self.disk_bytes, self.rng.draw());
        Host::new(id, disk, SEGMENT_BYTES, self.settings, self.rng.draw())
    }

    /// Another disk, with another name, takes the victim's place in every shard.
    fn replace_victim(&mut self) {
        let old = self.hosts[self.victim].id;
        let new = DiskId(self.next_disk);
        self.next_disk += 1;
        tell(|| format!("  disk {old} is replaced by {new}"));
        let turns = self.rng.pick(&[0, 50]);
        self.stop_host(self.victim, false, turns);
        self.hosts[self.victim] = self.empty_host(new);
        let shards = self
            .vdi()
            .records()
            .filter(|record| record.replicas.contains(&old))
            .map(|record| (record.shard.no, new))
            .collect();
        self.step(Event::ReplaceDisk { old, new: shards });
    }

    /// Bits of the victim's content flip while every replica holds everything.
    fn rot(&mut self) {
        self.become_whole();
        // On stable media everywhere: rot and the loss of what no flush covered are two faults.
        self.flush_victim();
        let blocks = self.hosts[self.victim].disk.data_blocks();
        // And said to be so by a later batch: a rotten batch at the very end of a log looks like one that was torn
        // by a crash, and is dropped. What it held comes back from the other replicas, but not if those are not
        // there yet when the shard is opened after everything stopped: one more fault at the same time.
        for no in 0..self.records.len() as u64 {
            let (id, op) = self.guest.ask_write(no * SHARD_BYTES);
            self.step(Event::Request(id, op));
        }
        self.become_whole();
        self.flush_victim();
        let disk = &mut self.hosts[self.victim].disk;
        for _ in 0..self.rng.between(1, 12).min(blocks.len() as u64) {
            let at = self.rng.pick(&blocks) + 512 * self.rng.below(8);
            tell(|| format!("  rot at {at} of the victim"));
            disk.rot(at);
            self.summary.rotten += 1;
        }
    }

    /// Everything so far is on stable media of the victim too.
    fn flush_victim(&mut self) {
        let (id, op) = self.guest.ask_flush();
        self.step(Event::Request(id, op));
        let mut patience = PATIENCE;
        let is_flushed = |world: &World| {
            let node = world.hosts[world.victim].node.as_ref();
            world.is_whole() && node.is_some_and(|node| !node.is_busy())
        };
        while !is_flushed(self) {
            self.turn();
            patience -= 1;
            assert!(patience > 0, "the victim does not flush: {}", self.state());
        }
    }

    /// Noise over the victim, then a scrub; nothing restarts before the pool is whole again.
    fn noise(&mut self) {
        self.become_whole();
        self.is_wounded = true;
        let blocks = self.hosts[self.victim].disk.data_blocks();
        for _ in 0..self.rng.between(1, 8) {
            if blocks.is_empty() {
                break;
            }
            let at = self.rng.pick(&blocks);
            let length = 512 * self.rng.between(1, 64);
            if at + length <= self.disk_bytes {
                tell(|| format!("  noise over {length} B at {at}"));
                self.hosts[self.victim].disk.scribble(at, length);
                self.summary.rotten += length / 512;
            }
        }
        if self.rng.chance(1, 2) {
            self.live_on(60);
        }
        self.scrub();
        tell(|| "  the disk with the noise on it is given up".into());
        self.replace_victim();
    }

    fn grow(&mut self) {
        self.end_zombie();
        let bytes = self.spec.bytes + self.rng.between(1, 3000) * u64::from(self.spec.sector_bytes);
        if bytes > 4 * SHARD_BYTES {
            return;
        }
        let before = self.spec.bytes.div_ceil(SHARD_BYTES);
        let added = (before..bytes.div_ceil(SHARD_BYTES))
            .map(|no| self.place_shard(ShardNo(no as u32)))
            .collect();
        tell(|| format!("  grown to {bytes}"));
        self.spec.bytes = bytes;
        self.guest.resized(bytes);
        self.step(Event::Resized { bytes, added });
    }

    fn crash_everything(&mut self) {
        let is_power_loss = self.rng.chance(1, 2);
        tell(|| {
            format!(
                "everything stops: {}",
                if is_power_loss { "power loss" } else { "kill" }
            )
        });
        self.end_zombie();
        self.vdi = None;
        for _ in 0..self.rng.index(self.saves.len() + 1) {
            self.save_one();
        }
        self.saves.clear();
        for at in 0..self.hosts.len() {
            self.break_links(at);
            self.is_linked[at] = false;
            self.away[at] = self.rng.pick(&[0, 0, 10, 300]);
            if self.hosts[at].node.is_some() {
                self.hosts[at].stop(is_power_loss);
            } else if is_power_loss {
                self.hosts[at].disk.lose_power();
            }
        }
        if is_power_loss {
            self.guest.lose_power();
            self.summary.power_losses += 1;
        } else {
            self.summary.kills += 1;
        }
        self.open();
    }

    // ---- being whole ----

    /// Lets the pool heal: the guest's requests end, every disk returns, every shard gets in sync everywhere.
    fn become_whole(&mut self) {
        self.end_zombie();
        for away in &mut self.away {
            *away = 0;
        }
        let mut patience = PATIENCE;
        while !self.is_whole() {
            self.turn();
            patience -= 1;
            assert!(patience > 0, "the pool does not heal: {}", self.state());
        }
        self.is_wounded = false;
    }

    fn is_whole(&self) -> bool {
        let status = self.vdi().status();
        // Busy is also a writer that was not told yet that a replica is up to date.
        self.guest.waits() == 0
            && !self.vdi().is_busy()
            && self.saves.is_empty()
            && status.shards_whole == status.shards
            && self.is_linked.iter().all(|linked| *linked)
            && self.records.values().all(|record| self.is_converged(record))
    }

    /// Whether every replica says that it holds the same stream to the same end.
    fn is_converged(&self, record: &ShardRecord) -> bool {
        let mut ends = Vec::new();
        for host in &self.hosts {
            let Some(node) = &host.node else { return false };
            if record.replicas.contains(&host.id) {
                let is_good = node
                    .promise(record.shard)
                    .is_some_and(|(_, good_until)| good_until.is_none());
                let summary = node.shards().into_iter().find(|s| s.shard == record.shard);
                match summary {
                    Some(summary) if is_good => ends.push(summary.end),
                    _ => return false,
                }
            }
        }
        ends.len() == record.replicas.len() && ends.windows(2).all(|pair| pair[0] == pair[1])
    }

    fn state(&self) -> String {
        let status = self.vdi().status();
        let disks: Vec<String> = self
            .hosts
            .iter()
            .enumerate()
            .map(|(at, host)| {
                format!(
                    "disk {} linked {} served {} shards {:?}",
                    host.id,
                    self.is_linked[at],
                    host.node.is_some(),
                    host.node.as_ref().map(|node| node
                        .shards()
                        .into_iter()
                        .map(|s| (s.shard, s.end, node.promise(s.shard)))
                        .collect::<Vec<_>>())
                )
            })
            .collect();
        format!(
            "guest waits for {} (oldest {}), saves {}, {status:?}\n  records {:?}\n  {}",
            self.guest.waits(),
            self.guest.oldest(),
            self.saves.len(),
            self.records,
            disks.join("\n  ")
        )
    }

    fn scrub(&mut self) -> (u64, u64) {
        self.last_scrub = None;
        self.step(Event::Scrub);
        let mut patience = PATIENCE;
        loop {
            if let Some(found) = self.last_scrub {
                return found;
            }
            self.turn();
            patience -= 1;
            assert!(patience > 0, "the scrub does not end: {}", self.state());
        }
    }

    // ---- the end ----

    /// All well again: everything in sync, a scrub repairs what rot left, the next one finds nothing, the
    /// guest reads everything, and the replicas are the same byte for byte.
    fn end(&mut self) {
        self.become_whole();
        if matches!(self.profile, Profile::Rot | Profile::Noise) {
            // Perhaps one that was running before the last damage; then one that was not.
            self.scrub();
            self.scrub();
            self.become_whole();
        }
        let (repaired, unreadable) = self.scrub();
        assert_eq!(
            (repaired, unreadable),
            (0, 0),
            "a scrub of a healthy pool: repaired, unreadable"
        );
        let mut offset = 0;
        while offset < self.spec.bytes {
            let length = (self.spec.bytes - offset).min(512 << 10);
            let (id, op) = self.guest.ask_read(offset, length);
            self.step(Event::Request(id, op));
            offset += length;
        }
        self.become_whole();
        for record in self.records.values().cloned().collect::<Vec<_>>() {
            self.compare_replicas(&record);
        }
    }

    fn compare_replicas(&mut self, record: &ShardRecord) {
        let mut first: Option<(DiskId, Vec<u8>)> = None;
        for at in 0..self.hosts.len() {
            let disk = self.hosts[at].id;
            if !record.replicas.contains(&disk) {
                continue;
            }
            let content = self.read_replica(at, record.shard);
            match &first {
                None => first = Some((disk, content)),
                Some((other, expected)) => {
                    let differs = expected
                        .chunks(4096)
                        .zip(content.chunks(4096))
                        .position(|(a, b)| a != b);
                    assert_eq!(
                        differs, None,
                        "first block of shard {} that differs between disks {other} and {disk}",
                        record.shard
                    );
                }
            }
        }
    }

    /// Everything that one replica holds, asked of its node past writer and network.
    fn read_replica(&mut self, at: usize, shard: ShardId) -> Vec<u8> {
        let token = self.hosts[at]
            .node
            .as_ref()
            .and_then(|node| node.promise(shard))
            .expect("whole")
            .0;
        let mut bytes = Vec::new();
        for first in (0..(SHARD_BYTES / 4096) as u32).step_by(256) {
            let id = RequestId(u64::MAX - u64::from(first));
            let request = ReplicaRequest::Read {
                layer: HEAD,
                block: BlockNo(first),
                count: 256,
            };
            let message = ToReplica {
                shard,
                token,
                id,
                request,
            };
            self.hosts[at].receive(self.now, message);
            let mut patience = PATIENCE;
            let answer = loop {
                self.hosts[at].turn(self.now, true);
                if let Some(answer) = self.hosts[at]
                    .take_answers()
                    .into_iter()
                    .find(|answer| answer.id == id)
                {
                    break answer;
                }
                patience -= 1;
                assert!(patience > 0, "disk {} does not answer a read", self.hosts[at].id);
            };
            let Ok(ReplicaReply::Read(parts)) = answer.result else {
                panic!("disk {} shard {shard}: {:?}", self.hosts[at].id, answer.result);
            };
            for part in parts {
                match part {
                    ReadPart::Data(data) => bytes.extend_from_slice(data.bytes()),
                    ReadPart::Zeros(blocks) => bytes.resize(bytes.len() + blocks as usize * 4096, 0),
                }
            }
        }
        bytes
    }
}

fn short(message: &ToReplica<HeapBlock>) -> String {
    let mut text = format!(
        "{:?} {} {:?} {:?}",
        message.token, message.shard, message.id, message.request
    );
    text.truncate(220);
    text
}

fn short_answer(answer: &FromReplica<HeapBlock>) -> String {
    let mut text = format!(
        "{:?} {} {:?} {:?}",
        answer.token, answer.shard, answer.id, answer.result
    );
    text.truncate(220);
    text
}
