use proptest::prelude::*;

use super::*;

const SMALL: PoolConfig = PoolConfig { slots: [8, 4, 2] };

fn pool() -> Pool {
    Pool::new(SMALL).expect("a pool")
}

#[test]
fn buffers_are_aligned_apart_and_returned() {
    let pool = pool();
    let lengths = [1, 4096, 4097, 65_536, 65_537, 1 << 20];
    let mut buffers: Vec<BufMut> = lengths.iter().map(|length| pool.take(*length)).collect();
    for (i, buffer) in buffers.iter_mut().enumerate() {
        assert_eq!(buffer.as_ptr() as usize % BUFFER_ALIGN, 0);
        buffer.fill(i as u8 + 1);
    }
    for (i, buffer) in buffers.iter().enumerate() {
        assert_eq!(buffer.len(), lengths[i]);
        assert!(
            buffer.iter().all(|byte| *byte == i as u8 + 1),
            "buffer {i} was written by another"
        );
    }
    assert_eq!(pool.free_slots(), [6, 2, 0]);
    drop(buffers);
    assert_eq!(pool.free_slots(), SMALL.slots);
    assert_eq!(pool.counters(), PoolCounters { pooled: 6, heap: 0 });
}

#[test]
fn an_empty_pool_borrows_from_the_next_size_and_then_from_the_heap() {
    let pool = pool();
    let blocks: Vec<BufMut> = (0..13).map(|_| pool.take(4096)).collect();
    // Eight of their own, four of the middle size, none of the leaves' slots.
    assert_eq!(pool.free_slots(), [0, 0, 2]);
    assert_eq!(pool.counters(), PoolCounters { pooled: 12, heap: 1 });
    let large = pool.take((1 << 20) + 1);
    assert_eq!(pool.counters().heap, 2);
    assert_eq!(large.as_ptr() as usize % BUFFER_ALIGN, 0);
    drop((blocks, large));
    assert_eq!(pool.free_slots(), SMALL.slots);
}

#[test]
fn a_slot_stays_out_until_its_last_view_is_gone() {
    let pool = pool();
    let whole = pool.copy_of(&[7; 4096]);
    let part = whole.slice(100, 50);
    let same = part.clone();
    drop((whole, part));
    assert_eq!(pool.free_slots(), [7, 4, 2]);
    assert_eq!(same.bytes(), [7; 50]);
    drop(same);
    assert_eq!(pool.free_slots(), SMALL.slots);
}

#[test]
fn a_buffer_outlives_every_handle_of_its_pool() {
    let pool = pool();
    let buffer = pool.copy_of(b"still here");
    drop(pool);
    assert_eq!(buffer.bytes(), b"still here");
}

#[test]
fn nothing_is_a_buffer_too() {
    let pool = pool();
    let nothing = pool.take(0).freeze();
    assert_eq!(nothing.bytes(), b"");
    assert_eq!(pool.copy_of(b"abc").slice(3, 0).length(), 0);
    assert_eq!(nothing.overlay(0, &nothing).length(), 0);
    assert_eq!(Buf::zeroed(0).length(), 0);
    assert_eq!(pool.counters().pooled, 1);
    assert_eq!(pool.free_slots(), SMALL.slots);
}

#[test]
fn zeros_are_zero_and_aligned_at_any_length() {
    for length in [1, 4096, SLOT_BYTES[2], SLOT_BYTES[2] + 1] {
        let zeros = Buf::zeroed(length);
        assert_eq!(zeros.length(), length);
        assert_eq!(zeros.bytes().as_ptr() as usize % BUFFER_ALIGN, 0);
        assert!(zeros.bytes().iter().all(|byte| *byte == 0));
    }
}

#[test]
fn an_overlay_copies_into_the_same_pool() {
    let pool = pool();
    let old = pool.copy_of(b"0123456789");
    let new = old.overlay(8, &pool.copy_of(b"ab"));
    assert_eq!(
        (old.bytes(), new.bytes()),
        (&b"0123456789"[..], &b"01234567ab"[..])
    );
    assert_eq!(pool.counters(), PoolCounters { pooled: 3, heap: 0 });
    assert_eq!(Buf::zeroed(3).overlay(1, &new.slice(9, 1)).bytes(), b"\0b\0");
}

#[test]
#[should_panic(expected = "slice 2+3 of 4 B")]
fn a_slice_past_the_end_is_a_mistake() {
    let _ = pool().copy_of(b"1234").slice(2, 3);
}

/// Threads that take, share and return the same few slots never see each other's bytes.
#[test]
fn threads_share_a_pool() {
    let pool = pool();
    std::thread::scope(|scope| {
        let (give, take) = std::sync::mpsc::sync_channel::<(Buf, u8)>(4);
        for thread in 0..3u8 {
            let (pool, give) = (pool.clone(), give.clone());
            scope.spawn(move || {
                for turn in 0..3000u32 {
                    let mark = (turn as u8).wrapping_mul(3).wrapping_add(thread);
                    let mut buffer = pool.take(if turn.is_multiple_of(7) { 5000 } else { 64 });
                    buffer.fill(mark);
                    give.send((buffer.freeze(), mark)).expect("the reader is there");
                }
            });
        }
        drop(give);
        for (buffer, mark) in take {
            assert!(buffer.bytes().iter().all(|byte| *byte == mark));
        }
    });
    assert_eq!(pool.free_slots(), SMALL.slots);
}

proptest! {
    #[test]
    fn slices_are_what_slices_of_vectors_are(
        content in proptest::collection::vec(any::<u8>(), 0..9000),
        cuts in proptest::collection::vec((0.0..=1.0f64, 0.0..=1.0f64), 0..6),
    ) {
        let pool = pool();
        let mut buffer = pool.copy_of(&content);
        let mut model = &content[..];
        for (start, length) in cuts {
            let start = (start * model.len() as f64) as usize;
            let length = (length * (model.len() - start) as f64) as usize;
            buffer = buffer.slice(start, length);
            model = &model[start..start + length];
            prop_assert_eq!(buffer.bytes(), model);
        }
        drop(buffer);
        prop_assert_eq!(pool.free_slots(), SMALL.slots);
    }
}
