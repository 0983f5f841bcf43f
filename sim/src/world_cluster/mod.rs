//! A whole cluster: hosts with a daemon, disks and a clock each, streams between them that are cut and break, a control
//! store, and guests that move from host to host while those before them live on.
//!
//! ```text
//!  guests ─▶ Vdi ─▶ Streams (frames of `wire`) ─▶ Host (DiskNode, Store, SimDisk, SimKv)    3 to 5 machines
//!             └───▶ Records: `control`'s own code, compare-and-swap, leases
//! ```
//! What happens to it is in `fate.rs`; a run is a seed, a number of requests, and which of the faults are left out.

mod daemon;
mod disk_faults;
mod drives;
mod fate;
mod guests;
mod links;
mod machine;
mod records;
mod streams;
mod summary;
mod whole;

use std::collections::{BTreeMap, BTreeSet};

use control::ControlStore;
use replication::ShardRecord;
use store::StoreSettings;
use types::{DiskId, LayerId, ShardId, ShardNo, VdiId};
use vdi::VdiSpec;

use crate::host::Host;
use crate::past::layers;
use crate::trace::tell;
use crate::{Rng, SimDisk, mix};

use drives::Drive;
use fate::{Fate, Trap, Undo};
use guests::Guests;
use machine::{LocalClock, Machine};
use records::{Records, host_id};
use streams::Streams;
pub use summary::ClusterSummary;

/// Which host.
type At = usize;
/// Nanoseconds since the world began.
type Time = u64;

const SEGMENT_BYTES: u64 = 512 << 10;
const SHARD_BYTES: u64 = 1 << 20;
const HEAD: LayerId = LayerId(1);
/// Turns after which something that should have happened has not.
const PATIENCE: u32 = 30_000;

const MICRO: u64 = 1_000;
const MILLI: u64 = 1_000_000;

struct World {
    seed: u64,
    rng: Rng,
    now: Time,
    /// The longest turn, for now.
    pace: u64,
    machines: Vec<Machine>,
    /// Where each disk is: host, and which of its disks.
    homes: BTreeMap<DiskId, (At, usize)>,
    streams: Streams,
    records: Records,
    /// Turns in which each host hears nothing from the control store, for one in which it does.
    hearing: Vec<u64>,
    drives: BTreeMap<VdiId, Drive>,
    fate: Fate,
    undo: Vec<(Time, Undo)>,
    trap: Option<Trap>,
    /// When another host takes this disk, this host is cut off from all others; whether they hear of it at once.
    cut_when_taken: Option<(VdiId, At, bool)>,
    /// Numbers the requests that fill disks.
    next_ballast: u64,
    /// Disks that somebody else fills now.
    filled: BTreeSet<(At, usize)>,
    /// The disk that may fail of itself now.
    failing: Option<DiskId>,
    summary: ClusterSummary,
}

/// Runs the world of `seed` for `ops` guest requests, without the faults whose numbers are in `without`; panics when
/// a promise is broken.
pub fn run(seed: u64, ops: u64, without: &BTreeSet<u32>) -> ClusterSummary {
    let mut world = World::new(seed);
    let mut left = ops;
    let mut fault = 0;
    while left > 0 {
        let burst = world.rng.between(1, 30).min(left);
        left -= burst;
        world.live(burst);
        // Drawn apart, so that leaving one out changes no other.
        let mut rng = Rng::new(mix(seed ^ mix(u64::from(fault) + 1)));
        crate::runner::came_to_fault(fault);
        if !without.contains(&fault) {
            world.befall(fault, &mut rng);
        }
        fault += 1;
    }
    world.end();
    world.summary.faults = u64::from(fault);
    world.summary
}

impl World {
    fn new(seed: u64) -> World {
        let mut rng = Rng::new(seed);
        let hosts = rng.pick(&[3, 3, 3, 4, 5]) as usize;
        let replicas = rng.pick(&[1, 2, 2, 3, 3, 3, 3]) as usize;
        let settings = StoreSettings {
            cache_bytes: rng.pick(&[64 << 10, 4 << 20]),
            appends_in_flight: rng.between(1, 8) as usize,
            checkpoint_bytes: rng.pick(&[256 << 10, 2 << 20]),
            segments_reserved: 3,
            clean_below_free: 8,
            cleaning_bytes: 128 << 10,
        };
        let disk_bytes = (1 << 20) + 40 * SEGMENT_BYTES;
        let mut homes = BTreeMap::new();
        let mut machines = Vec::new();
        for at in 0..hosts {
            // With many hosts some compute only.
            let count = if at >= replicas.max(2) {
                rng.below(2)
            } else {
                rng.between(1, 2)
            };
            let disks = (0..count as usize).map(|no| {
                let id = DiskId((at * 10 + no) as u128 + 1);
                homes.insert(id, (at, no));
                let mut disk = SimDisk::new(disk_bytes, rng.draw());
                disk.set_slowness(rng.pick(&[1, 1, 2, 4, 20]));
                let mut host = Host::new(id, disk, SEGMENT_BYTES, settings, rng.draw());
                host.keep_copies();
                host.stop(false);
                host
            });
            let disks: Vec<Host> = disks.collect();
            machines.push(Machine::new(disks, LocalClock::new(&mut rng)));
        }
        let usual = rng.pick(&[20 * MICRO, 500 * MICRO, 3 * MILLI]);
        let mut world = World {
            seed,
            now: 0,
            pace: MILLI,
            machines,
            homes,
            streams: Streams::new(rng.draw(), usual),
            records: Records::new(rng.draw(), hosts),
            hearing: (0..hosts).map(|_| rng.pick(&[1, 4, 60, 600])).collect(),
            drives: BTreeMap::new(),
            fate: Fate::choose(&mut rng, replicas),
            undo: Vec::new(),
            trap: None,
            cut_when_taken: None,
            next_ballast: 0,
            filled: BTreeSet::new(),
            failing: None,
            summary: ClusterSummary::default(),
            rng,
        };
        tell(|| {
            format!(
                "seed {seed}: {hosts} hosts, disks {:?}, {replicas} replicas, {:?}",
                world.homes, world.fate
            )
        });
        world.make_records();
        for _ in 0..world.rng.pick(&[1, 1, 2]) {
            world.make_drive(replicas);
        }
        world
    }

    /// As `weft disk add` leaves it.
    fn make_records(&mut self) {
        let control = self.records.of(0);
        for (disk, (at, _)) in &self.homes {
            // What a disk's record says beside these has defaults.
            let record = serde_json::json!({
                "id": disk,
                "path": format!("/dev/{disk}"),
                "bytes": 1 << 30,
                "state": "active",
                "host": host_id(*at),
            });
            let record = serde_json::from_value(record).expect("a record");
            control.put_disk(&record).expect("records in memory");
        }
    }

    fn make_drive(&mut self, replicas: usize) {
        let control = self.records.of(0);
        let id = control.next_vdi_id().expect("records in memory");
        let sector_bytes = self.rng.pick(&[512, 512, 4096]);
        let shards = self.rng.pick(&[1, 1, 2, 3]);
        let bytes = shards * SHARD_BYTES - self.rng.below(40) * u64::from(sector_bytes);
        let records: Vec<ShardRecord> = (0..shards as u32)
            .map(|no| {
                let shard = ShardId {
                    vdi: id,
                    no: ShardNo(no),
                };
                ShardRecord::new(shard, self.place(replicas))
            })
            .collect();
        create(&control, id, bytes, sector_bytes, replicas, &records);
        tell(|| format!("  VDI {id}: {bytes} B, sectors of {sector_bytes}, {records:?}"));
        let spec = VdiSpec {
            id,
            bytes,
            sector_bytes,
            shard_bytes: SHARD_BYTES,
            lineage: layers(id, HEAD),
            sharing: replication::Sharing::Alone,
        };
        let guests = Guests::new(self.rng.draw(), bytes, u64::from(sector_bytes), SHARD_BYTES);
        self.drives.insert(id, Drive::new(spec, guests));
    }

    /// Disks of different hosts.
    fn place(&mut self, replicas: usize) -> Vec<DiskId> {
        let mut disks: Vec<(DiskId, At)> = self.homes.iter().map(|(disk, home)| (*disk, home.0)).collect();
        self.rng.shuffle(&mut disks);
        let mut hosts = BTreeSet::new();
        disks.retain(|(_, at)| hosts.insert(*at));
        disks.truncate(replicas);
        assert_eq!(disks.len(), replicas, "a host for each replica");
        disks.into_iter().map(|(disk, _)| disk).collect()
    }

    fn turn(&mut self) {
        let is_idle = !self.streams.is_busy() && self.machines.iter().all(Machine::is_idle);
        // Short and long turns alike, and long ones where nothing happens.
        let most = if is_idle {
            self.pace.max(40 * MILLI)
        } else {
            self.pace
        };
        let doublings = self
            .rng
            .below(u64::from((most / (20 * MICRO)).max(2).ilog2()) + 1);
        let least = (20 * MICRO) << doublings;
        self.now += self.rng.between(least, least * 2);
        self.summary.turns += 1;
        self.undo_due();
        self.records.advance_to(self.now);
        for (at, life, said) in self.records.take_said() {
            if self.machines[at].daemon.is_some() && self.machines[at].life == life {
                self.said(at, said);
            }
        }
        self.streams.advance_to(self.now);
        let (machines, now) = (&self.machines, self.now);
        let arrived = self
            .streams
            .poll(|at| !machines[at].is_off && machines[at].frozen_until <= now);
        for (id, side, piece) in arrived {
            self.arrived(id, side, piece);
        }
        self.streams.sweep();
        let mut hosts: Vec<At> = (0..self.machines.len()).collect();
        self.rng.shuffle(&mut hosts);
        for at in hosts {
            if self.rng.chance(7, 8) {
                self.host_turn(at);
            }
            self.spring();
        }
        self.operate();
    }

    /// Guests ask for so many things, or cannot get them asked for a long time.
    fn live(&mut self, requests: u64) {
        let mut left = requests;
        let mut turns = 40 * requests;
        while left > 0 && turns > 0 {
            turns -= 1;
            for _ in 0..self.rng.below(4) {
                left = left.saturating_sub(u64::from(self.somebody_asks()));
            }
            self.turn();
        }
    }
}

fn create(
    control: &ControlStore,
    id: VdiId,
    bytes: u64,
    sector_bytes: u32,
    replicas: usize,
    shards: &[ShardRecord],
) {
    let record = control::VdiRecord {
        id,
        revision: 1,
        name: format!("drive{id}"),
        bytes,
        sector_bytes,
        replicas: replicas as u8,
        shard_bytes: SHARD_BYTES,
        head: HEAD,
        created: jiff::Timestamp::UNIX_EPOCH,
        attachments: Vec::new(),
        deleting: false,
    };
    let placed = control::Placed {
        placement: control.placement().expect("records in memory"),
        writer: None,
    };
    control
        .create_vdi(&record, shards, placed)
        .expect("nobody else makes one");
}
