//! Starting the data-plane threads.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use edge::uring::{Pool, PoolConfig, Ring, RingConfig, RingError, Waker};
use tokio::sync::mpsc::UnboundedSender;

use crate::config::Settings;
use crate::plane::{Command, Plane, PlaneHandle, Report};

/// Operations that one ring has in the kernel at once.
const RING_ENTRIES: u32 = 512;

/// Running data-plane threads.
pub struct Planes {
    /// The ways to them.
    pub handles: Vec<PlaneHandle>,
    /// The threads themselves, for the end.
    pub threads: Vec<JoinHandle<()>>,
    /// Their buffers.
    pub pool: Pool,
}

/// What a plane's thread still needs once its ring, and so its waker, exists.
type Rest = (Receiver<Command>, Vec<PlaneHandle>);

/// Starts one plane for each core of the settings.
pub fn planes(settings: &Settings, reports: &UnboundedSender<Report>) -> Result<Planes> {
    let bytes = usize::try_from(settings.buffers.0).context("buffers")?;
    let pool = Pool::new(PoolConfig::of_bytes(bytes)).context("cannot map the buffers")?;
    let mut started = Vec::new();
    for number in 0..settings.cores {
        started.push(start(number, pool.clone(), reports.clone(), settings.poll)?);
    }
    let mut handles = Vec::new();
    let mut waiting = Vec::new();
    let mut threads = Vec::new();
    for (thread, waker, rest) in started {
        threads.push(thread);
        let (handle, mailbox) = PlaneHandle::new(waker);
        handles.push(handle);
        waiting.push((rest, mailbox));
    }
    for (rest, mailbox) in waiting {
        rest.send((mailbox, handles.clone()))
            .expect("a plane's thread waits for the rest");
    }
    Ok(Planes {
        handles,
        threads,
        pool,
    })
}

/// Starts one thread; it makes its ring, gives its waker, and waits for the rest.
fn start(
    number: usize,
    pool: Pool,
    reports: UnboundedSender<Report>,
    poll: Duration,
) -> Result<(JoinHandle<()>, Waker, Sender<Rest>)> {
    let (give_waker, waker) = channel::<Result<Waker, RingError>>();
    let (give_rest, rest) = channel::<Rest>();
    let thread = std::thread::Builder::new()
        .name(format!("plane-{number}"))
        .spawn(move || {
            pin_to(number);
            let ring = match Ring::new(RingConfig {
                entries: RING_ENTRIES,
                pool,
            }) {
                Ok(ring) => ring,
                Err(error) => {
                    let _ = give_waker.send(Err(error));
                    return;
                }
            };
            tracing::info!(number, traits = ?ring.traits(), "data-plane thread");
            let _ = give_waker.send(Ok(ring.waker()));
            if let Ok((mailbox, peers)) = rest.recv() {
                Plane::new(number, ring, mailbox, peers, reports, poll).run();
            }
        })
        .context("cannot start a data-plane thread")?;
    let waker = waker.recv().context("a data-plane thread ended at once")?;
    Ok((
        thread,
        waker.context("cannot make an io_uring: Linux 5.19 or newer, not forbidden by seccomp")?,
        give_rest,
    ))
}

/// Pins the calling thread to the `number`th of the cores this process may use.
fn pin_to(number: usize) {
    use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
    let Ok(allowed) = sched_getaffinity(None) else {
        return;
    };
    let Some(core) = (0..CpuSet::MAX_CPU)
        .filter(|core| allowed.is_set(*core))
        .nth(number)
    else {
        return;
    };
    let mut one = CpuSet::new();
    one.set(core);
    if let Err(error) = sched_setaffinity(None, &one) {
        tracing::warn!(%error, core, "cannot pin the data-plane thread");
    }
}
