//! The TCP proxy of a filter chain, compiled.

use std::sync::Arc;
use std::time::Duration;

use serin_xds::pb::envoy::extensions::filters::network::tcp_proxy::v3 as tcp_v3;
use serin_xds::pb::envoy::extensions::filters::network::tcp_proxy::v3::tcp_proxy::ClusterSpecifier;
use serin_xds::pb::envoy::r#type::v3::HashPolicy;
use serin_xds::pb::envoy::r#type::v3::hash_policy::PolicySpecifier;

use crate::config::convert::{self, refuse_present};
use crate::config::route::Context;
use crate::config::slot::{ClusterSlot, Directory};
use crate::config::subset::Criteria;
use crate::config::tunneling::Tunneling;
use crate::config::weighted::{Turn, Weights};
use crate::error::{Refusal, Within};
use crate::metrics::events::{TcpEvent, WorkerEvents};
use crate::observe::access_log::{self, AccessLogs};
use crate::policy::on_demand::OnDemandClusters;
use crate::policy::stats::Counter;

/// Envoy's limit of silence where the configuration does not say.
const DEFAULT_IDLE: Duration = Duration::from_secs(3600);

/// A compiled TCP proxy.
#[derive(Debug)]
pub struct TcpProxy {
    /// Where to.
    pub targets: TcpTargets,
    /// The subset of the cluster, and those of weighted clusters that have their own.
    pub criteria: Option<Box<Criteria>>,
    /// See `criteria`; in the order of the targets.
    pub target_criteria: Box<[Option<Box<Criteria>>]>,
    /// Clusters by name, for connections whose server name (`sni_cluster`) or filter state names theirs. Without a server
    /// name, or with an unknown one, the cluster is that of `targets`.
    pub directory: Directory,
    /// Whether connections wait for a cluster that does not exist.
    pub on_demand: Option<OnDemandClusters>,
    /// Connections go on within a CONNECT.
    pub tunneling: Option<Box<Tunneling>>,
    /// Limit of silence.
    pub idle_timeout: Option<Duration>,
    /// Connections are ended after this.
    pub max_duration: Option<Duration>,
    /// Consistent hashing balancers go by the client's address.
    pub hash_by_source: bool,
    /// How often a connection is tried.
    pub max_connect_attempts: u32,
    /// Whether Istio's TCP metrics are kept.
    pub stats: bool,
    /// What happens to its connections.
    pub counted: Arc<WorkerEvents<TcpEvent>>,
    /// Bytes from clients, and to them.
    pub bytes: [Arc<Counter>; 2],
    /// Access logs.
    pub logs: Option<AccessLogs>,
    /// How often lines are written while a connection goes on.
    pub log_interval: Option<Duration>,
    /// Whether lines are written when the upstream has been reached.
    pub log_connected: bool,
}

/// Where TCP connections go.
#[derive(Debug)]
pub enum TcpTargets {
    /// One cluster.
    One(Arc<ClusterSlot>),
    /// Several, by weight.
    Weighted(Box<[Arc<ClusterSlot>]>, Weights, Turn),
}

impl TcpTargets {
    fn compile(from: &tcp_v3::TcpProxy, context: &mut Context<'_>) -> Result<Self, Refusal> {
        let weighted = match &from.cluster_specifier {
            Some(ClusterSpecifier::Cluster(name)) => return Ok(Self::One(context.slots.cluster(name))),
            Some(ClusterSpecifier::WeightedClusters(weighted)) => &weighted.clusters,
            None => return Err(Refusal::new("cluster_specifier", "is missing")),
        };
        let clusters = weighted
            .iter()
            .map(|cluster| context.slots.cluster(&cluster.name))
            .collect();
        let weights: Vec<_> = weighted.iter().map(|cluster| cluster.weight).collect();
        let weights = Weights::new(weights)
            .ok_or_else(|| Refusal::new("weighted_clusters", "the weights add up to zero"))?;
        let turn = Turn::new(context.workers, weights.total(), context.seed % weights.total());
        Ok(Self::Weighted(clusters, weights, turn))
    }
}

impl TcpProxy {
    pub(super) fn compile(
        from: &tcp_v3::TcpProxy,
        stats: bool,
        context: &mut Context<'_>,
    ) -> Result<Self, Refusal> {
        refuse_unsupported(from)?;
        let targets = TcpTargets::compile(from, context)?;
        let (workers, registry) = context.counters();
        let counted = registry.tcp(workers, &from.stat_prefix);
        let label = [("envoy_tcp_prefix", &*from.stat_prefix)];
        let bytes = [
            "envoy_tcp_downstream_cx_rx_bytes_total",
            "envoy_tcp_downstream_cx_tx_bytes_total",
        ]
        .map(|name| registry.counter(workers, name, &label));
        Ok(Self {
            tunneling: from
                .tunneling_config
                .as_ref()
                .map(|config| Tunneling::compile(config).map(Box::new))
                .transpose()
                .within("tunneling_config")?,
            targets,
            criteria: Criteria::compile(from.metadata_match.as_ref(), None),
            target_criteria: target_criteria(from),
            directory: context.slots.directory.clone(),
            on_demand: from
                .on_demand
                .as_ref()
                .map_or(Ok(None), OnDemandClusters::of_tcp)
                .within("on_demand")?,
            idle_timeout: match &from.idle_timeout {
                None => Some(DEFAULT_IDLE),
                given => convert::timeout(given.as_ref()).within("idle_timeout")?,
            },
            max_duration: convert::timeout(from.max_downstream_connection_duration.as_ref())
                .within("max_downstream_connection_duration")?,
            hash_by_source: hashes_by_source(&from.hash_policy)?,
            max_connect_attempts: from
                .max_connect_attempts
                .as_ref()
                .map_or(1, |value| value.value.max(1)),
            stats,
            counted,
            bytes,
            logs: AccessLogs::compile(&from.access_log, context)?,
            log_interval: log_interval(from)?,
            log_connected: from.flush_access_log_on_connected
                || from
                    .access_log_options
                    .as_ref()
                    .is_some_and(|options| options.flush_access_log_on_connected),
        })
    }
}

fn refuse_unsupported(from: &tcp_v3::TcpProxy) -> Result<(), Refusal> {
    let options = from.access_log_options.as_ref();
    refuse_present(
        &[
            ("downstream_idle_timeout", from.downstream_idle_timeout.is_some()),
            ("upstream_idle_timeout", from.upstream_idle_timeout.is_some()),
            ("backoff_options", from.backoff_options.is_some()),
            (
                "max_downstream_connection_duration_jitter_percentage",
                from.max_downstream_connection_duration_jitter_percentage
                    .is_some(),
            ),
            ("proxy_protocol_tlvs", !from.proxy_protocol_tlvs.is_empty()),
            ("upstream_connect_mode", from.upstream_connect_mode != 0),
            (
                "check_drain_close",
                from.check_drain_close.as_ref().is_some_and(|value| value.value),
            ),
            ("max_early_data_bytes", from.max_early_data_bytes.is_some()),
            (
                "access_log_options.flush_access_log_on_start",
                options.is_some_and(|options| options.flush_access_log_on_start),
            ),
        ],
        "not supported",
    )
}

/// How often the log tells of a connection that lasts.
fn log_interval(from: &tcp_v3::TcpProxy) -> Result<Option<Duration>, Refusal> {
    let options = from.access_log_options.as_ref();
    let of_options = options.and_then(|options| options.access_log_flush_interval.as_ref());
    access_log::interval(of_options.or(from.access_log_flush_interval.as_ref()))
}

/// The subsets that weighted clusters ask for, where they ask for one of their own.
fn target_criteria(from: &tcp_v3::TcpProxy) -> Box<[Option<Box<Criteria>>]> {
    let Some(ClusterSpecifier::WeightedClusters(weighted)) = &from.cluster_specifier else {
        return Box::default();
    };
    let of_all = from.metadata_match.as_ref();
    weighted
        .clusters
        .iter()
        .map(|cluster| {
            let own = cluster.metadata_match.as_ref()?;
            Criteria::compile(Some(own), of_all)
        })
        .collect()
}

fn hashes_by_source(policies: &[HashPolicy]) -> Result<bool, Refusal> {
    match policies {
        [] => Ok(false),
        [one] if matches!(one.policy_specifier, Some(PolicySpecifier::SourceIp(_))) => Ok(true),
        _ => Err(Refusal::new(
            "hash_policy",
            "only the source address is supported",
        )),
    }
}
