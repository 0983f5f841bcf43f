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

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::time::Duration;

use edge::uring::{Buf, BufMut, Landing, Pool, StreamError, StreamSlot};
use replication::{FromReplica, RepairContent, ReplicaRequest, ToReplica};
use tokio::sync::oneshot;
use types::{DiskId, HostId, InFlight, Instant, Payload, RequestId};
use wire::{Channel, Frame, Gather, Incoming, Outgoing};

use super::handle::{Home, LinkFigures};
use super::{Command, Letter, Plane};

/// Bytes that wait to be sent on one link before it is given up: the writers' windows bound what one VDI adds, this
/// bounds them all. The other end is stuck, or far too slow for what is asked of it.
const SEND_BYTES_MAX: u64 = 256 << 20;

/// Bytes of requests of one served link that are not answered, and of answers not sent, before no more is taken: the
/// other end then waits, and counts what waits against its own bound.
const UNANSWERED_BYTES_MAX: u64 = 32 << 20;

/// What a request or an answer counts for besides its data.
const MESSAGE_BYTES: u64 = 128;

/// Signs of life per silence that ends a link.
const BEATS_PER_SILENCE: u32 = 4;

/// Marks the number that a request of a link has at the disk's node: writers here have numbers without it
/// ([`types::InFlight`]).
const FROM_LINK: u64 = 1 << 63;

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

/// Where the answer to a request of a link is to go.
#[derive(Clone, Copy, Debug)]
pub struct Way {
    plane: usize,
    link: StreamSlot,
    channel: Channel,
    id: RequestId,
    bytes: u64,
    disk: DiskId,
}

impl Way {
    /// The plane whose link it is.
    pub fn plane(&self) -> usize {
        self.plane
    }
}

/// One disk in one of its lives on a link.
struct Reach {
    disk: DiskId,
    /// Served: bytes of requests that the disk has not answered.
    unanswered: u64,
}

/// One link.
pub struct Link {
    host: HostId,
    name: String,
    role: LinkRole,
    incoming: Incoming<BufMut>,
    outgoing: Outgoing<Buf>,
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
    next_channel: u32,
    unanswered: u64,
    /// It is to end, for this reason, when the cores are at rest.
    doom: Option<String>,
    over: Option<oneshot::Sender<String>>,
    figures: LinkFigures,
}

impl Link {
    /// Bytes that the kernel does not have yet.
    fn unsent(&self) -> u64 {
        self.outgoing.waiting() + self.sending
    }

    /// Nothing more is received until some of what came is dealt with.
    fn is_full(&self) -> bool {
        // Answers are always taken: what asks for them was bounded where it was asked.
        self.role != LinkRole::Dialled && self.unanswered + self.unsent() > UNANSWERED_BYTES_MAX
    }

    /// Served: from now on the disk can be asked here.
    fn reach(&mut self, disk: DiskId) {
        let channel = Channel(self.next_channel);
        self.next_channel += 1;
        self.outgoing.disk_up(channel, disk);
        self.by_disk.insert(disk, channel);
        let reach = Reach { disk, unanswered: 0 };
        self.channels.insert(channel, reach);
    }

    /// Served: it can no longer; what it still owes is not answered.
    fn unreach(&mut self, disk: DiskId) {
        if let Some(channel) = self.by_disk.remove(&disk) {
            self.outgoing.disk_down(channel);
            let reach = self.channels.remove(&channel).expect("a channel of its disk");
            self.unanswered -= reach.unanswered;
        }
    }
}

/// Bytes that a request holds until it is answered.
fn request_bytes(message: &ToReplica<Buf>) -> u64 {
    MESSAGE_BYTES
        + match &message.request {
            ReplicaRequest::Write { data, .. }
            | ReplicaRequest::Repair {
                content: RepairContent::Data(data, _),
                ..
            } => data.length() as u64,
            // The answer is what takes room.
            ReplicaRequest::Read { count, .. } => u64::from(*count) * types::BLOCK_BYTES,
            _ => 0,
        }
}

/// The letter that an answer of a disk here is.
pub(super) fn answer(ways: &mut InFlight<Way>, mut message: FromReplica<Buf>) -> Letter {
    if message.id.0 & FROM_LINK == 0 {
        return Letter::ToVdi(message);
    }
    let way = ways.remove(message.id.0 & !FROM_LINK);
    let way = way.expect("a node answers what it was asked, once");
    message.id = way.id;
    Letter::Back(way, message)
}

fn take_from(pool: &Pool) -> impl Fn(usize) -> BufMut + '_ {
    |bytes| pool.take(bytes)
}

impl Plane {
    /// Takes a link over. One that it replaces (the same host; the same thread of it) is ended first, so that nothing
    /// that still comes on it can follow what comes on this one.
    pub(super) fn add_link(&mut self, start: LinkStart) {
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
        let mut link = Link {
            host: start.host,
            name: start.name,
            role: start.role,
            incoming: Incoming::after(received, start.version, take_from(&self.pool)),
            outgoing: Outgoing::new(sent),
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
            next_channel: 1,
            unanswered: 0,
            doom: None,
            over: Some(start.over),
            figures: LinkFigures::new(start.host, start.role),
        };
        if link.role == LinkRole::Dialled {
            self.hosts.insert(link.host, slot);
        } else {
            for disk in &self.disks_up {
                link.reach(*disk);
            }
        }
        self.links.insert(slot, link);
        self.touch_link(slot);
        self.receive_on(slot);
        self.set_beat();
    }

    /// Ends every link with `host`, for the daemon: it is no longer a peer.
    pub(super) fn unlink(&mut self, host: HostId, reason: &str) {
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
    pub(super) fn close_links(&mut self) {
        for slot in self.links.keys().copied().collect::<Vec<_>>() {
            self.break_link(slot, "the daemon stops".to_owned());
        }
    }

    /// A message of a writer here for a disk of another host. Without a link that reaches it, it is lost, as on a cut
    /// cable: the writer was told that the disk is away.
    pub(super) fn post_to_host(&mut self, host: HostId, disk: DiskId, message: ToReplica<Buf>) {
        let Some(slot) = self.hosts.get(&host).copied() else {
            return;
        };
        let link = self.links.get_mut(&slot).expect("a host's link is there");
        let Some(channel) = link.by_disk.get(&disk).copied() else {
            return;
        };
        link.outgoing.request(channel, message);
        link.figures.frames_sent += 1;
        if link.unsent() > SEND_BYTES_MAX && link.doom.is_none() {
            // Ended when the cores are at rest: a writer is in the middle of its effects now.
            link.doom = Some(format!("{} MiB wait to be sent", SEND_BYTES_MAX >> 20));
        }
        self.touch_link(slot);
    }

    /// An answer to a request that came on a link of this plane.
    pub(super) fn post_to_link(&mut self, way: Way, message: FromReplica<Buf>) {
        let Some(link) = self.links.get_mut(&way.link) else {
            return;
        };
        // The disk went and came back meanwhile: the other end was told that no answer will come.
        let Some(reach) = link.channels.get_mut(&way.channel) else {
            return;
        };
        reach.unanswered -= way.bytes;
        link.unanswered -= way.bytes;
        link.outgoing.reply(way.channel, message);
        link.figures.frames_sent += 1;
        self.touch_link(way.link);
        self.digest(way.link);
    }

    /// A request that came on a link of some plane, for a disk of this one.
    pub(super) fn request_from_link(&mut self, way: Way, mut message: ToReplica<Buf>) {
        if self.disks.contains_key(&way.disk) {
            message.id = RequestId(FROM_LINK | self.ways.insert(way));
            self.inbox.push_back(Letter::ToDisk(way.disk, message));
        }
    }

    /// A disk of this plane left: what it was asked by links is not answered any more.
    pub(super) fn forget_ways(&mut self, disk: DiskId) {
        for number in self.ways.numbers(|way| way.disk == disk) {
            self.ways.remove(number);
        }
    }

    /// A disk of this host came or went: served links say so.
    pub(super) fn tell_links(&mut self, disk: DiskId, is_up: bool) {
        if is_up {
            self.disks_up.insert(disk);
        } else {
            self.disks_up.remove(&disk);
        }
        let served = |link: &Link| link.role != LinkRole::Dialled;
        let slots: Vec<StreamSlot> = self
            .links
            .iter()
            .filter(|(_, link)| served(link))
            .map(|(slot, _)| *slot)
            .collect();
        for slot in slots {
            let link = self.links.get_mut(&slot).expect("just listed");
            link.unreach(disk);
            if is_up {
                link.reach(disk);
            }
            self.touch_link(slot);
            self.digest(slot);
        }
    }

    /// Disks of other hosts that can be reached now.
    pub(super) fn disks_reached(&self) -> impl Iterator<Item = DiskId> + '_ {
        let is_home = |disk: &DiskId, host: HostId| self.homes.get(disk) == Some(&Home::Host(host));
        let dialled = self.hosts.values().filter_map(|slot| self.links.get(slot));
        dialled.flat_map(move |link| {
            let disks = link.by_disk.keys().copied();
            disks.filter(move |disk| is_home(disk, link.host))
        })
    }

    /// The daemon says where a disk is. One that a link reaches already is up from now on.
    pub(super) fn set_home(&mut self, disk: DiskId, home: Home) {
        let before = self.homes.insert(disk, home);
        if let Home::Host(host) = home
            && before != Some(home)
            && let Some(link) = self.hosts.get(&host).and_then(|slot| self.links.get(slot))
            && link.by_disk.contains_key(&disk)
        {
            self.disk_state(disk, true);
        }
    }

    fn touch_link(&mut self, slot: StreamSlot) {
        if let Some(link) = self.links.get_mut(&slot)
            && !std::mem::replace(&mut link.is_touched, true)
        {
            self.touched_links.push(slot);
        }
    }

    /// Sends what was said this turn, and ends links that are to end. The cores must be at rest.
    pub(super) fn flush_links(&mut self) {
        while let Some(slot) = self.touched_links.pop() {
            let Some(link) = self.links.get_mut(&slot) else {
                continue;
            };
            link.is_touched = false;
            if let Some(reason) = link.doom.take() {
                self.break_link(slot, reason);
                continue;
            }
            if link.is_sending || link.outgoing.waiting() == 0 {
                continue;
            }
            link.sending = link.outgoing.waiting();
            let Gather { small, large } = link.outgoing.take(std::mem::take(&mut link.spare));
            link.is_sending = true;
            link.said_at = self.now;
            link.figures.sends += 1;
            link.figures.bytes_sent += link.sending;
            self.ring.send(slot, edge::uring::Gather { small, large });
        }
    }

    /// The kernel has taken what was sent.
    pub(super) fn link_sent(
        &mut self,
        slot: StreamSlot,
        gather: edge::uring::Gather,
        result: Result<(), StreamError>,
    ) {
        let Some(link) = self.links.get_mut(&slot) else {
            return;
        };
        let edge::uring::Gather { small, mut large } = gather;
        // The buffers are free from here on, not only when the list is filled again.
        large.clear();
        link.spare = Gather { small, large };
        link.is_sending = false;
        link.sending = 0;
        match result {
            Ok(()) => {
                self.touch_link(slot);
                self.digest(slot);
            }
            Err(error) => self.break_link(slot, error.to_string()),
        }
    }

    fn receive_on(&mut self, slot: StreamSlot) {
        let link = self.links.get_mut(&slot).expect("a link that receives is there");
        link.is_receiving = true;
        // While nothing was received nothing could be heard.
        link.heard_at = self.now;
        let wire::Landing { rooms, from } = link.incoming.lend(take_from(&self.pool));
        self.ring.receive(slot, Landing { rooms, from });
    }

    /// Something came.
    pub(super) fn link_received(
        &mut self,
        slot: StreamSlot,
        landing: Landing,
        result: Result<usize, StreamError>,
    ) {
        let Some(link) = self.links.get_mut(&slot) else {
            return;
        };
        let count = match result {
            Ok(0) => return self.break_link(slot, "the other end closed the connection".to_owned()),
            Ok(count) => count,
            Err(error) => return self.break_link(slot, error.to_string()),
        };
        link.is_receiving = false;
        link.heard_at = self.now;
        link.figures.receives += 1;
        link.figures.bytes_received += count as u64;
        let Landing { rooms, from } = landing;
        link.incoming.landed(wire::Landing { rooms, from }, count);
        self.digest(slot);
    }

    /// Takes frames out of what came, and receives on, until there is too much to be dealt with first. A frame of a few
    /// bytes may ask for a MiB: what was received is bounded, what it asks for is not before it is looked at.
    fn digest(&mut self, slot: StreamSlot) {
        while let Some(link) = self.links.get_mut(&slot)
            && !link.is_receiving
            && !link.is_full()
        {
            let next = link.incoming.next(take_from(&self.pool));
            link.figures.copied_bytes = link.incoming.copied();
            match next {
                Ok(Some(frame)) => {
                    link.figures.frames_received += 1;
                    self.heard(slot, frame);
                }
                Ok(None) => return self.receive_on(slot),
                Err(error) => return self.break_link(slot, error.to_string()),
            }
        }
    }

    fn heard(&mut self, slot: StreamSlot, frame: Frame<Buf>) {
        let link = self.links.get_mut(&slot).expect("a link that hears is there");
        let host = link.host;
        match (link.role, frame) {
            (_, Frame::Ping) => {}
            (_, Frame::Bye(reason)) => self.break_link(slot, format!("the other end says: {reason}")),
            (LinkRole::Dialled, Frame::Reply(reply)) => {
                // Of a channel that has ended nothing is waited for.
                if let Some(reach) = link.channels.get(&reply.channel) {
                    let message = reply.from_disk(reach.disk);
                    self.inbox.push_back(Letter::ToVdi(message));
                }
            }
            (LinkRole::Dialled, Frame::DiskUp(channel, disk)) => {
                let reach = Reach { disk, unanswered: 0 };
                link.channels.insert(channel, reach);
                let before = link.by_disk.insert(disk, channel);
                if let Some(before) = before {
                    link.channels.remove(&before);
                    self.reached_state(host, disk, false);
                }
                self.reached_state(host, disk, true);
            }
            (LinkRole::Dialled, Frame::DiskDown(channel)) => {
                if let Some(reach) = link.channels.remove(&channel) {
                    link.by_disk.remove(&reach.disk);
                    self.reached_state(host, reach.disk, false);
                }
            }
            (LinkRole::Served { .. }, Frame::Request(channel, message)) => {
                self.asked(slot, channel, message);
            }
            (_, frame) => {
                let what = match frame {
                    Frame::Request(..) => "a request",
                    Frame::Reply(_) => "a reply",
                    _ => "the state of a disk",
                };
                self.break_link(slot, format!("{what} came from the end that has no right to it"));
            }
        }
    }

    /// A request for a disk of this host, on a served link.
    fn asked(&mut self, slot: StreamSlot, channel: Channel, message: ToReplica<Buf>) {
        let link = self.links.get_mut(&slot).expect("a link that hears is there");
        // The disk's life on this link has ended; the other end is being told.
        let Some(reach) = link.channels.get_mut(&channel) else {
            return;
        };
        let bytes = request_bytes(&message);
        let way = Way {
            plane: self.number,
            link: slot,
            channel,
            id: message.id,
            bytes,
            disk: reach.disk,
        };
        reach.unanswered += bytes;
        link.unanswered += bytes;
        match self.homes.get(&way.disk) {
            Some(Home::Plane(plane)) if *plane == self.number => self.request_from_link(way, message),
            Some(Home::Plane(plane)) => self.peers[*plane].send(Command::FromLink(way, message)),
            // On its way out.
            _ => {}
        }
    }

    /// Tells the VDIs that a disk of `host` came or went, if that is where it should be.
    fn reached_state(&mut self, host: HostId, disk: DiskId, is_up: bool) {
        if self.homes.get(&disk) == Some(&Home::Host(host)) {
            // What it said before comes first.
            self.deliver();
            self.disk_state(disk, is_up);
        }
    }

    /// Ends a link. Its owner is told why, and makes another.
    pub(super) fn break_link(&mut self, slot: StreamSlot, reason: String) {
        let Some(mut link) = self.links.remove(&slot) else {
            return;
        };
        let mut words = Outgoing::<Buf>::new(0);
        words.bye(&reason);
        self.ring
            .remove_stream_saying(slot, &words.take(Gather::default()).small);
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

    /// Says that it lives on links that said nothing lately, and ends those that heard nothing for too long.
    pub(super) fn beat(&mut self) {
        if self.next_beat.is_none_or(|at| self.now < at) {
            return;
        }
        for slot in self.links.keys().copied().collect::<Vec<_>>() {
            let now = self.now;
            let link = self.links.get_mut(&slot).expect("just listed");
            if link.is_receiving && now.since(link.heard_at) >= link.silence {
                let reason = format!("nothing was heard for {:.1} s", link.silence.as_secs_f64());
                self.break_link(slot, reason);
                continue;
            }
            let beat = link.silence / BEATS_PER_SILENCE;
            if link.unsent() == 0 && now.since(link.said_at) >= beat {
                link.outgoing.ping();
                self.touch_link(slot);
            }
        }
        self.next_beat = None;
        self.set_beat();
        self.settle();
    }

    /// Wakes the plane for its links, all of them at one time: no links, no waking.
    fn set_beat(&mut self) {
        let shortest = self.links.values().map(|link| link.silence).min();
        self.next_beat = shortest.map(|silence| {
            let at = self.now + silence / BEATS_PER_SILENCE;
            self.next_beat.map_or(at, |before| before.min(at))
        });
    }

    pub(super) fn link_figures(&self) -> Vec<LinkFigures> {
        let figures = |link: &Link| LinkFigures {
            unsent_bytes: link.unsent(),
            unanswered_bytes: link.unanswered,
            disks: link.by_disk.len(),
            ..link.figures
        };
        self.links.values().map(figures).collect()
    }
}
