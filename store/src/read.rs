//! Lookups: reads, and the questions resync asks of leaves.
//!
//! A read resolves its blocks leaf by leaf (where several layers have the leaf: `resolve.rs`), holds the segments it
//! found them in, reads each contiguous run at once and checks every block. Runs that almost touch, as small writes one after the other leave them with a
//! header in between, come in one read of the disk. What fails its check is read once more, run by run (the bytes
//! may have been hurt on the way), and then reported, never passed on.

use edge::DiskOp;
use smallvec::SmallVec;
use types::{
    BLOCK_BYTES, BlockNo, LEAF_BLOCKS, LayerId, LeafNo, Lineage, LineageStep, Payload, RequestId, Seq,
    ShardId, SumKey, VdiId,
};

use crate::batch::Kind;
use crate::cache::CacheAt;
use crate::leaf::{Piece, Slot, State, pieces};
use crate::maps::{Source, source};
use crate::resolve::Deep;
use crate::segment::Geometry;
use crate::store::{Io, LeafPlace, Store};
use crate::{
    BlockState, BlockVersion, ClearKind, Effect, LISTED_MAX, LeafKey, REQUEST_BLOCKS_MAX, ReadPart, Reply,
    StoreError,
};

/// Blocks nobody asked for that are read rather than skipped by a second read: 16 KiB take less than the disk
/// takes for an operation.
const GAP_BLOCKS_MAX: u64 = 4;

/// A question under way.
pub(crate) struct Lookup<B> {
    pub(crate) id: RequestId,
    shard: ShardId,
    want: Want<B>,
}

pub(crate) enum Want<B> {
    /// Content, or versions alone.
    Read(Read<B>),
    Changed {
        newer_than: Seq,
        next: (LayerId, LeafNo),
        found: Vec<(LayerId, LeafNo)>,
    },
}

pub(crate) struct Read<B> {
    pub(crate) lineage: Lineage,
    block: u32,
    count: u32,
    /// Blocks whose place is known.
    resolved: u32,
    parts: SmallVec<[Part<B>; 1]>,
    /// What each block is checked against, by position in the request.
    checks: SmallVec<[Check; 1]>,
    spans: SmallVec<[Span; 1]>,
    under_way: usize,
    /// Position of the first bad block.
    bad: Option<u32>,
    /// Where versions were asked for and not content: those of the blocks whose place is known.
    versions: Option<Vec<BlockVersion>>,
    /// What was found of leaves that several layers have.
    pub(crate) deep: Option<Box<Deep>>,
}

/// What a block with data must be: its sum, and the part of its identity that the request does not say.
#[derive(Clone, Copy)]
struct Check {
    seq: u64,
    sum: u32,
    layer: LayerId,
    vdi: VdiId,
}

enum Part<B> {
    Zeros(u32),
    Data {
        address: u64,
        index: u32,
        count: u32,
        content: Option<B>,
    },
}

/// One read of the disk, and the parts it brings.
#[derive(Clone, Copy)]
struct Span {
    address: u64,
    /// Blocks to read, gaps included.
    count: u32,
    first_part: usize,
    /// One behind the last; every part between is data.
    end_part: usize,
    is_second_try: bool,
}

impl<B> Want<B> {
    pub(crate) fn read(lineage: Lineage, block: BlockNo, count: u32) -> Want<B> {
        Want::Read(Read {
            lineage,
            block: block.0,
            count,
            resolved: 0,
            parts: SmallVec::new(),
            checks: SmallVec::new(),
            spans: SmallVec::new(),
            under_way: 0,
            bad: None,
            versions: None,
            deep: None,
        })
    }

    pub(crate) fn versions(lineage: Lineage, leaf: LeafNo) -> Want<B> {
        let mut want = Want::read(lineage, leaf.first_block(), LEAF_BLOCKS);
        if let Want::Read(read) = &mut want {
            read.versions = Some(Vec::new());
        }
        want
    }

    pub(crate) fn changed(newer_than: Seq, from: (LayerId, LeafNo)) -> Want<B> {
        Want::Changed {
            newer_than,
            next: from,
            found: Vec::new(),
        }
    }
}

impl<B> Lookup<B> {
    pub(crate) fn new(id: RequestId, shard: ShardId, want: Want<B>) -> Lookup<B> {
        Lookup { id, shard, want }
    }
}

/// What became of a lookup.
pub(crate) enum Step<B> {
    Answer(Result<Reply<B>, StoreError>),
    /// The disk is at work for it, or a leaf is on its way.
    Wait,
    /// No memory for the leaf it needs.
    Park,
}

impl<B: Payload> Store<B> {
    pub(crate) fn start_lookup(&mut self, lookup: Lookup<B>, effects: &mut Vec<Effect<B>>) {
        if let Want::Read(read) = &lookup.want {
            assert!(
                (1..=REQUEST_BLOCKS_MAX).contains(&read.count),
                "read of {} blocks",
                read.count
            );
        }
        let number = self.lookups.insert(lookup);
        self.drive(number, effects);
    }

    pub(crate) fn resume_parked(&mut self, effects: &mut Vec<Effect<B>>) {
        for number in std::mem::take(&mut self.parked) {
            self.drive(number, effects);
        }
    }

    /// Goes on with a lookup: from its beginning, with the leaves that are here now.
    pub(crate) fn drive(&mut self, number: u64, effects: &mut Vec<Effect<B>>) {
        let lookup = self.lookups.get(number).expect("a lookup under way");
        let step = match lookup.want {
            Want::Read(_) => self.drive_read(number, effects),
            Want::Changed { .. } => self.drive_changed(number, effects),
        };
        match step {
            Step::Answer(answer) => self.answer(number, answer, effects),
            Step::Wait => {}
            Step::Park => self.parked.push_back(number),
        }
    }

    fn answer(&mut self, number: u64, answer: Result<Reply<B>, StoreError>, effects: &mut Vec<Effect<B>>) {
        let mut lookup = self.lookups.remove(number).expect("a lookup under way");
        if let Want::Read(Read { deep: Some(deep), .. }) = &mut lookup.want {
            self.forget_deep(deep);
        }
        effects.push(Effect::Reply(lookup.id, answer));
    }

    pub(crate) fn read_mut(&mut self, number: u64) -> &mut Read<B> {
        match self.lookups.get_mut(number) {
            Some(Lookup {
                want: Want::Read(read),
                ..
            }) => read,
            _ => panic!("no read under way is called {number}"),
        }
    }

    /// Where the leaf of `key` is, if it is here; `None` if it does not exist. Otherwise the lookup waits for it.
    pub(crate) fn leaf_for(
        &mut self,
        number: u64,
        key: LeafKey,
        effects: &mut Vec<Effect<B>>,
    ) -> Result<Option<CacheAt>, Step<B>> {
        match self.locate(key, 0, effects) {
            LeafPlace::Ready(at) => Ok(Some(at)),
            LeafPlace::Nowhere => Ok(None),
            LeafPlace::Loading(at) => {
                self.cache.wait(at, number);
                Err(Step::Wait)
            }
            LeafPlace::NoMemory => Err(Step::Park),
        }
    }

    fn drive_read(&mut self, number: u64, effects: &mut Vec<Effect<B>>) -> Step<B> {
        let lookup = self.lookups.get(number).expect("a lookup under way");
        let shard = lookup.shard;
        let Want::Read(read) = &lookup.want else {
            unreachable!("called for reads")
        };
        if self.ledger.has_fates
            && let Some(lineage) = self.as_merged(shard, &read.lineage)
        {
            self.read_mut(number).lineage = lineage;
            return self.drive_read(number, effects);
        }
        let (block, count, only) = (read.block, read.count, read.lineage.only_layer());
        let (vdi, layer) = only.unwrap_or(read.lineage.newest());
        for piece in pieces(ShardId { vdi, ..shard }, layer, block, count) {
            let step = match self.source(number, only.is_some(), &piece) {
                Source::One(key) => self.read_leaf(number, key, &piece, effects),
                Source::Nowhere => {
                    self.read_mut(number).add_absent(&piece);
                    Ok(())
                }
                Source::Several => {
                    let step = self.resolve(number, &piece, effects);
                    step.map(|()| self.read_mut(number).add_found(&piece))
                }
            };
            if let Err(step) = step {
                // Resolve it all at once later: what is known now may have moved by then.
                self.read_mut(number).forget();
                return step;
            }
        }
        let read = self.read_mut(number);
        if let Some(versions) = read.versions.take() {
            return Step::Answer(Ok(Reply::Versions(versions)));
        }
        if let Some(index) = read.bad {
            let error = read.corrupt(shard, index);
            self.stats.corrupt_blocks += 1;
            return Step::Answer(Err(error));
        }
        let geometry = self.ledger.segments.geometry;
        let read = self.read_mut(number);
        read.plan(&geometry);
        let spans = read.spans.len();
        if spans == 0 {
            return Step::Answer(Ok(read.reply()));
        }
        for at in 0..spans {
            self.read_span(number, at, effects);
        }
        Step::Wait
    }

    /// What a reader sees whose newest layer was merged into another.
    #[cold]
    fn as_merged(&self, shard: ShardId, lineage: &Lineage) -> Option<Lineage> {
        let (vdi, newest) = lineage.newest();
        let home = self.ledger.home(ShardId { vdi, ..shard }, newest);
        if home == newest {
            return None;
        }
        let first = LineageStep::layer(vdi, home);
        if lineage.only_layer().is_some() {
            return Some(Lineage::of_layer(vdi, home));
        }
        let steps: Vec<LineageStep> = [first]
            .into_iter()
            .chain(lineage.steps().iter().copied())
            .collect();
        // At its longest it goes without the number that says nothing any more.
        Lineage::new(&steps).ok()
    }

    /// Where the leaf of a piece is to be looked for; `is_one_layer` if there is nothing to choose from.
    fn source(&mut self, number: u64, is_one_layer: bool, piece: &Piece) -> Source {
        if is_one_layer {
            return Source::One(piece.key);
        }
        let Some(Lookup {
            want: Want::Read(read),
            ..
        }) = self.lookups.get(number)
        else {
            unreachable!("called for reads")
        };
        if read.deep.as_ref().is_some_and(|deep| deep.has(piece)) {
            return Source::Several;
        }
        let (no, leaf) = (piece.key.shard.no, piece.key.leaf);
        source(&self.ledger, &mut self.cache.maps, &read.lineage, no, leaf)
    }

    /// Adds a piece from the one leaf that can have it.
    fn read_leaf(
        &mut self,
        number: u64,
        key: LeafKey,
        piece: &Piece,
        effects: &mut Vec<Effect<B>>,
    ) -> Result<(), Step<B>> {
        let leaf = self.leaf_for(number, key, effects)?;
        let Some(Lookup {
            want: Want::Read(read),
            ..
        }) = self.lookups.get_mut(number)
        else {
            unreachable!("called for reads")
        };
        match leaf {
            None => read.add_absent(piece),
            Some(at) => {
                let leaf = self.cache.leaf(at);
                piece.slots().for_each(|slot| read.add(leaf.get(slot), key));
            }
        }
        Ok(())
    }

    fn read_span(&mut self, number: u64, at: usize, effects: &mut Vec<Effect<B>>) {
        let read = self.read_mut(number);
        read.under_way += 1;
        let Span { address, count, .. } = read.spans[at];
        let segments = &mut self.ledger.segments;
        segments.pin(segments.geometry.find(address).expect("a block of a segment"));
        let operation = DiskOp::Read {
            offset: address * BLOCK_BYTES,
            bytes: count * BLOCK_BYTES as u32,
        };
        let io = Io::Read {
            lookup: number,
            span: at,
        };
        self.submit(io, operation, effects);
    }

    pub(crate) fn read_done(
        &mut self,
        number: u64,
        at: usize,
        data: Option<&B>,
        effects: &mut Vec<Effect<B>>,
    ) {
        let lookup = self
            .lookups
            .get_mut(number)
            .expect("a lookup with a read under way");
        let shard = lookup.shard;
        let Want::Read(read) = &mut lookup.want else {
            unreachable!("only reads read")
        };
        read.under_way -= 1;
        let span = read.spans[at];
        let (known, mut corrupt) = (read.spans.len(), 0);
        for part in span.first_part..span.end_part {
            let Err(bad) = read.accept(shard, span, part, data) else {
                continue;
            };
            if span.is_second_try {
                corrupt += 1;
                read.bad = Some(read.bad.map_or(bad, |other| other.min(bad)));
            } else {
                // Alone: a gap that cannot be read is nobody's loss.
                read.retry(part);
            }
        }
        let spans = read.spans.len();
        let answer = (read.under_way == 0 && spans == known).then(|| match read.bad {
            Some(index) => Err(read.corrupt(shard, index)),
            None => Ok(read.reply()),
        });
        self.stats.corrupt_blocks += corrupt;
        // The first read still holds the segment; the second tries take over from it.
        for at in known..spans {
            self.read_span(number, at, effects);
        }
        let segments = &mut self.ledger.segments;
        segments.unpin(
            segments
                .geometry
                .find(span.address)
                .expect("a block of a segment"),
        );
        if let Some(answer) = answer {
            self.answer(number, answer, effects);
        }
    }

    fn drive_changed(&mut self, number: u64, effects: &mut Vec<Effect<B>>) -> Step<B> {
        loop {
            let lookup = self.lookups.get_mut(number).expect("a lookup under way");
            let shard = lookup.shard;
            let Want::Changed {
                newer_than,
                next,
                found,
            } = &mut lookup.want
            else {
                unreachable!("called for changes")
            };
            let newer_than = *newer_than;
            let shards = &self.ledger.shards;
            let leaf = shards.get(&shard).and_then(|shard| shard.next_leaf(*next));
            let Some((layer, leaf)) = leaf.filter(|_| found.len() < LISTED_MAX) else {
                return Step::Answer(Ok(Reply::Leaves(std::mem::take(found))));
            };
            let key = LeafKey { shard, layer, leaf };
            // Leaves that a drop emptied stay in the set until the next checkpoint; what is not in memory and not
            // waiting to be emptied has something in it.
            let is_purging = shards.get(&shard).is_some_and(|shard| shard.is_purging);
            let is_newer = (newer_than == Seq(0) && !is_purging && self.cache.find(key).is_none())
                || match self.leaf_for(number, key, effects) {
                    Ok(at) => at.is_some_and(|at| self.cache.leaf(at).max_seq() > newer_than.0),
                    Err(step) => return step,
                };
            let Some(Lookup {
                want: Want::Changed { next, found, .. },
                ..
            }) = self.lookups.get_mut(number)
            else {
                unreachable!("seen above")
            };
            if is_newer {
                found.push((layer, leaf));
            }
            *next = (layer, LeafNo(leaf.0 + 1));
        }
    }
}

impl<B: Payload> Read<B> {
    /// Blocks that no layer has.
    fn add_absent(&mut self, piece: &Piece) {
        (0..piece.count).for_each(|_| self.add(Slot::default(), piece.key));
    }

    /// Blocks that were found in several layers.
    fn add_found(&mut self, piece: &Piece) {
        let deep = self.deep.take().expect("it found them");
        deep.of_piece(piece)
            .for_each(|found| self.add(found.slot, found.key));
        self.deep = Some(deep);
    }

    fn add(&mut self, slot: Slot, key: LeafKey) {
        let index = self.resolved;
        self.resolved += 1;
        if let Some(versions) = &mut self.versions {
            versions.push(version(slot, key.layer));
            return;
        }
        self.checks.push(Check {
            seq: slot.seq,
            sum: slot.sum,
            layer: LayerId(key.layer.0 - slot.below),
            vdi: key.shard.vdi,
        });
        match slot.state {
            State::Absent | State::Zero | State::Trim => match self.parts.last_mut() {
                Some(Part::Zeros(count)) => *count += 1,
                _ => self.parts.push(Part::Zeros(1)),
            },
            State::Lost => {
                self.bad.get_or_insert(index);
            }
            State::Data => match self.parts.last_mut() {
                Some(Part::Data { address, count, .. })
                    if *address + u64::from(*count) == slot.address && *count < REQUEST_BLOCKS_MAX =>
                {
                    *count += 1;
                }
                _ => self.parts.push(Part::Data {
                    address: slot.address,
                    index,
                    count: 1,
                    content: None,
                }),
            },
        }
    }

    /// Joins neighbouring runs of data in one segment to reads of at most a megabyte.
    fn plan(&mut self, geometry: &Geometry) {
        for (at, part) in self.parts.iter().enumerate() {
            let Part::Data { address, count, .. } = *part else {
                continue;
            };
            let joined = self.spans.last_mut().and_then(|span| {
                let gap = address.checked_sub(span.address + u64::from(span.count))?;
                let total = address + u64::from(count) - span.address;
                let is_near = gap <= GAP_BLOCKS_MAX && total <= u64::from(REQUEST_BLOCKS_MAX);
                let is_inside = geometry.find(address) == geometry.find(span.address);
                (span.end_part == at && is_near && is_inside).then_some((span, total))
            });
            match joined {
                Some((span, total)) => {
                    span.count = total as u32;
                    span.end_part = at + 1;
                }
                None => self.spans.push(Span {
                    address,
                    count,
                    first_part: at,
                    end_part: at + 1,
                    is_second_try: false,
                }),
            }
        }
    }

    /// Takes a part from what its span brought, or says which of its blocks is the first that is bad.
    fn accept(&mut self, shard: ShardId, span: Span, part: usize, data: Option<&B>) -> Result<(), u32> {
        let Part::Data {
            address,
            index: first,
            count,
            content,
        } = &mut self.parts[part]
        else {
            unreachable!("only data is read")
        };
        let data = data.ok_or(*first)?;
        assert_eq!(
            data.length() as u64,
            u64::from(span.count) * BLOCK_BYTES,
            "a whole read"
        );
        let bytes = BLOCK_BYTES as usize;
        let data = data.slice(
            (*address - span.address) as usize * bytes,
            *count as usize * bytes,
        );
        let bad = (*first..)
            .zip(data.bytes().chunks_exact(bytes))
            .find(|(index, bytes)| {
                let check = self.checks[*index as usize];
                let key = SumKey {
                    shard: ShardId {
                        vdi: check.vdi,
                        ..shard
                    },
                    layer: check.layer,
                    block: BlockNo(self.block + index),
                    seq: Seq(check.seq),
                };
                types::bind(key, types::crc32c(bytes)).0 != check.sum
            });
        if let Some((index, _)) = bad {
            return Err(index);
        }
        *content = Some(data);
        Ok(())
    }

    /// Plans to read a part by itself once more.
    fn retry(&mut self, part: usize) {
        let Part::Data { address, count, .. } = self.parts[part] else {
            unreachable!("only data is read")
        };
        self.spans.push(Span {
            address,
            count,
            first_part: part,
            end_part: part + 1,
            is_second_try: true,
        });
    }

    fn forget(&mut self) {
        self.resolved = 0;
        self.parts.clear();
        self.checks.clear();
        if let Some(versions) = &mut self.versions {
            versions.clear();
        }
        self.bad = None;
    }

    fn corrupt(&self, shard: ShardId, index: u32) -> StoreError {
        let Check { layer, vdi, .. } = self.checks[index as usize];
        StoreError::Corrupt {
            shard: ShardId { vdi, ..shard },
            layer,
            block: BlockNo(self.block + index),
        }
    }

    fn reply(&mut self) -> Reply<B> {
        let parts = self.parts.drain(..).map(|part| match part {
            Part::Zeros(count) => ReadPart::Zeros(count),
            Part::Data { content, .. } => ReadPart::Data(content.expect("all parts are here")),
        });
        Reply::Read(parts.collect())
    }
}

/// What replicas compare: bound to the layer that all of them have, whichever of those merged into it the block is from.
fn version(slot: Slot, layer: LayerId) -> BlockVersion {
    let state = match slot.state {
        State::Absent => {
            return BlockVersion {
                seq: Seq(0),
                state: BlockState::Absent,
            };
        }
        State::Data if slot.below > 0 => {
            let origin = LayerId(layer.0 - slot.below);
            BlockState::Data(types::rebind(types::BlockSum(slot.sum), origin, layer))
        }
        State::Data => BlockState::Data(types::BlockSum(slot.sum)),
        State::Zero => BlockState::Clear(ClearKind::Zero),
        State::Trim => BlockState::Clear(ClearKind::Trim),
        // Differs from any good copy's sum but for one in four billion, so a comparison finds and mends it.
        State::Lost => BlockState::Data(types::BlockSum(0)),
    };
    BlockVersion {
        seq: Seq(slot.seq),
        state,
    }
}

/// The kind that would log a slot again.
pub(crate) fn kind_of(state: State) -> Kind {
    match state {
        State::Data => Kind::Data,
        State::Zero => Kind::Zero,
        State::Trim => Kind::Trim,
        State::Lost => Kind::Lost,
        State::Absent => panic!("nothing to log of an absent block"),
    }
}
