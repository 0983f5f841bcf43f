//! SIGKILL under verified load: nothing completed is lost, nothing in between is invented.

mod support;

use std::collections::BTreeMap;

use support::{Daemon, NbdClient};

/// Deterministic numbers for offsets (splitmix64).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ x >> 31
    }
}

const BLOCK: usize = 4096;
const BLOCKS: u64 = 4096;

/// Content that names its block and version in every 16 bytes.
fn content(block: u64, version: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(BLOCK);
    while bytes.len() < BLOCK {
        bytes.extend(block.to_le_bytes());
        bytes.extend(version.to_le_bytes());
    }
    bytes
}

/// What each block may hold: the version completed last, and those sent since.
#[derive(Default)]
struct Oracle {
    completed: BTreeMap<u64, u64>,
    sent: BTreeMap<u64, Vec<u64>>,
    next_version: u64,
}

impl Oracle {
    fn send(&mut self, block: u64) -> u64 {
        self.next_version += 1;
        self.sent.entry(block).or_default().push(self.next_version);
        self.next_version
    }

    fn complete(&mut self, block: u64, version: u64) {
        self.completed.insert(block, version);
        self.sent.entry(block).or_default().retain(|sent| *sent > version);
    }

    /// After a crash each block has one of the values allowed, and that one is now settled.
    fn check(&mut self, client: &mut NbdClient) {
        for block in 0..BLOCKS {
            let found = client.read(block * BLOCK as u64, BLOCK as u32).expect("read");
            let completed = self.completed.get(&block).copied().unwrap_or(0);
            let version = u64::from_le_bytes(found[8..16].try_into().expect("8 bytes"));
            let sent = self.sent.remove(&block).unwrap_or_default();
            assert!(
                version == completed || sent.contains(&version),
                "block {block} has version {version}, completed was {completed}, sent since {sent:?}"
            );
            let whole = if version == 0 {
                vec![0; BLOCK]
            } else {
                content(block, version)
            };
            assert!(found == whole, "block {block} version {version} is torn");
            self.completed.insert(block, version);
        }
    }
}

/// What becomes of the daemon's records when it was killed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Records {
    Stay,
    /// They are rebuilt from the disks.
    AreLost,
}

fn load_and_kill(replicas: u8, kills: u32, records: Records, arguments: &[&str]) {
    let mut daemon = Daemon::with_disks(usize::from(replicas), arguments);
    daemon.create_vdi("load", BLOCKS * BLOCK as u64, replicas);
    let socket = daemon.attach_nbd("load");
    let mut numbers = Numbers(u64::from(replicas));
    let mut oracle = Oracle::default();
    for _ in 0..kills {
        let mut client = NbdClient::connect(&socket).expect("connect");
        let writes = 200 + numbers.next() % 2000;
        let mut under_way: BTreeMap<u64, u64> = BTreeMap::new(); // version → block
        for _ in 0..writes {
            while under_way.len() >= 32 {
                let (version, error) = client.receive().expect("reply");
                assert_eq!(error, 0);
                let block = under_way.remove(&version).expect("a version that was sent");
                oracle.complete(block, version);
            }
            let block = numbers.next() % BLOCKS;
            if under_way.values().any(|other| *other == block) {
                continue; // Two versions of a block at once may complete in either order.
            }
            let version = oracle.send(block);
            client
                .send(
                    support::WRITE,
                    version,
                    block * BLOCK as u64,
                    BLOCK as u32,
                    &content(block, version),
                )
                .expect("send");
            under_way.insert(version, block);
        }
        daemon.kill();
        if records == Records::AreLost {
            daemon.lose_state();
            let recovered = daemon.recover(usize::from(replicas), &["--yes"]);
            assert_eq!(recovered.code, 0, "{recovered:?}");
        }
        daemon.start_again();
        if records == Records::AreLost {
            daemon.attach_nbd("load");
        }
        let mut client = NbdClient::connect(&socket).expect("connect");
        oracle.check(&mut client);
    }
    daemon.until_health("load", "whole");
}

#[test]
fn one_replica() {
    load_and_kill(1, 6, Records::Stay, &[]);
}

#[test]
fn three_replicas() {
    load_and_kill(3, 6, Records::Stay, &[]);
}

#[test]
fn three_replicas_on_two_planes() {
    load_and_kill(3, 4, Records::Stay, &["--cores", "2"]);
}

#[test]
fn one_replica_whose_record_is_lost() {
    load_and_kill(1, 2, Records::AreLost, &[]);
}

#[test]
fn two_replicas_whose_records_are_lost() {
    load_and_kill(2, 3, Records::AreLost, &[]);
}

#[test]
fn three_replicas_whose_records_are_lost() {
    load_and_kill(3, 3, Records::AreLost, &[]);
}

/// The daemon dies while replicas move: single ones are on two disks then, of others the move is known to nobody.
#[test]
fn a_drain_goes_on_after_a_kill() {
    const DATA: u64 = 48 << 20;
    let mut daemon = Daemon::with_disks(2, &[]);
    for (name, replicas) in [("single", 1), ("double", 2)] {
        daemon.create_vdi(name, DATA, replicas);
        let mut client = NbdClient::connect(&daemon.attach_nbd(name)).expect("connect");
        for at in (0..DATA).step_by(1 << 20) {
            client
                .write(at, &vec![1 + (at >> 20) as u8; 1 << 20])
                .expect("write");
        }
    }
    let shown = daemon.get("/v1/vdis/single");
    let leaving = shown["disks"][0]["disk"]
        .as_str()
        .expect("where it is")
        .to_owned();
    daemon.add_disk(3);
    let (code, answer) = daemon.call("DELETE", &format!("/v1/disks/{leaving}"), None);
    assert_eq!(code, 200, "{answer}");
    for _ in 0..3 {
        daemon.kill();
        daemon.start_again();
    }
    daemon.until("the disk has left", |daemon| {
        let disks = daemon.get("/v1/disks");
        disks
            .as_array()
            .expect("a list")
            .iter()
            .all(|disk| disk["id"] != leaving.as_str())
    });
    for name in ["single", "double"] {
        daemon.until_health(name, "whole");
        let shown = daemon.get(&format!("/v1/vdis/{name}"));
        let placed: u64 = shown["disks"]
            .as_array()
            .expect("disks")
            .iter()
            .filter_map(|disk| disk["replicas"].as_u64())
            .sum();
        assert_eq!(placed, shown["replicas"].as_u64().expect("replicas"), "{shown}");
        let mut client = NbdClient::connect(&daemon.path(&format!("{name}.nbd"))).expect("connect");
        for at in (0..DATA).step_by(1 << 20) {
            let data = client.read(at, 1 << 20).expect("read");
            assert!(
                data.iter().all(|byte| *byte == 1 + (at >> 20) as u8),
                "{name} at {at}"
            );
        }
    }
}
