//! A small ordered key-value store with atomic batches: the index checkpoint of a disk, and the control records.

/// Why the key-value store failed.
#[derive(Clone, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[error("{operation} in the key-value store at {place}: {reason}")]
pub struct KvError {
    /// `open`, `get`, `scan` or `apply`.
    pub operation: &'static str,
    /// Its directory, or `memory`.
    pub place: String,
    /// The implementation's words.
    pub reason: String,
}

/// Changes that become visible, and durable, all together or not at all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KvBatch {
    /// Key and new value.
    pub puts: Vec<(Vec<u8>, Vec<u8>)>,
    /// Keys to remove.
    pub deletes: Vec<Vec<u8>>,
    /// Half-open ranges of keys to remove, before the puts of the same batch.
    pub delete_ranges: Vec<(Vec<u8>, Vec<u8>)>,
}

/// An ordered map from bytes to bytes.
///
/// An implementor owes: `apply` is atomic and durable when it returns; after a crash the content is that after
/// some prefix of the applied batches, no shorter than the last one that returned.
pub trait KvStore: Send {
    /// The value of `key`.
    ///
    /// # Errors
    /// The store's own failure; a missing key is `None`.
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, KvError>;

    /// Entries with keys in `from..to`, ascending, at most `limit` of them.
    ///
    /// # Errors
    /// The store's own failure.
    fn scan(&self, from: &[u8], to: &[u8], limit: usize) -> Result<Vec<(Vec<u8>, Vec<u8>)>, KvError>;

    /// Applies `batch` and makes it durable.
    ///
    /// # Errors
    /// The store's own failure; the batch may or may not have been applied then.
    fn apply(&mut self, batch: &KvBatch) -> Result<(), KvError>;
}
