//! Whether a pool is uneven enough to move anything, and what: the hysteresis around [`plan_moves`].
//!
//! ```text
//!  share of a disk = mean fill of the pool * its size
//!  even    ── some disk differs from its share by more than TOLERATED of it, and by more than WORTH of its size ──▶ uneven
//!  uneven  ── every disk is within AIMED_AT of its share, or no move brings two disks nearer to each other ──▶ even
//! ```
//! What a VDI more or less, or the luck of the hash, makes uneven moves nothing: new VDIs go to the emptier disks anyway. Once it
//! is worth it, it is done well, so that it is not worth it again soon.

use super::balance::{Holding, Move, Placed, plan_moves};
use types::DiskId;

/// Part of its share by which a disk may differ from it before anything moves.
pub const TOLERATED: f64 = 0.20;

/// Part of its size by which a disk has to differ from its share before anything moves.
pub const WORTH: f64 = 0.02;

/// Part of its share by which a disk may differ from it when all is done.
pub const AIMED_AT: f64 = 0.10;

/// The moves that make the pool even, in the order in which to make them; none when it is even enough. `is_under_way`:
/// it was found uneven before, or somebody asked, so that it is brought to where it should be.
///
/// Everybody who sees the same records makes the same plan, so each host can carry out its part of it. Carried out in part and
/// planned again, it ends: each move brings two disks nearer to each other.
#[must_use]
pub fn rebalance(holdings: &[Holding], shards: &[Placed<'_>], is_under_way: bool) -> Vec<Move> {
    if !is_under_way && !is_uneven(holdings, shards) {
        return Vec::new();
    }
    plan_moves(holdings, shards, AIMED_AT).0
}

/// Whether some disk is so far from its share that moving is worth it.
fn is_uneven(holdings: &[Holding], shards: &[Placed<'_>]) -> bool {
    let mut used: std::collections::BTreeMap<DiskId, u64> = holdings
        .iter()
        .filter(|holding| !holding.is_fixed)
        .map(|holding| (holding.disk.disk, 0))
        .collect();
    for shard in shards {
        for replica in shard.replicas {
            if let Some(used) = used.get_mut(replica) {
                *used += shard.bytes;
            }
        }
    }
    let sizes = || holdings.iter().filter(|holding| !holding.is_fixed);
    let size: f64 = sizes().map(|holding| holding.disk.bytes as f64).sum();
    let mean = used.values().map(|used| *used as f64).sum::<f64>() / size.max(1.0);
    sizes().any(|holding| {
        let size = holding.disk.bytes as f64;
        let off = (used[&holding.disk.disk] as f64 - mean * size).abs();
        off > TOLERATED * mean * size && off > WORTH * size
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use types::{ShardId, ShardNo, VdiId};

    use super::*;
    use crate::placement::{Candidate, DiskMap};

    const SHARD_BYTES: u64 = 1 << 30;

    fn holding(number: u128, bytes: u64) -> Holding {
        Holding {
            disk: Candidate {
                disk: DiskId(number + 1),
                bytes,
                host: format!("h{number}"),
                zone: String::new(),
            },
            is_fixed: false,
        }
    }

    type Shards = Vec<(ShardId, Vec<DiskId>)>;

    fn place_all(holdings: &[Holding], count: u32, replicas: usize) -> Shards {
        let candidates: Vec<Candidate> = holdings.iter().map(|holding| holding.disk.clone()).collect();
        let map = DiskMap::new(&candidates);
        let shard = |no| ShardId {
            vdi: VdiId(1),
            no: ShardNo(no),
        };
        (0..count)
            .map(|no| (shard(no), map.place(shard(no), replicas).expect("enough disks")))
            .collect()
    }

    fn placed(shards: &Shards) -> Vec<Placed<'_>> {
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

    fn carry_out(shards: &mut Shards, one: &Move) {
        let (_, replicas) = &mut shards[one.shard.no.0 as usize];
        assert!(!replicas.contains(&one.to), "{one:?}: a replica is there");
        let old = replicas.iter_mut().find(|disk| **disk == one.from);
        *old.expect("a replica is there") = one.to;
    }

    fn used(shards: &Shards, disk: DiskId) -> u64 {
        let on = shards.iter().filter(|(_, replicas)| replicas.contains(&disk));
        on.count() as u64 * SHARD_BYTES
    }

    #[test]
    fn a_little_more_on_one_disk_moves_nothing() {
        let holdings: Vec<Holding> = (0..4).map(|number| holding(number, 100 * SHARD_BYTES)).collect();
        // 40 shards each, and 47 on one: 16 % more than the mean.
        let mut shards = Shards::new();
        for (disk, count) in [(1, 47), (2, 38), (3, 38), (4, 38)] {
            for _ in 0..count {
                let shard = ShardId {
                    vdi: VdiId(1),
                    no: ShardNo(shards.len() as u32),
                };
                shards.push((shard, vec![DiskId(disk)]));
            }
        }
        assert_eq!(rebalance(&holdings, &placed(&shards), false), Vec::new());
        let asked = rebalance(&holdings, &placed(&shards), true);
        assert!((1..=4).contains(&asked.len()), "{asked:?}");
        // A nearly empty pool, where one disk has three shards of a thousandth of its size each.
        let large: Vec<Holding> = (0..4).map(|number| holding(number, 1000 * SHARD_BYTES)).collect();
        assert_eq!(
            rebalance(&large, &placed(&shards[..3].to_vec()), false),
            Vec::new()
        );
    }

    #[test]
    fn a_new_disk_takes_its_share_and_nothing_else_moves() {
        let mut holdings: Vec<Holding> = (0..4).map(|number| holding(number, 100 * SHARD_BYTES)).collect();
        let mut shards: Shards = Vec::new();
        for no in 0..160 {
            let shard = ShardId {
                vdi: VdiId(1),
                no: ShardNo(no),
            };
            shards.push((shard, vec![DiskId(u128::from(no % 4) + 1)]));
        }
        holdings.push(holding(4, 100 * SHARD_BYTES));
        let moves = rebalance(&holdings, &placed(&shards), false);
        // Its share is 32; within a tenth of it is enough.
        assert!((29..=32).contains(&moves.len()), "{} moves", moves.len());
        assert!(moves.iter().all(|one| one.to == DiskId(5)), "{moves:?}");
        moves.iter().for_each(|one| carry_out(&mut shards, one));
        assert_eq!(rebalance(&holdings, &placed(&shards), true), Vec::new());
    }

    #[test]
    fn what_cannot_move_stays() {
        let holdings: Vec<Holding> = (0..2).map(|number| holding(number, 100 * SHARD_BYTES)).collect();
        let shards = place_all(&holdings[..1], 40, 1);
        let mut placed = placed(&shards);
        for shard in &mut placed[..35] {
            shard.is_fixed = true;
        }
        let moves = rebalance(&holdings, &placed, false);
        assert_eq!(moves.len(), 5, "{moves:?}");
        assert!(moves.iter().all(|one| one.shard.no.0 >= 35));
    }

    proptest! {
        /// However far a plan is carried out before it is made anew: it comes to an end, having moved no replica more than
        /// a few times over, and then every disk has its share, as far as shards can be divided.
        #[test]
        fn it_comes_to_an_end_and_is_even_then(
            sizes in proptest::collection::vec(30u64..120, 2..8),
            first in 1usize..8,
            count in 1u32..150,
            steps in proptest::collection::vec(1usize..40, 1..64),
        ) {
            let holdings: Vec<Holding> =
                (0..).zip(&sizes).map(|(number, size)| holding(number, size * SHARD_BYTES)).collect();
            let first = first.min(holdings.len());
            let mut shards = place_all(&holdings[..first], count, 1);
            let total: f64 = sizes.iter().map(|size| *size as f64).sum();
            let mean = f64::from(count) / total;
            let off = |shards: &Shards, number: usize| {
                let used = used(shards, DiskId(number as u128 + 1)) / SHARD_BYTES;
                used as f64 - mean * sizes[number] as f64
            };
            let spare: f64 = (0..sizes.len()).map(|number| off(&shards, number).max(0.0)).sum();
            let mut moved = 0;
            let mut is_under_way = false;
            let mut steps = steps.iter().cycle();
            loop {
                let moves = rebalance(&holdings, &placed(&shards), is_under_way);
                if moves.is_empty() {
                    break;
                }
                is_under_way = true;
                for one in moves.iter().take(*steps.next().expect("a cycle")) {
                    carry_out(&mut shards, one);
                    moved += 1;
                }
                prop_assert!(moved <= count as usize, "{moved} moves of {count} shards");
            }
            // What was too much somewhere has moved, each once, and not much else.
            prop_assert!((moved as f64) <= spare + sizes.len() as f64, "{moved} moved, {spare} were too many");
            for number in 0..sizes.len() {
                let size = sizes[number] as f64;
                let off = off(&shards, number).abs();
                let allowed = if is_under_way { AIMED_AT * mean * size } else {
                    (TOLERATED * mean * size).max(WORTH * size)
                };
                // A shard goes only where it is emptier afterwards than where it was: between disks of unlike sizes
                // that leaves a shard and what it is in the other's size.
                let least = 1.0 + *sizes.iter().max().expect("disks") as f64 / *sizes.iter().min().expect("disks") as f64;
                prop_assert!(off <= allowed.max(least) + 1e-6, "disk {number}: {off} of {}", mean * size);
            }
        }
    }
}
