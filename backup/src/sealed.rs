//! An object's bytes: a header, then its content, compressed where that helps, encrypted where the repository is.
//!
//! ```text
//!   0  "WFBK"       4   version 1      5   kind      6   compression (0 none, 1 zstd)    7   encryption (0, 1)
//!   8  length of the content, u32      12  salt, 24 bytes, when encrypted                   payload, 16 bytes of tag
//! ```
//!
//! Encryption is AES-256-GCM with a key of its own for every object: `blake3::keyed_hash(seal key, salt)`, with a salt
//! of 24 random bytes. A key that is used once needs no nonce (twelve zeros are), and nothing has to be counted between
//! machines that know nothing of each other. What is authenticated besides the payload: the header, the repository's id
//! and the object's name, so that an object does not open under another name, nor in another repository. Last, content
//! that is named by its hash must have this hash; this alone protects repositories without encryption.

use std::cell::RefCell;

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use zstd::bulk::{Compressor, Decompressor};

use crate::bytes_in::BytesIn;
use crate::error::Damage;
use crate::key::{RepositoryKeys, random};
use crate::object::{Hash, Kind};

const MAGIC: [u8; 4] = *b"WFBK";
const VERSION: u8 = 1;
const HEADER_BYTES: usize = 12;
const SALT_BYTES: usize = 24;
const TAG_BYTES: usize = 16;

/// How a repository seals its objects.
#[derive(Clone, Debug)]
pub struct Sealer {
    /// The repository's id.
    pub repository: [u8; 16],
    /// Of an encrypted one.
    pub keys: Option<RepositoryKeys>,
}

/// The most bytes that an object of this kind has.
#[must_use]
pub fn object_bytes_max(kind: Kind) -> u64 {
    // What does not get smaller by compression is stored as it is.
    (HEADER_BYTES + SALT_BYTES + kind.plain_bytes_max() + TAG_BYTES) as u64
}

thread_local! {
    /// Their tables are a megabyte: made once for a thread, not for each chunk.
    static COMPRESSOR: RefCell<Option<(i32, Compressor<'static>)>> = const { RefCell::new(None) };
    static DECOMPRESSOR: RefCell<Option<Decompressor<'static>>> = const { RefCell::new(None) };
}

impl Sealer {
    /// The hash that content is named by.
    #[must_use]
    pub fn hash(&self, content: &[u8]) -> Hash {
        match &self.keys {
            Some(keys) => *blake3::keyed_hash(&keys.name, content).as_bytes(),
            None => *blake3::hash(content).as_bytes(),
        }
    }

    /// The object of this content. `name` is its hash, or the id it is stored under.
    ///
    /// # Panics
    /// When the content is longer than its kind may be.
    #[must_use]
    pub fn seal(&self, kind: Kind, name: &[u8], content: &[u8], level: i32) -> Vec<u8> {
        assert!(
            content.len() <= kind.plain_bytes_max(),
            "{} bytes of a {kind:?}",
            content.len()
        );
        let mut header = Vec::with_capacity(HEADER_BYTES + SALT_BYTES);
        header.extend(MAGIC);
        header.extend([VERSION, kind as u8, 0, u8::from(self.keys.is_some())]);
        header.extend((content.len() as u32).to_le_bytes());
        let salt: Option<[u8; SALT_BYTES]> = self.keys.as_ref().map(|_| random());
        header.extend(salt.into_iter().flatten());
        let start = header.len();
        // Compressed to where it belongs: a chunk is a megabyte, and a copy of it a page fault for each 4 KiB.
        let mut object = vec![0; start + content.len() + TAG_BYTES];
        let length = match compress(content, level, &mut object[start..]) {
            Some(length) => {
                header[6] = 1;
                length
            }
            None => {
                object[start..][..content.len()].copy_from_slice(content);
                content.len()
            }
        };
        object.truncate(start + length);
        object[..start].copy_from_slice(&header);
        if let Some((keys, salt)) = self.keys.as_ref().zip(salt) {
            let also = self.also(&header, name);
            let tag = object_key(keys, &salt)
                .seal_in_place_separate_tag(no_nonce(), Aad::from(also), &mut object[start..])
                .expect("far below the limit of AES-GCM");
            object.extend(tag.as_ref());
        }
        object
    }

    /// The content of an object that was read from under `name`; for shared kinds that is its hash.
    ///
    /// # Errors
    /// For every object that [`Self::seal`] did not make, for this kind, this name and this repository.
    pub fn open(&self, kind: Kind, name: &[u8], object: &[u8]) -> Result<Vec<u8>, Damage> {
        let content = self.open_payload(kind, name, object)?;
        if crate::object::SHARED.contains(&kind) && self.hash(&content) != name {
            return Err(Damage::Hash);
        }
        Ok(content)
    }

    fn open_payload(&self, kind: Kind, name: &[u8], object: &[u8]) -> Result<Vec<u8>, Damage> {
        let mut input = BytesIn(object);
        let header = input.array::<HEADER_BYTES>()?;
        if header[..4] != MAGIC {
            return Err(Damage::Magic);
        }
        if header[4] != VERSION {
            return Err(Damage::Version(header[4]));
        }
        let is_packed = match header[6] {
            0 => false,
            1 => true,
            _ => return Err(Damage::Content("its compression is unknown")),
        };
        if header[5] != kind as u8 || header[7] != u8::from(self.keys.is_some()) {
            return Err(Damage::Kind);
        }
        let length = u32::from_le_bytes(header[8..].try_into().expect("four bytes")) as usize;
        let limit = kind.plain_bytes_max();
        if length > limit || object.len() as u64 > object_bytes_max(kind) {
            return Err(Damage::TooLong {
                have: length.max(object.len()) as u64,
                limit: limit as u64,
            });
        }
        let Some(keys) = &self.keys else {
            return unpack(input.0, length, is_packed);
        };
        let salt = input.array::<SALT_BYTES>()?;
        let also = self.also(&object[..HEADER_BYTES + SALT_BYTES], name);
        let mut payload = input.0.to_vec();
        let opened = object_key(keys, &salt)
            .open_in_place(no_nonce(), Aad::from(also), &mut payload)
            .map_err(|_| Damage::Seal)?;
        unpack(opened, length, is_packed)
    }

    /// What is authenticated besides the payload.
    fn also(&self, header: &[u8], name: &[u8]) -> Vec<u8> {
        [header, &self.repository, name].concat()
    }
}

fn object_key(keys: &RepositoryKeys, salt: &[u8; SALT_BYTES]) -> LessSafeKey {
    let key = blake3::keyed_hash(&keys.seal, salt);
    LessSafeKey::new(UnboundKey::new(&AES_256_GCM, key.as_bytes()).expect("32 bytes"))
}

fn no_nonce() -> Nonce {
    Nonce::assume_unique_for_key([0; 12])
}

/// How long it is compressed, if that is smaller; `room` has then begun with it.
fn compress(content: &[u8], level: i32, room: &mut [u8]) -> Option<usize> {
    COMPRESSOR.with_borrow_mut(|kept| {
        if kept.as_ref().is_none_or(|(of, _)| *of != level) {
            *kept = Some((level, Compressor::new(level).expect("zstd takes every level")));
        }
        let (_, compressor) = kept.as_mut().expect("made above");
        // No room for a result that is not smaller: zstd gives up, and so do we.
        let room = &mut room[..content.len().saturating_sub(1)];
        compressor.compress_to_buffer(content, room).ok()
    })
}

fn unpack(payload: &[u8], length: usize, is_packed: bool) -> Result<Vec<u8>, Damage> {
    let content = if is_packed {
        DECOMPRESSOR.with_borrow_mut(|kept| {
            let decompressor = kept.get_or_insert_with(|| Decompressor::new().expect("memory for zstd"));
            decompressor
                .decompress(payload, length)
                .map_err(|_| Damage::Compression)
        })?
    } else {
        payload.to_vec()
    };
    if content.len() != length {
        return Err(Damage::Short {
            have: content.len(),
            wanted: length,
        });
    }
    Ok(content)
}

#[cfg(test)]
#[path = "sealed_tests.rs"]
mod tests;
