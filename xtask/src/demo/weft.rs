//! The daemon of the demo, and `weft` spoken to it.

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Instant;

use anyhow::{Context, Result, bail};

use super::PATIENCE;
use crate::run::{output, root};

/// A running blockd.
pub struct Weft {
    daemon: Option<Child>,
    home: PathBuf,
}

/// A release binary of ours.
pub fn binary(name: &str) -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    target.join("release").join(name)
}

impl Weft {
    /// Starts blockd with its state below `home`.
    pub fn start(home: &Path) -> Result<Weft> {
        let mut weft = Weft {
            daemon: None,
            home: home.to_owned(),
        };
        weft.start_again()?;
        Ok(weft)
    }

    /// Starts it again after [`kill`](Weft::kill); returns when its REST socket answers.
    pub fn start_again(&mut self) -> Result<()> {
        assert!(self.daemon.is_none(), "blockd runs already");
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.home.join("blockd.log"))?;
        let child = Command::new(binary("blockd"))
            .arg("--state")
            .arg(self.home.join("state"))
            .stdin(std::process::Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("cannot start blockd")?;
        self.daemon = Some(child);
        self.wait_for_socket()
    }

    fn wait_for_socket(&mut self) -> Result<()> {
        let start = Instant::now();
        while UnixStream::connect(self.socket()).is_err() {
            let daemon = self.daemon.as_mut().expect("just started");
            if let Some(status) = daemon.try_wait()? {
                bail!(
                    "blockd ended ({status}); see {}",
                    self.home.join("blockd.log").display()
                );
            }
            if start.elapsed() > PATIENCE {
                bail!("blockd does not answer on {}", self.socket().display());
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        Ok(())
    }

    /// SIGKILL.
    pub fn kill(&mut self) -> Result<()> {
        let mut daemon = self.daemon.take().context("blockd does not run")?;
        daemon.kill()?;
        daemon.wait()?;
        Ok(())
    }

    /// SIGTERM, and waits for the end.
    pub fn stop(&mut self) -> Result<()> {
        let mut daemon = self.daemon.take().context("blockd does not run")?;
        crate::run::run(Command::new("kill").arg(daemon.id().to_string()))?;
        let status = daemon.wait()?;
        if !status.success() {
            bail!("blockd ended with {status}");
        }
        Ok(())
    }

    /// Runs `weft` and returns what it printed.
    pub fn cli(&self, arguments: &[&str]) -> Result<String> {
        eprintln!("   $ weft {}", arguments.join(" "));
        output(
            Command::new(binary("weft"))
                .arg("--socket")
                .arg(self.socket())
                .args(arguments),
        )
    }

    /// Opens an NBD door on a unix socket and returns its URI.
    pub fn attach_nbd(&self, vdi: &str) -> Result<String> {
        let path = self.home.join(format!("{vdi}.nbd"));
        self.cli(&["vdi", "attach", vdi, "--nbd", &format!("unix:{}", path.display())])?;
        Ok(format!("nbd+unix:///{vdi}?socket={}", path.display()))
    }

    /// Opens a vhost-user door and returns its socket.
    pub fn attach_vhost_user(&self, vdi: &str) -> Result<PathBuf> {
        let path = self.home.join(format!("{vdi}.vhost"));
        self.cli(&["vdi", "attach", vdi, "--vhost-user", &path.display().to_string()])?;
        Ok(path)
    }

    /// Closes all doors of a VDI.
    pub fn detach_all(&self, vdi: &str) -> Result<()> {
        self.cli(&["vdi", "detach", vdi]).map(drop)
    }

    /// One sample of `/metrics`.
    pub fn metric(&self, name: &str) -> Result<u64> {
        let text = output(
            Command::new("curl")
                .args(["--silent", "--fail", "--unix-socket"])
                .arg(self.socket())
                .arg("http://weft/metrics"),
        )?;
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .with_context(|| format!("no metric {name}"))?;
        line.trim()
            .parse()
            .with_context(|| format!("metric {name}: '{line}'"))
    }

    /// Does not end the daemon with us; returns its process id.
    pub fn leave_running(mut self) -> u32 {
        self.daemon.take().map_or(0, |daemon| daemon.id())
    }

    fn socket(&self) -> PathBuf {
        self.home.join("state/blockd.sock")
    }
}

impl Drop for Weft {
    fn drop(&mut self) {
        if let Some(daemon) = &mut self.daemon {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }
}
