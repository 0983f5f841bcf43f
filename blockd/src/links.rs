//! Links between hosts: who may call, who is called, and again when a link has ended.
//!
//! Each data-plane thread dials every peer; the thread's link carries the requests of its VDIs' writers to the disks of
//! that host. This file greets, on the control threads, with patience and a bound for each step; a stream that is
//! greeted goes to its data-plane thread (`plane/links.rs`) and is not touched here any more until it has ended.

mod callers;

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::oneshot;
use tokio::task::AbortHandle;
use tokio::time::Instant;
use types::{HeapBlock, HeapRoom, HostId, Incarnation};
use wire::{Frame, Hello, Identity, Incoming, Refused, RefusedCode, Welcome, WireError};

use callers::{Callers, Place};

use crate::plane::{Command, LinkRole, LinkStart, PlaneHandle, Report};

/// What connecting and greeting may take together.
const GREETING_PATIENCE: Duration = Duration::from_secs(5);

/// The wait before a peer is called again: the first, and the longest that doubling leads to. There is no last try.
const BACKOFF_FIRST: Duration = Duration::from_millis(100);
const BACKOFF_MOST: Duration = Duration::from_secs(5);

/// A link that lasted so long worked: the waits begin from the first again.
const WORKED: Duration = Duration::from_secs(5);

/// Why a host could not be reached, or a caller not be let in.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The operating system's word.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// What came is not the protocol.
    #[error("{0}")]
    Wire(#[from] WireError),
    /// One of the two does not want to; the text says who and why.
    #[error("{0}")]
    Refused(#[from] Refused),
    /// A greeting with something else in its place.
    #[error("not a greeting: {0}")]
    Unexpected(String),
    /// The other end said nothing.
    #[error("no greeting within {} s", GREETING_PATIENCE.as_secs())]
    Silent,
}

/// What became of the links with a peer; for events.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LinkNews {
    /// A thread reaches it.
    Up,
    /// A thread does not reach it, any more or at all.
    Down(String),
    /// Somebody called and was not let in.
    Refused(String),
}

/// The links of this host.
pub struct Links {
    me: Identity,
    planes: Vec<PlaneHandle>,
    silence: Duration,
    reports: UnboundedSender<Report>,
    peers: Mutex<Peers>,
    callers: Mutex<Callers>,
}

/// Hosts of the pool beside this one. A link is handed over, and all links with a host are ended, under its lock: none is handed
/// over after that.
#[derive(Default)]
struct Peers {
    by_host: BTreeMap<HostId, Peer>,
    /// Counts the times that somebody was to be called.
    rounds: u64,
}

/// A host of the pool beside this one.
struct Peer {
    name: String,
    address: Option<String>,
    /// The latest life that called: an earlier one's links are not wanted any more.
    life: Incarnation,
    /// In which of [`Peers::rounds`] it was to be called as it is now.
    round: u64,
    dialling: Vec<AbortHandle>,
}

impl Drop for Peer {
    fn drop(&mut self) {
        for task in &self.dialling {
            task.abort();
        }
    }
}

impl Links {
    /// No peers yet. A link on which nothing is heard for `silence` ends.
    pub fn new(
        me: Identity,
        planes: Vec<PlaneHandle>,
        silence: Duration,
        reports: UnboundedSender<Report>,
    ) -> Arc<Links> {
        Arc::new(Links {
            me,
            planes,
            silence,
            reports,
            peers: Mutex::default(),
            callers: Mutex::default(),
        })
    }

    /// Lets peers call, until the returned task is aborted.
    pub fn listen(self: &Arc<Links>, listener: TcpListener) -> AbortHandle {
        let links = Arc::clone(self);
        let task = tokio::spawn(async move {
            loop {
                match listener.accept().await {
                    Ok((stream, from)) => links.greet(stream, from),
                    // Out of descriptors, most likely: some will be given back.
                    Err(error) => {
                        tracing::error!(%error, "cannot accept a link");
                        tokio::time::sleep(BACKOFF_MOST).await;
                    }
                }
            }
        });
        task.abort_handle()
    }

    /// Greets a caller, beside others.
    fn greet(self: &Arc<Links>, stream: TcpStream, from: SocketAddr) {
        let (number, let_go) = self.callers.lock().expect("callers").add(from.ip());
        let links = Arc::clone(self);
        let place = Place { links, number };
        tokio::spawn(async move {
            let links = &place.links;
            tokio::select! {
                greeted = links.answer(stream) => if let Err(error) = greeted {
                    links.tell(&from.to_string(), LinkNews::Refused(error.to_string()));
                },
                _ = let_go => tracing::debug!(%from, "a caller that said nothing gave way to another"),
            }
        });
    }

    /// Makes `host` a peer: it may call, and is called if it has an address. Says it again after a change.
    pub fn set_peer(self: &Arc<Links>, host: HostId, name: &str, address: Option<&str>) {
        if host == self.me.host {
            return;
        }
        let mut peers = self.peers.lock().expect("peers");
        let life = match peers.by_host.get(&host) {
            Some(peer) if peer.name == name && peer.address.as_deref() == address => return,
            Some(peer) => peer.life,
            None => Incarnation(0),
        };
        peers.rounds += 1;
        let round = peers.rounds;
        let dial = |address: &str| {
            let planes = 0..self.planes.len();
            let dial = planes.map(|plane| {
                let (links, name, address) = (Arc::clone(self), name.to_owned(), address.to_owned());
                let dial = async move { links.dial(plane, host, round, &name, &address).await };
                tokio::spawn(dial).abort_handle()
            });
            dial.collect()
        };
        let peer = Peer {
            name: name.to_owned(),
            address: address.map(str::to_owned),
            life,
            round,
            dialling: address.map_or_else(Vec::new, dial),
        };
        peers.by_host.insert(host, peer);
    }

    /// It is no peer any more: its links end and it is not let in again.
    pub fn forget_peer(&self, host: HostId) {
        let mut peers = self.peers.lock().expect("peers");
        if peers.by_host.remove(&host).is_some() {
            for plane in &self.planes {
                let reason = "it is no longer a host of the pool".to_owned();
                plane.send(Command::Unlink { host, reason });
            }
        }
    }

    fn tell(&self, host: &str, news: LinkNews) {
        let host = host.to_owned();
        let _ = self.reports.send(Report::Link { host, news });
    }

    /// Keeps one thread's link to a peer: for ever, with longer and longer waits while it cannot be reached.
    async fn dial(&self, plane: usize, host: HostId, round: u64, name: &str, address: &str) {
        let mut backoff = BACKOFF_FIRST;
        let mut told = None;
        loop {
            let reason = match self.call(plane, host, round, name, address).await {
                Ok(over) => {
                    let made = Instant::now();
                    told = None;
                    self.tell(name, LinkNews::Up);
                    let reason = over.await;
                    if made.elapsed() >= WORKED {
                        backoff = BACKOFF_FIRST;
                    }
                    reason.unwrap_or_else(|_| "the data-plane thread ended".to_owned())
                }
                Err(error) => error.to_string(),
            };
            // The same reason again is no news.
            if told.as_ref() != Some(&reason) {
                self.tell(name, LinkNews::Down(reason.clone()));
                told = Some(reason);
            }
            tokio::time::sleep(backoff).await;
            backoff = (backoff * 2).min(BACKOFF_MOST);
        }
    }

    async fn call(
        &self,
        plane: usize,
        host: HostId,
        round: u64,
        name: &str,
        address: &str,
    ) -> Result<oneshot::Receiver<String>, LinkError> {
        let number = u16::try_from(plane).expect("fewer than 2^16 threads");
        let hello = Hello::new(self.me.clone(), host, number);
        let greet = async {
            let mut stream = TcpStream::connect(address).await?;
            stream.set_nodelay(true)?;
            let sent = send(&mut stream, &hello.encode()).await?;
            let (frame, received) = hear(&mut stream).await?;
            match frame {
                Frame::Welcome(welcome) => {
                    welcome.check(&hello)?;
                    Ok((stream, welcome.version, (sent, received)))
                }
                Frame::Refused(refused) => Err(refused.into()),
                other => Err(LinkError::Unexpected(format!("{other:?}"))),
            }
        };
        let greeted = tokio::time::timeout(GREETING_PATIENCE, greet).await;
        let (stream, version, greeting) = greeted.map_err(|_| LinkError::Silent)??;
        let (over, end) = oneshot::channel();
        let start = LinkStart {
            socket: OwnedFd::from(stream.into_std()?),
            host,
            name: name.to_owned(),
            role: LinkRole::Dialled,
            version,
            greeting,
            silence: self.silence,
            over,
        };
        self.called(round, plane, start);
        Ok(end)
    }

    /// Hands over a link that was dialled, unless its peer was forgotten meanwhile or is to be called in another way: then
    /// the task that dialled is about to end.
    fn called(&self, round: u64, plane: usize, start: LinkStart) {
        let peers = self.peers.lock().expect("peers");
        if peers
            .by_host
            .get(&start.host)
            .is_some_and(|peer| peer.round == round)
        {
            self.hand_over(plane, start);
        }
    }

    /// Greets a caller.
    async fn answer(&self, mut stream: TcpStream) -> Result<(), LinkError> {
        stream.set_nodelay(true)?;
        let greet = async {
            let (frame, received) = hear(&mut stream).await?;
            let Frame::Hello(hello) = frame else {
                return Err(LinkError::Unexpected(format!("{frame:?}")));
            };
            let sent = match self.check(&hello) {
                Ok(version) => send(&mut stream, &Welcome::new(version, &self.me).encode()).await?,
                Err(refused) => {
                    send(&mut stream, &refused.encode()).await?;
                    return Err(refused.into());
                }
            };
            Ok((hello, (sent, received)))
        };
        let greeted = tokio::time::timeout(GREETING_PATIENCE, greet).await;
        let (hello, greeting) = greeted.map_err(|_| LinkError::Silent)??;
        let (over, _) = oneshot::channel();
        let start = LinkStart {
            socket: OwnedFd::from(stream.into_std()?),
            host: hello.from.host,
            name: hello.from.name.clone(),
            role: LinkRole::Served { plane: hello.plane },
            version: wire::VERSION,
            greeting,
            silence: self.silence,
            over,
        };
        Ok(self.let_in(&hello, start)?)
    }

    /// Whether a caller is let in.
    fn check(&self, hello: &Hello) -> Result<u8, Refused> {
        let version = hello.check(&self.me)?;
        self.check_peer(&mut self.peers.lock().expect("peers"), &hello.from)?;
        Ok(version)
    }

    /// Hands over the link of a caller that was welcomed; it may have been forgotten since then, or have started anew.
    fn let_in(&self, hello: &Hello, start: LinkStart) -> Result<(), Refused> {
        let mut peers = self.peers.lock().expect("peers");
        self.check_peer(&mut peers, &hello.from)?;
        // Always the same one for the same caller, so that a new link finds the old one it replaces.
        self.hand_over(usize::from(hello.plane) % self.planes.len(), start);
        Ok(())
    }

    fn check_peer(&self, peers: &mut Peers, caller: &Identity) -> Result<(), Refused> {
        let Some(peer) = peers.by_host.get_mut(&caller.host) else {
            return Err(Refused {
                code: RefusedCode::Unknown,
                text: format!(
                    "host '{}' does not know host '{}', {}, as one of its pool",
                    self.me.name, caller.name, caller.host
                ),
            });
        };
        if caller.incarnation < peer.life {
            return Err(Refused {
                code: RefusedCode::OldLife,
                text: format!(
                    "start {} of host '{}' called after start {}: two daemons with one identity?",
                    caller.incarnation, caller.name, peer.life
                ),
            });
        }
        peer.life = caller.incarnation;
        Ok(())
    }

    fn hand_over(&self, plane: usize, start: LinkStart) {
        self.planes[plane].send(Command::Link(Box::new(start)));
    }
}

async fn send(stream: &mut TcpStream, bytes: &[u8]) -> io::Result<u64> {
    stream.write_all(bytes).await?;
    Ok(bytes.len() as u64)
}

/// One frame of a greeting, and its length: not a byte of what follows it is read.
async fn hear(stream: &mut TcpStream) -> Result<(Frame<HeapBlock>, u64), LinkError> {
    let mut incoming = Incoming::new(HeapRoom::new);
    let mut length = 0;
    let mut bytes = [0; 512];
    loop {
        if let Some(frame) = incoming.next(HeapRoom::new)? {
            return Ok((frame, length as u64));
        }
        let wanted = incoming.missing().min(bytes.len());
        let count = stream.read(&mut bytes[..wanted]).await?;
        if count == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        length += count;
        let put = incoming.put(&bytes[..count], HeapRoom::new);
        assert_eq!(put, count, "a greeting fits the smallest space");
    }
}

#[cfg(test)]
mod tests;
