//! The disks of a plane: each a [`DiskNode`] core, a slot of the ring, and a channel to its index thread.

use std::fs::File;

use edge::Completion;
use edge::uring::{Buf, DiskSlot, RingError};
use replication::{DiskNode, NodeEffect, NodeEvent, ToReplica};
use store::{IndexResponse, Store};
use tokio::sync::oneshot;
use types::DiskId;

use super::links::answer;
use super::{Actor, Command, NodeFigures, Plane, Report};
use crate::index::IndexThread;

/// One disk of this plane.
pub struct DiskActor {
    slot: DiskSlot,
    node: DiskNode<Buf, Store<Buf>>,
    index: IndexThread,
    /// Operations whose completion the node has not seen. The ring's own count is lower: it has handed out all that one
    /// turn reaped before the first of them is looked at.
    under_way: usize,
    /// In the plane's list of disks whose batch is open.
    is_touched: bool,
    is_ticking: bool,
    /// Set once the daemon wants the disk gone: told when nothing is under way any more.
    leaving: Option<oneshot::Sender<Option<IndexThread>>>,
}

impl Plane {
    pub(super) fn add_disk(
        &mut self,
        disk: DiskId,
        file: File,
        node: DiskNode<Buf, Store<Buf>>,
        index: IndexThread,
    ) -> Result<(), RingError> {
        assert!(!self.disks.contains_key(&disk), "disk {disk} is served already");
        let slot = self.ring.add_disk(file, &disk.to_string())?;
        self.disks.insert(
            disk,
            DiskActor {
                slot,
                node,
                index,
                // The node may have something to say of itself.
                is_touched: true,
                is_ticking: false,
                under_way: 0,
                leaving: None,
            },
        );
        self.touched_disks.push(disk);
        Ok(())
    }

    pub(super) fn remove_disk(&mut self, disk: DiskId, reply: oneshot::Sender<Option<IndexThread>>) {
        match self.disks.get_mut(&disk) {
            Some(actor) => {
                actor.leaving = Some(reply);
                self.let_go_when_idle(disk);
            }
            None => {
                let _ = reply.send(None);
            }
        }
    }

    /// The process is to end: what the disks promised is to be said in their logs.
    pub(super) fn close_disks(&mut self) {
        for disk in self.disks.keys().copied().collect::<Vec<_>>() {
            self.step_disk(disk, NodeEvent::Closing);
        }
    }

    pub(super) fn are_disks_witnessed(&self) -> bool {
        self.disks.values().all(|actor| actor.node.is_witnessed())
    }

    /// A disk leaves when its last operation is back: its buffers belong to the kernel until then.
    fn let_go_when_idle(&mut self, disk: DiskId) {
        let is_idle = self
            .disks
            .get(&disk)
            .is_some_and(|actor| actor.leaving.is_some() && actor.under_way == 0);
        if !is_idle {
            return;
        }
        let actor = self.disks.remove(&disk).expect("just found");
        self.homes.remove(&disk);
        self.forget_ways(disk);
        for plane in &self.peers {
            plane.send(Command::DiskFull { disk, is_full: false });
        }
        self.ring.remove_disk(actor.slot);
        // The daemon waits for the index thread; this one must not.
        let _ = actor.leaving.expect("just found").send(Some(actor.index));
    }

    pub(super) fn disk_completed(&mut self, slot: DiskSlot, completion: Completion<Buf>) {
        let found = self.disks.iter_mut().find(|(_, actor)| actor.slot == slot);
        let (&disk, actor) = found.expect("a disk stays until its last completion");
        actor.under_way -= 1;
        self.step_disk(disk, NodeEvent::Disk(completion));
        self.let_go_when_idle(disk);
    }

    pub(super) fn index_answered(&mut self, disk: DiskId, response: IndexResponse) {
        self.step_disk(disk, NodeEvent::Index(response));
    }

    pub(super) fn message_to_disk(&mut self, disk: DiskId, message: ToReplica<Buf>) {
        self.step_disk(disk, NodeEvent::Message(message));
    }

    /// Closes the batch of a disk that was just taken off the list.
    pub(super) fn end_turn(&mut self, disk: DiskId) {
        // Still marked as touched while it ends its turn: that alone is nothing to come back for.
        self.step_disk(disk, NodeEvent::TurnEnd);
        if let Some(actor) = self.disks.get_mut(&disk) {
            actor.is_touched = false;
        }
    }

    pub(super) fn tick_disk(&mut self, disk: DiskId) {
        if let Some(actor) = self.disks.get_mut(&disk) {
            actor.is_ticking = false;
            self.step_disk(disk, NodeEvent::Tick);
        }
    }

    pub(super) fn step_disk(&mut self, disk: DiskId, event: NodeEvent<Buf>) {
        // A message to a disk that just left is lost, as on a cut link; the state change tells the writer.
        let Some(actor) = self.disks.get_mut(&disk) else {
            return;
        };
        let mut effects = std::mem::take(&mut self.node_effects);
        actor.node.step(self.now, event, &mut effects);
        if !std::mem::replace(&mut actor.is_touched, true) {
            self.touched_disks.push(disk);
        }
        if actor.node.is_busy() && !std::mem::replace(&mut actor.is_ticking, true) {
            self.ticking.push(Actor::Disk(disk));
        }
        let mut letters = std::mem::take(&mut self.letters);
        for effect in effects.drain(..) {
            match effect {
                NodeEffect::Send(message) => letters.push(answer(&mut self.ways, message)),
                NodeEffect::Disk(id, operation) => {
                    actor.under_way += 1;
                    self.ring.submit(actor.slot, id, operation);
                }
                NodeEffect::Index(request) => actor.index.send(request),
                NodeEffect::Failed(error) => {
                    let _ = self.reports.send(Report::DiskFailed { disk, error });
                }
                NodeEffect::Full(is_full) => {
                    for plane in &self.peers {
                        plane.send(Command::DiskFull { disk, is_full });
                    }
                    let _ = self.reports.send(Report::DiskFull { disk, is_full });
                }
            }
        }
        for letter in letters.drain(..) {
            self.post(letter);
        }
        (self.node_effects, self.letters) = (effects, letters);
    }

    pub(super) fn node_figures(&self) -> Vec<NodeFigures> {
        self.disks
            .iter()
            .map(|(disk, actor)| NodeFigures {
                disk: *disk,
                stats: actor.node.stats(),
                shards: actor.node.shards(),
            })
            .collect()
    }
}
