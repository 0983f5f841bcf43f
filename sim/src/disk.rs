//! A disk that does everything a disk may do, and, within a budget, what it should not.
//!
//! ```text
//!  submit ──▶ in flight ──poll, any order──▶ volatile cache ──sync──▶ plates
//!                 │ kill: happens, is torn, comes late or never    │ power loss: any subset of sectors
//! ```
//! The same content is reachable in blocking form ([`BlockFile`]) for formatting and recovery; those writes
//! pass through the same cache. A blocking call reads and writes at once, but late writes of a killed process
//! may slip in between two of them.

use std::cell::RefCell;
use std::collections::BTreeSet;

use edge::{BlockFile, Completion, Disk, DiskError, DiskOp, DiskOutcome, IoId};
use types::{BLOCK_BYTES, HeapBlock, Payload};

use crate::Rng;
use crate::medium::{Medium, SECTOR_BYTES};

/// How often an operation goes wrong, each in parts per million of operations of its kind, and how many
/// times in all. A world asks for no more than what the code under test promises to survive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// Faults still to come, of all kinds together; none happen at zero.
    pub budget: u32,
    /// Reads that answer EIO.
    pub read_error_ppm: u32,
    /// Writes that answer EIO, with any part of them done.
    pub write_error_ppm: u32,
    /// Syncs that answer EIO and lose any part of what they were to cover; later ones say all is well.
    pub failed_sync_ppm: u32,
    /// Writes that are acknowledged and never done.
    pub lost_write_ppm: u32,
    /// Writes that are acknowledged and land somewhere else.
    pub misdirected_write_ppm: u32,
    /// Syncs that say all is well and make nothing durable.
    pub lying_sync_ppm: u32,
}

/// What silently went wrong with the content of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Damage {
    /// Bits of the sector at this offset changed by themselves.
    Rot {
        /// First byte of the sector.
        offset: u64,
    },
    /// An acknowledged write of this range was never done.
    Lost {
        /// First byte.
        offset: u64,
        /// Its length.
        bytes: u64,
    },
    /// A sync that was acknowledged was not done: harmless unless power is lost before the next.
    NotSynced,
    /// An acknowledged write of `bytes` for `offset` was done at `landed` instead.
    Misdirected {
        /// Where it should have gone.
        offset: u64,
        /// Where it went.
        landed: u64,
        /// Its length.
        bytes: u64,
    },
}

/// What becomes of the operations a killed process had under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LateWrites {
    /// Each happens before the process is gone, in whole or in part, or never: what a lock on the device that
    /// outlives the process' last I/O guarantees.
    Never,
    /// Some happen only after the successor has begun to read and write.
    Allowed,
}

/// A simulated disk; see the module's head. A clone is what a copy of the whole device would be, were it idle.
#[derive(Clone, Debug)]
pub struct SimDisk {
    capacity: u64,
    state: RefCell<State>,
}

#[derive(Clone, Debug)]
struct State {
    rng: Rng,
    medium: Medium,
    under_way: Vec<UnderWay>,
    ids: BTreeSet<IoId>,
    /// Blocks last written as the data of a batch, not as its header: where rot hits content only.
    data: BTreeSet<u64>,
    late: Vec<(u64, Vec<u8>)>,
    faults: Faults,
    damages: Vec<Damage>,
    is_dead: bool,
    /// Blocking writes and syncs until power is cut in the midst of one.
    cut_after: Option<u32>,
    /// It was cut.
    is_cut: bool,
    /// One in this many polls completes a given operation.
    slowness: u64,
}

#[derive(Clone, Debug)]
struct UnderWay {
    id: IoId,
    operation: DiskOp<HeapBlock>,
    /// What a sync covers: everything the medium had when it was submitted.
    mark: u64,
}

impl SimDisk {
    /// An empty disk of `capacity` bytes whose whims follow `seed`.
    #[must_use]
    pub fn new(capacity: u64, seed: u64) -> SimDisk {
        assert!(capacity.is_multiple_of(BLOCK_BYTES), "{capacity} B of blocks");
        SimDisk {
            capacity,
            state: RefCell::new(State {
                rng: Rng::new(seed),
                medium: Medium::default(),
                under_way: Vec::new(),
                ids: BTreeSet::new(),
                data: BTreeSet::new(),
                late: Vec::new(),
                faults: Faults::default(),
                damages: Vec::new(),
                is_dead: false,
                cut_after: None,
                is_cut: false,
                slowness: 2,
            }),
        }
    }

    /// From now on things go wrong like this.
    pub fn set_faults(&mut self, faults: Faults) {
        self.state.get_mut().faults = faults;
    }

    /// A dead disk answers every operation with EIO and keeps its content for when it lives again.
    pub fn set_dead(&mut self, is_dead: bool) {
        self.state.get_mut().is_dead = is_dead;
    }

    /// Power is cut in the midst of the blocking write or sync after `operations` more: it is torn, and it and
    /// everything after it fails until the disk [loses power](SimDisk::lose_power) or is told otherwise.
    pub fn set_cut_after(&mut self, operations: Option<u32>) {
        let state = self.state.get_mut();
        state.cut_after = operations;
        state.is_cut = false;
    }

    /// One poll in `slowness` completes a given operation; 1 completes all at once.
    pub fn set_slowness(&mut self, slowness: u64) {
        self.state.get_mut().slowness = slowness.max(1);
    }

    /// Operations submitted and not completed.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.state.borrow().under_way.len()
    }

    /// Sectors that power loss would endanger now.
    #[must_use]
    pub fn unsynced_sectors(&self) -> usize {
        self.state.borrow().medium.unsynced_sectors()
    }

    /// Bytes of memory-backed content, however large the disk says it is.
    #[must_use]
    pub fn written_bytes(&self) -> u64 {
        self.state.borrow().medium.chunk_count() as u64 * BLOCK_BYTES
    }

    /// Silent damage done so far.
    #[must_use]
    pub fn damages(&self) -> Vec<Damage> {
        self.state.borrow().damages.clone()
    }

    /// Power is lost, and comes back: operations under way are torn anywhere, and what the cache held survives
    /// by chance, sector by sector.
    pub fn lose_power(&mut self) {
        let state = self.state.get_mut();
        state.late.clear();
        state.cut_after = None;
        state.is_cut = false;
        state.ids.clear();
        let mut under_way = std::mem::take(&mut state.under_way);
        state.rng.shuffle(&mut under_way);
        for one in under_way {
            if let DiskOp::Write { offset, header, data } = &one.operation {
                let bytes = flat(header, data);
                let kept_of_8 = state.rng.pick(&[0, 4, 8]);
                let rng = &mut state.rng;
                state.medium.write(*offset, &bytes, |_| rng.chance(kept_of_8, 8));
            }
        }
        state.medium.lose_power(&mut state.rng);
    }

    /// The process that drives the disk dies; the device does not notice. Each write under way happens, happens
    /// in part (whole blocks), never happens or, if allowed, happens later.
    pub fn kill(&mut self, late: LateWrites) {
        let state = self.state.get_mut();
        state.ids.clear();
        let mut under_way = std::mem::take(&mut state.under_way);
        state.rng.shuffle(&mut under_way);
        for one in under_way {
            let DiskOp::Write { offset, header, data } = &one.operation else {
                continue;
            };
            let bytes = flat(header, data);
            match state.rng.below(8) {
                0..=2 => state.medium.write(*offset, &bytes, |_| true),
                3 => {
                    let blocks = state.rng.draw();
                    state
                        .medium
                        .write(*offset, &bytes, |i| blocks >> (i / 8 % 64) & 1 == 1);
                }
                4..=5 if late == LateWrites::Allowed => state.late.push((*offset, bytes)),
                _ => {}
            }
        }
    }

    /// Flips a bit of the sector at `offset` on the plates.
    pub fn rot(&mut self, offset: u64) {
        assert!(offset < self.capacity, "rot at {offset} of {}", self.capacity);
        let state = self.state.get_mut();
        let offset = offset - offset % SECTOR_BYTES;
        let bit = state.rng.below(SECTOR_BYTES * 8);
        state
            .medium
            .damage(offset, |sector| sector[(bit / 8) as usize] ^= 1 << (bit % 8));
        state.damages.push(Damage::Rot { offset });
    }

    /// Fills `bytes` from `offset` on with noise: another program wrote over the disk.
    pub fn scribble(&mut self, offset: u64, bytes: u64) {
        assert!(offset + bytes <= self.capacity, "scribble past the end");
        let state = self.state.get_mut();
        let mut at = offset - offset % SECTOR_BYTES;
        while at < offset + bytes {
            let noise = state.rng.draw();
            state.medium.damage(at, |sector| {
                let mut rng = Rng::new(noise);
                for word in sector.chunks_mut(8) {
                    word.copy_from_slice(&rng.draw().to_le_bytes());
                }
            });
            state.damages.push(Damage::Rot { offset: at });
            at += SECTOR_BYTES;
        }
    }

    /// Offsets of the 4 KiB blocks that were ever written, for choosing where damage is worth doing.
    #[must_use]
    pub fn written_blocks(&self) -> Vec<u64> {
        self.state.borrow().medium.written_chunks().collect()
    }

    /// Offsets of the blocks that hold content of the log: neither headers nor what was written in blocking form.
    #[must_use]
    pub fn data_blocks(&self) -> Vec<u64> {
        self.state.borrow().data.iter().copied().collect()
    }

    /// Another disk in the same slot: no content, no operations, no faults.
    pub fn replace(&mut self) {
        let seed = self.state.get_mut().rng.draw();
        *self = SimDisk::new(self.capacity, seed);
    }

    fn assert_inside(&self, offset: u64, bytes: u64) {
        assert!(
            offset.is_multiple_of(BLOCK_BYTES) && bytes.is_multiple_of(BLOCK_BYTES) && bytes > 0,
            "{bytes} B at {offset} are not whole blocks"
        );
        assert!(
            offset.checked_add(bytes).is_some_and(|end| end <= self.capacity),
            "{bytes} B at {offset} of a disk of {}",
            self.capacity
        );
    }
}

fn flat(header: &edge::AlignedBlock, data: &[HeapBlock]) -> Vec<u8> {
    let mut bytes = header.0.to_vec();
    for part in data {
        bytes.extend_from_slice(part.bytes());
    }
    bytes
}

fn eio(operation: &'static str, offset: u64, bytes: u64) -> DiskError {
    DiskError::Io {
        operation,
        offset,
        bytes,
        errno: 5,
        reason: "simulated I/O error".into(),
    }
}

impl State {
    fn strikes(&mut self, ppm: u32) -> bool {
        let strikes = self.faults.budget > 0 && ppm > 0 && self.rng.chance(u64::from(ppm), 1_000_000);
        if strikes {
            self.faults.budget -= 1;
        }
        strikes
    }

    /// Counts a blocking operation; whether it is the one in which power is cut.
    fn is_cut_now(&mut self) -> bool {
        match &mut self.cut_after {
            Some(0) => !std::mem::replace(&mut self.is_cut, true),
            Some(left) => {
                *left -= 1;
                false
            }
            None => false,
        }
    }

    fn let_late_writes_happen(&mut self) {
        let mut at = 0;
        while at < self.late.len() {
            if self.rng.chance(1, 24) {
                let (offset, bytes) = self.late.swap_remove(at);
                self.medium.write(offset, &bytes, |_| true);
            } else {
                at += 1;
            }
        }
    }

    fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Result<(), DiskError> {
        if self.is_dead || self.is_cut || self.strikes(self.faults.read_error_ppm) {
            return Err(eio("read", offset, buffer.len() as u64));
        }
        self.medium.read(offset, buffer);
        Ok(())
    }

    fn write(&mut self, capacity: u64, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        let length = bytes.len() as u64;
        if self.is_dead || self.is_cut {
            return Err(eio("write", offset, length));
        }
        if self.strikes(self.faults.write_error_ppm) {
            let sectors = self.rng.draw();
            self.medium.write(offset, bytes, |i| sectors >> (i % 64) & 1 == 1);
            return Err(eio("write", offset, length));
        }
        if self.strikes(self.faults.lost_write_ppm) {
            self.damages.push(Damage::Lost {
                offset,
                bytes: length,
            });
            return Ok(());
        }
        let mut landed = offset;
        if self.strikes(self.faults.misdirected_write_ppm) {
            landed = self.rng.below((capacity - length) / BLOCK_BYTES + 1) * BLOCK_BYTES;
            self.damages.push(Damage::Misdirected {
                offset,
                landed,
                bytes: length,
            });
        }
        self.medium.write(landed, bytes, |_| true);
        Ok(())
    }

    fn sync(&mut self, mark: u64) -> Result<(), DiskError> {
        if self.is_dead || self.is_cut {
            return Err(eio("sync", 0, 0));
        }
        if self.strikes(self.faults.lying_sync_ppm) {
            self.damages.push(Damage::NotSynced);
            return Ok(());
        }
        if self.strikes(self.faults.failed_sync_ppm) {
            self.medium.lose_power(&mut self.rng);
            return Err(eio("sync", 0, 0));
        }
        self.medium.sync(mark);
        Ok(())
    }

    fn perform(&mut self, capacity: u64, one: UnderWay) -> Completion<HeapBlock> {
        let result = match one.operation {
            DiskOp::Write { offset, header, data } => {
                let bytes = flat(&header, &data);
                self.data.remove(&offset);
                let after = (offset + BLOCK_BYTES..offset + bytes.len() as u64).step_by(BLOCK_BYTES as usize);
                self.data.extend(after);
                self.write(capacity, offset, &bytes)
                    .map(|()| DiskOutcome::Written { header, data })
            }
            DiskOp::Read { offset, bytes } => {
                let mut buffer = vec![0; bytes as usize];
                self.read(offset, &mut buffer)
                    .map(|()| DiskOutcome::Read(HeapBlock::new(&buffer)))
            }
            DiskOp::Sync => self.sync(one.mark).map(|()| DiskOutcome::Synced),
        };
        Completion { id: one.id, result }
    }
}

impl Disk for SimDisk {
    type Buffer = HeapBlock;

    fn submit(&mut self, id: IoId, operation: DiskOp<HeapBlock>) {
        match &operation {
            DiskOp::Write { offset, data, .. } => {
                let length: usize = data.iter().map(Payload::length).sum();
                self.assert_inside(*offset, BLOCK_BYTES + length as u64);
            }
            DiskOp::Read { offset, bytes } => self.assert_inside(*offset, u64::from(*bytes)),
            DiskOp::Sync => {}
        }
        let state = self.state.get_mut();
        assert!(state.ids.insert(id), "operation {id:?} is under way already");
        let mark = state.medium.mark();
        state.under_way.push(UnderWay { id, operation, mark });
    }

    fn poll(&mut self, completions: &mut Vec<Completion<HeapBlock>>) {
        let capacity = self.capacity;
        let state = self.state.get_mut();
        state.let_late_writes_happen();
        let mut chosen = Vec::new();
        let mut kept = Vec::new();
        for one in std::mem::take(&mut state.under_way) {
            if state.rng.chance(1, state.slowness) {
                chosen.push(one);
            } else {
                kept.push(one);
            }
        }
        state.under_way = kept;
        state.rng.shuffle(&mut chosen);
        for one in chosen {
            state.ids.remove(&one.id);
            let completion = state.perform(capacity, one);
            completions.push(completion);
        }
    }
}

impl BlockFile for SimDisk {
    fn bytes(&self) -> u64 {
        self.capacity
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DiskError> {
        self.assert_inside(offset, buffer.len() as u64);
        let mut state = self.state.borrow_mut();
        state.let_late_writes_happen();
        state.read(offset, buffer)
    }

    fn write_at(&mut self, offset: u64, buffer: &[u8]) -> Result<(), DiskError> {
        self.assert_inside(offset, buffer.len() as u64);
        let capacity = self.capacity;
        let state = self.state.get_mut();
        state.let_late_writes_happen();
        let end = offset + buffer.len() as u64;
        let covered: Vec<u64> = state.data.range(offset..end).copied().collect();
        for block in covered {
            state.data.remove(&block);
        }
        if state.is_cut_now() {
            let sectors = state.rng.draw();
            state
                .medium
                .write(offset, buffer, |i| sectors >> (i % 64) & 1 == 1);
            return Err(eio("write", offset, buffer.len() as u64));
        }
        state.write(capacity, offset, buffer)
    }

    fn sync(&mut self) -> Result<(), DiskError> {
        let state = self.state.get_mut();
        if state.is_cut_now() {
            return Err(eio("sync", 0, 0));
        }
        let mark = state.medium.mark();
        state.sync(mark)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use edge::AlignedBlock;

    fn block(fill: u8) -> Box<AlignedBlock> {
        Box::new(AlignedBlock([fill; BLOCK_BYTES as usize]))
    }

    fn write(disk: &mut SimDisk, id: u64, offset: u64, fill: u8) {
        disk.submit(
            IoId(id),
            DiskOp::Write {
                offset,
                header: block(fill),
                data: vec![HeapBlock::new(&[fill; 4096])],
            },
        );
    }

    fn drain(disk: &mut SimDisk) -> Vec<Completion<HeapBlock>> {
        let mut done = Vec::new();
        while disk.in_flight() > 0 {
            disk.poll(&mut done);
        }
        done
    }

    fn content(disk: &SimDisk, offset: u64, bytes: usize) -> Vec<u8> {
        let mut buffer = vec![0; bytes];
        disk.read_at(offset, &mut buffer).unwrap();
        buffer
    }

    #[test]
    fn terabytes_cost_what_was_written() {
        let mut disk = SimDisk::new(16 << 40, 1);
        write(&mut disk, 1, (16 << 40) - 8192, 7);
        drain(&mut disk);
        assert_eq!(content(&disk, (16 << 40) - 4096, 4096), [7; 4096]);
        assert_eq!(content(&disk, 8 << 40, 4096), [0; 4096]);
        assert_eq!(disk.written_bytes(), 8192);
    }

    #[test]
    fn synced_data_survives_power_loss_and_unsynced_sectors_go_one_by_one() {
        let (mut torn, mut lost, mut kept) = (0, 0, 0);
        for seed in 0..200 {
            let mut disk = SimDisk::new(1 << 20, seed);
            write(&mut disk, 1, 0, 1);
            drain(&mut disk);
            disk.submit(IoId(2), DiskOp::Sync);
            drain(&mut disk);
            assert_eq!(disk.unsynced_sectors(), 0);
            write(&mut disk, 3, 8192, 2);
            drain(&mut disk);
            disk.lose_power();
            assert_eq!(content(&disk, 0, 8192), [1; 8192], "seed {seed}");
            let second = content(&disk, 8192, 8192);
            for sector in second.chunks(512) {
                assert!(sector == [0; 512] || sector == [2; 512], "seed {seed}");
            }
            match second.iter().filter(|b| **b == 2).count() {
                0 => lost += 1,
                8192 => kept += 1,
                _ => torn += 1,
            }
        }
        assert!(torn > 20 && lost > 20 && kept > 20, "{torn} {lost} {kept}");
    }

    #[test]
    fn a_sync_covers_what_completed_before_its_submission_only() {
        let mut was_lost = false;
        for seed in 0..100 {
            let mut disk = SimDisk::new(1 << 20, seed);
            write(&mut disk, 1, 0, 1);
            disk.submit(IoId(2), DiskOp::Sync);
            drain(&mut disk);
            disk.lose_power();
            was_lost |= content(&disk, 0, 4096) != [1; 4096];
        }
        assert!(was_lost, "a write beside a sync was never in danger");
    }

    #[test]
    fn a_kill_leaves_the_cache_alone_and_late_writes_come() {
        let (mut now, mut later, mut never) = (0, 0, 0);
        for seed in 0..300 {
            let mut disk = SimDisk::new(1 << 20, seed);
            write(&mut disk, 1, 0, 1);
            drain(&mut disk);
            write(&mut disk, 2, 8192, 2);
            disk.kill(LateWrites::Allowed);
            assert_eq!(content(&disk, 0, 4096), [1; 4096]);
            let at_once = content(&disk, 8192, 8192) == [2; 8192];
            for _ in 0..200 {
                disk.poll(&mut Vec::new());
            }
            let at_last = content(&disk, 8192, 8192) == [2; 8192];
            match (at_once, at_last) {
                (true, _) => now += 1,
                (false, true) => later += 1,
                (false, false) => never += 1,
            }
        }
        assert!(now > 50 && later > 30 && never > 50, "{now} {later} {never}");
    }

    #[test]
    fn faults_stop_at_their_budget_and_leave_a_record() {
        let mut disk = SimDisk::new(1 << 20, 3);
        disk.set_faults(Faults {
            budget: 3,
            lost_write_ppm: 500_000,
            misdirected_write_ppm: 500_000,
            ..Faults::default()
        });
        for id in 0..20 {
            write(&mut disk, id, 0, id as u8);
            drain(&mut disk);
        }
        assert_eq!(disk.damages().len(), 3);
        assert_eq!(content(&disk, 0, 8192), [19; 8192]);
        disk.rot(4096 + 700);
        let rotten = content(&disk, 4096, 4096);
        assert_eq!(rotten.iter().filter(|b| **b != 19).count(), 1);
        assert_eq!(disk.damages()[3], Damage::Rot { offset: 4096 + 512 });
        assert_eq!(disk.data_blocks(), [4096], "headers are not content");
    }

    #[test]
    fn a_failed_sync_says_so_once_and_the_next_one_lies() {
        let mut lost = 0;
        for seed in 0..50 {
            let mut disk = SimDisk::new(1 << 20, seed);
            write(&mut disk, 1, 0, 1);
            drain(&mut disk);
            disk.set_faults(Faults {
                budget: 1,
                failed_sync_ppm: 1_000_000,
                ..Faults::default()
            });
            assert!(BlockFile::sync(&mut disk).is_err());
            assert!(BlockFile::sync(&mut disk).is_ok());
            lost += usize::from(content(&disk, 0, 8192) != [1; 8192]);
        }
        assert!(lost > 10, "{lost}");
    }

    #[test]
    fn a_dead_disk_answers_errors_and_returns_with_its_content() {
        let mut disk = SimDisk::new(1 << 20, 3);
        write(&mut disk, 1, 0, 9);
        drain(&mut disk);
        disk.set_dead(true);
        write(&mut disk, 2, 0, 1);
        disk.submit(IoId(3), DiskOp::Sync);
        assert!(drain(&mut disk).iter().all(|c| c.result.is_err()));
        disk.set_dead(false);
        assert_eq!(content(&disk, 0, 8192), [9; 8192]);
        disk.replace();
        assert_eq!(content(&disk, 0, 8192), [0; 8192]);
    }
}
