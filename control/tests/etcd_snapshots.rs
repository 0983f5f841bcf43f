//! Records of layers in real etcd: two hosts at once, and as many snapshots as a transaction holds.
//!
//! `WEFT_SNAPSHOTS=10000 cargo test -p weft-control --test etcd_snapshots -- --nocapture` measures with more of them.

#[path = "support/etcd.rs"]
mod etcd;

use std::sync::Arc;
use std::time::Instant;

use control::etcd::Etcd;
use control::{ControlStore, MemoryKv, Placed, RecordError, SNAPSHOTS_AT_ONCE, VdiRecord};
use etcd::{Servers, until};
use replication::ShardRecord;
use snapshot::tree::Taken;
use snapshot::{SnapshotName, Tree};
use types::{DiskId, LayerId, ShardId, ShardNo, VdiId};
use weft_control as control;

const GIB: u64 = 1 << 30;

fn name(no: usize) -> SnapshotName {
    format!("s{no}").parse().unwrap()
}

fn then() -> Taken {
    Taken {
        at: "2026-11-21T10:15:00Z".parse().unwrap(),
        bytes: 20 << 30,
    }
}

fn web(store: &ControlStore) -> VdiRecord {
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
        created: then().at,
        attachments: Vec::new(),
        deleting: false,
    };
    let shard = ShardId {
        vdi: id,
        no: ShardNo(0),
    };
    let placed = Placed {
        placement: store.placement().unwrap(),
        writer: None,
    };
    store
        .create_vdi(&record, &[ShardRecord::new(shard, vec![DiskId(1)])], placed)
        .unwrap();
    record
}

fn names(tree: &Tree, vdi: VdiId) -> Vec<String> {
    let all = tree.snapshots(vdi).unwrap();
    all.map(|(_, snapshot)| snapshot.name.to_string()).collect()
}

/// Makes `count` snapshots, one by one at the ends and as many as a transaction holds between, and deletes all.
fn takes_and_deletes(store: &ControlStore, count: usize) {
    let mut vdi = web(store);
    let id = vdi.id;
    let mut made = 0;
    while made < count {
        let some = (count - made).min(SNAPSHOTS_AT_ONCE);
        let take = |tree: &mut Tree| {
            for no in made..made + some {
                tree.take(id, name(no), then())?;
            }
            Ok(())
        };
        (vdi, _) = store.change_layers(&vdi, take).unwrap();
        made += some;
    }
    let timed =
        |what: &str, began: Instant| println!("{what} beside {count} snapshots: {:?}", began.elapsed());
    let began = Instant::now();
    assert_eq!(names(&store.layers(id).unwrap(), id).len(), count);
    timed("list", began);
    let began = Instant::now();
    let taken = store.change_layers(&vdi, |tree| tree.take(id, name(count), then()));
    timed("take", began);
    vdi = taken.unwrap().0;
    let began = Instant::now();
    let deleted = store.change_layers(&vdi, |tree| tree.delete(id, &[name(count / 2)]));
    timed("delete one", began);
    vdi = deleted.unwrap().0;
    let doomed: Vec<SnapshotName> = (0..=count).filter(|no| *no != count / 2).map(name).collect();
    let began = Instant::now();
    for some in doomed.chunks(SNAPSHOTS_AT_ONCE) {
        (vdi, _) = store.change_layers(&vdi, |tree| tree.delete(id, some)).unwrap();
    }
    timed("delete all", began);
    let tree = store.layers(id).unwrap();
    assert_eq!(names(&tree, id), [""; 0]);
    let lineage = tree.head(id).unwrap().lineage.to_string();
    assert_eq!(lineage, format!("{id}:0..={}", count + 1));
}

fn count() -> usize {
    std::env::var("WEFT_SNAPSHOTS").map_or(130, |count| count.parse().expect("a number"))
}

#[test]
fn snapshots_come_and_go_in_etcd() {
    let servers = Servers::start(1);
    let store = ControlStore::over(Arc::new(Etcd::open(servers.settings()).unwrap()));
    takes_and_deletes(&store, count());
}

#[test]
fn snapshots_come_and_go_on_a_single_host() {
    takes_and_deletes(&ControlStore::new(Box::new(MemoryKv::default())), count());
}

#[test]
fn of_two_hosts_one_is_told_to_look_again() {
    let servers = Servers::start(1);
    let open = || ControlStore::over(Arc::new(Etcd::open(servers.settings()).unwrap()));
    let (a, b) = (open(), open());
    let old = web(&a);
    let id = old.id;
    let between = |tree: &mut Tree| {
        b.change_layers(&old, |tree| tree.take(id, name(1), then()))
            .unwrap();
        tree.take(id, name(2), then())
    };
    let refused = a.change_layers(&old, between);
    assert!(matches!(refused, Err(RecordError::Overtaken)), "{refused:?}");
    let refused = a.change_layers(&old, |tree| tree.take(id, name(2), then()));
    assert!(
        matches!(refused, Err(RecordError::OldRevision { .. })),
        "{refused:?}"
    );
    let seen = until("the watch shows it", || {
        a.vdi(id).unwrap().filter(|vdi| vdi.head == LayerId(1))
    });
    a.change_layers(&seen, |tree| tree.take(id, name(2), then()))
        .unwrap();
    assert_eq!(names(&a.layers(id).unwrap(), id), ["s1", "s2"]);
}
