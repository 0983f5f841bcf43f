//! The demo's Debian: made by mmdebstrap once, kept beside the build.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use super::home::cache_directory;
use super::process::Process;
use super::undo;
use super::until;
use crate::packages;
use crate::run::{output, run};

/// A Debian system ready to be booted.
pub struct Image {
    /// A file system image, ext4, no partitions.
    pub disk: PathBuf,
    /// Its size.
    pub bytes: u64,
    /// Its own stock kernel.
    pub kernel: PathBuf,
    /// Its own initramfs.
    pub initrd: PathBuf,
}

/// Part of the cached image's name: raised whenever what is in it changes.
const VERSION: u32 = 4;

const BYTES: u64 = 1 << 30;

/// Returns the cached image, made first if need be, after all that making and booting it needs is installed.
pub fn ready() -> Result<Image> {
    packages::install(packages::DEMO)?;
    packages::install_qemu_system()?;
    debian(&cache_directory())
}

/// Returns the cached image, made first if need be.
pub fn debian(cache: &Path) -> Result<Image> {
    let folder = cache.join(format!("debian-v{VERSION}"));
    let image = Image {
        disk: folder.join("disk.ext4"),
        bytes: BYTES,
        kernel: folder.join("vmlinuz"),
        initrd: folder.join("initrd"),
    };
    if !folder.exists() {
        for old in (1..VERSION).map(|old| cache.join(format!("debian-v{old}"))) {
            if old.exists() {
                std::fs::remove_dir_all(old)?;
            }
        }
        let unfinished = cache.join("debian-unfinished");
        if unfinished.exists() {
            std::fs::remove_dir_all(&unfinished)?;
        }
        std::fs::create_dir_all(&unfinished)?;
        make(&unfinished)?;
        std::fs::rename(&unfinished, &folder)?;
    }
    Ok(image)
}

fn make(folder: &Path) -> Result<()> {
    let tree = folder.join("tree");
    run(Command::new("mmdebstrap")
        .args(["--quiet", "--variant=minbase"])
        .arg("--include=systemd-sysv,udev,linux-image-cloud-amd64,initramfs-tools,e2fsprogs")
        .args([
            "--aptopt=Acquire::Languages \"none\"",
            "--dpkgopt=path-exclude=/usr/share/doc/*",
        ])
        .args([
            "--dpkgopt=path-exclude=/usr/share/man/*",
            "--dpkgopt=path-exclude=/usr/share/locale/*",
        ])
        .arg("bookworm")
        .arg(&tree))?;
    write_file(&tree, "usr/local/sbin/weft-demo", include_str!("guest-load.pl"))?;
    run(Command::new("chmod")
        .arg("755")
        .arg(tree.join("usr/local/sbin/weft-demo")))?;
    write_file(
        &tree,
        "etc/systemd/system/weft-demo.service",
        include_str!("weft-demo.service"),
    )?;
    write_file(&tree, "etc/fstab", "/dev/vda / ext4 defaults 0 1\n")?;
    write_file(&tree, "etc/hostname", "weft-guest\n")?;
    let wants = tree.join("etc/systemd/system/multi-user.target.wants");
    std::fs::create_dir_all(&wants)?;
    std::os::unix::fs::symlink("../weft-demo.service", wants.join("weft-demo.service"))?;
    std::os::unix::fs::symlink(
        "/dev/null",
        tree.join("etc/systemd/system/serial-getty@ttyS0.service"),
    )?;
    std::fs::copy(tree.join("vmlinuz"), folder.join("vmlinuz")).context("the guest's kernel")?;
    std::fs::copy(tree.join("initrd.img"), folder.join("initrd")).context("the guest's initramfs")?;
    let disk = folder.join("disk.ext4");
    std::fs::File::create(&disk)?.set_len(BYTES)?;
    run(Command::new("mke2fs")
        .args(["-q", "-t", "ext4", "-L", "weft", "-d"])
        .arg(&tree)
        .arg(&disk))?;
    std::fs::remove_dir_all(&tree).context("removing the unpacked tree")
}

fn write_file(tree: &Path, name: &str, text: &str) -> Result<()> {
    let path = tree.join(name);
    std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// Writes the image to an NBD export, as any user would.
pub fn write(image: &Image, uri: &str) -> Result<()> {
    let mut command = Command::new("qemu-img");
    command.args(["convert", "-n", "-f", "raw", "-O", "raw"]);
    output(command.arg(&image.disk).arg(uri)).map(drop)
}

/// Checks the file system on an NBD export: nbdfuse shows it as a file, e2fsck reads that. Returns its last words.
pub fn check_file_system(uri: &str, home: &Path) -> Result<String> {
    let shown = home.join("check");
    std::fs::create_dir_all(&shown)?;
    let file = shown.join("nbd");
    let mut command = Command::new("nbdfuse");
    command.arg("--readonly").arg(&shown).arg(uri);
    let fuse = Process::start("nbdfuse", &mut command)?;
    let unmounted = {
        let shown = shown.clone();
        undo::later(move || {
            let _ = Command::new("umount").arg(&shown).stderr(Stdio::null()).status();
        })
    };
    until(&format!("nbdfuse shows {uri}"), || {
        if fuse.ended()?.is_some() {
            bail!("nbdfuse ended");
        }
        Ok(file.exists().then_some(()))
    })?;
    // A journal that was replayed at the guest's clean stop leaves nothing to mend: -n would say so.
    let checked = output(Command::new("e2fsck").args(["-f", "-n"]).arg(&file));
    drop(unmounted);
    fuse.wait()?;
    let text = checked.context("the guest's file system is not clean")?;
    Ok(text.lines().last().unwrap_or_default().to_owned())
}

/// The SHA-256 of everything on an NBD export.
pub fn digest(uri: &str) -> Result<String> {
    let mut copy = Command::new("nbdcopy")
        .args([uri, "-"])
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start nbdcopy")?;
    let bytes = copy.stdout.take().expect("a pipe");
    // Not sha256sum, which has no use for the processor's own instructions in Debian's build.
    let text = output(
        Command::new("openssl")
            .args(["dgst", "-sha256", "-r"])
            .stdin(bytes),
    )?;
    let status = copy.wait()?;
    if !status.success() {
        bail!("nbdcopy of {uri} ended with {status}");
    }
    Ok(text.split_whitespace().next().unwrap_or_default().to_owned())
}
