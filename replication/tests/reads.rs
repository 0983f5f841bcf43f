//! Whom a read is asked of: near replicas before far ones, another one where the first does not answer.

use std::time::Duration;

use edge::DiskError;
use smallvec::smallvec;
use store::{BlockState, BlockVersion, ClearKind, ReadPart, StoreError};
use types::{
    BlockNo, BlockSum, DiskId, HeapBlock, Incarnation, Instant, LayerId, Lineage, LineageStep, Payload,
    RequestId, Seq, ShardId, ShardNo, Token, VdiId,
};
use weft_replication::{
    FromReplica, Refusal, RepairContent, ReplicaReply, ReplicaRequest, ShardError, ShardOp, ShardRecord,
    Sharing, Writer, WriterEffect, WriterEvent, WriterNotice,
};

const SHARD: ShardId = ShardId {
    vdi: VdiId(1),
    no: ShardNo(0),
};
const GUEST: RequestId = RequestId(1);

type Question = (DiskId, Token, RequestId, ReplicaRequest<HeapBlock>);

fn layers(lowest: u32, highest: u32) -> Lineage {
    let step = LineageStep {
        vdi: SHARD.vdi,
        lowest: LayerId(lowest),
        highest: LayerId(highest),
    };
    Lineage::new(&[step]).expect("a range")
}

struct Bench {
    writer: Writer<HeapBlock>,
    now: Instant,
    asked: Vec<Question>,
    /// What the guest was told.
    replies: Vec<(RequestId, Result<(), ShardError>)>,
    has_wrong_answer: bool,
}

impl Bench {
    /// An open writer over disks 1 to 3.
    fn open(far: &[u128]) -> Bench {
        Bench::of(3, far)
    }

    fn of(disks: u128, far: &[u128]) -> Bench {
        let mut record = ShardRecord::new(SHARD, (1..=disks).map(DiskId).collect());
        record.was_written = true;
        let up: Vec<DiskId> = (1..=disks).map(DiskId).collect();
        let mut bench = Bench {
            writer: Writer::new(record, 1024, layers(0, 1), Incarnation(7), &up, Sharing::Alone),
            now: Instant::default(),
            asked: Vec::new(),
            replies: Vec::new(),
            has_wrong_answer: false,
        };
        bench.writer.set_far(&far.iter().copied().map(DiskId).collect());
        bench.step(WriterEvent::Touch);
        for disk in 1..=disks {
            bench.promise(disk);
        }
        // Whatever the opening asks for besides: done.
        while let Some((disk, token, id, _)) = bench.asked.pop() {
            bench.answer(disk.0, token, id, Ok(ReplicaReply::Done));
        }
        bench
    }

    fn step(&mut self, event: WriterEvent<HeapBlock>) {
        let mut effects = Vec::new();
        self.writer.step(self.now, event, &mut effects);
        for effect in effects {
            match effect {
                WriterEffect::Send(disk, message) => {
                    self.asked
                        .push((disk, message.token, message.id, message.request));
                }
                WriterEffect::Reply(id, result) => self.replies.push((id, result.map(|_| ()))),
                WriterEffect::SaveRecord(record) => {
                    // Saved at once.
                    self.step(WriterEvent::RecordSaved(record));
                }
                WriterEffect::Notice(notice) => {
                    self.has_wrong_answer |= matches!(notice, WriterNotice::WrongAnswer { .. });
                }
            }
        }
    }

    fn take(&mut self, disk: u128) -> Question {
        let at = self.asked.iter().position(|question| question.0 == DiskId(disk));
        self.asked.remove(at.expect("this disk was asked"))
    }

    fn answer(
        &mut self,
        disk: u128,
        token: Token,
        id: RequestId,
        result: Result<ReplicaReply<HeapBlock>, Refusal>,
    ) {
        self.step(WriterEvent::Replica(FromReplica {
            shard: SHARD,
            disk: DiskId(disk),
            token,
            id,
            result,
        }));
    }

    fn promise(&mut self, disk: u128) {
        let (_, token, id, request) = self.take(disk);
        assert!(matches!(request, ReplicaRequest::Fence { .. }), "{request:?}");
        let promised = ReplicaReply::Promised {
            previous: Token::default(),
            end: Seq(5),
            good_until: None,
        };
        self.answer(disk, token, id, Ok(promised));
    }

    fn read(&mut self, block: u32) {
        let op = ShardOp::Read {
            block: BlockNo(block),
            count: 1,
            of: None,
        };
        self.step(WriterEvent::Request(GUEST, op));
    }

    fn give(&mut self, disk: u128) {
        let (_, token, id, _) = self.take(disk);
        let content = smallvec![ReadPart::Zeros(1)];
        self.answer(disk, token, id, Ok(ReplicaReply::Read(content)));
    }

    fn refuse(&mut self, disk: u128) {
        self.refuse_in(disk, 1);
    }

    fn refuse_in(&mut self, disk: u128, layer: u32) {
        let (_, token, id, request) = self.take(disk);
        let ReplicaRequest::Read { block, .. } = request else {
            panic!("not a read: {request:?}");
        };
        let corrupt = StoreError::Corrupt {
            shard: SHARD,
            layer: LayerId(layer),
            block,
        };
        self.answer(disk, token, id, Err(Refusal::Store(corrupt)));
    }

    fn wait(&mut self, milliseconds: u64) {
        self.now = self.now + Duration::from_millis(milliseconds);
        self.step(WriterEvent::Tick);
    }

    fn asked(&self) -> Vec<u128> {
        self.asked.iter().map(|question| question.0.0).collect()
    }
}

#[test]
fn reads_go_round_the_near_replicas_only() {
    let mut bench = Bench::open(&[2]);
    let mut whom = Vec::new();
    for leaf in 0..4 {
        bench.read(leaf * 256);
        let disk = bench.asked()[0];
        whom.push(disk);
        bench.give(disk);
    }
    assert!(
        whom.contains(&1) && whom.contains(&3) && !whom.contains(&2),
        "{whom:?}"
    );
    assert_eq!(bench.replies.len(), 4);
}

#[test]
fn a_far_replica_is_asked_where_no_near_one_can_be() {
    let mut bench = Bench::open(&[2, 3]);
    bench.step(WriterEvent::DiskState {
        disk: DiskId(1),
        is_up: false,
    });
    bench.asked.clear();
    bench.read(0);
    assert!(matches!(bench.asked()[..], [2 | 3]), "{:?}", bench.asked());
    bench.step(WriterEvent::Distance {
        disk: DiskId(3),
        is_far: false,
    });
    bench.read(0);
    assert_eq!(bench.asked()[1], 3, "it came near");
}

#[test]
fn a_read_that_is_not_answered_is_asked_of_another() {
    let mut bench = Bench::open(&[2, 3]);
    bench.read(0);
    bench.wait(99);
    assert_eq!(bench.asked(), [1], "not yet");
    bench.wait(1);
    let second = bench.asked()[1];
    bench.give(second);
    assert_eq!(bench.replies, [(GUEST, Ok(()))]);
    bench.give(1);
    assert_eq!(bench.replies.len(), 1, "the late answer is nobody's");

    // For a while the slow one is asked last, then first again.
    bench.read(0);
    assert_ne!(bench.asked(), [1]);
    let other = bench.asked()[0];
    bench.give(other);
    bench.wait(3000);
    bench.read(0);
    assert_eq!(bench.asked(), [1]);
}

#[test]
fn each_is_asked_once_and_the_last_answer_decides() {
    let mut bench = Bench::open(&[]);
    bench.read(0);
    for _ in 0..5 {
        bench.wait(100);
    }
    let mut asked = bench.asked();
    asked.sort_unstable();
    assert_eq!(asked, [1, 2, 3]);
    bench.refuse(1);
    bench.refuse(2);
    bench.wait(100);
    assert!(bench.replies.is_empty(), "the third may have it");
    bench.give(3);
    assert_eq!(bench.replies, [(GUEST, Ok(()))]);
}

#[test]
fn the_third_is_asked_at_once_where_one_is_silent_and_one_fails() {
    let mut bench = Bench::open(&[]);
    bench.read(0);
    bench.wait(100);
    let [_, second] = bench.asked()[..] else {
        panic!("{:?}", bench.asked());
    };
    bench.refuse(second);
    assert_eq!(bench.asked().len(), 2);
    assert!(!bench.asked().contains(&second));
}

#[test]
fn a_read_that_all_fail_has_failed() {
    let mut bench = Bench::open(&[]);
    bench.read(0);
    for _ in 0..5 {
        bench.wait(100);
    }
    for disk in [1, 2, 3] {
        bench.refuse(disk);
    }
    assert_eq!(
        bench.replies,
        [(GUEST, Err(ShardError::Unreadable { block: BlockNo(0) }))]
    );
}

#[test]
fn a_silent_replica_that_goes_takes_nothing_with_it() {
    let mut bench = Bench::open(&[2, 3]);
    bench.read(0);
    bench.wait(100);
    let second = bench.asked()[1];
    bench.step(WriterEvent::DiskState {
        disk: DiskId(second),
        is_up: false,
    });
    assert!(bench.replies.is_empty());
    bench.give(1);
    assert_eq!(bench.replies, [(GUEST, Ok(()))]);
}

#[test]
fn a_read_that_a_disk_answers_with_its_end_is_asked_again() {
    let failed = Refusal::Store(StoreError::DiskFailed(DiskError::Short {
        operation: "write",
        offset: 0,
        done: 0,
        wanted: 4096,
    }));
    let wrong = Ok(ReplicaReply::Done);
    for (result, is_wrong) in [
        (Err(failed), false),
        (wrong, true),
        (Err(Refusal::NotFenced), false),
    ] {
        let mut bench = Bench::of(1, &[]);
        bench.read(0);
        let (disk, token, id, _) = bench.take(1);
        bench.answer(disk.0, token, id, result);
        assert_eq!(bench.has_wrong_answer, is_wrong);
        for is_up in [false, true] {
            let disk = DiskId(1);
            bench.asked.clear();
            bench.step(WriterEvent::DiskState { disk, is_up });
        }
        bench.promise(1);
        bench.give(1);
        assert_eq!(bench.replies, [(GUEST, Ok(()))]);
    }
}

#[test]
fn another_is_asked_where_one_answers_something_else() {
    let mut bench = Bench::open(&[2, 3]);
    bench.read(0);
    let (disk, token, id, _) = bench.take(1);
    let two_blocks = smallvec![ReadPart::Zeros(2)];
    bench.answer(disk.0, token, id, Ok(ReplicaReply::Read(two_blocks)));
    assert!(bench.has_wrong_answer);
    let next = bench.asked()[0];
    bench.give(next);
    assert_eq!(bench.replies, [(GUEST, Ok(()))]);
}

/// What a refusal says of the layer is where the repair goes, from its first question to its last.
#[test]
fn a_bad_copy_is_mended_in_the_layer_that_has_it() {
    let versions = |state| {
        let seq = Seq(if state == BlockState::Absent { 0 } else { 4 });
        ReplicaReply::Versions(vec![BlockVersion { seq, state }; 256])
    };
    for state in [
        BlockState::Data(BlockSum(9)),
        BlockState::Clear(ClearKind::Trim),
        BlockState::Absent,
    ] {
        let mut bench = Bench::of(2, &[2]);
        bench.step(WriterEvent::Cut {
            lineage: layers(0, 7),
        });
        bench.read(0);
        let (disk, token, id, request) = bench.take(1);
        let ReplicaRequest::Read { lineage, .. } = &request else {
            panic!("{request:?}")
        };
        assert_eq!(*lineage, layers(0, 7));
        bench.asked.push((disk, token, id, request));
        bench.refuse_in(1, 3);
        bench.give(2);
        assert_eq!(bench.replies, [(GUEST, Ok(()))]);

        let (_, token, id, request) = bench.take(2);
        let ReplicaRequest::LeafVersions { lineage, .. } = request else {
            panic!("{request:?}")
        };
        assert_eq!(lineage, layers(3, 3));
        bench.answer(2, token, id, Ok(versions(state)));
        if matches!(state, BlockState::Data(_)) {
            let (_, token, id, request) = bench.take(2);
            let ReplicaRequest::Read { lineage, .. } = request else {
                panic!("{request:?}")
            };
            assert_eq!(lineage, layers(3, 3));
            let content = smallvec![ReadPart::Data(HeapBlock::zeroed(4096))];
            bench.answer(2, token, id, Ok(ReplicaReply::Read(content)));
        }
        let (_, token, id, request) = bench.take(1);
        let layer = match (state, request) {
            (
                BlockState::Data(_),
                ReplicaRequest::Repair {
                    layer,
                    content: RepairContent::Data(..),
                    ..
                },
            )
            | (
                BlockState::Clear(_),
                ReplicaRequest::Repair {
                    layer,
                    content: RepairContent::Clear(..),
                    ..
                },
            )
            | (BlockState::Absent, ReplicaRequest::Void { layer, .. }) => layer,
            other => panic!("{other:?}"),
        };
        assert_eq!(layer, LayerId(3));
        bench.answer(1, token, id, Ok(ReplicaReply::Done));
        let (_, _, _, request) = bench.take(1);
        let ReplicaRequest::Read { lineage, .. } = request else {
            panic!("{request:?}")
        };
        assert_eq!(lineage, layers(3, 3), "it is read back");
    }
}

/// A snapshot is read through its own layers, whatever is cut meanwhile; the head through what it is when somebody is asked.
#[test]
fn whom_is_asked_again_is_asked_for_what_the_reader_sees() {
    for (of, again) in [(None, layers(0, 2)), (Some(layers(0, 0)), layers(0, 0))] {
        let mut bench = Bench::of(2, &[2]);
        let first = of.clone().unwrap_or(layers(0, 1));
        let (block, count) = (BlockNo(0), 1);
        bench.step(WriterEvent::Request(GUEST, ShardOp::Read { block, count, of }));
        bench.step(WriterEvent::Cut {
            lineage: layers(0, 2),
        });
        bench.wait(100);
        for (disk, expected) in [(1, first), (2, again)] {
            let (.., request) = bench.take(disk);
            let ReplicaRequest::Read { lineage, .. } = request else {
                panic!("{request:?}")
            };
            assert_eq!(lineage, expected);
        }
    }
}

#[test]
#[should_panic(expected = "a cut from layer 1 to 1")]
fn a_cut_goes_up() {
    Bench::open(&[]).step(WriterEvent::Cut {
        lineage: layers(0, 1),
    });
}
