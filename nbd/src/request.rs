//! Requests of the transmission phase: 28 untrusted bytes in, a checked request or a refusal out.

use crate::export::ExportInfo;
use crate::proto::{Cursor, PAYLOAD_BYTES_MAX, REQUEST_MAGIC, command, command_flag, errno};
use crate::reply::EXTENTS_MAX;

/// Bytes of a request's header ("Request message", compact form).
pub const HEADER_BYTES: usize = 28;

/// Of an answer to BLOCK_STATUS: eight bytes an extent.
const STATUS_BYTES_MAX: u32 = 8 * EXTENTS_MAX as u32;

/// What was agreed on in the handshake, and bounds every request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    /// The export as described to the client.
    pub info: ExportInfo,
    /// Structured replies are spoken.
    pub is_structured: bool,
    /// The client selected `base:allocation`.
    pub has_allocation: bool,
}

/// A header whose magic was right; nothing else has been checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Command flags.
    pub flags: u16,
    /// Request type.
    pub kind: u16,
    /// The client's name for the request, sent back in the reply.
    pub cookie: u64,
    /// Byte offset.
    pub offset: u64,
    /// Bytes.
    pub length: u32,
}

/// A request that is whole sectors inside the export, with flags that belong to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    Read {
        offset: u64,
        length: u32,
        /// One content chunk only.
        is_whole: bool,
    },
    Write {
        offset: u64,
        length: u32,
        fua: bool,
    },
    Flush,
    Trim {
        offset: u64,
        length: u32,
        fua: bool,
    },
    WriteZeroes {
        offset: u64,
        length: u32,
        fua: bool,
        no_hole: bool,
    },
    BlockStatus {
        offset: u64,
        length: u32,
        /// One extent only.
        is_one: bool,
    },
    Disconnect,
}

impl Request {
    /// What the request makes the server hold in memory.
    pub fn memory_bytes(&self) -> u32 {
        match *self {
            Request::Read { length, .. } | Request::Write { length, .. } => length,
            Request::BlockStatus { .. } => STATUS_BYTES_MAX,
            _ => 0,
        }
    }
}

/// Why a request is answered with an error without asking the export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// One of the protocol's error values.
    pub errno: u32,
    /// For the client's user.
    pub message: &'static str,
}

/// The stream is not where a request begins: nothing after this can be trusted, the connection ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadMagic(pub u32);

impl Header {
    /// Reads a header.
    pub fn parse(bytes: &[u8; HEADER_BYTES]) -> Result<Header, BadMagic> {
        let mut cursor = Cursor(bytes);
        let mut read = || {
            let magic = cursor.u32()?;
            let header = Header {
                flags: cursor.u16()?,
                kind: cursor.u16()?,
                cookie: cursor.u64()?,
                offset: cursor.u64()?,
                length: cursor.u32()?,
            };
            Some((magic, header))
        };
        let (magic, header) = read().expect("28 bytes are a header");
        if magic == REQUEST_MAGIC {
            Ok(header)
        } else {
            Err(BadMagic(magic))
        }
    }

    /// Bytes of data that follow the header, whatever becomes of the request.
    pub fn payload_bytes(&self) -> u32 {
        if self.kind == command::WRITE {
            self.length
        } else {
            0
        }
    }

    /// Checks the request against what was negotiated.
    pub fn check(&self, session: &Session) -> Result<Request, Refusal> {
        let Header { offset, length, .. } = *self;
        self.check_flags(session)?;
        let has = |flag| self.flags & flag != 0;
        let fua = has(command_flag::FUA);
        match self.kind {
            command::READ => {
                self.check_range(session)?;
                self.check_payload()?;
                Ok(Request::Read {
                    offset,
                    length,
                    is_whole: has(command_flag::DF),
                })
            }
            command::WRITE => {
                self.check_writable(session)?;
                self.check_payload()?;
                Ok(Request::Write { offset, length, fua })
            }
            // "the length and offset fields of a disconnect request MUST be zero"; a client that gets it
            // wrong still wants to leave.
            command::DISC => Ok(Request::Disconnect),
            command::FLUSH if offset != 0 || length != 0 => {
                Err(refuse(errno::EINVAL, "a flush has no offset and no length"))
            }
            command::FLUSH => Ok(Request::Flush),
            command::TRIM => {
                self.check_writable(session)?;
                Ok(Request::Trim { offset, length, fua })
            }
            command::WRITE_ZEROES => {
                self.check_writable(session)?;
                Ok(Request::WriteZeroes {
                    offset,
                    length,
                    fua,
                    no_hole: has(command_flag::NO_HOLE),
                })
            }
            command::BLOCK_STATUS if !session.has_allocation => {
                Err(refuse(errno::EINVAL, "no metadata context was negotiated"))
            }
            command::BLOCK_STATUS => {
                self.check_range(session)?;
                Ok(Request::BlockStatus {
                    offset,
                    length,
                    is_one: has(command_flag::REQ_ONE),
                })
            }
            _ => Err(refuse(errno::EINVAL, "unknown request type")),
        }
    }

    /// "Command flags": FUA goes with every command, the others where they are documented; any other bit is
    /// EINVAL.
    fn check_flags(&self, session: &Session) -> Result<(), Refusal> {
        let extra = match self.kind {
            command::READ if session.is_structured => command_flag::DF,
            command::WRITE_ZEROES => command_flag::NO_HOLE | command_flag::FAST_ZERO,
            command::BLOCK_STATUS => command_flag::REQ_ONE,
            // Leaving is never refused.
            command::DISC => u16::MAX,
            _ => 0,
        };
        if self.flags & !(command_flag::FUA | extra) != 0 {
            return Err(refuse(errno::EINVAL, "a flag that this request does not have"));
        }
        Ok(())
    }

    /// "Error values": EPERM for a write to a read-only export, ENOSPC for one beyond the end.
    fn check_writable(&self, session: &Session) -> Result<(), Refusal> {
        if session.info.is_read_only {
            return Err(refuse(errno::EPERM, "the export is read-only"));
        }
        self.check_range(session).map_err(|refusal| {
            if refusal == OUT_OF_RANGE {
                refuse(errno::ENOSPC, refusal.message)
            } else {
                refusal
            }
        })
    }

    fn check_range(&self, session: &Session) -> Result<(), Refusal> {
        let sector = u64::from(session.info.sector_bytes);
        let length = u64::from(self.length);
        if length == 0 {
            // The effect of an empty request is left open by the specification; only confused clients send it.
            return Err(refuse(errno::EINVAL, "an empty range"));
        }
        match self.offset.checked_add(length) {
            Some(end) if end <= session.info.bytes => {}
            _ => return Err(OUT_OF_RANGE),
        }
        if !self.offset.is_multiple_of(sector) || !length.is_multiple_of(sector) {
            return Err(refuse(errno::EINVAL, "not whole sectors"));
        }
        Ok(())
    }

    fn check_payload(&self) -> Result<(), Refusal> {
        if self.length > PAYLOAD_BYTES_MAX {
            return Err(refuse(errno::EOVERFLOW, "more than the maximum block size"));
        }
        Ok(())
    }
}

const OUT_OF_RANGE: Refusal = refuse(errno::EINVAL, "beyond the end of the export");

const fn refuse(errno: u32, message: &'static str) -> Refusal {
    Refusal { errno, message }
}

#[cfg(test)]
#[path = "request_test.rs"]
mod tests;
