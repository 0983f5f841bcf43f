//! Studies: what daemons do over minutes, and what takes more of them than the benchmark has.
//!
//! ```text
//!  memory    does the memory setting hold while a VDI is filled at random, overwritten, read?
//!  restart   SIGKILL under load; how long until it says ready, answers, reads, writes?
//!  cleaning  a disk 80 and 95 % full, overwritten at random: IOPS, write amplification, p99 over time
//!  aged      sequential reads of what was overwritten at random, before and after cleaning
//!  hosts     three daemons and a VDI with a replica on each, beside one replica; a host killed, and its return
//!  ceph      the same VDI beside an image of Ceph's
//! ```
//! Each makes its daemons, disks that are written to their last byte, and VDIs; fills them; does its work; and removes
//! everything. Data is stamped and checked as in the benchmark. Markdown goes to standard output, progress to
//! standard error, every sample to `--json`.

mod aged;
mod bed;
mod ceph;
mod cleaning;
mod hosts;
mod memory;
mod outage;
mod progress;
mod restart;
mod side_by_side;
mod watch;

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use serde::Serialize;

use crate::machine::{self, Machine};
use crate::prepare::Workspace;
use crate::priority::Priority;
use crate::weft::Place;

/// Which study.
#[derive(Debug, Subcommand)]
pub enum Study {
    /// The daemon's memory while a VDI is filled in random order, overwritten and read
    ///
    /// Example: weft-bench study memory --span 64GiB
    Memory(memory::Options),
    /// SIGKILL under load, start again: time to ready, to the first read, to the first write
    ///
    /// Example: weft-bench study restart --span 64GiB --repeats 5
    Restart(restart::Options),
    /// A nearly full disk overwritten at random: IOPS, write amplification and p99 over time
    ///
    /// Example: weft-bench study cleaning --span 8GiB --seconds 180 --picture docs/pictures/cleaning.svg
    Cleaning(cleaning::Options),
    /// Sequential reads: as written, after a random overwrite, after cleaning
    ///
    /// Example: weft-bench study aged --span 4GiB
    Aged(aged::Options),
    /// Three hosts on loopback, three replicas, beside one local replica; a host killed under load, and its return
    ///
    /// Example: weft-bench study hosts --seconds 5 --repeats 5
    Hosts(hosts::Options),
    /// Three hosts, three replicas, beside Ceph RBD on the same machine
    ///
    /// Example: weft-bench study ceph --seconds 5 --repeats 5
    Ceph(ceph::Options),
}

/// What all studies share.
#[derive(Debug, Args)]
pub struct Common {
    /// Where files and disks are made, and removed again [default: weft-bench beside this program's folder]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Where `blockd` and `weft` are [default: beside this program]
    #[arg(long, value_name = "DIR")]
    binaries: Option<PathBuf>,
    /// Of all orders and offsets
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Write everything measured here
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Give client and daemon the highest priority, on a machine that others use; needs root
    #[arg(long)]
    priority: bool,
    /// Leave files, sockets and logs
    #[arg(long)]
    keep: bool,
}

/// Folders and circumstances of a study; folders go when this is dropped.
struct Scene {
    place: Place,
    machine: Machine,
    seed: u64,
    json: Option<PathBuf>,
    // In this order: sockets and logs are the smaller loss.
    _files: Workspace,
    _sockets: Workspace,
    _priority: Option<Priority>,
}

impl Scene {
    fn set(common: &Common) -> Result<Scene> {
        let beside = std::env::current_exe()?
            .parent()
            .context("this program is in no folder")?
            .to_owned();
        let dir = match &common.dir {
            Some(dir) => dir.clone(),
            None => beside.parent().unwrap_or(&beside).join("weft-bench"),
        };
        let files = Workspace::create(&dir, common.keep)?;
        let sockets = Workspace::create(&std::env::temp_dir().join("weft-bench"), common.keep)?;
        let place = Place {
            files: files.path().to_owned(),
            sockets: sockets.path().to_owned(),
            binaries: common.binaries.clone().unwrap_or(beside),
        };
        Ok(Scene {
            machine: machine::describe(&place.files, &place.binaries),
            place,
            seed: common.seed,
            json: common.json.clone(),
            _files: files,
            _sockets: sockets,
            _priority: common.priority.then(Priority::raise).transpose()?,
        })
    }

    /// Prints `markdown` and writes `figures`.
    fn report<T: Serialize>(&self, markdown: &str, figures: &T) -> Result<()> {
        #[derive(Serialize)]
        struct Whole<'a, T> {
            machine: &'a Machine,
            command: String,
            seed: u64,
            figures: &'a T,
        }
        let command = std::env::args().collect::<Vec<_>>().join(" ");
        println!(
            "{}\nSeed {}. `{command}`\n\n{markdown}",
            self.machine.line(),
            self.seed
        );
        if let Some(path) = &self.json {
            let whole = Whole {
                machine: &self.machine,
                command,
                seed: self.seed,
                figures,
            };
            let text = serde_json::to_string_pretty(&whole)? + "\n";
            std::fs::write(path, text).with_context(|| path.display().to_string())?;
        }
        Ok(())
    }
}

/// Runs `study` and reports.
pub fn run(study: &Study) -> Result<()> {
    match study {
        Study::Memory(options) => memory::run(options),
        Study::Restart(options) => restart::run(options),
        Study::Cleaning(options) => cleaning::run(options),
        Study::Aged(options) => aged::run(options),
        Study::Hosts(options) => hosts::run(options),
        Study::Ceph(options) => ceph::run(options),
    }
}

/// Bytes as MiB, for tables.
fn mib(bytes: f64) -> String {
    format!("{:.0}", bytes / f64::from(1 << 20))
}
