use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;

use types::Room;

use super::*;
use crate::uring::{Event, Pool, PoolConfig, Ring, RingConfig, Wait};

fn ring() -> Ring {
    let pool = Pool::new(PoolConfig { slots: [64, 16, 4] }).expect("a pool");
    Ring::new(RingConfig { entries: 8, pool }).expect("a ring")
}

/// A loopback connection: the end for a ring, and the other. Non-blocking, as tokio leaves its sockets.
fn connection() -> (OwnedFd, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let near = TcpStream::connect(listener.local_addr().expect("its address")).expect("connecting");
    near.set_nonblocking(true).expect("a socket");
    let (far, _) = listener.accept().expect("accepting");
    (near.into(), far)
}

fn landing(ring: &Ring, first: usize, second: usize) -> Landing {
    Landing {
        rooms: [ring.pool().take(first), ring.pool().take(second)],
        from: [0, 0],
    }
}

/// The one event of as many turns as it takes.
fn event(ring: &mut Ring) -> Event {
    let mut events = Vec::new();
    while events.is_empty() {
        ring.turn(Wait::Forever, &mut events);
    }
    assert_eq!(events.len(), 1, "{events:?}");
    events.remove(0)
}

#[test]
fn pieces_leave_in_order_in_one_system_call() {
    let mut ring = ring();
    let (near, mut far) = connection();
    let slot = ring.add_stream(near).expect("adding");
    let buffer = |byte: u8, length: usize| ring.pool().copy_of(&vec![byte; length]);
    let gather = Gather {
        small: b"headtail".to_vec(),
        large: vec![(4, buffer(1, 4096)), (4, buffer(2, 100)), (8, buffer(3, 10))],
    };
    let before = ring.enters();
    ring.send(slot, gather);
    let Event::Sent(_, gather, Ok(())) = event(&mut ring) else {
        panic!("not sent")
    };
    assert_eq!((ring.enters() - before, gather.small.len()), (1, 8));
    let mut came = vec![0; 8 + 4096 + 110];
    far.read_exact(&mut came).expect("all of it");
    let right = [&b"head"[..], &[1; 4096], &[2; 100], b"tail", &[3; 10]].concat();
    assert_eq!(came, right);
}

#[test]
fn more_than_a_socket_holds_arrives_whole_however_slowly_it_is_read() {
    let mut ring = ring();
    let (near, mut far) = connection();
    let slot = ring.add_stream(near).expect("adding");
    let bytes: Vec<u8> = (0..1u32 << 20).map(|i| (i % 251) as u8).collect();
    let whole = ring.pool().copy_of(&bytes);
    // More pieces than one call takes, so that the rest goes in another.
    let large: Vec<(usize, Buf)> = (0..20_000).map(|_| (1, whole.slice(7, 1000))).collect();
    ring.send(
        slot,
        Gather {
            small: vec![9; 2],
            large,
        },
    );
    let reader = std::thread::spawn(move || {
        let mut all = Vec::new();
        far.read_to_end(&mut all).expect("reading");
        all
    });
    let sent = event(&mut ring);
    assert!(matches!(sent, Event::Sent(_, _, Ok(()))), "{sent:?}");
    ring.remove_stream(slot);
    let came = reader.join().expect("the reader");
    let right = [&[9][..], &bytes[7..1007].repeat(20_000), &[9]].concat();
    assert!(came == right, "{} of {} B", came.len(), right.len());
}

#[test]
fn what_comes_fills_one_room_and_then_the_other() {
    let mut ring = ring();
    let (near, mut far) = connection();
    let slot = ring.add_stream(near).expect("adding");
    far.write_all(b"0123456789").expect("writing");
    let mut where_to = landing(&ring, 8, 4096);
    where_to.rooms[0].content_mut()[..2].copy_from_slice(b"ab");
    where_to.from = [2, 5];
    ring.receive(slot, where_to);
    let Event::Received(from, mut landing, Ok(10)) = event(&mut ring) else {
        panic!("not received")
    };
    assert_eq!(from, slot);
    assert_eq!(&landing.rooms[0][..], b"ab012345");
    assert_eq!(&landing.rooms[1][5..9], b"6789");
    // What is split off stays as it is while the rest is received into.
    let front = landing.rooms[1].split_front(9);
    let before = front.bytes().to_vec();
    landing.from = [8, 0];
    far.write_all(b"xyz").expect("writing");
    ring.receive(slot, landing);
    let Event::Received(_, landing, Ok(3)) = event(&mut ring) else {
        panic!("not received")
    };
    assert_eq!(&landing.rooms[1][..3], b"xyz");
    assert_eq!(front.bytes(), before);
    drop(far);
    ring.receive(slot, landing);
    assert!(matches!(event(&mut ring), Event::Received(_, _, Ok(0))));
}

#[test]
fn a_stream_that_ends_gives_its_memory_back_and_says_nothing_more() {
    let mut ring = ring();
    let free = ring.pool().free_slots();
    let (near, mut far) = connection();
    let slot = ring.add_stream(near).expect("adding");
    let room = landing(&ring, 4096, 4096);
    ring.receive(slot, room);
    ring.flush();
    // And one that the kernel was never given.
    let large = vec![(0, ring.pool().take(4096).freeze())];
    ring.send(
        slot,
        Gather {
            small: Vec::new(),
            large,
        },
    );
    ring.remove_stream(slot);
    ring.remove_stream(slot);
    let mut rest = Vec::new();
    assert_eq!(far.read_to_end(&mut rest).expect("its end"), 0);
    let mut events = Vec::new();
    while ring.pool().free_slots() != free {
        ring.turn(Wait::No, &mut events);
    }
    assert!(events.is_empty(), "{events:?}");
}

#[test]
fn a_broken_connection_is_an_error_with_its_number() {
    let mut ring = ring();
    let (near, far) = connection();
    let slot = ring.add_stream(near).expect("adding");
    drop(far);
    let mut error = None;
    // The first send may still be taken: the other end answers it with a reset.
    while error.is_none() {
        ring.send(
            slot,
            Gather {
                small: vec![0; 4096],
                large: Vec::new(),
            },
        );
        match event(&mut ring) {
            Event::Sent(_, _, Err(told)) => error = Some(told),
            other => assert!(matches!(other, Event::Sent(_, _, Ok(()))), "{other:?}"),
        }
    }
    let error = error.expect("just seen");
    assert!(matches!(error.errno, libc::EPIPE | libc::ECONNRESET), "{error}");
}

#[test]
fn a_ring_ends_with_a_receive_under_way() {
    let mut ring = ring();
    let (near, _far) = connection();
    let slot = ring.add_stream(near).expect("adding");
    let room = landing(&ring, 0, 4096);
    ring.receive(slot, room);
    ring.flush();
    drop(ring);
}
