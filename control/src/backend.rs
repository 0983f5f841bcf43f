//! What the control store asks of whatever keeps its records: the one trait, in two implementations.
//!
//! ```text
//!  ControlStore (typed records, rules of change)
//!        │  get, list, commit, watch              seen, seen_list: what was last heard, never waits
//!        ▼
//!  Backend ── Embedded: an edge::KvStore, one host        ── Etcd: a cluster, feature `etcd`
//! ```

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use edge::KvError;
use jiff::Timestamp;
use tokio::sync::watch;

pub use crate::watchers::ChangedKeys;

/// Names a lease: what is bound to it disappears when its holder has not been heard for the lease's time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct LeaseId(pub i64);

/// What has to be so for a transaction to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Compare {
    /// The key has exactly this value.
    Is(String, Vec<u8>),
    /// There is no such key.
    Absent(String),
}

impl Compare {
    /// `key` is as it was when `held` was read.
    #[must_use]
    pub fn unchanged(key: &str, held: Option<&[u8]>) -> Compare {
        match held {
            Some(value) => Compare::Is(key.to_owned(), value.to_vec()),
            None => Compare::Absent(key.to_owned()),
        }
    }

    /// What it looks at.
    #[must_use]
    pub fn key(&self) -> &str {
        match self {
            Compare::Is(key, _) | Compare::Absent(key) => key,
        }
    }
}

/// Changes that are made all together, or not at all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Transaction {
    /// All of them have to hold.
    pub compares: Vec<Compare>,
    /// Keys that disappear.
    pub deletes: Vec<String>,
    /// Every key that begins so disappears; made before the puts of the same transaction, which must not be among
    /// them.
    pub delete_prefixes: Vec<String>,
    /// Keys and their new values, each key once.
    pub puts: Vec<(String, Vec<u8>)>,
    /// The puts last as long as this lease; `None`: until they are deleted.
    pub lease: Option<LeaseId>,
}

/// What became of a transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Commit {
    /// Everything is done and durable.
    Done,
    /// Some comparison did not hold; nothing was done.
    Refused,
}

/// Most that one transaction may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Puts and deletes.
    pub operations: usize,
    /// Bytes of keys and values.
    pub bytes: usize,
}

/// Why nothing can be said of a record.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BackendError {
    /// The embedded store failed. A change may or may not have been made.
    #[error("control records: {0}")]
    Kv(#[from] KvError),
    /// No member of etcd answered. Nothing was changed.
    #[error(
        "etcd does not answer ({operation}, {tries} tries at {endpoints} addresses in {} ms): {reason}",
        waited.as_millis()
    )]
    Unreachable {
        /// What was asked.
        operation: &'static str,
        /// How often.
        tries: u32,
        /// Addresses that the settings name.
        endpoints: usize,
        /// From the first try to the last.
        waited: Duration,
        /// Of the last try.
        reason: String,
    },
    /// A change was sent and no answer came: it may or may not have been made.
    #[error(
        "etcd did not say within {} ms whether it made a change ({operation}): {reason}",
        waited.as_millis()
    )]
    Unknown {
        /// What was asked.
        operation: &'static str,
        /// Since it was sent.
        waited: Duration,
        /// What came instead of an answer.
        reason: String,
    },
    /// etcd answered that it will not. Nothing was changed.
    #[error("etcd refused ({operation}, code {code}): {reason}")]
    Refused {
        /// What was asked.
        operation: &'static str,
        /// The gRPC status code.
        code: i32,
        /// Its words.
        reason: String,
    },
    /// etcd is not the one that was known: an old copy, or empty. Nothing of it is used, and nothing in it changed on
    /// purpose, until the records were rebuilt.
    #[error("{reason}; its records are not used until `weft pool recover` has rebuilt them from the disks")]
    WentBack {
        /// What was known, and what was found.
        reason: String,
    },
    /// etcd has a pool, and it is not the one that this host belongs to. Nothing of it is used.
    #[error(
        "this host belongs to pool {known}, and etcd has pool {found} there: another etcd or prefix is meant, or this host begins in an empty state directory"
    )]
    AnotherPool {
        /// The pool's id, as this host knows it.
        known: String,
        /// The one that was found.
        found: String,
    },
    /// What has to be known of etcd in the next life cannot be read or written.
    #[error("what this host knows of etcd, {}: {reason}", path.display())]
    Memory {
        /// The file.
        path: PathBuf,
        /// What went wrong.
        reason: String,
    },
}

/// How the store is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Health {
    /// `None`: it answers, what was `seen` is fresh. Else since when it does not, and why.
    pub unreachable: Option<(Timestamp, String)>,
}

/// Key-value records with transactions.
///
/// An implementor owes: [`commit`](Backend::commit) is atomic, durable when it returns, and in one order for all who
/// look; [`get`](Backend::get) and [`list`](Backend::list) see every commit that returned before they were called,
/// whoever made it; every call returns within a bounded time. It may assume that keys are ASCII without control
/// characters, that a transaction keeps within [`limits`](Backend::limits), and that callers may block.
pub trait Backend: Send + Sync {
    /// The value of `key`, from the store itself.
    ///
    /// # Errors
    /// The store's.
    fn get(&self, key: &str) -> Result<Option<Vec<u8>>, BackendError>;

    /// Every entry whose key begins with `prefix`, by key, as of one moment, from the store itself.
    ///
    /// # Errors
    /// The store's.
    fn list(&self, prefix: &str) -> Result<Vec<(String, Vec<u8>)>, BackendError>;

    /// The value of `key` as last heard: never waits for a network, and works while the store does not answer. It is
    /// never older than what this program itself committed.
    ///
    /// # Errors
    /// The store's.
    fn seen(&self, key: &str) -> Result<Option<Vec<u8>>, BackendError> {
        self.get(key)
    }

    /// As [`list`](Backend::list), as last heard.
    ///
    /// # Errors
    /// The store's.
    fn seen_list(&self, prefix: &str) -> Result<Vec<(String, Vec<u8>)>, BackendError> {
        self.list(prefix)
    }

    /// Does all of a transaction, if all its comparisons hold.
    ///
    /// # Errors
    /// The store's.
    fn commit(&self, transaction: &Transaction) -> Result<Commit, BackendError>;

    /// Most that one transaction may hold; `None`: anything.
    fn limits(&self) -> Option<Limits>;

    /// The highest incarnation that this host ever heard of, in its earlier lives too; no lower one, nor this, is given.
    fn highest_incarnation(&self) -> u64 {
        0
    }

    /// Keeps an incarnation for [`highest_incarnation`](Self::highest_incarnation), durably, before it is used.
    ///
    /// # Errors
    /// The store's.
    fn remember_incarnation(&self, _: u64) -> Result<(), BackendError> {
        Ok(())
    }

    /// Says that something under `prefix` changed since the receiver looked last. What it holds is only a count: who
    /// wants to know what changed looks at what was `seen`.
    fn watch(&self, prefix: &str) -> watch::Receiver<u64>;

    /// Collects the keys under `prefix` that change from now on, each before a change that was [`seen`](Self::seen) can be
    /// seen by another thread without it; `None`: it cannot say which they are.
    fn changed_keys(&self, _prefix: &str) -> Option<Arc<ChangedKeys>> {
        None
    }

    /// How it is.
    fn health(&self) -> Health {
        Health { unreachable: None }
    }

    /// Leases, where there are other hosts who would want to know.
    fn leases(&self) -> Option<&dyn Leases> {
        None
    }
}

/// Keys that disappear with whoever put them.
pub trait Leases {
    /// A new lease of `time`, to the second.
    ///
    /// # Errors
    /// The store's.
    fn grant(&self, time: Duration) -> Result<LeaseId, BackendError>;

    /// Makes the lease last its full time from now on; `false`: it has ended, and what was bound to it is gone.
    ///
    /// # Errors
    /// The store's.
    fn keep_alive(&self, lease: LeaseId) -> Result<bool, BackendError>;

    /// How long it lasts if its holder is not heard again; `None`: it has ended.
    ///
    /// # Errors
    /// The store's.
    fn left(&self, lease: LeaseId) -> Result<Option<Duration>, BackendError>;

    /// Ends it.
    ///
    /// # Errors
    /// The store's.
    fn revoke(&self, lease: LeaseId) -> Result<(), BackendError>;
}
