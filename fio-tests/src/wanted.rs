//! What issue 3 wants of the figures, line by line, and whether a run has it.

use std::fmt::Write;

use crate::report::Report;
use crate::runner::Sample;

/// What of two targets is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Measure {
    /// I/Os a second; at least so many times the other's.
    Rate,
    /// Mean latency; at most so many times the other's.
    Latency,
    /// CPU of the daemon per I/O; at most so many times the other's.
    Cpu,
}

impl Measure {
    pub fn of(self, sample: &Sample) -> f64 {
        match self {
            Measure::Rate => sample.iops,
            Measure::Latency => sample.mean_us,
            Measure::Cpu => sample.cpu_us_per_io,
        }
    }

    /// How a ratio is to stand to its bound, in words, and whether it does.
    pub fn judge(self, ratio: f64, bound: f64) -> (&'static str, bool) {
        match self {
            Measure::Rate => ("at least", ratio >= bound),
            Measure::Latency | Measure::Cpu => ("at most", ratio <= bound),
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Measure::Rate => "rate",
            Measure::Latency => "mean latency",
            Measure::Cpu => "CPU per I/O",
        }
    }
}

/// Where a line is to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Medium {
    Disk,
    Memory,
    Any,
}

struct Line {
    medium: Medium,
    target: &'static str,
    job: &'static str,
    measure: Measure,
    against: &'static str,
    bound: f64,
}

const fn line(
    medium: Medium,
    target: &'static str,
    job: &'static str,
    measure: Measure,
    against: &'static str,
    bound: f64,
) -> Line {
    Line {
        medium,
        target,
        job,
        measure,
        against,
        bound,
    }
}

const LINES: &[Line] = &[
    line(Medium::Disk, "weft-1", "randread-d32", Measure::Rate, "qsd", 1.0),
    line(
        Medium::Disk,
        "weft-1",
        "randread-d1",
        Measure::Latency,
        "qsd",
        1.0,
    ),
    line(
        Medium::Memory,
        "weft-1",
        "randread-d32",
        Measure::Rate,
        "qsd",
        1.5,
    ),
    line(Medium::Disk, "weft-1", "randwrite-d32", Measure::Rate, "qsd", 2.5),
    line(Medium::Disk, "weft-1", "randwrite-d32", Measure::Rate, "raw", 1.0),
    line(
        Medium::Disk,
        "weft-1",
        "randwrite-d1",
        Measure::Latency,
        "qsd",
        1.1,
    ),
    line(Medium::Disk, "weft-3", "randwrite-d32", Measure::Rate, "qsd", 1.2),
    line(Medium::Disk, "weft-1", "seqread", Measure::Rate, "qsd", 0.95),
    line(Medium::Disk, "weft-1", "seqwrite", Measure::Rate, "qsd", 0.95),
    line(
        Medium::Disk,
        "weft-1",
        "writeflush-d1",
        Measure::Latency,
        "qsd",
        1.2,
    ),
    line(Medium::Any, "weft-1", "randread-d32", Measure::Cpu, "qsd", 0.6),
    line(Medium::Any, "weft-1", "randwrite-d32", Measure::Cpu, "qsd", 0.6),
];

/// The table of what is wanted on this file system, measured, and met or missed. Empty where nothing was measured
/// that the issue speaks of.
#[must_use]
pub fn table(report: &Report) -> String {
    let here = if report.machine.file_system == "tmpfs" {
        Medium::Memory
    } else {
        Medium::Disk
    };
    let mut rows = String::new();
    for line in LINES {
        if line.medium != Medium::Any && line.medium != here {
            continue;
        }
        let Some(found) = report.ratio_of(line.job, line.target, line.against, |sample| {
            line.measure.of(sample)
        }) else {
            continue;
        };
        let title = report
            .jobs
            .iter()
            .find(|job| job.name == line.job)
            .map_or(line.job, |job| job.title);
        let (word, is_met) = line.judge(found.median);
        let _ = writeln!(
            rows,
            "| {title} | {}, {} | {} | {word} {} | {:.2} ({:.2} to {:.2}) | {} |",
            line.target,
            line.measure.name(),
            line.against,
            line.bound,
            found.median,
            found.min,
            found.max,
            if is_met { "met" } else { "**missed**" },
        );
    }
    if rows.is_empty() {
        return rows;
    }
    format!(
        "\n| target of issue 3 | of | against | wanted | measured, median (min to max) of the repeats | |\n\
         |---|---|---|---|---|---|\n{rows}"
    )
}

impl Line {
    fn judge(&self, ratio: f64) -> (&'static str, bool) {
        self.measure.judge(ratio, self.bound)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job;

    #[test]
    fn lines_name_jobs_and_targets_that_exist() {
        let jobs = job::all(64 << 20);
        for line in LINES {
            assert!(jobs.iter().any(|job| job.name == line.job), "{}", line.job);
            for target in [line.target, line.against] {
                target.parse::<crate::target::Kind>().unwrap();
            }
        }
    }

    #[test]
    fn more_is_better_for_rates_only() {
        let rate = line(Medium::Any, "weft-1", "seqread", Measure::Rate, "qsd", 0.95);
        let latency = line(Medium::Any, "weft-1", "seqread", Measure::Latency, "qsd", 1.1);
        assert_eq!(rate.judge(0.95), ("at least", true));
        assert_eq!(rate.judge(0.94), ("at least", false));
        assert_eq!(latency.judge(1.1), ("at most", true));
        assert_eq!(latency.judge(1.2), ("at most", false));
    }
}
