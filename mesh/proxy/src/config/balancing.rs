//! How endpoints are chosen: the balancing policy of a cluster, its localities, and how new hosts begin.
//!
//! Two shapes say the same: the older `lb_policy` with its `lb_config`, and `load_balancing_policy`, a list of extensions
//! of which the first that is known counts (Envoy's rule).

mod fields;
mod older;
mod policies;
pub mod reported;

use std::sync::Arc;
use std::time::Duration;

use serin_xds::pb::envoy::config::cluster::v3 as cluster;

use self::reported::Reporting;
use super::convert::Fraction;
use super::subset::Subsets;
use crate::error::{Refusal, Within};

/// Hosts are compared by requests per weight.
pub(crate) const PLAIN_BIAS: u32 = 1000;
/// How an endpoint is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LbPolicy {
    /// In turn, by weight.
    RoundRobin,
    /// The one with fewer requests on their way, of that many drawn at random.
    LeastRequest {
        /// How many are drawn; 0 for all hosts (`FULL_SCAN`).
        choices: u32,
        /// The power of the requests on their way that is set against the weight, in thousandths: 0 looks at the weight
        /// only, as Envoy's `active_request_bias` does.
        bias: u32,
    },
    /// At random, by weight.
    Random,
    /// The cheaper of two drawn at random, by moving latency times requests on their way.
    PeakEwma {
        /// How long a latency is remembered.
        decay: Duration,
        /// What a host without a measurement is taken for.
        default_rtt: Duration,
    },
    /// In turn, by the weights that follow from what hosts report of their load.
    ClientSideWeighted,
    /// Consistent hashing on a ring.
    RingHash {
        /// Least number of points.
        minimum: u64,
        /// Largest number of points.
        maximum: u64,
        /// What the points are hashed by.
        function: RingFunction,
    },
    /// Consistent hashing by a Maglev table.
    Maglev {
        /// Entries.
        size: u64,
    },
}

impl LbPolicy {
    /// Whether the hash of a request decides.
    pub fn hashes(self) -> bool {
        matches!(self, Self::RingHash { .. } | Self::Maglev { .. })
    }
}

/// By what the points of a ring are hashed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RingFunction {
    /// XXH64.
    Xxh64,
    /// `MURMUR_HASH_2`.
    MurmurHash2,
}

impl RingFunction {
    fn of(is_murmur: bool) -> Self {
        if is_murmur { Self::MurmurHash2 } else { Self::Xxh64 }
    }
}

/// New hosts get their share little by little.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SlowStart {
    /// How long it takes.
    pub window: Duration,
    /// Exponent of the curve; 1 is a straight line.
    pub aggression: f64,
    /// Least share, of 1.
    pub least: f64,
}

impl SlowStart {
    /// The part of its weight that a host has after `age`.
    pub fn factor(&self, age: Duration) -> f64 {
        if age >= self.window {
            return 1.0;
        }
        // Envoy's curve: (age / window) ^ (1 / aggression).
        let share = age.as_secs_f64() / self.window.as_secs_f64();
        share.powf(1.0 / self.aggression).clamp(self.least, 1.0)
    }
}

/// Hosts of the proxy's own zone come first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ZoneAware {
    /// Share of requests that it counts for.
    pub enabled: Fraction,
    /// Usable hosts that it takes.
    pub min_cluster_size: u64,
    /// No host rather than any host when too few are well.
    pub fail_on_panic: bool,
    /// All requests stay in the zone if it has that many hosts.
    pub force_local: Option<u32>,
    /// Zones are compared by the weight of their hosts instead of by their number.
    pub by_weight: bool,
}

/// How consistent hashing names and limits hosts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hashing {
    /// Hosts are named by their host name instead of their address.
    pub by_hostname: bool,
    /// A host takes at most that percentage of the average load (`hash_balance_factor`).
    pub balance_factor: Option<u32>,
}

/// Everything that choosing an endpoint goes by.
#[derive(Debug)]
pub struct Balancing {
    /// The policy.
    pub lb: LbPolicy,
    /// Locality weights count.
    pub locality_weighted: bool,
    /// Zones count.
    pub zone_aware: Option<ZoneAware>,
    /// How new hosts begin.
    pub slow_start: Option<SlowStart>,
    /// Names and limits of consistent hashing.
    pub hashing: Hashing,
    /// How reports of hosts become weights.
    pub reporting: Option<Arc<Reporting>>,
    /// Groups of endpoints by their metadata.
    pub subsets: Option<Box<Subsets>>,
}

impl Balancing {
    fn plain(lb: LbPolicy) -> Self {
        Self {
            lb,
            locality_weighted: false,
            zone_aware: None,
            slow_start: None,
            hashing: Hashing::default(),
            reporting: None,
            subsets: None,
        }
    }

    pub(super) fn compile(from: &cluster::Cluster) -> Result<Self, Refusal> {
        if from
            .common_lb_config
            .as_ref()
            .is_some_and(|common| common.close_connections_on_host_set_change)
        {
            return Err(Refusal::new(
                "common_lb_config.close_connections_on_host_set_change",
                "not supported: connections of hosts that stay are kept",
            ));
        }
        match &from.load_balancing_policy {
            Some(list) => {
                older::refuse_fields(from)?;
                policies::compile_list(list, 0).within("load_balancing_policy")
            }
            None => older::compile(from),
        }
    }
}

#[cfg(test)]
mod tests;
