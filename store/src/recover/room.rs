//! Room for the next start. A recovery takes a free segment, so it must leave one behind: a daemon that dies again
//! and again before its cleaner gets anywhere would use up one segment each time, and a full disk has few.
//!
//! Where few are free, what still counts in the emptiest segments is moved into the one just opened, as cleaning
//! would do it. A crash in between is no harm: the moved entries say nothing that their originals do not say, and
//! those stay where they are until a checkpoint without them is durable. So the next recovery may take the very
//! segment again (`Plan::forget_moves`).

use std::collections::BTreeSet;

use edge::AlignedBlock;
use types::{BLOCK_BYTES, BlockNo, BlockSum, LayerId, Seq, ShardId, SumKey};

use super::{FREE_WANTED, OpenSegment, RecoverError, Replay};
use crate::batch::{BATCH_BLOCKS_MAX, Entry, FLAG_NO_END, FLAG_RELOCATED, Header, Kind, birth, header_bytes};
use crate::leaf::{Slot, State};
use crate::moving::without_repeats;
use crate::read::kind_of;
use crate::scan::{Found, SegmentScan, find_segment};
use crate::segment::Stage;

/// Entries without data that fit into a header, about: what notes add to the space that moving takes.
const NOTES_PER_BLOCK: u32 = 96;

/// Batches to be, with the content of their blocks.
struct Moves {
    batches: Vec<(Header, Vec<u8>)>,
    template: Header,
    /// Births of the notes among them: what was moved before may lie in a segment many times.
    noted: BTreeSet<u64>,
}

impl Moves {
    fn new(template: Header) -> Moves {
        Moves {
            batches: Vec::new(),
            template,
            noted: BTreeSet::new(),
        }
    }

    fn blocks(&self) -> u32 {
        self.batches.iter().map(|(header, _)| header.blocks()).sum()
    }

    fn data_blocks(&self) -> u32 {
        let blocks = self.batches.iter().map(|(header, _)| header.sums.len() as u32);
        blocks.sum()
    }

    fn push(&mut self, mut entry: Entry, block: Option<(u32, &[u8])>, inline: &[u8]) {
        let sums = usize::from(block.is_some());
        let has_room = self.batches.last().is_some_and(|(header, _)| {
            let bytes = header_bytes(
                header.entries.len() + 1,
                header.sums.len() + sums,
                header.inline.len() + inline.len(),
            );
            bytes as u64 <= BLOCK_BYTES && header.sums.len() + sums <= BATCH_BLOCKS_MAX
        });
        if !has_room {
            let mut header = self.template.clone();
            header.number += self.batches.len() as u64;
            header.complete_upto = header.number - 1;
            self.batches.push((header, Vec::new()));
        }
        let (header, data) = self.batches.last_mut().expect("just made");
        if entry.kind == Kind::SetEnd {
            entry.birth = birth(header.number, header.entries.len());
        }
        let goes_on = header.entries.last_mut().filter(|last| {
            let next = Entry {
                block: last.block + last.count,
                count: 1,
                ..**last
            };
            entry.kind.is_blocks() && next == entry && BlockNo(entry.block).slot() != 0
        });
        match goes_on {
            Some(last) => last.count += 1,
            None => header.entries.push(entry),
        }
        header.inline.extend_from_slice(inline);
        if let Some((sum, content)) = block {
            header.sums.push(sum);
            data.extend_from_slice(content);
        }
    }
}

impl Replay<'_> {
    /// Moves what counts out of the emptiest segments until a few are free or will be.
    pub(super) fn make_room(&mut self, open: &mut OpenSegment) -> Result<(), RecoverError> {
        self.empty_some(open)?;
        // A look at a leaf empties what a drop left in it, and counts that: the index must know of both or neither.
        if self.leaves.values().any(|(_, is_dirty)| *is_dirty) {
            self.save()?;
        }
        Ok(())
    }

    fn empty_some(&mut self, open: &mut OpenSegment) -> Result<(), RecoverError> {
        // Some of it cannot be read, or it is fuller than it looked. Cleaning deals with such.
        let mut passed_over: BTreeSet<u32> = BTreeSet::new();
        loop {
            let segments = &self.plan.ledger.segments;
            if segments.free_count() as usize + segments.emptied() >= FREE_WANTED {
                return Ok(());
            }
            let left = segments.geometry.segment_blocks - open.next;
            let victim = segments
                .iter()
                .filter(|(index, segment)| segment.stage == Stage::Closed && !passed_over.contains(index))
                .filter(|(_, segment)| segment.live < left)
                .min_by_key(|(_, segment)| {
                    (segment.live + segment.notes / NOTES_PER_BLOCK, segment.generation)
                });
            let Some((victim, _)) = victim else {
                return Ok(());
            };
            let moves = self.collect(victim, open)?;
            if self.plan.ledger.segments.get(victim).stage != Stage::Closed {
                // Emptied by what was dropped.
                continue;
            }
            match moves.filter(|moves| moves.blocks() <= left) {
                Some(moves) => self.carry_out(victim, &moves, open)?,
                None => drop(passed_over.insert(victim)),
            }
        }
    }

    /// Everything in a segment that is somebody's last word; `None` if a block does not match its sum.
    fn collect(&mut self, victim: u32, open: &OpenSegment) -> Result<Option<Moves>, RecoverError> {
        let known = *self.plan.ledger.segments.get(victim);
        let key = find_segment(self.disk, self.superblock, victim).key();
        let Some(key) = key.filter(|key| key.generation == known.generation) else {
            return Ok(None);
        };
        let number = self.last + 1;
        let mut moves = Moves::new(Header {
            key: open.key,
            number,
            complete_upto: number - 1,
            durable_upto: self.last,
            entries: Vec::new(),
            sums: Vec::new(),
            inline: Vec::new(),
        });
        let mut ends: BTreeSet<ShardId> = BTreeSet::new();
        let mut clears = Vec::new();
        let mut scan = SegmentScan::new(self.plan.ledger.segments.geometry, victim, key);
        while let Some(found) = scan.next_batch(self.disk) {
            for (entry, first_sum, _) in found.header.walk() {
                let address = found.address + 1 + first_sum as u64;
                if entry.kind == Kind::Data {
                    if !self.collect_blocks(entry, address, &mut moves)? {
                        return Ok(None);
                    }
                } else if entry.kind.is_blocks() {
                    clears.push(*entry);
                } else {
                    self.collect_note(entry, &mut moves);
                }
                if self.says_the_end(entry) {
                    ends.insert(entry.shard_id());
                }
            }
        }
        without_repeats(&mut clears);
        for entry in &clears {
            if !self.collect_blocks(entry, 0, &mut moves)? {
                return Ok(None);
            }
        }
        let live = self.plan.ledger.segments.get(victim).live;
        if scan.unreadable > 0 || moves.data_blocks() != live {
            return Ok(None);
        }
        for id in ends {
            let entry = Entry {
                kind: Kind::SetEnd,
                flags: FLAG_RELOCATED,
                shard: id.to_u64(),
                layer: 0,
                block: 0,
                count: 0,
                seq: self.plan.ledger.shards[&id].end,
                birth: 0,
            };
            moves.push(entry, None, &[]);
        }
        Ok(Some(moves))
    }

    fn says_the_end(&self, entry: &Entry) -> bool {
        let Some(shard) = self.plan.ledger.shards.get(&entry.shard_id()) else {
            return false;
        };
        let says = match entry.kind {
            Kind::SetEnd => entry.birth == shard.end_birth,
            kind => kind.is_blocks() && entry.advances_end() && entry.seq >= shard.end,
        };
        says && shard.is_known && entry.birth >= shard.drop_birth
    }

    fn collect_note(&self, entry: &Entry, moves: &mut Moves) {
        let Some(shard) = self.plan.ledger.shards.get(&entry.shard_id()) else {
            return;
        };
        let inline: &[u8] = match entry.kind {
            Kind::Record if entry.birth == shard.record_birth && shard.is_known => &shard.record,
            Kind::Drop if entry.birth == shard.drop_birth => &[],
            kind if kind.is_of_layers() && shard.fates.says(entry.birth) => &[],
            Kind::LayersRevision if entry.birth == shard.revision_birth => &[],
            _ => return,
        };
        let moved = Entry {
            flags: entry.flags | FLAG_RELOCATED,
            ..*entry
        };
        if moves.noted.insert(entry.birth) {
            moves.push(moved, None, inline);
        }
    }

    /// False if a block that counts is not what it should be.
    fn collect_blocks(
        &mut self,
        entry: &Entry,
        address: u64,
        moves: &mut Moves,
    ) -> Result<bool, RecoverError> {
        for piece in self.pieces_of(entry) {
            self.load(piece.key)?;
            for index in 0..piece.count {
                let (leaf, _) = self.leaves.get(&piece.key).expect("just loaded");
                let slot = leaf.get(piece.slot + index);
                let address = address + (piece.index as usize + index) as u64;
                let block = entry.block + (piece.index as usize + index) as u32;
                if entry.kind == Kind::Void {
                    if leaf.has_void(piece.slot + index, entry.birth) {
                        let moved = Entry {
                            flags: entry.flags | FLAG_RELOCATED,
                            block,
                            count: 1,
                            ..*entry
                        };
                        moves.push(moved, None, &[]);
                    }
                    continue;
                }
                let is_current = match slot.state {
                    State::Absent => false,
                    State::Data => entry.kind == Kind::Data && slot.address == address,
                    _ => entry.kind != Kind::Data && slot.birth == entry.birth,
                };
                if is_current && !self.push_block(entry, block, slot, moves) {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    fn push_block(&self, entry: &Entry, block: u32, slot: Slot, moves: &mut Moves) -> bool {
        let moved = Entry {
            kind: kind_of(slot.state),
            flags: FLAG_RELOCATED | if slot.is_no_end { FLAG_NO_END } else { 0 },
            block,
            count: 1,
            seq: slot.seq,
            birth: slot.birth,
            ..*entry
        };
        if slot.state != State::Data {
            moves.push(moved, None, &[]);
            return true;
        }
        let mut content = AlignedBlock::zeroed();
        let key = SumKey {
            shard: entry.shard_id(),
            layer: LayerId(entry.layer),
            block: BlockNo(block),
            seq: Seq(slot.seq),
        };
        let is_read = self
            .disk
            .read_at(slot.address * BLOCK_BYTES, &mut content.0)
            .is_ok();
        if !is_read || types::bind(key, types::crc32c(&content.0)) != BlockSum(slot.sum) {
            return false;
        }
        moves.push(moved, Some((slot.sum, &content.0)), &[]);
        true
    }

    /// Logs the moves, has the index say so, and frees the segment they came from.
    fn carry_out(&mut self, victim: u32, moves: &Moves, open: &mut OpenSegment) -> Result<(), RecoverError> {
        let start = self.plan.ledger.segments.geometry.start(open.index);
        let mut written = Vec::new();
        for (header, data) in &moves.batches {
            let address = start + u64::from(open.next);
            let mut bytes = header.encode().0.to_vec();
            bytes.extend_from_slice(data);
            self.disk.write_at(address * BLOCK_BYTES, &bytes)?;
            open.next += header.blocks();
            written.push(Found {
                header: header.clone(),
                address,
                skipped: 0,
            });
        }
        self.disk.sync()?;
        for found in &written {
            self.apply(found, open.index)?;
        }
        self.plan.ledger.segments.forget_notes(victim);
        self.save()?;
        // Nobody may use an index again that still refers to it; the log says so only at the next checkpoint.
        self.superblock.checkpoint = self.plan.meta.id;
        self.superblock.generation += 1;
        self.superblock.write(self.disk)?;
        self.plan.ledger.segments.release_emptied(victim);
        Ok(())
    }
}
