//! How long requests take: models, and histograms drawn from them exactly.

use serin_analysis::Histogram;

use crate::random::Random;

/// Upper bounds of the buckets in milliseconds: those of the mesh's own histograms (Istio's).
pub const BOUNDS_MS: [f64; 20] = [
    0.5,
    1.0,
    5.0,
    10.0,
    25.0,
    50.0,
    100.0,
    250.0,
    500.0,
    1000.0,
    2500.0,
    5000.0,
    10_000.0,
    30_000.0,
    60_000.0,
    300_000.0,
    600_000.0,
    1_800_000.0,
    3_600_000.0,
    7_200_000.0,
];

/// A distribution of durations.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Latency {
    /// `ln` of the duration is normal.
    LogNormal {
        /// Median in milliseconds.
        median_ms: f64,
        /// Standard deviation of `ln`.
        sigma: f64,
    },
    /// A cache: a share of hits, both parts log-normal.
    Bimodal {
        /// Median of a hit.
        hit_ms: f64,
        /// Median of a miss.
        miss_ms: f64,
        /// Share of misses.
        misses: f64,
    },
    /// A Pareto tail (no variance for `shape` up to 2).
    HeavyTail {
        /// Shortest duration in milliseconds.
        least_ms: f64,
        /// Exponent.
        shape: f64,
    },
}

impl Latency {
    /// Share of requests that take at most `ms`.
    pub fn share_within(self, ms: f64) -> f64 {
        let log_normal = |median: f64, sigma: f64| normal_below((ms / median).ln() / sigma);
        match self {
            Self::LogNormal { median_ms, sigma } => log_normal(median_ms, sigma),
            Self::Bimodal {
                hit_ms,
                miss_ms,
                misses,
            } => (1.0 - misses) * log_normal(hit_ms, 0.4) + misses * log_normal(miss_ms, 0.4),
            Self::HeavyTail { least_ms, shape } => {
                if ms <= least_ms {
                    0.0
                } else {
                    1.0 - (least_ms / ms).powf(shape)
                }
            }
        }
    }

    /// The same with every duration multiplied.
    pub fn slower(self, factor: f64) -> Self {
        match self {
            Self::LogNormal { median_ms, sigma } => Self::LogNormal {
                median_ms: median_ms * factor,
                sigma,
            },
            Self::Bimodal {
                hit_ms,
                miss_ms,
                misses,
            } => Self::Bimodal {
                hit_ms: hit_ms * factor,
                miss_ms: miss_ms * factor,
                misses,
            },
            Self::HeavyTail { least_ms, shape } => Self::HeavyTail {
                least_ms: least_ms * factor,
                shape,
            },
        }
    }

    /// Buckets, ready to draw from.
    pub fn buckets(self) -> Buckets {
        let mut left = 1.0;
        let mut below = 0.0;
        let mut conditional = Vec::with_capacity(BOUNDS_MS.len());
        for bound in BOUNDS_MS {
            let within = self.share_within(bound);
            let share = (within - below).max(0.0);
            conditional.push(if left > 0.0 { (share / left).min(1.0) } else { 1.0 });
            left -= share;
            below = within;
        }
        Buckets { conditional }
    }
}

/// Probability of each bucket, given that the duration is in none before it.
#[derive(Clone, Debug)]
pub struct Buckets {
    conditional: Vec<f64>,
}

impl Buckets {
    /// A histogram of `n` independent requests: multinomial, drawn as a chain of binomials.
    pub fn draw(&self, n: u64, random: &mut Random, into: &mut Histogram) {
        if into.counts.is_empty() {
            *into = Histogram::new(BOUNDS_MS.to_vec());
        }
        let mut left = n;
        for (count, &p) in into.counts.iter_mut().zip(&self.conditional) {
            if left == 0 {
                return;
            }
            let here = random.binomial(left, p);
            *count += here;
            left -= here;
        }
        if let Some(count) = into.counts.last_mut() {
            *count += left;
        }
    }
}

/// Share of a standard normal below `x`.
pub fn normal_below(x: f64) -> f64 {
    0.5 * statrs::function::erf::erfc(-x / std::f64::consts::SQRT_2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn histograms_have_the_models_quantiles() {
        let mut random = Random::new(5);
        for latency in [
            Latency::LogNormal {
                median_ms: 40.0,
                sigma: 0.6,
            },
            Latency::Bimodal {
                hit_ms: 5.0,
                miss_ms: 200.0,
                misses: 0.1,
            },
            Latency::HeavyTail {
                least_ms: 10.0,
                shape: 1.5,
            },
        ] {
            let mut histogram = Histogram::default();
            latency.buckets().draw(200_000, &mut random, &mut histogram);
            assert_eq!(histogram.total(), 200_000);
            let mut below = 0;
            for (count, bound) in histogram.counts.iter().zip(BOUNDS_MS) {
                below += count;
                let share = below as f64 / 200_000.0;
                assert!(
                    (share - latency.share_within(bound)).abs() < 0.005,
                    "{latency:?} {bound}"
                );
            }
        }
    }
}
