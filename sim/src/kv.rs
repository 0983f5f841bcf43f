//! A key-value store in memory that forgets what a crash may make it forget.

use std::collections::{BTreeMap, VecDeque};

use edge::{KvBatch, KvError, KvStore};

use crate::Rng;

/// An ordered map with atomic batches. [`KvStore::apply`] is durable at once; [`SimKv::submit`] leaves the
/// batch under way, as a request to the index thread is, until [`SimKv::complete_one`] or a crash decides.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SimKv {
    map: BTreeMap<Vec<u8>, Vec<u8>>,
    under_way: VecDeque<(u64, KvBatch)>,
}

impl SimKv {
    /// An empty store.
    #[must_use]
    pub fn new() -> SimKv {
        SimKv::default()
    }

    /// Takes a batch to apply later, in the order submitted.
    pub fn submit(&mut self, id: u64, batch: KvBatch) {
        self.under_way.push_back((id, batch));
    }

    /// Applies the oldest batch under way and tells which it was.
    pub fn complete_one(&mut self) -> Option<u64> {
        let (id, batch) = self.under_way.pop_front()?;
        put_in_place(&mut self.map, &batch);
        Some(id)
    }

    /// Batches submitted and not applied.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.under_way.len()
    }

    /// The process dies or power goes: some prefix of the batches under way has been applied.
    pub fn crash(&mut self, rng: &mut Rng) {
        for _ in 0..rng.index(self.under_way.len() + 1) {
            self.complete_one();
        }
        self.under_way.clear();
    }

    /// Somebody deletes the directory.
    pub fn delete(&mut self) {
        *self = SimKv::default();
    }

    /// Somebody restores an old copy of the directory.
    pub fn roll_back_to(&mut self, copy: &SimKv) {
        self.map = copy.map.clone();
        self.under_way.clear();
    }

    /// A bit of some value flips, unnoticed by whoever stores it. `None` if there is nothing to spoil.
    pub fn damage(&mut self, rng: &mut Rng) -> Option<Vec<u8>> {
        if self.map.is_empty() {
            return None;
        }
        let at = rng.index(self.map.len());
        let (key, value) = self.map.iter_mut().nth(at).expect("below its length");
        let byte = rng.index(value.len().max(1));
        *value.get_mut(byte)? ^= 1 << rng.below(8);
        Some(key.clone())
    }

    /// Number of keys.
    #[must_use]
    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// Whether nothing is in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }
}

fn put_in_place(map: &mut BTreeMap<Vec<u8>, Vec<u8>>, batch: &KvBatch) {
    for (from, to) in &batch.delete_ranges {
        if from < to {
            let keys: Vec<Vec<u8>> = map
                .range(from.clone()..to.clone())
                .map(|(key, _)| key.clone())
                .collect();
            for key in keys {
                map.remove(&key);
            }
        }
    }
    for key in &batch.deletes {
        map.remove(key);
    }
    for (key, value) in &batch.puts {
        map.insert(key.clone(), value.clone());
    }
}

impl KvStore for SimKv {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, KvError> {
        Ok(self.map.get(key).cloned())
    }

    fn scan(&self, from: &[u8], to: &[u8], limit: usize) -> Result<Vec<(Vec<u8>, Vec<u8>)>, KvError> {
        if from >= to {
            return Ok(Vec::new());
        }
        Ok(self
            .map
            .range(from.to_vec()..to.to_vec())
            .take(limit)
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect())
    }

    fn apply(&mut self, batch: &KvBatch) -> Result<(), KvError> {
        assert!(self.under_way.is_empty(), "batches apply in order");
        put_in_place(&mut self.map, batch);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(key: &[u8], value: u8) -> KvBatch {
        KvBatch {
            puts: vec![(key.to_vec(), vec![value])],
            ..KvBatch::default()
        }
    }

    #[test]
    fn a_crash_keeps_a_prefix_of_what_was_under_way() {
        let mut kept = [0; 4];
        for seed in 0..200 {
            let mut kv = SimKv::new();
            kv.apply(&put(b"a", 0)).unwrap();
            for id in 1..=3 {
                kv.submit(id, put(b"a", id as u8));
            }
            kv.crash(&mut Rng::new(seed));
            assert_eq!(kv.in_flight(), 0);
            kept[usize::from(kv.get(b"a").unwrap().unwrap()[0])] += 1;
        }
        assert!(kept.iter().all(|n| *n > 20), "{kept:?}");
    }

    #[test]
    fn ranges_go_before_puts_and_scans_are_half_open() {
        let mut kv = SimKv::new();
        for key in [b"a", b"b", b"c", b"d"] {
            kv.apply(&put(key, 1)).unwrap();
        }
        let copy = kv.clone();
        kv.apply(&KvBatch {
            delete_ranges: vec![(b"b".to_vec(), b"d".to_vec())],
            deletes: vec![b"a".to_vec()],
            puts: vec![(b"c".to_vec(), vec![2])],
        })
        .unwrap();
        let all = |kv: &SimKv| kv.scan(b"a", b"z", 10).unwrap();
        assert_eq!(all(&kv), [(b"c".to_vec(), vec![2]), (b"d".to_vec(), vec![1])]);
        assert_eq!(kv.scan(b"c", b"d", 10).unwrap().len(), 1);
        assert_eq!(kv.scan(b"a", b"z", 1).unwrap().len(), 1);
        kv.roll_back_to(&copy);
        assert_eq!(all(&kv).len(), 4);
        kv.delete();
        assert!(kv.is_empty());
    }
}
