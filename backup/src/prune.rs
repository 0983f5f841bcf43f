//! Deletes backups, then the objects that no backup needs. [`crate::sweep`] says which and when; why it is safe while
//! others write is in docs/backup-format.md.

use std::collections::HashSet;

use futures_util::stream::{self, StreamExt};

use crate::error::Error;
use crate::key::random;
use crate::manifest::{BackupId, Manifest};
use crate::object::{Kind, SharedObject};
use crate::progress::Progress;
use crate::repository::{PARALLEL, Repository, manifest_path};
use crate::session;
use crate::sweep::{self, ListId};
use crate::verify::stored;
use crate::{object::hex, page};

/// A run that said nothing for so long is taken for dead. It says something every two minutes.
pub const SILENT_SECONDS_MAX: i64 = 1800;
/// What a bucket deletes in one request.
const DELETES_AT_ONCE: usize = 1000;
const CLOCK: &str = "sessions/clock";

/// What a prune did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PruneReport {
    /// Backups that were deleted.
    pub backups: u64,
    /// Objects that were deleted.
    pub objects: u64,
    /// Objects that nobody needs any more, but that runs under way may still rely on. A later prune deletes them.
    pub objects_waiting: u64,
    /// Those runs.
    pub waiting_for: Vec<String>,
    /// Runs that were taken for dead.
    pub dead: Vec<String>,
}

/// Deletes these backups and what only they needed.
///
/// # Errors
/// When the storage fails, or a manifest that is to stay cannot be read: what it needs is not known then, and nothing
/// but the backups named is deleted.
pub async fn prune(
    repository: &Repository,
    backups: &[BackupId],
    silent_seconds_max: i64,
    progress: &Progress,
) -> Result<PruneReport, Error> {
    let mut report = PruneReport::default();
    let manifests = backups.iter().map(|id| manifest_path(*id)).collect();
    repository.delete(manifests, || report.backups += 1).await?;
    condemn(repository).await?;
    execute(repository, silent_seconds_max, progress, &mut report).await?;
    Ok(report)
}

/// The first half: says of everything that no backup needs that it is to go.
async fn condemn(repository: &Repository) -> Result<(), Error> {
    let known = session::condemned(repository).await?;
    let known: HashSet<SharedObject> = known.into_iter().flat_map(|(_, objects)| objects).collect();
    // Listed before it is known what is needed: an object that comes later is not judged.
    let found = stored(repository).await?;
    let needed = needed(repository).await?;
    for objects in sweep::condemn(found, &needed, &known) {
        let id = ListId(random());
        let content = sweep::encode(id, &objects);
        repository
            .put(
                Kind::Condemned,
                session::list_path(id),
                id.0.to_vec(),
                content,
                crate::create::LEVEL,
            )
            .await?;
    }
    Ok(())
}

/// The second half: deletes what is to go, where no run can rely on it any more.
async fn execute(
    repository: &Repository,
    silent_seconds_max: i64,
    progress: &Progress,
    report: &mut PruneReport,
) -> Result<(), Error> {
    let lists = session::condemned(repository).await?;
    let now = storage_time(repository).await?;
    let (sessions, left) = session::seen(repository, now, silent_seconds_max).await?;
    repository.delete(left, || ()).await?;
    let ids: Vec<ListId> = lists.iter().map(|(id, _)| *id).collect();
    let verdict = sweep::judge(&sessions, &ids, silent_seconds_max);
    for dead in &verdict.dead {
        session::remove(repository, dead).await?;
    }
    // After the sessions: whoever has ended by now has a manifest that is seen here, or never will have one.
    let needed = needed(repository).await?;
    for (id, objects) in &lists {
        let doomed = sweep::doomed(objects, &needed);
        if !verdict.ripe.contains(id) {
            report.objects_waiting += doomed.len() as u64;
            continue;
        }
        progress.set_total(progress.total() + doomed.len() as u64);
        delete(repository, *id, &doomed, progress, report).await?;
    }
    report.dead = verdict.dead;
    report.waiting_for = verdict.waiting_for;
    Ok(())
}

async fn delete(
    repository: &Repository,
    list: ListId,
    doomed: &[SharedObject],
    progress: &Progress,
    report: &mut PruneReport,
) -> Result<(), Error> {
    let path = session::list_path(list);
    for batch in doomed.chunks(DELETES_AT_ONCE) {
        // Another prune may have been faster. Once the list is gone, runs begin that know nothing of it, and that may
        // have stored the same content again under the same name.
        if repository.head(&path).await?.is_none() {
            return Ok(());
        }
        let paths = batch.iter().map(ToString::to_string).collect();
        repository
            .delete(paths, || {
                report.objects += 1;
                progress.add_done(1);
            })
            .await?;
    }
    // Last: a prune that is cut short before this comes back to the list.
    repository.delete(vec![path], || ()).await
}

/// All objects that backups need.
async fn needed(repository: &Repository) -> Result<HashSet<SharedObject>, Error> {
    let mut needed = HashSet::new();
    let mut pages = Vec::new();
    for (_, manifest) in repository.backups().await? {
        let manifest: Manifest = manifest?;
        for (number, reference) in manifest.pages.iter().enumerate() {
            let page = reference.map(|reference| SharedObject {
                kind: Kind::Page,
                reference,
            });
            if let Some(page) = page.filter(|page| needed.insert(*page)) {
                pages.push((page, crate::page_chunks(manifest.bytes, number as u64)));
            }
        }
    }
    let read = |(object, chunks): (SharedObject, usize)| async move {
        let (_, content) = repository.get_shared(object).await?;
        page::decode(&content, chunks).map_err(|damage| Error::damaged(&object, damage))
    };
    let mut answers = stream::iter(pages).map(read).buffer_unordered(PARALLEL);
    while let Some(entries) = answers.next().await {
        needed.extend(entries?.iter().flat_map(page::Entry::objects));
    }
    Ok(needed)
}

/// What the storage's clock says: ages are judged by it alone, ours may be wrong.
async fn storage_time(repository: &Repository) -> Result<i64, Error> {
    let path = format!("{CLOCK}-{}", hex(&random::<4>()));
    repository.put_plain(&path, "".into()).await?;
    let meta = repository.head(&path).await?;
    repository.delete(vec![path.clone()], || ()).await?;
    meta.map(|meta| meta.last_modified.timestamp())
        .ok_or(Error::Missing { object: path })
}
