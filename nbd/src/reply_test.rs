use proptest::prelude::*;

use super::*;
use crate::proto::Cursor;

const STRUCTURED: Encoder = Encoder {
    cookie: 0x0102_0304_0506_0708,
    is_structured: true,
};
const SIMPLE: Encoder = Encoder {
    is_structured: false,
    ..STRUCTURED
};

fn bytes_of(reply: &Reply<Vec<u8>>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for piece in reply {
        match piece {
            Piece::Head(head) => bytes.extend_from_slice(head),
            Piece::Data(data) => bytes.extend_from_slice(data),
            Piece::Zeros(count) => bytes.resize(bytes.len() + *count as usize, 0),
        }
    }
    bytes
}

/// Flags, type and payload of each chunk.
fn chunks(bytes: &[u8]) -> Vec<(u16, u16, Vec<u8>)> {
    let mut cursor = Cursor(bytes);
    let mut chunks = Vec::new();
    while !cursor.0.is_empty() {
        assert_eq!(cursor.u32(), Some(STRUCTURED_REPLY_MAGIC));
        let (flags, kind) = (cursor.u16().unwrap(), cursor.u16().unwrap());
        assert_eq!(cursor.u64(), Some(STRUCTURED.cookie));
        let length = cursor.u32().unwrap() as usize;
        chunks.push((flags, kind, cursor.bytes(length).unwrap().to_vec()));
    }
    chunks
}

/// What a client puts together from a read's chunks, with the number of content chunks.
fn reassemble(bytes: &[u8], offset: u64, length: u32) -> (Vec<u8>, usize) {
    let mut content = vec![0xEE; length as usize];
    let chunks = chunks(bytes);
    for (index, (flags, kind, payload)) in chunks.iter().enumerate() {
        assert_eq!(
            *flags == chunk::FLAG_DONE,
            index + 1 == chunks.len(),
            "only the last is done"
        );
        let mut cursor = Cursor(payload);
        let at = (cursor.u64().unwrap() - offset) as usize;
        match *kind {
            chunk::OFFSET_DATA => content[at..at + cursor.0.len()].copy_from_slice(cursor.0),
            chunk::OFFSET_HOLE => content[at..at + cursor.u32().unwrap() as usize].fill(0),
            other => panic!("chunk of type {other} in a read's reply"),
        }
    }
    (content, chunks.len())
}

fn part() -> impl Strategy<Value = Part<Vec<u8>>> {
    prop_oneof![
        proptest::collection::vec(1_u8..255, 0..300).prop_map(Part::Data),
        (0_u64..300).prop_map(Part::Zeros),
    ]
}

proptest! {
    #[test]
    fn a_read_arrives_as_it_was(parts in proptest::collection::vec(part(), 1..20), is_whole in any::<bool>()) {
        let mut expected = Vec::new();
        for part in &parts {
            match part {
                Part::Data(data) => expected.extend_from_slice(data),
                Part::Zeros(count) => expected.resize(expected.len() + *count as usize, 0),
            }
        }
        prop_assume!(!expected.is_empty());
        let length = expected.len() as u32;
        let offset = 5 << 40;

        let simple = bytes_of(&SIMPLE.read(offset, length, false, parts.clone()));
        prop_assert_eq!(&simple[..8], [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0]);
        prop_assert_eq!(&simple[16..], &expected[..]);

        let structured = bytes_of(&STRUCTURED.read(offset, length, is_whole, parts));
        let (content, count) = reassemble(&structured, offset, length);
        prop_assert_eq!(content, expected);
        prop_assert!(!is_whole || count == 1, "DF, and {} chunks", count);
    }

    #[test]
    fn block_status_never_says_more_than_was_asked(
        length in 1_u32..1 << 31,
        extents in proptest::collection::vec((0_u64..1 << 33, any::<bool>()), 0..40),
        is_one in any::<bool>(),
    ) {
        let extents: Vec<_> = extents.into_iter().map(|(length, is_data)| Extent { length, is_data }).collect();
        let known: u64 = extents.iter().map(|extent| extent.length).sum();
        let bytes = bytes_of(&STRUCTURED.block_status(length, is_one, &extents));
        let chunks = chunks(&bytes);
        prop_assert_eq!(chunks.len(), 1);
        let (flags, kind, payload) = &chunks[0];
        prop_assert_eq!(*flags, chunk::FLAG_DONE);
        if known == 0 {
            prop_assert_eq!(*kind, chunk::ERROR);
            return Ok(());
        }
        let mut cursor = Cursor(payload);
        prop_assert_eq!(cursor.u32(), Some(BASE_ALLOCATION_ID));
        let (mut sum, mut last) = (0_u64, None);
        while let Some(run) = cursor.u32() {
            let flags = cursor.u32();
            prop_assert!(run > 0 && flags != last, "an empty extent, or one that should have been merged");
            sum += u64::from(run);
            last = flags;
        }
        prop_assert!(sum <= u64::from(length));
        if is_one {
            prop_assert_eq!(payload.len(), 12);
        } else {
            prop_assert_eq!(sum, known.min(length.into()));
        }
    }

    #[test]
    fn an_error_carries_number_and_text(errno in 1_u32.., text in "\\PC{0,400}") {
        let chunks = chunks(&bytes_of(&STRUCTURED.error(errno, &text)));
        let (flags, kind, payload) = &chunks[0];
        prop_assert_eq!((*flags, *kind), (chunk::FLAG_DONE, chunk::ERROR));
        let mut cursor = Cursor(payload);
        prop_assert_eq!(cursor.u32(), Some(errno));
        prop_assert_eq!(usize::from(cursor.u16().unwrap()), cursor.0.len());
        prop_assert!(text.starts_with(std::str::from_utf8(cursor.0).unwrap()));
        prop_assert!(cursor.0.len() > MESSAGE_BYTES_MAX - 4 || cursor.0.len() == text.len());
    }
}

#[test]
fn a_short_read_is_an_error() {
    let reply = STRUCTURED.read(0, 4096, false, vec![Part::Data(vec![1; 512]), Part::Zeros(512)]);
    let chunks = chunks(&bytes_of(&reply));
    assert_eq!(chunks[0].1, chunk::ERROR);
    assert_eq!(chunks[0].2[..4], errno::EIO.to_be_bytes());
    assert!(String::from_utf8_lossy(&chunks[0].2).contains("1024 of 4096"));
}

#[test]
fn block_status_is_bounded() {
    let extents: Vec<_> = (0..20_000)
        .map(|index| Extent {
            length: 512,
            is_data: index % 2 == 0,
        })
        .collect();
    let bytes = bytes_of(&STRUCTURED.block_status(u32::MAX, false, &extents));
    assert_eq!(bytes.len(), 20 + 4 + 8 * EXTENTS_MAX);
}
