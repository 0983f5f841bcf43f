//! Records of hosts, and who of them is alive.

use types::HostId;

use super::{ControlStore, Held, RecordError, Result, put};
use crate::backend::{Commit, Compare, LeaseId, Leases, Transaction};
use crate::{HostAlive, HostRecord, VdiRecord};

fn host_key(id: HostId) -> String {
    format!("host/{id}")
}

fn name_key(name: &str) -> String {
    format!("host-name/{name}")
}

fn alive_key(id: HostId) -> String {
    format!("host-alive/{id}")
}

impl ControlStore {
    /// Leases of the backend; `None` for a single host.
    #[must_use]
    pub fn leases(&self) -> Option<&dyn Leases> {
        self.backend.leases()
    }

    /// All hosts that ever joined, by id.
    ///
    /// # Errors
    /// The backend's.
    pub fn hosts(&self) -> Result<Vec<HostRecord>> {
        self.seen_list("host/")
    }

    /// One host.
    ///
    /// # Errors
    /// The backend's.
    pub fn host(&self, id: HostId) -> Result<Option<HostRecord>> {
        self.seen(&host_key(id))
    }

    /// The hosts that are alive, by id.
    ///
    /// # Errors
    /// The backend's.
    pub fn alive(&self) -> Result<Vec<HostAlive>> {
        self.seen_list("host-alive/")
    }

    /// What a host that is alive says of itself, from the store itself.
    ///
    /// # Errors
    /// The backend's.
    pub fn alive_now(&self, id: HostId) -> Result<Option<HostAlive>> {
        Ok(self.held(&alive_key(id))?.record)
    }

    /// Makes this host known under its name, and alive as long as the lease in `alive` lasts.
    ///
    /// # Errors
    /// The backend's, [`RecordError::HostNameTaken`] by another host that lives, or [`RecordError::HostTwice`].
    pub fn join(&self, host: &HostRecord, alive: &HostAlive) -> Result<()> {
        assert_eq!(host.id, alive.host, "one host joins");
        let key = name_key(&host.name);
        loop {
            // An older life of its own was at the same place: two cannot listen there. A copy of its state is elsewhere.
            if let Some(other) = self.alive_now(host.id)?
                && other.incarnation != alive.incarnation
                && other.address != alive.address
            {
                return Err(RecordError::HostTwice {
                    name: host.name.clone(),
                    id: host.id,
                    address: other.address,
                    left_s: self.left_s(other.lease)?,
                });
            }
            let owner: Held<HostId> = self.held(&key)?;
            let mut change = Transaction::default();
            change.compares.push(owner.unchanged(&key));
            if let Some(other) = owner.record.filter(|other| *other != host.id) {
                if let Some(alive) = self.alive_now(other)? {
                    return Err(RecordError::HostNameTaken {
                        name: host.name.clone(),
                        id: other,
                        address: alive.address,
                        left_s: self.left_s(alive.lease)?,
                    });
                }
                change.compares.push(Compare::Absent(alive_key(other)));
            }
            let before = self.held::<HostRecord>(&host_key(host.id))?.record;
            if let Some(before) = before.filter(|before| before.name != host.name) {
                // Renamed: the old name is free, if nobody took it.
                let old = name_key(&before.name);
                let held: Held<HostId> = self.held(&old)?;
                if held.record == Some(host.id) {
                    change.compares.push(held.unchanged(&old));
                    change.deletes.push(old);
                }
            }
            put(&mut change, &host_key(host.id), host);
            put(&mut change, &key, &host.id);
            if self.commit(&change)? == Commit::Refused {
                continue;
            }
            match self.say_alive(alive) {
                // Somebody took it for dead and forgot it, between the two.
                Err(RecordError::Missing(_)) => {}
                said => return said,
            }
        }
    }

    /// Says of this host what others should know as long as it is alive.
    ///
    /// # Errors
    /// The backend's, or [`RecordError::Missing`] when the host was forgotten: it has to join anew.
    pub fn say_alive(&self, alive: &HostAlive) -> Result<()> {
        let key = host_key(alive.host);
        loop {
            let host: Held<HostRecord> = self.held(&key)?;
            if host.record.is_none() {
                return Err(RecordError::Missing(key));
            }
            let mut change = Transaction {
                lease: Some(alive.lease),
                ..Transaction::default()
            };
            change.compares.push(host.unchanged(&key));
            put(&mut change, &alive_key(alive.host), alive);
            if self.commit(&change)? == Commit::Done {
                return Ok(());
            }
        }
    }

    /// The comparison by which a VDI with guests may be taken from `host`: it is dead.
    pub(super) fn must_be_dead(&self, vdi: &VdiRecord, host: HostId) -> Result<Compare> {
        let Some(alive) = self.alive_now(host)? else {
            return Ok(Compare::Absent(alive_key(host)));
        };
        let known = self.held::<HostRecord>(&host_key(host))?.record;
        Err(RecordError::HeldElsewhere {
            name: vdi.name.clone(),
            host: known.map_or_else(|| host.to_string(), |known| known.name),
            left_s: self.left_s(alive.lease)?,
        })
    }

    /// Whole seconds until `lease` ends if its holder is not heard again.
    ///
    /// # Errors
    /// The backend's.
    pub fn left_s(&self, lease: LeaseId) -> Result<u64> {
        let left = match self.leases() {
            Some(leases) => leases.left(lease)?,
            None => None,
        };
        Ok(left.map_or(0, |left| left.as_secs()))
    }

    /// Notes that a host is to be forgotten; that it comes back takes this away.
    ///
    /// # Errors
    /// The backend's, [`RecordError::Missing`], or [`RecordError::Overtaken`] when it joins this moment.
    pub fn begin_to_forget(&self, id: HostId) -> Result<()> {
        let key = host_key(id);
        let held = self.held::<HostRecord>(&key)?;
        let unchanged = held.unchanged(&key);
        let Some(mut host) = held.record else {
            return Err(RecordError::Missing(key));
        };
        host.leaving = true;
        let mut change = Transaction::default();
        change.compares.push(unchanged);
        change.compares.push(Compare::Absent(alive_key(id)));
        put(&mut change, &key, &host);
        match self.commit(&change)? {
            Commit::Done => Ok(()),
            Commit::Refused => Err(RecordError::Overtaken),
        }
    }

    /// Forgets a host for good; that nothing is on it is for the caller to know.
    ///
    /// # Errors
    /// The backend's, or [`RecordError::HostNameTaken`] when it is alive.
    pub fn forget_host(&self, host: &HostRecord) -> Result<()> {
        if let Some(alive) = self.alive_now(host.id)? {
            return Err(RecordError::HostNameTaken {
                name: host.name.clone(),
                id: host.id,
                address: alive.address,
                left_s: self.left_s(alive.lease)?,
            });
        }
        let key = name_key(&host.name);
        let owner: Held<HostId> = self.held(&key)?;
        let mut change = Transaction::default();
        change.compares.push(Compare::Absent(alive_key(host.id)));
        change.deletes.push(host_key(host.id));
        if owner.record == Some(host.id) {
            change.compares.push(owner.unchanged(&key));
            change.deletes.push(key);
        }
        match self.commit(&change)? {
            Commit::Done => Ok(()),
            Commit::Refused => Err(RecordError::Overtaken),
        }
    }
}
