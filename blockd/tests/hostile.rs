//! A running daemon under a sweep of everything wrong that can be said to it, at each of its doors: REST, the command
//! line, NBD, vhost-user. Each is refused clearly; what the daemon has, and what guests wrote, is the same before and
//! after; no descriptor stays open, and memory does not grow with what was refused.
//!
//! What is wrong is listed where the parts are tested by themselves: `control/tests`, `cli/tests`, `fuzz/corpus`.

#[path = "../../cli/tests/support/lines.rs"]
mod lines;
mod support;
#[path = "../../control/tests/support/wrong.rs"]
mod wrong;

use std::ffi::{OsStr, OsString};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use support::{Daemon, MIB, NbdClient, fill, http, verify};
use wrong::{Faults, VALID, hostile_targets, place, wrong_bodies};

/// What memory may vary by between two sweeps of the same: the allocator's own. One sweep sends more than this.
const GROWTH_BYTES_MAX: u64 = 24 << 20;

/// A daemon that has something to lose: a VDI with data and two doors, one of them without writing.
struct Target {
    daemon: Daemon,
}

impl Target {
    fn new() -> Target {
        let daemon = Daemon::with_disks(2, &[]);
        daemon.create_vdi("web01", 64 * MIB, 2);
        daemon.attach_nbd("web01");
        let read_only = format!("nbd:unix:{}", daemon.path("look.nbd").display());
        daemon.post(
            "/v1/vdis/web01/attach",
            &json!({"target": read_only, "read_only": true}),
        );
        let vhost = format!("vhost-user:{}", daemon.path("web01.sock").display());
        daemon.post("/v1/vdis/web01/attach", &json!({"target": vhost, "queues": 2}));
        fill(&daemon, "web01", 0, 64, 7);
        Target { daemon }
    }

    /// All that the daemon has and says, but for what grows by itself: figures of its log, and time.
    fn everything(&self) -> Vec<Value> {
        let mut all: Vec<Value> = VALID
            .iter()
            .filter(|(method, path, _)| *method == "GET" && *path != "/metrics" && *path != "/v1/status")
            // Also what is refused: not every path names something that is there.
            .map(|(_, path, _)| self.daemon.call("GET", &place(path), None).1)
            .collect();
        all.push(self.daemon.get("/v1/status")["events"].clone());
        for disk in all.iter_mut().filter_map(Value::as_array_mut).flatten() {
            if let Some(disk) = disk.as_object_mut() {
                disk.remove("segments_free");
            }
        }
        all
    }

    fn descriptors(&self) -> usize {
        let folder = format!("/proc/{}/fd", self.daemon.pid());
        std::fs::read_dir(folder).expect("descriptors").count()
    }

    fn memory_bytes(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.daemon.pid()));
        let status = status.expect("status");
        let line = status
            .lines()
            .find(|line| line.starts_with("VmRSS:"))
            .expect("RSS");
        let kib = line.split_whitespace().nth(1).expect("a figure");
        kib.parse::<u64>().expect("a figure") << 10
    }

    /// Runs a sweep twice. What it finds is the same after it, and the second costs nothing more.
    fn holds_under(&mut self, sweep: impl Fn(&Daemon)) {
        let before = self.everything();
        let descriptors = self.descriptors();
        sweep(&self.daemon);
        let memory = self.memory_bytes();
        sweep(&self.daemon);
        let after = self.memory_bytes();
        assert!(
            after < memory + GROWTH_BYTES_MAX,
            "memory grew from {memory} to {after} B"
        );
        let pid = self.daemon.pid();
        let folder = format!("/proc/{pid}/fd");
        self.daemon.until("what was opened is closed", |_| {
            std::fs::read_dir(&folder).expect("the daemon lives").count() <= descriptors
        });
        assert_eq!(self.everything(), before);
        verify(&self.daemon, "web01", 0, 64, 7);
        let log = self.daemon.log();
        assert!(!log.contains("panicked"), "{log}");
        // And it is durable that nothing changed.
        self.daemon.kill();
        self.daemon.start_again();
        verify(&self.daemon, "web01", 0, 64, 7);
    }
}

#[test]
fn wrong_rest_requests_are_refused_and_change_nothing() {
    let mut target = Target::new();
    let document = target.daemon.get("/openapi.json");
    // The table is complete: control/tests compares it with the document and the router.
    let known: usize = document["paths"]
        .as_object()
        .expect("paths")
        .values()
        .map(methods)
        .sum();
    assert_eq!(VALID.len(), known);
    target.holds_under(|daemon| {
        let mut faults = Faults::default();
        let mut count = 0;
        for (method, path, body) in VALID {
            for (what, text) in wrong_bodies(&document, method, path, body) {
                let answer = http::request(daemon, method, &place(path), &text);
                faults.check(&format!("{method} {path}: {what}"), &answer);
                count += 1;
            }
        }
        for (method, target, body) in hostile_targets() {
            let answer = http::request(daemon, method, &target, body);
            faults.check(&format!("{method} {target}"), &answer);
            count += 1;
        }
        for (method, target, body) in wrong_here(daemon) {
            let answer = http::request(daemon, method, &target, &body.to_string());
            faults.check(&format!("{method} {target} {body}"), &answer);
        }
        faults.report();
        assert!(count > 1_000, "{count} requests");
        for bytes in [
            &b"IHAVEOPT\0\0\0\x03"[..],
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
            b"GET\r\n\r\n",
        ] {
            let answer = http::converse(daemon, bytes);
            assert!(answer.starts_with("HTTP/1.1 4"), "{answer}");
        }
    });
}

fn methods(path: &Value) -> usize {
    path.as_object().expect("methods").len()
}

/// Requests that are right in themselves, and wrong as things stand here.
fn wrong_here(daemon: &Daemon) -> Vec<(&'static str, String, Value)> {
    let disk = daemon.disk_path(1);
    let folder = daemon.path("state");
    let id = daemon.get("/v1/disks")[0]["id"]
        .as_str()
        .expect("an id")
        .to_owned();
    let attach = |target: String| json!({"target": target});
    let web01 = "/v1/vdis/web01";
    let vdi =
        |name: &str, bytes: u64, replicas: u8| json!({"name": name, "bytes": bytes, "replicas": replicas});
    vec![
        ("POST", "/v1/pool".into(), json!({"name": "again"})),
        ("POST", "/v1/vdis".into(), vdi("web01", 16 * MIB, 1)),
        ("POST", "/v1/disks".into(), json!({"path": disk})),
        ("POST", "/v1/disks".into(), json!({"path": disk, "force": true})),
        (
            "POST",
            "/v1/disks".into(),
            json!({"path": disk, "create_bytes": support::GIB}),
        ),
        ("POST", "/v1/disks".into(), json!({"path": "/nonexistent/disk"})),
        (
            "POST",
            "/v1/disks".into(),
            json!({"path": "/nonexistent/disk", "create_bytes": support::GIB}),
        ),
        (
            "POST",
            "/v1/disks".into(),
            json!({"path": "/dev/null", "force": true}),
        ),
        ("POST", "/v1/disks".into(), json!({"path": folder, "force": true})),
        (
            "POST",
            "/v1/disks".into(),
            json!({"path": "/etc/passwd", "force": true}),
        ),
        (
            "POST",
            format!("/v1/disks/{id}/replace"),
            json!({"with": {"path": "/nonexistent/disk"}}),
        ),
        (
            "POST",
            format!("/v1/disks/{id}/replace"),
            json!({"with": {"path": disk, "force": true}}),
        ),
        ("POST", format!("{web01}/resize"), json!({"bytes": 16 * MIB})),
        (
            "POST",
            format!("{web01}/attach"),
            attach(format!("nbd:unix:{}", folder.display())),
        ),
        (
            "POST",
            format!("{web01}/attach"),
            attach(format!("vhost-user:{}", folder.display())),
        ),
        (
            "POST",
            format!("{web01}/attach"),
            attach(format!("nbd:unix:{}", daemon.path("web01.nbd").display())),
        ),
        (
            "POST",
            format!("{web01}/attach"),
            attach(format!("vhost-user:{}", daemon.path("look.nbd").display())),
        ),
        (
            "POST",
            format!("{web01}/attach"),
            attach("nbd:unix:/dev/null/x".into()),
        ),
        (
            "POST",
            format!("{web01}/detach"),
            attach("nbd:unix:/nonexistent/x".into()),
        ),
        (
            "POST",
            "/v1/vdis/none/attach".into(),
            attach("nbd:unix:/nonexistent/x".into()),
        ),
        ("POST", "/v1/scrub".into(), json!({"vdi": "none"})),
        ("DELETE", web01.into(), Value::Null),
        ("DELETE", "/v1/vdis/none".into(), Value::Null),
    ]
}

#[test]
fn wrong_command_lines_are_refused_and_change_nothing() {
    let mut target = Target::new();
    target.holds_under(|daemon| {
        let socket = daemon.path("state/blockd.sock");
        let run = |words: &[OsString]| weft_at(&socket, words);
        // A path that is relative is right, strange as it may look; what attaches is not for this sweep.
        let takes = |place: &str, value: &OsStr| {
            let is_door = place.starts_with("--vhost-user") || place.starts_with("--nbd");
            !is_door || value.len() > 200 || value.is_empty()
        };
        let mut faults = Vec::new();
        let lines = lines::wrong_lines(&run, takes);
        assert!(lines.len() > 500, "{} lines", lines.len());
        for line in lines {
            if let Some(fault) = lines::fault(&run(&line)) {
                faults.push(format!("weft {}: {fault}", lines::shown(&line)));
            }
        }
        assert!(
            faults.is_empty(),
            "{} faults:\n{}",
            faults.len(),
            faults.join("\n")
        );
    });
}

fn weft_at(socket: &Path, words: &[OsString]) -> Output {
    let output = Command::new(support::weft_program())
        .args(words)
        .env("WEFT_SOCKET", socket)
        .stdin(Stdio::null())
        .output();
    output.expect("weft starts")
}

/// Inputs that once reached new code in a reader.
fn corpus(name: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../fuzz/corpus")
        .join(name);
    let files = std::fs::read_dir(folder).expect("a corpus");
    let inputs: Vec<Vec<u8>> = files
        .map(|file| std::fs::read(file.expect("readable").path()).expect("read"))
        .collect();
    assert!(!inputs.is_empty());
    inputs
}

/// Numbers without meaning, the same in every run.
fn noise(seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = seed;
    let next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u8
    };
    std::iter::repeat_with(next).take(bytes).collect()
}

/// Says `bytes`, hangs up half, and listens to the end. A daemon that neither answers nor hangs up is a fault.
fn say(door: &Path, bytes: &[u8]) {
    let mut stream = UnixStream::connect(door).expect("connect");
    stream.set_read_timeout(Some(support::PATIENCE)).expect("timeout");
    stream
        .set_write_timeout(Some(Duration::from_secs(10)))
        .expect("timeout");
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(Shutdown::Write);
    let mut answer = Vec::new();
    if let Err(error) = stream.read_to_end(&mut answer) {
        let is_hung = matches!(
            error.kind(),
            std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut
        );
        assert!(
            !is_hung,
            "{} hangs after {:?}",
            door.display(),
            &bytes[..bytes.len().min(64)]
        );
    }
}

/// A right conversation up to a write of 64 KiB, with all of its bytes.
fn nbd_write() -> Vec<u8> {
    let mut bytes = 3_u32.to_be_bytes().to_vec();
    bytes.extend(b"IHAVEOPT");
    bytes.extend(1_u32.to_be_bytes());
    bytes.extend(0_u32.to_be_bytes());
    bytes.extend(0x2560_9513_u32.to_be_bytes());
    bytes.extend([0, 0, 0, 1]);
    bytes.extend([9; 8]);
    bytes.extend(0_u64.to_be_bytes());
    bytes.extend((64_u32 << 10).to_be_bytes());
    bytes.extend([0xEE; 64 << 10]);
    bytes
}

#[test]
fn garbage_at_nbd_sockets_changes_nothing() {
    let mut target = Target::new();
    target.holds_under(|daemon| {
        let (door, look) = (daemon.path("web01.nbd"), daemon.path("look.nbd"));
        for seed in 0..40 {
            say(&door, &noise(seed, 1 << (seed % 17)));
            // Noise behind a right beginning.
            let mut bytes = nbd_write();
            bytes.truncate(24);
            bytes.extend(noise(seed, 4096));
            say(&door, &bytes);
        }
        // What the fuzzer kept may be right requests: at the door that does not write.
        for input in corpus("nbd_handshake").into_iter().chain(corpus("nbd_request")) {
            say(&look, &input);
            let mut bytes = nbd_write();
            bytes.truncate(20);
            say(&look, &[bytes, input].concat());
        }
        say(&look, &nbd_write());
        let whole = nbd_write();
        for end in (0..60)
            .chain((60..whole.len()).step_by(6_007))
            .chain([whole.len() - 1])
        {
            say(&door, &whole[..end]);
        }
        let mut client = NbdClient::connect(&door).expect("connect");
        assert!(client.write(64 * MIB, &[1; 512]).is_err(), "behind the end");
        assert!(client.write(1, &[1; 512]).is_err(), "beside a sector");
        assert!(client.read(u64::MAX - 511, 512).is_err());
        let mut client = NbdClient::connect(&look).expect("connect");
        assert!(client.write(0, &[1; 512]).is_err(), "read only");
        assert!(client.trim(0, 4096).is_err(), "read only");
    });
}

#[test]
fn garbage_at_vhost_sockets_changes_nothing() {
    let mut target = Target::new();
    target.holds_under(|daemon| {
        let door = daemon.path("web01.sock");
        for seed in 0..40 {
            say(&door, &noise(seed, 1 << (seed % 17)));
        }
        for input in corpus("vhost_ring") {
            say(&door, &input);
        }
        // Each message there is, and some there are not: with a body of the wrong length, or of noise; and lengths
        // that promise more than comes.
        for code in (0..48_u32).chain([99, u32::MAX]) {
            for (flags, length, body) in [
                (1_u32, 0_u32, 0_usize),
                (1, 8, 8),
                (9, 8, 8),
                (1, 40, 40),
                (9, 4096, 4096),
                (1, u32::MAX, 64),
                (0, 8, 8),
                (0xffff_ffff, 8, 8),
            ] {
                let head = [code, flags, length].map(u32::to_le_bytes).concat();
                say(&door, &[head, noise(u64::from(code), body)].concat());
            }
        }
    });
}
