//! Looks at a daemon from beside the load: its memory 20 times a second, its own figures and the kernel's once.

use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use serde::Serialize;

use crate::weft::{Memory, Weft, memory, metrics, written_bytes};

const LOOK: Duration = Duration::from_millis(50);

/// Looks per sample.
const LOOKS: u32 = 20;

/// The daemon at one moment. Counters are since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Sample {
    /// Seconds since the watch began.
    pub at: f64,
    /// Memory now, and the most anonymous memory since the last sample.
    pub memory: Memory,
    /// Bytes; see `memory`.
    pub anonymous_max: u64,
    /// Bytes of index leaves in memory, as the daemon says.
    pub cached: f64,
    /// Buffers that the pool did not have and the heap gave.
    pub heap_buffers: f64,
    /// Bytes appended for guests.
    pub written: f64,
    /// Bytes appended by cleaning.
    pub cleaned: f64,
    /// Appends: a header of 4 KiB each.
    pub batches: f64,
    /// Index checkpoints.
    pub checkpoints: f64,
    /// Segments that hold nothing.
    pub segments_free: f64,
    /// Requests that wait for space.
    pub waiting: f64,
    /// Bytes sent to storage, index and all, as the kernel counts.
    pub device: f64,
}

/// A thread that watches.
pub struct Watch {
    stop: Sender<()>,
    thread: JoinHandle<Result<Vec<Sample>>>,
}

impl Watch {
    /// Begins now, with a sample.
    pub fn start(weft: &Weft) -> Watch {
        let (pid, rest) = (weft.pid(), weft.rest().to_owned());
        let (stop, stopped) = channel::<()>();
        let thread = std::thread::spawn(move || {
            let begin = Instant::now();
            let mut samples = vec![look(pid, &rest, begin, 0)?];
            let mut next = begin;
            let mut is_over = false;
            while !is_over {
                let mut most = 0;
                for _ in 0..LOOKS {
                    next += LOOK;
                    let wait = next.saturating_duration_since(Instant::now());
                    is_over = stopped.recv_timeout(wait) != Err(RecvTimeoutError::Timeout);
                    most = most.max(memory(pid)?.anonymous);
                    if is_over {
                        break;
                    }
                }
                samples.push(look(pid, &rest, begin, most)?);
            }
            Ok(samples)
        });
        Watch { stop, thread }
    }

    /// Ends with a last sample.
    pub fn finish(self) -> Result<Vec<Sample>> {
        drop(self.stop);
        self.thread.join().map_err(|_| anyhow!("the watch ended badly"))?
    }
}

fn look(pid: u32, rest: &Path, begin: Instant, anonymous_max: u64) -> Result<Sample> {
    let figures = metrics(rest)?;
    let memory = memory(pid)?;
    Ok(Sample {
        at: begin.elapsed().as_secs_f64(),
        memory,
        anonymous_max: anonymous_max.max(memory.anonymous),
        cached: figures.get("weft_disk_cached_index_bytes")?,
        heap_buffers: figures.get("weft_buffers_total{from=\"heap\"}")?,
        written: figures.get("weft_disk_written_bytes_total")?,
        cleaned: figures.get("weft_disk_cleaned_bytes_total")?,
        batches: figures.get("weft_disk_batches_total")?,
        checkpoints: figures.get("weft_disk_checkpoints_total")?,
        segments_free: figures.get("weft_disk_segments_free")?,
        waiting: figures.get("weft_disk_waiting_for_space")?,
        device: written_bytes(pid)? as f64,
    })
}

/// What the store appends for each byte that guests wrote between two samples, and what storage got.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Amplification {
    /// Of guests' and cleaned data: (written + cleaned) / written.
    pub store: f64,
    /// With batch headers: every byte of the log but segment headers.
    pub log: f64,
    /// All that the process wrote, the index too.
    pub device: f64,
}

impl Amplification {
    /// `None` where guests wrote nothing.
    pub fn between(begin: &Sample, end: &Sample) -> Option<Amplification> {
        let written = end.written - begin.written;
        let cleaned = end.cleaned - begin.cleaned;
        let headers = (end.batches - begin.batches) * 4096.0;
        (written > 0.0).then(|| Amplification {
            store: (written + cleaned) / written,
            log: (written + cleaned + headers) / written,
            device: (end.device - begin.device) / written,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amplification_is_per_byte_of_guests() {
        let begin = Sample {
            written: 1e6,
            cleaned: 5e6,
            batches: 100.0,
            device: 9e6,
            ..Sample::default()
        };
        let end = Sample {
            written: begin.written + 4096.0 * 100.0,
            cleaned: begin.cleaned + 4096.0 * 300.0,
            batches: begin.batches + 50.0,
            device: begin.device + 4096.0 * 500.0,
            ..Sample::default()
        };
        let found = Amplification::between(&begin, &end).unwrap();
        assert_eq!((found.store, found.log, found.device), (4.0, 4.5, 5.0));
        assert_eq!(Amplification::between(&begin, &begin), None);
    }
}
