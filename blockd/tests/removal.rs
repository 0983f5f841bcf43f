//! Disks that are to leave the pool, with a daemon that dies and disks that are away meanwhile.

mod support;

use serde_json::json;
use support::{Daemon, fill, verify};

/// 256 MiB: long enough on their way that the daemon dies before the end.
const PIECES: u64 = 4096;

/// A daemon that was killed while it moved the only replica of VDI `a` from disk 1 to disk 2.
fn killed_while_disk_1_leaves() -> Daemon {
    let mut daemon = Daemon::with_disks(1, &[]);
    daemon.create_vdi("a", PIECES * 64 * 1024, 1);
    daemon.attach_nbd("a");
    fill(&daemon, "a", 0, PIECES, 7);
    let leaving = daemon.get("/v1/disks")[0]["id"].clone();
    daemon.add_disk(2);
    let (code, answer) = daemon.call(
        "DELETE",
        &format!("/v1/disks/{}", leaving.as_str().expect("an id")),
        None,
    );
    assert!((200..300).contains(&code), "{answer}");
    daemon.kill();
    daemon
}

fn state_of_disk_1(daemon: &Daemon) -> Option<String> {
    let path = json!(daemon.disk_path(1));
    let disks = daemon.get("/v1/disks");
    let mut disks = disks.as_array().expect("a list").iter();
    let disk = disks.find(|disk| disk["path"] == path)?;
    Some(disk["state"].as_str().expect("a state").to_owned())
}

fn until_disk_1_has_left(daemon: &mut Daemon) {
    daemon.until("disk 1 has left", |daemon| state_of_disk_1(daemon).is_none());
    // Nothing reads it any more.
    std::fs::remove_file(daemon.disk_path(1)).expect("remove");
    verify(daemon, "a", 0, PIECES, 7);
    daemon.kill();
    daemon.start_again();
    verify(daemon, "a", 0, PIECES, 7);
}

#[test]
fn a_removal_goes_on_after_a_kill() {
    let mut daemon = killed_while_disk_1_leaves();
    daemon.start_again();
    until_disk_1_has_left(&mut daemon);
}

#[test]
fn a_removal_waits_for_the_disk_that_is_to_leave() {
    let mut daemon = killed_while_disk_1_leaves();
    let (here, elsewhere) = (daemon.disk_path(1), daemon.path("elsewhere.img"));
    std::fs::rename(&here, &elsewhere).expect("take the disk away");
    daemon.start_again();
    assert_eq!(
        state_of_disk_1(&daemon).as_deref(),
        Some("removing"),
        "it left before the kill"
    );
    let events = daemon.get("/v1/status")["events"].to_string();
    assert!(events.contains("cannot be emptied yet"), "{events}");
    // It is noticed without being told.
    std::fs::rename(&elsewhere, &here).expect("bring it back");
    until_disk_1_has_left(&mut daemon);
}

#[test]
fn what_was_to_move_to_a_disk_that_leaves_moves_elsewhere() {
    let mut daemon = Daemon::with_disks(4, &[]);
    daemon.create_vdi("a", 64 * 64 * 1024, 3);
    daemon.attach_nbd("a");
    fill(&daemon, "a", 0, 64, 7);
    let disks = daemon.get("/v1/disks");
    let disks = disks.as_array().expect("a list");
    let (used, free): (Vec<_>, Vec<_>) = disks.iter().partition(|disk| disk["replicas"] == 1);
    let (leaving, target) = (used[0], free[0]);
    let remove = |daemon: &Daemon, disk: &serde_json::Value| {
        let id = disk["id"].as_str().expect("an id");
        let (code, answer) = daemon.call("DELETE", &format!("/v1/disks/{id}"), None);
        assert_eq!(code, 200, "{answer}");
    };
    let is_there = |daemon: &Daemon, disk: &serde_json::Value| {
        let disks = daemon.get("/v1/disks");
        let mut disks = disks.as_array().expect("a list").iter();
        disks.any(|other| other["id"] == disk["id"])
    };
    // One replica is away, and is out of sync; then another, too: nothing can be written, so nobody takes a place.
    let away: Vec<std::path::PathBuf> = used[1..]
        .iter()
        .map(|disk| disk["path"].as_str().expect("a path").into())
        .collect();
    let aside = |path: &std::path::Path| path.with_extension("away");
    for path in &away {
        daemon.kill();
        std::fs::rename(path, aside(path)).expect("take a disk away");
        daemon.start_again();
        verify(&daemon, "a", 0, 64, 7);
        daemon.until("the record knows", |daemon| {
            let vdi = daemon.get("/v1/vdis/a");
            let disks = vdi["disks"].as_array().expect("its disks").iter();
            disks
                .map(|disk| disk["in_sync"].as_u64().expect("a number"))
                .sum::<u64>()
                == 2
        });
    }
    remove(&daemon, leaving);
    remove(&daemon, target);
    daemon.until("the empty one has left", |daemon| !is_there(daemon, target));

    for path in &away {
        std::fs::rename(aside(path), path).expect("bring it back");
    }
    daemon.until_health("a", "whole");
    assert!(is_there(&daemon, leaving), "it has nowhere to go");
    daemon.add_disk(5);
    daemon.until("the first has left", |daemon| !is_there(daemon, leaving));
    daemon.until_health("a", "whole");
    verify(&daemon, "a", 0, 64, 7);
}

/// Replicas that the records do not know are kept, said, and dropped only by somebody who was told what is lost.
#[test]
fn what_nobody_knows_is_dropped_when_asked_for() {
    let mut daemon = Daemon::with_disks(1, &[]);
    daemon.stop();
    let (records, older) = (daemon.path("state/control"), daemon.path("older"));
    support::copy(&records, &older);
    daemon.start_again();
    daemon.create_vdi("a", 64 * 64 * 1024, 1);
    daemon.attach_nbd("a");
    fill(&daemon, "a", 0, 64, 7);
    daemon.stop();
    std::fs::remove_dir_all(&records).expect("the records");
    std::fs::rename(&older, &records).expect("older ones");
    daemon.start_again();
    let disk = daemon.get("/v1/disks")[0].clone();
    assert_eq!(disk["leftovers"], 1, "{disk}");
    let id = disk["id"].as_str().expect("an id");
    let socket = daemon.path("state/blockd.sock").display().to_string();
    let leftovers = |more: &[&str]| {
        let words = ["--socket", &socket, "disk", "leftovers", id];
        support::weft(&[&words, more].concat())
    };
    let shown = leftovers(&[]);
    assert!(shown.code == 0 && shown.out.contains("4MiB"), "{shown:?}");
    // Asked for without a yes: what is lost is said, in one line, and nothing is dropped.
    let refused = leftovers(&["--drop"]);
    assert_eq!((refused.code, refused.err.lines().count()), (5, 1), "{refused:?}");
    for word in ["VDI a (", "1 shards", "4MiB of data", "is lost"] {
        assert!(refused.err.contains(word), "{word}: {refused:?}");
    }
    assert_eq!(daemon.get(&format!("/v1/disks/{id}/leftovers"))[0]["shards"], 1);
    let dropped = leftovers(&["--drop", "--yes"]);
    assert!(
        dropped.code == 0 && dropped.out.contains("dropped"),
        "{dropped:?}"
    );
    for _ in 0..2 {
        let disk = daemon.get("/v1/disks")[0].clone();
        assert_eq!(
            (&disk["leftovers"], &disk["used_bytes"]),
            (&json!(0), &json!(0)),
            "{disk}"
        );
        assert_eq!(daemon.get(&format!("/v1/disks/{id}/leftovers")), json!([]));
        assert_eq!(leftovers(&["--drop"]).code, 0, "there is nothing to lose");
        daemon.kill();
        daemon.start_again();
    }
    // What the records do know is none of it.
    daemon.create_vdi("b", 64 * 64 * 1024, 1);
    daemon.attach_nbd("b");
    fill(&daemon, "b", 0, 64, 8);
    assert_eq!(leftovers(&["--drop", "--yes"]).code, 0);
    verify(&daemon, "b", 0, 64, 8);
}
