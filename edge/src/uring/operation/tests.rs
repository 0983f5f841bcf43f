use proptest::prelude::*;

use super::*;
use crate::uring::PoolConfig;

fn pool() -> Pool {
    Pool::new(PoolConfig { slots: [4, 2, 1] }).expect("a pool")
}

fn read(bytes: u32) -> Operation {
    Operation::new(IoId(1), DiskOp::Read { offset: 8192, bytes }, &mut Vec::new())
}

/// What the kernel would see from `done` on.
fn rest_of(header: &AlignedBlock, data: &[Buf], done: u64) -> Vec<u8> {
    let mut iovecs = Vec::new();
    fill_iovecs(&mut iovecs, header, data, done);
    let parts = std::iter::once(&header.0[..]).chain(data.iter().map(Payload::bytes));
    let whole: Vec<&[u8]> = parts.collect();
    let mut seen = Vec::new();
    for iovec in &iovecs {
        let address = iovec.iov_base as usize;
        let inside =
            |part: &&&[u8]| (part.as_ptr() as usize..part.as_ptr() as usize + part.len()).contains(&address);
        let part = whole.iter().find(inside).expect("an address in one of the parts");
        let start = address - part.as_ptr() as usize;
        seen.extend_from_slice(&part[start..start + iovec.iov_len]);
    }
    seen
}

proptest! {
    /// However a transfer is interrupted, what is asked for next is exactly the rest, and it ends exactly when all
    /// is there.
    #[test]
    fn a_continued_write_goes_on_where_it_stopped(
        blocks in proptest::collection::vec(0usize..4, 0..6),
        steps in proptest::collection::vec(1usize..9000, 1..20),
    ) {
        let pool = pool();
        let mut header = AlignedBlock::zeroed();
        header.0.fill(0xfe);
        let mut next = 0u32;
        let mut part = |blocks: &usize| {
            let mut buffer = pool.take(blocks * 4096);
            buffer.fill_with(|| { next += 1; (next / 7) as u8 });
            buffer.freeze()
        };
        let data: Vec<Buf> = blocks.iter().map(&mut part).collect();
        let mut whole = header.0.to_vec();
        data.iter().for_each(|part| whole.extend_from_slice(part.bytes()));
        let write = DiskOp::Write { offset: 0, header: header.clone(), data: data.clone() };
        let mut operation = Operation::new(IoId(1), write, &mut Vec::new());
        let mut done = 0;
        for step in steps.iter().cycle() {
            prop_assert_eq!(&rest_of(&header, &data, done as u64), &whole[done..]);
            let moved = (*step).min(whole.len() - done);
            done += moved;
            match operation.advance(moved as i32) {
                Progress::Again => prop_assert!(done < whole.len()),
                Progress::Finished(result) => {
                    prop_assert_eq!(result, Ok(()));
                    break;
                }
            }
        }
        prop_assert_eq!(done, whole.len());
    }
}

#[test]
fn a_continued_read_fills_the_rest_of_one_buffer() {
    let pool = pool();
    let mut operation = read(65_536);
    let nowhere = |_: *const u8| None;
    operation.entry(Place::Plain(0), &pool, nowhere);
    let taken = pool.counters();
    assert!(matches!(operation.advance(4096), Progress::Again));
    operation.entry(Place::Plain(0), &pool, nowhere);
    assert_eq!(pool.counters(), taken, "the rest goes into the same buffer");
    assert!(matches!(operation.advance(61_440), Progress::Finished(Ok(()))));
    match operation.finish(Ok(()), &mut Vec::new()).result {
        Ok(DiskOutcome::Read(buffer)) => assert_eq!(buffer.length(), 65_536),
        other => panic!("{other:?}"),
    }
}

#[test]
fn no_progress_is_an_end_with_numbers() {
    let mut operation = read(65_536);
    assert!(matches!(operation.advance(4096), Progress::Again));
    let Progress::Finished(Err(error)) = operation.advance(0) else {
        panic!("not an end")
    };
    let short = DiskError::Short {
        operation: "read",
        offset: 8192,
        done: 4096,
        wanted: 65_536,
    };
    assert_eq!(error, short);
}

#[test]
fn what_is_put_off_is_asked_again_but_not_for_ever() {
    for errno in [libc::EAGAIN, libc::EINTR] {
        let mut operation = read(4096);
        for _ in 0..PUT_OFF_MAX {
            assert!(matches!(operation.advance(-errno), Progress::Again));
        }
        let Progress::Finished(Err(DiskError::Io { errno: told, .. })) = operation.advance(-errno) else {
            panic!("asked again for ever")
        };
        assert_eq!(told, errno);
    }
}

/// A failed sync is final at once: asking again may be told a lie.
#[test]
fn a_failed_transfer_is_told_with_its_numbers() {
    let mut operation = read(4096);
    let Progress::Finished(Err(error)) = operation.advance(-libc::EIO) else {
        panic!("not an end")
    };
    assert!(
        error
            .to_string()
            .starts_with("read of 4096 B at 8192: Input/output error"),
        "{error}"
    );
    for errno in [libc::EIO, libc::EINTR, libc::EAGAIN] {
        let mut sync = Operation::new(IoId(2), DiskOp::Sync, &mut Vec::new());
        match sync.advance(-errno) {
            Progress::Finished(Err(DiskError::Io {
                operation: "sync",
                errno: told,
                ..
            })) => assert_eq!(told, errno),
            _ => panic!("a sync was asked again after {errno}"),
        }
    }
}
