//! What is made of disks that do not agree.

use types::{Epoch, Incarnation, LayerId, SHARD_BYTES_DEFAULT, Seq};

use super::notes::{DiskNote, VdiNote, note, vdi_note};
use super::*;
use crate::backend::Backend;
use crate::{ControlStore, DiskRecord, DiskState, Embedded, MemoryKv, PoolRecord, VdiRecord};
use replication::{EpochEnd, ShardRecord};
use types::{DiskId, Lineage, LineageStep, PoolId, ShardId, ShardNo, Token, VdiId};

const NOW: &str = "2026-11-22T01:00:00Z";

fn pool() -> PoolRecord {
    PoolRecord {
        id: PoolId(7),
        name: "main".to_owned(),
        created: NOW.parse().unwrap(),
        recovered: 0,
    }
}

fn disk(n: u128) -> FoundDisk {
    FoundDisk {
        disk: DiskId(n),
        pool: PoolId(7),
        path: format!("/dev/sd{n}").into(),
        bytes: 1 << 40,
        opens: 3,
        note: Some(DiskNote {
            pool: pool(),
            disk: DiskRecord {
                id: DiskId(n),
                path: "".into(),
                bytes: 1 << 40,
                state: DiskState::Active,
                zone: format!("rack{n}"),
                opens: 2,
                host: None,
            },
            next_vdi_id: 5,
        }),
        vdis: Vec::new(),
        shards: Vec::new(),
        promised: Token {
            epoch: Epoch(1),
            incarnation: Incarnation(9),
        },
        unreadable: Vec::new(),
    }
}

fn web(shards: u64) -> VdiRecord {
    VdiRecord {
        id: VdiId(1),
        revision: 4,
        name: "web".to_owned(),
        bytes: shards * SHARD_BYTES_DEFAULT,
        sector_bytes: 512,
        replicas: 3,
        shard_bytes: SHARD_BYTES_DEFAULT,
        head: LayerId(0),
        created: NOW.parse().unwrap(),
        attachments: Vec::new(),
        deleting: false,
    }
}

/// Of a VDI that was never rolled back.
fn lineage(vdi: &VdiRecord) -> Lineage {
    Lineage::of_layers(vdi.id, LayerId(0), vdi.head)
}

/// Shard 0 of VDI 1 on disks 1 to `replicas`, all of them in sync at epoch 4.
fn record(replicas: u128) -> ShardRecord {
    let shard = ShardId {
        vdi: VdiId(1),
        no: ShardNo(0),
    };
    ShardRecord {
        epoch: Epoch(4),
        was_written: true,
        saved_by: Incarnation(3),
        ..ShardRecord::new(shard, (1..=replicas).map(DiskId).collect())
    }
}

fn copy(record: &ShardRecord, end: u64) -> FoundShard {
    FoundShard {
        record: record.clone(),
        promised: Token {
            epoch: record.epoch,
            incarnation: Incarnation(3),
        },
        end: Seq(end),
        good_until: None,
        blocks: end,
    }
}

/// Disks 1, 2, ... each with a note of `vdi` and the copy given.
fn disks(vdi: &VdiRecord, copies: Vec<Option<FoundShard>>) -> Vec<FoundDisk> {
    let with = |(copy, n): (Option<FoundShard>, u128)| FoundDisk {
        vdis: vec![VdiNote::new(
            vdi,
            &lineage(vdi),
            &[DiskId(1), DiskId(2), DiskId(3)],
        )],
        shards: copy.into_iter().collect(),
        ..disk(n)
    };
    copies.into_iter().zip(1..).map(with).collect()
}

fn merged(disks: Vec<FoundDisk>, asked: &Asked) -> Recovery {
    // By way of the file, as on the road.
    let bytes = Export { disks }.encode();
    let export = decode_export("host1.json", &bytes).unwrap();
    merge(&[export], asked, NOW.parse().unwrap()).unwrap()
}

fn ids(ids: &[u128]) -> Vec<DiskId> {
    ids.iter().map(|id| DiskId(*id)).collect()
}

fn in_sync(recovery: &Recovery) -> Vec<DiskId> {
    recovery.vdis[0].shards[0].in_sync.clone()
}

#[test]
fn what_agrees_comes_back_as_it_was_above_all_tokens() {
    let found = (0..3).map(|_| Some(copy(&record(3), 10))).collect();
    let recovery = merged(disks(&web(2), found), &Asked::default());
    assert_eq!(recovery.problems, [""; 0]);
    assert_eq!(
        recovery.pool,
        PoolRecord {
            recovered: 1,
            ..pool()
        }
    );
    assert_eq!(recovery.next_vdi_id, 5);
    assert!(recovery.incarnation > Incarnation(9), "{}", recovery.incarnation);
    assert_eq!(recovery.disks[1].zone, "rack2");
    assert_eq!((recovery.disks[1].opens, recovery.disks[1].bytes), (3, 1 << 40));
    let vdi = &recovery.vdis[0];
    assert_eq!(
        (vdi.found, vdi.behind, vdi.unsure, vdi.is_deleted),
        (1, 0, 0, false)
    );
    assert_eq!((vdi.record.revision, vdi.record.name.as_str()), (5, "web"));
    let shard = &vdi.shards[0];
    assert!(shard.epoch > Epoch(4) && shard.was_written);
    assert_eq!(
        (&shard.replicas, &shard.in_sync),
        (&ids(&[1, 2, 3]), &ids(&[1, 2, 3]))
    );
    // The second was never touched.
    assert!(!vdi.shards[1].was_written && vdi.shards[1].replicas.len() == 3);
    assert_eq!(vdi.shards[1].in_sync, vdi.shards[1].replicas);

    // A writer that saved nothing was promised something for a shard that this disk does not hold any more.
    let mut elsewhere = disks(&web(2), vec![Some(copy(&record(3), 10)); 3]);
    elsewhere[2].promised.incarnation = Incarnation(70_000);
    let above = merged(elsewhere, &Asked::default()).incarnation;
    assert!(above > Incarnation(70_000), "{above}");

    // Written, and read as any other records are.
    let kv = std::sync::Arc::new(Embedded::new(Box::new(MemoryKv::default())));
    let store = ControlStore::over(kv.clone());
    store.put_recovered(&recovery).unwrap();
    let held = store.vdi_by_name("web").unwrap().unwrap();
    assert_eq!(store.shards_now(&held).unwrap(), vdi.shards);
    assert_eq!(store.next_vdi_id().unwrap(), VdiId(5));
    assert!(store.next_incarnation().unwrap() > recovery.incarnation);
    assert_eq!(store.disks().unwrap(), recovery.disks);
    // Again, over what is there: nothing of before stays, and no number goes back.
    let lower = Recovery {
        vdis: Vec::new(),
        incarnation: Incarnation(1),
        next_vdi_id: 2,
        ..recovery
    };
    store.put_recovered(&lower).unwrap();
    assert!(kv.list("shard/").unwrap().is_empty() && store.vdi_by_name("web").unwrap().is_none());
    assert_eq!(store.next_vdi_id().unwrap(), VdiId(5));
    assert!(store.next_incarnation().unwrap() > recovery.incarnation);
    assert_eq!(store.pool().unwrap().unwrap().recovered, 2);
}

#[test]
fn only_who_has_everything_that_anybody_has_is_in_sync() {
    let fall = |ends: [u64; 3]| {
        let found = ends.map(|end| Some(copy(&record(3), end))).to_vec();
        merged(disks(&web(1), found), &Asked::default())
    };
    assert_eq!(in_sync(&fall([10, 12, 11])), ids(&[2]));
    assert_eq!(in_sync(&fall([12, 12, 11])), ids(&[1, 2]));
    // One that was being caught up counts for no more than it can vouch for.
    let mut found: Vec<_> = [12, 11].map(|end| Some(copy(&record(2), end))).to_vec();
    found[0].as_mut().unwrap().good_until = Some(Seq(5));
    let recovery = merged(disks(&web(1), found), &Asked::default());
    assert_eq!((in_sync(&recovery), recovery.problems.len()), (ids(&[2]), 0));
    assert_eq!(recovery.vdis[0].behind, 1);
}

#[test]
fn the_newest_record_decides_who_counts() {
    // Disk 3 left at epoch 5; it was away and holds writes that were never chosen.
    let mut newer = record(3);
    newer.epoch = Epoch(5);
    newer.in_sync = ids(&[1, 2]);
    newer.ended = vec![EpochEnd {
        epoch: Epoch(4),
        end: Seq(11),
    }];
    let found = vec![
        Some(copy(&newer, 20)),
        Some(copy(&newer, 20)),
        Some(copy(&record(3), 13)),
    ];
    let recovery = merged(disks(&web(1), found.clone()), &Asked::default());
    assert_eq!((in_sync(&recovery), recovery.problems.len()), (ids(&[1, 2]), 0));
    // A later record, which no disk heard of, may have ended an epoch earlier.
    assert_eq!(recovery.vdis[0].shards[0].ended, []);
    // So does the newest note what the VDI is: two disks were away when it grew.
    let mut grown = disks(&web(2), vec![Some(copy(&record(3), 10)); 3]);
    for old in &mut grown[1..] {
        old.vdis[0].bytes = SHARD_BYTES_DEFAULT;
        old.vdis[0].revision -= 1;
    }
    let recovery = merged(grown, &Asked::default());
    assert_eq!(recovery.vdis[0].record.bytes, 2 * SHARD_BYTES_DEFAULT);
    // A replica that is not in sync and has more than those that are: nobody can say why.
    let mut odd = found;
    odd[2].as_mut().unwrap().end = Seq(21);
    let recovery = merged(disks(&web(1), odd), &Asked::default());
    assert!(
        recovery.problems[0].contains("is not in sync and has more"),
        "{:?}",
        recovery.problems
    );
    // Two records of one epoch: the store went back once and both were saved.
    let other = ShardRecord {
        saved_by: Incarnation(8),
        ..newer.clone()
    };
    let found = vec![Some(copy(&newer, 20)), Some(copy(&other, 20)), None];
    let recovery = merged(disks(&web(1), found), &Asked::default());
    assert!(
        recovery
            .problems
            .iter()
            .any(|words| words.contains("two records of epoch 5"))
    );
}

#[test]
fn a_disk_that_is_not_there_is_asked_for_and_its_loss_is_weighed() {
    let two_of = |replicas: u128| {
        let found = (0..2).map(|_| Some(copy(&record(replicas), 10))).collect();
        disks(&web(1), found)
    };
    let recovery = merged(two_of(3), &Asked::default());
    assert_eq!(recovery.missing.iter().copied().collect::<Vec<_>>(), ids(&[3]));
    assert!(
        recovery.problems[0].contains("was not read"),
        "{:?}",
        recovery.problems
    );
    let lost = |disks: &[u128]| Asked {
        without: ids(disks).into_iter().collect(),
        ..Asked::default()
    };
    // Two of three hold everything; a fourth disk takes the third's place.
    let mut found = two_of(3);
    found.push(disk(4));
    let recovery = merged(found, &lost(&[3]));
    assert_eq!(recovery.problems, [""; 0]);
    let shard = &recovery.vdis[0].shards[0];
    assert_eq!(
        (&shard.replicas, &shard.in_sync),
        (&ids(&[1, 2, 4]), &ids(&[1, 2]))
    );
    // One of three, or one of two that were in sync, may have missed the last writes.
    for replicas in [2, 3] {
        let mut found = two_of(replicas);
        found.truncate(1);
        let asked = if replicas == 2 { lost(&[2]) } else { lost(&[2, 3]) };
        let recovery = merged(found.clone(), &asked);
        assert!(
            recovery.problems.iter().any(|words| words.contains("may lack")),
            "{replicas}: {:?}",
            recovery.problems
        );
        let accepted = Asked {
            accept_lost: true,
            ..asked
        };
        let recovery = merged(found, &accepted);
        assert_eq!((recovery.problems.len(), in_sync(&recovery)), (0, ids(&[1])));
        assert!(recovery.remarks[0].contains("may lack"));
    }
    // With a disk lost, a shard that nobody has may have been on it.
    let found = [true, true, false].map(|has| has.then(|| copy(&record(2), 10)));
    let found = disks(&web(2), found.to_vec());
    let recovery = merged(found.clone(), &lost(&[9]));
    assert!(
        recovery.problems[0].contains("1 shards may lack"),
        "{:?}",
        recovery.problems
    );
    assert_eq!(merged(found, &Asked::default()).problems, [""; 0]);
}

#[test]
fn a_replica_that_moved_is_found_where_it_is() {
    // From disk 1 to disk 2, which was told of the step before the last; disk 1 was let go.
    let mut moving = record(2);
    moving.in_sync = ids(&[1]);
    let found = vec![None, Some(copy(&moving, 10))];
    let mut found = disks(&web(1), found);
    found[0].vdis.clear();
    found[0].note.as_mut().unwrap().next_vdi_id = 1;
    let recovery = merged(found.clone(), &Asked::default());
    assert_eq!((in_sync(&recovery), recovery.problems.len()), (ids(&[2]), 0));
    // While it was still being filled, nothing is known to be whole.
    found[1].shards[0].good_until = Some(Seq(0));
    let recovery = merged(found, &Asked::default());
    assert!(
        recovery.problems[0].contains("may lack"),
        "{:?}",
        recovery.problems
    );
}

#[test]
fn what_was_deleted_does_not_come_back_unannounced() {
    // Disk 3 was away; the others let everything of the VDI go.
    let found = vec![None, None, Some(copy(&record(3), 10))];
    let mut found = disks(&web(1), found);
    for seen in &mut found[..2] {
        seen.vdis.clear();
    }
    let recovery = merged(found.clone(), &Asked::default());
    assert!(recovery.vdis[0].is_deleted && recovery.vdis[0].shards.is_empty());
    assert!(
        recovery.remarks[0].contains("--undelete 1"),
        "{:?}",
        recovery.remarks
    );
    let store = ControlStore::new(Box::new(MemoryKv::default()));
    store.put_recovered(&recovery).unwrap();
    assert!(store.vdis().unwrap().is_empty() && store.next_vdi_id().unwrap() == VdiId(5));
    // It was never touched: its note alone says so.
    found[2].shards.clear();
    assert!(merged(found.clone(), &Asked::default()).vdis[0].is_deleted);
    // Disks that were away before it was made have seen nothing.
    for seen in &mut found[..2] {
        seen.note.as_mut().unwrap().next_vdi_id = 1;
    }
    assert!(!merged(found, &Asked::default()).vdis[0].is_deleted);
    // Deletion had begun, and nobody let go of anything yet.
    let mut deleting = web(1);
    deleting.deleting = true;
    let found = (0..3).map(|_| Some(copy(&record(3), 10))).collect();
    let found = disks(&deleting, found);
    assert!(merged(found.clone(), &Asked::default()).vdis[0].is_deleted);
    let asked = Asked {
        undelete: [VdiId(1)].into(),
        ..Asked::default()
    };
    let recovery = merged(found, &asked);
    assert!(!recovery.vdis[0].is_deleted && !recovery.vdis[0].record.deleting);
    assert_eq!(recovery.vdis[0].shards.len(), 1);
}

#[test]
fn what_cannot_be_one_pool_is_refused() {
    let now = NOW.parse().unwrap();
    assert_eq!(merge(&[], &Asked::default(), now), Err(MergeError::NoDisk));
    let other = FoundDisk {
        pool: PoolId(8),
        ..disk(2)
    };
    let two = |second: FoundDisk| Export {
        disks: vec![disk(1), second],
    };
    let merged = merge(&[two(other)], &Asked::default(), now);
    assert!(matches!(merged, Err(MergeError::OtherPool { .. })), "{merged:?}");
    let merged = merge(&[two(disk(1))], &Asked::default(), now);
    assert!(matches!(merged, Err(MergeError::Twice { .. })), "{merged:?}");
    // A shard without a note, and what could not be read, are in the way.
    let found = vec![Some(copy(&record(1), 10))];
    let mut found = disks(&web(1), found);
    found[0].vdis.clear();
    found[0]
        .unreadable
        .push("the record of shard 1/0 is damaged".to_owned());
    let recovery = self::merged(found, &Asked::default());
    assert_eq!(recovery.problems.len(), 2, "{:?}", recovery.problems);
    for content in [
        "",
        "{",
        r#"{"v":2,"record":{}}"#,
        r#"{"v":1,"record":{"disks":7}}"#,
    ] {
        assert!(decode_export("x", content.as_bytes()).is_err(), "{content}");
    }
}

#[test]
fn a_note_says_what_the_head_reads() {
    let mut vdi = web(1);
    vdi.head = LayerId(9);
    let id = vdi.id;
    let step = |lowest: u32, highest: u32| LineageStep {
        vdi: id,
        lowest: LayerId(lowest),
        highest: LayerId(highest),
    };
    for (steps, told) in [
        (vec![step(0, 9)], vec![]),
        (vec![step(3, 9)], vec![0, 6]),
        (vec![step(9, 9), step(5, 6), step(0, 3)], vec![0, 0, 3, 1, 2, 3]),
    ] {
        let lineage = Lineage::new(&steps).unwrap();
        let all = VdiNote::new(&vdi, &lineage, &[DiskId(1)]);
        assert_eq!(all.lineage, told, "{lineage}");
        let read = vdi_note(vdi.id, &note(&all)).unwrap();
        assert_eq!(read.lineage(), Some(lineage));
    }
    let lineage = Lineage::of_layers(vdi.id, LayerId(0), LayerId(9));
    for wrong in [
        vec![1, 0],
        vec![0],
        vec![0, 10],
        vec![0, 3, 0, 2],
        vec![0, 3, 7, 0],
    ] {
        let wrong = VdiNote {
            lineage: wrong,
            ..VdiNote::new(&vdi, &lineage, &[])
        };
        assert!(vdi_note(vdi.id, &note(&wrong)).is_err(), "{wrong:?}");
    }
    // The deepest lineage of a VDI that was rolled back a hundred times between thousands of snapshots.
    vdi.head = LayerId(200_000);
    vdi.name = "x".repeat(63);
    let steps = (0..128).map(|no| 200_000 - no * 1500);
    let steps: Vec<LineageStep> = steps.map(|layer| step(layer, layer)).collect();
    let deepest = Lineage::new(&steps).unwrap();
    let all = VdiNote::new(&vdi, &deepest, &ids(&[u128::MAX, 2, 3]));
    assert!(
        note(&all).len() < replication::RECORD_BYTES_MAX,
        "{}",
        note(&all).len()
    );
}

#[test]
fn the_layers_of_a_recovered_vdi_are_what_its_head_read() {
    let mut vdi = web(1);
    vdi.head = LayerId(9);
    let steps = [(9, 9), (5, 6), (0, 3)].map(|(lowest, highest)| LineageStep {
        vdi: vdi.id,
        lowest: LayerId(lowest),
        highest: LayerId(highest),
    });
    let lineage = Lineage::new(&steps).unwrap();
    let mut found = disks(&vdi, (0..3).map(|_| Some(copy(&record(3), 10))).collect());
    for disk in &mut found {
        disk.vdis = vec![VdiNote::new(&vdi, &lineage, &[DiskId(1), DiskId(2), DiskId(3)])];
    }
    let recovery = merged(found, &Asked::default());
    let store = ControlStore::new(Box::new(MemoryKv::default()));
    store.put_recovered(&recovery).unwrap();
    let tree = store.layers(vdi.id).unwrap();
    assert_eq!(tree.head(vdi.id).unwrap().lineage, lineage);
    assert_eq!(tree.snapshots(vdi.id).unwrap().count(), 0);
    // What it did not read is never read again, whatever is done with it.
    assert_eq!(store.head_lineages().unwrap()[&vdi.id], lineage);
}

#[test]
fn notes_are_small_and_impossible_ones_are_refused() {
    let mut vdi = web(1);
    vdi.name = "x".repeat(63);
    vdi.bytes = 64 << 40;
    let all = VdiNote::new(&vdi, &lineage(&vdi), &ids(&[u128::MAX, 2, 3]));
    assert!(note(&all).len() < replication::RECORD_BYTES_MAX);
    assert_eq!(vdi_note(VdiId(1), &note(&all)).unwrap(), all);
    assert!(vdi_note(VdiId(2), &note(&all)).is_err());
    for wrong in [
        VdiNote {
            shard_bytes: 0,
            ..all.clone()
        },
        VdiNote {
            shard_bytes: 5,
            ..all.clone()
        },
        VdiNote {
            bytes: 0,
            ..all.clone()
        },
        VdiNote {
            replicas: 4,
            ..all.clone()
        },
        VdiNote {
            sector_bytes: 0,
            ..all.clone()
        },
        VdiNote {
            shard_bytes: 1 << 20,
            ..all.clone()
        },
    ] {
        assert!(vdi_note(VdiId(1), &note(&wrong)).is_err(), "{wrong:?}");
    }
}
