//! A disk in blocking form: formatting, recovery at start, offline tools; and what to know of one before it is
//! given to the pool ([`probe`]).

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FallocateFlags, FlockOperation, fallocate, flock};
use rustix::io::Errno;
use types::{BLOCK_BYTES, is_block_aligned};

use crate::{BlockFile, DiskError};

mod in_use;
mod probe;
mod signature;

pub use probe::{ProbeReport, probe};
pub use signature::{HEAD_BYTES, TAIL_BYTES, find_signatures};

/// How long [`OsFile::open`] waits for whoever has the disk locked.
pub const LOCK_WAIT: Duration = Duration::from_secs(10);

/// How often it looks: `flock` knows no time limit.
const LOCK_RETRY: Duration = Duration::from_millis(10);

/// Bytes moved at a time where the caller's memory does not suit direct I/O.
const BOUNCE_BYTES: usize = 1 << 20;

/// Alignment in memory that every device accepts.
const MEMORY_ALIGN: usize = BLOCK_BYTES as usize;

/// What an open disk may be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Looking; shares the disk with other readers.
    ReadOnly,
    /// Everything; nobody else has the disk.
    ReadWrite,
}

/// Why a disk could not be opened or made.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The operating system's word.
    #[error("{operation} {}: {source}", path.display())]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// How it ended.
        #[source]
        source: io::Error,
    },
    /// Another process has it, or a process that ended still has I/O under way on it.
    #[error("{} is locked by another process, for {waited:?} now", path.display())]
    Locked {
        /// The disk.
        path: PathBuf,
        /// How long we waited.
        waited: Duration,
    },
    /// A block device that is mounted, or part of something that is.
    #[error("{} is in use: mounted, swap, or part of another device", path.display())]
    Busy {
        /// The disk.
        path: PathBuf,
    },
    /// A directory, a pipe or the like.
    #[error("{} is neither a block device nor a regular file", path.display())]
    NotADisk {
        /// What was named.
        path: PathBuf,
    },
}

/// An open, locked disk: a block device, a loop device or a preallocated file, past the page cache (O_DIRECT).
#[derive(Debug)]
pub struct OsFile {
    file: File,
    bytes: u64,
    /// The first failed sync: everything after it fails the same way until the disk is opened anew.
    failed: Option<DiskError>,
}

impl OsFile {
    /// Opens and locks `path`, waiting up to [`LOCK_WAIT`] for the lock.
    ///
    /// # Errors
    /// It cannot be opened, is in use, or is not a disk.
    pub fn open(path: &Path, access: Access) -> Result<OsFile, OpenError> {
        OsFile::open_waiting(path, access, LOCK_WAIT)
    }

    /// Opens and locks `path`, waiting up to `wait` for the lock.
    ///
    /// The lock is a fence, not a courtesy. It belongs to the file description, which the io_uring of a killed
    /// daemon keeps until its last I/O has ended: who holds the lock knows that no late write of an earlier
    /// daemon on this host can still land on the disk. So wait for it and never go around it.
    ///
    /// # Errors
    /// It cannot be opened, is in use, or is not a disk.
    pub fn open_waiting(path: &Path, access: Access, wait: Duration) -> Result<OsFile, OpenError> {
        let failed = |operation| failed(operation, path);
        let kind = disk_kind(path)?;
        let mut flags = libc::O_DIRECT | libc::O_CLOEXEC;
        if kind.is_block_device() && access == Access::ReadWrite {
            // The kernel then refuses what is mounted or claimed by another driver, and others' mounts while we live.
            flags |= libc::O_EXCL;
        }
        let mut options = OpenOptions::new();
        options
            .read(true)
            .write(access == Access::ReadWrite)
            .custom_flags(flags);
        let started = Instant::now();
        // A dead daemon's description also keeps O_EXCL, so this waits as well.
        let file = retry_until(started + wait, || match options.open(path) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => None,
            other => Some(other),
        })
        .ok_or_else(|| OpenError::Busy {
            path: path.to_owned(),
        })?
        .map_err(failed("opening"))?;
        let lock = match access {
            Access::ReadOnly => FlockOperation::NonBlockingLockShared,
            Access::ReadWrite => FlockOperation::NonBlockingLockExclusive,
        };
        retry_until(started + wait, || match flock(&file, lock) {
            Err(Errno::WOULDBLOCK | Errno::INTR) => None,
            other => Some(other),
        })
        .ok_or_else(|| OpenError::Locked {
            path: path.to_owned(),
            waited: started.elapsed(),
        })?
        .map_err(|errno| failed("locking")(errno.into()))?;
        OsFile::sized(file, path)
    }

    fn sized(mut file: File, path: &Path) -> Result<OsFile, OpenError> {
        // Works for block devices as well, where metadata says 0.
        let bytes = file.seek(SeekFrom::End(0)).map_err(failed("sizing", path))?;
        Ok(OsFile {
            file,
            bytes: bytes / BLOCK_BYTES * BLOCK_BYTES,
            failed: None,
        })
    }

    /// Opens `path` to look at it, past the lock: whoever has the disk may be writing to it. Good for a superblock, which says
    /// itself whether it was read whole, and for nothing else.
    ///
    /// # Errors
    /// It cannot be opened, or is not a disk.
    pub fn look(path: &Path) -> Result<OsFile, OpenError> {
        disk_kind(path)?;
        let mut options = OpenOptions::new();
        options.read(true).custom_flags(libc::O_DIRECT | libc::O_CLOEXEC);
        let file = options.open(path).map_err(failed("opening", path))?;
        OsFile::sized(file, path)
    }

    /// The descriptor, lock included, for a ring to go on with.
    #[must_use]
    pub fn into_file(self) -> File {
        self.file
    }

    fn check(&self, offset: u64, bytes: usize) {
        let is_aligned = is_block_aligned(offset) && is_block_aligned(bytes as u64);
        assert!(is_aligned, "{bytes} B at {offset} are not whole blocks");
    }
}

fn failed(operation: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> OpenError {
    move |source| OpenError::Io {
        operation,
        path: path.to_owned(),
        source,
    }
}

/// A block device or a file; anything else is refused.
fn disk_kind(path: &Path) -> Result<std::fs::FileType, OpenError> {
    let kind = std::fs::metadata(path)
        .map_err(failed("looking at", path))?
        .file_type();
    if kind.is_block_device() || kind.is_file() {
        return Ok(kind);
    }
    Err(OpenError::NotADisk {
        path: path.to_owned(),
    })
}

impl BlockFile for OsFile {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DiskError> {
        self.check(offset, buffer.len());
        if is_memory_aligned(buffer) {
            return read_all(&self.file, offset, buffer);
        }
        let mut bounce = Bounce::for_transfer(buffer.len());
        let mut at = offset;
        for piece in buffer.chunks_mut(BOUNCE_BYTES) {
            let aligned = bounce.first(piece.len());
            read_all(&self.file, at, aligned)?;
            piece.copy_from_slice(aligned);
            at += piece.len() as u64;
        }
        Ok(())
    }

    fn write_at(&mut self, offset: u64, buffer: &[u8]) -> Result<(), DiskError> {
        self.check(offset, buffer.len());
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        if is_memory_aligned(buffer) {
            return write_all(&self.file, offset, buffer);
        }
        let mut bounce = Bounce::for_transfer(buffer.len());
        let mut at = offset;
        for piece in buffer.chunks(BOUNCE_BYTES) {
            let aligned = bounce.first(piece.len());
            aligned.copy_from_slice(piece);
            write_all(&self.file, at, aligned)?;
            at += piece.len() as u64;
        }
        Ok(())
    }

    fn sync(&mut self) -> Result<(), DiskError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        // Not repeated on EINTR or anything else: the kernel reports a lost page once.
        self.file.sync_data().map_err(|error| {
            let error = io_error("sync", 0, 0, &error);
            self.failed = Some(error.clone());
            error
        })
    }
}

/// Makes a file of `bytes` (a multiple of 4 KiB) whose space is allocated, durably, contents and name.
///
/// # Errors
/// The file exists, the file system is full or cannot allocate ahead. A file half made is removed again.
pub fn create_preallocated(path: &Path, bytes: u64) -> Result<(), OpenError> {
    assert!(bytes > 0 && is_block_aligned(bytes), "a disk of {bytes} B");
    let failed = |operation| {
        move |source| OpenError::Io {
            operation,
            path: path.to_owned(),
            source,
        }
    };
    let options = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .clone();
    let file = options.open(path).map_err(failed("creating"))?;
    let filled = fallocate(&file, FallocateFlags::empty(), 0, bytes)
        .map_err(|errno| failed("allocating")(errno.into()))
        .and_then(|()| file.sync_all().map_err(failed("syncing")))
        .and_then(|()| sync_parent(path).map_err(failed("syncing the directory of")));
    if filled.is_err() {
        // The first error is the one to tell; a file left behind is found by its name.
        let _ = std::fs::remove_file(path);
    }
    filled
}

fn sync_parent(path: &Path) -> io::Result<()> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
}

/// Calls `attempt` until it gives something or the deadline has passed; at least once.
fn retry_until<T>(deadline: Instant, mut attempt: impl FnMut() -> Option<T>) -> Option<T> {
    loop {
        let result = attempt();
        if result.is_some() || Instant::now() >= deadline {
            return result;
        }
        std::thread::sleep(LOCK_RETRY);
    }
}

fn read_all(file: &File, offset: u64, buffer: &mut [u8]) -> Result<(), DiskError> {
    let wanted = buffer.len();
    transfer("read", offset, wanted, |done| {
        file.read_at(&mut buffer[done..], offset + done as u64)
    })
}

fn write_all(file: &File, offset: u64, buffer: &[u8]) -> Result<(), DiskError> {
    transfer("write", offset, buffer.len(), |done| {
        file.write_at(&buffer[done..], offset + done as u64)
    })
}

/// Repeats `step` from where it got to until all is moved, it fails, or it moves nothing.
fn transfer(
    operation: &'static str,
    offset: u64,
    wanted: usize,
    mut step: impl FnMut(usize) -> io::Result<usize>,
) -> Result<(), DiskError> {
    let mut done = 0;
    while done < wanted {
        match step(done) {
            Ok(0) => {
                let (done, wanted) = (done as u64, wanted as u64);
                return Err(DiskError::Short {
                    operation,
                    offset,
                    done,
                    wanted,
                });
            }
            Ok(moved) => done += moved,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(io_error(operation, offset, wanted as u64, &error)),
        }
    }
    Ok(())
}

fn io_error(operation: &'static str, offset: u64, bytes: u64, error: &io::Error) -> DiskError {
    DiskError::Io {
        operation,
        offset,
        bytes,
        errno: error.raw_os_error().unwrap_or(0),
        reason: error.to_string(),
    }
}

fn is_memory_aligned(bytes: &[u8]) -> bool {
    (bytes.as_ptr() as usize).is_multiple_of(MEMORY_ALIGN)
}

/// Aligned memory to copy through: an ordinary vector, used from its first aligned byte.
struct Bounce {
    bytes: Vec<u8>,
    lead: usize,
}

impl Bounce {
    fn for_transfer(bytes: usize) -> Bounce {
        let bytes = vec![0; bytes.min(BOUNCE_BYTES) + MEMORY_ALIGN];
        let lead = bytes.as_ptr().align_offset(MEMORY_ALIGN);
        Bounce { bytes, lead }
    }

    fn first(&mut self, length: usize) -> &mut [u8] {
        &mut self.bytes[self.lead..self.lead + length]
    }
}

#[cfg(test)]
mod tests;
