//! What is done to pool disks: noise over them, failure, and the scrub that mends.

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use sim::Rng;

use crate::MIB;
use crate::daemon::Daemon;

/// Noise begins behind the superblocks: without those a disk is no disk any more, which is another fault.
const NOISE_FROM: u64 = MIB;

/// Random bytes over most of a disk's data, as a failing controller or a stray `dd` leaves.
pub fn overwrite_with_noise(path: &Path, rng: &mut Rng) -> Result<u64> {
    // Around the page cache, as the daemon writes: mixing the two is an error of its own to the kernel.
    let mut file = File::options()
        .write(true)
        .custom_flags(rustix::fs::OFlags::DIRECT.bits() as i32)
        .open(path)
        .with_context(|| path.display().to_string())?;
    let end = file.seek(SeekFrom::End(0))?;
    file.seek(SeekFrom::Start(NOISE_FROM))?;
    let mut room = vec![0; MIB as usize + 4096];
    let aligned = room.as_ptr().align_offset(4096);
    let noise = &mut room[aligned..][..MIB as usize];
    noise
        .chunks_exact_mut(8)
        .for_each(|word| word.copy_from_slice(&rng.draw().to_le_bytes()));
    let mut done = 0;
    while NOISE_FROM + done + MIB <= end {
        // One piece is as good as another; a stamp keeps any two from being alike.
        noise[..8].copy_from_slice(&rng.draw().to_le_bytes());
        file.write_all(noise)?;
        done += MIB;
    }
    file.sync_data()?;
    Ok(done)
}

/// Scrubs everything and waits for the end; fails if a block had no good copy. Returns blocks read and repaired.
pub fn scrub(daemon: &mut Daemon) -> Result<(u64, u64)> {
    daemon.ask("POST", "/v1/scrub", &json!({}))?;
    daemon.until("the scrub ends", |daemon| {
        let answer = daemon.get("/v1/scrub")?;
        let scrubs = answer["scrubs"].as_array().context("a list")?;
        Ok(scrubs.iter().all(|scrub| scrub["ended"].is_string()))
    })?;
    let answer = daemon.get("/v1/scrub")?;
    let sum = |name: &str| -> u64 {
        let scrubs = answer["scrubs"].as_array().into_iter().flatten();
        scrubs.filter_map(|scrub| scrub[name].as_u64()).sum()
    };
    ensure!(sum("unreadable") == 0, "blocks without a good copy: {answer}");
    Ok((sum("blocks"), sum("repaired")))
}

/// A loop device over a file of its own: a disk that can be made to fail.
pub struct LoopDisk {
    device: PathBuf,
    file: PathBuf,
}

impl LoopDisk {
    pub fn new(file: &Path, bytes: u64) -> Result<LoopDisk> {
        File::create(file)?.set_len(bytes)?;
        let output = Command::new("losetup")
            .args(["--find", "--show"])
            .arg(file)
            .output();
        let output = output.context("losetup (Debian package mount)")?;
        ensure!(
            output.status.success(),
            "losetup (as root): {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(LoopDisk {
            device: String::from_utf8(output.stdout)?.trim().into(),
            file: file.to_owned(),
        })
    }

    pub fn device(&self) -> &Path {
        &self.device
    }

    /// From now on everything fails, as beyond the end of a disk; what was written is lost.
    pub fn fail(&self) -> Result<()> {
        File::options().write(true).open(&self.file)?.set_len(0)?;
        let status = Command::new("losetup")
            .arg("--set-capacity")
            .arg(&self.device)
            .status()?;
        ensure!(status.success(), "losetup --set-capacity: {status}");
        Ok(())
    }
}

impl Drop for LoopDisk {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.device).status();
    }
}
