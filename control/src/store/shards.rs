//! Records of shards.

use replication::ShardRecord;
use types::{DiskId, Epoch, ShardId, ShardNo, VdiId};

use super::vdis::{gone_key, vdi_key, writer_key};
use super::{ControlStore, RecordError, Result, decode, decode_all, encode, put};
use crate::backend::{Commit, Compare, Limits, Transaction};
use crate::{VdiRecord, VdiWriter};

pub(super) fn shard_key(id: ShardId) -> String {
    format!("shard/{:08x}/{:08x}", id.vdi.0, id.no.0)
}

pub(super) fn shards_prefix(vdi: VdiId) -> String {
    format!("shard/{:08x}/", vdi.0)
}

/// What the records say of a replica that was found on a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// It belongs there.
    Placed,
    /// It certainly does not: its shard is placed elsewhere, or its VDI was deleted.
    NotPlaced,
    /// Nobody knows: the records have never heard of its VDI, or know less of the shard than the replica itself does.
    Unknown,
}

impl ControlStore {
    /// What is to be thought of a replica on `disk` whose own record of the shard has `epoch`. Records that went back to
    /// an older state must not cost data: a replica may only be dropped for a reason that is written down.
    ///
    /// # Errors
    /// The backend's.
    pub fn claim(&self, id: ShardId, disk: DiskId, epoch: Epoch) -> Result<Claim> {
        let places = |record: &ShardRecord| record.replicas.contains(&disk);
        if self.shard(id)?.is_some_and(|record| places(&record)) {
            return Ok(Claim::Placed);
        }
        // From the store itself: what is dropped cannot be brought back.
        Ok(match self.shard_now(id)? {
            Some(record) if places(&record) => Claim::Placed,
            Some(record) if record.epoch < epoch => Claim::Unknown,
            Some(_) => Claim::NotPlaced,
            None if self.held::<bool>(&gone_key(id.vdi))?.record.is_some() => Claim::NotPlaced,
            None => Claim::Unknown,
        })
    }

    /// One shard.
    ///
    /// # Errors
    /// The backend's.
    pub fn shard(&self, id: ShardId) -> Result<Option<ShardRecord>> {
        self.seen(&shard_key(id))
    }

    /// One shard, from the store itself: for what cannot be taken back.
    ///
    /// # Errors
    /// The backend's.
    pub fn shard_now(&self, id: ShardId) -> Result<Option<ShardRecord>> {
        Ok(self.held(&shard_key(id))?.record)
    }

    /// All shards of a VDI, in order.
    ///
    /// # Errors
    /// The backend's, or [`RecordError::Damaged`] where one is missing.
    pub fn shards(&self, vdi: VdiId) -> Result<Vec<ShardRecord>> {
        let record: Option<VdiRecord> = self.seen(&vdi_key(vdi))?;
        let mut shards = decode_all(&self.backend.seen_list(&shards_prefix(vdi))?)?;
        // Records that a VDI is about to grow by come before its new size.
        if let Some(record) = record {
            shards.truncate(record.shard_count() as usize);
        }
        in_order(vdi, &shards)?;
        Ok(shards)
    }

    /// All shards of a VDI from the store itself: what a writer begins with, read after it became the writer.
    ///
    /// # Errors
    /// The backend's, or [`RecordError::Damaged`] unless every one is there.
    pub fn shards_now(&self, vdi: &VdiRecord) -> Result<Vec<ShardRecord>> {
        let mut shards: Vec<ShardRecord> = decode_all(&self.backend.list(&shards_prefix(vdi.id))?)?;
        shards.truncate(vdi.shard_count() as usize);
        in_order(vdi.id, &shards)?;
        let count = u32::try_from(shards.len()).expect("it was cut to 32 bits");
        if count < vdi.shard_count() {
            let no = ShardNo(count);
            return Err(RecordError::Damaged {
                key: shard_key(ShardId { vdi: vdi.id, no }),
                reason: format!("it is missing, the VDI has {} shards", vdi.shard_count()),
            });
        }
        Ok(shards)
    }

    /// Replaces a shard's record if the one held has the epoch just below, `writer` (where there are several hosts)
    /// still writes the VDI, and no replica is added on a disk that is leaving. Returns what is held afterwards: equal
    /// to `record` when it was taken (also when it had been before: a retry), another one when it was not.
    ///
    /// # Errors
    /// The backend's, [`RecordError::Missing`], [`RecordError::NotTheWriter`] or [`RecordError::DiskLeaving`].
    pub fn swap_shard(&self, record: &ShardRecord, writer: Option<&VdiWriter>) -> Result<ShardRecord> {
        let key = shard_key(record.shard);
        // What was last heard is nearly always what is held: that saves the question, and where it is not so the
        // comparison fails.
        let mut bytes = self.backend.seen(&key)?;
        let is_next = |held: &ShardRecord| Epoch(held.epoch.0 + 1) == record.epoch;
        let seen = bytes.as_deref().map(|bytes| decode::<ShardRecord>(&key, bytes));
        if !matches!(seen, Some(Ok(held)) if is_next(&held)) {
            bytes = self.backend.get(&key)?;
        }
        // Another version of this program may have written the same record in other words: what counts is its meaning,
        // what is compared are its bytes.
        let mut writer_bytes = writer.map(encode);
        loop {
            let Some(value) = &bytes else {
                return Err(RecordError::Missing(key));
            };
            let held: ShardRecord = decode(&key, value)?;
            if !is_next(&held) {
                return Ok(held);
            }
            let mut change = Transaction::default();
            change.compares.push(Compare::Is(key.clone(), value.clone()));
            if let Some(writer_bytes) = &writer_bytes {
                let written_by = writer_key(record.shard.vdi);
                change
                    .compares
                    .push(Compare::Is(written_by, writer_bytes.clone()));
            }
            for disk in record
                .replicas
                .iter()
                .filter(|disk| !held.replicas.contains(disk))
            {
                match self.takes_replicas_now(*disk)? {
                    Some(unchanged) => change.compares.push(unchanged),
                    None => return Err(RecordError::DiskLeaving(*disk)),
                }
            }
            put(&mut change, &key, record);
            if self.commit(&change)? == Commit::Done {
                return Ok(record.clone());
            }
            if let Some(writer) = writer {
                writer_bytes = Some(self.require_writer(record.shard.vdi, writer)?);
            }
            bytes = self.backend.get(&key)?;
        }
    }

    /// Puts many shards' records in as many transactions as they need, each only if `guard` holds.
    pub(super) fn put_shards(
        &self,
        shards: &[ShardRecord],
        guard: &Compare,
        limits: Limits,
    ) -> Result<Commit> {
        let mut left = shards;
        while !left.is_empty() {
            let mut change = Transaction::default();
            change.compares.push(guard.clone());
            let mut bytes = 0;
            for shard in left {
                let (key, value) = (shard_key(shard.shard), encode(shard));
                bytes += key.len() + value.len();
                let is_full = change.puts.len() == limits.operations || bytes > limits.bytes;
                if is_full && !change.puts.is_empty() {
                    break;
                }
                change.puts.push((key, value));
            }
            left = &left[change.puts.len()..];
            if self.commit(&change)? == Commit::Refused {
                return Ok(Commit::Refused);
            }
        }
        Ok(Commit::Done)
    }
}

/// A gap is damage.
fn in_order(vdi: VdiId, shards: &[ShardRecord]) -> Result<()> {
    for (shard, no) in shards.iter().zip(0..) {
        let wanted = ShardId { vdi, no: ShardNo(no) };
        if shard.shard != wanted {
            return Err(RecordError::Damaged {
                key: shard_key(wanted),
                reason: format!("the record of shard {} is in its place", shard.shard),
            });
        }
    }
    Ok(())
}

/// Whether `shards` records, with what else a transaction puts, are few enough for one.
pub(super) fn fit_in_one(shards: &[ShardRecord], limits: Option<Limits>) -> bool {
    /// What is put beside the shards: VDI, name, writer, next id, each small.
    const OTHERS: usize = 8;
    /// A VDI's record with all its attachments, and its keys.
    const OTHERS_BYTES: usize = 64 << 10;
    let Some(limits) = limits else {
        return true;
    };
    let bytes = |shard: &ShardRecord| shard_key(shard.shard).len() + encode(shard).len();
    shards.len() + OTHERS <= limits.operations
        && shards.iter().map(bytes).sum::<usize>() + OTHERS_BYTES <= limits.bytes
}
