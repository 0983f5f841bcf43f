//! Content of disks, written, compared, copied and spoiled.

use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use super::{Daemon, NbdClient};

const PIECE: u64 = 64 * 1024;

/// Writes `count` pieces of 64 KiB of `byte`, from piece `from` on, over NBD, and flushes.
pub fn fill(daemon: &Daemon, vdi: &str, from: u64, count: u64, byte: u8) {
    let mut client = NbdClient::connect(&daemon.path(&format!("{vdi}.nbd"))).expect("connect");
    for number in from..from + count {
        client
            .write(number * PIECE, &[byte; PIECE as usize])
            .expect("write");
    }
    client.flush().expect("flush");
}

/// Reads and compares what [`fill`] wrote.
pub fn verify(daemon: &Daemon, vdi: &str, from: u64, count: u64, byte: u8) {
    let mut client = NbdClient::connect(&daemon.path(&format!("{vdi}.nbd"))).expect("connect");
    for number in from..from + count {
        let data = client.read(number * PIECE, PIECE as u32).expect("read");
        assert!(data.iter().all(|found| *found == byte), "piece {number} of {vdi}");
    }
}

/// Spoils a block of a disk, whole.
pub fn damage(disk: &Path, offset: u64) {
    let mut file = std::fs::File::options().write(true).open(disk).expect("open");
    file.seek(SeekFrom::Start(offset)).expect("seek");
    file.write_all(&[0x55; 4096]).expect("write");
}

/// A copy of a disk or a folder, holes kept.
pub fn copy(from: &Path, to: &Path) {
    let copied = Command::new("cp")
        .args(["--recursive", "--sparse=always"])
        .args([from, to])
        .status();
    assert!(copied.expect("cp").success());
}

/// Turns the bits of one byte of a disk.
pub fn flip_bits(disk: &Path, offset: u64) {
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(disk)
        .expect("open");
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).expect("read");
    file.write_all_at(&[!byte[0]], offset).expect("write");
}

/// Gives a superblock another version, with the checksum that belongs to it (docs/format.md).
pub fn set_version(disk: &Path, offset: u64, version: u16) {
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(disk)
        .expect("open");
    let mut block = [0; 4096];
    file.read_exact_at(&mut block, offset).expect("read");
    block[8..10].copy_from_slice(&version.to_le_bytes());
    block[12..16].fill(0);
    let crc = types::crc32c(&block);
    block[12..16].copy_from_slice(&crc.to_le_bytes());
    file.write_all_at(&block, offset).expect("write");
}
