//! Histograms: cells that one worker writes and anybody reads.
//!
//! Values are counted by Envoy's default bounds. Where the bootstrap asks for others (`histogram_bucket_settings`,
//! [`super::buckets`]), those are known before anything is counted (`also_by`), and every histogram of the process is
//! counted by all of them as well; which of them one is shown with is decided when it is shown. So what is shown is exact,
//! whatever its name matches, and nobody's name is looked at while requests are counted.

use std::sync::Arc;

use parking_lot::RwLock;

use super::series::Cell;

/// Istio's bucket bounds, for milliseconds and bytes alike.
pub const BOUNDS: [f64; 19] = [
    0.5,
    1.0,
    5.0,
    10.0,
    25.0,
    50.0,
    100.0,
    250.0,
    500.0,
    1_000.0,
    2_500.0,
    5_000.0,
    10_000.0,
    30_000.0,
    60_000.0,
    300_000.0,
    600_000.0,
    1_800_000.0,
    3_600_000.0,
];
/// The same in thousandths, as values are counted.
const THOUSANDTHS: [u64; BOUNDS.len()] = {
    let mut out = [0; BOUNDS.len()];
    let mut index = 0;
    while index < out.len() {
        out[index] = (BOUNDS[index] * 1000.0) as u64;
        index += 1;
    }
    out
};

/// Bounds beside the default ones that the process counts by, and those; none where nobody asked for any.
static MORE: RwLock<Option<Arc<[f64]>>> = RwLock::new(None);

/// Whatever is made from now on is counted by these bounds as well.
pub(crate) fn also_by(bounds: impl IntoIterator<Item = f64>) {
    let mut more = MORE.write();
    let mut all: Vec<f64> = more.as_deref().unwrap_or(&BOUNDS).to_vec();
    let before = all.len();
    all.extend(bounds);
    all.sort_by(f64::total_cmp);
    all.dedup();
    if all.len() > before {
        *more = Some(all.into());
    }
}

/// The same values by more bounds.
#[derive(Debug)]
struct Fine {
    bounds: Arc<[f64]>,
    buckets: Box<[Cell]>,
}

impl Fine {
    fn new() -> Option<Box<Self>> {
        let bounds = MORE.read().clone()?;
        let buckets = (0..=bounds.len()).map(|_| Cell::default()).collect();
        Some(Box::new(Self { bounds, buckets }))
    }
}

/// See the module.
#[derive(Debug)]
pub struct Histogram {
    buckets: [Cell; BOUNDS.len() + 1],
    /// In thousandths, so that half milliseconds add up exactly.
    sum_thousandths: Cell,
    fine: Option<Box<Fine>>,
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            buckets: Default::default(),
            sum_thousandths: Cell::default(),
            fine: Fine::new(),
        }
    }
}

impl Histogram {
    /// Counts a value given in thousandths of the unit.
    pub fn observe_thousandths(&self, value: u64) {
        let index = THOUSANDTHS.partition_point(|bound| *bound < value);
        self.buckets[index].add(1);
        self.sum_thousandths.add(value);
        if let Some(fine) = &self.fine {
            let index = fine
                .bounds
                .partition_point(|bound| *bound * 1000.0 < value as f64);
            fine.buckets[index].add(1);
        }
    }

    /// Adds the current content to `into`.
    pub fn read(&self, into: &mut HistogramValue) {
        let first = into.count() == 0;
        for (cell, sum) in self.buckets.iter().zip(&mut into.buckets) {
            *sum += cell.get();
        }
        into.sum += self.sum_thousandths.get() as f64 / 1000.0;
        let read = self.fine.as_deref().map(|fine| Own {
            bounds: fine.bounds.clone(),
            buckets: fine.buckets.iter().map(Cell::get).collect(),
        });
        match (&mut into.own, read) {
            (Some(own), Some(read)) if Arc::ptr_eq(&own.bounds, &read.bounds) => {
                own.buckets
                    .iter_mut()
                    .zip(&read.buckets)
                    .for_each(|(to, more)| *to += more);
            }
            (own @ None, Some(read)) if first => *own = Some(Box::new(read)),
            // Some of it was counted before these bounds were asked for.
            (own, _) => *own = None,
        }
    }
}

/// Counts by other bounds than the default ones, and by the others again.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Own {
    bounds: Arc<[f64]>,
    buckets: Vec<u64>,
}

/// A histogram as read.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HistogramValue {
    /// Counts per bucket of [`BOUNDS`], not cumulated; the last is what lies above every bound.
    pub buckets: [u64; BOUNDS.len() + 1],
    /// Sum of values.
    pub sum: f64,
    /// By what it is shown, where that is not [`BOUNDS`].
    pub(super) own: Option<Box<Own>>,
}

impl HistogramValue {
    /// Number of values.
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// The bounds that it is shown by, each with how many values lie between it and the one before.
    pub fn shown(&self) -> impl Iterator<Item = (f64, u64)> {
        let (bounds, buckets) = self.parts();
        bounds.iter().copied().zip(buckets.iter().copied())
    }

    /// How many values lie above all of these bounds, and the highest of them.
    pub fn above(&self) -> (f64, u64) {
        let (bounds, buckets) = self.parts();
        let last = bounds.last().copied().unwrap_or_default();
        (last, buckets.last().copied().unwrap_or_default())
    }

    fn parts(&self) -> (&[f64], &[u64]) {
        match &self.own {
            Some(own) => (&own.bounds, &own.buckets),
            None => (&BOUNDS, &self.buckets),
        }
    }

    /// From now on it is shown by these bounds, or by the default ones. Those that it was not counted by, which are not among
    /// those that `also_by` was told of, are shown with what is known to lie below them.
    pub(crate) fn show_by(&mut self, bounds: Option<&Arc<[f64]>>) {
        let Some(wanted) = bounds else {
            self.own = None;
            return;
        };
        let mut buckets = vec![0; wanted.len() + 1];
        for (upper, count) in self.shown() {
            // What lies below a bound lies below the next of the wanted ones.
            buckets[wanted.partition_point(|bound| *bound < upper)] += count;
        }
        buckets[wanted.len()] += self.above().1;
        self.own = Some(Box::new(Own {
            bounds: wanted.clone(),
            buckets,
        }));
    }

    /// Adds what another process counted, or takes it away (`sign` below zero). That is known by the default bounds only.
    pub(crate) fn add(&mut self, other: &Self, sign: f64) {
        let change = |to: &mut u64, more: u64| {
            *to = if sign < 0.0 {
                to.saturating_sub(more)
            } else {
                to.saturating_add(more)
            };
        };
        for (to, more) in self.buckets.iter_mut().zip(&other.buckets) {
            change(to, *more);
        }
        if let Some(own) = &mut self.own {
            for (index, more) in other.buckets.iter().enumerate() {
                let at = BOUNDS.get(index).map_or(own.bounds.len(), |upper| {
                    own.bounds.partition_point(|bound| bound < upper)
                });
                change(&mut own.buckets[at], *more);
            }
        }
        self.sum = (self.sum + sign * other.sum).max(0.0);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn whatever_bounds_are_asked_for_as_many_values_lie_below_each_as_were_counted(
            bounds in proptest::collection::btree_set(1u32..100_000, 1..12),
            values in proptest::collection::vec(0u64..200_000_000, 0..200),
        ) {
            let bounds: Arc<[f64]> = bounds.iter().map(|bound| f64::from(*bound) / 4.0).collect();
            also_by(bounds.iter().copied());
            let workers = [Histogram::default(), Histogram::default()];
            for (index, value) in values.iter().enumerate() {
                workers[index % 2].observe_thousandths(*value);
            }
            let mut read = HistogramValue::default();
            for worker in &workers {
                worker.read(&mut read);
            }
            let below = |bound: f64| values.iter().filter(|value| **value as f64 <= bound * 1000.0).count() as u64;
            for wanted in [Some(&bounds), None] {
                // A test beside this one may have asked for more bounds between the two.
                if workers.iter().all(|worker| worker.fine.is_some()) && read.own.is_none() && !values.is_empty() {
                    return Ok(());
                }
                let mut shown = read.clone();
                shown.show_by(wanted);
                let mut sum = 0;
                let all: Vec<_> = shown.shown().collect();
                prop_assert_eq!(all.len(), wanted.map_or(BOUNDS.len(), |wanted| wanted.len()));
                for (bound, count) in all {
                    sum += count;
                    prop_assert_eq!(sum, below(bound), "{}", bound);
                }
                prop_assert_eq!(sum + shown.above().1, values.len() as u64);
                prop_assert_eq!(shown.count(), values.len() as u64);
            }
        }
    }

    #[test]
    fn what_another_process_counted_is_added_to_the_bounds_that_are_shown() {
        let mut value = HistogramValue::default();
        value.show_by(Some(&Arc::from([1.0, 60.0])));
        let mut other = HistogramValue::default();
        (other.buckets[0], other.buckets[4], other.buckets[19]) = (3, 2, 1);
        value.add(&other, 1.0);
        assert_eq!(value.shown().collect::<Vec<_>>(), [(1.0, 3), (60.0, 2)]);
        assert_eq!((value.above().1, value.count()), (1, 6));
        value.add(&other, -1.0);
        assert_eq!(value.count(), 0);
        assert!(value.shown().all(|(_, count)| count == 0));
    }
}
