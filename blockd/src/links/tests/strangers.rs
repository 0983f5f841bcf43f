//! Hosts that are only sockets, and say what a test wants them to say.

use std::io::{Read, Write};

use replication::{FromReplica, Refusal, ReplicaReply, ReplicaRequest, ToReplica};
use types::{BlockNo, DiskId, Epoch, LayerId, RequestId, Seq, ShardId, ShardNo, Token, VdiId};
use wire::{Channel, Gather, Outgoing};

use super::*;

/// A host that is only a socket: says what a test wants it to say.
pub struct Stranger {
    pub stream: std::net::TcpStream,
    incoming: Incoming<HeapRoom>,
    heard: Option<Frame<HeapBlock>>,
    pub outgoing: Outgoing<HeapBlock>,
}

impl Stranger {
    pub fn call(host: &Host, hello: &Hello) -> Stranger {
        Stranger::call_at(host.address, hello)
    }

    pub fn call_at(address: SocketAddr, hello: &Hello) -> Stranger {
        let mut stranger = Stranger::on(std::net::TcpStream::connect(address).expect("connecting"));
        stranger.greet(&hello.encode());
        stranger
    }

    /// Is called, as host `number`, and lets the caller in.
    pub fn accept(listener: &std::net::TcpListener, number: u128) -> Stranger {
        let mut stranger = Stranger::on(listener.accept().expect("a call").0);
        assert!(matches!(stranger.hear(), Some(Frame::Hello(_))));
        stranger.greet(&Welcome::new(wire::VERSION, &identity(number, 7)).encode());
        stranger.incoming.agree(wire::VERSION);
        stranger
    }

    fn on(stream: std::net::TcpStream) -> Stranger {
        stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
        stream.set_write_timeout(Some(PATIENCE)).expect("a socket");
        Stranger {
            stream,
            incoming: Incoming::new(HeapRoom::new),
            heard: None,
            outgoing: Outgoing::new(0),
        }
    }

    fn greet(&mut self, greeting: &[u8]) {
        self.stream.write_all(greeting).expect("sending");
        self.outgoing = Outgoing::new(greeting.len() as u64);
    }

    /// `None` once the other end has closed.
    pub fn hear(&mut self) -> Option<Frame<HeapBlock>> {
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

    /// The next frame that is not a sign of life. Each of those is answered by one: how long the
    /// disk at the other end takes is no matter of the link's silence.
    pub fn hear_word(&mut self) -> Option<Frame<HeapBlock>> {
        let since = std::time::Instant::now();
        loop {
            match self.hear() {
                Some(Frame::Ping) => {
                    assert!(since.elapsed() < 4 * PATIENCE, "signs of life, and nothing else");
                    self.outgoing.ping();
                    let bytes = self.outgoing.take(Gather::default()).to_bytes();
                    // Whether the other end still hears it shows in what it says next.
                    let _ = self.stream.write_all(&bytes);
                }
                other => return other,
            }
        }
    }

    pub fn hear_reply(&mut self) -> (u64, Result<ReplicaReply<HeapBlock>, Refusal>) {
        match self.hear_word() {
            Some(Frame::Reply(reply)) => (reply.id.0, reply.result),
            other => panic!("no reply: {other:?}"),
        }
    }

    pub fn flush(&mut self) {
        let bytes = self.outgoing.take(Gather::default()).to_bytes();
        self.stream.write_all(&bytes).expect("sending");
    }

    pub fn ask(&mut self, channel: Channel, id: u64, request: ReplicaRequest<HeapBlock>) {
        self.ask_of(VdiId(9), channel, id, request);
    }

    pub fn ask_of(&mut self, vdi: VdiId, channel: Channel, id: u64, request: ReplicaRequest<HeapBlock>) {
        let message = ToReplica {
            shard: ShardId { vdi, no: ShardNo(0) },
            token: Token {
                epoch: Epoch(1),
                incarnation: Incarnation(1),
            },
            id: RequestId(id),
            request,
        };
        self.outgoing.request(channel, message);
    }

    /// Fences a shard, and waits for the promise.
    pub fn fence(&mut self, vdi: VdiId, channel: Channel) {
        self.ask_of(vdi, channel, 0, ReplicaRequest::Fence { record: Vec::new() });
        self.flush();
        let promised = self.hear_reply();
        assert!(
            matches!(promised, (0, Ok(ReplicaReply::Promised { .. }))),
            "{promised:?}"
        );
    }

    /// Asks for a MiB to be written to the `place`th MiB of a shard, as number `seq` and with that id.
    pub fn write_mib(&mut self, vdi: VdiId, channel: Channel, seq: u64, place: u32, bytes: &[u8]) {
        let write = ReplicaRequest::Write {
            layer: LayerId(0),
            block: BlockNo(256 * place),
            seq: Seq(seq),
            data: HeapBlock::new(bytes),
            crcs: bytes.chunks(4096).map(types::crc32c).collect(),
        };
        self.ask_of(vdi, channel, seq, write);
        self.flush();
    }

    /// The disk that is announced next.
    pub fn hear_disk(&mut self) -> (Channel, DiskId) {
        match self.hear_word() {
            Some(Frame::DiskUp(channel, disk)) => (channel, disk),
            other => panic!("no disk: {other:?}"),
        }
    }

    /// The next write. What comes before it is answered, as by a replica that is empty.
    pub fn hear_until_write(&mut self) -> (Channel, ToReplica<HeapBlock>) {
        loop {
            let (channel, message) = match self.hear_word() {
                Some(Frame::Request(channel, message)) => (channel, message),
                other => panic!("no request: {other:?}"),
            };
            let answer = match message.request {
                ReplicaRequest::Write { .. } => return (channel, message),
                ReplicaRequest::Fence { .. } => ReplicaReply::Promised {
                    previous: Token::default(),
                    end: Seq(0),
                    good_until: None,
                },
                _ => ReplicaReply::Done,
            };
            self.reply(channel, &message, answer);
        }
    }

    pub fn reply(&mut self, channel: Channel, to: &ToReplica<HeapBlock>, reply: ReplicaReply<HeapBlock>) {
        let message = FromReplica {
            shard: to.shard,
            disk: DiskId(0),
            token: to.token,
            id: to.id,
            result: Ok(reply),
        };
        self.outgoing.reply(channel, message);
        self.flush();
    }
}

pub fn hello(from: u128, to: u128) -> Hello {
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
                versions: (wire::VERSION + 1, wire::VERSION + 2),
                ..hello(2, 1)
            },
            RefusedCode::Version,
            "speaks protocol versions 3 to 4",
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
async fn a_host_that_is_forgotten_while_it_is_greeted_is_not_let_in() {
    let host = Host::start(1, 1).await;
    let hello = hello(2, 1);
    let mut ends = Vec::new();
    let mut start = |role| {
        let (socket, end) = std::os::unix::net::UnixStream::pair().expect("sockets");
        ends.push(end);
        LinkStart {
            socket: socket.into(),
            host: HostId(2),
            name: "host-2".to_owned(),
            role,
            version: wire::VERSION,
            greeting: (0, 0),
            seal: None,
            silence: SILENCE,
            over: oneshot::channel().0,
        }
    };
    host.links.set_peer(HostId(2), "host-2", None);
    let round = host.links.peers.lock().expect("peers").rounds;
    assert_eq!(host.links.check(&hello, None), Ok(wire::VERSION));
    host.links.forget_peer(HostId(2));
    let served = LinkRole::Served { plane: 0 };
    let refused = host
        .links
        .let_in(&hello, None, start(served))
        .expect_err("let in");
    assert_eq!(refused.code, RefusedCode::Unknown);
    host.links.called(round, 0, start(LinkRole::Dialled));
    // One that is known again is called anew: what was begun before is not handed over.
    host.links.set_peer(HostId(2), "host-2", None);
    host.links.called(round, 0, start(LinkRole::Dialled));
    assert_eq!(host.links().await.len(), 0);
    host.links.let_in(&hello, None, start(served)).expect("a peer");
    host.links.called(round + 1, 0, start(LinkRole::Dialled));
    assert_eq!(host.links().await.len(), 2);
    host.stop().await;
}
