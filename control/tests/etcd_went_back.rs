//! The control store over real etcd servers that are restored from old copies, emptied, or hang: what is known of
//! them must not go back, and one dead member must not hold up those who could ask another.

#[path = "support/etcd.rs"]
mod etcd;

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use control::etcd::{Etcd, EtcdSettings};
use control::{ControlStore, PoolRecord};
use etcd::{Servers, until};
use types::{Incarnation, PoolId};
use weft_control as control;
use weft_control::backend::{Backend, BackendError, Commit, Transaction};

fn settings(servers: &Servers) -> EtcdSettings {
    EtcdSettings {
        endpoints: servers.endpoints(),
        prefix: "/weft-test/".to_owned(),
        user: None,
        tls: None,
        patience: Duration::from_secs(20),
    }
}

fn pool(n: u128) -> PoolRecord {
    PoolRecord {
        id: PoolId(n),
        name: "main".to_owned(),
        created: "2026-11-22T01:00:00Z".parse().unwrap(),
        recovered: 0,
    }
}

fn put(key: &str, value: &str) -> Transaction {
    Transaction {
        puts: vec![(key.to_owned(), value.as_bytes().to_vec())],
        ..Transaction::default()
    }
}

/// A host: the same memory in each of its lives.
struct Host {
    settings: EtcdSettings,
    memory: PathBuf,
}

impl Host {
    fn open(&self) -> Result<Arc<Etcd>, BackendError> {
        Etcd::open_remembering(self.settings.clone(), self.memory.clone()).map(Arc::new)
    }
}

fn is_went_back(error: &BackendError, words: &str) -> bool {
    matches!(error, BackendError::WentBack { reason } if reason.contains(words))
}

/// Nothing is read, nothing is changed, no lease; what was seen stays, and the health says why.
fn is_refused(etcd: &Etcd, words: &str) {
    let leases = etcd.leases().unwrap();
    let errors = [
        etcd.get("pool").unwrap_err(),
        etcd.list("vdi/").unwrap_err(),
        etcd.commit(&put("x", "y")).map(drop).unwrap_err(),
        leases.grant(Duration::from_secs(5)).map(drop).unwrap_err(),
    ];
    for error in errors {
        assert!(is_went_back(&error, words), "{error}");
        assert!(error.to_string().contains("weft pool recover"), "{error}");
    }
    assert!(etcd.seen("pool").unwrap().is_some(), "what was seen stays");
    let (_, reason) = until("the health says so", || etcd.health().unreachable);
    assert!(reason.contains(words), "{reason}");
}

#[test]
fn an_etcd_restored_from_an_old_copy_gives_no_number_twice() {
    let servers = Servers::start(1);
    let folder = tempfile::tempdir().unwrap();
    let host = |name: &str| Host {
        settings: settings(&servers),
        memory: folder.path().join(name),
    };
    let (a, b) = (host("a"), host("b"));
    let (living, other) = (a.open().unwrap(), b.open().unwrap());
    let store = ControlStore::over(living.clone());
    store.create_pool(&pool(7)).unwrap();
    for _ in 0..10 {
        store.next_incarnation().unwrap();
    }
    servers.members[0].kill();
    let copy = servers.members[0].copy();
    servers.members[0].start();
    let highest = until("it goes on", || store.next_incarnation().ok());
    assert!(highest >= Incarnation(11));
    let written = std::fs::read_to_string(&a.memory).unwrap();
    let words = format!("\"incarnation\":{}", highest.0);
    assert!(written.contains(&words), "durable before it is given: {written}");
    // The other host has only heard of it, and is down meanwhile.
    until("the other has heard", || {
        (other.highest_incarnation() == highest.0).then_some(())
    });
    drop(other);

    servers.members[0].kill();
    servers.members[0].restore(&copy);
    servers.members[0].start();
    let error = store.next_incarnation().unwrap_err();
    println!("{error}");
    is_refused(&living, "etcd went back from revision");
    let error = b.open().map(drop).unwrap_err();
    assert!(is_went_back(&error, "etcd went back from revision"), "{error}");

    // Somebody who knows nothing makes it go on, past what was known: that mends nothing.
    let stranger = ControlStore::over(Arc::new(Etcd::open(settings(&servers)).unwrap()));
    assert!(
        stranger.next_incarnation().unwrap() <= highest,
        "the copy is from before"
    );
    for _ in 0..20 {
        stranger.next_incarnation().unwrap();
    }
    is_refused(&living, "etcd went back from revision");
    drop((store, living));
    for host in [&a, &b] {
        let error = host.open().map(drop).unwrap_err();
        assert!(is_went_back(&error, "etcd went back from revision"), "{error}");
    }

    // The records were rebuilt: a host that starts again believes them, and goes on above all it ever heard of, though
    // the number that stands there is lower.
    let raw = Etcd::open(settings(&servers)).unwrap();
    let id = PoolId(7);
    let rebuilt = format!(
        r#"{{"v":1,"record":{{"id":"{id}","name":"main","created":"2026-11-22T01:00:00Z","recovered":1}}}}"#
    );
    let lower = r#"{"v":1,"record":3}"#;
    assert_eq!(raw.commit(&put("incarnation", lower)).unwrap(), Commit::Done);
    let error = raw.commit(&put("pool", &rebuilt)).unwrap_err();
    assert!(
        is_went_back(&error, "has to be started again"),
        "for who runs it went back too: {error}"
    );
    let again = ControlStore::over(b.open().unwrap());
    let next = again.next_incarnation().unwrap();
    assert!(next > highest, "{next} was given before, up to {highest}");
    let again = ControlStore::over(a.open().unwrap());
    assert!(again.next_incarnation().unwrap() > next);
}

#[test]
fn an_etcd_that_was_emptied_is_refused_in_the_next_life_too() {
    let servers = Servers::start(1);
    let folder = tempfile::tempdir().unwrap();
    let host = Host {
        settings: settings(&servers),
        memory: folder.path().join("a"),
    };
    let living = host.open().unwrap();
    ControlStore::over(living.clone()).create_pool(&pool(7)).unwrap();
    // `etcdctl del --prefix`: the revision goes on, the watch shows it all.
    let raw = Etcd::open(settings(&servers)).unwrap();
    let all = Transaction {
        delete_prefixes: vec![String::new()],
        ..Transaction::default()
    };
    let error = raw.commit(&all).unwrap_err();
    assert!(is_went_back(&error, "does not have the pool"), "{error}");
    until("it is noticed", || living.health().unreachable);
    is_refused(&living, "does not have the pool");
    drop(living);
    let error = host.open().map(drop).unwrap_err();
    assert!(is_went_back(&error, "does not have the pool"), "{error}");
    // Another pool in its place is not this host's.
    let stranger = Etcd::open(settings(&servers)).unwrap();
    ControlStore::over(Arc::new(stranger))
        .create_pool(&pool(8))
        .unwrap();
    let error = host.open().map(drop).unwrap_err();
    assert!(matches!(error, BackendError::AnotherPool { .. }), "{error}");
}

#[test]
fn a_memory_that_is_damaged_is_said() {
    let servers = Servers::start(1);
    let folder = tempfile::tempdir().unwrap();
    let host = Host {
        settings: settings(&servers),
        memory: folder.path().join("a"),
    };
    drop(host.open().unwrap());
    for content in ["", "{", r#"{"v":2,"pool":null,"revision":1,"incarnation":1}"#] {
        std::fs::write(&host.memory, content).unwrap();
        let error = host.open().map(drop).unwrap_err();
        assert!(matches!(error, BackendError::Memory { .. }), "{error}");
    }
}

#[test]
fn many_callers_do_not_try_a_dead_member_one_after_the_other() {
    let servers = Servers::start(3);
    let root = |path: &str, body: &str| {
        let output = Command::new("curl")
            .args(["--silent", "--fail", "--max-time", "10", "--data", body])
            .arg(format!("{}/v3/auth/{path}", servers.members[0].client_url))
            .output()
            .expect("curl (Debian package curl)");
        output.status.success().then_some(())
    };
    until("a user", || {
        root("user/add", r#"{"name":"root","password":"secret"}"#)
    });
    until("a role", || root("role/add", r#"{"name":"root"}"#));
    until("it is granted", || {
        root("user/grant", r#"{"user":"root","role":"root"}"#)
    });
    until("users are asked", || root("enable", "{}"));

    // The member that hangs is named three times: one who leaves it meets it again.
    let hanging = (servers.leader() + 1) % 3;
    let mut endpoints = vec![servers.members[hanging].client_url.clone(); 3];
    let others = (0..3).filter(|member| *member != hanging);
    endpoints.extend(others.map(|member| servers.members[member].client_url.clone()));
    let etcd = Arc::new(
        Etcd::open(EtcdSettings {
            endpoints,
            user: Some(("root".to_owned(), "secret".to_owned())),
            patience: Duration::from_secs(12),
            ..settings(&servers)
        })
        .unwrap(),
    );
    servers.members[hanging].signal("STOP");
    let callers: Vec<_> = (0..10)
        .map(|_| {
            let etcd = Arc::clone(&etcd);
            std::thread::spawn(move || etcd.get("x").map(drop))
        })
        .collect();
    for caller in callers {
        caller
            .join()
            .unwrap()
            .expect("a member that lives was within reach");
    }
    servers.members[hanging].signal("CONT");
}

#[test]
fn what_was_changed_is_seen_though_the_watch_hangs() {
    let servers = Servers::start(3);
    let hanging = (servers.leader() + 1) % 3;
    let mut endpoints = servers.endpoints();
    endpoints.rotate_left(hanging);
    let etcd = Etcd::open(EtcdSettings {
        endpoints,
        ..settings(&servers)
    })
    .unwrap();
    servers.members[hanging].signal("STOP");
    // What is asked for first finds out that the member is gone; the watch does not know yet.
    let first = etcd.commit(&put("x", "1"));
    assert!(matches!(first, Err(BackendError::Unknown { .. })), "{first:?}");
    assert_eq!(etcd.commit(&put("x", "2")).unwrap(), Commit::Done);
    assert_eq!(etcd.seen("x").unwrap().as_deref(), Some(&b"2"[..]));
    servers.members[hanging].signal("CONT");
}

#[test]
fn the_first_change_after_all_was_read_is_seen() {
    let servers = Servers::start(1);
    let other = Etcd::open(settings(&servers)).unwrap();
    let etcd = Etcd::open(settings(&servers)).unwrap();
    assert_eq!(other.commit(&put("first", "1")).unwrap(), Commit::Done);
    assert_eq!(other.commit(&put("second", "2")).unwrap(), Commit::Done);
    until("the second is seen", || etcd.seen("second").unwrap());
    assert_eq!(etcd.seen("first").unwrap().as_deref(), Some(&b"1"[..]));
}
