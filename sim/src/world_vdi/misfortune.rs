//! What befalls the pool: links and disks that come and go, and the faults of each profile.

use types::{DiskId, ShardNo};
use vdi::Event;

use super::{PATIENCE, Place, Profile, SEGMENT_BYTES, SHARD_BYTES, World};
use crate::host::Host;
use crate::trace::tell;
use crate::{Faults, SimDisk};

impl World {
    pub(super) fn come_back(&mut self) {
        for at in 0..self.hosts.len() {
            if self.is_linked[at] {
                continue;
            }
            if self.away[at] > 0 {
                self.away[at] -= 1;
                continue;
            }
            if self.hosts[at].node.is_none() {
                // Whoever brings a disk back tries until it can be opened.
                self.hosts[at].disk.set_faults(Faults::default());
                self.hosts[at].start();
            }
            // What waited for it was sent in one layer, and is sent again in the next.
            if self.rng.chance(1, 10) {
                self.cut();
            }
            self.is_linked[at] = true;
            let disk = self.hosts[at].id;
            tell(|| format!("  disk {disk} is up"));
            self.step(Event::DiskState { disk, is_up: true });
            self.step_zombie(Event::DiskState { disk, is_up: true });
            self.step_ballast(Event::DiskState { disk, is_up: true });
            self.drop_leftovers(at);
        }
    }

    pub(super) fn unlink(&mut self, at: usize, turns: u32) {
        self.away[at] = self.away[at].max(turns);
        self.break_links(at);
        self.hosts[at].hang_up();
        if std::mem::replace(&mut self.is_linked[at], false) {
            let disk = self.hosts[at].id;
            tell(|| format!("  disk {disk} is down for {turns} turns"));
            self.summary.disks_away += 1;
            self.step(Event::DiskState { disk, is_up: false });
            self.step_zombie(Event::DiskState { disk, is_up: false });
            self.step_ballast(Event::DiskState { disk, is_up: false });
        }
    }

    pub(super) fn break_links(&mut self, at: usize) {
        self.net
            .break_link(Place::Writer(self.incarnation), Place::Disk(at));
        if let Some((incarnation, _)) = &self.zombie {
            self.net.break_link(Place::Writer(*incarnation), Place::Disk(at));
        }
    }

    pub(super) fn stop_host(&mut self, at: usize, is_power_loss: bool, turns: u32) {
        self.unlink(at, turns);
        if self.hosts[at].node.is_some() {
            self.hosts[at].stop(is_power_loss);
            self.meddle(at);
        }
    }

    /// The process of a disk is down: a chance for whoever should not touch its files.
    pub(super) fn meddle(&mut self, at: usize) {
        if self.profile != Profile::Index || self.rng.chance(1, 2) {
            return;
        }
        self.summary.meddled += 1;
        if at == self.victim && self.rng.chance(1, 2) {
            tell(|| "  a bit of the victim's index flips".into());
            self.hosts[at].spoil_index();
        } else {
            self.hosts[at].meddle();
        }
    }

    pub(super) fn disk_failed(&mut self, at: usize) {
        assert_eq!(at, self.victim, "disk {} failed of itself", self.hosts[at].id);
        self.is_wounded = true;
        self.hosts[at].disk.set_faults(Faults::default());
        let turns = self.rng.between(1, 2000) as u32;
        self.stop_host(at, false, turns);
    }

    /// Things that happen in the midst of everything.
    pub(super) fn small_misfortune(&mut self) {
        // Where every disk is full and slow it must be there for long enough to get something done.
        let seldom = if self.profile == Profile::Full { 2000 } else { 400 };
        if self.profile != Profile::Calm && self.profile != Profile::Noise && self.rng.chance(1, seldom) {
            // Where one disk may lose or spoil what it holds, the others stay in reach.
            let at = match self.profile {
                Profile::Rot | Profile::DiskFails | Profile::DiskPower | Profile::Lying => self.victim,
                _ => self.rng.index(self.hosts.len()),
            };
            let turns = self.rng.pick(&[0, 5, 200, 3000]);
            if self.rng.chance(1, 2) {
                self.unlink(at, turns);
            } else {
                self.stop_host(at, false, turns);
            }
        }
        // Under load in every world: where nothing is damaged it must find nothing.
        if self.rng.chance(1, 500) {
            self.step(Event::Scrub);
        }
    }
    pub(super) fn misfortune(&mut self) {
        if self.rng.chance(1, 8) {
            self.grow();
        }
        match self.profile {
            Profile::DiskPower if self.rng.chance(1, 3) => {
                self.become_whole();
                self.live_on(20);
                self.is_wounded = true;
                let turns = self.rng.pick(&[0, 50, 2000]);
                self.stop_host(self.victim, true, turns);
            }
            Profile::DiskFails if self.rng.chance(1, 3) => self.fail_victim(),
            Profile::Noise if self.rng.chance(1, 3) => self.noise(),
            Profile::Lying if self.rng.chance(1, 2) => self.lie(),
            Profile::Full if self.rng.chance(1, 3) => self.delete_and_lay(),
            Profile::Takeover if self.rng.chance(1, 2) => self.take_over(),
            Profile::Rot if self.rng.chance(1, 2) => self.rot(),
            _ => {
                if self.is_wounded {
                    self.become_whole();
                }
                if self.rng.chance(1, 2) {
                    self.crash_everything();
                }
            }
        }
    }

    pub(super) fn live_on(&mut self, most: u64) {
        let burst = self.rng.between(1, most);
        self.live(burst);
    }

    pub(super) fn fail_victim(&mut self) {
        self.become_whole();
        self.is_wounded = true;
        match self.rng.below(3) {
            0 => {
                tell(|| "  the victim's next writes or syncs fail".into());
                self.hosts[self.victim].disk.set_faults(Faults {
                    budget: 1,
                    write_error_ppm: 100_000,
                    failed_sync_ppm: 300_000,
                    ..Faults::default()
                });
            }
            1 => {
                tell(|| "  the victim comes back empty".into());
                self.stop_host(self.victim, false, 100);
                let id = self.hosts[self.victim].id;
                self.hosts[self.victim] = self.empty_host(id);
            }
            _ => self.replace_victim(),
        }
        self.live_on(80);
        self.hosts[self.victim].disk.set_faults(Faults::default());
    }

    pub(super) fn empty_host(&mut self, id: DiskId) -> Host {
        self.summary.disks_replaced += 1;
        let disk = SimDisk::new(self.disk_bytes, self.rng.draw());
        Host::new(id, disk, SEGMENT_BYTES, self.settings, self.rng.draw())
    }

    /// Another disk, with another name, takes the victim's place in every shard.
    pub(super) fn replace_victim(&mut self) {
        let old = self.hosts[self.victim].id;
        let new = DiskId(self.next_disk);
        self.next_disk += 1;
        tell(|| format!("  disk {old} is replaced by {new}"));
        let turns = self.rng.pick(&[0, 50]);
        self.stop_host(self.victim, false, turns);
        self.hosts[self.victim] = self.empty_host(new);
        let shards = self
            .vdi()
            .records()
            .filter(|record| record.replicas.contains(&old))
            .map(|record| (record.shard.no, new))
            .collect();
        self.step(Event::ReplaceDisk { old, new: shards });
    }

    /// Bits of the victim's content flip while every replica holds everything.
    pub(super) fn rot(&mut self) {
        self.become_whole();
        // On stable media everywhere: rot and the loss of what no flush covered are two faults.
        self.flush_victim();
        let blocks = self.hosts[self.victim].disk.data_blocks();
        // And said to be so by a later batch: a rotten batch at the very end of a log looks like one that was torn
        // by a crash, and is dropped. What it held comes back from the other replicas, but not if those are not
        // there yet when the shard is opened after everything stopped: one more fault at the same time.
        for no in 0..self.records.len() as u64 {
            let (id, op) = self.guest.ask_write(no * SHARD_BYTES);
            self.step(Event::Request(id, op));
        }
        self.become_whole();
        self.flush_victim();
        let disk = &mut self.hosts[self.victim].disk;
        for _ in 0..self.rng.between(1, 12).min(blocks.len() as u64) {
            let at = self.rng.pick(&blocks) + 512 * self.rng.below(8);
            tell(|| format!("  rot at {at} of the victim"));
            disk.rot(at);
            self.summary.rotten += 1;
        }
    }

    /// Everything so far is on stable media of the victim too.
    pub(super) fn flush_victim(&mut self) {
        let (id, op) = self.guest.ask_flush();
        self.step(Event::Request(id, op));
        let mut patience = PATIENCE;
        let is_flushed = |world: &World| {
            let node = world.hosts[world.victim].node.as_ref();
            world.is_whole() && node.is_some_and(|node| !node.is_busy())
        };
        while !is_flushed(self) {
            self.turn();
            patience -= 1;
            assert!(patience > 0, "the victim does not flush: {}", self.state());
        }
    }

    /// Noise over the victim, then a scrub; nothing restarts before the pool is whole again.
    pub(super) fn noise(&mut self) {
        self.become_whole();
        self.is_wounded = true;
        let blocks = self.hosts[self.victim].disk.data_blocks();
        for _ in 0..self.rng.between(1, 8) {
            if blocks.is_empty() {
                break;
            }
            let at = self.rng.pick(&blocks);
            let length = 512 * self.rng.between(1, 64);
            if at + length <= self.disk_bytes {
                tell(|| format!("  noise over {length} B at {at}"));
                self.hosts[self.victim].disk.scribble(at, length);
                self.summary.rotten += length / 512;
            }
        }
        if self.rng.chance(1, 2) {
            self.live_on(60);
        }
        self.scrub();
        tell(|| "  the disk with the noise on it is given up".into());
        self.replace_victim();
    }

    /// The victim acknowledges and does not do, for a while, alone; then it is found out and given up.
    pub(super) fn lie(&mut self) {
        self.become_whole();
        self.is_wounded = true;
        tell(|| "  the victim lies".into());
        self.hosts[self.victim].disk.set_faults(Faults {
            budget: self.rng.between(1, 4) as u32,
            lost_write_ppm: 60_000,
            misdirected_write_ppm: 30_000,
            lying_sync_ppm: 300_000,
            ..Faults::default()
        });
        self.live_on(80);
        if self.rng.chance(1, 3) {
            let turns = self.rng.pick(&[0, 50, 2000]);
            let is_power_loss = self.rng.chance(1, 2);
            self.stop_host(self.victim, is_power_loss, turns);
            self.live_on(30);
        }
        self.hosts[self.victim].disk.set_faults(Faults::default());
        self.summary.lies += self.hosts[self.victim].disk.damages().len() as u64;
        self.become_whole();
        self.is_wounded = true;
        self.scrub();
        tell(|| "  the disk that lied is given up".into());
        self.replace_victim();
    }

    /// A VDI is deleted, perhaps with a crash in the midst of it, and another one made.
    pub(super) fn delete_and_lay(&mut self) {
        self.delete_ballast();
        if self.rng.chance(1, 2) {
            self.live_on(6);
        }
        if self.rng.chance(2, 3) {
            self.crash_everything();
        }
        if self.rng.chance(1, 2) {
            self.live_on(20);
        }
        self.lay_ballast();
    }

    pub(super) fn grow(&mut self) {
        self.end_zombie();
        let bytes = self.spec.bytes + self.rng.between(1, 3000) * u64::from(self.spec.sector_bytes);
        if bytes > 4 * SHARD_BYTES {
            return;
        }
        let before = self.spec.bytes.div_ceil(SHARD_BYTES);
        let added = (before..bytes.div_ceil(SHARD_BYTES))
            .map(|no| self.place_shard(ShardNo(no as u32)))
            .collect();
        tell(|| format!("  grown to {bytes}"));
        self.spec.bytes = bytes;
        self.guest.resized(bytes);
        if !self.is_wounded && self.rng.chance(1, 4) {
            // The control store knows, the daemon died before it heard.
            return self.crash_everything();
        }
        self.step(Event::Resized { bytes, added });
    }

    pub(super) fn crash_everything(&mut self) {
        let is_power_loss = self.rng.chance(1, 2);
        tell(|| {
            format!(
                "everything stops: {}",
                if is_power_loss { "power loss" } else { "kill" }
            )
        });
        self.end_zombie();
        self.vdi = None;
        if let Some(ballast) = &mut self.ballast {
            ballast.crash(is_power_loss);
        }
        for _ in 0..self.rng.index(self.saves.len() + 1) {
            self.save_one();
        }
        self.saves.clear();
        for at in 0..self.hosts.len() {
            self.break_links(at);
            self.is_linked[at] = false;
            self.away[at] = self.rng.pick(&[0, 0, 10, 300]);
            if self.hosts[at].node.is_some() {
                self.hosts[at].stop(is_power_loss);
                self.meddle(at);
            } else if is_power_loss {
                self.hosts[at].disk.lose_power();
            }
        }
        if is_power_loss {
            self.guest.lose_power();
            self.summary.power_losses += 1;
        } else {
            self.summary.kills += 1;
        }
        self.open();
    }
}
