//! `cargo xtask test` and `cargo xtask lint`.

use std::process::Command;

use anyhow::Result;

use crate::demo;
use crate::fuzz;
use crate::layers;
use crate::mutants::{self, Choice};
use crate::packages;
use crate::run::{cargo, output, run};
use crate::soak;

/// What each fuzz target gets in the long run; without it, `cargo test` replays their corpus.
const FUZZ_SECONDS: u64 = 120;

/// Of the soak without `--long`: every kind of event comes several times.
const SOAK_MINUTES: f64 = 5.0;

/// Everything that must hold before a change lands; with `long_hours` so many hours of the soak instead of its five
/// minutes, and more of all that is random.
pub fn test(long_hours: Option<f64>) -> Result<()> {
    packages::install(packages::BUILD_AND_TEST)?;
    lint()?;
    run(with_guest(&mut cargo(&[
        "test",
        "--workspace",
        "--locked",
        "--quiet",
    ]))?)?;
    request_cost()?;
    let is_long = long_hours.is_some();
    search()?;
    simulate(if is_long { 20_000 } else { 1_000 })?;
    soak::kills(None, if is_long { 50 } else { 5 }, None)?;
    mutants::mutants(&Choice {
        words: Vec::new(),
        few: !is_long,
    })?;
    if is_long {
        fuzz::fuzz(None, FUZZ_SECONDS)?;
        faults(&["all".to_owned()], None)?;
    }
    soak::soak(long_hours.map_or(SOAK_MINUTES, |hours| hours * 60.0), None, None)
}

/// Faults of a whole cluster; `cargo test` has one variant of each already. Without names, the same.
pub fn faults(names: &[String], seed: Option<u64>) -> Result<()> {
    packages::install(packages::BUILD_AND_TEST)?;
    let mut command = cargo(&[
        "test",
        "--package",
        "weft-blockd",
        "--test",
        "cluster_faults",
        "--locked",
    ]);
    if !names.is_empty() {
        command.env("WEFT_FAULTS", names.join(","));
    }
    if let Some(seed) = seed {
        command.env("WEFT_SEED", seed.to_string());
    }
    run(with_guest(&mut command)?.args(["--", "a_cluster_survives"]))
}

/// What the guest in QEMU of `cluster_faults` boots from goes into the environment.
fn with_guest(command: &mut Command) -> Result<&mut Command> {
    let image = demo::image::ready()?;
    command.env("WEFT_GUEST_KERNEL", image.kernel);
    Ok(command.env("WEFT_GUEST_INITRAMFS", image.initrd))
}

/// Formatting, clippy, layers, licences.
pub fn lint() -> Result<()> {
    packages::install(packages::BUILD_AND_TEST)?;
    run(&mut cargo(&["fmt", "--all", "--check"]))?;
    layers::check()?;
    layers::check_unsafe()?;
    run(&mut cargo(&[
        "clippy",
        "--workspace",
        "--all-targets",
        "--locked",
        "--quiet",
        "--",
        "-D",
        "warnings",
    ]))?;
    install_cargo_deny()?;
    // What is judged offline includes crates of other platforms, which no build here has brought.
    run(&mut cargo(&["fetch", "--locked", "--quiet"]))?;
    run(&mut cargo(&[
        "deny",
        "--offline",
        "--log-level",
        "error",
        "check",
        "bans",
        "licenses",
        "sources",
    ]))
}

/// Instructions and allocations of a request, in the daemon's profile.
fn request_cost() -> Result<()> {
    run(&mut cargo(&[
        "run",
        "--release",
        "--quiet",
        "--locked",
        "--package",
        "weft-request-cost",
        "--",
        "check",
    ]))
}

/// Every state of the small worlds of `replication-model`.
fn search() -> Result<()> {
    run(&mut cargo(&[
        "run",
        "--quiet",
        "--locked",
        "--package",
        "weft-replication-model",
    ]))
}

/// The first seeds of every simulated world; a full disk spends most of its time waiting, so it gets fewer.
fn simulate(seeds: u32) -> Result<()> {
    for (world, seeds) in [
        ("store", seeds),
        ("store-full", seeds),
        ("vdi", seeds),
        ("cluster", 2 * seeds),
    ] {
        let range = format!("0..{seeds}");
        run(&mut cargo(&[
            "run",
            "--quiet",
            "--package",
            "weft-sim",
            "--",
            world,
            "--seeds",
            &range,
        ]))?;
    }
    Ok(())
}

fn install_cargo_deny() -> Result<()> {
    if output(&mut cargo(&["deny", "--version"])).is_ok() {
        return Ok(());
    }
    run(&mut cargo(&[
        "install",
        "cargo-deny",
        "--locked",
        "--version",
        "^0.20",
        "--quiet",
    ]))
}
