//! The record of a shard, as replicas keep it.

use replication::ShardRecord;

/// What is accepted is what was written: a record that means something else when written again would let the
/// replicas of a shard disagree on who they are.
pub fn shard_record(input: &[u8]) {
    let Some(record) = ShardRecord::decode(input) else {
        return;
    };
    assert!((1..=3).contains(&record.replicas.len()));
    assert!(record.in_sync.iter().all(|disk| record.replicas.contains(disk)));
    assert!(record.in_sync.len() <= record.replicas.len());
    let again = ShardRecord::decode(&record.encode());
    assert_eq!(again.as_ref(), Some(&record));
    if !record.in_sync.is_empty() {
        assert!(record.fence_quorum() + record.write_quorum() > record.in_sync.len());
    }
}
