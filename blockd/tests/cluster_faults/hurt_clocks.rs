//! A host's clocks set back: the wall clock by a day while the daemon runs, and the clock that only goes forward
//! between two of its lives, as at every boot of a machine.
//!
//! The machine's own clock is everybody's, so the daemon gets others: the wall clock from libfaketime, which follows
//! a file; the monotonic one from a time namespace, which a process is in from its start.

use std::process::{Child, Command};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::host::Life;
use crate::world::World;

/// Of the life with the strange clocks, ahead of the machine's.
const AHEAD_S: &str = "100000";

pub fn set_back(world: &mut World, host: usize) -> Result<()> {
    let mut namespace = TimeNamespace::new()?;
    let offset = world.hosts[host].path("clock");
    std::fs::write(&offset, "+0\n")?;
    let life = Life {
        around: vec![
            "nsenter".to_owned(),
            format!("--time={}", namespace.path()),
            "--".to_owned(),
        ],
        environment: [
            ("LD_PRELOAD", "/usr/$LIB/faketime/libfaketimeMT.so.1"),
            ("FAKETIME_TIMESTAMP_FILE", &offset.display().to_string()),
            ("FAKETIME_CACHE_DURATION", "1"),
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
            ("NO_FAKE_STAT", "1"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .to_vec(),
    };
    world.hosts[host].kill()?;
    world.hosts[host].start_as(&world.network, &life)?;
    namespace.end();
    world.until_whole()?;
    std::fs::write(&offset, "-1d\n")?;
    let today = today()?;
    let name = world.vdis[0].placed.name.clone();
    world.until("the daemon's clock is a day behind", |world| {
        // Whoever is asked to scrub says when it began.
        let answer = world.hosts[host].ask("POST", "/v1/scrub", &json!({}))?;
        let mut scrubs = answer["scrubs"].as_array().context("a list")?.iter();
        let Some(started) = scrubs.find(|scrub| scrub["vdi"] == *name || scrub["vdi"].is_string()) else {
            return Ok(true); // It writes no VDI at present.
        };
        Ok(!started["started"]
            .as_str()
            .context("a moment")?
            .starts_with(&today))
    })
}

pub fn set_right(world: &mut World, host: usize) -> Result<()> {
    world.hosts[host].kill()?;
    world.hosts[host].start(&world.network)
}

fn today() -> Result<String> {
    let output = Command::new("date").args(["--utc", "+%Y-%m-%d"]).output()?;
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

/// Lives as long as a process is in it.
struct TimeNamespace {
    first: Child,
}

impl TimeNamespace {
    fn new() -> Result<TimeNamespace> {
        let first = Command::new("unshare")
            .args(["--time", "--monotonic", AHEAD_S, "--boottime", AHEAD_S])
            .args(["--fork", "--kill-child", "sleep", "600"])
            .spawn()
            .context("unshare (Debian package util-linux)")?;
        let namespace = TimeNamespace { first };
        let ours = std::fs::read_link("/proc/self/ns/time")?;
        let began = std::time::Instant::now();
        while std::fs::read_link(namespace.path()).is_ok_and(|theirs| theirs == ours) {
            ensure!(began.elapsed() < crate::PATIENCE, "no time namespace");
            std::thread::sleep(crate::RETRY);
        }
        Ok(namespace)
    }

    fn path(&self) -> String {
        format!("/proc/{}/ns/time_for_children", self.first.id())
    }

    fn end(&mut self) {
        let _ = self.first.kill();
        let _ = self.first.wait();
    }
}

impl Drop for TimeNamespace {
    fn drop(&mut self) {
        self.end();
    }
}
