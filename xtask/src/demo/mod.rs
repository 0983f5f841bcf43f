//! `cargo xtask demo`: the main job on real input, start to end, with a report.
//!
//! Three hosts on this machine, each with a network namespace, a disk, blockd and a member of etcd; a VDI with a copy on
//! each; a real Debian written to it over NBD and booted from it in QEMU over vhost-user-blk. While that writes and
//! verifies, hosts die and come back, a link is cut, etcd loses its leader, a disk is overwritten with noise. At last the
//! guest's own host dies, and the guest goes on at another.

mod etcd;
mod faults;
mod guest;
mod home;
mod hosts;
pub mod image;
mod network;
mod process;
mod report;
mod takeover;
mod undo;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::packages;
use crate::run::{cargo, run};
use guest::Guest;
use home::Home;
use hosts::Hosts;
use image::Image;
use network::{HOSTS, Network};
use report::Report;

/// The guest's virtual disk.
const VDI: &str = "root";

/// How long anything in the demo may take before it counts as hung.
const PATIENCE: Duration = Duration::from_secs(240);

/// The running demo. The guest ends before the hosts do.
struct Demo {
    guest: Guest,
    hosts: Hosts,
    report: Report,
}

/// Runs the demo; with `keep`, it waits for Ctrl-C before the guest shuts down and says what can be tried meanwhile.
pub fn demo(keep: bool, on_loopback: bool) -> Result<()> {
    packages::install(packages::BUILD_AND_TEST)?;
    undo::on_signals()?;
    run(&mut cargo(&[
        "build",
        "--release",
        "--locked",
        "-p",
        "weft-blockd",
        "-p",
        "weft-cli",
    ]))?;
    let image = image::ready()?;
    let home = Home::make()?;
    let report = story(&image, &home, keep, on_loopback).context("the demo failed")?;
    home.is_no_longer_needed();
    report.print();
    Ok(())
}

fn story(image: &Image, home: &Home, keep: bool, on_loopback: bool) -> Result<Report> {
    let mut demo = set_up(image, home, on_loopback)?;
    faults::nothing(&mut demo)?;
    faults::the_disk_grows(&mut demo, image.bytes + (256 << 20))?;
    faults::a_daemon_is_killed(&mut demo)?;
    faults::host_2_dies(&mut demo)?;
    faults::a_link_is_cut(&mut demo)?;
    faults::etcd_loses_its_leader(&mut demo)?;
    faults::a_disk_is_overwritten(&mut demo)?;
    let demo = takeover::host_1_dies(demo, image)?;
    if keep {
        home.is_no_longer_needed();
        wait_for_ctrl_c(&demo);
    }
    takeover::all_is_well(demo)
}

/// Three hosts, a pool, a VDI with Debian on it, and the guest that boots from it on host 1.
fn set_up(image: &Image, home: &Home, on_loopback: bool) -> Result<Demo> {
    let mut report = Report::begin();
    let network = Network::make(on_loopback);
    report.step(if network.has_cables() {
        "Three hosts: network namespaces with a cable each to a switch; each has blockd, a disk, and a member of etcd"
    } else {
        "Three hosts: loopback addresses (no cables to pull); each has blockd, a disk, and a member of etcd"
    });
    report.seen(&format!("their disks and logs are in {}", home.path().display()));
    let hosts = Hosts::start(network, home.path())?;
    hosts.weft(1, &["pool", "create", "demo"])?;
    for host in 1..=HOSTS {
        let disk = hosts.disk(host).display().to_string();
        until("the pool is known everywhere", || {
            Ok(hosts.json(host, &["pool", "status"]).is_ok().then_some(()))
        })?;
        hosts.weft(host, &["disk", "add", &disk, "--size", "2GiB"])?;
    }
    until("all disks are seen by host 1", || {
        let disks = hosts.json(1, &["disk", "list"])?;
        let active = disks.as_array().context("a list of disks")?.iter();
        Ok((active.filter(|disk| disk["state"] == "active").count() == HOSTS).then_some(()))
    })?;
    report.seen("three hosts, three disks, one pool");

    report.step("A VDI with a copy on each host; Debian is written to it over NBD by qemu-img");
    let bytes = image.bytes.to_string();
    hosts.weft(1, &["vdi", "create", VDI, "--size", &bytes, "--replicas", "3"])?;
    image::write(image, &hosts.attach_nbd(1, VDI)?)?;
    hosts.weft(1, &["vdi", "detach", VDI])?;
    report.seen("written three times");

    report.step("Debian boots from it on host 1, in QEMU over vhost-user-blk");
    let socket = hosts.attach_vhost_user(1, VDI)?;
    let qemu = hosts.network.command(1, "qemu-system-x86_64");
    let mut guest = Guest::start(qemu, image, &socket, hosts.home(1), 0)?;
    let kernel = guest.wait_until_up()?;
    report.seen(&format!("it is up: Linux {kernel}"));
    Ok(Demo { guest, hosts, report })
}

fn wait_for_ctrl_c(demo: &Demo) -> ! {
    println!("\nLeft running, the guest on host 3. In another terminal:");
    println!("  export WEFT_SOCKET={}", demo.hosts.socket(3).display());
    println!("  {} status", hosts::binary("weft").display());
    println!(
        "  tail -f {}          # the guest's serial line",
        demo.hosts.home(3).join("guest.log").display()
    );
    println!("Ctrl-C ends it all and removes what was made.");
    loop {
        std::thread::park();
    }
}

/// Looks until `look` finds something, with pauses, for [`PATIENCE`].
fn until<T>(what: &str, mut look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let began = Instant::now();
    loop {
        if let Some(found) = look().with_context(|| format!("until {what}"))? {
            return Ok(found);
        }
        if began.elapsed() > PATIENCE {
            bail!("{what}: not within {} s", PATIENCE.as_secs());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}
