//! A daemon's ordinary life, as a user meets it.

mod support;

use std::process::Command;

use serde_json::json;
use support::{Daemon, GIB, NbdClient};

const MIB: u64 = 1 << 20;

#[test]
fn data_survives_kill_and_stop_and_space_comes_back() {
    let mut daemon = Daemon::with_disks(3, &[]);
    daemon.create_vdi("web01", 2 * GIB, 3);
    let socket = daemon.attach_nbd("web01");
    let block: Vec<u8> = (0..64 * 1024u32).map(|i| (i * 7 % 251) as u8).collect();
    let mut client = NbdClient::connect(&socket).expect("connect");
    assert_eq!(client.bytes, 2 * GIB);
    // Across the shard border, and unaligned to the 4 KiB block.
    for offset in [0, GIB - 32 * 1024, 2 * GIB - 64 * 1024, 512 * 3] {
        client.write(offset, &block).expect("write");
    }
    daemon.kill();
    daemon.start_again();
    let check = |daemon: &Daemon| {
        let mut client = NbdClient::connect(&daemon.path("web01.nbd")).expect("the door is open again");
        for offset in [GIB - 32 * 1024, 2 * GIB - 64 * 1024, 512 * 3] {
            assert!(
                client.read(offset, 64 * 1024).expect("read") == block,
                "content at {offset}"
            );
        }
        assert_eq!(client.read(0, 512).expect("read"), block[..512]);
        assert!(
            client
                .read(MIB, 4096)
                .expect("read")
                .iter()
                .all(|byte| *byte == 0)
        );
    };
    check(&daemon);
    daemon.stop();
    daemon.start_again();
    check(&daemon);
    daemon.until_health("web01", "whole");

    let shown = daemon.get("/v1/vdis/web01");
    assert_eq!(shown["used_bytes"].as_u64().expect("used"), 49 * 4096, "{shown}");
    assert_eq!(
        shown["stored_bytes"].as_u64().expect("stored"),
        3 * 49 * 4096,
        "{shown}"
    );
    let mut client = NbdClient::connect(&socket).expect("connect");
    client.trim(GIB - MIB, MIB as u32).expect("trim");
    assert!(
        client
            .read(GIB - MIB, MIB as u32)
            .expect("read")
            .iter()
            .all(|byte| *byte == 0)
    );
    drop(client);

    let (code, refusal) = daemon.call("DELETE", "/v1/vdis/web01", None);
    assert_eq!(code, 409, "{refusal}");
    daemon.post("/v1/vdis/web01/detach", &json!({}));
    let (code, answer) = daemon.call("DELETE", "/v1/vdis/web01", None);
    assert!((200..300).contains(&code), "{answer}");
    daemon.until("the space is back", |daemon| {
        daemon.get("/v1/vdis").as_array().is_some_and(Vec::is_empty)
            && daemon.metric("weft_disk_live_bytes") == 0
    });
}

#[test]
fn a_vdi_grows_while_in_use() {
    let daemon = Daemon::with_disks(1, &[]);
    daemon.create_vdi("grow", 64 * MIB, 1);
    let socket = daemon.attach_nbd("grow");
    let mut client = NbdClient::connect(&socket).expect("connect");
    client.write(0, &[7; 4096]).expect("write");
    assert!(client.write(64 * MIB, &[8; 4096]).is_err(), "past the end");
    daemon.post("/v1/vdis/grow/resize", &json!({"bytes": 3 * GIB}));
    let mut larger = NbdClient::connect(&socket).expect("connect");
    assert_eq!(larger.bytes, 3 * GIB);
    larger
        .write(3 * GIB - 4096, &[9; 4096])
        .expect("write at the new end");
    assert_eq!(client.read(0, 4096).expect("read"), [7; 4096]);
    let (code, refusal) = daemon.call("POST", "/v1/vdis/grow/resize", Some(&json!({"bytes": GIB})));
    assert_eq!(code, 400, "{refusal}");
}

#[test]
fn qemu_img_round_trip() {
    let daemon = Daemon::with_disks(2, &[]);
    daemon.create_vdi("image", 256 * MIB, 2);
    let socket = daemon.attach_nbd("image");
    let (source, back) = (daemon.path("source.raw"), daemon.path("back.raw"));
    let content: Vec<u8> = (0..200 * MIB / 8)
        .flat_map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15)).to_le_bytes())
        .collect();
    std::fs::write(&source, &content).expect("write");
    std::fs::File::options()
        .write(true)
        .open(&source)
        .expect("open")
        .set_len(256 * MIB)
        .expect("sparse end");
    let uri = format!("nbd+unix:///image?socket={}", socket.display());
    let qemu_img = |arguments: &[&str]| {
        let output = Command::new("qemu-img")
            .args(arguments)
            .output()
            .expect("qemu-img (Debian package qemu-utils)");
        assert!(
            output.status.success(),
            "{arguments:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    };
    let (from, to) = (source.to_str().expect("UTF-8"), back.to_str().expect("UTF-8"));
    qemu_img(&["convert", "-n", "-f", "raw", "-O", "raw", from, &uri]);
    qemu_img(&["compare", "-f", "raw", "-F", "raw", from, &uri]);
    qemu_img(&["convert", "-f", "raw", "-O", "raw", &uri, to]);
    assert!(
        std::fs::read(&source).expect("read") == std::fs::read(&back).expect("read"),
        "content differs"
    );
    let used = daemon.get("/v1/vdis/image")["used_bytes"].as_u64().expect("used");
    assert!(
        (200 * MIB..=201 * MIB).contains(&used),
        "the hole at the end takes no space: {used}"
    );
}

#[test]
fn an_idle_daemon_sleeps() {
    let mut daemon = Daemon::with_disks(2, &[]);
    daemon.create_vdi("idle", GIB, 2);
    let socket = daemon.attach_nbd("idle");
    let mut client = NbdClient::connect(&socket).expect("connect");
    client.write(0, &[1; 4096]).expect("write");
    client.flush().expect("flush");
    daemon.until_health("idle", "whole");
    let ticks = |daemon: &Daemon| {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", daemon.pid())).expect("stat");
        let fields: Vec<&str> = stat
            .rsplit_once(')')
            .expect("name")
            .1
            .split_whitespace()
            .collect();
        fields[11].parse::<u64>().expect("utime") + fields[12].parse::<u64>().expect("stime")
    };
    let before = ticks(&daemon);
    std::thread::sleep(std::time::Duration::from_secs(5)); // What is measured is sleep.
    let used = ticks(&daemon) - before;
    assert!(used <= 5, "{used} ticks of 10 ms in 5 s: more than 1 % of a core");
}
