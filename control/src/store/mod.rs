//! The control store: typed records over a [`Backend`], changed by compare-and-swap, several at once where they
//! belong together. `docs/records.md` lists keys and values, and the rules of who changes what.
//!
//! Questions (`vdi`, `disks`, ...) are answered from what was last heard and never wait for a network. Changes read
//! what they change from the store itself, and name everything they rely on in the transaction's comparisons: two
//! hosts may try at once, and one that acts on an old copy is refused.

mod disks;
mod hosts;
mod recovered;
mod shards;
mod snapshots;
mod vdis;
mod whereabouts;

pub use shards::Claim;
pub use snapshots::SNAPSHOTS_AT_ONCE;
pub use vdis::Placed;
pub use whereabouts::PlacedShard;

use whereabouts::Whereabouts;

use std::sync::Arc;

use edge::KvStore;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::watch;
use types::{DiskId, HostId, Incarnation, VdiId};

use crate::backend::{Backend, BackendError, Commit, Compare, Health, Transaction};
use crate::embedded::Embedded;
use crate::{ApiError, PoolRecord, VdiWriter};

/// Version of the JSON values that this code writes; it reads this one only, there was no other.
const RECORD_VERSION: u32 = 1;

/// Why a record was not read or changed.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// What keeps the records failed.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// A value is not what this code writes.
    #[error("the control record '{key}' is damaged: {reason}")]
    Damaged {
        /// Its key.
        key: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A value was written by a newer Weft.
    #[error("the control record '{key}' has version {found}, this weft reads up to {RECORD_VERSION}")]
    TooNew {
        /// Its key.
        key: String,
        /// The version it says.
        found: u32,
    },
    /// No such record.
    #[error("there is no control record '{0}'")]
    Missing(String),
    /// There is a pool.
    #[error("there is the pool '{0}' already")]
    PoolExists(String),
    /// Another VDI has the name.
    #[error("a VDI named '{0}' exists")]
    NameTaken(String),
    /// The record was changed since the caller read it.
    #[error("VDI {vdi} is at revision {held}, the change was made to {given}")]
    OldRevision {
        /// Which.
        vdi: VdiId,
        /// In the store.
        held: u64,
        /// The caller's.
        given: u64,
    },
    /// What the caller chose by (the next id, the disks that may take replicas) was changed meanwhile.
    #[error("another host changed the pool meanwhile")]
    Overtaken,
    /// Somebody else writes the VDI now.
    #[error("VDI {vdi} is no longer written by incarnation {ours}: host {} writes it with incarnation {}", now.host, now.incarnation)]
    NotTheWriter {
        /// Which.
        vdi: VdiId,
        /// With which the caller opened it.
        ours: Incarnation,
        /// Who may write it.
        now: VdiWriter,
    },
    /// A replica was to come to a disk that takes none any more.
    #[error("disk {0} is leaving the pool, or has left it")]
    DiskLeaving(DiskId),
    /// Guests are served by another host, and that host lives.
    #[error(
        "VDI {name} is attached on host {host}, which lives; if it does not, that is known in at most {left_s} s"
    )]
    HeldElsewhere {
        /// The VDI.
        name: String,
        /// The host's name.
        host: String,
        /// Seconds until its lease ends if it is not heard again.
        left_s: u64,
    },
    /// Another host that lives has the name.
    #[error(
        "host {id} at {address} has the name '{name}' and lives; if it does not, that is known in at most {left_s} s"
    )]
    HostNameTaken {
        /// The name.
        name: String,
        /// The other.
        id: HostId,
        /// Where it is.
        address: String,
        /// Seconds until its lease ends if it is not heard again.
        left_s: u64,
    },
    /// This host lives somewhere else.
    #[error(
        "host {name} ({id}) lives already, at {address}: this state directory is a copy of its, or its address has changed; if it does not live, that is known in at most {left_s} s"
    )]
    HostTwice {
        /// Its name.
        name: String,
        /// Its id.
        id: HostId,
        /// Where it is.
        address: String,
        /// Seconds until its lease ends if it is not heard again.
        left_s: u64,
    },
    /// The layers and snapshots that there are do not allow it.
    #[error(transparent)]
    Layers(#[from] snapshot::tree::Refusal),
    /// All numbers are used up.
    #[error("all 2^32 VDI ids are used up")]
    IdsExhausted,
}

impl From<RecordError> for ApiError {
    fn from(error: RecordError) -> ApiError {
        let message = error.to_string();
        match error {
            RecordError::Missing(_) => ApiError::not_found(message, ""),
            RecordError::Layers(refusal @ snapshot::tree::Refusal::NoSnapshot { .. }) => {
                ApiError::not_found(message, refusal.way_out())
            }
            RecordError::Layers(refusal) => ApiError::conflict(message, refusal.way_out()),
            RecordError::NameTaken(_) => {
                ApiError::conflict(message, "choose another name, or see `weft vdi list`")
            }
            RecordError::PoolExists(_) => ApiError::conflict(message, "see `weft pool status`"),
            RecordError::OldRevision { .. } | RecordError::Overtaken => {
                ApiError::conflict(message, "try again")
            }
            RecordError::NotTheWriter { .. } => ApiError::conflict(message, "see `weft vdi show`"),
            RecordError::DiskLeaving(_) => ApiError::conflict(message, "see `weft disk list`"),
            RecordError::HeldElsewhere { host, left_s, .. } => ApiError::conflict(
                message,
                format!("`weft vdi detach` on host {host}, or try again in {left_s} s if it is dead"),
            ),
            RecordError::HostNameTaken { .. } => {
                ApiError::conflict(message, "choose another `host` in [cluster]")
            }
            RecordError::HostTwice { .. } => {
                ApiError::conflict(message, "a host of its own begins with an empty state directory")
            }
            RecordError::TooNew { .. } => ApiError::internal(message, "run the newer weft again"),
            RecordError::Backend(BackendError::Unreachable { .. }) => ApiError::unavailable(
                message,
                "see that a majority of etcd's members runs, then try again",
            ),
            RecordError::Backend(BackendError::Unknown { .. }) => {
                ApiError::unavailable(message, "see whether it was made, then try again")
            }
            RecordError::Backend(BackendError::Refused { .. }) => ApiError::unavailable(
                message,
                "see the settings of [cluster] and etcd's users and space",
            ),
            RecordError::Backend(BackendError::WentBack { .. }) => ApiError::unavailable(
                message,
                "guests go on; see `weft pool recover --help` before anything is started again",
            ),
            RecordError::Backend(BackendError::AnotherPool { .. }) => {
                ApiError::unavailable(message, "see `etcd` and `etcd_prefix` of [cluster]")
            }
            RecordError::Backend(BackendError::Kv(_) | BackendError::Memory { .. })
            | RecordError::Damaged { .. }
            | RecordError::IdsExhausted => ApiError::internal(message, "see the daemon's log"),
        }
    }
}

/// See the module. Clones are the same store.
#[derive(Clone)]
pub struct ControlStore {
    backend: Arc<dyn Backend>,
    whereabouts: Arc<Whereabouts>,
}

impl std::fmt::Debug for ControlStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ControlStore")
    }
}

type Result<T> = std::result::Result<T, RecordError>;

/// A record together with the bytes it was read from, for the comparison of a change.
struct Held<T> {
    record: Option<T>,
    bytes: Option<Vec<u8>>,
}

impl ControlStore {
    /// Of a single host, over `kv`, which nobody else changes.
    #[must_use]
    pub fn new(kv: Box<dyn KvStore>) -> ControlStore {
        ControlStore::over(Arc::new(Embedded::new(kv)))
    }

    /// Over any backend.
    #[must_use]
    pub fn over(backend: Arc<dyn Backend>) -> ControlStore {
        ControlStore {
            backend,
            whereabouts: Arc::default(),
        }
    }

    /// How what keeps the records is.
    #[must_use]
    pub fn health(&self) -> Health {
        self.backend.health()
    }

    /// Says that records under `prefix` changed; see [`Backend::watch`].
    #[must_use]
    pub fn watch(&self, prefix: &str) -> watch::Receiver<u64> {
        self.backend.watch(prefix)
    }

    /// A number that no start of a daemon, and no taking over of a VDI, ever had; durable before it returns.
    ///
    /// # Errors
    /// The backend's.
    pub fn next_incarnation(&self) -> Result<Incarnation> {
        loop {
            let held = self.held::<u64>("incarnation")?;
            let next = held.record.unwrap_or(0).max(self.backend.highest_incarnation());
            let next = next.checked_add(1).expect("fewer than 2^64 starts");
            let mut change = Transaction::default();
            change.compares.push(held.unchanged("incarnation"));
            put(&mut change, "incarnation", &next);
            if self.commit(&change)? == Commit::Done {
                self.backend.remember_incarnation(next)?;
                return Ok(Incarnation(next));
            }
        }
    }

    /// The pool, once created.
    ///
    /// # Errors
    /// The backend's.
    pub fn pool(&self) -> Result<Option<PoolRecord>> {
        self.seen("pool")
    }

    /// Makes the pool.
    ///
    /// # Errors
    /// The backend's, or [`RecordError::PoolExists`].
    pub fn create_pool(&self, pool: &PoolRecord) -> Result<()> {
        let mut change = Transaction::default();
        change.compares.push(Compare::Absent("pool".to_owned()));
        put(&mut change, "pool", pool);
        match self.commit(&change)? {
            Commit::Done => Ok(()),
            Commit::Refused => {
                let held = self.held::<PoolRecord>("pool")?.record;
                Err(RecordError::PoolExists(
                    held.map_or_else(String::new, |pool| pool.name),
                ))
            }
        }
    }

    /// The record of `key` from the store itself, with its bytes.
    fn held<T: DeserializeOwned>(&self, key: &str) -> Result<Held<T>> {
        let bytes = self.backend.get(key)?;
        let record = bytes.as_deref().map(|bytes| decode(key, bytes)).transpose()?;
        Ok(Held { record, bytes })
    }

    fn seen<T: DeserializeOwned>(&self, key: &str) -> Result<Option<T>> {
        let bytes = self.backend.seen(key)?;
        bytes.map(|bytes| decode(key, &bytes)).transpose()
    }

    fn seen_list<T: DeserializeOwned>(&self, prefix: &str) -> Result<Vec<T>> {
        decode_all(&self.backend.seen_list(prefix)?)
    }

    fn commit(&self, transaction: &Transaction) -> Result<Commit> {
        Ok(self.backend.commit(transaction)?)
    }
}

impl<T> Held<T> {
    fn unchanged(&self, key: &str) -> Compare {
        Compare::unchanged(key, self.bytes.as_deref())
    }
}

fn put<T: Serialize>(transaction: &mut Transaction, key: &str, record: &T) {
    transaction.puts.push((key.to_owned(), encode(record)));
}

pub(crate) fn encode<T: Serialize>(record: &T) -> Vec<u8> {
    #[derive(Serialize)]
    struct Out<'a, T> {
        v: u32,
        record: &'a T,
    }
    serde_json::to_vec(&Out {
        v: RECORD_VERSION,
        record,
    })
    .expect("records have string keys only")
}

fn decode_all<T: DeserializeOwned>(entries: &[(String, Vec<u8>)]) -> Result<Vec<T>> {
    entries.iter().map(|(key, value)| decode(key, value)).collect()
}

/// The version is read first: a newer record is refused by name, not as damage.
pub(crate) fn decode<T: DeserializeOwned>(key: &str, bytes: &[u8]) -> Result<T> {
    #[derive(serde::Deserialize)]
    struct In {
        v: u32,
        record: serde_json::Value,
    }
    let damaged = |error: serde_json::Error| RecordError::Damaged {
        key: key.to_owned(),
        reason: error.to_string(),
    };
    let value: In = serde_json::from_slice(bytes).map_err(damaged)?;
    if value.v != RECORD_VERSION {
        return Err(RecordError::TooNew {
            key: key.to_owned(),
            found: value.v,
        });
    }
    serde_json::from_value(value.record).map_err(damaged)
}

#[cfg(test)]
mod snapshot_tests;
#[cfg(test)]
mod tests;
