//! What a load needs of a client, whatever it speaks.

use std::time::Duration;

use anyhow::Result;

/// A request; offsets and lengths are bytes.
#[derive(Clone, Debug)]
pub enum Op {
    /// Bring so many bytes from there.
    Read { offset: u64, length: u64 },
    /// Leave this there.
    Write { offset: u64, data: Vec<u8> },
    /// What was completed is to be on stable media.
    Flush,
    /// No longer needed; whole blocks of 4 KiB read as zeros afterwards.
    Discard { offset: u64, length: u64 },
    /// To read as zeros.
    WriteZeroes { offset: u64, length: u64 },
}

/// A request was answered: what a read brought, or the error that the disk gave.
#[derive(Debug)]
pub struct Answer {
    /// As it was submitted.
    pub id: u64,
    pub result: Result<Vec<u8>, String>,
}

/// The connection is no more, and everything under way on it with it.
#[derive(Debug)]
pub struct Gone;

/// One connection to a virtual disk, with one or more queues.
pub trait Client {
    fn queues(&self) -> usize;

    /// Requests that a queue takes at once.
    fn depth(&self) -> usize;

    /// The disk's bytes as long as this connection lasts; `None`: as many as it has, whenever that changes.
    fn fixed_bytes(&self) -> Option<u64> {
        None
    }

    /// Hands over a request with an id of the caller's own; at most [`depth`](Client::depth) at once on a queue.
    fn submit(&mut self, queue: usize, id: u64, op: &Op) -> Result<(), Gone>;

    /// Waits for answers, for so long at most.
    fn reap(&mut self, patience: Duration) -> Result<Vec<Answer>, Gone>;
}
