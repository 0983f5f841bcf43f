//! Records that were rebuilt from the disks, put where the lost ones were.

use super::disks::{PLACEMENT, disk_key};
use super::shards::shard_key;
use super::snapshots::{layers_key, layers_of_head};
use super::vdis::{NEXT_ID, name_key, vdi_key};
use super::{ControlStore, Result, put};
use crate::backend::{Commit, Transaction};
use crate::recover::Recovery;
use crate::{PoolRecord, RecordError, VdiRecord};

/// Everything that a recovery decides anew. Hosts say themselves who they are when they start.
const REPLACED: [&str; 9] = [
    "disk/",
    "vdi/",
    "vdi-name/",
    "vdi-writer/",
    "vdi-making/",
    "shard/",
    "layers/",
    "snapshot/",
    "host-alive/",
];

impl ControlStore {
    /// What is in the store that a recovery would overwrite: the pool, and the VDIs' names.
    ///
    /// # Errors
    /// The backend's.
    pub fn overwritten(&self) -> Result<(Option<PoolRecord>, Vec<String>)> {
        let pool = self.held("pool")?.record;
        let vdis: Vec<VdiRecord> = super::decode_all(&self.backend.list("vdi/")?)?;
        Ok((pool, vdis.into_iter().map(|vdi| vdi.name).collect()))
    }

    /// Puts rebuilt records in the place of whatever is there. The pool's record goes first and comes last: while it is
    /// not there no daemon uses the others, so a recovery that was cut short is just done again.
    ///
    /// # Errors
    /// The backend's.
    ///
    /// # Panics
    /// When the recovery has problems that nobody solved.
    pub fn put_recovered(&self, recovery: &Recovery) -> Result<()> {
        assert!(recovery.problems.is_empty(), "{:?}", recovery.problems);
        let before = self.held::<PoolRecord>("pool")?.record;
        let highest = self.held::<u64>("incarnation")?.record.unwrap_or(0);
        let next_id = self.held::<u32>(NEXT_ID)?.record.unwrap_or(1);
        let placement = self.held::<u64>(PLACEMENT)?.record.unwrap_or(0);
        let clear = Transaction {
            deletes: vec!["pool".to_owned()],
            delete_prefixes: REPLACED.map(str::to_owned).to_vec(),
            ..Transaction::default()
        };
        self.must_commit(&clear)?;
        let mut all = Transaction::default();
        for disk in &recovery.disks {
            put(&mut all, &disk_key(disk.id), disk);
        }
        for vdi in recovery.vdis.iter().filter(|vdi| !vdi.is_deleted) {
            put(&mut all, &vdi_key(vdi.record.id), &vdi.record);
            put(&mut all, &name_key(&vdi.record.name), &vdi.record.id);
            for shard in &vdi.shards {
                put(&mut all, &shard_key(shard.shard), shard);
            }
            if vdi.record.head.0 > 0 {
                let layers = layers_of_head(&vdi.lineage, vdi.record.revision);
                put(&mut all, &layers_key(vdi.record.id), &layers);
            }
        }
        self.put_in_parts(all.puts)?;
        let same_pool = before.filter(|before| before.id == recovery.pool.id);
        let recovered = same_pool.map_or(0, |before| before.recovered + 1);
        let pool = PoolRecord {
            recovered: recovery.pool.recovered.max(recovered),
            ..recovery.pool.clone()
        };
        let mut last = Transaction::default();
        put(&mut last, "incarnation", &recovery.incarnation.0.max(highest));
        put(&mut last, NEXT_ID, &recovery.next_vdi_id.max(next_id));
        put(&mut last, PLACEMENT, &(placement + 1));
        put(&mut last, "pool", &pool);
        self.must_commit(&last)
    }

    fn put_in_parts(&self, puts: Vec<(String, Vec<u8>)>) -> Result<()> {
        let Some(limits) = self.backend.limits() else {
            return self.must_commit(&Transaction {
                puts,
                ..Transaction::default()
            });
        };
        let mut part = Transaction::default();
        let mut bytes = 0;
        for (key, value) in puts {
            let more = key.len() + value.len();
            if part.puts.len() == limits.operations || bytes + more > limits.bytes {
                self.must_commit(&std::mem::take(&mut part))?;
                bytes = 0;
            }
            bytes += more;
            part.puts.push((key, value));
        }
        self.must_commit(&part)
    }

    fn must_commit(&self, transaction: &Transaction) -> Result<()> {
        match self.commit(transaction)? {
            Commit::Done => Ok(()),
            Commit::Refused => Err(RecordError::Overtaken),
        }
    }
}
