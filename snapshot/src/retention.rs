//! Which snapshots a schedule deletes, and why it keeps each of the others.
//!
//! As people know it from restic: for each kind of period the newest snapshot of each of the last N periods *that have
//! one* is kept; a snapshot may be kept for several reasons, each rule counts by itself. While a rule has kept
//! fewer than N the oldest snapshot of all is kept too, so that history grows to the length asked for and does not stay
//! short for ever. (borg does not count for a longer period what a shorter one keeps already; so `keep 7 daily, 4
//! weekly` keeps up to 3 more weeks there.) Periods are of the calendar in a time zone: weeks begin on Monday, an
//! hour that comes twice in autumn is two.
//!
//! What is protected, or began a clone, is always kept, and counts like any other.

use std::fmt;

use jiff::Timestamp;
use jiff::civil::Date;
use jiff::tz::TimeZone;
use serde::{Deserialize, Serialize};
use types::LayerId;

use crate::name::SnapshotName;

/// How many to keep; zero: the rule keeps none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Keep {
    /// The newest of all.
    pub last: u32,
    /// The newest of an hour.
    pub hourly: u32,
    /// The newest of a day.
    pub daily: u32,
    /// The newest of a week from Monday to Sunday.
    pub weekly: u32,
    /// The newest of a month.
    pub monthly: u32,
    /// The newest of a year.
    pub yearly: u32,
}

/// A rule that keeps nothing would delete everything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("to keep none would delete every snapshot: keep at least one, for example the last")]
pub struct KeepsNothing;

/// Kinds of periods, the shortest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Period {
    /// See [`Keep::hourly`].
    Hour,
    /// See [`Keep::daily`].
    Day,
    /// See [`Keep::weekly`].
    Week,
    /// See [`Keep::monthly`].
    Month,
    /// See [`Keep::yearly`].
    Year,
}

const PERIODS: [Period; 5] = [
    Period::Hour,
    Period::Day,
    Period::Week,
    Period::Month,
    Period::Year,
];

/// A snapshot that a schedule may delete.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Its layer; of two with one time the higher is the newer.
    pub layer: LayerId,
    /// Its name.
    pub name: SnapshotName,
    /// When it was taken.
    pub created: Timestamp,
    /// Never deleted by a schedule.
    pub protected: bool,
    /// Clones began with it: it cannot be deleted.
    pub has_clones: bool,
}

/// Why a snapshot is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Somebody protected it.
    Protected,
    /// Clones began with it.
    HasClones,
    /// One of the newest of all, counted from 1.
    Last(u32),
    /// The newest of its period, counted from 1 back from now.
    NewestOf(Period, u32),
    /// The oldest of all, while fewer periods have one than are asked for.
    OldestFor(Period),
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Reason::Protected => f.write_str("protected"),
            Reason::HasClones => f.write_str("has clones"),
            Reason::Last(no) => write!(f, "last {no}"),
            Reason::NewestOf(period, no) => write!(f, "{period} {no}"),
            Reason::OldestFor(period) => write!(f, "oldest {period}"),
        }
    }
}

impl fmt::Display for Period {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Period::Hour => "hourly",
            Period::Day => "daily",
            Period::Week => "weekly",
            Period::Month => "monthly",
            Period::Year => "yearly",
        })
    }
}

/// What is to be done with one snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Which.
    pub candidate: Candidate,
    /// Why it is kept; empty: it is to be deleted.
    pub reasons: Vec<Reason>,
}

impl Verdict {
    /// Whether it is to be deleted.
    #[must_use]
    pub fn is_doomed(&self) -> bool {
        self.reasons.is_empty()
    }
}

/// One period, as a value that is equal for all moments in it and for no others.
type PeriodKey = (Date, i8, i32);

/// The period of a moment; times before the calendar's first day are of that day.
fn period_of(period: Period, at: Timestamp, zone: &TimeZone) -> PeriodKey {
    let zoned = zone.to_datetime(at);
    let date = zoned.date();
    match period {
        // The hour that comes twice has two offsets.
        Period::Hour => (date, zoned.hour(), zone.to_offset(at).seconds()),
        Period::Day => (date, 0, 0),
        Period::Week => {
            let week = date.iso_week_date();
            (Date::constant(week.year(), 1, 1), week.week(), 0)
        }
        Period::Month => (date.first_of_month(), 0, 0),
        Period::Year => (date.first_of_year(), 0, 0),
    }
}

impl Keep {
    fn of(&self, period: Period) -> u32 {
        match period {
            Period::Hour => self.hourly,
            Period::Day => self.daily,
            Period::Week => self.weekly,
            Period::Month => self.monthly,
            Period::Year => self.yearly,
        }
    }

    /// Says of each snapshot whether it goes, and why not; the newest first.
    ///
    /// # Errors
    /// When no rule keeps anything.
    pub fn plan(
        &self,
        mut candidates: Vec<Candidate>,
        zone: &TimeZone,
    ) -> Result<Vec<Verdict>, KeepsNothing> {
        if *self == Keep::default() {
            return Err(KeepsNothing);
        }
        candidates.sort_by_key(|candidate| std::cmp::Reverse((candidate.created, candidate.layer)));
        let oldest = candidates.len().saturating_sub(1);
        let mut verdicts: Vec<Verdict> = candidates
            .into_iter()
            .zip(1..)
            .map(|(candidate, no)| Verdict {
                reasons: always_kept(&candidate, no, self.last),
                candidate,
            })
            .collect();
        for period in PERIODS {
            let mut kept = 0;
            let mut last = None;
            for (at, verdict) in verdicts.iter_mut().enumerate() {
                if kept == self.of(period) {
                    break;
                }
                let key = period_of(period, verdict.candidate.created, zone);
                if last != Some(key) {
                    last = Some(key);
                    kept += 1;
                    verdict.reasons.push(Reason::NewestOf(period, kept));
                } else if at == oldest {
                    verdict.reasons.push(Reason::OldestFor(period));
                }
            }
        }
        Ok(verdicts)
    }
}

fn always_kept(candidate: &Candidate, no: u32, last: u32) -> Vec<Reason> {
    let mut reasons = Vec::new();
    if candidate.protected {
        reasons.push(Reason::Protected);
    }
    if candidate.has_clones {
        reasons.push(Reason::HasClones);
    }
    if no <= last {
        reasons.push(Reason::Last(no));
    }
    reasons
}

#[cfg(test)]
#[path = "retention_tests.rs"]
mod tests;
