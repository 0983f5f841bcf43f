//! [`KvStore`] on RocksDB: the index checkpoint of a disk, and the control records of a single host.
//!
//! The two differ in what makes a batch durable. The index is rebuilt from the disk's log if lost and is written
//! in bulk, so it has no write-ahead log: each `apply` is flushed to a sorted file. Control records are small and
//! few: they go through RocksDB's own log with a sync each.

use std::path::{Path, PathBuf};

use rocksdb::{
    BlockBasedOptions, Cache, DB, DBCompressionType, DBRecoveryMode, Direction, FlushOptions, IteratorMode,
    LogLevel, Options, ReadOptions, WriteBatch, WriteOptions,
};

use crate::{KvBatch, KvError, KvStore};

/// Cache of sorted-file blocks, index blocks included, per store.
const CACHE_BYTES: usize = 8 << 20;

/// A memtable that is full is written out; two may exist at once.
const MEMTABLE_BYTES: usize = 8 << 20;

/// Sorted files kept open.
const OPEN_FILES_MAX: i32 = 128;

/// A key-value store in a directory of its own.
pub struct Rocks {
    db: DB,
    place: PathBuf,
    durability: Durability,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Durability {
    FlushEach,
    SyncLog,
}

impl Rocks {
    /// Opens or creates the index of a disk: no write-ahead log, every `apply` flushed. About 25 MiB of memory.
    ///
    /// # Errors
    /// RocksDB cannot open the directory or finds it damaged: [`Rocks::destroy`] it and rebuild from the log.
    pub fn open_index(directory: &Path) -> Result<Rocks, KvError> {
        Rocks::open(directory, Durability::FlushEach)
    }

    /// Opens or creates control records: every `apply` synced through RocksDB's log. About 25 MiB of memory.
    ///
    /// # Errors
    /// RocksDB cannot open the directory or finds it damaged, the log's middle included.
    pub fn open_records(directory: &Path) -> Result<Rocks, KvError> {
        Rocks::open(directory, Durability::SyncLog)
    }

    fn open(directory: &Path, durability: Durability) -> Result<Rocks, KvError> {
        let db = DB::open(&options(), directory).map_err(|error| failure("open", directory, &error))?;
        Ok(Rocks {
            db,
            place: directory.to_owned(),
            durability,
        })
    }

    /// Removes a store that nobody has open; its directory too where nothing else is in it.
    ///
    /// # Errors
    /// It is open somewhere, or the files cannot be removed.
    pub fn destroy(directory: &Path) -> Result<(), KvError> {
        DB::destroy(&options(), directory).map_err(|error| failure("destroy", directory, &error))
    }

    fn failed(&self, operation: &'static str) -> impl Fn(rocksdb::Error) -> KvError {
        move |error| failure(operation, &self.place, &error)
    }
}

impl KvStore for Rocks {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, KvError> {
        self.db.get(key).map_err(self.failed("get"))
    }

    fn scan(&self, from: &[u8], to: &[u8], limit: usize) -> Result<Vec<(Vec<u8>, Vec<u8>)>, KvError> {
        if from >= to {
            return Ok(Vec::new());
        }
        let mut options = ReadOptions::default();
        options.set_iterate_upper_bound(to);
        // A scan reads everything once: let it not push out what `get` wants.
        options.fill_cache(false);
        let start = IteratorMode::From(from, Direction::Forward);
        let entry = |found: Result<(Box<[u8]>, Box<[u8]>), rocksdb::Error>| {
            found.map(|(key, value)| (key.into_vec(), value.into_vec()))
        };
        let entries = self.db.iterator_opt(start, options).take(limit).map(entry);
        entries.collect::<Result<_, _>>().map_err(self.failed("scan"))
    }

    fn apply(&mut self, batch: &KvBatch) -> Result<(), KvError> {
        let mut writes = WriteBatch::default();
        for (from, to) in batch.delete_ranges.iter().filter(|(from, to)| from < to) {
            writes.delete_range(from, to);
        }
        for key in &batch.deletes {
            writes.delete(key);
        }
        for (key, value) in &batch.puts {
            writes.put(key, value);
        }
        let mut options = WriteOptions::default();
        match self.durability {
            Durability::FlushEach => options.disable_wal(true),
            Durability::SyncLog => options.set_sync(true),
        }
        self.db
            .write_opt(writes, &options)
            .map_err(self.failed("apply"))?;
        if self.durability == Durability::FlushEach {
            let mut flush = FlushOptions::default();
            flush.set_wait(true);
            self.db.flush_opt(&flush).map_err(self.failed("apply"))?;
        }
        Ok(())
    }
}

fn failure(operation: &'static str, place: &Path, error: &rocksdb::Error) -> KvError {
    KvError {
        operation,
        place: place.display().to_string(),
        reason: error.to_string(),
    }
}

/// Small in memory, strict about damage, quiet.
fn options() -> Options {
    let mut table = BlockBasedOptions::default();
    match Cache::new_lru_cache(CACHE_BYTES) {
        Ok(cache) => table.set_block_cache(&cache),
        // Without a cache of its own each store would get RocksDB's default of the same size.
        Err(_) => table.disable_cache(),
    }
    table.set_cache_index_and_filter_blocks(true);
    table.set_bloom_filter(10.0, false);
    table.set_block_size(16 << 10);
    table.set_format_version(5);

    let mut options = Options::default();
    options.create_if_missing(true);
    options.set_block_based_table_factory(&table);
    // Block locations and checksums do not compress, and the distribution's library may lack a codec.
    options.set_compression_type(DBCompressionType::None);
    options.set_write_buffer_size(MEMTABLE_BYTES);
    options.set_max_write_buffer_number(2);
    options.set_max_open_files(OPEN_FILES_MAX);
    options.set_max_background_jobs(2);
    options.set_max_total_wal_size(2 * MEMTABLE_BYTES as u64);
    options.set_level_compaction_dynamic_level_bytes(true);
    options.set_bytes_per_sync(1 << 20);
    options.set_paranoid_checks(true);
    // A torn last record is a crash; damage before it is damage. The default would cut the log there in silence.
    options.set_wal_recovery_mode(DBRecoveryMode::TolerateCorruptedTailRecords);
    options.set_log_level(LogLevel::Warn);
    options.set_keep_log_file_num(2);
    options.set_max_log_file_size(1 << 20);
    options.set_stats_dump_period_sec(0);
    options.set_stats_persist_period_sec(0);
    options
}

#[cfg(test)]
mod tests;
