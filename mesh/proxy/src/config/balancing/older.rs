//! The older shape: `lb_policy`, its `lb_config`, and what `common_lb_config` and `lb_subset_config` add.

use serin_xds::pb::envoy::config::cluster::v3 as cluster;

use super::fields::{
    DEFAULT_MIN_CLUSTER_SIZE, choice_count, compile_bias, hashing, maglev, percent, ring, slow_start, wide,
};
use super::{Balancing, LbPolicy, PLAIN_BIAS, RingFunction, SlowStart, ZoneAware};
use crate::config::convert::refuse_present;
use crate::config::subset::Subsets;
use crate::error::{Refusal, Within};

/// Envoy refuses the older fields beside `load_balancing_policy` as well.
pub(super) fn refuse_fields(from: &cluster::Cluster) -> Result<(), Refusal> {
    let common = from.common_lb_config.as_ref();
    refuse_present(
        &[
            ("lb_subset_config", from.lb_subset_config.is_some()),
            (
                "common_lb_config.locality_config_specifier",
                common.is_some_and(|common| common.locality_config_specifier.is_some()),
            ),
            (
                "common_lb_config.consistent_hashing_lb_config",
                common.is_some_and(|common| common.consistent_hashing_lb_config.is_some()),
            ),
        ],
        "cannot be used together with load_balancing_policy",
    )
}

/// The policy, and what is said of its localities, its hashes and its subsets.
pub(super) fn compile(from: &cluster::Cluster) -> Result<Balancing, Refusal> {
    use cluster::cluster::common_lb_config::LocalityConfigSpecifier;
    let mut out = compile_policy(from)?;
    if let Some(common) = &from.common_lb_config {
        match &common.locality_config_specifier {
            Some(LocalityConfigSpecifier::LocalityWeightedLbConfig(_)) => out.locality_weighted = true,
            Some(LocalityConfigSpecifier::ZoneAwareLbConfig(config)) => {
                out.zone_aware = Some(ZoneAware {
                    enabled: percent(config.routing_enabled.as_ref()),
                    min_cluster_size: wide(config.min_cluster_size.as_ref(), DEFAULT_MIN_CLUSTER_SIZE),
                    fail_on_panic: config.fail_traffic_on_panic,
                    force_local: None,
                    by_weight: false,
                });
            }
            None => {}
        }
        if let Some(config) = &common.consistent_hashing_lb_config {
            out.hashing = hashing(
                config.use_hostname_for_hashing,
                config.hash_balance_factor.as_ref(),
            )
            .within("common_lb_config.consistent_hashing_lb_config")?;
        }
    }
    if let Some(config) = &from.lb_subset_config {
        out.subsets = Subsets::compile(config).within("lb_subset_config")?.map(Box::new);
    }
    Ok(out)
}

fn compile_policy(from: &cluster::Cluster) -> Result<Balancing, Refusal> {
    use cluster::cluster::ring_hash_lb_config::HashFunction;
    use cluster::cluster::{LbConfig, LbPolicy as Policy};
    let mut slow_start = None;
    let lb = match Policy::try_from(from.lb_policy) {
        Ok(Policy::RoundRobin | Policy::ClusterProvided) => {
            if let Some(LbConfig::RoundRobinLbConfig(config)) = &from.lb_config {
                slow_start = older_slow_start(config.slow_start_config.as_ref())
                    .within("round_robin_lb_config.slow_start_config")?;
            }
            LbPolicy::RoundRobin
        }
        Ok(Policy::LeastRequest) => {
            let (mut choices, mut bias) = (2, PLAIN_BIAS);
            if let Some(LbConfig::LeastRequestLbConfig(config)) = &from.lb_config {
                choices = choice_count(config.choice_count.as_ref());
                bias = compile_bias(config.active_request_bias.as_ref()).within("least_request_lb_config")?;
                slow_start = older_slow_start(config.slow_start_config.as_ref())
                    .within("least_request_lb_config.slow_start_config")?;
            }
            LbPolicy::LeastRequest { choices, bias }
        }
        Ok(Policy::Random) => LbPolicy::Random,
        Ok(Policy::RingHash) => match &from.lb_config {
            Some(LbConfig::RingHashLbConfig(config)) => ring(
                config.minimum_ring_size.as_ref(),
                config.maximum_ring_size.as_ref(),
                RingFunction::of(config.hash_function == HashFunction::MurmurHash2 as i32),
            )
            .within("ring_hash_lb_config")?,
            _ => ring(None, None, RingFunction::Xxh64)?,
        },
        Ok(Policy::Maglev) => match &from.lb_config {
            Some(LbConfig::MaglevLbConfig(config)) => {
                maglev(config.table_size.as_ref()).within("maglev_lb_config")?
            }
            _ => maglev(None)?,
        },
        Ok(Policy::LoadBalancingPolicyConfig) => {
            return Err(Refusal::new(
                "lb_policy",
                "LOAD_BALANCING_POLICY_CONFIG needs load_balancing_policy",
            ));
        }
        Err(_) => {
            return Err(Refusal::new(
                "lb_policy",
                format!("{} is unknown", from.lb_policy),
            ));
        }
    };
    Ok(Balancing {
        slow_start,
        ..Balancing::plain(lb)
    })
}

fn older_slow_start(from: Option<&cluster::cluster::SlowStartConfig>) -> Result<Option<SlowStart>, Refusal> {
    let Some(from) = from else { return Ok(None) };
    slow_start(
        from.slow_start_window.as_ref(),
        from.aggression.as_ref(),
        from.min_weight_percent.as_ref(),
    )
}
