//! An NBD client over a unix socket, with several requests in flight. It neither blocks in a write while the server
//! waits for it to read, nor hides that the connection broke.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::event::{PollFd, PollFlags, Timespec};

use crate::PATIENCE;
use crate::client::{Answer, Client, Gone, Op};

const OPTION_MAGIC: &[u8; 8] = b"IHAVEOPT";
const EXPORT_NAME: u32 = 1;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;
const REPLY_BYTES: usize = 16;

/// Commands of the protocol (NBD doc/proto.md, "Request types").
const READ: u16 = 0;
const WRITE: u16 = 1;
const FLUSH: u16 = 3;
const TRIM: u16 = 4;
const WRITE_ZEROES: u16 = 6;

/// "The server is in the process of being shut down": a client disconnects (NBD doc/proto.md, "Error values").
const ESHUTDOWN: u64 = 108;

/// Requests at once.
const DEPTH: usize = 16;

pub struct NbdClient {
    stream: UnixStream,
    /// Negotiated: the protocol has no news of a resize.
    bytes: u64,
    out: Vec<u8>,
    sent: usize,
    received: Vec<u8>,
    /// By id: the bytes a read brings.
    under_way: BTreeMap<u64, u64>,
    /// The server has said [`ESHUTDOWN`].
    is_shut: bool,
}

impl NbdClient {
    /// Connects and chooses the default export.
    pub fn connect(path: &Path) -> Result<NbdClient> {
        let mut stream = UnixStream::connect(path).with_context(|| path.display().to_string())?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting)?;
        ensure!(&greeting[..8] == b"NBDMAGIC", "not an NBD server");
        let mut hello = Vec::new();
        hello.extend(3u32.to_be_bytes());
        hello.extend(OPTION_MAGIC);
        hello.extend(EXPORT_NAME.to_be_bytes());
        hello.extend(0u32.to_be_bytes());
        stream.write_all(&hello)?;
        let mut export = [0; 10];
        stream.read_exact(&mut export)?;
        let (bytes, _flags) = export.split_first_chunk().expect("ten bytes");
        stream.set_nonblocking(true)?;
        Ok(NbdClient {
            stream,
            bytes: u64::from_be_bytes(*bytes),
            out: Vec::new(),
            sent: 0,
            received: Vec::new(),
            under_way: BTreeMap::new(),
            is_shut: false,
        })
    }

    fn write_out(&mut self) -> io::Result<()> {
        while self.sent < self.out.len() {
            match self.stream.write(&self.out[self.sent..]) {
                Ok(count) => self.sent += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        self.out.clear();
        self.sent = 0;
        Ok(())
    }

    fn read_in(&mut self) -> io::Result<()> {
        let mut buffer = vec![0; 1 << 18];
        loop {
            match self.stream.read(&mut buffer) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => self.received.extend_from_slice(&buffer[..count]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }

    /// The replies that are here whole.
    fn parse(&mut self) -> Vec<Answer> {
        let mut answers = Vec::new();
        let mut at = 0;
        while let Some(reply) = self.received[at..].first_chunk::<REPLY_BYTES>() {
            let number = |range: std::ops::Range<usize>| {
                reply[range]
                    .iter()
                    .fold(0u64, |number, byte| number << 8 | u64::from(*byte))
            };
            assert_eq!(number(0..4), u64::from(REPLY_MAGIC), "the reply's magic");
            let (error, id) = (number(4..8), number(8..16));
            let length = self.under_way[&id] as usize;
            let length = if error == 0 { length } else { 0 };
            if self.received.len() < at + REPLY_BYTES + length {
                break;
            }
            let data = &self.received[at + REPLY_BYTES..][..length];
            if error == ESHUTDOWN {
                // What became of the request is not said, and no other is taken.
                self.is_shut = true;
                break;
            }
            let result = match error {
                0 => Ok(data.to_vec()),
                error => Err(format!("NBD error {error}")),
            };
            self.under_way.remove(&id);
            answers.push(Answer { id, result });
            at += REPLY_BYTES + length;
        }
        self.received.drain(..at);
        answers
    }

    fn reap_or_fail(&mut self, patience: Duration) -> io::Result<Vec<Answer>> {
        self.write_out()?;
        let mut flags = PollFlags::IN;
        if !self.out.is_empty() {
            flags |= PollFlags::OUT;
        }
        let limit = Timespec {
            tv_sec: patience.as_secs() as i64,
            tv_nsec: patience.subsec_nanos().into(),
        };
        rustix::event::poll(
            &mut [PollFd::from_borrowed_fd(self.stream.as_fd(), flags)],
            Some(&limit),
        )?;
        self.read_in()?;
        Ok(self.parse())
    }
}

impl Client for NbdClient {
    fn queues(&self) -> usize {
        1
    }

    fn depth(&self) -> usize {
        DEPTH
    }

    fn fixed_bytes(&self) -> Option<u64> {
        Some(self.bytes)
    }

    fn submit(&mut self, _queue: usize, id: u64, op: &Op) -> Result<(), Gone> {
        let (command, offset, length, data): (u16, u64, u64, &[u8]) = match op {
            Op::Read { offset, length } => (READ, *offset, *length, &[]),
            Op::Write { offset, data } => (WRITE, *offset, data.len() as u64, data),
            Op::Flush => (FLUSH, 0, 0, &[]),
            Op::Discard { offset, length } => (TRIM, *offset, *length, &[]),
            Op::WriteZeroes { offset, length } => (WRITE_ZEROES, *offset, *length, &[]),
        };
        self.out.extend(REQUEST_MAGIC.to_be_bytes());
        self.out.extend(0u16.to_be_bytes());
        self.out.extend(command.to_be_bytes());
        self.out.extend(id.to_be_bytes());
        self.out.extend(offset.to_be_bytes());
        self.out.extend((length as u32).to_be_bytes());
        self.out.extend(data);
        self.under_way
            .insert(id, if command == READ { length } else { 0 });
        Ok(())
    }

    fn reap(&mut self, patience: Duration) -> Result<Vec<Answer>, Gone> {
        let answers = self.reap_or_fail(patience).map_err(|_| Gone)?;
        if self.is_shut && answers.is_empty() {
            return Err(Gone);
        }
        Ok(answers)
    }
}
