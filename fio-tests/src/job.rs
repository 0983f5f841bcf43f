//! What is asked of every target: patterns, operations, block sizes, depths.

use serde::Serialize;

use crate::random::Random;

/// Data is stamped and checked in units of this.
pub const PAGE: u64 = 4096;

/// Which offsets follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Pattern {
    /// Each block of the zone as likely as any other, every time.
    Random,
    /// One after the other, from the zone's end back to its beginning.
    Sequential,
}

/// What is done at an offset. One of these is one I/O in all figures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Op {
    /// A read.
    Read,
    /// A write; complete when the device says so.
    Write,
    /// A write, and when it has completed a FLUSH; counted once, when the FLUSH has completed.
    WriteFlush,
}

/// A stretch of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Zone {
    /// First byte.
    pub offset: u64,
    /// Length.
    pub bytes: u64,
}

/// One line of the benchmark.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Job {
    /// Short name for `--jobs`.
    pub name: &'static str,
    /// Name in reports.
    pub title: &'static str,
    /// Which offsets.
    pub pattern: Pattern,
    /// What is done there.
    pub op: Op,
    /// Bytes of one I/O.
    pub block: u64,
    /// I/Os under way at once.
    pub depth: usize,
    /// Where.
    pub zone: Zone,
}

/// The zones of a disk: random jobs keep to the first three quarters, so that the last quarter stays as a
/// sequential writer left it. A log tells the two apart, a file does not.
#[derive(Clone, Copy, Debug)]
pub struct Zones {
    /// Written at random all the time.
    pub random: Zone,
    /// Written sequentially only.
    pub sequential: Zone,
}

impl Zones {
    /// Divides `span` bytes, a multiple of 64 MiB.
    pub fn of(span: u64) -> Zones {
        assert!(span > 0 && span.is_multiple_of(64 << 20), "span of {span} bytes");
        let border = span / 4 * 3;
        Zones {
            random: Zone {
                offset: 0,
                bytes: border,
            },
            sequential: Zone {
                offset: border,
                bytes: span - border,
            },
        }
    }
}

/// All jobs over `span` bytes.
pub fn all(span: u64) -> Vec<Job> {
    let zones = Zones::of(span);
    let random = |name, title, op, depth| Job {
        name,
        title,
        pattern: Pattern::Random,
        op,
        block: PAGE,
        depth,
        zone: zones.random,
    };
    let sequential = |name, title, op, zone| Job {
        name,
        title,
        pattern: Pattern::Sequential,
        op,
        block: 1 << 20,
        depth: 8,
        zone,
    };
    vec![
        random("randread-d1", "4 KiB random read, depth 1", Op::Read, 1),
        random("randread-d32", "4 KiB random read, depth 32", Op::Read, 32),
        random("randwrite-d1", "4 KiB random write, depth 1", Op::Write, 1),
        random("randwrite-d32", "4 KiB random write, depth 32", Op::Write, 32),
        random(
            "writeflush-d1",
            "4 KiB random write + flush, depth 1",
            Op::WriteFlush,
            1,
        ),
        sequential(
            "seqread",
            "1 MiB sequential read, depth 8",
            Op::Read,
            zones.sequential,
        ),
        sequential(
            "seqwrite",
            "1 MiB sequential write, depth 8",
            Op::Write,
            zones.sequential,
        ),
        sequential(
            "seqread-aged",
            "1 MiB sequential read of what was written at random, depth 8",
            Op::Read,
            zones.random,
        ),
    ]
}

/// The offsets of one run, without end.
#[derive(Debug)]
pub struct Offsets {
    pattern: Pattern,
    zone: Zone,
    block: u64,
    next: u64,
    random: Random,
}

impl Offsets {
    /// Random jobs follow `seed`; sequential ones begin at a block it chooses.
    pub fn new(job: &Job, seed: u64) -> Offsets {
        let mut offsets = Offsets::from_start(job.pattern, job.zone, job.block);
        offsets.random = Random::new(seed);
        if job.pattern == Pattern::Sequential {
            offsets.next = offsets.random.below(offsets.blocks());
        }
        offsets
    }

    /// The whole zone in order.
    pub fn from_start(pattern: Pattern, zone: Zone, block: u64) -> Offsets {
        assert!(block.is_multiple_of(PAGE), "blocks of {block} bytes");
        assert!(zone.bytes >= block, "{block} bytes in a zone of {}", zone.bytes);
        Offsets {
            pattern,
            zone,
            block,
            next: 0,
            random: Random::new(0),
        }
    }

    /// Whole blocks in the zone.
    pub fn blocks(&self) -> u64 {
        self.zone.bytes / self.block
    }
}

impl Iterator for Offsets {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        let block = match self.pattern {
            Pattern::Random => self.random.below(self.blocks()),
            Pattern::Sequential => {
                let block = self.next;
                self.next = (block + 1) % self.blocks();
                block
            }
        };
        Some(self.zone.offset + block * self.block)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jobs_stay_in_their_zone() {
        for job in all(1 << 30) {
            let zone = job.zone;
            for offset in Offsets::new(&job, 3).take(5_000) {
                assert!(offset.is_multiple_of(PAGE));
                assert!(offset >= zone.offset, "{}: {offset}", job.name);
                assert!(
                    offset + job.block <= zone.offset + zone.bytes,
                    "{}: {offset}",
                    job.name
                );
            }
        }
    }

    #[test]
    fn sequential_meets_every_block_and_random_most() {
        let zone = Zone {
            offset: 1 << 20,
            bytes: 64 * PAGE,
        };
        let mut seen: Vec<u64> = Offsets::from_start(Pattern::Sequential, zone, PAGE)
            .take(64)
            .collect();
        assert!(seen.is_sorted());
        assert_eq!(seen[0], 1 << 20);
        seen.dedup();
        assert_eq!(seen.len(), 64);
        let job = Job {
            zone,
            ..all(64 << 20).remove(0)
        };
        let mut seen: Vec<u64> = Offsets::new(&job, 1).take(1_000).collect();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), 64);
    }
}
