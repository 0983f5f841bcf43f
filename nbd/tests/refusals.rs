//! What a client that speaks badly, or at the wrong time, is told: over a raw socket, byte by byte.

mod support;

use std::time::Duration;

use support::{MemoryDisk, Served, pattern, raw::Raw};
use tokio::sync::Semaphore;
use weft_nbd::Config;

const READ: u16 = 0;
const WRITE: u16 = 1;
const FLUSH: u16 = 3;
const EPERM: u32 = 1;
const EIO: u32 = 5;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;
const EOVERFLOW: u32 = 75;
const MIB: u64 = 1 << 20;

#[tokio::test]
async fn bad_magic_and_bad_flags_end_the_connection() {
    let served = Served::new(MemoryDisk::new(MIB, 512));
    let mut client = Raw::connect(&served.socket()).await;
    client.send(&0x8000_0003_u32.to_be_bytes()).await;
    client.expect_end().await;

    let mut wrong = Raw::greet(&served.socket(), 3).await;
    wrong.send(b"GET / HTTP/1.1\r\n").await;
    wrong.expect_end().await;

    let mut client = Raw::open(&served.socket(), "disk").await;
    client.send(&[0x25; 28]).await;
    client.expect_end().await;
    served.server.stop().await;
}

#[tokio::test]
async fn options_with_too_much_data() {
    let served = Served::new(MemoryDisk::new(MIB, 512));
    let mut client = Raw::greet(&served.socket(), 3).await;
    client.option(7, &vec![0; 65 << 10]).await;
    assert_eq!(client.option_reply().await.0, 0x8000_0009, "ERR_TOO_BIG");
    client.go("disk").await;
    assert_eq!(client.read(0, 512).await, Ok(vec![0; 512]));

    let mut client = Raw::greet(&served.socket(), 3).await;
    client.option_header(7, 2 << 20).await;
    client.expect_end().await;
    served.server.stop().await;
}

#[tokio::test]
async fn export_name_cannot_say_no_politely() {
    let served = Served::new(MemoryDisk::new(MIB, 512));
    let mut client = Raw::greet(&served.socket(), 3).await;
    client.option(1, b"nothing").await;
    client.expect_end().await;

    let mut client = Raw::greet(&served.socket(), 1).await;
    client.option(1, b"disk").await;
    let described = client.receive(8 + 2 + 124).await;
    assert_eq!(described[..8], MIB.to_be_bytes());
    assert_eq!(client.read(0, 512).await, Ok(vec![0; 512]));
    served.server.stop().await;
}

#[tokio::test]
async fn refused_requests_leave_the_connection_in_step() {
    let served = Served::new(MemoryDisk::new(64 * MIB, 4096));
    served.disk.fill(4096, &pattern(1, 4096));
    let mut client = Raw::open(&served.socket(), "disk").await;
    let cases = [
        ("out of range read", READ, 64 * MIB, 4096, EINVAL),
        ("out of range write", WRITE, 64 * MIB, 4096, ENOSPC),
        ("wrapping write", WRITE, u64::MAX - 4095, 8192, ENOSPC),
        ("misaligned write", WRITE, 512, 4096, EINVAL),
        ("misaligned read", READ, 0, 512, EINVAL),
        ("oversize write", WRITE, 0, (32 << 20) + 4096, EOVERFLOW),
        ("oversize read", READ, 0, (32 << 20) + 4096, EOVERFLOW),
        ("CACHE", 5, 0, 4096, EINVAL),
        ("RESIZE", 8, 0, 4096, EINVAL),
        ("unknown", 500, 0, 4096, EINVAL),
        ("BLOCK_STATUS without a context", 7, 0, 4096, EINVAL),
    ];
    for (what, kind, offset, length, errno) in cases {
        client.request(kind, 0, 9, offset, length).await;
        if kind == WRITE {
            client.send(&vec![0xEE; length as usize]).await;
        }
        assert_eq!(client.simple_reply().await, (errno, 9), "{what}");
        assert_eq!(
            client.read(4096, 4096).await,
            Ok(pattern(1, 4096)),
            "after {what}"
        );
    }
    assert_eq!(served.disk.allocated_blocks(), 1, "a refused write was written");
    served.server.stop().await;
}

#[tokio::test]
async fn a_read_only_export_takes_no_writes() {
    let served = Served::new(MemoryDisk::new(MIB, 512).read_only());
    let mut client = Raw::open(&served.socket(), "disk").await;
    for kind in [WRITE, 4, 6] {
        client.request(kind, 0, 5, 0, 512).await;
        if kind == WRITE {
            client.send(&[1; 512]).await;
        }
        assert_eq!(client.simple_reply().await, (EPERM, 5));
    }
    assert_eq!(client.read(0, 512).await, Ok(vec![0; 512]));
    served.server.stop().await;
}

#[tokio::test]
async fn an_export_that_fails_is_an_errno() {
    let mut disk = MemoryDisk::new(MIB, 512);
    disk.bad_offset = Some(512);
    let served = Served::new(disk);
    let mut client = Raw::open(&served.socket(), "disk").await;
    assert_eq!(client.read(512, 512).await, Err(EIO));
    assert_eq!(client.read(0, 512).await, Ok(vec![0; 512]));
    served.server.stop().await;
}

/// A gated read, then a flush: who is answered first, with this many requests allowed at once.
async fn first_answered(requests_max: usize) -> u64 {
    let mut disk = MemoryDisk::new(MIB, 512);
    disk.gate = Some(Semaphore::new(0));
    let served = Served::with(
        disk,
        Config {
            requests_max,
            ..Config::default()
        },
    );
    let mut client = Raw::open(&served.socket(), "disk").await;
    client.request(READ, 0, 1, 0, 512).await;
    client.request(FLUSH, 0, 2, 0, 0).await;
    let gate = served.disk.gate.as_ref().unwrap();
    if requests_max == 1 {
        gate.add_permits(1);
    }
    let (errno, first) = client.simple_reply().await;
    assert_eq!(errno, 0);
    drop(client);
    gate.add_permits(1);
    served.server.stop().await;
    first
}

#[tokio::test]
async fn replies_overtake_each_other_within_the_bound_only() {
    assert_eq!(
        first_answered(2).await,
        2,
        "a flush waited for a read that was not done"
    );
    assert_eq!(
        first_answered(1).await,
        1,
        "a request was started beyond the bound"
    );
}

#[tokio::test]
async fn bytes_in_flight_are_bounded_until_they_are_sent() {
    // Four reads of the whole bound each: they go through one at a time, and all arrive.
    let served = Served::new(MemoryDisk::new(32 * MIB, 512));
    served.disk.fill(0, &pattern(2, 4096));
    let mut client = Raw::open(&served.socket(), "disk").await;
    for cookie in 0..4 {
        client.request(READ, 0, cookie, 0, 32 << 20).await;
    }
    for cookie in 0..4 {
        assert_eq!(client.simple_reply().await, (0, cookie), "one after the other");
        let data = client.receive(32 << 20).await;
        assert!(data[..4096] == pattern(2, 4096) && data[4096..].iter().all(|byte| *byte == 0));
    }
    served.server.stop().await;
}

#[tokio::test]
async fn a_client_that_dawdles_in_the_handshake_is_hung_up_on() {
    let config = Config {
        handshake_timeout: Duration::from_millis(50),
        ..Config::default()
    };
    let served = Served::with(MemoryDisk::new(MIB, 512), config);
    let mut client = Raw::connect(&served.socket()).await;
    client.send(&[0]).await;
    client.expect_end().await;
    let mut client = Raw::open(&served.socket(), "disk").await;
    assert_eq!(
        client.read(0, 512).await,
        Ok(vec![0; 512]),
        "the bound is for the handshake only"
    );
    served.server.stop().await;
}
