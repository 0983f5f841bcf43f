//! Links between hosts: who may call, who is called, and again when a link has ended.
//!
//! Each data-plane thread dials every peer; the thread's link carries the requests of its VDIs' writers to the disks of
//! that host. This file greets, on the control threads, with patience and a bound for each step; a stream that is
//! greeted goes to its data-plane thread (`plane/links.rs`) and is not touched here any more until it has ended.

mod callers;
pub mod tls;

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustls::pki_types::CertificateDer;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::oneshot;
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tokio_rustls::TlsStream;
use types::{HeapBlock, HeapRoom, HostId, Incarnation};
use wire::{Frame, Hello, Identity, Incoming, Refused, RefusedCode, Welcome, WireError};

use callers::{Callers, Place};
use tls::Tls;

use crate::plane::{Command, LinkRole, LinkStart, PlaneHandle, Report};

/// What connecting and greeting may take together.
const GREETING_PATIENCE: Duration = Duration::from_secs(5);

/// The wait before a peer is called again: the first, and the longest that doubling leads to. There is no last try.
const BACKOFF_FIRST: Duration = Duration::from_millis(100);
const BACKOFF_MOST: Duration = Duration::from_secs(5);

/// Names of hosts in a line about a caller; more at one address tell nothing.
const NAMES_MAX: usize = 3;

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
    /// No TLS with the other end.
    #[error("TLS: {0}")]
    Tls(String),
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
    tls: Mutex<Option<Arc<Tls>>>,
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
    /// For each data-plane thread, why its last call made no link, or why that link ended.
    unreached: Vec<Option<String>>,
}

impl Drop for Peer {
    fn drop(&mut self) {
        for task in &self.dialling {
            task.abort();
        }
    }
}

impl Links {
    /// No peers yet. A link on which nothing is heard for `silence` ends. With `tls` there are no links without.
    pub fn new(
        me: Identity,
        planes: Vec<PlaneHandle>,
        silence: Duration,
        tls: Option<Arc<Tls>>,
        reports: UnboundedSender<Report>,
    ) -> Arc<Links> {
        Arc::new(Links {
            me,
            planes,
            silence,
            tls: Mutex::new(tls),
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
                    links.tell(&links.named(from), LinkNews::Refused(error.to_string()));
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
            unreached: vec![None; self.planes.len()],
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

    /// Other certificates, for links that are made from now on. Whether there is TLS is said once, by [`Links::new`].
    pub fn renew_tls(&self, tls: Arc<Tls>) {
        let mut now = self.tls.lock().expect("TLS");
        assert!(now.is_some(), "links without TLS stay without");
        *now = Some(tls);
    }

    fn tls(&self) -> Option<Arc<Tls>> {
        self.tls.lock().expect("TLS").clone()
    }

    /// Why a peer is not reached, where that is so.
    pub fn unreached(&self, host: HostId) -> Option<String> {
        let peers = self.peers.lock().expect("peers");
        peers
            .by_host
            .get(&host)?
            .unreached
            .iter()
            .flatten()
            .next()
            .cloned()
    }

    /// What became of a call; of no interest any more when the peer is called in another way by now.
    fn note(&self, host: HostId, round: u64, plane: usize, reason: Option<&String>) {
        let mut peers = self.peers.lock().expect("peers");
        if let Some(peer) = peers.by_host.get_mut(&host).filter(|peer| peer.round == round) {
            peer.unreached[plane] = reason.cloned();
        }
    }

    /// An address as people know it: with the hosts that are there.
    fn named(&self, from: SocketAddr) -> String {
        let peers = self.peers.lock().expect("peers");
        let is_there = |peer: &&Peer| {
            let address = peer.address.as_deref().and_then(|text| text.parse().ok());
            address.is_some_and(|address: SocketAddr| address.ip() == from.ip())
        };
        let names = peers
            .by_host
            .values()
            .filter(is_there)
            .map(|peer| peer.name.as_str());
        let names: Vec<&str> = names.take(NAMES_MAX).collect();
        if names.is_empty() {
            return from.to_string();
        }
        format!("{from} (where host {} is)", names.join(", "))
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
                    self.note(host, round, plane, None);
                    self.tell(name, LinkNews::Up);
                    let reason = over.await;
                    if made.elapsed() >= WORKED {
                        backoff = BACKOFF_FIRST;
                    }
                    reason.unwrap_or_else(|_| "the data-plane thread ended".to_owned())
                }
                Err(error) => error.to_string(),
            };
            self.note(host, round, plane, Some(&reason));
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
            let stream = TcpStream::connect(address).await?;
            stream.set_nodelay(true)?;
            let mut stream = match self.tls() {
                Some(tls) => Stream::Sealed(Box::new(tls.dial(name, stream).await.map_err(LinkError::Tls)?)),
                None => Stream::Plain(stream),
            };
            let sent = stream.send(&hello.encode()).await?;
            let (frame, received) = stream.hear().await?;
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
        let (socket, seal) = stream.into_parts()?;
        let start = LinkStart {
            socket,
            seal,
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
    async fn answer(&self, stream: TcpStream) -> Result<(), LinkError> {
        stream.set_nodelay(true)?;
        let greet = async {
            let mut stream = self.unseal(stream).await?;
            let (frame, received) = stream.hear().await?;
            let Frame::Hello(hello) = frame else {
                return Err(LinkError::Unexpected(format!("{frame:?}")));
            };
            let sent = match self.check(&hello, stream.certificate()) {
                Ok(version) => stream.send(&Welcome::new(version, &self.me).encode()).await?,
                Err(refused) => {
                    stream.send(&refused.encode()).await?;
                    return Err(refused.into());
                }
            };
            Ok((stream, hello, (sent, received)))
        };
        let greeted = tokio::time::timeout(GREETING_PATIENCE, greet).await;
        let (stream, hello, greeting) = greeted.map_err(|_| LinkError::Silent)??;
        let certificate = stream.certificate().cloned().map(CertificateDer::into_owned);
        let (socket, seal) = stream.into_parts()?;
        let (over, _) = oneshot::channel();
        let start = LinkStart {
            socket,
            seal,
            host: hello.from.host,
            name: hello.from.name.clone(),
            role: LinkRole::Served { plane: hello.plane },
            version: wire::VERSION,
            greeting,
            silence: self.silence,
            over,
        };
        Ok(self.let_in(&hello, certificate.as_ref(), start)?)
    }

    /// The handshake with a caller, where TLS is set. A caller is told in words that it is set on one side only, as far as it
    /// can understand them.
    async fn unseal(&self, stream: TcpStream) -> Result<Stream, LinkError> {
        let mut first = [0];
        stream.peek(&mut first).await?;
        let is_handshake = first[0] == tls::HANDSHAKE;
        match self.tls() {
            Some(tls) if is_handshake => {
                let stream = tls.answer(stream).await.map_err(LinkError::Tls)?;
                Ok(Stream::Sealed(Box::new(stream)))
            }
            None if is_handshake => Err(LinkError::Tls(
                "the caller wants it, and it is not set here".to_owned(),
            )),
            _ => Ok(Stream::Plain(stream)),
        }
    }

    /// Whether a caller is let in.
    fn check(&self, hello: &Hello, certificate: Option<&CertificateDer<'_>>) -> Result<u8, Refused> {
        let version = hello.check(&self.me)?;
        self.check_peer(&mut self.peers.lock().expect("peers"), &hello.from, certificate)?;
        Ok(version)
    }

    /// Hands over the link of a caller that was welcomed; it may have been forgotten since then, or have started anew.
    fn let_in(
        &self,
        hello: &Hello,
        certificate: Option<&CertificateDer<'_>>,
        start: LinkStart,
    ) -> Result<(), Refused> {
        let mut peers = self.peers.lock().expect("peers");
        self.check_peer(&mut peers, &hello.from, certificate)?;
        // Always the same one for the same caller, so that a new link finds the old one it replaces.
        self.hand_over(usize::from(hello.plane) % self.planes.len(), start);
        Ok(())
    }

    fn check_peer(
        &self,
        peers: &mut Peers,
        caller: &Identity,
        certificate: Option<&CertificateDer<'_>>,
    ) -> Result<(), Refused> {
        let Some(peer) = peers.by_host.get_mut(&caller.host) else {
            return Err(Refused {
                code: RefusedCode::Unknown,
                text: format!(
                    "host '{}' does not know host '{}', {}, as one of its pool",
                    self.me.name, caller.name, caller.host
                ),
            });
        };
        if self.tls().is_some() {
            // The name that the records have, not the one that the caller gives itself.
            let named = match certificate {
                Some(certificate) => tls::is_of(certificate, &peer.name),
                None => Err("it does not speak TLS".to_owned()),
            };
            named.map_err(|reason| Refused {
                code: RefusedCode::Tls,
                text: format!(
                    "host '{}' asks host '{}' for TLS: {reason}",
                    self.me.name, peer.name
                ),
            })?;
        }
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

/// A stream that is being greeted.
enum Stream {
    Plain(TcpStream),
    Sealed(Box<TlsStream<TcpStream>>),
}

impl Stream {
    async fn send(&mut self, bytes: &[u8]) -> io::Result<u64> {
        match self {
            Stream::Plain(stream) => stream.write_all(bytes).await?,
            Stream::Sealed(stream) => {
                stream.write_all(bytes).await?;
                stream.flush().await?;
            }
        }
        Ok(bytes.len() as u64)
    }

    async fn hear(&mut self) -> Result<(Frame<HeapBlock>, u64), LinkError> {
        match self {
            Stream::Plain(stream) => hear(stream).await,
            Stream::Sealed(stream) => hear(stream.as_mut()).await,
        }
    }

    /// What the other end has shown in a handshake that succeeded.
    fn certificate(&self) -> Option<&CertificateDer<'_>> {
        match self {
            Stream::Plain(_) => None,
            Stream::Sealed(stream) => stream.get_ref().1.peer_certificates()?.first(),
        }
    }

    /// For a plane: the socket, and what is sealed with.
    fn into_parts(self) -> io::Result<(OwnedFd, Option<Box<rustls::Connection>>)> {
        let (stream, seal) = match self {
            Stream::Plain(stream) => (stream, None),
            Stream::Sealed(stream) => match *stream {
                TlsStream::Client(stream) => {
                    let (stream, connection) = stream.into_inner();
                    (stream, Some(Box::new(connection.into())))
                }
                TlsStream::Server(stream) => {
                    let (stream, connection) = stream.into_inner();
                    (stream, Some(Box::new(connection.into())))
                }
            },
        };
        Ok((OwnedFd::from(stream.into_std()?), seal))
    }
}

/// One frame of a greeting, and its length: not a byte of what follows it is read.
async fn hear<S: AsyncRead + Unpin>(stream: &mut S) -> Result<(Frame<HeapBlock>, u64), LinkError> {
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
