//! Connections between hosts as TCP has them: bytes in order or not at all, one way cut without the other, ends that
//! learn late that the other end is gone.
//!
//! A cut holds bytes back; they come when it heals, unless an end gave up meanwhile. Every message is a frame of
//! `wire`, and a send may arrive in two parts.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use types::{DiskId, HeapBlock, HeapRoom, Instant};
use wire::{Channel, Gather, Incoming, Outgoing};

use super::{At, Time};
use crate::Rng;

/// What is under way on one direction of a stream.
#[derive(Clone, Debug)]
pub(super) enum Piece {
    /// The caller's Hello.
    Hello(Vec<u8>),
    /// The answer to it.
    Welcome(Vec<u8>),
    Bytes(Vec<u8>),
    /// The sender has closed, or never was there.
    Over,
}

/// Which end of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Side {
    /// Its writers ask.
    Dialler,
    /// Its disks answer.
    Server,
}

impl Side {
    pub fn other(self) -> Side {
        match self {
            Side::Dialler => Side::Server,
            Side::Server => Side::Dialler,
        }
    }
}

/// What one end knows of a stream that was greeted.
#[derive(Debug)]
pub(super) struct End {
    pub incoming: Incoming<HeapRoom>,
    pub outgoing: Outgoing<HeapBlock>,
    /// Not greeted yet: only the dialler's end is so.
    pub is_greeted: bool,
    pub heard_at: Instant,
    pub said_at: Instant,
    pub channels: BTreeMap<Channel, DiskId>,
    pub by_disk: BTreeMap<DiskId, Channel>,
    next_channel: u32,
}

impl End {
    pub fn new(now: Instant, greeting: usize) -> End {
        End {
            incoming: Incoming::new(HeapRoom::new),
            outgoing: Outgoing::new(greeting as u64),
            is_greeted: false,
            heard_at: now,
            said_at: now,
            channels: BTreeMap::new(),
            by_disk: BTreeMap::new(),
            next_channel: 1,
        }
    }

    /// Served: from now on the disk can be asked here.
    pub fn reach(&mut self, disk: DiskId) {
        let channel = Channel(self.next_channel);
        self.next_channel += 1;
        self.outgoing.disk_up(channel, disk);
        self.by_disk.insert(disk, channel);
        self.channels.insert(channel, disk);
    }

    /// Served: it can no longer.
    pub fn unreach(&mut self, disk: DiskId) {
        if let Some(channel) = self.by_disk.remove(&disk) {
            self.outgoing.disk_down(channel);
            self.channels.remove(&channel);
        }
    }
}

#[derive(Debug)]
pub(super) struct Stream {
    pub dialler: At,
    pub server: At,
    ends: [Option<End>; 2],
    /// Sent by the dialler, sent by the server.
    pipes: [VecDeque<(Time, Piece)>; 2],
}

impl Stream {
    pub fn end(&mut self, side: Side) -> Option<&mut End> {
        self.ends[side as usize].as_mut()
    }

    fn hosts(&self, from: Side) -> (At, At) {
        match from {
            Side::Dialler => (self.dialler, self.server),
            Side::Server => (self.server, self.dialler),
        }
    }
}

/// All streams, and the cables they run over.
#[derive(Debug)]
pub(super) struct Streams {
    rng: Rng,
    now: Time,
    pub all: BTreeMap<u64, Stream>,
    next: u64,
    /// From, to.
    cut: BTreeSet<(At, At)>,
    /// Most nanoseconds from a host to another, where it is not the usual.
    slow: BTreeMap<(At, At), u64>,
    usual: u64,
}

impl Streams {
    pub fn new(seed: u64, usual: u64) -> Streams {
        Streams {
            rng: Rng::new(seed),
            now: 0,
            all: BTreeMap::new(),
            next: 1,
            cut: BTreeSet::new(),
            slow: BTreeMap::new(),
            usual,
        }
    }

    pub fn cut(&mut self, from: At, to: At) {
        self.cut.insert((from, to));
    }

    pub fn heal(&mut self, from: At, to: At) {
        self.cut.remove(&(from, to));
    }

    pub fn set_slow(&mut self, from: At, to: At, most: Option<u64>) {
        match most {
            Some(most) => self.slow.insert((from, to), most),
            None => self.slow.remove(&(from, to)),
        };
    }

    pub fn heal_all(&mut self) {
        self.cut.clear();
        self.slow.clear();
    }

    /// A new connection, its Hello on the way.
    pub fn dial(&mut self, dialler: At, server: At, hello: Vec<u8>, now: Instant) -> u64 {
        let id = self.next;
        self.next += 1;
        let end = End::new(now, hello.len());
        self.all.insert(
            id,
            Stream {
                dialler,
                server,
                ends: [Some(end), None],
                pipes: [VecDeque::new(), VecDeque::new()],
            },
        );
        self.send(id, Side::Dialler, Piece::Hello(hello));
        id
    }

    /// The server takes the call.
    pub fn accept(&mut self, id: u64, end: End) {
        self.all.get_mut(&id).expect("its Hello just came").ends[Side::Server as usize] = Some(end);
    }

    pub fn send(&mut self, id: u64, from: Side, piece: Piece) {
        let Some(stream) = self.all.get_mut(&id) else {
            return;
        };
        let most = self.slow.get(&stream.hosts(from)).copied().unwrap_or(self.usual);
        let pipe = &mut stream.pipes[from as usize];
        let after = pipe.back().map_or(self.now, |(at, _)| *at);
        let due = after.max(self.now + self.rng.between(1, most));
        match piece {
            Piece::Bytes(bytes) if bytes.len() > 1 && self.rng.chance(1, 8) => {
                let (head, tail) = bytes.split_at(self.rng.between(1, bytes.len() as u64 - 1) as usize);
                pipe.push_back((due, Piece::Bytes(head.to_vec())));
                let later = due + self.rng.between(1, most);
                pipe.push_back((later, Piece::Bytes(tail.to_vec())));
            }
            piece => pipe.push_back((due, piece)),
        }
    }

    /// Sends what an end has to say; whether that was anything.
    pub fn flush(&mut self, id: u64, from: Side) -> bool {
        let Some(end) = self.all.get_mut(&id).and_then(|stream| stream.end(from)) else {
            return false;
        };
        if end.outgoing.waiting() == 0 || !end.is_greeted {
            return false;
        }
        let bytes = end.outgoing.take(Gather::default()).to_bytes();
        self.send(id, from, Piece::Bytes(bytes));
        true
    }

    /// One end closes; what it sent before still arrives, or some of it.
    pub fn close(&mut self, id: u64, side: Side) -> Option<End> {
        let stream = self.all.get_mut(&id)?;
        let end = stream.ends[side as usize].take()?;
        if self.rng.chance(1, 2) {
            let pipe = &mut stream.pipes[side as usize];
            let kept = self.rng.index(pipe.len() + 1);
            pipe.truncate(kept);
        }
        self.send(id, side, Piece::Over);
        Some(end)
    }

    /// An end is gone without a word: power loss.
    pub fn vanish(&mut self, id: u64, side: Side) {
        if let Some(stream) = self.all.get_mut(&id) {
            stream.ends[side as usize] = None;
            let kept = self.rng.index(stream.pipes[side as usize].len() + 1);
            stream.pipes[side as usize].truncate(kept);
        }
    }

    /// The connection breaks: each end hears of it in its time.
    pub fn break_stream(&mut self, id: u64) {
        for side in [Side::Dialler, Side::Server] {
            if let Some(stream) = self.all.get_mut(&id) {
                let kept = self.rng.index(stream.pipes[side as usize].len() + 1);
                stream.pipes[side as usize].truncate(kept);
            }
            self.send(id, side, Piece::Over);
        }
    }

    pub fn advance_to(&mut self, now: Time) {
        self.now = now;
    }

    /// Whether anything is under way that is not held back.
    pub fn is_busy(&self) -> bool {
        self.all.values().any(|stream| {
            [Side::Dialler, Side::Server].into_iter().any(|from| {
                !stream.pipes[from as usize].is_empty() && !self.cut.contains(&stream.hosts(from))
            })
        })
    }

    /// What arrives at hosts that `listens` to it now: stream, the side that it came to, and what. Streams in any order.
    pub fn poll(&mut self, listens: impl Fn(At) -> bool) -> Vec<(u64, Side, Piece)> {
        let mut ids: Vec<u64> = self.all.keys().copied().collect();
        self.rng.shuffle(&mut ids);
        let mut arrived = Vec::new();
        for id in ids {
            let stream = self.all.get_mut(&id).expect("listed");
            for from in [Side::Dialler, Side::Server] {
                let (sender, receiver) = stream.hosts(from);
                if self.cut.contains(&(sender, receiver)) || !listens(receiver) {
                    continue;
                }
                let pipe = &mut stream.pipes[from as usize];
                while pipe.front().is_some_and(|(at, _)| *at <= self.now) {
                    let (_, piece) = pipe.pop_front().expect("has a front");
                    arrived.push((id, from.other(), piece));
                }
            }
        }
        arrived
    }

    /// Forgets streams of which nothing is left.
    pub fn sweep(&mut self) {
        self.all.retain(|_, stream| {
            stream.ends.iter().any(Option::is_some) || stream.pipes.iter().any(|pipe| !pipe.is_empty())
        });
    }
}
