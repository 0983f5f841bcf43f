//! The pool at 100 %: writes wait and none fails, reads go on, kills change nothing, and with space again everybody goes
//! on.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::json;
use sim::content;

use super::{Done, World, events};
use crate::client::{Client, Op};
use crate::load::Load;
use crate::nbd::NbdClient;
use crate::oracle::SECTOR;
use crate::{MIB, PATIENCE, RETRY};

/// More than the pool holds: thin disks may promise it.
const FILLER_BYTES: u64 = 16 << 30;

/// Mixed into its content, as the numbers of disks under load are.
const FILLER_ADDRESS: u64 = 1 << 60;

/// While nothing is answered for so many looks, everything waits.
const LOOKS: u32 = 8;
const LOOK: Duration = Duration::from_millis(50);

/// Pieces of 1 MiB that are read back: the last ones, and as many of the others.
const READ_BACK: usize = 16;

/// How often the daemon dies on the full pool, at most.
const KILLS_MAX: u64 = 4;

/// Fills, kills a few times with everything waiting, reads back, gives the space back.
pub fn fill(world: &mut World<'_>) -> Result<Done> {
    world.explained = &["is full"];
    let body = json!({"name": "filler", "bytes": FILLER_BYTES, "replicas": 1, "shard_bytes": 32 * MIB});
    world.daemon.ask("POST", "/v1/vdis", &body)?;
    let mut filler = Filler::new(world.daemon.attach_nbd("filler")?);
    world.loads.iter().for_each(|load| load.allow_waiting(true));
    filler.fill(world).context("the first time")?;
    let kills = world.rng.below(KILLS_MAX + 1);
    for kill in 1..=kills {
        filler.lose_connection();
        if world.rng.chance(1, 2) {
            events::kill_while_starting(world)?;
        } else {
            world.daemon.kill()?;
            world.start_daemon()?;
        }
        filler
            .fill(world)
            .with_context(|| format!("after kill {kill} of {kills}"))?;
    }
    filler.read_back(world).context("at 100 %")?;
    drop(filler.client.take());
    world.daemon.ask("POST", "/v1/vdis/filler/detach", &json!({}))?;
    let path = "/v1/vdis/filler";
    world.daemon.ask("DELETE", path, &serde_json::Value::Null)?;
    let is_killed = world.rng.chance(1, 2);
    if is_killed {
        world.daemon.kill()?;
        world.start_daemon()?;
    }
    events::wait_until_deleted(world, path)?;
    world.go_on(50)?;
    world.loads.iter().for_each(|load| load.allow_waiting(false));
    world.is_well()?;
    // The event stays in the daemon's list: a new life begins a new one.
    world.daemon.stop()?;
    world.start_daemon()?;
    let how = if is_killed { ", killed while deleted" } else { "" };
    Ok(Done::Did(format!(
        "{} MiB until writes waited; {kills} kills when full{how}",
        filler.answered.len()
    )))
}

/// A disk that is written from its beginning, 1 MiB at a time.
struct Filler {
    socket: PathBuf,
    client: Option<NbdClient>,
    /// Pieces, by number.
    next: u64,
    under_way: BTreeSet<u64>,
    again: BTreeSet<u64>,
    answered: BTreeSet<u64>,
}

impl Filler {
    fn new(socket: PathBuf) -> Filler {
        Filler {
            socket,
            client: None,
            next: 0,
            under_way: BTreeSet::new(),
            again: BTreeSet::new(),
            answered: BTreeSet::new(),
        }
    }

    fn lose_connection(&mut self) {
        self.client = None;
        self.again.append(&mut self.under_way);
    }

    fn connect(&mut self) -> Result<NbdClient> {
        let start = Instant::now();
        loop {
            match NbdClient::connect(&self.socket) {
                Ok(client) => return Ok(client),
                Err(error) if start.elapsed() > PATIENCE => return Err(error),
                Err(_) => std::thread::sleep(RETRY),
            }
        }
    }

    /// Writes until a disk is said to be full and nothing is answered any more.
    fn fill(&mut self, world: &mut World<'_>) -> Result<()> {
        let mut client = match self.client.take() {
            Some(client) => client,
            None => self.connect()?,
        };
        let mut progress = Instant::now();
        let mut looks = 0;
        while looks < LOOKS {
            while self.under_way.len() < client.depth() {
                let number = self.again.pop_first().unwrap_or(self.next);
                self.next = self.next.max(number + 1);
                let (offset, data) = (number * MIB, content_of(number));
                client
                    .submit(0, number, &Op::Write { offset, data })
                    .map_err(gone)?;
                self.under_way.insert(number);
            }
            let answers = client.reap(LOOK).map_err(gone)?;
            looks = match answers.is_empty() {
                true => looks + u32::from(is_full(world)?),
                false => 0,
            };
            for answer in answers {
                progress = Instant::now();
                answer
                    .result
                    .map_err(|error| anyhow!("a write was answered with {error}"))?;
                self.under_way.remove(&answer.id);
                self.answered.insert(answer.id);
            }
            world.loads.iter_mut().try_for_each(Load::check)?;
            world.daemon.check()?;
            ensure!(
                progress.elapsed() < PATIENCE,
                "nothing was answered for {PATIENCE:?} after {} MiB, and no disk is said to be full",
                self.answered.len()
            );
        }
        self.client = Some(client);
        Ok(())
    }

    /// What was answered is there, and can be read while writes wait.
    fn read_back(&mut self, world: &mut World<'_>) -> Result<()> {
        let count = self.answered.len();
        let mut numbers: BTreeSet<u64> = self.answered.iter().rev().take(READ_BACK).copied().collect();
        for _ in 0..READ_BACK {
            let drawn = world.rng.below(count as u64) as usize;
            numbers.extend(self.answered.iter().nth(drawn));
        }
        // A connection of its own: on the other one all requests that it takes are writes that wait.
        let mut client = self.connect()?;
        for number in numbers {
            let op = Op::Read {
                offset: number * MIB,
                length: MIB,
            };
            client.submit(0, number, &op).map_err(gone)?;
            let start = Instant::now();
            let answer = loop {
                ensure!(start.elapsed() < PATIENCE, "no answer to a read in {PATIENCE:?}");
                world.daemon.check()?;
                if let Some(answer) = client.reap(LOOK).map_err(gone)?.pop() {
                    break answer;
                }
            };
            let data = answer
                .result
                .map_err(|error| anyhow!("a read was answered with {error}"))?;
            ensure!(
                data == content_of(number),
                "MiB {number} of the filler is not what was written"
            );
        }
        Ok(())
    }
}

fn gone(_: crate::client::Gone) -> anyhow::Error {
    anyhow!("the filler lost its connection")
}

fn is_full(world: &World<'_>) -> Result<bool> {
    if world.daemon.metric("weft_disk_waiting_for_space")? == 0 {
        return Ok(false);
    }
    let status = world.daemon.get("/v1/status")?;
    let events = status["events"].as_array().context("events")?;
    let is_said = |event: &serde_json::Value| {
        let message = event["message"].as_str();
        message.is_some_and(|message| message.contains("is full"))
    };
    Ok(events.iter().any(is_said))
}

fn content_of(number: u64) -> Vec<u8> {
    let mut data = vec![0; MIB as usize];
    let first = FILLER_ADDRESS + number * (MIB / SECTOR);
    for (address, sector) in (first..).zip(data.chunks_mut(SECTOR as usize)) {
        content::fill_sector(address, number + 1, sector);
    }
    data
}
