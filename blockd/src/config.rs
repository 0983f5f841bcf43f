//! The daemon's settings: flags over the TOML file over defaults. `deploy/blockd.toml` is the commented example.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use clap::{Parser, ValueEnum};
use serde::Deserialize;
use types::ByteSize;

use crate::cluster_config::{ClusterFile, ClusterSettings};

/// Longest configuration file.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// More index memory for one disk than this is a mistake of units.
const CACHE_BYTES_MAX: u64 = 1 << 40;
/// Longest path of the state directory: a socket in a directory in it has to fit the 107 bytes of `sun_path`.
const STATE_BYTES_MAX: usize = 88;

/// The Weft storage daemon: pools the disks of this host and serves virtual disks.
///
/// Example: blockd --state /var/lib/weft
#[derive(Parser, Debug)]
#[command(name = "blockd", version, about, long_about = None)]
pub struct Flags {
    /// State directory: control records, indexes, the REST socket `blockd.sock`. Made with mode 0700.
    #[arg(long, value_name = "DIR")]
    pub state: Option<PathBuf>,
    /// TOML file with settings; read again at SIGHUP.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Data-plane threads, each pinned to a core.
    #[arg(long, value_name = "N")]
    pub cores: Option<usize>,
    /// Memory for the index of each disk, for example 256MiB.
    #[arg(long, value_name = "SIZE")]
    pub cache: Option<ByteSize>,
    /// Most microseconds that a data-plane thread looks for news before it sleeps, while a guest keeps it busy at low
    /// depth; 0 sleeps at once.
    #[arg(long, value_name = "MICROSECONDS")]
    pub poll_us: Option<u64>,
    /// What to log: error, warn, info, debug or trace; or a filter such as `info,weft_blockd=debug`.
    #[arg(long, value_name = "LEVEL")]
    pub log: Option<String>,
    /// How to log.
    #[arg(long, value_enum)]
    pub log_format: Option<LogFormat>,
}

/// Looking longer than this for news would be keeping a core busy, not waiting.
const POLL_MAX: Duration = Duration::from_millis(10);

/// A host that is rebooted, or gets a new part, is back by then.
const REPLACE_AFTER_S: u64 = 30 * 60;

/// A tenth of a slow network.
const REPLACE_BYTES_S: u64 = 100 << 20;

/// Thirty days: more is a mistake of units.
const REPLACE_AFTER_MAX: Duration = Duration::from_secs(30 * 24 * 3600);

/// Replacing slower than this never ends.
const REPLACE_BYTES_S_MIN: u64 = 1 << 20;

/// The form of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    state: Option<PathBuf>,
    cores: Option<usize>,
    cache: Option<String>,
    buffers: Option<String>,
    poll_us: Option<u64>,
    log: Option<String>,
    log_format: Option<LogFormat>,
    replace_after_s: Option<u64>,
    replace_bandwidth: Option<String>,
    rebalance: Option<bool>,
    cluster: Option<ClusterFile>,
}

/// All settings, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// See [`Flags::state`].
    pub state: PathBuf,
    /// See [`Flags::cores`].
    pub cores: usize,
    /// See [`Flags::cache`].
    pub cache: ByteSize,
    /// Pooled buffers of all planes together.
    pub buffers: ByteSize,
    /// See [`Flags::poll_us`].
    pub poll: Duration,
    /// See [`Flags::log`].
    pub log: String,
    /// See [`Flags::log_format`].
    pub log_format: LogFormat,
    /// A disk gone for so long is replaced by others; absent: never.
    pub replace_after: Option<Duration>,
    /// Bytes that are copied in a second to make replicas anew, or elsewhere.
    pub replace_bytes_s: u64,
    /// Disks that are unevenly full are made even.
    pub rebalance: bool,
    /// Absent: a pool of this host alone.
    pub cluster: Option<ClusterSettings>,
}

impl Settings {
    /// Reads the file named in `flags`, if any, and puts the flags over it.
    pub fn load(flags: &Flags) -> Result<Settings> {
        let Some(path) = &flags.config else {
            return Settings::of_bytes(flags, b"");
        };
        let bytes = read(path).with_context(|| format!("cannot read {}", shown(path)))?;
        Settings::of_bytes(flags, &bytes).with_context(|| format!("configuration {}", shown(path)))
    }

    /// The settings that a file with this content and `flags` over it make.
    pub fn of_bytes(flags: &Flags, bytes: &[u8]) -> Result<Settings> {
        let file = parse(bytes)?;
        let size = |text: &Option<String>, name: &str| -> Result<Option<ByteSize>> {
            text.as_ref()
                .map(|text| text.parse().with_context(|| format!("setting '{name}'")))
                .transpose()
        };
        let settings = Settings {
            state: flags
                .state
                .clone()
                .or(file.state)
                .unwrap_or_else(|| PathBuf::from("/var/lib/weft")),
            cores: flags.cores.or(file.cores).unwrap_or(1),
            cache: flags
                .cache
                .or(size(&file.cache, "cache")?)
                .unwrap_or(ByteSize(256 << 20)),
            buffers: size(&file.buffers, "buffers")?.unwrap_or(ByteSize(64 << 20)),
            poll: Duration::from_micros(flags.poll_us.or(file.poll_us).unwrap_or(100)),
            log: flags
                .log
                .clone()
                .or(file.log)
                .unwrap_or_else(|| "info".to_owned()),
            log_format: flags.log_format.or(file.log_format).unwrap_or(LogFormat::Text),
            replace_after: match file.replace_after_s.unwrap_or(REPLACE_AFTER_S) {
                0 => None,
                seconds => Some(Duration::from_secs(seconds)),
            },
            replace_bytes_s: size(&file.replace_bandwidth, "replace_bandwidth")?
                .map_or(REPLACE_BYTES_S, |size| size.0),
            rebalance: file.rebalance.unwrap_or(true),
            cluster: file.cluster.map(ClusterFile::check).transpose()?,
        };
        settings.check()?;
        let state = std::path::absolute(&settings.state).context("setting 'state'")?;
        if state.as_os_str().len() > STATE_BYTES_MAX {
            bail!(
                "setting 'state' has {} bytes: at most {STATE_BYTES_MAX}, or the kernel cannot bind the socket in it",
                state.as_os_str().len()
            );
        }
        Ok(Settings { state, ..settings })
    }

    fn check(&self) -> Result<()> {
        let state = self.state.as_os_str().as_encoded_bytes();
        if state.is_empty() || state.iter().any(u8::is_ascii_control) {
            bail!(
                "setting 'state' is {:?}: a directory, for example /var/lib/weft",
                self.state
            );
        }
        if self.replace_bytes_s < REPLACE_BYTES_S_MIN {
            bail!(
                "setting 'replace_bandwidth' is {}: at least {} (a second)",
                ByteSize(self.replace_bytes_s),
                ByteSize(REPLACE_BYTES_S_MIN)
            );
        }
        if self.replace_after.is_some_and(|after| after > REPLACE_AFTER_MAX) {
            bail!(
                "setting 'replace_after_s' is more than {}: 0 is never",
                REPLACE_AFTER_MAX.as_secs()
            );
        }
        let cores_here = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        if !(1..=cores_here).contains(&self.cores) {
            bail!(
                "setting 'cores' is {}: this machine has 1 to {cores_here}",
                self.cores
            );
        }
        if !(8 << 20..=CACHE_BYTES_MAX).contains(&self.cache.0) {
            bail!(
                "setting 'cache' is {}: 8MiB to {} for each disk",
                self.cache,
                ByteSize(CACHE_BYTES_MAX)
            );
        }
        if !(8 << 20..=64 << 30).contains(&self.buffers.0) {
            bail!("setting 'buffers' is {}: 8MiB to 64GiB", self.buffers);
        }
        if self.poll > POLL_MAX {
            bail!(
                "setting 'poll_us' is {}: at most {}",
                self.poll.as_micros(),
                POLL_MAX.as_micros()
            );
        }
        check_log(&self.log)
    }
}

/// A misspelt level would be taken for the name of a module, and nothing would be logged: every part without `=`
/// has to be a level.
fn check_log(filter: &str) -> Result<()> {
    const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
    let is_level = |text: &str| LEVELS.iter().any(|level| text.eq_ignore_ascii_case(level));
    for part in filter.split(',').map(str::trim) {
        let level = part.rsplit_once('=').map_or(part, |(_, level)| level);
        if !is_level(level) {
            let part: String = part.chars().take(80).filter(|c| !c.is_control()).collect();
            bail!("setting 'log' has '{part}': use error, warn, info, debug, trace, or MODULE=LEVEL");
        }
    }
    Ok(())
}

/// A path for a message of one line.
fn shown(path: &Path) -> String {
    let text = path.to_string_lossy();
    text.chars().take(200).filter(|c| !c.is_control()).collect()
}

/// The file's content. Only a regular file: a pipe would be waited for, a device might have no end.
fn read(path: &Path) -> Result<Vec<u8>> {
    let metadata = std::fs::metadata(path)?;
    if !metadata.is_file() {
        bail!("it is not a file");
    }
    if metadata.len() > FILE_BYTES_MAX {
        bail!(
            "it has {} bytes, at most {FILE_BYTES_MAX} are settings",
            metadata.len()
        );
    }
    let mut bytes = Vec::new();
    std::fs::File::open(path)?
        .take(FILE_BYTES_MAX)
        .read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The name that a line gives a value to, when it is one that a setting could have.
fn setting_in(line: &str) -> Option<&str> {
    let name = line.split_once('=')?.0.trim();
    let is_name = |c: char| c.is_ascii_lowercase() || c == '_';
    ((1..=40).contains(&name.len()) && name.chars().all(is_name)).then_some(name)
}

/// One line of complaint, with the number of the line in the file: TOML's own takes five.
fn parse(bytes: &[u8]) -> Result<File> {
    let Ok(text) = std::str::from_utf8(bytes) else {
        bail!("it is not text (UTF-8)");
    };
    toml::from_str(text).map_err(|error: toml::de::Error| {
        let message = error.message().replace('\n', ", ");
        let message: String = message.chars().filter(|c| !c.is_control()).take(300).collect();
        match error.span() {
            Some(span) => {
                let before = bytes.get(..span.start).unwrap_or_default();
                let line = before.iter().filter(|byte| **byte == b'\n').count() + 1;
                match setting_in(text.lines().nth(line - 1).unwrap_or_default()) {
                    Some(name) => anyhow!("line {line}, setting '{name}': {message}"),
                    None => anyhow!("line {line}: {message}"),
                }
            }
            None => anyhow!("{message}"),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(text: &str, arguments: &[&str]) -> Result<Settings> {
        let folder = tempfile::tempdir().expect("temporary folder");
        let path = folder.path().join("blockd.toml");
        std::fs::write(&path, text).expect("write");
        let path = path.to_str().expect("UTF-8").to_owned();
        let mut all = vec!["blockd", "--config", &path];
        all.extend(arguments);
        Settings::load(&Flags::try_parse_from(all)?)
    }

    #[test]
    fn flags_go_over_the_file_over_defaults() {
        let settings = with("state = '/srv/weft'\ncache = '64MiB'", &["--cache", "32MiB"]).expect("valid");
        assert_eq!(settings.state, Path::new("/srv/weft"));
        assert_eq!(settings.cache, ByteSize(32 << 20));
        assert_eq!(settings.cores, 1);
    }

    #[test]
    fn the_example_is_valid_and_wrong_settings_are_named() {
        let example = include_str!("../../deploy/blockd.toml");
        assert_eq!(
            with(example, &[]).expect("example").state,
            Path::new("/var/lib/weft")
        );
        for (text, word) in [
            ("coers = 1", "coers"),
            ("cores = 0", "cores"),
            ("poll_us = 10_001", "poll_us"),
            ("replace_after_s = 3_000_000", "replace_after_s"),
            ("replace_after_s = -1", "replace_after_s"),
            ("replace_bandwidth = '1KiB'", "replace_bandwidth"),
            ("replace_bandwidth = 'much'", "replace_bandwidth"),
            ("rebalance = 'often'", "rebalance"),
            ("cache = '1 parsec'", "cache"),
        ] {
            let error = format!("{:#}", with(text, &[]).expect_err(text));
            assert!(error.contains(word), "{text}: {error}");
        }
    }

    /// The refusal of a file with this content: one line, short, without what moves a terminal's cursor.
    fn refused(text: &str) -> String {
        let error = format!("{:#}", with(text, &[]).expect_err(text));
        assert!(
            error.len() < 700 && !error.chars().any(char::is_control),
            "{error:?}"
        );
        error
    }

    #[test]
    fn every_setting_wrong_in_every_way_is_named() {
        let long = "x".repeat(100_000);
        let deep = "[".repeat(10_000);
        for name in [
            "state",
            "cores",
            "cache",
            "buffers",
            "poll_us",
            "log",
            "log_format",
        ] {
            let strange = [
                "true",
                "[]",
                "{}",
                "1979-05-27",
                "nan",
                "99999999999999999999",
                "-1",
                "1.5",
                &deep,
            ];
            for value in strange {
                let error = refused(&format!("# a comment\n\n{name} = {value}\n"));
                assert!(
                    error.contains("line 3") || error.contains(name),
                    "{name} = {value:.20}: {error}"
                );
            }
            let texts = ["", "\\u0000", "\\u001b[2J", "\\n", &long];
            for text in texts {
                let error = refused(&format!("{name} = \"{text}\""));
                assert!(
                    error.contains("line 1") || error.contains(name),
                    "{name} = {text:.20}: {error}"
                );
            }
            let error = refused(&format!("{name} = 1\n{name} = 1\n"));
            assert!(error.contains("line"), "{name} twice: {error}");
            assert!(refused(&format!("{name}s = 1")).contains(name), "{name}s");
            assert!(refused(&format!("[{name}]\nx = 1")).contains("line "), "[{name}]");
        }
        for (text, word) in [
            ("cores = 100000", "this machine has"),
            ("cache = '1MiB'", "8MiB"),
            ("cache = '15EiB'", "cache"),
            ("cache = '9999TiB'", "1TiB"),
            ("buffers = '65GiB'", "64GiB"),
            ("log = 'infoo'", "infoo"),
            ("log = 'info,weft_blockd=loud'", "loud"),
            ("log_format = 'xml'", "xml"),
            ("= 1", "line 1"),
            ("state = '/a", "line 1"),
            (&format!("state = '/{}'", "x".repeat(100)), "at most 88"),
            ("\u{7f}ELF\u{1}", "line 1"),
        ] {
            assert!(refused(text).contains(word), "{text:.40}: {}", refused(text));
        }
        for good in [
            "log = 'info,weft_blockd=debug'",
            "log = 'WARN'",
            "log = 'off'",
            "",
            "# nothing",
        ] {
            assert!(with(good, &[]).is_ok(), "{good}");
        }
    }

    #[test]
    fn what_is_no_file_of_settings_is_refused_and_not_waited_for() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let at = |name: &str| folder.path().join(name);
        std::fs::write(at("binary"), [0xff, 0xfe, 0, 1]).expect("write");
        std::fs::File::create(at("huge"))
            .expect("create")
            .set_len(1 << 40)
            .expect("sparse");
        rustix::fs::mkfifoat(rustix::fs::CWD, at("pipe"), 0o600.into()).expect("a pipe");
        std::os::unix::fs::symlink("loop", at("loop")).expect("link");
        let missing = at("missing");
        for (path, word) in [
            (missing.as_path(), "No such file"),
            (folder.path(), "not a file"),
            (&at("pipe"), "not a file"),
            (Path::new("/dev/zero"), "not a file"),
            (&at("loop"), "symbolic links"),
            (&at("huge"), "at most 1048576"),
            (&at("binary"), "UTF-8"),
        ] {
            let flags =
                Flags::try_parse_from(["blockd", "--config", path.to_str().expect("UTF-8")]).expect("flags");
            let error = format!("{:#}", Settings::load(&flags).expect_err("no settings"));
            assert!(
                error.contains(word) && error.contains(path.to_str().expect("UTF-8")),
                "{error}"
            );
        }
    }
}
