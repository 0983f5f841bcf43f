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
use types::DiskId;
use vdi::Event;

use super::Daemon;
use crate::plane::Command;

impl Daemon {
    /// Gives every shard's place on `old` to `new`, or, where there is none, to whom placement chooses.
    pub(super) async fn move_away(&self, old: DiskId, new: Option<DiskId>, force: bool) -> ApiResult<()> {
        self.empty(&BTreeSet::from([old]), new, force).await
    }

    /// The same for several disks that leave together: none of them takes what another gives up. It begins only if it
    /// can be done for every VDI. Each host sees the disks leave and moves what it writes (`moving.rs`).
    pub(super) async fn empty(
        &self,
        old: &BTreeSet<DiskId>,
        new: Option<DiskId>,
        force: bool,
    ) -> ApiResult<()> {
        self.check_emptying(old, new, force)?;
        for disk in old {
            self.records(|control| control.change_disk(*disk, |record| record.state = DiskState::Removing))?;
            self.removals_stalled.lock().expect("removals").remove(disk);
            if let Some(new) = new {
                self.moves_instead(*disk, new);
            }
        }
        Ok(())
    }

    /// Whether everything on these disks has another place to go to, and something to be copied from. Looks at what they
    /// hold, not at what there is.
    fn check_emptying(&self, old: &BTreeSet<DiskId>, new: Option<DiskId>, force: bool) -> ApiResult<()> {
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
        let mut shards = BTreeSet::new();
        for disk in old {
            shards.extend(self.records(|control| control.shards_on(*disk))?);
        }
        for id in shards {
            let Some(shard) = self.records(|control| control.shard(id))? else {
                continue;
            };
            let Some(vdi) = self.records(|control| control.vdi(id.vdi))? else {
                continue;
            };
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
            let is_half_way = shard.replicas.len() > usize::from(vdi.replicas);
            let (leaving, mut present): (Vec<DiskId>, Vec<DiskId>) =
                shard.replicas.iter().partition(|disk| old.contains(disk));
            for _ in leaving {
                // A single replica that was left half-way to another disk goes on to that one.
                if is_half_way && !present.is_empty() {
                    continue;
                }
                let place = match new.filter(|new| !shard.replicas.contains(new)) {
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
            }
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
        self.say_what_cannot_leave(leaving)?;
        self.finish_removals().await
    }

    /// What can is moved (`moving.rs`); what cannot is said, once.
    pub(super) fn say_what_cannot_leave(&self, leaving: BTreeSet<DiskId>) -> ApiResult<()> {
        for disk in leaving {
            // It may have been given another job since: `weft disk add` takes a leaving disk back.
            let record = self.records(|control| control.disk(disk))?;
            let is_leaving = record.is_some_and(|record| record.state == DiskState::Removing);
            let checked = if is_leaving {
                self.check_emptying(&BTreeSet::from([disk]), None, false)
            } else {
                Ok(())
            };
            let mut stalled = self.removals_stalled.lock().expect("removals");
            match checked {
                Ok(()) => {
                    stalled.remove(&disk);
                }
                // It is looked at again at every change of disks.
                Err(error) => {
                    if stalled.insert(disk) {
                        let message = format!("disk {disk} cannot be emptied yet: {error}");
                        self.events.add(Severity::Warning, message);
                    }
                }
            }
        }
        Ok(())
    }

    /// Lets go of disks whose replicas have all moved away.
    pub(super) async fn finish_removals(&self) -> ApiResult<()> {
        let mut leaving = self.records(ControlStore::disks)?;
        leaving.retain(|disk| disk.state == DiskState::Removing);
        if leaving.is_empty() {
            return Ok(());
        }
        // A disk is let go by its host; one of a dead host by whoever sees it first: its record goes once.
        let elsewhere = self.elsewhere()?;
        let is_dead = |disk: &DiskRecord| disk.host.is_some_and(|host| !elsewhere.alive.contains(&host));
        leaving.retain(|disk| self.is_mine(disk) || is_dead(disk));
        let gone = self.let_go(&leaving).await?;
        self.nothing_moves_to(&gone);
        Ok(())
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
        for record in leaving {
            // The records looked at now are those after the disk began to leave: nothing is placed on it any more.
            if !self.records(|control| control.shards_on(record.id))?.is_empty() {
                continue;
            }
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
