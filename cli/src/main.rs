//! `weft`: the command line of a pool. One file a noun; each command is one or two requests to the daemon and a
//! table of the answer. Only `disk inspect`, `disk fsck`, `pool export` and `pool recover` open disks
//! themselves.

mod backup;
mod client;
mod disk;
mod failure;
mod host;
mod offline;
mod output;
mod pool;
mod recover;
mod scrub;
mod snapshot;
mod status;
mod vdi;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser, Subcommand};

use client::Client;
use failure::{Failure, Outcome};

const AFTER_HELP: &str = "\
Examples:
  weft pool create main
  weft disk add /dev/sdb
  weft vdi create web01 --size 20GiB --replicas 3
  weft vdi attach web01 --vhost-user /run/weft/web01.sock
  weft status

Sizes are numbers with a unit: 512MiB, 20GiB, 1.5TiB. A number alone is bytes.

Exit codes:
  0  done
  1  failed
  2  the command line is wrong, or the daemon found the request invalid
  3  the daemon cannot be reached
  4  what was named does not exist
  5  refused: the present state forbids it, or it needs --force or --yes";

/// Pools local disks into replicated virtual disks.
#[derive(Debug, Parser)]
#[command(name = "weft", version, after_help = AFTER_HELP, max_term_width = 100)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// What every command takes.
#[derive(Debug, clap::Args)]
struct Global {
    /// The daemon's socket [default: /run/weft/blockd.sock, then /var/lib/weft/blockd.sock]
    #[arg(long, global = true, value_name = "PATH", env = "WEFT_SOCKET")]
    socket: Option<PathBuf>,
    /// Print JSON instead of tables
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Create the pool, or show it
    #[command(subcommand)]
    Pool(pool::PoolCommand),
    /// List and show the hosts of the cluster
    #[command(subcommand)]
    Host(host::HostCommand),
    /// Add, list, replace, remove, inspect and check disks
    #[command(subcommand)]
    Disk(disk::DiskCommand),
    /// Create, list, show, resize, delete, attach and detach virtual disks
    #[command(subcommand)]
    Vdi(vdi::VdiCommand),
    /// Create, list, delete, protect snapshots of virtual disks, and go back to them
    #[command(subcommand)]
    Snapshot(snapshot::SnapshotCommand),
    /// Read and verify all data, and repair what is bad
    Scrub(scrub::ScrubArgs),
    /// Back up disks to a directory or a bucket, and restore them
    #[command(subcommand)]
    Backup(backup::BackupCommand),
    /// Show everything at a glance
    Status(status::StatusArgs),
    /// Show the versions of this command and of the daemon
    #[command(after_help = "Example:\n  weft version --json")]
    Version,
    /// Print a completion script for a shell
    #[command(after_help = "Example:\n  weft completions bash > /etc/bash_completion.d/weft")]
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
}

fn main() -> ExitCode {
    // Rust ignores SIGPIPE; output.rs ends quietly when the reader of our output has gone.
    let words: Vec<OsString> = std::env::args_os().collect();
    let outcome = match Cli::try_parse_from(&words) {
        Ok(cli) => run(cli),
        Err(error) => Err(usage(&error, &words)),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("weft: {failure}");
            ExitCode::from(failure.exit as u8)
        }
    }
}

/// What clap says of a wrong command line, in one line as every other failure. Help that was asked for is shown.
fn usage(error: &clap::Error, words: &[OsString]) -> Failure {
    if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        error.exit();
    }
    let mut command = &Cli::command();
    let mut path = "weft".to_owned();
    for word in words.iter().skip(1).filter_map(|word| word.to_str()) {
        if let Some(inner) = command.find_subcommand(word) {
            command = inner;
            path = format!("{path} {word}");
        }
    }
    let hint = format!("see `{path} --help`");
    if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        let names: Vec<&str> = command.get_subcommands().map(clap::Command::get_name).collect();
        return Failure::usage(format!("'{path}' needs a command: {}", names.join(", ")), hint);
    }
    let text = error.render().to_string();
    let said = text
        .lines()
        .take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more"));
    let said: Vec<&str> = said.collect();
    Failure::usage(said.join(" ").trim_start_matches("error: "), hint)
}

fn run(cli: Cli) -> Outcome<()> {
    let Global { socket, json } = cli.global;
    if let Command::Backup(command) = cli.command {
        return backup::run(command, json);
    }
    let offline = match &cli.command {
        Command::Disk(command) => disk::run_offline(command, json),
        Command::Pool(command) => pool::run_offline(command, json),
        _ => None,
    };
    if let Some(outcome) = offline {
        return outcome;
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::failed(format!("cannot start: {error}"), ""))?;
    let client = Client::new(socket, json);
    runtime.block_on(async {
        match cli.command {
            Command::Pool(command) => pool::run(&client, command).await,
            Command::Host(command) => host::run(&client, &command).await,
            Command::Disk(command) => disk::run(&client, command).await,
            Command::Vdi(command) => vdi::run(&client, command).await,
            Command::Snapshot(command) => snapshot::run(&client, command).await,
            Command::Scrub(args) => scrub::run(&client, args).await,
            Command::Backup(_) => unreachable!("done above"),
            Command::Status(args) => status::run(&client, &args).await,
            Command::Version => status::version(&client).await,
            Command::Completions { shell } => {
                let mut script = Vec::new();
                clap_complete::generate(shell, &mut Cli::command(), "weft", &mut script);
                output::print(&String::from_utf8_lossy(&script));
                Ok(())
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_shows_an_example() {
        fn check(command: &clap::Command, path: &str) {
            let path = format!("{path} {}", command.get_name());
            let mut leaves = command
                .get_subcommands()
                .filter(|c| c.get_name() != "help")
                .peekable();
            if leaves.peek().is_none() {
                let help = command
                    .get_after_help()
                    .map(ToString::to_string)
                    .unwrap_or_default();
                assert!(help.contains("weft "), "{path} has no example: {help:?}");
                for line in help.lines().filter_map(|line| line.trim().strip_prefix("weft ")) {
                    let words = line.split_whitespace().take_while(|w| !["|", ">"].contains(w));
                    let words = std::iter::once("weft").chain(words);
                    Cli::try_parse_from(words).unwrap_or_else(|e| panic!("{path}: 'weft {line}': {e}"));
                }
            }
            leaves.for_each(|leaf| check(leaf, &path));
        }
        check(&Cli::command(), "");
    }

    #[test]
    fn command_lines_parse_or_are_refused() {
        let accepted = [
            "pool create main",
            "pool export /dev/sdb /dev/sdc --state /srv/weft",
            "pool recover /dev/sdb --yes --without 3f2a77c1-0d1e-4c55-9d5e-2b8f0a4c9e01",
            "pool recover host1.json host2.json --etcd http://a:2379,http://b:2379 --accept-lost",
            "--json pool status",
            "disk add /dev/sdb --zone rack1 --force --yes",
            "disk add disks/a.img --size 10GiB",
            "disk list --json --socket /tmp/s",
            "vdi create web01 --size 20GiB --replicas 2 --sector 4096 --shard-size 512MiB",
            "vdi attach web01 --vhost-user /run/weft/web01.sock --queues 4",
            "vdi attach web01 --nbd tcp:127.0.0.1:10809 --read-only",
            "vdi attach web01@before --nbd tcp:127.0.0.1:10809",
            "vdi detach web01",
            "snapshot create web01@before --with web02 web03",
            "snapshot delete web01@a web01@b --yes",
            "snapshot rollback web01@a --keep b --force",
            "scrub --vdi web01 --wait",
            "status",
        ];
        for line in accepted {
            let words = std::iter::once("weft").chain(line.split(' '));
            assert!(Cli::try_parse_from(words).is_ok(), "{line}");
        }
        let refused = [
            "",
            "pool",
            "pool create",
            "pool export",
            "pool recover",
            "pool recover /dev/sdb --without sdc",
            "pool recover /dev/sdb --etcd-user root",
            "vdi create web01",
            "vdi create web01 --size 20Gigs",
            "vdi create web01 --size 1GiB --replicas 4",
            "vdi create web01 --size 1GiB --sector 1024",
            "vdi attach web01",
            "vdi attach web01 --vhost-user /a --nbd unix:/b",
            "vdi attach web01 --nbd 127.0.0.1:10809",
            "vdi attach web01 --nbd tcp:localhost",
            "snapshot create",
            "snapshot delete --yes",
            "snapshot rollback web01@a --keep b --discard",
            "disk replace x",
            "disk fsck /dev/sdb --index /x",
            "scrub --status --wait",
            "completions dos",
        ];
        for line in refused {
            let words = std::iter::once("weft").chain(line.split_whitespace());
            assert!(Cli::try_parse_from(words).is_err(), "{line}");
        }
    }
}
