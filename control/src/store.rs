//! The control store: typed records in a key-value store, changed by compare-and-swap, several at once where they
//! belong together. `docs/records.md` lists keys and values.
//!
//! One owner calls this (`&mut self` for every change), so a compare and its swap need no lock of their own; what
//! the comparisons guard against is an owner that acts on an old copy of a record.

use edge::{KvBatch, KvError, KvStore};
use replication::ShardRecord;
use serde::Serialize;
use serde::de::DeserializeOwned;
use types::{DiskId, Epoch, Incarnation, ShardId, ShardNo, VdiId};

use crate::{ApiError, DiskRecord, PoolRecord, VdiRecord};

/// Version of the JSON values that this code writes; it reads this one only, there was no other.
const RECORD_VERSION: u32 = 1;
/// Records that one scan brings; bounds memory, not the number of records.
const SCAN_LIMIT: usize = 1024;

/// Why a record was not read or changed.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The key-value store failed. A change may or may not have been made.
    #[error("control records: {0}")]
    Kv(#[from] KvError),
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
    /// All numbers are used up.
    #[error("all 2^32 VDI ids are used up")]
    IdsExhausted,
}

impl From<RecordError> for ApiError {
    fn from(error: RecordError) -> ApiError {
        let message = error.to_string();
        match error {
            RecordError::Missing(_) => ApiError::not_found(message, ""),
            RecordError::NameTaken(_) => {
                ApiError::conflict(message, "choose another name, or see `weft vdi list`")
            }
            RecordError::OldRevision { .. } => ApiError::conflict(message, "try again"),
            RecordError::TooNew { .. } => ApiError::internal(message, "run the newer weft again"),
            RecordError::Kv(_) | RecordError::Damaged { .. } | RecordError::IdsExhausted => {
                ApiError::internal(message, "see the daemon's log")
            }
        }
    }
}

/// See the module.
pub struct ControlStore {
    kv: Box<dyn KvStore>,
}

impl std::fmt::Debug for ControlStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ControlStore")
    }
}

type Result<T> = std::result::Result<T, RecordError>;

impl ControlStore {
    /// Over `kv`, which nobody else changes.
    #[must_use]
    pub fn new(kv: Box<dyn KvStore>) -> ControlStore {
        ControlStore { kv }
    }

    /// Counts a start of the daemon; durable before it returns, so that no two starts share a number.
    ///
    /// # Errors
    /// The store's.
    pub fn next_incarnation(&mut self) -> Result<Incarnation> {
        let last: u64 = self.get("incarnation")?.unwrap_or(0);
        let next = last.checked_add(1).expect("fewer than 2^64 starts");
        self.put("incarnation", &next)?;
        Ok(Incarnation(next))
    }

    /// The pool, once created.
    ///
    /// # Errors
    /// The store's.
    pub fn pool(&self) -> Result<Option<PoolRecord>> {
        self.get("pool")
    }

    /// Keeps the pool's record.
    ///
    /// # Errors
    /// The store's.
    pub fn put_pool(&mut self, pool: &PoolRecord) -> Result<()> {
        self.put("pool", pool)
    }

    /// One disk.
    ///
    /// # Errors
    /// The store's.
    pub fn disk(&self, id: DiskId) -> Result<Option<DiskRecord>> {
        self.get(&disk_key(id))
    }

    /// All disks, by id.
    ///
    /// # Errors
    /// The store's.
    pub fn disks(&self) -> Result<Vec<DiskRecord>> {
        self.list("disk/")
    }

    /// Keeps a disk's record.
    ///
    /// # Errors
    /// The store's.
    pub fn put_disk(&mut self, disk: &DiskRecord) -> Result<()> {
        self.put(&disk_key(disk.id), disk)
    }

    /// Forgets a disk. That no shard is placed on it any more is for the caller to know.
    ///
    /// # Errors
    /// The store's.
    pub fn delete_disk(&mut self, id: DiskId) -> Result<()> {
        self.apply(&KvBatch {
            deletes: vec![disk_key(id).into_bytes()],
            ..KvBatch::default()
        })
    }

    /// The id that the next VDI gets; not taken until [`create_vdi`](Self::create_vdi).
    ///
    /// # Errors
    /// The store's, or ids are used up.
    pub fn next_vdi_id(&self) -> Result<VdiId> {
        let next: u32 = self.get("next-vdi-id")?.unwrap_or(1);
        if next == u32::MAX {
            return Err(RecordError::IdsExhausted);
        }
        Ok(VdiId(next))
    }

    /// Makes a VDI with the records of all its shards, at once.
    ///
    /// # Errors
    /// The store's, or the name is taken.
    ///
    /// # Panics
    /// Unless the record has the id that [`next_vdi_id`](Self::next_vdi_id) said, revision 1, and a shard record
    /// for each of its shards in order: the caller builds them from one another.
    pub fn create_vdi(&mut self, vdi: &VdiRecord, shards: &[ShardRecord]) -> Result<()> {
        assert_eq!(vdi.id, self.next_vdi_id()?, "VDI ids are given in order");
        assert_eq!(vdi.revision, 1, "a new record has revision 1");
        assert_follow(vdi, 0, shards);
        assert_eq!(
            shards.len(),
            vdi.shard_count() as usize,
            "one record for each shard"
        );
        if self.vdi_by_name(&vdi.name)?.is_some() {
            return Err(RecordError::NameTaken(vdi.name.clone()));
        }
        let mut batch = KvBatch::default();
        add(&mut batch, &vdi_key(vdi.id), vdi);
        add(&mut batch, &name_key(&vdi.name), &vdi.id);
        add(&mut batch, "next-vdi-id", &(vdi.id.0 + 1));
        add_shards(&mut batch, shards);
        self.apply(&batch)
    }

    /// One VDI.
    ///
    /// # Errors
    /// The store's.
    pub fn vdi(&self, id: VdiId) -> Result<Option<VdiRecord>> {
        self.get(&vdi_key(id))
    }

    /// The VDI of this name, unless it is being deleted.
    ///
    /// # Errors
    /// The store's.
    pub fn vdi_by_name(&self, name: &str) -> Result<Option<VdiRecord>> {
        let Some(id) = self.get::<VdiId>(&name_key(name))? else {
            return Ok(None);
        };
        match self.vdi(id)? {
            Some(vdi) => Ok(Some(vdi)),
            None => Err(RecordError::Damaged {
                key: name_key(name),
                reason: format!("it leads to VDI {id}, which has no record"),
            }),
        }
    }

    /// All VDIs, also those being deleted, by id.
    ///
    /// # Errors
    /// The store's.
    pub fn vdis(&self) -> Result<Vec<VdiRecord>> {
        self.list("vdi/")
    }

    /// Replaces a VDI's record if the one held has the revision of `vdi`; returns the new record, one revision on.
    /// A record that begins to be deleted gives its name free. The size changes in
    /// [`resize_vdi`](Self::resize_vdi).
    ///
    /// # Errors
    /// The store's, [`RecordError::Missing`] or [`RecordError::OldRevision`].
    ///
    /// # Panics
    /// When `vdi` changes the name or the size, or takes a deletion back.
    pub fn update_vdi(&mut self, vdi: &VdiRecord) -> Result<VdiRecord> {
        let held = self.held_vdi(vdi)?;
        assert_eq!(held.bytes, vdi.bytes, "the size changes in resize_vdi");
        let mut batch = KvBatch::default();
        if vdi.deleting && !held.deleting {
            batch.deletes.push(name_key(&vdi.name).into_bytes());
        }
        self.swap_vdi(vdi.clone(), batch)
    }

    /// Makes a VDI larger: `vdi` with the new size as read before, and the records of the shards it gains.
    ///
    /// # Errors
    /// The store's, [`RecordError::Missing`] or [`RecordError::OldRevision`].
    ///
    /// # Panics
    /// When it would shrink, or `added` are not just the shards that it gains.
    pub fn resize_vdi(&mut self, vdi: &VdiRecord, added: &[ShardRecord]) -> Result<VdiRecord> {
        let held = self.held_vdi(vdi)?;
        assert!(
            vdi.bytes >= held.bytes,
            "{} to {} B shrinks",
            held.bytes,
            vdi.bytes
        );
        let before = held.shard_count();
        assert_eq!(
            added.len(),
            (vdi.shard_count() - before) as usize,
            "one record for each new shard"
        );
        assert_follow(vdi, before, added);
        let mut batch = KvBatch::default();
        add_shards(&mut batch, added);
        self.swap_vdi(vdi.clone(), batch)
    }

    /// Forgets a VDI that was being deleted, with its shards' records.
    ///
    /// # Errors
    /// The store's.
    ///
    /// # Panics
    /// When it is not being deleted: data may be on disks.
    pub fn forget_vdi(&mut self, id: VdiId) -> Result<()> {
        let Some(vdi) = self.vdi(id)? else {
            return Ok(());
        };
        assert!(vdi.deleting, "VDI {id} is forgotten but not being deleted");
        self.apply(&KvBatch {
            deletes: vec![vdi_key(id).into_bytes()],
            delete_ranges: vec![prefix_range(&format!("shard/{:08x}/", id.0))],
            ..KvBatch::default()
        })
    }

    /// One shard.
    ///
    /// # Errors
    /// The store's.
    pub fn shard(&self, id: ShardId) -> Result<Option<ShardRecord>> {
        self.get(&shard_key(id))
    }

    /// All shards of a VDI, in order.
    ///
    /// # Errors
    /// The store's, or [`RecordError::Damaged`] where one is missing.
    pub fn shards(&self, vdi: VdiId) -> Result<Vec<ShardRecord>> {
        let shards: Vec<ShardRecord> = self.list(&format!("shard/{:08x}/", vdi.0))?;
        for (shard, no) in shards.iter().zip(0..) {
            let wanted = ShardId { vdi, no: ShardNo(no) };
            if shard.shard != wanted {
                return Err(RecordError::Damaged {
                    key: shard_key(wanted),
                    reason: format!("the record of shard {} is in its place", shard.shard),
                });
            }
        }
        Ok(shards)
    }

    /// Replaces a shard's record if the one held has the epoch just below. Returns what is held afterwards: equal
    /// to `record` when it was taken (also when it had been before: a retry), the newer one when it was not.
    ///
    /// # Errors
    /// The store's, or [`RecordError::Missing`].
    pub fn swap_shard(&mut self, record: &ShardRecord) -> Result<ShardRecord> {
        let key = shard_key(record.shard);
        let Some(held) = self.get::<ShardRecord>(&key)? else {
            return Err(RecordError::Missing(key));
        };
        if Epoch(held.epoch.0 + 1) != record.epoch {
            return Ok(held);
        }
        self.put(&key, record)?;
        Ok(record.clone())
    }

    fn held_vdi(&self, vdi: &VdiRecord) -> Result<VdiRecord> {
        let Some(held) = self.vdi(vdi.id)? else {
            return Err(RecordError::Missing(vdi_key(vdi.id)));
        };
        if held.revision != vdi.revision {
            return Err(RecordError::OldRevision {
                vdi: vdi.id,
                held: held.revision,
                given: vdi.revision,
            });
        }
        assert_eq!(held.name, vdi.name, "a VDI keeps its name");
        assert_eq!(held.shard_bytes, vdi.shard_bytes, "a VDI keeps its shard size");
        assert!(vdi.deleting || !held.deleting, "a deletion is not taken back");
        Ok(held)
    }

    fn swap_vdi(&mut self, mut vdi: VdiRecord, mut batch: KvBatch) -> Result<VdiRecord> {
        vdi.revision += 1;
        add(&mut batch, &vdi_key(vdi.id), &vdi);
        self.apply(&batch)?;
        Ok(vdi)
    }

    fn get<T: DeserializeOwned>(&self, key: &str) -> Result<Option<T>> {
        let value = self.kv.get(key.as_bytes())?;
        value.map(|bytes| decode(key, &bytes)).transpose()
    }

    fn put<T: Serialize>(&mut self, key: &str, record: &T) -> Result<()> {
        let mut batch = KvBatch::default();
        add(&mut batch, key, record);
        self.apply(&batch)
    }

    fn apply(&mut self, batch: &KvBatch) -> Result<()> {
        Ok(self.kv.apply(batch)?)
    }

    fn list<T: DeserializeOwned>(&self, prefix: &str) -> Result<Vec<T>> {
        let (mut from, to) = prefix_range(prefix);
        let mut records = Vec::new();
        loop {
            let entries = self.kv.scan(&from, &to, SCAN_LIMIT)?;
            for (key, value) in &entries {
                records.push(decode(&String::from_utf8_lossy(key), value)?);
            }
            match entries.into_iter().last() {
                Some((key, _)) if records.len().is_multiple_of(SCAN_LIMIT) => {
                    from = key;
                    from.push(0);
                }
                _ => return Ok(records),
            }
        }
    }
}

/// Shard records continue the VDI's from shard `first` on.
fn assert_follow(vdi: &VdiRecord, first: u32, shards: &[ShardRecord]) {
    for (shard, no) in shards.iter().zip(first..) {
        assert_eq!(
            shard.shard,
            ShardId {
                vdi: vdi.id,
                no: ShardNo(no)
            },
            "shard records in order"
        );
        assert_eq!(
            shard.replicas.len(),
            usize::from(vdi.replicas),
            "replicas of shard {}",
            shard.shard
        );
    }
}

fn disk_key(id: DiskId) -> String {
    format!("disk/{id}")
}

fn vdi_key(id: VdiId) -> String {
    format!("vdi/{:08x}", id.0)
}

fn name_key(name: &str) -> String {
    format!("vdi-name/{name}")
}

fn shard_key(id: ShardId) -> String {
    format!("shard/{:08x}/{:08x}", id.vdi.0, id.no.0)
}

/// Keys that begin with `prefix`, which ends in `/`: up to the same with the next byte, `0`.
fn prefix_range(prefix: &str) -> (Vec<u8>, Vec<u8>) {
    let mut end = prefix.as_bytes().to_vec();
    *end.last_mut().expect("a prefix") += 1;
    (prefix.as_bytes().to_vec(), end)
}

fn add<T: Serialize>(batch: &mut KvBatch, key: &str, record: &T) {
    #[derive(Serialize)]
    struct Out<'a, T> {
        v: u32,
        record: &'a T,
    }
    let value = serde_json::to_vec(&Out {
        v: RECORD_VERSION,
        record,
    })
    .expect("records have string keys only");
    batch.puts.push((key.as_bytes().to_vec(), value));
}

fn add_shards(batch: &mut KvBatch, shards: &[ShardRecord]) {
    for shard in shards {
        add(batch, &shard_key(shard.shard), shard);
    }
}

/// The version is read first: a newer record is refused by name, not as damage.
fn decode<T: DeserializeOwned>(key: &str, bytes: &[u8]) -> Result<T> {
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
#[path = "store_tests.rs"]
mod tests;
