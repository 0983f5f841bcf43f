use proptest::prelude::*;

use super::*;

/// Berlin's rules of today, without a look at any file.
fn berlin() -> TimeZone {
    TimeZone::posix("CET-1CEST,M3.5.0,M10.5.0/3").unwrap()
}

fn at(time: &str) -> Timestamp {
    time.parse().unwrap()
}

fn candidate(layer: u32, created: Timestamp) -> Candidate {
    Candidate {
        layer: LayerId(layer),
        name: format!("s{layer}").parse().unwrap(),
        created,
        protected: false,
        has_clones: false,
    }
}

/// What is kept of snapshots taken at these times, by time and reasons, the newest first.
fn kept(keep: Keep, times: &[&str]) -> Vec<String> {
    let candidates = times.iter().zip(0..).map(|(time, no)| candidate(no, at(time)));
    let verdicts = keep.plan(candidates.collect(), &berlin()).unwrap();
    let kept = verdicts.iter().filter(|verdict| !verdict.is_doomed());
    let shown = kept.map(|verdict| {
        let reasons: Vec<String> = verdict.reasons.iter().map(ToString::to_string).collect();
        format!(
            "{}: {}",
            times[verdict.candidate.layer.0 as usize],
            reasons.join(", ")
        )
    });
    shown.collect()
}

#[test]
fn the_newest_of_each_period_that_has_one() {
    let times = [
        "2026-11-18T09:00:00Z",
        "2026-11-18T21:00:00Z",
        // None on the 19th: the days that have one are counted.
        "2026-11-20T09:00:00Z",
        "2026-11-21T09:00:00Z",
        "2026-11-21T21:00:00Z",
    ];
    let keep = Keep {
        daily: 3,
        ..Keep::default()
    };
    assert_eq!(
        kept(keep, &times),
        [
            "2026-11-21T21:00:00Z: daily 1",
            "2026-11-20T09:00:00Z: daily 2",
            "2026-11-18T21:00:00Z: daily 3",
        ]
    );
    let keep = Keep {
        last: 2,
        daily: 1,
        monthly: 1,
        ..Keep::default()
    };
    assert_eq!(
        kept(keep, &times),
        [
            "2026-11-21T21:00:00Z: last 1, daily 1, monthly 1",
            "2026-11-21T09:00:00Z: last 2"
        ]
    );
}

#[test]
fn the_oldest_stays_while_a_rule_has_room() {
    let times = [
        "2026-11-20T08:00:00Z",
        "2026-11-20T09:00:00Z",
        "2026-11-20T10:00:00Z",
    ];
    let keep = Keep {
        monthly: 2,
        ..Keep::default()
    };
    assert_eq!(
        kept(keep, &times),
        [
            "2026-11-20T10:00:00Z: monthly 1",
            "2026-11-20T08:00:00Z: oldest monthly"
        ]
    );
}

#[test]
fn days_and_weeks_are_those_of_the_time_zone() {
    let keep = Keep {
        daily: 9,
        ..Keep::default()
    };
    // Midnight of Berlin lies between, that of UTC does not.
    let times = ["2026-11-20T22:59:00Z", "2026-11-20T23:01:00Z"];
    assert_eq!(
        kept(keep, &times),
        ["2026-11-20T23:01:00Z: daily 1", "2026-11-20T22:59:00Z: daily 2"]
    );
    let keep = Keep {
        weekly: 9,
        ..Keep::default()
    };
    // From Sunday to Monday; over New Year the week goes on: 2026-12-31 and 2027-01-03 are of week 53 of 2026.
    let times = [
        "2026-12-27T12:00:00Z",
        "2026-12-28T12:00:00Z",
        "2027-01-03T12:00:00Z",
        "2027-01-04T12:00:00Z",
    ];
    assert_eq!(
        kept(keep, &times),
        [
            "2027-01-04T12:00:00Z: weekly 1",
            "2027-01-03T12:00:00Z: weekly 2",
            "2026-12-27T12:00:00Z: weekly 3",
        ]
    );
}

#[test]
fn the_hour_that_comes_twice_is_two() {
    let keep = Keep {
        hourly: 2,
        ..Keep::default()
    };
    // Both are at 02:30 of Berlin's wall clocks.
    let times = ["2026-10-25T00:30:00Z", "2026-10-25T01:30:00Z"];
    assert_eq!(
        kept(keep, &times),
        ["2026-10-25T01:30:00Z: hourly 1", "2026-10-25T00:30:00Z: hourly 2"]
    );
}

#[test]
fn what_must_not_go_stays_and_counts() {
    let mut candidates: Vec<Candidate> = (0..4)
        .map(|no| candidate(no, at(&format!("2026-11-2{no}T10:00:00Z"))))
        .collect();
    candidates[3].protected = true;
    candidates[1].has_clones = true;
    let keep = Keep {
        daily: 2,
        ..Keep::default()
    };
    let verdicts = keep.plan(candidates, &berlin()).unwrap();
    let reasons: Vec<&[Reason]> = verdicts
        .iter()
        .map(|verdict| verdict.reasons.as_slice())
        .collect();
    assert_eq!(
        reasons,
        [
            &[Reason::Protected, Reason::NewestOf(Period::Day, 1)] as &[Reason],
            &[Reason::NewestOf(Period::Day, 2)],
            &[Reason::HasClones],
            &[],
        ]
    );
}

#[test]
fn to_keep_nothing_is_refused() {
    assert_eq!(Keep::default().plan(vec![], &berlin()), Err(KeepsNothing));
}

fn keep() -> impl Strategy<Value = Keep> {
    (0u32..4, 0u32..4, 0u32..4, 0u32..3, 0u32..3, 1u32..3).prop_map(
        |(last, hourly, daily, weekly, monthly, yearly)| Keep {
            last,
            hourly,
            daily,
            weekly,
            monthly,
            yearly,
        },
    )
}

/// The sentence of the documentation, done naively for one rule: go through the calendar's periods, the newest first,
/// and take the newest snapshot of each.
fn naive(candidates: &[Candidate], period: Period, count: u32) -> Vec<LayerId> {
    let zone = berlin();
    let mut newest: std::collections::BTreeMap<PeriodKey, &Candidate> = std::collections::BTreeMap::new();
    for candidate in candidates {
        let best = newest
            .entry(period_of(period, candidate.created, &zone))
            .or_insert(candidate);
        if (candidate.created, candidate.layer) > (best.created, best.layer) {
            *best = candidate;
        }
    }
    let mut best: Vec<&Candidate> = newest.into_values().collect();
    best.sort_by_key(|candidate| std::cmp::Reverse((candidate.created, candidate.layer)));
    best.iter()
        .take(count as usize)
        .map(|candidate| candidate.layer)
        .collect()
}

proptest! {
    #[test]
    fn each_rule_keeps_what_its_sentence_says(
        // Close together, so that periods are shared, and around the change of clocks in autumn.
        times in prop::collection::vec(0i64..40 * 86_400, 0..60),
        scale in 1i64..20,
        keep in keep(),
    ) {
        let start = at("2026-10-10T00:00:00Z").as_second();
        let candidates: Vec<Candidate> = times.iter().zip(0..)
            .map(|(time, no)| candidate(no, Timestamp::from_second(start + time * scale).unwrap()))
            .collect();
        let verdicts = keep.plan(candidates.clone(), &berlin()).unwrap();
        prop_assert_eq!(verdicts.len(), candidates.len());
        for period in PERIODS {
            let said: Vec<LayerId> = verdicts.iter()
                .filter(|v| v.reasons.iter().any(|r| matches!(r, Reason::NewestOf(p, _) if *p == period)))
                .map(|v| v.candidate.layer)
                .collect();
            prop_assert_eq!(&said, &naive(&candidates, period, keep.of(period)), "{}", period);
        }
        if let Some(newest) = verdicts.first() {
            prop_assert!(!newest.is_doomed(), "the newest is never deleted");
        }

        // A plan that was carried out has nothing left to do.
        let left: Vec<Candidate> = verdicts.into_iter()
            .filter(|v| !v.is_doomed())
            .map(|v| v.candidate)
            .collect();
        let again = keep.plan(left, &berlin()).unwrap();
        prop_assert!(again.iter().all(|v| !v.is_doomed()), "{:?}", again);
    }
}
