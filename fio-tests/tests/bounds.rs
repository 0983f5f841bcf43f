//! What one request of a guest costs the running daemon in system calls and allocations: bounds, not figures. Times
//! say little on a machine that others use; these counts hardly move.
//!
//! The instructions of the cores are bounded in `request-cost`.

use std::path::PathBuf;

use weft_fio_tests::client::{LoadClient, Next, Requests};
use weft_fio_tests::job::{Op, PAGE};
use weft_fio_tests::prepare::fully_written_file;
use weft_fio_tests::random::Random;
use weft_fio_tests::syscalls::Tracer;
use weft_fio_tests::weft::{Place, Weft};

const VDI_BYTES: u64 = 128 << 20;

/// Requests of a run, and those before it that fill caches and lists.
const COUNT: usize = 20_000;
const WARM: usize = 4_000;

/// Requests under strace, which is slow.
const TRACED: usize = 3_000;

/// Per request. Not quite 0: the index's checkpoints, Ticks and the question for the figures itself allocate too.
const ALLOCATIONS_MAX: f64 = 0.05;

struct Bound {
    name: &'static str,
    op: Op,
    depth: usize,
    /// Entering the ring.
    enters: f64,
    /// All system calls of all threads, under strace: every sleep is a sleep then, for the client is slow as well.
    calls: f64,
}

const BOUNDS: [Bound; 4] = [
    Bound {
        name: "read, depth 1",
        op: Op::Read,
        depth: 1,
        enters: 3.0,
        calls: 4.5,
    },
    Bound {
        name: "read, depth 32",
        op: Op::Read,
        depth: 32,
        enters: 0.4,
        calls: 0.7,
    },
    Bound {
        name: "write, depth 1",
        op: Op::Write,
        depth: 1,
        enters: 3.0,
        calls: 4.5,
    },
    Bound {
        name: "write, depth 32",
        op: Op::Write,
        depth: 32,
        enters: 0.2,
        calls: 0.3,
    },
];

/// `blockd` and `weft` as `cargo test --workspace` puts them: beside the folder of this test.
fn binaries() -> PathBuf {
    let test = std::env::current_exe().expect("this program");
    let folder = test.ancestors().nth(2).expect("target/PROFILE/deps/bounds");
    for name in ["blockd", "weft"] {
        assert!(
            folder.join(name).exists(),
            "{} is missing: cargo build -p weft-blockd -p weft-cli",
            folder.join(name).display()
        );
    }
    folder.to_owned()
}

fn load(client: &mut LoadClient, bound: &Bound, count: usize, seed: u64) {
    let requests = Requests {
        op: bound.op,
        block: PAGE,
        depth: bound.depth,
        end: VDI_BYTES,
    };
    let mut random = Random::new(seed);
    let offsets = (0..count).map(|_| random.below(VDI_BYTES / PAGE) * PAGE);
    client
        .drive(&requests, offsets, |_, _| Next::GoOn)
        .expect(bound.name);
}

#[test]
fn a_request_costs_few_system_calls_and_no_allocation() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let place = Place {
        files: folder.path().to_owned(),
        sockets: folder.path().to_owned(),
        binaries: binaries(),
    };
    let disk = folder.path().join("disk");
    fully_written_file(&disk, 1 << 30, 1).expect("a disk");
    let mut weft = Weft::start(&place, "bounds", None).expect("blockd");
    weft.weft(&["pool", "create", "bounds"]).expect("a pool");
    weft.weft(&["disk", "add", disk.to_str().expect("UTF-8")])
        .expect("a disk of the pool");
    let mut client = weft.make_vdi("bounds", VDI_BYTES, 1).expect("a VDI");
    let fill = (0..VDI_BYTES / PAGE).map(|block| block * PAGE);
    let requests = Requests {
        op: Op::Write,
        block: PAGE,
        depth: 32,
        end: VDI_BYTES,
    };
    client.drive(&requests, fill, |_, _| Next::GoOn).expect("filling");
    let mut over = Vec::new();
    for (bound, seed) in BOUNDS.iter().zip(1..) {
        load(&mut client, bound, WARM, seed);
        let before = weft.metrics().expect("metrics");
        load(&mut client, bound, COUNT, seed + 100);
        let after = weft.metrics().expect("metrics");
        let per_request = |name: &str| {
            let difference = after.get(name).expect(name) - before.get(name).expect(name);
            difference / COUNT as f64
        };
        let allocations = per_request("weft_plane_allocations_total");
        let enters = per_request("weft_plane_enters_total");
        let tracer = Tracer::attach(weft.pid(), &folder.path().join("strace.txt")).expect("strace");
        load(&mut client, bound, TRACED, seed + 200);
        let calls = tracer.detach().expect("strace's table");
        let total = calls.values().sum::<u64>() as f64 / TRACED as f64;
        println!(
            "{}: {enters:.2} enters, {allocations:.3} allocations, {total:.2} calls under strace",
            bound.name
        );
        for (what, value, most) in [
            ("enters", enters, bound.enters),
            ("allocations", allocations, ALLOCATIONS_MAX),
            ("system calls", total, bound.calls),
        ] {
            if value > most {
                over.push(format!(
                    "{}: {value:.3} {what}, at most {most}; {calls:?}",
                    bound.name
                ));
            }
        }
    }
    assert!(over.is_empty(), "per request:\n{}", over.join("\n"));
}
