//! A second VDI on the same disks: it fills them, is deleted to make room, and another one takes its place.
//!
//! It has a guest and an oracle of its own, so that what is checked is also that shards of two VDIs in one log
//! do not meet. Its deletion is a mark in the control store first, and goes on after any crash until every disk that
//! is there has let its shards go; a disk that was away is told when it comes back.

use std::collections::BTreeMap;

use replication::{ReplicaRequest, ShardRecord, ToReplica};
use types::{Epoch, HeapBlock, Incarnation, Lineage, RequestId, ShardId, ShardNo, Token, VdiId};
use vdi::{Effect, Event, Notice, Vdi, VdiSpec};

use super::{HEAD, ID, Profile, SHARD_BYTES, World};
use crate::guest::Guest;
use crate::trace::tell;

/// Shards of a ballast: with the main VDI's more than the small disks of `Profile::Full` hold.
const SHARDS: u64 = 8;
/// Turns with a full disk after which people make room.
const FULL_TURNS: u32 = 150;

pub(super) struct Ballast {
    vdi: Option<Vdi<HeapBlock>>,
    spec: VdiSpec,
    pub(super) records: BTreeMap<ShardNo, ShardRecord>,
    guest: Guest,
    /// As the control store has it: survives everything.
    is_deleting: bool,
    next_offset: u64,
}

impl Ballast {
    pub(super) fn id(&self) -> VdiId {
        self.spec.id
    }

    pub(super) fn answers(&self) -> u64 {
        self.guest.answers
    }

    /// The process is gone, and with power the guest.
    pub(super) fn crash(&mut self, is_power_loss: bool) {
        self.vdi = None;
        if is_power_loss {
            self.guest.lose_power();
        }
    }

    pub(super) fn is_at_rest(&self) -> bool {
        let is_quiet = |vdi: &Vdi<HeapBlock>| {
            let status = vdi.status();
            !vdi.is_busy() && status.shards_whole == status.shards
        };
        !self.is_deleting && self.guest.waits() == 0 && self.vdi.as_ref().is_some_and(is_quiet)
    }

    pub(super) fn oldest(&self) -> String {
        format!("deleting {}, waits for {}", self.is_deleting, self.guest.oldest())
    }
}

impl World {
    pub(super) fn lay_ballast(&mut self) {
        if self.profile != Profile::Full || self.ballast.is_some() {
            return;
        }
        let id = VdiId(self.next_vdi);
        self.next_vdi += 1;
        let spec = VdiSpec {
            id,
            bytes: SHARDS * SHARD_BYTES,
            lineage: Lineage::of_layer(id, HEAD),
            ..self.spec.clone()
        };
        let records = (0..SHARDS as u32)
            .map(|no| {
                (
                    ShardNo(no),
                    self.chosen_record(ShardId {
                        vdi: id,
                        no: ShardNo(no),
                    }),
                )
            })
            .collect();
        tell(|| format!("  ballast {id}"));
        let seed = self.rng.draw();
        let sector_bytes = u64::from(spec.sector_bytes);
        self.ballast = Some(Ballast {
            vdi: None,
            guest: Guest::new(seed, spec.bytes, sector_bytes, SHARD_BYTES),
            spec,
            records,
            is_deleting: false,
            next_offset: 0,
        });
        self.open_ballast();
    }

    /// With the incarnation of the daemon, as every VDI that it serves.
    pub(super) fn open_ballast(&mut self) {
        let up = self.up();
        let incarnation = Incarnation(self.incarnation);
        let Some(ballast) = &mut self.ballast else { return };
        let records = ballast.records.values().cloned().collect();
        ballast.vdi = Some(Vdi::new(ballast.spec.clone(), records, incarnation, up));
        if ballast.is_deleting {
            self.step_ballast(Event::Delete);
            return;
        }
        for (id, op) in ballast.guest.replay() {
            self.step_ballast(Event::Request(id, op));
        }
    }

    pub(super) fn step_ballast(&mut self, event: Event<HeapBlock>) {
        let Some(ballast) = &mut self.ballast else { return };
        let Some(vdi) = &mut ballast.vdi else { return };
        let mut effects = Vec::new();
        let had_quorum = vdi.status().shards_waiting == 0;
        vdi.step(self.now, event, &mut effects);
        let has_quorum = had_quorum && vdi.status().shards_waiting == 0;
        for effect in effects {
            match effect {
                Effect::Done(id, result) => {
                    let ballast = self.ballast.as_mut().expect("gone at its last notice only");
                    if !ballast.is_deleting {
                        ballast.guest.answered(id, result, has_quorum);
                    }
                }
                Effect::Send(disk, message) => self.send(self.incarnation, disk, message),
                Effect::SaveRecord(record) => self.saves.push_back((self.incarnation, record)),
                Effect::Notice(Notice::Dropped) => {
                    tell(|| "  the ballast is gone".into());
                    self.summary.deletions += 1;
                    self.ballast = None;
                    return;
                }
                Effect::Notice(
                    notice @ (Notice::Repaired { .. } | Notice::Unreadable { .. } | Notice::Fenced { .. }),
                ) => {
                    panic!("ballast: {notice:?}, and nothing was damaged")
                }
                Effect::Notice(notice) => tell(|| format!("    ballast notice {notice:?}")),
            }
        }
    }

    /// Its guest fills it from front to back, and does this and that.
    pub(super) fn ballast_asks(&mut self) {
        let Some(ballast) = &mut self.ballast else { return };
        if ballast.is_deleting || !ballast.guest.wants_more() {
            return;
        }
        let (id, op) = if self.rng.chance(3, 4) {
            let offset = ballast.next_offset;
            ballast.next_offset = (offset + (128 << 10)) % ballast.spec.bytes;
            ballast.guest.ask_long_write(offset, 128 << 10)
        } else {
            ballast.guest.ask()
        };
        self.step_ballast(Event::Request(id, op));
    }

    pub(super) fn delete_ballast(&mut self) {
        if let Some(ballast) = &mut self.ballast
            && !ballast.is_deleting
        {
            tell(|| "  the ballast is to go".into());
            ballast.is_deleting = true;
            ballast.guest.forget();
            self.step_ballast(Event::Delete);
        }
    }

    /// What people do about a full pool, after some time.
    pub(super) fn watch_space(&mut self) {
        if !self.hosts.iter().any(|host| host.is_full) {
            self.full_turns = 0;
            return;
        }
        self.summary.full_turns += 1;
        self.full_turns += 1;
        if self.full_turns > FULL_TURNS {
            self.full_turns = 0;
            self.delete_ballast();
        }
    }

    /// A disk that came back holds shards that were deleted or went elsewhere meanwhile: the daemon drops them.
    pub(super) fn drop_leftovers(&mut self, at: usize) {
        let id = self.hosts[at].id;
        let Some(node) = &self.hosts[at].node else { return };
        let held: Vec<ShardId> = node.shards().into_iter().map(|summary| summary.shard).collect();
        for shard in held {
            let record = self.record_of(shard);
            if record.is_some_and(|record| record.replicas.contains(&id)) {
                continue;
            }
            tell(|| format!("  disk {id}: shard {shard} is left over"));
            let token = Token {
                epoch: Epoch(u64::MAX),
                incarnation: Incarnation(self.incarnation),
            };
            let fence = ReplicaRequest::Fence { record: Vec::new() };
            for (no, request) in [(0, fence), (1, ReplicaRequest::Drop)] {
                let message = ToReplica {
                    shard,
                    token,
                    id: RequestId(no),
                    request,
                };
                self.hosts[at].receive(self.now, message);
            }
        }
    }

    /// What the control store holds about a shard.
    pub(super) fn record_of(&self, shard: ShardId) -> Option<&ShardRecord> {
        if shard.vdi == ID {
            return self.records.get(&shard.no);
        }
        let ballast = self
            .ballast
            .as_ref()
            .filter(|ballast| ballast.id() == shard.vdi)?;
        ballast.records.get(&shard.no)
    }

    /// Whether no disk holds a shard of a VDI that is deleted.
    pub(super) fn is_without_leftovers(&self) -> bool {
        let nodes = self.hosts.iter().filter_map(|host| host.node.as_ref());
        nodes
            .flat_map(replication::DiskNode::shards)
            .all(|summary| summary.shard.vdi == ID || self.record_of(summary.shard).is_some())
    }
}
