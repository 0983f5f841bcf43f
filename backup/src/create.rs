//! Makes a backup.
//!
//! Pages and the chunks of each are worked on side by side, `parallel` chunks at once, each a MiB or two of memory. The
//! manifest is written last. Whatever ends a run before that leaves objects that the next run finds.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use futures_util::stream::{self, StreamExt, TryStreamExt};
use jiff::Timestamp;
use tokio::sync::Semaphore;

use crate::error::Error;
use crate::manifest::{self, BackupId, Cost, Manifest};
use crate::object::{Kind, ObjectRef, SharedObject};
use crate::page::{self, Entry};
use crate::patch::{self, BlockSet, Patch};
use crate::plan::{self, Action, Before, Touched};
use crate::progress::Progress;
use crate::repository::{Repository, manifest_path};
use crate::session::{Session, new_backup_id};
use crate::source::{Extent, Source};
use crate::sweep::Suspects;
use crate::{DISK_BYTES_MAX, PAGE_BYTES, PAGE_CHUNKS, chunk_bytes, page_chunks, pages_of};

/// Pages that are worked on at once: so many that there are chunks to read while the last of a page are written.
const PAGES_AT_ONCE: usize = 4;
/// Objects of this run that are remembered, so that the storage need not be asked again.
const REMEMBERED_MAX: usize = 1 << 18;
/// Gaps of unmapped blocks that are read over: one request instead of two.
const GAP_BLOCKS_MAX: usize = 16;

/// What a backup is to be.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// How it is called: `VDI@SNAPSHOT`.
    pub name: String,
    /// The backup it is incremental to.
    pub parent: Option<Manifest>,
    /// Of zstd.
    pub level: i32,
    /// Chunks at once.
    pub parallel: usize,
    /// The program that makes it.
    pub weft: String,
}

/// The level of zstd unless told otherwise.
pub const LEVEL: i32 = 3;
/// Chunks at once unless told otherwise.
pub const PARALLEL: usize = 16;

/// Backs a disk up.
///
/// # Errors
/// When the disk cannot be read, the storage fails, or what is asked for is no backup. Then there is none.
pub async fn create<S: Source>(
    repository: &Repository,
    source: &S,
    options: &CreateOptions,
    progress: &Progress,
) -> Result<Manifest, Error> {
    check(source, options)?;
    let session = Session::begin(repository, &format!("backup of {}", options.name)).await?;
    let made = make(repository, source, options, progress, &session).await;
    // The run is over either way; a session that cannot be ended ends by its silence.
    let _ = session.end().await;
    made
}

fn check<S: Source>(source: &S, options: &CreateOptions) -> Result<(), Error> {
    if let Err(reason) = manifest::check_name(&options.name) {
        return Err(Error::Unfit(format!(
            "'{}' is no name for a backup: {reason}",
            options.name
        )));
    }
    if source.bytes() == 0 || source.bytes() > DISK_BYTES_MAX {
        return Err(Error::Unfit(format!(
            "a disk of {} bytes cannot be backed up",
            source.bytes()
        )));
    }
    if source.is_since_parent() && options.parent.is_none() {
        return Err(Error::Unfit(
            "what changed was asked for, but not since which backup".to_owned(),
        ));
    }
    assert!(options.parallel > 0, "chunks at once");
    Ok(())
}

async fn make<S: Source>(
    repository: &Repository,
    source: &S,
    options: &CreateOptions,
    progress: &Progress,
    session: &Session,
) -> Result<Manifest, Error> {
    let created = Timestamp::now();
    if let Some(parent) = &options.parent {
        // Seen again within the session: from now on a prune keeps what it names.
        repository.manifest(parent.id).await?;
    }
    let run = Run {
        repository,
        source,
        suspects: Arc::clone(&session.suspects),
        changed_since: options.parent.as_ref().filter(|_| source.is_since_parent()),
        level: options.level,
        parallel: options.parallel,
        permits: Semaphore::new(options.parallel),
        progress,
        remembered: Mutex::default(),
        read_bytes: AtomicU64::new(0),
        new_bytes: AtomicU64::new(0),
        sent_bytes: AtomicU64::new(0),
    };
    progress.set_total(source.bytes());
    let pages: Vec<Option<ObjectRef>> = run
        .touched_pages()
        .map_ok(|(page, touched)| run.page(page, touched))
        .try_buffered(PAGES_AT_ONCE)
        .try_collect()
        .await?;
    source.finish().await?;
    let manifest = Manifest {
        id: new_backup_id(created),
        name: options.name.clone(),
        bytes: source.bytes(),
        sector_bytes: source.sector_bytes(),
        created: Timestamp::from_millisecond(created.as_millisecond()).expect("it was one"),
        parent: options.parent.as_ref().map(|parent| parent.id),
        weft: options.weft.clone(),
        cost: run.cost(),
        pages,
    };
    publish(repository, session, &manifest, options.level).await?;
    Ok(manifest)
}

/// Writes the manifest, and takes it back if a prune has not waited for this run.
async fn publish(
    repository: &Repository,
    session: &Session,
    manifest: &Manifest,
    level: i32,
) -> Result<(), Error> {
    let BackupId(id) = manifest.id;
    let path = manifest_path(manifest.id);
    let written = repository
        .put(
            Kind::Manifest,
            path.clone(),
            id.to_vec(),
            manifest.encode(),
            level,
        )
        .await;
    let standing = match written {
        Ok(_) => session.is_standing().await,
        Err(error) => Err(error),
    };
    let failure = match standing {
        Ok(true) => return Ok(()),
        Ok(false) => Error::TakenForDead,
        Err(error) => error,
    };
    // Also after a write that failed: it may have come through all the same.
    let _ = repository.delete(vec![path], || ()).await;
    Err(failure)
}

struct Run<'a, S> {
    repository: &'a Repository,
    source: &'a S,
    suspects: Arc<Suspects>,
    /// The parent, if the source tells only what changed since.
    changed_since: Option<&'a Manifest>,
    level: i32,
    parallel: usize,
    permits: Semaphore,
    progress: &'a Progress,
    remembered: Mutex<HashSet<SharedObject>>,
    read_bytes: AtomicU64,
    new_bytes: AtomicU64,
    sent_bytes: AtomicU64,
}

/// Extents that were asked for and reach into pages that are yet to come.
#[derive(Default)]
struct Cursor {
    extents: Vec<Extent>,
    asked_to: u64,
    is_at_end: bool,
}

impl<S: Source> Run<'_, S> {
    fn cost(&self) -> Cost {
        Cost {
            read_bytes: self.read_bytes.load(Ordering::Relaxed),
            new_bytes: self.new_bytes.load(Ordering::Relaxed),
            sent_bytes: self.sent_bytes.load(Ordering::Relaxed),
        }
    }

    /// Every page of the disk, with what the source says of its chunks.
    fn touched_pages(&self) -> impl stream::Stream<Item = Result<(u64, Vec<Touched>), Error>> {
        let pages = pages_of(self.source.bytes());
        stream::try_unfold((0, Cursor::default()), move |(page, mut cursor)| async move {
            if page == pages {
                return Ok(None);
            }
            self.fill(&mut cursor, self.source.bytes().min((page + 1) * PAGE_BYTES))
                .await?;
            let touched = plan::touch(self.source.bytes(), page, &cursor.extents);
            cursor
                .extents
                .retain(|extent| extent.offset + extent.bytes > (page + 1) * PAGE_BYTES);
            Ok(Some(((page, touched), (page + 1, cursor))))
        })
    }

    /// Asks for extents until none before `end` is left unknown.
    async fn fill(&self, cursor: &mut Cursor, end: u64) -> Result<(), Error> {
        while !cursor.is_at_end && cursor.asked_to < end {
            let extents = self.source.extents(cursor.asked_to).await?;
            cursor.is_at_end = extents.is_empty();
            for extent in extents {
                let (from, to) = (extent.offset, extent.offset.saturating_add(extent.bytes));
                let is_in_order = to > cursor.asked_to && to <= self.source.bytes() && from < to;
                if !is_in_order {
                    return Err(Error::Unfit(format!(
                        "the disk says that it holds {extent:?} after byte {}, of {} bytes in all",
                        cursor.asked_to,
                        self.source.bytes()
                    )));
                }
                cursor.asked_to = to;
                cursor.extents.push(extent);
            }
        }
        Ok(())
    }

    async fn page(&self, page: u64, touched: Vec<Touched>) -> Result<Option<ObjectRef>, Error> {
        let disk_bytes = self.source.bytes();
        if let Some(reference) = self.unchanged(page, &touched) {
            self.progress
                .add_done(PAGE_BYTES.min(disk_bytes - page * PAGE_BYTES));
            return Ok(reference);
        }
        let parent = match self.changed_since {
            Some(parent) if page < pages_of(parent.bytes) => Some(self.repository.page(parent, page).await?),
            _ => None,
        };
        let actions = touched.into_iter().enumerate().map(|(at, touched)| {
            let chunk = page * PAGE_CHUNKS as u64 + at as u64;
            let before = match self.changed_since {
                None => Before::Zeros,
                Some(manifest) => {
                    let entry = parent.as_ref().and_then(|entries| entries.get(at).copied());
                    plan::before(entry, &self.suspects, manifest.bytes, disk_bytes, chunk)
                }
            };
            (
                chunk,
                plan::decide(touched, before, chunk_bytes(disk_bytes, chunk)),
            )
        });
        let actions: Vec<(u64, Action)> = actions.collect();
        let entries: Vec<Entry> = stream::iter(actions)
            .map(|(chunk, action)| self.chunk(chunk, action))
            .buffered(self.parallel)
            .try_collect()
            .await?;
        assert_eq!(
            entries.len(),
            page_chunks(disk_bytes, page),
            "entries of page {page}"
        );
        match page::encode(&entries) {
            None => Ok(None),
            Some(content) => self.keep(Kind::Page, content).await.map(Some),
        }
    }

    /// The parent's page, if it is to be kept as it is.
    fn unchanged(&self, page: u64, touched: &[Touched]) -> Option<Option<ObjectRef>> {
        let parent = self.changed_since?;
        // With suspects about, each of its chunks has to be looked at.
        let is_kept = self.suspects.is_empty()
            && plan::is_same_page(parent.bytes, self.source.bytes(), page)
            && touched.iter().all(Touched::is_nothing);
        is_kept.then(|| parent.pages[page as usize])
    }

    async fn chunk(&self, chunk: u64, action: Action) -> Result<Entry, Error> {
        let bytes = chunk_bytes(self.source.bytes(), chunk);
        let entry = match action {
            Action::Keep(entry) => entry,
            Action::Zeros => Entry::Zeros,
            Action::Read(blocks) => {
                let _permit = self.permits.acquire().await.expect("it is never closed");
                self.whole(chunk, bytes, &blocks).await?
            }
            Action::Patch { base, patch, touched } => {
                let _permit = self.permits.acquire().await.expect("it is never closed");
                self.patched(chunk, bytes, base, patch, &touched).await?
            }
        };
        self.progress.add_done(bytes as u64);
        Ok(entry)
    }

    /// A chunk of which these blocks are read; the others are zeros.
    async fn whole(&self, chunk: u64, bytes: usize, blocks: &BlockSet) -> Result<Entry, Error> {
        let mut content = vec![0; bytes];
        self.read(chunk, blocks, GAP_BLOCKS_MAX, &mut content).await?;
        if is_zeros(&content) {
            return Ok(Entry::Zeros);
        }
        self.keep(Kind::Chunk, content).await.map(Entry::Chunk)
    }

    /// A chunk of the parent in which these blocks changed.
    async fn patched(
        &self,
        chunk: u64,
        bytes: usize,
        base: ObjectRef,
        patch: Option<ObjectRef>,
        touched: &Touched,
    ) -> Result<Entry, Error> {
        let mut content = vec![0; bytes];
        let mut blocks = touched.data.union(&touched.zeros);
        if let Some(reference) = patch {
            let object = SharedObject {
                kind: Kind::Patch,
                reference,
            };
            let (_, stored) = self.repository.get_shared(object).await?;
            let old = Patch::decode(&stored, bytes).map_err(|damage| Error::damaged(&object, damage))?;
            blocks = blocks.union(&old.blocks);
            old.apply(&mut content);
        }
        if blocks.len() > patch::BLOCKS_MAX {
            let all = BlockSet::all(bytes).without(&touched.zeros);
            return self.whole(chunk, bytes, &all).await;
        }
        for zeroed in touched.zeros.runs(0, bytes) {
            content[zeroed].fill(0);
        }
        self.read(chunk, &touched.data, 0, &mut content).await?;
        let reference = self.keep(Kind::Patch, patch::encode(&blocks, &content)).await?;
        Ok(Entry::Patched {
            base,
            patch: reference,
        })
    }

    /// Reads these blocks of a chunk into its content.
    async fn read(
        &self,
        chunk: u64,
        blocks: &BlockSet,
        gap: usize,
        content: &mut Vec<u8>,
    ) -> Result<(), Error> {
        let start = chunk * crate::CHUNK_BYTES;
        for run in blocks.runs(gap, content.len()) {
            let data = self.source.read(start + run.start as u64, run.len()).await?;
            assert_eq!(data.len(), run.len(), "bytes that the disk gave");
            self.read_bytes.fetch_add(data.len() as u64, Ordering::Relaxed);
            self.progress.add_read(data.len() as u64);
            if run.len() == content.len() {
                // The usual case, and no copy where the source gives its buffer away.
                *content = data.into();
            } else {
                content[run].copy_from_slice(&data);
            }
        }
        Ok(())
    }

    /// Sees to it that there is an object of this content.
    async fn keep(&self, kind: Kind, content: Vec<u8>) -> Result<ObjectRef, Error> {
        let (hash, content) = self.repository.hash(content).await;
        let reference = self.suspects.reference(kind, hash);
        let object = SharedObject { kind, reference };
        if self.remembers(&object) {
            return Ok(reference);
        }
        let path = object.to_string();
        // An object without a byte is what a storage leaves that lost its power.
        let is_there = self
            .repository
            .head(&path)
            .await?
            .is_some_and(|meta| meta.size > 0);
        if !is_there {
            let bytes = content.len() as u64;
            let sent = self
                .repository
                .put(kind, path, hash.to_vec(), content, self.level)
                .await?;
            self.new_bytes.fetch_add(bytes, Ordering::Relaxed);
            self.sent_bytes.fetch_add(sent, Ordering::Relaxed);
            self.progress.add_written(sent);
        }
        self.remember(object);
        Ok(reference)
    }

    fn remembers(&self, object: &SharedObject) -> bool {
        self.remembered.lock().expect("no holder panics").contains(object)
    }

    fn remember(&self, object: SharedObject) {
        let mut remembered = self.remembered.lock().expect("no holder panics");
        if remembered.len() >= REMEMBERED_MAX {
            remembered.clear();
        }
        remembered.insert(object);
    }
}

fn is_zeros(content: &[u8]) -> bool {
    content.iter().all(|byte| *byte == 0)
}
