//! The control store's record of one shard: who its replicas are and which of them hold everything.

use serde::{Deserialize, Serialize};
use types::{DiskId, Epoch, Incarnation, Seq, ShardId};

/// Entries of `ended` that are kept.
pub const ENDED_MAX: usize = 64;

/// Version 1 said nothing of `was_written`, version 2 nothing of `saved_by`.
const RECORD_VERSION: u8 = 3;

/// Where a past epoch ended: what a replica holds of that epoch above `end` was never chosen and is resynced away.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct EpochEnd {
    /// The epoch.
    pub epoch: Epoch,
    /// The last seq of it that counts.
    pub end: Seq,
}

/// Changed only by compare-and-swap on `epoch`, which grows by one with every change.
///
/// Invariants, asserted where it is built: `in_sync` is a subset of `replicas`, not empty once the shard has
/// taken a write; with three replicas `in_sync` never has fewer than two members (writes wait instead).
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ShardRecord {
    /// Which shard.
    pub shard: ShardId,
    /// Grows with every change of this record.
    pub epoch: Epoch,
    /// The disks that hold a replica, each on another failure domain where there are enough. One to three.
    pub replicas: Vec<DiskId>,
    /// Those that hold every completed write, up to what the last fence round finds missing.
    pub in_sync: Vec<DiskId>,
    /// Where past epochs ended, oldest first, kept while a replica that knows no later epoch exists; at most 64.
    pub ended: Vec<EpochEnd>,
    /// Set before the first write is numbered: from then on a disk that knows nothing of the shard has lost it.
    #[serde(default)]
    pub was_written: bool,
    /// The life of the writer that made this record of the one before; 0 for the first. Two writers may ask for the
    /// same change, and only one of them may believe that it was its own that was taken.
    #[serde(default)]
    pub saved_by: Incarnation,
}

impl ShardRecord {
    /// The record of a shard that was never written: every replica is in sync.
    ///
    /// # Panics
    /// Unless there are one to three different replicas: placement's promise.
    #[must_use]
    pub fn new(shard: ShardId, replicas: Vec<DiskId>) -> ShardRecord {
        assert!((1..=3).contains(&replicas.len()), "{} replicas", replicas.len());
        for (i, disk) in replicas.iter().enumerate() {
            assert!(!replicas[..i].contains(disk), "replica twice on {disk}");
        }
        ShardRecord {
            shard,
            epoch: Epoch(1),
            in_sync: replicas.clone(),
            replicas,
            ended: Vec::new(),
            was_written: false,
            saved_by: Incarnation(0),
        }
    }

    /// Acks that complete a write: 2 of 3; all that are in sync of 2; 1 of 1.
    #[must_use]
    pub fn write_quorum(&self) -> usize {
        match self.replicas.len() {
            3 => 2,
            2 => self.in_sync.len(),
            _ => 1,
        }
    }

    /// The form kept on the replicas' disks, for `weft pool recover`: version, shard, epoch, replicas with a mark on
    /// those in sync, past epochs, whether it was written, who saved it; little endian. Replicas come before everything that varies.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        assert!(self.replicas.len() <= 3 && self.ended.len() <= ENDED_MAX);
        let mut bytes = vec![RECORD_VERSION];
        bytes.extend_from_slice(&self.shard.to_u64().to_le_bytes());
        bytes.extend_from_slice(&self.epoch.0.to_le_bytes());
        bytes.push(self.replicas.len() as u8);
        for disk in &self.replicas {
            bytes.push(u8::from(self.in_sync.contains(disk)));
            bytes.extend_from_slice(&disk.0.to_le_bytes());
        }
        bytes.push(self.ended.len() as u8);
        for ended in &self.ended {
            bytes.extend_from_slice(&ended.epoch.0.to_le_bytes());
            bytes.extend_from_slice(&ended.end.0.to_le_bytes());
        }
        bytes.push(u8::from(self.was_written));
        bytes.extend_from_slice(&self.saved_by.0.to_le_bytes());
        bytes
    }

    /// Reads what [`encode`](Self::encode) wrote; `None` for anything else. `in_sync` comes back in replica order.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<ShardRecord> {
        fn take<'a>(bytes: &mut &'a [u8], count: usize) -> Option<&'a [u8]> {
            let (head, rest) = bytes.split_at_checked(count)?;
            *bytes = rest;
            Some(head)
        }
        fn number(bytes: &mut &[u8]) -> Option<u64> {
            Some(u64::from_le_bytes(take(bytes, 8)?.try_into().ok()?))
        }
        let rest = &mut &*bytes;
        let version = take(rest, 1)?[0];
        if !(1..=RECORD_VERSION).contains(&version) {
            return None;
        }
        let mut record = ShardRecord {
            shard: ShardId::from_u64(number(rest)?),
            epoch: Epoch(number(rest)?),
            replicas: Vec::new(),
            in_sync: Vec::new(),
            ended: Vec::new(),
            // The careful answer, where it is not said.
            was_written: true,
            saved_by: Incarnation(0),
        };
        let replicas = take(rest, 1)?[0];
        if !(1..=3).contains(&replicas) {
            return None;
        }
        for _ in 0..replicas {
            let is_in_sync = take(rest, 1)?[0] != 0;
            let disk = DiskId(u128::from_le_bytes(take(rest, 16)?.try_into().ok()?));
            if record.replicas.contains(&disk) {
                return None;
            }
            record.replicas.push(disk);
            if is_in_sync {
                record.in_sync.push(disk);
            }
        }
        let ended = take(rest, 1)?[0];
        if usize::from(ended) > ENDED_MAX {
            return None;
        }
        for _ in 0..ended {
            let epoch = Epoch(number(rest)?);
            record.ended.push(EpochEnd {
                epoch,
                end: Seq(number(rest)?),
            });
        }
        if version > 1 {
            record.was_written = take(rest, 1)?[0] != 0;
        }
        if version > 2 {
            record.saved_by = Incarnation(number(rest)?);
        }
        rest.is_empty().then_some(record)
    }

    /// In-sync replicas that must report before the writer knows every completed write.
    #[must_use]
    pub fn fence_quorum(&self) -> usize {
        self.in_sync.len() + 1 - self.write_quorum().min(self.in_sync.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use types::{ShardNo, VdiId};

    #[test]
    fn the_disk_form_survives_and_rubbish_does_not() {
        let mut record = ShardRecord::new(
            ShardId {
                vdi: VdiId(3),
                no: ShardNo(9),
            },
            vec![DiskId(7), DiskId(u128::MAX), DiskId(1)],
        );
        record.in_sync.remove(1);
        record.ended = vec![EpochEnd {
            epoch: Epoch(4),
            end: Seq(1 << 40),
        }];
        record.saved_by = Incarnation(6);
        let bytes = record.encode();
        assert_eq!(ShardRecord::decode(&bytes), Some(record.clone()));
        record.was_written = true;
        assert_eq!(ShardRecord::decode(&record.encode()), Some(record.clone()));
        record.saved_by = Incarnation(0);
        let mut second_version = record.encode();
        second_version.truncate(bytes.len() - 8);
        second_version[0] = 2;
        assert_eq!(ShardRecord::decode(&second_version), Some(record.clone()));
        let mut first_version = bytes[..bytes.len() - 9].to_vec();
        first_version[0] = 1;
        assert_eq!(ShardRecord::decode(&first_version), Some(record));
        for length in 0..bytes.len() {
            assert_eq!(ShardRecord::decode(&bytes[..length]), None, "{length} bytes");
        }
        assert_eq!(ShardRecord::decode(&[bytes, vec![0]].concat()), None);
    }

    #[test]
    fn fence_and_write_quorums_always_meet() {
        let shard = ShardId {
            vdi: VdiId(1),
            no: ShardNo(0),
        };
        for count in 1..=3u128 {
            let replicas: Vec<DiskId> = (1..=count).map(DiskId).collect();
            let mut record = ShardRecord::new(shard, replicas.clone());
            let least = if count == 3 { 2 } else { 1 };
            for in_sync in least..=replicas.len() {
                record.in_sync = replicas[..in_sync].to_vec();
                assert!(record.fence_quorum() + record.write_quorum() > record.in_sync.len());
                assert!(record.fence_quorum() <= record.in_sync.len());
            }
        }
    }
}
