//! Making a ring: the best this kernel grants, and the pool's region registered with it.
//!
//! UNSAFETY: registering memory hands its address to the kernel for as long as the ring lives.
#![allow(unsafe_code)]

use io_uring::IoUring;
use libc::iovec;

use super::pool::Pool;
use super::ring::RingError;

/// Bytes per registered buffer: below the kernel's 1 GiB, and a multiple of the largest slot, so none is cut.
const REGISTERED_PIECE_BYTES: usize = 512 << 20;

/// The best ring this kernel makes, and whether it defers its work to us.
pub(super) fn set_up(entries: u32) -> Result<(IoUring, bool), RingError> {
    // Polls and continuations complete beside the disk operations; the kernel keeps what overflows (NODROP).
    let completions = entries.saturating_mul(2).max(64);
    let deferred = IoUring::builder()
        .setup_cqsize(completions)
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_coop_taskrun()
        .setup_taskrun_flag()
        .build(entries);
    if let Ok(uring) = deferred {
        return Ok((uring, true));
    }
    let plain = IoUring::builder().setup_cqsize(completions).build(entries);
    let uring = plain.map_err(|source| RingError {
        operation: "io_uring_setup",
        source,
    })?;
    let params = uring.params();
    if !params.is_feature_ext_arg() || !params.is_feature_nodrop() {
        let source = std::io::Error::new(std::io::ErrorKind::Unsupported, "Linux 5.11 or newer is needed");
        return Err(RingError {
            operation: "io_uring_setup",
            source,
        });
    }
    Ok((uring, false))
}

/// Registers the pool's region, so that the kernel need not pin pages per operation. Says whether it worked.
pub(super) fn register_region(uring: &IoUring, pool: &Pool) -> bool {
    let (start, bytes) = pool.region();
    raise_memlock(bytes as u64);
    let piece = |offset: usize| iovec {
        iov_base: start.as_ptr().wrapping_add(offset).cast(),
        iov_len: REGISTERED_PIECE_BYTES.min(bytes - offset),
    };
    let pieces: Vec<iovec> = (0..bytes).step_by(REGISTERED_PIECE_BYTES).map(piece).collect();
    // SAFETY: the pieces cover the pool's own mapping. The kernel holds the pages themselves from here on, so that
    // even a pool that went first would leave it nothing to miss; the ring keeps its pool all the same.
    unsafe { uring.submitter().register_buffers(&pieces) }.is_ok()
}

/// Asks for `more` bytes of lockable memory on top of the limit. Without the right to, registering may still do.
fn raise_memlock(more: u64) {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let now = getrlimit(Resource::Memlock);
    let Some(current) = now.current else { return };
    let wanted = current.saturating_add(more);
    let maximum = now.maximum.map(|maximum| maximum.max(wanted));
    if setrlimit(
        Resource::Memlock,
        Rlimit {
            current: Some(wanted),
            maximum,
        },
    )
    .is_err()
    {
        let _ = setrlimit(
            Resource::Memlock,
            Rlimit {
                current: now.maximum,
                maximum: now.maximum,
            },
        );
    }
}

/// Finds which registered piece an address lies in, if any.
pub(super) fn fixed_buffer(is_registered: bool, pool: &Pool) -> impl Fn(*const u8) -> Option<u16> + use<> {
    let (start, bytes) = pool.region();
    let start = start.as_ptr() as usize;
    move |address| {
        let offset = (address as usize).checked_sub(start)?;
        (is_registered && offset < bytes).then_some((offset / REGISTERED_PIECE_BYTES) as u16)
    }
}
