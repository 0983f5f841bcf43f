//! A disk and an index in memory that answer at once and cost as little as can be.

use std::collections::BTreeMap;

use edge::uring::{Buf, Pool};
use edge::{BlockFile, DiskError, DiskOp, DiskOutcome, KvBatch, KvError, KvStore};
use types::{BLOCK_BYTES, Payload};

const BLOCK: usize = BLOCK_BYTES as usize;

/// Keeps the buffers that were written, by block: a write or a read of one block moves no byte.
pub struct MemoryDisk {
    blocks: Vec<Option<Buf>>,
    pool: Pool,
}

impl MemoryDisk {
    pub fn new(bytes: u64, pool: Pool) -> MemoryDisk {
        MemoryDisk {
            blocks: vec![None; (bytes / BLOCK_BYTES) as usize],
            pool,
        }
    }

    /// Performs an operation. Batch headers are let go: nothing recovers from this disk once it runs.
    pub fn perform(&mut self, operation: DiskOp<Buf>) -> DiskOutcome<Buf> {
        match operation {
            DiskOp::Write {
                offset,
                header,
                mut data,
            } => {
                let mut at = (offset / BLOCK_BYTES) as usize + 1;
                for part in data.drain(..) {
                    let count = part.length() / BLOCK;
                    if count == 1 {
                        self.blocks[at] = Some(part);
                    } else {
                        for index in 0..count {
                            self.blocks[at + index] = Some(part.slice(index * BLOCK, BLOCK));
                        }
                    }
                    at += count;
                }
                DiskOutcome::Written { header, data }
            }
            DiskOp::Read { offset, bytes } => {
                let at = (offset / BLOCK_BYTES) as usize;
                if bytes as usize == BLOCK {
                    return DiskOutcome::Read(self.blocks[at].clone().expect("a block that was written"));
                }
                let mut buffer = self.pool.take(bytes as usize);
                self.read_at(offset, &mut buffer).expect("memory can be read");
                DiskOutcome::Read(buffer.freeze())
            }
            DiskOp::Sync => DiskOutcome::Synced,
        }
    }
}

impl BlockFile for MemoryDisk {
    fn bytes(&self) -> u64 {
        self.blocks.len() as u64 * BLOCK_BYTES
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DiskError> {
        let blocks = &self.blocks[(offset / BLOCK_BYTES) as usize..];
        for (block, bytes) in blocks.iter().zip(buffer.chunks_exact_mut(BLOCK)) {
            match block {
                Some(block) => bytes.copy_from_slice(block.bytes()),
                None => bytes.fill(0),
            }
        }
        Ok(())
    }

    fn write_at(&mut self, offset: u64, buffer: &[u8]) -> Result<(), DiskError> {
        let first = (offset / BLOCK_BYTES) as usize;
        for (at, bytes) in (first..).zip(buffer.chunks_exact(BLOCK)) {
            self.blocks[at] = Some(self.pool.copy_of(bytes));
        }
        Ok(())
    }

    fn sync(&mut self) -> Result<(), DiskError> {
        Ok(())
    }
}

/// Holds what formatting puts there; checkpoints of the running store are only answered.
#[derive(Default)]
pub struct MemoryIndex(BTreeMap<Vec<u8>, Vec<u8>>);

impl KvStore for MemoryIndex {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, KvError> {
        Ok(self.0.get(key).cloned())
    }

    fn scan(&self, from: &[u8], to: &[u8], limit: usize) -> Result<Vec<(Vec<u8>, Vec<u8>)>, KvError> {
        let range = self.0.range(from.to_vec()..to.to_vec());
        Ok(range
            .take(limit)
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect())
    }

    fn apply(&mut self, batch: &KvBatch) -> Result<(), KvError> {
        for (from, to) in &batch.delete_ranges {
            self.0.retain(|key, _| !(from..to).contains(&key));
        }
        for key in &batch.deletes {
            self.0.remove(key);
        }
        self.0.extend(batch.puts.iter().cloned());
        Ok(())
    }
}
