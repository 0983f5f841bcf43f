use super::*;
use proptest::prelude::*;

fn object(number: u8, generation: u32) -> SharedObject {
    SharedObject {
        kind: Kind::Chunk,
        reference: ObjectRef {
            hash: [number; 32],
            generation,
        },
    }
}

fn list(number: u8) -> ListId {
    ListId([number; 16])
}

fn session(id: &str, silent_seconds: i64, knows: &[u8]) -> SessionSeen {
    SessionSeen {
        id: id.to_owned(),
        silent_seconds,
        knows: knows.iter().map(|number| list(*number)).collect(),
    }
}

#[test]
fn a_list_waits_for_who_does_not_know_it() {
    let sessions = [session("old", 10, &[1]), session("new", 10, &[1, 2])];
    let verdict = judge(&sessions, &[list(1), list(2)], 100);
    assert_eq!(verdict.ripe, [list(1)]);
    assert_eq!(verdict.waiting_for, ["old"]);
    assert!(verdict.dead.is_empty());
    let verdict = judge(&[], &[list(1), list(2)], 100);
    assert_eq!(verdict.ripe, [list(1), list(2)]);
}

#[test]
fn who_is_silent_for_too_long_is_dead_and_holds_nothing() {
    let sessions = [session("silent", 101, &[]), session("slow", 100, &[1])];
    let verdict = judge(&sessions, &[list(1)], 100);
    assert_eq!(verdict.dead, ["silent"]);
    assert_eq!(verdict.ripe, [list(1)]);
}

#[test]
fn suspects_get_the_next_generation() {
    let mut suspects = Suspects::default();
    assert!(suspects.is_empty());
    suspects.add(&[object(1, 0), object(2, 4), object(2, 1)]);
    assert!(suspects.contains(&object(1, 0)) && !suspects.contains(&object(1, 1)));
    assert!(suspects.contains(&object(2, 0)) && suspects.contains(&object(2, 4)));
    assert_eq!(suspects.reference(Kind::Chunk, [2; 32]).generation, 5);
    assert_eq!(
        suspects.reference(Kind::Page, [2; 32]).generation,
        0,
        "of another kind"
    );
    assert_eq!(suspects.reference(Kind::Chunk, [3; 32]).generation, 0);
}

#[test]
fn what_is_needed_is_neither_condemned_nor_deleted() {
    let stored = [object(1, 0), object(2, 0), object(2, 1), object(3, 0)];
    let needed = HashSet::from([object(1, 0), object(2, 1)]);
    let known = HashSet::from([object(3, 0)]);
    assert_eq!(condemn(stored, &needed, &known), [vec![object(2, 0)]]);
    assert_eq!(doomed(&stored, &needed), [object(2, 0), object(3, 0)]);
    let many = (0..LIST_MAX as u32 + 5).map(|generation| object(9, generation));
    let lists = condemn(many, &needed, &known);
    assert_eq!(lists.iter().map(Vec::len).collect::<Vec<_>>(), [LIST_MAX, 5]);
}

proptest! {
    #[test]
    fn a_list_is_read_as_it_was_written(numbers in prop::collection::vec((any::<u8>(), any::<u32>()), 0..50)) {
        let objects: Vec<_> = numbers.into_iter().map(|(number, generation)| object(number, generation)).collect();
        let bytes = encode(list(1), &objects);
        prop_assert_eq!(decode(&bytes, list(1)), Ok(objects));
        prop_assert!(decode(&bytes, list(2)).is_err());
        for cut in 0..bytes.len() {
            prop_assert!(decode(&bytes[..cut], list(1)).is_err());
        }
    }

    #[test]
    fn arbitrary_bytes_do_no_harm(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = decode(&bytes, list(1));
        let _ = decode(&[&bytes[..], blake3::hash(&bytes).as_bytes()].concat(), list(1));
    }
}
