//! `cargo xtask demo`: the main job on real input, start to end, with a report.
//!
//! A pool of three disks; a 3-replica VDI; a real Debian written to it over NBD and booted from it in QEMU over
//! vhost-user-blk; blockd killed under the guest's load; a disk overwritten with noise; scrub; file system check.

mod guest;
pub mod image;
mod report;
mod weft;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::packages;
use crate::run::{cargo, root, run};
use guest::Guest;
use report::Report;
use weft::Weft;

/// Rounds of the guest's write, fsync and verify that each part of the demo waits for.
const ROUNDS: u32 = 6;

/// How often blockd is killed.
const KILLS: u32 = 3;

/// Runs the demo; with `keep`, leaves daemon and guest running and says how to go on.
pub fn demo(keep: bool) -> Result<()> {
    packages::install(packages::BUILD_AND_TEST)?;
    packages::install(packages::DEMO)?;
    packages::install_qemu_system()?;
    let mut report = Report::default();

    report.step("build blockd and weft", || {
        run(&mut cargo(&[
            "build",
            "--release",
            "--locked",
            "-p",
            "weft-blockd",
            "-p",
            "weft-cli",
        ]))
    })?;
    let cache = cache_directory();
    let image = report.step("a Debian system (kept for the next demo)", || {
        image::debian(&cache)
    })?;
    let home = tempfile_directory()?;

    let mut weft = report.step("blockd starts on an empty state directory", || Weft::start(&home))?;
    report.step("a pool of three disks", || {
        weft.cli(&["pool", "create", "demo"])?;
        for number in 1..=3 {
            let path = home.join(format!("disk{number}.img"));
            weft.cli(&["disk", "add", &path.display().to_string(), "--size", "2GiB"])?;
        }
        Ok(())
    })?;
    report.step("a VDI with three replicas", || {
        weft.cli(&[
            "vdi",
            "create",
            "root",
            "--size",
            &image.bytes.to_string(),
            "--replicas",
            "3",
        ])?;
        Ok(())
    })?;
    report.step("Debian is written to it over NBD by qemu-img", || {
        let uri = weft.attach_nbd("root")?;
        image::write(&image, &uri)?;
        weft.detach_all("root")
    })?;

    let socket = weft.attach_vhost_user("root")?;
    let mut guest = Guest::start(&image, &socket, &home)?;
    report.step("Debian boots from it over vhost-user-blk", || {
        guest.wait_until_up()
    })?;
    report.step("the guest writes, fsyncs, verifies", || guest.wait_rounds(ROUNDS))?;
    for kill in 1..=KILLS {
        report.step(
            &format!("blockd is killed (SIGKILL) under load, {kill} of {KILLS}; the guest goes on"),
            || {
                weft.kill()?;
                weft.start_again()?;
                guest.wait_rounds(ROUNDS)
            },
        )?;
    }
    report.step("the VDI grows by 1 GiB; the running guest sees it", || {
        let bytes = image.bytes + (1 << 30);
        weft.cli(&["vdi", "resize", "root", "--size", &bytes.to_string()])?;
        guest.wait_size(bytes)
    })?;
    let noise = report.step(
        "disk 2 is overwritten with noise under load; reads stay right",
        || {
            let bytes = overwrite_with_noise(&home.join("disk2.img"))?;
            guest.wait_rounds(ROUNDS)?;
            Ok(bytes)
        },
    )?;
    let scrub = report.step("scrub repairs", || weft.cli(&["scrub", "--wait", "--json"]))?;
    report.step("the guest still writes and verifies", || {
        guest.wait_rounds(ROUNDS)
    })?;
    let scrubs: serde_json::Value =
        serde_json::from_str(&scrub).context("what `weft scrub --json` printed")?;
    let figure = |name: &str| scrubs["scrubs"][0][name].as_u64().unwrap_or(0);
    report.figure("noise written over disk 2", format!("{} MiB", noise >> 20));
    report.figure(
        "blocks verified by scrub, over all replicas",
        figure("blocks").to_string(),
    );
    let repaired = weft.metric("weft_blocks_repaired_total")?;
    report.figure("blocks repaired, by reads and by scrub", repaired.to_string());
    report.figure("blocks without a good copy", figure("unreadable").to_string());
    report.figure(
        "rounds of write, fsync, verify in the guest",
        guest.rounds().to_string(),
    );
    if repaired == 0 || figure("unreadable") != 0 {
        bail!(
            "scrub repaired {repaired} blocks and left {} unreadable",
            figure("unreadable")
        );
    }
    if keep {
        report.print();
        return say_how_to_go_on(weft, guest, &home);
    }
    report.step("the guest shuts down", || guest.stop())?;
    report.step("its file system checks clean (e2fsck -fn over NBD)", || {
        weft.detach_all("root")?;
        let uri = weft.attach_nbd("root")?;
        image::check_file_system(&uri, &home)
    })?;
    report.step("blockd drains and stops (SIGTERM)", || weft.stop())?;
    report.print();
    std::fs::remove_dir_all(&home).with_context(|| format!("cannot remove {}", home.display()))
}

/// Random bytes over everything but the superblocks: what a failing controller or a stray `dd` leaves.
fn overwrite_with_noise(disk: &std::path::Path) -> Result<u64> {
    use std::io::{Read, Seek, SeekFrom, Write};
    // The segments the log has filled so far lie at the front; half a GiB covers them and much more.
    const FROM: u64 = 1 << 20;
    const BYTES: u64 = 512 << 20;
    let mut source = std::fs::File::open("/dev/urandom").context("cannot open /dev/urandom")?;
    let mut target = std::fs::File::options()
        .write(true)
        .open(disk)
        .context("cannot open the disk")?;
    target.seek(SeekFrom::Start(FROM))?;
    let mut buffer = vec![0; 1 << 20];
    for _ in 0..BYTES >> 20 {
        source.read_exact(&mut buffer)?;
        target.write_all(&buffer)?;
    }
    target.sync_all()?;
    Ok(BYTES)
}

/// Where what takes long to make is kept.
pub fn cache_directory() -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    target.join("weft-demo")
}

fn tempfile_directory() -> Result<PathBuf> {
    // Next to the build folder and not in /tmp: disks want a file system that takes direct I/O, and space.
    let home = cache_directory().join(format!("run-{}", std::process::id()));
    std::fs::create_dir_all(&home).with_context(|| format!("cannot make {}", home.display()))?;
    Ok(home)
}

fn say_how_to_go_on(weft: Weft, guest: Guest, home: &std::path::Path) -> Result<()> {
    let (daemon, machine) = (weft.leave_running(), guest.leave_running());
    println!("\nLeft running: blockd (process {daemon}) and the guest (process {machine}).");
    println!("  export WEFT_SOCKET={}/state/blockd.sock", home.display());
    println!("  {} status", weft::binary("weft").display());
    println!(
        "  tail -f {}/guest.log          # the guest's serial line",
        home.display()
    );
    println!(
        "  kill {machine} {daemon}; rm -r {}   # to end it",
        home.display()
    );
    std::io::Write::flush(&mut std::io::stdout()).context("standard output")
}

/// How long anything in the demo may take before it counts as hung.
const PATIENCE: Duration = Duration::from_secs(240);
