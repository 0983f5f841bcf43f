//! Links of a plane: streams to other hosts, greeted already, that carry messages between writers here and disks there
//! (a link that was dialled), or between writers there and disks here (a link that is served).
//!
//! ```text
//!  VDI ─ Letter::ToDisk ─▶ homes: Host(h) ─▶ Link.outgoing ═▶ Link.incoming ─▶ Letter::ToDisk ─▶ disk
//!  VDI ◀─ Letter::ToVdi ◀─────────────────── Link.incoming ◀═ Link.outgoing ◀─ Letter::Back ◀─┘ (its way back)
//! ```
//! A turn's frames leave together, in one send. A link ends at the first thing that is wrong with it; the writers here
//! are told that its disks went, and what still comes for the other end's writers is dropped: on the next link they
//! fence anew. Links are made, greeted and made again by the daemon (`crate::links`): nothing here waits.
//!
//! Between outgoing or incoming and the socket there may be TLS (`seal`).
//!
//! Here: a link's beginning and end. `traffic`: what it sends and receives. `asking`: disks there for writers here.
//! `serving`: disks here for writers there. `beat`: signs of life.

mod asking;
mod beat;
mod seal;
mod serving;
mod traffic;

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::time::Duration;

use edge::uring::{Buf, BufMut, StreamSlot};
use tokio::sync::oneshot;
use types::{DiskId, HostId, Instant};
use wire::{Channel, Gather, Incoming, Outgoing};

use super::Plane;
use super::handle::LinkFigures;
use seal::Seal;
pub use serving::Way;
pub(super) use serving::answer;
use traffic::take_from;

/// Bytes that wait to be sent on one link before it is given up: the writers' windows bound what one VDI adds, this
/// bounds them all. The other end is stuck, or far too slow for what is asked of it.
const SEND_BYTES_MAX: u64 = 256 << 20;

/// A connected and greeted stream, for a plane.
pub struct LinkStart {
    /// The socket.
    pub socket: OwnedFd,
    /// The other end.
    pub host: HostId,
    /// What people call it.
    pub name: String,
    /// Who asks.
    pub role: LinkRole,
    /// Of the protocol, agreed on.
    pub version: u8,
    /// Bytes that the greeting took: sent, received.
    pub greeting: (u64, u64),
    /// What is sealed and opened with, where the greeting was.
    pub seal: Option<Box<rustls::Connection>>,
    /// Nothing heard for so long ends it.
    pub silence: Duration,
    /// Told why it ended.
    pub over: oneshot::Sender<String>,
}

/// Who asks on a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkRole {
    /// Writers here.
    Dialled,
    /// Writers of this data-plane thread of the other host.
    Served { plane: u16 },
}

/// One disk in one of its lives on a link. The bytes are of a served link.
struct Reach {
    disk: DiskId,
    /// Bytes of reads that the disk has not answered.
    reads: u64,
    /// Bytes of changes that it has not answered.
    changes: u64,
    /// It has no space: its changes wait, and hold up nobody else.
    is_full: bool,
}

impl Reach {
    fn new(disk: DiskId, is_full: bool) -> Reach {
        Reach {
            disk,
            reads: 0,
            changes: 0,
            is_full,
        }
    }
}

/// One link.
pub struct Link {
    host: HostId,
    name: String,
    role: LinkRole,
    incoming: Incoming<BufMut>,
    outgoing: Outgoing<Buf>,
    seal: Option<Box<Seal>>,
    /// Was sent, to be filled again.
    spare: Gather<Buf>,
    sending: u64,
    is_sending: bool,
    is_receiving: bool,
    is_touched: bool,
    heard_at: Instant,
    said_at: Instant,
    silence: Duration,
    channels: BTreeMap<Channel, Reach>,
    by_disk: BTreeMap<DiskId, Channel>,
    /// Served: disks that cannot be asked here until they have dealt with what a life that was ended left behind.
    shut: BTreeMap<Channel, Reach>,
    last_channel: Channel,
    /// It is to end, for this reason, when the cores are at rest.
    doom: Option<String>,
    over: Option<oneshot::Sender<String>>,
    figures: LinkFigures,
}

impl Link {
    /// Bytes that the kernel does not have yet.
    fn unsent(&self) -> u64 {
        let unsealed = self.seal.as_ref().map_or(0, |seal| seal.unsealed());
        self.outgoing.waiting() + unsealed + self.sending
    }
}

impl Plane {
    /// Takes a link over. One that it replaces (the same host; the same thread of it) is ended first, so that nothing
    /// that still comes on it can follow what comes on this one.
    pub(in crate::plane) fn add_link(&mut self, start: LinkStart) {
        let replaces = |link: &Link| link.host == start.host && link.role == start.role;
        let replaced: Vec<StreamSlot> = self
            .links
            .iter()
            .filter(|(_, link)| replaces(link))
            .map(|(slot, _)| *slot)
            .collect();
        for slot in replaced {
            self.break_link(slot, "a new link took its place".to_owned());
        }
        let slot = match self.ring.add_stream(start.socket) {
            Ok(slot) => slot,
            Err(error) => {
                let _ = start.over.send(error.to_string());
                return;
            }
        };
        let (sent, received) = start.greeting;
        let seal =
            |connection: Box<rustls::Connection>| Box::new(Seal::new(*connection, take_from(&self.pool)));
        let mut link = Link {
            host: start.host,
            name: start.name,
            role: start.role,
            incoming: Incoming::after(received, start.version, take_from(&self.pool)),
            outgoing: Outgoing::new(sent),
            seal: start.seal.map(seal),
            spare: Gather::default(),
            sending: 0,
            is_sending: false,
            is_receiving: false,
            is_touched: false,
            heard_at: self.now,
            said_at: self.now,
            silence: start.silence,
            channels: BTreeMap::new(),
            by_disk: BTreeMap::new(),
            shut: BTreeMap::new(),
            last_channel: Channel(0),
            doom: None,
            over: Some(start.over),
            figures: LinkFigures::new(start.host, start.role),
        };
        if link.role == LinkRole::Dialled {
            self.hosts.insert(link.host, slot);
        } else {
            for disk in &self.disks_up {
                link.reach(*disk, self.full_disks.contains(disk));
            }
        }
        self.links.insert(slot, link);
        self.touch_link(slot);
        // With TLS the greeting may have read on.
        self.digest(slot);
        self.set_beat();
    }

    /// Ends every link with `host`, for the daemon: it is no longer a peer.
    pub(in crate::plane) fn unlink(&mut self, host: HostId, reason: &str) {
        let slots: Vec<StreamSlot> = self
            .links
            .iter()
            .filter(|(_, link)| link.host == host)
            .map(|(slot, _)| *slot)
            .collect();
        for slot in slots {
            self.break_link(slot, reason.to_owned());
        }
    }

    /// Ends all links: the process is to end.
    pub(in crate::plane) fn close_links(&mut self) {
        for slot in self.links.keys().copied().collect::<Vec<_>>() {
            self.break_link(slot, "the daemon stops".to_owned());
        }
    }

    /// Ends a link. Its owner is told why, and makes another.
    pub(super) fn break_link(&mut self, slot: StreamSlot, reason: String) {
        let Some(mut link) = self.links.remove(&slot) else {
            return;
        };
        let mut words = Outgoing::<Buf>::new(0);
        words.bye(&reason);
        let words = words.take(Gather::default()).small;
        let words = match &mut link.seal {
            Some(seal) => seal.seal_last(&words),
            None => words,
        };
        self.ring.remove_stream_saying(slot, &words);
        tracing::info!(host = %link.name, role = ?link.role, reason, "link ended");
        if link.role == LinkRole::Dialled {
            self.hosts.remove(&link.host);
            for disk in link.by_disk.into_keys() {
                self.reached_state(link.host, disk, false);
            }
        }
        if let Some(over) = link.over.take() {
            let _ = over.send(reason);
        }
        self.set_beat();
    }

    pub(in crate::plane) fn link_figures(&self) -> Vec<LinkFigures> {
        let figures = |link: &Link| LinkFigures {
            unsent_bytes: link.unsent(),
            unanswered_bytes: link.unanswered(),
            disks: link.by_disk.len(),
            ..link.figures
        };
        self.links.values().map(figures).collect()
    }
}
