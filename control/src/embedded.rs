//! The control store of a single host: an ordered key-value store in the process, RocksDB in the daemon.
//!
//! Comparisons and changes of a transaction are made under one lock; nobody else changes the store.

use std::sync::{Arc, Mutex};

use edge::{KvBatch, KvStore};
use tokio::sync::watch;

use crate::backend::{Backend, BackendError, Commit, Compare, Limits, Transaction};
use crate::watchers::{ChangedKeys, Watchers};

/// Records that one scan brings; bounds memory, not the number of records.
const SCAN_LIMIT: usize = 1024;

/// See the module.
pub struct Embedded {
    kv: Mutex<Box<dyn KvStore>>,
    watchers: Watchers,
}

impl Embedded {
    /// Over `kv`, which nobody else changes.
    #[must_use]
    pub fn new(kv: Box<dyn KvStore>) -> Embedded {
        Embedded {
            kv: Mutex::new(kv),
            watchers: Watchers::default(),
        }
    }

    fn kv(&self) -> std::sync::MutexGuard<'_, Box<dyn KvStore>> {
        self.kv.lock().expect("no panic while the store was held")
    }
}

impl Backend for Embedded {
    fn get(&self, key: &str) -> Result<Option<Vec<u8>>, BackendError> {
        Ok(self.kv().get(key.as_bytes())?)
    }

    fn list(&self, prefix: &str) -> Result<Vec<(String, Vec<u8>)>, BackendError> {
        let kv = self.kv();
        let (mut from, to) = prefix_range(prefix);
        let mut all = Vec::new();
        loop {
            let entries = kv.scan(&from, &to, SCAN_LIMIT)?;
            let is_last = entries.len() < SCAN_LIMIT;
            if let Some((key, _)) = entries.last() {
                from.clone_from(key);
                from.push(0);
            }
            all.extend(
                entries
                    .into_iter()
                    .map(|(key, value)| (String::from_utf8_lossy(&key).into_owned(), value)),
            );
            if is_last {
                return Ok(all);
            }
        }
    }

    fn commit(&self, transaction: &Transaction) -> Result<Commit, BackendError> {
        assert!(transaction.lease.is_none(), "a single host has no leases");
        let mut kv = self.kv();
        for compare in &transaction.compares {
            let held = kv.get(compare.key().as_bytes())?;
            let holds = match compare {
                Compare::Is(_, value) => held.as_ref() == Some(value),
                Compare::Absent(_) => held.is_none(),
            };
            if !holds {
                return Ok(Commit::Refused);
            }
        }
        let bytes = |key: &String| key.as_bytes().to_vec();
        kv.apply(&KvBatch {
            puts: transaction
                .puts
                .iter()
                .map(|(key, value)| (bytes(key), value.clone()))
                .collect(),
            deletes: transaction.deletes.iter().map(bytes).collect(),
            delete_ranges: transaction
                .delete_prefixes
                .iter()
                .map(|prefix| prefix_range(prefix))
                .collect(),
        })?;
        // Before anybody can see the change: who looks then knows that there is one.
        let puts = transaction.puts.iter().map(|(key, _)| key);
        let touched = puts
            .chain(&transaction.deletes)
            .chain(&transaction.delete_prefixes);
        let keys: Vec<&str> = touched.map(String::as_str).collect();
        self.watchers.changed(&keys);
        drop(kv);
        Ok(Commit::Done)
    }

    fn limits(&self) -> Option<Limits> {
        None
    }

    fn watch(&self, prefix: &str) -> watch::Receiver<u64> {
        self.watchers.subscribe(prefix)
    }

    fn changed_keys(&self, prefix: &str) -> Option<Arc<ChangedKeys>> {
        Some(self.watchers.collect(prefix))
    }
}

/// Keys that begin with `prefix`, an ASCII text: up to the same with its last character's successor.
pub(crate) fn prefix_range(prefix: &str) -> (Vec<u8>, Vec<u8>) {
    let mut end = prefix.as_bytes().to_vec();
    let last = end.last_mut().expect("a prefix is not empty");
    assert!(last.is_ascii(), "keys are ASCII");
    *last += 1;
    (prefix.as_bytes().to_vec(), end)
}
