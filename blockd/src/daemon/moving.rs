//! Replicas on their way from one disk to another: whatever the reason, a few at a time, at the bandwidth of the settings.
//!
//! ```text
//!  overdue disks (replacing.rs) ─┐
//!  leaving disks (removal.rs) ───┼─▶ room? ─▶ ReplaceDisk to the VDI's writer ─▶ the shard's record names the new disk
//!  uneven disks (rebalancing.rs) ┘    ▲                                              │ in sync: its bytes are charged
//!                                     └── AT_ONCE, and not before the last ones' bytes had their time ◀──┘
//! ```
//! Each daemon moves only what it writes; the writer's compare-and-swap settles the rest. The writer fills the new disk first
//! and gives the place away when that holds everything, so a move that ends in the middle, with this daemon or its disks,
//! leaves the shard as it was; what the new disk was filled with is dropped when it is chosen, or opened, again.
//!
//! What it costs each second: a look at what is under way, and, only when there is room, at what the leaving disks hold
//! (`ControlStore::shards_on`): never at all shards.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use control::placement::DiskMap;
use control::{ApiResult, ControlStore, DiskRecord, DiskState};
use types::{BLOCK_BYTES, DiskId, ShardId, VdiId};
use vdi::Event;

use super::Daemon;
use super::cluster::Elsewhere;
use crate::plane::Command;

/// Shards that this daemon moves at once: each copies one leaf at a time while guests write.
const AT_ONCE: usize = 2;

/// A writer that was busy with another change of the shard, or is another one since, is told again.
const SAY_AGAIN: Duration = Duration::from_secs(10);

/// How long the word of what was moved may take after the record has changed.
const WORD_WITHIN: Duration = Duration::from_secs(3);

/// See the module.
#[derive(Default)]
pub(super) struct Moving {
    under_way: BTreeMap<ShardId, UnderWay>,
    /// No new one before.
    not_before: Option<Instant>,
    /// Disks that take the place of others, as somebody said.
    instead: BTreeMap<DiskId, DiskId>,
}

struct UnderWay {
    from: DiskId,
    to: DiskId,
    said_at: Instant,
    /// Since when the record says that it is done.
    done_since: Option<Instant>,
}

/// The disks as they are at one look.
pub(super) struct Disks {
    pub records: BTreeMap<DiskId, DiskRecord>,
    pub elsewhere: Elsewhere,
    up: BTreeSet<DiskId>,
}

impl Disks {
    /// May be copied from.
    pub fn is_up(&self, disk: DiskId) -> bool {
        self.up.contains(&disk)
    }

    /// May take replicas.
    pub fn may_take(&self, disk: DiskId) -> bool {
        let record = self.records.get(&disk);
        record.is_some_and(|record| record.state == DiskState::Active) && self.is_up(disk)
    }

    /// Those that are to be emptied, in order.
    pub fn leaving(&self) -> impl Iterator<Item = DiskId> {
        let all = self.records.values();
        all.filter(|disk| disk.state == DiskState::Removing)
            .map(|disk| disk.id)
    }
}

/// What is said to a writer.
#[derive(Clone, Copy)]
enum Said {
    Move {
        from: DiskId,
        to: DiskId,
    },
    /// Nothing moves there any more.
    GiveUp {
        to: DiskId,
    },
}

impl Daemon {
    pub(super) fn disks_now(&self) -> ApiResult<Disks> {
        let elsewhere = self.elsewhere()?;
        let records: BTreeMap<DiskId, DiskRecord> = self
            .records(ControlStore::disks)?
            .into_iter()
            .map(|disk| (disk.id, disk))
            .collect();
        let up = records
            .values()
            .filter(|disk| self.is_up_anywhere(disk, &elsewhere))
            .map(|disk| disk.id)
            .collect();
        Ok(Disks {
            records,
            elsewhere,
            up,
        })
    }

    /// `new` takes the place of `old`, where it can, when `old` is emptied.
    pub(super) fn moves_instead(&self, old: DiskId, new: DiskId) {
        self.moving.lock().expect("moving").instead.insert(old, new);
    }

    /// Ends what is done or cannot be, and begins as much as there is room for. `overdue` are gone for good.
    pub(super) fn move_some(&self, disks: &Disks, overdue: &BTreeSet<DiskId>) -> ApiResult<()> {
        self.end_moves(disks)?;
        let mut map = None;
        let leaving: Vec<DiskId> = disks.leaving().filter(|disk| !overdue.contains(disk)).collect();
        {
            let mut moving = self.moving.lock().expect("moving");
            moving.instead.retain(|old, _| leaving.contains(old));
        }
        // What has lost a copy goes first.
        for from in overdue.iter().copied().chain(leaving.iter().copied()) {
            if !self.has_room() {
                return Ok(());
            }
            for shard in self.records(|control| control.shards_on(from))? {
                if !self.has_room() {
                    return Ok(());
                }
                self.move_off(shard, from, disks, overdue, &mut map)?;
            }
        }
        self.even_out(disks)
    }

    pub(super) fn has_room(&self) -> bool {
        let moving = self.moving.lock().expect("moving");
        moving.under_way.len() < AT_ONCE && moving.not_before.is_none_or(|at| Instant::now() >= at)
    }

    pub(super) fn is_moving(&self, shard: ShardId) -> bool {
        self.moving.lock().expect("moving").under_way.contains_key(&shard)
    }

    fn move_off(
        &self,
        id: ShardId,
        from: DiskId,
        disks: &Disks,
        overdue: &BTreeSet<DiskId>,
        map: &mut Option<DiskMap>,
    ) -> ApiResult<()> {
        if !self.writes(id.vdi) || self.is_moving(id) {
            return Ok(());
        }
        let Some(vdi) = self
            .records(|control| control.vdi(id.vdi))?
            .filter(|vdi| !vdi.deleting)
        else {
            return Ok(());
        };
        let Some(shard) = self.records(|control| control.shard(id))? else {
            return Ok(());
        };
        // Without a good copy that can be read there is nothing to make another of.
        let is_source = |disk: &DiskId| disks.is_up(*disk) && !overdue.contains(disk);
        if !shard.replicas.contains(&from) || !shard.in_sync.iter().any(is_source) {
            return Ok(());
        }
        let leaves = |disk: &DiskId| {
            let record = disks.records.get(disk);
            overdue.contains(disk) || record.is_none_or(|record| record.state == DiskState::Removing)
        };
        let present: Vec<DiskId> = shard
            .replicas
            .iter()
            .copied()
            .filter(|disk| !leaves(disk))
            .collect();
        // A single replica that an earlier version left on its way to another disk goes on to that one.
        let half_way = (shard.replicas.len() > usize::from(vdi.replicas))
            .then(|| present.first().copied())
            .flatten();
        let instead = self.moving.lock().expect("moving").instead.get(&from).copied();
        let instead = instead.filter(|disk| disks.may_take(*disk) && !shard.replicas.contains(disk));
        let to = match half_way.or(instead) {
            Some(to) => to,
            None => {
                let map = match map {
                    Some(map) => map,
                    None => map.insert(self.disk_map(&self.placed_bytes()?)?),
                };
                match map.replace(id, &present) {
                    Ok(to) => to,
                    // No place now; perhaps a disk is added.
                    Err(_) => return Ok(()),
                }
            }
        };
        self.begin_move(id, from, to);
        Ok(())
    }

    pub(super) fn begin_move(&self, shard: ShardId, from: DiskId, to: DiskId) {
        let way = UnderWay {
            from,
            to,
            said_at: Instant::now(),
            done_since: None,
        };
        self.moving.lock().expect("moving").under_way.insert(shard, way);
        self.say_to_writer(shard, Said::Move { from, to });
    }

    fn end_moves(&self, disks: &Disks) -> ApiResult<()> {
        let shards: Vec<ShardId> = {
            let moving = self.moving.lock().expect("moving");
            moving.under_way.keys().copied().collect()
        };
        for shard in shards {
            let record = self.records(|control| control.shard(shard))?;
            let is_written = self.writes(shard.vdi);
            let mut moving = self.moving.lock().expect("moving");
            // It may have been charged meanwhile.
            let Some(way) = moving.under_way.get_mut(&shard) else {
                continue;
            };
            let (from, to) = (way.from, way.to);
            let record = record.filter(|_| is_written);
            let (said, ends) = match record {
                None => (None, true),
                Some(record) if record.replicas.contains(&from) => {
                    if !disks.may_take(to) {
                        (Some(Said::GiveUp { to }), true)
                    } else if way.said_at.elapsed() >= SAY_AGAIN {
                        way.said_at = Instant::now();
                        (Some(Said::Move { from, to }), false)
                    } else {
                        (None, false)
                    }
                }
                Some(record) if record.in_sync.contains(&to) => {
                    let since = way.done_since.get_or_insert_with(Instant::now);
                    (None, since.elapsed() >= WORD_WITHIN)
                }
                // Its place is given away and it is being filled there; or it was given away again.
                Some(record) => (None, !record.replicas.contains(&to) || !disks.is_up(to)),
            };
            if ends {
                moving.under_way.remove(&shard);
            }
            drop(moving);
            if let Some(said) = said {
                self.say_to_writer(shard, said);
            }
        }
        Ok(())
    }

    /// A replica is in sync after so many blocks were copied to it. If that was one of the moves, the next waits until these
    /// had their time.
    pub(super) fn has_moved(&self, shard: ShardId, disk: DiskId, blocks: u64) {
        let mut moving = self.moving.lock().expect("moving");
        if moving.under_way.get(&shard).is_none_or(|way| way.to != disk) {
            return;
        }
        moving.under_way.remove(&shard);
        let seconds = (blocks * BLOCK_BYTES) as f64 / self.settings.replace_bytes_s as f64;
        let now = Instant::now();
        let from = moving.not_before.map_or(now, |at| at.max(now));
        moving.not_before = Some(from + Duration::from_secs_f64(seconds));
        self.has_room_again.notify_one();
    }

    pub(super) fn writes(&self, vdi: VdiId) -> bool {
        self.written.lock().expect("written").contains_key(&vdi)
    }

    fn say_to_writer(&self, shard: ShardId, said: Said) {
        let vdi = shard.vdi;
        let event = match said {
            Said::Move { from, to } => Event::ReplaceDisk {
                old: from,
                new: vec![(shard.no, to)],
            },
            Said::GiveUp { to } => Event::DiskLeaves {
                disk: to,
                refused: None,
            },
        };
        if self.writes(vdi) {
            self.home(vdi).send(Command::Vdi { vdi, event });
        }
    }
}
