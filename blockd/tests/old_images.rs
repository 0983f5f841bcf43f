//! Disks and records that earlier versions wrote, kept: each must be read for as long as there are any in the world.
//!
//! `tests/images/format-N.tar.gz` is what a daemon of format version N left behind when it was killed: its records, its
//! index, one disk. A new version needs an image of its own before it is released:
//!
//! ```sh
//! cargo test -p weft-blockd --test old_images -- --ignored make_an_image
//! ```

mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;
use support::{Daemon, GIB, MIB, NbdClient};

const SECTOR: usize = 512;
const VDI_BYTES: u64 = 2 * GIB;

/// What was done to the VDI `kept` of every image: never to be changed, only added to with a new version's number.
enum Step {
    /// At an offset, so many bytes, of a content that this number makes.
    Write(u64, usize, u8),
    Trim(u64, u32),
    Flush,
}

fn steps() -> Vec<Step> {
    let mut steps = Vec::new();
    for number in 0..60 {
        steps.push(Step::Write(number * 64 * 1024, 64 * 1024, number as u8));
    }
    steps.extend([
        Step::Flush,
        // Over it, whole blocks and parts of some.
        Step::Write(10 * 64 * 1024, 128 * 1024, 101),
        Step::Write(20 * 64 * 1024 + 512, 512, 102),
        Step::Write(30 * 64 * 1024 + 3 * 512, 7 * 512, 103),
        // Into the next shard.
        Step::Write(GIB - 32 * 1024, 64 * 1024, 104),
        Step::Write(VDI_BYTES - 4096, 4096, 105),
        Step::Trim(40 * 64 * 1024, 128 * 1024),
        Step::Trim(50 * 64 * 1024 + 1024, 8192),
        Step::Write(41 * 64 * 1024, 4096, 106),
        Step::Flush,
    ]);
    steps
}

/// Compressible, and different in each sector.
fn content(offset: u64, bytes: usize, number: u8) -> Vec<u8> {
    let mut data = vec![number; bytes];
    for (sector, chunk) in (offset / SECTOR as u64..).zip(data.chunks_mut(SECTOR)) {
        chunk[..8].copy_from_slice(&sector.to_le_bytes());
    }
    data
}

/// Each sector that a step touched, as it must read.
fn expected() -> BTreeMap<u64, Vec<u8>> {
    let mut sectors = BTreeMap::new();
    for step in steps() {
        let (offset, data) = match step {
            Step::Write(offset, bytes, number) => (offset, content(offset, bytes, number)),
            // A trim is a hint: of a block that it covers in part, nothing goes.
            Step::Trim(offset, bytes) => {
                let (first, end) = (
                    offset.next_multiple_of(4096),
                    (offset + u64::from(bytes)) / 4096 * 4096,
                );
                (first, vec![0; (end - first) as usize])
            }
            Step::Flush => continue,
        };
        for (at, chunk) in (offset..).step_by(SECTOR).zip(data.chunks(SECTOR)) {
            sectors.insert(at, chunk.to_vec());
        }
    }
    sectors
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/images")
}

fn image(version: u64) -> PathBuf {
    folder().join(format!("format-{version}.tar.gz"))
}

fn tar(arguments: &[&str], archive: &Path, home: &Path, names: &[&str]) {
    let mut command = Command::new("tar");
    command
        .args(arguments)
        .arg(archive)
        .arg("--directory")
        .arg(home)
        .args(names);
    assert!(command.status().expect("tar").success(), "{command:?}");
}

/// A daemon on what an image holds, under another path than it had.
fn unpack(version: u64, has_index: bool) -> Daemon {
    let mut daemon = Daemon::start(&[]);
    daemon.stop();
    for part in ["state/control", "state/index"] {
        std::fs::remove_dir_all(daemon.path(part)).expect("its own state");
    }
    tar(
        &["--extract", "--gzip", "--file"],
        &image(version),
        daemon.home.path(),
        &[],
    );
    if !has_index {
        std::fs::remove_dir_all(daemon.path("state/index")).expect("an index");
    }
    daemon.start_again();
    daemon.post("/v1/disks", &json!({"path": daemon.disk_path(1)}));
    daemon
}

fn verify(daemon: &Daemon) {
    let mut client = NbdClient::connect(&daemon.path("kept.nbd")).expect("connect");
    assert_eq!(client.bytes, VDI_BYTES);
    for (at, wanted) in expected() {
        let found = client.read(at, SECTOR as u32).expect("read");
        assert!(
            found == wanted,
            "sector at {at}: {:?}, not {:?}",
            &found[..16],
            &wanted[..16]
        );
    }
    let untouched = client.read(100 * MIB, 64 * 1024).expect("read");
    assert!(untouched.iter().all(|byte| *byte == 0));
}

#[test]
fn every_image_that_was_kept_is_read_and_written() {
    let known = Daemon::start(&[]).get("/v1/version")["disk_format"]
        .as_u64()
        .expect("a version");
    let kept = std::fs::read_dir(folder()).expect("images").count() as u64;
    assert_eq!(kept, known, "each version of the format has its image");
    for (version, has_index) in (1..=known).flat_map(|version| [(version, true), (version, false)]) {
        let mut daemon = unpack(version, has_index);
        let rebuilt = if has_index {
            "rebuilt: None"
        } else {
            "rebuilt: Some(Missing)"
        };
        assert!(daemon.log().contains(rebuilt), "{}", daemon.log());
        daemon.attach_nbd("kept");
        verify(&daemon);
        let vdis = daemon.get("/v1/vdis");
        assert_eq!(vdis.as_array().map(Vec::len), Some(1), "one was deleted: {vdis}");
        let mut client = NbdClient::connect(&daemon.path("kept.nbd")).expect("connect");
        client.write(200 * MIB, &[9; 64 * 1024]).expect("write");
        client.flush().expect("flush");
        daemon.kill();
        daemon.start_again();
        verify(&daemon);
        let mut client = NbdClient::connect(&daemon.path("kept.nbd")).expect("connect");
        assert!(client.read(200 * MIB, 64 * 1024).expect("read") == [9; 64 * 1024]);
    }
}

/// Not in a folder whose name says who made it, and without what RocksDB notes of the machine it ran on.
#[test]
#[ignore = "makes the image of today's format version, which is there already"]
fn make_an_image() {
    let home = tempfile::Builder::new()
        .prefix("weft-image-")
        .tempdir_in("/var/tmp");
    let mut daemon = Daemon::start_in(home.expect("a folder"), &[]);
    let version = daemon.get("/v1/version")["disk_format"]
        .as_u64()
        .expect("a version");
    let archive = image(version);
    assert!(!archive.exists(), "{} is never made again", archive.display());
    daemon.post("/v1/pool", &json!({"name": "kept"}));
    daemon.add_disk(1);
    daemon.create_vdi("gone", 16 * MIB, 1);
    daemon.create_vdi("kept", VDI_BYTES, 1);
    daemon.attach_nbd("gone");
    support::fill(&daemon, "gone", 0, 20, 77);
    daemon.post("/v1/vdis/gone/detach", &json!({}));
    let socket = daemon.attach_nbd("kept");
    let mut client = NbdClient::connect(&socket).expect("connect");
    for (number, step) in steps().into_iter().enumerate() {
        match step {
            Step::Write(offset, bytes, number) => client.write(offset, &content(offset, bytes, number)),
            Step::Trim(offset, bytes) => client.trim(offset, bytes),
            Step::Flush => client.flush(),
        }
        .expect("a step");
        if number == 40 {
            // An index with something in it: a clean stop takes a checkpoint, or the next start does.
            daemon.stop();
            daemon.start_again();
            client = NbdClient::connect(&socket).expect("connect");
        }
    }
    let (code, answer) = daemon.call("DELETE", "/v1/vdis/gone", None);
    assert!((200..300).contains(&code), "{answer}");
    daemon.until("it is gone", |daemon| {
        daemon
            .get("/v1/vdis")
            .as_array()
            .is_some_and(|vdis| vdis.len() == 1)
    });
    client.flush().expect("flush");
    daemon.post("/v1/vdis/kept/detach", &json!({}));
    daemon.kill();
    std::fs::create_dir_all(folder()).expect("a folder");
    // What was preallocated and never written becomes a hole.
    let (disk, holey) = (daemon.disk_path(1), daemon.path("holey.img"));
    support::copy(&disk, &holey);
    std::fs::rename(&holey, &disk).expect("rename");
    let arguments = [
        "--create",
        "--gzip",
        "--sparse",
        "--owner=0",
        "--group=0",
        "--exclude=LOG*",
        "--exclude=OPTIONS-*",
        "--exclude=LOCK",
        "--file",
    ];
    tar(
        &arguments,
        &archive,
        daemon.home.path(),
        &["state/control", "state/index", "disk1.img"],
    );
}
