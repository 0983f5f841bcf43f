//! The guests of one virtual disk: the one that is attached now, and those before it that live on.
//!
//! All of them are held against one history of each sector ([`GuestOracle`]): whoever reads sees the last completed
//! write of whomever. That is linearizability across hosts. Beside it: a request that is asked of an old
//! writer after a newer guest was told anything about the same shard is never completed.

use std::collections::{BTreeMap, BTreeSet};

use types::{HeapBlock, LayerId, Lineage, Payload, RequestId, VdiId};
use vdi::{Op, Outcome, ReadPart, VdiError};

use super::At;
use crate::content;
use crate::guest::{effects_of, in_words};
use crate::past::{Past, layers};
use crate::trace::tell;
use crate::vdi_oracle::{GuestOracle, Moment};
use crate::{Rng, SECTOR_BYTES};

/// Requests one guest has under way at most.
const QUEUE: usize = 8;

/// Whether a writer that was overtaken may answer reads with what was true before (docs/decisions/0015).
const OVERTAKEN_MAY_READ: bool = false;

struct Waiting {
    op: Op<HeapBlock>,
    issued: Moment,
    by: u64,
    /// A newer guest had been told something about one of its shards when it was asked.
    is_late: bool,
    /// Its guest left while the virtual disk stayed open at this host, which goes on with it.
    left_at: Option<At>,
}

/// See the module.
pub(super) struct Guests {
    rng: Rng,
    oracle: GuestOracle,
    past: Past,
    pub bytes: u64,
    sector_bytes: u64,
    shard_bytes: u64,
    waiting: BTreeMap<u64, Waiting>,
    next_request: u64,
    next_version: u64,
    written: BTreeMap<u64, std::ops::Range<u64>>,
    /// Of each shard, the newest guest that was told something about it.
    told: BTreeMap<u64, u64>,
    /// The guest that is attached; older ones have lower numbers.
    pub newest: u64,
    is_crowded: bool,
    /// Many flushes.
    is_careful: bool,
    pub answers: u64,
    /// Answers to guests that are not the newest.
    pub late_answers: u64,
    /// Of them, writes that were completed.
    pub late_writes: u64,
    /// Snapshots cut, and answers about them.
    pub cuts: u64,
    pub past_answers: u64,
}

impl Guests {
    pub fn new(seed: u64, bytes: u64, sector_bytes: u64, shard_bytes: u64) -> Guests {
        let mut rng = Rng::new(seed);
        let mut oracle = GuestOracle::default();
        oracle.resize(bytes / SECTOR_BYTES);
        Guests {
            is_crowded: rng.chance(1, 3),
            is_careful: rng.chance(1, 3),
            rng,
            oracle,
            past: Past::default(),
            bytes,
            sector_bytes,
            shard_bytes,
            waiting: BTreeMap::new(),
            next_request: 1,
            next_version: 1,
            written: BTreeMap::new(),
            told: BTreeMap::new(),
            newest: 0,
            answers: 0,
            late_answers: 0,
            late_writes: 0,
            cuts: 0,
            past_answers: 0,
        }
    }

    /// A new guest is attached; its number.
    pub fn attach(&mut self) -> u64 {
        self.newest += 1;
        self.abandon_cuts();
        self.newest
    }

    /// A guest is gone; what it had not been answered may have happened.
    pub fn gone(&mut self, by: u64) {
        self.abandon_cuts();
        let gone: Vec<u64> = self.waiting_of(by);
        for id in gone {
            let waiting = self.waiting.remove(&id).expect("just listed");
            self.perhaps(id, &waiting.op);
        }
    }

    /// A guest is gone from a host where the disk stays open: what it asked may happen until it is answered.
    pub fn leaves(&mut self, by: u64, at: At) {
        let of = self.waiting.values_mut().filter(|waiting| waiting.by == by);
        for waiting in of {
            waiting.left_at = Some(at);
        }
    }

    /// The disk is closed at a host: what guests that left had asked there is not worked on any more.
    pub fn closed(&mut self, at: At) {
        self.abandon_cuts();
        let of = self
            .waiting
            .iter()
            .filter(|(_, waiting)| waiting.left_at == Some(at));
        let left: Vec<u64> = of.map(|(id, _)| *id).collect();
        for id in left {
            let waiting = self.waiting.remove(&id).expect("just listed");
            self.perhaps(id, &waiting.op);
        }
    }

    /// It may have happened, and nobody is told.
    fn perhaps(&mut self, id: u64, op: &Op<HeapBlock>) {
        for (sectors, _, _) in effects_of(op) {
            self.oracle.complete(id, sectors, false, true);
        }
    }

    pub fn may_cut(&self) -> bool {
        self.past.may_cut()
    }

    /// A cut: what is up to `highest` becomes a snapshot, and the head reads `lineage`.
    pub fn cut(&mut self, highest: LayerId, lineage: Lineage) -> (RequestId, Op<HeapBlock>) {
        let (id, op) = self.register(self.newest, Op::Cut { lineage });
        self.past.cut(highest, self.oracle.possible(), id.0);
        self.cuts += 1;
        (id, op)
    }

    /// Snapshots that are not made never will be. A cut is a daemon's own: no other asks for it again.
    fn abandon_cuts(&mut self) {
        self.past.abandon();
        self.waiting
            .retain(|_, waiting| !matches!(waiting.op, Op::Cut { .. }));
    }

    /// Every snapshot that can be read.
    pub fn snapshots(&self) -> Vec<LayerId> {
        self.past.made()
    }

    /// The newest guest reads a snapshot of the VDI.
    pub fn ask_past(&mut self, of: Lineage, offset: u64, length: u64) -> (RequestId, Op<HeapBlock>) {
        let of = Some(of);
        self.register(self.newest, Op::Read { offset, length, of })
    }

    /// The same, of some range of some snapshot, if there is one.
    pub fn ask_some_past(&mut self, vdi: VdiId) -> Option<(RequestId, Op<HeapBlock>)> {
        let made = self.past.made();
        if made.is_empty() {
            return None;
        }
        let of = layers(vdi, self.rng.pick(&made));
        let (offset, length) = self.range(64 << 10);
        Some(self.ask_past(of, offset, length))
    }

    /// Power was lost at some disks: what was not flushed is doubtful.
    pub fn lose_power(&mut self) {
        self.oracle.lose_some_power();
    }

    fn waiting_of(&self, by: u64) -> Vec<u64> {
        let of = self.waiting.iter().filter(|(_, waiting)| waiting.by == by);
        of.map(|(id, _)| *id).collect()
    }

    pub fn waits(&self) -> usize {
        self.waiting.len()
    }

    pub fn waits_for(&self, by: u64) -> usize {
        self.waiting.values().filter(|waiting| waiting.by == by).count()
    }

    pub fn wants_more(&self, by: u64) -> bool {
        self.waits_for(by) < QUEUE
    }

    pub fn oldest(&self) -> String {
        match self.waiting.iter().next() {
            Some((id, waiting)) => format!("{id} of guest {}: {}", waiting.by, in_words(&waiting.op)),
            None => "nothing".into(),
        }
    }

    /// A guest's requests without an answer, in the order asked: what a restarted daemon finds in the ring.
    pub fn replay(&self, by: u64) -> Vec<(RequestId, Op<HeapBlock>)> {
        let of = self.waiting.iter().filter(|(_, waiting)| waiting.by == by);
        of.map(|(id, waiting)| (RequestId(*id), waiting.op.clone()))
            .collect()
    }

    /// Something to do for guest `by`.
    pub fn ask(&mut self, by: u64) -> (RequestId, Op<HeapBlock>) {
        let op = match self.rng.below(100) {
            // Its writes wait for ever, perhaps, and fill its queue; what it reads is what this world is for.
            _ if by < self.newest && self.rng.chance(1, 2) => self.read(),
            _ if self.is_careful && self.rng.chance(1, 3) => Op::Flush,
            0..=44 => self.write(),
            45..=77 => self.read(),
            78..=87 => Op::Flush,
            88..=93 => {
                let (offset, length) = self.range(256 << 10);
                Op::Discard { offset, length }
            }
            _ => {
                let (offset, length) = self.range(256 << 10);
                let fua = self.rng.chance(1, 4);
                Op::WriteZeroes { offset, length, fua }
            }
        };
        self.register(by, op)
    }

    pub fn ask_read(&mut self, by: u64, offset: u64, length: u64) -> (RequestId, Op<HeapBlock>) {
        let of = None;
        self.register(by, Op::Read { offset, length, of })
    }

    fn register(&mut self, by: u64, op: Op<HeapBlock>) -> (RequestId, Op<HeapBlock>) {
        let id = self.next_request;
        self.next_request += 1;
        let issued = self.oracle.moment();
        for (sectors, value, is_sure) in effects_of(&op) {
            self.oracle.write_by(by, id, sectors, value, is_sure);
        }
        tell(|| format!("  guest {by} asks {id}: {}", in_words(&op)));
        let is_late = self.shards_of(&op).iter().any(|shard| self.told_of(*shard) > by);
        let waiting = Waiting {
            op: op.clone(),
            issued,
            by,
            is_late,
            left_at: None,
        };
        self.waiting.insert(id, waiting);
        (RequestId(id), op)
    }

    fn told_of(&self, shard: u64) -> u64 {
        self.told.get(&shard).copied().unwrap_or(0)
    }

    /// Shards whose replicas are asked for it; a flush asks for none in particular.
    fn shards_of(&self, op: &Op<HeapBlock>) -> BTreeSet<u64> {
        let (offset, length) = match op {
            Op::Write { offset, data, .. } => (*offset, data.length() as u64),
            Op::Read { offset, length, .. } | Op::WriteZeroes { offset, length, .. } => (*offset, *length),
            // Its parts of blocks at the edges are nobody's.
            Op::Discard { offset, length } => {
                let first = offset.next_multiple_of(4096);
                let end = offset + length;
                (first, (end - end % 4096).saturating_sub(first))
            }
            Op::Flush | Op::Extents { .. } | Op::Cut { .. } => (0, 0),
        };
        // What a snapshot holds is nobody's to take over.
        let length = if is_of_past(op) { 0 } else { length };
        if length == 0 {
            return BTreeSet::new();
        }
        (offset / self.shard_bytes..=(offset + length - 1) / self.shard_bytes).collect()
    }

    fn read(&mut self) -> Op<HeapBlock> {
        let (offset, length) = self.range(64 << 10);
        let of = None;
        Op::Read { offset, length, of }
    }

    fn write(&mut self) -> Op<HeapBlock> {
        let (offset, length) = self.range(64 << 10);
        self.write_to(offset, length)
    }

    fn write_to(&mut self, offset: u64, length: u64) -> Op<HeapBlock> {
        let version = self.next_version;
        self.next_version += 1;
        let first = offset / SECTOR_BYTES;
        let data = content::sectors(first, length / SECTOR_BYTES, version);
        self.written.insert(version, first..first + length / SECTOR_BYTES);
        let fua = self.rng.chance(1, 8);
        Op::Write { offset, data, fua }
    }

    /// Small ranges in a few hot places, so that guests meet each other.
    fn range(&mut self, most: u64) -> (u64, u64) {
        let sectors = self.bytes / self.sector_bytes;
        let most = (most / self.sector_bytes).clamp(1, sectors);
        let count = match self.rng.below(8) {
            0..=4 => self.rng.between(1, 8),
            5..=6 => self.rng.between(1, 24),
            _ => self.rng.between(1, most),
        }
        .min(most);
        let shards = self.bytes.div_ceil(self.shard_bytes);
        let shard = self.rng.below(shards) * (self.shard_bytes / self.sector_bytes);
        let hot = if self.is_crowded { 16 } else { 96 };
        let from = match self.rng.below(8) {
            0 => self.rng.below(sectors),
            1 => shard.saturating_sub(self.rng.below(2 * count + 1)),
            _ => shard + self.rng.below(hot),
        };
        (
            from.min(sectors - count) * self.sector_bytes,
            count * self.sector_bytes,
        )
    }

    /// What a daemon answers to some guest; panics where it breaks a promise. `has_quorum`: every shard could complete
    /// writes at that moment, as far as that daemon knows. Returns whether it said that something is on stable media.
    pub fn answered(
        &mut self,
        id: RequestId,
        result: Result<Outcome<HeapBlock>, VdiError>,
        has_quorum: bool,
    ) -> Result<bool, VdiError> {
        // The guest may have left meanwhile.
        let Some(waiting) = self.waiting.remove(&id.0) else {
            return Ok(false);
        };
        let Waiting {
            op,
            issued,
            by,
            is_late,
            left_at,
        } = waiting;
        if left_at.is_some() {
            self.perhaps(id.0, &op);
            return Ok(false);
        }
        self.answers += 1;
        let is_newest = by == self.newest;
        self.late_answers += u64::from(!is_newest);
        let outcome = match result {
            Ok(outcome) => outcome,
            Err(error) => {
                tell(|| format!("  guest {by} is told of {id}: {error}"));
                self.past.ended(id.0);
                self.perhaps(id.0, &op);
                return Err(error);
            }
        };
        self.past.ended(id.0);
        tell(|| format!("  guest {by} is told that {id} is done"));
        let is_read = matches!(op, Op::Read { .. });
        let may_be_old = is_read && OVERTAKEN_MAY_READ && !is_newest;
        assert!(
            !is_late || may_be_old,
            "guest {by} was told that {id} is done ({}), and guest {} had been told of these shards before it was asked",
            in_words(&op),
            self.newest
        );
        match (&op, outcome) {
            (
                Op::Read {
                    offset,
                    length,
                    of: Some(of),
                },
                Outcome::Read(parts),
            ) => {
                let bytes = flat(&parts);
                assert_eq!(bytes.len() as u64, *length, "guest {by}: length of read {id}");
                self.check_past(id, of, *offset, &bytes);
            }
            (Op::Read { offset, length, .. }, Outcome::Read(parts)) => {
                let bytes = flat(&parts);
                assert_eq!(bytes.len() as u64, *length, "guest {by}: length of read {id}");
                self.check_read(id, *offset, &bytes, issued, has_quorum, may_be_old);
            }
            (Op::Flush | Op::Cut { .. }, Outcome::Done) => {
                let oldest = self.waiting.values().map(|w| w.issued).min();
                self.oracle.flushed_by(by, issued, oldest.unwrap_or(Moment::MAX));
            }
            (Op::Write { fua, .. } | Op::WriteZeroes { fua, .. }, Outcome::Done) => {
                self.late_writes += u64::from(!is_newest);
                self.done(id, &op, *fua);
            }
            (Op::Discard { .. }, Outcome::Done) => self.done(id, &op, false),
            (op, outcome) => panic!("guest {by}: {} brought {outcome:?}", in_words(op)),
        }
        if !may_be_old {
            for shard in self.shards_of(&op) {
                let told = self.told.entry(shard).or_default();
                *told = by.max(*told);
            }
        }
        Ok(matches!(
            op,
            Op::Flush | Op::Write { fua: true, .. } | Op::WriteZeroes { fua: true, .. }
        ))
    }

    fn done(&mut self, id: RequestId, op: &Op<HeapBlock>, is_durable: bool) {
        for (sectors, _, _) in effects_of(op) {
            self.oracle.complete(id.0, sectors, is_durable, false);
        }
    }

    fn check_past(&mut self, id: RequestId, of: &Lineage, offset: u64, bytes: &[u8]) {
        self.past_answers += 1;
        for (sector, got) in (offset / SECTOR_BYTES..).zip(bytes.chunks(SECTOR_BYTES as usize)) {
            let result = match content::sector_version(sector, got) {
                Some(version) => self.past.read(of, sector, version),
                None => Err(format!("sector {sector} holds what nobody wrote there")),
            };
            if let Err(why) = result {
                panic!("read {id} of {} B at {offset} lied: {why}", bytes.len());
            }
        }
    }

    fn check_read(
        &mut self,
        id: RequestId,
        offset: u64,
        bytes: &[u8],
        issued: Moment,
        has_quorum: bool,
        may_be_old: bool,
    ) {
        let mut seen = Vec::new();
        for (i, got) in bytes.chunks(SECTOR_BYTES as usize).enumerate() {
            let sector = offset / SECTOR_BYTES + i as u64;
            let Some(version) = content::sector_version(sector, got) else {
                panic!(
                    "read {id}: sector {sector} holds what nobody wrote there: {:02x?}",
                    &got[..16]
                );
            };
            seen.push((sector, version));
            if may_be_old {
                let is_written_there = |range: &std::ops::Range<u64>| range.contains(&sector);
                assert!(
                    version == 0 || self.written.get(&version).is_some_and(is_written_there),
                    "read {id}: sector {sector} holds version {version}"
                );
            } else if let Err(why) = self.oracle.read(sector, version, issued, has_quorum) {
                panic!("read {id} of {} B at {offset} lied: {why}", bytes.len());
            }
        }
        for block in seen.chunk_by(|a, b| a.0 / 8 == b.0 / 8) {
            self.check_block(id, block);
        }
    }

    /// Of two writes that cover the same two sectors of a block a read never sees one here and the other there.
    fn check_block(&self, id: RequestId, block: &[(u64, u64)]) {
        for (at, version) in block {
            for (other_at, other) in block {
                let covers = |version: &u64, sector: &u64| {
                    self.written
                        .get(version)
                        .is_some_and(|range| range.contains(sector))
                };
                let is_torn = version < other && covers(version, other_at) && covers(other, at);
                assert!(
                    !is_torn,
                    "read {id}: block {} is torn between versions {version} and {other}: {block:?}",
                    at / 8
                );
            }
        }
    }
}

fn is_of_past(op: &Op<HeapBlock>) -> bool {
    matches!(op, Op::Read { of: Some(_), .. })
}

fn flat(parts: &[ReadPart<HeapBlock>]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for part in parts {
        match part {
            ReadPart::Data(data) => bytes.extend_from_slice(data.bytes()),
            ReadPart::Zeros(count) => bytes.resize(bytes.len() + *count as usize, 0),
        }
    }
    bytes
}
