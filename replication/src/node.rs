//! The replica side of every shard on one disk.
//!
//! ```text
//!                      token < promised ──▶ Stale        token > promised ──▶ NotFenced
//!  writer ──Fence──▶ promise in memory, PutRecord ──durable, and all earlier work done──▶ Promised
//!  writer ──BeginResync──▶ good_until in the record ──durable──▶ Done ┐ what is newer than good_until
//!  writer ──SetEnd──▶ end in the store ──durable──▶ good_until goes ──┘ is not to be trusted meanwhile
//! ```
//!
//! A promise holds from the moment the fence is read, not from the moment it is durable: refusing early is always
//! safe. It is *answered* only when it is durable and everything accepted before it has ended, so the end it
//! reports counts every write that an older writer may still be told about.

use std::collections::BTreeMap;
use std::hash::{Hash, Hasher};

use edge::{Completion, DiskOp, IoId};
use store::{
    Effect as StoreEffect, Event as StoreEvent, IndexRequest, IndexResponse, Origin, Reply, Request,
    ShardSummary, StoreError, StoreStats,
};
use types::{DiskId, InFlight, Instant, Payload, RequestId, Seq, ShardId, Token};

use crate::ShardRecord;
use crate::message::{FromReplica, Refusal, RepairContent, ReplicaReply, ReplicaRequest, ToReplica};

/// The log store as the node uses it: [`store::Store`] in the daemon and the simulator, a small map in tests.
///
/// An implementor owes what [`store::Request`] states, and answers every request exactly once, the writes of a
/// shard in the order they came. It may assume that `step` is called with nothing of an earlier life.
pub trait LogStore<B> {
    /// See [`store::Event`] and [`store::Effect`].
    fn step(&mut self, now: Instant, event: StoreEvent<B>, effects: &mut Vec<StoreEffect<B>>);
    /// What the disk holds, by shard.
    fn shards(&self) -> Vec<ShardSummary>;
    /// Figures.
    fn stats(&self) -> StoreStats;
    /// Whether anything is under way, so that ticks are wanted.
    fn is_busy(&self) -> bool;
    /// Whether the process may end: see [`store::Event::Closing`].
    fn is_witnessed(&self) -> bool {
        true
    }
}

/// What happened.
#[derive(Clone, Debug)]
pub enum NodeEvent<B> {
    /// A writer wants something.
    Message(ToReplica<B>),
    /// The disk finished an operation.
    Disk(Completion<B>),
    /// The index thread answered.
    Index(IndexResponse),
    /// All events of this turn are in: close the batch.
    TurnEnd,
    /// Time passed.
    Tick,
    /// The process is about to end.
    Closing,
}

/// What to do about it.
#[derive(Clone, Debug)]
pub enum NodeEffect<B> {
    /// Answer a writer.
    Send(FromReplica<B>),
    /// Hand to the disk.
    Disk(IoId, DiskOp<B>),
    /// Hand to the index thread.
    Index(IndexRequest),
    /// The disk just failed; said once.
    Failed(StoreError),
    /// The disk has no space for guests any more (`true`), or again (`false`).
    Full(bool),
}

/// What the disk remembers of a shard besides its blocks.
#[derive(Clone, Debug, Hash)]
struct Promise {
    /// Tells this life of the shard on this disk from one that was dropped.
    life: u64,
    promised: Token,
    good_until: Option<Seq>,
    /// Highest stream seq done, nothing missing before.
    end: Seq,
    /// The writer's record, as it came.
    record: Vec<u8>,
    /// Changes handed to the store, and how many of them have ended.
    submitted: u64,
    finished: u64,
    /// Counts the resyncs begun: a `SetEnd` ends only the resync that was under way when it came.
    resyncs: u64,
    /// Durable promises that wait for earlier changes to end, oldest first.
    fences: Vec<FenceWait>,
}

#[derive(Clone, Debug, Hash)]
struct FenceWait {
    token: Token,
    id: RequestId,
    previous: Token,
    after: u64,
}

/// What the store is working on.
#[derive(Clone, Debug, Hash)]
struct Pending {
    shard: ShardId,
    life: u64,
    token: Token,
    id: RequestId,
    kind: PendingKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum PendingKind {
    Stream(Seq),
    Change,
    Plain,
    Drop,
    Fence {
        previous: Token,
        after: u64,
    },
    /// Makes durable what a fence is about to report.
    FenceFlush {
        previous: Token,
        end: Seq,
        good_until: Option<Seq>,
    },
    SetEnd {
        resyncs: u64,
    },
    EndOfResync,
    /// Keeps what recovery said of the shard; nobody is told.
    Doubt,
}

impl PendingKind {
    /// Whether a fence must wait for it: all that a promise's report could depend on.
    fn is_change(self) -> bool {
        !matches!(
            self,
            PendingKind::Plain
                | PendingKind::Drop
                | PendingKind::Fence { .. }
                | PendingKind::FenceFlush { .. }
                | PendingKind::Doubt
        )
    }
}

/// The replica side of every shard on one disk; owns the disk's log store.
#[derive(Clone, Debug)]
pub struct DiskNode<B, S = store::Store<B>> {
    disk: DiskId,
    store: S,
    shards: BTreeMap<ShardId, Promise>,
    /// What the store was asked, by the id it was asked under.
    pending: InFlight<Pending>,
    next_life: u64,
    /// Shards that recovery doubts and whose record does not say so yet.
    doubted: Vec<ShardId>,
    /// Reused between steps.
    store_effects: Vec<StoreEffect<B>>,
}

/// Two nodes that hash alike do the same from here on: what a search of all states asks.
impl<B, S: Hash> Hash for DiskNode<B, S> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        let DiskNode {
            disk,
            store,
            shards,
            pending,
            next_life,
            doubted,
            store_effects,
        } = self;
        assert!(store_effects.is_empty(), "effects are handed on within a step");
        (disk, store, shards, pending, next_life, doubted).hash(state);
    }
}

impl<B: Payload, S: LogStore<B>> DiskNode<B, S> {
    /// The node of `disk`, whose promises are read from `store`.
    ///
    /// A shard whose promise cannot be read (a record of a later version) promises everything: it refuses every
    /// writer, which is the one safe answer.
    ///
    /// A shard that recovery doubts (parts of the log are missing, or the disk is an older copy) reports at its next
    /// fence that nothing of it is known to be whole, and is compared with another replica from its beginning. The
    /// store goes on doubting it, crash after crash, until the shard's record says so itself.
    #[must_use]
    pub fn new(disk: DiskId, store: S) -> DiskNode<B, S> {
        let summaries = store.shards();
        // A record that cannot be read is not replaced: it refuses everyone as it is.
        let doubted = summaries
            .iter()
            .filter(|summary| summary.is_doubtful && Kept::is_known(&summary.record));
        let doubted: Vec<ShardId> = doubted.map(|summary| summary.shard).collect();
        let shards = summaries
            .into_iter()
            .zip(0..)
            .map(|(summary, life)| {
                let kept = Kept::decode(&summary.record);
                let promise = Promise {
                    life,
                    promised: kept.promised,
                    good_until: if summary.is_doubtful {
                        Some(Seq(0))
                    } else {
                        kept.good_until
                    },
                    end: summary.end,
                    record: kept.record,
                    submitted: 0,
                    finished: 0,
                    resyncs: 0,
                    fences: Vec::new(),
                };
                (summary.shard, promise)
            })
            .collect::<BTreeMap<_, _>>();
        DiskNode {
            disk,
            store,
            next_life: shards.len() as u64,
            shards,
            pending: InFlight::default(),
            doubted,
            store_effects: Vec::new(),
        }
    }

    /// Takes one event and says what to do about it.
    pub fn step(&mut self, now: Instant, event: NodeEvent<B>, effects: &mut Vec<NodeEffect<B>>) {
        for shard in std::mem::take(&mut self.doubted) {
            self.keep_doubt(now, shard, effects);
        }
        match event {
            NodeEvent::Message(message) => self.message(now, message, effects),
            NodeEvent::Disk(completion) => self.store_step(now, StoreEvent::Disk(completion), effects),
            NodeEvent::Index(response) => self.store_step(now, StoreEvent::Index(response), effects),
            NodeEvent::TurnEnd => self.store_step(now, StoreEvent::TurnEnd, effects),
            NodeEvent::Tick => self.store_step(now, StoreEvent::Tick, effects),
            NodeEvent::Closing => self.store_step(now, StoreEvent::Closing, effects),
        }
    }

    fn keep_doubt(&mut self, now: Instant, shard: ShardId, effects: &mut Vec<NodeEffect<B>>) {
        let promise = self.known(shard);
        let (token, request) = (promise.promised, promise.put(shard));
        self.submit(
            now,
            shard,
            token,
            RequestId(0),
            request,
            PendingKind::Doubt,
            effects,
        );
    }

    /// Which disk this is.
    #[must_use]
    pub fn disk(&self) -> DiskId {
        self.disk
    }

    /// Figures of the store.
    #[must_use]
    pub fn stats(&self) -> StoreStats {
        self.store.stats()
    }

    /// What the disk holds; `record` is what the last writer's fence carried ([`crate::ShardRecord::decode`]).
    #[must_use]
    pub fn shards(&self) -> Vec<ShardSummary> {
        let mut shards = self.store.shards();
        for summary in &mut shards {
            summary.record = Kept::decode(&summary.record).record;
        }
        shards
    }

    /// The highest token promised for a shard, and how far its content can be trusted while a resync is unfinished.
    #[must_use]
    pub fn promise(&self, shard: ShardId) -> Option<(Token, Option<Seq>)> {
        self.shards
            .get(&shard)
            .map(|promise| (promise.promised, promise.good_until))
    }

    /// The store below, for figures that only it has.
    #[must_use]
    pub fn store(&self) -> &S {
        &self.store
    }

    /// Whether the process may end without a promise losing its witness.
    #[must_use]
    pub fn is_witnessed(&self) -> bool {
        self.store.is_witnessed()
    }

    /// Whether anything is under way, so that ticks are wanted.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        !self.doubted.is_empty() || !self.pending.is_empty() || self.store.is_busy()
    }

    fn message(&mut self, now: Instant, message: ToReplica<B>, effects: &mut Vec<NodeEffect<B>>) {
        let ToReplica {
            shard,
            token,
            id,
            request,
        } = message;
        let is_fence = matches!(request, ReplicaRequest::Fence { .. });
        let is_drop = matches!(request, ReplicaRequest::Drop);
        let refusal = match self.shards.get(&shard) {
            Some(promise) if token < promise.promised => Some(Refusal::Stale {
                promised: promise.promised,
            }),
            Some(promise) if token > promise.promised && !is_fence && !is_drop => Some(Refusal::NotFenced),
            None if is_drop => {
                self.send(shard, token, id, Ok(ReplicaReply::Done), effects);
                return;
            }
            None if !is_fence => Some(Refusal::NotFenced),
            _ => None,
        };
        if let Some(refusal) = refusal {
            self.send(shard, token, id, Err(refusal), effects);
            return;
        }
        let (request, kind) = self.translate(shard, token, request);
        self.submit(now, shard, token, id, request, kind, effects);
    }

    /// What an accepted message asks of the store. Memory changes here, before the store is asked, so that the
    /// messages behind this one meet the new state.
    fn translate(
        &mut self,
        shard: ShardId,
        token: Token,
        request: ReplicaRequest<B>,
    ) -> (Request<B>, PendingKind) {
        match request {
            ReplicaRequest::Fence { record } => {
                assert!(
                    record.len() <= RECORD_BYTES_MAX,
                    "record of {} bytes",
                    record.len()
                );
                let life = self.next_life;
                // A disk that does not know a shard that was written has lost it, or is new to it: either way it
                // holds nothing, and must say so also after the next fence.
                let is_lost = || ShardRecord::decode(&record).is_some_and(|record| record.was_written);
                let promise = self.shards.entry(shard).or_insert_with(|| Promise {
                    life,
                    promised: Token::default(),
                    good_until: is_lost().then_some(Seq(0)),
                    end: Seq(0),
                    record: Vec::new(),
                    submitted: 0,
                    finished: 0,
                    resyncs: 0,
                    fences: Vec::new(),
                });
                self.next_life += 1;
                let previous = promise.promised;
                promise.promised = token;
                promise.record = record;
                let after = promise.submitted;
                (promise.put(shard), PendingKind::Fence { previous, after })
            }
            ReplicaRequest::Write {
                layer,
                block,
                seq,
                data,
                crcs,
            } => (
                Request::Write {
                    shard,
                    layer,
                    block,
                    seq,
                    data,
                    crcs,
                    origin: Origin::Live,
                },
                PendingKind::Stream(seq),
            ),
            ReplicaRequest::Clear {
                layer,
                block,
                count,
                seq,
                kind,
            } => (
                Request::Clear {
                    shard,
                    layer,
                    block,
                    count,
                    seq,
                    kind,
                    origin: Origin::Live,
                },
                PendingKind::Stream(seq),
            ),
            ReplicaRequest::Repair {
                layer,
                block,
                seq,
                content,
                live_from,
            } => {
                let origin = Origin::Repair { live_from };
                let request = match content {
                    RepairContent::Data(data, crcs) => Request::Write {
                        shard,
                        layer,
                        block,
                        seq,
                        data,
                        crcs,
                        origin,
                    },
                    RepairContent::Clear(count, kind) => Request::Clear {
                        shard,
                        layer,
                        block,
                        count,
                        seq,
                        kind,
                        origin,
                    },
                };
                (request, PendingKind::Change)
            }
            ReplicaRequest::Void {
                layer,
                block,
                count,
                live_from,
            } => (
                Request::Void {
                    shard,
                    layer,
                    block,
                    count,
                    live_from,
                },
                PendingKind::Change,
            ),
            ReplicaRequest::SetEnd { end } => {
                let promise = self.known(shard);
                promise.end = end;
                let resyncs = promise.resyncs;
                (Request::SetEnd { shard, end }, PendingKind::SetEnd { resyncs })
            }
            ReplicaRequest::BeginResync { since } => {
                let promise = self.known(shard);
                promise.resyncs += 1;
                promise.good_until = Some(promise.good_until.map_or(since, |good| good.min(since)));
                (promise.put(shard), PendingKind::Change)
            }
            ReplicaRequest::Flush => (Request::Flush { shard }, PendingKind::Plain),
            ReplicaRequest::Read {
                lineage,
                block,
                count,
            } => {
                assert_eq!(lineage.newest().0, shard.vdi, "a lineage of another VDI");
                let read = Request::Read {
                    shard,
                    lineage,
                    block,
                    count,
                };
                (read, PendingKind::Plain)
            }
            ReplicaRequest::ChangedLeaves { newer_than, from } => (
                Request::ChangedLeaves {
                    shard,
                    newer_than,
                    from,
                },
                PendingKind::Plain,
            ),
            ReplicaRequest::LeafVersions { lineage, leaf } => {
                assert_eq!(lineage.newest().0, shard.vdi, "a lineage of another VDI");
                let versions = Request::LeafVersions { shard, lineage, leaf };
                (versions, PendingKind::Plain)
            }
            ReplicaRequest::Drop => (Request::DropShard { shard }, PendingKind::Drop),
        }
    }

    fn known(&mut self, shard: ShardId) -> &mut Promise {
        self.shards
            .get_mut(&shard)
            .expect("a message past the token check is for a known shard")
    }

    fn submit(
        &mut self,
        now: Instant,
        shard: ShardId,
        token: Token,
        id: RequestId,
        request: Request<B>,
        kind: PendingKind,
        effects: &mut Vec<NodeEffect<B>>,
    ) {
        let promise = self.known(shard);
        let life = promise.life;
        promise.submitted += u64::from(kind.is_change());
        if kind == PendingKind::Drop {
            // The next fence begins a new life; the store sees the drop before it.
            self.shards.remove(&shard);
        }
        let store_id = RequestId(self.pending.insert(Pending {
            shard,
            life,
            token,
            id,
            kind,
        }));
        self.store_step(now, StoreEvent::Request(store_id, request), effects);
    }

    fn store_step(&mut self, now: Instant, event: StoreEvent<B>, effects: &mut Vec<NodeEffect<B>>) {
        let mut store_effects = std::mem::take(&mut self.store_effects);
        self.store.step(now, event, &mut store_effects);
        for effect in store_effects.drain(..) {
            match effect {
                StoreEffect::Reply(id, result) => self.store_reply(now, id, result, effects),
                StoreEffect::Disk(id, operation) => effects.push(NodeEffect::Disk(id, operation)),
                StoreEffect::Index(request) => effects.push(NodeEffect::Index(request)),
                StoreEffect::Failed(error) => effects.push(NodeEffect::Failed(error)),
                StoreEffect::Full(is_full) => effects.push(NodeEffect::Full(is_full)),
            }
        }
        if store_effects.capacity() > self.store_effects.capacity() {
            self.store_effects = store_effects;
        }
    }

    fn store_reply(
        &mut self,
        now: Instant,
        store_id: RequestId,
        result: Result<Reply<B>, StoreError>,
        effects: &mut Vec<NodeEffect<B>>,
    ) {
        let Pending {
            shard,
            life,
            token,
            id,
            kind,
        } = self
            .pending
            .remove(store_id.0)
            .expect("the store answers what it was asked, once");
        if kind == PendingKind::Doubt {
            return;
        }
        let mut answer = match result {
            Ok(Reply::Done) => Ok(ReplicaReply::Done),
            Ok(Reply::Read(parts)) => Ok(ReplicaReply::Read(parts)),
            Ok(Reply::Leaves(leaves)) => Ok(ReplicaReply::Leaves(leaves)),
            Ok(Reply::Versions(versions)) => Ok(ReplicaReply::Versions(versions)),
            Ok(Reply::Revision(revision)) => unreachable!("nobody asks for a revision yet: {revision}"),
            Err(error) => Err(Refusal::Store(error)),
        };
        let promise = self.shards.get_mut(&shard).filter(|promise| promise.life == life);
        let Some(promise) = promise else {
            // Dropped meanwhile; only the drop itself is worth an answer that says so.
            if kind != PendingKind::Drop && answer.is_ok() {
                answer = Err(Refusal::NotFenced);
            }
            self.send(shard, token, id, answer, effects);
            return;
        };
        promise.finished += u64::from(kind.is_change());
        match (kind, &answer) {
            (PendingKind::Stream(seq), Ok(_)) => promise.end = promise.end.max(seq),
            (PendingKind::SetEnd { resyncs }, Ok(_))
                if promise.resyncs == resyncs && promise.good_until.is_some() =>
            {
                promise.good_until = None;
                let put = promise.put(shard);
                self.submit(now, shard, token, id, put, PendingKind::EndOfResync, effects);
                return;
            }
            (PendingKind::SetEnd { resyncs }, Ok(_)) if promise.resyncs != resyncs => {
                // Another resync began since: this end is of a life that is over.
                answer = Err(Refusal::Stale {
                    promised: promise.promised,
                });
            }
            (
                PendingKind::FenceFlush {
                    previous,
                    end,
                    good_until,
                },
                Ok(_),
            ) => {
                answer = Ok(ReplicaReply::Promised {
                    previous,
                    end,
                    good_until,
                });
            }
            (PendingKind::Fence { previous, after }, Ok(_)) => {
                promise.fences.push(FenceWait {
                    token,
                    id,
                    previous,
                    after,
                });
                self.answer_fences(now, shard, effects);
                return;
            }
            _ => {}
        }
        self.send(shard, token, id, answer, effects);
        if kind.is_change() {
            self.answer_fences(now, shard, effects);
        }
    }

    /// Goes on with the durable promises of a shard before which nothing is under way any more: what they report
    /// must be durable too, so that no successor is ever told less.
    fn answer_fences(&mut self, now: Instant, shard: ShardId, effects: &mut Vec<NodeEffect<B>>) {
        loop {
            let Some(promise) = self.shards.get_mut(&shard) else {
                return;
            };
            let finished = promise.finished;
            let Some(ready) = promise.fences.iter().position(|fence| finished >= fence.after) else {
                return;
            };
            let fence = promise.fences.remove(ready);
            let kind = PendingKind::FenceFlush {
                previous: fence.previous,
                end: promise.end,
                good_until: promise.good_until,
            };
            let flush = Request::Flush { shard };
            self.submit(now, shard, fence.token, fence.id, flush, kind, effects);
        }
    }

    fn send(
        &self,
        shard: ShardId,
        token: Token,
        id: RequestId,
        result: Result<ReplicaReply<B>, Refusal>,
        effects: &mut Vec<NodeEffect<B>>,
    ) {
        effects.push(NodeEffect::Send(FromReplica {
            shard,
            disk: self.disk,
            token,
            id,
            result,
        }));
    }
}

/// The most bytes a writer's record may have.
pub const RECORD_BYTES_MAX: usize = 2048;

impl Promise {
    /// Persists what is in memory now.
    fn put<B>(&self, shard: ShardId) -> Request<B> {
        let kept = Kept {
            promised: self.promised,
            good_until: self.good_until,
            record: self.record.clone(),
        };
        Request::PutRecord {
            shard,
            record: kept.encode(),
        }
    }
}

/// What the store keeps as the shard's record: the promise, then the writer's record.
///
/// ```text
/// 0       version, 1
/// 1..9    promised epoch          9..17   promised incarnation      (little endian)
/// 17      1 if a resync is unfinished     18..26  good until
/// 26..    the writer's record
/// ```
#[derive(Debug, PartialEq, Eq)]
struct Kept {
    promised: Token,
    good_until: Option<Seq>,
    record: Vec<u8>,
}

impl Kept {
    const VERSION: u8 = 1;
    const HEAD: usize = 26;

    fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(Kept::HEAD + self.record.len());
        bytes.push(Kept::VERSION);
        bytes.extend_from_slice(&self.promised.epoch.0.to_le_bytes());
        bytes.extend_from_slice(&self.promised.incarnation.0.to_le_bytes());
        bytes.push(u8::from(self.good_until.is_some()));
        bytes.extend_from_slice(&self.good_until.unwrap_or_default().0.to_le_bytes());
        bytes.extend_from_slice(&self.record);
        bytes
    }

    fn is_known(bytes: &[u8]) -> bool {
        bytes.len() >= Kept::HEAD && bytes[0] == Kept::VERSION
    }

    fn decode(bytes: &[u8]) -> Kept {
        let number = |at: usize| {
            let bytes: [u8; 8] = bytes[at..at + 8].try_into().expect("eight bytes");
            u64::from_le_bytes(bytes)
        };
        if bytes.is_empty() {
            // Writes without a record: the store knew the shard, no writer ever fenced it here.
            return Kept {
                promised: Token::default(),
                good_until: Some(Seq(0)),
                record: Vec::new(),
            };
        }
        if !Kept::is_known(bytes) {
            return Kept {
                promised: Token {
                    epoch: types::Epoch(u64::MAX),
                    incarnation: types::Incarnation(u64::MAX),
                },
                good_until: Some(Seq(0)),
                record: Vec::new(),
            };
        }
        Kept {
            promised: Token {
                epoch: types::Epoch(number(1)),
                incarnation: types::Incarnation(number(9)),
            },
            good_until: (bytes[17] != 0).then(|| Seq(number(18))),
            record: bytes[Kept::HEAD..].to_vec(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use types::{BlockNo, Epoch, HeapBlock, Incarnation, LayerId, ShardNo, VdiId};

    /// Answers `Done` to the oldest request at each tick, or, while writes wait for space, to the youngest.
    #[derive(Default)]
    struct Queue(std::collections::VecDeque<(RequestId, Request<HeapBlock>)>, bool);

    impl LogStore<HeapBlock> for Queue {
        fn step(&mut self, _: Instant, event: StoreEvent<HeapBlock>, out: &mut Vec<StoreEffect<HeapBlock>>) {
            match event {
                StoreEvent::Request(id, request) => self.0.push_back((id, request)),
                _ => {
                    let next = if self.1 {
                        self.0.pop_back()
                    } else {
                        self.0.pop_front()
                    };
                    out.extend(next.map(|(id, _)| StoreEffect::Reply(id, Ok(Reply::Done))));
                }
            }
        }

        fn shards(&self) -> Vec<ShardSummary> {
            Vec::new()
        }

        fn stats(&self) -> StoreStats {
            StoreStats::default()
        }

        fn is_busy(&self) -> bool {
            !self.0.is_empty()
        }
    }

    struct Bench {
        node: DiskNode<HeapBlock, Queue>,
        id: u64,
    }

    const SHARD: ShardId = ShardId {
        vdi: VdiId(1),
        no: ShardNo(2),
    };

    fn token(epoch: u64) -> Token {
        Token {
            epoch: Epoch(epoch),
            incarnation: Incarnation(1),
        }
    }

    type Answers = Vec<(u64, Result<ReplicaReply<HeapBlock>, Refusal>)>;

    impl Bench {
        fn new() -> Bench {
            let node = DiskNode::new(DiskId(1), Queue::default());
            Bench { node, id: 0 }
        }

        fn event(&mut self, event: NodeEvent<HeapBlock>) -> Answers {
            let mut effects = Vec::new();
            self.node.step(Instant(0), event, &mut effects);
            let answer = |effect| match effect {
                NodeEffect::Send(message) => (message.id.0, message.result),
                other => panic!("{other:?}"),
            };
            effects.into_iter().map(answer).collect()
        }

        fn tell(&mut self, epoch: u64, request: ReplicaRequest<HeapBlock>) -> Answers {
            self.id += 1;
            self.event(NodeEvent::Message(ToReplica {
                shard: SHARD,
                token: token(epoch),
                id: RequestId(self.id),
                request,
            }))
        }

        fn settle(&mut self) -> Answers {
            let mut answers = Vec::new();
            while self.node.is_busy() {
                answers.extend(self.event(NodeEvent::Tick));
            }
            answers
        }
    }

    fn fence() -> ReplicaRequest<HeapBlock> {
        ReplicaRequest::Fence { record: vec![7] }
    }

    fn write(seq: u64) -> ReplicaRequest<HeapBlock> {
        ReplicaRequest::Write {
            layer: LayerId(0),
            block: BlockNo(0),
            seq: Seq(seq),
            data: HeapBlock::zeroed(4096),
            crcs: [0].into_iter().collect(),
        }
    }

    #[test]
    fn lower_tokens_are_refused_and_higher_ones_must_fence() {
        let mut bench = Bench::new();
        assert!(matches!(
            bench.tell(5, write(1))[..],
            [(_, Err(Refusal::NotFenced))]
        ));
        assert!(bench.tell(5, fence()).is_empty());
        assert_eq!(bench.settle().len(), 1);
        assert!(matches!(
            bench.tell(6, write(1))[..],
            [(_, Err(Refusal::NotFenced))]
        ));
        for request in [write(1), ReplicaRequest::Flush, fence(), ReplicaRequest::Drop] {
            let answers = bench.tell(4, request);
            assert!(matches!(answers[..], [(_, Err(Refusal::Stale { promised }))] if promised == token(5)));
        }
    }

    #[test]
    fn a_promise_refuses_at_once_and_reports_what_was_under_way() {
        let mut bench = Bench::new();
        bench.tell(1, fence());
        bench.settle();
        assert!(bench.tell(1, write(10)).is_empty());
        assert!(bench.tell(2, fence()).is_empty());
        assert!(matches!(
            bench.tell(1, write(11))[..],
            [(_, Err(Refusal::Stale { .. }))]
        ));
        let answers = bench.settle();
        let promised = &answers[answers.len() - 1].1;
        let Ok(ReplicaReply::Promised {
            previous,
            end,
            good_until,
        }) = promised
        else {
            panic!("{promised:?}");
        };
        assert_eq!((*previous, *end, *good_until), (token(1), Seq(10), None));
    }

    /// On a full disk a record passes the writes that wait for space.
    #[test]
    fn a_promise_waits_for_a_write_that_its_record_passed() {
        let mut bench = Bench::new();
        bench.tell(1, fence());
        bench.settle();
        assert!(bench.tell(1, write(10)).is_empty());
        assert!(bench.tell(2, fence()).is_empty());
        bench.node.store.1 = true;
        assert!(
            bench.event(NodeEvent::Tick).is_empty(),
            "the record is kept, the write waits"
        );
        let answers = bench.settle();
        assert!(matches!(
            answers[..],
            [
                (_, Ok(ReplicaReply::Done)),
                (_, Ok(ReplicaReply::Promised { end: Seq(10), .. }))
            ]
        ));
    }

    #[test]
    fn an_unfinished_resync_is_remembered_until_its_end_is_set() {
        let mut bench = Bench::new();
        bench.tell(1, fence());
        bench.tell(1, ReplicaRequest::BeginResync { since: Seq(4) });
        bench.tell(1, ReplicaRequest::BeginResync { since: Seq(9) });
        bench.settle();
        assert_eq!(bench.node.promise(SHARD), Some((token(1), Some(Seq(4)))));
        bench.tell(1, ReplicaRequest::SetEnd { end: Seq(20) });
        assert!(matches!(bench.settle()[..], [(_, Ok(ReplicaReply::Done))]));
        assert_eq!(bench.node.promise(SHARD), Some((token(1), None)));
    }

    #[test]
    fn an_end_does_not_finish_a_resync_that_began_after_it() {
        let mut bench = Bench::new();
        bench.tell(1, fence());
        bench.settle();
        bench.tell(1, ReplicaRequest::BeginResync { since: Seq(4) });
        bench.tell(1, ReplicaRequest::SetEnd { end: Seq(20) });
        bench.tell(1, ReplicaRequest::BeginResync { since: Seq(3) });
        let answers = bench.settle();
        assert!(
            answers
                .iter()
                .any(|(_, answer)| matches!(answer, Err(Refusal::Stale { .. })))
        );
        assert_eq!(bench.node.promise(SHARD), Some((token(1), Some(Seq(3)))));
    }

    #[test]
    fn what_is_kept_survives_and_the_unknown_refuses_everyone() {
        let kept = Kept {
            promised: token(3),
            good_until: Some(Seq(8)),
            record: vec![1, 2],
        };
        assert_eq!(Kept::decode(&kept.encode()), kept);
        assert_eq!(Kept::decode(&[9; 40]).promised.epoch, Epoch(u64::MAX));
        assert_eq!(Kept::decode(&[1]).promised.epoch, Epoch(u64::MAX));
    }

    #[test]
    fn a_disk_that_lost_a_written_shard_says_so_until_it_is_caught_up() {
        let mut record = crate::ShardRecord::new(SHARD, vec![DiskId(1)]);
        for (was_written, expected) in [(false, None), (true, Some(Seq(0)))] {
            record.was_written = was_written;
            let mut bench = Bench::new();
            for epoch in 1..3 {
                let record = record.encode();
                bench.tell(epoch, ReplicaRequest::Fence { record });
                let mut answers = Vec::new();
                while bench.node.is_busy() {
                    answers.extend(bench.event(NodeEvent::Tick));
                }
                let [(_, Ok(ReplicaReply::Promised { good_until, .. }))] = answers[..] else {
                    panic!("{answers:?}");
                };
                assert_eq!(good_until, expected, "fence {epoch}");
            }
        }
    }
}
