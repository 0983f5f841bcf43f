//! What a guest may read from its disk, sector by sector.
//!
//! Each sector has a history of marks: which value a request left there, when the request was issued, when it
//! was completed, whether it is on stable media. A value V is superseded for a read R if some write W that
//! surely happened was completed before R was issued, and V was completed before W was issued. A read returns a
//! value that is not superseded. That is linearizability of each sector as a register, for any overlap of
//! requests.
//!
//! * A kill changes nothing: what was completed stays, what was under way is replayed and still under way.
//! * A power loss takes the certainty from every mark that no completed flush covers: such a write may have
//!   happened or not, and what it had superseded may be back.
//! * A read with nothing under way beside it settles its sectors: what it saw is what is there from then on. Not
//!   so a read that is answered while its shard has no write quorum: one replica answers it, and whether a write
//!   happened that nobody was ever told of (its guest lost power first) is decided when the quorum is back and the
//!   replicas are made equal. Nothing can be completed on top of such a read before that.

/// When something happened, in events of the run.
pub(crate) type Moment = u64;

#[derive(Clone, Copy, Debug)]
struct Mark {
    request: u64,
    /// The attachment through which it was written: of several that live at a time, the later the higher.
    by: u64,
    value: u64,
    issued: Moment,
    done: Option<Moment>,
    is_durable: bool,
    /// May have happened or not: supersedes nothing.
    is_maybe: bool,
}

/// The histories of all sectors of one disk.
#[derive(Debug, Default)]
pub(crate) struct GuestOracle {
    sectors: Vec<Vec<Mark>>,
    now: Moment,
}

const ORIGIN: Mark = Mark {
    request: 0,
    by: 0,
    value: 0,
    issued: 0,
    done: Some(0),
    is_durable: true,
    is_maybe: false,
};

impl GuestOracle {
    /// The disk has this many sectors now; new ones hold zeros.
    pub fn resize(&mut self, sectors: u64) {
        self.sectors.resize(sectors as usize, vec![ORIGIN]);
    }

    /// Something is issued now.
    pub fn moment(&mut self) -> Moment {
        self.now += 1;
        self.now
    }

    /// `request` is to leave `value` in these sectors; `is_sure` unless it may leave some of them alone.
    pub fn write(&mut self, request: u64, sectors: std::ops::Range<u64>, value: u64, is_sure: bool) {
        self.write_by(0, request, sectors, value, is_sure);
    }

    /// The same, through the attachment `by`.
    pub fn write_by(
        &mut self,
        by: u64,
        request: u64,
        sectors: std::ops::Range<u64>,
        value: u64,
        is_sure: bool,
    ) {
        let issued = self.moment();
        for sector in sectors {
            self.sectors[sector as usize].push(Mark {
                request,
                by,
                value,
                issued,
                done: None,
                is_durable: false,
                is_maybe: !is_sure,
            });
        }
    }

    /// `request` is completed: surely done, or, where the guest was told of an error, perhaps.
    pub fn complete(
        &mut self,
        request: u64,
        sectors: std::ops::Range<u64>,
        is_durable: bool,
        is_error: bool,
    ) {
        let now = self.moment();
        for sector in sectors {
            for mark in &mut self.sectors[sector as usize] {
                if mark.request == request && mark.done.is_none() {
                    mark.done = Some(now);
                    mark.is_maybe |= is_error;
                    mark.is_durable = is_durable && !mark.is_maybe;
                }
            }
        }
    }

    /// A flush that was issued at `issued` is completed. `oldest_read` is when the oldest read that still waits
    /// was issued: what it may return is remembered.
    pub fn flushed(&mut self, issued: Moment, oldest_read: Moment) {
        self.flushed_by(u64::MAX, issued, oldest_read);
    }

    /// The same, asked through the attachment `by`: it answers for what was written through it and those before.
    pub fn flushed_by(&mut self, by: u64, issued: Moment, oldest_read: Moment) {
        for history in &mut self.sectors {
            for mark in history.iter_mut() {
                let is_covered = mark.by <= by && mark.done.is_some_and(|done| done < issued);
                mark.is_durable |= !mark.is_maybe && is_covered;
            }
            if history.len() > 1 {
                let newest = history
                    .iter()
                    .filter(|w| w.is_durable && w.done.is_some_and(|done| done < oldest_read))
                    .map(|w| w.issued)
                    .max();
                if let Some(newest) = newest {
                    history.retain(|v| v.done.is_none_or(|done| done >= newest));
                }
            }
        }
    }

    /// Checks one sector of a read that was issued at `issued` and is completed now, and settles it if there is a
    /// quorum that can be held to it.
    pub fn read(&mut self, sector: u64, value: u64, issued: Moment, has_quorum: bool) -> Result<(), String> {
        let now = self.now;
        let history = &mut self.sectors[sector as usize];
        let newest = history
            .iter()
            .filter(|w| !w.is_maybe && w.done.is_some_and(|done| done < issued))
            .map(|w| w.issued)
            .max()
            .unwrap_or(0);
        let is_current = |v: &Mark| v.done.is_none_or(|done| done >= newest);
        if !history.iter().any(|v| v.value == value && is_current(v)) {
            let allowed: Vec<u64> = history
                .iter()
                .filter(|v| is_current(v))
                .map(|v| v.value)
                .collect();
            return Err(format!(
                "sector {sector} holds version {value}, allowed are {allowed:?}; history {history:?}, read issued at {issued}"
            ));
        }
        let is_alone = has_quorum && history.iter().all(|v| v.done.is_some_and(|done| done < issued));
        if is_alone && history.len() > 1 {
            settle(history, value, now, is_current);
        }
        Ok(())
    }

    /// By sector, every value that is there now or may come to be by what is under way.
    pub fn possible(&self) -> Vec<Vec<u64>> {
        let of = |history: &Vec<Mark>| {
            let is_sure = |w: &&Mark| !w.is_maybe && w.done.is_some();
            let newest = history
                .iter()
                .filter(is_sure)
                .map(|w| w.issued)
                .max()
                .unwrap_or(0);
            let current = history
                .iter()
                .filter(|v| v.done.is_none_or(|done| done >= newest));
            current.map(|v| v.value).collect()
        };
        self.sectors.iter().map(of).collect()
    }

    /// Whether the sector may hold zeros or nothing for a question issued at `issued`.
    pub fn may_be_empty(&self, sector: u64, issued: Moment) -> bool {
        let history = &self.sectors[sector as usize];
        let newest = history
            .iter()
            .filter(|w| !w.is_maybe && w.done.is_some_and(|done| done < issued))
            .map(|w| w.issued)
            .max()
            .unwrap_or(0);
        history
            .iter()
            .any(|v| v.value == 0 && v.done.is_none_or(|done| done >= newest))
    }

    /// Power is lost everywhere, the guest is gone with its requests.
    pub fn lose_power(&mut self) {
        let now = self.moment();
        for mark in self.sectors.iter_mut().flatten() {
            if !mark.is_durable {
                mark.is_maybe = true;
                mark.done = Some(mark.done.unwrap_or(now));
            }
        }
    }

    /// Power is lost at some disks only: what was not flushed is doubtful, what is under way stays so.
    pub fn lose_some_power(&mut self) {
        for mark in self.sectors.iter_mut().flatten() {
            mark.is_maybe |= !mark.is_durable;
        }
    }
}

/// `value` was seen with nothing under way: the youngest current mark of it is what happened last.
fn settle(history: &mut [Mark], value: u64, now: Moment, is_current: impl Fn(&Mark) -> bool) {
    let seen = history
        .iter_mut()
        .rev()
        .find(|v| v.value == value && is_current(v))
        .expect("just checked");
    seen.is_maybe = false;
    seen.issued = now;
    seen.done = Some(now);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn oracle() -> GuestOracle {
        let mut oracle = GuestOracle::default();
        oracle.resize(4);
        oracle
    }

    fn read(oracle: &mut GuestOracle, value: u64) -> Result<(), String> {
        let issued = oracle.moment();
        oracle.moment();
        oracle.read(1, value, issued, true)
    }

    #[test]
    fn a_completed_write_is_what_reads_see() {
        let mut oracle = oracle();
        assert!(read(&mut oracle, 0).is_ok());
        oracle.write(1, 0..2, 7, true);
        let early = oracle.moment();
        assert!(read(&mut oracle, 0).is_ok());
        assert!(read(&mut oracle, 7).is_ok());
        oracle.complete(1, 0..2, false, false);
        assert!(read(&mut oracle, 0).is_err());
        assert!(read(&mut oracle, 7).is_ok());
        assert!(read(&mut oracle, 8).is_err());
        assert!(
            oracle.read(0, 0, early, true).is_ok(),
            "a read that began before the end"
        );
    }

    #[test]
    fn of_two_writes_at_once_either_may_last_until_a_read_settles_it() {
        let mut oracle = oracle();
        oracle.write(1, 1..2, 7, true);
        oracle.write(2, 1..2, 8, true);
        oracle.complete(2, 1..2, false, false);
        oracle.complete(1, 1..2, false, false);
        assert!(read(&mut oracle, 0).is_err());
        assert!(read(&mut oracle, 8).is_ok());
        assert!(read(&mut oracle, 7).is_err(), "it was 8 a moment ago");
    }

    #[test]
    fn a_read_without_a_quorum_settles_nothing_and_still_must_not_lie() {
        let mut oracle = oracle();
        oracle.write(1, 1..2, 7, true);
        oracle.complete(1, 1..2, true, false);
        oracle.write(2, 1..2, 8, true);
        oracle.lose_power();
        let issued = oracle.moment();
        oracle.moment();
        assert!(oracle.read(1, 7, issued, false).is_ok());
        assert!(oracle.read(1, 0, issued, false).is_err());
        assert!(
            read(&mut oracle, 8).is_ok(),
            "the quorum decided that it happened"
        );
        assert!(read(&mut oracle, 7).is_err());
    }

    #[test]
    fn power_loss_takes_what_no_flush_covered_and_nothing_else() {
        let mut oracle = oracle();
        oracle.write(1, 1..2, 7, true);
        oracle.complete(1, 1..2, false, false);
        let flush = oracle.moment();
        oracle.write(2, 1..2, 8, true);
        oracle.complete(2, 1..2, false, false);
        oracle.flushed(flush, Moment::MAX);
        oracle.lose_power();
        assert!(read(&mut oracle, 0).is_err());
        assert!(read(&mut oracle, 7).is_ok());
        assert!(read(&mut oracle, 8).is_err(), "settled as 7");
        oracle.write(3, 1..2, 9, true);
        oracle.complete(3, 1..2, true, false);
        oracle.lose_power();
        assert!(read(&mut oracle, 7).is_err());
        assert!(read(&mut oracle, 9).is_ok());
    }
}
