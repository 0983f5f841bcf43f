//! The links of this host, kept as the records say: every other host is a peer, every disk of another host is reached
//! by the link to it.
//!
//! ```text
//!  pool is known ─▶ Links ─▶ listen
//!  host/ID  ─▶ set_peer, forget_peer ─▶ a link from each data-plane thread to each host, made again when it ends
//!  disk/ID  ─▶ Home::Host(its host)  ─▶ planes: where messages for the disk go, and that it is far
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use control::{ApiError, ApiResult, ControlStore, DiskRecord, PoolRecord, Severity};
use edge::file::OsFile;
use tokio::net::TcpListener;
use types::{DiskId, HostId};
use wire::Identity;

use super::Daemon;
use super::cluster::Membership;
use crate::cluster_config::ClusterSettings;
use crate::links::Links;
use crate::links::tls::Tls;
use crate::plane::{Command, Home};

/// Nothing heard for so long ends a link: a VDI with two replicas waits that long when a host stops without a word,
/// one with three does not wait.
const SILENCE: Duration = Duration::from_secs(3);

/// The other hosts as the data planes were told of them.
#[derive(Default)]
pub(super) struct Peers {
    /// Waits for the pool: who calls must be of it.
    listener: Option<TcpListener>,
    tls: Option<Arc<Tls>>,
    links: Option<Arc<Links>>,
    hosts: BTreeSet<HostId>,
    homes: BTreeMap<DiskId, HostId>,
}

impl Peers {
    /// The address must be free, and certificates good, at the start, not only when somebody calls.
    pub async fn bind(cluster: &ClusterSettings) -> Result<Peers> {
        let tls = cluster
            .tls
            .as_ref()
            .map(|files| Tls::new(files, cluster.host.as_str()));
        let tls = tls.transpose()?.map(Arc::new);
        let listener = TcpListener::bind(cluster.listen)
            .await
            .with_context(|| format!("setting 'cluster.listen': {}", cluster.listen))?;
        Ok(Peers {
            listener: Some(listener),
            tls,
            ..Peers::default()
        })
    }
}

impl Daemon {
    /// The certificates as the settings have them now: links that are made from now on are made with them.
    ///
    /// # Errors
    /// A file that makes no TLS, and TLS that was set, or is not set any more, since the start.
    pub fn renew_certificates(&self, cluster: Option<&ClusterSettings>) -> Result<()> {
        let Some(membership) = &self.membership else {
            return Ok(());
        };
        let mut peers = membership.peers.lock().expect("peers");
        let files = cluster.and_then(|cluster| cluster.tls.as_ref());
        match (&peers.tls, files) {
            (None, None) => Ok(()),
            (Some(_), Some(files)) => {
                // The name that the records have; another in the settings needs a restart.
                let tls = Arc::new(Tls::new(files, &membership.host.name)?);
                if let Some(links) = &peers.links {
                    links.renew_tls(Arc::clone(&tls));
                }
                peers.tls = Some(tls);
                Ok(())
            }
            (Some(_), None) => bail!("TLS between hosts goes on: to turn it off, restart all hosts"),
            (None, Some(_)) => bail!("no TLS between hosts yet: to turn it on, restart all hosts"),
        }
    }

    /// Why another host is not reached from here; nobody asks before there are links.
    pub(super) fn unreached(&self, host: HostId) -> Option<String> {
        let peers = self.membership.as_ref()?.peers.lock().expect("peers");
        peers.links.as_ref()?.unreached(host)
    }

    /// Follows the records of hosts and disks. What was true stays when they cannot be read.
    pub(super) async fn look_at_peers(&self) -> ApiResult<()> {
        let Some(membership) = &self.membership else {
            return Ok(());
        };
        let disks = self.records(ControlStore::disks)?;
        self.let_go_of_disks_elsewhere(&disks).await?;
        self.link_hosts(membership)?;
        self.find_homes(membership, &disks);
        Ok(())
    }

    fn link_hosts(&self, membership: &Membership) -> ApiResult<()> {
        let Some(pool) = self.records(ControlStore::pool)? else {
            return Ok(());
        };
        let mut peers = membership.peers.lock().expect("peers");
        let links = match &peers.links {
            Some(links) => Arc::clone(links),
            None => {
                let me = Identity {
                    pool: pool.id,
                    host: membership.host.id,
                    incarnation: self.incarnation,
                    name: membership.host.name.clone(),
                };
                let tls = peers.tls.clone();
                let links = Links::new(me, self.planes.clone(), SILENCE, tls, self.reports.clone());
                peers.links = Some(Arc::clone(&links));
                links
            }
        };
        let hosts = self.records(ControlStore::hosts)?;
        for host in hosts.iter().filter(|host| host.id != membership.host.id) {
            links.set_peer(host.id, &host.name, Some(&host.address));
        }
        // Those who call already, because they saw that this host lives, are known now. It listens as long as the
        // process lives.
        if let Some(listener) = peers.listener.take() {
            let _ = links.listen(listener);
        }
        let now: BTreeSet<HostId> = hosts.iter().map(|host| host.id).collect();
        for gone in peers.hosts.difference(&now) {
            links.forget_peer(*gone);
        }
        peers.hosts = now;
        Ok(())
    }

    fn find_homes(&self, membership: &Membership, disks: &[DiskRecord]) {
        let mut peers = membership.peers.lock().expect("peers");
        for disk in disks {
            let elsewhere = disk.host.filter(|host| *host != membership.host.id);
            let Some(host) = elsewhere else {
                // Its plane is said when it is served.
                peers.homes.remove(&disk.id);
                continue;
            };
            if peers.homes.insert(disk.id, host) == Some(host) {
                continue;
            }
            for plane in &self.planes {
                let home = Home::Host(host);
                plane.send(Command::Home { disk: disk.id, home });
            }
        }
    }

    /// A disk that was given to another host is no longer served here: two logs cannot be written on one disk.
    async fn let_go_of_disks_elsewhere(&self, disks: &[DiskRecord]) -> ApiResult<()> {
        for disk in disks {
            if self.is_mine(disk) || !self.is_up(disk.id) {
                continue;
            }
            let host = match disk.host {
                Some(host) => self.host_name(host)?,
                None => "another pool".to_owned(),
            };
            let message = format!(
                "disk {} ({}) was given to host {host}: it is not served here any more",
                disk.id,
                disk.path.display()
            );
            self.events.add(Severity::Critical, message.clone());
            self.stop_serving(disk.id, message).await?;
        }
        Ok(())
    }

    /// A disk that two hosts can reach (or a copy of it) is served by one of them. Looked at past its lock, which other
    /// machines do not see and which would only say that somebody has it.
    pub(super) fn refuse_served_elsewhere(&self, pool: &PoolRecord, path: &Path) -> ApiResult<()> {
        let Some(superblock) = OsFile::look(path)
            .ok()
            .and_then(|file| store::read_superblock(&file).ok())
        else {
            return Ok(());
        };
        let disk = superblock.disk;
        let record = self.records(|control| control.disk(disk))?;
        let host = record
            .and_then(|record| record.host)
            .filter(|host| Some(*host) != self.host());
        let Some(host) = host.filter(|_| superblock.pool == pool.id) else {
            return Ok(());
        };
        let alive = self.records(|control| control.alive_now(host))?;
        let Some(alive) = alive.filter(|alive| alive.disks.iter().any(|served| served.disk == disk)) else {
            return Ok(());
        };
        let left_s = self.records(|control| control.left_s(alive.lease))?;
        let name = self.host_name(host)?;
        let message = format!(
            "{} is disk {disk}, which host {name} serves; if that host does not live, it is known in at most {left_s} s",
            path.display()
        );
        let hint =
            format!("take it out of host {name} (or stop its daemon) first, or `weft disk remove` it there");
        Err(ApiError::conflict(message, hint))
    }
}
