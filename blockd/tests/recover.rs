//! The control store is lost, the disks are not: `weft pool recover` with a real daemon before and after.

mod support;

use serde_json::{Value, json};
use support::{Daemon, GIB, Outcome, copy, fill, verify, weft};

fn names(daemon: &Daemon) -> Vec<String> {
    let vdis = daemon.get("/v1/vdis");
    let vdis = vdis.as_array().expect("a list").clone();
    let name = |vdi: &Value| vdi["name"].as_str().expect("a name").to_owned();
    vdis.iter().map(name).collect()
}

fn refused(outcome: &Outcome, words: &str) {
    assert_eq!(outcome.code, 5, "{outcome:?}");
    assert!(outcome.err.contains(words), "{outcome:?}");
}

fn delete(daemon: &mut Daemon, name: &str) {
    let (code, answer) = daemon.call("DELETE", &format!("/v1/vdis/{name}"), None);
    assert!((200..300).contains(&code), "{answer}");
    daemon.until("it is gone", |daemon| !names(daemon).contains(&name.to_owned()));
}

#[test]
fn everything_comes_back_from_the_disks() {
    let mut daemon = Daemon::with_disks(3, &[]);
    for (name, shards, replicas) in [
        ("web", 3, 3),
        ("single", 1, 1),
        ("gone", 1, 2),
        ("untouched", 2, 2),
    ] {
        daemon.create_vdi(name, shards * GIB, replicas);
    }
    for name in ["web", "single", "gone"] {
        daemon.attach_nbd(name);
        fill(&daemon, name, 0, 40, name.as_bytes()[0]);
    }
    fill(&daemon, "web", 2 * 16 * 1024, 3, 7);
    daemon.post("/v1/vdis/gone/detach", &json!({}));
    delete(&mut daemon, "gone");
    daemon.post("/v1/vdis/untouched/resize", &json!({"bytes": 3 * GIB}));
    let pool = daemon.get("/v1/pool");

    refused(&daemon.recover(3, &["--yes"]), "a blockd runs");
    daemon.kill();
    refused(
        &daemon.recover(3, &["--yes"]),
        "there are records of pool 'test' with 3 VDIs",
    );
    daemon.lose_state();
    // A disk is not read; then nobody is there to say yes.
    let two = daemon.recover(2, &["--yes"]);
    refused(&two, "was not read");
    let shown = daemon.recover(3, &[]);
    refused(&shown, "nobody is at the terminal");
    println!("{}", shown.out);
    let done = daemon.recover(3, &["--yes"]);
    assert_eq!(done.code, 0, "{done:?}");
    assert!(!done.out.contains("gone"), "{done:?}");

    daemon.start_again();
    let again = daemon.get("/v1/pool");
    for field in ["id", "name", "created"] {
        assert_eq!(again[field], pool[field], "{field}");
    }
    assert_eq!(names(&daemon), ["web", "single", "untouched"]);
    let untouched = daemon.get("/v1/vdis/untouched");
    assert_eq!(untouched["bytes"], 3 * GIB);
    for name in ["web", "single", "untouched"] {
        daemon.attach_nbd(name);
        daemon.until_health(name, "whole");
    }
    for name in ["web", "single"] {
        verify(&daemon, name, 0, 40, name.as_bytes()[0]);
    }
    verify(&daemon, "web", 2 * 16 * 1024, 3, 7);
    verify(&daemon, "untouched", 0, 4, 0);
    // It goes on: writes, VDIs whose ids were never used, and another loss.
    fill(&daemon, "untouched", 0, 4, 9);
    let new = daemon.create_vdi("new", GIB, 3);
    assert_eq!(new["id"], 5, "{new}");
    daemon.kill();
    daemon.lose_state();
    let done = daemon.recover(3, &["--yes"]);
    assert_eq!(done.code, 0, "{done:?}");
    daemon.start_again();
    assert_eq!(names(&daemon), ["web", "single", "untouched", "new"]);
    daemon.attach_nbd("untouched");
    verify(&daemon, "untouched", 0, 4, 9);
}

#[test]
fn what_was_deleted_while_a_disk_was_away_is_shown_and_stays_so() {
    let mut daemon = Daemon::with_disks(2, &[]);
    for name in ["web", "kept"] {
        daemon.create_vdi(name, GIB, 2);
        daemon.attach_nbd(name);
        fill(&daemon, name, 0, 4, 1);
        daemon.post(&format!("/v1/vdis/{name}/detach"), &json!({}));
    }
    daemon.stop();
    let away = daemon.path("away.img");
    std::fs::rename(daemon.disk_path(2), &away).expect("rename");
    daemon.start_again();
    delete(&mut daemon, "web");
    daemon.stop();
    std::fs::rename(&away, daemon.disk_path(2)).expect("rename");
    daemon.lose_state();
    let done = daemon.recover(2, &["--yes"]);
    assert_eq!(done.code, 0, "{done:?}");
    assert!(
        done.out.contains("VDI web was deleted before") && done.out.contains("--undelete 1"),
        "{done:?}"
    );
    daemon.start_again();
    assert_eq!(names(&daemon), ["kept"]);
    daemon.attach_nbd("kept");
    verify(&daemon, "kept", 0, 4, 1);
    daemon.until_health("kept", "whole");
}

#[test]
fn a_lost_disk_is_given_up_by_name() {
    let mut daemon = Daemon::with_disks(4, &[]);
    daemon.create_vdi("web", GIB, 3);
    daemon.attach_nbd("web");
    fill(&daemon, "web", 0, 20, 3);
    let shown = daemon.get("/v1/vdis/web");
    let used = shown["disks"][0]["disk"].as_str().expect("a disk").to_owned();
    let disks = daemon.get("/v1/disks");
    let disks = disks.as_array().expect("a list");
    let lost = disks
        .iter()
        .position(|disk| disk["id"] == used.as_str())
        .expect("it is there")
        + 1;
    let path = disks[lost - 1]["path"].as_str().expect("a path").to_owned();
    daemon.kill();
    daemon.lose_state();
    std::fs::remove_file(&path).expect("remove");
    let mut words: Vec<String> = ["pool", "recover", "--yes", "--state"]
        .map(str::to_owned)
        .to_vec();
    words.push(daemon.path("state").display().to_string());
    for disk in disks.iter().filter(|disk| disk["id"] != used.as_str()) {
        words.push(disk["path"].as_str().expect("a path").to_owned());
    }
    refused(&weft(&words), &format!("--without {used}"));
    words.extend(["--without".to_owned(), used]);
    let done = weft(&words);
    assert_eq!(done.code, 0, "{done:?}");
    daemon.start_again();
    daemon.attach_nbd("web");
    verify(&daemon, "web", 0, 20, 3);
    // The fourth disk took its place and is filled.
    daemon.until_health("web", "whole");
    fill(&daemon, "web", 0, 20, 4);
    verify(&daemon, "web", 0, 20, 4);
}

#[test]
fn an_export_travels_as_a_file() {
    let mut daemon = Daemon::with_disks(2, &[]);
    daemon.create_vdi("web", GIB, 2);
    daemon.attach_nbd("web");
    fill(&daemon, "web", 0, 4, 1);
    let state = daemon.path("state").display().to_string();
    let disk = |number| daemon.disk_path(number).display().to_string();
    let (first, second) = (disk(1), disk(2));
    refused(&weft(&["pool", "export", &first, "--state", &state]), "");
    daemon.kill();
    let exported = weft(&["pool", "export", &first, "--state", &state]);
    assert_eq!(exported.code, 0, "{exported:?}");
    let file = daemon.path("host1.json");
    std::fs::write(&file, &exported.out).expect("write");
    daemon.lose_state();
    let file = file.display().to_string();
    let words = [
        "pool", "recover", &file, &second, "--state", &state, "--yes", "--json",
    ];
    let done = weft(&words);
    assert_eq!(done.code, 0, "{done:?}");
    let shown: Value = serde_json::from_str(&done.out).expect("JSON");
    assert_eq!(shown["vdis"][0]["name"], "web");
    // The same disk twice is no two disks.
    refused(
        &weft(&["pool", "recover", &file, &first, "--state", &state]),
        "was found twice",
    );
    daemon.start_again();
    daemon.attach_nbd("web");
    verify(&daemon, "web", 0, 4, 1);
}

/// The state directory of yesterday: what was made since is not taken for deleted.
#[test]
fn old_records_drop_nothing_that_is_newer() {
    let mut daemon = Daemon::with_disks(1, &[]);
    daemon.stop();
    copy(&daemon.path("state"), &daemon.path("yesterday"));
    daemon.start_again();
    daemon.create_vdi("web", GIB, 1);
    daemon.attach_nbd("web");
    fill(&daemon, "web", 0, 4, 1);
    daemon.kill();
    daemon.lose_state();
    std::fs::rename(daemon.path("yesterday"), daemon.path("state")).expect("rename");
    daemon.start_again();
    assert!(names(&daemon).is_empty());
    let events = daemon.get("/v1/status")["events"].to_string();
    assert!(events.contains("that the records do not know"), "{events}");
    daemon.stop();
    refused(
        &daemon.recover(1, &["--yes"]),
        "there are records of pool 'test' with 0 VDIs",
    );
    let done = daemon.recover(1, &["--yes", "--overwrite"]);
    assert_eq!(done.code, 0, "{done:?}");
    daemon.start_again();
    daemon.attach_nbd("web");
    verify(&daemon, "web", 0, 4, 1);
}
