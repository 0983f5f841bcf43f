//! Guest memory that is taken away under us does not take the daemon with it.
//!
//! Guest memory is a file that the frontend made and can make shorter. Touching a page behind its new end raises
//! SIGBUS, whose default ends the process: one broken VMM would stop the disks of all. So the mappings are listed
//! here, and the handler lays zero pages over one that has lost its file; the ring over it then shows itself broken.
//! Any other SIGBUS goes to whoever handled it before.
//!
//! Asking for sealed files instead was considered: QEMU's file-backed and Cloud Hypervisor's memory is not sealed.
//!
//! UNSAFETY: a signal handler and a mapping at a fixed place cannot be had otherwise.
#![allow(unsafe_code)]

use std::io;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock};

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::chain::Memory;
use crate::ring::lock;

/// Mappings at a time, of all devices. QEMU guests have under ten.
const RANGES_MAX: usize = 4096;

/// A listed mapping. `end` is written last and cleared first: the handler believes a range only while it is not zero.
struct Range {
    start: AtomicUsize,
    end: AtomicUsize,
    was_lost: AtomicBool,
}

static RANGES: [Range; RANGES_MAX] = [const {
    Range {
        start: AtomicUsize::new(0),
        end: AtomicUsize::new(0),
        was_lost: AtomicBool::new(false),
    }
}; RANGES_MAX];

/// Who may change [`RANGES`].
static WRITER: Mutex<()> = Mutex::new(());

/// What SIGBUS did before us.
static PREVIOUS: OnceLock<libc::sigaction> = OnceLock::new();

/// Keeps the mappings of one memory listed. Whoever touches that memory holds it, and drops it before the memory.
#[derive(Debug)]
pub(crate) struct BusGuard {
    slots: Vec<usize>,
}

impl BusGuard {
    /// Lists all mappings of `memory`; the first call installs the handler.
    ///
    /// # Errors
    /// There are more mappings than can be listed, or the handler cannot be installed.
    pub(crate) fn new(memory: &Memory) -> io::Result<BusGuard> {
        let _writer = lock(&WRITER);
        install()?;
        let mut guard = BusGuard { slots: Vec::new() };
        let mut free = (0..RANGES_MAX).filter(|slot| RANGES[*slot].end.load(Ordering::Relaxed) == 0);
        for region in memory.iter() {
            let slot = free.next().ok_or_else(|| {
                io::Error::other(format!("more than {RANGES_MAX} memory regions of guests"))
            })?;
            let start = region.as_ptr() as usize;
            let range = &RANGES[slot];
            range.was_lost.store(false, Ordering::Relaxed);
            range.start.store(start, Ordering::Relaxed);
            range.end.store(start + region.len() as usize, Ordering::Release);
            guard.slots.push(slot);
        }
        Ok(guard)
    }
}

impl Drop for BusGuard {
    fn drop(&mut self) {
        for slot in &self.slots {
            let range = &RANGES[*slot];
            range.end.store(0, Ordering::Release);
            if range.was_lost.load(Ordering::Relaxed) {
                tracing::warn!("a frontend made its guest's memory shorter while we used it");
            }
        }
    }
}

fn install() -> io::Result<()> {
    if PREVIOUS.get().is_some() {
        return Ok(());
    }
    let mut previous = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: all zeros is a valid sigaction: no flags, an empty mask.
    let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    action.sa_sigaction = on_bus as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // Known before the handler can run.
    // SAFETY: both pointers are to sigactions of ours; a null new action only asks.
    let asked = unsafe { libc::sigaction(libc::SIGBUS, std::ptr::null(), previous.as_mut_ptr()) };
    if asked != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: filled by the call above, and valid as zeros before.
    let previous = unsafe { previous.assume_init() };
    PREVIOUS.get_or_init(|| previous);
    // SAFETY: `on_bus` has the signature that SA_SIGINFO demands, and does only what a handler may.
    if unsafe { libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Loads, one system call, nothing else: what is allowed in a handler.
extern "C" fn on_bus(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel hands a valid siginfo to a handler with SA_SIGINFO; SIGBUS fills its address.
    let address = unsafe { (*info).si_addr() } as usize;
    for range in &RANGES {
        let end = range.end.load(Ordering::Acquire);
        let start = range.start.load(Ordering::Relaxed);
        if end != 0 && (start..end).contains(&address) {
            range.was_lost.store(true, Ordering::Relaxed);
            if lay_zeros(start, end) {
                return;
            }
        }
    }
    pass_on(signal, info, context);
}

/// The whole mapping, not the page: parts of a mapping of huge pages cannot be replaced.
fn lay_zeros(start: usize, end: usize) -> bool {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: the range is a mapping of guest memory that its holder (who just touched it) keeps mapped; guest memory
    // is only ever accessed as bytes that may change at any time, so other content is nothing new to anybody.
    let mapped = unsafe { libc::mmap(start as *mut libc::c_void, end - start, protection, flags, -1, 0) };
    mapped != libc::MAP_FAILED
}

fn pass_on(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    match PREVIOUS.get() {
        Some(previous)
            if previous.sa_flags & libc::SA_SIGINFO != 0
                && previous.sa_sigaction != libc::SIG_DFL
                && previous.sa_sigaction != libc::SIG_IGN =>
        {
            // SAFETY: whoever installed it with SA_SIGINFO gave a function of this signature.
            let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
                unsafe { std::mem::transmute(previous.sa_sigaction) };
            handler(signal, info, context);
        }
        _ => {
            // The access is repeated on return, and then has its default effect.
            // SAFETY: async-signal-safe, and a valid disposition.
            unsafe { libc::signal(signal, libc::SIG_DFL) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    use rustix::fs::MemfdFlags;
    use vm_memory::{Bytes, FileOffset, GuestAddress, GuestRegionMmap, MmapRegion};

    #[test]
    fn memory_that_lost_its_file_reads_as_zeros() {
        const BYTES: usize = 1 << 16;
        let file = File::from(rustix::fs::memfd_create("shrinks", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(BYTES as u64).unwrap();
        let region = MmapRegion::from_file(FileOffset::new(file.try_clone().unwrap(), 0), BYTES).unwrap();
        let region = GuestRegionMmap::new(region, GuestAddress(0)).unwrap();
        let memory = Memory::from_regions(vec![region]).unwrap();
        let guard = BusGuard::new(&memory).unwrap();
        let at = GuestAddress(BYTES as u64 - 8);
        memory.write_obj(77u64, at).unwrap();
        file.set_len(0).unwrap();
        assert_eq!(memory.read_obj::<u64>(at).unwrap(), 0);
        memory.write_obj(78u64, at).unwrap();
        assert!(RANGES[guard.slots[0]].was_lost.load(Ordering::Relaxed));
    }
}
