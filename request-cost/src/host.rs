//! One VDI over the real cores, driven as a data-plane thread of the daemon drives them, without the thread.
//!
//! A turn: a guest's requests, letters until there are none, each disk's batch closed, the disks' answers, and so on
//! until every request is answered. All that is kept between turns is what the daemon keeps.

use std::collections::VecDeque;

use edge::uring::{Buf, Pool, PoolConfig};
use edge::{Completion, DiskOp, IoId};
use replication::{DiskNode, FromReplica, NodeEffect, NodeEvent, ShardRecord, ToReplica};
use store::{FormatParams, IndexRequest, IndexResponse, Store, StoreSettings};
use types::{
    BLOCK_BYTES, DiskId, Incarnation, Instant, LayerId, Lineage, PoolId, RequestId, ShardId, ShardNo, VdiId,
};
use vdi::{Effect, Event, Op, Outcome, Vdi, VdiSpec};

use crate::memory::{MemoryDisk, MemoryIndex};

/// The guest's disk: one shard, 64 leaves, all of which stay in memory.
const VDI_BLOCKS: u64 = 16 << 10;
/// Blocks of one write while the guest's disk is filled.
const FILL_BLOCKS: u64 = 256;
/// Room for a log that needs no cleaning while we count.
const DISK_BYTES: u64 = 1 << 30;
/// Contents that guests write; made once, so that only the cores are counted.
const CONTENTS: u64 = 64;

enum Letter {
    ToNode(usize, ToReplica<Buf>),
    ToVdi(FromReplica<Buf>),
    /// The control store took it.
    Saved(ShardRecord),
}

struct Disk {
    node: DiskNode<Buf>,
    file: MemoryDisk,
    /// Submitted in this turn.
    operations: Vec<(IoId, DiskOp<Buf>)>,
    index: Vec<IndexRequest>,
    is_touched: bool,
}

pub struct Host {
    vdi: Vdi<Buf>,
    disks: Vec<Disk>,
    contents: Vec<Buf>,
    random: u64,
    now: Instant,
    next_request: u64,
    under_way: u64,
    letters: VecDeque<Letter>,
    vdi_effects: Vec<Effect<Buf>>,
    node_effects: Vec<NodeEffect<Buf>>,
    operations: Vec<(IoId, DiskOp<Buf>)>,
}

impl Host {
    /// A VDI with this many replicas, every block written once.
    pub fn new(replicas: u64, settings: StoreSettings) -> Host {
        let config = PoolConfig { slots: [1024, 0, 2] };
        let pool = Pool::new(config).expect("a few MiB of memory");
        let ids: Vec<DiskId> = (1..=replicas).map(|id| DiskId(u128::from(id))).collect();
        let shard = ShardId {
            vdi: VdiId(1),
            no: ShardNo(0),
        };
        let spec = VdiSpec {
            id: shard.vdi,
            bytes: VDI_BLOCKS * BLOCK_BYTES,
            sector_bytes: 512,
            shard_bytes: VDI_BLOCKS * BLOCK_BYTES,
            lineage: Lineage::of_layer(VdiId(1), LayerId(1)),
            sharing: replication::Sharing::Alone,
        };
        let record = ShardRecord::new(shard, ids.clone());
        let mut host = Host {
            vdi: Vdi::new(spec, vec![record], Incarnation(1), ids.clone()),
            disks: ids.iter().map(|id| Disk::new(*id, &pool, settings)).collect(),
            contents: (0..CONTENTS)
                .map(|seed| content(&pool, seed, BLOCK_BYTES))
                .collect(),
            random: 1,
            now: Instant(0),
            next_request: 0,
            under_way: 0,
            letters: VecDeque::new(),
            vdi_effects: Vec::new(),
            node_effects: Vec::new(),
            operations: Vec::new(),
        };
        let filling = content(&pool, 0, FILL_BLOCKS * BLOCK_BYTES);
        for block in (0..VDI_BLOCKS).step_by(FILL_BLOCKS as usize) {
            host.write(block, filling.clone());
            host.turn();
        }
        host
    }

    /// Writes (or reads) `requests` random blocks, `depth` of them a turn.
    pub fn serve(&mut self, is_write: bool, requests: u64, depth: u64) {
        for request in 0..requests {
            let block = self.draw() % VDI_BLOCKS;
            if is_write {
                let choice = self.draw() % CONTENTS;
                self.write(block, self.contents[choice as usize].clone());
            } else {
                let (offset, length) = (block * BLOCK_BYTES, BLOCK_BYTES);
                let of = None;
                self.request(Op::Read { offset, length, of });
            }
            if (request + 1) % depth == 0 {
                self.turn();
            }
        }
        self.turn();
    }

    fn write(&mut self, block: u64, data: Buf) {
        self.request(Op::Write {
            offset: block * BLOCK_BYTES,
            data,
            fua: false,
        });
    }

    /// splitmix64.
    fn draw(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.random;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    fn request(&mut self, op: Op<Buf>) {
        self.next_request += 1;
        self.under_way += 1;
        self.step_vdi(Event::Request(RequestId(self.next_request), op));
    }

    /// Until every request is answered.
    fn turn(&mut self) {
        loop {
            self.now.0 += 20_000;
            self.settle();
            if self.under_way == 0 && self.disks.iter().all(|disk| disk.operations.is_empty()) {
                return;
            }
            for at in 0..self.disks.len() {
                self.answer(at);
            }
        }
    }

    /// Letters and closed batches, until nobody has anything more to say.
    fn settle(&mut self) {
        loop {
            while let Some(letter) = self.letters.pop_front() {
                match letter {
                    Letter::ToNode(at, message) => self.step_node(at, NodeEvent::Message(message)),
                    Letter::ToVdi(message) => self.step_vdi(Event::Replica(message)),
                    Letter::Saved(record) => {
                        let shard = record.shard.no;
                        self.step_vdi(Event::RecordSaved { shard, record });
                    }
                }
            }
            let Some(at) = self.disks.iter().position(|disk| disk.is_touched) else {
                return;
            };
            self.step_node(at, NodeEvent::TurnEnd);
            self.disks[at].is_touched = false;
        }
    }

    /// The disk and the index have done what they were asked.
    fn answer(&mut self, at: usize) {
        std::mem::swap(&mut self.operations, &mut self.disks[at].operations);
        let mut operations = std::mem::take(&mut self.operations);
        for (id, operation) in operations.drain(..) {
            let result = Ok(self.disks[at].file.perform(operation));
            self.step_node(at, NodeEvent::Disk(Completion { id, result }));
        }
        self.operations = operations;
        while let Some(request) = self.disks[at].index.pop() {
            let response = match request {
                IndexRequest::Load { key, .. } => panic!("{key:?} has left memory"),
                IndexRequest::Checkpoint { id, .. } => IndexResponse::Checkpointed { id, result: Ok(()) },
            };
            self.step_node(at, NodeEvent::Index(response));
        }
    }

    fn step_vdi(&mut self, event: Event<Buf>) {
        let mut effects = std::mem::take(&mut self.vdi_effects);
        self.vdi.step(self.now, event, &mut effects);
        // The daemon asks after every step whether to tick.
        std::hint::black_box(self.vdi.is_busy());
        for effect in effects.drain(..) {
            match effect {
                Effect::Done(_, result) => {
                    if let Outcome::Read(parts) = result.expect("healthy disks serve every request") {
                        assert_eq!(parts.len(), 1, "one block was asked for");
                    }
                    self.under_way -= 1;
                }
                Effect::Send(disk, message) => {
                    self.letters
                        .push_back(Letter::ToNode(disk.0 as usize - 1, message));
                }
                Effect::SaveRecord(record) => {
                    self.letters.push_back(Letter::Saved(record));
                }
                Effect::Notice(notice) => panic!("nothing goes wrong here, and yet: {notice:?}"),
            }
        }
        self.vdi_effects = effects;
    }

    fn step_node(&mut self, at: usize, event: NodeEvent<Buf>) {
        let disk = &mut self.disks[at];
        disk.node.step(self.now, event, &mut self.node_effects);
        std::hint::black_box(disk.node.is_busy());
        disk.is_touched = true;
        for effect in self.node_effects.drain(..) {
            match effect {
                NodeEffect::Send(message) => self.letters.push_back(Letter::ToVdi(message)),
                NodeEffect::Disk(id, operation) => disk.operations.push((id, operation)),
                NodeEffect::Index(request) => disk.index.push(request),
                NodeEffect::Failed(error) => panic!("memory does not fail: {error}"),
                NodeEffect::Full(_) => panic!("the disk is large enough for what we count"),
            }
        }
    }
}

impl Disk {
    fn new(id: DiskId, pool: &Pool, settings: StoreSettings) -> Disk {
        let mut file = MemoryDisk::new(DISK_BYTES, pool.clone());
        let mut index = MemoryIndex::default();
        let params = FormatParams::new(id, PoolId(1), 7);
        store::format(&mut file, &mut index, params).expect("memory can be formatted");
        let (recovered, _) = store::recover(&mut file, &mut index, 7).expect("a fresh disk opens");
        Disk {
            node: DiskNode::new(id, Store::open(recovered, settings)),
            file,
            operations: Vec::new(),
            index: Vec::new(),
            is_touched: false,
        }
    }
}

fn content(pool: &Pool, seed: u64, bytes: u64) -> Buf {
    let mut buffer = pool.take(bytes as usize);
    for (at, byte) in buffer.iter_mut().enumerate() {
        *byte = (at as u64).wrapping_mul(seed + 3) as u8;
    }
    buffer.freeze()
}
