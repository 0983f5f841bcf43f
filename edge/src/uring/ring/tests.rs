use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::mpsc;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use rustix::event::{EventfdFlags, eventfd};
use types::Payload;

use super::*;
use crate::file::{Access, OsFile, create_preallocated};
use crate::uring::{PoolConfig, RingDisk};
use crate::{AlignedBlock, Disk, DiskError, DiskOutcome};

const DISK_BYTES: u64 = 8 << 20;
const POOL: PoolConfig = PoolConfig { slots: [64, 16, 4] };

/// A disk file on the temporary directory's file system, or in memory (whose io_uring path is the worker threads').
fn disk_in(directory: &Path) -> (tempfile::TempDir, File) {
    let folder = tempfile::tempdir_in(directory).expect("a folder");
    let path = folder.path().join("disk");
    create_preallocated(&path, DISK_BYTES).expect("a disk file");
    let file = OsFile::open(&path, Access::ReadWrite)
        .expect("opening it")
        .into_file();
    (folder, file)
}

fn disk() -> (tempfile::TempDir, File) {
    disk_in(&std::env::temp_dir())
}

fn config(entries: u32) -> RingConfig {
    RingConfig {
        entries,
        pool: Pool::new(POOL).expect("a pool"),
    }
}

fn ring(entries: u32) -> Ring {
    Ring::new(config(entries)).expect("a ring")
}

/// Turns until `count` disk operations have completed.
fn complete(ring: &mut Ring, count: usize) -> BTreeMap<u64, Completion<Buf>> {
    let (mut events, mut done) = (Vec::new(), BTreeMap::new());
    while done.len() < count {
        ring.turn(Wait::Forever, &mut events);
        for event in events.drain(..) {
            let Event::Disk(_, completion) = event else {
                panic!("{event:?}")
            };
            let twice = done.insert(completion.id.0, completion);
            assert!(twice.is_none(), "completed twice: {twice:?}");
        }
    }
    assert_eq!(done.len(), count);
    done
}

fn header(byte: u8) -> Box<AlignedBlock> {
    let mut block = AlignedBlock::zeroed();
    block.0.fill(byte);
    block
}

fn read_back(completion: &Completion<Buf>) -> &[u8] {
    match &completion.result {
        Ok(DiskOutcome::Read(buffer)) => buffer.bytes(),
        other => panic!("not read: {other:?}"),
    }
}

/// Any split of any data comes back whole, on both file systems, whether the parts start on a block or not.
#[test]
fn writes_in_odd_parts_read_back_whole() {
    for directory in [std::env::temp_dir().as_path(), Path::new("/dev/shm")] {
        let (_folder, file) = disk_in(directory);
        let ring = std::cell::RefCell::new(ring(8));
        let slot = ring.borrow_mut().add_disk(file, "test").expect("adding");
        let split = (1usize..5, proptest::collection::vec(1usize..40, 0..9), 0u64..1000);
        let mut runner = TestRunner::new(Config::with_cases(24));
        let ran = runner.run(&split, |(mark, sectors, block)| {
            let ring = &mut *ring.borrow_mut();
            let total: usize = sectors.iter().sum::<usize>().next_multiple_of(8);
            let padding = total - sectors.iter().sum::<usize>();
            // Parts are cut out of one buffer, so that they start at multiples of 512 B only.
            let content: Vec<u8> = (0..total * 512).map(|i| (i / 512 * mark + i) as u8).collect();
            let source = ring.pool().copy_of(&content);
            let mut at = 0;
            let mut data = Vec::new();
            for part in sectors.iter().copied().chain([padding]) {
                data.push(source.slice(at * 512, part * 512));
                at += part;
            }
            let offset = block * 4096;
            ring.submit(
                slot,
                IoId(1),
                DiskOp::Write {
                    offset,
                    header: header(mark as u8),
                    data,
                },
            );
            let is_written = matches!(complete(ring, 1)[&1].result, Ok(DiskOutcome::Written { .. }));
            prop_assert!(is_written);
            ring.submit(slot, IoId(2), DiskOp::Sync);
            prop_assert!(matches!(complete(ring, 1)[&2].result, Ok(DiskOutcome::Synced)));
            let bytes = (4096 + content.len()) as u32;
            ring.submit(slot, IoId(3), DiskOp::Read { offset, bytes });
            let done = complete(ring, 1);
            let read = read_back(&done[&3]);
            prop_assert!(read[..4096].iter().all(|byte| *byte == mark as u8));
            prop_assert!(
                read[4096..] == content[..],
                "content of {} B at {}",
                content.len(),
                offset
            );
            Ok(())
        });
        ran.unwrap_or_else(|error| panic!("in {}: {error}", directory.display()));
        let ring = ring.borrow();
        assert_eq!(ring.under_way(slot), 0);
        assert_eq!(ring.pool().free_slots(), POOL.slots, "buffers leaked");
    }
}

/// More pieces than one vectored call takes: the write is continued where the first call ended.
#[test]
fn more_parts_than_one_call_takes() {
    let (_folder, file) = disk();
    let mut ring = ring(4);
    let slot = ring.add_disk(file, "test").expect("adding");
    let content: Vec<u8> = (0..2048 * 512).map(|i| (i / 512) as u8).collect();
    let source = ring.pool().copy_of(&content);
    let data = (0..2048).map(|i| source.slice(i * 512, 512)).collect();
    ring.submit(
        slot,
        IoId(1),
        DiskOp::Write {
            offset: 8192,
            header: header(9),
            data,
        },
    );
    assert!(matches!(
        complete(&mut ring, 1)[&1].result,
        Ok(DiskOutcome::Written { .. })
    ));
    ring.submit(
        slot,
        IoId(2),
        DiskOp::Read {
            offset: 12_288,
            bytes: 1 << 20,
        },
    );
    assert_eq!(read_back(&complete(&mut ring, 1)[&2]), content);
}

#[test]
fn far_more_operations_than_entries() {
    let (_folder, file) = disk();
    let mut ring = ring(4);
    let slot = ring.add_disk(file, "test").expect("adding");
    for id in 0..500u64 {
        ring.submit(
            slot,
            IoId(id),
            DiskOp::Write {
                offset: id * 4096,
                header: header(id as u8),
                data: vec![],
            },
        );
    }
    assert_eq!(ring.under_way(slot), 500);
    assert!(
        complete(&mut ring, 500)
            .values()
            .all(|done| matches!(done.result, Ok(DiskOutcome::Written { .. })))
    );
    for id in 0..500u64 {
        ring.submit(
            slot,
            IoId(id),
            DiskOp::Read {
                offset: id * 4096,
                bytes: 4096,
            },
        );
    }
    // All results held at once: more than the pool has, so some come from the heap.
    let done = complete(&mut ring, 500);
    for (id, completion) in &done {
        assert!(
            read_back(completion).iter().all(|byte| *byte == *id as u8),
            "block {id}"
        );
    }
    assert!(ring.pool().counters().heap > 0);
    drop(done);
    assert_eq!(ring.pool().free_slots(), POOL.slots, "buffers leaked");
}

#[test]
fn the_end_of_the_disk_is_an_error_with_numbers() {
    let (_folder, file) = disk();
    let mut ring = ring(4);
    let slot = ring.add_disk(file, "test").expect("adding");
    let offset = DISK_BYTES - 8192;
    ring.submit(
        slot,
        IoId(1),
        DiskOp::Read {
            offset,
            bytes: 65_536,
        },
    );
    let short = DiskError::Short {
        operation: "read",
        offset,
        done: 8192,
        wanted: 65_536,
    };
    assert_eq!(complete(&mut ring, 1)[&1].result.as_ref().err(), Some(&short));
    assert_eq!(ring.pool().free_slots(), POOL.slots, "buffers leaked");
}

#[test]
fn an_error_of_the_system_comes_with_its_number() {
    let (folder, _file) = disk();
    let read_only = File::open(folder.path().join("disk")).expect("opening");
    let mut ring = ring(4);
    let slot = ring.add_disk(read_only, "test").expect("adding");
    ring.submit(
        slot,
        IoId(1),
        DiskOp::Write {
            offset: 0,
            header: header(1),
            data: vec![],
        },
    );
    match &complete(&mut ring, 1)[&1].result {
        Err(DiskError::Io {
            operation: "write",
            offset: 0,
            bytes: 4096,
            errno: libc::EBADF,
            ..
        }) => {}
        other => panic!("{other:?}"),
    }
}

#[test]
fn disks_come_and_go_and_slots_are_not_used_again() {
    let mut ring = ring(4);
    let disks: Vec<_> = (0..3).map(|_| disk()).collect();
    let mut slots = Vec::new();
    for (i, (_, file)) in disks.iter().enumerate() {
        let slot = ring
            .add_disk(file.try_clone().expect("a clone"), "test")
            .expect("adding");
        ring.submit(
            slot,
            IoId(7),
            DiskOp::Write {
                offset: 0,
                header: header(i as u8 + 1),
                data: vec![],
            },
        );
        slots.push(slot);
    }
    let mut events = Vec::new();
    while slots.iter().any(|slot| ring.under_way(*slot) > 0) {
        ring.turn(Wait::Forever, &mut events);
    }
    assert_eq!(events.len(), 3);
    let file = ring.remove_disk(slots[1]);
    let mut first = vec![0; 4096 * 2];
    let lead = first.as_ptr().align_offset(4096);
    file.read_exact_at(&mut first[lead..lead + 4096], 0)
        .expect("reading");
    assert_eq!(first[lead], 2);
    let again = ring.add_disk(file, "test").expect("adding");
    assert!(!slots.contains(&again));
    ring.submit(
        again,
        IoId(1),
        DiskOp::Read {
            offset: 0,
            bytes: 4096,
        },
    );
    assert_eq!(read_back(&complete(&mut ring, 1)[&1])[0], 2);
}

#[test]
fn more_disks_than_the_file_table_holds() {
    let mut ring = ring(4);
    let (_folder, file) = disk();
    let slots: Vec<DiskSlot> = (0..REGISTERED_DISKS + 3)
        .map(|_| {
            ring.add_disk(file.try_clone().expect("a clone"), "test")
                .expect("adding")
        })
        .collect();
    ring.submit(
        slots[slots.len() - 1],
        IoId(1),
        DiskOp::Read {
            offset: 0,
            bytes: 4096,
        },
    );
    assert_eq!(read_back(&complete(&mut ring, 1)[&1]).len(), 4096);
    for slot in slots {
        ring.remove_disk(slot);
    }
}

#[test]
#[should_panic(expected = "with operations under way")]
fn a_busy_disk_is_not_removed() {
    let (_folder, file) = disk();
    let mut ring = ring(4);
    let slot = ring.add_disk(file, "test").expect("adding");
    ring.submit(slot, IoId(1), DiskOp::Sync);
    ring.remove_disk(slot);
}

#[test]
#[should_panic(expected = "are not whole blocks")]
fn half_a_block_is_a_mistake() {
    let (_folder, file) = disk();
    let mut ring = ring(4);
    let slot = ring.add_disk(file, "test").expect("adding");
    ring.submit(
        slot,
        IoId(1),
        DiskOp::Read {
            offset: 512,
            bytes: 4096,
        },
    );
}

/// The ring may be dropped at any moment; the kernel has finished with the buffers when it returns.
#[test]
fn dropping_a_busy_ring_waits() {
    let (_folder, file) = disk();
    let mut ring = ring(16);
    let pool = ring.pool().clone();
    let slot = ring.add_disk(file, "test").expect("adding");
    for id in 0..64 {
        ring.submit(
            slot,
            IoId(id),
            DiskOp::Read {
                offset: id * 65_536,
                bytes: 65_536,
            },
        );
    }
    let kick = eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd");
    ring.watch(std::os::fd::AsFd::as_fd(&kick), Token(1))
        .expect("watching");
    let mut events = Vec::new();
    ring.turn(Wait::No, &mut events);
    drop(ring);
    drop(events);
    assert_eq!(pool.free_slots(), POOL.slots);
}

/// A "disk" that answers when we say so: the reading end of a pipe. Never fails by chance; a drop that did not
/// wait would pass only by losing a race against a thousand yields.
#[test]
fn dropping_waits_for_a_read_that_takes_long() {
    use std::sync::atomic::{AtomicBool, Ordering};
    let (reader, writer) = rustix::pipe::pipe().expect("a pipe");
    let mut ring = ring(4);
    let slot = ring.add_disk(File::from(reader), "pipe").expect("adding");
    ring.submit(
        slot,
        IoId(1),
        DiskOp::Read {
            offset: 0,
            bytes: 4096,
        },
    );
    ring.turn(Wait::No, &mut Vec::new());
    let is_answered = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..1000 {
                std::thread::yield_now();
            }
            is_answered.store(true, Ordering::Release);
            assert_eq!(rustix::io::write(&writer, &[1; 4096]), Ok(4096));
        });
        drop(ring);
        assert!(
            is_answered.load(Ordering::Acquire),
            "the kernel still had our buffer"
        );
    });
}

#[test]
fn a_waker_wakes_a_sleeping_ring() {
    let mut ring = ring(4);
    let waker = ring.waker();
    let (post, mailbox) = mpsc::sync_channel(1);
    let (answer, answers) = mpsc::sync_channel(1);
    let thread = std::thread::spawn(move || {
        for i in 0..1000 {
            post.send(i).expect("the ring's thread lives");
            waker.wake();
            // The next message only after this one was seen: a lost wake would hang here.
            assert_eq!(answers.recv(), Ok(i));
        }
    });
    let mut events = Vec::new();
    let mut seen = 0;
    while seen < 1000 {
        ring.turn(Wait::Forever, &mut events);
        let is_woken = events.drain(..).any(|event| matches!(event, Event::Woken));
        while let Some(message) = is_woken.then(|| mailbox.try_recv().ok()).flatten() {
            seen += 1;
            answer.send(message).expect("the other thread lives");
        }
    }
    thread.join().expect("the other thread");
}

#[test]
fn many_wakes_are_one_event() {
    let mut ring = ring(4);
    let waker = ring.waker();
    for _ in 0..100 {
        waker.wake();
    }
    let mut events = Vec::new();
    ring.turn(Wait::Forever, &mut events);
    assert!(matches!(events[..], [Event::Woken]), "{events:?}");
    events.clear();
    ring.turn(
        Wait::Until(MonotonicClock.now() + Duration::from_millis(1)),
        &mut events,
    );
    assert!(events.is_empty(), "{events:?}");
}

/// Level-triggered: a kick that is not read is reported again, one that is read is not, and none is lost.
#[test]
fn a_watched_descriptor_is_reported_until_it_is_read() {
    use std::os::fd::AsFd;
    let mut ring = ring(4);
    let kick = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an eventfd");
    ring.watch(kick.as_fd(), Token(5)).expect("watching");
    let mut events = Vec::new();
    ring.turn(
        Wait::Until(MonotonicClock.now() + Duration::from_millis(1)),
        &mut events,
    );
    assert!(events.is_empty(), "{events:?}");
    rustix::io::write(&kick, &1u64.to_ne_bytes()).expect("kicking");
    for _ in 0..3 {
        events.clear();
        ring.turn(Wait::Forever, &mut events);
        assert!(matches!(events[..], [Event::Ready(Token(5))]), "{events:?}");
    }
    rustix::io::read(&kick, &mut [0u8; 8]).expect("reading the kick");
    events.clear();
    ring.turn(
        Wait::Until(MonotonicClock.now() + Duration::from_millis(1)),
        &mut events,
    );
    assert!(events.is_empty(), "{events:?}");
    ring.unwatch(Token(5));
    rustix::io::write(&kick, &1u64.to_ne_bytes()).expect("kicking");
    ring.turn(
        Wait::Until(MonotonicClock.now() + Duration::from_millis(1)),
        &mut events,
    );
    assert!(events.is_empty(), "{events:?}");
    ring.watch(kick.as_fd(), Token(5)).expect("watching again");
    ring.turn(Wait::Forever, &mut events);
    assert!(matches!(events[..], [Event::Ready(Token(5))]), "{events:?}");
}

/// Taking a watch back at every point of its life, with kicks on the way, leaves nothing behind.
#[test]
fn watches_are_taken_back_at_any_moment() {
    use std::os::fd::AsFd;
    let mut ring = ring(2);
    let mut events = Vec::new();
    for turn in 0..200u64 {
        let kick = eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd");
        ring.watch(kick.as_fd(), Token(turn)).expect("watching");
        for point in 0..4 {
            if turn >> point & 1 == 1 {
                ring.turn(Wait::No, &mut events);
            }
            if turn % 5 == point {
                rustix::io::write(&kick, &1u64.to_ne_bytes()).expect("kicking");
            }
            if turn / 8 % 4 == point {
                ring.unwatch(Token(turn));
                events.clear();
            }
        }
        let is_stale = |event: &Event| matches!(event, Event::Ready(Token(token)) if *token == turn);
        assert!(!events.iter().any(is_stale), "reported after unwatch");
        ring.unwatch(Token(turn));
    }
    while ring.slab.len() > 1 {
        ring.turn(Wait::No, &mut events);
    }
    assert_eq!(ring.watches.len(), 1, "the waker's own is left");
}

#[test]
fn a_deadline_ends_a_sleep() {
    let mut ring = ring(4);
    let mut events = Vec::new();
    let deadline = MonotonicClock.now() + Duration::from_millis(3);
    // A turn may return early for reasons of its own, but sleeping on must reach the deadline.
    while MonotonicClock.now() < deadline {
        ring.turn(Wait::Until(deadline), &mut events);
    }
    assert!(events.is_empty());
    ring.turn(Wait::Until(deadline), &mut events);
}

#[test]
fn a_disk_alone_speaks_the_trait() {
    let (_folder, file) = disk();
    let mut disk = RingDisk::new(config(4), file).expect("a ring");
    disk.submit(
        IoId(1),
        DiskOp::Write {
            offset: 0,
            header: header(3),
            data: vec![Buf::zeroed(8192)],
        },
    );
    let mut completions = Vec::new();
    while completions.is_empty() {
        disk.poll(&mut completions);
    }
    assert!(matches!(completions[0].result, Ok(DiskOutcome::Written { .. })));
}

/// Without registered files and buffers everything works the same.
#[test]
fn a_plain_ring_does_as_well() {
    let (_folder, file) = disk();
    let mut ring = ring(4);
    ring.traits.has_registered_buffers = false;
    ring.free_files.clear();
    let slot = ring.add_disk(file, "test").expect("adding");
    ring.submit(
        slot,
        IoId(1),
        DiskOp::Write {
            offset: 4096,
            header: header(8),
            data: vec![],
        },
    );
    complete(&mut ring, 1);
    ring.submit(
        slot,
        IoId(2),
        DiskOp::Read {
            offset: 4096,
            bytes: 4096,
        },
    );
    assert!(
        read_back(&complete(&mut ring, 1)[&2])
            .iter()
            .all(|byte| *byte == 8)
    );
}
