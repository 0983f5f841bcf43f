//! `weft backup ...`: disks to object storage and back. No daemon is needed.

mod create;
mod manage;
mod restore;
mod show;

use std::path::PathBuf;
use std::sync::Arc;

use backup::location::Location;
use backup::{BackupId, Error, Key, Manifest, Repository};

use crate::failure::{Failure, Outcome};

const ENVIRONMENT: &str = "
A repository is a directory (file:///srv/backups) or a bucket (s3://bucket/prefix). For a bucket, the
environment says how to reach it: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, and for servers
other than Amazon's AWS_ENDPOINT_URL.";

#[derive(Debug, clap::Subcommand)]
#[command(after_help = ENVIRONMENT)]
pub enum BackupCommand {
    /// Back up a disk
    Create(create::CreateArgs),
    /// List the backups of a repository
    List(show::ListArgs),
    /// Check that backups can be restored
    Verify(show::VerifyArgs),
    /// Delete backups, and what only they needed
    Prune(manage::PruneArgs),
    /// Write a backup to a disk
    Restore(restore::RestoreArgs),
    /// Make a key file for an encrypted repository
    NewKey(manage::NewKeyArgs),
}

/// Which repository.
#[derive(Debug, clap::Args)]
struct Place {
    /// The repository: file:///DIRECTORY or s3://BUCKET/PREFIX
    #[arg(value_name = "REPOSITORY")]
    url: String,
    /// The file with the key of an encrypted repository
    #[arg(long, value_name = "PATH", env = "WEFT_BACKUP_KEY_FILE")]
    key_file: Option<PathBuf>,
}

/// Does what needs no daemon: all of it, as long as what is backed up is a file, a device or an NBD export.
pub fn run(command: BackupCommand, json: bool) -> Outcome<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| Failure::failed(format!("cannot start: {error}"), ""))?;
    runtime.block_on(async {
        match command {
            BackupCommand::Create(args) => create::run(args, json).await,
            BackupCommand::List(args) => show::list(&args, json).await,
            BackupCommand::Verify(args) => show::verify(&args, json).await,
            BackupCommand::Prune(args) => manage::prune(&args, json).await,
            BackupCommand::Restore(args) => restore::run(args, json).await,
            BackupCommand::NewKey(args) => manage::new_key(&args, json),
        }
    })
}

fn key(path: Option<&PathBuf>) -> Outcome<Option<Key>> {
    path.map(|path| Key::from_file(path)).transpose().map_err(failure)
}

impl Place {
    /// Opens what is there.
    async fn open(&self) -> Outcome<Repository> {
        let location = Location::open(&self.url, false).map_err(failure)?;
        Repository::open(location, key(self.key_file.as_ref())?.as_ref())
            .await
            .map_err(failure)
    }
}

/// The backup of this id (four digits or more of it) or name; of several of one name the latest, if that is wanted.
async fn find(repository: &Repository, wanted: &str, is_latest: bool) -> Outcome<Manifest> {
    let mut found = Vec::new();
    for (id, manifest) in repository.backups().await.map_err(failure)? {
        if is_id(wanted, id) {
            found.push(manifest.map_err(failure)?);
        } else if let Ok(manifest) = manifest
            && manifest.name == wanted
        {
            found.push(manifest);
        }
    }
    if found.len() > 1 && !is_latest {
        return Err(failure(Error::Ambiguous {
            wanted: wanted.to_owned(),
            ids: found.iter().map(|manifest| manifest.id.to_string()).collect(),
        }));
    }
    found.pop().ok_or_else(|| {
        failure(Error::NoBackup {
            wanted: wanted.to_owned(),
        })
    })
}

/// Whether this is the beginning of the id. Eight digits at least: the first eleven are the time.
fn is_id(text: &str, id: BackupId) -> bool {
    text.len() >= 8 && id.to_string().starts_with(text)
}

/// In the command line's words: what is wrong, the way out, the exit code.
#[allow(
    clippy::needless_pass_by_value,
    reason = "it is what `map_err` takes, and nobody has a use for the error after"
)]
fn failure(error: Error) -> Failure {
    let text = error.to_string();
    match error {
        Error::Storage { .. } => Failure::failed(
            text,
            "see that the place can be reached and has room, and for a bucket the variables AWS_ENDPOINT_URL, \
             AWS_REGION and AWS_ACCESS_KEY_ID; what was done is kept, run it again",
        ),
        Error::Missing { .. } | Error::Damaged { .. } => Failure::failed(
            text,
            "`weft backup verify` lists what is affected; a new backup of the same disk stores it again",
        ),
        Error::NoRepository { .. } => {
            Failure::not_found(text, "`weft backup create` makes one with the first backup")
        }
        Error::NewerFormat { .. } => Failure::refused(text, "use that version of weft"),
        Error::NeedsKey => Failure::refused(text, "add --key-file, with the file that it was made with"),
        Error::NotEncrypted => Failure::refused(text, "leave --key-file out, or use another repository"),
        Error::WrongKey => Failure::refused(text, "use the key file that it was made with"),
        Error::KeyFile { .. } => Failure::refused(text, "`weft backup new-key PATH` makes a key file"),
        Error::Location { .. } => {
            Failure::usage(text, "for example file:///srv/backups or s3://bucket/prefix")
        }
        Error::NoBackup { .. } => Failure::not_found(text, "`weft backup list` shows those that are there"),
        Error::Ambiguous { .. } => Failure::refused(text, "name it by its id"),
        Error::Source { .. } => Failure::failed(text, "no backup was made"),
        Error::Sink { .. } => Failure::failed(text, "nothing of it may be used"),
        Error::Unfit(_) => Failure::usage(text, "see `weft backup create --help`"),
        Error::TakenForDead => Failure::failed(text, "run it again: what was sent is kept"),
    }
}

/// Draws a bar while something is done, on a terminal.
async fn with_bar<T>(progress: &Arc<backup::Progress>, is_bytes: bool, work: impl Future<Output = T>) -> T {
    use indicatif::{ProgressBar, ProgressStyle};
    const DRAW: std::time::Duration = std::time::Duration::from_millis(200);
    let template = if is_bytes {
        "{bar:30} {bytes}/{total_bytes}  {msg}"
    } else {
        "{bar:30} {pos}/{len} objects  {msg}"
    };
    let bar = ProgressBar::new(0);
    bar.set_style(ProgressStyle::with_template(template).expect("a fixed template"));
    let started = std::time::Instant::now();
    let mut work = std::pin::pin!(work);
    loop {
        tokio::select! {
            result = &mut work => {
                bar.finish_and_clear();
                return result;
            }
            () = tokio::time::sleep(DRAW) => {
                bar.set_length(progress.total());
                bar.set_position(progress.done());
                bar.set_message(show::rate_and_left(started.elapsed(), progress));
            }
        }
    }
}
