use proptest::prelude::*;

use super::*;

fn blank() -> (Vec<u8>, Vec<u8>) {
    (vec![0; HEAD_BYTES], vec![0; TAIL_BYTES])
}

fn put(bytes: &mut [u8], offset: usize, what: &[u8]) {
    bytes[offset..offset + what.len()].copy_from_slice(what);
}

#[test]
fn blank_is_blank() {
    let (head, tail) = blank();
    assert!(find_signatures(&head, &tail).is_empty());
    assert!(find_signatures(&[], &[]).is_empty());
}

#[test]
fn every_magic_lies_in_what_is_looked_at_and_is_found() {
    for magic in HEAD_MAGICS {
        let (mut head, tail) = blank();
        put(&mut head, magic.offset, magic.bytes);
        assert_eq!(find_signatures(&head, &tail), [magic.name]);
    }
}

fn mbr_entry(status: u8, kind: u8, start: u32, sectors: u32) -> [u8; 16] {
    let mut entry = [0; 16];
    entry[0] = status;
    entry[4] = kind;
    entry[8..12].copy_from_slice(&start.to_le_bytes());
    entry[12..].copy_from_slice(&sectors.to_le_bytes());
    entry
}

#[test]
fn a_boot_sector_is_a_partition_table_only_with_entries_that_make_sense() {
    let cases: [(&[[u8; 16]], bool); 7] = [
        (&[], false),
        (&[mbr_entry(0x80, 0x83, 2048, 100)], true),
        (
            &[mbr_entry(0, 0x83, 2048, 100), mbr_entry(0, 0x82, 4096, 10)],
            true,
        ),
        (&[mbr_entry(0x17, 0x83, 2048, 100)], false),
        (&[mbr_entry(0, 0, 2048, 100)], false),
        (&[mbr_entry(0, 0x83, 0, 100)], false),
        (&[mbr_entry(0, 0x83, 2048, 0)], false),
    ];
    for (entries, expected) in cases {
        let (mut head, tail) = blank();
        put(&mut head, 510, &[0x55, 0xaa]);
        for (i, entry) in entries.iter().enumerate() {
            put(&mut head, 446 + 16 * i, entry);
        }
        assert_eq!(
            find_signatures(&head, &tail) == ["MBR partition table"],
            expected,
            "{entries:?}"
        );
    }
}

#[test]
fn what_hides_at_the_end_is_found() {
    for (back, bytes, name) in [
        (512, &b"EFI PART"[..], "GPT partition table (backup)"),
        (4096, b"EFI PART", "GPT partition table (backup)"),
        (8192, b"\xfc\x4e\x2b\xa9", "Linux RAID member"),
        (TAIL_BYTES, b"\xfc\x4e\x2b\xa9", "Linux RAID member"),
        (512, b"conectix", "VHD image"),
    ] {
        let (head, mut tail) = blank();
        put(&mut tail, TAIL_BYTES - back, bytes);
        assert_eq!(find_signatures(&head, &tail), [name]);
    }
}

#[test]
fn several_things_are_all_named() {
    let (mut head, mut tail) = blank();
    put(&mut head, 510, &[0x55, 0xaa]);
    put(&mut head, 446, &mbr_entry(0, 0xee, 1, u32::MAX));
    put(&mut head, 512, b"EFI PART");
    put(&mut tail, TAIL_BYTES - 512, b"EFI PART");
    assert_eq!(
        find_signatures(&head, &tail),
        [
            "GPT partition table",
            "MBR partition table",
            "GPT partition table (backup)"
        ]
    );
}

proptest! {
    #[test]
    fn never_panics(head in proptest::collection::vec(any::<u8>(), 0..3000), tail in proptest::collection::vec(any::<u8>(), 0..5000)) {
        let _ = find_signatures(&head, &tail);
    }
}
