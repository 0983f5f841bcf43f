//! What a written batch does to the index: strictly in the order of batch numbers, then its requests are
//! answered.

use edge::AlignedBlock;
use types::{LayerId, Payload};

use crate::Effect;
use crate::append::Flight;
use crate::batch::{Entry, Kind};
use crate::leaf::{Piece, pieces};
use crate::store::{LeafPlace, Store, done};

/// Leaves of a wide clear that are asked for ahead of the one being changed.
const CLEAR_AHEAD: usize = 8;

impl<B: Payload> Store<B> {
    /// The disk has written batch `number`, and gives back what it was made of; batches before it may still be on
    /// their way.
    pub(crate) fn appended(
        &mut self,
        number: u64,
        header: Box<AlignedBlock>,
        data: Vec<B>,
        effects: &mut Vec<Effect<B>>,
    ) {
        let first = self.flights.front().expect("a batch under way").number;
        let flight = &mut self.flights[(number - first) as usize];
        assert_eq!(flight.number, number, "flights are numbered without a gap");
        flight.is_written = true;
        self.spares.keep_buffers(header, flight.header_bytes(), data);
        self.apply_written(effects);
    }

    /// Applies batches as long as the oldest is written and its leaves are here.
    pub(crate) fn apply_written(&mut self, effects: &mut Vec<Effect<B>>) {
        while self.flights.front().is_some_and(|flight| flight.is_written) {
            let mut flight = self.flights.pop_front().expect("just looked");
            if !self.apply_flight(&mut flight, effects) {
                self.flights.push_front(flight);
                return;
            }
            self.ledger.segments.unpin(flight.segment);
            self.applied = flight.number;
            self.applied_generation = flight.generation;
            for waiter in &flight.waiters {
                if waiter.is_durable {
                    self.syncs.flush(waiter.id, flight.number);
                } else {
                    effects.push(done(waiter.id));
                }
            }
            self.spares.keep_flight(flight);
        }
    }

    /// False if a leaf is missing; `progress` says where to go on.
    fn apply_flight(&mut self, flight: &mut Flight, effects: &mut Vec<Effect<B>>) -> bool {
        while let Some(entry) = flight.entries.get(flight.progress.entry).copied() {
            let is_done = match entry.kind {
                Kind::Data => self.apply_data(&entry, flight),
                Kind::Zero | Kind::Trim | Kind::Lost | Kind::Void => {
                    self.apply_clear(&entry, flight, effects)
                }
                _ => true,
            };
            if !is_done {
                return false;
            }
            let inline_end = flight.progress.inline + entry.inline_bytes();
            let inline = &flight.inline[flight.progress.inline..inline_end];
            if entry.kind.is_of_layers() && !entry.is_relocated() {
                self.ledger.layers_came(entry.shard_id());
            }
            if self.ledger.apply_entry(&entry, inline, flight.segment) {
                self.start_purge(entry.shard_id());
            }
            flight.progress.inline = inline_end;
            flight.progress.sum += entry.data_blocks();
            flight.progress.blocks = 0;
            flight.progress.entry += 1;
        }
        true
    }

    /// The leaves are held by the flight; all or nothing.
    fn apply_data(&mut self, entry: &Entry, flight: &mut Flight) -> bool {
        let home = self.ledger.home(entry.shard_id(), LayerId(entry.layer));
        let list: smallvec::SmallVec<[Piece; 4]> =
            pieces(entry.shard_id(), home, entry.block, entry.count).collect();
        let first = flight.progress.leaf;
        let leaves = &flight.leaves[first..first + list.len()];
        if !leaves.iter().all(|at| self.cache.is_ready(*at)) {
            return false;
        }
        for (piece, at) in list.iter().zip(leaves) {
            let sum = flight.progress.sum + piece.index as usize;
            let address = flight.address + 1 + sum as u64;
            let ledger = &mut self.ledger;
            let sums = &flight.sums[sum..];
            self.cache.update(*at, piece.slots(), |leaf| {
                ledger.apply_piece(entry, *piece, address, sums, leaf)
            });
            self.cache.unpin(*at);
        }
        flight.progress.leaf += list.len();
        true
    }

    /// May touch more leaves than memory holds, so it goes leaf by leaf and is allowed one above the limit.
    fn apply_clear(&mut self, entry: &Entry, flight: &mut Flight, effects: &mut Vec<Effect<B>>) -> bool {
        let done_blocks = flight.progress.blocks;
        let (block, count) = (entry.block + done_blocks, entry.count - done_blocks);
        let home = self.ledger.home(entry.shard_id(), LayerId(entry.layer));
        for piece in pieces(entry.shard_id(), home, block, count) {
            let LeafPlace::Ready(at) = self.locate_or_make(piece.key, 1, effects) else {
                let ahead = pieces(entry.shard_id(), home, block, count);
                let behind = ahead
                    .skip_while(|other| other.key != piece.key)
                    .skip(1)
                    .take(CLEAR_AHEAD);
                for other in behind.collect::<Vec<_>>() {
                    self.locate(other.key, 0, effects);
                }
                return false;
            };
            let ledger = &mut self.ledger;
            self.cache.update(at, piece.slots(), |leaf| {
                ledger.apply_piece(entry, piece, 0, &[], leaf)
            });
            flight.progress.blocks += piece.count as u32;
        }
        true
    }
}
