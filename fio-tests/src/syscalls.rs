//! System calls of a daemon per I/O, counted by strace(1) in runs of their own: what is traced is too slow to be timed.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde::Serialize;

use crate::client::Timing;
use crate::interrupt::{Undo, undo_later};
use crate::job::{Job, PAGE};
use crate::target::Target;

/// Of each run.
const LENGTH: Duration = Duration::from_secs(1);

/// Longest wait for strace to attach.
const PATIENCE: Duration = Duration::from_secs(10);

/// Rarer ones are not in the table.
const RARE: f64 = 0.005;

/// Of one job on one target.
#[derive(Clone, Debug, Serialize)]
pub struct Counts {
    /// The job's name.
    pub job: &'static str,
    /// The target's name.
    pub target: String,
    /// I/Os that completed.
    pub ios: u64,
    /// Calls by name.
    pub calls: BTreeMap<String, u64>,
}

/// Runs every 4 KiB job once on every target with a daemon, with all its threads traced.
pub fn count(targets: &mut [Target], jobs: &[Job], seed: u64, scratch: &Path) -> Result<Vec<Counts>> {
    let mut all = Vec::new();
    for job in jobs.iter().filter(|job| job.block == PAGE) {
        for target in &mut *targets {
            let Some(pid) = target.pid() else {
                continue;
            };
            let tracer = Tracer::attach(pid, &scratch.join("strace.txt"))?;
            // No ramp: every I/O counts, for every call does.
            let timing = Timing {
                ramp: Duration::ZERO,
                measured: LENGTH,
            };
            let figures = target.measure(job, timing, seed, || {})?;
            let calls = tracer.detach()?;
            eprintln!("system calls: {} {}", job.name, target.kind.name());
            all.push(Counts {
                job: job.name,
                target: target.kind.name(),
                ios: figures.ios,
                calls,
            });
        }
    }
    Ok(all)
}

/// A table of calls per I/O.
#[must_use]
pub fn markdown(all: &[Counts], jobs: &[Job]) -> String {
    let mut text = "\n| job | target | system calls per I/O | of which |\n|---|---|---|---|\n".to_owned();
    for counts in all {
        let title = jobs
            .iter()
            .find(|job| job.name == counts.job)
            .map_or(counts.job, |job| job.title);
        let per_io = |calls: u64| calls as f64 / counts.ios as f64;
        let mut by_number: Vec<(&String, &u64)> = counts.calls.iter().collect();
        by_number.sort_by_key(|(_, calls)| std::cmp::Reverse(**calls));
        let parts: Vec<String> = by_number
            .into_iter()
            .filter(|(_, calls)| per_io(**calls) >= RARE)
            .map(|(name, calls)| format!("{name} {:.2}", per_io(*calls)))
            .collect();
        let _ = writeln!(
            text,
            "| {title} | {} | {:.2} | {} |",
            counts.target,
            per_io(counts.calls.values().sum()),
            parts.join(", ")
        );
    }
    text
}

/// A running strace.
pub struct Tracer {
    child: Child,
    report: std::path::PathBuf,
    _undo: Undo,
}

impl Tracer {
    /// Traces all threads of `pid`, writing to `report` in the end.
    pub fn attach(pid: u32, report: &Path) -> Result<Tracer> {
        let child = Command::new("strace")
            .args(["-f", "-c", "-qq", "-p", &pid.to_string(), "-o"])
            .arg(report)
            .stdin(Stdio::null())
            .spawn()
            .context("cannot start strace, which --syscalls needs")?;
        let strace = Pid::from_child(&child);
        let mut tracer = Tracer {
            child,
            report: report.to_owned(),
            _undo: undo_later(move || {
                let _ = kill_process(strace, Signal::INT); // it ends by itself when its daemon does
            }),
        };
        let begin = Instant::now();
        while !is_traced(pid)? {
            if let Some(status) = tracer.child.try_wait()? {
                bail!("strace cannot attach ({status}): are you root?");
            }
            ensure!(
                begin.elapsed() < PATIENCE,
                "strace has not attached in {PATIENCE:?}"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(tracer)
    }

    /// strace writes its table when it is interrupted.
    /// Calls by name while it was attached.
    pub fn detach(mut self) -> Result<BTreeMap<String, u64>> {
        kill_process(Pid::from_child(&self.child), Signal::INT).context("strace has ended")?;
        self.child.wait()?;
        let text = std::fs::read_to_string(&self.report).context("strace's report")?;
        parse(&text)
    }
}

/// Every thread of `pid` has a tracer.
fn is_traced(pid: u32) -> Result<bool> {
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let status = std::fs::read_to_string(task?.path().join("status")).unwrap_or_default();
        let tracer = status.lines().find_map(|line| line.strip_prefix("TracerPid:"));
        if tracer.is_some_and(|tracer| tracer.trim() == "0") {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Lines are: share, seconds, usecs/call, calls, perhaps errors, name.
fn parse(report: &str) -> Result<BTreeMap<String, u64>> {
    let mut calls = BTreeMap::new();
    for line in report.lines() {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let (Some(first), Some(name)) = (fields.first(), fields.last()) else {
            continue;
        };
        if first.parse::<f64>().is_err() || *name == "total" {
            continue;
        }
        let count = fields.get(3).and_then(|count| count.parse().ok());
        calls.insert(
            (*name).to_owned(),
            count.with_context(|| format!("strace: {line}"))?,
        );
    }
    ensure!(!calls.is_empty(), "strace saw no system call: {report}");
    Ok(calls)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report_of_strace_is_read() {
        let report = "\
% time     seconds  usecs/call     calls    errors syscall
------ ----------- ----------- --------- --------- ----------------
 83.33    0.000010          10         1           io_uring_enter
 16.67    0.000002           0       120        20 write
------ ----------- ----------- --------- --------- ----------------
100.00    0.000012           0       121        20 total
";
        let calls = parse(report).unwrap();
        assert_eq!(
            calls.into_iter().collect::<Vec<_>>(),
            [("io_uring_enter".to_owned(), 1), ("write".to_owned(), 120)]
        );
        assert!(parse("").is_err());
    }
}
