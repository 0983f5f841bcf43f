//! What goes on beside the guest: flush sharing, admission, first touches, scrub, replaced disks, deletion.

use crate::world::{Repeat, World, seeds};
use types::{DiskId, ShardNo};
use weft_vdi::{ADMITTED_MAX, Event, Notice, Op, VdiError};

const MIB: u64 = 1 << 20;

#[test]
fn flushes_ask_only_shards_that_were_written_and_share() {
    let mut world = World::new(1, 8 * MIB, MIB, 1);
    world.flush();
    world.run_dry();
    assert_eq!(world.flushes(), 8, "nobody knows what a past life wrote");
    world.flush();
    assert_eq!(world.inboxes(), 0, "nothing was written since");
    world.write(MIB, 4096, false);
    world.run_dry();
    let first = world.flush();
    let second = world.flush();
    world.run_dry();
    assert!(!world.is_waiting(first) && !world.is_waiting(second));
    assert_eq!(world.flushes(), 9, "one shard, one flush for two requests");
    world.write(2 * MIB - 4096, 8192, true);
    world.run_dry();
    assert_eq!(world.flushes(), 11, "the two shards of a write with FUA");
}

#[test]
fn a_flush_does_not_join_one_that_was_sent_before_a_write_completed() {
    let mut world = World::new(2, MIB, MIB, 1);
    world.flush();
    world.run_dry();
    world.write(0, 4096, false);
    world.run_dry();
    let early = world.flush();
    // Overtakes: the write completes while the first flush is still to be answered.
    let write = world.write(8192, 4096, false);
    while world.is_waiting(write) {
        world.turn();
    }
    let late = world.flush();
    world.run_dry();
    assert!(!world.is_waiting(early) && !world.is_waiting(late));
    let flushes = world.flushes();
    assert!((2..=3).contains(&flushes), "{flushes}");
}

#[test]
fn no_more_than_the_bound_is_asked_at_once_and_all_is_answered() {
    let mut world = World::new(3, 32 * MIB, 8 * MIB, 1);
    for i in 0..ADMITTED_MAX as u64 + 500 {
        world.write(i * 4096, 4096, false);
    }
    assert_eq!(world.vdi.status().in_flight, ADMITTED_MAX + 500);
    // Each shard's first message is the fence; let that pass to see the rest.
    for _ in 0..12 {
        world.turn();
    }
    assert!(world.inboxes() <= ADMITTED_MAX + 4);
    world.run_dry();
    world.read(0, 32 * MIB);
    world.run_dry();
}

#[test]
fn a_hundred_writers_of_one_sector_take_turns() {
    for seed in seeds(5) {
        let _repeat = Repeat(seed);
        let mut world = World::new(seed, MIB, MIB, 3);
        for i in 0..100 {
            world.write(512 * (i % 8), 512, i % 16 == 0);
            world.read(0, 4096);
        }
        world.run_dry();
    }
}

#[test]
fn untouched_shards_are_fenced_a_few_at_a_time() {
    let mut world = World::new(4, 200 * MIB, MIB, 1);
    assert_eq!(world.inboxes(), 0, "opening sends nothing");
    world.step(Event::Tick);
    assert!((1..=64).contains(&world.inboxes()));
    world.step(Event::Tick);
    assert!(world.inboxes() <= 64, "those before have not answered");
    world.run_dry();
    assert_eq!(world.shards_on(DiskId(1)), 200);
    assert!(!world.vdi.is_busy(), "an idle VDI needs no ticks");
}

#[test]
fn a_scrub_counts_its_shards() {
    let mut world = World::new(5, 5 * MIB, MIB, 3);
    world.write(0, 5 * MIB, false);
    world.run_dry();
    world.notices.clear();
    world.step(Event::Scrub);
    world.step(Event::Scrub);
    world.run_dry();
    let done: Vec<(u32, u32)> = world
        .notices
        .iter()
        .filter_map(|notice| match notice {
            Notice::Scrub { done, total, .. } => Some((*done, *total)),
            _ => None,
        })
        .collect();
    assert_eq!(
        done,
        [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)],
        "once, though asked twice"
    );
    let Some(Notice::Scrub {
        blocks, unreadable, ..
    }) = world.notices.last()
    else {
        panic!("{:?}", world.notices);
    };
    assert_eq!((*blocks, *unreadable), (3 * 5 * 256, 0));
}

#[test]
fn bad_blocks_are_read_from_elsewhere_or_named() {
    let mut world = World::new(6, 2 * MIB, MIB, 2);
    world.write(0, 2 * MIB, false);
    world.run_dry();
    world.rot(DiskId(1), 1, 3);
    world.read(MIB, 65536);
    world.run_dry();
    world.rot(DiskId(1), 1, 7);
    world.rot(DiskId(2), 1, 7);
    world.ask(Op::Read {
        offset: MIB,
        length: 65536,
        of: None,
    });
    world.run_dry();
    let offset = MIB + 7 * 4096;
    assert_eq!(world.errors, [VdiError::Unreadable { offset }]);
    assert!(world.notices.contains(&Notice::Unreadable {
        shard: ShardNo(1),
        offset
    }));
    // A whole new block makes it good again; part of one cannot.
    world.ask(Op::WriteZeroes {
        offset,
        length: 512,
        fua: false,
    });
    world.run_dry();
    assert_eq!(world.errors.len(), 2);
    world.write(offset, 4096, false);
    world.read(MIB, 65536);
    world.run_dry();
}

#[test]
fn deletion_drops_every_shard_and_closes() {
    for seed in seeds(10) {
        let _repeat = Repeat(seed);
        let mut world = World::new(seed, 100 * MIB, MIB, 3);
        for i in 0..50 {
            world.ask(Op::WriteZeroes {
                offset: i * 512,
                length: 2 * MIB,
                fua: true,
            });
        }
        for _ in 0..world.random.below(200) {
            world.turn();
        }
        if seed % 2 == 1 {
            world.set_disk(DiskId(2), false);
        }
        world.step(Event::Delete);
        let late = world.ask(Op::Flush);
        assert!(!world.is_waiting(late));
        let comes_back = seed % 4 == 3;
        if comes_back {
            for _ in 0..world.random.below(20) {
                world.turn();
            }
            world.set_disk(DiskId(2), true);
        }
        world.run_dry();
        assert!(!comes_back || world.shards_on(DiskId(2)) == 0);
        assert_eq!(world.notices.iter().filter(|n| **n == Notice::Dropped).count(), 1);
        assert!(world.errors.iter().all(|error| *error == VdiError::Closed));
        assert_eq!(world.shards_on(DiskId(1)), 0);
        assert_eq!(world.shards_on(DiskId(3)), 0);
        assert!(!world.vdi.is_busy());
    }
}

#[test]
fn a_replaced_disk_is_filled_while_the_guest_goes_on() {
    for seed in seeds(10) {
        let _repeat = Repeat(seed);
        let mut world = World::new(seed, 3 * MIB, MIB, 3);
        world.write(0, 3 * MIB, false);
        world.run_dry();
        world.add_disk(DiskId(9));
        let is_late = seed % 3 == 0;
        if is_late {
            world.set_disk(DiskId(9), false);
        }
        let new = (0..3).map(|no| (ShardNo(no), DiskId(9))).collect();
        world.step(Event::ReplaceDisk { old: DiskId(2), new });
        for i in 0..20 {
            world.write(i * 100 * 512, 1536, false);
            world.read(i * 512, MIB);
            for _ in 0..world.random.below(30) {
                world.turn();
            }
        }
        if is_late {
            world.set_disk(DiskId(9), true);
        }
        world.run_dry();
        let status = world.vdi.status();
        assert_eq!(status.shards_whole, 3, "{status:?}");
        assert!(
            world
                .vdi
                .records()
                .all(|record| record.in_sync.contains(&DiskId(9)))
        );
        assert!(
            world
                .vdi
                .records()
                .all(|record| !record.replicas.contains(&DiskId(2)))
        );
        world.set_disk(DiskId(1), false);
        world.read(0, 3 * MIB);
        world.run_dry();
    }
}

/// Nothing is given up before the newcomer holds everything: whatever the number of replicas, at every moment as many
/// disks are in sync as before.
#[test]
fn a_place_is_given_away_when_the_newcomer_holds_everything() {
    for seed in seeds(12) {
        let _repeat = Repeat(seed);
        let replicas = 1 + seed % 3;
        let mut world = World::new(seed, 3 * MIB, MIB, replicas as usize);
        world.write(0, 3 * MIB, false);
        world.run_dry();
        world.add_disk(DiskId(9));
        let new = (0..3).map(|no| (ShardNo(no), DiskId(9))).collect();
        world.step(Event::ReplaceDisk { old: DiskId(1), new });
        for i in 0..200 {
            if i % 10 == 0 {
                world.write(i * 20 * 512, 1536, i % 20 == 0);
            }
            world.turn();
            for record in world.vdi.records() {
                assert_eq!(record.in_sync.len() as u64, replicas, "{record:?}");
                assert_eq!(record.replicas.len() as u64, replicas, "{record:?}");
            }
        }
        world.run_dry();
        for record in world.vdi.records() {
            let names = |disk| record.in_sync.contains(&DiskId(disk));
            assert!(names(9) && !names(1), "{record:?}");
        }
        assert_eq!(world.shards_on(DiskId(1)), 0);
        world.read(0, 3 * MIB);
        world.run_dry();
    }
}

#[test]
fn what_was_to_move_to_a_disk_that_leaves_moves_elsewhere() {
    for seed in seeds(40) {
        let _repeat = Repeat(seed);
        let mut world = World::new(seed, 3 * MIB, MIB, 3);
        world.write(0, 3 * MIB, false);
        world.run_dry();
        world.add_disk(DiskId(9));
        world.add_disk(DiskId(10));
        let move_to = |to| Event::ReplaceDisk {
            old: DiskId(2),
            new: (0..3).map(|no| (ShardNo(no), DiskId(to))).collect(),
        };
        world.step(move_to(9));
        // At any moment: before it is emptied, while the record is being changed, after it was.
        for _ in 0..world.random.below(30) {
            world.turn();
        }
        let disk = DiskId(9);
        let names_it = |record: &replication::ShardRecord| record.replicas.contains(&disk);
        let has_come: Vec<ShardNo> = world
            .vdi
            .records()
            .filter(|r| names_it(r))
            .map(|r| r.shard.no)
            .collect();
        world.leaving = Some(disk);
        world.step(Event::DiskLeaves { disk, refused: None });
        world.write(0, 2 * MIB, false);
        world.run_dry();
        world.step(move_to(10));
        world.run_dry();
        for record in world.vdi.records() {
            let to = if has_come.contains(&record.shard.no) {
                9
            } else {
                10
            };
            assert_eq!(record.in_sync.len(), 3, "{record:?}");
            assert!(record.in_sync.contains(&DiskId(to)), "{record:?}");
        }
        world.read(0, 3 * MIB);
        world.run_dry();
    }
}

#[test]
fn disks_come_and_go_under_load() {
    for seed in seeds(20) {
        let _repeat = Repeat(seed);
        let mut world = World::new(seed, 2 * MIB + 512, MIB, 3);
        for round in 0..12u64 {
            let disk = DiskId(u128::from(1 + round % 3));
            world.set_disk(disk, false);
            for _ in 0..20 {
                let offset = 512 * world.random.below(4000);
                let fua = world.random.chance(20);
                match world.random.below(4) {
                    0 => world.read(offset, 9 * 512),
                    1 => world.zero(offset, 32 * 512, fua),
                    2 => world.flush(),
                    _ => world.write(offset, 17 * 512, fua),
                };
                for _ in 0..world.random.below(40) {
                    world.turn();
                }
            }
            world.set_disk(disk, true);
            if round % 2 == 0 {
                world.run_dry();
            }
        }
        world.run_dry();
        assert_eq!(world.vdi.status().shards_whole, 3);
        let size = world.model.len() as u64;
        world.read(0, size);
        world.run_dry();
    }
}

#[test]
fn a_shard_that_another_writer_took_completes_nothing_and_holds_nobody_up() {
    let mut world = World::new(8, 4 * MIB, MIB, 3);
    world.write(0, 4 * MIB, true);
    world.run_dry();
    world.take_over(2);
    for op in [
        Op::WriteZeroes {
            offset: 2 * MIB + 512,
            length: 8192,
            fua: true,
        },
        Op::Flush,
        Op::Read {
            offset: MIB,
            length: 2 * MIB,
            of: None,
        },
    ] {
        world.ask(op);
    }
    world.run_dry();
    let shard = ShardNo(2);
    assert!(world.notices.contains(&Notice::Fenced { shard }));
    assert!(!world.errors.is_empty());
    assert!(world.errors.iter().all(|error| *error == VdiError::Closed));
    world.step(Event::Scrub);
    world.run_dry();
    assert!(matches!(
        world.notices.last(),
        Some(Notice::Scrub {
            done: 4,
            total: 4,
            ..
        })
    ));
    world.step(Event::Delete);
    world.run_dry();
    assert_eq!(world.notices.last(), Some(&Notice::Dropped));
    assert_eq!(world.shards_on(DiskId(1)), 1, "the other writer's stays");
}

#[test]
fn without_a_quorum_writes_wait_and_reads_go_on() {
    let mut world = World::new(9, 2 * MIB, MIB, 3);
    world.write(0, MIB, false);
    world.flush();
    world.run_dry();
    world.set_disk(DiskId(1), false);
    world.run_dry();
    world.set_disk(DiskId(2), false);
    let write = world.write(MIB / 2, 512, false);
    let read = world.read(0, 65536);
    let behind = world.read(MIB / 2, 512);
    for _ in 0..1000 {
        world.turn();
    }
    assert!(world.is_waiting(write) && world.is_waiting(behind) && !world.is_waiting(read));
    let (shard, is_waiting) = (ShardNo(0), true);
    assert!(world.notices.contains(&Notice::NoQuorum { shard, is_waiting }));
    assert!(world.vdi.status().shards_waiting >= 1);
    world.set_disk(DiskId(2), true);
    world.run_dry();
}
