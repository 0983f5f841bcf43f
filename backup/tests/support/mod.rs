//! Disks in memory and storages that fail, for the tests of whole runs.
#![allow(dead_code, reason = "each test program uses some of it")]

use std::collections::BTreeSet;
use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::stream::{BoxStream, StreamExt};
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult,
};
use weft_backup::create::LEVEL;
use weft_backup::location::Location;
use weft_backup::{
    CreateOptions, Error, Extent, Key, Manifest, Progress, Repository, Sink, Source, What, create, restore,
};

pub const MIB: u64 = 1 << 20;
const BLOCK: u64 = 4096;

/// Numbers from a seed: xorshift, good enough to fill disks.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    pub fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count.div_ceil(8))
            .flat_map(|_| self.next().to_le_bytes())
            .take(count)
            .collect()
    }
}

/// A disk in memory, of which it is known which blocks were written and which changed since it was marked.
#[derive(Clone, Debug)]
pub struct Disk {
    pub content: Vec<u8>,
    written: BTreeSet<u64>,
    zeroed: BTreeSet<u64>,
    is_since_mark: bool,
    /// Bytes that were read.
    pub read: Arc<AtomicU64>,
}

impl Disk {
    pub fn new(bytes: u64) -> Disk {
        Disk {
            content: vec![0; bytes as usize],
            written: BTreeSet::new(),
            zeroed: BTreeSet::new(),
            is_since_mark: false,
            read: Arc::default(),
        }
    }

    /// Of text and random data, with holes.
    pub fn filled(bytes: u64, seed: u64) -> Disk {
        let mut disk = Disk::new(bytes);
        let mut random = Random::new(seed);
        let mut at = 0;
        while at < bytes {
            let length = (random.below(3 * MIB) + 1).min(bytes - at);
            match random.below(3) {
                0 => {}
                1 => disk.write(at, &random.bytes(length as usize)),
                _ => disk.write(at, &text(length as usize, random.next())),
            }
            at += length;
        }
        disk
    }

    pub fn write(&mut self, offset: u64, data: &[u8]) {
        self.content[offset as usize..][..data.len()].copy_from_slice(data);
        for block in offset / BLOCK..(offset + data.len() as u64).div_ceil(BLOCK) {
            self.written.insert(block);
            self.zeroed.remove(&block);
        }
    }

    pub fn trim(&mut self, first_block: u64, blocks: u64) {
        for block in first_block..first_block + blocks {
            let end = ((block + 1) * BLOCK).min(self.content.len() as u64);
            self.content[(block * BLOCK) as usize..end as usize].fill(0);
            self.written.remove(&block);
            self.zeroed.insert(block);
        }
    }

    pub fn resize(&mut self, bytes: u64) {
        let before = bytes.min(self.bytes());
        self.content.resize(bytes as usize, 0);
        let blocks = bytes.div_ceil(BLOCK);
        self.written.retain(|block| *block < blocks);
        self.zeroed.retain(|block| *block < blocks);
        // What was cut off and came back reads as zeros now: that is a change.
        self.written.insert(before / BLOCK);
        self.zeroed.remove(&(before / BLOCK));
        self.zeroed.extend(before.div_ceil(BLOCK)..blocks);
        self.written.retain(|block| *block < blocks);
    }

    /// From here on it tells what changed.
    pub fn mark(&mut self) {
        self.written.clear();
        self.zeroed.clear();
        self.is_since_mark = true;
    }
}

pub fn text(length: usize, seed: u64) -> Vec<u8> {
    let mut random = Random::new(seed);
    let words = ["snapshot ", "of a disk ", "block ", "log ", "segment ", "and "];
    let mut text = Vec::new();
    while text.len() < length {
        text.extend(words[random.below(6) as usize].as_bytes());
    }
    text.truncate(length);
    text
}

impl Source for Disk {
    fn bytes(&self) -> u64 {
        self.content.len() as u64
    }

    fn sector_bytes(&self) -> u32 {
        512
    }

    fn is_since_parent(&self) -> bool {
        self.is_since_mark
    }

    async fn extents(&self, from: u64) -> Result<Vec<Extent>, Error> {
        let first = from / BLOCK;
        let blocks = self.written.range(first..).map(|block| (*block, What::Data));
        let mut all: Vec<(u64, What)> = blocks
            .chain(self.zeroed.range(first..).map(|block| (*block, What::Zeros)))
            .collect();
        all.sort_unstable_by_key(|(block, _)| *block);
        let mut extents: Vec<Extent> = Vec::new();
        for (block, what) in all {
            let (offset, end) = (block * BLOCK, ((block + 1) * BLOCK).min(self.bytes()));
            // A few at a time, so that runs ask again.
            let is_enough = extents.len() == 7;
            match extents.last_mut() {
                Some(last) if last.what == what && last.offset + last.bytes == offset => {
                    last.bytes += end - offset;
                }
                _ if is_enough => break,
                _ => extents.push(Extent {
                    offset,
                    bytes: end - offset,
                    what,
                }),
            }
        }
        Ok(extents)
    }

    async fn read(&self, offset: u64, bytes: usize) -> Result<Bytes, Error> {
        self.read.fetch_add(bytes as u64, Ordering::Relaxed);
        Ok(Bytes::copy_from_slice(&self.content[offset as usize..][..bytes]))
    }

    async fn finish(&self) -> Result<(), Error> {
        Ok(())
    }
}

/// A disk that is restored in memory.
pub struct Target {
    pub content: Mutex<Vec<u8>>,
    pub is_zeroed: bool,
    pub is_finished: Mutex<bool>,
}

impl Sink for Target {
    fn is_zeroed(&self) -> bool {
        self.is_zeroed
    }

    async fn write(&self, offset: u64, data: Bytes) -> Result<(), Error> {
        self.content.lock().unwrap()[offset as usize..][..data.len()].copy_from_slice(&data);
        Ok(())
    }

    async fn zero(&self, offset: u64, bytes: u64) -> Result<(), Error> {
        self.content.lock().unwrap()[offset as usize..][..bytes as usize].fill(0);
        Ok(())
    }

    async fn finish(&self) -> Result<(), Error> {
        *self.is_finished.lock().unwrap() = true;
        Ok(())
    }
}

/// What a backup restores to, on a disk that was full of other data.
pub async fn restored(repository: &Repository, manifest: &Manifest) -> Result<Vec<u8>, Error> {
    let target = Target {
        content: Mutex::new(vec![0xaa; manifest.bytes as usize]),
        is_zeroed: false,
        is_finished: Mutex::new(false),
    };
    restore(repository, manifest, &target, 4, &Progress::default()).await?;
    assert!(*target.is_finished.lock().unwrap());
    Ok(target.content.into_inner().unwrap())
}

pub fn options(name: &str, parent: Option<Manifest>) -> CreateOptions {
    CreateOptions {
        name: name.to_owned(),
        parent,
        level: LEVEL,
        parallel: 4,
        weft: "weft-test".to_owned(),
    }
}

pub async fn backup(
    repository: &Repository,
    disk: &Disk,
    name: &str,
    parent: Option<&Manifest>,
) -> Result<Manifest, Error> {
    create(
        repository,
        disk,
        &options(name, parent.cloned()),
        &Progress::default(),
    )
    .await
}

/// What a storage with faults does with its n-th operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It fails, and all after it: the process is killed, or the storage is gone.
    Gone,
    /// It is done, but said to have failed, and all after it fails.
    DoneThenGone,
}

/// A storage in memory that can be made to fail, and that counts.
#[derive(Debug)]
pub struct Faulty {
    pub inner: Arc<InMemory>,
    operations: AtomicU64,
    fault: Option<(u64, Fault)>,
    pub puts: Mutex<Vec<String>>,
}

impl Faulty {
    pub fn new(inner: &Arc<InMemory>, fault: Option<(u64, Fault)>) -> Arc<Faulty> {
        Arc::new(Faulty {
            inner: Arc::clone(inner),
            operations: AtomicU64::new(0),
            fault,
            puts: Mutex::default(),
        })
    }

    pub fn operations(&self) -> u64 {
        self.operations.load(Ordering::Relaxed)
    }

    /// Whether the operation is to be done, and whether it is to be said to be done.
    fn next(&self) -> (bool, bool) {
        let number = self.operations.fetch_add(1, Ordering::Relaxed);
        match self.fault {
            Some((at, Fault::DoneThenGone)) if number == at => (true, false),
            Some((at, _)) if number >= at => (false, false),
            _ => (true, true),
        }
    }

    async fn through<T>(
        &self,
        act: impl Future<Output = object_store::Result<T>>,
    ) -> object_store::Result<T> {
        let (is_done, is_said) = self.next();
        let result = if is_done { act.await } else { Err(refusal()) };
        if is_said { result } else { Err(refusal()) }
    }
}

pub fn refusal() -> object_store::Error {
    object_store::Error::Generic {
        store: "Faulty",
        source: "the storage is gone".into(),
    }
}

impl fmt::Display for Faulty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("faulty")
    }
}

#[async_trait]
impl ObjectStore for Faulty {
    async fn put_opts(
        &self,
        at: &Path,
        payload: PutPayload,
        options: PutOptions,
    ) -> object_store::Result<PutResult> {
        self.puts.lock().unwrap().push(at.to_string());
        self.through(self.inner.put_opts(at, payload, options)).await
    }

    async fn put_multipart_opts(
        &self,
        _: &Path,
        _: PutMultipartOptions,
    ) -> object_store::Result<Box<dyn MultipartUpload>> {
        Err(refusal())
    }

    async fn get_opts(&self, at: &Path, options: GetOptions) -> object_store::Result<GetResult> {
        self.through(self.inner.get_opts(at, options)).await
    }

    async fn get_ranges(&self, at: &Path, ranges: &[Range<u64>]) -> object_store::Result<Vec<Bytes>> {
        self.through(self.inner.get_ranges(at, ranges)).await
    }

    fn delete_stream(
        &self,
        at: BoxStream<'static, object_store::Result<Path>>,
    ) -> BoxStream<'static, object_store::Result<Path>> {
        let (is_done, is_said) = self.next();
        let failed = || futures_util::stream::iter([Err(refusal())]).boxed();
        match (is_done, is_said) {
            (true, true) => self.inner.delete_stream(at),
            // Cut off in the middle: one was deleted.
            (true, false) => self
                .inner
                .delete_stream(at.take(1).boxed())
                .chain(failed())
                .boxed(),
            _ => failed(),
        }
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        match self.next() {
            (true, true) => self.inner.list(prefix),
            _ => futures_util::stream::iter([Err(refusal())]).boxed(),
        }
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> object_store::Result<ListResult> {
        self.through(self.inner.list_with_delimiter(prefix)).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> object_store::Result<()> {
        self.through(self.inner.copy_opts(from, to, options)).await
    }
}

pub fn location(store: Arc<dyn ObjectStore>) -> Location {
    Location {
        store,
        shown: "memory".to_owned(),
        directory: None,
    }
}

pub async fn open(store: Arc<dyn ObjectStore>, key: Option<&Key>) -> Result<Repository, Error> {
    Repository::open_or_create(location(store), key).await
}

pub async fn fresh(key: Option<&Key>) -> (Arc<InMemory>, Repository) {
    let store = Arc::new(InMemory::new());
    let repository = open(Arc::clone(&store) as _, key).await.unwrap();
    (store, repository)
}

/// Paths of all objects.
pub async fn paths(store: &dyn ObjectStore) -> BTreeSet<String> {
    store
        .list(None)
        .map(|meta| meta.unwrap().location.to_string())
        .collect()
        .await
}

/// A storage that lets others go first, before and after each operation, as its seed says.
#[derive(Debug)]
pub struct Slow {
    inner: Arc<InMemory>,
    random: Mutex<u64>,
}

impl Slow {
    pub fn new(inner: &Arc<InMemory>, seed: u64) -> Arc<Slow> {
        Arc::new(Slow {
            inner: Arc::clone(inner),
            random: Mutex::new(seed),
        })
    }

    async fn wait(&self) {
        let turns = {
            let mut state = self.random.lock().unwrap();
            let mut random = Random::new(*state);
            *state = random.next();
            // Mostly short, sometimes as long as another's whole run.
            [0, 1, 5, 60][random.below(4) as usize]
        };
        for _ in 0..turns {
            tokio::task::yield_now().await;
        }
    }

    async fn through<T>(
        &self,
        act: impl Future<Output = object_store::Result<T>>,
    ) -> object_store::Result<T> {
        self.wait().await;
        let result = act.await;
        self.wait().await;
        result
    }
}

impl fmt::Display for Slow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("slow")
    }
}

#[async_trait]
impl ObjectStore for Slow {
    async fn put_opts(
        &self,
        at: &Path,
        payload: PutPayload,
        options: PutOptions,
    ) -> object_store::Result<PutResult> {
        self.through(self.inner.put_opts(at, payload, options)).await
    }

    async fn put_multipart_opts(
        &self,
        _: &Path,
        _: PutMultipartOptions,
    ) -> object_store::Result<Box<dyn MultipartUpload>> {
        Err(refusal())
    }

    async fn get_opts(&self, at: &Path, options: GetOptions) -> object_store::Result<GetResult> {
        self.through(self.inner.get_opts(at, options)).await
    }

    async fn get_ranges(&self, at: &Path, ranges: &[Range<u64>]) -> object_store::Result<Vec<Bytes>> {
        self.through(self.inner.get_ranges(at, ranges)).await
    }

    fn delete_stream(
        &self,
        at: BoxStream<'static, object_store::Result<Path>>,
    ) -> BoxStream<'static, object_store::Result<Path>> {
        self.inner.delete_stream(at)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        self.inner.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> object_store::Result<ListResult> {
        self.through(self.inner.list_with_delimiter(prefix)).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> object_store::Result<()> {
        self.through(self.inner.copy_opts(from, to, options)).await
    }
}
