use super::*;
use crate::key::Key;
use proptest::prelude::*;

fn sealer(key: Option<u8>) -> Sealer {
    let repository = [7; 16];
    Sealer {
        repository,
        keys: key.map(|secret| Key::new([secret; 32]).of_repository(&repository)),
    }
}

fn chunk(sealer: &Sealer, content: &[u8]) -> (Hash, Vec<u8>) {
    let hash = sealer.hash(content);
    (hash, sealer.seal(Kind::Chunk, &hash, content, 3))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_was_sealed_opens(content in prop::collection::vec(any::<u8>(), 0..5000), repeat in 1_usize..50, is_encrypted: bool) {
        let sealer = sealer(is_encrypted.then_some(1));
        let content = content.repeat(repeat);
        let (hash, object) = chunk(&sealer, &content);
        prop_assert_eq!(sealer.open(Kind::Chunk, &hash, &object), Ok(content));
        prop_assert!(object.len() as u64 <= object_bytes_max(Kind::Chunk));
    }

    #[test]
    fn every_altered_byte_is_noticed(
        content in prop::collection::vec(any::<u8>(), 1..300), at: prop::sample::Index, flip in 1_u8.., is_encrypted: bool,
    ) {
        let sealer = sealer(is_encrypted.then_some(1));
        let (hash, mut object) = chunk(&sealer, &content);
        let at = at.index(object.len());
        object[at] ^= flip;
        // Of an object that is not encrypted, zstd may read the same content from other bytes.
        if let Ok(read) = sealer.open(Kind::Chunk, &hash, &object) {
            prop_assert!(!is_encrypted && read == content);
        }
    }

    #[test]
    fn arbitrary_bytes_do_no_harm(mut bytes in prop::collection::vec(any::<u8>(), 0..400), has_header: bool, is_encrypted: bool) {
        if has_header && bytes.len() >= 8 {
            bytes[..5].copy_from_slice(b"WFBK\x01");
            bytes[5] = 1;
            bytes[6] &= 1;
            bytes[7] = u8::from(is_encrypted);
        }
        prop_assert!(sealer(is_encrypted.then_some(1)).open(Kind::Chunk, &[0; 32], &bytes).is_err());
    }
}

#[test]
fn a_cut_object_is_noticed() {
    for sealer in [sealer(None), sealer(Some(1))] {
        let (hash, object) = chunk(&sealer, &b"some content ".repeat(100));
        for cut in 0..object.len() {
            assert!(sealer.open(Kind::Chunk, &hash, &object[..cut]).is_err(), "{cut}");
        }
        let longer = [&object[..], &[0]].concat();
        assert!(sealer.open(Kind::Chunk, &hash, &longer).is_err());
    }
}

#[test]
fn an_object_opens_in_its_place_only() {
    let ours = sealer(Some(1));
    let (hash, object) = chunk(&ours, b"content");
    let refused = |sealer: &Sealer, kind, name: &[u8]| sealer.open(kind, name, &object).unwrap_err();
    assert_eq!(
        refused(&ours, Kind::Chunk, &[0; 32]),
        Damage::Seal,
        "another name"
    );
    assert_eq!(refused(&ours, Kind::Page, &hash), Damage::Kind, "another folder");
    assert_eq!(
        refused(&sealer(Some(2)), Kind::Chunk, &hash),
        Damage::Seal,
        "another key"
    );
    assert_eq!(
        refused(&sealer(None), Kind::Chunk, &hash),
        Damage::Kind,
        "a repository without a key"
    );
    let mut elsewhere = sealer(Some(1));
    elsewhere.repository = [8; 16];
    assert_eq!(
        refused(&elsewhere, Kind::Chunk, &hash),
        Damage::Seal,
        "another repository"
    );

    // A manifest has no hash for a name: its id is sealed with it.
    let manifest = ours.seal(Kind::Manifest, &[1; 16], b"one", 3);
    assert_eq!(ours.open(Kind::Manifest, &[1; 16], &manifest).unwrap(), b"one");
    assert_eq!(ours.open(Kind::Manifest, &[2; 16], &manifest), Err(Damage::Seal));

    let plain = sealer(None);
    let (hash, object) = chunk(&plain, b"content");
    assert_eq!(hash, *blake3::hash(b"content").as_bytes());
    assert_eq!(plain.open(Kind::Chunk, &[0; 32], &object), Err(Damage::Hash));
    assert_eq!(
        ours.open(Kind::Chunk, &hash, &object),
        Err(Damage::Kind),
        "downgraded"
    );
}

#[test]
fn lengths_are_held_against_limits_before_anything_is_allocated() {
    let sealer = sealer(None);
    let (hash, mut object) = chunk(&sealer, &[5; 5000]);
    object[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
    assert!(matches!(
        sealer.open(Kind::Chunk, &hash, &object),
        Err(Damage::TooLong { .. })
    ));
    // A bomb: a megabyte of zeros that says it is small.
    let (hash, mut object) = chunk(&sealer, &[0; 1 << 20]);
    object[8..12].copy_from_slice(&10_u32.to_le_bytes());
    assert_eq!(sealer.open(Kind::Chunk, &hash, &object), Err(Damage::Compression));
    let long = vec![0; object_bytes_max(Kind::Chunk) as usize + 1];
    assert!(sealer.open(Kind::Chunk, &hash, &long).is_err());
}

#[test]
fn a_newer_version_is_refused_by_name() {
    let sealer = sealer(None);
    let (hash, mut object) = chunk(&sealer, b"content");
    object[4] = 2;
    let damage = sealer.open(Kind::Chunk, &hash, &object).unwrap_err();
    assert_eq!(damage, Damage::Version(2));
    assert!(damage.to_string().contains("version 2"));
}

#[test]
fn content_that_does_not_shrink_is_stored_as_it_is() {
    let noise: Vec<u8> = (0..9_000_u32)
        .flat_map(|at| *blake3::hash(&at.to_le_bytes()).as_bytes())
        .collect();
    let sealer = sealer(None);
    let (_, object) = chunk(&sealer, &noise);
    assert_eq!(object.len(), noise.len() + HEADER_BYTES);
    assert_eq!(object[6], 0);
    let (_, object) = chunk(&sealer, &b"text ".repeat(1000));
    assert!(object.len() < 100 && object[6] == 1);
}
