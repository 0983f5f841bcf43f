//! Real etcd servers on loopback ports, with data of their own, ended with the test.

#![allow(dead_code)] // Each test binary uses a part.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use weft_control::etcd::EtcdSettings;

/// How long anything may take before the test counts it as hung. The machine may be busy.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// One member.
pub struct Member {
    child: Mutex<Option<Child>>,
    pub client_url: String,
    arguments: Vec<String>,
    data: PathBuf,
    log: PathBuf,
}

/// A cluster of etcd.
pub struct Servers {
    pub members: Vec<Member>,
    _home: TempDir,
}

/// Ports that were free a moment ago. They are held together until all are chosen.
fn free_ports(count: usize) -> Vec<u16> {
    let held: Vec<TcpListener> = (0..count)
        .map(|_| TcpListener::bind("127.0.0.1:0").expect("a port"))
        .collect();
    held.iter()
        .map(|listener| listener.local_addr().expect("bound").port())
        .collect()
}

impl Servers {
    /// Starts `count` members and waits until they serve.
    pub fn start(count: usize) -> Servers {
        Servers::start_with(count, &[])
    }

    /// The same with further arguments to every member; `https` when they name a certificate.
    pub fn start_with(count: usize, more: &[String]) -> Servers {
        let scheme = if more.iter().any(|argument| argument.starts_with("--cert-file")) {
            "https"
        } else {
            "http"
        };
        // Not the build's folder: etcd syncs every change, and here the faults are of processes, not of power.
        let home = tempfile::Builder::new()
            .prefix("etcd-")
            .tempdir()
            .expect("a folder");
        let ports = free_ports(2 * count);
        let url = |scheme: &str, port: u16| format!("{scheme}://127.0.0.1:{port}");
        let peers: Vec<String> = (0..count)
            .map(|i| format!("m{i}={}", url("http", ports[count + i])))
            .collect();
        let members = (0..count)
            .map(|i| {
                let data = home.path().join(format!("m{i}"));
                let (client, peer) = (url(scheme, ports[i]), url("http", ports[count + i]));
                let mut arguments = vec![
                    format!("--name=m{i}"),
                    format!("--data-dir={}", data.display()),
                    format!("--listen-client-urls={client}"),
                    format!("--advertise-client-urls={client}"),
                    format!("--listen-peer-urls={peer}"),
                    format!("--initial-advertise-peer-urls={peer}"),
                    format!("--initial-cluster={}", peers.join(",")),
                    "--initial-cluster-state=new".to_owned(),
                    "--heartbeat-interval=50".to_owned(),
                    "--election-timeout=500".to_owned(),
                ];
                arguments.extend(more.iter().cloned());
                Member {
                    child: Mutex::new(None),
                    client_url: client,
                    arguments,
                    log: home.path().join(format!("m{i}.log")),
                    data,
                }
            })
            .collect();
        let servers = Servers { members, _home: home };
        for member in &servers.members {
            member.start();
        }
        servers
    }

    pub fn endpoints(&self) -> Vec<String> {
        self.members
            .iter()
            .map(|member| member.client_url.clone())
            .collect()
    }

    pub fn settings(&self) -> EtcdSettings {
        EtcdSettings {
            endpoints: self.endpoints(),
            prefix: "/weft-test/".to_owned(),
            user: None,
            tls: None,
            patience: Duration::from_secs(20),
        }
    }

    /// Index of the leader, by asking etcd's own metrics page.
    pub fn leader(&self) -> usize {
        until("there is a leader", || {
            self.members.iter().position(|member| {
                member.is_running()
                    && member
                        .metrics()
                        .lines()
                        .any(|line| line == "etcd_server_is_leader 1")
            })
        })
    }
}

impl Member {
    pub fn start(&self) {
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(&self.log)
            .expect("log");
        let child = Command::new("etcd")
            .args(&self.arguments)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("log"))
            .stderr(log)
            .spawn()
            .expect("etcd (Debian package etcd-server)");
        let before = self.child.lock().expect("child").replace(child);
        assert!(before.is_none(), "it runs");
    }

    /// SIGKILL.
    pub fn kill(&self) {
        let mut child = self.child.lock().expect("child").take().expect("it runs");
        child.kill().expect("kill");
        child.wait().expect("wait");
    }

    /// Its data is gone.
    pub fn wipe(&self) {
        assert!(!self.is_running(), "first the process, then its data");
        std::fs::remove_dir_all(&self.data).expect("its data");
    }

    /// A copy of its data, as a backup.
    pub fn copy(&self) -> TempDir {
        assert!(!self.is_running(), "first the process, then its data");
        let copy = tempfile::Builder::new()
            .prefix("etcd-")
            .tempdir()
            .expect("a folder");
        copy_folder(&self.data, &copy.path().join("data"));
        copy
    }

    /// Its data is as it was copied.
    pub fn restore(&self, copy: &TempDir) {
        self.wipe();
        copy_folder(&copy.path().join("data"), &self.data);
    }

    pub fn is_running(&self) -> bool {
        self.child.lock().expect("child").is_some()
    }

    /// SIGSTOP or SIGCONT.
    pub fn signal(&self, name: &str) {
        let pid = self.child.lock().expect("child").as_ref().expect("it runs").id();
        let sent = Command::new("kill")
            .args([&format!("-{name}"), &pid.to_string()])
            .status()
            .expect("kill");
        assert!(sent.success());
        if name == "STOP" {
            // The signal stops one thread after the other; the last may still answer.
            until("it stands still", || all_threads_stopped(pid).then_some(()));
        }
    }

    fn metrics(&self) -> String {
        let output = Command::new("curl")
            .args(["--silent", "--max-time", "2"])
            .arg(format!("{}/metrics", self.client_url))
            .output()
            .expect("curl (Debian package curl)");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        if self.is_running() {
            self.kill();
        }
    }
}

fn copy_folder(from: &Path, to: &Path) {
    let copied = Command::new("cp").arg("-a").args([from, to]).status();
    assert!(copied.expect("cp").success());
}

/// Looks until `look` finds something, with pauses, for [`PATIENCE`].
pub fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(began.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn all_threads_stopped(pid: u32) -> bool {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).expect("it runs");
    threads.flatten().all(|thread| {
        let stat = std::fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
        // The name, in brackets, may hold anything; the state comes after it.
        stat.rsplit_once(") ")
            .is_none_or(|(_, rest)| rest.starts_with('T'))
    })
}
