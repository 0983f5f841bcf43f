use super::*;
use proptest::prelude::*;

const MIB: u64 = 1 << 20;

fn extent(offset: u64, bytes: u64, what: What) -> Extent {
    Extent { offset, bytes, what }
}

fn chunk(number: u8) -> ObjectRef {
    ObjectRef::first([number; 32])
}

fn touched(data: &[usize], zeros: &[usize]) -> Touched {
    let set = |blocks: &[usize]| {
        let mut set = BlockSet::default();
        blocks.iter().for_each(|block| set.insert(*block));
        set
    };
    Touched {
        data: set(data),
        zeros: set(zeros),
    }
}

#[test]
fn extents_touch_the_blocks_they_reach_into() {
    let extents = [
        extent(4095, 2, What::Data),
        extent(8192, 8192, What::Zeros),
        extent(16384, 100, What::Zeros),
        extent(MIB - 4096, 8192, What::Data),
    ];
    let of = touch(2 * MIB, 0, &extents);
    assert_eq!(of, [touched(&[0, 1, 4, 255], &[2, 3]), touched(&[0], &[])]);
    // The end of the disk is the end of its last block.
    assert_eq!(
        touch(4096 + 100, 0, &[extent(4096, 100, What::Zeros)]),
        [touched(&[], &[1])]
    );
    assert_eq!(
        touch(4096 + 100, 0, &[extent(4096, 99, What::Zeros)]),
        [touched(&[1], &[])]
    );
}

#[test]
fn each_chunk_gets_what_it_needs() {
    let whole = MIB as usize;
    let all = BlockSet::all(whole);
    let nothing = Touched::default();
    let some = touched(&[1, 2], &[7]);
    let zeros = Touched {
        data: BlockSet::default(),
        zeros: all,
    };
    let of_parent = Before::Parent(Entry::Chunk(chunk(1)));
    assert_eq!(decide(nothing, Before::Zeros, whole), Action::Zeros);
    assert_eq!(decide(some, Before::Zeros, whole), Action::Read(some.data));
    assert_eq!(
        decide(nothing, of_parent, whole),
        Action::Keep(Entry::Chunk(chunk(1)))
    );
    assert_eq!(
        decide(nothing, Before::Parent(Entry::Zeros), whole),
        Action::Zeros
    );
    assert_eq!(
        decide(some, Before::Parent(Entry::Zeros), whole),
        Action::Read(some.data)
    );
    assert_eq!(decide(nothing, Before::Unknown, whole), Action::Read(all));
    assert_eq!(
        decide(some, Before::Unknown, whole),
        Action::Read(all.without(&some.zeros))
    );
    for before in [of_parent, Before::Unknown, Before::Zeros] {
        assert_eq!(decide(zeros, before, whole), Action::Zeros);
    }
    let patched = Before::Parent(Entry::Patched {
        base: chunk(1),
        patch: chunk(2),
    });
    let patch = |patch| Action::Patch {
        base: chunk(1),
        patch,
        touched: some,
    };
    assert_eq!(decide(some, of_parent, whole), patch(None));
    assert_eq!(decide(some, patched, whole), patch(Some(chunk(2))));
    let much = touched(&(0..=patch::BLOCKS_MAX).collect::<Vec<_>>(), &[]);
    assert_eq!(decide(much, of_parent, whole), Action::Read(all));
}

#[test]
fn a_parent_is_relied_on_where_it_can_be() {
    let entry = Entry::Patched {
        base: chunk(1),
        patch: chunk(2),
    };
    let none = Suspects::default();
    let of = |entry, suspects: &Suspects, parent, disk, number| before(entry, suspects, parent, disk, number);
    assert_eq!(of(Some(entry), &none, 2 * MIB, 2 * MIB, 1), Before::Parent(entry));
    assert_eq!(of(None, &none, 2 * MIB, 3 * MIB, 2), Before::Zeros, "grown");
    assert_eq!(
        of(Some(entry), &none, 2 * MIB - 512, 3 * MIB, 1),
        Before::Unknown,
        "grown within the chunk"
    );
    assert_eq!(
        of(Some(entry), &none, 3 * MIB, 2 * MIB - 512, 1),
        Before::Unknown,
        "shrunk within the chunk"
    );
    for object in entry.objects() {
        let mut suspects = Suspects::default();
        suspects.add(&[object]);
        assert_eq!(
            of(Some(entry), &suspects, 2 * MIB, 2 * MIB, 1),
            Before::Unknown,
            "{object} is condemned"
        );
    }
}

#[test]
fn pages_stay_the_same_where_neither_disk_ends() {
    const GIB: u64 = 1 << 30;
    assert!(is_same_page(GIB, GIB, 0));
    assert!(is_same_page(GIB, 2 * GIB, 0));
    assert!(is_same_page(GIB + 1, GIB + 1, 1));
    assert!(!is_same_page(GIB + 1, GIB + 2, 1));
    assert!(!is_same_page(GIB - 1, GIB, 0));
    assert!(!is_same_page(GIB, 2 * GIB, 1));
}

proptest! {
    #[test]
    fn any_extents_are_taken(
        disk in 1..3 * PAGE_BYTES,
        page in 0_u64..3,
        extents in prop::collection::vec((any::<u64>(), 0..2 * MIB, any::<bool>()), 0..8),
    ) {
        prop_assume!(page * PAGE_BYTES < disk);
        let extents: Vec<Extent> = extents
            .into_iter()
            .map(|(offset, bytes, is_data)| extent(offset % (4 * PAGE_BYTES), bytes, if is_data { What::Data } else { What::Zeros }))
            .collect();
        let touched = touch(disk, page, &extents);
        for (at, of) in touched.iter().enumerate() {
            let bytes = chunk_bytes(disk, page * crate::PAGE_CHUNKS as u64 + at as u64);
            let outside = of.data.union(&of.zeros).without(&BlockSet::all(bytes));
            prop_assert!(outside.is_empty(), "blocks behind the end of the disk");
        }
    }
}
