//! Lookups: reads, and the questions resync asks of leaves.
//!
//! A read resolves its blocks leaf by leaf, holds the segments it found them in, reads each contiguous run at
//! once and checks every block. What fails its check is read once more (the bytes may have been hurt on the way)
//! and then reported, never passed on.

use edge::DiskOp;
use smallvec::SmallVec;
use types::{BLOCK_BYTES, BlockNo, LayerId, LeafNo, Payload, RequestId, Seq, ShardId, SumKey};

use crate::batch::Kind;
use crate::cache::CacheAt;
use crate::leaf::{Slot, State, pieces};
use crate::store::{Io, LeafPlace, Store};
use crate::{
    BlockState, BlockVersion, ClearKind, Effect, LeafKey, REQUEST_BLOCKS_MAX, ReadPart, Reply, StoreError,
};

/// The most leaves one answer lists.
const CHANGED_MAX: usize = 1024;

/// A question under way.
pub(crate) struct Lookup<B> {
    pub(crate) id: RequestId,
    shard: ShardId,
    layer: LayerId,
    want: Want<B>,
}

pub(crate) enum Want<B> {
    Read(Read<B>),
    Versions(LeafNo),
    Changed {
        newer_than: Seq,
        next: LeafNo,
        found: Vec<LeafNo>,
    },
}

pub(crate) struct Read<B> {
    block: u32,
    count: u32,
    /// Blocks whose place is known.
    resolved: u32,
    parts: SmallVec<[Part<B>; 1]>,
    /// Seq and sum of each block with data, by position in the request.
    checks: SmallVec<[(u64, u32); 1]>,
    under_way: usize,
    /// Position of the first bad block.
    bad: Option<u32>,
}

enum Part<B> {
    Zeros(u32),
    Data {
        address: u64,
        index: u32,
        count: u32,
        is_second_try: bool,
        content: Option<B>,
    },
}

impl<B> Part<B> {
    fn is_data(&self) -> bool {
        matches!(self, Part::Data { .. })
    }
}

impl<B> Want<B> {
    pub(crate) fn read(block: BlockNo, count: u32) -> Want<B> {
        Want::Read(Read {
            block: block.0,
            count,
            resolved: 0,
            parts: SmallVec::new(),
            checks: SmallVec::new(),
            under_way: 0,
            bad: None,
        })
    }

    pub(crate) fn changed(newer_than: Seq, from: LeafNo) -> Want<B> {
        Want::Changed {
            newer_than,
            next: from,
            found: Vec::new(),
        }
    }
}

impl<B> Lookup<B> {
    pub(crate) fn new(id: RequestId, shard: ShardId, layer: LayerId, want: Want<B>) -> Lookup<B> {
        Lookup {
            id,
            shard,
            layer,
            want,
        }
    }

    fn key(&self, leaf: LeafNo) -> LeafKey {
        LeafKey {
            shard: self.shard,
            layer: self.layer,
            leaf,
        }
    }
}

/// What became of a lookup.
enum Step<B> {
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
            Want::Versions(leaf) => self.drive_versions(number, lookup.key(leaf), effects),
            Want::Changed { .. } => self.drive_changed(number, effects),
        };
        match step {
            Step::Answer(answer) => self.answer(number, answer, effects),
            Step::Wait => {}
            Step::Park => self.parked.push_back(number),
        }
    }

    fn answer(&mut self, number: u64, answer: Result<Reply<B>, StoreError>, effects: &mut Vec<Effect<B>>) {
        let lookup = self.lookups.remove(number).expect("a lookup under way");
        effects.push(Effect::Reply(lookup.id, answer));
    }

    fn read_mut(&mut self, number: u64) -> &mut Read<B> {
        match self.lookups.get_mut(number) {
            Some(Lookup {
                want: Want::Read(read),
                ..
            }) => read,
            _ => panic!("no read under way is called {number}"),
        }
    }

    /// Where the leaf of `key` is, if it is here; `None` if it does not exist. Otherwise the lookup waits for it.
    fn leaf_for(
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
        let (shard, layer) = (lookup.shard, lookup.layer);
        let Want::Read(Read { block, count, .. }) = lookup.want else {
            unreachable!("called for reads")
        };
        for piece in pieces(shard, layer, block, count) {
            let leaf = self.leaf_for(number, piece.key, effects);
            let Some(Lookup {
                want: Want::Read(read),
                ..
            }) = self.lookups.get_mut(number)
            else {
                unreachable!("seen above")
            };
            match leaf {
                Ok(None) => (0..piece.count).for_each(|_| read.add(Slot::default())),
                Ok(Some(at)) => {
                    let leaf = self.cache.leaf(at);
                    (0..piece.count).for_each(|at| read.add(leaf.get(piece.slot + at)));
                }
                Err(step) => {
                    // Resolve it all at once later: what is known now may have moved by then.
                    read.forget();
                    return step;
                }
            }
        }
        let read = self.read_mut(number);
        if let Some(index) = read.bad {
            let error = read.corrupt(shard, index);
            self.stats.corrupt_blocks += 1;
            return Step::Answer(Err(error));
        }
        read.under_way = read.parts.iter().filter(|part| part.is_data()).count();
        if read.under_way == 0 {
            return Step::Answer(Ok(read.reply()));
        }
        for at in 0..read.parts.len() {
            if let Part::Data { address, count, .. } = self.read_mut(number).parts[at] {
                self.read_part(number, at, address, count, effects);
            }
        }
        Step::Wait
    }

    fn read_part(
        &mut self,
        number: u64,
        part: usize,
        address: u64,
        count: u32,
        effects: &mut Vec<Effect<B>>,
    ) {
        let segment = self
            .ledger
            .segments
            .geometry
            .find(address)
            .expect("a block of a segment");
        self.ledger.segments.pin(segment);
        let operation = DiskOp::Read {
            offset: address * BLOCK_BYTES,
            bytes: count * BLOCK_BYTES as u32,
        };
        self.submit(Io::Read { lookup: number, part }, operation, effects);
    }

    pub(crate) fn read_done(
        &mut self,
        number: u64,
        at: usize,
        data: Option<B>,
        effects: &mut Vec<Effect<B>>,
    ) {
        let lookup = self
            .lookups
            .get_mut(number)
            .expect("a lookup with a read under way");
        let (shard, layer) = (lookup.shard, lookup.layer);
        let Want::Read(read) = &mut lookup.want else {
            unreachable!("only reads read")
        };
        let Part::Data {
            address,
            index,
            count,
            is_second_try,
            content,
        } = &mut read.parts[at]
        else {
            unreachable!("only data is read")
        };
        let (address, first, count) = (*address, *index, *count);
        let checks = &read.checks;
        let bad = match &data {
            None => Some(first),
            Some(data) => {
                assert_eq!(
                    data.length() as u64,
                    u64::from(count) * BLOCK_BYTES,
                    "a whole read"
                );
                let blocks = data.bytes().chunks_exact(BLOCK_BYTES as usize);
                (first..).zip(blocks).find_map(|(index, bytes)| {
                    let (seq, sum) = checks[index as usize];
                    let key = SumKey {
                        shard,
                        layer,
                        block: BlockNo(read.block + index),
                        seq: Seq(seq),
                    };
                    (types::bind(key, types::crc32c(bytes)).0 != sum).then_some(index)
                })
            }
        };
        let is_tried_again = bad.is_some() && !std::mem::replace(is_second_try, true);
        if !is_tried_again {
            *content = data;
            read.under_way -= 1;
            if let Some(bad) = bad {
                self.stats.corrupt_blocks += 1;
                read.bad = Some(read.bad.map_or(bad, |other| other.min(bad)));
            }
        }
        let answer = (read.under_way == 0).then(|| match read.bad {
            Some(index) => Err(read.corrupt(shard, index)),
            None => Ok(read.reply()),
        });
        if is_tried_again {
            // The first read still holds the segment; the second takes over from it.
            self.read_part(number, at, address, count, effects);
        }
        let segment = self
            .ledger
            .segments
            .geometry
            .find(address)
            .expect("a block of a segment");
        self.ledger.segments.unpin(segment);
        if let Some(answer) = answer {
            self.answer(number, answer, effects);
        }
    }

    fn drive_versions(&mut self, number: u64, key: LeafKey, effects: &mut Vec<Effect<B>>) -> Step<B> {
        match self.leaf_for(number, key, effects) {
            Ok(at) => {
                let leaf = at.map(|at| self.cache.leaf(at));
                let slot = |at| leaf.map_or(Slot::default(), |leaf| leaf.get(at));
                let versions = (0..crate::leaf::SLOTS).map(|at| version(slot(at))).collect();
                Step::Answer(Ok(Reply::Versions(versions)))
            }
            Err(step) => step,
        }
    }

    fn drive_changed(&mut self, number: u64, effects: &mut Vec<Effect<B>>) -> Step<B> {
        loop {
            let lookup = self.lookups.get_mut(number).expect("a lookup under way");
            let (shard, layer) = (lookup.shard, lookup.layer);
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
            let leaves = shards.get(&shard).and_then(|shard| shard.layers.get(&layer));
            let leaf = leaves.and_then(|leaves| leaves.next(*next));
            let Some(leaf) = leaf.filter(|_| found.len() < CHANGED_MAX) else {
                return Step::Answer(Ok(Reply::Leaves(std::mem::take(found))));
            };
            let is_newer = newer_than == Seq(0)
                || match self.leaf_for(number, LeafKey { shard, layer, leaf }, effects) {
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
                found.push(leaf);
            }
            *next = LeafNo(leaf.0 + 1);
        }
    }
}

impl<B: Payload> Read<B> {
    fn add(&mut self, slot: Slot) {
        let index = self.resolved;
        self.resolved += 1;
        self.checks.push((slot.seq, slot.sum));
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
                    is_second_try: false,
                    content: None,
                }),
            },
        }
    }

    fn forget(&mut self) {
        self.resolved = 0;
        self.parts.clear();
        self.checks.clear();
        self.bad = None;
    }

    fn corrupt(&self, shard: ShardId, index: u32) -> StoreError {
        StoreError::Corrupt {
            shard,
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

fn version(slot: Slot) -> BlockVersion {
    let state = match slot.state {
        State::Absent => {
            return BlockVersion {
                seq: Seq(0),
                state: BlockState::Absent,
            };
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
