//! What people write to say which state of which VDI: `web01`, `web01@before-upgrade`,
//! `web01@time:2026-11-21T10:15:00Z`.
//!
//! A name has no '@', ':' or '/', so that a reference can be taken apart in one way only, and be part of a path, a
//! URL and a shell's line as it is.

use std::fmt;
use std::str::FromStr;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// Longest name in bytes, of VDIs and of snapshots.
pub const NAME_BYTES_MAX: usize = 63;

/// Longest time that is read: RFC 3339 with nanoseconds and an offset has 35 bytes.
const TIME_BYTES_MAX: usize = 40;
const TIME_MARK: &str = "time:";
/// Characters of what was written that a refusal repeats.
const SHOWN_MAX: usize = 80;

/// Why a text is no name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WrongName {
    /// No character.
    #[error("it is empty")]
    Empty,
    /// Longer than [`NAME_BYTES_MAX`].
    #[error("it has {bytes} bytes, {NAME_BYTES_MAX} are the most")]
    TooLong {
        /// Its bytes.
        bytes: usize,
    },
    /// A character that no name has.
    #[error("character {place} is {}", Shown(*.character))]
    Character {
        /// Which.
        character: char,
        /// Counted from 1.
        place: usize,
    },
    /// A character that names have, but not first.
    #[error("it begins with {}", Shown(*.character))]
    Begins {
        /// Which.
        character: char,
    },
}

/// A text that names no state of a VDI. The message says what is wrong, [`way_out`](Self::way_out) what would be right.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseReferenceError {
    /// The VDI's name, or what stands where it should.
    #[error("'{shown}' is not the name of a VDI: {reason}")]
    Vdi {
        /// What was written, shortened.
        shown: String,
        /// Why.
        reason: WrongName,
    },
    /// The snapshot's name.
    #[error("'{shown}' is not the name of a snapshot: {reason}")]
    Snapshot {
        /// What was written, shortened.
        shown: String,
        /// Why.
        reason: WrongName,
    },
    /// What follows `@time:`.
    #[error("'{shown}' is not a time")]
    Time {
        /// What was written, shortened.
        shown: String,
    },
    /// A snapshot or time where a whole VDI is meant.
    #[error("'{shown}' names a state of a VDI where a VDI is asked for")]
    NotWhole {
        /// What was written, shortened.
        shown: String,
    },
    /// A VDI where one of its snapshots is meant.
    #[error("'{shown}' names a VDI where one of its snapshots is asked for")]
    NotASnapshot {
        /// What was written, shortened.
        shown: String,
    },
}

impl ParseReferenceError {
    /// What to write instead.
    #[must_use]
    pub fn way_out(&self) -> &'static str {
        match self {
            ParseReferenceError::Vdi { .. } | ParseReferenceError::Snapshot { .. } => {
                "use 1 to 63 of a-z, 0-9, '.', '_' and '-', beginning with a letter or digit"
            }
            ParseReferenceError::Time { .. } => {
                "write it with its offset or Z for UTC, for example time:2026-11-21T10:15:00Z"
            }
            ParseReferenceError::NotWhole { .. } => "leave out what begins with '@'",
            ParseReferenceError::NotASnapshot { .. } => {
                "add '@' and the snapshot's name, for example web01@before-upgrade"
            }
        }
    }
}

/// A character as a refusal shows it: one that would not be seen, or that would turn the line around, by its number.
struct Shown(char);

impl fmt::Display for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            ' ' => f.write_str("a space"),
            '\'' => f.write_str("an apostrophe"),
            c if is_hidden(c) || c.is_whitespace() => write!(f, "U+{:04X}", u32::from(c)),
            c if c.is_ascii() => write!(f, "'{c}'"),
            c => write!(f, "'{c}' (U+{:04X})", u32::from(c)),
        }
    }
}

/// Characters that nobody sees, that move the cursor, or that turn the direction of what follows.
fn is_hidden(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{fe00}'..='\u{fe0f}' | '\u{feff}' | '\u{e0000}'..='\u{e0fff}')
}

fn shown(text: &str) -> String {
    text.chars().filter(|c| !is_hidden(*c)).take(SHOWN_MAX).collect()
}

/// `[a-z0-9][a-z0-9._-]{0,62}`: also what the control records take for the name of a VDI.
fn check(text: &str) -> Result<(), WrongName> {
    let starts = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let goes_on = |c: char| starts(c) || matches!(c, '.' | '_' | '-');
    if let Some(at) = text.chars().position(|c| !goes_on(c)) {
        let character = text.chars().nth(at).expect("found there");
        return Err(WrongName::Character {
            character,
            place: at + 1,
        });
    }
    match text.chars().next() {
        None => Err(WrongName::Empty),
        Some(character) if !starts(character) => Err(WrongName::Begins { character }),
        Some(_) if text.len() > NAME_BYTES_MAX => Err(WrongName::TooLong { bytes: text.len() }),
        Some(_) => Ok(()),
    }
}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident, $refusal:ident) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(String);

        impl $name {
            /// As text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl FromStr for $name {
            type Err = ParseReferenceError;

            fn from_str(text: &str) -> Result<$name, ParseReferenceError> {
                match check(text) {
                    Ok(()) => Ok($name(text.to_owned())),
                    Err(reason) => Err(ParseReferenceError::$refusal { shown: shown(text), reason }),
                }
            }
        }

        impl Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.0)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

name! {
    /// The name of a VDI.
    VdiName, Vdi
}
name! {
    /// The name of a snapshot, unique among those of its VDI.
    SnapshotName, Snapshot
}

/// Which state of a VDI.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Point {
    /// What it holds now.
    Head,
    /// What it held when this snapshot was taken.
    Snapshot(SnapshotName),
    /// What it held at the last completed flush not after this moment.
    Time(Timestamp),
}

/// A state of a VDI, by name. Shown as it is written, times in UTC.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Reference {
    /// Of which VDI.
    pub vdi: VdiName,
    /// Which of its states.
    pub point: Point,
}

impl Reference {
    /// The VDI, where no other state than the present one can be meant.
    ///
    /// # Errors
    /// [`ParseReferenceError::NotWhole`].
    pub fn whole(self) -> Result<VdiName, ParseReferenceError> {
        match self.point {
            Point::Head => Ok(self.vdi),
            Point::Snapshot(_) | Point::Time(_) => Err(ParseReferenceError::NotWhole {
                shown: self.to_string(),
            }),
        }
    }

    /// VDI and snapshot, where nothing else can be meant: to take, to delete, to protect one.
    ///
    /// # Errors
    /// [`ParseReferenceError::NotASnapshot`].
    pub fn snapshot(self) -> Result<(VdiName, SnapshotName), ParseReferenceError> {
        match self.point {
            Point::Snapshot(name) => Ok((self.vdi, name)),
            Point::Head | Point::Time(_) => Err(ParseReferenceError::NotASnapshot {
                shown: self.to_string(),
            }),
        }
    }
}

impl FromStr for Reference {
    type Err = ParseReferenceError;

    fn from_str(text: &str) -> Result<Reference, ParseReferenceError> {
        let Some((vdi, point)) = text.split_once('@') else {
            return Ok(Reference {
                vdi: text.parse()?,
                point: Point::Head,
            });
        };
        let vdi = vdi.parse()?;
        let point = match point.strip_prefix(TIME_MARK) {
            Some(time) => Point::Time(parse_time(time)?),
            None => Point::Snapshot(point.parse()?),
        };
        Ok(Reference { vdi, point })
    }
}

/// A time with its offset. What jiff reads beyond RFC 3339 (a zone's name in brackets, the date alone) is refused:
/// a time that is read in two ways is worse than one that is not read.
fn parse_time(text: &str) -> Result<Timestamp, ParseReferenceError> {
    let plain = |b: u8| b.is_ascii_digit() || b"-+:.,TtZz".contains(&b);
    let is_plain = text.len() <= TIME_BYTES_MAX && text.bytes().all(plain) && !text.starts_with(['+', '-']);
    is_plain
        .then(|| text.parse().ok())
        .flatten()
        .ok_or_else(|| ParseReferenceError::Time { shown: shown(text) })
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.point {
            Point::Head => write!(f, "{}", self.vdi),
            Point::Snapshot(name) => write!(f, "{}@{name}", self.vdi),
            Point::Time(time) => write!(f, "{}@{TIME_MARK}{time}", self.vdi),
        }
    }
}

#[cfg(test)]
#[path = "name_tests.rs"]
mod tests;
