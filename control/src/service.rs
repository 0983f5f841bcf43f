//! What the daemon does for the REST API. Every request it sees has passed [`crate::check`].

use std::future::Future;

use snapshot::SnapshotName;
use types::{DiskId, HostId};

use crate::{
    ApiResult, Attach, Detach, DiskAdd, DiskInfo, HostInfo, LeftoverInfo, Name, PoolCreate, PoolInfo,
    RebalancePlan, Rollback, ScrubStatus, SnapshotCreate, SnapshotInfo, StatusInfo, VdiCreate, VdiInfo,
    VersionInfo,
};

/// The daemon behind the API.
///
/// An implementor owes: a method that fails has changed nothing, or says in its message what it changed; what a
/// method did is durable when it returns; methods may run at the same time. It may assume that requests are valid
/// in themselves (names, sizes, addresses), not that what they name exists.
pub trait Service: Send + Sync + 'static {
    /// Makes the pool; one per daemon.
    fn pool_create(&self, request: PoolCreate) -> impl Future<Output = ApiResult<PoolInfo>> + Send;
    /// The pool.
    fn pool_status(&self) -> impl Future<Output = ApiResult<PoolInfo>> + Send;

    /// What would move if it were asked for that disks be made evenly full.
    fn rebalance_plan(&self) -> impl Future<Output = ApiResult<RebalancePlan>> + Send;
    /// Asks for it, of all hosts; returns what is going to move.
    fn rebalance_start(&self) -> impl Future<Output = ApiResult<RebalancePlan>> + Send;

    /// All hosts of the cluster; none where there is a single host.
    fn host_list(&self) -> impl Future<Output = ApiResult<Vec<HostInfo>>> + Send;

    /// Moves all replicas off the host's disks and lets the disks go; returns when the move has begun.
    fn host_drain(&self, host: HostId) -> impl Future<Output = ApiResult<HostInfo>> + Send;
    /// Forgets a host that is gone for good: its replicas are made anew on other hosts, then it leaves the list. Refused
    /// while it lives, and without `force` while a disk of it has the only good copy of something.
    fn host_remove(&self, host: HostId, force: bool) -> impl Future<Output = ApiResult<HostInfo>> + Send;

    /// Formats a disk and gives it to the pool. Refuses with `NeedsForce` what holds something.
    fn disk_add(&self, request: DiskAdd) -> impl Future<Output = ApiResult<DiskInfo>> + Send;
    /// All disks.
    fn disk_list(&self) -> impl Future<Output = ApiResult<Vec<DiskInfo>>> + Send;
    /// Moves the disk's replicas away, then lets it go; returns when the move has begun. With `force`, lets it go
    /// at once although replicas are on it.
    fn disk_remove(&self, disk: DiskId, force: bool) -> impl Future<Output = ApiResult<DiskInfo>> + Send;
    /// Replicas on a disk that no record knows.
    fn leftovers(&self, disk: DiskId) -> impl Future<Output = ApiResult<Vec<LeftoverInfo>>> + Send;
    /// Drops them. Refuses with `NeedsForce`, saying what is lost.
    fn leftovers_drop(
        &self,
        disk: DiskId,
        force: bool,
    ) -> impl Future<Output = ApiResult<Vec<LeftoverInfo>>> + Send;
    /// Adds `with` and gives it the places of `disk`, which leaves; returns when resync has begun.
    fn disk_replace(&self, disk: DiskId, with: DiskAdd) -> impl Future<Output = ApiResult<DiskInfo>> + Send;

    /// Makes a VDI and places its shards.
    fn vdi_create(&self, request: VdiCreate) -> impl Future<Output = ApiResult<VdiInfo>> + Send;
    /// All VDIs.
    fn vdi_list(&self) -> impl Future<Output = ApiResult<Vec<VdiInfo>>> + Send;
    /// One VDI.
    fn vdi_show(&self, name: Name) -> impl Future<Output = ApiResult<VdiInfo>> + Send;
    /// Grows it; guests are told. Same size: nothing to do. Smaller: refused.
    fn vdi_resize(&self, name: Name, bytes: u64) -> impl Future<Output = ApiResult<VdiInfo>> + Send;
    /// Deletes it and its data; refused while attached.
    fn vdi_delete(&self, name: Name) -> impl Future<Output = ApiResult<()>> + Send;
    /// Opens a door for guests; stays across restarts of the daemon.
    fn vdi_attach(&self, name: Name, request: Attach) -> impl Future<Output = ApiResult<VdiInfo>> + Send;
    /// Closes one door, or all.
    fn vdi_detach(&self, name: Name, request: Detach) -> impl Future<Output = ApiResult<VdiInfo>> + Send;

    /// Takes a snapshot of each of these VDIs, all at one moment, under load; all or none. Durable when it returns.
    fn snapshot_create(
        &self,
        request: SnapshotCreate,
    ) -> impl Future<Output = ApiResult<Vec<SnapshotInfo>>> + Send;
    /// The snapshots of a VDI, the oldest first.
    fn snapshot_list(&self, vdi: Name) -> impl Future<Output = ApiResult<Vec<SnapshotInfo>>> + Send;
    /// Deletes one; refused when it is protected, served, or a clone needs it.
    fn snapshot_delete(
        &self,
        vdi: Name,
        snapshot: SnapshotName,
    ) -> impl Future<Output = ApiResult<()>> + Send;
    /// Sets or takes away its protection.
    fn snapshot_protect(
        &self,
        vdi: Name,
        snapshot: SnapshotName,
        protected: bool,
    ) -> impl Future<Output = ApiResult<SnapshotInfo>> + Send;
    /// Makes the VDI what it was when a snapshot of it was taken; refused while guests use it, without `force`.
    fn vdi_rollback(&self, vdi: Name, request: Rollback) -> impl Future<Output = ApiResult<VdiInfo>> + Send;

    /// Starts to read and verify one VDI, or all.
    fn scrub_start(&self, vdi: Option<Name>) -> impl Future<Output = ApiResult<ScrubStatus>> + Send;
    /// How far scrubs are.
    fn scrub_status(&self) -> impl Future<Output = ApiResult<ScrubStatus>> + Send;

    /// All at a glance.
    fn status(&self) -> impl Future<Output = ApiResult<StatusInfo>> + Send;
    /// Prometheus text format.
    fn metrics(&self) -> impl Future<Output = ApiResult<String>> + Send;
    /// Who answers.
    fn version(&self) -> impl Future<Output = ApiResult<VersionInfo>> + Send;
}
