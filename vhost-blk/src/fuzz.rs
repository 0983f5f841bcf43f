//! A ring over arbitrary bytes: the entrance for `cargo fuzz` and for this crate's own random tests.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use rustix::event::EventfdFlags;
use types::HeapBlock;
use vdi::{Op, Outcome, ReadPart, VdiError};
use vm_memory::{Bytes, GuestAddress};

use crate::api::{BufferSource, DeviceConfig, DeviceId, Polled, RingId, RingRequest};
use crate::bus_guard::BusGuard;
use crate::chain::Memory;
use crate::device::Device;
use crate::ring::{Gate, Ring, RingParts};
use crate::split::Layout;

pub(crate) const QUEUE_SIZE: u16 = 16;
pub(crate) const TABLE: u64 = 0;
pub(crate) const AVAIL: u64 = 0x200;
pub(crate) const USED: u64 = 0x300;

/// Two regions, with nothing between them.
pub(crate) const REGIONS: [(u64, usize); 2] = [(0, 0x8000), (0x10000, 0x8000)];

/// Buffers on the heap, as long as `left` lasts.
pub(crate) struct Heap {
    pub(crate) left: u32,
}

impl BufferSource for Heap {
    type Buffer = HeapBlock;

    fn filled(&mut self, length: usize, fill: impl FnOnce(&mut [u8])) -> Option<HeapBlock> {
        self.left = self.left.checked_sub(1)?;
        let mut bytes = vec![0; length];
        fill(&mut bytes);
        Some(HeapBlock::new(&bytes))
    }
}

/// Guest memory of [`REGIONS`], all zeros.
pub(crate) fn memory() -> Arc<Memory> {
    let ranges = REGIONS.map(|(start, bytes)| (GuestAddress(start), bytes));
    Arc::new(Memory::from_ranges(&ranges).expect("anonymous memory"))
}

/// For kicks and calls.
pub(crate) fn eventfd() -> File {
    let flags = EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC;
    File::from(rustix::event::eventfd(0, flags).expect("an eventfd"))
}

/// A ring over `memory` that begins at `next_avail`.
pub(crate) fn ring_over(
    memory: &Arc<Memory>,
    config: DeviceConfig,
    has_event_idx: bool,
    next_avail: u16,
) -> (Ring, Arc<Gate>) {
    let gate = Arc::new(Gate::new(Some(eventfd())));
    let ring = Ring::new(RingParts {
        id: RingId {
            device: DeviceId(0),
            queue: 0,
            generation: 0,
        },
        device: Arc::new(Device::new(DeviceId(0), config)),
        is_write_through: Arc::new(AtomicBool::new(false)),
        bus_guard: Arc::new(BusGuard::new(memory).expect("room for two regions")),
        memory: Arc::clone(memory),
        layout: Layout {
            size: QUEUE_SIZE,
            table: GuestAddress(TABLE),
            avail: GuestAddress(AVAIL),
            used: GuestAddress(USED),
            has_event_idx,
        },
        next_avail,
        kick: eventfd(),
        gate: Arc::clone(&gate),
    });
    (ring.expect("the ring is inside memory"), gate)
}

/// What a disk of zeros answers.
pub(crate) fn answer(op: &Op<HeapBlock>) -> Outcome<HeapBlock> {
    match op {
        Op::Read { length, .. } => {
            let first = ReadPart::Data(HeapBlock::new(&vec![0xdd; 512]));
            Outcome::Read([first, ReadPart::Zeros(length - 512)].into_iter().collect())
        }
        _ => Outcome::Done,
    }
}

/// Makes guest memory of `input`, rings and descriptors included, and serves it for some turns; the guest changes
/// its memory in between. Whatever the bytes are: no panic, no more answers than questions, and the place to resume
/// at follows from what was published.
pub fn ring(input: &[u8]) {
    let Some((control, content)) = input.split_at_checked(8) else {
        return;
    };
    let config = DeviceConfig {
        is_read_only: control[0] & 2 != 0,
        ..DeviceConfig::new(1 << 20, if control[0] & 4 != 0 { 4096 } else { 512 })
    };
    let memory = memory();
    let next_avail = u16::from_le_bytes([control[1], control[2]]);
    pour(&memory, content);
    let waiting = u16::from(control[3] % 24);
    let index = next_avail.wrapping_add(waiting);
    memory
        .write_obj(index.to_le(), GuestAddress(AVAIL + 2))
        .expect("inside memory");
    let (mut ring, gate) = ring_over(&memory, config, control[0] & 1 != 0, next_avail);
    let mut buffers = Heap {
        left: u32::from(control[4]),
    };
    let mut open: Vec<RingRequest<HeapBlock>> = Vec::new();
    let mut published = 0;
    for turn in 0..4 {
        ring.disable_kicks();
        let polled = ring.poll(&mut buffers, &mut open, usize::from(control[5] % 8));
        // The guest changes everything that has been looked at.
        pour(&memory, &content[content.len().min(turn * 7 + 1)..]);
        let is_backwards = control[6] & 1 << turn != 0;
        while open.len() > usize::from(control[7] % 4) {
            let request = open.remove(if is_backwards { open.len() - 1 } else { 0 });
            let result = if control[6] & 16 << turn != 0 {
                Err(VdiError::Closed)
            } else {
                Ok(answer(&request.op))
            };
            ring.complete(request.tag, result);
        }
        published += ring.publish().expect("the eventfd is ours");
        assert!(ring.in_flight() <= ring.size());
        let has_more = ring.enable_kicks();
        if polled == Polled::More {
            assert!(has_more || ring.is_broken() || content.len() > AVAIL as usize);
        }
    }
    let taken = published + ring.in_flight();
    let in_flight = ring.in_flight() as u16;
    drop(ring);
    let resume_at = gate.wait();
    assert_eq!(
        resume_at,
        next_avail.wrapping_add(taken as u16).wrapping_sub(in_flight)
    );
}

/// Writes `content` over the start of guest memory, as much as there is room for.
fn pour(memory: &Memory, content: &[u8]) {
    let mut rest = content;
    for (start, bytes) in REGIONS {
        let piece = rest.len().min(bytes);
        memory
            .write_slice(&rest[..piece], GuestAddress(start))
            .expect("inside memory");
        rest = &rest[piece..];
    }
}
