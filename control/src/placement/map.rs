//! The disks that may be chosen, in two levels, and the choice.
//!
//! First a host is chosen, then a disk in it: a thousand scores a shard instead of twenty-four thousand. A host's
//! weight is the sum of its disks', so a disk still wins in proportion to its own.

use types::{DiskId, ShardId};

use super::{Candidate, TooFewDisks};

/// Candidates, ready to be asked many times: sorted into hosts and zones once.
#[derive(Clone, Debug)]
pub struct DiskMap {
    hosts: Vec<Host>,
    /// Where each disk is: host, then place in it; sorted by disk.
    places: Vec<(DiskId, u32, u32)>,
}

#[derive(Clone, Debug)]
struct Host {
    zone: u32,
    seed: u64,
    /// The sum of its disks'.
    weight: u64,
    disks: Vec<Slot>,
}

#[derive(Clone, Debug)]
struct Slot {
    disk: DiskId,
    seed: u64,
    bytes: u64,
}

/// What a shard has already: disks, the hosts they are in, and those hosts' zones.
#[derive(Default)]
struct Taken {
    disks: Vec<DiskId>,
    hosts: Vec<u32>,
    zones: Vec<u32>,
}

impl DiskMap {
    /// Sorts the candidates. A disk without a host is a host of its own; a host without a zone, a zone of its own. A
    /// host fails as one and is in one zone: where its disks say different ones, in the zone of the first by id that
    /// says any.
    ///
    /// # Panics
    /// When a disk is listed twice.
    #[must_use]
    pub fn new(candidates: &[Candidate]) -> DiskMap {
        let mut sorted: Vec<&Candidate> = candidates.iter().collect();
        sorted.sort_by_key(|candidate| (&candidate.host, candidate.disk));
        let mut names: Vec<&str> = sorted.iter().map(|candidate| &*candidate.zone).collect();
        names.sort_unstable();
        names.dedup();
        let mut map = DiskMap {
            hosts: Vec::new(),
            places: Vec::with_capacity(sorted.len()),
        };
        for group in sorted.chunk_by(|a, b| !a.host.is_empty() && a.host == b.host) {
            map.add_host(group, &names);
        }
        map.places.sort_unstable();
        for pair in map.places.windows(2) {
            assert!(pair[0].0 != pair[1].0, "disk {} twice", pair[0].0);
        }
        map
    }

    fn add_host(&mut self, group: &[&Candidate], zones: &[&str]) {
        let (first, number) = (group[0], self.hosts.len() as u32);
        let named = group.iter().find(|candidate| !candidate.zone.is_empty());
        let zone = named.map_or(zones.len() as u32 + number, |candidate| {
            let at = zones.binary_search(&&*candidate.zone);
            at.expect("every zone is in the list") as u32
        });
        let slots = group.iter().zip(0..).map(|(candidate, at)| {
            self.places.push((candidate.disk, number, at));
            Slot {
                disk: candidate.disk,
                seed: seed(&candidate.disk.0.to_le_bytes()),
                bytes: candidate.bytes,
            }
        });
        let disks: Vec<Slot> = slots.collect();
        let seed = if first.host.is_empty() {
            disks[0].seed
        } else {
            seed(first.host.as_bytes())
        };
        let weight = total(&disks);
        self.hosts.push(Host {
            zone,
            seed,
            weight,
            disks,
        });
    }

    /// From now on this disk has another weight; nothing happens if it is none of the candidates.
    pub fn set_weight(&mut self, disk: DiskId, bytes: u64) {
        if let Some((host, at)) = self.find(disk) {
            let host = &mut self.hosts[host as usize];
            host.disks[at as usize].bytes = bytes;
            host.weight = total(&host.disks);
        }
    }

    /// Chooses `replicas` different disks for `shard`, best first: in different zones as far as there are any, then
    /// on different hosts.
    ///
    /// # Errors
    /// When there are fewer candidates with a weight than replicas.
    pub fn place(&self, shard: ShardId, replicas: usize) -> Result<Vec<DiskId>, TooFewDisks> {
        self.extend(shard, &[], replicas)
    }

    /// Chooses one more disk for `shard`, none of `present`, by the same rule: for a disk that leaves. `present` may
    /// name disks that are no candidates; of those nothing is known.
    ///
    /// # Errors
    /// When there is no further candidate with a weight.
    pub fn replace(&self, shard: ShardId, present: &[DiskId]) -> Result<DiskId, TooFewDisks> {
        Ok(self.extend(shard, present, 1)?[0])
    }

    /// How many of the other disks of a replica set share the host, and the zone, of `disk`: less is better.
    pub(super) fn crowd(&self, disk: DiskId, others: &[DiskId]) -> Option<(usize, usize)> {
        let (host, _) = self.find(disk)?;
        let taken = self.taken(others);
        Some(self.crowd_of(host, &taken))
    }

    fn extend(&self, shard: ShardId, present: &[DiskId], more: usize) -> Result<Vec<DiskId>, TooFewDisks> {
        let mut taken = self.taken(present);
        let scores: Vec<f64> = self
            .hosts
            .iter()
            .map(|host| score(shard, host.seed, host.weight))
            .collect();
        for _ in 0..more {
            let best = self
                .best_apart(&scores, &taken)
                .or_else(|| self.best_of_all(&scores, &taken));
            let Some(host) = best else {
                return Err(self.too_few(present, more));
            };
            let disk = self.hosts[host as usize].best(shard, &taken.disks);
            taken.disks.push(disk);
            taken.hosts.push(host);
            taken.zones.push(self.hosts[host as usize].zone);
        }
        Ok(taken.disks.split_off(present.len()))
    }

    /// The host with the highest score in a zone that holds no replica. One pass that looks at little, because with
    /// a thousand hosts this is nearly all that placement does.
    fn best_apart(&self, scores: &[f64], taken: &Taken) -> Option<u32> {
        let mut best = None;
        let mut highest = 0.0;
        for (number, score) in (0..).zip(scores) {
            if *score > highest {
                let host = &self.hosts[number as usize];
                if !taken.zones.contains(&host.zone) && host.has_room(&taken.disks) {
                    (best, highest) = (Some(number), *score);
                }
            }
        }
        best
    }

    /// The host with the highest score among those with the smallest crowd.
    fn best_of_all(&self, scores: &[f64], taken: &Taken) -> Option<u32> {
        (0..self.hosts.len() as u32)
            .filter(|host| scores[*host as usize] > 0.0 && self.hosts[*host as usize].has_room(&taken.disks))
            .min_by(|a, b| {
                let by_score = scores[*b as usize].total_cmp(&scores[*a as usize]);
                let crowds = self.crowd_of(*a, taken).cmp(&self.crowd_of(*b, taken));
                crowds.then(by_score)
            })
    }

    fn taken(&self, disks: &[DiskId]) -> Taken {
        let mut taken = Taken::default();
        for disk in disks {
            taken.disks.push(*disk);
            if let Some((host, _)) = self.find(*disk) {
                taken.hosts.push(host);
                taken.zones.push(self.hosts[host as usize].zone);
            }
        }
        taken
    }

    /// Replicas in the zone of `host`, and on it.
    fn crowd_of(&self, host: u32, taken: &Taken) -> (usize, usize) {
        let zone = self.hosts[host as usize].zone;
        (
            taken.zones.iter().filter(|taken| **taken == zone).count(),
            taken.hosts.iter().filter(|taken| **taken == host).count(),
        )
    }

    fn find(&self, disk: DiskId) -> Option<(u32, u32)> {
        let at = self.places.binary_search_by_key(&disk, |place| place.0).ok()?;
        Some((self.places[at].1, self.places[at].2))
    }

    fn too_few(&self, present: &[DiskId], more: usize) -> TooFewDisks {
        let usable = self.hosts.iter().flat_map(|host| &host.disks);
        let free = usable.filter(|slot| slot.bytes > 0 && !present.contains(&slot.disk));
        TooFewDisks {
            replicas: present.len() + more,
            disks: present.len() + free.count(),
        }
    }
}

impl Host {
    fn has_room(&self, taken: &[DiskId]) -> bool {
        self.disks
            .iter()
            .any(|slot| slot.bytes > 0 && !taken.contains(&slot.disk))
    }

    fn best(&self, shard: ShardId, taken: &[DiskId]) -> DiskId {
        let free = self
            .disks
            .iter()
            .filter(|slot| slot.bytes > 0 && !taken.contains(&slot.disk));
        // A host of one disk has used the hash of that disk's seed already; with more the seeds differ.
        let best =
            free.max_by(|a, b| score(shard, a.seed, a.bytes).total_cmp(&score(shard, b.seed, b.bytes)));
        best.expect("the host has room").disk
    }
}

fn total(disks: &[Slot]) -> u64 {
    disks.iter().fold(0, |sum, slot| {
        sum.checked_add(slot.bytes)
            .expect("the disks of a host have fewer than 2^64 bytes")
    })
}

/// Spreads names and ids; taken once for each host and disk.
fn seed(name: &[u8]) -> u64 {
    let hash = blake3::hash(name);
    u64::from_le_bytes(hash.as_bytes()[..8].try_into().expect("8 of 32 bytes"))
}

/// Weighted rendezvous score: -weight / ln(u), u uniform in (0, 1). The highest of n such scores belongs to each with
/// probability weight / sum of weights (Schindelhauer and Schomaker 2005, "logarithmic method").
fn score(shard: ShardId, seed: u64, weight: u64) -> f64 {
    let bits = mix(shard.to_u64() ^ mix(seed)) >> 11;
    // 53 bits and a half: never 0 and never 1.
    let uniform = (bits as f64 + 0.5) / (1u64 << 53) as f64;
    -(weight as f64) / uniform.ln()
}

/// The finalizer of SplitMix64 (Steele, Lea and Flood 2014): every bit of the input changes half of the output's.
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
