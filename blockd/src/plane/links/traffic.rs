//! What a link sends and receives: a turn's frames in one send, and frames taken out of what came.

use edge::uring::{Buf, BufMut, Landing, Pool, StreamError, StreamSlot};
use wire::{Frame, Gather};

use super::seal::SealError;
use super::{Link, LinkRole};
use crate::plane::Plane;

pub(super) fn take_from(pool: &Pool) -> impl Fn(usize) -> BufMut + '_ {
    |bytes| pool.take(bytes)
}

impl Link {
    /// What is to be sent next, if it is time to.
    fn next_send(&mut self) -> Option<edge::uring::Gather> {
        if self.is_sending {
            return None;
        }
        let Some(seal) = &mut self.seal else {
            self.sending = self.outgoing.waiting();
            if self.sending == 0 {
                return None;
            }
            let Gather { small, large } = self.outgoing.take(std::mem::take(&mut self.spare));
            return Some(edge::uring::Gather { small, large });
        };
        if seal.unsealed() == 0 {
            if self.outgoing.waiting() == 0 && !seal.has_words() {
                return None;
            }
            let spare = seal.spare_plain();
            seal.put(self.outgoing.take(spare));
        }
        let gather = seal.seal();
        self.sending = gather.small.len() as u64;
        Some(gather)
    }
}

impl Plane {
    pub(super) fn touch_link(&mut self, slot: StreamSlot) {
        if let Some(link) = self.links.get_mut(&slot)
            && !std::mem::replace(&mut link.is_touched, true)
        {
            self.touched_links.push(slot);
        }
    }

    /// Sends what was said this turn, and ends links that are to end. The cores must be at rest.
    pub(in crate::plane) fn flush_links(&mut self) {
        while let Some(slot) = self.touched_links.pop() {
            let Some(link) = self.links.get_mut(&slot) else {
                continue;
            };
            link.is_touched = false;
            if let Some(reason) = link.doom.take() {
                self.break_link(slot, reason);
                continue;
            }
            let Some(gather) = link.next_send() else {
                continue;
            };
            link.is_sending = true;
            link.said_at = self.now;
            link.figures.sends += 1;
            link.figures.bytes_sent += link.sending;
            self.ring.send(slot, gather);
        }
    }

    /// The kernel has taken what was sent.
    pub(in crate::plane) fn link_sent(
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
        match &mut link.seal {
            Some(seal) => seal.sent(small),
            None => link.spare = Gather { small, large },
        }
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

    pub(super) fn receive_on(&mut self, slot: StreamSlot) {
        let link = self.links.get_mut(&slot).expect("a link that receives is there");
        link.is_receiving = true;
        // While nothing was received nothing could be heard.
        link.heard_at = self.now;
        let take = take_from(&self.pool);
        let landing = match &mut link.seal {
            Some(seal) => Landing {
                rooms: [take(0), seal.lend(take)],
                from: [0, 0],
            },
            None => {
                let wire::Landing { rooms, from } = link.incoming.lend(take);
                Landing { rooms, from }
            }
        };
        self.ring.receive(slot, landing);
    }

    /// Something came.
    pub(in crate::plane) fn link_received(
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
        match &mut link.seal {
            Some(seal) => {
                let [_, room] = rooms;
                seal.landed(room, count);
            }
            None => link.incoming.landed(wire::Landing { rooms, from }, count),
        }
        self.digest(slot);
    }

    /// Takes frames out of what came, and receives on, until there is too much to be dealt with first. A frame of a few
    /// bytes may ask for a MiB: what was received is bounded, what it asks for is not before it is looked at.
    pub(super) fn digest(&mut self, slot: StreamSlot) {
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
                Ok(None) => match self.open(slot) {
                    Ok(0) => return self.receive_on(slot),
                    Ok(_) => {}
                    Err(error) => return self.break_link(slot, error.to_string()),
                },
                Err(error) => return self.break_link(slot, error.to_string()),
            }
        }
    }

    /// Opens what came sealed; the bytes that this gave.
    fn open(&mut self, slot: StreamSlot) -> Result<usize, SealError> {
        let link = self.links.get_mut(&slot).expect("a link that is opened is there");
        let Some(seal) = &mut link.seal else {
            return Ok(0);
        };
        let opened = seal.open(&mut link.incoming, take_from(&self.pool))?;
        // An answer to a change of keys.
        if seal.has_words() {
            self.touch_link(slot);
        }
        Ok(opened)
    }

    fn heard(&mut self, slot: StreamSlot, frame: Frame<Buf>) {
        let link = self.links.get(&slot).expect("a link that hears is there");
        match (link.role, frame) {
            (_, Frame::Ping) => {}
            (_, Frame::Bye(reason)) => self.break_link(slot, format!("the other end says: {reason}")),
            (LinkRole::Dialled, Frame::Reply(reply)) => self.replied(slot, reply),
            (LinkRole::Dialled, Frame::DiskUp(channel, disk)) => self.announced(slot, channel, disk),
            (LinkRole::Dialled, Frame::DiskDown(channel)) => self.withdrawn(slot, channel),
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
}
