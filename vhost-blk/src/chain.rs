//! Descriptor chains: the walk from a head to two lists of guest memory segments, and copies from and to those.
//!
//! Everything in a chain is the guest's word, and the guest may change it while we read. So each descriptor is
//! copied once and judged by the copy; a segment enters a list only when all of it is guest memory.

use types::Payload;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use crate::api::QUEUE_SIZE_MAX;

/// Guest memory as we map it. No dirty bitmap: log-based live migration is not offered.
pub(crate) type Memory = GuestMemoryMmap<()>;

const FLAG_NEXT: u16 = 1;
const FLAG_WRITE: u16 = 2;
const FLAG_INDIRECT: u16 = 4;
const DESCRIPTOR_BYTES: usize = 16;

/// The most descriptors a chain may have, those of an indirect table included.
const CHAIN_DESCRIPTORS_MAX: usize = QUEUE_SIZE_MAX as usize;

/// Room for segments that an idle entry keeps.
const SEGMENTS_KEPT: usize = 64;

/// Bytes of guest memory in a row, all of them mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) address: GuestAddress,
    pub(crate) length: u32,
}

/// What one side of a chain adds up to.
#[derive(Debug, Default)]
pub(crate) struct Segments {
    list: Vec<Segment>,
    bytes: u64,
}

/// A chain as found in the ring. Reused from request to request: the lists keep their memory, up to a bound.
#[derive(Debug, Default)]
pub(crate) struct Chain {
    /// What the guest gives us.
    pub(crate) readable: Segments,
    /// What the guest wants filled.
    pub(crate) writable: Segments,
}

/// Why a chain is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Malformed {
    #[error("descriptor {index} of a table of {size}")]
    Index { index: u16, size: u16 },
    #[error("a chain of more than {0} descriptors, or a loop")]
    TooLong(usize),
    #[error("an indirect table of {0} bytes")]
    IndirectLength(u32),
    #[error("an indirect descriptor within an indirect table, or with a next one")]
    IndirectPlace,
    #[error("{length} bytes at {address:#x} are not guest memory")]
    OutsideMemory { address: u64, length: u32 },
    #[error("a readable descriptor after a writable one")]
    Order,
}

#[derive(Clone, Copy)]
struct Descriptor {
    address: u64,
    length: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    fn from_bytes(raw: [u8; DESCRIPTOR_BYTES]) -> Descriptor {
        let raw = u128::from_le_bytes(raw);
        Descriptor {
            address: raw as u64,
            length: (raw >> 64) as u32,
            flags: (raw >> 96) as u16,
            next: (raw >> 112) as u16,
        }
    }

    fn has(self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    fn outside(self) -> Malformed {
        Malformed::OutsideMemory {
            address: self.address,
            length: self.length,
        }
    }
}

impl Chain {
    /// Fills the lists with the chain that starts at `head` of the descriptor table at `table`. `scratch` holds a copy
    /// of an indirect table meanwhile.
    pub(crate) fn walk(
        &mut self,
        memory: &Memory,
        table: GuestAddress,
        queue_size: u16,
        head: u16,
        scratch: &mut Vec<u8>,
    ) -> Result<(), Malformed> {
        self.readable.clear();
        self.writable.clear();
        let mut index = head;
        for _ in 0..queue_size {
            let descriptor = read_descriptor(memory, table, queue_size, index)?;
            if descriptor.has(FLAG_INDIRECT) {
                if descriptor.has(FLAG_NEXT) {
                    return Err(Malformed::IndirectPlace);
                }
                return self.walk_indirect(memory, descriptor, scratch);
            }
            self.add(memory, descriptor)?;
            if !descriptor.has(FLAG_NEXT) {
                return Ok(());
            }
            index = descriptor.next;
        }
        Err(Malformed::TooLong(usize::from(queue_size)))
    }

    fn walk_indirect(
        &mut self,
        memory: &Memory,
        outer: Descriptor,
        scratch: &mut Vec<u8>,
    ) -> Result<(), Malformed> {
        let bytes = outer.length as usize;
        let count = bytes / DESCRIPTOR_BYTES;
        if !bytes.is_multiple_of(DESCRIPTOR_BYTES) || count == 0 || count > CHAIN_DESCRIPTORS_MAX {
            return Err(Malformed::IndirectLength(outer.length));
        }
        scratch.resize(bytes, 0);
        memory
            .read_slice(scratch, GuestAddress(outer.address))
            .map_err(|_| outer.outside())?;
        self.walk_table(memory, scratch)
    }

    fn walk_table(&mut self, memory: &Memory, table: &[u8]) -> Result<(), Malformed> {
        let (descriptors, _) = table.as_chunks::<DESCRIPTOR_BYTES>();
        let mut index = 0u16;
        for _ in 0..descriptors.len() {
            let descriptor = match descriptors.get(usize::from(index)) {
                Some(raw) => Descriptor::from_bytes(*raw),
                None => {
                    return Err(Malformed::Index {
                        index,
                        size: descriptors.len() as u16,
                    });
                }
            };
            if descriptor.has(FLAG_INDIRECT) {
                return Err(Malformed::IndirectPlace);
            }
            self.add(memory, descriptor)?;
            if !descriptor.has(FLAG_NEXT) {
                return Ok(());
            }
            index = descriptor.next;
        }
        Err(Malformed::TooLong(descriptors.len()))
    }

    fn add(&mut self, memory: &Memory, descriptor: Descriptor) -> Result<(), Malformed> {
        let is_writable = descriptor.has(FLAG_WRITE);
        if !is_writable && !self.writable.list.is_empty() {
            return Err(Malformed::Order);
        }
        let address = GuestAddress(descriptor.address);
        if descriptor.length == 0 {
            return Ok(());
        }
        if descriptor
            .address
            .checked_add(u64::from(descriptor.length))
            .is_none()
            || !memory.check_range(address, descriptor.length as usize)
        {
            return Err(descriptor.outside());
        }
        let side = if is_writable {
            &mut self.writable
        } else {
            &mut self.readable
        };
        side.list.push(Segment {
            address,
            length: descriptor.length,
        });
        side.bytes += u64::from(descriptor.length);
        Ok(())
    }
}

fn read_descriptor(
    memory: &Memory,
    table: GuestAddress,
    queue_size: u16,
    index: u16,
) -> Result<Descriptor, Malformed> {
    if index >= queue_size {
        return Err(Malformed::Index {
            index,
            size: queue_size,
        });
    }
    let address = table.0 + u64::from(index) * DESCRIPTOR_BYTES as u64;
    let mut raw = [0; DESCRIPTOR_BYTES];
    memory
        .read_slice(&mut raw, GuestAddress(address))
        .map_err(|_| Malformed::OutsideMemory {
            address,
            length: DESCRIPTOR_BYTES as u32,
        })?;
    Ok(Descriptor::from_bytes(raw))
}

impl Segments {
    fn clear(&mut self) {
        self.list.clear();
        // A guest that sends the longest chains once in every entry does not keep that memory for ever.
        self.list.shrink_to(SEGMENTS_KEPT);
        self.bytes = 0;
    }

    /// All segments together.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The bytes from `start` on, copied to `target`. Asserts that there are as many.
    pub(crate) fn read(&self, memory: &Memory, start: u64, target: &mut [u8]) {
        let mut done = 0;
        self.for_each(start, target.len() as u64, |address, length| {
            memory
                .read_slice(&mut target[done..done + length], address)
                .expect("segments are mapped while the ring lives");
            done += length;
        });
    }

    /// `source`, copied to the bytes from `start` on. Asserts that there are as many.
    pub(crate) fn write(&self, memory: &Memory, start: u64, source: &[u8]) {
        let mut done = 0;
        self.for_each(start, source.len() as u64, |address, length| {
            memory
                .write_slice(&source[done..done + length], address)
                .expect("segments are mapped while the ring lives");
            done += length;
        });
    }

    /// The content of `payload`, as [`Segments::write`].
    pub(crate) fn write_payload(&self, memory: &Memory, start: u64, payload: &impl Payload) {
        self.write(memory, start, payload.bytes());
    }

    /// `length` zeros, as [`Segments::write`].
    pub(crate) fn write_zeros(&self, memory: &Memory, start: u64, length: u64) {
        static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
        let mut done = 0;
        while done < length {
            let piece = (length - done).min(ZEROS.len() as u64);
            self.write(memory, start + done, &ZEROS[..piece as usize]);
            done += piece;
        }
    }

    fn for_each(&self, start: u64, length: u64, mut visit: impl FnMut(GuestAddress, usize)) {
        assert!(
            start.checked_add(length).is_some_and(|end| end <= self.bytes),
            "{length} bytes at {start} of a chain of {} bytes",
            self.bytes
        );
        let mut skip = start;
        let mut left = length;
        for segment in &self.list {
            if left == 0 {
                break;
            }
            let available = u64::from(segment.length);
            if skip >= available {
                skip -= available;
                continue;
            }
            let piece = left.min(available - skip);
            visit(GuestAddress(segment.address.0 + skip), piece as usize);
            left -= piece;
            skip = 0;
        }
    }
}
