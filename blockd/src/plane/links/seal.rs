//! TLS on a link: what is sent is sealed, what is received is opened. The handshake is over when a link comes here.
//!
//! ```text
//!  Outgoing ─ Gather ─▶ plain ─▶ up to 1 MiB of it, in records ─▶ one send
//!  Incoming ◀─ opened, copied into its space ◀── rustls ◀── room ◀── one receive
//! ```
//! Each byte is copied twice more on each end than without TLS: rustls keeps records in memory of its own.

use std::io::{self, IoSlice, Read, Write};

use edge::uring::{Buf, BufMut, Gather};
use rustls::Connection;
use types::{Payload, Room};
use wire::{Incoming, LARGE_SPACE, SMALL_SPACE};

/// Bytes that are sealed for one send: a long queue does not keep the plane from its disks, and is not in memory twice.
const SEAL_BYTES_MAX: usize = 1 << 20;

/// Short receives in a row after which the room is made small again.
const SHORT_RECEIVES: u32 = 16;

/// Why nothing more can be read.
#[derive(Debug, thiserror::Error)]
pub enum SealError {
    /// Not TLS, changed on its way, or an alert of the other end.
    #[error("TLS: {0}")]
    Tls(#[from] rustls::Error),
    /// rustls takes nothing more.
    #[error("TLS: {0}")]
    Io(#[from] io::Error),
}

/// The TLS of one link.
pub struct Seal {
    connection: Connection,
    /// Taken from the link's [`wire::Outgoing`] and not all sealed: `sealed` bytes of it are.
    plain: wire::Gather<Buf>,
    plain_bytes: usize,
    sealed: usize,
    /// Was sent, to be filled again.
    spare: Vec<u8>,
    /// What was received: `room[opened..received]` is not opened yet. `None` while it is lent.
    room: Option<BufMut>,
    opened: usize,
    received: usize,
    short_receives: u32,
}

impl Seal {
    /// After the handshake; it may have read on.
    pub fn new(mut connection: Connection, take: impl FnOnce(usize) -> BufMut) -> Seal {
        connection.set_buffer_limit(None);
        Seal {
            connection,
            plain: wire::Gather::default(),
            plain_bytes: 0,
            sealed: 0,
            spare: Vec::new(),
            room: Some(take(SMALL_SPACE)),
            opened: 0,
            received: 0,
            short_receives: 0,
        }
    }

    /// Bytes that were taken over and are not sealed.
    pub fn unsealed(&self) -> u64 {
        (self.plain_bytes - self.sealed) as u64
    }

    /// Whether there is something to send besides what the link says.
    pub fn has_words(&self) -> bool {
        self.connection.wants_write()
    }

    /// The list that was sealed, to be used again.
    pub fn spare_plain(&mut self) -> wire::Gather<Buf> {
        assert_eq!(self.unsealed(), 0, "what is not sealed yet is not spare");
        std::mem::take(&mut self.plain)
    }

    /// Takes over what is to be sealed, once nothing else is.
    pub fn put(&mut self, plain: wire::Gather<Buf>) {
        assert_eq!(self.unsealed(), 0, "one list at a time");
        let large: usize = plain.large.iter().map(|(_, buffer)| buffer.length()).sum();
        self.plain_bytes = plain.small.len() + large;
        self.sealed = 0;
        self.plain = plain;
    }

    /// The next records to send.
    pub fn seal(&mut self) -> Gather {
        let slices = slices(&self.plain, self.sealed, SEAL_BYTES_MAX);
        let wanted: usize = slices.iter().map(|slice| slice.len()).sum();
        let mut taken = 0;
        if wanted > 0 {
            let written = self.connection.writer().write_vectored(&slices);
            taken = written.expect("a writer without a limit takes everything");
            assert_eq!(taken, wanted, "a writer without a limit takes everything");
        }
        self.sealed += taken;
        if self.unsealed() == 0 {
            // The buffers are free from here on.
            self.plain.large.clear();
            (self.plain_bytes, self.sealed) = (0, 0);
        }
        let mut small = std::mem::take(&mut self.spare);
        small.clear();
        self.take_records(&mut small);
        Gather {
            small,
            large: Vec::new(),
        }
    }

    /// Last words, and that nothing follows. Between two frames only: else the other end would take the words for the
    /// rest of a frame.
    pub fn seal_last(&mut self, words: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        if self.unsealed() == 0 {
            let _ = self.connection.writer().write_all(words);
        }
        self.connection.send_close_notify();
        self.take_records(&mut out);
        out
    }

    fn take_records(&mut self, out: &mut Vec<u8>) {
        while self.connection.wants_write() {
            let _ = self.connection.write_tls(out).expect("memory takes everything");
        }
    }

    /// Takes back what a send was of.
    pub fn sent(&mut self, small: Vec<u8>) {
        if small.capacity() <= LARGE_SPACE {
            self.spare = small;
        }
    }

    /// Memory to receive into, once [`Seal::open`] has nothing more.
    pub fn lend(&mut self, take: impl FnOnce(usize) -> BufMut) -> BufMut {
        assert_eq!(self.opened, self.received, "all that came is opened");
        let room = self.room.take().expect("lent once");
        let is_small = room.content().len() == SMALL_SPACE;
        if is_small && self.received == SMALL_SPACE {
            return take(LARGE_SPACE);
        }
        if !is_small && self.short_receives >= SHORT_RECEIVES {
            return take(SMALL_SPACE);
        }
        room
    }

    /// Takes it back, with `count` bytes received.
    pub fn landed(&mut self, room: BufMut, count: usize) {
        self.short_receives = if count < SMALL_SPACE {
            self.short_receives.saturating_add(1)
        } else {
            0
        };
        self.room = Some(room);
        (self.opened, self.received) = (0, count);
    }

    /// Opens what was received, as much as `incoming` has room for; how many bytes of the link that gave.
    pub fn open(
        &mut self,
        incoming: &mut Incoming<BufMut>,
        take: impl Fn(usize) -> BufMut,
    ) -> Result<usize, SealError> {
        loop {
            let mut landing = incoming.lend(&take);
            let mut count = 0;
            for (room, from) in landing.rooms.iter_mut().zip(landing.from) {
                count += self.read(&mut room.content_mut()[from..])?;
            }
            incoming.landed(landing, count);
            if count > 0 || self.opened == self.received {
                return Ok(count);
            }
            let room = self.room.as_ref().expect("what was received is here");
            let mut rest = &room.content()[self.opened..self.received];
            self.opened += match self.connection.read_tls(&mut rest)? {
                // The other end said that nothing follows, but something did.
                0 => rest.len(),
                count => count,
            };
            self.connection.process_new_packets()?;
        }
    }

    fn read(&mut self, into: &mut [u8]) -> Result<usize, SealError> {
        let mut filled = 0;
        while filled < into.len() {
            match self.connection.reader().read(&mut into[filled..]) {
                // The other end said that nothing follows; the socket will end next.
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(filled)
    }
}

/// The memory of a list from `skip` on, at most so many bytes.
fn slices(gather: &wire::Gather<Buf>, skip: usize, most: usize) -> Vec<IoSlice<'_>> {
    let mut slices = Vec::with_capacity(1 + 2 * gather.large.len());
    let (mut skip, mut left) = (skip, most);
    let mut push = |bytes: &'_ [u8]| -> Option<(usize, usize)> {
        let start = skip.min(bytes.len());
        skip -= start;
        let count = left.min(bytes.len() - start);
        left -= count;
        (count > 0).then_some((start, start + count))
    };
    let mut from = 0;
    for (upto, buffer) in &gather.large {
        let small = &gather.small[from..*upto];
        for bytes in [small, buffer.bytes()] {
            if let Some((start, end)) = push(bytes) {
                slices.push(IoSlice::new(&bytes[start..end]));
            }
        }
        from = *upto;
    }
    let small = &gather.small[from..];
    if let Some((start, end)) = push(small) {
        slices.push(IoSlice::new(&small[start..end]));
    }
    slices
}
