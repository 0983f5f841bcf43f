//! The checksums that travel with a write.

use std::hash::{Hash, Hasher};
use std::ops::Deref;
use std::sync::Arc;

/// Blocks whose sums are kept in place.
const INLINE: usize = 4;

/// The crc32c of each block of a payload, in order; cheap to clone, as every replica gets one.
///
/// A few are kept in place; more of them are on the heap and shared.
#[derive(Clone, Debug)]
pub struct BlockCrcs(Form);

#[derive(Clone, Debug)]
enum Form {
    Few(u8, [u32; INLINE]),
    Many(Arc<[u32]>),
}

impl Deref for BlockCrcs {
    type Target = [u32];

    #[inline]
    fn deref(&self) -> &[u32] {
        match &self.0 {
            Form::Few(count, crcs) => &crcs[..usize::from(*count)],
            Form::Many(crcs) => crcs,
        }
    }
}

impl FromIterator<u32> for BlockCrcs {
    #[inline]
    fn from_iter<I: IntoIterator<Item = u32>>(crcs: I) -> BlockCrcs {
        let mut crcs = crcs.into_iter();
        let mut few = [0; INLINE];
        let mut count = 0;
        for crc in crcs.by_ref() {
            if count == INLINE {
                return BlockCrcs(Form::Many(few.into_iter().chain([crc]).chain(crcs).collect()));
            }
            few[count] = crc;
            count += 1;
        }
        BlockCrcs(Form::Few(count as u8, few))
    }
}

impl PartialEq for BlockCrcs {
    fn eq(&self, other: &BlockCrcs) -> bool {
        **self == **other
    }
}

impl Eq for BlockCrcs {}

impl Hash for BlockCrcs {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (**self).hash(state);
    }
}

impl<'a> IntoIterator for &'a BlockCrcs {
    type Item = &'a u32;
    type IntoIter = std::slice::Iter<'a, u32>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_number_in_order() {
        for count in 0..12u32 {
            let crcs: BlockCrcs = (0..count).collect();
            assert!(crcs.iter().copied().eq(0..count), "{crcs:?}");
            assert_eq!(crcs.clone(), crcs);
        }
    }
}
