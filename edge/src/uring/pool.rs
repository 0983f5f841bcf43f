//! The daemon's buffers: a pinned region cut into slots of three sizes, and the views of it that travel.
//!
//! ```text
//! Pool::take ──► BufMut (one owner, writable) ──freeze──► Buf (shared, read-only) ──last drop──► free list
//! ```
//!
//! Taking, cloning, cutting and returning a pooled buffer allocates nothing and takes no lock: the reference
//! count and the link of the free list live beside the slot. An exhausted pool falls back to the heap and
//! counts it, so that running out costs speed and shows in the figures, and never fails a request.
//!
//! UNSAFETY: the bytes must keep their address while the kernel transfers them and be reachable from several
//! views at once, which neither `Vec` nor `Arc<[u8]>` gives without an allocation per buffer. The unsafe part
//! is kept to the mapping, the two byte accessors and the send markers.
#![allow(unsafe_code)]

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
use std::sync::{Arc, OnceLock};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};
use types::{Payload, Room};

/// Sizes of a pool's slots in bytes, ascending: a block, a usual large guest request, a leaf.
pub const SLOT_BYTES: [usize; 3] = [4 << 10, 64 << 10, 1 << 20];

/// Alignment of every fresh buffer: what direct I/O asks of any device we know.
pub const BUFFER_ALIGN: usize = 4096;

/// The region is a multiple of a huge page, and starts at one.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// End of a free list.
const NOTHING: u32 = u32::MAX;

/// How many slots of each size ([`SLOT_BYTES`]) a pool has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolConfig {
    /// Slots per size, in the order of [`SLOT_BYTES`].
    pub slots: [u32; 3],
}

impl PoolConfig {
    /// A mix for `bytes` of memory: a quarter in blocks, a quarter in middle slots, half in leaves.
    #[must_use]
    pub fn of_bytes(bytes: usize) -> PoolConfig {
        let slots = |share: usize, slot: usize| u32::try_from(share / slot).expect("a pool below 16 TiB");
        PoolConfig {
            slots: [
                slots(bytes / 4, SLOT_BYTES[0]),
                slots(bytes / 4, SLOT_BYTES[1]),
                slots(bytes / 2, SLOT_BYTES[2]),
            ],
        }
    }

    fn bytes(&self) -> usize {
        let used: usize = self
            .slots
            .iter()
            .zip(SLOT_BYTES)
            .map(|(n, bytes)| *n as usize * bytes)
            .sum();
        used.next_multiple_of(HUGE_PAGE_BYTES).max(HUGE_PAGE_BYTES)
    }
}

/// What became of the requests for buffers since the pool was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolCounters {
    /// Buffers the pool gave.
    pub pooled: u64,
    /// Buffers that came from the heap, because the fitting slots were all out or the request was larger than any.
    pub heap: u64,
}

/// A pool of buffers. Cheap to clone; the region lives until the last buffer and the last clone are gone.
#[derive(Clone)]
pub struct Pool {
    shared: Arc<Shared>,
}

struct Shared {
    region: Region,
    classes: [Class; 3],
    pooled: AtomicU64,
    heap: AtomicU64,
}

impl Pool {
    /// Maps, touches and cuts a region. Reading a fresh buffer shows whatever an earlier user left in it.
    ///
    /// # Errors
    /// The operating system has no such amount of memory.
    pub fn new(config: PoolConfig) -> std::io::Result<Pool> {
        let region = Region::map(config.bytes())?;
        // Largest slots first, so that every slot is aligned to its own size.
        let mut offset = 0;
        let mut classes = [0, 1, 2].map(|class| Class::new(0, SLOT_BYTES[class], 0));
        for class in (0..3).rev() {
            classes[class] = Class::new(offset, SLOT_BYTES[class], config.slots[class]);
            offset += SLOT_BYTES[class] * config.slots[class] as usize;
        }
        assert!(
            offset <= region.bytes,
            "slots of {offset} B in {} B",
            region.bytes
        );
        Ok(Pool {
            shared: Arc::new(Shared {
                region,
                classes,
                pooled: AtomicU64::new(0),
                heap: AtomicU64::new(0),
            }),
        })
    }

    /// A writable buffer of `length` bytes, aligned to [`BUFFER_ALIGN`], its content left over from earlier use.
    #[must_use]
    pub fn take(&self, length: usize) -> BufMut {
        if length == 0 {
            return BufMut::empty();
        }
        let fitting = SLOT_BYTES.iter().position(|bytes| *bytes >= length);
        // A request may borrow from the next size up, not from two: blocks must not eat the leaves' slots.
        for class in fitting.into_iter().flat_map(|first| first..(first + 2).min(3)) {
            if let Some(slot) = self.shared.classes[class].pop() {
                self.shared.pooled.fetch_add(1, Ordering::Relaxed);
                let offset = self.shared.classes[class].offset_of(slot);
                return BufMut {
                    start: self.shared.region.at(offset),
                    length,
                    origin: Origin::Slot(SlotRef::first(Arc::clone(&self.shared), class as u32, slot)),
                };
            }
        }
        self.shared.heap.fetch_add(1, Ordering::Relaxed);
        BufMut::on_heap(length)
    }

    /// A buffer with a copy of `bytes`.
    #[must_use]
    pub fn copy_of(&self, bytes: &[u8]) -> Buf {
        let mut buffer = self.take(bytes.len());
        buffer.copy_from_slice(bytes);
        buffer.freeze()
    }

    /// How requests were served so far.
    #[must_use]
    pub fn counters(&self) -> PoolCounters {
        PoolCounters {
            pooled: self.shared.pooled.load(Ordering::Relaxed),
            heap: self.shared.heap.load(Ordering::Relaxed),
        }
    }

    /// Free slots per size. Exact only while nobody takes or returns a buffer.
    #[must_use]
    pub fn free_slots(&self) -> [u32; 3] {
        [0, 1, 2].map(|class| self.shared.classes[class].free.load(Ordering::Relaxed))
    }

    /// Address and length of the region, for registering it with a ring.
    pub(super) fn region(&self) -> (NonNull<u8>, usize) {
        (self.shared.region.start, self.shared.region.bytes)
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Pool({} B, free {:?})",
            self.shared.region.bytes,
            self.free_slots()
        )
    }
}

/// Slots of one size and the stack of the free ones. Last in, first out: the warm slot is used again.
struct Class {
    offset: usize,
    slot_bytes: usize,
    /// Head of the stack: slot in the low half; the high half counts changes, so that a head that left and came
    /// back between our look and our swap is not taken for one that stayed (ABA).
    head: AtomicU64,
    free: AtomicU32,
    slots: Box<[Slot]>,
}

struct Slot {
    next: AtomicU32,
    references: AtomicU32,
}

impl Class {
    fn new(offset: usize, slot_bytes: usize, count: u32) -> Class {
        let slot = |i: u32| Slot {
            next: AtomicU32::new(if i + 1 < count { i + 1 } else { NOTHING }),
            references: AtomicU32::new(0),
        };
        Class {
            offset,
            slot_bytes,
            head: AtomicU64::new(u64::from(if count == 0 { NOTHING } else { 0 })),
            free: AtomicU32::new(count),
            slots: (0..count).map(slot).collect(),
        }
    }

    fn offset_of(&self, slot: u32) -> usize {
        self.offset + slot as usize * self.slot_bytes
    }

    fn pop(&self) -> Option<u32> {
        let mut head = self.head.load(Ordering::Acquire);
        loop {
            let slot = head as u32;
            if slot == NOTHING {
                return None;
            }
            let next = self.slots[slot as usize].next.load(Ordering::Relaxed);
            match self
                .head
                .compare_exchange_weak(head, step(head, next), Ordering::AcqRel, Ordering::Acquire)
            {
                Ok(_) => {
                    self.free.fetch_sub(1, Ordering::Relaxed);
                    return Some(slot);
                }
                Err(now) => head = now,
            }
        }
    }

    fn push(&self, slot: u32) {
        self.free.fetch_add(1, Ordering::Relaxed);
        let mut head = self.head.load(Ordering::Relaxed);
        loop {
            self.slots[slot as usize]
                .next
                .store(head as u32, Ordering::Relaxed);
            match self
                .head
                .compare_exchange_weak(head, step(head, slot), Ordering::AcqRel, Ordering::Relaxed)
            {
                Ok(_) => return,
                Err(now) => head = now,
            }
        }
    }
}

/// The head that follows `head` and names `slot`.
fn step(head: u64, slot: u32) -> u64 {
    ((head >> 32).wrapping_add(1) << 32) | u64::from(slot)
}

/// One counted reference to a slot in use.
struct SlotRef {
    shared: Arc<Shared>,
    class: u32,
    slot: u32,
}

impl SlotRef {
    fn first(shared: Arc<Shared>, class: u32, slot: u32) -> SlotRef {
        let reference = SlotRef { shared, class, slot };
        let before = reference.count().swap(1, Ordering::Relaxed);
        assert_eq!(before, 0, "slot {slot} of class {class} was free and in use");
        reference
    }

    fn count(&self) -> &AtomicU32 {
        &self.shared.classes[self.class as usize].slots[self.slot as usize].references
    }
}

impl Clone for SlotRef {
    fn clone(&self) -> SlotRef {
        let before = self.count().fetch_add(1, Ordering::Relaxed);
        assert!(
            before > 0 && before < u32::MAX / 2,
            "{before} references to one buffer"
        );
        SlotRef {
            shared: Arc::clone(&self.shared),
            class: self.class,
            slot: self.slot,
        }
    }
}

impl Drop for SlotRef {
    fn drop(&mut self) {
        // Release: our reads of the slot come before it is given away; acquire: so do those of the others.
        if self.count().fetch_sub(1, Ordering::Release) == 1 {
            fence(Ordering::Acquire);
            self.shared.classes[self.class as usize].push(self.slot);
        }
    }
}

/// Who keeps a view's bytes alive.
#[derive(Clone)]
enum Origin {
    Slot(SlotRef),
    Heap(#[expect(dead_code, reason = "held, not read: the views carry addresses")] Arc<HeapBytes>),
    Nothing,
}

/// A writable buffer with one owner; its front can be split off as a finished view ([`Room`]).
pub struct BufMut {
    start: NonNull<u8>,
    length: usize,
    origin: Origin,
}

impl BufMut {
    fn empty() -> BufMut {
        BufMut {
            start: NonNull::dangling(),
            length: 0,
            origin: Origin::Nothing,
        }
    }

    /// Zeroed memory outside any pool.
    fn on_heap(length: usize) -> BufMut {
        if length == 0 {
            return BufMut::empty();
        }
        let bytes = HeapBytes::zeroed(length);
        BufMut {
            start: bytes.start,
            length,
            origin: Origin::Heap(Arc::new(bytes)),
        }
    }

    /// Ends writing; from here on the bytes never change while a view of them lives.
    #[must_use]
    pub fn freeze(self) -> Buf {
        Buf {
            start: self.start,
            length: self.length,
            origin: self.origin,
        }
    }
}

impl Room for BufMut {
    type Payload = Buf;

    fn content(&self) -> &[u8] {
        self
    }

    fn content_mut(&mut self) -> &mut [u8] {
        self
    }

    fn split_front(&mut self, length: usize) -> Buf {
        assert!(length <= self.length, "splitting {length} of {} B", self.length);
        if length == 0 {
            return BufMut::empty().freeze();
        }
        let front = Buf {
            start: self.start,
            length,
            origin: self.origin.clone(),
        };
        // SAFETY: `length` is at most ours, so the address stays inside the same allocation or at its end. From here
        // on the bytes before it belong to `front`, which nobody writes, and we reach only what is behind it.
        self.start = unsafe { self.start.add(length) };
        self.length -= length;
        front
    }
}

impl Deref for BufMut {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `start..start + length` lies in the slot or allocation that `origin` keeps, which was
        // zeroed when mapped, so it is initialised; a `BufMut` is the only owner of these bytes (views that were
        // split off hold the bytes before them), and `&self` bars writers.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.length) }
    }
}

impl AsMut<[u8]> for BufMut {
    fn as_mut(&mut self) -> &mut [u8] {
        self
    }
}

impl AsRef<[u8]> for Buf {
    fn as_ref(&self) -> &[u8] {
        self.bytes()
    }
}

impl DerefMut for BufMut {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`; a `BufMut` is not cloned, what was split off it is not in its range, and `&mut self` makes us the only user.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.length) }
    }
}

impl fmt::Debug for BufMut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BufMut({} B)", self.length)
    }
}

/// A shared view of bytes that do not change: the daemon's [`Payload`].
#[derive(Clone)]
pub struct Buf {
    start: NonNull<u8>,
    length: usize,
    origin: Origin,
}

// SAFETY: the bytes belong to memory that `origin` keeps and that nobody writes while a view lives; the counts
// and the free list are atomic.
unsafe impl Send for Buf {}
// SAFETY: as above: `&Buf` allows reading and counting only.
unsafe impl Sync for Buf {}
// SAFETY: a `BufMut` is the only owner of its bytes; moving it moves that ownership.
unsafe impl Send for BufMut {}
// SAFETY: `&BufMut` allows reading only.
unsafe impl Sync for BufMut {}

impl Payload for Buf {
    fn bytes(&self) -> &[u8] {
        // SAFETY: `start..start + length` lies in memory that `origin` keeps, initialised when it was mapped;
        // no `BufMut` reaches these bytes any more, so nobody writes.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.length) }
    }

    fn slice(&self, start: usize, length: usize) -> Buf {
        let end = start.checked_add(length).expect("a slice within memory");
        assert!(end <= self.length, "slice {start}+{length} of {} B", self.length);
        if length == 0 {
            return BufMut::empty().freeze();
        }
        Buf {
            // SAFETY: `start` is below our length, so the address stays inside the same allocation.
            start: unsafe { self.start.add(start) },
            length,
            origin: self.origin.clone(),
        }
    }

    fn overlay(&self, start: usize, patch: &Buf) -> Buf {
        let mut copy = match &self.origin {
            Origin::Slot(slot) => Pool {
                shared: Arc::clone(&slot.shared),
            }
            .take(self.length),
            Origin::Heap(_) | Origin::Nothing => BufMut::on_heap(self.length),
        };
        copy.copy_from_slice(self.bytes());
        copy[start..start + patch.length].copy_from_slice(patch.bytes());
        copy.freeze()
    }

    /// Up to a leaf this is a view of one shared block of zeros: no memory and no time.
    fn zeroed(length: usize) -> Buf {
        static ZEROS: OnceLock<Buf> = OnceLock::new();
        const SHARED_BYTES: usize = SLOT_BYTES[2];
        if length > SHARED_BYTES {
            return BufMut::on_heap(length).freeze();
        }
        ZEROS
            .get_or_init(|| BufMut::on_heap(SHARED_BYTES).freeze())
            .slice(0, length)
    }
}

impl fmt::Debug for Buf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Buf({} B, crc {:08x})",
            self.length,
            types::crc32c(self.bytes())
        )
    }
}

/// A zeroed, aligned allocation outside the pool.
struct HeapBytes {
    start: NonNull<u8>,
    layout: Layout,
}

impl HeapBytes {
    fn zeroed(length: usize) -> HeapBytes {
        assert!(length > 0, "an allocation of nothing");
        let layout = Layout::from_size_align(length, BUFFER_ALIGN).expect("a buffer within memory");
        // SAFETY: the layout is not of size zero.
        let start = unsafe { alloc_zeroed(layout) };
        let Some(start) = NonNull::new(start) else {
            handle_alloc_error(layout)
        };
        HeapBytes { start, layout }
    }
}

impl Drop for HeapBytes {
    fn drop(&mut self) {
        // SAFETY: allocated in `zeroed` with this layout and freed here only; views keep us alive by `Arc`.
        unsafe { dealloc(self.start.as_ptr(), self.layout) }
    }
}

// SAFETY: plain memory; who may touch it is decided by `Buf` and `BufMut`.
unsafe impl Send for HeapBytes {}
// SAFETY: as above; `&HeapBytes` gives no access to the bytes.
unsafe impl Sync for HeapBytes {}

/// An anonymous mapping that starts at a huge page.
struct Region {
    map: NonNull<u8>,
    map_bytes: usize,
    start: NonNull<u8>,
    bytes: usize,
}

impl Region {
    fn map(bytes: usize) -> std::io::Result<Region> {
        let map_bytes = bytes + HUGE_PAGE_BYTES;
        // SAFETY: a new private mapping at an address of the kernel's choice disturbs nothing.
        let map = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                map_bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )
        }?;
        let map = NonNull::new(map.cast::<u8>()).expect("a mapping has an address");
        let lead = map.as_ptr().align_offset(HUGE_PAGE_BYTES);
        assert!(lead < HUGE_PAGE_BYTES, "an address has a next huge page");
        // SAFETY: the mapping is one huge page longer than the region, so `lead + bytes` stays inside.
        let start = unsafe { map.add(lead) };
        let region = Region {
            map,
            map_bytes,
            start,
            bytes,
        };
        // SAFETY: the range is ours and holds nothing yet. Both calls only make it faster: a kernel without
        // huge pages, or without populating, gives the pages on first touch.
        unsafe {
            let _ = madvise(start.as_ptr().cast(), bytes, Advice::LinuxHugepage);
            let _ = madvise(start.as_ptr().cast(), bytes, Advice::LinuxPopulateWrite);
        }
        Ok(region)
    }

    fn at(&self, offset: usize) -> NonNull<u8> {
        assert!(
            offset < self.bytes,
            "offset {offset} in a region of {} B",
            self.bytes
        );
        // SAFETY: inside the mapping, as just checked.
        unsafe { self.start.add(offset) }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: our own mapping; every buffer in it keeps the pool, and so us, alive, and a ring that has it
        // registered holds the pages themselves.
        let unmapped = unsafe { munmap(self.map.as_ptr().cast(), self.map_bytes) };
        assert!(unmapped.is_ok(), "unmapping our own region: {unmapped:?}");
    }
}

// SAFETY: plain memory; who may touch it is decided by `Buf` and `BufMut`.
unsafe impl Send for Region {}
// SAFETY: as above; `&Region` gives addresses, not access.
unsafe impl Sync for Region {}

#[cfg(test)]
mod tests;
