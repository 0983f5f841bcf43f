//! Reads: from one replica that holds everything completed, near ones first; from another where that one's copy is bad
//! or does not come.
//!
//! A read that one replica has not answered for [`HEDGE`] is asked of the next as well, and the first answer counts. For
//! a while the slow one is asked last, so that only what was under way pays for its slowness.

use std::time::Duration;

use smallvec::SmallVec;
use types::{BlockNo, DiskId, Instant, LEAF_BLOCKS, LayerId, LeafNo, Lineage, Payload, RequestId};

use store::{REQUEST_BLOCKS_MAX, ReadParts, StoreError};

use super::answer::Awaited;
use super::repair::BadRange;
use super::{
    Effects, Member, MemberState, PATIENCE, Purpose, ShardError, ShardReply, Writer, WriterEffect,
    WriterNotice,
};
use crate::message::{Refusal, ReplicaReply, ReplicaRequest};

/// How long one replica may take over a read before another is asked too. Above anything that a device that works does,
/// below what a guest would notice as a stop.
const HEDGE: Duration = Duration::from_millis(100);

/// How long a replica that let a read wait is asked last.
const SLOW_FOR: Duration = Duration::from_secs(2);

/// A read under way.
#[derive(Clone, Debug, Hash)]
pub(super) struct ReadOp<B> {
    pub id: RequestId,
    what: What,
    /// What a snapshot sees; `None` for the head.
    of: Option<Lineage>,
    /// Replicas that failed at the piece being read.
    tried: SmallVec<[DiskId; 3]>,
    /// Replicas that have yet to answer, and when the last of them was asked.
    asked: SmallVec<[DiskId; 3]>,
    asked_at: Instant,
    /// Bad copies met on the way, to be repaired when there is a good one.
    bad: SmallVec<[(DiskId, LayerId, BlockNo); 1]>,
    /// Nobody can be asked now.
    is_parked: bool,
    /// What was read, while it may not be told.
    pub held: Option<Box<ShardReply<B>>>,
    /// No replica could read it all, so it is put together block by block.
    pieces: Option<ReadParts<B>>,
    pieces_done: u32,
}

#[derive(Clone, Copy, Debug, Hash)]
enum What {
    Blocks { block: BlockNo, count: u32 },
    Versions(LeafNo),
}

impl<B> ReadOp<B> {
    /// Replicas that have yet to answer.
    pub(super) fn asked(&self) -> &[DiskId] {
        &self.asked
    }

    pub(super) fn awaited(&self) -> Awaited {
        match self.what {
            What::Blocks { .. } => {
                let (block, count) = self.piece();
                Awaited::Blocks(block, count)
            }
            What::Versions(_) => Awaited::Versions,
        }
    }

    /// The blocks to ask for next.
    fn piece(&self) -> (BlockNo, u32) {
        match (self.what, &self.pieces) {
            (What::Blocks { block, count }, None) => (block, count),
            (What::Blocks { block, .. }, Some(_)) => (block.plus(self.pieces_done), 1),
            (What::Versions(leaf), _) => (leaf.first_block(), LEAF_BLOCKS),
        }
    }
}

impl<B: Payload> Writer<B> {
    pub(super) fn read(
        &mut self,
        id: RequestId,
        block: BlockNo,
        count: u32,
        of: Option<Lineage>,
        effects: &mut Effects<B>,
    ) {
        assert!((1..=REQUEST_BLOCKS_MAX).contains(&count), "{count} blocks");
        self.assert_inside(block, count);
        self.start_read(id, What::Blocks { block, count }, of, effects);
    }

    pub(super) fn read_versions(
        &mut self,
        id: RequestId,
        leaf: LeafNo,
        of: Option<Lineage>,
        effects: &mut Effects<B>,
    ) {
        self.start_read(id, What::Versions(leaf), of, effects);
    }

    fn start_read(&mut self, id: RequestId, what: What, of: Option<Lineage>, effects: &mut Effects<B>) {
        let is_ours = |of: &Lineage| of.newest().0 == self.shard.vdi;
        assert!(of.as_ref().is_none_or(is_ours), "a snapshot of another VDI");
        let no = self.reads.insert(ReadOp {
            id,
            what,
            of,
            tried: SmallVec::new(),
            asked: SmallVec::new(),
            asked_at: self.now,
            bad: SmallVec::new(),
            is_parked: false,
            held: None,
            pieces: None,
            pieces_done: 0,
        });
        self.ask(no, effects);
        self.renew_beside(no, effects);
    }

    /// Replicas that hold everything completed. In turn by 1 MiB, so that a sequential read stays on one disk
    /// while all of them work; those on other hosts after those here, and slow ones last.
    pub(super) fn readable(&self, block: BlockNo) -> SmallVec<[DiskId; 4]> {
        let mut disks: SmallVec<[DiskId; 4]> = self
            .members
            .iter()
            .filter(|member| member.is_current() && member.acked >= self.completed)
            .map(|member| member.disk)
            .collect();
        if !disks.is_empty() {
            let first = block.leaf().0 as usize % disks.len();
            disks.rotate_left(first);
        }
        let is_plain = |member: &Member| member.slow_until <= self.now && !self.far.contains(&member.disk);
        if !self.members.iter().all(is_plain) {
            let is_slow = |disk| {
                self.member(disk)
                    .is_some_and(|member| member.slow_until > self.now)
            };
            disks.sort_by_key(|disk| (is_slow(*disk), self.far.contains(disk)));
        }
        disks
    }

    /// Whether a member that cannot be asked now can be asked soon: it has yet to acknowledge what others completed,
    /// or it is being fenced or brought up to date. One that answers no fence is not waited for.
    pub(super) fn may_become_readable(&self, member: &Member) -> bool {
        let is_coming = match member.state {
            MemberState::Current => member.acked < self.completed,
            MemberState::Fencing => self.now.since(member.quiet_since) < PATIENCE,
            MemberState::Reported(_) | MemberState::Syncing(_) => true,
            MemberState::Away | MemberState::Expelled => false,
        };
        is_coming && member.is_up && self.record.replicas.contains(&member.disk)
    }

    /// Asks the next replica that may know, if there is one; else waits for those that were asked, or for one to come.
    fn ask(&mut self, no: u64, effects: &mut Effects<B>) {
        let read = self.reads.get(no).expect("asked for a read that is under way");
        let (block, count) = read.piece();
        let next = self
            .readable(block)
            .into_iter()
            .find(|disk| !read.tried.contains(disk) && !read.asked.contains(disk));
        // Nobody gives a read up while a replica that was not asked is on its way back: it may have the good copy.
        let may_come = self
            .members
            .iter()
            .any(|member| self.may_become_readable(member) && !read.tried.contains(&member.disk));
        let is_awaited = !read.asked.is_empty();
        let is_exhausted = !read.tried.is_empty() && !may_come && !is_awaited;
        // A cut since it was asked before hides nothing: no write under way is to a block that is being read.
        let lineage = read.of.as_ref().unwrap_or(&self.lineage).clone();
        let request = match read.what {
            What::Blocks { .. } => ReplicaRequest::Read {
                lineage,
                block,
                count,
            },
            What::Versions(leaf) => ReplicaRequest::LeafVersions { lineage, leaf },
        };
        self.set_parked(no, next.is_none() && !is_exhausted && !is_awaited);
        match next {
            Some(disk) => {
                let read = self.reads.get_mut(no).expect("asked for just now");
                read.asked.push(disk);
                read.asked_at = self.now;
                self.send(disk, Purpose::Read(no), request, effects);
            }
            None if is_exhausted => self.read_exhausted(no, effects),
            None => {}
        }
    }

    fn set_parked(&mut self, no: u64, is_parked: bool) {
        let read = self.reads.get_mut(no).expect("a read under way");
        let was_parked = std::mem::replace(&mut read.is_parked, is_parked);
        self.parked_reads = self.parked_reads + usize::from(is_parked) - usize::from(was_parked);
    }

    /// Ends a read; one that waits for somebody to ask is not at its end.
    fn end_read(&mut self, no: u64) -> ReadOp<B> {
        let read = self.reads.remove(no).expect("a read under way");
        assert!(!read.is_parked, "a read ends that nobody was asked for");
        read
    }

    pub(super) fn retry_parked(&mut self, effects: &mut Effects<B>) {
        if self.parked_reads == 0 {
            return;
        }
        for no in self.reads.numbers(|read| read.is_parked) {
            self.ask(no, effects);
        }
    }

    /// A replica that was asked is gone.
    pub(super) fn read_lost(&mut self, no: u64, disk: DiskId, effects: &mut Effects<B>) {
        let Some(read) = self.reads.get_mut(no) else {
            return;
        };
        read.asked.retain(|asked| *asked != disk);
        if read.held.is_none() {
            self.ask(no, effects);
        }
    }

    /// Asks another replica for what one has not answered for long. What is put together block by block is left to
    /// whom it was asked: its answers do not say which block they are of.
    pub(super) fn hedge(&mut self, effects: &mut Effects<B>) {
        if self.reads.is_empty() {
            return;
        }
        let now = self.now;
        let is_late = |read: &ReadOp<B>| {
            let is_awaited = !read.asked.is_empty() && read.held.is_none();
            is_awaited && read.pieces.is_none() && now.since(read.asked_at) >= HEDGE
        };
        for no in self.reads.numbers(is_late) {
            let read = self.reads.get_mut(no).expect("listed just now");
            read.asked_at = now;
            let silent = read.asked.clone();
            for member in &mut self.members {
                if silent.contains(&member.disk) {
                    member.slow_until = now + SLOW_FOR;
                }
            }
            self.ask(no, effects);
        }
    }

    pub(super) fn read_answered(
        &mut self,
        no: u64,
        disk: DiskId,
        result: Result<ReplicaReply<B>, Refusal>,
        effects: &mut Effects<B>,
    ) {
        let Some(read) = self.reads.get_mut(no) else {
            return;
        };
        read.asked.retain(|asked| *asked != disk);
        if read.held.is_some() {
            return;
        }
        let parts = match result {
            Ok(ReplicaReply::Read(parts)) => parts,
            Ok(ReplicaReply::Versions(versions)) => {
                self.read_done(no, ShardReply::Versions(versions), effects);
                return;
            }
            other => {
                // What is an ancestor's is for the ancestor's own writer to mend.
                if let Err(Refusal::Store(StoreError::Corrupt { shard, layer, block })) = other
                    && shard == self.shard
                    && !read.bad.contains(&(disk, layer, block))
                {
                    read.bad.push((disk, layer, block));
                }
                read.tried.push(disk);
                self.ask(no, effects);
                return;
            }
        };
        let parts = match (&mut read.pieces, read.what) {
            (Some(pieces), What::Blocks { count, .. }) => {
                pieces.extend(parts);
                read.pieces_done += 1;
                read.tried.clear();
                if read.pieces_done < count {
                    self.ask(no, effects);
                    return;
                }
                std::mem::take(pieces)
            }
            _ => parts,
        };
        self.read_done(no, ShardReply::Read(parts), effects);
    }

    /// Gives the guest what was read, unless it may be old news.
    pub(super) fn read_done(&mut self, no: u64, reply: ShardReply<B>, effects: &mut Effects<B>) {
        if !self.may_answer_reads() {
            self.hold(no, reply, effects);
            return;
        }
        let read = self.end_read(no);
        effects.push(WriterEffect::Reply(read.id, Ok(reply)));
        self.repair_after(&read, effects);
    }

    fn repair_after(&mut self, read: &ReadOp<B>, effects: &mut Effects<B>) {
        let What::Blocks { block, count } = read.what else {
            return;
        };
        let end = block.plus(count);
        for (target, layer, bad) in &read.bad {
            let bad = BadRange {
                layer: *layer,
                block: *bad,
                known_end: bad.plus(1),
                end,
            };
            self.start_repair(*target, bad, None, effects);
        }
    }

    /// Every replica that can be asked has failed at this piece.
    fn read_exhausted(&mut self, no: u64, effects: &mut Effects<B>) {
        let read = self
            .reads
            .get_mut(no)
            .expect("asked for a read that is under way");
        let is_whole = read.pieces.is_none();
        if is_whole && matches!(read.what, What::Blocks { count, .. } if count > 1) {
            read.pieces = Some(ReadParts::new());
            read.tried.clear();
            self.ask(no, effects);
            return;
        }
        let (block, _) = read.piece();
        let read = self.end_read(no);
        effects.push(WriterEffect::Notice(WriterNotice::Unreadable { block }));
        self.fail(read.id, ShardError::Unreadable { block }, effects);
    }
}
