//! The machine: who owns what, and where each event goes.

use std::collections::{BTreeSet, VecDeque};

use replication::{FromReplica, ShardError, ShardOp, ShardRecord, ShardReply};
use replication::{Writer, WriterEffect, WriterEvent};
use types::{BLOCK_BYTES, DiskId, Incarnation, Instant, LEAF_BLOCKS, Payload, SHARD_BLOCKS_MAX, ShardNo};

use crate::background::Background;
use crate::conflict::Conflicts;
use crate::cut::Cuts;
use crate::flush::SharedFlush;
use crate::requests::{Ask, Running, Slab, Slot};
use crate::{Effect, Event, VdiSpec};

/// Requests that the writers are asked about at once; later ones wait their turn in order of arrival. Front ends
/// bound how many wait: their queues have sizes.
pub const ADMITTED_MAX: usize = 4096;

/// An open virtual disk.
///
/// One owner of everything that the guest's view of the disk needs: which requests run, which wait for which, what
/// was flushed. What is *not* here: replicas, quorums and seqs (each shard's [`Writer`]), and queues towards guests
/// (front ends). The price of one owner: a VDI lives on one thread, and its shards with it.
#[derive(Debug)]
pub struct Vdi<B: Payload> {
    pub(crate) spec: VdiSpec,
    pub(crate) shard_blocks: u32,
    incarnation: Incarnation,
    pub(crate) up: BTreeSet<DiskId>,
    /// Disks on other hosts.
    far: BTreeSet<DiskId>,
    pub(crate) shards: Vec<Shard<B>>,
    /// Admitted requests.
    pub(crate) requests: Slab<B>,
    pub(crate) conflicts: Conflicts,
    /// Checked requests that wait for admission.
    pub(crate) queue: VecDeque<Running<B>>,
    /// Shards that need a flush before all that was written is on stable media, or have one under way.
    pub(crate) unsynced: BTreeSet<ShardNo>,
    /// Shards whose writer asked for ticks; looked at again at each tick.
    pub(crate) ticking: Vec<ShardNo>,
    pub(crate) background: Background,
    pub(crate) cuts: Cuts<B>,
    /// No request is taken any more.
    pub(crate) is_closed: bool,
    /// Answers of writers, in order; worked off before `step` returns, and never from inside a writer's step.
    answers: VecDeque<Answer<B>>,
    /// Requests that just got their claim.
    pub(crate) ready: VecDeque<Slot>,
    /// Kept for its memory.
    writer_effects: Vec<WriterEffect<B>>,
}

/// One shard's part.
#[derive(Debug)]
pub(crate) struct Shard<B: Payload> {
    /// As the VDI was opened with it; once there is a writer, its own counts.
    pub record: ShardRecord,
    /// Made when the shard is first touched. Boxed: most shards of a large VDI are idle.
    pub writer: Option<Box<Writer<B>>>,
    pub is_ticking: bool,
    /// Something was written since the last flush was sent. True at first: a past life of the daemon may have
    /// completed writes that no flush has covered.
    pub is_dirty: bool,
    /// Flushes under way, oldest first.
    pub flushes: VecDeque<SharedFlush>,
    pub flush_number: u32,
}

type Answer<B> = (ShardNo, Ask, Result<ShardReply<B>, ShardError>);

/// What every function of one step needs.
pub(crate) struct Turn<'a, B> {
    pub now: Instant,
    pub effects: &'a mut Vec<Effect<B>>,
}

impl<B: Payload> Vdi<B> {
    /// An open VDI. `records` are its shards' in order, `up` the disks that can be reached now.
    ///
    /// # Panics
    /// If the spec does not make sense or the records are not those of its shards: control's promise.
    #[must_use]
    pub fn new(
        spec: VdiSpec,
        records: Vec<ShardRecord>,
        incarnation: Incarnation,
        up: Vec<DiskId>,
    ) -> Vdi<B> {
        assert!(matches!(spec.sector_bytes, 512 | 4096), "{spec:?}");
        assert_eq!(spec.lineage.newest().0, spec.id, "{spec:?}");
        assert!(
            spec.bytes.is_multiple_of(u64::from(spec.sector_bytes)),
            "{spec:?}"
        );
        let leaf_bytes = BLOCK_BYTES * u64::from(LEAF_BLOCKS);
        assert!(
            spec.shard_bytes > 0 && spec.shard_bytes.is_multiple_of(leaf_bytes),
            "{spec:?}"
        );
        let shard_blocks = spec.shard_bytes / BLOCK_BYTES;
        assert!(shard_blocks <= u64::from(SHARD_BLOCKS_MAX), "{spec:?}");
        let mut vdi = Vdi {
            shard_blocks: shard_blocks as u32,
            spec,
            incarnation,
            up: up.into_iter().collect(),
            far: BTreeSet::new(),
            shards: Vec::with_capacity(records.len()),
            requests: Slab::new(),
            conflicts: Conflicts::default(),
            queue: VecDeque::new(),
            unsynced: BTreeSet::new(),
            ticking: Vec::new(),
            background: Background::default(),
            cuts: Cuts::default(),
            is_closed: false,
            answers: VecDeque::new(),
            ready: VecDeque::new(),
            writer_effects: Vec::new(),
        };
        vdi.add_shards(records, true);
        vdi
    }

    /// What happened; appends what to do about it. Cannot fail.
    pub fn step(&mut self, now: Instant, event: Event<B>, effects: &mut Vec<Effect<B>>) {
        let turn = &mut Turn { now, effects };
        self.release_late(turn);
        match event {
            Event::Request(id, op) => self.request(turn, id, op),
            Event::Replica(message) => self.replica(turn, message),
            Event::DiskState { disk, is_up } => self.disk_state(turn, disk, is_up),
            Event::Distance { disk, is_far } => self.distance(turn, disk, is_far),
            Event::RecordSaved { shard, record } => self.record_saved(turn, shard, record),
            Event::Resized { bytes, added } => self.resize(bytes, added),
            Event::Hold => self.hold(turn),
            Event::Release => self.release(turn),
            Event::ReplaceDisk { old, new } => self.replace_disk(turn, old, new),
            Event::DiskLeaves { disk, refused } => self.disk_leaves(turn, disk, refused.as_ref()),
            Event::Scrub => self.start_scrub(),
            Event::Delete => self.start_delete(turn),
            Event::Tick => self.tick(turn),
        }
        self.settle(turn);
        debug_assert!(self.answers.is_empty() && self.ready.is_empty());
    }

    /// The shards' records in order, as last heard from the control store.
    pub fn records(&self) -> impl ExactSizeIterator<Item = &ShardRecord> {
        self.shards.iter().map(|shard| {
            shard
                .writer
                .as_ref()
                .map_or(&shard.record, |writer| writer.record())
        })
    }

    /// What it was opened with, and its present size and layers.
    #[must_use]
    pub fn spec(&self) -> &VdiSpec {
        &self.spec
    }

    /// Works off what writers answered and what that set free, until there is nothing left to do now.
    fn settle(&mut self, turn: &mut Turn<'_, B>) {
        loop {
            if let Some((shard, ask, result)) = self.answers.pop_front() {
                self.answered(turn, shard, ask, result);
            } else if let Some(slot) = self.ready.pop_front() {
                self.begin(turn, slot);
            } else if self.requests.len() < ADMITTED_MAX
                && let Some(running) = self.queue.pop_front()
            {
                self.admit(turn, running);
            } else if !self.advance_background(turn) {
                return;
            }
        }
    }

    /// Hands `event` to the shard's writer, made now if this is the first touch.
    pub(crate) fn tell(&mut self, turn: &mut Turn<'_, B>, no: ShardNo, event: WriterEvent<B>) {
        let shard = &mut self.shards[no.0 as usize];
        let writer = shard.writer.get_or_insert_with(|| {
            let up: Vec<DiskId> = self.up.iter().copied().collect();
            let mut writer = Writer::new(
                shard.record.clone(),
                self.shard_blocks,
                self.spec.lineage.clone(),
                self.incarnation,
                &up,
                self.spec.sharing,
            );
            writer.set_far(&self.far);
            Box::new(writer)
        });
        let mut produced = std::mem::take(&mut self.writer_effects);
        writer.step(turn.now, event, &mut produced);
        if !shard.is_ticking && writer.is_busy() {
            shard.is_ticking = true;
            self.ticking.push(no);
        }
        for effect in produced.drain(..) {
            match effect {
                WriterEffect::Reply(id, result) => self.answers.push_back((no, Ask::from_id(id), result)),
                WriterEffect::Send(disk, message) => turn.effects.push(Effect::Send(disk, message)),
                WriterEffect::SaveRecord(record) => turn.effects.push(Effect::SaveRecord(record)),
                WriterEffect::Notice(notice) => self.notice(turn, no, notice),
            }
        }
        self.writer_effects = produced;
    }

    /// A question of a request to a shard's writer.
    pub(crate) fn ask(&mut self, turn: &mut Turn<'_, B>, shard: ShardNo, ask: Ask, op: ShardOp<B>) {
        self.tell(turn, shard, WriterEvent::Request(ask.to_id(), op));
    }

    fn replica(&mut self, turn: &mut Turn<'_, B>, message: FromReplica<B>) {
        // Another VDI's, or of a shard that no writer here ever asked about: late, and nobody's.
        let no = message.shard.no;
        let is_ours = message.shard.vdi == self.spec.id
            && self
                .shards
                .get(no.0 as usize)
                .is_some_and(|shard| shard.writer.is_some());
        if is_ours {
            self.tell(turn, no, WriterEvent::Replica(message));
        }
    }

    fn disk_state(&mut self, turn: &mut Turn<'_, B>, disk: DiskId, is_up: bool) {
        if is_up {
            self.up.insert(disk);
        } else {
            self.up.remove(&disk);
        }
        for no in self.touched_shards() {
            self.tell(turn, no, WriterEvent::DiskState { disk, is_up });
        }
    }

    fn distance(&mut self, turn: &mut Turn<'_, B>, disk: DiskId, is_far: bool) {
        if is_far {
            self.far.insert(disk);
        } else {
            self.far.remove(&disk);
        }
        for no in self.touched_shards() {
            self.tell(turn, no, WriterEvent::Distance { disk, is_far });
        }
    }

    fn record_saved(&mut self, turn: &mut Turn<'_, B>, no: ShardNo, record: ShardRecord) {
        assert_eq!(record.shard.no, no, "a record of another shard");
        assert_eq!(record.shard.vdi, self.spec.id, "a record of another VDI");
        let shard = &mut self.shards[no.0 as usize];
        if shard.writer.is_some() {
            self.tell(turn, no, WriterEvent::RecordSaved(record));
        } else {
            shard.record = record;
        }
    }

    pub(crate) fn touched_shards(&self) -> Vec<ShardNo> {
        let touched = |(no, shard): (u32, &Shard<B>)| shard.writer.is_some().then_some(ShardNo(no));
        (0u32..).zip(&self.shards).filter_map(touched).collect()
    }

    /// Takes over the records of shards that come after those there are; `is_dirty` if they may hold writes.
    pub(crate) fn add_shards(&mut self, records: Vec<ShardRecord>, is_dirty: bool) {
        for record in records {
            let no = ShardNo(u32::try_from(self.shards.len()).expect("shards of a VDI"));
            assert_eq!((record.shard.vdi, record.shard.no), (self.spec.id, no));
            if is_dirty {
                self.unsynced.insert(no);
            }
            self.shards.push(Shard {
                record,
                writer: None,
                is_ticking: false,
                is_dirty,
                flushes: VecDeque::new(),
                flush_number: 0,
            });
        }
        assert_eq!(
            self.shards.len() as u64,
            self.spec.bytes.div_ceil(self.spec.shard_bytes),
            "one record for each shard of {:?}",
            self.spec
        );
    }
}
