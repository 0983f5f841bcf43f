//! The two index rings of a split virtqueue (virtio 1.2, 2.7) in guest memory.
//!
//! The guest's side runs at the same time on other CPUs: indices are loaded and stored atomically, and the two places
//! where each side writes one word and reads another (notification suppression) have a full fence between.

use std::sync::atomic::{Ordering, fence};

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError};

use crate::chain::Memory;

const AVAIL_FLAG_NO_INTERRUPT: u16 = 1;
const USED_FLAG_NO_NOTIFY: u16 = 1;

/// Where a queue's parts are, in guest addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    /// Descriptors; a power of two.
    pub(crate) size: u16,
    pub(crate) table: GuestAddress,
    pub(crate) avail: GuestAddress,
    pub(crate) used: GuestAddress,
    /// EVENT_IDX was agreed on.
    pub(crate) has_event_idx: bool,
}

impl Layout {
    /// Whether all parts are guest memory, with every index where an atomic access can reach it.
    pub(crate) fn is_inside(&self, memory: &Memory) -> bool {
        let size = usize::from(self.size);
        let fits = |at: GuestAddress, bytes: usize| {
            at.0.checked_add(bytes as u64).is_some() && memory.check_range(at, bytes)
        };
        size.is_power_of_two()
            && fits(self.table, 16 * size)
            && fits(self.avail, 6 + 2 * size)
            && fits(self.used, 6 + 8 * size)
            && [
                self.avail,
                self.avail_index_at(),
                self.used_event_at(),
                self.used,
                self.used_index_at(),
                self.avail_event_at(),
            ]
            .iter()
            .all(|at| memory.load::<u16>(*at, Ordering::Relaxed).is_ok())
    }

    fn avail_index_at(&self) -> GuestAddress {
        GuestAddress(self.avail.0 + 2)
    }

    fn used_event_at(&self) -> GuestAddress {
        GuestAddress(self.avail.0 + 4 + 2 * u64::from(self.size))
    }

    fn used_index_at(&self) -> GuestAddress {
        GuestAddress(self.used.0 + 2)
    }

    fn avail_event_at(&self) -> GuestAddress {
        GuestAddress(self.used.0 + 4 + 8 * u64::from(self.size))
    }

    /// How far the guest has filled the ring.
    pub(crate) fn avail_index(&self, memory: &Memory) -> Result<u16, GuestMemoryError> {
        memory
            .load(self.avail_index_at(), Ordering::Acquire)
            .map(u16::from_le)
    }

    /// The head that the guest put at `position`.
    pub(crate) fn head(&self, memory: &Memory, position: u16) -> Result<u16, GuestMemoryError> {
        let slot = u64::from(position & (self.size - 1));
        memory
            .read_obj(GuestAddress(self.avail.0 + 4 + 2 * slot))
            .map(u16::from_le)
    }

    /// How far we (or who served the ring before us) have published.
    pub(crate) fn used_index(&self, memory: &Memory) -> Result<u16, GuestMemoryError> {
        memory
            .load(self.used_index_at(), Ordering::Relaxed)
            .map(u16::from_le)
    }

    /// Writes the used element at `position`; the guest sees it with [`Layout::publish`].
    pub(crate) fn put_used(
        &self,
        memory: &Memory,
        position: u16,
        head: u16,
        bytes: u32,
    ) -> Result<(), GuestMemoryError> {
        let slot = u64::from(position & (self.size - 1));
        let element = u64::from(head) | u64::from(bytes) << 32;
        memory.write_slice(&element.to_le_bytes(), GuestAddress(self.used.0 + 4 + 8 * slot))
    }

    /// Shows the guest everything up to `index`, and tells whether it wants an interrupt for what lies after `old`.
    pub(crate) fn publish(&self, memory: &Memory, old: u16, index: u16) -> Result<bool, GuestMemoryError> {
        memory.store(index.to_le(), self.used_index_at(), Ordering::Release)?;
        fence(Ordering::SeqCst);
        if self.has_event_idx {
            let event = u16::from_le(memory.load(self.used_event_at(), Ordering::Relaxed)?);
            // 2.7.7.2: whether `event` is one of old..index.
            Ok(index.wrapping_sub(event).wrapping_sub(1) < index.wrapping_sub(old))
        } else {
            let flags = u16::from_le(memory.load(self.avail, Ordering::Relaxed)?);
            Ok(flags & AVAIL_FLAG_NO_INTERRUPT == 0)
        }
    }

    /// Asks the guest for a kick once it fills position `next`, and looks again whether it has meanwhile.
    pub(crate) fn enable_kicks(&self, memory: &Memory, next: u16) -> Result<bool, GuestMemoryError> {
        if self.has_event_idx {
            memory.store(next.to_le(), self.avail_event_at(), Ordering::Relaxed)?;
        } else {
            memory.store(0u16, self.used, Ordering::Relaxed)?;
        }
        fence(Ordering::SeqCst);
        Ok(self.avail_index(memory)? != next)
    }

    /// Tells the guest not to kick, having taken all before position `next`. With EVENT_IDX it kicks once and is silent
    /// until asked again; to take that one back, ask for a kick at a position that it has passed (2.7.7.2).
    pub(crate) fn disable_kicks(&self, memory: &Memory, next: u16) -> Result<(), GuestMemoryError> {
        if self.has_event_idx {
            let passed = next.wrapping_sub(1);
            return memory.store(passed.to_le(), self.avail_event_at(), Ordering::Relaxed);
        }
        memory.store(USED_FLAG_NO_NOTIFY.to_le(), self.used, Ordering::Relaxed)
    }
}
