//! What differs between two states, from what layers hold: as a stream, in the order of blocks.
//!
//! The store knows for each leaf which layers of a lineage have which of its 256 blocks. From that, without reading any
//! data, follows where two states can differ: a block differs only if the layer that answers for it differs. It
//! may still hold the same bytes (somebody wrote what was there); to know that, one has to read.
//!
//! ```text
//!  lineage of @a:   1:0..=4                 block 7: layer 3
//!  lineage of @b:   1:9..=9, 1:0..=2        block 7: layer 9    ──▶ changed
//!                                           block 8: 3, nobody  ──▶ changed: it reads as zeros in @b
//! ```

use types::{BlockNo, LEAF_BLOCKS, LayerId, LeafNo, Lineage, VdiId};

/// Blocks of a leaf, one bit each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockSet([u64; LEAF_BLOCKS as usize / 64]);

impl BlockSet {
    /// Adds a block by its place in the leaf.
    ///
    /// # Panics
    /// When there is no such place.
    pub fn insert(&mut self, slot: usize) {
        self.0[slot / 64] |= 1 << (slot % 64);
    }

    /// Whether the block at this place is in it.
    ///
    /// # Panics
    /// When there is no such place.
    #[must_use]
    pub fn contains(&self, slot: usize) -> bool {
        self.0[slot / 64] >> (slot % 64) & 1 == 1
    }

    fn is_apart_from(&self, other: &BlockSet) -> bool {
        self.0
            .iter()
            .zip(other.0)
            .all(|(ours, theirs)| ours & theirs == 0)
    }
}

/// What a layer says of the blocks of one leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeafOfLayer {
    /// Whose.
    pub vdi: VdiId,
    /// Which.
    pub layer: LayerId,
    /// Blocks it has data for.
    pub data: BlockSet,
    /// Blocks it says are zeros (trimmed, or written as zeros); none of `data`.
    pub zeros: BlockSet,
}

/// One leaf and all that any layer of the lineages asked for says of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeafLayers {
    /// Which leaf of the shard.
    pub leaf: LeafNo,
    /// In any order, a layer once.
    pub layers: Vec<LeafOfLayer>,
}

/// Who answers for a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holder {
    /// Nobody ever wrote it: it reads as zeros.
    Nobody,
    /// This layer says that it is zeros.
    Zeros(VdiId, LayerId),
    /// This layer has its data.
    Data(VdiId, LayerId),
}

impl Holder {
    fn is_zeros(self) -> bool {
        !matches!(self, Holder::Data(..))
    }
}

/// How a range of blocks differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Difference {
    /// The later state has data of another layer there.
    Changed,
    /// The later state reads as zeros there, the earlier one may not.
    Zeroed,
}

/// A run of blocks of a shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent<T> {
    /// The first.
    pub first: BlockNo,
    /// How many, at least one.
    pub blocks: u32,
    /// What they have in common.
    pub what: T,
}

/// Who answers for each block of a leaf, for a reader of a lineage.
///
/// # Panics
/// When a layer says that it has data for a block and that it is zeros.
#[must_use]
pub fn resolve(lineage: &Lineage, leaf: &LeafLayers) -> [Holder; LEAF_BLOCKS as usize] {
    let mut order: Vec<(usize, &LeafOfLayer)> = leaf
        .layers
        .iter()
        .filter_map(|of| {
            let is_one = of.data.is_apart_from(&of.zeros);
            assert!(is_one, "layer {} has data and zeros for a block", of.layer);
            Some((lineage.step_of(of.vdi, of.layer)?, of))
        })
        .collect();
    // The newest first: earlier steps, in a step the higher number.
    order.sort_by(|(step_a, a), (step_b, b)| step_a.cmp(step_b).then(b.layer.cmp(&a.layer)));
    std::array::from_fn(|slot| {
        let found = order.iter().find_map(|(_, of)| {
            let data = of.data.contains(slot).then_some(Holder::Data(of.vdi, of.layer));
            data.or_else(|| of.zeros.contains(slot).then_some(Holder::Zeros(of.vdi, of.layer)))
        });
        found.unwrap_or(Holder::Nobody)
    })
}

/// The extents in which `to` differs from `from`, sorted and as long as they can be. `leaves` come in the order of
/// their numbers, each once; those in which no layer of either lineage has anything may be left out. Memory: one leaf.
pub fn diff<'a>(
    from: &'a Lineage,
    to: &'a Lineage,
    leaves: impl IntoIterator<Item = LeafLayers> + 'a,
) -> impl Iterator<Item = Extent<Difference>> + 'a {
    runs(leaves, move |leaf| {
        let (before, after) = (resolve(from, leaf), resolve(to, leaf));
        std::array::from_fn(|slot| difference(before[slot], after[slot]))
    })
}

/// The extents that a reader of a lineage has data in, or was told are zeros; sorted, as long as they can be.
pub fn mapped<'a>(
    lineage: &'a Lineage,
    leaves: impl IntoIterator<Item = LeafLayers> + 'a,
) -> impl Iterator<Item = Extent<Holder>> + 'a {
    runs(leaves, move |leaf| {
        resolve(lineage, leaf).map(|holder| (holder != Holder::Nobody).then_some(holder))
    })
}

fn difference(before: Holder, after: Holder) -> Option<Difference> {
    match (before, after) {
        (before, after) if before == after || before.is_zeros() && after.is_zeros() => None,
        (_, Holder::Data(..)) => Some(Difference::Changed),
        _ => Some(Difference::Zeroed),
    }
}

/// Joins what `judge` says of each block to runs, across leaves that touch.
fn runs<'a, T: Copy + PartialEq + 'a>(
    leaves: impl IntoIterator<Item = LeafLayers> + 'a,
    judge: impl Fn(&LeafLayers) -> [Option<T>; LEAF_BLOCKS as usize] + 'a,
) -> impl Iterator<Item = Extent<T>> + 'a {
    let mut leaves = leaves.into_iter();
    let mut open: Option<Extent<T>> = None;
    let mut judged: Option<(LeafNo, [Option<T>; LEAF_BLOCKS as usize], usize)> = None;
    let mut last: Option<LeafNo> = None;
    std::iter::from_fn(move || {
        loop {
            let Some((leaf, verdicts, slot)) = &mut judged else {
                let Some(next) = leaves.next() else {
                    return open.take();
                };
                assert!(last.is_none_or(|last| last < next.leaf), "leaves come in order");
                last = Some(next.leaf);
                judged = Some((next.leaf, judge(&next), 0));
                continue;
            };
            if *slot == verdicts.len() {
                judged = None;
                continue;
            }
            let block = leaf.first_block().plus(*slot as u32);
            let what = verdicts[*slot];
            *slot += 1;
            match (&mut open, what) {
                (Some(run), Some(what)) if run.what == what && run.first.plus(run.blocks) == block => {
                    run.blocks += 1;
                }
                (_, what) => {
                    let next = what.map(|what| Extent {
                        first: block,
                        blocks: 1,
                        what,
                    });
                    // A run that ended before a gap leaves as soon as the gap is seen.
                    if let Some(done) = std::mem::replace(&mut open, next) {
                        return Some(done);
                    }
                }
            }
        }
    })
}

#[cfg(test)]
#[path = "diff_tests.rs"]
mod tests;
