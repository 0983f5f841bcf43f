//! The soak: one random walk over real processes. Several virtual disks are under verified load all the time; what
//! happens to daemon, disks, indexes and superblocks is drawn from a seed, and never more at once than the redundancy
//! bears. After each event the loads must go on, everything must become whole again, and nothing unexplained may have
//! been reported.

mod events;
mod full;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;
use sim::Rng;

use crate::daemon::Daemon;
use crate::hurt::{self, LoopDisk};
use crate::kills::{ClientKind, start_load, sweep, until_all};
use crate::load::{Disk, Load};
use crate::{MIB, PATIENCE};

/// Of each pool disk: as small as they may be, so that cleaning has work.
const POOL_DISK_BYTES: u64 = 1024 * MIB;
const POOL_DISKS: usize = 4;
const VDI_BYTES: u64 = 20 * MIB;

/// Settings of the daemon, and what its memory may come to with them.
const CACHE_MIB: u64 = 16;
const BUFFERS_MIB: u64 = 64;
/// RocksDB's, requests of 1 MiB under way, what the allocator keeps, the program itself.
const OTHER_MIB: u64 = 450;
const DESCRIPTORS_MAX: usize = 600;

/// CPU that an idle daemon may use in [`IDLE`], in ticks of 10 ms.
const IDLE_TICKS_MAX: u64 = 8;
const IDLE: Duration = Duration::from_secs(3);

/// Where the programs are.
pub struct Programs<'a> {
    pub blockd: &'a Path,
    pub weft: &'a Path,
}

struct PoolDisk {
    number: usize,
    id: String,
    path: PathBuf,
    device: Option<LoopDisk>,
    /// Its log holds noise that was repaired elsewhere: fsck has something to say of it.
    had_noise: bool,
    fresh_noise: Option<FreshNoise>,
}

/// Noise over a disk's log until the end of the life that meets it at its start, counted in lives of the daemon.
struct FreshNoise {
    made: u64,
    met: Option<u64>,
}

impl PoolDisk {
    /// Gets noise that the lives after this one have yet to meet.
    fn has_got_noise(&mut self, life: u64) {
        self.had_noise = true;
        self.fresh_noise = Some(FreshNoise {
            made: life,
            met: None,
        });
    }

    fn pass_into_life(&mut self, life: u64) {
        if let Some(noise) = &mut self.fresh_noise
            && life > noise.made
            && *noise.met.get_or_insert(life) < life
        {
            self.fresh_noise = None;
        }
    }

    /// Whether noise explains what a life of the daemon said.
    fn is_explained_by_noise(&self, message: &str) -> bool {
        // A log of which nothing is left is behind its index, as an older copy of the disk would be.
        let is_lost = self.fresh_noise.is_some() && message.contains("older copy of itself");
        let has_gaps = self.had_noise && message.contains("parts of its log are missing");
        message.contains(&self.id) && (is_lost || has_gaps)
    }
}

struct World<'a> {
    programs: &'a Programs<'a>,
    daemon: Daemon,
    rng: Rng,
    disks: Vec<PoolDisk>,
    loads: Vec<Load>,
    vdis: Vec<Vdi>,
    next_number: usize,
    /// Critical events that were explained by what was done, by words in them.
    explained: &'static [&'static str],
    repaired: u64,
    rss_mib_max: u64,
    descriptors_max: usize,
}

/// What an event came to.
pub enum Done {
    Did(String),
    /// There was nothing to do it to.
    CouldNot(String),
}

struct Vdi {
    name: &'static str,
    disk: std::sync::Arc<Disk>,
}

/// What can happen.
pub fn names() -> Vec<&'static str> {
    events::KINDS.iter().map(|(name, _)| *name).collect()
}

/// Walks for so long, through all that can happen or `only` that; `home` is an empty folder.
pub fn run(
    programs: &Programs<'_>,
    home: &Path,
    length: Duration,
    seed: u64,
    only: Option<&str>,
) -> Result<()> {
    let kinds = || {
        events::KINDS
            .iter()
            .filter(|(name, _)| only.is_none_or(|only| only == *name))
    };
    let start = Instant::now();
    let mut counts: BTreeMap<&str, (u32, u32)> = BTreeMap::new();
    let mut world = World::start(programs, home, seed)?;
    // Every kind comes once in a drawn order, then any.
    let mut round: Vec<events::Kind> = Vec::new();
    while start.elapsed() < length {
        if round.is_empty() {
            round = kinds().copied().collect();
            for last in (1..round.len()).rev() {
                round.swap(last, world.rng.below(last as u64 + 1) as usize);
            }
        }
        let (name, event) = round.pop().expect("just filled");
        let began = Instant::now();
        world.explained = &[];
        let outcome = event(&mut world).and_then(|what| world.is_well().map(|()| what));
        let at = start.elapsed().as_secs_f64();
        let done = outcome.with_context(|| {
            format!(
                "{name}, at {at:.1} s (seed {seed})\n{}",
                world.daemon.last_words()
            )
        })?;
        let (did, could_not) = counts.entry(name).or_default();
        let what = match done {
            Done::Did(what) => {
                *did += 1;
                what
            }
            Done::CouldNot(why) => {
                *could_not += 1;
                format!("not now: {why}")
            }
        };
        println!(
            "{at:>7.1} s  {name:<12} {:>5.1} s  {what}",
            began.elapsed().as_secs_f64()
        );
    }
    world.end().context("at the end")?;
    let counts: Vec<String> = counts
        .iter()
        .map(|(name, (did, could_not))| match could_not {
            0 => format!("{name} {did}"),
            _ => format!("{name} {did} (not possible {could_not} times)"),
        })
        .collect();
    println!(
        "soak: {} s, seed {seed}: {}",
        start.elapsed().as_secs(),
        counts.join(", ")
    );
    println!("soak: {}", world.summary());
    Ok(())
}

impl<'a> World<'a> {
    fn start(programs: &'a Programs<'a>, home: &Path, seed: u64) -> Result<World<'a>> {
        let config = home.join("blockd.toml");
        std::fs::write(
            &config,
            format!("cache = '{CACHE_MIB}MiB'\nbuffers = '{BUFFERS_MIB}MiB'\n"),
        )?;
        let mut daemon = Daemon::start(programs.blockd, home, &[])?;
        daemon.ask("POST", "/v1/pool", &json!({"name": "soak"}))?;
        daemon.stop()?;
        let mut world = World {
            programs,
            daemon,
            rng: Rng::new(seed),
            disks: Vec::new(),
            loads: Vec::new(),
            vdis: Vec::new(),
            next_number: 1,
            explained: &[],
            repaired: 0,
            rss_mib_max: 0,
            descriptors_max: 0,
        };
        world.start_daemon()?;
        for _ in 0..POOL_DISKS {
            world.add_disk(false)?;
        }
        for (number, name, replicas, sector) in
            [(1, "one", 1, 512), (2, "two", 2, 4096), (3, "three", 3, 512)]
        {
            let body = json!({"name": name, "bytes": VDI_BYTES, "replicas": replicas, "sector_bytes": sector, "shard_bytes": 8 * MIB});
            world.daemon.ask("POST", "/v1/vdis", &body)?;
            let disk = Disk::new(number, name, VDI_BYTES, sector);
            let (vhost, nbd) = (
                world.daemon.attach_vhost_user(name, 4)?,
                world.daemon.attach_nbd(name)?,
            );
            let kinds: &[_] = match name {
                "one" => &[(ClientKind::Vhost, &vhost)],
                "two" => &[(ClientKind::Blkio, &vhost), (ClientKind::Nbd, &nbd)],
                _ => &[(ClientKind::Vhost, &vhost), (ClientKind::Nbd, &nbd)],
            };
            for (kind, socket) in kinds {
                let seed = world.rng.draw();
                world
                    .loads
                    .push(start_load(&world.daemon, &disk, *kind, socket, seed));
            }
            world.vdis.push(Vdi { name, disk });
        }
        Ok(world)
    }

    fn start_daemon(&mut self) -> Result<()> {
        let config = self.daemon.path("blockd.toml");
        let cores = if self.rng.chance(1, 2) { "1" } else { "2" };
        self.daemon
            .spawn(&["--config", config.to_str().context("UTF-8")?, "--cores", cores])?;
        self.daemon.wait_until_up()
    }

    /// A new pool disk, on a loop device of its own if it shall be able to fail.
    fn add_disk(&mut self, can_fail: bool) -> Result<usize> {
        let (number, body, path, device) = self.new_disk(can_fail)?;
        let added = self.daemon.ask("POST", "/v1/disks", &body)?;
        self.keep_disk(number, &added, path, device)
    }

    fn new_disk(&mut self, can_fail: bool) -> Result<(usize, serde_json::Value, PathBuf, Option<LoopDisk>)> {
        let number = self.next_number;
        self.next_number += 1;
        let file = self.daemon.path(&format!("disk{number}.img"));
        if can_fail {
            let device = LoopDisk::new(&file, POOL_DISK_BYTES)?;
            let body = json!({"path": device.device()});
            return Ok((number, body, file, Some(device)));
        }
        Ok((
            number,
            json!({"path": file, "create_bytes": POOL_DISK_BYTES}),
            file,
            None,
        ))
    }

    fn keep_disk(
        &mut self,
        number: usize,
        added: &serde_json::Value,
        path: PathBuf,
        device: Option<LoopDisk>,
    ) -> Result<usize> {
        self.disks.push(PoolDisk {
            number,
            id: added["id"].as_str().context("a disk's id")?.to_owned(),
            path,
            device,
            had_noise: false,
            fresh_noise: None,
        });
        Ok(self.disks.len() - 1)
    }

    /// Waits until every load has so many more answers.
    fn go_on(&mut self, answers: u64) -> Result<()> {
        let before: Vec<u64> = self.loads.iter().map(Load::answers).collect();
        until_all(
            &mut self.daemon,
            &mut self.loads,
            "the loads go on",
            |number, load| load.answers() >= before[number] + answers,
        )
    }

    fn until_whole(&mut self) -> Result<()> {
        let start = Instant::now();
        loop {
            self.loads.iter_mut().try_for_each(Load::check)?;
            self.daemon.check()?;
            let vdis = self.daemon.get("/v1/vdis")?;
            let vdis = vdis.as_array().context("a list")?;
            if vdis.iter().all(|vdi| vdi["health"] == "whole") {
                return Ok(());
            }
            ensure!(
                start.elapsed() < PATIENCE,
                "not whole again after {PATIENCE:?}: {vdis:?}"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// After each event: the loads go on, everything is whole, nothing unexplained was said, nothing has grown.
    fn is_well(&mut self) -> Result<()> {
        self.go_on(20)?;
        self.until_whole()?;
        let life = self.daemon.lives.load(Ordering::SeqCst);
        for disk in &mut self.disks {
            disk.pass_into_life(life);
        }
        let status = self.daemon.get("/v1/status")?;
        for event in status["events"].as_array().context("events")? {
            let message = event["message"].as_str().unwrap_or_default();
            // What noise did to a disk's log shows at the next start.
            let was_noise = self.disks.iter().any(|disk| disk.is_explained_by_noise(message));
            let is_explained = was_noise || self.explained.iter().any(|words| message.contains(words));
            ensure!(
                event["severity"] != "critical" || is_explained,
                "unexplained: {message}"
            );
        }
        ensure!(
            self.daemon.metric("weft_blocks_unreadable_total")? == 0,
            "blocks without a good copy"
        );
        let process = format!("/proc/{}", self.daemon.pid()?);
        let text = std::fs::read_to_string(format!("{process}/status"))?;
        let resident = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib: u64 = resident
            .and_then(|text| text.split_whitespace().next()?.parse().ok())
            .context("VmRSS")?;
        let bound = CACHE_MIB * self.disks.len() as u64 + BUFFERS_MIB + OTHER_MIB;
        ensure!(
            kib / 1024 <= bound,
            "the daemon has {} MiB resident, more than {bound}",
            kib / 1024
        );
        let descriptors = std::fs::read_dir(format!("{process}/fd"))?.count();
        ensure!(
            descriptors <= DESCRIPTORS_MAX,
            "the daemon has {descriptors} files open"
        );
        self.rss_mib_max = self.rss_mib_max.max(kib / 1024);
        self.descriptors_max = self.descriptors_max.max(descriptors);
        Ok(())
    }

    /// A disk whose loss or noise loses nothing: no virtual disk with a single replica is on it.
    fn spare_disk(&mut self) -> Result<Option<usize>> {
        let mut needed = Vec::new();
        let vdis = self.daemon.get("/v1/vdis")?;
        for vdi in vdis
            .as_array()
            .context("a list")?
            .iter()
            .filter(|vdi| vdi["replicas"] == 1)
        {
            let disks = vdi["disks"].as_array().context("disks")?;
            needed.extend(
                disks
                    .iter()
                    .filter_map(|disk| disk["disk"].as_str().map(str::to_owned)),
            );
        }
        let spare: Vec<usize> = (0..self.disks.len())
            .filter(|index| !needed.contains(&self.disks[*index].id))
            .collect();
        Ok((!spare.is_empty()).then(|| spare[self.rng.below(spare.len() as u64) as usize]))
    }

    fn any_disk(&mut self) -> usize {
        self.rng.below(self.disks.len() as u64) as usize
    }

    /// Everything read by everyone, scrubbed, at rest, and once more after a last kill.
    fn end(&mut self) -> Result<()> {
        self.explained = &[];
        sweep(&mut self.daemon, &mut self.loads)?;
        self.until_whole()?;
        let (_, repaired) = hurt::scrub(&mut self.daemon)?;
        self.repaired += repaired;
        self.daemon.kill()?;
        self.start_daemon()?;
        sweep(&mut self.daemon, &mut self.loads)?;
        for load in &mut self.loads {
            load.stop()?;
        }
        self.until_whole()?;
        let ticks = self.until_idle()?;
        self.daemon.stop()?;
        let mut sound = 0;
        for disk in self.disks.iter().filter(|disk| !disk.had_noise) {
            events::fsck(self.programs.weft, &disk.path)?;
            sound += 1;
        }
        let left = self.delete_everything()?;
        println!(
            "at the end: {} ms of CPU in {} s at rest; {sound} disks that never had noise are sound; {left} bytes left of {} deleted virtual disks",
            ticks * 10,
            IDLE.as_secs(),
            self.vdis.len()
        );
        Ok(())
    }

    /// What is deleted leaves nothing: no replica of any of the many virtual disks there were, no block.
    fn delete_everything(&mut self) -> Result<u64> {
        self.start_daemon()?;
        for vdi in &self.vdis {
            let path = format!("/v1/vdis/{}", vdi.name);
            self.daemon.ask("POST", &format!("{path}/detach"), &json!({}))?;
            self.daemon.ask("DELETE", &path, &serde_json::Value::Null)?;
        }
        let mut left = 0;
        self.daemon.until("nothing is left on the disks", |daemon| {
            let disks = daemon.get("/v1/disks")?;
            let disks = disks.as_array().context("a list")?;
            let sum = |name: &str| -> u64 { disks.iter().filter_map(|disk| disk[name].as_u64()).sum() };
            left = sum("used_bytes");
            Ok(left + sum("replicas") == 0)
        })?;
        self.daemon.stop()?;
        Ok(left)
    }

    /// With nobody asking for anything it soon uses no CPU. Returns how much, in ticks of 10 ms.
    fn until_idle(&mut self) -> Result<u64> {
        let start = Instant::now();
        loop {
            let before = self.cpu_ticks()?;
            std::thread::sleep(IDLE); // What is measured is sleep.
            let used = self.cpu_ticks()? - before;
            if used <= IDLE_TICKS_MAX {
                return Ok(used);
            }
            if start.elapsed() > PATIENCE {
                bail!("the idle daemon uses {used} ticks of CPU in {IDLE:?}");
            }
        }
    }

    fn cpu_ticks(&self) -> Result<u64> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.daemon.pid()?))?;
        let fields: Vec<&str> = stat
            .rsplit_once(')')
            .context("stat")?
            .1
            .split_whitespace()
            .collect();
        Ok(fields[11].parse::<u64>()? + fields[12].parse::<u64>()?)
    }

    fn summary(&self) -> String {
        let answers: u64 = self.loads.iter().map(Load::answers).sum();
        let sectors: u64 = self.loads.iter().map(Load::sectors_verified).sum();
        let connections: u64 = self.loads.iter().map(Load::connections).sum();
        format!(
            "{answers} answers, {} blocks of 4 KiB verified, {} blocks repaired, {connections} connections; blockd at most {} MiB resident with {} files open",
            sectors / 8,
            self.repaired,
            self.rss_mib_max,
            self.descriptors_max
        )
    }
}
