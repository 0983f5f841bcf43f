//! `weft snapshot`

use std::collections::BTreeMap;

use ::snapshot::Reference;
use clap::Subcommand;
use control::{RollbackBody, SnapshotCreateBody, SnapshotInfo, SnapshotProtectBody, VdiInfo};

use crate::client::{Client, parse, segment};
use crate::failure::{Failure, Outcome};
use crate::output::{self, Align, Table, size};

#[derive(Debug, Subcommand)]
pub enum SnapshotCommand {
    /// Keep the present state of a virtual disk under a name, while guests use it
    #[command(after_help = "Examples:\n  weft snapshot create web01@before-upgrade\n  \
        weft snapshot create web01@before-upgrade --with web02 web03")]
    Create {
        /// VDI@NAME
        snapshot: String,
        /// Virtual disks that get a snapshot of the same name at the same moment: one cut through all of them
        #[arg(long, value_name = "VDI", num_args = 1..)]
        with: Vec<String>,
    },
    /// List the snapshots of a virtual disk
    #[command(after_help = "Example:\n  weft snapshot list web01")]
    List {
        /// Its name
        vdi: String,
    },
    /// Delete snapshots; the virtual disk and its other snapshots stay as they are
    #[command(after_help = "Example:\n  weft snapshot delete web01@before-upgrade --yes")]
    Delete {
        /// VDI@NAME, one or several
        #[arg(required = true)]
        snapshots: Vec<String>,
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },
    /// Make a virtual disk what it was; its present state is kept as a snapshot
    #[command(after_help = "Examples:\n  weft snapshot rollback web01@before-upgrade\n  \
        weft snapshot rollback web01@before-upgrade --keep broken --force")]
    Rollback {
        /// VDI@NAME
        snapshot: String,
        /// The name for the present state [default: before-rollback- and the time]
        #[arg(long, value_name = "NAME", conflicts_with = "discard")]
        keep: Option<String>,
        /// Do not keep the present state
        #[arg(long)]
        discard: bool,
        /// Although guests use it: hang up on them first
        #[arg(long)]
        force: bool,
        /// Do not ask, with --discard
        #[arg(long)]
        yes: bool,
    },
    /// Protect a snapshot from being deleted
    #[command(
        after_help = "Examples:\n  weft snapshot protect web01@before-upgrade\n  weft snapshot protect web01@before-upgrade --off"
    )]
    Protect {
        /// VDI@NAME
        snapshot: String,
        /// Take the protection away
        #[arg(long)]
        off: bool,
    },
}

/// VDI and snapshot, as the daemon is asked for them.
fn named(text: &str) -> Outcome<(String, String)> {
    let reference: Result<Reference, _> = text.parse();
    let (vdi, snapshot) = reference
        .and_then(Reference::snapshot)
        .map_err(|error| Failure::usage(error.to_string(), error.way_out()))?;
    Ok((vdi.to_string(), snapshot.to_string()))
}

fn path(vdi: &str, snapshot: &str) -> String {
    format!("/v1/vdis/{}/snapshots/{}", segment(vdi), segment(snapshot))
}

pub async fn run(client: &Client, command: SnapshotCommand) -> Outcome<()> {
    match command {
        SnapshotCommand::Create { snapshot, with } => create(client, &snapshot, with).await,
        SnapshotCommand::List { vdi } => {
            let answer = client
                .get(&format!("/v1/vdis/{}/snapshots", segment(&vdi)))
                .await?;
            if client.json {
                output::json(&answer);
                return Ok(());
            }
            let all: Vec<SnapshotInfo> = parse(answer)?;
            if all.is_empty() {
                output::line(&format!("VDI '{vdi}' has no snapshots"));
            } else {
                output::print(&table(&all));
            }
            Ok(())
        }
        SnapshotCommand::Delete { snapshots, yes } => delete(client, &snapshots, yes).await,
        SnapshotCommand::Rollback {
            snapshot,
            keep,
            discard,
            force,
            yes,
        } => {
            let (vdi, to) = named(&snapshot)?;
            if discard {
                output::confirm(&format!("all that VDI '{vdi}' has now will be lost"), yes)?;
            }
            let body = RollbackBody {
                to,
                keep,
                discard,
                force,
            };
            let answer = client
                .post(&format!("/v1/vdis/{}/rollback", segment(&vdi)), &body)
                .await?;
            if client.json {
                output::json(&answer);
            } else {
                let vdi: VdiInfo = parse(answer)?;
                output::line(&format!("VDI '{}' is what it was at '{snapshot}'", vdi.name));
            }
            Ok(())
        }
        SnapshotCommand::Protect { snapshot, off } => {
            let (vdi, name) = named(&snapshot)?;
            let body = SnapshotProtectBody { protected: !off };
            let answer = client
                .post(&format!("{}/protect", path(&vdi, &name)), &body)
                .await?;
            if client.json {
                output::json(&answer);
            } else {
                let word = if off { "no longer protected" } else { "protected" };
                output::line(&format!("snapshot '{snapshot}' is {word}"));
            }
            Ok(())
        }
    }
}

async fn create(client: &Client, snapshot: &str, with: Vec<String>) -> Outcome<()> {
    let (vdi, name) = named(snapshot)?;
    let all = std::iter::once(vdi).chain(with);
    let body = SnapshotCreateBody {
        snapshots: all.map(|vdi| format!("{vdi}@{name}")).collect(),
    };
    let answer = client.post("/v1/snapshots", &body).await?;
    if client.json {
        output::json(&answer);
        return Ok(());
    }
    for taken in parse::<Vec<SnapshotInfo>>(answer)? {
        output::line(&format!("snapshot '{}@{}' taken", taken.vdi, taken.name));
    }
    Ok(())
}

/// One after the other, as they were named: what is gone when one is refused was deleted before it.
async fn delete(client: &Client, snapshots: &[String], yes: bool) -> Outcome<()> {
    let named: Vec<(String, String)> = snapshots.iter().map(|text| named(text)).collect::<Outcome<_>>()?;
    let question = match snapshots {
        [one] => format!("snapshot '{one}' will be lost"),
        several => format!("{} snapshots will be lost", several.len()),
    };
    output::confirm(&question, yes)?;
    for (vdi, snapshot) in &named {
        client.delete(&path(vdi, snapshot)).await?;
        if !client.json {
            output::line(&format!("snapshot '{vdi}@{snapshot}' is deleted"));
        }
    }
    if client.json {
        output::json(&serde_json::json!({ "deleted": snapshots }));
    }
    Ok(())
}

/// One a line, each below the one it came after; those of which the present state came stand at the left, what was gone
/// back from is set in.
fn table(all: &[SnapshotInfo]) -> String {
    let mut table = Table::new(&[
        ("NAME", Align::Left),
        ("TAKEN", Align::Left),
        ("SIZE", Align::Right),
        ("PROTECTED", Align::Left),
        ("CLONES", Align::Left),
    ]);
    let mut children: BTreeMap<Option<&str>, Vec<&SnapshotInfo>> = BTreeMap::new();
    for info in all {
        let parent = info.parent.as_deref();
        // The parent of a clone's first snapshot is another VDI's.
        let parent = parent.filter(|parent| all.iter().any(|other| other.name == *parent));
        children.entry(parent).or_default().push(info);
    }
    // By hand and not by recursion: thousands of snapshots can follow each other. The last one pushed comes first, so the
    // branch to the present state is pushed first and comes last.
    let mut stack: Vec<(&SnapshotInfo, usize)> = Vec::new();
    push_children(&mut stack, &mut children, None, 0);
    while let Some((info, depth)) = stack.pop() {
        table.row(vec![
            format!("{}{}", "  ".repeat(depth), info.name),
            info.created.strftime("%Y-%m-%d %H:%M:%SZ").to_string(),
            size(info.bytes),
            if info.protected { "yes" } else { "no" }.to_owned(),
            if info.clones.is_empty() {
                "-".to_owned()
            } else {
                info.clones.join(" ")
            },
        ]);
        push_children(&mut stack, &mut children, Some(&info.name), depth);
    }
    table.render(0)
}

fn push_children<'a>(
    stack: &mut Vec<(&'a SnapshotInfo, usize)>,
    children: &mut BTreeMap<Option<&'a str>, Vec<&'a SnapshotInfo>>,
    parent: Option<&'a str>,
    depth: usize,
) {
    let mut own = children.remove(&parent).unwrap_or_default();
    own.sort_by_key(|info| (!info.is_below_head, std::cmp::Reverse(info.layer)));
    for (at, info) in own.into_iter().enumerate() {
        stack.push((info, if at == 0 { depth } else { depth + 1 }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(layer: u32, name: &str, parent: Option<&str>, is_below_head: bool) -> SnapshotInfo {
        SnapshotInfo {
            vdi: "web01".to_owned(),
            name: name.to_owned(),
            created: "2026-11-21T10:15:00Z".parse().unwrap(),
            bytes: 20 << 30,
            protected: name == "a",
            parent: parent.map(str::to_owned),
            is_below_head,
            clones: Vec::new(),
            layer,
        }
    }

    #[test]
    fn a_branch_that_was_left_is_set_in() {
        let all = [
            info(0, "a", None, true),
            info(1, "b", Some("a"), false),
            info(2, "c", Some("b"), false),
            info(3, "d", Some("a"), true),
            info(4, "e", Some("d"), true),
        ];
        let text = table(&all);
        let first: Vec<&str> = text
            .lines()
            .map(|line| line.split("  2026").next().unwrap().trim_end())
            .collect();
        assert_eq!(first[1..], ["a", "  b", "  c", "d", "e"], "{text}");
    }

    #[test]
    fn ten_thousand_in_a_row_are_one_list() {
        let names: Vec<String> = (0..10_000).map(|no| format!("s{no}")).collect();
        let all: Vec<SnapshotInfo> = (0..10_000)
            .map(|no| {
                let parent = (no > 0).then(|| names[no - 1].as_str());
                info(no as u32, &names[no], parent, true)
            })
            .collect();
        let text = table(&all);
        assert_eq!(text.lines().count(), 10_001);
        assert!(text.lines().skip(1).all(|line| line.starts_with('s')));
    }
}
