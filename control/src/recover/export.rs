//! What was found on the disks of a host, as a file that is carried to where the records are rebuilt.

use std::path::PathBuf;

use replication::ShardRecord;
use serde::{Deserialize, Serialize};
use types::{DiskId, PoolId, Seq, Token};

use super::notes::{DiskNote, VdiNote};
use crate::RecordError;
use crate::store::decode;

/// What `weft pool export` writes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Export {
    /// Each disk that was read.
    pub disks: Vec<FoundDisk>,
}

/// One disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FoundDisk {
    /// As its superblock says.
    pub disk: DiskId,
    /// As its superblock says.
    pub pool: PoolId,
    /// Where it was read.
    pub path: PathBuf,
    /// Bytes of the device or file.
    pub bytes: u64,
    /// How often it was opened, this time included.
    pub opens: u64,
    /// What it was told of itself.
    pub note: Option<DiskNote>,
    /// What it was told of VDIs.
    pub vdis: Vec<VdiNote>,
    /// The replicas on it.
    pub shards: Vec<FoundShard>,
    /// The highest token that was ever promised on it.
    pub promised: Token,
    /// What could not be read, in words.
    pub unreadable: Vec<String>,
}

/// One replica.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FoundShard {
    /// As the last writer's fence brought it.
    pub record: ShardRecord,
    /// To whom this replica promised to listen, and to nobody below.
    pub promised: Token,
    /// The last write of the stream that it has, nothing missing before it.
    pub end: Seq,
    /// While it is being brought up to date, or its disk lost something: up to where it can be trusted.
    pub good_until: Option<Seq>,
    /// Blocks of data.
    pub blocks: u64,
}

impl FoundShard {
    /// Up to where it has everything.
    pub(super) fn good(&self) -> Seq {
        self.good_until.map_or(self.end, |good| good.min(self.end))
    }

    pub(super) fn is_whole(&self) -> bool {
        self.good_until.is_none()
    }
}

/// Reads what `weft pool export` wrote; `name` is the file's.
///
/// # Errors
/// [`RecordError::Damaged`] or [`RecordError::TooNew`].
pub fn decode_export(name: &str, bytes: &[u8]) -> Result<Export, RecordError> {
    decode(name, bytes)
}

impl Export {
    /// As a file.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        crate::store::encode(self)
    }
}
