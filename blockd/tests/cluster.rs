//! Several daemons and a real etcd: who is there, who writes what, and what stops when etcd does (nothing).

// By the name that etcd.rs has for it in its own crate's tests.
extern crate control as weft_control;

#[path = "../../control/tests/support/etcd.rs"]
mod etcd;
mod support;

use etcd::{Servers, until};
use serde_json::{Value, json};
use support::{Daemon, GIB, NbdClient, fill, verify, weft};

/// A daemon as host `name` of the cluster; its configuration is beside its state.
fn host(servers: &Servers, name: &str) -> Daemon {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("bound");
    drop(listener);
    let config = tempfile::NamedTempFile::new().expect("a file");
    let (_, path) = config.keep().expect("kept until the daemon's folder goes");
    let etcd: Vec<String> = servers.endpoints().iter().map(|url| format!("'{url}'")).collect();
    let text = format!(
        "[cluster]\nhost = '{name}'\nlisten = '{address}'\netcd = [{}]\nlease_s = 3\n",
        etcd.join(", ")
    );
    std::fs::write(&path, text).expect("write");
    Daemon::start(&["--config", path.to_str().expect("UTF-8")])
}

fn find<'a>(list: &'a Value, name: &str) -> &'a Value {
    let found = list
        .as_array()
        .expect("a list")
        .iter()
        .find(|one| one["name"] == name);
    found.unwrap_or_else(|| panic!("no {name} in {list}"))
}

#[test]
fn hosts_see_each_other_and_a_vdi_changes_hands() {
    let servers = Servers::start(1);
    let mut a = host(&servers, "alpha");
    let b = host(&servers, "beta");
    a.post("/v1/pool", &json!({"name": "test"}));
    a.add_disk(1);
    b.add_disk(1);
    until("both see both, and all disks", || {
        [&a, &b]
            .iter()
            .all(|daemon| {
                let (hosts, disks) = (daemon.get("/v1/hosts"), daemon.get("/v1/disks"));
                hosts.as_array().unwrap().len() == 2
                    && hosts
                        .as_array()
                        .unwrap()
                        .iter()
                        .all(|host| host["is_alive"] == true && host["disks_up"] == 1)
                    && disks.as_array().unwrap().len() == 2
                    && disks
                        .as_array()
                        .unwrap()
                        .iter()
                        .all(|disk| disk["state"] == "active" && disk["used_bytes"].is_u64())
            })
            .then_some(())
    });
    assert_eq!(b.get("/v1/status")["control"]["kind"], "etcd");

    // Made by one, shown by the other, attached at the other because nobody else is.
    a.create_vdi("web", GIB, 1);
    let shown = until("the other shows it", || {
        let (code, answer) = b.call("GET", "/v1/vdis/web", None);
        (code == 200).then_some(answer)
    });
    assert_eq!(shown["host"], "alpha");
    assert_eq!((&shown["shards"], &shown["health"]), (&json!(1), &json!("whole")));
    b.attach_nbd("web");
    until("the first host sees who writes it", || {
        (a.get("/v1/vdis/web")["host"] == "beta").then_some(())
    });
    // While it is attached there and that host lives, it is nobody else's: said with the time left.
    let door = json!({"target": format!("nbd:unix:{}", a.path("web.nbd").display())});
    let (code, answer) = a.call("POST", "/v1/vdis/web/attach", Some(&door));
    assert_eq!(code, 409, "{answer}");
    let message = answer["message"].as_str().expect("a message");
    assert!(
        message.contains("attached on host beta") && message.contains(" s"),
        "{message}"
    );
    let (code, answer) = a.call("POST", "/v1/vdis/web/detach", Some(&json!({})));
    assert!(
        code == 409 && answer["hint"].as_str().expect("hint").contains("beta"),
        "{answer}"
    );

    // A third one with a name that is taken is refused by name.
    let refused = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| host(&servers, "beta")));
    let reason = *refused
        .err()
        .expect("it is refused")
        .downcast::<String>()
        .expect("a text");
    assert!(reason.contains("has the name 'beta'"), "{reason}");

    // The host dies: the other says so, and takes the VDI when the lease has ended.
    drop(b);
    until("its lease ends and the VDI is attached here", || {
        let (code, _) = a.call("POST", "/v1/vdis/web/attach", Some(&door));
        (code == 200).then_some(())
    });
    assert_eq!(a.get("/v1/vdis/web")["host"], "alpha");
    until("the dead host is missing, and its disk", || {
        let disks = a.get("/v1/disks");
        let missing = disks
            .as_array()
            .unwrap()
            .iter()
            .find(|disk| disk["host"] == "beta")?
            .clone();
        (missing["state"] == "missing" && find(&a.get("/v1/hosts"), "beta")["is_alive"] == false)
            .then_some(())
    });
    // What it writes after a start of its own is still its own.
    a.stop();
    a.start_again();
    assert_eq!(a.get("/v1/vdis/web")["attachments"].as_array().unwrap().len(), 1);
}

#[test]
fn an_attached_vdi_goes_on_while_etcd_is_away() {
    let servers = Servers::start(1);
    let a = host(&servers, "alpha");
    a.post("/v1/pool", &json!({"name": "test"}));
    a.add_disk(1);
    a.create_vdi("web", GIB, 1);
    let socket = a.attach_nbd("web");
    let mut client = NbdClient::connect(&socket).expect("a door");
    client.write(0, &[1; 4096]).expect("written");
    servers.members[0].kill();
    for block in 1..64_u64 {
        client.write(block * 4096, &[2; 4096]).expect("written");
    }
    assert_eq!(client.read(4096, 4096).expect("read"), [2; 4096]);
    let since = until("the status says since when", || {
        let status = a.get("/v1/status");
        assert_eq!(status["vdis"][0]["health"], "whole");
        status["control"]["unreachable_since"].as_str().map(str::to_owned)
    });
    println!("unreachable since {since}");
    let (code, answer) = a.call(
        "POST",
        "/v1/vdis",
        Some(&json!({"name": "new", "bytes": GIB, "replicas": 1})),
    );
    assert_eq!(code, 503, "{answer}");
    assert!(
        answer["message"]
            .as_str()
            .expect("a message")
            .contains("etcd does not answer"),
        "{answer}"
    );
    servers.members[0].start();
    until("it is made when etcd is back", || {
        let (code, _) = a.call(
            "POST",
            "/v1/vdis",
            Some(&json!({"name": "new", "bytes": GIB, "replicas": 1})),
        );
        (code == 200).then_some(())
    });
    assert!(a.get("/v1/status")["control"].get("unreachable_since").is_none());
}

fn in_sync(daemon: &Daemon, vdi: &str) -> usize {
    let shown = daemon.get(&format!("/v1/vdis/{vdi}"));
    let disks = shown["disks"].as_array().expect("its disks");
    disks.iter().filter(|disk| disk["in_sync"] == 1).count()
}

/// Attaches a VDI of a host that died: refused with that host's name and the seconds left, until its lease has ended.
fn take_over(daemon: &Daemon, vdi: &str, dead: &str) {
    let door = json!({"target": format!("nbd:unix:{}", daemon.path(&format!("{vdi}.nbd")).display())});
    let mut refusals = 0;
    until("the dead host's lease has ended", || {
        let (code, answer) = daemon.call("POST", &format!("/v1/vdis/{vdi}/attach"), Some(&door));
        if code == 200 {
            return Some(());
        }
        let said = answer.to_string();
        assert!(
            code == 409 && said.contains(&format!("attached on host {dead}")) && said.contains("in at most"),
            "{code} {said}"
        );
        refusals += 1;
        None
    });
    assert!(refusals > 0, "its lease had not ended when it was asked first");
}

/// The whole story of a cluster: a VDI in three copies on three hosts outlives each of them.
#[test]
fn a_vdi_outlives_each_host_in_turn() {
    let servers = Servers::start(1);
    let mut a = host(&servers, "alpha");
    let mut b = host(&servers, "beta");
    let c = host(&servers, "gamma");
    a.post("/v1/pool", &json!({"name": "test"}));
    for daemon in [&a, &b, &c] {
        daemon.add_disk(1);
    }
    until("all see all disks", || {
        let disks = a.get("/v1/disks");
        let active = disks.as_array()?.iter().filter(|disk| disk["state"] == "active");
        (active.count() == 3).then_some(())
    });
    a.create_vdi("web", GIB, 3);
    assert_eq!(a.get("/v1/vdis/web")["disks"].as_array().map(Vec::len), Some(3));
    a.attach_nbd("web");
    fill(&a, "web", 0, 64, 0x11);
    until("every host holds it", || (in_sync(&a, "web") == 3).then_some(()));

    // One of three dies: writing goes on. It comes back and is brought up to date.
    b.kill();
    fill(&a, "web", 32, 64, 0x22);
    until("it is missed", || (in_sync(&a, "web") == 2).then_some(()));
    fill(&a, "web", 96, 8, 0x33);
    b.start_again();
    until("it is in sync again", || (in_sync(&a, "web") == 3).then_some(()));

    // The writer dies: another host goes on, when it is certain.
    a.kill();
    take_over(&c, "web", "alpha");
    for (from, count, byte) in [(0, 32, 0x11), (32, 64, 0x22), (96, 8, 0x33)] {
        verify(&c, "web", from, count, byte);
    }
    fill(&c, "web", 104, 8, 0x44);
    // It comes back with the copy that it had, is no longer the writer, and is brought up to date.
    a.start_again();
    until("it is in sync again", || (in_sync(&c, "web") == 3).then_some(()));
    assert_eq!(a.get("/v1/vdis/web")["host"], "gamma");
    verify(&c, "web", 104, 8, 0x44);

    let socket = c.path("state/blockd.sock").display().to_string();
    let listed = weft(&["--socket", &socket, "host", "list", "--json"]);
    let hosts: Value = serde_json::from_str(&listed.out).expect("JSON");
    for name in ["alpha", "beta", "gamma"] {
        assert_eq!(find(&hosts, name)["is_alive"], true, "{listed:?}");
    }
}

/// Storage and compute apart: a host without a disk is a host like any other.
#[test]
fn a_host_without_disks_attaches_vdis() {
    let servers = Servers::start(1);
    let storage = host(&servers, "storage");
    let compute = host(&servers, "compute");
    compute.post("/v1/pool", &json!({"name": "test"}));
    storage.add_disk(1);
    until("the disk is seen", || {
        (compute.get("/v1/disks")[0]["state"] == "active").then_some(())
    });
    compute.create_vdi("web", GIB, 1);
    compute.attach_nbd("web");
    fill(&compute, "web", 0, 16, 0x11);
    verify(&compute, "web", 0, 16, 0x11);
    assert_eq!(storage.get("/v1/vdis/web")["host"], "compute");
}
