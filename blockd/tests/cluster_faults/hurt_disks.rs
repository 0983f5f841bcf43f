//! A host's disk put back from an older copy of it, the same disk presented twice, a disk filled to its end.

use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;

use crate::client::{Client, Op};
use crate::nbd::NbdClient;
use crate::network::HOSTS;
use crate::world::World;

/// Answers of every guest between the copy and its return: the copy is old by so much.
const LATER: u64 = 100;

fn copy_disk(world: &World, host: usize, to: &std::path::Path) -> Result<()> {
    let copied = Command::new("cp")
        .arg("--sparse=always")
        .arg(world.hosts[host].disk_path())
        .arg(to)
        .status()?;
    ensure!(copied.success(), "cp: {copied}");
    Ok(())
}

/// As after a backup of the disk was put back: noticed, said, and nothing of it is believed.
pub fn put_old_disk_back(world: &mut World, host: usize) -> Result<()> {
    let copy = world.hosts[host].path("old.img");
    world.hosts[host].kill()?;
    copy_disk(world, host, &copy)?;
    world.hosts[host].start(&world.network)?;
    let before: Vec<u64> = world.vdis.iter().map(|vdi| vdi.loads[0].answers()).collect();
    world.until("guests write more", |world| {
        let mut pairs = world.vdis.iter().zip(&before);
        Ok(pairs.all(|(vdi, before)| vdi.loads[0].answers() > before + LATER))
    })?;
    world.until_whole()?;
    world.hosts[host].kill()?;
    std::fs::rename(&copy, world.hosts[host].disk_path())?;
    let said = world.hosts[host].log().len();
    world.hosts[host].start(&world.network)?;
    let log = world.hosts[host].log();
    ensure!(
        log[said..].contains("older copy of itself"),
        "nobody noticed that the disk is an older copy"
    );
    Ok(())
}

/// A disk that a host serves is given to another one: the same file, and a copy of it.
pub fn give_disk_to_another(world: &mut World, host: usize) -> Result<()> {
    let other = (host + 1) % HOSTS;
    let copy = world.hosts[other].path("copy.img");
    copy_disk(world, host, &copy)?;
    let id = disk_of(world, host)?;
    for path in [world.hosts[host].disk_path(), copy.clone()] {
        let (code, answer) = world.hosts[other].call("POST", "/v1/disks", Some(&json!({"path": path})))?;
        ensure!(
            code == 409,
            "{} is taken by host {other}: {code} {answer}",
            path.display()
        );
        if path == copy {
            let message = answer["message"].as_str().context("a message")?;
            ensure!(
                message.contains(&id) && message.contains(&world.hosts[host].name()),
                "neither the disk nor its host is named: {message}"
            );
        }
    }
    std::fs::remove_file(copy)?;
    ensure!(disk_of(world, host)? == id, "the disk is another host's now");
    Ok(())
}

/// The id of the host's disk.
fn disk_of(world: &World, host: usize) -> Result<String> {
    let disks = world.hosts[host].get("/v1/disks")?;
    let name = world.hosts[host].name();
    let mut disks = disks.as_array().context("a list")?.iter();
    let disk = disks.find(|disk| disk["host"] == *name).context("its disk")?;
    Ok(disk["id"].as_str().context("an id")?.to_owned())
}

const FILLER: &str = "filler";
/// More than a disk of the test has, in one shard.
const FILLER_BYTES: u64 = 1000 << 20;
const PIECE: u64 = 1 << 20;

/// Somebody else's VDI, with its only replica on the host's disk, is written until there is no space.
pub fn fill(world: &mut World, host: usize) -> Result<()> {
    make_filler(world, host)?;
    let (code, answer) = world.hosts[host].attach(FILLER)?;
    ensure!(code == 200, "attach {FILLER}: {code} {answer}");
    let said = world.hosts[host].log().len();
    let mut guest = NbdClient::connect(&world.hosts[host].door(FILLER))?;
    let (mut next, mut under_way) = (0, 0);
    world.until("the disk is full", |world| {
        while next * PIECE < FILLER_BYTES && under_way < guest.depth() {
            let data = vec![next as u8 | 1; PIECE as usize];
            guest
                .submit(
                    0,
                    next,
                    &Op::Write {
                        offset: next * PIECE,
                        data,
                    },
                )
                .ok()
                .context("hung up")?;
            (next, under_way) = (next + 1, under_way + 1);
        }
        for answer in guest.reap(crate::RETRY).ok().context("hung up")? {
            answer.result.map_err(anyhow::Error::msg)?;
            under_way -= 1;
        }
        Ok(world.hosts[host].log()[said..].contains("is full: writes to it wait"))
    })?;
    world.full = Some(host);
    Ok(())
}

/// Placement chooses by the VDI's id: one after the other is made until one lies where it is to.
fn make_filler(world: &mut World, host: usize) -> Result<()> {
    let body = json!({"name": FILLER, "bytes": FILLER_BYTES, "replicas": 1});
    for _ in 0..50 {
        world.hosts[host].ask("POST", "/v1/vdis", &body)?;
        if world.holders(host, FILLER)? == [host] {
            return Ok(());
        }
        delete_filler(world, host)?;
    }
    bail!("no VDI of fifty is placed on host {host}")
}

fn delete_filler(world: &mut World, host: usize) -> Result<()> {
    let path = format!("/v1/vdis/{FILLER}");
    world.hosts[host].ask("DELETE", &path, &json!(null))?;
    world.until("the filler is gone", |world| {
        Ok(world.hosts[host].call("GET", &path, None)?.0 == 404)
    })
}

/// The filler is deleted, which makes space.
pub fn empty(world: &mut World, host: usize) -> Result<()> {
    world.hosts[host].ask("POST", &format!("/v1/vdis/{FILLER}/detach"), &json!({}))?;
    world.full = None;
    delete_filler(world, host)
}
