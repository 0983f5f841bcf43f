//! Cuts: what a snapshot holds, when it is sealed, what is under way meanwhile, and answers that are held back.

use crate::world::{Repeat, World, seeds};
use types::{DiskId, LayerId, Lineage, VdiId};
use weft_vdi::{Event, HOLD_MAX, Op, VdiError};

const MIB: u64 = 1 << 20;
const BLOCK: u64 = 4096;

fn up_to(newest: u32) -> Lineage {
    Lineage::of_layers(VdiId(1), LayerId(1), LayerId(newest))
}

#[test]
fn a_snapshot_holds_what_was_complete_and_nothing_that_came_after() {
    for seed in seeds(20) {
        let _repeat = Repeat(seed);
        let mut world = World::new(seed, 4 * MIB, MIB, 3);
        let mut states = Vec::new();
        for newest in 2..6 {
            for _ in 0..20 {
                let offset = world.random.below(3 * MIB / 512) * 512;
                let length = (1 + world.random.below(40)) * 512;
                match world.random.below(4) {
                    0 => world.discard(offset, length),
                    1 => world.zero(offset, length, false),
                    _ => world.write(offset, length, false),
                };
            }
            world.run_dry();
            let before = world.model[..3 * MIB as usize].to_vec();
            // Under way while it is cut, in the last shard: either side may have them.
            for at in 0..8 {
                world.write(3 * MIB + at * 3 * BLOCK, 2 * BLOCK + 512, at == 0);
            }
            let turns = world.random.below(20);
            (0..turns).for_each(|_| {
                world.turn();
            });
            world.cut(up_to(newest));
            states.push((up_to(newest - 1), before));
            // Submitted after the cut, with requests before it still under way.
            for _ in 0..20 {
                let offset = world.random.below(3 * MIB / 512 - 40) * 512;
                world.write(offset, 20 * 512, false);
                world.turn();
            }
            world.run_dry();
            world.read(0, 4 * MIB);
            for (lineage, state) in &states {
                world.read_of(lineage, 0, state);
            }
            world.run_dry();
        }
    }
}

#[test]
fn shards_that_nobody_touched_are_cut_too() {
    let mut world = World::new(1, 4 * MIB, MIB, 1);
    world.cut(up_to(2));
    (0..4).for_each(|shard| {
        world.write(shard * MIB, BLOCK, false);
    });
    world.run_dry();
    world.read_of(&up_to(1), 0, &vec![0; 4 * MIB as usize]);
    world.run_dry();
}

#[test]
fn a_layer_is_sealed_when_all_of_it_is_on_stable_media() {
    for seed in seeds(40) {
        let _repeat = Repeat(seed);
        let mut world = World::new(seed, 4 * MIB, MIB, 3);
        let before: Vec<_> = (0..12)
            .map(|at| world.write(at * 300 * 1024, 64 * 1024, at % 4 == 0))
            .collect();
        for _ in 0..world.random.below(80) {
            world.turn();
        }
        let cut = world.cut(up_to(2));
        let second = world.cut(up_to(3));
        while world.is_waiting(cut) {
            assert!(world.turn(), "nothing goes on");
        }
        assert!(
            !before.iter().any(|write| world.is_waiting(*write)),
            "seed {seed}"
        );
        world.run_dry();
        assert!(!world.is_waiting(second));
    }
}

#[test]
fn nobody_is_answered_while_vdis_are_cut_together() {
    let mut world = World::new(1, 2 * MIB, MIB, 1);
    world.write(0, BLOCK, false);
    world.run_dry();
    let write = world.write(BLOCK, BLOCK, false);
    world.step(Event::Hold);
    while world.turn() {}
    // A read of what nobody was told yet must not be answered either: whoever sees it could act on it.
    let read = world.read(BLOCK, BLOCK);
    while world.turn() {}
    let wrong = world.ask(Op::Read {
        offset: 2 * MIB,
        length: BLOCK,
        of: None,
    });
    for held in [write, read, wrong] {
        assert!(world.is_waiting(held));
    }
    world.step(Event::Release);
    for held in [write, read, wrong] {
        assert!(!world.is_waiting(held));
    }
    assert!(matches!(world.errors[..], [VdiError::OutOfRange { .. }]));
    let later = world.write(0, BLOCK, false);
    world.run_dry();
    assert!(!world.is_waiting(later));
}

#[test]
fn who_held_too_long_goes_on() {
    let mut world = World::new(1, 2 * MIB, MIB, 1);
    world.write(0, BLOCK, false);
    world.run_dry();
    assert!(!world.vdi.is_busy());
    world.step(Event::Hold);
    assert!(world.vdi.is_busy(), "nobody would look at the clock");
    let write = world.write(0, BLOCK, false);
    while world.turn() {}
    assert!(world.is_waiting(write));
    let mut steps = 0;
    while world.is_waiting(write) {
        // A millisecond each.
        world.step(Event::Tick);
        steps += 1;
        assert!(steps <= HOLD_MAX.as_millis(), "held for {steps} ms and more");
    }
    assert!(!world.vdi.is_busy());
}

#[test]
fn a_vdi_that_is_deleted_is_not_cut() {
    let mut world = World::new(1, 2 * MIB, MIB, 1);
    world.step(Event::Delete);
    let lineage = up_to(2);
    world.ask(Op::Cut { lineage });
    assert_eq!(world.errors, [VdiError::Closed]);
}

/// Small writes over the same blocks, cut at any moment: the old content comes from layers below, or was read before the
/// cut and goes to the new layer with the change.
#[test]
fn parts_of_blocks_are_changed_over_cuts() {
    for seed in seeds(20) {
        let _repeat = Repeat(seed);
        let mut world = World::new(seed, MIB + 512, MIB, 3);
        for highest in 2..12 {
            for _ in 0..20 {
                let offset = 512 * world.random.below(64);
                match world.random.below(5) {
                    0 => world.read(offset, 9 * 512),
                    1 => world.zero(offset, 3 * 512, false),
                    2 => world.flush(),
                    _ => world.write(offset, 5 * 512, false),
                };
                for _ in 0..world.random.below(6) {
                    world.turn();
                }
            }
            let is_away = world.random.chance(30);
            if is_away {
                world.set_disk(DiskId(2), false);
            }
            world.cut(up_to(highest));
            if is_away {
                world.set_disk(DiskId(2), true);
            }
        }
        world.run_dry();
        let size = world.model.len() as u64;
        world.read(0, size);
        world.run_dry();
    }
}

/// A reader of a snapshot waits for nobody: what it reads does not change.
#[test]
fn a_read_of_a_snapshot_does_not_wait_behind_writes() {
    let mut world = World::new(3, MIB, MIB, 1);
    world.write(0, 4096, false);
    world.run_dry();
    world.cut(up_to(2));
    world.run_dry();
    let write = world.write(0, 4096, false);
    let of = Some(up_to(1));
    let (offset, length) = (0, 4096);
    let past = world.ask(Op::Read { offset, length, of });
    let head = world.ask(Op::Read {
        offset,
        length,
        of: None,
    });
    // The disk has been asked for the write and the snapshot's read, not for the head's.
    assert_eq!(world.inboxes(), 2);
    assert!([write, past, head].iter().all(|id| world.is_waiting(*id)));
    world.run_dry();
    assert!(world.errors.is_empty());
}
