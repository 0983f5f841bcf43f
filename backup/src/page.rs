//! A page: what each chunk of 1 GiB of a disk is.

use crate::PAGE_CHUNKS;
use crate::bytes_in::BytesIn;
use crate::error::Damage;
use crate::object::{Kind, ObjectRef, REF_BYTES, SharedObject};

/// Bytes of the longest page.
pub const BYTES_MAX: usize = 4 + PAGE_CHUNKS * (1 + 2 * REF_BYTES);

/// What a chunk of a disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Reads as zeros; nothing is stored.
    Zeros,
    /// This chunk.
    Chunk(ObjectRef),
    /// A chunk of an earlier backup, with some blocks replaced.
    Patched {
        /// The chunk.
        base: ObjectRef,
        /// The blocks.
        patch: ObjectRef,
    },
}

impl Entry {
    /// The objects it is made of.
    pub fn objects(&self) -> impl Iterator<Item = SharedObject> + use<> {
        let of = |kind| move |reference| SharedObject { kind, reference };
        let (base, patch) = match *self {
            Entry::Zeros => (None, None),
            Entry::Chunk(chunk) => (Some(chunk), None),
            Entry::Patched { base, patch } => (Some(base), Some(patch)),
        };
        base.map(of(Kind::Chunk))
            .into_iter()
            .chain(patch.map(of(Kind::Patch)))
    }
}

/// A page's bytes; nothing for one of zeros only, which is not stored.
///
/// # Panics
/// When there are more entries than a page has.
#[must_use]
pub fn encode(entries: &[Entry]) -> Option<Vec<u8>> {
    assert!(
        entries.len() <= PAGE_CHUNKS,
        "{} entries of a page",
        entries.len()
    );
    if entries.iter().all(|entry| *entry == Entry::Zeros) {
        return None;
    }
    let mut out = Vec::with_capacity(4 + entries.len() * (1 + REF_BYTES));
    out.extend((entries.len() as u32).to_le_bytes());
    for entry in entries {
        match entry {
            Entry::Zeros => out.push(0),
            Entry::Chunk(chunk) => {
                out.push(1);
                chunk.put(&mut out);
            }
            Entry::Patched { base, patch } => {
                out.push(2);
                base.put(&mut out);
                patch.put(&mut out);
            }
        }
    }
    Some(out)
}

/// The entries of a page that must have as many chunks.
///
/// # Errors
/// For all that [`encode`] does not write.
pub fn decode(bytes: &[u8], chunks: usize) -> Result<Vec<Entry>, Damage> {
    let mut input = BytesIn(bytes);
    if input.u32()? as usize != chunks {
        return Err(Damage::Content(
            "the page has another number of chunks than its place on the disk",
        ));
    }
    let mut entries = Vec::with_capacity(chunks);
    for _ in 0..chunks {
        entries.push(match input.u8()? {
            0 => Entry::Zeros,
            1 => Entry::Chunk(ObjectRef::take(&mut input)?),
            2 => Entry::Patched {
                base: ObjectRef::take(&mut input)?,
                patch: ObjectRef::take(&mut input)?,
            },
            _ => return Err(Damage::Content("a chunk of the page is of an unknown kind")),
        });
    }
    input.end()?;
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    pub fn any_ref() -> impl Strategy<Value = ObjectRef> {
        (any::<[u8; 32]>(), any::<u32>()).prop_map(|(hash, generation)| ObjectRef { hash, generation })
    }

    fn any_entry() -> impl Strategy<Value = Entry> {
        prop_oneof![
            Just(Entry::Zeros),
            any_ref().prop_map(Entry::Chunk),
            (any_ref(), any_ref()).prop_map(|(base, patch)| Entry::Patched { base, patch }),
        ]
    }

    proptest! {
        #[test]
        fn a_page_is_read_as_it_was_written(entries in prop::collection::vec(any_entry(), 1..40)) {
            let Some(bytes) = encode(&entries) else {
                prop_assert!(entries.iter().all(|entry| *entry == Entry::Zeros));
                return Ok(());
            };
            prop_assert_eq!(decode(&bytes, entries.len()), Ok(entries.clone()));
            prop_assert!(decode(&bytes, entries.len() + 1).is_err());
            for cut in 0..bytes.len() {
                prop_assert!(decode(&bytes[..cut], entries.len()).is_err());
            }
            let longer = [&bytes[..], &[0]].concat();
            prop_assert!(decode(&longer, entries.len()).is_err());
        }

        #[test]
        fn arbitrary_bytes_do_no_harm(bytes in prop::collection::vec(any::<u8>(), 0..300), chunks in 0..=PAGE_CHUNKS) {
            let _ = decode(&bytes, chunks);
        }
    }

    #[test]
    fn the_longest_page_fits() {
        let entry = Entry::Patched {
            base: ObjectRef::first([1; 32]),
            patch: ObjectRef::first([2; 32]),
        };
        assert_eq!(encode(&[entry; PAGE_CHUNKS]).unwrap().len(), BYTES_MAX);
        assert_eq!(encode(&[Entry::Zeros; PAGE_CHUNKS]), None);
    }
}
