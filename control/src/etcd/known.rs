//! What this host knows of etcd, in this life and the ones before: it must never go back.
//!
//! A copy of etcd from this morning looks like any etcd. It has incarnations that were given since, and would give
//! them again: two writers with one token. It lacks the VDIs made since. So every answer that etcd gives for sure (not
//! a member for itself) is held against what was known when it was asked for; one that is behind is the last that is
//! believed: from then on nothing is read and nothing is changed, until `weft pool recover` has said which records
//! count, which a higher `recovered` in the pool's record tells, and the daemon was started again.
//!
//! The file is written before an incarnation is given out, and within a second after anything else changed.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};

use serde::{Deserialize, Serialize};

use crate::backend::BackendError;

/// What a durable memory begins with; a higher version is refused.
const VERSION: u32 = 1;

/// See the module.
pub(super) struct Known {
    path: Option<PathBuf>,
    state: Mutex<State>,
    /// Held over the writing of the file, so that an older content never replaces a newer one.
    writing: Mutex<()>,
    /// Whoever rebuilds the records takes etcd as it is.
    is_judging: bool,
}

#[derive(Default)]
struct State {
    memory: Memory,
    /// As it is in the file.
    written: Memory,
}

/// The file's content, as JSON.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Memory {
    v: u32,
    /// The pool's id, as its record has it.
    pool: Option<String>,
    /// How often the pool's records were rebuilt, as its record says.
    #[serde(default)]
    recovered: u64,
    /// etcd's own, highest.
    revision: i64,
    /// Highest.
    incarnation: u64,
    /// Why etcd is not believed any more.
    #[serde(default)]
    went_back: Option<String>,
}

/// What the pool's record says of itself.
#[derive(Deserialize)]
struct PoolValue {
    record: PoolMark,
}

#[derive(Clone, PartialEq, Eq, Deserialize)]
struct PoolMark {
    id: String,
    #[serde(default)]
    recovered: u64,
}

impl Known {
    /// Reads what earlier lives left at `path`; without one there is no memory beyond this life.
    pub fn open(path: Option<PathBuf>) -> Result<Known, BackendError> {
        let memory = match &path {
            Some(path) => read(path).map_err(|reason| unusable(path, &reason))?,
            None => Memory::default(),
        };
        let memory = Memory { v: VERSION, ..memory };
        Ok(Known {
            path,
            state: Mutex::new(State {
                written: memory.clone(),
                memory,
            }),
            writing: Mutex::default(),
            is_judging: true,
        })
    }

    /// Of who rebuilds the records: everything is believed.
    pub fn unjudging() -> Known {
        Known {
            path: None,
            state: Mutex::default(),
            writing: Mutex::default(),
            is_judging: false,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic while what is known was held")
    }

    /// Highest revision known. An answer to a question that is asked after this has no lower one.
    pub fn revision(&self) -> i64 {
        self.state().memory.revision
    }

    /// Highest incarnation known.
    pub fn incarnation(&self) -> u64 {
        self.state().memory.incarnation
    }

    /// Fails when etcd is not believed any more.
    pub fn believed(&self) -> Result<(), BackendError> {
        match &self.state().memory.went_back {
            None => Ok(()),
            Some(reason) => Err(BackendError::WentBack {
                reason: reason.clone(),
            }),
        }
    }

    /// An answer was asked for when `floor` was known, and says `revision`.
    pub fn heard(&self, floor: i64, revision: i64) -> Result<(), BackendError> {
        if revision < floor {
            self.doubt(format!(
                "etcd went back from revision {floor} to {revision}: it was wiped, or restored from an old copy"
            ));
        } else {
            let mut state = self.state();
            state.memory.revision = state.memory.revision.max(revision);
        }
        self.believed()
    }

    /// The pool's record, as etcd has it now.
    pub fn saw_pool(&self, value: Option<&[u8]>) -> Result<(), BackendError> {
        let mark = value.and_then(|value| serde_json::from_slice::<PoolValue>(value).ok());
        let mark = mark.map(|value| value.record);
        let mut state = self.state();
        let memory = &mut state.memory;
        let Some(id) = memory.pool.clone() else {
            memory.recovered = mark.as_ref().map_or(0, |mark| mark.recovered);
            memory.pool = mark.map(|mark| mark.id);
            return Ok(());
        };
        let reason = match mark {
            Some(mark) if mark.id == id && mark.recovered == memory.recovered => return Ok(()),
            Some(mark) if mark.id == id && mark.recovered > memory.recovered => {
                "the pool's records in etcd were rebuilt from the disks: blockd has to be started again"
                    .to_owned()
            }
            Some(mark) if mark.id == id => format!(
                "etcd has the pool's records from before they were rebuilt ({} of {} times)",
                mark.recovered, memory.recovered
            ),
            Some(mark) => format!(
                "etcd does not have the pool {id} that was known, but pool {}",
                mark.id
            ),
            None => format!("etcd does not have the pool {id} that was known"),
        };
        drop(state);
        self.doubt(reason);
        self.believed()
    }

    /// At a start: the pool's records were rebuilt from the disks since the last life. What was known of the etcd
    /// before that does not count; the incarnations do. `true` when it is so.
    pub fn begin_anew_if_recovered(&self, pool: Option<&[u8]>, revision: i64) -> bool {
        let mark = pool.and_then(|value| serde_json::from_slice::<PoolValue>(value).ok());
        let mut state = self.state();
        let memory = &mut state.memory;
        let Some(PoolValue { record }) = mark else {
            return false;
        };
        let is_later = memory.pool.as_ref() == Some(&record.id) && record.recovered > memory.recovered;
        if is_later {
            tracing::warn!(
                times = record.recovered,
                was = memory.went_back.as_deref().unwrap_or("believed"),
                "the pool's records were rebuilt from the disks; they are believed"
            );
            memory.recovered = record.recovered;
            memory.revision = revision;
            memory.went_back = None;
        }
        is_later
    }

    /// At a start: fails when etcd has another pool than this host's. That is no etcd that went back but a mistake in the
    /// settings: nothing is remembered of it.
    pub fn is_of_this_pool(&self, pool: Option<&[u8]>) -> Result<(), BackendError> {
        let mark = pool.and_then(|value| serde_json::from_slice::<PoolValue>(value).ok());
        let known = self.state().memory.pool.clone();
        match (known, mark) {
            (Some(known), Some(PoolValue { record })) if known != record.id && self.is_judging => {
                Err(BackendError::AnotherPool {
                    known,
                    found: record.id,
                })
            }
            _ => Ok(()),
        }
    }

    /// The highest incarnation of the pool, as etcd has it now.
    pub fn saw_incarnation(&self, value: &[u8]) {
        #[derive(Deserialize)]
        struct Value {
            record: u64,
        }
        if let Ok(value) = serde_json::from_slice::<Value>(value) {
            let mut state = self.state();
            state.memory.incarnation = state.memory.incarnation.max(value.record);
        }
    }

    /// Durable before it returns.
    pub fn remember_incarnation(&self, incarnation: u64) -> Result<(), BackendError> {
        let mut state = self.state();
        state.memory.incarnation = state.memory.incarnation.max(incarnation);
        drop(state);
        self.save()
    }

    fn doubt(&self, reason: String) {
        if !self.is_judging {
            return;
        }
        let mut state = self.state();
        if state.memory.went_back.is_none() {
            tracing::error!(reason, "etcd's records are not used any more");
            state.memory.went_back = Some(reason);
        }
        drop(state);
        if let Err(error) = self.save() {
            tracing::error!(%error, "the next start may believe it");
        }
    }

    /// Writes the file if it does not say what is known.
    pub fn save(&self) -> Result<(), BackendError> {
        let Some(path) = &self.path else { return Ok(()) };
        let _writing = self.writing.lock().expect("no panic while the file was written");
        let memory = {
            let state = self.state();
            if state.written == state.memory {
                return Ok(());
            }
            state.memory.clone()
        };
        write(path, &memory).map_err(|error| unusable(path, &error.to_string()))?;
        self.state().written = memory;
        Ok(())
    }
}

fn unusable(path: &Path, reason: &str) -> BackendError {
    BackendError::Memory {
        path: path.to_owned(),
        reason: reason.to_owned(),
    }
}

fn read(path: &Path) -> Result<Memory, String> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Memory::default()),
        Err(error) => return Err(error.to_string()),
    };
    let memory: Memory = serde_json::from_slice(&bytes).map_err(|error| error.to_string())?;
    if memory.v > VERSION {
        return Err(format!(
            "it has version {}, this weft reads up to {VERSION}",
            memory.v
        ));
    }
    Ok(memory)
}

/// The whole file or the one before, whatever happens meanwhile.
fn write(path: &Path, memory: &Memory) -> io::Result<()> {
    let next = path.with_extension("next");
    let mut file = File::create(&next)?;
    file.write_all(&serde_json::to_vec(memory).expect("a plain record"))?;
    file.sync_all()?;
    fs::rename(&next, path)?;
    let folder = path.parent().expect("a file is in a folder");
    File::open(folder)?.sync_all()
}
