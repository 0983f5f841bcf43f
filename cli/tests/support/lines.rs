//! Command lines that are wrong in one place each, made from the program's own help: for the test without a daemon, and
//! for that of a running one (blockd/tests).
#![allow(dead_code)] // each test binary uses its own part

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::process::Output;

/// Runs `weft` with these words.
pub type Run<'a> = &'a dyn Fn(&[OsString]) -> Output;

/// Right values of required arguments and options with a value, by what help calls them.
const RIGHT: &[(&str, &str)] = &[
    ("NAME", "web01"),
    ("DISK", "3f2a"),
    ("PATH", "/nonexistent/disk"),
    ("SHELL", "bash"),
    ("--socket <PATH>", "/nonexistent/s"),
    ("--size <SIZE>", "1GiB"),
    ("--shard-size <SIZE>", "1GiB"),
    ("--zone <ZONE>", "rack1"),
    ("--replicas <REPLICAS>", "2"),
    ("--sector <SECTOR>", "512"),
    ("--vhost-user <PATH>", "/run/a.sock"),
    ("--nbd <ADDRESS>", "unix:/run/a.nbd"),
    ("--queues <QUEUES>", "2"),
    ("--index <DIR>", "/nonexistent/index"),
    ("--vdi <NAME>", "web01"),
    ("--vdi <VDI>", "web01"),
    ("HOST", "host1"),
    ("DISK|FILE", "/nonexistent/disk"),
    ("--state <DIR>", "/nonexistent/state"),
    ("--without <DISK-ID>", "00000000-0000-0000-0000-000000000001"),
    ("--undelete <VDI-ID>", "1"),
    ("--etcd <URL>", "http://127.0.0.1:1"),
    ("--etcd-prefix <TEXT>", "/weft/"),
    ("--etcd-user <NAME>", "weft"),
    ("--etcd-password-file <FILE>", "/nonexistent/password"),
    ("--etcd-ca <FILE>", "/nonexistent/ca"),
    ("--etcd-cert <FILE>", "/nonexistent/cert"),
    ("--etcd-key <FILE>", "/nonexistent/key"),
    ("SOURCE", "/nonexistent/disk"),
    ("TARGET", "/nonexistent/restored"),
    ("REPOSITORY", "file:///nonexistent/backups"),
    ("BACKUP", "web01@a"),
    ("--to <REPOSITORY>", "file:///nonexistent/backups"),
    ("--name <NAME>", "web01@b"),
    ("--parent <BACKUP>", "web01@a"),
    ("--changed-in <CONTEXT>", "qemu:dirty-bitmap:a"),
    ("--key-file <PATH>", "/nonexistent/key"),
    ("--level <1..19>", "3"),
    ("--parallel <N>", "4"),
    ("--dead-after <MINUTES>", "30"),
    ("VDI", "web01"),
    ("SNAPSHOT", "web01@before"),
    ("SNAPSHOTS", "web01@before"),
    ("--with <VDI>...", "web02"),
    ("--keep <NAME>", "after"),
];

/// Every wrong line there is, but for places that `takes` does not want with a value.
pub fn wrong_lines(run: Run<'_>, takes: impl Fn(&str, &OsStr) -> bool) -> Vec<Vec<OsString>> {
    let mut found = Vec::new();
    leaves(run, "", &mut found);
    assert!(found.len() >= 19, "{} commands", found.len());
    let mut lines = Vec::new();
    for leaf in &found {
        // These need nobody to be there: one prints a script, one its own version, one makes a file of any name.
        let is_alone = ["completions", "version", "backup new-key"].contains(&leaf.path.as_str());
        let options = leaf.options.iter().map(|(option, _)| option);
        for place in options.chain(&leaf.positional) {
            let _ = right(place);
            if place.starts_with("--socket") && leaf.path != "status" {
                continue; // The same one everywhere.
            }
            for value in values() {
                if (!is_alone || place == "SHELL") && takes(place, &value) {
                    lines.push(leaf.line(place, &value));
                }
            }
        }
        let whole = leaf.line("", OsStr::new(""));
        lines.push([whole.clone(), words("--no-such-option")].concat());
        lines.push([whole.clone(), words("one two three")].concat());
        if !leaf.positional.is_empty() {
            lines.push(words(&leaf.path));
        }
        for flag in leaf.flags.iter().filter(|_| !is_alone) {
            lines.push([whole.clone(), words(&format!("{flag}=maybe"))].concat());
            lines.push([whole.clone(), words(&format!("{flag} {flag}"))].concat());
        }
    }
    for line in [
        "",
        "pool",
        "disk",
        "vdi",
        "no-such",
        "vdi no-such",
        "-x",
        "vdi -x",
        "--json",
        "pool --json",
    ] {
        lines.push(words(line));
    }
    lines
}

/// A line for the eye.
pub fn shown(line: &[OsString]) -> String {
    let words = line
        .iter()
        .map(|word| word.to_string_lossy().chars().take(40).collect());
    format!("{:?}", words.collect::<Vec<String>>())
}

pub fn words(line: &str) -> Vec<OsString> {
    line.split_whitespace().map(OsString::from).collect()
}

/// The lines of one section of a help text.
fn section(help: &str, title: &str) -> Vec<String> {
    let lines = help.lines().skip_while(|line| *line != title).skip(1);
    lines
        .take_while(|line| !line.is_empty())
        .map(str::to_owned)
        .collect()
}

#[derive(Debug)]
struct Leaf {
    path: String,
    /// Names of positional arguments; all are required.
    positional: Vec<String>,
    /// `--name <VALUE>`, and whether usage demands it.
    options: Vec<(String, bool)>,
    flags: Vec<String>,
}

fn help_of(run: Run<'_>, path: &str) -> String {
    let output = run(&words(&format!("{path} --help")));
    assert!(output.status.success(), "{path}");
    String::from_utf8(output.stdout).unwrap()
}

fn leaves(run: Run<'_>, path: &str, found: &mut Vec<Leaf>) {
    let help = help_of(run, path);
    let commands = section(&help, "Commands:");
    if commands.is_empty() {
        found.push(leaf(path, &help));
    }
    for line in commands {
        let name = line.split_whitespace().next().unwrap().to_owned();
        if name != "help" && line.starts_with("  ") && !line.starts_with("   ") {
            leaves(run, format!("{path} {name}").trim(), found);
        }
    }
}

fn leaf(path: &str, help: &str) -> Leaf {
    let usage = help.lines().find(|line| line.starts_with("Usage:")).unwrap();
    let name = |line: &String| line.trim().split(['<', '>', '[', ']']).nth(1).map(str::to_owned);
    let positional = section(help, "Arguments:")
        .iter()
        .filter(|line| line.trim().starts_with(['<', '[']))
        .filter_map(name)
        .collect();
    let mut options = Vec::new();
    let mut flags = Vec::new();
    for line in section(help, "Options:") {
        let Some(at) = line.find("--").filter(|at| *at < 8) else {
            continue;
        };
        let mut parts = line[at..].split_whitespace();
        let name = parts.next().unwrap().to_owned();
        match parts.next().filter(|value| value.starts_with('<')) {
            Some(value) => {
                let is_required =
                    usage.contains(&format!("<{name} ")) || usage.contains(&format!(" {name} "));
                options.push((format!("{name} {value}"), is_required));
            }
            None if !["--help", "--version"].contains(&name.as_str()) => flags.push(name),
            None => {}
        }
    }
    Leaf {
        path: path.to_owned(),
        positional,
        options,
        flags,
    }
}

fn right(name: &str) -> &'static str {
    let found = RIGHT.iter().find(|(known, _)| *known == name);
    found
        .unwrap_or_else(|| panic!("no right value is known for {name}"))
        .1
}

impl Leaf {
    /// A command line that is right but for `place`, which gets `value`.
    fn line(&self, place: &str, value: &OsStr) -> Vec<OsString> {
        let mut line = words(&self.path);
        let mut is_door_given = place.starts_with("--vhost-user") || place.starts_with("--nbd");
        for (option, is_required) in &self.options {
            let name = option.split(' ').next().unwrap();
            let is_door = name == "--vhost-user" || name == "--nbd";
            let is_other_door = is_door && is_door_given;
            if option == place {
                line.extend([OsString::from(name), value.to_owned()]);
            } else if *is_required && !is_other_door {
                is_door_given |= is_door;
                line.extend([OsString::from(name), right(option).into()]);
            }
        }
        for name in &self.positional {
            line.push(if name == place {
                value.to_owned()
            } else {
                right(name).into()
            });
        }
        line
    }
}

fn values() -> Vec<OsString> {
    let mut values: Vec<OsString> = [
        "",
        " ",
        "0",
        "-1",
        "--",
        "-rf",
        "--help=x",
        "18446744073709551615",
        "18446744073709551616",
        "1e308",
        "NaN",
        "0x10",
        "1.5",
        "../x",
        "..",
        "/",
        "a\nb",
        "a\u{1b}[2Jb",
        "a\u{202e}b",
        "é",
        "A B",
        "20Gigs",
        "tcp:localhost:1",
        "tcp:127.0.0.1:99999",
        "unix:relative",
        "'; drop",
    ]
    .map(OsString::from)
    .to_vec();
    values.push("x".repeat(300).into());
    values.push("x".repeat(100_000).into());
    values.push(OsStr::from_bytes(b"\xff\xfe").to_owned());
    values
}

/// What is not right about a failure.
pub fn fault(output: &Output) -> Option<String> {
    let line = String::from_utf8_lossy(&output.stderr);
    let is_one_line = line.starts_with("weft: ") && line.ends_with('\n') && line.lines().count() == 1;
    let is_clean = !line.trim_end().chars().any(char::is_control) && line.len() < 2_000 && line.len() > 20;
    let has_code = matches!(output.status.code(), Some(1..=5));
    let is_right = is_one_line && is_clean && has_code && output.stdout.is_empty();
    (!is_right).then(|| format!("{:?}: {line:.300?}", output.status.code()))
}
