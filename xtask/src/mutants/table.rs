//! The deliberate bugs. Add one for each promise that a new test holds; `docs/faults.md` shows the last full run.

use std::fmt;

/// What must notice a mutant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Net {
    /// Tests of a package whose names contain the second text.
    Tests(&'static str, &'static str),
    /// The first so many seeds of a simulated world.
    World(&'static str, u32),
    /// A scenario of `replication-model`, searched whole.
    Search(&'static str),
}

impl Net {
    /// What cargo is to do to build it, or to run it.
    pub fn arguments(self, is_build: bool) -> Vec<String> {
        let words = match (self, is_build) {
            (Net::Tests(package, _), true) => format!("test --package {package} --no-run"),
            (Net::Tests(package, filter), false) => format!("test --quiet --package {package} {filter}"),
            (Net::Search(_), true) => "build --package weft-replication-model".into(),
            (Net::Search(scenario), false) => {
                format!("run --quiet --package weft-replication-model -- {scenario}")
            }
            (Net::World(..), true) => "build --package weft-sim --bin weft-sim".into(),
            (Net::World(world, seeds), false) => {
                format!("run --quiet --package weft-sim -- {world} --seeds 0..{seeds}")
            }
        };
        words.split_whitespace().map(str::to_owned).collect()
    }
}

impl fmt::Display for Net {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Net::Tests(package, "") => write!(f, "tests of {package}"),
            Net::Tests(package, filter) => write!(f, "{package} `{filter}`"),
            Net::Search(scenario) => write!(f, "search of `{scenario}`"),
            Net::World(world, seeds) => write!(f, "world `{world}`, {seeds} seeds"),
        }
    }
}

/// A deliberate bug.
pub struct Mutant {
    /// In words.
    pub name: &'static str,
    /// File it is in, from the top of the tree.
    pub file: &'static str,
    /// Text to replace; there exactly once.
    pub find: &'static str,
    /// What to put there.
    pub put: &'static str,
    /// What must notice.
    pub net: Net,
}

const STORE: Net = Net::World("store", 60);
const FULL: Net = Net::World("store-full", 60);
const VDI: Net = Net::World("vdi", 120);
const CLUSTER: Net = Net::World("cluster", 100);
const MODEL: Net = Net::Tests("weft-replication", "faults_lose_nothing");

/// All of them, by crate.
pub const MUTANTS: &[Mutant] = &[
    // ---- store ----
    Mutant {
        name: "a read does not check its blocks",
        file: "store/src/read.rs",
        find: "types::bind(key, types::crc32c(bytes)).0 != sum",
        put: "types::bind(key, types::crc32c(bytes)).0 != sum && seq == u64::MAX",
        net: STORE,
    },
    Mutant {
        name: "a checksum is not bound to its write",
        file: "types/src/checksum.rs",
        find: "bytes[16..24].copy_from_slice(&key.seq.0.to_le_bytes());",
        put: "bytes[16..24].copy_from_slice(&(key.seq.0 & 0).to_le_bytes());",
        net: Net::Tests("weft-types", "each_part_of_the_identity"),
    },
    Mutant {
        name: "a torn batch is whole",
        file: "store/src/scan.rs",
        find: "data.is_empty() || (disk.read_at",
        put: "!data.is_empty() || data.is_empty() || (disk.read_at",
        net: STORE,
    },
    Mutant {
        name: "a batch behind a gap is adopted",
        file: "store/src/recover.rs",
        find: "if first_missing > self.plan.durable {",
        put: "if first_missing > self.plan.durable && is_first {",
        net: STORE,
    },
    Mutant {
        name: "an index that was rolled back is adopted",
        file: "store/src/recover.rs",
        find: "if self.logged_checkpoint.max(superblock.checkpoint) > self.meta.id {",
        put: "if self.logged_checkpoint.max(superblock.checkpoint) > u64::MAX - self.meta.id {",
        net: STORE,
    },
    Mutant {
        name: "a row of the index's segment table is not checked",
        file: "store/src/segment.rs",
        find: "if u32::from_le_bytes(*crc) != crc32c::crc32c(content) {\n            return None;\n        }\n        let mut fields = Reader::new(content);\n        if fields.u8()? != VERSION as u8 {\n            return None;\n        }\n        let first = row",
        put: "if content.is_empty() {\n            return None;\n        }\n        let mut fields = Reader::new(content);\n        if fields.u8()? != VERSION as u8 {\n            return None;\n        }\n        let first = row",
        net: Net::Tests("weft-store", "rows_round_trip_and_flipped_bits_are_noticed"),
    },
    Mutant {
        name: "what was found damaged is forgotten by the next crash",
        file: "store/src/recover.rs",
        find: "if self.report.is_doubted() && self.superblock.doubt < self.next_number {",
        put: "if self.report.is_doubted() && self.superblock.doubt > self.next_number {",
        net: STORE,
    },
    Mutant {
        name: "a log that comes to rest does not say how far it is durable",
        file: "store/src/flush.rs",
        find: "self.wants_witness() && (is_idle || is_closing);",
        put: "self.wants_witness() && is_idle && is_closing;",
        net: STORE,
    },
    Mutant {
        name: "a sync is said to cover what is still on its way",
        file: "store/src/flush.rs",
        find: "syncs.covers = self.applied;",
        put: "syncs.covers = self.number;",
        net: STORE,
    },
    Mutant {
        name: "a flush needs no sync",
        file: "store/src/flush.rs",
        find: "if waiter.upto <= *durable {",
        put: "if waiter.upto <= applied {",
        net: STORE,
    },
    Mutant {
        name: "a record is answered before it is durable",
        file: "store/src/append.rs",
        find: "draft.waiters.extend(id.map(|id| Waiter { id, is_durable: true }));",
        put: "draft.waiters.extend(id.map(|id| Waiter { id, is_durable: false }));",
        net: STORE,
    },
    Mutant {
        name: "the checkpoint does not wait for the log",
        file: "store/src/checkpoint.rs",
        find: "Phase::Syncing { ticket, batch } if self.syncs.is_done(*ticket) => {",
        put: "Phase::Syncing { ticket, batch } if *ticket > 0 => {",
        net: STORE,
    },
    Mutant {
        name: "nothing is reserved for cleaning",
        file: "store/src/append.rs",
        find: "self.free_segments() > reserved && self.used_blocks(draft) < self.ledger.capacity_blocks(reserved)",
        put: "self.free_segments() > 0 && (self.used_blocks(draft) > 0 || reserved > 0)",
        net: FULL,
    },
    Mutant {
        name: "a write that waits for space is passed by a later one",
        file: "store/src/append.rs",
        find: "let must_wait = is_behind || !has_place;",
        put: "let must_wait = !has_place;",
        net: FULL,
    },
    Mutant {
        name: "a repair beats the running stream",
        file: "store/src/append.rs",
        find: "if present.state != State::Absent && present.seq >= live_from.0 {",
        put: "if present.state != State::Absent && live_from.0 == 0 {",
        net: Net::Tests("weft-store", "repair_does_not_replace_the_running_stream"),
    },
    Mutant {
        name: "a clear forgets its seq",
        file: "store/src/ledger.rs",
        find: "            seq: entry.seq,\n            birth: entry.birth,\n            ..Slot::default()",
        put: "            seq: if entry.kind == Kind::Data { entry.seq } else { 0 },\n            birth: entry.birth,\n            ..Slot::default()",
        net: STORE,
    },
    // ---- replication ----
    Mutant {
        name: "an answer is not compared with its question",
        file: "replication/src/writer/answer.rs",
        find: "&& block.0 - first.0 < count",
        put: "",
        net: Net::Tests("weft-replication", "no_reply_is_believed"),
    },
    Mutant {
        name: "a listing goes on beyond the shard",
        file: "replication/src/writer/answer.rs",
        find: "(next < self.end_leaf()).then_some(next)",
        put: "(next <= self.end_leaf()).then_some(next)",
        net: Net::Tests("weft-replication", "no_leaf_beyond_the_shard"),
    },
    Mutant {
        name: "who takes over does not wait for leases to end",
        file: "replication/src/writer/lease.rs",
        find: "may_be_read && now.since(quorum_at) < TAKE_OVER_WAIT",
        put: "may_be_read && now < quorum_at",
        net: Net::Search("overtaken-read"),
    },
    Mutant {
        name: "a lease counts from the answer",
        file: "replication/src/writer/mod.rs",
        find: "self.grant(disk, at);",
        put: "self.grant(disk, self.now.max(at));",
        net: Net::Search("overtaken-read-pair"),
    },
    Mutant {
        name: "one lease is enough",
        file: "replication/src/writer/lease.rs",
        find: "granted[needed - 1].map_or",
        put: "granted[needed * 0].map_or",
        net: Net::Search("overtaken-read"),
    },
    Mutant {
        name: "a lease that the change of the record needs is not looked for",
        file: "replication/src/writer/lease.rs",
        find: "until = until.min(self.leased_until(&saving.record));",
        put: "until = until.max(self.leased_until(&saving.record));",
        net: Net::Search("overtaken-read-change"),
    },
    Mutant {
        name: "reads that wait for leases tell nobody",
        file: "replication/src/writer/lease.rs",
        find: "self.now.since(self.leases.held_since) >= LEASE",
        put: "self.now.since(self.leases.held_since) >= LEASE * 1000",
        net: Net::Tests("weft-replication", "somebody_is_told"),
    },
    Mutant {
        name: "a replica does not check the writer's token",
        file: "replication/src/node.rs",
        find: "Some(promise) if token < promise.promised => Some(Refusal::Stale {",
        put: "Some(promise) if token < promise.promised && is_drop => Some(Refusal::Stale {",
        net: VDI,
    },
    Mutant {
        name: "a fence is answered with earlier writes under way",
        file: "replication/src/node.rs",
        find: ".position(|fence| finished >= fence.after)",
        put: ".position(|fence| finished <= fence.after || finished >= fence.after)",
        net: Net::Tests("weft-replication", "a_promise_waits_for_a_write"),
    },
    Mutant {
        name: "an unfinished resync is forgotten",
        file: "replication/src/node.rs",
        find: "promise.good_until = Some(promise.good_until.map_or(since, |good| good.min(since)));",
        put: "promise.resyncs += u64::from(since == Seq(u64::MAX));",
        net: Net::Tests("weft-replication", "an_unfinished_resync_is_remembered"),
    },
    Mutant {
        name: "a write completes at its first answer",
        file: "replication/src/writer/stream.rs",
        find: "acked.get(record.write_quorum() - 1).copied()",
        put: "acked.first().copied()",
        net: VDI,
    },
    Mutant {
        name: "a flush completes at its first answer",
        file: "replication/src/writer/stream.rs",
        find: "counted.count() >= record.write_quorum()",
        put: "counted.count() >= record.write_quorum().min(1)",
        net: VDI,
    },
    Mutant {
        name: "the past ends where the replica furthest behind is",
        file: "replication/src/writer/fence.rs",
        find: ".max_by_key(|(_, report)| (report.good(), report.is_whole(), report.end))",
        put: ".min_by_key(|(_, report)| (report.good(), report.is_whole(), report.end))",
        net: VDI,
    },
    Mutant {
        name: "seqs of a new life go on where the old one's end",
        file: "replication/src/writer/fence.rs",
        find: "Seq((((chosen.0 >> LIFE_BITS) + 1 + lives) << LIFE_BITS) + 1)",
        put: "Seq(chosen.0 + 1 + (lives >> LIFE_BITS))",
        net: MODEL,
    },
    Mutant {
        name: "a resync does not compare",
        file: "replication/src/writer/resync.rs",
        find: "let Some(leaf) = sync.leaves.pop_front() else {",
        put: "sync.leaves.clear();\n            let Some(leaf) = sync.leaves.pop_front() else {",
        net: VDI,
    },
    Mutant {
        name: "a read goes to a replica that lags",
        file: "replication/src/writer/read.rs",
        find: ".filter(|member| member.is_current() && member.acked >= self.completed)",
        put: ".filter(|member| member.is_current())",
        net: VDI,
    },
    Mutant {
        name: "a bad copy is not read elsewhere",
        file: "replication/src/writer/read.rs",
        find: "let is_exhausted = !read.tried.is_empty() && !may_come && !is_awaited;",
        put: "let (is_exhausted, next) = (!read.tried.is_empty(), next.filter(|_| read.tried.is_empty() || may_come));",
        net: VDI,
    },
    // ---- replication, in every order (issue 4) ----
    Mutant {
        name: "another's change of the record is taken for one's own",
        file: "replication/src/writer/plan.rs",
        find: "next.saved_by = self.incarnation;",
        put: "next.saved_by.0 &= self.incarnation.0 & 0;",
        net: Net::Tests("weft-replication", "the_same_change_made_by_another"),
    },
    Mutant {
        name: "a write completes by the new record alone while it is being saved",
        file: "replication/src/writer/stream.rs",
        find: "Some(other) => end = end.min(other),",
        put: "Some(other) => end = other,",
        net: CLUSTER,
    },
    Mutant {
        name: "two writers get one number",
        file: "control/src/store/mod.rs",
        find: "return Ok(Incarnation(next));",
        put: "return Ok(Incarnation(next / 2 + 1));",
        net: CLUSTER,
    },
    Mutant {
        name: "one report is a quorum for a fence",
        file: "replication/src/writer/fence.rs",
        find: "let is_quorum = vouching >= self.record.fence_quorum() || is_everybody;",
        put: "let is_quorum = vouching >= self.record.fence_quorum().min(1) || is_everybody;",
        net: Net::Search("impatient-restart"),
    },
    Mutant {
        name: "a fence is not needed: higher tokens are welcome",
        file: "replication/src/node.rs",
        find: "Some(promise) if token < promise.promised => Some(Refusal::Stale {",
        put: "Some(promise) if token < promise.promised && (is_fence || is_drop) => Some(Refusal::Stale {",
        net: Net::Search("take-over"),
    },
    Mutant {
        name: "a replica answers a flush without one",
        file: "replication/src/node.rs",
        find: "ReplicaRequest::Flush => (Request::Flush { shard }, PendingKind::Plain),",
        put: "ReplicaRequest::Flush => {\n                let (layer, leaf) = (types::LayerId(0), types::LeafNo(0));\n                (Request::LeafVersions { shard, layer, leaf }, PendingKind::Plain)\n            }",
        net: Net::Search("blackout"),
    },
    Mutant {
        name: "a write completes before the in-sync set has shrunk",
        file: "replication/src/writer/stream.rs",
        find: "let Some(mut end) = self.quorum_end(&self.record) else {",
        put: "let after = self.saving.as_ref().map(|saving| &saving.record);\n        let Some(mut end) = self.quorum_end(after.unwrap_or(&self.record)) else {",
        net: Net::Search("pair-impatient"),
    },
    Mutant {
        name: "one of three replicas is a quorum for a write",
        file: "replication/src/writer/stream.rs",
        find: "acked.get(record.write_quorum() - 1).copied()",
        put: "acked.get(record.write_quorum().min(1) - 1).copied()",
        net: Net::Search("impatient-restart"),
    },
    // ---- vdi ----
    Mutant {
        name: "overlapping requests do not wait",
        file: "vdi/src/conflict.rs",
        find: "(Claim(place), blockers == 0)",
        put: "{\n            if let Some(held) = &mut self.places[place as usize] {\n                held.blockers = 0;\n            }\n            (Claim(place), true)\n        }",
        net: VDI,
    },
    Mutant {
        name: "a write claims only its whole blocks",
        file: "vdi/src/requests.rs",
        find: "Work::Write { span, .. } => (span.touched(), true),",
        put: "Work::Write { span, .. } => (span.whole(u64::MAX), true),",
        net: VDI,
    },
    Mutant {
        name: "a part of a block is written over zeros",
        file: "vdi/src/partial.rs",
        find: "block.overlay(edge.start, &patch)",
        put: "{\n                let _ = block;\n                B::zeroed(BLOCK).overlay(edge.start, &patch)\n            }",
        net: VDI,
    },
    Mutant {
        name: "a write does not make its shard dirty",
        file: "vdi/src/flush.rs",
        find: "if !shard.is_dirty {\n            shard.is_dirty = true;",
        put: "if !shard.is_dirty && shard.flush_number == 0 {\n            shard.is_dirty = true;",
        net: VDI,
    },
    Mutant {
        name: "the first flush after a start asks nobody",
        file: "vdi/src/vdi.rs",
        find: "vdi.add_shards(records, true);",
        put: "vdi.add_shards(records, false);",
        net: VDI,
    },
    Mutant {
        name: "a write with FUA is not flushed",
        file: "vdi/src/requests.rs",
        find: "span, is_fua: true, ..\n            } => Some(span.touched()),",
        put: "span, is_fua: true, ..\n            } => Some(span.touched()).filter(|blocks| blocks.first == u64::MAX),",
        net: VDI,
    },
    Mutant {
        name: "a discard clears the blocks at its edges whole",
        file: "vdi/src/run.rs",
        find: "let whole = span.whole(self.spec.bytes);\n                let work = Work::Clear {\n                    kind: ClearKind::Trim,",
        put: "let whole = span.touched();\n                let work = Work::Clear {\n                    kind: ClearKind::Trim,",
        net: VDI,
    },
    Mutant {
        name: "the guest's descriptors are walked again when its request ends",
        file: "vhost-blk/src/ring.rs",
        find: "let entry = &mut self.entries[index];\n        let status_at",
        put: "let entry = &mut self.entries[index];\n        let (memory, layout) = (&self.parts.memory, self.parts.layout);\n        let _ = entry.chain.walk(memory, layout.table, layout.size, entry.head, &mut self.scratch);\n        let status_at",
        net: Net::Tests("weft-vhost-blk", "what_the_guest_changes_after_the_poll"),
    },
    Mutant {
        name: "an older copy of a disk is welcome",
        file: "store/src/recover.rs",
        find: "self.logged_life().max(superblock.open_count - 1) < known_opens",
        put: "self.logged_life().max(superblock.open_count - 1) < known_opens.min(1)",
        net: Net::Tests("weft-blockd", "an_old_copy_of_the_only_replica"),
    },
    Mutant {
        name: "an older copy looks younger each time it is nearly opened",
        file: "store/src/recover.rs",
        find: "if !may_be_older {",
        put: "if !may_be_older || superblock.open_count > 0 {",
        net: Net::Tests("weft-store", "an_older_copy_is_noticed"),
    },
    Mutant {
        name: "a superblock is believed whatever its checksum says",
        file: "store/src/superblock.rs",
        find: "if crc != crc_without(bytes, CRC_AT) {",
        put: "if crc == 0 && crc != crc_without(bytes, CRC_AT) {",
        net: Net::Tests("weft-store", "every_flipped_bit_is_noticed"),
    },
    Mutant {
        name: "a copy of a disk in use is taken for the disk",
        file: "blockd/src/daemon/disks.rs",
        find: "if self.is_up(record.id) {\n                    let message",
        put: "if self.is_up(record.id) && record.path == *path {\n                    let message",
        net: Net::Tests(
            "weft-blockd",
            "a_disk_is_refused_by_name_where_it_does_not_belong",
        ),
    },
    // ---- control: etcd ----
    Mutant {
        name: "only the first comparison of a transaction is made",
        file: "control/src/etcd/mod.rs",
        find: "Txn::new().when(compares)",
        put: "Txn::new().when(compares.into_iter().take(1).collect::<Vec<_>>())",
        net: Net::Tests("weft-control", "every_backend_keeps_the_same_promises"),
    },
    Mutant {
        name: "what is bound to a lease stays for ever",
        file: "control/src/etcd/mod.rs",
        find: "PutOptions::new().with_lease(lease.0)",
        put: "PutOptions::new().with_lease(lease.0 & 0)",
        net: Net::Tests("weft-control", "guests_of_a_host_that_lives_stay_its_own"),
    },
    Mutant {
        name: "a watch begins one revision late",
        file: "control/src/etcd/mirror.rs",
        find: ".with_start_revision(mirror.revision() + 1)",
        put: ".with_start_revision(mirror.revision() + 2)",
        net: Net::Tests("weft-control", "the_first_change_after_all_was_read"),
    },
    Mutant {
        name: "a refusal of etcd is taken for done",
        file: "control/src/etcd/mod.rs",
        find: "return Ok(Commit::Refused);",
        put: "return Ok(Commit::Done);",
        net: Net::Tests("weft-control", "every_backend_keeps_the_same_promises"),
    },
    Mutant {
        name: "a change that may have arrived is sent again",
        file: "control/src/etcd/link.rs",
        find: "Failure::Lost(reason) if !may_repeat => {",
        put: "Failure::Lost(reason) if !may_repeat && tries > 99 => {",
        net: Net::Tests("weft-control", "a_member_that_hangs_costs_one_try"),
    },
    Mutant {
        name: "who made a change may not see it yet",
        file: "control/src/etcd/mod.rs",
        find: "if self.mirror.wait_for(revision, SEEN_WITHIN) {",
        put: "if self.mirror.wait_for(revision, SEEN_WITHIN) || revision > 0 {",
        net: Net::Tests("weft-control", "what_was_changed_is_seen_though_the_watch_hangs"),
    },
    Mutant {
        name: "an etcd that went back is believed",
        file: "control/src/etcd/known.rs",
        find: "if revision < floor {",
        put: "if revision < floor.min(0) {",
        net: Net::Tests("weft-control", "an_etcd_restored_from_an_old_copy"),
    },
    Mutant {
        name: "numbers go on where a restored counter stands",
        file: "control/src/store/mod.rs",
        find: ".max(self.backend.highest_incarnation())",
        put: ".max(self.backend.highest_incarnation() & 0)",
        net: Net::Tests("weft-control", "an_etcd_restored_from_an_old_copy"),
    },
    Mutant {
        name: "a number is given before it is written down",
        file: "control/src/store/mod.rs",
        find: "self.backend.remember_incarnation(next)?;",
        put: "",
        net: Net::Tests("weft-control", "an_etcd_restored_from_an_old_copy"),
    },
    Mutant {
        name: "a pool that was deleted in etcd is gone",
        file: "control/src/etcd/mirror.rs",
        find: "(POOL, value) => known.saw_pool(value.as_deref())?,",
        put: "(POOL, Some(value)) => known.saw_pool(Some(value))?,",
        net: Net::Tests("weft-control", "an_etcd_that_was_emptied"),
    },
    Mutant {
        name: "an older life takes a VDI from a later one",
        file: "control/src/store/vdis.rs",
        find: "writer.record.filter(|now| now.incarnation > incarnation)",
        put: "writer.record.filter(|now| now.incarnation.0 > u64::MAX - incarnation.0)",
        net: Net::Tests("weft-control", "nobody_takes_a_vdi_with_a_lower_incarnation"),
    },
    Mutant {
        name: "a shard's record is changed by who wrote the VDI before",
        file: "control/src/store/shards.rs",
        find: "if let Some(writer_bytes) = &writer_bytes {",
        put: "if let Some(writer_bytes) = writer_bytes.as_ref().filter(|bytes| bytes.is_empty()) {",
        net: Net::Tests("weft-control", "only_its_writer_changes_a_vdis_shards"),
    },
    Mutant {
        name: "a writer's record in other words is another's",
        file: "control/src/store/shards.rs",
        find: "writer_bytes = Some(self.require_writer(record.shard.vdi, writer)?);",
        put: "self.require_writer(record.shard.vdi, writer)?;",
        net: Net::Tests("weft-control", "a_writer_is_the_same_in_other_words"),
    },
    Mutant {
        name: "a host that was just forgotten says that it is alive",
        file: "control/src/store/hosts.rs",
        find: "change.compares.push(host.unchanged(&key));",
        put: "",
        net: Net::Tests("weft-control", "a_host_that_is_alive_has_a_record"),
    },
    // ---- control: records rebuilt from the disks ----
    Mutant {
        name: "a replica that has less is in sync after a recovery",
        file: "control/src/recover/merge.rs",
        find: ".filter(|(_, copy)| rank(copy) == furthest)",
        put: ".filter(|(_, copy)| rank(copy) <= furthest)",
        net: Net::Tests("weft-control", "only_who_has_everything_that_anybody_has"),
    },
    Mutant {
        name: "a recovery gives incarnations again",
        file: "control/src/recover/merge.rs",
        find: "Incarnation(highest.0.saturating_add(INCARNATIONS_SKIPPED))",
        put: "Incarnation(highest.0.saturating_sub(INCARNATIONS_SKIPPED))",
        net: Net::Tests("weft-control", "what_agrees_comes_back_as_it_was"),
    },
    Mutant {
        name: "what was deleted comes back with a disk that was away",
        file: "control/src/recover/merge.rs",
        find: "named.iter().any(has_seen_it_go)",
        put: "named.iter().all(has_seen_it_go)",
        net: Net::Tests("weft-control", "what_was_deleted_does_not_come_back"),
    },
    Mutant {
        name: "one of two replicas is enough for a recovery",
        file: "control/src/recover/merge.rs",
        find: "(_, in_sync) => in_sync == base.in_sync.len(),",
        put: "(_, in_sync) => in_sync >= base.fence_quorum(),",
        net: Net::Tests("weft-control", "a_disk_that_is_not_there_is_asked_for"),
    },
    Mutant {
        name: "hidden characters are welcome in a path",
        file: "control/src/check.rs",
        find: "&& !text.chars().any(is_hidden)",
        put: "&& !text.is_empty()",
        net: Net::Tests("weft-control", "every_wrong_body_is_refused"),
    },
];
