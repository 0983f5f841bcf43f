//! Which layers a reader sees, and in which order.
//!
//! The layers of a VDI are numbered by a counter that never goes back, and a layer begins where an older one of its VDI
//! (or, for a clone's first, of its parent) ended. So all that a reader sees are a few ranges of numbers, the newest
//! first:
//!
//! ```text
//!  a VDI with ten thousand snapshots   [v 0..=10000]
//!  the same, rolled back to its fifth  [v 10001..=10001, v 0..=4]
//!  a clone of that                     [w 0..=0, v 10001..=10001, v 0..=4]
//! ```
//! A block holds what the first of these layers says that says anything of it.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use crate::{LayerId, VdiId};

/// Layers of one VDI that follow each other: the highest is the newest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LineageStep {
    /// Whose.
    pub vdi: VdiId,
    /// The oldest of them.
    pub lowest: LayerId,
    /// The newest of them, not below `lowest`.
    pub highest: LayerId,
}

impl LineageStep {
    /// One layer by itself.
    #[must_use]
    pub fn layer(vdi: VdiId, layer: LayerId) -> LineageStep {
        LineageStep {
            vdi,
            lowest: layer,
            highest: layer,
        }
    }

    /// Whether a layer is one of these.
    #[inline]
    #[must_use]
    pub fn contains(&self, vdi: VdiId, layer: LayerId) -> bool {
        self.vdi == vdi && (self.lowest..=self.highest).contains(&layer)
    }
}

impl fmt::Display for LineageStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}..={}", self.vdi, self.lowest, self.highest)
    }
}

/// What a reader sees: at least one step and at most [`Lineage::STEPS_MAX`], the newest first. Cheap to clone: the usual
/// single step is kept in place, more of them are shared.
#[derive(Clone)]
pub struct Lineage(Form);

#[derive(Clone)]
enum Form {
    One(LineageStep),
    Many(Arc<[LineageStep]>),
}

/// Why steps are no lineage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LineageError {
    /// There is none.
    #[error("a lineage of no steps")]
    Empty,
    /// More than anybody may make the store walk through.
    #[error("a lineage of more than {} steps", Lineage::STEPS_MAX)]
    TooLong,
    /// A range whose lowest layer is above its highest.
    #[error("step {at} of a lineage goes from layer {lowest} down to {highest}")]
    Backwards {
        /// Its place, from 0.
        at: usize,
        /// What it says is the lowest.
        lowest: LayerId,
        /// What it says is the highest.
        highest: LayerId,
    },
    /// A step that is not wholly older than an earlier one of the same VDI: a layer twice, or a later one below an earlier.
    #[error("step {at} of a lineage is not older than step {newer}, of the same VDI")]
    Disorder {
        /// Its place, from 0.
        at: usize,
        /// The place of the other.
        newer: usize,
    },
}

impl Lineage {
    /// The most steps. Each roll-back and each clone adds one; a tree deeper than that is flattened first.
    pub const STEPS_MAX: usize = 128;

    /// Checks steps that came from elsewhere.
    ///
    /// # Errors
    /// See [`LineageError`].
    pub fn new(steps: &[LineageStep]) -> Result<Lineage, LineageError> {
        if steps.len() > Lineage::STEPS_MAX {
            return Err(LineageError::TooLong);
        }
        for (at, step) in steps.iter().enumerate() {
            if step.lowest > step.highest {
                return Err(LineageError::Backwards {
                    at,
                    lowest: step.lowest,
                    highest: step.highest,
                });
            }
            let is_disorder = |other: &LineageStep| other.vdi == step.vdi && step.highest >= other.lowest;
            if let Some(newer) = steps[..at].iter().position(is_disorder) {
                return Err(LineageError::Disorder { at, newer });
            }
        }
        match steps {
            [] => Err(LineageError::Empty),
            [step] => Ok(Lineage(Form::One(*step))),
            steps => Ok(Lineage(Form::Many(steps.into()))),
        }
    }

    /// One layer and nothing below it.
    #[inline]
    #[must_use]
    pub fn of_layer(vdi: VdiId, layer: LayerId) -> Lineage {
        Lineage(Form::One(LineageStep::layer(vdi, layer)))
    }

    /// The layers of one VDI from `lowest` to `highest`.
    ///
    /// # Panics
    /// When they are the wrong way round.
    #[must_use]
    pub fn of_layers(vdi: VdiId, lowest: LayerId, highest: LayerId) -> Lineage {
        assert!(lowest <= highest, "layers from {lowest} to {highest}");
        Lineage(Form::One(LineageStep { vdi, lowest, highest }))
    }

    /// The newest first; never empty.
    #[inline]
    #[must_use]
    pub fn steps(&self) -> &[LineageStep] {
        match &self.0 {
            Form::One(step) => std::slice::from_ref(step),
            Form::Many(steps) => steps,
        }
    }

    /// The newest layer of all, and whose it is.
    #[inline]
    #[must_use]
    pub fn newest(&self) -> (VdiId, LayerId) {
        let step = self.steps()[0];
        (step.vdi, step.highest)
    }

    /// The layer, where it is a single one.
    #[inline]
    #[must_use]
    pub fn only_layer(&self) -> Option<(VdiId, LayerId)> {
        match self.0 {
            Form::One(step) if step.lowest == step.highest => Some((step.vdi, step.lowest)),
            _ => None,
        }
    }

    /// The place of the step that has this layer, if one has.
    #[must_use]
    pub fn step_of(&self, vdi: VdiId, layer: LayerId) -> Option<usize> {
        self.steps().iter().position(|step| step.contains(vdi, layer))
    }
}

impl PartialEq for Lineage {
    fn eq(&self, other: &Lineage) -> bool {
        self.steps() == other.steps()
    }
}

impl Eq for Lineage {}

impl Hash for Lineage {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.steps().hash(state);
    }
}

impl fmt::Debug for Lineage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Lineage({self})")
    }
}

impl fmt::Display for Lineage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, step) in self.steps().iter().enumerate() {
            write!(f, "{}{step}", if at > 0 { ", " } else { "" })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn step(vdi: u32, lowest: u32, highest: u32) -> LineageStep {
        LineageStep {
            vdi: VdiId(vdi),
            lowest: LayerId(lowest),
            highest: LayerId(highest),
        }
    }

    #[test]
    fn what_is_a_lineage_and_what_is_not() {
        let clone_of_one_rolled_back = [step(2, 1, 1), step(2, 0, 0), step(1, 9, 9), step(1, 0, 4)];
        let lineage = Lineage::new(&clone_of_one_rolled_back).expect("in order");
        assert_eq!(lineage.steps(), clone_of_one_rolled_back);
        assert_eq!(lineage.newest(), (VdiId(2), LayerId(1)));
        assert_eq!(lineage.to_string(), "2:1..=1, 2:0..=0, 1:9..=9, 1:0..=4");
        assert_eq!(lineage.step_of(VdiId(1), LayerId(3)), Some(3));
        assert_eq!(lineage.step_of(VdiId(1), LayerId(5)), None);
        assert_eq!(lineage.step_of(VdiId(3), LayerId(0)), None);
        assert_eq!(lineage.only_layer(), None);

        let refused = |steps: &[LineageStep]| Lineage::new(steps).expect_err("no lineage");
        assert_eq!(refused(&[]), LineageError::Empty);
        let backwards = LineageError::Backwards {
            at: 1,
            lowest: LayerId(3),
            highest: LayerId(2),
        };
        assert_eq!(refused(&[step(2, 1, 1), step(1, 3, 2)]), backwards);
        let disorder = |newer, at| LineageError::Disorder { at, newer };
        assert_eq!(refused(&[step(1, 4, 9), step(1, 0, 4)]), disorder(0, 1));
        assert_eq!(refused(&[step(1, 0, 4), step(1, 5, 9)]), disorder(0, 1));
        assert_eq!(
            refused(&[step(1, 5, 9), step(2, 0, 0), step(1, 7, 7)]),
            disorder(0, 2)
        );
        let descending = |count: u32| {
            (0..count)
                .rev()
                .map(|layer| step(1, layer, layer))
                .collect::<Vec<_>>()
        };
        assert!(Lineage::new(&descending(128)).is_ok());
        assert_eq!(refused(&descending(129)), LineageError::TooLong);
    }

    #[test]
    fn one_layer_is_itself() {
        let lineage = Lineage::of_layer(VdiId(7), LayerId(3));
        assert_eq!(lineage.only_layer(), Some((VdiId(7), LayerId(3))));
        assert_eq!(Lineage::new(&[step(7, 3, 3)]), Ok(lineage));
        assert_eq!(
            Lineage::new(&[step(7, 2, 3)]).expect("a range").only_layer(),
            None
        );
    }

    proptest! {
        /// Whatever is taken has every layer once, and those of one VDI from the newest to the oldest.
        #[test]
        fn no_layer_is_there_twice(steps in prop::collection::vec((0u32..3, 0u32..12, 0u32..4), 0..7)) {
            let steps: Vec<LineageStep> =
                steps.iter().map(|(vdi, lowest, more)| step(*vdi, *lowest, lowest + more)).collect();
            let layers = |vdi: u32| -> Vec<u32> {
                let own = steps.iter().filter(|step| step.vdi.0 == vdi);
                own.flat_map(|step| (step.lowest.0..=step.highest.0).rev()).collect()
            };
            let is_ordered = (0..3).all(|vdi| layers(vdi).windows(2).all(|pair| pair[0] > pair[1]));
            let lineage = Lineage::new(&steps);
            prop_assert_eq!(lineage.is_ok(), is_ordered && !steps.is_empty());
            if let Ok(lineage) = lineage {
                prop_assert_eq!(lineage.steps(), steps.as_slice());
                prop_assert_eq!(&lineage.clone(), &lineage);
            }
        }
    }
}
