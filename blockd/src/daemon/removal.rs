//! Disks that leave the pool: their replicas move to other disks, and the disk is let go when the last has moved.
//!
//! ```text
//!  Active ── remove, replace ──▶ Removing ── every replica has moved ──▶ no record
//!                                │      ▲
//!                  no way to move└──────┘ tried again when a disk comes or comes back
//! ```
//! The state is in the disk's record, so a removal goes on in the next life of the daemon.

use std::collections::{BTreeMap, BTreeSet};

use control::{ApiError, ApiResult, ControlStore, DiskRecord, DiskState, Severity};
use types::{DiskId, ShardNo, VdiId};
use vdi::Event;

use super::Daemon;
use crate::plane::Command;

/// Shards of a VDI that leave a disk, each with the disk that takes its place.
pub(super) struct Replacement {
    pub vdi: VdiId,
    pub old: DiskId,
    pub new: Vec<(ShardNo, DiskId)>,
}

impl Daemon {
    /// Gives every shard's place on `old` to `new`, or, where there is none, to whom placement chooses.
    pub(super) async fn move_away(&self, old: DiskId, new: Option<DiskId>, force: bool) -> ApiResult<()> {
        self.empty(&BTreeSet::from([old]), new, force).await
    }

    /// The same for several disks that leave together: none of them takes what another gives up. It begins only if it
    /// can be done for every VDI, also for those that other hosts write; those hosts see the disks leave, and move
    /// what is theirs.
    pub(super) async fn empty(
        &self,
        old: &BTreeSet<DiskId>,
        new: Option<DiskId>,
        force: bool,
    ) -> ApiResult<()> {
        let moves = self.plan_emptying(old, new, force)?;
        for disk in old {
            self.records(|control| control.change_disk(*disk, |record| record.state = DiskState::Removing))?;
            self.removals_stalled.lock().expect("removals").remove(disk);
        }
        self.replace(moves);
        Ok(())
    }

    /// Tells the VDIs that are written here.
    pub(super) fn replace(&self, moves: Vec<Replacement>) {
        let written = self.written.lock().expect("written").clone();
        for Replacement { vdi, old, new } in moves {
            if written.contains_key(&vdi) {
                let event = Event::ReplaceDisk { old, new };
                self.home(vdi).send(Command::Vdi { vdi, event });
            }
        }
    }

    fn plan_emptying(
        &self,
        old: &BTreeSet<DiskId>,
        new: Option<DiskId>,
        force: bool,
    ) -> ApiResult<Vec<Replacement>> {
        let mut map = self.disk_map(&self.placed_bytes()?)?;
        for disk in old {
            map.set_weight(*disk, 0);
        }
        let elsewhere = self.elsewhere()?;
        let is_lost = |disk: &DiskRecord| old.contains(&disk.id) && !self.is_up_anywhere(disk, &elsewhere);
        let disks = self.records(ControlStore::disks)?;
        let lost: BTreeSet<DiskId> = disks
            .iter()
            .filter(|disk| is_lost(disk))
            .map(|disk| disk.id)
            .collect();
        let mut moves = Vec::new();
        for vdi in self.records(ControlStore::vdis)? {
            let mut places: BTreeMap<DiskId, Vec<(ShardNo, DiskId)>> = BTreeMap::new();
            for shard in self.records(|control| control.shards(vdi.id))? {
                let leaving: Vec<DiskId> = shard
                    .replicas
                    .iter()
                    .copied()
                    .filter(|disk| old.contains(disk))
                    .collect();
                if leaving.is_empty() {
                    continue;
                }
                if shard.in_sync.iter().all(|disk| lost.contains(disk)) && !force {
                    let names: Vec<String> = shard.in_sync.iter().map(ToString::to_string).collect();
                    let message = format!(
                        "shard {} of VDI {} has its only good copy on disk {}, which is not up",
                        shard.shard.no,
                        vdi.name,
                        names.join(" and on ")
                    );
                    return Err(ApiError::unavailable(
                        message,
                        "bring the disk back with `weft disk add PATH`",
                    ));
                }
                let mut present: Vec<DiskId> = shard
                    .replicas
                    .iter()
                    .copied()
                    .filter(|disk| !old.contains(disk))
                    .collect();
                for disk in leaving {
                    // A single replica that was on its way to another disk when the daemon died goes on to that one.
                    let half_way = (shard.replicas.len() > usize::from(vdi.replicas))
                        .then(|| present.first().copied())
                        .flatten();
                    let place = match half_way.or(new.filter(|new| !shard.replicas.contains(new))) {
                        Some(place) => place,
                        None => map.replace(shard.shard, &present).map_err(|_| {
                            let message = format!(
                                "no other disk can take shard {} of VDI {}",
                                shard.shard.no, vdi.name
                            );
                            ApiError::unavailable(message, "add a disk first: `weft disk add PATH`")
                        })?,
                    };
                    present.push(place);
                    places.entry(disk).or_default().push((shard.shard.no, place));
                }
            }
            let vdi = vdi.id;
            moves.extend(places.into_iter().map(|(old, new)| Replacement { vdi, old, new }));
        }
        Ok(moves)
    }

    /// Goes on with the removals that the last life of the daemon had not finished.
    pub(super) async fn resume_removals(&self) -> ApiResult<()> {
        let disks = self.records(ControlStore::disks)?;
        let leaving = disks.iter().filter(|disk| disk.state == DiskState::Removing);
        self.go_on_with(leaving.map(|disk| disk.id).collect()).await
    }

    /// A disk came, or came back: what could not leave before, for want of itself or of another place, is tried again.
    pub(super) async fn retry_removals(&self) -> ApiResult<()> {
        let stalled = self.removals_stalled.lock().expect("removals").clone();
        self.go_on_with(stalled).await
    }

    async fn go_on_with(&self, leaving: BTreeSet<DiskId>) -> ApiResult<()> {
        self.plan_moves(leaving).await?;
        self.finish_removals().await
    }

    pub(super) async fn plan_moves(&self, leaving: BTreeSet<DiskId>) -> ApiResult<()> {
        for disk in leaving {
            // It may have been given another job since: `weft disk add` takes a leaving disk back.
            let record = self.records(|control| control.disk(disk))?;
            if record.is_none_or(|record| record.state != DiskState::Removing) {
                self.removals_stalled.lock().expect("removals").remove(&disk);
                continue;
            }
            if let Err(error) = self.move_away(disk, None, false).await {
                // Said once: it is tried again at every change of disks.
                if self.removals_stalled.lock().expect("removals").insert(disk) {
                    let message = format!("disk {disk} cannot be emptied yet: {error}");
                    self.events.add(Severity::Warning, message);
                }
            }
        }
        Ok(())
    }

    /// Lets go of disks whose replicas have all moved away, and of those that replicas were only to move to: these
    /// get other places.
    pub(super) async fn finish_removals(&self) -> ApiResult<()> {
        loop {
            // A disk is let go by its host; one of a dead host by whoever sees it first: its record goes once.
            let elsewhere = self.elsewhere()?;
            let is_dead = |disk: &DiskRecord| disk.host.is_some_and(|host| !elsewhere.alive.contains(&host));
            let leaving: Vec<DiskRecord> = self
                .records(ControlStore::disks)?
                .into_iter()
                .filter(|disk| disk.state == DiskState::Removing && (self.is_mine(disk) || is_dead(disk)))
                .collect();
            let gone = self.let_go(&leaving).await?;
            if gone.is_empty() {
                return Ok(());
            }
            self.nothing_moves_to(&gone);
            let left = leaving.iter().map(|disk| disk.id);
            self.plan_moves(left.filter(|disk| !gone.contains(disk)).collect())
                .await?;
        }
    }

    /// The VDIs written here give up what was to move to these disks.
    pub(super) fn nothing_moves_to(&self, gone: &BTreeSet<DiskId>) {
        let written = self.written.lock().expect("written").clone();
        for vdi in written.into_keys() {
            for disk in gone.iter().copied() {
                let event = Event::DiskLeaves { disk, refused: None };
                self.home(vdi).send(Command::Vdi { vdi, event });
            }
        }
    }

    /// Of these, the disks that no shard's record names leave the pool. Returns them.
    async fn let_go(&self, leaving: &[DiskRecord]) -> ApiResult<BTreeSet<DiskId>> {
        let mut gone = BTreeSet::new();
        if leaving.is_empty() {
            return Ok(gone);
        }
        // The records looked at now are those after the disks began to leave: nothing is placed on them any more.
        let mut placed = Vec::new();
        for vdi in self.records(ControlStore::vdis)? {
            for shard in self.records(|control| control.shards(vdi.id))? {
                placed.extend(shard.replicas);
            }
        }
        let is_empty = |record: &&DiskRecord| !placed.contains(&record.id);
        for record in leaving.iter().filter(is_empty) {
            self.stop_serving(record.id, "removed".to_owned()).await?;
            self.records(|control| control.delete_disk(record.id))?;
            self.disks.lock().expect("disks").remove(&record.id);
            gone.insert(record.id);
            self.events.add(
                Severity::Info,
                format!("disk {} ({}) left the pool", record.id, record.path.display()),
            );
        }
        Ok(gone)
    }
}
