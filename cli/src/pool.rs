//! `weft pool`

use clap::Subcommand;
use control::{PoolCreateBody, PoolInfo};

use crate::client::{Client, parse};
use crate::failure::Outcome;
use crate::output;
use crate::recover;

#[derive(Debug, Subcommand)]
pub enum PoolCommand {
    /// Create the pool that this daemon manages
    #[command(after_help = "Example:\n  weft pool create main")]
    Create {
        /// 1 to 63 of a-z, 0-9, '.', '_' and '-'
        name: String,
    },
    /// Show the pool and its space
    #[command(after_help = "Example:\n  weft pool status --json")]
    Status,
    /// Write down what disks know of the pool; needs no daemon, and none may run
    Export(recover::ExportArgs),
    /// Rebuild the pool's records from its disks after they were lost; needs no daemon, and none may run
    Recover(Box<recover::RecoverArgs>),
}

/// Those commands that need no daemon; `None` for the others.
pub fn run_offline(command: &PoolCommand, json: bool) -> Option<Outcome<()>> {
    match command {
        PoolCommand::Export(args) => Some(recover::export(args)),
        PoolCommand::Recover(args) => Some(recover::recover(args, json)),
        _ => None,
    }
}

pub async fn run(client: &Client, command: PoolCommand) -> Outcome<()> {
    match command {
        PoolCommand::Create { name } => {
            let answer = client.post("/v1/pool", &PoolCreateBody { name }).await?;
            if client.json {
                output::json(&answer);
                return Ok(());
            }
            let pool: PoolInfo = parse(answer)?;
            output::line(&format!(
                "pool '{}' created; add disks with `weft disk add PATH`",
                pool.name
            ));
        }
        PoolCommand::Status => {
            let answer = client.get("/v1/pool").await?;
            if client.json {
                output::json(&answer);
                return Ok(());
            }
            output::print(&describe(&parse(answer)?));
        }
        PoolCommand::Export(_) | PoolCommand::Recover(_) => unreachable!("done without a daemon"),
    }
    Ok(())
}

/// The pool as a list of fields.
pub fn describe(pool: &PoolInfo) -> String {
    let used = output::percent(pool.used_bytes, pool.capacity_bytes);
    output::fields(&[
        ("pool", pool.name.clone()),
        ("id", pool.id.to_string()),
        ("created", pool.created.to_string()),
        ("disks", pool.disks.to_string()),
        ("VDIs", pool.vdis.to_string()),
        ("capacity", output::size(pool.capacity_bytes)),
        ("used", format!("{} ({used})", output::size(pool.used_bytes))),
    ])
}
