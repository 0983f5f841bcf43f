//! The three kinds of target: fio on the file itself, qemu-storage-daemon, blockd with R replicas.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::client::{LoadClient, Timing};
use crate::job::{Job, Op, Pattern, Zone};
use crate::prepare::fully_written_file;
use crate::process::Daemon;
use crate::weft::{Place, Weft};

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// fio with io_uring and O_DIRECT on the peer's file: no daemon at all.
    Raw,
    /// qemu-storage-daemon's vhost-user-blk export of a raw file.
    Qsd,
    /// A VDI of Weft.
    Weft {
        /// Copies, each on a disk of its own.
        replicas: u8,
    },
}

impl Kind {
    /// As `--targets` and reports name it.
    pub fn name(self) -> String {
        match self {
            Kind::Raw => "raw".to_owned(),
            Kind::Qsd => "qsd".to_owned(),
            Kind::Weft { replicas } => format!("weft-{replicas}"),
        }
    }
}

impl FromStr for Kind {
    type Err = String;

    fn from_str(text: &str) -> Result<Kind, String> {
        match text {
            "raw" => Ok(Kind::Raw),
            "qsd" => Ok(Kind::Qsd),
            "weft-1" => Ok(Kind::Weft { replicas: 1 }),
            "weft-2" => Ok(Kind::Weft { replicas: 2 }),
            "weft-3" => Ok(Kind::Weft { replicas: 3 }),
            _ => Err(format!("'{text}' is none of raw, qsd, weft-1, weft-2, weft-3")),
        }
    }
}

/// What all targets of a run share.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Files and disks go here.
    pub files: PathBuf,
    /// Sockets and logs go here; a short path, for sockets allow no other.
    pub sockets: PathBuf,
    /// Bytes of the disk that the load covers.
    pub span: u64,
    /// Bytes of each disk of Weft.
    pub disk_bytes: u64,
    /// Where `blockd` and `weft` are.
    pub binaries: PathBuf,
}

impl Setup {
    /// The file that `raw` and `qsd` share; qsd has the first half of it under load, raw the second.
    pub fn peer_file(&self) -> PathBuf {
        self.files.join("peer.img")
    }
}

/// A target, ready for load.
pub struct Target {
    /// What it is.
    pub kind: Kind,
    body: Body,
}

enum Body {
    Raw {
        file: PathBuf,
        offset: u64,
        scratch: PathBuf,
    },
    Served {
        daemon: Daemon,
        client: Box<LoadClient>,
    },
}

/// What one run gave.
#[derive(Clone, Debug)]
pub struct Figures {
    /// I/Os completed in the measured time.
    pub ios: u64,
    /// The measured time.
    pub elapsed: Duration,
    /// Mean latency, microseconds.
    pub mean_us: f64,
    /// Half of the I/Os were faster; unknown for fio's write + flush.
    pub p50_us: Option<f64>,
    /// 99 of 100 were faster; unknown for fio's write + flush.
    pub p99_us: Option<f64>,
    /// CPU of fio itself, where there is no daemon.
    pub fio_cpu: Option<Duration>,
}

impl Target {
    /// Starts it. The peer's file exists; Weft's disks are made here.
    pub fn start(kind: Kind, setup: &Setup) -> Result<Target> {
        let body = match kind {
            Kind::Raw => Body::Raw {
                file: setup.peer_file(),
                offset: setup.span,
                scratch: setup.sockets.join("fio.json"),
            },
            Kind::Qsd => start_qsd(setup)?,
            Kind::Weft { replicas } => start_weft(setup, replicas)?,
        };
        Ok(Target { kind, body })
    }

    /// The daemon, if it has one.
    pub fn pid(&self) -> Option<u32> {
        match &self.body {
            Body::Raw { .. } => None,
            Body::Served { daemon, .. } => Some(daemon.pid()),
        }
    }

    /// Writes the whole span once; the peer's half for fio is written already.
    pub fn fill(&mut self, span: u64) -> Result<()> {
        match &mut self.body {
            Body::Raw { .. } => Ok(()),
            Body::Served { client, daemon } => client
                .fill(Zone {
                    offset: 0,
                    bytes: span,
                })
                .with_context(|| {
                    format!(
                        "filling {}; its last words:\n{}",
                        self.kind.name(),
                        daemon.last_words()
                    )
                }),
        }
    }

    /// One run; `probe` is called where the measured time begins and where it ends.
    pub fn measure(
        &mut self,
        job: &Job,
        timing: Timing,
        seed: u64,
        mut probe: impl FnMut(),
    ) -> Result<Figures> {
        match &mut self.body {
            Body::Raw {
                file,
                offset,
                scratch,
            } => {
                probe();
                let figures = run_fio(file, *offset, job, timing, seed, scratch);
                probe();
                figures
            }
            Body::Served { client, daemon } => {
                let outcome = client.run(job, timing, seed, probe).with_context(|| {
                    format!(
                        "{} at {}; its last words:\n{}",
                        self.kind.name(),
                        job.name,
                        daemon.last_words()
                    )
                })?;
                let us = |ns: u64| ns as f64 / 1e3;
                Ok(Figures {
                    ios: outcome.ios,
                    elapsed: outcome.elapsed,
                    mean_us: outcome.latency.mean() / 1e3,
                    p50_us: Some(us(outcome.latency.value_at_quantile(0.5))),
                    p99_us: Some(us(outcome.latency.value_at_quantile(0.99))),
                    fio_cpu: None,
                })
            }
        }
    }
}

fn start_qsd(setup: &Setup) -> Result<Body> {
    let socket = setup.sockets.join("qsd.sock");
    let arguments = [
        "--blockdev".to_owned(),
        format!(
            "driver=file,node-name=f,filename={},cache.direct=on,aio=io_uring",
            setup.peer_file().display()
        ),
        "--export".to_owned(),
        format!(
            "type=vhost-user-blk,id=e,node-name=f,addr.type=unix,addr.path={},writable=on",
            socket.display()
        ),
    ];
    let log = setup.sockets.join("qsd.log");
    let mut daemon = Daemon::start(
        "qemu-storage-daemon",
        Path::new("qemu-storage-daemon"),
        &arguments,
        &log,
    )?;
    let client = daemon.wait_for(|| LoadClient::connect(&socket))?;
    Ok(Body::Served {
        daemon,
        client: Box::new(client),
    })
}

/// A daemon, pool and VDI of their own for each replica count, so that CPU and disks are nobody else's.
fn start_weft(setup: &Setup, replicas: u8) -> Result<Body> {
    let name = Kind::Weft { replicas }.name();
    let place = Place {
        files: setup.files.clone(),
        sockets: setup.sockets.clone(),
        binaries: setup.binaries.clone(),
    };
    let mut weft = Weft::start(&place, &name, None)?;
    weft.weft(&["pool", "create", "bench"])?;
    for number in 1..=replicas {
        let disk = setup.files.join(format!("{name}-disk{number}.img"));
        fully_written_file(&disk, setup.disk_bytes, u64::from(number))?;
        weft.weft(&["disk", "add", &disk.display().to_string()])?;
    }
    let client = weft.make_vdi("bench", setup.span, replicas)?;
    Ok(Body::Served {
        daemon: weft.into_daemon(),
        client: Box::new(client),
    })
}

/// fio's word for what a job does.
pub(crate) fn workload(job: &Job) -> &'static str {
    match (job.pattern, job.op) {
        (Pattern::Random, Op::Read) => "randread",
        (Pattern::Random, _) => "randwrite",
        (Pattern::Sequential, Op::Read) => "read",
        (Pattern::Sequential, _) => "write",
    }
}

/// fio's queue is filled and reaped in batches as our client's is; otherwise it would be the slower of the two.
fn fio_arguments(file: &Path, offset: u64, job: &Job, timing: Timing, seed: u64) -> Vec<String> {
    let rw = workload(job);
    let mut arguments = vec![
        format!("--name={}", job.name),
        format!("--filename={}", file.display()),
        format!("--offset={}", offset + job.zone.offset),
        format!("--size={}", job.zone.bytes),
        format!("--rw={rw}"),
        format!("--bs={}", job.block),
        format!("--iodepth={}", job.depth),
        "--iodepth_batch_complete_min=1".to_owned(),
        format!("--iodepth_batch_complete_max={}", job.depth),
        format!("--randseed={seed}"),
        format!("--runtime={}ms", timing.measured.as_millis()),
        format!("--ramp_time={}ms", timing.ramp.as_millis()),
    ];
    let fixed = "--ioengine=io_uring --direct=1 --time_based --norandommap --randrepeat=0 --thread \
                 --lat_percentiles=1 --clat_percentiles=0 --output-format=json";
    arguments.extend(fixed.split_ascii_whitespace().map(str::to_owned));
    if job.op == Op::WriteFlush {
        arguments.push("--fdatasync=1".to_owned());
    }
    arguments
}

fn run_fio(
    file: &Path,
    offset: u64,
    job: &Job,
    timing: Timing,
    seed: u64,
    scratch: &Path,
) -> Result<Figures> {
    let output = Command::new("setpriv") // becomes fio, which must not outlive us
        .args(["--pdeathsig", "KILL", "--", "fio"])
        .args(fio_arguments(file, offset, job, timing, seed))
        .arg(format!("--output={}", scratch.display())) // its notes go to standard output, and are no JSON
        .output()
        .context("cannot start fio")?;
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "fio failed ({}): {words}", output.status);
    let text = std::fs::read_to_string(scratch).context("fio's report")?;
    parse_fio(&text, job.op).with_context(|| format!("{}: fio's report", job.name))
}

/// Figures of a report of fio's in JSON, with one job.
pub(crate) fn parse_fio(text: &str, op: Op) -> Result<Figures> {
    let report: serde_json::Value = serde_json::from_str(text)?;
    let job = &report["jobs"][0];
    ensure!(job["error"].as_i64() == Some(0), "error {}", job["error"]);
    let part = &job[if op == Op::Read { "read" } else { "write" }];
    let number = |value: &serde_json::Value, what| value.as_f64().with_context(|| format!("no {what}"));
    let ios = part["total_ios"]
        .as_u64()
        .filter(|&ios| ios > 0)
        .context("no I/O was done")?;
    let seconds = number(&part["runtime"], "runtime")? / 1e3;
    let cpu = (number(&job["usr_cpu"], "usr_cpu")? + number(&job["sys_cpu"], "sys_cpu")?) / 100.0;
    let cpu_seconds = cpu * number(&job["job_runtime"], "job_runtime")? / 1e3;
    // fio counts a write and the sync after it apart; together they take what one round takes.
    let is_pair = op == Op::WriteFlush;
    let latency = &part["lat_ns"];
    let quantile = |key: &str| match latency["percentile"][key].as_f64() {
        Some(ns) if !is_pair => Some(ns / 1e3),
        _ => None,
    };
    Ok(Figures {
        ios,
        elapsed: Duration::from_secs_f64(seconds),
        mean_us: if is_pair {
            seconds * 1e6 / ios as f64
        } else {
            number(&latency["mean"], "latency")? / 1e3
        },
        p50_us: quantile("50.000000"),
        p99_us: quantile("99.000000"),
        fio_cpu: Some(Duration::from_secs_f64(cpu_seconds)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const REPORT: &str = r#"{"jobs":[{"error":0,"usr_cpu":10.0,"sys_cpu":30.0,"job_runtime":2000,
        "write":{"total_ios":1000,"runtime":2000,"lat_ns":{"mean":1500.0,
            "percentile":{"50.000000":1400,"99.000000":9000}}}}]}"#;

    #[test]
    fn names_are_read_back() {
        for name in ["raw", "qsd", "weft-1", "weft-2", "weft-3"] {
            assert_eq!(name.parse::<Kind>().unwrap().name(), name);
        }
        assert!("weft-4".parse::<Kind>().is_err());
    }

    #[test]
    fn fio_reports_in_our_units() {
        let figures = parse_fio(REPORT, Op::Write).unwrap();
        assert_eq!((figures.ios, figures.elapsed), (1000, Duration::from_secs(2)));
        assert_eq!(
            (figures.mean_us, figures.p50_us, figures.p99_us),
            (1.5, Some(1.4), Some(9.0))
        );
        assert_eq!(figures.fio_cpu, Some(Duration::from_millis(800)));
    }

    #[test]
    fn a_write_and_its_sync_are_one() {
        let figures = parse_fio(REPORT, Op::WriteFlush).unwrap();
        assert_eq!((figures.mean_us, figures.p50_us), (2000.0, None));
    }

    #[test]
    fn a_report_without_io_is_an_error() {
        assert!(parse_fio(REPORT, Op::Read).is_err());
        assert!(parse_fio(&REPORT.replace("\"error\":0", "\"error\":5"), Op::Write).is_err());
        assert!(parse_fio("fio: no", Op::Write).is_err());
    }
}
