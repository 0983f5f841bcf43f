//! Folders and files of a run: made before, removed after.

use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use rustix::fs::{FallocateFlags, OFlags};
use types::ByteSize;

use crate::interrupt::{Undo, undo_later};
use crate::random::Random;

const CHUNK: usize = 4 << 20;
const ALIGNMENT: usize = 4096;

/// A folder of this run; removed when dropped, unless it is to be kept.
#[derive(Debug)]
pub struct Workspace {
    path: PathBuf,
    is_kept: bool,
    _undo: Option<Undo>,
}

impl Workspace {
    /// Makes a folder below `parent`.
    pub fn create(parent: &Path, is_kept: bool) -> Result<Workspace> {
        let path = std::path::absolute(parent)?.join(format!("run-{}", std::process::id()));
        std::fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
        let doomed = path.clone();
        let undo = (!is_kept).then(|| undo_later(move || remove(&doomed)));
        Ok(Workspace {
            path,
            is_kept,
            _undo: undo,
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Workspace {
    fn drop(&mut self) {
        if !self.is_kept {
            remove(&self.path);
        }
    }
}

/// A daemon that was killed a moment ago may still have made a file: then the folder was not empty, and is now.
fn remove(path: &Path) {
    for _ in 0..3 {
        match std::fs::remove_dir_all(path) {
            Ok(()) => return,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return,
            Err(error) => eprintln!("{}: {error}", path.display()),
        }
    }
}

/// Fails unless `bytes` fit on the file system of `folder`, with a tenth of it left.
pub fn ensure_space(folder: &Path, bytes: u64) -> Result<()> {
    let status = rustix::fs::statvfs(folder).with_context(|| folder.display().to_string())?;
    let free = status.f_bavail * status.f_frsize;
    let wanted = bytes + bytes / 10;
    ensure!(
        free >= wanted,
        "{} has {} free and {} are needed: choose a smaller --span or another --dir",
        folder.display(),
        ByteSize(free >> 20 << 20),
        ByteSize(wanted.next_multiple_of(1 << 20)),
    );
    Ok(())
}

/// Makes a file of `bytes` with its space reserved and every block written once with bytes that do not compress.
///
/// A file that is only reserved is slower at first: each first write also changes the file system's records.
pub fn fully_written_file(path: &Path, bytes: u64, seed: u64) -> Result<()> {
    let in_words = || format!("cannot write {}", path.display());
    let file = File::options()
        .create_new(true)
        .write(true)
        .custom_flags(OFlags::DIRECT.bits().cast_signed())
        .open(path)
        .with_context(in_words)?;
    rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, bytes).with_context(in_words)?;
    let mut memory = vec![0; CHUNK + ALIGNMENT];
    let start = memory.as_ptr().align_offset(ALIGNMENT);
    let chunk = &mut memory[start..start + CHUNK];
    Random::new(seed).fill(chunk);
    let mut done = 0;
    while done < bytes {
        let length = (bytes - done).min(CHUNK as u64) as usize;
        chunk[..8].copy_from_slice(&done.to_le_bytes()); // no two chunks are alike
        file.write_all_at(&chunk[..length], done).with_context(in_words)?;
        done += length as u64;
    }
    file.sync_all().with_context(in_words)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_written_to_their_last_block() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        let bytes = CHUNK as u64 * 2 + 8192;
        fully_written_file(&path, bytes, 1).unwrap();
        let content = std::fs::read(&path).unwrap();
        assert_eq!(content.len() as u64, bytes);
        assert!(
            content
                .chunks(4096)
                .all(|page| page.iter().any(|&byte| byte != 0))
        );
    }

    #[test]
    fn too_little_space_is_said_before() {
        let folder = tempfile::tempdir().unwrap();
        let error = ensure_space(folder.path(), 1 << 60).unwrap_err().to_string();
        assert!(error.contains("--span"), "{error}");
        ensure_space(folder.path(), 1 << 20).unwrap();
    }

    #[test]
    fn a_workspace_is_gone_afterwards() {
        let folder = tempfile::tempdir().unwrap();
        let workspace = Workspace::create(folder.path(), false).unwrap();
        let path = workspace.path().to_owned();
        assert!(path.is_dir());
        drop(workspace);
        assert!(!path.exists());
    }
}
