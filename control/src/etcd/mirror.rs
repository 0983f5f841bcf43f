//! All records as last heard: read once, then kept by a watch, in the order in which they were changed.
//!
//! ```text
//!  list at revision R ──▶ watch from R + 1 ──▶ apply each answer whole ──┐
//!     ▲                        ▲                    ▲                   │
//!     └── compacted, refused ──┴── stream ended ────┴── silent for 4 s ─┘
//! ```
//! What was heard is never older than before: revisions only grow. An etcd whose revision or pool is not the one
//! known was wiped or restored; its records are not taken, what is known stays, and the health says so ([`Known`]).

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use etcd_client::{EventType, WatchOptions, WatchResponse};
use jiff::Timestamp;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout};

use super::known::Known;
use super::link::Link;
use crate::backend::{BackendError, Health};
use crate::embedded::prefix_range;
use crate::watchers::Watchers;

/// How often the watch is asked whether it is there.
const ASK_EVERY: Duration = Duration::from_secs(1);
/// A watch that says nothing for so long is dead.
const SILENT_FOR: Duration = Duration::from_secs(4);
/// Before a watch that broke is made anew.
const PAUSE: Duration = Duration::from_millis(200);
/// How often what is known is written down when it changes.
const SAVE_EVERY: Duration = Duration::from_secs(1);
/// Largest answer of a watch: after a pause it brings many changes at once.
const ANSWER_BYTES_MAX: usize = 256 << 20;

pub(super) const POOL: &str = "pool";
const INCARNATION: &str = "incarnation";

/// See the module.
#[derive(Default)]
pub(super) struct Mirror {
    state: Mutex<State>,
    moved: Condvar,
    pub watchers: Watchers,
    /// Told when the watch does not show what was changed: all is read anew.
    pub is_behind: Notify,
}

#[derive(Default)]
struct State {
    entries: BTreeMap<String, Vec<u8>>,
    /// Everything up to here is in `entries`; 0: nothing was read yet.
    revision: i64,
    unreachable: Option<(Timestamp, String)>,
    /// When etcd was last heard.
    heard: Option<Timestamp>,
}

impl Mirror {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic while records were held")
    }

    pub fn get(&self, key: &str) -> Option<Vec<u8>> {
        self.state().entries.get(key).cloned()
    }

    pub fn list(&self, prefix: &str) -> Vec<(String, Vec<u8>)> {
        let state = self.state();
        let range = state.entries.range(prefix.to_owned()..);
        range
            .take_while(|(key, _)| key.starts_with(prefix))
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect()
    }

    pub fn health(&self) -> Health {
        Health {
            unreachable: self.state().unreachable.clone(),
        }
    }

    /// Waits until revision `revision` has been seen; `false`: it was not in time.
    pub fn wait_for(&self, revision: i64, time: Duration) -> bool {
        let state = self.state();
        let waited = self
            .moved
            .wait_timeout_while(state, time, |state| state.revision < revision);
        !waited.expect("no panic while records were held").1.timed_out()
    }

    pub fn wait_loaded(&self, time: Duration) -> Result<(), BackendError> {
        if self.wait_for(1, time) {
            return Ok(());
        }
        let state = self.state();
        let reason = state
            .unreachable
            .as_ref()
            .map_or("", |(_, reason)| reason.as_str());
        Err(BackendError::Unreachable {
            operation: "read all records",
            tries: 1,
            endpoints: 1,
            waited: time,
            reason: reason.to_owned(),
        })
    }

    fn is_heard(&self) {
        let mut state = self.state();
        state.heard = Some(Timestamp::now());
        if let Some((since, _)) = state.unreachable.take() {
            tracing::info!(%since, "etcd answers again");
        }
    }

    fn is_silent(&self, reason: &str) {
        let mut state = self.state();
        let since = match &state.unreachable {
            Some((since, _)) => *since,
            None => {
                tracing::warn!(reason, "etcd does not answer");
                state.heard.unwrap_or_else(Timestamp::now)
            }
        };
        state.unreachable = Some((since, reason.to_owned()));
    }

    /// Everything as of `revision`, where that can be the store that was known.
    fn replace(
        &self,
        known: &Known,
        entries: BTreeMap<String, Vec<u8>>,
        revision: i64,
    ) -> Result<(), BackendError> {
        known.heard(self.revision(), revision)?;
        known.saw_pool(entries.get(POOL).map(Vec::as_slice))?;
        if let Some(incarnation) = entries.get(INCARNATION) {
            known.saw_incarnation(incarnation);
        }
        let mut state = self.state();
        let old = std::mem::replace(&mut state.entries, entries);
        state.revision = revision;
        let differs = |key: &&String| old.get(*key) != state.entries.get(*key);
        let mut changed: Vec<String> = state.entries.keys().filter(differs).cloned().collect();
        changed.extend(
            old.keys()
                .filter(|key| !state.entries.contains_key(*key))
                .cloned(),
        );
        let keys: Vec<&str> = changed.iter().map(String::as_str).collect();
        // Under the lock: who waited for the revision finds its watchers told.
        self.watchers.changed(&keys);
        drop(state);
        self.moved.notify_all();
        Ok(())
    }

    /// What a watch brought: all changes up to a revision. None of them, when the pool is not what it was: somebody
    /// deleted everything, or put in what was saved elsewhere.
    fn apply(
        &self,
        known: &Known,
        changes: &[(String, Option<Vec<u8>>)],
        revision: i64,
    ) -> Result<(), BackendError> {
        for (key, value) in changes {
            match (key.as_str(), value) {
                (POOL, value) => known.saw_pool(value.as_deref())?,
                (INCARNATION, Some(value)) => known.saw_incarnation(value),
                _ => {}
            }
        }
        // What was seen at this revision, nobody answers from before.
        known.heard(0, revision)?;
        let mut state = self.state();
        for (key, value) in changes {
            match value {
                Some(value) => state.entries.insert(key.clone(), value.clone()),
                None => state.entries.remove(key),
            };
        }
        state.revision = state.revision.max(revision);
        let keys: Vec<&str> = changes.iter().map(|(key, _)| key.as_str()).collect();
        self.watchers.changed(&keys);
        drop(state);
        self.moved.notify_all();
        Ok(())
    }

    fn revision(&self) -> i64 {
        self.state().revision
    }
}

/// Keeps `mirror` fresh, as long as etcd is believed.
pub(super) async fn follow(link: Arc<Link>, mirror: Arc<Mirror>) {
    loop {
        if let Err(error) = link.known.believed() {
            mirror.is_silent(&error.to_string());
            return;
        }
        let reason = match load(&link, &mirror).await {
            Ok(()) => match watch(&link, &mirror).await {
                Ok(never) => match never {},
                Err(reason) => reason,
            },
            Err(reason) => reason,
        };
        mirror.is_silent(&reason);
        tokio::time::sleep(PAUSE).await;
    }
}

async fn load(link: &Link, mirror: &Mirror) -> Result<(), String> {
    let prefix = &link.settings.prefix;
    let (entries, revision) = super::list(link, prefix)
        .await
        .map_err(|error| error.to_string())?;
    let entries = entries
        .into_iter()
        .map(|(key, value)| (key[prefix.len()..].to_owned(), value))
        .collect();
    mirror
        .replace(&link.known, entries, revision)
        .map_err(|error| error.to_string())?;
    mirror.is_heard();
    Ok(())
}

/// Follows the changes until something is wrong, and says what.
async fn watch(link: &Link, mirror: &Mirror) -> Result<std::convert::Infallible, String> {
    let prefix = &link.settings.prefix;
    let (from, to) = prefix_range(prefix);
    let (at, client) = link
        .client(link.settings.patience)
        .await
        .map_err(|(_, error)| error.to_string())?;
    let options = WatchOptions::new()
        .with_range(to)
        .with_start_revision(mirror.revision() + 1);
    let mut watching = client.watch_client().max_decoding_message_size(ANSWER_BYTES_MAX);
    let stream = timeout(SILENT_FOR, watching.watch(from, Some(options))).await;
    let stream = match stream {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => {
            link.leave(at);
            return Err(error.to_string());
        }
        Err(_) => {
            link.leave(at);
            return Err("it began no watch in time".to_owned());
        }
    };
    let (mut asking, mut answers) = stream.split();
    let mut heard = Instant::now();
    loop {
        let answer = tokio::select! {
            answer = timeout(ASK_EVERY, answers.message()) => answer,
            () = mirror.is_behind.notified() => {
                return Err("its watch did not show a change that it had made".to_owned());
            }
        };
        let answer = match answer {
            Ok(Ok(Some(answer))) => answer,
            Ok(Ok(None)) => {
                link.leave(at);
                return Err("it ended the watch".to_owned());
            }
            Ok(Err(error)) => {
                link.leave(at);
                return Err(error.to_string());
            }
            Err(_) if heard.elapsed() > SILENT_FOR => {
                link.leave(at);
                return Err(format!("it was silent for {} s", SILENT_FOR.as_secs()));
            }
            Err(_) => {
                // A full channel would mean that it takes none of our questions; the silence tells.
                let _ = timeout(ASK_EVERY, asking.request_progress()).await;
                continue;
            }
        };
        heard = Instant::now();
        if answer.canceled() {
            return Err(format!("it ended the watch: {}", answer.cancel_reason()));
        }
        mirror.is_heard();
        take(mirror, &link.known, prefix.len(), &answer).map_err(|error| error.to_string())?;
    }
}

fn take(mirror: &Mirror, known: &Known, bare: usize, answer: &WatchResponse) -> Result<(), BackendError> {
    let mut changes = Vec::new();
    // What is known is known up to the last event. The header's revision is the store's own, ahead of what the watch
    // has shown; in etcd before 3.4.25 also in the answers to our questions.
    let mut revision = 0;
    for event in answer.events() {
        let Some(entry) = event.kv() else { continue };
        let key = String::from_utf8_lossy(entry.key());
        let value = match event.event_type() {
            EventType::Put => Some(entry.value().to_vec()),
            EventType::Delete => None,
        };
        revision = revision.max(entry.mod_revision());
        changes.push((key[bare..].to_owned(), value));
    }
    if changes.is_empty() {
        return Ok(());
    }
    mirror.apply(known, &changes, revision)
}

/// Writes down what is known whenever it changed.
pub(super) async fn remember(link: Arc<Link>) {
    let mut was_well = true;
    loop {
        tokio::time::sleep(SAVE_EVERY).await;
        let link = Arc::clone(&link);
        // It waits for a disk, and this thread keeps leases alive.
        let saved = tokio::task::spawn_blocking(move || link.known.save()).await;
        let Ok(saved) = saved else { return };
        if let (Err(error), true) = (&saved, was_well) {
            tracing::error!(%error, "what is known of etcd is not written down");
        }
        was_well = saved.is_ok();
    }
}
