//! An allocator that counts: the system's, with a figure for every call that asks for memory, each thread for itself.
//!
//! The data plane is to allocate nothing per request. That is held by counting, in the tests and in the daemon itself
//! (`weft_plane_allocations_total`): it costs a few instructions where an allocation costs a hundred.
//!
//! UNSAFETY: `GlobalAlloc` is an unsafe trait; every method hands its arguments to the system's allocator as they came.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::ops::Sub;

thread_local! {
    static COUNT: Cell<Allocations> = const { Cell::new(Allocations { calls: 0, bytes: 0 }) };
}

/// What was asked of the allocator; freeing is not counted, it comes of asking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allocations {
    /// Calls that asked for memory or for more of it.
    pub calls: u64,
    /// Bytes asked for.
    pub bytes: u64,
}

impl Allocations {
    /// Of the calling thread since it started; zeros where [`Counting`] is not the program's allocator.
    #[must_use]
    pub fn of_this_thread() -> Allocations {
        COUNT.with(Cell::get)
    }
}

impl Sub for Allocations {
    type Output = Allocations;

    fn sub(self, earlier: Allocations) -> Allocations {
        Allocations {
            calls: self.calls - earlier.calls,
            bytes: self.bytes - earlier.bytes,
        }
    }
}

/// To be the program's `#[global_allocator]`.
#[derive(Debug)]
pub struct Counting;

fn count(bytes: usize) {
    // A thread that is ending may allocate when its variables are gone; nobody asks it any more.
    let _ = COUNT.try_with(|count| {
        let Allocations { calls, bytes: before } = count.get();
        count.set(Allocations {
            calls: calls + 1,
            bytes: before + bytes as u64,
        });
    });
}

// SAFETY: each method is the system allocator's own; counting touches no memory of the caller's.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: the caller's promise about `layout`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: the caller's promise about `layout`.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size);
        // SAFETY: the caller's promises about `pointer`, `layout` and `size`.
        unsafe { System.realloc(pointer, layout, size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises about `pointer` and `layout`.
        unsafe { System.dealloc(pointer, layout) }
    }
}
