//! Which requests must wait for which: ranges of blocks, claimed shared (reads) or alone (writes).
//!
//! A claim waits for every earlier claim that overlaps it and of which at least one is exclusive, whether that one
//! runs or waits itself. Order is arrival, so nobody starves and no two can wait for each other.
//!
//! How: a claim of class `c` holds at most `2^c` blocks and is kept in the cell `first >> c` of its class, cells in
//! hashed lists. One that overlaps a range starts less than `2^c` before it, so a look-up walks the cells from there
//! to the range's end, in each class that is in use: one cell where all requests are of one block. A range of so many
//! cells that looking at every claim is less does that. Tried before: one map entry per block (8192 for 32 MiB); one
//! list of everything (each request then pays for the queue depth); an ordered map by class and first block (a tenth
//! of a request's instructions). Many claims on the *same* block cost O(claims) each; admission bounds them.

use smallvec::SmallVec;

use crate::split::Blocks;

/// A place in the table; given back to [`Conflicts::release`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Claim(u32);

#[derive(Clone, Copy, Debug)]
struct Held {
    blocks: Blocks,
    class: u32,
    is_exclusive: bool,
    /// Earlier claims still to be released; it runs at zero.
    blockers: u32,
    owner: u32,
    /// Order of arrival.
    ticket: u64,
    /// In the list of its cells.
    next: u32,
}

/// Lists of cells: a power of two, four times what a deep queue of one guest holds.
const LISTS: usize = 1024;
/// The end of a list.
const NOBODY: u32 = u32::MAX;
const CLASSES: usize = 64;

/// The claims of one VDI.
#[derive(Debug)]
pub(crate) struct Conflicts {
    /// By [`Claim`]; `None` where one may go.
    places: Vec<Option<Held>>,
    free: Vec<u32>,
    /// First claim of each list of cells.
    lists: Box<[u32]>,
    /// Claims per size class, and a bit for each class that has some.
    class_counts: [u32; CLASSES],
    classes: u64,
    tickets: u64,
}

impl Default for Conflicts {
    fn default() -> Conflicts {
        Conflicts {
            places: Vec::new(),
            free: Vec::new(),
            lists: vec![NOBODY; LISTS].into(),
            class_counts: [0; CLASSES],
            classes: 0,
            tickets: 0,
        }
    }
}

impl Conflicts {
    /// Claims `blocks` (not empty) for `owner`; also says whether it may run at once.
    pub fn claim(&mut self, blocks: Blocks, is_exclusive: bool, owner: u32) -> (Claim, bool) {
        assert!(!blocks.is_empty(), "a claim of no blocks");
        let mut blockers = 0;
        self.for_overlaps(blocks, |_, other| {
            blockers += u32::from(is_exclusive || other.is_exclusive);
        });
        let class = class_of(blocks);
        let list = list_of(class, blocks.first >> class);
        let held = Some(Held {
            blocks,
            class,
            is_exclusive,
            blockers,
            owner,
            ticket: self.tickets,
            next: self.lists[list],
        });
        self.tickets += 1;
        let place = match self.free.pop() {
            Some(place) => {
                self.places[place as usize] = held;
                place
            }
            None => {
                self.places.push(held);
                (self.places.len() - 1) as u32
            }
        };
        self.lists[list] = place;
        self.class_counts[class as usize] += 1;
        self.classes |= 1 << class;
        (Claim(place), blockers == 0)
    }

    /// Ends a claim that runs. Owners of claims that may run now are appended to `ready`, oldest first.
    pub fn release(&mut self, claim: Claim, ready: &mut impl Extend<u32>) {
        let held = self.take(claim);
        assert_eq!(held.blockers, 0, "released before it ran");
        let mut waited: SmallVec<[u32; 4]> = SmallVec::new();
        self.for_overlaps(held.blocks, |place, other| {
            if other.is_exclusive || held.is_exclusive {
                assert!(
                    other.ticket > held.ticket,
                    "a claim ran before one it must wait for"
                );
                waited.push(place);
            }
        });
        if waited.is_empty() {
            return;
        }
        let mut freed: SmallVec<[(u64, u32); 4]> = SmallVec::new();
        for place in waited {
            let later = self.places[place as usize].as_mut().expect("just found");
            later.blockers -= 1;
            if later.blockers == 0 {
                freed.push((later.ticket, later.owner));
            }
        }
        freed.sort_unstable();
        ready.extend(freed.iter().map(|(_, owner)| *owner));
    }

    /// Claims held or waiting.
    #[cfg(test)]
    pub fn count(&self) -> usize {
        self.places.len() - self.free.len()
    }

    /// Takes a claim out of the table and out of its list.
    fn take(&mut self, claim: Claim) -> Held {
        let held = self.places[claim.0 as usize]
            .take()
            .expect("a claim that is held");
        self.free.push(claim.0);
        let list = list_of(held.class, held.blocks.first >> held.class);
        if self.lists[list] == claim.0 {
            self.lists[list] = held.next;
        } else {
            let mut at = self.lists[list];
            loop {
                let other = self.places[at as usize].as_mut().expect("lists hold claims");
                if other.next == claim.0 {
                    other.next = held.next;
                    break;
                }
                at = other.next;
            }
        }
        let count = &mut self.class_counts[held.class as usize];
        *count -= 1;
        if *count == 0 {
            self.classes &= !(1 << held.class);
        }
        held
    }

    /// Every claim that overlaps `blocks`, once.
    fn for_overlaps(&self, blocks: Blocks, mut found: impl FnMut(u32, &Held)) {
        let mut left = self.classes;
        while left != 0 {
            let class = left.trailing_zeros();
            left &= left - 1;
            let from = (blocks.first + 1).saturating_sub(1 << class) >> class;
            let to = (blocks.end - 1) >> class;
            if to - from >= self.places.len() as u64 {
                for (place, held) in (0u32..).zip(&self.places) {
                    if let Some(held) = held
                        && held.class == class
                        && held.overlaps(blocks)
                    {
                        found(place, held);
                    }
                }
                continue;
            }
            for cell in from..=to {
                let mut at = self.lists[list_of(class, cell)];
                while at != NOBODY {
                    let held = self.places[at as usize].as_ref().expect("lists hold claims");
                    // Cells share lists.
                    if held.class == class && held.blocks.first >> class == cell && held.overlaps(blocks) {
                        found(at, held);
                    }
                    at = held.next;
                }
            }
        }
    }
}

impl Held {
    fn overlaps(&self, blocks: Blocks) -> bool {
        self.blocks.first < blocks.end && blocks.first < self.blocks.end
    }
}

/// The smallest `c` with `length <= 2^c`. Block numbers of a VDI are below 2^52, so it fits the bits of `classes`.
fn class_of(blocks: Blocks) -> u32 {
    (blocks.end - blocks.first).next_power_of_two().trailing_zeros()
}

/// Spreads cells over the lists: neighbours lie apart, and classes do not meet at the same place.
fn list_of(class: u32, cell: u64) -> usize {
    let mixed = (cell ^ u64::from(class) << 56).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed >> (64 - LISTS.trailing_zeros())) as usize
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use proptest::prelude::*;

    /// The same rule, spelled out: a list in order of arrival, everything compared with everything.
    #[derive(Default)]
    struct Naive {
        held: Vec<(Blocks, bool, u32)>,
    }

    impl Naive {
        fn may_run(&self, at: usize) -> bool {
            let (mine, is_exclusive, _) = self.held[at];
            !self.held[..at].iter().any(|(other, other_exclusive, _)| {
                (is_exclusive || *other_exclusive) && other.first < mine.end && mine.first < other.end
            })
        }

        fn running(&self) -> Vec<u32> {
            (0..self.held.len())
                .filter(|at| self.may_run(*at))
                .map(|at| self.held[at].2)
                .collect()
        }
    }

    fn length() -> impl Strategy<Value = u64> {
        prop_oneof![4 => Just(1u64), 3 => 1u64..9, 2 => 1u64..70, 1 => 1u64..9000]
    }

    proptest! {
        #[test]
        fn agrees_with_comparing_everything(
            steps in prop::collection::vec((any::<bool>(), 0u64..100, length(), any::<bool>(), any::<u32>()), 1..200)
        ) {
            let mut table = Conflicts::default();
            let mut naive = Naive::default();
            let mut claims = BTreeMap::new();
            let mut running: Vec<u32> = Vec::new();
            for (owner, (is_claim, first, length, is_exclusive, pick)) in (0u32..).zip(steps) {
                if is_claim || running.is_empty() {
                    let blocks = Blocks { first, end: first + length };
                    let (claim, may_run) = table.claim(blocks, is_exclusive, owner);
                    claims.insert(owner, claim);
                    naive.held.push((blocks, is_exclusive, owner));
                    if may_run {
                        running.push(owner);
                    }
                } else {
                    let ended = running.swap_remove(pick as usize % running.len());
                    let mut ready = Vec::new();
                    table.release(claims[&ended], &mut ready);
                    naive.held.retain(|(_, _, o)| *o != ended);
                    prop_assert!(ready.is_sorted(), "not oldest first: {:?}", ready);
                    running.extend(ready);
                }
                let mut sorted = running.clone();
                sorted.sort_unstable();
                prop_assert_eq!(sorted, naive.running());
                prop_assert_eq!(table.count(), naive.held.len());
            }
        }
    }

    #[test]
    fn a_reader_does_not_overtake_a_waiting_writer() {
        let mut table = Conflicts::default();
        let block = Blocks { first: 7, end: 8 };
        let (first, runs) = table.claim(block, false, 1);
        assert!(runs);
        let (second, runs) = table.claim(block, true, 2);
        assert!(!runs);
        let (_, runs) = table.claim(block, false, 3);
        assert!(!runs);
        let mut ready = Vec::new();
        table.release(first, &mut ready);
        assert_eq!(ready, [2]);
        table.release(second, &mut ready);
        assert_eq!(ready, [2, 3]);
    }
}
