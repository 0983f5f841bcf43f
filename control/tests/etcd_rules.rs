//! Rules between hosts, over a real etcd, where two of them act in between each other's steps.

#[path = "support/etcd.rs"]
mod etcd;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use control::etcd::{Etcd, EtcdSettings};
use control::{ControlStore, HostAlive, HostRecord, Placed, RecordError, VdiRecord, VdiWriter};
use etcd::{PATIENCE, Servers};
use replication::ShardRecord;
use types::{DiskId, Epoch, HostId, Incarnation, LayerId, ShardId, ShardNo};
use weft_control as control;
use weft_control::backend::{Backend, BackendError, Commit, Compare, Limits, Transaction};

const GIB: u64 = 1 << 30;

fn settings(servers: &Servers) -> EtcdSettings {
    EtcdSettings {
        endpoints: servers.endpoints(),
        prefix: "/weft-test/".to_owned(),
        user: None,
        tls: None,
        patience: Duration::from_secs(20),
    }
}

fn put(key: &str, value: &str) -> Transaction {
    Transaction {
        puts: vec![(key.to_owned(), value.as_bytes().to_vec())],
        ..Transaction::default()
    }
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

fn alive(store: &ControlStore, host: &HostRecord) -> HostAlive {
    let leases = store.leases().unwrap();
    HostAlive {
        host: host.id,
        incarnation: store.next_incarnation().unwrap(),
        lease: leases.grant(Duration::from_secs(60)).unwrap(),
        address: host.address.clone(),
        disks: Vec::new(),
    }
}

/// Forgets a host right before it says that it is alive, once.
struct ForgetsBetween {
    inner: Arc<Etcd>,
    host: HostRecord,
    is_done: AtomicBool,
}

impl Backend for ForgetsBetween {
    fn get(&self, key: &str) -> Result<Option<Vec<u8>>, BackendError> {
        self.inner.get(key)
    }

    fn list(&self, prefix: &str) -> Result<Vec<(String, Vec<u8>)>, BackendError> {
        self.inner.list(prefix)
    }

    fn commit(&self, transaction: &Transaction) -> Result<Commit, BackendError> {
        let mut keys = transaction.puts.iter().map(|(key, _)| key);
        if keys.any(|key| key.starts_with("host-alive/")) && !self.is_done.swap(true, Ordering::Relaxed) {
            let store = ControlStore::over(self.inner.clone());
            store.forget_host(&self.host).expect("it is not alive yet");
        }
        self.inner.commit(transaction)
    }

    fn limits(&self) -> Option<Limits> {
        self.inner.limits()
    }

    fn watch(&self, prefix: &str) -> tokio::sync::watch::Receiver<u64> {
        self.inner.watch(prefix)
    }

    fn leases(&self) -> Option<&dyn control::backend::Leases> {
        self.inner.leases()
    }
}

#[test]
fn a_host_that_is_alive_has_a_record() {
    let servers = Servers::start(1);
    let etcd = Arc::new(Etcd::open(settings(&servers)).unwrap());
    let store = ControlStore::over(etcd.clone());
    let host = host(1, "a");
    let between = ControlStore::over(Arc::new(ForgetsBetween {
        inner: etcd,
        host: host.clone(),
        is_done: AtomicBool::new(false),
    }));
    let life = alive(&store, &host);
    between.join(&host, &life).unwrap();
    assert_eq!(store.host(host.id).unwrap(), Some(host.clone()));
    assert!(store.alive_now(host.id).unwrap().is_some());
    // Forgotten later, it hears of that when it says something next.
    store.leases().unwrap().revoke(life.lease).unwrap();
    store.forget_host(&host).unwrap();
    let said = store.say_alive(&alive(&store, &host));
    assert!(matches!(said, Err(RecordError::Missing(_))), "{said:?}");
}

fn web(store: &ControlStore, writer: VdiWriter) -> (VdiRecord, ShardRecord) {
    let id = store.next_vdi_id().unwrap();
    let record = VdiRecord {
        id,
        revision: 1,
        name: "web".to_owned(),
        bytes: GIB,
        sector_bytes: 512,
        replicas: 1,
        shard_bytes: GIB,
        head: LayerId(0),
        created: "2026-11-22T01:00:00Z".parse().unwrap(),
        attachments: Vec::new(),
        deleting: false,
    };
    let no = ShardNo(0);
    let shard = ShardRecord::new(ShardId { vdi: id, no }, vec![DiskId(1)]);
    let placed = Placed {
        placement: store.placement().unwrap(),
        writer: Some(writer),
    };
    store
        .create_vdi(&record, std::slice::from_ref(&shard), placed)
        .unwrap();
    (record, shard)
}

#[test]
fn a_writer_is_the_same_in_other_words() {
    let servers = Servers::start(1);
    let etcd = Arc::new(Etcd::open(settings(&servers)).unwrap());
    let store = ControlStore::over(etcd.clone());
    let writer = VdiWriter {
        host: HostId(1),
        incarnation: Incarnation(1),
    };
    let (web, shard) = web(&store, writer);
    let key = format!("vdi-writer/{:08x}", web.id.0);
    let other_words = format!(
        r#"{{ "v": 1, "record": {{"incarnation": 1, "host": "{}", "since": 5}} }}"#,
        writer.host
    );
    assert_eq!(etcd.commit(&put(&key, &other_words)).unwrap(), Commit::Done);
    let next = ShardRecord {
        epoch: Epoch(shard.epoch.0 + 1),
        ..shard
    };
    let (say, hear) = std::sync::mpsc::channel();
    let asked = next.clone();
    std::thread::spawn(move || say.send(store.swap_shard(&asked, Some(&writer))));
    let swapped = hear.recv_timeout(PATIENCE).expect("it does not ask for ever");
    assert_eq!(swapped.unwrap(), next);
    let unchanged = Compare::Is(key.clone(), other_words.into_bytes());
    let look = Transaction {
        compares: vec![unchanged],
        ..Transaction::default()
    };
    assert_eq!(etcd.commit(&look).unwrap(), Commit::Done, "the writer's record");
}

#[test]
fn nobody_takes_a_vdi_with_a_lower_incarnation() {
    let servers = Servers::start(1);
    let store = ControlStore::over(Arc::new(Etcd::open(settings(&servers)).unwrap()));
    let life = |host: u128, incarnation: u64| VdiWriter {
        host: HostId(host),
        incarnation: Incarnation(incarnation),
    };
    let (web, _) = web(&store, life(1, 5));
    for older in [life(1, 4), life(2, 3)] {
        let taken = store.take_vdi(web.id, older.host, older.incarnation);
        assert!(
            matches!(&taken, Err(RecordError::NotTheWriter { now, .. }) if *now == life(1, 5)),
            "{taken:?}"
        );
    }
    let again = store.take_vdi(web.id, HostId(1), Incarnation(5));
    assert!(again.is_ok(), "said twice: {again:?}");
    store.take_vdi(web.id, HostId(2), Incarnation(6)).unwrap();
    assert_eq!(store.writer(web.id).unwrap(), Some(life(2, 6)));
    assert!(store.take_vdi(web.id, HostId(1), Incarnation(5)).is_err());
}
