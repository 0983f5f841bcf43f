//! What people do to disks and state directories while nobody looks: deleted indexes, damaged superblocks, old
//! copies put back, a disk carried to another daemon.

mod support;

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use serde_json::json;
use support::{Daemon, GIB, MIB, copy, damage, fill, verify};

/// A batch in a disk's log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Batch {
    number: u64,
    offset: u64,
    entries: u16,
}

/// The youngest batches of a disk, oldest first, as docs/format.md describes them.
fn last_batches(disk: &Path) -> Vec<Batch> {
    const FIRST_SEGMENT: u64 = MIB;
    let file = std::fs::File::open(disk).expect("open");
    let segment_bytes = {
        let mut field = [0; 8];
        file.read_exact_at(&mut field, 56).expect("superblock");
        u64::from_le_bytes(field)
    };
    let mut found = Vec::new();
    let mut block = [0; 4096];
    let mut start = FIRST_SEGMENT;
    while start + segment_bytes <= GIB {
        let mut at = start + 4096;
        while at < start + segment_bytes {
            file.read_exact_at(&mut block, at).expect("read");
            let field = |at: usize| u64::from_le_bytes(block[at..at + 8].try_into().expect("eight bytes"));
            if &block[..4] != b"WFTB" {
                break;
            }
            let half = |at: usize| u16::from_le_bytes([block[at], block[at + 1]]);
            found.push(Batch {
                number: field(40),
                offset: at,
                entries: half(12),
            });
            at += 4096 * (1 + u64::from(half(14)));
        }
        start += segment_bytes;
    }
    found.sort_unstable();
    found
}

/// Waits until the log itself says that all of it is durable; returns the last batch that holds something.
fn until_at_rest(daemon: &mut Daemon, number: usize) -> Batch {
    let disk = daemon.disk_path(number);
    daemon.until("the log says how far it is durable", |_| {
        last_batches(&disk).last().is_some_and(|batch| batch.entries == 0)
    });
    let batches = last_batches(&disk);
    let content = batches.iter().rfind(|batch| batch.entries > 0);
    *content.expect("something was written")
}

fn first_disk(daemon: &Daemon) -> serde_json::Value {
    daemon.get("/v1/disks")[0].clone()
}

/// The disk is not served, its reason says `why`, and only who accepts the loss gets it back.
fn assert_refused_until_accepted(daemon: &mut Daemon, why: &str) {
    let disk = first_disk(daemon);
    let reason = disk["reason"].as_str().unwrap_or_default();
    assert_eq!(disk["state"], "missing", "{disk}");
    assert!(reason.contains(why) && reason.contains("VDI a"), "{disk}");
    // A restart in between changes nothing.
    daemon.kill();
    daemon.start_again();
    assert_eq!(first_disk(daemon)["state"], "missing", "{}", daemon.log());
    let path = daemon.disk_path(1);
    let (code, refusal) = daemon.call("POST", "/v1/disks", Some(&json!({"path": path})));
    assert_eq!(
        (code, &refusal["code"]),
        (409, &json!("needs_force")),
        "{refusal}"
    );
    assert!(
        refusal["hint"]
            .as_str()
            .is_some_and(|hint| hint.contains("--accept-old")),
        "{refusal}"
    );
    daemon.post("/v1/disks", &json!({"path": path, "accept_old": true}));
    assert_eq!(first_disk(daemon)["state"], "active");
}

#[test]
fn an_old_copy_of_the_only_replica_is_refused_until_accepted() {
    for is_index_gone in [false, true] {
        let mut daemon = Daemon::with_disks(1, &[]);
        daemon.create_vdi("a", 64 * MIB, 1);
        daemon.attach_nbd("a");
        fill(&daemon, "a", 0, 100, 1);
        daemon.stop();
        let (disk, old) = (daemon.disk_path(1), daemon.path("old.img"));
        copy(&disk, &old);
        daemon.start_again();
        fill(&daemon, "a", 50, 100, 2);
        daemon.stop();
        std::fs::rename(&old, &disk).expect("put the old copy back");
        if is_index_gone {
            std::fs::remove_dir_all(daemon.path("state/index")).expect("delete the index");
        }
        daemon.start_again();
        assert_refused_until_accepted(&mut daemon, "older copy");
        verify(&daemon, "a", 0, 100, 1);
        fill(&daemon, "a", 50, 100, 3);
        daemon.kill();
        daemon.start_again();
        assert_eq!(first_disk(&daemon)["state"], "active", "it was accepted once");
        verify(&daemon, "a", 50, 100, 3);
    }
}

#[test]
fn rot_in_the_flushed_end_of_the_only_log_is_no_torn_write() {
    for is_killed in [false, true] {
        let mut daemon = Daemon::with_disks(1, &[]);
        daemon.create_vdi("a", 64 * MIB, 1);
        daemon.attach_nbd("a");
        fill(&daemon, "a", 0, 20, 1);
        fill(&daemon, "a", 0, 20, 2);
        let last = if is_killed {
            let last = until_at_rest(&mut daemon, 1);
            daemon.kill();
            last
        } else {
            daemon.stop();
            until_at_rest(&mut daemon, 1)
        };
        damage(&daemon.disk_path(1), last.offset);
        daemon.start_again();
        assert_refused_until_accepted(&mut daemon, "parts of its log are missing");
        verify(&daemon, "a", 0, 18, 2);
    }
}

#[test]
fn rot_in_the_flushed_end_of_one_log_is_read_from_the_other() {
    let mut daemon = Daemon::with_disks(2, &[]);
    daemon.create_vdi("a", 64 * MIB, 2);
    daemon.attach_nbd("a");
    fill(&daemon, "a", 0, 20, 1);
    fill(&daemon, "a", 0, 20, 2);
    let last = until_at_rest(&mut daemon, 1);
    until_at_rest(&mut daemon, 2);
    daemon.kill();
    damage(&daemon.disk_path(1), last.offset);
    daemon.start_again();
    verify(&daemon, "a", 0, 20, 2);
    daemon.until_health("a", "whole");
    daemon.post("/v1/scrub", &json!({}));
    daemon.until("the scrub ends", |daemon| {
        daemon.get("/v1/scrub")["scrubs"][0]["ended"].is_string()
    });
    assert_eq!(daemon.get("/v1/scrub")["scrubs"][0]["repaired"], 0);
    verify(&daemon, "a", 0, 20, 2);
}

#[test]
fn a_lost_or_rolled_back_index_changes_nothing_with_any_number_of_replicas() {
    for replicas in 1..=3 {
        let mut daemon = Daemon::with_disks(usize::from(replicas), &[]);
        daemon.create_vdi("a", 64 * MIB, replicas);
        daemon.attach_nbd("a");
        fill(&daemon, "a", 0, 100, 1);
        daemon.stop();
        let (index, yesterday) = (daemon.path("state/index"), daemon.path("yesterday"));
        let copied = Command::new("cp").arg("-r").args([&index, &yesterday]).status();
        assert!(copied.expect("cp").success());
        daemon.start_again();
        fill(&daemon, "a", 50, 100, 2);
        daemon.kill();
        std::fs::remove_dir_all(&index).expect("remove");
        std::fs::rename(&yesterday, &index).expect("put the old one back");
        daemon.start_again();
        assert!(
            daemon.log().contains("rebuilt: Some(RolledBack)"),
            "{}",
            daemon.log()
        );
        verify(&daemon, "a", 0, 50, 1);
        verify(&daemon, "a", 50, 100, 2);
        fill(&daemon, "a", 0, 50, 3);
        daemon.kill();
        std::fs::remove_dir_all(&index).expect("remove");
        daemon.start_again();
        verify(&daemon, "a", 0, 50, 3);
        verify(&daemon, "a", 50, 100, 2);
        daemon.until_health("a", "whole");
    }
}

#[test]
fn a_deleted_index_is_rebuilt_from_the_log() {
    let mut daemon = Daemon::with_disks(1, &[]);
    daemon.create_vdi("a", 64 * MIB, 1);
    daemon.attach_nbd("a");
    fill(&daemon, "a", 0, 512, 1);
    fill(&daemon, "a", 100, 50, 2);
    daemon.stop();
    std::fs::remove_dir_all(daemon.path("state/index")).expect("delete the index");
    daemon.start_again();
    verify(&daemon, "a", 0, 100, 1);
    verify(&daemon, "a", 100, 50, 2);
    verify(&daemon, "a", 150, 362, 1);
    assert!(
        daemon.log().contains("rebuilt: Some(Missing)"),
        "{}",
        daemon.log()
    );
}

#[test]
fn an_index_from_yesterday_is_noticed() {
    let mut daemon = Daemon::with_disks(1, &[]);
    daemon.create_vdi("a", 64 * MIB, 1);
    daemon.attach_nbd("a");
    fill(&daemon, "a", 0, 200, 1);
    daemon.stop();
    let (index, yesterday) = (daemon.path("state/index"), daemon.path("yesterday"));
    let copied = Command::new("cp").arg("-r").args([&index, &yesterday]).status();
    assert!(copied.expect("cp").success());
    daemon.start_again();
    fill(&daemon, "a", 100, 200, 2);
    daemon.kill();
    std::fs::remove_dir_all(&index).expect("remove");
    std::fs::rename(&yesterday, &index).expect("put the old one back");
    daemon.start_again();
    verify(&daemon, "a", 0, 100, 1);
    verify(&daemon, "a", 100, 200, 2);
}

#[test]
fn either_superblock_is_enough_and_none_is_refused_by_name() {
    let mut daemon = Daemon::with_disks(1, &[]);
    daemon.create_vdi("a", 64 * MIB, 1);
    daemon.attach_nbd("a");
    fill(&daemon, "a", 0, 100, 1);
    for offset in [0, 64 * 1024] {
        daemon.stop();
        damage(&daemon.disk_path(1), offset);
        daemon.start_again();
        verify(&daemon, "a", 0, 100, 1);
    }
    daemon.stop();
    damage(&daemon.disk_path(1), 0);
    damage(&daemon.disk_path(1), 64 * 1024);
    daemon.start_again();
    let disk = daemon.get("/v1/disks")[0].clone();
    assert_eq!(disk["state"], "missing", "{disk}");
    assert!(
        disk["reason"]
            .as_str()
            .is_some_and(|reason| reason.contains("superblock")),
        "{disk}"
    );
}

#[test]
fn an_old_copy_of_a_disk_is_not_trusted() {
    let mut daemon = Daemon::with_disks(3, &[]);
    daemon.create_vdi("a", 64 * MIB, 3);
    daemon.attach_nbd("a");
    fill(&daemon, "a", 0, 300, 1);
    daemon.stop();
    let (disk, old) = (daemon.disk_path(2), daemon.path("old.img"));
    copy(&disk, &old);
    daemon.start_again();
    fill(&daemon, "a", 100, 300, 2);
    daemon.stop();
    std::fs::rename(&old, &disk).expect("put the old copy back");
    daemon.start_again();
    verify(&daemon, "a", 0, 100, 1);
    verify(&daemon, "a", 100, 300, 2);
    daemon.until_health("a", "whole");
    daemon.post("/v1/scrub", &json!({}));
    daemon.until("the scrub ends", |daemon| {
        daemon.get("/v1/scrub")["scrubs"][0]["ended"].is_string()
    });
    let scrub = daemon.get("/v1/scrub");
    assert_eq!(
        scrub["scrubs"][0]["repaired"], 0,
        "resync left nothing to repair: {scrub}"
    );
    verify(&daemon, "a", 100, 300, 2);
}

#[test]
fn another_pools_disk_is_refused_until_forced() {
    let mut mine = Daemon::with_disks(1, &[]);
    mine.create_vdi("a", 16 * MIB, 1);
    mine.stop();
    let other = Daemon::with_disks(0, &[]);
    let body = json!({"path": mine.disk_path(1)});
    let (code, refusal) = other.call("POST", "/v1/disks", Some(&body));
    assert_eq!(
        (code, refusal["code"].as_str()),
        (409, Some("needs_force")),
        "{refusal}"
    );
    assert!(
        refusal["message"]
            .as_str()
            .is_some_and(|text| text.contains("pool")),
        "{refusal}"
    );
    mine.start_again();
    assert_eq!(
        mine.get("/v1/disks")[0]["state"],
        "active",
        "looking changed nothing"
    );
    mine.stop();
    let taken = other.post("/v1/disks", &json!({"path": mine.disk_path(1), "force": true}));
    assert_eq!(taken["bytes"].as_u64(), Some(GIB));
    mine.start_again();
    assert_eq!(
        mine.get("/v1/disks")[0]["state"],
        "missing",
        "it is the other pool's now"
    );
}
