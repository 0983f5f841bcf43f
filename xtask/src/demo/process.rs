//! A process of the demo: started on a host, ended with the demo whatever happens to it.

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, bail};

use super::undo::{self, Undo};
use super::until;

/// A process that runs.
pub struct Process {
    name: String,
    child: Arc<Mutex<Child>>,
    /// Kills it, if it still runs, when this is dropped.
    _undo: Undo,
}

impl Process {
    /// Starts `command`, which the user of the demo knows as `name`.
    pub fn start(name: &str, command: &mut Command) -> Result<Process> {
        // In a group of its own: Ctrl-C is for the demo, which ends its processes in its own order.
        let child = command
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        let child = Arc::new(Mutex::new(child));
        let undone = Arc::clone(&child);
        let undo = undo::later(move || {
            // Not reaped before, so the number is still this process's.
            let mut child = undone.lock().expect("child");
            let _ = child.kill();
            let _ = child.wait();
        });
        Ok(Process {
            name: name.to_owned(),
            child,
            _undo: undo,
        })
    }

    /// The same for a daemon: nothing to read, all that it says into `log`.
    pub fn start_logged(name: &str, command: &mut Command, log: &Path) -> Result<Process> {
        let file = File::options()
            .create(true)
            .append(true)
            .open(log)
            .with_context(|| format!("cannot open {}", log.display()))?;
        let command = command
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file);
        Process::start(name, command)
    }

    /// Its standard input and output, both made pipes by who started it.
    pub fn pipes(&self) -> (ChildStdin, ChildStdout) {
        let mut child = self.child.lock().expect("child");
        let input = child.stdin.take().expect("standard input is a pipe");
        (input, child.stdout.take().expect("standard output is a pipe"))
    }

    /// How it ended, if it has.
    pub fn ended(&self) -> Result<Option<ExitStatus>> {
        Ok(self.child.lock().expect("child").try_wait()?)
    }

    /// SIGKILL; nothing is left of it when this returns.
    pub fn kill(&self) -> Result<()> {
        let mut child = self.child.lock().expect("child");
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    /// SIGTERM; it must end well.
    pub fn stop(self) -> Result<()> {
        self.signal("TERM")?;
        self.wait()
    }

    /// Waits for its good end.
    pub fn wait(self) -> Result<()> {
        let status = until(&format!("{} ends", self.name), || self.ended())?;
        if !status.success() {
            bail!("{} ended with {status}", self.name);
        }
        Ok(())
    }

    /// Sends a signal by its name.
    pub fn signal(&self, signal: &str) -> Result<()> {
        let pid = self.child.lock().expect("child").id();
        let sent = Command::new("kill")
            .args([&format!("-{signal}"), &pid.to_string()])
            .status();
        if !sent.context("cannot start kill")?.success() {
            bail!("{} (process {pid}) takes no SIG{signal}", self.name);
        }
        Ok(())
    }
}
