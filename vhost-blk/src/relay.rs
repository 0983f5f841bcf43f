//! Between a frontend's socket and the protocol crate: messages go through, one is listened in on.
//!
//! ```text
//!  frontend ── client ──▶ relay ── inner ──▶ vhost-user-backend
//!                           └ SET_BACKEND_REQ_FD: a copy of the socket for our own news
//! ```
//!
//! vhost 0.18 takes the frontend's channel for messages of ours, and can send shared-object messages on it but no
//! CONFIG_CHANGE, nor give the socket back. So the relay keeps a copy as it comes by. It costs a copy of a few hundred
//! bytes per protocol message, nothing per request; and in return the connection can be ended at any moment, oversized
//! messages never reach the crate, and a frontend that does not read its answers holds up nobody.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};

const HEADER_BYTES: usize = 12;

/// As in the protocol crate: no message is longer.
const BODY_BYTES_MAX: usize = 4096;

/// The most that one message carries (8 by the protocol, 32 in the crate).
const FDS_MAX: usize = 32;

const SET_BACKEND_REQ_FD: u32 = 21;

/// Why a relay ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// The frontend hung up.
    Client,
    /// The protocol crate did: it did not like what it got.
    Inner,
    /// The frontend broke the framing, or does not read.
    Violation(&'static str),
    /// The server is being stopped.
    Stop,
}

/// A message on its way in.
#[derive(Default)]
struct Message {
    bytes: Vec<u8>,
    fds: Vec<OwnedFd>,
}

impl Message {
    /// How many bytes to read next; 0 when complete.
    fn missing(&self) -> Result<usize, End> {
        if self.bytes.len() < HEADER_BYTES {
            return Ok(HEADER_BYTES - self.bytes.len());
        }
        let body = self.word(8) as usize;
        if body > BODY_BYTES_MAX {
            return Err(End::Violation("an oversized message"));
        }
        Ok(HEADER_BYTES + body - self.bytes.len())
    }

    fn word(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.bytes[at..at + 4].try_into().expect("four bytes"))
    }

    /// The socket in a message that brings us the channel for our news.
    fn channel(&self) -> Option<OwnedFd> {
        match self.fds.as_slice() {
            [socket] if self.word(0) == SET_BACKEND_REQ_FD => socket.try_clone().ok(),
            _ => None,
        }
    }
}

/// Passes messages until one side ends or `stop` becomes readable. Blocks.
pub(crate) fn run(
    client: &UnixStream,
    inner: &UnixStream,
    stop: impl AsFd,
    mut on_channel: impl FnMut(OwnedFd),
) -> End {
    let mut message = Message::default();
    loop {
        let is_complete = match message.missing() {
            Ok(missing) => missing == 0,
            Err(end) => return end,
        };
        // A complete message waits for room; nothing more is read meanwhile.
        let mut ready = [
            PollFd::new(
                client,
                if is_complete {
                    PollFlags::empty()
                } else {
                    PollFlags::IN
                },
            ),
            PollFd::new(
                inner,
                if is_complete {
                    PollFlags::IN | PollFlags::OUT
                } else {
                    PollFlags::IN
                },
            ),
            PollFd::new(&stop, PollFlags::IN),
        ];
        match rustix::event::poll(&mut ready, None) {
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(_) => return End::Violation("its socket cannot be waited for"),
        }
        let [from_client, from_inner, from_stop] = ready.map(|fd| fd.revents());
        if !from_stop.is_empty() {
            return End::Stop;
        }
        if from_inner.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR) {
            match pass_back(inner, client) {
                Ok(true) => {}
                Ok(false) => return End::Inner,
                Err(end) => return end,
            }
        }
        if is_complete && from_inner.contains(PollFlags::OUT) {
            if let Some(channel) = message.channel() {
                on_channel(channel);
            }
            match send(inner, &message) {
                Ok(true) => message = Message::default(),
                Ok(false) => {}
                Err(_) => return End::Inner,
            }
        }
        if !is_complete && !from_client.is_empty() {
            match receive(client, &mut message) {
                Ok(true) => {}
                Ok(false) => return End::Client,
                Err(end) => return end,
            }
        }
        if is_complete && from_client.intersects(PollFlags::HUP | PollFlags::ERR) {
            return End::Client;
        }
    }
}

/// Reads a piece of `message`; `false` at the end of the stream.
fn receive(client: &UnixStream, message: &mut Message) -> Result<bool, End> {
    let mut buffer = [0; BODY_BYTES_MAX];
    let missing = message.missing()?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::net::recvmsg(
        client,
        &mut [IoSliceMut::new(&mut buffer[..missing])],
        &mut control,
        RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT,
    );
    let bytes = match received {
        Ok(received) => received.bytes,
        Err(Errno::AGAIN | Errno::INTR) => return Ok(true),
        Err(_) => return Ok(false),
    };
    for item in control.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = item {
            message.fds.extend(fds);
        }
    }
    if message.fds.len() > FDS_MAX {
        return Err(End::Violation("too many file descriptors"));
    }
    message.bytes.extend_from_slice(&buffer[..bytes]);
    Ok(bytes > 0)
}

/// Sends all of a message, or nothing (`false`) where there is no room.
fn send(inner: &UnixStream, message: &Message) -> io::Result<bool> {
    let borrowed: Vec<_> = message.fds.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !borrowed.is_empty() {
        assert!(
            control.push(SendAncillaryMessage::ScmRights(&borrowed)),
            "room for {FDS_MAX}"
        );
    }
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    match rustix::net::sendmsg(inner, &[IoSlice::new(&message.bytes)], &mut control, flags) {
        Ok(sent) if sent == message.bytes.len() => Ok(true),
        // A stream socket takes less than a page in one piece or not at all.
        Ok(sent) => Err(io::Error::other(format!(
            "{sent} of {} bytes",
            message.bytes.len()
        ))),
        Err(Errno::AGAIN | Errno::INTR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Passes what the protocol crate answers; it never sends descriptors. `false` at the end of the stream.
fn pass_back(inner: &UnixStream, client: &UnixStream) -> Result<bool, End> {
    let mut buffer = [0; BODY_BYTES_MAX];
    let bytes = match rustix::net::recv(inner, &mut buffer, RecvFlags::DONTWAIT) {
        Ok((bytes, _)) => bytes,
        Err(Errno::AGAIN | Errno::INTR) => return Ok(true),
        Err(_) => return Ok(false),
    };
    if bytes == 0 {
        return Ok(false);
    }
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    match rustix::net::send(client, &buffer[..bytes], flags) {
        Ok(sent) if sent == bytes => Ok(true),
        Ok(_) | Err(Errno::AGAIN) => Err(End::Violation("answers pile up unread")),
        Err(_) => Err(End::Client),
    }
}
