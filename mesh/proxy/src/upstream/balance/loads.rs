//! How the load is shared out between priorities, and within them between healthy and degraded hosts. Pure.
//!
//! Envoy's rules: a priority takes as much as its usable part times the overprovisioning factor allows; healthy hosts of
//! all priorities first, then degraded ones. Only where all of them together cannot carry everything may a priority
//! panic; where all of them do, each takes as much as it has hosts, however they are.

/// Hosts of one priority.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Health {
    /// Healthy.
    pub healthy: usize,
    /// Usable, but degraded.
    pub degraded: usize,
    /// All.
    pub total: usize,
}

impl Health {
    fn share(&self, count: usize, overprovisioning: u32) -> usize {
        (count * overprovisioning as usize)
            .checked_div(self.total)
            .unwrap_or(0)
            .min(100)
    }

    /// What it can carry, in percent.
    pub(super) fn availability(&self, overprovisioning: u32) -> usize {
        self.share(self.healthy + self.degraded, overprovisioning)
    }

    /// Whether fewer than `threshold` percent are usable.
    pub(super) fn below(&self, threshold: f64) -> bool {
        ((self.healthy + self.degraded) as f64) * 100.0 < threshold * self.total as f64
    }
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Loads {
    health: Vec<Health>,
    /// Percent by priority: healthy hosts of all, then degraded hosts of all.
    shares: Vec<usize>,
    availability: usize,
}

impl Loads {
    /// `avoided` has a bit for each priority that gets nothing, unless that leaves nobody. A priority panics below
    /// `threshold` percent.
    pub(super) fn new(
        levels: impl Iterator<Item = Health>,
        overprovisioning: u32,
        threshold: f64,
        avoided: u128,
    ) -> Self {
        let health: Vec<Health> = levels.collect();
        let mut out = Self::share_out(&health, overprovisioning, avoided);
        let mut left = avoided;
        if out.availability == 0 && avoided != 0 {
            out = Self::share_out(&health, overprovisioning, 0);
            left = 0;
        }
        let panics = |level: &Health| level.total == 0 || level.below(threshold);
        if left == 0 && out.may_panic() && threshold > 0.0 && health.iter().all(panics) {
            out.shares = Self::by_number(&health);
        }
        out.health = health;
        out
    }

    /// Percent by the number of hosts; what rounding left over goes to the first priority that has any.
    fn by_number(health: &[Health]) -> Vec<usize> {
        let hosts: usize = health.iter().map(|level| level.total).sum();
        let mut out: Vec<usize> = health
            .iter()
            .map(|level| (100 * level.total).checked_div(hosts).unwrap_or(0))
            .collect();
        let left = 100 - out.iter().sum::<usize>();
        if let Some(first) = health.iter().position(|level| level.total > 0) {
            out[first] += left;
        }
        out
    }

    fn share_out(health: &[Health], overprovisioning: u32, avoided: u128) -> Self {
        let usable = |index: usize| index >= 128 || avoided & (1 << index) == 0;
        let shares = |count: fn(&Health) -> usize| {
            health.iter().enumerate().map(move |(index, level)| {
                if usable(index) {
                    level.share(count(level), overprovisioning)
                } else {
                    0
                }
            })
        };
        let all: Vec<usize> = shares(|level| level.healthy)
            .chain(shares(|level| level.degraded))
            .collect();
        let availability = all.iter().sum::<usize>().min(100);
        let mut left = 100;
        let mut out: Vec<usize> = all
            .iter()
            .map(|share| {
                let taken = (share * 100).checked_div(availability).unwrap_or(0).min(left);
                left -= taken;
                taken
            })
            .collect();
        // What rounding left over goes to the first that gets anything.
        if let Some(first) = out.iter_mut().find(|share| **share > 0) {
            *first += left;
        }
        Self {
            health: Vec::new(),
            shares: out,
            availability,
        }
    }

    /// A priority, and whether its degraded hosts are meant. `below(n)` draws a number below `n`. `None` where nobody gets
    /// anything.
    pub(super) fn choose(&self, below: impl Fn(usize) -> usize) -> Option<(usize, bool)> {
        let levels = self.health.len();
        let mut point = below(100);
        let index = self.shares.iter().position(|share| {
            let here = point < *share;
            point = point.saturating_sub(*share);
            here
        })?;
        Some((index % levels, index >= levels))
    }

    /// Whether all together cannot carry everything.
    pub(super) fn may_panic(&self) -> bool {
        self.availability < 100
    }

    /// Whether nobody is usable.
    pub(super) fn nobody(&self) -> bool {
        self.availability == 0
    }

    /// Of one priority.
    pub(super) fn health(&self, index: usize) -> Health {
        self.health[index]
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn level(healthy: usize, degraded: usize, total: usize) -> Health {
        Health {
            healthy,
            degraded,
            total,
        }
    }

    fn shares(levels: &[Health], avoided: u128) -> Vec<usize> {
        Loads::new(levels.iter().copied(), 140, 0.0, avoided).shares
    }

    #[test]
    fn the_load_is_shared_out_as_envoys_documentation_tabulates_it() {
        // P0 and P1 of Envoy's table of two priorities, in percent of healthy hosts.
        let cases = [
            ((100, 100), (100, 0)),
            ((72, 72), (100, 0)),
            ((71, 71), (99, 1)),
            ((50, 50), (70, 30)),
            ((25, 100), (35, 65)),
            ((25, 25), (50, 50)),
        ];
        for ((first, second), (one, two)) in cases {
            let got = shares(&[level(first, 0, 100), level(second, 0, 100)], 0);
            assert_eq!(got, [one, two, 0, 0], "{first} and {second} percent healthy");
        }
    }

    #[test]
    fn degraded_hosts_carry_what_the_healthy_of_all_priorities_cannot() {
        assert_eq!(
            shares(&[level(25, 75, 100), level(25, 0, 100)], 0),
            [35, 35, 30, 0]
        );
    }

    #[test]
    fn a_priority_that_was_tried_gets_nothing_unless_nobody_else_is_there() {
        let levels = [level(4, 0, 4), level(4, 0, 4)];
        assert_eq!(shares(&levels, 0b01), [0, 100, 0, 0]);
        assert_eq!(shares(&levels, 0b11), [100, 0, 0, 0]);
    }

    #[test]
    fn where_every_priority_panics_each_takes_as_much_as_it_has_hosts() {
        let by_number = |levels: &[Health], threshold| {
            let loads = Loads::new(levels.iter().copied(), 140, threshold, 0);
            (loads.choose(|_| 56), loads.choose(|_| 58))
        };
        let few = [level(1, 0, 4), level(0, 0, 0), level(0, 0, 3)];
        assert_eq!(by_number(&few, 50.0), (Some((0, false)), Some((2, false))));
        assert_eq!(by_number(&few, 0.0), (Some((0, false)), Some((0, false))));
        let enough = [level(1, 0, 4), level(2, 0, 3)];
        assert_eq!(by_number(&enough, 50.0), (Some((1, false)), Some((1, false))));
        let nobody = [level(0, 0, 4), level(0, 0, 3)];
        assert_eq!(by_number(&nobody, 50.0), (Some((0, false)), Some((1, false))));
        assert_eq!(by_number(&nobody, 0.0), (None, None));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]
        #[test]
        fn all_of_the_load_goes_to_priorities_that_have_usable_hosts(
            levels in proptest::collection::vec((0usize..20, 0usize..20, 0usize..20), 1..5),
            point in 0usize..100,
        ) {
            let levels: Vec<_> = levels
                .into_iter()
                .map(|(healthy, degraded, out)| level(healthy, degraded, healthy + degraded + out))
                .collect();
            let loads = Loads::new(levels.iter().copied(), 140, 0.0, 0);
            if loads.nobody() {
                prop_assert!(levels.iter().all(|level| level.healthy + level.degraded == 0));
            } else {
                prop_assert_eq!(loads.shares.iter().sum::<usize>(), 100);
                let (index, degraded) = loads.choose(|_| point).unwrap();
                let count = if degraded { levels[index].degraded } else { levels[index].healthy };
                prop_assert!(count > 0);
            }
        }
    }
}
