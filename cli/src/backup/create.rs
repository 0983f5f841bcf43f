//! `weft backup create`

use std::path::{Path, PathBuf};
use std::sync::Arc;

use backup::create::{LEVEL, PARALLEL};
use backup::file::FileSource;
use backup::location::Location;
use backup::manifest::check_name;
use backup::nbd::NbdSource;
use backup::{CreateOptions, Manifest, Progress, Repository, Source};
use serde_json::json;

use super::{failure, find, key, show, with_bar};
use crate::failure::{Failure, Outcome};
use crate::output::{self, size};

const AFTER_HELP: &str = "\
SOURCE is an image file, a block device, or an NBD export (nbd://HOST[:PORT]/EXPORT or
nbd+unix:///EXPORT?socket=PATH). It must not be written to while it is read.

Content that the repository has already, from this disk or another, is not sent again; a run that was
cut short goes on where it was. With --changed-in, only what an NBD server says has changed since
--parent is read at all.

Examples:
  weft backup create web01.img --to file:///srv/backups
  weft backup create /dev/vg0/web01-snap --to s3://backups/lab --name web01@monday --key-file key
  weft backup create nbd+unix:///web01?socket=/run/weft/web01.nbd --to file:///srv/backups
  weft backup create nbd://host/web01 --to s3://b/x --name web01@b --parent web01@a --changed-in qemu:dirty-bitmap:a";

#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct CreateArgs {
    /// What to back up
    #[arg(value_name = "SOURCE")]
    source: String,
    /// The repository: file:///DIRECTORY or s3://BUCKET/PREFIX; made with the first backup
    #[arg(long, value_name = "REPOSITORY")]
    to: String,
    /// How to call the backup [default: the file's or the export's name]
    #[arg(long)]
    name: Option<String>,
    /// The backup, by name or id, that it follows
    #[arg(long, value_name = "BACKUP")]
    parent: Option<String>,
    /// The NBD metadata context that tells what changed since the parent
    #[arg(long, value_name = "CONTEXT", requires = "parent")]
    changed_in: Option<String>,
    /// The key file; makes a new repository an encrypted one
    #[arg(long, value_name = "PATH", env = "WEFT_BACKUP_KEY_FILE")]
    key_file: Option<PathBuf>,
    /// Level of compression
    #[arg(long, value_name = "1..19", default_value_t = LEVEL, value_parser = clap::value_parser!(i32).range(1..=19))]
    level: i32,
    /// Chunks of 1 MiB to work on at once
    #[arg(long, value_name = "N", default_value_t = PARALLEL as u16, value_parser = clap::value_parser!(u16).range(1..=256))]
    parallel: u16,
}

pub async fn run(args: CreateArgs, json: bool) -> Outcome<()> {
    let name = match &args.name {
        Some(name) => name.clone(),
        None => default_name(&args.source)?,
    };
    let key = key(args.key_file.as_ref())?;
    // The disk first: a source that is not there makes no repository.
    if is_nbd(&args.source) {
        let source = NbdSource::open(&args.source, args.changed_in.as_deref())
            .await
            .map_err(failure)?;
        return back_up(&args, name, key.as_ref(), &source, json).await;
    }
    if args.changed_in.is_some() {
        return Err(Failure::usage(
            "--changed-in is for NBD exports",
            "a file or device is compared with what the repository has",
        ));
    }
    let source = FileSource::open(Path::new(&args.source)).map_err(failure)?;
    back_up(&args, name, key.as_ref(), &source, json).await
}

fn is_nbd(source: &str) -> bool {
    ["nbd://", "nbd+unix://"]
        .iter()
        .any(|scheme| source.starts_with(scheme))
}

/// `web01` of `/srv/web01.img` and of `nbd://host/web01`.
fn default_name(source: &str) -> Outcome<String> {
    let path = match source.split_once("://") {
        Some((_, rest)) => rest.split('?').next().unwrap_or_default(),
        None => source,
    };
    let stem = Path::new(path)
        .file_stem()
        .and_then(|stem| stem.to_str())
        .unwrap_or_default();
    match check_name(stem) {
        Ok(()) => Ok(stem.to_owned()),
        Err(_) => Err(Failure::usage(
            format!("'{source}' gives no name for the backup"),
            "add --name, for example --name web01@monday",
        )),
    }
}

async fn back_up<S: Source>(
    args: &CreateArgs,
    name: String,
    key: Option<&backup::Key>,
    source: &S,
    json: bool,
) -> Outcome<()> {
    let location = Location::open(&args.to, true).map_err(failure)?;
    let repository = Repository::open_or_create(location, key).await.map_err(failure)?;
    let parent = match &args.parent {
        Some(parent) => Some(find(&repository, parent, true).await?),
        None => None,
    };
    let options = CreateOptions {
        name,
        parent,
        level: args.level,
        parallel: args.parallel.into(),
        weft: format!("weft-{}", env!("CARGO_PKG_VERSION")),
    };
    let progress = Arc::new(Progress::default());
    let started = std::time::Instant::now();
    let made = with_bar(
        &progress,
        true,
        backup::create(&repository, source, &options, &progress),
    )
    .await
    .map_err(failure)?;
    report(&made, started.elapsed().as_secs_f64(), json);
    Ok(())
}

fn report(made: &Manifest, seconds: f64, json: bool) {
    if json {
        let mut value = show::value(made);
        value["seconds"] = json!(seconds);
        return output::json(&value);
    }
    let rate = made.cost.read_bytes as f64 / seconds.max(0.001);
    output::line(&format!(
        "'{}' backed up as {}: {} read in {} ({}/s), {} new, {} sent",
        made.name,
        made.id,
        size(made.cost.read_bytes),
        output::duration(seconds),
        size(rate as u64),
        size(made.cost.new_bytes),
        size(made.cost.sent_bytes),
    ));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_gives_its_name() {
        for (source, name) in [
            ("/srv/web01.img", "web01"),
            ("web01", "web01"),
            ("nbd://host:10809/web01", "web01"),
            ("nbd+unix:///web01?socket=/run/x.nbd", "web01"),
        ] {
            assert_eq!(default_name(source).unwrap(), name, "{source}");
        }
        for source in ["/", "", "nbd+unix:///?socket=/run/x", "my disk.img"] {
            assert!(default_name(source).is_err(), "{source}");
        }
    }
}
