//! A disk that comes back empty under its old name counts for nothing when a shard is taken over.

use std::time::Duration;

use types::{
    DiskId, HeapBlock, Incarnation, Instant, LayerId, Lineage, RequestId, Seq, ShardId, ShardNo, Token, VdiId,
};
use weft_replication::{
    FromReplica, ReplicaReply, ReplicaRequest, ShardRecord, Sharing, Writer, WriterEffect, WriterEvent,
    WriterPhase,
};

const SHARD: ShardId = ShardId {
    vdi: VdiId(1),
    no: ShardNo(0),
};

struct Bench {
    writer: Writer<HeapBlock>,
    now: Instant,
    /// Asked of disks and not answered.
    asked: Vec<(DiskId, Token, RequestId, ReplicaRequest<HeapBlock>)>,
}

impl Bench {
    fn new(replicas: u128, up: &[u128]) -> Bench {
        let mut record = ShardRecord::new(SHARD, (1..=replicas).map(DiskId).collect());
        record.was_written = true;
        let up: Vec<DiskId> = up.iter().copied().map(DiskId).collect();
        let mut bench = Bench {
            writer: Writer::new(
                record,
                256,
                Lineage::of_layer(SHARD.vdi, LayerId(1)),
                Incarnation(7),
                &up,
                Sharing::Alone,
            ),
            now: Instant::default(),
            asked: Vec::new(),
        };
        bench.step(WriterEvent::Touch);
        bench
    }

    fn step(&mut self, event: WriterEvent<HeapBlock>) {
        let mut effects = Vec::new();
        self.writer.step(self.now, event, &mut effects);
        for effect in effects {
            if let WriterEffect::Send(disk, message) = effect {
                self.asked
                    .push((disk, message.token, message.id, message.request));
            }
        }
    }

    fn report(&mut self, disk: u128, end: u64, good_until: Option<u64>) {
        let disk = DiskId(disk);
        let at = self
            .asked
            .iter()
            .position(|(to, _, _, request)| *to == disk && matches!(request, ReplicaRequest::Fence { .. }))
            .expect("a fence");
        let (_, token, id, _) = self.asked.remove(at);
        let result = Ok(ReplicaReply::Promised {
            previous: Token::default(),
            end: Seq(end),
            good_until: good_until.map(Seq),
        });
        let shard = SHARD;
        self.step(WriterEvent::Replica(FromReplica {
            shard,
            disk,
            token,
            id,
            result,
        }));
    }

    fn wait(&mut self) {
        for _ in 0..10 {
            self.now = self.now + Duration::from_secs(2);
            self.step(WriterEvent::Tick);
        }
    }

    /// Disks told to catch up, and from where.
    fn told_to_resync(&self) -> Vec<(u128, Seq)> {
        let begin = |(disk, _, _, request): &(DiskId, _, _, _)| match request {
            ReplicaRequest::BeginResync { since } => Some((disk.0, *since)),
            _ => None,
        };
        self.asked.iter().filter_map(begin).collect()
    }

    fn is_shut(&self) -> bool {
        self.writer.status().phase == WriterPhase::Opening && self.told_to_resync().is_empty()
    }
}

#[test]
fn an_empty_and_a_lagging_replica_are_no_quorum_of_three() {
    let mut bench = Bench::new(3, &[1, 2]);
    bench.report(1, 0, Some(0));
    bench.report(2, 50, None);
    bench.wait();
    assert!(bench.is_shut(), "the third may hold more");
    assert!(bench.writer.status().is_waiting, "and somebody is told");
    bench.step(WriterEvent::DiskState {
        disk: DiskId(3),
        is_up: true,
    });
    bench.report(3, 90, None);
    bench.step(WriterEvent::Tick);
    assert_eq!(bench.told_to_resync(), [(1, Seq(0)), (2, Seq(50))]);
}

#[test]
fn an_empty_replica_does_not_open_a_pair_alone() {
    let mut bench = Bench::new(2, &[1]);
    bench.report(1, 0, Some(0));
    bench.wait();
    assert!(bench.is_shut() && bench.writer.status().is_waiting);
}

#[test]
fn where_all_is_lost_the_shard_stays_shut() {
    let mut bench = Bench::new(1, &[1]);
    bench.report(1, 0, Some(0));
    bench.wait();
    assert!(bench.is_shut() && bench.writer.status().is_waiting);
}

#[test]
fn a_replica_whose_log_lost_parts_is_believed_only_when_everybody_was_asked() {
    let mut bench = Bench::new(2, &[1]);
    bench.report(1, 70, Some(0));
    bench.wait();
    assert!(bench.is_shut());
    bench.step(WriterEvent::DiskState {
        disk: DiskId(2),
        is_up: true,
    });
    bench.report(2, 60, None);
    bench.step(WriterEvent::Tick);
    assert_eq!(bench.told_to_resync(), [(1, Seq(0))]);
}

#[test]
fn a_longer_stream_with_holes_in_it_is_not_the_one_that_counts() {
    let mut bench = Bench::new(3, &[1, 2, 3]);
    // It died while it was caught up: of what comes after 10 it has some, and that up to 50.
    bench.report(1, 50, Some(10));
    bench.report(2, 20, None);
    bench.report(3, 20, None);
    bench.step(WriterEvent::Tick);
    assert_eq!(bench.told_to_resync(), [(1, Seq(10))]);
}
