//! Placement and rebalancing at scale, by simulation: the table of docs/scale.md.
//!
//! `cargo run --release -p weft-control --example scale -- HOSTS DISKS SHARDS`

use std::collections::BTreeMap;
use std::time::Instant;

use replication::ShardRecord;
use types::{DiskId, ShardId, ShardNo, VdiId};
use weft_control::placement::{Candidate, DiskMap, Holding, Load, Move, Placed, plan_moves, weight};

/// Each disk, in bytes: 1,000 hosts of 24 of them hold a million shards three times at an eighth of their space.
const DISK_BYTES: u64 = 1 << 40;
const SHARD_BYTES: u64 = 1 << 30;
/// Shards in one VDI of the simulation.
const VDI_SHARDS: u32 = 100;
/// Rebalancing leaves disks within so much of the mean.
const TOLERANCE: f64 = 0.05;

fn main() {
    let mut numbers = std::env::args()
        .skip(1)
        .map(|text| text.parse().expect("HOSTS DISKS SHARDS"));
    let hosts = numbers.next().unwrap_or(1000);
    let disks = numbers.next().unwrap_or(24);
    let shards = numbers.next().unwrap_or(1_000_000);
    println!("{hosts} hosts x {disks} disks of 1 TiB, {shards} shards of 1 GiB, 3 replicas, 10 zones");

    let mut holdings: Vec<Holding> = (0..hosts).flat_map(|host| host_of(host, disks)).collect();
    let placed = timed("place, each shard counting for the next", || {
        place(&holdings, shards)
    });
    print_load("as placed", &plan(&holdings, &placed, f64::INFINITY).1);
    print_records(&placed);

    let evened = timed("plan moves to within 5 %", || plan(&holdings, &placed, TOLERANCE));
    print_moves(&evened, shards);
    let placed = carry_out(placed, &evened.0);

    holdings.extend(host_of(hosts, disks));
    let added = timed("a host is added: plan", || plan(&holdings, &placed, TOLERANCE));
    print_moves(&added, shards);
    let share = 3.0 * f64::from(shards) / f64::from(hosts + 1);
    println!("  the new host's share of all replicas is {share:.0}");
    let placed = carry_out(placed, &added.0);

    let gone = holdings[0].disk.host.clone();
    timed("a host dies: a new place for each of its replicas", || {
        lose(&holdings, &placed, &gone);
    });
    println!("memory at most: {}", peak_memory());
}

fn host_of(host: u32, disks: u32) -> Vec<Holding> {
    (0..disks)
        .map(|disk| Holding {
            disk: Candidate {
                disk: DiskId(u128::from(host) << 32 | u128::from(disk) | 1 << 64),
                bytes: DISK_BYTES,
                host: format!("host{host:04}"),
                zone: format!("zone{}", host % 10),
            },
            is_fixed: false,
        })
        .collect()
}

fn shard(number: u32) -> ShardId {
    ShardId {
        vdi: VdiId(1 + number / VDI_SHARDS),
        no: ShardNo(number % VDI_SHARDS),
    }
}

/// The disks with these weights.
fn map_of(holdings: &[Holding], weigh: impl Fn(&Candidate) -> u64) -> DiskMap {
    let candidates: Vec<Candidate> = holdings
        .iter()
        .map(|holding| Candidate {
            bytes: weigh(&holding.disk),
            ..holding.disk.clone()
        })
        .collect();
    DiskMap::new(&candidates)
}

fn place(holdings: &[Holding], shards: u32) -> Vec<Vec<DiskId>> {
    let mut map = map_of(holdings, |disk| weight(disk.bytes, 0));
    let mut used: BTreeMap<DiskId, u64> = BTreeMap::new();
    (0..shards)
        .map(|number| {
            let chosen = map.place(shard(number), 3).expect("enough disks");
            for disk in &chosen {
                let used = used.entry(*disk).or_default();
                *used += SHARD_BYTES;
                map.set_weight(*disk, weight(DISK_BYTES, *used));
            }
            chosen
        })
        .collect()
}

fn plan(holdings: &[Holding], placed: &[Vec<DiskId>], tolerance: f64) -> (Vec<Move>, Load, Load) {
    let placed: Vec<Placed<'_>> = (0..)
        .zip(placed)
        .map(|(number, replicas)| Placed {
            shard: shard(number),
            replicas,
            bytes: SHARD_BYTES,
            is_fixed: false,
        })
        .collect();
    plan_moves(holdings, &placed, tolerance)
}

fn carry_out(mut placed: Vec<Vec<DiskId>>, moves: &[Move]) -> Vec<Vec<DiskId>> {
    for one in moves {
        let replicas = &mut placed[((one.shard.vdi.0 - 1) * VDI_SHARDS + one.shard.no.0) as usize];
        let old = replicas.iter_mut().find(|disk| **disk == one.from);
        *old.expect("the plan knows where replicas are") = one.to;
    }
    placed
}

fn lose(holdings: &[Holding], placed: &[Vec<DiskId>], gone: &str) {
    let map = map_of(holdings, |disk| if disk.host == gone { 0 } else { disk.bytes });
    let lost: Vec<DiskId> = holdings
        .iter()
        .filter(|holding| holding.disk.host == gone)
        .map(|holding| holding.disk.disk)
        .collect();
    let mut targets: BTreeMap<DiskId, u32> = BTreeMap::new();
    for (number, replicas) in (0..).zip(placed) {
        let stay: Vec<DiskId> = replicas
            .iter()
            .copied()
            .filter(|disk| !lost.contains(disk))
            .collect();
        if stay.len() < replicas.len() {
            let new = map.replace(shard(number), &stay).expect("enough disks");
            *targets.entry(new).or_default() += 1;
        }
    }
    let made: u32 = targets.values().sum();
    let most = targets.values().max().copied().unwrap_or(0);
    println!(
        "  {made} replicas go to {} disks, at most {most} to one",
        targets.len()
    );
}

fn print_load(what: &str, load: &Load) {
    println!(
        "  {what}: fullest disk {:.3} of the mean, emptiest {:.3}",
        load.max, load.min
    );
}

fn print_moves((moves, before, after): &(Vec<Move>, Load, Load), shards: u32) {
    print_load("before", before);
    print_load("after", after);
    let part = moves.len() as f64 / (3.0 * f64::from(shards));
    println!("  {} replicas move, {:.3} % of all", moves.len(), part * 100.0);
}

fn print_records(placed: &[Vec<DiskId>]) {
    let value = |(number, replicas): (u32, &Vec<DiskId>)| {
        let record = ShardRecord::new(shard(number), replicas.clone());
        let json = serde_json::json!({"v": 1, "record": record});
        json.to_string().len() + "shard/00000001/00000000".len()
    };
    let bytes: usize = (0..).zip(placed).map(value).sum();
    println!(
        "  shard records: {:.0} MiB of keys and values, {} bytes each",
        bytes as f64 / f64::from(1 << 20),
        bytes / placed.len().max(1)
    );
}

fn timed<T>(what: &str, action: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let result = action();
    println!("{what}: {:.2} s", start.elapsed().as_secs_f64());
    result
}

fn peak_memory() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.map_or_else(|| "not known".to_owned(), |value| value.trim().to_owned())
}
