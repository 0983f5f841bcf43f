//! Records of disks.

use types::DiskId;

use super::{ControlStore, Result, encode, put};
use crate::backend::{Commit, Compare, Transaction};
use crate::{DiskRecord, DiskState};

/// Counts the changes of which disks may take replicas. Whoever makes shards compares it, so that none is placed on a
/// disk that another host is letting go.
pub(super) const PLACEMENT: &str = "placement";

/// Counts the requests to make disks evenly full; hosts heed its changes.
const REBALANCE: &str = "rebalance";

pub(super) fn disk_key(id: DiskId) -> String {
    format!("disk/{id}")
}

impl ControlStore {
    /// One disk.
    ///
    /// # Errors
    /// The backend's.
    pub fn disk(&self, id: DiskId) -> Result<Option<DiskRecord>> {
        self.seen(&disk_key(id))
    }

    /// All disks, by id.
    ///
    /// # Errors
    /// The backend's.
    pub fn disks(&self) -> Result<Vec<DiskRecord>> {
        self.seen_list("disk/")
    }

    /// Keeps a disk's record, whatever it was: for its first, and for one that is taken back.
    ///
    /// # Errors
    /// The backend's.
    pub fn put_disk(&self, disk: &DiskRecord) -> Result<()> {
        let changed = self.alter_disk(disk.id, |held| {
            *held = Some(disk.clone());
        })?;
        assert!(changed.is_some(), "it was put");
        Ok(())
    }

    /// Changes a disk's record by `change`, which may be called several times; `None` when there is none.
    ///
    /// # Errors
    /// The backend's.
    pub fn change_disk(&self, id: DiskId, change: impl Fn(&mut DiskRecord)) -> Result<Option<DiskRecord>> {
        self.alter_disk(id, |held| {
            if let Some(disk) = held {
                change(disk);
            }
        })
    }

    /// Forgets a disk. That no shard is placed on it any more is for the caller to know, from records that he looked
    /// at after he saw that the disk is [`DiskState::Removing`]: nothing is placed on it from then on.
    ///
    /// # Errors
    /// The backend's.
    pub fn delete_disk(&self, id: DiskId) -> Result<()> {
        let change = Transaction {
            deletes: vec![disk_key(id)],
            ..Transaction::default()
        };
        let done = self.commit(&change)?;
        assert_eq!(done, Commit::Done, "nothing was compared");
        Ok(())
    }

    /// The count of changes of who may take replicas; read before disks are looked at.
    ///
    /// # Errors
    /// The backend's.
    pub fn placement(&self) -> Result<u64> {
        Ok(self.seen(PLACEMENT)?.unwrap_or(0))
    }

    /// How often somebody asked that disks be made evenly full.
    ///
    /// # Errors
    /// The backend's.
    pub fn rebalances_asked(&self) -> Result<u64> {
        Ok(self.seen(REBALANCE)?.unwrap_or(0))
    }

    /// Asks all hosts to make the disks evenly full.
    ///
    /// # Errors
    /// The backend's.
    pub fn ask_to_rebalance(&self) -> Result<()> {
        loop {
            let held = self.held::<u64>(REBALANCE)?;
            let mut change = Transaction::default();
            change.compares.push(held.unchanged(REBALANCE));
            put(&mut change, REBALANCE, &(held.record.unwrap_or(0) + 1));
            if self.commit(&change)? == Commit::Done {
                return Ok(());
            }
        }
    }

    /// The comparison by which a replica may be placed on `id` from what is held now; `None` when it may not.
    pub(super) fn takes_replicas_now(&self, id: DiskId) -> Result<Option<Compare>> {
        let key = disk_key(id);
        let held = self.held::<DiskRecord>(&key)?;
        let is_leaving = held
            .record
            .as_ref()
            .is_none_or(|disk| disk.state == DiskState::Removing);
        Ok((!is_leaving).then(|| held.unchanged(&key)))
    }

    fn alter_disk(&self, id: DiskId, change: impl Fn(&mut Option<DiskRecord>)) -> Result<Option<DiskRecord>> {
        let key = disk_key(id);
        loop {
            let held = self.held::<DiskRecord>(&key)?;
            let mut next = held.record.clone();
            change(&mut next);
            let Some(disk) = next else {
                return Ok(None);
            };
            if held.bytes.as_deref() == Some(encode(&disk).as_slice()) {
                return Ok(Some(disk));
            }
            let mut transaction = Transaction::default();
            transaction.compares.push(held.unchanged(&key));
            put(&mut transaction, &key, &disk);
            if takes_replicas(held.record.as_ref()) != takes_replicas(Some(&disk)) {
                let held = self.held::<u64>(PLACEMENT)?;
                transaction.compares.push(held.unchanged(PLACEMENT));
                put(&mut transaction, PLACEMENT, &(held.record.unwrap_or(0) + 1));
            }
            if self.commit(&transaction)? == Commit::Done {
                return Ok(Some(disk));
            }
        }
    }
}

fn takes_replicas(disk: Option<&DiskRecord>) -> bool {
    disk.is_some_and(|disk| disk.state == DiskState::Active)
}
