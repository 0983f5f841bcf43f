//! Hosts of real data-plane threads, rings and disks in one process, over loopback TCP.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::path::PathBuf;

use clap::Parser;
use control::MemoryKv;
use edge::file::{Access, OsFile, create_preallocated};
use edge::uring::Buf;
use replication::{DiskNode, ReplicaReply, ReplicaRequest, ShardRecord, ToReplica};
use store::{FormatParams, Store, StoreSettings};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use types::{BlockNo, DiskId, Epoch, LayerId, Payload, PoolId, RequestId, ShardId, ShardNo, Token, VdiId};
use vdi::{Event, Op, Outcome, ReadPart, VdiError, VdiSpec};
use wire::{Channel, Gather, Outgoing};

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
        let folder = tempfile::tempdir().expect("a folder");
        let state = folder.path().to_str().expect("UTF-8");
        let flags = Flags::parse_from(["blockd", "--state", state, "--poll-us", "0"]);
        let mut settings = Settings::of_bytes(&flags, b"buffers = \"16MiB\"").expect("settings");
        settings.cores = planes;
        let (reports, mut inbox) = unbounded_channel();
        let planes = crate::start::planes(&settings, &reports).expect("planes");
        let me = identity(number, 7);
        let links = Links::new(me.clone(), planes.handles.clone(), silence, reports);
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
            head: LayerId(0),
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
        let Ok(Outcome::Read(parts)) = self.op(vdi, Op::Read { offset, length }).await else {
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

/// A host that is only a socket: says what a test wants it to say.
struct Stranger {
    stream: std::net::TcpStream,
    incoming: Incoming<HeapRoom>,
    heard: Option<Frame<HeapBlock>>,
    outgoing: Outgoing<HeapBlock>,
}

impl Stranger {
    fn call(host: &Host, hello: &Hello) -> Stranger {
        let stream = std::net::TcpStream::connect(host.address).expect("connecting");
        stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
        let mut stranger = Stranger {
            stream,
            incoming: Incoming::new(HeapRoom::new),
            heard: None,
            outgoing: Outgoing::new(0),
        };
        let hello = hello.encode();
        stranger.stream.write_all(&hello).expect("sending");
        stranger.outgoing = Outgoing::new(hello.len() as u64);
        stranger
    }

    /// `None` once the other end has closed.
    fn hear(&mut self) -> Option<Frame<HeapBlock>> {
        loop {
            if let Some(frame) = self.heard.take() {
                if let Frame::Welcome(welcome) = &frame {
                    self.incoming.agree(welcome.version);
                }
                return Some(frame);
            }
            let mut bytes = vec![0; self.incoming.missing()];
            match self.stream.read(&mut bytes) {
                Ok(0) | Err(_) => return None,
                Ok(count) => {
                    let mut rest = &bytes[..count];
                    while !rest.is_empty() {
                        let put = self.incoming.put(rest, HeapRoom::new);
                        rest = &rest[put..];
                        // No more was read than belongs to one frame.
                        self.heard = self.incoming.next(HeapRoom::new).expect("good frames");
                    }
                }
            }
        }
    }

    /// The next frame that is not a sign of life.
    fn hear_word(&mut self) -> Option<Frame<HeapBlock>> {
        loop {
            match self.hear() {
                Some(Frame::Ping) => {}
                other => return other,
            }
        }
    }

    fn hear_reply(&mut self) -> (u64, Result<ReplicaReply<HeapBlock>, replication::Refusal>) {
        match self.hear_word() {
            Some(Frame::Reply(reply)) => (reply.id.0, reply.result),
            other => panic!("no reply: {other:?}"),
        }
    }

    fn flush(&mut self) {
        let bytes = self.outgoing.take(Gather::default()).to_bytes();
        self.stream.write_all(&bytes).expect("sending");
    }

    fn ask(&mut self, channel: Channel, id: u64, request: ReplicaRequest<HeapBlock>) {
        let message = ToReplica {
            shard: ShardId {
                vdi: VdiId(9),
                no: ShardNo(0),
            },
            token: Token {
                epoch: Epoch(1),
                incarnation: Incarnation(1),
            },
            id: RequestId(id),
            request,
        };
        self.outgoing.request(channel, message);
    }
}

fn hello(from: u128, to: u128) -> Hello {
    Hello::new(identity(from, 7), HostId(to), 0)
}

#[tokio::test(flavor = "multi_thread")]
async fn who_does_not_belong_is_told_so_by_name_and_the_others_go_on() {
    let mut host = Host::start(1, 1).await;
    host.links.set_peer(HostId(2), "host-2", None);
    let cases = [
        (hello(3, 1), RefusedCode::Unknown, "does not know host 'host-3'"),
        (hello(2, 5), RefusedCode::WrongHost, "but this is host 'host-1'"),
        (hello(1, 1), RefusedCode::Myself, "host 'host-1' called itself"),
        (
            Hello {
                from: Identity {
                    pool: PoolId(8),
                    ..identity(2, 7)
                },
                ..hello(2, 1)
            },
            RefusedCode::Pool,
            "is of pool",
        ),
        (
            Hello {
                versions: (2, 3),
                ..hello(2, 1)
            },
            RefusedCode::Version,
            "speaks protocol versions 2 to 3",
        ),
    ];
    for (hello, code, text) in cases {
        let mut stranger = Stranger::call(&host, &hello);
        let Some(Frame::Refused(refused)) = stranger.hear() else {
            panic!("{code:?} was let in")
        };
        assert_eq!(refused.code, code);
        assert!(refused.text.contains(text), "{}", refused.text);
        assert!(stranger.hear().is_none(), "the connection stays");
        let news = host.hear(|_| true).await;
        assert!(
            matches!(&news, LinkNews::Refused(said) if said.contains(text)),
            "{news:?}"
        );
    }
    let mut stranger = std::net::TcpStream::connect(host.address).expect("connecting");
    stranger.write_all(b"GET / HTTP/1.1\r\n\r\n").expect("sending");
    let news = host.hear(|_| true).await;
    assert!(
        matches!(&news, LinkNews::Refused(said) if said.contains("does not speak Weft's protocol")),
        "{news:?}"
    );
    // One that belongs is let in all the while; its former life is not any more.
    let mut peer = Stranger::call(&host, &hello(2, 1));
    assert!(matches!(peer.hear(), Some(Frame::Welcome(_))));
    let mut old = hello(2, 1);
    old.from.incarnation = Incarnation(6);
    let mut old = Stranger::call(&host, &old);
    assert!(matches!(old.hear(), Some(Frame::Refused(refused)) if refused.code == RefusedCode::OldLife));
    // Until it is a host of the pool no more.
    host.links.forget_peer(HostId(2));
    assert!(matches!(peer.hear_word(), Some(Frame::Bye(said)) if said.contains("no longer a host")));
    let mut again = Stranger::call(&host, &hello(2, 1));
    assert!(matches!(again.hear(), Some(Frame::Refused(refused)) if refused.code == RefusedCode::Unknown));
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_on_a_link_ends_it_with_the_reason() {
    let host = Host::start(1, 1).await;
    host.serve_disk().await;
    host.links.set_peer(HostId(2), "host-2", None);
    let said = |garbage: &[u8]| {
        let mut peer = Stranger::call(&host, &hello(2, 1));
        assert!(matches!(peer.hear(), Some(Frame::Welcome(_))));
        assert!(matches!(peer.hear_word(), Some(Frame::DiskUp(..))));
        peer.stream.write_all(garbage).expect("sending");
        let Some(Frame::Bye(reason)) = peer.hear_word() else {
            panic!("no last word")
        };
        assert!(peer.hear().is_none(), "the link stays");
        reason
    };
    assert!(said(&[0xee; 64]).contains("does not speak"));
    let mut out = Outgoing::<HeapBlock>::new(0);
    out.disk_down(Channel(1));
    let reason = said(&out.take(Gather::default()).small);
    assert!(reason.contains("no right to it"), "{reason}");
    // The host is none the worse.
    let mut peer = Stranger::call(&host, &hello(2, 1));
    assert!(matches!(peer.hear(), Some(Frame::Welcome(_))));
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_link_ends_the_old_one_of_the_same_thread() {
    let host = Host::start(1, 1).await;
    host.serve_disk().await;
    host.links.set_peer(HostId(2), "host-2", None);
    let mut first = Stranger::call(&host, &hello(2, 1));
    assert!(matches!(first.hear(), Some(Frame::Welcome(_))));
    assert!(matches!(first.hear_word(), Some(Frame::DiskUp(..))));
    let other_thread = Hello {
        plane: 1,
        ..hello(2, 1)
    };
    let mut other = Stranger::call(&host, &other_thread);
    assert!(matches!(other.hear(), Some(Frame::Welcome(_))));
    let mut second = Stranger::call(&host, &hello(2, 1));
    assert!(matches!(second.hear(), Some(Frame::Welcome(_))));
    assert!(matches!(second.hear_word(), Some(Frame::DiskUp(..))));
    assert!(matches!(first.hear_word(), Some(Frame::Bye(said)) if said.contains("took its place")));
    assert_eq!(host.links().await.len(), 2);
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_peer_is_noticed_and_called_again() {
    let silence = Duration::from_millis(400);
    let mut host = Host::start_with(1, 1, silence).await;
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("its address").to_string();
    host.links.set_peer(HostId(2), "host-2", Some(&address));
    for _ in 0..2 {
        let (mut stream, _) = listener.accept().expect("a call");
        stream
            .write_all(&Welcome::new(wire::VERSION, &identity(2, 7)).encode())
            .expect("sending");
        host.is_up().await;
        let news = host.hear(|news| *news != LinkNews::Up).await;
        assert_eq!(news, LinkNews::Down("nothing was heard for 0.4 s".to_owned()));
        // It said that it lives until then.
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).expect("its end");
        assert!(bytes.len() > 100, "{} B", bytes.len());
    }
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_does_not_listen_is_not_answered_without_bound() {
    let host = Host::start(1, 1).await;
    host.serve_disk().await;
    host.links.set_peer(HostId(2), "host-2", None);
    let mut peer = Stranger::call(&host, &hello(2, 1));
    assert!(matches!(peer.hear(), Some(Frame::Welcome(_))));
    let Some(Frame::DiskUp(channel, disk)) = peer.hear_word() else {
        panic!("no disk")
    };
    assert_eq!(disk, disk_of(1));
    peer.ask(channel, 0, ReplicaRequest::Fence { record: Vec::new() });
    peer.flush();
    let promised = peer.hear_reply();
    assert!(
        matches!(promised, (0, Ok(ReplicaReply::Promised { .. }))),
        "{promised:?}"
    );
    let bytes = pattern(3, 1 << 20);
    let data = HeapBlock::new(&bytes);
    let crcs = bytes.chunks(4096).map(types::crc32c).collect();
    peer.ask(
        channel,
        1,
        ReplicaRequest::Write {
            layer: LayerId(0),
            block: BlockNo(0),
            seq: types::Seq(1),
            data,
            crcs,
        },
    );
    peer.flush();
    let done = peer.hear_reply();
    assert!(matches!(done, (1, Ok(ReplicaReply::Done))), "{done:?}");
    const READS: u64 = 200;
    for id in 0..READS {
        let read = ReplicaRequest::Read {
            layer: LayerId(0),
            block: BlockNo(0),
            count: 256,
        };
        peer.ask(channel, 2 + id, read);
    }
    peer.flush();
    // It takes what its bound allows from its disk, and no more while nobody reads the answers.
    let held = |link: LinkFigures| link.unsent_bytes + link.unanswered_bytes;
    let is_full = async {
        while held(host.links().await.remove(0)) < 24 << 20 {
            tokio::task::yield_now().await;
        }
    };
    let in_time = tokio::time::timeout(PATIENCE, is_full).await;
    assert!(in_time.is_ok(), "{:?}", host.links().await);
    for _ in 0..1000 {
        let link = host.links().await.remove(0);
        assert!(
            held(link) < 40 << 20 && link.frames_received < READS / 2,
            "{link:?}"
        );
    }
    let mut answered_all = std::collections::BTreeSet::new();
    for _ in 0..READS {
        let (answered, result) = peer.hear_reply();
        let Ok(ReplicaReply::Read(parts)) = result else {
            panic!("{result:?}")
        };
        let [store::ReadPart::Data(data)] = &parts[..] else {
            panic!("{parts:?}")
        };
        assert!(data.bytes() == bytes && answered_all.insert(answered));
    }
    host.stop().await;
}
