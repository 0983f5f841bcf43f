//! A load second by second: how much, how slow; and what it came to over a stretch of time.

use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use serde::Serialize;

use crate::client::new_histogram;

/// One bin.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Second {
    /// Its end, seconds since the beginning.
    pub at: f64,
    /// I/Os a second in it.
    pub iops: f64,
    /// Mean latency, microseconds; 0 where nothing completed.
    pub mean_us: f64,
    /// 99th percentile, microseconds; 0 where nothing completed.
    pub p99_us: f64,
    /// The slowest, microseconds.
    pub max_us: f64,
}

/// Collects completions into bins.
pub struct Timeline {
    begin: Instant,
    bin: Duration,
    /// Of the bin under way.
    bin_begin: Instant,
    latency: Histogram<u64>,
    seconds: Vec<Second>,
    total: u64,
}

impl Timeline {
    /// Begins at `begin`, in bins of `bin`.
    #[must_use]
    pub fn new(begin: Instant, bin: Duration) -> Timeline {
        assert!(!bin.is_zero(), "bins of no time");
        Timeline {
            begin,
            bin,
            bin_begin: begin,
            latency: new_histogram(),
            seconds: Vec::new(),
            total: 0,
        }
    }

    /// Completions seen at `now`.
    pub fn record(&mut self, now: Instant, latencies: &[Duration]) {
        // A stall is seen as bins with nothing in them, and the completion after it as a slow one.
        while now.saturating_duration_since(self.bin_begin) >= self.bin {
            self.close(self.bin_begin + self.bin);
        }
        for one in latencies {
            self.latency.saturating_record(one.as_nanos() as u64);
        }
        self.total += latencies.len() as u64;
    }

    /// I/Os so far.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.total
    }

    /// All whole bins; where there is none, what there is.
    #[must_use]
    pub fn finish(mut self, now: Instant) -> Vec<Second> {
        if self.seconds.is_empty() {
            self.close(now.max(self.bin_begin + Duration::from_nanos(1)));
        }
        self.seconds
    }

    fn close(&mut self, end: Instant) {
        let us = |ns: u64| ns as f64 / 1e3;
        let is_empty = self.latency.is_empty();
        let of = |value: f64| if is_empty { 0.0 } else { value };
        self.seconds.push(Second {
            at: (end - self.begin).as_secs_f64(),
            iops: self.latency.len() as f64 / (end - self.bin_begin).as_secs_f64(),
            mean_us: of(self.latency.mean() / 1e3),
            p99_us: of(us(self.latency.value_at_quantile(0.99))),
            max_us: of(us(self.latency.max())),
        });
        self.latency.reset();
        self.bin_begin = end;
    }
}

/// The later half of a series: what it settled at, where it did.
#[must_use]
pub fn later_half<T>(series: &[T]) -> &[T] {
    &series[series.len() / 2..]
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn bins_hold_what_completed_in_them() {
        let begin = Instant::now();
        let mut timeline = Timeline::new(begin, SECOND);
        let ms = Duration::from_millis;
        timeline.record(begin + ms(100), &[ms(1), ms(3)]);
        timeline.record(begin + ms(900), &[ms(2)]);
        // A stall: the second bin is empty, the third has the slow one.
        timeline.record(begin + ms(2_500), &[ms(1_600)]);
        timeline.record(begin + ms(3_000), &[]);
        assert_eq!(timeline.total(), 4);
        let seconds = timeline.finish(begin + ms(3_100));
        let iops: Vec<f64> = seconds.iter().map(|second| second.iops).collect();
        assert_eq!(iops, [3.0, 0.0, 1.0]);
        assert!((seconds[0].mean_us - 2_000.0).abs() < 5.0, "{seconds:?}");
        assert!((seconds[0].p99_us - 3_000.0).abs() < 5.0, "{seconds:?}");
        assert_eq!((seconds[1].p99_us, seconds[1].max_us), (0.0, 0.0));
        assert!((seconds[2].max_us - 1_600_000.0).abs() < 2_000.0, "{seconds:?}");
        assert_eq!(seconds[2].at, 3.0);
    }

    #[test]
    fn a_short_load_has_one_bin() {
        let begin = Instant::now();
        let mut timeline = Timeline::new(begin, SECOND);
        timeline.record(begin + SECOND / 4, &[SECOND / 8; 10]);
        let seconds = timeline.finish(begin + SECOND / 2);
        assert_eq!(seconds.len(), 1);
        assert!((seconds[0].iops - 20.0).abs() < 1e-6, "{seconds:?}");
    }

    #[test]
    fn the_later_half_leaves_out_the_beginning() {
        assert_eq!(later_half(&[1, 2, 3, 4]), [3, 4]);
        assert_eq!(later_half(&[1, 2, 3]), [2, 3]);
        assert_eq!(later_half(&[1]), [1]);
    }
}
