//! What a disk's plates and its volatile cache hold: sparse, so that terabytes cost what was written to them.

use std::collections::BTreeMap;

use crate::Rng;

/// Bytes that a device writes atomically; a longer write can be torn at any multiple of this.
pub const SECTOR_BYTES: u64 = 512;
const CHUNK_BYTES: u64 = 4096;

type Sector = [u8; SECTOR_BYTES as usize];
type Chunk = [u8; CHUNK_BYTES as usize];

/// Content as reads see it, and beside it what each sector that no sync has covered may fall back to.
#[derive(Clone, Debug, Default)]
pub(crate) struct Medium {
    chunks: BTreeMap<u64, Box<Chunk>>,
    unsynced: BTreeMap<u64, Unsynced>,
    /// Counts applied writes, so that a sync covers exactly those before its submission.
    applied: u64,
}

/// A sector whose latest contents live in the volatile cache only.
#[derive(Clone, Debug)]
struct Unsynced {
    stable: Box<Sector>,
    /// Ascending by the count of [`Medium::applied`] that wrote them.
    versions: Vec<(u64, Box<Sector>)>,
}

impl Medium {
    /// The mark that a sync submitted now covers everything up to.
    pub(crate) fn mark(&self) -> u64 {
        self.applied
    }

    /// Sectors that would be in danger if power went now.
    pub(crate) fn unsynced_sectors(&self) -> usize {
        self.unsynced.len()
    }

    /// First bytes of the chunks that were ever written, ascending.
    pub(crate) fn written_chunks(&self) -> impl Iterator<Item = u64> + '_ {
        self.chunks.keys().map(|chunk| chunk * CHUNK_BYTES)
    }

    pub(crate) fn chunk_count(&self) -> usize {
        self.chunks.len()
    }

    pub(crate) fn read(&self, offset: u64, buffer: &mut [u8]) {
        let mut at = 0;
        while at < buffer.len() {
            let position = offset + at as u64;
            let within = (position % CHUNK_BYTES) as usize;
            let count = (CHUNK_BYTES as usize - within).min(buffer.len() - at);
            match self.chunks.get(&(position / CHUNK_BYTES)) {
                Some(chunk) => buffer[at..at + count].copy_from_slice(&chunk[within..within + count]),
                None => buffer[at..at + count].fill(0),
            }
            at += count;
        }
    }

    /// Puts whole sectors into the cache; `keeps(i)` says whether the i-th of them gets there.
    pub(crate) fn write(&mut self, offset: u64, bytes: &[u8], mut keeps: impl FnMut(usize) -> bool) {
        assert!(offset.is_multiple_of(SECTOR_BYTES), "write at {offset}");
        self.applied += 1;
        for (i, content) in bytes.chunks(SECTOR_BYTES as usize).enumerate() {
            if keeps(i) {
                let sector = offset / SECTOR_BYTES + i as u64;
                let before = self.sector(sector);
                let entry = self.unsynced.entry(sector).or_insert_with(|| Unsynced {
                    stable: Box::new(before),
                    versions: Vec::new(),
                });
                let content: &Sector = content.try_into().expect("whole sectors");
                entry.versions.push((self.applied, Box::new(*content)));
                self.place(sector, content);
            }
        }
    }

    /// Changes the device and the plates at once, past the cache: damage, not a write.
    pub(crate) fn damage(&mut self, offset: u64, change: impl Fn(&mut [u8])) {
        let sector = offset / SECTOR_BYTES;
        let mut content = self.sector(sector);
        change(&mut content);
        self.place(sector, &content);
        if let Some(entry) = self.unsynced.get_mut(&sector) {
            change(&mut *entry.stable);
            for (_, version) in &mut entry.versions {
                change(&mut **version);
            }
        }
    }

    /// A sync that was submitted at `mark` is done.
    pub(crate) fn sync(&mut self, mark: u64) {
        self.unsynced.retain(|_, entry| {
            let covered = entry.versions.partition_point(|(order, _)| *order <= mark);
            if let Some((_, content)) = entry.versions.drain(..covered).next_back() {
                entry.stable = content;
            }
            !entry.versions.is_empty()
        });
    }

    /// Power is gone: every sector in the cache independently keeps its stable content or one of the later ones.
    /// The extremes (all, none, exactly what an ordered cache would have written) are as likely as the mixtures.
    pub(crate) fn lose_power(&mut self, rng: &mut Rng) {
        let mode = rng.below(6);
        let cut = rng.between(0, self.applied);
        for (sector, entry) in std::mem::take(&mut self.unsynced) {
            let survivors = match mode {
                0 => 0,
                1 => entry.versions.len(),
                2 => entry.versions.partition_point(|(order, _)| *order <= cut),
                3 if rng.chance(9, 10) => entry.versions.len(),
                4 if rng.chance(9, 10) => 0,
                _ => rng.index(entry.versions.len() + 1),
            };
            let content = match survivors {
                0 => entry.stable,
                n => entry.versions.into_iter().nth(n - 1).expect("a version").1,
            };
            self.place(sector, &content);
        }
    }

    fn sector(&self, sector: u64) -> Sector {
        let mut content = [0; SECTOR_BYTES as usize];
        self.read(sector * SECTOR_BYTES, &mut content);
        content
    }

    fn place(&mut self, sector: u64, content: &Sector) {
        let position = sector * SECTOR_BYTES;
        let chunk = self
            .chunks
            .entry(position / CHUNK_BYTES)
            .or_insert_with(|| Box::new([0; CHUNK_BYTES as usize]));
        let within = (position % CHUNK_BYTES) as usize;
        chunk[within..within + SECTOR_BYTES as usize].copy_from_slice(content);
    }
}
