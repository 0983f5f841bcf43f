//! Host 1 dies with the guest on it, and host 3 takes over.

use std::collections::BTreeSet;

use anyhow::{Context, Result, bail};

use super::faults::{ROUNDS, scrub, wait_in_sync, watched};
use super::guest::Guest;
use super::image::{self, Image};
use super::network::HOSTS;
use super::{Demo, VDI, until};

/// The guest's host dies; the guest boots on host 3 from what was completed.
pub fn host_1_dies(demo: Demo, image: &Image) -> Result<Demo> {
    let Demo {
        guest,
        mut hosts,
        mut report,
    } = demo;
    report.step("Host 1 dies with the guest on it: blockd, etcd and QEMU");
    hosts.power_off(1)?;
    let round = guest.kill()?;
    report.seen(&format!(
        "the guest's last word was that round {round} of its load is complete"
    ));

    report.step("Its VDI is attached on host 3");
    let socket = hosts.vhost_user(3, VDI);
    let attach = [
        "vdi",
        "attach",
        VDI,
        "--vhost-user",
        &socket.display().to_string(),
    ];
    hosts.show(3, &attach);
    let mut refusals = 0;
    let mut other_reason = String::new();
    until("the dead host's lease has ended", || {
        let output = hosts.try_weft(3, &attach)?;
        if output.status.success() {
            return Ok(Some(()));
        }
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        if said.contains("attached on host host1") {
            if refusals == 0 {
                let reason = said.strip_prefix("weft: ").unwrap_or(&said);
                report.seen(&format!(
                    "refused: {}",
                    reason.replace("; ", ";\n                   ")
                ));
            }
            refusals += 1;
        } else if said != other_reason {
            report.seen(&format!("not yet: {said}"));
            other_reason = said;
        }
        Ok(None)
    })?;
    report.seen(&format!(
        "accepted, after {refusals} refusals: host 1's lease has ended"
    ));
    if refusals == 0 {
        bail!("host 3 took the VDI while host 1's lease lived");
    }

    report.step("The guest boots on host 3 and looks for what it had completed on host 1");
    let qemu = hosts.network.command(3, "qemu-system-x86_64");
    let mut guest = Guest::start(qemu, image, &socket, hosts.home(3), round)?;
    let (blocks, newer) = guest.wait_until_found()?;
    guest.wait_until_up()?;
    report.seen(&format!(
        "all {blocks} blocks are what they must be ({newer} of them written when the power went)"
    ));
    report.fact(
        "blocks looked for and found right after host 1's death",
        blocks.to_string(),
    );
    let mut demo = Demo { guest, hosts, report };
    watched(&mut demo, "just booted on host 3, while host 1 is dead", |demo| {
        demo.guest.wait_rounds(ROUNDS)
    })?;

    demo.report
        .step("Host 1 comes back: it writes the VDI no more, and is brought up to date");
    watched(&mut demo, "on host 3, host 1 comes back", |demo| {
        demo.hosts.power_on(1)?;
        demo.report.seen("blockd answers");
        wait_in_sync(demo, 3, HOSTS)?;
        demo.report.seen("three copies again");
        let shown = demo.hosts.json(1, &["vdi", "show", VDI])?;
        if shown["host"] != "host3" {
            bail!("host 1 says that {} writes the VDI", shown["host"]);
        }
        Ok(())
    })?;
    Ok(demo)
}

/// The guest ends; its file system, every block of every copy, and the copies beside each other.
pub fn all_is_well(demo: Demo) -> Result<super::report::Report> {
    let Demo {
        guest,
        hosts,
        mut report,
    } = demo;
    report.step("The guest shuts down; its file system is checked (e2fsck -fn)");
    guest.stop()?;
    hosts.weft(3, &["vdi", "detach", VDI])?;
    let uri = hosts.attach_nbd(3, VDI)?;
    report.seen(&image::check_file_system(&uri, hosts.home(3))?);

    report.step("Scrub reads and verifies every block of all three copies");
    let (blocks, unreadable) = scrub(&hosts, 3)?;
    report.seen(&format!(
        "{blocks} blocks verified, {unreadable} without a good copy"
    ));
    report.fact(
        "blocks verified by scrub at the end, on three hosts",
        blocks.to_string(),
    );
    if unreadable != 0 {
        bail!("scrub found {unreadable} blocks without a good copy");
    }
    hosts.weft(3, &["vdi", "detach", VDI])?;

    report.step("Each host in turn reads the whole VDI, each from its own disk");
    let mut digests = BTreeSet::new();
    for host in 1..=HOSTS {
        let uri = hosts.attach_nbd(host, VDI)?;
        let before = hosts.metric(host, "weft_link_received_bytes_total")?;
        let digest = image::digest(&uri)?;
        let received = hosts.metric(host, "weft_link_received_bytes_total")? - before;
        hosts.weft(host, &["vdi", "detach", VDI])?;
        report.seen(&format!(
            "host {host}: SHA-256 {}..., {} KiB came from other hosts",
            digest.get(..16).context("a digest")?,
            received >> 10
        ));
        digests.insert(digest);
    }
    if digests.len() != 1 {
        bail!("the hosts' copies differ");
    }
    report.step("All daemons drain and stop (SIGTERM)");
    // The last that read it is the one that writes it.
    hosts.stop(HOSTS)?;
    Ok(report)
}
