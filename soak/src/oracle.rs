//! What a reader of a virtual disk may see, sector by sector, whoever writes to it at the same time.
//!
//! Each sector of 512 bytes has a history of marks: the value a request leaves there (its version, 0 for zeros), when
//! the request was issued and when it ended. A value V is superseded for a read R if some write W that surely
//! happened ended before R was issued, and V ended before W was issued. A read returns a value that is not
//! superseded: each sector is a linearizable register, for any overlap of requests of any clients.
//!
//! Beyond that, a block of 4 KiB changes as one. Where one sector of it holds write W, a sector that W covers too
//! may not hold what ended before W was issued: that would be half of W.
//!
//! A request whose connection died with the daemon may have happened or not, and supersedes nothing, until a read
//! with nothing under way beside it has seen what is there: from then on that is what is there.

use std::collections::BTreeMap;
use std::ops::Range;

use sim::content;

pub const SECTOR: u64 = 512;
const BLOCK_SECTORS: u64 = 8;

/// When something happened, counted in events of this disk.
type Moment = u64;

#[derive(Clone, Copy, Debug)]
struct Mark {
    value: u64,
    /// Of the request, for ever.
    began: Moment,
    ended: Option<Moment>,
    first: u64,
    end: u64,
    /// The same as `began` and `ended`, or the moment at which a read settled it.
    issued: Moment,
    done: Option<Moment>,
    /// May have happened or not.
    is_maybe: bool,
}

const ORIGIN: Mark = Mark {
    value: 0,
    began: 0,
    ended: Some(0),
    first: 0,
    end: 0,
    issued: 0,
    done: Some(0),
    is_maybe: false,
};

/// A write, trim or zeroing under way: what it leaves, and where.
#[derive(Clone, Debug)]
pub struct Change {
    value: u64,
    began: Moment,
    sectors: Range<u64>,
}

/// The histories of all sectors of one disk.
#[derive(Debug)]
pub struct Oracle {
    /// Mixed into all content: a block of another disk is never right.
    address_base: u64,
    sectors: Vec<Vec<Mark>>,
    now: Moment,
    versions: u64,
    reads: BTreeMap<Moment, u32>,
}

impl Oracle {
    /// A new disk `number` of so many bytes.
    pub fn new(number: u32, bytes: u64) -> Oracle {
        let mut oracle = Oracle {
            address_base: u64::from(number) << 40,
            sectors: Vec::new(),
            now: 0,
            versions: 0,
            reads: BTreeMap::new(),
        };
        oracle.resize(bytes);
        oracle
    }

    /// The disk has this many bytes now; new sectors hold zeros.
    pub fn resize(&mut self, bytes: u64) {
        self.sectors.resize((bytes / SECTOR) as usize, vec![ORIGIN]);
    }

    pub fn bytes(&self) -> u64 {
        self.sectors.len() as u64 * SECTOR
    }

    fn moment(&mut self) -> Moment {
        self.now += 1;
        self.now
    }

    /// A write of the bytes at `offset` is issued; also returns its content.
    pub fn write(&mut self, offset: u64, length: u64) -> (Change, Vec<u8>) {
        self.versions += 1;
        let change = self.begin(offset, length, self.versions);
        let mut data = vec![0; length as usize];
        for (sector, bytes) in change.sectors.clone().zip(data.chunks_mut(SECTOR as usize)) {
            content::fill_sector(self.address_base | sector, change.value, bytes);
        }
        (change, data)
    }

    /// Something that leaves zeros is issued.
    pub fn clear(&mut self, offset: u64, length: u64) -> Change {
        self.begin(offset, length, 0)
    }

    fn begin(&mut self, offset: u64, length: u64, value: u64) -> Change {
        assert!(
            offset.is_multiple_of(SECTOR) && length.is_multiple_of(SECTOR),
            "{offset} + {length}"
        );
        let began = self.moment();
        let sectors = offset / SECTOR..(offset + length) / SECTOR;
        for sector in sectors.clone() {
            self.sectors[sector as usize].push(Mark {
                value,
                began,
                ended: None,
                first: sectors.start,
                end: sectors.end,
                issued: began,
                done: None,
                is_maybe: false,
            });
        }
        Change {
            value,
            began,
            sectors,
        }
    }

    /// The change was answered.
    pub fn complete(&mut self, change: &Change) {
        self.end(change, false);
    }

    /// The change will never be answered, and what could still do it is dead.
    pub fn lose(&mut self, change: &Change) {
        self.end(change, true);
    }

    fn end(&mut self, change: &Change, is_maybe: bool) {
        let now = self.moment();
        let oldest_read = self.reads.keys().next().copied().unwrap_or(Moment::MAX);
        for sector in change.sectors.clone() {
            let history = &mut self.sectors[sector as usize];
            for mark in history.iter_mut().filter(|mark| mark.began == change.began) {
                mark.done = Some(now);
                mark.ended = Some(now);
                mark.is_maybe = is_maybe;
            }
            let newest = newest_before(history, oldest_read);
            history.retain(|mark| is_current(mark, newest));
        }
    }

    /// A read is issued.
    pub fn begin_read(&mut self) -> Moment {
        let moment = self.moment();
        *self.reads.entry(moment).or_default() += 1;
        moment
    }

    /// The read will never be answered.
    pub fn forget_read(&mut self, issued: Moment) {
        let count = self.reads.get_mut(&issued).expect("a read that was begun");
        *count -= 1;
        if *count == 0 {
            self.reads.remove(&issued);
        }
    }

    /// A read that was issued at `issued` brought `data`; says what is wrong with it.
    pub fn end_read(&mut self, issued: Moment, offset: u64, data: &[u8]) -> Result<(), String> {
        self.forget_read(issued);
        let now = self.moment();
        let first = offset / SECTOR;
        let mut found = Vec::with_capacity(data.len() / SECTOR as usize);
        for (sector, bytes) in (first..).zip(data.chunks(SECTOR as usize)) {
            found.push(self.check_sector(sector, bytes, issued)?);
        }
        let value_at = |sector: u64| found[(sector - first) as usize];
        let end = first + found.len() as u64;
        let mut block = first;
        while block < end {
            let next = (block / BLOCK_SECTORS + 1) * BLOCK_SECTORS;
            self.check_block(block..next.min(end), issued, &value_at)?;
            block = next;
        }
        for sector in first..end {
            settle(&mut self.sectors[sector as usize], value_at(sector), issued, now);
        }
        Ok(())
    }

    fn check_sector(&self, sector: u64, bytes: &[u8], issued: Moment) -> Result<u64, String> {
        let history = &self.sectors[sector as usize];
        let Some(value) = content::sector_version(self.address_base | sector, bytes) else {
            return Err(format!(
                "sector {sector} holds no content of its own: it begins {:02x?}; its history is {history:?}",
                &bytes[..16]
            ));
        };
        let newest = newest_before(history, issued);
        if history
            .iter()
            .any(|mark| mark.value == value && is_current(mark, newest))
        {
            return Ok(value);
        }
        Err(format!(
            "sector {sector} holds version {value}, which it may not; the read was issued at {issued}, its history is {history:?}"
        ))
    }

    /// The sectors are of one block: none of them may hold what another's write had ended.
    fn check_block(
        &self,
        sectors: Range<u64>,
        issued: Moment,
        value_at: &impl Fn(u64) -> u64,
    ) -> Result<(), String> {
        if sectors
            .clone()
            .all(|sector| value_at(sector) == value_at(sectors.start))
        {
            return Ok(());
        }
        let marks_of = |sector: u64| {
            let history = &self.sectors[sector as usize];
            let newest = newest_before(history, issued);
            let value = value_at(sector);
            history
                .iter()
                .filter(move |mark| mark.value == value && is_current(mark, newest))
        };
        for whole in sectors.clone() {
            let mut candidates = marks_of(whole);
            // Zeros may be of several requests: then there is nothing to be said.
            let (Some(mark), None) = (candidates.next(), candidates.next()) else {
                continue;
            };
            for other in sectors
                .clone()
                .filter(|other| (mark.first..mark.end).contains(other))
            {
                if marks_of(other).all(|old| old.ended.is_some_and(|ended| ended < mark.began)) {
                    return Err(format!(
                        "a block is torn: sector {whole} holds version {} and sector {other} version {}, which ended before it was issued: {mark:?}, {:?}",
                        mark.value,
                        value_at(other),
                        self.sectors[other as usize]
                    ));
                }
            }
        }
        Ok(())
    }
}

/// When the youngest sure write was issued of those that ended before `moment`.
fn newest_before(history: &[Mark], moment: Moment) -> Moment {
    history
        .iter()
        .filter(|mark| !mark.is_maybe && mark.done.is_some_and(|done| done < moment))
        .map(|mark| mark.issued)
        .max()
        .unwrap_or(0)
}

fn is_current(mark: &Mark, newest: Moment) -> bool {
    mark.done.is_none_or(|done| done >= newest)
}

/// `value` was seen; if nothing was under way beside the read, it is what is there from now on.
fn settle(history: &mut [Mark], value: u64, issued: Moment, now: Moment) {
    let is_alone = history
        .iter()
        .all(|mark| mark.done.is_some_and(|done| done < issued));
    if !is_alone || history.len() == 1 {
        return;
    }
    let newest = newest_before(history, issued);
    let is_seen = |mark: &Mark| mark.value == value && is_current(mark, newest);
    let count = history.iter().filter(|mark| is_seen(mark)).count();
    let seen = history
        .iter_mut()
        .rev()
        .find(|mark| is_seen(mark))
        .expect("just checked");
    if count > 1 {
        // Zeros of one request or of another: nobody can say what else that one must have left.
        (seen.first, seen.end, seen.ended) = (0, 0, None);
    }
    seen.is_maybe = false;
    seen.issued = now;
    seen.done = Some(now);
}

#[cfg(test)]
mod tests {
    use super::*;

    const BYTES: u64 = 16 * SECTOR;

    fn see(oracle: &mut Oracle, data: &[u8]) -> Result<(), String> {
        let issued = oracle.begin_read();
        oracle.end_read(issued, 0, data)
    }

    fn write_all(oracle: &mut Oracle) -> (Change, Vec<u8>) {
        oracle.write(0, BYTES)
    }

    #[test]
    fn a_completed_write_is_what_reads_see() {
        let mut oracle = Oracle::new(1, BYTES);
        let zeros = vec![0; BYTES as usize];
        see(&mut oracle, &zeros).expect("new");
        let (change, data) = write_all(&mut oracle);
        let early = oracle.begin_read();
        see(&mut oracle, &zeros).expect("not yet there");
        see(&mut oracle, &data).expect("there already");
        oracle.complete(&change);
        see(&mut oracle, &zeros).expect_err("lost");
        see(&mut oracle, &data).expect("there");
        oracle
            .end_read(early, 0, &zeros)
            .expect("it began before the end");
    }

    #[test]
    fn a_lost_request_happened_or_not_until_a_read_settles_it() {
        for happened in [true, false] {
            let mut oracle = Oracle::new(1, BYTES);
            let (first, old) = write_all(&mut oracle);
            oracle.complete(&first);
            let (second, new) = write_all(&mut oracle);
            oracle.lose(&second);
            let (seen, other) = if happened { (new, old) } else { (old, new) };
            see(&mut oracle, &seen).expect("either");
            see(&mut oracle, &other).expect_err("settled");
        }
    }

    #[test]
    fn an_older_version_after_a_trim_is_seen() {
        let mut oracle = Oracle::new(1, BYTES);
        let (first, old) = write_all(&mut oracle);
        oracle.complete(&first);
        let trim = oracle.clear(0, BYTES);
        oracle.complete(&trim);
        see(&mut oracle, &old).expect_err("it came back");
    }

    #[test]
    fn half_a_block_is_seen_and_two_blocks_are_two() {
        let mut oracle = Oracle::new(1, BYTES);
        let (first, old) = write_all(&mut oracle);
        oracle.complete(&first);
        let (_under_way, new) = write_all(&mut oracle);
        let mut torn = old.clone();
        torn[..4096].copy_from_slice(&new[..4096]);
        see(&mut oracle, &torn).expect("blocks change one by one");
        torn[4096..4096 + 512].copy_from_slice(&new[4096..4096 + 512]);
        let wrong = see(&mut oracle, &torn).expect_err("half a block");
        assert!(wrong.contains("torn"), "{wrong}");
    }

    #[test]
    fn a_part_of_a_block_written_later_is_no_tear() {
        let mut oracle = Oracle::new(1, BYTES);
        let (first, mut data) = write_all(&mut oracle);
        oracle.complete(&first);
        see(&mut oracle, &data).expect("whole");
        let (second, part) = oracle.write(1024, 512);
        oracle.complete(&second);
        data[1024..1536].copy_from_slice(&part);
        see(&mut oracle, &data).expect("both");
        see(&mut oracle, &data).expect("still");
    }

    #[test]
    fn zeros_of_two_requests_are_no_tear() {
        let mut oracle = Oracle::new(1, BYTES);
        let (first, part) = oracle.write(0, 512);
        oracle.complete(&first);
        let trim = oracle.clear(0, BYTES);
        oracle.lose(&trim);
        // It did not happen: the rest of the block was never written.
        let mut data = vec![0; BYTES as usize];
        data[..512].copy_from_slice(&part);
        see(&mut oracle, &data).expect("as before");
        see(&mut oracle, &data).expect("still");
    }

    #[test]
    fn content_of_another_disk_or_place_is_seen() {
        let mut oracle = Oracle::new(1, BYTES);
        let (change, data) = write_all(&mut oracle);
        oracle.complete(&change);
        let (_, foreign) = Oracle::new(2, BYTES).write(0, BYTES);
        see(&mut oracle, &foreign).expect_err("of another disk");
        let mut shifted = data.clone();
        shifted.rotate_left(512);
        see(&mut oracle, &shifted).expect_err("of another place");
    }
}
