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

/// A start that does not get far: the process is killed, or power is lost if it may be, at some write or sync of the
/// recovery; among those are the two superblocks and the header of the first segment.
pub(crate) fn fail_to_recover(
    rng: &mut Rng,
    disk: &mut SimDisk,
    kv: &mut SimKv,
    known_opens: u64,
    may_lose_power: bool,
) {
    disk.set_cut_after(Some(rng.below(12) as u32));
    let end = store::recover_known(disk, kv, rng.draw(), known_opens).map(|_| ());
    tell(|| format!("  recovery, cut short: {end:?}"));
    if may_lose_power && rng.chance(1, 2) {
        disk.lose_power();
    } else {
        disk.kill(crate::LateWrites::Never);
    }
    disk.set_cut_after(None);
}

/// Somebody writes an old copy of both superblocks over those that are there.
pub(crate) fn restore_superblocks(disk: &mut SimDisk, old: &[[u8; 4096]; 2]) {
    for (offset, block) in store::SUPERBLOCK_OFFSETS.into_iter().zip(old) {
        edge::BlockFile::write_at(disk, offset, block).expect("a healthy disk");
    }
    edge::BlockFile::sync(disk).expect("a healthy disk");
}

/// Both superblocks as they are.
pub(crate) fn copy_superblocks(disk: &SimDisk) -> [[u8; 4096]; 2] {
    store::SUPERBLOCK_OFFSETS.map(|offset| {
        let mut block = [0; 4096];
        edge::BlockFile::read_at(disk, offset, &mut block).expect("a healthy disk");
        block
    })
}

/// Recovers what a healthy disk holds that was opened `known_opens` times at least, for all its owner knows. Damage to content is in the report; that recovery refuses altogether
/// is a broken promise.
pub(crate) fn recover(
    rng: &mut Rng,
    disk: &mut SimDisk,
    kv: &mut SimKv,
    settings: StoreSettings,
    known_opens: u64,
) -> (Store<HeapBlock>, RecoveryReport) {
    let recovered = store::recover_known(disk, kv, rng.draw(), known_opens);
    let (recovered, report) = recovered.unwrap_or_else(|error| panic!("recovery failed: {error}"));
    tell(|| format!("  recovery: {report:?}"));
    (Store::open(recovered, settings), report)
}
