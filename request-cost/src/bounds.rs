//! The bounds: one line a workload, and the check that holds them.
//!
//! A change that makes a figure better lowers its bound in the same commit: a bound far above what is measured holds
//! nothing.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use store::StoreSettings;

/// Requests of the shorter run; the longer serves twice as many.
const REQUESTS: u64 = 1024;

/// What a guest does.
#[derive(Clone, Copy, Debug)]
pub struct Workload {
    pub name: &'static str,
    pub is_write: bool,
    /// Requests a turn.
    pub depth: u64,
    pub replicas: u64,
    /// A checkpoint of the index after this many bytes of log; none if `None`.
    pub checkpoint_bytes: Option<u64>,
}

impl Workload {
    pub fn settings(self) -> StoreSettings {
        StoreSettings {
            checkpoint_bytes: self.checkpoint_bytes.unwrap_or(u64::MAX),
            ..StoreSettings::default()
        }
    }
}

/// The most that one request of a workload may cost.
pub struct Bound {
    pub workload: Workload,
    /// Over every core and all replicas, the crc of its content included.
    instructions: u64,
    /// Per thousand requests.
    allocations_per_1000: u64,
}

const fn reads(name: &'static str, depth: u64, replicas: u64) -> Workload {
    Workload {
        name,
        is_write: false,
        depth,
        replicas,
        checkpoint_bytes: None,
    }
}

const fn writes(name: &'static str, depth: u64, replicas: u64) -> Workload {
    Workload {
        is_write: true,
        ..reads(name, depth, replicas)
    }
}

const fn bound(workload: Workload, instructions: u64, allocations_per_1000: u64) -> Bound {
    Bound {
        workload,
        instructions,
        allocations_per_1000,
    }
}

/// Measured, and a tenth more for instructions. With checkpoints: one for every thousand writes over 64 leaves, which is
/// what random writes over 16 GiB come to with the default settings.
pub const BOUNDS: &[Bound] = &[
    bound(reads("read-d1-r1", 1, 1), 10_100, 0),
    bound(reads("read-d32-r1", 32, 1), 9_150, 0),
    bound(reads("read-d32-r3", 32, 3), 9_400, 0),
    bound(writes("write-d1-r1", 1, 1), 14_600, 0),
    bound(writes("write-d32-r1", 32, 1), 9_600, 0),
    bound(writes("write-d1-r3", 1, 3), 34_700, 0),
    bound(writes("write-d32-r3", 32, 3), 19_650, 0),
    bound(
        Workload {
            checkpoint_bytes: Some(4 << 20),
            ..writes("write-d32-r1-checkpoints", 32, 1)
        },
        11_150,
        180,
    ),
];

/// Measures every workload, prints the table, and fails where a bound is passed.
pub fn check() -> Result<()> {
    println!(
        "{:<26} {:>22} {:>24} {:>8}",
        "per request", "instructions (bound)", "allocations (bound)", "bytes"
    );
    let mut faults = Vec::new();
    for bound in BOUNDS {
        let name = bound.workload.name;
        let measured = measure(bound.workload)?;
        println!(
            "{name:<26} {:>11} ({:>8}) {:>13.3} ({:>8.3}) {:>8.1}",
            measured.instructions,
            bound.instructions,
            measured.allocations as f64 / REQUESTS as f64,
            bound.allocations_per_1000 as f64 / 1000.0,
            measured.bytes as f64 / REQUESTS as f64,
        );
        if measured.instructions > bound.instructions {
            faults.push(format!(
                "{name}: {} instructions a request, the bound is {}; look with\n    callgrind_annotate {}",
                measured.instructions,
                bound.instructions,
                measured.profile.display()
            ));
        }
        if measured.allocations * 1000 > bound.allocations_per_1000 * REQUESTS {
            faults.push(format!(
                "{name}: {} allocations for {REQUESTS} requests, the bound is {} for 1000; look with\n    \
                 callgrind_annotate --tree=caller {} | grep -B 20 '\\* .*:malloc'",
                measured.allocations,
                bound.allocations_per_1000,
                measured.profile.display()
            ));
        }
    }
    ensure!(faults.is_empty(), "bounds passed:\n  {}", faults.join("\n  "));
    Ok(())
}

struct Measured {
    instructions: u64,
    allocations: u64,
    bytes: u64,
    /// Of the longer run.
    profile: PathBuf,
}

fn measure(workload: Workload) -> Result<Measured> {
    let folder = std::env::current_exe()?
        .parent()
        .context("a program is in a folder")?
        .join("callgrind");
    std::fs::create_dir_all(&folder)?;
    let [short, long] = [REQUESTS, 2 * REQUESTS].map(|requests| {
        let profile = folder.join(format!("{}.{requests}", workload.name));
        under_callgrind(workload.name, requests, &profile)
    });
    let (short, long) = (short?, long?);
    Ok(Measured {
        instructions: (long.instructions - short.instructions) / REQUESTS,
        allocations: long.allocations - short.allocations,
        bytes: long.bytes - short.bytes,
        profile: long.profile,
    })
}

/// Counts over the whole life of a program that serves `requests`.
fn under_callgrind(name: &str, requests: u64, profile: &Path) -> Result<Measured> {
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--quiet"])
        .arg(format!("--callgrind-out-file={}", profile.display()))
        .arg(std::env::current_exe()?)
        .args(["run", name, &requests.to_string()])
        .output()
        .context("valgrind does not start; `cargo xtask install` installs it")?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        bail!("{name}: {}{}", said, String::from_utf8_lossy(&output.stderr));
    }
    let words: Vec<&str> = said.split_whitespace().collect();
    let ["allocations", allocations, "bytes", bytes] = words[..] else {
        bail!("{name}: unexpected output: {said}");
    };
    let counts = std::fs::read_to_string(profile)?;
    let summary = counts.lines().find_map(|line| line.strip_prefix("summary: "));
    let summary = summary.with_context(|| format!("no summary in {}", profile.display()))?;
    Ok(Measured {
        instructions: summary.trim().parse()?,
        allocations: allocations.parse()?,
        bytes: bytes.parse()?,
        profile: profile.to_owned(),
    })
}
