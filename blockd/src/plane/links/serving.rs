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

/// Bytes of changes of one served link that one full disk keeps waiting. Above it the disk is away for that link: its writers
/// go on without it, and stop sending.
const WAITING_BYTES_MAX: u64 = 256 << 20;

/// What a request or an answer counts for besides its data.
const MESSAGE_BYTES: u64 = 128;

/// What a question about a leaf counts for: the longest answer, beyond what any message counts for.
const LIST_BYTES: u64 = wire::HEAD_BYTES_MAX as u64;
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
    load: Load,
    disk: DiskId,
}

impl Way {
    /// The plane whose link it is.
    pub fn plane(&self) -> usize {
        self.plane
    }
}

/// What a request holds until it is answered.
#[derive(Clone, Copy, Debug)]
struct Load {
    bytes: u64,
    /// It may have to wait for space; others never do.
    is_change: bool,
}

impl Load {
    fn of(message: &ToReplica<Buf>) -> Load {
        let (bytes, is_change) = match &message.request {
            ReplicaRequest::Write { data, .. }
            | ReplicaRequest::Repair {
                content: RepairContent::Data(data, _),
                ..
            } => (data.length() as u64, true),
            // The answer is what takes room.
            ReplicaRequest::Read { count, .. } => (u64::from(*count) * types::BLOCK_BYTES, false),
            ReplicaRequest::ChangedLeaves { .. } | ReplicaRequest::LeafVersions { .. } => (LIST_BYTES, false),
            _ => (0, true),
        };
        Load {
            bytes: bytes + MESSAGE_BYTES,
            is_change,
        }
    }
}

impl Reach {
    fn unanswered(&self) -> u64 {
        self.reads + self.changes
    }

    fn sum(&mut self, load: Load) -> &mut u64 {
        if load.is_change {
            &mut self.changes
        } else {
            &mut self.reads
        }
    }
}

impl Link {
    /// Bytes of requests that the disks here have not answered.
    pub(super) fn unanswered(&self) -> u64 {
        self.lives().map(Reach::unanswered).sum()
    }

    fn lives(&self) -> impl Iterator<Item = &Reach> {
        self.channels.values().chain(self.shut.values())
    }

    /// Nothing more is received until some of what came is dealt with. What waits for space on a full disk does not
    /// count: what would make space may be behind it.
    pub(super) fn is_full(&self) -> bool {
        // Answers are always taken: what asks for them was bounded where it was asked.
        if self.role == LinkRole::Dialled {
            return false;
        }
        let counted = |reach: &Reach| {
            if reach.is_full {
                reach.reads
            } else {
                reach.unanswered()
            }
        };
        self.lives().map(counted).sum::<u64>() + self.unsent() > UNANSWERED_BYTES_MAX
    }

    /// From now on the disk can be asked here; not before what it was asked in a life that was shut is answered.
    pub(super) fn reach(&mut self, disk: DiskId, is_full: bool) {
        if self.shut.values().any(|reach| reach.disk == disk) {
            return;
        }
        let channel = Channel(self.last_channel.0 + 1);
        self.last_channel = channel;
        self.outgoing.disk_up(channel, disk);
        self.by_disk.insert(disk, channel);
        self.channels.insert(channel, Reach::new(disk, is_full));
    }

    /// It can no longer; what it still owes is not answered.
    fn unreach(&mut self, disk: DiskId) {
        self.shut.retain(|_, reach| reach.disk != disk);
        if let Some(channel) = self.by_disk.remove(&disk) {
            self.outgoing.disk_down(channel);
            self.channels.remove(&channel);
        }
    }

    /// It cannot until it has dealt with what it was asked.
    fn shut(&mut self, channel: Channel) {
        let reach = self
            .channels
            .remove(&channel)
            .expect("a channel to be shut is open");
        self.by_disk.remove(&reach.disk);
        self.outgoing.disk_down(channel);
        self.shut.insert(channel, reach);
    }

    /// The disk has answered; whether the other end waits for that.
    fn unload(&mut self, way: &Way) -> bool {
        if let Some(reach) = self.channels.get_mut(&way.channel) {
            *reach.sum(way.load) -= way.load.bytes;
            return true;
        }
        // Else the disk went and came back meanwhile: the other end was told that no answer will come.
        if let Some(reach) = self.shut.get_mut(&way.channel) {
            *reach.sum(way.load) -= way.load.bytes;
            if reach.unanswered() == 0 {
                let Reach { disk, is_full, .. } = *reach;
                self.shut.remove(&way.channel);
                self.reach(disk, is_full);
            }
        }
        false
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
        let is_full = self.full_disks.contains(&disk);
        self.each_served(|link| {
            link.unreach(disk);
            if is_up {
                link.reach(disk, is_full);
            }
        });
    }

    /// A disk of this host has no space for changes, or has it again: what waits for space holds up nothing else.
    pub(in crate::plane) fn disk_full(&mut self, disk: DiskId, is_full: bool) {
        if is_full {
            self.full_disks.insert(disk);
        } else {
            self.full_disks.remove(&disk);
        }
        self.each_served(|link| {
            for reach in link.channels.values_mut().chain(link.shut.values_mut()) {
                if reach.disk == disk {
                    reach.is_full = is_full;
                }
            }
        });
    }

    fn each_served(&mut self, change: impl Fn(&mut Link)) {
        let mut changed = Vec::new();
        for (slot, link) in &mut self.links {
            if link.role != LinkRole::Dialled {
                change(link);
                changed.push(*slot);
            }
        }
        for slot in changed {
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
        let load = Load::of(&message);
        if reach.is_full && load.is_change && reach.changes + load.bytes > WAITING_BYTES_MAX {
            // Dropped with its channel: what was sent behind it must not be taken without it.
            link.shut(channel);
            self.touch_link(slot);
            return;
        }
        let way = Way {
            plane: self.number,
            link: slot,
            channel,
            id: message.id,
            load,
            disk: reach.disk,
        };
        *reach.sum(load) += load.bytes;
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
        if link.unload(&way) {
            link.outgoing.reply(way.channel, message);
            link.figures.frames_sent += 1;
        }
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

#[cfg(test)]
mod tests {
    use edge::uring::{Pool, PoolConfig};
    use replication::ReplicaReply;
    use store::{BlockState, BlockVersion, LISTED_MAX, ReadPart};
    use types::{BlockNo, LayerId, LeafNo, Lineage, Seq, ShardId, Token, VdiId};
    use wire::Outgoing;

    use super::*;

    #[test]
    fn a_question_counts_for_what_its_longest_answer_takes() {
        let pool = Pool::new(PoolConfig::of_bytes(4 << 20)).expect("memory");
        let version = BlockVersion {
            seq: Seq(1),
            state: BlockState::Absent,
        };
        let layer = LayerId(0);
        let (newer_than, leaf) = (Seq(0), LeafNo(0));
        let from = (layer, leaf);
        let lineage = || Lineage::of_layer(VdiId(0), layer);
        let leaves = (0..LISTED_MAX as u32).map(|leaf| (layer, LeafNo(leaf))).collect();
        let block = || ReadPart::Data(pool.copy_of(&[7; 4096]));
        let promised = ReplicaReply::Promised {
            previous: Token::default(),
            end: Seq(1),
            good_until: Some(Seq(1)),
        };
        let read = |count| ReplicaRequest::Read {
            lineage: lineage(),
            block: BlockNo(0),
            count,
        };
        let cases = [
            (
                ReplicaRequest::LeafVersions {
                    lineage: lineage(),
                    leaf,
                },
                ReplicaReply::Versions(vec![version; 256]),
            ),
            (
                ReplicaRequest::ChangedLeaves { newer_than, from },
                ReplicaReply::Leaves(leaves),
            ),
            (read(1), ReplicaReply::Read([block()].into_iter().collect())),
            (read(256), ReplicaReply::Read((0..256).map(|_| block()).collect())),
            (ReplicaRequest::Fence { record: Vec::new() }, promised),
            (ReplicaRequest::Flush, ReplicaReply::Done),
        ];
        for (request, reply) in cases {
            let shown = format!("{request:?}");
            let shard = ShardId::from_u64(1);
            let (token, id) = (Token::default(), RequestId(1));
            let load = Load::of(&ToReplica {
                shard,
                token,
                id,
                request,
            });
            let mut out = Outgoing::<Buf>::new(0);
            let disk = DiskId(1);
            let message = FromReplica {
                shard,
                disk,
                token,
                id,
                result: Ok(reply),
            };
            out.reply(Channel(1), message);
            // Heads and padding come on top of data.
            let most = load.bytes + load.bytes / 8;
            assert!(out.waiting() <= most, "{shown}: {} B, {load:?}", out.waiting());
        }
    }
}
