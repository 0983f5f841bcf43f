//! What a client may send, as arbitrary bytes: entrances for `cargo xtask fuzz` and for the tests that replay its
//! corpus. No socket: the same pure functions that [`crate::connection`] feeds, in the same order.

use crate::export::ExportInfo;
use crate::handshake::{Catalog, Negotiation, Next, OPTION_BYTES_MAX, OPTION_HEADER_BYTES, OptionHeader};
use crate::proto::{Cursor, OPTION_REPLY_MAGIC, PAYLOAD_BYTES_MAX};
use crate::reply::Encoder;
use crate::request::{HEADER_BYTES, Header, Request, Session};

/// What all replies to one option may take: a catalogue of two names.
const REPLY_BYTES_MAX: usize = 1024;

/// A small export with small sectors, and a large read-only one with large sectors.
struct Two;

impl Catalog for Two {
    type Handle = ();

    fn names(&self) -> Vec<String> {
        vec!["disk".to_owned(), "large".to_owned()]
    }

    fn find(&self, name: &str) -> Option<((), ExportInfo)> {
        let (bytes, sector_bytes) = match name {
            "disk" => (1 << 20, 512),
            "large" => (64 << 40, 4096),
            _ => return None,
        };
        let info = ExportInfo {
            bytes,
            sector_bytes,
            is_read_only: sector_bytes == 4096,
            description: "a disk".to_owned(),
        };
        Some(((), info))
    }
}

/// The replies in `out` are whole, are answers to `option`, and end with one that is not a part.
fn check_replies(option: u32, out: &[u8]) {
    assert!(
        out.len() <= REPLY_BYTES_MAX,
        "{} bytes answer option {option}",
        out.len()
    );
    let mut cursor = Cursor(out);
    let mut last = 0;
    while !cursor.0.is_empty() {
        assert_eq!(cursor.u64(), Some(OPTION_REPLY_MAGIC));
        assert_eq!(cursor.u32(), Some(option));
        last = cursor.u32().expect("a type");
        let length = cursor.u32().expect("a length");
        assert!(cursor.bytes(length as usize).is_some(), "a reply is cut short");
    }
    let is_final = last == 1 || last & 1 << 31 != 0;
    assert!(is_final, "option {option} is left waiting after {last:#x}");
}

/// All that a client says before it has an export, and what follows as its requests.
pub fn handshake(input: &[u8]) {
    let mut cursor = Cursor(input);
    let Some(Ok(mut negotiation)) = cursor.u32().map(Negotiation::new) else {
        return;
    };
    while let Some(header) = cursor.bytes(OPTION_HEADER_BYTES) {
        let header = header.try_into().expect("as many as asked for");
        let Ok(OptionHeader { option, length }) = OptionHeader::parse(header) else {
            return;
        };
        let Some(data) = cursor.bytes(length as usize) else {
            return;
        };
        let mut out = Vec::new();
        let next = if length > OPTION_BYTES_MAX {
            negotiation.too_big(option, &mut out).map(|()| Next::Continue)
        } else {
            negotiation.option(&Two, option, data, &mut out)
        };
        match next {
            Err(_) => return assert!(out.is_empty(), "a violation is answered"),
            Ok(Next::Continue) => check_replies(option, &out),
            Ok(Next::Close) => return check_replies(option, &out),
            Ok(Next::Transmit((), session)) => {
                assert!(session.is_structured || !session.has_allocation);
                return requests(&session, cursor.0);
            }
        }
    }
}

/// Requests to one of eight sessions, which the first byte chooses.
pub fn request(input: &[u8]) {
    let Some((control, stream)) = input.split_first() else {
        return;
    };
    let sector_bytes = if control & 1 != 0 { 4096 } else { 512 };
    let session = Session {
        info: ExportInfo {
            bytes: u64::from(sector_bytes) << (control >> 4),
            sector_bytes,
            is_read_only: control & 2 != 0,
            description: String::new(),
        },
        is_structured: control & 4 != 0,
        has_allocation: control & 4 != 0 && control & 8 != 0,
    };
    requests(&session, stream);
}

fn requests(session: &Session, stream: &[u8]) {
    let mut cursor = Cursor(stream);
    while let Some(bytes) = cursor.bytes(HEADER_BYTES) {
        let Ok(header) = Header::parse(bytes.try_into().expect("as many as asked for")) else {
            return;
        };
        let encoder = Encoder {
            cookie: header.cookie,
            is_structured: session.is_structured,
        };
        match header.check(session) {
            Ok(Request::Disconnect) => return,
            Ok(request) => check_request(session, &header, request),
            Err(refusal) => {
                assert_ne!(refusal.errno, 0);
                let reply = encoder.refused::<Vec<u8>>(refusal);
                assert_eq!(reply.len(), 1, "a refusal has no content");
            }
        }
        // A payload that the client owes is skipped or received, never taken for requests.
        if cursor.bytes(header.payload_bytes() as usize).is_none() {
            return;
        }
    }
}

/// What an export may rely on.
fn check_request(session: &Session, header: &Header, request: Request) {
    let info = &session.info;
    assert!(request.memory_bytes() <= PAYLOAD_BYTES_MAX);
    let (offset, length, is_change) = match request {
        Request::Read {
            offset,
            length,
            is_whole,
        } => {
            assert!(length <= PAYLOAD_BYTES_MAX && (session.is_structured || !is_whole));
            (offset, length, false)
        }
        Request::Write { offset, length, .. } => {
            assert!(length <= PAYLOAD_BYTES_MAX && length == header.payload_bytes());
            (offset, length, true)
        }
        Request::Trim { offset, length, .. } | Request::WriteZeroes { offset, length, .. } => {
            (offset, length, true)
        }
        Request::BlockStatus { offset, length, .. } => {
            assert!(session.has_allocation);
            (offset, length, false)
        }
        Request::Flush | Request::Disconnect => return,
    };
    let sector = u64::from(info.sector_bytes);
    assert!(length > 0 && !(is_change && info.is_read_only));
    assert!(offset.is_multiple_of(sector) && u64::from(length).is_multiple_of(sector));
    let end = offset.checked_add(length.into());
    assert!(end.is_some_and(|end| end <= info.bytes), "{request:?}");
}
