//! What the guests may see: promises 1 to 4, as a register per block.
//!
//! Every write of a scenario has a value of its own, and values order writes: those of a later life of the VDI come
//! after those of an earlier one, and within a life in the order asked. Lives may overlap: an old writer goes on until
//! somebody tells it otherwise, and what it is told late may have happened before its successor began. What it may
//! never be told is that a write happened which its successor's guest has seen not to have happened, or which it
//! asked for when its successor had already acted.

use std::collections::{BTreeMap, BTreeSet};

use crate::value::Value;

/// Lives are numbered from 0; a life's writes have this many values.
pub const VALUES_PER_LIFE: u8 = 8;

/// The life that wrote a value; zeros are nobody's.
#[must_use]
pub fn life_of(value: Value) -> Option<usize> {
    (value.0 > 0).then(|| usize::from((value.0 - 1) / VALUES_PER_LIFE))
}

#[derive(Clone, Debug, Default, Hash)]
struct Block {
    issued: BTreeSet<Value>,
    complete: BTreeSet<Value>,
    /// Of what is complete, what a loss of power everywhere must leave.
    durable: Option<Value>,
    /// Seen by the newest life, with a quorum: nothing before it comes back.
    seen: Option<Value>,
    /// Known not to have happened.
    dead: BTreeSet<Value>,
}

impl Block {
    /// The newest of what is complete or settled, as a life knows it.
    fn floor(&self, life: usize) -> Value {
        let is_its = |value: &&Value| life_of(**value).is_none_or(|of| of <= life);
        let complete = self.complete.iter().rev().find(is_its).copied();
        let seen = self.seen.filter(|seen| is_its(&seen));
        complete.max(seen).unwrap_or(Value(0))
    }
}

/// All blocks.
#[derive(Clone, Debug, Default, Hash)]
pub struct Oracle {
    blocks: BTreeMap<u32, Block>,
    /// The newest life whose guest was told something, and could conclude from it.
    acted: Option<usize>,
}

/// By block, what was complete at some moment.
pub type Floors = Vec<(u32, Value)>;

impl Oracle {
    fn block(&mut self, no: u32) -> &mut Block {
        self.blocks.entry(no).or_default()
    }

    /// Those that somebody wrote.
    #[must_use]
    pub fn blocks(&self) -> Vec<u32> {
        self.blocks.keys().copied().collect()
    }

    /// A write is asked for.
    pub fn issued(&mut self, no: u32, value: Value) {
        let is_late = self.acted > life_of(value);
        let block = self.block(no);
        block.issued.insert(value);
        if is_late {
            block.dead.insert(value);
        }
    }

    /// A write is complete.
    pub fn completed(&mut self, no: u32, value: Value) -> Result<(), String> {
        let block = self.block(no);
        if block.dead.contains(&value) {
            return Err(format!(
                "block {no}: {value:?} is completed, and a newer writer had acted without it"
            ));
        }
        block.complete.insert(value);
        self.acted = self.acted.max(life_of(value));
        Ok(())
    }

    /// What is complete now, as `life` knows it.
    #[must_use]
    pub fn floors(&self, life: usize) -> Floors {
        self.blocks
            .iter()
            .map(|(no, block)| (*no, block.floor(life)))
            .collect()
    }

    /// A flush of `life` is done that was asked for when `floors` were complete.
    pub fn flushed(&mut self, life: usize, floors: &Floors) {
        self.acted = self.acted.max(Some(life));
        for (no, floor) in floors {
            let block = self.block(*no);
            block.durable = block.durable.max(Some(*floor));
        }
    }

    /// Power was lost everywhere.
    pub fn power_lost(&mut self) {
        for block in self.blocks.values_mut() {
            let durable = block.durable;
            block.complete.retain(|value| Some(*value) <= durable);
            block.seen = durable;
            block.dead.clear();
        }
    }

    /// A read of `life` is answered; `floors` were complete when it was asked. `is_newest`: nobody has overtaken it.
    /// `decides`: it was answered with a quorum behind it, so that what it did not show has not happened.
    pub fn read(
        &mut self,
        no: u32,
        value: Value,
        floors: &Floors,
        life: usize,
        is_newest: bool,
        decides: bool,
    ) -> Result<(), String> {
        let floor = floors.iter().find(|(of, _)| *of == no);
        let floor = floor.map_or(Value(0), |(_, floor)| *floor);
        let block = self.block(no);
        if value != Value(0) && !block.issued.contains(&value) {
            return Err(format!(
                "block {no}: life {life} read {value:?}, which nobody wrote there"
            ));
        }
        if value < floor {
            return Err(format!(
                "block {no}: life {life} read {value:?} although {floor:?} was complete"
            ));
        }
        if block.dead.contains(&value) {
            return Err(format!(
                "block {no}: life {life} read {value:?}, which was seen not to have happened"
            ));
        }
        if is_newest && decides {
            let not_seen = block.issued.iter().filter(|other| **other > value).copied();
            block.dead.extend(not_seen);
            block.seen = block.seen.max(Some(value));
            self.acted = self.acted.max(Some(life));
        }
        Ok(())
    }
}
