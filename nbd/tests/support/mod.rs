//! A sparse disk in memory, a server on it, and clients to run against it.
#![allow(dead_code, reason = "each test file uses its part")]

pub mod raw;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use tokio::sync::Semaphore;
use weft_nbd::{Address, Config, Export, ExportError, ExportInfo, Exports, Extent, Part, Server};

const BLOCK: u64 = 4096;

/// Blocks that were written; the rest are zeros and holes.
pub struct MemoryDisk {
    pub info: Mutex<ExportInfo>,
    blocks: Mutex<BTreeMap<u64, Box<[u8]>>>,
    pub flushes: AtomicU64,
    pub fuas: AtomicU64,
    pub trims: AtomicU64,
    pub zeroes: AtomicU64,
    /// Gets a permit at the begin of each read.
    pub begun: Semaphore,
    /// Reads wait for a permit where there is one to wait for.
    pub gate: Option<Semaphore>,
    /// Reads of this offset fail.
    pub bad_offset: Option<u64>,
}

impl MemoryDisk {
    pub fn new(bytes: u64, sector_bytes: u32) -> MemoryDisk {
        MemoryDisk {
            info: Mutex::new(ExportInfo {
                bytes,
                sector_bytes,
                is_read_only: false,
                description: "a disk in memory".to_owned(),
            }),
            blocks: Mutex::default(),
            flushes: AtomicU64::new(0),
            fuas: AtomicU64::new(0),
            trims: AtomicU64::new(0),
            zeroes: AtomicU64::new(0),
            begun: Semaphore::new(0),
            gate: None,
            bad_offset: None,
        }
    }

    pub fn read_only(self) -> MemoryDisk {
        self.info.lock().unwrap().is_read_only = true;
        self
    }

    pub fn fill(&self, offset: u64, data: &[u8]) {
        let mut blocks = self.blocks.lock().unwrap();
        let mut at = offset;
        let mut rest = data;
        while !rest.is_empty() {
            let within = (at % BLOCK) as usize;
            let count = rest.len().min(BLOCK as usize - within);
            let block = blocks
                .entry(at / BLOCK)
                .or_insert_with(|| vec![0; BLOCK as usize].into());
            block[within..within + count].copy_from_slice(&rest[..count]);
            at += count as u64;
            rest = &rest[count..];
        }
    }

    pub fn content(&self, offset: u64, length: usize) -> Vec<u8> {
        let blocks = self.blocks.lock().unwrap();
        let byte = |at: u64| {
            blocks
                .get(&(at / BLOCK))
                .map_or(0, |block| block[(at % BLOCK) as usize])
        };
        (offset..offset + length as u64).map(byte).collect()
    }

    pub fn allocated_blocks(&self) -> usize {
        self.blocks.lock().unwrap().len()
    }

    fn erase(&self, offset: u64, length: u64) {
        let mut blocks = self.blocks.lock().unwrap();
        let end = offset + length;
        let whole = offset.div_ceil(BLOCK)..end / BLOCK;
        if !whole.is_empty() {
            blocks.retain(|block, _| !whole.contains(block));
        }
        for (number, block) in blocks.range_mut(offset / BLOCK..end.div_ceil(BLOCK)) {
            let start = offset.max(number * BLOCK) - number * BLOCK;
            let stop = end.min((number + 1) * BLOCK) - number * BLOCK;
            block[start as usize..stop as usize].fill(0);
        }
    }

    /// Runs of (start, length, is data) that cover the range, cut at blocks.
    fn runs(&self, offset: u64, length: u64) -> Vec<(u64, u64, bool)> {
        let blocks = self.blocks.lock().unwrap();
        let mut runs = Vec::new();
        let mut at = offset;
        while at < offset + length {
            let next = ((at / BLOCK + 1) * BLOCK).min(offset + length);
            runs.push((at, next - at, blocks.contains_key(&(at / BLOCK))));
            at = next;
        }
        runs
    }

    fn count_fua(&self, fua: bool) {
        self.fuas.fetch_add(u64::from(fua), Ordering::Relaxed);
    }
}

impl Export for MemoryDisk {
    type Buffer = Vec<u8>;
    type Data = Vec<u8>;

    fn info(&self) -> ExportInfo {
        self.info.lock().unwrap().clone()
    }

    async fn buffer(&self, length: usize) -> Vec<u8> {
        vec![0xA5; length]
    }

    async fn read(&self, offset: u64, length: u32) -> Result<Vec<Part<Vec<u8>>>, ExportError> {
        self.begun.add_permits(1);
        if let Some(gate) = &self.gate {
            gate.acquire().await.expect("never closed").forget();
        }
        if self.bad_offset == Some(offset) {
            return Err(ExportError::Io("the medium is worn".to_owned()));
        }
        let runs = self.runs(offset, u64::from(length)).into_iter();
        Ok(runs
            .map(|(at, length, is_data)| {
                if is_data {
                    Part::Data(self.content(at, length as usize))
                } else {
                    Part::Zeros(length)
                }
            })
            .collect())
    }

    async fn write(&self, offset: u64, data: Vec<u8>, fua: bool) -> Result<(), ExportError> {
        self.fill(offset, &data);
        self.count_fua(fua);
        Ok(())
    }

    async fn flush(&self) -> Result<(), ExportError> {
        self.flushes.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    async fn trim(&self, offset: u64, length: u32, fua: bool) -> Result<(), ExportError> {
        self.erase(offset, u64::from(length));
        self.trims.fetch_add(1, Ordering::Relaxed);
        self.count_fua(fua);
        Ok(())
    }

    async fn write_zeroes(&self, offset: u64, length: u32, fua: bool, _: bool) -> Result<(), ExportError> {
        self.erase(offset, u64::from(length));
        self.zeroes.fetch_add(1, Ordering::Relaxed);
        self.count_fua(fua);
        Ok(())
    }

    async fn extents(&self, offset: u64, length: u32) -> Result<Vec<Extent>, ExportError> {
        // A prefix, as the contract allows: clients have to ask again.
        let length = u64::from(length).min(16 << 20);
        let runs = self.runs(offset, length).into_iter();
        Ok(runs
            .map(|(_, length, is_data)| Extent { length, is_data })
            .collect())
    }
}

/// A server with one export, `disk`, in a directory of its own.
pub struct Served {
    pub disk: Arc<MemoryDisk>,
    pub exports: Exports<MemoryDisk>,
    pub server: Server,
    pub directory: tempfile::TempDir,
}

impl Served {
    pub fn new(disk: MemoryDisk) -> Served {
        Served::with(disk, Config::default())
    }

    pub fn with(disk: MemoryDisk, config: Config) -> Served {
        let directory = tempfile::tempdir().unwrap();
        let disk = Arc::new(disk);
        let exports = Exports::new();
        exports.add("disk", Arc::clone(&disk)).unwrap();
        let address = Address::Unix(directory.path().join("nbd.sock"));
        let server = Server::bind(&address, exports.clone(), config).unwrap();
        Served {
            disk,
            exports,
            server,
            directory,
        }
    }

    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("nbd.sock")
    }

    pub fn uri(&self) -> String {
        format!("nbd+unix:///disk?socket={}", self.socket().display())
    }

    pub fn file(&self, name: &str) -> String {
        self.directory.path().join(name).display().to_string()
    }
}

/// Runs a client to its end and returns what it said; a failure is the test's.
pub async fn run(command: &str, arguments: &[&str]) -> String {
    let output = try_run(command, arguments).await;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let cried = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{command} {arguments:?}: {}\n{said}\n{cried}",
        output.status
    );
    said
}

/// Runs a client to its end.
pub async fn try_run(command: &str, arguments: &[&str]) -> Output {
    let package = match command {
        "qemu-img" | "qemu-io" => "qemu-utils",
        "nbdinfo" | "nbdcopy" => "libnbd-bin",
        "fio" => "fio",
        other => panic!("no Debian package is known for {other}"),
    };
    let mut child = Command::new(command);
    child.args(arguments);
    let command = command.to_owned();
    tokio::task::spawn_blocking(move || match child.output() {
        Ok(output) => output,
        Err(error) => panic!("{command} does not start ({error}): install the Debian package {package}"),
    })
    .await
    .unwrap()
}

/// Bytes that repeat nowhere soon and are never all zero for long.
pub fn pattern(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    (0..length.div_ceil(8))
        .flat_map(|_| next())
        .take(length)
        .collect()
}
