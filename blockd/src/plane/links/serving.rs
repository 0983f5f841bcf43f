//! Disks of this host, for the writers of others: served links.

use edge::uring::{Buf, StreamSlot};
use replication::{FromReplica, RepairContent, ReplicaRequest, ToReplica};
use types::{DiskId, InFlight, Payload, RequestId};
use wire::Channel;

use super::{Link, LinkRole, Reach};
use crate::plane::{Command, Home, Letter, Plane};

/// Bytes of requests of one served link that are not answered, and of answers not sent, before no more is taken: the
/// other end then waits, and counts what waits against its own bound.
const UNANSWERED_BYTES_MAX: u64 = 32 << 20;

/// What a request or an answer counts for besides its data.
const MESSAGE_BYTES: u64 = 128;
/// Marks the number that a request of a link has at the disk's node: writers here have numbers without it
/// ([`types::InFlight`]).
const FROM_LINK: u64 = 1 << 63;

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

impl Link {
    /// Nothing more is received until some of what came is dealt with.
    pub(super) fn is_full(&self) -> bool {
        // Answers are always taken: what asks for them was bounded where it was asked.
        self.role != LinkRole::Dialled && self.unanswered + self.unsent() > UNANSWERED_BYTES_MAX
    }

    /// Served: from now on the disk can be asked here.
    pub(super) fn reach(&mut self, disk: DiskId) {
        let channel = Channel(self.next_channel);
        self.next_channel += 1;
        self.outgoing.disk_up(channel, disk);
        self.by_disk.insert(disk, channel);
        let reach = Reach { disk, unanswered: 0 };
        self.channels.insert(channel, reach);
    }

    /// Served: it can no longer; what it still owes is not answered.
    pub(super) fn unreach(&mut self, disk: DiskId) {
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
pub(in crate::plane) fn answer(ways: &mut InFlight<Way>, mut message: FromReplica<Buf>) -> Letter {
    if message.id.0 & FROM_LINK == 0 {
        return Letter::ToVdi(message);
    }
    let way = ways.remove(message.id.0 & !FROM_LINK);
    let way = way.expect("a node answers what it was asked, once");
    message.id = way.id;
    Letter::Back(way, message)
}

impl Plane {
    /// A disk of this host came or went: served links say so.
    pub(in crate::plane) fn tell_links(&mut self, disk: DiskId, is_up: bool) {
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

    /// A request for a disk of this host, on a served link.
    pub(super) fn asked(&mut self, slot: StreamSlot, channel: Channel, message: ToReplica<Buf>) {
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

    /// A request that came on a link of some plane, for a disk of this one.
    pub(in crate::plane) fn request_from_link(&mut self, way: Way, mut message: ToReplica<Buf>) {
        if self.disks.contains_key(&way.disk) {
            message.id = RequestId(FROM_LINK | self.ways.insert(way));
            self.inbox.push_back(Letter::ToDisk(way.disk, message));
        }
    }

    /// An answer to a request that came on a link of this plane.
    pub(in crate::plane) fn post_to_link(&mut self, way: Way, message: FromReplica<Buf>) {
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

    /// A disk of this plane left: what it was asked by links is not answered any more.
    pub(in crate::plane) fn forget_ways(&mut self, disk: DiskId) {
        for number in self.ways.numbers(|way| way.disk == disk) {
            self.ways.remove(number);
        }
    }
}
