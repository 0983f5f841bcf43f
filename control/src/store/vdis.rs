//! Records of VDIs: made, changed, taken over by another writer, forgotten.

use replication::{ShardRecord, Sharing};
use types::{HostId, Incarnation, ShardId, ShardNo, VdiId};

use super::disks::PLACEMENT;
use super::shards::{fit_in_one, shard_key, shards_prefix};
use super::snapshots::{layers_key, snapshots_prefix};
use super::{ControlStore, Held, RecordError, Result, encode, put};
use crate::backend::{BackendError, Commit, Compare, Transaction};
use crate::{VdiRecord, VdiWriter};

pub(super) const NEXT_ID: &str = "next-vdi-id";

pub(super) fn vdi_key(id: VdiId) -> String {
    format!("vdi/{:08x}", id.0)
}

pub(super) fn writer_key(id: VdiId) -> String {
    format!("vdi-writer/{:08x}", id.0)
}

/// Says for ever that a VDI was deleted: what a disk that was away still holds of it may go.
pub(super) fn gone_key(id: VdiId) -> String {
    format!("vdi-gone/{:08x}", id.0)
}

pub(super) fn name_key(name: &str) -> String {
    format!("vdi-name/{name}")
}

/// The first incarnation after the VDI was last taken from a host that may live on and read; absent: it never was.
fn since_key(id: VdiId) -> String {
    format!("vdi-since/{:08x}", id.0)
}

fn making_key(id: VdiId) -> String {
    format!("vdi-making/{:08x}", id.0)
}

/// By what a VDI's shards were placed, and who will write it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placed {
    /// The count of [`ControlStore::placement`] before the disks were looked at.
    pub placement: u64,
    /// Its first writer, where there are several hosts.
    pub writer: Option<VdiWriter>,
}

impl ControlStore {
    /// The id that the next VDI gets; not taken until [`create_vdi`](Self::create_vdi).
    ///
    /// # Errors
    /// The backend's, or ids are used up.
    pub fn next_vdi_id(&self) -> Result<VdiId> {
        next_id(&self.held(NEXT_ID)?)
    }

    /// The same as last heard; 1 before the first VDI.
    ///
    /// # Errors
    /// The backend's.
    pub fn next_vdi_id_seen(&self) -> Result<u32> {
        Ok(self.seen(NEXT_ID)?.unwrap_or(1))
    }

    /// Makes a VDI with the records of all its shards. It is there for others with all of them, or not at all.
    ///
    /// # Errors
    /// The backend's, [`RecordError::NameTaken`], or [`RecordError::Overtaken`]: another host took the id or changed
    /// the disks meanwhile, and the caller places anew.
    ///
    /// # Panics
    /// Unless the record has revision 1, and a shard record for each of its shards in order: the caller builds them
    /// from one another.
    pub fn create_vdi(&self, vdi: &VdiRecord, shards: &[ShardRecord], placed: Placed) -> Result<()> {
        assert_eq!(vdi.revision, 1, "a new record has revision 1");
        assert_follow(vdi, 0, shards);
        assert_eq!(
            shards.len(),
            vdi.shard_count() as usize,
            "one record for each shard"
        );
        let next = self.held(NEXT_ID)?;
        if next_id(&next)? != vdi.id {
            return Err(RecordError::Overtaken);
        }
        let takes_id = |change: &mut Transaction| {
            change.compares.push(next.unchanged(NEXT_ID));
            change.compares.push(Compare::Absent(name_key(&vdi.name)));
            put(change, NEXT_ID, &(vdi.id.0 + 1));
        };
        if fit_in_one(shards, self.backend.limits()) {
            let mut change = self.appears(vdi, placed)?;
            // Once each: the two halves are one here.
            change
                .compares
                .retain(|compare| *compare != Compare::Absent(name_key(&vdi.name)));
            takes_id(&mut change);
            add_shards(&mut change, shards);
            return self.finish_making(vdi, &change);
        }
        self.make_in_parts(vdi, shards, placed, takes_id)
    }

    /// Too much for one transaction: a marker first, which takes the id and says who is at it; the shards' records
    /// in parts; the VDI itself with the last. What is left by a daemon that died between is found by its marker.
    fn make_in_parts(
        &self,
        vdi: &VdiRecord,
        shards: &[ShardRecord],
        placed: Placed,
        takes_id: impl Fn(&mut Transaction),
    ) -> Result<()> {
        let limits = self.backend.limits().expect("without limits one would do");
        let making = making_key(vdi.id);
        let marker = encode(&placed.writer);
        let mut first = Transaction::default();
        takes_id(&mut first);
        first.puts.push((making.clone(), marker.clone()));
        if self.commit(&first)? == Commit::Refused {
            return self.why_not_made(vdi);
        }
        let guard = Compare::Is(making.clone(), marker);
        let made = self
            .put_shards(shards, &guard, limits)
            .and_then(|parts| match parts {
                Commit::Refused => Err(RecordError::Overtaken),
                Commit::Done => {
                    let mut last = self.appears(vdi, placed)?;
                    last.compares.push(guard);
                    last.deletes.push(making.clone());
                    self.finish_making(vdi, &last)
                }
            });
        match &made {
            // Nobody knows whether it is there; whoever starts next finds the marker if it is not.
            Ok(()) | Err(RecordError::Backend(BackendError::Unknown { .. })) => {}
            Err(_) => {
                // What could not be cleaned now is at the next start.
                if let Err(error) = self.unmake(vdi.id) {
                    tracing::warn!(vdi = %vdi.id, %error, "leftovers of a VDI that was not made stay for now");
                }
            }
        }
        made
    }

    /// The transaction by which others see the VDI.
    fn appears(&self, vdi: &VdiRecord, placed: Placed) -> Result<Transaction> {
        let mut change = Transaction::default();
        let placement = self.held::<u64>(PLACEMENT)?;
        if placement.record.unwrap_or(0) != placed.placement {
            return Err(RecordError::Overtaken);
        }
        change.compares.push(placement.unchanged(PLACEMENT));
        change.compares.push(Compare::Absent(name_key(&vdi.name)));
        put(&mut change, &vdi_key(vdi.id), vdi);
        put(&mut change, &name_key(&vdi.name), &vdi.id);
        if let Some(writer) = &placed.writer {
            put(&mut change, &writer_key(vdi.id), writer);
        }
        Ok(change)
    }

    fn finish_making(&self, vdi: &VdiRecord, change: &Transaction) -> Result<()> {
        match self.commit(change)? {
            Commit::Done => Ok(()),
            Commit::Refused => self.why_not_made(vdi),
        }
    }

    fn why_not_made(&self, vdi: &VdiRecord) -> Result<()> {
        match self.held::<VdiId>(&name_key(&vdi.name))?.record {
            Some(_) => Err(RecordError::NameTaken(vdi.name.clone())),
            None => Err(RecordError::Overtaken),
        }
    }

    fn unmake(&self, id: VdiId) -> Result<()> {
        let making = making_key(id);
        let Some(marker) = self.backend.get(&making)? else {
            return Ok(());
        };
        let mut change = Transaction::default();
        change.compares.push(Compare::Is(making.clone(), marker));
        change.compares.push(Compare::Absent(vdi_key(id)));
        change.deletes.push(making);
        change.delete_prefixes.push(shards_prefix(id));
        // Refused: somebody else was here first.
        let _: Commit = self.commit(&change)?;
        Ok(())
    }

    /// Removes what daemons left that died while they made a VDI in parts: those that are not alive with the
    /// incarnation they began with. Returns how many VDIs that were.
    ///
    /// # Errors
    /// The backend's.
    pub fn clean_unmade(&self) -> Result<usize> {
        let mut cleaned = 0;
        for (key, value) in self.backend.list("vdi-making/")? {
            let maker: Option<VdiWriter> = super::decode(&key, &value)?;
            let is_at_it = match maker {
                Some(maker) => self
                    .alive_now(maker.host)?
                    .is_some_and(|alive| alive.incarnation == maker.incarnation),
                None => false,
            };
            let id = key
                .rsplit('/')
                .next()
                .and_then(|digits| u32::from_str_radix(digits, 16).ok());
            if let (Some(id), false) = (id, is_at_it) {
                self.unmake(VdiId(id))?;
                cleaned += 1;
            }
        }
        Ok(cleaned)
    }

    /// One VDI.
    ///
    /// # Errors
    /// The backend's.
    pub fn vdi(&self, id: VdiId) -> Result<Option<VdiRecord>> {
        self.seen(&vdi_key(id))
    }

    /// The VDI of this name, unless it is being deleted.
    ///
    /// # Errors
    /// The backend's.
    pub fn vdi_by_name(&self, name: &str) -> Result<Option<VdiRecord>> {
        let Some(id) = self.seen::<VdiId>(&name_key(name))? else {
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
    /// The backend's.
    pub fn vdis(&self) -> Result<Vec<VdiRecord>> {
        self.seen_list("vdi/")
    }

    /// The VDIs whose record can be read, and why the others cannot: one damaged record must not keep a daemon from
    /// serving all else. For opening only: who places or removes by what is held where asks [`vdis`](Self::vdis).
    ///
    /// # Errors
    /// The backend's, and [`RecordError::TooNew`].
    pub fn readable_vdis(&self) -> Result<(Vec<VdiRecord>, Vec<RecordError>)> {
        let (mut vdis, mut damaged) = (Vec::new(), Vec::new());
        for (key, value) in self.backend.seen_list("vdi/")? {
            match super::decode(&key, &value) {
                Ok(vdi) => vdis.push(vdi),
                Err(error @ RecordError::Damaged { .. }) => damaged.push(error),
                Err(error) => return Err(error),
            }
        }
        Ok((vdis, damaged))
    }

    /// Who writes a VDI, where there are several hosts.
    ///
    /// # Errors
    /// The backend's.
    pub fn writer(&self, id: VdiId) -> Result<Option<VdiWriter>> {
        self.seen(&writer_key(id))
    }

    /// Replaces a VDI's record if the one held has the revision of `vdi`; returns the new record, one revision on.
    /// A record that begins to be deleted gives its name free. The size changes in
    /// [`resize_vdi`](Self::resize_vdi).
    ///
    /// # Errors
    /// The backend's, [`RecordError::Missing`] or [`RecordError::OldRevision`].
    ///
    /// # Panics
    /// When `vdi` changes the name or the size, or takes a deletion back.
    pub fn update_vdi(&self, vdi: &VdiRecord) -> Result<VdiRecord> {
        let (held, unchanged) = self.held_vdi(vdi)?;
        assert_eq!(held.bytes, vdi.bytes, "the size changes in resize_vdi");
        let mut change = Transaction::default();
        change.compares.push(unchanged);
        if vdi.deleting && !held.deleting {
            change.deletes.push(name_key(&vdi.name));
        }
        self.swap_vdi(vdi, change)
    }

    /// Makes a VDI larger: `vdi` with the new size as read before, and the records of the shards it gains, placed as
    /// of `placed`. Where those are too many for one transaction they come before the size: until it is there nobody
    /// looks at them, and who grows the VDI next overwrites them.
    ///
    /// # Errors
    /// The backend's, [`RecordError::Missing`], [`RecordError::OldRevision`] or [`RecordError::Overtaken`].
    ///
    /// # Panics
    /// When it would shrink, or `added` are not just the shards that it gains.
    pub fn resize_vdi(&self, vdi: &VdiRecord, added: &[ShardRecord], placed: Placed) -> Result<VdiRecord> {
        let (held, unchanged) = self.held_vdi(vdi)?;
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
        let placement = self.held::<u64>(PLACEMENT)?;
        if placement.record.unwrap_or(0) != placed.placement {
            return Err(RecordError::Overtaken);
        }
        let mut change = Transaction::default();
        change.compares.push(placement.unchanged(PLACEMENT));
        match self.backend.limits() {
            Some(limits) if !fit_in_one(added, Some(limits)) => {
                if self.put_shards(added, &unchanged, limits)? == Commit::Refused {
                    self.held_vdi(vdi)?;
                    return Err(RecordError::Overtaken);
                }
            }
            _ => add_shards(&mut change, added),
        }
        change.compares.push(unchanged);
        self.swap_vdi(vdi, change)
    }

    /// Forgets a VDI that was being deleted, with the records of its shards and snapshots.
    ///
    /// # Errors
    /// The backend's.
    ///
    /// # Panics
    /// When it is not being deleted: data may be on disks.
    pub fn forget_vdi(&self, id: VdiId) -> Result<()> {
        let Some(vdi) = self.held::<VdiRecord>(&vdi_key(id))?.record else {
            return Ok(());
        };
        assert!(vdi.deleting, "VDI {id} is forgotten but not being deleted");
        // No comparison: what is being deleted stays so, and its id comes never again.
        let mut change = Transaction {
            deletes: vec![vdi_key(id), writer_key(id), since_key(id), layers_key(id)],
            delete_prefixes: vec![shards_prefix(id), snapshots_prefix(id)],
            ..Transaction::default()
        };
        put(&mut change, &gone_key(id), &true);
        let _: Commit = self.commit(&change)?;
        Ok(())
    }

    /// Makes `host` with `incarnation` the writer of a VDI, if nobody is, or the present writer is that host itself
    /// in a past life, or serves no guest, or its host is dead. The old writer can raise no epoch from here on; the
    /// new one reads the shards' records now, not before. Guests of another host's addresses are not taken along.
    ///
    /// # Errors
    /// The backend's, [`RecordError::Missing`], [`RecordError::HeldElsewhere`], or [`RecordError::NotTheWriter`] when
    /// somebody with a higher incarnation is: a later life of this host, or another that was quicker.
    pub fn take_vdi(&self, id: VdiId, host: HostId, incarnation: Incarnation) -> Result<VdiRecord> {
        let ours = VdiWriter { host, incarnation };
        let (vdi_key, writer_key) = (vdi_key(id), writer_key(id));
        loop {
            let vdi: Held<VdiRecord> = self.held(&vdi_key)?;
            let writer: Held<VdiWriter> = self.held(&writer_key)?;
            let mut change = Transaction::default();
            change.compares.push(vdi.unchanged(&vdi_key));
            change.compares.push(writer.unchanged(&writer_key));
            let Some(mut record) = vdi.record else {
                return Err(RecordError::Missing(vdi_key));
            };
            // Its tokens would be lower: it could fence nobody out.
            if let Some(now) = writer.record.filter(|now| now.incarnation > incarnation) {
                return Err(not_the_writer(id, &ours, now));
            }
            // Also where the old one serves no guest: a door is closed after the record says so.
            if writer.record.is_none_or(|old| old.host != host) {
                put(&mut change, &since_key(id), &incarnation);
            }
            if let Some(old) = writer.record.filter(|old| old.host != host) {
                if !record.attachments.is_empty() {
                    change.compares.push(self.must_be_dead(&record, old.host)?);
                }
                record.attachments.clear();
            }
            record.revision += 1;
            put(&mut change, &vdi_key, &record);
            put(&mut change, &writer_key, &ours);
            if self.commit(&change)? == Commit::Done {
                return Ok(record);
            }
        }
    }

    /// What the writers of a VDI are to know of other hosts; asked after [`take_vdi`](Self::take_vdi).
    ///
    /// # Errors
    /// The backend's.
    pub fn sharing(&self, id: VdiId) -> Result<Sharing> {
        if self.backend.leases().is_none() {
            return Ok(Sharing::Alone);
        }
        let since = self.held::<Incarnation>(&since_key(id))?.record;
        Ok(Sharing::Cluster {
            since: since.unwrap_or(Incarnation(0)),
        })
    }

    /// Fails unless `ours` may still write the VDI; else the bytes in which that stands.
    pub(super) fn require_writer(&self, id: VdiId, ours: &VdiWriter) -> Result<Vec<u8>> {
        let key = writer_key(id);
        let held: Held<VdiWriter> = self.held(&key)?;
        match (held.record, held.bytes) {
            (Some(now), Some(bytes)) if now == *ours => Ok(bytes),
            (Some(now), _) => Err(not_the_writer(id, ours, now)),
            // The VDI is gone, or the records are: nobody took it from us.
            (None, _) => Err(RecordError::Missing(key)),
        }
    }

    fn held_vdi(&self, vdi: &VdiRecord) -> Result<(VdiRecord, Compare)> {
        let key = vdi_key(vdi.id);
        let with_bytes = self.held::<VdiRecord>(&key)?;
        let unchanged = with_bytes.unchanged(&key);
        let Some(held) = with_bytes.record else {
            return Err(RecordError::Missing(key));
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
        Ok((held, unchanged))
    }

    fn swap_vdi(&self, vdi: &VdiRecord, mut change: Transaction) -> Result<VdiRecord> {
        let next = VdiRecord {
            revision: vdi.revision + 1,
            ..vdi.clone()
        };
        put(&mut change, &vdi_key(vdi.id), &next);
        if self.commit(&change)? == Commit::Done {
            return Ok(next);
        }
        self.held_vdi(vdi)?;
        // The VDI is as it was: it was the disks that changed.
        Err(RecordError::Overtaken)
    }
}

fn not_the_writer(vdi: VdiId, ours: &VdiWriter, now: VdiWriter) -> RecordError {
    RecordError::NotTheWriter {
        vdi,
        ours: ours.incarnation,
        now,
    }
}

fn next_id(held: &Held<u32>) -> Result<VdiId> {
    match held.record.unwrap_or(1) {
        u32::MAX => Err(RecordError::IdsExhausted),
        next => Ok(VdiId(next)),
    }
}

fn add_shards(change: &mut Transaction, shards: &[ShardRecord]) {
    for shard in shards {
        put(change, &shard_key(shard.shard), shard);
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
