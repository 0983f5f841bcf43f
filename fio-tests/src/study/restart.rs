//! How long a guest waits when the daemon dies.
//!
//! SIGKILL comes in the middle of random overwrites, so that the log is ahead of the index by as much as it gets.
//! Then the daemon is started again, with the page cache as it is or dropped before, and four clocks run from the
//! moment of its start: it says READY=1, it answers a REST request, a client that connects completes a read, and
//! a write.

use std::fmt::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use clap::Args;
use serde::Serialize;
use types::ByteSize;

use super::bed::{Bed, Until, Wanted, disk_for};
use super::{Common, Scene};
use crate::client::{LoadClient, Next, Requests};
use crate::job::{Op, PAGE};
use crate::random::Random;
use crate::report::Spread;
use crate::weft::{ReadySocket, get, memory};

/// Issue 3's bound for all four clocks.
const WANTED_S: f64 = 3.0;

/// Between two attempts to connect.
const LOOK: Duration = Duration::from_millis(1);

/// Longest wait for a clock.
const PATIENCE: Duration = Duration::from_secs(300);

/// Enough for one request, so that the client is ready at once.
const PROBE_BUFFERS: usize = 1 << 20;

/// Reads after the first, to see whether the daemon is only just alive.
const READS_AFTER: usize = 2_000;

/// See [`super::Study::Restart`].
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
    /// Kills, each followed by one start with the page cache as it is and, as root, one with it dropped
    #[arg(long, default_value_t = 5)]
    repeats: u32,
    /// Seconds of random overwrites before each kill
    #[arg(long, default_value_t = 5.0)]
    load: f64,
    /// blockd's setting `cache`
    #[arg(long, value_name = "SIZE", default_value = "256MiB")]
    cache: ByteSize,
    /// Bytes of the disk [default: 1.4 times what is written, and 512MiB]
    #[arg(long, value_name = "SIZE")]
    disk: Option<ByteSize>,
}

#[derive(Serialize)]
struct Figures {
    span: u64,
    written: u64,
    load_s: f64,
    starts: Vec<Start>,
}

/// Seconds since the start of the process.
#[derive(Clone, Copy, Debug, Serialize)]
struct Start {
    is_cold: bool,
    ready_s: f64,
    rest_s: f64,
    read_s: f64,
    write_s: f64,
    /// Of the reads after the first, depth 1.
    after_p99_ms: f64,
    after_max_ms: f64,
    /// Anonymous memory when all of that was done.
    anonymous: u64,
    /// I/Os that completed before the kill.
    ios_before: u64,
}

pub fn run(options: &Options) -> Result<()> {
    ensure!(
        options.filled > 0.0 && options.filled <= 1.0 && options.load > 0.0 && options.repeats > 0,
        "--filled is more than 0 and at most 1, --load and --repeats more than 0"
    );
    let scene = Scene::set(&options.common)?;
    let blocks = (options.span.0 as f64 * options.filled) as u64 / PAGE;
    let config = format!("cache = \"{}\"\n", options.cache.0);
    let mut bed = Bed::make(
        &scene.place,
        &Wanted {
            name: "restart",
            disk_bytes: options.disk.map_or(disk_for(blocks * PAGE), |disk| disk.0),
            vdi_bytes: &|_| options.span.0,
            config: Some(&config),
            seed: scene.seed,
        },
    )?;
    bed.fill("restart: random fill", blocks)?;
    let mut random = Random::new(scene.seed);
    let mut starts = Vec::new();
    for repeat in 0..options.repeats {
        for is_cold in [false, true] {
            if is_cold && !rustix::process::geteuid().is_root() {
                continue;
            }
            let load = Duration::from_secs_f64(options.load);
            let ios_before = kill_under_load(&mut bed, blocks, load, random.bits())?;
            if is_cold {
                drop_page_cache()?;
            }
            let start = start_again(&mut bed, &scene.place.sockets, blocks, random.bits())?;
            let start = Start {
                is_cold,
                ios_before,
                ..start
            };
            eprintln!("restart {repeat}: {start:?}");
            starts.push(start);
            bed.connect()?;
        }
    }
    let figures = Figures {
        span: options.span.0,
        written: blocks * PAGE,
        load_s: options.load,
        starts,
    };
    scene.report(&figures.markdown(), &figures)
}

/// Overwrites blocks of the order for a while and kills the daemon with the next ones under way.
fn kill_under_load(bed: &mut Bed, blocks: u64, load: Duration, seed: u64) -> Result<u64> {
    let order = bed.order.clone();
    let mut random = Random::new(seed);
    let offsets = std::iter::repeat_with(move || order.of(random.below(blocks)) * PAGE);
    let begin = Instant::now();
    let mut ios = 0;
    bed.blocks(
        "restart: overwriting until the kill",
        Op::Write,
        Until::Time(load),
        offsets,
        |now, latencies| {
            ios += latencies.len() as u64;
            if now - begin >= load {
                Next::Abandon
            } else {
                Next::GoOn
            }
        },
    )?;
    bed.weft.kill();
    Ok(ios)
}

/// What was written must be on its way to the file system first, or it could not leave the cache.
fn drop_page_cache() -> Result<()> {
    rustix::fs::sync();
    let path = "/proc/sys/vm/drop_caches";
    std::fs::write(path, "3").context(path)
}

fn start_again(bed: &mut Bed, sockets: &std::path::Path, blocks: u64, seed: u64) -> Result<Start> {
    let ready = ReadySocket::bind(sockets.join("notify"))?;
    let guest = bed.weft.guest_socket("study");
    let rest: PathBuf = bed.weft.rest().to_owned();
    let mut random = Random::new(seed);
    let mut block = || bed.order.of(random.below(blocks)) * PAGE;
    let (first_read, first_write) = (block(), block());
    let after: Vec<u64> = std::iter::repeat_with(&mut block).take(READS_AFTER).collect();
    let begin = Instant::now();
    bed.weft.start_again(&[("NOTIFY_SOCKET", ready.path())])?;
    let one = |op| Requests {
        op,
        block: PAGE,
        depth: 1,
        end: bed.bytes,
    };
    let probe = || -> Result<_> {
        let mut client = patiently(begin, || LoadClient::connect_with(&guest, PROBE_BUFFERS))?;
        client.drive(&one(Op::Read), [first_read].into_iter(), |_, _| Next::GoOn)?;
        let read = Instant::now();
        client.drive(&one(Op::Write), [first_write].into_iter(), |_, _| Next::GoOn)?;
        let written = Instant::now();
        let mut latencies = Vec::with_capacity(READS_AFTER);
        client.drive(&one(Op::Read), after.into_iter(), |_, some| {
            latencies.extend_from_slice(some);
            Next::GoOn
        })?;
        Ok((read, written, latencies))
    };
    let clocks = std::thread::scope(|scope| -> Result<_> {
        let ready = scope.spawn(|| ready.wait());
        let answered = scope.spawn(|| {
            patiently(begin, || get(&rest, "/v1/status"))?;
            Ok::<_, anyhow::Error>(Instant::now())
        });
        let probed = probe()?;
        let ended = |_| anyhow!("a clock ended badly");
        Ok((
            ready.join().map_err(ended)??,
            answered.join().map_err(ended)??,
            probed,
        ))
    });
    let clocks = match clocks {
        Ok(clocks) => clocks,
        Err(error) => {
            return bed
                .weft
                .explain("after the kill", Err(error))
                .map(|()| unreachable!());
        }
    };
    let (ready, rest, (read, written, mut latencies)) = clocks;
    let seconds = |at: Instant| (at - begin).as_secs_f64();
    latencies.sort_unstable();
    let ms = |at: usize| latencies[at].as_secs_f64() * 1e3;
    Ok(Start {
        is_cold: false,
        ready_s: seconds(ready),
        rest_s: seconds(rest),
        read_s: seconds(read),
        write_s: seconds(written),
        after_p99_ms: ms(latencies.len() * 99 / 100),
        after_max_ms: ms(latencies.len() - 1),
        anonymous: memory(bed.weft.pid())?.anonymous,
        ios_before: 0,
    })
}

/// Tries until it works.
fn patiently<T>(begin: Instant, mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
    loop {
        match attempt() {
            Ok(value) => return Ok(value),
            Err(error) if begin.elapsed() > PATIENCE => return Err(error),
            Err(_) => std::thread::sleep(LOOK),
        }
    }
}

impl Figures {
    fn markdown(&self) -> String {
        let mut text = String::new();
        let _ = writeln!(
            text,
            "VDI of {}, {} written in random order; SIGKILL after {} s of random overwrites at depth 32. Seconds since the \
             start of the process, median (min to max).\n",
            ByteSize(self.span),
            ByteSize(self.written),
            self.load_s,
        );
        text.push_str(
            "| page cache | starts | READY=1 | REST answers | first read | first write | next 2,000 reads: p99, max ms |\n\
             |---|---|---|---|---|---|---|\n",
        );
        for (is_cold, name) in [(false, "warm"), (true, "dropped")] {
            let spread = |figure: fn(&Start) -> f64| {
                Spread::of(
                    self.starts
                        .iter()
                        .filter(|start| start.is_cold == is_cold)
                        .map(figure),
                )
            };
            let cell = |figure: fn(&Start) -> f64| {
                spread(figure).map_or_else(
                    || "-".to_owned(),
                    |found| format!("{:.2} ({:.2} to {:.2})", found.median, found.min, found.max),
                )
            };
            let Some(p99) = spread(|start| start.after_p99_ms) else {
                continue;
            };
            let max = spread(|start| start.after_max_ms).map_or(0.0, |found| found.max);
            let _ = writeln!(
                text,
                "| {name} | {} | {} | {} | {} | {} | {:.2}, {max:.2} |",
                self.starts
                    .iter()
                    .filter(|start| start.is_cold == is_cold)
                    .count(),
                cell(|start| start.ready_s),
                cell(|start| start.rest_s),
                cell(|start| start.read_s),
                cell(|start| start.write_s),
                p99.median,
            );
        }
        let slowest = self
            .starts
            .iter()
            .map(|start| start.read_s.max(start.write_s).max(start.rest_s));
        let slowest = slowest.fold(0.0, f64::max);
        let verdict = if slowest < WANTED_S { "met" } else { "MISSED" };
        let _ = writeln!(
            text,
            "\nSlowest start: {slowest:.2} s; wanted under {WANTED_S} s at 64 GiB half full: {verdict}."
        );
        text
    }
}
