//! Reading every layer of everything on every in-sync replica, comparing the replicas, repairing what is bad or differs.
//!
//! One leaf and one request at a time: a scrub has days, guests do not. A write in flight reaches replicas at
//! different moments, so a difference counts only in blocks whose every version is of the part of the stream that
//! each replica had acknowledged when it was asked. What is newer is left to the next scrub.

use std::collections::{BTreeSet, VecDeque};

use types::{BlockNo, DiskId, LEAF_BLOCKS, Payload, Seq};

use store::{BlockVersion, ReadPart, StoreError};

use super::answer::Awaited;
use super::repair::{BadRange, block_at, is_same};
use super::resync::{FIRST, Place};
use super::{Effects, Purpose, Writer, WriterEffect, WriterNotice, WriterPhase};
use crate::message::{Refusal, ReplicaReply, ReplicaRequest};

/// A scrub under way.
#[derive(Clone, Debug, Hash)]
pub(super) struct Scrub {
    /// Answers to another number are of before a member was lost.
    no: u64,
    has_begun: bool,
    members: Vec<DiskId>,
    listed: BTreeSet<Place>,
    /// Leaves to do, the present one first; `None` while listing.
    leaves: Option<VecDeque<Place>>,
    /// Which member is being asked.
    index: usize,
    /// Blocks asked for by the read under way. An error names the first bad block only: after one, reads are
    /// short and grow while they find nothing, so that a leaf where all is bad is read twice, not 256 times.
    asked: u32,
    bad: Vec<(DiskId, BlockNo)>,
    versions: Vec<Vec<BlockVersion>>,
    /// Every member held the stream up to here when it was asked for its versions.
    settled: Seq,
    fixes: VecDeque<Fix>,
    blocks: u64,
    repaired: u64,
    unreadable: u64,
}

#[derive(Clone, Copy, Debug, Hash)]
struct Fix {
    target: DiskId,
    block: BlockNo,
    count: u32,
    source: DiskId,
}

/// Which answer is awaited.
#[derive(Clone, Copy, Debug, Hash)]
pub(super) enum ScrubPart {
    /// From this leaf on.
    List(Place),
    /// Of a read from this block on.
    Read(BlockNo),
    Versions,
}

impl Scrub {
    pub(super) fn has_begun(&self) -> bool {
        self.has_begun
    }

    pub(super) fn awaited(&self, no: u64, part: ScrubPart) -> Option<Awaited> {
        (no == self.no).then_some(match part {
            ScrubPart::List(from) => Awaited::Leaves(from),
            ScrubPart::Read(from) => Awaited::Blocks(from, self.asked),
            ScrubPart::Versions => Awaited::Versions,
        })
    }

    fn place(&self) -> Place {
        let leaves = self.leaves.as_ref().expect("leaves are listed");
        leaves[0]
    }

    /// Forgets what is known of the present leaf.
    fn reset_leaf(&mut self) {
        self.index = 0;
        self.bad.clear();
        self.versions.clear();
        self.settled = Seq(u64::MAX);
        self.fixes.clear();
    }
}

impl<B: Payload> Writer<B> {
    pub(super) fn start_scrub(&mut self, effects: &mut Effects<B>) {
        match self.phase {
            WriterPhase::Fenced | WriterPhase::Closed => {
                effects.push(WriterEffect::Notice(WriterNotice::ScrubDone {
                    blocks: 0,
                    repaired: 0,
                    unreadable: 0,
                }));
                return;
            }
            _ if self.scrub.is_some() => return,
            _ => {}
        }
        let no = self.new_no();
        self.scrub = Some(Scrub {
            no,
            has_begun: false,
            members: Vec::new(),
            listed: BTreeSet::new(),
            leaves: None,
            index: 0,
            asked: LEAF_BLOCKS,
            bad: Vec::new(),
            versions: Vec::new(),
            settled: Seq(u64::MAX),
            fixes: VecDeque::new(),
            blocks: 0,
            repaired: 0,
            unreadable: 0,
        });
        self.touch(effects);
        self.begin_scrub(effects);
    }

    /// Begins the scrub that waits for the shard to open.
    pub(super) fn begin_scrub(&mut self, effects: &mut Effects<B>) {
        if self.phase != WriterPhase::Open {
            return;
        }
        let members = self.scrub_members();
        if let Some(scrub) = &mut self.scrub
            && !scrub.has_begun
            && !members.is_empty()
        {
            scrub.has_begun = true;
            scrub.members = members;
            self.scrub_list(FIRST, effects);
        }
    }

    /// Replicas that can be compared with each other.
    fn scrub_members(&self) -> Vec<DiskId> {
        self.members
            .iter()
            .filter(|member| member.is_current() && self.record.in_sync.contains(&member.disk))
            .map(|member| member.disk)
            .collect()
    }

    fn scrub_send(&mut self, part: ScrubPart, request: ReplicaRequest<B>, effects: &mut Effects<B>) {
        let scrub = self.scrub.as_ref().expect("a scrub under way");
        let (disk, no) = (scrub.members[scrub.index], scrub.no);
        self.send(disk, Purpose::Scrub(no, part), request, effects);
    }

    fn scrub_list(&mut self, from: Place, effects: &mut Effects<B>) {
        let request = ReplicaRequest::ChangedLeaves {
            newer_than: Seq(0),
            from,
        };
        self.scrub_send(ScrubPart::List(from), request, effects);
    }

    pub(super) fn scrub_answered(
        &mut self,
        no: u64,
        part: ScrubPart,
        result: Result<ReplicaReply<B>, Refusal>,
        effects: &mut Effects<B>,
    ) {
        let Some(scrub) = self.scrub.as_mut().filter(|scrub| scrub.no == no) else {
            return;
        };
        match (part, result) {
            (ScrubPart::List(_), Ok(ReplicaReply::Leaves(leaves))) => {
                scrub.listed.extend(&leaves);
                if let Some(from) = self.next_page(&leaves) {
                    self.scrub_list(from, effects);
                    return;
                }
                let scrub = self.scrub.as_mut().expect("looked at above");
                if scrub.index + 1 < scrub.members.len() {
                    scrub.index += 1;
                    self.scrub_list(FIRST, effects);
                } else {
                    let listed = std::mem::take(&mut scrub.listed);
                    scrub.leaves = Some(listed.into_iter().collect());
                    self.scrub_leaf(effects);
                }
            }
            (ScrubPart::Read(from), Ok(ReplicaReply::Read(parts))) => {
                for part in &parts {
                    if let ReadPart::Data(data) = part {
                        scrub.blocks += types::block_count(data.length() as u64);
                    }
                }
                let next = from.plus(scrub.asked);
                scrub.asked = (scrub.asked * 2).min(LEAF_BLOCKS);
                self.scrub_read(next, effects);
            }
            (ScrubPart::Read(from), Err(Refusal::Store(StoreError::Corrupt { block, .. }))) => {
                scrub.blocks += u64::from(block.0 - from.0) + 1;
                let disk = scrub.members[scrub.index];
                scrub.bad.push((disk, block));
                scrub.asked = 1;
                self.scrub_read(block.plus(1), effects);
            }
            (ScrubPart::Versions, Ok(ReplicaReply::Versions(versions))) => {
                scrub.versions.push(versions);
                if scrub.index + 1 < scrub.members.len() {
                    scrub.index += 1;
                    self.scrub_versions(effects);
                } else {
                    self.scrub_compare(effects);
                }
            }
            // A replica that cannot answer a listing is not comparable: leave this leaf.
            _ => {
                scrub.fixes.clear();
                self.scrub_leaf_done(effects);
            }
        }
    }

    /// Starts the first leaf of the list, or ends the scrub.
    fn scrub_leaf(&mut self, effects: &mut Effects<B>) {
        // A replica that came back since the last leaf takes part from here on: it may have what others lost.
        let members = self.scrub_members();
        let scrub = self.scrub.as_mut().expect("a scrub under way");
        scrub.reset_leaf();
        if !members.is_empty() {
            scrub.members = members;
        }
        match scrub.leaves.as_ref().and_then(|leaves| leaves.front()) {
            Some((_, leaf)) => {
                let block = leaf.first_block();
                scrub.asked = LEAF_BLOCKS;
                self.scrub_read(block, effects);
            }
            None => self.scrub_end(effects),
        }
    }

    fn scrub_end(&mut self, effects: &mut Effects<B>) {
        let scrub = self.scrub.take().expect("a scrub under way");
        effects.push(WriterEffect::Notice(WriterNotice::ScrubDone {
            blocks: scrub.blocks,
            repaired: scrub.repaired,
            unreadable: scrub.unreadable,
        }));
    }

    /// Reads the rest of the leaf from `block` on the present member.
    fn scrub_read(&mut self, block: BlockNo, effects: &mut Effects<B>) {
        let scrub = self.scrub.as_mut().expect("a scrub under way");
        let (layer, leaf) = scrub.place();
        let end = (leaf.first_block().0 + LEAF_BLOCKS).min(self.shard_blocks);
        if block.0 >= end {
            self.scrub_next_member(effects);
            return;
        }
        scrub.asked = scrub.asked.min(end - block.0);
        let count = scrub.asked;
        let lineage = self.layer(layer);
        let request = ReplicaRequest::Read {
            lineage,
            block,
            count,
        };
        self.scrub_send(ScrubPart::Read(block), request, effects);
    }

    fn scrub_next_member(&mut self, effects: &mut Effects<B>) {
        let scrub = self.scrub.as_mut().expect("a scrub under way");
        if scrub.index + 1 < scrub.members.len() {
            scrub.index += 1;
            scrub.asked = LEAF_BLOCKS;
            let block = scrub.place().1.first_block();
            self.scrub_read(block, effects);
        } else {
            scrub.index = 0;
            self.scrub_versions(effects);
        }
    }

    fn scrub_versions(&mut self, effects: &mut Effects<B>) {
        let scrub = self.scrub.as_ref().expect("a scrub under way");
        let ((layer, leaf), disk) = (scrub.place(), scrub.members[scrub.index]);
        let held = self.member(disk).map_or(Seq(0), |member| member.acked);
        let scrub = self.scrub.as_mut().expect("a scrub under way");
        scrub.settled = scrub.settled.min(held);
        let lineage = self.layer(layer);
        let request = ReplicaRequest::LeafVersions { lineage, leaf };
        self.scrub_send(ScrubPart::Versions, request, effects);
    }

    fn scrub_compare(&mut self, effects: &mut Effects<B>) {
        let scrub = self.scrub.as_mut().expect("a scrub under way");
        let (_, leaf) = scrub.place();
        let differs = |slot: &usize| {
            let versions = || scrub.versions.iter().map(|of| of[*slot]);
            let is_settled = versions().all(|version| version.seq <= scrub.settled);
            is_settled && versions().any(|version| !is_same(version, scrub.versions[0][*slot]))
        };
        let mut wanted: BTreeSet<usize> = (0..LEAF_BLOCKS as usize).filter(differs).collect();
        wanted.extend(scrub.bad.iter().map(|(_, block)| block.slot()));
        let mut fixes = Vec::new();
        for slot in wanted {
            let block = block_at(leaf, slot);
            let is_bad = |disk: DiskId| scrub.bad.contains(&(disk, block));
            let best = (0..scrub.members.len())
                .filter(|index| !is_bad(scrub.members[*index]))
                .max_by_key(|index| scrub.versions[*index][slot].seq);
            let Some(best) = best else {
                scrub.unreadable += 1;
                if scrub.members.len() == self.record.replicas.len() {
                    effects.push(WriterEffect::Notice(WriterNotice::Unreadable { block }));
                }
                continue;
            };
            for (index, target) in scrub.members.iter().copied().enumerate() {
                let is_other = !is_same(scrub.versions[index][slot], scrub.versions[best][slot]);
                if index != best && (is_bad(target) || is_other) {
                    fixes.push(Fix {
                        target,
                        block,
                        count: 1,
                        source: scrub.members[best],
                    });
                }
            }
        }
        scrub.fixes = in_runs(fixes);
        self.scrub_fix(effects);
    }

    fn scrub_fix(&mut self, effects: &mut Effects<B>) {
        loop {
            let scrub = self.scrub.as_mut().expect("a scrub under way");
            let no = scrub.no;
            let Some(fix) = scrub.fixes.pop_front() else {
                self.scrub_leaf_done(effects);
                return;
            };
            let end = fix.block.plus(fix.count);
            let bad = BadRange {
                layer: scrub.place().0,
                block: fix.block,
                known_end: end,
                end,
            };
            if self.start_repair(fix.target, bad, Some((fix.source, no)), effects) {
                return;
            }
        }
    }

    pub(super) fn scrub_repaired(&mut self, no: u64, repaired: u64, effects: &mut Effects<B>) {
        let Some(scrub) = self.scrub.as_mut().filter(|scrub| scrub.no == no) else {
            return;
        };
        scrub.repaired += repaired;
        self.scrub_fix(effects);
    }

    fn scrub_leaf_done(&mut self, effects: &mut Effects<B>) {
        let scrub = self.scrub.as_mut().expect("a scrub under way");
        match &mut scrub.leaves {
            Some(leaves) => {
                leaves.pop_front();
                self.scrub_leaf(effects);
            }
            None => self.scrub_end(effects),
        }
    }

    /// A member went: go on with the others from the present leaf.
    pub(super) fn scrub_lost(&mut self, disk: DiskId, effects: &mut Effects<B>) {
        let no = self.new_no();
        let Some(scrub) = self.scrub.as_mut().filter(|scrub| scrub.members.contains(&disk)) else {
            return;
        };
        scrub.no = no;
        scrub.members.retain(|member| *member != disk);
        scrub.reset_leaf();
        if scrub.members.is_empty() {
            self.scrub_end(effects);
        } else if scrub.leaves.is_some() {
            self.scrub_leaf(effects);
        } else {
            self.scrub_list(FIRST, effects);
        }
    }
}

/// Joins fixes of adjacent blocks that have the same source and target.
fn in_runs(mut fixes: Vec<Fix>) -> VecDeque<Fix> {
    fixes.sort_by_key(|fix| (fix.target, fix.source, fix.block));
    let mut runs: VecDeque<Fix> = VecDeque::new();
    for fix in fixes {
        match runs.back_mut() {
            Some(last)
                if (last.target, last.source) == (fix.target, fix.source)
                    && last.block.plus(last.count) == fix.block =>
            {
                last.count += 1;
            }
            _ => runs.push_back(fix),
        }
    }
    runs
}
