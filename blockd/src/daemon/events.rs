//! What an operator wants to know: the last events, scrubs, and counters.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use control::{EventInfo, ScrubInfo, Severity};
use jiff::Timestamp;
use types::VdiId;

/// Events kept for `weft status`; older ones are in the log.
const KEPT: usize = 256;

/// See the module.
#[derive(Default)]
pub struct EventLog {
    last: Mutex<VecDeque<EventInfo>>,
    scrubs: Mutex<BTreeMap<VdiId, ScrubInfo>>,
    /// Blocks repaired from another replica since start.
    pub repaired: AtomicU64,
    /// Blocks found without a good copy since start.
    pub unreadable: AtomicU64,
    /// Blocks copied by resync since start.
    pub resynced: AtomicU64,
}

impl EventLog {
    /// Logs and keeps an event.
    pub fn add(&self, severity: Severity, message: String) {
        match severity {
            Severity::Info => tracing::info!("{message}"),
            Severity::Warning => tracing::warn!("{message}"),
            Severity::Critical => tracing::error!("{message}"),
        }
        let mut last = self.last.lock().expect("events");
        if last.len() == KEPT {
            last.pop_front();
        }
        last.push_back(EventInfo {
            at: Timestamp::now(),
            severity,
            message,
        });
    }

    /// The kept ones, oldest first.
    pub fn list(&self) -> Vec<EventInfo> {
        self.last.lock().expect("events").iter().cloned().collect()
    }

    /// A scrub of a VDI begins.
    pub fn scrub_begins(&self, vdi: VdiId, name: &str, shards: u32) {
        let info = ScrubInfo {
            vdi: name.to_owned(),
            started: Timestamp::now(),
            ended: None,
            shards_done: 0,
            shards,
            blocks: 0,
            repaired: 0,
            unreadable: 0,
        };
        self.scrubs.lock().expect("scrubs").insert(vdi, info);
    }

    /// Whether a scrub of the VDI runs.
    pub fn is_scrubbing(&self, vdi: VdiId) -> bool {
        self.scrubs
            .lock()
            .expect("scrubs")
            .get(&vdi)
            .is_some_and(|scrub| scrub.ended.is_none())
    }

    /// A scrub went on.
    pub fn scrub_goes_on(
        &self,
        vdi: VdiId,
        done: u32,
        total: u32,
        blocks: u64,
        repaired: u64,
        unreadable: u64,
    ) {
        if let Some(scrub) = self.scrubs.lock().expect("scrubs").get_mut(&vdi) {
            scrub.shards_done = done;
            scrub.shards = total;
            scrub.blocks = blocks;
            scrub.repaired = repaired;
            scrub.unreadable = unreadable;
            if done == total && scrub.ended.is_none() {
                scrub.ended = Some(Timestamp::now());
            }
        }
    }

    /// Running and last scrubs.
    pub fn scrubs(&self) -> Vec<ScrubInfo> {
        self.scrubs.lock().expect("scrubs").values().cloned().collect()
    }

    /// A VDI is gone.
    pub fn forget(&self, vdi: VdiId) {
        self.scrubs.lock().expect("scrubs").remove(&vdi);
    }

    /// Adds to a counter.
    pub fn count(counter: &AtomicU64, by: u64) {
        counter.fetch_add(by, Ordering::Relaxed);
    }
}
