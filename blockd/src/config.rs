//! The daemon's settings: flags over the TOML file over defaults. `deploy/blockd.toml` is the commented example.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Parser, ValueEnum};
use serde::Deserialize;
use types::ByteSize;

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
}

impl Settings {
    /// Reads the file named in `flags`, if any, and puts the flags over it.
    pub fn load(flags: &Flags) -> Result<Settings> {
        let file = match &flags.config {
            Some(path) => read(path)?,
            None => File::default(),
        };
        let size = |text: &Option<String>, name: &str| -> Result<Option<ByteSize>> {
            text.as_ref()
                .map(|text| text.parse().with_context(|| format!("setting '{name}'")))
                .transpose()
        };
        let cores_here = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
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
        };
        if !(1..=cores_here).contains(&settings.cores) {
            bail!(
                "setting 'cores' is {}: this machine has 1 to {cores_here}",
                settings.cores
            );
        }
        if settings.cache.0 < 8 << 20 {
            bail!(
                "setting 'cache' is {}: at least 8MiB for each disk",
                settings.cache
            );
        }
        if !(8 << 20..=64 << 30).contains(&settings.buffers.0) {
            bail!("setting 'buffers' is {}: 8MiB to 64GiB", settings.buffers);
        }
        if settings.poll > POLL_MAX {
            bail!(
                "setting 'poll_us' is {}: at most {}",
                settings.poll.as_micros(),
                POLL_MAX.as_micros()
            );
        }
        if !settings.state.is_absolute() {
            let here = std::env::current_dir().context("current directory")?;
            return Ok(Settings {
                state: here.join(&settings.state),
                ..settings
            });
        }
        Ok(settings)
    }
}

fn read(path: &Path) -> Result<File> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    toml::from_str(&text).with_context(|| format!("{} is not a blockd configuration", path.display()))
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
            ("cache = '1 parsec'", "cache"),
        ] {
            let error = format!("{:#}", with(text, &[]).expect_err(text));
            assert!(error.contains(word), "{text}: {error}");
        }
    }
}
