//! What nobody can do to a host over a link: take its memory, its turn, or another's.

use std::net::TcpStream;

use replication::{ReplicaReply, ReplicaRequest};
use types::{BlockNo, LayerId, Lineage};

use super::strangers::{Stranger, hello};
use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_does_not_listen_is_not_answered_without_bound() {
    let host = Host::start(1, 1).await;
    host.serve_disk().await;
    host.links.set_peer(HostId(2), "host-2", None);
    let mut peer = Stranger::call(&host, &hello(2, 1));
    assert!(matches!(peer.hear(), Some(Frame::Welcome(_))));
    let (channel, disk) = peer.hear_disk();
    assert_eq!(disk, disk_of(1));
    peer.fence(VdiId(9), channel);
    let bytes = pattern(3, 1 << 20);
    peer.write_mib(VdiId(9), channel, 1, 0, &bytes);
    let done = peer.hear_reply();
    assert!(matches!(done, (1, Ok(ReplicaReply::Done))), "{done:?}");
    const READS: u64 = 200;
    for id in 0..READS {
        let read = ReplicaRequest::Read {
            lineage: Lineage::of_layer(VdiId(9), LayerId(0)),
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

#[tokio::test(flavor = "multi_thread")]
async fn what_waits_for_space_on_a_full_disk_holds_up_nothing_else() {
    // The link is on one plane, the disk on the other.
    let host = Host::start(1, 2).await;
    host.serve_disk().await;
    host.links.set_peer(HostId(2), "host-2", None);
    let mut peer = Stranger::call(&host, &hello(2, 1));
    assert!(matches!(peer.hear(), Some(Frame::Welcome(_))));
    let (channel, _) = peer.hear_disk();
    let (old, new) = (VdiId(8), VdiId(9));
    let bytes = pattern(5, 1 << 20);
    peer.fence(old, channel);
    for seq in 1..=40 {
        peer.write_mib(old, channel, seq, seq as u32, &bytes);
    }
    for _ in 1..=40 {
        assert!(matches!(peer.hear_reply(), (_, Ok(ReplicaReply::Done))));
    }
    // Far more than what the disk has, and the link may have unanswered.
    peer.fence(new, channel);
    for seq in 1..=150 {
        peer.write_mib(new, channel, seq, seq as u32 % 80, &bytes);
    }
    let read = |vdi, place: u32| ReplicaRequest::Read {
        lineage: Lineage::of_layer(vdi, LayerId(0)),
        block: BlockNo(256 * place),
        count: 1,
    };
    peer.ask_of(old, channel, 1000, read(old, 1));
    peer.flush();
    while peer.hear_reply().0 != 1000 {}
    // Beyond its bound the disk is away for that link, so that its writers go on without it...
    for seq in 151..=450 {
        peer.write_mib(new, channel, seq, seq as u32 % 80, &bytes);
    }
    loop {
        match peer.hear_word() {
            Some(Frame::Reply(_)) => {}
            Some(Frame::DiskDown(gone)) => break assert_eq!(gone, channel),
            other => panic!("{other:?}"),
        }
    }
    assert!(matches!(peer.hear(), Some(Frame::Ping)));
    // ... until it has dealt with what it has: here, because another link made space.
    let another = Hello {
        plane: 1,
        ..hello(2, 1)
    };
    let mut another = Stranger::call(&host, &another);
    assert!(matches!(another.hear(), Some(Frame::Welcome(_))));
    let (there, _) = another.hear_disk();
    another.ask_of(old, there, 1, ReplicaRequest::Drop);
    another.flush();
    assert!(matches!(another.hear_reply(), (1, Ok(ReplicaReply::Done))));
    let (again, _) = peer.hear_disk();
    assert!(again > channel);
    peer.ask_of(new, again, 1001, read(new, 1));
    peer.flush();
    assert!(matches!(peer.hear_reply(), (1001, Ok(ReplicaReply::Read(_)))));
    host.stop().await;
}

/// More links of a host, with another silence; where they are called.
async fn also_listening(host: &Host, silence: Duration) -> (Arc<Links>, SocketAddr) {
    let (reports, _) = unbounded_channel();
    let links = Links::new(
        host.me.clone(),
        host.planes.handles.clone(),
        silence,
        None,
        reports,
    );
    links.set_peer(HostId(2), "host-2", None);
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("its address");
    links.listen(listener);
    (links, address)
}

#[tokio::test(flavor = "multi_thread")]
async fn who_takes_nothing_is_let_go_in_the_end() {
    let host = Host::start(1, 1).await;
    host.serve_disk().await;
    host.links.set_peer(HostId(2), "host-2", None);
    let mut first = Stranger::call(&host, &hello(2, 1));
    assert!(matches!(first.hear(), Some(Frame::Welcome(_))));
    let (channel, _) = first.hear_disk();
    first.fence(VdiId(9), channel);
    first.write_mib(VdiId(9), channel, 1, 0, &pattern(3, 1 << 20));
    assert!(matches!(first.hear_reply(), (1, Ok(ReplicaReply::Done))));
    let (_links, address) = also_listening(&host, Duration::from_millis(300)).await;
    let mut peer = Stranger::call_at(address, &hello(2, 1));
    assert!(matches!(peer.hear(), Some(Frame::Welcome(_))));
    // It took the place of the first.
    let (channel, _) = peer.hear_disk();
    for id in 2..100 {
        let read = ReplicaRequest::Read {
            lineage: Lineage::of_layer(VdiId(9), LayerId(0)),
            block: BlockNo(0),
            count: 256,
        };
        peer.ask(channel, id, read);
    }
    peer.flush();
    let gone = async {
        while !host.links().await.is_empty() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let in_time = tokio::time::timeout(PATIENCE, gone).await;
    assert!(in_time.is_ok(), "{:?}", host.links().await);
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_that_say_nothing_keep_nobody_out() {
    let host = Host::start(1, 1).await;
    host.links.set_peer(HostId(2), "host-2", None);
    let call = |_| TcpStream::connect(host.address).expect("connecting");
    let mut silent: Vec<TcpStream> = (0..64).map(call).collect();
    let mut peer = Stranger::call(&host, &hello(2, 1));
    assert!(matches!(peer.hear(), Some(Frame::Welcome(_))));
    // Not because their time was over: one gave way.
    let last = silent.pop().expect("many");
    last.set_nonblocking(true).expect("a socket");
    let error = last.peek(&mut [0]).expect_err("it waits still");
    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    assert_eq!(silent[0].peek(&mut [0]).expect("its end"), 0);
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_whose_links_end_at_once_is_called_less_and_less() {
    let mut host = Host::start(1, 1).await;
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("its address").to_string();
    host.links.set_peer(HostId(2), "host-2", Some(&address));
    let mut first = None;
    for _ in 0..5 {
        let stranger = Stranger::accept(&listener, 2);
        first.get_or_insert_with(std::time::Instant::now);
        host.is_up().await;
        drop(stranger);
    }
    // 0.1, 0.2, 0.4 and 0.8 s.
    let took = first.expect("a call").elapsed();
    assert!(took >= Duration::from_millis(1500), "{took:?}");
    host.stop().await;
}
