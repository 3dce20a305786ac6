//! Endpoints of a cluster (EDS), and the shared record of each host's health as requests see it.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::config::endpoint::v3 as endpoint;

use serin_xds::pb::google::protobuf::Struct;

use super::balancing::reported::Reported;
use super::convert::{self, Address};
use crate::clock::now_ms;
use crate::error::{Refusal, Within};
use crate::metrics::hosts::HostCells;
use crate::metrics::peer::Workload;
use crate::upstream::proxy_header::Tlv;

/// Where endpoints have values by type for PROXY protocol headers.
const PROXY_PROTOCOL: &str = "envoy.transport_sockets.proxy_protocol";
/// Metadata of endpoints that transport sockets are matched with.
const SOCKET_MATCH: &str = "envoy.transport_socket_match";
/// Envoy's overprovisioning factor: a priority level takes all its share while 1/1.4 of it is healthy.
const DEFAULT_OVERPROVISIONING: u32 = 140;

/// What requests and checks have shown of a host, shared by all workers and kept over endpoint updates. Written on
/// failures and on the first success after one, so a healthy host costs a read.
#[derive(Debug)]
pub struct HostState {
    /// 5xx answers in a row.
    pub consecutive_5xx: AtomicU32,
    /// 502, 503, 504 in a row.
    pub consecutive_gateway: AtomicU32,
    /// Connection failures in a row (split mode).
    pub consecutive_local: AtomicU32,
    /// Milliseconds on the process clock until which the host is out; 0 when it is in. Once that time has passed the
    /// host is on probation: one request at a time shows whether it is well again.
    pub ejected_until: AtomicU64,
    /// A request is trying it on probation.
    pub probing: AtomicBool,
    /// When the last ejection ended, by a success; 0 if there was none.
    pub ejection_ended: AtomicU64,
    /// Ejections in a row.
    pub ejections: AtomicU32,
    /// Answers of this interval; only counted where hosts are compared.
    pub answers: Ratio,
    /// Connections and the like of this interval (split mode).
    pub local: Ratio,
    /// One bit for each active check of the cluster that the host has not passed. All are set in the beginning.
    pub failed_checks: AtomicU32,
    /// Since when it may be used, on the process clock: slow start counts from here. 0 is always.
    pub since: AtomicU64,
    /// What it has reported of its load.
    pub reported: Reported,
    /// Its requests and connections.
    pub counted: HostCells,
}

/// Requests and the good ones among them.
#[derive(Debug, Default)]
pub struct Ratio {
    /// All.
    pub all: AtomicU32,
    /// Good ones.
    pub good: AtomicU32,
}

impl Ratio {
    /// Counts one.
    pub fn add(&self, good: bool) {
        self.all.fetch_add(1, Ordering::Relaxed);
        if good {
            self.good.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Takes all and good, and begins again.
    pub fn take(&self) -> (u32, u32) {
        let all = self.all.swap(0, Ordering::Relaxed);
        // Read second, and cut: a request between the two may not make more good ones than there are.
        (all, self.good.swap(0, Ordering::Relaxed).min(all))
    }
}

impl Default for HostState {
    fn default() -> Self {
        Self {
            reported: Reported::default(),
            consecutive_5xx: AtomicU32::new(0),
            consecutive_gateway: AtomicU32::new(0),
            consecutive_local: AtomicU32::new(0),
            ejected_until: AtomicU64::new(0),
            probing: AtomicBool::new(false),
            ejection_ended: AtomicU64::new(0),
            ejections: AtomicU32::new(0),
            answers: Ratio::default(),
            local: Ratio::default(),
            failed_checks: AtomicU32::new(u32::MAX),
            since: AtomicU64::new(now_ms()),
            counted: HostCells::default(),
        }
    }
}

impl HostState {
    /// The host may be used again after it could not: slow start begins, and what was held against it is forgotten.
    pub fn recovered(&self) {
        self.since.store(now_ms(), Ordering::Relaxed);
        self.uneject();
    }

    /// Takes an ejection back.
    pub fn uneject(&self) {
        if self.ejected_until.load(Ordering::Relaxed) != 0 {
            self.ejection_ended.store(now_ms(), Ordering::Relaxed);
            self.ejected_until.store(0, Ordering::Relaxed);
            self.probing.store(false, Ordering::Relaxed);
            for counter in [
                &self.consecutive_5xx,
                &self.consecutive_gateway,
                &self.consecutive_local,
            ] {
                counter.store(0, Ordering::Relaxed);
            }
        }
    }
}

/// How an endpoint wants to be checked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Check {
    /// Not at all.
    pub disabled: bool,
    /// At another port.
    pub port: Option<u16>,
    /// At another address.
    pub address: Option<Address>,
    /// Under this name.
    pub hostname: Option<Box<str>>,
}

/// One endpoint.
#[derive(Debug)]
pub struct Endpoint {
    /// Where it is.
    pub address: Address,
    /// Its address as text, for headers and logs.
    pub text: Arc<str>,
    /// At least 1.
    pub weight: u32,
    /// Whether EDS says that it may be used.
    pub healthy: bool,
    /// Whether EDS says that it is degraded.
    pub degraded: bool,
    /// Which workload it is (`istio.workload`).
    pub workload: Option<Arc<Workload>>,
    /// What logs and headers may say of it.
    pub metadata: Option<convert::EncodedMetadata>,
    /// What few endpoints have.
    pub special: Option<Arc<Special>>,
    /// Its record.
    pub state: Arc<HostState>,
}

/// What few endpoints have: there are as many endpoints as a mesh has, so what most do not say costs them a pointer.
#[derive(Debug, Default, PartialEq)]
pub struct Special {
    /// Host name for `auto_host_rewrite`, if given.
    pub hostname: Box<str>,
    /// What consistent hashing knows it by instead of its address or host name (`hash_key` of `envoy.lb`).
    pub hash_key: Option<Box<str>>,
    /// How active health checks reach it.
    pub check: Check,
    /// What `transport_socket_matches` go by: `envoy.transport_socket_match` of the endpoint, else of its locality.
    pub socket_metadata: Option<Struct>,
    /// Values by type that its PROXY protocol headers have.
    pub tlvs: Box<[Tlv]>,
    /// What subsets go by (`envoy.lb`).
    pub lb_metadata: Option<Struct>,
    /// Other addresses of the same endpoint, tried when the first does not answer soon.
    pub more_addresses: Box<[SocketAddr]>,
}

impl Special {
    /// For an endpoint; nothing where there is nothing special about it.
    fn boxed(self) -> Option<Arc<Self>> {
        (self != Self::default()).then(|| Arc::new(self))
    }
}

/// How an endpoint is checked that says nothing about it.
static PLAIN_CHECK: Check = Check {
    disabled: false,
    port: None,
    address: None,
    hostname: None,
};

impl Endpoint {
    /// An endpoint of which nothing is known but where it is.
    pub fn at(address: Address) -> Self {
        Self {
            text: address.to_string().into(),
            address,
            weight: 1,
            healthy: true,
            degraded: false,
            workload: None,
            metadata: None,
            special: None,
            state: Arc::default(),
        }
    }

    /// Host name for `auto_host_rewrite`; empty if there is none.
    pub fn hostname(&self) -> &str {
        self.special.as_ref().map_or("", |special| &special.hostname)
    }

    /// What consistent hashing knows it by, where that is neither its address nor its host name.
    pub fn hash_key(&self) -> Option<&str> {
        self.special.as_ref()?.hash_key.as_deref()
    }

    /// How active health checks reach it.
    pub fn check(&self) -> &Check {
        self.special
            .as_ref()
            .map_or(&PLAIN_CHECK, |special| &special.check)
    }

    /// What `transport_socket_matches` go by.
    pub fn socket_metadata(&self) -> Option<&Struct> {
        self.special.as_ref()?.socket_metadata.as_ref()
    }

    /// Values by type that its PROXY protocol headers have.
    pub fn tlvs(&self) -> &[Tlv] {
        self.special.as_ref().map_or(&[], |special| &special.tlvs)
    }

    /// What subsets go by.
    pub fn lb_metadata(&self) -> Option<&Struct> {
        self.special.as_ref()?.lb_metadata.as_ref()
    }

    /// Its other addresses.
    pub fn more_addresses(&self) -> &[SocketAddr] {
        self.special
            .as_ref()
            .map_or(&[], |special| &special.more_addresses)
    }

    /// Whether it is a canary (`envoy.lb`: `canary: true`).
    pub fn is_canary(&self) -> bool {
        use serin_xds::pb::google::protobuf::value::Kind;
        let value = self
            .lb_metadata()
            .and_then(|metadata| metadata.fields.get("canary"));
        value.is_some_and(|value| value.kind == Some(Kind::BoolValue(true)))
    }

    /// Whether EDS and the first `checks` active checks say that it may be used.
    pub fn usable(&self, checks: usize) -> bool {
        let mask = ((1_u64 << checks) - 1) as u32;
        self.healthy
            && (self.check().disabled || self.state.failed_checks.load(Ordering::Relaxed) & mask == 0)
    }
}

/// Endpoints of one locality within one priority.
#[derive(Debug)]
pub struct Locality {
    /// Load balancing weight, 0 when not given.
    pub weight: u32,
    /// Where it is: `region/zone/sub_zone`.
    pub zone: Box<str>,
    /// Indices into [`EndpointSet::all`].
    pub members: std::ops::Range<usize>,
}

/// All endpoints of a cluster.
#[derive(Debug, Default)]
pub struct EndpointSet {
    /// By priority, then locality.
    pub all: Box<[Arc<Endpoint>]>,
    /// Localities of each priority.
    pub priorities: Box<[Box<[Locality]>]>,
    /// In percent.
    pub overprovisioning: u32,
    /// Share of requests to drop, in parts per million, by `drop_overloads`.
    pub drop: Option<convert::Fraction>,
}

/// For how long endpoints that are discovered may be used without another update (`endpoint_stale_after`); for ever where
/// nothing or zero is said.
pub(crate) fn stale_after(from: &endpoint::ClusterLoadAssignment) -> Result<Option<Duration>, Refusal> {
    let given = from
        .policy
        .as_ref()
        .and_then(|policy| policy.endpoint_stale_after.as_ref());
    let given = given.map(convert::duration).transpose();
    Ok(given
        .within("policy.endpoint_stale_after")?
        .filter(|after| !after.is_zero()))
}

impl EndpointSet {
    /// Compiles the message. Hosts that were in `previous` keep their record.
    pub(crate) fn compile(
        from: &endpoint::ClusterLoadAssignment,
        previous: Option<&Self>,
    ) -> Result<Self, Refusal> {
        let mut states: HashMap<&Address, &Arc<HostState>, foldhash::fast::RandomState> = HashMap::default();
        for endpoint in previous.iter().flat_map(|set| set.all.iter()) {
            states.insert(&endpoint.address, &endpoint.state);
        }
        let highest = from
            .endpoints
            .iter()
            .map(|group| group.priority)
            .max()
            .unwrap_or(0);
        if highest > 128 {
            return Err(Refusal::new(
                "endpoints.priority",
                format!("{highest} is above 128"),
            ));
        }
        let mut all = Vec::new();
        let mut priorities = Vec::new();
        for priority in 0..=highest {
            let mut localities = Vec::new();
            for (index, group) in from
                .endpoints
                .iter()
                .enumerate()
                .filter(|(_, group)| group.priority == priority)
            {
                let start = all.len();
                for (inner, lb) in group.lb_endpoints.iter().enumerate() {
                    let compiled = compile_endpoint(lb, group.metadata.as_ref(), &states)
                        .within(format!("endpoints[{index}].lb_endpoints[{inner}]"))?;
                    all.push(Arc::new(compiled));
                }
                localities.push(Locality {
                    weight: group
                        .load_balancing_weight
                        .as_ref()
                        .map_or(0, |weight| weight.value),
                    zone: zone_name(group.locality.as_ref()),
                    members: start..all.len(),
                });
            }
            priorities.push(localities.into());
        }
        let policy = from.policy.as_ref();
        let mut drop = None;
        for overload in policy.iter().flat_map(|policy| &policy.drop_overloads) {
            if drop.is_some() {
                return Err(Refusal::new(
                    "policy.drop_overloads",
                    "more than one category is not supported",
                ));
            }
            drop = Some(
                convert::Fraction::compile(overload.drop_percentage.as_ref(), convert::Fraction::ALL)
                    .within("policy.drop_overloads[0].drop_percentage")?,
            );
        }
        Ok(Self {
            all: all.into(),
            priorities: priorities.into(),
            overprovisioning: policy
                .and_then(|policy| policy.overprovisioning_factor.as_ref())
                .map_or(DEFAULT_OVERPROVISIONING, |factor| factor.value),
            drop,
        })
    }
}

/// A locality as text: `region/zone/sub_zone`.
pub fn zone_name(from: Option<&core::Locality>) -> Box<str> {
    from.map_or_else(Box::default, |locality| {
        format!("{}/{}/{}", locality.region, locality.zone, locality.sub_zone).into()
    })
}

fn compile_endpoint(
    from: &endpoint::LbEndpoint,
    locality: Option<&core::Metadata>,
    states: &HashMap<&Address, &Arc<HostState>, foldhash::fast::RandomState>,
) -> Result<Endpoint, Refusal> {
    use endpoint::lb_endpoint::HostIdentifier;
    let Some(HostIdentifier::Endpoint(inner)) = &from.host_identifier else {
        return Err(Refusal::new(
            "endpoint",
            "is missing (named endpoints are not supported)",
        ));
    };
    let address = convert::address(inner.address.as_ref()).within("endpoint")?;
    let more_addresses = inner
        .additional_addresses
        .iter()
        .enumerate()
        .map(|(index, more)| {
            let path = format!("endpoint.additional_addresses[{index}]");
            match convert::address(more.address.as_ref()).within(&path)? {
                Address::Tcp(address) => Ok(address),
                other => Err(Refusal::new(path, format!("{other} is no IP address"))),
            }
        })
        .collect::<Result<_, _>>()?;
    let socket_metadata = [from.metadata.as_ref(), locality]
        .into_iter()
        .flatten()
        .find_map(|metadata| metadata.filter_metadata.get(SOCKET_MATCH))
        .cloned();
    let typed = from
        .metadata
        .as_ref()
        .map(|metadata| &metadata.typed_filter_metadata);
    let tlvs = match typed.and_then(|typed| typed.get(PROXY_PROTOCOL)) {
        None => Box::default(),
        Some(any) => {
            let path = format!("metadata.typed_filter_metadata[{PROXY_PROTOCOL}]");
            convert::unpack::<core::PerHostConfig>(any, "envoy.config.core.v3.PerHostConfig")
                .and_then(|own| super::transport_socket::compile_tlvs(&own.added_tlvs).within("added_tlvs"))
                .within(path)?
        }
    };
    let health = core::HealthStatus::try_from(from.health_status).unwrap_or(core::HealthStatus::Unknown);
    use core::HealthStatus;
    let (healthy, degraded) = match health {
        HealthStatus::Unknown | HealthStatus::Healthy => (true, false),
        HealthStatus::Degraded => (true, true),
        HealthStatus::Unhealthy | HealthStatus::Draining | HealthStatus::Timeout => (false, false),
    };
    let check = compile_check(inner).within("endpoint.health_check_config")?;
    let special = Special {
        hostname: inner.hostname.as_str().into(),
        hash_key: convert::metadata_string(from.metadata.as_ref(), super::subset::METADATA, "hash_key")
            .filter(|key| !key.is_empty())
            .map(Into::into),
        check,
        socket_metadata,
        tlvs,
        lb_metadata: from
            .metadata
            .as_ref()
            .and_then(|metadata| metadata.filter_metadata.get(super::subset::METADATA))
            .cloned(),
        more_addresses,
    };
    Ok(Endpoint {
        text: address.to_string().into(),
        special: special.boxed(),
        weight: from
            .load_balancing_weight
            .as_ref()
            .map_or(1, |weight| weight.value.max(1)),
        healthy,
        degraded,
        workload: convert::metadata_string(from.metadata.as_ref(), "istio", "workload").map(Workload::parse),
        metadata: convert::EncodedMetadata::of(from.metadata.as_ref()),
        state: states
            .get(&address)
            .map(|state| Arc::clone(state))
            .unwrap_or_default(),
        address,
    })
}

fn compile_check(from: &endpoint::Endpoint) -> Result<Check, Refusal> {
    let Some(config) = &from.health_check_config else {
        return Ok(Check::default());
    };
    let port = u16::try_from(config.port_value)
        .map_err(|_| Refusal::new("port_value", format!("{} is no port", config.port_value)))?;
    Ok(Check {
        disabled: config.disable_active_health_check,
        port: (port != 0).then_some(port),
        address: match &config.address {
            Some(_) => Some(convert::address(config.address.as_ref())?),
            None => None,
        },
        hostname: (!config.hostname.is_empty()).then(|| config.hostname.as_str().into()),
    })
}
