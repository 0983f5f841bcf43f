//! Sequential reads of a log: as written in order, after every block was overwritten in random order, after the
//! daemon was left alone to clean, and after it was written in order again.

use std::fmt::Write;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use clap::Args;
use serde::Serialize;
use types::ByteSize;

use super::bed::{Bed, Wanted, disk_for};
use super::watch::{Amplification, Sample, Watch};
use super::{Common, Scene};
use crate::client::Timing;
use crate::job::{Job, Op, Pattern, Zone};
use crate::random::Random;
use crate::report::{Spread, figure};

const RAMP: Duration = Duration::from_millis(250);

/// Cleaning that moves nothing for so long has ended.
const QUIET: Duration = Duration::from_secs(5);

/// See [`super::Study::Aged`].
#[derive(Debug, Args)]
pub struct Options {
    #[command(flatten)]
    common: Common,
    /// Bytes of the VDI, written and read whole
    #[arg(long, value_name = "SIZE", default_value = "2GiB")]
    span: ByteSize,
    /// Length of one run
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// Runs in each state
    #[arg(long, default_value_t = 5)]
    repeats: u32,
    /// Longest wait for cleaning to end when the daemon is left alone, seconds
    #[arg(long, default_value_t = 300)]
    idle: u64,
    /// Bytes of the disk [default: 1.4 times the span, and 512MiB]
    #[arg(long, value_name = "SIZE")]
    disk: Option<ByteSize>,
}

#[derive(Serialize)]
struct State {
    name: &'static str,
    mib_per_s: Vec<f64>,
    p99_ms: Vec<f64>,
    /// How long it took to bring this state about.
    took_s: f64,
    /// Bytes that cleaning appended meanwhile.
    cleaned: f64,
    amplification: Option<Amplification>,
}

pub fn run(options: &Options) -> Result<()> {
    ensure!(
        options.seconds > 0.0 && options.repeats > 0,
        "--seconds and --repeats must be more than 0"
    );
    let scene = Scene::set(&options.common)?;
    let mut bed = Bed::make(
        &scene.place,
        &Wanted {
            name: "aged",
            disk_bytes: options.disk.map_or(disk_for(options.span.0), |disk| disk.0),
            vdi_bytes: &|_| options.span.0,
            config: None,
            seed: scene.seed,
        },
    )?;
    let blocks = bed.order.count();
    let whole = Zone {
        offset: 0,
        bytes: bed.bytes,
    };
    let mut random = Random::new(scene.seed);
    let mut states = Vec::new();
    let mut reach = |bed: &mut Bed, name, load: &mut dyn FnMut(&mut Bed) -> Result<()>| -> Result<()> {
        eprintln!("aged: {name}");
        let watch = Watch::start(&bed.weft);
        let begin = Instant::now();
        let result = load(bed);
        let took_s = begin.elapsed().as_secs_f64();
        let samples = watch.finish();
        result?;
        let samples = samples?;
        let mut state = state(name, took_s, &samples);
        for _ in 0..options.repeats {
            let (mib_per_s, p99_ms) = read(bed, options.seconds, random.bits())?;
            eprintln!("aged: {name}: {mib_per_s:.0} MiB/s");
            state.mib_per_s.push(mib_per_s);
            state.p99_ms.push(p99_ms);
        }
        states.push(state);
        Ok(())
    };
    reach(&mut bed, "written in order", &mut |bed| bed.client.fill(whole))?;
    reach(
        &mut bed,
        "overwritten in random order, every block once",
        &mut |bed| bed.fill("aged: random overwrite", blocks),
    )?;
    reach(&mut bed, "then left alone", &mut |bed| {
        wait_for_quiet(bed, Duration::from_secs(options.idle))
    })?;
    reach(&mut bed, "then written in order again", &mut |bed| {
        bed.client.fill(whole)
    })?;
    scene.report(&markdown(options, &states), &states)
}

fn state(name: &'static str, took_s: f64, samples: &[Sample]) -> State {
    let (Some(first), Some(last)) = (samples.first(), samples.last()) else {
        unreachable!("a watch has a first and a last sample");
    };
    State {
        name,
        mib_per_s: Vec::new(),
        p99_ms: Vec::new(),
        took_s,
        cleaned: last.cleaned - first.cleaned,
        amplification: Amplification::between(first, last),
    }
}

fn read(bed: &mut Bed, seconds: f64, seed: u64) -> Result<(f64, f64)> {
    let job = Job {
        name: "seqread",
        title: "1 MiB sequential read, depth 8",
        pattern: Pattern::Sequential,
        op: Op::Read,
        block: 1 << 20,
        depth: 8,
        zone: Zone {
            offset: 0,
            bytes: bed.bytes,
        },
    };
    let timing = Timing {
        ramp: RAMP,
        measured: Duration::from_secs_f64(seconds),
    };
    let mut outcome = None;
    let result = bed
        .client
        .run(&job, timing, seed, || {})
        .map(|found| outcome = Some(found));
    bed.weft.explain("sequential read", result)?;
    let outcome = outcome.expect("it succeeded");
    Ok((
        outcome.ios as f64 / outcome.elapsed.as_secs_f64(),
        outcome.latency.value_at_quantile(0.99) as f64 / 1e6,
    ))
}

/// Waits until cleaning has moved nothing for a while; fails if that takes too long.
fn wait_for_quiet(bed: &mut Bed, longest: Duration) -> Result<()> {
    let begin = Instant::now();
    let mut since = begin;
    let mut moved = None;
    while since.elapsed() < QUIET {
        ensure!(
            begin.elapsed() < longest,
            "cleaning has not ended after {longest:?} of idling: choose a longer --idle"
        );
        std::thread::sleep(Duration::from_millis(250));
        let now = bed.weft.metrics()?.get("weft_disk_cleaned_bytes_total")?;
        if moved.replace(now) != Some(now) {
            since = Instant::now();
        }
    }
    Ok(())
}

fn markdown(options: &Options, states: &[State]) -> String {
    let mut text = String::new();
    let _ = writeln!(
        text,
        "VDI of {}, 1 MiB sequential reads at depth 8 over all of it, {} runs of {} s in each state.\n",
        options.span, options.repeats, options.seconds
    );
    text.push_str(
        "| state | MiB/s, median (min to max) | of the first | p99 ms | took s | cleaned, MiB | write amplification: cleaning, at the device |\n\
         |---|---|---|---|---|---|---|\n",
    );
    let first = states
        .first()
        .and_then(|state| Spread::of(state.mib_per_s.iter().copied()));
    for state in states {
        let rate = Spread::of(state.mib_per_s.iter().copied());
        let p99 = Spread::of(state.p99_ms.iter().copied());
        let (Some(rate), Some(p99), Some(first)) = (rate, p99, first) else {
            continue;
        };
        let amplification = state.amplification.map_or_else(
            || "-".to_owned(),
            |found| format!("{:.2}, {:.2}", found.store, found.device),
        );
        let _ = writeln!(
            text,
            "| {} | {} ({} to {}) | {:.2} | {:.1} | {:.0} | {} | {amplification} |",
            state.name,
            figure(rate.median),
            figure(rate.min),
            figure(rate.max),
            rate.median / first.median,
            p99.median,
            state.took_s,
            super::mib(state.cleaned),
        );
    }
    text
}
