//! Disks that come, go and move, as a host sees them that is linked to theirs.

use std::net::TcpListener;

use replication::{ReplicaReply, ReplicaRequest};
use store::ReadPart;
use types::{BlockNo, Lineage, Seq, Token};
use wire::{Channel, Outgoing};

use super::strangers::{Stranger, hello};
use super::*;

/// Two hosts that the test plays, both called and greeted by `host`.
fn two_called(host: &Host) -> [Stranger; 2] {
    [2, 3].map(|number| {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("its address").to_string();
        host.links
            .set_peer(HostId(number), &format!("host-{number}"), Some(&address));
        Stranger::accept(&listener, number)
    })
}

async fn heard_from(host: &Host, other: u128) -> u64 {
    let links = host.links().await;
    let link = links.iter().find(|link| link.host == HostId(other));
    link.expect("a link").frames_received
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_moves_is_fenced_before_it_is_written_to() {
    let host = Host::start(1, 1).await;
    let [mut old, mut new] = two_called(&host);
    let (vdi, disk) = (VdiId(1), disk_of(2));
    host.home(disk, Home::Host(HostId(2)));
    for stranger in [&mut old, &mut new] {
        stranger.outgoing.disk_up(Channel(1), disk);
        stranger.flush();
    }
    host.open_vdi(vdi, &[2], &[]).await;
    let data = host.planes.pool.copy_of(&pattern(1, 4096));
    let op = Op::Write {
        offset: 0,
        data,
        fua: false,
    };
    let (reply, answer) = oneshot::channel();
    host.vdi_plane(vdi).send(Command::Request { vdi, op, reply });
    let (_, write) = old.hear_until_write();
    // It is on its way to the old home, which says nothing yet of the disk's going.
    host.home(disk, Home::Host(HostId(3)));
    let Some(Frame::Request(channel, fence)) = new.hear_word() else {
        panic!("no request")
    };
    assert!(matches!(fence.request, ReplicaRequest::Fence { .. }), "{fence:?}");
    // What the old home says now counts for nothing, even in the new one's words.
    let before = heard_from(&host, 2).await;
    old.reply(Channel(1), &write, ReplicaReply::Done);
    let promised = |end| ReplicaReply::Promised {
        previous: Token::default(),
        end,
        good_until: None,
    };
    old.reply(Channel(1), &fence, promised(Seq(1 << 62)));
    while heard_from(&host, 2).await < before + 2 {
        tokio::task::yield_now().await;
    }
    new.reply(channel, &fence, promised(Seq(0)));
    let (channel, write) = new.hear_until_write();
    let is_after_the_end_it_has =
        matches!(write.request, ReplicaRequest::Write { seq, .. } if seq < Seq(1 << 62));
    assert!(is_after_the_end_it_has, "{write:?}");
    new.reply(channel, &write, ReplicaReply::Done);
    let done = tokio::time::timeout(PATIENCE, answer).await.expect("an answer");
    assert!(matches!(done, Ok(Ok(Outcome::Done))), "{done:?}");
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_sent_to_an_earlier_life_of_a_disk_is_dropped() {
    let host = Host::start(1, 1).await;
    host.serve_disk().await;
    host.links.set_peer(HostId(2), "host-2", None);
    let mut peer = Stranger::call(&host, &hello(2, 1));
    assert!(matches!(peer.hear(), Some(Frame::Welcome(_))));
    let (first, _) = peer.hear_disk();
    let vdi = VdiId(9);
    peer.fence(vdi, first);
    host.disk_state(false).await;
    host.disk_state(true).await;
    assert!(matches!(peer.hear_word(), Some(Frame::DiskDown(channel)) if channel == first));
    let (second, _) = peer.hear_disk();
    assert!(second > first);
    // The token is still good: it is the channel that says that something may be missing before it.
    peer.write_mib(vdi, first, 1, 0, &pattern(1, 1 << 20));
    let read = ReplicaRequest::Read {
        lineage: Lineage::of_layer(vdi, LayerId(0)),
        block: BlockNo(0),
        count: 256,
    };
    peer.ask(second, 2, read);
    peer.flush();
    let (id, result) = peer.hear_reply();
    let Ok(ReplicaReply::Read(parts)) = result else {
        panic!("{result:?}")
    };
    assert!(
        id == 2 && matches!(parts[..], [ReadPart::Zeros(256)]),
        "{id} {parts:?}"
    );
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_announces_what_no_host_does_is_let_go() {
    let host = Host::start(1, 1).await;
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("its address").to_string();
    host.links.set_peer(HostId(2), "host-2", Some(&address));
    let said = |announce: &dyn Fn(&mut Outgoing<HeapBlock>)| {
        let mut stranger = Stranger::accept(&listener, 2);
        announce(&mut stranger.outgoing);
        stranger.flush();
        match stranger.hear_word() {
            Some(Frame::Bye(reason)) => reason,
            other => panic!("no last word: {other:?}"),
        }
    };
    let reason = said(&|out| {
        out.disk_up(Channel(1), DiskId(1));
        out.disk_up(Channel(1), DiskId(2));
    });
    assert_eq!(reason, "channel 1 was announced after 1");
    let reason = said(&|out| {
        for disk in 1..=1025 {
            out.disk_up(Channel(disk), DiskId(u128::from(disk)));
        }
    });
    assert_eq!(reason, "more than 1024 disks were announced");
    host.stop().await;
}
