//! The pool at rest: healing, scrubbing, and the comparison of everything with everything at the end.

use replication::ShardRecord;
use types::{DiskId, LayerId};
use vdi::Event;

use super::{Ballast, HEAD, ID, PATIENCE, Profile, SHARD_BYTES, World};
use crate::past::layers;

impl World {
    /// Lets the pool heal: the guest's requests end, every disk returns, every shard gets in sync everywhere.
    pub(super) fn become_whole(&mut self) {
        self.end_zombie();
        for away in &mut self.away {
            *away = 0;
        }
        let mut patience = PATIENCE;
        while !self.is_whole() {
            self.turn();
            patience -= 1;
            assert!(patience > 0, "the pool does not heal: {}", self.state());
        }
        self.is_wounded = false;
    }

    pub(super) fn is_whole(&self) -> bool {
        let status = self.vdi().status();
        // Busy is also a writer that was not told yet that a replica is up to date.
        self.guest.waits() == 0
            && !self.vdi().is_busy()
            && self.saves.is_empty()
            && status.shards_whole == status.shards
            && self.is_linked.iter().all(|linked| *linked)
            && self.records.values().all(|record| self.is_converged(record))
            && self.ballast.as_ref().is_none_or(|ballast| {
                ballast.is_at_rest() && ballast.records.values().all(|record| self.is_converged(record))
            })
            && self.is_without_leftovers()
    }

    /// Whether every replica says that it holds the same stream to the same end.
    pub(super) fn is_converged(&self, record: &ShardRecord) -> bool {
        let mut ends = Vec::new();
        for host in &self.hosts {
            let Some(node) = &host.node else { return false };
            if record.replicas.contains(&host.id) {
                let is_good = node
                    .promise(record.shard)
                    .is_some_and(|(_, good_until)| good_until.is_none());
                let summary = node.shards().into_iter().find(|s| s.shard == record.shard);
                match summary {
                    Some(summary) if is_good => ends.push(summary.end),
                    _ => return false,
                }
            }
        }
        ends.len() == record.replicas.len() && ends.windows(2).all(|pair| pair[0] == pair[1])
    }

    pub(super) fn state(&self) -> String {
        let status = self.vdi().status();
        let disks: Vec<String> = self
            .hosts
            .iter()
            .enumerate()
            .map(|(at, host)| {
                format!(
                    "disk {} linked {} served {} shards {:?}",
                    host.id,
                    self.is_linked[at],
                    host.node.is_some(),
                    host.node.as_ref().map(|node| node
                        .shards()
                        .into_iter()
                        .map(|s| (s.shard, s.end, node.promise(s.shard)))
                        .collect::<Vec<_>>())
                )
            })
            .collect();
        format!(
            "guest waits for {} (oldest {}), ballast {:?}, saves {}, {status:?}\n  records {:?}\n  {}",
            self.guest.waits(),
            self.guest.oldest(),
            self.ballast.as_ref().map(Ballast::oldest),
            self.saves.len(),
            self.records,
            disks.join("\n  ")
        )
    }

    pub(super) fn scrub(&mut self) -> (u64, u64) {
        self.last_scrub = None;
        self.step(Event::Scrub);
        let mut patience = PATIENCE;
        loop {
            if let Some(found) = self.last_scrub {
                return found;
            }
            self.turn();
            patience -= 1;
            assert!(patience > 0, "the scrub does not end: {}", self.state());
        }
    }
    /// All well again: everything in sync, a scrub repairs what rot left, the next one finds nothing, the
    /// guest reads everything, and the replicas are the same byte for byte.
    pub(super) fn end(&mut self) {
        self.become_whole();
        if matches!(self.profile, Profile::Rot | Profile::Noise) {
            // Perhaps one that was running before the last damage; then one that was not.
            self.scrub();
            self.scrub();
            self.become_whole();
        }
        let (repaired, unreadable) = self.scrub();
        assert_eq!(
            (repaired, unreadable),
            (0, 0),
            "a scrub of a healthy pool: repaired, unreadable"
        );
        let mut offset = 0;
        while offset < self.spec.bytes {
            let length = (self.spec.bytes - offset).min(512 << 10);
            let (id, op) = self.guest.ask_read(offset, length);
            self.step(Event::Request(id, op));
            offset += length;
        }
        self.read_every_snapshot();
        self.become_whole();
        let ballast = self.ballast.iter().flat_map(|ballast| ballast.records.values());
        for record in self.records.values().chain(ballast).cloned().collect::<Vec<_>>() {
            self.compare_replicas(&record);
        }
    }

    fn read_every_snapshot(&mut self) {
        for highest in self.guest.snapshots() {
            let mut offset = 0;
            while offset < self.spec.bytes {
                let length = (self.spec.bytes - offset).min(512 << 10);
                let (id, op) = self.guest.ask_past(layers(ID, highest), offset, length);
                self.step(Event::Request(id, op));
                offset += length;
            }
        }
    }

    pub(super) fn compare_replicas(&mut self, record: &ShardRecord) {
        let own = record.shard.vdi == ID;
        let head = if own { self.spec.lineage.newest().1 } else { HEAD };
        for layer in HEAD.0..=head.0 {
            self.compare_layer(record, LayerId(layer));
        }
    }

    fn compare_layer(&mut self, record: &ShardRecord, layer: LayerId) {
        let mut first: Option<(DiskId, Vec<u8>)> = None;
        for at in 0..self.hosts.len() {
            let disk = self.hosts[at].id;
            if !record.replicas.contains(&disk) {
                continue;
            }
            let blocks = (SHARD_BYTES / 4096) as u32;
            let content = self.hosts[at].content(self.now, record.shard, layer, blocks);
            match &first {
                None => first = Some((disk, content)),
                Some((other, expected)) => {
                    let differs = expected
                        .chunks(4096)
                        .zip(content.chunks(4096))
                        .position(|(a, b)| a != b);
                    assert_eq!(
                        differs, None,
                        "first block of shard {} layer {layer} that differs between disks {other} and {disk}",
                        record.shard
                    );
                }
            }
        }
    }
}
