//! Members of etcd lost, one, two and all; all of its data; and single records spoiled by hand.

use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::WEFT;
use crate::etcd::Member;
use crate::host::{Host, Signal};
use crate::table::PAIRS;
use crate::world::World;

pub fn kill_leader(world: &mut World, _: usize) -> Result<()> {
    let leader = leader(world)?;
    world.etcd[leader].kill()?;
    changes_are_made(world)
}

pub fn stop_leader(world: &mut World, _: usize) -> Result<()> {
    let leader = leader(world)?;
    world.etcd[leader].signal(Signal::Stop)?;
    changes_are_made(world)
}

fn leader(world: &mut World) -> Result<usize> {
    let mut leader = None;
    world.until("etcd has a leader", |world| {
        leader = world.etcd.iter().position(Member::is_leader);
        Ok(leader.is_some())
    })?;
    leader.context("just seen")
}

/// A VDI can be made and deleted.
fn changes_are_made(world: &mut World) -> Result<()> {
    let body = json!({"name": "new", "bytes": 1 << 20, "replicas": 1});
    world.until("a VDI is made", |world| {
        let (code, answer) = world.hosts[0].call("POST", "/v1/vdis", Some(&body))?;
        // Asked once more after an answer that said nothing, it may be there.
        ensure!([200, 409, 503].contains(&code), "{code} {answer}");
        Ok(code != 503)
    })?;
    world.until("it is deleted", |world| {
        let (code, answer) = world.hosts[0].call("DELETE", "/v1/vdis/new", None)?;
        ensure!([204, 404, 409, 503].contains(&code), "{code} {answer}");
        Ok(code == 204 || code == 404)
    })
}

pub fn kill_majority(world: &mut World, pair: usize) -> Result<()> {
    world.etcd[PAIRS[pair].0].kill()?;
    world.etcd[PAIRS[pair].1].kill()?;
    etcd_is_missed(world)
}

pub fn kill_all(world: &mut World, _: usize) -> Result<()> {
    world.etcd.iter_mut().try_for_each(Member::kill)?;
    etcd_is_missed(world)
}

/// Every host says so, and refuses changes with the reason.
fn etcd_is_missed(world: &mut World) -> Result<()> {
    world.until("every host says that etcd is away", |world| {
        for host in &world.hosts {
            if !host.get("/v1/status")?["control"]["unreachable_since"].is_string() {
                return Ok(false);
            }
        }
        Ok(true)
    })?;
    let body = json!({"name": "new", "bytes": 1 << 20, "replicas": 1});
    let (code, answer) = world.hosts[0].call("POST", "/v1/vdis", Some(&body))?;
    ensure!(code == 503, "a VDI is made without etcd: {code} {answer}");
    Ok(())
}

pub fn start(world: &mut World, _: usize) -> Result<()> {
    for member in &mut world.etcd {
        if !member.is_up() {
            member.start(&world.network)?;
        }
    }
    changes_are_made(world)
}

pub fn go_on(world: &mut World, _: usize) -> Result<()> {
    for member in &mut world.etcd {
        if !member.is_up() {
            member.signal(Signal::Continue)?;
        }
    }
    changes_are_made(world)
}

/// Three new members without data, as after somebody made etcd anew.
pub fn wipe(world: &mut World, _: usize) -> Result<()> {
    world.etcd.iter_mut().try_for_each(Member::kill)?;
    for member in &mut world.etcd {
        member.wipe()?;
        member.start(&world.network)?;
    }
    let body = json!({"name": "new", "bytes": 1 << 20, "replicas": 1});
    world.until("every host says what is to be done", |world| {
        for host in &world.hosts {
            let (code, answer) = host.call("POST", "/v1/vdis", Some(&body))?;
            ensure!(
                code == 503,
                "a VDI is made in an etcd that lost everything: {code} {answer}"
            );
            if !answer.to_string().contains("weft pool recover") {
                return Ok(false);
            }
        }
        Ok(true)
    })
}

/// As docs/cli.md says: all daemons stopped, the records made again from the disks, the VDIs attached again.
pub fn recover_records(world: &mut World, _: usize) -> Result<()> {
    world.hosts.iter_mut().try_for_each(Host::kill)?;
    let mut sources = Vec::new();
    for host in &world.hosts[1..] {
        let exported = weft(&[
            "pool",
            "export",
            &text(&host.disk_path()),
            "--state",
            &text(&host.path("state")),
        ])?;
        let file = host.path("exported.json");
        std::fs::write(&file, exported)?;
        sources.push(text(&file));
    }
    let first = &world.hosts[0];
    let etcd: Vec<String> = world
        .etcd
        .iter()
        .map(|member| member.client_url.clone())
        .collect();
    let (disk, state, etcd) = (
        text(&first.disk_path()),
        text(&first.path("state")),
        etcd.join(","),
    );
    let mut words = vec!["pool", "recover", &disk];
    words.extend(sources.iter().map(String::as_str));
    words.extend(["--state", &state, "--etcd", &etcd, "--yes"]);
    weft(&words)?;
    for host in &mut world.hosts {
        host.start(&world.network)?;
    }
    for number in 0..world.vdis.len() {
        world.attach(number, world.vdis[number].placed.writer)?;
    }
    world.attach_debian()
}

fn text(path: &std::path::Path) -> String {
    path.display().to_string()
}

fn weft(words: &[&str]) -> Result<Vec<u8>> {
    let program = std::env::var(WEFT)?;
    let output = Command::new(program).args(words).output().context("weft")?;
    if !output.status.success() {
        bail!(
            "weft {}: {} {}",
            words.join(" "),
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(output.stdout)
}

/// Which record is spoiled, by the beginning of its key; the first of them is.
pub const RECORDS: [&str; 6] = ["vdi/", "shard/", "vdi-writer/", "disk/", "host/", "host-alive/"];

/// What is no record, in base64 as etcd's JSON has it: `{not json`.
const NO_RECORD: &str = "e25vdCBqc29u";

/// A record is spoiled by hand. What needs it is refused with its key; guests do not notice.
pub fn spoil_record(world: &mut World, kind: usize) -> Result<()> {
    let prefix = format!("/weft/{}", RECORDS[kind]);
    let range = json!({
        "key": base64(prefix.as_bytes()),
        "range_end": base64(&[prefix.as_bytes(), &[0xff]].concat()),
        "limit": 1,
    });
    let answer = world.etcd[0].ask("range", &range)?;
    let entry = &answer["kvs"][0];
    let key = entry["key"].as_str().context("a record")?;
    let lease = entry
        .get("lease")
        .and_then(Value::as_str)
        .unwrap_or("0")
        .to_owned();
    let said: Vec<usize> = world.hosts.iter().map(|host| host.log().len()).collect();
    world.etcd[0].ask("put", &json!({"key": key, "value": NO_RECORD, "lease": lease}))?;
    world.kept = vec![
        key.to_owned(),
        entry["value"].as_str().context("its value")?.to_owned(),
        lease,
    ];
    // Who has no use for it does not look at it.
    world.until("a host names the record", |world| {
        let named = format!("the control record '{}", RECORDS[kind]);
        let mut logs = world
            .hosts
            .iter()
            .zip(&said)
            .map(|(host, said)| host.log()[*said..].to_owned());
        Ok(logs.any(|log| log.contains(&named)))
    })
}

pub fn put_record_back(world: &mut World, _: usize) -> Result<()> {
    let [key, value, lease] = world.kept.as_slice() else {
        bail!("nothing was spoiled");
    };
    world.etcd[0].ask("put", &json!({"key": key, "value": value, "lease": lease}))?;
    Ok(())
}

/// As etcd's JSON has keys and values.
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for three in bytes.chunks(3) {
        let bits = three
            .iter()
            .fold(0_u32, |bits, byte| bits << 8 | u32::from(*byte))
            << (8 * (3 - three.len()));
        for digit in 0..4 {
            let is_there = digit <= three.len();
            let index = (bits >> (18 - 6 * digit)) & 63;
            text.push(if is_there {
                char::from(DIGITS[index as usize])
            } else {
                '='
            });
        }
    }
    text
}
