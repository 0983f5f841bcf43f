//! What a guest may see: per block the values written, in order, and the oldest that may still be read.

use std::collections::{BTreeMap, BTreeSet};

use types::{LayerId, RequestId};

/// Zero stands for "reads as zeros".
pub type Value = u64;

#[derive(Clone, Debug)]
struct Block {
    /// In the order issued; the first is what an untouched block holds.
    values: Vec<Value>,
    /// No value before this may be read: it is complete.
    floor: usize,
    /// No value before this may be read even after the power failed everywhere.
    durable: usize,
    /// Values of writers that are gone, which a later read has shown not to have happened.
    dead: Vec<usize>,
}

/// All blocks of the shard.
#[derive(Clone, Debug, Default)]
pub struct Oracle {
    blocks: BTreeMap<u32, Block>,
}

impl Oracle {
    fn block(&mut self, no: u32) -> &mut Block {
        self.blocks.entry(no).or_insert_with(|| Block {
            values: vec![0],
            floor: 0,
            durable: 0,
            dead: Vec::new(),
        })
    }

    /// Returns the index by which the write is known.
    pub fn issued(&mut self, no: u32, value: Value) -> usize {
        let block = self.block(no);
        block.values.push(value);
        block.values.len() - 1
    }

    pub fn completed(&mut self, no: u32, index: usize) {
        let block = self.block(no);
        assert!(
            !block.dead.contains(&index),
            "block {no}: write {index} completed after a read showed it had not happened"
        );
        block.floor = block.floor.max(index);
    }

    /// What a flush that starts now makes durable.
    pub fn floors(&self) -> Vec<(u32, usize)> {
        self.blocks.iter().map(|(no, block)| (*no, block.floor)).collect()
    }

    pub fn flushed(&mut self, floors: &[(u32, usize)]) {
        for (no, floor) in floors {
            let block = self.block(*no);
            block.durable = block.durable.max(*floor);
        }
    }

    pub fn power_lost(&mut self) {
        for block in self.blocks.values_mut() {
            block.floor = block.durable;
            block.dead.clear();
        }
    }

    /// `floor` is what was complete when the read started. A read by the shard's only writer, with a quorum, also
    /// decides which writes of dead writers happened.
    pub fn read(&mut self, no: u32, value: Value, floor: usize, decides: bool) {
        let block = self.block(no);
        let index = block.values.iter().rposition(|held| *held == value);
        let Some(index) = index else {
            panic!("block {no}: read {value}, which was never written there");
        };
        // Zeros may have been written more than once; the last is the most favourable.
        assert!(
            index >= floor,
            "block {no}: read write {index} although {floor} was complete: {:?}",
            block.values
        );
        assert!(
            value == 0 || !block.dead.contains(&index),
            "block {no}: write {index} came back after a read showed it had not happened"
        );
        if decides {
            let others = (0..block.values.len()).filter(|other| *other != index);
            block.dead = others.collect();
            block.floor = block.floor.max(index);
        }
    }

    /// What a snapshot that is taken now may have: by block, whatever may be read, and what may still turn out to have
    /// happened.
    pub fn now(&self) -> BTreeMap<u32, Vec<Value>> {
        let allowed = |block: &Block| {
            let from_floor = (block.floor..block.values.len()).filter(|index| !block.dead.contains(index));
            from_floor.map(|index| block.values[index]).collect()
        };
        self.blocks
            .iter()
            .map(|(no, block)| (*no, allowed(block)))
            .collect()
    }

    pub fn floor(&self, no: u32) -> usize {
        self.blocks.get(&no).map_or(0, |block| block.floor)
    }
}

/// A snapshot, from the cut on.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Whose writer cut.
    pub life: usize,
    /// Its newest layer.
    pub highest: LayerId,
    /// Writes that were under way when it was cut, and have not ended.
    pub awaited: BTreeSet<RequestId>,
    /// What blocks may hold; others have never been written by then.
    pub allowed: BTreeMap<u32, Vec<Value>>,
    /// Everything in it is complete and on stable media: it has a name, and stays as it is.
    pub is_made: bool,
    /// What blocks were read as since.
    pub seen: BTreeMap<u32, Value>,
}

impl Snapshot {
    pub fn read(&mut self, no: u32, value: Value) {
        let layer = self.highest;
        let is_allowed = self
            .allowed
            .get(&no)
            .map_or(value == 0, |allowed| allowed.contains(&value));
        assert!(
            is_allowed,
            "block {no} of the snapshot at layer {layer}: read {value}, not of {:?}",
            self.allowed.get(&no)
        );
        let first = *self.seen.entry(no).or_insert(value);
        assert_eq!(
            first, value,
            "block {no} of the snapshot at layer {layer} has changed"
        );
    }

    /// A block was said to hold data, or zeros.
    pub fn is_data(&self, no: u32, is_data: bool) {
        if let Some(seen) = self.seen.get(&no) {
            assert_eq!(*seen != 0, is_data, "block {no} was {seen}");
        }
    }
}
