//! Image files and block devices, as what is backed up and as what is restored to.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::Errno;

use crate::error::Error;
use crate::repository::blocking;
use crate::source::{Extent, Sink, Source, What};

/// Extents that are told at once.
const EXTENTS_AT_ONCE: usize = 4096;
/// Zeros are written so many at once where the device cannot make them.
const ZEROS_BYTES: usize = 1 << 20;

/// A file or block device that is read.
#[derive(Debug)]
pub struct FileSource {
    shown: String,
    file: Arc<File>,
    bytes: u64,
    /// Of a file: when it was last written, to see that nobody did while it was read.
    modified: Option<(i64, i64)>,
}

impl FileSource {
    /// Opens it.
    ///
    /// # Errors
    /// When it cannot be opened or is neither.
    pub fn open(path: &Path) -> Result<FileSource, Error> {
        let shown = path.display().to_string();
        let refuse = |reason: String| Error::Source {
            what: shown.clone(),
            reason,
        };
        let file = File::open(path).map_err(|error| refuse(error.to_string()))?;
        let bytes = size(&file).map_err(refuse)?;
        let modified = modified(&file).map_err(|error| refuse(error.to_string()))?;
        Ok(FileSource {
            file: Arc::new(file),
            shown,
            bytes,
            modified,
        })
    }

    fn refuse(&self, reason: &(impl ToString + ?Sized)) -> Error {
        Error::Source {
            what: self.shown.clone(),
            reason: reason.to_string(),
        }
    }
}

fn size(file: &File) -> Result<u64, String> {
    let kind = file.metadata().map_err(|error| error.to_string())?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err("it is neither a file nor a block device".to_owned());
    }
    rustix::fs::seek(file, SeekFrom::End(0)).map_err(|error| error.to_string())
}

fn modified(file: &File) -> io::Result<Option<(i64, i64)>> {
    let meta = file.metadata()?;
    Ok(meta.is_file().then(|| (meta.mtime(), meta.mtime_nsec())))
}

impl Source for FileSource {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn sector_bytes(&self) -> u32 {
        512
    }

    fn is_since_parent(&self) -> bool {
        false
    }

    async fn extents(&self, from: u64) -> Result<Vec<Extent>, Error> {
        let (file, bytes) = (Arc::clone(&self.file), self.bytes);
        blocking(move || data_extents(&file, from, bytes))
            .await
            .map_err(|error| self.refuse(&error))
    }

    async fn read(&self, offset: u64, bytes: usize) -> Result<Bytes, Error> {
        let file = Arc::clone(&self.file);
        let read = move || {
            let mut data = vec![0; bytes];
            file.read_exact_at(&mut data, offset).map(|()| Bytes::from(data))
        };
        blocking(read)
            .await
            .map_err(|error| self.refuse(&format!("{bytes} bytes at {offset}: {error}")))
    }

    async fn finish(&self) -> Result<(), Error> {
        let now = modified(&self.file).map_err(|error| self.refuse(&error))?;
        let bytes = size(&self.file).map_err(|reason| self.refuse(&reason))?;
        if now != self.modified || bytes != self.bytes {
            return Err(self.refuse("it was written while it was read"));
        }
        Ok(())
    }
}

/// The file's data after `from`, as its file system knows it; all of it where it does not.
fn data_extents(file: &File, from: u64, bytes: u64) -> Result<Vec<Extent>, Errno> {
    let data = |offset: u64, end: u64| Extent {
        offset,
        bytes: end - offset,
        what: What::Data,
    };
    let (mut extents, mut at) = (Vec::new(), from);
    while at < bytes && extents.len() < EXTENTS_AT_ONCE {
        let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(Errno::NXIO) => break,
            // Block devices and some file systems know nothing of holes.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => at,
            Err(error) => return Err(error),
        };
        let end = match rustix::fs::seek(file, SeekFrom::Hole(start)) {
            Ok(end) => end.min(bytes),
            Err(Errno::INVAL | Errno::OPNOTSUPP) => bytes,
            Err(error) => return Err(error),
        };
        if start >= end {
            break;
        }
        extents.push(data(start, end));
        at = end;
    }
    Ok(extents)
}

/// A file or block device that is written.
#[derive(Debug)]
pub struct FileSink {
    shown: String,
    file: Arc<File>,
    /// Of a new file: where it is while it is not whole, and where it belongs.
    staged: Option<(PathBuf, PathBuf)>,
    is_done: AtomicBool,
}

impl FileSink {
    /// A new file of this size, or a block device that has it. An existing file is replaced, and a device written, only
    /// with `overwrite`. The file is there under its name when it is whole, not before.
    ///
    /// # Errors
    /// When it cannot be made or opened, is too small, or is there.
    pub fn create(path: &Path, bytes: u64, overwrite: bool) -> Result<FileSink, Error> {
        let shown = path.display().to_string();
        let refuse = |reason: String| Error::Sink {
            what: shown.clone(),
            reason,
        };
        let there = std::fs::metadata(path).ok();
        if there.is_some() && !overwrite {
            return Err(refuse("it is there already".to_owned()));
        }
        if there.is_some_and(|meta| meta.file_type().is_block_device()) {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .open(path)
                .map_err(|error| refuse(error.to_string()))?;
            let has = size(&file).map_err(refuse)?;
            if has < bytes {
                return Err(refuse(format!("it has {has} bytes, the backup {bytes}")));
            }
            return Ok(FileSink {
                file: Arc::new(file),
                shown,
                staged: None,
                is_done: AtomicBool::new(false),
            });
        }
        let mut staged = path.as_os_str().to_owned();
        staged.push(format!(".weft-restore-{}", std::process::id()));
        let staged = PathBuf::from(staged);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&staged)
            .map_err(|error| refuse(error.to_string()))?;
        let sink = FileSink {
            file: Arc::new(file),
            shown: shown.clone(),
            staged: Some((staged, path.to_owned())),
            is_done: AtomicBool::new(false),
        };
        sink.file
            .set_len(bytes)
            .map_err(|error| refuse(error.to_string()))?;
        Ok(sink)
    }

    async fn act(&self, act: impl FnOnce(&File) -> io::Result<()> + Send + 'static) -> Result<(), Error> {
        let file = Arc::clone(&self.file);
        blocking(move || act(&file)).await.map_err(|error| Error::Sink {
            what: self.shown.clone(),
            reason: error.to_string(),
        })
    }
}

impl Drop for FileSink {
    /// What was not finished is no file.
    fn drop(&mut self) {
        if let Some((staged, _)) = self
            .staged
            .as_ref()
            .filter(|_| !self.is_done.load(Ordering::Relaxed))
        {
            let _ = std::fs::remove_file(staged);
        }
    }
}

impl Sink for FileSink {
    fn is_zeroed(&self) -> bool {
        self.staged.is_some()
    }

    async fn write(&self, offset: u64, data: Bytes) -> Result<(), Error> {
        self.act(move |file| file.write_all_at(&data, offset)).await
    }

    async fn zero(&self, offset: u64, bytes: u64) -> Result<(), Error> {
        self.act(move |file| {
            let made = rustix::fs::fallocate(
                file,
                FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
                offset,
                bytes,
            );
            match made {
                Ok(()) => Ok(()),
                Err(Errno::OPNOTSUPP | Errno::INVAL | Errno::NODEV) => write_zeros(file, offset, bytes),
                Err(error) => Err(error.into()),
            }
        })
        .await
    }

    async fn finish(&self) -> Result<(), Error> {
        let staged = self.staged.clone();
        self.act(move |file| {
            file.sync_all()?;
            let Some((from, to)) = staged else {
                return Ok(());
            };
            std::fs::rename(from, &to)?;
            let parent = to.parent().filter(|parent| !parent.as_os_str().is_empty());
            File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
        })
        .await?;
        self.is_done.store(true, Ordering::Relaxed);
        Ok(())
    }
}

fn write_zeros(file: &File, offset: u64, bytes: u64) -> io::Result<()> {
    let zeros = vec![0; ZEROS_BYTES];
    let mut done = 0;
    while done < bytes {
        let length = (bytes - done).min(ZEROS_BYTES as u64) as usize;
        file.write_all_at(&zeros[..length], offset + done)?;
        done += length as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_file_that_was_written_meanwhile_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        std::fs::write(&path, [1; 5000]).unwrap();
        let source = FileSource::open(&path).unwrap();
        assert_eq!(source.read(4990, 10).await.unwrap(), [1; 10][..]);
        assert!(source.read(4990, 11).await.is_err());
        source.finish().await.unwrap();
        // To the nanosecond: the clock of a file system may be coarse.
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        file.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
        let refused = source.finish().await.unwrap_err().to_string();
        assert!(refused.contains("written while it was read"), "{refused}");
        let source = FileSource::open(&path).unwrap();
        file.set_len(4999).unwrap();
        assert!(source.finish().await.is_err());
    }

    #[tokio::test]
    async fn holes_are_no_extents() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        let file = File::create(&path).unwrap();
        file.set_len(64 << 20).unwrap();
        file.write_all_at(&[1; 4096], 32 << 20).unwrap();
        let source = FileSource::open(&path).unwrap();
        let extents = source.extents(0).await.unwrap();
        let bytes: u64 = extents.iter().map(|extent| extent.bytes).sum();
        assert!((4096..=64 << 20).contains(&bytes), "{extents:?}");
        assert!(
            extents
                .iter()
                .any(|extent| extent.offset <= 32 << 20 && extent.offset + extent.bytes > 32 << 20)
        );
        assert_eq!(source.extents(64 << 20).await.unwrap(), []);
        assert!(FileSource::open(folder.path()).is_err(), "a folder is no disk");
    }

    #[tokio::test]
    async fn a_new_file_is_there_when_it_is_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        let sink = FileSink::create(&path, 10_000, false).unwrap();
        sink.write(5000, Bytes::from_static(b"data")).await.unwrap();
        assert!(!path.exists());
        drop(sink);
        assert_eq!(
            std::fs::read_dir(folder.path()).unwrap().count(),
            0,
            "nothing is left of what failed"
        );
        let sink = FileSink::create(&path, 10_000, false).unwrap();
        sink.write(5000, Bytes::from_static(b"data")).await.unwrap();
        sink.finish().await.unwrap();
        drop(sink);
        let content = std::fs::read(&path).unwrap();
        assert_eq!((content.len(), &content[4999..5005]), (10_000, &b"\0data\0"[..]));
        assert!(FileSink::create(&path, 10_000, false).is_err());
        let sink = FileSink::create(&path, 4, true).unwrap();
        sink.finish().await.unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 4);
    }
}
