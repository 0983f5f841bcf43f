//! Guests' queues on a plane: polled while they have work, armed with a kick before the thread sleeps.

use std::time::Duration;

use edge::Clock;
use edge::uring::{Buf, Pool};
use types::{Instant, Payload, VdiId};
use vdi::{Op, Outcome, VdiError};
use vhost_blk::{BufferSource, Polled, Ring, RingId, RingRequest, Tag};

use super::{Plane, Watch};

/// Requests taken from one queue in one turn, and in one look at it. What a look brings goes to the disks at once: a
/// device that gets 32 requests as one batch answers them as one batch, and then either it or we are idle
/// (docs/decisions/0009).
const BUDGET: usize = 128;
const LOOK: usize = 8;

/// With more requests of guests than this under way, a plane sleeps rather than looks for news: they come in batches.
const LOOKED_FOR: usize = 4;

/// Bytes of content that one queue may have under way before it is looked at no further. A request may be 32 MiB, so
/// a hostile guest could otherwise name the same page in a thousand requests and fill our memory with copies of it.
const BYTES_UNDER_WAY: u64 = 64 << 20;

/// How long a queue that must stop may take to finish what it has under way before it is dropped with it.
const DRAIN: Duration = Duration::from_secs(5);

/// A request of a guest: in which slot, in which life of it, and which.
#[derive(Clone, Copy)]
pub struct GuestTag {
    slot: usize,
    life: u64,
    tag: Tag,
    bytes: u64,
}

struct Guest {
    ring: Ring,
    vdi: VdiId,
    life: u64,
    /// Kicks are off and the queue is looked at every turn.
    is_polled: bool,
    /// The last look left something behind.
    has_more: bool,
    has_completed: bool,
    bytes_under_way: u64,
    stop_at: Option<Instant>,
}

/// All guests' queues of a plane.
#[derive(Default)]
pub struct Guests {
    slots: Vec<Option<Guest>>,
    lives: u64,
    scratch: Vec<RingRequest<Buf>>,
    released: Vec<usize>,
}

impl Guest {
    fn is_full(&self) -> bool {
        self.bytes_under_way >= BYTES_UNDER_WAY
    }

    fn wants_poll(&self) -> bool {
        self.is_polled && self.has_more && !self.is_full() && self.stop_at.is_none()
    }
}

/// Write data goes to the plane's pool.
struct FromPool<'a>(&'a Pool);

impl BufferSource for FromPool<'_> {
    type Buffer = Buf;

    fn filled(&mut self, length: usize, fill: impl FnOnce(&mut [u8])) -> Option<Buf> {
        let mut buffer = self.0.take(length);
        fill(&mut buffer);
        Some(buffer.freeze())
    }
}

impl Guests {
    pub fn count(&self) -> usize {
        self.slots.iter().flatten().count()
    }

    /// A kick fired: stop asking for kicks, look every turn from now on.
    pub fn kicked(&mut self, slot: usize) {
        if let Some(Some(guest)) = self.slots.get_mut(slot) {
            guest.ring.ack_kick();
            guest.ring.disable_kicks();
            guest.is_polled = true;
            guest.has_more = true;
        }
    }

    pub fn complete(&mut self, to: GuestTag, result: Result<Outcome<Buf>, VdiError>) {
        // The queue may have been dropped with the request under way: its frontend will ask again.
        let Some(Some(guest)) = self.slots.get_mut(to.slot) else {
            return;
        };
        if guest.life == to.life {
            guest.bytes_under_way -= to.bytes;
            guest.ring.complete(to.tag, result);
            guest.has_completed = true;
            // The guest will likely go on at once: look for that rather than be kicked for it.
            if !guest.is_polled {
                guest.ring.disable_kicks();
                guest.is_polled = true;
            }
            guest.has_more = true;
        }
    }

    /// Asks a queue to stop; it is dropped when what it has under way is done, or after a while.
    pub fn stop(&mut self, ring: RingId, now: Instant) {
        for guest in self.slots.iter_mut().flatten() {
            if guest.ring.id() == ring {
                guest.stop_at = Some(now + DRAIN);
            }
        }
    }

    /// Whether some queue had more than its budget.
    pub fn want_poll(&self) -> bool {
        self.slots.iter().flatten().any(Guest::wants_poll)
    }

    /// Whether so little is under way that each answer is waited for.
    pub fn are_shallow(&self) -> bool {
        let depths = self.slots.iter().flatten().map(|guest| guest.ring.in_flight());
        self.count() > 0 && depths.sum::<usize>() <= LOOKED_FOR
    }

    /// Whether a queue that is looked at without kicks has something new, which the next look will take.
    pub fn have_news(&mut self) -> bool {
        let mut have = false;
        for guest in self.slots.iter_mut().flatten() {
            if guest.is_polled && guest.stop_at.is_none() && !guest.is_full() && guest.ring.has_news() {
                guest.has_more = true;
                have = true;
            }
        }
        have
    }

    /// Arms the kicks of all queues; `false` if a request slipped in meanwhile: look again first.
    pub fn may_sleep(&mut self) -> bool {
        let mut may = true;
        for guest in self.slots.iter_mut().flatten() {
            // A full queue is looked at again when some of its requests are done, kick or no kick.
            if guest.stop_at.is_none() && guest.is_polled && !guest.is_full() {
                if guest.ring.enable_kicks() {
                    guest.ring.disable_kicks();
                    guest.has_more = true;
                    may = false;
                } else {
                    guest.is_polled = false;
                }
            }
        }
        may
    }
}

impl Plane {
    pub(super) fn start_ring(&mut self, ring: Ring) {
        let vdi =
            VdiId(u32::try_from(ring.id().device.0 >> 32).expect("device ids start with a VDI's number"));
        let slot = match self.guests.slots.iter().position(Option::is_none) {
            Some(slot) => slot,
            None => {
                self.guests.slots.push(None);
                self.guests.slots.len() - 1
            }
        };
        if let Err(error) = self.ring.watch(ring.kick(), Watch(slot as u64)) {
            // Out of descriptors: the guest's queue stays silent until it reconnects.
            tracing::error!(ring = %ring.id(), %error, "cannot serve a guest's queue");
            return;
        }
        self.guests.lives += 1;
        let life = self.guests.lives;
        let mut guest = Guest {
            ring,
            vdi,
            life,
            is_polled: true,
            has_more: true,
            has_completed: false,
            bytes_under_way: 0,
            stop_at: None,
        };
        guest.ring.disable_kicks();
        self.guests.slots[slot] = Some(guest);
    }

    /// Hands letters over, shows guests what is done, and takes what they ask meanwhile.
    pub(super) fn serve_guests(&mut self) {
        self.deliver();
        self.publish_guests();
        self.poll_guests();
    }

    /// Takes new requests from every queue that is being polled.
    fn poll_guests(&mut self) {
        for slot in 0..self.guests.slots.len() {
            for _ in 0..BUDGET / LOOK {
                let has_more = self.look_at_guest(slot);
                self.deliver();
                if self.ring.waiting() >= LOOK {
                    self.ring.flush();
                }
                if !has_more {
                    break;
                }
            }
        }
    }

    /// One look at one queue; whether there is more to be had.
    fn look_at_guest(&mut self, slot: usize) -> bool {
        let Some(guest) = self.guests.slots[slot].as_mut() else {
            return false;
        };
        if !guest.is_polled || guest.is_full() || guest.stop_at.is_some() {
            return false;
        }
        let mut requests = std::mem::take(&mut self.guests.scratch);
        let polled = guest.ring.poll(&mut FromPool(&self.pool), &mut requests, LOOK);
        guest.has_more = polled != Polled::Empty;
        // Refusals were answered inside the ring.
        guest.has_completed = true;
        if !requests.is_empty() {
            // The moment by which a read is judged comes after the guest asked, also where this process was stopped
            // since the turn began: see `replication`'s leases.
            self.now = self.clock.now();
        }
        let (vdi, life) = (guest.vdi, guest.life);
        for request in &requests {
            guest.bytes_under_way += content_bytes(&request.op);
        }
        let has_more = guest.has_more;
        for request in requests.drain(..) {
            let bytes = content_bytes(&request.op);
            let tag = GuestTag {
                slot,
                life,
                tag: request.tag,
                bytes,
            };
            self.request_from_guest(vdi, tag, request.op);
        }
        self.guests.scratch = requests;
        has_more
    }

    /// Shows guests what was completed, once a turn, and lets go of queues that must stop.
    pub(super) fn publish_guests(&mut self) {
        let now = self.now;
        for (slot, entry) in self.guests.slots.iter_mut().enumerate() {
            let Some(guest) = entry else { continue };
            if std::mem::take(&mut guest.has_completed)
                && let Err(error) = guest.ring.publish()
            {
                tracing::warn!(ring = %guest.ring.id(), %error, "cannot notify the guest");
            }
            if guest
                .stop_at
                .is_some_and(|at| guest.ring.in_flight() == 0 || now >= at)
            {
                self.guests.released.push(slot);
            } else if guest.stop_at.is_some() && self.next_tick.is_none() {
                self.next_tick = Some(now + super::TICK);
            }
        }
        for slot in std::mem::take(&mut self.guests.released) {
            self.ring.unwatch(Watch(slot as u64));
            self.guests.slots[slot] = None;
        }
    }
}

/// Bytes of buffers that a request takes or will bring.
fn content_bytes(op: &Op<Buf>) -> u64 {
    match op {
        Op::Read { length, .. } => *length,
        Op::Write { data, .. } => data.length() as u64,
        Op::Flush | Op::Discard { .. } | Op::WriteZeroes { .. } | Op::Extents { .. } | Op::Cut { .. } => 0,
    }
}
