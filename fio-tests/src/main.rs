//! `weft-bench`: Weft beside qemu-storage-daemon beside the bare file, in one run.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand};
use types::ByteSize;
use weft_fio_tests::client::Timing;
use weft_fio_tests::interrupt;
use weft_fio_tests::job::{self, Job};
use weft_fio_tests::machine;
use weft_fio_tests::prepare::{Workspace, ensure_space, fully_written_file};
use weft_fio_tests::priority::Priority;
use weft_fio_tests::report::Report;
use weft_fio_tests::runner::{self, Plan};
use weft_fio_tests::study::{self, Study};
use weft_fio_tests::syscalls;
use weft_fio_tests::target::{Kind, Setup, Target};

/// Load starts this long before it counts.
const RAMP: Duration = Duration::from_millis(250);

/// Measures Weft, qemu-storage-daemon and the bare file beside each other.
///
/// Example: weft-bench --dir /srv/bench --repeats 5 --json bench.json
#[derive(Debug, Parser)]
#[command(version, args_conflicts_with_subcommands = true)]
struct Arguments {
    #[command(subcommand)]
    task: Option<Task>,
    /// Where files and disks are made, and removed again [default: weft-bench beside this program's folder]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Bytes under load on each target, a multiple of 64MiB
    #[arg(long, value_name = "SIZE", default_value = "4GiB")]
    span: ByteSize,
    /// Bytes of each disk of Weft [default: twice the span and 1GiB]
    #[arg(long, value_name = "SIZE")]
    disk: Option<ByteSize>,
    /// Length of one run
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// Runs of each job on each target
    #[arg(long, default_value_t = 5)]
    repeats: u32,
    /// Of offsets and order
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Some of raw, qsd, weft-1, weft-2, weft-3
    #[arg(long, value_delimiter = ',', default_value = "raw,qsd,weft-1,weft-3")]
    targets: Vec<Kind>,
    /// Some of the jobs by name [default: all]
    #[arg(long, value_delimiter = ',')]
    jobs: Vec<String>,
    /// Wait up to so many seconds before each run for the rest of the machine to be idle
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    calm: u64,
    /// Give client, daemons and fio the highest priority, on a machine that others use; needs root
    #[arg(long)]
    priority: bool,
    /// Write everything measured here
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Afterwards count the daemons' system calls per I/O, in short runs of their own; needs strace and root
    #[arg(long)]
    syscalls: bool,
    /// A look in about a minute: one run of one second each over 512MiB; no figures to publish
    #[arg(long)]
    quick: bool,
    /// Where `blockd` and `weft` are [default: beside this program]
    #[arg(long, value_name = "DIR")]
    binaries: Option<PathBuf>,
    /// Leave files, sockets and logs
    #[arg(long)]
    keep: bool,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// What daemons do over minutes: memory, restart, cleaning, aged, hosts, ceph
    #[command(subcommand)]
    Study(Study),
}

fn main() {
    if let Err(error) = run() {
        eprintln!("weft-bench: {error:#}");
        std::process::exit(1);
    }
}

fn run() -> Result<()> {
    let arguments = Arguments::parse();
    interrupt::watch()?;
    match &arguments.task {
        Some(Task::Study(study)) => study::run(study),
        None => bench(arguments),
    }
}

fn bench(mut arguments: Arguments) -> Result<()> {
    if arguments.quick {
        (arguments.span, arguments.seconds, arguments.repeats) = (ByteSize(512 << 20), 1.0, 1);
        arguments.calm = 0;
    }
    let jobs = chosen_jobs(&arguments)?;
    let beside = std::env::current_exe()?
        .parent()
        .context("this program is in no folder")?
        .to_owned();
    let dir = match arguments.dir.clone() {
        Some(dir) => dir,
        None => beside.parent().unwrap_or(&beside).join("weft-bench"),
    };
    // In this order: daemons end before their files go.
    let files = Workspace::create(&dir, arguments.keep)?;
    let sockets = Workspace::create(&std::env::temp_dir().join("weft-bench"), arguments.keep)?;
    let setup = Setup {
        files: files.path().to_owned(),
        sockets: sockets.path().to_owned(),
        span: arguments.span.0,
        disk_bytes: arguments
            .disk
            .map_or(arguments.span.0 * 2 + (1 << 30), |disk| disk.0),
        binaries: arguments.binaries.clone().unwrap_or(beside),
    };
    let _priority = if arguments.priority {
        Some(Priority::raise()?)
    } else {
        None
    };
    let machine = machine::describe(&setup.files, &setup.binaries);
    let mut targets = start_targets(&arguments.targets, &setup)?;
    let plan = Plan {
        timing: Timing {
            ramp: RAMP,
            measured: Duration::from_secs_f64(arguments.seconds),
        },
        repeats: arguments.repeats,
        seed: arguments.seed,
        calm_wait: Duration::from_secs(arguments.calm),
    };
    let results = runner::run(&mut targets, &jobs, plan, setup.span)?;
    let syscalls = if arguments.syscalls {
        syscalls::count(&mut targets, &jobs, arguments.seed, &setup.sockets)?
    } else {
        Vec::new()
    };
    let report = Report {
        machine,
        command: std::env::args().collect::<Vec<_>>().join(" "),
        seed: arguments.seed,
        span: setup.span,
        jobs,
        targets: arguments.targets.iter().map(|kind| kind.name()).collect(),
        results,
        syscalls,
    };
    print!("{}", report.markdown());
    if let Some(path) = &arguments.json {
        let text = serde_json::to_string_pretty(&report)? + "\n";
        std::fs::write(path, text).with_context(|| path.display().to_string())?;
    }
    Ok(())
}

fn chosen_jobs(arguments: &Arguments) -> Result<Vec<Job>> {
    let span = arguments.span.0;
    ensure!(
        span > 0 && span.is_multiple_of(64 << 20),
        "--span {} is not a multiple of 64MiB",
        arguments.span
    );
    ensure!(
        arguments.seconds > 0.0 && arguments.repeats > 0,
        "--seconds and --repeats must be more than 0"
    );
    let mut jobs = job::all(span);
    for name in &arguments.jobs {
        let names: Vec<&str> = job::all(span).iter().map(|job| job.name).collect();
        ensure!(
            names.contains(&name.as_str()),
            "there is no job '{name}', only {}",
            names.join(", ")
        );
    }
    if !arguments.jobs.is_empty() {
        jobs.retain(|job| arguments.jobs.iter().any(|name| name == job.name));
    }
    Ok(jobs)
}

fn start_targets(kinds: &[Kind], setup: &Setup) -> Result<Vec<Target>> {
    let has_peer_file = kinds.iter().any(|kind| matches!(kind, Kind::Raw | Kind::Qsd));
    let disks = kinds.iter().map(|kind| {
        if let Kind::Weft { replicas } = kind {
            u64::from(*replicas)
        } else {
            0
        }
    });
    let weft_bytes = setup.disk_bytes * disks.sum::<u64>();
    let peer_bytes = if has_peer_file { setup.span * 2 } else { 0 };
    ensure_space(&setup.files, weft_bytes + peer_bytes)?;
    if has_peer_file {
        fully_written_file(&setup.peer_file(), peer_bytes, 0)?;
    }
    kinds
        .iter()
        .map(|&kind| Target::start(kind, setup).with_context(|| kind.name()))
        .collect()
}
