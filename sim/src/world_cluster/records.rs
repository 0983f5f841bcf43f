//! The control store of a simulated cluster: `control`'s own code over records in memory that all hosts share.
//!
//! What a host asks is done some time later, in any order, and between the steps of one change those of other hosts may
//! come. What a host last heard lags behind what is held. A host may be cut off from all of it, or lose an answer.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use control::backend::{Backend, BackendError, Commit, Compare, LeaseId, Leases, Limits, Transaction};
use control::{Attachment, ControlStore, HostAlive, HostRecord, RecordError, VdiRecord, VdiWriter};
use replication::{ShardRecord, Sharing};
use types::{HostId, Incarnation, ShardId, VdiId};

use super::daemon::short;
use super::{At, Time};
use crate::Rng;
use crate::trace::tell;

/// A host that is not heard for so long is dead.
pub(super) const LEASE: Duration = Duration::from_secs(5);

/// What a host asks of the control store.
#[derive(Clone, Debug)]
pub(super) enum Ask {
    /// A daemon starts: its incarnation, its lease, and which VDIs are its.
    Start,
    /// It lives.
    StayAlive { incarnation: u64, lease: LeaseId },
    /// To write a VDI; with a new incarnation unless one is given.
    Take { vdi: VdiId, incarnation: Option<u64> },
    /// Guests may come, or may not any more. `None`: to the record as last heard.
    Door {
        vdi: VdiId,
        record: Option<Box<VdiRecord>>,
        is_open: bool,
    },
    /// A writer's change of a shard's record.
    Save { record: ShardRecord, incarnation: u64 },
}

/// What comes of it.
#[derive(Clone, Debug)]
pub(super) enum Said {
    Started {
        incarnation: u64,
        lease: LeaseId,
        written_here: Vec<VdiId>,
    },
    Alive {
        lease: LeaseId,
    },
    Taken {
        incarnation: u64,
        record: Box<VdiRecord>,
        shards: Vec<ShardRecord>,
        sharing: Sharing,
    },
    Door {
        vdi: VdiId,
        is_open: bool,
    },
    Saved {
        incarnation: u64,
        record: ShardRecord,
    },
    /// It was refused, or not done, or perhaps done: [`Ask`] as it was asked.
    Not {
        asked: Ask,
        why: Refused,
    },
}

/// Why not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Refused {
    /// The control store does not answer; perhaps it was done all the same.
    Unheard,
    NotTheWriter,
    Other(String),
}

impl From<RecordError> for Refused {
    fn from(error: RecordError) -> Refused {
        match error {
            RecordError::Backend(_) => Refused::Unheard,
            RecordError::NotTheWriter { .. } => Refused::NotTheWriter,
            other => Refused::Other(other.to_string()),
        }
    }
}

/// One question on its way.
#[derive(Debug)]
struct Asked {
    at: At,
    life: u64,
    due: Time,
    ask: Ask,
}

type Change = (String, Option<Vec<u8>>);

/// What a host has heard.
#[derive(Debug, Default)]
struct View {
    map: BTreeMap<String, Vec<u8>>,
    upto: usize,
    /// Up to where its daemon has looked at what it heard.
    looked: usize,
    is_away: bool,
    loses_answers: bool,
}

#[derive(Debug)]
struct Lease {
    until: Time,
    time: Duration,
    keys: BTreeSet<String>,
}

#[derive(Debug)]
struct Shared {
    now: Time,
    rng: Rng,
    map: BTreeMap<String, Vec<u8>>,
    log: Vec<Vec<Change>>,
    views: Vec<View>,
    leases: BTreeMap<i64, Lease>,
    next_lease: i64,
    asked: Vec<Asked>,
    said: Vec<(At, u64, Said)>,
    /// Changes under way, one within the other.
    depth: u32,
}

/// See the module.
#[derive(Clone, Debug)]
pub(super) struct Records {
    shared: Arc<Mutex<Shared>>,
}

pub(super) fn host_id(at: At) -> HostId {
    HostId(at as u128 + 0x100)
}

impl Records {
    pub fn new(seed: u64, hosts: usize) -> Records {
        let shared = Shared {
            now: 0,
            rng: Rng::new(seed),
            map: BTreeMap::new(),
            log: Vec::new(),
            views: (0..hosts).map(|_| View::default()).collect(),
            leases: BTreeMap::new(),
            next_lease: 1,
            asked: Vec::new(),
            said: Vec::new(),
            depth: 0,
        };
        Records {
            shared: Arc::new(Mutex::new(shared)),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared
            .lock()
            .expect("one thread, no panic while it was held")
    }

    /// As the host at `at` sees it.
    pub fn of(&self, at: At) -> ControlStore {
        ControlStore::over(Arc::new(Client {
            records: self.clone(),
            at,
        }))
    }

    /// Asks; the answer comes with [`Records::take_said`].
    pub fn ask(&self, at: At, life: u64, ask: Ask) {
        let mut shared = self.lock();
        let wait = match shared.rng.below(8) {
            0 => shared.rng.between(1_000_000, 400_000_000),
            _ => shared.rng.between(100_000, 5_000_000),
        };
        let due = shared.now + wait;
        shared.asked.push(Asked { at, life, due, ask });
    }

    /// Asks again after a pause.
    pub fn ask_later(&self, at: At, life: u64, ask: Ask) {
        let mut shared = self.lock();
        let due = shared.now + 500_000_000;
        shared.asked.push(Asked { at, life, due, ask });
    }

    /// Whether nothing is asked but that hosts live.
    pub fn is_idle_but_for_life(&self) -> bool {
        let shared = self.lock();
        let is_life = |asked: &Asked| matches!(asked.ask, Ask::StayAlive { .. });
        shared.asked.iter().all(is_life) && shared.said.is_empty()
    }

    pub fn set_away(&self, at: At, is_away: bool) {
        self.lock().views[at].is_away = is_away;
    }

    pub fn set_loses_answers(&self, at: At, loses: bool) {
        self.lock().views[at].loses_answers = loses;
    }

    /// A daemon died: what it asked may have been heard, or never will be.
    pub fn forget(&self, at: At) {
        let mut shared = self.lock();
        shared.asked.retain(|asked| asked.at != at);
        shared.said.retain(|said| said.0 != at);
    }

    /// Lets time pass: leases end, questions are answered.
    pub fn advance_to(&self, now: Time) {
        self.lock().pass_to(now);
        loop {
            let mut shared = self.lock();
            let due: Vec<usize> = (0..shared.asked.len())
                .filter(|i| shared.asked[*i].due <= now)
                .collect();
            if due.is_empty() {
                return;
            }
            let chosen = shared.rng.pick(&due);
            let asked = shared.asked.swap_remove(chosen);
            drop(shared);
            self.answer(asked);
        }
    }

    /// Brings what the host at `at` heard up to date, unless it is cut off. Whether there is anything to look at.
    pub fn hear(&self, at: At) -> bool {
        let mut shared = self.lock();
        let upto = shared.log.len();
        if !shared.views[at].is_away {
            shared.hear(at, upto);
        }
        let view = &mut shared.views[at];
        let is_new = view.looked < view.upto;
        view.looked = view.upto;
        is_new
    }

    pub fn take_said(&self) -> Vec<(At, u64, Said)> {
        std::mem::take(&mut self.lock().said)
    }

    /// Who writes a VDI, in truth.
    pub fn writer(&self, vdi: VdiId) -> Option<VdiWriter> {
        let key = format!("vdi-writer/{:08x}", vdi.0);
        let value = self.lock().map.get(&key).cloned()?;
        let value: serde_json::Value = serde_json::from_slice(&value).expect("JSON");
        serde_json::from_value(value["record"].clone()).expect("a writer")
    }

    /// A shard's record, in truth.
    pub fn shard(&self, id: ShardId) -> ShardRecord {
        let key = format!("shard/{:08x}/{:08x}", id.vdi.0, id.no.0);
        let value = self
            .lock()
            .map
            .get(&key)
            .cloned()
            .expect("every shard has a record");
        let value: serde_json::Value = serde_json::from_slice(&value).expect("JSON");
        serde_json::from_value(value["record"].clone()).expect("a shard's record")
    }

    /// Whether the host is alive in everybody's eyes.
    pub fn is_alive(&self, at: At) -> bool {
        self.lock()
            .map
            .contains_key(&format!("host-alive/{}", host_id(at)))
    }

    fn answer(&self, asked: Asked) {
        let Asked { at, life, ask, .. } = asked;
        let control = self.of(at);
        let said = match do_what_is_asked(&control, at, &ask) {
            Ok(said) => said,
            Err(error) => Said::Not {
                asked: ask,
                why: error.into(),
            },
        };
        let is_refused_take = matches!(
            said,
            Said::Not {
                asked: Ask::Take { .. },
                ..
            }
        );
        if !matches!(said, Said::Alive { .. }) && !is_refused_take {
            tell(|| format!("    control to host {at}: {}", short(&said)));
        }
        self.lock().said.push((at, life, said));
    }

    /// Between the steps of one change, another's, also of the same host.
    fn let_others(&self) {
        let mut shared = self.lock();
        if shared.depth >= 3 || !shared.rng.chance(1, 6) {
            return;
        }
        let others: Vec<usize> = (0..shared.asked.len())
            .filter(|i| shared.asked[*i].due <= shared.now)
            .collect();
        if others.is_empty() {
            return;
        }
        let chosen = shared.rng.pick(&others);
        let asked = shared.asked.swap_remove(chosen);
        shared.depth += 1;
        drop(shared);
        tell(|| "    in the midst of a change:".into());
        self.answer(asked);
        self.lock().depth -= 1;
    }
}

/// What the daemon does with the control store, each as `blockd/src/daemon` does it.
fn do_what_is_asked(control: &ControlStore, at: At, ask: &Ask) -> Result<Said, RecordError> {
    let host = host_id(at);
    Ok(match ask {
        Ask::Start => {
            let incarnation = control.next_incarnation()?;
            let lease = control.leases().expect("of a cluster").grant(LEASE)?;
            control.join(&host_record(at), &alive(at, incarnation.0, lease))?;
            control.clean_unmade()?;
            let mut written_here = Vec::new();
            for vdi in control.vdis()? {
                if control.writer(vdi.id)?.is_some_and(|writer| writer.host == host) {
                    written_here.push(vdi.id);
                }
            }
            Said::Started {
                incarnation: incarnation.0,
                lease,
                written_here,
            }
        }
        Ask::StayAlive { incarnation, lease } => {
            let leases = control.leases().expect("of a cluster");
            let mut lease = *lease;
            if !leases.keep_alive(lease)? {
                lease = leases.grant(LEASE)?;
                control.join(&host_record(at), &alive(at, *incarnation, lease))?;
            }
            Said::Alive { lease }
        }
        Ask::Take { vdi, incarnation } => {
            let incarnation = match incarnation {
                Some(incarnation) => Incarnation(*incarnation),
                None => control.next_incarnation()?,
            };
            let record = control.take_vdi(*vdi, host, incarnation)?;
            let shards = control.shards_now(&record)?;
            Said::Taken {
                incarnation: incarnation.0,
                record: Box::new(record),
                shards,
                sharing: control.sharing(*vdi)?,
            }
        }
        Ask::Door { vdi, record, is_open } => {
            let mut record = match record {
                Some(record) => (**record).clone(),
                None => control
                    .vdi(*vdi)?
                    .ok_or_else(|| RecordError::Missing(vdi.to_string()))?,
            };
            record.attachments.clear();
            if *is_open {
                record.attachments.push(door(at));
            }
            control.update_vdi(&record)?;
            Said::Door {
                vdi: *vdi,
                is_open: *is_open,
            }
        }
        Ask::Save { record, incarnation } => {
            let writer = VdiWriter {
                host,
                incarnation: Incarnation(*incarnation),
            };
            Said::Saved {
                incarnation: *incarnation,
                record: control.swap_shard(record, Some(&writer))?,
            }
        }
    })
}

fn door(at: At) -> Attachment {
    Attachment {
        target: format!("vhost-user:/run/host{at}.sock")
            .parse()
            .expect("a socket"),
        read_only: false,
        queues: 1,
        snapshot: None,
    }
}

fn host_record(at: At) -> HostRecord {
    HostRecord {
        id: host_id(at),
        name: format!("host{at}"),
        address: format!("10.0.0.{at}:7700"),
        zone: String::new(),
        version: String::new(),
        joined: jiff::Timestamp::UNIX_EPOCH,
        leaving: false,
    }
}

fn alive(at: At, incarnation: u64, lease: LeaseId) -> HostAlive {
    // What a host says beside these has defaults.
    let said = serde_json::json!({
        "host": host_id(at),
        "incarnation": incarnation,
        "lease": lease,
        "address": format!("10.0.0.{at}:7700"),
    });
    serde_json::from_value(said).expect("a record")
}

impl Shared {
    fn pass_to(&mut self, now: Time) {
        self.now = now;
        let ended: Vec<i64> = self
            .leases
            .iter()
            .filter(|(_, lease)| lease.until <= now)
            .map(|(id, _)| *id)
            .collect();
        for id in ended {
            self.end_lease(id);
        }
    }

    fn end_lease(&mut self, id: i64) {
        if let Some(lease) = self.leases.remove(&id) {
            tell(|| format!("    lease {id} ended: {:?}", lease.keys));
            let changes: Vec<Change> = lease.keys.into_iter().map(|key| (key, None)).collect();
            self.apply(changes);
        }
    }

    fn apply(&mut self, changes: Vec<Change>) {
        put_in_place(&mut self.map, &changes);
        self.log.push(changes);
    }

    fn hear(&mut self, at: At, upto: usize) {
        let view = &mut self.views[at];
        let from = view.upto;
        for changes in &self.log[from..upto.max(from)] {
            put_in_place(&mut view.map, changes);
        }
        view.upto = upto.max(from);
    }

    fn holds(&self, compare: &Compare) -> bool {
        match compare {
            Compare::Is(key, value) => self.map.get(key) == Some(value),
            Compare::Absent(key) => !self.map.contains_key(key),
        }
    }

    fn reach(&self, at: At, operation: &'static str) -> Result<(), BackendError> {
        if !self.views[at].is_away {
            return Ok(());
        }
        Err(BackendError::Unreachable {
            operation,
            tries: 1,
            endpoints: 1,
            waited: Duration::from_secs(5),
            reason: "cut off".into(),
        })
    }

    fn commit(&mut self, at: At, transaction: &Transaction) -> Commit {
        if !transaction.compares.iter().all(|compare| self.holds(compare)) {
            return Commit::Refused;
        }
        let mut changes: Vec<Change> = Vec::new();
        for prefix in &transaction.delete_prefixes {
            let keys = self.map.keys().filter(|key| key.starts_with(prefix.as_str()));
            changes.extend(keys.map(|key| (key.clone(), None)));
        }
        changes.extend(transaction.deletes.iter().map(|key| (key.clone(), None)));
        for (key, value) in &transaction.puts {
            changes.push((key.clone(), Some(value.clone())));
            for lease in self.leases.values_mut() {
                lease.keys.remove(key);
            }
            if let Some(lease) = transaction.lease.and_then(|lease| self.leases.get_mut(&lease.0)) {
                lease.keys.insert(key.clone());
            }
        }
        self.apply(changes);
        // Nobody's view is behind what he did himself.
        let upto = self.log.len();
        self.hear(at, upto);
        Commit::Done
    }
}

fn put_in_place(map: &mut BTreeMap<String, Vec<u8>>, changes: &[Change]) {
    for (key, value) in changes {
        match value {
            Some(value) => map.insert(key.clone(), value.clone()),
            None => map.remove(key),
        };
    }
}

/// The control store as one host reaches it.
#[derive(Debug)]
struct Client {
    records: Records,
    at: At,
}

fn with_prefix(map: &BTreeMap<String, Vec<u8>>, prefix: &str) -> Vec<(String, Vec<u8>)> {
    map.range(prefix.to_owned()..)
        .take_while(|(key, _)| key.starts_with(prefix))
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect()
}

impl Backend for Client {
    fn get(&self, key: &str) -> Result<Option<Vec<u8>>, BackendError> {
        self.records.let_others();
        let shared = self.records.lock();
        shared.reach(self.at, "get")?;
        Ok(shared.map.get(key).cloned())
    }

    fn list(&self, prefix: &str) -> Result<Vec<(String, Vec<u8>)>, BackendError> {
        self.records.let_others();
        let shared = self.records.lock();
        shared.reach(self.at, "list")?;
        Ok(with_prefix(&shared.map, prefix))
    }

    fn seen(&self, key: &str) -> Result<Option<Vec<u8>>, BackendError> {
        Ok(self.records.lock().views[self.at].map.get(key).cloned())
    }

    fn seen_list(&self, prefix: &str) -> Result<Vec<(String, Vec<u8>)>, BackendError> {
        Ok(with_prefix(&self.records.lock().views[self.at].map, prefix))
    }

    fn commit(&self, transaction: &Transaction) -> Result<Commit, BackendError> {
        self.records.let_others();
        let mut shared = self.records.lock();
        shared.reach(self.at, "commit")?;
        if let Some(lease) = transaction
            .lease
            .filter(|lease| !shared.leases.contains_key(&lease.0))
        {
            return Err(BackendError::Refused {
                operation: "commit",
                code: 5,
                reason: format!("there is no lease {}", lease.0),
            });
        }
        let done = shared.commit(self.at, transaction);
        if shared.views[self.at].loses_answers && shared.rng.chance(1, 3) {
            return Err(BackendError::Unknown {
                operation: "commit",
                waited: Duration::from_secs(5),
                reason: "the answer was lost".into(),
            });
        }
        Ok(done)
    }

    fn limits(&self) -> Option<Limits> {
        Some(Limits {
            operations: 120,
            bytes: 1 << 20,
        })
    }

    fn watch(&self, _: &str) -> tokio::sync::watch::Receiver<u64> {
        // The world says itself when a host has heard something.
        tokio::sync::watch::channel(0).1
    }

    fn leases(&self) -> Option<&dyn Leases> {
        Some(self)
    }
}

impl Leases for Client {
    fn grant(&self, time: Duration) -> Result<LeaseId, BackendError> {
        let mut shared = self.records.lock();
        shared.reach(self.at, "grant")?;
        let id = shared.next_lease;
        shared.next_lease += 1;
        let until = shared.now + time.as_nanos() as u64;
        let keys = BTreeSet::new();
        shared.leases.insert(id, Lease { until, time, keys });
        Ok(LeaseId(id))
    }

    fn keep_alive(&self, lease: LeaseId) -> Result<bool, BackendError> {
        let mut shared = self.records.lock();
        shared.reach(self.at, "keep alive")?;
        let now = shared.now;
        let Some(held) = shared.leases.get_mut(&lease.0) else {
            return Ok(false);
        };
        held.until = now + held.time.as_nanos() as u64;
        Ok(true)
    }

    fn left(&self, lease: LeaseId) -> Result<Option<Duration>, BackendError> {
        let shared = self.records.lock();
        shared.reach(self.at, "time to live")?;
        let held = shared.leases.get(&lease.0);
        Ok(held.map(|held| Duration::from_nanos(held.until.saturating_sub(shared.now))))
    }

    fn revoke(&self, lease: LeaseId) -> Result<(), BackendError> {
        let mut shared = self.records.lock();
        shared.reach(self.at, "revoke")?;
        shared.end_lease(lease.0);
        Ok(())
    }
}
