//! Which requests must wait for which: ranges of blocks, claimed shared (reads) or alone (writes).
//!
//! A claim waits for every earlier claim that overlaps it and of which at least one is exclusive, whether that one
//! runs or waits itself. Order is arrival, so nobody starves and no two can wait for each other.
//!
//! How: claims are kept by (size class, first block), where class `c` holds lengths in `2^(c-1)..=2^c`. A claim of
//! class `c` that overlaps a range starts less than `2^c` before it, and disjoint claims of a class are at
//! least half as far apart, so a look-up steps over at most two claims per class that do not concern it. Cost:
//! O(log n) for each class in use, plus the overlaps. Tried before: one map entry per block (8192 for 32 MiB); one
//! list of everything (each request then pays for the queue depth). Many claims on the *same* block cost
//! O(claims) each; admission bounds them.

use std::collections::BTreeMap;

use crate::split::Blocks;

/// A place in the table; given back to [`Conflicts::release`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Claim {
    class: u32,
    first: u64,
    /// Order of arrival.
    ticket: u64,
}

#[derive(Clone, Copy, Debug)]
struct Held {
    end: u64,
    is_exclusive: bool,
    /// Earlier claims still to be released; it runs at zero.
    blockers: u32,
    owner: u32,
}

/// The claims of one VDI.
#[derive(Debug, Default)]
pub(crate) struct Conflicts {
    claims: BTreeMap<Claim, Held>,
    /// Claims per size class, and a bit for each class that has some.
    class_counts: Vec<u32>,
    classes: u64,
    tickets: u64,
}

impl Conflicts {
    /// Claims `blocks` (not empty) for `owner`; also says whether it may run at once.
    pub fn claim(&mut self, blocks: Blocks, is_exclusive: bool, owner: u32) -> (Claim, bool) {
        assert!(!blocks.is_empty(), "a claim of no blocks");
        let mut blockers = 0;
        for_overlaps(&self.claims, self.classes, blocks, |claim| {
            blockers += u32::from(is_exclusive || self.claims[&claim].is_exclusive);
        });
        let claim = Claim {
            class: class_of(blocks),
            first: blocks.first,
            ticket: self.tickets,
        };
        self.tickets += 1;
        let held = Held {
            end: blocks.end,
            is_exclusive,
            blockers,
            owner,
        };
        assert!(self.claims.insert(claim, held).is_none());
        self.count(claim.class, true);
        (claim, blockers == 0)
    }

    /// Ends a claim that runs. Owners of claims that may run now are appended to `ready`, oldest first.
    pub fn release(&mut self, claim: Claim, ready: &mut impl Extend<u32>) {
        let held = self.claims.remove(&claim).expect("a claim that is held");
        assert_eq!(held.blockers, 0, "released before it ran");
        self.count(claim.class, false);
        let blocks = Blocks {
            first: claim.first,
            end: held.end,
        };
        let mut freed: smallvec::SmallVec<[Claim; 4]> = smallvec::SmallVec::new();
        for_overlaps(&self.claims, self.classes, blocks, |later| freed.push(later));
        freed.retain(|later| {
            let waiting = self.claims.get_mut(later).expect("just found");
            if !(waiting.is_exclusive || held.is_exclusive) {
                return false;
            }
            assert!(
                later.ticket > claim.ticket,
                "a claim ran before one it must wait for"
            );
            waiting.blockers -= 1;
            waiting.blockers == 0
        });
        freed.sort_unstable_by_key(|later| later.ticket);
        ready.extend(freed.iter().map(|later| self.claims[later].owner));
    }

    /// Claims held or waiting.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.claims.len()
    }

    fn count(&mut self, class: u32, is_more: bool) {
        let at = class as usize;
        if self.class_counts.len() <= at {
            self.class_counts.resize(at + 1, 0);
        }
        if is_more {
            self.class_counts[at] += 1;
        } else {
            self.class_counts[at] -= 1;
        }
        if self.class_counts[at] == 0 {
            self.classes &= !(1 << class);
        } else {
            self.classes |= 1 << class;
        }
    }
}

/// The smallest `c` with `length <= 2^c`. Block numbers of a VDI are below 2^52, so it fits the bits of `classes`.
fn class_of(blocks: Blocks) -> u32 {
    (blocks.end - blocks.first).next_power_of_two().trailing_zeros()
}

fn for_overlaps(claims: &BTreeMap<Claim, Held>, classes: u64, blocks: Blocks, mut found: impl FnMut(Claim)) {
    let mut left = classes;
    while left != 0 {
        let class = left.trailing_zeros();
        left &= left - 1;
        let from = Claim {
            class,
            first: (blocks.first + 1).saturating_sub(1 << class),
            ticket: 0,
        };
        let to = Claim {
            class,
            first: blocks.end,
            ticket: 0,
        };
        for (claim, held) in claims.range(from..to) {
            if held.end > blocks.first {
                found(*claim);
            }
        }
    }
}

#[cfg(test)]
mod tests {
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
                prop_assert_eq!(table.len(), naive.held.len());
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
