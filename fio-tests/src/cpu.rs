//! CPU time of processes and of the machine, from /proc.

use std::time::Duration;

use anyhow::{Context, Result};

/// CPU time of one process: user and system of all its threads, those that ended and io_uring's workers too.
///
/// What interrupts and kernel workers do for it (completion of direct writes, for example) is nobody's and is
/// not here; the machine's total shows it.
pub fn of_process(pid: u32) -> Result<Duration> {
    let path = format!("/proc/{pid}/stat");
    let text = std::fs::read_to_string(&path).with_context(|| path.clone())?;
    ticks(&text, UTIME)
        .map(from_ticks)
        .with_context(|| format!("{path}: {text}"))
}

/// CPU time of the children of a process that it has waited for.
pub fn of_ended_children(pid: u32) -> Result<Duration> {
    let path = format!("/proc/{pid}/stat");
    let text = std::fs::read_to_string(&path).with_context(|| path.clone())?;
    ticks(&text, CUTIME)
        .map(from_ticks)
        .with_context(|| format!("{path}: {text}"))
}

/// Fields after the name; each has its system time behind it.
const UTIME: usize = 11;
const CUTIME: usize = 13;

fn ticks(stat: &str, user: usize) -> Option<u64> {
    // The name in parentheses may hold anything, spaces and parentheses too.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_ascii_whitespace().collect();
    Some(fields.get(user)?.parse::<u64>().ok()? + fields.get(user + 1)?.parse::<u64>().ok()?)
}

fn from_ticks(ticks: u64) -> Duration {
    Duration::from_secs(ticks) / u32::try_from(rustix::param::clock_ticks_per_second()).unwrap_or(100)
}

/// CPU time of the whole machine since it started, over all cores.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Machine {
    /// Spent on anything.
    pub busy: Duration,
    /// Wanted, but the hypervisor ran something else.
    pub steal: Duration,
}

/// Reads it now.
pub fn of_machine() -> Result<Machine> {
    let text = std::fs::read_to_string("/proc/stat").context("/proc/stat")?;
    parse_machine(&text).context("/proc/stat has no line 'cpu' as expected")
}

fn parse_machine(stat: &str) -> Option<Machine> {
    let line = stat.lines().find_map(|line| line.strip_prefix("cpu "))?;
    let ticks: Vec<u64> = line
        .split_ascii_whitespace()
        .map_while(|t| t.parse().ok())
        .collect();
    let [user, nice, system, _idle, _iowait, irq, softirq, steal, ..] = ticks[..] else {
        return None;
    };
    Some(Machine {
        busy: from_ticks(user + nice + system + irq + softirq),
        steal: from_ticks(steal),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_name_cannot_confuse() {
        let stat = "7 (a) R (b)) S 1 7 7 0 -1 4194560 1 2 3 4 250 50 7 7 20 0 3 0 100 1 1";
        assert_eq!(ticks(stat, UTIME), Some(300));
        assert_eq!(ticks(stat, CUTIME), Some(14));
        assert_eq!(ticks("7 (x) S 1", UTIME), None);
    }

    #[test]
    fn idle_and_iowait_are_not_busy() {
        let machine = parse_machine("cpu  10 20 30 1000 2000 1 2 40 0 0\ncpu0 1 1\n").unwrap();
        assert_eq!(
            machine,
            Machine {
                busy: from_ticks(63),
                steal: from_ticks(40)
            }
        );
        assert_eq!(parse_machine("cpu  10 20\n"), None);
    }

    #[test]
    fn work_is_seen() {
        let before = (of_process(std::process::id()).unwrap(), of_machine().unwrap());
        let start = std::time::Instant::now();
        while start.elapsed() < Duration::from_millis(60) {}
        let after = (of_process(std::process::id()).unwrap(), of_machine().unwrap());
        assert!(after.0 > before.0);
        assert!(after.1.busy > before.1.busy);
    }
}
