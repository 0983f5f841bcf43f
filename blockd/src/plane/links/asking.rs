//! Disks of other hosts, for the writers here: dialled links.

use edge::uring::Buf;
use replication::ToReplica;
use types::{DiskId, HostId};

use super::SEND_BYTES_MAX;
use crate::plane::{Home, Plane};

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

    /// The daemon says where a disk is. One that a link reaches already is up from now on.
    pub(in crate::plane) fn set_home(&mut self, disk: DiskId, home: Home) {
        let before = self.homes.insert(disk, home);
        if let Home::Host(host) = home
            && before != Some(home)
            && let Some(link) = self.hosts.get(&host).and_then(|slot| self.links.get(slot))
            && link.by_disk.contains_key(&disk)
        {
            self.disk_state(disk, true);
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
