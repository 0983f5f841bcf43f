//! What the demo makes outside of itself is undone: at its end, when it fails, and when it is interrupted.
//!
//! Whoever makes something says at once how it is undone ([`later`]) and keeps the result as long as it is needed.
//! Dropping it undoes it. Ctrl-C undoes whatever is left, the newest first, from a thread of its own: the main one may be
//! deep in waiting for a guest.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

type Action = Box<dyn FnOnce() + Send>;

static TO_UNDO: Mutex<Vec<(u64, Action)>> = Mutex::new(Vec::new());
static NEXT: AtomicU64 = AtomicU64::new(0);

/// Undoes one thing when it is dropped.
#[derive(Debug)]
#[must_use]
pub struct Undo(u64);

/// Does `action` when the result is dropped, or earlier if a signal ends the demo.
pub fn later(action: impl FnOnce() + Send + 'static) -> Undo {
    let id = NEXT.fetch_add(1, Ordering::Relaxed);
    list().push((id, Box::new(action)));
    Undo(id)
}

impl Drop for Undo {
    fn drop(&mut self) {
        let mut list = list();
        let place = list.iter().position(|(id, _)| *id == self.0);
        let action = place.map(|place| list.remove(place).1);
        drop(list);
        if let Some(action) = action {
            action();
        }
    }
}

/// From now on SIGINT, SIGTERM and SIGHUP undo everything and end the program with 128 and the signal's number.
pub fn on_signals() -> Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).context("signal handlers")?;
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            if let Some(signal) = signals.forever().next() {
                eprintln!("\ninterrupted: ending what was started, removing what was made");
                // The lock is kept to the end: nobody starts anything new meanwhile.
                let mut list = list();
                while let Some((_, action)) = list.pop() {
                    action();
                }
                std::process::exit(128 + signal);
            }
        })
        .context("signal thread")?;
    Ok(())
}

fn list() -> std::sync::MutexGuard<'static, Vec<(u64, Action)>> {
    TO_UNDO.lock().expect("no action panics")
}
