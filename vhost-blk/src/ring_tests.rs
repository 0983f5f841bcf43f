//! Rings against hand-made and random descriptors.

use proptest::prelude::*;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::OFlags;
use types::{HeapBlock, Payload};
use vdi::{Op, Outcome, ReadPart};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_SECURE_ERASE, VIRTIO_BLK_T_WRITE_ZEROES,
};
use vm_memory::{Bytes, GuestAddress};

use crate::api::{DeviceConfig, Polled, RingRequest, Tag};
use crate::chain::Memory;
use crate::fuzz::{AVAIL, Heap, QUEUE_SIZE, REGIONS, TABLE, USED, answer, eventfd, memory, ring_over};
use crate::ring::Ring;
use crate::split::Layout;

const DISK_BYTES: u64 = 1 << 20;
const HEADER: u64 = 0x1000;
const STATUS: u64 = 0x1800;
const DATA: u64 = 0x2000;
const INDIRECT: u64 = 0x7000;
const FAR: u64 = 0x10000;
const NOWHERE: u64 = 0x9000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT_FLAG: u16 = 4;

/// Address, length, flags, next.
type Descriptor = (u64, u32, u16, u16);

fn config() -> DeviceConfig {
    DeviceConfig {
        serial: "0123456789abcdefghijklmn".to_owned(),
        ..DeviceConfig::new(DISK_BYTES, 512)
    }
}

struct Rig {
    memory: std::sync::Arc<Memory>,
    ring: Ring,
    gate: std::sync::Arc<crate::ring::Gate>,
    call: std::fs::File,
    avail: u16,
}

impl Rig {
    fn new(config: DeviceConfig) -> Rig {
        Rig::at(config, 0)
    }

    fn at(config: DeviceConfig, start: u16) -> Rig {
        let memory = memory();
        for at in [AVAIL + 2, USED + 2] {
            memory.write_obj(start, GuestAddress(at)).unwrap();
        }
        let (ring, gate) = ring_over(&memory, config, true, start);
        let call = eventfd();
        gate.set_call(Some(call.try_clone().unwrap()));
        rustix::io::read(&call, &mut [0; 8]).expect("told at once");
        Rig {
            memory,
            ring,
            gate,
            call,
            avail: start,
        }
    }

    fn put(&self, table: u64, descriptors: &[Descriptor]) {
        for (index, (address, length, flags, next)) in descriptors.iter().enumerate() {
            let raw = u128::from(*address)
                | u128::from(*length) << 64
                | u128::from(*flags) << 96
                | u128::from(*next) << 112;
            let at = table + 16 * index as u64;
            self.memory
                .write_slice(&raw.to_le_bytes(), GuestAddress(at))
                .unwrap();
        }
    }

    fn header(&self, at: u64, kind: u32, sector: u64) {
        let header = u128::from(kind) | u128::from(sector) << 64;
        self.memory
            .write_slice(&header.to_le_bytes(), GuestAddress(at))
            .unwrap();
    }

    fn offer(&mut self, head: u16) {
        let slot = u64::from(self.avail % QUEUE_SIZE);
        self.memory
            .write_obj(head, GuestAddress(AVAIL + 4 + 2 * slot))
            .unwrap();
        self.avail = self.avail.wrapping_add(1);
        self.memory
            .write_obj(self.avail, GuestAddress(AVAIL + 2))
            .unwrap();
    }

    fn poll(&mut self) -> Vec<RingRequest<HeapBlock>> {
        let mut requests = Vec::new();
        assert_eq!(
            self.ring.poll(&mut Heap { left: u32::MAX }, &mut requests, 100),
            Polled::Empty
        );
        requests
    }

    fn used_index(&self) -> u16 {
        self.memory.read_obj(GuestAddress(USED + 2)).unwrap()
    }

    /// Head and length at a position of the used ring.
    fn used(&self, position: u16) -> (u16, u32) {
        let slot = u64::from(position % QUEUE_SIZE);
        let element: u64 = self.memory.read_obj(GuestAddress(USED + 4 + 8 * slot)).unwrap();
        (element as u16, (element >> 32) as u32)
    }

    fn byte(&self, at: u64) -> u8 {
        self.memory.read_obj(GuestAddress(at)).unwrap()
    }
}

/// What a chain comes to.
#[derive(Debug, PartialEq)]
enum Fate {
    /// Passed on; then completed.
    Forward,
    /// Answered at once with this status.
    Status(u8),
    /// Given back without an answer: there is no place for one.
    Silent,
    /// The ring is served no more.
    Broken,
}

fn fate_of(descriptors: &[Descriptor], indirect: &[Descriptor], kind: u32, sector: u64) -> Fate {
    fate_with(config(), descriptors, indirect, kind, sector)
}

fn fate_with(
    config: DeviceConfig,
    descriptors: &[Descriptor],
    indirect: &[Descriptor],
    kind: u32,
    sector: u64,
) -> Fate {
    let mut rig = Rig::new(config);
    rig.header(HEADER, kind, sector);
    rig.memory.write_obj(0xeeu8, GuestAddress(STATUS)).unwrap();
    rig.put(TABLE, descriptors);
    rig.put(INDIRECT, indirect);
    rig.offer(0);
    let requests = rig.poll();
    if rig.ring.is_broken() {
        return Fate::Broken;
    }
    if let [request] = requests.as_slice() {
        rig.ring.complete(request.tag, Ok(answer(&request.op)));
        assert_eq!(rig.ring.publish().unwrap(), 1);
        assert_eq!(rig.byte(STATUS), 0);
        return Fate::Forward;
    }
    assert!(requests.is_empty());
    assert_eq!(rig.ring.publish().unwrap(), 1);
    assert_eq!(rig.ring.in_flight(), 0);
    match rig.used(0) {
        (0, 0) => Fate::Silent,
        _ => Fate::Status(rig.byte(STATUS)),
    }
}

const H: Descriptor = (HEADER, 16, NEXT, 1);
const S: Descriptor = (STATUS, 1, WRITE, 0);

#[test]
fn hostile_chains_meet_their_fate() {
    let in_place = |length, flags, next| (DATA, length, flags, next);
    let cases: Vec<(&str, Vec<Descriptor>, Fate)> = vec![
        (
            "a plain read",
            vec![H, in_place(512, NEXT | WRITE, 2), S],
            Fate::Forward,
        ),
        (
            "zero-length descriptors among the others",
            vec![
                H,
                in_place(0, NEXT, 2),
                in_place(512, NEXT | WRITE, 3),
                (NOWHERE, 0, NEXT | WRITE, 4),
                S,
            ],
            Fate::Forward,
        ),
        (
            "header and data in odd pieces",
            vec![
                (HEADER, 5, NEXT, 1),
                (HEADER + 5, 11, NEXT, 2),
                in_place(1, NEXT | WRITE, 3),
                (FAR, 510, NEXT | WRITE, 4),
                (DATA + 1, 1, NEXT | WRITE, 5),
                S,
            ],
            Fate::Forward,
        ),
        ("a loop to itself", vec![(HEADER, 16, NEXT, 0)], Fate::Silent),
        (
            "a loop of two",
            vec![H, in_place(512, NEXT | WRITE, 0)],
            Fate::Silent,
        ),
        (
            "a next beyond the table",
            vec![H, in_place(512, NEXT | WRITE, QUEUE_SIZE)],
            Fate::Silent,
        ),
        (
            "data outside memory",
            vec![H, (NOWHERE, 512, NEXT | WRITE, 2), S],
            Fate::Silent,
        ),
        (
            "data that ends outside memory",
            vec![H, (0x7f00, 512, NEXT | WRITE, 2), S],
            Fate::Silent,
        ),
        (
            "data around the address space",
            vec![H, (u64::MAX - 100, 512, NEXT | WRITE, 2), S],
            Fate::Silent,
        ),
        (
            "data of four gigabytes",
            vec![H, (DATA, u32::MAX, NEXT | WRITE, 2), S],
            Fate::Silent,
        ),
        (
            "a header outside memory",
            vec![(NOWHERE, 16, NEXT, 1), in_place(512, NEXT | WRITE, 2), S],
            Fate::Silent,
        ),
        ("no status", vec![(HEADER, 16, 0, 0)], Fate::Silent),
        ("a short header", vec![(HEADER, 15, NEXT, 1), S], Fate::Status(1)),
        ("no header", vec![S], Fate::Status(1)),
        (
            "readable after writable",
            vec![(STATUS, 1, NEXT | WRITE, 1), (HEADER, 16, 0, 0)],
            Fate::Silent,
        ),
        (
            "half a sector",
            vec![H, in_place(256, NEXT | WRITE, 2), S],
            Fate::Status(1),
        ),
        (
            "an odd length",
            vec![H, in_place(513, NEXT | WRITE, 2), S],
            Fate::Status(1),
        ),
        ("nothing to read", vec![H, S], Fate::Status(0)),
        (
            "indirect with a next",
            vec![(INDIRECT, 16, NEXT | INDIRECT_FLAG, 1), S],
            Fate::Silent,
        ),
        (
            "an empty indirect table",
            vec![(INDIRECT, 0, INDIRECT_FLAG, 0)],
            Fate::Silent,
        ),
        (
            "half an indirect descriptor",
            vec![(INDIRECT, 24, INDIRECT_FLAG, 0)],
            Fate::Silent,
        ),
        (
            "an indirect table of gigabytes",
            vec![(INDIRECT, 0xffff_fff0, INDIRECT_FLAG, 0)],
            Fate::Silent,
        ),
        (
            "an indirect table outside memory",
            vec![(NOWHERE, 48, INDIRECT_FLAG, 0)],
            Fate::Silent,
        ),
    ];
    for (name, descriptors, fate) in cases {
        assert_eq!(fate_of(&descriptors, &[], VIRTIO_BLK_T_IN, 0), fate, "{name}");
    }
}

#[test]
fn hostile_indirect_tables_meet_their_fate() {
    let data = (DATA, 512, NEXT | WRITE, 2);
    let cases: Vec<(&str, Vec<Descriptor>, Fate)> = vec![
        ("a plain read", vec![H, data, S], Fate::Forward),
        (
            "indirect within indirect",
            vec![H, data, (INDIRECT, 48, INDIRECT_FLAG, 0)],
            Fate::Silent,
        ),
        (
            "a next beyond the table",
            vec![H, (DATA, 512, NEXT | WRITE, 3)],
            Fate::Silent,
        ),
        ("a loop", vec![H, (DATA, 512, NEXT | WRITE, 1), S], Fate::Silent),
    ];
    for (name, indirect, fate) in cases {
        let outer = [(INDIRECT, 16 * indirect.len() as u32, INDIRECT_FLAG, 0)];
        assert_eq!(fate_of(&outer, &indirect, VIRTIO_BLK_T_IN, 0), fate, "{name}");
        let behind_a_header = [
            H,
            (INDIRECT + 16, 16 * (indirect.len() as u32 - 1), INDIRECT_FLAG, 0),
        ];
        if name == "a plain read" {
            let table = [H, (DATA, 512, NEXT | WRITE, 1), S];
            assert_eq!(
                fate_of(&behind_a_header, &table, VIRTIO_BLK_T_IN, 0),
                fate,
                "header outside"
            );
        }
    }
}

#[test]
fn requests_are_held_against_the_disk() {
    let read = |length| vec![H, (DATA, length, NEXT | WRITE, 2), S];
    let write = |length| vec![H, (DATA, length, NEXT, 2), S];
    let last = DISK_BYTES / 512 - 1;
    let cases: Vec<(&str, Vec<Descriptor>, u32, u64, Fate)> = vec![
        ("the last sector", read(512), VIRTIO_BLK_T_IN, last, Fate::Forward),
        (
            "one past the end",
            read(512),
            VIRTIO_BLK_T_IN,
            last + 1,
            Fate::Status(1),
        ),
        (
            "across the end",
            write(1024),
            VIRTIO_BLK_T_OUT,
            last,
            Fate::Status(1),
        ),
        (
            "a sector whose byte overflows",
            write(512),
            VIRTIO_BLK_T_OUT,
            u64::MAX / 2,
            Fate::Status(1),
        ),
        (
            "an end that overflows",
            write(512),
            VIRTIO_BLK_T_OUT,
            u64::MAX / 512,
            Fate::Status(1),
        ),
        ("a flush", vec![H, S], VIRTIO_BLK_T_FLUSH, 0, Fate::Forward),
        (
            "secure erase",
            write(512),
            VIRTIO_BLK_T_SECURE_ERASE,
            0,
            Fate::Status(2),
        ),
        (
            "a type from the future",
            vec![H, S],
            0x1234_5678,
            0,
            Fate::Status(2),
        ),
        (
            "a discard without range",
            vec![H, S],
            VIRTIO_BLK_T_DISCARD,
            0,
            Fate::Status(1),
        ),
        (
            "a discard of two ranges",
            write(32),
            VIRTIO_BLK_T_DISCARD,
            0,
            Fate::Status(1),
        ),
        (
            "zeroes of half a range",
            write(8),
            VIRTIO_BLK_T_WRITE_ZEROES,
            0,
            Fate::Status(1),
        ),
    ];
    for (name, descriptors, kind, sector, fate) in cases {
        assert_eq!(fate_of(&descriptors, &[], kind, sector), fate, "{name}");
    }
    let large_sectors = DeviceConfig::new(DISK_BYTES, 4096);
    let fate = |length, sector| fate_with(large_sectors.clone(), &read(length), &[], VIRTIO_BLK_T_IN, sector);
    assert_eq!(fate(4096, 8), Fate::Forward);
    assert_eq!(fate(4096, 1), Fate::Status(1), "not at a sector of 4096 bytes");
    assert_eq!(fate(512, 0), Fate::Status(1), "not a whole one");
    let read_only = DeviceConfig {
        is_read_only: true,
        ..config()
    };
    let fate = |descriptors: &[Descriptor], kind| fate_with(read_only.clone(), descriptors, &[], kind, 0);
    assert_eq!(fate(&write(512), VIRTIO_BLK_T_OUT), Fate::Status(1));
    assert_eq!(fate(&write(16), VIRTIO_BLK_T_DISCARD), Fate::Status(1));
    assert_eq!(fate(&write(16), VIRTIO_BLK_T_WRITE_ZEROES), Fate::Status(1));
    assert_eq!(fate(&read(512), VIRTIO_BLK_T_IN), Fate::Forward);
}

#[test]
fn ranges_are_checked() {
    // sector, sectors, flags
    let cases = [
        ("one sector", (0u64, 1u32, 0u32), [Fate::Forward, Fate::Forward]),
        ("may unmap", (0, 1, 1), [Fate::Status(2), Fate::Forward]),
        ("reserved flags", (0, 1, 2), [Fate::Status(2), Fate::Status(2)]),
        ("all of the disk", (0, 2048, 0), [Fate::Forward, Fate::Forward]),
        ("across the end", (1, 2048, 0), [Fate::Status(1), Fate::Status(1)]),
        (
            "longer than the limit",
            (0, u32::MAX, 0),
            [Fate::Status(1), Fate::Status(1)],
        ),
        ("nothing", (0, 0, 0), [Fate::Status(0), Fate::Status(0)]),
        (
            "a sector that overflows",
            (u64::MAX, 1, 0),
            [Fate::Status(1), Fate::Status(1)],
        ),
    ];
    for (name, (sector, sectors, flags), fates) in cases {
        for (kind, fate) in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES]
            .into_iter()
            .zip(fates)
        {
            let mut rig = Rig::new(config());
            rig.header(HEADER, kind, 0);
            let range = u128::from(sector) | u128::from(sectors) << 64 | u128::from(flags) << 96;
            rig.memory
                .write_slice(&range.to_le_bytes(), GuestAddress(DATA))
                .unwrap();
            rig.put(TABLE, &[H, (DATA, 16, NEXT, 2), S]);
            rig.offer(0);
            let requests = rig.poll();
            match fate {
                Fate::Forward => assert_eq!(requests.len(), 1, "{name} of {kind}"),
                Fate::Status(status) => {
                    assert!(requests.is_empty(), "{name} of {kind}");
                    assert_eq!(rig.byte(STATUS), status, "{name} of {kind}");
                }
                _ => unreachable!("not in this table"),
            }
        }
    }
}

#[test]
fn the_serial_is_cut_to_the_room_there_is() {
    for (room, wanted) in [
        (20, &b"0123456789abcdefghij"[..]),
        (4, b"0123"),
        (64, b"0123456789abcdefghij"),
    ] {
        let mut rig = Rig::new(config());
        rig.header(HEADER, VIRTIO_BLK_T_GET_ID, 0);
        rig.put(TABLE, &[H, (DATA, room, NEXT | WRITE, 2), S]);
        rig.offer(0);
        assert!(rig.poll().is_empty());
        rig.ring.publish().unwrap();
        assert_eq!(rig.used(0), (0, wanted.len() as u32 + 1));
        let mut serial = vec![0; wanted.len()];
        rig.memory.read_slice(&mut serial, GuestAddress(DATA)).unwrap();
        assert_eq!(serial, wanted);
        assert_eq!(rig.byte(DATA + wanted.len() as u64), 0, "nothing beyond");
        assert_eq!(rig.byte(STATUS), 0);
    }
}

#[test]
fn a_broken_ring_is_left_alone() {
    let mut run_away = Rig::new(config());
    run_away
        .memory
        .write_obj(QUEUE_SIZE + 1, GuestAddress(AVAIL + 2))
        .unwrap();
    assert!(run_away.poll().is_empty());
    assert!(run_away.ring.is_broken());
    assert!(!run_away.ring.enable_kicks());
    let mut bad_head = Rig::new(config());
    bad_head.offer(QUEUE_SIZE);
    assert!(bad_head.poll().is_empty());
    assert!(bad_head.ring.is_broken());
    assert_eq!(bad_head.ring.publish().unwrap(), 0);
}

/// Reads of one sector each, at heads 0, 3, 6 and so on.
fn offer_reads(rig: &mut Rig, count: u16) {
    for request in 0..count {
        let first = (request % 5) * 3;
        rig.header(HEADER, VIRTIO_BLK_T_IN, 0);
        rig.put(
            TABLE + 16 * u64::from(first),
            &[
                (HEADER, 16, NEXT, first + 1),
                (DATA + 512 * u64::from(first), 512, NEXT | WRITE, first + 2),
                S,
            ],
        );
        rig.offer(first);
    }
}

fn zeros() -> Result<Outcome<HeapBlock>, vdi::VdiError> {
    Ok(Outcome::Read([ReadPart::Zeros(512)].into()))
}

#[test]
fn completions_wait_for_those_before_them_across_the_wrap() {
    let mut rig = Rig::at(config(), u16::MAX - 1);
    offer_reads(&mut rig, 4);
    let tags: Vec<Tag> = rig.poll().iter().map(|request| request.tag).collect();
    assert_eq!(tags.len(), 4);
    let start = u16::MAX - 1;
    for (tag, visible) in [(2, 0), (1, 0), (0, 3), (3, 4)] {
        rig.ring.complete(tags[tag], zeros());
        rig.ring.publish().unwrap();
        assert_eq!(rig.used_index(), start.wrapping_add(visible), "after {tag}");
    }
    let heads: Vec<u16> = (0..4).map(|i| rig.used(start.wrapping_add(i)).0).collect();
    assert_eq!(heads, [0, 3, 6, 9]);
}

#[test]
fn a_dropped_ring_resumes_at_the_first_unpublished_request() {
    let mut rig = Rig::at(config(), 65_534);
    offer_reads(&mut rig, 4);
    let requests = rig.poll();
    rig.ring.complete(requests[0].tag, zeros());
    rig.ring.publish().unwrap();
    rig.ring.complete(requests[2].tag, zeros());
    rig.ring.publish().unwrap();
    let Rig {
        ring, gate, memory, ..
    } = rig;
    drop(ring);
    assert_eq!(gate.wait(), 65_535);
    let used: u16 = memory.read_obj(GuestAddress(USED + 2)).unwrap();
    assert_eq!(used, 65_535, "the same as what the guest was shown");
}

#[test]
fn a_write_without_a_buffer_stays_in_the_ring() {
    let mut rig = Rig::new(config());
    rig.header(HEADER, VIRTIO_BLK_T_OUT, 0);
    rig.memory.write_slice(&[7; 512], GuestAddress(DATA)).unwrap();
    rig.put(TABLE, &[H, (DATA, 512, NEXT, 2), S]);
    rig.offer(0);
    let mut requests = Vec::new();
    assert_eq!(
        rig.ring.poll(&mut Heap { left: 0 }, &mut requests, 9),
        Polled::NoBuffer
    );
    assert_eq!(rig.ring.in_flight(), 0);
    assert!(rig.ring.enable_kicks(), "there is work left");
    let requests = rig.poll();
    // The guest scribbles over its buffer; we have a copy.
    rig.memory.write_slice(&[8; 512], GuestAddress(DATA)).unwrap();
    match &requests[0].op {
        Op::Write { data, .. } => assert_eq!(data.bytes(), [7; 512]),
        op => panic!("{op:?}"),
    }
}

/// A guest that turns everything of its request around while it is under way: what was checked at the poll holds.
#[test]
fn what_the_guest_changes_after_the_poll_is_not_looked_at() {
    let mut rig = Rig::new(config());
    offer_reads(&mut rig, 1);
    let requests = rig.poll();
    let far = (FAR, 512, NEXT | WRITE, 2);
    rig.put(TABLE, &[(NOWHERE, 16, NEXT, 1), far, (FAR + 512, 1, WRITE, 0)]);
    rig.header(HEADER, VIRTIO_BLK_T_OUT, u64::MAX);
    rig.memory.write_slice(&[9; 1024], GuestAddress(FAR)).unwrap();
    rig.memory.write_obj(5u16, GuestAddress(AVAIL + 4)).unwrap();
    rig.ring.complete(
        requests[0].tag,
        Ok(Outcome::Read(
            [ReadPart::Data(HeapBlock::new(&[3; 512]))].into_iter().collect(),
        )),
    );
    rig.ring.publish().unwrap();
    assert_eq!(rig.used(0), (0, 513));
    assert_eq!(
        (rig.byte(DATA), rig.byte(DATA + 511), rig.byte(STATUS)),
        (3, 3, 0)
    );
    assert_eq!((rig.byte(FAR), rig.byte(FAR + 512)), (9, 9));
}

#[test]
fn kicks_are_taken_back_without_blocking() {
    let rig = Rig::new(config());
    let kick = rig.ring.kick();
    let is_kicked = || {
        let mut fds = [PollFd::new(&kick, PollFlags::IN)];
        rustix::event::poll(&mut fds, Some(&Timespec::default())).unwrap() == 1
    };
    // As a frontend may leave it.
    rustix::fs::fcntl_setfl(kick, OFlags::empty()).unwrap();
    rig.ring.ack_kick();
    rustix::io::write(kick, &3u64.to_ne_bytes()).unwrap();
    assert!(is_kicked());
    rig.ring.ack_kick();
    assert!(!is_kicked());
}

#[test]
fn the_guest_is_interrupted_where_it_asked_to_be() {
    let mut rig = Rig::new(config());
    offer_reads(&mut rig, 5);
    // After the third.
    let used_event = AVAIL + 4 + 2 * u64::from(QUEUE_SIZE);
    rig.memory.write_obj(2u16, GuestAddress(used_event)).unwrap();
    let requests = rig.poll();
    let interrupts: Vec<bool> = requests
        .iter()
        .map(|request| {
            rig.ring.complete(request.tag, zeros());
            rig.ring.publish().unwrap();
            let mut count = [0; 8];
            rustix::io::read(&rig.call, &mut count).is_ok()
        })
        .collect();
    assert_eq!(interrupts, [false, false, true, false, false]);
}

#[test]
fn the_guest_is_asked_for_kicks_only_when_it_should() {
    let mut rig = Rig::new(config());
    let avail_event = GuestAddress(USED + 4 + 8 * u64::from(QUEUE_SIZE));
    offer_reads(&mut rig, 2);
    rig.poll();
    assert_eq!(rig.memory.read_obj::<u16>(avail_event).unwrap(), 0);
    assert!(!rig.ring.enable_kicks());
    assert_eq!(rig.memory.read_obj::<u16>(avail_event).unwrap(), 2);
    offer_reads(&mut rig, 1);
    assert!(rig.ring.enable_kicks(), "one came in between");
}

#[test]
fn a_kick_that_was_asked_for_is_taken_back() {
    let mut rig = Rig::new(config());
    let avail_event = GuestAddress(USED + 4 + 8 * u64::from(QUEUE_SIZE));
    // As a driver decides (2.7.10.1): does it kick on having gone from `old` to `new`?
    let kicks = |rig: &Rig, old: u16, new: u16| {
        let event: u16 = rig.memory.read_obj(avail_event).unwrap();
        new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
    };
    for round in 0..5u16 {
        assert!(!rig.ring.has_news());
        assert!(!rig.ring.enable_kicks());
        assert!(kicks(&rig, round, round + 1), "round {round}");
        rig.ring.disable_kicks();
        assert!(!kicks(&rig, round, round + 1), "round {round}");
        assert!(!kicks(&rig, round, round + 8), "round {round}");
        offer_reads(&mut rig, 1);
        assert!(rig.ring.has_news());
        rig.poll();
    }
}

#[test]
fn a_ring_that_is_not_all_memory_is_none() {
    let memory = memory();
    let inside = Layout {
        size: QUEUE_SIZE,
        table: GuestAddress(TABLE),
        avail: GuestAddress(AVAIL),
        used: GuestAddress(USED),
        has_event_idx: true,
    };
    assert!(inside.is_inside(&memory));
    let at = GuestAddress;
    let cases = [
        (
            "table in the gap",
            Layout {
                table: at(NOWHERE),
                ..inside
            },
        ),
        (
            "table into the gap",
            Layout {
                table: at(0x7f10),
                ..inside
            },
        ),
        (
            "available ring into the gap",
            Layout {
                avail: at(0x7ffe),
                ..inside
            },
        ),
        (
            "used ring into the gap",
            Layout {
                used: at(0x7ffc),
                ..inside
            },
        ),
        (
            "used ring around the address space",
            Layout {
                used: at(u64::MAX - 3),
                ..inside
            },
        ),
        (
            "indices at odd addresses",
            Layout {
                avail: at(AVAIL + 1),
                ..inside
            },
        ),
        ("a size that is no power of two", Layout { size: 12, ..inside }),
        ("no size", Layout { size: 0, ..inside }),
    ];
    for (name, layout) in cases {
        assert!(!layout.is_inside(&memory), "{name}");
    }
}

#[test]
fn the_budget_bounds_a_turn() {
    let mut rig = Rig::new(config());
    offer_reads(&mut rig, 5);
    let mut requests = Vec::new();
    let mut buffers = Heap { left: 9 };
    assert_eq!(rig.ring.poll(&mut buffers, &mut requests, 3), Polled::More);
    assert_eq!(requests.len(), 3);
    assert_eq!(rig.ring.poll(&mut buffers, &mut requests, 3), Polled::Empty);
    assert_eq!(requests.len(), 5);
}

#[test]
#[should_panic(expected = "completed with")]
fn a_tag_is_completed_once() {
    let mut rig = Rig::new(config());
    offer_reads(&mut rig, 2);
    let requests = rig.poll();
    rig.ring.complete(requests[1].tag, zeros());
    rig.ring.complete(requests[1].tag, zeros());
}

fn descriptor() -> impl Strategy<Value = Descriptor> {
    let address = prop_oneof![
        4 => DATA..0x6000u64,
        4 => FAR..FAR + 0x8000,
        1 => 0u64..0x20000,
        1 => any::<u64>(),
        4 => Just(HEADER),
    ];
    let length = prop_oneof![
        4 => (0u32..4).prop_map(|n| n * 512),
        4 => Just(16u32),
        4 => Just(1u32),
        2 => 0u32..2000,
        1 => any::<u32>(),
    ];
    // Indirect tables have their own tests: here the places that may be written are known beforehand.
    (address, length, 0u16..4, 0u16..QUEUE_SIZE + 1)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_tables_are_answered_inside_their_writable_parts(
        descriptors in proptest::collection::vec(descriptor(), usize::from(QUEUE_SIZE)),
        heads in proptest::collection::vec(0u16..QUEUE_SIZE, 1..16),
        kind in prop_oneof![4 => Just(0u32), 4 => Just(1), 1 => 4u32..15],
    ) {
        let mut rig = Rig::new(config());
        for (start, bytes) in REGIONS {
            let canary = vec![0xc5; bytes.saturating_sub(0x1000)];
            rig.memory.write_slice(&canary, GuestAddress(start + 0x1000)).unwrap();
        }
        rig.header(HEADER, kind, 1);
        rig.put(TABLE, &descriptors);
        for head in &heads {
            rig.offer(*head);
        }
        let before = snapshot(&rig.memory);
        // As the guest: descriptors may point at the header, the table or the rings, and so change what is read next.
        for request in rig.poll() {
            rig.ring.complete(request.tag, Ok(answer(&request.op)));
        }
        let published = rig.ring.publish().unwrap();
        prop_assert!(published <= heads.len());
        prop_assert_eq!(rig.ring.in_flight(), 0);
        let mut allowed: Vec<(u64, u64)> = descriptors
            .iter()
            .filter(|(_, _, flags, _)| flags & WRITE != 0)
            .map(|(address, length, ..)| (*address, address.saturating_add(u64::from(*length))))
            .collect();
        allowed.push((USED, USED + 6 + 8 * u64::from(QUEUE_SIZE)));
        let after = snapshot(&rig.memory);
        for ((at, old), (_, new)) in before.iter().zip(&after) {
            prop_assert!(
                old == new || allowed.iter().any(|(start, end)| (*start..*end).contains(at)),
                "byte at {:#x} changed", at
            );
        }
    }

    #[test]
    fn arbitrary_memory_is_survived(input in proptest::collection::vec(any::<u8>(), 0..2048)) {
        crate::fuzz::ring(&input);
    }
}

fn snapshot(memory: &Memory) -> Vec<(u64, u8)> {
    let mut all = Vec::new();
    for (start, bytes) in REGIONS {
        let mut content = vec![0; bytes];
        memory.read_slice(&mut content, GuestAddress(start)).unwrap();
        all.extend((start..).zip(content));
    }
    all
}
