//! The daemon: composition root. Opens the state directory, starts the planes, brings disks and VDIs up, and
//! carries out what the REST API asks.
//!
//! ```text
//!  main ─▶ Daemon::start ─▶ planes ─▶ disks (recovered side by side) ─▶ VDIs ─▶ doors (vhost-user, NBD)
//!            ▲    reports task: records to save, notices, failed disks ◀── planes
//!            └──  REST (control::rest) ─▶ service.rs ─▶ disks.rs, removal.rs | vdis.rs | doors.rs
//! ```
//! Operations that change something run one at a time (`changes`); questions run beside them.

mod cluster;
mod disks;
mod doors;
mod events;
mod hosts;
mod leftovers;
mod metrics;
mod moving;
mod notes;
mod peers;
mod rebalancing;
mod removal;
mod replacing;
mod reports;
mod service;
mod snapshots;
mod stopping;
mod vdis;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use anyhow::{Context, Result, bail};
use control::{ApiError, ApiResult, ControlStore, VdiWriter};
use edge::uring::Pool;
use store::StoreSettings;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::oneshot;
use types::{DiskId, Epoch, Incarnation, ShardId, VdiId};

use crate::config::Settings;
use crate::plane::{Command, PlaneFigures, PlaneHandle, Report};
use crate::start::Planes;
use cluster::Membership;
use disks::DiskRuntime;
use doors::Door;
use events::EventLog;
use moving::Moving;
use rebalancing::Rebalancing;
use replacing::Replacing;
pub use service::RestService;

/// All the daemon's state beside the planes'.
pub struct Daemon {
    settings: Settings,
    control: ControlStore,
    /// Absent: a pool of this host alone.
    membership: Option<Membership>,
    incarnation: Incarnation,
    planes: Vec<PlaneHandle>,
    /// For links, which report like planes.
    reports: UnboundedSender<Report>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    pool: Pool,
    disks: Mutex<BTreeMap<DiskId, DiskRuntime>>,
    doors: tokio::sync::Mutex<BTreeMap<(VdiId, String), Door>>,
    next_door: AtomicU64,
    /// The VDIs that are open here, and in a cluster as which writer.
    written: Mutex<BTreeMap<VdiId, Option<VdiWriter>>>,
    /// Shards' records on their way to the control store, by the epoch that they bring.
    saving: Mutex<BTreeSet<(ShardId, Epoch)>>,
    sizes: Mutex<BTreeMap<VdiId, Arc<AtomicU64>>>,
    deleting: Mutex<BTreeSet<VdiId>>,
    /// Disks that are to leave and could not begin to.
    removals_stalled: Mutex<BTreeSet<DiskId>>,
    replacing: Mutex<Replacing>,
    moving: Mutex<Moving>,
    /// A move has ended, and the next may perhaps begin.
    has_room_again: tokio::sync::Notify,
    rebalancing: Mutex<Rebalancing>,
    /// What the disks that are served know of the pool.
    told: Mutex<notes::Told>,
    events: EventLog,
    changes: tokio::sync::Mutex<()>,
    /// Held for the process' life: a second daemon on the same state is refused.
    _lock: File,
}

impl Daemon {
    /// Brings everything up. Disks that cannot be opened are reported and missing, not fatal.
    pub async fn start(settings: Settings) -> Result<Arc<Daemon>> {
        make_private(&settings.state)?;
        let lock = lock_state(&settings.state)?;
        let (control, membership, incarnation) = cluster::join(&settings).await?;
        let (reports, inbox) = unbounded_channel();
        let Planes {
            handles,
            threads,
            pool,
        } = crate::start::planes(&settings, &reports)?;
        let daemon = Arc::new(Daemon {
            settings,
            control,
            membership,
            incarnation,
            planes: handles,
            reports,
            threads: Mutex::new(threads),
            pool,
            disks: Mutex::default(),
            doors: tokio::sync::Mutex::default(),
            next_door: AtomicU64::new(0),
            written: Mutex::default(),
            saving: Mutex::default(),
            sizes: Mutex::default(),
            deleting: Mutex::default(),
            removals_stalled: Mutex::default(),
            replacing: Mutex::default(),
            moving: Mutex::default(),
            has_room_again: tokio::sync::Notify::new(),
            rebalancing: Mutex::default(),
            told: Mutex::default(),
            events: EventLog::default(),
            changes: tokio::sync::Mutex::default(),
            _lock: lock,
        });
        daemon.run_reports(inbox);
        daemon.look_at_peers().await?;
        daemon.open_all_disks().await?;
        daemon.live();
        daemon.open_all_vdis().await?;
        if let Err(error) = daemon.resume_removals().await {
            let message = format!("what leaves disks does not go on: {error}");
            daemon.events.add(control::Severity::Critical, message);
        }
        daemon.restore_doors().await;
        tokio::spawn(Arc::clone(&daemon).watch_for_missing_disks());
        daemon.replace_what_is_gone();
        tokio::spawn(Arc::clone(&daemon).keep_telling_disks());
        Ok(daemon)
    }

    fn run_reports(self: &Arc<Daemon>, inbox: UnboundedReceiver<Report>) {
        let daemon = Arc::clone(self);
        tokio::spawn(async move { daemon.take_reports(inbox).await });
    }

    /// The control records, for a look or a change. A change takes about a millisecond; while etcd does not answer,
    /// the seconds until that is certain.
    fn records<T>(
        &self,
        action: impl FnOnce(&ControlStore) -> Result<T, control::RecordError>,
    ) -> ApiResult<T> {
        self.control_now(action).map_err(ApiError::from)
    }

    /// The same, with the records' own words for what went wrong.
    fn control_now<T>(
        &self,
        action: impl FnOnce(&ControlStore) -> Result<T, control::RecordError>,
    ) -> Result<T, control::RecordError> {
        tokio::task::block_in_place(|| action(&self.control))
    }

    fn home(&self, vdi: VdiId) -> &PlaneHandle {
        &self.planes[PlaneHandle::home_of(vdi, self.planes.len())]
    }

    fn store_settings(&self) -> StoreSettings {
        StoreSettings {
            cache_bytes: self.settings.cache.0,
            ..StoreSettings::default()
        }
    }

    fn index_directory(&self, disk: DiskId) -> PathBuf {
        self.settings.state.join("index").join(disk.to_string())
    }

    /// The socket of the REST API.
    pub fn socket(&self) -> PathBuf {
        self.settings.state.join("blockd.sock")
    }

    /// Figures of all planes.
    async fn figures(&self) -> ApiResult<Vec<PlaneFigures>> {
        let mut all = Vec::new();
        for plane in &self.planes {
            all.push(ask(plane, |reply| Command::Figures { reply }).await?);
        }
        Ok(all)
    }
}

/// Sends a command that is answered and waits for the answer.
async fn ask<T>(plane: &PlaneHandle, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> ApiResult<T> {
    let (reply, answer) = oneshot::channel();
    plane.send(command(reply));
    answer
        .await
        .map_err(|_| ApiError::unavailable("the daemon is stopping", "try again when it runs"))
}

fn make_private(state: &Path) -> Result<()> {
    if !state.exists() {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(state)
            .with_context(|| format!("cannot make the state directory {}", state.display()))?;
    }
    std::fs::set_permissions(state, std::fs::Permissions::from_mode(0o700))
        .with_context(|| format!("cannot make {} private (mode 0700)", state.display()))?;
    std::fs::create_dir_all(state.join("index")).context("cannot make the index directory")
}

fn lock_state(state: &Path) -> Result<File> {
    let path = state.join("lock");
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .with_context(|| format!("cannot open {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => {
            bail!(
                "another blockd runs on {}: stop it, or name another --state",
                state.display()
            )
        }
        Err(std::fs::TryLockError::Error(error)) => {
            Err(error).with_context(|| format!("cannot lock {}", path.display()))
        }
    }
}
