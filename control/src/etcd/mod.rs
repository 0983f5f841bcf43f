//! The control store of a cluster: etcd.
//!
//! ```text
//!  callers (any thread) ──▶ Etcd ──jobs──▶ thread `etcd`: Link, one member at a time, the next when it fails
//!                            ▲                       └─── Mirror's watch: what was `seen`
//! ```
//! A thread of its own runs the client, so that callers need no runtime and may wait with a limit. What was last heard
//! is kept whole in memory (some 400 bytes for a shard) and follows a watch: questions cost no round trip, and are
//! answered while etcd is away.

mod known;
mod link;
mod mirror;

use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use etcd_client::{
    Compare as EtcdCompare, CompareOp, DeleteOptions, GetOptions, PutOptions, Txn, TxnOp, TxnOpResponse,
};
use tokio::runtime::Runtime;
use tokio::sync::watch;

use crate::backend::{
    Backend, BackendError, ChangedKeys, Commit, Compare, Health, LeaseId, Leases, Limits, Transaction,
};
use crate::embedded::prefix_range;
use known::Known;
use link::{Dated, Link};
use mirror::Mirror;

/// Operations of one transaction: etcd's own default limit is 128 (`--max-txn-ops`).
const OPERATIONS_MAX: usize = 120;
/// Bytes of one transaction: etcd's own default limit is 1.5 MiB (`--max-request-bytes`), framing included.
const BYTES_MAX: usize = 1 << 20;
/// Entries that one answer brings: some 400 KB of shards.
const PAGE: i64 = 1000;
/// How long a commit waits until this program's own watch has seen it.
const SEEN_WITHIN: Duration = Duration::from_secs(2);

/// Where etcd is and how to speak to it.
#[derive(Clone, PartialEq, Eq)]
pub struct EtcdSettings {
    /// `http://ADDRESS:PORT` or `https://NAME:PORT` of each member.
    pub endpoints: Vec<String>,
    /// What every key begins with; several pools may share one etcd.
    pub prefix: String,
    /// User and password.
    pub user: Option<(String, String)>,
    /// For `https`.
    pub tls: Option<EtcdTls>,
    /// How long one call may take in all.
    pub patience: Duration,
}

/// Certificates in PEM.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct EtcdTls {
    /// Of the authority that signed the members' certificates.
    pub authority: Option<Vec<u8>>,
    /// Our certificate and its key, where members ask for one.
    pub identity: Option<(Vec<u8>, Vec<u8>)>,
    /// The name in the members' certificates, where it is not the one in the address.
    pub server_name: Option<String>,
}

impl std::fmt::Debug for EtcdSettings {
    /// Without what is secret.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EtcdSettings")
            .field("endpoints", &self.endpoints)
            .field("prefix", &self.prefix)
            .field("user", &self.user.as_ref().map(|(name, _)| name))
            .field("tls", &self.tls.is_some())
            .field("patience", &self.patience)
            .finish()
    }
}

/// See the module.
pub struct Etcd {
    runtime: Option<Runtime>,
    link: Arc<Link>,
    mirror: Arc<Mirror>,
}

impl std::fmt::Debug for Etcd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Etcd")
            .field("settings", &self.link.settings)
            .finish()
    }
}

impl Etcd {
    /// Begins to follow etcd; returns when all records are known. Notices only within this life when etcd goes back.
    ///
    /// # Errors
    /// When etcd does not answer within the settings' patience, or refuses.
    ///
    /// # Panics
    /// When the settings name no endpoint, or no thread can be started.
    pub fn open(settings: EtcdSettings) -> Result<Etcd, BackendError> {
        Etcd::begin(settings, Known::open(None)?)
    }

    /// The same, with a file of its own at `memory` in which it keeps what it must know of etcd in its next life.
    ///
    /// # Errors
    /// As [`open`](Self::open); [`BackendError::WentBack`] when etcd is not what earlier lives knew;
    /// [`BackendError::Memory`].
    ///
    /// # Panics
    /// As [`open`](Self::open).
    pub fn open_remembering(settings: EtcdSettings, memory: PathBuf) -> Result<Etcd, BackendError> {
        Etcd::begin(settings, Known::open(Some(memory))?)
    }

    /// The same, for who rebuilds the records of an etcd that was wiped or went back.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    ///
    /// # Panics
    /// As [`open`](Self::open).
    pub fn open_to_rebuild(settings: EtcdSettings) -> Result<Etcd, BackendError> {
        Etcd::begin(settings, Known::unjudging())
    }

    fn begin(settings: EtcdSettings, known: Known) -> Result<Etcd, BackendError> {
        assert!(!settings.endpoints.is_empty(), "settings were checked");
        let patience = settings.patience;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("etcd")
            .enable_all()
            .build()
            .expect("a thread can be started");
        let etcd = Etcd {
            runtime: Some(runtime),
            link: Arc::new(Link::new(settings, known)),
            mirror: Arc::new(Mirror::default()),
        };
        // The first reading's refusals (password, certificate) are the caller's to see, not only the log's.
        etcd.meet()?;
        let (link, mirror) = (Arc::clone(&etcd.link), Arc::clone(&etcd.mirror));
        etcd.runtime().spawn(mirror::remember(Arc::clone(&link)));
        etcd.runtime().spawn(mirror::follow(link, mirror));
        etcd.mirror.wait_loaded(patience)?;
        etcd.link.known.save()?;
        Ok(etcd)
    }

    /// Whether this is the etcd that earlier lives knew.
    fn meet(&self) -> Result<(), BackendError> {
        let (link, key) = (Arc::clone(&self.link), self.key(mirror::POOL));
        let floor = link.known.revision();
        let answer = self.run(async move {
            let ask = |client: etcd_client::Client| {
                let key = key.clone();
                async move { client.kv_client().get(key, None).await }
            };
            link.ask("get", ask, true).await
        })?;
        let (known, revision) = (&self.link.known, answer.revision());
        let pool = answer.kvs().first().map(etcd_client::KeyValue::value);
        known.is_of_this_pool(pool)?;
        if !known.begin_anew_if_recovered(pool, revision) {
            known.heard(floor, revision)?;
        }
        known.saw_pool(pool)
    }

    fn runtime(&self) -> &Runtime {
        self.runtime.as_ref().expect("until dropped")
    }

    /// Runs `job` on the client's thread and waits. Whatever it does is bounded in time by the link.
    fn run<T: Send + 'static>(&self, job: impl Future<Output = T> + Send + 'static) -> T {
        let (give, take) = std::sync::mpsc::sync_channel(1);
        self.runtime().spawn(async move {
            let _ = give.send(job.await);
        });
        take.recv().expect("jobs do not panic")
    }

    /// What was changed is seen from now on by this program too. A watch that hangs on a member that died would take
    /// its time to notice: all is read anew then.
    fn wait_until_seen(&self, revision: i64) -> Result<(), BackendError> {
        if self.mirror.wait_for(revision, SEEN_WITHIN) {
            return Ok(());
        }
        self.mirror.is_behind.notify_one();
        if self.mirror.wait_for(revision, self.link.settings.patience) {
            return Ok(());
        }
        self.link.known.believed()?;
        Err(BackendError::Unknown {
            operation: "commit",
            waited: SEEN_WITHIN + self.link.settings.patience,
            reason: format!("it was made, at revision {revision}, but does not come to be seen"),
        })
    }

    fn key(&self, key: &str) -> String {
        format!("{}{key}", self.link.settings.prefix)
    }

    fn txn(&self, transaction: &Transaction) -> Txn {
        let compares: Vec<EtcdCompare> = transaction
            .compares
            .iter()
            .map(|compare| match compare {
                Compare::Is(key, value) => EtcdCompare::value(self.key(key), CompareOp::Equal, value.clone()),
                Compare::Absent(key) => EtcdCompare::version(self.key(key), CompareOp::Equal, 0),
            })
            .collect();
        let options = transaction
            .lease
            .map(|lease| PutOptions::new().with_lease(lease.0));
        let deletes = transaction
            .deletes
            .iter()
            .map(|key| TxnOp::delete(self.key(key), None));
        let ranges = transaction.delete_prefixes.iter().map(|prefix| {
            let (from, to) = prefix_range(&self.key(prefix));
            TxnOp::delete(from, Some(DeleteOptions::new().with_range(to)))
        });
        let puts = transaction
            .puts
            .iter()
            .map(|(key, value)| TxnOp::put(self.key(key), value.clone(), options.clone()));
        let operations: Vec<TxnOp> = deletes.chain(ranges).chain(puts).collect();
        Txn::new().when(compares).and_then(operations)
    }
}

impl Drop for Etcd {
    /// Does not wait for what is under way: nobody is left to hear of it.
    fn drop(&mut self) {
        if let Err(error) = self.link.known.save() {
            tracing::error!(%error, "what is known of etcd is not written down");
        }
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Backend for Etcd {
    fn get(&self, key: &str) -> Result<Option<Vec<u8>>, BackendError> {
        let (link, key) = (Arc::clone(&self.link), self.key(key));
        self.run(async move {
            let answer = link
                .read_believed("get", |client| {
                    let key = key.clone();
                    async move { client.kv_client().get(key, None).await }
                })
                .await?;
            Ok(answer.kvs().first().map(|entry| entry.value().to_vec()))
        })
    }

    fn list(&self, prefix: &str) -> Result<Vec<(String, Vec<u8>)>, BackendError> {
        let (link, from) = (Arc::clone(&self.link), self.key(prefix));
        let bare = self.link.settings.prefix.len();
        self.run(async move {
            let (entries, _) = list(&link, &from).await?;
            Ok(entries
                .into_iter()
                .map(|(key, value)| (key[bare..].to_owned(), value))
                .collect())
        })
    }

    fn seen(&self, key: &str) -> Result<Option<Vec<u8>>, BackendError> {
        Ok(self.mirror.get(key))
    }

    fn seen_list(&self, prefix: &str) -> Result<Vec<(String, Vec<u8>)>, BackendError> {
        Ok(self.mirror.list(prefix))
    }

    fn commit(&self, transaction: &Transaction) -> Result<Commit, BackendError> {
        let operations =
            transaction.puts.len() + transaction.deletes.len() + transaction.delete_prefixes.len();
        assert!(
            operations <= OPERATIONS_MAX + 8 && transaction.compares.len() <= OPERATIONS_MAX + 8,
            "{operations} operations, {} comparisons in one transaction",
            transaction.compares.len()
        );
        let (link, txn) = (Arc::clone(&self.link), self.txn(transaction));
        let answer = self.run(async move {
            link.change_believed("commit", |client| {
                let txn = txn.clone();
                async move { client.kv_client().txn(txn).await }
            })
            .await
        })?;
        if !answer.succeeded() {
            return Ok(Commit::Refused);
        }
        // What changed nothing (a key deleted that was not there) has no revision, and the watch will not show it.
        let deleted = answer.op_responses().iter().any(|response| match response {
            TxnOpResponse::Delete(deleted) => deleted.deleted() > 0,
            _ => false,
        });
        if transaction.puts.is_empty() && !deleted {
            return Ok(Commit::Done);
        }
        self.wait_until_seen(answer.revision())?;
        Ok(Commit::Done)
    }

    fn limits(&self) -> Option<Limits> {
        Some(Limits {
            operations: OPERATIONS_MAX,
            bytes: BYTES_MAX,
        })
    }

    fn highest_incarnation(&self) -> u64 {
        self.link.known.incarnation()
    }

    fn remember_incarnation(&self, incarnation: u64) -> Result<(), BackendError> {
        self.link.known.remember_incarnation(incarnation)
    }

    fn watch(&self, prefix: &str) -> watch::Receiver<u64> {
        self.mirror.watchers.subscribe(prefix)
    }

    fn changed_keys(&self, prefix: &str) -> Option<Arc<ChangedKeys>> {
        Some(self.mirror.watchers.collect(prefix))
    }

    fn health(&self) -> Health {
        self.mirror.health()
    }

    fn leases(&self) -> Option<&dyn Leases> {
        Some(self)
    }
}

impl Leases for Etcd {
    fn grant(&self, time: Duration) -> Result<LeaseId, BackendError> {
        let seconds = i64::try_from(time.as_secs().max(1)).expect("a lease is not for ages");
        let link = Arc::clone(&self.link);
        self.run(async move {
            // One granted too many, because its answer was lost, ends by itself.
            let answer = link
                .read("grant a lease", |client| async move {
                    client.lease_client().grant(seconds, None).await
                })
                .await?;
            Ok(LeaseId(answer.id()))
        })
    }

    fn keep_alive(&self, lease: LeaseId) -> Result<bool, BackendError> {
        let link = Arc::clone(&self.link);
        self.run(async move {
            link.read("keep a lease alive", |client| async move {
                match client.lease_client().keep_alive(lease.0).await {
                    Ok(_) => Ok(true),
                    Err(etcd_client::Error::LeaseKeepAliveError(_)) => Ok(false),
                    Err(error) => Err(error),
                }
            })
            .await
        })
    }

    fn left(&self, lease: LeaseId) -> Result<Option<Duration>, BackendError> {
        let link = Arc::clone(&self.link);
        self.run(async move {
            let answer = link
                .read("ask for a lease", |client| async move {
                    client.lease_client().time_to_live(lease.0, None).await
                })
                .await?;
            // -1: there is no such lease any more.
            Ok(u64::try_from(answer.ttl()).ok().map(Duration::from_secs))
        })
    }

    fn revoke(&self, lease: LeaseId) -> Result<(), BackendError> {
        let link = Arc::clone(&self.link);
        self.run(async move {
            link.read("end a lease", |client| async move {
                client.lease_client().revoke(lease.0).await
            })
            .await
            .map(drop)
        })
    }
}

/// All entries under `prefix` as of one revision, and that revision.
async fn list(link: &Link, prefix: &str) -> Result<(Vec<(String, Vec<u8>)>, i64), BackendError> {
    let (mut from, to) = prefix_range(prefix);
    let mut all = Vec::new();
    let mut revision = 0;
    loop {
        let options = GetOptions::new()
            .with_range(to.clone())
            .with_limit(PAGE)
            .with_revision(revision);
        let answer = link
            .read_believed("list", |client| {
                let (from, options) = (from.clone(), options.clone());
                async move { client.kv_client().get(from, Some(options)).await }
            })
            .await?;
        if revision == 0 {
            revision = answer.revision();
        }
        for entry in answer.kvs() {
            let key = String::from_utf8_lossy(entry.key()).into_owned();
            all.push((key, entry.value().to_vec()));
        }
        let Some(last) = answer.kvs().last().filter(|_| answer.more()) else {
            return Ok((all, revision));
        };
        from = last.key().to_vec();
        from.push(0);
    }
}
