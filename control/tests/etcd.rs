//! The control store over real etcd servers: what a cluster relies on, and what it does when they fail.

#[path = "support/etcd.rs"]
mod etcd;

use std::sync::Arc;
use std::time::{Duration, Instant};

use control::etcd::{Etcd, EtcdSettings};
use control::{
    AttachTarget, Attachment, ControlStore, DiskRecord, DiskState, Embedded, HostAlive, HostRecord, MemoryKv,
    Placed, PoolRecord, RecordError, VdiRecord, VdiWriter,
};
use etcd::{Servers, until};
use replication::{ShardRecord, Sharing};
use types::{DiskId, Epoch, HostId, Incarnation, LayerId, PoolId, ShardId, ShardNo, VdiId};
use weft_control as control;
use weft_control::backend::{Backend, BackendError, Commit, Compare, Transaction};

const GIB: u64 = 1 << 30;

fn open(settings: &EtcdSettings) -> Arc<Etcd> {
    Arc::new(Etcd::open(settings.clone()).expect("etcd answers"))
}

fn store(settings: &EtcdSettings) -> ControlStore {
    ControlStore::over(open(settings))
}

fn puts(entries: &[(&str, &str)]) -> Transaction {
    Transaction {
        puts: entries
            .iter()
            .map(|(key, value)| ((*key).to_owned(), value.as_bytes().to_vec()))
            .collect(),
        ..Transaction::default()
    }
}

fn keys(entries: &[(String, Vec<u8>)]) -> Vec<&str> {
    entries.iter().map(|(key, _)| key.as_str()).collect()
}

/// What every backend owes; `other` is the same store for somebody else.
fn owes(backend: &dyn Backend, other: &dyn Backend) {
    let mut changes = backend.watch("a/");
    assert_eq!(backend.get("a/1").unwrap(), None);
    let all = puts(&[("a/2", "two"), ("a/1", "one"), ("a0", "not in a/"), ("b/1", "b")]);
    assert_eq!(backend.commit(&all).unwrap(), Commit::Done);
    assert!(changes.has_changed().unwrap());
    changes.mark_unchanged();
    for who in [backend, other] {
        assert_eq!(who.get("a/1").unwrap().as_deref(), Some(&b"one"[..]));
        assert_eq!(keys(&who.list("a/").unwrap()), ["a/1", "a/2"]);
    }
    assert_eq!(
        backend.seen("a/2").unwrap().as_deref(),
        Some(&b"two"[..]),
        "its own change"
    );
    assert_eq!(keys(&backend.seen_list("a/").unwrap()), ["a/1", "a/2"]);

    // All comparisons, or nothing.
    let swap = |compares: Vec<Compare>| Transaction {
        compares,
        deletes: vec!["a/2".to_owned()],
        ..puts(&[("a/1", "swapped"), ("a/3", "new")])
    };
    let is = |key: &str, value: &str| Compare::Is(key.to_owned(), value.as_bytes().to_vec());
    let absent = |key: &str| Compare::Absent(key.to_owned());
    for wrong in [
        vec![is("a/1", "two")],
        vec![is("a/1", "one"), is("a/2", "tw")],
        vec![is("a/1", "one"), absent("a/2")],
        vec![is("a/9", "")],
    ] {
        assert_eq!(backend.commit(&swap(wrong)).unwrap(), Commit::Refused);
    }
    assert_eq!(keys(&other.list("a/").unwrap()), ["a/1", "a/2"]);
    let right = swap(vec![is("a/1", "one"), is("a/2", "two"), absent("a/3")]);
    assert_eq!(other.commit(&right).unwrap(), Commit::Done);
    assert_eq!(keys(&backend.list("a/").unwrap()), ["a/1", "a/3"]);
    until("the other's change is seen", || {
        (backend.seen("a/1").unwrap().as_deref() == Some(b"swapped")).then_some(())
    });
    assert_eq!(backend.seen("a/2").unwrap(), None);

    // More than one answer holds; a prefix goes at once, its neighbours stay.
    let many: Vec<String> = (0..1100).map(|i| format!("c/{i:04}")).collect();
    for part in many.chunks(100) {
        let part: Vec<(&str, &str)> = part.iter().map(|key| (key.as_str(), "v")).collect();
        assert_eq!(backend.commit(&puts(&part)).unwrap(), Commit::Done);
    }
    assert_eq!(keys(&backend.list("c/").unwrap()), many);
    assert_eq!(keys(&backend.seen_list("c/").unwrap()), many);
    let gone = Transaction {
        delete_prefixes: vec!["c/".to_owned(), "none/".to_owned()],
        ..puts(&[("c0", "stays")])
    };
    assert_eq!(backend.commit(&gone).unwrap(), Commit::Done);
    assert!(backend.list("c/").unwrap().is_empty() && backend.seen_list("c/").unwrap().is_empty());
    assert!(other.get("c0").unwrap().is_some());
    // What changes nothing is done at once.
    let began = Instant::now();
    let nothing = Transaction {
        deletes: vec!["none".to_owned()],
        ..Transaction::default()
    };
    assert_eq!(backend.commit(&nothing).unwrap(), Commit::Done);
    assert!(began.elapsed() < Duration::from_secs(2));
}

#[test]
fn every_backend_keeps_the_same_promises() {
    let memory = Embedded::new(Box::new(MemoryKv::default()));
    owes(&memory, &memory);
    let servers = Servers::start(1);
    let (one, two) = (open(&servers.settings()), open(&servers.settings()));
    owes(&*one, &*two);
}

fn host(n: u128, name: &str) -> HostRecord {
    HostRecord {
        id: HostId(n),
        name: name.to_owned(),
        address: format!("127.0.0.1:{n}"),
        zone: String::new(),
        version: "0.1.0".to_owned(),
        joined: "2026-11-22T01:00:00Z".parse().unwrap(),
        leaving: false,
    }
}

/// Joins as a host whose lease lasts `seconds` unless it is kept alive.
fn join(store: &ControlStore, host: &HostRecord, seconds: u64) -> Result<HostAlive, RecordError> {
    let lease = store
        .leases()
        .unwrap()
        .grant(Duration::from_secs(seconds))
        .unwrap();
    let alive = HostAlive {
        host: host.id,
        incarnation: store.next_incarnation().unwrap(),
        lease,
        address: host.address.clone(),
        disks: Vec::new(),
    };
    store.join(host, &alive)?;
    Ok(alive)
}

fn vdi(id: VdiId, name: &str, shards: u64) -> VdiRecord {
    VdiRecord {
        id,
        revision: 1,
        name: name.to_owned(),
        bytes: shards * GIB,
        sector_bytes: 512,
        replicas: 3,
        shard_bytes: GIB,
        head: LayerId(0),
        created: "2026-11-22T01:00:00Z".parse().unwrap(),
        attachments: Vec::new(),
        deleting: false,
    }
}

fn shards(vdi: VdiId, range: std::ops::Range<u32>) -> Vec<ShardRecord> {
    let disks = vec![DiskId(1), DiskId(2), DiskId(3)];
    range
        .map(|no| {
            let no = ShardNo(no);
            ShardRecord::new(ShardId { vdi, no }, disks.clone())
        })
        .collect()
}

fn create(store: &ControlStore, name: &str, count: u32, writer: VdiWriter) -> VdiRecord {
    let id = store.next_vdi_id().unwrap();
    let record = vdi(id, name, u64::from(count));
    let placed = Placed {
        placement: store.placement().unwrap(),
        writer: Some(writer),
    };
    store.create_vdi(&record, &shards(id, 0..count), placed).unwrap();
    record
}

fn next_epoch(record: &ShardRecord) -> ShardRecord {
    ShardRecord {
        epoch: Epoch(record.epoch.0 + 1),
        was_written: true,
        ..record.clone()
    }
}

fn door() -> Attachment {
    Attachment {
        target: "nbd:tcp:127.0.0.1:10809".parse::<AttachTarget>().unwrap(),
        read_only: false,
        queues: 1,
        snapshot: None,
    }
}

#[test]
fn no_two_ever_get_the_same_incarnation() {
    let servers = Servers::start(1);
    let stores = [store(&servers.settings()), store(&servers.settings())];
    let takers: Vec<_> = (0..6)
        .map(|i| {
            let store = stores[i % 2].clone();
            std::thread::spawn(move || -> Vec<Incarnation> {
                (0..10).map(|_| store.next_incarnation().unwrap()).collect()
            })
        })
        .collect();
    let mut all: Vec<u64> = takers
        .into_iter()
        .flat_map(|taker| taker.join().unwrap())
        .map(|incarnation| incarnation.0)
        .collect();
    all.sort_unstable();
    assert_eq!(all, (1..=60).collect::<Vec<u64>>());
}

#[test]
fn only_its_writer_changes_a_vdis_shards() {
    let servers = Servers::start(1);
    let (a, b) = (store(&servers.settings()), store(&servers.settings()));
    let life_a = join(&a, &host(1, "a"), 60).unwrap();
    let life_b = join(&b, &host(2, "b"), 60).unwrap();
    let writer_a = VdiWriter {
        host: HostId(1),
        incarnation: life_a.incarnation,
    };
    let web = create(&a, "web", 2, writer_a);
    let first = shards(web.id, 0..1).remove(0);
    let second = next_epoch(&first);
    assert_eq!(a.swap_shard(&second, Some(&writer_a)).unwrap(), second);
    assert_eq!(a.swap_shard(&second, Some(&writer_a)).unwrap(), second, "a retry");

    // Served by nobody, it may be taken from a host that lives; from then on that host raises no epoch.
    let sharing = |since| Sharing::Cluster { since };
    assert_eq!(a.sharing(web.id).unwrap(), sharing(Incarnation(0)));
    let incarnation = b.next_incarnation().unwrap();
    assert!(incarnation > life_a.incarnation && incarnation > life_b.incarnation);
    let taken = b.take_vdi(web.id, HostId(2), incarnation).unwrap();
    assert_eq!(
        b.sharing(web.id).unwrap(),
        sharing(incarnation),
        "it may still be read there"
    );
    let writer_b = VdiWriter {
        host: HostId(2),
        incarnation,
    };
    for shard in [&next_epoch(&second), &next_epoch(&shards(web.id, 1..2)[0])] {
        let error = a.swap_shard(shard, Some(&writer_a)).unwrap_err();
        assert!(
            matches!(&error, RecordError::NotTheWriter { now, .. } if *now == writer_b),
            "{error}"
        );
    }
    let read = b.shards_now(&taken).unwrap();
    assert_eq!(read, [second.clone(), shards(web.id, 1..2).remove(0)]);
    let third = next_epoch(&second);
    assert_eq!(b.swap_shard(&third, Some(&writer_b)).unwrap(), third);
    assert_eq!(a.shard_now(first.shard).unwrap(), Some(third));

    // The same host in an older life is nobody either.
    let again = b.next_incarnation().unwrap();
    b.take_vdi(web.id, HostId(2), again).unwrap();
    assert_eq!(b.sharing(web.id).unwrap(), sharing(incarnation));
    let error = b.swap_shard(&next_epoch(&read[1]), Some(&writer_b)).unwrap_err();
    assert!(matches!(error, RecordError::NotTheWriter { .. }), "{error}");
}

#[test]
fn guests_of_a_host_that_lives_stay_its_own_until_its_lease_ends() {
    let servers = Servers::start(1);
    let (a, b) = (store(&servers.settings()), store(&servers.settings()));
    let life_a = join(&a, &host(1, "alpha"), 5).unwrap();
    join(&b, &host(2, "beta"), 60).unwrap();
    let writer = VdiWriter {
        host: HostId(1),
        incarnation: life_a.incarnation,
    };
    let mut web = create(&a, "web", 1, writer);
    web.attachments.push(door());
    let web = a.update_vdi(&web).unwrap();

    let incarnation = b.next_incarnation().unwrap();
    let error = b.take_vdi(web.id, HostId(2), incarnation).unwrap_err();
    let RecordError::HeldElsewhere { host, left_s, .. } = &error else {
        panic!("{error}");
    };
    assert!(host == "alpha" && *left_s <= 5, "{error}");
    assert!(a.leases().unwrap().keep_alive(life_a.lease).unwrap());
    // It is not heard any more: its lease ends, and the VDI changes hands without its doors.
    let taken = until("the lease ends", || {
        b.take_vdi(web.id, HostId(2), incarnation).ok()
    });
    assert!(taken.attachments.is_empty() && taken.revision == web.revision + 1);
    assert!(
        !a.leases().unwrap().keep_alive(life_a.lease).unwrap(),
        "it has ended"
    );
    assert!(matches!(
        a.update_vdi(&web).unwrap_err(),
        RecordError::OldRevision { .. }
    ));
    until("the watch shows it", || {
        a.writer(web.id).unwrap().filter(|now| now.host == HostId(2))
    });
    until("the host is seen dead", || {
        b.alive()
            .unwrap()
            .iter()
            .all(|alive| alive.host != HostId(1))
            .then_some(())
    });
}

#[test]
fn two_hosts_never_share_a_name() {
    let servers = Servers::start(1);
    let (a, b) = (store(&servers.settings()), store(&servers.settings()));
    let life = join(&a, &host(1, "rack1"), 5).unwrap();
    let error = join(&b, &host(2, "rack1"), 60).unwrap_err();
    assert!(
        matches!(&error, RecordError::HostNameTaken { id, .. } if *id == HostId(1)),
        "{error}"
    );
    // The same host again, in a new life, keeps its name.
    join(&a, &host(1, "rack1"), 5).unwrap();
    a.leases().unwrap().revoke(life.lease).unwrap();
    // Dead, and its name may be taken by a machine that replaces it.
    until("its last lease ends", || join(&b, &host(2, "rack1"), 60).ok());
    assert!(join(&a, &host(1, "rack1"), 5).is_err());
    // Renamed, it may come back; its old name is not its own to give.
    join(&a, &host(1, "rack2"), 60).unwrap();
    assert!(join(&a, &host(3, "rack1"), 5).is_err());
    until("all are seen", || (b.hosts().unwrap().len() == 2).then_some(()));
}

#[test]
fn a_vdi_of_many_shards_is_there_whole_or_not_at_all() {
    const COUNT: u32 = 65_536;
    let servers = Servers::start(1);
    let (a, b) = (store(&servers.settings()), store(&servers.settings()));
    let life = join(&a, &host(1, "a"), 60).unwrap();
    let writer = VdiWriter {
        host: HostId(1),
        incarnation: life.incarnation,
    };
    let began = Instant::now();
    let huge = create(&a, "huge", COUNT, writer);
    println!("{COUNT} shards: {:?}", began.elapsed());
    assert_eq!(b.shards_now(&huge).unwrap(), shards(huge.id, 0..COUNT));
    until("the watch shows it", || b.vdi_by_name("huge").unwrap());
    assert_eq!(b.shards(huge.id).unwrap().len(), COUNT as usize);
    assert_eq!(b.writer(huge.id).unwrap(), Some(writer));
    assert_eq!(b.clean_unmade().unwrap(), 0);

    // It grows in parts as well, and goes in one.
    let few = create(&a, "few", 100, writer);
    let placed = Placed {
        placement: a.placement().unwrap(),
        writer: None,
    };
    let larger = VdiRecord {
        bytes: 600 * GIB,
        ..few
    };
    let larger = a
        .resize_vdi(&larger, &shards(larger.id, 100..600), placed)
        .unwrap();
    assert_eq!(a.shards_now(&larger).unwrap(), shards(larger.id, 0..600));
    let mut dying = huge.clone();
    dying.deleting = true;
    a.update_vdi(&dying).unwrap();
    a.forget_vdi(huge.id).unwrap();
    let raw = open(&servers.settings());
    assert!(raw.list(&format!("shard/{:08x}/", huge.id.0)).unwrap().is_empty());
    assert_eq!(raw.list("shard/").unwrap().len(), 600);
}

/// Passes everything on until the given number of commits; then it fails as if the process had died there.
struct DiesAfter {
    inner: Arc<Etcd>,
    commits: std::sync::atomic::AtomicI64,
}

impl Backend for DiesAfter {
    fn get(&self, key: &str) -> Result<Option<Vec<u8>>, BackendError> {
        self.alive()?;
        self.inner.get(key)
    }

    fn list(&self, prefix: &str) -> Result<Vec<(String, Vec<u8>)>, BackendError> {
        self.alive()?;
        self.inner.list(prefix)
    }

    fn commit(&self, transaction: &Transaction) -> Result<Commit, BackendError> {
        self.commits.fetch_sub(1, std::sync::atomic::Ordering::Relaxed);
        self.alive()?;
        self.inner.commit(transaction)
    }

    fn limits(&self) -> Option<control::backend::Limits> {
        self.inner.limits()
    }

    fn watch(&self, prefix: &str) -> tokio::sync::watch::Receiver<u64> {
        self.inner.watch(prefix)
    }
}

impl DiesAfter {
    fn alive(&self) -> Result<(), BackendError> {
        if self.commits.load(std::sync::atomic::Ordering::Relaxed) >= 0 {
            return Ok(());
        }
        Err(BackendError::Unreachable {
            operation: "commit",
            tries: 1,
            endpoints: 1,
            waited: Duration::ZERO,
            reason: "the process died".to_owned(),
        })
    }
}

#[test]
fn what_a_host_left_that_died_while_making_a_vdi_is_cleaned() {
    let servers = Servers::start(1);
    let a = store(&servers.settings());
    let raw = open(&servers.settings());
    let life = join(&a, &host(1, "a"), 60).unwrap();
    let writer = VdiWriter {
        host: HostId(1),
        incarnation: life.incarnation,
    };
    // 500 shards: a marker, five parts, and the end. It dies at each of them.
    for commits in 0..=6 {
        let id = a.next_vdi_id().unwrap();
        let dying = ControlStore::over(Arc::new(DiesAfter {
            inner: Arc::clone(&raw),
            commits: std::sync::atomic::AtomicI64::new(commits),
        }));
        let placed = Placed {
            placement: a.placement().unwrap(),
            writer: Some(writer),
        };
        let made = dying.create_vdi(&vdi(id, "v", 500), &shards(id, 0..500), placed);
        assert!(made.is_err(), "{commits} commits");
        assert!(a.vdis().unwrap().is_empty() && a.vdi_by_name("v").unwrap().is_none());
        let left = raw.list("shard/").unwrap().len();
        let parts = usize::try_from(commits.max(1) - 1).unwrap();
        assert_eq!(left, (120 * parts).min(500));
        // While its maker lives in that life it is not touched.
        assert_eq!(a.clean_unmade().unwrap(), 0, "its maker may be at it");
        assert_eq!(raw.list("shard/").unwrap().len(), left);
        let next_life = HostAlive {
            incarnation: a.next_incarnation().unwrap(),
            ..life.clone()
        };
        a.say_alive(&next_life).unwrap();
        assert_eq!(a.clean_unmade().unwrap(), usize::from(commits > 0));
        assert!(raw.list("shard/").unwrap().is_empty() && raw.list("vdi-making/").unwrap().is_empty());
        a.say_alive(&life).unwrap();
    }
    create(&a, "v", 500, writer);
}

#[test]
fn nothing_is_placed_on_a_disk_that_leaves() {
    let servers = Servers::start(1);
    let (a, b) = (store(&servers.settings()), store(&servers.settings()));
    for n in 1..=4 {
        let disk = DiskRecord {
            id: DiskId(n),
            path: "/dev/sdb".into(),
            bytes: 1 << 40,
            state: DiskState::Active,
            zone: String::new(),
            opens: 0,
            host: Some(HostId(1)),
        };
        a.put_disk(&disk).unwrap();
    }
    let writer = VdiWriter {
        host: HostId(1),
        incarnation: Incarnation(1),
    };
    let id = a.next_vdi_id().unwrap();
    let placed = Placed {
        placement: a.placement().unwrap(),
        writer: Some(writer),
    };
    // The other host begins to let a disk go between the choice and the making.
    b.change_disk(DiskId(3), |disk| disk.state = DiskState::Removing)
        .unwrap();
    let made = a.create_vdi(&vdi(id, "v", 1), &shards(id, 0..1), placed);
    assert!(matches!(made, Err(RecordError::Overtaken)), "{made:?}");
    b.change_disk(DiskId(3), |disk| disk.state = DiskState::Active)
        .unwrap();
    until("the watch shows it", || {
        (a.placement().unwrap() == 6).then_some(())
    });
    let v = create(&a, "v", 1, writer);
    let held = a.shards_now(&v).unwrap().remove(0);
    let moved = ShardRecord {
        replicas: vec![DiskId(1), DiskId(2), DiskId(4)],
        in_sync: vec![DiskId(1), DiskId(2)],
        ..next_epoch(&held)
    };
    b.change_disk(DiskId(4), |disk| disk.state = DiskState::Removing)
        .unwrap();
    let refused = a.swap_shard(&moved, Some(&writer));
    assert!(
        matches!(refused, Err(RecordError::DiskLeaving(DiskId(4)))),
        "{refused:?}"
    );
    assert_eq!(a.shards_now(&v).unwrap(), [held], "it is not taken");
    b.change_disk(DiskId(4), |disk| disk.state = DiskState::Active)
        .unwrap();
    assert_eq!(a.swap_shard(&moved, Some(&writer)).unwrap(), moved);
}

fn pool(n: u128) -> PoolRecord {
    PoolRecord {
        id: PoolId(n),
        name: "main".to_owned(),
        created: "2026-11-22T01:00:00Z".parse().unwrap(),
        recovered: 0,
    }
}

#[test]
fn one_member_and_then_the_leader_may_die() {
    let servers = Servers::start(3);
    let a = store(&servers.settings());
    a.create_pool(&pool(7)).unwrap();
    let mut last = a.next_incarnation().unwrap();
    let mut goes_on = |what: &str| {
        // What was asked of a member that died may have been done: then a number is left out, none is given twice.
        let next = until(what, || a.next_incarnation().ok());
        assert!(next > last);
        last = next;
    };
    for round in 0..2 {
        let victim = match round {
            0 => (servers.leader() + 1) % 3,
            _ => servers.leader(),
        };
        servers.members[victim].kill();
        goes_on("two of three are enough");
        servers.members[victim].start();
        goes_on("three again");
    }
    until("the watch is well", || {
        a.health().unreachable.is_none().then_some(())
    });
}

#[test]
fn without_a_majority_it_says_so_and_what_was_seen_stays() {
    let servers = Servers::start(3);
    let settings = EtcdSettings {
        patience: Duration::from_secs(4),
        ..servers.settings()
    };
    let a = store(&settings);
    a.create_pool(&pool(7)).unwrap();
    servers.members[0].kill();
    servers.members[2].kill();
    let began = Instant::now();
    let error = a.next_incarnation().unwrap_err();
    assert!(
        matches!(
            &error,
            RecordError::Backend(BackendError::Unreachable {
                tries: 2..,
                endpoints: 3,
                ..
            })
        ),
        "{error}"
    );
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    let (since, reason) = until("the health says so", || a.health().unreachable);
    println!("{error}\nsince {since}: {reason}");
    assert_eq!(a.pool().unwrap(), Some(pool(7)), "what was seen");
    servers.members[0].start();
    servers.members[2].start();
    until("it goes on", || a.next_incarnation().ok());
    until("the health is good again", || {
        a.health().unreachable.is_none().then_some(())
    });
}

#[test]
fn a_member_that_hangs_costs_one_try() {
    let servers = Servers::start(1);
    let a = store(&EtcdSettings {
        patience: Duration::from_secs(5),
        ..servers.settings()
    });
    a.create_pool(&pool(7)).unwrap();
    servers.members[0].signal("STOP");
    let began = Instant::now();
    let error = a.put_disk(&DiskRecord {
        id: DiskId(1),
        path: "/dev/sdb".into(),
        bytes: 1,
        state: DiskState::Active,
        zone: String::new(),
        opens: 0,
        host: None,
    });
    let error = error.unwrap_err();
    assert!(
        matches!(error, RecordError::Backend(BackendError::Unreachable { .. })),
        "{error}"
    );
    // A change that was sent may have been made, and the error says that.
    let raw = open_again(&servers);
    let change = raw.commit(&puts(&[("x", "y")]));
    assert!(matches!(change, Err(BackendError::Unknown { .. })), "{change:?}");
    assert!(began.elapsed() < Duration::from_secs(40));
    servers.members[0].signal("CONT");
    until("it goes on", || a.next_incarnation().ok());
}

/// A second client whose connection was made while the only member ran.
fn open_again(servers: &Servers) -> Arc<Etcd> {
    servers.members[0].signal("CONT");
    let raw = open(&servers.settings());
    servers.members[0].signal("STOP");
    raw
}

#[test]
fn an_etcd_that_was_wiped_is_not_believed() {
    let servers = Servers::start(1);
    let a = store(&servers.settings());
    a.create_pool(&pool(7)).unwrap();
    let writer = VdiWriter {
        host: HostId(1),
        incarnation: Incarnation(1),
    };
    let web = create(&a, "web", 1, writer);
    servers.members[0].kill();
    servers.members[0].wipe();
    servers.members[0].start();
    let (_, reason) = until("it is noticed", || {
        a.health()
            .unreachable
            .filter(|(_, reason)| reason.contains("wiped"))
    });
    println!("{reason}");
    assert_eq!(
        a.vdi_by_name("web").unwrap(),
        Some(web.clone()),
        "what was seen stays"
    );
    let shard = shards(web.id, 0..1).remove(0);
    let swapped = a.swap_shard(&next_epoch(&shard), Some(&writer));
    assert!(
        matches!(&swapped, Err(RecordError::Backend(BackendError::WentBack { .. }))),
        "{swapped:?}"
    );
    assert_eq!(a.pool().unwrap(), Some(pool(7)));
}
