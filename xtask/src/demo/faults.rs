//! What happens to the cluster while the guest writes and verifies.

use std::io::{Read, Seek, SeekFrom, Write};

use anyhow::{Context, Result, bail};

use super::hosts::Hosts;
use super::network::HOSTS;
use super::{Demo, VDI, until};

/// Rounds of the guest's load that each part waits for at least: the first may have begun before what happened.
pub const ROUNDS: u32 = 3;

/// Does `action` under the guest's load and reports what the guest felt, as `what`.
pub fn watched<T>(demo: &mut Demo, what: &str, action: impl FnOnce(&mut Demo) -> Result<T>) -> Result<T> {
    demo.guest.listen()?;
    demo.guest.take_seen();
    let result = action(demo)?;
    demo.guest.listen()?;
    demo.guest.wait_rounds(ROUNDS)?;
    let seen = demo.guest.take_seen();
    demo.report.felt(what, seen);
    Ok(result)
}

/// How fast it is when nothing happens.
pub fn nothing(demo: &mut Demo) -> Result<()> {
    demo.report
        .step("The guest writes blocks, reads all of them again, compares: without end from here on");
    // The first rounds share the processor with what Debian starts beside them.
    demo.guest.wait_rounds(2 * ROUNDS)?;
    watched(demo, "nothing happens, for comparison", |demo| {
        demo.guest.wait_rounds(ROUNDS)
    })
}

/// The VDI grows, and the guest's disk with it.
pub fn the_disk_grows(demo: &mut Demo, bytes: u64) -> Result<()> {
    demo.report.step("The VDI grows; the running guest sees it");
    watched(demo, "the VDI grows", |demo| {
        demo.hosts
            .weft(1, &["vdi", "resize", VDI, "--size", &bytes.to_string()])?;
        demo.guest.wait_size(bytes)
    })
}

/// The writer's own daemon dies and is started again.
pub fn a_daemon_is_killed(demo: &mut Demo) -> Result<()> {
    demo.report
        .step("blockd on host 1, the guest's own host, is killed (SIGKILL) and started again");
    watched(demo, "its own blockd is killed and started again", |demo| {
        demo.hosts.kill_blockd(1)?;
        demo.hosts.start_blockd(1)?;
        demo.report.seen("it answers again");
        wait_in_sync(demo, 1, HOSTS)
    })
}

/// Host 2 dies and comes back.
pub fn host_2_dies(demo: &mut Demo) -> Result<()> {
    let how = if demo.hosts.network.has_cables() {
        "Host 2 dies: its cable is pulled, then blockd and etcd on it are killed"
    } else {
        "Host 2 dies: blockd and etcd on it are killed"
    };
    demo.report.step(how);
    watched(demo, "host 2 dies", |demo| {
        demo.hosts.power_off(2)?;
        wait_in_sync(demo, 1, HOSTS - 1)?;
        demo.report.seen("host 1 goes on with two copies of three");
        wait_alive(demo, HOSTS - 1)?;
        demo.report.seen("its lease has ended: it is known to be dead");
        Ok(())
    })?;
    demo.report
        .step("Host 2 comes back, its disk as it was when it died");
    watched(demo, "host 2 comes back", |demo| {
        demo.hosts.power_on(2)?;
        demo.report.seen("blockd answers");
        wait_alive(demo, HOSTS)?;
        wait_in_sync(demo, 1, HOSTS)?;
        demo.report
            .seen("three copies again: it was sent what it had missed");
        Ok(())
    })
}

/// Hosts 1 and 3 do not hear each other; host 2 hears both.
pub fn a_link_is_cut(demo: &mut Demo) -> Result<()> {
    demo.report.step(if demo.hosts.network.has_cables() {
        "The link between hosts 1 and 3 is cut; both still reach host 2"
    } else {
        "Host 3 falls silent: its blockd is stopped (SIGSTOP), for loopback has no links to cut"
    });
    watched(demo, "the link to host 3 is cut", |demo| {
        demo.hosts.cut(1, 3)?;
        wait_in_sync(demo, 1, HOSTS - 1)?;
        demo.report.seen("host 1 goes on with two copies of three");
        Ok(())
    })?;
    demo.report.step("The link is mended");
    watched(demo, "the link is mended", |demo| {
        demo.hosts.mend(1, 3)?;
        wait_in_sync(demo, 1, HOSTS)?;
        demo.report.seen("three copies again");
        wait_alive(demo, HOSTS)
    })
}

/// The member of etcd that leads is killed.
pub fn etcd_loses_its_leader(demo: &mut Demo) -> Result<()> {
    let leader = until("etcd has a leader", || Ok(demo.hosts.etcd_leader()))?;
    demo.report
        .step(&format!("etcd's leader, on host {leader}, is killed (SIGKILL)"));
    watched(demo, "etcd's leader is killed", |demo| {
        demo.hosts.kill_etcd(leader)?;
        let next = until("etcd has a new leader", || Ok(demo.hosts.etcd_leader()))?;
        demo.report.seen(&format!("the member on host {next} leads"));
        // A change of records, to show that they can be changed.
        let made = ["vdi", "create", "spare", "--size", "1GiB", "--replicas", "2"];
        until("records can be changed", || {
            let is_made = demo.hosts.try_weft(1, &made)?.status.success()
                // One that was not answered may have been made all the same.
                || demo.hosts.try_weft(1, &["vdi", "show", "spare"])?.status.success();
            Ok(is_made.then_some(()))
        })?;
        demo.report
            .seen("a new VDI can be made: the control store takes changes again");
        Ok(())
    })?;
    demo.hosts.start_etcd(leader)?;
    until("the member is back", || {
        Ok(demo.hosts.etcd_serves(leader).then_some(()))
    })?;
    demo.report.seen("the killed member is back");
    demo.hosts.weft(1, &["vdi", "delete", "spare", "--yes"]).map(drop)
}

/// Noise over the disk that the guest's reads come from; the others' copies answer and repair it.
pub fn a_disk_is_overwritten(demo: &mut Demo) -> Result<()> {
    demo.report
        .step("512 MiB of noise are written over host 1's disk, the one that the guest reads from");
    watched(demo, "its disk is overwritten with noise, and repaired", |demo| {
        overwrite_with_noise(&demo.hosts.disk(1))?;
        demo.guest.wait_rounds(ROUNDS)?;
        demo.report
            .seen("reads stay right: the other hosts' copies answer");
        let (blocks, unreadable) = scrub(&demo.hosts, 1)?;
        let repaired = demo.hosts.metric(1, "weft_blocks_repaired_total")?;
        demo.report.seen(&format!(
            "scrub verified {blocks} blocks on three hosts; {repaired} were repaired, by reads and by it"
        ));
        demo.report
            .fact("blocks repaired after the noise", repaired.to_string());
        if repaired == 0 || unreadable != 0 {
            bail!("scrub repaired {repaired} blocks and left {unreadable} unreadable");
        }
        Ok(())
    })
}

/// Verifies all replicas; returns how many blocks were read, and how many have no good copy.
pub fn scrub(hosts: &Hosts, host: usize) -> Result<(u64, u64)> {
    hosts.weft(host, &["scrub", "--vdi", VDI, "--wait"])?;
    let status = hosts.json(host, &["scrub", "--status"])?;
    let all = status["scrubs"].as_array().context("scrubs")?;
    let last = all.iter().find(|scrub| scrub["vdi"] == VDI).context("a scrub")?;
    let number = |name: &str| last[name].as_u64().with_context(|| format!("a scrub's {name}"));
    Ok((number("blocks")?, number("unreadable")?))
}

/// Waits until as many hosts as that have everything, as the VDI's writer's daemon sees it.
pub fn wait_in_sync(demo: &Demo, writer: usize, count: usize) -> Result<()> {
    until(&format!("{count} hosts are in sync"), || {
        Ok((demo.hosts.in_sync(writer, VDI)? == count).then_some(()))
    })
}

/// Waits until as many hosts as that are alive.
fn wait_alive(demo: &Demo, count: usize) -> Result<()> {
    until(&format!("{count} hosts are alive"), || {
        Ok((demo.hosts.alive(1)? == count).then_some(()))
    })
}

/// Random bytes over everything but the superblocks: what a failing controller or a stray `dd` leaves.
fn overwrite_with_noise(disk: &std::path::Path) -> Result<()> {
    // The segments the log has filled so far lie at the front; half a GiB covers most of them.
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
    Ok(target.sync_all()?)
}
