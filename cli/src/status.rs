//! `weft status` and `weft version`

use control::{Health, RebalanceInfo, Severity, StatusInfo, VersionInfo};

use crate::client::{Client, parse};
use crate::failure::{Exit, Failure, Outcome};
use crate::{disk, host, output, pool, scrub, vdi};

/// Events that a person is shown; `--json` has all that the daemon keeps.
const EVENTS_SHOWN: usize = 10;

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  weft status\n  weft status --check")]
pub struct StatusArgs {
    /// Exit with 1 unless every disk is in use and every virtual disk whole
    #[arg(long)]
    check: bool,
}

pub async fn run(client: &Client, args: &StatusArgs) -> Outcome<()> {
    let answer = client.get("/v1/status").await?;
    let status: StatusInfo = parse(answer.clone())?;
    if client.json {
        output::json(&answer);
    } else {
        output::print(&describe(&status));
    }
    let troubles = troubles(&status);
    if args.check && !troubles.is_empty() {
        return Err(Failure::failed(troubles.join(", "), "see `weft status`"));
    }
    Ok(())
}

/// What is not as it should be, worst first.
fn troubles(status: &StatusInfo) -> Vec<String> {
    let mut troubles = Vec::new();
    let count = |health: Health| {
        status
            .vdis
            .iter()
            .filter(|v| v.health == health && !v.deleting)
            .count()
    };
    if status.control.unreachable_since.is_some() {
        troubles.push("etcd does not answer".to_owned());
    }
    let missing = status.hosts.iter().filter(|host| !host.is_alive).count();
    if missing > 0 {
        troubles.push(format!("missing hosts: {missing}"));
    }
    let unreached = status
        .hosts
        .iter()
        .filter(|host| host::unreached(host).is_some())
        .count();
    if unreached > 0 {
        troubles.push(format!("hosts not reached: {unreached}"));
    }
    let disks = |state: control::DiskState| status.disks.iter().filter(|d| d.state == state).count();
    for (count, what) in [
        (count(Health::Waiting), "VDIs with waiting writes"),
        (disks(control::DiskState::Failed), "failed disks"),
        (disks(control::DiskState::Missing), "missing disks"),
        (count(Health::Degraded), "degraded VDIs"),
    ] {
        if count > 0 {
            troubles.push(format!("{what}: {count}"));
        }
    }
    troubles
}

fn describe(status: &StatusInfo) -> String {
    let Some(pool) = &status.pool else {
        return "there is no pool; create one with `weft pool create NAME`\n".to_owned();
    };
    let troubles = troubles(status);
    let health = if troubles.is_empty() {
        "all is well".to_owned()
    } else {
        troubles.join(", ")
    };
    let mut text = output::fields(&[("health", health)]);
    if let Some(since) = status.control.unreachable_since {
        text.push_str(&output::fields(&[(
            "etcd",
            format!("unreachable since {since}: {}", status.control.reason),
        )]));
    }
    text.push_str(&pool::describe(pool));
    if !status.hosts.is_empty() {
        text.push_str("\nhosts\n");
        text.push_str(&host::table(&status.hosts, 2));
    }
    if !status.disks.is_empty() {
        text.push_str("\ndisks\n");
        text.push_str(&disk::table(&status.disks, 2));
    }
    if !status.vdis.is_empty() {
        text.push_str("\nVDIs\n");
        text.push_str(&vdi::table(&status.vdis, 2));
    }
    for moving in &status.moves {
        let host = moving
            .host
            .as_ref()
            .map_or_else(String::new, |host| format!(" of host {host}"));
        let left = match moving.seconds_left {
            Some(seconds) => format!(
                "{:.0} an hour, about {} left",
                moving.replicas_per_hour,
                output::duration(seconds as f64)
            ),
            None => "none has left yet".to_owned(),
        };
        text.push_str(&format!(
            "\ndisk {} ({}){host} is being emptied: {} of {} replicas left, {left}\n",
            moving.disk, moving.path, moving.replicas_left, moving.replicas
        ));
    }
    if let Some(rebalance) = &status.rebalance {
        text.push_str(&describe_rebalance(rebalance));
    }
    for resync in &status.resyncs {
        let left = output::size(resync.leaves_left << 20);
        text.push_str(&format!(
            "\nresync of '{}': {} shards, {left} still to compare\n",
            resync.vdi, resync.shards_left
        ));
    }
    if !status.scrubs.is_empty() {
        text.push_str("\nscrubs\n");
        text.push_str(&scrub::table(&status.scrubs, 2));
    }
    if !status.events.is_empty() {
        text.push_str("\nevents\n");
        for event in status.events.iter().rev().take(EVENTS_SHOWN).rev() {
            let severity = match event.severity {
                Severity::Info => "info",
                Severity::Warning => "warning",
                Severity::Critical => "CRITICAL",
            };
            let at = event.at.strftime("%Y-%m-%d %H:%M:%S");
            text.push_str(&format!("  {at}  {severity:<8}  {}\n", event.message));
        }
    }
    text
}

fn describe_rebalance(rebalance: &RebalanceInfo) -> String {
    let left = match rebalance.seconds_left {
        _ if !rebalance.waits_for.is_empty() => format!("waits: {}", rebalance.waits_for),
        Some(seconds) => format!(
            "{} a second, about {} left",
            output::size(rebalance.bytes_per_s as u64),
            output::duration(seconds as f64)
        ),
        None => "none has moved yet".to_owned(),
    };
    format!(
        "\ndisks are made evenly full: {} of {} replicas have to move yet, {}, {left}\n",
        rebalance.moves_left,
        rebalance.moves,
        output::size(rebalance.bytes_left)
    )
}

/// A daemon that does not run is no failure here: the question was about versions.
pub async fn version(client: &Client) -> Outcome<()> {
    let ours = env!("CARGO_PKG_VERSION");
    let answer = match client.get("/v1/version").await {
        Err(failure) if failure.exit == Exit::Unreachable => None,
        answer => Some(answer?),
    };
    if client.json {
        output::json(&serde_json::json!({ "weft": ours, "daemon": answer }));
        return Ok(());
    }
    let theirs = match answer.map(parse::<VersionInfo>).transpose()? {
        Some(v) => format!("{} (API {}, disk format {})", v.version, v.api, v.disk_format),
        None => "not running".to_owned(),
    };
    output::print(&output::fields(&[("weft", ours.to_owned()), ("blockd", theirs)]));
    Ok(())
}
