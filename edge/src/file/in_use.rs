//! Who uses a disk: mounts, swap, and devices stacked on it, of the disk itself or of any of its partitions.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// A device number as the kernel prints it, `major:minor`.
type DeviceNo = String;

/// Describes each use found, for people. What cannot be read counts as no use: O_EXCL is the judge, this explains.
pub(super) fn uses_of_block_device(device: u64) -> Vec<String> {
    let family = family_of(&device_no(device));
    let mut uses = Vec::new();
    if let Ok(text) = fs::read_to_string("/proc/self/mountinfo") {
        uses.extend(mounts_in(&text, |number, source| {
            family.contains(number) || block_device_of(source).is_some_and(|number| family.contains(&number))
        }));
    }
    if let Ok(text) = fs::read_to_string("/proc/swaps") {
        uses.extend(swaps_in(&text, |path| {
            block_device_of(path).is_some_and(|number| family.contains(&number))
        }));
    }
    for member in &family {
        uses.extend(holders_of(member));
    }
    uses
}

/// The same for a regular file: a loop device or swap on it.
pub(super) fn uses_of_file(path: &Path) -> Vec<String> {
    let Ok(path) = fs::canonicalize(path) else {
        return Vec::new();
    };
    let mut uses = Vec::new();
    for entry in fs::read_dir("/sys/block").into_iter().flatten().flatten() {
        let backing = fs::read_to_string(entry.path().join("loop/backing_file")).unwrap_or_default();
        if Path::new(backing.trim_end()) == path {
            uses.push(format!("behind /dev/{}", entry.file_name().to_string_lossy()));
        }
    }
    if let Ok(text) = fs::read_to_string("/proc/swaps") {
        uses.extend(swaps_in(&text, |swap| Path::new(swap) == path));
    }
    uses
}

fn device_no(device: u64) -> DeviceNo {
    format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device))
}

fn block_device_of(path: &str) -> Option<DeviceNo> {
    use std::os::unix::fs::FileTypeExt;
    let metadata = fs::metadata(path).ok()?;
    metadata
        .file_type()
        .is_block_device()
        .then(|| device_no(metadata.rdev()))
}

/// The device and its partitions.
fn family_of(device: &str) -> BTreeSet<DeviceNo> {
    let mut family = BTreeSet::from([device.to_owned()]);
    for entry in fs::read_dir(format!("/sys/dev/block/{device}"))
        .into_iter()
        .flatten()
        .flatten()
    {
        if entry.path().join("partition").exists()
            && let Ok(number) = fs::read_to_string(entry.path().join("dev"))
        {
            family.insert(number.trim_end().to_owned());
        }
    }
    family
}

/// Device-mapper, RAID and the like on top of a device.
fn holders_of(device: &str) -> Vec<String> {
    let holders = fs::read_dir(format!("/sys/dev/block/{device}/holders"));
    let name = |entry: fs::DirEntry| format!("part of /dev/{}", entry.file_name().to_string_lossy());
    holders.into_iter().flatten().flatten().map(name).collect()
}

/// Lines of `/proc/self/mountinfo` whose device number or source `is_ours`.
fn mounts_in(text: &str, is_ours: impl Fn(&str, &str) -> bool) -> Vec<String> {
    // proc(5): 36 35 98:0 /root /mnt rw,noatime shared:1 - ext4 /dev/sda1 rw
    let mount = |line: &str| {
        let (front, back) = line.split_once(" - ")?;
        let front: Vec<&str> = front.split(' ').collect();
        let source = back.split(' ').nth(1)?;
        is_ours(front.get(2)?, &unescape(source)).then(|| format!("mounted on {}", unescape(front[4])))
    };
    text.lines().filter_map(mount).collect()
}

/// Lines of `/proc/swaps` whose file `is_ours`.
fn swaps_in(text: &str, is_ours: impl Fn(&str) -> bool) -> Vec<String> {
    let swap = |line: &str| {
        let path = unescape(line.split_whitespace().next()?);
        is_ours(&path).then(|| format!("swap ({path})"))
    };
    text.lines().skip(1).filter_map(swap).collect()
}

/// The kernel writes blanks and backslashes in names as `\` and three octal digits.
fn unescape(text: &str) -> String {
    let mut parts = text.split('\\');
    let mut bytes = parts.next().unwrap_or_default().as_bytes().to_vec();
    for part in parts {
        match part
            .get(..3)
            .and_then(|digits| u8::from_str_radix(digits, 8).ok())
        {
            Some(byte) => {
                bytes.push(byte);
                bytes.extend_from_slice(&part.as_bytes()[3..]);
            }
            None => {
                bytes.push(b'\\');
                bytes.extend_from_slice(part.as_bytes());
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "\
22 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw
23 22 0:20 / /proc rw - proc proc rw
40 22 0:44 /@ /data\\040store rw master:2 - btrfs /dev/sdb rw
broken line
";

    #[test]
    fn mounts_are_found_by_number_and_by_source() {
        assert_eq!(mounts_in(MOUNTS, |number, _| number == "254:1"), ["mounted on /"]);
        // btrfs shows an anonymous device number: only its source tells.
        assert_eq!(
            mounts_in(MOUNTS, |_, source| source == "/dev/sdb"),
            ["mounted on /data store"]
        );
        assert!(mounts_in(MOUNTS, |number, source| number == "8:0" || source == "/dev/sda").is_empty());
    }

    #[test]
    fn swaps_are_found() {
        let text =
            "Filename Type Size Used Priority\n/dev/sdc2 partition 100 0 -2\n/swap\\040file file 1 0 -3\n";
        assert_eq!(swaps_in(text, |path| path == "/dev/sdc2"), ["swap (/dev/sdc2)"]);
        assert_eq!(swaps_in(text, |path| path == "/swap file"), ["swap (/swap file)"]);
    }

    #[test]
    fn the_root_file_systems_device_is_in_use() {
        let device = fs::metadata("/").expect("a root directory").dev();
        if rustix::fs::major(device) != 0 {
            let uses = uses_of_block_device(device);
            assert!(uses.contains(&"mounted on /".to_owned()), "{uses:?}");
        }
    }
}
