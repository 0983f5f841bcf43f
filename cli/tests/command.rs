//! The `weft` binary itself: exit codes, one-line failures, tables and JSON, against a daemon of canned answers.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};

/// How a request begins, the answer's status, its body.
type Answer = (&'static str, u16, String);

/// Answers each request by its first matching line, in a thread that ends with the test process.
struct Daemon {
    folder: tempfile::TempDir,
    /// `METHOD PATH BODY` of each request.
    asked: Arc<Mutex<Vec<String>>>,
}

impl Daemon {
    fn start(answers: &[(&'static str, u16, &str)]) -> Daemon {
        let answers: Vec<Answer> = answers
            .iter()
            .map(|(begin, status, body)| (*begin, *status, (*body).to_owned()))
            .collect();
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("s")).unwrap();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&asked);
        std::thread::spawn(move || {
            let unknown = (
                "",
                404,
                r#"{"code":"not_found","message":"not canned"}"#.to_owned(),
            );
            for stream in listener.incoming() {
                let mut reader = BufReader::new(stream.unwrap());
                let request = read_request(&mut reader);
                let (_, status, body) = answers
                    .iter()
                    .find(|(begin, ..)| request.starts_with(begin))
                    .unwrap_or(&unknown);
                log.lock().unwrap().push(request);
                let head = format!("HTTP/1.1 {status} X\r\ncontent-length: {}\r\n\r\n", body.len());
                // The client may have seen enough.
                let _ = reader.into_inner().write_all(format!("{head}{body}").as_bytes());
            }
        });
        Daemon { folder, asked }
    }

    fn run(&self, arguments: &str) -> Output {
        weft(&self.folder.path().join("s"), arguments)
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }
}

fn read_request(reader: &mut impl BufRead) -> String {
    let mut first = String::new();
    reader.read_line(&mut first).unwrap();
    let mut body_bytes = 0;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        if let Some(length) = line.strip_prefix("content-length: ") {
            body_bytes = length.trim().parse().unwrap();
        }
        if line.trim().is_empty() {
            break;
        }
    }
    let mut body = vec![0; body_bytes];
    reader.read_exact(&mut body).unwrap();
    let request = first.trim().trim_end_matches(" HTTP/1.1");
    format!("{request} {}", String::from_utf8(body).unwrap())
        .trim()
        .to_owned()
}

fn weft(socket: &Path, arguments: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_weft"))
        .args(arguments.split_whitespace())
        .env("WEFT_SOCKET", socket)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// The exit code, and the one line on stderr.
fn failed(output: &Output) -> (i32, String) {
    let line = text(&output.stderr);
    assert!(
        line.starts_with("weft: ") && line.ends_with('\n') && line.lines().count() == 1,
        "{line:?}"
    );
    (output.status.code().unwrap(), line)
}

const NOWHERE: &str = "/nonexistent/s";

const WEB: &str = r#"{"id":1,"name":"web01","bytes":21474836480,"used_bytes":5242880,"stored_bytes":15728640,
    "sector_bytes":512,"replicas":3,"shard_bytes":1073741824,"created":"2026-11-22T01:00:00Z","health":"degraded",
    "shards":20,"shards_whole":19,"shards_waiting":0,"resync_leaves_left":7,"deleting":false,
    "attachments":[{"target":"nbd:tcp:127.0.0.1:10809","read_only":true,"queues":1}],
    "disks":[{"disk":"3f2a77c1-0d1e-4c55-9d5e-2b8f0a4c9e01","path":"/dev/sdb","replicas":20,"in_sync":19}],
    "a_field_of_the_future":1}"#;

const DISK: &str = r#"{"id":"3f2a77c1-0d1e-4c55-9d5e-2b8f0a4c9e01","path":"/dev/sdb","state":"failed","zone":"",
    "bytes":1099511627776,"capacity_bytes":1000000000000,"used_bytes":250000000000,"segments":32768,
    "segments_free":100,"replicas":20,"corrupt_blocks":2,"reason":"write error"}"#;

#[test]
fn without_a_daemon_the_exit_code_is_3() {
    let (code, line) = failed(&weft(Path::new(NOWHERE), "status"));
    assert_eq!(code, 3);
    assert!(
        line.contains(NOWHERE) && line.contains("systemctl start"),
        "{line}"
    );
    // About versions the daemon need not be asked.
    let output = weft(Path::new(NOWHERE), "version");
    assert!(output.status.success() && text(&output.stdout).contains("not running"));
}

#[test]
fn a_wrong_command_line_exits_with_2() {
    let output = weft(Path::new(NOWHERE), "vdi create web01 --size 20Gigs");
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("20GiB"), "the way out is shown");
}

#[test]
fn refusals_have_their_exit_codes() {
    let daemon = Daemon::start(&[
        (
            "GET /v1/vdis/nosuch",
            404,
            r#"{"code":"not_found","message":"no VDI","hint":"weft vdi list"}"#,
        ),
        (
            "POST /v1/pool",
            409,
            r#"{"code":"conflict","message":"there\nis a pool","hint":""}"#,
        ),
        (
            "POST /v1/vdis ",
            400,
            r#"{"code":"invalid","message":"'A' is not a name","hint":"a-z"}"#,
        ),
        (
            "GET /v1/pool",
            500,
            r#"{"code":"internal","message":"oh","hint":""}"#,
        ),
    ]);
    for (arguments, code, line) in [
        ("vdi show nosuch", 4, "weft: no VDI; weft vdi list\n"),
        ("pool create main", 5, "weft: there is a pool\n"),
        ("vdi create A --size 1GiB", 2, "weft: 'A' is not a name; a-z\n"),
        ("pool status", 1, "weft: oh\n"),
    ] {
        assert_eq!(
            failed(&daemon.run(arguments)),
            (code, line.to_owned()),
            "{arguments}"
        );
    }
}

#[test]
fn a_vdi_is_created_and_shown() {
    let daemon = Daemon::start(&[("POST /v1/vdis ", 200, WEB), ("GET /v1/vdis/web01", 200, WEB)]);
    let output = daemon.run("vdi create web01 --size 20GiB --replicas 3");
    assert!(output.status.success());
    assert!(text(&output.stdout).contains("'web01' created, 20GiB in 3 replicas"));
    let body =
        r#"{"name":"web01","bytes":21474836480,"replicas":3,"sector_bytes":512,"shard_bytes":1073741824}"#;
    assert_eq!(daemon.asked(), [format!("POST /v1/vdis {body}")]);

    let shown = text(&daemon.run("vdi show web01").stdout);
    for part in [
        "5MiB per replica, 15MiB in all",
        "degraded (19 of 20",
        "tcp:127.0.0.1:10809  read-only",
        "/dev/sdb",
    ] {
        assert!(shown.contains(part), "{part} in {shown}");
    }
    let json = text(&daemon.run("vdi show web01 --json").stdout);
    let value: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(
        value["a_field_of_the_future"], 1,
        "--json is the API's own answer"
    );
}

#[test]
fn a_relative_socket_is_relative_to_the_user() {
    let daemon = Daemon::start(&[("POST /v1/vdis/web01/attach", 200, WEB)]);
    assert!(
        daemon
            .run("vdi attach web01 --vhost-user web01.sock --queues 2")
            .status
            .success()
    );
    assert!(
        daemon
            .run("vdi attach web01 --nbd unix:/run/weft/web01.nbd --read-only")
            .status
            .success()
    );
    let here = std::env::current_dir().unwrap();
    let asked = daemon.asked();
    assert!(
        asked[0].contains(&format!("vhost-user:{}/web01.sock", here.display())),
        "{asked:?}"
    );
    assert!(
        asked[1].contains(r#""target":"nbd:unix:/run/weft/web01.nbd","read_only":true"#),
        "{asked:?}"
    );
}

#[test]
fn deleting_needs_yes_where_nobody_can_answer() {
    let daemon = Daemon::start(&[
        ("GET /v1/vdis/web01", 200, WEB),
        ("DELETE /v1/vdis/web01", 204, ""),
    ]);
    let (code, line) = failed(&daemon.run("vdi delete web01"));
    assert_eq!(code, 5);
    assert!(line.contains("5MiB of data") && line.contains("--yes"), "{line}");
    assert_eq!(daemon.asked(), ["GET /v1/vdis/web01"]);
    assert!(daemon.run("vdi delete web01 --yes").status.success());
    assert_eq!(daemon.asked().last().unwrap(), "DELETE /v1/vdis/web01");
}

#[test]
fn force_is_sent_only_after_the_refusal_was_read_and_confirmed() {
    let held = r#"{"code":"needs_force","message":"/dev/sdb has an ext4 file system","hint":"--force"}"#;
    let daemon = Daemon::start(&[
        (
            r#"POST /v1/disks {"path":"/dev/sdb","force":false,"accept_old":false}"#,
            409,
            held,
        ),
        (
            r#"POST /v1/disks {"path":"/dev/sdb","force":true,"accept_old":false}"#,
            200,
            DISK,
        ),
    ]);
    assert_eq!(failed(&daemon.run("disk add /dev/sdb")).0, 5);
    let (code, line) = failed(&daemon.run("disk add /dev/sdb --force"));
    assert_eq!(code, 5);
    assert!(line.contains("ext4") && line.contains("--yes"), "{line}");
    assert_eq!(
        failed(&daemon.run("disk add /dev/sdb --yes")).0,
        5,
        "yes is not force"
    );
    assert!(
        daemon
            .asked()
            .iter()
            .all(|request| request.contains(r#""force":false"#))
    );
    assert!(daemon.run("disk add /dev/sdb --force --yes").status.success());
}

#[test]
fn status_shows_the_trouble_and_check_reports_it() {
    let status = format!(
        r#"{{"version":{{"version":"0.1.0","api":1,"disk_format":1}},
        "pool":{{"id":"0b5f4a3e-9a55-4f0e-8a0e-6d3f6f1f6f10","name":"main","created":"2026-11-22T01:00:00Z","disks":1,
            "vdis":1,"capacity_bytes":1000,"used_bytes":250}},
        "disks":[{DISK}],"vdis":[{WEB}],"resyncs":[],"scrubs":[],
        "events":[{{"at":"2026-11-22T01:02:03Z","severity":"critical","message":"disk failed"}}]}}"#
    );
    let daemon = Daemon::start(&[("GET /v1/status", 200, &status)]);
    let output = daemon.run("status");
    let shown = text(&output.stdout);
    assert!(output.status.success(), "{}", text(&output.stderr));
    for part in [
        "failed disks: 1, degraded VDIs: 1",
        "FAILED: write error",
        "25%",
        "web01",
        "CRITICAL  disk failed",
    ] {
        assert!(shown.contains(part), "{part} in {shown}");
    }
    assert_eq!(failed(&daemon.run("status --check")).0, 1);
}

#[test]
fn a_scrub_is_waited_for_and_its_finding_decides() {
    let running = r#"{"scrubs":[{"vdi":"web01","started":"2026-11-22T01:00:00Z","ended":null,"shards_done":1,
        "shards":20,"blocks":10,"repaired":0,"unreadable":0}]}"#;
    let done = r#"{"scrubs":[{"vdi":"web01","started":"2026-11-22T01:00:00Z","ended":"2026-11-22T01:09:00Z",
        "shards_done":20,"shards":20,"blocks":256,"repaired":3,"unreadable":1}]}"#;
    let daemon = Daemon::start(&[("POST /v1/scrub", 200, running), ("GET /v1/scrub", 200, done)]);
    let output = daemon.run("scrub --vdi web01");
    assert!(output.status.success() && text(&output.stdout).contains("running"));
    assert_eq!(daemon.asked(), [r#"POST /v1/scrub {"vdi":"web01"}"#]);
    let output = daemon.run("scrub --vdi web01 --wait");
    let (code, line) = failed(&output);
    assert_eq!(code, 1);
    assert!(line.contains("1 blocks have no good copy"), "{line}");
    assert!(
        text(&output.stdout).contains("1MiB"),
        "what was verified is shown"
    );
}

#[test]
fn completions_are_printed_for_each_shell() {
    for shell in ["bash", "zsh", "fish"] {
        let output = weft(Path::new(NOWHERE), &format!("completions {shell}"));
        assert!(
            output.status.success() && text(&output.stdout).contains("scrub"),
            "{shell}"
        );
    }
}
