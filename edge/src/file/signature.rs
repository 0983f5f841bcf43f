//! What is written on a disk already: partition tables, file systems, members of volumes, disk images, ours.
//!
//! A table of magic numbers over the first 128 KiB and the last 64 KiB, as data and without I/O. libblkid knows
//! more, but its Rust bindings need the C library at build time for the same verdict: "there is something here,
//! are you sure?"

/// Bytes from the start of a disk that [`find_signatures`] looks at.
pub const HEAD_BYTES: usize = 128 << 10;

/// Bytes from the end of a disk that [`find_signatures`] looks at.
pub const TAIL_BYTES: usize = 64 << 10;

/// Magic bytes at an offset from the start of the disk.
struct Magic {
    name: &'static str,
    offset: usize,
    bytes: &'static [u8],
}

const fn magic(name: &'static str, offset: usize, bytes: &'static [u8]) -> Magic {
    Magic { name, offset, bytes }
}

/// From the formats' own documents; offsets from the start of the disk.
const HEAD_MAGICS: &[Magic] = &[
    magic("XFS file system", 0, b"XFSB"),
    magic("btrfs file system", 0x1_0040, b"_BHRfS_M"),
    magic("swap", 4086, b"SWAPSPACE2"),
    magic("swap", 4086, b"SWAP-SPACE"),
    magic("suspended system in swap", 4086, b"S1SUSPEND"),
    magic("swap (64 KiB pages)", 65_526, b"SWAPSPACE2"),
    magic("LVM2 physical volume", 0, b"LABELONE"),
    magic("LVM2 physical volume", 512, b"LABELONE"),
    magic("LVM2 physical volume", 1024, b"LABELONE"),
    magic("LVM2 physical volume", 1536, b"LABELONE"),
    magic("LUKS volume", 0, b"LUKS\xba\xbe"),
    magic("LUKS volume (second header)", 0x4000, b"SKUL\xba\xbe"),
    magic("NTFS file system", 3, b"NTFS    "),
    magic("exFAT file system", 3, b"EXFAT   "),
    magic("FAT file system", 54, b"FAT12   "),
    magic("FAT file system", 54, b"FAT16   "),
    magic("FAT file system", 82, b"FAT32   "),
    magic("BitLocker volume", 3, b"-FVE-FS-"),
    magic("ISO 9660 file system", 0x8001, b"CD001"),
    magic("UDF file system", 0x8001, b"BEA01"),
    magic("UDF file system", 0x8801, b"NSR0"),
    magic("F2FS file system", 1024, b"\x10\x20\xf5\xf2"),
    magic("ReiserFS file system", 0x1_0034, b"ReIsEr"),
    magic("JFS file system", 0x8000, b"JFS1"),
    magic("bcache or bcachefs", 0x1018, b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca"),
    magic("bcachefs", 0x1018, b"\xc6\x85\x73\xf6\x66\xce\x90\xa9"),
    magic("Ceph BlueStore", 0, b"bluestore block device"),
    magic("Linux RAID member", 0, b"\xfc\x4e\x2b\xa9"),
    magic("Linux RAID member", 4096, b"\xfc\x4e\x2b\xa9"),
    magic("SquashFS file system", 0, b"hsqs"),
    magic("EROFS file system", 1024, b"\xe2\xe1\xf5\xe0"),
    magic("QCOW image", 0, b"QFI\xfb"),
    magic("VMDK image", 0, b"KDMV"),
    magic("VMDK image", 0, b"COWD"),
    magic("VMDK descriptor", 0, b"# Disk DescriptorFile"),
    magic("VHDX image", 0, b"vhdxfile"),
    magic("VHD image", 0, b"conectix"),
    magic("VDI image", 64, b"\x7f\x10\xda\xbe"),
    magic("QED image", 0, b"QED\0"),
    magic("GPT partition table", 512, b"EFI PART"),
    magic("GPT partition table (4 KiB sectors)", 4096, b"EFI PART"),
];

/// Names what is on a disk, each once: from its first [`HEAD_BYTES`] (or all of it) and its last [`TAIL_BYTES`].
/// Empty for a blank disk. Any bytes are fine as input.
#[must_use]
pub fn find_signatures(head: &[u8], tail: &[u8]) -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    let mut add = |name: &str| {
        if !found.iter().any(|known| known == name) {
            found.push(name.to_owned());
        }
    };
    for magic in HEAD_MAGICS {
        if has_at(head, magic.offset, magic.bytes) {
            add(magic.name);
        }
    }
    if let Some(name) = ext_version(head) {
        add(name);
    }
    if has_mbr(head) {
        add("MBR partition table");
    }
    if has_zfs_label(head) {
        add("ZFS member");
    }
    for name in tail_signatures(tail) {
        add(name);
    }
    found
}

fn has_at(bytes: &[u8], offset: usize, wanted: &[u8]) -> bool {
    bytes.get(offset..offset + wanted.len()) == Some(wanted)
}

fn le32(bytes: &[u8], offset: usize) -> Option<u32> {
    let field = bytes.get(offset..offset + 4)?;
    Some(u32::from_le_bytes(field.try_into().expect("four bytes")))
}

/// ext2, 3 and 4 share a magic of two bytes; the features tell them apart, and a plausible block size tells them
/// from chance.
fn ext_version(head: &[u8]) -> Option<&'static str> {
    const SUPERBLOCK: usize = 1024;
    const HAS_JOURNAL: u32 = 0x4;
    const EXTENTS_OR_NEWER: u32 = 0x40 | 0x80 | 0x200;
    if !has_at(head, SUPERBLOCK + 0x38, &[0x53, 0xef]) || le32(head, SUPERBLOCK + 0x18)? > 6 {
        return None;
    }
    if le32(head, SUPERBLOCK + 0x60)? & EXTENTS_OR_NEWER != 0 {
        return Some("ext4 file system");
    }
    let has_journal = le32(head, SUPERBLOCK + 0x5c)? & HAS_JOURNAL != 0;
    Some(if has_journal {
        "ext3 file system"
    } else {
        "ext2 file system"
    })
}

/// 55 AA ends every boot sector, of file systems too: an MBR has at least one entry that makes sense besides.
fn has_mbr(head: &[u8]) -> bool {
    if !has_at(head, 510, &[0x55, 0xaa]) {
        return false;
    }
    let is_used = |entry: &&[u8]| entry.iter().any(|byte| *byte != 0);
    let is_plausible = |entry: &[u8]| {
        let (status, kind) = (entry[0], entry[4]);
        let (start, sectors) = (le32(entry, 8), le32(entry, 12));
        matches!(status, 0 | 0x80) && kind != 0 && start > Some(0) && sectors > Some(0)
    };
    let entries: Vec<&[u8]> = head[446..510].chunks(16).filter(is_used).collect();
    !entries.is_empty() && entries.into_iter().all(is_plausible)
}

/// The uberblocks of the first label start at 128 KiB, past our head: its name-value list says as much, XDR of
/// version 0 with unique names, the first of them "version" or "name".
fn has_zfs_label(head: &[u8]) -> bool {
    const PAIRS: usize = 16 << 10;
    let is_list = has_at(head, PAIRS, &[1, 1, 0, 0]) || has_at(head, PAIRS, &[1, 0, 0, 0]);
    let near = head.get(PAIRS..PAIRS + 4096).unwrap_or_default();
    is_list && near.windows(9).any(|window| window == b"pool_guid")
}

/// Signatures that sit at the end: backup tables, and RAID members of the kinds that leave the start alone.
fn tail_signatures(tail: &[u8]) -> Vec<&'static str> {
    let mut found = Vec::new();
    let at_end = |back: usize, wanted: &[u8]| {
        tail.len()
            .checked_sub(back)
            .is_some_and(|at| has_at(tail, at, wanted))
    };
    if at_end(512, b"EFI PART") || at_end(4096, b"EFI PART") {
        found.push("GPT partition table (backup)");
    }
    // Version 1.0: 8 KiB before the end, rounded down to 4 KiB; version 0.90: the last whole 64 KiB.
    let raid = b"\xfc\x4e\x2b\xa9";
    if (0..tail.len()).step_by(512).any(|at| has_at(tail, at, raid)) {
        found.push("Linux RAID member");
    }
    if at_end(512, b"conectix") {
        found.push("VHD image");
    }
    found
}

#[cfg(test)]
mod tests;
