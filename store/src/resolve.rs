//! Reads through several layers that have the same leaf: block by block, what the newest of them says.
//!
//! ```text
//!  a map of the leaf (maps.rs) ──complete──▶ take the blocks, layer by layer ──all taken──▶ as any other read
//!   │ made of every layer's leaf, once        │ only from leaves that have one of them
//! ```
//! More leaves may be needed than memory holds, so blocks are not resolved all at once as in other reads: what was found
//! of one is kept, and the segment it is in is held so that it stays there whatever becomes of the block meanwhile. Each was
//! the block's newest content at some moment since the read was asked, which is what a read promises.

use types::{LeafNo, Lineage, Payload, ShardNo};

use crate::leaf::{Piece, Slot, State};
use crate::maps::Rank;
use crate::read::Step;
use crate::store::{LeafPlace, Store};
use crate::{Effect, LeafKey};

/// Leaves that are asked for ahead of the one that is waited for.
const LEAVES_AHEAD: usize = 8;

/// What a read found of its blocks so far.
#[derive(Default)]
pub(crate) struct Deep {
    /// The map in use, and of which leaf it is.
    map: Option<(LeafNo, u64)>,
    /// By position in the read; grows with its pieces.
    found: Vec<Option<FoundBlock>>,
    /// Segments held for them, as often as they were found there.
    held: Vec<u32>,
}

/// What a block holds, and in whose layer.
#[derive(Clone, Copy)]
pub(crate) struct FoundBlock {
    pub(crate) slot: Slot,
    pub(crate) key: LeafKey,
}

impl Deep {
    /// Whether every block of a piece was found.
    pub(crate) fn has(&self, piece: &Piece) -> bool {
        let blocks = self.found.get(piece.range());
        blocks.is_some_and(|blocks| blocks.iter().all(Option::is_some))
    }

    pub(crate) fn of_piece(&self, piece: &Piece) -> impl Iterator<Item = FoundBlock> + '_ {
        let blocks = self.found[piece.range()].iter();
        blocks.map(|block| block.expect("asked of pieces that were found"))
    }

    /// The first block of a piece that was not found yet, from its position in the piece.
    fn missing(&self, piece: &Piece) -> Option<usize> {
        self.found[piece.range()].iter().position(Option::is_none)
    }
}

impl<B: Payload> Store<B> {
    /// Finds the blocks of a piece, or says what is to be waited for; what was found so far is kept.
    pub(crate) fn resolve(
        &mut self,
        number: u64,
        piece: &Piece,
        effects: &mut Vec<Effect<B>>,
    ) -> Result<(), Step<B>> {
        let read = self.read_mut(number);
        let (lineage, no) = (read.lineage.clone(), piece.key.shard.no);
        let deep = read.deep.get_or_insert_default();
        deep.found.resize(deep.found.len().max(piece.range().end), None);
        while let Some(missing) = self.deep(number).missing(piece) {
            let map = self.use_map(number, &lineage, no, piece.key.leaf);
            if !self.complete_map(number, map, effects)? {
                continue;
            }
            let known = self.cache.maps.get(map).expect("it is in use");
            match known.decider(piece.slot + missing) {
                None => {
                    let found = FoundBlock {
                        slot: Slot::default(),
                        key: piece.key,
                    };
                    self.deep(number).found[piece.range()][missing] = Some(found);
                }
                Some(decider) => self.take_blocks_of(number, map, decider, piece, effects)?,
            }
        }
        self.let_go_of_map(number);
        Ok(())
    }

    fn deep(&mut self, number: u64) -> &mut Deep {
        self.read_mut(number).deep.as_mut().expect("made when it began")
    }

    /// The map that a read goes by, held for it.
    fn use_map(&mut self, number: u64, lineage: &Lineage, no: ShardNo, leaf: LeafNo) -> u64 {
        if let Some((of, map)) = self.deep(number).map
            && of == leaf
            && self.cache.maps.get(map).is_some()
        {
            return map;
        }
        self.let_go_of_map(number);
        let maps = &mut self.cache.maps;
        let map = maps
            .find(lineage, no, leaf)
            .unwrap_or_else(|| maps.begin(lineage, no, leaf));
        maps.hold(map);
        self.deep(number).map = Some((leaf, map));
        map
    }

    fn let_go_of_map(&mut self, number: u64) {
        if let Some((_, map)) = self.deep(number).map.take() {
            self.cache.maps.let_go(map);
        }
    }

    /// Looks at layers until the map is complete; false if it is gone, having become wrong.
    fn complete_map(&mut self, number: u64, map: u64, effects: &mut Vec<Effect<B>>) -> Result<bool, Step<B>> {
        loop {
            let Some(known) = self.cache.maps.get(map) else {
                return Ok(false);
            };
            if known.is_complete() {
                return Ok(true);
            }
            let Some(rank) = known.unseen(&self.ledger).next() else {
                self.cache.maps.complete(map);
                continue;
            };
            let key = known.key(rank);
            match self.leaf_for(number, key, effects) {
                Ok(at) => self.cache.add_to_map(map, rank, at),
                Err(step) => {
                    let known = self.cache.maps.get(map).expect("nothing was changed");
                    let ahead = known.unseen(&self.ledger).skip(1).take(LEAVES_AHEAD);
                    let keys: Vec<LeafKey> = ahead.map(|rank| known.key(rank)).collect();
                    self.load_ahead_of(&step, &keys, effects);
                    return Err(step);
                }
            }
        }
    }

    /// Takes every block of a piece that this layer decides.
    fn take_blocks_of(
        &mut self,
        number: u64,
        map: u64,
        decider: Rank,
        piece: &Piece,
        effects: &mut Vec<Effect<B>>,
    ) -> Result<(), Step<B>> {
        let known = self.cache.maps.get(map).expect("it is in use");
        let key = known.key(decider);
        let decided: Vec<usize> = (0..piece.count)
            .filter(|at| known.decider(piece.slot + at) == Some(decider))
            .collect();
        let at = match self.leaf_for(number, key, effects) {
            Ok(at) => at.expect("a layer that has blocks has the leaf"),
            Err(step) => {
                let keys = self.deciders_behind(number, map, decider, piece);
                self.load_ahead_of(&step, &keys, effects);
                return Err(step);
            }
        };
        let geometry = self.ledger.segments.geometry;
        for index in decided {
            let slot = self.cache.leaf(at).get(piece.slot + index);
            assert!(slot.state.is_there(), "the map says that it is there");
            let deep = self.deep(number);
            let found = &mut deep.found[piece.range()][index];
            if found.is_some() {
                continue;
            }
            *found = Some(FoundBlock { slot, key });
            if slot.state == State::Data {
                let segment = geometry.find(slot.address).expect("a block of a segment");
                deep.held.push(segment);
                self.ledger.segments.pin(segment);
            }
        }
        Ok(())
    }

    /// Other layers that have blocks of a piece which were not found yet.
    fn deciders_behind(&mut self, number: u64, map: u64, decider: Rank, piece: &Piece) -> Vec<LeafKey> {
        let found = &self.deep(number).found[piece.range()];
        let missing: Vec<usize> = (0..piece.count).filter(|at| found[*at].is_none()).collect();
        let known = self.cache.maps.get(map).expect("it is in use");
        let mut ranks: Vec<Rank> = missing
            .into_iter()
            .filter_map(|at| known.decider(piece.slot + at))
            .filter(|rank| *rank != decider)
            .collect();
        ranks.sort_unstable();
        ranks.dedup();
        ranks.truncate(LEAVES_AHEAD);
        ranks.into_iter().map(|rank| known.key(rank)).collect()
    }

    fn load_ahead_of(&mut self, step: &Step<B>, keys: &[LeafKey], effects: &mut Vec<Effect<B>>) {
        for key in keys {
            let is_in_vain = matches!(step, Step::Park);
            if is_in_vain || matches!(self.locate(*key, 0, effects), LeafPlace::NoMemory) {
                return;
            }
        }
    }

    /// The read is over.
    pub(crate) fn forget_deep(&mut self, deep: &mut Deep) {
        if let Some((_, map)) = deep.map.take() {
            self.cache.maps.let_go(map);
        }
        for segment in deep.held.drain(..) {
            self.ledger.segments.unpin(segment);
        }
    }
}
