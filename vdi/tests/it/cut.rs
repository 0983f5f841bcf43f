//! Cuts under load: what is under way ends in its layer, and parts of blocks keep what they do not change.

use types::{DiskId, LayerId, Lineage, LineageStep, VdiId};
use weft_vdi::{Event, Op};

use crate::world::{Repeat, World, seeds};

const MIB: u64 = 1 << 20;

fn layers(highest: u32) -> Lineage {
    let step = LineageStep {
        vdi: VdiId(1),
        lowest: LayerId(1),
        highest: LayerId(highest),
    };
    Lineage::new(&[step]).expect("a range")
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
            let lineage = layers(highest);
            world.step(Event::Cut { lineage });
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
    world.step(Event::Cut { lineage: layers(2) });
    let write = world.write(0, 4096, false);
    let of = Some(layers(1));
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
