//! Reads are answered only while nobody else can have become the writer unnoticed.

use std::time::Duration;

use smallvec::smallvec;
use store::ReadPart;
use types::{
    BlockNo, DiskId, HeapBlock, Incarnation, Instant, LayerId, Lineage, RequestId, Seq, ShardId, ShardNo,
    Token, VdiId,
};
use weft_replication::{
    FromReplica, LEASE, ReplicaReply, ReplicaRequest, ShardOp, ShardRecord, Sharing, TAKE_OVER_WAIT,
    ToReplica, Writer, WriterEffect, WriterEvent, WriterNotice, WriterPhase,
};

const SHARD: ShardId = ShardId {
    vdi: VdiId(1),
    no: ShardNo(0),
};
const OURS: Incarnation = Incarnation(7);

struct Bench {
    writer: Writer<HeapBlock>,
    now: Instant,
    asked: Vec<(DiskId, ToReplica<HeapBlock>)>,
    answered: usize,
    saved: Vec<ShardRecord>,
    /// Whether reads wait, as the world was told.
    told: Vec<bool>,
    next: u64,
}

impl Bench {
    fn new(replicas: u128, since: u64) -> Bench {
        let disks: Vec<DiskId> = (1..=replicas).map(DiskId).collect();
        let mut record = ShardRecord::new(SHARD, disks.clone());
        record.was_written = true;
        let sharing = Sharing::Cluster {
            since: Incarnation(since),
        };
        let mut bench = Bench {
            writer: Writer::new(
                record,
                1024,
                Lineage::of_layer(SHARD.vdi, LayerId(1)),
                OURS,
                &disks,
                sharing,
            ),
            now: Instant(5_000_000_000),
            asked: Vec::new(),
            answered: 0,
            saved: Vec::new(),
            told: Vec::new(),
            next: 0,
        };
        bench.step(WriterEvent::Touch);
        bench
    }

    /// An open writer of a VDI that was never taken over.
    fn open(replicas: u128) -> Bench {
        let mut bench = Bench::new(replicas, 0);
        bench.answer_all();
        assert_eq!(bench.writer.status().phase, WriterPhase::Open);
        bench
    }

    fn step(&mut self, event: WriterEvent<HeapBlock>) {
        let mut effects = Vec::new();
        self.writer.step(self.now, event, &mut effects);
        for effect in effects {
            match effect {
                WriterEffect::Send(disk, message) => self.asked.push((disk, message)),
                WriterEffect::Reply(_, result) => {
                    result.expect("nothing fails here");
                    self.answered += 1;
                }
                WriterEffect::SaveRecord(record) => {
                    self.saved.push(record.clone());
                    self.step(WriterEvent::RecordSaved(record));
                }
                WriterEffect::Notice(WriterNotice::ReadsWait(waits)) => self.told.push(waits),
                WriterEffect::Notice(_) => {}
            }
        }
    }

    /// The oldest question of a disk, answered as a good disk does.
    fn answer(&mut self, disk: u128) {
        let disk = DiskId(disk);
        let at = self.asked.iter().position(|(of, _)| *of == disk);
        let (_, message) = self.asked.remove(at.expect("this disk was asked"));
        let reply = match message.request {
            ReplicaRequest::Fence { .. } => ReplicaReply::Promised {
                previous: Token::default(),
                end: Seq(5),
                good_until: None,
            },
            ReplicaRequest::Read { count, .. } => ReplicaReply::Read(smallvec![ReadPart::Zeros(count)]),
            ReplicaRequest::ChangedLeaves { .. } => ReplicaReply::Leaves(Vec::new()),
            _ => ReplicaReply::Done,
        };
        self.step(WriterEvent::Replica(FromReplica {
            shard: SHARD,
            disk,
            token: message.token,
            id: message.id,
            result: Ok(reply),
        }));
    }

    fn answer_all(&mut self) {
        while let Some((disk, _)) = self.asked.first() {
            self.answer(disk.0);
        }
    }

    fn wait(&mut self, time: Duration) {
        self.now = self.now + time;
    }

    fn tick(&mut self, time: Duration) {
        self.wait(time);
        self.step(WriterEvent::Tick);
    }

    /// Of the first leaf, so that the first disk is asked.
    fn read(&mut self) {
        self.next += 1;
        let (block, count, of) = (BlockNo(0), 1, None);
        self.step(WriterEvent::Request(
            RequestId(self.next),
            ShardOp::Read { block, count, of },
        ));
    }

    /// Disks that have questions to answer, in the order asked.
    fn asked(&self) -> Vec<u128> {
        self.asked.iter().map(|(disk, _)| disk.0).collect()
    }
}

#[test]
fn the_first_read_after_idleness_asks_for_leases_and_waits_for_them() {
    let mut bench = Bench::open(2);
    bench.wait(LEASE);
    assert!(bench.asked.is_empty(), "nothing is sent while nobody reads");
    bench.read();
    assert_eq!(
        bench.asked(),
        [1, 2],
        "the read, and a question for a lease beside it"
    );
    bench.answer(1);
    assert_eq!(bench.answered, 0, "the other may have promised somebody else");
    bench.answer(2);
    assert_eq!(bench.answered, 1);
}

#[test]
fn one_replica_of_three_that_is_silent_holds_up_no_read() {
    let mut bench = Bench::open(3);
    bench.wait(LEASE);
    bench.read();
    assert_eq!(bench.asked(), [1, 2, 3]);
    bench.answer(1);
    assert_eq!(bench.answered, 0);
    bench.answer(3);
    assert_eq!(bench.answered, 1);
}

#[test]
fn a_single_replica_is_asked_nothing_else() {
    let mut bench = Bench::open(1);
    for _ in 0..3 {
        bench.wait(2 * LEASE);
        bench.read();
        assert_eq!(bench.asked(), [1]);
        bench.answer(1);
    }
    assert_eq!(bench.answered, 3);
}

#[test]
fn steady_reads_never_wait() {
    let mut bench = Bench::open(2);
    let (mut reads, mut renewals) = (0, 0);
    for _ in 0..100 {
        bench.wait(Duration::from_millis(100));
        bench.read();
        reads += 1;
        bench.answer(1);
        assert_eq!(bench.answered, reads);
        renewals += bench.asked.len();
        bench.answer_all();
    }
    assert!((7..=9).contains(&renewals), "{renewals} in 10 s");
}

#[test]
fn writes_and_flushes_bring_leases_too() {
    let mut bench = Bench::open(3);
    bench.wait(LEASE);
    bench.step(WriterEvent::Request(RequestId(1000), ShardOp::Flush));
    bench.answer_all();
    bench.wait(LEASE / 2);
    bench.read();
    assert_eq!(bench.asked(), [1]);
}

#[test]
fn a_lease_counts_from_the_question() {
    let mut bench = Bench::open(2);
    bench.wait(LEASE);
    bench.read();
    bench.wait(LEASE);
    bench.answer_all_of_now();
    assert_eq!(bench.answered, 0, "both looked, but who knows when");
    assert_eq!(bench.asked(), [1, 2], "they are asked again");
    bench.answer_all();
    assert_eq!(bench.answered, 1);
}

#[test]
fn a_process_that_was_stopped_looks_at_its_clock() {
    let mut bench = Bench::open(2);
    bench.read();
    bench.wait(10 * LEASE);
    bench.answer(1);
    assert_eq!(bench.answered, 0);
}

#[test]
fn somebody_is_told_that_reads_wait() {
    let mut bench = Bench::open(2);
    bench.wait(LEASE);
    bench.read();
    bench.answer(1);
    bench.tick(LEASE / 2);
    assert!(bench.told.is_empty());
    bench.tick(LEASE / 2);
    assert_eq!(bench.told, [true]);
    assert!(bench.writer.status().reads_wait);
    bench.answer_all();
    assert_eq!((bench.answered, &bench.told[..]), (1, &[true, false][..]));
}

#[test]
fn a_pair_goes_on_without_the_one_that_gives_no_lease() {
    let mut bench = Bench::open(2);
    bench.wait(LEASE);
    bench.read();
    for _ in 0..40 {
        bench.tick(LEASE / 4);
        while bench.asked.iter().any(|(disk, _)| *disk == DiskId(1)) {
            bench.answer(1);
        }
    }
    assert_eq!(bench.answered, 1);
    assert_eq!(bench.saved[0].in_sync, [DiskId(1)]);
}

#[test]
fn who_takes_over_keeps_still_first() {
    for replicas in 1..=3 {
        let mut bench = Bench::new(replicas, OURS.0);
        bench.read();
        bench.step(WriterEvent::Request(RequestId(1000), ShardOp::Flush));
        bench.answer_all();
        assert!(bench.writer.status().keeps_still);
        bench.tick(TAKE_OVER_WAIT - Duration::from_millis(1));
        assert_eq!(bench.writer.status().phase, WriterPhase::Opening);
        assert!(
            bench.asked.is_empty() && bench.saved.is_empty(),
            "nothing changes"
        );
        bench.tick(Duration::from_millis(1));
        bench.answer_all();
        assert_eq!(bench.answered, 2);
        // The next life on this host need not wait again.
        assert_eq!(bench.saved.len(), 1);
        assert_eq!(bench.saved[0].saved_by, OURS);
    }
}

#[test]
fn who_starts_again_where_somebody_has_waited_does_not() {
    for (since, waits) in [(0, false), (1, true), (6, true)] {
        let mut bench = Bench::new(2, since);
        bench.answer_all();
        assert_eq!(
            bench.writer.status().phase == WriterPhase::Opening,
            waits,
            "{since}"
        );
    }
}

impl Bench {
    /// Answers what is asked now, and not what follows from that.
    fn answer_all_of_now(&mut self) {
        for disk in self.asked() {
            self.answer(disk);
        }
    }
}
