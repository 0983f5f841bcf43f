use super::*;
use proptest::prelude::*;

fn manifest() -> Manifest {
    Manifest {
        id: BackupId([3; 16]),
        name: "web01@before-upgrade".to_owned(),
        bytes: 5 << 30,
        sector_bytes: 512,
        created: Timestamp::from_second(1_700_000_000).unwrap(),
        parent: Some(BackupId([2; 16])),
        weft: "weft-0.1.0".to_owned(),
        cost: Cost {
            read_bytes: 1,
            new_bytes: 2,
            sent_bytes: 3,
        },
        pages: vec![
            None,
            Some(ObjectRef::first([9; 32])),
            None,
            None,
            Some(ObjectRef::first([8; 32])),
        ],
    }
}

/// Bytes with the hash that belongs to them: as someone would make them who knows the format.
fn hashed(body: &[u8]) -> Vec<u8> {
    [body, blake3::hash(body).as_bytes()].concat()
}

#[test]
fn a_manifest_is_read_as_it_was_written() {
    let with_parent = manifest();
    let without = Manifest {
        parent: None,
        ..manifest()
    };
    for manifest in [with_parent, without] {
        assert_eq!(Manifest::decode(&manifest.encode(), manifest.id), Ok(manifest));
    }
}

#[test]
fn a_manifest_of_another_backup_is_refused() {
    let refused = Manifest::decode(&manifest().encode(), BackupId([4; 16]));
    assert_eq!(
        refused,
        Err(Damage::Content("it is the manifest of another backup"))
    );
}

#[test]
fn every_altered_byte_is_noticed() {
    let bytes = manifest().encode();
    for at in 0..bytes.len() {
        let mut altered = bytes.clone();
        altered[at] ^= 1;
        assert_eq!(
            Manifest::decode(&altered, manifest().id),
            Err(Damage::Hash),
            "byte {at}"
        );
        assert!(
            Manifest::decode(&bytes[..at], manifest().id).is_err(),
            "cut at {at}"
        );
    }
}

#[test]
fn contradictions_are_refused_even_with_a_right_hash() {
    let wrong = [
        Manifest {
            name: String::new(),
            ..manifest()
        },
        Manifest {
            name: "-rf".to_owned(),
            ..manifest()
        },
        Manifest {
            name: "x".repeat(161),
            ..manifest()
        },
        Manifest {
            bytes: 0,
            ..manifest()
        },
        Manifest {
            bytes: (5 << 30) + 1,
            ..manifest()
        },
        Manifest {
            bytes: u64::MAX,
            ..manifest()
        },
        Manifest {
            sector_bytes: 0,
            ..manifest()
        },
        Manifest {
            sector_bytes: 513,
            ..manifest()
        },
        Manifest {
            pages: vec![None; 4],
            ..manifest()
        },
        Manifest {
            pages: vec![None; 6],
            ..manifest()
        },
        Manifest {
            weft: "x".repeat(65),
            ..manifest()
        },
    ];
    for wrong in wrong {
        assert!(
            matches!(
                Manifest::decode(&wrong.encode(), wrong.id),
                Err(Damage::Content(_))
            ),
            "{wrong:?}"
        );
    }
    let body = manifest().encode();
    let longer = hashed(&[&body[..body.len() - 32], &[0]].concat());
    assert!(Manifest::decode(&longer, manifest().id).is_err());
}

#[test]
fn ids_sort_by_age() {
    let at = |second| BackupId::new(Timestamp::from_second(second).unwrap(), [0xff; 10]);
    assert!(at(1_700_000_000) < at(1_700_000_001));
    assert_eq!(BackupId::parse(&at(5).to_string()), Some(at(5)));
    assert_eq!(BackupId::parse("x"), None);
}

proptest! {
    #[test]
    fn arbitrary_bytes_do_no_harm(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = Manifest::decode(&bytes, BackupId([0; 16]));
        let _ = Manifest::decode(&hashed(&bytes), BackupId([0; 16]));
    }

    #[test]
    fn changed_fields_do_no_harm(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)) {
        let mut body = manifest().encode();
        body.truncate(body.len() - 32);
        for (at, byte) in changes {
            let at = at.index(body.len());
            body[at] = byte;
        }
        if let Ok(read) = Manifest::decode(&hashed(&body), manifest().id) {
            prop_assert_eq!(read.encode(), hashed(&body), "what is read is what is written");
        }
    }
}
