//! The folder of one demo: disks, state directories, logs. It goes when the demo ends; after a failure the logs stay.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result};

use super::undo::{self, Undo};
use crate::run::root;

/// The folder.
pub struct Home {
    path: PathBuf,
    /// Where logs are kept; none when all went well.
    keep: Arc<Mutex<Option<PathBuf>>>,
    _undo: Undo,
}

/// Where what takes long to make is kept.
pub fn cache_directory() -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    target.join("weft-demo")
}

impl Home {
    /// Makes it. Next to the build folder and not in /tmp: disks want a file system that takes direct I/O, and space.
    pub fn make() -> Result<Home> {
        let cache = cache_directory();
        remove_what_a_killed_demo_left(&cache)?;
        let path = cache.join(format!("run-{}", std::process::id()));
        std::fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
        let keep = Arc::new(Mutex::new(Some(cache.join("failed"))));
        let (undone, logs) = (path.clone(), Arc::clone(&keep));
        let undo = undo::later(move || {
            if let Some(logs) = &*logs.lock().expect("a path") {
                keep_logs(&undone, logs);
            }
            if let Err(error) = std::fs::remove_dir_all(&undone) {
                eprintln!("cannot remove {}: {error}", undone.display());
            }
        });
        Ok(Home {
            path,
            keep,
            _undo: undo,
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All went well: nobody will need the logs.
    pub fn is_no_longer_needed(&self) {
        self.keep.lock().expect("a path").take();
    }
}

/// Copies the hosts' logs out of a folder that is about to go.
fn keep_logs(home: &Path, target: &Path) {
    let _ = std::fs::remove_dir_all(target);
    for host in std::fs::read_dir(home).into_iter().flatten().flatten() {
        for file in std::fs::read_dir(host.path()).into_iter().flatten().flatten() {
            if file
                .path()
                .extension()
                .is_some_and(|extension| extension == "log")
            {
                let folder = target.join(host.file_name());
                let _ = std::fs::create_dir_all(&folder);
                let _ = std::fs::copy(file.path(), folder.join(file.file_name()));
            }
        }
    }
    eprintln!("logs of the hosts and the guest: {}", target.display());
}

/// A demo that was killed (SIGKILL) could not remove its folder: it names its process, which is gone.
fn remove_what_a_killed_demo_left(cache: &Path) -> Result<()> {
    for entry in std::fs::read_dir(cache).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let process = name.to_str().and_then(|name| name.strip_prefix("run-"));
        if process.is_some_and(|process| !Path::new("/proc").join(process).exists()) {
            std::fs::remove_dir_all(entry.path()).context("what an earlier demo left")?;
        }
    }
    Ok(())
}
