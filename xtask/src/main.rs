//! `cargo xtask`: everything a developer or a newcomer runs, by one name each.

mod bench;
mod demo;
mod fuzz;
mod layers;
mod mutants;
mod packages;
mod run;
mod soak;
mod tests;

use anyhow::Result;
use clap::{Parser, Subcommand};
use mutants::Choice;

/// Weft's own tasks. Each installs the Debian packages it misses (as root, by apt-get).
#[derive(Parser)]
#[command(name = "cargo xtask", version, about)]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Everything that must hold before a change lands: lints, unit tests, simulator, real clients, kills, five
    /// minutes of the soak.
    Test {
        /// Twenty times the seeds, ten times the kills, every mutant, and hours of the soak.
        #[arg(long)]
        long: bool,
        /// How long the soak of `--long` is.
        #[arg(long, default_value_t = 4.0, requires = "long")]
        hours: f64,
    },
    /// blockd killed (SIGKILL) again and again under verified load.
    Kills {
        /// Under whose load; each of them if not given.
        #[arg(long)]
        client: Option<soak::Client>,
        /// How often, for each.
        #[arg(long, default_value_t = 50)]
        kills: u32,
        /// Decides what is asked and when is killed; another one every time if not given.
        #[arg(long)]
        seed: Option<u64>,
    },
    /// The table of faults of a whole cluster, with real processes in network namespaces.
    Faults {
        /// `all`: every variant of each; or names, `NAME` or `NAME:VARIANT`; one variant of each if not given.
        names: Vec<String>,
        /// Decides their order and the variants; another one every time if not given.
        #[arg(long)]
        seed: Option<u64>,
    },
    /// A random walk over all that can happen to a daemon and its disks, under verified load.
    Soak {
        /// How long.
        #[arg(long, default_value_t = 5.0)]
        minutes: f64,
        /// Decides what happens and when; another one every time if not given.
        #[arg(long)]
        seed: Option<u64>,
        /// Nothing but this kind of event, again and again.
        #[arg(long)]
        only: Option<String>,
    },
    /// The main job on real input: three hosts, a replicated VDI, a Debian guest; hosts die, a link is cut, etcd loses
    /// its leader, the guest's own host dies.
    Demo {
        /// Leave the cluster and the guest running at the end, until Ctrl-C.
        #[arg(long)]
        keep: bool,
        /// Hosts on loopback addresses, as where network namespaces are not allowed.
        #[arg(long)]
        loopback: bool,
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
        /// Only those with one of these words in their name, their file or the name of the net.
        words: Vec<String>,
        /// Only the few of every `cargo xtask test`.
        #[arg(long)]
        few: bool,
    },
    /// Arbitrary bytes to everything that reads bytes of unknown origin, by libFuzzer; keeps what reaches new code.
    Fuzz {
        /// Only this target; all of them otherwise. `fuzz/Cargo.toml` names them.
        target: Option<String>,
        /// How long each.
        #[arg(long, default_value_t = 60)]
        seconds: u64,
    },
    /// Formatting, clippy with warnings denied, who may import whom, licences and sources of crates.
    Lint,
    /// Install the Debian packages that building and testing need.
    Install,
}

fn main() -> Result<()> {
    match Arguments::parse().task {
        Task::Test { long, hours } => tests::test(long.then_some(hours)),
        Task::Kills { client, kills, seed } => soak::kills(client, kills, seed),
        Task::Faults { names, seed } => tests::faults(&names, seed),
        Task::Soak { minutes, seed, only } => soak::soak(minutes, seed, only.as_deref()),
        Task::Demo { keep, loopback } => demo::demo(keep, loopback),
        Task::Bench { quick, arguments } => bench::bench(quick, &arguments),
        Task::Mutants { words, few } => mutants::mutants(&Choice { words, few }),
        Task::Fuzz { target, seconds } => fuzz::fuzz(target.as_deref(), seconds),
        Task::Lint => tests::lint(),
        Task::Install => packages::install(packages::BUILD_AND_TEST),
    }
}
