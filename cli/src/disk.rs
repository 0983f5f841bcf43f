//! `weft disk`

use clap::{Args, Subcommand};
use control::{DiskAddBody, DiskInfo, DiskReplaceBody, DiskState, ErrorKind, LeftoverInfo};
use serde::Serialize;
use serde_json::Value;
use types::ByteSize;

use crate::client::{Client, parse, segment};
use crate::failure::{Failure, Outcome};
use crate::offline;
use crate::output::{self, Align, Table, size};

#[derive(Debug, Subcommand)]
pub enum DiskCommand {
    /// Give a disk to the pool; what is on it is lost
    #[command(after_help = "Examples:\n  weft disk add /dev/sdb --zone rack1\n  \
        weft disk add /srv/weft/a.img --size 100GiB\n  weft disk add /dev/sdc --force --yes\n  \
        weft disk add /dev/sdb --accept-old")]
    Add(NewDisk),
    /// List all disks
    #[command(after_help = "Example:\n  weft disk list")]
    List,
    /// Put a new disk in the place of another, which leaves; the data is copied from the other replicas
    #[command(
        after_help = "Examples:\n  weft disk replace 3f2a /dev/sdd\n  weft disk replace /dev/sdb /dev/sdd"
    )]
    Replace {
        /// The disk that leaves: its id, the beginning of it (4 characters or more), or its path
        disk: String,
        #[command(flatten)]
        with: NewDisk,
    },
    /// Move a disk's replicas to the other disks and let it go
    #[command(after_help = "Examples:\n  weft disk remove /dev/sdb\n  weft disk remove 3f2a --force --yes")]
    Remove {
        /// Its id, the beginning of it (4 characters or more), or its path
        disk: String,
        /// Let it go at once although replicas are on it
        #[arg(long)]
        force: bool,
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },
    /// Show, or drop, replicas on a disk that the pool's records do not know and that are kept for that
    #[command(
        after_help = "Examples:\n  weft disk leftovers /dev/sdb\n  weft disk leftovers 3f2a --drop\n  \
        weft disk leftovers 3f2a --drop --yes"
    )]
    Leftovers {
        /// Its id, the beginning of it (4 characters or more), or its path
        disk: String,
        /// Drop them; says what is lost and asks first
        #[arg(long)]
        drop: bool,
        /// Do not ask
        #[arg(long, requires = "drop")]
        yes: bool,
    },
    /// Show what a disk says of itself; needs no daemon
    Inspect(offline::InspectArgs),
    /// Check a disk's log and all of its data; needs no daemon, and none may have it open
    Fsck(offline::FsckArgs),
}

/// Those commands that need no daemon; `None` for the others.
pub fn run_offline(command: &DiskCommand, json: bool) -> Option<Outcome<()>> {
    match command {
        DiskCommand::Inspect(args) => Some(offline::inspect(args, json)),
        DiskCommand::Fsck(args) => Some(offline::fsck(args, json)),
        _ => None,
    }
}

/// A disk on its way into the pool.
#[derive(Debug, Args)]
pub struct NewDisk {
    /// A block device, a partition, or a file
    path: String,
    /// Make a file of this size, space reserved
    #[arg(long)]
    size: Option<ByteSize>,
    /// Failure domain; replicas go to different ones where there are enough
    #[arg(long)]
    zone: Option<String>,
    /// Take it although it holds something; asks first
    #[arg(long)]
    force: bool,
    /// Take back a disk of the pool that lost writes, or an older copy of it, although it has the only copy; asks first
    #[arg(long)]
    accept_old: bool,
    /// Do not ask
    #[arg(long)]
    yes: bool,
}

impl NewDisk {
    /// A relative path is relative to where the user is, not to where the daemon is.
    fn body(&self) -> Outcome<DiskAddBody> {
        let wrong = |reason: &dyn std::fmt::Display| {
            Failure::usage(
                format!("'{}' is not the path of a disk: {reason}", self.path),
                "give an absolute path",
            )
        };
        let absolute = std::path::absolute(&self.path).map_err(|e| wrong(&e))?;
        Ok(DiskAddBody {
            path: absolute.to_str().ok_or_else(|| wrong(&"not UTF-8"))?.to_owned(),
            create_bytes: self.size.map(|size| size.0),
            zone: self.zone.clone(),
            force: false,
            accept_old: self.accept_old,
        })
    }
}

pub async fn run(client: &Client, command: DiskCommand) -> Outcome<()> {
    match command {
        DiskCommand::Add(new) => {
            let answer = post_forced(client, "/v1/disks", &new, |body| body).await?;
            done(client, answer, |disk| {
                format!(
                    "disk {} added: {}, {} for data",
                    disk.id,
                    disk.path,
                    size(disk.capacity_bytes)
                )
            })
        }
        DiskCommand::List => {
            let answer = client.get("/v1/disks").await?;
            if client.json {
                output::json(&answer);
            } else {
                output::print(&table(&parse::<Vec<DiskInfo>>(answer)?, 0));
            }
            Ok(())
        }
        DiskCommand::Replace { disk, with } => {
            let old = find(client, &disk).await?;
            let path = format!("/v1/disks/{}/replace", segment(&old.id.to_string()));
            let answer = post_forced(client, &path, &with, |with| DiskReplaceBody { with }).await?;
            done(client, answer, |new| {
                format!(
                    "disk {} takes the place of {}; `weft status` shows how far the copying is",
                    new.id, old.id
                )
            })
        }
        DiskCommand::Remove { disk, force, yes } => remove(client, &disk, force, yes).await,
        DiskCommand::Leftovers { disk, drop, yes } => leftovers(client, &disk, drop, yes).await,
        DiskCommand::Inspect(_) | DiskCommand::Fsck(_) => unreachable!("run_offline did these"),
    }
}

/// Asks the daemon without force first: it says what would be lost, and that is what the question shows.
async fn post_forced<B: Serialize>(
    client: &Client,
    path: &str,
    new: &NewDisk,
    wrap: impl Fn(DiskAddBody) -> B,
) -> Outcome<Value> {
    let body = new.body()?;
    if new.accept_old {
        let question = format!("whatever {} has lost will read as it was before", new.path);
        output::confirm(&question, new.yes)?;
    }
    match client.try_post(path, &wrap(body.clone())).await? {
        Err(error) if error.kind == ErrorKind::NeedsForce && new.force => {
            output::confirm(&format!("{}; what is on it will be lost", error.message), new.yes)?;
            client
                .post(path, &wrap(DiskAddBody { force: true, ..body }))
                .await
        }
        answer => answer.map_err(Failure::from),
    }
}

async fn remove(client: &Client, disk: &str, force: bool, yes: bool) -> Outcome<()> {
    let disk = find(client, disk).await?;
    let mut path = format!("/v1/disks/{}", segment(&disk.id.to_string()));
    if force {
        let question = format!(
            "disk {} ({}) with {} replicas is let go at once",
            disk.id, disk.path, disk.replicas
        );
        output::confirm(&question, yes)?;
        path.push_str("?force=true");
    }
    let answer = client.delete(&path).await?;
    done(client, answer, |disk| {
        if disk.state == DiskState::Removing {
            format!(
                "disk {} is being emptied; `weft status` shows how far it is",
                disk.id
            )
        } else {
            format!("disk {} is removed", disk.id)
        }
    })
}

/// Asks the daemon without force first: what it says would be lost is what the question shows.
async fn leftovers(client: &Client, disk: &str, drop: bool, yes: bool) -> Outcome<()> {
    let disk = find(client, disk).await?;
    let path = format!("/v1/disks/{}/leftovers", segment(&disk.id.to_string()));
    let answer = if drop {
        match client.try_delete(&path).await? {
            Err(error) if error.kind == ErrorKind::NeedsForce => {
                let question = format!("{}; what no other disk has of it is lost", error.message);
                output::confirm(&question, yes)?;
                client.delete(&format!("{path}?force=true")).await?
            }
            answer => answer.map_err(Failure::from)?,
        }
    } else {
        client.get(&path).await?
    };
    if client.json {
        output::json(&answer);
        return Ok(());
    }
    let kept: Vec<LeftoverInfo> = parse(answer)?;
    if kept.is_empty() {
        output::line(&format!(
            "disk {} holds nothing that the records do not know",
            disk.id
        ));
        return Ok(());
    }
    let mut table = Table::new(&[
        ("VDI", Align::Left),
        ("NAME", Align::Left),
        ("SHARDS", Align::Right),
        ("DATA", Align::Right),
    ]);
    for one in &kept {
        table.row(vec![
            one.vdi.to_string(),
            if one.name.is_empty() {
                "-".to_owned()
            } else {
                one.name.clone()
            },
            one.shards.to_string(),
            size(one.bytes),
        ]);
    }
    let said = if drop {
        "dropped"
    } else {
        "kept, and not in the records"
    };
    output::line(&format!("{said}:"));
    output::print(&table.render(2));
    Ok(())
}

fn done(client: &Client, answer: Value, say: impl FnOnce(&DiskInfo) -> String) -> Outcome<()> {
    if client.json {
        output::json(&answer);
        return Ok(());
    }
    let disk: DiskInfo = parse(answer)?;
    output::line(&say(&disk));
    Ok(())
}

async fn find(client: &Client, given: &str) -> Outcome<DiskInfo> {
    let disks: Vec<DiskInfo> = parse(client.get("/v1/disks").await?)?;
    pick(disks, given)
}

/// A shorter beginning names a disk by chance: `weft disk remove 0` is more likely a mistake.
const ID_BEGINNING_MIN: usize = 4;

/// Whether `given` is an id, or enough of its beginning to be meant.
pub fn begins(id: &str, given: &str) -> bool {
    given.len() >= ID_BEGINNING_MIN && id.starts_with(&given.to_ascii_lowercase())
}

/// An id, the beginning of exactly one, or a path, relative to where the caller is.
fn pick(disks: Vec<DiskInfo>, given: &str) -> Outcome<DiskInfo> {
    // The daemon keeps paths with their links resolved; a disk that has gone cannot be resolved any more.
    let absolute = std::fs::canonicalize(given)
        .or_else(|_| std::path::absolute(given))
        .unwrap_or_else(|_| given.into());
    let matches: Vec<DiskInfo> = disks
        .into_iter()
        .filter(|d| std::path::Path::new(&d.path) == absolute || begins(&d.id.to_string(), given))
        .collect();
    let count = matches.len();
    let mut matches = matches.into_iter();
    match (matches.next(), count) {
        (Some(disk), 1) => Ok(disk),
        (Some(_), _) => Err(Failure::usage(
            format!("'{given}' is the beginning of {count} disk ids"),
            "write more of it; `weft disk list` shows them",
        )),
        (None, _) => Err(Failure::not_found(
            format!("there is no disk '{given}' in the pool"),
            format!(
                "`weft disk list` shows paths, and ids, of which {ID_BEGINNING_MIN} characters are enough"
            ),
        )),
    }
}

/// Disks, one a line.
pub fn table(disks: &[DiskInfo], indent: usize) -> String {
    let mut table = Table::new(&[
        ("DISK", Align::Left),
        ("PATH", Align::Left),
        ("STATE", Align::Left),
        ("ZONE", Align::Left),
        ("CAPACITY", Align::Right),
        ("USED", Align::Right),
        ("USE%", Align::Right),
        ("REPLICAS", Align::Right),
        ("BAD BLOCKS", Align::Right),
    ]);
    for disk in disks {
        let state = match disk.state {
            DiskState::Active => "active",
            DiskState::Failed => "FAILED",
            DiskState::Missing => "MISSING",
            DiskState::Removing => "removing",
        };
        let state = if disk.reason.is_empty() {
            state.to_owned()
        } else {
            format!("{state}: {}", disk.reason)
        };
        table.row(vec![
            disk.id.to_string(),
            disk.path.clone(),
            state,
            if disk.zone.is_empty() {
                "-".to_owned()
            } else {
                disk.zone.clone()
            },
            size(disk.capacity_bytes),
            size(disk.used_bytes),
            output::percent(disk.used_bytes, disk.capacity_bytes),
            disk.replicas.to_string(),
            disk.corrupt_blocks.to_string(),
        ]);
    }
    table.render(indent)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failure::Exit;
    use types::DiskId;

    fn disk(id: u128, path: &str) -> DiskInfo {
        DiskInfo {
            id: DiskId(id),
            path: path.to_owned(),
            state: DiskState::Active,
            zone: String::new(),
            bytes: 0,
            capacity_bytes: 0,
            used_bytes: 0,
            segments: 0,
            segments_free: 0,
            replicas: 0,
            corrupt_blocks: 0,
            reason: String::new(),
            host: None,
            leftovers: 0,
        }
    }

    #[test]
    fn a_disk_is_named_by_id_its_beginning_or_its_path() {
        let disks = || {
            vec![
                disk(0xabcdab << 104, "/dev/sdb"),
                disk(0xabcdac << 104, "/srv/a.img"),
            ]
        };
        for (given, wanted) in [
            ("abcdab", Ok("/dev/sdb")),
            ("ABCDAC0", Ok("/srv/a.img")),
            ("abcdab00-0000-0000-0000-000000000000", Ok("/dev/sdb")),
            ("/srv/a.img", Ok("/srv/a.img")),
            ("abcd", Err(Exit::Usage)),
            ("abc", Err(Exit::NotFound)),
            ("b", Err(Exit::NotFound)),
            ("/dev/sdc", Err(Exit::NotFound)),
            ("", Err(Exit::NotFound)),
        ] {
            let found = pick(disks(), given);
            assert_eq!(
                found.as_ref().map(|d| d.path.as_str()).map_err(|f| f.exit),
                wanted,
                "{given}"
            );
        }
    }

    #[test]
    fn a_path_is_made_absolute_where_the_user_is() {
        let new = NewDisk {
            path: "a.img".into(),
            size: None,
            zone: None,
            force: true,
            accept_old: false,
            yes: false,
        };
        let body = new.body().unwrap();
        let here = std::env::current_dir().unwrap();
        assert_eq!(std::path::Path::new(&body.path), here.join("a.img"));
        assert!(!body.force, "force is sent only after the question");
    }
}
