//! What happens in the soak. Each event does one thing to the world and says what it did; the walk checks afterwards
//! that all is well.

use std::path::Path;
use std::process::Command;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::{Done, World, full};
use crate::MIB;
use crate::hurt;
use crate::kills::{ClientKind, start_load, sweep, until_all};
use crate::load::{Disk, Load};

/// One kind of event, and its name in the log.
pub type Kind = (&'static str, fn(&mut World<'_>) -> Result<Done>);

pub const KINDS: &[Kind] = &[
    ("kill", kill),
    ("kill-twice", kill_twice),
    ("stop", stop),
    ("no-index", delete_index),
    ("superblock", damage_superblock),
    ("fsck", check_offline),
    ("noise", noise),
    ("scrub", scrub),
    ("read-all", read_all),
    ("resize", resize),
    ("vdi", create_and_delete),
    ("add-remove", add_and_remove_disk),
    ("away", disk_goes_away),
    ("disk-fails", disk_fails),
    ("full", full::fill),
];

/// The largest that a disk under load becomes.
const VDI_BYTES_MAX: u64 = 48 * MIB;

/// By reads and by scrubs, of this life.
const REPAIRED: &str = "weft_blocks_repaired_total";

fn kill(world: &mut World<'_>) -> Result<Done> {
    let answers = world.rng.below(400);
    world.go_on(answers)?;
    world.daemon.kill()?;
    world.start_daemon()?;
    Ok(Done::Did(format!("after {answers} more answers")))
}

/// Two kills, the second while the daemon starts. Returns when that was, after its start.
pub fn kill_while_starting(world: &mut World<'_>) -> Result<Duration> {
    world.daemon.kill()?;
    world.daemon.spawn(&["--cache", "16MiB"])?;
    let age = Duration::from_micros(world.rng.below(250_000));
    std::thread::sleep(age); // The moment of the fault is what is drawn.
    world.daemon.kill()?;
    world.start_daemon()?;
    Ok(age)
}

fn kill_twice(world: &mut World<'_>) -> Result<Done> {
    let age = kill_while_starting(world)?;
    Ok(Done::Did(format!(
        "the second {} ms after the start",
        age.as_millis()
    )))
}

fn stop(world: &mut World<'_>) -> Result<Done> {
    world.daemon.stop()?;
    world.start_daemon()?;
    Ok(Done::Did(String::new()))
}

/// Ends the daemon, well or not.
fn end_life(world: &mut World<'_>) -> Result<&'static str> {
    if world.rng.chance(1, 2) {
        world.daemon.stop()?;
        return Ok("stop");
    }
    world.daemon.kill()?;
    Ok("kill")
}

fn delete_index(world: &mut World<'_>) -> Result<Done> {
    let index = world.any_disk();
    let how = end_life(world)?;
    let disk = &world.disks[index];
    let folder = world.daemon.path("state/index").join(&disk.id);
    std::fs::remove_dir_all(&folder).with_context(|| folder.display().to_string())?;
    let number = disk.number;
    world.start_daemon()?;
    Ok(Done::Did(format!("{how}, index of disk {number} deleted, start")))
}

fn damage_superblock(world: &mut World<'_>) -> Result<Done> {
    use std::os::unix::fs::FileExt;
    let index = world.any_disk();
    let how = end_life(world)?;
    let copy = world.rng.below(2);
    let mut noise = [0; 4096];
    noise.fill_with(|| world.rng.draw() as u8);
    let disk = &world.disks[index];
    let file = std::fs::File::options().write(true).open(&disk.path)?;
    file.write_all_at(&noise, copy * 64 * 1024)?;
    file.sync_data()?;
    let number = disk.number;
    world.start_daemon()?;
    Ok(Done::Did(format!(
        "{how}, copy {copy} of disk {number}'s superblock damaged, start"
    )))
}

/// `weft disk fsck` on a disk that nobody serves.
pub fn fsck(weft: &Path, disk: &Path) -> Result<()> {
    let output = Command::new(weft)
        .args(["disk", "fsck"])
        .arg(disk)
        .output()
        .context("weft")?;
    ensure!(
        output.status.success(),
        "weft disk fsck {}: {}\n{}{}",
        disk.display(),
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

fn check_offline(world: &mut World<'_>) -> Result<Done> {
    let clean: Vec<usize> = (0..world.disks.len())
        .filter(|index| !world.disks[*index].had_noise)
        .collect();
    let how = end_life(world)?;
    let what = match clean.is_empty() {
        true => "every disk has had noise".to_owned(),
        false => {
            let disk = &world.disks[clean[world.rng.below(clean.len() as u64) as usize]];
            fsck(world.programs.weft, &disk.path)?;
            format!("disk {} is sound", disk.number)
        }
    };
    world.start_daemon()?;
    Ok(Done::Did(format!("{how}, {what}, start")))
}

fn noise(world: &mut World<'_>) -> Result<Done> {
    let Some(index) = world.spare_disk()? else {
        return Ok(Done::CouldNot("no disk can be spared".to_owned()));
    };
    let life = world.daemon.lives.load(Ordering::SeqCst);
    world.disks[index].has_got_noise(life);
    let path = world.disks[index].path.clone();
    let before = world.daemon.metric(REPAIRED)?;
    let bytes = hurt::overwrite_with_noise(&path, &mut world.rng)?;
    world.go_on(50)?;
    let (blocks, scrubbed) = hurt::scrub(&mut world.daemon)?;
    let repaired = world.daemon.metric(REPAIRED)? - before;
    world.repaired += repaired;
    // The gaps in its log show at the next start. Only what met them may be trusted with a single replica again.
    let how = end_life(world)?;
    world.start_daemon()?;
    world.until_whole()?;
    Ok(Done::Did(format!(
        "{} MiB over disk {}; scrub read {blocks} blocks; {repaired} repaired, {scrubbed} of them by the scrub; {how}, start",
        bytes / MIB,
        world.disks[index].number
    )))
}

fn scrub(world: &mut World<'_>) -> Result<Done> {
    let (blocks, repaired) = hurt::scrub(&mut world.daemon)?;
    world.repaired += repaired;
    Ok(Done::Did(format!("{blocks} blocks read, {repaired} repaired")))
}

fn read_all(world: &mut World<'_>) -> Result<Done> {
    sweep(&mut world.daemon, &mut world.loads)?;
    Ok(Done::Did(String::new()))
}

fn resize(world: &mut World<'_>) -> Result<Done> {
    let index = world.rng.below(world.vdis.len() as u64) as usize;
    let grown = (1 + world.rng.below(4)) * MIB;
    let vdi = &world.vdis[index];
    let bytes = vdi.disk.oracle().bytes() + grown;
    if bytes > VDI_BYTES_MAX {
        return Ok(Done::CouldNot(format!("{} is large enough", vdi.name)));
    }
    let path = format!("/v1/vdis/{}/resize", vdi.name);
    world.daemon.ask("POST", &path, &json!({"bytes": bytes}))?;
    vdi.disk.oracle().resize(bytes);
    // NBD has no news of a resize: who connects anew must find it.
    let is_of_vdi = |load: &Load| load.disk.name == vdi.name;
    let of_vdi = world.loads.iter().filter(|load| is_of_vdi(load));
    of_vdi.for_each(Load::order_reconnect);
    until_all(
        &mut world.daemon,
        &mut world.loads,
        "the new size is seen",
        |_, load| !is_of_vdi(load) || load.bytes_max() >= bytes,
    )?;
    Ok(Done::Did(format!("{} has {} MiB", vdi.name, bytes / MIB)))
}

/// A virtual disk's whole life: made, written, read, detached, deleted.
fn create_and_delete(world: &mut World<'_>) -> Result<Done> {
    let number = 100 + world.rng.below(1 << 20) as u32;
    let name = format!("guest-{number}");
    let replicas = 1 + world.rng.below(3);
    let bytes = (1 + world.rng.below(12)) * MIB;
    let body = json!({"name": name, "bytes": bytes, "replicas": replicas});
    world.daemon.ask("POST", "/v1/vdis", &body)?;
    let disk = Disk::new(number, &name, bytes, 512);
    let (kind, socket) = match world.rng.chance(1, 2) {
        true => (ClientKind::Vhost, world.daemon.attach_vhost_user(&name, 4)?),
        false => (ClientKind::Nbd, world.daemon.attach_nbd(&name)?),
    };
    let seed = world.rng.draw();
    let mut loads = [start_load(&world.daemon, &disk, kind, &socket, seed)];
    until_all(&mut world.daemon, &mut loads, "a new disk is used", |_, load| {
        load.answers() >= 300
    })?;
    if world.rng.chance(1, 2) {
        world.daemon.kill()?;
        world.start_daemon()?;
    }
    sweep(&mut world.daemon, &mut loads)?;
    loads.iter_mut().try_for_each(Load::stop)?;
    world
        .daemon
        .ask("POST", &format!("/v1/vdis/{name}/detach"), &json!({}))?;
    delete_vdi(world, &name)?;
    Ok(Done::Did(format!(
        "{name}: {} MiB, {replicas} replicas, {} answers",
        bytes / MIB,
        loads[0].answers()
    )))
}

fn delete_vdi(world: &mut World<'_>, name: &str) -> Result<()> {
    world
        .daemon
        .ask("DELETE", &format!("/v1/vdis/{name}"), &serde_json::Value::Null)?;
    wait_until_deleted(world, &format!("/v1/vdis/{name}"))
}

/// A record is gone; `path` is the API's.
pub fn wait_until_deleted(world: &mut World<'_>, path: &str) -> Result<()> {
    world.daemon.until("a deleted disk is gone", |daemon| {
        Ok(daemon.call("GET", path, None)?.0 == 404)
    })
}

/// A new disk comes, an old one is drained and goes.
fn add_and_remove_disk(world: &mut World<'_>) -> Result<Done> {
    let leaving = world.any_disk();
    let added = world.add_disk(false)?;
    let added = world.disks[added].number;
    let old = world.disks.remove(leaving);
    world.daemon.ask(
        "DELETE",
        &format!("/v1/disks/{}", old.id),
        &serde_json::Value::Null,
    )?;
    if world.rng.chance(1, 2) {
        world.go_on(20)?;
        world.daemon.kill()?;
        world.start_daemon()?;
    }
    wait_until_gone(world, &old.id)?;
    std::fs::remove_file(&old.path)?;
    Ok(Done::Did(format!(
        "disk {added} came, disk {} was drained and left",
        old.number
    )))
}

fn wait_until_gone(world: &mut World<'_>, id: &str) -> Result<()> {
    world.daemon.until("a disk has left", |daemon| {
        let disks = daemon.get("/v1/disks")?;
        Ok(disks
            .as_array()
            .context("a list")?
            .iter()
            .all(|disk| disk["id"] != id))
    })
}

/// A disk is not there at a start, and returns under the running daemon with what it had.
fn disk_goes_away(world: &mut World<'_>) -> Result<Done> {
    let Some(index) = world.spare_disk()? else {
        return Ok(Done::CouldNot("no disk can be spared".to_owned()));
    };
    let disk = &world.disks[index];
    if disk.device.is_some() {
        return Ok(Done::CouldNot(format!(
            "disk {} is a device: it stays",
            disk.number
        )));
    }
    let (here, number) = (disk.path.clone(), disk.number);
    let elsewhere = here.with_extension("away");
    let how = end_life(world)?;
    std::fs::rename(&here, &elsewhere)?;
    world.start_daemon()?;
    world.go_on(100)?;
    std::fs::rename(&elsewhere, &here)?;
    world.until_whole()?;
    Ok(Done::Did(format!(
        "{how}, disk {number} gone, start, 100 answers, and back"
    )))
}

/// A disk fails under load with all that it has, and another takes its place.
fn disk_fails(world: &mut World<'_>) -> Result<Done> {
    // One that may fail is added first; replicas move to it as another is drained.
    let leaving = world.any_disk();
    let failing = world.add_disk(true)?;
    let failing = world.disks[failing].id.clone();
    let drained = world.disks.remove(leaving);
    world.daemon.ask(
        "DELETE",
        &format!("/v1/disks/{}", drained.id),
        &serde_json::Value::Null,
    )?;
    wait_until_gone(world, &drained.id)?;
    std::fs::remove_file(&drained.path)?;
    world.until_whole()?;
    let vdis = world.daemon.get("/v1/vdis")?;
    let holds_single = vdis.as_array().context("a list")?.iter().any(|vdi| {
        let is_there = |disk: &serde_json::Value| disk["disk"] == failing.as_str();
        vdi["replicas"] == 1 && vdi["disks"].as_array().into_iter().flatten().any(is_there)
    });
    let index = world
        .disks
        .iter()
        .position(|disk| disk.id == failing)
        .context("the disk that fails")?;
    let number = world.disks[index].number;
    let what = if holds_single {
        // The only copy of something came to lie there: it is replaced before it would be a loss.
        "is replaced"
    } else {
        world.explained = &["failed", "I/O error", "error"];
        let device = world.disks[index].device.as_ref().context("a device")?;
        device.fail()?;
        world.go_on(50)?;
        "failed and was replaced"
    };
    let (new_number, body, path, device) = world.new_disk(false)?;
    let added = world.daemon.ask(
        "POST",
        &format!("/v1/disks/{failing}/replace"),
        &json!({"with": body}),
    )?;
    world.keep_disk(new_number, &added, path, device)?;
    world.until_whole()?;
    wait_until_gone(world, &failing)?;
    let old = world.disks.remove(index);
    std::fs::remove_file(&old.path)?;
    // What the daemon said of the failed disk is explained here and not in the events that follow.
    drop(old);
    world.is_well()?;
    world.daemon.stop()?;
    world.start_daemon()?;
    Ok(Done::Did(format!("disk {number} {what} by disk {new_number}")))
}
