//! The stream of writes: numbering, sending, completing; and flushes, which travel in it.

use std::collections::VecDeque;

use smallvec::SmallVec;
use types::{BLOCK_BYTES, BlockCrcs, BlockNo, DiskId, LayerId, Payload, RequestId, Seq};

use store::{ClearKind, REQUEST_BLOCKS_MAX};

use super::{
    Effects, Member, MemberState, Purpose, STALL, ShardError, ShardOp, ShardReply, WINDOW_BYTES,
    WINDOW_ENTRIES, Writer, WriterEffect, WriterNotice, WriterPhase,
};
use crate::message::ReplicaRequest;
use crate::record::ShardRecord;

/// A write or clear that is not yet complete; kept so that a member that returns can be sent it again.
#[derive(Clone, Debug, Hash)]
pub(super) struct Entry<B> {
    pub id: RequestId,
    pub seq: Seq,
    /// The head when it was numbered.
    layer: LayerId,
    block: BlockNo,
    content: Content<B>,
}

#[derive(Clone, Debug, Hash)]
enum Content<B> {
    Data(B, BlockCrcs),
    Clear(u32, ClearKind),
}

impl<B: Payload> Entry<B> {
    fn bytes(&self) -> usize {
        match &self.content {
            Content::Data(data, _) => data.length(),
            Content::Clear(..) => 0,
        }
    }
}

/// A flush under way.
#[derive(Clone, Debug, Hash)]
pub(super) struct FlushOp {
    pub id: RequestId,
    no: u64,
    /// What was complete when it was asked for.
    upto: Seq,
    /// Disks that made everything before it durable.
    durable: SmallVec<[DiskId; 3]>,
}

impl<B: Payload> Writer<B> {
    /// Takes one request while open; one that must wait goes to the queue, which the caller bounds.
    pub(super) fn serve(&mut self, id: RequestId, op: ShardOp<B>, effects: &mut Effects<B>) {
        let is_stream = op.is_stream();
        if is_stream && (!self.waiting.is_empty() || !self.has_room()) {
            self.waiting.push_back((id, op));
            return;
        }
        match op {
            ShardOp::Read { block, count, of } => self.read(id, block, count, of, effects),
            ShardOp::Versions { leaf, of } => self.read_versions(id, leaf, of, effects),
            ShardOp::Write { block, data, crcs } => {
                let count = crcs.len() as u32;
                assert!((1..=REQUEST_BLOCKS_MAX).contains(&count), "{count} blocks");
                assert_eq!(data.length() as u64, u64::from(count) * BLOCK_BYTES);
                self.assert_inside(block, count);
                self.push(id, block, Content::Data(data, crcs), effects);
            }
            ShardOp::Clear { block, count, kind } => {
                assert!(count > 0, "an empty clear");
                self.assert_inside(block, count);
                self.push(id, block, Content::Clear(count, kind), effects);
            }
            ShardOp::Flush => self.flush(id, effects),
        }
    }

    pub(super) fn assert_inside(&self, block: BlockNo, count: u32) {
        assert!(
            u64::from(block.0) + u64::from(count) <= u64::from(self.shard_blocks),
            "{count} blocks at {block} of a shard of {}",
            self.shard_blocks
        );
    }

    fn has_room(&self) -> bool {
        let may_write = self.is_streaming && self.record.was_written;
        may_write && self.window.len() < WINDOW_ENTRIES && self.window_bytes < WINDOW_BYTES
    }

    pub(super) fn serve_waiting(&mut self, effects: &mut Effects<B>) {
        if self.phase != WriterPhase::Open {
            return;
        }
        let mut kept = VecDeque::new();
        for (id, op) in std::mem::take(&mut self.waiting) {
            let is_stream = op.is_stream();
            if is_stream && !self.has_room() {
                kept.push_back((id, op));
            } else {
                self.serve(id, op, effects);
            }
        }
        assert!(self.waiting.is_empty(), "served requests do not queue again");
        self.waiting = kept;
    }

    fn push(&mut self, id: RequestId, block: BlockNo, content: Content<B>, effects: &mut Effects<B>) {
        let (_, first) = self.chosen.expect("open means chosen");
        let seq = if self.last_seq < first {
            first
        } else {
            self.last_seq.next()
        };
        self.last_seq = seq;
        let entry = Entry {
            id,
            seq,
            layer: self.head(),
            block,
            content,
        };
        for index in 0..self.members.len() {
            if self.members[index].is_joined {
                self.send_entry(self.members[index].disk, &entry, effects);
            }
        }
        self.window_bytes += entry.bytes();
        self.window.push_back(entry);
        self.expel_overrun();
    }

    fn send_entry(&mut self, disk: DiskId, entry: &Entry<B>, effects: &mut Effects<B>) {
        let bytes = entry.bytes();
        let (layer, block, seq) = (entry.layer, entry.block, entry.seq);
        let request = match &entry.content {
            Content::Data(data, crcs) => ReplicaRequest::Write {
                layer,
                block,
                seq,
                data: data.clone(),
                crcs: crcs.clone(),
            },
            Content::Clear(count, kind) => ReplicaRequest::Clear {
                layer,
                block,
                count: *count,
                seq,
                kind: *kind,
            },
        };
        let now = self.now;
        let member = self.member_mut(disk).expect("a joined disk is a member");
        if member.lag_entries == 0 {
            member.quiet_since = now;
        }
        member.lag_entries += 1;
        member.lag_bytes += bytes;
        self.send(disk, Purpose::Stream { seq, bytes }, request, effects);
    }

    /// Puts what is in flight back to the front of the queue: the seqs it had are of a past that was given up. It gets new
    /// ones, and with them the layer that is the head by then: nobody was told of it yet, so no snapshot must have it.
    pub(super) fn unsend(&mut self) {
        for entry in std::mem::take(&mut self.window).into_iter().rev() {
            let block = entry.block;
            let op = match entry.content {
                Content::Data(data, crcs) => ShardOp::Write { block, data, crcs },
                Content::Clear(count, kind) => ShardOp::Clear { block, count, kind },
            };
            self.waiting.push_front((entry.id, op));
        }
        self.window_bytes = 0;
        for flush in &mut self.flushes {
            flush.durable.clear();
        }
    }

    /// The seq from which on a member that joins now gets everything; what is before is complete.
    pub(super) fn stream_from(&self) -> Seq {
        let (_, first) = self.chosen.expect("called when chosen");
        self.completed.next().max(first)
    }

    /// Sends a member what is in flight above `end`, and everything from now on.
    pub(super) fn rejoin(&mut self, disk: DiskId, end: Seq, effects: &mut Effects<B>) {
        self.member_mut(disk)
            .expect("a disk that joins is a member")
            .is_joined = true;
        let window = std::mem::take(&mut self.window);
        for entry in window.iter().filter(|entry| entry.seq > end) {
            self.send_entry(disk, entry, effects);
        }
        assert!(self.window.is_empty());
        self.window = window;
    }

    /// A member holds everything completed from now on; it is asked for what waits for members.
    pub(super) fn make_current(&mut self, disk: DiskId, acked: Seq, effects: &mut Effects<B>) {
        let member = self.member_mut(disk).expect("a current disk is a member");
        member.state = MemberState::Current;
        member.acked = member.acked.max(acked);
        let wanted: Vec<u64> = self
            .flushes
            .iter()
            .filter(|flush| !flush.durable.contains(&disk))
            .map(|flush| flush.no)
            .collect();
        for no in wanted {
            self.send_flush(disk, no, effects);
        }
    }

    pub(super) fn acked(&mut self, disk: DiskId, seq: Seq, bytes: usize, effects: &mut Effects<B>) {
        let now = self.now;
        let member = self.member_mut(disk).expect("a disk that answers is a member");
        member.acked = member.acked.max(seq);
        member.lag_entries -= 1;
        member.lag_bytes -= bytes;
        member.quiet_since = now;
        if member.is_current() {
            self.complete(effects);
        }
    }

    /// Up to where `record`'s rule is met.
    fn quorum_end(&self, record: &ShardRecord) -> Option<Seq> {
        let mut acked: SmallVec<[Seq; 3]> = self
            .members
            .iter()
            .filter(|member| member.is_current() && record.in_sync.contains(&member.disk))
            .map(|member| member.acked)
            .collect();
        acked.sort_unstable_by(|a, b| b.cmp(a));
        acked.get(record.write_quorum() - 1).copied()
    }

    /// Completes what the quorum of the record, and of the record about to be, holds.
    pub(super) fn complete(&mut self, effects: &mut Effects<B>) {
        if self.phase != WriterPhase::Open {
            return;
        }
        let Some(mut end) = self.quorum_end(&self.record) else {
            return;
        };
        if let Some(saving) = &self.saving {
            match self.quorum_end(&saving.record) {
                Some(other) => end = end.min(other),
                None => return,
            }
        }
        while let Some(entry) = self.window.front() {
            if entry.seq > end {
                break;
            }
            self.completed = entry.seq;
            self.window_bytes -= entry.bytes();
            effects.push(WriterEffect::Reply(entry.id, Ok(ShardReply::Done)));
            self.window.pop_front();
        }
        self.complete_flushes(effects);
    }

    fn flush(&mut self, id: RequestId, effects: &mut Effects<B>) {
        let no = self.new_no();
        self.flushes.push(FlushOp {
            id,
            no,
            upto: self.completed,
            durable: SmallVec::new(),
        });
        for index in 0..self.members.len() {
            if self.members[index].is_current() {
                self.send_flush(self.members[index].disk, no, effects);
            }
        }
    }

    fn send_flush(&mut self, disk: DiskId, no: u64, effects: &mut Effects<B>) {
        let member = self.member(disk).expect("a disk that flushes is a member");
        let upto = if member.is_joined {
            self.last_seq
        } else {
            member.acked
        };
        self.send(disk, Purpose::Flush { no, upto }, ReplicaRequest::Flush, effects);
    }

    /// Makes a member flush that a change of the record waits for, unless it is at it.
    pub(super) fn flush_for_plan(&mut self, disk: DiskId, effects: &mut Effects<B>) {
        let flushed = self.flushed;
        let is_under_way = self.pending.values().any(|asked| {
            asked.disk == disk && matches!(&asked.purpose, Purpose::Flush { upto, .. } if *upto >= flushed)
        });
        if !is_under_way {
            let no = self.new_no();
            self.send_flush(disk, no, effects);
        }
    }

    pub(super) fn flush_answered(&mut self, no: u64, upto: Seq, disk: DiskId, effects: &mut Effects<B>) {
        if let Some(member) = self.member_mut(disk) {
            member.durable = member.durable.max(upto);
        }
        if let Some(flush) = self.flushes.iter_mut().find(|flush| flush.no == no) {
            flush.durable.push(disk);
            self.complete_flushes(effects);
        }
    }

    fn complete_flushes(&mut self, effects: &mut Effects<B>) {
        if self.phase != WriterPhase::Open || self.flushes.is_empty() {
            return;
        }
        let is_met = |record: &ShardRecord, flush: &FlushOp| {
            let counted = flush.durable.iter().filter(|disk| record.in_sync.contains(disk));
            counted.count() >= record.write_quorum()
        };
        let (record, saving) = (&self.record, self.saving.as_ref());
        let (flushed, completed) = (&mut self.flushed, self.completed);
        self.flushes.retain(|flush| {
            let is_done = is_met(record, flush) && saving.is_none_or(|saving| is_met(&saving.record, flush));
            if is_done {
                // Not above what is complete: it may have been asked for in a past that was given up.
                *flushed = flush.upto.min(completed).max(*flushed);
                effects.push(WriterEffect::Reply(flush.id, Ok(ShardReply::Done)));
            }
            !is_done
        });
    }

    /// Takes a member that is too far behind out of the stream, where the shard can do without it.
    fn expel_overrun(&mut self) {
        for index in 0..self.members.len() {
            let member = &self.members[index];
            let is_over = member.lag_entries > WINDOW_ENTRIES || member.lag_bytes > WINDOW_BYTES;
            if is_over {
                self.expel(self.members[index].disk);
            }
        }
    }

    /// The same for one that says nothing while others go on.
    pub(super) fn expel_stalled(&mut self) {
        let now = self.now;
        let furthest = self.furthest_acked();
        let is_stalled = |member: &Member| match member.state {
            MemberState::Current => {
                let is_behind = member.lag_entries > 0 && member.acked < furthest;
                is_behind && now.since(member.quiet_since) >= STALL || self.withholds_lease(member)
            }
            MemberState::Fencing => now.since(member.quiet_since) >= super::PATIENCE,
            MemberState::Syncing(ref sync) => {
                !sync.has_begun() && now.since(member.quiet_since) >= 2 * super::PATIENCE
            }
            _ => false,
        };
        let stalled: SmallVec<[DiskId; 4]> = self
            .members
            .iter()
            .filter(|member| is_stalled(member))
            .map(|member| member.disk)
            .collect();
        for disk in stalled {
            self.expel(disk);
        }
    }

    fn furthest_acked(&self) -> Seq {
        let current = self.members.iter().filter(|member| member.is_current());
        current.map(|member| member.acked).max().unwrap_or_default()
    }

    fn expel(&mut self, disk: DiskId) {
        let in_sync = &self.record.in_sync;
        let others = self
            .members
            .iter()
            .filter(|member| member.disk != disk && member.is_current() && in_sync.contains(&member.disk))
            .count();
        let is_needed = in_sync.contains(&disk) && others < self.least_in_sync();
        let can_do_without = self.saving.is_none() && !is_needed;
        let member = self.member_mut(disk).expect("an expelled disk is a member");
        if can_do_without {
            member.state = MemberState::Expelled;
            member.is_joined = false;
        }
    }

    /// Tells the world when writes begin or cease to wait for replicas.
    pub(super) fn note_quorum(&mut self, effects: &mut Effects<B>) {
        let reachable = self
            .members
            .iter()
            .filter(|member| !member.is_gone() && self.record.in_sync.contains(&member.disk))
            .filter(|member| match member.state {
                MemberState::Reported(report) => self.chosen.is_some() || report.can_vouch(),
                _ => true,
            })
            .count();
        let needed = self.least_in_sync().max(match self.chosen {
            Some(_) => 1,
            None => self.record.fence_quorum(),
        });
        let is_waiting = reachable < needed;
        if is_waiting != self.is_waiting {
            self.is_waiting = is_waiting;
            effects.push(WriterEffect::Notice(WriterNotice::NoQuorum(is_waiting)));
        }
    }

    pub(super) fn fail(&self, id: RequestId, error: ShardError, effects: &mut Effects<B>) {
        effects.push(WriterEffect::Reply(id, Err(error)));
    }
}
