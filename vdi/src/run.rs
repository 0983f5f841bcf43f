//! The life of a request: checked, admitted, claimed, asked piece by piece, answered.

use replication::{ShardError, ShardOp, ShardReply};
use smallvec::SmallVec;
use store::{ClearKind, REQUEST_BLOCKS_MAX};
use types::{BLOCK_BYTES, LEAF_BLOCKS, Lineage, Payload, RequestId, ShardNo};

use crate::extents::{EXTENT_LEAVES_MAX, extents_of};
use crate::partial::{clip, crcs, patch};
use crate::requests::{Ask, Running, Slot, Stage, Work};
use crate::split::{Blocks, Cut, Piece, REQUEST_BYTES_MAX, Span, check, global, locate};
use crate::vdi::{Turn, Vdi};
use crate::{Op, Outcome, VdiError};

/// Questions one request has under way at once: enough for 32 MiB of reads or writes in flight together, and a
/// bound for a discard of a whole disk.
const WINDOW: u32 = 64;

impl<B: Payload> Vdi<B> {
    pub(crate) fn request(&mut self, turn: &mut Turn<'_, B>, id: RequestId, op: Op<B>) {
        if let Op::Cut { lineage } = op {
            return self.cut(turn, id, lineage);
        }
        match self.prepare(id, op) {
            Ok(running) => self.queue.push_back(running),
            Err(error) => self.answer(turn, id, Err(error)),
        }
    }

    /// Checks what the guest sent and works out what is to be done.
    fn prepare(&self, id: RequestId, op: Op<B>) -> Result<Running<B>, VdiError> {
        if self.is_closed {
            return Err(VdiError::Closed);
        }
        let shard_blocks = self.shard_blocks;
        let pieces = |blocks| Cut::new(blocks, shard_blocks, REQUEST_BLOCKS_MAX);
        let clears = |blocks| Cut::new(blocks, shard_blocks, shard_blocks);
        let (work, cut) = match op {
            Op::Read { offset, length, of } => {
                let span = check(offset, length, REQUEST_BYTES_MAX, &self.spec)?;
                let touched = span.touched();
                let work = Work::Read {
                    span,
                    touched,
                    of,
                    parts: SmallVec::new(),
                };
                (work, pieces(touched))
            }
            Op::Write { offset, data, fua } => {
                let span = check(offset, data.length() as u64, REQUEST_BYTES_MAX, &self.spec)?;
                // The tail of an odd disk is an edge like any other: its block needs content behind the end.
                let whole = span.whole(u64::MAX);
                let work = Work::Write {
                    span,
                    data,
                    edges: span.edges(whole),
                    is_fua: fua,
                };
                (work, pieces(whole))
            }
            Op::Flush => (Work::Flush, Cut::empty()),
            Op::Discard { offset, length } => {
                let span = check(offset, length, u64::MAX, &self.spec)?;
                let whole = span.whole(self.spec.bytes);
                let work = Work::Clear {
                    kind: ClearKind::Trim,
                    edges: SmallVec::new(),
                    touched: whole,
                    is_fua: false,
                };
                (work, clears(whole))
            }
            Op::WriteZeroes { offset, length, fua } => {
                let span = check(offset, length, u64::MAX, &self.spec)?;
                let whole = span.whole(self.spec.bytes);
                let work = Work::Clear {
                    kind: ClearKind::Zero,
                    edges: span.edges(whole),
                    touched: span.touched(),
                    is_fua: fua,
                };
                (work, clears(whole))
            }
            Op::Cut { .. } => unreachable!("a cut is no request that waits for others"),
            Op::Extents { offset, length, of } => {
                let span = check(offset, length, u64::MAX, &self.spec)?;
                self.prepare_extents(span, of)?
            }
        };
        Ok(Running::new(id, work, cut))
    }

    fn prepare_extents(&self, span: Span, of: Option<Lineage>) -> Result<(Work<B>, Cut), VdiError> {
        if span.length == 0 {
            // An answer is never empty, so there is none.
            return Err(VdiError::OutOfRange {
                offset: span.offset,
                length: 0,
                size: self.spec.bytes,
            });
        }
        let leaf = u64::from(LEAF_BLOCKS);
        let first = span.touched().first / leaf * leaf;
        let end = span.touched().end.next_multiple_of(leaf);
        let leaves = Blocks {
            first,
            end: end.min(first + EXTENT_LEAVES_MAX * leaf),
        };
        let span = Span {
            offset: span.offset,
            length: span.length.min(leaves.end * BLOCK_BYTES - span.offset),
        };
        let work = Work::Extents {
            span,
            touched: leaves,
            of,
            leaves: SmallVec::new(),
        };
        Ok((work, Cut::new(leaves, self.shard_blocks, LEAF_BLOCKS)))
    }

    pub(crate) fn admit(&mut self, turn: &mut Turn<'_, B>, running: Running<B>) {
        let wanted = running.wanted();
        let slot = self.requests.insert(running);
        let Some((blocks, is_exclusive)) = wanted else {
            return self.begin(turn, slot);
        };
        let (claim, may_run) = self.conflicts.claim(blocks, is_exclusive, slot);
        self.requests.get_mut(slot).claim = Some(claim);
        if may_run {
            self.begin(turn, slot);
        }
    }

    /// The request has its blocks: asks for the old content of its edges, and for everything else.
    pub(crate) fn begin(&mut self, turn: &mut Turn<'_, B>, slot: Slot) {
        let is_closed = self.is_closed;
        let running = self.requests.get_mut(slot);
        assert_eq!(running.stage, Stage::Waiting, "begun twice");
        running.stage = Stage::Content;
        if is_closed {
            running.fail(VdiError::Closed);
            return self.pump(turn, slot);
        }
        let edges: SmallVec<[u64; 2]> = running.edges().iter().map(|edge| edge.block).collect();
        running.under_way += edges.len() as u32;
        for (at, block) in (0u32..).zip(edges) {
            let (shard, block) = locate(block, self.shard_blocks);
            // Through the head's layers as they are now; a cut before it comes back changes only where it is written to.
            let (count, of) = (1, None);
            let op = ShardOp::Read { block, count, of };
            self.ask(turn, shard, Ask::EdgeRead(slot, at), op);
        }
        self.pump(turn, slot);
    }

    /// Asks whatever may be asked now; when nothing is left and everything answered, the stage is over.
    pub(crate) fn pump(&mut self, turn: &mut Turn<'_, B>, slot: Slot) {
        loop {
            let running = self.requests.get_mut(slot);
            if running.under_way >= WINDOW {
                return;
            }
            if running.error.is_some() {
                break;
            }
            match running.stage {
                Stage::Waiting => unreachable!("pumped before it began"),
                Stage::Content => {
                    let Some(piece) = running.cut.next() else { break };
                    let ask = Ask::Piece(slot, running.pieces);
                    running.pieces += 1;
                    running.under_way += 1;
                    let op = self.piece_op(slot, piece);
                    self.ask(turn, piece.shard, ask, op);
                }
                Stage::Syncing => {
                    let Some(shard) = running.to_flush.pop() else {
                        break;
                    };
                    self.join_flush(turn, slot, shard);
                }
            }
        }
        if self.requests.get(slot).under_way == 0 {
            self.stage_over(turn, slot);
        }
    }

    fn piece_op(&self, slot: Slot, piece: Piece) -> ShardOp<B> {
        let Piece { shard, block, count } = piece;
        match &self.requests.get(slot).work {
            Work::Read { of, .. } => ShardOp::Read {
                block,
                count,
                of: of.clone(),
            },
            Work::Write { span, data, .. } => {
                let start = global(shard, block, self.shard_blocks) * BLOCK_BYTES - span.offset;
                let length = u64::from(count) * BLOCK_BYTES;
                let data = if length == span.length {
                    data.clone()
                } else {
                    data.slice(start as usize, length as usize)
                };
                let crcs = crcs(&data);
                ShardOp::Write { block, data, crcs }
            }
            Work::Clear { kind, .. } => ShardOp::Clear {
                block,
                count,
                kind: *kind,
            },
            Work::Extents { of, .. } => ShardOp::Versions {
                leaf: block.leaf(),
                of: of.clone(),
            },
            Work::Flush => unreachable!("a flush has no pieces"),
        }
    }

    /// A writer answered.
    pub(crate) fn answered(
        &mut self,
        turn: &mut Turn<'_, B>,
        shard: ShardNo,
        ask: Ask,
        result: Result<ShardReply<B>, ShardError>,
    ) {
        let slot = match ask {
            Ask::Flush(no, number) => {
                assert_eq!(no, shard, "another shard's flush");
                return self.flush_answered(turn, no, number, result);
            }
            Ask::Piece(slot, _) | Ask::EdgeRead(slot, _) | Ask::EdgeWrite(slot, _) => slot,
        };
        self.requests.get_mut(slot).under_way -= 1;
        match result {
            Err(error) => {
                let error = self.error_of(shard, error);
                self.requests.get_mut(slot).fail(error);
            }
            Ok(reply) => match ask {
                Ask::Piece(_, number) => self.piece_done(slot, shard, number, reply),
                Ask::EdgeRead(_, at) => self.edge_read(turn, slot, at, reply),
                Ask::EdgeWrite(..) => self.mark_dirty(shard),
                Ask::Flush(..) => unreachable!("answered above"),
            },
        }
        self.pump(turn, slot);
    }

    fn piece_done(&mut self, slot: Slot, shard: ShardNo, number: u32, reply: ShardReply<B>) {
        let running = self.requests.get_mut(slot);
        match (&mut running.work, reply) {
            (Work::Read { parts, .. }, ShardReply::Read(read)) => put(parts, number, read),
            (Work::Extents { leaves, .. }, ShardReply::Versions(versions)) => put(leaves, number, versions),
            (Work::Write { .. } | Work::Clear { .. }, ShardReply::Done) => self.mark_dirty(shard),
            (work, reply) => panic!("{reply:?} answers {work:?}"),
        }
    }

    /// The old content of an edge's block came: changes it and sends it back. The claim keeps the block ours.
    fn edge_read(&mut self, turn: &mut Turn<'_, B>, slot: Slot, at: u32, reply: ShardReply<B>) {
        let ShardReply::Read(read) = reply else {
            panic!("{reply:?} answers a read");
        };
        let running = self.requests.get_mut(slot);
        if running.error.is_some() {
            return;
        }
        let edge = running.edges()[at as usize];
        let data = match &running.work {
            Work::Write { data, .. } => Some(data),
            _ => None,
        };
        let data = patch(&read, edge, data);
        running.under_way += 1;
        let (shard, block) = locate(edge.block, self.shard_blocks);
        let crcs = crcs(&data);
        let op = ShardOp::Write { block, data, crcs };
        self.ask(turn, shard, Ask::EdgeWrite(slot, at), op);
    }

    /// Everything asked was answered: on to flushing, or to the front end.
    fn stage_over(&mut self, turn: &mut Turn<'_, B>, slot: Slot) {
        let running = self.requests.get_mut(slot);
        if running.stage == Stage::Content {
            if let Some(claim) = running.claim.take() {
                self.conflicts.release(claim, &mut self.ready);
            }
            let to_flush = self.shards_to_flush(slot);
            let running = self.requests.get_mut(slot);
            if running.error.is_none() && !to_flush.is_empty() {
                running.stage = Stage::Syncing;
                running.to_flush = to_flush;
                return self.pump(turn, slot);
            }
        }
        let running = self.requests.remove(slot);
        self.answer(turn, running.guest, outcome(running));
        self.ended(slot);
    }

    fn shards_to_flush(&self, slot: Slot) -> Vec<ShardNo> {
        let running = self.requests.get(slot);
        if matches!(running.work, Work::Flush) {
            return self.unsynced.iter().rev().copied().collect();
        }
        let Some(blocks) = running.fua().filter(|blocks| !blocks.is_empty()) else {
            return Vec::new();
        };
        let (first, _) = locate(blocks.first, self.shard_blocks);
        let (last, _) = locate(blocks.end - 1, self.shard_blocks);
        (first.0..=last.0).rev().map(ShardNo).collect()
    }

    /// A writer's error in the words of the VDI.
    pub(crate) fn error_of(&self, shard: ShardNo, error: ShardError) -> VdiError {
        match error {
            ShardError::Unreadable { block } => VdiError::Unreadable {
                offset: global(shard, block, self.shard_blocks) * BLOCK_BYTES,
            },
            ShardError::Fenced | ShardError::Closed => VdiError::Closed,
        }
    }
}

/// Puts the answer of piece `number` in its place; answers come in any order.
fn put<T: Default>(places: &mut SmallVec<[T; 1]>, number: u32, answer: T) {
    let at = number as usize;
    if places.len() <= at {
        places.resize_with(at + 1, T::default);
    }
    places[at] = answer;
}

fn outcome<B: Payload>(running: Running<B>) -> Result<Outcome<B>, VdiError> {
    if let Some(error) = running.error {
        return Err(error);
    }
    Ok(match running.work {
        Work::Read {
            span, touched, parts, ..
        } => Outcome::Read(clip(parts, touched, span)),
        Work::Extents {
            span,
            touched,
            leaves,
            ..
        } => Outcome::Extents(extents_of(&leaves, touched, span)),
        Work::Write { .. } | Work::Clear { .. } | Work::Flush => Outcome::Done,
    })
}
