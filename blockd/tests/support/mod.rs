//! A real blockd on real files for the tests, spoken to as users do: REST by curl, data over NBD.

#![allow(dead_code, unused_imports)] // Each test binary uses a part.

mod content;
pub mod http;
mod nbd_client;
mod weft;

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

pub use content::{copy, damage, fill, flip_bits, set_version, verify};
pub use nbd_client::{NbdClient, WRITE};
use serde_json::{Value, json};
use tempfile::TempDir;
pub use weft::{Outcome, weft, weft_program};

/// How long anything may take before the test counts it as hung.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub const GIB: u64 = 1 << 30;
pub const MIB: u64 = 1 << 20;

/// A daemon with its state and disks in a folder of its own, ended with the test.
pub struct Daemon {
    pub home: TempDir,
    child: Option<Child>,
    arguments: Vec<String>,
}

impl Daemon {
    /// Starts one with an empty state. Its folder is beside the build: /tmp may be memory.
    pub fn start(arguments: &[&str]) -> Daemon {
        let beside_the_build = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let home = tempfile::Builder::new()
            .prefix("blockd-")
            .tempdir_in(beside_the_build)
            .expect("a folder");
        Daemon::start_in(home, arguments)
    }

    /// The same in a folder of the caller's choice.
    pub fn start_in(home: TempDir, arguments: &[&str]) -> Daemon {
        let arguments = arguments.iter().map(|text| (*text).to_owned()).collect();
        let mut daemon = Daemon {
            home,
            child: None,
            arguments,
        };
        daemon.start_again();
        daemon
    }

    /// With a pool, and `disks` disks of 1 GiB.
    pub fn with_disks(disks: usize, arguments: &[&str]) -> Daemon {
        let daemon = Daemon::start(arguments);
        daemon.post("/v1/pool", &json!({"name": "test"}));
        for number in 1..=disks {
            daemon.add_disk(number);
        }
        daemon
    }

    pub fn start_again(&mut self) {
        assert!(self.child.is_none(), "it runs");
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.path("log"))
            .expect("log");
        let child = Command::new(env!("CARGO_BIN_EXE_blockd"))
            .arg("--state")
            .arg(self.path("state"))
            .args(&self.arguments)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("log"))
            .stderr(log)
            .spawn()
            .expect("blockd starts");
        self.child = Some(child);
        self.until("the REST socket answers", |daemon| {
            let child = daemon.child.as_mut().expect("just started");
            if let Some(status) = child.try_wait().expect("wait") {
                panic!("blockd ended with {status}:\n{}", daemon.log());
            }
            UnixStream::connect(daemon.path("state/blockd.sock")).is_ok()
        });
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        let mut child = self.child.take().expect("it runs");
        child.kill().expect("kill");
        child.wait().expect("wait");
    }

    /// SIGTERM; it must end well.
    pub fn stop(&mut self) {
        let mut child = self.child.take().expect("it runs");
        let sent = Command::new("kill")
            .arg(child.id().to_string())
            .status()
            .expect("kill");
        assert!(sent.success());
        let status = child.wait().expect("wait");
        assert!(status.success(), "{status}:\n{}", self.log());
    }

    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("it runs").id()
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.home.path().join(name)
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    pub fn disk_path(&self, number: usize) -> PathBuf {
        self.path(&format!("disk{number}.img"))
    }

    pub fn add_disk(&self, number: usize) -> Value {
        self.post(
            "/v1/disks",
            &json!({"path": self.disk_path(number), "create_bytes": GIB}),
        )
    }

    pub fn create_vdi(&self, name: &str, bytes: u64, replicas: u8) -> Value {
        self.post(
            "/v1/vdis",
            &json!({"name": name, "bytes": bytes, "replicas": replicas}),
        )
    }

    /// Everything that the daemon keeps beside its disks.
    pub fn lose_state(&self) {
        assert!(self.child.is_none(), "it runs");
        std::fs::remove_dir_all(self.path("state")).expect("its state");
    }

    /// `weft pool recover` from the disks 1 to `disks`.
    pub fn recover(&self, disks: usize, more: &[&str]) -> Outcome {
        let mut words: Vec<PathBuf> = ["pool", "recover", "--state"].map(PathBuf::from).to_vec();
        words.push(self.path("state"));
        words.extend((1..=disks).map(|number| self.disk_path(number)));
        words.extend(more.iter().map(PathBuf::from));
        weft(&words)
    }

    /// Opens an NBD door; returns its socket.
    pub fn attach_nbd(&self, name: &str) -> PathBuf {
        let path = self.path(&format!("{name}.nbd"));
        let target = format!("nbd:unix:{}", path.display());
        self.post(&format!("/v1/vdis/{name}/attach"), &json!({"target": target}));
        path
    }

    pub fn get(&self, path: &str) -> Value {
        let (code, answer) = self.call("GET", path, None);
        assert!(
            (200..300).contains(&code),
            "GET {path}: {code} {answer}\n{}",
            self.log()
        );
        answer
    }

    pub fn post(&self, path: &str, body: &Value) -> Value {
        let (code, answer) = self.call("POST", path, Some(body));
        assert!(
            (200..300).contains(&code),
            "POST {path} {body}: {code} {answer}\n{}",
            self.log()
        );
        answer
    }

    /// Any request; returns the status and the answer.
    pub fn call(&self, method: &str, path: &str, body: Option<&Value>) -> (u16, Value) {
        let mut curl = Command::new("curl");
        curl.args([
            "--silent",
            "--show-error",
            "--max-time",
            "60",
            "--request",
            method,
        ]);
        curl.args(["--write-out", "\n%{http_code}", "--unix-socket"])
            .arg(self.path("state/blockd.sock"));
        if let Some(body) = body {
            curl.args([
                "--header",
                "content-type: application/json",
                "--data",
                &body.to_string(),
            ]);
        }
        let output = curl
            .arg(format!("http://weft{path}"))
            .output()
            .expect("curl (Debian package curl)");
        let text = String::from_utf8(output.stdout).expect("UTF-8");
        let (answer, code) = text.rsplit_once('\n').expect("a status line");
        let code = code.parse().expect("a status");
        assert_ne!(
            code,
            0,
            "{method} {path}: {}\n{}",
            String::from_utf8_lossy(&output.stderr),
            self.log()
        );
        (
            code,
            serde_json::from_str(answer).unwrap_or_else(|_| Value::String(answer.to_owned())),
        )
    }

    /// Waits for something that must come, by looking until it does.
    pub fn until(&mut self, what: &str, mut is_so: impl FnMut(&mut Daemon) -> bool) {
        let start = Instant::now();
        while !is_so(self) {
            assert!(
                start.elapsed() < PATIENCE,
                "not within {PATIENCE:?}: {what}\n{}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub fn until_health(&mut self, vdi: &str, health: &str) {
        self.until(&format!("VDI {vdi} is {health}"), |daemon| {
            daemon.get(&format!("/v1/vdis/{vdi}"))["health"] == health
        });
    }

    pub fn metric(&self, name: &str) -> u64 {
        let answer = self.get("/metrics");
        let text = answer.as_str().expect("text");
        let sum = text
            .lines()
            .filter(|line| line.starts_with(name))
            .filter_map(|line| {
                line.rsplit_once(' ')
                    .and_then(|(_, value)| value.parse::<u64>().ok())
            })
            .sum();
        assert!(text.contains(name), "no metric {name}");
        sum
    }
}

/// A loop device over a file of its own: a disk that can be made to fail.
pub struct LoopDisk {
    pub device: PathBuf,
    file: PathBuf,
}

impl LoopDisk {
    pub fn new(file: PathBuf) -> LoopDisk {
        File::create(&file).expect("file").set_len(GIB).expect("size");
        let output = Command::new("losetup")
            .args(["--find", "--show"])
            .arg(&file)
            .output();
        let output = output.expect("losetup (Debian package mount)");
        assert!(
            output.status.success(),
            "as root: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        let device = String::from_utf8(output.stdout).expect("UTF-8").trim().into();
        LoopDisk { device, file }
    }

    /// From now on every write fails, as beyond the end of a disk.
    pub fn fail(&self) {
        File::options()
            .write(true)
            .open(&self.file)
            .expect("open")
            .set_len(0)
            .expect("truncate");
        let resized = Command::new("losetup")
            .arg("--set-capacity")
            .arg(&self.device)
            .status();
        assert!(resized.expect("losetup").success());
    }
}

impl Drop for LoopDisk {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.device).status();
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
