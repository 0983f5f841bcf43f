//! `cargo xtask kills` and `cargo xtask soak`: `weft-soak` and the daemon it hurts, built as the tests are.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;

use anyhow::{Context, Result};
use clap::ValueEnum;

use crate::run::{cargo, output, root, run};
use crate::{demo, packages};

/// Under whose load blockd is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Client {
    /// A vhost-user frontend of ours that goes on as QEMU does.
    Vhost,
    /// The `blkio` crate's driver, connected anew after each kill.
    Blkio,
    /// An NBD client, connected anew after each kill.
    Nbd,
    /// fio in a Debian guest in QEMU.
    Guest,
}

/// Kills blockd so many times under load of `client`, or of each of them.
pub fn kills(client: Option<Client>, kills: u32, seed: Option<u64>) -> Result<()> {
    let seed = seed.unwrap_or_else(new_seed);
    let target = build()?;
    let (count, seed) = (kills.to_string(), seed.to_string());
    let all = [Client::Vhost, Client::Blkio, Client::Nbd, Client::Guest];
    for client in all
        .into_iter()
        .filter(|one| client.is_none_or(|only| only == *one))
    {
        let mut command = weft_soak(&target)?;
        if client == Client::Guest {
            let image = demo::image::ready()?;
            command.arg("guest").arg("--kernel").arg(&image.kernel);
            command.arg("--initramfs").arg(&image.initrd);
        } else {
            let name = client.to_possible_value().expect("no client is hidden");
            command.args(["kills", "--client", name.get_name()]);
        }
        run(command.args(["--kills", &count, "--seed", &seed]))?;
    }
    Ok(())
}

/// Walks at random for so long.
pub fn soak(minutes: f64, seed: Option<u64>, only: Option<&str>) -> Result<()> {
    let seed = seed.unwrap_or_else(new_seed).to_string();
    let target = build()?;
    let mut command = weft_soak(&target)?;
    command.args(["soak", "--minutes", &minutes.to_string(), "--seed", &seed]);
    run(command.args(only.iter().flat_map(|only| ["--only", only])))
}

/// Another one every time. Processes never run twice alike, so a seed fixed for good would repeat the order of events
/// and not what happens; new ones find more. `weft-soak` prints it first, and a failure says the command that takes it.
fn new_seed() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    now.map_or(1, |since| since.as_secs())
}

/// Returns cargo's target directory, whatever the environment and the configuration say.
fn build() -> Result<PathBuf> {
    packages::install(packages::BUILD_AND_TEST)?;
    let crates = ["-p", "weft-blockd", "-p", "weft-cli", "-p", "weft-soak"];
    run(cargo(&["build", "--locked", "--quiet"]).args(crates))?;
    let text = output(&mut cargo(&["metadata", "--no-deps", "--format-version", "1"]))?;
    let metadata: serde_json::Value = serde_json::from_str(&text).context("cargo metadata")?;
    let target = metadata["target_directory"].as_str().map(Path::new);
    Ok(target.map_or_else(|| root().join("target"), Path::to_owned))
}

fn weft_soak(target: &Path) -> Result<Command> {
    // Beside the build and not in /tmp: disks want a file system that takes direct I/O, and space.
    let folder = target.join("tmp");
    std::fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    let mut command = Command::new(target.join("debug/weft-soak"));
    command.arg("--folder").arg(folder);
    Ok(command)
}
