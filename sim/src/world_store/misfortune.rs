//! What befalls the disk, its index and the process: rot, crashes, failures, and people who touch what is not theirs.

use store::Event;

use super::{PATIENCE, Profile, SEGMENT_BYTES, World};
use crate::trace::tell;
use crate::{Faults, LateWrites};

impl World {
    pub(super) fn rot_somewhere(&mut self) {
        // The first MiB holds the superblocks: losing both is the loss of the disk, not rot.
        let blocks: Vec<u64> = self
            .disk
            .written_blocks()
            .into_iter()
            .filter(|at| *at >= 1 << 20)
            .collect();
        if !blocks.is_empty() {
            let at = self.rng.pick(&blocks) + 512 * self.rng.below(8);
            self.rot_at(at);
        }
    }

    pub(super) fn rot_at(&mut self, at: u64) {
        tell(|| format!("rot at {at}"));
        self.disk.rot(at);
        self.rots += 1;
    }

    /// Everything is flushed, the store comes to rest, and then one of the last things it wrote rots.
    pub(super) fn rot_the_tail(&mut self) {
        self.settle();
        let shards: Vec<_> = self.shards.keys().copied().collect();
        shards.into_iter().for_each(|shard| self.issue_flush(shard));
        self.settle();
        let mut patience = PATIENCE;
        while !self.store.is_witnessed() && !self.has_failed {
            self.turn();
            patience -= 1;
            assert!(patience > 0, "the log never says how far it is durable");
        }
        if self.has_failed {
            return;
        }
        for model in self.shards.values_mut() {
            model.witnessed = model.durable;
        }
        if self.recent.is_empty() {
            return;
        }
        let at = self.rng.index(self.recent.len());
        let (offset, bytes) = self.recent[at];
        let at = match self.rng.below(6) {
            0 => (offset - (1 << 20)) / SEGMENT_BYTES * SEGMENT_BYTES + (1 << 20),
            1 => offset + self.rng.below(bytes / 4096) * 4096,
            _ => offset,
        };
        // Where the headers have their content.
        let sectors = self.rng.pick(&[1, 1, 1, 8]);
        let sector = self.rng.below(sectors);
        self.rot_at(at + 512 * sector);
    }

    pub(super) fn crash(&mut self) {
        let is_power_loss = self.rng.chance(1, 2);
        if self.rng.chance(1, 3) {
            // Not always at the end of a turn.
            let mut completions = Vec::new();
            edge::Disk::poll(&mut self.disk, &mut completions);
            for completion in completions {
                self.step(Event::Disk(completion));
            }
        }
        if self.has_failed {
            return self.reopen_failed();
        }
        tell(|| format!("crash: {}", if is_power_loss { "power loss" } else { "kill" }));
        if is_power_loss {
            self.summary.power_losses += 1;
            self.disk.lose_power();
        } else {
            self.summary.kills += 1;
            // The lock on the device outlives the process until its last write has ended (edge::file).
            self.disk.kill(LateWrites::Never);
        }
        self.restart(is_power_loss);
    }

    /// A daemon that dies soon after each start, on a disk that has no space: it must always be able to start again.
    pub(super) fn crash_again_and_again(&mut self) {
        self.summary.crash_loops += 1;
        // A rebuild knows less of what is free: two faults at once.
        self.spares_index = true;
        for _ in 0..100 {
            // Each life says something: the records of shards that are fenced, and what guests wanted to write.
            for _ in 0..self.rng.below(4) {
                self.issue();
            }
            for shard in self.shards.keys().copied().collect::<Vec<_>>() {
                if self.rng.chance(1, 2) && self.shards[&shard].is_known && self.is_quiet(shard) {
                    self.issue_record(shard);
                }
            }
            for _ in 0..self.rng.below(30) {
                self.turn();
            }
            self.crash();
        }
        self.spares_index = false;
    }

    pub(super) fn reopen_failed(&mut self) {
        tell(|| "reopened after a failure".into());
        self.summary.failures += 1;
        self.disk.kill(LateWrites::Never);
        self.has_failed = false;
        self.restart(true);
    }

    pub(super) fn restart(&mut self, mut lost_cache: bool) {
        self.count_stats();
        // A device that fails while it is opened is opened again later.
        self.disk.set_faults(Faults::default());
        self.kv.crash(&mut self.rng);
        if self.profile == Profile::KvLost && !self.spares_index && self.rng.chance(1, 2) {
            self.summary.indexes_lost += 1;
            if self.rng.chance(1, 2) {
                tell(|| "the index is deleted".into());
                self.kv.delete();
            } else {
                tell(|| "the index is rolled back".into());
                self.kv.roll_back_to(&self.kv_copy);
            }
        }
        self.loads.clear();
        self.is_full = false;
        let pending = std::mem::take(&mut self.pending);
        let mut damage = self.recover(&mut lost_cache);
        if self.rng.chance(1, 5) {
            tell(|| "power loss right after recovery".into());
            self.disk.lose_power();
            lost_cache = true;
            damage |= self.recover(&mut lost_cache);
        }
        self.compare_summaries(&pending, lost_cache, damage);
        self.arm();
        if self.rng.chance(1, 2) {
            self.audit();
        }
    }
}
