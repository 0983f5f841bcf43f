//! The memory setting covers leaves and the checkpoints of them, whatever guests do while one is being saved.

mod support;

use support::{Geometry, Rng, World, content, small_settings};
use types::{BlockNo, HeapBlock, LayerId, Seq, ShardId, ShardNo, VdiId, crc32c};
use weft_store::{IndexRequest, Origin, Request, StoreSettings};

/// A value whose 256 blocks were all written by themselves, with seqs and addresses as large as they get.
const VALUE_BYTES_MAX: u64 = 5632;

/// Values, RocksDB's batch of them, its table in memory.
const COPIES: u64 = 3;

const CACHE_BYTES: u64 = 8 << 20;
const LEAVES: u64 = 900;
const WRITES: u64 = 12_000;
const DEPTH: usize = 16;

fn shard() -> ShardId {
    ShardId {
        vdi: VdiId(1),
        no: ShardNo(0),
    }
}

fn write(block: u32, seq: u64) -> Request<HeapBlock> {
    let bytes = content(seq, block);
    Request::Write {
        shard: shard(),
        layer: LayerId(0),
        block: BlockNo(block),
        seq: Seq(seq),
        crcs: [crc32c(&bytes)].into_iter().collect(),
        data: HeapBlock::new(&bytes),
        origin: Origin::Live,
    }
}

fn leaves_of(request: &IndexRequest) -> u64 {
    match request {
        IndexRequest::Checkpoint { batch, .. } => {
            batch.puts.iter().filter(|(key, _)| key[0] == b'l').count() as u64
        }
        IndexRequest::Load { .. } => 0,
    }
}

/// Random writes all over a shard with more leaves than the cache holds, and an index that answers loads at once but
/// is done with a checkpoint only when nothing else can happen any more: the longest time there is to make leaves
/// dirty.
#[test]
fn leaves_and_a_checkpoint_fit_the_setting_however_slow_the_index_is() {
    let geometry = Geometry {
        segments: 48,
        segment_bytes: 2 << 20,
    };
    let settings = StoreSettings {
        cache_bytes: CACHE_BYTES,
        checkpoint_bytes: 1 << 40,
        ..small_settings()
    };
    let mut world = World::new(1, &geometry, settings);
    world
        .call(Request::PutRecord {
            shard: shard(),
            record: vec![1],
        })
        .expect("record");
    let mut random = Rng(5);
    let (mut asked, mut most, mut checkpoints) = (0, 0, 0);
    loop {
        while asked < WRITES && (asked as usize) < world.replies.len() + DEPTH {
            asked += 1;
            let block = random.below(LEAVES) * 256 + random.below(8);
            world.ask(write(block as u32, asked));
        }
        world.turn_end();
        let load = world
            .index
            .iter()
            .position(|request| matches!(request, IndexRequest::Load { .. }));
        if let Some(load) = load.and_then(|at| world.index.remove(at)) {
            world.index.push_front(load);
            world.index_step();
        } else if !world.ios.is_empty() {
            let choice = random.below(world.ios.len() as u64) as usize;
            world.io_step(choice);
        } else if let Some(request) = world.index.front() {
            most = most.max(leaves_of(request));
            checkpoints += 1;
            world.index_step();
        } else if world.replies.len() as u64 == WRITES {
            break;
        } else {
            panic!(
                "{} of {asked} writes are answered and nothing is under way",
                world.replies.len()
            );
        }
        let cached = world.store.stats().cached_bytes;
        assert!(cached <= CACHE_BYTES / 2, "{cached} bytes of leaves");
    }
    // The writes that were on their way when the limit was reached come on top.
    let counted = most.saturating_sub(DEPTH as u64);
    let bytes = world.store.stats().cached_bytes + counted * VALUE_BYTES_MAX * COPIES;
    assert!(checkpoints >= 20, "only {checkpoints} checkpoints");
    assert!(
        most > 100,
        "the largest had only {most} leaves: this tests nothing"
    );
    assert!(
        bytes <= CACHE_BYTES,
        "{most} leaves in one checkpoint: {bytes} bytes of {CACHE_BYTES}"
    );
}
