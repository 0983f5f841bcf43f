//! Hosts of real data-plane threads, rings and disks in one process, over loopback TCP.

mod bounds;
mod homes;
mod strangers;
mod tls;

use std::io::Read;
use std::net::{Shutdown, SocketAddr};
use std::path::PathBuf;

use clap::Parser;
use control::MemoryKv;
use edge::file::{Access, OsFile, create_preallocated};
use edge::uring::Buf;
use replication::{DiskNode, ShardRecord};
use store::{FormatParams, Store, StoreSettings};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use types::{DiskId, LayerId, Lineage, Payload, PoolId, ShardId, ShardNo, VdiId};
use vdi::{Event, Op, Outcome, ReadPart, VdiError, VdiSpec};

use super::*;
use crate::config::{Flags, Settings};
use crate::index::IndexThread;
use crate::plane::{Home, LinkFigures, PlaneFigures};
use crate::start::Planes;

const POOL: PoolId = PoolId(1);
const DISK_BYTES: u64 = 128 << 20;
const VDI_BYTES: u64 = 16 << 20;
/// Long enough for a machine that others use too.
const SILENCE: Duration = Duration::from_secs(10);
const PATIENCE: Duration = Duration::from_secs(60);

/// A host as the daemon composes it, without records, doors and REST.
struct Host {
    me: Identity,
    planes: Planes,
    links: Arc<Links>,
    address: SocketAddr,
    folder: tempfile::TempDir,
    news: UnboundedReceiver<(String, LinkNews)>,
}

fn identity(number: u128, life: u64) -> Identity {
    Identity {
        pool: POOL,
        host: HostId(number),
        incarnation: Incarnation(life),
        name: format!("host-{number}"),
    }
}

fn disk_of(host: u128) -> DiskId {
    DiskId(host << 8)
}

impl Host {
    async fn start(number: u128, planes: usize) -> Host {
        Host::start_with(number, planes, SILENCE).await
    }

    async fn start_with(number: u128, planes: usize, silence: Duration) -> Host {
        Host::start_sealed(number, planes, silence, None).await
    }

    async fn start_sealed(number: u128, planes: usize, silence: Duration, tls: Option<Arc<Tls>>) -> Host {
        let folder = tempfile::tempdir().expect("a folder");
        let state = folder.path().to_str().expect("UTF-8");
        let flags = Flags::parse_from(["blockd", "--state", state, "--poll-us", "0"]);
        let mut settings = Settings::of_bytes(&flags, b"buffers = \"16MiB\"").expect("settings");
        settings.cores = planes;
        let (reports, mut inbox) = unbounded_channel();
        let planes = crate::start::planes(&settings, &reports).expect("planes");
        let me = identity(number, 7);
        let links = Links::new(me.clone(), planes.handles.clone(), silence, tls, reports);
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("its address");
        links.listen(listener);
        let (tell, news) = unbounded_channel();
        let handles = planes.handles.clone();
        // Records that are always saved, as nobody else changes them here.
        tokio::spawn(async move {
            while let Some(report) = inbox.recv().await {
                match report {
                    Report::SaveRecord(record) => {
                        let vdi = record.shard.vdi;
                        let shard = record.shard.no;
                        let event = Event::RecordSaved { shard, record };
                        handles[PlaneHandle::home_of(vdi, handles.len())].send(Command::Vdi { vdi, event });
                    }
                    Report::Link { host, news } => {
                        let _ = tell.send((host, news));
                    }
                    _ => {}
                }
            }
        });
        Host {
            me,
            planes,
            links,
            address,
            folder,
            news,
        }
    }

    fn disk_path(&self) -> PathBuf {
        self.folder.path().join("disk")
    }

    /// Serves its disk on its last plane; makes it first where there is none.
    async fn serve_disk(&self) {
        let (path, disk) = (self.disk_path(), disk_of(self.me.host.0));
        let mut index = MemoryKv::default();
        let is_new = !path.exists();
        if is_new {
            create_preallocated(&path, DISK_BYTES).expect("a disk file");
        }
        let mut file = OsFile::open(&path, Access::ReadWrite).expect("opening the disk");
        if is_new {
            let mut parameters = FormatParams::new(disk, POOL, 77);
            parameters.segment_bytes = 4 << 20;
            store::format(&mut file, &mut index, parameters).expect("formatting");
        }
        let recovered = store::recover_known(&mut file, &mut index, 5, 0);
        let (recovered, _) = recovered.expect("recovery");
        let settings = StoreSettings {
            cache_bytes: 8 << 20,
            ..StoreSettings::default()
        };
        let node = Box::new(DiskNode::new(disk, Store::open(recovered, settings)));
        let plane = self.planes.handles.len() - 1;
        let index = IndexThread::start(disk, Box::new(index), self.planes.handles[plane].clone());
        let index = index.expect("a thread");
        let file = file.into_file();
        self.home(disk, Home::Plane(plane));
        let added = ask(&self.planes.handles[plane], |reply| Command::AddDisk {
            disk,
            file,
            node,
            index,
            reply,
        });
        added.await.expect("adding");
        self.disk_state(true).await;
    }

    async fn disk_state(&self, is_up: bool) {
        let disk = disk_of(self.me.host.0);
        for plane in &self.planes.handles {
            ask(plane, |reply| Command::DiskState { disk, is_up, reply }).await;
        }
    }

    async fn remove_disk(&self) {
        self.disk_state(false).await;
        let disk = disk_of(self.me.host.0);
        let plane = self.planes.handles.last().expect("a plane");
        let index = ask(plane, |reply| Command::RemoveDisk { disk, reply }).await;
        drop(index.expect("the disk was served"));
    }

    fn home(&self, disk: DiskId, home: Home) {
        for plane in &self.planes.handles {
            plane.send(Command::Home { disk, home });
        }
    }

    /// Calls `other` at `address`, and looks for its disk there.
    fn know(&self, other: &Host, address: Option<SocketAddr>) {
        let address = address.map(|address| address.to_string());
        let host = other.me.host;
        self.home(disk_of(host.0), Home::Host(host));
        self.links.set_peer(host, &other.me.name, address.as_deref());
    }

    async fn open_vdi(&self, vdi: VdiId, disks: &[u128], up: &[u128]) {
        let spec = VdiSpec {
            id: vdi,
            bytes: VDI_BYTES,
            sector_bytes: 512,
            shard_bytes: VDI_BYTES,
            lineage: Lineage::of_layer(vdi, LayerId(0)),
            sharing: replication::Sharing::Alone,
        };
        let shard = ShardId { vdi, no: ShardNo(0) };
        let replicas = disks.iter().copied().map(disk_of).collect();
        let up = up.iter().copied().map(disk_of).collect();
        ask(self.vdi_plane(vdi), |reply| Command::OpenVdi {
            spec,
            records: vec![ShardRecord::new(shard, replicas)],
            incarnation: self.me.incarnation,
            up,
            reply,
        })
        .await;
    }

    fn vdi_plane(&self, vdi: VdiId) -> &PlaneHandle {
        &self.planes.handles[PlaneHandle::home_of(vdi, self.planes.handles.len())]
    }

    async fn op(&self, vdi: VdiId, op: Op<Buf>) -> Result<Outcome<Buf>, VdiError> {
        let answer = ask(self.vdi_plane(vdi), |reply| Command::Request { vdi, op, reply });
        tokio::time::timeout(PATIENCE, answer).await.expect("an answer")
    }

    async fn write(&self, vdi: VdiId, offset: u64, bytes: &[u8]) {
        let data = self.planes.pool.copy_of(bytes);
        let op = Op::Write {
            offset,
            data,
            fua: false,
        };
        let outcome = self.op(vdi, op).await;
        assert!(matches!(outcome, Ok(Outcome::Done)), "{outcome:?}");
    }

    async fn read(&self, vdi: VdiId, offset: u64, length: u64) -> Vec<u8> {
        let of = None;
        let Ok(Outcome::Read(parts)) = self.op(vdi, Op::Read { offset, length, of }).await else {
            panic!("not read")
        };
        let bytes = |part: &ReadPart<Buf>| match part {
            ReadPart::Data(data) => data.bytes().to_vec(),
            ReadPart::Zeros(count) => vec![0; *count as usize],
        };
        parts.iter().flat_map(bytes).collect()
    }

    async fn figures(&self) -> Vec<PlaneFigures> {
        let mut all = Vec::new();
        for plane in &self.planes.handles {
            all.push(ask(plane, |reply| Command::Figures { reply }).await);
        }
        all
    }

    async fn links(&self) -> Vec<LinkFigures> {
        let figures = self.figures().await;
        figures.into_iter().flat_map(|plane| plane.links).collect()
    }

    /// Its only link on which it asks.
    async fn dialled(&self) -> LinkFigures {
        let links = self.links().await;
        let mut dialled = links.into_iter().filter(|link| link.role == LinkRole::Dialled);
        dialled.next().expect("a link")
    }

    /// Blocks of data on its disk.
    async fn blocks(&self) -> u64 {
        let figures = self.figures().await;
        let shards = figures
            .iter()
            .flat_map(|plane| &plane.disks)
            .flat_map(|disk| &disk.shards);
        shards.map(|shard| shard.data_blocks).sum()
    }

    async fn hear(&mut self, wanted: impl Fn(&LinkNews) -> bool) -> LinkNews {
        let news = async {
            loop {
                let (_, news) = self.news.recv().await.expect("news");
                if wanted(&news) {
                    return news;
                }
            }
        };
        tokio::time::timeout(PATIENCE, news).await.expect("news in time")
    }

    async fn is_up(&mut self) {
        self.hear(|news| *news == LinkNews::Up).await;
    }

    async fn stop(self) {
        for plane in &self.planes.handles {
            plane.send(Command::Stop);
        }
        tokio::task::block_in_place(|| {
            for thread in self.planes.threads {
                thread.join().expect("a plane ends well");
            }
        });
    }
}

async fn ask<T>(plane: &PlaneHandle, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> T {
    let (reply, answer) = oneshot::channel();
    plane.send(command(reply));
    answer.await.expect("a plane answers")
}

fn pattern(seed: usize, length: usize) -> Vec<u8> {
    (0..length).map(|i| (i / 13 + i * 7 + seed) as u8 | 1).collect()
}

/// Hosts 1 to `count` that know each other, each with a disk except those in `diskless`.
async fn cluster(count: u128, planes: usize, diskless: &[u128]) -> Vec<Host> {
    let mut hosts = Vec::new();
    for number in 1..=count {
        let host = Host::start(number, planes).await;
        if !diskless.contains(&number) {
            host.serve_disk().await;
        }
        hosts.push(host);
    }
    for host in &hosts {
        for other in &hosts {
            if host.me.host != other.me.host {
                // Whoever calls first may be called by someone who does not know it yet: all know before any calls.
                host.links.set_peer(other.me.host, &other.me.name, None);
            }
        }
    }
    for host in &hosts {
        for other in hosts.iter().filter(|other| other.me.host != host.me.host) {
            host.know(other, Some(other.address));
        }
    }
    hosts
}

async fn stop(hosts: Vec<Host>) {
    for host in hosts {
        host.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_is_on_the_disks_of_three_hosts() {
    let hosts = cluster(3, 2, &[]).await;
    let vdi = VdiId(1);
    hosts[0].open_vdi(vdi, &[1, 2, 3], &[1]).await;
    let large = pattern(1, 3 << 20);
    let small = pattern(2, 512);
    hosts[0].write(vdi, 4096, &large).await;
    hosts[0].write(vdi, 8 << 20, &small).await;
    assert!(matches!(hosts[0].op(vdi, Op::Flush).await, Ok(Outcome::Done)));
    assert!(hosts[0].read(vdi, 4096, 3 << 20).await == large);
    assert_eq!(hosts[0].read(vdi, 8 << 20, 512).await, small);
    // The third replica may be behind the quorum, or was reached after the first write: it catches up.
    for host in &hosts {
        let all = async {
            while host.blocks().await != 3 * 256 + 1 {
                tokio::task::yield_now().await;
            }
        };
        let in_time = tokio::time::timeout(PATIENCE, all).await;
        assert!(
            in_time.is_ok(),
            "{} holds {} blocks",
            host.me.name,
            host.blocks().await
        );
    }
    stop(hosts).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_without_disks_opens_a_virtual_disk_like_any_other() {
    let mut hosts = cluster(2, 1, &[1]).await;
    hosts[0].is_up().await;
    let vdi = VdiId(1);
    hosts[0].open_vdi(vdi, &[2], &[]).await;
    for round in 0..20 {
        let bytes = pattern(round, 64 << 10);
        hosts[0].write(vdi, (round as u64 % 3) << 16, &bytes).await;
        assert!(hosts[0].read(vdi, (round as u64 % 3) << 16, 64 << 10).await == bytes);
    }
    let discard = Op::Discard {
        offset: 0,
        length: 64 << 10,
    };
    assert!(matches!(hosts[0].op(vdi, discard).await, Ok(Outcome::Done)));
    assert!(hosts[0].read(vdi, 0, 64 << 10).await == vec![0; 64 << 10]);
    stop(hosts).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_costs_one_send_and_one_receive_each_way_and_hardly_a_copy() {
    let mut hosts = cluster(2, 1, &[1]).await;
    hosts[0].is_up().await;
    let vdi = VdiId(1);
    hosts[0].open_vdi(vdi, &[2], &[]).await;
    hosts[0].write(vdi, 0, &pattern(0, 4096)).await;
    let before = hosts[0].dialled().await;
    let rounds = 200;
    for round in 0..rounds {
        hosts[0]
            .write(vdi, (round % 16) * 4096, &pattern(round as usize, 4096))
            .await;
    }
    let after = hosts[0].dialled().await;
    assert_eq!(after.frames_sent - before.frames_sent, rounds);
    // A sign of life may come between.
    let (sends, receives) = (after.sends - before.sends, after.receives - before.receives);
    assert!((rounds..rounds + 9).contains(&sends), "{sends} sends");
    assert!((rounds..rounds + 9).contains(&receives), "{receives} receives");
    let served = hosts[1].links().await;
    let served = served
        .iter()
        .find(|link| link.role != LinkRole::Dialled)
        .expect("a served link");
    assert!(
        (rounds..rounds + 40).contains(&served.receives),
        "{} receives",
        served.receives
    );
    assert!(
        served.copied_bytes < rounds * 4096 / 10,
        "{} B copied",
        served.copied_bytes
    );
    stop(hosts).await;
}

/// Passes bytes on to `target`; each connection is cut after so many bytes of the caller, in turn; then none is.
fn cutting_proxy(target: SocketAddr, cuts: Vec<usize>) -> SocketAddr {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("its address");
    std::thread::spawn(move || {
        for cut in cuts.into_iter().chain(std::iter::repeat(usize::MAX)) {
            let Ok((near, _)) = listener.accept() else { return };
            let far = std::net::TcpStream::connect(target).expect("the target");
            let (mut back, mut forth) = (
                far.try_clone().expect("a copy"),
                near.try_clone().expect("a copy"),
            );
            std::thread::spawn(move || {
                let _ = std::io::copy(&mut back, &mut forth);
                let _ = forth.shutdown(Shutdown::Both);
            });
            let (mut near, mut far) = (near, far);
            std::thread::spawn(move || {
                let _ = std::io::copy(&mut (&mut near).take(cut as u64), &mut far);
                let _ = (near.shutdown(Shutdown::Both), far.shutdown(Shutdown::Both));
            });
        }
    });
    address
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_cut_in_the_middle_of_frames_loses_nothing() {
    let mut hosts = cluster(1, 1, &[1]).await;
    let other = Host::start(2, 1).await;
    other.serve_disk().await;
    other.links.set_peer(HostId(1), "host-1", None);
    // In the greeting; in a head; in data, several times.
    let cuts = vec![30, 400, 2000, 70_000, 131_000, 300_000];
    hosts[0].know(&other, Some(cutting_proxy(other.address, cuts.clone())));
    hosts.push(other);
    let vdi = VdiId(1);
    hosts[0].open_vdi(vdi, &[2], &[]).await;
    let mut right = vec![0; 1 << 20];
    for round in 0..100usize {
        let at = round * 37 % 240 * 4096;
        let bytes = pattern(round, 4096 * (1 + round % 5));
        right[at..at + bytes.len()].copy_from_slice(&bytes);
        hosts[0].write(vdi, at as u64, &bytes).await;
    }
    assert!(hosts[0].read(vdi, 0, 1 << 20).await == right);
    let mut downs = 0;
    while let Ok((_, news)) = hosts[0].news.try_recv() {
        downs += usize::from(matches!(news, LinkNews::Down(_)));
    }
    assert!(downs >= cuts.len() - 1, "{downs} cuts were noticed");
    stop(hosts).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_leaves_its_host_and_returns_is_found_again() {
    let mut hosts = cluster(2, 1, &[1]).await;
    hosts[0].is_up().await;
    let vdi = VdiId(1);
    hosts[0].open_vdi(vdi, &[2], &[]).await;
    let (before, after) = (pattern(1, 8192), pattern(2, 4096));
    hosts[0].write(vdi, 0, &before).await;
    hosts[1].remove_disk().await;
    // Nobody is there to take it: it waits for the disk.
    let waiting = hosts[0].write(vdi, 4096, &after);
    let back = async {
        hosts[1].serve_disk().await;
    };
    tokio::join!(waiting, back);
    assert!(hosts[0].read(vdi, 0, 8192).await == [&before[..4096], &after].concat());
    let links = hosts[0].links().await;
    assert_eq!(links.iter().filter(|link| link.disks == 1).count(), 1);
    stop(hosts).await;
}
