//! A VDI with a replica on each of three hosts, beside an image of Ceph's of size 3 on the same file system.

use anyhow::{Context, Result};
use clap::Args;
use serde::Serialize;
use types::ByteSize;

use super::hosts::{REPLICATED, Three};
use super::side_by_side::{self, Contender, Guest, Line, Turns, small_jobs};
use super::{Common, Scene};
use crate::ceph::{self, Ceph, Wanted};
use crate::client::Timing;
use crate::job::Job;
use crate::prepare::ensure_space;
use crate::runner::Sample;
use crate::target::Figures;
use crate::wanted::Measure;

const CEPH: &str = "Ceph";

const LINES: &[Line] = &[
    Line {
        job: "randwrite-d32",
        measure: Measure::Rate,
        bound: 12.0,
    },
    Line {
        job: "randread-d32",
        measure: Measure::Rate,
        bound: 3.0,
    },
    Line {
        job: "randwrite-d1",
        measure: Measure::Latency,
        bound: 0.125,
    },
    Line {
        job: "randwrite-d32",
        measure: Measure::Cpu,
        bound: 60.0,
    },
];

/// See [`super::Study::Ceph`].
#[derive(Debug, Args)]
pub struct Options {
    #[command(flatten)]
    common: Common,
    /// Bytes of the VDI, and of the image
    #[arg(long, value_name = "SIZE", default_value = "1GiB")]
    span: ByteSize,
    #[command(flatten)]
    turns: Turns,
    /// A line for ceph.conf, for example 'bluestore debug enforce settings = ssd'; may be given again
    #[arg(long, value_name = "LINE")]
    ceph: Vec<String>,
}

#[derive(Serialize)]
struct Outcome<'a> {
    span: u64,
    ceph: String,
    ceph_settings: &'a [String],
    samples: Vec<Sample>,
}

impl Contender for Ceph {
    fn name(&self) -> &'static str {
        CEPH
    }

    fn pids(&self) -> Vec<u32> {
        Ceph::pids(self)
    }

    fn measure(&mut self, job: &Job, timing: Timing, seed: u64, probe: &mut dyn FnMut()) -> Result<Figures> {
        Ceph::measure(self, job, timing, seed, probe)
    }
}

pub fn run(options: &Options) -> Result<()> {
    // Before anything is made.
    ceph::require()?;
    let scene = Scene::set(&options.common)?;
    let span = options.span.0;
    let osd_bytes = 2 * span + (2 << 30);
    ensure_space(&scene.place.files, 3 * (osd_bytes + Three::disk_bytes(span, 1)))?;
    let mut peer = Ceph::start(&Wanted {
        folder: &scene.place.files,
        osds: 3,
        osd_bytes,
        image_bytes: span,
        settings: &options.ceph,
    })?;
    eprintln!("ceph: filling the image");
    peer.fill()?;
    let (three, ()) = Three::make(&scene.place, span, 1, |_| Ok(()))?;
    let mut guest = Guest {
        name: REPLICATED,
        pids: three.cluster.pids(),
        client: three.guest,
    };
    let jobs = small_jobs(span);
    let mut contenders: [&mut dyn Contender; 2] = [&mut peer, &mut guest];
    let samples = side_by_side::run(&mut contenders, &jobs, options.turns, scene.seed);
    let samples = samples.with_context(|| three.cluster.last_words())?;
    let outcome = Outcome {
        span,
        ceph: ceph::version(),
        ceph_settings: &options.ceph,
        samples,
    };
    let text = format!(
        "{}, one monitor, 3 OSDs (bluestore on files), size 3, no authentication, rbd cache off, fio's rbd engine; settings: {}. Weft: replicas on three \
         hosts. {} each. CPU is that of all daemons (monitor and etcd too) and the client.\n\n{}",
        outcome.ceph,
        if options.ceph.is_empty() {
            "its own".to_owned()
        } else {
            options.ceph.join(", ")
        },
        options.span,
        side_by_side::markdown(&outcome.samples, &jobs, REPLICATED, CEPH, LINES)
    );
    scene.report(&text, &outcome)
}
