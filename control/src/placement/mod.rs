//! Where the replicas of a shard go: weighted rendezvous hashing over failure domains ([`DiskMap`]), and what to move
//! when disks have come or filled unevenly ([`rebalance`], [`plan_moves`]).
//!
//! Every (shard, host) pair gets a score that no other pair influences, and so does every (shard, disk) pair in a host; the
//! highest scores win. A disk wins in proportion to its weight, and every daemon that knows the same disks chooses the
//! same ones. The choice is written into the shard's record, so a later version may choose differently without
//! moving anything. docs/scale.md has figures for a thousand hosts.

mod balance;
mod map;
mod rebalance;

pub use balance::{Holding, Load, Move, Placed, plan_moves};
pub use map::DiskMap;
pub use rebalance::{AIMED_AT, TOLERATED, WORTH, rebalance};
use types::DiskId;

/// A disk that may be chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Which.
    pub disk: DiskId,
    /// Weight: bytes it can store. 0 is never chosen.
    pub bytes: u64,
    /// The machine it is in; disks of one host are in one zone. Empty: a host of its own.
    pub host: String,
    /// Failure domain above the host. Replicas go to different ones where there are enough. Empty: the host is a
    /// zone of its own.
    pub zone: String,
}

/// The weight of a disk of `bytes` on which shards of `placed_bytes` (virtual size) are placed already.
///
/// A pool of few shards must not depend on the luck of the hash: one disk would fill up while another stays empty.
/// The fourth power of the free part makes an emptier disk win nearly always, and still leaves the choice to the
/// hash among equals. Thin VDIs may promise more than there is: a disk that is full of promises keeps a little weight.
#[must_use]
pub fn weight(bytes: u64, placed_bytes: u64) -> u64 {
    const PARTS: u64 = 1024;
    let free = bytes.saturating_sub(placed_bytes);
    let parts = u128::from(free) * u128::from(PARTS) / u128::from(bytes.max(1));
    let bent = u64::try_from(parts.pow(4) >> 30).expect("at most PARTS to the fourth, cut to 10 bits");
    (bytes / PARTS).max(1) * bent.max(1)
}

/// Too few disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{replicas} replicas need {replicas} disks, the pool has {disks} in use")]
pub struct TooFewDisks {
    /// Asked for.
    pub replicas: usize,
    /// That could be chosen.
    pub disks: usize,
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use types::{ShardId, ShardNo, VdiId};

    use super::*;

    fn place(shard: ShardId, replicas: usize, candidates: &[Candidate]) -> Result<Vec<DiskId>, TooFewDisks> {
        DiskMap::new(candidates).place(shard, replicas)
    }

    fn replace(shard: ShardId, present: &[DiskId], candidates: &[Candidate]) -> Result<DiskId, TooFewDisks> {
        DiskMap::new(candidates).replace(shard, present)
    }

    #[test]
    fn few_shards_spread_over_equal_disks() {
        let bytes = 2 << 30;
        for vdi in 0..200 {
            let mut placed = [0u64; 3];
            for no in 0..3 {
                let candidates: Vec<Candidate> = (0..3)
                    .map(|disk| Candidate {
                        disk: DiskId(disk as u128 + 1),
                        bytes: weight(bytes, placed[disk]),
                        host: String::new(),
                        zone: String::new(),
                    })
                    .collect();
                let shard = ShardId {
                    vdi: VdiId(vdi),
                    no: ShardNo(no),
                };
                let chosen = place(shard, 1, &candidates).expect("three disks")[0];
                placed[(chosen.0 - 1) as usize] += 1 << 30;
            }
            assert!(
                placed.iter().all(|placed| *placed <= bytes),
                "VDI {vdi}: {placed:?}"
            );
        }
    }

    #[test]
    fn weights_fall_with_what_is_placed_and_never_reach_zero() {
        let bytes = 1 << 40;
        let weights: Vec<u64> = (0..=8).map(|part| weight(bytes, part * bytes / 8)).collect();
        assert!(weights.windows(2).all(|pair| pair[0] >= pair[1]), "{weights:?}");
        assert!(weight(bytes, u64::MAX) >= 1 && weight(0, 0) >= 1 && weight(u64::MAX, 0) > 0);
    }
    fn disks(weights: &[u64]) -> Vec<Candidate> {
        let disk = |(i, bytes): (usize, &u64)| Candidate {
            disk: DiskId(0x1000 + i as u128),
            bytes: *bytes,
            host: String::new(),
            zone: String::new(),
        };
        weights.iter().enumerate().map(disk).collect()
    }

    fn shard(no: u32) -> ShardId {
        ShardId {
            vdi: VdiId(7),
            no: ShardNo(no),
        }
    }

    fn counts(replicas: usize, candidates: &[Candidate], shards: u32) -> BTreeMap<DiskId, u32> {
        let mut counts = BTreeMap::new();
        for no in 0..shards {
            for disk in place(shard(no), replicas, candidates).unwrap() {
                *counts.entry(disk).or_default() += 1;
            }
        }
        counts
    }

    #[test]
    fn equal_disks_get_equal_shares() {
        // 6000 replicas on 5 disks: mean 1200, standard deviation 31; five of those is 155.
        for (disk, count) in counts(3, &disks(&[1 << 40; 5]), 2000) {
            assert!((1045..=1355).contains(&count), "{disk}: {count} of 6000");
        }
    }

    #[test]
    fn a_disk_gets_shares_by_its_bytes() {
        let counts: Vec<u32> = counts(1, &disks(&[1 << 40, 2 << 40, 4 << 40]), 7000)
            .into_values()
            .collect();
        for (count, wanted) in counts.iter().zip([1000, 2000, 4000]) {
            assert!(count.abs_diff(wanted) < 200, "{counts:?}");
        }
    }

    #[test]
    fn a_new_disk_only_takes_and_takes_its_share() {
        let before = disks(&[1 << 40; 5]);
        let after = disks(&[1 << 40; 6]);
        let newcomer = after[5].disk;
        let mut moved = 0;
        for no in 0..2000 {
            let old = place(shard(no), 3, &before).unwrap();
            let new = place(shard(no), 3, &after).unwrap();
            let arrived: Vec<_> = new.iter().filter(|disk| !old.contains(disk)).collect();
            assert!(
                arrived.iter().all(|disk| **disk == newcomer),
                "shard {no}: {old:?} to {new:?}"
            );
            moved += arrived.len();
        }
        assert!(
            (850..=1150).contains(&moved),
            "{moved} of 6000 moved, 1000 is the share"
        );
    }

    #[test]
    fn a_leaving_disk_gives_only_what_it_had() {
        let all = disks(&[1 << 40; 5]);
        let gone = all[2].disk;
        let left: Vec<_> = all.iter().filter(|c| c.disk != gone).cloned().collect();
        for no in 0..500 {
            let old = place(shard(no), 3, &all).unwrap();
            let new = place(shard(no), 3, &left).unwrap();
            let stay: Vec<_> = old.iter().filter(|disk| **disk != gone).copied().collect();
            assert!(
                stay.iter().all(|disk| new.contains(disk)),
                "shard {no}: {old:?} to {new:?}"
            );
            if stay.len() == 2 {
                let added = replace(shard(no), &stay, &left).unwrap();
                assert!(new.contains(&added) && !stay.contains(&added));
            }
        }
    }

    #[test]
    fn a_host_whose_disks_name_two_zones_holds_one_replica() {
        let mut candidates = disks(&[1 << 40; 6]);
        for (i, candidate) in candidates.iter_mut().enumerate() {
            candidate.host = ["a", "a", "b", "b", "c", "c"][i].to_owned();
            candidate.zone = ["", "x", "y", "z", "", ""][i].to_owned();
        }
        let host_of = |disk: DiskId| {
            let found = candidates.iter().find(|candidate| candidate.disk == disk);
            found.expect("a candidate").host.clone()
        };
        let map = DiskMap::new(&candidates);
        for no in 0..100 {
            let places = map.place(shard(no), 3).expect("three hosts");
            let hosts: std::collections::BTreeSet<String> = places.into_iter().map(host_of).collect();
            assert_eq!(hosts.len(), 3, "shard {no}: {hosts:?}");
        }
    }

    #[test]
    fn replicas_go_to_different_zones_where_there_are_enough() {
        let mut candidates = disks(&[1 << 40; 6]);
        for (i, candidate) in candidates.iter_mut().enumerate() {
            candidate.zone = format!("host{}", i / 2);
        }
        let zone = |disk: DiskId| &candidates.iter().find(|c| c.disk == disk).unwrap().zone;
        for no in 0..300 {
            let chosen = place(shard(no), 3, &candidates).unwrap();
            let mut zones: Vec<_> = chosen.iter().map(|disk| zone(*disk)).collect();
            zones.sort();
            zones.dedup();
            assert_eq!(zones.len(), 3, "shard {no}: {chosen:?}");
            let next = replace(shard(no), &chosen[..2], &candidates).unwrap();
            assert_eq!(zone(next), zone(chosen[2]), "the zone that has none");
        }
        // Two zones, three replicas: both are used, and no disk twice.
        candidates.truncate(4);
        for no in 0..100 {
            let mut chosen = place(shard(no), 3, &candidates).unwrap();
            let mut zones: Vec<_> = chosen
                .iter()
                .map(|disk| candidates.iter().find(|c| c.disk == *disk).unwrap().zone.clone())
                .collect();
            zones.sort();
            zones.dedup();
            assert_eq!(zones.len(), 2);
            chosen.sort();
            chosen.dedup();
            assert_eq!(chosen.len(), 3);
        }
    }

    #[test]
    fn replicas_go_to_different_hosts_where_zones_are_too_few() {
        let mut candidates = disks(&[1 << 40; 8]);
        for (i, candidate) in candidates.iter_mut().enumerate() {
            candidate.host = format!("host{}", i / 2);
            candidate.zone = format!("room{}", i / 4);
        }
        let find = |disk: DiskId| candidates.iter().find(|c| c.disk == disk).unwrap();
        for no in 0..300 {
            let chosen = place(shard(no), 3, &candidates).unwrap();
            let mut hosts: Vec<_> = chosen.iter().map(|disk| &find(*disk).host).collect();
            let mut zones: Vec<_> = chosen.iter().map(|disk| &find(*disk).zone).collect();
            hosts.sort();
            hosts.dedup();
            zones.sort();
            zones.dedup();
            assert_eq!((zones.len(), hosts.len()), (2, 3), "shard {no}: {chosen:?}");
        }
    }

    #[test]
    fn disks_of_a_host_share_its_part_by_their_bytes() {
        // Host a has two disks of 1 and 3 TiB, host b one of 4: b gets half, a's disks an eighth and three.
        let mut candidates = disks(&[1 << 40, 3 << 40, 4 << 40]);
        for (candidate, host) in candidates.iter_mut().zip(["a", "a", "b"]) {
            candidate.host = host.to_owned();
        }
        let counts: Vec<u32> = counts(1, &candidates, 8000).into_values().collect();
        for (count, wanted) in counts.iter().zip([1000, 3000, 4000]) {
            assert!(count.abs_diff(wanted) < 225, "{counts:?}");
        }
    }

    #[test]
    fn a_disk_that_takes_nothing_still_keeps_its_zone_taken() {
        let mut candidates = disks(&[0, 1 << 40, 1 << 40]);
        for (candidate, zone) in candidates.iter_mut().zip(["a", "a", "b"]) {
            candidate.zone = zone.to_owned();
        }
        for no in 0..50 {
            let present = [candidates[0].disk];
            assert_eq!(replace(shard(no), &present, &candidates), Ok(candidates[2].disk));
        }
    }

    #[test]
    fn too_few_disks_are_counted() {
        let candidates = disks(&[1 << 40, 0, 1 << 40]);
        assert_eq!(
            place(shard(0), 3, &candidates),
            Err(TooFewDisks {
                replicas: 3,
                disks: 2
            })
        );
        let two = place(shard(0), 2, &candidates).unwrap();
        assert_eq!(
            replace(shard(0), &two, &candidates),
            Err(TooFewDisks {
                replicas: 3,
                disks: 2
            })
        );
    }

    #[test]
    fn the_choice_is_the_same_on_every_host() {
        // Recorded: a change of the hash would move what a new disk wins.
        let mut candidates = disks(&[1 << 40; 5]);
        let forwards = place(shard(3), 3, &candidates).unwrap();
        assert_eq!(forwards, [4, 1, 3].map(|n| DiskId(0x1000 + n)));
        candidates.reverse();
        assert_eq!(place(shard(3), 3, &candidates).unwrap(), forwards);
    }
}
