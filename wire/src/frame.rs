//! The header that every frame begins with, and the types of frames.

use std::fmt;

use types::BLOCK_BYTES;

use crate::WireError;
use crate::bytes::Put;

/// The protocol version that this crate writes, and the only one it reads yet.
pub const VERSION: u8 = 2;

/// The version in the header of what is said before a version is agreed on; those layouts never change.
pub(crate) const NO_VERSION: u8 = 0;

/// Bytes of a header.
pub const HEADER_BYTES: usize = 20;

/// The most bytes a head has.
pub const HEAD_BYTES_MAX: usize = 4608;

/// The most blocks of data a frame carries.
pub const BLOCKS_MAX: usize = store::REQUEST_BLOCKS_MAX as usize;

/// The most bytes of data a frame carries.
pub const PAYLOAD_BYTES_MAX: usize = BLOCKS_MAX * BLOCK_BYTES as usize;

/// A payload begins at a multiple of this in the stream, so that one received in place suits direct I/O.
pub const PAYLOAD_ALIGN: usize = 512;

/// Header, head and pad: what must be in one piece before a frame can be read.
pub(crate) const FRONT_BYTES_MAX: usize = HEADER_BYTES + HEAD_BYTES_MAX + PAYLOAD_ALIGN;

const MAGIC: [u8; 4] = *b"WFTL";
const CRC_AT: usize = 16;

/// One disk in one of its lives, on one link: chosen by the host that has the disk, never used twice on a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Channel(pub u32);

impl fmt::Display for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

macro_rules! types {
    ($($number:literal $name:ident $head_max:expr, $payload:expr;)*) => {
        /// What a frame is.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u8)]
        pub(crate) enum Type {
            $($name = $number),*
        }

        impl Type {
            /// All of them, for tests.
            #[cfg(test)]
            pub(crate) const ALL: &[Type] = &[$(Type::$name),*];

            fn of(number: u8) -> Option<Type> {
                match number {
                    $($number => Some(Type::$name),)*
                    _ => None,
                }
            }

            /// What messages call it.
            pub(crate) fn name(self) -> &'static str {
                match self {
                    $(Type::$name => stringify!($name)),*
                }
            }

            fn head_bytes_max(self) -> usize {
                match self {
                    $(Type::$name => $head_max),*
                }
            }

            fn payload_bytes_max(self) -> usize {
                match self {
                    $(Type::$name => $payload),*
                }
            }
        }
    };
}

/// Channel, shard, token and request: what every request and reply begins with.
pub(crate) const ADDRESS_BYTES: usize = 36;
const CRCS_MAX: usize = 4 * BLOCKS_MAX;
const TEXT_MAX: usize = 256;
/// Bytes of a step of a lineage, and of the longest lineage: the number of its steps comes first.
const STEP_BYTES: usize = 12;
const LINEAGE_BYTES_MAX: usize = 1 + STEP_BYTES * types::Lineage::STEPS_MAX;

types! {
    1 Hello 60 + TEXT_MAX, 0;
    2 Welcome 28 + TEXT_MAX, 0;
    3 Refused 1 + TEXT_MAX, 0;
    8 Ping 0, 0;
    9 Bye TEXT_MAX, 0;
    10 DiskUp 20, 0;
    11 DiskDown 4, 0;
    32 Fence ADDRESS_BYTES + replication::RECORD_BYTES_MAX, 0;
    33 Write ADDRESS_BYTES + 16 + CRCS_MAX, PAYLOAD_BYTES_MAX;
    34 Clear ADDRESS_BYTES + 21, 0;
    35 Flush ADDRESS_BYTES, 0;
    36 Read ADDRESS_BYTES + 8 + LINEAGE_BYTES_MAX, 0;
    37 RepairData ADDRESS_BYTES + 24 + CRCS_MAX, PAYLOAD_BYTES_MAX;
    38 RepairClear ADDRESS_BYTES + 29, 0;
    39 SetEnd ADDRESS_BYTES + 8, 0;
    40 BeginResync ADDRESS_BYTES + 8, 0;
    41 ChangedLeaves ADDRESS_BYTES + 16, 0;
    42 LeafVersions ADDRESS_BYTES + 4 + LINEAGE_BYTES_MAX, 0;
    43 Drop ADDRESS_BYTES, 0;
    44 Void ADDRESS_BYTES + 20, 0;
    64 Promised ADDRESS_BYTES + 33, 0;
    65 Done ADDRESS_BYTES, 0;
    66 Content ADDRESS_BYTES + 2 + 2 * CRCS_MAX, PAYLOAD_BYTES_MAX;
    67 Leaves ADDRESS_BYTES + 8 * store::LISTED_MAX, 0;
    68 Versions ADDRESS_BYTES + 256 * 13, 0;
    69 Refusal ADDRESS_BYTES + 32 + 3 * TEXT_MAX, 0;
}

/// A header that is within bounds; nothing in it is believed before the head's checksum is right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub kind: Type,
    pub head: usize,
    pub pad: usize,
    pub payload: usize,
    crc: u32,
}

impl Header {
    /// Reads the front of `bytes`, which must be of `version`; `None` when there is not enough of it yet to tell.
    pub(crate) fn parse(bytes: &[u8], version: u8) -> Result<Option<Header>, WireError> {
        let known = bytes.len().min(MAGIC.len());
        if bytes[..known] != MAGIC[..known] {
            let mut got = [0; 4];
            got[..known].copy_from_slice(&bytes[..known]);
            return Err(WireError::Magic { got });
        }
        let Some(bytes) = bytes.first_chunk::<HEADER_BYTES>() else {
            return Ok(None);
        };
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        if bytes[4] != version {
            return Err(WireError::Version {
                got: bytes[4],
                expected: version,
            });
        }
        let is_greeting = |kind: &Type| (*kind as u8) < Type::Ping as u8;
        let kind = Type::of(bytes[5])
            .filter(|kind| is_greeting(kind) == (version == NO_VERSION))
            .ok_or(WireError::Type(bytes[5]))?;
        let frame = kind.name();
        let bound = |what, got: u64, most: u64| {
            let error = WireError::Bound {
                frame,
                what,
                got,
                most,
            };
            if got > most { Err(error) } else { Ok(got as usize) }
        };
        bound("flags", u64::from(u16_at(6)), 0)?;
        let head = bound(
            "bytes of head",
            u64::from(u16_at(8)),
            kind.head_bytes_max() as u64,
        )?;
        let payload = bound(
            "bytes of data",
            u64::from(u32_at(12)),
            kind.payload_bytes_max() as u64,
        )?;
        let pad_max = if payload == 0 { 0 } else { PAYLOAD_ALIGN - 1 };
        let pad = bound("bytes of padding", u64::from(u16_at(10)), pad_max as u64)?;
        if !types::is_block_aligned(payload as u64) {
            return Err(WireError::Field {
                frame,
                what: "data is not whole blocks",
            });
        }
        Ok(Some(Header {
            kind,
            head,
            pad,
            payload,
            crc: u32_at(CRC_AT),
        }))
    }

    /// Bytes before the payload.
    pub(crate) fn front(&self) -> usize {
        HEADER_BYTES + self.head + self.pad
    }

    /// The head, once it is all there and unchanged.
    pub(crate) fn head<'a>(&self, front: &'a [u8]) -> Result<&'a [u8], WireError> {
        let head = &front[HEADER_BYTES..HEADER_BYTES + self.head];
        let got = crc32c::crc32c_append(crc32c::crc32c(&front[..CRC_AT]), head);
        if got != self.crc {
            return Err(WireError::HeadCrc {
                frame: self.kind.name(),
                got,
                said: self.crc,
            });
        }
        Ok(head)
    }
}

/// Appends a frame's header and the head that `write_head` appends; `position` is where in the stream it begins.
/// Returns the bytes appended, padding included.
pub(crate) fn put_front(
    out: &mut Vec<u8>,
    position: u64,
    version: u8,
    kind: Type,
    payload: usize,
    write_head: impl FnOnce(&mut Vec<u8>),
) -> usize {
    let start = out.len();
    out.put(&[0; HEADER_BYTES]);
    write_head(out);
    let head = out.len() - start - HEADER_BYTES;
    assert!(
        head <= kind.head_bytes_max() && payload <= kind.payload_bytes_max(),
        "{} frame with {head} B and {payload} B of data",
        kind.name()
    );
    let pad = if payload == 0 {
        0
    } else {
        let end = position + (HEADER_BYTES + head) as u64;
        (end.next_multiple_of(PAYLOAD_ALIGN as u64) - end) as usize
    };
    let header = &mut out[start..start + HEADER_BYTES];
    header[0..4].copy_from_slice(&MAGIC);
    header[4] = version;
    header[5] = kind as u8;
    header[8..10].copy_from_slice(&(head as u16).to_le_bytes());
    header[10..12].copy_from_slice(&(pad as u16).to_le_bytes());
    header[12..16].copy_from_slice(&(payload as u32).to_le_bytes());
    let (before_crc, rest) = out[start..].split_at(CRC_AT);
    let crc = crc32c::crc32c_append(crc32c::crc32c(before_crc), &rest[4..]);
    out[start + CRC_AT..start + HEADER_BYTES].copy_from_slice(&crc.to_le_bytes());
    out.resize(out.len() + pad, 0);
    out.len() - start
}

/// Puts the right checksum on a front that was made by hand or changed.
pub(crate) fn sign(front: &mut [u8]) {
    let head = usize::from(u16::from_le_bytes([front[8], front[9]]));
    let end = (HEADER_BYTES + head).min(front.len());
    let crc = crc32c::crc32c_append(crc32c::crc32c(&front[..CRC_AT]), &front[HEADER_BYTES..end]);
    front[CRC_AT..HEADER_BYTES].copy_from_slice(&crc.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_type_may_have_more_than_a_reader_makes_room_for() {
        for kind in Type::ALL {
            assert!(kind.head_bytes_max() <= HEAD_BYTES_MAX, "{kind:?}");
            assert!(kind.payload_bytes_max() <= PAYLOAD_BYTES_MAX);
            assert_eq!(Type::of(*kind as u8), Some(*kind));
        }
    }
}
