//! A [`KvStore`] in memory: for tests, and for whoever wants records that end with the process.

use std::collections::BTreeMap;

use edge::{KvBatch, KvError, KvStore};

/// See the module.
#[derive(Clone, Debug, Default)]
pub struct MemoryKv {
    entries: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl KvStore for MemoryKv {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, KvError> {
        Ok(self.entries.get(key).cloned())
    }

    fn scan(&self, from: &[u8], to: &[u8], limit: usize) -> Result<Vec<(Vec<u8>, Vec<u8>)>, KvError> {
        if from >= to {
            return Ok(Vec::new());
        }
        let range = self.entries.range(from.to_vec()..to.to_vec());
        Ok(range.take(limit).map(|(k, v)| (k.clone(), v.clone())).collect())
    }

    fn apply(&mut self, batch: &KvBatch) -> Result<(), KvError> {
        for (from, to) in &batch.delete_ranges {
            self.entries.retain(|key, _| key < from || key >= to);
        }
        for key in &batch.deletes {
            self.entries.remove(key);
        }
        for (key, value) in &batch.puts {
            self.entries.insert(key.clone(), value.clone());
        }
        Ok(())
    }
}
