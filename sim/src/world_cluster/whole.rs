//! The cluster at rest: healing, scrubbing, and the comparison of everything with everything at the end.

use types::{LayerId, ShardId, ShardNo, VdiId};
use vdi::Event;

use super::{At, HEAD, MILLI, PATIENCE, SHARD_BYTES, World};
use crate::past::layers;
use crate::trace::tell;

impl World {
    /// Everything is mended; the guests' requests end, old guests hear that they are, every shard gets in sync.
    pub(super) fn become_whole(&mut self) {
        tell(|| "  all is mended".into());
        self.mend();
        self.pace = 30 * MILLI;
        let mut patience = PATIENCE;
        while !self.is_whole() {
            self.turn();
            patience -= 1;
            assert!(patience > 0, "the cluster does not heal: {}", self.state());
        }
    }

    fn is_whole(&self) -> bool {
        let ids = || self.drives.keys().copied();
        self.machines
            .iter()
            .all(|machine| machine.has_joined() && machine.disks.iter().all(|disk| disk.node.is_some()))
            && self.records.is_idle_but_for_life()
            && ids().all(|id| self.is_drive_whole(id))
            && ids().all(|id| self.shards(id).into_iter().all(|shard| self.is_converged(shard)))
    }

    fn is_drive_whole(&self, id: VdiId) -> bool {
        let drive = &self.drives[&id];
        let is_open_once = self
            .machines
            .iter()
            .filter(|machine| machine.open(id).is_some())
            .count()
            == 1;
        if drive.moving.is_some() || !is_open_once || drive.guests.waits() > 0 || !self.is_attached(id) {
            return false;
        }
        let vdi = &self.machines[drive.at.expect("attached")]
            .open(id)
            .expect("attached")
            .vdi;
        let status = vdi.status();
        !vdi.is_busy() && status.shards_whole == status.shards && status.shards_waiting == 0
    }

    pub(super) fn shards(&self, id: VdiId) -> Vec<ShardId> {
        let count = self.drives[&id].spec.bytes.div_ceil(SHARD_BYTES);
        let shard = |no| ShardId {
            vdi: id,
            no: ShardNo(no),
        };
        (0..count as u32).map(shard).collect()
    }

    /// Whether every replica says that it holds the same stream to the same end.
    fn is_converged(&self, shard: ShardId) -> bool {
        let record = self.records.shard(shard);
        let mut ends = Vec::new();
        for disk in &record.replicas {
            let (at, no) = self.homes[disk];
            let Some(node) = &self.machines[at].disks[no].node else {
                return false;
            };
            let is_good = node
                .promise(shard)
                .is_some_and(|(_, good_until)| good_until.is_none());
            match node.shards().into_iter().find(|summary| summary.shard == shard) {
                Some(summary) if is_good => ends.push(summary.end),
                _ => return false,
            }
        }
        ends.windows(2).all(|pair| pair[0] == pair[1])
    }

    pub(super) fn state(&self) -> String {
        let mut lines = vec![format!("at {} ms of seed {}", self.now / MILLI, self.seed)];
        for (id, drive) in &self.drives {
            lines.push(format!(
                "VDI {id}: guest {} at {:?}, moving {:?}, {} wait (oldest {}), writer {:?}",
                drive.guests.newest,
                drive.at,
                drive.moving,
                drive.guests.waits(),
                drive.guests.oldest(),
                self.records.writer(*id)
            ));
            for shard in self.shards(*id) {
                lines.push(format!("  {:?}", self.records.shard(shard)));
            }
        }
        for (at, machine) in self.machines.iter().enumerate() {
            let open: Vec<String> = machine
                .daemon
                .iter()
                .flat_map(|daemon| &daemon.vdis)
                .map(|(id, open)| format!("VDI {id} by {}: {:?}", open.incarnation, open.vdi.status()))
                .collect();
            let disks: Vec<String> = machine
                .disks
                .iter()
                .map(|disk| {
                    let held = disk
                        .node
                        .as_ref()
                        .map(|node| (node.shards().len(), node.is_busy(), node.stats()));
                    format!("{}: {held:?}, full {}", disk.id, disk.is_full)
                })
                .collect();
            lines.push(format!(
                "host {at}: joined {}, alive {}, guests {:?}, {open:?}, disks {disks:?}",
                machine.has_joined(),
                self.records.is_alive(at),
                machine.guests
            ));
        }
        lines.join("\n  ")
    }

    fn scrub(&mut self, id: VdiId, at: At) -> (u64, u64) {
        self.drives.get_mut(&id).expect("listed").last_scrub = None;
        self.step_vdi(at, id, Event::Scrub);
        let mut patience = PATIENCE;
        loop {
            if let Some(found) = self.drives[&id].last_scrub {
                return found;
            }
            self.turn();
            patience -= 1;
            assert!(patience > 0, "the scrub does not end: {}", self.state());
        }
    }

    /// All well again: a scrub finds nothing, the guest reads everything, and the replicas are the same byte for byte.
    pub(super) fn end(&mut self) {
        self.become_whole();
        let ids: Vec<VdiId> = self.drives.keys().copied().collect();
        for id in &ids {
            let at = self.drives[id].at.expect("attached");
            let found = self.scrub(*id, at);
            assert_eq!(found, (0, 0), "a scrub of a healthy disk: repaired, unreadable");
            let drive = self.drives.get_mut(id).expect("listed");
            let (guest, bytes) = (drive.guests.newest, drive.spec.bytes);
            let mut offset = 0;
            while offset < bytes {
                let length = (bytes - offset).min(512 << 10);
                let (request, op) = self
                    .drives
                    .get_mut(id)
                    .expect("listed")
                    .guests
                    .ask_read(guest, offset, length);
                self.step_vdi(at, *id, Event::Request(request, op));
                offset += length;
            }
            self.read_every_snapshot(at, *id, bytes);
        }
        self.become_whole();
        for id in ids {
            for shard in self.shards(id) {
                self.compare_replicas(shard);
            }
            let guests = &self.drives[&id].guests;
            self.summary.answers += guests.answers;
            self.summary.late_answers += guests.late_answers;
            self.summary.late_writes += guests.late_writes;
            self.summary.snapshots += guests.cuts;
            self.summary.past_answers += guests.past_answers;
        }
    }

    fn read_every_snapshot(&mut self, at: At, id: VdiId, bytes: u64) {
        for highest in self.drives[&id].guests.snapshots() {
            let mut offset = 0;
            while offset < bytes {
                let length = (bytes - offset).min(512 << 10);
                let guests = &mut self.drives.get_mut(&id).expect("a drive").guests;
                let (request, op) = guests.ask_past(layers(id, highest), offset, length);
                self.step_vdi(at, id, Event::Request(request, op));
                offset += length;
            }
        }
    }

    fn compare_replicas(&mut self, shard: ShardId) {
        let head = self.drives[&shard.vdi].spec.lineage.newest().1;
        for layer in HEAD.0..=head.0 {
            self.compare_layer(shard, LayerId(layer));
        }
    }

    fn compare_layer(&mut self, shard: ShardId, layer: LayerId) {
        let mut first = None;
        for disk in self.records.shard(shard).replicas {
            let (at, no) = self.homes[&disk];
            let now = self.local(at);
            let blocks = (SHARD_BYTES / 4096) as u32;
            let content = self.machines[at].disks[no].content(now, shard, layer, blocks);
            match &first {
                None => first = Some((disk, content)),
                Some((other, expected)) => {
                    let blocks = expected.chunks(4096).zip(content.chunks(4096));
                    let differs = blocks.into_iter().position(|(a, b)| a != b);
                    assert_eq!(
                        differs, None,
                        "first block of shard {shard} that differs between disks {other} and {disk} in layer {layer}"
                    );
                }
            }
        }
    }
}
