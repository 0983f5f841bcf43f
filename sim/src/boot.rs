//! Formatting and opening a simulated disk: what a daemon does at start.

use store::{FormatParams, RecoveryReport, Store, StoreSettings};
use types::{DiskId, HeapBlock, PoolId};

use crate::trace::tell;
use crate::{Rng, SimDisk, SimKv};

/// Gives the disk to a pool.
pub(crate) fn format(rng: &mut Rng, disk: &mut SimDisk, kv: &mut SimKv, id: DiskId, segment_bytes: u64) {
    let params = FormatParams {
        segment_bytes,
        ..FormatParams::new(id, PoolId(1), rng.draw())
    };
    store::format(disk, kv, params).expect("a healthy disk can be formatted");
}

/// Recovers what a healthy disk holds. Damage to content is in the report; that recovery refuses altogether
/// is a broken promise.
pub(crate) fn recover(
    rng: &mut Rng,
    disk: &mut SimDisk,
    kv: &mut SimKv,
    settings: StoreSettings,
) -> (Store<HeapBlock>, RecoveryReport) {
    let recovered = store::recover(disk, kv, rng.draw());
    let (recovered, report) = recovered.unwrap_or_else(|error| panic!("recovery failed: {error}"));
    tell(|| format!("  recovery: {report:?}"));
    (Store::open(recovered, settings), report)
}
