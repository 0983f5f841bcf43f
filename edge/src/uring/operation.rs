//! One disk operation under way: what the kernel may touch, how far it got, and what comes next.
//!
//! A transfer may end early without an error; the rest is asked for again until all of it is there, or until
//! the device makes no progress, which is [`DiskError::Short`].
//!
//! Addresses are only taken here; handing them to the kernel, and the argument for it, is in `ring`.

use io_uring::opcode;
use io_uring::squeue::{Entry, Flags};
use io_uring::types::{Fd, FsyncFlags};
use libc::iovec;
use types::{BLOCK_BYTES, Payload};

use super::pool::{Buf, BufMut, Pool};
use crate::{AlignedBlock, Completion, DiskError, DiskOp, DiskOutcome, IoId};

/// The most memory pieces Linux takes in one vectored call (UIO_MAXIOV).
const IOVECS_MAX: usize = 1024;

/// How often a transfer that the kernel puts off (EAGAIN, EINTR) is asked again before that is its result.
const PUT_OFF_MAX: u32 = 4096;

/// Where an operation goes: an entry of the ring's file table, or a descriptor.
#[derive(Clone, Copy)]
pub(super) enum Place {
    Registered(u32),
    Plain(i32),
}

/// A disk operation and everything the kernel reads or fills for it.
pub(super) struct Operation {
    id: IoId,
    kind: Kind,
    offset: u64,
    done: u64,
    wanted: u64,
    put_off: u32,
}

enum Kind {
    Write {
        header: Box<AlignedBlock>,
        data: Vec<Buf>,
        iovecs: Vec<iovec>,
    },
    /// The buffer is taken when the operation first goes to the kernel: waiting ones hold no memory.
    Read(Option<BufMut>),
    Sync,
}

/// What a result of the kernel means for an operation.
pub(super) enum Progress {
    /// Ask again, for the rest.
    Again,
    /// Done, well or not.
    Finished(Result<(), DiskError>),
}

impl Operation {
    /// Panics where the store's own promises about alignment do not hold. `spares` are lists of earlier writes.
    pub(super) fn new(id: IoId, operation: DiskOp<Buf>, spares: &mut Vec<Vec<iovec>>) -> Operation {
        let (kind, offset, wanted) = match operation {
            DiskOp::Write { offset, header, data } => {
                let bytes: usize = data.iter().map(Payload::length).sum();
                let iovecs = spares.pop().unwrap_or_default();
                let kind = Kind::Write { header, data, iovecs };
                (kind, offset, BLOCK_BYTES + bytes as u64)
            }
            DiskOp::Read { offset, bytes } => {
                assert!(bytes > 0, "{id:?} reads nothing");
                (Kind::Read(None), offset, u64::from(bytes))
            }
            DiskOp::Sync => (Kind::Sync, 0, 0),
        };
        let is_aligned = types::is_block_aligned(offset) && types::is_block_aligned(wanted);
        assert!(is_aligned, "{id:?}: {wanted} B at {offset} are not whole blocks");
        Operation {
            id,
            kind,
            offset,
            done: 0,
            wanted,
            put_off: 0,
        }
    }

    /// The submission for what is still to do. `fixed` finds the registered buffer that an address lies in.
    pub(super) fn entry(
        &mut self,
        place: Place,
        pool: &Pool,
        fixed: impl Fn(*const u8) -> Option<u16>,
    ) -> Entry {
        let (file, flags) = match place {
            Place::Registered(index) => (Fd(index as i32), Flags::FIXED_FILE),
            Place::Plain(fd) => (Fd(fd), Flags::empty()),
        };
        let at = self.offset + self.done;
        let entry = match &mut self.kind {
            Kind::Write { header, data, iovecs } => {
                fill_iovecs(iovecs, header, data, self.done);
                opcode::Writev::new(file, iovecs.as_ptr(), iovecs.len() as u32)
                    .offset(at)
                    .build()
            }
            Kind::Read(buffer) => {
                let whole = buffer.get_or_insert_with(|| pool.take(self.wanted as usize));
                let rest = &mut whole[self.done as usize..];
                let (start, length) = (rest.as_mut_ptr(), rest.len() as u32);
                match fixed(start) {
                    Some(index) => opcode::ReadFixed::new(file, start, length, index)
                        .offset(at)
                        .build(),
                    None => opcode::Read::new(file, start, length).offset(at).build(),
                }
            }
            Kind::Sync => opcode::Fsync::new(file).flags(FsyncFlags::DATASYNC).build(),
        };
        entry.flags(flags)
    }

    /// Takes the kernel's result: bytes moved, or a negative error number.
    pub(super) fn advance(&mut self, result: i32) -> Progress {
        if result < 0 {
            return self.failed(-result);
        }
        if matches!(self.kind, Kind::Sync) {
            return Progress::Finished(Ok(()));
        }
        self.done += result as u64;
        assert!(
            self.done <= self.wanted,
            "{:?}: {} of {} B",
            self.id,
            self.done,
            self.wanted
        );
        if self.done == self.wanted {
            return Progress::Finished(Ok(()));
        }
        if result == 0 {
            return Progress::Finished(Err(DiskError::Short {
                operation: self.name(),
                offset: self.offset,
                done: self.done,
                wanted: self.wanted,
            }));
        }
        Progress::Again
    }

    fn failed(&mut self, errno: i32) -> Progress {
        // Never a sync: the kernel reports a lost page once, and a second call may say that all is well.
        let is_put_off = matches!(errno, libc::EAGAIN | libc::EINTR) && !matches!(self.kind, Kind::Sync);
        if is_put_off && self.put_off < PUT_OFF_MAX {
            self.put_off += 1;
            return Progress::Again;
        }
        Progress::Finished(Err(DiskError::Io {
            operation: self.name(),
            offset: self.offset,
            bytes: self.wanted,
            errno,
            reason: std::io::Error::from_raw_os_error(errno).to_string(),
        }))
    }

    /// The completion, with the buffers. What is of use for later writes goes to `spares`.
    pub(super) fn finish(
        self,
        result: Result<(), DiskError>,
        spares: &mut Vec<Vec<iovec>>,
    ) -> Completion<Buf> {
        let outcome = |()| match self.kind {
            Kind::Write { header, data, iovecs } => {
                spares.push(iovecs);
                DiskOutcome::Written { header, data }
            }
            Kind::Read(buffer) => {
                DiskOutcome::Read(buffer.expect("a read that finished had a buffer").freeze())
            }
            Kind::Sync => DiskOutcome::Synced,
        };
        Completion {
            id: self.id,
            result: result.map(outcome),
        }
    }

    fn name(&self) -> &'static str {
        match self.kind {
            Kind::Write { .. } => "write",
            Kind::Read(_) => "read",
            Kind::Sync => "sync",
        }
    }
}

/// The memory of a write from `done` on, as far as one call takes.
fn fill_iovecs(iovecs: &mut Vec<iovec>, header: &AlignedBlock, data: &[Buf], done: u64) {
    iovecs.clear();
    let mut skip = done as usize;
    for part in std::iter::once(&header.0[..]).chain(data.iter().map(Payload::bytes)) {
        if iovecs.len() == IOVECS_MAX {
            return;
        }
        let rest = &part[skip.min(part.len())..];
        skip -= part.len() - rest.len();
        if !rest.is_empty() {
            iovecs.push(iovec {
                iov_base: rest.as_ptr().cast_mut().cast(),
                iov_len: rest.len(),
            });
        }
    }
}

#[cfg(test)]
mod tests;
