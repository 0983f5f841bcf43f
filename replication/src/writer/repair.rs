//! Replacing a bad copy of a block by a good one, and reading it back.

use types::{BlockNo, DiskId, LeafNo, Payload, Seq};

use store::{BlockState, BlockVersion, ClearKind, ReadPart, StoreError};

use super::{Effects, Purpose, Writer, WriterEffect, WriterNotice};
use crate::message::{Refusal, RepairContent, ReplicaReply, ReplicaRequest};

/// Repairs under way at once; a bad block met beyond that is found again by the next read or scrub.
const REPAIRS_MAX: usize = 64;

/// One run of bad blocks on one disk, repaired one after the other.
#[derive(Debug)]
pub(super) struct RepairJob {
    target: DiskId,
    source: DiskId,
    block: BlockNo,
    /// Reading back goes up to here, and finds the next bad block of the same read.
    end: BlockNo,
    stage: Stage,
    repaired: u64,
    /// The scrub that waits for it.
    scrub: Option<u64>,
}

#[derive(Clone, Copy, Debug)]
enum Stage {
    Version,
    Content(Seq),
    Replace,
    ReadBack,
}

impl RepairJob {
    pub(super) fn uses(&self, disk: DiskId) -> bool {
        self.target == disk || self.source == disk
    }
}

impl<B: Payload> Writer<B> {
    /// Repairs `block` on `target` from another current replica, and what else is bad up to `end`. Says whether it
    /// could begin.
    pub(super) fn start_repair(
        &mut self,
        target: DiskId,
        block: BlockNo,
        end: BlockNo,
        from: Option<(DiskId, u64)>,
        effects: &mut Effects<B>,
    ) -> bool {
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
                end,
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
        let (block, source, target, end) = (job.block, job.source, job.target, job.end);
        let layer = self.layer;
        match (job.stage, result) {
            (Stage::Version, Ok(ReplicaReply::Versions(versions))) => {
                let version = versions[block.slot()];
                match version.state {
                    BlockState::Data(_) => {
                        job.stage = Stage::Content(version.seq);
                        let request = ReplicaRequest::Read {
                            layer,
                            block,
                            count: 1,
                        };
                        self.send(source, Purpose::Repair(no), request, effects);
                    }
                    BlockState::Clear(_) | BlockState::Absent => {
                        let content = RepairContent::Clear(1, clear_kind(version));
                        self.repair_replace(no, version.seq, content, effects);
                    }
                }
            }
            (Stage::Content(seq), Ok(ReplicaReply::Read(parts))) => {
                let content = match parts.into_iter().next() {
                    Some(ReadPart::Data(data)) => {
                        let crc = types::crc32c(data.bytes());
                        RepairContent::Data(data, vec![crc])
                    }
                    // Cleared since its version was read; the stream has done the same on the target.
                    _ => RepairContent::Clear(1, ClearKind::Zero),
                };
                self.repair_replace(no, seq, content, effects);
            }
            (Stage::Replace, Ok(_)) => {
                job.stage = Stage::ReadBack;
                let request = ReplicaRequest::Read {
                    layer,
                    block,
                    count: end.0 - block.0,
                };
                self.send(target, Purpose::Repair(no), request, effects);
            }
            (Stage::ReadBack, Ok(_)) => {
                job.repaired += 1;
                self.repair_ended(no, effects);
            }
            (Stage::ReadBack, Err(Refusal::Store(StoreError::Corrupt { block: next, .. })))
                if next > block =>
            {
                job.repaired += 1;
                job.block = next;
                self.repair_version(no, effects);
            }
            _ => self.repair_ended(no, effects),
        }
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
