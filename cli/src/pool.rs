//! `weft pool`

use clap::Subcommand;
use control::{PoolCreateBody, PoolInfo, RebalancePlan};

use crate::client::{Client, parse};
use crate::failure::Outcome;
use crate::output::{self, Align, Table};
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
    /// Make all disks as full as their sizes say, in the background, on all hosts
    #[command(after_help = "Examples:\n  weft pool rebalance --dry-run\n  weft pool rebalance")]
    Rebalance {
        /// Only show what would move
        #[arg(long)]
        dry_run: bool,
    },
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
        PoolCommand::Rebalance { dry_run } => {
            let answer = if dry_run {
                client.get("/v1/rebalance").await?
            } else {
                client.post("/v1/rebalance", &()).await?
            };
            if client.json {
                output::json(&answer);
                return Ok(());
            }
            output::print(&describe_plan(&parse(answer)?, dry_run));
        }
        PoolCommand::Export(_) | PoolCommand::Recover(_) => unreachable!("done without a daemon"),
    }
    Ok(())
}

/// Moves that a person is shown; `--json` has more.
const MOVES_SHOWN: usize = 20;

fn describe_plan(plan: &RebalancePlan, dry_run: bool) -> String {
    if plan.moves == 0 {
        return "the disks are even: nothing has to move\n".to_owned();
    }
    let verb = if dry_run { "would move" } else { "move" };
    let mut text = format!(
        "{} replicas {verb}, at most {}",
        plan.moves,
        output::size(plan.bytes)
    );
    text.push_str(match (dry_run, plan.is_wanted, plan.is_on) {
        (true, true, true) => "; that is done without being asked for\n",
        (true, true, false) => "; the setting `rebalance` is off: `weft pool rebalance` does it\n",
        (true, false, _) => "; the disks are even enough: only `weft pool rebalance` does it\n",
        (false, ..) => "; `weft status` shows how far it is\n",
    });
    if !plan.waits_for.is_empty() {
        text.push_str(&format!("not before this is over: {}\n", plan.waits_for));
    }
    let mut table = Table::new(&[
        ("VDI", Align::Left),
        ("SHARD", Align::Right),
        ("FROM", Align::Left),
        ("TO", Align::Left),
        ("BYTES", Align::Right),
    ]);
    for one in plan.first.iter().take(MOVES_SHOWN) {
        table.row(vec![
            one.vdi.clone(),
            one.shard.to_string(),
            one.from.to_string(),
            one.to.to_string(),
            output::size(one.bytes),
        ]);
    }
    text.push_str(&table.render(2));
    let shown = plan.first.len().min(MOVES_SHOWN) as u64;
    if shown < plan.moves {
        text.push_str(&format!("  and {} more\n", plan.moves - shown));
    }
    text
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
