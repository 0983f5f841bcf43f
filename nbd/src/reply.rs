//! Replies of the transmission phase, encoded as pieces that go to the socket with one `writev` for many.

use std::collections::VecDeque;

use smallvec::SmallVec;

use crate::export::{ExportError, Extent, Part};
use crate::proto::{BASE_ALLOCATION_ID, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, chunk, errno, state};
use crate::request::Refusal;

/// Extents in one answer to BLOCK_STATUS at most; the client asks on from where they end.
pub const EXTENTS_MAX: usize = 4096;

/// Bytes of a message in an error chunk at most: more is cut at a character.
const MESSAGE_BYTES_MAX: usize = 512;

/// A run of a reply's bytes.
#[derive(Debug, PartialEq, Eq)]
pub enum Piece<D> {
    /// Headers: at most a chunk's header, offset and hole size.
    Head(SmallVec<[u8; 32]>),
    /// Content from the export.
    Data(D),
    /// Zero bytes that have to be sent as such.
    Zeros(u64),
}

/// All bytes of one reply.
pub type Reply<D> = SmallVec<[Piece<D>; 2]>;

/// How the client of a request hears of its result.
#[derive(Clone, Copy, Debug)]
pub struct Encoder {
    /// The request's.
    pub cookie: u64,
    /// Structured replies were negotiated.
    pub is_structured: bool,
}

impl Encoder {
    /// Success without content. A simple reply also where structured ones were negotiated ("a simple reply MAY
    /// be used as a reply to any request other than READ"): it is the shorter.
    pub fn done<D>(self) -> Reply<D> {
        let mut reply = Reply::new();
        reply.push(self.simple(0));
        reply
    }

    /// An error; with a text where the client can take one.
    pub fn error<D>(self, errno: u32, message: &str) -> Reply<D> {
        assert_ne!(errno, 0, "an error has a number");
        let mut reply = Reply::new();
        if !self.is_structured {
            reply.push(self.simple(errno));
            return reply;
        }
        let mut end = message.len().min(MESSAGE_BYTES_MAX);
        while !message.is_char_boundary(end) {
            end -= 1;
        }
        let message = &message.as_bytes()[..end];
        let mut head = self.chunk(chunk::FLAG_DONE, chunk::ERROR, 6 + end as u64);
        head.extend_from_slice(&errno.to_be_bytes());
        head.extend_from_slice(&(end as u16).to_be_bytes());
        head.extend_from_slice(message);
        reply.push(Piece::Head(head));
        reply
    }

    /// What the export said no to.
    pub fn failed<D>(self, error: &ExportError) -> Reply<D> {
        self.error(error.errno(), &error.to_string())
    }

    /// What the server said no to.
    pub fn refused<D>(self, refusal: Refusal) -> Reply<D> {
        self.error(refusal.errno, refusal.message)
    }

    /// The content of a read of `length` bytes at `offset`. With `is_whole` (the DF flag) it is one chunk.
    pub fn read<D: AsRef<[u8]>>(
        self,
        offset: u64,
        length: u32,
        is_whole: bool,
        parts: Vec<Part<D>>,
    ) -> Reply<D> {
        let done = parts.iter().map(part_bytes).fold(0, u64::saturating_add);
        let wanted = u64::from(length);
        if done != wanted {
            return self.failed(&ExportError::Short { done, wanted });
        }
        let mut parts: VecDeque<_> = parts.into_iter().filter(|part| part_bytes(part) > 0).collect();
        let mut reply = Reply::new();
        if !self.is_structured {
            reply.push(self.simple(0));
            reply.extend(parts.into_iter().map(content));
            return reply;
        }
        let has_data = parts.iter().any(|part| matches!(part, Part::Data(_)));
        if is_whole && has_data {
            reply.push(self.data_head(chunk::FLAG_DONE, offset, wanted));
            reply.extend(parts.into_iter().map(content));
            return reply;
        }
        let mut at = offset;
        while !parts.is_empty() {
            // Neighbours of the same kind share a chunk: exports that answer in blocks need not merge them.
            let is_hole = is_zeros(&parts[0]);
            let count = parts.iter().take_while(|part| is_zeros(part) == is_hole).count();
            let run = parts.iter().take(count).map(part_bytes).sum();
            let flags = if count == parts.len() { chunk::FLAG_DONE } else { 0 };
            if is_hole {
                reply.push(self.hole(flags, at, run));
                parts.drain(..count);
            } else {
                reply.push(self.data_head(flags, at, run));
                reply.extend(parts.drain(..count).map(content));
            }
            at += run;
        }
        reply
    }

    /// Allocation of the `length` bytes at the request's offset: neighbours merged, cut to the range.
    pub fn block_status<D>(self, length: u32, is_one: bool, extents: &[Extent]) -> Reply<D> {
        let limit = if is_one { 1 } else { EXTENTS_MAX };
        let merged = merge_extents(length, limit, extents);
        if merged.is_empty() {
            return self.error(errno::EIO, "the export knows no allocation here");
        }
        let mut head = self.chunk(chunk::FLAG_DONE, chunk::BLOCK_STATUS, 4 + 8 * merged.len() as u64);
        head.extend_from_slice(&BASE_ALLOCATION_ID.to_be_bytes());
        for (length, is_data) in merged {
            let flags = if is_data { 0 } else { state::HOLE | state::ZERO };
            head.extend_from_slice(&length.to_be_bytes());
            head.extend_from_slice(&flags.to_be_bytes());
        }
        let mut reply = Reply::new();
        reply.push(Piece::Head(head));
        reply
    }

    fn simple<D>(self, errno: u32) -> Piece<D> {
        let mut head = SmallVec::new();
        head.extend_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
        head.extend_from_slice(&errno.to_be_bytes());
        head.extend_from_slice(&self.cookie.to_be_bytes());
        Piece::Head(head)
    }

    fn chunk(self, flags: u16, kind: u16, payload_bytes: u64) -> SmallVec<[u8; 32]> {
        assert!(
            self.is_structured,
            "a chunk to a client that did not ask for structured replies"
        );
        let payload_bytes = u32::try_from(payload_bytes).expect("a chunk is at most 32 MiB and its offset");
        let mut head = SmallVec::new();
        head.extend_from_slice(&STRUCTURED_REPLY_MAGIC.to_be_bytes());
        head.extend_from_slice(&flags.to_be_bytes());
        head.extend_from_slice(&kind.to_be_bytes());
        head.extend_from_slice(&self.cookie.to_be_bytes());
        head.extend_from_slice(&payload_bytes.to_be_bytes());
        head
    }

    fn data_head<D>(self, flags: u16, offset: u64, bytes: u64) -> Piece<D> {
        let mut head = self.chunk(flags, chunk::OFFSET_DATA, 8 + bytes);
        head.extend_from_slice(&offset.to_be_bytes());
        Piece::Head(head)
    }

    fn hole<D>(self, flags: u16, offset: u64, bytes: u64) -> Piece<D> {
        let mut head = self.chunk(flags, chunk::OFFSET_HOLE, 12);
        head.extend_from_slice(&offset.to_be_bytes());
        let bytes = u32::try_from(bytes).expect("no longer than the read, which is at most 32 MiB");
        head.extend_from_slice(&bytes.to_be_bytes());
        Piece::Head(head)
    }
}

fn merge_extents(length: u32, limit: usize, extents: &[Extent]) -> Vec<(u32, bool)> {
    let mut merged: Vec<(u32, bool)> = Vec::new();
    let mut left = length;
    for extent in extents {
        let bytes = u32::try_from(extent.length).unwrap_or(u32::MAX).min(left);
        if bytes == 0 {
            continue;
        }
        let count = merged.len();
        match merged.last_mut() {
            Some(last) if last.1 == extent.is_data => last.0 += bytes,
            _ if count == limit => break,
            _ => merged.push((bytes, extent.is_data)),
        }
        left -= bytes;
    }
    merged
}

fn is_zeros<D>(part: &Part<D>) -> bool {
    matches!(part, Part::Zeros(_))
}

fn part_bytes<D: AsRef<[u8]>>(part: &Part<D>) -> u64 {
    match part {
        Part::Data(data) => data.as_ref().len() as u64,
        Part::Zeros(bytes) => *bytes,
    }
}

fn content<D>(part: Part<D>) -> Piece<D> {
    match part {
        Part::Data(data) => Piece::Data(data),
        Part::Zeros(bytes) => Piece::Zeros(bytes),
    }
}

#[cfg(test)]
#[path = "reply_test.rs"]
mod tests;
