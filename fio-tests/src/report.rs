//! Medians with their spread, as Markdown for people and JSON for machines.

use std::fmt::Write;

use serde::Serialize;

use crate::job::{Job, PAGE};
use crate::machine::Machine;
use crate::runner::{Results, Sample};
use crate::syscalls::{self, Counts};
use crate::wanted;

/// Others' CPU above this share of one core is pointed out.
const NOISY: f64 = 0.3;

/// Everything about a run.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Where.
    pub machine: Machine,
    /// The command line.
    pub command: String,
    /// Of offsets and order.
    pub seed: u64,
    /// Bytes under load.
    pub span: u64,
    /// What was asked.
    pub jobs: Vec<Job>,
    /// Target names in the order of the table.
    pub targets: Vec<String>,
    /// What came of it.
    pub results: Results,
    /// System calls, counted in runs of their own; nothing where nobody asked.
    pub syscalls: Vec<Counts>,
}

/// Middle, least and greatest of some numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    /// The middle one; of an even count, the mean of the two in the middle.
    pub median: f64,
    /// The least.
    pub min: f64,
    /// The greatest.
    pub max: f64,
}

impl Spread {
    /// `None` where there are no numbers.
    pub fn of(numbers: impl IntoIterator<Item = f64>) -> Option<Spread> {
        let mut sorted: Vec<f64> = numbers.into_iter().collect();
        sorted.sort_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let half = sorted.len() / 2;
        let median = if sorted.len() % 2 == 1 {
            sorted[half]
        } else {
            f64::midpoint(sorted[half - 1], sorted[half])
        };
        Some(Spread { median, min, max })
    }
}

impl Report {
    /// The tables that docs/performance.md shows.
    pub fn markdown(&self) -> String {
        let mut text = String::new();
        let _ = writeln!(text, "{}", self.machine.line());
        let _ = writeln!(text, "Seed {}.\n", self.seed);
        text.push_str(
            "| job | target | rate, median (min to max) | mean us | p50 us | p99 us | CPU us per I/O | of qsd's | rate of qsd's | of raw's |\n\
             |---|---|---|---|---|---|---|---|---|---|\n",
        );
        for job in &self.jobs {
            for (index, target) in self.targets.iter().enumerate() {
                let title = if index == 0 { job.title } else { "" };
                self.row(&mut text, title, job, target);
            }
        }
        self.noise(&mut text);
        text.push_str(&wanted::table(self));
        if !self.syscalls.is_empty() {
            text.push_str(&syscalls::markdown(&self.syscalls, &self.jobs));
        }
        text
    }

    fn row(&self, text: &mut String, title: &str, job: &Job, target: &str) {
        let spread =
            |value: fn(&Sample) -> Option<f64>| Spread::of(self.samples(job.name, target).filter_map(value));
        let cell = |value: fn(&Sample) -> Option<f64>| {
            spread(value).map_or_else(|| "-".to_owned(), |spread| figure(spread.median))
        };
        let rate = if job.block == PAGE {
            spread(|sample| Some(sample.iops)).map(|rate| (rate, "IOPS"))
        } else {
            spread(|sample| Some(sample.mib_per_s)).map(|rate| (rate, "MiB/s"))
        };
        let rate = rate.map_or_else(
            || "-".to_owned(),
            |(rate, unit)| {
                format!(
                    "{} {unit} ({} to {})",
                    figure(rate.median),
                    figure(rate.min),
                    figure(rate.max)
                )
            },
        );
        let _ = writeln!(
            text,
            "| {title} | {target} | {rate} | {} | {} | {} | {} | {} | {} | {} |",
            cell(|sample| Some(sample.mean_us)),
            cell(|sample| sample.p50_us),
            cell(|sample| sample.p99_us),
            cell(|sample| Some(sample.cpu_us_per_io)),
            self.ratio(job.name, target, "qsd", |sample| sample.cpu_us_per_io),
            self.ratio(job.name, target, "qsd", |sample| sample.iops),
            self.ratio(job.name, target, "raw", |sample| sample.iops),
        );
    }

    fn ratio(&self, job: &str, target: &str, to: &str, value: fn(&Sample) -> f64) -> String {
        match self.ratio_of(job, target, to, value) {
            Some(_) if target == to => "1".to_owned(),
            Some(ratio) => format!("{:.2}", ratio.median),
            None => "-".to_owned(),
        }
    }

    /// Of the repeats, each the ratio of neighbours: drift of the machine cancels out.
    pub(crate) fn ratio_of(
        &self,
        job: &str,
        target: &str,
        to: &str,
        value: impl Fn(&Sample) -> f64,
    ) -> Option<Spread> {
        ratio_of(&self.results.samples, job, target, to, value)
    }

    fn noise(&self, text: &mut String) {
        let samples = &self.results.samples;
        let others = Spread::of(samples.iter().map(|sample| sample.others_cores));
        let steal = Spread::of(samples.iter().map(|sample| sample.steal_cores));
        if let (Some(others), Some(steal)) = (others, steal) {
            let noisy = samples
                .iter()
                .filter(|sample| sample.others_cores > NOISY)
                .count();
            let _ = writeln!(
                text,
                "\n{} runs. CPU of everything else during a run (kernel workers and interrupts too): median {:.2} \
                 cores, up to {:.2}; above {NOISY} in {noisy} runs. Stolen by the hypervisor: median {:.2}, up to {:.2}.",
                samples.len(),
                others.median,
                others.max,
                steal.median,
                steal.max
            );
        }
        let background: Vec<String> = self
            .results
            .background_cpu_s
            .iter()
            .map(|(name, seconds)| format!("{name} {seconds:.1} s"))
            .collect();
        let _ = writeln!(
            text,
            "CPU of daemons while others were under load: {}.",
            background.join(", ")
        );
    }

    fn samples<'a>(&'a self, job: &'a str, target: &'a str) -> impl Iterator<Item = &'a Sample> {
        self.results
            .samples
            .iter()
            .filter(move |sample| sample.job == job && sample.target == target)
    }
}

/// Of the repeats, each the ratio of neighbours: drift of the machine cancels out.
pub(crate) fn ratio_of(
    samples: &[Sample],
    job: &str,
    target: &str,
    to: &str,
    value: impl Fn(&Sample) -> f64,
) -> Option<Spread> {
    let of = |target: &str| {
        let target = target.to_owned();
        let is_wanted = move |sample: &&Sample| sample.job == job && sample.target == target;
        samples.iter().filter(is_wanted)
    };
    let ratios = of(target).filter_map(|sample| {
        let base = of(to).find(|base| base.repeat == sample.repeat)?;
        Some(value(sample) / value(base))
    });
    Spread::of(ratios.filter(|ratio| ratio.is_finite()))
}

/// Three digits, which is what a measurement is good for.
pub fn figure(number: f64) -> String {
    if number >= 1000.0 {
        let digits = (number.log10().floor() as i32 - 2).max(0);
        let unit = 10f64.powi(digits);
        let whole = ((number / unit).round() * unit) as u64;
        let text = whole.to_string();
        let mut grouped = String::new();
        for (index, digit) in text.chars().enumerate() {
            if index > 0 && (text.len() - index).is_multiple_of(3) {
                grouped.push(',');
            }
            grouped.push(digit);
        }
        grouped
    } else if number >= 100.0 {
        format!("{number:.0}")
    } else {
        format!("{number:.1}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(target: &str, repeat: u32, iops: f64) -> Sample {
        Sample {
            job: "randread-d1",
            target: target.to_owned(),
            repeat,
            iops,
            mib_per_s: iops / 256.0,
            mean_us: 1e6 / iops,
            p50_us: Some(1.0),
            p99_us: None,
            cpu_us_per_io: 2.0,
            client_cpu_us_per_io: 2.0,
            others_cores: 0.1,
            idle_targets_cores: 0.0,
            steal_cores: 0.0,
        }
    }

    #[test]
    fn medians_do_not_follow_an_outlier() {
        assert_eq!(
            Spread::of([3.0, 1.0, 100.0]),
            Some(Spread {
                median: 3.0,
                min: 1.0,
                max: 100.0
            })
        );
        assert_eq!(Spread::of([1.0, 2.0]).unwrap().median, 1.5);
        assert_eq!(Spread::of([]), None);
    }

    #[test]
    fn figures_have_three_digits() {
        for (number, text) in [
            (17_543.2, "17,500"),
            (999.6, "1000"),
            (1_234_567.0, "1,230,000"),
            (54.31, "54.3"),
        ] {
            assert_eq!(figure(number), text);
        }
    }

    #[test]
    fn a_ratio_compares_neighbours() {
        let samples = vec![
            sample("qsd", 0, 100.0),
            sample("weft-1", 0, 200.0),
            sample("weft-1", 1, 20.0), // the machine is ten times slower now
            sample("qsd", 1, 10.0),
        ];
        let report = Report {
            machine: crate::machine::describe(std::path::Path::new("/"), std::path::Path::new("/nowhere")),
            command: String::new(),
            seed: 1,
            span: 64 << 20,
            jobs: crate::job::all(64 << 20)[..1].to_vec(),
            targets: vec!["qsd".to_owned(), "weft-1".to_owned()],
            results: Results {
                samples,
                background_cpu_s: vec![("qsd".to_owned(), 0.0)],
            },
            syscalls: Vec::new(),
        };
        assert_eq!(
            report.ratio("randread-d1", "weft-1", "qsd", |sample| sample.iops),
            "2.00"
        );
        let text = report.markdown();
        assert!(text.contains("| weft-1 | 110 IOPS (20.0 to 200) |"), "{text}");
        assert!(text.contains("| - |"), "{text}");
        // Half the latency, the same CPU.
        assert!(
            text.contains("| qsd | at most 1 | 0.50 (0.50 to 0.50) | met |"),
            "{text}"
        );
    }
}
