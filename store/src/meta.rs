//! The index checkpoint: keys and values other than leaves, and how a checkpoint is put together.
//!
//! | key | value |
//! |---|---|
//! | `m` | this file's [`Meta`] |
//! | `s` row | 256 rows of the segment table |
//! | `h` shard | one shard |
//! | `l` shard layer leaf | one leaf |

use edge::KvBatch;
use types::{DiskId, ShardId};

use crate::LeafKey;
use crate::bytes::{Reader, put_varint};
use crate::leaf::{ENCODED_MAX, Leaf, encode_key};
use crate::ledger::Ledger;

pub(crate) const META_KEY: &[u8] = b"m";
const VERSION: u8 = 1;
/// More fences than this are not kept: they only guard against writes of processes dead for that many starts.
pub(crate) const OPENS_MAX: usize = 80;

/// Checkpoint ids of a life begin at the disk's open count, shifted by this.
pub(crate) const LIFE_BITS: u32 = 32;

/// Which state of the log the index is a checkpoint of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Meta {
    pub(crate) disk: DiskId,
    /// Grows with every checkpoint.
    pub(crate) id: u64,
    /// Every batch up to this number is in the index.
    pub(crate) position: u64,
    /// Later batches are in segments of this generation or later.
    pub(crate) scan_from: u64,
    pub(crate) opens: Vec<(u64, u64)>,
    /// A rebuild was under way: start it again, the rest of the log may be in any older segment.
    pub(crate) is_rebuilding: bool,
}

impl Meta {
    /// The open count of the disk when this checkpoint was made.
    pub(crate) fn life(&self) -> u64 {
        self.id >> LIFE_BITS
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = vec![VERSION, u8::from(self.is_rebuilding)];
        out.extend_from_slice(&self.disk.0.to_le_bytes());
        for value in [self.id, self.position, self.scan_from, self.opens.len() as u64] {
            put_varint(&mut out, value);
        }
        for (generation, number) in &self.opens {
            put_varint(&mut out, *generation);
            put_varint(&mut out, *number);
        }
        let crc = crc32c::crc32c(&out);
        out.extend_from_slice(&crc.to_le_bytes());
        out
    }

    pub(crate) fn decode(bytes: &[u8]) -> Option<Meta> {
        let (content, crc) = bytes.split_last_chunk::<4>()?;
        if u32::from_le_bytes(*crc) != crc32c::crc32c(content) {
            return None;
        }
        let mut fields = Reader::new(content);
        if fields.u8()? != VERSION {
            return None;
        }
        let is_rebuilding = fields.u8()? != 0;
        let disk = DiskId(fields.u128()?);
        let id = fields.varint()?;
        let position = fields.varint()?;
        let scan_from = fields.varint()?;
        let mut opens = Vec::new();
        for _ in 0..fields.varint()? {
            opens.push((fields.varint()?, fields.varint()?));
        }
        let meta = Meta {
            disk,
            id,
            position,
            scan_from,
            opens,
            is_rebuilding,
        };
        fields.is_empty().then_some(meta)
    }
}

pub(crate) fn row_key(row: u32) -> Vec<u8> {
    let mut key = vec![b's'];
    key.extend_from_slice(&row.to_be_bytes());
    key
}

pub(crate) fn shard_key(shard: ShardId) -> Vec<u8> {
    let mut key = vec![b'h'];
    key.extend_from_slice(&shard.to_u64().to_be_bytes());
    key
}

/// Everything that changed since the last checkpoint, as one atomic batch. Leaves that became empty leave the
/// index and their shard's set.
pub(crate) fn checkpoint_batch<'a>(
    ledger: &mut Ledger,
    meta: &Meta,
    leaves: impl Iterator<Item = (LeafKey, &'a Leaf)>,
) -> KvBatch {
    let mut batch = KvBatch::default();
    let mut encoded = Box::new([0; ENCODED_MAX]);
    for (key, leaf) in leaves {
        if leaf.used() > 0 {
            batch
                .puts
                .push((encode_key(key).to_vec(), leaf.encode(key, &mut encoded)));
            continue;
        }
        batch.deletes.push(encode_key(key).to_vec());
        if let Some(shard) = ledger.shards.get_mut(&key.shard) {
            if let Some(set) = shard.layers.get_mut(&key.layer) {
                set.remove(key.leaf);
                if set.is_empty() && !shard.unfolded.contains_key(&key.layer) {
                    shard.layers.remove(&key.layer);
                }
            }
            ledger.dirty_shards.insert(key.shard);
        }
    }
    for key in std::mem::take(&mut ledger.folded) {
        // Another life of the shard may have such a leaf again.
        let shard = ledger.shards.get(&key.shard);
        if !shard.is_some_and(|shard| shard.has_leaf(key.layer, key.leaf)) {
            batch.deletes.push(encode_key(key).to_vec());
        }
    }
    for id in std::mem::take(&mut ledger.dirty_shards) {
        match ledger.shards.get(&id).filter(|shard| !shard.is_void()) {
            Some(shard) => batch.puts.push((shard_key(id), shard.encode())),
            None => batch.deletes.push(shard_key(id)),
        }
    }
    for (row, value) in ledger.segments.take_dirty_rows() {
        batch.puts.push((row_key(row), value));
    }
    batch.puts.push((META_KEY.to_vec(), meta.encode()));
    batch
}

#[cfg(test)]
mod tests {
    use super::*;

    proptest::proptest! {
        #[test]
        fn round_trip(is_rebuilding: bool, disk: u128, id: u64, position: u64, scan_from: u64, opens: Vec<(u64, u64)>) {
            let meta = Meta { disk: DiskId(disk), id, position, scan_from, opens, is_rebuilding };
            let mut bytes = meta.encode();
            proptest::prop_assert_eq!(Meta::decode(&bytes), Some(meta));
            bytes[3] ^= 4;
            proptest::prop_assert_eq!(Meta::decode(&bytes), None);
        }

        #[test]
        fn any_signed_bytes_are_safe(mut bytes: Vec<u8>) {
            bytes.insert(0, VERSION);
            let crc = crc32c::crc32c(&bytes);
            bytes.extend_from_slice(&crc.to_le_bytes());
            let _ = Meta::decode(&bytes);
        }
    }
}
