//! Disks that leave the pool: their replicas move to other disks, and the disk is let go when the last has moved.
//!
//! ```text
//!  Active ── remove, replace ──▶ Removing ── every replica has moved ──▶ no record
//!                                │      ▲
//!                  no way to move└──────┘ tried again when a disk comes or comes back
//! ```
//! The state is in the disk's record, so a removal goes on in the next life of the daemon.

use std::collections::BTreeSet;

use control::{ApiError, ApiResult, ControlStore, DiskRecord, DiskState, Severity};
use replication::ShardRecord;
use types::{DiskId, ShardNo};
use vdi::Event;

use super::Daemon;
use crate::plane::Command;

impl Daemon {
    /// Gives every shard's place on `old` to `new`, or, where there is none, to whom placement chooses.
    pub(super) async fn move_away(&self, old: DiskId, new: Option<DiskId>, force: bool) -> ApiResult<()> {
        let mut map = self.disk_map(&self.placed_bytes()?)?;
        map.set_weight(old, 0);
        let elsewhere = self.elsewhere()?;
        let is_old_up = self
            .records(|control| control.disk(old))?
            .is_some_and(|disk| self.is_up_anywhere(&disk, &elsewhere));
        let mut moves = Vec::new();
        let written = self.written.lock().expect("written").clone();
        for vdi in self.records(ControlStore::vdis)? {
            // Each host moves the replicas of the VDIs that it writes.
            if !written.contains_key(&vdi.id) {
                continue;
            }
            let mut places: Vec<(ShardNo, DiskId)> = Vec::new();
            for shard in self.records(|control| control.shards(vdi.id))? {
                if !shard.replicas.contains(&old) {
                    continue;
                }
                let is_last = shard.in_sync == [old];
                if is_last && !is_old_up && !force {
                    let message = format!(
                        "shard {} of VDI {} has its only good copy on disk {old}, which is not up",
                        shard.shard.no, vdi.name
                    );
                    return Err(ApiError::unavailable(
                        message,
                        "bring the disk back with `weft disk add PATH`",
                    ));
                }
                // A single replica that was on its way to another disk when the daemon died goes on to that one.
                let half_way = (shard.replicas.len() > usize::from(vdi.replicas))
                    .then(|| shard.replicas.iter().copied().find(|disk| *disk != old))
                    .flatten();
                let place = match half_way.or(new.filter(|new| !shard.replicas.contains(new))) {
                    Some(place) => place,
                    None => map.replace(shard.shard, &stay(&shard, old)).map_err(|_| {
                        let message = format!(
                            "no other disk can take shard {} of VDI {}",
                            shard.shard.no, vdi.name
                        );
                        ApiError::unavailable(message, "add a disk first: `weft disk add PATH`")
                    })?,
                };
                places.push((shard.shard.no, place));
            }
            if !places.is_empty() {
                moves.push((vdi.id, places));
            }
        }
        self.records(|control| control.change_disk(old, |record| record.state = DiskState::Removing))?;
        self.removals_stalled.lock().expect("removals").remove(&old);
        for (vdi, new) in moves {
            self.home(vdi).send(Command::Vdi {
                vdi,
                event: Event::ReplaceDisk { old, new },
            });
        }
        Ok(())
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

    async fn plan_moves(&self, leaving: BTreeSet<DiskId>) -> ApiResult<()> {
        for disk in leaving {
            // It may have been given another job since: `weft disk add` takes a leaving disk back.
            let record = self.records(|control| control.disk(disk))?;
            if record.is_none_or(|record| record.state != DiskState::Removing) {
                self.removals_stalled.lock().expect("removals").remove(&disk);
                continue;
            }
            if let Err(error) = self.move_away(disk, None, false).await {
                self.removals_stalled.lock().expect("removals").insert(disk);
                let message = format!("disk {disk} cannot be emptied yet: {error}");
                self.events.add(Severity::Warning, message);
            }
        }
        Ok(())
    }

    /// Lets go of disks whose replicas have all moved away, and of those that replicas were only to move to: these
    /// get other places.
    pub(super) async fn finish_removals(&self) -> ApiResult<()> {
        loop {
            let leaving: Vec<DiskRecord> = self
                .records(ControlStore::disks)?
                .into_iter()
                .filter(|disk| disk.state == DiskState::Removing && self.is_mine(disk))
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

/// The replicas that remain when `old` leaves.
fn stay(shard: &ShardRecord, old: DiskId) -> Vec<DiskId> {
    shard
        .replicas
        .iter()
        .copied()
        .filter(|disk| *disk != old)
        .collect()
}
