//! `cargo xtask fuzz`: builds the targets of `fuzz/` for libFuzzer, and runs them one after the other.
//!
//! `cargo fuzz run TARGET` works as well where it is installed (`--features libfuzzer`). Here it is not needed, nor a
//! nightly compiler: coverage is a flag of the stable one.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::run::{cargo, output, root, run};

/// What libFuzzer is guided by: edges, and the constants that are compared with.
const COVERAGE: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares --cfg fuzzing";

/// An input that takes longer is a fault: every reader here is done in microseconds.
const SECONDS_PER_INPUT: u32 = 10;
/// A reader that can be made to take this much memory is a fault.
const MEMORY_MIB: u32 = 1024;

/// Runs one target, or all, for `seconds` each. New inputs that reach new code go to `target/fuzz-corpus`; an input
/// that fails is shown and kept in `fuzz/corpus`, where `cargo test` meets it from then on.
pub fn fuzz(target: Option<&str>, seconds: u64) -> Result<()> {
    let names = names()?;
    let chosen: Vec<&String> = names
        .iter()
        .filter(|name| target.is_none_or(|target| target == *name))
        .collect();
    if chosen.is_empty() {
        bail!("no such target; there are {}", names.join(", "));
    }
    let programs = build()?;
    for name in chosen {
        attack(&programs, name, seconds)?;
    }
    Ok(())
}

/// The targets, as the manifest lists them.
fn names() -> Result<Vec<String>> {
    let manifest = fs::read_to_string(root().join("fuzz/Cargo.toml")).context("fuzz/Cargo.toml")?;
    let programs = manifest.split("[[bin]]").skip(1);
    let name = |text: &str| text.split('"').nth(1).map(str::to_owned);
    programs
        .map(|text| name(text).context("a target without a name"))
        .collect()
}

/// Builds all targets; the folder they are in. Naming the platform keeps the flags from build scripts and macros.
fn build() -> Result<std::path::PathBuf> {
    let version = output(Command::new("rustc").arg("-vV"))?;
    let host = version
        .lines()
        .find_map(|line| line.strip_prefix("host: "))
        .context("rustc does not say its host")?;
    let mut command = cargo(&[
        "build",
        "--quiet",
        "--package",
        "weft-fuzz",
        "--features",
        "libfuzzer",
        "--bins",
    ]);
    command.args(["--profile", "fuzz", "--locked", "--target", host]);
    run(command.env("RUSTFLAGS", COVERAGE))?;
    Ok(target_folder().join(host).join("fuzz"))
}

fn target_folder() -> std::path::PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), Into::into)
}

fn attack(programs: &Path, name: &str, seconds: u64) -> Result<()> {
    let kept = root().join("fuzz/corpus").join(name);
    let found = target_folder().join("fuzz-corpus").join(name);
    fs::create_dir_all(&found)?;
    let mut command = Command::new(programs.join(name));
    command
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-timeout={SECONDS_PER_INPUT}"))
        .arg(format!("-rss_limit_mb={MEMORY_MIB}"))
        .arg(format!("-artifact_prefix={}/", kept.display()))
        .args(["-print_final_stats=1", "-use_value_profile=1", "-verbosity=1"])
        .args([&found, &kept])
        .current_dir(root());
    run(&mut command).with_context(|| format!("target {name}: the input is in fuzz/corpus/{name}"))
}
