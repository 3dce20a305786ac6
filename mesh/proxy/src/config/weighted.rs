//! Weighted choice that is exact over any window.
//!
//! Choice number `n` of a total weight `W` goes to the first target when `floor((n+1)·w/W) > floor(n·w/W)`; the others
//! share the remaining choices by the same rule. So any `W` consecutive choices hold every target exactly its weight
//! in times, interleaved as evenly as can be, with no table, no random numbers and no drift. Each worker counts for
//! itself (nothing is shared between threads), starting at a different offset, so the sum over `N` workers is within
//! `N` choices of exact.

use std::sync::atomic::{AtomicU64, Ordering};

/// Weights of at least one target, with a total above zero.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Weights {
    weights: Box<[u32]>,
    total: u64,
}

impl Weights {
    /// `None` if the weights add up to zero.
    pub fn new(weights: impl Into<Box<[u32]>>) -> Option<Self> {
        let weights = weights.into();
        let total = weights.iter().copied().map(u64::from).sum();
        (total > 0).then_some(Self { weights, total })
    }

    /// Sum of the weights: the period of the sequence.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// The target of choice number `n`.
    pub fn pick(&self, n: u64) -> usize {
        let mut n = n % self.total;
        let mut total = self.total;
        let mut last = 0;
        for (index, weight) in self.weights.iter().copied().map(u64::from).enumerate() {
            if weight == 0 {
                continue;
            }
            if weight == total {
                return index;
            }
            // n < total <= k * 2^32 and weight < 2^32; u128 only matters for thousands of huge weights.
            let before = (u128::from(n) * u128::from(weight) / u128::from(total)) as u64;
            let after = (u128::from(n + 1) * u128::from(weight) / u128::from(total)) as u64;
            if after > before {
                return index;
            }
            n -= before;
            total -= weight;
            last = index;
        }
        last
    }
}

/// One counter per worker, each on a cache line of its own.
#[derive(Debug)]
pub struct Turn(Box<[Line]>);

#[derive(Debug)]
#[repr(align(64))]
struct Line(AtomicU64);

impl Turn {
    /// Counters for `workers` workers over a period of `total`, spread over the period from `offset` on, so that
    /// frequent reconfiguration does not favour whatever comes first.
    pub fn new(workers: usize, total: u64, offset: u64) -> Self {
        let step = (total / workers.max(1) as u64).max(1);
        Self(
            (0..workers.max(1) as u64)
                .map(|worker| Line(AtomicU64::new(offset.wrapping_add(worker * step))))
                .collect(),
        )
    }

    /// The number that `worker` would have next.
    pub fn peek(&self, worker: usize) -> u64 {
        self.0[worker % self.0.len()].0.load(Ordering::Relaxed)
    }

    /// The next number for `worker`. Only that worker writes its counter, hence load and store instead of an atomic
    /// read-modify-write.
    pub fn next(&self, worker: usize) -> u64 {
        let line = &self.0[worker % self.0.len()].0;
        let n = line.load(Ordering::Relaxed);
        line.store(n.wrapping_add(1), Ordering::Relaxed);
        n
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ninety_five_to_five_spreads_the_five_evenly() {
        let weights = Weights::new([95, 5]).unwrap();
        let canary: Vec<u64> = (0..100).filter(|n| weights.pick(*n) == 1).collect();
        assert_eq!(canary.len(), 5);
        assert!(
            canary
                .windows(2)
                .all(|pair| (19..=21).contains(&(pair[1] - pair[0]))),
            "{canary:?}"
        );
    }

    #[test]
    fn weights_that_sum_to_zero_are_no_weights() {
        assert_eq!(Weights::new([0, 0]), None);
        assert_eq!(Weights::new([]), None);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]
        #[test]
        fn every_window_of_the_total_holds_each_target_exactly_its_weight(
            weights in proptest::collection::vec(0u32..60, 1..6),
            start in 0u64..10_000,
        ) {
            let Some(compiled) = Weights::new(weights.clone()) else { return Ok(()) };
            let mut counts = vec![0u32; weights.len()];
            for n in start..start + compiled.total() {
                counts[compiled.pick(n)] += 1;
            }
            prop_assert_eq!(counts, weights);
        }

        #[test]
        fn every_prefix_is_within_the_number_of_targets_of_exact(
            weights in proptest::collection::vec(1u32..1_000, 2..5),
            length in 1u64..500,
        ) {
            let compiled = Weights::new(weights.clone()).unwrap();
            let mut counts = vec![0f64; weights.len()];
            for n in 0..length {
                counts[compiled.pick(n)] += 1.0;
            }
            for (count, weight) in counts.iter().zip(&weights) {
                let exact = length as f64 * f64::from(*weight) / compiled.total() as f64;
                prop_assert!((count - exact).abs() <= weights.len() as f64, "{count} against {exact}");
            }
        }
    }
}
