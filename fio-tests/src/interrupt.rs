//! Ctrl-C and SIGTERM: the daemons end, the files go, the machine is as it was.
//!
//! What is to be undone is said when it is done ([`undo_later`]) and taken back when it has been undone in the usual
//! way. A signal undoes the rest, the newest first, from a thread of its own: the main one may be deep in a system
//! call that writes gigabytes.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

type Action = Box<dyn FnOnce() + Send>;

static TO_UNDO: Mutex<Vec<(u64, Action)>> = Mutex::new(Vec::new());
static NEXT: AtomicU64 = AtomicU64::new(0);

/// Holds an action for the case of a signal; dropping it forgets the action.
#[derive(Debug)]
pub struct Undo(u64);

/// Does `action` if a signal ends this process before the result is dropped.
#[must_use]
pub fn undo_later(action: impl FnOnce() + Send + 'static) -> Undo {
    let id = NEXT.fetch_add(1, Ordering::Relaxed);
    lock().push((id, Box::new(action)));
    Undo(id)
}

impl Drop for Undo {
    fn drop(&mut self) {
        lock().retain(|(id, _)| *id != self.0);
    }
}

/// From now on SIGINT, SIGTERM and SIGHUP undo what is left and end the process with 128 and the signal's number.
pub fn watch() -> Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).context("signal handlers")?;
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            if let Some(signal) = signals.forever().next() {
                eprintln!("\ninterrupted: ending the daemons, removing the files");
                undo_all();
                std::process::exit(128 + signal);
            }
        })
        .context("signal thread")?;
    Ok(())
}

fn undo_all() {
    // The lock is kept: nobody may start anything new, and nobody waits for it who must go on.
    let mut list = lock();
    while let Some((_, action)) = list.pop() {
        action();
    }
    std::mem::forget(list);
}

fn lock() -> std::sync::MutexGuard<'static, Vec<(u64, Action)>> {
    TO_UNDO.lock().expect("no action panics")
}
