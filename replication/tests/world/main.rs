//! A random small world: one shard, one to three replicas, writers that die, are replaced or linger, disks that go
//! and come back with less than they had. Whatever happens, completed writes stay and reads do not lie; and when
//! the faults end, everything completes and all replicas are equal.
//!
//! A failure prints its seed; `WEFT_SEED=<seed> cargo test -p weft-replication --test world` runs that one alone,
//! and `WEFT_SEEDS=<count>` chooses how many to run.

#![expect(
    clippy::disallowed_methods,
    reason = "a test is told its seed by the environment; the crate itself is pure"
)]

mod liar;
mod model;
mod oracle;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use model::{MapStore, Rng, value_of};
use oracle::{Oracle, Snapshot};
use store::{BlockState, ClearKind, ReadPart, ReadParts};
use types::{
    BlockNo, DiskId, HeapBlock, Incarnation, Instant, LayerId, LeafNo, Lineage, LineageStep, Payload,
    RequestId, ShardId, ShardNo, VdiId,
};
use weft_replication::{
    DiskNode, FromReplica, NodeEffect, NodeEvent, ReplicaRequest, ShardError, ShardOp, ShardRecord,
    ShardReply, Sharing, ToReplica, Writer, WriterEffect, WriterEvent, WriterNotice, WriterPhase,
};

const BLOCKS: [u32; 6] = [0, 1, 2, 255, 256, 300];
const SHARD_BLOCKS: u32 = 512;
const SNAPSHOTS_MAX: usize = 8;

fn shard() -> ShardId {
    ShardId {
        vdi: VdiId(1),
        no: ShardNo(0),
    }
}

/// What a reader sees of whom this is the newest layer.
fn lineage(highest: LayerId) -> Lineage {
    let step = LineageStep {
        vdi: shard().vdi,
        lowest: LayerId(0),
        highest,
    };
    Lineage::new(&[step]).expect("one range")
}

struct Disk {
    id: DiskId,
    node: DiskNode<HeapBlock, MapStore>,
    is_up: bool,
}

#[derive(Clone, Debug)]
enum Op {
    Write {
        blocks: Vec<(u32, usize)>,
    },
    Read {
        block: u32,
        floors: Vec<usize>,
    },
    /// Of a snapshot, by its number.
    Past {
        snapshot: usize,
        block: u32,
        count: u32,
    },
    /// What a snapshot has is to be on stable media.
    Seal {
        snapshot: usize,
    },
    Flush {
        floors: Vec<(u32, usize)>,
    },
}

/// One life of a writer, and its links.
struct Life {
    writer: Writer<HeapBlock>,
    /// Takes events; a dead one's messages still arrive.
    is_alive: bool,
    head: LayerId,
    ops: BTreeMap<RequestId, Op>,
    to: BTreeMap<DiskId, VecDeque<ToReplica<HeapBlock>>>,
    from: BTreeMap<DiskId, VecDeque<FromReplica<HeapBlock>>>,
    saves: VecDeque<ShardRecord>,
    saved: VecDeque<ShardRecord>,
    is_scrubbing: bool,
    /// What was asked of disks, where [`Lies`] are told.
    asked: BTreeMap<(DiskId, RequestId), ReplicaRequest<HeapBlock>>,
    /// A disk that others reach and this one does not.
    apart: Option<DiskId>,
    /// What goes to and fro between it and other disks than this one takes its time.
    alone_with: Option<DiskId>,
}

impl Life {
    fn is_heard(&self, disk: DiskId) -> bool {
        self.alone_with.is_none_or(|only| only == disk)
    }
}

/// Whether disks answer what they were not asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lies {
    Never,
    /// Each answer is also tried as every wrong one, at a copy of the writer.
    InCopies,
    /// Now and then one does.
    Sometimes,
}

struct World {
    rng: Rng,
    now: Instant,
    disks: Vec<Disk>,
    record: ShardRecord,
    lives: Vec<Life>,
    incarnation: u64,
    /// The first incarnation after the last take-over.
    since: Incarnation,
    next_id: u64,
    next_value: u64,
    /// The counter in the VDI's record.
    head: LayerId,
    snapshots: Vec<Snapshot>,
    oracle: Oracle,
    /// Hosts take the shard from each other often, and time passes in small steps.
    is_contested: bool,
    /// The one disk that may rot in this run.
    rotten: Option<DiskId>,
    /// A disk that may have lost completed writes, until all is whole again.
    hurt: Option<DiskId>,
    lies: Lies,
    /// Disks that did, since their link last broke.
    liars: BTreeSet<DiskId>,
    /// Kinds of questions that wrong answers were tried at.
    probed: BTreeSet<String>,
    /// Flushes that answers gave rise to.
    asked_now: VecDeque<(usize, RequestId)>,
    trace: Vec<String>,
    is_traced: bool,
}

impl World {
    fn new(seed: u64, lies: Lies) -> World {
        let mut rng = Rng::new(seed);
        let replicas = 1 + rng.below(3);
        let disks: Vec<Disk> = (1..=replicas as u128 + 1)
            .map(|id| Disk {
                id: DiskId(id),
                node: DiskNode::new(DiskId(id), MapStore::new(rng.next())),
                is_up: true,
            })
            .collect();
        let placed = disks[..replicas].iter().map(|disk| disk.id).collect();
        let is_contested = rng.chance(30);
        let rotten = (replicas > 1 && rng.chance(30)).then(|| disks[0].id);
        World {
            rng,
            now: Instant(1),
            disks,
            record: ShardRecord::new(shard(), placed),
            lives: Vec::new(),
            incarnation: 0,
            since: Incarnation(0),
            next_id: 0,
            next_value: 0,
            head: LayerId(0),
            snapshots: Vec::new(),
            oracle: Oracle::default(),
            is_contested,
            rotten,
            hurt: None,
            lies,
            liars: BTreeSet::new(),
            probed: BTreeSet::new(),
            asked_now: VecDeque::new(),
            trace: Vec::new(),
            is_traced: std::env::var_os("WEFT_SEED").is_some(),
        }
    }

    fn say(&mut self, line: impl FnOnce() -> String) {
        if self.is_traced {
            self.trace.push(line());
            eprintln!("{}", self.trace[self.trace.len() - 1]);
        }
    }

    fn current(&self) -> usize {
        self.lives.len() - 1
    }

    fn start_writer(&mut self, apart: Option<DiskId>) {
        self.incarnation += 1;
        let up: Vec<DiskId> = self
            .disks
            .iter()
            .filter(|disk| disk.is_up && Some(disk.id) != apart)
            .map(|disk| disk.id)
            .collect();
        self.say(|| "writer starts".to_owned());
        self.lives.push(Life {
            writer: Writer::new(
                self.record.clone(),
                SHARD_BLOCKS,
                lineage(self.head),
                Incarnation(self.incarnation),
                &up,
                Sharing::Cluster { since: self.since },
            ),
            is_alive: true,
            head: self.head,
            ops: BTreeMap::new(),
            to: BTreeMap::new(),
            from: BTreeMap::new(),
            saves: VecDeque::new(),
            saved: VecDeque::new(),
            is_scrubbing: false,
            asked: BTreeMap::new(),
            apart,
            alone_with: None,
        });
        let life = self.current();
        self.tell(life, WriterEvent::Touch);
    }

    /// The daemon restarts; what it asked of the control store may still arrive there.
    fn restart_writer(&mut self) {
        let life = self.current();
        self.lives[life].is_alive = false;
        let apart = self.lives[life].apart;
        self.start_writer(apart);
    }

    /// Another host takes over while the old writer knows nothing of it: it is the VDI's writer in the control store
    /// first, and reads the record then.
    fn take_over(&mut self) {
        self.since = Incarnation(self.incarnation + 1);
        let index = self.rng.below(self.disks.len());
        let apart = self.rng.chance(60).then(|| self.disks[index].id);
        let old = self.current();
        if self.is_contested {
            self.lives[old].alone_with = apart;
        }
        self.start_writer(apart);
    }

    fn tell(&mut self, life: usize, event: WriterEvent<HeapBlock>) {
        if !self.lives[life].is_alive {
            return;
        }
        self.say(|| format!("  {life} <- {event:?}"));
        let mut effects = Vec::new();
        self.lives[life].writer.step(self.now, event, &mut effects);
        for effect in effects {
            self.say(|| format!("  {life} -> {effect:?}"));
            match effect {
                WriterEffect::Reply(id, result) => self.reply(life, id, result),
                WriterEffect::Send(disk, message) => {
                    let is_reached = self.lives[life].apart != Some(disk);
                    if is_reached && self.disks.iter().any(|held| held.id == disk && held.is_up) {
                        if self.lies != Lies::Never {
                            let asked = &mut self.lives[life].asked;
                            asked.insert((disk, message.id), message.request.clone());
                        }
                        self.lives[life].to.entry(disk).or_default().push_back(message);
                    }
                }
                WriterEffect::SaveRecord(record) => self.lives[life].saves.push_back(record),
                WriterEffect::Notice(WriterNotice::ScrubDone { .. }) => self.lives[life].is_scrubbing = false,
                WriterEffect::Notice(_) => {}
            }
        }
        self.ask_flushes();
    }

    fn reply(&mut self, life: usize, id: RequestId, result: Result<ShardReply<HeapBlock>, ShardError>) {
        let op = self.lives[life].ops.remove(&id).expect("answered once");
        match (op, result) {
            (Op::Write { blocks }, Ok(ShardReply::Done)) => {
                for (no, index) in blocks {
                    self.oracle.completed(no, index);
                }
            }
            (Op::Flush { floors }, Ok(ShardReply::Done)) => self.oracle.flushed(&floors),
            (Op::Seal { snapshot }, Ok(ShardReply::Done)) => {
                self.say(|| format!("snapshot {snapshot} is made"));
                self.snapshots[snapshot].is_made = true;
            }
            (
                Op::Past {
                    snapshot,
                    block,
                    count,
                },
                Ok(ShardReply::Read(parts)),
            ) => {
                let values = values_of(&parts);
                assert_eq!(values.len(), count as usize, "parts add up");
                for (no, value) in (block..).zip(values) {
                    self.snapshots[snapshot].read(no, value);
                }
            }
            (Op::Past { snapshot, block, .. }, Ok(ShardReply::Versions(versions))) => {
                for no in block..block + 3 {
                    let state = versions[no as usize % 256].state;
                    self.snapshots[snapshot].is_data(no, matches!(state, BlockState::Data(_)));
                }
            }
            (Op::Read { block, floors }, Ok(ShardReply::Read(parts))) => {
                let values = values_of(&parts);
                assert_eq!(values.len(), floors.len(), "parts add up");
                let status = self.lives[life].writer.status();
                let decides =
                    !status.is_waiting && self.lives.iter().filter(|life| life.is_alive).count() == 1;
                for (at, (value, floor)) in values.into_iter().zip(floors).enumerate() {
                    self.oracle.read(block + at as u32, value, floor, decides);
                }
            }
            (_, Err(ShardError::Fenced)) => {
                assert_ne!(life, self.current(), "the newest writer was fenced");
            }
            (Op::Read { .. } | Op::Past { .. }, Err(ShardError::Unreadable { .. })) => {
                assert!(self.rotten.is_some(), "unreadable though nothing rots");
            }
            (op, other) => panic!("{op:?} brought {other:?}"),
        }
        self.seal(life, id);
    }

    /// A snapshot is made when all that was under way at the cut has ended and is on stable media.
    fn seal(&mut self, life: usize, ended: RequestId) {
        for snapshot in 0..self.snapshots.len() {
            let held = &mut self.snapshots[snapshot];
            let was_awaited = held.life == life && held.awaited.remove(&ended);
            if was_awaited && held.awaited.is_empty() {
                self.flush_snapshot(snapshot);
            }
        }
    }

    fn flush_snapshot(&mut self, snapshot: usize) {
        let life = self.snapshots[snapshot].life;
        let id = self.new_id();
        self.lives[life].ops.insert(id, Op::Seal { snapshot });
        self.asked_now.push_back((life, id));
    }

    fn new_id(&mut self) -> RequestId {
        self.next_id += 1;
        RequestId(self.next_id - 1)
    }

    /// The head becomes a snapshot, whatever is under way.
    fn cut(&mut self) {
        let life = self.current();
        if self.snapshots.len() >= SNAPSHOTS_MAX
            || self.lives[life].writer.status().phase == WriterPhase::Fenced
        {
            return;
        }
        let writes = self.lives[life].ops.iter();
        let writes = writes.filter(|(_, op)| matches!(op, Op::Write { .. }));
        let snapshot = Snapshot {
            life,
            highest: self.head,
            awaited: writes.map(|(id, _)| *id).collect(),
            allowed: self.oracle.now(),
            is_made: false,
            seen: BTreeMap::new(),
        };
        let is_sealed = snapshot.awaited.is_empty();
        self.snapshots.push(snapshot);
        self.head = LayerId(self.head.0 + 1);
        self.lives[life].head = self.head;
        let lineage = lineage(self.head);
        self.tell(life, WriterEvent::Cut { lineage });
        if is_sealed {
            self.flush_snapshot(self.snapshots.len() - 1);
            self.ask_flushes();
        }
    }

    /// Reads all of a snapshot, if it was made, with the last writer.
    fn read_whole_past(&mut self, snapshot: usize) {
        if !self.snapshots[snapshot].is_made {
            return;
        }
        let life = self.current();
        for block in BLOCKS {
            let (id, count) = (self.new_id(), 1);
            self.lives[life].ops.insert(
                id,
                Op::Past {
                    snapshot,
                    block,
                    count,
                },
            );
            let of = Some(lineage(self.snapshots[snapshot].highest));
            let block = BlockNo(block);
            self.tell(life, WriterEvent::Request(id, ShardOp::Read { block, count, of }));
            self.heal();
        }
    }

    /// What an answer gave rise to, after the step that brought it.
    fn ask_flushes(&mut self) {
        while let Some((life, id)) = self.asked_now.pop_front() {
            self.tell(life, WriterEvent::Request(id, ShardOp::Flush));
        }
    }

    /// Asks what a snapshot holds.
    fn ask_past(&mut self) {
        let life = self.rng.below(self.lives.len());
        let held = &self.lives[life];
        let made: Vec<usize> = (0..self.snapshots.len())
            .filter(|no| self.snapshots[*no].is_made && self.snapshots[*no].life <= life)
            .collect();
        let is_fenced = held.writer.status().phase == WriterPhase::Fenced;
        if made.is_empty() || !held.is_alive || held.ops.len() >= 6 || is_fenced {
            return;
        }
        let snapshot = made[self.rng.below(made.len())];
        let block = BLOCKS[self.rng.below(BLOCKS.len())];
        let (block, count) = if block < 3 { (0, 3) } else { (block, 1) };
        let of = Some(lineage(self.snapshots[snapshot].highest));
        let op = if block == 0 && self.rng.chance(30) {
            let leaf = LeafNo(0);
            ShardOp::Versions { leaf, of }
        } else {
            let block = BlockNo(block);
            ShardOp::Read { block, count, of }
        };
        let id = self.new_id();
        let past = Op::Past {
            snapshot,
            block,
            count,
        };
        self.lives[life].ops.insert(id, past);
        self.tell(life, WriterEvent::Request(id, op));
    }

    fn ask(&mut self) {
        let newest = self.current();
        // One that was overtaken and does not know has a guest that reads.
        let life = if self.rng.chance(40) {
            self.rng.below(self.lives.len())
        } else {
            newest
        };
        if !self.lives[life].is_alive {
            return;
        }
        if self.lives[life].ops.len() >= 6 || self.lives[life].writer.status().phase == WriterPhase::Fenced {
            return;
        }
        let block = BLOCKS[self.rng.below(BLOCKS.len())];
        let count = if block == 0 {
            1 + self.rng.below(3) as u32
        } else {
            1
        };
        let range = block..block + count;
        let is_busy = self.lives[life].ops.values().any(|op| match op {
            Op::Write { blocks } => blocks.iter().any(|(no, _)| range.contains(no)),
            Op::Read { block, floors } => {
                (*block..*block + floors.len() as u32).any(|no| range.contains(&no))
            }
            Op::Flush { .. } | Op::Past { .. } | Op::Seal { .. } => false,
        });
        if is_busy {
            return;
        }
        let id = self.new_id();
        let kind = if life == newest { self.rng.below(10) } else { 9 };
        let (op, asked) = match kind {
            0..4 => {
                let mut bytes = vec![0; 4096 * count as usize];
                let mut blocks = Vec::new();
                for at in 0..count {
                    self.next_value += 1;
                    let value = self.next_value;
                    bytes[at as usize * 4096..][..8].copy_from_slice(&value.to_le_bytes());
                    blocks.push((block + at, self.oracle.issued(block + at, value)));
                }
                let crcs = bytes.chunks(4096).map(types::crc32c).collect();
                let data = HeapBlock::new(&bytes);
                let block = BlockNo(block);
                (Op::Write { blocks }, ShardOp::Write { block, data, crcs })
            }
            4 => {
                let kind = if self.rng.chance(50) {
                    ClearKind::Trim
                } else {
                    ClearKind::Zero
                };
                let blocks = range.map(|no| (no, self.oracle.issued(no, 0))).collect();
                let block = BlockNo(block);
                (Op::Write { blocks }, ShardOp::Clear { block, count, kind })
            }
            5 => {
                let floors = self.oracle.floors();
                (Op::Flush { floors }, ShardOp::Flush)
            }
            _ => {
                let floors = range.map(|no| self.oracle.floor(no)).collect();
                let asked = ShardOp::Read {
                    block: BlockNo(block),
                    count,
                    of: None,
                };
                (Op::Read { block, floors }, asked)
            }
        };
        self.lives[life].ops.insert(id, op);
        self.tell(life, WriterEvent::Request(id, asked));
    }

    fn node(&mut self, index: usize, event: NodeEvent<HeapBlock>) {
        let mut effects = Vec::new();
        self.disks[index].node.step(self.now, event, &mut effects);
        for effect in effects {
            if let NodeEffect::Send(message) = effect {
                let life = message.token.incarnation.0 as usize - 1;
                if self.disks[index].is_up {
                    let from = &mut self.lives[life].from;
                    from.entry(message.disk).or_default().push_back(message);
                }
            }
        }
    }

    fn deliver_to_disk(&mut self) -> bool {
        let links: Vec<(usize, DiskId)> = self
            .lives
            .iter()
            .enumerate()
            .flat_map(|(life, held)| {
                let full = held
                    .to
                    .iter()
                    .filter(|(disk, link)| held.is_heard(**disk) && !link.is_empty());
                full.map(move |(disk, _)| (life, *disk))
            })
            .collect();
        if links.is_empty() {
            return false;
        }
        let (life, disk) = links[self.rng.below(links.len())];
        let message = self.lives[life].to.get_mut(&disk).and_then(VecDeque::pop_front);
        let index = self
            .disks
            .iter()
            .position(|held| held.id == disk)
            .expect("a known disk");
        self.node(index, NodeEvent::Message(message.expect("not empty")));
        true
    }

    fn deliver_to_writer(&mut self) -> bool {
        let links: Vec<(usize, DiskId)> = self
            .lives
            .iter()
            .enumerate()
            .flat_map(|(life, held)| {
                let full = held
                    .from
                    .iter()
                    .filter(|(disk, link)| held.is_heard(**disk) && !link.is_empty());
                full.map(move |(disk, _)| (life, *disk))
            })
            .collect();
        if links.is_empty() {
            return false;
        }
        let (life, disk) = links[self.rng.below(links.len())];
        let message = self.lives[life].from.get_mut(&disk).and_then(VecDeque::pop_front);
        let message = self.distort(life, message.expect("not empty"));
        self.tell(life, WriterEvent::Replica(message));
        true
    }

    /// The answer, or a lie.
    fn distort(&mut self, life: usize, mut message: FromReplica<HeapBlock>) -> FromReplica<HeapBlock> {
        let asked = self.lives[life].asked.remove(&(message.disk, message.id));
        let Some(request) = asked.filter(|_| self.lives[life].is_alive) else {
            return message;
        };
        let mut replies = liar::replies(&request, self.lives[life].head);
        if self.lies == Lies::InCopies {
            let kind = format!("{request:?}");
            let end = kind.find([' ', '(']).unwrap_or(kind.len());
            self.probed.insert(kind[..end].to_owned());
            for reply in replies {
                self.probe(life, &message, &request, &reply);
            }
        } else if self.lies == Lies::Sometimes && self.rng.chance(1) {
            let head = self.lives[life].head;
            replies.retain(|reply| !liar::is_answer(&request, reply, head));
            message.result = replies.swap_remove(self.rng.below(replies.len()));
            self.liars.insert(message.disk);
        }
        message
    }

    /// Tells a copy of a writer something else than what it is about to hear.
    fn probe(
        &self,
        life: usize,
        message: &FromReplica<HeapBlock>,
        request: &ReplicaRequest<HeapBlock>,
        reply: &liar::Result,
    ) {
        let mut writer = self.lives[life].writer.clone();
        let mut effects = Vec::new();
        let is_answer = liar::is_answer(request, reply, self.lives[life].head);
        let told = FromReplica {
            result: reply.clone(),
            ..message.clone()
        };
        writer.step(self.now, WriterEvent::Replica(told), &mut effects);
        let disk = message.disk;
        let refused = |effect: &WriterEffect<_>| matches!(effect, WriterEffect::Notice(WriterNotice::WrongAnswer { disk: of }) if *of == disk);
        let is_refused = effects.iter().any(refused);
        assert!(!is_answer || !is_refused, "{request:?} may be answered {reply:?}");
        // Nobody waits for it any more, or it is noticed. Where nobody waits, that it was answered at all may still tell
        // that no other writer is there, as the right answer would.
        let nothing = WriterEvent::Distance {
            disk: DiskId(99),
            is_far: false,
        };
        let brings_nothing = [nothing, WriterEvent::Replica(message.clone())]
            .into_iter()
            .any(|event| {
                let mut others = Vec::new();
                let mut writer = self.lives[life].writer.clone();
                writer.step(self.now, event, &mut others);
                format!("{effects:?}") == format!("{others:?}")
            });
        let is_harmless = is_answer || is_refused || brings_nothing;
        assert!(is_harmless, "{request:?} answered {reply:?} brings {effects:?}");
    }

    fn control(&mut self) -> bool {
        let life = self.rng.below(self.lives.len());
        self.control_of(life)
    }

    fn control_of(&mut self, life: usize) -> bool {
        if let Some(record) = self.lives[life].saved.pop_front() {
            self.tell(life, WriterEvent::RecordSaved(record));
            return true;
        }
        let Some(record) = self.lives[life].saves.pop_front() else {
            return false;
        };
        let is_writer = life == self.current();
        if is_writer && record.epoch.0 == self.record.epoch.0 + 1 {
            let least = if record.replicas.len() == 3 { 2 } else { 1 };
            assert!(record.in_sync.len() >= least, "{record:?}");
            self.say(|| format!("control takes {record:?}"));
            self.record = record;
        }
        let held = self.record.clone();
        self.lives[life].saved.push_back(held);
        true
    }

    fn pass(&mut self, time: Duration) {
        self.now = self.now + time;
        for life in 0..self.lives.len() {
            self.tell(life, WriterEvent::Tick);
        }
    }

    fn disk_down(&mut self, index: usize) {
        let disk = self.disks[index].id;
        self.disks[index].is_up = false;
        self.liars.remove(&disk);
        self.say(|| format!("disk {disk} goes"));
        for life in 0..self.lives.len() {
            self.lives[life].to.remove(&disk);
            self.lives[life].from.remove(&disk);
            self.lives[life].asked.retain(|(of, _), _| *of != disk);
            self.tell(life, WriterEvent::DiskState { disk, is_up: false });
        }
    }

    fn disk_up(&mut self, index: usize) {
        let disk = self.disks[index].id;
        self.disks[index].is_up = true;
        self.say(|| format!("disk {disk} comes"));
        for life in 0..self.lives.len() {
            if self.lives[life].apart != Some(disk) {
                self.tell(life, WriterEvent::DiskState { disk, is_up: true });
            }
        }
    }

    fn is_whole(&self) -> bool {
        let life = &self.lives[self.current()];
        life.writer.status().phase == WriterPhase::Open
            && !life.writer.is_busy()
            && self.record.in_sync.len() == self.record.replicas.len()
            && *life.writer.record() == self.record
    }

    fn disk_fault(&mut self) {
        let index = self.rng.below(self.disks.len());
        if !self.disks[index].is_up {
            // What waited for it was sent in one layer, and is sent again in the next.
            if self.rng.chance(30) {
                self.cut();
            }
            self.disk_up(index);
            return;
        }
        let id = self.disks[index].id;
        if self.hurt.is_some_and(|hurt| hurt != id) {
            // The one host that may be lost at a time has been.
            return;
        }
        match self.rng.below(4) {
            // The link is cut; the node works on.
            0 => self.disk_down(index),
            1..3 => {
                let store = self.disks[index].node.store().crash(&mut self.rng);
                self.disks[index].node = DiskNode::new(id, store);
                self.disk_down(index);
            }
            // Only one host may lose what was not flushed, and only when no other has yet to recover.
            _ => {
                let may = self.record.replicas.len() > 1
                    && self.hurt.is_none()
                    && self.is_whole()
                    && self.lives.iter().filter(|life| life.is_alive).count() == 1
                    && self.disks.iter().all(|disk| disk.is_up);
                if may {
                    self.hurt = Some(id);
                    self.say(|| format!("disk {id} loses power"));
                    let store = self.disks[index].node.store().lose_power(&mut self.rng);
                    self.disks[index].node = DiskNode::new(id, store);
                    self.disk_down(index);
                }
            }
        }
    }

    fn power_off(&mut self) {
        self.say(|| "power off".to_owned());
        for life in &mut self.lives {
            life.is_alive = false;
            life.to.clear();
            life.from.clear();
            life.saves.clear();
        }
        for disk in &mut self.disks {
            let store = disk.node.store().lose_power(&mut self.rng);
            disk.node = DiskNode::new(disk.id, store);
        }
        self.oracle.power_lost();
        self.start_writer(None);
    }

    fn rot(&mut self) {
        let Some(rotten) = self.rotten else { return };
        if self.hurt.is_some_and(|hurt| hurt != rotten) {
            return;
        }
        let index = self
            .disks
            .iter()
            .position(|disk| disk.id == rotten)
            .expect("a known disk");
        let mut store = self.disks[index].node.store().crash(&mut self.rng);
        store.rot(&mut self.rng);
        self.say(|| format!("disk {rotten} rots"));
        self.disks[index].node = DiskNode::new(rotten, store);
        self.disk_down(index);
    }

    fn replace(&mut self) {
        let life = self.current();
        let spare = self
            .disks
            .iter()
            .find(|disk| !self.record.replicas.contains(&disk.id) && disk.is_up)
            .filter(|disk| self.lives[life].apart != Some(disk.id));
        let Some(new) = spare.map(|disk| disk.id) else {
            return;
        };
        let old = self.record.replicas[self.rng.below(self.record.replicas.len())];
        let is_single = self.record.replicas.len() == 1;
        if is_single || self.record.in_sync.iter().any(|disk| *disk != old) {
            self.tell(life, WriterEvent::ReplaceDisk { old, new });
        }
    }

    fn act(&mut self) {
        if self.is_contested && self.rng.chance(15) {
            match self.rng.below(60) {
                0 => self.take_over(),
                1..10 => {
                    let steps = self.rng.below(5) as u64;
                    self.pass(Duration::from_millis(550 * steps));
                }
                _ => {
                    let life = self.current();
                    self.control_of(life);
                }
            }
            return;
        }
        match self.rng.below(1000) {
            0..300 => drop(self.deliver_to_disk()),
            300..520 => drop(self.deliver_to_writer()),
            520..760 => {
                let index = self.rng.below(self.disks.len());
                self.node(index, NodeEvent::Tick);
            }
            760..890 => self.ask(),
            890..910 => self.ask_past(),
            910..945 => drop(self.control()),
            945..949 => self.cut(),
            949..965 => {
                let seconds = self.rng.below(4) as u64;
                self.pass(Duration::from_secs(seconds));
            }
            965..985 => self.disk_fault(),
            985..990 => self.restart_writer(),
            990..992 => self.take_over(),
            992..993 => self.power_off(),
            993..995 => self.rot(),
            995..997 => self.replace(),
            _ => {
                let life = self.current();
                self.lives[life].is_scrubbing = true;
                self.tell(life, WriterEvent::Scrub);
            }
        }
        if self.hurt.is_some() && self.is_whole() && self.disks.iter().all(|disk| disk.is_up) {
            self.hurt = None;
        }
    }

    /// No more faults: everything asked completes and every replica comes to hold the same.
    fn heal(&mut self) {
        self.say(|| "heal".to_owned());
        self.now = Instant(self.now.0 + 20_000_000_000);
        if self.lies == Lies::Sometimes {
            self.lies = Lies::Never;
        }
        for life in 0..self.lives.len() {
            self.lives[life].alone_with = None;
            // Said once more below where the disk is down.
            if let Some(disk) = self.lives[life].apart.take()
                && self.disks.iter().any(|held| held.id == disk && held.is_up)
            {
                self.tell(life, WriterEvent::DiskState { disk, is_up: true });
            }
        }
        for disk in std::mem::take(&mut self.liars) {
            let index = self.disks.iter().position(|held| held.id == disk);
            self.disk_down(index.expect("a known disk"));
        }
        for index in 0..self.disks.len() {
            if !self.disks[index].is_up {
                self.disk_up(index);
            }
        }
        for round in 0.. {
            let mut moved = true;
            while moved {
                moved = false;
                while self.deliver_to_disk() {
                    moved = true;
                }
                for index in 0..self.disks.len() {
                    while self.disks[index].node.is_busy() {
                        self.node(index, NodeEvent::Tick);
                        moved = true;
                    }
                }
                while self.deliver_to_writer() {
                    moved = true;
                }
                for _ in 0..4 * self.lives.len() {
                    moved |= self.control();
                }
            }
            let life = &self.lives[self.current()];
            if life.ops.is_empty() && self.is_whole() && !life.is_scrubbing {
                break;
            }
            assert!(
                round < 200,
                "does not come to rest: {:?}\nops {:?}\n{:?}",
                life.writer.status(),
                life.ops,
                self.record
            );
            self.pass(Duration::from_secs(1));
        }
    }

    fn compare(&mut self) {
        let held: Vec<BTreeMap<(LayerId, u32), Option<u64>>> = self
            .record
            .replicas
            .iter()
            .map(|id| {
                let disk = self
                    .disks
                    .iter()
                    .find(|disk| disk.id == *id)
                    .expect("a known disk");
                let mut content = disk.node.store().content(shard());
                if self.rotten.is_some() {
                    content.retain(|_, value| value.is_some());
                }
                content
            })
            .collect();
        if self.rotten.is_none() {
            for other in &held[1..] {
                assert_eq!(held[0], *other, "replicas differ");
            }
        } else {
            for (no, value) in held.iter().flatten() {
                for other in &held {
                    let there = other.get(no);
                    assert!(there.is_none() || there == Some(value), "block {no:?} differs");
                }
            }
        }
    }

    /// A scrub mends in every layer what one replica has and another lost.
    fn mend(&mut self) {
        let life = self.current();
        self.lives[life].is_scrubbing = true;
        self.tell(life, WriterEvent::Scrub);
        self.heal();
        let replicas = self
            .disks
            .iter()
            .filter(|disk| self.record.replicas.contains(&disk.id));
        let held: Vec<_> = replicas.map(|disk| disk.node.store().content(shard())).collect();
        for other in &held[1..] {
            assert_eq!(held[0], *other, "replicas differ after a scrub");
        }
    }
}

fn values_of(parts: &ReadParts<HeapBlock>) -> Vec<u64> {
    let mut values = Vec::new();
    for part in parts {
        match part {
            ReadPart::Data(data) => {
                let blocks = data.length() / 4096;
                values.extend((0..blocks).map(|at| value_of(&data.slice(at * 4096, 4096))));
            }
            ReadPart::Zeros(count) => values.extend((0..*count).map(|_| 0)),
        }
    }
    values
}

fn run(seed: u64, lies: Lies) -> World {
    let mut world = World::new(seed, lies);
    world.start_writer(None);
    let steps = 200 + world.rng.below(800);
    for _ in 0..steps {
        world.act();
    }
    world.heal();
    for life in 0..world.current() {
        world.lives[life].is_alive = false;
    }
    world.compare();
    world.mend();
    for snapshot in 0..world.snapshots.len() {
        world.read_whole_past(snapshot);
    }
    for block in BLOCKS {
        let life = world.current();
        let id = world.new_id();
        let floors = vec![world.oracle.floor(block)];
        world.lives[life].ops.insert(id, Op::Read { block, floors });
        let block = BlockNo(block);
        world.tell(
            life,
            WriterEvent::Request(
                id,
                ShardOp::Read {
                    block,
                    count: 1,
                    of: None,
                },
            ),
        );
        world.heal();
    }
    world
}

/// Runs many seeds, or the one that the environment names.
fn run_seeds(test: &str, lies: Lies, count: u64, mut look: impl FnMut(World)) {
    if let Ok(seed) = std::env::var("WEFT_SEED") {
        run(seed.parse().expect("WEFT_SEED is a number"), lies);
        return;
    }
    let count =
        std::env::var("WEFT_SEEDS").map_or(count, |count| count.parse().expect("WEFT_SEEDS is a number"));
    for seed in 0..count {
        match std::panic::catch_unwind(|| run(seed, lies)) {
            Ok(world) => look(world),
            Err(panic) => {
                eprintln!(
                    "seed {seed}: WEFT_SEED={seed} cargo test -p weft-replication --test world {test} -- --nocapture"
                );
                std::panic::resume_unwind(panic);
            }
        }
    }
}

#[test]
fn faults_lose_nothing_and_end_in_equal_replicas() {
    run_seeds("faults_lose", Lies::Never, 3_000, drop);
}

#[test]
fn disks_that_answer_nonsense_lose_nothing() {
    run_seeds("nonsense", Lies::Sometimes, 500, drop);
}

#[test]
fn no_reply_is_believed_that_was_not_asked_for() {
    let mut probed = BTreeSet::new();
    run_seeds("no_reply_is_believed", Lies::InCopies, 60, |world| {
        probed.extend(world.probed);
    });
    // All there are, where more than one seed ran.
    let kinds = "BeginResync ChangedLeaves Clear Drop Fence Flush LeafVersions Read Repair SetEnd Void Write";
    assert!(
        probed.is_empty() || probed.iter().eq(kinds.split(' ')),
        "{probed:?}"
    );
}
