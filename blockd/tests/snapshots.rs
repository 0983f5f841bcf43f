//! Snapshots as users meet them: taken under load, read back, gone back to, deleted, and through kills of the daemon.

mod support;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use serde_json::{Value, json};
use support::{Daemon, MIB, NbdClient};

const BLOCK: u64 = 4096;

/// A VDI over several shards, so that a cut goes through all of them.
fn create(daemon: &Daemon, name: &str, replicas: u8) {
    daemon.post(
        "/v1/vdis",
        &json!({"name": name, "bytes": 64 * MIB, "replicas": replicas, "shard_bytes": 4 * MIB}),
    );
    daemon.attach_nbd(name);
}

fn take(daemon: &Daemon, snapshots: &[&str]) -> Value {
    daemon.post("/v1/snapshots", &json!({ "snapshots": snapshots }))
}

fn names(daemon: &Daemon, vdi: &str) -> Vec<String> {
    let all = daemon.get(&format!("/v1/vdis/{vdi}/snapshots"));
    let all = all.as_array().expect("a list").iter();
    all.map(|one| one["name"].as_str().expect("a name").to_owned())
        .collect()
}

/// Serves a snapshot, hands a client of it to `look`, and closes the door again.
fn look_at<T>(daemon: &Daemon, vdi: &str, snapshot: &str, look: impl FnOnce(&mut NbdClient) -> T) -> T {
    let path = daemon.path(&format!("{vdi}-{snapshot}.nbd"));
    let target = format!("nbd:unix:{}", path.display());
    daemon.post(
        &format!("/v1/vdis/{vdi}/attach"),
        &json!({"target": target, "snapshot": snapshot}),
    );
    let mut client = NbdClient::connect(&path).expect("connect");
    let seen = look(&mut client);
    drop(client);
    daemon.post(&format!("/v1/vdis/{vdi}/detach"), &json!({ "target": target }));
    seen
}

fn client(daemon: &Daemon, vdi: &str) -> NbdClient {
    NbdClient::connect(&daemon.path(&format!("{vdi}.nbd"))).expect("connect")
}

fn byte_at(client: &mut NbdClient, offset: u64) -> u8 {
    let data = client.read(offset, BLOCK as u32).expect("read");
    assert!(
        data.iter().all(|byte| *byte == data[0]),
        "a torn block at {offset}"
    );
    data[0]
}

/// The bytes at these places.
fn bytes_at(client: &mut NbdClient, offsets: &[u64]) -> Vec<u8> {
    offsets.iter().map(|offset| byte_at(client, *offset)).collect()
}

fn put(client: &mut NbdClient, offset: u64, byte: u8) {
    client.write(offset, &[byte; BLOCK as usize]).expect("write");
}

#[test]
fn a_snapshot_keeps_what_was_there_and_the_vdi_goes_on() {
    let mut daemon = Daemon::with_disks(3, &[]);
    create(&daemon, "web", 3);
    let places = [0, 5 * MIB, 9 * MIB, 63 * MIB];
    let mut web = client(&daemon, "web");
    for place in &places[..3] {
        put(&mut web, *place, 1);
    }
    let taken = take(&daemon, &["web@a"]);
    assert_eq!(taken[0]["bytes"], 64 * MIB);
    put(&mut web, places[0], 2);
    web.trim(places[1], BLOCK as u32).expect("trim");
    put(&mut web, places[3], 2);
    // Part of a block that only the snapshot has.
    web.write(places[2], &[7; 512]).expect("write");
    take(&daemon, &["web@b"]);
    put(&mut web, places[0], 3);
    web.flush().expect("flush");
    drop(web);

    for life in 0..2 {
        assert_eq!(names(&daemon, "web"), ["a", "b"]);
        let mut web = client(&daemon, "web");
        assert_eq!(
            bytes_at(&mut web, &[places[0], places[1], places[3]]),
            [3, 0, 2],
            "life {life}"
        );
        let mixed = web.read(places[2], BLOCK as u32).expect("read");
        assert!(mixed[..512].iter().all(|byte| *byte == 7) && mixed[512..].iter().all(|byte| *byte == 1));
        look_at(&daemon, "web", "a", |a| {
            assert_eq!(bytes_at(a, &places), [1, 1, 1, 0], "life {life}");
            assert!(a.write(0, &[9; 4096]).is_err(), "a snapshot was written");
        });
        look_at(&daemon, "web", "b", |b| {
            assert_eq!(bytes_at(b, &[places[0], places[1], places[3]]), [2, 0, 2]);
        });
        drop(web);
        daemon.kill();
        daemon.start_again();
    }
    let mut web = client(&daemon, "web");
    assert_eq!(byte_at(&mut web, places[0]), 3);
}

#[test]
fn a_vdi_goes_back_to_a_snapshot_and_forth_again() {
    let mut daemon = Daemon::with_disks(3, &[]);
    create(&daemon, "web", 3);
    let places = [0, 30 * MIB];
    let mut web = client(&daemon, "web");
    put(&mut web, places[0], 1);
    take(&daemon, &["web@a"]);
    put(&mut web, places[0], 2);
    put(&mut web, places[1], 2);
    drop(web);

    let back = |to: &str, more: Value| {
        let mut body = json!({ "to": to });
        body.as_object_mut()
            .expect("an object")
            .extend(more.as_object().expect("an object").clone());
        daemon.call("POST", "/v1/vdis/web/rollback", Some(&body))
    };
    let (code, answer) = back("a", json!({}));
    assert_eq!((code, &answer["code"]), (409, &json!("needs_force")), "{answer}");
    let (code, answer) = back("none", json!({"force": true}));
    assert_eq!(code, 404, "{answer}");
    let (code, answer) = back("a", json!({"force": true, "keep": "a"}));
    assert_eq!(code, 409, "{answer}");
    // Refused: nobody was hung up on, nothing changed.
    let mut web = client(&daemon, "web");
    assert_eq!(bytes_at(&mut web, &places), [2, 2]);
    let (code, answer) = back("a", json!({"force": true, "keep": "late"}));
    assert_eq!(code, 200, "{answer}");
    assert!(
        web.read(0, 4096).is_err(),
        "a guest sees another disk than it had"
    );

    let mut web = client(&daemon, "web");
    assert_eq!(bytes_at(&mut web, &places), [1, 0]);
    put(&mut web, places[1], 3);
    look_at(&daemon, "web", "late", |late| {
        assert_eq!(bytes_at(late, &places), [2, 2]);
    });
    drop(web);
    daemon.post("/v1/vdis/web/detach", &json!({}));
    daemon.post("/v1/vdis/web/rollback", &json!({"to": "late", "discard": true}));
    daemon.kill();
    daemon.start_again();
    daemon.attach_nbd("web");
    let mut web = client(&daemon, "web");
    assert_eq!(bytes_at(&mut web, &places), [2, 2]);
    assert_eq!(names(&daemon, "web"), ["a", "late"]);
    drop(web);

    // All records are lost: what the head read stays, the snapshots do not.
    daemon.stop();
    daemon.lose_state();
    let outcome = daemon.recover(3, &["--yes"]);
    assert_eq!(outcome.code, 0, "{outcome:?}");
    daemon.start_again();
    daemon.attach_nbd("web");
    let mut web = client(&daemon, "web");
    assert_eq!(bytes_at(&mut web, &places), [2, 2]);
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    let daemon = Daemon::with_disks(1, &[]);
    create(&daemon, "web", 1);
    take(&daemon, &["web@a"]);
    let asked = |method: &str, path: &str, body: Value| {
        let (code, answer) = daemon.call(method, path, Some(&body));
        let message = answer["message"].as_str().unwrap_or_default().to_owned();
        assert!(!message.contains('\n') && message.len() < 400, "{message}");
        (code, message)
    };
    let create = |names: Value| asked("POST", "/v1/snapshots", json!({ "snapshots": names }));
    assert_eq!(create(json!(["web@a"])).0, 409);
    assert_eq!(create(json!(["none@b"])).0, 404);
    // The second is refused: the first is not taken.
    assert_eq!(create(json!(["web@b", "none@b"])).0, 404);
    for wrong in [
        json!([]),
        json!(["web"]),
        json!(["web@"]),
        json!(["web@Ä"]),
        json!(["web@a/b"]),
        json!(["web@b", "web@c"]),
        json!(["web@time:2026-11-21T10:15:00Z"]),
        json!([format!("web@{}", "x".repeat(64))]),
        json!(vec!["web@a"; 17]),
    ] {
        let (code, message) = create(wrong.clone());
        assert_eq!(code, 400, "{wrong}: {message}");
    }
    assert_eq!(names(&daemon, "web"), ["a"]);
    daemon.post("/v1/vdis/web/snapshots/a/protect", &json!({"protected": true}));
    assert_eq!(asked("DELETE", "/v1/vdis/web/snapshots/a", json!({})).0, 409);
    daemon.post("/v1/vdis/web/detach", &json!({}));
    let (code, message) = asked("DELETE", "/v1/vdis/web", json!({}));
    assert_eq!(code, 409);
    assert!(
        message.contains("web@a"),
        "a protected snapshot goes with its VDI: {message}"
    );
    daemon.post("/v1/vdis/web/snapshots/a/protect", &json!({"protected": false}));
    let target = format!("nbd:unix:{}", daemon.path("a.nbd").display());
    let serve = json!({"target": target, "snapshot": "a"});
    daemon.post("/v1/vdis/web/attach", &serve);
    let (code, message) = asked("DELETE", "/v1/vdis/web/snapshots/a", json!({}));
    assert_eq!(code, 409);
    assert!(
        message.contains("web@a") && message.contains("a.nbd"),
        "{message}"
    );
    daemon.post("/v1/vdis/web/detach", &json!({ "target": target }));
    assert_eq!(asked("DELETE", "/v1/vdis/web/snapshots/a", json!({})).0, 204);
    assert_eq!(asked("DELETE", "/v1/vdis/web/snapshots/a", json!({})).0, 404);
    assert_eq!(asked("POST", "/v1/vdis/web/attach", serve).0, 404);
    let guest = json!({"target": "vhost-user:/run/a.sock", "snapshot": "a"});
    assert_eq!(asked("POST", "/v1/vdis/web/attach", guest).0, 400);
}

/// A chain of writes, each submitted when the one before was answered: to place 0, then place 1, and so on, round after
/// round. Whatever is one moment of it has at each place the number of the round, or of the one before, and never more at
/// a later place than at an earlier one.
struct Chain {
    /// VDI and offset.
    places: Vec<(PathBuf, u64)>,
    /// Rounds that were answered everywhere.
    done: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Chain {
    fn start(places: Vec<(PathBuf, u64)>, from: u64) -> Chain {
        let (done, stop) = (Arc::new(AtomicU64::new(from)), Arc::new(AtomicBool::new(false)));
        let thread = {
            let (done, stop, places) = (Arc::clone(&done), Arc::clone(&stop), places.clone());
            std::thread::spawn(move || {
                let mut clients: Vec<(NbdClient, u64)> = places
                    .iter()
                    .map(|(path, offset)| (NbdClient::connect(path).expect("connect"), *offset))
                    .collect();
                for round in from + 1.. {
                    for (client, offset) in &mut clients {
                        let block = round.to_le_bytes().repeat(BLOCK as usize / 8);
                        // The daemon may be killed: then the round is not answered.
                        if client.write(*offset, &block).is_err() {
                            return;
                        }
                    }
                    done.store(round, Ordering::SeqCst);
                    if stop.load(Ordering::SeqCst) {
                        return;
                    }
                }
            })
        };
        Chain {
            places,
            done,
            stop,
            thread: Some(thread),
        }
    }

    /// Rounds answered by now.
    fn done(&self) -> u64 {
        self.done.load(Ordering::SeqCst)
    }

    fn wait_for(&self, round: u64) {
        while self.done() < round {
            assert!(
                !self.thread.as_ref().expect("runs").is_finished(),
                "the writer ended"
            );
            std::thread::yield_now();
        }
    }

    fn end(&mut self) -> u64 {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.take().expect("runs").join().expect("the writer");
        self.done()
    }
}

fn round_at(client: &mut NbdClient, offset: u64) -> u64 {
    let data = client.read(offset, BLOCK as u32).expect("read");
    let (words, _) = data.as_chunks::<8>();
    assert!(
        words.iter().all(|word| *word == words[0]),
        "a torn block at {offset}"
    );
    u64::from_le_bytes(words[0])
}

/// The rounds that are seen must be those of one moment at which `least` rounds were answered.
fn is_one_moment(rounds: &[u64], least: u64, what: &str) {
    let (first, last) = (rounds[0], rounds[rounds.len() - 1]);
    assert!(
        rounds.is_sorted_by(|earlier, later| earlier >= later) && first <= last + 1,
        "{what}: no moment looked like this: {rounds:?}"
    );
    assert!(
        last >= least,
        "{what}: {rounds:?}, but {least} rounds were answered"
    );
}

#[test]
fn vdis_under_load_are_cut_at_one_moment() {
    // Two threads: not all of them are at home on one.
    let daemon = Daemon::with_disks(3, &["--cores", "2"]);
    for vdi in ["web", "db", "log"] {
        create(&daemon, vdi, 1);
    }
    let path = |vdi: &str| daemon.path(&format!("{vdi}.nbd"));
    let mut chains: Vec<Chain> = (0..3u64)
        .map(|no| {
            let all = (0..12u64).map(|step| {
                let vdi = ["web", "db", "log"][((step + no) % 3) as usize];
                (path(vdi), (step * 5 % 16) * 4 * MIB + no * BLOCK)
            });
            Chain::start(all.collect(), 0)
        })
        .collect();
    let mut taken = Vec::new();
    for number in 0..6u64 {
        for chain in &chains {
            chain.wait_for((number + 1) * 5);
        }
        let least: Vec<u64> = chains.iter().map(Chain::done).collect();
        let name = format!("s{number}");
        let all: Vec<String> = ["web", "db", "log"].map(|vdi| format!("{vdi}@{name}")).to_vec();
        let body = json!({ "snapshots": all });
        let (code, answer) = daemon.call("POST", "/v1/snapshots", Some(&body));
        match code {
            200 => taken.push((name, least)),
            // Held too long on a slow machine: then there is none, nowhere.
            503 => assert!(
                answer["message"].as_str().unwrap().contains("held together"),
                "{answer}"
            ),
            _ => panic!("{code} {answer}"),
        }
    }
    for chain in &mut chains {
        chain.end();
    }
    for vdi in ["web", "db", "log"] {
        let expected: Vec<&String> = taken.iter().map(|(name, _)| name).collect();
        assert_eq!(names(&daemon, vdi).iter().collect::<Vec<_>>(), expected);
    }
    assert!(!taken.is_empty(), "not one group of six could be held together");
    for (name, least) in &taken {
        for (chain, least) in chains.iter().zip(least) {
            let rounds: Vec<u64> = chain
                .places
                .iter()
                .map(|(path, offset)| {
                    let vdi = path.file_stem().expect("a name").to_str().expect("UTF-8");
                    look_at(&daemon, vdi, name, |client| round_at(client, *offset))
                })
                .collect();
            is_one_moment(&rounds, *least, name);
        }
    }
}

#[test]
fn a_kill_at_any_moment_of_a_snapshot_loses_nothing() {
    let mut daemon = Daemon::with_disks(3, &[]);
    create(&daemon, "web", 3);
    let path = daemon.path("web.nbd");
    let places: Vec<(PathBuf, u64)> = (0..8u64)
        .map(|step| (path.clone(), (step * 5 % 16) * 4 * MIB))
        .collect();
    let mut answered = 0;
    let mut taken: Vec<(String, u64)> = Vec::new();
    for life in 0..8u64 {
        let mut chain = Chain::start(places.clone(), answered);
        chain.wait_for(answered + 3);
        let name = format!("s{life}");
        let least = chain.done();
        let asking = {
            let socket = daemon.path("state/blockd.sock");
            let body = json!({ "snapshots": [format!("web@{name}")] }).to_string();
            std::process::Command::new("curl")
                .args(["--silent", "--output", "/dev/null", "--write-out", "%{http_code}"])
                .arg("--unix-socket")
                .arg(socket)
                .args(["--header", "content-type: application/json", "--data", &body])
                .arg("http://weft/v1/snapshots")
                .stdout(std::process::Stdio::piped())
                .spawn()
                .expect("curl")
        };
        // At another moment each time: some before it began, some after it was answered.
        chain.wait_for(least + life * 2);
        daemon.kill();
        let output = asking.wait_with_output().expect("curl");
        let was_answered = output.stdout == b"200";
        answered = chain.end();
        daemon.start_again();
        let mut web = client(&daemon, "web");
        let rounds: Vec<u64> = places
            .iter()
            .map(|(_, offset)| round_at(&mut web, *offset))
            .collect();
        is_one_moment(&rounds, answered, &format!("the head in life {life}"));
        answered = rounds[0];
        if names(&daemon, "web").contains(&name) {
            taken.push((name, least));
        } else {
            assert!(!was_answered, "snapshot {name} was answered and is not there");
        }
        for (name, least) in &taken {
            let rounds: Vec<u64> = look_at(&daemon, "web", name, |client| {
                places
                    .iter()
                    .map(|(_, offset)| round_at(client, *offset))
                    .collect()
            });
            is_one_moment(&rounds, *least, name);
        }
    }
    assert!(!taken.is_empty(), "no snapshot of eight was taken");
}
