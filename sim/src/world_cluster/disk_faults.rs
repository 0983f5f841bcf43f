//! Faults of single disks: one that fails, one that comes back old, one that is full, one that gives its place away.

use std::time::Duration;

use replication::{ReplicaRequest, ToReplica};
use types::{
    BlockNo, DiskId, Epoch, HeapBlock, Incarnation, Instant, Payload, RequestId, Seq, ShardId, ShardNo,
    Token, VdiId,
};
use vdi::Event;

use super::fate::Undo;
use super::{At, HEAD, MILLI, World};
use crate::content;
use crate::trace::tell;
use crate::{Faults, Rng};

/// Whose the writes are that fill a disk.
const BALLAST: VdiId = VdiId(9_999);
/// MiB of them: as much as a disk has.
const FULL_SHARDS: u32 = 20;

impl World {
    /// The first host that has a disk is the one whose disk comes back old; not where that would be the only good copy.
    pub(super) fn put_old_copy_back(&mut self, rng: &mut Rng) {
        let (at, no) = *self.homes.values().next().expect("a disk");
        if self.machines[at].has_joined() {
            let pause = rng.pick(&[0, 100, 3_000]) * MILLI;
            self.disk_leaves(at, no, false, Duration::from_nanos(pause));
        }
        let disk = &mut self.machines[at].disks[no];
        if disk.node.is_none() && disk.newer.is_none() && disk.put_old_copy_back() {
            self.summary.old_copies += 1;
        }
    }

    /// Whether a disk has the only good copy of some shard: the daemon refuses to serve it then when it is an old one.
    pub(super) fn is_only_copy(&self, disk: DiskId) -> bool {
        let shards = self.drives.keys().flat_map(|id| self.shards(*id));
        shards
            .map(|shard| self.records.shard(shard).in_sync)
            .any(|in_sync| in_sync == [disk])
    }

    /// Writes of somebody else's, as much as there is room for, and more.
    pub(super) fn fill_disk(&mut self, rng: &mut Rng, pause: u64) {
        let disks: Vec<(At, usize)> = self.homes.values().copied().collect();
        let (at, no) = rng.pick(&disks);
        if self.machines[at].disks[no].node.is_none() {
            return;
        }
        self.summary.full += 1;
        tell(|| format!("  somebody fills disk {}", self.machines[at].disks[no].id));
        for shard in 0..FULL_SHARDS {
            self.ballast(at, no, shard, ReplicaRequest::Fence { record: Vec::new() });
            for part in 0..4 {
                let data = content::sectors(0, 64 * 8, u64::from(shard) + 1);
                let crcs = data.bytes().chunks(4096).map(types::crc32c).collect();
                let request = ReplicaRequest::Write {
                    layer: HEAD,
                    block: BlockNo(64 * part),
                    seq: Seq(u64::from(part) + 1),
                    data,
                    crcs,
                };
                self.ballast(at, no, shard, request);
            }
        }
        self.filled.insert((at, no));
        self.undo.push((self.now + pause, Undo::Empty(at, no)));
    }

    /// What filled a disk is deleted; if the disk is away, when it comes back.
    pub(super) fn empty_disk(&mut self, at: At, no: usize) {
        self.filled.remove(&(at, no));
        if self.machines[at].disks[no].node.is_some() {
            self.drop_ballast(at, no);
        }
    }

    /// A disk that is served holds what was deleted while it was away.
    pub(super) fn drop_leftovers(&mut self, at: At, no: usize) {
        let Some(node) = &self.machines[at].disks[no].node else {
            return;
        };
        let has_ballast = node.shards().iter().any(|summary| summary.shard.vdi == BALLAST);
        if has_ballast && !self.filled.contains(&(at, no)) {
            self.drop_ballast(at, no);
        }
    }

    fn drop_ballast(&mut self, at: At, no: usize) {
        for shard in 0..FULL_SHARDS {
            for request in [ReplicaRequest::Fence { record: Vec::new() }, ReplicaRequest::Drop] {
                self.ballast(at, no, shard, request);
            }
        }
    }

    fn ballast(&mut self, at: At, no: usize, shard: u32, request: ReplicaRequest<HeapBlock>) {
        self.next_ballast += 1;
        let now: Instant = self.local(at);
        let message = ToReplica {
            shard: ShardId {
                vdi: BALLAST,
                no: ShardNo(shard),
            },
            token: Token {
                epoch: Epoch(1),
                incarnation: Incarnation(1),
            },
            id: RequestId(self.next_ballast),
            request,
        };
        self.machines[at].disks[no].receive(now, message);
    }

    /// All replicas of a drive on one disk are to move to others, each on a host that has none of its shard.
    pub(super) fn replace_disk(&mut self, rng: &mut Rng) {
        let ids: Vec<VdiId> = self.drives.keys().copied().collect();
        let id = rng.pick(&ids);
        let shards = self.shards(id);
        let first = self.records.shard(shards[0]);
        let old = rng.pick(&first.replicas);
        let mut new = Vec::new();
        for shard in shards {
            let record = self.records.shard(shard);
            if !record.replicas.contains(&old) {
                continue;
            }
            let taken: Vec<At> = record.replicas.iter().map(|disk| self.homes[disk].0).collect();
            let free = self.homes.iter().filter(|(_, (at, _))| !taken.contains(at));
            let free: Vec<DiskId> = free.map(|(disk, _)| *disk).collect();
            if !free.is_empty() {
                new.push((shard.no, rng.pick(&free)));
            }
        }
        if let Some(at) = self.drives[&id].at.filter(|_| self.is_attached(id))
            && !new.is_empty()
        {
            tell(|| format!("  disk {old} gives its place in VDI {id} to {new:?}"));
            self.summary.replaced += 1;
            self.step_vdi(at, id, Event::ReplaceDisk { old, new });
        }
    }

    pub(super) fn disk_fails(&mut self, rng: &mut Rng, at: At) {
        self.become_whole();
        let count = self.machines[at].disks.len();
        if count == 0 {
            return;
        }
        let no = rng.index(count);
        let disk = &mut self.machines[at].disks[no];
        self.failing = Some(disk.id);
        self.summary.disks_away += 1;
        disk.disk.set_faults(Faults {
            budget: 1,
            write_error_ppm: 100_000,
            failed_sync_ppm: 300_000,
            ..Faults::default()
        });
        self.live(rng.between(1, 40));
        self.machines[at].disks[no].disk.set_faults(Faults::default());
        self.become_whole();
        self.failing = None;
    }
}
