//! Writes a backup to a disk.

use bytes::Bytes;
use futures_util::stream::{self, TryStreamExt};

use crate::error::Error;
use crate::manifest::Manifest;
use crate::page::Entry;
use crate::patch::BlockSet;
use crate::progress::Progress;
use crate::reader::read_entry;
use crate::repository::Repository;
use crate::source::Sink;
use crate::{BLOCK_BYTES, CHUNK_BYTES, PAGE_CHUNKS, chunk_bytes, pages_of};

/// Zeros that are written rather than left out between data: one request instead of two.
const GAP_BLOCKS_MAX: usize = 16;

/// Writes all of a backup's data, `parallel` chunks at once.
///
/// # Errors
/// When an object is missing or damaged, the storage fails, or the disk cannot be written. What was written by then is
/// for the caller to throw away.
pub async fn restore<K: Sink>(
    repository: &Repository,
    manifest: &Manifest,
    sink: &K,
    parallel: usize,
    progress: &Progress,
) -> Result<(), Error> {
    progress.set_total(manifest.bytes);
    for page in 0..pages_of(manifest.bytes) {
        let entries = repository.page(manifest, page).await?;
        let first = page * PAGE_CHUNKS as u64;
        stream::iter((first..).zip(entries).map(Ok))
            .try_for_each_concurrent(parallel, |(chunk, entry)| {
                restore_chunk(repository, manifest, sink, chunk, entry, progress)
            })
            .await?;
    }
    sink.finish().await
}

async fn restore_chunk<K: Sink>(
    repository: &Repository,
    manifest: &Manifest,
    sink: &K,
    chunk: u64,
    entry: Entry,
    progress: &Progress,
) -> Result<(), Error> {
    let bytes = chunk_bytes(manifest.bytes, chunk);
    let start = chunk * CHUNK_BYTES;
    match read_entry(repository, entry, bytes).await? {
        None if sink.is_zeroed() => {}
        None => sink.zero(start, bytes as u64).await?,
        Some((brought, content)) => {
            progress.add_read(brought);
            let content = Bytes::from(content);
            let runs = if sink.is_zeroed() {
                data_blocks(&content).runs(GAP_BLOCKS_MAX, bytes)
            } else {
                std::iter::once(0..bytes).collect()
            };
            for run in runs {
                progress.add_written(run.len() as u64);
                sink.write(start + run.start as u64, content.slice(run)).await?;
            }
        }
    }
    progress.add_done(bytes as u64);
    Ok(())
}

/// The blocks that are not zeros.
fn data_blocks(content: &[u8]) -> BlockSet {
    let mut blocks = BlockSet::default();
    for (number, block) in content.chunks(BLOCK_BYTES).enumerate() {
        if block.iter().any(|byte| *byte != 0) {
            blocks.insert(number);
        }
    }
    blocks
}
