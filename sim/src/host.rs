//! One disk of a simulated pool with everything that drives it: the log store, its index, the replica role.

use std::collections::BTreeMap;

use edge::{Disk, KvStore};
use replication::{DiskNode, FromReplica, NodeEffect, NodeEvent, ReplicaReply, ReplicaRequest, ToReplica};
use store::{IndexRequest, IndexResponse, LeafKey, ReadPart, Store, StoreError, StoreSettings};
use types::{
    BLOCK_BYTES, BlockNo, DiskId, HeapBlock, Instant, LayerId, Lineage, Payload, RequestId, ShardId, Token,
};

use crate::trace::tell;
use crate::{LateWrites, Rng, SimDisk, SimKv};

/// The replica role over the real log store.
pub(crate) type Node = DiskNode<HeapBlock, Store<HeapBlock>>;

/// A disk and the process that serves it.
pub(crate) struct Host {
    pub id: DiskId,
    pub disk: SimDisk,
    pub kv: SimKv,
    /// `None` while the process is down.
    pub node: Option<Node>,
    /// The store said that the disk failed.
    pub has_failed: bool,
    /// It went down with the power, and may do so again while it is opened; after a kill that would be a fault more.
    lost_power: bool,
    /// The store said that it was the index that failed.
    has_bad_index: bool,
    /// Guests' writes wait for space.
    pub is_full: bool,
    /// Its index as it was some time ago, and its superblocks.
    old_index: SimKv,
    old_superblocks: Option<[[u8; 4096]; 2]>,
    /// What the disk was some lives ago, kept for those who put it back one day, and how often it had been opened then.
    copy: Option<(u64, SimDisk)>,
    keeps_copies: bool,
    /// As the control store remembers it, if anybody does.
    opens: u64,
    /// It is an older copy of itself; what it should be instead.
    pub newer: Option<Box<SimDisk>>,
    settings: StoreSettings,
    rng: Rng,
    loads: Vec<(LeafKey, Vec<u8>)>,
    /// Which connection each request came over: an answer goes back over the same one or nowhere.
    asked: BTreeMap<(ShardId, Token, RequestId), u64>,
    /// Counts the connections of the writer to this disk.
    connection: u64,
    /// Answers for the current connection.
    outbox: Vec<FromReplica<HeapBlock>>,
}

impl Host {
    /// A freshly formatted disk, served.
    pub fn new(
        id: DiskId,
        mut disk: SimDisk,
        segment_bytes: u64,
        settings: StoreSettings,
        seed: u64,
    ) -> Host {
        let mut rng = Rng::new(seed);
        let mut kv = SimKv::new();
        crate::boot::format(&mut rng, &mut disk, &mut kv, id, segment_bytes);
        let mut host = Host {
            id,
            disk,
            kv,
            node: None,
            has_failed: false,
            has_bad_index: false,
            lost_power: false,
            is_full: false,
            old_index: SimKv::new(),
            old_superblocks: None,
            copy: None,
            keeps_copies: false,
            opens: 0,
            newer: None,
            settings,
            rng,
            loads: Vec::new(),
            asked: BTreeMap::new(),
            connection: 0,
            outbox: Vec::new(),
        };
        host.start();
        host
    }

    /// Recovers the store and serves again.
    pub fn start(&mut self) {
        assert!(self.node.is_none(), "disk {} is served already", self.id);
        if std::mem::take(&mut self.has_bad_index) {
            // What the error tells its reader to do.
            self.kv.delete();
        }
        let known = if self.keeps_copies { self.opens } else { 0 };
        let (disk, kv) = (&mut self.disk, &mut self.kv);
        if self.rng.chance(1, 6) {
            crate::boot::fail_to_recover(&mut self.rng, disk, kv, known, self.lost_power);
        }
        let (store, report) = crate::boot::recover(&mut self.rng, disk, kv, self.settings, known);
        // An opening that did not get far may have noted it already.
        let is_doubted = report.is_doubted() || store.shards().iter().all(|shard| shard.is_doubtful);
        assert!(
            self.newer.is_none() || is_doubted,
            "disk {} is an older copy of itself and nobody noticed: {report:?}",
            self.id
        );
        self.newer = None;
        self.opens = report.open_count;
        self.node = Some(DiskNode::new(self.id, store));
        self.has_failed = false;
        if self.old_superblocks.is_none() || self.rng.chance(1, 4) {
            self.old_superblocks = Some(crate::boot::copy_superblocks(&self.disk));
        }
    }

    /// The process is gone; what it had under way ends as `fate` says.
    pub fn stop(&mut self, is_power_loss: bool) {
        self.node = None;
        self.loads.clear();
        self.is_full = false;
        self.has_failed = false;
        self.lost_power = is_power_loss;
        self.kv.crash(&mut self.rng);
        if is_power_loss {
            self.disk.lose_power();
        } else {
            self.disk.kill(LateWrites::Never);
        }
        if self.keeps_copies && (self.copy.is_none() || self.rng.chance(1, 6)) {
            self.copy = Some((self.opens, self.disk.clone()));
        }
        self.hang_up();
    }

    /// From now on old copies of this disk may come back, and the control store remembers how often it was opened.
    pub fn keep_copies(&mut self) {
        self.keeps_copies = true;
    }

    /// While the process is down somebody puts an old copy of the whole disk in its place; `false` when nobody has one.
    pub fn put_old_copy_back(&mut self) -> bool {
        assert!(self.node.is_none(), "disk {} is in use", self.id);
        match self.copy.take_if(|(opens, _)| *opens < self.opens) {
            Some((opens, copy)) => {
                tell(|| {
                    format!(
                        "  disk {} is what it was {} opens ago",
                        self.id,
                        self.opens - opens
                    )
                });
                self.newer = Some(Box::new(std::mem::replace(&mut self.disk, copy)));
                true
            }
            None => false,
        }
    }

    /// Somebody finds the right one again.
    pub fn put_newer_back(&mut self) {
        if let Some(newer) = self.newer.take() {
            tell(|| format!("  disk {} is what it should be", self.id));
            self.disk = *newer;
        }
    }

    /// While the process is down somebody deletes the index or brings an old copy of it back, or an old pair of
    /// superblocks; nothing of it may change what the disk holds.
    pub fn meddle(&mut self) {
        assert!(self.node.is_none(), "disk {} is in use", self.id);
        match self.rng.below(3) {
            0 => self.kv.delete(),
            1 => {
                let old = self.old_index.clone();
                self.kv.roll_back_to(&old);
            }
            _ => {
                let old = self.old_superblocks.expect("it was started once");
                crate::boot::restore_superblocks(&mut self.disk, &old);
            }
        }
    }

    /// A bit of the index flips. It is noticed, at the next start or when it is read.
    pub fn spoil_index(&mut self) {
        self.kv.damage(&mut self.rng);
    }

    /// The writer's connection is gone: no answer to anything asked so far.
    pub fn hang_up(&mut self) {
        self.connection += 1;
        self.outbox.clear();
    }

    /// A message over the current connection; lost if nobody listens.
    pub fn receive(&mut self, now: Instant, message: ToReplica<HeapBlock>) {
        if self.node.is_some() {
            self.asked
                .insert((message.shard, message.token, message.id), self.connection);
            self.step(now, NodeEvent::Message(message));
        }
    }

    /// One turn of the loop around the node.
    pub fn turn(&mut self, now: Instant, is_tick: bool) {
        if self.node.is_none() {
            return;
        }
        let mut completions = Vec::new();
        self.disk.poll(&mut completions);
        for completion in completions {
            self.step(now, NodeEvent::Disk(completion));
        }
        while !self.loads.is_empty() && self.rng.chance(3, 4) {
            let at = self.rng.index(self.loads.len());
            let (key, encoded) = self.loads.swap_remove(at);
            let value = self.kv.get(&encoded);
            self.step(now, NodeEvent::Index(IndexResponse::Loaded { key, value }));
        }
        if self.rng.chance(1, 3)
            && let Some(id) = self.kv.complete_one()
        {
            let result = Ok(());
            self.step(now, NodeEvent::Index(IndexResponse::Checkpointed { id, result }));
            if self.rng.chance(1, 4) {
                self.old_index = self.kv.clone();
            }
        }
        if is_tick {
            self.step(now, NodeEvent::Tick);
        }
        self.step(now, NodeEvent::TurnEnd);
    }

    /// Answers to send to the writer.
    pub fn take_answers(&mut self) -> Vec<FromReplica<HeapBlock>> {
        std::mem::take(&mut self.outbox)
    }

    /// Everything that this replica holds, asked of its node past writer and network. It must hold the shard and be healthy.
    pub fn content(&mut self, now: Instant, shard: ShardId, layer: LayerId, blocks: u32) -> Vec<u8> {
        const PATIENCE: u32 = 60_000;
        let promise = self.node.as_ref().and_then(|node| node.promise(shard));
        let token = promise.expect("it holds the shard").0;
        let mut bytes = Vec::new();
        for first in (0..blocks).step_by(256) {
            let id = RequestId(u64::MAX - u64::from(first));
            let request = ReplicaRequest::Read {
                lineage: Lineage::of_layer(shard.vdi, layer),
                block: BlockNo(first),
                count: 256,
            };
            let message = ToReplica {
                shard,
                token,
                id,
                request,
            };
            self.receive(now, message);
            let mut patience = PATIENCE;
            let answer = loop {
                self.turn(now, true);
                let answer = self.take_answers().into_iter().find(|answer| answer.id == id);
                if let Some(answer) = answer {
                    break answer;
                }
                patience -= 1;
                assert!(patience > 0, "disk {} does not answer a read", self.id);
            };
            let Ok(ReplicaReply::Read(parts)) = answer.result else {
                panic!("disk {} shard {shard}: {:?}", self.id, answer.result);
            };
            for part in parts {
                match part {
                    ReadPart::Data(data) => bytes.extend_from_slice(data.bytes()),
                    ReadPart::Zeros(count) => {
                        bytes.resize(bytes.len() + count as usize * BLOCK_BYTES as usize, 0);
                    }
                }
            }
        }
        bytes
    }

    fn step(&mut self, now: Instant, event: NodeEvent<HeapBlock>) {
        let Some(node) = &mut self.node else { return };
        let mut effects = Vec::new();
        node.step(now, event, &mut effects);
        for effect in effects {
            match effect {
                NodeEffect::Send(answer) => {
                    let asked = self.asked.remove(&(answer.shard, answer.token, answer.id));
                    if asked == Some(self.connection) {
                        self.outbox.push(answer);
                    }
                }
                NodeEffect::Disk(id, operation) => self.disk.submit(id, operation),
                NodeEffect::Index(IndexRequest::Load { key, encoded }) => self.loads.push((key, encoded)),
                NodeEffect::Index(IndexRequest::Checkpoint { id, batch }) => self.kv.submit(id, batch),
                NodeEffect::Failed(error) => {
                    tell(|| format!("    disk {} failed: {error}", self.id));
                    self.has_failed = true;
                    self.has_bad_index = matches!(error, StoreError::IndexFailed(_));
                }
                NodeEffect::Full(is_full) => {
                    tell(|| format!("    disk {} full: {is_full}", self.id));
                    self.is_full = is_full;
                }
            }
        }
    }
}
