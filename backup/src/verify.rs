//! Checks backups: that every object they need is there, and unless told otherwise that it is what was written.

use std::collections::{BTreeMap, HashSet};

use futures_util::stream::{self, StreamExt};

use crate::error::Error;
use crate::manifest::{BackupId, Manifest};
use crate::object::{Kind, SHARED, SharedObject};
use crate::page::Entry;
use crate::patch::Patch;
use crate::progress::Progress;
use crate::repository::Repository;
use crate::{PAGE_CHUNKS, chunk_bytes, error::Damage, pages_of};

/// Findings that are kept; all are counted.
pub const FINDINGS_MAX: usize = 100;

/// What a check found.
#[derive(Debug, Default)]
pub struct VerifyReport {
    /// Backups that were looked at.
    pub backups: u64,
    /// Objects that were looked at.
    pub objects: u64,
    /// Their bytes, as stored; 0 after a quick check.
    pub bytes: u64,
    /// Objects that are missing or damaged.
    pub bad: u64,
    /// The first of them, in words.
    pub findings: Vec<String>,
    /// Backups that cannot be restored whole.
    pub broken: Vec<BackupId>,
}

impl VerifyReport {
    fn find(&mut self, error: &Error) {
        self.bad += 1;
        if self.findings.len() < FINDINGS_MAX {
            self.findings.push(error.to_string());
        }
    }
}

/// Where an object is needed: the length of the chunk it is (part of).
type Wanted = BTreeMap<SharedObject, usize>;

/// Checks these backups. `quick` asks only whether the objects are there.
///
/// # Errors
/// When the storage cannot be asked. What it answers is in the report.
pub async fn verify(
    repository: &Repository,
    backups: &[(BackupId, Result<Manifest, Error>)],
    quick: bool,
    parallel: usize,
    progress: &Progress,
) -> Result<VerifyReport, Error> {
    let mut report = VerifyReport {
        backups: backups.len() as u64,
        ..VerifyReport::default()
    };
    let mut bad: HashSet<SharedObject> = HashSet::new();
    let mut checked: HashSet<SharedObject> = HashSet::new();
    let stored = if quick {
        Some(stored(repository).await?)
    } else {
        None
    };
    for (id, manifest) in backups {
        let manifest = match manifest {
            Ok(manifest) => manifest,
            Err(error) => {
                report.find(error);
                report.broken.push(*id);
                continue;
            }
        };
        let mut is_broken = false;
        for page in 0..pages_of(manifest.bytes) {
            let entries = match page_entries(repository, manifest, page, &mut checked, &mut report).await? {
                Some(entries) => entries,
                None => {
                    is_broken = true;
                    continue;
                }
            };
            let wanted = wanted(manifest, page, &entries);
            is_broken |= wanted.keys().any(|object| bad.contains(object));
            let new: Wanted = wanted
                .into_iter()
                .filter(|(object, _)| checked.insert(*object))
                .collect();
            progress.set_total(progress.total() + new.len() as u64);
            let before = bad.len();
            check(
                repository,
                new,
                stored.as_ref(),
                parallel,
                progress,
                &mut report,
                &mut bad,
            )
            .await?;
            is_broken |= bad.len() > before;
        }
        if is_broken {
            report.broken.push(*id);
        }
    }
    Ok(report)
}

async fn page_entries(
    repository: &Repository,
    manifest: &Manifest,
    page: u64,
    checked: &mut HashSet<SharedObject>,
    report: &mut VerifyReport,
) -> Result<Option<Vec<Entry>>, Error> {
    let Some(reference) = manifest.pages[page as usize] else {
        return Ok(Some(Vec::new()));
    };
    let object = SharedObject {
        kind: Kind::Page,
        reference,
    };
    let is_new = checked.insert(object);
    report.objects += u64::from(is_new);
    match repository.page(manifest, page).await {
        Ok(entries) => Ok(Some(entries)),
        Err(error) if error.is_finding() => {
            if is_new {
                report.find(&error);
            }
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

fn wanted(manifest: &Manifest, page: u64, entries: &[Entry]) -> Wanted {
    let first = page * PAGE_CHUNKS as u64;
    let of = |(chunk, entry): (u64, &Entry)| {
        let bytes = chunk_bytes(manifest.bytes, chunk);
        entry
            .objects()
            .map(move |object| (object, bytes))
            .collect::<Vec<_>>()
    };
    (first..).zip(entries).flat_map(of).collect()
}

async fn check(
    repository: &Repository,
    wanted: Wanted,
    stored: Option<&HashSet<SharedObject>>,
    parallel: usize,
    progress: &Progress,
    report: &mut VerifyReport,
    bad: &mut HashSet<SharedObject>,
) -> Result<(), Error> {
    let look = |(object, bytes): (SharedObject, usize)| async move {
        let outcome = match stored {
            Some(stored) if stored.contains(&object) => Ok(0),
            Some(_) => Err(Error::Missing {
                object: object.to_string(),
            }),
            None => read(repository, object, bytes).await,
        };
        (object, outcome)
    };
    let mut answers = stream::iter(wanted).map(look).buffer_unordered(parallel);
    while let Some((object, outcome)) = answers.next().await {
        report.objects += 1;
        progress.add_done(1);
        match outcome {
            Ok(bytes) => {
                report.bytes += bytes;
                progress.add_read(bytes);
            }
            Err(error) if error.is_finding() => {
                report.find(&error);
                bad.insert(object);
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Reads an object and checks all that can be; its bytes as stored.
async fn read(repository: &Repository, object: SharedObject, bytes: usize) -> Result<u64, Error> {
    let (brought, content) = repository.get_shared(object).await?;
    let fits = match object.kind {
        Kind::Chunk if content.len() != bytes => Err(Damage::Content(
            "the chunk has another length than its place on the disk",
        )),
        Kind::Patch => Patch::decode(&content, bytes).map(|_| ()),
        _ => Ok(()),
    };
    fits.map(|()| brought)
        .map_err(|damage| Error::damaged(&object, damage))
}

/// All shared objects that have at least a byte.
pub(crate) async fn stored(repository: &Repository) -> Result<HashSet<SharedObject>, Error> {
    let mut found = HashSet::new();
    for kind in SHARED {
        let mut listed = repository.list(kind.folder());
        while let Some(meta) = listed.next().await {
            let meta = meta?;
            if meta.size > 0 {
                found.extend(SharedObject::from_path(meta.location.as_ref()));
            }
        }
    }
    Ok(found)
}
