use super::*;

const DISK_BYTES: u64 = 4 << 20;

fn disk() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("disk");
    create_preallocated(&path, DISK_BYTES).expect("a disk file");
    (folder, path)
}

#[test]
fn reads_what_was_written_from_any_memory() {
    let (_folder, path) = disk();
    let mut file = OsFile::open(&path, Access::ReadWrite).expect("opening");
    assert_eq!(file.bytes(), DISK_BYTES);
    // Longer than one bounce, and from an address that direct I/O refuses.
    let content: Vec<u8> = (0..(2 << 20) + 4097).map(|i| (i / 3) as u8).collect();
    file.write_at(8192, &content[1..]).expect("writing");
    file.sync().expect("syncing");
    let mut read = vec![0; content.len()];
    file.read_at(8192, &mut read[1..]).expect("reading");
    assert!(read[1..] == content[1..]);
    let mut bounce = Bounce::for_transfer(4096);
    file.read_at(12_288, bounce.first(4096)).expect("reading");
    assert!(*bounce.first(4096) == content[4097..8193]);
}

#[test]
fn the_end_is_an_error_with_numbers() {
    let (_folder, path) = disk();
    let file = OsFile::open(&path, Access::ReadOnly).expect("opening");
    let short = DiskError::Short {
        operation: "read",
        offset: DISK_BYTES - 4096,
        done: 4096,
        wanted: 8192,
    };
    assert_eq!(file.read_at(DISK_BYTES - 4096, &mut vec![0; 8192]), Err(short));
}

#[test]
fn writing_what_was_opened_for_reading_fails() {
    let (_folder, path) = disk();
    let mut file = OsFile::open(&path, Access::ReadOnly).expect("opening");
    let error = file.write_at(0, &[0; 4096]).expect_err("no right to");
    assert!(
        matches!(
            error,
            DiskError::Io {
                operation: "write",
                errno: libc::EBADF,
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn a_failed_sync_is_final() {
    let (_folder, path) = disk();
    let mut file = OsFile::open(&path, Access::ReadWrite).expect("opening");
    let error = io_error("sync", 0, 0, &io::Error::from_raw_os_error(libc::EIO));
    file.failed = Some(error.clone());
    assert_eq!(file.sync(), Err(error.clone()));
    assert_eq!(file.write_at(0, &[0; 4096]), Err(error));
    assert_eq!(file.read_at(0, &mut [0; 4096]), Ok(()));
}

#[test]
fn one_writer_or_several_readers() {
    let (_folder, path) = disk();
    let no_wait = |access| OsFile::open_waiting(&path, access, Duration::ZERO);
    let writer = no_wait(Access::ReadWrite).expect("opening");
    assert!(matches!(
        no_wait(Access::ReadWrite),
        Err(OpenError::Locked { .. })
    ));
    assert!(matches!(no_wait(Access::ReadOnly), Err(OpenError::Locked { .. })));
    // A duplicate keeps the lock, as a ring does.
    let kept = writer.into_file().try_clone().expect("a duplicate");
    assert!(matches!(
        no_wait(Access::ReadWrite),
        Err(OpenError::Locked { .. })
    ));
    drop(kept);
    let _first = no_wait(Access::ReadOnly).expect("opening");
    let _second = no_wait(Access::ReadOnly).expect("opening");
    assert!(matches!(
        no_wait(Access::ReadWrite),
        Err(OpenError::Locked { .. })
    ));
}

#[test]
fn whoever_waits_gets_the_lock_in_the_end() {
    let (_folder, path) = disk();
    let first = OsFile::open(&path, Access::ReadWrite).expect("opening");
    let waiting = std::thread::spawn(move || OsFile::open(&path, Access::ReadWrite).map(drop));
    drop(first);
    waiting.join().expect("the thread").expect("the lock");
}

#[test]
fn a_new_file_replaces_nothing_and_leaves_nothing_half_made() {
    let (folder, path) = disk();
    let error = create_preallocated(&path, 4096).expect_err("it exists");
    let OpenError::Io {
        operation: "creating",
        source,
        ..
    } = error
    else {
        panic!("{error}")
    };
    assert_eq!(source.kind(), io::ErrorKind::AlreadyExists);
    assert_eq!(std::fs::metadata(&path).expect("still there").len(), DISK_BYTES);
    let huge = folder.path().join("huge");
    create_preallocated(&huge, 1 << 60).expect_err("no such space");
    assert!(!huge.exists());
}

#[test]
fn only_disks_are_disks() {
    for path in ["/dev/null", "/proc", "/"] {
        assert!(matches!(
            OsFile::open(Path::new(path), Access::ReadOnly),
            Err(OpenError::NotADisk { .. })
        ));
        assert!(matches!(probe(Path::new(path)), Err(OpenError::NotADisk { .. })));
    }
    assert!(matches!(
        probe(Path::new("/nowhere")),
        Err(OpenError::Io {
            operation: "looking at",
            ..
        })
    ));
}

#[test]
fn a_probe_tells_blank_from_used() {
    let (_folder, path) = disk();
    let report = probe(&path).expect("probing");
    assert!(
        report.is_blank && report.is_free() && !report.is_block_device,
        "{report:?}"
    );
    assert_eq!((report.bytes, report.first_bytes), (DISK_BYTES, [0; 8]));
    // Probing takes no lock and minds none.
    let mut file = OsFile::open(&path, Access::ReadWrite).expect("opening");
    let mut block = [0; 4096];
    block[..8].copy_from_slice(b"WEFTDISK");
    file.write_at(0, &block).expect("writing");
    let report = probe(&path).expect("probing");
    assert!(report.is_free() && !report.is_blank, "{report:?}");
    assert_eq!(&report.first_bytes, b"WEFTDISK");
}

#[test]
fn a_probe_of_a_tiny_file_is_no_trouble() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("tiny");
    std::fs::write(&path, b"QFI\xfb").expect("writing");
    let report = probe(&path).expect("probing");
    assert_eq!(
        (report.bytes, report.signatures),
        (4, vec!["QCOW image".to_owned()])
    );
}

/// What real tools write is found by its name. Tools that are not installed are left out, mkfs.ext4 is not.
#[test]
fn real_tools_are_recognised() {
    let tools: [(&str, &[&str], &str); 9] = [
        ("mkfs.ext4", &["-q", "-F"], "ext4 file system"),
        ("mkfs.ext3", &["-q", "-F"], "ext3 file system"),
        ("mkfs.ext2", &["-q", "-F"], "ext2 file system"),
        ("mkswap", &[], "swap"),
        ("mkfs.vfat", &[], "FAT file system"),
        ("mkfs.ntfs", &["-F", "-Q"], "NTFS file system"),
        ("mkfs.xfs", &["-q", "-f"], "XFS file system"),
        ("mkfs.btrfs", &["-q", "-f"], "btrfs file system"),
        ("pvcreate", &["-ff", "-y"], "LVM2 physical volume"),
    ];
    for (tool, arguments, expected) in tools {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("image");
        File::create(&path)
            .and_then(|file| file.set_len(512 << 20))
            .expect("an image");
        let Ok(made) = std::process::Command::new(tool)
            .args(arguments)
            .arg(&path)
            .output()
        else {
            assert_ne!(tool, "mkfs.ext4", "e2fsprogs is part of every system");
            continue;
        };
        if tool == "pvcreate" && !made.status.success() {
            continue;
        }
        assert!(made.status.success(), "{tool}: {made:?}");
        assert_eq!(probe(&path).expect("probing").signatures, [expected], "{tool}");
    }
}

/// A loop device on a file, gone again at the end.
struct LoopDevice {
    path: PathBuf,
}

impl LoopDevice {
    /// `None` where the machine gives us none: not root, or a container without loop devices.
    fn attach(file: &Path) -> Option<LoopDevice> {
        let output = run(
            "losetup",
            &["--find".as_ref(), "--show".as_ref(), file.as_os_str()],
        )?;
        let path = PathBuf::from(output.trim());
        Some(LoopDevice { path })
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        run("losetup", &["--detach".as_ref(), self.path.as_os_str()]);
    }
}

/// What a tool printed; `None` where it is missing or fails.
fn run(tool: &str, arguments: &[&std::ffi::OsStr]) -> Option<String> {
    let output = std::process::Command::new(tool).args(arguments).output().ok()?;
    let is_done = output.status.success();
    is_done.then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

#[test]
fn a_block_device_is_sized_claimed_and_known_to_be_mounted() {
    let (folder, path) = disk();
    let Some(device) = LoopDevice::attach(&path) else {
        eprintln!("left out: no loop device to be had");
        return;
    };
    let open = || OsFile::open_waiting(&device.path, Access::ReadWrite, Duration::ZERO);
    let report = probe(&device.path).expect("probing");
    assert!(
        report.is_block_device && report.is_free() && report.is_blank,
        "{report:?}"
    );
    assert_eq!(report.bytes, DISK_BYTES);
    let backing = probe(&path).expect("probing");
    assert_eq!(backing.uses, [format!("behind {}", device.path.display())]);

    // With patience: a device manager looks at every new device under a lock of its own.
    let mut file = OsFile::open(&device.path, Access::ReadWrite).expect("opening");
    assert_eq!(file.bytes(), DISK_BYTES);
    file.write_at(4096, &[7; 4096]).expect("writing");
    file.sync().expect("syncing");
    let mut read = [0; 4096];
    file.read_at(4096, &mut read).expect("reading");
    assert_eq!(read, [7; 4096]);
    assert!(matches!(open(), Err(OpenError::Busy { .. })));
    assert_eq!(
        probe(&device.path).expect("probing").uses,
        ["claimed by the kernel or another process"]
    );
    drop(file);

    run(
        "mkfs.ext4",
        &["-q".as_ref(), "-F".as_ref(), device.path.as_os_str()],
    )
    .expect("a file system");
    assert_eq!(
        probe(&device.path).expect("probing").signatures,
        ["ext4 file system"]
    );
    let mount = folder.path().join("a mount");
    std::fs::create_dir(&mount).expect("a folder");
    if run("mount", &[device.path.as_os_str(), mount.as_os_str()]).is_none() {
        eprintln!("left out: mounting is not allowed");
        return;
    }
    let uses = probe(&device.path).expect("probing").uses;
    let opened = open();
    run("umount", &[mount.as_os_str()]).expect("unmounting");
    assert_eq!(uses, [format!("mounted on {}", mount.display())]);
    assert!(matches!(opened, Err(OpenError::Busy { .. })), "{opened:?}");
}
