//! What another host may send, as arbitrary bytes: an entrance for `cargo xtask fuzz` and for the tests that replay its
//! corpus. Whatever comes: no panic, no more memory than a frame may have, the same frames however the stream is cut,
//! and what is accepted is written again as it was read.
//!
//! Checksums would keep nearly all inputs out, and an attacker computes them as well as we do: every input is tried as
//! it is, and once more with the head of each frame signed.

use types::HeapRoom;

use crate::frame::{HEADER_BYTES, NO_VERSION, PAYLOAD_BYTES_MAX, VERSION, sign};
use crate::{Frame, HEAD_BYTES_MAX, Hello, Identity, Incoming, LARGE_SPACE, Outgoing, WireError};

/// A stream after a control byte: whether it is a greeting, and how it is cut.
pub fn stream(input: &[u8]) {
    let Some((control, stream)) = input.split_first() else {
        return;
    };
    let version = if control & 1 == 0 { VERSION } else { NO_VERSION };
    let piece = 1 + usize::from(control >> 1);
    check(stream, version, piece);
    check(&signed(stream), version, piece);
}

/// Signs every head of a stream, as far as lengths lead from one to the next.
fn signed(stream: &[u8]) -> Vec<u8> {
    let mut bytes = stream.to_vec();
    let mut at = 0;
    while let Some(front) = bytes.get_mut(at..)
        && front.len() >= HEADER_BYTES
    {
        sign(front);
        let u16_at = |i: usize| usize::from(u16::from_le_bytes([front[i], front[i + 1]]));
        let payload = u32::from_le_bytes([front[12], front[13], front[14], front[15]]) as usize;
        at += HEADER_BYTES + u16_at(8) + u16_at(10) + payload.min(PAYLOAD_BYTES_MAX);
    }
    bytes
}

fn check(stream: &[u8], version: u8, piece: usize) {
    // What is wrong may show earlier or later, and with more or less of it to be shown; never after another frame.
    let (whole, _) = frames(stream, version, stream.len().max(1));
    let (cut, _) = frames(stream, version, piece);
    assert_eq!(whole, cut, "cut into pieces of {piece}");
}

/// What each frame is, and what was wrong at last.
fn frames(stream: &[u8], version: u8, piece: usize) -> (Vec<String>, Option<WireError>) {
    let take = |bytes: usize| {
        assert!(bytes <= PAYLOAD_BYTES_MAX.max(LARGE_SPACE), "{bytes} B at once");
        HeapRoom::new(bytes)
    };
    let mut incoming = Incoming::after(0, version, take);
    let mut seen = Vec::new();
    let mut rest = stream;
    while !rest.is_empty() {
        let landed = incoming.put(&rest[..piece.min(rest.len())], take);
        assert!(landed > 0, "no room for what comes next");
        rest = &rest[landed..];
        loop {
            match incoming.next(take) {
                Ok(Some(frame)) => {
                    seen.push(format!("{frame:?}"));
                    again(frame, version);
                }
                Ok(None) => break,
                Err(error) => {
                    let text = error.to_string();
                    assert!(!text.is_empty() && text.len() < 200 && !text.contains('\n'));
                    return (seen, Some(error));
                }
            }
        }
    }
    (seen, None)
}

/// What was read means the same when it is written and read again.
fn again(frame: Frame<types::HeapBlock>, version: u8) {
    let said = format!("{frame:?}");
    let mut out = Outgoing::new(0);
    let bytes = match frame {
        Frame::Hello(hello) => {
            let me = Identity {
                pool: hello.from.pool,
                host: hello.to,
                incarnation: hello.from.incarnation,
                name: "me".to_owned(),
            };
            if let Err(refused) = hello.check(&me) {
                assert!(!refused.text.is_empty() && refused.encode().len() <= HEAD_BYTES_MAX);
            }
            Hello::encode(&hello)
        }
        Frame::Welcome(welcome) => welcome.encode(),
        Frame::Refused(refused) => refused.encode(),
        other => {
            match other {
                Frame::Ping => out.ping(),
                Frame::Bye(text) => out.bye(&text),
                Frame::DiskUp(channel, disk) => out.disk_up(channel, disk),
                Frame::DiskDown(channel) => out.disk_down(channel),
                Frame::Request(channel, message) => out.request(channel, message),
                Frame::Reply(reply) => {
                    let channel = reply.channel;
                    out.reply(channel, reply.from_disk(types::DiskId(0)));
                }
                Frame::Hello(_) | Frame::Welcome(_) | Frame::Refused(_) => unreachable!("handled above"),
            }
            out.take(crate::Gather::default()).to_bytes()
        }
    };
    let mut incoming = Incoming::after(0, version, HeapRoom::new);
    let mut rest = &bytes[..];
    loop {
        if let Some(frame) = incoming.next(HeapRoom::new).expect("our own bytes") {
            assert_eq!(format!("{frame:?}"), said);
            return;
        }
        assert!(!rest.is_empty(), "{said} is not whole when written again");
        let landed = incoming.put(rest, HeapRoom::new);
        rest = &rest[landed..];
    }
}
