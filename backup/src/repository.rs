//! A repository: objects by kind, sealed on the way out and opened on the way in.
//!
//! Hashing, compression and encryption take milliseconds for a chunk: they run on blocking threads.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::stream::{BoxStream, StreamExt};
use object_store::path::Path as ObjectPath;
use object_store::{Error as StoreError, ObjectMeta, ObjectStore, ObjectStoreExt, PutMode, PutPayload};

use crate::error::{Damage, Error};
use crate::format;
use crate::key::{Key, random};
use crate::location::Location;
use crate::manifest::{BackupId, Manifest};
use crate::object::{Hash, Kind, SharedObject};
use crate::page::{self, Entry};
use crate::sealed::{Sealer, object_bytes_max};

/// Objects that are asked for at once where nothing else says it.
pub(crate) const PARALLEL: usize = 16;

/// A repository that was opened with its key.
#[derive(Clone, Debug)]
pub struct Repository {
    location: Location,
    sealer: Arc<Sealer>,
}

impl Repository {
    /// Opens what is there.
    ///
    /// # Errors
    /// When there is none, it is of another version, or the key is not its key.
    pub async fn open(location: Location, key: Option<&Key>) -> Result<Repository, Error> {
        match read_format(&location).await? {
            Some(object) => Ok(Repository {
                sealer: Arc::new(format::decode(&object, key)?),
                location,
            }),
            None => Err(Error::NoRepository {
                location: location.shown,
            }),
        }
    }

    /// Opens what is there, or makes a new one; with a key, one that is encrypted.
    ///
    /// # Errors
    /// As [`Self::open`], and when it cannot be written.
    pub async fn open_or_create(location: Location, key: Option<&Key>) -> Result<Repository, Error> {
        if read_format(&location).await?.is_none() {
            let object = format::encode(random(), key);
            let path = ObjectPath::from(format::PATH);
            let put = location
                .store
                .put_opts(&path, object.into(), PutMode::Create.into());
            match put.await {
                // Another run was faster: what it wrote counts.
                Ok(_) | Err(StoreError::AlreadyExists { .. }) => {}
                Err(source) => return Err(storage("write", format::PATH, source)),
            }
        }
        Repository::open(location, key).await
    }

    /// Where it is.
    #[must_use]
    pub fn location(&self) -> &Location {
        &self.location
    }

    /// Whether its objects are encrypted.
    #[must_use]
    pub fn is_encrypted(&self) -> bool {
        self.sealer.keys.is_some()
    }

    fn store(&self) -> &dyn ObjectStore {
        &*self.location.store
    }

    /// The hash that content is named by, and the content back.
    pub(crate) async fn hash(&self, content: Vec<u8>) -> (Hash, Vec<u8>) {
        let sealer = Arc::clone(&self.sealer);
        blocking(move || (sealer.hash(&content), content)).await
    }

    /// Writes an object; how many bytes it has.
    pub(crate) async fn put(
        &self,
        kind: Kind,
        path: String,
        name: Vec<u8>,
        content: Vec<u8>,
        level: i32,
    ) -> Result<u64, Error> {
        let sealer = Arc::clone(&self.sealer);
        let object = blocking(move || sealer.seal(kind, &name, &content, level)).await;
        let bytes = object.len() as u64;
        self.put_plain(&path, object.into()).await?;
        Ok(bytes)
    }

    /// Writes bytes as they are.
    pub(crate) async fn put_plain(&self, path: &str, object: PutPayload) -> Result<(), Error> {
        let put = self.store().put(&ObjectPath::from(path), object).await;
        put.map(|_| ()).map_err(|source| storage("write", path, source))
    }

    /// Reads an object of at most so many bytes; none if it is not there.
    pub(crate) async fn get_plain(&self, path: &str, bytes_max: u64) -> Result<Option<Bytes>, Error> {
        read(self.store(), path, bytes_max).await
    }

    /// Reads and opens an object; its bytes as stored, and its content.
    pub(crate) async fn get(&self, kind: Kind, path: &str, name: &[u8]) -> Result<(u64, Vec<u8>), Error> {
        let object = self
            .get_plain(path, object_bytes_max(kind))
            .await?
            .ok_or_else(|| Error::Missing {
                object: path.to_owned(),
            })?;
        let (sealer, name) = (Arc::clone(&self.sealer), name.to_vec());
        let bytes = object.len() as u64;
        let opened = blocking(move || sealer.open(kind, &name, &object)).await;
        let content = opened.map_err(|damage| Error::damaged(path, damage))?;
        Ok((bytes, content))
    }

    /// Reads an object that is named by its content.
    pub(crate) async fn get_shared(&self, object: SharedObject) -> Result<(u64, Vec<u8>), Error> {
        let SharedObject { kind, reference } = object;
        self.get(kind, &object.to_string(), &reference.hash).await
    }

    /// What is said of an object: none if it is not there.
    pub(crate) async fn head(&self, path: &str) -> Result<Option<ObjectMeta>, Error> {
        match self.store().head(&ObjectPath::from(path)).await {
            Ok(meta) => Ok(Some(meta)),
            Err(StoreError::NotFound { .. }) => Ok(None),
            Err(source) => Err(storage("look at", path, source)),
        }
    }

    /// All objects of a folder, in any order.
    pub(crate) fn list(&self, folder: &'static str) -> BoxStream<'_, Result<ObjectMeta, Error>> {
        let found = self.store().list(Some(&ObjectPath::from(folder)));
        found
            .map(move |meta| meta.map_err(|source| storage("list", folder, source)))
            .boxed()
    }

    /// Deletes objects; those that are gone already are no failure. `deleted` is called for each.
    pub(crate) async fn delete(&self, paths: Vec<String>, mut deleted: impl FnMut()) -> Result<(), Error> {
        let locations = futures_util::stream::iter(paths.into_iter().map(|path| Ok(ObjectPath::from(path))));
        let mut answers = self.location.store.delete_stream(locations.boxed());
        while let Some(answer) = answers.next().await {
            match answer {
                Ok(_) | Err(StoreError::NotFound { .. }) => deleted(),
                Err(source) => return Err(storage("delete", "an object", source)),
            }
        }
        Ok(())
    }

    /// The ids of all backups, oldest first.
    ///
    /// # Errors
    /// When the storage cannot be listed.
    pub async fn ids(&self) -> Result<Vec<BackupId>, Error> {
        let mut listed = self.list(Kind::Manifest.folder());
        let mut ids = Vec::new();
        while let Some(meta) = listed.next().await {
            let meta = meta?;
            ids.extend(meta.location.filename().and_then(BackupId::parse));
        }
        ids.sort_unstable();
        Ok(ids)
    }

    /// A backup's manifest.
    ///
    /// # Errors
    /// When it is not there or not what was written.
    pub async fn manifest(&self, id: BackupId) -> Result<Manifest, Error> {
        let path = manifest_path(id);
        let (_, content) = self.get(Kind::Manifest, &path, &id.0).await?;
        Manifest::decode(&content, id).map_err(|damage| Error::damaged(&path, damage))
    }

    /// All backups, oldest first, each with its id or why its manifest cannot be read.
    ///
    /// # Errors
    /// When the storage fails. A manifest that is damaged is in the list as such; one that was deleted meanwhile is not.
    pub async fn backups(&self) -> Result<Vec<(BackupId, Result<Manifest, Error>)>, Error> {
        let read = |id: BackupId| async move { (id, self.manifest(id).await) };
        let mut answers = futures_util::stream::iter(self.ids().await?)
            .map(read)
            .buffered(PARALLEL);
        let mut backups = Vec::new();
        while let Some((id, manifest)) = answers.next().await {
            match manifest {
                Err(Error::Missing { .. }) => {}
                Err(error) if !error.is_finding() => return Err(error),
                manifest => backups.push((id, manifest)),
            }
        }
        Ok(backups)
    }

    /// The entries of a page of a backup.
    ///
    /// # Errors
    /// When it is missing or not what was written.
    pub async fn page(&self, manifest: &Manifest, page: u64) -> Result<Vec<Entry>, Error> {
        let chunks = crate::page_chunks(manifest.bytes, page);
        let Some(reference) = manifest.pages[page as usize] else {
            return Ok(vec![Entry::Zeros; chunks]);
        };
        let object = SharedObject {
            kind: Kind::Page,
            reference,
        };
        let (_, content) = self.get_shared(object).await?;
        page::decode(&content, chunks).map_err(|damage| Error::damaged(&object, damage))
    }
}

/// Where a backup's manifest is.
#[must_use]
pub fn manifest_path(id: BackupId) -> String {
    format!("{}/{id}", Kind::Manifest.folder())
}

async fn read_format(location: &Location) -> Result<Option<Bytes>, Error> {
    read(&*location.store, format::PATH, format::BYTES_MAX).await
}

async fn read(store: &dyn ObjectStore, path: &str, bytes_max: u64) -> Result<Option<Bytes>, Error> {
    let found = match store.get(&ObjectPath::from(path)).await {
        Ok(found) => found,
        Err(StoreError::NotFound { .. }) => return Ok(None),
        Err(source) => return Err(storage("read", path, source)),
    };
    // Before anything of it is brought: whoever writes to the storage must not fill our memory.
    if found.meta.size > bytes_max {
        let damage = Damage::TooLong {
            have: found.meta.size,
            limit: bytes_max,
        };
        return Err(Error::damaged(path, damage));
    }
    let bytes = found
        .bytes()
        .await
        .map_err(|source| storage("read", path, source))?;
    Ok(Some(bytes))
}

pub(crate) fn storage(what: &'static str, object: &(impl ToString + ?Sized), source: StoreError) -> Error {
    Error::Storage {
        what,
        object: object.to_string(),
        source,
    }
}

/// Runs what takes long on a thread that may take long.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(_) => unreachable!("the runtime waits for its blocking tasks"),
    }
}
