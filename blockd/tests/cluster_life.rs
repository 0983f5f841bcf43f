//! What happens to a cluster besides faults: hosts are renamed, copied by mistake, pointed at the wrong etcd; disks change hosts;
//! VDIs lose theirs; hosts come. Each refusal is one line that names the thing, and nobody else notices.

// By the name that etcd.rs has for it in its own crate's tests.
extern crate control as weft_control;

#[path = "../../control/tests/support/etcd.rs"]
mod etcd;
mod support;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use etcd::{Servers, until};
use serde_json::{Value, json};
use support::{Daemon, GIB, MIB, NbdClient, copy, fill, verify};

/// A daemon with the file of its settings, which may change between two lives.
struct Host {
    daemon: Daemon,
    config: PathBuf,
    address: String,
}

fn free_address() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("bound").to_string()
}

/// `[cluster]` of a host; `more` goes before it, `last` into it.
fn settings(servers: &Servers, name: &str, address: &str, more: &str, last: &str) -> String {
    let urls = servers.endpoints();
    let urls: Vec<String> = urls.iter().map(|url| format!("'{url}'")).collect();
    format!(
        "{more}\n[cluster]\nhost = '{name}'\nlisten = '{address}'\netcd = [{}]\nlease_s = 3\n{last}\n",
        urls.join(", ")
    )
}

fn start(servers: &Servers, name: &str, more: &str, last: &str) -> Host {
    let address = free_address();
    let config = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).expect("a file");
    let (_, config) = config.keep().expect("kept for later lives");
    std::fs::write(&config, settings(servers, name, &address, more, last)).expect("write");
    let daemon = Daemon::start(&["--config", config.to_str().expect("UTF-8")]);
    Host {
        daemon,
        config,
        address,
    }
}

/// The one line with which a daemon refuses to start.
fn refusal(state: &Path, config: Option<&Path>) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_blockd"));
    command.arg("--state").arg(state);
    if let Some(config) = config {
        command.arg("--config").arg(config);
    }
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("blockd starts");
    let status = until("it refuses to start", || child.try_wait().expect("wait"));
    assert!(!status.success(), "{status}");
    let mut said = String::new();
    std::io::Read::read_to_string(&mut child.stderr.take().expect("piped"), &mut said).expect("UTF-8");
    let lines: Vec<&str> = said.lines().filter(|line| line.starts_with("blockd: ")).collect();
    assert_eq!(lines.len(), 1, "{said}");
    lines[0].to_owned()
}

fn host_named(daemon: &Daemon, name: &str) -> Option<Value> {
    let hosts = daemon.get("/v1/hosts");
    let mut hosts = hosts.as_array().expect("a list").iter();
    hosts.find(|host| host["name"] == name).cloned()
}

fn until_disks(daemon: &Daemon, count: usize) {
    until(&format!("{count} disks are in use"), || {
        let disks = daemon.get("/v1/disks");
        let active = disks.as_array()?.iter().filter(|disk| disk["state"] == "active");
        (active.count() == count).then_some(())
    });
}

fn written_by(daemon: &Daemon, vdi: &str) -> String {
    let shown = daemon.get(&format!("/v1/vdis/{vdi}"));
    shown["host"].as_str().unwrap_or("nobody").to_owned()
}

/// A pool of two hosts; the first has the disk, and a VDI `web` with 16 blocks of it written and attached.
fn alpha_with_web_and_beta(servers: &Servers) -> (Host, Host) {
    let a = start(servers, "alpha", "", "");
    let b = start(servers, "beta", "", "");
    a.daemon.post("/v1/pool", &json!({"name": "test"}));
    a.daemon.add_disk(1);
    a.daemon.create_vdi("web", GIB, 1);
    a.daemon.attach_nbd("web");
    fill(&a.daemon, "web", 0, 16, 1);
    (a, b)
}

#[test]
fn a_host_that_is_renamed_is_the_same_host() {
    let servers = Servers::start(1);
    let (mut a, b) = alpha_with_web_and_beta(&servers);
    let before = host_named(&a.daemon, "alpha").expect("it is there");

    a.daemon.kill();
    std::fs::write(&a.config, settings(&servers, "omega", &a.address, "", "")).expect("write");
    a.daemon.start_again();
    let after = until("the other sees the new name", || host_named(&b.daemon, "omega"));
    assert_eq!(after["id"], before["id"]);
    assert_eq!(host_named(&b.daemon, "alpha"), None, "it is not two");
    until("its VDI is written under the new name", || {
        (written_by(&b.daemon, "web") == "omega").then_some(())
    });
    until("its disk is in use", || {
        let disk = b.daemon.get("/v1/disks")[0].clone();
        (disk["state"] == "active" && disk["host"] == "omega").then_some(())
    });
    verify(&a.daemon, "web", 0, 16, 1);
    // The old name is free, the new one is not.
    let c = start(&servers, "alpha", "", "");
    assert_ne!(
        host_named(&c.daemon, "alpha").expect("it is there")["id"],
        before["id"]
    );
    let state = tempfile::tempdir().expect("a folder");
    let config = state.path().join("blockd.toml");
    std::fs::write(&config, settings(&servers, "omega", &free_address(), "", "")).expect("write");
    let said = refusal(&state.path().join("state"), Some(&config));
    assert!(said.contains("has the name 'omega' and lives"), "{said}");
}

#[test]
fn a_state_directory_is_of_a_cluster_or_is_not() {
    let servers = Servers::start(1);
    let mut a = start(&servers, "alpha", "", "");
    a.daemon.post("/v1/pool", &json!({"name": "test"}));
    a.daemon.stop();
    let said = refusal(&a.daemon.path("state"), None);
    assert!(
        said.contains("belongs to a host of a cluster: [cluster] is missing"),
        "{said}"
    );
    assert!(!a.daemon.path("state/control").exists(), "nothing was begun");
    a.daemon.start_again();
    assert_eq!(a.daemon.get("/v1/pool")["name"], "test");

    let mut alone = Daemon::with_disks(0, &[]);
    alone.stop();
    let said = refusal(&alone.path("state"), Some(&a.config));
    assert!(
        said.contains("has control records of a pool of its own"),
        "{said}"
    );
    assert!(!alone.path("state/host-id").exists(), "nothing was begun");
    alone.start_again();
    assert_eq!(alone.get("/v1/pool")["name"], "test");
}

#[test]
fn the_etcd_of_another_pool_is_refused_by_name() {
    let servers = Servers::start(1);
    let mut a = start(&servers, "alpha", "", "");
    let other = start(&servers, "other", "", "etcd_prefix = '/other/'");
    a.daemon.post("/v1/pool", &json!({"name": "test"}));
    other.daemon.post("/v1/pool", &json!({"name": "others"}));
    let id = |daemon: &Daemon| daemon.get("/v1/pool")["id"].as_str().expect("an id").to_owned();
    let (ours, theirs) = (id(&a.daemon), id(&other.daemon));
    // It is written down within a second or so.
    until("the host remembers its pool", || {
        let known = std::fs::read_to_string(a.daemon.path("state/etcd-known.json")).ok()?;
        known.contains(&ours).then_some(())
    });
    a.daemon.stop();
    let there = settings(&servers, "alpha", &a.address, "", "etcd_prefix = '/other/'");
    std::fs::write(&a.config, there).expect("write");
    let said = refusal(&a.daemon.path("state"), Some(&a.config));
    let is_clear = said.contains(&format!("belongs to pool {ours}")) && said.contains(&theirs);
    assert!(is_clear, "{said}");
    assert_eq!(
        other.daemon.get("/v1/hosts").as_array().map(Vec::len),
        Some(1),
        "it joined"
    );
    // A mistake in the settings is nothing that went back: mended, it is as before.
    std::fs::write(&a.config, settings(&servers, "alpha", &a.address, "", "")).expect("write");
    a.daemon.start_again();
    assert_eq!(a.daemon.get("/v1/pool")["name"], "test");
    a.daemon.add_disk(1);
}

#[test]
fn a_copy_of_a_host_is_refused_while_the_host_lives() {
    let servers = Servers::start(1);
    let mut a = start(&servers, "alpha", "", "");
    a.daemon.post("/v1/pool", &json!({"name": "test"}));
    a.daemon.add_disk(1);
    a.daemon.create_vdi("web", GIB, 1);
    a.daemon.attach_nbd("web");
    let copied = tempfile::tempdir().expect("a folder");
    let state = copied.path().join("state");
    std::fs::create_dir(&state).expect("a folder");
    for file in ["host-id", "etcd-known.json"] {
        copy(&a.daemon.path(&format!("state/{file}")), &state.join(file));
    }
    let config = copied.path().join("blockd.toml");
    for name in ["alpha", "beta"] {
        std::fs::write(&config, settings(&servers, name, &free_address(), "", "")).expect("write");
        let said = refusal(&state, Some(&config));
        assert!(
            said.contains("lives already") && said.contains(&a.address),
            "{said}"
        );
    }
    assert_eq!(written_by(&a.daemon, "web"), "alpha");
    fill(&a.daemon, "web", 0, 16, 1);
    // Itself it is not: killed and started at once, at the place where it was.
    a.daemon.kill();
    a.daemon.start_again();
    verify(&a.daemon, "web", 0, 16, 1);
}

/// Nobody is attached and the host does not come back: somebody looks after the VDI. One with guests is left to be taken.
#[test]
fn orphaned_vdis_are_adopted() {
    let servers = Servers::start(1);
    let more = "replace_after_s = 2";
    let mut a = start(&servers, "alpha", more, "");
    let others = [
        start(&servers, "beta", more, ""),
        start(&servers, "gamma", more, ""),
    ];
    a.daemon.post("/v1/pool", &json!({"name": "test"}));
    for other in &others {
        other.daemon.add_disk(1);
    }
    until_disks(&a.daemon, 2);
    for name in ["free", "taken"] {
        a.daemon.create_vdi(name, GIB, 2);
        a.daemon.attach_nbd(name);
        fill(&a.daemon, name, 0, 16, 1);
    }
    a.daemon.post("/v1/vdis/free/detach", &json!({}));
    assert_eq!(written_by(&a.daemon, "free"), "alpha");
    a.daemon.kill();
    let adopter = until("another host looks after it", || {
        let host = written_by(&others[0].daemon, "free");
        others.iter().find(|other| {
            host != "alpha" && {
                let events = other.daemon.get("/v1/status")["events"].to_string();
                events.contains("VDI free is looked after by this host now")
            }
        })
    });
    assert_eq!(
        written_by(&others[0].daemon, "taken"),
        "alpha",
        "its guests may come back"
    );
    adopter.daemon.attach_nbd("free");
    verify(&adopter.daemon, "free", 0, 16, 1);
    fill(&adopter.daemon, "free", 16, 16, 2);
    // It comes back: the one it kept is its own, the other is not.
    a.daemon.start_again();
    verify(&a.daemon, "taken", 0, 16, 1);
    assert_ne!(written_by(&a.daemon, "free"), "alpha");
}

/// Not while its host serves it; afterwards with all that is on it, and the first host does not take it for its own again.
#[test]
fn a_disk_is_given_to_another_host() {
    let servers = Servers::start(1);
    let (mut a, b) = alpha_with_web_and_beta(&servers);
    let path = a.daemon.disk_path(1);
    let add = |force: bool| {
        b.daemon
            .call("POST", "/v1/disks", Some(&json!({"path": path, "force": force})))
    };
    until("its host says that it serves it", || {
        let (code, answer) = add(false);
        assert_eq!(code, 409, "{answer}");
        answer["message"]
            .as_str()?
            .contains("which host alpha serves")
            .then_some(())
    });
    let (code, answer) = add(true);
    assert!(code == 409 && answer["code"] == "conflict", "{answer}");
    fill(&a.daemon, "web", 16, 16, 2);

    a.daemon.kill();
    until("it is certain that nobody serves it", || {
        let (code, answer) = add(false);
        assert!(
            code == 200 || answer.to_string().contains("host alpha serves"),
            "{code} {answer}"
        );
        (code == 200).then_some(())
    });
    let disk = b.daemon.get("/v1/disks")[0].clone();
    assert_eq!(
        (&disk["host"], &disk["state"]),
        (&json!("beta"), &json!("active")),
        "{disk}"
    );
    a.daemon.start_again();
    verify(&a.daemon, "web", 0, 16, 1);
    verify(&a.daemon, "web", 16, 16, 2);
    fill(&a.daemon, "web", 0, 16, 3);
    let disks = a.daemon.get("/v1/disks");
    assert_eq!(disks.as_array().map(Vec::len), Some(1), "{disks}");
    assert_eq!(disks[0]["host"], "beta");
    // And back again.
    let back = |daemon: &Daemon| daemon.call("POST", "/v1/disks", Some(&json!({"path": path})));
    let (code, answer) = back(&a.daemon);
    assert!(
        code == 409 && answer.to_string().contains("host beta serves"),
        "{answer}"
    );
    drop(b);
    until("it is certain that nobody serves it", || {
        (back(&a.daemon).0 == 200).then_some(())
    });
    verify(&a.daemon, "web", 0, 16, 3);
}

/// A host comes with an empty disk: every host moves its part there, and no copy is missing meanwhile.
#[test]
fn a_new_host_takes_its_share() {
    let servers = Servers::start(1);
    let hosts = [start(&servers, "alpha", "", ""), start(&servers, "beta", "", "")];
    hosts[0].daemon.post("/v1/pool", &json!({"name": "test"}));
    for host in &hosts {
        host.daemon.add_disk(1);
    }
    let vdis = ["one", "two"];
    for (host, name) in hosts.iter().zip(vdis) {
        until_disks(&host.daemon, 2);
        let create = json!({"name": name, "bytes": 32 * MIB, "replicas": 2, "shard_bytes": 2 * MIB});
        host.daemon.post("/v1/vdis", &create);
        host.daemon.attach_nbd(name);
        fill(&host.daemon, name, 0, 512, 7);
    }
    let new = start(&servers, "gamma", "", "");
    new.daemon.add_disk(1);
    let replicas = |host: &str| {
        let disks = new.daemon.get("/v1/disks");
        let mut disks = disks.as_array().expect("a list").iter();
        let disk = disks.find(|disk| disk["host"] == host).expect("each has one");
        disk["replicas"].as_u64().expect("a number")
    };
    // 64 replicas on three disks.
    until("it has its share", || {
        for (host, name) in hosts.iter().zip(vdis) {
            let vdi = host.daemon.get(&format!("/v1/vdis/{name}"));
            assert_eq!(vdi["health"], "whole", "{vdi}");
        }
        (replicas("gamma") >= 20).then_some(())
    });
    for (host, name) in hosts.iter().zip(vdis) {
        assert!(
            !host.daemon.log().contains("is out of sync"),
            "{}",
            host.daemon.log()
        );
        verify(&host.daemon, name, 0, 512, 7);
    }
    assert!(replicas("alpha") >= 19 && replicas("beta") >= 19);
}

/// What hands do to a record costs what the record was of, and nothing else: also after the next start.
#[test]
fn a_daemon_starts_beside_a_damaged_record() {
    let servers = Servers::start(1);
    let mut host = start(&servers, "alpha", "", "");
    host.daemon.post("/v1/pool", &json!({"name": "test"}));
    host.daemon.add_disk(1);
    for (name, byte) in [("one", 1), ("two", 2)] {
        host.daemon.create_vdi(name, GIB, 1);
        host.daemon.attach_nbd(name);
        fill(&host.daemon, name, 0, 16, byte);
    }
    let first = &host.daemon.get("/v1/vdis/one")["id"];
    assert_eq!(first, 1, "the one whose record is spoiled");
    let record = put_in_etcd(&servers, "L3dlZnQvdmRpLzAwMDAwMDAx", "e25vdCBqc29u");
    host.daemon.kill();
    host.daemon.start_again();
    let said = host.daemon.log();
    let damaged = "a VDI is not opened: the control record 'vdi/00000001' is damaged";
    assert!(said.contains(damaged), "{said}");
    verify(&host.daemon, "two", 0, 16, 2);
    fill(&host.daemon, "two", 0, 16, 3);
    // Put back it is what it was.
    put_in_etcd(&servers, "L3dlZnQvdmRpLzAwMDAwMDAx", &record);
    host.daemon.kill();
    host.daemon.start_again();
    verify(&host.daemon, "one", 0, 16, 1);
    verify(&host.daemon, "two", 0, 16, 3);
}

/// All hosts are stopped, one after the other. The last has nobody left who could answer its VDI's flush, and does not
/// wait for that; what was completed is there when they are back.
#[test]
fn the_last_host_stops_without_the_others() {
    let servers = Servers::start(1);
    let mut hosts = ["alpha", "beta", "gamma"].map(|name| start(&servers, name, "", ""));
    hosts[0].daemon.post("/v1/pool", &json!({"name": "test"}));
    hosts.iter().for_each(|host| drop(host.daemon.add_disk(1)));
    until_disks(&hosts[0].daemon, 3);
    hosts[0].daemon.create_vdi("web", GIB, 3);
    let door = hosts[0].daemon.attach_nbd("web");
    let mut guest = NbdClient::connect(&door).expect("a door");
    guest.write(0, &[1; 4096]).expect("written");
    guest.flush().expect("flushed");
    guest.write(4096, &[2; 4096]).expect("written, and not flushed");
    drop(guest);
    for number in [1, 2, 0] {
        hosts[number].daemon.stop();
    }
    let said = hosts[0].daemon.log();
    assert!(
        said.contains("not flushed at the stop: too few replicas can be reached"),
        "{said}"
    );
    assert!(
        !said.contains("no answer in"),
        "it waited as for a slow disk: {said}"
    );
    // Who could be reached was waited for.
    for host in &hosts[1..] {
        let said = host.daemon.log();
        assert!(!said.contains("not flushed"), "{said}");
    }
    hosts.iter_mut().for_each(|host| host.daemon.start_again());
    let mut guest = NbdClient::connect(&door).expect("a door");
    assert_eq!(guest.read(0, 4096).expect("read"), [1; 4096]);
    assert_eq!(guest.read(4096, 4096).expect("read"), [2; 4096]);
}

/// Puts a value, both in base64; returns what was there.
fn put_in_etcd(servers: &Servers, key: &str, value: &str) -> String {
    let ask = |what: &str, body: Value| {
        let url = format!("{}/v3/kv/{what}", servers.endpoints()[0]);
        let mut curl = Command::new("curl");
        curl.args(["--silent", "--fail", "--data", &body.to_string(), &url]);
        let output = curl.output().expect("curl runs");
        assert!(output.status.success(), "{output:?}");
        serde_json::from_slice::<Value>(&output.stdout).expect("JSON")
    };
    let before = ask("range", json!({"key": key}));
    ask("put", json!({"key": key, "value": value}));
    before["kvs"][0]["value"].as_str().expect("a record").to_owned()
}
