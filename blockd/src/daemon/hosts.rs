//! Hosts that leave: drained while they live, removed when they are gone for good.
//!
//! ```text
//!  drain:   its disks are emptied and leave; it stays a host, without disks
//!  remove:  only when it is dead; its VDIs are taken over, its disks emptied from the other replicas, then it is forgotten
//! ```

use std::collections::BTreeSet;

use control::{ApiError, ApiResult, ControlStore, DiskState, HostInfo, HostRecord, RecordError, Severity};
use types::{DiskId, HostId};

use super::Daemon;

impl Daemon {
    /// Moves everything off the disks of a host.
    pub(super) async fn drain_host(&self, id: HostId) -> ApiResult<HostInfo> {
        let host = self.require_host(id)?;
        let disks = self.disks_of(id)?;
        self.empty(&disks, None, false).await?;
        let message = format!("host {} is being emptied: {} disks", host.name, disks.len());
        self.events.add(Severity::Info, message);
        self.finish_removals().await?;
        self.host_info(id)
    }

    /// Begins to forget a host that will not come back; what it says when it is done is that the host is not there.
    pub(super) async fn remove_host(&self, id: HostId, force: bool) -> ApiResult<HostInfo> {
        let host = self.require_host(id)?;
        if let Some(alive) = self.records(|control| control.alive_now(id))? {
            let left_s = self.records(|control| control.left_s(alive.lease))?;
            return Err(ApiError::conflict(
                format!(
                    "host {} lives; if it does not, that is known in at most {left_s} s",
                    host.name
                ),
                format!("`weft host drain {}`, then stop its daemon", host.name),
            ));
        }
        let before = self.host_info(id)?;
        self.empty(&self.disks_of(id)?, None, force).await?;
        self.records(|control| control.begin_to_forget(id))?;
        for vdi in self.records(ControlStore::vdis)? {
            let writer = self.records(|control| control.writer(vdi.id))?;
            if writer.is_some_and(|writer| writer.host == id) {
                self.write_here(vdi).await?;
            }
        }
        // The VDIs that were taken over only now.
        self.resume_removals().await?;
        self.forget_hosts()?;
        Ok(before)
    }

    /// Hosts that are to be forgotten and have no disks any more.
    pub(super) fn forget_hosts(&self) -> ApiResult<()> {
        for host in self.records(ControlStore::hosts)? {
            if !host.leaving || self.records(|control| control.alive_now(host.id))?.is_some() {
                continue;
            }
            let has_disks = self
                .records(ControlStore::disks)?
                .iter()
                .any(|disk| disk.host == Some(host.id));
            if has_disks {
                continue;
            }
            match self.control_now(|control| control.forget_host(&host)) {
                Ok(()) => {
                    let message = format!("host {} left the cluster", host.name);
                    self.events.add(Severity::Info, message);
                }
                // Another host did, or it came back this moment.
                Err(RecordError::Overtaken | RecordError::HostNameTaken { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn disks_of(&self, id: HostId) -> ApiResult<BTreeSet<DiskId>> {
        let disks = self.records(ControlStore::disks)?;
        Ok(disks
            .into_iter()
            .filter(|disk| disk.host == Some(id) && disk.state != DiskState::Removing)
            .map(|disk| disk.id)
            .collect())
    }

    fn require_host(&self, id: HostId) -> ApiResult<HostRecord> {
        self.records(|control| control.host(id))?
            .ok_or_else(|| ApiError::not_found(format!("there is no host {id}"), "see `weft host list`"))
    }

    fn host_info(&self, id: HostId) -> ApiResult<HostInfo> {
        let found = self.host_infos()?.into_iter().find(|host| host.id == id);
        found.ok_or_else(|| ApiError::not_found(format!("there is no host {id}"), "see `weft host list`"))
    }
}
