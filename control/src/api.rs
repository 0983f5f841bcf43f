//! The REST API's bodies. Sizes are bytes, times RFC 3339, ids strings. Requests refuse fields they do not know;
//! answers may grow fields, so clients must ignore those they do not know.

use std::fmt;
use std::marker::PhantomData;

use jiff::Timestamp;
use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use types::{DiskId, HostId, PoolId, VdiId};
use utoipa::ToSchema;

use crate::{Attachment, DiskState};

/// Reads a `T` from a JSON object only. What serde derives takes an array of the fields in their order as well:
/// `[]` would be a valid "detach", of all doors.
pub(crate) fn object<'de, D: Deserializer<'de>, T: Deserialize<'de>>(reader: D) -> Result<T, D::Error> {
    struct Object<T>(PhantomData<T>);

    impl<'de, T: Deserialize<'de>> Visitor<'de> for Object<T> {
        type Value = T;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object")
        }

        fn visit_map<A: MapAccess<'de>>(self, fields: A) -> Result<T, A::Error> {
            T::deserialize(MapAccessDeserializer::new(fields))
        }
    }

    reader.deserialize_map(Object(PhantomData))
}

/// `POST /v1/pool`
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PoolCreateBody {
    /// `[a-z0-9][a-z0-9._-]{0,62}`
    pub name: String,
}

/// `POST /v1/disks`
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DiskAddBody {
    /// Absolute path of a block device, or of a file.
    pub path: String,
    /// Make a preallocated file of this many bytes at `path`; it must not exist yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub create_bytes: Option<u64>,
    /// Failure domain; default none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zone: Option<String>,
    /// Take it although it holds something.
    #[serde(default)]
    pub force: bool,
    /// Take back a disk of this pool that lost writes, or is an older copy of itself, although it has the only good
    /// copy of something: what it lost reads as it was before.
    #[serde(default)]
    pub accept_old: bool,
}

/// `POST /v1/disks/{id}/replace`
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DiskReplaceBody {
    /// The disk that takes the place.
    #[serde(deserialize_with = "object")]
    pub with: DiskAddBody,
}

/// `POST /v1/vdis`
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VdiCreateBody {
    /// `[a-z0-9][a-z0-9._-]{0,62}`, unique in the pool.
    pub name: String,
    /// Virtual size: 1 MiB to 64 TiB, a multiple of the sector.
    pub bytes: u64,
    /// 1 to 3, default 3.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replicas: Option<u8>,
    /// 512 (default) or 4096.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sector_bytes: Option<u32>,
    /// Bytes per shard, a multiple of 1 MiB up to 64 GiB; default 1 GiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shard_bytes: Option<u64>,
}

/// `POST /v1/vdis/{name}/resize`
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VdiResizeBody {
    /// New virtual size, not below the present one.
    pub bytes: u64,
}

/// `POST /v1/vdis/{name}/attach`
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AttachBody {
    /// `vhost-user:/PATH`, `nbd:unix:/PATH` or `nbd:tcp:ADDRESS:PORT`.
    pub target: String,
    /// Guests may not write.
    #[serde(default)]
    pub read_only: bool,
    /// Request queues of vhost-user, 1 to 16, default 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queues: Option<u16>,
    /// What is served is this snapshot, read-only; absent: the VDI itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<String>,
}

/// `POST /v1/snapshots`
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SnapshotCreateBody {
    /// `VDI@NAME` each. Several are one cut: what one of them holds, the others hold what came before it.
    pub snapshots: Vec<String>,
}

/// `POST /v1/vdis/{name}/snapshots/{snapshot}/protect`
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SnapshotProtectBody {
    /// Not to be deleted, by hand or by a schedule.
    pub protected: bool,
}

/// `POST /v1/vdis/{name}/rollback`
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RollbackBody {
    /// The snapshot to go back to.
    pub to: String,
    /// The name under which the present state is kept; absent: `before-rollback-` and the time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep: Option<String>,
    /// The present state is not kept at all.
    #[serde(default)]
    pub discard: bool,
    /// Although guests use it: they are hung up on first.
    #[serde(default)]
    pub force: bool,
}

/// `POST /v1/vdis/{name}/detach`
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DetachBody {
    /// Which attachment; all of them if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
}

/// `POST /v1/scrub`
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ScrubBody {
    /// Only this VDI; all of them if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vdi: Option<String>,
}

/// The pool and its space.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PoolInfo {
    /// Identity.
    #[schema(value_type = String)]
    pub id: PoolId,
    /// Name.
    pub name: String,
    /// When.
    #[schema(value_type = String)]
    pub created: Timestamp,
    /// Disks that belong to it, whatever their state.
    pub disks: u32,
    /// VDIs.
    pub vdis: u32,
    /// Bytes that replicas can store in all.
    pub capacity_bytes: u64,
    /// Bytes of live data on all disks.
    pub used_bytes: u64,
}

/// One disk.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct DiskInfo {
    /// Identity, as in its superblock.
    #[schema(value_type = String)]
    pub id: DiskId,
    /// Where it is (or was last) open.
    pub path: String,
    /// In what state.
    pub state: DiskState,
    /// Failure domain, may be empty.
    pub zone: String,
    /// Size of the device or file.
    pub bytes: u64,
    /// Bytes that replicas can store there.
    pub capacity_bytes: u64,
    /// Bytes of live data.
    pub used_bytes: u64,
    /// Segments of its log.
    pub segments: u32,
    /// Segments that hold nothing.
    pub segments_free: u32,
    /// Replicas of shards placed there.
    pub replicas: u32,
    /// Blocks whose checksum failed since the daemon started.
    pub corrupt_blocks: u64,
    /// Why it is failed or missing, in words; empty otherwise.
    pub reason: String,
    /// The name of the host it is in; absent in a pool of a single host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// Replicas found there that no record knows; they are kept.
    #[serde(default)]
    pub leftovers: u32,
}

/// One host of a cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HostInfo {
    /// Identity, kept in its state directory.
    #[schema(value_type = String)]
    pub id: HostId,
    /// As in its configuration.
    pub name: String,
    /// Where the other hosts reach it.
    pub address: String,
    /// Failure domain above the host, may be empty.
    pub zone: String,
    /// Of its `blockd`, when it started last.
    pub version: String,
    /// When it was first seen.
    #[schema(value_type = String)]
    pub joined: Timestamp,
    /// It was heard within its lease.
    pub is_alive: bool,
    /// It is the one that answers.
    pub is_this: bool,
    /// Its disks.
    pub disks: u32,
    /// Those of them that it serves.
    pub disks_up: u32,
    /// It is gone for good and is forgotten when its disks have left.
    #[serde(default)]
    pub is_leaving: bool,
    /// Why the host that answers has no link to it; absent where it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unreached: Option<String>,
}

/// A disk that replicas leave: it, or its host, is to go, or it has been gone for long.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct MoveInfo {
    /// Which.
    #[schema(value_type = String)]
    pub disk: DiskId,
    /// Its path.
    pub path: String,
    /// The name of its host; absent in a pool of a single host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// Replicas on it when this daemon saw it leave.
    pub replicas: u32,
    /// Replicas still placed there.
    pub replicas_left: u32,
    /// Replicas that left, by the hour.
    pub replicas_per_hour: f64,
    /// At that rate; absent while none has left.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seconds_left: Option<u64>,
}

/// How far it is that unevenly full disks are made even.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct RebalanceInfo {
    /// Replicas that were to move when it began, and since.
    pub moves: u64,
    /// Those of them that have not.
    pub moves_left: u64,
    /// Their bytes, were they full.
    pub bytes_left: u64,
    /// Bytes of those that have, counted so, by the second.
    pub bytes_per_s: f64,
    /// At that rate; absent while none has moved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seconds_left: Option<u64>,
    /// Why none begins to move now; empty: they do.
    #[serde(default)]
    pub waits_for: String,
}

/// A replica that would move.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PlannedMove {
    /// The VDI's name.
    pub vdi: String,
    /// Which shard of it.
    pub shard: u32,
    /// The disk that has it.
    #[schema(value_type = String)]
    pub from: DiskId,
    /// The disk that gets it.
    #[schema(value_type = String)]
    pub to: DiskId,
    /// Bytes of the shard: what moves, were it full.
    pub bytes: u64,
}

/// `GET /v1/rebalance`, and the answer to `POST`: what has to move so that all disks are as full as their sizes say.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RebalancePlan {
    /// Replicas.
    pub moves: u64,
    /// Their bytes, were they full.
    pub bytes: u64,
    /// The disks are so uneven that it is done without being asked for.
    pub is_wanted: bool,
    /// The setting `rebalance`: whether anything is done without being asked for.
    pub is_on: bool,
    /// What has to be over before anything moves; empty: nothing.
    #[serde(default)]
    pub waits_for: String,
    /// The first of the moves, in order; at most 1,000.
    pub first: Vec<PlannedMove>,
}

/// `GET /v1/disks/{id}/leftovers`: replicas of one VDI that no record knows, found on a disk and kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LeftoverInfo {
    /// The VDI's id.
    #[schema(value_type = u32)]
    pub vdi: VdiId,
    /// Its name, where the disk knows it; else empty.
    #[serde(default)]
    pub name: String,
    /// Shards of it on this disk.
    pub shards: u32,
    /// Bytes of data in them.
    pub bytes: u64,
    /// The records do know the VDI, but less of these shards than the disk does.
    pub is_known: bool,
}

/// What keeps the records of the pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ControlInfo {
    /// `embedded` in a pool of a single host, or `etcd`.
    pub kind: String,
    /// Since when it does not answer; absent: it does. What is shown is as of then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub unreachable_since: Option<Timestamp>,
    /// Why, in words; empty otherwise.
    #[serde(default)]
    pub reason: String,
}

impl Default for ControlInfo {
    fn default() -> ControlInfo {
        ControlInfo {
            kind: "embedded".to_owned(),
            unreachable_since: None,
            reason: String::new(),
        }
    }
}

/// How well a VDI is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Health {
    /// Every replica of every shard is in sync.
    Whole,
    /// Some replica is not in sync; guests do not notice.
    Degraded,
    /// Writes to some shard wait for a quorum.
    Waiting,
}

/// Where the replicas of a VDI are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VdiDisk {
    /// The disk.
    #[schema(value_type = String)]
    pub disk: DiskId,
    /// Its path.
    pub path: String,
    /// Replicas of this VDI's shards there.
    pub replicas: u32,
    /// How many of those are in sync.
    pub in_sync: u32,
}

/// One VDI.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct VdiInfo {
    /// Identity; never used again.
    #[schema(value_type = u32)]
    pub id: VdiId,
    /// Name.
    pub name: String,
    /// Virtual size.
    pub bytes: u64,
    /// Bytes of data in one replica (the fullest one of each shard).
    pub used_bytes: u64,
    /// Bytes of data in all replicas.
    pub stored_bytes: u64,
    /// Logical sector.
    pub sector_bytes: u32,
    /// Copies of each shard.
    pub replicas: u8,
    /// Bytes per shard.
    pub shard_bytes: u64,
    /// When.
    #[schema(value_type = String)]
    pub created: Timestamp,
    /// See there.
    pub health: Health,
    /// Shards in all.
    pub shards: u32,
    /// Shards whose replicas are all in sync.
    pub shards_whole: u32,
    /// Shards whose writes wait.
    pub shards_waiting: u32,
    /// Leaves (1 MiB each) still to compare in running resyncs.
    pub resync_leaves_left: u64,
    /// Being deleted.
    pub deleting: bool,
    /// Where guests find it.
    pub attachments: Vec<Attachment>,
    /// Where its replicas are.
    pub disks: Vec<VdiDisk>,
    /// The host that writes it; absent: nobody does, or the pool has a single host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
}

/// One snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SnapshotInfo {
    /// Of this VDI.
    pub vdi: String,
    /// Unique in its VDI.
    pub name: String,
    /// When it was taken.
    #[schema(value_type = String)]
    pub created: Timestamp,
    /// The VDI's virtual size then.
    pub bytes: u64,
    /// Not to be deleted.
    pub protected: bool,
    /// The snapshot it came after; absent: the VDI was new, or all before it are deleted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
    /// The VDI as it is now came from this one, by whatever steps.
    pub is_below_head: bool,
    /// VDIs that began with it and need it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub clones: Vec<String>,
    /// Its layer, the number in the log.
    pub layer: u32,
}

/// One scrub of one VDI, running or the last one that ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ScrubInfo {
    /// The VDI's name.
    pub vdi: String,
    /// When it began.
    #[schema(value_type = String)]
    pub started: Timestamp,
    /// When it ended, absent while it runs.
    #[schema(value_type = Option<String>)]
    pub ended: Option<Timestamp>,
    /// Shards done.
    pub shards_done: u32,
    /// Shards in all.
    pub shards: u32,
    /// Blocks of 4 KiB read and verified, over all replicas.
    pub blocks: u64,
    /// Blocks repaired from another replica.
    pub repaired: u64,
    /// Blocks without a good copy.
    pub unreadable: u64,
}

/// `GET /v1/scrub`, and the answer to `POST`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ScrubStatus {
    /// One entry for each VDI that was scrubbed since the daemon started.
    pub scrubs: Vec<ScrubInfo>,
}

/// How much an event matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// For the record.
    Info,
    /// Redundancy is less than asked for; act soon.
    Warning,
    /// Guests wait or data is lost; act now.
    Critical,
}

/// Something an operator wants to know.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct EventInfo {
    /// When.
    #[schema(value_type = String)]
    pub at: Timestamp,
    /// How bad.
    pub severity: Severity,
    /// One sentence.
    pub message: String,
}

/// A VDI whose replicas are being brought up to date.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ResyncInfo {
    /// The VDI's name.
    pub vdi: String,
    /// Shards that are not whole.
    pub shards_left: u32,
    /// Leaves (1 MiB each) still to compare.
    pub leaves_left: u64,
}

/// `GET /v1/status`: all of it at a glance.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct StatusInfo {
    /// The daemon.
    pub version: VersionInfo,
    /// Absent until `pool create`.
    pub pool: Option<PoolInfo>,
    /// What keeps the records, and whether it answers.
    #[serde(default)]
    pub control: ControlInfo,
    /// All hosts; none in a pool of a single host.
    #[serde(default)]
    pub hosts: Vec<HostInfo>,
    /// All disks.
    pub disks: Vec<DiskInfo>,
    /// All VDIs.
    pub vdis: Vec<VdiInfo>,
    /// Disks that are being emptied.
    #[serde(default)]
    pub moves: Vec<MoveInfo>,
    /// Absent while the disks are evenly full.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rebalance: Option<RebalanceInfo>,
    /// Running resyncs.
    pub resyncs: Vec<ResyncInfo>,
    /// Running and last scrubs.
    pub scrubs: Vec<ScrubInfo>,
    /// The latest, oldest first; bounded.
    pub events: Vec<EventInfo>,
}

/// `GET /v1/version`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VersionInfo {
    /// Of the daemon.
    pub version: String,
    /// The API's; grows when a field or path changes its meaning.
    pub api: u32,
    /// Version of the log format written to new disks.
    pub disk_format: u32,
}

/// The version this crate's API speaks.
pub const API_VERSION: u32 = 1;
