//! The border: bodies become checked requests here, once. A refusal says what is wrong and what would be right.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use snapshot::{Reference, SnapshotName};
use types::{ByteSize, SHARD_BYTES_DEFAULT};

use crate::{
    ApiError, ApiResult, AttachBody, AttachTarget, DetachBody, DiskAddBody, Frontend, PoolCreateBody,
    RollbackBody, ScrubBody, SnapshotCreateBody, VdiCreateBody, VdiResizeBody,
};

/// Smallest VDI.
pub const VDI_BYTES_MIN: u64 = 1 << 20;
/// Largest VDI.
pub const VDI_BYTES_MAX: u64 = 64 << 40;
/// Smallest disk a pool takes: fewer segments than this holds leave the log no room to clean.
pub const DISK_BYTES_MIN: u64 = 1 << 30;
/// Largest disk a pool takes.
pub const DISK_BYTES_MAX: u64 = 256 << 40;
/// Most VDIs in one cut: all their records change in one transaction of the control store.
pub const GROUP_MAX: usize = 16;
/// Most request queues of an attachment.
pub const QUEUES_MAX: u16 = 16;
/// Most shards of a VDI; bounds the records that one `vdi create` writes at once.
pub const SHARDS_MAX: u64 = 65_536;
const SHARD_BYTES_MAX: u64 = 64 << 30;
const NAME_BYTES_MAX: usize = 63;
const PATH_BYTES_MAX: usize = 1024;

/// Name of a pool, zone or VDI: `[a-z0-9][a-z0-9._-]{0,62}`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(String);

impl Name {
    /// As text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Name {
    type Err = ApiError;

    fn from_str(text: &str) -> ApiResult<Name> {
        let is_alphanumeric = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
        let is_valid = text.len() <= NAME_BYTES_MAX
            && text.bytes().next().is_some_and(is_alphanumeric)
            && text.bytes().all(|b| is_alphanumeric(b) || b"._-".contains(&b));
        if is_valid {
            return Ok(Name(text.to_owned()));
        }
        let shown: String = text.chars().take(80).filter(|c| !is_hidden(*c)).collect();
        Err(ApiError::invalid(
            format!("'{shown}' is not a name"),
            "use 1 to 63 of a-z, 0-9, '.', '_' and '-', beginning with a letter or digit",
        ))
    }
}

/// A checked [`PoolCreateBody`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolCreate {
    /// Its name.
    pub name: Name,
}

/// A checked [`DiskAddBody`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskAdd {
    /// Absolute.
    pub path: PathBuf,
    /// Make a preallocated file of this size first.
    pub create_bytes: Option<u64>,
    /// Failure domain.
    pub zone: Option<Name>,
    /// Take it although it holds something.
    pub force: bool,
    /// Take it back although it lost writes that no other disk has.
    pub accept_old: bool,
}

/// A checked [`VdiCreateBody`], defaults filled in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VdiCreate {
    /// Its name.
    pub name: Name,
    /// Virtual size.
    pub bytes: u64,
    /// 1 to 3.
    pub replicas: u8,
    /// 512 or 4096.
    pub sector_bytes: u32,
    /// Bytes per shard.
    pub shard_bytes: u64,
}

/// A checked [`AttachBody`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attach {
    /// Protocol and address.
    pub target: AttachTarget,
    /// Guests may not write.
    pub read_only: bool,
    /// 1 to [`QUEUES_MAX`].
    pub queues: u16,
    /// What is served; `None` is the VDI itself.
    pub snapshot: Option<SnapshotName>,
}

/// A checked [`SnapshotCreateBody`]: at least one, each of another VDI.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotCreate {
    /// Which VDIs, and how their snapshots are to be called.
    pub snapshots: Vec<(Name, SnapshotName)>,
}

/// A checked [`RollbackBody`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rollback {
    /// The snapshot to go back to.
    pub to: SnapshotName,
    /// What becomes of the present state.
    pub present: Present,
    /// Although guests use it.
    pub force: bool,
}

/// What a roll-back does with the state before it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Present {
    /// Kept as a snapshot of this name.
    Kept(SnapshotName),
    /// Kept under a name that says when.
    KeptByTime,
    /// Given up.
    Discarded,
}

/// A checked [`DetachBody`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Detach {
    /// Which; `None` is all.
    pub target: Option<AttachTarget>,
}

impl TryFrom<PoolCreateBody> for PoolCreate {
    type Error = ApiError;

    fn try_from(body: PoolCreateBody) -> ApiResult<PoolCreate> {
        Ok(PoolCreate {
            name: body.name.parse()?,
        })
    }
}

impl TryFrom<DiskAddBody> for DiskAdd {
    type Error = ApiError;

    fn try_from(body: DiskAddBody) -> ApiResult<DiskAdd> {
        if let Some(bytes) = body.create_bytes {
            range("a disk", bytes, DISK_BYTES_MIN, DISK_BYTES_MAX)?;
            multiple("a disk", bytes, 4096)?;
        }
        Ok(DiskAdd {
            path: disk_path(&body.path)?,
            create_bytes: body.create_bytes,
            zone: body.zone.map(|zone| zone.parse()).transpose()?,
            force: body.force,
            accept_old: body.accept_old,
        })
    }
}

impl TryFrom<VdiCreateBody> for VdiCreate {
    type Error = ApiError;

    fn try_from(body: VdiCreateBody) -> ApiResult<VdiCreate> {
        let name = body.name.parse()?;
        let sector_bytes = body.sector_bytes.unwrap_or(512);
        if ![512, 4096].contains(&sector_bytes) {
            return Err(ApiError::invalid(
                format!("a sector of {sector_bytes} bytes is not supported"),
                "use 512 or 4096",
            ));
        }
        let replicas = body.replicas.unwrap_or(3);
        if !(1..=3).contains(&replicas) {
            return Err(ApiError::invalid(
                format!("{replicas} replicas are not supported"),
                "use 1, 2 or 3",
            ));
        }
        vdi_bytes(body.bytes, sector_bytes)?;
        let shard_bytes = body.shard_bytes.unwrap_or(SHARD_BYTES_DEFAULT);
        range("a shard", shard_bytes, 1 << 20, SHARD_BYTES_MAX)?;
        multiple("a shard", shard_bytes, 1 << 20)?;
        shards_fit(body.bytes, shard_bytes)?;
        Ok(VdiCreate {
            name,
            bytes: body.bytes,
            replicas,
            sector_bytes,
            shard_bytes,
        })
    }
}

impl TryFrom<AttachBody> for Attach {
    type Error = ApiError;

    fn try_from(body: AttachBody) -> ApiResult<Attach> {
        let target = target(&body.target)?;
        let queues = body.queues.unwrap_or(1);
        if !(1..=QUEUES_MAX).contains(&queues) {
            return Err(ApiError::invalid(
                format!("{queues} queues are not supported"),
                format!("use 1 to {QUEUES_MAX}"),
            ));
        }
        if target.frontend() == Frontend::Nbd && queues != 1 {
            return Err(ApiError::invalid(
                format!("an NBD attachment has no queues, {queues} were asked for"),
                "leave queues out; clients open as many connections as they like",
            ));
        }
        let snapshot = body.snapshot.as_deref().map(snapshot_name).transpose()?;
        if snapshot.is_some() && target.frontend() != Frontend::Nbd {
            return Err(ApiError::invalid(
                "a snapshot is served over NBD only",
                "give an NBD address; a guest can use that as its disk, too",
            ));
        }
        Ok(Attach {
            target,
            // Nobody writes into a snapshot.
            read_only: body.read_only || snapshot.is_some(),
            queues,
            snapshot,
        })
    }
}

impl TryFrom<DetachBody> for Detach {
    type Error = ApiError;

    fn try_from(body: DetachBody) -> ApiResult<Detach> {
        Ok(Detach {
            target: body.target.as_deref().map(target).transpose()?,
        })
    }
}

/// A snapshot's name out of a path or a body.
///
/// # Errors
/// When it is none.
pub fn snapshot_name(text: &str) -> ApiResult<SnapshotName> {
    text.parse().map_err(|error| not_a_reference(&error))
}

fn not_a_reference(error: &snapshot::ParseReferenceError) -> ApiError {
    ApiError::invalid(error.to_string(), error.way_out())
}

impl TryFrom<SnapshotCreateBody> for SnapshotCreate {
    type Error = ApiError;

    fn try_from(body: SnapshotCreateBody) -> ApiResult<SnapshotCreate> {
        if body.snapshots.is_empty() || body.snapshots.len() > GROUP_MAX {
            return Err(ApiError::invalid(
                format!("{} snapshots at once are not supported", body.snapshots.len()),
                format!("name 1 to {GROUP_MAX}, as VDI@NAME"),
            ));
        }
        let mut snapshots: Vec<(Name, SnapshotName)> = Vec::new();
        for text in &body.snapshots {
            let reference: Reference = text.parse().map_err(|error| not_a_reference(&error))?;
            let (vdi, snapshot) = reference.snapshot().map_err(|error| not_a_reference(&error))?;
            let vdi: Name = vdi.as_str().parse()?;
            if snapshots.iter().any(|(other, _)| *other == vdi) {
                return Err(ApiError::invalid(
                    format!("VDI {vdi} is named twice"),
                    "one cut is one snapshot of each VDI",
                ));
            }
            snapshots.push((vdi, snapshot));
        }
        Ok(SnapshotCreate { snapshots })
    }
}

impl TryFrom<RollbackBody> for Rollback {
    type Error = ApiError;

    fn try_from(body: RollbackBody) -> ApiResult<Rollback> {
        let present = match (body.keep, body.discard) {
            (Some(_), true) => {
                return Err(ApiError::invalid(
                    "the present state cannot be kept and discarded",
                    "leave out one of the two",
                ));
            }
            (Some(name), false) => Present::Kept(snapshot_name(&name)?),
            (None, true) => Present::Discarded,
            (None, false) => Present::KeptByTime,
        };
        Ok(Rollback {
            to: snapshot_name(&body.to)?,
            present,
            force: body.force,
        })
    }
}

impl ScrubBody {
    /// The VDI asked for, checked; `None` is all.
    ///
    /// # Errors
    /// When it is not a name.
    pub fn check(self) -> ApiResult<Option<Name>> {
        self.vdi.map(|vdi| vdi.parse()).transpose()
    }
}

impl VdiResizeBody {
    /// The new size as far as it can be judged without the VDI; [`vdi_bytes`] judges the rest.
    ///
    /// # Errors
    /// When no VDI may have this size.
    pub fn check(self) -> ApiResult<u64> {
        vdi_bytes(self.bytes, 512)?;
        Ok(self.bytes)
    }
}

/// Checks the virtual size of a VDI with sectors of `sector_bytes`.
///
/// # Errors
/// When it is out of range or not whole sectors.
pub fn vdi_bytes(bytes: u64, sector_bytes: u32) -> ApiResult<()> {
    range("a VDI", bytes, VDI_BYTES_MIN, VDI_BYTES_MAX)?;
    multiple("a VDI", bytes, u64::from(sector_bytes))
}

/// Checks that a VDI of `bytes` in shards of `shard_bytes` has at most [`SHARDS_MAX`] of them.
///
/// # Errors
/// When there would be more.
pub fn shards_fit(bytes: u64, shard_bytes: u64) -> ApiResult<()> {
    let shards = bytes.div_ceil(shard_bytes);
    if shards <= SHARDS_MAX {
        return Ok(());
    }
    let least = bytes.div_ceil(SHARDS_MAX).next_multiple_of(1 << 20);
    Err(ApiError::invalid(
        format!(
            "{} in shards of {} are {shards} shards, at most {SHARDS_MAX} are supported",
            ByteSize(bytes),
            ByteSize(shard_bytes)
        ),
        format!("use shards of at least {}", ByteSize(least)),
    ))
}

fn target(text: &str) -> ApiResult<AttachTarget> {
    text.parse()
        .map_err(|e: crate::ParseTargetError| ApiError::invalid(e.to_string(), ""))
}

/// Characters that move a terminal's cursor or turn the direction of what follows: in no path, in no message.
pub(crate) fn is_hidden(c: char) -> bool {
    c.is_control() || matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

fn disk_path(text: &str) -> ApiResult<PathBuf> {
    let is_plain = text.starts_with('/')
        && !text.ends_with('/')
        && text.len() <= PATH_BYTES_MAX
        && !text.chars().any(is_hidden)
        && !text.split('/').any(|part| part == "..");
    if is_plain {
        return Ok(PathBuf::from(text));
    }
    let shown: String = text.chars().take(120).filter(|c| !is_hidden(*c)).collect();
    Err(ApiError::invalid(
        format!("'{shown}' is not the path of a disk"),
        format!("give an absolute path of a device or file without '..', at most {PATH_BYTES_MAX} bytes"),
    ))
}

fn range(what: &str, bytes: u64, least: u64, most: u64) -> ApiResult<()> {
    if (least..=most).contains(&bytes) {
        return Ok(());
    }
    let side = if bytes < least { "small" } else { "large" };
    Err(ApiError::invalid(
        format!("{} is too {side} for {what}", ByteSize(bytes)),
        format!("use {} to {}", ByteSize(least), ByteSize(most)),
    ))
}

fn multiple(what: &str, bytes: u64, of: u64) -> ApiResult<()> {
    if bytes.is_multiple_of(of) {
        return Ok(());
    }
    Err(ApiError::invalid(
        format!("{bytes} bytes for {what} are not a multiple of {of}"),
        format!("use {} bytes", bytes.next_multiple_of(of)),
    ))
}

#[cfg(test)]
#[path = "check_tests.rs"]
mod tests;
