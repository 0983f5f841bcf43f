//! The demo's hosts: each has a daemon, a state directory, a disk, and a member of etcd. `weft` is spoken to any of them.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::etcd;
use super::network::{HOSTS, Network};
use super::process::Process;
use super::until;
use crate::run::root;

/// Seconds after which a host that is not heard is dead: the daemon's own default.
pub const LEASE_S: u32 = 10;

/// All hosts, numbered from 1, and the network between them.
pub struct Hosts {
    list: Vec<Host>,
    /// Last: namespaces go when nothing runs in them any more.
    pub network: Network,
}

struct Host {
    home: PathBuf,
    blockd: Option<Process>,
    etcd: Option<Process>,
}

/// A release binary of ours.
pub fn binary(name: &str) -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    target.join("release").join(name)
}

impl Hosts {
    /// Starts etcd and a daemon on every host, everything they keep below `home`.
    pub fn start(network: Network, home: &Path) -> Result<Hosts> {
        let list = (1..=HOSTS)
            .map(|number| Host {
                home: home.join(format!("host{number}")),
                blockd: None,
                etcd: None,
            })
            .collect();
        let mut hosts = Hosts { list, network };
        for host in 1..=HOSTS {
            std::fs::create_dir_all(hosts.home(host))?;
            hosts.configure(host)?;
            hosts.start_etcd(host)?;
        }
        for host in 1..=HOSTS {
            hosts.start_blockd(host)?;
        }
        Ok(hosts)
    }

    /// Where a host keeps everything.
    pub fn home(&self, host: usize) -> &Path {
        &self.list[host - 1].home
    }

    /// The image file that is a host's disk.
    pub fn disk(&self, host: usize) -> PathBuf {
        self.home(host).join("disk.img")
    }

    /// The REST socket of a host's daemon.
    pub fn socket(&self, host: usize) -> PathBuf {
        self.home(host).join("state/blockd.sock")
    }

    fn configure(&self, host: usize) -> Result<()> {
        let etcd: Vec<String> = (1..=HOSTS)
            .map(|host| format!("\"{}\"", etcd::client_url(&self.network, host)))
            .collect();
        let text = format!(
            "state = \"{}\"\n\n[cluster]\nhost = \"host{host}\"\nlisten = \"{}:7700\"\nlease_s = {LEASE_S}\netcd = [{}]\n",
            self.home(host).join("state").display(),
            self.network.address(host),
            etcd.join(", "),
        );
        std::fs::write(self.home(host).join("blockd.toml"), text).context("a host's settings")
    }

    /// Starts a host's member of etcd.
    pub fn start_etcd(&mut self, host: usize) -> Result<()> {
        let member = etcd::start(&self.network, host, self.home(host))?;
        let before = self.list[host - 1].etcd.replace(member);
        assert!(before.is_none(), "etcd runs already");
        Ok(())
    }

    /// Starts a host's daemon; returns when it answers.
    pub fn start_blockd(&mut self, host: usize) -> Result<()> {
        let home = self.home(host);
        let log = home.join("blockd.log");
        let mut command = self
            .network
            .command(host, &binary("blockd").display().to_string());
        command.arg("--config").arg(home.join("blockd.toml"));
        let name = format!("blockd on host {host}");
        let blockd = Process::start_logged(&name, &mut command, &log)?;
        let socket = self.socket(host);
        until(&format!("{name} answers"), || {
            if let Some(status) = blockd.ended()? {
                bail!("it ended ({status}); see {}", log.display());
            }
            Ok(UnixStream::connect(&socket).ok())
        })?;
        let before = self.list[host - 1].blockd.replace(blockd);
        assert!(before.is_none(), "blockd runs already");
        Ok(())
    }

    /// SIGKILL to a host's daemon.
    pub fn kill_blockd(&mut self, host: usize) -> Result<()> {
        self.list[host - 1].blockd.take().expect("blockd runs").kill()
    }

    /// SIGKILL to a host's member of etcd.
    pub fn kill_etcd(&mut self, host: usize) -> Result<()> {
        self.list[host - 1].etcd.take().expect("etcd runs").kill()
    }

    /// The host dies as by a power cut: its cable first, so that no connection is closed, then whatever runs on it.
    pub fn power_off(&mut self, host: usize) -> Result<()> {
        self.network.unplug(host)?;
        self.kill_blockd(host)?;
        self.kill_etcd(host)
    }

    /// It comes back with the disk that it had.
    pub fn power_on(&mut self, host: usize) -> Result<()> {
        self.network.plug(host)?;
        self.start_etcd(host)?;
        self.start_blockd(host)
    }

    /// Cuts the link between two hosts. Loopback has none: there, the other host's daemon is stopped (SIGSTOP) instead.
    pub fn cut(&self, one: usize, other: usize) -> Result<()> {
        self.network.cut(one, other)?;
        self.stop_instead(other, "STOP")
    }

    /// Mends it.
    pub fn mend(&self, one: usize, other: usize) -> Result<()> {
        self.network.mend(one, other)?;
        self.stop_instead(other, "CONT")
    }

    fn stop_instead(&self, host: usize, signal: &str) -> Result<()> {
        match &self.list[host - 1].blockd {
            Some(blockd) if !self.network.has_cables() => blockd.signal(signal),
            _ => Ok(()),
        }
    }

    /// The host whose member leads etcd, if there is one.
    pub fn etcd_leader(&self) -> Option<usize> {
        (1..=HOSTS).find(|&host| self.list[host - 1].etcd.is_some() && etcd::leads(&self.network, host))
    }

    /// Whether a host's member of etcd serves.
    pub fn etcd_serves(&self, host: usize) -> bool {
        self.list[host - 1].etcd.is_some() && etcd::is_healthy(&self.network, host)
    }

    /// Runs `weft` for a host's daemon, shown to whoever watches the demo, and returns what it printed.
    pub fn weft(&self, host: usize, arguments: &[&str]) -> Result<String> {
        self.show(host, arguments);
        self.ask(host, arguments)
    }

    /// Shows a command of `weft` that is given on a host, with paths as they are seen from the demo's folder.
    pub fn show(&self, host: usize, arguments: &[&str]) {
        let folder = self
            .home(host)
            .parent()
            .expect("a host's folder is in the demo's");
        let text = arguments.join(" ").replace(&format!("{}/", folder.display()), "");
        println!("          host{host}$ weft {text}");
    }

    /// The same, not shown: for what is asked again and again.
    pub fn ask(&self, host: usize, arguments: &[&str]) -> Result<String> {
        let output = self.try_weft(host, arguments)?;
        if !output.status.success() {
            bail!(
                "`weft {}` on host {host} failed ({}): {}",
                arguments.join(" "),
                output.status,
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// The same, whatever comes of it.
    pub fn try_weft(&self, host: usize, arguments: &[&str]) -> Result<Output> {
        Command::new("timeout")
            .arg("180")
            .arg(binary("weft"))
            .arg("--socket")
            .arg(self.socket(host))
            .args(arguments)
            .output()
            .context("cannot start weft")
    }

    /// The same for an answer in JSON.
    pub fn json(&self, host: usize, arguments: &[&str]) -> Result<Value> {
        let text = self.ask(host, &[arguments, &["--json"]].concat())?;
        serde_json::from_str(&text)
            .with_context(|| format!("what `weft {} --json` printed", arguments.join(" ")))
    }

    /// A counter of a host's daemon, summed over its labels.
    pub fn metric(&self, host: usize, name: &str) -> Result<u64> {
        let mut command = Command::new("curl");
        command.args(["--silent", "--fail", "--max-time", "60", "--unix-socket"]);
        let text = crate::run::output(command.arg(self.socket(host)).arg("http://weft/metrics"))?;
        let samples = text.lines().filter_map(|line| {
            let rest = line.strip_prefix(name)?;
            let value = match rest.strip_prefix('{') {
                Some(labels) => labels.rsplit_once("} ")?.1,
                None => rest.strip_prefix(' ')?,
            };
            value.parse::<u64>().ok()
        });
        Ok(samples.sum())
    }

    /// Opens an NBD door of a host and returns its URI.
    pub fn attach_nbd(&self, host: usize, vdi: &str) -> Result<String> {
        let path = self.home(host).join(format!("{vdi}.nbd"));
        self.weft(
            host,
            &["vdi", "attach", vdi, "--nbd", &format!("unix:{}", path.display())],
        )?;
        Ok(format!("nbd+unix:///{vdi}?socket={}", path.display()))
    }

    /// Opens a door for QEMU on a host and returns its socket.
    pub fn attach_vhost_user(&self, host: usize, vdi: &str) -> Result<PathBuf> {
        let path = self.vhost_user(host, vdi);
        self.weft(
            host,
            &["vdi", "attach", vdi, "--vhost-user", &path.display().to_string()],
        )?;
        Ok(path)
    }

    /// Where the door for QEMU is.
    pub fn vhost_user(&self, host: usize, vdi: &str) -> PathBuf {
        self.home(host).join(format!("{vdi}.vhost"))
    }

    /// How many hosts have all of a VDI as it is now.
    pub fn in_sync(&self, host: usize, vdi: &str) -> Result<usize> {
        let shown = self.json(host, &["vdi", "show", vdi])?;
        let disks = shown["disks"].as_array().context("a VDI's disks")?;
        let is_current =
            |disk: &&Value| disk["in_sync"] == disk["replicas"] && disk["in_sync"] == shown["shards"];
        Ok(disks.iter().filter(is_current).count())
    }

    /// How many hosts a daemon knows to be alive.
    pub fn alive(&self, host: usize) -> Result<usize> {
        let list = self.json(host, &["host", "list"])?;
        let list = list.as_array().context("a list of hosts")?;
        Ok(list.iter().filter(|host| host["is_alive"] == true).count())
    }

    /// SIGTERM to every daemon, which must end well. That of `writer` first: without a majority of its replicas it would
    /// wait for them to come back, in vain.
    pub fn stop(mut self, writer: usize) -> Result<()> {
        let others = (1..=HOSTS).filter(|host| *host != writer);
        for host in std::iter::once(writer).chain(others) {
            self.list[host - 1].blockd.take().expect("blockd runs").stop()?;
        }
        Ok(())
    }
}
