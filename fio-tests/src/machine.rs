//! What a figure is worth without: the machine, its kernel, and the versions of what was measured.

use std::path::Path;
use std::process::Command;

use serde::Serialize;

/// Written into every report.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// Processor.
    pub cpu: String,
    /// Cores that this process may use.
    pub cores: usize,
    /// Memory in GiB.
    pub memory_gib: u64,
    /// Kernel release.
    pub kernel: String,
    /// File system of the benchmark's folder.
    pub file_system: String,
    /// Load average of the last minute at the start.
    pub load_average: String,
    /// Nice value of the client, the daemons and fio.
    pub nice: i32,
    /// Versions of the programs in play.
    pub versions: Vec<String>,
}

impl Machine {
    /// For the top of a report.
    #[must_use]
    pub fn line(&self) -> String {
        format!(
            "{}, {} cores, {} GiB, Linux {}, {}; load average at the start {}. {}.",
            self.cpu,
            self.cores,
            self.memory_gib,
            self.kernel,
            self.file_system,
            self.load_average,
            self.versions.join("; ")
        )
    }
}

/// Looks at this machine; what cannot be found out is reported as unknown.
pub fn describe(folder: &Path, binaries: &Path) -> Machine {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let value = |text: &str, key: &str| {
        let line = text.lines().find(|line| line.starts_with(key))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    let memory = value(&read("/proc/meminfo"), "MemTotal").unwrap_or_default();
    let kib: u64 = memory
        .split_ascii_whitespace()
        .next()
        .and_then(|n| n.parse().ok())
        .unwrap_or(0);
    Machine {
        cpu: value(&read("/proc/cpuinfo"), "model name").unwrap_or_else(|| "unknown".to_owned()),
        cores: std::thread::available_parallelism().map_or(0, std::num::NonZero::get),
        memory_gib: (kib + (1 << 19)) >> 20,
        kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
        file_system: file_system(folder),
        load_average: read("/proc/loadavg")
            .split_ascii_whitespace()
            .next()
            .unwrap_or("unknown")
            .to_owned(),
        nice: rustix::process::getpriority_process(None).unwrap_or(0),
        versions: [
            Path::new("qemu-storage-daemon"),
            Path::new("fio"),
            &binaries.join("blockd"),
        ]
        .into_iter()
        .map(version)
        .collect(),
    }
}

fn version(program: &Path) -> String {
    first_line(Command::new(program).arg("--version"))
        .unwrap_or_else(|| format!("{}: not there", program.file_name().unwrap_or_default().display()))
}

fn file_system(folder: &Path) -> String {
    let kind = first_line(
        Command::new("findmnt")
            .args(["-n", "-o", "FSTYPE", "-T"])
            .arg(folder),
    );
    kind.unwrap_or_else(|| "unknown".to_owned())
}

fn first_line(command: &mut Command) -> Option<String> {
    let output = command.output().ok().filter(|output| output.status.success())?;
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .next()
        .map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_is_known() {
        let machine = describe(Path::new("/"), Path::new("/nowhere"));
        assert!(machine.cores >= 1 && machine.memory_gib >= 1, "{machine:?}");
        assert!(machine.kernel.contains('.'), "{machine:?}");
        assert_eq!(machine.versions[2], "blockd: not there");
    }
}
