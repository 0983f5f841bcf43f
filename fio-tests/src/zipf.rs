//! Numbers by Zipf's law: the k-th most popular is asked for in proportion to 1 / k^s.
//!
//! Rejection-inversion (Hörmann and Derflinger, 1996): no table, no sum over all numbers first, and exact.

use crate::random::Random;

/// The law for ranks 1 to `count`.
#[derive(Clone, Debug)]
pub struct Zipf {
    count: f64,
    exponent: f64,
    /// The integral of x^-s up to 1.5, less the first rank's share; and up to the end.
    first: f64,
    last: f64,
    /// Within this of the curve's rank nothing is rejected.
    margin: f64,
}

impl Zipf {
    /// `count` ranks with an exponent above 0, 0.99 being the usual one of storage benchmarks.
    #[must_use]
    pub fn new(count: u64, exponent: f64) -> Zipf {
        assert!(count > 0 && exponent > 0.0, "Zipf of {count} ranks, {exponent}");
        let mut zipf = Zipf {
            count: count as f64,
            exponent,
            first: 0.0,
            last: 0.0,
            margin: 0.0,
        };
        zipf.first = zipf.integral(1.5) - 1.0;
        zipf.last = zipf.integral(zipf.count + 0.5);
        zipf.margin = 2.0 - zipf.inverse(zipf.integral(2.5) - zipf.share(2.0));
        zipf
    }

    /// A rank, from 0: the most popular.
    pub fn rank(&self, random: &mut Random) -> u64 {
        loop {
            let at = self.last + random.unit() * (self.first - self.last);
            let x = self.inverse(at);
            let rank = x.round().clamp(1.0, self.count);
            if rank - x <= self.margin || at >= self.integral(rank + 0.5) - self.share(rank) {
                return rank as u64 - 1;
            }
        }
    }

    fn share(&self, rank: f64) -> f64 {
        (-self.exponent * rank.ln()).exp()
    }

    /// Of x^-s from 1 to `x`; the form holds for an exponent of 1 too.
    fn integral(&self, x: f64) -> f64 {
        let log = x.ln();
        expm1_over((1.0 - self.exponent) * log) * log
    }

    fn inverse(&self, integral: f64) -> f64 {
        let t = (integral * (1.0 - self.exponent)).max(-1.0);
        (ln_1p_over(t) * integral).exp()
    }
}

/// (e^x - 1) / x.
fn expm1_over(x: f64) -> f64 {
    if x.abs() > 1e-8 {
        x.exp_m1() / x
    } else {
        1.0 + x / 2.0
    }
}

/// ln(1 + x) / x.
fn ln_1p_over(x: f64) -> f64 {
    if x.abs() > 1e-8 {
        x.ln_1p() / x
    } else {
        1.0 - x / 2.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_come_in_proportion() {
        for exponent in [0.5, 0.99, 1.0, 1.5] {
            let (count, draws) = (1000, 400_000);
            let zipf = Zipf::new(count, exponent);
            let mut random = Random::new(5);
            let mut seen = vec![0u32; count as usize];
            for _ in 0..draws {
                seen[zipf.rank(&mut random) as usize] += 1;
            }
            let sum: f64 = (1..=count).map(|k| (k as f64).powf(-exponent)).sum();
            for rank in [1u64, 2, 3, 10, 100] {
                let wanted = (rank as f64).powf(-exponent) / sum * f64::from(draws);
                let got = f64::from(seen[rank as usize - 1]);
                // Five standard deviations of a count.
                assert!(
                    (got - wanted).abs() < 5.0 * wanted.sqrt(),
                    "s {exponent}, rank {rank}: {got} of {wanted:.0}"
                );
            }
            let head: u32 = seen[..500].iter().sum();
            let wanted: f64 = (1..=500).map(|k| f64::from(k).powf(-exponent)).sum::<f64>() / sum;
            assert!(
                (f64::from(head) / f64::from(draws) - wanted).abs() < 0.005,
                "s {exponent}"
            );
        }
    }

    #[test]
    fn one_rank_is_always_the_first() {
        let mut random = Random::new(1);
        let zipf = Zipf::new(1, 0.99);
        assert!((0..100).all(|_| zipf.rank(&mut random) == 0));
    }
}
