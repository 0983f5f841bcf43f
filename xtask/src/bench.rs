//! `cargo xtask bench`: Weft beside qemu-storage-daemon beside the bare file. Not part of `cargo xtask test`: figures of
//! a busy machine prove nothing, and a quiet one needs ten minutes.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::packages;
use crate::run::{cargo, output, root, run};

/// Builds everything optimised and runs `weft-bench` with `arguments`.
pub fn bench(quick: bool, arguments: &[String]) -> Result<()> {
    packages::install(packages::BUILD_AND_TEST)?;
    run(&mut cargo(&[
        "build",
        "--release",
        "--locked",
        "-p",
        "weft-blockd",
        "-p",
        "weft-cli",
        "-p",
        "weft-fio-tests",
    ]))?;
    let mut command = Command::new(release_directory()?.join("weft-bench"));
    if quick {
        command.arg("--quick");
    }
    run(command.args(arguments))
}

/// Where cargo puts release builds, whatever the environment and the configuration say.
fn release_directory() -> Result<PathBuf> {
    let text = output(&mut cargo(&["metadata", "--no-deps", "--format-version", "1"]))?;
    let metadata: serde_json::Value = serde_json::from_str(&text).context("cargo metadata")?;
    let target = metadata["target_directory"].as_str().map(Path::new);
    Ok(target
        .map_or_else(|| root().join("target"), Path::to_owned)
        .join("release"))
}
