//! What is received: a stream of bytes, cut into frames without copying the data where that can be.
//!
//! ```text
//!  lend ──▶ Landing: [rest of a large payload][rest of the space] ──▶ the driver receives into both, in one call
//!  landed ◀── so many bytes                                        next ──▶ frame, frame, …, nothing yet
//! ```
//! Frames land one after the other in a space; a payload that is whole there is handed on where it lies, sharing the
//! space. One that would not fit in the rest of it gets memory of its own: what has come of it is copied, the rest
//! is received in place. So a small payload is copied only where a space ends, and a large one at most for the
//! part that came with its head.

use replication::ToReplica;
use types::{BLOCK_BYTES, BlockCrcs, DiskId, Payload, Room};

use crate::bytes::Reader;
use crate::frame::{Channel, FRONT_BYTES_MAX, HEADER_BYTES, Header, NO_VERSION, PAYLOAD_ALIGN, Type};
use crate::hello::{Hello, Refused, Welcome};
use crate::reply::Reply;
use crate::{WireError, reply, request};

/// Bytes of the spaces that a link with data receives into.
pub const LARGE_SPACE: usize = 64 << 10;

/// Bytes of the spaces of a link on which no data came lately: most links of a large cluster idle.
pub const SMALL_SPACE: usize = 4 << 10;

/// A rest of a space smaller than this is not worth a system call.
const LEAST_SPACE: usize = 1024;

/// What a small space is good for wherever it begins.
const SMALL_FRONT: usize = SMALL_SPACE - PAYLOAD_ALIGN - LEAST_SPACE;

const _: () = assert!(FRONT_BYTES_MAX + PAYLOAD_ALIGN + LEAST_SPACE <= LARGE_SPACE);

/// What the other end said.
#[derive(Clone, Debug)]
pub enum Frame<B> {
    /// Before a version is agreed on.
    Hello(Hello),
    /// Before a version is agreed on.
    Welcome(Welcome),
    /// Before a version is agreed on.
    Refused(Refused),
    /// It lives.
    Ping,
    /// It ends the link.
    Bye(String),
    /// A disk can be reached.
    DiskUp(Channel, DiskId),
    /// It cannot any more.
    DiskDown(Channel),
    /// For the disk of a channel of ours.
    Request(Channel, ToReplica<B>),
    /// From the disk of a channel of theirs.
    Reply(Reply<B>),
}

/// Memory to receive into: `rooms[0]` from `from[0]` to its end (it may be empty), then `rooms[1]` likewise.
#[derive(Debug)]
pub struct Landing<R> {
    /// Where.
    pub rooms: [R; 2],
    /// From which byte of each.
    pub from: [usize; 2],
}

/// The receiving end of a link.
#[derive(Debug)]
pub struct Incoming<R> {
    version: u8,
    /// `None` while it is lent.
    space: Option<R>,
    /// Bytes at the front of `space` that have come and are not used yet.
    filled: usize,
    /// Where `space` begins in memory, modulo [`PAYLOAD_ALIGN`].
    skew: usize,
    /// Bytes of the stream before `space`.
    position: u64,
    /// A payload with memory of its own.
    large: Option<Large<R>>,
    has_carried_data: bool,
    copied: u64,
}

struct Large<R> {
    pending: Pending,
    frame: &'static str,
    /// `None` while it is lent.
    room: Option<R>,
    length: usize,
    filled: usize,
}

impl<R> std::fmt::Debug for Large<R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} with {} of {} B", self.frame, self.filled, self.length)
    }
}

/// A message without its data.
enum Pending {
    Request(request::Pending),
    Reply(reply::Pending),
}

impl Pending {
    fn crcs(&self) -> Option<&BlockCrcs> {
        match self {
            Pending::Request(pending) => pending.crcs(),
            Pending::Reply(pending) => pending.crcs(),
        }
    }

    fn with_data<B: Payload>(self, data: Option<B>) -> Frame<B> {
        match self {
            Pending::Request(pending) => {
                let (channel, message) = pending.with_data(data);
                Frame::Request(channel, message)
            }
            Pending::Reply(pending) => Frame::Reply(pending.with_data(data.as_ref())),
        }
    }
}

impl<R: Room> Incoming<R> {
    /// The receiving end of a new stream; `take` gives memory of so many bytes.
    #[must_use]
    pub fn new(take: impl FnOnce(usize) -> R) -> Incoming<R> {
        Incoming {
            version: NO_VERSION,
            space: Some(take(SMALL_SPACE)),
            filled: 0,
            skew: 0,
            position: 0,
            large: None,
            has_carried_data: false,
            copied: 0,
        }
    }

    /// From here on frames are of `version`: the greeting is over.
    pub fn agree(&mut self, version: u8) {
        self.version = version;
    }

    /// Goes on after `position` bytes that someone else has read: the greeting.
    #[must_use]
    pub fn after(position: u64, version: u8, take: impl FnOnce(usize) -> R) -> Incoming<R> {
        let mut incoming = Incoming::new(take);
        incoming.agree(version);
        incoming.position = position;
        incoming.align();
        incoming
    }

    /// How many more bytes belong to the frame that is coming, as far as can be told: never none. Who reads no more than
    /// that reads nothing of the frame behind it.
    #[must_use]
    pub fn missing(&self) -> usize {
        if let Some(large) = &self.large {
            return (large.length - large.filled).max(1);
        }
        let content = self.space.as_ref().map_or(&[][..], Room::content);
        let wanted = match Header::parse(&content[..self.filled], self.version) {
            Ok(Some(header)) => header.front() + header.payload,
            _ => HEADER_BYTES,
        };
        wanted.saturating_sub(self.filled).max(1)
    }

    /// Bytes of data that were copied from where they landed.
    #[must_use]
    pub fn copied(&self) -> u64 {
        self.copied
    }

    /// Lets `space`, in which nothing has landed yet, begin in memory where the stream does, modulo [`PAYLOAD_ALIGN`].
    fn align(&mut self) {
        let wanted = (self.position % PAYLOAD_ALIGN as u64) as usize;
        let cut = (wanted + PAYLOAD_ALIGN - self.skew) % PAYLOAD_ALIGN;
        let space = self.space.as_mut().expect("not lent");
        // One that is as good as used up is about to be replaced.
        if cut <= space.content().len() {
            let _ = space.split_front(cut);
            self.skew = wanted;
        }
    }

    /// Memory for what comes next, once [`Incoming::next`] has nothing more to tell. `take` gives memory of so many bytes.
    pub fn lend(&mut self, take: impl Fn(usize) -> R) -> Landing<R> {
        self.renew_space(&take);
        let space = self.space.take().expect("lent once");
        let (first, from) = match &mut self.large {
            Some(large) => (large.room.take().expect("lent once"), large.filled),
            None => (take(0), 0),
        };
        Landing {
            rooms: [first, space],
            from: [from, self.filled],
        }
    }

    fn renew_space(&mut self, take: &impl Fn(usize) -> R) {
        let space = self.space.as_ref().expect("not lent");
        let left = space.content().len() - self.filled;
        let wanted = self.next_front().unwrap_or(0);
        let is_enough = if wanted > self.filled {
            // A payload that has room here is not moved for the sake of what follows it.
            wanted - self.filled <= left
        } else {
            left >= LEAST_SPACE
        };
        if is_enough {
            return;
        }
        let size = if self.has_carried_data || wanted.max(self.filled) > SMALL_FRONT {
            LARGE_SPACE
        } else {
            SMALL_SPACE
        };
        self.has_carried_data = false;
        assert!(
            self.filled <= FRONT_BYTES_MAX,
            "{} B that `next` was not asked about",
            self.filled
        );
        let old = self.space.replace(take(size)).expect("not lent");
        self.skew = 0;
        self.align();
        let space = self.space.as_mut().expect("just put");
        space.content_mut()[..self.filled].copy_from_slice(&old.content()[..self.filled]);
    }

    /// Bytes that the frame at the front of the space needs there, as far as can be told.
    fn next_front(&self) -> Option<usize> {
        if self.large.is_some() {
            return None;
        }
        let space = self.space.as_ref()?.content();
        let header = Header::parse(&space[..self.filled], self.version).ok()??;
        let whole = header.front() + header.payload;
        Some(if whole <= space.len() {
            whole
        } else {
            header.front()
        })
    }

    /// Takes back what was lent, with `count` bytes received into it.
    ///
    /// # Panics
    /// When that is more than there was room for: the driver's mistake.
    pub fn landed(&mut self, landing: Landing<R>, count: usize) {
        let [first, space] = landing.rooms;
        let mut rest = count;
        if let Some(large) = &mut self.large {
            let taken = rest.min(large.length - large.filled);
            large.filled += taken;
            rest -= taken;
            large.room = Some(first);
        }
        assert!(
            self.filled + rest <= space.content().len(),
            "{count} bytes received where there was room for less"
        );
        self.filled += rest;
        self.space = Some(space);
    }

    /// Lands a copy of `bytes`, as much of it as there is room for; how much that was. For whoever reads elsewhere first.
    pub fn put(&mut self, bytes: &[u8], take: impl Fn(usize) -> R) -> usize {
        let mut landing = self.lend(take);
        let mut landed = 0;
        for (room, from) in landing.rooms.iter_mut().zip(landing.from) {
            let room = &mut room.content_mut()[from..];
            let count = room.len().min(bytes.len() - landed);
            room[..count].copy_from_slice(&bytes[landed..landed + count]);
            landed += count;
        }
        self.landed(landing, landed);
        landed
    }

    /// The next frame, if it is all here. `take` gives memory of so many bytes.
    ///
    /// # Errors
    /// What is wrong with it. The stream cannot be followed any further.
    pub fn next(&mut self, take: impl FnOnce(usize) -> R) -> Result<Option<Frame<R::Payload>>, WireError> {
        if let Some(large) = &self.large {
            if large.filled < large.length {
                return Ok(None);
            }
            let large = self.large.take().expect("just seen");
            let mut room = large.room.expect("not lent");
            let data = room.split_front(large.length);
            check_blocks(large.frame, &large.pending, &data)?;
            return Ok(Some(large.pending.with_data(Some(data))));
        }
        let space = self.space.as_mut().expect("not lent");
        let content = &space.content()[..self.filled];
        let Some(header) = Header::parse(content, self.version)? else {
            return Ok(None);
        };
        let front = header.front();
        if self.filled < front {
            return Ok(None);
        }
        if header.payload == 0 {
            let frame = decode_small(header.kind, header.head(content)?)?;
            self.pass(front);
            return Ok(Some(frame));
        }
        let whole = front + header.payload;
        if self.filled < whole && whole <= space.content().len() {
            return Ok(None);
        }
        let pending = decode_head(header.kind, header.head(content)?, header.payload)?;
        let frame = header.kind.name();
        self.has_carried_data = true;
        let is_aligned = (self.skew + front).is_multiple_of(PAYLOAD_ALIGN);
        if self.filled >= whole && is_aligned {
            self.pass(front);
            let data = self.pass(header.payload);
            check_blocks(frame, &pending, &data)?;
            return Ok(Some(pending.with_data(Some(data))));
        }
        let mut room = take(header.payload);
        let here = (self.filled - front).min(header.payload);
        room.content_mut()[..here].copy_from_slice(&content[front..front + here]);
        self.copied += here as u64;
        self.pass(front + here);
        if here < header.payload {
            // What follows it in the stream is the next to land in the space.
            self.position += (header.payload - here) as u64;
            self.align();
        }
        self.large = Some(Large {
            pending,
            frame,
            room: Some(room),
            length: header.payload,
            filled: here,
        });
        if here < header.payload {
            return Ok(None);
        }
        self.next(take_nothing)
    }

    /// Moves past the first `count` bytes of the space.
    fn pass(&mut self, count: usize) -> R::Payload {
        self.filled -= count;
        self.position += count as u64;
        self.skew = (self.skew + count) % PAYLOAD_ALIGN;
        self.space.as_mut().expect("not lent").split_front(count)
    }
}

fn take_nothing<R>(_: usize) -> R {
    unreachable!("a payload that is whole needs no memory")
}

/// A frame without data.
fn decode_small<B: Payload>(kind: Type, head: &[u8]) -> Result<Frame<B>, WireError> {
    let mut fields = Reader::new(kind.name(), head);
    let frame = match kind {
        Type::Hello => return Ok(Frame::Hello(Hello::decode(head)?)),
        Type::Welcome => return Ok(Frame::Welcome(Welcome::decode(head)?)),
        Type::Refused => return Ok(Frame::Refused(Refused::decode(head)?)),
        Type::Ping => Frame::Ping,
        Type::Bye => Frame::Bye(fields.text()?),
        Type::DiskUp => Frame::DiskUp(Channel(fields.u32()?), DiskId(fields.u128()?)),
        Type::DiskDown => Frame::DiskDown(Channel(fields.u32()?)),
        _ => return Ok(decode_head(kind, head, 0)?.with_data(None)),
    };
    fields.end()?;
    Ok(frame)
}

fn decode_head(kind: Type, head: &[u8], payload: usize) -> Result<Pending, WireError> {
    Ok(match kind {
        Type::Promised | Type::Done | Type::Content | Type::Leaves | Type::Versions | Type::Refusal => {
            Pending::Reply(reply::decode(kind, head, payload)?)
        }
        _ => Pending::Request(request::decode(kind, head, payload)?),
    })
}

/// The data is what the sender computed the checksums of. This is the only time that the way here is checked for data:
/// a frame has no checksum over it.
fn check_blocks<B: Payload>(frame: &'static str, pending: &Pending, data: &B) -> Result<(), WireError> {
    let crcs = pending.crcs().expect("only what has checksums has data");
    let blocks = data.bytes().chunks(BLOCK_BYTES as usize);
    for (block, (bytes, said)) in blocks.zip(crcs).enumerate() {
        let got = types::crc32c(bytes);
        if got != *said {
            return Err(WireError::BlockCrc {
                frame,
                block,
                got,
                said: *said,
            });
        }
    }
    Ok(())
}
