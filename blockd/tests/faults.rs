//! Disks that fail, leave, return and lie under a running daemon.

mod support;

use std::io::{Seek, SeekFrom, Write};

use serde_json::{Value, json};
use support::{Daemon, LoopDisk, NbdClient};

const MIB: u64 = 1 << 20;

fn fill(client: &mut NbdClient, from: u64, count: u64, byte: u8) {
    for number in from..from + count {
        let mut data = vec![byte; 64 * 1024];
        data[..8].copy_from_slice(&number.to_le_bytes());
        client.write(number * 64 * 1024, &data).expect("write");
    }
}

fn verify(client: &mut NbdClient, from: u64, count: u64, byte: u8) {
    for number in from..from + count {
        let data = client.read(number * 64 * 1024, 64 * 1024).expect("read");
        assert_eq!(data[..8], number.to_le_bytes(), "at {number}");
        assert!(data[8..].iter().all(|found| *found == byte), "at {number}");
    }
}

#[test]
fn noise_over_a_disk_is_read_around_and_scrubbed_away() {
    let mut daemon = Daemon::with_disks(3, &[]);
    daemon.create_vdi("noisy", 64 * MIB, 3);
    let socket = daemon.attach_nbd("noisy");
    let mut client = NbdClient::connect(&socket).expect("connect");
    fill(&mut client, 0, 512, 0xa5);
    client.flush().expect("flush");
    let noise: Vec<u8> = (0..MIB as u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    let mut disk = std::fs::File::options()
        .write(true)
        .open(daemon.disk_path(2))
        .expect("open");
    disk.seek(SeekFrom::Start(MIB + 64 * 1024)).expect("seek");
    for _ in 0..40 {
        disk.write_all(&noise).expect("noise");
    }
    disk.sync_all().expect("sync");
    verify(&mut client, 0, 512, 0xa5);
    daemon.post("/v1/scrub", &json!({}));
    daemon.until("the scrub ends", |daemon| {
        daemon.get("/v1/scrub")["scrubs"][0]["ended"].is_string()
    });
    let scrub = daemon.get("/v1/scrub");
    assert_eq!(scrub["scrubs"][0]["unreadable"], 0, "{scrub}");
    assert!(daemon.metric("weft_blocks_repaired_total") > 0);
    daemon.post("/v1/scrub", &json!({}));
    daemon.until("the second scrub ends", |daemon| {
        daemon.get("/v1/scrub")["scrubs"][0]["ended"].is_string()
    });
    let scrub = daemon.get("/v1/scrub");
    assert_eq!(
        scrub["scrubs"][0]["repaired"], 0,
        "everything was repaired by the first: {scrub}"
    );
    verify(&mut client, 0, 512, 0xa5);
}

fn go_on_without_a_failed_disk(replicas: u8) {
    let mut daemon = Daemon::with_disks(usize::from(replicas) - 1, &[]);
    let failing = LoopDisk::new(daemon.path("failing.img"));
    let added = daemon.post("/v1/disks", &json!({"path": failing.device}));
    daemon.create_vdi("hurt", 64 * MIB, replicas);
    let socket = daemon.attach_nbd("hurt");
    let mut client = NbdClient::connect(&socket).expect("connect");
    fill(&mut client, 0, 256, 1);
    failing.fail();
    fill(&mut client, 128, 256, 2);
    client.flush().expect("flush");
    daemon.until_health("hurt", "degraded");
    verify(&mut client, 0, 128, 1);
    verify(&mut client, 128, 256, 2);
    let lost = added["id"].as_str().expect("an id");
    let body = json!({"with": {"path": daemon.disk_path(9), "create_bytes": support::GIB}});
    daemon.post(&format!("/v1/disks/{lost}/replace"), &body);
    daemon.until_health("hurt", "whole");
    verify(&mut client, 0, 128, 1);
    verify(&mut client, 128, 256, 2);
    daemon.until("the lost disk is gone", |daemon| {
        let disks = daemon.get("/v1/disks");
        disks
            .as_array()
            .expect("a list")
            .iter()
            .all(|disk| disk["id"] != json!(lost))
    });
}

#[test]
fn two_replicas_go_on_without_a_failed_disk() {
    go_on_without_a_failed_disk(2);
}

#[test]
fn three_replicas_go_on_without_a_failed_disk() {
    go_on_without_a_failed_disk(3);
}

#[test]
fn a_disk_that_was_away_gets_only_what_changed() {
    let mut daemon = Daemon::with_disks(3, &[]);
    daemon.create_vdi("away", 128 * MIB, 3);
    let socket = daemon.attach_nbd("away");
    let mut client = NbdClient::connect(&socket).expect("connect");
    fill(&mut client, 0, 1024, 1);
    client.flush().expect("flush");
    drop(client);
    daemon.stop();
    let (here, elsewhere) = (daemon.disk_path(3), daemon.path("elsewhere.img"));
    std::fs::rename(&here, &elsewhere).expect("take the disk away");
    daemon.start_again();
    let mut client = NbdClient::connect(&socket).expect("connect");
    fill(&mut client, 10, 16, 2);
    daemon.until_health("away", "degraded");
    // It is noticed without being told.
    std::fs::rename(&elsewhere, &here).expect("bring it back");
    daemon.until_health("away", "whole");
    let moved = daemon.metric("weft_blocks_resynced_total");
    assert!(
        (256..=512).contains(&moved),
        "16 writes of 16 blocks were missed, {moved} blocks moved"
    );
    verify(&mut client, 0, 10, 1);
    verify(&mut client, 10, 16, 2);
}

#[test]
fn a_full_pool_makes_writes_wait_until_there_is_space() {
    let mut daemon = Daemon::with_disks(1, &[]);
    daemon.create_vdi("filler", 512 * MIB, 1);
    daemon.create_vdi("big", 2 * support::GIB, 1);
    let mut filler = NbdClient::connect(&daemon.attach_nbd("filler")).expect("connect");
    fill(&mut filler, 0, 400 * 16, 7);
    drop(filler);
    daemon.post("/v1/vdis/filler/detach", &json!({}));
    let socket = daemon.attach_nbd("big");
    // 600 MiB more than fit beside the filler: the writer gets stuck, and must not be told of an error.
    let writer = std::thread::spawn({
        let socket = socket.clone();
        move || {
            let mut client = NbdClient::connect(&socket).expect("connect");
            fill(&mut client, 0, 600 * 16, 9);
            client.flush().expect("flush");
        }
    });
    daemon.until("writes wait", |daemon| {
        daemon.metric("weft_disk_waiting_for_space") > 0
    });
    let mut reader = NbdClient::connect(&socket).expect("connect");
    verify(&mut reader, 0, 100, 9);
    assert!(!writer.is_finished());
    let events = daemon.get("/v1/status")["events"].to_string();
    assert!(events.contains("full"), "{events}");
    let (code, answer) = daemon.call("DELETE", "/v1/vdis/filler", None);
    assert!((200..300).contains(&code), "{answer}");
    daemon.until("the writer is done", |_| writer.is_finished());
    writer.join().expect("no write failed");
    verify(&mut reader, 0, 600 * 16, 9);
}

#[test]
fn wrong_requests_are_refused_and_change_nothing() {
    let daemon = Daemon::with_disks(1, &[]);
    daemon.create_vdi("one", 16 * MIB, 1);
    let before = daemon.get("/v1/vdis");
    let attach = |target: &str| json!({"target": target});
    let disk = daemon.disk_path(1);
    let cases: Vec<(&str, &str, Value, u16)> = vec![
        ("POST", "/v1/pool", json!({"name": "again"}), 409),
        (
            "POST",
            "/v1/vdis",
            json!({"name": "one", "bytes": 16 * MIB, "replicas": 1}),
            409,
        ),
        (
            "POST",
            "/v1/vdis",
            json!({"name": "two", "bytes": 16 * MIB, "replicas": 2}),
            503,
        ),
        (
            "POST",
            "/v1/vdis",
            json!({"name": "UPPER", "bytes": 16 * MIB, "replicas": 1}),
            400,
        ),
        (
            "POST",
            "/v1/vdis",
            json!({"name": "x", "bytes": 1, "replicas": 1}),
            400,
        ),
        (
            "POST",
            "/v1/vdis",
            json!({"name": "x", "bytes": u64::MAX, "replicas": 1}),
            400,
        ),
        (
            "POST",
            "/v1/vdis",
            json!({"name": "x", "bytes": 16 * MIB, "replicas": 4}),
            400,
        ),
        (
            "POST",
            "/v1/vdis",
            json!({"name": "x", "bytes": 16 * MIB, "sector_bytes": 1024}),
            400,
        ),
        (
            "POST",
            "/v1/vdis",
            json!({"name": "x", "bytes": 16 * MIB, "colour": "blue"}),
            400,
        ),
        ("POST", "/v1/vdis/none/attach", attach("nbd:unix:/tmp/x"), 404),
        ("POST", "/v1/vdis/one/attach", attach("iscsi:x"), 400),
        ("POST", "/v1/vdis/one/attach", attach("nbd:unix:relative"), 400),
        ("POST", "/v1/vdis/one/resize", json!({"bytes": 1000}), 400),
        ("POST", "/v1/disks", json!({"path": disk}), 409),
        ("POST", "/v1/disks", json!({"path": "/does/not/exist"}), 404),
        ("POST", "/v1/disks", json!({"path": "/etc/passwd"}), 400),
        ("GET", "/v1/vdis/none", Value::Null, 404),
        ("DELETE", "/v1/vdis/none", Value::Null, 404),
        ("GET", "/v2/vdis", Value::Null, 404),
    ];
    for (method, path, body, wanted) in cases {
        let body = (!body.is_null()).then_some(body);
        let (code, answer) = daemon.call(method, path, body.as_ref());
        assert_eq!(code, wanted, "{method} {path} {body:?}: {answer}");
        assert!(
            answer["message"].as_str().is_some_and(|text| !text.is_empty()),
            "{answer}"
        );
    }
    assert_eq!(daemon.get("/v1/vdis"), before);
    assert_eq!(daemon.get("/v1/disks").as_array().map(Vec::len), Some(1));
}
