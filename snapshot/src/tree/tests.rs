//! Operations one by one, then at random against full copies.

mod model;

use super::*;

const WEB: VdiId = VdiId(1);
const TEST: VdiId = VdiId(2);

fn vdi_name(name: &str) -> VdiName {
    name.parse().unwrap()
}

fn name(name: &str) -> SnapshotName {
    name.parse().unwrap()
}

fn names(names: &[&str]) -> Vec<SnapshotName> {
    names.iter().map(|n| name(n)).collect()
}

fn then() -> Taken {
    Taken {
        at: "2026-11-21T10:15:00Z".parse().unwrap(),
        bytes: 20 << 30,
    }
}

/// `web` with a snapshot for each of these names.
fn web(snapshots: &[&str]) -> Tree {
    let mut tree = Tree::new();
    tree.create(WEB, vdi_name("web"));
    for snapshot in snapshots {
        tree.take(WEB, name(snapshot), then()).unwrap();
    }
    tree
}

fn sees(tree: &Tree, vdi: VdiId) -> String {
    tree.head(vdi).unwrap().lineage.to_string()
}

fn said(outcome: &Outcome) -> Vec<String> {
    outcome.changes.iter().map(ToString::to_string).collect()
}

fn one(ranges: &str, called: u32) -> String {
    format!(
        "VDI 1: layers {ranges} are one, called {called}: whoever reads one of them reads {called} before it"
    )
}

fn gone(ranges: &str) -> String {
    format!("VDI 1: layers {ranges} are gone: nobody reads them")
}

#[test]
fn thousands_of_snapshots_are_one_step() {
    let mut tree = Tree::new();
    tree.create(WEB, vdi_name("web"));
    for no in 0..2_000 {
        tree.take(WEB, name(&format!("s{no}")), then()).unwrap();
    }
    assert_eq!(sees(&tree, WEB), "1:0..=2000");
    let doomed: Vec<SnapshotName> = (1..1_999).map(|no| name(&format!("s{no}"))).collect();
    let outcome = tree.delete(WEB, &doomed).unwrap();
    assert_eq!(said(&outcome), [one("1 to 1999", 1999)]);
    assert_eq!(sees(&tree, WEB), "1:0..=2000");
}

#[test]
fn a_roll_back_adds_a_step_and_a_clone_another() {
    let mut tree = web(&["s0", "s1", "s2", "s3", "s4", "s5", "s6", "s7"]);
    let (head, outcome) = tree
        .roll_back(WEB, &name("s4"), Some((name("before"), then())))
        .unwrap();
    assert_eq!(head.layer, LayerId(9));
    assert_eq!(head.lineage.to_string(), "1:9..=9, 1:0..=4");
    assert_eq!(outcome, Outcome::default());
    assert_eq!(tree.find(WEB, &name("before")), Ok(LayerId(8)));

    let clone = tree.clone_of(WEB, &name("s4"), TEST, vdi_name("test")).unwrap();
    assert_eq!((clone.vdi, clone.layer), (TEST, LayerId(1)));
    assert_eq!(clone.lineage.to_string(), "2:0..=1, 1:0..=4");
    let origin = Origin {
        vdi: WEB,
        layer: LayerId(4),
    };
    assert_eq!(tree.below(TEST, LayerId(0)), Ok(Some(origin)));
}

#[test]
fn a_roll_back_that_keeps_nothing_drops_what_only_the_head_had() {
    let mut tree = web(&["a", "b"]);
    let (head, outcome) = tree.roll_back(WEB, &name("a"), None).unwrap();
    assert_eq!(said(&outcome), [gone("2")]);
    assert_eq!(head.lineage.to_string(), "1:3..=3, 1:0..=0");
    // The branch that @b ends goes with it.
    let outcome = tree.delete(WEB, &names(&["b"])).unwrap();
    assert_eq!(said(&outcome), [gone("1 to 2")]);
    assert_eq!(sees(&tree, WEB), "1:3..=3, 1:0..=0");
    // Once no replica has layers 1 and 2, the step reaches over them.
    tree.settle(WEB, tree.revision(WEB).unwrap()).unwrap();
    assert_eq!(sees(&tree, WEB), "1:0..=3");
    assert_eq!(tree.unsettled(WEB), Ok(vec![]));
}

#[test]
fn a_layer_between_branches_stays_until_one_is_left() {
    let mut tree = web(&["a", "b"]);
    tree.roll_back(WEB, &name("a"), Some((name("old"), then())))
        .unwrap();
    let outcome = tree.delete(WEB, &names(&["a"])).unwrap();
    assert_eq!(outcome.changes, []);
    let stays = Stays {
        vdi: WEB,
        layer: LayerId(0),
        branches: vec![LayerId(1), LayerId(3)],
        clones: vec![],
    };
    assert_eq!(outcome.stays, [stays]);
    // @b goes into @old; with @old its branch is gone, and layer 0 has one successor.
    assert_eq!(
        said(&tree.delete(WEB, &names(&["b"])).unwrap()),
        [one("1 to 2", 2)]
    );
    let outcome = tree.delete(WEB, &names(&["old"])).unwrap();
    assert_eq!(said(&outcome), [one("0, 3", 3), gone("1 to 2")]);
    assert_eq!(sees(&tree, WEB), "1:3..=3, 1:0..=0");
}

#[test]
fn a_merge_skips_the_layers_of_other_branches() {
    let mut tree = web(&["a", "b", "c"]);
    tree.roll_back(WEB, &name("b"), None).unwrap();
    // 0 @a, 1 @b; on it 2 @c and 4, the head; 3 is gone.
    let outcome = tree.delete(WEB, &names(&["c"])).unwrap();
    assert_eq!(said(&outcome), [gone("2 to 3")]);
    let outcome = tree.delete(WEB, &names(&["b", "a"])).unwrap();
    assert_eq!(said(&outcome), [one("0 to 1, 4", 4)]);
}

#[test]
fn what_is_needed_is_not_deleted() {
    let mut tree = web(&["a", "b"]);
    tree.protect(WEB, &name("a"), true).unwrap();
    let before = tree.clone();
    let refused = tree.delete(WEB, &names(&["b", "a"])).unwrap_err();
    assert_eq!(refused.to_string(), "snapshot 'web@a' is protected");
    assert_eq!(tree, before);
    assert_eq!(
        tree.delete_vdi(WEB).unwrap_err().to_string(),
        "snapshot 'web@a' is protected"
    );
    tree.protect(WEB, &name("a"), false).unwrap();
    tree.clone_of(WEB, &name("b"), TEST, vdi_name("test")).unwrap();
    let refused = tree.delete(WEB, &names(&["a", "b"])).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "snapshot 'web@b' is needed by the clone test"
    );
    assert_eq!(
        refused.way_out(),
        "delete the clones, or make them whole: `weft clone flatten test`"
    );
    tree.clone_of(WEB, &name("a"), VdiId(3), vdi_name("other"))
        .unwrap();
    let refused = tree.delete_vdi(WEB).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "VDI 'web' is needed by the clones other, test"
    );
    tree.delete_vdi(VdiId(3)).unwrap();
    assert!(tree.delete(WEB, &names(&["a"])).is_ok());

    let outcome = tree.flattened(TEST).unwrap();
    assert_eq!(
        said(&outcome)[0],
        "VDI 2: layers 0 to 1 are one, called 1: whoever reads one of them reads 1 before it"
    );
    assert_eq!(sees(&tree, TEST), "2:0..=1");
    assert_eq!(
        tree.flattened(TEST).unwrap_err().to_string(),
        "VDI 'test' is no clone: it needs no other VDI"
    );
    assert!(tree.delete(WEB, &names(&["b"])).is_ok());
}

#[test]
fn names_are_unique_and_missing_ones_are_said() {
    let mut tree = web(&["a"]);
    let before = tree.clone();
    let refused = tree.take(WEB, name("a"), then()).unwrap_err();
    assert_eq!(refused.to_string(), "VDI 'web' has a snapshot 'a' already");
    let refused = tree.delete(WEB, &names(&["a", "c"])).unwrap_err();
    assert_eq!(refused.to_string(), "VDI 'web' has no snapshot 'c'");
    assert!(
        tree.roll_back(WEB, &name("a"), Some((name("a"), then())))
            .is_err()
    );
    assert_eq!(tree.head(TEST).unwrap_err(), Refusal::NoVdi(TEST));
    assert_eq!(tree, before);
}

#[test]
fn a_snapshot_in_two_halves_may_be_given_up() {
    let mut tree = web(&["a"]);
    let head = tree.raise(WEB).unwrap();
    assert_eq!(head.layer, LayerId(2));
    // Nothing goes into a layer that is still to be named, nor out of it.
    assert_eq!(
        said(&tree.delete(WEB, &names(&["a"])).unwrap()),
        [one("0 to 1", 1)]
    );
    let outcome = tree.give_up(WEB, LayerId(1)).unwrap();
    assert_eq!(said(&outcome), [one("0 to 2", 2)]);
    tree.raise(WEB).unwrap();
    tree.name_sealed(WEB, LayerId(2), name("b"), then()).unwrap();
    assert_eq!(tree.snapshots(WEB).unwrap().count(), 1);
}

#[test]
fn clones_go_a_hundred_deep_and_no_deeper_than_the_limit() {
    let mut tree = web(&["s"]);
    let id = |depth: usize| VdiId(1 + depth as u32);
    for depth in 1..Lineage::STEPS_MAX {
        tree.clone_of(
            id(depth - 1),
            &name("s"),
            id(depth),
            vdi_name(&format!("c{depth}")),
        )
        .unwrap();
        tree.take(id(depth), name("s"), then()).unwrap();
    }
    let deepest = id(Lineage::STEPS_MAX - 1);
    assert_eq!(
        tree.head(deepest).unwrap().lineage.steps().len(),
        Lineage::STEPS_MAX
    );
    let before = tree.clone();
    let refused = tree.clone_of(deepest, &name("s"), VdiId(900), vdi_name("x"));
    let refused = refused.unwrap_err();
    assert_eq!(
        refused.to_string(),
        "what VDI 'c127' reads comes from 128 places already, one for each clone and each roll-back with a \
         snapshot between: more are not supported"
    );
    assert!(refused.way_out().contains("weft clone flatten c127"));
    assert_eq!(tree.roll_back(deepest, &name("s"), None).unwrap_err(), refused);
    assert_eq!(tree, before);
    // Flattening one in the middle makes all above it shorter.
    tree.flattened(id(100)).unwrap();
    assert_eq!(tree.head(deepest).unwrap().lineage.steps().len(), 28);
    tree.clone_of(deepest, &name("s"), VdiId(900), vdi_name("x"))
        .unwrap();
}

#[test]
fn roll_backs_for_ever_stay_within_the_limit_once_settled() {
    let mut tree = web(&["s0"]);
    for no in 0..1_000 {
        tree.roll_back(WEB, &name(&format!("s{no}")), None).unwrap();
        tree.take(WEB, name(&format!("s{}", no + 1)), then()).unwrap();
        tree.delete(WEB, &names(&[&format!("s{no}")])).unwrap();
        if no % 60 == 59 {
            assert!(tree.head(WEB).unwrap().lineage.steps().len() > 60);
            tree.settle(WEB, tree.revision(WEB).unwrap()).unwrap();
            assert_eq!(tree.head(WEB).unwrap().lineage.steps().len(), 1);
        }
    }
}

#[test]
fn a_snapshot_that_never_got_its_name_is_left_to_the_next_writer() {
    let mut tree = web(&["a"]);
    tree.raise(WEB).unwrap();
    let (mut again, outcome) = Tree::load([tree.save(WEB).unwrap()]).unwrap();
    assert_eq!((&again, outcome), (&tree, Outcome::default()));
    assert_eq!(again.sealed(WEB).unwrap().collect::<Vec<_>>(), [LayerId(1)]);
    assert_eq!(said(&again.give_up(WEB, LayerId(1)).unwrap()), [one("1 to 2", 2)]);
    // Records that say neither are as after that.
    let mut records = tree.save(WEB).unwrap();
    records.layers[1].sealed = false;
    let (loaded, outcome) = Tree::load([records]).unwrap();
    assert_eq!(said(&outcome), [one("1 to 2", 2)]);
    assert_eq!(loaded, again);
}

#[test]
fn records_that_cannot_be_are_refused() {
    let mut tree = web(&["a", "b", "c"]);
    tree.roll_back(WEB, &name("b"), None).unwrap();
    tree.delete(WEB, &names(&["a"])).unwrap();
    let good = tree.save(WEB).unwrap();
    assert_eq!(good.layers.len(), 2);
    let check = |reason: &str, spoil: &dyn Fn(&mut VdiRecords)| {
        let mut records = good.clone();
        spoil(&mut records);
        let refused = Tree::load([records]).map(|(tree, _)| tree);
        let expected = format!("the layers of VDI 1 cannot be so: {reason}");
        assert_eq!(refused.unwrap_err().to_string(), expected);
    };
    check("layer 2 is not below the head, 2", &|r| {
        r.head = LayerId(2);
    });
    check("what is below layer 1 is not older", &|r| {
        r.layers[0].below = Some(LayerId(1));
    });
    check("layer 1 is there twice", &|r| {
        r.layers.push(r.layers[0].clone());
        r.layers[2].snapshot = None;
    });
    check("layer 0 is not there", &|r| {
        r.layers[1].below = Some(LayerId(0));
    });
    check("2 layers have nothing below them", &|r| {
        r.layers[1].below = None;
    });
    check("layers 3 cannot have become one, or be gone", &|r| {
        r.layers[1].layer = LayerId(3);
    });
    check("layer 4 has two fates", &|r| {
        r.whole.gone[0].layers.high = LayerId(4);
    });
    check("what was merged into layer 1 does not end with it", &|r| {
        r.layers[0].merged[0].layers.high = LayerId(2);
    });
    check("layers 1 to 0 cannot have become one, or be gone", &|r| {
        r.whole.gone[0].layers = LayerRange {
            low: LayerId(1),
            high: LayerId(0),
        };
    });
    check("layers 0 to 1 cannot have become one, or be gone", &|r| {
        r.whole.revision = 0;
    });
    check("layer 2 is no snapshot's", &|r| r.layers[1].sealed = true);
    check("two snapshots are called 'b'", &|r| {
        r.layers[1].snapshot = r.layers[0].snapshot.clone();
    });
    let origin = |vdi: u32, layer: u32| {
        Some(Origin {
            vdi: VdiId(vdi),
            layer: LayerId(layer),
        })
    };
    check("a clone has no layer 0", &|r| {
        r.whole.origin = origin(2, 0);
    });

    let clone = tree.clone_of(WEB, &name("b"), TEST, vdi_name("test")).unwrap();
    let both = [tree.save(WEB).unwrap(), tree.save(clone.vdi).unwrap()];
    assert!(Tree::load(both.clone()).is_ok());
    for wrong in [origin(1, 0), origin(2, 0), origin(1, 4), origin(7, 0)] {
        let mut both = both.clone();
        both[1].whole.origin = wrong;
        let refused = Tree::load(both).unwrap_err();
        assert!(refused.reason.ends_with("which is not there"), "{refused}");
    }
    let mut both = both;
    both[1].layers[0].snapshot = both[0].layers[0].snapshot.clone();
    assert!(Tree::load(both).is_err());
}

#[test]
fn a_layer_without_a_name_stays_while_a_clone_needs_it() {
    // As a clone of a moment between two snapshots leaves it.
    let mut tree = web(&["a", "b"]);
    tree.clone_of(WEB, &name("a"), TEST, vdi_name("test")).unwrap();
    let mut records = [tree.save(WEB).unwrap(), tree.save(TEST).unwrap()];
    records[0].layers[0].snapshot = None;
    let (mut tree, outcome) = Tree::load(records).unwrap();
    assert_eq!(outcome, Outcome::default());
    assert_eq!(tree.clones(WEB, LayerId(0)).unwrap().collect::<Vec<_>>(), [TEST]);
    // What follows is merged into what follows that, and not into this.
    assert_eq!(
        said(&tree.delete(WEB, &names(&["b"])).unwrap()),
        [one("1 to 2", 2)]
    );
    let outcome = tree.delete_vdi(TEST).unwrap();
    assert_eq!(said(&outcome)[1], one("0 to 2", 2));
}

/// What the README shows.
#[test]
fn the_example() {
    let mut tree = web(&["a", "b"]);
    tree.roll_back(WEB, &name("a"), Some((name("old"), then())))
        .unwrap();
    tree.clone_of(WEB, &name("b"), TEST, vdi_name("test")).unwrap();
    let lineage = |snapshot| tree.lineage(WEB, tree.find(WEB, &name(snapshot)).unwrap());
    assert_eq!(sees(&tree, WEB), "1:3..=3, 1:0..=0");
    assert_eq!(lineage("old").unwrap().to_string(), "1:0..=2");
    assert_eq!(sees(&tree, TEST), "2:0..=1, 1:0..=1");
    assert!(tree.delete(WEB, &names(&["b"])).is_err());
    assert_eq!(said(&tree.delete(WEB, &names(&["old"])).unwrap()), [gone("2")]);
    assert_eq!(said(&tree.delete(WEB, &names(&["a"])).unwrap()), [""; 0]);
    tree.flattened(TEST).unwrap();
    assert_eq!(
        said(&tree.delete(WEB, &names(&["b"])).unwrap()),
        [one("0, 3", 3), gone("1 to 2")]
    );
}
