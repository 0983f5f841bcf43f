//! Why an operation on the tree was not done, and what to do about it.

use types::{Lineage, VdiId};

use super::SNAPSHOTS_MAX;
use crate::name::{SnapshotName, VdiName};

/// Clones that a refusal names; the others are counted.
const NAMED_MAX: usize = 8;

/// An operation that was not done; nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No VDI has this id.
    #[error("there is no VDI {0}")]
    NoVdi(VdiId),
    /// The VDI has no snapshot of this name.
    #[error("VDI '{vdi}' has no snapshot '{snapshot}'")]
    NoSnapshot {
        /// Whose.
        vdi: VdiName,
        /// Which.
        snapshot: SnapshotName,
    },
    /// The VDI has a snapshot of this name.
    #[error("VDI '{vdi}' has a snapshot '{snapshot}' already")]
    NameTaken {
        /// Whose.
        vdi: VdiName,
        /// Which.
        snapshot: SnapshotName,
    },
    /// Somebody said that it is not to be deleted.
    #[error("snapshot '{vdi}@{snapshot}' is protected")]
    Protected {
        /// Whose.
        vdi: VdiName,
        /// Which.
        snapshot: SnapshotName,
    },
    /// Clones began with it and read it.
    #[error(
        "{} is needed by {}",
        match .snapshot {
            Some(snapshot) => format!("snapshot '{vdi}@{snapshot}'"),
            None => format!("VDI '{vdi}'"),
        },
        list(.clones)
    )]
    ClonesNeed {
        /// Whose.
        vdi: VdiName,
        /// Which; absent: the VDI with all of its snapshots.
        snapshot: Option<SnapshotName>,
        /// All of them.
        clones: Vec<VdiName>,
    },
    /// The lineage has [`Lineage::STEPS_MAX`] steps.
    #[error(
        "what VDI '{vdi}' reads comes from {} places already, one for each clone and each roll-back with a \
         snapshot between: more are not supported",
        Lineage::STEPS_MAX
    )]
    TooDeep {
        /// Which.
        vdi: VdiName,
        /// It has ancestors that it could do without.
        is_clone: bool,
    },
    /// It has no ancestors, or none any more.
    #[error("VDI '{0}' is no clone: it needs no other VDI")]
    NotAClone(VdiName),
    /// [`SNAPSHOTS_MAX`].
    #[error("VDI '{0}' has {SNAPSHOTS_MAX} snapshots, more are not supported")]
    TooMany(VdiName),
    /// 2^32 snapshots were taken.
    #[error("VDI '{0}' was snapshotted and rolled back 4294967295 times, more is not supported")]
    NumbersExhausted(VdiName),
}

impl Refusal {
    /// What to do about it; may be empty.
    #[must_use]
    pub fn way_out(&self) -> String {
        match self {
            Refusal::NoVdi(_) | Refusal::NotAClone(_) => String::new(),
            Refusal::NoSnapshot { vdi, .. } => format!("see `weft snapshot list {vdi}`"),
            Refusal::NameTaken { .. } => "choose another name, or delete that one first".to_owned(),
            Refusal::Protected { vdi, snapshot } => {
                format!("if it may go: `weft snapshot protect {vdi}@{snapshot} --off`")
            }
            Refusal::ClonesNeed { clones, .. } => {
                let first = clones.first().map_or("CLONE", VdiName::as_str);
                format!("delete the clones, or make them whole: `weft clone flatten {first}`")
            }
            Refusal::TooDeep { vdi, is_clone: true } => {
                format!(
                    "make it whole first: `weft clone flatten {vdi}`; or delete snapshots it was rolled back to"
                )
            }
            Refusal::TooDeep { vdi, .. } => {
                format!("delete some of the snapshots that '{vdi}' was rolled back to")
            }
            Refusal::TooMany(_) => "delete some, or let a schedule keep fewer".to_owned(),
            Refusal::NumbersExhausted(_) => "take a clone and go on with that".to_owned(),
        }
    }
}

fn list(clones: &[VdiName]) -> String {
    let named: Vec<&str> = clones.iter().take(NAMED_MAX).map(VdiName::as_str).collect();
    let text = match clones.len() {
        1 => format!("the clone {}", named[0]),
        _ => format!("the clones {}", named.join(", ")),
    };
    match clones.len().saturating_sub(NAMED_MAX) {
        0 => text,
        more => format!("{text} and {more} more"),
    }
}
