//! Sizes as people write them: `20GiB`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A number of bytes, written and read with a unit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ByteSize(pub u64);

/// A string that is not a size.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ParseSizeError {
    /// No digits, or something else than a number and a unit.
    #[error("'{0}' is not a size: write a number and a unit, for example 20GiB, 512MiB or 1.5TiB")]
    NotASize(String),
    /// More than 64 bits of bytes.
    #[error("'{0}' is more than 16 EiB")]
    TooLarge(String),
}

const UNITS: [(&str, u64); 16] = [
    ("", 1),
    ("b", 1),
    ("k", 1 << 10),
    ("kib", 1 << 10),
    ("kb", 1_000),
    ("m", 1 << 20),
    ("mib", 1 << 20),
    ("mb", 1_000_000),
    ("g", 1 << 30),
    ("gib", 1 << 30),
    ("gb", 1_000_000_000),
    ("t", 1 << 40),
    ("tib", 1 << 40),
    ("tb", 1_000_000_000_000),
    ("p", 1 << 50),
    ("pib", 1 << 50),
];

impl FromStr for ByteSize {
    type Err = ParseSizeError;

    fn from_str(text: &str) -> Result<ByteSize, ParseSizeError> {
        let shown = || {
            text.chars()
                .filter(|c| !c.is_control())
                .take(64)
                .collect::<String>()
        };
        let trimmed = text.trim();
        let split = trimmed
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .unwrap_or(trimmed.len());
        let (number, unit) = trimmed.split_at(split);
        let unit = unit.trim().to_ascii_lowercase();
        let scale = UNITS
            .iter()
            .find(|(name, _)| *name == unit)
            .map(|(_, scale)| *scale)
            .ok_or_else(|| ParseSizeError::NotASize(shown()))?;
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if whole.is_empty() || fraction.contains('.') || fraction.len() > 9 {
            return Err(ParseSizeError::NotASize(shown()));
        }
        let whole: u64 = whole.parse().map_err(|_| ParseSizeError::TooLarge(shown()))?;
        let mut bytes = u128::from(whole) * u128::from(scale);
        if !fraction.is_empty() {
            let digits: u128 = fraction.parse().map_err(|_| ParseSizeError::NotASize(shown()))?;
            bytes += digits * u128::from(scale) / 10u128.pow(fraction.len() as u32);
        }
        u64::try_from(bytes)
            .map(ByteSize)
            .map_err(|_| ParseSizeError::TooLarge(shown()))
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const NAMES: [(&str, u64); 5] = [
            ("PiB", 1 << 50),
            ("TiB", 1 << 40),
            ("GiB", 1 << 30),
            ("MiB", 1 << 20),
            ("KiB", 1 << 10),
        ];
        for (name, scale) in NAMES {
            if self.0 >= scale {
                let text = if self.0.is_multiple_of(scale) {
                    format!("{}{name}", self.0 / scale)
                } else {
                    format!("{:.1}{name}", self.0 as f64 / scale as f64)
                };
                return f.pad(&text);
            }
        }
        f.pad(&format!("{}B", self.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_people_write() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("20GiB", 20 << 30),
            ("20 GiB", 20 << 30),
            ("20g", 20 << 30),
            ("1.5TiB", 3 << 39),
            ("4kb", 4000),
            ("16M", 16 << 20),
        ] {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
        for text in [
            "",
            "GiB",
            "-1",
            "1..5G",
            ".5G",
            "1GiBB",
            "1e3",
            "0x10",
            "99999999999999999999",
        ] {
            assert!(text.parse::<ByteSize>().is_err(), "{text}");
        }
        assert_eq!(
            "1\u{1b}[2J\nZ".parse::<ByteSize>(),
            Err(ParseSizeError::NotASize("1[2JZ".into())),
            "a refusal does not move a terminal's cursor"
        );
        assert_eq!(
            "16777216TiB".parse::<ByteSize>(),
            Err(ParseSizeError::TooLarge("16777216TiB".into()))
        );
    }

    #[test]
    fn prints_short() {
        assert_eq!(ByteSize(20 << 30).to_string(), "20GiB");
        assert_eq!(ByteSize(3 << 39).to_string(), "1.5TiB");
        assert_eq!(ByteSize(100).to_string(), "100B");
    }

    proptest::proptest! {
        #[test]
        fn never_panics(text in ".{0,40}") {
            let _ = text.parse::<ByteSize>();
        }
    }
}
