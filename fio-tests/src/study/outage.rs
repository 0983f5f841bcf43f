//! A host is killed while a guest writes; it comes back and is brought up to date.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use serde::Serialize;

use crate::client::{LoadClient, Next, Requests};
use crate::cluster::Cluster;
use crate::job::{Op, PAGE};
use crate::permutation::Permutation;
use crate::random::Random;

/// Writes under way at once where nothing is measured of them.
const DEPTH: usize = 32;

/// Between two looks at a resync; a look costs the first host a few hundred microseconds.
const LOOK: Duration = Duration::from_millis(20);

/// Longest wait for a resync.
const PATIENCE: Duration = Duration::from_secs(600);

/// Of whom, and by whom.
pub struct Bed<'a> {
    pub cluster: &'a mut Cluster,
    /// Connected to the VDI.
    pub guest: &'a mut LoadClient,
    pub vdi: &'a str,
    /// Of the VDI.
    pub bytes: u64,
}

/// What a guest does around a kill.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Random writes under way at once.
    pub depth: usize,
    /// Before the kill, and after it.
    pub seconds: f64,
}

/// What a kill did to a guest.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Kill {
    /// Which host, from 0.
    pub victim: usize,
    /// Of the load.
    pub depth: usize,
    /// Writes that completed before the kill, and the longest that one took.
    pub writes_before: u64,
    pub before_ms: f64,
    /// The same of those that were under way at the kill, and later ones.
    pub writes_after: u64,
    pub after_ms: f64,
}

/// How a host caught up.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Resync {
    /// Which host, from 0.
    pub victim: usize,
    /// Blocks of 4 KiB written while it was away.
    pub blocks: u64,
    /// From the start of its process until every replica was in sync.
    pub whole_s: f64,
    /// The part of it in which there was a link to it.
    pub linked_s: f64,
    /// Bytes both ways on that link: what was compared, copied and acknowledged.
    pub link_bytes: f64,
}

impl Bed<'_> {
    /// Random writes, and SIGKILL of host `victim` in the middle of them.
    pub fn kill_under_load(&mut self, victim: usize, load: Load, seed: u64) -> Result<Kill> {
        let mut random = Random::new(seed);
        let blocks = self.bytes / PAGE;
        let offsets = std::iter::repeat_with(move || random.below(blocks) * PAGE);
        let half = Duration::from_secs_f64(load.seconds);
        let begin = Instant::now();
        let (cluster, guest) = (&mut *self.cluster, &mut *self.guest);
        let mut seen = Vec::new();
        let mut observe = |now: Instant, latencies: &[Duration]| {
            // All that matters, few enough to keep: the slowest of each turn, and how many they were.
            let slowest = latencies.iter().max().copied().unwrap_or_default();
            seen.push((now, latencies.len() as u64, slowest));
            if now - begin >= 2 * half {
                Next::Finish
            } else {
                Next::GoOn
            }
        };
        let requests = Requests {
            op: Op::Write,
            block: PAGE,
            depth: load.depth,
            end: self.bytes,
        };
        // By a thread of its own: the load must not wait for the process to be gone.
        let (killed, done) = std::thread::scope(|scope| {
            let killer = scope.spawn(|| {
                std::thread::sleep(half);
                let at = Instant::now();
                cluster.kill(victim);
                at
            });
            let done = guest.drive(&requests, offsets, &mut observe);
            (killer.join(), done)
        });
        done.with_context(|| self.cluster.last_words())?;
        let killed = killed.map_err(|_| anyhow!("the thread that kills ended badly"))?;
        let part = |is_after: bool| {
            let of_it = || seen.iter().filter(move |(at, ..)| (*at >= killed) == is_after);
            let longest = of_it().map(|(_, _, slowest)| *slowest).max().unwrap_or_default();
            (
                of_it().map(|(_, count, _)| count).sum(),
                longest.as_secs_f64() * 1e3,
            )
        };
        let ((writes_before, before_ms), (writes_after, after_ms)) = (part(false), part(true));
        ensure!(
            writes_before > 0 && writes_after > 0,
            "{writes_before} writes before the kill, {writes_after} after it"
        );
        Ok(Kill {
            victim,
            depth: load.depth,
            writes_before,
            before_ms,
            writes_after,
            after_ms,
        })
    }

    /// Starts a host again and waits until it has all that it missed.
    pub fn bring_back(&mut self, victim: usize) -> Result<()> {
        self.cluster.until_whole(self.vdi, false)?;
        self.cluster.start_again(victim)?;
        self.cluster.until_whole(self.vdi, true)
    }

    /// Kills host `victim`, writes `share` of all blocks, each once and anywhere, and starts it again.
    pub fn miss_and_return(&mut self, victim: usize, share: f64, seed: u64) -> Result<Resync> {
        self.cluster.kill(victim);
        self.cluster.until_whole(self.vdi, false)?;
        let order = Permutation::new(self.bytes / PAGE, seed);
        let blocks = ((order.count() as f64 * share) as u64).max(1);
        let requests = Requests {
            op: Op::Write,
            block: PAGE,
            depth: DEPTH,
            end: self.bytes,
        };
        let offsets = (0..blocks).map(|at| order.of(at) * PAGE);
        let written = self.guest.drive(&requests, offsets, |_, _| Next::GoOn);
        written.with_context(|| self.cluster.last_words())?;
        self.guest.flush()?;
        let begin = Instant::now();
        self.cluster.start_again(victim)?;
        let mut linked = None;
        // None while there is no link.
        while !self.cluster.is_whole(self.vdi)? {
            if linked.is_none() && self.cluster.link_bytes(victim).is_ok() {
                linked = Some(Instant::now());
            }
            ensure!(
                begin.elapsed() < PATIENCE,
                "h{} is not in sync after {PATIENCE:?}\n{}",
                victim + 1,
                self.cluster.last_words()
            );
            std::thread::sleep(LOOK);
        }
        let whole = Instant::now();
        Ok(Resync {
            victim,
            blocks,
            whole_s: (whole - begin).as_secs_f64(),
            linked_s: (whole - linked.unwrap_or(whole)).as_secs_f64(),
            link_bytes: self.cluster.link_bytes(victim)?,
        })
    }
}
