//! VDIs: opened at start, made, grown, deleted.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use control::{
    ApiError, ApiResult, ControlStore, Name, Placed, RecordError, Severity, VdiCreate, VdiRecord, VdiWriter,
};
use jiff::Timestamp;
use replication::ShardRecord;
use types::{ByteSize, LayerId, VdiId};
use vdi::{Event, VdiSpec};

use super::disks::no_pool;
use super::{Daemon, ask};
use crate::plane::Command;

impl Daemon {
    /// Opens what this host writes. One that cannot be opened is an event, not the end.
    pub(super) async fn open_all_vdis(&self) -> anyhow::Result<()> {
        let (records, damaged) = self.records(ControlStore::readable_vdis)?;
        for error in damaged {
            let message =
                format!("a VDI is not opened: {error}; put the record back, or `weft pool recover`");
            self.events.add(Severity::Critical, message);
        }
        for record in records {
            if let Some(host) = self.host() {
                let writer = self.records(|control| control.writer(record.id))?;
                if writer.is_none_or(|writer| writer.host != host) {
                    continue;
                }
                let incarnation = self.incarnation;
                if let Err(error) = self.take_over(record.id, VdiWriter { host, incarnation }).await {
                    let message = format!("VDI {} is not opened: {error}", record.name);
                    self.events.add(Severity::Critical, message);
                    continue;
                }
            } else {
                let shards = self.records(|control| control.shards(record.id))?;
                self.open_vdi(&record, shards, None).await?;
            }
            if record.deleting {
                self.begin_delete(record.id);
            }
        }
        Ok(())
    }

    /// Opens a VDI for `writer`, which is this host in a cluster. Its record may be another afterwards: a snapshot that
    /// was not finished is given up.
    pub(super) async fn open_vdi(
        &self,
        record: &VdiRecord,
        records: Vec<ShardRecord>,
        writer: Option<VdiWriter>,
    ) -> ApiResult<VdiRecord> {
        let (record, lineage) = self.lineage_to_open(record)?;
        let spec = VdiSpec {
            id: record.id,
            bytes: record.bytes,
            sector_bytes: record.sector_bytes,
            shard_bytes: record.shard_bytes,
            lineage,
            sharing: self.records(|control| control.sharing(record.id))?,
        };
        let size = Arc::new(AtomicU64::new(record.bytes));
        self.sizes.lock().expect("sizes").insert(record.id, size);
        self.written.lock().expect("written").insert(record.id, writer);
        let incarnation = writer.map_or(self.incarnation, |writer| writer.incarnation);
        let up = self.up_disks();
        ask(self.home(record.id), |reply| Command::OpenVdi {
            spec,
            records,
            incarnation,
            up,
            reply,
        })
        .await?;
        Ok(record)
    }

    /// The record of the VDI called `name`.
    pub(super) fn named(&self, name: &Name) -> ApiResult<VdiRecord> {
        self.records(|control| control.vdi_by_name(name.as_str()))?
            .ok_or_else(|| {
                ApiError::not_found(
                    format!("there is no VDI {}", name.as_str()),
                    "see `weft vdi list`",
                )
            })
    }

    /// By what the disks are now; taken before they are looked at.
    fn placed_by_now(&self) -> ApiResult<Placed> {
        Ok(Placed {
            placement: self.records(ControlStore::placement)?,
            writer: self.host().map(|host| VdiWriter {
                host,
                incarnation: self.incarnation,
            }),
        })
    }

    pub(super) async fn create_vdi(&self, request: VdiCreate) -> ApiResult<VdiRecord> {
        self.records(ControlStore::pool)?.ok_or_else(no_pool)?;
        if self
            .records(|control| control.vdi_by_name(request.name.as_str()))?
            .is_some()
        {
            let message = format!("there is a VDI {} already", request.name.as_str());
            return Err(ApiError::conflict(
                message,
                "choose another name, or see `weft vdi list`",
            ));
        }
        let placed = self.placed_by_now()?;
        let id = self.records(ControlStore::next_vdi_id)?;
        let record = VdiRecord {
            id,
            revision: 1,
            name: request.name.as_str().to_owned(),
            bytes: request.bytes,
            sector_bytes: request.sector_bytes,
            replicas: request.replicas,
            shard_bytes: request.shard_bytes,
            head: LayerId(0),
            created: Timestamp::now(),
            attachments: Vec::new(),
            deleting: false,
        };
        let shards = self.place_shards(
            id,
            0..record.shard_count(),
            request.replicas,
            record.shard_bytes.min(record.bytes),
        )?;
        self.records(|control| control.create_vdi(&record, &shards, placed))?;
        self.tell_disks_of(&record, &shards)?;
        self.open_vdi(&record, shards, placed.writer).await
    }

    pub(super) async fn resize_vdi(&self, name: &Name, bytes: u64) -> ApiResult<VdiRecord> {
        let mut record = self.write_here(self.named(name)?).await?;
        if bytes < record.bytes {
            let message = format!(
                "VDI {} has {}; {} would cut it",
                record.name,
                ByteSize(record.bytes),
                ByteSize(bytes)
            );
            return Err(ApiError::invalid(
                message,
                "a VDI only grows; copy it into a smaller one",
            ));
        }
        control::vdi_bytes(bytes, record.sector_bytes)?;
        control::shards_fit(bytes, record.shard_bytes)?;
        if bytes == record.bytes {
            return Ok(record);
        }
        let before = record.shard_count();
        record.bytes = bytes;
        let placed = self.placed_by_now()?;
        let added = self.place_shards(
            record.id,
            before..record.shard_count(),
            record.replicas,
            record.shard_bytes,
        )?;
        let record = self.records(|control| control.resize_vdi(&record, &added, placed))?;
        let shards = self.records(|control| control.shards(record.id))?;
        self.tell_disks_of(&record, &shards)?;
        self.home(record.id).send(Command::Vdi {
            vdi: record.id,
            event: Event::Resized { bytes, added },
        });
        let size = self.sizes.lock().expect("sizes").get(&record.id).cloned();
        size.expect("an open VDI has a size")
            .store(bytes, Ordering::Release);
        self.resize_doors(record.id, bytes).await;
        Ok(record)
    }

    pub(super) async fn delete_vdi(&self, name: &Name) -> ApiResult<()> {
        let mut record = self.write_here(self.named(name)?).await?;
        if !record.attachments.is_empty() {
            let message = format!("VDI {} is attached", record.name);
            return Err(ApiError::conflict(
                message,
                format!("`weft vdi detach {}` first", record.name),
            ));
        }
        // Its snapshots go with it: refused where one is protected, or a clone needs one.
        let mut trial = self.records(|control| control.layers_now(record.id))?;
        trial.delete_vdi(record.id).map_err(RecordError::from)?;
        record.deleting = true;
        let record = self.records(|control| control.update_vdi(&record))?;
        let shards = self.records(|control| control.shards(record.id))?;
        self.tell_disks_of(&record, &shards)?;
        self.begin_delete(record.id);
        Ok(())
    }

    fn begin_delete(&self, vdi: VdiId) {
        self.deleting.lock().expect("deleting").insert(vdi);
        self.home(vdi).send(Command::Vdi {
            vdi,
            event: Event::Delete,
        });
    }

    /// Every shard has left every disk that could be reached; the others drop theirs when they come back.
    pub(super) async fn vdi_is_dropped(&self, vdi: VdiId) -> ApiResult<()> {
        if !self.deleting.lock().expect("deleting").remove(&vdi) {
            return Ok(());
        }
        ask(self.home(vdi), |reply| Command::CloseVdi { vdi, reply }).await?;
        self.records(|control| control.forget_vdi(vdi))?;
        self.forget_notes_of(vdi);
        self.sizes.lock().expect("sizes").remove(&vdi);
        self.written.lock().expect("written").remove(&vdi);
        self.events.forget(vdi);
        self.events.add(Severity::Info, format!("VDI {vdi} is deleted"));
        self.finish_removals().await
    }
}
