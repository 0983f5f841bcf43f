//! What planes tell the daemon, carried out in the order told.

use std::sync::Arc;
use std::time::Duration;

use control::{ApiResult, RecordError, Severity, VdiWriter};
use replication::ShardRecord;
use tokio::sync::mpsc::UnboundedReceiver;
use types::{ShardId, VdiId};
use vdi::{Event, Notice};

use super::Daemon;
use super::events::EventLog;
use crate::links::LinkNews;
use crate::plane::{Command, Report};

/// Between tries to save a record while etcd does not answer; each try itself takes seconds then.
const SAVE_AGAIN_AFTER: Duration = Duration::from_millis(500);

/// What became of a shard's record that was to be saved.
#[derive(Clone, Copy)]
enum Saved {
    /// This one, or another, is held.
    Held,
    /// It adds a replica on a disk that leaves.
    Refused,
}

impl Daemon {
    pub(super) async fn take_reports(self: Arc<Daemon>, mut inbox: UnboundedReceiver<Report>) {
        while let Some(report) = inbox.recv().await {
            if let Err(error) = self.take(report).await {
                self.events.add(Severity::Critical, format!("{error}"));
            }
        }
    }

    async fn take(self: &Arc<Daemon>, report: Report) -> ApiResult<()> {
        match report {
            Report::SaveRecord(record) if self.membership.is_none() => {
                let saved = self.save_once(&record, None).map_err(control::ApiError::from)?;
                self.after_saving(saved).await
            }
            Report::SaveRecord(record) => {
                // etcd may not answer for long; the other reports must not wait for it.
                tokio::spawn(Arc::clone(self).save(record));
                Ok(())
            }
            Report::Notice { vdi, notice } => self.notice(vdi, notice).await,
            Report::DiskFailed { disk, error } => {
                // Letting go waits for the disk's last operations; records must not wait for those.
                let daemon = Arc::clone(self);
                tokio::spawn(async move {
                    if let Err(error) = daemon.disk_failed(disk, error.to_string()).await {
                        daemon.events.add(Severity::Critical, format!("{error}"));
                    }
                });
                Ok(())
            }
            Report::Link { host, news } => {
                match news {
                    LinkNews::Up => self.events.add(Severity::Info, format!("host {host} is reached")),
                    LinkNews::Down(reason) => {
                        let message = format!("host {host} is not reached: {reason}");
                        self.events.add(Severity::Warning, message);
                    }
                    LinkNews::Refused(reason) => {
                        let message = format!("a caller from {host} was not let in: {reason}");
                        self.events.add(Severity::Warning, message);
                    }
                }
                Ok(())
            }
            Report::DiskFull { disk, is_full: true } => {
                self.events.add(
                    Severity::Critical,
                    format!("disk {disk} is full: writes to it wait; add a disk, or delete or trim"),
                );
                Ok(())
            }
            Report::DiskFull { disk, is_full: false } => {
                self.events.add(
                    Severity::Info,
                    format!("disk {disk} has space again: writes go on"),
                );
                Ok(())
            }
        }
    }

    /// Saves a shard's record until it is held, or the VDI is not ours to write any more. The writer asks again with
    /// patience; it is saved by one task at a time.
    async fn save(self: Arc<Daemon>, record: ShardRecord) {
        let key = (record.shard, record.epoch);
        if !self.saving.lock().expect("saving").insert(key) {
            return;
        }
        let vdi = record.shard.vdi;
        let saved = loop {
            // Asked each time: it may be closed, or opened anew, between two tries.
            let writer = self.written.lock().expect("written").get(&vdi).copied().flatten();
            // And then it is another life's: what this one wanted must not go in under the new one's name.
            let Some(writer) = writer.filter(|writer| writer.incarnation == record.saved_by) else {
                break None;
            };
            let daemon = Arc::clone(&self);
            let wanted = record.clone();
            let saved = tokio::task::spawn_blocking(move || daemon.save_once(&wanted, Some(&writer))).await;
            match saved {
                Ok(Ok(saved)) => break Some(saved),
                Ok(Err(RecordError::NotTheWriter { now, .. })) => {
                    if let Err(error) = self.lose_vdi(vdi, now).await {
                        self.events.add(Severity::Critical, format!("{error}"));
                    }
                    break None;
                }
                Ok(Err(RecordError::Backend(error))) => {
                    tracing::warn!(shard = %record.shard, "a shard's record is not saved yet: {error}");
                }
                Ok(Err(error)) => {
                    self.events.add(Severity::Critical, format!("{error}"));
                    break None;
                }
                Err(error) => {
                    tracing::error!(%error, "saving a shard's record");
                    break None;
                }
            }
            tokio::time::sleep(SAVE_AGAIN_AFTER).await;
        };
        // Before what follows from it, which may be another change of the same epoch.
        self.saving.lock().expect("saving").remove(&key);
        if let Some(saved) = saved
            && let Err(error) = self.after_saving(saved).await
        {
            self.events.add(Severity::Warning, format!("{error}"));
        }
    }

    /// One try; the VDI is told what became of it.
    fn save_once(&self, record: &ShardRecord, writer: Option<&VdiWriter>) -> Result<Saved, RecordError> {
        let held = tokio::task::block_in_place(|| self.control.swap_shard(record, writer));
        let vdi = record.shard.vdi;
        let (event, saved) = match held {
            Ok(held) => {
                let shard = record.shard.no;
                (Event::RecordSaved { shard, record: held }, Saved::Held)
            }
            Err(RecordError::DiskLeaving(disk)) => {
                let refused = Some(record.clone());
                (Event::DiskLeaves { disk, refused }, Saved::Refused)
            }
            Err(error) => return Err(error),
        };
        self.home(vdi).send(Command::Vdi { vdi, event });
        Ok(saved)
    }

    async fn after_saving(&self, saved: Saved) -> ApiResult<()> {
        match saved {
            Saved::Held => self.finish_removals().await,
            // What was to move there needs another place, and gets it when that is noticed.
            Saved::Refused => Ok(()),
        }
    }

    async fn notice(&self, vdi: VdiId, notice: Notice) -> ApiResult<()> {
        let record = self.records(|control| control.vdi(vdi))?;
        // What a daemon has dropped that died in the middle of it is missed by nobody.
        let is_being_deleted = record.as_ref().is_some_and(|record| record.deleting);
        if is_being_deleted && matches!(notice, Notice::NoQuorum { .. } | Notice::ReadsWait { .. }) {
            return Ok(());
        }
        let name = record.map_or_else(|| vdi.to_string(), |record| record.name);
        match notice {
            Notice::Degraded { shard, disk } => {
                let message = format!("VDI {name} shard {shard}: the replica on disk {disk} is out of sync");
                self.events.add(Severity::Warning, message);
            }
            Notice::Restored {
                shard,
                disk,
                moved_blocks,
            } => {
                EventLog::count(&self.events.resynced, moved_blocks);
                self.has_moved(ShardId { vdi, no: shard }, disk, moved_blocks);
                let message = format!(
                    "VDI {name} shard {shard}: the replica on disk {disk} is in sync again ({moved_blocks} blocks moved)"
                );
                self.events.add(Severity::Info, message);
            }
            Notice::Repaired { shard, disk, blocks } => {
                EventLog::count(&self.events.repaired, blocks);
                tracing::warn!("VDI {name} shard {shard}: {blocks} bad blocks on disk {disk} repaired");
            }
            Notice::Unreadable { shard, offset } => {
                EventLog::count(&self.events.unreadable, 1);
                let message = format!("VDI {name} shard {shard}: no good copy of the block at {offset}");
                self.events.add(Severity::Critical, message);
            }
            Notice::NoQuorum {
                shard,
                is_waiting: true,
            } => {
                let message = format!("VDI {name} shard {shard}: too few replicas; writes wait");
                self.events.add(Severity::Critical, message);
            }
            Notice::NoQuorum {
                shard,
                is_waiting: false,
            } => {
                self.events
                    .add(Severity::Info, format!("VDI {name} shard {shard}: writes go on"));
            }
            Notice::ReadsWait {
                shard,
                is_waiting: true,
            } => {
                let message = format!(
                    "VDI {name} shard {shard}: too few replicas say that no other host has it; reads wait"
                );
                self.events.add(Severity::Critical, message);
            }
            Notice::ReadsWait {
                shard,
                is_waiting: false,
            } => {
                self.events
                    .add(Severity::Info, format!("VDI {name} shard {shard}: reads go on"));
            }
            Notice::Fenced { shard } => {
                let message = format!(
                    "VDI {name} shard {shard}: a newer writer holds it; this daemon writes no more to it"
                );
                self.events.add(Severity::Critical, message);
            }
            Notice::WrongAnswer { shard, disk } => {
                let message = format!(
                    "VDI {name} shard {shard}: disk {disk} answered what it was not asked; it is left out until it has gone and come back"
                );
                self.events.add(Severity::Critical, message);
            }
            Notice::Scrub {
                done,
                total,
                blocks,
                repaired,
                unreadable,
            } => {
                self.events
                    .scrub_goes_on(vdi, done, total, blocks, repaired, unreadable);
            }
            Notice::Dropped => self.vdi_is_dropped(vdi).await?,
        }
        Ok(())
    }
}
