//! A run that relies on objects it found: while its session is there, no prune deletes them.
//!
//! ```text
//!  sessions/ID.begun   written once, first; gone when the run has ended, or when a prune took it for dead
//!  sessions/ID.knows   the condemned lists that the run read after that, one id a line
//!  sessions/ID.beat    written anew every few minutes: its age, by the storage's clock, is how long the run is silent
//! ```
//!
//! Whether it is safe to delete does not depend on clocks: a prune that takes a session for dead removes `begun` before
//! it looks for manifests, and a run looks for its `begun` after it wrote its manifest. One of the two sees the other.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use serde::Serialize;

use crate::error::Error;
use crate::key::random;
use crate::manifest::BackupId;
use crate::object::{Kind, from_hex, hex};
use crate::repository::Repository;
use crate::sweep::{self, ListId, SessionSeen, Suspects};

/// How often a run says that it lives.
const BEAT: Duration = Duration::from_secs(120);
/// Longest `knows` that is read.
const KNOWS_BYTES_MAX: u64 = 1 << 20;
const FOLDER: &str = "sessions";
const PARTS: [&str; 3] = ["begun", "knows", "beat"];

/// What people see who look into a repository.
#[derive(Serialize)]
struct Begun<'a> {
    what: &'a str,
    pid: u32,
    began: String,
}

/// A session that this process holds.
#[derive(Debug)]
pub struct Session {
    id: String,
    repository: Repository,
    /// What must not be relied on.
    pub suspects: Arc<Suspects>,
    beat: tokio::task::JoinHandle<()>,
}

fn path(id: &str, part: &str) -> String {
    format!("{FOLDER}/{id}.{part}")
}

impl Session {
    /// Begins one. From its return on, nothing that is in the repository and not among the suspects is deleted.
    ///
    /// # Errors
    /// When the storage fails.
    pub async fn begin(repository: &Repository, what: &str) -> Result<Session, Error> {
        let id = hex(&random::<16>());
        let begun = Begun {
            what,
            pid: std::process::id(),
            began: jiff::Timestamp::now().to_string(),
        };
        let text = serde_json::to_string(&begun).expect("it is printable");
        repository.put_plain(&path(&id, "beat"), "".into()).await?;
        repository.put_plain(&path(&id, "begun"), text.into()).await?;
        // Only lists that were there when the session was: a later one counts with this session.
        let mut suspects = Suspects::default();
        let mut knows = String::new();
        for (list, objects) in condemned(repository).await? {
            suspects.add(&objects);
            knows.push_str(&format!("{list}\n"));
        }
        repository.put_plain(&path(&id, "knows"), knows.into()).await?;
        let (to, at) = (repository.clone(), path(&id, "beat"));
        let beat = tokio::spawn(async move {
            loop {
                tokio::time::sleep(BEAT).await;
                // One that fails is made good by the next; if none succeeds, the run's own writes fail too.
                let _ = to.put_plain(&at, "".into()).await;
            }
        });
        Ok(Session {
            id,
            repository: repository.clone(),
            suspects: Arc::new(suspects),
            beat,
        })
    }

    /// Whether no prune has taken the run for dead.
    ///
    /// # Errors
    /// When the storage fails.
    pub async fn is_standing(&self) -> Result<bool, Error> {
        Ok(self.repository.head(&path(&self.id, "begun")).await?.is_some())
    }

    /// Ends it, whether the run succeeded or not.
    ///
    /// # Errors
    /// When the storage fails; the session then ends by its silence.
    pub async fn end(self) -> Result<(), Error> {
        self.beat.abort();
        remove(&self.repository, &self.id).await
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.beat.abort();
    }
}

/// Removes a session. `begun` first, and alone: see the module.
pub(crate) async fn remove(repository: &Repository, id: &str) -> Result<(), Error> {
    for part in PARTS {
        repository.delete(vec![path(id, part)], || ()).await?;
    }
    Ok(())
}

/// The sessions that are there, and objects that runs left which ended in the middle of ending. `now` is a moment of
/// the storage's clock.
pub(crate) async fn seen(
    repository: &Repository,
    now: i64,
    silent_seconds_max: i64,
) -> Result<(Vec<SessionSeen>, Vec<String>), Error> {
    let (mut begun, mut last) = (BTreeSet::new(), BTreeMap::new());
    let mut parts = Vec::new();
    let mut listed = repository.list(FOLDER);
    while let Some(meta) = listed.next().await {
        let meta = meta?;
        let name = meta.location.filename().unwrap_or_default();
        let (id, part) = name.split_once('.').unwrap_or((name, ""));
        let at = meta.last_modified.timestamp();
        parts.push((id.to_owned(), meta.location.to_string()));
        let latest = last.entry(id.to_owned()).or_insert(at);
        *latest = at.max(*latest);
        if part == "begun" {
            begun.insert(id.to_owned());
        }
    }
    // One that is about to begin has its `beat` before its `begun`: young ones stay.
    let is_old = |id: &String| now.saturating_sub(last[id]) > silent_seconds_max;
    parts.retain(|(id, _)| !begun.contains(id) && is_old(id));
    let left = parts.into_iter().map(|(_, path)| path).collect();
    let mut sessions = Vec::new();
    for id in begun {
        let text = repository.get_plain(&path(&id, "knows"), KNOWS_BYTES_MAX).await?;
        let text = text.map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        let knows = text
            .unwrap_or_default()
            .lines()
            .filter_map(from_hex)
            .map(ListId)
            .collect();
        sessions.push(SessionSeen {
            silent_seconds: now.saturating_sub(last[&id]),
            id,
            knows,
        });
    }
    Ok((sessions, left))
}

/// All condemned lists. One that went while they were read has nothing left to delete.
pub(crate) async fn condemned(
    repository: &Repository,
) -> Result<Vec<(ListId, Vec<crate::object::SharedObject>)>, Error> {
    let mut listed = repository.list(Kind::Condemned.folder());
    let mut ids = Vec::new();
    while let Some(meta) = listed.next().await {
        ids.extend(meta?.location.filename().and_then(from_hex).map(ListId));
    }
    let mut lists = Vec::new();
    for id in ids {
        let path = list_path(id);
        match repository.get(Kind::Condemned, &path, &id.0).await {
            Ok((_, content)) => {
                let objects = sweep::decode(&content, id).map_err(|damage| Error::damaged(&path, damage))?;
                lists.push((id, objects));
            }
            Err(Error::Missing { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    lists.sort_unstable_by_key(|(id, _)| *id);
    Ok(lists)
}

/// Where a condemned list is.
pub(crate) fn list_path(id: ListId) -> String {
    format!("{}/{id}", Kind::Condemned.folder())
}

/// A new id for a backup that begins now.
pub(crate) fn new_backup_id(now: jiff::Timestamp) -> BackupId {
    BackupId::new(now, random())
}
