//! Names of objects: what kind, which content, which generation.
//!
//! An object below a backup is named by the hash of its content. Its generation is 0, unless a prune had condemned the
//! object of that content when it was needed again: then it is stored anew under the next generation, and the prune may
//! delete the condemned one whenever it comes to it.

use std::fmt;

use crate::bytes_in::BytesIn;
use crate::error::Damage;

/// A hash of content: blake3, keyed where the repository is encrypted.
pub type Hash = [u8; 32];

/// What an object is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Kind {
    /// 1 MiB of a disk.
    Chunk = 1,
    /// Blocks that differ from a chunk.
    Patch = 2,
    /// What 1 GiB of a disk consists of.
    Page = 3,
    /// A backup.
    Manifest = 4,
    /// Objects that a prune is going to delete.
    Condemned = 5,
}

/// Kinds that are named by content and shared.
pub const SHARED: [Kind; 3] = [Kind::Chunk, Kind::Patch, Kind::Page];

impl Kind {
    /// The folder of its objects.
    #[must_use]
    pub const fn folder(self) -> &'static str {
        match self {
            Kind::Chunk => "chunks",
            Kind::Patch => "patches",
            Kind::Page => "pages",
            Kind::Manifest => "backups",
            Kind::Condemned => "condemned",
        }
    }

    /// The most bytes that its content has.
    #[must_use]
    pub const fn plain_bytes_max(self) -> usize {
        match self {
            Kind::Chunk => crate::CHUNK_BYTES as usize,
            Kind::Patch => crate::CHUNK_BYTES as usize + crate::CHUNK_BLOCKS / 8,
            Kind::Page => crate::page::BYTES_MAX,
            Kind::Manifest => crate::manifest::BYTES_MAX,
            Kind::Condemned => crate::sweep::BYTES_MAX,
        }
    }

    fn from_number(number: u8) -> Result<Kind, Damage> {
        [
            Kind::Chunk,
            Kind::Patch,
            Kind::Page,
            Kind::Manifest,
            Kind::Condemned,
        ]
        .into_iter()
        .find(|kind| *kind as u8 == number)
        .ok_or(Damage::Content("it names an object of an unknown kind"))
    }
}

/// Which object of a kind.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectRef {
    /// Of its content.
    pub hash: Hash,
    /// How often the content was condemned and needed again.
    pub generation: u32,
}

/// Bytes of a reference where it is stored.
pub const REF_BYTES: usize = 36;

impl ObjectRef {
    /// The first of this content.
    #[must_use]
    pub fn first(hash: Hash) -> ObjectRef {
        ObjectRef { hash, generation: 0 }
    }

    pub(crate) fn put(self, out: &mut Vec<u8>) {
        out.extend(self.hash);
        out.extend(self.generation.to_le_bytes());
    }

    pub(crate) fn take(input: &mut BytesIn<'_>) -> Result<ObjectRef, Damage> {
        Ok(ObjectRef {
            hash: input.array()?,
            generation: input.u32()?,
        })
    }
}

impl fmt::Debug for ObjectRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", hex(&self.hash[..6]), self.generation)
    }
}

/// An object that is named by its content.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SharedObject {
    /// Which folder.
    pub kind: Kind,
    /// Which one there.
    pub reference: ObjectRef,
}

impl fmt::Display for SharedObject {
    /// Its path in the repository.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = hex(&self.reference.hash);
        write!(f, "{}/{}/{name}", self.kind.folder(), &name[..2])?;
        match self.reference.generation {
            0 => Ok(()),
            generation => write!(f, ".{generation}"),
        }
    }
}

impl SharedObject {
    /// The object of this path, if it is exactly what [`Display`](fmt::Display) writes.
    #[must_use]
    pub fn from_path(path: &str) -> Option<SharedObject> {
        let mut parts = path.split('/');
        let (folder, _, file) = (parts.next()?, parts.next()?, parts.next()?);
        let kind = SHARED.into_iter().find(|kind| kind.folder() == folder)?;
        let (name, generation) = match file.split_once('.') {
            None => (file, 0),
            Some((name, generation)) => (name, generation.parse().ok()?),
        };
        let reference = ObjectRef {
            hash: from_hex(name)?,
            generation,
        };
        let object = SharedObject { kind, reference };
        (object.to_string() == path).then_some(object)
    }

    pub(crate) fn put(self, out: &mut Vec<u8>) {
        out.push(self.kind as u8);
        self.reference.put(out);
    }

    pub(crate) fn take(input: &mut BytesIn<'_>) -> Result<SharedObject, Damage> {
        let kind = Kind::from_number(input.u8()?)?;
        if !SHARED.contains(&kind) {
            return Err(Damage::Content("it names an object of a kind that is not shared"));
        }
        Ok(SharedObject {
            kind,
            reference: ObjectRef::take(input)?,
        })
    }
}

/// Lower-case hexadecimal digits.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The bytes of exactly as many lower-case digits.
#[must_use]
pub fn from_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digits = text.as_bytes();
    if digits.len() != 2 * N {
        return None;
    }
    let value = |digit: u8| match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    };
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = value(pair[0])? << 4 | value(pair[1])?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_names_one_object() {
        let object = SharedObject {
            kind: Kind::Chunk,
            reference: ObjectRef {
                hash: [0xab; 32],
                generation: 7,
            },
        };
        let path = object.to_string();
        assert_eq!(path, format!("chunks/ab/{}.7", "ab".repeat(32)));
        assert_eq!(SharedObject::from_path(&path), Some(object));
        for wrong in [
            "",
            "chunks",
            "chunks/ab/",
            &path.replace("ab/", "ac/"),
            &path.replace(".7", ".07"),
            &path.replace(".7", ".0"),
            &path.replace(".7", ".99999999999"),
            &path.replace("chunks", "backups"),
            &path.to_uppercase(),
            &format!("{path}/x"),
            &path[..40],
        ] {
            assert_eq!(SharedObject::from_path(wrong), None, "{wrong}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_path_is_read_without_a_panic(path in ".{0,90}") {
            let _ = SharedObject::from_path(&path);
            let _ = from_hex::<16>(&path);
        }
    }
}
