//! `weft scrub`

use std::time::Duration;

use control::{ScrubBody, ScrubInfo, ScrubStatus};
use indicatif::{ProgressBar, ProgressStyle};

use crate::client::{Client, parse};
use crate::failure::{Failure, Outcome};
use crate::output::{self, Align, Table, size};

const POLL: Duration = Duration::from_millis(500);
const BLOCK_BYTES: u64 = types::BLOCK_BYTES;

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  weft scrub --vdi web01 --wait\n  weft scrub --status")]
pub struct ScrubArgs {
    /// Only this virtual disk [default: all]
    #[arg(long, value_name = "NAME")]
    vdi: Option<String>,
    /// Show progress until it is done; exit with 1 if a block has no good copy
    #[arg(long)]
    wait: bool,
    /// Start nothing, show how far scrubs are
    #[arg(long, conflicts_with_all = ["wait", "vdi"])]
    status: bool,
}

pub async fn run(client: &Client, args: ScrubArgs) -> Outcome<()> {
    let mut answer = if args.status {
        client.get("/v1/scrub").await?
    } else {
        client
            .post(
                "/v1/scrub",
                &ScrubBody {
                    vdi: args.vdi.clone(),
                },
            )
            .await?
    };
    if args.wait {
        answer = wait(client, args.vdi.as_deref()).await?;
    }
    let status: ScrubStatus = parse(answer.clone())?;
    if client.json {
        output::json(&answer);
    } else if status.scrubs.is_empty() {
        output::line("nothing was scrubbed since the daemon started");
    } else {
        output::print(&table(&status.scrubs, 0));
        if !args.wait && !args.status {
            output::line("\nit runs in the background; see `weft scrub --status`");
        }
    }
    let bad: u64 = chosen(&status, args.vdi.as_deref()).map(|s| s.unreadable).sum();
    if args.wait && bad > 0 {
        return Err(Failure::failed(
            format!("{bad} blocks have no good copy"),
            "`weft status` lists the events; restore these virtual disks from a backup",
        ));
    }
    Ok(())
}

fn chosen<'a>(status: &'a ScrubStatus, vdi: Option<&'a str>) -> impl Iterator<Item = &'a ScrubInfo> {
    status
        .scrubs
        .iter()
        .filter(move |s| vdi.is_none_or(|name| s.vdi == name))
}

/// Polls until every scrub that was asked for has ended. The bar is drawn on stderr, and only on a terminal.
async fn wait(client: &Client, vdi: Option<&str>) -> Outcome<serde_json::Value> {
    let bar = ProgressBar::new(0);
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} shards  {msg}").expect("a fixed template");
    bar.set_style(style);
    let started = tokio::time::Instant::now();
    let mut first = None;
    loop {
        let answer = client.get("/v1/scrub").await?;
        let status: ScrubStatus = parse(answer.clone())?;
        let sum = |pick: fn(&ScrubInfo) -> u64| chosen(&status, vdi).map(pick).sum::<u64>();
        let (done, total) = (sum(|s| u64::from(s.shards_done)), sum(|s| u64::from(s.shards)));
        let blocks = sum(|s| s.blocks);
        let base = *first.get_or_insert((blocks, done));
        bar.set_length(total);
        bar.set_position(done);
        bar.set_message(rate_and_left(
            started.elapsed(),
            blocks.saturating_sub(base.0),
            done.saturating_sub(base.1),
            total - done.min(total),
        ));
        if chosen(&status, vdi).all(|s| s.ended.is_some()) {
            bar.finish_and_clear();
            return Ok(answer);
        }
        tokio::time::sleep(POLL).await;
    }
}

/// `412MiB/s  3 min left`; the time left is judged by shards, since a shard's data is not known before it is read.
fn rate_and_left(elapsed: Duration, blocks: u64, shards: u64, shards_left: u64) -> String {
    let seconds = elapsed.as_secs_f64();
    if seconds < 1.0 {
        return String::new();
    }
    let rate = size((blocks as f64 * BLOCK_BYTES as f64 / seconds) as u64);
    if shards == 0 {
        return format!("{rate}/s");
    }
    let left = seconds / shards as f64 * shards_left as f64;
    format!("{rate}/s  {} left", output::duration(left))
}

/// Scrubs, one a line.
pub fn table(scrubs: &[ScrubInfo], indent: usize) -> String {
    let mut table = Table::new(&[
        ("VDI", Align::Left),
        ("STATE", Align::Left),
        ("SHARDS", Align::Right),
        ("VERIFIED", Align::Right),
        ("REPAIRED", Align::Right),
        ("UNREADABLE", Align::Right),
    ]);
    for scrub in scrubs {
        let state = match scrub.ended {
            Some(at) => format!("done {}", at.strftime("%Y-%m-%d %H:%M")),
            None => "running".to_owned(),
        };
        table.row(vec![
            scrub.vdi.clone(),
            state,
            format!("{}/{}", scrub.shards_done, scrub.shards),
            size(scrub.blocks * BLOCK_BYTES),
            scrub.repaired.to_string(),
            scrub.unreadable.to_string(),
        ]);
    }
    table.render(indent)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rate_and_time_left_follow_from_what_was_done() {
        assert_eq!(rate_and_left(Duration::from_millis(10), 1, 1, 1), "");
        assert_eq!(rate_and_left(Duration::from_secs(2), 512, 0, 5), "1MiB/s");
        assert_eq!(
            rate_and_left(Duration::from_secs(4), 1024, 2, 60),
            "1MiB/s  2 min left"
        );
        assert_eq!(output::duration(7200.0), "2.0 h");
    }
}
