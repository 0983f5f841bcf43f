//! The daemon: a real blockd on real files, ended by its process id whatever happens, spoken to over REST.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::{PATIENCE, RETRY, rest};

/// Between two looks at something that takes its time.
const LOOK: Duration = Duration::from_millis(20);

pub struct Daemon {
    home: PathBuf,
    binary: PathBuf,
    child: Option<Child>,
    /// Counts its deaths; clients that cannot see one for themselves look here.
    pub lives: Arc<AtomicU64>,
}

impl Daemon {
    /// Starts `binary` with its state, disks and log below `home`.
    pub fn start(binary: &Path, home: &Path, arguments: &[&str]) -> Result<Daemon> {
        let mut daemon = Daemon {
            home: home.to_owned(),
            binary: binary.to_owned(),
            child: None,
            lives: Arc::default(),
        };
        daemon.spawn(arguments)?;
        daemon.wait_until_up()?;
        Ok(daemon)
    }

    /// Starts it and does not wait.
    pub fn spawn(&mut self, arguments: &[&str]) -> Result<()> {
        assert!(self.child.is_none(), "it runs");
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.path("blockd.log"))?;
        let child = Command::new("setpriv") // becomes the program: same process id
            .args(["--pdeathsig", "KILL", "--"])
            .arg(&self.binary)
            .arg("--state")
            .arg(self.path("state"))
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("cannot start {}", self.binary.display()))?;
        self.child = Some(child);
        Ok(())
    }

    /// Waits until REST answers.
    pub fn wait_until_up(&mut self) -> Result<()> {
        let start = Instant::now();
        loop {
            if self.call("GET", "/v1/version", None).is_ok() {
                return Ok(());
            }
            self.check()?;
            ensure!(
                start.elapsed() < PATIENCE,
                "no answer over REST in {PATIENCE:?}\n{}",
                self.last_words()
            );
            std::thread::sleep(RETRY);
        }
    }

    /// Fails if it ended by itself.
    pub fn check(&mut self) -> Result<()> {
        if let Some(child) = &mut self.child
            && let Some(status) = child.try_wait()?
        {
            bail!("blockd ended by itself ({status})\n{}", self.last_words());
        }
        Ok(())
    }

    /// SIGKILL.
    pub fn kill(&mut self) -> Result<()> {
        self.check()?;
        let mut child = self.child.take().context("it does not run")?;
        child.kill()?;
        child.wait()?;
        self.lives.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    /// SIGTERM; it must end well.
    pub fn stop(&mut self) -> Result<()> {
        self.check()?;
        let mut child = self.child.take().context("it does not run")?;
        let sent = Command::new("kill").arg(child.id().to_string()).status()?;
        ensure!(sent.success(), "kill: {sent}");
        let start = Instant::now();
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break status;
            }
            if start.elapsed() > PATIENCE {
                child.kill()?;
                child.wait()?;
                bail!("no end {PATIENCE:?} after SIGTERM\n{}", self.last_words());
            }
            std::thread::sleep(LOOK);
        };
        self.lives.fetch_add(1, Ordering::SeqCst);
        ensure!(
            status.success(),
            "blockd ended with {status}\n{}",
            self.last_words()
        );
        Ok(())
    }

    pub fn pid(&self) -> Result<u32> {
        self.child.as_ref().map(Child::id).context("it does not run")
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.home.join(name)
    }

    /// The end of its log.
    pub fn last_words(&self) -> String {
        let text = std::fs::read(self.path("blockd.log")).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(30)..].join("\n")
    }

    /// Any request; the status and the answer. An error means that nobody answered.
    pub fn call(&self, method: &str, path: &str, body: Option<&Value>) -> Result<(u16, Value)> {
        rest::call(&self.path("state/blockd.sock"), method, path, body)
    }

    /// A request that must succeed.
    pub fn ask(&self, method: &str, path: &str, body: &Value) -> Result<Value> {
        let (code, answer) = self
            .call(method, path, (!body.is_null()).then_some(body))
            .with_context(|| format!("{method} {path}"))?;
        ensure!(
            (200..300).contains(&code),
            "{method} {path} {body}: {code} {answer}"
        );
        Ok(answer)
    }

    pub fn get(&self, path: &str) -> Result<Value> {
        self.ask("GET", path, &Value::Null)
    }

    /// A pool with `disks` files of `bytes`.
    pub fn make_pool(&self, disks: usize, bytes: u64) -> Result<()> {
        self.ask("POST", "/v1/pool", &json!({"name": "soak"}))?;
        for number in 1..=disks {
            let path = self.path(&format!("disk{number}.img"));
            self.ask("POST", "/v1/disks", &json!({"path": path, "create_bytes": bytes}))?;
        }
        Ok(())
    }

    /// Opens a door for `vdi` on a socket below `home`.
    pub fn attach_vhost_user(&self, vdi: &str, queues: usize) -> Result<PathBuf> {
        let path = self.path(&format!("{vdi}.vhost"));
        let body = json!({"target": format!("vhost-user:{}", path.display()), "queues": queues});
        self.ask("POST", &format!("/v1/vdis/{vdi}/attach"), &body)?;
        Ok(path)
    }

    /// The same for NBD.
    pub fn attach_nbd(&self, vdi: &str) -> Result<PathBuf> {
        let path = self.path(&format!("{vdi}.nbd"));
        let body = json!({"target": format!("nbd:unix:{}", path.display())});
        self.ask("POST", &format!("/v1/vdis/{vdi}/attach"), &body)?;
        Ok(path)
    }

    /// Sum of a metric over all its labels.
    pub fn metric(&self, name: &str) -> Result<u64> {
        let answer = self.get("/metrics")?;
        let text = answer.as_str().context("metrics are text")?;
        ensure!(text.contains(name), "no metric {name}");
        Ok(text
            .lines()
            .filter(|line| line.starts_with(name))
            .filter_map(|line| line.rsplit_once(' ')?.1.parse::<u64>().ok())
            .sum())
    }

    /// Looks until something is so; fails if the daemon ends or patience does.
    pub fn until(&mut self, what: &str, mut is_so: impl FnMut(&mut Daemon) -> Result<bool>) -> Result<()> {
        let start = Instant::now();
        while !is_so(self).with_context(|| what.to_owned())? {
            self.check()?;
            ensure!(
                start.elapsed() < PATIENCE,
                "not within {PATIENCE:?}: {what}\n{}",
                self.last_words()
            );
            std::thread::sleep(LOOK);
        }
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
