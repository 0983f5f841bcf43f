use super::*;

fn bytes(text: &str) -> Vec<u8> {
    text.as_bytes().to_vec()
}

fn puts(entries: &[(&str, &str)]) -> KvBatch {
    KvBatch {
        puts: entries
            .iter()
            .map(|(key, value)| (bytes(key), bytes(value)))
            .collect(),
        ..KvBatch::default()
    }
}

fn keys(store: &Rocks) -> Vec<String> {
    let entries = store.scan(b"", b"\xff", 100).expect("a scan");
    entries
        .into_iter()
        .map(|(key, _)| String::from_utf8(key).expect("text"))
        .collect()
}

const KINDS: [fn(&Path) -> Result<Rocks, KvError>; 2] = [Rocks::open_index, Rocks::open_records];

#[test]
fn what_was_applied_is_there_after_reopening() {
    for open in KINDS {
        let folder = tempfile::tempdir().expect("a folder");
        let mut store = open(folder.path()).expect("opening");
        store
            .apply(&puts(&[("a", "1"), ("b", "2"), ("c", "3")]))
            .expect("applying");
        let second = KvBatch {
            puts: vec![(bytes("b"), bytes("22"))],
            deletes: vec![bytes("a")],
            delete_ranges: vec![],
        };
        store.apply(&second).expect("applying");
        drop(store);
        let store = open(folder.path()).expect("opening again");
        assert_eq!(keys(&store), ["b", "c"]);
        assert_eq!(store.get(b"b"), Ok(Some(bytes("22"))));
        assert_eq!(store.get(b"a"), Ok(None));
    }
}

/// The files of a store that nobody closed: what a kill leaves behind.
#[test]
fn what_was_applied_needs_no_closing() {
    for open in KINDS {
        let folder = tempfile::tempdir().expect("a folder");
        let live = folder.path().join("live");
        let mut store = open(&live).expect("opening");
        store.apply(&puts(&[("a", "1")])).expect("applying");
        store.apply(&puts(&[("b", "2")])).expect("applying");
        let killed = folder.path().join("killed");
        std::fs::create_dir(&killed).expect("a folder");
        for entry in std::fs::read_dir(&live).expect("listing") {
            let entry = entry.expect("listing");
            std::fs::copy(entry.path(), killed.join(entry.file_name())).expect("copying");
        }
        assert_eq!(keys(&open(&killed).expect("opening the copy")), ["a", "b"]);
    }
}

#[test]
fn ranges_go_before_the_puts_of_their_batch() {
    for open in KINDS {
        let folder = tempfile::tempdir().expect("a folder");
        let mut store = open(folder.path()).expect("opening");
        store
            .apply(&puts(&[("a", ""), ("b", ""), ("c", ""), ("d", "")]))
            .expect("applying");
        let batch = KvBatch {
            puts: vec![(bytes("bb"), bytes("new"))],
            deletes: vec![],
            delete_ranges: vec![
                (bytes("b"), bytes("d")),
                (bytes("z"), bytes("a")),
                (bytes("a"), bytes("a")),
            ],
        };
        store.apply(&batch).expect("applying");
        assert_eq!(keys(&store), ["a", "bb", "d"]);
    }
}

#[test]
fn scans_are_half_open_and_bounded() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut store = Rocks::open_index(folder.path()).expect("opening");
    store
        .apply(&puts(&[("a", ""), ("b", ""), ("c", ""), ("d", "")]))
        .expect("applying");
    let scan = |from: &str, to: &str, limit| -> Vec<Vec<u8>> {
        let found = store.scan(from.as_bytes(), to.as_bytes(), limit).expect("a scan");
        found.into_iter().map(|(key, _)| key).collect()
    };
    assert_eq!(scan("b", "d", 9), [b"b", b"c"]);
    assert_eq!(scan("b", "e", 2), [b"b", b"c"]);
    assert!(scan("c", "b", 9).is_empty() && scan("b", "b", 9).is_empty() && scan("x", "z", 9).is_empty());
    assert!(scan("a", "z", 0).is_empty());
}

#[test]
fn a_store_is_opened_once() {
    let folder = tempfile::tempdir().expect("a folder");
    let _first = Rocks::open_records(folder.path()).expect("opening");
    let error = Rocks::open_records(folder.path())
        .err()
        .expect("the second is refused");
    assert_eq!(
        (error.operation, error.place),
        ("open", folder.path().display().to_string())
    );
}

#[test]
fn damage_is_an_error_and_destroying_starts_afresh() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut store = Rocks::open_index(folder.path()).expect("opening");
    store.apply(&puts(&[("a", "1")])).expect("applying");
    drop(store);
    for entry in std::fs::read_dir(folder.path()).expect("listing") {
        let path = entry.expect("listing").path();
        if path.extension().is_some_and(|it| it == "sst") {
            std::fs::write(&path, b"rot").expect("damaging");
        }
    }
    let error = Rocks::open_index(folder.path())
        .err()
        .expect("damage shows at opening");
    assert_eq!(error.operation, "open");
    Rocks::destroy(folder.path()).expect("destroying");
    assert!(keys(&Rocks::open_index(folder.path()).expect("opening")).is_empty());
}

/// Damage before the log's end is not taken for a torn last record.
#[test]
fn damage_in_the_middle_of_the_records_log_is_an_error() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut store = Rocks::open_records(folder.path()).expect("opening");
    for i in 0..20 {
        store
            .apply(&puts(&[("key", &format!("{i:0100}"))]))
            .expect("applying");
    }
    drop(store);
    let is_log = |path: &PathBuf| path.extension().is_some_and(|it| it == "log");
    let log = std::fs::read_dir(folder.path())
        .expect("listing")
        .map(|entry| entry.expect("listing").path())
        .find(is_log)
        .expect("a log");
    let mut content = std::fs::read(&log).expect("reading");
    content[60] ^= 1;
    std::fs::write(&log, content).expect("damaging");
    assert!(Rocks::open_records(folder.path()).is_err());
}
