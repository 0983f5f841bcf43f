//! What planes tell the daemon, carried out in the order told.

use std::sync::Arc;

use control::{ApiResult, RecordError, Severity};
use tokio::sync::mpsc::UnboundedReceiver;
use types::VdiId;
use vdi::{Event, Notice};

use super::Daemon;
use super::events::EventLog;
use crate::links::LinkNews;
use crate::plane::{Command, Report};

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
            Report::SaveRecord(record) => {
                let vdi = record.shard.vdi;
                let held = tokio::task::block_in_place(|| self.control.swap_shard(&record, None));
                let event = match held {
                    Ok(held) => Event::RecordSaved {
                        shard: record.shard.no,
                        record: held,
                    },
                    Err(RecordError::DiskLeaving(disk)) => Event::DiskLeaves {
                        disk,
                        refused: Some(record),
                    },
                    Err(error) => return Err(error.into()),
                };
                let is_refused = matches!(event, Event::DiskLeaves { .. });
                self.home(vdi).send(Command::Vdi { vdi, event });
                if is_refused {
                    // What was to move there needs another place.
                    self.resume_removals().await
                } else {
                    self.finish_removals().await
                }
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

    async fn notice(&self, vdi: VdiId, notice: Notice) -> ApiResult<()> {
        let record = self.records(|control| control.vdi(vdi))?;
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
