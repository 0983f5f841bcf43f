//! Things under way, each found again by the number it got.

use std::hash::{Hash, Hasher};

/// What is under way, by number: constant time in and out, and no allocation once it has grown to what is ever under
/// way at once.
///
/// A number is a place in the table and the low 31 bits of a count of everything that was ever put in, so a late answer
/// to something that has ended finds nothing, and not what has its place now. Tried before: a map ordered by a
/// growing number, which cost a tenth of a request's instructions; a queue by the growing number, which one slow
/// answer makes as long as everything that came after it.
#[derive(Clone, Debug)]
pub struct InFlight<T> {
    slots: Vec<Option<Entry<T>>>,
    free: Vec<u32>,
    begun: u64,
}

/// A number's highest bit is never set: whoever passes numbers of several tables on may tell them apart by it.
const ORDER_MASK: u32 = u32::MAX >> 1;

#[derive(Clone, Debug)]
struct Entry<T> {
    /// How many came before it.
    order: u64,
    content: T,
}

impl<T> Entry<T> {
    fn is_called(&self, number: u64) -> bool {
        self.order as u32 & ORDER_MASK == (number >> 32) as u32
    }
}

#[inline]
fn number_of(order: u64, slot: u64) -> u64 {
    u64::from(order as u32 & ORDER_MASK) << 32 | slot
}

impl<T> Default for InFlight<T> {
    fn default() -> InFlight<T> {
        InFlight {
            slots: Vec::new(),
            free: Vec::new(),
            begun: 0,
        }
    }
}

/// By what is under way, oldest first. Numbers only name things: which one a thing got depends on the order in which
/// earlier things ended, and says nothing about what comes next.
impl<T: Hash> Hash for InFlight<T> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        let mut entries: Vec<&Entry<T>> = self.slots.iter().flatten().collect();
        entries.sort_unstable_by_key(|entry| entry.order);
        entries.len().hash(state);
        for entry in entries {
            entry.content.hash(state);
        }
    }
}

impl<T> InFlight<T> {
    /// Takes something in and gives it a number that nothing else under way has.
    #[inline]
    pub fn insert(&mut self, content: T) -> u64 {
        let order = self.begun;
        self.begun += 1;
        let entry = Some(Entry { order, content });
        let slot = match self.free.pop() {
            Some(slot) => {
                self.slots[slot as usize] = entry;
                slot
            }
            None => {
                self.slots.push(entry);
                u32::try_from(self.slots.len() - 1).expect("fewer than 2^32 things under way")
            }
        };
        number_of(order, u64::from(slot))
    }

    /// What has this number, if it is under way.
    #[inline]
    #[must_use]
    pub fn get(&self, number: u64) -> Option<&T> {
        let entry = self.slots.get(number as u32 as usize)?.as_ref()?;
        entry.is_called(number).then_some(&entry.content)
    }

    /// The same, to be changed.
    #[inline]
    pub fn get_mut(&mut self, number: u64) -> Option<&mut T> {
        let entry = self.slots.get_mut(number as u32 as usize)?.as_mut()?;
        entry.is_called(number).then_some(&mut entry.content)
    }

    /// Ends what has this number, if it is under way.
    #[inline]
    pub fn remove(&mut self, number: u64) -> Option<T> {
        let slot = self.slots.get_mut(number as u32 as usize)?;
        if !slot.as_ref()?.is_called(number) {
            return None;
        }
        self.free.push(number as u32);
        slot.take().map(|entry| entry.content)
    }

    /// How many are under way.
    #[inline]
    #[must_use]
    pub fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Whether nothing is.
    #[inline]
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Everything under way, in no order that means anything.
    pub fn values(&self) -> impl Iterator<Item = &T> {
        self.slots.iter().flatten().map(|entry| &entry.content)
    }

    /// Numbers of those of which `want` is true, oldest first.
    pub fn numbers(&self, want: impl Fn(&T) -> bool) -> Vec<u64> {
        let mut found: Vec<(u64, u64)> = (0u64..)
            .zip(&self.slots)
            .filter_map(|(slot, entry)| entry.as_ref().map(|entry| (slot, entry)))
            .filter(|(_, entry)| want(&entry.content))
            .map(|(slot, entry)| (entry.order, number_of(entry.order, slot)))
            .collect();
        found.sort_unstable();
        found.into_iter().map(|(_, number)| number).collect()
    }

    /// Ends everything; oldest first.
    pub fn take_all(&mut self) -> Vec<T> {
        let numbers = self.numbers(|_| true);
        numbers
            .into_iter()
            .filter_map(|number| self.remove(number))
            .collect()
    }

    /// Ends everything and forgets it.
    pub fn clear(&mut self) {
        self.slots.clear();
        self.free.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_late_answer_finds_nothing() {
        let mut table = InFlight::default();
        let first = table.insert("first");
        assert_eq!(table.remove(first), Some("first"));
        let second = table.insert("second");
        assert_eq!(second as u32, first as u32, "the place is used again");
        assert_eq!(table.get(first), None);
        assert_eq!(table.remove(first), None);
        assert_eq!(table.get(second), Some(&"second"));
        table.clear();
        let third = table.insert("third");
        assert_ne!(third, first, "numbers go on after everything was forgotten");
        assert_eq!((table.get(second), table.len()), (None, 1));
    }

    #[test]
    fn what_is_listed_is_found_after_any_number_of_things() {
        for begun in [ORDER_MASK, u32::MAX].map(u64::from) {
            let mut table = InFlight {
                begun: begun - 1,
                ..InFlight::default()
            };
            let given: Vec<u64> = (0..4).map(|n| table.insert(n)).collect();
            assert_eq!(table.numbers(|_| true), given);
            assert!(given.iter().all(|number| number >> 63 == 0));
            assert_eq!(table.take_all(), [0, 1, 2, 3]);
        }
    }

    #[test]
    fn listed_oldest_first() {
        let mut table = InFlight::default();
        let numbers: Vec<u64> = (0..4).map(|n| table.insert(n)).collect();
        table.remove(numbers[1]);
        table.remove(numbers[0]);
        table.insert(4);
        table.insert(5);
        let listed = table.numbers(|n| *n != 3);
        let listed: Vec<i32> = listed.iter().filter_map(|n| table.get(*n).copied()).collect();
        assert_eq!(listed, [2, 4, 5]);
        assert_eq!(table.take_all(), [2, 3, 4, 5]);
        assert!(table.is_empty() && table.values().next().is_none());
    }
}
