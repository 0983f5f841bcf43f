//! A disk comes to a pool whose disks are full of shards: it takes its share, in the background, and no shard is ever short of
//! a copy.

mod support;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value, json};
use support::{Daemon, MIB, NbdClient, fill, verify, weft, weft_program};

/// A VDI of 96 MiB in shards of 2 MiB, so that a disk of 1 GiB has enough of them on it to be worth moving.
const SHARD: u64 = 2 * MIB;
const SHARDS: u64 = 48;
const PIECES: u64 = SHARDS * SHARD / (64 * 1024);

/// Two disks hold all shards in two copies; guests read and write.
fn full_pool(more: &str) -> (Daemon, tempfile::NamedTempFile) {
    let config = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(config.path(), more).expect("write");
    let daemon = Daemon::with_disks(2, &["--config", config.path().to_str().expect("UTF-8")]);
    let create = json!({"name": "a", "bytes": SHARDS * SHARD, "replicas": 2, "shard_bytes": SHARD});
    daemon.post("/v1/vdis", &create);
    daemon.attach_nbd("a");
    fill(&daemon, "a", 0, PIECES, 7);
    (daemon, config)
}

fn replicas(daemon: &Daemon) -> Vec<u64> {
    let disks = daemon.get("/v1/disks");
    let disks = disks.as_array().expect("a list").iter();
    let mut counts: Vec<u64> = disks
        .map(|disk| disk["replicas"].as_u64().expect("a number"))
        .collect();
    counts.sort_unstable();
    counts
}

/// Every shard has both copies, in sync.
fn is_whole(daemon: &Daemon) -> bool {
    let vdi = daemon.get("/v1/vdis/a");
    let all = |field: &str| -> u64 {
        let disks = vdi["disks"].as_array().expect("its disks").iter();
        disks.map(|disk| disk[field].as_u64().expect("a number")).sum()
    };
    vdi["health"] == "whole" && all("replicas") == 2 * SHARDS && all("in_sync") == 2 * SHARDS
}

fn has_said(daemon: &Daemon, words: &str) -> bool {
    daemon.get("/v1/status")["events"].to_string().contains(words)
}

/// A guest that writes the VDI over and over, until told to stop; at least once whole.
struct Guest {
    stop: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<()>,
}

impl Guest {
    fn begin(daemon: &Daemon, byte: u8) -> Guest {
        let stop = Arc::new(AtomicBool::new(false));
        let (path, stopped) = (daemon.path("a.nbd"), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            let mut client = NbdClient::connect(&path).expect("connect");
            let mut passes = 0;
            while passes == 0 || !stopped.load(Ordering::Acquire) {
                for piece in 0..PIECES {
                    client
                        .write(piece * 64 * 1024, &[byte; 64 * 1024])
                        .expect("write");
                }
                passes += 1;
            }
            client.flush().expect("flush");
        });
        Guest { stop, thread }
    }

    fn end(self) {
        self.stop.store(true, Ordering::Release);
        self.thread.join().expect("the guest's writes were done");
    }
}

#[test]
fn a_new_disk_takes_its_share_and_no_shard_is_ever_short_of_a_copy() {
    let (mut daemon, _config) = full_pool("");
    let guest = Guest::begin(&daemon, 9);
    daemon.add_disk(3);
    daemon.until("the disks are even", |daemon| {
        assert!(is_whole(daemon), "{}", daemon.get("/v1/vdis/a"));
        has_said(daemon, "the pool is even again")
    });
    guest.end();
    let counts = replicas(&daemon);
    // The mean is 32; all are within a tenth of it.
    assert!(counts[0] >= 29 && counts[2] <= 35, "{counts:?}");
    assert!(is_whole(&daemon));
    // Also between two looks: no copy was ever out of sync.
    assert!(!daemon.log().contains("is out of sync"), "{}", daemon.log());
    verify(&daemon, "a", 0, PIECES, 9);
    daemon.kill();
    daemon.start_again();
    verify(&daemon, "a", 0, PIECES, 9);
    daemon.until("it is whole", |daemon| is_whole(daemon));
    // What is even stays: asked for, there is nothing to do.
    let plan = daemon.get("/v1/rebalance");
    assert_eq!(
        (&plan["moves"], &plan["is_wanted"]),
        (&json!(0), &json!(false)),
        "{plan}"
    );
}

/// Slowly, and killed in the middle: it goes on, not faster than it may, and the status says how far it is.
#[test]
fn it_keeps_its_pace_and_goes_on_after_a_kill() {
    // Built before anything moves: that may take longer.
    weft_program();
    let (mut daemon, _config) = full_pool("replace_bandwidth = '1MiB'");
    daemon.add_disk(3);
    let mut begun = None;
    let mut before_the_kill = 0;
    daemon.until("some have moved, and it is said how many are left", |daemon| {
        let moved = replicas(daemon)[0];
        if moved > 0 {
            begun.get_or_insert_with(std::time::Instant::now);
        }
        before_the_kill = moved;
        let status = daemon.get("/v1/status");
        let rebalance = &status["rebalance"];
        moved >= 6 && rebalance["moves_left"].as_u64() > Some(0) && rebalance["seconds_left"].is_u64()
    });
    // Two begin at once; each of the others has waited for the bytes of one before it: 2 MiB, at 1 MiB a second.
    let least = std::time::Duration::from_secs(2 * (before_the_kill - 3));
    assert!(
        begun.expect("seen").elapsed() >= least,
        "{before_the_kill} in {:?}",
        begun.expect("seen").elapsed()
    );
    let socket = daemon.path("state/blockd.sock").display().to_string();
    let shown = weft(&["--socket", &socket, "status"]);
    assert!(shown.out.contains("disks are made evenly full"), "{shown:?}");
    daemon.kill();
    daemon.start_again();
    daemon.until("it goes on", |daemon| replicas(daemon)[0] > before_the_kill + 1);
    assert!(!daemon.log().contains("is out of sync"), "{}", daemon.log());
    verify(&daemon, "a", 0, PIECES, 7);
}

#[test]
fn switched_off_it_is_done_when_asked_for() {
    let (mut daemon, _config) = full_pool("rebalance = false");
    daemon.add_disk(3);
    let socket = daemon.path("state/blockd.sock").display().to_string();
    let dry = weft(&["--socket", &socket, "pool", "rebalance", "--dry-run"]);
    assert_eq!(dry.code, 0, "{dry:?}");
    assert!(
        dry.out.contains("replicas would move") && dry.out.contains("the setting `rebalance` is off"),
        "{dry:?}"
    );
    let plan = daemon.get("/v1/rebalance");
    let new = disk_of(&daemon, 3)["id"].clone();
    let first = plan["first"].as_array().expect("moves");
    assert!(first.iter().all(|one| one["to"] == new), "{plan}");
    // Each of a shard of its own: two copies of one are not on one disk.
    let shards: BTreeSet<u64> = first
        .iter()
        .map(|one| one["shard"].as_u64().expect("a number"))
        .collect();
    assert_eq!(shards.len(), first.len());
    // Long enough for one that is on by itself.
    let since = std::time::Instant::now();
    daemon.until("time has passed", |_| since.elapsed().as_secs() >= 8);
    assert_eq!(replicas(&daemon), [0, SHARDS, SHARDS], "nobody asked");
    let asked = weft(&["--socket", &socket, "pool", "rebalance"]);
    assert_eq!(asked.code, 0, "{asked:?}");
    daemon.until("the disks are even", |daemon| {
        has_said(daemon, "the pool is even again")
    });
    assert!(replicas(&daemon)[0] >= 29, "{:?}", replicas(&daemon));
    verify(&daemon, "a", 0, PIECES, 7);
}

fn disk_of(daemon: &Daemon, number: usize) -> Value {
    let path = json!(daemon.disk_path(number));
    let disks = daemon.get("/v1/disks");
    let mut disks = disks.as_array().expect("a list").iter();
    disks
        .find(|disk| disk["path"] == path)
        .cloned()
        .unwrap_or(Value::Null)
}

/// A disk that leaves is emptied at the same pace, each copy there before the old one goes, and it is said how long it takes.
#[test]
fn a_disk_is_emptied_at_its_pace() {
    let (mut daemon, _config) = full_pool("rebalance = false\nreplace_bandwidth = '8MiB'");
    daemon.add_disk(3);
    let id = disk_of(&daemon, 1)["id"].as_str().expect("an id").to_owned();
    let since = std::time::Instant::now();
    let (code, answer) = daemon.call("DELETE", &format!("/v1/disks/{id}"), None);
    assert_eq!(code, 200, "{answer}");
    let mut was_said = false;
    daemon.until("it has left", |daemon| {
        let status = daemon.get("/v1/status");
        was_said |= status["moves"][0]["seconds_left"].is_u64()
            && status["moves"][0]["replicas_left"].as_u64() > Some(0);
        disk_of(daemon, 1).is_null()
    });
    // 48 shards of 2 MiB, at 8 MiB a second; the last two are not waited for, nor the first two.
    assert!(
        since.elapsed() >= std::time::Duration::from_secs(10),
        "{:?}",
        since.elapsed()
    );
    assert!(was_said, "how long it takes");
    assert!(is_whole(&daemon));
    assert!(!daemon.log().contains("is out of sync"), "{}", daemon.log());
    std::fs::remove_file(daemon.disk_path(1)).expect("nothing reads it any more");
    verify(&daemon, "a", 0, PIECES, 7);
}
