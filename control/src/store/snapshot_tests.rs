//! Records of layers: what an operation writes is what it is read from.

use snapshot::SnapshotName;
use snapshot::tree::{Refusal, Taken, Tree};
use types::{LayerId, VdiId};

use super::tests::{placed, shards, store, vdi};
use super::{ControlStore, RecordError};
use crate::{ApiError, ErrorKind, VdiRecord};

const WEB: VdiId = VdiId(1);

fn name(name: &str) -> SnapshotName {
    name.parse().unwrap()
}

fn then() -> Taken {
    Taken {
        at: "2026-11-21T10:15:00Z".parse().unwrap(),
        bytes: 20 << 30,
    }
}

fn with_web() -> ControlStore {
    let store = store();
    let web = VdiRecord {
        head: LayerId(0),
        ..vdi(1, "web01", 1)
    };
    store.create_vdi(&web, &shards(1, 0..1), placed(&store)).unwrap();
    store
}

fn web(store: &ControlStore) -> VdiRecord {
    store.vdi(WEB).unwrap().unwrap()
}

fn take(store: &ControlStore, snapshot: &str) -> VdiRecord {
    let take = |tree: &mut Tree| tree.take(WEB, name(snapshot), then());
    store.change_layers(&web(store), take).unwrap().0
}

fn keys(store: &ControlStore, prefix: &str) -> Vec<String> {
    let entries = store.backend.list(prefix).unwrap();
    entries.into_iter().map(|(key, _)| key).collect()
}

#[test]
fn operations_are_written_as_they_are_read() {
    let store = with_web();
    assert_eq!(take(&store, "a").head, LayerId(1));
    let second = take(&store, "b");
    assert_eq!((second.head, second.revision), (LayerId(2), 3));
    assert_eq!(
        keys(&store, "snapshot/"),
        ["snapshot/00000001/00000000", "snapshot/00000001/00000001"]
    );

    let mut expected = Tree::new();
    expected.create(WEB, "web01".parse().unwrap());
    for snapshot in ["a", "b"] {
        expected.take(WEB, name(snapshot), then()).unwrap();
    }
    assert_eq!(store.layers(WEB).unwrap(), expected);

    let back = |tree: &mut Tree| tree.roll_back(WEB, &name("a"), None);
    let (record, (head, _)) = store.change_layers(&web(&store), back).unwrap();
    assert_eq!(
        (record.head, head.lineage.to_string().as_str()),
        (LayerId(3), "1:3..=3, 1:0..=0")
    );
    let delete = |tree: &mut Tree| tree.delete(WEB, &[name("a"), name("b")]);
    store.change_layers(&web(&store), delete).unwrap();
    assert_eq!(keys(&store, "snapshot/"), [""; 0]);
    expected.roll_back(WEB, &name("a"), None).unwrap();
    expected.delete(WEB, &[name("a"), name("b")]).unwrap();
    assert_eq!(store.layers(WEB).unwrap(), expected);

    let forget = VdiRecord {
        deleting: true,
        ..web(&store)
    };
    take(&store, "left");
    let forget = VdiRecord {
        revision: web(&store).revision,
        head: web(&store).head,
        ..forget
    };
    store.update_vdi(&forget).unwrap();
    store.forget_vdi(WEB).unwrap();
    assert_eq!(keys(&store, "snapshot/"), [""; 0]);
    assert_eq!(keys(&store, "layers/"), [""; 0]);
}

#[test]
fn what_is_refused_writes_nothing() {
    let store = with_web();
    take(&store, "a");
    let all = || ["vdi/", "layers/", "snapshot/"].map(|prefix| store.backend.list(prefix).unwrap());
    let before = all();
    let refuse = |operation: &dyn Fn(&mut Tree) -> Result<(), Refusal>| {
        let error = store.change_layers(&web(&store), operation).unwrap_err();
        assert_eq!(all(), before);
        ApiError::from(error)
    };
    let error = refuse(&|tree| tree.take(WEB, name("a"), then()).map(drop));
    assert_eq!(error.kind, ErrorKind::Conflict);
    assert_eq!(error.message, "VDI 'web01' has a snapshot 'a' already");
    // Half done when it is refused.
    let error = refuse(&|tree| {
        tree.take(WEB, name("b"), then())?;
        tree.delete(WEB, &[name("c")]).map(drop)
    });
    assert_eq!(error.kind, ErrorKind::NotFound);
    assert_eq!(error.hint, "see `weft snapshot list web01`");
}

#[test]
fn an_old_copy_changes_nothing() {
    let store = with_web();
    let old = web(&store);
    take(&store, "a");
    let refused = store.change_layers(&old, |tree| tree.take(WEB, name("b"), then()));
    assert!(
        matches!(
            refused,
            Err(RecordError::OldRevision {
                held: 2,
                given: 1,
                ..
            })
        ),
        "{refused:?}"
    );
    // Somebody is quicker between reading and writing.
    let between = |tree: &mut Tree| {
        take(&store, "b");
        tree.take(WEB, name("c"), then())
    };
    let refused = store.change_layers(&web(&store), between);
    assert!(matches!(refused, Err(RecordError::Overtaken)), "{refused:?}");
    let left = store.layers(WEB).unwrap();
    let names: Vec<&str> = left
        .snapshots(WEB)
        .unwrap()
        .map(|(_, s)| s.name.as_str())
        .collect();
    assert_eq!(names, ["a", "b"]);
}

#[test]
fn a_snapshot_in_two_halves_survives_its_writer() {
    let store = with_web();
    for (sealed, snapshot) in [(0, Some("a")), (1, None)] {
        let sealed = LayerId(sealed);
        store.change_layers(&web(&store), |tree| tree.raise(WEB)).unwrap();
        // From here on it may be another daemon.
        let left: Vec<LayerId> = store.layers(WEB).unwrap().sealed(WEB).unwrap().collect();
        assert_eq!(left, [sealed]);
        let ends = |tree: &mut Tree| match snapshot {
            Some(snapshot) => tree.name_sealed(WEB, sealed, name(snapshot), then()),
            None => tree.give_up(WEB, sealed).map(drop),
        };
        store.change_layers(&web(&store), ends).unwrap();
    }
    assert_eq!(keys(&store, "snapshot/"), ["snapshot/00000001/00000000"]);
    let tree = store.layers(WEB).unwrap();
    assert_eq!(tree.head(WEB).unwrap().lineage.to_string(), "1:0..=2");
    assert_eq!(tree.unsettled(WEB).unwrap().len(), 1);
}

#[test]
fn vdis_that_are_cut_together_change_together() {
    let store = with_web();
    let other = VdiRecord {
        head: LayerId(0),
        ..vdi(2, "db01", 1)
    };
    let shards = shards(2, 0..1);
    store.create_vdi(&other, &shards, placed(&store)).unwrap();
    let both = [web(&store), store.vdi(other.id).unwrap().unwrap()];
    let take = |tree: &mut Tree| {
        tree.take(WEB, name("a"), then())?;
        tree.take(other.id, name("a"), then())
    };
    let (after, _) = store.change_layers_of(&both, take).unwrap();
    assert_eq!(after, [web(&store), store.vdi(other.id).unwrap().unwrap()]);
    assert_eq!(after.iter().map(|vdi| vdi.head.0).collect::<Vec<_>>(), [1, 1]);
    // The second refuses: the first is as it was.
    let refused = store.change_layers_of(&after, |tree| {
        tree.take(WEB, name("b"), then())?;
        tree.take(other.id, name("a"), then())
    });
    assert!(matches!(refused, Err(RecordError::Layers(_))), "{refused:?}");
    assert_eq!(after, [web(&store), store.vdi(other.id).unwrap().unwrap()]);
    // And where one of the records is an old one.
    let refused = store.change_layers_of(&[after[0].clone(), both[1].clone()], |tree| tree.raise(WEB));
    assert!(
        matches!(refused, Err(RecordError::OldRevision { .. })),
        "{refused:?}"
    );
    assert_eq!(store.head_lineages().unwrap().len(), 2);
}

#[test]
fn without_a_record_of_its_layers_a_vdi_has_them_all() {
    let store = store();
    let web = VdiRecord {
        head: LayerId(7),
        ..vdi(1, "web01", 1)
    };
    store.create_vdi(&web, &shards(1, 0..1), placed(&store)).unwrap();
    let tree = store.layers(WEB).unwrap();
    assert_eq!(tree.head(WEB).unwrap().lineage.to_string(), "1:0..=7");
    take(&store, "a");
    assert_eq!(
        store.layers(WEB).unwrap().head(WEB).unwrap().lineage.to_string(),
        "1:0..=8"
    );
}
