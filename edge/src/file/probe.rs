//! What to know of a disk before it is given to the pool whole. Only looks: no lock, no write.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use super::signature::{HEAD_BYTES, TAIL_BYTES, find_signatures};
use super::{OpenError, in_use};

/// A disk as it is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProbeReport {
    /// A block device; else a regular file.
    pub is_block_device: bool,
    /// Capacity.
    pub bytes: u64,
    /// Each use found, in words: mounts, swap, devices stacked on it or its partitions. Empty: free.
    pub uses: Vec<String>,
    /// Each thing found on it, in words: partition tables, file systems, volume members, disk images.
    pub signatures: Vec<String>,
    /// The first eight bytes, where a Weft superblock has its magic; zeros where the disk is shorter.
    pub first_bytes: [u8; 8],
    /// The parts looked at are all zero: blank as far as we can tell.
    pub is_blank: bool,
}

impl ProbeReport {
    /// Nobody uses it and nothing is recognised on it; it may still hold data of a kind we do not know,
    /// which [`ProbeReport::is_blank`] being false hints at.
    #[must_use]
    pub fn is_free(&self) -> bool {
        self.uses.is_empty() && self.signatures.is_empty()
    }
}

/// Looks at `path`.
///
/// # Errors
/// It cannot be opened or read, or is neither a block device nor a regular file.
pub fn probe(path: &Path) -> Result<ProbeReport, OpenError> {
    let failed = |operation| {
        move |source| OpenError::Io {
            operation,
            path: path.to_owned(),
            source,
        }
    };
    let metadata = std::fs::metadata(path).map_err(failed("looking at"))?;
    let is_block_device = metadata.file_type().is_block_device();
    if !is_block_device && !metadata.is_file() {
        return Err(OpenError::NotADisk {
            path: path.to_owned(),
        });
    }
    let mut file = File::open(path).map_err(failed("opening"))?;
    let bytes = file.seek(SeekFrom::End(0)).map_err(failed("sizing"))?;
    let head = read_range(&file, 0, HEAD_BYTES as u64, bytes).map_err(failed("reading"))?;
    let tail_start = bytes.saturating_sub(TAIL_BYTES as u64);
    let tail = read_range(&file, tail_start, TAIL_BYTES as u64, bytes).map_err(failed("reading"))?;
    let uses = if is_block_device {
        let mut uses = in_use::uses_of_block_device(metadata.rdev());
        if uses.is_empty() && is_claimed(path) {
            uses.push("claimed by the kernel or another process".to_owned());
        }
        uses
    } else {
        in_use::uses_of_file(path)
    };
    let mut first_bytes = [0; 8];
    let known = head.len().min(8);
    first_bytes[..known].copy_from_slice(&head[..known]);
    Ok(ProbeReport {
        is_block_device,
        bytes,
        uses,
        signatures: find_signatures(&head, &tail),
        first_bytes,
        is_blank: head.iter().chain(&tail).all(|byte| *byte == 0),
    })
}

/// The part of `start..start + length` that the disk has.
fn read_range(file: &File, start: u64, length: u64, disk_bytes: u64) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; length.min(disk_bytes - start) as usize];
    file.read_exact_at(&mut bytes, start)?;
    Ok(bytes)
}

/// Whether the kernel refuses exclusive use: the last word, whatever `/proc` and `/sys` showed us.
fn is_claimed(path: &Path) -> bool {
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_EXCL)
        .open(path);
    opened.is_err_and(|error| error.raw_os_error() == Some(libc::EBUSY))
}
