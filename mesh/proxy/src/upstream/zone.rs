//! Zone-aware routing: as many requests as possible stay in the proxy's own zone without overloading its hosts.
//!
//! Envoy's algorithm. What a zone of *callers* holds of all callers (the local cluster) is compared with what it holds
//! of all hosts called. If the own zone has hosts enough for its callers, requests stay. Otherwise as much stays as the
//! zone can carry, and the rest goes to zones that have hosts to spare, in proportion. Everything is in parts of
//! 10,000; nothing here knows hosts, clusters or clocks.

use std::cell::Cell;

use crate::config::balancing::ZoneAware;

/// All of something.
const WHOLE: u64 = 10_000;

/// What is decided for as long as neither side changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ZoneRouting {
    /// Zones do not count.
    Off,
    /// All requests go to the own zone, which is that entry.
    Direct(usize),
    /// Some stay; the rest is spread.
    Residual {
        /// The entry of the own zone.
        own: usize,
        /// How many of 10,000 stay.
        stay: u64,
        /// What zones have to spare, added up.
        spare: Box<[u64]>,
        /// What was decided for the last request, until somebody asks.
        last: Cell<Option<Sent>>,
    },
}

/// Where a request goes of which not all may stay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// To the own zone.
    Stays,
    /// To another one that has hosts to spare.
    Across,
    /// To any zone, since none has hosts to spare: for lack of exactness.
    Anywhere,
}

/// Hosts of one zone on both sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Zone {
    /// Usable hosts of the local cluster (callers).
    pub callers: u64,
    /// Usable hosts, or their weight.
    pub hosts: u64,
    /// Number of usable hosts.
    pub count: u64,
}

/// Decides. `zones` are those of the cluster's first priority, `own` the proxy's among them if it has hosts there,
/// `callers` all of the local cluster.
pub fn decide(rules: &ZoneAware, zones: &[Zone], own: Option<usize>, callers: u64) -> ZoneRouting {
    let count: u64 = zones.iter().map(|zone| zone.count).sum();
    let hosts: u64 = zones.iter().map(|zone| zone.hosts).sum();
    let Some(own) = own.filter(|own| zones[*own].count > 0) else {
        return ZoneRouting::Off;
    };
    if count < rules.min_cluster_size || hosts == 0 {
        return ZoneRouting::Off;
    }
    if rules
        .force_local
        .is_some_and(|least| zones[own].count >= u64::from(least))
    {
        return ZoneRouting::Direct(own);
    }
    if callers == 0 || zones.iter().filter(|zone| zone.count > 0).count() < 2 {
        return ZoneRouting::Off;
    }
    let of_hosts = |zone: &Zone| WHOLE * zone.hosts / hosts;
    let of_callers = |zone: &Zone| WHOLE * zone.callers / callers;
    let (have, need) = (of_hosts(&zones[own]), of_callers(&zones[own]));
    if have >= need {
        return ZoneRouting::Direct(own);
    }
    let mut sum = 0;
    let spare = zones
        .iter()
        .enumerate()
        .map(|(index, zone)| {
            if index != own {
                sum += of_hosts(zone).saturating_sub(of_callers(zone));
            }
            sum
        })
        .collect();
    ZoneRouting::Residual {
        own,
        stay: WHOLE * have / need,
        spare,
        last: Cell::default(),
    }
}

impl ZoneRouting {
    /// The zone of a request; `below(n)` draws a number below `n`. `None` where zones do not count.
    pub fn choose(&self, mut below: impl FnMut(usize) -> usize) -> Option<usize> {
        match self {
            Self::Off => None,
            Self::Direct(own) => Some(*own),
            Self::Residual {
                own,
                stay,
                spare,
                last,
            } => {
                if (below(WHOLE as usize) as u64) < *stay {
                    last.set(Some(Sent::Stays));
                    return Some(*own);
                }
                match spare.last() {
                    None | Some(0) => {
                        last.set(Some(Sent::Anywhere));
                        Some(below(spare.len().max(1)))
                    }
                    Some(all) => {
                        last.set(Some(Sent::Across));
                        let point = below(*all as usize) as u64;
                        spare.iter().position(|sum| point < *sum)
                    }
                }
            }
        }
    }

    /// Where the request has gone for which a zone was [chosen](Self::choose) last, if that was not told yet.
    pub fn take_sent(&self) -> Option<Sent> {
        match self {
            Self::Off | Self::Direct(_) => None,
            Self::Residual { last, .. } => last.take(),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::config::convert::Fraction;

    fn rules(min_cluster_size: u64, force_local: Option<u32>) -> ZoneAware {
        ZoneAware {
            enabled: Fraction::ALL,
            min_cluster_size,
            fail_on_panic: false,
            force_local,
            by_weight: false,
        }
    }

    fn zones(list: &[(u64, u64)]) -> Vec<Zone> {
        list.iter()
            .map(|(callers, hosts)| Zone {
                callers: *callers,
                hosts: *hosts,
                count: *hosts,
            })
            .collect()
    }

    #[test]
    fn a_zone_with_hosts_enough_keeps_its_requests() {
        // A third of the callers, half of the hosts.
        let decided = decide(&rules(2, None), &zones(&[(1, 2), (1, 1), (1, 1)]), Some(0), 3);
        assert_eq!(decided, ZoneRouting::Direct(0));
    }

    #[test]
    fn a_zone_that_cannot_carry_its_callers_sends_the_rest_where_there_is_room() {
        // 50 % of the callers and 25 % of the hosts: half stays, the rest goes to the second zone alone, since the
        // third is as full as ours.
        let decided = decide(&rules(2, None), &zones(&[(5, 1), (2, 2), (3, 1)]), Some(0), 10);
        let ZoneRouting::Residual {
            own: 0, stay, spare, ..
        } = &decided
        else {
            panic!("{decided:?}")
        };
        assert_eq!((*stay, &spare[..]), (5_000, &[0, 3_000, 3_000][..]));
        let mut counts = [0; 3];
        for n in 0..10_000 {
            let mut first = true;
            let zone = decided.choose(|below| {
                if std::mem::take(&mut first) {
                    n
                } else {
                    n * 7 % below
                }
            });
            counts[zone.unwrap()] += 1;
        }
        assert_eq!(counts, [5_000, 5_000, 0]);
    }

    #[test]
    fn zones_do_not_count_in_small_clusters_without_own_hosts_or_with_one_zone_only() {
        let two = zones(&[(1, 2), (1, 2)]);
        assert_eq!(decide(&rules(6, None), &two, Some(0), 2), ZoneRouting::Off);
        assert_eq!(decide(&rules(2, None), &two, None, 2), ZoneRouting::Off);
        assert_eq!(decide(&rules(2, None), &two, Some(0), 0), ZoneRouting::Off);
        assert_eq!(
            decide(&rules(1, None), &zones(&[(1, 2)]), Some(0), 1),
            ZoneRouting::Off
        );
        let none_here = zones(&[(1, 0), (1, 4)]);
        assert_eq!(decide(&rules(2, None), &none_here, Some(0), 2), ZoneRouting::Off);
        assert_eq!(
            decide(&rules(2, Some(2)), &two, Some(1), 0),
            ZoneRouting::Direct(1),
            "forced"
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]
        #[test]
        fn a_request_never_goes_to_a_zone_without_hosts_as_long_as_one_has_room(
            list in proptest::collection::vec((0u64..20, 0u64..20), 2..6),
            own in 0usize..6,
            seed in any::<u64>(),
        ) {
            let own = own % list.len();
            let zones = zones(&list);
            let callers = list.iter().map(|(callers, _)| callers).sum();
            let decided = decide(&rules(1, None), &zones, Some(own), callers);
            let mut state = seed;
            for _ in 0..50 {
                let zone = decided.choose(|below| {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    (state >> 33) as usize % below
                });
                match zone {
                    None => prop_assert_eq!(&decided, &ZoneRouting::Off),
                    Some(zone) => {
                        prop_assert!(zone < zones.len());
                        if let ZoneRouting::Residual { spare, .. } = &decided
                            && spare.last().is_some_and(|all| *all > 0)
                        {
                            prop_assert!(zones[zone].count > 0);
                        }
                    }
                }
            }
        }
    }
}
