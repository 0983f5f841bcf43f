//! `weft backup list` and `weft backup verify`

use std::sync::Arc;
use std::time::Duration;

use backup::{Manifest, Progress};
use serde_json::{Value, json};

use super::{Place, failure, is_id, with_bar};
use crate::failure::{Failure, Outcome};
use crate::output::{self, Align, Table, size};

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  weft backup list file:///srv/backups\n  weft backup list s3://backups/lab --json"
)]
pub struct ListArgs {
    #[command(flatten)]
    place: Place,
}

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  weft backup verify file:///srv/backups\n  weft backup verify s3://backups/lab web01@monday --quick"
)]
pub struct VerifyArgs {
    #[command(flatten)]
    place: Place,
    /// Only these, by name or id [default: all]
    #[arg(value_name = "BACKUP")]
    backups: Vec<String>,
    /// Only that the objects are there, not what is in them
    #[arg(long)]
    quick: bool,
    /// Objects to read at once
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=256))]
    parallel: u16,
}

/// A backup as JSON.
pub fn value(backup: &Manifest) -> Value {
    json!({
        "id": backup.id.to_string(),
        "name": backup.name,
        "bytes": backup.bytes,
        "sector_bytes": backup.sector_bytes,
        "created": backup.created.to_string(),
        "parent": backup.parent.map(|parent| parent.to_string()),
        "weft": backup.weft,
        "read_bytes": backup.cost.read_bytes,
        "new_bytes": backup.cost.new_bytes,
        "sent_bytes": backup.cost.sent_bytes,
    })
}

pub async fn list(args: &ListArgs, json: bool) -> Outcome<()> {
    let repository = args.place.open().await?;
    let backups = repository.backups().await.map_err(failure)?;
    if json {
        let shown = backups.iter().map(|(id, manifest)| match manifest {
            Ok(manifest) => value(manifest),
            Err(error) => json!({ "id": id.to_string(), "damaged": error.to_string() }),
        });
        output::json(&Value::Array(shown.collect()));
        return Ok(());
    }
    if backups.is_empty() {
        output::line("no backups");
        return Ok(());
    }
    let mut table = Table::new(&[
        ("NAME", Align::Left),
        ("CREATED", Align::Left),
        ("SIZE", Align::Right),
        ("READ", Align::Right),
        ("NEW", Align::Right),
        ("SENT", Align::Right),
        ("ID", Align::Left),
    ]);
    for (id, manifest) in &backups {
        let cells = match manifest {
            Ok(backup) => vec![
                backup.name.clone(),
                backup.created.strftime("%Y-%m-%d %H:%M:%S").to_string(),
                size(backup.bytes),
                size(backup.cost.read_bytes),
                size(backup.cost.new_bytes),
                size(backup.cost.sent_bytes),
                id.to_string(),
            ],
            Err(_) => {
                let mut cells = vec![String::new(); 7];
                cells[0] = "(damaged)".to_owned();
                cells[6] = id.to_string();
                cells
            }
        };
        table.row(cells);
    }
    output::print(&table.render(0));
    Ok(())
}

pub async fn verify(args: &VerifyArgs, json: bool) -> Outcome<()> {
    let repository = args.place.open().await?;
    let mut backups = repository.backups().await.map_err(failure)?;
    for wanted in &args.backups {
        let is_there = backups
            .iter()
            .any(|(id, manifest)| is_id(wanted, *id) || manifest.as_ref().is_ok_and(|m| m.name == *wanted));
        if !is_there {
            let wanted = wanted.clone();
            return Err(failure(backup::Error::NoBackup { wanted }));
        }
    }
    if !args.backups.is_empty() {
        backups.retain(|(id, manifest)| {
            let is_meant = |wanted: &String| {
                is_id(wanted, *id) || manifest.as_ref().is_ok_and(|manifest| manifest.name == *wanted)
            };
            args.backups.iter().any(is_meant)
        });
    }
    let progress = Arc::new(Progress::default());
    let work = backup::verify(&repository, &backups, args.quick, args.parallel.into(), &progress);
    let report = with_bar(&progress, false, work).await.map_err(failure)?;
    let broken: Vec<String> = report.broken.iter().map(ToString::to_string).collect();
    if json {
        output::json(&json!({
            "backups": report.backups,
            "objects": report.objects,
            "bytes": report.bytes,
            "bad": report.bad,
            "findings": report.findings,
            "broken": broken,
            "quick": args.quick,
        }));
    } else {
        for finding in &report.findings {
            output::line(finding);
        }
        if report.bad > report.findings.len() as u64 {
            output::line(&format!("and {} more", report.bad - report.findings.len() as u64));
        }
    }
    if report.bad > 0 {
        return Err(Failure::failed(
            format!(
                "{} objects are missing or damaged; these backups cannot be restored whole: {}",
                report.bad,
                broken.join(", ")
            ),
            "a new backup of the same disk stores what is missing again",
        ));
    }
    if !json {
        let what = if args.quick { "are there" } else { "are whole" };
        output::line(&format!(
            "{} backups, {} objects, {}: all {what}",
            report.backups,
            report.objects,
            size(report.bytes)
        ));
    }
    Ok(())
}

/// `412MiB/s  3 min left`
pub fn rate_and_left(elapsed: Duration, progress: &Progress) -> String {
    let seconds = elapsed.as_secs_f64();
    if seconds < 1.0 || progress.done() == 0 {
        return String::new();
    }
    let rate = size((progress.read() as f64 / seconds) as u64);
    let left = progress.total().saturating_sub(progress.done());
    let left = seconds / progress.done() as f64 * left as f64;
    format!("{rate}/s  {} left", output::duration(left))
}
