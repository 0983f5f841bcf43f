//! When a snapshot is due: cron expressions of five fields in a time zone.
//!
//! ```text
//!  minute  hour  day of month  month  day of week
//!  0       *     *             *      *            at each full hour
//!  */15    8-18  *             *      *            each quarter of an hour, by day
//!  30      2     *             *      mon-fri      working days at 02:30
//! ```
//! A field is `*` or a list of numbers and ranges, each with a step if need be; months and days have names. Where both days
//! are said (neither begins with `*`) either is enough, as in every cron. `@hourly`, `@daily`, `@weekly`,
//! `@monthly`, `@yearly` are short for the usual ones.
//!
//! Where clocks change, as Vixie's cron does it: an expression that names its hours runs by the wall clock, once a
//! day; what falls into the hour that spring leaves out runs at the moment the clocks are put forward, what falls into the hour
//! that autumn has twice runs in the first. One whose hours begin with `*` follows the time that passes: it runs in both of
//! those, and in none that is not there.
//!
//! Crates for this were looked at (croner, cronexpr, jiff-cron): each brings five to nine others, and messages of its own.

use std::fmt;
use std::str::FromStr;

use jiff::Timestamp;
use jiff::civil::Date;
use jiff::tz::{AmbiguousOffset, TimeZone};
use serde::{Deserialize, Serialize};

/// Longest expression that is read.
const TEXT_BYTES_MAX: usize = 120;
/// The rarest day comes within 40 years: 29 February on one day of the week, around a century that has none.
const DAYS_SEARCHED: usize = 41 * 366;

const MONTHS: [&str; 12] = [
    "jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec",
];
const WEEKDAYS: [&str; 7] = ["sun", "mon", "tue", "wed", "thu", "fri", "sat"];
const SHORT: [(&str, &str); 7] = [
    ("@hourly", "0 * * * *"),
    ("@daily", "0 0 * * *"),
    ("@midnight", "0 0 * * *"),
    ("@weekly", "0 0 * * 0"),
    ("@monthly", "0 0 1 * *"),
    ("@yearly", "0 0 1 1 *"),
    ("@annually", "0 0 1 1 *"),
];

/// What one field may say.
struct Kind {
    name: &'static str,
    low: u8,
    high: u8,
    names: &'static [&'static str],
    /// Of the first name.
    first: u8,
}

#[rustfmt::skip]
const KINDS: [Kind; 5] = [
    Kind { name: "minute", low: 0, high: 59, names: &[], first: 0 },
    Kind { name: "hour", low: 0, high: 23, names: &[], first: 0 },
    Kind { name: "day of month", low: 1, high: 31, names: &[], first: 1 },
    Kind { name: "month", low: 1, high: 12, names: &MONTHS, first: 1 },
    // 7 is Sunday too.
    Kind { name: "day of week", low: 0, high: 7, names: &WEEKDAYS, first: 0 },
];

/// The numbers that a field says, one bit each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Field {
    numbers: u64,
    /// It began with `*`.
    is_any: bool,
}

impl Field {
    fn has(self, number: i8) -> bool {
        self.numbers >> number & 1 == 1
    }
}

/// A cron expression that has a next time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schedule {
    text: String,
    minute: Field,
    hour: Field,
    day: Field,
    month: Field,
    weekday: Field,
}

/// A text that is no schedule.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseScheduleError {
    /// Longer than anything sensible, or with characters that no expression has.
    #[error("a schedule is at most {TEXT_BYTES_MAX} letters, digits and '*', '/', ',', '-', '@' and spaces")]
    NotPlain,
    /// Not five fields.
    #[error("'{text}' has {fields} fields where a schedule has 5")]
    NotFive {
        /// As it was written.
        text: String,
        /// How many.
        fields: usize,
    },
    /// Something in a field that is no number, range, step or name of its kind, or out of range.
    #[error("'{part}' is not {}: use {low} to {high}", article(.field))]
    Field {
        /// Its kind.
        field: &'static str,
        /// The part of it that is wrong.
        part: String,
        /// The lowest number.
        low: u8,
        /// The highest number.
        high: u8,
    },
    /// It names a day that never comes.
    #[error("'{text}' never comes: no month that it names has that day")]
    Never {
        /// As it was written.
        text: String,
    },
}

fn article(field: &str) -> String {
    format!("{} {field}", if field == "hour" { "an" } else { "a" })
}

impl ParseScheduleError {
    /// What to write instead.
    #[must_use]
    pub fn way_out(&self) -> &'static str {
        "write minute, hour, day of month, month and day of week, for example '0 * * * *' for each hour or \
         '30 2 * * mon-fri'; or @hourly, @daily, @weekly, @monthly"
    }
}

impl FromStr for Schedule {
    type Err = ParseScheduleError;

    fn from_str(text: &str) -> Result<Schedule, ParseScheduleError> {
        let is_plain = |b: u8| b.is_ascii_alphanumeric() || b"*/,-@ ".contains(&b);
        if text.len() > TEXT_BYTES_MAX || !text.bytes().all(is_plain) {
            return Err(ParseScheduleError::NotPlain);
        }
        let words: Vec<&str> = text.split_ascii_whitespace().collect();
        let text = words.join(" ").to_ascii_lowercase();
        let long = SHORT.iter().find(|(short, _)| *short == text);
        let words: Vec<&str> = long.map_or(text.as_str(), |(_, long)| long).split(' ').collect();
        let [minute, hour, day, month, weekday] = words[..] else {
            let fields = words.iter().filter(|word| !word.is_empty()).count();
            return Err(ParseScheduleError::NotFive { text, fields });
        };
        let schedule = Schedule {
            minute: field(minute, &KINDS[0])?,
            hour: field(hour, &KINDS[1])?,
            day: field(day, &KINDS[2])?,
            month: field(month, &KINDS[3])?,
            weekday: field(weekday, &KINDS[4])?,
            text,
        };
        match schedule.next_after(Timestamp::UNIX_EPOCH, &TimeZone::UTC) {
            Some(_) => Ok(schedule),
            None => Err(ParseScheduleError::Never { text: schedule.text }),
        }
    }
}

/// Reads one field: parts with commas between.
fn field(text: &str, kind: &Kind) -> Result<Field, ParseScheduleError> {
    let mut numbers = 0;
    for part in text.split(',') {
        let bits = bits(part, kind);
        numbers |= bits.ok_or_else(|| ParseScheduleError::Field {
            field: kind.name,
            part: part.to_owned(),
            low: kind.low,
            high: kind.high,
        })?;
    }
    if kind.names.len() == WEEKDAYS.len() {
        numbers |= numbers >> 7 & 1;
    }
    Ok(Field {
        numbers,
        is_any: text.starts_with('*'),
    })
}

/// `*`, `3`, `3-9`, each with `/2` behind it (of a number alone that is up to the end); a name for a number.
fn bits(part: &str, kind: &Kind) -> Option<u64> {
    let (range, step) = match part.split_once('/') {
        Some((range, step)) => (range, Some(number(step, 1, kind.high)?)),
        None => (part, None),
    };
    let value = |text: &str| {
        let named = kind.names.iter().position(|name| *name == text);
        let named = named.map(|at| kind.first + at as u8);
        named.or_else(|| number(text, kind.low, kind.high))
    };
    let (low, high) = match range.split_once('-') {
        _ if range == "*" => (kind.low, kind.high),
        Some((low, high)) => (value(low)?, value(high)?),
        None if step.is_some() => (value(range)?, kind.high),
        None => (value(range)?, value(range)?),
    };
    let all = (low..=high).step_by(usize::from(step.unwrap_or(1)));
    (low <= high).then(|| all.fold(0, |bits, number| bits | 1 << number))
}

fn number(text: &str, low: u8, high: u8) -> Option<u8> {
    let is_short = (1..=2).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_digit());
    let number = is_short.then(|| text.parse().ok()).flatten()?;
    (low..=high).contains(&number).then_some(number)
}

impl Schedule {
    /// The first time after `after`; absent: there is none before the calendar ends.
    #[must_use]
    pub fn next_after(&self, after: Timestamp, zone: &TimeZone) -> Option<Timestamp> {
        // A day of the wall clock may reach back over midnight where clocks change there.
        let first = zone.to_datetime(after).date().yesterday().unwrap_or(Date::MIN);
        self.days_from(first, |date| date.tomorrow().ok())
            .find_map(|date| self.times_of(date, zone).filter(|time| *time > after).min())
    }

    /// The time for which a snapshot is due now, if one is: the last after `done` and not after `now`. Of all that
    /// were missed (the host was off) only the last is caught up on. A clock that went back makes nothing due
    /// until it has passed `done` again.
    #[must_use]
    pub fn due(&self, done: Timestamp, now: Timestamp, zone: &TimeZone) -> Option<Timestamp> {
        let last = zone.to_datetime(now).date().tomorrow().unwrap_or(Date::MAX);
        self.days_from(last, |date| date.yesterday().ok())
            .find_map(|date| self.times_of(date, zone).filter(|time| *time <= now).max())
            .filter(|time| *time > done)
    }

    /// The days that it names, from one on.
    fn days_from(&self, first: Date, next: fn(Date) -> Option<Date>) -> impl Iterator<Item = Date> {
        std::iter::successors(Some(first), move |date| next(*date))
            .take(DAYS_SEARCHED)
            .filter(|date| self.has_day(*date))
    }

    fn has_day(&self, date: Date) -> bool {
        let of_month = self.day.has(date.day());
        let of_week = self.weekday.has(date.weekday().to_sunday_zero_offset());
        let is_day = if self.day.is_any || self.weekday.is_any {
            of_month && of_week
        } else {
            of_month || of_week
        };
        is_day && self.month.has(date.month())
    }

    /// The times of a day that it names, not quite in order: what the wall clock shows twice.
    fn times_of(&self, date: Date, zone: &TimeZone) -> impl Iterator<Item = Timestamp> {
        let minutes = (0..24i8).flat_map(|hour| (0..60i8).map(move |minute| (hour, minute)));
        let named = minutes.filter(|(hour, minute)| self.hour.has(*hour) && self.minute.has(*minute));
        named
            .flat_map(move |(hour, minute)| self.moments(date, hour, minute, zone))
            .flatten()
    }

    /// When the wall clock shows this, or when it would have.
    fn moments(&self, date: Date, hour: i8, minute: i8, zone: &TimeZone) -> [Option<Timestamp>; 2] {
        let at = zone.to_ambiguous_timestamp(date.at(hour, minute, 0, 0));
        match at.offset() {
            AmbiguousOffset::Unambiguous { .. } => [at.unambiguous().ok(), None],
            AmbiguousOffset::Fold { .. } if self.hour.is_any => [at.earlier().ok(), at.later().ok()],
            AmbiguousOffset::Fold { .. } => [at.earlier().ok(), None],
            AmbiguousOffset::Gap { .. } if self.hour.is_any => [None, None],
            AmbiguousOffset::Gap { .. } => {
                // Read with the offset that comes, it is before the change.
                let before = at.earlier().ok();
                let change = before.and_then(|before| zone.following(before).next());
                [change.map(|change| change.timestamp()), None]
            }
        }
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Serialize for Schedule {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.text)
    }
}

impl<'de> Deserialize<'de> for Schedule {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
#[path = "schedule_tests.rs"]
mod tests;
