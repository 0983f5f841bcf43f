//! Which parts of a range hold data.

use store::{BlockState, BlockVersion};
use types::{BLOCK_BYTES, LEAF_BLOCKS};

use crate::Extent;
use crate::split::{Blocks, Span};

/// Leaves looked at for one answer; the front end asks again from where the answer ends.
pub(crate) const EXTENT_LEAVES_MAX: u64 = 4;

/// The extents of `span` by the versions of the leaves it touches; adds up to the span, no two neighbours equal.
pub(crate) fn extents_of(leaves: &[Vec<BlockVersion>], touched: Blocks, span: Span) -> Vec<Extent> {
    let mut extents: Vec<Extent> = Vec::new();
    for (leaf, versions) in (0u64..).zip(leaves) {
        assert_eq!(versions.len(), LEAF_BLOCKS as usize, "versions of a leaf");
        for (slot, version) in (0u64..).zip(versions) {
            let block = touched.first + leaf * u64::from(LEAF_BLOCKS) + slot;
            let from = (block * BLOCK_BYTES).max(span.offset);
            let to = ((block + 1) * BLOCK_BYTES).min(span.end());
            if from >= to {
                continue;
            }
            let is_data = matches!(version.state, BlockState::Data(_));
            match extents.last_mut() {
                Some(last) if last.is_data == is_data => last.length += to - from,
                _ => extents.push(Extent {
                    length: to - from,
                    is_data,
                }),
            }
        }
    }
    let total: u64 = extents.iter().map(|extent| extent.length).sum();
    assert_eq!(total, span.length, "the extents add up to {span:?}");
    extents
}

#[cfg(test)]
mod tests {
    use super::*;
    use types::Seq;

    #[test]
    fn merges_neighbours_and_clips() {
        let version = |state| BlockVersion { seq: Seq(1), state };
        let mut leaves = vec![vec![version(BlockState::Absent); 256]; 2];
        let sum = version(BlockState::Data(types::BlockSum(7)));
        leaves[0][255] = sum;
        leaves[1][0] = sum;
        leaves[1][1] = version(BlockState::Clear(store::ClearKind::Trim));
        let touched = Blocks {
            first: 512,
            end: 1024,
        };
        let span = Span {
            offset: 766 * 4096 + 512,
            length: 4 * 4096,
        };
        let extent = |length, is_data| Extent { length, is_data };
        assert_eq!(
            extents_of(&leaves, touched, span),
            [
                extent(4096 - 512, false),
                extent(8192, true),
                extent(4096 + 512, false)
            ]
        );
    }
}
