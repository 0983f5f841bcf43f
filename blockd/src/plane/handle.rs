//! How other threads reach a plane, and what a plane tells the daemon.

use std::fs::File;
use std::sync::mpsc::{self, Receiver, Sender};

use edge::uring::{Buf, PoolCounters, RingError, Waker};
use replication::{DiskNode, FromReplica, ShardRecord, ToReplica};
use store::{IndexResponse, ShardSummary, Store, StoreError, StoreStats};
use tokio::sync::oneshot;
use types::{DiskId, HostId, Incarnation, VdiId};
use vdi::{Event, Notice, Op, Outcome, VdiError, VdiSpec, VdiStatus};
use vhost_blk::{Ring, RingId};

use super::links::{LinkRole, LinkStart, Way};
use crate::index::IndexThread;
use crate::links::LinkNews;

/// What a plane can be asked.
pub enum Command {
    /// From now on this disk is served there.
    Home { disk: DiskId, home: Home },
    /// Take a link to another host over.
    Link(Box<LinkStart>),
    /// End the links with a host.
    Unlink { host: HostId, reason: String },
    /// A request that came on a link of another plane.
    FromLink(Way, ToReplica<Buf>),
    /// An answer for a link of this plane.
    ToLink(Way, FromReplica<Buf>),
    /// Serve a disk that has been recovered.
    AddDisk {
        disk: DiskId,
        file: File,
        node: Box<DiskNode<Buf, Store<Buf>>>,
        index: IndexThread,
        reply: oneshot::Sender<Result<(), RingError>>,
    },
    /// Stop serving it; answered, with its index thread, when its last operation is back.
    RemoveDisk {
        disk: DiskId,
        reply: oneshot::Sender<Option<IndexThread>>,
    },
    /// Tell every VDI, and every host that is linked to this one, that a disk of this host came or went.
    DiskState {
        disk: DiskId,
        is_up: bool,
        reply: oneshot::Sender<()>,
    },
    /// A disk of this host has no space for changes, or has it again: from the plane that serves it to all.
    DiskFull { disk: DiskId, is_full: bool },
    /// Open a VDI.
    OpenVdi {
        spec: VdiSpec,
        records: Vec<ShardRecord>,
        incarnation: Incarnation,
        up: Vec<DiskId>,
        reply: oneshot::Sender<()>,
    },
    /// Forget it.
    CloseVdi { vdi: VdiId, reply: oneshot::Sender<()> },
    /// Something for a VDI's core.
    Vdi { vdi: VdiId, event: Event<Buf> },
    /// VDIs that are cut together: see [`Hold`]. Answered with whether it answers nobody now.
    Hold {
        vdi: VdiId,
        hold: Hold,
        reply: oneshot::Sender<bool>,
    },
    /// A request of NBD, or of the daemon itself.
    Request {
        vdi: VdiId,
        op: Op<Buf>,
        reply: oneshot::Sender<Result<Outcome<Buf>, VdiError>>,
    },
    /// From a VDI on another plane.
    ToDisk(DiskId, ToReplica<Buf>),
    /// From a disk on another plane.
    ToVdi(FromReplica<Buf>),
    /// From a disk's index thread.
    Index { disk: DiskId, response: IndexResponse },
    /// A guest's queue is ready.
    StartRing(Ring),
    /// A guest's queue must stop.
    StopRing(RingId),
    /// Figures for status and metrics.
    Figures { reply: oneshot::Sender<PlaneFigures> },
    /// Leave the loop.
    Stop,
}

/// What is said to VDIs that are cut together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hold {
    /// Answer nobody.
    Begin,
    /// Only asked whether it still does.
    Still,
    /// Answer again.
    End,
}

/// Where a disk is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Home {
    /// By this plane of this daemon.
    Plane(usize),
    /// By another host, reached by a link to it.
    Host(HostId),
}

/// What a plane tells the daemon.
#[derive(Debug)]
pub enum Report {
    /// Compare-and-swap this record and answer with [`Event::RecordSaved`].
    SaveRecord(ShardRecord),
    /// For events and counters.
    Notice { vdi: VdiId, notice: Notice },
    /// The disk takes nothing any more.
    DiskFailed { disk: DiskId, error: StoreError },
    /// A link to another host came, went, or was refused.
    Link { host: String, news: LinkNews },
    /// The disk has no space for guests, or has it again.
    DiskFull { disk: DiskId, is_full: bool },
}

/// Figures of one disk.
pub struct NodeFigures {
    /// Which.
    pub disk: DiskId,
    /// Of its store.
    pub stats: StoreStats,
    /// What it holds.
    pub shards: Vec<ShardSummary>,
}

/// Figures of one VDI.
pub struct VdiFigures {
    /// Which.
    pub vdi: VdiId,
    /// Of its core.
    pub status: VdiStatus,
}

/// Figures of one link, since it was made.
#[derive(Clone, Copy, Debug)]
pub struct LinkFigures {
    /// The other end.
    pub host: HostId,
    /// Who asks.
    pub role: LinkRole,
    /// Disks reached on it.
    pub disks: usize,
    /// Messages.
    pub frames_sent: u64,
    /// Messages and signs of life.
    pub frames_received: u64,
    /// Operations of the ring, each some number of frames.
    pub sends: u64,
    /// Operations of the ring that brought something.
    pub receives: u64,
    /// All bytes.
    pub bytes_sent: u64,
    /// All bytes.
    pub bytes_received: u64,
    /// Bytes of data that were copied from where they landed.
    pub copied_bytes: u64,
    /// Bytes that wait to be sent.
    pub unsent_bytes: u64,
    /// Bytes of requests that the disks here have not answered.
    pub unanswered_bytes: u64,
}

impl LinkFigures {
    /// Of a link that did nothing yet.
    pub fn new(host: HostId, role: LinkRole) -> LinkFigures {
        LinkFigures {
            host,
            role,
            disks: 0,
            frames_sent: 0,
            frames_received: 0,
            sends: 0,
            receives: 0,
            bytes_sent: 0,
            bytes_received: 0,
            copied_bytes: 0,
            unsent_bytes: 0,
            unanswered_bytes: 0,
        }
    }
}

/// Figures of one plane.
pub struct PlaneFigures {
    /// Its disks.
    pub disks: Vec<NodeFigures>,
    /// Its VDIs.
    pub vdis: Vec<VdiFigures>,
    /// Its links.
    pub links: Vec<LinkFigures>,
    /// Guests' queues it serves.
    pub guests: usize,
    /// Its buffers.
    pub pool: PoolCounters,
    /// Times its thread asked for memory.
    pub allocations: u64,
    /// Times it entered the kernel for its ring.
    pub enters: u64,
}

/// The way to a plane from any thread.
///
/// The mailbox has no bound of its own: what may be under way is bounded by those who send (requests by the front
/// ends, replica messages by the writers' window, index answers by the store's loads).
#[derive(Clone)]
pub struct PlaneHandle {
    sender: Sender<Command>,
    waker: Waker,
}

impl PlaneHandle {
    /// A handle and the mailbox behind it.
    pub fn new(waker: Waker) -> (PlaneHandle, Receiver<Command>) {
        let (sender, mailbox) = mpsc::channel();
        (PlaneHandle { sender, waker }, mailbox)
    }

    /// The plane that serves a VDI.
    pub fn home_of(vdi: VdiId, planes: usize) -> usize {
        vdi.0 as usize % planes
    }

    /// Puts a command into the mailbox and wakes the plane if it may be asleep.
    pub fn send(&self, command: Command) {
        // The plane ends only when the process does; a command after that has no one to serve.
        let _ = self.sender.send(command);
        self.waker.wake();
    }
}
