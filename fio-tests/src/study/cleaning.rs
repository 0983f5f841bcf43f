//! A log that is nearly full and overwritten at random: every write must be paid for by cleaning.
//!
//! For each fullness and each law of popularity a disk of its own: filled once in random order to that share of what
//! it can store, then overwritten at depth 32 for some seconds. Looked at second by second.

use std::fmt::Write;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde::Serialize;
use types::ByteSize;

use super::bed::{Bed, Until, Wanted};
use super::watch::{Amplification, Sample, Watch};
use super::{Common, Scene};
use crate::client::Next;
use crate::job::{Op, PAGE};
use crate::permutation::Permutation;
use crate::picture::{Line, Panel, Picture, Scale};
use crate::random::Random;
use crate::report::{Spread, figure};
use crate::timeline::{Second, Timeline, later_half};
use crate::zipf::Zipf;

const EXPONENT: f64 = 0.99;

/// Samples are a second apart.
const INTERVAL_MIN_S: f64 = 0.5;

/// Which blocks are overwritten.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Law {
    /// Each as likely.
    Uniform,
    /// By popularity; the popular ones lie anywhere.
    Zipf,
}

impl Law {
    fn name(self) -> &'static str {
        match self {
            Law::Uniform => "uniform",
            Law::Zipf => "Zipf 0.99",
        }
    }
}

impl FromStr for Law {
    type Err = String;

    fn from_str(text: &str) -> Result<Law, String> {
        match text {
            "uniform" => Ok(Law::Uniform),
            "zipf" => Ok(Law::Zipf),
            _ => Err(format!("'{text}' is neither uniform nor zipf")),
        }
    }
}

/// See [`super::Study::Cleaning`].
#[derive(Debug, Args)]
pub struct Options {
    #[command(flatten)]
    common: Common,
    /// Bytes of the disk
    #[arg(long, value_name = "SIZE", default_value = "2GiB")]
    span: ByteSize,
    /// How full, in percent of what the disk says it can store
    #[arg(long, value_delimiter = ',', default_value = "80,95")]
    full: Vec<u32>,
    /// Some of uniform, zipf
    #[arg(long, value_delimiter = ',', default_value = "uniform,zipf")]
    laws: Vec<Law>,
    /// Of overwriting, each
    #[arg(long, default_value_t = 120)]
    seconds: u64,
    /// Draw the picture here (SVG)
    #[arg(long, value_name = "FILE")]
    picture: Option<PathBuf>,
}

#[derive(Serialize)]
struct Run {
    full: u32,
    law: Law,
    vdi_bytes: u64,
    ios: u64,
    seconds: Vec<Second>,
    samples: Vec<Sample>,
}

pub fn run(options: &Options) -> Result<()> {
    ensure!(
        options.full.iter().all(|full| (1..=100).contains(full)) && options.seconds > 0,
        "--full is 1 to 100 percent, --seconds more than 0"
    );
    let scene = Scene::set(&options.common)?;
    let mut runs = Vec::new();
    for &full in &options.full {
        for &law in &options.laws {
            runs.push(one(&scene, options, full, law)?);
        }
    }
    scene.report(&markdown(options, &runs), &runs)?;
    if let Some(path) = &options.picture {
        let text = picture(options, &runs).svg();
        std::fs::write(path, text).with_context(|| path.display().to_string())?;
    }
    Ok(())
}

fn one(scene: &Scene, options: &Options, full: u32, law: Law) -> Result<Run> {
    let name = format!("{full} % full, {}", law.name());
    let mut bed = Bed::make(
        &scene.place,
        &Wanted {
            name: &format!(
                "cleaning-{full}-{}",
                if law == Law::Zipf { "zipf" } else { "uniform" }
            ),
            disk_bytes: options.span.0,
            vdi_bytes: &|capacity| capacity / 100 * u64::from(full),
            config: None,
            seed: scene.seed,
        },
    )?;
    let blocks = bed.order.count();
    bed.fill(&format!("cleaning, {name}: random fill"), blocks)?;
    let watch = Watch::start(&bed.weft);
    let begin = Instant::now();
    let mut timeline = Timeline::new(begin, Duration::from_secs(1));
    let length = Duration::from_secs(options.seconds);
    let title = format!("cleaning, {name}: overwriting");
    let offsets = offsets(law, blocks, scene.seed + 1);
    let result = bed.blocks(
        &title,
        Op::Write,
        Until::Time(length),
        offsets,
        |now, latencies| {
            timeline.record(now, latencies);
            Next::GoOn
        },
    );
    let end = Instant::now();
    let samples = watch.finish();
    result?;
    // All of it once more, in an order of its own: whatever cleaning moved must still be what was written.
    verify(&mut bed, scene.seed + 2)?;
    let ios = timeline.total();
    let vdi_bytes = bed.bytes;
    bed.remove()?;
    Ok(Run {
        full,
        law,
        vdi_bytes,
        ios,
        seconds: timeline.finish(end),
        samples: samples?,
    })
}

fn offsets(law: Law, blocks: u64, seed: u64) -> Box<dyn Iterator<Item = u64>> {
    let mut random = Random::new(seed);
    match law {
        Law::Uniform => Box::new(std::iter::repeat_with(move || random.below(blocks) * PAGE)),
        Law::Zipf => {
            let (zipf, places) = (Zipf::new(blocks, EXPONENT), Permutation::new(blocks, seed));
            Box::new(std::iter::repeat_with(move || {
                places.of(zipf.rank(&mut random)) * PAGE
            }))
        }
    }
}

/// Reads the VDI from end to end; the client checks every block.
fn verify(bed: &mut Bed, seed: u64) -> Result<()> {
    let (order, count) = (Permutation::new(bed.order.count(), seed), bed.order.count());
    let offsets = (0..count).map(move |at| order.of(at) * PAGE);
    bed.blocks(
        "cleaning: reading everything",
        Op::Read,
        Until::Count(count),
        offsets,
        |_, _| Next::GoOn,
    )
}

/// Amplification over time, from neighbouring samples: (end of the interval, value). The last sample may come right
/// behind its neighbour: so short an interval says nothing.
fn amplification(samples: &[Sample]) -> Vec<(f64, Amplification)> {
    let pairs = samples.windows(2);
    pairs
        .filter(|pair| pair[1].at - pair[0].at > INTERVAL_MIN_S)
        .filter_map(|pair| Some((pair[1].at, Amplification::between(&pair[0], &pair[1])?)))
        .collect()
}

fn markdown(options: &Options, runs: &[Run]) -> String {
    let mut text = String::new();
    let _ = writeln!(
        text,
        "Disk of {}, VDI filled once in random order, then overwritten in 4 KiB at depth 32 for {} s. Rates, latencies and \
         amplifications of the second half of that time.\n",
        options.span, options.seconds,
    );
    text.push_str(
        "| full | overwritten | VDI, times overwritten | first second, IOPS | IOPS, median (min to max) | p50 of p99s, worst p99, slowest, ms | \
         write amplification: cleaning | with headers | at the device | free segments at least |\n\
         |---|---|---|---|---|---|---|---|---|---|\n",
    );
    for run in runs {
        let later = later_half(&run.seconds);
        let iops = Spread::of(later.iter().map(|second| second.iops));
        let p99 = Spread::of(later.iter().map(|second| second.p99_us / 1e3));
        let slowest = run
            .seconds
            .iter()
            .map(|second| second.max_us / 1e3)
            .fold(0.0, f64::max);
        let middle = &run.samples[run.samples.len() / 2];
        let whole = run
            .samples
            .last()
            .and_then(|end| Amplification::between(middle, end));
        let free = run
            .samples
            .iter()
            .map(|sample| sample.segments_free)
            .fold(f64::MAX, f64::min);
        let (Some(iops), Some(p99)) = (iops, p99) else {
            continue;
        };
        let amplification = whole.map_or_else(
            || "- | - | -".to_owned(),
            |found| format!("{:.2} | {:.2} | {:.2}", found.store, found.log, found.device),
        );
        let _ = writeln!(
            text,
            "| {} % | {} | {}, {:.1} | {} | {} ({} to {}) | {:.1}, {:.1}, {slowest:.0} | {amplification} | {free:.0} |",
            run.full,
            run.law.name(),
            ByteSize(run.vdi_bytes),
            run.ios as f64 * PAGE as f64 / run.vdi_bytes as f64,
            run.seconds
                .first()
                .map_or_else(String::new, |first| figure(first.iops)),
            figure(iops.median),
            figure(iops.min),
            figure(iops.max),
            p99.median,
            p99.max,
        );
    }
    let stalls: Vec<String> = runs
        .iter()
        .map(|run| {
            let empty = run.seconds.iter().filter(|second| second.iops == 0.0).count();
            format!("{empty} at {} % {}", run.full, run.law.name())
        })
        .collect();
    let _ = writeln!(
        text,
        "\nSeconds in which nothing completed: {}. Afterwards every block was read and checked.",
        stalls.join(", ")
    );
    text
}

fn picture(options: &Options, runs: &[Run]) -> Picture {
    let lines = |points: &dyn Fn(&Run) -> Vec<(f64, f64)>| -> Vec<Line> {
        runs.iter()
            .map(|run| Line {
                name: format!("{} %, {}", run.full, run.law.name()),
                points: points(run),
            })
            .collect()
    };
    let of_seconds = |run: &Run, value: fn(&Second) -> f64| -> Vec<(f64, f64)> {
        run.seconds
            .iter()
            .map(|second| (second.at, value(second)))
            .collect()
    };
    Picture {
        title: format!("4 KiB random overwrites at depth 32, disk of {}", options.span),
        x_name: "seconds".to_owned(),
        panels: vec![
            Panel {
                title: "IOPS".to_owned(),
                scale: Scale::Linear,
                lines: lines(&|run| of_seconds(run, |second| second.iops)),
            },
            Panel {
                title: "write amplification: bytes appended by guests and cleaning, per byte of guests"
                    .to_owned(),
                scale: Scale::Linear,
                lines: lines(&|run| {
                    let all = amplification(&run.samples);
                    all.into_iter().map(|(at, found)| (at, found.store)).collect()
                }),
            },
            Panel {
                title: "p99 latency of each second, ms".to_owned(),
                scale: Scale::Logarithmic,
                lines: lines(&|run| of_seconds(run, |second| second.p99_us / 1e3)),
            },
        ],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_laws_stay_on_the_disk_and_zipf_is_skewed() {
        let blocks = 10_000;
        let distinct = |law| {
            let mut seen: Vec<u64> = offsets(law, blocks, 1).take(10_000).collect();
            assert!(
                seen.iter()
                    .all(|offset| offset % PAGE == 0 && offset / PAGE < blocks)
            );
            seen.sort_unstable();
            seen.dedup();
            seen.len()
        };
        let (uniform, zipf) = (distinct(Law::Uniform), distinct(Law::Zipf));
        // Of n draws from n blocks, 1 - 1/e are distinct.
        assert!((6_150..6_500).contains(&uniform), "{uniform}");
        assert!(zipf < 4_500, "{zipf}");
    }

    #[test]
    fn amplification_over_time_has_a_point_for_each_interval_with_writes() {
        let sample = |at, written, cleaned| Sample {
            at,
            written,
            cleaned,
            ..Sample::default()
        };
        let samples = [
            sample(0.0, 0.0, 0.0),
            sample(1.0, 100.0, 0.0),
            sample(2.0, 100.0, 50.0),
            sample(3.0, 200.0, 250.0),
            sample(3.1, 201.0, 450.0),
        ];
        let found: Vec<(f64, f64)> = amplification(&samples)
            .into_iter()
            .map(|(at, found)| (at, found.store))
            .collect();
        assert_eq!(found, [(1.0, 1.0), (3.0, 3.0)]);
    }
}
