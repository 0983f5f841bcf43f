//! Daemons under test: started, waited for, and ended by their process id whatever happens.

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use rustix::process::{Pid, Signal, kill_process};

use crate::cpu;
use crate::interrupt::{Undo, undo_later};

/// How long a daemon may take to listen, recovery of a large disk included.
const PATIENCE: Duration = Duration::from_secs(120);

/// Between two looks at a socket.
const LOOK: Duration = Duration::from_millis(5);

/// Fails where one of `programs` is not to be found, with the Debian packages that bring them.
pub fn require_programs(programs: &[&str], packages: &str) -> Result<()> {
    let folders = std::env::var_os("PATH").unwrap_or_default();
    let is_there =
        |program: &&str| std::env::split_paths(&folders).any(|folder| folder.join(program).is_file());
    let missing: Vec<&str> = programs
        .iter()
        .copied()
        .filter(|program| !is_there(program))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    bail!(
        "not installed: {}; on Debian: apt-get install --no-install-recommends {packages}",
        missing.join(", ")
    );
}

/// A daemon; killed when dropped, and by the kernel if we die without dropping.
#[derive(Debug)]
pub struct Daemon {
    name: String,
    child: Child,
    log: PathBuf,
    undo: Option<Undo>,
}

impl Daemon {
    /// Starts `program` with its output in `log`.
    pub fn start(name: &str, program: &Path, arguments: &[String], log: &Path) -> Result<Daemon> {
        Daemon::start_with(name, program, arguments, &[], log)
    }

    /// As [`Daemon::start`], with variables added to its environment.
    pub fn start_with(
        name: &str,
        program: &Path,
        arguments: &[String],
        environment: &[(&str, &Path)],
        log: &Path,
    ) -> Result<Daemon> {
        let output = File::create(log).with_context(|| log.display().to_string())?;
        let child = Command::new("setpriv") // becomes the program: same process id
            .args(["--pdeathsig", "KILL", "--"])
            .arg(program)
            .args(arguments)
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        let pid = Pid::from_child(&child);
        let undo = undo_later(move || {
            let _ = kill_process(pid, Signal::KILL); // not waited for yet: the number is still its own
        });
        Ok(Daemon {
            name: name.to_owned(),
            child,
            log: log.to_owned(),
            undo: Some(undo),
        })
    }

    /// CPU time it has used.
    pub fn cpu(&self) -> Result<Duration> {
        cpu::of_process(self.child.id()).with_context(|| format!("{} has ended", self.name))
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Tries `attempt` until it succeeds; fails when the daemon ends or patience does.
    pub fn wait_for<T>(&mut self, mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
        let start = Instant::now();
        loop {
            let error = match attempt() {
                Ok(value) => return Ok(value),
                Err(error) => error,
            };
            if let Some(status) = self.child.try_wait()? {
                bail!(
                    "{} ended ({status}); its last words:\n{}",
                    self.name,
                    self.last_words()
                );
            }
            if start.elapsed() > PATIENCE {
                let words = self.last_words();
                return Err(error.context(format!("{} is not ready after {PATIENCE:?}\n{words}", self.name)));
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Waits until something listens at `socket`.
    pub fn wait_for_socket(&mut self, socket: &Path) -> Result<()> {
        self.wait_for(|| {
            UnixStream::connect(socket).with_context(|| socket.display().to_string())?;
            Ok(())
        })
    }

    /// The end of its log.
    pub fn last_words(&self) -> String {
        let text = std::fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.undo.take(); // first: after the wait the number may be somebody else's
        let _ = self.child.kill(); // it may have ended already
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_daemon_that_ends_is_reported_with_its_last_words() {
        let folder = tempfile::tempdir().unwrap();
        let arguments = ["-c".to_owned(), "echo sorry; exit 3".to_owned()];
        let mut daemon =
            Daemon::start("sh", Path::new("/bin/sh"), &arguments, &folder.path().join("log")).unwrap();
        let error = daemon
            .wait_for_socket(&folder.path().join("socket"))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("exit status: 3") && error.contains("sorry"),
            "{error}"
        );
    }

    #[test]
    fn what_is_not_installed_is_named_with_its_packages() {
        assert!(require_programs(&["sh"], "dash").is_ok());
        let error = require_programs(&["sh", "no-such-program"], "a b")
            .unwrap_err()
            .to_string();
        assert_eq!(
            error,
            "not installed: no-such-program; on Debian: apt-get install --no-install-recommends a b"
        );
    }

    #[test]
    fn dropping_ends_the_process() {
        let folder = tempfile::tempdir().unwrap();
        let daemon = Daemon::start(
            "sleep",
            Path::new("sleep"),
            &["1000".to_owned()],
            &folder.path().join("log"),
        )
        .unwrap();
        let pid = daemon.pid();
        assert!(cpu::of_process(pid).is_ok());
        drop(daemon);
        assert!(cpu::of_process(pid).is_err());
    }
}
