//! What the control store remembers of pool, disks and VDIs. `docs/records.md` shows each as JSON.
//!
//! A shard's record is [`replication::ShardRecord`]: the writer reasons with it, so it lives there.

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use snapshot::SnapshotName;
use types::{DiskId, HostId, Incarnation, LayerId, PoolId, VdiId};
use utoipa::ToSchema;

use crate::backend::LeaseId;
use crate::check::is_hidden;

/// The pool this host belongs to; key `pool`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolRecord {
    /// Random, also in the superblock of every disk.
    pub id: PoolId,
    /// For people.
    pub name: String,
    /// When.
    pub created: Timestamp,
    /// How often these records were rebuilt from the disks: records that were rebuilt less often are old.
    #[serde(default, skip_serializing_if = "is_never")]
    pub recovered: u64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks so")]
fn is_never(times: &u64) -> bool {
    *times == 0
}

/// What the operator's side of a disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum DiskState {
    /// In use.
    Active,
    /// Returned an error; takes no more until reopened and checked.
    Failed,
    /// Could not be opened at start, or left.
    Missing,
    /// Its replicas are moving to other disks; then it leaves the pool.
    Removing,
}

/// One disk; key `disk/ID`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskRecord {
    /// As in its superblock.
    pub id: DiskId,
    /// Where it was last opened.
    pub path: PathBuf,
    /// Bytes of the device or file.
    pub bytes: u64,
    /// See there.
    pub state: DiskState,
    /// Failure domain: the host, or what the operator said; empty means none. Replicas of a shard go to
    /// different zones where there are enough.
    #[serde(default)]
    pub zone: String,
    /// How often it had been opened when it was last served: a disk that knows of fewer is an older copy of itself.
    /// Zero: not known.
    #[serde(default)]
    pub opens: u64,
    /// The host it is in; absent in a pool of a single host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<HostId>,
}

/// One host of a cluster; key `host/ID`. `host-name/NAME` leads back to the id.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostRecord {
    /// Kept in its state directory, made at its first start.
    pub id: HostId,
    /// As in its settings.
    pub name: String,
    /// Where the other hosts reach it, `ADDRESS:PORT`.
    pub address: String,
    /// Failure domain above the host; empty: none.
    #[serde(default)]
    pub zone: String,
    /// Of its `blockd`, when it started last.
    pub version: String,
    /// When it was first seen.
    pub joined: Timestamp,
    /// It is gone for good, and is forgotten when its disks have left.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub leaving: bool,
}

/// What a host says of itself while it is alive; key `host-alive/ID`, bound to its lease.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostAlive {
    /// Which.
    pub host: HostId,
    /// Of this life.
    pub incarnation: Incarnation,
    /// What it is bound to.
    pub lease: LeaseId,
    /// Where it can be reached.
    pub address: String,
    /// Its disks that are served, by id.
    #[serde(default)]
    pub disks: Vec<AliveDisk>,
}

/// A disk that is served, with figures that may be a little old.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AliveDisk {
    /// Which.
    pub disk: DiskId,
    /// Bytes that replicas can store there.
    pub capacity_bytes: u64,
    /// Bytes of live data.
    pub used_bytes: u64,
}

/// Who may write a VDI; key `vdi-writer/ID`. A key of its own, so that whoever changes a shard's record can compare
/// it whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VdiWriter {
    /// The host at which it is attached, or that looks after it while nobody is.
    pub host: HostId,
    /// With which that host opened it.
    pub incarnation: Incarnation,
}

/// One VDI; key `vdi/ID`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VdiRecord {
    /// Never used again.
    pub id: VdiId,
    /// Grows by one with every change of this record; what compare-and-swap compares.
    pub revision: u64,
    /// Unique among VDIs that are not being deleted; key `vdi-name/NAME` leads back to the id.
    pub name: String,
    /// Virtual size.
    pub bytes: u64,
    /// Logical sector, 512 or 4096.
    pub sector_bytes: u32,
    /// 1 to 3.
    pub replicas: u8,
    /// Bytes per shard.
    pub shard_bytes: u64,
    /// The layer that takes the writes.
    pub head: LayerId,
    /// When.
    pub created: Timestamp,
    /// Where guests find it; restored when the daemon starts.
    pub attachments: Vec<Attachment>,
    /// Deleted by the operator, but shards may be left on disks.
    pub deleting: bool,
}

impl VdiRecord {
    /// Shards that cover the virtual size.
    ///
    /// # Panics
    /// When the record's numbers could not have passed the border's checks.
    #[must_use]
    pub fn shard_count(&self) -> u32 {
        shard_count(self.bytes, self.shard_bytes)
    }
}

/// Shards of `shard_bytes` that cover `bytes`.
///
/// # Panics
/// When a size is zero, or there would be more than 2^32 shards: the caller's mistake.
#[must_use]
pub fn shard_count(bytes: u64, shard_bytes: u64) -> u32 {
    assert!(
        bytes > 0 && shard_bytes > 0,
        "{bytes} B in shards of {shard_bytes} B"
    );
    u32::try_from(bytes.div_ceil(shard_bytes)).expect("a VDI's shards have 32-bit numbers")
}

/// A VDI's door to guests.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Attachment {
    /// Protocol and address: `vhost-user:/run/weft/web01.sock`, `nbd:unix:/run/weft/web01.nbd` or
    /// `nbd:tcp:127.0.0.1:10809`.
    #[schema(value_type = String)]
    pub target: AttachTarget,
    /// Guests may not write.
    pub read_only: bool,
    /// Request queues (vhost-user); 1 for NBD.
    pub queues: u16,
    /// What is served is this snapshot; absent: the VDI itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub snapshot: Option<SnapshotName>,
}

/// Which protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Frontend {
    /// vhost-user-blk on a unix socket.
    VhostUser,
    /// Network block device on a unix socket or TCP.
    Nbd,
}

/// Protocol and address of an attachment.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum AttachTarget {
    /// vhost-user-blk at this socket.
    VhostUser(PathBuf),
    /// NBD at this address.
    Nbd(NbdAddress),
}

/// Where an NBD export listens.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum NbdAddress {
    /// A unix socket.
    Unix(PathBuf),
    /// TCP.
    Tcp(SocketAddr),
}

/// Longest path of a unix socket in bytes: `sun_path` is 108 with its closing zero.
pub const SOCKET_PATH_BYTES_MAX: usize = 107;

/// Text that is not the address of an attachment.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseTargetError {
    /// Does not start with a known protocol.
    #[error("'{0}' is not an attachment: write vhost-user:/PATH, nbd:unix:/PATH or nbd:tcp:ADDRESS:PORT")]
    NotATarget(String),
    /// Not an NBD address.
    #[error(
        "'{0}' is not an NBD address: write unix:/PATH or tcp:ADDRESS:PORT, for example tcp:127.0.0.1:10809"
    )]
    NotAnNbdAddress(String),
    /// Relative, or with `.`/`..` parts, or unprintable.
    #[error("the socket path '{0}' is not absolute and plain: write it from / without '..'")]
    NotAbsolute(String),
    /// The kernel could not bind it.
    #[error(
        "the socket path has {bytes} bytes, the kernel takes {SOCKET_PATH_BYTES_MAX}: choose a shorter one"
    )]
    TooLong {
        /// Bytes of the path.
        bytes: usize,
    },
}

fn shown(text: &str) -> String {
    text.chars().take(120).filter(|c| !is_hidden(*c)).collect()
}

/// Checks a path that a socket shall be bound at.
///
/// # Errors
/// When it is relative, not plain, or longer than the kernel takes.
pub fn socket_path(text: &str) -> Result<PathBuf, ParseTargetError> {
    if text.len() > SOCKET_PATH_BYTES_MAX {
        return Err(ParseTargetError::TooLong { bytes: text.len() });
    }
    let is_plain = text.starts_with('/')
        && !text.ends_with('/')
        && !text.chars().any(is_hidden)
        && !text.split('/').any(|part| part == "." || part == "..");
    if !is_plain {
        return Err(ParseTargetError::NotAbsolute(shown(text)));
    }
    Ok(PathBuf::from(text))
}

impl AttachTarget {
    /// The protocol.
    #[must_use]
    pub fn frontend(&self) -> Frontend {
        match self {
            AttachTarget::VhostUser(_) => Frontend::VhostUser,
            AttachTarget::Nbd(_) => Frontend::Nbd,
        }
    }

    /// The unix socket's path, if it is one.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        match self {
            AttachTarget::VhostUser(path) | AttachTarget::Nbd(NbdAddress::Unix(path)) => Some(path),
            AttachTarget::Nbd(NbdAddress::Tcp(_)) => None,
        }
    }
}

impl FromStr for NbdAddress {
    type Err = ParseTargetError;

    fn from_str(text: &str) -> Result<NbdAddress, ParseTargetError> {
        if let Some(path) = text.strip_prefix("unix:") {
            return socket_path(path).map(NbdAddress::Unix);
        }
        text.strip_prefix("tcp:")
            .and_then(|address| address.parse().ok())
            .map(NbdAddress::Tcp)
            .ok_or_else(|| ParseTargetError::NotAnNbdAddress(shown(text)))
    }
}

impl fmt::Display for NbdAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NbdAddress::Unix(path) => write!(f, "unix:{}", path.display()),
            NbdAddress::Tcp(address) => write!(f, "tcp:{address}"),
        }
    }
}

impl FromStr for AttachTarget {
    type Err = ParseTargetError;

    fn from_str(text: &str) -> Result<AttachTarget, ParseTargetError> {
        if let Some(path) = text.strip_prefix("vhost-user:") {
            return socket_path(path).map(AttachTarget::VhostUser);
        }
        match text.strip_prefix("nbd:") {
            Some(address) => address.parse().map(AttachTarget::Nbd),
            None => Err(ParseTargetError::NotATarget(shown(text))),
        }
    }
}

impl fmt::Display for AttachTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            AttachTarget::VhostUser(path) => write!(f, "vhost-user:{}", path.display()),
            AttachTarget::Nbd(address) => write!(f, "nbd:{address}"),
        }
    }
}

impl Serialize for AttachTarget {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for AttachTarget {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}
