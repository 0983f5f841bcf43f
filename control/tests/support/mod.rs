//! A daemon in memory behind the router, on a real unix socket.
#![allow(dead_code)] // every test binary uses its own part

use std::path::Path;
use std::sync::{Arc, Mutex};

use serde_json::Value;
use snapshot::SnapshotName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use types::{DiskId, HostId, PoolId, VdiId};
use weft_control as control;
use weft_control::{
    ApiError, ApiResult, Attach, Attachment, Detach, DiskAdd, DiskInfo, DiskState, Health, HostInfo,
    LeftoverInfo, Name, PoolCreate, PoolInfo, RebalancePlan, Rollback, ScrubStatus, Service, SnapshotCreate,
    SnapshotInfo, StatusInfo, VdiCreate, VdiInfo, VersionInfo, rest,
};

/// Keeps what it is told; counts the calls that reached it, so that tests see what the border let through.
#[derive(Default)]
pub struct Fake {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    calls: u32,
    pool: Option<String>,
    disks: Vec<DiskInfo>,
    vdis: Vec<VdiInfo>,
    snapshots: Vec<SnapshotInfo>,
}

impl Fake {
    fn change<T>(&self, change: impl FnOnce(&mut State) -> ApiResult<T>) -> ApiResult<T> {
        let mut state = self.state.lock().unwrap();
        state.calls += 1;
        change(&mut state)
    }

    fn with_vdi(&self, name: &Name, change: impl FnOnce(&mut VdiInfo)) -> ApiResult<VdiInfo> {
        self.change(|state| {
            let vdi = state.vdis.iter_mut().find(|v| v.name == name.as_str());
            let vdi =
                vdi.ok_or_else(|| ApiError::not_found(format!("no VDI '{name}'"), "`weft vdi list`"))?;
            change(vdi);
            Ok(vdi.clone())
        })
    }
}

fn pool(name: &str) -> PoolInfo {
    PoolInfo {
        id: PoolId(1),
        name: name.to_owned(),
        created: "2026-11-22T01:00:00Z".parse().unwrap(),
        disks: 0,
        vdis: 0,
        capacity_bytes: 0,
        used_bytes: 0,
    }
}

fn disk(id: u128, request: &DiskAdd) -> DiskInfo {
    DiskInfo {
        id: DiskId(id),
        path: request.path.display().to_string(),
        state: DiskState::Active,
        zone: request.zone.as_ref().map(ToString::to_string).unwrap_or_default(),
        bytes: request.create_bytes.unwrap_or(1 << 40),
        capacity_bytes: 0,
        used_bytes: 0,
        segments: 0,
        segments_free: 0,
        replicas: 0,
        corrupt_blocks: 0,
        reason: String::new(),
        host: None,
        leftovers: 0,
    }
}

fn vdi(request: &VdiCreate) -> VdiInfo {
    VdiInfo {
        id: VdiId(1),
        name: request.name.to_string(),
        bytes: request.bytes,
        used_bytes: 0,
        stored_bytes: 0,
        sector_bytes: request.sector_bytes,
        replicas: request.replicas,
        shard_bytes: request.shard_bytes,
        created: "2026-11-22T01:00:00Z".parse().unwrap(),
        health: Health::Whole,
        shards: 1,
        shards_whole: 1,
        shards_waiting: 0,
        resync_leaves_left: 0,
        deleting: false,
        attachments: Vec::new(),
        disks: Vec::new(),
        host: None,
    }
}

fn fake_version() -> VersionInfo {
    VersionInfo {
        version: "0.1.0".into(),
        api: control::API_VERSION,
        disk_format: 1,
    }
}

impl Service for Fake {
    async fn pool_create(&self, request: PoolCreate) -> ApiResult<PoolInfo> {
        self.change(|state| {
            if state.pool.is_some() {
                return Err(ApiError::conflict("there is a pool", ""));
            }
            state.pool = Some(request.name.to_string());
            Ok(pool(request.name.as_str()))
        })
    }

    async fn pool_status(&self) -> ApiResult<PoolInfo> {
        self.change(|state| match &state.pool {
            Some(name) => Ok(pool(name)),
            None => Err(ApiError::not_found("there is no pool", "`weft pool create NAME`")),
        })
    }

    async fn disk_add(&self, request: DiskAdd) -> ApiResult<DiskInfo> {
        self.change(|state| {
            if request.path == Path::new("/dev/full") && !request.force {
                return Err(ApiError::needs_force(
                    "/dev/full has an ext4 file system",
                    "--force",
                ));
            }
            let info = disk(state.disks.len() as u128 + 1, &request);
            state.disks.push(info.clone());
            Ok(info)
        })
    }

    async fn rebalance_plan(&self) -> ApiResult<RebalancePlan> {
        self.change(|_| {
            Ok(RebalancePlan {
                moves: 0,
                bytes: 0,
                is_wanted: false,
                is_on: true,
                waits_for: String::new(),
                first: Vec::new(),
            })
        })
    }

    async fn rebalance_start(&self) -> ApiResult<RebalancePlan> {
        self.rebalance_plan().await
    }

    async fn leftovers(&self, disk: DiskId) -> ApiResult<Vec<LeftoverInfo>> {
        self.change(|_| Err(ApiError::not_found(format!("no disk {disk}"), "")))
    }

    async fn leftovers_drop(&self, disk: DiskId, _: bool) -> ApiResult<Vec<LeftoverInfo>> {
        self.leftovers(disk).await
    }

    async fn host_list(&self) -> ApiResult<Vec<HostInfo>> {
        Ok(Vec::new())
    }

    async fn host_drain(&self, host: HostId) -> ApiResult<HostInfo> {
        self.change(|_| Err(ApiError::not_found(format!("no host {host}"), "")))
    }

    async fn host_remove(&self, host: HostId, _: bool) -> ApiResult<HostInfo> {
        self.change(|_| Err(ApiError::not_found(format!("no host {host}"), "")))
    }

    async fn disk_list(&self) -> ApiResult<Vec<DiskInfo>> {
        self.change(|state| Ok(state.disks.clone()))
    }

    async fn disk_remove(&self, disk: DiskId, force: bool) -> ApiResult<DiskInfo> {
        self.change(|state| {
            let found = state.disks.iter().position(|d| d.id == disk);
            let at = found.ok_or_else(|| ApiError::not_found(format!("no disk {disk}"), ""))?;
            if force {
                return Ok(state.disks.remove(at));
            }
            state.disks[at].state = DiskState::Removing;
            Ok(state.disks[at].clone())
        })
    }

    async fn disk_replace(&self, _: DiskId, with: DiskAdd) -> ApiResult<DiskInfo> {
        self.disk_add(with).await
    }

    async fn vdi_create(&self, request: VdiCreate) -> ApiResult<VdiInfo> {
        self.change(|state| {
            let info = vdi(&request);
            state.vdis.push(info.clone());
            Ok(info)
        })
    }

    async fn vdi_list(&self) -> ApiResult<Vec<VdiInfo>> {
        self.change(|state| Ok(state.vdis.clone()))
    }

    async fn vdi_show(&self, name: Name) -> ApiResult<VdiInfo> {
        self.with_vdi(&name, |_| {})
    }

    async fn vdi_resize(&self, name: Name, bytes: u64) -> ApiResult<VdiInfo> {
        self.with_vdi(&name, |vdi| vdi.bytes = bytes)
    }

    async fn vdi_delete(&self, name: Name) -> ApiResult<()> {
        self.with_vdi(&name, |_| {})?;
        self.change(|state| {
            state.vdis.retain(|v| v.name != name.as_str());
            Ok(())
        })
    }

    async fn vdi_attach(&self, name: Name, request: Attach) -> ApiResult<VdiInfo> {
        let Attach {
            target,
            read_only,
            queues,
            snapshot,
        } = request;
        self.with_vdi(&name, |vdi| {
            vdi.attachments.push(Attachment {
                target,
                read_only,
                queues,
                snapshot,
            });
        })
    }

    async fn vdi_detach(&self, name: Name, request: Detach) -> ApiResult<VdiInfo> {
        let stays = |a: &Attachment| request.target.as_ref().is_some_and(|target| a.target != *target);
        self.with_vdi(&name, |vdi| vdi.attachments.retain(stays))
    }

    async fn snapshot_create(&self, request: SnapshotCreate) -> ApiResult<Vec<SnapshotInfo>> {
        self.change(|state| {
            let taken = request.snapshots.into_iter().map(|(vdi, name)| SnapshotInfo {
                vdi: vdi.to_string(),
                name: name.to_string(),
                created: "2026-11-22T01:00:00Z".parse().unwrap(),
                bytes: 1 << 30,
                protected: false,
                parent: None,
                is_below_head: true,
                clones: Vec::new(),
                layer: 0,
            });
            let taken: Vec<SnapshotInfo> = taken.collect();
            state.snapshots.extend(taken.clone());
            Ok(taken)
        })
    }

    async fn snapshot_list(&self, vdi: Name) -> ApiResult<Vec<SnapshotInfo>> {
        self.change(|state| {
            let its = state.snapshots.iter().filter(|one| one.vdi == vdi.as_str());
            Ok(its.cloned().collect())
        })
    }

    async fn snapshot_delete(&self, vdi: Name, snapshot: SnapshotName) -> ApiResult<()> {
        self.change(|state| {
            let is_it = |one: &SnapshotInfo| one.vdi == vdi.as_str() && one.name == snapshot.as_str();
            state.snapshots.retain(|one| !is_it(one));
            Ok(())
        })
    }

    async fn snapshot_protect(
        &self,
        vdi: Name,
        snapshot: SnapshotName,
        protected: bool,
    ) -> ApiResult<SnapshotInfo> {
        self.change(|state| {
            let mut all = state.snapshots.iter_mut();
            let one = all.find(|one| one.vdi == vdi.as_str() && one.name == snapshot.as_str());
            let one = one.ok_or_else(|| ApiError::not_found("no such snapshot", ""))?;
            one.protected = protected;
            Ok(one.clone())
        })
    }

    async fn vdi_rollback(&self, name: Name, _: Rollback) -> ApiResult<VdiInfo> {
        self.with_vdi(&name, |_| {})
    }

    async fn scrub_start(&self, _: Option<Name>) -> ApiResult<ScrubStatus> {
        self.change(|_| Ok(ScrubStatus::default()))
    }

    async fn scrub_status(&self) -> ApiResult<ScrubStatus> {
        self.change(|_| Ok(ScrubStatus::default()))
    }

    async fn status(&self) -> ApiResult<StatusInfo> {
        self.change(|state| {
            Ok(StatusInfo {
                control: Default::default(),
                hosts: Vec::new(),
                moves: Vec::new(),
                rebalance: None,
                version: fake_version(),
                pool: state.pool.as_deref().map(pool),
                disks: state.disks.clone(),
                vdis: state.vdis.clone(),
                resyncs: Vec::new(),
                scrubs: Vec::new(),
                events: Vec::new(),
            })
        })
    }

    async fn metrics(&self) -> ApiResult<String> {
        Ok("weft_up 1\n".to_owned())
    }

    async fn version(&self) -> ApiResult<VersionInfo> {
        Ok(fake_version())
    }
}

/// A served fake in a directory of its own.
pub struct Served {
    pub folder: tempfile::TempDir,
    fake: Arc<Fake>,
    pub stop: Option<tokio::sync::oneshot::Sender<()>>,
    pub server: tokio::task::JoinHandle<std::io::Result<()>>,
}

impl Served {
    pub async fn start() -> Served {
        let folder = tempfile::tempdir().unwrap();
        let fake = Arc::new(Fake::default());
        let listener = rest::bind(&folder.path().join("blockd.sock")).await.unwrap();
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let server = tokio::spawn(rest::serve(
            listener,
            rest::router(Arc::clone(&fake)),
            async move {
                let _ = stopped.await;
            },
        ));
        Served {
            folder,
            fake,
            stop: Some(stop),
            server,
        }
    }

    pub fn socket(&self) -> std::path::PathBuf {
        self.folder.path().join("blockd.sock")
    }

    pub fn calls(&self) -> u32 {
        self.fake.state.lock().unwrap().calls
    }

    /// One request as raw HTTP/1.1; the answer's status, content type and body.
    pub async fn raw(&self, method: &str, path: &str, body: &str) -> (u16, String, String) {
        let mut stream = UnixStream::connect(self.socket()).await.unwrap();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: weft\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        // A body that is refused early may find the connection closed: what counts is the answer.
        let _ = stream.write_all(body.as_bytes()).await;
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        let text = String::from_utf8(answer).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").expect("an HTTP answer");
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let content = head
            .lines()
            .find_map(|l| l.strip_prefix("content-type: "))
            .unwrap_or_default();
        (status, content.to_owned(), body.to_owned())
    }

    pub async fn call(&self, method: &str, path: &str, body: Value) -> (u16, Value) {
        let text = if body.is_null() {
            String::new()
        } else {
            body.to_string()
        };
        let (status, content, answer) = self.raw(method, path, &text).await;
        if status >= 400 {
            assert_eq!(content, "application/problem+json", "{method} {path}: {answer}");
        }
        (status, serde_json::from_str(&answer).unwrap_or(Value::Null))
    }
}
