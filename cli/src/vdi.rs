//! `weft vdi`

use ::snapshot::{ParseReferenceError, Point, Reference};
use clap::{Args, Subcommand};
use control::{
    AttachBody, AttachTarget, DetachBody, Health, NbdAddress, VdiCreateBody, VdiInfo, VdiResizeBody,
};
use types::ByteSize;

use crate::client::{Client, parse, segment};
use crate::failure::{Failure, Outcome};
use crate::output::{self, Align, Table, size};

#[derive(Debug, Subcommand)]
pub enum VdiCommand {
    /// Create a virtual disk
    #[command(after_help = "Example:\n  weft vdi create web01 --size 20GiB --replicas 3")]
    Create {
        /// 1 to 63 of a-z, 0-9, '.', '_' and '-'
        name: String,
        /// Virtual size, 1MiB to 64TiB; space is taken when it is written
        #[arg(long)]
        size: ByteSize,
        /// Copies of the data, each on another disk
        #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=3))]
        replicas: u8,
        /// Logical sector in bytes: 512 or 4096
        #[arg(long, default_value_t = 512, value_parser = sector)]
        sector: u32,
        /// Bytes that are placed together, a multiple of 1MiB up to 64GiB
        #[arg(long, default_value = "1GiB", value_name = "SIZE")]
        shard_size: ByteSize,
    },
    /// List all virtual disks
    #[command(after_help = "Example:\n  weft vdi list")]
    List,
    /// Show one virtual disk: size, health, replicas, attachments
    #[command(after_help = "Example:\n  weft vdi show web01")]
    Show {
        /// Its name
        name: String,
    },
    /// Make a virtual disk larger; guests that use it are told
    #[command(after_help = "Example:\n  weft vdi resize web01 --size 40GiB")]
    Resize {
        /// Its name
        name: String,
        /// The new size
        #[arg(long)]
        size: ByteSize,
    },
    /// Delete a virtual disk and its data
    #[command(after_help = "Example:\n  weft vdi delete web01 --yes")]
    Delete {
        /// Its name
        name: String,
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },
    /// Open a door for guests: vhost-user-blk or NBD
    #[command(
        after_help = "Examples:\n  weft vdi attach web01 --vhost-user /run/weft/web01.sock --queues 4\n  \
        weft vdi attach web01 --nbd unix:/run/weft/web01.nbd\n  weft vdi attach web01 --nbd tcp:127.0.0.1:10809\n  \
        weft vdi attach web01@before-upgrade --nbd unix:/run/weft/before.nbd"
    )]
    Attach {
        /// Its name, or VDI@SNAPSHOT to serve a snapshot read-only over NBD
        name: String,
        #[command(flatten)]
        door: Door,
        /// Guests may not write
        #[arg(long)]
        read_only: bool,
        /// Request queues of vhost-user, 1 to 16
        #[arg(long, requires = "vhost_user")]
        queues: Option<u16>,
    },
    /// Close one of its doors, or all
    #[command(
        after_help = "Examples:\n  weft vdi detach web01\n  weft vdi detach web01 --nbd tcp:127.0.0.1:10809"
    )]
    Detach {
        /// Its name
        name: String,
        #[command(flatten)]
        door: OptionalDoor,
    },
}

/// Exactly one.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub struct Door {
    /// A vhost-user-blk socket
    #[arg(long, value_name = "PATH")]
    vhost_user: Option<String>,
    /// An NBD export: unix:/PATH or tcp:ADDRESS:PORT
    #[arg(long, value_name = "ADDRESS")]
    nbd: Option<NbdAddress>,
}

/// At most one.
#[derive(Debug, Args)]
#[group(multiple = false)]
pub struct OptionalDoor {
    /// The vhost-user-blk socket to close
    #[arg(long, value_name = "PATH")]
    vhost_user: Option<String>,
    /// The NBD export to close
    #[arg(long, value_name = "ADDRESS")]
    nbd: Option<NbdAddress>,
}

fn sector(text: &str) -> Result<u32, String> {
    match text {
        "512" => Ok(512),
        "4096" => Ok(4096),
        _ => Err("use 512 or 4096".to_owned()),
    }
}

/// A relative path is relative to where the user is, not to where the daemon is.
fn target(vhost_user: Option<String>, nbd: Option<NbdAddress>) -> Outcome<Option<AttachTarget>> {
    if let Some(address) = nbd {
        return Ok(Some(AttachTarget::Nbd(address)));
    }
    let Some(path) = vhost_user else {
        return Ok(None);
    };
    let absolute = std::path::absolute(&path).map_err(|error| {
        Failure::usage(
            format!("'{path}' is not a path: {error}"),
            "give an absolute path",
        )
    })?;
    let text = format!("vhost-user:{}", absolute.display());
    text.parse()
        .map(Some)
        .map_err(|error: control::ParseTargetError| Failure::usage(error.to_string(), ""))
}

pub async fn run(client: &Client, command: VdiCommand) -> Outcome<()> {
    match command {
        VdiCommand::Create {
            name,
            size,
            replicas,
            sector,
            shard_size,
        } => {
            let body = VdiCreateBody {
                name,
                bytes: size.0,
                replicas: Some(replicas),
                sector_bytes: Some(sector),
                shard_bytes: Some(shard_size.0),
            };
            let answer = client.post("/v1/vdis", &body).await?;
            done(client, answer, |vdi| {
                format!(
                    "VDI '{}' created, {} in {} replicas; give it to a guest with `weft vdi attach {} ...`",
                    vdi.name,
                    output::size(vdi.bytes),
                    vdi.replicas,
                    vdi.name
                )
            })
        }
        VdiCommand::List => {
            let answer = client.get("/v1/vdis").await?;
            if client.json {
                output::json(&answer);
            } else {
                output::print(&table(&parse::<Vec<VdiInfo>>(answer)?, 0));
            }
            Ok(())
        }
        VdiCommand::Show { name } => {
            let answer = client.get(&format!("/v1/vdis/{}", segment(&name))).await?;
            if client.json {
                output::json(&answer);
            } else {
                output::print(&describe(&parse(answer)?));
            }
            Ok(())
        }
        VdiCommand::Resize { name, size } => {
            let path = format!("/v1/vdis/{}/resize", segment(&name));
            let answer = client.post(&path, &VdiResizeBody { bytes: size.0 }).await?;
            done(client, answer, |vdi| {
                format!("VDI '{}' has {}", vdi.name, output::size(vdi.bytes))
            })
        }
        VdiCommand::Delete { name, yes } => delete(client, &name, yes).await,
        VdiCommand::Attach {
            name,
            door,
            read_only,
            queues,
        } => {
            let Some(target) = target(door.vhost_user, door.nbd)? else {
                return Err(Failure::usage(
                    "no door was named",
                    "add --vhost-user PATH or --nbd ADDRESS",
                ));
            };
            let reference: Reference = name
                .parse()
                .map_err(|error: ParseReferenceError| Failure::usage(error.to_string(), error.way_out()))?;
            let (name, snapshot) = match reference.point {
                Point::Head => (reference.vdi, None),
                Point::Snapshot(snapshot) => (reference.vdi, Some(snapshot.to_string())),
                Point::Time(_) => {
                    return Err(Failure::usage(
                        format!("'{name}' is a moment: only snapshots can be served"),
                        "name a snapshot, see `weft snapshot list`",
                    ));
                }
            };
            let name = name.to_string();
            let body = AttachBody {
                target: target.to_string(),
                read_only,
                queues,
                snapshot,
            };
            let answer = client
                .post(&format!("/v1/vdis/{}/attach", segment(&name)), &body)
                .await?;
            done(client, answer, |vdi| {
                format!("VDI '{}' is attached at {target}", vdi.name)
            })
        }
        VdiCommand::Detach { name, door } => {
            let target = target(door.vhost_user, door.nbd)?;
            let body = DetachBody {
                target: target.map(|t| t.to_string()),
            };
            let answer = client
                .post(&format!("/v1/vdis/{}/detach", segment(&name)), &body)
                .await?;
            done(client, answer, |vdi| {
                format!(
                    "VDI '{}' has {} attachments left",
                    vdi.name,
                    vdi.attachments.len()
                )
            })
        }
    }
}

fn done(client: &Client, answer: serde_json::Value, say: impl FnOnce(&VdiInfo) -> String) -> Outcome<()> {
    if client.json {
        output::json(&answer);
        return Ok(());
    }
    let vdi: VdiInfo = parse(answer)?;
    output::line(&say(&vdi));
    Ok(())
}

/// The question shows what will be lost, so the VDI is looked up first; that also finds a wrong name.
async fn delete(client: &Client, name: &str, yes: bool) -> Outcome<()> {
    let path = format!("/v1/vdis/{}", segment(name));
    let vdi: VdiInfo = parse(client.get(&path).await?)?;
    let question = format!(
        "VDI '{}' and the {} of data in it will be lost",
        vdi.name,
        size(vdi.used_bytes)
    );
    output::confirm(&question, yes)?;
    client.delete(&path).await?;
    if client.json {
        output::json(&serde_json::json!({ "deleted": vdi.name }));
    } else {
        output::line(&format!("VDI '{}' is deleted", vdi.name));
    }
    Ok(())
}

/// One word, and what is left to do.
pub fn health(vdi: &VdiInfo) -> String {
    let word = match vdi.health {
        _ if vdi.deleting => return "deleting".to_owned(),
        Health::Whole => return "whole".to_owned(),
        Health::Degraded => "degraded",
        Health::Waiting => "WAITING",
    };
    format!("{word} ({} of {} shards whole)", vdi.shards_whole, vdi.shards)
}

/// VDIs, one a line.
pub fn table(vdis: &[VdiInfo], indent: usize) -> String {
    let mut table = Table::new(&[
        ("NAME", Align::Left),
        ("SIZE", Align::Right),
        ("USED", Align::Right),
        ("REPLICAS", Align::Right),
        ("HEALTH", Align::Left),
        ("ATTACHED", Align::Left),
    ]);
    for vdi in vdis {
        let doors: Vec<String> = vdi.attachments.iter().map(|a| a.target.to_string()).collect();
        table.row(vec![
            vdi.name.clone(),
            size(vdi.bytes),
            size(vdi.used_bytes),
            vdi.replicas.to_string(),
            health(vdi),
            if doors.is_empty() {
                "-".to_owned()
            } else {
                doors.join(" ")
            },
        ]);
    }
    table.render(indent)
}

fn describe(vdi: &VdiInfo) -> String {
    let mut text = output::fields(&[
        ("name", vdi.name.clone()),
        ("id", vdi.id.to_string()),
        ("created", vdi.created.to_string()),
        ("size", format!("{} ({} bytes)", size(vdi.bytes), vdi.bytes)),
        (
            "used",
            format!(
                "{} per replica, {} in all",
                size(vdi.used_bytes),
                size(vdi.stored_bytes)
            ),
        ),
        ("replicas", vdi.replicas.to_string()),
        ("sector", format!("{} bytes", vdi.sector_bytes)),
        ("shards", format!("{} of {}", vdi.shards, size(vdi.shard_bytes))),
        ("health", health(vdi)),
    ]);
    if vdi.shards_waiting > 0 {
        text.push_str(&format!(
            "writes to {} shards wait: see `weft status` for the missing disk\n",
            vdi.shards_waiting
        ));
    }
    if vdi.resync_leaves_left > 0 {
        text.push_str(&format!(
            "resync: {} still to compare\n",
            size(vdi.resync_leaves_left << 20)
        ));
    }
    if !vdi.attachments.is_empty() {
        text.push_str("\nattachments\n");
        let mut table = Table::new(&[
            ("TARGET", Align::Left),
            ("ACCESS", Align::Left),
            ("QUEUES", Align::Right),
            ("SNAPSHOT", Align::Left),
        ]);
        for a in &vdi.attachments {
            let access = if a.read_only { "read-only" } else { "read-write" };
            table.row(vec![
                a.target.to_string(),
                access.to_owned(),
                a.queues.to_string(),
                a.snapshot.as_ref().map_or("-".to_owned(), ToString::to_string),
            ]);
        }
        text.push_str(&table.render(2));
    }
    if !vdi.disks.is_empty() {
        text.push_str("\nreplicas\n");
        let mut table = Table::new(&[
            ("DISK", Align::Left),
            ("PATH", Align::Left),
            ("REPLICAS", Align::Right),
            ("IN SYNC", Align::Right),
        ]);
        for d in &vdi.disks {
            table.row(vec![
                d.disk.to_string(),
                d.path.clone(),
                d.replicas.to_string(),
                d.in_sync.to_string(),
            ]);
        }
        text.push_str(&table.render(2));
    }
    text
}
