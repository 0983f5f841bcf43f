//! What became of a shard's layers: which are gone, and which are one with a later one.
//!
//! The log says it range by range: "layers from a to b are gone", "layers from a to b are called c". What is gone is gone
//! whatever else was said of it. What is called by several names has the highest of them, and what that one is called in
//! turn. So it does not matter in which order any of it is heard, or how often, and an entry that a wider one covers may
//! be forgotten.

use std::collections::BTreeSet;
use std::ops::RangeInclusive;

use types::LayerId;

use crate::bytes::{Reader, put_varint};

pub(crate) type Layers = RangeInclusive<LayerId>;

/// What one entry of the log says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Said {
    pub(crate) layers: Layers,
    /// What they are called, not below the last of them; `None` if they are gone.
    pub(crate) called: Option<LayerId>,
    /// Of the entry.
    pub(crate) birth: u64,
}

/// What follows from all that was said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Fates {
    said: Vec<Said>,
    /// What all of it comes to: ascending, without a gap in what a range is called, no two overlap.
    homes: Vec<Home>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Home {
    layers: Layers,
    /// Where they are found; `None` if they are gone.
    at: Option<LayerId>,
}

fn is_within(a: &Layers, b: &Layers) -> bool {
    b.contains(a.start()) && b.contains(a.end())
}

impl Fates {
    pub(crate) fn is_empty(&self) -> bool {
        self.said.is_empty()
    }

    /// The layer that a layer is a part of now: itself, mostly. `None` if it is gone.
    pub(crate) fn home(&self, layer: LayerId) -> Option<LayerId> {
        match self.part(layer) {
            Some(part) => part.at,
            None => Some(layer),
        }
    }

    pub(crate) fn is_gone(&self, layer: LayerId) -> bool {
        self.home(layer).is_none()
    }

    fn part(&self, layer: LayerId) -> Option<&Home> {
        let later = self.homes.partition_point(|home| *home.layers.start() <= layer);
        let part = &self.homes[later.checked_sub(1)?];
        part.layers.contains(&layer).then_some(part)
    }

    /// The numbers that a layer was made of, its own included: ascending, not touching.
    pub(crate) fn parts(&self, home: LayerId) -> Vec<Layers> {
        let parts = self.homes.iter().filter(|part| part.at == Some(home));
        join(
            parts.map(|part| part.layers.clone()).chain([home..=home]),
            |_, _| false,
        )
    }

    /// Whether an entry of this birth is still needed.
    pub(crate) fn says(&self, birth: u64) -> bool {
        self.said.iter().any(|said| said.birth == birth)
    }

    /// An entry says this. False if it says nothing new.
    pub(crate) fn say(&mut self, new: Said) -> bool {
        let covers = |said: &Said| {
            let is_same = match (said.called, new.called) {
                (None, _) => true,
                (Some(_), None) => false,
                (Some(called), Some(other)) => called == other || said.layers.contains(&other),
            };
            is_same && is_within(&new.layers, &said.layers)
        };
        if self.said.iter().any(covers) {
            return false;
        }
        self.said.retain(|said| {
            let is_same = match (new.called, said.called) {
                (None, _) => true,
                (Some(_), None) => false,
                (Some(called), Some(other)) => called == other || new.layers.contains(&other),
            };
            !(is_same && is_within(&said.layers, &new.layers))
        });
        let place = |said: &Said| (*said.layers.start(), said.called, said.birth);
        let at = self.said.partition_point(|said| place(said) < place(&new));
        self.said.insert(at, new);
        self.follow();
        true
    }

    /// What was said before this is of another life of the shard.
    pub(crate) fn forget_before(&mut self, birth: u64) {
        self.said.retain(|said| said.birth > birth);
        self.follow();
    }

    /// Draws the conclusions.
    fn follow(&mut self) {
        const GONE: u64 = u64::MAX;
        let number = |layer: &LayerId| u64::from(layer.0);
        let mut changes: Vec<(u64, bool, u64)> = Vec::with_capacity(2 * self.said.len());
        for said in &self.said {
            let called = said.called.as_ref().map_or(GONE, number);
            changes.push((number(said.layers.start()), true, called));
            changes.push((number(said.layers.end()) + 1, false, called));
        }
        changes.sort_unstable();
        // Stretches between two changes, with the last word on each.
        let mut stretches: Vec<(u64, u64, u64)> = Vec::new();
        let mut open: std::collections::BTreeMap<u64, usize> = std::collections::BTreeMap::new();
        let mut from = 0;
        for (at, begins, called) in changes {
            if let Some((last_word, _)) = open.last_key_value()
                && from < at
            {
                stretches.push((from, at - 1, *last_word));
            }
            from = at;
            let count = open.entry(called).or_default();
            if begins {
                *count += 1;
            } else {
                *count -= 1;
            }
            if *count == 0 {
                open.remove(&called);
            }
        }
        // A name is never below what it is the name of, so the highest are settled first.
        self.homes.clear();
        let layer = |number: u64| LayerId(number as u32);
        for (first, last, called) in stretches.into_iter().rev() {
            let layers = layer(first)..=layer(last);
            let at = match called {
                GONE => None,
                called if layers.contains(&layer(called)) => Some(layer(called)),
                called => {
                    let below = self
                        .homes
                        .partition_point(|home| *home.layers.start() > layer(called));
                    let part = self
                        .homes
                        .get(below)
                        .filter(|home| home.layers.contains(&layer(called)));
                    part.map_or(Some(layer(called)), |home| home.at)
                }
            };
            self.homes.push(Home { layers, at });
        }
        self.homes.reverse();
    }

    /// What is to be said for all of these to be gone, and what they are one with. Each range comes with what is gone next
    /// to it, so that one entry says it of all. Nothing of ranges that are gone.
    pub(crate) fn to_drop(&self, layers: &[Layers]) -> Vec<Layers> {
        let gone = self.said.iter().filter(|said| said.called.is_none());
        let known = gone.map(|said| said.layers.clone());
        let mut all = join(known.chain(self.whole(layers)), |_, _| false);
        all.retain(|range| !self.is_all(range, None));
        all
    }

    /// What is to be said for these to be one: the ranges, and what they are called. Nothing if they are. If the name is
    /// gone, they are to be gone.
    pub(crate) fn to_merge(&self, layers: &[Layers], called: LayerId) -> (Vec<Layers>, Option<LayerId>) {
        if self.is_gone(called) {
            return (self.to_drop(layers), None);
        }
        let whole = self.whole(layers);
        let names = whole.iter().filter_map(|range| self.home(*range.end()));
        let name = names.chain(self.home(called)).max().expect("one at least");
        if layers
            .iter()
            .chain([&(called..=called)])
            .all(|range| self.is_all(range, Some(name)))
        {
            return (Vec::new(), Some(name));
        }
        // Over what is gone one entry reaches.
        let mut all = join(whole, |after, before| {
            let between = LayerId(after.0 + 1)..=LayerId(before.0 - 1);
            self.is_all(&between, None)
        });
        all.retain(|range| !self.is_all(range, Some(name)));
        (all, Some(name))
    }

    /// These layers, and all that any of them is one with.
    fn whole(&self, layers: &[Layers]) -> Vec<Layers> {
        let touches = |a: &Layers, b: &Layers| a.start() <= b.end() && b.start() <= a.end();
        let is_named = |layer: LayerId| layers.iter().any(|range| range.contains(&layer));
        let touched = self
            .homes
            .iter()
            .filter(|home| layers.iter().any(|range| touches(range, &home.layers)));
        let homes: BTreeSet<LayerId> = touched.filter_map(|home| home.at).collect();
        let is_meant = |home: &&Home| home.at.is_some_and(|at| homes.contains(&at) || is_named(at));
        let parts = self.homes.iter().filter(is_meant).map(|home| home.layers.clone());
        let names = homes.iter().map(|home| *home..=*home);
        join(layers.iter().cloned().chain(parts).chain(names), |_, _| false)
    }

    /// Whether every layer of a range is found there, or is gone.
    fn is_all(&self, layers: &Layers, at: Option<LayerId>) -> bool {
        let mut next = u64::from(layers.start().0);
        let end = u64::from(layers.end().0);
        while next <= end {
            let layer = LayerId(next as u32);
            match self.part(layer) {
                Some(part) if part.at.is_none() || part.at == at => next = u64::from(part.layers.end().0) + 1,
                None if at == Some(layer) => next += 1,
                _ => return false,
            }
        }
        true
    }

    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        put_varint(out, self.said.len() as u64);
        for said in &self.said {
            put_varint(out, u64::from(said.layers.start().0));
            put_varint(out, u64::from(said.layers.end().0));
            // Zero is nobody's name but that of layer 0 by itself, of which nothing is to be said.
            put_varint(out, said.called.map_or(0, |called| u64::from(called.0)));
            put_varint(out, said.birth);
        }
    }

    pub(crate) fn decode(fields: &mut Reader<'_>) -> Option<Fates> {
        let mut fates = Fates::default();
        for _ in 0..fields.varint()? {
            let mut layer = || fields.varint().and_then(|layer| u32::try_from(layer).ok());
            let layers = LayerId(layer()?)..=LayerId(layer()?);
            let called = Some(LayerId(layer()?)).filter(|called| called.0 > 0);
            let birth = fields.varint()?;
            if layers.is_empty() || called.is_some_and(|called| called < *layers.end()) {
                return None;
            }
            fates.said.push(Said {
                layers,
                called,
                birth,
            });
        }
        fates.follow();
        Some(fates)
    }
}

/// Sorted, and those that touch as one; also those of which `reaches` says so, told the last of one and the first of the next.
fn join(layers: impl IntoIterator<Item = Layers>, reaches: impl Fn(LayerId, LayerId) -> bool) -> Vec<Layers> {
    let mut all: Vec<Layers> = layers.into_iter().collect();
    all.sort_unstable_by_key(|range| (*range.start(), *range.end()));
    let mut joined: Vec<Layers> = Vec::new();
    for range in all {
        let last = joined.last_mut().filter(|last| {
            range.start().0 <= last.end().0.saturating_add(1) || reaches(*last.end(), *range.start())
        });
        match last {
            Some(last) => *last = *last.start()..=*last.end().max(range.end()),
            None => joined.push(range),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LAYERS: u32 = 24;

    fn layers(first: u32, last: u32) -> Layers {
        LayerId(first)..=LayerId(last)
    }

    /// By the words of the rule: for each layer the last word, then the last word on that.
    fn plainly(said: &[Said], layer: LayerId) -> Option<LayerId> {
        let of_it: Vec<&Said> = said.iter().filter(|said| said.layers.contains(&layer)).collect();
        if of_it.iter().any(|said| said.called.is_none()) {
            return None;
        }
        match of_it.iter().filter_map(|said| said.called).max() {
            Some(called) if called != layer => plainly(said, called),
            _ => Some(layer),
        }
    }

    fn anything() -> impl Strategy<Value = Said> {
        (0..LAYERS, 0..4u32, 0..6u32, any::<bool>(), any::<u64>()).prop_map(
            |(first, more, up, is_gone, birth)| {
                let last = first + more;
                let called = (!is_gone || up > 4).then_some(LayerId((last + up).max(1)));
                Said {
                    layers: layers(first, last),
                    called,
                    birth,
                }
            },
        )
    }

    /// Says what is to be said for something to be so; what the layers are called then.
    fn ask(fates: &mut Fates, asked: &Said) -> Option<LayerId> {
        let (ranges, called) = match asked.called {
            None => (fates.to_drop(std::slice::from_ref(&asked.layers)), None),
            Some(called) => fates.to_merge(&[asked.layers.clone(), called..=called], called),
        };
        for (birth, layers) in (1..).zip(ranges) {
            assert!(
                fates.say(Said {
                    layers,
                    called,
                    birth
                }),
                "nothing needless is said"
            );
        }
        called
    }

    #[test]
    fn a_name_is_followed_and_what_is_gone_takes_its_parts_along() {
        let mut fates = Fates::default();
        let say = |fates: &mut Fates, (ranges, called): (Vec<Layers>, Option<LayerId>)| {
            for layers in ranges {
                assert!(fates.say(Said {
                    layers,
                    called,
                    birth: 1
                }));
            }
        };
        let two = fates.to_merge(&[layers(2, 3)], LayerId(3));
        assert_eq!(two, (vec![layers(2, 3)], Some(LayerId(3))));
        say(&mut fates, two);
        // Layers 4 to 6 are another branch.
        let three = fates.to_merge(&[layers(3, 3), layers(7, 7)], LayerId(7));
        assert_eq!(three, (vec![layers(2, 3)], Some(LayerId(7))));
        say(&mut fates, three);
        assert_eq!(fates.said.len(), 1, "{:?}", fates.said);
        assert_eq!(fates.parts(LayerId(7)), [layers(2, 3), layers(7, 7)]);
        assert_eq!(fates.to_merge(&[layers(2, 3)], LayerId(3)).0, []);
        assert_eq!(fates.home(LayerId(5)), Some(LayerId(5)));
        let gone = fates.to_drop(&[layers(4, 6)]);
        say(&mut fates, (gone, None));
        // Over what is gone one entry reaches.
        let four = fates.to_merge(&[layers(7, 7), layers(9, 9)], LayerId(9));
        assert_eq!(four, (vec![layers(2, 7)], Some(LayerId(9))));
        say(&mut fates, four);
        assert_eq!(
            (fates.home(LayerId(2)), fates.home(LayerId(5))),
            (Some(LayerId(9)), None)
        );
        assert_eq!(fates.to_drop(&[layers(9, 9)]), [layers(2, 7), layers(9, 9)]);
        let gone = fates.to_drop(&[layers(9, 9)]);
        say(&mut fates, (gone, None));
        assert!(fates.to_drop(&[layers(2, 3)]).is_empty());
        assert_eq!(fates.said.len(), 2, "{:?}", fates.said);
    }

    proptest! {
        #[test]
        fn the_order_of_what_is_said_does_not_matter(list in prop::collection::vec(anything(), 0..12), seed: u64) {
            let mut fates = Fates::default();
            let mut others = Fates::default();
            for said in &list {
                fates.say(said.clone());
            }
            let mut shuffled = list.clone();
            shuffled.sort_by_key(|said| said.birth.wrapping_mul(seed | 1));
            for said in shuffled.iter().chain(&list) {
                others.say(said.clone());
            }
            for layer in (0..LAYERS + 12).map(LayerId) {
                prop_assert_eq!(fates.home(layer), plainly(&list, layer), "{} of {:?}", layer, &list);
                prop_assert_eq!(others.home(layer), plainly(&list, layer), "{} of {:?}", layer, &list);
            }
            let mut bytes = Vec::new();
            fates.encode(&mut bytes);
            prop_assert_eq!(Fates::decode(&mut Reader::new(&bytes)), Some(fates));
        }

        #[test]
        fn what_is_asked_for_is_what_comes_of_it(list in prop::collection::vec(anything(), 0..6), asked in anything()) {
            let mut fates = Fates::default();
            for said in &list {
                ask(&mut fates, said);
            }
            let before = fates.clone();
            let same = |a: LayerId, b: LayerId| before.home(a).is_some() && before.home(a) == before.home(b);
            let called = ask(&mut fates, &asked);
            let asked_of = |layer: LayerId| asked.layers.contains(&layer) || asked.called == Some(layer);
            for layer in (0..LAYERS + 12).map(LayerId) {
                let is_meant = (0..LAYERS + 12).map(LayerId).any(|other| asked_of(other) && (other == layer || same(layer, other)));
                let wanted = match before.home(layer) {
                    Some(_) if is_meant => called,
                    home => home,
                };
                prop_assert_eq!(fates.home(layer), wanted, "{} of {:?} after {:?}", layer, &list, &asked);
            }
        }
    }
}
