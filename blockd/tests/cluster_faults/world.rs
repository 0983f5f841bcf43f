//! Three hosts, etcd and guests, and what must be so of them: while a fault lasts, and after it.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use sim::Rng;
use tempfile::TempDir;

use crate::client::Client;
use crate::debian::{Boot, Debian};
use crate::etcd::{Member, members};
use crate::host::Host;
use crate::load::{Disk, Load};
use crate::nbd::NbdClient;
use crate::network::{HOSTS, Network};
use crate::paced::{Gate, Paced};
use crate::{PATIENCE, RETRY};

const MIB: u64 = 1 << 20;
const VDI_BYTES: u64 = 8 * MIB;
const DISK_BYTES: u64 = 1 << 30;

/// Answers by which a guest shows that it is served: more than it has requests under way, so writes are among them.
const SERVED: u64 = 40;

/// A virtual disk, and where it is.
#[derive(Clone, Debug)]
pub struct Placed {
    pub name: String,
    pub replicas: usize,
    pub shards: usize,
    /// The host at which it is attached.
    pub writer: usize,
    /// The hosts that have its replicas.
    pub holders: Vec<usize>,
}

/// A virtual disk and its guests.
pub struct Vdi {
    pub placed: Placed,
    disk: Arc<Disk>,
    /// Where the first load connects next.
    door: Arc<Mutex<PathBuf>>,
    /// One that goes where the VDI goes; beside it, for a while, one that was begun at a new writer.
    pub loads: Vec<Load>,
    /// Of the first load, when the VDI was last taken over.
    pub connections_before: u64,
}

pub struct World {
    pub network: Network,
    pub etcd: Vec<Member>,
    pub hosts: Vec<Host>,
    pub vdis: Vec<Vdi>,
    /// A guest that others wrote, with disks of its own.
    pub debian: Option<Debian>,
    pub rng: Rng,
    /// The host whose disk is full.
    pub full: Option<usize>,
    /// What a fault keeps until it is mended.
    pub kept: Vec<String>,
    gate: Arc<Gate>,
    faults: u32,
    blocks_compared: u64,
    home: TempDir,
}

impl World {
    /// With a guest in QEMU if there is anything to boot it with.
    pub fn start(has_namespaces: bool, rng: Rng, boot: Option<&Boot>) -> Result<World> {
        let network = Network::start(has_namespaces)?;
        // Beside the build: /tmp may be memory.
        let home = tempfile::Builder::new()
            .prefix("faults-")
            .tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
        let mut etcd = members(&network, home.path());
        for member in &mut etcd {
            member.start(&network)?;
        }
        let urls: Vec<String> = etcd.iter().map(|member| member.client_url.clone()).collect();
        let mut hosts = Vec::new();
        for number in 0..HOSTS {
            let mut host = Host::new(&network, home.path(), number, &urls)?;
            host.start(&network)?;
            hosts.push(host);
        }
        let mut world = World {
            network,
            etcd,
            hosts,
            vdis: Vec::new(),
            debian: None,
            rng,
            full: None,
            kept: Vec::new(),
            gate: Arc::default(),
            faults: 0,
            blocks_compared: 0,
            home,
        };
        let made = world
            .make_vdis()
            .and_then(|()| boot.map_or(Ok(()), |boot| world.boot_debian(boot)));
        if let Err(error) = made.and_then(|()| world.heals()) {
            bail!("before any fault: {error:#}\n{}", world.last_words());
        }
        Ok(world)
    }

    fn make_vdis(&mut self) -> Result<()> {
        self.hosts[0].ask("POST", "/v1/pool", &json!({"name": "faults"}))?;
        for host in &self.hosts {
            let body = json!({"path": host.disk_path(), "create_bytes": DISK_BYTES});
            host.ask("POST", "/v1/disks", &body)?;
        }
        self.until("every host sees every disk", |world| world.disks_are_active())?;
        // One shard where there are two replicas: all of it on the same two hosts.
        for (number, replicas, shards) in [(0, 3, 2), (1, 2, 1), (2, 3, 2)] {
            let name = format!("vdi{number}");
            let placed = self.make_vdi(&name, number, VDI_BYTES, replicas, shards)?;
            let host = &self.hosts[number];
            let (code, answer) = host.attach(&name)?;
            ensure!(code == 200, "attach {name}: {code} {answer}");
            let disk = Disk::new(number as u32 + 1, &name, VDI_BYTES, 512);
            let door = Arc::new(Mutex::new(host.door(&name)));
            let seed = self.rng.draw();
            let load = start_load(&disk, seed, Arc::clone(&door), &self.gate);
            self.vdis.push(Vdi {
                placed,
                disk,
                door,
                loads: vec![load],
                connections_before: 0,
            });
        }
        Ok(())
    }

    /// A VDI to be written at host `writer`; it is not attached yet.
    pub fn make_vdi(
        &self,
        name: &str,
        writer: usize,
        bytes: u64,
        replicas: usize,
        shards: usize,
    ) -> Result<Placed> {
        let shard_bytes = bytes / shards as u64;
        let body = json!({"name": name, "bytes": bytes, "shard_bytes": shard_bytes, "replicas": replicas});
        self.hosts[writer].ask("POST", "/v1/vdis", &body)?;
        Ok(Placed {
            name: name.to_owned(),
            replicas,
            shards,
            writer,
            holders: self.holders(writer, name)?,
        })
    }

    /// All VDIs, our guests' and those of the one in QEMU.
    fn placed(&self) -> impl Iterator<Item = &Placed> {
        let ours = self.vdis.iter().map(|vdi| &vdi.placed);
        ours.chain(self.debian.iter().flat_map(Debian::disks))
    }

    pub fn home(&self) -> &Path {
        self.home.path()
    }

    /// The hosts with replicas of the VDI, as host `asked` sees it.
    pub fn holders(&self, asked: usize, vdi: &str) -> Result<Vec<usize>> {
        let shown = self.hosts[asked].get(&format!("/v1/vdis/{vdi}"))?;
        let disks = self.hosts[asked].get("/v1/disks")?;
        let mut holders = Vec::new();
        for held in shown["disks"].as_array().context("its disks")? {
            let disk = disks
                .as_array()
                .context("disks")?
                .iter()
                .find(|disk| disk["id"] == held["disk"]);
            let name = disk.context("a disk that is listed")?["host"]
                .as_str()
                .context("its host")?
                .to_owned();
            let host = self.hosts.iter().position(|host| host.name() == name);
            holders.push(host.with_context(|| format!("a host {name}"))?);
        }
        Ok(holders)
    }

    /// Waits for something that must come, by looking until it does. Fails as soon as a guest found something wrong,
    /// or a daemon ended by itself.
    pub fn until(&mut self, what: &str, mut is_so: impl FnMut(&mut World) -> Result<bool>) -> Result<()> {
        let start = Instant::now();
        loop {
            self.check()?;
            if is_so(self).with_context(|| what.to_owned())? {
                return Ok(());
            }
            ensure!(start.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}");
            std::thread::sleep(RETRY);
        }
    }

    fn check(&mut self) -> Result<()> {
        for load in self.vdis.iter_mut().flat_map(|vdi| &mut vdi.loads) {
            load.check()?;
        }
        if let Some(debian) = &mut self.debian {
            debian.check()?;
        }
        self.hosts.iter_mut().try_for_each(Host::check)
    }

    fn disks_are_active(&self) -> Result<bool> {
        for host in &self.hosts {
            let disks = host.get("/v1/disks")?;
            let disks = disks.as_array().context("a list")?;
            if disks.len() != HOSTS || disks.iter().any(|disk| disk["state"] != "active") {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The daemons of both run, and hear each other.
    fn is_linked(&self, a: usize, b: usize) -> bool {
        self.hosts[a].is_up() && self.hosts[b].is_up() && (a == b || self.network.is_whole(a, b))
    }

    /// The host reaches a member of etcd that reaches a majority.
    pub fn has_etcd(&self, host: usize) -> bool {
        let hears = |a: usize, b: usize| a == b || self.network.is_whole(a, b);
        let is_in_majority = |member: usize| {
            let others = (0..HOSTS).filter(|other| self.etcd[*other].is_up() && hears(member, *other));
            self.etcd[member].is_up() && others.count() > HOSTS / 2
        };
        (0..HOSTS).any(|member| hears(host, member) && is_in_majority(member))
    }

    /// Whether a VDI's guest must be served as things are: promise 5, with what docs/cluster.md says of etcd.
    pub fn must_go_on(&self, vdi: &Placed) -> bool {
        let is_there = |holder: &&usize| self.is_linked(vdi.writer, **holder) && self.full != Some(**holder);
        let there = vdi.holders.iter().filter(is_there).count();
        self.hosts[vdi.writer].is_up()
            && match vdi.replicas {
                3 => there >= 2,
                // The record must say that one is missing before the other counts alone.
                _ => there == 2 || (there == 1 && self.has_etcd(vdi.writer)),
            }
    }

    /// Every guest that must be served is.
    pub fn goes_on(&mut self) -> Result<()> {
        self.faults += 1;
        let mut expected = Vec::new();
        for vdi in &self.vdis {
            let must = self.must_go_on(&vdi.placed);
            // Of several loads the last is at the writer.
            let load = vdi.loads.last().expect("a load");
            vdi.loads.iter().for_each(|load| load.allow_waiting(true));
            if must {
                expected.push((vdi.placed.name.clone(), load.answers() + SERVED));
            }
        }
        for (name, answers) in expected {
            self.until(&format!("the guest of {name} is served"), |world| {
                let vdi = world.vdi(&name);
                Ok(vdi.loads.last().expect("a load").answers() >= answers)
            })?;
        }
        self.debian_goes_on()
    }

    pub fn vdi(&self, name: &str) -> &Vdi {
        self.vdis
            .iter()
            .find(|vdi| vdi.placed.name == name)
            .expect("a VDI of the test")
    }

    /// Everything is whole by itself, guests read everything and find it right, replicas are equal, and so on for the
    /// guest in QEMU: its file system is clean, no synced file is lost, and fio verifies all that it wrote.
    pub fn heals(&mut self) -> Result<()> {
        self.until("every host sees every host alive", |world| {
            for host in &world.hosts {
                let hosts = host.get("/v1/hosts")?;
                let hosts = hosts.as_array().context("a list")?;
                if hosts.len() != HOSTS || hosts.iter().any(|host| host["is_alive"] != true) {
                    return Ok(false);
                }
            }
            Ok(true)
        })?;
        self.until("every disk is in use", |world| world.disks_are_active())?;
        self.until_whole()?;
        self.hold_debian()?;
        self.until_all_swept()?;
        self.end_second_loads()?;
        self.until_debian_is_held()?;
        self.gate.shut(true);
        let compared = self.compare_replicas();
        self.gate.shut(false);
        compared?;
        self.let_debian_go()
    }

    pub fn until_whole(&mut self) -> Result<()> {
        self.until("every VDI is whole", |world| {
            for vdi in world.placed() {
                let shown = world.hosts[vdi.writer].get(&format!("/v1/vdis/{}", vdi.name))?;
                let disks = shown["disks"].as_array().context("its disks")?;
                let in_sync = disks.iter().filter(|disk| disk["in_sync"] == vdi.shards).count();
                if shown["health"] != "whole" || in_sync != vdi.replicas {
                    return Ok(false);
                }
            }
            Ok(true)
        })
    }

    /// Every guest reads its whole disk once, which settles what became of requests that were never answered.
    fn until_all_swept(&mut self) -> Result<()> {
        for vdi in &self.vdis {
            vdi.loads.iter().for_each(|load| load.allow_waiting(false));
        }
        let orders: Vec<Vec<u64>> = self
            .vdis
            .iter()
            .map(|vdi| vdi.loads.iter().map(Load::order_sweep).collect())
            .collect();
        self.until("every guest has read its whole disk", |world| {
            Ok(world.vdis.iter().zip(&orders).all(|(vdi, orders)| {
                vdi.loads
                    .iter()
                    .zip(orders)
                    .all(|(load, order)| load.has_swept(*order))
            }))
        })
    }

    fn end_second_loads(&mut self) -> Result<()> {
        for vdi in &mut self.vdis {
            for mut load in vdi.loads.drain(1..) {
                load.stop()?;
            }
        }
        Ok(())
    }

    /// While all guests stand still, a scrub of each VDI reads all replicas and finds them equal and good.
    fn compare_replicas(&mut self) -> Result<()> {
        self.until("nothing is under way", |world| Ok(world.gate.under_way() == 0))?;
        let start = Instant::now();
        let vdis: Vec<Placed> = self.placed().cloned().collect();
        for vdi in &vdis {
            let blocks = loop {
                self.until_whole()?;
                let done = self.scrub(vdi)?;
                ensure!(
                    done["repaired"] == 0 && done["unreadable"] == 0 && done["shards"] == done["shards_done"],
                    "replicas differ: {done}"
                );
                let blocks = done["blocks"].as_u64().context("blocks")?;
                if blocks > 0 && blocks % vdi.replicas as u64 == 0 {
                    break blocks;
                }
                // A link may end seconds after its fault was mended: what was lost is sent again ever more seldom,
                // and its other end waits no longer. The replica is out of sync for a moment, and is not read.
                ensure!(start.elapsed() < PATIENCE, "not all replicas were read: {done}");
            };
            self.blocks_compared += blocks;
        }
        for disk in self.hosts[0].get("/v1/disks")?.as_array().context("a list")? {
            ensure!(disk["corrupt_blocks"] == 0, "bad blocks: {disk}");
        }
        Ok(())
    }

    /// What a scrub of the VDI says at its end.
    fn scrub(&mut self, vdi: &Placed) -> Result<Value> {
        self.hosts[vdi.writer].ask("POST", "/v1/scrub", &json!({"vdi": vdi.name}))?;
        let mut done = Value::Null;
        self.until("the scrub ends", |world| {
            let scrubs = world.hosts[vdi.writer].get("/v1/scrub")?;
            let scrubs = scrubs["scrubs"].as_array().context("a list")?;
            done = scrubs
                .iter()
                .find(|scrub| scrub["vdi"] == *vdi.name)
                .context("a scrub")?
                .clone();
            Ok(done["ended"].is_string())
        })?;
        Ok(done)
    }

    /// Attaches the VDI at host `to`, as soon as the other's lease allows, and begins a load there.
    pub fn take_over(&mut self, number: usize, to: usize) -> Result<()> {
        self.attach(number, to)?;
        let seed = self.rng.draw();
        let vdi = &mut self.vdis[number];
        vdi.placed.writer = to;
        vdi.connections_before = vdi.loads[0].connections();
        *vdi.door.lock().expect("door") = self.hosts[to].door(&vdi.placed.name);
        let load = start_load(&vdi.disk, seed, Arc::clone(&vdi.door), &self.gate);
        vdi.loads.push(load);
        Ok(())
    }

    /// Attaches the VDI at host `to`, as soon as that is possible.
    pub fn attach(&mut self, number: usize, to: usize) -> Result<()> {
        let name = self.vdis[number].placed.name.clone();
        self.until_attached(&name, to, Host::attach)
    }

    /// Attaches the VDI at host `to` by `attach`, as soon as that is possible.
    pub fn until_attached(
        &mut self,
        name: &str,
        to: usize,
        attach: fn(&Host, &str) -> Result<(u16, Value)>,
    ) -> Result<()> {
        self.until(&format!("{name} is attached at host {to}"), |world| {
            let (code, answer) = attach(&world.hosts[to], name)?;
            ensure!(
                code == 200 || code == 409 || code == 503,
                "attach {name}: {code} {answer}"
            );
            Ok(code == 200)
        })
    }

    /// Starts daemons side by side: one may need the other.
    pub fn start_hosts(&mut self, numbers: &[usize]) -> Result<()> {
        for number in numbers {
            self.hosts[*number].start(&self.network)?;
        }
        Ok(())
    }

    pub fn end(&mut self) -> Result<String> {
        self.dismiss_debian()?;
        let (mut answers, mut sectors) = (0, 0);
        for load in self.vdis.iter_mut().flat_map(|vdi| &mut vdi.loads) {
            load.stop()?;
            answers += load.answers();
            sectors += load.sectors_verified();
        }
        for host in &mut self.hosts {
            host.stop()?;
            ensure!(
                !host.log().contains("not flushed at the stop: no answer"),
                "host {} waited at its stop for what could not come",
                host.number
            );
        }
        Ok(format!(
            "{} faults; guests got {answers} answers and verified {} MiB, {} MiB of replicas were compared",
            self.faults,
            sectors * 512 / MIB,
            self.blocks_compared * 4096 / MIB
        ))
    }

    /// For who reads of a failure.
    pub fn last_words(&self) -> String {
        let mut text = String::new();
        for host in &self.hosts {
            let state = if host.is_up() { "up" } else { "not up" };
            text.push_str(&format!(
                "--- host {} ({state})\n{}\n",
                host.number,
                host.last_words()
            ));
        }
        // Who does not answer is not asked again: that may take all of our patience.
        let mut asked: Vec<&Host> = self.hosts.iter().filter(|host| host.is_up()).collect();
        for vdi in self.placed() {
            let mut shown = None;
            while let (None, Some(host)) = (&shown, asked.last()) {
                match host.call("GET", &format!("/v1/vdis/{}", vdi.name), None) {
                    Ok((_, answer)) => shown = Some(answer),
                    Err(error) => {
                        text.push_str(&format!("--- host {} does not answer: {error:#}\n", host.number));
                        asked.pop();
                    }
                }
            }
            text.push_str(&format!(
                "--- {}, written at host {}: {shown:?}\n",
                vdi.name, vdi.writer
            ));
        }
        text.push_str(&self.debian.as_ref().map_or_else(String::new, Debian::last_words));
        text
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // A guest that was not stopped has nobody to wait for.
        self.gate.shut(false);
    }
}

fn start_load(disk: &Arc<Disk>, seed: u64, door: Arc<Mutex<PathBuf>>, gate: &Arc<Gate>) -> Load {
    let gate = Arc::clone(gate);
    Load::start(
        disk,
        "NBD",
        seed,
        Box::new(move || {
            let door = door.lock().expect("door").clone();
            if !door.exists() {
                bail!("no door at {}", door.display());
            }
            Ok(Box::new(Paced::new(NbdClient::connect(&door)?, &gate)) as Box<dyn Client>)
        }),
    )
}
