use proptest::prelude::*;

use super::*;

/// One writable export with 512-byte sectors, one read-only with 4096.
struct Two;

impl Catalog for Two {
    type Handle = ();

    fn names(&self) -> Vec<String> {
        vec!["large".to_owned(), "small".to_owned()]
    }

    fn find(&self, name: &str) -> Option<((), ExportInfo)> {
        let is_large = name == "large";
        let info = ExportInfo {
            bytes: 1 << 40,
            sector_bytes: if is_large { 4096 } else { 512 },
            is_read_only: is_large,
            description: "told".to_owned(),
        };
        self.names()
            .iter()
            .any(|other| other == name)
            .then_some(((), info))
    }
}

const BOTH: u32 = client_flag::FIXED_NEWSTYLE | client_flag::NO_ZEROES;

fn begin() -> Negotiation {
    Negotiation::new(BOTH).unwrap()
}

/// Types and bodies of the replies to one option, and what comes next.
fn ask(negotiation: &mut Negotiation, option: u32, data: &[u8]) -> (Vec<(u32, Vec<u8>)>, Next<()>) {
    let mut out = Vec::new();
    let next = negotiation.option(&Two, option, data, &mut out).unwrap();
    let mut cursor = Cursor(&out);
    let mut replies = Vec::new();
    while !cursor.0.is_empty() {
        assert_eq!(cursor.u64(), Some(OPTION_REPLY_MAGIC));
        assert_eq!(cursor.u32(), Some(option));
        let kind = cursor.u32().unwrap();
        let length = cursor.u32().unwrap() as usize;
        replies.push((kind, cursor.bytes(length).unwrap().to_vec()));
    }
    (replies, next)
}

/// Type of the one reply.
fn answer(negotiation: &mut Negotiation, option: u32, data: &[u8]) -> u32 {
    let (replies, next) = ask(negotiation, option, data);
    assert!(matches!(next, Next::Continue), "option {option}: {next:?}");
    assert_eq!(replies.len(), 1, "option {option}: {replies:?}");
    replies[0].0
}

fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes()[..], text.as_bytes()].concat()
}

fn go(name: &str, wanted: &[u16]) -> Vec<u8> {
    let wanted: Vec<u8> = [wanted.len() as u16]
        .iter()
        .chain(wanted)
        .flat_map(|number| number.to_be_bytes())
        .collect();
    [string(name), wanted].concat()
}

fn meta(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = string(name);
    data.extend_from_slice(&(queries.len() as u32).to_be_bytes());
    data.extend(queries.iter().flat_map(|query| string(query)));
    data
}

#[test]
fn options_that_are_not_spoken_are_refused_and_haggling_goes_on() {
    use option_reply::{ERR_INVALID, ERR_UNKNOWN, ERR_UNSUP};
    let cases = [
        (option::STARTTLS, vec![], ERR_UNSUP),
        (option::EXTENDED_HEADERS, vec![], ERR_UNSUP),
        (4, vec![], ERR_UNSUP),
        (0xffff_ffff, vec![1, 2, 3], ERR_UNSUP),
        (option::LIST, vec![0], ERR_INVALID),
        (option::STRUCTURED_REPLY, vec![0], ERR_INVALID),
        (option::GO, vec![], ERR_INVALID),
        (option::GO, [go("small", &[]), vec![0]].concat(), ERR_INVALID),
        (option::GO, go("sm\0ll", &[]), ERR_INVALID),
        (option::GO, go(&"x".repeat(4097), &[]), ERR_INVALID),
        (option::GO, [string("small"), vec![0, 9]].concat(), ERR_INVALID),
        (option::GO, go("", &[]), ERR_UNKNOWN),
        (option::INFO, go("neither", &[]), ERR_UNKNOWN),
        (
            option::SET_META_CONTEXT,
            meta("small", &["base:allocation"]),
            ERR_INVALID,
        ),
    ];
    let mut negotiation = begin();
    for (option, data, expected) in cases {
        assert_eq!(
            answer(&mut negotiation, option, &data),
            expected,
            "option {option} with {data:?}"
        );
    }
    let (_, next) = ask(&mut negotiation, option::GO, &go("small", &[]));
    assert!(matches!(next, Next::Transmit(..)));
}

#[test]
fn go_describes_the_export() {
    let mut negotiation = begin();
    let all = [info::NAME, info::DESCRIPTION, info::BLOCK_SIZE, 99];
    let (replies, next) = ask(&mut negotiation, option::GO, &go("large", &all));
    let flags = (1_u16 | 2 | 4 | 8 | 1 << 8).to_be_bytes();
    let sizes = [4096_u32, 4096, 32 << 20].map(u32::to_be_bytes).concat();
    let expected = [
        (
            option_reply::INFO,
            [&[0, 0][..], &(1_u64 << 40).to_be_bytes(), &flags].concat(),
        ),
        (option_reply::INFO, [&[0, 1][..], b"large"].concat()),
        (option_reply::INFO, [&[0, 2][..], b"told"].concat()),
        (option_reply::INFO, [vec![0, 3], sizes].concat()),
        (option_reply::ACK, vec![]),
    ];
    assert_eq!(replies, expected);
    let Next::Transmit((), session) = next else {
        panic!("{next:?}")
    };
    assert!(!session.is_structured && !session.has_allocation);
}

#[test]
fn a_client_that_does_not_ask_for_block_sizes_is_told_to() {
    for option in [option::INFO, option::GO] {
        let (replies, next) = ask(&mut begin(), option, &go("large", &[]));
        assert!(matches!(next, Next::Continue));
        assert_eq!(replies[1].1[..2], [0, 3], "the sizes go along with the refusal");
        assert_eq!(replies.last().unwrap().0, option_reply::ERR_BLOCK_SIZE_REQD);
    }
}

#[test]
fn export_name_ends_haggling_one_way_or_the_other() {
    for (flags, length) in [(BOTH, 10), (client_flag::FIXED_NEWSTYLE, 134), (0, 134)] {
        let mut out = Vec::new();
        let mut negotiation = Negotiation::new(flags).unwrap();
        let next = negotiation
            .option(&Two, option::EXPORT_NAME, b"small", &mut out)
            .unwrap();
        assert!(matches!(next, Next::Transmit(..)));
        assert_eq!(out.len(), length);
    }
    for name in [&b"neither"[..], b"", b"\xff", b"sm\0ll"] {
        let error = begin()
            .option(&Two, option::EXPORT_NAME, name, &mut Vec::new())
            .unwrap_err();
        assert_eq!(error, Violation::NoSuchExport);
    }
}

#[test]
fn what_breaks_a_must_ends_the_connection() {
    assert_eq!(Negotiation::new(4).unwrap_err(), Violation::ClientFlags(4));
    let error = Negotiation::new(0)
        .unwrap()
        .option(&Two, option::LIST, &[], &mut Vec::new())
        .unwrap_err();
    assert_eq!(error, Violation::NotFixed(option::LIST));
    assert!(matches!(
        OptionHeader::parse(&[0; 16]),
        Err(Violation::OptionMagic(0))
    ));
    let mut header = [0xff; 16];
    header[..8].copy_from_slice(&OPTION_MAGIC.to_be_bytes());
    assert!(matches!(
        OptionHeader::parse(&header),
        Err(Violation::OptionLength { length: u32::MAX, .. })
    ));
}

#[test]
fn a_context_holds_for_the_export_it_was_selected_for() {
    let select = |name: &str, queries: &[&str], then: &str| {
        let mut negotiation = begin();
        ask(&mut negotiation, option::STRUCTURED_REPLY, &[]);
        let (replies, _) = ask(&mut negotiation, option::SET_META_CONTEXT, &meta(name, queries));
        let (_, next) = ask(&mut negotiation, option::GO, &go(then, &[info::BLOCK_SIZE]));
        let Next::Transmit((), session) = next else {
            panic!("{next:?}")
        };
        assert!(session.is_structured);
        (replies.len(), session.has_allocation)
    };
    assert_eq!(select("small", &["base:allocation"], "small"), (2, true));
    assert_eq!(
        select("small", &["x-other:y", "base:allocation"], "small"),
        (2, true)
    );
    assert_eq!(select("small", &["base:allocation"], "large"), (2, false));
    assert_eq!(
        select("small", &["base:"], "small"),
        (1, false),
        "a wildcard is for listing"
    );
    assert_eq!(select("small", &[], "small"), (1, false));
    assert_eq!(select("neither", &["base:allocation"], "small"), (1, false));

    let mut negotiation = begin();
    ask(&mut negotiation, option::STRUCTURED_REPLY, &[]);
    for (queries, count) in [(&[][..], 2), (&["base:"], 2), (&["qemu:"], 1)] {
        let (replies, _) = ask(
            &mut negotiation,
            option::LIST_META_CONTEXT,
            &meta("small", queries),
        );
        assert_eq!(replies.len(), count, "{queries:?}");
    }
}

#[test]
fn abort_is_acknowledged() {
    let (replies, next) = ask(&mut begin(), option::ABORT, &[]);
    assert_eq!(replies, [(option_reply::ACK, vec![])]);
    assert!(matches!(next, Next::Close));
}

proptest! {
    #[test]
    fn any_options_leave_a_bounded_answer(
        flags in 0_u32..4,
        options in proptest::collection::vec(
            (0_u32..13, prop_oneof![
                proptest::collection::vec(any::<u8>(), 0..64),
                proptest::collection::vec("(base:)?(allocation)?", 0..4).prop_map(|queries| {
                    meta("small", &queries.iter().map(String::as_str).collect::<Vec<_>>())
                }),
                proptest::collection::vec(0_u16..5, 0..5).prop_map(|wanted| go("small", &wanted)),
            ]),
            0..8,
        ),
    ) {
        let mut negotiation = Negotiation::new(flags).unwrap();
        for (option, data) in options {
            let mut out = Vec::new();
            match negotiation.option(&Two, option, &data, &mut out) {
                Ok(Next::Continue) => prop_assert!(!out.is_empty(), "option {} is not answered", option),
                Ok(_) | Err(_) => break,
            }
            prop_assert!(out.len() < 1024);
        }
    }
}
