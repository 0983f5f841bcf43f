//! A guest that others wrote, in the midst of the faults: Debian's kernel in QEMU, over vhost-user, with files on ext4 on
//! one VDI and fio verifying another (`debian-init.pl`). Between two faults it stops both: what fio wrote is verified
//! once more, the file system must be clean, and every file that was synced must be there as it was written.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::host::Host;
use crate::initramfs;
use crate::machine::{self, Machine};
use crate::world::{Placed, World};

/// Its kernel and the kernel's own initramfs, as `cargo xtask` leaves them in the environment.
const KERNEL: &str = "WEFT_GUEST_KERNEL";
const INITRAMFS: &str = "WEFT_GUEST_INITRAMFS";

/// What is laid over the initramfs, from this machine. Perl is there for what runs in the guest.
const FILES: [&str; 6] = [
    "/usr/bin/fio",
    "/usr/bin/perl",
    "/usr/lib/x86_64-linux-gnu/perl-base/strict.pm",
    "/usr/lib/x86_64-linux-gnu/perl-base/warnings.pm",
    "/usr/sbin/e2fsck",
    "/usr/sbin/mke2fs",
];

/// Two at least, each with a queue. For a single one QEMU's emulation takes an instruction with a lock prefix for a plain one,
/// and that is what Linux has for a barrier between "here is a request" and "is a kick wanted?". A kick would then be lost
/// seldom, but for good: the likely reason of a guest that hung once, its daemon with no request under way. Not proven.
pub const PROCESSORS: usize = 2;

const MIB: u64 = 1 << 20;
const FILES_VDI: &str = "files";
const FIO_VDI: &str = "fio";

/// What it says: docs are in `debian-init.pl`.
const VOCABULARY: &[&str] = &["up", SYNCED, VERIFIED, "held", "found"];
/// A file is synced.
const SYNCED: &str = "synced";
/// fio wrote and verified all of its part.
const VERIFIED: &str = "verified";

/// More of them while a fault lasts, by which it shows that it is served: one may have been all but done before.
const SERVED: u64 = 2;

/// What to boot it with.
#[derive(Clone, Debug)]
pub struct Boot {
    kernel: PathBuf,
    initramfs: PathBuf,
}

impl Boot {
    /// Or why there is none.
    pub fn find() -> Result<Boot, String> {
        let named = |name: &str| match std::env::var_os(name) {
            Some(path) => Ok(PathBuf::from(path)),
            None => Err(format!("{name} is not set (`cargo xtask faults` sets it)")),
        };
        let boot = Boot {
            kernel: named(KERNEL)?,
            initramfs: named(INITRAMFS)?,
        };
        let needed = [boot.kernel.as_path(), &boot.initramfs].into_iter();
        for path in needed.chain(FILES.iter().map(Path::new)) {
            if !path.exists() {
                return Err(format!("there is no {}", path.display()));
            }
        }
        match Command::new("qemu-system-x86_64").arg("--version").output() {
            Ok(output) if output.status.success() => Ok(boot),
            _ => Err("there is no qemu-system-x86_64 (Debian package qemu-system-x86)".to_owned()),
        }
    }
}

pub struct Debian {
    machine: Machine,
    /// The one with the file system, and fio's; both written at one host.
    disks: [Placed; 2],
    boot: Boot,
    /// Of its present life.
    home: PathBuf,
}

impl Debian {
    pub fn disks(&self) -> impl Iterator<Item = &Placed> {
        self.disks.iter()
    }

    /// Fails if it or its kernel said that something is wrong.
    pub fn check(&mut self) -> Result<()> {
        self.machine.check().context("the guest in QEMU")
    }

    /// For who reads of a failure.
    pub fn last_words(&self) -> String {
        let text = std::fs::read(self.home.join("guest.log")).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        format!(
            "--- the guest in QEMU\n{}\n",
            lines[lines.len().saturating_sub(25)..].join("\n")
        )
    }
}

impl World {
    /// Boots it at a host that is drawn, and waits until it works.
    pub fn boot_debian(&mut self, boot: &Boot) -> Result<()> {
        let writer = self.rng.index(self.hosts.len());
        let disks = [
            self.make_vdi(FILES_VDI, writer, 32 * MIB, 3, 2)?,
            self.make_vdi(FIO_VDI, writer, 8 * MIB, 2, 1)?,
        ];
        let laid_over = self.home().join("initramfs");
        let files = FILES.map(Path::new);
        initramfs::make(
            &boot.initramfs,
            include_str!("debian-init.pl"),
            &files,
            &laid_over,
        )?;
        let boot = Boot {
            kernel: boot.kernel.clone(),
            initramfs: laid_over,
        };
        self.start_debian(boot, disks, "")
    }

    /// Its life begins, where its disks are to be written.
    fn start_debian(&mut self, boot: Boot, disks: [Placed; 2], words: &str) -> Result<()> {
        for disk in &disks {
            self.until_attached(&disk.name, disk.writer, Host::attach_vhost)?;
        }
        let host = &self.hosts[disks[0].writer];
        let home = host.path("debian");
        std::fs::create_dir_all(&home)?;
        let doors = disks.each_ref().map(|disk| host.vhost_door(&disk.name));
        let machine = Machine::start(&machine::Boot {
            kernel: &boot.kernel,
            initramfs: &boot.initramfs,
            words,
            processors: PROCESSORS,
            memory_mib: 640,
            disks: &doors.each_ref().map(PathBuf::as_path),
            vocabulary: VOCABULARY,
            home: &home,
        })?;
        self.debian = Some(Debian {
            machine,
            disks,
            boot,
            home,
        });
        self.until_debian_said("found", 1)
    }

    /// It dies with its host, by SIGKILL, and is booted again at the next one, where every file that it said to be
    /// synced must be.
    pub fn kill_debian_with_its_host(&mut self) -> Result<()> {
        let debian = self.debian.take().context("a guest in QEMU")?;
        let words = format!("weft.round={}", debian.machine.last(SYNCED));
        let mut disks = debian.disks;
        let old = disks[0].writer;
        self.hosts[old].kill()?;
        drop(debian.machine);
        for disk in &mut disks {
            disk.writer = (old + 1) % self.hosts.len();
        }
        self.start_debian(debian.boot, disks, &words)
    }

    fn until_debian_said(&mut self, word: &str, count: u64) -> Result<()> {
        self.until(&format!("the guest in QEMU says '{word}'"), |world| {
            let debian = world.debian.as_ref().context("a guest in QEMU")?;
            Ok(debian.machine.count(word) >= count)
        })
    }

    /// It is served on either of its disks if it must be.
    pub fn debian_goes_on(&mut self) -> Result<()> {
        let Some(debian) = &self.debian else {
            return Ok(());
        };
        let expected: Vec<(&str, u64)> = debian
            .disks
            .iter()
            .zip([SYNCED, VERIFIED])
            .filter(|(disk, _)| self.must_go_on(disk))
            .map(|(_, word)| (word, debian.machine.count(word) + SERVED))
            .collect();
        expected
            .into_iter()
            .try_for_each(|(word, count)| self.until_debian_said(word, count))
    }

    /// It is to stand still, soon.
    pub fn hold_debian(&mut self) -> Result<()> {
        match &mut self.debian {
            Some(debian) => debian.machine.tell("hold"),
            None => Ok(()),
        }
    }

    /// It stands still: fio verified all, the file system is unmounted and clean.
    pub fn until_debian_is_held(&mut self) -> Result<()> {
        let Some(debian) = &self.debian else {
            return Ok(());
        };
        // Once more than it was let go, which it said by "found".
        let count = debian.machine.count("found");
        self.until_debian_said("held", count)
    }

    /// It goes on, after every file that was synced was found.
    pub fn let_debian_go(&mut self) -> Result<()> {
        let Some(debian) = &mut self.debian else {
            return Ok(());
        };
        debian.machine.tell("go")?;
        let count = debian.machine.count("found");
        self.until_debian_said("found", count + 1)
    }

    /// After its records were made anew.
    pub fn attach_debian(&mut self) -> Result<()> {
        let disks: Vec<Placed> = self.debian.iter().flat_map(Debian::disks).cloned().collect();
        disks
            .iter()
            .try_for_each(|disk| self.until_attached(&disk.name, disk.writer, Host::attach_vhost))
    }

    /// It ends, with all checked once more, and its disks are deleted.
    pub fn dismiss_debian(&mut self) -> Result<()> {
        let Some(debian) = self.debian.take() else {
            return Ok(());
        };
        let (files, rounds) = (debian.machine.count(SYNCED), debian.machine.count(VERIFIED));
        ensure!(files > 0 && rounds > 0, "the guest in QEMU did nothing");
        debian.machine.stop()?;
        for disk in &debian.disks {
            let host = &self.hosts[disk.writer];
            host.ask("POST", &format!("/v1/vdis/{}/detach", disk.name), &json!({}))?;
            host.ask("DELETE", &format!("/v1/vdis/{}", disk.name), &json!(null))?;
        }
        crate::println_through(&format!(
            "the guest in QEMU synced {files} files, and fio verified {rounds} rounds in it"
        ));
        Ok(())
    }
}
