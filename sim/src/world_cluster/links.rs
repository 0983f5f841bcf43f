//! The protocol of links, as `blockd/src/plane/links.rs` has it: who greets, which disks can be reached, where answers
//! go back, when an end is given up.
//!
//! A disk is named by a channel: one life of it on one stream. A new stream of a host ends the old one before it carries
//! anything; a stream that breaks is broken whole.

use replication::{FromReplica, ToReplica};
use types::{DiskId, HeapBlock, HeapRoom, Incarnation, Instant, PoolId, VdiId};
use vdi::Event;
use wire::{Frame, Hello, Identity, Welcome};

use super::daemon::short;
use super::machine::{FROM_LINK, SILENCE, Way};
use super::records::host_id;
use super::streams::{End, Piece, Side};
use super::{At, World};
use crate::trace::tell;

impl World {
    fn identity(&self, at: At) -> Identity {
        let daemon = self.machines[at].daemon.as_ref().expect("who speaks runs");
        Identity {
            pool: PoolId(1),
            host: host_id(at),
            incarnation: Incarnation(daemon.incarnation),
            name: format!("host{at}"),
        }
    }

    pub(super) fn end_of(&mut self, stream: u64, side: Side) -> Option<&mut End> {
        self.streams.all.get_mut(&stream)?.end(side)
    }

    /// Streams that this host serves.
    pub(super) fn served_by(&mut self, at: At) -> Vec<u64> {
        let streams = self.streams.all.iter_mut();
        streams
            .filter_map(|(id, stream)| {
                (stream.server == at && stream.end(Side::Server).is_some()).then_some(*id)
            })
            .collect()
    }

    /// Ends of streams at this host.
    fn ends_at(&mut self, at: At) -> Vec<(u64, Side)> {
        let mut ends = Vec::new();
        for (id, stream) in &mut self.streams.all {
            for (side, host) in [(Side::Dialler, stream.dialler), (Side::Server, stream.server)] {
                if host == at && stream.end(side).is_some() {
                    ends.push((*id, side));
                }
            }
        }
        ends
    }

    /// The process that has these ends is gone: its kernel says so, or nobody does.
    pub(super) fn drop_streams(&mut self, at: At, is_silent: bool) {
        for (id, side) in self.ends_at(at) {
            if is_silent {
                self.streams.vanish(id, side);
            } else {
                self.streams.close(id, side);
            }
        }
    }

    pub(super) fn dial_peers(&mut self, at: At, now: Instant) {
        let is_due = |peer: &super::machine::Peer| peer.stream.is_none() && peer.again_at <= now;
        let due: Vec<At> = self
            .daemon(at)
            .peers
            .iter()
            .filter(|(_, peer)| is_due(peer))
            .map(|(to, _)| *to)
            .collect();
        for to in due {
            let hello = Hello::new(self.identity(at), host_id(to), 0).encode();
            let stream = self.streams.dial(at, to, hello, now);
            self.daemon(at).peers.get_mut(&to).expect("just listed").stream = Some(stream);
        }
    }

    /// Says that it lives on streams that said nothing lately, and ends those that heard nothing for too long.
    pub(super) fn beat(&mut self, at: At, now: Instant) {
        for (id, side) in self.ends_at(at) {
            let end = self.end_of(id, side).expect("just listed");
            if now.since(end.heard_at) >= SILENCE {
                tell(|| format!("  host {at} heard nothing on stream {id}"));
                self.give_up(at, id, side, now);
            } else if end.is_greeted && now.since(end.said_at) >= SILENCE / 4 {
                end.outgoing.ping();
            }
        }
    }

    pub(super) fn flush_streams(&mut self, at: At) {
        let now = self.local(at);
        for (id, side) in self.ends_at(at) {
            if self.streams.flush(id, side) {
                self.end_of(id, side).expect("it spoke").said_at = now;
            }
        }
    }

    /// Other hosts hear at once that their streams with this one are over; it hears nothing.
    pub(super) fn hang_up_on(&mut self, at: At) {
        for other in (0..self.machines.len()).filter(|other| *other != at) {
            if !self.machines[other].has_joined() {
                continue;
            }
            let now = self.local(other);
            for (id, side) in self.ends_at(other) {
                let stream = &self.streams.all[&id];
                if stream.dialler == at || stream.server == at {
                    self.give_up(other, id, side, now);
                }
            }
        }
    }

    /// This end closes the stream.
    fn give_up(&mut self, at: At, id: u64, side: Side, now: Instant) {
        if let Some(end) = self.streams.close(id, side) {
            self.ended(at, id, side, end, now);
        }
    }

    fn ended(&mut self, at: At, id: u64, side: Side, end: End, now: Instant) {
        if side == Side::Server {
            return;
        }
        let to = self.streams.all[&id].server;
        let peer = self.daemon(at).peers.get_mut(&to).expect("a peer");
        if peer.stream == Some(id) {
            peer.ended(now);
        }
        for disk in end.by_disk.into_keys() {
            self.tell_vdis(at, disk, false);
        }
    }

    /// Disks that writers of this host can reach now.
    pub(super) fn reached_from(&mut self, at: At) -> Vec<DiskId> {
        let machine = &self.machines[at];
        let mut disks: Vec<DiskId> = machine
            .disks
            .iter()
            .filter(|disk| disk.node.is_some())
            .map(|disk| disk.id)
            .collect();
        let peers = machine.daemon.as_ref().expect("it runs").peers.values();
        let streams: Vec<u64> = peers.filter_map(|peer| peer.stream).collect();
        for stream in streams {
            if let Some(end) = self.end_of(stream, Side::Dialler) {
                disks.extend(end.by_disk.keys().copied());
            }
        }
        disks
    }

    /// A message of a writer here for a disk there. Without a stream that reaches it, it is lost.
    pub(super) fn request(&mut self, at: At, to: At, disk: DiskId, message: ToReplica<HeapBlock>) {
        let Some(stream) = self.daemon(at).peers[&to].stream else {
            return;
        };
        if let Some(end) = self.end_of(stream, Side::Dialler)
            && let Some(channel) = end.by_disk.get(&disk).copied()
        {
            end.outgoing.request(channel, message);
        }
    }

    /// A disk's answer to a request that came on a stream.
    pub(super) fn reply(&mut self, at: At, mut answer: FromReplica<HeapBlock>) {
        let Some(way) = self.daemon(at).ways.remove(&(answer.id.0 & !FROM_LINK)) else {
            return;
        };
        tell(|| {
            format!(
                "    from disk {}: {}",
                answer.disk,
                short(&(&answer.token, &way.id, &answer.result))
            )
        });
        answer.id = way.id;
        if let Some(end) = self.end_of(way.stream, Side::Server)
            && end.channels.contains_key(&way.channel)
        {
            end.outgoing.reply(way.channel, answer);
        }
    }

    /// Something came to one side of a stream.
    pub(super) fn arrived(&mut self, id: u64, side: Side, piece: Piece) {
        let Some(stream) = self.streams.all.get(&id) else {
            return;
        };
        let at = match side {
            Side::Dialler => stream.dialler,
            Side::Server => stream.server,
        };
        match piece {
            Piece::Hello(hello) => {
                let is_taken = self.machines[at].has_joined() && self.greet(at, id, &hello);
                if !is_taken {
                    self.streams.send(id, side, Piece::Over);
                }
            }
            Piece::Over => {
                let now = self.local(at);
                if let Some(end) = self.streams.close(id, side) {
                    self.ended(at, id, side, end, now);
                }
            }
            Piece::Welcome(bytes) | Piece::Bytes(bytes) => {
                if self.end_of(id, side).is_some() {
                    self.heard(at, id, side, &bytes);
                } else {
                    self.streams.send(id, side, Piece::Over);
                }
            }
        }
    }

    /// A call. One of an earlier life of the caller is refused; one of this life ends the stream before.
    fn greet(&mut self, at: At, id: u64, hello: &[u8]) -> bool {
        let now = self.local(at);
        let me = self.identity(at);
        let mut end = End::new(now, 0);
        assert_eq!(end.incoming.put(hello, HeapRoom::new), hello.len());
        let Ok(Some(Frame::Hello(hello))) = end.incoming.next(HeapRoom::new) else {
            panic!("a Hello is not one");
        };
        let version = hello.check(&me).expect("hosts of one pool and version");
        let caller = self.streams.all[&id].dialler;
        let life = hello.from.incarnation.0;
        let latest = self.daemon(at).lives.entry(caller).or_default();
        if life < *latest {
            tell(|| format!("  host {at} refuses a call of an earlier life of host {caller}"));
            return false;
        }
        *latest = life;
        let before = self.served_by(at);
        for old in before {
            if self.streams.all[&old].dialler == caller {
                self.streams.close(old, Side::Server);
            }
        }
        let welcome = Welcome::new(version, &me).encode();
        let mut incoming = end.incoming;
        incoming.agree(version);
        let mut end = End::new(now, welcome.len());
        end.incoming = incoming;
        end.is_greeted = true;
        for disk in self.machines[at].disks.iter().filter(|disk| disk.node.is_some()) {
            end.reach(disk.id);
        }
        self.streams.accept(id, end);
        self.streams.send(id, Side::Server, Piece::Welcome(welcome));
        true
    }

    fn heard(&mut self, at: At, id: u64, side: Side, mut bytes: &[u8]) {
        let now = self.local(at);
        while let Some(end) = self.end_of(id, side) {
            end.heard_at = now;
            let landed = end.incoming.put(bytes, HeapRoom::new);
            bytes = &bytes[landed..];
            let mut frames = Vec::new();
            while let Some(frame) = end
                .incoming
                .next(HeapRoom::new)
                .expect("what was sent is understood")
            {
                if let Frame::Welcome(welcome) = frame {
                    end.incoming.agree(welcome.version);
                    end.is_greeted = true;
                    self.greeted(at, id);
                    break;
                }
                frames.push(frame);
            }
            for frame in frames {
                self.frame(at, id, side, frame);
            }
            if bytes.is_empty() {
                return;
            }
        }
    }

    fn greeted(&mut self, at: At, id: u64) {
        let to = self.streams.all[&id].server;
        self.daemon(at).peers.get_mut(&to).expect("a peer").greeted();
    }

    fn frame(&mut self, at: At, id: u64, side: Side, frame: Frame<HeapBlock>) {
        let Some(end) = self.end_of(id, side) else { return };
        match (side, frame) {
            (_, Frame::Ping) => {}
            (Side::Dialler, Frame::DiskUp(channel, disk)) => {
                end.channels.insert(channel, disk);
                if let Some(before) = end.by_disk.insert(disk, channel) {
                    end.channels.remove(&before);
                    self.tell_vdis(at, disk, false);
                }
                self.tell_vdis(at, disk, true);
            }
            (Side::Dialler, Frame::DiskDown(channel)) => {
                if let Some(disk) = end.channels.remove(&channel) {
                    end.by_disk.remove(&disk);
                    self.tell_vdis(at, disk, false);
                }
            }
            (Side::Dialler, Frame::Reply(reply)) => {
                if let Some(disk) = end.channels.get(&reply.channel).copied() {
                    let vdi: VdiId = reply.shard.vdi;
                    self.step_vdi(at, vdi, Event::Replica(reply.from_disk(disk)));
                }
            }
            (Side::Server, Frame::Request(channel, mut message)) => {
                let Some(disk) = end.channels.get(&channel).copied() else {
                    return;
                };
                let way = Way {
                    stream: id,
                    channel,
                    id: message.id,
                    disk,
                };
                message.id = self.daemon(at).way(way);
                let no = self.homes[&disk].1;
                self.daemon(at).inbox.push_back((no, message));
            }
            (side, frame) => panic!("{frame:?} came to the {side:?} of stream {id}"),
        }
    }
}
