//! A VDI with a replica on each of three hosts, beside one with a single replica of the same daemon and disk.
//!
//! ```text
//!  guest ── vhost-user-blk ── h1 ──┬─ its disk: "local" (1 replica), "replicated"
//!                                  ├─ loopback TCP ── h2 ── its disk: "replicated"
//!                                  └─ loopback TCP ── h3 ── its disk: "replicated"
//! ```
//! First the jobs, in turn on both; then a host is killed under load; then it misses some writes and comes back.

use std::fmt::Write;

use anyhow::{Result, ensure};
use clap::Args;
use serde::Serialize;
use types::ByteSize;

use super::outage::{self, Kill, Load, Resync};
use super::side_by_side::{self, Contender, Guest, Line, Turns, small_jobs, verdict};
use super::{Common, Scene};
use crate::client::{LoadClient, Next, Requests};
use crate::cluster::Cluster;
use crate::job::{Offsets, Op, Pattern, Zone};
use crate::prepare::ensure_space;
use crate::random::Random;
use crate::runner::Sample;
use crate::wanted::Measure;
use crate::weft::Place;

/// Hosts, and replicas.
pub const HOSTS: u8 = 3;

const LOCAL: &str = "1 local replica";
/// The name of the VDI of three replicas, in reports.
pub const REPLICATED: &str = "3 hosts";

/// Of the VDI of three replicas.
const VDI: &str = "replicated";

/// Bounds of issue 4: milliseconds that a request may wait when a replica dies; share of its bytes that a resync moves.
const WAIT_MS: f64 = 200.0;
const MOVED: f64 = 0.05;

const LINES: &[Line] = &[
    Line {
        job: "randwrite-d1",
        measure: Measure::Latency,
        bound: 2.2,
    },
    Line {
        job: "randwrite-d32",
        measure: Measure::Rate,
        bound: 0.35,
    },
    Line {
        job: "randread-d1",
        measure: Measure::Rate,
        bound: 0.95,
    },
    Line {
        job: "randread-d32",
        measure: Measure::Rate,
        bound: 0.95,
    },
    Line {
        job: "randwrite-d32",
        measure: Measure::Cpu,
        bound: 60.0,
    },
];

/// See [`super::Study::Hosts`].
#[derive(Debug, Args)]
pub struct Options {
    #[command(flatten)]
    common: Common,
    /// Bytes of each VDI
    #[arg(long, value_name = "SIZE", default_value = "1GiB")]
    span: ByteSize,
    #[command(flatten)]
    turns: Turns,
    /// Hosts killed under load, at depth 32 and at depth 1 each, and brought back after a miss; 0: none
    #[arg(long, default_value_t = 4)]
    kills: u32,
    /// Seconds of writes before a kill, and after it
    #[arg(long, default_value_t = 3.0)]
    load: f64,
    /// Blocks that a host misses before it comes back, in percent
    #[arg(long, default_value_t = 1.0)]
    changed: f64,
}

#[derive(Serialize)]
struct Figures {
    span: u64,
    samples: Vec<Sample>,
    kills: Vec<Kill>,
    resyncs: Vec<Resync>,
}

/// Three hosts with a VDI of three replicas, written whole.
pub struct Three {
    pub cluster: Cluster,
    pub guest: LoadClient,
    bytes: u64,
}

impl Three {
    /// Bytes of the disk for the data of so many VDIs of `span` bytes: a third of a disk is live, so that cleaning is the
    /// same share of the work on all.
    pub fn disk_bytes(span: u64, vdis: u64) -> u64 {
        3 * span * vdis + (1 << 30)
    }

    /// Makes hosts and disks; the first host's is for `vdis` VDIs. `local` is called when only the first host has a disk.
    pub fn make<T>(
        place: &Place,
        span: u64,
        vdis: u64,
        local: impl FnOnce(&mut Cluster) -> Result<T>,
    ) -> Result<(Three, T)> {
        ensure!(
            span > 0 && span.is_multiple_of(1 << 20),
            "--span is a multiple of 1MiB, and not 0"
        );
        let (first, other) = (Three::disk_bytes(span, vdis), Three::disk_bytes(span, 1));
        let bytes = first + 2 * other;
        ensure_space(&place.files, bytes + bytes / 20)?;
        let mut cluster = Cluster::start(place, usize::from(HOSTS))?;
        cluster.add_disk(place, 0, first)?;
        let made = local(&mut cluster)?;
        for index in 1..usize::from(HOSTS) {
            cluster.add_disk(place, index, other)?;
        }
        let mut guest = cluster.make_vdi(VDI, span, HOSTS)?;
        fill(&cluster, &mut guest, span)?;
        let holders = cluster.holders(VDI)?;
        ensure!(
            holders == ["h1", "h2", "h3"],
            "its replicas are on {}",
            holders.join(", ")
        );
        cluster.until_whole(VDI, true)?;
        let three = Three {
            cluster,
            guest,
            bytes: span,
        };
        Ok((three, made))
    }
}

fn fill(cluster: &Cluster, guest: &mut LoadClient, bytes: u64) -> Result<()> {
    guest
        .fill(Zone { offset: 0, bytes })
        .map_err(|error| error.context(format!("filling\n{}", cluster.last_words())))
}

pub fn run(options: &Options) -> Result<()> {
    ensure!(options.load > 0.0, "--load must be more than 0");
    ensure!(
        options.changed > 0.0 && options.changed <= 100.0,
        "--changed is more than 0 and at most 100"
    );
    let scene = Scene::set(&options.common)?;
    let span = options.span.0;
    let (mut three, local) = Three::make(&scene.place, span, 2, |cluster| {
        let mut local = cluster.make_vdi("local", span, 1)?;
        fill(cluster, &mut local, span)?;
        Ok(local)
    })?;
    let mut random = Random::new(scene.seed);
    let jobs = small_jobs(span);
    let pids = three.cluster.pids();
    let guest = |name, client| Guest {
        name,
        pids: pids.clone(),
        client,
    };
    let (mut local, mut replicated) = (guest(LOCAL, local), guest(REPLICATED, three.guest));
    let mut contenders: [&mut dyn Contender; 2] = [&mut local, &mut replicated];
    let samples = side_by_side::run(&mut contenders, &jobs, options.turns, random.bits());
    let samples = samples.map_err(|error| error.context(three.cluster.last_words()))?;
    ensure!(
        three.cluster.holders("local")? == ["h1"],
        "the local VDI was moved"
    );
    let mut bed = outage::Bed {
        cluster: &mut three.cluster,
        guest: &mut replicated.client,
        vdi: VDI,
        bytes: three.bytes,
    };
    let (mut kills, mut resyncs) = (Vec::new(), Vec::new());
    for number in 0..options.kills {
        // h2 and h3 in turn.
        let victim = 1 + number as usize % 2;
        for depth in [1, 32] {
            let load = Load {
                depth,
                seconds: options.load,
            };
            let kill = bed.kill_under_load(victim, load, random.bits())?;
            eprintln!("{kill:?}");
            kills.push(kill);
            bed.bring_back(victim)?;
        }
        let resync = bed.miss_and_return(victim, options.changed / 100.0, random.bits())?;
        eprintln!("{resync:?}");
        resyncs.push(resync);
    }
    check(&mut bed)?;
    let figures = Figures {
        span,
        samples,
        kills,
        resyncs,
    };
    let mut text = format!(
        "Two VDIs of {} at h1: one with its only replica there, one with replicas on h1, h2 and h3 (a blockd each, loopback TCP, etcd). CPU is that of \
         all three daemons, etcd and the client.\n\n",
        options.span
    );
    text.push_str(&side_by_side::markdown(
        &figures.samples,
        &jobs,
        REPLICATED,
        LOCAL,
        LINES,
    ));
    text.push_str(&figures.outages());
    scene.report(&text, &figures)
}

/// Every block is what was written last, as far as its stamp tells.
fn check(bed: &mut outage::Bed<'_>) -> Result<()> {
    let block = 1 << 20;
    let requests = Requests {
        op: Op::Read,
        block,
        depth: 8,
        end: bed.bytes,
    };
    let zone = Zone {
        offset: 0,
        bytes: bed.bytes,
    };
    let offsets = Offsets::from_start(Pattern::Sequential, zone, block);
    let count = usize::try_from(offsets.blocks())?;
    bed.guest.drive(&requests, offsets.take(count), |_, _| Next::GoOn)
}

impl Figures {
    fn outages(&self) -> String {
        let mut text = String::new();
        if self.kills.is_empty() {
            return text;
        }
        text.push_str(
            "\n| SIGKILL of | writes at depth | before it: longest wait ms | after it: longest wait ms | wanted | |\n|---|---|---|---|---|---|\n",
        );
        for kill in &self.kills {
            let _ = writeln!(
                text,
                "| h{} | {} | {:.1} | {:.1} | at most {WAIT_MS:.0} | {} |",
                kill.victim + 1,
                kill.depth,
                kill.before_ms,
                kill.after_ms,
                verdict(kill.after_ms <= WAIT_MS)
            );
        }
        text.push_str(
            "\n| back | blocks missed | in sync: s after its start | of these with a link | MiB on the link | of the VDI's bytes | wanted | |\n\
             |---|---|---|---|---|---|---|---|\n",
        );
        for resync in &self.resyncs {
            let share = resync.link_bytes / self.span as f64;
            let _ = writeln!(
                text,
                "| h{} | {} | {:.2} | {:.2} | {:.1} | {:.3} | at most {MOVED} | {} |",
                resync.victim + 1,
                resync.blocks,
                resync.whole_s,
                resync.linked_s,
                resync.link_bytes / f64::from(1 << 20),
                share,
                verdict(share <= MOVED)
            );
        }
        text
    }
}
