//! What is to be sent: heads one after the other, and the buffers that go between them.

use types::{DiskId, Payload};

use crate::bytes::Put;
use crate::frame::{Channel, Type, VERSION, put_front};

/// Bytes to send, in the order of a vectored write: `small` up to where each buffer of `large` goes in.
#[derive(Debug)]
pub struct Gather<B> {
    /// Headers, heads and padding.
    pub small: Vec<u8>,
    /// How much of `small` comes before the buffer, and the buffer.
    pub large: Vec<(usize, B)>,
}

impl<B> Default for Gather<B> {
    fn default() -> Gather<B> {
        Gather {
            small: Vec::new(),
            large: Vec::new(),
        }
    }
}

impl<B: Payload> Gather<B> {
    /// In order. For tests and for whoever has no vectored write.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut from = 0;
        for (upto, buffer) in &self.large {
            bytes.extend_from_slice(&self.small[from..*upto]);
            bytes.extend_from_slice(buffer.bytes());
            from = *upto;
        }
        bytes.extend_from_slice(&self.small[from..]);
        bytes
    }
}

/// The sending end of a link, once a version is agreed on: frames are appended to it and taken out in one piece.
/// No buffer is copied.
#[derive(Debug)]
pub struct Outgoing<B> {
    gather: Gather<B>,
    /// Bytes in `gather`.
    waiting: u64,
    /// Bytes of the stream up to the end of `gather`.
    position: u64,
}

impl<B: Payload> Outgoing<B> {
    /// `position` is the number of bytes that this end has sent already: its greeting.
    #[must_use]
    pub fn new(position: u64) -> Outgoing<B> {
        Outgoing {
            gather: Gather::default(),
            waiting: 0,
            position,
        }
    }

    /// Bytes that wait to be taken.
    #[must_use]
    pub fn waiting(&self) -> u64 {
        self.waiting
    }

    /// Takes what waits; `spare` is one that was sent, used again.
    pub fn take(&mut self, mut spare: Gather<B>) -> Gather<B> {
        spare.small.clear();
        spare.large.clear();
        self.waiting = 0;
        std::mem::replace(&mut self.gather, spare)
    }

    /// Appends a sign of life.
    pub fn ping(&mut self) {
        self.small(Type::Ping, |_| ());
    }

    /// Appends the reason why this end ends the link.
    pub fn bye(&mut self, reason: &str) {
        self.small(Type::Bye, |out| out.put_text(reason));
    }

    /// Appends that a disk can be reached on this link, from now on by `channel`.
    pub fn disk_up(&mut self, channel: Channel, disk: DiskId) {
        self.small(Type::DiskUp, |out| {
            out.put_u32(channel.0);
            out.put_u128(disk.0);
        });
    }

    /// Appends that nothing more will come from `channel`, and nothing sent to it will arrive.
    pub fn disk_down(&mut self, channel: Channel) {
        self.small(Type::DiskDown, |out| out.put_u32(channel.0));
    }

    pub(crate) fn small(&mut self, kind: Type, write_head: impl FnOnce(&mut Vec<u8>)) {
        let bytes = put_front(
            &mut self.gather.small,
            self.position,
            VERSION,
            kind,
            0,
            write_head,
        ) as u64;
        self.waiting += bytes;
        self.position += bytes;
    }

    pub(crate) fn with_data(
        &mut self,
        kind: Type,
        data: impl IntoIterator<Item = B> + AsRef<[B]>,
        write_head: impl FnOnce(&mut Vec<u8>),
    ) {
        let payload: usize = data.as_ref().iter().map(Payload::length).sum();
        let front = put_front(
            &mut self.gather.small,
            self.position,
            VERSION,
            kind,
            payload,
            write_head,
        );
        let upto = self.gather.small.len();
        let buffers = data.into_iter().map(|buffer| (upto, buffer));
        self.gather.large.extend(buffers);
        let bytes = (front + payload) as u64;
        self.waiting += bytes;
        self.position += bytes;
    }
}
