//! Jobs on several things beside each other, in turn and in seeded random order, as the benchmark does it; each of
//! them may be many processes.

use std::fmt::Write;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Args;

use crate::client::{LoadClient, Timing};
use crate::job::{Job, Op, PAGE, Pattern, Zone};
use crate::random::Random;
use crate::report::{Spread, figure, ratio_of};
use crate::runner::{Sample, Snapshot, wait_for_calm};
use crate::target::Figures;
use crate::wanted::Measure;

const RAMP: Duration = Duration::from_millis(250);

/// How long, how often.
#[derive(Clone, Copy, Debug, Args)]
pub struct Turns {
    /// Length of one run
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// Runs of each job on each
    #[arg(long, default_value_t = 5)]
    repeats: u32,
    /// Wait up to so many seconds before each run for the rest of the machine to be idle
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    calm: u64,
}

/// One that jobs are given to.
pub trait Contender {
    /// In reports.
    fn name(&self) -> &'static str;

    /// All processes that work for it beside the client.
    fn pids(&self) -> Vec<u32>;

    /// One run; `probe` is called where the measured time begins and where it ends.
    fn measure(&mut self, job: &Job, timing: Timing, seed: u64, probe: &mut dyn FnMut()) -> Result<Figures>;
}

/// A VDI of daemons that run, with its guest.
pub struct Guest {
    /// In reports.
    pub name: &'static str,
    /// Of the daemons.
    pub pids: Vec<u32>,
    /// Connected to the VDI.
    pub client: LoadClient,
}

impl Contender for Guest {
    fn name(&self) -> &'static str {
        self.name
    }

    fn pids(&self) -> Vec<u32> {
        self.pids.clone()
    }

    fn measure(&mut self, job: &Job, timing: Timing, seed: u64, probe: &mut dyn FnMut()) -> Result<Figures> {
        let outcome = self.client.run(job, timing, seed, probe)?;
        let us = |quantile| outcome.latency.value_at_quantile(quantile) as f64 / 1e3;
        Ok(Figures {
            ios: outcome.ios,
            elapsed: outcome.elapsed,
            mean_us: outcome.latency.mean() / 1e3,
            p50_us: Some(us(0.5)),
            p99_us: Some(us(0.99)),
            fio_cpu: None,
        })
    }
}

/// 4 KiB anywhere in `span` bytes: writes and reads, at depth 1 and 32.
#[must_use]
pub fn small_jobs(span: u64) -> Vec<Job> {
    let job = |name, title, op, depth| Job {
        name,
        title,
        pattern: Pattern::Random,
        op,
        block: PAGE,
        depth,
        zone: Zone {
            offset: 0,
            bytes: span,
        },
    };
    vec![
        job("randwrite-d1", "4 KiB random write, depth 1", Op::Write, 1),
        job("randwrite-d32", "4 KiB random write, depth 32", Op::Write, 32),
        job("randread-d1", "4 KiB random read, depth 1", Op::Read, 1),
        job("randread-d32", "4 KiB random read, depth 32", Op::Read, 32),
    ]
}

/// Gives every job to every contender, again and again. Progress goes to standard error.
pub fn run(
    contenders: &mut [&mut dyn Contender],
    jobs: &[Job],
    turns: Turns,
    seed: u64,
) -> Result<Vec<Sample>> {
    ensure!(
        turns.seconds > 0.0 && turns.repeats > 0,
        "--seconds and --repeats must be more than 0"
    );
    let timing = Timing {
        ramp: RAMP,
        measured: Duration::from_secs_f64(turns.seconds),
    };
    let mut all: Vec<u32> = contenders.iter().flat_map(|one| one.pids()).collect();
    all.sort_unstable();
    all.dedup();
    let watched: Vec<Option<u32>> = all.iter().copied().map(Some).collect();
    let mut random = Random::new(seed);
    let mut samples = Vec::new();
    for repeat in 0..turns.repeats {
        for job in random.order(jobs.len()) {
            let job = &jobs[job];
            let order = random.order(contenders.len());
            let seed = random.bits() >> 32;
            for index in order {
                wait_for_calm(&watched, Duration::from_secs(turns.calm))?;
                let contender = &mut *contenders[index];
                let sample = measure(contender, job, timing, seed, &all)
                    .with_context(|| format!("{}, {}", contender.name(), job.name))?;
                eprintln!(
                    "{repeat} {:<14} {:<16} {:>9.0} IOPS {:>8.1} us  CPU {:>6.1} us/io, {:.1} of it the client's  others {:.2} cores",
                    job.name,
                    sample.target,
                    sample.iops,
                    sample.mean_us,
                    total_cpu(&sample),
                    sample.client_cpu_us_per_io,
                    sample.others_cores,
                );
                samples.push(Sample { repeat, ..sample });
            }
        }
    }
    Ok(samples)
}

/// `all`: the processes of all contenders, in order.
fn measure(
    contender: &mut dyn Contender,
    job: &Job,
    timing: Timing,
    seed: u64,
    all: &[u32],
) -> Result<Sample> {
    let watched: Vec<Option<u32>> = all.iter().copied().map(Some).collect();
    let mut snapshots = Vec::with_capacity(2);
    let mut probe = || snapshots.push(Snapshot::take(&watched));
    let figures = contender.measure(job, timing, seed, &mut probe)?;
    let [begin, end] = <[Result<Snapshot>; 2]>::try_from(snapshots)
        .map_err(|snapshots| anyhow::anyhow!("{} snapshots of a run", snapshots.len()))?;
    let used = end?.since(&begin?);
    let its = contender.pids();
    let (mut daemons, mut idle) = (Duration::ZERO, Duration::ZERO);
    for (pid, cpu) in all.iter().zip(&used.daemons) {
        let sum = if its.contains(pid) {
            &mut daemons
        } else {
            &mut idle
        };
        *sum += *cpu;
    }
    let ios = figures.ios as f64;
    let iops = ios / figures.elapsed.as_secs_f64();
    let us_per_io = |cpu: Duration| cpu.as_secs_f64() * 1e6 / ios;
    Ok(Sample {
        job: job.name,
        target: contender.name().to_owned(),
        repeat: 0,
        iops,
        mib_per_s: iops * job.block as f64 / f64::from(1 << 20),
        mean_us: figures.mean_us,
        p50_us: figures.p50_us,
        p99_us: figures.p99_us,
        cpu_us_per_io: us_per_io(daemons),
        client_cpu_us_per_io: us_per_io(figures.fio_cpu.unwrap_or(used.client)),
        others_cores: used.cores(used.others),
        idle_targets_cores: used.cores(idle),
        steal_cores: used.cores(used.steal),
    })
}

/// Of all daemons and the client, for one I/O.
fn total_cpu(sample: &Sample) -> f64 {
    sample.cpu_us_per_io + sample.client_cpu_us_per_io
}

/// A line of an issue.
pub struct Line {
    pub job: &'static str,
    pub measure: Measure,
    /// The bound of the ratio to the other; for [`Measure::Cpu`] microseconds, of all daemons and the client.
    pub bound: f64,
}

/// What came of it: every contender, then `lines` about `of`, which is compared with `against`.
#[must_use]
pub fn markdown(samples: &[Sample], jobs: &[Job], of: &str, against: &str, lines: &[Line]) -> String {
    let mut text = format!(
        "| job | of | IOPS, median (min to max) | mean us | p50 us | p99 us | CPU us per I/O, daemons and client | the client's | rate of {against}'s | latency of {against}'s |\n\
         |---|---|---|---|---|---|---|---|---|---|\n"
    );
    for job in jobs {
        for (title, target) in [(job.title, against), ("", of)] {
            row(&mut text, samples, job.name, title, target, against);
        }
    }
    let others = Spread::of(samples.iter().map(|sample| sample.others_cores));
    if let Some(others) = others {
        let _ = writeln!(
            text,
            "\n{} runs. CPU of everything else during a run: median {:.2} cores, up to {:.2}.\n",
            samples.len(),
            others.median,
            others.max
        );
    }
    text.push_str(
        "| issue 4 | of | wanted | measured, median (min to max) of the repeats | |\n|---|---|---|---|---|\n",
    );
    for line in lines {
        let of_it = samples
            .iter()
            .filter(|sample| sample.job == line.job && sample.target == of);
        let found = match line.measure {
            Measure::Cpu => Spread::of(of_it.map(total_cpu)),
            measure => ratio_of(samples, line.job, of, against, |sample| measure.of(sample)),
        };
        let Some(found) = found else { continue };
        let (word, is_met) = line.measure.judge(found.median, line.bound);
        let unit = match line.measure {
            Measure::Cpu => "us, all daemons and the client".to_owned(),
            _ => format!("times {against}'s"),
        };
        let _ = writeln!(
            text,
            "| {} | {} | {word} {:.3} {unit} | {:.2} ({:.2} to {:.2}) | {} |",
            line.job,
            line.measure.name(),
            line.bound,
            found.median,
            found.min,
            found.max,
            verdict(is_met)
        );
    }
    text
}

/// In tables of what is wanted.
#[must_use]
pub fn verdict(is_met: bool) -> &'static str {
    if is_met { "met" } else { "**missed**" }
}

fn row(text: &mut String, samples: &[Sample], job: &str, title: &str, target: &str, against: &str) {
    let of_it = || {
        samples
            .iter()
            .filter(|sample| sample.job == job && sample.target == target)
    };
    let cell = |value: fn(&Sample) -> Option<f64>| {
        Spread::of(of_it().filter_map(value)).map_or_else(|| "-".to_owned(), |found| figure(found.median))
    };
    let Some(rate) = Spread::of(of_it().map(|sample| sample.iops)) else {
        return;
    };
    let ratio = |value: fn(&Sample) -> f64| {
        ratio_of(samples, job, target, against, value)
            .map_or_else(|| "-".to_owned(), |found| format!("{:.2}", found.median))
    };
    let _ = writeln!(
        text,
        "| {title} | {target} | {} ({} to {}) | {} | {} | {} | {} | {} | {} | {} |",
        figure(rate.median),
        figure(rate.min),
        figure(rate.max),
        cell(|sample| Some(sample.mean_us)),
        cell(|sample| sample.p50_us),
        cell(|sample| sample.p99_us),
        cell(|sample| Some(total_cpu(sample))),
        cell(|sample| Some(sample.client_cpu_us_per_io)),
        ratio(|sample| sample.iops),
        ratio(|sample| sample.mean_us),
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(target: &str, repeat: u32, iops: f64) -> Sample {
        Sample {
            job: "randwrite-d1",
            target: target.to_owned(),
            repeat,
            iops,
            mib_per_s: iops / 256.0,
            mean_us: 1e6 / iops,
            p50_us: Some(1.0),
            p99_us: None,
            cpu_us_per_io: 40.0,
            client_cpu_us_per_io: 15.0,
            others_cores: 0.1,
            idle_targets_cores: 0.0,
            steal_cores: 0.0,
        }
    }

    #[test]
    fn lines_are_judged_by_neighbours_and_cpu_by_its_sum() {
        let samples = [
            sample("local", 0, 100.0),
            sample("hosts", 0, 50.0),
            sample("hosts", 1, 25.0), // the machine is half as fast now
            sample("local", 1, 50.0),
        ];
        let line = |measure, bound| Line {
            job: "randwrite-d1",
            measure,
            bound,
        };
        let lines = [
            line(Measure::Rate, 0.5),
            line(Measure::Latency, 1.9),
            line(Measure::Cpu, 55.0),
            line(Measure::Cpu, 54.0),
        ];
        let text = markdown(&samples, &small_jobs(1 << 30), "hosts", "local", &lines);
        for row in [
            "| at least 0.500 times local's | 0.50 (0.50 to 0.50) | met |",
            "| at most 1.900 times local's | 2.00 (2.00 to 2.00) | **missed** |",
            "| at most 55.000 us, all daemons and the client | 55.00 (55.00 to 55.00) | met |",
            "| at most 54.000 us, all daemons and the client | 55.00 (55.00 to 55.00) | **missed** |",
        ] {
            assert!(text.contains(row), "{text}");
        }
        assert!(text.contains("|  | hosts | 37.5 (25.0 to 50.0) |"), "{text}");
    }
}
