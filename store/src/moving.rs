//! What cleaning logs again: data window by window, then clears, then what is said of shards.
//!
//! What is not data is kept as follows. Clears: as long as they are current, like data, because they also hide
//! what layers below hold; and voids, which hide what the log still says of their own layer. Drops: until their segment is the oldest, because older ones may hold what they made
//! void. That layers are gone: as long as the shard is there, because older segments and late writes may hold something of
//! them. Records, ends and revisions: as long as they are the shard's last word. Data that fails its checksum becomes
//! [`Kind::Lost`]: readers go on being told, and the segment can be used again.

use std::collections::BTreeSet;

use types::{BLOCK_BYTES, BlockNo, LayerId, LeafNo, Payload, Seq, ShardId, SumKey};

use crate::append::Draft;
use crate::batch::{Entry, FLAG_NO_END, FLAG_RELOCATED, Header, Kind};
use crate::clean::{Content, Found, JOBS_MAX};
use crate::leaf::{SLOTS, State, pieces};
use crate::store::{LeafPlace, Store};
use crate::{Effect, LeafKey};

/// Leaves asked for ahead of the block being looked at.
const LEAVES_AHEAD: usize = 16;
/// Blocks whose leaves are looked at for one window.
const LOOKED_AT_MAX: usize = 4096;
/// The smallest window, whatever the setting says: each ends with a batch, and each batch begins with a header.
const WINDOW_BLOCKS_MIN: u64 = 32;
/// Data blocks of a batch while guests are served: they wait for it at most as long as half a megabyte takes.
const BATCH_BLOCKS_PACED: usize = 128;
/// Such batches under way.
const BATCHES_PACED: usize = 2;

/// What the segment holds that may still count.
#[derive(Default)]
pub(crate) struct Moving {
    /// Data blocks, ascending by position.
    items: Vec<Item>,
    /// Those before are moved, or did not live.
    items_at: usize,
    window: Window,
    clears: Vec<Entry>,
    clears_at: usize,
    /// Blocks of the current clear already dealt with.
    clear_blocks: u32,
    notes: Vec<Entry>,
    notes_at: usize,
    /// Births of the notes: what was moved before may lie in a segment many times.
    noted: BTreeSet<u64>,
    /// Shards whose end must be said again.
    ends: BTreeSet<ShardId>,
    /// Of the last batch with something moved.
    pub(crate) last_number: u64,
}

#[derive(Clone, Copy)]
struct Item {
    key: LeafKey,
    slot: u16,
    /// From the segment's start.
    position: u32,
}

/// Blocks that are chosen, read and moved together, sorted by shard, layer and block.
#[derive(Default)]
struct Window {
    stage: Stage,
    items: Vec<Item>,
    at: usize,
    living: Vec<Item>,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Stage {
    /// There is none.
    #[default]
    Nothing,
    /// Which of `items` live goes into `living`.
    Choosing,
    /// `items` are read and moved.
    Moving,
}

/// Whether cleaning of a segment goes on.
#[derive(PartialEq, Eq)]
pub(crate) enum Step {
    /// When a leaf, content, credit or an append comes.
    Wait,
    /// Everything is logged.
    End,
}

/// Why a draft is not filled further.
#[derive(PartialEq, Eq)]
enum Pause {
    /// It is full: send it.
    Full,
    /// A leaf or content is on its way.
    Wait,
    /// Everything was looked at.
    End,
}

impl Moving {
    pub(crate) fn new(last_number: u64) -> Moving {
        Moving {
            last_number,
            ..Moving::default()
        }
    }
}

impl<B: Payload> Store<B> {
    /// Notes what of a batch may still count.
    pub(crate) fn sort_out_batch(&self, batch: &Header, position: u32, moving: &mut Moving) {
        for (entry, first_sum, _) in batch.walk() {
            let id = entry.shard_id();
            let Some(shard) = self.ledger.shards.get(&id) else {
                continue;
            };
            match entry.kind {
                Kind::Open | Kind::Checkpoint => continue,
                Kind::Drop => {
                    if entry.birth == shard.drop_birth {
                        moving.note(entry);
                    }
                    continue;
                }
                _ if entry.birth < shard.drop_birth => continue,
                Kind::Record if entry.birth == shard.record_birth => moving.note(entry),
                kind if kind.is_of_layers() && shard.fates.says(entry.birth) => moving.note(entry),
                Kind::LayersRevision if entry.birth == shard.revision_birth => moving.note(entry),
                Kind::SetEnd if entry.birth == shard.end_birth => drop(moving.ends.insert(id)),
                Kind::Record | Kind::SetEnd | Kind::LayersGone | Kind::LayersOne | Kind::LayersRevision => {}
                Kind::Data => moving.add_data(entry, position + 1 + first_sum as u32),
                Kind::Zero | Kind::Trim | Kind::Lost | Kind::Void => moving.clears.push(*entry),
            }
            if entry.kind.is_blocks() && entry.advances_end() && entry.seq >= shard.end_submitted {
                moving.ends.insert(id);
            }
        }
    }

    /// Where what was said of a layer's leaf is found.
    fn home_of(&self, key: LeafKey) -> LeafKey {
        let layer = self.ledger.home(key.shard, key.layer);
        LeafKey { layer, ..key }
    }

    /// Moves what may be moved now.
    pub(crate) fn move_on(
        &mut self,
        victim: u32,
        content: &mut Content<B>,
        moving: &mut Moving,
        effects: &mut Vec<Effect<B>>,
    ) -> Step {
        loop {
            if moving.window.stage != Stage::Moving && moving.items_at < moving.items.len() {
                if !self.choose_window(victim, content, moving, effects) {
                    return Step::Wait;
                }
                self.read_planned(victim, content, effects);
            }
            let is_first_paced = !self.is_urgent();
            if !content.is_here() || !self.may_move(is_first_paced) {
                return Step::Wait;
            }
            let Some(mut draft) = self.draft(effects) else {
                return Step::Wait;
            };
            if is_first_paced {
                draft.limit_blocks(BATCH_BLOCKS_PACED);
            }
            draft.is_cleaning = true;
            let pause = self.fill_moving(victim, content, moving, &mut draft, effects);
            if !draft.is_empty() {
                self.cleaner.pace.spend(draft.blocks() as u32 + 1);
                self.stats.cleaned_blocks += draft.blocks() as u64;
                moving.last_number = draft.number;
                self.launch(draft, effects);
            } else {
                self.spares.keep_draft(draft);
            }
            match pause {
                Pause::Full => {}
                Pause::Wait => return Step::Wait,
                Pause::End if moving.items_at < moving.items.len() => {}
                Pause::End => return Step::End,
            }
        }
    }

    /// Whether a batch may go now. Guests come first: one append is left to them, and few moves are before theirs.
    fn may_move(&self, is_paced: bool) -> bool {
        if self.must_wait_for_leaves() {
            return false;
        }
        if !is_paced {
            return true;
        }
        let limit = self.settings.appends_in_flight;
        let moves = self.flights.iter().filter(|flight| flight.is_cleaning).count();
        self.cleaner.pace.blocks() as usize >= BATCH_BLOCKS_PACED
            && moves < BATCHES_PACED
            && (limit == 1 || self.flights.len() + 1 < limit)
    }

    /// Takes the next blocks that live and plans to read them; false while a leaf is missing.
    fn choose_window(
        &mut self,
        victim: u32,
        content: &mut Content<B>,
        moving: &mut Moving,
        effects: &mut Vec<Effect<B>>,
    ) -> bool {
        let budget =
            (self.settings.cleaning_bytes / BLOCK_BYTES / JOBS_MAX as u64).max(WINDOW_BLOCKS_MIN) as usize;
        let rest = &moving.items[moving.items_at..];
        let window = &mut moving.window;
        if window.stage == Stage::Nothing {
            let live = self.ledger.segments.get(victim).live.max(1) as usize;
            let count = (budget * rest.len() / live).clamp(1, LOOKED_AT_MAX);
            *window = Window {
                stage: Stage::Choosing,
                items: rest[..count.min(rest.len())].to_vec(),
                ..Window::default()
            };
            window.items.sort_unstable_by_key(Item::place);
        }
        let start = self.ledger.segments.geometry.start(victim);
        while let Some(item) = window.items.get(window.at).copied() {
            match self.locate(self.home_of(item.key), 0, effects) {
                LeafPlace::Ready(at) => {
                    let slot = self.cache.get(at).leaf.as_ref().expect("ready");
                    let slot = slot.get(usize::from(item.slot));
                    if slot.state == State::Data && slot.address == start + u64::from(item.position) {
                        window.living.push(item);
                    }
                }
                LeafPlace::Nowhere => {}
                LeafPlace::Loading(_) => {
                    self.load_ahead(&window.items[window.at..], effects);
                    return false;
                }
                LeafPlace::NoMemory => return false,
            }
            window.at += 1;
        }
        let mut living = std::mem::take(&mut window.living);
        living.sort_unstable_by_key(|item| item.position);
        let planned = content.plan(living.iter().map(|item| item.position), budget as u32);
        moving.items_at = match living.get(planned) {
            Some(left) => moving.items.partition_point(|item| item.position < left.position),
            None => moving.items_at + window.items.len(),
        };
        living.truncate(planned);
        living.sort_unstable_by_key(Item::place);
        *window = Window {
            stage: Stage::Moving,
            items: living,
            ..Window::default()
        };
        true
    }

    fn load_ahead(&mut self, items: &[Item], effects: &mut Vec<Effect<B>>) {
        let mut last = None;
        let mut asked = 0;
        for item in items {
            if last != Some(item.key) {
                self.locate(self.home_of(item.key), 0, effects);
                last = Some(item.key);
                asked += 1;
                if asked == LEAVES_AHEAD {
                    return;
                }
            }
        }
    }

    fn fill_moving(
        &mut self,
        victim: u32,
        content: &mut Content<B>,
        moving: &mut Moving,
        draft: &mut Draft<B>,
        effects: &mut Vec<Effect<B>>,
    ) -> Pause {
        let mut pause = self.fill_data(victim, content, &mut moving.window, draft, effects);
        if pause == Pause::End && moving.items_at == moving.items.len() {
            pause = self.fill_clears(moving, draft, effects);
            if pause == Pause::End {
                pause = self.fill_notes(victim, moving, draft);
            }
        }
        pause
    }

    fn fill_data(
        &mut self,
        victim: u32,
        content: &mut Content<B>,
        window: &mut Window,
        draft: &mut Draft<B>,
        effects: &mut Vec<Effect<B>>,
    ) -> Pause {
        let start = self.ledger.segments.geometry.start(victim);
        while let Some(item) = window.items.get(window.at).copied() {
            if draft.room().is_none_or(|room| room == 0) {
                return Pause::Full;
            }
            if self.is_changing(item.key.shard) {
                return Pause::Wait;
            }
            let home = self.home_of(item.key);
            let at = match self.locate(home, 0, effects) {
                LeafPlace::Ready(at) => at,
                LeafPlace::Nowhere => {
                    window.at += 1;
                    continue;
                }
                LeafPlace::Loading(_) => {
                    self.load_ahead(&window.items[window.at..], effects);
                    return Pause::Wait;
                }
                LeafPlace::NoMemory => return Pause::Wait,
            };
            let slot_at = usize::from(item.slot);
            let slot = self.cache.get(at).leaf.as_ref().expect("ready").get(slot_at);
            let is_current = slot.state == State::Data
                && slot.address == start + u64::from(item.position)
                && self.effective(home, at, slot_at, draft).birth == slot.birth;
            if !is_current {
                window.at += 1;
                continue;
            }
            let block = BlockNo(item.key.leaf.first_block().0 + u32::from(item.slot));
            let key = SumKey {
                shard: item.key.shard,
                layer: item.key.layer,
                block,
                seq: Seq(slot.seq),
            };
            let is_good = |data: &B| types::bind(key, types::crc32c(data.bytes())).0 == slot.sum;
            let good = match content.get(item.position) {
                Found::InRun(data) if is_good(&data) => Some(data),
                Found::InRun(_) => {
                    // Perhaps it was hurt on the way.
                    self.read_alone(victim, content, item.position, effects);
                    return Pause::Wait;
                }
                Found::Alone(data) => data.filter(is_good),
                Found::Coming => return Pause::Wait,
            };
            let entry = Entry {
                kind: if good.is_some() { Kind::Data } else { Kind::Lost },
                flags: FLAG_RELOCATED | if slot.is_no_end { FLAG_NO_END } else { 0 },
                shard: key.shard.to_u64(),
                layer: key.layer.0,
                block: block.0,
                count: 1,
                seq: slot.seq,
                birth: slot.birth,
            };
            match good {
                Some(data) => {
                    if !extends(draft, &entry) {
                        draft.push(entry);
                        self.cache.pin(at);
                        draft.hold(at);
                    }
                    draft.push_block(data, slot.sum);
                }
                None => {
                    self.stats.corrupt_blocks += 1;
                    draft.push(entry);
                }
            }
            window.at += 1;
        }
        *window = Window::default();
        *content = Content::default();
        Pause::End
    }

    fn fill_clears(
        &mut self,
        moving: &mut Moving,
        draft: &mut Draft<B>,
        effects: &mut Vec<Effect<B>>,
    ) -> Pause {
        while let Some(entry) = moving.clears.get(moving.clears_at).copied() {
            let done = moving.clear_blocks;
            let (block, count) = (entry.block + done, entry.count - done);
            if self.is_changing(entry.shard_id()) {
                return Pause::Wait;
            }
            let home = self.ledger.home(entry.shard_id(), LayerId(entry.layer));
            for piece in pieces(entry.shard_id(), home, block, count) {
                let at = match self.locate(piece.key, 0, effects) {
                    LeafPlace::Ready(at) => at,
                    LeafPlace::Nowhere => {
                        moving.clear_blocks += piece.count as u32;
                        continue;
                    }
                    LeafPlace::Loading(_) | LeafPlace::NoMemory => return Pause::Wait,
                };
                for slot_at in piece.slot..piece.slot + piece.count {
                    let leaf = self.cache.leaf(at);
                    let slot = leaf.get(slot_at);
                    let is_current = match entry.kind {
                        Kind::Void => leaf.has_void(slot_at, entry.birth),
                        _ => {
                            slot.state != State::Absent
                                && slot.state != State::Data
                                && slot.birth == entry.birth
                                && self.effective(piece.key, at, slot_at, draft).birth == slot.birth
                        }
                    };
                    if is_current {
                        if draft.room().is_none() {
                            return Pause::Full;
                        }
                        let moved = Entry {
                            flags: entry.flags | FLAG_RELOCATED,
                            block: piece.key.leaf.first_block().0 + slot_at as u32,
                            count: 1,
                            ..entry
                        };
                        if !extends(draft, &moved) {
                            draft.push(moved);
                        }
                    }
                    moving.clear_blocks += 1;
                }
            }
            moving.clears_at += 1;
            moving.clear_blocks = 0;
        }
        Pause::End
    }

    fn fill_notes(&mut self, victim: u32, moving: &mut Moving, draft: &mut Draft<B>) -> Pause {
        let is_oldest = self.ledger.segments.get(victim).generation == self.ledger.segments.floor();
        while let Some(entry) = moving.notes.get(moving.notes_at).copied() {
            let Some(shard) = self.ledger.shards.get_mut(&entry.shard_id()) else {
                moving.notes_at += 1;
                continue;
            };
            let is_current = match entry.kind {
                Kind::Record => entry.birth == shard.record_birth && shard.is_known,
                kind if kind.is_of_layers() => shard.fates.says(entry.birth),
                Kind::LayersRevision => entry.birth == shard.revision_birth,
                _ => entry.birth == shard.drop_birth,
            };
            let is_forgotten = entry.kind == Kind::Drop && is_oldest && !shard.is_purging;
            if is_current && is_forgotten {
                shard.drop_birth = 0;
                self.ledger.dirty_shards.insert(entry.shard_id());
            } else if is_current {
                let inline: &[u8] = if entry.kind == Kind::Record {
                    &shard.record
                } else {
                    &[]
                };
                if !draft.has_inline_room(inline.len()) {
                    return Pause::Full;
                }
                draft.push_note(
                    Entry {
                        flags: entry.flags | FLAG_RELOCATED,
                        ..entry
                    },
                    inline,
                );
            }
            moving.notes_at += 1;
        }
        while let Some(id) = moving.ends.first().copied() {
            if let Some(shard) = self.ledger.shards.get(&id).filter(|shard| shard.is_there()) {
                if !draft.has_inline_room(0) {
                    return Pause::Full;
                }
                draft.push(Entry {
                    kind: Kind::SetEnd,
                    flags: 0,
                    shard: id.to_u64(),
                    layer: 0,
                    block: 0,
                    count: 0,
                    seq: shard.end_submitted,
                    birth: 0,
                });
            }
            moving.ends.pop_first();
        }
        Pause::End
    }
}

/// Leaves of each clear one copy: what was moved before, by a cleaning or a recovery that died, lies in a segment many
/// times, and moving each copy would double their number again and again. A birth belongs to one clear, so copies are
/// pieces of the same run.
pub(crate) fn without_repeats(clears: &mut Vec<Entry>) {
    let run = |entry: &Entry| (entry.shard, entry.layer, entry.birth);
    clears.sort_unstable_by_key(|entry| (run(entry), entry.block, entry.count));
    let mut last = None;
    let mut end = 0;
    clears.retain_mut(|entry| {
        if last != Some(run(entry)) {
            (last, end) = (Some(run(entry)), 0);
        }
        let (first, past) = (entry.block.max(end), entry.block + entry.count);
        end = end.max(past);
        (entry.block, entry.count) = (first, past.saturating_sub(first));
        entry.count > 0
    });
}

impl Moving {
    /// The headers are all read.
    pub(crate) fn begin(mut self) -> Moving {
        without_repeats(&mut self.clears);
        self
    }

    fn note(&mut self, entry: &Entry) {
        if self.noted.insert(entry.birth) {
            self.notes.push(*entry);
        }
    }

    fn add_data(&mut self, entry: &Entry, first_position: u32) {
        for (block, position) in (entry.block..entry.block + entry.count).zip(first_position..) {
            self.items.push(Item {
                key: LeafKey {
                    shard: entry.shard_id(),
                    layer: LayerId(entry.layer),
                    leaf: LeafNo(block / SLOTS as u32),
                },
                slot: BlockNo(block).slot() as u16,
                position,
            });
        }
    }
}

impl Item {
    fn place(&self) -> (LeafKey, u16) {
        (self.key, self.slot)
    }
}

/// Joins an entry of one block to the draft's last entry if it goes on where that ends, in the same leaf.
fn extends<B: Payload>(draft: &mut Draft<B>, entry: &Entry) -> bool {
    let Some(last) = draft.entries.last_mut() else {
        return false;
    };
    let goes_on = Entry {
        block: entry.block,
        count: 1,
        ..*last
    } == *entry
        && last.block + last.count == entry.block
        && BlockNo(entry.block).slot() != 0;
    last.count += u32::from(goes_on);
    goes_on
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn clear(shard: u64, birth: u64, block: u32, count: u32) -> Entry {
        Entry {
            kind: Kind::Trim,
            flags: 0,
            shard,
            layer: 0,
            block,
            count,
            seq: birth,
            birth,
        }
    }

    /// How often each block of each clear is there.
    fn blocks(clears: &[Entry]) -> BTreeMap<(u64, u64, u32), u32> {
        let mut blocks = BTreeMap::new();
        for entry in clears {
            for block in entry.block..entry.block + entry.count {
                *blocks.entry((entry.shard, entry.birth, block)).or_default() += 1;
            }
        }
        blocks
    }

    proptest! {
        /// A segment may hold many copies of a clear, in pieces of any size: each block of it is to be moved once, or copies of
        /// copies fill the disk.
        #[test]
        fn a_clear_is_moved_once_however_many_copies_there_are(
            list in prop::collection::vec((0u64..2, 0u64..3, 0u32..40, 1u32..20), 0..40),
        ) {
            let mut clears: Vec<Entry> =
                list.into_iter().map(|(shard, birth, block, count)| clear(shard, birth, block, count)).collect();
            let before = blocks(&clears);
            without_repeats(&mut clears);
            let after = blocks(&clears);
            prop_assert!(after.keys().eq(before.keys()), "{before:?} became {after:?}");
            prop_assert!(after.values().all(|times| *times == 1), "{after:?}");
        }
    }
}
