//! One host: its daemon, started and hurt, and asked over REST as its users do.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::debian::PROCESSORS;
use crate::network::Network;
use crate::{PATIENCE, RETRY, rest};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    Stop,
    Continue,
}

/// What a life of a daemon has beside its settings.
#[derive(Clone, Debug, Default)]
pub struct Life {
    /// Programs around it, outermost first, each of which becomes the next.
    pub around: Vec<String>,
    pub environment: Vec<(String, String)>,
}

pub struct Host {
    pub number: usize,
    home: PathBuf,
    child: Option<Child>,
    is_stopped: bool,
    address: String,
    etcd: Vec<String>,
}

impl Host {
    /// It is not started yet.
    pub fn new(network: &Network, home: &Path, number: usize, etcd: &[String]) -> Result<Host> {
        let home = home.join(format!("h{number}"));
        std::fs::create_dir(&home)?;
        let host = Host {
            number,
            home,
            child: None,
            is_stopped: false,
            address: format!("{}:{}", network.address(number), network.port(7700)),
            etcd: etcd.to_vec(),
        };
        host.set_name(&host.name())?;
        Ok(host)
    }

    /// As it is called unless somebody renames it.
    pub fn name(&self) -> String {
        format!("host{}", self.number)
    }

    /// In its settings, for lives to come.
    pub fn set_name(&self, name: &str) -> Result<()> {
        let etcd: Vec<String> = self.etcd.iter().map(|url| format!("'{url}'")).collect();
        let text = format!(
            "cache = '16MiB'\nbuffers = '16MiB'\n[cluster]\nhost = '{name}'\nlisten = '{}'\netcd = [{}]\nlease_s = 3\n",
            self.address,
            etcd.join(", ")
        );
        Ok(std::fs::write(self.path("blockd.toml"), text)?)
    }

    pub fn start(&mut self, network: &Network) -> Result<()> {
        self.start_as(network, &Life::default())
    }

    /// Starts it and waits until it answers.
    pub fn start_as(&mut self, network: &Network, life: &Life) -> Result<()> {
        assert!(self.child.is_none(), "it runs");
        let log = log_file(&self.path("blockd.log"))?;
        let blockd = env!("CARGO_BIN_EXE_blockd").to_owned();
        let mut words = life.around.iter().chain([&blockd]);
        let child = network
            .command(self.number, words.next().expect("a program"))
            .args(words)
            .arg("--state")
            .arg(self.path("state"))
            .arg("--config")
            .arg(self.path("blockd.toml"))
            .envs(life.environment.iter().cloned())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("blockd")?;
        self.child = Some(child);
        self.is_stopped = false;
        let start = Instant::now();
        while self.call("GET", "/v1/version", None).is_err() {
            self.check()?;
            ensure!(
                start.elapsed() < PATIENCE,
                "host {}: no answer over REST in {PATIENCE:?}",
                self.number
            );
            std::thread::sleep(RETRY);
        }
        Ok(())
    }

    /// Fails if the daemon ended by itself.
    pub fn check(&mut self) -> Result<()> {
        if let Some(child) = &mut self.child
            && let Some(status) = child.try_wait()?
        {
            self.child = None;
            bail!("the daemon of host {} ended by itself ({status})", self.number);
        }
        Ok(())
    }

    /// SIGKILL.
    pub fn kill(&mut self) -> Result<()> {
        self.check()?;
        let mut child = self.child.take().context("it does not run")?;
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    /// SIGTERM; it must end well.
    pub fn stop(&mut self) -> Result<()> {
        self.check()?;
        let mut child = self.child.take().context("it does not run")?;
        send(child.id(), "TERM")?;
        let status = child.wait()?;
        ensure!(
            status.success(),
            "the daemon of host {} ended with {status}",
            self.number
        );
        Ok(())
    }

    pub fn signal(&mut self, what: Signal) -> Result<()> {
        self.check()?;
        self.is_stopped = what == Signal::Stop;
        signal(self.child.as_ref().context("it does not run")?.id(), what)
    }

    /// It runs, and is not stopped.
    pub fn is_up(&self) -> bool {
        self.child.is_some() && !self.is_stopped
    }

    pub fn is_stopped(&self) -> bool {
        self.child.is_some() && self.is_stopped
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.home.join(name)
    }

    pub fn disk_path(&self) -> PathBuf {
        self.path("disk.img")
    }

    pub fn log(&self) -> String {
        let text = std::fs::read(self.path("blockd.log")).unwrap_or_default();
        String::from_utf8_lossy(&text).into_owned()
    }

    /// The end of its log.
    pub fn last_words(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(25)..].join("\n")
    }

    /// Any request; the status and the answer. An error means that nobody answered.
    pub fn call(&self, method: &str, path: &str, body: Option<&Value>) -> Result<(u16, Value)> {
        rest::call(&self.path("state/blockd.sock"), method, path, body)
    }

    /// A request that must succeed.
    pub fn ask(&self, method: &str, path: &str, body: &Value) -> Result<Value> {
        let (code, answer) = self
            .call(method, path, (!body.is_null()).then_some(body))
            .with_context(|| format!("host {}: {method} {path}", self.number))?;
        ensure!(
            (200..300).contains(&code),
            "host {}: {method} {path} {body}: {code} {answer}",
            self.number
        );
        Ok(answer)
    }

    pub fn get(&self, path: &str) -> Result<Value> {
        self.ask("GET", path, &Value::Null)
    }

    /// Where a guest of the VDI connects on this host.
    pub fn door(&self, vdi: &str) -> PathBuf {
        self.path(&format!("{vdi}.nbd"))
    }

    /// Where a guest in QEMU does.
    pub fn vhost_door(&self, vdi: &str) -> PathBuf {
        self.path(&format!("{vdi}.vhost"))
    }

    /// Attaches the VDI here; the status and the answer.
    pub fn attach(&self, vdi: &str) -> Result<(u16, Value)> {
        let target = format!("nbd:unix:{}", self.door(vdi).display());
        self.attach_to(vdi, &json!({"target": target}))
    }

    /// The same for the guest in QEMU.
    pub fn attach_vhost(&self, vdi: &str) -> Result<(u16, Value)> {
        let target = format!("vhost-user:{}", self.vhost_door(vdi).display());
        self.attach_to(vdi, &json!({"target": target, "queues": PROCESSORS}))
    }

    fn attach_to(&self, vdi: &str, body: &Value) -> Result<(u16, Value)> {
        self.call("POST", &format!("/v1/vdis/{vdi}/attach"), Some(body))
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

pub fn log_file(path: &Path) -> Result<File> {
    File::options()
        .create(true)
        .append(true)
        .open(path)
        .with_context(|| path.display().to_string())
}

fn send(pid: u32, name: &str) -> Result<()> {
    let sent = std::process::Command::new("kill")
        .args([&format!("-{name}"), &pid.to_string()])
        .status()?;
    ensure!(sent.success(), "kill -{name} {pid}: {sent}");
    Ok(())
}

pub fn signal(pid: u32, what: Signal) -> Result<()> {
    match what {
        Signal::Continue => send(pid, "CONT"),
        Signal::Stop => {
            send(pid, "STOP")?;
            // It stops one thread after the other; the last may still answer.
            while !all_threads_stopped(pid)? {
                std::thread::sleep(RETRY);
            }
            Ok(())
        }
    }
}

fn all_threads_stopped(pid: u32) -> Result<bool> {
    for thread in std::fs::read_dir(format!("/proc/{pid}/task"))?.flatten() {
        let stat = std::fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
        // The name, in brackets, may hold anything; the state comes after it.
        if stat
            .rsplit_once(") ")
            .is_some_and(|(_, rest)| !rest.starts_with('T'))
        {
            return Ok(false);
        }
    }
    Ok(true)
}
