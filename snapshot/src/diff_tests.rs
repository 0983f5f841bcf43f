use std::collections::BTreeMap;

use proptest::prelude::*;

use types::LineageStep;

use super::*;

const WEB: VdiId = VdiId(1);
const BLOCKS: u32 = 3 * LEAF_BLOCKS;

fn lineage(steps: &[(u32, u32)]) -> Lineage {
    let steps: Vec<LineageStep> = steps
        .iter()
        .map(|(lowest, highest)| LineageStep {
            vdi: WEB,
            lowest: LayerId(*lowest),
            highest: LayerId(*highest),
        })
        .collect();
    Lineage::new(&steps).unwrap()
}

/// What layers hold, block by block: data or zeros.
type Layers = BTreeMap<u32, BTreeMap<u32, bool>>;

/// As the store would hand it over.
fn leaves(layers: &Layers) -> Vec<LeafLayers> {
    let mut leaves = Vec::new();
    for leaf in 0..BLOCKS / LEAF_BLOCKS {
        let mut of_leaf = Vec::new();
        for (layer, blocks) in layers {
            let mut of_layer = LeafOfLayer {
                vdi: WEB,
                layer: LayerId(*layer),
                data: BlockSet::default(),
                zeros: BlockSet::default(),
            };
            for (block, is_data) in blocks.range(leaf * LEAF_BLOCKS..(leaf + 1) * LEAF_BLOCKS) {
                let set = if *is_data {
                    &mut of_layer.data
                } else {
                    &mut of_layer.zeros
                };
                set.insert(BlockNo(*block).slot());
            }
            of_leaf.push(of_layer);
        }
        of_leaf.retain(|of| of.data != BlockSet::default() || of.zeros != BlockSet::default());
        if !of_leaf.is_empty() {
            leaves.push(LeafLayers {
                leaf: LeafNo(leaf),
                layers: of_leaf,
            });
        }
    }
    leaves
}

fn fill(layers: &mut Layers, layer: u32, blocks: std::ops::Range<u32>, is_data: bool) {
    layers
        .entry(layer)
        .or_default()
        .extend(blocks.map(|block| (block, is_data)));
}

fn differences(from: &Lineage, to: &Lineage, layers: &Layers) -> Vec<(u32, u32, Difference)> {
    let extents = diff(from, to, leaves(layers));
    extents
        .map(|extent| (extent.first.0, extent.blocks, extent.what))
        .collect()
}

#[test]
fn what_the_layers_between_wrote_and_zeroed() {
    let mut layers = Layers::new();
    fill(&mut layers, 0, 0..600, true);
    fill(&mut layers, 2, 250..300, true);
    fill(&mut layers, 3, 290..310, false);
    fill(&mut layers, 3, 700..710, false);
    let (a, b) = (lineage(&[(0, 1)]), lineage(&[(0, 3)]));
    // Across the border of leaves 0 and 1 it is one; what was never written and then zeroed is no difference.
    let expected = [(250, 40, Difference::Changed), (290, 20, Difference::Zeroed)];
    assert_eq!(differences(&a, &b, &layers), expected);
    // Backwards all of it is data that the later state does not have.
    assert_eq!(differences(&b, &a, &layers), [(250, 60, Difference::Changed)]);
    assert_eq!(differences(&a, &a, &layers), []);
}

#[test]
fn branches_differ_where_either_wrote() {
    let mut layers = Layers::new();
    fill(&mut layers, 0, 0..10, true);
    fill(&mut layers, 1, 2..4, true);
    fill(&mut layers, 1, 20..30, true);
    fill(&mut layers, 2, 3..5, true);
    let (old, new) = (lineage(&[(0, 1)]), lineage(&[(2, 2), (0, 0)]));
    let expected = [(2, 3, Difference::Changed), (20, 10, Difference::Zeroed)];
    assert_eq!(differences(&old, &new, &layers), expected);
}

#[test]
fn a_leaf_that_is_left_out_parts_two_runs() {
    let mut layers = Layers::new();
    fill(&mut layers, 1, 0..256, true);
    fill(&mut layers, 1, 512..768, true);
    let (a, b) = (lineage(&[(0, 0)]), lineage(&[(0, 1)]));
    let expected = [(0, 256, Difference::Changed), (512, 256, Difference::Changed)];
    assert_eq!(differences(&a, &b, &layers), expected);
}

#[test]
fn a_stream_of_leaves_is_not_kept() {
    // More leaves than fit in memory as a list of blocks; each with one run that touches the next.
    let (a, b) = (lineage(&[(0, 0)]), lineage(&[(0, 1)]));
    let all = std::array::from_fn::<usize, 256, _>(|slot| slot);
    let mut data = BlockSet::default();
    all.iter().for_each(|slot| data.insert(*slot));
    let stream = (0..20_000).map(|leaf| LeafLayers {
        leaf: LeafNo(leaf),
        layers: vec![LeafOfLayer {
            vdi: WEB,
            layer: LayerId(1),
            data,
            zeros: BlockSet::default(),
        }],
    });
    let found: Vec<_> = diff(&a, &b, stream).collect();
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].blocks, 20_000 * LEAF_BLOCKS);
}

/// Block by block, by the words of the documentation.
fn naive(lineage: &Lineage, layers: &Layers, block: u32) -> Holder {
    for step in lineage.steps() {
        for layer in (step.lowest.0..=step.highest.0).rev() {
            match layers.get(&layer).and_then(|blocks| blocks.get(&block)) {
                Some(true) => return Holder::Data(WEB, LayerId(layer)),
                Some(false) => return Holder::Zeros(WEB, LayerId(layer)),
                None => {}
            }
        }
    }
    Holder::Nobody
}

/// Any lineage of layers 0 to 7: some numbers, newest first.
fn any_lineage() -> impl Strategy<Value = Lineage> {
    (1u32..256).prop_map(|chosen| {
        let steps: Vec<(u32, u32)> = (0..8)
            .rev()
            .filter(|layer| chosen >> layer & 1 == 1)
            .map(|layer| (layer, layer))
            .collect();
        lineage(&steps)
    })
}

/// Some runs of blocks, each of a layer.
fn any_layers() -> impl Strategy<Value = Layers> {
    let run = (0u32..8, 0..BLOCKS, 1u32..200, any::<bool>());
    prop::collection::vec(run, 0..12).prop_map(|runs| {
        let mut layers = Layers::new();
        for (layer, first, count, is_data) in runs {
            fill(&mut layers, layer, first..(first + count).min(BLOCKS), is_data);
        }
        layers
    })
}

fn spread<T: Copy>(extents: impl Iterator<Item = Extent<T>>) -> Vec<Option<T>> {
    let mut blocks = vec![None; BLOCKS as usize];
    for extent in extents {
        blocks[extent.first.0 as usize..][..extent.blocks as usize].fill(Some(extent.what));
    }
    blocks
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

    #[test]
    fn every_block_is_judged_as_one_by_one(
        layers in any_layers(), from in any_lineage(), to in any_lineage(),
    ) {
        let extents: Vec<_> = diff(&from, &to, leaves(&layers)).collect();
        for pair in extents.windows(2) {
            let end = pair[0].first.plus(pair[0].blocks);
            prop_assert!(end < pair[1].first || end == pair[1].first && pair[0].what != pair[1].what);
        }
        let found = spread(extents.into_iter());
        let held = spread(mapped(&to, leaves(&layers)));
        for block in 0..BLOCKS {
            let (before, after) = (naive(&from, &layers, block), naive(&to, &layers, block));
            let expected = match (before, after) {
                (before, after) if before == after => None,
                (_, Holder::Data(..)) => Some(Difference::Changed),
                (Holder::Data(..), _) => Some(Difference::Zeroed),
                _ => None,
            };
            prop_assert_eq!(found[block as usize], expected, "block {}", block);
            prop_assert_eq!(held[block as usize].unwrap_or(Holder::Nobody), after);
        }
    }
}
