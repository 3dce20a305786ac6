//! How endpoints are chosen: the balancing policy of a cluster, its localities, and how new hosts begin.
//!
//! Two shapes say the same: the older `lb_policy` with its `lb_config`, and `load_balancing_policy`, a list of extensions
//! of which the first that is known counts (Envoy's rule).

use std::sync::Arc;
use std::time::Duration;

pub mod reported;

use reported::Reporting;

use prost::Message;
use serin_xds::pb::envoy::config::cluster::v3 as cluster;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::extensions::load_balancing_policies as policies;
use serin_xds::pb::google::protobuf as google;

use super::convert::{self, Fraction};
use super::subset::Subsets;
use crate::error::{Refusal, Within};

/// Envoy's least number of hosts for which zones count.
const DEFAULT_MIN_CLUSTER_SIZE: u64 = 6;
/// Points of a ring at most (Envoy's limit).
const MAX_RING: u64 = 8 << 20;
/// Points of a ring at least, unless told otherwise (Envoy).
const DEFAULT_RING: u64 = 1024;
/// Entries of a Maglev table at most (Envoy's limit).
const MAX_MAGLEV: u64 = 5_000_011;
/// How deep policies may be within policies.
const MAX_DEPTH: usize = 4;

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
                refuse_older_fields(from)?;
                compile_list(list, 0).within("load_balancing_policy")
            }
            None => compile_older(from),
        }
    }
}

/// Envoy refuses the older fields beside `load_balancing_policy` as well.
fn refuse_older_fields(from: &cluster::Cluster) -> Result<(), Refusal> {
    let common = from.common_lb_config.as_ref();
    let both = [
        ("lb_subset_config", from.lb_subset_config.is_some()),
        (
            "common_lb_config.locality_config_specifier",
            common.is_some_and(|common| common.locality_config_specifier.is_some()),
        ),
        (
            "common_lb_config.consistent_hashing_lb_config",
            common.is_some_and(|common| common.consistent_hashing_lb_config.is_some()),
        ),
    ];
    match both.iter().find(|(_, present)| *present) {
        Some((field, _)) => Err(Refusal::new(
            *field,
            "cannot be used together with load_balancing_policy",
        )),
        None => Ok(()),
    }
}

fn compile_older(from: &cluster::Cluster) -> Result<Balancing, Refusal> {
    use cluster::cluster::{LbConfig, LbPolicy as Policy, common_lb_config::LocalityConfigSpecifier};
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
                config.hash_function
                    == cluster::cluster::ring_hash_lb_config::HashFunction::MurmurHash2 as i32,
            )
            .within("ring_hash_lb_config")?,
            _ => ring(None, None, false)?,
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
    let mut out = Balancing {
        slow_start,
        ..Balancing::plain(lb)
    };
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

fn percent(from: Option<&serin_xds::pb::envoy::r#type::v3::Percent>) -> Fraction {
    from.map_or(Fraction::ALL, |percent| Fraction::of_percent(percent.value))
}

fn wide(from: Option<&google::UInt64Value>, default: u64) -> u64 {
    from.map_or(default, |value| value.value)
}

fn choice_count(from: Option<&google::UInt32Value>) -> u32 {
    from.map_or(2, |count| count.value.clamp(2, 16))
}

/// Hosts are compared by requests per weight.
pub(crate) const PLAIN_BIAS: u32 = 1000;
/// Beyond that the least busy host is all that counts anyway.
const MAX_BIAS: f64 = 100.0;

/// The power of the requests on their way that is set against a host's weight, in thousandths.
fn compile_bias(from: Option<&core::RuntimeDouble>) -> Result<u32, Refusal> {
    match from {
        None => Ok(PLAIN_BIAS),
        Some(bias) if (0.0..=MAX_BIAS).contains(&bias.default_value) => {
            Ok((bias.default_value * 1000.0).round() as u32)
        }
        Some(bias) => Err(Refusal::new(
            "active_request_bias",
            format!("{} is not between 0 and {MAX_BIAS}", bias.default_value),
        )),
    }
}

fn ring(
    minimum: Option<&google::UInt64Value>,
    maximum: Option<&google::UInt64Value>,
    murmur: bool,
) -> Result<LbPolicy, Refusal> {
    let (minimum, maximum) = (wide(minimum, DEFAULT_RING), wide(maximum, MAX_RING));
    for (field, size) in [("minimum_ring_size", minimum), ("maximum_ring_size", maximum)] {
        if size > MAX_RING {
            return Err(Refusal::new(field, format!("{size} is above {MAX_RING}")));
        }
    }
    if minimum > maximum {
        return Err(Refusal::new(
            "minimum_ring_size",
            format!("{minimum} is above the maximum, {maximum}"),
        ));
    }
    Ok(LbPolicy::RingHash {
        minimum,
        maximum,
        function: if murmur {
            RingFunction::MurmurHash2
        } else {
            RingFunction::Xxh64
        },
    })
}

fn maglev(size: Option<&google::UInt64Value>) -> Result<LbPolicy, Refusal> {
    let size = wide(size, 65_537);
    let is_prime = size > 1 && (2..=size.isqrt()).all(|divisor| !size.is_multiple_of(divisor));
    if !is_prime || size > MAX_MAGLEV {
        return Err(Refusal::new(
            "table_size",
            format!("{size} is not a prime of at most {MAX_MAGLEV}"),
        ));
    }
    Ok(LbPolicy::Maglev { size })
}

fn hashing(by_hostname: bool, factor: Option<&google::UInt32Value>) -> Result<Hashing, Refusal> {
    let balance_factor = factor.map(|factor| factor.value);
    if balance_factor.is_some_and(|factor| factor < 100) {
        return Err(Refusal::new("hash_balance_factor", "is below 100"));
    }
    Ok(Hashing {
        by_hostname,
        balance_factor,
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

fn slow_start(
    window: Option<&google::Duration>,
    aggression: Option<&core::RuntimeDouble>,
    least: Option<&serin_xds::pb::envoy::r#type::v3::Percent>,
) -> Result<Option<SlowStart>, Refusal> {
    let Some(window) = convert::timeout(window).within("slow_start_window")? else {
        return Ok(None);
    };
    let aggression = aggression.map_or(1.0, |value| value.default_value);
    if !(aggression.is_finite() && aggression > 0.0) {
        return Err(Refusal::new(
            "aggression",
            format!("{aggression} is not above zero"),
        ));
    }
    Ok(Some(SlowStart {
        window,
        aggression,
        least: least.map_or(0.1, |percent| (percent.value / 100.0).clamp(0.0, 1.0)),
    }))
}

/// Envoy's contributed policy, which is not in the generated set.
#[derive(Clone, PartialEq, Message)]
struct PeakEwma {
    #[prost(message, optional, tag = "1")]
    decay_time: Option<google::Duration>,
    #[prost(message, optional, tag = "4")]
    default_rtt: Option<google::Duration>,
}

/// The first policy of the list that is known.
fn compile_list(from: &cluster::LoadBalancingPolicy, depth: usize) -> Result<Balancing, Refusal> {
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
        "least_request.v3.LeastRequest" => {
            use policies::least_request::v3::least_request::SelectionMethod;
            let config: policies::least_request::v3::LeastRequest = read(any)?;
            let bias = compile_bias(config.active_request_bias.as_ref())?;
            let all = config.selection_method == SelectionMethod::FullScan as i32
                || config.enable_full_scan.as_ref().is_some_and(|value| value.value);
            let mut out = Balancing::plain(LbPolicy::LeastRequest {
                choices: if all {
                    0
                } else {
                    choice_count(config.choice_count.as_ref())
                },
                bias,
            });
            out.slow_start = newer_slow_start(config.slow_start_config.as_ref())?;
            out.add_locality(config.locality_lb_config.as_ref());
            out
        }
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
        "ring_hash.v3.RingHash" => {
            let config: policies::ring_hash::v3::RingHash = read(any)?;
            let mut out = Balancing::plain(ring(
                config.minimum_ring_size.as_ref(),
                config.maximum_ring_size.as_ref(),
                config.hash_function == policies::ring_hash::v3::ring_hash::HashFunction::MurmurHash2 as i32,
            )?);
            out.locality_weighted = config.locality_weighted_lb_config.is_some();
            out.hashing = newer_hashing(config.consistent_hashing_lb_config.as_ref())?;
            if config.consistent_hashing_lb_config.is_none() {
                out.hashing = hashing(
                    config.use_hostname_for_hashing,
                    config.hash_balance_factor.as_ref(),
                )?;
            }
            out
        }
        "maglev.v3.Maglev" => {
            let config: policies::maglev::v3::Maglev = read(any)?;
            let mut out = Balancing::plain(maglev(config.table_size.as_ref())?);
            out.locality_weighted = config.locality_weighted_lb_config.is_some();
            out.hashing = newer_hashing(config.consistent_hashing_lb_config.as_ref())?;
            out
        }
        "wrr_locality.v3.WrrLocality" => {
            let config: policies::wrr_locality::v3::WrrLocality = read(any)?;
            let inner = config
                .endpoint_picking_policy
                .as_ref()
                .ok_or_else(|| Refusal::new("endpoint_picking_policy", "is missing"))?;
            let mut out = compile_list(inner, depth + 1).within("endpoint_picking_policy")?;
            out.locality_weighted = true;
            out.zone_aware = None;
            out
        }
        "subset.v3.Subset" => {
            let config: policies::subset::v3::Subset = read(any)?;
            let inner = config
                .subset_lb_policy
                .as_ref()
                .ok_or_else(|| Refusal::new("subset_lb_policy", "is missing"))?;
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
            out
        }
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

#[cfg(test)]
mod tests;
