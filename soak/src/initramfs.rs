//! The guest's initramfs: a stock Debian one, with programs of this machine, the libraries they want and an `/init` of
//! ours laid over it.
//!
//! The kernel unpacks archives that follow each other, later files over earlier ones. A whole Debian would take minutes
//! to boot in emulation; this takes seconds.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;

/// Writes `base` and our additions to `target`. `files` are this machine's, by their paths; those that are programs bring
/// their libraries along.
pub fn make(base: &Path, init: &str, files: &[&Path], target: &Path) -> Result<()> {
    let mut bytes = std::fs::read(base).with_context(|| base.display().to_string())?;
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    let mut archive = Archive::default();
    archive.add("init", PROGRAM, init.as_bytes());
    let mut all: BTreeSet<PathBuf> = BTreeSet::new();
    for file in files {
        all.insert(file.to_path_buf());
        all.extend(libraries(file)?);
    }
    let mut folders = BTreeSet::new();
    for file in all {
        let content = std::fs::read(&file).with_context(|| file.display().to_string())?;
        let name = place(&file)?;
        for folder in Path::new(&name)
            .ancestors()
            .skip(1)
            .collect::<Vec<_>>()
            .into_iter()
            .rev()
        {
            let folder = folder.to_str().context("UTF-8")?;
            if !folder.is_empty() && folders.insert(folder.to_owned()) {
                archive.add(folder, DIRECTORY, &[]);
            }
        }
        archive.add(&name, PROGRAM, &content);
    }
    archive.add("TRAILER!!!", 0, &[]);
    let mut file = BufWriter::new(File::create(target)?);
    file.write_all(&bytes)?;
    file.write_all(&archive.bytes)?;
    Ok(file.flush()?)
}

/// /bin, /lib and /lib64 are links to those below /usr in the base: what is meant for them goes there.
fn place(file: &Path) -> Result<String> {
    let name = file.to_str().context("UTF-8")?.trim_start_matches('/');
    Ok(if name.starts_with("usr/") {
        name.to_owned()
    } else {
        format!("usr/{name}")
    })
}

/// None of what is no program.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).output().context("ldd")?;
    let text = String::from_utf8(output.stdout).context("output of ldd")?;
    // `name => /path (address)`, and for the loader `/path (address)`.
    let path = |line: &str| {
        let from = line.find('/')?;
        Some(PathBuf::from(line[from..].split(' ').next()?))
    };
    Ok(text.lines().filter_map(path).collect())
}

/// A cpio archive in the "newc" format (kernel Documentation/driver-api/early-userspace/buffer-format.rst).
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    files: u32,
}

impl Archive {
    fn add(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.files += 1;
        let mut header = String::from("070701");
        let name_bytes = name.len() as u32 + 1;
        let fields = [
            self.files,
            mode,
            0,
            0,
            1,
            0,
            content.len() as u32,
            0,
            0,
            0,
            0,
            name_bytes,
            0,
        ];
        for field in fields {
            header.push_str(&format!("{field:08x}"));
        }
        self.bytes.extend(header.as_bytes());
        self.bytes.extend(name.as_bytes());
        self.bytes.push(0);
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
        self.bytes.extend(content);
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}
