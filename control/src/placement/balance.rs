//! What to move so that every disk is as full as its size says: when disks were added, or filled unevenly.
//!
//! The emptiest disk takes a shard from the fullest that has one it may take, again and again, until both are near the
//! mean. Each replica moves at most once, and only towards a disk that was too empty or away from one that was too
//! full: a new host is filled, and nothing else moves.

use std::collections::{BTreeMap, BTreeSet};

use types::{DiskId, ShardId};

use super::{Candidate, DiskMap};

/// A disk and what it can store.
#[derive(Clone, Debug)]
pub struct Holding {
    /// Identity, size in bytes (of the disk, whatever is on it) and failure domains.
    pub disk: Candidate,
    /// Nothing may move to it or away from it: it is leaving, or cannot be reached.
    pub is_fixed: bool,
}

/// One shard as it is placed.
#[derive(Clone, Copy, Debug)]
pub struct Placed<'a> {
    /// Which.
    pub shard: ShardId,
    /// Where.
    pub replicas: &'a [DiskId],
    /// Bytes that moving a replica of it would move, at most.
    pub bytes: u64,
    /// Its replicas stay: it is not whole, or nobody is there to move it. It counts as load all the same.
    pub is_fixed: bool,
}

/// A replica that is to move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Move {
    /// Of which shard.
    pub shard: ShardId,
    /// From here.
    pub from: DiskId,
    /// To there.
    pub to: DiskId,
    /// As said in [`Placed`].
    pub bytes: u64,
}

/// How full disks are, relative to the mean of all.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Load {
    /// The fullest disk's share of its size, over the pool's.
    pub max: f64,
    /// The emptiest one's.
    pub min: f64,
}

/// Pairs that are tried for one move before the emptiest disk is left as it is.
const SOURCES_TRIED: usize = 64;

/// Moves that bring every disk within `tolerance` (a part of one) of the pool's mean fill, as far as failure domains allow,
/// and how full the disks are before and after. A move never puts more replicas of a shard into one zone or onto
/// one host than were there.
///
/// # Panics
/// When a disk is listed twice.
#[must_use]
pub fn plan_moves(holdings: &[Holding], shards: &[Placed<'_>], tolerance: f64) -> (Vec<Move>, Load, Load) {
    let mut plan = Plan::new(holdings, shards);
    let before = plan.load();
    let mut moves = Vec::new();
    while let Some(next) = plan.next(tolerance) {
        moves.push(next);
    }
    (moves, before, plan.load())
}

struct Disk {
    id: DiskId,
    bytes: u64,
    used: u64,
    is_fixed: bool,
    /// Replicas that have not moved: numbers of shards.
    shards: Vec<u32>,
}

struct Plan<'a> {
    map: DiskMap,
    disks: Vec<Disk>,
    shards: &'a [Placed<'a>],
    /// Replicas that have moved already, by shard number; small beside the rest.
    moved: BTreeMap<u32, Vec<(DiskId, DiskId)>>,
    /// Disks that may give and take, emptiest first: fill in parts of 2^32, number.
    order: BTreeSet<(u64, u32)>,
    mean: f64,
}

impl<'a> Plan<'a> {
    fn new(holdings: &[Holding], shards: &'a [Placed<'a>]) -> Plan<'a> {
        let candidates: Vec<Candidate> = holdings.iter().map(|holding| holding.disk.clone()).collect();
        let mut disks: Vec<Disk> = holdings
            .iter()
            .map(|holding| Disk {
                id: holding.disk.disk,
                bytes: holding.disk.bytes.max(1),
                used: 0,
                is_fixed: holding.is_fixed,
                shards: Vec::new(),
            })
            .collect();
        disks.sort_by_key(|disk| disk.id);
        for (number, shard) in (0..).zip(shards) {
            for replica in shard.replicas {
                if let Ok(at) = disks.binary_search_by_key(replica, |disk| disk.id) {
                    disks[at].used += shard.bytes;
                    disks[at].shards.push(number);
                }
            }
        }
        let of_all = |value: fn(&Disk) -> u64| {
            let free = disks.iter().filter(|disk| !disk.is_fixed);
            free.map(|disk| u128::from(value(disk))).sum::<u128>() as f64
        };
        let mean = of_all(|disk| disk.used) / of_all(|disk| disk.bytes).max(1.0);
        let order = (0..)
            .zip(&disks)
            .filter(|(_, disk)| !disk.is_fixed)
            .map(|(number, disk)| (fill(disk), number))
            .collect();
        Plan {
            map: DiskMap::new(&candidates),
            disks,
            shards,
            moved: BTreeMap::new(),
            order,
            mean,
        }
    }

    fn load(&self) -> Load {
        let part = |entry: Option<&(u64, u32)>| {
            let disk = entry.map(|(_, number)| &self.disks[*number as usize]);
            disk.map_or(1.0, |disk| {
                disk.used as f64 / disk.bytes as f64 / self.mean.max(f64::MIN_POSITIVE)
            })
        };
        Load {
            max: part(self.order.last()),
            min: part(self.order.first()),
        }
    }

    /// One move, done; `None` when nothing is left to gain.
    fn next(&mut self, tolerance: f64) -> Option<Move> {
        loop {
            let (_, to) = *self.order.first()?;
            let (_, from) = *self.order.last()?;
            let part = |number: u32| {
                let disk = &self.disks[number as usize];
                disk.used as f64 / disk.bytes as f64
            };
            let is_even =
                part(to) >= self.mean * (1.0 - tolerance) && part(from) <= self.mean * (1.0 + tolerance);
            if to == from || is_even {
                return None;
            }
            // Whichever end is out of bounds has to change; the other end may be anybody.
            if part(to) < self.mean * (1.0 - tolerance) {
                if let Some(found) = self.fill_up(to) {
                    return Some(found);
                }
                self.leave(to);
            } else {
                if let Some(found) = self.relieve(from) {
                    return Some(found);
                }
                self.leave(from);
            }
        }
    }

    /// Brings something to `to` from one of the fullest disks.
    fn fill_up(&mut self, to: u32) -> Option<Move> {
        let sources: Vec<u32> = self
            .order
            .iter()
            .rev()
            .map(|entry| entry.1)
            .take(SOURCES_TRIED)
            .collect();
        sources.into_iter().find_map(|from| self.carry(from, to))
    }

    /// Takes something off `from` to one of the emptiest disks.
    fn relieve(&mut self, from: u32) -> Option<Move> {
        let sinks: Vec<u32> = self
            .order
            .iter()
            .map(|entry| entry.1)
            .take(SOURCES_TRIED)
            .collect();
        sinks.into_iter().find_map(|to| self.carry(from, to))
    }

    /// Moves the first shard that may go from here to there, if that brings the two nearer to each other.
    fn carry(&mut self, from: u32, to: u32) -> Option<Move> {
        let (source, sink) = (&self.disks[from as usize], &self.disks[to as usize]);
        let at = source.shards.iter().position(|number| {
            let bytes = self.shards[*number as usize].bytes;
            let after = (sink.used + bytes) as f64 / sink.bytes as f64;
            bytes > 0
                && !self.shards[*number as usize].is_fixed
                && after <= (source.used - bytes) as f64 / source.bytes as f64
                && self.may_go(*number, source.id, sink.id)
        })?;
        let number = self.disks[from as usize].shards.swap_remove(at);
        let shard = &self.shards[number as usize];
        let next = Move {
            shard: shard.shard,
            from: self.disks[from as usize].id,
            to: self.disks[to as usize].id,
            bytes: shard.bytes,
        };
        self.moved.entry(number).or_default().push((next.from, next.to));
        self.change(from, |disk| disk.used -= next.bytes);
        self.change(to, |disk| disk.used += next.bytes);
        Some(next)
    }

    fn may_go(&self, number: u32, from: DiskId, to: DiskId) -> bool {
        let mut replicas = self.shards[number as usize].replicas.to_vec();
        for (old, new) in self.moved.get(&number).into_iter().flatten() {
            if let Some(replica) = replicas.iter_mut().find(|replica| *replica == old) {
                *replica = *new;
            }
        }
        if replicas.contains(&to) {
            return false;
        }
        replicas.retain(|replica| *replica != from);
        self.map.crowd(to, &replicas) <= self.map.crowd(from, &replicas)
    }

    fn change(&mut self, number: u32, how: impl FnOnce(&mut Disk)) {
        let disk = &mut self.disks[number as usize];
        let was_listed = self.order.remove(&(fill(disk), number));
        how(disk);
        if was_listed {
            self.order.insert((fill(disk), number));
        }
    }

    /// Nothing can be done about this disk.
    fn leave(&mut self, number: u32) {
        self.order.remove(&(fill(&self.disks[number as usize]), number));
    }
}

/// Comparable, and exact enough: parts of 2^32 of the disk.
fn fill(disk: &Disk) -> u64 {
    u64::try_from((u128::from(disk.used) << 32) / u128::from(disk.bytes)).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use types::{ShardNo, VdiId};

    use super::*;

    const SHARD_BYTES: u64 = 1 << 30;

    fn holding(host: u64, disk: u64, bytes: u64) -> Holding {
        Holding {
            disk: Candidate {
                disk: DiskId(u128::from(host * 100 + disk + 1)),
                bytes,
                host: format!("h{host}"),
                zone: String::new(),
            },
            is_fixed: false,
        }
    }

    fn shard(no: u32) -> ShardId {
        ShardId {
            vdi: VdiId(1),
            no: ShardNo(no),
        }
    }

    fn place_all(holdings: &[Holding], count: u32, replicas: usize) -> Vec<(ShardId, Vec<DiskId>)> {
        let candidates: Vec<Candidate> = holdings.iter().map(|holding| holding.disk.clone()).collect();
        let map = DiskMap::new(&candidates);
        (0..count)
            .map(|no| (shard(no), map.place(shard(no), replicas).expect("enough disks")))
            .collect()
    }

    fn placed(shards: &[(ShardId, Vec<DiskId>)]) -> Vec<Placed<'_>> {
        shards
            .iter()
            .map(|(shard, replicas)| Placed {
                shard: *shard,
                replicas,
                bytes: SHARD_BYTES,
                is_fixed: false,
            })
            .collect()
    }

    /// Carries the moves out, checking each: from where the replica is, to where none is.
    fn carry_out(shards: &mut [(ShardId, Vec<DiskId>)], moves: &[Move]) {
        let mut by_id: BTreeMap<ShardId, &mut Vec<DiskId>> = shards
            .iter_mut()
            .map(|(shard, replicas)| (*shard, replicas))
            .collect();
        for one in moves {
            let replicas = by_id.get_mut(&one.shard).expect("a shard that is placed");
            assert!(!replicas.contains(&one.to), "{one:?} has a replica there");
            let old = replicas.iter_mut().find(|disk| **disk == one.from);
            *old.expect("a replica is there") = one.to;
        }
    }

    fn hosts_of(replicas: &[DiskId]) -> usize {
        let mut hosts: Vec<u128> = replicas.iter().map(|disk| (disk.0 - 1) / 100).collect();
        hosts.sort_unstable();
        hosts.dedup();
        hosts.len()
    }

    #[test]
    fn a_new_host_is_filled_and_nothing_else_moves() {
        let mut holdings: Vec<Holding> = (0..10)
            .flat_map(|host| (0..4).map(move |disk| holding(host, disk, 1 << 40)))
            .collect();
        let mut shards = place_all(&holdings, 4000, 3);
        holdings.extend((0..4).map(|disk| holding(10, disk, 1 << 40)));
        let (moves, before, after) = plan_moves(&holdings, &placed(&shards), 0.25);
        assert!(before.min == 0.0 && after.min >= 0.75, "{before:?} {after:?}");
        // 12,000 replicas on 44 disks: the mean is 272, three quarters of it on each of the new four 205.
        let to_new = moves.iter().filter(|one| one.to.0 > 1000).count();
        assert!((816..=840).contains(&to_new), "{to_new} moved to the new host");
        assert!(moves.len() - to_new < 40, "{} others moved", moves.len() - to_new);
        carry_out(&mut shards, &moves);
        assert!(shards.iter().all(|(_, replicas)| hosts_of(replicas) == 3));
    }

    #[test]
    fn what_is_even_stays() {
        let holdings: Vec<Holding> = (0..3).map(|host| holding(host, 0, 1 << 40)).collect();
        let shards = place_all(&holdings, 100, 3);
        let (moves, before, after) = plan_moves(&holdings, &placed(&shards), 0.01);
        assert_eq!((moves, before), (Vec::new(), after));
    }

    #[test]
    fn nothing_moves_to_or_from_a_fixed_disk() {
        let mut holdings: Vec<Holding> = (0..4).map(|host| holding(host, 0, 1 << 40)).collect();
        let shards = place_all(&holdings[..3], 60, 1);
        holdings[3].is_fixed = true;
        let (moves, ..) = plan_moves(&holdings, &placed(&shards), 0.05);
        let fixed = holdings[3].disk.disk;
        assert!(moves.iter().all(|one| one.from != fixed && one.to != fixed));
    }

    #[test]
    fn empty_pools_need_nothing() {
        assert!(plan_moves(&[], &[], 0.1).0.is_empty());
        assert!(plan_moves(&[holding(0, 0, 1 << 40)], &[], 0.1).0.is_empty());
    }

    proptest! {
        #[test]
        fn moves_are_possible_and_make_no_shard_worse(
            sizes in proptest::collection::vec((0u64..5, 1u64..5), 3..12),
            count in 0u32..200,
            replicas in 1usize..=3,
            holes in proptest::collection::vec(any::<bool>(), 12),
        ) {
            let all: Vec<Holding> = (0..)
                .zip(&sizes)
                .map(|(disk, (host, tib))| holding(*host, disk, tib << 40))
                .collect();
            let first: Vec<Holding> = all
                .iter()
                .zip(&holes)
                .enumerate()
                .filter(|(number, (_, hole))| *number < 3 || !**hole)
                .map(|(_, (holding, _))| holding.clone())
                .collect();
            let mut shards = place_all(&first, count, replicas);
            let hosts: Vec<usize> = shards.iter().map(|(_, replicas)| hosts_of(replicas)).collect();
            let (moves, ..) = plan_moves(&all, &placed(&shards), 0.1);
            carry_out(&mut shards, &moves);
            for ((shard, replicas), hosts) in shards.iter().zip(hosts) {
                prop_assert!(hosts_of(replicas) >= hosts, "{shard:?}");
            }
            prop_assert!(moves.len() <= shards.len() * 3);
        }
    }
}
