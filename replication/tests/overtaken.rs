//! Two writers ask the control store for the same change: only the one who made it goes on.

use types::{
    DiskId, HeapBlock, Incarnation, Instant, LayerId, Lineage, RequestId, Seq, ShardId, ShardNo, Token, VdiId,
};
use weft_replication::{
    FromReplica, ReplicaReply, ReplicaRequest, ShardRecord, Sharing, ToReplica, Writer, WriterEffect,
    WriterEvent, WriterPhase,
};

const SHARD: ShardId = ShardId {
    vdi: VdiId(1),
    no: ShardNo(0),
};

/// A writer of two replicas, of which the second is gone: it asks for a record without it.
fn asks_for_a_change(incarnation: u64) -> (Writer<HeapBlock>, ShardRecord) {
    let record = ShardRecord::new(SHARD, vec![DiskId(1), DiskId(2)]);
    let mut writer = Writer::new(
        record,
        256,
        Lineage::of_layer(SHARD.vdi, LayerId(0)),
        Incarnation(incarnation),
        &[DiskId(1)],
        Sharing::Alone,
    );
    let mut effects = Vec::new();
    writer.step(Instant(0), WriterEvent::Touch, &mut effects);
    let Some(WriterEffect::Send(
        disk,
        ToReplica {
            token, id, request, ..
        },
    )) = effects.pop()
    else {
        panic!("no fence");
    };
    assert!(matches!(request, ReplicaRequest::Fence { .. }));
    effects.clear();
    writer.step(Instant(0), promised(disk, token, id), &mut effects);
    let asked = effects.into_iter().find_map(|effect| match effect {
        WriterEffect::SaveRecord(record) => Some(record),
        _ => None,
    });
    (writer, asked.expect("the other replica is gone"))
}

fn promised(disk: DiskId, token: Token, id: RequestId) -> WriterEvent<HeapBlock> {
    WriterEvent::Replica(FromReplica {
        shard: SHARD,
        disk,
        token,
        id,
        result: Ok(ReplicaReply::Promised {
            previous: Token::default(),
            end: Seq(0),
            good_until: None,
        }),
    })
}

#[test]
fn the_same_change_made_by_another_is_not_ours() {
    let (mut old, asked_by_old) = asks_for_a_change(1);
    let (mut new, asked_by_new) = asks_for_a_change(2);
    assert_eq!(asked_by_old.in_sync, asked_by_new.in_sync);
    assert_eq!(asked_by_old.epoch, asked_by_new.epoch);
    for (writer, phase) in [(&mut old, WriterPhase::Fenced), (&mut new, WriterPhase::Open)] {
        let held = WriterEvent::RecordSaved(asked_by_new.clone());
        writer.step(Instant(0), held, &mut Vec::new());
        assert_eq!(writer.status().phase, phase);
    }
}
