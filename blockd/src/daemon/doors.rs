//! Doors of a VDI: a vhost-user socket or an NBD address each. They are part of the VDI's record and come back
//! with the daemon.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use control::{
    ApiError, ApiResult, Attach, AttachTarget, Attachment, ControlStore, Detach, Name, NbdAddress, Severity,
    VdiRecord,
};
use types::VdiId;
use vhost_blk::{DeviceConfig, DeviceId, Plane, Ring, RingId};

use super::Daemon;
use super::cluster::not_here;
use crate::nbd_export::VdiExport;
use crate::plane::{Command, PlaneHandle};

/// An open door.
pub enum Door {
    /// vhost-user-blk.
    VhostUser(vhost_blk::Server),
    /// NBD.
    Nbd(nbd::Server),
}

/// Hands guests' queues to the plane of their VDI.
struct ToPlane(PlaneHandle);

impl Plane for ToPlane {
    fn start_ring(&self, ring: Ring) {
        self.0.send(Command::StartRing(ring));
    }

    fn stop_ring(&self, ring: RingId) {
        self.0.send(Command::StopRing(ring));
    }
}

impl Daemon {
    /// Opens the doors that the records know. One that cannot be opened is an event, not the end.
    pub(super) async fn restore_doors(self: &Arc<Daemon>) {
        // What is damaged was said when VDIs were opened.
        let records = match self.records(ControlStore::readable_vdis) {
            Ok((records, _)) => records,
            Err(error) => {
                self.events.add(
                    Severity::Critical,
                    format!("cannot read the attachments: {error}"),
                );
                return;
            }
        };
        let written = self.written.lock().expect("written").clone();
        for record in records
            .into_iter()
            .filter(|record| written.contains_key(&record.id))
        {
            self.open_doors_of(&record).await;
        }
    }

    /// Opens a VDI's doors again that were closed for a while.
    pub(super) async fn open_doors_of(&self, record: &VdiRecord) {
        for attachment in &record.attachments {
            if let Err(error) = self.open_door(record, attachment).await {
                let message = format!(
                    "VDI {}: {} is not served: {error}",
                    record.name, attachment.target
                );
                self.events.add(Severity::Critical, message);
            }
        }
    }

    async fn open_door(&self, record: &VdiRecord, attachment: &Attachment) -> ApiResult<()> {
        let door = match &attachment.target {
            AttachTarget::VhostUser(path) => self.open_vhost(record, attachment, path)?,
            AttachTarget::Nbd(address) => self.open_nbd(record, attachment, address)?,
        };
        self.doors
            .lock()
            .await
            .insert((record.id, attachment.target.to_string()), door);
        Ok(())
    }

    fn open_vhost(
        &self,
        record: &VdiRecord,
        attachment: &Attachment,
        path: &std::path::Path,
    ) -> ApiResult<Door> {
        make_parent(path)?;
        // The VDI's number leads the data plane to the VDI; the rest keeps doors apart.
        let door = self.next_door.fetch_add(1, Ordering::Relaxed) & 0xffff_ffff;
        let id = DeviceId(u64::from(record.id.0) << 32 | door);
        let mut config = DeviceConfig::new(record.bytes, record.sector_bytes);
        config.serial.clone_from(&record.name);
        config.queues = attachment.queues;
        config.is_read_only = attachment.read_only;
        let plane = Arc::new(ToPlane(self.home(record.id).clone()));
        let server = vhost_blk::Server::start(path, id, config, plane)
            .map_err(|error| ApiError::conflict(error.to_string(), "choose another socket path"))?;
        Ok(Door::VhostUser(server))
    }

    fn open_nbd(&self, record: &VdiRecord, attachment: &Attachment, address: &NbdAddress) -> ApiResult<Door> {
        let address = match address {
            NbdAddress::Unix(path) => {
                make_parent(path)?;
                nbd::Address::Unix(path.clone())
            }
            NbdAddress::Tcp(address) => nbd::Address::Tcp(*address),
        };
        let size = self
            .sizes
            .lock()
            .expect("sizes")
            .get(&record.id)
            .cloned()
            .expect("an open VDI has a size");
        let (name, view, size) = match &attachment.snapshot {
            None => (record.name.clone(), None, size),
            Some(snapshot) => {
                let (lineage, bytes) = self.view(record, snapshot)?;
                let name = format!("{}@{snapshot}", record.name);
                (name, Some(lineage), Arc::new(AtomicU64::new(bytes)))
            }
        };
        let export = Arc::new(VdiExport::new(
            record.id,
            name.clone(),
            view,
            self.home(record.id).clone(),
            self.pool.clone(),
            size,
            record.sector_bytes,
            attachment.read_only,
        ));
        // By its name, and as the default export: clients that name none get the only one there is.
        let exports = nbd::Exports::new();
        for name in [name.as_str(), ""] {
            exports
                .add(name, Arc::clone(&export))
                .map_err(|error| ApiError::internal(format!("export name: {error}"), ""))?;
        }
        let server = nbd::Server::bind(&address, exports, nbd::Config::default())
            .map_err(|error| ApiError::conflict(error.to_string(), "choose another address"))?;
        Ok(Door::Nbd(server))
    }

    pub(super) async fn attach(&self, name: &Name, request: Attach) -> ApiResult<()> {
        let mut record = self.write_here(self.named(name)?).await?;
        let written = self.written.lock().expect("written").clone();
        for other in self.records(ControlStore::vdis)? {
            // The same address on another host is another address.
            if !written.contains_key(&other.id) {
                continue;
            }
            if other
                .attachments
                .iter()
                .any(|attachment| attachment.target == request.target)
            {
                let message = format!("{} is where VDI {} is attached", request.target, other.name);
                return Err(ApiError::conflict(
                    message,
                    format!(
                        "`weft vdi detach {}` first, or choose another address",
                        other.name
                    ),
                ));
            }
        }
        let attachment = Attachment {
            target: request.target,
            read_only: request.read_only,
            queues: request.queues,
            snapshot: request.snapshot,
        };
        self.open_door(&record, &attachment).await?;
        let target = attachment.target.to_string();
        record.attachments.push(attachment);
        if let Err(error) = self.records(|control| control.update_vdi(&record)) {
            self.close_door(record.id, &target).await;
            return Err(error);
        }
        Ok(())
    }

    pub(super) async fn detach(&self, name: &Name, request: Detach) -> ApiResult<()> {
        let mut record = self.named(name)?;
        if !self.written.lock().expect("written").contains_key(&record.id) {
            let writer = self.records(|control| control.writer(record.id))?;
            if let Some(writer) = writer.filter(|_| !record.attachments.is_empty()) {
                return Err(not_here(&record.name, &self.host_name(writer.host)?));
            }
        }
        let (leaving, staying): (Vec<Attachment>, Vec<Attachment>) = std::mem::take(&mut record.attachments)
            .into_iter()
            .partition(|attachment| {
                request
                    .target
                    .as_ref()
                    .is_none_or(|target| *target == attachment.target)
            });
        if leaving.is_empty() {
            let what = request
                .target
                .map_or_else(|| "anywhere".to_owned(), |target| format!("at {target}"));
            return Err(ApiError::not_found(
                format!("VDI {} is not attached {what}", record.name),
                "see `weft vdi show`",
            ));
        }
        record.attachments = staying;
        self.records(|control| control.update_vdi(&record))?;
        for attachment in leaving {
            self.close_door(record.id, &attachment.target.to_string()).await;
        }
        Ok(())
    }

    async fn close_door(&self, vdi: VdiId, target: &str) {
        let door = self.doors.lock().await.remove(&(vdi, target.to_owned()));
        if let Some(door) = door {
            close(door).await;
        }
    }

    /// Hangs up on everyone who uses a VDI; `false` when nobody could.
    pub(super) async fn close_doors_of(&self, vdi: VdiId) -> bool {
        let mut all = self.doors.lock().await;
        let (here, others): (BTreeMap<_, _>, BTreeMap<_, _>) = std::mem::take(&mut *all)
            .into_iter()
            .partition(|((id, _), _)| *id == vdi);
        *all = others;
        drop(all);
        let had_any = !here.is_empty();
        for door in here.into_values() {
            close(door).await;
        }
        had_any
    }

    pub(super) async fn close_all_doors(&self) {
        let doors = std::mem::take(&mut *self.doors.lock().await);
        // Side by side: each waits a while for requests that nobody can answer any more.
        let mut closing = tokio::task::JoinSet::new();
        for door in doors.into_values() {
            closing.spawn(close(door));
        }
        while let Some(closed) = closing.join_next().await {
            if let Err(error) = closed {
                tracing::error!(%error, "a door did not close well");
            }
        }
    }

    /// Tells the guests of a VDI its new size; NBD clients see it when they connect next.
    pub(super) async fn resize_doors(&self, vdi: VdiId, bytes: u64) {
        let mut doors = self.doors.lock().await;
        for (_, door) in doors.iter_mut().filter(|((id, _), _)| *id == vdi) {
            if let Door::VhostUser(server) = door {
                server.resize(bytes);
            }
        }
    }
}

async fn close(door: Door) {
    match door {
        // Waits for the guest's queues to drain, on threads of its own.
        Door::VhostUser(server) => tokio::task::block_in_place(|| server.stop()),
        Door::Nbd(server) => server.stop().await,
    }
}

fn make_parent(path: &std::path::Path) -> ApiResult<()> {
    let Some(parent) = path.parent() else {
        return Ok(());
    };
    std::fs::create_dir_all(parent).map_err(|error| {
        ApiError::invalid(
            format!("cannot make {}: {error}", parent.display()),
            "choose another socket path",
        )
    })
}
