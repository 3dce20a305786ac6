//! The primary's latencies as they have been lately: what "slow" means for the next batch is read here, before the batch
//! is looked at, so that the judges of latency stay valid.

use serde::{Deserialize, Serialize};

use crate::sample::{Histogram, Sample};

/// Most buckets that are kept; a finer histogram is taken together.
pub const BUCKETS_MAX: usize = 64;
/// After this many requests of the primary an observation counts `1/e` as much. Enough for a hundred beyond the p99,
/// and a day's change of habits is forgotten in minutes.
const MEMORY: f64 = 10_000.0;
/// What has decayed to this is none.
const FORGOTTEN: f32 = 1e-3;

/// Exponentially forgotten bucket counts of the primary.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Running {
    /// Single precision: it only chooses a bound, and is short in a status.
    counts: Vec<f32>,
    /// A fingerprint of the bounds that the counts belong to.
    bounds: u64,
}

impl Running {
    /// Observations remembered.
    pub fn total(&self) -> f64 {
        self.counts.iter().map(|count| f64::from(*count)).sum()
    }

    /// Whether what is remembered has these bounds.
    pub fn matches(&self, histogram: &Histogram) -> bool {
        !self.counts.is_empty()
            && self.counts.len() == histogram.counts.len()
            && self.bounds == fingerprint(&histogram.bounds_ms)
    }

    /// Takes in the primary's part of a batch, after the batch was judged. Other bounds than before: starts anew.
    pub fn remember(&mut self, histogram: &Histogram) {
        if histogram.counts.len() != histogram.bounds_ms.len() + 1 || histogram.counts.len() > BUCKETS_MAX {
            return;
        }
        let new = histogram.total() as f64;
        if new == 0.0 {
            return;
        }
        if !self.matches(histogram) {
            self.bounds = fingerprint(&histogram.bounds_ms);
            self.counts = vec![0.0; histogram.counts.len()];
        }
        let keep = (-new / MEMORY).exp();
        for (mine, theirs) in self.counts.iter_mut().zip(&histogram.counts) {
            *mine = (f64::from(*mine) * keep + *theirs as f64) as f32;
        }
    }

    /// Share of the primary's requests above each bucket's lower edge: first 1, never quite 0.
    pub fn survival(&self) -> Survival {
        let scale = 1.0 / (self.total() + 1.0);
        let mut survival = Survival {
            shares: [0.0; BUCKETS_MAX],
            buckets: self.counts.len().min(BUCKETS_MAX),
            total: self.total(),
            first: self
                .counts
                .iter()
                .position(|count| *count > FORGOTTEN)
                .unwrap_or(0),
            last: self
                .counts
                .iter()
                .rposition(|count| *count > FORGOTTEN)
                .unwrap_or(0),
        };
        let mut above = 0.5;
        for (share, count) in survival.shares.iter_mut().zip(&self.counts).rev() {
            above += f64::from(*count);
            *share = (above * scale).min(1.0);
        }
        survival.shares[0] = 1.0;
        survival
    }
}

/// The primary's distribution at one moment, on the stack: judges read it at every batch.
#[derive(Clone, Copy, Debug)]
pub struct Survival {
    shares: [f64; BUCKETS_MAX],
    buckets: usize,
    total: f64,
    /// The first and the last bucket that hold anything.
    first: usize,
    last: usize,
}

impl Survival {
    /// Share above the lower edge of each bucket, falling from 1.
    pub fn shares(&self) -> &[f64] {
        self.shares.get(..self.buckets).unwrap_or_default()
    }

    /// The first and the last bucket that hold anything.
    pub const fn support(&self) -> (usize, usize) {
        (self.first, self.last)
    }

    /// Observations that it rests on.
    pub const fn total(&self) -> f64 {
        self.total
    }

    /// The bound beyond which the share of the primary's requests is nearest to `1 − quantile`, as an index, with that
    /// share. `None` until enough is known: five requests beyond the quantile.
    pub fn bound_near(&self, quantile: f64) -> Option<(usize, f64)> {
        let tail = (1.0 - quantile).max(1e-6);
        if self.total * tail < 5.0 {
            return None;
        }
        // The share above bound i is that above the lower edge of bucket i + 1.
        let shares = self.shares().get(1..)?;
        // They fall: the nearest is one of the two around the quantile; of equal ones, the lowest bound.
        let after = shares.partition_point(|share| *share > tail);
        let index = match (after.checked_sub(1), shares.get(after)) {
            // Nearest by ratio: tails are compared by how many times as much they hold.
            (Some(before), Some(share)) if shares[before] / tail > tail / share => after,
            (Some(before), _) => shares.partition_point(|share| *share > shares[before]),
            (None, Some(_)) => after,
            (None, None) => return None,
        };
        Some((index, shares[index]))
    }
}

/// Durations of both arms in one batch and what was known of the primary before it, made ready once for all judges of
/// latency.
#[derive(Debug)]
pub struct Durations<'s> {
    pub(crate) canary: std::borrow::Cow<'s, Histogram>,
    pub(crate) primary: std::borrow::Cow<'s, Histogram>,
    pub(crate) canary_total: u64,
    pub(crate) primary_total: u64,
    /// `None` while nothing is known of the primary in these buckets.
    pub(crate) known: Option<Survival>,
}

impl<'s> Durations<'s> {
    /// Those of a batch, with what is known of the primary before it.
    pub fn of(sample: &'s Sample, primary: &Running) -> Self {
        let (theirs, ours) = (coarse(&sample.primary.latency), coarse(&sample.canary.latency));
        let comparable = theirs.bounds_ms == ours.bounds_ms && primary.matches(&theirs);
        Self {
            canary_total: ours.total(),
            primary_total: theirs.total(),
            canary: ours,
            primary: theirs,
            known: comparable.then(|| primary.survival()),
        }
    }
}

/// A histogram with at most [`BUCKETS_MAX`] buckets: neighbours are taken together, which keeps every remaining bound
/// exact.
pub(crate) fn coarse(histogram: &Histogram) -> std::borrow::Cow<'_, Histogram> {
    if histogram.counts.len() <= BUCKETS_MAX {
        return std::borrow::Cow::Borrowed(histogram);
    }
    let stride = histogram.counts.len().div_ceil(BUCKETS_MAX);
    let counts: Vec<u64> = histogram
        .counts
        .chunks(stride)
        .map(|chunk| chunk.iter().sum())
        .collect();
    let bounds_ms = (1..counts.len())
        .filter_map(|bucket| histogram.bounds_ms.get(bucket * stride - 1).copied())
        .collect();
    std::borrow::Cow::Owned(Histogram { bounds_ms, counts })
}

/// FNV-1a over the bounds.
fn fingerprint(bounds: &[f64]) -> u64 {
    let hash = bounds.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, bound| {
        (hash ^ bound.to_bits()).wrapping_mul(0x0000_0100_0000_01b3)
    });
    // 53 bits survive a status that some client reads as JavaScript does.
    hash >> 11
}

#[cfg(test)]
mod tests {
    use super::*;

    fn histogram(counts: &[u64]) -> Histogram {
        let bounds = [10.0, 25.0, 50.0, 100.0, 250.0];
        Histogram {
            bounds_ms: bounds[..counts.len() - 1].to_vec(),
            counts: counts.to_vec(),
        }
    }

    #[test]
    fn the_bound_nearest_to_a_quantile_is_found_and_not_before_enough_is_known() {
        let mut running = Running::default();
        running.remember(&histogram(&[100, 80, 10, 1, 1, 0]));
        assert_eq!(running.survival().bound_near(0.99), None);
        assert_eq!(
            running.survival().bound_near(0.5).map(|(index, _)| index),
            Some(0)
        );
        for _ in 0..10 {
            running.remember(&histogram(&[500, 400, 90, 8, 2, 0]));
        }
        // 1 % of the primary's requests take more than 50 ms.
        assert_eq!(
            running.survival().bound_near(0.99).map(|(index, _)| index),
            Some(2)
        );
        assert_eq!(
            running.survival().bound_near(0.9).map(|(index, _)| index),
            Some(1)
        );
    }

    #[test]
    fn the_bound_that_is_found_is_the_nearest_of_all() {
        let mut running = Running::default();
        running.remember(&histogram(&[700, 0, 200, 0, 90, 10]));
        let survival = running.survival();
        for quantile in [0.1, 0.5, 0.69, 0.71, 0.85, 0.9, 0.97, 0.99] {
            let tail: f64 = 1.0 - quantile;
            let distance = |share: f64| (share.ln() - tail.ln()).abs();
            let shares = &survival.shares()[1..];
            let nearest = shares
                .iter()
                .map(|share| distance(*share))
                .fold(f64::INFINITY, f64::min);
            let (index, share) = survival.bound_near(quantile).unwrap();
            assert!((distance(share) - nearest).abs() < 1e-12, "{quantile}");
            let lowest = shares.iter().position(|other| *other == share);
            assert_eq!(lowest, Some(index), "{quantile}");
        }
    }

    #[test]
    fn what_was_long_ago_is_forgotten_and_other_bounds_start_anew() {
        let mut running = Running::default();
        for _ in 0..100 {
            running.remember(&histogram(&[0, 0, 0, 0, 0, 1000]));
        }
        for _ in 0..100 {
            running.remember(&histogram(&[1000, 0, 0, 0, 0, 0]));
        }
        assert!(running.survival().shares()[1] < 0.001);
        assert!(running.total() < 11_000.0);
        running.remember(&histogram(&[5, 5]));
        assert_eq!(running.total(), 10.0);
    }

    #[test]
    fn a_finer_histogram_is_taken_together_without_losing_an_observation() {
        let fine = Histogram {
            bounds_ms: (1..300).map(f64::from).collect(),
            counts: (0..300).collect(),
        };
        let coarse = coarse(&fine);
        assert!(coarse.counts.len() <= BUCKETS_MAX);
        assert_eq!(coarse.counts.len(), coarse.bounds_ms.len() + 1);
        assert_eq!(coarse.total(), fine.total());
        for bound in &coarse.bounds_ms {
            assert_eq!(coarse.above(*bound), fine.above(*bound));
        }
    }
}
