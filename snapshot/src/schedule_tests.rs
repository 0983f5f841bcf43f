use jiff::SignedDuration;
use proptest::prelude::*;

use super::*;

/// Berlin's rules of today, without a look at any file.
fn berlin() -> TimeZone {
    TimeZone::posix("CET-1CEST,M3.5.0,M10.5.0/3").unwrap()
}

fn at(time: &str) -> Timestamp {
    time.parse().unwrap()
}

fn schedule(text: &str) -> Schedule {
    text.parse().unwrap()
}

/// The times after one, as Berlin's clocks show them.
fn after(text: &str, start: &str, count: usize) -> Vec<String> {
    let (schedule, mut at, zone) = (schedule(text), at(start), berlin());
    let next = || {
        at = schedule.next_after(at, &zone)?;
        Some(at.to_zoned(zone.clone()).strftime("%d %H:%M%:z").to_string())
    };
    std::iter::from_fn(next).take(count).collect()
}

#[test]
fn the_next_times() {
    for (text, start, times) in [
        (
            "0 * * * *",
            "2026-11-21T10:15:00Z",
            ["21 12:00+01:00", "21 13:00+01:00"],
        ),
        (
            "*/15 8-18 * * *",
            "2026-11-21T17:40:00Z",
            ["21 18:45+01:00", "22 08:00+01:00"],
        ),
        (
            "30 2 * * mon-fri",
            "2026-11-20T10:00:00Z",
            ["23 02:30+01:00", "24 02:30+01:00"],
        ),
        (
            "0 3 29 2 *",
            "2027-01-01T00:00:00Z",
            ["29 03:00+01:00", "29 03:00+01:00"],
        ),
        // 2048 and 2076: 29 February on a Saturday.
        (
            "0 0 29 feb */6",
            "2048-01-01T00:00:00Z",
            ["29 00:00+01:00", "29 00:00+01:00"],
        ),
        // The 13th and each Friday, as every cron has it.
        (
            "0 0 13 * fri",
            "2026-11-10T00:00:00Z",
            ["13 00:00+01:00", "20 00:00+01:00"],
        ),
        (
            "10-50/20 1 * * 7",
            "2026-11-20T00:00:00Z",
            ["22 01:10+01:00", "22 01:30+01:00"],
        ),
        (
            "50/5 1 * * *",
            "2026-11-20T00:00:00Z",
            ["20 01:50+01:00", "20 01:55+01:00"],
        ),
        (
            "@daily",
            "2026-11-21T10:15:00Z",
            ["22 00:00+01:00", "23 00:00+01:00"],
        ),
        // Not after itself, but after the second before.
        (
            "0 12 * * *",
            "2026-11-21T11:00:00Z",
            ["22 12:00+01:00", "23 12:00+01:00"],
        ),
        (
            "0 12 * * *",
            "2026-11-21T10:59:59.5Z",
            ["21 12:00+01:00", "22 12:00+01:00"],
        ),
    ] {
        assert_eq!(after(text, start, 2), times, "{text} after {start}");
    }
}

#[test]
fn where_clocks_change() {
    // Berlin leaves out 02:00 to 03:00 on 2026-03-29, and has it twice on 2026-10-25.
    for (text, start, times) in [
        (
            "30 2 * * *",
            "2026-03-28T12:00:00Z",
            &["29 03:00+02:00", "30 02:30+02:00"] as &[&str],
        ),
        (
            "30 * * * *",
            "2026-03-29T00:00:00Z",
            &["29 01:30+01:00", "29 03:30+02:00"],
        ),
        // Two that are left out are one moment; and so is the one that would have been there anyway.
        (
            "*/30 2-3 * * *",
            "2026-03-28T23:00:00Z",
            &["29 03:00+02:00", "29 03:30+02:00", "30 02:00+02:00"],
        ),
        (
            "30 2 * * *",
            "2026-10-24T12:00:00Z",
            &["25 02:30+02:00", "26 02:30+01:00"],
        ),
        (
            "0 */2 * * *",
            "2026-10-24T23:00:00Z",
            &["25 02:00+02:00", "25 02:00+01:00", "25 04:00+01:00"],
        ),
        (
            "30 * * * *",
            "2026-10-25T00:00:00Z",
            &["25 02:30+02:00", "25 02:30+01:00", "25 03:30+01:00"],
        ),
        (
            "30 */2 * * *",
            "2026-03-28T22:00:00Z",
            &["29 00:30+01:00", "29 04:30+02:00"],
        ),
        (
            "*/30 * * * *",
            "2026-10-25T00:00:00Z",
            &[
                "25 02:30+02:00",
                "25 02:00+01:00",
                "25 02:30+01:00",
                "25 03:00+01:00",
            ],
        ),
    ] {
        assert_eq!(after(text, start, times.len()), times, "{text} after {start}");
    }
}

#[test]
fn what_was_missed_is_caught_up_on_once() {
    let (hourly, zone) = (schedule("0 * * * *"), berlin());
    let due = |done, now| hourly.due(at(done), at(now), &zone).map(|time| time.to_string());
    assert_eq!(due("2026-11-21T10:00:00Z", "2026-11-21T10:59:59Z"), None);
    assert_eq!(
        due("2026-11-21T10:00:00Z", "2026-11-21T11:00:00Z").as_deref(),
        Some("2026-11-21T11:00:00Z")
    );
    // The host was off for a week: one, and the next is in its turn.
    assert_eq!(
        due("2026-11-14T10:00:00Z", "2026-11-21T11:20:00Z").as_deref(),
        Some("2026-11-21T11:00:00Z")
    );
    assert_eq!(due("2026-11-21T11:00:00Z", "2026-11-21T11:20:00Z"), None);
    // The clock went back.
    assert_eq!(due("2026-11-21T11:00:00Z", "2026-11-20T11:20:00Z"), None);
}

#[test]
fn what_is_no_schedule() {
    for (text, message) in [
        ("", "'' has 0 fields where a schedule has 5"),
        ("* * * *", "'* * * *' has 4 fields where a schedule has 5"),
        ("0 0 * * * *", "'0 0 * * * *' has 6 fields where a schedule has 5"),
        ("@reboot", "'@reboot' has 1 fields where a schedule has 5"),
        ("60 * * * *", "'60' is not a minute: use 0 to 59"),
        ("1,,2 * * * *", "'' is not a minute: use 0 to 59"),
        ("*/0 * * * *", "'*/0' is not a minute: use 0 to 59"),
        ("*/60 * * * *", "'*/60' is not a minute: use 0 to 59"),
        ("5-1 * * * *", "'5-1' is not a minute: use 0 to 59"),
        ("1-2-3 * * * *", "'1-2-3' is not a minute: use 0 to 59"),
        ("001 * * * *", "'001' is not a minute: use 0 to 59"),
        ("* 24 * * *", "'24' is not an hour: use 0 to 23"),
        ("* * 0 * *", "'0' is not a day of month: use 1 to 31"),
        ("* * 32 * *", "'32' is not a day of month: use 1 to 31"),
        ("* * * 13 *", "'13' is not a month: use 1 to 12"),
        ("* * * mon *", "'mon' is not a month: use 1 to 12"),
        ("* * * * 8", "'8' is not a day of week: use 0 to 7"),
        ("* * * * fri-tue", "'fri-tue' is not a day of week: use 0 to 7"),
        (
            "0 0 30 2 *",
            "'0 0 30 2 *' never comes: no month that it names has that day",
        ),
        (
            "0 0 31 4,6,9,11 *",
            "'0 0 31 4,6,9,11 *' never comes: no month that it names has that day",
        ),
    ] {
        assert_eq!(text.parse::<Schedule>().unwrap_err().to_string(), message);
    }
    for text in [
        "0 0 * * *\n",
        "0 0 * * \u{202e}*",
        "0 0 l * *#1",
        &"0,".repeat(100),
    ] {
        assert_eq!(text.parse::<Schedule>(), Err(ParseScheduleError::NotPlain));
    }
    assert_eq!(schedule("  0  3 * * MON ").to_string(), "0 3 * * mon");
    assert_eq!(schedule("@daily").to_string(), "@daily");
}

/// Fields as lists of numbers, and what they are as text.
fn field(low: u32, high: u32) -> impl Strategy<Value = Option<Vec<u32>>> {
    prop_oneof![
        Just(None),
        prop::collection::btree_set(low..=high, 1..4).prop_map(|set| Some(set.into_iter().collect())),
    ]
}

/// A field as people write them, sometimes wrong.
fn written() -> impl Strategy<Value = String> {
    "(\\*|[0-9]{1,2}|[0-9]-[0-9]{1,2}|mon|feb)(/[0-9])?(,[0-9]{1,2}){0,2}"
}

fn text_of(field: &Option<Vec<u32>>) -> String {
    match field {
        None => "*".to_owned(),
        Some(numbers) => numbers.iter().map(u32::to_string).collect::<Vec<_>>().join(","),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    /// In UTC, where no clock changes: against going through all minutes of a month.
    #[test]
    fn the_times_are_all_minutes_that_match(
        minute in field(0, 59), hour in field(0, 23), day in field(1, 28), weekday in field(0, 6),
        start in 0i64..400 * 86_400,
    ) {
        let text = format!("{} {} {} * {}", text_of(&minute), text_of(&hour), text_of(&day), text_of(&weekday));
        let schedule: Schedule = text.parse().unwrap();
        let zone = TimeZone::UTC;
        let start = at("2026-01-01T00:00:00Z") + SignedDuration::from_secs(start);
        let has = |field: &Option<Vec<u32>>, value: i8| {
            field.as_ref().is_none_or(|numbers| numbers.contains(&(value as u32)))
        };
        let matches = |time: Timestamp| {
            let zoned = time.to_zoned(zone.clone());
            let is_weekday = has(&weekday, zoned.weekday().to_sunday_zero_offset());
            // As every cron: where both days are said, either is enough.
            let is_day = if day.is_some() && weekday.is_some() {
                has(&day, zoned.day()) || is_weekday
            } else {
                has(&day, zoned.day()) && is_weekday
            };
            has(&minute, zoned.minute()) && has(&hour, zoned.hour()) && is_day
        };
        let minutes = 0..32 * 24 * 60i64;
        let first = start.as_second().div_euclid(60) + 1;
        let naive: Vec<Timestamp> = minutes
            .map(|minute| Timestamp::from_second((first + minute) * 60).unwrap())
            .filter(|time| matches(*time))
            .take(50)
            .collect();
        let mut found = start;
        for expected in naive {
            found = schedule.next_after(found, &zone).unwrap();
            prop_assert_eq!(found, expected, "{}", text);
            prop_assert_eq!(schedule.due(found - SignedDuration::from_secs(1), found, &zone), Some(found));
            prop_assert_eq!(schedule.due(found, found, &zone), None);
        }
    }

    #[test]
    fn whatever_is_written_is_refused_or_shown_as_it_is_read_again(
        text in prop_oneof![
            prop::collection::vec(written(), 5).prop_map(|fields| fields.join(" ")),
            "[0-9*/, a-z@-]{0,30}|\\PC{0,60}",
        ]
    ) {
        match text.parse::<Schedule>() {
            Ok(schedule) => prop_assert_eq!(schedule.to_string().parse(), Ok(schedule)),
            Err(error) => prop_assert!(error.to_string().len() < 400),
        }
    }
}
