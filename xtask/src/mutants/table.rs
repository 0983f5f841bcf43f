//! The deliberate bugs. Add one for each promise that a new test holds; `docs/faults.md` shows the last full run.

use std::fmt;

/// What must notice a mutant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Net {
    /// Tests of a package: what cargo builds of it, and the part of their names that chooses them.
    Tests(&'static str, &'static str, &'static str),
    /// The first so many seeds of a simulated world.
    World(&'static str, u32),
    /// A scenario of `replication-model`, searched whole.
    Search(&'static str),
}

impl Net {
    /// What cargo is to do to build it.
    pub fn build(self) -> Vec<&'static str> {
        let words = match self {
            Net::Tests(package, target, _) => return tests(package, target, "--no-run"),
            Net::Search(_) => "build --quiet --package weft-replication-model",
            Net::World(..) => "build --quiet --package weft-sim --bin weft-sim",
        };
        words.split(' ').collect()
    }

    /// What cargo is to do to run it, once it is built.
    pub fn cast(self) -> Vec<String> {
        let words = match self {
            Net::Tests(package, target, filter) => tests(package, target, filter).join(" "),
            Net::Search(scenario) => {
                format!("run --quiet --package weft-replication-model -- --heal-one-of 16 {scenario}")
            }
            Net::World(world, seeds) => {
                format!("run --quiet --package weft-sim --bin weft-sim -- {world} --first --seeds 0..{seeds}")
            }
        };
        words.split_whitespace().map(str::to_owned).collect()
    }

    /// What it looked at in a run that printed `said`: tests, seeds or states.
    pub fn looked_at(self, said: &str) -> u64 {
        let after = |line: &str, word: &str| -> Option<u64> {
            let rest = line.split_once(word)?.1;
            rest.trim_start()
                .split(|c: char| !c.is_ascii_digit())
                .next()?
                .parse()
                .ok()
        };
        let of_line = |line: &str| match self {
            Net::Tests(..) => {
                let passed =
                    after(line, "test result: ok. ").or_else(|| after(line, "test result: FAILED. "));
                Some(passed? + after(line, "passed;")?)
            }
            Net::Search(scenario) => after(line, &format!("| {scenario} |")),
            // The last line that it prints of a world that holds, or of one that does not.
            Net::World(world, _) => after(line, &format!("{world}: "))
                .or_else(|| after(line, &format!("{world} seed ")).map(|seed| seed + 1)),
        };
        said.lines().filter_map(of_line).sum()
    }
}

fn tests(package: &'static str, target: &'static str, last: &'static str) -> Vec<&'static str> {
    let mut words = vec!["test", "--quiet", "--package", package];
    words.extend(target.split(' '));
    words.push(last);
    words
}

impl fmt::Display for Net {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Net::Tests(package, _, filter) => write!(f, "{package} `{filter}`"),
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
    /// What must notice, each by itself.
    pub nets: &'static [Net],
}

const STORE: Net = Net::World("store", 60);
const FULL: Net = Net::World("store-full", 60);
/// For what shows in one of hundreds.
const FULL_LONG: Net = Net::World("store-full", 1700);
const VDI: Net = Net::World("vdi", 120);
const CUTS: Net = Net::Tests("weft-vdi", "--test it", "cut::");
const CLUSTER: Net = Net::World("cluster", 100);
const MODEL: Net = Net::Tests("weft-replication", "--test world", "faults_lose_nothing");

/// Those of every `cargo xtask test`: the bugs that replicating storage is known for, all in one crate, so that one build
/// serves them.
pub const FEW: &[&str] = &[
    "a replica answers a flush without one",
    "a fence is not needed: higher tokens are welcome",
    "who takes over does not wait for leases to end",
    "an epoch's end is forgotten",
    "a resync does not compare",
];

/// All of them, by crate.
pub const MUTANTS: &[Mutant] = &[
    // ---- store ----
    Mutant {
        name: "a read does not check its blocks",
        file: "store/src/read.rs",
        find: "types::bind(key, types::crc32c(bytes)).0 != check.sum",
        put: "types::bind(key, types::crc32c(bytes)).0 != check.sum && check.seq == u64::MAX",
        nets: &[STORE],
    },
    Mutant {
        name: "a checksum is not bound to its write",
        file: "types/src/checksum.rs",
        find: "bytes[16..24].copy_from_slice(&key.seq.0.to_le_bytes());",
        put: "bytes[16..24].copy_from_slice(&(key.seq.0 & 0).to_le_bytes());",
        nets: &[Net::Tests("weft-types", "--lib", "each_part_of_the_identity")],
    },
    Mutant {
        name: "a torn batch is whole",
        file: "store/src/scan.rs",
        find: "data.is_empty() || (disk.read_at",
        put: "!data.is_empty() || data.is_empty() || (disk.read_at",
        nets: &[STORE],
    },
    Mutant {
        name: "a batch behind a gap is adopted",
        file: "store/src/recover.rs",
        find: "if first_missing > self.plan.durable {",
        put: "if first_missing > self.plan.durable && is_first {",
        nets: &[STORE],
    },
    Mutant {
        name: "an index that was rolled back is adopted",
        file: "store/src/recover.rs",
        find: "if self.logged_checkpoint.max(superblock.checkpoint) > self.meta.id {",
        put: "if self.logged_checkpoint.max(superblock.checkpoint) > u64::MAX - self.meta.id {",
        nets: &[STORE],
    },
    Mutant {
        name: "a row of the index's segment table is not checked",
        file: "store/src/segment.rs",
        find: "if u32::from_le_bytes(*crc) != crc32c::crc32c(content) {\n            return None;\n        }\n        let mut fields = Reader::new(content);\n        if fields.u8()? != VERSION as u8 {\n            return None;\n        }\n        let first = row",
        put: "if content.is_empty() {\n            return None;\n        }\n        let mut fields = Reader::new(content);\n        if fields.u8()? != VERSION as u8 {\n            return None;\n        }\n        let first = row",
        nets: &[Net::Tests(
            "weft-store",
            "--lib",
            "rows_round_trip_and_flipped_bits_are_noticed",
        )],
    },
    Mutant {
        name: "what was found damaged is forgotten by the next crash",
        file: "store/src/recover.rs",
        find: "if self.report.is_doubted() && self.superblock.doubt < self.next_number {",
        put: "if self.report.is_doubted() && self.superblock.doubt > self.next_number {",
        nets: &[STORE],
    },
    Mutant {
        name: "a log that comes to rest does not say how far it is durable",
        file: "store/src/flush.rs",
        find: "self.wants_witness() && (is_idle || is_closing);",
        put: "self.wants_witness() && is_idle && is_closing;",
        nets: &[STORE],
    },
    Mutant {
        name: "a sync is said to cover what is still on its way",
        file: "store/src/flush.rs",
        find: "syncs.covers = self.applied;",
        put: "syncs.covers = self.number;",
        nets: &[STORE],
    },
    Mutant {
        name: "a flush needs no sync",
        file: "store/src/flush.rs",
        find: "if waiter.upto <= *durable {",
        put: "if waiter.upto <= applied {",
        nets: &[STORE],
    },
    Mutant {
        name: "a record is answered before it is durable",
        file: "store/src/append.rs",
        find: "draft.waiters.extend(id.map(|id| Waiter { id, is_durable: true }));",
        put: "draft.waiters.extend(id.map(|id| Waiter { id, is_durable: false }));",
        nets: &[STORE],
    },
    Mutant {
        name: "the checkpoint does not wait for the log",
        file: "store/src/checkpoint.rs",
        find: "Phase::Syncing { ticket, batch } if self.syncs.is_done(*ticket) => {",
        put: "Phase::Syncing { ticket, batch } if *ticket > 0 => {",
        nets: &[STORE],
    },
    Mutant {
        name: "nothing is reserved for cleaning",
        file: "store/src/append.rs",
        find: "self.free_segments() > reserved && self.used_blocks(draft) < self.ledger.capacity_blocks(reserved)",
        put: "self.free_segments() > 0 && (self.used_blocks(draft) > 0 || reserved > 0)",
        nets: &[FULL],
    },
    Mutant {
        name: "a write that waits for space is passed by a later one",
        file: "store/src/append.rs",
        find: "let must_wait = is_behind || !has_place;",
        put: "let must_wait = !has_place;",
        nets: &[FULL],
    },
    Mutant {
        name: "a repair beats the running stream",
        file: "store/src/append.rs",
        find: "true => present.seq >= live_from.0,",
        put: "true => live_from.0 == 0,",
        nets: &[Net::Tests(
            "weft-store",
            "--test behaviour",
            "repair_does_not_replace_the_running_stream",
        )],
    },
    Mutant {
        name: "a clear forgets its seq",
        file: "store/src/ledger.rs",
        find: "            seq: entry.seq,\n            birth: entry.birth,\n            ..Slot::default()",
        put: "            seq: if entry.kind == Kind::Data { entry.seq } else { 0 },\n            birth: entry.birth,\n            ..Slot::default()",
        nets: &[STORE],
    },
    Mutant {
        name: "who trims takes the space others wait for",
        file: "store/src/append.rs",
        find: "let kept = if self.is_stuck() {",
        put: "let kept = if reserved > 0 {",
        nets: &[Net::Tests(
            "weft-sim",
            "--lib",
            "a_disk_gets_full_while_others_replace_and_trim_what_they_have",
        )],
    },
    Mutant {
        name: "copies of a clear are moved again and again",
        file: "store/src/moving.rs",
        find: "(entry.block.max(end), entry.block + entry.count)",
        put: "(entry.block, entry.block + entry.count)",
        nets: &[Net::Tests(
            "weft-store",
            "--lib",
            "a_clear_is_moved_once_however_many_copies",
        )],
    },
    Mutant {
        name: "what cleaning cannot give back counts as space",
        file: "store/src/ledger.rs",
        find: "(usable * packed * 9 / 10).saturating_sub(self.segments.lost_blocks())",
        put: "(usable * packed * 9 / 10).saturating_sub(self.segments.lost_blocks() / 1_000_000)",
        nets: &[FULL_LONG],
    },
    Mutant {
        name: "a checkpoint waits for the room that it would free",
        file: "store/src/store.rs",
        find: "let kept = if leads_to_space { 0 } else { KEPT_SEGMENTS };",
        put: "let kept = if leads_to_space { KEPT_SEGMENTS } else { KEPT_SEGMENTS };",
        nets: &[FULL_LONG],
    },
    // ---- replication ----
    Mutant {
        name: "an answer is not compared with its question",
        file: "replication/src/writer/answer.rs",
        find: "&& block.0 - first.0 < count",
        put: "",
        nets: &[Net::Tests(
            "weft-replication",
            "--test world",
            "no_reply_is_believed",
        )],
    },
    Mutant {
        name: "a listing goes on beyond the shard",
        file: "replication/src/writer/answer.rs",
        find: "if next < self.end_leaf() {",
        put: "if next <= self.end_leaf() {",
        nets: &[Net::Tests(
            "weft-replication",
            "--test listings",
            "no_leaf_beyond_the_shard",
        )],
    },
    Mutant {
        name: "who takes over does not wait for leases to end",
        file: "replication/src/writer/lease.rs",
        find: "may_be_read && now.since(quorum_at) < TAKE_OVER_WAIT",
        put: "may_be_read && now < quorum_at",
        nets: &[Net::Search("overtaken-read"), CLUSTER],
    },
    Mutant {
        name: "a lease counts from the answer",
        file: "replication/src/writer/mod.rs",
        find: "self.grant(disk, at);",
        put: "self.grant(disk, self.now.max(at));",
        nets: &[Net::Search("overtaken-read-pair")],
    },
    Mutant {
        name: "one lease is enough",
        file: "replication/src/writer/lease.rs",
        find: "granted[needed - 1].map_or",
        put: "granted[needed * 0].map_or",
        nets: &[Net::Search("overtaken-read")],
    },
    Mutant {
        name: "a lease that the change of the record needs is not looked for",
        file: "replication/src/writer/lease.rs",
        find: "until = until.min(self.leased_until(&saving.record));",
        put: "until = until.max(self.leased_until(&saving.record));",
        nets: &[Net::Search("overtaken-read-change")],
    },
    Mutant {
        name: "reads that wait for leases tell nobody",
        file: "replication/src/writer/lease.rs",
        find: "self.now.since(self.leases.held_since) >= LEASE",
        put: "self.now.since(self.leases.held_since) >= LEASE * 1000",
        nets: &[Net::Tests(
            "weft-replication",
            "--test leases",
            "somebody_is_told",
        )],
    },
    Mutant {
        name: "a replica does not check the writer's token",
        file: "replication/src/node.rs",
        find: "Some(promise) if token < promise.promised => Some(Refusal::Stale {",
        put: "Some(promise) if token < promise.promised && is_drop => Some(Refusal::Stale {",
        nets: &[VDI],
    },
    Mutant {
        name: "a fence is answered with earlier writes under way",
        file: "replication/src/node.rs",
        find: ".position(|fence| finished >= fence.after)",
        put: ".position(|fence| finished <= fence.after || finished >= fence.after)",
        nets: &[Net::Tests(
            "weft-replication",
            "--lib",
            "a_promise_waits_for_a_write",
        )],
    },
    Mutant {
        name: "an unfinished resync is forgotten",
        file: "replication/src/node.rs",
        find: "promise.good_until = Some(promise.good_until.map_or(since, |good| good.min(since)));",
        put: "promise.resyncs += u64::from(since == Seq(u64::MAX));",
        nets: &[Net::Tests(
            "weft-replication",
            "--lib",
            "an_unfinished_resync_is_remembered",
        )],
    },
    Mutant {
        name: "a write completes at its first answer",
        file: "replication/src/writer/stream.rs",
        find: "acked.get(record.write_quorum() - 1).copied()",
        put: "acked.first().copied()",
        nets: &[VDI],
    },
    Mutant {
        name: "a flush completes at its first answer",
        file: "replication/src/writer/stream.rs",
        find: "counted.count() >= record.write_quorum()",
        put: "counted.count() >= record.write_quorum().min(1)",
        nets: &[VDI],
    },
    Mutant {
        name: "the past ends where the replica furthest behind is",
        file: "replication/src/writer/fence.rs",
        find: ".max_by_key(|(_, report)| (report.good(), report.is_whole(), report.end))",
        put: ".min_by_key(|(_, report)| (report.good(), report.is_whole(), report.end))",
        nets: &[VDI],
    },
    Mutant {
        name: "seqs of a new life go on where the old one's end",
        file: "replication/src/writer/fence.rs",
        find: "Seq((((chosen.0 >> LIFE_BITS) + 1 + lives) << LIFE_BITS) + 1)",
        put: "Seq(chosen.0 + 1 + (lives >> LIFE_BITS))",
        nets: &[MODEL],
    },
    Mutant {
        name: "a resync does not compare",
        file: "replication/src/writer/resync.rs",
        find: "let Some(place) = sync.leaves.pop_front() else {",
        put: "sync.leaves.clear();\n            let Some(place) = sync.leaves.pop_front() else {",
        nets: &[VDI, Net::Search("pair-cut-restart")],
    },
    Mutant {
        name: "a read goes to a replica that lags",
        file: "replication/src/writer/read.rs",
        find: ".filter(|member| member.is_current() && member.acked >= self.completed)",
        put: ".filter(|member| member.is_current())",
        nets: &[VDI],
    },
    Mutant {
        name: "a bad copy is not read elsewhere",
        file: "replication/src/writer/read.rs",
        find: "let is_exhausted = !read.tried.is_empty() && !may_come && !is_awaited;",
        put: "let (is_exhausted, next) = (!read.tried.is_empty(), next.filter(|_| read.tried.is_empty() || may_come));",
        nets: &[VDI],
    },
    // ---- replication, in every order (issue 4) ----
    Mutant {
        name: "another's change of the record is taken for one's own",
        file: "replication/src/writer/plan.rs",
        find: "next.saved_by = self.incarnation;",
        put: "next.saved_by.0 &= self.incarnation.0 & 0;",
        nets: &[Net::Tests(
            "weft-replication",
            "--test overtaken",
            "the_same_change_made_by_another",
        )],
    },
    Mutant {
        name: "a place is given away before the newcomer is filled",
        file: "replication/src/writer/plan.rs",
        find: "let is_counted_on = stay.len() < next.in_sync.len();",
        put: "let is_counted_on = stay.len() > next.in_sync.len();",
        nets: &[Net::Tests("weft-vdi", "--test it", "a_place_is_given_away")],
    },
    Mutant {
        name: "a newcomer is in sync before it holds everything",
        file: "replication/src/writer/plan.rs",
        find: "if stay.len() < self.least_in_sync() || !stay.iter().all(|disk| self.is_equal(*disk)) {",
        put: "if stay.len() < self.least_in_sync() {",
        nets: &[Net::Search("replace-single")],
    },
    Mutant {
        name: "a write completes by the new record alone while it is being saved",
        file: "replication/src/writer/stream.rs",
        find: "Some(other) => end = end.min(other),",
        put: "Some(other) => end = other,",
        nets: &[CLUSTER],
    },
    Mutant {
        name: "two writers get one number",
        file: "control/src/store/mod.rs",
        find: "return Ok(Incarnation(next));",
        put: "return Ok(Incarnation(next / 2 + 1));",
        nets: &[CLUSTER],
    },
    Mutant {
        name: "one report is a quorum for a fence",
        file: "replication/src/writer/fence.rs",
        find: "let is_quorum = vouching >= self.record.fence_quorum() || is_everybody;",
        put: "let is_quorum = vouching >= self.record.fence_quorum().min(1) || is_everybody;",
        nets: &[Net::Search("impatient-restart")],
    },
    Mutant {
        name: "a fence is not needed: higher tokens are welcome",
        file: "replication/src/node.rs",
        find: "Some(promise) if token < promise.promised => Some(Refusal::Stale {",
        put: "Some(promise) if token < promise.promised && (is_fence || is_drop) => Some(Refusal::Stale {",
        nets: &[Net::Search("take-over")],
    },
    Mutant {
        name: "a replica answers a flush without one",
        file: "replication/src/node.rs",
        find: "ReplicaRequest::Flush => (Request::Flush { shard }, PendingKind::Plain),",
        put: "ReplicaRequest::Flush => {\n                let (layer, leaf) = (types::LayerId(0), types::LeafNo(0));\n                let lineage = types::Lineage::of_layer(shard.vdi, layer);\n                (Request::LeafVersions { shard, lineage, leaf }, PendingKind::Plain)\n            }",
        nets: &[Net::Search("blackout")],
    },
    Mutant {
        name: "a write completes before the in-sync set has shrunk",
        file: "replication/src/writer/stream.rs",
        find: "let Some(mut end) = self.quorum_end(&self.record) else {",
        put: "let after = self.saving.as_ref().map(|saving| &saving.record);\n        let Some(mut end) = self.quorum_end(after.unwrap_or(&self.record)) else {",
        nets: &[Net::Search("pair-impatient")],
    },
    Mutant {
        name: "one of three replicas is a quorum for a write",
        file: "replication/src/writer/stream.rs",
        find: "acked.get(record.write_quorum() - 1).copied()",
        put: "acked.get(record.write_quorum().min(1) - 1).copied()",
        nets: &[Net::Search("impatient-restart")],
    },
    Mutant {
        name: "the longest tail is adopted, whole or not",
        file: "replication/src/writer/fence.rs",
        find: ".max_by_key(|(_, report)| (report.good(), report.is_whole(), report.end))",
        put: ".max_by_key(|(_, report)| (report.end, report.is_whole(), report.good()))",
        nets: &[Net::Tests(
            "weft-replication",
            "--test lost_disk",
            "a_longer_stream",
        )],
    },
    Mutant {
        name: "an epoch's end is forgotten",
        file: "replication/src/writer/fence.rs",
        find: "let since = good.min(ended.unwrap_or(Seq(0)));",
        put: "let since = good.min(ended.map_or(good, |ended| ended.max(good)));",
        nets: &[Net::Search("pair-cut-restart")],
    },
    Mutant {
        name: "a replica does not keep its promise on its disk",
        file: "replication/src/node.rs",
        find: "let kept = Kept {\n            promised: self.promised,",
        put: "let kept = Kept {\n            promised: Token::default(),",
        nets: &[Net::Search("take-over-disk-restart")],
    },
    Mutant {
        name: "a lease lasts longer than its writer counts on",
        file: "replication/src/writer/lease.rs",
        find: "pub const LEASE: Duration = Duration::from_secs(2);",
        put: "pub const LEASE: Duration = Duration::from_secs(5);",
        nets: &[Net::Search("overtaken-read")],
    },
    Mutant {
        name: "a member joins before it holds what was completed",
        file: "replication/src/writer/fence.rs",
        find: "report.is_whole() && is_ours && report.end >= self.completed {\n                self.make_current",
        put: "is_ours {\n                self.make_current",
        nets: &[CLUSTER],
    },
    // ---- vdi ----
    Mutant {
        name: "overlapping requests do not wait",
        file: "vdi/src/conflict.rs",
        find: "(Claim(place), blockers == 0)",
        put: "{\n            if let Some(held) = &mut self.places[place as usize] {\n                held.blockers = 0;\n            }\n            (Claim(place), true)\n        }",
        nets: &[VDI],
    },
    Mutant {
        name: "a write claims only its whole blocks",
        file: "vdi/src/requests.rs",
        find: "Work::Write { span, .. } => (span.touched(), true),",
        put: "Work::Write { span, .. } => (span.whole(u64::MAX), true),",
        nets: &[VDI],
    },
    Mutant {
        name: "a part of a block is written over zeros",
        file: "vdi/src/partial.rs",
        find: "block.overlay(edge.start, &patch)",
        put: "{\n                let _ = block;\n                B::zeroed(BLOCK).overlay(edge.start, &patch)\n            }",
        nets: &[VDI],
    },
    Mutant {
        name: "a write does not make its shard dirty",
        file: "vdi/src/flush.rs",
        find: "if !shard.is_dirty {\n            shard.is_dirty = true;",
        put: "if !shard.is_dirty && shard.flush_number == 0 {\n            shard.is_dirty = true;",
        nets: &[VDI],
    },
    Mutant {
        name: "the first flush after a start asks nobody",
        file: "vdi/src/vdi.rs",
        find: "vdi.add_shards(records, true);",
        put: "vdi.add_shards(records, false);",
        nets: &[VDI],
    },
    Mutant {
        name: "a write with FUA is not flushed",
        file: "vdi/src/requests.rs",
        find: "span, is_fua: true, ..\n            } => Some(span.touched()),",
        put: "span, is_fua: true, ..\n            } => Some(span.touched()).filter(|blocks| blocks.first == u64::MAX),",
        nets: &[VDI],
    },
    Mutant {
        name: "a discard clears the blocks at its edges whole",
        file: "vdi/src/run.rs",
        find: "let whole = span.whole(self.spec.bytes);\n                let work = Work::Clear {\n                    kind: ClearKind::Trim,",
        put: "let whole = span.touched();\n                let work = Work::Clear {\n                    kind: ClearKind::Trim,",
        nets: &[VDI],
    },
    Mutant {
        name: "a layer is sealed while writes to it are under way",
        file: "vdi/src/cut.rs",
        find: "changes && running.stage != Stage::Waiting",
        put: "changes && running.stage == Stage::Waiting",
        nets: &[CUTS],
    },
    Mutant {
        name: "shards that were touched are not cut",
        file: "vdi/src/cut.rs",
        find: "            self.tell(turn, no, WriterEvent::Cut { lineage });",
        put: "            if no.0 > 0 { self.tell(turn, no, WriterEvent::Cut { lineage }); }",
        nets: &[CUTS],
    },
    Mutant {
        name: "shards that nobody touched are not cut",
        file: "vdi/src/cut.rs",
        find: "        self.spec.lineage = lineage;",
        put: "        drop(lineage);",
        nets: &[CUTS],
    },
    Mutant {
        name: "a VDI that is cut with others answers",
        file: "vdi/src/cut.rs",
        find: "Some(held) => held.answers.push((id, result)),",
        put: "Some(held) if id.0 % 2 == 0 => held.answers.push((id, result)),\n            Some(_) => turn.effects.push(Effect::Done(id, result)),",
        nets: &[CUTS],
    },
    Mutant {
        name: "a VDI that held too long goes on holding",
        file: "vdi/src/cut.rs",
        find: "if self.cuts.held.is_some() && !self.is_holding(turn.now)",
        put: "if self.cuts.held.is_some() && self.is_holding(turn.now) && self.is_closed",
        nets: &[CUTS],
    },
    Mutant {
        name: "the guest's descriptors are walked again when its request ends",
        file: "vhost-blk/src/ring.rs",
        find: "let entry = &mut self.entries[index];\n        let status_at",
        put: "let entry = &mut self.entries[index];\n        let (memory, layout) = (&self.parts.memory, self.parts.layout);\n        let _ = entry.chain.walk(memory, layout.table, layout.size, entry.head, &mut self.scratch);\n        let status_at",
        nets: &[Net::Tests(
            "weft-vhost-blk",
            "--lib",
            "what_the_guest_changes_after_the_poll",
        )],
    },
    Mutant {
        name: "an older copy of a disk is welcome",
        file: "store/src/recover.rs",
        find: "self.logged_life().max(superblock.open_count - 1) < known_opens",
        put: "self.logged_life().max(superblock.open_count - 1) < known_opens.min(1)",
        nets: &[Net::Tests(
            "weft-blockd",
            "--test images",
            "an_old_copy_of_the_only_replica",
        )],
    },
    Mutant {
        name: "an older copy looks younger each time it is nearly opened",
        file: "store/src/recover.rs",
        find: "if !may_be_older {",
        put: "if !may_be_older || superblock.open_count > 0 {",
        nets: &[Net::Tests(
            "weft-store",
            "--test behaviour",
            "an_older_copy_is_noticed",
        )],
    },
    Mutant {
        name: "a superblock is believed whatever its checksum says",
        file: "store/src/superblock.rs",
        find: "if crc != crc_without(bytes, CRC_AT) {",
        put: "if crc == 0 && crc != crc_without(bytes, CRC_AT) {",
        nets: &[Net::Tests("weft-store", "--lib", "every_flipped_bit_is_noticed")],
    },
    Mutant {
        name: "a copy of a disk in use is taken for the disk",
        file: "blockd/src/daemon/disks.rs",
        find: "if self.is_up(record.id) {\n                    let message",
        put: "if self.is_up(record.id) && record.path == *path {\n                    let message",
        nets: &[Net::Tests(
            "weft-blockd",
            "--test moved",
            "a_disk_is_refused_by_name_where_it_does_not_belong",
        )],
    },
    // ---- control: etcd ----
    Mutant {
        name: "only the first comparison of a transaction is made",
        file: "control/src/etcd/mod.rs",
        find: "Txn::new().when(compares)",
        put: "Txn::new().when(compares.into_iter().take(1).collect::<Vec<_>>())",
        nets: &[Net::Tests(
            "weft-control",
            "--test etcd",
            "every_backend_keeps_the_same_promises",
        )],
    },
    Mutant {
        name: "what is bound to a lease stays for ever",
        file: "control/src/etcd/mod.rs",
        find: "PutOptions::new().with_lease(lease.0)",
        put: "PutOptions::new().with_lease(lease.0 & 0)",
        nets: &[Net::Tests(
            "weft-control",
            "--test etcd",
            "guests_of_a_host_that_lives_stay_its_own",
        )],
    },
    Mutant {
        name: "a watch begins one revision late",
        file: "control/src/etcd/mirror.rs",
        find: ".with_start_revision(mirror.revision() + 1)",
        put: ".with_start_revision(mirror.revision() + 2)",
        nets: &[Net::Tests(
            "weft-control",
            "--test etcd_went_back",
            "the_first_change_after_all_was_read",
        )],
    },
    Mutant {
        name: "a refusal of etcd is taken for done",
        file: "control/src/etcd/mod.rs",
        find: "return Ok(Commit::Refused);",
        put: "return Ok(Commit::Done);",
        nets: &[Net::Tests(
            "weft-control",
            "--test etcd",
            "every_backend_keeps_the_same_promises",
        )],
    },
    Mutant {
        name: "a change that may have arrived is sent again",
        file: "control/src/etcd/link.rs",
        find: "Failure::Lost(reason) if !may_repeat => {",
        put: "Failure::Lost(reason) if !may_repeat && tries > 99 => {",
        nets: &[Net::Tests(
            "weft-control",
            "--test etcd",
            "a_member_that_hangs_costs_one_try",
        )],
    },
    Mutant {
        name: "who made a change may not see it yet",
        file: "control/src/etcd/mod.rs",
        find: "if self.mirror.wait_for(revision, SEEN_WITHIN) {",
        put: "if self.mirror.wait_for(revision, SEEN_WITHIN) || revision > 0 {",
        nets: &[Net::Tests(
            "weft-control",
            "--test etcd_went_back",
            "what_was_changed_is_seen_though_the_watch_hangs",
        )],
    },
    Mutant {
        name: "an etcd that went back is believed",
        file: "control/src/etcd/known.rs",
        find: "if revision < floor {",
        put: "if revision < floor.min(0) {",
        nets: &[Net::Tests(
            "weft-control",
            "--test etcd_went_back",
            "an_etcd_restored_from_an_old_copy",
        )],
    },
    Mutant {
        name: "numbers go on where a restored counter stands",
        file: "control/src/store/mod.rs",
        find: ".max(self.backend.highest_incarnation())",
        put: ".max(self.backend.highest_incarnation() & 0)",
        nets: &[Net::Tests(
            "weft-control",
            "--test etcd_went_back",
            "an_etcd_restored_from_an_old_copy",
        )],
    },
    Mutant {
        name: "a number is given before it is written down",
        file: "control/src/store/mod.rs",
        find: "self.backend.remember_incarnation(next)?;",
        put: "",
        nets: &[Net::Tests(
            "weft-control",
            "--test etcd_went_back",
            "an_etcd_restored_from_an_old_copy",
        )],
    },
    Mutant {
        name: "a pool that was deleted in etcd is gone",
        file: "control/src/etcd/mirror.rs",
        find: "(POOL, value) => known.saw_pool(value.as_deref())?,",
        put: "(POOL, Some(value)) => known.saw_pool(Some(value))?,",
        nets: &[Net::Tests(
            "weft-control",
            "--test etcd_went_back",
            "an_etcd_that_was_emptied",
        )],
    },
    Mutant {
        name: "an older life takes a VDI from a later one",
        file: "control/src/store/vdis.rs",
        find: "writer.record.filter(|now| now.incarnation > incarnation)",
        put: "writer.record.filter(|now| now.incarnation.0 > u64::MAX - incarnation.0)",
        nets: &[Net::Tests(
            "weft-control",
            "--test etcd_rules",
            "nobody_takes_a_vdi_with_a_lower_incarnation",
        )],
    },
    Mutant {
        name: "a shard's record is changed by who wrote the VDI before",
        file: "control/src/store/shards.rs",
        find: "if let Some(writer_bytes) = &writer_bytes {",
        put: "if let Some(writer_bytes) = writer_bytes.as_ref().filter(|bytes| bytes.is_empty()) {",
        nets: &[Net::Tests(
            "weft-control",
            "--test etcd",
            "only_its_writer_changes_a_vdis_shards",
        )],
    },
    Mutant {
        name: "a writer's record in other words is another's",
        file: "control/src/store/shards.rs",
        find: "writer_bytes = Some(self.require_writer(record.shard.vdi, writer)?);",
        put: "self.require_writer(record.shard.vdi, writer)?;",
        nets: &[Net::Tests(
            "weft-control",
            "--test etcd_rules",
            "a_writer_is_the_same_in_other_words",
        )],
    },
    Mutant {
        name: "a host that was just forgotten says that it is alive",
        file: "control/src/store/hosts.rs",
        find: "change.compares.push(host.unchanged(&key));",
        put: "",
        nets: &[Net::Tests(
            "weft-control",
            "--test etcd_rules",
            "a_host_that_is_alive_has_a_record",
        )],
    },
    Mutant {
        name: "a take-over is not noted",
        file: "control/src/store/vdis.rs",
        find: "put(&mut change, &since_key(id), &incarnation);",
        put: "",
        nets: &[CLUSTER],
    },
    // ---- control: records rebuilt from the disks ----
    Mutant {
        name: "a replica that has less is in sync after a recovery",
        file: "control/src/recover/merge.rs",
        find: ".filter(|(_, copy)| rank(copy) == furthest)",
        put: ".filter(|(_, copy)| rank(copy) <= furthest)",
        nets: &[Net::Tests(
            "weft-control",
            "--lib",
            "only_who_has_everything_that_anybody_has",
        )],
    },
    Mutant {
        name: "a recovery gives incarnations again",
        file: "control/src/recover/merge.rs",
        find: "Incarnation(highest.0.saturating_add(INCARNATIONS_SKIPPED))",
        put: "Incarnation(highest.0.saturating_sub(INCARNATIONS_SKIPPED))",
        nets: &[Net::Tests(
            "weft-control",
            "--lib",
            "what_agrees_comes_back_as_it_was",
        )],
    },
    Mutant {
        name: "what was deleted comes back with a disk that was away",
        file: "control/src/recover/merge.rs",
        find: "named.iter().any(has_seen_it_go)",
        put: "named.iter().all(has_seen_it_go)",
        nets: &[Net::Tests(
            "weft-control",
            "--lib",
            "what_was_deleted_does_not_come_back",
        )],
    },
    Mutant {
        name: "one of two replicas is enough for a recovery",
        file: "control/src/recover/merge.rs",
        find: "(_, in_sync) => in_sync == base.in_sync.len(),",
        put: "(_, in_sync) => in_sync >= base.fence_quorum(),",
        nets: &[Net::Tests(
            "weft-control",
            "--lib",
            "a_disk_that_is_not_there_is_asked_for",
        )],
    },
    Mutant {
        name: "a rebuilt shard has an epoch that was given before",
        file: "control/src/recover/merge.rs",
        find: "Epoch(epochs.max().unwrap_or(0) + EPOCHS_SKIPPED)",
        put: "Epoch(epochs.min().unwrap_or(0).min(EPOCHS_SKIPPED))",
        nets: &[Net::Tests(
            "weft-control",
            "--lib",
            "what_agrees_comes_back_as_it_was",
        )],
    },
    Mutant {
        name: "promises to writers that saved nothing are not looked at",
        file: "control/src/recover/merge.rs",
        find: "let highest = promised.chain(named).max()",
        put: "let highest = promised.take(0).chain(named).max()",
        nets: &[Net::Tests(
            "weft-control",
            "--lib",
            "what_agrees_comes_back_as_it_was",
        )],
    },
    Mutant {
        name: "where a lost past ended is believed after a recovery",
        file: "control/src/recover/merge.rs",
        find: "    record.ended.clear();\n",
        put: "",
        nets: &[Net::Tests(
            "weft-control",
            "--lib",
            "the_newest_record_decides_who_counts",
        )],
    },
    Mutant {
        name: "any record of a shard decides who counts",
        file: "control/src/recover/merge.rs",
        find: ".max_by_key(|copy| (copy.record.epoch, copy.record.saved_by))",
        put: ".min_by_key(|copy| (copy.record.epoch, copy.record.saved_by))",
        nets: &[Net::Tests(
            "weft-control",
            "--lib",
            "the_newest_record_decides_who_counts",
        )],
    },
    Mutant {
        name: "two records of one epoch are one",
        file: "control/src/recover/merge.rs",
        find: "copy.record.epoch == base.epoch && copy.record != *base",
        put: "copy.record.epoch > base.epoch && copy.record != *base",
        nets: &[Net::Tests(
            "weft-control",
            "--lib",
            "the_newest_record_decides_who_counts",
        )],
    },
    Mutant {
        name: "a lost disk takes no shard along",
        file: "control/src/recover/merge.rs",
        find: "rebuilt.unsure += usize::from(!asked.without.is_empty());",
        put: "rebuilt.unsure += usize::from(asked.without.len() > 9);",
        nets: &[Net::Tests(
            "weft-control",
            "--lib",
            "a_disk_that_is_not_there_is_asked_for",
        )],
    },
    Mutant {
        name: "what could not be read of a disk is not in the way",
        file: "control/src/recover/merge.rs",
        find: "for words in &disk.unreadable {",
        put: "for words in disk.unreadable.iter().skip(9) {",
        nets: &[Net::Tests(
            "weft-control",
            "--lib",
            "what_cannot_be_one_pool_is_refused",
        )],
    },
    Mutant {
        name: "what was there before stays beside what was rebuilt",
        file: "control/src/store/recovered.rs",
        find: "delete_prefixes: REPLACED.map(str::to_owned).to_vec(),",
        put: "delete_prefixes: REPLACED.map(str::to_owned)[..1].to_vec(),",
        nets: &[Net::Tests(
            "weft-control",
            "--lib",
            "what_agrees_comes_back_as_it_was",
        )],
    },
    Mutant {
        name: "numbers go back with what was rebuilt",
        file: "control/src/store/recovered.rs",
        find: "&recovery.incarnation.0.max(highest)",
        put: "&recovery.incarnation.0.max(highest & 0)",
        nets: &[Net::Tests(
            "weft-control",
            "--lib",
            "what_agrees_comes_back_as_it_was",
        )],
    },
    Mutant {
        name: "a note of another VDI is believed",
        file: "control/src/recover/notes.rs",
        find: "note.id == vdi\n",
        put: "(note.id == vdi || note.id != vdi)\n",
        nets: &[Net::Tests(
            "weft-control",
            "--lib",
            "notes_are_small_and_impossible_ones_are_refused",
        )],
    },
    Mutant {
        name: "a VDI's older size comes back",
        file: "control/src/recover/merge.rs",
        find: "*notes.iter().max_by_key(|note| note.revision)?",
        put: "*notes.iter().min_by_key(|note| note.revision)?",
        nets: &[Net::Tests(
            "weft-control",
            "--lib",
            "the_newest_record_decides_who_counts",
        )],
    },
    Mutant {
        name: "hidden characters are welcome in a path",
        file: "control/src/check.rs",
        find: "&& !text.chars().any(is_hidden)",
        put: "&& !text.is_empty()",
        nets: &[Net::Tests(
            "weft-control",
            "--test rest_hostile",
            "every_wrong_body_is_refused",
        )],
    },
    // ---- the daemon: real processes ----
    Mutant {
        name: "a disk that another pool formatted is formatted again",
        file: "blockd/src/daemon/disks.rs",
        find: "held.filter(|_| !request.force)",
        put: "held.filter(|_| false)",
        nets: &[Net::Tests(
            "weft-blockd",
            "--test moved",
            "a_disk_is_refused_by_name",
        )],
    },
    Mutant {
        name: "a carried disk is at home where it was",
        file: "blockd/src/daemon/disks.rs",
        find: "let record = DiskRecord {\n                    path: path.to_owned(),",
        put: "let record = DiskRecord {\n                    path: record.path.clone(),",
        nets: &[Net::Tests(
            "weft-blockd",
            "--test moved",
            "a_disk_goes_on_in_another",
        )],
    },
    Mutant {
        name: "a name may hold anything",
        file: "control/src/check.rs",
        find: "&& text.bytes().all(|b| is_alphanumeric(b) || b\"._-\".contains(&b));",
        put: ";",
        nets: &[Net::Tests("weft-blockd", "--test hostile", "wrong_rest_requests")],
    },
    Mutant {
        name: "a read-only export is written",
        file: "nbd/src/request.rs",
        find: "if session.info.is_read_only {\n            return Err(refuse(errno::EPERM",
        put: "if session.info.is_read_only && self.offset > u64::MAX / 2 {\n            return Err(refuse(errno::EPERM",
        nets: &[Net::Tests("weft-blockd", "--test hostile", "garbage_at_nbd")],
    },
];
