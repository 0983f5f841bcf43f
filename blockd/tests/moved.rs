//! Disks carried to another machine: with the daemon's records, without them, and home again.

mod support;

use serde_json::{Value, json};
use support::{Daemon, MIB, NbdClient, copy, fill, verify};

/// Another machine: a state directory of its own, with a copy of `of`'s control records and no index.
fn machine_with_records_of(of: &Daemon) -> Daemon {
    let mut other = Daemon::start(&[]);
    other.stop();
    std::fs::remove_dir_all(other.path("state/control")).expect("its own records");
    copy(&of.path("state/control"), &other.path("state/control"));
    other
}

fn carry(from: &Daemon, to: &Daemon) {
    std::fs::rename(from.disk_path(1), to.disk_path(1)).expect("carry the disk");
}

fn only_disk(daemon: &Daemon) -> Value {
    let disks = daemon.get("/v1/disks");
    assert_eq!(disks.as_array().map(Vec::len), Some(1), "{disks}");
    disks[0].clone()
}

/// One machine with a VDI of a single replica, all on the disk that will travel.
fn home() -> Daemon {
    let daemon = Daemon::with_disks(1, &[]);
    daemon.create_vdi("a", 64 * MIB, 1);
    daemon.attach_nbd("a");
    fill(&daemon, "a", 0, 200, 1);
    fill(&daemon, "a", 100, 50, 2);
    daemon
}

/// The machine is dead, its records were saved: the disk goes on elsewhere, under another path, with all it held.
#[test]
fn a_disk_goes_on_in_another_machine_that_has_the_records() {
    let mut first = home();
    first.kill();
    let mut second = machine_with_records_of(&first);
    carry(&first, &second);
    second.start_again();
    let lost = only_disk(&second);
    assert_eq!(lost["state"], "missing", "{lost}");
    second.post("/v1/disks", &json!({"path": second.disk_path(1)}));
    let found = only_disk(&second);
    assert_eq!((&found["state"], &found["id"]), (&json!("active"), &lost["id"]));
    assert_eq!(found["path"], json!(second.disk_path(1)));
    assert!(
        second.log().contains("rebuilt: Some(Missing)"),
        "{}",
        second.log()
    );
    second.attach_nbd("a");
    for _ in 0..2 {
        verify(&second, "a", 0, 100, 1);
        verify(&second, "a", 100, 50, 2);
        verify(&second, "a", 150, 50, 1);
        second.kill();
        second.start_again();
    }
}

/// Written elsewhere and carried home: what was written there is there, or the VDI is refused by name while the disk
/// has promised itself to a later life of a daemon than the one at home is in. Each start is a later life.
#[test]
fn a_disk_that_was_written_elsewhere_is_right_at_home_or_refused_by_name() {
    for (starts_elsewhere, starts_at_home, is_refused) in [(1, 1, false), (3, 1, true), (1, 3, false)] {
        let mut first = home();
        first.kill();
        let mut second = machine_with_records_of(&first);
        carry(&first, &second);
        second.start_again();
        second.post("/v1/disks", &json!({"path": second.disk_path(1)}));
        second.attach_nbd("a");
        for _ in 1..starts_elsewhere {
            second.kill();
            second.start_again();
        }
        fill(&second, "a", 150, 100, 3);
        second.kill();
        for _ in 1..starts_at_home {
            first.start_again();
            first.kill();
        }
        carry(&second, &first);
        first.start_again();
        let found = only_disk(&first);
        assert_eq!(found["state"], "active", "{found}");
        if is_refused {
            let mut client = NbdClient::connect(&first.path("a.nbd")).expect("connect");
            assert!(client.read(150 * 64 * 1024, 4096).is_err());
            assert!(client.write(0, &[5; 4096]).is_err());
            let events = first.get("/v1/status")["events"].to_string();
            assert!(
                events.contains("VDI a shard 0: a newer writer holds it"),
                "{events}"
            );
            for _ in starts_at_home..starts_elsewhere {
                first.kill();
                first.start_again();
            }
        }
        verify(&first, "a", 0, 100, 1);
        verify(&first, "a", 100, 50, 2);
        verify(&first, "a", 150, 100, 3);
        fill(&first, "a", 0, 50, 4);
        first.kill();
        first.start_again();
        verify(&first, "a", 0, 50, 4);
        verify(&first, "a", 150, 100, 3);
    }
}

/// Whoever does not know the disk names what stands in the way, and leaves it as it is.
#[test]
fn a_disk_is_refused_by_name_where_it_does_not_belong() {
    let mut first = home();
    let stranger = Daemon::start(&[]);
    let add = |daemon: &Daemon, path: &std::path::Path| {
        let (code, refusal) = daemon.call("POST", "/v1/disks", Some(&json!({"path": path})));
        assert!((400..600).contains(&code), "{refusal}");
        format!("{} {}", refusal["code"], refusal["message"])
    };
    let path = first.disk_path(1);
    let said = add(&stranger, &path);
    assert!(
        said.contains("conflict") && said.contains("no pool yet"),
        "{said}"
    );
    stranger.post("/v1/pool", &json!({"name": "other"}));
    let said = add(&stranger, &path);
    assert!(said.contains("locked"), "another daemon serves it: {said}");
    // A copy of a disk that is in use here.
    let twin = first.path("twin.img");
    copy(&path, &twin);
    let said = add(&first, &twin);
    assert!(
        said.contains("conflict") && said.contains("is a copy of disk"),
        "{said}"
    );
    // Of a format that this program does not know.
    let newer = first.path("newer.img");
    copy(&path, &newer);
    for offset in [0, 64 * 1024] {
        support::set_version(&newer, offset, 99);
    }
    let said = add(&stranger, &newer);
    assert!(
        said.contains("needs_force") && said.contains("version 99"),
        "{said}"
    );
    assert_eq!(stranger.get("/v1/disks"), json!([]));
    first.stop();
    let said = add(&stranger, &path);
    assert!(said.contains("needs_force") && said.contains("pool"), "{said}");
    first.start_again();
    verify(&first, "a", 0, 100, 1);
    verify(&first, "a", 100, 50, 2);
}
