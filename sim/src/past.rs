//! What a guest may read from the snapshots of its disk.
//!
//! A snapshot is cut while requests are under way: of those it has some and not others. It is made when the cut is answered:
//! from then on it holds, of each sector, one of the values that were there or on their way when it was cut,
//! and always the same one, whatever befalls the disk.

use std::collections::BTreeMap;

use types::{LayerId, Lineage, LineageStep, VdiId};

/// The most that one run takes.
const SNAPSHOTS_MAX: usize = 6;

/// One snapshot.
#[derive(Debug)]
struct Snapshot {
    highest: LayerId,
    /// The request that cut it.
    cut: u64,
    is_made: bool,
    /// By sector; what comes after the last is zeros.
    allowed: Vec<Vec<u64>>,
    /// What was read since.
    seen: BTreeMap<u64, u64>,
}

/// The snapshots of one disk.
#[derive(Debug, Default)]
pub(crate) struct Past {
    snapshots: Vec<Snapshot>,
}

/// Every layer of a VDI up to one.
pub(crate) fn layers(vdi: VdiId, highest: LayerId) -> Lineage {
    let step = LineageStep {
        vdi,
        lowest: LayerId(0),
        highest,
    };
    Lineage::new(&[step]).expect("one range")
}

impl Past {
    pub fn may_cut(&self) -> bool {
        self.snapshots.len() < SNAPSHOTS_MAX && self.snapshots.iter().all(|snapshot| snapshot.is_made)
    }

    /// The request `cut` makes the head a snapshot, with what is allowed of each sector.
    pub fn cut(&mut self, highest: LayerId, allowed: Vec<Vec<u64>>, cut: u64) {
        self.snapshots.push(Snapshot {
            highest,
            cut,
            is_made: false,
            allowed,
            seen: BTreeMap::new(),
        });
    }

    /// A request has ended.
    pub fn ended(&mut self, request: u64) {
        for snapshot in &mut self.snapshots {
            snapshot.is_made |= snapshot.cut == request;
        }
    }

    /// The daemon is gone: a snapshot that was not made never will be.
    pub fn abandon(&mut self) {
        self.snapshots.retain(|snapshot| snapshot.is_made);
    }

    /// The newest layers of those that can be read.
    pub fn made(&self) -> Vec<LayerId> {
        let made = self.snapshots.iter().filter(|snapshot| snapshot.is_made);
        made.map(|snapshot| snapshot.highest).collect()
    }

    fn of(&mut self, lineage: &Lineage) -> &mut Snapshot {
        let (_, highest) = lineage.newest();
        let snapshot = self
            .snapshots
            .iter_mut()
            .find(|snapshot| snapshot.highest == highest);
        snapshot.expect("a snapshot that was made")
    }

    /// Checks one sector.
    pub fn read(&mut self, of: &Lineage, sector: u64, value: u64) -> Result<(), String> {
        let snapshot = self.of(of);
        let allowed = snapshot
            .allowed
            .get(sector as usize)
            .map_or(&[0][..], Vec::as_slice);
        if !allowed.contains(&value) {
            return Err(format!(
                "sector {sector} of the snapshot {of} holds version {value}, allowed are {allowed:?}"
            ));
        }
        match *snapshot.seen.entry(sector).or_insert(value) {
            first if first == value => Ok(()),
            first => Err(format!(
                "sector {sector} of the snapshot {of} held version {first} and holds {value}"
            )),
        }
    }

    /// Whether a sector may hold zeros or nothing.
    pub fn may_be_empty(&mut self, of: &Lineage, sector: u64) -> bool {
        let snapshot = self.of(of);
        let allowed = snapshot
            .allowed
            .get(sector as usize)
            .is_none_or(|allowed| allowed.contains(&0));
        allowed && snapshot.seen.get(&sector).is_none_or(|seen| *seen == 0)
    }
}
