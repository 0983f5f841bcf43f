//! A whole VDI against an array of bytes, with every message delivered at a random moment.

use crate::world::{Repeat, World, seeds};
use types::{DiskId, HeapBlock};
use weft_vdi::{Op, REQUEST_BYTES_MAX, VdiError};

const MIB: u64 = 1 << 20;

/// A random range of whole sectors: mostly small, often near a shard's edge or the end of the disk.
fn range(world: &mut World) -> (u64, u64) {
    let size = world.model.len() as u64;
    let sectors = size / 512;
    let length = match world.random.below(10) {
        0..=4 => 1 + world.random.below(24),
        5..=7 => 8 * (1 + world.random.below(8)),
        8 => world.random.below(600),
        _ => world.random.below(sectors),
    };
    let near = match world.random.below(4) {
        0 => world.random.below(sectors),
        1 => world.random.below(size.div_ceil(MIB)) * (MIB / 512),
        2 => sectors,
        // A small corner in which requests meet.
        _ => world.random.below(64),
    };
    let start = (near + 16).saturating_sub(world.random.below(32)).min(sectors);
    (start * 512, length.min(sectors - start) * 512)
}

fn submit_any(world: &mut World) {
    let (offset, length) = range(world);
    let fua = world.random.chance(10);
    match world.random.below(20) {
        0..=7 => world.write(offset, length, fua),
        8..=14 => world.read(offset, length),
        15 => world.discard(offset, length),
        16 => world.zero(offset, length, fua),
        17 if length > 0 => world.ask_extents(offset, length),
        _ => world.flush(),
    };
}

#[test]
fn a_vdi_is_an_array_of_bytes() {
    for seed in seeds(60) {
        let _repeat = Repeat(seed);
        let replicas = 1 + seed as usize % 3;
        let bytes = 3 * MIB + 300 * 512 + 512 * (seed % 9);
        let mut world = World::new(seed, bytes, MIB, replicas);
        for _ in 0..200 {
            submit_any(&mut world);
            for _ in 0..world.random.below(60) {
                world.turn();
            }
            if world.random.chance(2) {
                world.run_dry();
            }
            if world.random.chance(1) {
                let more = 512 * world.random.below(4000);
                world.grow(world.model.len() as u64 + more, replicas);
            }
        }
        world.run_dry();
        let size = world.model.len() as u64;
        world.read(0, size);
        world.run_dry();
    }
}

#[test]
fn the_longest_requests_cross_shards() {
    for seed in seeds(3) {
        let _repeat = Repeat(seed);
        let mut world = World::new(seed, 70 * MIB + 512, 16 * MIB, 1);
        world.write(512, REQUEST_BYTES_MAX, true);
        world.write(16 * MIB - 512, REQUEST_BYTES_MAX, false);
        world.read(0, REQUEST_BYTES_MAX);
        world.zero(20 * MIB + 1024, REQUEST_BYTES_MAX, false);
        world.read(16 * MIB, REQUEST_BYTES_MAX);
        world.discard(1536, 69 * MIB);
        world.write(MIB, 4096, false);
        world.read(512, REQUEST_BYTES_MAX);
        world.run_dry();
    }
}

#[test]
fn what_guests_may_not_ask_is_refused() {
    let mut world = World::new(1, MIB + 512, MIB, 1);
    let data = HeapBlock::new(&[1; 511]);
    for op in [
        Op::Read {
            offset: 1,
            length: 512,
            of: None,
        },
        Op::Read {
            offset: MIB,
            length: 1024,
            of: None,
        },
        Op::Read {
            offset: u64::MAX - 511,
            length: 512,
            of: None,
        },
        Op::Write {
            offset: 0,
            data,
            fua: true,
        },
        Op::Discard {
            offset: 512,
            length: u64::MAX - 511,
        },
        Op::WriteZeroes {
            offset: MIB + 1024,
            length: 0,
            fua: false,
        },
        Op::Extents {
            offset: 512,
            length: 0,
            of: None,
        },
    ] {
        let id = world.ask(op.clone());
        assert!(!world.is_waiting(id), "{op:?}");
    }
    assert_eq!(world.errors.len(), 7);
    let size = MIB + 512;
    assert!(world.errors.contains(&VdiError::OutOfRange {
        offset: MIB,
        length: 1024,
        size
    }));
    assert!(world.errors.contains(&VdiError::Misaligned {
        offset: 0,
        length: 511,
        sector: 512
    }));
    let mut big = World::new(1, 40 * MIB, 16 * MIB, 1);
    big.ask(Op::Read {
        offset: 0,
        length: REQUEST_BYTES_MAX + 512,
        of: None,
    });
    assert!(matches!(big.errors[..], [VdiError::OutOfRange { .. }]));
}

#[test]
fn requests_of_nothing_are_done_at_once() {
    let mut world = World::new(1, MIB, MIB, 1);
    for id in [
        world.read(512, 0),
        world.write(MIB, 0, true),
        world.zero(0, 0, true),
        world.discard(512, 3584),
    ] {
        assert!(!world.is_waiting(id));
    }
    assert_eq!(world.inboxes(), 0, "nobody had to be asked");
}

#[test]
fn grown_space_reads_as_zeros_even_behind_an_odd_end() {
    let mut world = World::new(5, 5120, MIB, 2);
    world.write(4096, 1024, false);
    world.zero(4096, 1024, false);
    world.write(4096, 512, false);
    world.grow(3 * MIB, 2);
    world.read(0, 3 * MIB);
    world.write(3 * MIB - 512, 512, true);
    world.read(0, 3 * MIB);
    world.run_dry();
}

#[test]
fn one_replica_of_two_hosts_is_enough_to_serve_reads_meanwhile() {
    let mut world = World::new(9, MIB, MIB, 3);
    world.write(0, 65536, false);
    world.run_dry();
    world.set_disk(DiskId(3), false);
    world.write(512, 4096, true);
    world.read(0, 65536);
    world.run_dry();
}
