//! etcd: a member on each host.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::host::{Signal, log_file, signal};
use crate::network::{HOSTS, Network};

pub struct Member {
    child: Option<Child>,
    is_stopped: bool,
    host: usize,
    pub client_url: String,
    arguments: Vec<String>,
    data: PathBuf,
    log: PathBuf,
}

/// Three members; they are not started yet.
pub fn members(network: &Network, home: &Path) -> Vec<Member> {
    let url = |host: usize, port: u16| format!("http://{}:{}", network.address(host), network.port(port));
    let clients: Vec<String> = (0..HOSTS).map(|host| url(host, 2379)).collect();
    let peers: Vec<String> = (0..HOSTS).map(|host| url(host, 2380)).collect();
    let all: Vec<String> = (0..HOSTS)
        .map(|host| format!("m{host}={}", peers[host]))
        .collect();
    (0..HOSTS)
        .map(|host| {
            let data = home.join(format!("etcd{host}"));
            Member {
                child: None,
                is_stopped: false,
                host,
                client_url: clients[host].clone(),
                arguments: vec![
                    format!("--name=m{host}"),
                    format!("--data-dir={}", data.display()),
                    format!("--listen-client-urls={}", clients[host]),
                    format!("--advertise-client-urls={}", clients[host]),
                    format!("--listen-peer-urls={}", peers[host]),
                    format!("--initial-advertise-peer-urls={}", peers[host]),
                    format!("--initial-cluster={}", all.join(",")),
                    "--initial-cluster-state=new".to_owned(),
                    // Generous: a slow machine is no dead member.
                    "--heartbeat-interval=100".to_owned(),
                    "--election-timeout=1000".to_owned(),
                    // A member that hears nobody does not disturb the others when it is heard by them.
                    "--pre-vote=true".to_owned(),
                ],
                log: home.join(format!("etcd{host}.log")),
                data,
            }
        })
        .collect()
}

impl Member {
    pub fn start(&mut self, network: &Network) -> Result<()> {
        assert!(self.child.is_none(), "it runs");
        let log = log_file(&self.log)?;
        let child = network
            .command(self.host, "etcd")
            .args(&self.arguments)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("etcd (Debian package etcd-server)")?;
        self.child = Some(child);
        Ok(())
    }

    /// SIGKILL.
    pub fn kill(&mut self) -> Result<()> {
        let mut child = self.child.take().context("it runs")?;
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    pub fn signal(&mut self, what: Signal) -> Result<()> {
        self.is_stopped = what == Signal::Stop;
        signal(self.child.as_ref().context("it runs")?.id(), what)
    }

    /// Its data is gone.
    pub fn wipe(&self) -> Result<()> {
        assert!(self.child.is_none(), "first the process, then its data");
        std::fs::remove_dir_all(&self.data).context("its data")
    }

    pub fn is_up(&self) -> bool {
        self.child.is_some() && !self.is_stopped
    }

    pub fn is_leader(&self) -> bool {
        self.is_up()
            && curl(&[&format!("{}/metrics", self.client_url)])
                .lines()
                .any(|line| line == "etcd_server_is_leader 1")
    }

    /// etcd's own JSON interface.
    pub fn ask(&self, what: &str, body: &serde_json::Value) -> Result<serde_json::Value> {
        let url = format!("{}/v3/kv/{what}", self.client_url);
        let answer = curl(&["--data", &body.to_string(), &url]);
        let value: serde_json::Value =
            serde_json::from_str(&answer).with_context(|| format!("etcd's answer to {what}: {answer:?}"))?;
        ensure!(value.get("error").is_none(), "etcd's answer to {what}: {value}");
        Ok(value)
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        if self.child.is_some() {
            let _ = self.kill();
        }
    }
}

fn curl(arguments: &[&str]) -> String {
    let output = Command::new("curl")
        .args(["--silent", "--max-time", "10"])
        .args(arguments)
        .output()
        .expect("curl (Debian package curl)");
    String::from_utf8_lossy(&output.stdout).into_owned()
}
