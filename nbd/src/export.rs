//! What the server serves: the seam between the protocol and whatever holds the bytes.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::{Arc, RwLock, RwLockReadGuard, RwLockWriteGuard};

use tokio::sync::watch;

use crate::proto::{STRING_BYTES_MAX, errno};

/// What a client is told of an export when it connects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportInfo {
    /// Size, a multiple of `sector_bytes`.
    pub bytes: u64,
    /// The smallest unit of I/O: 512 or 4096. Requests that are not whole sectors are refused by the server.
    pub sector_bytes: u32,
    /// Writes, trims and zeroes are refused by the server.
    pub is_read_only: bool,
    /// For people, shown by `nbdinfo`; may be empty, at most 4096 bytes.
    pub description: String,
}

/// A piece of a read's answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part<D> {
    /// Content.
    Data(D),
    /// This many zero bytes. They travel as a hole where the client understands holes.
    Zeros(u64),
}

/// A run of bytes of the same allocation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Bytes, not zero.
    pub length: u64,
    /// Holds data; otherwise it reads as zeros and takes no space.
    pub is_data: bool,
}

/// Why an export could not do what was asked. Each has one number of the protocol's "Error values".
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExportError {
    /// EIO: the medium failed; the text is shown to the client's user.
    #[error("{0}")]
    Io(String),
    /// EIO: a read's parts do not add up to what was asked for.
    #[error("the read brought {done} of {wanted} bytes")]
    Short {
        /// Bytes that came.
        done: u64,
        /// Bytes asked for.
        wanted: u64,
    },
    /// ENOSPC.
    #[error("no space left")]
    NoSpace,
    /// EINVAL: for instance a range beyond the end of an export that has shrunk since the client connected.
    #[error("{0}")]
    Invalid(String),
    /// EPERM.
    #[error("not permitted")]
    NotPermitted,
    /// ENOTSUP.
    #[error("not supported")]
    Unsupported,
    /// ESHUTDOWN: the export is closing; a client that gets this disconnects.
    #[error("the export is closing")]
    Closing,
}

impl ExportError {
    /// The protocol's number for it.
    #[must_use]
    pub fn errno(&self) -> u32 {
        match self {
            ExportError::Io(_) | ExportError::Short { .. } => errno::EIO,
            ExportError::NoSpace => errno::ENOSPC,
            ExportError::Invalid(_) => errno::EINVAL,
            ExportError::NotPermitted => errno::EPERM,
            ExportError::Unsupported => errno::ENOTSUP,
            ExportError::Closing => errno::ESHUTDOWN,
        }
    }
}

/// A disk that can be served.
///
/// **An implementor may assume**: ranges are not empty, lie inside the size that [`info`](Export::info) gave
/// when the client connected, and are whole sectors of it; `read`, `buffer` and `write` are at most 32 MiB,
/// the others up to 4 GiB; a read-only export sees no `write`, `trim` or `write_zeroes`. At most
/// [`Config::requests_max`](crate::Config) calls of one connection are under way.
///
/// **An implementor owes**: all connections see one disk (`CAN_MULTI_CONN` is always advertised): what one
/// has completed the others read, and a `flush` on any covers the writes completed on all. Calls run
/// concurrently, on any thread of the runtime, and must not block it. A future that is dropped before it is
/// done (the server stopped, the client left for too long) leaves the operation done or not done, nothing
/// between whole sectors. `trim` and `write_zeroes` are quick whatever the length (`FAST_ZERO` is
/// advertised): a table changes, no zeros are written.
pub trait Export: Send + Sync + 'static {
    /// Where a write's data is received: the implementor's own pooled, aligned memory if it likes.
    type Buffer: AsMut<[u8]> + Send + 'static;
    /// Content that a read brought; the server only looks at it and drops it once it is on the socket.
    type Data: AsRef<[u8]> + Send + Sync + 'static;

    /// What the export is now. Asked at every connection, so a new size is seen by new connections; cheap.
    fn info(&self) -> ExportInfo;

    /// A buffer of exactly `length` bytes, whose content does not matter. May wait until one is free: the
    /// connection then reads no further, which is the backpressure its client needs.
    fn buffer(&self, length: usize) -> impl Future<Output = Self::Buffer> + Send;

    /// Read; the parts follow each other and add up to `length`.
    fn read(
        &self,
        offset: u64,
        length: u32,
    ) -> impl Future<Output = Result<Vec<Part<Self::Data>>, ExportError>> + Send;

    /// Write what `data` (from [`buffer`](Export::buffer)) was filled with; with `fua`, done only when on
    /// stable media.
    fn write(
        &self,
        offset: u64,
        data: Self::Buffer,
        fua: bool,
    ) -> impl Future<Output = Result<(), ExportError>> + Send;

    /// Done when all writes, trims and zeroes that were done before the call are on stable media.
    fn flush(&self) -> impl Future<Output = Result<(), ExportError>> + Send;

    /// The content of the range is no longer needed.
    fn trim(
        &self,
        offset: u64,
        length: u32,
        fua: bool,
    ) -> impl Future<Output = Result<(), ExportError>> + Send;

    /// The range reads as zeros; with `no_hole` the client would like its space to stay allocated.
    fn write_zeroes(
        &self,
        offset: u64,
        length: u32,
        fua: bool,
        no_hole: bool,
    ) -> impl Future<Output = Result<(), ExportError>> + Send;

    /// Allocation from `offset` on: at least one extent; may stop before `length`, and may go beyond it.
    fn extents(
        &self,
        offset: u64,
        length: u32,
    ) -> impl Future<Output = Result<Vec<Extent>, ExportError>> + Send;
}

/// Why a name cannot be served.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Longer than the protocol lets a string be, or with a NUL inside.
    #[error("an export's name has at most {STRING_BYTES_MAX} bytes and no NUL; this one has {0} bytes")]
    NotAName(usize),
    /// Served already.
    #[error("an export named {0:?} is served already")]
    Taken(String),
}

/// The exports of one or more servers, by name; a clone is the same set. Exports come and go while servers
/// run. The empty name is the protocol's default export and means nothing unless one is added under it: a
/// default that followed from how many exports there are could change under a client.
#[derive(Debug)]
pub struct Exports<E> {
    entries: Arc<RwLock<BTreeMap<String, Entry<E>>>>,
}

#[derive(Debug)]
struct Entry<E> {
    export: Arc<E>,
    /// True once the export is removed; connections hold receivers, so that it also tells when all have left.
    is_removed: watch::Sender<bool>,
}

/// An export that a connection has opened.
#[derive(Debug)]
pub(crate) struct Opened<E> {
    pub export: Arc<E>,
    pub is_removed: watch::Receiver<bool>,
}

impl<E> Clone for Exports<E> {
    fn clone(&self) -> Exports<E> {
        Exports {
            entries: Arc::clone(&self.entries),
        }
    }
}

impl<E> Default for Exports<E> {
    fn default() -> Exports<E> {
        Exports {
            entries: Arc::default(),
        }
    }
}

impl<E> Exports<E> {
    /// None yet.
    #[must_use]
    pub fn new() -> Exports<E> {
        Exports::default()
    }

    /// Serve `export` under `name` from now on.
    ///
    /// # Errors
    /// The name is not one, or is taken.
    pub fn add(&self, name: &str, export: Arc<E>) -> Result<(), NameError> {
        if crate::proto::text(name.as_bytes()).is_none() {
            return Err(NameError::NotAName(name.len()));
        }
        let mut entries = self.write();
        if entries.contains_key(name) {
            return Err(NameError::Taken(name.to_owned()));
        }
        let is_removed = watch::Sender::new(false);
        entries.insert(name.to_owned(), Entry { export, is_removed });
        Ok(())
    }

    /// Stop serving `name`: no new connection opens it from the call on; those that have are told to finish
    /// what is in flight, and have left when this returns (within [`Config::grace`](crate::Config)). False when
    /// there is no such export.
    pub async fn remove(&self, name: &str) -> bool {
        let Some(entry) = self.write().remove(name) else {
            return false;
        };
        entry.is_removed.send_replace(true);
        entry.is_removed.closed().await;
        true
    }

    /// Names served now, in order.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        self.read().keys().cloned().collect()
    }

    pub(crate) fn open(&self, name: &str) -> Option<Opened<E>> {
        let entries = self.read();
        let entry = entries.get(name)?;
        Some(Opened {
            export: Arc::clone(&entry.export),
            is_removed: entry.is_removed.subscribe(),
        })
    }

    fn read(&self) -> RwLockReadGuard<'_, BTreeMap<String, Entry<E>>> {
        self.entries.read().expect("no one panics holding this lock")
    }

    fn write(&self) -> RwLockWriteGuard<'_, BTreeMap<String, Entry<E>>> {
        self.entries.write().expect("no one panics holding this lock")
    }
}
