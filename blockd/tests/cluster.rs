//! Several daemons and a real etcd: who is there, who writes what, and what stops when etcd does (nothing).

// By the name that etcd.rs has for it in its own crate's tests.
extern crate control as weft_control;

#[path = "../../control/tests/support/etcd.rs"]
mod etcd;
#[path = "cluster/sealed.rs"]
mod sealed;
mod support;

use etcd::{Servers, until};
use serde_json::{Value, json};
use support::{Daemon, GIB, NbdClient, fill, verify, weft};

/// A daemon as host `name` of the cluster; its configuration is beside its state.
fn host(servers: &Servers, name: &str) -> Daemon {
    host_with(&servers.endpoints(), name, "", "")
}

/// The same with more settings, also of the cluster, and etcd where the caller says.
fn host_with(endpoints: &[String], name: &str, more: &str, of_cluster: &str) -> Daemon {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("bound");
    drop(listener);
    let config = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).expect("a file");
    let (_, path) = config.keep().expect("kept until the daemon's folder goes");
    let etcd: Vec<String> = endpoints.iter().map(|url| format!("'{url}'")).collect();
    let text = format!(
        "{more}
[cluster]
host = '{name}'
listen = '{address}'
etcd = [{}]
lease_s = 3
{of_cluster}",
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

/// Waits until the daemon sees `count` disks in use.
fn until_disks(daemon: &Daemon, count: usize) {
    until(&format!("{count} disks are in use"), || {
        let disks = daemon.get("/v1/disks");
        let active = disks.as_array()?.iter().filter(|disk| disk["state"] == "active");
        (active.count() == count).then_some(())
    });
}

/// The hosts that hold replicas of a VDI of one shard.
fn holders(daemon: &Daemon, vdi: &str) -> Vec<String> {
    let disks = daemon.get("/v1/disks");
    let shown = daemon.get(&format!("/v1/vdis/{vdi}"));
    let mut holders: Vec<String> = shown["disks"]
        .as_array()
        .expect("its disks")
        .iter()
        .filter(|disk| disk["replicas"] == 1)
        .map(|disk| {
            let all = disks.as_array().expect("a list").iter();
            let mut same = all.filter(|one| one["id"] == disk["disk"]);
            same.next()
                .map_or("nobody", |one| one["host"].as_str().expect("a host"))
                .to_owned()
        })
        .collect();
    holders.sort();
    holders
}

fn host_id(daemon: &Daemon, name: &str) -> String {
    let hosts = daemon.get("/v1/hosts");
    find(&hosts, name)["id"].as_str().expect("an id").to_owned()
}

/// Three hosts with a disk each, and a VDI in two copies written by the first.
fn three_with_a_vdi(servers: &Servers, more: &str) -> Vec<Daemon> {
    let names = ["alpha", "beta", "gamma"];
    let hosts: Vec<Daemon> = names
        .iter()
        .map(|name| host_with(&servers.endpoints(), name, more, ""))
        .collect();
    hosts[0].post("/v1/pool", &json!({"name": "test"}));
    for host in &hosts {
        host.add_disk(1);
    }
    until_disks(&hosts[0], 3);
    hosts[0].create_vdi("web", GIB, 2);
    hosts[0].attach_nbd("web");
    fill(&hosts[0], "web", 0, 16, 0x11);
    until("both copies are there", || {
        (in_sync(&hosts[0], "web") == 2).then_some(())
    });
    hosts
}

fn index_of(name: &str) -> usize {
    ["alpha", "beta", "gamma"]
        .iter()
        .position(|one| *one == name)
        .expect("one of three")
}

/// A drained host gives up its disks and is a host still; one that is gone for good is forgotten.
#[test]
fn a_host_is_drained_and_then_forgotten() {
    let servers = Servers::start(1);
    let mut hosts = three_with_a_vdi(&servers, "");
    let leaving = holders(&hosts[0], "web")
        .into_iter()
        .find(|name| name != "alpha")
        .expect("two hold it");
    let id = host_id(&hosts[0], &leaving);
    hosts[0].post(&format!("/v1/hosts/{id}/drain"), &Value::Null);
    until("its disk has left", || {
        (hosts[0].get("/v1/disks").as_array()?.len() == 2).then_some(())
    });
    until("the VDI is whole without it", || {
        (in_sync(&hosts[0], "web") == 2).then_some(())
    });
    assert!(!holders(&hosts[0], "web").contains(&leaving));
    verify(&hosts[0], "web", 0, 16, 0x11);

    let remove = format!("/v1/hosts/{id}");
    let (code, answer) = hosts[0].call("DELETE", &remove, None);
    assert!(
        code == 409 && answer.to_string().contains("lives"),
        "{code} {answer}"
    );
    hosts[index_of(&leaving)].kill();
    until("it is forgotten", || {
        let (code, answer) = hosts[0].call("DELETE", &remove, None);
        assert!(code == 200 || code == 409, "{code} {answer}");
        (hosts[0].get("/v1/hosts").as_array()?.len() == 2).then_some(())
    });
    // All others are hosts as before: no room is no drain, said at once, and nothing has begun.
    let id = host_id(&hosts[0], "alpha");
    let (code, answer) = hosts[0].call("POST", &format!("/v1/hosts/{id}/drain"), None);
    assert!(
        code == 503 && answer.to_string().contains("no other disk can take"),
        "{code} {answer}"
    );
    until_disks(&hosts[0], 2);
}

/// A host that is dead with its disk is removed: its copy is made anew elsewhere first.
#[test]
fn a_dead_hosts_copies_are_made_anew_when_it_is_removed() {
    let servers = Servers::start(1);
    let mut hosts = three_with_a_vdi(&servers, "");
    let dead = holders(&hosts[0], "web")
        .into_iter()
        .find(|name| name != "alpha")
        .expect("two hold it");
    let id = host_id(&hosts[0], &dead);
    hosts[index_of(&dead)].kill();
    until("it is certain that it is dead", || {
        (hosts[0].call("DELETE", &format!("/v1/hosts/{id}"), None).0 == 200).then_some(())
    });
    until("it is forgotten", || {
        (hosts[0].get("/v1/hosts").as_array()?.len() == 2).then_some(())
    });
    until("the VDI is whole without it", || {
        (in_sync(&hosts[0], "web") == 2).then_some(())
    });
    assert_eq!(hosts[0].get("/v1/disks").as_array().map(Vec::len), Some(2));
    verify(&hosts[0], "web", 0, 16, 0x11);
}

/// Without anybody's doing: gone for longer than the setting is replaced, and what comes back late gives up its copy.
#[test]
fn what_is_gone_for_long_is_made_anew() {
    let servers = Servers::start(1);
    let mut hosts = three_with_a_vdi(&servers, "replace_after_s = 2");
    let dead = holders(&hosts[0], "web")
        .into_iter()
        .find(|name| name != "alpha")
        .expect("two hold it");
    hosts[index_of(&dead)].kill();
    fill(&hosts[0], "web", 16, 16, 0x22);
    until("it is made anew elsewhere", || {
        let now = holders(&hosts[0], "web");
        (!now.contains(&dead) && in_sync(&hosts[0], "web") == 2).then_some(())
    });
    hosts[index_of(&dead)].start_again();
    until_disks(&hosts[0], 3);
    let log = hosts[index_of(&dead)].log();
    assert!(log.contains("no longer placed here; dropped"), "{log}");
    verify(&hosts[0], "web", 0, 16, 0x11);
    verify(&hosts[0], "web", 16, 16, 0x22);
}

/// A door to etcd that can be shut.
struct Gate {
    url: String,
    is_shut: std::sync::Arc<std::sync::atomic::AtomicBool>,
}

impl Gate {
    fn before(endpoint: &str) -> Gate {
        use std::sync::atomic::{AtomicBool, Ordering};
        let target = endpoint.trim_start_matches("http://").to_owned();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("bound"));
        let is_shut = std::sync::Arc::new(AtomicBool::new(false));
        let shut = std::sync::Arc::clone(&is_shut);
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let Ok(server) = std::net::TcpStream::connect(&target) else {
                    continue;
                };
                for (mut from, mut to) in [
                    (
                        client.try_clone().expect("clone"),
                        server.try_clone().expect("clone"),
                    ),
                    (server, client),
                ] {
                    let shut = std::sync::Arc::clone(&shut);
                    std::thread::spawn(move || {
                        use std::io::{Read, Write};
                        let mut bytes = [0; 64 * 1024];
                        while let Ok(count @ 1..) = from.read(&mut bytes) {
                            // Shut: what comes waits, as behind a cut cable that is mended later.
                            while shut.load(Ordering::Acquire) {
                                std::thread::sleep(std::time::Duration::from_millis(5));
                            }
                            if to.write_all(&bytes[..count]).is_err() {
                                break;
                            }
                        }
                        let _ = to.shutdown(std::net::Shutdown::Both);
                    });
                }
            }
        });
        Gate { url, is_shut }
    }

    fn shut(&self, is_shut: bool) {
        self.is_shut.store(is_shut, std::sync::atomic::Ordering::Release);
    }
}

/// The writer's host lives and serves its guests, but nobody hears it: another host takes the VDI when the lease has ended,
/// and from then on the first completes nothing.
#[test]
fn a_vdi_is_taken_from_a_host_that_is_cut_off() {
    let servers = Servers::start(1);
    let gate = Gate::before(&servers.endpoints()[0]);
    let mut a = host_with(std::slice::from_ref(&gate.url), "alpha", "", "");
    let b = host(&servers, "beta");
    let c = host(&servers, "gamma");
    b.post("/v1/pool", &json!({"name": "test"}));
    b.add_disk(1);
    c.add_disk(1);
    until_disks(&a, 2);
    a.create_vdi("web", GIB, 2);
    let socket = a.attach_nbd("web");
    let mut guest = NbdClient::connect(&socket).expect("a door");
    guest.write(0, &[1; 4096]).expect("written");
    gate.shut(true);
    guest
        .write(4096, &[2; 4096])
        .expect("cut off from etcd it goes on");
    take_over(&b, "web", "alpha");
    let mut other = NbdClient::connect(&b.path("web.nbd")).expect("a door");
    for (block, byte) in [(0, 1), (1, 2)] {
        assert_eq!(other.read(block * 4096, 4096).expect("read"), [byte; 4096]);
    }
    other.write(4096, &[3; 4096]).expect("written");
    // The old writer's guest: never a success.
    guest
        .send(support::WRITE, 7, 4096, 4096, &[4; 4096])
        .expect("sent");
    other.write(8192, &[3; 4096]).expect("written");
    gate.shut(false);
    a.until("it knows that it lost the VDI", |a| {
        let events = a.get("/v1/status")["events"].to_string();
        events.contains("is written by host beta now")
    });
    let answer = guest.receive();
    assert!(!matches!(answer, Ok((_, 0))), "{answer:?}");
    assert_eq!(other.read(4096, 4096).expect("read"), [3; 4096]);
}

/// etcd comes back empty. Guests go on, everything else is refused with the reason; then the records are rebuilt.
#[test]
fn an_etcd_that_was_wiped_is_rebuilt_from_the_disks() {
    let servers = Servers::start(1);
    let mut a = host(&servers, "alpha");
    let mut b = host(&servers, "beta");
    a.post("/v1/pool", &json!({"name": "test"}));
    a.add_disk(1);
    b.add_disk(1);
    until("both disks are seen", || {
        (a.get("/v1/disks").as_array().unwrap().len() == 2).then_some(())
    });
    a.create_vdi("web", GIB, 2);
    a.attach_nbd("web");
    fill(&a, "web", 0, 20, 1);

    servers.members[0].kill();
    servers.members[0].wipe();
    servers.members[0].start();
    let create = json!({"name": "new", "bytes": GIB, "replicas": 1});
    until("it is said why nothing can be made", || {
        let (code, answer) = a.call("POST", "/v1/vdis", Some(&create));
        assert_eq!(code, 503, "{answer}");
        answer["message"]
            .as_str()
            .expect("a message")
            .contains("weft pool recover")
            .then_some(())
    });
    until("the status says so", || {
        let status = a.get("/v1/status");
        status["control"].to_string().contains("went back").then_some(())
    });
    fill(&a, "web", 20, 20, 2);
    verify(&a, "web", 0, 20, 1);

    a.kill();
    b.kill();
    let disk = |daemon: &Daemon| daemon.disk_path(1).display().to_string();
    let state = |daemon: &Daemon| daemon.path("state").display().to_string();
    let exported = weft(&["pool", "export", &disk(&b), "--state", &state(&b)]);
    assert_eq!(exported.code, 0, "{exported:?}");
    let file = b.path("beta.json");
    std::fs::write(&file, &exported.out).expect("write");
    let (file, endpoints) = (file.display().to_string(), servers.endpoints().join(","));
    let done = weft(&[
        "pool",
        "recover",
        &file,
        &disk(&a),
        "--state",
        &state(&a),
        "--etcd",
        &endpoints,
        "--yes",
    ]);
    assert_eq!(done.code, 0, "{done:?}");
    println!("{}", done.out);

    a.start_again();
    b.start_again();
    assert_eq!(a.get("/v1/pool")["name"], "test");
    until("both disks are served", || {
        let disks = b.get("/v1/disks");
        let mut states = disks
            .as_array()
            .unwrap()
            .iter()
            .map(|disk| disk["state"] == "active");
        states.all(|is_active| is_active).then_some(())
    });
    b.attach_nbd("web");
    verify(&b, "web", 0, 20, 1);
    verify(&b, "web", 20, 20, 2);
    fill(&b, "web", 0, 20, 3);
    b.until_health("web", "whole");
    // Another wipe, and everybody knows what the last recovery made.
    let (code, answer) = a.call("POST", "/v1/vdis", Some(&create));
    assert_eq!((code, &answer["id"]), (200, &json!(2)), "{answer}");
}
