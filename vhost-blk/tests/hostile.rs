//! Frontends that send anything at all: each loses its connection at most. No thread of the daemon panics (in a
//! release that would end the process and the disks of all), and another device's guest is served all the while.

mod support;

use std::fs::File;
use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Once};
use std::time::Duration;

use rustix::event::EventfdFlags;
use rustix::fs::MemfdFlags;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use support::MemoryPlane;
use support::guest::Guest;
use weft_vhost_blk::{DeviceConfig, DeviceId, Server};

const DISK_BYTES: usize = 1 << 20;
const MEMORY_BYTES: u64 = 1 << 20;
const SET_FEATURES: u32 = 2;
const SET_OWNER: u32 = 3;
const SET_MEM_TABLE: u32 = 5;
const SET_VRING_NUM: u32 = 8;
const SET_VRING_ADDR: u32 = 9;
const SET_VRING_BASE: u32 = 10;
const GET_VRING_BASE: u32 = 11;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const SET_PROTOCOL_FEATURES: u32 = 16;
const SET_VRING_ENABLE: u32 = 18;
const GET_CONFIG: u32 = 24;
const SET_CONFIG: u32 = 25;
const ADD_MEM_REG: u32 = 37;
const REM_MEM_REG: u32 = 38;
const VERSION: u32 = 1;
const NEED_REPLY: u32 = 8;

static PANICS: AtomicU64 = AtomicU64::new(0);

/// Counts panics on threads that are the server's.
fn watch_for_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            let thread = std::thread::current();
            if !thread.name().is_some_and(|name| TESTS.contains(&name)) {
                PANICS.fetch_add(1, Ordering::Relaxed);
            }
            usual(info);
        }));
    });
}

/// The harness names threads after tests.
const TESTS: [&str; 6] = [
    "every_message_in_every_wrong_form",
    "memory_that_cannot_be",
    "rings_that_cannot_be",
    "messages_in_any_order",
    "conversations_cut_anywhere",
    "a_thousand_reconnects_leave_nothing_behind",
];

/// A device under attack, and another one whose guest must not notice.
struct World {
    path: PathBuf,
    good: Guest,
    _servers: [Server; 2],
    _planes: [Arc<MemoryPlane>; 2],
    _folder: tempfile::TempDir,
}

impl World {
    fn new() -> World {
        watch_for_panics();
        let folder = tempfile::tempdir().unwrap();
        let planes = [MemoryPlane::new(DISK_BYTES), MemoryPlane::new(DISK_BYTES)];
        let config = || DeviceConfig {
            queue_size: 64,
            ..DeviceConfig::new(DISK_BYTES as u64, 512)
        };
        let path = folder.path().join("bad");
        let good_path = folder.path().join("good");
        let servers = [
            Server::start(&path, DeviceId(1), config(), Arc::clone(&planes[0]) as _).unwrap(),
            Server::start(&good_path, DeviceId(2), config(), Arc::clone(&planes[1]) as _).unwrap(),
        ];
        let mut good = Guest::new();
        good.start(&good_path);
        World {
            path,
            good,
            _servers: servers,
            _planes: planes,
            _folder: folder,
        }
    }

    /// Sends the messages, then listens until the server hangs up, which it must.
    fn say(&self, what: &str, messages: &[Message]) {
        let mut stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        for message in messages {
            if message.send(&stream).is_err() {
                break; // It has hung up already.
            }
        }
        let _ = stream.shutdown(Shutdown::Write);
        let mut answers = Vec::new();
        if let Err(error) = stream.read_to_end(&mut answers) {
            assert_eq!(
                error.kind(),
                std::io::ErrorKind::ConnectionReset,
                "{what}: the server does not hang up"
            );
        }
    }

    /// Both devices serve guests, and nothing has panicked.
    fn check(&mut self) {
        round_trip(&mut self.good);
        let mut guest = Guest::new();
        guest.start(&self.path);
        round_trip(&mut guest);
        assert_eq!(
            PANICS.load(Ordering::Relaxed),
            0,
            "a thread of the server panicked"
        );
    }
}

fn round_trip(guest: &mut Guest) {
    guest.write(8, &[0x5a; 1024]);
    assert_eq!(guest.finish(1)[0].status, 0);
    let head = guest.read(8, 1024);
    assert_eq!(guest.finish(1)[0].status, 0);
    assert_eq!(guest.content(head, 1024), [0x5a; 1024]);
}

#[derive(Clone)]
struct Message {
    request: u32,
    flags: u32,
    /// The header's size, where it is not the body's.
    size: Option<u32>,
    body: Vec<u8>,
    fds: Vec<Arc<OwnedFd>>,
}

fn message(request: u32, body: Vec<u8>) -> Message {
    Message {
        request,
        flags: VERSION,
        size: None,
        body,
        fds: Vec::new(),
    }
}

impl Message {
    fn with(mut self, fds: &[&Arc<OwnedFd>]) -> Message {
        self.fds = fds.iter().map(|fd| Arc::clone(fd)).collect();
        self
    }

    fn bytes(&self) -> Vec<u8> {
        let size = self.size.unwrap_or(self.body.len() as u32);
        let head = [self.request, self.flags, size].map(u32::to_le_bytes);
        [head.as_flattened(), &self.body].concat()
    }

    fn send(&self, stream: &UnixStream) -> rustix::io::Result<()> {
        let fds: Vec<_> = self.fds.iter().map(|fd| fd.as_fd()).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(40))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        }
        let bytes = self.bytes();
        rustix::net::sendmsg(stream, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL).map(drop)
    }
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn longs(longs: &[u64]) -> Vec<u8> {
    longs.iter().flat_map(|long| long.to_le_bytes()).collect()
}

fn memory() -> Arc<OwnedFd> {
    let file = File::from(rustix::fs::memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(MEMORY_BYTES).unwrap();
    Arc::new(file.into())
}

fn eventfd() -> Arc<OwnedFd> {
    Arc::new(rustix::event::eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap())
}

/// Files of all kinds that no frontend has a reason to send.
fn strange_files() -> Vec<Arc<OwnedFd>> {
    let (pipe, _) = rustix::pipe::pipe().unwrap();
    let (socket, _) = UnixStream::pair().unwrap();
    let empty = rustix::fs::memfd_create("empty", MemfdFlags::CLOEXEC).unwrap();
    let mut files = vec![pipe, socket.into(), empty];
    for path in ["/dev/null", "/", "/proc/self/status", "/dev/zero"] {
        files.push(File::open(path).unwrap().into());
    }
    files.push(eventfd().try_clone().unwrap());
    files.into_iter().map(Arc::new).collect()
}

/// Features agreed on, protocol features too.
fn hello() -> Vec<Message> {
    vec![
        message(SET_OWNER, vec![]),
        message(SET_FEATURES, longs(&[1 << 32 | 1 << 30])),
        // Queues, acknowledgement, configuration, memory slots.
        message(SET_PROTOCOL_FEATURES, longs(&[1 | 1 << 3 | 1 << 9 | 1 << 15])),
    ]
}

/// Guest address, size, user address, offset in the file.
type Region = [u64; 4];

const REGION: Region = [0, MEMORY_BYTES, 0x7000_0000, 0];

fn mem_table(regions: &[Region]) -> Vec<u8> {
    let mut body = words(&[regions.len() as u32, 0]);
    regions.iter().for_each(|region| body.extend(longs(region)));
    body
}

fn ring(file: &Arc<OwnedFd>, kick: &Arc<OwnedFd>) -> Vec<Message> {
    let at = REGION[2];
    vec![
        message(SET_MEM_TABLE, mem_table(&[REGION])).with(&[file]),
        message(SET_VRING_NUM, words(&[0, 16])),
        message(SET_VRING_BASE, words(&[0, 0])),
        message(
            SET_VRING_ADDR,
            [words(&[0, 0]), longs(&[at, at + 0x2000, at + 0x1000, 0])].concat(),
        ),
        message(SET_VRING_KICK, longs(&[0])).with(&[kick]),
        message(SET_VRING_CALL, longs(&[0])).with(&[kick]),
        message(SET_VRING_ENABLE, words(&[0, 1])),
        message(GET_VRING_BASE, words(&[0, 0])),
    ]
}

#[test]
fn every_message_in_every_wrong_form() {
    let mut world = World::new();
    let file = memory();
    for request in (0..=46).chain([100, u32::MAX]) {
        for size in [0, 1, 8, 12, 20, 40, 4096] {
            for fill in [0, 0xff] {
                for fds in [0, 1, 3] {
                    let mut messages = hello();
                    let wrong = message(request, vec![fill; size]).with(&vec![&file; fds]);
                    messages.push(wrong);
                    world.say(
                        &format!("{request} with {size} of {fill:#x}, {fds} files"),
                        &messages,
                    );
                }
            }
        }
        // Without greeting; as an answer; in another version; longer or shorter than it says; too many files.
        let plain = message(request, vec![0; 8]);
        let forms = [
            plain.clone(),
            Message {
                flags: VERSION | 4,
                ..plain.clone()
            },
            Message {
                flags: 0,
                ..plain.clone()
            },
            Message {
                flags: u32::MAX,
                ..plain.clone()
            },
            Message {
                flags: VERSION | NEED_REPLY,
                ..plain.clone()
            },
            Message {
                size: Some(4),
                ..plain.clone()
            },
            Message {
                size: Some(9),
                ..plain.clone()
            },
            Message {
                size: Some(4097),
                ..plain.clone()
            },
            Message {
                size: Some(u32::MAX),
                ..plain.clone()
            },
            plain.with(&[&file; 33]),
        ];
        for (index, form) in forms.into_iter().enumerate() {
            world.say(&format!("{request}, form {index}"), &[form]);
        }
    }
    world.check();
}

#[test]
fn memory_that_cannot_be() {
    let mut world = World::new();
    let (file, kick) = (memory(), eventfd());
    let (size, user) = (MEMORY_BYTES, REGION[2]);
    let regions: &[&[Region]] = &[
        &[],
        &[[0, 0, user, 0]],
        &[[0, 1, user, 0]],
        &[[0, size + 1, user, 0]],
        &[[0, size * 2, user, 0]],
        &[[0, 1 << 46, user, 0]],
        &[[0, 1 << 60, user, 0]],
        &[[0, u64::MAX, user, 0]],
        &[[u64::MAX, size, user, 0]],
        &[[u64::MAX - size + 1, size, user, 0]],
        &[[0, size, u64::MAX, 0]],
        &[[0, size, u64::MAX - size + 1, 0]],
        &[[0, size, user, size]],
        &[[0, size, user, 1]],
        &[[0, size, user, u64::MAX]],
        &[[0, size, user, u64::MAX - 4095]],
        &[[0, size, user, 1 << 63]],
        &[REGION, REGION],
        &[REGION, [size / 2, size, user + size, 0]],
        &[REGION, [size, size, user, 0]],
        &[[size, size, user + size, 0], REGION],
        &[REGION; 32],
        &[REGION; 33],
    ];
    let mut files = strange_files();
    files.insert(0, file);
    for file in &files {
        for table in regions {
            let mut messages = hello();
            messages.push(message(SET_MEM_TABLE, mem_table(table)).with(&vec![file; table.len()]));
            messages.extend(ring(file, &kick).into_iter().skip(1));
            world.say(&format!("{table:x?}"), &messages);
            for region in *table {
                let body = [longs(&[0]), longs(region)].concat();
                let mut messages = hello();
                messages.push(message(ADD_MEM_REG, body.clone()).with(&[file]));
                messages.push(message(ADD_MEM_REG, body.clone()).with(&[file]));
                messages.push(message(REM_MEM_REG, body.clone()));
                messages.push(message(REM_MEM_REG, body));
                world.say(&format!("add {region:x?}"), &messages);
                if table.len() > 2 {
                    break;
                }
            }
        }
    }
    world.check();
}

#[test]
fn rings_that_cannot_be() {
    let mut world = World::new();
    let (file, kick) = (memory(), eventfd());
    let at = REGION[2];
    let end = at + MEMORY_BYTES;
    let addresses = |index: u32, flags: u32, places: [u64; 4]| {
        message(SET_VRING_ADDR, [words(&[index, flags]), longs(&places)].concat())
    };
    let mut wrong = Vec::new();
    for index in [0, 1, 2, 64, 255, 256, 65_535, u32::MAX] {
        for value in [0, 1, 2, 3, 15, 17, 1024, 1025, 32_768, 65_535, 65_536, u32::MAX] {
            for request in [SET_VRING_NUM, SET_VRING_BASE, SET_VRING_ENABLE, GET_VRING_BASE] {
                wrong.push(message(request, words(&[index, value])));
            }
        }
        for request in [SET_VRING_KICK, SET_VRING_CALL, 14] {
            for value in [u64::from(index), u64::from(index) | 1 << 8, u64::MAX] {
                wrong.push(message(request, longs(&[value])));
                for strange in strange_files() {
                    wrong.push(message(request, longs(&[value])).with(&[&strange]));
                }
            }
        }
        wrong.push(addresses(index, u32::MAX, [at; 4]));
    }
    for place in [
        0,
        1,
        at + 1,
        at - 1,
        end - 1,
        end,
        end - 16,
        end - 64,
        1 << 46,
        1 << 63,
        u64::MAX - 15,
        u64::MAX,
    ] {
        for which in 0..4 {
            let mut places = [at, at + 0x2000, at + 0x1000, 0];
            places[which] = place;
            wrong.push(addresses(0, 0, places));
        }
    }
    for offset in [0, 1, 32, 59, 60, 255, 256, u32::MAX] {
        for size in [0, 1, 8, 60, 256, 257, u32::MAX] {
            let body = [words(&[offset, size, 1]), vec![0xff; size.min(300) as usize]].concat();
            wrong.push(message(GET_CONFIG, body.clone()));
            wrong.push(message(SET_CONFIG, body));
        }
    }
    for (index, wrong) in wrong.into_iter().enumerate() {
        // In the place of the right one, and once more while the ring runs.
        let mut messages = hello();
        let right = ring(&file, &kick);
        let place = right.iter().position(|message| message.request == wrong.request);
        messages.extend(right[..7].iter().cloned());
        if let Some(place) = place {
            messages[3 + place.min(6)] = wrong.clone();
        }
        messages.push(wrong.clone());
        messages.push(right[7].clone());
        world.say(
            &format!("message {index}: {} {:x?}", wrong.request, wrong.body),
            &messages,
        );
    }
    world.check();
}

#[test]
fn messages_in_any_order() {
    let mut world = World::new();
    let (file, kick) = (memory(), eventfd());
    let all = [hello(), ring(&file, &kick)].concat();
    let mut seed = 1_u64;
    let mut below = |bound: usize| {
        seed = seed
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) as usize % bound
    };
    for round in 0..300 {
        let mut messages: Vec<Message> = (0..1 + below(30))
            .map(|_| all[below(all.len())].clone())
            .collect();
        for message in &mut messages {
            if below(4) == 0 && !message.body.is_empty() {
                let at = below(message.body.len());
                message.body[at] ^= 1 << below(8);
            }
            if below(4) == 0 {
                message.flags |= NEED_REPLY;
            }
        }
        if round % 2 == 0 {
            messages.splice(0..0, hello());
        }
        world.say(&format!("round {round}"), &messages);
    }
    world.check();
}

#[test]
fn conversations_cut_anywhere() {
    let mut world = World::new();
    let messages = [hello(), ring(&memory(), &eventfd())].concat();
    for count in 0..messages.len() {
        let bytes = messages[count].bytes();
        for cut in [1, 4, 11, 12, 13, bytes.len() - 1] {
            let mut stream = UnixStream::connect(&world.path).unwrap();
            for message in &messages[..count] {
                message.send(&stream).unwrap();
            }
            stream.write_all(&bytes[..cut.min(bytes.len() - 1)]).unwrap();
        }
    }
    world.check();
}

#[test]
fn a_thousand_reconnects_leave_nothing_behind() {
    let mut world = World::new();
    world.check();
    let count = |folder: &str| std::fs::read_dir(folder).unwrap().count();
    let (file, kick) = (memory(), eventfd());
    let running = [hello(), ring(&file, &kick)[..7].to_vec()].concat();
    for round in 0..1_000 {
        match round % 4 {
            0 => drop(UnixStream::connect(&world.path).unwrap()),
            1 => world.say("a greeting", &hello()),
            _ => world.say("a running ring", &running),
        }
    }
    world.check();
    // Other tests run beside this one: what they hold is bounded, what a thousand connections leave would not be.
    let (fds, threads) = (count("/proc/self/fd"), count("/proc/self/task"));
    assert!(
        fds < 500 && threads < 100,
        "{fds} files and {threads} threads are left"
    );
}
