//! Does the memory setting hold?
//!
//! The blocks of a VDI are written in random order, so that the index is as large and as cold as it can be: every
//! leaf is touched again and again, and the cache holds a fraction of them. Then some are overwritten, and read; and
//! overwritten once more by a daemon that was killed and has recovered.

use std::fmt::Write;
use std::time::Instant;

use anyhow::{Result, ensure};
use clap::Args;
use serde::Serialize;
use types::ByteSize;

use super::bed::{Bed, Until, Wanted, disk_for};
use super::watch::{Sample, Watch};
use super::{Common, Scene, mib};
use crate::client::{LoadClient, Next};
use crate::job::{Op, PAGE};
use crate::random::Random;
use crate::weft::{Memory, memory};

/// What deploy/blockd.toml says the daemon takes beside its settings.
const BESIDE: u64 = 64 << 20;

/// See [`super::Study::Memory`].
#[derive(Debug, Args)]
pub struct Options {
    #[command(flatten)]
    common: Common,
    /// Bytes of the VDI
    #[arg(long, value_name = "SIZE", default_value = "2GiB")]
    span: ByteSize,
    /// How much of it is written: 0.5 is every second block, anywhere
    #[arg(long, default_value_t = 0.5)]
    filled: f64,
    /// Then overwritten, and then read, as a share of what is written
    #[arg(long, default_value_t = 0.25)]
    again: f64,
    /// blockd's setting `cache`
    #[arg(long, value_name = "SIZE", default_value = "256MiB")]
    cache: ByteSize,
    /// blockd's setting `buffers`
    #[arg(long, value_name = "SIZE", default_value = "64MiB")]
    buffers: ByteSize,
    /// Bytes of the disk [default: 1.4 times what is written, and 512MiB]
    #[arg(long, value_name = "SIZE")]
    disk: Option<ByteSize>,
}

#[derive(Serialize)]
struct Figures {
    span: u64,
    written: u64,
    cache: u64,
    buffers: u64,
    bound: u64,
    phases: Vec<Phase>,
}

#[derive(Serialize)]
struct Phase {
    name: &'static str,
    ios: u64,
    samples: Vec<Sample>,
}

impl Phase {
    fn seconds(&self) -> f64 {
        self.samples.last().map_or(0.0, |sample| sample.at)
    }

    fn anonymous_max(&self) -> u64 {
        let most = self.samples.iter().map(|sample| sample.anonymous_max);
        most.max().unwrap_or(0)
    }

    fn most(&self, figure: fn(&Sample) -> f64) -> f64 {
        self.samples.iter().map(figure).fold(0.0, f64::max)
    }
}

pub fn run(options: &Options) -> Result<()> {
    ensure!(
        options.filled > 0.0 && options.filled <= 1.0 && (0.0..=10.0).contains(&options.again),
        "--filled is more than 0 and at most 1, --again 0 to 10"
    );
    let scene = Scene::set(&options.common)?;
    let blocks = (options.span.0 as f64 * options.filled) as u64 / PAGE;
    let config = format!(
        "cache = \"{}\"\nbuffers = \"{}\"\n",
        options.cache.0, options.buffers.0
    );
    let mut bed = Bed::make(
        &scene.place,
        &Wanted {
            name: "memory",
            disk_bytes: options.disk.map_or(disk_for(blocks * PAGE), |disk| disk.0),
            vdi_bytes: &|_| options.span.0,
            config: Some(&config),
            seed: scene.seed,
        },
    )?;
    let again = (blocks as f64 * options.again) as u64;
    let mut phases = vec![watched(&mut bed, "before", 0, |_| Ok(()))?];
    phases.push(watched(&mut bed, "random fill", blocks, |bed| {
        bed.fill("memory: random fill", blocks)
    })?);
    phases.push(watched(&mut bed, "random overwrite", again, |bed| {
        random_blocks(
            bed,
            "memory: random overwrite",
            Op::Write,
            blocks,
            again,
            scene.seed,
        )
    })?);
    phases.push(watched(&mut bed, "random read", again, |bed| {
        random_blocks(
            bed,
            "memory: random read",
            Op::Read,
            blocks,
            again,
            scene.seed + 1,
        )
    })?);
    // Recovery has memory of its own, and what it gave back the allocator may keep.
    phases.push(restart(&mut bed)?);
    phases.push(watched(&mut bed, "random overwrite", again, |bed| {
        random_blocks(
            bed,
            "memory: after SIGKILL",
            Op::Write,
            blocks,
            again,
            scene.seed + 2,
        )
    })?);
    let figures = Figures {
        span: options.span.0,
        written: blocks * PAGE,
        cache: options.cache.0,
        buffers: options.buffers.0,
        bound: options.cache.0 + options.buffers.0 + BESIDE,
        phases,
    };
    scene.report(&figures.markdown(), &figures)
}

fn watched(
    bed: &mut Bed,
    name: &'static str,
    ios: u64,
    load: impl FnOnce(&mut Bed) -> Result<()>,
) -> Result<Phase> {
    let watch = Watch::start(&bed.weft);
    let result = load(bed);
    let samples = watch.finish();
    result?;
    Ok(Phase {
        name,
        ios,
        samples: samples?,
    })
}

/// SIGKILL and start; looks at the memory until a client can connect.
fn restart(bed: &mut Bed) -> Result<Phase> {
    bed.weft.kill();
    let begin = Instant::now();
    bed.weft.start_again(&[])?;
    let (pid, socket) = (bed.weft.pid(), bed.weft.guest_socket("study"));
    let mut most = Memory::default();
    bed.client = bed.weft.daemon().wait_for(|| {
        let now = memory(pid)?;
        if now.anonymous > most.anonymous {
            most = now;
        }
        LoadClient::connect(&socket)
    })?;
    Ok(Phase {
        name: "SIGKILL and start",
        ios: 0,
        samples: vec![Sample {
            at: begin.elapsed().as_secs_f64(),
            memory: most,
            anonymous_max: most.anonymous,
            ..Sample::default()
        }],
    })
}

/// At any of the first `blocks` blocks of the order, `count` times.
fn random_blocks(bed: &mut Bed, title: &str, op: Op, blocks: u64, count: u64, seed: u64) -> Result<()> {
    let order = bed.order.clone();
    let mut random = Random::new(seed);
    let offsets = std::iter::repeat_with(move || order.of(random.below(blocks)) * PAGE);
    bed.blocks(title, op, Until::Count(count), offsets, |_, _| Next::GoOn)
}

impl Figures {
    fn markdown(&self) -> String {
        let mut text = String::new();
        let _ = writeln!(
            text,
            "VDI of {}, {} written in random order. Settings: `cache` {}, `buffers` {}; with {} beside them the bound is {}.\n",
            ByteSize(self.span),
            ByteSize(self.written),
            ByteSize(self.cache),
            ByteSize(self.buffers),
            ByteSize(BESIDE),
            ByteSize(self.bound),
        );
        text.push_str(
            "| phase | I/Os | seconds | I/Os a second | anonymous memory at most, MiB | of the bound | leaves in memory, MiB | checkpoints | buffers from the heap |\n\
             |---|---|---|---|---|---|---|---|---|\n",
        );
        for phase in &self.phases {
            let _ = writeln!(
                text,
                "| {} | {} | {:.0} | {:.0} | {} | {:.2} | {} | {:.0} | {:.0} |",
                phase.name,
                phase.ios,
                phase.seconds(),
                phase.ios as f64 / phase.seconds().max(1e-3),
                mib(phase.anonymous_max() as f64),
                phase.anonymous_max() as f64 / self.bound as f64,
                mib(phase.most(|sample| sample.cached)),
                phase.most(|sample| sample.checkpoints),
                phase.most(|sample| sample.heap_buffers),
            );
        }
        let most = self.phases.iter().map(Phase::anonymous_max).max().unwrap_or(0);
        let verdict = if most <= self.bound {
            "holds"
        } else {
            "DOES NOT HOLD"
        };
        let _ = writeln!(
            text,
            "\nAt most {} MiB of {} MiB: the setting {verdict}.",
            mib(most as f64),
            mib(self.bound as f64)
        );
        text
    }
}
