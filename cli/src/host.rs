//! `weft host`

use clap::Subcommand;
use control::HostInfo;
use serde_json::Value;

use crate::client::{Client, parse, segment};
use crate::failure::{Failure, Outcome};
use crate::output::{self, Align, Table};

#[derive(Debug, Subcommand)]
pub enum HostCommand {
    /// List all hosts of the cluster
    #[command(after_help = "Example:\n  weft host list")]
    List,
    /// Show one host
    #[command(after_help = "Example:\n  weft host show host1")]
    Show {
        /// Its name, or the beginning of its id (4 characters or more)
        host: String,
    },
    /// Move everything off a host's disks and let the disks go; the host stays
    #[command(after_help = "Example:\n  weft host drain host3")]
    Drain {
        /// Its name, or the beginning of its id (4 characters or more)
        host: String,
    },
    /// Forget a host that is gone for good; its replicas are made anew on the other hosts
    #[command(after_help = "Examples:\n  weft host remove host3\n  weft host remove host3 --force --yes")]
    Remove {
        /// Its name, or the beginning of its id (4 characters or more)
        host: String,
        /// Although a disk of it has the only good copy of something, which is lost then
        #[arg(long)]
        force: bool,
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },
}

pub async fn run(client: &Client, command: &HostCommand) -> Outcome<()> {
    let answer = client.get("/v1/hosts").await?;
    let hosts: Vec<HostInfo> = parse(answer.clone())?;
    match command {
        HostCommand::List if client.json => output::json(&answer),
        HostCommand::List if hosts.is_empty() => {
            output::line(
                "this host is a pool of its own; [cluster] in its configuration makes it join others",
            );
        }
        HostCommand::List => output::print(&table(&hosts, 0)),
        HostCommand::Drain { host } => {
            let host = &hosts[find(&hosts, host)?];
            let path = format!("/v1/hosts/{}/drain", segment(&host.id.to_string()));
            let answer = client.post(&path, &()).await?;
            say(
                client,
                &answer,
                &format!(
                    "host {} is being emptied; `weft status` shows how far it is",
                    host.name
                ),
            );
        }
        HostCommand::Remove { host, force, yes } => {
            let host = &hosts[find(&hosts, host)?];
            let mut path = format!("/v1/hosts/{}", segment(&host.id.to_string()));
            let mut question = format!("host {} with {} disks is forgotten", host.name, host.disks);
            if *force {
                path.push_str("?force=true");
                question.push_str(", with what only its disks have");
            }
            output::confirm(&question, *yes)?;
            let answer = client.delete(&path).await?;
            say(
                client,
                &answer,
                &format!("host {} leaves; `weft status` shows how far it is", host.name),
            );
        }
        HostCommand::Show { host } => {
            let index = find(&hosts, host)?;
            match answer.get(index) {
                Some(one) if client.json => output::json(one),
                _ => output::print(&describe(&hosts[index])),
            }
        }
    }
    Ok(())
}

fn say(client: &Client, answer: &Value, line: &str) {
    if client.json {
        output::json(answer);
    } else {
        output::line(line);
    }
}

/// By name, or by the beginning of its id when only one begins so.
fn find(hosts: &[HostInfo], wanted: &str) -> Outcome<usize> {
    let is_named = |host: &HostInfo| host.name == wanted;
    if let Some(index) = hosts.iter().position(is_named) {
        return Ok(index);
    }
    let begins = |host: &HostInfo| crate::disk::begins(&host.id.to_string(), wanted);
    let found: Vec<usize> = (0..hosts.len()).filter(|index| begins(&hosts[*index])).collect();
    match found[..] {
        [index] => Ok(index),
        [] => Err(Failure::not_found(
            format!("there is no host '{wanted}'"),
            "see `weft host list`",
        )),
        _ => Err(Failure::usage(
            format!("{} hosts have ids that begin with '{wanted}'", found.len()),
            "give more of it, or the name",
        )),
    }
}

fn state(host: &HostInfo) -> String {
    match (host.is_alive, host.is_this) {
        (true, true) => "alive (this one)",
        (true, false) if host.unreached.is_some() => "NOT REACHED",
        (true, false) => "alive",
        (false, _) if host.is_leaving => "leaving",
        (false, _) => "MISSING",
    }
    .to_owned()
}

/// One line a host.
pub fn table(hosts: &[HostInfo], indent: usize) -> String {
    let mut table = Table::new(&[
        ("NAME", Align::Left),
        ("STATE", Align::Left),
        ("ADDRESS", Align::Left),
        ("ZONE", Align::Left),
        ("DISKS", Align::Right),
        ("UP", Align::Right),
        ("VERSION", Align::Left),
        ("ID", Align::Left),
    ]);
    for host in hosts {
        table.row(vec![
            host.name.clone(),
            state(host),
            host.address.clone(),
            host.zone.clone(),
            host.disks.to_string(),
            host.disks_up.to_string(),
            host.version.clone(),
            host.id.to_string(),
        ]);
    }
    let mut text = table.render(indent);
    for host in hosts {
        if let Some(reason) = unreached(host) {
            // A part of it may be in the words of whoever is at that address.
            let reason: String = reason.chars().filter(|c| !c.is_control()).collect();
            let margin = " ".repeat(indent);
            text.push_str(&format!(
                "{margin}{} is not reached from here: {reason}\n",
                host.name
            ));
        }
    }
    text
}

/// Why a host that lives has no link with the one that answers.
pub fn unreached(host: &HostInfo) -> Option<&str> {
    host.unreached
        .as_deref()
        .filter(|_| host.is_alive && !host.is_this)
}

fn describe(host: &HostInfo) -> String {
    output::fields(&[
        ("name", host.name.clone()),
        ("id", host.id.to_string()),
        ("state", state(host)),
        ("address", host.address.clone()),
        ("zone", host.zone.clone()),
        ("version", host.version.clone()),
        ("joined", host.joined.to_string()),
        ("disks", format!("{}, {} up", host.disks, host.disks_up)),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hosts() -> Vec<HostInfo> {
        let host = |id: &str, name: &str, is_alive: bool| {
            serde_json::from_value::<HostInfo>(serde_json::json!({
                "id": format!("{id}f0e-52a4-4a0b-9f5e-0d1c2b3a4f01"), "name": name, "address": "10.0.0.1:7700", "zone": "",
                "version": "0.1.0", "joined": "2026-11-22T01:00:00Z", "is_alive": is_alive, "is_this": is_alive,
                "disks": 2, "disks_up": 1,
            }))
            .expect("as the daemon says it")
        };
        vec![host("5b0f6", "h1", true), host("5b0f7", "h2", false)]
    }

    #[test]
    fn a_host_is_found_by_name_or_beginning() {
        let hosts = hosts();
        assert_eq!(find(&hosts, "h2").expect("by name"), 1);
        assert_eq!(find(&hosts, "5b0f6").expect("by id"), 0);
        assert_eq!(find(&hosts, "5b0f").expect_err("two").exit as u8, 2);
        assert_eq!(find(&hosts, "h3").expect_err("none").exit as u8, 4);
        assert_eq!(find(&hosts, "").expect_err("none").exit as u8, 4);
    }

    #[test]
    fn a_host_that_is_not_reached_says_why_in_one_line() {
        let mut hosts = hosts();
        assert_eq!(table(&hosts, 0).lines().count(), 3);
        for host in &mut hosts {
            host.unreached = Some("TLS:\nno".to_owned());
        }
        // Why this one does not reach itself, or one that is dead, is no question.
        assert_eq!(table(&hosts, 0).lines().count(), 3);
        hosts[0].is_this = false;
        let text = table(&hosts, 2);
        assert!(text.contains("NOT REACHED"), "{text}");
        assert!(
            text.ends_with("\n  h1 is not reached from here: TLS:no\n"),
            "{text}"
        );
    }

    #[test]
    fn a_missing_host_is_loud() {
        let text = table(&hosts(), 0);
        assert!(
            text.contains("alive (this one)") && text.contains("MISSING"),
            "{text}"
        );
    }
}
