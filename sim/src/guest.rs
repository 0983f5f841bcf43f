//! A guest of a simulated VDI: asks at random, checks every answer, and asks again after its server was killed.

use std::collections::BTreeMap;

use types::{HeapBlock, LayerId, Lineage, Payload, RequestId, VdiId};
use vdi::{Extent, Op, Outcome, ReadPart, VdiError};

use crate::content;
use crate::past::{Past, layers};
use crate::trace::tell;
use crate::vdi_oracle::{GuestOracle, Moment};
use crate::{Rng, SECTOR_BYTES};

/// Requests a guest has under way at most.
const QUEUE: usize = 16;

/// What the guest waits for.
#[derive(Clone)]
struct Waiting {
    op: Op<HeapBlock>,
    issued: Moment,
}

/// The guest and its oracle.
pub(crate) struct Guest {
    rng: Rng,
    oracle: GuestOracle,
    past: Past,
    pub bytes: u64,
    sector_bytes: u64,
    shard_bytes: u64,
    waiting: BTreeMap<u64, Waiting>,
    /// Requests at a daemon that was taken over.
    zombies: BTreeMap<u64, Waiting>,
    next_request: u64,
    next_version: u64,
    /// Where each version was written: what must not be seen in parts.
    written: BTreeMap<u64, std::ops::Range<u64>>,
    /// Everything in the same few blocks, as when several queues fight over one.
    is_crowded: bool,
    /// Whether an unreadable block may be reported: only while the world keeps the last good copy away.
    pub may_see_errors: bool,
    pub answers: u64,
    pub errors: u64,
    /// Snapshots cut, and answers about them.
    pub cuts: u64,
    pub past_answers: u64,
}

impl Guest {
    pub fn new(seed: u64, bytes: u64, sector_bytes: u64, shard_bytes: u64) -> Guest {
        let mut oracle = GuestOracle::default();
        oracle.resize(bytes / SECTOR_BYTES);
        Guest {
            rng: Rng::new(seed),
            oracle,
            past: Past::default(),
            bytes,
            sector_bytes,
            shard_bytes,
            waiting: BTreeMap::new(),
            zombies: BTreeMap::new(),
            next_request: 1,
            next_version: 1,
            written: BTreeMap::new(),
            is_crowded: false,
            may_see_errors: false,
            answers: 0,
            errors: 0,
            cuts: 0,
            past_answers: 0,
        }
    }

    /// From now on requests fight over the same few blocks.
    pub fn crowd(&mut self) {
        self.is_crowded = true;
    }

    pub fn resized(&mut self, bytes: u64) {
        self.bytes = bytes;
        self.oracle.resize(bytes / SECTOR_BYTES);
    }

    pub fn waits(&self) -> usize {
        self.waiting.len()
    }

    pub fn wants_more(&self) -> bool {
        self.waiting.len() < QUEUE
    }

    /// First request that waits, in words.
    pub fn oldest(&self) -> String {
        match self.waiting.iter().next() {
            Some((id, waiting)) => format!("{id}: {}", in_words(&waiting.op)),
            None => "nothing".into(),
        }
    }

    pub fn may_cut(&self) -> bool {
        self.past.may_cut()
    }

    /// A cut: what is up to `highest` becomes a snapshot, and the head reads `lineage`.
    pub fn cut(&mut self, highest: LayerId, lineage: Lineage) -> (RequestId, Op<HeapBlock>) {
        let (id, op) = self.register(Op::Cut { lineage });
        self.past.cut(highest, self.oracle.possible(), id.0);
        self.cuts += 1;
        (id, op)
    }

    /// Every snapshot that can be read.
    pub fn snapshots(&self) -> Vec<LayerId> {
        self.past.made()
    }

    /// A read of a snapshot of the VDI.
    pub fn ask_past(&mut self, of: Lineage, offset: u64, length: u64) -> (RequestId, Op<HeapBlock>) {
        let of = Some(of);
        self.register(Op::Read { offset, length, of })
    }

    /// A question about some snapshot, if there is one.
    pub fn ask_some_past(&mut self, vdi: VdiId) -> Option<(RequestId, Op<HeapBlock>)> {
        let made = self.past.made();
        if made.is_empty() {
            return None;
        }
        let of = Some(layers(vdi, self.rng.pick(&made)));
        let op = if self.rng.chance(3, 4) {
            let (offset, length) = self.range(512 << 10);
            Op::Read { offset, length, of }
        } else {
            let (offset, length) = self.range(self.bytes);
            Op::Extents { offset, length, of }
        };
        Some(self.register(op))
    }

    /// The daemon died or was taken over. A cut is the daemon's own: nobody asks for it again.
    pub fn daemon_gone(&mut self) {
        self.past.abandon();
        self.waiting
            .retain(|_, waiting| !matches!(waiting.op, Op::Cut { .. }));
    }

    /// Power is lost: the guest and its requests are gone.
    pub fn lose_power(&mut self) {
        self.waiting.clear();
        self.oracle.lose_power();
    }

    /// Another daemon serves the guest from now on; what waits stays with the old one.
    pub fn taken_over(&mut self) {
        self.zombies.append(&mut self.waiting);
    }

    /// Something for the old daemon to do: what it completes must be as good as any other write.
    pub fn zombie_asks(&mut self) -> Option<(RequestId, Op<HeapBlock>)> {
        if self.zombies.len() >= QUEUE {
            return None;
        }
        let op = if self.rng.chance(3, 4) {
            self.write()
        } else {
            Op::Flush
        };
        let (id, op) = self.register(op);
        let waiting = self.waiting.remove(&id.0).expect("just registered");
        self.zombies.insert(id.0, waiting);
        Some((id, op))
    }

    /// The old daemon's answer. Its reads may be old, its flushes are not counted on; a write that it completes is
    /// completed.
    pub fn answered_by_zombie(&mut self, id: RequestId, is_ok: bool) {
        let waiting = self
            .zombies
            .remove(&id.0)
            .expect("an answer to something asked once");
        tell(|| format!("  guest {id}: the zombie says {is_ok}"));
        for (sectors, _, _) in effects_of(&waiting.op) {
            self.oracle.complete(id.0, sectors, false, !is_ok);
        }
    }

    /// The old daemon is gone; what it had not answered may have happened.
    pub fn zombie_gone(&mut self) {
        for (id, waiting) in std::mem::take(&mut self.zombies) {
            for (sectors, _, _) in effects_of(&waiting.op) {
                self.oracle.complete(id, sectors, false, true);
            }
        }
    }

    /// The ring's requests that have no answer yet, in ring order: what a restarted server finds.
    pub fn replay(&self) -> Vec<(RequestId, Op<HeapBlock>)> {
        self.waiting
            .iter()
            .map(|(id, waiting)| (RequestId(*id), waiting.op.clone()))
            .collect()
    }

    /// Something to do.
    pub fn ask(&mut self) -> (RequestId, Op<HeapBlock>) {
        let op = match self.rng.below(100) {
            0..=39 => self.write(),
            40..=69 => {
                let (offset, length) = self.range(512 << 10);
                Op::Read {
                    offset,
                    length,
                    of: None,
                }
            }
            70..=79 => Op::Flush,
            80..=86 => {
                let (offset, length) = self.range(self.bytes);
                Op::Discard { offset, length }
            }
            87..=94 => {
                let (offset, length) = self.range(self.bytes);
                let fua = self.rng.chance(1, 4);
                Op::WriteZeroes { offset, length, fua }
            }
            _ => {
                let (offset, length) = self.range(self.bytes);
                Op::Extents {
                    offset,
                    length,
                    of: None,
                }
            }
        };
        self.register(op)
    }

    /// A read of a given range, checked like any other.
    pub fn ask_read(&mut self, offset: u64, length: u64) -> (RequestId, Op<HeapBlock>) {
        let of = None;
        self.register(Op::Read { offset, length, of })
    }

    /// A write of one sector.
    pub fn ask_write(&mut self, offset: u64) -> (RequestId, Op<HeapBlock>) {
        let op = self.write_to(offset, self.sector_bytes);
        self.register(op)
    }

    /// A write of `length` bytes.
    pub fn ask_long_write(&mut self, offset: u64, length: u64) -> (RequestId, Op<HeapBlock>) {
        let op = self.write_to(offset, length);
        self.register(op)
    }

    /// The disk was deleted: nobody answers any more.
    pub fn forget(&mut self) {
        self.waiting.clear();
    }

    /// A flush.
    pub fn ask_flush(&mut self) -> (RequestId, Op<HeapBlock>) {
        self.register(Op::Flush)
    }

    fn register(&mut self, op: Op<HeapBlock>) -> (RequestId, Op<HeapBlock>) {
        let id = self.next_request;
        self.next_request += 1;
        let issued = self.oracle.moment();
        for (sectors, value, is_sure) in effects_of(&op) {
            self.oracle.write(id, sectors, value, is_sure);
        }
        tell(|| format!("  guest {id}: {}", in_words(&op)));
        self.waiting.insert(
            id,
            Waiting {
                op: op.clone(),
                issued,
            },
        );
        (RequestId(id), op)
    }

    fn write(&mut self) -> Op<HeapBlock> {
        let (offset, length) = self.range(256 << 10);
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

    /// Small ranges mostly, in a few hot places mostly, and across the borders of shards often.
    fn range(&mut self, most: u64) -> (u64, u64) {
        let sectors = self.bytes / self.sector_bytes;
        let most = (most / self.sector_bytes).min(sectors);
        if self.is_crowded && self.rng.chance(7, 8) {
            let few = (4 * 4096 / self.sector_bytes).min(sectors);
            let count = self.rng.between(1, few.min(most));
            let first = self.rng.below(few - count + 1);
            return (first * self.sector_bytes, count * self.sector_bytes);
        }
        let count = match self.rng.below(12) {
            0..=5 => self.rng.between(1, 8),
            6..=9 => self.rng.between(1, 64),
            10 => (4096 / self.sector_bytes) * self.rng.between(1, 16),
            _ => self.rng.between(1, most),
        };
        let count = count.min(most);
        let shard_sectors = self.shard_bytes / self.sector_bytes;
        let from = match self.rng.below(4) {
            0 => self.rng.below(sectors),
            1 => {
                let border = self.rng.between(1, sectors.div_ceil(shard_sectors)) * shard_sectors;
                border.saturating_sub(self.rng.below(2 * count + 1))
            }
            2 => self.rng.below(sectors.div_ceil(shard_sectors)) * shard_sectors + self.rng.below(64),
            _ => 4096 / self.sector_bytes * self.rng.below(64),
        };
        (
            from.min(sectors - count) * self.sector_bytes,
            count * self.sector_bytes,
        )
    }

    /// The server's answer; panics where it breaks a promise. `has_quorum`: every shard could complete writes at
    /// that moment.
    pub fn answered(
        &mut self,
        id: RequestId,
        result: Result<Outcome<HeapBlock>, VdiError>,
        has_quorum: bool,
    ) {
        let waiting = self.waiting.remove(&id.0);
        let Waiting { op, issued } =
            waiting.unwrap_or_else(|| panic!("an answer to {id}, which nobody waits for"));
        self.answers += 1;
        let outcome = match result {
            Ok(outcome) => outcome,
            Err(error) => {
                tell(|| format!("  guest {id}: failed: {error}"));
                assert!(
                    self.may_see_errors && matches!(error, VdiError::Unreadable { .. }),
                    "guest {id}: {} failed: {error}",
                    in_words(&op)
                );
                self.errors += 1;
                self.past.ended(id.0);
                for (sectors, _, _) in effects_of(&op) {
                    self.oracle.complete(id.0, sectors, false, true);
                }
                return;
            }
        };
        tell(|| format!("  guest {id}: done"));
        self.past.ended(id.0);
        match (&op, outcome) {
            (
                Op::Read {
                    offset,
                    length,
                    of: Some(of),
                },
                Outcome::Read(parts),
            ) => self.check_past(id, of, *offset, *length, &parts),
            (
                Op::Extents {
                    offset, of: Some(of), ..
                },
                Outcome::Extents(extents),
            ) => self.check_past_extents(id, of, *offset, &extents),
            (Op::Read { offset, length, .. }, Outcome::Read(parts)) => {
                self.check_read(id, *offset, *length, &parts, issued, has_quorum);
            }
            (Op::Extents { offset, length, .. }, Outcome::Extents(extents)) => {
                self.check_extents(id, *offset, *length, &extents, issued);
            }
            (Op::Flush | Op::Cut { .. }, Outcome::Done) => {
                let oldest = self.waiting.values().map(|w| w.issued).min();
                self.oracle.flushed(issued, oldest.unwrap_or(Moment::MAX));
            }
            (Op::Write { fua, .. } | Op::WriteZeroes { fua, .. }, Outcome::Done) => self.done(id, &op, *fua),
            (Op::Discard { .. }, Outcome::Done) => self.done(id, &op, false),
            (op, outcome) => panic!("guest {id}: {} brought {outcome:?}", in_words(op)),
        }
    }

    fn done(&mut self, id: RequestId, op: &Op<HeapBlock>, is_durable: bool) {
        for (sectors, _, _) in effects_of(op) {
            self.oracle.complete(id.0, sectors, is_durable, false);
        }
    }

    fn check_past(
        &mut self,
        id: RequestId,
        of: &Lineage,
        offset: u64,
        length: u64,
        parts: &[ReadPart<HeapBlock>],
    ) {
        let bytes = flat(parts);
        assert_eq!(
            bytes.len() as u64,
            length,
            "guest {id}: length of a read at {offset}"
        );
        self.past_answers += 1;
        for (sector, got) in (offset / SECTOR_BYTES..).zip(bytes.chunks(SECTOR_BYTES as usize)) {
            let result = match content::sector_version(sector, got) {
                Some(version) => self.past.read(of, sector, version),
                None => Err(format!("sector {sector} holds what nobody wrote there")),
            };
            if let Err(why) = result {
                panic!("guest {id}: a read of {length} B at {offset} lied: {why}");
            }
        }
    }

    fn check_past_extents(&mut self, id: RequestId, of: &Lineage, offset: u64, extents: &[Extent]) {
        self.past_answers += 1;
        let mut at = offset;
        for extent in extents {
            let to = at + extent.length;
            for sector in at / SECTOR_BYTES..to / SECTOR_BYTES {
                assert!(
                    extent.is_data || self.past.may_be_empty(of, sector),
                    "guest {id}: extents call sector {sector} of the snapshot {of} empty, it holds data"
                );
            }
            at = to;
        }
    }

    fn check_read(
        &mut self,
        id: RequestId,
        offset: u64,
        length: u64,
        parts: &[ReadPart<HeapBlock>],
        issued: Moment,
        has_quorum: bool,
    ) {
        let bytes = flat(parts);
        assert_eq!(
            bytes.len() as u64,
            length,
            "guest {id}: length of a read at {offset}"
        );
        let mut seen = Vec::new();
        for (i, got) in bytes.chunks(SECTOR_BYTES as usize).enumerate() {
            let sector = offset / SECTOR_BYTES + i as u64;
            let result = match content::sector_version(sector, got) {
                Some(version) => {
                    seen.push((sector, version));
                    self.oracle.read(sector, version, issued, has_quorum)
                }
                None => Err(format!(
                    "sector {sector} holds what nobody wrote there: {:02x?}",
                    &got[..16]
                )),
            };
            if let Err(why) = result {
                panic!("guest {id}: a read of {length} B at {offset} lied: {why}");
            }
        }
        for block in seen.chunk_by(|a, b| a.0 / 8 == b.0 / 8) {
            self.check_block(id, block);
        }
    }

    /// A write changes a block at once, and a read sees a block at one moment: where two writes cover the same two
    /// sectors of a block, a read never sees the one in this sector and the other in that.
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
                    "guest {id}: block {} is torn between versions {version} and {other}: {block:?}",
                    at / 8
                );
            }
        }
    }

    fn check_extents(&mut self, id: RequestId, offset: u64, length: u64, extents: &[Extent], issued: Moment) {
        let mut at = offset;
        for extent in extents {
            let to = at + extent.length;
            if !extent.is_data {
                for sector in at / SECTOR_BYTES..to / SECTOR_BYTES {
                    assert!(
                        self.oracle.may_be_empty(sector, issued),
                        "guest {id}: extents call sector {sector} empty, it holds data"
                    );
                }
            }
            at = to;
        }
        assert!(
            at > offset && at <= offset + length,
            "guest {id}: extents of {length} B at {offset} end at {at}"
        );
    }
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

/// Which sectors a request changes, to which version, and whether surely: a discard may leave the parts of
/// blocks at its edges as they were.
pub(crate) fn effects_of(op: &Op<HeapBlock>) -> Vec<(std::ops::Range<u64>, u64, bool)> {
    let sectors = |from: u64, to: u64| from / SECTOR_BYTES..to / SECTOR_BYTES;
    match op {
        Op::Write { offset, data, .. } => {
            let version = u64::from_le_bytes(data.bytes()[..8].try_into().expect("eight bytes"));
            vec![(sectors(*offset, offset + data.length() as u64), version, true)]
        }
        Op::WriteZeroes { offset, length, .. } => vec![(sectors(*offset, offset + length), 0, true)],
        Op::Discard { offset, length } => {
            let end = offset + length;
            let first = offset.next_multiple_of(4096).min(end);
            let last = (end - end % 4096).max(first);
            let edges = [(*offset, first, false), (first, last, true), (last, end, false)];
            edges
                .into_iter()
                .filter(|(from, to, _)| from < to)
                .map(|(from, to, is_sure)| (sectors(from, to), 0, is_sure))
                .collect()
        }
        Op::Read { .. } | Op::Flush | Op::Extents { .. } | Op::Cut { .. } => Vec::new(),
    }
}

pub(crate) fn in_words(op: &Op<HeapBlock>) -> String {
    match op {
        Op::Read { offset, length, of } => format!("read {length} B at {offset} {}", whose(of.as_ref())),
        Op::Write { offset, data, fua } => format!("write {} B at {offset}, fua {fua}", data.length()),
        Op::Flush => "flush".into(),
        Op::Discard { offset, length } => format!("discard {length} B at {offset}"),
        Op::WriteZeroes { offset, length, fua } => format!("zero {length} B at {offset}, fua {fua}"),
        Op::Extents { offset, length, of } => {
            format!("extents of {length} B at {offset} {}", whose(of.as_ref()))
        }
        Op::Cut { lineage } => format!("cut, the head reads {lineage}"),
    }
}

fn whose(of: Option<&Lineage>) -> String {
    of.map_or_else(String::new, |of| format!("of {of}"))
}
