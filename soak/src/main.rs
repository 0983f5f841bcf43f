//! `weft-soak`: verified load on a real blockd that is killed, starved and hurt. `cargo xtask kills` and
//! `cargo xtask soak` build and run it.

mod blkio_client;
mod client;
mod daemon;
mod guest;
mod hurt;
mod initramfs;
mod kills;
mod load;
mod machine;
mod machine_kills;
mod nbd;
mod oracle;
mod rest;
mod walk;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use kills::ClientKind;

/// How long anything may take before it counts as hung.
const PATIENCE: Duration = Duration::from_secs(120);

/// Between two tries to connect.
const RETRY: Duration = Duration::from_millis(5);

const MIB: u64 = 1 << 20;

/// Verified load on a real blockd that is killed, starved and hurt.
#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    task: Task,
    /// The daemon; by default the one beside this program.
    #[arg(long, global = true)]
    blockd: Option<PathBuf>,
    /// State and disks go into a folder of their own below this one; kept when something is wrong.
    #[arg(long, global = true, default_value = "/var/tmp")]
    folder: PathBuf,
}

#[derive(Subcommand)]
enum Task {
    /// SIGKILL again and again.
    Kills {
        /// Who writes, reads and verifies; all of them if not given.
        #[arg(long)]
        client: Option<ClientKind>,
        /// How often, for each of them.
        #[arg(long, default_value_t = 50)]
        kills: u32,
        /// Decides what is asked and when is killed.
        #[arg(long, default_value_t = 1)]
        seed: u64,
    },
    /// One random walk over everything that can happen, under verified load.
    Soak {
        /// How long.
        #[arg(long, default_value_t = 5.0)]
        minutes: f64,
        /// Decides what happens and when.
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// Nothing but this happens, again and again.
        #[arg(long, value_parser = walk::names())]
        only: Option<String>,
    },
    /// SIGKILL again and again under fio in a QEMU guest; then its disk grows, a pool disk gets noise, one fails.
    Guest {
        /// How often.
        #[arg(long, default_value_t = 50)]
        kills: u32,
        /// Decides when is killed.
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// A Debian kernel with its modules in `--initramfs`.
        #[arg(long)]
        kernel: PathBuf,
        /// That kernel's own initramfs.
        #[arg(long)]
        initramfs: PathBuf,
    },
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let blockd = match &arguments.blockd {
        Some(path) => path.clone(),
        None => std::env::current_exe()?.with_file_name("blockd"),
    };
    match arguments.task {
        Task::Kills { client, kills, seed } => {
            let all = [ClientKind::Vhost, ClientKind::Blkio, ClientKind::Nbd];
            for client in all
                .into_iter()
                .filter(|kind| client.is_none_or(|only| only == *kind))
            {
                let rerun = format!("kills --client {} --kills {kills} --seed {seed}", name_of(client));
                println!("== {rerun}");
                in_a_folder(&arguments.folder, &rerun, |home| {
                    kills::run(&blockd, home, client, kills, seed)
                })?;
            }
            Ok(())
        }
        Task::Soak { minutes, seed, only } => {
            let weft = blockd.with_file_name("weft");
            let programs = walk::Programs {
                blockd: &blockd,
                weft: &weft,
            };
            let mut rerun = format!("soak --minutes {minutes} --seed {seed}");
            if let Some(only) = &only {
                rerun += &format!(" --only {only}");
            }
            println!("== {rerun}");
            in_a_folder(&arguments.folder, &rerun, |home| {
                let length = Duration::from_secs_f64(minutes * 60.0);
                walk::run(&programs, home, length, seed, only.as_deref())
            })
        }
        Task::Guest {
            kills,
            seed,
            kernel,
            initramfs,
        } => {
            let boot = machine_kills::Boot {
                kernel: &kernel,
                initramfs: &initramfs,
            };
            let rerun = format!("kills --client guest --kills {kills} --seed {seed}");
            println!("== {rerun}");
            in_a_folder(&arguments.folder, &rerun, |home| {
                machine_kills::run(&blockd, home, &boot, kills, seed)
            })
        }
    }
}

fn name_of(client: ClientKind) -> String {
    clap::ValueEnum::to_possible_value(&client).map_or_else(String::new, |value| value.get_name().to_owned())
}

/// Runs `action` in a folder of its own; a failure keeps it and says how to repeat the run.
fn in_a_folder(parent: &Path, rerun: &str, action: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let home = parent.join(format!("weft-soak-{}", std::process::id()));
    std::fs::create_dir_all(&home).with_context(|| format!("cannot make {}", home.display()))?;
    action(&home).with_context(|| {
        format!(
            "state, disks and log are kept in {}\nrepeat it with: cargo xtask {rerun}",
            home.display()
        )
    })?;
    std::fs::remove_dir_all(&home).with_context(|| format!("cannot remove {}", home.display()))
}
