//! Records: round trips, and what compare-and-swap refuses.

use std::path::PathBuf;

use edge::{KvBatch, KvError, KvStore};
use replication::{EpochEnd, ShardRecord};
use types::{DiskId, Epoch, Incarnation, LayerId, PoolId, Seq, ShardId, ShardNo, VdiId};

use super::{Claim, ControlStore, Placed, RecordError};
use crate::backend::BackendError;
use crate::{AttachTarget, Attachment, DiskRecord, DiskState, MemoryKv, PoolRecord, VdiRecord};

const GIB: u64 = 1 << 30;

pub(super) fn store() -> ControlStore {
    ControlStore::new(Box::new(MemoryKv::default()))
}

/// Placed by what the disks are now, in a pool of one host.
pub(super) fn placed(store: &ControlStore) -> Placed {
    Placed {
        placement: store.placement().unwrap(),
        writer: None,
    }
}

pub(super) fn vdi(id: u32, name: &str, shards: u64) -> VdiRecord {
    VdiRecord {
        id: VdiId(id),
        revision: 1,
        name: name.to_owned(),
        bytes: shards * GIB,
        sector_bytes: 512,
        replicas: 2,
        shard_bytes: GIB,
        head: LayerId(1),
        created: "2026-11-22T01:00:00Z".parse().unwrap(),
        attachments: Vec::new(),
        deleting: false,
    }
}

pub(super) fn shards(vdi: u32, range: std::ops::Range<u32>) -> Vec<ShardRecord> {
    let shard = |no| ShardId {
        vdi: VdiId(vdi),
        no: ShardNo(no),
    };
    range
        .map(|no| ShardRecord::new(shard(no), vec![DiskId(1), DiskId(2)]))
        .collect()
}

#[test]
fn every_record_comes_back_as_it_was_put() {
    let store = store();
    assert_eq!(store.pool().unwrap(), None);
    let pool = PoolRecord {
        id: PoolId(7),
        name: "main".into(),
        created: "2026-11-22T01:00:00.5Z".parse().unwrap(),
        recovered: 0,
    };
    store.create_pool(&pool).unwrap();
    assert_eq!(store.pool().unwrap(), Some(pool));

    let disk = |id: u128| DiskRecord {
        id: DiskId(id),
        path: PathBuf::from("/dev/disk/by-id/ä b"),
        bytes: 1 << 45,
        state: DiskState::Missing,
        zone: "rack1".into(),
        opens: 7,
        host: None,
    };
    store.put_disk(&disk(2)).unwrap();
    store.put_disk(&disk(1)).unwrap();
    assert_eq!(store.disks().unwrap(), [disk(1), disk(2)]);
    store.delete_disk(DiskId(1)).unwrap();
    assert_eq!(
        (store.disk(DiskId(1)).unwrap(), store.disk(DiskId(2)).unwrap()),
        (None, Some(disk(2)))
    );

    let mut web = vdi(1, "web01", 3);
    web.attachments = ["vhost-user:/run/a", "nbd:unix:/run/b", "nbd:tcp:[::1]:10809"]
        .map(|target| Attachment {
            target: target.parse::<AttachTarget>().unwrap(),
            read_only: true,
            queues: 4,
            snapshot: None,
        })
        .to_vec();
    store.create_vdi(&web, &shards(1, 0..3), placed(&store)).unwrap();
    assert_eq!(store.vdi(VdiId(1)).unwrap().as_ref(), Some(&web));
    assert_eq!(store.vdi_by_name("web01").unwrap(), Some(web));
    assert_eq!(store.shards(VdiId(1)).unwrap(), shards(1, 0..3));
}

#[test]
fn vdi_ids_are_never_used_again() {
    let store = store();
    assert_eq!(store.next_vdi_id().unwrap(), VdiId(1));
    store
        .create_vdi(&vdi(1, "a", 1), &shards(1, 0..1), placed(&store))
        .unwrap();
    let mut dying = store.vdi(VdiId(1)).unwrap().unwrap();
    dying.deleting = true;
    store.update_vdi(&dying).unwrap();
    store.forget_vdi(VdiId(1)).unwrap();
    store.forget_vdi(VdiId(1)).unwrap();
    assert_eq!(store.next_vdi_id().unwrap(), VdiId(2));
    assert!(store.vdis().unwrap().is_empty() && store.shards(VdiId(1)).unwrap().is_empty());
}

#[test]
fn a_name_is_taken_until_its_vdi_begins_to_be_deleted() {
    let store = store();
    store
        .create_vdi(&vdi(1, "a", 1), &shards(1, 0..1), placed(&store))
        .unwrap();
    let error = store
        .create_vdi(&vdi(2, "a", 1), &shards(2, 0..1), placed(&store))
        .unwrap_err();
    assert!(matches!(error, RecordError::NameTaken(name) if name == "a"));
    assert_eq!(store.next_vdi_id().unwrap(), VdiId(2), "a refusal takes no id");

    let mut dying = store.vdi(VdiId(1)).unwrap().unwrap();
    dying.deleting = true;
    store.update_vdi(&dying).unwrap();
    assert_eq!(store.vdi_by_name("a").unwrap(), None);
    store
        .create_vdi(&vdi(2, "a", 1), &shards(2, 0..1), placed(&store))
        .unwrap();
    store.forget_vdi(VdiId(1)).unwrap();
    assert_eq!(
        store.vdi_by_name("a").unwrap().unwrap().id,
        VdiId(2),
        "the new one keeps the name"
    );
    assert_eq!(store.shards(VdiId(2)).unwrap().len(), 1, "and its shards");
}

#[test]
fn an_old_copy_of_a_vdi_changes_nothing() {
    let store = store();
    let first = vdi(1, "a", 1);
    store
        .create_vdi(&first, &shards(1, 0..1), placed(&store))
        .unwrap();
    let mut changed = first.clone();
    changed.head = LayerId(2);
    let second = store.update_vdi(&changed).unwrap();
    assert_eq!((second.revision, second.head), (2, LayerId(2)));

    let error = store.update_vdi(&first).unwrap_err();
    assert!(matches!(
        error,
        RecordError::OldRevision {
            held: 2,
            given: 1,
            ..
        }
    ));
    let larger = VdiRecord {
        bytes: 2 * GIB,
        ..first
    };
    assert!(
        store
            .resize_vdi(&larger, &shards(1, 1..2), placed(&store))
            .is_err()
    );
    assert_eq!(store.vdi(VdiId(1)).unwrap(), Some(second));
    assert_eq!(store.shards(VdiId(1)).unwrap().len(), 1);
    assert!(matches!(
        store.update_vdi(&vdi(9, "b", 1)),
        Err(RecordError::Missing(_))
    ));
}

#[test]
fn a_resize_brings_its_shards_along() {
    let store = store();
    store
        .create_vdi(&vdi(1, "a", 1), &shards(1, 0..1), placed(&store))
        .unwrap();
    let mut larger = vdi(1, "a", 1);
    larger.bytes = 2 * GIB + 512;
    let larger = store
        .resize_vdi(&larger, &shards(1, 1..3), placed(&store))
        .unwrap();
    assert_eq!(store.vdi(VdiId(1)).unwrap(), Some(larger.clone()));
    assert_eq!(store.shards(VdiId(1)).unwrap(), shards(1, 0..3));
    // Within the last shard nothing is added.
    let larger = VdiRecord {
        bytes: 3 * GIB,
        ..larger
    };
    assert_eq!(
        store.resize_vdi(&larger, &[], placed(&store)).unwrap().revision,
        3
    );
}

#[test]
fn a_shard_changes_only_from_the_epoch_just_below() {
    let store = store();
    store
        .create_vdi(&vdi(1, "a", 1), &shards(1, 0..1), placed(&store))
        .unwrap();
    let first = shards(1, 0..1).remove(0);
    let mut second = first.clone();
    second.epoch = Epoch(2);
    second.in_sync = vec![DiskId(1)];
    second.ended = vec![EpochEnd {
        epoch: Epoch(1),
        end: Seq(u64::MAX),
    }];
    assert_eq!(store.swap_shard(&second, None).unwrap(), second);
    assert_eq!(
        store.swap_shard(&second, None).unwrap(),
        second,
        "a retry finds what it sent"
    );

    let mut rival = first.clone();
    rival.epoch = Epoch(2);
    rival.in_sync = vec![DiskId(2)];
    assert_eq!(
        store.swap_shard(&rival, None).unwrap(),
        second,
        "the loser learns what won"
    );
    let skipping = ShardRecord {
        epoch: Epoch(4),
        ..second.clone()
    };
    assert_eq!(store.swap_shard(&skipping, None).unwrap(), second);
    assert_eq!(store.shard(first.shard).unwrap(), Some(second));

    let nowhere = ShardId {
        vdi: VdiId(1),
        no: ShardNo(1),
    };
    assert_eq!(store.shard(nowhere).unwrap(), None);
    let missing = ShardRecord {
        shard: nowhere,
        ..rival
    };
    assert!(matches!(
        store.swap_shard(&missing, None),
        Err(RecordError::Missing(_))
    ));
}

#[test]
fn each_start_has_its_own_incarnation() {
    let store = store();
    assert_eq!(store.next_incarnation().unwrap(), Incarnation(1));
    assert_eq!(store.next_incarnation().unwrap(), Incarnation(2));
}

#[test]
fn lists_longer_than_one_scan_are_whole_and_in_order() {
    let store = store();
    for count in [1023, 1024, 1025, 2048] {
        let id = store.next_vdi_id().unwrap();
        store
            .create_vdi(
                &vdi(id.0, &format!("v{count}"), u64::from(count)),
                &shards(id.0, 0..count),
                placed(&store),
            )
            .unwrap();
        assert_eq!(store.shards(id).unwrap(), shards(id.0, 0..count));
    }
    assert_eq!(store.vdis().unwrap().len(), 4);
}

fn with_value(key: &str, value: &str) -> ControlStore {
    let mut kv = MemoryKv::default();
    let puts = vec![(key.as_bytes().to_vec(), value.as_bytes().to_vec())];
    kv.apply(&KvBatch {
        puts,
        ..KvBatch::default()
    })
    .unwrap();
    ControlStore::new(Box::new(kv))
}

#[test]
fn damaged_and_newer_records_are_named() {
    for value in ["", "{}", "null", "\u{0}", r#"{"v":1,"record":{"id":"x"}}"#] {
        let error = with_value("pool", value).pool().unwrap_err();
        assert!(
            matches!(&error, RecordError::Damaged { key, .. } if key == "pool"),
            "{value}: {error}"
        );
    }
    let error = with_value("pool", r#"{"v":2,"record":{"anything":1}}"#)
        .pool()
        .unwrap_err();
    assert!(matches!(error, RecordError::TooNew { found: 2, .. }), "{error}");
    let store = with_value("vdi/00000001", "{not json");
    assert!(store.vdis().is_err());
    let (vdis, damaged) = store.readable_vdis().unwrap();
    assert!(
        vdis.is_empty()
            && matches!(&damaged[..], [RecordError::Damaged { key, .. }] if key == "vdi/00000001")
    );
    let newer = with_value("vdi/00000001", r#"{"v":2,"record":{}}"#).readable_vdis();
    assert!(matches!(newer, Err(RecordError::TooNew { found: 2, .. })));
    let error = with_value("vdi-name/a", r#"{"v":1,"record":5}"#)
        .vdi_by_name("a")
        .unwrap_err();
    assert!(
        error.to_string().contains("VDI 5, which has no record"),
        "{error}"
    );
    let shard = serde_json::to_string(&shards(1, 3..4)[0]).unwrap();
    let value = format!(r#"{{"v":1,"record":{shard}}}"#);
    let error = with_value("shard/00000001/00000003", &value)
        .shards(VdiId(1))
        .unwrap_err();
    assert!(
        error.to_string().contains("shard/00000001/00000000"),
        "a gap is damage: {error}"
    );
}

#[test]
fn the_documented_values_are_read() {
    // Each example of docs/records.md, as `key` and JSON. A change of format must keep reading these.
    let text = include_str!("../../../docs/records.md");
    let examples: Vec<(&str, &str)> = text
        .split("```json\n")
        .skip(1)
        .map(|rest| rest.split_once("\n```").expect("the example ends").0)
        .map(|example| example.split_once('\n').expect("a key, then the value"))
        .collect();
    assert_eq!(examples.len(), 19);
    let (notes, examples): (Vec<_>, Vec<_>) = examples
        .into_iter()
        .partition(|(key, _)| key.starts_with("// note "));
    assert_eq!(
        crate::recover::notes::disk_note(notes[0].1.as_bytes())
            .unwrap()
            .next_vdi_id,
        2
    );
    assert_eq!(
        crate::recover::notes::vdi_note(VdiId(1), notes[1].1.as_bytes())
            .unwrap()
            .name,
        "web01"
    );
    let mut kv = MemoryKv::default();
    let entry = |(key, value): &(&str, &str)| {
        (
            key.trim_start_matches("// ").as_bytes().to_vec(),
            value.as_bytes().to_vec(),
        )
    };
    let puts = examples.iter().map(entry).collect();
    kv.apply(&KvBatch {
        puts,
        ..KvBatch::default()
    })
    .unwrap();
    let store = ControlStore::new(Box::new(kv));
    assert_eq!(store.pool().unwrap().unwrap().name, "main");
    assert_eq!(store.disks().unwrap()[0].state, DiskState::Active);
    let web = store.vdi_by_name("web01").unwrap().unwrap();
    assert_eq!((web.attachments.len(), web.shard_count()), (2, 1));
    assert_eq!(store.shards(web.id).unwrap()[0].write_quorum(), 2);
    assert_eq!(
        store.writer(web.id).unwrap().unwrap().incarnation,
        Incarnation(17)
    );
    let layers = store.layers(web.id).unwrap();
    assert_eq!(
        layers.head(web.id).unwrap().lineage.to_string(),
        "1:2..=2, 1:0..=0"
    );
    assert!(layers.snapshots(web.id).unwrap().next().unwrap().1.protected);
    assert_eq!(store.placement().unwrap(), 3);
    assert_eq!(store.rebalances_asked().unwrap(), 1);
    let host = store.hosts().unwrap().remove(0);
    assert_eq!(store.alive().unwrap()[0].host, host.id);
    assert!(store.host(host.id).unwrap().is_some() && store.alive_now(host.id).unwrap().is_some());
    // Its maker lives with that incarnation: it is left alone.
    assert_eq!(store.clean_unmade().unwrap(), 0);
    assert_eq!(store.next_vdi_id().unwrap(), VdiId(2));
    assert_eq!(store.next_incarnation().unwrap(), Incarnation(18));
}

#[test]
fn a_replica_is_not_placed_only_where_that_is_written_down() {
    let store = store();
    let vdi = vdi(1, "web", 1);
    let records = shards(1, 0..1);
    let shard = records[0].shard;
    let (here, away) = (records[0].replicas[0], DiskId(99));
    let epoch = records[0].epoch;
    assert_eq!(
        store.claim(shard, here, epoch).unwrap(),
        Claim::Unknown,
        "not made yet"
    );
    store.create_vdi(&vdi, &records, placed(&store)).unwrap();
    assert_eq!(store.claim(shard, here, epoch).unwrap(), Claim::Placed);
    assert_eq!(store.claim(shard, away, epoch).unwrap(), Claim::NotPlaced);
    let later = Epoch(epoch.0 + 1);
    assert_eq!(store.claim(shard, here, later).unwrap(), Claim::Placed);
    // It has seen a change that the records have not: they went back.
    assert_eq!(store.claim(shard, away, later).unwrap(), Claim::Unknown);
    let deleting = VdiRecord {
        deleting: true,
        ..vdi.clone()
    };
    store.update_vdi(&deleting).unwrap();
    store.forget_vdi(vdi.id).unwrap();
    assert_eq!(store.claim(shard, here, later).unwrap(), Claim::NotPlaced);
    let never = ShardId {
        vdi: VdiId(7),
        ..shard
    };
    assert_eq!(store.claim(never, here, epoch).unwrap(), Claim::Unknown);
}

/// Fails every call.
struct Broken;

impl KvStore for Broken {
    fn get(&self, _: &[u8]) -> Result<Option<Vec<u8>>, KvError> {
        Err(KvError {
            operation: "get",
            place: "memory".into(),
            reason: "broken".into(),
        })
    }

    fn scan(&self, _: &[u8], _: &[u8], _: usize) -> Result<Vec<(Vec<u8>, Vec<u8>)>, KvError> {
        Err(KvError {
            operation: "scan",
            place: "memory".into(),
            reason: "broken".into(),
        })
    }

    fn apply(&mut self, _: &KvBatch) -> Result<(), KvError> {
        Err(KvError {
            operation: "apply",
            place: "memory".into(),
            reason: "broken".into(),
        })
    }
}

#[test]
fn the_stores_failure_is_passed_on() {
    let store = ControlStore::new(Box::new(Broken));
    assert!(matches!(
        store.pool(),
        Err(RecordError::Backend(BackendError::Kv(_)))
    ));
    assert!(matches!(
        store.vdis(),
        Err(RecordError::Backend(BackendError::Kv(_)))
    ));
    assert!(matches!(
        store.placement(),
        Err(RecordError::Backend(BackendError::Kv(_)))
    ));
}

/// The index of what each disk holds says what a look at all records says, whatever was changed how.
#[test]
fn what_a_disk_holds_is_known_without_a_look_at_everything() {
    let store = store();
    let check = |store: &ControlStore, about: &str| {
        let mut wanted: std::collections::BTreeMap<DiskId, Vec<ShardId>> = std::collections::BTreeMap::new();
        for vdi in store.vdis().unwrap() {
            for shard in store.shards(vdi.id).unwrap() {
                for disk in &shard.replicas {
                    wanted.entry(*disk).or_default().push(shard.shard);
                }
                let place = store.place_of(shard.shard).unwrap().expect("it is there");
                assert_eq!(place.replicas, shard.replicas, "{about}");
                assert_eq!(
                    place.is_whole,
                    shard.in_sync.len() == shard.replicas.len(),
                    "{about}"
                );
            }
        }
        for disk in (1..=9).map(DiskId) {
            let shards = wanted.remove(&disk).unwrap_or_default();
            assert_eq!(store.shards_on(disk).unwrap(), shards, "{about}: {disk}");
        }
        let placed = store.placed_shards().unwrap();
        let vdis = store.vdis().unwrap();
        let shards: u32 = vdis.iter().map(VdiRecord::shard_count).sum();
        assert_eq!(placed.len(), shards as usize, "{about}");
    };
    check(&store, "nothing");
    for id in 1..=9u128 {
        let disk = DiskRecord {
            id: DiskId(id),
            path: PathBuf::from("/dev/sdb"),
            bytes: 1 << 45,
            state: DiskState::Active,
            zone: String::new(),
            opens: 0,
            host: None,
        };
        store.put_disk(&disk).unwrap();
    }
    for (id, name) in [(1, "a"), (2, "b")] {
        store
            .create_vdi(&vdi(id, name, 3), &shards(id, 0..3), placed(&store))
            .unwrap();
        check(&store, name);
    }
    let mut moved = store.shards(VdiId(1)).unwrap()[1].clone();
    moved.epoch = Epoch(2);
    moved.replicas = vec![DiskId(1), DiskId(7)];
    moved.in_sync = vec![DiskId(1)];
    store.swap_shard(&moved, None).unwrap();
    check(&store, "one moved");
    let mut grown = store.vdi(VdiId(2)).unwrap().unwrap();
    grown.bytes = 5 * GIB;
    store
        .resize_vdi(&grown, &shards(2, 3..5), placed(&store))
        .unwrap();
    check(&store, "grown");
    let mut gone = store.vdi(VdiId(1)).unwrap().unwrap();
    gone.deleting = true;
    store.update_vdi(&gone).unwrap();
    store.forget_vdi(VdiId(1)).unwrap();
    check(&store, "forgotten");
    assert!(store.shards_on(DiskId(7)).unwrap().is_empty());
}
