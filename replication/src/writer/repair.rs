//! Replacing a bad copy of a block by a good one, and reading it back.

use types::{BLOCK_BYTES, BlockNo, DiskId, LayerId, LeafNo, Lineage, Payload, Seq};

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
    /// The layer whose copy is bad.
    layer: LayerId,
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
    /// The layer that has them.
    pub layer: LayerId,
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
            layer,
            block,
            known_end,
            end,
        } = bad;
        assert!(block < known_end && known_end <= end, "repair of {bad:?}");
        let is_known = self
            .repairs
            .values()
            .any(|job| job.target == target && job.layer == layer && job.block == block);
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
                layer,
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
        let (source, layer, leaf) = (job.source, job.layer, job.block.leaf());
        let lineage = self.layer(layer);
        self.send(
            source,
            Purpose::Repair(no),
            ReplicaRequest::LeafVersions { lineage, leaf },
            effects,
        );
    }

    pub(super) fn repair_answered(
        &mut self,
        no: u64,
        result: Result<ReplicaReply<B>, Refusal>,
        effects: &mut Effects<B>,
    ) {
        let vdi = self.shard.vdi;
        let Some(job) = self.repairs.get_mut(&no) else {
            return;
        };
        let (block, source, target) = (job.block, job.source, job.target);
        let lineage = Lineage::of_layer(vdi, job.layer);
        match (job.stage, result) {
            (Stage::Version, Ok(ReplicaReply::Versions(versions))) => {
                let version = versions[block.slot()];
                let known = (job.known_end.0 - block.0) as usize;
                let alike = |other: &&BlockVersion| {
                    other.seq == version.seq && Holds::of(**other) == Holds::of(version)
                };
                let run = versions[block.slot()..]
                    .iter()
                    .take(known)
                    .take_while(alike)
                    .count();
                job.run = u32::try_from(run).expect("a leaf has 256 blocks");
                let (layer, count, live_from) = (job.layer, job.run, newer_than(version.seq));
                let holds = Holds::of(version);
                if let Some(request) = holds.without_data(layer, block, count, version.seq, live_from) {
                    self.repair_replace(no, request, effects);
                } else {
                    job.stage = Stage::Content(version.seq);
                    let request = ReplicaRequest::Read {
                        lineage,
                        block,
                        count,
                    };
                    self.send(source, Purpose::Repair(no), request, effects);
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
                let request = ReplicaRequest::Repair {
                    layer: job.layer,
                    block,
                    seq,
                    content,
                    live_from: newer_than(seq),
                };
                self.repair_replace(no, request, effects);
            }
            (Stage::Replace, Ok(_)) => {
                job.stage = Stage::ReadBack;
                let request = ReplicaRequest::Read {
                    lineage,
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
        let vdi = self.shard.vdi;
        let job = self.repairs.get_mut(&no).expect("a repair under way");
        if from >= job.end {
            self.repair_ended(no, effects);
            return;
        }
        job.stage = Stage::Look(from);
        let (target, count) = (job.target, job.looked_at(from));
        let request = ReplicaRequest::Read {
            lineage: Lineage::of_layer(vdi, job.layer),
            block: from,
            count,
        };
        self.send(target, Purpose::Repair(no), request, effects);
    }

    fn repair_replace(&mut self, no: u64, request: ReplicaRequest<B>, effects: &mut Effects<B>) {
        let job = self.repairs.get_mut(&no).expect("a repair under way");
        job.stage = Stage::Replace;
        let target = job.target;
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

/// What comes by the stream after the source's content stays: the first seq of that.
fn newer_than(seq: Seq) -> Seq {
    Seq(seq.0 + 1)
}

/// What a layer holds of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Holds {
    Data,
    Zeros(ClearKind),
    /// What the layers below hold shows.
    Nothing,
}

impl Holds {
    pub(super) fn of(version: BlockVersion) -> Holds {
        match version.state {
            BlockState::Data(_) => Holds::Data,
            BlockState::Clear(kind) => Holds::Zeros(kind),
            BlockState::Absent => Holds::Nothing,
        }
    }

    /// What makes another replica's blocks the same, where no content has to travel for it.
    pub(super) fn without_data<B>(
        self,
        layer: LayerId,
        block: BlockNo,
        count: u32,
        seq: Seq,
        live_from: Seq,
    ) -> Option<ReplicaRequest<B>> {
        match self {
            Holds::Data => None,
            Holds::Zeros(kind) => Some(ReplicaRequest::Repair {
                layer,
                block,
                seq,
                content: RepairContent::Clear(count, kind),
                live_from,
            }),
            Holds::Nothing => Some(ReplicaRequest::Void {
                layer,
                block,
                count,
                live_from,
            }),
        }
    }
}

/// Whether two versions of a layer's block hold the same content; which kind of zeros does not matter. Nothing is not the
/// same as zeros, which hide the layers below.
pub(super) fn is_same(a: BlockVersion, b: BlockVersion) -> bool {
    match (a.state, b.state) {
        (BlockState::Data(x), BlockState::Data(y)) => a.seq == b.seq && x == y,
        (BlockState::Clear(_), BlockState::Clear(_)) | (BlockState::Absent, BlockState::Absent) => true,
        _ => false,
    }
}

/// The leaf's block at `slot`.
pub(super) fn block_at(leaf: LeafNo, slot: usize) -> BlockNo {
    leaf.first_block().plus(slot as u32)
}
