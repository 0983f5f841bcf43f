//! A backup's own object: what it is of, and its pages.

use std::fmt;

use jiff::Timestamp;

use crate::bytes_in::BytesIn;
use crate::error::Damage;
use crate::object::{ObjectRef, REF_BYTES, from_hex, hex};
use crate::{CHUNK_BYTES, DISK_BYTES_MAX, PAGE_BYTES, PAGE_CHUNKS, pages_of};

/// Bytes of the longest manifest.
pub const BYTES_MAX: usize = 1024 + (DISK_BYTES_MAX / PAGE_BYTES) as usize * (1 + REF_BYTES);
/// Bytes of the longest name.
pub const NAME_BYTES_MAX: usize = 160;
const VERSION_BYTES_MAX: usize = 64;

/// Which backup: the time it began and random bits, so that ids sort by age.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BackupId(pub [u8; 16]);

impl BackupId {
    /// Of a backup that begins now.
    ///
    /// # Panics
    /// Before 1970.
    #[must_use]
    pub fn new(now: Timestamp, random: [u8; 10]) -> BackupId {
        let milliseconds = u64::try_from(now.as_millisecond()).expect("a time after 1970");
        let mut id = [0; 16];
        id[..6].copy_from_slice(&milliseconds.to_be_bytes()[2..]);
        id[6..].copy_from_slice(&random);
        BackupId(id)
    }

    /// As it is written.
    #[must_use]
    pub fn parse(text: &str) -> Option<BackupId> {
        from_hex(text).map(BackupId)
    }
}

impl fmt::Display for BackupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&hex(&self.0))
    }
}

impl fmt::Debug for BackupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What making a backup took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Bytes read from the disk.
    pub read_bytes: u64,
    /// Bytes of content that no object had yet.
    pub new_bytes: u64,
    /// Bytes of the objects that were written for them.
    pub sent_bytes: u64,
}

/// A backup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    /// Which.
    pub id: BackupId,
    /// `VDI@SNAPSHOT`, or what it was called.
    pub name: String,
    /// The disk's size.
    pub bytes: u64,
    /// The disk's sector.
    pub sector_bytes: u32,
    /// When it began.
    pub created: Timestamp,
    /// The backup it is incremental to; nothing of it is needed to restore this one.
    pub parent: Option<BackupId>,
    /// The program that made it.
    pub weft: String,
    /// What it took.
    pub cost: Cost,
    /// One for each GiB of the disk; none where it is all zeros.
    pub pages: Vec<Option<ObjectRef>>,
}

/// Whether backups may be called so: visible ASCII, so that it can be shown, quoted and be a word of a command line.
///
/// # Errors
/// What is wrong with it.
pub fn check_name(name: &str) -> Result<(), &'static str> {
    match name {
        "" => Err("it is empty"),
        name if name.len() > NAME_BYTES_MAX => Err("it is longer than 160 bytes"),
        name if !name.bytes().all(|byte| byte.is_ascii_graphic()) => {
            Err("it has other characters than visible ASCII")
        }
        name if name.starts_with('-') => Err("it begins with '-'"),
        _ => Ok(()),
    }
}

impl Manifest {
    /// Its bytes; the last 32 are the blake3 of all before.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(256 + self.pages.len() * (1 + REF_BYTES));
        let text = |out: &mut Vec<u8>, text: &str| {
            assert!(
                text.bytes().all(|byte| byte.is_ascii_graphic()),
                "'{text}' in a manifest"
            );
            out.extend((text.len() as u16).to_le_bytes());
            out.extend(text.as_bytes());
        };
        out.extend(self.id.0);
        text(&mut out, &self.name);
        out.extend(self.bytes.to_le_bytes());
        out.extend(self.sector_bytes.to_le_bytes());
        out.extend((CHUNK_BYTES as u32).to_le_bytes());
        out.extend((PAGE_CHUNKS as u32).to_le_bytes());
        out.extend(self.created.as_millisecond().to_le_bytes());
        out.push(u8::from(self.parent.is_some()));
        out.extend(self.parent.map_or([0; 16], |parent| parent.0));
        text(&mut out, &self.weft);
        for number in [self.cost.read_bytes, self.cost.new_bytes, self.cost.sent_bytes] {
            out.extend(number.to_le_bytes());
        }
        out.extend((self.pages.len() as u32).to_le_bytes());
        for page in &self.pages {
            out.push(u8::from(page.is_some()));
            if let Some(page) = page {
                page.put(&mut out);
            }
        }
        let hash = blake3::hash(&out);
        out.extend(hash.as_bytes());
        out
    }

    /// The backup that these bytes were written for, under this id.
    ///
    /// # Errors
    /// For all that [`Self::encode`] does not write.
    pub fn decode(bytes: &[u8], id: BackupId) -> Result<Manifest, Damage> {
        let body = bytes.len().checked_sub(32).ok_or(Damage::Short {
            have: bytes.len(),
            wanted: 32,
        })?;
        let (body, hash) = bytes.split_at(body);
        if blake3::hash(body) != *<&[u8; 32]>::try_from(hash).expect("32 bytes") {
            return Err(Damage::Hash);
        }
        let mut input = BytesIn(body);
        if input.array()? != id.0 {
            return Err(Damage::Content("it is the manifest of another backup"));
        }
        let name = input.text(NAME_BYTES_MAX)?;
        check_name(&name).map_err(Damage::Content)?;
        let bytes = input.u64()?;
        if bytes == 0 || bytes > DISK_BYTES_MAX {
            return Err(Damage::Content("no disk has such a size"));
        }
        let sector_bytes = input.u32()?;
        if !sector_bytes.is_power_of_two() || !(512..=65536).contains(&sector_bytes) {
            return Err(Damage::Content("no disk has such sectors"));
        }
        if u64::from(input.u32()?) != CHUNK_BYTES || input.u32()? as usize != PAGE_CHUNKS {
            return Err(Damage::Content(
                "its chunks or pages are of another size than those of format 1",
            ));
        }
        let created = Timestamp::from_millisecond(input.i64()?)
            .map_err(|_| Damage::Content("it was made at an impossible time"))?;
        let parent = match (input.u8()?, BackupId(input.array()?)) {
            (0, BackupId([0, ..])) => None,
            (1, parent) => Some(parent),
            _ => return Err(Damage::Content("its parent is neither given nor not given")),
        };
        let weft = input.text(VERSION_BYTES_MAX)?;
        let cost = Cost {
            read_bytes: input.u64()?,
            new_bytes: input.u64()?,
            sent_bytes: input.u64()?,
        };
        if u64::from(input.u32()?) != pages_of(bytes) {
            return Err(Damage::Content("it has another number of pages than the disk"));
        }
        let mut pages = Vec::new();
        for _ in 0..pages_of(bytes) {
            pages.push(match input.u8()? {
                0 => None,
                1 => Some(ObjectRef::take(&mut input)?),
                _ => return Err(Damage::Content("a page is neither there nor not there")),
            });
        }
        input.end()?;
        Ok(Manifest {
            id,
            name,
            bytes,
            sector_bytes,
            created,
            parent,
            weft,
            cost,
            pages,
        })
    }
}

#[cfg(test)]
#[path = "manifest_tests.rs"]
mod tests;
