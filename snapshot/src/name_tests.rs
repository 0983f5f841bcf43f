use proptest::prelude::*;

use super::*;

fn parse(text: &str) -> Result<Reference, ParseReferenceError> {
    text.parse()
}

#[test]
fn references_are_taken_apart_at_the_first_at() {
    for (text, vdi, point) in [
        ("web01", "web01", "head"),
        ("web01@before-upgrade", "web01", "before-upgrade"),
        ("0@0", "0", "0"),
        ("a.b_c-d@1.2_3-4", "a.b_c-d", "1.2_3-4"),
        // A snapshot may be called `time`: the colon makes the time.
        ("web01@time", "web01", "time"),
    ] {
        let read = parse(text).unwrap();
        assert_eq!(read.vdi.as_str(), vdi, "{text}");
        match &read.point {
            Point::Head => assert_eq!(point, "head"),
            Point::Snapshot(name) => assert_eq!(name.as_str(), point),
            Point::Time(_) => panic!("{text} is no time"),
        }
        assert_eq!(read.to_string(), text);
    }
}

#[test]
fn times_have_an_offset_and_are_shown_in_utc() {
    for (text, shown) in [
        ("2026-11-21T10:15:00Z", "2026-11-21T10:15:00Z"),
        ("2026-11-21T11:15:00+01:00", "2026-11-21T10:15:00Z"),
        ("2026-11-21T10:15:00.123456789Z", "2026-11-21T10:15:00.123456789Z"),
        ("2026-02-28T23:59:60Z", "2026-02-28T23:59:59Z"),
    ] {
        let read = parse(&format!("web01@time:{text}")).unwrap();
        assert_eq!(read.to_string(), format!("web01@time:{shown}"));
    }
    for text in [
        "",
        "now",
        "2026-11-21",
        "2026-11-21T10:15:00",
        "2026-11-21T10:15:00 Z",
        "2026-11-21 10:15:00Z",
        "2026-13-21T10:15:00Z",
        "2026-02-30T10:15:00Z",
        "2026-11-21T24:15:00Z",
        "2026-11-21T10:15:00+01:00[Europe/Berlin]",
        "1732184100",
        "-002026-11-21T10:15:00Z",
        "999999-11-21T10:15:00Z",
        "2026-11-21T10:15:00Z@2026-11-21T10:15:00Z",
        "2026-11-21T10:15:00.0000000000000000000000000000000000000000000Z",
    ] {
        let refused = parse(&format!("web01@time:{text}"));
        assert_eq!(
            refused,
            Err(ParseReferenceError::Time {
                shown: text.to_owned()
            })
        );
    }
}

#[test]
fn a_refusal_names_the_character() {
    let longest = "x".repeat(NAME_BYTES_MAX);
    assert!(parse(&longest).is_ok());
    for (text, message) in [
        ("", "'' is not the name of a VDI: it is empty"),
        ("web01@", "'' is not the name of a snapshot: it is empty"),
        ("@a", "'' is not the name of a VDI: it is empty"),
        ("Web01", "'Web01' is not the name of a VDI: character 1 is 'W'"),
        (
            "web 01",
            "'web 01' is not the name of a VDI: character 4 is a space",
        ),
        (
            "web01/a@b",
            "'web01/a' is not the name of a VDI: character 6 is '/'",
        ),
        (
            "web01@a/b",
            "'a/b' is not the name of a snapshot: character 2 is '/'",
        ),
        (
            "web01@a@b",
            "'a@b' is not the name of a snapshot: character 2 is '@'",
        ),
        (
            "web01@times:1",
            "'times:1' is not the name of a snapshot: character 6 is ':'",
        ),
        ("-a", "'-a' is not the name of a VDI: it begins with '-'"),
        ("..", "'..' is not the name of a VDI: it begins with '.'"),
        (
            "bücher",
            "'bücher' is not the name of a VDI: character 2 is 'ü' (U+00FC)",
        ),
        // A Cyrillic letter that looks like a Latin one.
        (
            "w\u{435}b01",
            "'wеb01' is not the name of a VDI: character 2 is 'е' (U+0435)",
        ),
        (
            "web\u{202e}01",
            "'web01' is not the name of a VDI: character 4 is U+202E",
        ),
        (
            "web\u{200b}",
            "'web' is not the name of a VDI: character 4 is U+200B",
        ),
        ("a\nb", "'ab' is not the name of a VDI: character 2 is U+000A"),
        (
            "a\u{a0}b",
            "'a\u{a0}b' is not the name of a VDI: character 2 is U+00A0",
        ),
        (
            "o'neill",
            "'o'neill' is not the name of a VDI: character 2 is an apostrophe",
        ),
    ] {
        let refused = parse(text).unwrap_err();
        assert_eq!(refused.to_string(), message);
        assert!(!refused.way_out().is_empty());
    }
    let refused = parse(&format!("{longest}x")).unwrap_err();
    assert!(
        refused.to_string().ends_with("it has 64 bytes, 63 are the most"),
        "{refused}"
    );
}

#[test]
fn who_asks_for_one_kind_gets_no_other() {
    assert!(parse("web01").unwrap().whole().is_ok());
    assert!(parse("web01").unwrap().snapshot().is_err());
    assert!(parse("web01@a").unwrap().snapshot().is_ok());
    let refused = parse("web01@a").unwrap().whole().unwrap_err();
    assert_eq!(
        refused.to_string(),
        "'web01@a' names a state of a VDI where a VDI is asked for"
    );
    assert!(
        parse("web01@time:2026-11-21T10:15:00Z")
            .unwrap()
            .snapshot()
            .is_err()
    );
}

proptest! {
    #[test]
    fn what_is_read_is_shown_as_it_is_read_again(text in "[a-c@:T0-9Z.+-]{0,40}|\\PC{0,80}") {
        match parse(&text) {
            Ok(read) => prop_assert_eq!(parse(&read.to_string()), Ok(read)),
            Err(error) => {
                let message = error.to_string();
                prop_assert!(!message.chars().any(is_hidden) && message.len() < 600);
            }
        }
    }
}
