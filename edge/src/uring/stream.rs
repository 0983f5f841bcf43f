//! A connected socket in the ring: one vectored send and one vectored receive under way at a time.
//!
//! Addresses are only taken here; handing them to the kernel, and the argument for it, is in `ring`. What the kernel
//! is given of a transfer (message header, list of memory pieces) lives in a box that the stream keeps, so that a
//! transfer allocates nothing.

use std::os::fd::{AsRawFd, OwnedFd};

use io_uring::opcode;
use io_uring::squeue::Entry;
use io_uring::types::Fd;
use libc::{iovec, msghdr};
use types::Payload;

use super::pool::{Buf, BufMut};

/// The most memory pieces Linux takes in one vectored call (UIO_MAXIOV).
const IOVECS_MAX: usize = 1024;

/// Names a stream of one ring. Never names another after its removal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StreamSlot(pub(super) u64);

/// What is to be sent, in order: `small` up to where each buffer of `large` goes in, and the rest of `small`.
#[derive(Debug, Default)]
pub struct Gather {
    /// Bytes that are ours.
    pub small: Vec<u8>,
    /// How much of `small` comes before the buffer, never less than for the buffer before it; and the buffer.
    pub large: Vec<(usize, Buf)>,
}

/// Where what comes is to land: `rooms[0]` from `from[0]` to its end (which may be empty), then `rooms[1]` likewise.
#[derive(Debug)]
pub struct Landing {
    /// Memory.
    pub rooms: [BufMut; 2],
    /// From which byte of each.
    pub from: [usize; 2],
}

/// Why a stream brings and takes nothing any more.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{operation}: {reason} (errno {errno})")]
pub struct StreamError {
    /// `send` or `receive`.
    pub operation: &'static str,
    /// The raw error number.
    pub errno: i32,
    /// The same in words.
    pub reason: String,
}

impl StreamError {
    /// A send that moved nothing, without a reason.
    fn short() -> StreamError {
        StreamError {
            operation: "send",
            errno: libc::EPIPE,
            reason: "nothing was taken".to_owned(),
        }
    }
}

/// Which way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    Send,
    Receive,
}

/// A socket and what is under way on it.
pub(super) struct Stream {
    socket: OwnedFd,
    sending: Option<Sending>,
    receiving: Option<Landing>,
    send: Box<Call>,
    receive: Box<Call>,
    /// Its owner has let go: it is closed when nothing is under way.
    pub is_over: bool,
}

struct Sending {
    gather: Gather,
    done: usize,
    wanted: usize,
}

/// What a system call points at.
struct Call {
    header: msghdr,
    iovecs: Vec<iovec>,
}

impl Call {
    fn new() -> Box<Call> {
        let header = msghdr {
            msg_name: std::ptr::null_mut(),
            msg_namelen: 0,
            msg_iov: std::ptr::null_mut(),
            msg_iovlen: 0,
            msg_control: std::ptr::null_mut(),
            msg_controllen: 0,
            msg_flags: 0,
        };
        Box::new(Call {
            header,
            iovecs: Vec::new(),
        })
    }

    fn point(&mut self) {
        self.header.msg_iov = self.iovecs.as_mut_ptr();
        self.header.msg_iovlen = self.iovecs.len();
    }
}

/// What a result of the kernel means.
pub(super) enum Passed {
    /// Ask again, for the rest.
    Again,
    Sent(Gather, Result<(), StreamError>),
    Received(Landing, Result<usize, StreamError>),
}

impl Stream {
    /// Puts the socket into blocking mode: of a non-blocking one the kernel would say EAGAIN rather than wait.
    pub(super) fn new(socket: OwnedFd) -> rustix::io::Result<Stream> {
        rustix::io::ioctl_fionbio(&socket, false)?;
        Ok(Stream {
            socket,
            sending: None,
            receiving: None,
            send: Call::new(),
            receive: Call::new(),
            is_over: false,
        })
    }

    pub(super) fn is_idle(&self) -> bool {
        self.sending.is_none() && self.receiving.is_none()
    }

    pub(super) fn say(&self, words: &[u8]) {
        use rustix::net::SendFlags;
        if self.sending.is_none() {
            // Whether it arrives or not, the stream ends.
            let _ = rustix::net::send(&self.socket, words, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
        }
    }

    /// Makes what is under way end soon.
    pub(super) fn shut_down(&self) {
        // An error means that the connection is gone already.
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both);
    }

    pub(super) fn start_send(&mut self, gather: Gather) {
        assert!(self.sending.is_none(), "one send at a time");
        let large: usize = gather.large.iter().map(|(_, buffer)| buffer.length()).sum();
        let wanted = gather.small.len() + large;
        assert!(wanted > 0, "sending nothing");
        self.sending = Some(Sending {
            gather,
            done: 0,
            wanted,
        });
    }

    pub(super) fn start_receive(&mut self, landing: Landing) {
        assert!(self.receiving.is_none(), "one receive at a time");
        let room = |i: usize| landing.rooms[i].len() - landing.from[i];
        assert!(room(0) + room(1) > 0, "no room to receive into");
        self.receiving = Some(landing);
    }

    /// The submission for what is still to do that way.
    pub(super) fn entry(&mut self, way: Way) -> Entry {
        let fd = Fd(self.socket.as_raw_fd());
        match way {
            Way::Send => {
                let sending = self.sending.as_ref().expect("a send under way");
                gather_iovecs(&mut self.send.iovecs, &sending.gather, sending.done);
                self.send.point();
                // The kernel goes on after a short transfer by itself.
                opcode::SendMsg::new(fd, &raw const self.send.header)
                    .flags((libc::MSG_NOSIGNAL | libc::MSG_WAITALL).cast_unsigned())
                    .build()
            }
            Way::Receive => {
                let landing = self.receiving.as_mut().expect("a receive under way");
                self.receive.iovecs.clear();
                for (room, from) in landing.rooms.iter_mut().zip(landing.from) {
                    if room.len() > from {
                        self.receive.iovecs.push(piece_mut(&mut room[from..]));
                    }
                }
                self.receive.point();
                opcode::RecvMsg::new(fd, &raw mut self.receive.header).build()
            }
        }
    }

    /// Takes the kernel's result: bytes moved, or a negative error number.
    pub(super) fn advance(&mut self, way: Way, result: i32) -> Passed {
        let is_put_off = matches!(-result, libc::EAGAIN | libc::EINTR);
        if is_put_off && !self.is_over {
            return Passed::Again;
        }
        let moved = |operation| {
            usize::try_from(result).map_err(|_| StreamError {
                operation,
                errno: -result,
                reason: std::io::Error::from_raw_os_error(-result).to_string(),
            })
        };
        match way {
            Way::Receive => {
                let landing = self.receiving.take().expect("a receive under way");
                Passed::Received(landing, moved("receive"))
            }
            Way::Send => {
                let sending = self.sending.as_mut().expect("a send under way");
                let moved = moved("send");
                if let Ok(count) = moved {
                    sending.done += count;
                    assert!(sending.done <= sending.wanted, "more was sent than there was");
                    if sending.done < sending.wanted && count > 0 && !self.is_over {
                        return Passed::Again;
                    }
                }
                let sending = self.sending.take().expect("just seen");
                let is_all = sending.done == sending.wanted;
                let all = moved.and_then(|_| if is_all { Ok(()) } else { Err(StreamError::short()) });
                Passed::Sent(sending.gather, all)
            }
        }
    }

    /// Forgets a transfer that the kernel was never given.
    pub(super) fn forget(&mut self, way: Way) {
        match way {
            Way::Send => self.sending = None,
            Way::Receive => self.receiving = None,
        }
    }
}

fn piece(bytes: &[u8]) -> iovec {
    iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    }
}

fn piece_mut(bytes: &mut [u8]) -> iovec {
    iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    }
}

/// The memory of a send from `done` on, as far as one call takes.
fn gather_iovecs(iovecs: &mut Vec<iovec>, gather: &Gather, done: usize) {
    iovecs.clear();
    let mut skip = done;
    let mut push = |bytes: &[u8]| {
        let rest = &bytes[skip.min(bytes.len())..];
        skip -= bytes.len() - rest.len();
        if !rest.is_empty() && iovecs.len() < IOVECS_MAX {
            iovecs.push(piece(rest));
        }
    };
    let mut from = 0;
    for (upto, buffer) in &gather.large {
        push(&gather.small[from..*upto]);
        push(buffer.bytes());
        from = *upto;
    }
    push(&gather.small[from..]);
}

#[cfg(test)]
mod tests;
