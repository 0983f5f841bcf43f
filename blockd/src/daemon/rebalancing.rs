//! A pool in which some disks are much fuller than others is made even again, in the background (`control::placement`
//! has the bounds and makes the plan; `moving.rs` carries it out, with what is left after everything more urgent).
//!
//! ```text
//!  disks changed, 10 minutes passed, asked for ──▶ plan for the whole pool ──none──▶ wait
//!                                  ▲                    │ each daemon moves what it writes
//!                                  └── all of it seen ──┘
//! ```
//! All daemons make the same plan of the same records, so nobody has to tell the others; who waits for others only, in
//! vain, makes a new one. It is kept in memory only: after a
//! restart it is made anew, if the pool is still uneven. While a disk that holds something is missing, failed or leaving, no
//! move begins: there are more urgent ones.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use control::placement::{Candidate, Holding, Move, Placed, rebalance};
use control::{
    ApiResult, ControlStore, DiskState, PlacedShard, PlannedMove, RebalanceInfo, RebalancePlan, Severity,
};
use types::{DiskId, VdiId};

use super::Daemon;
use super::moving::Disks;

/// Disks come in crowds, and a host's all at once.
const SETTLE: Duration = Duration::from_secs(5);

/// An even pool becomes uneven slowly.
const LOOK_EVERY: Duration = Duration::from_secs(600);

/// Daemons that looked at different moments have different plans, and what is left of one can be for another to do that does
/// not have it. So one that only waits for others looks again.
const WAITED: Duration = Duration::from_secs(10);

/// A look takes so small a part of the time, however large the pool is.
const PAUSES: u32 = 100;

/// Moves that are kept of one plan; it is made anew when they are done.
const MOVES_MAX: usize = 4096;

/// Moves that an answer shows.
const SHOWN_MAX: usize = 1000;

/// See the module.
#[derive(Default)]
pub(super) struct Rebalancing {
    /// Those of the last plan that were not seen done.
    plan: Vec<Move>,
    /// Those of this run that were seen done.
    moves_done: u64,
    bytes_done: u64,
    since: Option<Instant>,
    is_under_way: bool,
    look_at: Option<Instant>,
    /// When the plan was made or a part of it was last seen done.
    changed_at: Option<Instant>,
    /// What making it took.
    took: Duration,
    disks: Vec<(DiskId, bool, u64)>,
    /// Requests that were heeded; `None`: not looked at in this life.
    asked: Option<u64>,
    /// Why nothing begins although there is a plan.
    waits_for: String,
}

/// What a plan is made of.
struct Pool {
    holdings: Vec<Holding>,
    shards: Vec<PlacedShard>,
    vdis: BTreeMap<VdiId, Vdi>,
}

struct Vdi {
    name: String,
    replicas: usize,
    shard_bytes: u64,
    is_movable: bool,
}

impl Pool {
    fn plan(&self, is_under_way: bool) -> Vec<Move> {
        let placed = self.shards.iter().filter_map(|shard| {
            let vdi = self.vdis.get(&shard.shard.vdi)?;
            Some(Placed {
                shard: shard.shard,
                replicas: &shard.replicas,
                bytes: vdi.shard_bytes,
                is_fixed: !vdi.is_movable || !shard.is_whole || shard.replicas.len() != vdi.replicas,
            })
        });
        rebalance(&self.holdings, &placed.collect::<Vec<_>>(), is_under_way)
    }
}

impl Daemon {
    /// Makes a plan when it is time to; costs nothing else.
    pub(super) fn plan_rebalancing(&self, disks: &Disks) -> ApiResult<()> {
        let asked = self.records(ControlStore::rebalances_asked)?;
        self.forget_what_has_moved()?;
        let plan = self.rebalancing.lock().expect("rebalancing").plan.clone();
        let is_for_others = !plan.is_empty() && !plan.iter().any(|one| self.writes(one.shard.vdi));
        let is_under_way = {
            let mut state = self.rebalancing.lock().expect("rebalancing");
            let now = Instant::now();
            let patience = WAITED.max(state.took * PAUSES);
            if is_for_others && state.changed_at.is_some_and(|at| now >= at + patience) {
                state.look_at = None;
            }
            let is_asked = state.asked.replace(asked).is_some_and(|before| before != asked);
            let seen: Vec<(DiskId, bool, u64)> = disks
                .records
                .values()
                .map(|disk| (disk.id, disks.may_take(disk.id), disk.bytes))
                .collect();
            if state.disks != seen {
                state.disks = seen;
                state.plan.clear();
                state.look_at = Some(now + SETTLE);
            }
            state.is_under_way |= is_asked;
            let is_wanted = self.settings.rebalance || state.is_under_way;
            let is_due = is_asked || state.look_at.is_none_or(|at| now >= at);
            if !is_wanted || !is_due {
                return Ok(());
            }
            state.is_under_way
        };
        let began = Instant::now();
        let mut plan = self.pool_now(disks)?.plan(is_under_way);
        plan.truncate(MOVES_MAX);
        let mut state = self.rebalancing.lock().expect("rebalancing");
        let now = Instant::now();
        state.took = began.elapsed();
        state.look_at = Some(now + LOOK_EVERY.max(state.took * PAUSES));
        state.changed_at = Some(now);
        if plan.is_empty() {
            if std::mem::take(&mut state.is_under_way) && state.since.take().is_some() {
                let message = format!("the pool is even again: {} replicas have moved", state.moves_done);
                self.events.add(Severity::Info, message);
            }
            (state.moves_done, state.bytes_done) = (0, 0);
            state.plan = plan;
            return Ok(());
        }
        if state.since.is_none() {
            state.since = Some(now);
            let bytes = plan.iter().map(|one| one.bytes).sum();
            let message = format!(
                "disks are unevenly full: {} replicas, at most {}, move to others",
                plan.len(),
                types::ByteSize(bytes)
            );
            self.events.add(Severity::Info, message);
        }
        state.is_under_way = true;
        state.plan = plan;
        Ok(())
    }

    /// Moves that were made, here or by another host, or that came to nothing. The last one's end makes the next plan.
    fn forget_what_has_moved(&self) -> ApiResult<()> {
        let plan = self.rebalancing.lock().expect("rebalancing").plan.clone();
        if plan.is_empty() {
            return Ok(());
        }
        let mut done = BTreeSet::new();
        for one in plan {
            let place = self.records(|control| control.place_of(one.shard))?;
            let is_to_come = place
                .is_some_and(|place| place.replicas.contains(&one.from) && !place.replicas.contains(&one.to));
            if !is_to_come {
                done.insert((one.shard, one.from));
            }
        }
        // Somebody else may have looked meanwhile, or made another plan.
        let mut state = self.rebalancing.lock().expect("rebalancing");
        let (kept, gone): (Vec<Move>, Vec<Move>) = std::mem::take(&mut state.plan)
            .into_iter()
            .partition(|one| !done.contains(&(one.shard, one.from)));
        if !gone.is_empty() {
            state.changed_at = Some(Instant::now());
            if kept.is_empty() {
                state.look_at = None;
            }
        }
        state.moves_done += gone.len() as u64;
        state.bytes_done += gone.iter().map(|one| one.bytes).sum::<u64>();
        state.plan = kept;
        Ok(())
    }

    /// Begins as many of the plan's moves as there is room for, of the VDIs that are written here.
    pub(super) fn even_out(&self, disks: &Disks) -> ApiResult<()> {
        let waits_for = self.what_is_more_urgent(disks)?;
        let plan = {
            let mut state = self.rebalancing.lock().expect("rebalancing");
            state.waits_for.clone_from(&waits_for);
            state.plan.clone()
        };
        if !waits_for.is_empty() {
            return Ok(());
        }
        for one in plan {
            if !self.has_room() {
                return Ok(());
            }
            if !self.writes(one.shard.vdi) || self.is_moving(one.shard) {
                continue;
            }
            let Some(place) = self.records(|control| control.place_of(one.shard))? else {
                continue;
            };
            let is_as_planned = place.is_whole && place.replicas.contains(&one.from);
            if is_as_planned && !place.replicas.contains(&one.to) && disks.may_take(one.to) {
                self.begin_move(one.shard, one.from, one.to);
            }
        }
        Ok(())
    }

    /// A disk that holds something and is not as it should be.
    fn what_is_more_urgent(&self, disks: &Disks) -> ApiResult<String> {
        for record in disks.records.values().filter(|disk| !disks.may_take(disk.id)) {
            let id = record.id;
            let is_empty = self.records(|control| control.shards_on(id))?.is_empty();
            if !is_empty {
                let state = match record.state {
                    DiskState::Removing => "being emptied",
                    DiskState::Failed => "failed",
                    DiskState::Active | DiskState::Missing => "missing",
                };
                return Ok(format!("disk {id} is {state}"));
            }
        }
        Ok(String::new())
    }

    fn pool_now(&self, disks: &Disks) -> ApiResult<Pool> {
        let holdings = disks.records.values().map(|disk| Holding {
            disk: Candidate {
                bytes: disk.bytes,
                ..disks.elsewhere.candidate(disk)
            },
            is_fixed: !disks.may_take(disk.id),
        });
        let mut vdis = BTreeMap::new();
        for vdi in self.records(ControlStore::vdis)? {
            let is_written = match self.host() {
                None => self.writes(vdi.id),
                Some(host) => {
                    let writer = self.records(|control| control.writer(vdi.id))?;
                    writer.is_some_and(|writer| {
                        writer.host == host || disks.elsewhere.alive.contains(&writer.host)
                    })
                }
            };
            let its = Vdi {
                replicas: usize::from(vdi.replicas),
                shard_bytes: vdi.shard_bytes.min(vdi.bytes),
                is_movable: is_written && !vdi.deleting,
                name: vdi.name,
            };
            vdis.insert(vdi.id, its);
        }
        Ok(Pool {
            holdings: holdings.collect(),
            shards: self.records(ControlStore::placed_shards)?,
            vdis,
        })
    }

    /// What would move if somebody asked now; nothing begins.
    pub(super) fn rebalance_plan(&self) -> ApiResult<RebalancePlan> {
        let disks = self.disks_now()?;
        let pool = self.pool_now(&disks)?;
        let plan = pool.plan(true);
        let is_wanted = !pool.plan(false).is_empty();
        let shown = plan.iter().take(SHOWN_MAX).map(|one| PlannedMove {
            vdi: pool.vdis[&one.shard.vdi].name.clone(),
            shard: one.shard.no.0,
            from: one.from,
            to: one.to,
            bytes: one.bytes,
        });
        Ok(RebalancePlan {
            moves: plan.len() as u64,
            bytes: plan.iter().map(|one| one.bytes).sum(),
            is_wanted,
            is_on: self.settings.rebalance,
            waits_for: self.what_is_more_urgent(&disks)?,
            first: shown.collect(),
        })
    }

    /// How far it is, for `weft status`; nothing while the pool is even.
    pub(super) fn rebalance_info(&self) -> ApiResult<Option<RebalanceInfo>> {
        self.forget_what_has_moved()?;
        let state = self.rebalancing.lock().expect("rebalancing");
        let Some(since) = state.since.filter(|_| state.is_under_way) else {
            return Ok(None);
        };
        let bytes_left: u64 = state.plan.iter().map(|one| one.bytes).sum();
        let rate = state.bytes_done as f64 / since.elapsed().as_secs_f64().max(1.0);
        Ok(Some(RebalanceInfo {
            moves: state.moves_done + state.plan.len() as u64,
            moves_left: state.plan.len() as u64,
            bytes_left,
            bytes_per_s: rate,
            seconds_left: (rate > 0.0).then(|| (bytes_left as f64 / rate) as u64),
            waits_for: state.waits_for.clone(),
        }))
    }
}
