//! `weft disk fsck` on disks of a pool that hold data: what it rebuilds the daemon takes as it is, and what it cannot
//! read it names, as the daemon does.

mod support;

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use support::{Daemon, MIB, Outcome, copy, damage, fill, flip_bits, verify, weft};

const SUPERBLOCKS: [u64; 2] = [0, 64 * 1024];

fn fsck(daemon: &Daemon, disk: usize, more: &[&str]) -> Outcome {
    let path = daemon.disk_path(disk);
    let mut words = vec!["disk", "fsck", path.to_str().expect("UTF-8")];
    words.extend(more);
    weft(&words)
}

/// Where the daemon has the index of its only disk.
fn index_of_the_disk(daemon: &Daemon) -> PathBuf {
    let mut folders = std::fs::read_dir(daemon.path("state/index")).expect("indexes");
    let folder = folders.next().expect("one").expect("readable").path();
    assert!(folders.next().is_none());
    folder
}

#[test]
fn an_index_that_fsck_rebuilt_is_taken_as_it_is() {
    let mut daemon = Daemon::with_disks(1, &[]);
    daemon.create_vdi("a", 64 * MIB, 1);
    daemon.attach_nbd("a");
    fill(&daemon, "a", 0, 300, 1);
    daemon.stop();
    let (index, yesterday) = (index_of_the_disk(&daemon), daemon.path("yesterday"));
    copy(&index, &yesterday);
    daemon.start_again();
    fill(&daemon, "a", 100, 300, 2);
    for is_deleted in [true, false] {
        daemon.kill();
        std::fs::remove_dir_all(&index).expect("remove");
        if !is_deleted {
            copy(&yesterday, &index);
        }
        let folder = index.to_str().expect("UTF-8");
        let done = fsck(&daemon, 1, &["--rebuild-index", "--index", folder]);
        assert!(
            done.code == 0 && done.out.contains("index rebuilt from"),
            "{done:?}"
        );
        let said_before = daemon.log().len();
        daemon.start_again();
        let log = daemon.log().split_off(said_before);
        assert!(log.contains("rebuilt: None"), "is_deleted {is_deleted}: {log}");
        verify(&daemon, "a", 0, 100, 1);
        verify(&daemon, "a", 100, 300, 2);
        // What is written over it is found again too.
        fill(&daemon, "a", 50, 20, 3);
        daemon.kill();
        daemon.start_again();
        verify(&daemon, "a", 0, 50, 1);
        verify(&daemon, "a", 50, 20, 3);
        verify(&daemon, "a", 100, 300, 2);
        fill(&daemon, "a", 50, 20, 1);
    }
}

#[test]
fn fsck_refuses_what_a_daemon_serves_and_changes_nothing() {
    let mut daemon = Daemon::with_disks(1, &[]);
    daemon.create_vdi("a", 16 * MIB, 1);
    daemon.attach_nbd("a");
    fill(&daemon, "a", 0, 10, 1);
    let index = index_of_the_disk(&daemon);
    let done = fsck(
        &daemon,
        1,
        &["--rebuild-index", "--index", index.to_str().expect("UTF-8")],
    );
    assert!(done.code == 5 && done.err.contains("locked"), "{done:?}");
    fill(&daemon, "a", 5, 10, 2);
    daemon.kill();
    daemon.start_again();
    verify(&daemon, "a", 0, 5, 1);
    verify(&daemon, "a", 5, 10, 2);
}

fn disk(daemon: &Daemon, number: usize) -> Value {
    let path = json!(daemon.disk_path(number));
    let disks = daemon.get("/v1/disks");
    let found = disks
        .as_array()
        .expect("a list")
        .iter()
        .find(|disk| disk["path"] == path);
    found.expect("listed").clone()
}

#[test]
fn a_superblock_in_turn_is_healed_by_the_next_start() {
    let mut daemon = Daemon::with_disks(1, &[]);
    daemon.create_vdi("a", 64 * MIB, 1);
    daemon.attach_nbd("a");
    fill(&daemon, "a", 0, 100, 1);
    for (round, offset) in (2..).zip(SUPERBLOCKS.into_iter().cycle().take(4)) {
        daemon.kill();
        damage(&daemon.disk_path(1), offset);
        let done = fsck(&daemon, 1, &[]);
        assert_eq!(done.code, 1, "{done:?}");
        assert!(
            done.out.contains(&format!("the superblock at {offset}\n")),
            "{done:?}"
        );
        daemon.start_again();
        verify(&daemon, "a", 0, 100, round - 1);
        fill(&daemon, "a", 0, 100, round);
    }
    daemon.kill();
    let done = fsck(&daemon, 1, &[]);
    assert!(done.code == 0, "each start wrote both anew: {done:?}");
}

/// The superblocks and the first segment.
fn head(disk: &Path) -> Vec<u8> {
    let mut bytes = vec![0; 33 * MIB as usize];
    let file = std::fs::File::open(disk).expect("open");
    file.read_exact_at(&mut bytes, 0).expect("read");
    bytes
}

/// A disk that cannot be read any more is named by everybody who meets it, never formatted by a slip, and its VDI
/// lives on from the other replica.
#[test]
fn without_both_superblocks_a_disk_is_refused_by_name_and_replaced() {
    for is_overwritten in [true, false] {
        let mut daemon = Daemon::with_disks(2, &[]);
        daemon.create_vdi("a", 64 * MIB, 2);
        daemon.attach_nbd("a");
        fill(&daemon, "a", 0, 100, 1);
        daemon.kill();
        let path = daemon.disk_path(1);
        for offset in SUPERBLOCKS {
            if is_overwritten {
                damage(&path, offset);
            } else {
                flip_bits(&path, offset + 40);
            }
        }
        let why = match is_overwritten {
            true => "no Weft superblock",
            false => "both superblocks are damaged",
        };
        let done = fsck(&daemon, 1, &["--rebuild-index", "--index", "/nonexistent/x/y"]);
        assert!(done.code == 1 && done.err.lines().count() == 1, "{done:?}");
        daemon.start_again();
        let lost = disk(&daemon, 1);
        assert_eq!(lost["state"], "missing", "{lost}");
        assert!(
            lost["reason"].as_str().is_some_and(|text| text.contains(why)),
            "{lost}"
        );
        let before = head(&path);
        let (code, refusal) = daemon.call("POST", "/v1/disks", Some(&json!({"path": path})));
        assert_eq!(
            (code, &refusal["code"]),
            (409, &json!("needs_force")),
            "{refusal}"
        );
        let message = refusal["message"].as_str().expect("a message");
        assert!(message.contains("superblocks"), "{refusal}");
        assert!(head(&path) == before, "a refusal wrote to the disk");
        verify(&daemon, "a", 0, 100, 1);
        fill(&daemon, "a", 50, 50, 2);
        let id = lost["id"].as_str().expect("an id");
        let with = json!({"with": {"path": path, "force": true}});
        daemon.post(&format!("/v1/disks/{id}/replace"), &with);
        daemon.until_health("a", "whole");
        // The new one alone has everything.
        daemon.stop();
        std::fs::remove_file(daemon.disk_path(2)).expect("take the other one away");
        daemon.start_again();
        verify(&daemon, "a", 0, 50, 1);
        verify(&daemon, "a", 50, 50, 2);
    }
}
