//! blockd killed under fio in a QEMU guest; then, with the guest still running, its disk grows, one of three pool disks is
//! overwritten with noise, and one fails for good. The guest's fio and kernel may not notice any of it.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;
use sim::Rng;

use crate::daemon::Daemon;
use crate::hurt::{self, LoopDisk};
use crate::machine::{self, Machine};
use crate::{MIB, initramfs};

const POOL_DISK_BYTES: u64 = 1 << 30;
const VDI_BYTES: u64 = 64 * MIB;
const GROWN_BYTES: u64 = 96 * MIB;
const QUEUES: usize = 4;
/// What the guest says after each round, with the disk's size in sectors.
const ROUND: &str = "ok";

/// Where the guest's kernel and the initramfs to build on are.
pub struct Boot<'a> {
    pub kernel: &'a Path,
    pub initramfs: &'a Path,
}

/// `kills` kills, then the rest; `home` is an empty folder.
pub fn run(binary: &Path, home: &Path, boot: &Boot<'_>, kills: u32, seed: u64) -> Result<()> {
    let start = Instant::now();
    let mut rng = Rng::new(seed);
    let initramfs = home.join("initramfs");
    let init = include_str!("machine-init.sh");
    initramfs::make(boot.initramfs, init, &[Path::new("/usr/bin/fio")], &initramfs)?;
    let mut daemon = Daemon::start(binary, home, &[])?;
    daemon.make_pool(2, POOL_DISK_BYTES)?;
    let failing = LoopDisk::new(&daemon.path("disk3.img"), POOL_DISK_BYTES)?;
    daemon.ask("POST", "/v1/disks", &json!({"path": failing.device()}))?;
    let body = json!({"name": "guest", "bytes": VDI_BYTES, "replicas": 3});
    daemon.ask("POST", "/v1/vdis", &body)?;
    let socket = daemon.attach_vhost_user("guest", QUEUES)?;
    let mut machine = Machine::start(&machine::Boot {
        kernel: boot.kernel,
        initramfs: &initramfs,
        words: "",
        processors: QUEUES,
        memory_mib: 640,
        disks: &[&socket],
        vocabulary: &["up", ROUND],
        home,
    })?;
    machine.until("it is up", |machine| machine.count("up") > 0)?;
    println!("guest: {}", machine.last("up"));
    println!("booted after {} s", start.elapsed().as_secs());

    let kills_began = Instant::now();
    for kill in 1..=kills {
        let requests = 20 + rng.below(600);
        wait_for_requests(&mut daemon, &mut machine, requests)
            .with_context(|| format!("before kill {kill} of {kills}"))?;
        daemon.kill()?;
        let killed = Instant::now();
        let cores = if rng.chance(1, 2) { "1" } else { "2" };
        daemon.spawn(&["--cores", cores])?;
        daemon.wait_until_up()?;
        wait_for_requests(&mut daemon, &mut machine, 1)
            .with_context(|| format!("after kill {kill} of {kills}"))?;
        println!(
            "kill {kill:>3} of {kills}: after {requests} requests of that life, round {}; requests again after {} ms, {cores} data-plane threads",
            rounds(&machine) + 1,
            killed.elapsed().as_millis()
        );
    }
    let cycle = kills_began.elapsed().as_secs_f64() / f64::from(kills.max(1));
    more_rounds(&mut machine, 2)?;

    println!("the disk grows to {} MiB", GROWN_BYTES / MIB);
    daemon.ask("POST", "/v1/vdis/guest/resize", &json!({"bytes": GROWN_BYTES}))?;
    machine.until("it sees the larger disk", |machine| {
        disk_bytes(machine) == GROWN_BYTES
    })?;

    println!("noise over one of three disks");
    hurt::overwrite_with_noise(&daemon.path("disk2.img"), &mut rng)?;
    more_rounds(&mut machine, 2)?;
    hurt::scrub(&mut daemon)?;

    println!("one of three disks fails");
    failing.fail()?;
    more_rounds(&mut machine, 2)?;
    daemon.until("the VDI is degraded", |daemon| {
        Ok(daemon.get("/v1/vdis/guest")?["health"] == "degraded")
    })?;
    let rounds = rounds(&machine);
    machine.stop()?;
    daemon.stop()?;
    ensure!(rounds > 0, "no round of fio ended");
    println!(
        "{kills} kills, {cycle:.1} s each; {rounds} rounds of fio verified, no error in the guest; {} s in all",
        start.elapsed().as_secs()
    );
    Ok(())
}

/// Waits until this life of the daemon has taken so many buffers for the guest's reads and writes.
fn wait_for_requests(daemon: &mut Daemon, machine: &mut Machine, requests: u64) -> Result<()> {
    let start = Instant::now();
    loop {
        machine.check()?;
        daemon.check()?;
        if daemon.metric("weft_guest_queues")? > 0 && daemon.metric("weft_buffers_total")? >= requests {
            return Ok(());
        }
        ensure!(
            start.elapsed() < Duration::from_secs(400),
            "the guest asks for nothing\n{}",
            daemon.last_words()
        );
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn more_rounds(machine: &mut Machine, count: u64) -> Result<()> {
    let wanted = rounds(machine) + count;
    machine.until("more rounds of fio", |machine| rounds(machine) >= wanted)
}

/// Rounds of fio that ended well.
fn rounds(machine: &Machine) -> u64 {
    machine.count(ROUND)
}

/// The size of the disk as its kernel saw it at the last round's end.
fn disk_bytes(machine: &Machine) -> u64 {
    let said = machine.last(ROUND);
    let sectors = said
        .split_once(' ')
        .and_then(|(_, sectors)| sectors.parse::<u64>().ok());
    512 * sectors.unwrap_or(0)
}
