//! A guest's client that can be held back: all stand still while replicas are compared, and none takes the whole
//! machine, which has other things to do.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Result;

use crate::client::{Answer, Client, Gone, Op};
use crate::nbd::NbdClient;

/// Requests at once.
const DEPTH: usize = 6;

/// After answers: the load is there to be verified, not to measure.
const PACE: Duration = Duration::from_millis(15);

/// Common to all clients of the test.
#[derive(Default)]
pub struct Gate {
    is_shut: AtomicBool,
    under_way: AtomicU64,
}

impl Gate {
    /// From now on new requests wait at the gate, or go on.
    pub fn shut(&self, is_shut: bool) {
        self.is_shut.store(is_shut, Ordering::SeqCst);
    }

    /// Requests that went through and have no answer yet.
    pub fn under_way(&self) -> u64 {
        self.under_way.load(Ordering::SeqCst)
    }
}

pub struct Paced {
    inner: NbdClient,
    gate: Arc<Gate>,
    held: Vec<(u64, Op)>,
    under_way: u64,
}

impl Paced {
    pub fn new(inner: NbdClient, gate: &Arc<Gate>) -> Paced {
        Paced {
            inner,
            gate: Arc::clone(gate),
            held: Vec::new(),
            under_way: 0,
        }
    }
}

impl Client for Paced {
    fn queues(&self) -> usize {
        1
    }

    fn depth(&self) -> usize {
        DEPTH
    }

    fn fixed_bytes(&self) -> Option<u64> {
        self.inner.fixed_bytes()
    }

    fn submit(&mut self, _queue: usize, id: u64, op: &Op) -> Result<(), Gone> {
        self.held.push((id, op.clone()));
        Ok(())
    }

    fn reap(&mut self, patience: Duration) -> Result<Vec<Answer>, Gone> {
        // Counted before the gate is looked at: who shut it and sees nothing under way sees all there will be.
        let count = self.held.len() as u64;
        self.gate.under_way.fetch_add(count, Ordering::SeqCst);
        if self.gate.is_shut.load(Ordering::SeqCst) {
            self.gate.under_way.fetch_sub(count, Ordering::SeqCst);
        } else {
            self.under_way += count;
            for (id, op) in std::mem::take(&mut self.held) {
                self.inner.submit(0, id, &op)?;
            }
        }
        let answers = self.inner.reap(patience)?;
        let count = answers.len() as u64;
        self.under_way -= count;
        self.gate.under_way.fetch_sub(count, Ordering::SeqCst);
        if count > 0 {
            std::thread::sleep(PACE);
        }
        Ok(answers)
    }
}

impl Drop for Paced {
    fn drop(&mut self) {
        self.gate.under_way.fetch_sub(self.under_way, Ordering::SeqCst);
    }
}
