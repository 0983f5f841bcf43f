//! The REST API's requests, carried out.

use std::collections::BTreeMap;
use std::sync::Arc;

use control::{
    API_VERSION, ApiError, ApiResult, Attach, ControlStore, Detach, DiskAdd, DiskInfo, DiskRecord, DiskState,
    Health, HostInfo, LeftoverInfo, Name, PoolCreate, PoolInfo, PoolRecord, RebalancePlan, ResyncInfo,
    Rollback, ScrubStatus, Service, SnapshotCreate, SnapshotInfo, StatusInfo, VdiCreate, VdiDisk, VdiInfo,
    VdiRecord, VersionInfo,
};
use jiff::Timestamp;
use snapshot::SnapshotName;
use store::{ShardSummary, StoreStats};
use types::{BLOCK_BYTES, DiskId, HostId, PoolId, ShardId, VdiId};
use vdi::{Event, VdiStatus};

use super::Daemon;
use super::cluster::Elsewhere;
use super::disks::no_pool;
use crate::plane::{Command, PlaneFigures};

/// All planes' figures by what they are of.
pub(super) struct Figures {
    pub disks: BTreeMap<DiskId, (StoreStats, Vec<ShardSummary>)>,
    pub vdis: BTreeMap<VdiId, VdiStatus>,
    pub planes: Vec<PlaneFigures>,
}

impl Daemon {
    pub(super) async fn all_figures(&self) -> ApiResult<Figures> {
        let planes = self.figures().await?;
        let mut figures = Figures {
            disks: BTreeMap::new(),
            vdis: BTreeMap::new(),
            planes: Vec::new(),
        };
        for plane in &planes {
            for node in &plane.disks {
                figures.disks.insert(node.disk, (node.stats, node.shards.clone()));
            }
            for vdi in &plane.vdis {
                figures.vdis.insert(vdi.vdi, vdi.status.clone());
            }
        }
        figures.planes = planes;
        Ok(figures)
    }

    fn pool_info(&self, pool: PoolRecord, disks: &[DiskInfo]) -> ApiResult<PoolInfo> {
        let vdis = self
            .records(ControlStore::vdis)?
            .iter()
            .filter(|vdi| !vdi.deleting)
            .count();
        Ok(PoolInfo {
            id: pool.id,
            name: pool.name,
            created: pool.created,
            disks: u32::try_from(disks.len()).unwrap_or(u32::MAX),
            vdis: u32::try_from(vdis).unwrap_or(u32::MAX),
            capacity_bytes: disks.iter().map(|disk| disk.capacity_bytes).sum(),
            used_bytes: disks.iter().map(|disk| disk.used_bytes).sum(),
        })
    }

    fn disk_infos(&self, figures: &Figures) -> ApiResult<Vec<DiskInfo>> {
        let replicas: BTreeMap<DiskId, u32> = self
            .records(ControlStore::replicas_by_disk)?
            .into_iter()
            .map(|(disk, vdis)| (disk, vdis.into_values().sum()))
            .collect();
        let records = self.records(ControlStore::disks)?;
        let elsewhere = self.elsewhere()?;
        Ok(records
            .into_iter()
            .map(|record| {
                let stats = figures
                    .disks
                    .get(&record.id)
                    .map(|(stats, _)| *stats)
                    .unwrap_or_default();
                let count = replicas.get(&record.id).copied().unwrap_or(0);
                if self.is_mine(&record) {
                    DiskInfo {
                        host: record.host.and_then(|host| elsewhere.names.get(&host).cloned()),
                        ..self.disk_info(record, stats, count)
                    }
                } else {
                    disk_elsewhere(record, &elsewhere, count)
                }
            })
            .collect())
    }

    fn disk_info(&self, record: DiskRecord, stats: StoreStats, replicas: u32) -> DiskInfo {
        let runtime = self.disks.lock().expect("disks").get(&record.id).cloned();
        let (is_up, reason, leftovers) = runtime.map_or((false, String::new(), 0), |runtime| {
            (runtime.is_up, runtime.reason, runtime.leftovers)
        });
        let state = if record.state == DiskState::Active && !is_up {
            DiskState::Missing
        } else {
            record.state
        };
        DiskInfo {
            id: record.id,
            path: record.path.display().to_string(),
            state,
            zone: record.zone,
            bytes: record.bytes,
            capacity_bytes: stats.capacity_bytes,
            used_bytes: stats.live_blocks * BLOCK_BYTES,
            segments: stats.segments,
            segments_free: stats.segments_free,
            replicas,
            corrupt_blocks: stats.corrupt_blocks,
            reason,
            host: None,
            leftovers,
        }
    }

    fn vdi_info(&self, record: VdiRecord, figures: &Figures) -> ApiResult<VdiInfo> {
        let status = match figures.vdis.get(&record.id) {
            Some(status) => status.clone(),
            None => self.status_by_records(&record)?,
        };
        let host = match self.records(|control| control.writer(record.id))? {
            Some(writer) => Some(self.host_name(writer.host)?),
            None => None,
        };
        let paths: BTreeMap<DiskId, String> = self
            .records(ControlStore::disks)?
            .into_iter()
            .map(|disk| (disk.id, disk.path.display().to_string()))
            .collect();
        let mut fullest: BTreeMap<ShardId, u64> = BTreeMap::new();
        let mut stored = 0;
        for (_, shards) in figures.disks.values() {
            for summary in shards.iter().filter(|summary| summary.shard.vdi == record.id) {
                stored += summary.data_blocks;
                let most = fullest.entry(summary.shard).or_default();
                *most = (*most).max(summary.data_blocks);
            }
        }
        let health = match (status.shards_waiting, status.shards_whole == status.shards) {
            (0, true) => Health::Whole,
            (0, false) => Health::Degraded,
            _ => Health::Waiting,
        };
        let disks = status.disks.iter().map(|(disk, replicas, in_sync)| VdiDisk {
            disk: *disk,
            path: paths.get(disk).cloned().unwrap_or_default(),
            replicas: *replicas,
            in_sync: *in_sync,
        });
        Ok(VdiInfo {
            id: record.id,
            name: record.name,
            bytes: record.bytes,
            used_bytes: fullest.values().sum::<u64>() * BLOCK_BYTES,
            stored_bytes: stored * BLOCK_BYTES,
            sector_bytes: record.sector_bytes,
            replicas: record.replicas,
            shard_bytes: record.shard_bytes,
            created: record.created,
            health,
            shards: status.shards,
            shards_whole: status.shards_whole,
            shards_waiting: status.shards_waiting,
            resync_leaves_left: status.resync_leaves_left,
            deleting: record.deleting,
            attachments: record.attachments,
            disks: disks.collect(),
            host,
        })
    }

    /// Of a VDI that another host writes: what its shards' records say.
    fn status_by_records(&self, record: &VdiRecord) -> ApiResult<VdiStatus> {
        let shards = self.records(|control| control.shards(record.id))?;
        let mut disks: BTreeMap<DiskId, (u32, u32)> = BTreeMap::new();
        let mut whole = 0;
        for shard in &shards {
            whole += u32::from(shard.in_sync.len() == shard.replicas.len());
            for disk in &shard.replicas {
                let (replicas, in_sync) = disks.entry(*disk).or_default();
                *replicas += 1;
                *in_sync += u32::from(shard.in_sync.contains(disk));
            }
        }
        Ok(VdiStatus {
            shards: u32::try_from(shards.len()).unwrap_or(u32::MAX),
            shards_whole: whole,
            disks: disks
                .into_iter()
                .map(|(disk, (replicas, in_sync))| (disk, replicas, in_sync))
                .collect(),
            ..VdiStatus::default()
        })
    }

    async fn one_disk(&self, id: DiskId) -> ApiResult<DiskInfo> {
        let figures = self.all_figures().await?;
        let found = self.disk_infos(&figures)?.into_iter().find(|disk| disk.id == id);
        found.ok_or_else(|| ApiError::not_found(format!("there is no disk {id}"), "see `weft disk list`"))
    }

    async fn one_vdi(&self, record: VdiRecord) -> ApiResult<VdiInfo> {
        let figures = self.all_figures().await?;
        self.vdi_info(record, &figures)
    }

    pub(super) fn require_disk(&self, id: DiskId) -> ApiResult<DiskRecord> {
        self.records(|control| control.disk(id))?
            .ok_or_else(|| ApiError::not_found(format!("there is no disk {id}"), "see `weft disk list`"))
    }
}

/// A disk of another host, as far as that host says.
fn disk_elsewhere(record: DiskRecord, elsewhere: &Elsewhere, replicas: u32) -> DiskInfo {
    let up = elsewhere.up.get(&record.id);
    let state = match (record.state, up) {
        (DiskState::Active, None) => DiskState::Missing,
        (state, _) => state,
    };
    DiskInfo {
        id: record.id,
        path: record.path.display().to_string(),
        state,
        bytes: record.bytes,
        capacity_bytes: up.map_or(0, |up| up.capacity_bytes),
        used_bytes: up.map_or(0, |up| up.used_bytes),
        segments: 0,
        segments_free: 0,
        replicas,
        corrupt_blocks: 0,
        reason: match up {
            Some(_) => String::new(),
            None => elsewhere.reason(&record),
        },
        host: record.host.and_then(|host| elsewhere.names.get(&host).cloned()),
        zone: record.zone,
        leftovers: 0,
    }
}

/// The daemon as the REST API's service; a newtype because the trait and the daemon live in different crates' words.
pub struct RestService(pub Arc<Daemon>);

impl Service for RestService {
    async fn pool_create(&self, request: PoolCreate) -> ApiResult<PoolInfo> {
        let _one = self.0.changes.lock().await;
        if let Some(pool) = self.0.records(ControlStore::pool)? {
            return Err(ApiError::conflict(
                format!("this host has the pool {} already", pool.name),
                "see `weft pool status`",
            ));
        }
        let pool = PoolRecord {
            id: PoolId(uuid::Uuid::new_v4().as_u128()),
            name: request.name.as_str().to_owned(),
            created: Timestamp::now(),
            recovered: 0,
        };
        self.0.records(|control| control.create_pool(&pool))?;
        self.0.pool_info(pool, &[])
    }

    async fn pool_status(&self) -> ApiResult<PoolInfo> {
        let pool = self.0.records(ControlStore::pool)?.ok_or_else(no_pool)?;
        let figures = self.0.all_figures().await?;
        let disks = self.0.disk_infos(&figures)?;
        self.0.pool_info(pool, &disks)
    }

    async fn rebalance_plan(&self) -> ApiResult<RebalancePlan> {
        self.0.records(ControlStore::pool)?.ok_or_else(no_pool)?;
        self.0.rebalance_plan()
    }

    async fn rebalance_start(&self) -> ApiResult<RebalancePlan> {
        let _one = self.0.changes.lock().await;
        self.0.records(ControlStore::pool)?.ok_or_else(no_pool)?;
        let plan = self.0.rebalance_plan()?;
        self.0.records(ControlStore::ask_to_rebalance)?;
        Ok(plan)
    }

    async fn disk_add(&self, request: DiskAdd) -> ApiResult<DiskInfo> {
        let _one = self.0.changes.lock().await;
        let id = self.0.add_disk(request).await?;
        self.0.retry_removals().await?;
        self.0.one_disk(id).await
    }

    async fn host_list(&self) -> ApiResult<Vec<HostInfo>> {
        self.0.host_infos()
    }

    async fn host_drain(&self, host: HostId) -> ApiResult<HostInfo> {
        let _one = self.0.changes.lock().await;
        self.0.drain_host(host).await
    }

    async fn host_remove(&self, host: HostId, force: bool) -> ApiResult<HostInfo> {
        let _one = self.0.changes.lock().await;
        self.0.remove_host(host, force).await
    }

    async fn disk_list(&self) -> ApiResult<Vec<DiskInfo>> {
        let figures = self.0.all_figures().await?;
        self.0.disk_infos(&figures)
    }

    async fn disk_remove(&self, disk: DiskId, force: bool) -> ApiResult<DiskInfo> {
        let _one = self.0.changes.lock().await;
        self.0.require_disk(disk)?;
        let before = self.0.one_disk(disk).await?;
        self.0.move_away(disk, None, force).await?;
        self.0.finish_removals().await?;
        Ok(DiskInfo {
            state: DiskState::Removing,
            ..before
        })
    }

    async fn disk_replace(&self, disk: DiskId, with: DiskAdd) -> ApiResult<DiskInfo> {
        let _one = self.0.changes.lock().await;
        self.0.require_disk(disk)?;
        let new = self.0.add_disk(with).await?;
        self.0.move_away(disk, Some(new), false).await?;
        self.0.finish_removals().await?;
        self.0.one_disk(new).await
    }

    async fn leftovers(&self, disk: DiskId) -> ApiResult<Vec<LeftoverInfo>> {
        let kept = self.0.kept_on(disk).await?;
        Ok(kept.into_iter().map(|(info, _)| info).collect())
    }

    async fn leftovers_drop(&self, disk: DiskId, force: bool) -> ApiResult<Vec<LeftoverInfo>> {
        let _one = self.0.changes.lock().await;
        self.0.drop_kept(disk, force).await
    }

    async fn vdi_create(&self, request: VdiCreate) -> ApiResult<VdiInfo> {
        let _one = self.0.changes.lock().await;
        let record = self.0.create_vdi(request).await?;
        self.0.one_vdi(record).await
    }

    async fn vdi_list(&self) -> ApiResult<Vec<VdiInfo>> {
        let figures = self.0.all_figures().await?;
        let records = self.0.records(ControlStore::vdis)?;
        records
            .into_iter()
            .map(|record| self.0.vdi_info(record, &figures))
            .collect()
    }

    async fn vdi_show(&self, name: Name) -> ApiResult<VdiInfo> {
        let record = self.0.named(&name)?;
        self.0.one_vdi(record).await
    }

    async fn vdi_resize(&self, name: Name, bytes: u64) -> ApiResult<VdiInfo> {
        let _one = self.0.changes.lock().await;
        let record = self.0.resize_vdi(&name, bytes).await?;
        self.0.one_vdi(record).await
    }

    async fn vdi_delete(&self, name: Name) -> ApiResult<()> {
        let _one = self.0.changes.lock().await;
        self.0.delete_vdi(&name).await
    }

    async fn vdi_attach(&self, name: Name, request: Attach) -> ApiResult<VdiInfo> {
        let _one = self.0.changes.lock().await;
        self.0.attach(&name, request).await?;
        let record = self.0.named(&name)?;
        self.0.one_vdi(record).await
    }

    async fn vdi_detach(&self, name: Name, request: Detach) -> ApiResult<VdiInfo> {
        let _one = self.0.changes.lock().await;
        self.0.detach(&name, request).await?;
        let record = self.0.named(&name)?;
        self.0.one_vdi(record).await
    }

    async fn snapshot_create(&self, request: SnapshotCreate) -> ApiResult<Vec<SnapshotInfo>> {
        let _one = self.0.changes.lock().await;
        self.0.take_snapshots(request).await
    }

    async fn snapshot_list(&self, vdi: Name) -> ApiResult<Vec<SnapshotInfo>> {
        let record = self.0.named(&vdi)?;
        self.0.snapshots(&record)
    }

    async fn snapshot_delete(&self, vdi: Name, snapshot: SnapshotName) -> ApiResult<()> {
        let _one = self.0.changes.lock().await;
        self.0.delete_snapshot(&vdi, &snapshot).await
    }

    async fn snapshot_protect(
        &self,
        vdi: Name,
        snapshot: SnapshotName,
        protected: bool,
    ) -> ApiResult<SnapshotInfo> {
        let _one = self.0.changes.lock().await;
        self.0.protect_snapshot(&vdi, &snapshot, protected).await
    }

    async fn vdi_rollback(&self, vdi: Name, request: Rollback) -> ApiResult<VdiInfo> {
        let _one = self.0.changes.lock().await;
        let record = self.0.roll_back(&vdi, request).await?;
        self.0.one_vdi(record).await
    }

    async fn scrub_start(&self, vdi: Option<Name>) -> ApiResult<ScrubStatus> {
        let _one = self.0.changes.lock().await;
        let records = match vdi {
            Some(name) => vec![self.0.named(&name)?],
            None => self.0.records(ControlStore::vdis)?,
        };
        let written = self.0.written.lock().expect("written").clone();
        for record in records.iter().filter(|record| {
            !record.deleting && written.contains_key(&record.id) && !self.0.events.is_scrubbing(record.id)
        }) {
            self.0
                .events
                .scrub_begins(record.id, &record.name, record.shard_count());
            self.0.home(record.id).send(Command::Vdi {
                vdi: record.id,
                event: Event::Scrub,
            });
        }
        Ok(ScrubStatus {
            scrubs: self.0.events.scrubs(),
        })
    }

    async fn scrub_status(&self) -> ApiResult<ScrubStatus> {
        Ok(ScrubStatus {
            scrubs: self.0.events.scrubs(),
        })
    }

    async fn status(&self) -> ApiResult<StatusInfo> {
        let figures = self.0.all_figures().await?;
        let disks = self.0.disk_infos(&figures)?;
        let pool = match self.0.records(ControlStore::pool)? {
            Some(pool) => Some(self.0.pool_info(pool, &disks)?),
            None => None,
        };
        let records = self.0.records(ControlStore::vdis)?;
        let vdis: Vec<VdiInfo> = records
            .into_iter()
            .map(|record| self.0.vdi_info(record, &figures))
            .collect::<ApiResult<_>>()?;
        let resyncs = vdis
            .iter()
            .filter(|vdi| vdi.resync_leaves_left > 0)
            .map(|vdi| ResyncInfo {
                vdi: vdi.name.clone(),
                shards_left: vdi.shards - vdi.shards_whole,
                leaves_left: vdi.resync_leaves_left,
            });
        Ok(StatusInfo {
            version: self.version().await?,
            control: self.0.control_info(),
            hosts: self.0.host_infos()?,
            moves: self.0.moves()?,
            rebalance: self.0.rebalance_info()?,
            pool,
            disks,
            resyncs: resyncs.collect(),
            vdis,
            scrubs: self.0.events.scrubs(),
            events: self.0.events.list(),
        })
    }

    async fn metrics(&self) -> ApiResult<String> {
        self.0.metrics_text().await
    }

    async fn version(&self) -> ApiResult<VersionInfo> {
        Ok(VersionInfo {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            api: API_VERSION,
            disk_format: u32::from(store::FORMAT_VERSION),
        })
    }
}
