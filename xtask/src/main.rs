//! `cargo xtask`: everything a developer or a newcomer runs, by one name each.

mod bench;
mod demo;
mod layers;
mod mutants;
mod packages;
mod run;
mod tests;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Weft's own tasks. Each installs the Debian packages it misses (as root, by apt-get).
#[derive(Parser)]
#[command(name = "cargo xtask", version, about)]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Everything that must hold before a change lands: lints, unit tests, simulator, real clients.
    Test {
        /// The soak as well: many more seeds, and every mutant; an hour or more.
        #[arg(long)]
        long: bool,
    },
    /// The main job on real input: pool, replicated VDI, a Debian guest, kills, noise, repair.
    Demo {
        /// Leave the daemon and the guest running at the end.
        #[arg(long)]
        keep: bool,
    },
    /// Weft's speed beside qemu-storage-daemon's and the bare file's, as docs/performance.md has it.
    Bench {
        /// A look in about a minute; no figures to publish.
        #[arg(long)]
        quick: bool,
        /// Passed on to `weft-bench`; see `cargo xtask bench -- --help`.
        #[arg(last = true)]
        arguments: Vec<String>,
    },
    /// Deliberate bugs in a copy of the tree, each of which a test must catch.
    Mutants {
        /// Only the one of this name.
        name: Option<String>,
    },
    /// Formatting, clippy with warnings denied, who may import whom, licences and sources of crates.
    Lint,
    /// Install the Debian packages that building and testing need.
    Install,
}

fn main() -> Result<()> {
    match Arguments::parse().task {
        Task::Test { long } => tests::test(long),
        Task::Demo { keep } => demo::demo(keep),
        Task::Bench { quick, arguments } => bench::bench(quick, &arguments),
        Task::Mutants { name } => mutants::mutants(name.as_deref()),
        Task::Lint => tests::lint(),
        Task::Install => packages::install(packages::BUILD_AND_TEST),
    }
}
