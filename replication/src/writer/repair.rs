//! Replacing a bad copy of a block by a good one, and reading it back.

use types::{BLOCK_BYTES, BlockNo, DiskId, LeafNo, Payload, Seq};

use store::{BlockState, BlockVersion, ClearKind, ReadPart, StoreError};

use super::answer::Awaited;
use super::{Effects, Purpose, Writer, WriterEffect, WriterNotice};
use crate::message::{Refusal, RepairContent, ReplicaReply, ReplicaRequest};

/// Repairs under way at once; a bad block met beyond that is found again by the next read or scrub.
const REPAIRS_MAX: usize = 64;

/// Bad blocks on one disk, repaired a run at a time: as many as are known to be bad and came by one write.
#[derive(Clone, Debug, Hash)]
pub(super) struct RepairJob {
    target: DiskId,
    source: DiskId,
    /// First block of the run.
    block: BlockNo,
    /// Blocks of the run; 1 until the source's versions are known.
    run: u32,
    /// Blocks below this are known to be bad.
    known_end: BlockNo,
    /// From there to here more may be bad: looked for with reads that grow while they find nothing, so that a
    /// range where all is bad is not read again and again from each of its blocks.
    end: BlockNo,
    window: u32,
    stage: Stage,
    repaired: u64,
    /// The scrub that waits for it.
    scrub: Option<u64>,
}

#[derive(Clone, Copy, Debug, Hash)]
enum Stage {
    Version,
    Content(Seq),
    Replace,
    ReadBack,
    /// Looking for the next bad block, from this one on.
    Look(BlockNo),
}

/// What is known of the blocks that a repair begins with.
#[derive(Clone, Copy, Debug, Hash)]
pub(super) struct BadRange {
    /// The first; bad for certain.
    pub block: BlockNo,
    /// All below are bad for certain.
    pub known_end: BlockNo,
    /// Up to here more may be.
    pub end: BlockNo,
}

impl RepairJob {
    pub(super) fn awaited(&self) -> Awaited {
        match self.stage {
            Stage::Version => Awaited::Versions,
            Stage::Content(_) | Stage::ReadBack => Awaited::Blocks(self.block, self.run),
            Stage::Replace => Awaited::Done,
            Stage::Look(from) => Awaited::Blocks(from, self.looked_at(from)),
        }
    }

    /// Blocks of the look from there on.
    fn looked_at(&self, from: BlockNo) -> u32 {
        self.window.min(self.end.0 - from.0)
    }

    pub(super) fn uses(&self, disk: DiskId) -> bool {
        self.target == disk || self.source == disk
    }
}

impl<B: Payload> Writer<B> {
    /// Repairs `bad` on `target` from another current replica. Says whether it could begin.
    pub(super) fn start_repair(
        &mut self,
        target: DiskId,
        bad: BadRange,
        from: Option<(DiskId, u64)>,
        effects: &mut Effects<B>,
    ) -> bool {
        let BadRange {
            block,
            known_end,
            end,
        } = bad;
        assert!(block < known_end && known_end <= end, "repair of {bad:?}");
        let is_known = self
            .repairs
            .values()
            .any(|job| job.target == target && job.block == block);
        let source = match from {
            Some((source, _)) => Some(source),
            None => self.readable(block).into_iter().find(|disk| *disk != target),
        };
        let is_current = self.member(target).is_some_and(super::Member::is_current);
        let Some(source) = source else {
            return false;
        };
        if is_known || !is_current || self.repairs.len() >= REPAIRS_MAX {
            return false;
        }
        let no = self.new_no();
        self.repairs.insert(
            no,
            RepairJob {
                target,
                source,
                block,
                run: 1,
                known_end,
                end,
                window: 1,
                stage: Stage::Version,
                repaired: 0,
                scrub: from.map(|(_, scrub)| scrub),
            },
        );
        self.repair_version(no, effects);
        true
    }

    fn repair_version(&mut self, no: u64, effects: &mut Effects<B>) {
        let job = self.repairs.get_mut(&no).expect("a repair under way");
        job.stage = Stage::Version;
        let (source, leaf) = (job.source, job.block.leaf());
        let layer = self.layer;
        self.send(
            source,
            Purpose::Repair(no),
            ReplicaRequest::LeafVersions { layer, leaf },
            effects,
        );
    }

    pub(super) fn repair_answered(
        &mut self,
        no: u64,
        result: Result<ReplicaReply<B>, Refusal>,
        effects: &mut Effects<B>,
    ) {
        let Some(job) = self.repairs.get_mut(&no) else {
            return;
        };
        let (block, source, target) = (job.block, job.source, job.target);
        let layer = self.layer;
        match (job.stage, result) {
            (Stage::Version, Ok(ReplicaReply::Versions(versions))) => {
                let version = versions[block.slot()];
                let known = (job.known_end.0 - block.0) as usize;
                let alike = |other: &&BlockVersion| {
                    other.seq == version.seq
                        && clear_kind(**other) == clear_kind(version)
                        && is_data(**other) == is_data(version)
                };
                let run = versions[block.slot()..]
                    .iter()
                    .take(known)
                    .take_while(alike)
                    .count();
                job.run = u32::try_from(run).expect("a leaf has 256 blocks");
                if is_data(version) {
                    job.stage = Stage::Content(version.seq);
                    let request = ReplicaRequest::Read {
                        layer,
                        block,
                        count: job.run,
                    };
                    self.send(source, Purpose::Repair(no), request, effects);
                } else {
                    let content = RepairContent::Clear(job.run, clear_kind(version));
                    self.repair_replace(no, version.seq, content, effects);
                }
            }
            (Stage::Content(seq), Ok(ReplicaReply::Read(parts))) => {
                let content = match parts.into_iter().next() {
                    Some(ReadPart::Data(data)) => {
                        // The rest of the run, if it came in further parts, is the next run.
                        job.run =
                            u32::try_from(types::block_count(data.length() as u64)).expect("at most 256");
                        let crcs = data
                            .bytes()
                            .chunks(BLOCK_BYTES as usize)
                            .map(types::crc32c)
                            .collect();
                        RepairContent::Data(data, crcs)
                    }
                    // Cleared since its version was read; the stream has done the same on the target.
                    Some(ReadPart::Zeros(count)) => {
                        job.run = count;
                        RepairContent::Clear(count, ClearKind::Zero)
                    }
                    None => unreachable!("a read is answered with as many blocks as were asked for"),
                };
                self.repair_replace(no, seq, content, effects);
            }
            (Stage::Replace, Ok(_)) => {
                job.stage = Stage::ReadBack;
                let request = ReplicaRequest::Read {
                    layer,
                    block,
                    count: job.run,
                };
                self.send(target, Purpose::Repair(no), request, effects);
            }
            (Stage::ReadBack, Ok(_)) => {
                job.repaired += u64::from(job.run);
                job.block = block.plus(job.run);
                if job.block < job.known_end {
                    self.repair_version(no, effects);
                } else {
                    job.window = 1;
                    let from = job.block;
                    self.repair_look(no, from, effects);
                }
            }
            (Stage::Look(from), Ok(_)) => {
                let from = from.plus(job.looked_at(from));
                job.window *= 2;
                self.repair_look(no, from, effects);
            }
            (Stage::Look(from), Err(Refusal::Store(StoreError::Corrupt { block: next, .. })))
                if next >= from && next < job.end =>
            {
                job.block = next;
                job.known_end = next.plus(1);
                self.repair_version(no, effects);
            }
            _ => self.repair_ended(no, effects),
        }
    }

    fn repair_look(&mut self, no: u64, from: BlockNo, effects: &mut Effects<B>) {
        let layer = self.layer;
        let job = self.repairs.get_mut(&no).expect("a repair under way");
        if from >= job.end {
            self.repair_ended(no, effects);
            return;
        }
        job.stage = Stage::Look(from);
        let (target, count) = (job.target, job.looked_at(from));
        let request = ReplicaRequest::Read {
            layer,
            block: from,
            count,
        };
        self.send(target, Purpose::Repair(no), request, effects);
    }

    fn repair_replace(&mut self, no: u64, seq: Seq, content: RepairContent<B>, effects: &mut Effects<B>) {
        let layer = self.layer;
        let job = self.repairs.get_mut(&no).expect("a repair under way");
        job.stage = Stage::Replace;
        let (target, block) = (job.target, job.block);
        let request = ReplicaRequest::Repair {
            layer,
            block,
            seq: repair_seq(seq),
            content,
            // Newer content than the source's came by the stream and stays.
            live_from: Seq(seq.0 + 1),
        };
        self.send(target, Purpose::Repair(no), request, effects);
    }

    pub(super) fn repair_ended(&mut self, no: u64, effects: &mut Effects<B>) {
        let Some(job) = self.repairs.remove(&no) else {
            return;
        };
        if job.repaired > 0 {
            effects.push(WriterEffect::Notice(WriterNotice::Repaired {
                disk: job.target,
                blocks: job.repaired,
            }));
        }
        if let Some(scrub) = job.scrub {
            self.scrub_repaired(scrub, job.repaired, effects);
        }
    }
}

fn is_data(version: BlockVersion) -> bool {
    matches!(version.state, BlockState::Data(_))
}

/// How a range without data is cleared on another replica.
pub(super) fn clear_kind(version: BlockVersion) -> ClearKind {
    match version.state {
        BlockState::Clear(kind) => kind,
        _ => ClearKind::Trim,
    }
}

/// Whether two versions of a block hold the same content; how zeros came to be does not matter.
pub(super) fn is_same(a: BlockVersion, b: BlockVersion) -> bool {
    match (a.state, b.state) {
        (BlockState::Data(x), BlockState::Data(y)) => a.seq == b.seq && x == y,
        (BlockState::Data(_), _) | (_, BlockState::Data(_)) => false,
        _ => true,
    }
}

/// A block that was never written at the source has no seq; the lowest that no write ever gets stands for it.
pub(super) fn repair_seq(seq: Seq) -> Seq {
    seq.max(Seq(1))
}

/// The leaf's block at `slot`.
pub(super) fn block_at(leaf: LeafNo, slot: usize) -> BlockNo {
    leaf.first_block().plus(slot as u32)
}
