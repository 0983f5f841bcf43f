//! Lookups: reads, and the questions resync asks of leaves.
//!
//! A read resolves its blocks leaf by leaf, holds the segments it found them in, reads each contiguous run at
//! once and checks every block. What fails its check is read once more (the bytes may have been hurt on the way)
//! and then reported, never passed on.

use edge::DiskOp;
use types::{BLOCK_BYTES, BlockNo, LayerId, LeafNo, Payload, RequestId, Seq, ShardId, SumKey};

use crate::batch::Kind;
use crate::leaf::{Leaf, Slot, State, pieces};
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
    parts: Vec<Part<B>>,
    /// Seq and sum of each block with data, by position in the request.
    checks: Vec<(u64, u32)>,
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

impl<B> Want<B> {
    pub(crate) fn read(block: BlockNo, count: u32) -> Want<B> {
        Want::Read(Read {
            block: block.0,
            count,
            resolved: 0,
            parts: Vec::new(),
            checks: Vec::new(),
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
        let number = self.next_lookup;
        self.next_lookup += 1;
        self.drive(number, lookup, effects);
    }

    pub(crate) fn continue_lookup(&mut self, number: u64, effects: &mut Vec<Effect<B>>) {
        let lookup = self.lookups.remove(&number).expect("a waiting lookup");
        self.drive(number, lookup, effects);
    }

    pub(crate) fn resume_parked(&mut self, effects: &mut Vec<Effect<B>>) {
        for number in std::mem::take(&mut self.parked) {
            self.continue_lookup(number, effects);
        }
    }

    fn drive(&mut self, number: u64, mut lookup: Lookup<B>, effects: &mut Vec<Effect<B>>) {
        let step = match &lookup.want {
            Want::Read(_) => self.drive_read(number, &mut lookup, effects),
            Want::Versions(leaf) => self.drive_versions(number, &lookup, *leaf, effects),
            Want::Changed { .. } => self.drive_changed(number, &mut lookup, effects),
        };
        match step {
            Step::Answer(answer) => effects.push(Effect::Reply(lookup.id, answer)),
            Step::Wait => drop(self.lookups.insert(number, lookup)),
            Step::Park => {
                self.lookups.insert(number, lookup);
                self.parked.push_back(number);
            }
        }
    }

    /// The leaf of `key` if it is here. Otherwise the lookup waits for it.
    fn leaf_for(
        &mut self,
        number: u64,
        key: LeafKey,
        effects: &mut Vec<Effect<B>>,
    ) -> Result<Option<&Leaf>, Step<B>> {
        match self.locate(key, 0, effects) {
            LeafPlace::Ready(at) => Ok(Some(self.cache.get(at).leaf.as_ref().expect("ready"))),
            LeafPlace::Nowhere => Ok(None),
            LeafPlace::Loading(at) => {
                self.cache.wait(at, number);
                Err(Step::Wait)
            }
            LeafPlace::NoMemory => Err(Step::Park),
        }
    }

    fn drive_read(&mut self, number: u64, lookup: &mut Lookup<B>, effects: &mut Vec<Effect<B>>) -> Step<B> {
        let (shard, layer) = (lookup.shard, lookup.layer);
        let Want::Read(read) = &mut lookup.want else {
            unreachable!("called for reads")
        };
        let (block, count) = (read.block + read.resolved, read.count - read.resolved);
        for piece in pieces(shard, layer, block, count) {
            match self.leaf_for(number, piece.key, effects) {
                Ok(None) => (0..piece.count).for_each(|_| read.add(Slot::default())),
                Ok(Some(leaf)) => (0..piece.count).for_each(|at| read.add(leaf.get(piece.slot + at))),
                Err(step) => {
                    // Resolve it all at once later: what is known now may have moved by then.
                    read.forget();
                    return step;
                }
            }
        }
        if let Some(index) = read.bad {
            self.stats.corrupt_blocks += 1;
            return Step::Answer(Err(read.corrupt(shard, index)));
        }
        for (at, part) in read.parts.iter().enumerate() {
            if let Part::Data { address, count, .. } = part {
                read.under_way += 1;
                self.read_part(number, at, *address, *count, effects);
            }
        }
        if read.under_way == 0 {
            Step::Answer(Ok(read.reply()))
        } else {
            Step::Wait
        }
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
        let mut lookup = self
            .lookups
            .remove(&number)
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
        if bad.is_some() && !std::mem::replace(is_second_try, true) {
            // The first read still holds the segment; the second takes over from it.
            self.read_part(number, at, address, count, effects);
        } else {
            *content = data;
            read.under_way -= 1;
            if let Some(bad) = bad {
                self.stats.corrupt_blocks += 1;
                read.bad = Some(read.bad.map_or(bad, |other| other.min(bad)));
            }
        }
        let segment = self
            .ledger
            .segments
            .geometry
            .find(address)
            .expect("a block of a segment");
        self.ledger.segments.unpin(segment);
        if read.under_way > 0 {
            self.lookups.insert(number, lookup);
            return;
        }
        let answer = match read.bad {
            Some(index) => Err(read.corrupt(shard, index)),
            None => Ok(read.reply()),
        };
        effects.push(Effect::Reply(lookup.id, answer));
    }

    fn drive_versions(
        &mut self,
        number: u64,
        lookup: &Lookup<B>,
        leaf: LeafNo,
        effects: &mut Vec<Effect<B>>,
    ) -> Step<B> {
        match self.leaf_for(number, lookup.key(leaf), effects) {
            Ok(leaf) => {
                let slot = |at| leaf.map_or(Slot::default(), |leaf| leaf.get(at));
                let versions = (0..crate::leaf::SLOTS).map(|at| version(slot(at))).collect();
                Step::Answer(Ok(Reply::Versions(versions)))
            }
            Err(step) => step,
        }
    }

    fn drive_changed(
        &mut self,
        number: u64,
        lookup: &mut Lookup<B>,
        effects: &mut Vec<Effect<B>>,
    ) -> Step<B> {
        let (shard, layer) = (lookup.shard, lookup.layer);
        let Want::Changed {
            newer_than,
            next,
            found,
        } = &mut lookup.want
        else {
            unreachable!("called for changes")
        };
        while found.len() < CHANGED_MAX {
            let leaves = self
                .ledger
                .shards
                .get(&shard)
                .and_then(|shard| shard.layers.get(&layer));
            let Some(leaf) = leaves.and_then(|leaves| leaves.next(*next)) else {
                break;
            };
            let is_newer = if *newer_than == Seq(0) {
                true
            } else {
                match self.leaf_for(number, LeafKey { shard, layer, leaf }, effects) {
                    Ok(content) => content.is_some_and(|leaf| leaf.max_seq() > newer_than.0),
                    Err(step) => return step,
                }
            };
            if is_newer {
                found.push(leaf);
            }
            *next = LeafNo(leaf.0 + 1);
        }
        Step::Answer(Ok(Reply::Leaves(std::mem::take(found))))
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
