//! A state of the world, and what each thing that may happen makes of it.
//!
//! ```text
//!  life 0: Writer ══ link ══ disk 0: DiskNode over MapStore         guests: scripts and an oracle
//!             │  ╲══ link ══ disk 1                                 control: the shard's record,
//!  life 1: Writer ══ …                                                       the VDI's writer
//! ```

use std::collections::{BTreeMap, VecDeque};
use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use replication::{
    DiskNode, FromReplica, NodeEffect, NodeEvent, Refusal, ReplicaReply, ReplicaRequest, ShardError, ShardOp,
    ShardRecord, ShardReply, Sharing, TAKE_OVER_WAIT, ToReplica, Writer, WriterEffect, WriterEvent,
    WriterPhase,
};
use store::ReadPart;
use types::{
    BlockNo, DiskId, Incarnation, Instant, LayerId, Lineage, RequestId, ShardId, ShardNo, Token, VdiId,
};

use crate::map_store::MapStore;
use crate::oracle::{Floors, Oracle, VALUES_PER_LIFE};
use crate::sealed::Sealed;
use crate::setup::{Ask, Budget, Setup};
use crate::value::Value;

/// The shard that everything is about.
pub const SHARD: ShardId = ShardId {
    vdi: VdiId(1),
    no: ShardNo(0),
};

/// Two leaves, so that a resync has to list them.
const SHARD_BLOCKS: u32 = 512;

/// More than every patience of a writer.
const LONG: Duration = Duration::from_secs(20);

/// Requests beside the script.
const LAST: usize = 1000;

/// The replica role of one disk.
pub type Node = DiskNode<Value, MapStore>;

/// A daemon's stay as the VDI's writer.
#[derive(Clone, Debug, Hash)]
pub struct Life {
    /// `None` when the process is dead or the writer was told that it is overtaken: neither says anything more.
    pub writer: Option<Box<Writer<Value>>>,
    /// How much of its script was asked for.
    asked: usize,
    /// Asked for and not answered, by place in the script.
    pending: BTreeMap<usize, Pending>,
    /// Changes of the record on their way to the control store.
    pub saves: VecDeque<ShardRecord>,
    /// Its words on their way back.
    pub saved: VecDeque<ShardRecord>,
}

#[derive(Clone, Debug, Hash)]
enum Pending {
    Write(u32, Value),
    Read(u32, Floors),
    Flush(Floors),
}

/// What is under way between a life and a disk.
#[derive(Clone, Debug)]
pub struct Link {
    /// Whether they can talk.
    pub is_up: bool,
    /// To the disk.
    pub to: VecDeque<ToReplica<Value>>,
    /// Sent before the link broke, where the rules allow that it arrives all the same.
    pub late: VecDeque<ToReplica<Value>>,
    /// To the writer.
    pub from: VecDeque<FromReplica<Value>>,
}

/// Ids only tie answers to questions. On a link both travel in order and the disk answers in order, so the order
/// says which answer is whose; and which number a question got depends on what ended before it, and means nothing.
impl Hash for Link {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.is_up.hash(state);
        self.to.len().hash(state);
        for message in self.to.iter().chain(&self.late) {
            (message.token, &message.request).hash(state);
        }
        for message in &self.from {
            (message.token, &message.result).hash(state);
        }
    }
}

/// What the control store holds.
#[derive(Clone, Debug, Hash)]
pub struct Control {
    /// Of the shard.
    pub record: ShardRecord,
    /// The life that is the VDI's writer.
    pub writer: usize,
    /// See [`crate::setup::Rules::saves_compare_the_writer`].
    pub compares_the_writer: bool,
    /// What writers are told of who else may write.
    pub sharing: Sharing,
}

/// Everything.
#[derive(Clone, Debug)]
pub struct State {
    /// By number.
    pub disks: Vec<Sealed<Node>>,
    /// By number, which is also the order of their incarnations.
    pub lives: Vec<Sealed<Life>>,
    /// Of life l and disk d at l * disks + d.
    pub links: Vec<Sealed<Link>>,
    /// The records.
    pub control: Sealed<Control>,
    /// What the guests may see.
    pub oracle: Sealed<Oracle>,
    /// What fate may still do.
    pub budget: Budget,
    /// Every host's clock.
    pub now: Instant,
    /// See [`Setup::is_apart`].
    pub is_apart: bool,
    /// A record that was read too early, where the rules allow it.
    pub read_early: Option<ShardRecord>,
    /// A disk that lost what was complete, until the shard is whole again.
    pub hurt: Option<usize>,
    /// The promise that is broken.
    pub broken: Option<Arc<str>>,
}

impl Hash for State {
    fn hash<H: Hasher>(&self, state: &mut H) {
        let State {
            disks,
            lives,
            links,
            control,
            oracle,
            budget,
            now,
            is_apart: _,
            read_early,
            hurt,
            broken,
        } = self;
        (disks, lives, links, control, oracle).hash(state);
        (budget, now, read_early, hurt, broken).hash(state);
    }
}

impl PartialEq for State {
    fn eq(&self, other: &State) -> bool {
        self.disks == other.disks
            && self.lives == other.lives
            && self.links == other.links
            && self.control == other.control
            && self.oracle == other.oracle
            && (self.budget, self.now, self.hurt) == (other.budget, other.now, other.hurt)
            && self.broken == other.broken
            && self.read_early == other.read_early
    }
}

fn id_of(disk: usize) -> DiskId {
    DiskId(disk as u128 + 1)
}

fn disk_of(id: DiskId) -> usize {
    id.0 as usize - 1
}

fn incarnation_of(life: usize) -> Incarnation {
    Incarnation(life as u64 + 1)
}

fn life_of(token: Token) -> usize {
    token.incarnation.0 as usize - 1
}

impl State {
    /// Freshly created: nobody has touched the shard.
    #[must_use]
    pub fn new(setup: &Setup) -> State {
        let node = |disk| DiskNode::new(id_of(disk), MapStore::new(setup.may_lose_power()));
        let mut state = State {
            disks: (0..setup.disks()).map(|disk| Sealed::new(node(disk))).collect(),
            lives: Vec::new(),
            links: Vec::new(),
            control: Sealed::new(Control {
                record: ShardRecord::new(SHARD, (0..setup.replicas).map(id_of).collect()),
                writer: 0,
                compares_the_writer: setup.rules.saves_compare_the_writer,
                sharing: if setup.is_shared {
                    let since = Incarnation(0);
                    Sharing::Cluster { since }
                } else {
                    Sharing::Alone
                },
            }),
            oracle: Sealed::new(Oracle::default()),
            budget: setup.budget,
            now: Instant(0),
            is_apart: setup.is_apart,
            read_early: None,
            hurt: None,
            broken: None,
        };
        state.begin_life();
        state
    }

    fn link(&mut self, life: usize, disk: usize) -> &mut Sealed<Link> {
        let at = life * self.disks.len() + disk;
        &mut self.links[at]
    }

    /// The same, to look at.
    #[must_use]
    pub fn link_of(&self, life: usize, disk: usize) -> &Link {
        &self.links[life * self.disks.len() + disk]
    }

    /// The life that was last to become the VDI's writer.
    #[must_use]
    pub fn newest(&self) -> usize {
        self.lives.len() - 1
    }

    /// Notes the first promise that is broken.
    pub fn fail(&mut self, why: impl Into<Arc<str>>) {
        if self.broken.is_none() {
            self.broken = Some(why.into());
        }
    }

    /// A daemon becomes the VDI's writer, by a swap in the control store, and reads the shard's record after that;
    /// or it has read it before, as the rules forbid. Where the last one lives on, it is another host's.
    pub fn begin_life(&mut self) {
        let life = self.lives.len();
        let may_live_on = life > 0 && self.lives[life - 1].writer.is_some();
        self.control.change(|control| {
            control.writer = life;
            if let Sharing::Cluster { since } = &mut control.sharing
                && may_live_on
            {
                *since = incarnation_of(life);
            }
        });
        let read_early = self.read_early.take();
        let record = read_early.unwrap_or_else(|| self.control.record.clone());
        let is_reached = |disk: &usize| !(self.is_apart && life > 0 && *disk == 0);
        let up: Vec<DiskId> = (0..self.disks.len()).filter(is_reached).map(id_of).collect();
        let sharing = self.control.sharing;
        let incarnation = incarnation_of(life);
        let head = Lineage::of_layer(record.shard.vdi, LayerId(0));
        let writer = Writer::new(record, SHARD_BLOCKS, head, incarnation, &up, sharing);
        self.lives.push(Sealed::new(Life {
            writer: Some(Box::new(writer)),
            asked: 0,
            pending: BTreeMap::new(),
            saves: VecDeque::new(),
            saved: VecDeque::new(),
        }));
        for disk in 0..self.disks.len() {
            self.links.push(Sealed::new(Link {
                is_up: up.contains(&id_of(disk)),
                to: VecDeque::new(),
                late: VecDeque::new(),
                from: VecDeque::new(),
            }));
        }
        self.tell(life, WriterEvent::Touch);
        for life in 0..life {
            self.tidy(life);
        }
    }

    /// Gives a writer an event and carries out what it says.
    pub fn tell(&mut self, life: usize, event: WriterEvent<Value>) {
        let mut effects = Vec::new();
        let had_quorum = self.has_quorum(life);
        let now = self.now;
        self.lives[life].change(|life| {
            if let Some(writer) = &mut life.writer {
                writer.step(now, event, &mut effects);
            }
        });
        let has_quorum = had_quorum && self.has_quorum(life);
        for effect in effects {
            match effect {
                WriterEffect::Reply(id, result) => self.reply(life, id.0 as usize, result, has_quorum),
                WriterEffect::Send(disk, message) => {
                    let link = self.link(life, disk_of(disk));
                    if link.is_up {
                        link.change(|link| link.to.push_back(message));
                    }
                }
                WriterEffect::SaveRecord(record) => {
                    self.lives[life].change(|life| life.saves.push_back(record));
                }
                WriterEffect::Notice(_) => {}
            }
        }
        let writer = self.lives[life].writer.as_ref();
        if writer.is_some_and(|writer| writer.status().phase == WriterPhase::Fenced) {
            if life == self.newest() {
                self.fail("the newest writer believes that it is overtaken");
            }
            self.silence(life);
        }
    }

    fn has_quorum(&self, life: usize) -> bool {
        let writer = self.lives[life].writer.as_ref();
        writer.is_some_and(|writer| !writer.status().is_waiting)
    }

    /// The writer says nothing more and hears nothing; what it has sent may still arrive.
    fn silence(&mut self, life: usize) {
        self.lives[life].change(|life| {
            life.writer = None;
            life.pending.clear();
            life.saved.clear();
        });
        for disk in 0..self.disks.len() {
            self.link(life, disk).change(|link| link.from.clear());
        }
        self.tidy(life);
    }

    /// Forgets what a silent life has under way and what can change nothing any more: messages that will be refused,
    /// and changes of the record that the control store will not take.
    fn tidy(&mut self, life: usize) {
        if self.lives[life].writer.is_some() {
            return;
        }
        if !self.may_save(life) && !self.lives[life].saves.is_empty() {
            self.lives[life].change(|life| life.saves.clear());
        }
        for disk in 0..self.disks.len() {
            let promise = self.disks[disk].promise(SHARD).map(|(promised, _)| promised);
            let link = self.link(life, disk);
            let is_refused = |message: &ToReplica<Value>| Some(message.token) < promise;
            if link.to.front().is_some_and(is_refused) {
                link.change(|link| {
                    while link.to.front().is_some_and(is_refused) {
                        link.to.pop_front();
                    }
                });
            }
        }
    }

    fn reply(
        &mut self,
        life: usize,
        id: usize,
        result: Result<ShardReply<Value>, ShardError>,
        decides: bool,
    ) {
        let Some(pending) = self.lives[life].change(|life| life.pending.remove(&id)) else {
            self.fail(format!("life {life}: request {id} is answered twice"));
            return;
        };
        let is_newest = life == self.newest();
        let checked = match (pending, result) {
            (Pending::Write(block, value), Ok(ShardReply::Done)) => {
                self.oracle.change(|oracle| oracle.completed(block, value))
            }
            (Pending::Flush(floors), Ok(ShardReply::Done)) => {
                self.oracle.change(|oracle| oracle.flushed(life, &floors));
                Ok(())
            }
            (Pending::Read(block, floors), Ok(ShardReply::Read(parts))) => {
                let value = match parts[..] {
                    [ReadPart::Data(value)] => value,
                    _ => Value(0),
                };
                self.oracle
                    .change(|oracle| oracle.read(block, value, &floors, life, is_newest, decides))
            }
            (_, Err(ShardError::Fenced)) if !is_newest => Ok(()),
            (pending, result) => Err(format!("life {life}: {pending:?} brought {result:?}")),
        };
        if let Err(why) = checked {
            self.fail(why);
        }
    }

    /// What the guest of a life asks next, if it may: not beside something that it conflicts with.
    #[must_use]
    pub fn next_ask(&self, setup: &Setup, life: usize) -> Option<Ask> {
        let held = &self.lives[life];
        let writer = held.writer.as_ref()?;
        let ask = *setup.scripts[life].get(held.asked)?;
        let conflicts = |pending: &Pending| match (ask, pending) {
            (Ask::Write(a), Pending::Write(b, _) | Pending::Read(b, _))
            | (Ask::Read(a), Pending::Write(b, _)) => a == *b,
            _ => false,
        };
        let is_open = writer.status().phase == WriterPhase::Open;
        (is_open && !held.pending.values().any(conflicts)).then_some(ask)
    }

    /// The guest of a life asks.
    pub fn ask(&mut self, life: usize, ask: Ask) {
        let no = self.lives[life].asked;
        let (pending, op) = match ask {
            Ask::Write(block) => {
                let value = Value(life as u8 * VALUES_PER_LIFE + no as u8 + 1);
                self.oracle.change(|oracle| oracle.issued(block, value));
                let op = ShardOp::Write {
                    block: BlockNo(block),
                    data: value,
                    crcs: [value.crc()].into_iter().collect(),
                };
                (Pending::Write(block, value), op)
            }
            Ask::Read(block) => {
                let op = ShardOp::Read {
                    block: BlockNo(block),
                    count: 1,
                    of: None,
                };
                (Pending::Read(block, self.oracle.floors(usize::MAX)), op)
            }
            Ask::Flush => (Pending::Flush(self.oracle.floors(life)), ShardOp::Flush),
        };
        self.lives[life].change(|life| {
            life.asked += 1;
            life.pending.insert(no, pending);
        });
        self.tell(life, WriterEvent::Request(RequestId(no as u64), op));
    }

    /// The next message of a link reaches its disk, which answers.
    pub fn deliver(&mut self, life: usize, disk: usize) {
        let message = self.link(life, disk).change(|link| link.to.pop_front());
        let message = message.expect("something is under way");
        self.node(disk, NodeEvent::Message(message));
        for life in 0..self.lives.len() {
            self.tidy(life);
        }
    }

    /// The next message of a connection that broke reaches its disk all the same.
    pub fn deliver_late(&mut self, life: usize, disk: usize) {
        let message = self.link(life, disk).change(|link| link.late.pop_front());
        let message = message.expect("something is under way");
        self.node(disk, NodeEvent::Message(message));
    }

    fn node(&mut self, disk: usize, event: NodeEvent<Value>) {
        let mut effects = Vec::new();
        self.disks[disk].change(|node| node.step(Instant(0), event, &mut effects));
        for effect in effects {
            if let NodeEffect::Send(answer) = effect {
                let life = life_of(answer.token);
                if self.lives[life].writer.is_some() && self.link_of(life, disk).is_up {
                    self.link(life, disk).change(|link| link.from.push_back(answer));
                }
            }
        }
    }

    /// The next answer of a link reaches its writer.
    pub fn answer(&mut self, life: usize, disk: usize) {
        let answer = self.link(life, disk).change(|link| link.from.pop_front());
        let answer = answer.expect("something is under way");
        self.tell(life, WriterEvent::Replica(answer));
    }

    /// The control store takes or refuses the oldest change that a life asked for.
    pub fn decide(&mut self, life: usize) {
        let record = self.lives[life].change(|life| life.saves.pop_front());
        let record = record.expect("something is under way");
        if self.may_save(life) && record.epoch.0 == self.control.record.epoch.0 + 1 {
            let least = if record.replicas.len() == 3 { 2 } else { 1 };
            if record.in_sync.len() < least {
                self.fail(format!("too few in sync: {record:?}"));
            }
            self.control.change(|control| control.record = record);
        }
        let held = self.control.record.clone();
        self.lives[life].change(|life| {
            if life.writer.is_some() {
                life.saved.push_back(held);
            }
        });
    }

    fn may_save(&self, life: usize) -> bool {
        self.control.writer == life || !self.control.compares_the_writer
    }

    /// The control store's word reaches a life.
    pub fn hear(&mut self, life: usize) {
        let held = self.lives[life].change(|life| life.saved.pop_front());
        let held = held.expect("something is under way");
        self.tell(life, WriterEvent::RecordSaved(held));
    }

    /// The control store's word is lost on its way to a life.
    pub fn lose_word(&mut self, life: usize) {
        self.lives[life].change(|life| life.saved.pop_front());
    }

    /// The process of a writer dies.
    pub fn kill_writer(&mut self, life: usize) {
        self.silence(life);
    }

    /// A link breaks, and its writer hears of it.
    pub fn cut(&mut self, setup: &Setup, life: usize, disk: usize) {
        self.link(life, disk).change(|link| {
            link.is_up = false;
            link.from.clear();
            let cut = std::mem::take(&mut link.to);
            if !setup.rules.links_break_whole {
                link.late.extend(cut);
            }
        });
        let disk = id_of(disk);
        self.tell(life, WriterEvent::DiskState { disk, is_up: false });
    }

    /// A link is there again.
    pub fn connect(&mut self, life: usize, disk: usize) {
        self.link(life, disk).change(|link| link.is_up = true);
        let disk = id_of(disk);
        self.tell(life, WriterEvent::DiskState { disk, is_up: true });
    }

    /// The process of a disk dies and starts again with what is on the device, or what is stable of it and a prefix
    /// of the rest; its links are broken.
    pub fn restart_disk(&mut self, disk: usize, kept: Option<usize>) {
        let store = match kept {
            None => self.disks[disk].store().clone(),
            Some(kept) => self.disks[disk].store().lose_power(kept),
        };
        self.disks[disk] = Sealed::new(DiskNode::new(id_of(disk), store));
        for life in 0..self.lives.len() {
            self.link(life, disk).change(|link| {
                link.is_up = false;
                link.to.clear();
                link.late.clear();
                link.from.clear();
            });
            let disk = id_of(disk);
            self.tell(life, WriterEvent::DiskState { disk, is_up: false });
        }
    }

    /// Power is lost everywhere.
    pub fn black_out(&mut self, kept: &[usize]) {
        for life in 0..self.lives.len() {
            self.silence(life);
            self.lives[life].change(|life| life.saves.clear());
            for disk in 0..self.disks.len() {
                self.link(life, disk).change(|link| link.to.clear());
            }
        }
        for (disk, kept) in kept.iter().enumerate() {
            self.restart_disk(disk, Some(*kept));
        }
        self.oracle.change(Oracle::power_lost);
    }

    /// Much time passes, and one writer notices.
    pub fn tick(&mut self, life: usize) {
        self.now = self.now + LONG;
        self.tell(life, WriterEvent::Tick);
    }

    /// As much time passes as a new writer waits for leases of an old one to end.
    pub fn pass(&mut self) {
        self.now = self.now + TAKE_OVER_WAIT;
        for life in 0..self.lives.len() {
            if self.is_waiting(life) {
                self.tell(life, WriterEvent::Tick);
            }
        }
    }

    /// The first replica is to be replaced by the spare.
    pub fn replace(&mut self, life: usize) {
        let spare = (0..self.disks.len())
            .map(id_of)
            .find(|disk| !self.control.record.replicas.contains(disk));
        let old = self.control.record.replicas[0];
        if let Some(new) = spare {
            self.tell(life, WriterEvent::ReplaceDisk { old, new });
        }
    }

    /// Whether the newest life serves, knows the record, and every replica is in sync.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        let record = &self.control.record;
        let writer = self.lives[self.newest()].writer.as_ref();
        writer.is_some_and(|writer| {
            writer.status().phase == WriterPhase::Open && !writer.is_busy() && *writer.record() == *record
        }) && record.in_sync.len() == record.replicas.len()
    }

    /// Whether a life's guest asked for anything.
    #[must_use]
    pub fn has_asked(&self, life: usize) -> bool {
        self.lives[life].asked > 0
    }

    /// Whether all of a life's script is answered.
    #[must_use]
    pub fn has_done(&self, setup: &Setup, life: usize) -> bool {
        let is_alive = self.lives[life].writer.is_some();
        is_alive && self.lives[life].asked == setup.scripts[life].len() && self.is_idle(life)
    }

    /// Whether time could change what a writer does: something is under way, or it waits for somebody.
    #[must_use]
    pub fn is_waiting(&self, life: usize) -> bool {
        self.lives[life]
            .writer
            .as_ref()
            .is_some_and(|writer| writer.is_busy())
    }

    /// One of so many states, by what is in it.
    #[must_use]
    pub fn is_chosen(&self, one_of: u64) -> bool {
        let mut hasher = std::hash::DefaultHasher::new();
        self.hash(&mut hasher);
        hasher.finish().is_multiple_of(one_of)
    }

    /// Blocks that somebody wrote.
    #[must_use]
    pub fn blocks(&self) -> Vec<u32> {
        self.oracle.blocks()
    }

    /// A read beside the script, when that is at rest.
    pub fn ask_last(&mut self, life: usize, block: u32) {
        let no = LAST + block as usize;
        let pending = Pending::Read(block, self.oracle.floors(usize::MAX));
        self.lives[life].change(|life| life.pending.insert(no, pending));
        let op = ShardOp::Read {
            block: BlockNo(block),
            count: 1,
            of: None,
        };
        self.tell(life, WriterEvent::Request(RequestId(no as u64), op));
    }

    /// All replicas hold the same.
    pub fn compare(&mut self, shard: ShardId) {
        let replicas = self.control.record.replicas.iter();
        let held: Vec<_> = replicas
            .map(|disk| self.disks[disk_of(*disk)].store().content(shard))
            .collect();
        if held.windows(2).any(|pair| pair[0] != pair[1]) {
            self.fail(format!("replicas differ: {held:?}"));
        }
    }

    /// Whether nothing that a life asked for waits for an answer.
    #[must_use]
    pub fn is_idle(&self, life: usize) -> bool {
        self.lives[life].pending.is_empty()
    }
}

/// A message in few words.
#[must_use]
pub fn in_words(request: &ReplicaRequest<Value>) -> String {
    match request {
        ReplicaRequest::Fence { .. } => "fence".into(),
        ReplicaRequest::Write { block, seq, data, .. } => {
            format!("write {data:?} to {block} as {:#x}", seq.0)
        }
        ReplicaRequest::LeafVersions { leaf, .. } => format!("versions of leaf {}", leaf.0),
        other => format!("{other:?}"),
    }
}

/// An answer in few words.
#[must_use]
pub fn answer_in_words(result: &Result<ReplicaReply<Value>, Refusal>) -> String {
    match result {
        Ok(ReplicaReply::Versions(_)) => "versions".into(),
        Ok(reply) => format!("{reply:?}"),
        Err(refusal) => format!("{refusal:?}"),
    }
}
