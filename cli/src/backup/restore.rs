//! `weft backup restore`

use std::path::{Path, PathBuf};
use std::sync::Arc;

use backup::Progress;
use backup::file::FileSink;
use serde_json::json;

use super::{Place, failure, find, show, with_bar};
use crate::failure::Outcome;
use crate::output::{self, size};

const AFTER_HELP: &str = "\
Of several backups of one name the latest is restored. A file is there under its name when all of it is
restored, not before; what a block device holds after a failure is neither the old nor the new.

Examples:
  weft backup restore file:///srv/backups web01@monday web01.img
  weft backup restore s3://backups/lab web01 /dev/vg0/web01 --overwrite --yes --key-file key";

#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct RestoreArgs {
    #[command(flatten)]
    place: Place,
    /// Which backup, by name or id
    #[arg(value_name = "BACKUP")]
    backup: String,
    /// The file to make, or the block device to write
    #[arg(value_name = "TARGET")]
    target: PathBuf,
    /// Replace a file that is there, or what a device holds
    #[arg(long)]
    overwrite: bool,
    /// Do not ask before something is overwritten
    #[arg(long)]
    yes: bool,
    /// Chunks of 1 MiB to work on at once
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=256))]
    parallel: u16,
}

pub async fn run(args: RestoreArgs, json: bool) -> Outcome<()> {
    let repository = args.place.open().await?;
    let made = find(&repository, &args.backup, true).await?;
    let target = args.target.display().to_string();
    if args.overwrite && Path::new(&args.target).exists() {
        output::confirm(&format!("this overwrites {target}"), args.yes)?;
    }
    let progress = Arc::new(Progress::default());
    let started = std::time::Instant::now();
    let sink = FileSink::create(&args.target, made.bytes, args.overwrite).map_err(failure)?;
    let work = backup::restore(&repository, &made, &sink, args.parallel.into(), &progress);
    with_bar(&progress, true, work).await.map_err(failure)?;
    let seconds = started.elapsed().as_secs_f64();
    if json {
        let mut value = show::value(&made);
        value["seconds"] = json!(seconds);
        value["target"] = json!(target);
        value["written_bytes"] = json!(progress.written());
        output::json(&value);
    } else {
        output::line(&format!(
            "'{}' restored to {target}: {} written in {} ({}/s)",
            made.name,
            size(progress.written()),
            output::duration(seconds),
            size((progress.written() as f64 / seconds.max(0.001)) as u64),
        ));
    }
    Ok(())
}
