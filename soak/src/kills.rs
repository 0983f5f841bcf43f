//! blockd killed (SIGKILL) again and again under verified load: nothing completed is lost, nothing under way is skipped
//! or done by half, and a guest sees no error.
//!
//! Each disk has a load of its own: one with a single replica, one with three. Kills fall at random: while the daemon
//! starts, after so many more answers, in the middle of a reading of everything. Lives have one or two data-plane
//! threads, as drawn.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use serde_json::json;
use sim::Rng;

use crate::blkio_client::BlkioClient;
use crate::client::Client;
use crate::daemon::Daemon;
use crate::guest::Guest;
use crate::load::{Connect, Disk, Load};
use crate::nbd::NbdClient;
use crate::{MIB, PATIENCE, RETRY};

const DISK_BYTES: u64 = 1 << 30;
const VDI_BYTES: u64 = 24 * MIB;
const QUEUES: usize = 4;

/// Who writes, reads and verifies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ClientKind {
    /// A vhost-user frontend of ours that goes on as QEMU does.
    Vhost,
    /// The `blkio` crate's driver, connected anew after each kill.
    Blkio,
    /// An NBD client, connected anew after each kill.
    Nbd,
}

/// Starts a load of `kind` on `disk`, whose door is open at `socket`.
pub fn start_load(daemon: &Daemon, disk: &Arc<Disk>, kind: ClientKind, socket: &Path, seed: u64) -> Load {
    let lives = Arc::clone(&daemon.lives);
    let socket = socket.to_owned();
    let (name, connect): (_, Connect) = match kind {
        ClientKind::Vhost => (
            "vhost",
            Box::new(move || Ok(Box::new(Guest::connect(&socket, QUEUES)?) as Box<dyn Client>)),
        ),
        ClientKind::Blkio => (
            "blkio",
            Box::new(move || Ok(Box::new(BlkioClient::connect(&socket, QUEUES, &lives)?) as Box<dyn Client>)),
        ),
        ClientKind::Nbd => (
            "nbd",
            Box::new(move || Ok(Box::new(NbdClient::connect(&socket)?) as Box<dyn Client>)),
        ),
    };
    Load::start(disk, name, seed, connect)
}

/// Waits until `is_so` of every load; fails as soon as one of them found something wrong.
pub fn until_all(
    daemon: &mut Daemon,
    loads: &mut [Load],
    what: &str,
    is_so: impl Fn(usize, &Load) -> bool,
) -> Result<()> {
    let start = Instant::now();
    loop {
        for load in loads.iter_mut() {
            load.check()?;
        }
        daemon.check()?;
        if loads.iter().enumerate().all(|(number, load)| is_so(number, load)) {
            return Ok(());
        }
        ensure!(
            start.elapsed() < PATIENCE,
            "not within {PATIENCE:?}: {what}\n{}",
            daemon.last_words()
        );
        std::thread::sleep(RETRY);
    }
}

/// Everything is read once by every load, and right.
pub fn sweep(daemon: &mut Daemon, loads: &mut [Load]) -> Result<()> {
    let orders: Vec<u64> = loads.iter().map(Load::order_sweep).collect();
    until_all(daemon, loads, "everything is read once", |number, load| {
        load.has_swept(orders[number])
    })
}

/// `kills` kills under load of `kind`; `home` is an empty folder.
pub fn run(binary: &Path, home: &Path, kind: ClientKind, kills: u32, seed: u64) -> Result<()> {
    let start = Instant::now();
    let mut rng = Rng::new(seed);
    let mut daemon = Daemon::start(binary, home, &[])?;
    daemon.make_pool(3, DISK_BYTES)?;
    let mut loads = Vec::new();
    for (number, replicas) in [(1, 1), (2, 3)] {
        let name = format!("replicas-{replicas}");
        let body = json!({"name": name, "bytes": VDI_BYTES, "replicas": replicas});
        daemon.ask("POST", "/v1/vdis", &body)?;
        let socket = match kind {
            ClientKind::Vhost | ClientKind::Blkio => daemon.attach_vhost_user(&name, QUEUES)?,
            ClientKind::Nbd => daemon.attach_nbd(&name)?,
        };
        let disk = Disk::new(number, &name, VDI_BYTES, 512);
        loads.push(start_load(&daemon, &disk, kind, &socket, rng.draw()));
    }
    let mut lives = Vec::new();
    for kill in 1..=kills {
        let moment = wait_for_a_moment(&mut daemon, &mut loads, &mut rng)
            .with_context(|| format!("before kill {kill} of {kills}"))?;
        daemon.kill()?;
        let killed = Instant::now();
        let cores = if rng.chance(1, 2) { "1" } else { "2" };
        daemon.spawn(&["--cores", cores])?;
        // A few die before they are up; the loads know nothing of it.
        if rng.chance(1, 5) {
            let age = Duration::from_micros(rng.below(200_000));
            std::thread::sleep(age); // The moment of the fault itself is what is drawn.
            daemon.kill()?;
            daemon.spawn(&["--cores", cores])?;
            println!("  killed again {} ms after its start", age.as_millis());
        }
        let before: Vec<u64> = loads.iter().map(Load::answers).collect();
        until_all(&mut daemon, &mut loads, "answers after a kill", |number, load| {
            load.answers() > before[number]
        })
        .with_context(|| format!("after kill {kill} of {kills}"))?;
        println!(
            "kill {kill:>3} of {kills}: {moment}; answers again after {} ms, {cores} data-plane threads",
            killed.elapsed().as_millis()
        );
        lives.push(killed.elapsed());
    }
    // The first reading settles what each request under way came to, the second must find the same.
    sweep(&mut daemon, &mut loads)?;
    for load in &mut loads {
        load.stop()?;
    }
    daemon.stop()?;
    lives.sort_unstable();
    let answers: u64 = loads.iter().map(Load::answers).sum();
    let sectors: u64 = loads.iter().map(Load::sectors_verified).sum();
    println!(
        "{kills} kills, {answers} answers, {} MiB verified, answers again after {} ms (median) in {} s",
        sectors * 512 / MIB,
        lives.get(lives.len() / 2).map_or(0, Duration::as_millis),
        start.elapsed().as_secs()
    );
    Ok(())
}

/// Lets the loads go on for a while that is drawn: in answers, never in time.
fn wait_for_a_moment(daemon: &mut Daemon, loads: &mut [Load], rng: &mut Rng) -> Result<String> {
    if rng.chance(1, 3) {
        sweep(daemon, loads)?;
        return Ok("after everything was read".to_owned());
    }
    let answers = rng.below(400);
    let before: Vec<u64> = loads.iter().map(Load::answers).collect();
    until_all(daemon, loads, "more answers", |number, load| {
        load.answers() >= before[number] + answers
    })?;
    Ok(format!("after {answers} more answers"))
}
