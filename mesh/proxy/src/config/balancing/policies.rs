//! The newer shape: `load_balancing_policy`, a list of extensions of which the first that is known counts.

use std::sync::Arc;
use std::time::Duration;

use prost::Message;
use serin_xds::pb::envoy::config::cluster::v3 as cluster;
use serin_xds::pb::envoy::extensions::load_balancing_policies as policies;
use serin_xds::pb::google::protobuf as google;

use super::fields::{
    DEFAULT_MIN_CLUSTER_SIZE, choice_count, compile_bias, hashing, maglev, percent, ring, slow_start, wide,
};
use super::reported::Reporting;
use super::{Balancing, Hashing, LbPolicy, RingFunction, SlowStart, ZoneAware};
use crate::config::convert::{self, required};
use crate::config::subset::Subsets;
use crate::error::{Refusal, Within};

/// How deep policies may be within policies.
const MAX_DEPTH: usize = 4;

/// Envoy's contributed policy, which is not in the generated set.
#[derive(Clone, PartialEq, Message)]
pub(super) struct PeakEwma {
    #[prost(message, optional, tag = "1")]
    pub(super) decay_time: Option<google::Duration>,
    #[prost(message, optional, tag = "4")]
    pub(super) default_rtt: Option<google::Duration>,
}

/// The first policy of the list that is known.
pub(super) fn compile_list(from: &cluster::LoadBalancingPolicy, depth: usize) -> Result<Balancing, Refusal> {
    if depth >= MAX_DEPTH {
        return Err(Refusal::new("policies", "policies are nested too deeply"));
    }
    let mut unknown = Vec::new();
    for (index, policy) in from.policies.iter().enumerate() {
        let path = || format!("policies[{index}].typed_extension_config");
        let Some(any) = policy
            .typed_extension_config
            .as_ref()
            .and_then(|config| config.typed_config.as_ref())
        else {
            return Err(Refusal::new(path(), "typed_config is missing"));
        };
        match compile_policy(any, depth).within(path())? {
            Some(found) => return Ok(found),
            None => unknown.push(any.type_url.rsplit('/').next().unwrap_or_default()),
        }
    }
    Err(Refusal::new(
        "policies",
        format!("none of these policies is supported: {}", unknown.join(", ")),
    ))
}

fn read<M: Message + Default>(any: &google::Any) -> Result<M, Refusal> {
    M::decode(any.value.as_slice()).map_err(|error| Refusal::new("typed_config", error.to_string()))
}

/// `None` for a policy that is not known.
fn compile_policy(any: &google::Any, depth: usize) -> Result<Option<Balancing>, Refusal> {
    let Some(name) = any
        .type_url
        .rsplit('/')
        .next()
        .and_then(|name| name.strip_prefix("envoy.extensions.load_balancing_policies."))
    else {
        return Ok(None);
    };
    Ok(Some(match name {
        "round_robin.v3.RoundRobin" => {
            let config: policies::round_robin::v3::RoundRobin = read(any)?;
            let mut out = Balancing::plain(LbPolicy::RoundRobin);
            out.slow_start = newer_slow_start(config.slow_start_config.as_ref())?;
            out.add_locality(config.locality_lb_config.as_ref());
            out
        }
        "least_request.v3.LeastRequest" => least_request(&read(any)?)?,
        "client_side_weighted_round_robin.v3.ClientSideWeightedRoundRobin" => {
            let config: policies::client_side_weighted_round_robin::v3::ClientSideWeightedRoundRobin =
                read(any)?;
            let mut out = Balancing::plain(LbPolicy::ClientSideWeighted);
            out.reporting = Some(Arc::new(Reporting::compile(&config)?));
            out.slow_start = newer_slow_start(config.slow_start_config.as_ref())?;
            out
        }
        "random.v3.Random" => {
            let config: policies::random::v3::Random = read(any)?;
            let mut out = Balancing::plain(LbPolicy::Random);
            out.add_locality(config.locality_lb_config.as_ref());
            out
        }
        "ring_hash.v3.RingHash" => ring_hash(&read(any)?)?,
        "maglev.v3.Maglev" => {
            let config: policies::maglev::v3::Maglev = read(any)?;
            let mut out = Balancing::plain(maglev(config.table_size.as_ref())?);
            out.locality_weighted = config.locality_weighted_lb_config.is_some();
            out.hashing = newer_hashing(config.consistent_hashing_lb_config.as_ref())?;
            out
        }
        "wrr_locality.v3.WrrLocality" => wrr_locality(&read(any)?, depth)?,
        "subset.v3.Subset" => subset(any, depth)?,
        "peak_ewma.v3alpha.PeakEwma" => {
            let config: PeakEwma = read(any)?;
            Balancing::plain(LbPolicy::PeakEwma {
                decay: convert::timeout(config.decay_time.as_ref())
                    .within("decay_time")?
                    .unwrap_or(Duration::from_secs(10)),
                default_rtt: convert::timeout(config.default_rtt.as_ref())
                    .within("default_rtt")?
                    .unwrap_or(Duration::from_millis(10)),
            })
        }
        "cluster_provided.v3.ClusterProvided" => Balancing::plain(LbPolicy::RoundRobin),
        _ => return Ok(None),
    }))
}

fn least_request(from: &policies::least_request::v3::LeastRequest) -> Result<Balancing, Refusal> {
    use policies::least_request::v3::least_request::SelectionMethod;
    let bias = compile_bias(from.active_request_bias.as_ref())?;
    let all = from.selection_method == SelectionMethod::FullScan as i32
        || from.enable_full_scan.as_ref().is_some_and(|value| value.value);
    let mut out = Balancing::plain(LbPolicy::LeastRequest {
        choices: if all {
            0
        } else {
            choice_count(from.choice_count.as_ref())
        },
        bias,
    });
    out.slow_start = newer_slow_start(from.slow_start_config.as_ref())?;
    out.add_locality(from.locality_lb_config.as_ref());
    Ok(out)
}

fn ring_hash(from: &policies::ring_hash::v3::RingHash) -> Result<Balancing, Refusal> {
    use policies::ring_hash::v3::ring_hash::HashFunction;
    let mut out = Balancing::plain(ring(
        from.minimum_ring_size.as_ref(),
        from.maximum_ring_size.as_ref(),
        RingFunction::of(from.hash_function == HashFunction::MurmurHash2 as i32),
    )?);
    out.locality_weighted = from.locality_weighted_lb_config.is_some();
    out.hashing = newer_hashing(from.consistent_hashing_lb_config.as_ref())?;
    if from.consistent_hashing_lb_config.is_none() {
        out.hashing = hashing(from.use_hostname_for_hashing, from.hash_balance_factor.as_ref())?;
    }
    Ok(out)
}

fn wrr_locality(from: &policies::wrr_locality::v3::WrrLocality, depth: usize) -> Result<Balancing, Refusal> {
    let inner = required(from.endpoint_picking_policy.as_ref(), "endpoint_picking_policy")?;
    let mut out = compile_list(inner, depth + 1).within("endpoint_picking_policy")?;
    out.locality_weighted = true;
    out.zone_aware = None;
    Ok(out)
}

fn subset(any: &google::Any, depth: usize) -> Result<Balancing, Refusal> {
    let config: policies::subset::v3::Subset = read(any)?;
    let inner = required(config.subset_lb_policy.as_ref(), "subset_lb_policy")?;
    let mut out = compile_list(inner, depth + 1).within("subset_lb_policy")?;
    if out.subsets.is_some() {
        return Err(Refusal::new("subset_lb_policy", "subsets within subsets"));
    }
    // The same message under another name, field by field.
    let same: cluster::cluster::LbSubsetConfig = read(any)?;
    out.subsets = Subsets::compile(&same)?.map(|mut subsets| {
        subsets.allow_redundant_keys = config.allow_redundant_keys;
        Box::new(subsets)
    });
    Ok(out)
}

fn newer_hashing(from: Option<&policies::common::v3::ConsistentHashingLbConfig>) -> Result<Hashing, Refusal> {
    let Some(from) = from else {
        return Ok(Hashing::default());
    };
    if !from.hash_policy.is_empty() {
        return Err(Refusal::new(
            "consistent_hashing_lb_config.hash_policy",
            "not supported here; set hash_policy on routes",
        ));
    }
    hashing(from.use_hostname_for_hashing, from.hash_balance_factor.as_ref())
        .within("consistent_hashing_lb_config")
}

impl Balancing {
    fn add_locality(&mut self, from: Option<&policies::common::v3::LocalityLbConfig>) {
        use policies::common::v3::locality_lb_config::LocalityConfigSpecifier;
        match from.and_then(|config| config.locality_config_specifier.as_ref()) {
            Some(LocalityConfigSpecifier::LocalityWeightedLbConfig(_)) => self.locality_weighted = true,
            Some(LocalityConfigSpecifier::ZoneAwareLbConfig(config)) => {
                let forced = config
                    .force_local_zone
                    .as_ref()
                    .map(|forced| forced.min_size.as_ref().map_or(1, |size| size.value));
                self.zone_aware = Some(ZoneAware {
                    enabled: percent(config.routing_enabled.as_ref()),
                    min_cluster_size: wide(config.min_cluster_size.as_ref(), DEFAULT_MIN_CLUSTER_SIZE),
                    fail_on_panic: config.fail_traffic_on_panic,
                    force_local: forced.or(config.force_locality_direct_routing.then_some(1)),
                    by_weight: config.locality_basis == 1,
                });
            }
            None => {}
        }
    }
}

fn newer_slow_start(
    from: Option<&policies::common::v3::SlowStartConfig>,
) -> Result<Option<SlowStart>, Refusal> {
    let Some(from) = from else { return Ok(None) };
    slow_start(
        from.slow_start_window.as_ref(),
        from.aggression.as_ref(),
        from.min_weight_percent.as_ref(),
    )
    .within("slow_start_config")
}
