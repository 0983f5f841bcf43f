//! Faults of a whole cluster, with real processes: three hosts in network namespaces, an etcd of three members, a
//! virtual disk written on each host under verified load; then one fault after the other of the table in `table.rs`.
//!
//! ```text
//!  bridge ──veth── host 0: blockd, disk, etcd member, guest of `vdi0`
//!     ├─────veth── host 1: ...
//!     └─────veth── host 2: ...
//! ```
//! Every answer a guest gets is held against the oracle of the soak (promises 1 to 4: each sector is a linearizable
//! register, whoever writes it). While a fault lasts, every guest that can be served must be; after it, everything is
//! whole again by itself, every guest reads its whole disk, and a scrub finds all replicas equal.
//!
//! Beside them is a guest that others wrote: Debian's kernel in QEMU, with files and fio (`debian.rs`). Emulation takes its
//! time, so where no faults are named it has its disks through the first few of them only.
//!
//! The namespaces are in one of the test's own, with its processes: whatever becomes of the test, nothing of it is
//! left. Where namespaces are not permitted the hosts are on addresses of loopback, and what needs more is left out,
//! and said.
//!
//! `WEFT_FAULTS=all`: every variant of every fault; `WEFT_FAULTS=name,name:variant`: these, in this order;
//! without it one variant of each. `WEFT_SEED=n` repeats an order and the variants (`cargo xtask faults`).

#[path = "../../../soak/src/client.rs"]
mod client;
mod debian;
mod etcd;
mod host;
mod hurt_clocks;
mod hurt_daemons;
mod hurt_disks;
mod hurt_etcd;
mod hurt_links;
mod hurt_names;
#[path = "../../../soak/src/initramfs.rs"]
mod initramfs;
#[allow(dead_code)] // What the soak does with resizes is not done here.
#[path = "../../../soak/src/load.rs"]
mod load;
#[path = "../../../soak/src/machine.rs"]
mod machine;
#[path = "../../../soak/src/nbd.rs"]
mod nbd;
mod network;
#[path = "../../../soak/src/oracle.rs"]
mod oracle;
mod paced;
#[path = "../../../soak/src/rest.rs"]
mod rest;
#[path = "../support/mod.rs"]
mod support;
mod table;
mod world;

use std::process::Command;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail, ensure};
use sim::Rng;

use debian::Boot;
use table::{FAULTS, Fault};
use world::World;

/// How long anything may take before it counts as hung. The machine may be slow, and others busy on it.
const PATIENCE: Duration = Duration::from_secs(180);

/// Between two looks at something that must come.
const RETRY: Duration = Duration::from_millis(20);

/// The wish of who names no faults: one variant of each.
const SHORT: &str = "short";

/// Then the guest in QEMU is there for so many of them.
const DEBIANS_FAULTS: usize = 3;

/// Set in the process that is inside of the namespaces: which kind of network it has.
const INSIDE: &str = "WEFT_FAULTS_INSIDE";
/// For that process: the program `weft`, built outside.
const WEFT: &str = "WEFT_FAULTS_WEFT";

#[test]
fn a_cluster_survives_every_fault_of_the_table() {
    let outcome = match std::env::var(INSIDE) {
        Ok(kind) => run(kind == "namespaces"),
        Err(_) => enter(),
    };
    if let Err(error) = outcome {
        panic!("{error:#}");
    }
}

/// Runs this test again as the first process of new namespaces, in which it may do what it likes.
fn enter() -> Result<()> {
    const PRIVATE: [&str; 6] = [
        "--net",
        "--mount",
        "--pid",
        "--fork",
        "--kill-child",
        "--mount-proc",
    ];
    let as_user = ["--user", "--map-root-user"];
    let ways: [&[&str]; 2] = [&[], &as_user];
    let mut command = Command::new("unshare");
    let mut kind = "namespaces";
    match ways.iter().find(|way| is_permitted(way, &PRIVATE)) {
        Some(way) => {
            command.args(*way).args(PRIVATE);
        }
        None => {
            println_through(
                "!!! network namespaces are not permitted here: the hosts are on loopback addresses, and faults of the network are LEFT OUT",
            );
            command = Command::new("setpriv");
            command.args(["--pdeathsig", "KILL"]);
            kind = "loopback";
        }
    }
    let seed = match std::env::var("WEFT_SEED") {
        Ok(seed) => seed,
        // Another one every time: processes never run twice alike, so a fixed one would only repeat the order.
        Err(_) => SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .map_or(1, |since| since.as_secs())
            .to_string(),
    };
    let status = command
        .arg("--")
        .arg(std::env::current_exe()?)
        .args([
            "a_cluster_survives_every_fault_of_the_table",
            "--exact",
            "--nocapture",
        ])
        .env(INSIDE, kind)
        .env(WEFT, weft_if_needed())
        .env("WEFT_SEED", &seed)
        .status()
        .context("unshare (Debian package util-linux)")?;
    ensure!(
        status.success(),
        "{status}; again: WEFT_SEED={seed} WEFT_FAULTS={} cargo test -p weft-blockd --test cluster_faults",
        wish()
    );
    Ok(())
}

/// It is built for this, so only where it is needed; the network inside is none that could bring crates.
fn weft_if_needed() -> std::path::PathBuf {
    let is_needed = match wish().as_str() {
        "all" | SHORT => true,
        names => names.contains("etcd-wiped"),
    };
    if is_needed {
        support::weft_program().to_owned()
    } else {
        std::path::PathBuf::new()
    }
}

fn wish() -> String {
    std::env::var("WEFT_FAULTS").unwrap_or_else(|_| SHORT.to_owned())
}

fn is_permitted(way: &[&str], private: &[&str]) -> bool {
    let tried = Command::new("unshare")
        .args(way)
        .args(private)
        .args([
            "sh",
            "-c",
            "mount -t tmpfs tmpfs /run && ip link add name weft0 type bridge",
        ])
        .output();
    tried.is_ok_and(|tried| tried.status.success())
}

/// Past the harness, which keeps what a test that succeeds says.
fn println_through(text: &str) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// One fault to come: which, and which of its variants.
type Chosen = (&'static Fault, usize);

fn run(has_namespaces: bool) -> Result<()> {
    let began = Instant::now();
    let seed: u64 = std::env::var("WEFT_SEED")?.parse().context("WEFT_SEED")?;
    let mut rng = Rng::new(seed);
    let chosen = choose(&wish(), &mut rng)?;
    println_through(&format!("{} faults, seed {seed}", chosen.len()));
    let boot = Boot::find();
    let mut world = World::start(has_namespaces, rng, boot.as_ref().ok())?;
    println_through(&format!("three hosts after {} s", began.elapsed().as_secs()));
    let mut left_out = Vec::new();
    for (number, (fault, variant)) in chosen.into_iter().enumerate() {
        if number == DEBIANS_FAULTS && wish() == SHORT {
            world.dismiss_debian()?;
        }
        if (fault.needs_namespaces && !has_namespaces) || (fault.needs_debian && world.debian.is_none()) {
            left_out.push(fault.name);
            continue;
        }
        let start = Instant::now();
        if let Err(error) = one(&mut world, fault, variant) {
            bail!(
                "fault {} (variant {variant}): {error:#}\n{}",
                fault.name,
                world.last_words()
            );
        }
        println_through(&format!(
            "{:>4} s  {} [{variant}]: {:.1} s",
            began.elapsed().as_secs(),
            fault.name,
            start.elapsed().as_secs_f32()
        ));
    }
    let summary = world.end()?;
    println_through(&format!("{summary} in {} s", began.elapsed().as_secs()));
    if !left_out.is_empty() {
        println_through(&format!(
            "!!! LEFT OUT for want of namespaces or of a guest in QEMU: {}",
            left_out.join(", ")
        ));
    }
    if let Err(reason) = boot {
        println_through(&format!(
            "!!! LEFT OUT: the guest in QEMU, and fio in it: {reason}"
        ));
    }
    Ok(())
}

/// The faults to come, in an order that is drawn unless they were named.
fn choose(wish: &str, rng: &mut Rng) -> Result<Vec<Chosen>> {
    let mut chosen: Vec<Chosen> = Vec::new();
    match wish {
        "all" => {
            for fault in FAULTS {
                chosen.extend((0..fault.variants).map(|variant| (fault, variant)));
            }
            rng.shuffle(&mut chosen);
        }
        SHORT => {
            let quick = FAULTS.iter().filter(|fault| !fault.needs_debian);
            chosen.extend(quick.map(|fault| (fault, rng.index(fault.variants))));
            rng.shuffle(&mut chosen);
            // While the guest in QEMU is there: its daemon dies as well, wherever it is.
            chosen.sort_by_key(|(fault, _)| fault.name != "kill-all");
        }
        names => {
            for name in names.split(',') {
                let (name, variant) = name.split_once(':').unwrap_or((name, ""));
                let fault = FAULTS.iter().find(|fault| fault.name == name);
                let fault = fault.with_context(|| {
                    let names: Vec<&str> = FAULTS.iter().map(|fault| fault.name).collect();
                    format!("no fault {name}; there are {}", names.join(", "))
                })?;
                let variants = match variant {
                    "" => 0..fault.variants,
                    number => number.parse().map(|number| number..number + 1)?,
                };
                chosen.extend(variants.map(|variant| (fault, variant)));
            }
        }
    }
    Ok(chosen)
}

/// A fault from beginning to end, and what must be so while it lasts and afterwards.
fn one(world: &mut World, fault: &Fault, variant: usize) -> Result<()> {
    (fault.strike)(world, variant).context("when it struck")?;
    world.goes_on().context("while it lasted")?;
    (fault.mend)(world, variant).context("when it was mended")?;
    world.heals().context("afterwards")
}
