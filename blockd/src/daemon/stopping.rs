//! A clean stop, as SIGTERM asks for: doors close, what was written is flushed, the disks' logs say so.
//!
//! Nothing that a guest was promised depends on it: what its flushes covered is durable already, on as many replicas as
//! that takes. The flush here is for the rest, so that whoever cuts the power after a clean stop loses nothing at all. It
//! is sent to every replica that can be reached at once; where too few can be, no answer comes however long one waits,
//! and what there is to be done has been done.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use tokio::sync::oneshot::{self, error::TryRecvError};
use types::VdiId;
use vdi::{Op, Outcome, VdiError};

use super::Daemon;
use crate::plane::Command;

/// How long the flushes may take in all: a disk may be slow, or full.
const FLUSHES: Duration = Duration::from_secs(20);

/// How long a VDI's quorum must have been missing before its flush is given up. A link that just ended may be back in
/// a moment, and the disks that are here have their copy durable by then.
const WITHOUT_QUORUM: Duration = Duration::from_secs(1);

const LOOK: Duration = Duration::from_millis(20);

type Answer = oneshot::Receiver<Result<Outcome<edge::uring::Buf>, VdiError>>;

/// A flush that has no answer yet.
struct Flush {
    answer: Answer,
    without_quorum_since: Option<Instant>,
}

impl Daemon {
    /// Closes the doors and makes everything durable that can be.
    pub async fn drain(&self) {
        self.close_all_doors().await;
        if let Err(error) = self.tell_disks() {
            tracing::warn!(%error, "the disks may not know the latest of the pool");
        }
        self.flush_all().await;
        for plane in &self.planes {
            plane.send(Command::Stop);
        }
        // RocksDB must be closed, by its index threads, before the process may exit.
        let threads = std::mem::take(&mut *self.threads.lock().expect("threads"));
        tokio::task::block_in_place(|| {
            for thread in threads {
                if thread.join().is_err() {
                    tracing::error!("a data-plane thread ended badly");
                }
            }
        });
    }

    /// Flushes every VDI that is written here, as far as that is possible.
    async fn flush_all(&self) {
        let start = Instant::now();
        let mut flushes = self.begin_flushes();
        while !flushes.is_empty() && start.elapsed() < FLUSHES {
            tokio::time::sleep(LOOK).await;
            flushes.retain(|_, flush| matches!(flush.answer.try_recv(), Err(TryRecvError::Empty)));
            if !flushes.is_empty() {
                self.give_up_those_without_quorum(&mut flushes).await;
            }
        }
        for vdi in flushes.into_keys() {
            tracing::warn!(%vdi, "not flushed at the stop: no answer in {FLUSHES:?}; is a disk full?");
        }
    }

    fn begin_flushes(&self) -> BTreeMap<VdiId, Flush> {
        let deleting = self.deleting.lock().expect("deleting").clone();
        let written: BTreeSet<VdiId> = self.written.lock().expect("written").keys().copied().collect();
        let mut flushes = BTreeMap::new();
        for vdi in written.difference(&deleting).copied() {
            let (reply, answer) = oneshot::channel();
            let op = Op::Flush;
            self.home(vdi).send(Command::Request { vdi, op, reply });
            let without_quorum_since = None;
            flushes.insert(
                vdi,
                Flush {
                    answer,
                    without_quorum_since,
                },
            );
        }
        flushes
    }

    async fn give_up_those_without_quorum(&self, flushes: &mut BTreeMap<VdiId, Flush>) {
        let Ok(planes) = self.figures().await else {
            return;
        };
        let now = Instant::now();
        for figures in planes.iter().flat_map(|plane| &plane.vdis) {
            let Some(flush) = flushes.get_mut(&figures.vdi) else {
                continue;
            };
            if figures.status.shards_waiting == 0 || figures.status.shards_flushing > 0 {
                flush.without_quorum_since = None;
                continue;
            }
            let since = *flush.without_quorum_since.get_or_insert(now);
            if now.duration_since(since) >= WITHOUT_QUORUM {
                tracing::warn!(
                    vdi = %figures.vdi,
                    "not flushed at the stop: too few replicas can be reached; what flushes of guests covered is durable"
                );
                flushes.remove(&figures.vdi);
            }
        }
    }
}
