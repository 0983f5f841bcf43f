//! Clients that lie, stop in the middle, never stop, or never listen: each loses its connection at most, and nobody
//! else anything. Raw bytes over a real socket against a real server.

mod support;

use std::sync::Arc;
use std::time::Duration;

use support::{MemoryDisk, Served, pattern, raw::Raw};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::Semaphore;
use weft_nbd::Config;

const MIB: u64 = 1 << 20;
const EXPORT_NAME: u32 = 1;
const ABORT: u32 = 2;
const GO: u32 = 7;
const STRUCTURED_REPLY: u32 = 8;
const SET_META_CONTEXT: u32 = 10;
const ACK: u32 = 1;
const ERR_INVALID: u32 = 0x8000_0003;
const ERR_UNKNOWN: u32 = 0x8000_0006;
const EINVAL: u32 = 22;

/// A name and its length, which need not be right.
fn name(length: u32, bytes: &[u8]) -> Vec<u8> {
    [&length.to_be_bytes()[..], bytes].concat()
}

/// Data of options that is wrong, for whichever option it is sent with, or right for another.
fn option_data() -> Vec<(&'static str, Vec<u8>)> {
    let disk = name(4, b"disk");
    vec![
        ("nothing", vec![]),
        ("a byte", vec![0]),
        ("half a length", vec![0, 0, 0]),
        ("a length of 4 GiB", name(u32::MAX, b"disk")),
        ("a length one too long", name(5, b"disk")),
        ("a name without the rest", disk.clone()),
        (
            "a name that is not UTF-8",
            [name(4, b"\xff\xfe\xfd\xfc"), vec![0, 0]].concat(),
        ),
        ("a name with a NUL", [name(4, b"di\0k"), vec![0, 0]].concat()),
        (
            "a name of 4,097 bytes",
            [name(4097, &[b'x'; 4097]), vec![0, 0]].concat(),
        ),
        ("a name nobody has", [name(3, b"no!"), vec![0, 0]].concat()),
        (
            "65,535 kinds of information",
            [disk.clone(), vec![0xff, 0xff]].concat(),
        ),
        ("4 billion queries", [disk.clone(), vec![0xff; 4]].concat()),
        (
            "a query of 4 GiB",
            [disk.clone(), vec![0, 0, 0, 1], vec![0xff; 4]].concat(),
        ),
        (
            "a query that is not UTF-8",
            [disk.clone(), vec![0, 0, 0, 1], name(1, b"\xff")].concat(),
        ),
        (
            "something behind the end",
            [disk.clone(), vec![0, 1, 0, 3, 9]].concat(),
        ),
        ("64 KiB", vec![0; 64 << 10]),
        ("a byte more than is read", vec![0; (64 << 10) + 1]),
        ("1 MiB", vec![0; 1 << 20]),
    ]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_option_with_wrong_data_is_answered_and_leaves_the_stream_in_step() {
    let served = Served::new(MemoryDisk::new(MIB, 512));
    for option in (0..=12).chain([99, 1 << 31, u32::MAX]) {
        for (what, data) in option_data() {
            let mut client = Raw::greet(&served.socket(), 3).await;
            client.option(option, &data).await;
            if option == EXPORT_NAME {
                // It cannot be refused but by hanging up.
                client.expect_end().await;
                continue;
            }
            loop {
                let (kind, body) = client.option_reply().await;
                let is_error = kind & 1 << 31 != 0;
                assert!(
                    !is_error || std::str::from_utf8(&body).is_ok_and(|text| !text.is_empty()),
                    "{option}: {what}"
                );
                if is_error || kind == ACK {
                    break;
                }
            }
            if option == ABORT && data.len() <= 64 << 10 {
                client.expect_end().await;
                continue;
            }
            client.go("disk").await;
            if option == STRUCTURED_REPLY && data.is_empty() {
                continue; // Right, for once.
            }
            assert_eq!(
                client.read(0, 512).await,
                Ok(vec![0; 512]),
                "after option {option}: {what}"
            );
        }
    }
    served.server.stop().await;
}

#[tokio::test]
async fn haggling_without_end_ends_with_the_time_for_it() {
    let config = Config {
        handshake_timeout: Duration::from_millis(100),
        ..Config::default()
    };
    let served = Served::with(MemoryDisk::new(MIB, 512), config);
    let mut client = UnixStream::connect(served.socket()).await.unwrap();
    client.write_all(&3_u32.to_be_bytes()).await.unwrap();
    let option = [&b"IHAVEOPT"[..], &STRUCTURED_REPLY.to_be_bytes(), &[0; 4]].concat();
    let (mut reader, mut writer) = client.split();
    let haggle = async { while writer.write_all(&option).await.is_ok() {} };
    let listen = async { while reader.read(&mut [0; 4096]).await.is_ok_and(|count| count > 0) {} };
    let both = async { tokio::join!(haggle, listen) };
    let ended = tokio::time::timeout(Duration::from_secs(30), both).await;
    assert!(ended.is_ok(), "a client may haggle for ever");
    let mut client = Raw::open(&served.socket(), "disk").await;
    assert_eq!(client.read(0, 512).await, Ok(vec![0; 512]));
    served.server.stop().await;
}

#[tokio::test]
async fn contexts_are_for_clients_that_asked_in_order() {
    let served = Served::new(MemoryDisk::new(MIB, 512));
    let mut client = Raw::greet(&served.socket(), 3).await;
    let select = |export: &[u8]| {
        let query = name(15, b"base:allocation");
        [name(export.len() as u32, export), vec![0, 0, 0, 1], query].concat()
    };
    client.option(SET_META_CONTEXT, &select(b"disk")).await;
    assert_eq!(
        client.option_reply().await.0,
        ERR_INVALID,
        "before structured replies"
    );
    for _ in 0..3 {
        client.option(STRUCTURED_REPLY, &[]).await;
        assert_eq!(client.option_reply().await.0, ACK);
    }
    client.option(SET_META_CONTEXT, &select(b"disk")).await;
    while client.option_reply().await.0 != ACK {}
    // What comes of it, it takes the place of what was selected before.
    client.option(SET_META_CONTEXT, &select(b"other")).await;
    assert_eq!(client.option_reply().await.0, ERR_UNKNOWN);
    client.go("disk").await;
    client.request(7, 0, 5, 0, 4096).await;
    let head = client.receive(20).await;
    assert_eq!(
        head[..8],
        [0x66, 0x8e, 0x33, 0xef, 0, 1, 0x80, 1],
        "an error chunk, the last"
    );
    let length = u32::from_be_bytes(head[16..].try_into().unwrap());
    let body = client.receive(length as usize).await;
    assert_eq!(body[..4], EINVAL.to_be_bytes());
    assert!(String::from_utf8_lossy(&body[6..]).contains("no metadata context"));
    served.server.stop().await;
}

/// Offsets and lengths at which checks turn, on a disk of 1 MiB.
const RANGES: [(u64, u32); 14] = [
    (0, 0),
    (0, 1),
    (0, 512),
    (1, 512),
    (511, 1),
    (512, 513),
    (MIB - 512, 512),
    (MIB - 512, 1024),
    (MIB, 512),
    (MIB, 0),
    (1 << 40, 4096),
    (u64::MAX - 511, 512),
    (u64::MAX, 1),
    (0, u32::MAX),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_request_changes_what_is_read_only() {
    let disk = MemoryDisk::new(MIB, 512).read_only();
    let content = pattern(7, MIB as usize);
    disk.fill(0, &content);
    let served = Served::new(disk);
    let mut client = Raw::open(&served.socket(), "disk").await;
    let mut is_answered = 0;
    for kind in (0..10).chain([100, 0x8000, 0xffff]).filter(|kind| *kind != 2) {
        for flags in (0..16).map(|bit| 1 << bit).chain([0, 0xffff]) {
            for (offset, length) in RANGES {
                if kind == 1 && length > 4096 {
                    continue; // Its data would have to follow.
                }
                let cookie = offset ^ u64::from(length) << 20 ^ u64::from(flags);
                client.request(kind, flags, cookie, offset, length).await;
                if kind == 1 {
                    client.send(&vec![0xEE; length as usize]).await;
                }
                let (errno, answered) = client.simple_reply().await;
                assert_eq!(
                    answered, cookie,
                    "command {kind} flags {flags:#x} at {offset}+{length}"
                );
                let is_inside = length > 0
                    && length % 512 == 0
                    && offset % 512 == 0
                    && offset.checked_add(length.into()).is_some_and(|end| end <= MIB);
                let may_pass =
                    flags & !1 == 0 && (kind == 0 && is_inside || kind == 3 && (offset, length) == (0, 0));
                assert_eq!(
                    errno == 0,
                    may_pass,
                    "command {kind} flags {flags:#x} at {offset}+{length}: {errno}"
                );
                if kind == 0 && errno == 0 {
                    let data = client.receive(length as usize).await;
                    assert!(data == content[offset as usize..][..length as usize]);
                }
                is_answered += 1;
            }
        }
    }
    assert!(is_answered > 2_500, "{is_answered} requests");
    assert!(
        served.disk.content(0, MIB as usize) == content,
        "a read-only disk was changed"
    );
    served.server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_stops_in_the_middle_has_done_nothing() {
    let config = Config {
        connections_max: 1_000,
        ..Config::default()
    };
    let served = Served::with(MemoryDisk::new(MIB, 512), config);
    let go = [name(4, b"disk"), vec![0, 1, 0, 3]].concat();
    let mut write = 0x2560_9513_u32.to_be_bytes().to_vec();
    write.extend_from_slice(&[0, 0, 0, 1]);
    write.extend_from_slice(&[9; 8]);
    write.extend_from_slice(&4096_u64.to_be_bytes());
    write.extend_from_slice(&1024_u32.to_be_bytes());
    write.extend_from_slice(&[0xEE; 1024]);
    let whole = [
        &3_u32.to_be_bytes()[..],
        b"IHAVEOPT",
        &GO.to_be_bytes(),
        &(go.len() as u32).to_be_bytes(),
        &go,
        &write,
    ]
    .concat();
    for end in (0..90)
        .chain((90..whole.len()).step_by(97))
        .chain([whole.len() - 1])
    {
        let mut client = Raw::connect(&served.socket()).await;
        client.send(&whole[..end]).await;
    }
    // All of them have been served to their end when the server has stopped.
    let disk = Arc::clone(&served.disk);
    let mut good = Raw::open(&served.socket(), "disk").await;
    assert_eq!(good.read(4096, 1024).await, Ok(vec![0; 1024]));
    drop(good);
    served.server.stop().await;
    assert_eq!(disk.allocated_blocks(), 0, "half a write was written");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_never_listens_is_not_listened_to() {
    const REQUESTS: u64 = 10_000;
    let mut disk = MemoryDisk::new(MIB, 512);
    disk.gate = Some(Semaphore::new(0));
    let served = Served::new(disk);
    let bound = Config::default().requests_max as u32;
    let client = Raw::open(&served.socket(), "disk").await;
    let (mut reader, mut writer) = client.into_stream().into_split();
    let flood = tokio::spawn(async move {
        for cookie in 0..REQUESTS {
            let head = [
                &0x2560_9513_u32.to_be_bytes()[..],
                &[0; 4],
                &cookie.to_be_bytes(),
                &[0; 8],
            ]
            .concat();
            writer
                .write_all(&[&head[..], &512_u32.to_be_bytes()].concat())
                .await
                .unwrap();
        }
        writer
    });
    served.disk.begun.acquire_many(bound).await.unwrap().forget();
    // Another client is served meanwhile, and for as long as it takes to see whether a further request is begun.
    let mut other = Raw::open(&served.socket(), "disk").await;
    for cookie in 0..500 {
        other.request(3, 0, cookie, 0, 0).await;
        assert_eq!(other.simple_reply().await, (0, cookie));
    }
    assert_eq!(
        served.disk.begun.available_permits(),
        0,
        "more than {bound} requests were begun"
    );
    served.disk.gate.as_ref().unwrap().add_permits(REQUESTS as usize);
    let mut is_answered = vec![false; REQUESTS as usize];
    for _ in 0..REQUESTS {
        let mut reply = [0; 16 + 512];
        reader.read_exact(&mut reply).await.unwrap();
        let cookie = u64::from_be_bytes(reply[8..16].try_into().unwrap());
        assert!(
            !std::mem::replace(&mut is_answered[cookie as usize], true),
            "{cookie} twice"
        );
    }
    drop(flood.await.unwrap());
    served.server.stop().await;
}
