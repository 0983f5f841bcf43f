//! The run: start, fill, settle; then job by job all targets in turn, in seeded random order, over and over.
//!
//! Neighbouring runs of a job see the same machine, so their ratio holds when the machine's own speed drifts.
//! CPU of everything else on the machine is measured with each run, and a run waits for the machine to be calm.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::Serialize;

use crate::client::Timing;
use crate::cpu;
use crate::job::Job;
use crate::random::Random;
use crate::target::{Figures, Target};

/// Others' CPU up to this share of one core count as calm.
const CALM: f64 = 0.15;

/// How long one look at the machine's calm takes.
const CALM_LOOK: Duration = Duration::from_millis(250);

/// Longest wait for daemons to finish what a fill left them to do.
const SETTLE: Duration = Duration::from_secs(30);

/// How to run.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Of each run.
    pub timing: Timing,
    /// Runs of each job on each target.
    pub repeats: u32,
    /// Decides offsets and order.
    pub seed: u64,
    /// Longest wait for a calm machine before each run.
    pub calm_wait: Duration,
}

/// One run of one job on one target.
#[derive(Clone, Debug, Serialize)]
pub struct Sample {
    /// The job's name.
    pub job: &'static str,
    /// The target's name.
    pub target: String,
    /// Which repeat, from 0: samples of one repeat are neighbours in time.
    pub repeat: u32,
    /// I/Os a second.
    pub iops: f64,
    /// MiB a second.
    pub mib_per_s: f64,
    /// Mean latency in microseconds.
    pub mean_us: f64,
    /// Median latency in microseconds.
    pub p50_us: Option<f64>,
    /// 99th percentile in microseconds.
    pub p99_us: Option<f64>,
    /// CPU of the daemon (for `raw`, of fio) per I/O in microseconds.
    pub cpu_us_per_io: f64,
    /// CPU of the load client per I/O in microseconds.
    pub client_cpu_us_per_io: f64,
    /// CPU of all processes and interrupts that are not the target, the client or an idle target: cores.
    pub others_cores: f64,
    /// CPU of the targets that were not under load: cores.
    pub idle_targets_cores: f64,
    /// CPU that the hypervisor withheld: cores.
    pub steal_cores: f64,
}

/// All samples, and what the daemons used outside their own turns.
#[derive(Debug, Serialize)]
pub struct Results {
    /// In the order they were taken.
    pub samples: Vec<Sample>,
    /// CPU seconds of each daemon while others were under load, after the fill.
    pub background_cpu_s: Vec<(String, f64)>,
}

/// Fills all targets and runs `jobs`. Progress goes to standard error.
pub fn run(targets: &mut [Target], jobs: &[Job], plan: Plan, span: u64) -> Result<Results> {
    let pids: Vec<Option<u32>> = targets.iter().map(Target::pid).collect();
    for target in &mut *targets {
        let start = Instant::now();
        target.fill(span)?;
        if target.pid().is_some() {
            let mib_per_s = (span >> 20) as f64 / start.elapsed().as_secs_f64();
            eprintln!("fill {}: {mib_per_s:.0} MiB/s", target.kind.name());
        }
    }
    settle(&pids)?;

    let mut random = Random::new(plan.seed);
    let mut samples = Vec::new();
    let begin = Snapshot::take(&pids)?;
    let mut own_turns = vec![Duration::ZERO; targets.len()];
    for repeat in 0..plan.repeats {
        for job in random.order(jobs.len()) {
            let job = &jobs[job];
            let target_order = random.order(targets.len());
            let seed = random.bits() >> 32;
            for index in target_order {
                wait_for_calm(&pids, plan.calm_wait)?;
                let before = Snapshot::take(&pids)?;
                let sample = measure(&mut targets[index], index, job, plan.timing, seed, &pids)?;
                own_turns[index] += Snapshot::take(&pids)?.daemons[index] - before.daemons[index];
                eprintln!("{}", progress(repeat, &sample));
                samples.push(Sample { repeat, ..sample });
            }
        }
    }
    let end = Snapshot::take(&pids)?;
    let background_cpu_s = (0..targets.len())
        .filter(|&index| pids[index].is_some())
        .map(|index| {
            let total = end.daemons[index] - begin.daemons[index];
            (
                targets[index].kind.name(),
                total.saturating_sub(own_turns[index]).as_secs_f64(),
            )
        })
        .collect();
    Ok(Results {
        samples,
        background_cpu_s,
    })
}

fn measure(
    target: &mut Target,
    index: usize,
    job: &Job,
    timing: Timing,
    seed: u64,
    pids: &[Option<u32>],
) -> Result<Sample> {
    let mut snapshots = Vec::with_capacity(2);
    let figures = target.measure(job, timing, seed, || snapshots.push(Snapshot::take(pids)))?;
    let [begin, end] = <[Result<Snapshot>; 2]>::try_from(snapshots)
        .map_err(|snapshots| anyhow::anyhow!("{} snapshots of a run", snapshots.len()))?;
    Ok(sample(
        target.kind.name(),
        job,
        &figures,
        &end?.since(&begin?),
        index,
    ))
}

fn sample(target: String, job: &Job, figures: &Figures, used: &Used, index: usize) -> Sample {
    let ios = figures.ios as f64;
    let iops = ios / figures.elapsed.as_secs_f64();
    let us_per_io = |cpu: Duration| cpu.as_secs_f64() * 1e6 / ios;
    let idle = used
        .daemons
        .iter()
        .enumerate()
        .filter(|(other, _)| *other != index)
        .map(|(_, cpu)| *cpu)
        .sum();
    Sample {
        job: job.name,
        target,
        repeat: 0,
        iops,
        mib_per_s: iops * job.block as f64 / f64::from(1 << 20),
        mean_us: figures.mean_us,
        p50_us: figures.p50_us,
        p99_us: figures.p99_us,
        cpu_us_per_io: us_per_io(figures.fio_cpu.unwrap_or(used.daemons[index])),
        client_cpu_us_per_io: us_per_io(used.client),
        others_cores: used.cores(used.others),
        idle_targets_cores: used.cores(idle),
        steal_cores: used.cores(used.steal),
    }
}

fn progress(repeat: u32, sample: &Sample) -> String {
    format!(
        "{repeat} {:<14} {:<7} {:>9.0} IOPS {:>6.0} MiB/s {:>8.1} us  daemon {:>6.1} us/io  \
         others {:.2}, idle targets {:.2}, steal {:.2} cores",
        sample.job,
        sample.target,
        sample.iops,
        sample.mib_per_s,
        sample.mean_us,
        sample.cpu_us_per_io,
        sample.others_cores,
        sample.idle_targets_cores,
        sample.steal_cores,
    )
}

/// Waits until no daemon uses more than a twentieth of a core: writes complete before all their work is done.
fn settle(pids: &[Option<u32>]) -> Result<()> {
    let start = Instant::now();
    while start.elapsed() < SETTLE {
        let used = look(pids)?;
        if used.daemons.iter().all(|&cpu| used.cores(cpu) < 0.05) {
            return Ok(());
        }
    }
    eprintln!("the daemons are still busy {SETTLE:?} after the fill");
    Ok(())
}

/// Waits until nothing but these processes and our own uses much CPU, but not for ever.
pub(crate) fn wait_for_calm(pids: &[Option<u32>], longest: Duration) -> Result<()> {
    let start = Instant::now();
    while start.elapsed() < longest {
        let used = look(pids)?;
        if used.cores(used.others) < CALM {
            break;
        }
    }
    Ok(())
}

/// What was used over a short while of idling.
fn look(pids: &[Option<u32>]) -> Result<Used> {
    let begin = Snapshot::take(pids)?;
    std::thread::sleep(CALM_LOOK);
    Ok(Snapshot::take(pids)?.since(&begin))
}

/// CPU time at one moment.
pub(crate) struct Snapshot {
    at: Instant,
    machine: cpu::Machine,
    /// By target; nothing for those without a daemon.
    daemons: Vec<Duration>,
    client: Duration,
    /// fio, once it has ended.
    children: Duration,
}

/// CPU time between two moments.
pub(crate) struct Used {
    elapsed: Duration,
    pub daemons: Vec<Duration>,
    pub client: Duration,
    pub others: Duration,
    pub steal: Duration,
}

impl Snapshot {
    pub fn take(pids: &[Option<u32>]) -> Result<Snapshot> {
        let daemon = |pid: &Option<u32>| match pid {
            Some(pid) => cpu::of_process(*pid).context("a daemon has ended"),
            None => Ok(Duration::ZERO),
        };
        Ok(Snapshot {
            at: Instant::now(),
            machine: cpu::of_machine()?,
            daemons: pids.iter().map(daemon).collect::<Result<_>>()?,
            client: cpu::of_process(std::process::id())?,
            children: cpu::of_ended_children(std::process::id())?,
        })
    }

    pub fn since(&self, begin: &Snapshot) -> Used {
        let daemons: Vec<Duration> = self
            .daemons
            .iter()
            .zip(&begin.daemons)
            .map(|(e, b)| *e - *b)
            .collect();
        let client = self.client - begin.client;
        let ours = daemons.iter().sum::<Duration>() + client + (self.children - begin.children);
        let busy = self.machine.busy.saturating_sub(begin.machine.busy);
        Used {
            elapsed: self.at - begin.at,
            client,
            others: busy.saturating_sub(ours),
            steal: self.machine.steal.saturating_sub(begin.machine.steal),
            daemons,
        }
    }
}

impl Used {
    pub fn cores(&self, cpu: Duration) -> f64 {
        cpu.as_secs_f64() / self.elapsed.as_secs_f64()
    }
}
