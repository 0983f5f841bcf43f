//! What a reader sees: ranges of layers, the newest first.

use std::fmt;

use types::{LayerId, VdiId};

/// All layers of a VDI from `lowest` to `highest` that there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LineageStep {
    /// Of which VDI.
    pub vdi: VdiId,
    /// The oldest.
    pub lowest: LayerId,
    /// The newest.
    pub highest: LayerId,
}

/// The newest first; within one VDI each step is below the one before.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Lineage(Vec<LineageStep>);

impl Lineage {
    /// Most steps: a lineage travels with each read.
    pub const STEPS_MAX: usize = 128;

    pub(crate) fn new(steps: &[LineageStep]) -> Result<Lineage, String> {
        if steps.is_empty() || steps.len() > Lineage::STEPS_MAX {
            return Err(format!("{} steps", steps.len()));
        }
        Ok(Lineage(steps.to_vec()))
    }

    /// The newest first.
    #[must_use]
    pub fn steps(&self) -> &[LineageStep] {
        &self.0
    }
}

impl fmt::Display for Lineage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, step) in self.0.iter().enumerate() {
            let comma = if at > 0 { ", " } else { "" };
            write!(f, "{comma}{}:{}..={}", step.vdi, step.lowest, step.highest)?;
        }
        Ok(())
    }
}
