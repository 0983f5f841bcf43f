//! Reads a backup, chunk by chunk, in any order: for a restore, and for a disk that is used while it is restored.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use crate::error::Error;
use crate::manifest::Manifest;
use crate::object::{Kind, SharedObject};
use crate::page::Entry;
use crate::patch::Patch;
use crate::repository::Repository;
use crate::{PAGE_CHUNKS, chunk_bytes, chunks_of, error::Damage};

/// Pages kept: a GiB of the disk each, 75 KiB of memory at most.
const PAGES_KEPT: usize = 16;

/// A backup that is open for reading. Any number of reads may be under way at once.
#[derive(Debug)]
pub struct Reader {
    repository: Repository,
    manifest: Manifest,
    pages: Mutex<VecDeque<(u64, Arc<Vec<Entry>>)>>,
}

impl Reader {
    /// Of this backup.
    #[must_use]
    pub fn new(repository: &Repository, manifest: Manifest) -> Reader {
        Reader {
            repository: repository.clone(),
            manifest,
            pages: Mutex::default(),
        }
    }

    /// The backup.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The content of a chunk; none for one of zeros.
    ///
    /// # Errors
    /// When an object is missing, is not what was written, or the storage fails.
    ///
    /// # Panics
    /// When the disk has no such chunk.
    pub async fn read_chunk(&self, chunk: u64) -> Result<Option<Vec<u8>>, Error> {
        assert!(chunk < chunks_of(self.manifest.bytes), "chunk {chunk}");
        let page = self.page(chunk / PAGE_CHUNKS as u64).await?;
        let entry = page[(chunk % PAGE_CHUNKS as u64) as usize];
        let bytes = chunk_bytes(self.manifest.bytes, chunk);
        let content = read_entry(&self.repository, entry, bytes).await?;
        Ok(content.map(|(_, content)| content))
    }

    /// The entries of a page of the disk.
    ///
    /// # Errors
    /// When its object is missing or not what was written.
    pub async fn page(&self, page: u64) -> Result<Arc<Vec<Entry>>, Error> {
        let kept = |pages: &VecDeque<(u64, Arc<Vec<Entry>>)>| {
            pages
                .iter()
                .find(|(of, _)| *of == page)
                .map(|(_, entries)| Arc::clone(entries))
        };
        if let Some(entries) = kept(&self.pages.lock().expect("no holder panics")) {
            return Ok(entries);
        }
        let entries = Arc::new(self.repository.page(&self.manifest, page).await?);
        let mut pages = self.pages.lock().expect("no holder panics");
        if kept(&pages).is_none() {
            pages.push_back((page, Arc::clone(&entries)));
            if pages.len() > PAGES_KEPT {
                pages.pop_front();
            }
        }
        Ok(entries)
    }
}

/// The content of a chunk of this length, and the bytes of the objects it was in; none for zeros.
pub(crate) async fn read_entry(
    repository: &Repository,
    entry: Entry,
    bytes: usize,
) -> Result<Option<(u64, Vec<u8>)>, Error> {
    let (base, patch) = match entry {
        Entry::Zeros => return Ok(None),
        Entry::Chunk(base) => (base, None),
        Entry::Patched { base, patch } => (base, Some(patch)),
    };
    let object = SharedObject {
        kind: Kind::Chunk,
        reference: base,
    };
    let (mut brought, mut content) = repository.get_shared(object).await?;
    if content.len() != bytes {
        return Err(Error::damaged(
            &object,
            Damage::Content("the chunk has another length than its place on the disk"),
        ));
    }
    if let Some(reference) = patch {
        let object = SharedObject {
            kind: Kind::Patch,
            reference,
        };
        let (of_patch, stored) = repository.get_shared(object).await?;
        let patch = Patch::decode(&stored, bytes).map_err(|damage| Error::damaged(&object, damage))?;
        patch.apply(&mut content);
        brought += of_patch;
    }
    Ok(Some((brought, content)))
}
