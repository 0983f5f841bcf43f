//! `weft backup prune` and `weft backup new-key`

use std::path::PathBuf;
use std::sync::Arc;

use backup::prune::SILENT_SECONDS_MAX;
use backup::{Key, Progress};
use serde_json::json;

use super::{Place, failure, find, with_bar};
use crate::failure::Outcome;
use crate::output;

const PRUNE_HELP: &str = "\
Without BACKUP, deletes only what no backup needs: what runs that were cut short have left, and what
earlier prunes had to leave because of runs under way.

Examples:
  weft backup prune file:///srv/backups web01@monday web01@tuesday --yes
  weft backup prune s3://backups/lab 0199aabbccdd --yes
  weft backup prune file:///srv/backups";

#[derive(Debug, clap::Args)]
#[command(after_help = PRUNE_HELP)]
pub struct PruneArgs {
    #[command(flatten)]
    place: Place,
    /// Backups to delete, by name or id
    #[arg(value_name = "BACKUP")]
    backups: Vec<String>,
    /// Minutes of silence after which a run is taken for dead
    #[arg(long, value_name = "MINUTES", default_value_t = SILENT_SECONDS_MAX as u32 / 60,
        value_parser = clap::value_parser!(u32).range(5..))]
    dead_after: u32,
    /// Do not ask
    #[arg(long)]
    yes: bool,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  weft backup new-key /etc/weft/backup.key")]
pub struct NewKeyArgs {
    /// The file to make; keep a copy of it elsewhere
    #[arg(value_name = "PATH")]
    path: PathBuf,
}

pub async fn prune(args: &PruneArgs, json: bool) -> Outcome<()> {
    let repository = args.place.open().await?;
    let mut ids = Vec::new();
    let mut names = Vec::new();
    for wanted in &args.backups {
        let backup = find(&repository, wanted, false).await?;
        names.push(format!(
            "'{}' of {}",
            backup.name,
            backup.created.strftime("%Y-%m-%d %H:%M")
        ));
        ids.push(backup.id);
    }
    if !ids.is_empty() {
        output::confirm(
            &format!("this deletes the backups {}", names.join(", ")),
            args.yes,
        )?;
    }
    let progress = Arc::new(Progress::default());
    let silent = i64::from(args.dead_after) * 60;
    let work = backup::prune(&repository, &ids, silent, &progress);
    let report = with_bar(&progress, false, work).await.map_err(failure)?;
    if json {
        output::json(&json!({
            "backups": report.backups,
            "objects": report.objects,
            "objects_waiting": report.objects_waiting,
            "waiting_for": report.waiting_for,
            "dead": report.dead,
        }));
        return Ok(());
    }
    output::line(&format!(
        "{} backups and {} objects deleted",
        report.backups, report.objects
    ));
    if report.objects_waiting > 0 {
        output::line(&format!(
            "{} objects stay until {} runs have ended that may rely on them; prune again then",
            report.objects_waiting,
            report.waiting_for.len()
        ));
    }
    Ok(())
}

pub fn new_key(args: &NewKeyArgs, json: bool) -> Outcome<()> {
    Key::generate().write_file(&args.path).map_err(failure)?;
    let path = args.path.display().to_string();
    if json {
        output::json(&json!({ "path": path }));
    } else {
        output::line(&format!(
            "key written to {path}; keep a copy elsewhere: without it no backup made with it can be read"
        ));
    }
    Ok(())
}
