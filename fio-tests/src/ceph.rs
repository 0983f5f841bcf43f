//! Ceph on this machine, from Debian's packages: one monitor, OSDs with bluestore on files, loopback, no authentication
//! and no manager; and fio's rbd engine as its client.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::client::Timing;
use crate::cpu;
use crate::job::Job;
use crate::process::{Daemon, require_programs};
use crate::target::{Figures, parse_fio, workload};

/// Debian's packages that bring all of it.
const PACKAGES: &str = "ceph-mon ceph-osd ceph-common fio";

/// Longest that a command of Ceph's tools may take, seconds.
const PATIENCE_S: &str = "120";

/// Of the monitor map; any will do, there is one cluster.
const FSID: &str = "6f7d2f0e-0f6a-4c3b-9a3e-6c9d7b1f0a11";

const POOL: &str = "bench";
const IMAGE: &str = "image";
const PLACEMENT_GROUPS: &str = "32";

/// A running cluster with an image; ended when dropped.
pub struct Ceph {
    osds: Vec<Daemon>,
    // After the OSDs, which would complain.
    monitor: Daemon,
    tools: Tools,
}

/// Its programs, told of its configuration.
struct Tools {
    folder: PathBuf,
    configuration: PathBuf,
}

/// What is to be made.
pub struct Wanted<'a> {
    /// Where everything lies.
    pub folder: &'a Path,
    /// OSDs, each with all of the data.
    pub osds: usize,
    /// Bytes of each OSD's file.
    pub osd_bytes: u64,
    /// Bytes of the image.
    pub image_bytes: u64,
    /// Lines of `ceph.conf` beside those that are needed.
    pub settings: &'a [String],
}

/// Fails where Ceph is not installed, with the packages to install.
pub fn require() -> Result<()> {
    require_programs(
        &["ceph-mon", "ceph-osd", "ceph", "monmaptool", "rbd", "fio"],
        PACKAGES,
    )?;
    let engines = Command::new("fio").arg("--enghelp").output().context("fio")?;
    let has_rbd = String::from_utf8_lossy(&engines.stdout)
        .lines()
        .any(|line| line.trim() == "rbd");
    ensure!(
        has_rbd,
        "this fio has no rbd engine; Debian's has: apt-get install fio"
    );
    Ok(())
}

/// Version of the OSDs.
#[must_use]
pub fn version() -> String {
    let output = Command::new("ceph-osd").arg("--version").output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
    text.unwrap_or_else(|_| "ceph unknown".to_owned())
}

impl Ceph {
    /// Starts it and makes the image; nothing is written into it yet.
    pub fn start(wanted: &Wanted<'_>) -> Result<Ceph> {
        require()?;
        let folder = wanted.folder.join("ceph");
        std::fs::create_dir(&folder).with_context(|| folder.display().to_string())?;
        let tools = Tools {
            configuration: folder.join("ceph.conf"),
            folder,
        };
        let address = tools.configure(wanted)?;
        let monitor = tools.start_monitor(&address)?;
        let osds: Result<Vec<Daemon>> = (0..wanted.osds).map(|_| tools.start_osd()).collect();
        let ceph = Ceph {
            osds: osds?,
            monitor,
            tools,
        };
        let tools = &ceph.tools;
        tools.run(
            "ceph",
            &["osd", "pool", "create", POOL, PLACEMENT_GROUPS, PLACEMENT_GROUPS],
        )?;
        let (image, bytes) = (format!("{POOL}/{IMAGE}"), format!("{}B", wanted.image_bytes));
        // Comes back when the placement groups take writes.
        tools.run(
            "rbd",
            &["create", "--size", &bytes, "--image-feature", "layering", &image],
        )?;
        Ok(ceph)
    }

    /// The processes.
    #[must_use]
    pub fn pids(&self) -> Vec<u32> {
        let osds = self.osds.iter().map(Daemon::pid);
        osds.chain([self.monitor.pid()]).collect()
    }

    /// Writes all of the image once, in order.
    pub fn fill(&self) -> Result<()> {
        self.fio(&["--name=fill", "--rw=write", "--bs=1M", "--iodepth=8"].map(str::to_owned))
            .map(drop)
    }

    /// One run; `probe` is called where it begins and where it ends. All of it counts: there is no ramp, for CPU is
    /// known for the whole run only.
    pub fn measure(&self, job: &Job, timing: Timing, seed: u64, probe: &mut dyn FnMut()) -> Result<Figures> {
        let mut arguments = vec![
            format!("--name={}", job.name),
            format!("--rw={}", workload(job)),
            format!("--bs={}", job.block),
            format!("--iodepth={}", job.depth),
            format!("--offset={}", job.zone.offset),
            format!("--size={}", job.zone.bytes),
            format!("--randseed={seed}"),
            format!("--runtime={}ms", timing.measured.as_millis()),
        ];
        let fixed = "--time_based --norandommap --randrepeat=0 --lat_percentiles=1 --clat_percentiles=0";
        arguments.extend(fixed.split_ascii_whitespace().map(str::to_owned));
        let before = children_cpu()?;
        probe();
        let report = self.fio(&arguments);
        probe();
        let mut figures = parse_fio(&report?, job.op)?;
        // fio counts its own threads only; the rbd library has more.
        figures.fio_cpu = Some(children_cpu()? - before);
        Ok(figures)
    }

    fn fio(&self, arguments: &[String]) -> Result<String> {
        let report = self.tools.folder.join("fio.json");
        let mut fio = self.tools.command("fio");
        fio.args(["--ioengine=rbd", "--clientname=admin", "--output-format=json"])
            .args([format!("--pool={POOL}"), format!("--rbdname={IMAGE}")])
            .arg(format!("--output={}", report.display()))
            .args(arguments);
        let output = fio.output().context("cannot start fio")?;
        succeeded("fio", &output).with_context(|| self.last_words())?;
        std::fs::read_to_string(&report).context("fio's report")
    }

    /// The end of each daemon's output.
    #[must_use]
    pub fn last_words(&self) -> String {
        let all = self.osds.iter().chain([&self.monitor]);
        all.map(|daemon| daemon.last_words() + "\n").collect()
    }
}

fn children_cpu() -> Result<Duration> {
    cpu::of_ended_children(std::process::id())
}

impl Tools {
    /// Writes `ceph.conf`; the monitor's address.
    fn configure(&self, wanted: &Wanted<'_>) -> Result<String> {
        let listener = TcpListener::bind("127.0.0.1:0").context("a port on 127.0.0.1")?;
        let address = format!("v2:{}", listener.local_addr()?);
        let folder = self.folder.display();
        let text = format!(
            "[global]
fsid = {FSID}
mon host = {address}
public addr = 127.0.0.1
cluster addr = 127.0.0.1
auth cluster required = none
auth service required = none
auth client required = none
osd pool default size = {}
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
osd objectstore = bluestore
bluestore block create = true
bluestore block size = {}
run dir = {folder}
log file = {folder}/$name.log
admin socket = {folder}/$name.asok
mon data = {folder}/mon
osd data = {folder}/osd-$id
rbd cache = false
{}
",
            wanted.osds,
            wanted.osd_bytes,
            wanted.settings.join("\n"),
        );
        std::fs::write(&self.configuration, text)
            .with_context(|| self.configuration.display().to_string())?;
        Ok(address)
    }

    fn start_monitor(&self, address: &str) -> Result<Daemon> {
        let map = self.folder.join("monmap").display().to_string();
        let addresses = format!("[{address}]");
        self.run(
            "monmaptool",
            &["--create", "--fsid", FSID, "--addv", "a", &addresses, &map],
        )?;
        self.run("ceph-mon", &["--mkfs", "-i", "a", "--monmap", &map])?;
        let mut monitor = self.start("ceph-mon", "a")?;
        monitor.wait_for(|| {
            self.run("ceph", &["--connect-timeout", "5", "mon", "stat"])
                .map(drop)
        })?;
        Ok(monitor)
    }

    fn start_osd(&self) -> Result<Daemon> {
        let uuid = std::fs::read_to_string("/proc/sys/kernel/random/uuid").context("a new uuid")?;
        let uuid = uuid.trim();
        let id = self.run("ceph", &["osd", "new", uuid])?;
        let id = id.trim();
        let data = self.folder.join(format!("osd-{id}"));
        std::fs::create_dir(&data).with_context(|| data.display().to_string())?;
        self.run("ceph-osd", &["-i", id, "--mkfs", "--osd-uuid", uuid])?;
        self.start("ceph-osd", id)
    }

    fn start(&self, program: &str, id: &str) -> Result<Daemon> {
        let name = format!("{program} {id}");
        let arguments = ["-f", "-i", id].map(str::to_owned);
        let environment = [("CEPH_CONF", self.configuration.as_path())];
        let log = self.folder.join(format!("{program}-{id}.out"));
        Daemon::start_with(&name, Path::new(program), &arguments, &environment, &log)
    }

    /// A program that must not outlive us.
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new("setpriv");
        command
            .args(["--pdeathsig", "KILL", "--", program])
            .env("CEPH_CONF", &self.configuration);
        command
    }

    /// What one of its tools says; fails as it does, or when it takes too long.
    fn run(&self, program: &str, arguments: &[&str]) -> Result<String> {
        let mut command = self.command("timeout");
        let output = command.args([PATIENCE_S, program]).args(arguments).output();
        let output = output.with_context(|| format!("cannot start {program}"))?;
        succeeded(&format!("{program} {}", arguments.join(" ")), &output)?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

fn succeeded(what: &str, output: &Output) -> Result<()> {
    let words = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "`{what}` failed ({}): {words}",
        output.status
    );
    Ok(())
}
