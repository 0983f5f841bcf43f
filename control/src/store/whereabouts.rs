//! Which shards have a replica on which disk, kept beside the records: what a disk holds is asked far more often (each
//! second while one leaves) than it changes, and the records say it the other way round.
//!
//! ```text
//!  the backend notes the keys of shards that changed ──▶ asked: only those are read anew ──▶ answered from the index
//! ```
//! So a question costs what changed since the last one and what the disk holds, not what the pool holds. The first one
//! reads all shards' records once. A shard takes some 100 bytes here.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};

use replication::ShardRecord;
use types::{DiskId, ShardId, ShardNo, VdiId};

use super::vdis::vdi_key;
use super::{ControlStore, RecordError, Result, decode};
use crate::VdiRecord;
use crate::backend::Backend;
use crate::watchers::ChangedKeys;

const SHARDS: &str = "shard/";

/// A shard as it is placed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlacedShard {
    /// Which.
    pub shard: ShardId,
    /// Where.
    pub replicas: Vec<DiskId>,
    /// All of them are in sync.
    pub is_whole: bool,
}

/// See the module.
#[derive(Default)]
pub(super) struct Whereabouts {
    index: Mutex<Option<Index>>,
}

#[derive(Default)]
struct Index {
    /// Absent where the backend does not say what changed: all is read anew each time then.
    changed: Option<Arc<ChangedKeys>>,
    /// Disks by their number here.
    disks: Vec<DiskId>,
    numbers: BTreeMap<DiskId, u32>,
    shards: BTreeMap<ShardId, Places>,
    on: BTreeSet<(u32, ShardId)>,
    counts: BTreeMap<(u32, VdiId), u32>,
}

#[derive(Clone, Copy)]
struct Places {
    disks: [u32; 3],
    count: u8,
    is_whole: bool,
}

impl Places {
    fn disks(&self) -> &[u32] {
        &self.disks[..usize::from(self.count)]
    }
}

impl Index {
    fn number(&mut self, disk: DiskId) -> u32 {
        let disks = &mut self.disks;
        *self.numbers.entry(disk).or_insert_with(|| {
            disks.push(disk);
            u32::try_from(disks.len() - 1).expect("fewer than 2^32 disks")
        })
    }

    fn placed(&self, shard: ShardId, places: &Places) -> PlacedShard {
        let disk = |number: &u32| self.disks[*number as usize];
        PlacedShard {
            shard,
            replicas: places.disks().iter().map(disk).collect(),
            is_whole: places.is_whole,
        }
    }

    fn forget(&mut self, shard: ShardId) {
        let Some(places) = self.shards.remove(&shard) else {
            return;
        };
        for disk in places.disks() {
            self.on.remove(&(*disk, shard));
            let key = (*disk, shard.vdi);
            let count = self.counts.get_mut(&key).expect("counted with the shard");
            *count -= 1;
            if *count == 0 {
                self.counts.remove(&key);
            }
        }
    }

    fn set(&mut self, key: &str, record: &ShardRecord) -> Result<()> {
        let shard = record.shard;
        self.forget(shard);
        let mut places = Places {
            disks: [0; 3],
            count: 0,
            is_whole: record.in_sync.len() == record.replicas.len(),
        };
        if record.replicas.len() > places.disks.len() {
            return Err(RecordError::Damaged {
                key: key.to_owned(),
                reason: format!("it has {} replicas", record.replicas.len()),
            });
        }
        for (place, disk) in places.disks.iter_mut().zip(&record.replicas) {
            *place = self.number(*disk);
            places.count += 1;
        }
        for disk in places.disks() {
            if self.on.insert((*disk, shard)) {
                *self.counts.entry((*disk, shard.vdi)).or_default() += 1;
            }
        }
        self.shards.insert(shard, places);
        Ok(())
    }

    /// All of a VDI's, or, by the whole prefix, of all VDIs.
    fn forget_under(&mut self, prefix: &str) {
        let vdi = prefix
            .strip_prefix(SHARDS)
            .and_then(|rest| rest.strip_suffix('/'))
            .and_then(|vdi| u32::from_str_radix(vdi, 16).ok());
        let gone: Vec<ShardId> = match vdi.map(VdiId) {
            Some(vdi) => {
                let (first, last) = (ShardNo(0), ShardNo(u32::MAX));
                let of = |no| ShardId { vdi, no };
                self.shards
                    .range(of(first)..=of(last))
                    .map(|(shard, _)| *shard)
                    .collect()
            }
            None => self.shards.keys().copied().collect(),
        };
        for shard in gone {
            self.forget(shard);
        }
    }

    fn read_under(&mut self, backend: &dyn Backend, prefix: &str) -> Result<()> {
        self.forget_under(prefix);
        for (key, value) in backend.seen_list(prefix)? {
            let record = decode(&key, &value)?;
            self.set(&key, &record)?;
        }
        Ok(())
    }

    fn read(&mut self, backend: &dyn Backend, key: &str) -> Result<()> {
        if key.ends_with('/') {
            return self.read_under(backend, key);
        }
        match backend.seen(key)? {
            Some(value) => self.set(key, &decode(key, &value)?),
            None => {
                if let Some(shard) = shard_of(key) {
                    self.forget(shard);
                }
                Ok(())
            }
        }
    }

    fn refresh(&mut self, backend: &dyn Backend) -> Result<()> {
        let Some(changed) = self.changed.clone() else {
            return self.read_under(backend, SHARDS);
        };
        let mut keys = changed.take().into_iter();
        while let Some(key) = keys.next() {
            if let Err(error) = self.read(backend, &key) {
                changed.add(std::iter::once(key).chain(keys));
                return Err(error);
            }
        }
        Ok(())
    }
}

/// `shard/VDI/NO`, both in hexadecimal.
fn shard_of(key: &str) -> Option<ShardId> {
    let (vdi, no) = key.strip_prefix(SHARDS)?.split_once('/')?;
    Some(ShardId {
        vdi: VdiId(u32::from_str_radix(vdi, 16).ok()?),
        no: ShardNo(u32::from_str_radix(no, 16).ok()?),
    })
}

impl Whereabouts {
    /// The index as the records were seen last.
    fn fresh(&self, backend: &dyn Backend) -> Result<MutexGuard<'_, Option<Index>>> {
        let mut held = self.index.lock().expect("no panic while the index was held");
        if let Some(index) = held.as_mut() {
            index.refresh(backend)?;
        } else {
            // Asked to note changes before the first reading: none is missed.
            let mut index = Index {
                changed: backend.changed_keys(SHARDS),
                ..Index::default()
            };
            index.read_under(backend, SHARDS)?;
            *held = Some(index);
        }
        Ok(held)
    }
}

impl ControlStore {
    /// The shards that have a replica on `disk`, in order. Costs what changed since the last question and what is there.
    ///
    /// # Errors
    /// The backend's, or [`RecordError::Damaged`].
    pub fn shards_on(&self, disk: DiskId) -> Result<Vec<ShardId>> {
        let shards: Vec<ShardId> = {
            let held = self.whereabouts.fresh(&*self.backend)?;
            let index = held.as_ref().expect("just made");
            let Some(number) = index.numbers.get(&disk) else {
                return Ok(Vec::new());
            };
            let least = ShardId::from_u64(0);
            let range = index.on.range((*number, least)..);
            range
                .take_while(|(of, _)| of == number)
                .map(|(_, shard)| *shard)
                .collect()
        };
        self.of_vdis(shards, |shard| *shard)
    }

    /// Where one shard is, whether or not its VDI is there.
    ///
    /// # Errors
    /// As [`shards_on`](Self::shards_on).
    pub fn place_of(&self, shard: ShardId) -> Result<Option<PlacedShard>> {
        let held = self.whereabouts.fresh(&*self.backend)?;
        let index = held.as_ref().expect("just made");
        Ok(index.shards.get(&shard).map(|places| index.placed(shard, places)))
    }

    /// How many replicas of each VDI are on each disk. Those of shards by which a VDI is about to grow may be among them.
    ///
    /// # Errors
    /// As [`shards_on`](Self::shards_on).
    pub fn replicas_by_disk(&self) -> Result<BTreeMap<DiskId, BTreeMap<VdiId, u32>>> {
        let held = self.whereabouts.fresh(&*self.backend)?;
        let index = held.as_ref().expect("just made");
        let mut all: BTreeMap<DiskId, BTreeMap<VdiId, u32>> = BTreeMap::new();
        for ((disk, vdi), count) in &index.counts {
            let disk = index.disks[*disk as usize];
            all.entry(disk).or_default().insert(*vdi, *count);
        }
        Ok(all)
    }

    /// Where every shard is. Walks all of them, in memory.
    ///
    /// # Errors
    /// As [`shards_on`](Self::shards_on).
    pub fn placed_shards(&self) -> Result<Vec<PlacedShard>> {
        let shards = {
            let held = self.whereabouts.fresh(&*self.backend)?;
            let index = held.as_ref().expect("just made");
            let shards = index.shards.iter();
            shards
                .map(|(shard, places)| index.placed(*shard, places))
                .collect()
        };
        self.of_vdis(shards, |placed: &PlacedShard| placed.shard)
    }

    /// Those of VDIs that are there, within their size: a VDI that is being made, or is about to grow, has records of
    /// shards that nobody looks at yet.
    fn of_vdis<T>(&self, shards: Vec<T>, of: impl Fn(&T) -> ShardId) -> Result<Vec<T>> {
        let mut counts: BTreeMap<VdiId, u32> = BTreeMap::new();
        let mut kept = Vec::with_capacity(shards.len());
        for item in shards {
            let shard = of(&item);
            let count = match counts.get(&shard.vdi) {
                Some(count) => *count,
                None => {
                    let record: Option<VdiRecord> = self.seen(&vdi_key(shard.vdi))?;
                    let count = record.map_or(0, |record| record.shard_count());
                    counts.insert(shard.vdi, count);
                    count
                }
            };
            if shard.no.0 < count {
                kept.push(item);
            }
        }
        Ok(kept)
    }
}
