//! Hosts of one pool on this machine: a `blockd` each, an etcd, and loopback addresses between them.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::client::LoadClient;
use crate::prepare::fully_written_file;
use crate::process::{Daemon, require_programs};
use crate::weft::{Metrics, Place, Weft, get};

/// Longest wait for something that hosts have to find out from each other.
const PATIENCE: Duration = Duration::from_secs(120);

/// Between two looks at what the hosts know.
const LOOK: Duration = Duration::from_millis(10);

/// The hosts h1, h2, ... of a pool; h1 is the one that guests are attached at.
pub struct Cluster {
    hosts: Vec<Weft>,
    rests: Vec<PathBuf>,
    // After the hosts, which would complain.
    etcd: Daemon,
}

/// Ports that were free a moment ago. They are held together until all are chosen.
fn free_addresses(count: usize) -> Result<Vec<SocketAddr>> {
    let held: Vec<TcpListener> = (0..count)
        .map(|_| TcpListener::bind("127.0.0.1:0"))
        .collect::<Result<_, _>>()
        .context("a port on 127.0.0.1")?;
    let addresses: Result<_, _> = held.iter().map(TcpListener::local_addr).collect();
    addresses.context("a port on 127.0.0.1")
}

fn start_etcd(folder: &Path, client: SocketAddr, peer: SocketAddr) -> Result<Daemon> {
    require_programs(&["etcd"], "etcd-server")?;
    let arguments = [
        "--name=m1".to_owned(),
        format!("--data-dir={}", folder.join("etcd").display()),
        format!("--listen-client-urls=http://{client}"),
        format!("--advertise-client-urls=http://{client}"),
        format!("--listen-peer-urls=http://{peer}"),
        format!("--initial-advertise-peer-urls=http://{peer}"),
        format!("--initial-cluster=m1=http://{peer}"),
        "--initial-cluster-state=new".to_owned(),
    ];
    let log = folder.join("etcd.log");
    let mut etcd = Daemon::start("etcd", Path::new("etcd"), &arguments, &log)?;
    etcd.wait_for(|| Ok(TcpStream::connect(client)?))?;
    Ok(etcd)
}

/// The core of host `index`. Left alone every daemon's data plane would be on the first core, waiting for the others; real
/// hosts have cores of their own. The first host, where the guest is, shares its core with nobody.
fn core_of(index: usize) -> Option<usize> {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    match (cores, index) {
        (1, _) => None,
        (_, 0) => Some(0),
        (cores, index) => Some(1 + (index - 1) % (cores - 1)),
    }
}

impl Cluster {
    /// Starts `count` hosts with a pool and no disks.
    pub fn start(place: &Place, count: usize) -> Result<Cluster> {
        let addresses = free_addresses(count + 2)?;
        let [client, peer] = [addresses[count], addresses[count + 1]];
        let etcd = start_etcd(&place.sockets, client, peer)?;
        let mut hosts = Vec::new();
        for (number, address) in (1..).zip(&addresses[..count]) {
            let name = format!("h{number}");
            let config = format!(
                "[cluster]\nhost = \"{name}\"\nlisten = \"{address}\"\netcd = [\"http://{client}\"]\n"
            );
            hosts.push(Weft::start_on(place, &name, Some(&config), core_of(number - 1))?);
        }
        hosts[0].weft(&["pool", "create", "study"])?;
        let rests = hosts.iter().map(|host| host.rest().to_owned()).collect();
        Ok(Cluster { hosts, rests, etcd })
    }

    /// Gives host `index` a disk of `bytes`, written to its last byte, and waits until the first host sees it.
    pub fn add_disk(&mut self, place: &Place, index: usize, bytes: u64) -> Result<()> {
        let disk = place.files.join(format!("h{}.img", index + 1));
        eprintln!("h{}: writing a disk of {}", index + 1, types::ByteSize(bytes));
        fully_written_file(&disk, bytes, index as u64)?;
        let path = disk.display().to_string();
        self.hosts[index].weft(&["disk", "add", &path])?;
        self.until("the disk is in use", |first| {
            let disks = first.json("/v1/disks")?;
            let mut all = disks.as_array().into_iter().flatten();
            Ok(all.any(|disk| disk["path"] == path.as_str() && disk["state"] == "active"))
        })
    }

    /// Makes a VDI with a door at the first host, and connects to it.
    pub fn make_vdi(&mut self, name: &str, bytes: u64, replicas: u8) -> Result<LoadClient> {
        self.hosts[0].make_vdi(name, bytes, replicas)
    }

    /// Host `index`.
    pub fn host(&mut self, index: usize) -> &mut Weft {
        &mut self.hosts[index]
    }

    /// The processes: all hosts, and etcd.
    #[must_use]
    pub fn pids(&self) -> Vec<u32> {
        let hosts = self.hosts.iter().map(Weft::pid);
        hosts.chain([self.etcd.pid()]).collect()
    }

    /// Kills host `index`.
    pub fn kill(&mut self, index: usize) {
        self.hosts[index].kill();
    }

    /// Starts host `index` again; does not wait for anything.
    pub fn start_again(&mut self, index: usize) -> Result<()> {
        self.hosts[index].start_again(&[])
    }

    /// The hosts on which a VDI has replicas.
    pub fn holders(&self, vdi: &str) -> Result<Vec<String>> {
        let disks = self.json("/v1/disks")?;
        let shown = self.json(&format!("/v1/vdis/{vdi}"))?;
        let mut holders = Vec::new();
        for of_vdi in shown["disks"].as_array().into_iter().flatten() {
            let mut all = disks.as_array().into_iter().flatten();
            let found = all.find(|disk| disk["id"] == of_vdi["disk"]);
            let host = found
                .and_then(|disk| disk["host"].as_str())
                .context("a disk of no host")?;
            holders.push(host.to_owned());
        }
        holders.sort();
        Ok(holders)
    }

    /// Whether all replicas of a VDI have all that was written.
    pub fn is_whole(&self, vdi: &str) -> Result<bool> {
        Ok(self.json(&format!("/v1/vdis/{vdi}"))?["health"] == "whole")
    }

    /// Waits until [`Cluster::is_whole`] says so.
    pub fn until_whole(&mut self, vdi: &str, whole: bool) -> Result<()> {
        let what = if whole {
            "every replica is in sync"
        } else {
            "a replica is missed"
        };
        self.until(what, |cluster| Ok(cluster.is_whole(vdi)? == whole))
    }

    /// What the first host counts.
    pub fn metrics(&self) -> Result<Metrics> {
        crate::weft::metrics(&self.rests[0])
    }

    /// Bytes that went both ways between the first host's writers and host `index`, since their links were made.
    pub fn link_bytes(&self, index: usize) -> Result<f64> {
        let name = format!("h{}", index + 1);
        let hosts = self.json("/v1/hosts")?;
        let host = hosts
            .as_array()
            .into_iter()
            .flatten()
            .find(|host| host["name"] == name.as_str());
        let id = host
            .and_then(|host| host["id"].as_str())
            .with_context(|| format!("no host {name}"))?;
        let host = format!("host=\"{id}\"");
        let metrics = self.metrics()?;
        let families = ["weft_link_sent_bytes_total", "weft_link_received_bytes_total"];
        let bytes = families.map(|family| metrics.sum(family, &[&host, "of=\"writers\""]));
        ensure!(bytes[0] > 0.0, "h1 has no link to {name}");
        Ok(bytes.iter().sum())
    }

    /// An answer of the first host.
    fn json(&self, path: &str) -> Result<Value> {
        let text = get(&self.rests[0], path)?;
        serde_json::from_str(&text).with_context(|| format!("GET {path}: {text}"))
    }

    /// Looks until it is so; fails when a daemon's answer fails or patience ends.
    fn until(&mut self, what: &str, mut is_so: impl FnMut(&Cluster) -> Result<bool>) -> Result<()> {
        let begin = Instant::now();
        while !is_so(self).with_context(|| self.last_words())? {
            if begin.elapsed() > PATIENCE {
                bail!("not within {PATIENCE:?}: {what}\n{}", self.last_words());
            }
            std::thread::sleep(LOOK);
        }
        Ok(())
    }

    /// The end of each host's log.
    #[must_use]
    pub fn last_words(&self) -> String {
        let words = |(number, host): (usize, &Weft)| format!("h{}:\n{}\n", number + 1, host.last_words());
        self.hosts.iter().enumerate().map(words).collect()
    }
}
