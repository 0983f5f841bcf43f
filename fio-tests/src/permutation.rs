//! Every block once, in an order that looks random, without a table of them.

use crate::random::Random;

const ROUNDS: usize = 4;

/// A one-to-one map of the numbers below `count` onto themselves: four rounds of a Feistel network over the smallest
/// power of four that holds them, walked on until the result is below `count` (at most four steps on average).
#[derive(Clone, Debug)]
pub struct Permutation {
    count: u64,
    half_bits: u32,
    keys: [u64; ROUNDS],
}

impl Permutation {
    /// The permutation of `seed`; `count` from 1 to 2^62.
    #[must_use]
    pub fn new(count: u64, seed: u64) -> Permutation {
        assert!((1..=1 << 62).contains(&count), "a permutation of {count}");
        let bits = u64::BITS - (count - 1).leading_zeros();
        let mut random = Random::new(seed);
        Permutation {
            count,
            half_bits: bits.div_ceil(2).max(1),
            keys: std::array::from_fn(|_| random.bits()),
        }
    }

    /// How many numbers there are.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Where `number` goes.
    #[must_use]
    pub fn of(&self, number: u64) -> u64 {
        assert!(number < self.count, "{number} of {}", self.count);
        let mut value = number;
        // Ends: the network is one-to-one, so the walk is a cycle that leads back to `number` at the latest.
        loop {
            value = self.step(value);
            if value < self.count {
                return value;
            }
        }
    }

    fn step(&self, value: u64) -> u64 {
        let mask = (1 << self.half_bits) - 1;
        let (mut left, mut right) = (value >> self.half_bits, value & mask);
        for key in self.keys {
            (left, right) = (right, left ^ (Random::new(key ^ right).bits() & mask));
        }
        left << self.half_bits | right
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_comes_once_and_not_in_order() {
        for count in [1, 2, 3, 4, 5, 63, 64, 65, 1000, 4096, 10_007] {
            let permutation = Permutation::new(count, 7);
            let mut seen: Vec<u64> = (0..count).map(|number| permutation.of(number)).collect();
            assert!(count < 63 || !seen.is_sorted(), "{count}");
            seen.sort_unstable();
            assert!(seen.into_iter().eq(0..count), "{count}");
        }
    }

    #[test]
    fn neighbours_are_torn_apart() {
        let count = 1 << 16;
        let permutation = Permutation::new(count, 1);
        let mean = (1..count)
            .map(|number| permutation.of(number).abs_diff(permutation.of(number - 1)))
            .sum::<u64>()
            / count;
        // Of two independent numbers the mean distance is a third of the range.
        assert!((count * 3 / 10..count * 11 / 30).contains(&mean), "{mean}");
    }

    #[test]
    fn half_of_the_numbers_land_evenly() {
        let count = 1 << 16;
        let permutation = Permutation::new(count, 3);
        let mut leaves = [0u32; 256];
        for number in 0..count / 2 {
            leaves[(permutation.of(number) / 256) as usize] += 1;
        }
        assert!(leaves.iter().all(|used| (80..176).contains(used)), "{leaves:?}");
    }
}
