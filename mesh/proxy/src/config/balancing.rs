//! How endpoints are chosen: the balancing policy of a cluster and how new hosts begin.

use std::time::Duration;

use serin_xds::pb::envoy::config::cluster::v3 as cluster;

use super::convert;
use crate::error::{Refusal, Within};

/// How an endpoint is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LbPolicy {
    /// In turn, by weight.
    RoundRobin,
    /// The one with fewer requests on their way, of that many drawn at random.
    LeastRequest {
        /// How many are drawn.
        choices: u32,
    },
    /// At random, by weight.
    Random,
    /// Consistent hashing on a ring of at least that many points.
    RingHash {
        /// Points.
        minimum: u64,
    },
    /// Consistent hashing by a Maglev table.
    Maglev {
        /// Entries.
        size: u64,
    },
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

pub(super) fn compile_lb(from: &cluster::Cluster) -> Result<(LbPolicy, bool), Refusal> {
    use cluster::cluster::{LbConfig, LbPolicy as Policy, common_lb_config::LocalityConfigSpecifier};
    let policy = match Policy::try_from(from.lb_policy) {
        Ok(Policy::RoundRobin | Policy::ClusterProvided) => LbPolicy::RoundRobin,
        Ok(Policy::LeastRequest) => {
            let mut choices = 2;
            if let Some(LbConfig::LeastRequestLbConfig(config)) = &from.lb_config {
                choices = config
                    .choice_count
                    .as_ref()
                    .map_or(2, |count| count.value.clamp(2, 16));
            }
            LbPolicy::LeastRequest { choices }
        }
        Ok(Policy::Random) => LbPolicy::Random,
        Ok(Policy::RingHash) => {
            let mut minimum = 1024;
            if let Some(LbConfig::RingHashLbConfig(config)) = &from.lb_config {
                minimum = config
                    .minimum_ring_size
                    .as_ref()
                    .map_or(1024, |size| size.value.clamp(1, 1 << 20));
            }
            LbPolicy::RingHash { minimum }
        }
        Ok(Policy::Maglev) => {
            let mut size = 65_537;
            if let Some(LbConfig::MaglevLbConfig(config)) = &from.lb_config {
                size = config
                    .table_size
                    .as_ref()
                    .map_or(65_537, |size| size.value.clamp(2, 5_000_011));
            }
            LbPolicy::Maglev { size }
        }
        Ok(Policy::LoadBalancingPolicyConfig) => {
            return Err(Refusal::new(
                "lb_policy",
                "load_balancing_policy is not supported, use lb_policy",
            ));
        }
        Err(_) => {
            return Err(Refusal::new(
                "lb_policy",
                format!("{} is unknown", from.lb_policy),
            ));
        }
    };
    let specifier = from
        .common_lb_config
        .as_ref()
        .and_then(|config| config.locality_config_specifier.as_ref());
    let weighted = matches!(
        specifier,
        Some(LocalityConfigSpecifier::LocalityWeightedLbConfig(_))
    );
    Ok((policy, weighted))
}

pub(super) fn compile_slow_start(from: &cluster::Cluster) -> Result<Option<SlowStart>, Refusal> {
    use cluster::cluster::LbConfig;
    let config = match &from.lb_config {
        Some(LbConfig::LeastRequestLbConfig(config)) => config.slow_start_config.as_ref(),
        Some(LbConfig::RoundRobinLbConfig(config)) => config.slow_start_config.as_ref(),
        _ => None,
    };
    let Some(config) = config else { return Ok(None) };
    let Some(window) = convert::timeout(config.slow_start_window.as_ref()).within("slow_start_window")?
    else {
        return Ok(None);
    };
    let aggression = config
        .aggression
        .as_ref()
        .map_or(1.0, |value| value.default_value);
    if !(aggression.is_finite() && aggression > 0.0) {
        return Err(Refusal::new(
            "slow_start_config.aggression",
            format!("{aggression} is not above zero"),
        ));
    }
    Ok(Some(SlowStart {
        window,
        aggression,
        least: config
            .min_weight_percent
            .as_ref()
            .map_or(0.1, |percent| (percent.value / 100.0).clamp(0.0, 1.0)),
    }))
}
