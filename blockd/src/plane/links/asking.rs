//! Disks of other hosts, for the writers here: dialled links.

use edge::uring::{Buf, StreamSlot};
use replication::ToReplica;
use types::{DiskId, HostId};
use wire::{Channel, Reply};

use super::{Reach, SEND_BYTES_MAX};
use crate::plane::{Home, Letter, Plane};

/// Disks that a host may announce on one link: each takes memory here.
const DISKS_MAX: usize = 1024;

impl Plane {
    /// A message of a writer here for a disk of another host. Without a link that reaches it, it is lost, as on a cut
    /// cable: the writer was told that the disk is away.
    pub(in crate::plane) fn post_to_host(&mut self, host: HostId, disk: DiskId, message: ToReplica<Buf>) {
        let Some(slot) = self.hosts.get(&host).copied() else {
            return;
        };
        let link = self.links.get_mut(&slot).expect("a host's link is there");
        let Some(channel) = link.by_disk.get(&disk).copied() else {
            return;
        };
        link.outgoing.request(channel, message);
        link.figures.frames_sent += 1;
        if link.unsent() > SEND_BYTES_MAX && link.doom.is_none() {
            // Ended when the cores are at rest: a writer is in the middle of its effects now.
            link.doom = Some(format!("{} MiB wait to be sent", SEND_BYTES_MAX >> 20));
        }
        self.touch_link(slot);
    }

    /// Disks of other hosts that can be reached now.
    pub(in crate::plane) fn disks_reached(&self) -> impl Iterator<Item = DiskId> + '_ {
        let is_home = |disk: &DiskId, host: HostId| self.homes.get(disk) == Some(&Home::Host(host));
        let dialled = self.hosts.values().filter_map(|slot| self.links.get(slot));
        dialled.flat_map(move |link| {
            let disks = link.by_disk.keys().copied();
            disks.filter(move |disk| is_home(disk, link.host))
        })
    }

    /// The daemon says where a disk is. One that a link reaches already is up from now on. What was on its way to a former
    /// home is lost: the writers are told that the disk went, so that they fence it before they write on.
    pub(in crate::plane) fn set_home(&mut self, disk: DiskId, home: Home) {
        let before = self.homes.get(&disk).copied();
        if before == Some(home) {
            return;
        }
        if before.is_some() {
            // What it said at its former home comes first.
            self.deliver();
            self.disk_state(disk, false);
        }
        self.homes.insert(disk, home);
        if let Home::Host(host) = home
            && let Some(link) = self.hosts.get(&host).and_then(|slot| self.links.get(slot))
            && link.by_disk.contains_key(&disk)
        {
            self.disk_state(disk, true);
        }
    }

    /// What a disk of another host said. Of a channel that has ended nothing is waited for, nor of a disk that moved on.
    pub(super) fn replied(&mut self, slot: StreamSlot, reply: Reply<Buf>) {
        let link = self.links.get(&slot).expect("a link that hears is there");
        if let Some(reach) = link.channels.get(&reply.channel)
            && self.homes.get(&reach.disk) == Some(&Home::Host(link.host))
        {
            let message = reply.from_disk(reach.disk);
            self.inbox.push_back(Letter::ToVdi(message));
        }
    }

    /// The other host announces a disk.
    pub(super) fn announced(&mut self, slot: StreamSlot, channel: Channel, disk: DiskId) {
        let link = self.links.get_mut(&slot).expect("a link that hears is there");
        let host = link.host;
        if channel <= link.last_channel {
            let reason = format!("channel {channel} was announced after {}", link.last_channel);
            return self.break_link(slot, reason);
        }
        link.last_channel = channel;
        let before = link.by_disk.insert(disk, channel);
        link.channels.insert(channel, Reach::new(disk, false));
        if let Some(before) = before {
            link.channels.remove(&before);
            self.reached_state(host, disk, false);
        } else if link.by_disk.len() > DISKS_MAX {
            return self.break_link(slot, format!("more than {DISKS_MAX} disks were announced"));
        }
        self.reached_state(host, disk, true);
    }

    /// The other host takes a disk away.
    pub(super) fn withdrawn(&mut self, slot: StreamSlot, channel: Channel) {
        let link = self.links.get_mut(&slot).expect("a link that hears is there");
        let host = link.host;
        if let Some(reach) = link.channels.remove(&channel) {
            link.by_disk.remove(&reach.disk);
            self.reached_state(host, reach.disk, false);
        }
    }

    /// Tells the VDIs that a disk of `host` came or went, if that is where it should be.
    pub(super) fn reached_state(&mut self, host: HostId, disk: DiskId, is_up: bool) {
        if self.homes.get(&disk) == Some(&Home::Host(host)) {
            // What it said before comes first.
            self.deliver();
            self.disk_state(disk, is_up);
        }
    }
}
