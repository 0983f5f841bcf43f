//! The daemon of a study, its disk and its VDI, and the loads that studies share.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use types::ByteSize;

use super::progress::Progress;
use crate::client::{LoadClient, Next, Requests};
use crate::job::{Op, PAGE};
use crate::permutation::Permutation;
use crate::prepare::{ensure_space, fully_written_file};
use crate::weft::{Place, Weft};

/// Requests under way in every load at random.
pub const DEPTH: usize = 32;

/// Beside the disk itself: the index, its compactions, logs. In proportion, and at least.
const INDEX_SHARE: u64 = 20;
const INDEX_MIN: u64 = 128 << 20;

/// A VDI on one disk.
pub struct Bed {
    /// The daemon.
    pub weft: Weft,
    /// The only client.
    pub client: LoadClient,
    /// Bytes of the VDI.
    pub bytes: u64,
    /// In which order its blocks are written the first time.
    pub order: Permutation,
    disk: PathBuf,
}

/// How long a load is.
#[derive(Clone, Copy, Debug)]
pub enum Until {
    /// So many I/Os, or fewer offsets.
    Count(u64),
    /// So long; what is under way then completes.
    Time(Duration),
}

/// What a study sets up.
pub struct Wanted<'a> {
    /// Of the daemon; files are called after it.
    pub name: &'a str,
    /// Bytes of the disk.
    pub disk_bytes: u64,
    /// Bytes of the VDI, given the bytes that the disk can store.
    pub vdi_bytes: &'a dyn Fn(u64) -> u64,
    /// blockd's settings beside `state`, as TOML.
    pub config: Option<&'a str>,
    /// Of the order of the first writes.
    pub seed: u64,
}

impl Bed {
    /// Makes all of it. Fails before it writes anything where the space is too small.
    pub fn make(place: &Place, wanted: &Wanted<'_>) -> Result<Bed> {
        let beside = (wanted.disk_bytes / INDEX_SHARE).max(INDEX_MIN);
        ensure_space(&place.files, wanted.disk_bytes + beside)?;
        let disk = place.files.join(format!("{}.img", wanted.name));
        eprintln!(
            "{}: writing a disk of {}",
            wanted.name,
            ByteSize(wanted.disk_bytes)
        );
        fully_written_file(&disk, wanted.disk_bytes, wanted.seed)?;
        let mut weft = Weft::start(place, wanted.name, wanted.config)?;
        weft.weft(&["pool", "create", "study"])?;
        weft.weft(&["disk", "add", &disk.display().to_string()])?;
        let capacity = weft.metrics()?.get("weft_disk_capacity_bytes")? as u64;
        let bytes = (wanted.vdi_bytes)(capacity) / (1 << 20) * (1 << 20);
        ensure!(
            bytes > 0,
            "a disk of {} stores only {}: choose a larger --span",
            ByteSize(wanted.disk_bytes),
            ByteSize(capacity)
        );
        let client = weft.make_vdi("study", bytes, 1)?;
        Ok(Bed {
            weft,
            client,
            bytes,
            order: Permutation::new(bytes / PAGE, wanted.seed),
            disk,
        })
    }

    /// Ends the daemon and gives the disk's space back.
    pub fn remove(self) -> Result<()> {
        let Bed {
            weft, client, disk, ..
        } = self;
        drop(client);
        drop(weft);
        std::fs::remove_file(&disk).with_context(|| disk.display().to_string())
    }

    /// Connects to the VDI anew.
    pub fn connect(&mut self) -> Result<()> {
        let socket = self.weft.guest_socket("study");
        self.client = self.weft.daemon().wait_for(|| LoadClient::connect(&socket))?;
        Ok(())
    }

    /// Writes or reads 4 KiB at `offsets` at the depth of all studies; `observe` as in [`LoadClient::drive`].
    pub fn blocks(
        &mut self,
        title: &str,
        op: Op,
        until: Until,
        offsets: impl Iterator<Item = u64>,
        mut observe: impl FnMut(Instant, &[Duration]) -> Next,
    ) -> Result<()> {
        let requests = Requests {
            op,
            block: PAGE,
            depth: DEPTH,
            end: self.bytes,
        };
        let begin = Instant::now();
        let mut progress = Progress::new(title);
        let mut done = 0;
        let observe = |now: Instant, latencies: &[Duration]| {
            done += latencies.len() as u64;
            let share = match until {
                Until::Count(count) => done as f64 / count as f64,
                Until::Time(time) => (now - begin).as_secs_f64() / time.as_secs_f64(),
            };
            progress.tell(now, done, share);
            match observe(now, latencies) {
                Next::GoOn if matches!(until, Until::Time(_)) && share >= 1.0 => Next::Finish,
                next => next,
            }
        };
        let count = match until {
            Until::Count(count) => usize::try_from(count).context("blocks")?,
            Until::Time(_) => usize::MAX,
        };
        let result = self.client.drive(&requests, offsets.take(count), observe);
        self.weft.explain(title, result)
    }

    /// Writes the first `count` blocks of the order, each once, and flushes.
    pub fn fill(&mut self, title: &str, count: u64) -> Result<()> {
        let order = self.order.clone();
        let offsets = (0..count).map(move |at| order.of(at) * PAGE);
        self.blocks(title, Op::Write, Until::Count(count), offsets, |_, _| Next::GoOn)?;
        self.client.flush()
    }
}

/// The disk on which `written` bytes of data take about 80 % of the room, so that a fill needs no cleaning.
pub fn disk_for(written: u64) -> u64 {
    (written / 5 * 7 + (512 << 20)).next_multiple_of(1 << 20)
}
