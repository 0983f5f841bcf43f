//! One `blockd` with a state folder, disks and VDIs of its own: set up through `weft`, watched through /metrics and
//! /proc, killed and started again.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::client::LoadClient;
use crate::process::Daemon;

/// Longer than this nobody waits for an answer of a daemon.
const PATIENCE: Duration = Duration::from_secs(30);

/// Where things go.
#[derive(Clone, Debug)]
pub struct Place {
    /// Disks and state folders.
    pub files: PathBuf,
    /// Sockets and logs; a short path, for sockets allow no other.
    pub sockets: PathBuf,
    /// Where `blockd` and `weft` are.
    pub binaries: PathBuf,
}

/// A running daemon and what is needed to start it again.
pub struct Weft {
    place: Place,
    name: String,
    arguments: Vec<String>,
    rest: PathBuf,
    /// The only core it may use; all if `None`.
    core: Option<usize>,
    daemon: Option<Daemon>,
}

impl Weft {
    /// Starts a daemon called `name`, with `config` (TOML) or its defaults, and waits until it listens.
    pub fn start(place: &Place, name: &str, config: Option<&str>) -> Result<Weft> {
        Weft::start_on(place, name, config, None)
    }

    /// As [`Weft::start`], on one core.
    pub fn start_on(place: &Place, name: &str, config: Option<&str>, core: Option<usize>) -> Result<Weft> {
        let state = place.files.join(format!("{name}.state"));
        let mut arguments = vec!["--state".to_owned(), state.display().to_string()];
        if let Some(config) = config {
            let file = place.sockets.join(format!("{name}.toml"));
            std::fs::write(&file, config).with_context(|| file.display().to_string())?;
            arguments.extend(["--config".to_owned(), file.display().to_string()]);
        }
        let mut weft = Weft {
            place: place.clone(),
            name: name.to_owned(),
            arguments,
            rest: state.join("blockd.sock"),
            core,
            daemon: None,
        };
        weft.start_again(&[])?;
        let rest = weft.rest.clone();
        weft.daemon().wait_for_socket(&rest)?;
        Ok(weft)
    }

    /// Starts the daemon that was killed; does not wait for anything.
    pub fn start_again(&mut self, environment: &[(&str, &Path)]) -> Result<()> {
        assert!(self.daemon.is_none(), "it runs");
        let log = self.place.sockets.join(format!("{}.log", self.name));
        let blockd = self.place.binaries.join("blockd");
        let (program, mut arguments) = match self.core {
            None => (blockd, Vec::new()),
            Some(core) => {
                let blockd = blockd.display().to_string();
                let arguments = vec!["--cpu-list".to_owned(), core.to_string(), blockd];
                (PathBuf::from("taskset"), arguments) // becomes the daemon: same process id
            }
        };
        arguments.extend_from_slice(&self.arguments);
        let daemon = Daemon::start_with("blockd", &program, &arguments, environment, &log)?;
        self.daemon = Some(daemon);
        Ok(())
    }

    /// SIGKILL, and waits until it is gone.
    pub fn kill(&mut self) {
        drop(self.daemon.take());
    }

    /// The daemon, which runs.
    pub fn daemon(&mut self) -> &mut Daemon {
        self.daemon.as_mut().expect("started, and not killed since")
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.daemon.as_ref().expect("started, and not killed since").pid()
    }

    /// Gives up everything but the daemon.
    #[must_use]
    pub fn into_daemon(mut self) -> Daemon {
        self.daemon.take().expect("started, and not killed since")
    }

    /// The socket of its REST API.
    #[must_use]
    pub fn rest(&self) -> &Path {
        &self.rest
    }

    /// Where a VDI's guests connect.
    #[must_use]
    pub fn guest_socket(&self, vdi: &str) -> PathBuf {
        self.place.sockets.join(format!("{}-{vdi}.sock", self.name))
    }

    /// `weft` with `arguments`; fails as it does.
    pub fn weft(&self, arguments: &[&str]) -> Result<()> {
        let program = self.place.binaries.join("weft");
        let output = Command::new(&program)
            .arg("--socket")
            .arg(&self.rest)
            .args(arguments)
            .output()
            .with_context(|| format!("cannot start {}", program.display()))?;
        if !output.status.success() {
            let words = String::from_utf8_lossy(&output.stderr).into_owned();
            bail!(
                "`weft {}` failed ({}): {words}",
                arguments.join(" "),
                output.status
            );
        }
        Ok(())
    }

    /// Makes a VDI with a vhost-user door and connects to it.
    pub fn make_vdi(&mut self, name: &str, bytes: u64, replicas: u8) -> Result<LoadClient> {
        let (bytes, replicas) = (bytes.to_string(), replicas.to_string());
        self.weft(&["vdi", "create", name, "--size", &bytes, "--replicas", &replicas])?;
        let socket = self.guest_socket(name);
        self.weft(&[
            "vdi",
            "attach",
            name,
            "--vhost-user",
            &socket.display().to_string(),
        ])?;
        self.daemon().wait_for(|| LoadClient::connect(&socket))
    }

    /// What /metrics says now.
    pub fn metrics(&self) -> Result<Metrics> {
        metrics(&self.rest)
    }

    /// The end of its log; nothing where it was killed.
    #[must_use]
    pub fn last_words(&self) -> String {
        self.daemon.as_ref().map(Daemon::last_words).unwrap_or_default()
    }

    /// The error of a load, with the daemon's last words.
    pub fn explain(&mut self, what: &str, result: Result<()>) -> Result<()> {
        let words = self.last_words();
        result.with_context(|| format!("{what}; blockd's last words:\n{words}"))
    }
}

/// Figures of a daemon by name and labels, and by name summed over labels.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metrics(BTreeMap<String, f64>);

impl Metrics {
    /// One that must be there.
    pub fn get(&self, name: &str) -> Result<f64> {
        self.0
            .get(name)
            .copied()
            .with_context(|| format!("blockd has no metric {name}"))
    }

    /// The sum of a family's members that have all these labels; 0 where there is none.
    #[must_use]
    pub fn sum(&self, family: &str, labels: &[&str]) -> f64 {
        let has = |name: &str| {
            let of_family = name.strip_prefix(family).and_then(|rest| rest.strip_prefix('{'));
            of_family.is_some_and(|rest| labels.iter().all(|label| rest.contains(label)))
        };
        self.0
            .iter()
            .filter(|(name, _)| has(name))
            .map(|(_, value)| value)
            .sum()
    }

    fn parse(text: &str) -> Result<Metrics> {
        let mut all = BTreeMap::new();
        for line in text
            .lines()
            .filter(|line| !line.starts_with('#') && !line.is_empty())
        {
            let (name, value) = line.rsplit_once(' ').with_context(|| format!("metric: {line}"))?;
            let value: f64 = value.parse().with_context(|| format!("metric: {line}"))?;
            if let Some((family, _)) = name.split_once('{') {
                *all.entry(family.to_owned()).or_insert(0.0) += value;
            }
            all.insert(name.to_owned(), value);
        }
        Ok(Metrics(all))
    }
}

/// What /metrics at the REST socket `rest` says now.
pub fn metrics(rest: &Path) -> Result<Metrics> {
    Metrics::parse(&get(rest, "/metrics")?)
}

/// The body of a GET. HTTP/1.0, so that the answer ends where the connection does.
pub fn get(rest: &Path, path: &str) -> Result<String> {
    let mut stream = UnixStream::connect(rest).with_context(|| rest.display().to_string())?;
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(stream, "GET {path} HTTP/1.0\r\nHost: blockd\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).context("REST answer")?;
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .context("REST answer has no end of head")?;
    let status = head.split_ascii_whitespace().nth(1).unwrap_or("nothing");
    ensure!(status == "200", "GET {path}: status {status}");
    Ok(body.to_owned())
}

/// Where a daemon says that it is ready, as it would to systemd.
#[derive(Debug)]
pub struct ReadySocket {
    socket: UnixDatagram,
    path: PathBuf,
}

impl ReadySocket {
    /// At `path`.
    pub fn bind(path: PathBuf) -> Result<ReadySocket> {
        let socket = UnixDatagram::bind(&path).with_context(|| path.display().to_string())?;
        socket.set_read_timeout(Some(PATIENCE))?;
        Ok(ReadySocket { socket, path })
    }

    /// For the variable `NOTIFY_SOCKET`.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Waits for READY=1 and says when it came.
    pub fn wait(&self) -> Result<Instant> {
        let mut message = [0; 4096];
        loop {
            let length = self.socket.recv(&mut message).context("no READY=1 came")?;
            let at = Instant::now();
            if message[..length]
                .split(|&byte| byte == b'\n')
                .any(|line| line == b"READY=1")
            {
                return Ok(at);
            }
        }
    }
}

impl Drop for ReadySocket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path); // its folder goes too
    }
}

/// Memory of a process in bytes, as /proc/PID/status has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Memory {
    /// Anonymous: its own, and nobody can take it back. This is what a setting must bound.
    pub anonymous: u64,
    /// Of files: its program and libraries.
    pub file: u64,
    /// Shared: the guests' memory, which they have made and it has mapped.
    pub shared: u64,
}

/// Looks at process `pid`.
pub fn memory(pid: u32) -> Result<Memory> {
    let path = format!("/proc/{pid}/status");
    let text = std::fs::read_to_string(&path).with_context(|| path.clone())?;
    let bytes = |key: &str| -> Result<u64> {
        let line = text.lines().find_map(|line| line.strip_prefix(key));
        let kib = line.and_then(|line| line.trim().strip_suffix(" kB"));
        let kib: u64 = kib.with_context(|| format!("{path}: no {key}"))?.parse()?;
        Ok(kib << 10)
    };
    Ok(Memory {
        anonymous: bytes("RssAnon:")?,
        file: bytes("RssFile:")?,
        shared: bytes("RssShmem:")?,
    })
}

/// Bytes that process `pid` has sent to storage, as the kernel counts them (/proc/PID/io).
pub fn written_bytes(pid: u32) -> Result<u64> {
    let path = format!("/proc/{pid}/io");
    let text = std::fs::read_to_string(&path).with_context(|| path.clone())?;
    let line = text.lines().find_map(|line| line.strip_prefix("write_bytes: "));
    Ok(line.with_context(|| format!("{path}: {text}"))?.parse()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_summed_over_labels() {
        let text = "# HELP a x\n# TYPE a gauge\na{disk=\"1\"} 2\na{disk=\"2\"} 3\nb 7\n";
        let metrics = Metrics::parse(text).unwrap();
        assert_eq!((metrics.get("a").unwrap(), metrics.get("b").unwrap()), (5.0, 7.0));
        assert_eq!(metrics.get("a{disk=\"2\"}").unwrap(), 3.0);
        assert_eq!(metrics.sum("a", &["disk=\"2\""]), 3.0);
        assert_eq!((metrics.sum("a", &[]), metrics.sum("b", &[])), (5.0, 0.0));
        assert!(metrics.get("c").is_err());
        assert!(Metrics::parse("nonsense\n").is_err());
    }

    #[test]
    fn our_own_memory_and_writes_are_known() {
        let before = memory(std::process::id()).unwrap();
        let much = vec![1u8; 32 << 20];
        let after = memory(std::process::id()).unwrap();
        assert!(
            after.anonymous >= before.anonymous + (24 << 20),
            "{before:?} {after:?}"
        );
        assert!(after.file > 0 && much.len() == 32 << 20);
        written_bytes(std::process::id()).unwrap();
    }

    #[test]
    fn readiness_is_the_message_that_says_so() {
        let folder = tempfile::tempdir().unwrap();
        let ready = ReadySocket::bind(folder.path().join("notify")).unwrap();
        let sender = UnixDatagram::unbound().unwrap();
        sender.send_to(b"STATUS=READY=1 soon", ready.path()).unwrap();
        sender.send_to(b"STATUS=up\nREADY=1\n", ready.path()).unwrap();
        ready.wait().unwrap();
        ready.socket.set_nonblocking(true).unwrap();
        assert!(ready.wait().is_err(), "both messages were read");
    }
}
