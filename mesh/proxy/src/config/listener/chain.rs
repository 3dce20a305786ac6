//! Filter chains: their network filters in order, one of which ends the chain.
//!
//! A chain without filters by ECDS is put together once; otherwise it is put together for each connection from what there is
//! then, so that an update is for connections to come, and those that are open keep what they began with (Envoy).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serin_xds::pb::envoy::config::listener::v3 as listener;
use serin_xds::pb::google::protobuf::Any;

use super::{Direction, TcpProxy};
use crate::config::convert;
use crate::config::extension::{self, AnyPlace, Discoverable, Extensions, Place, not_by_discovery};
use crate::config::hcm::HttpManager;
use crate::config::listener_filters::ConnectionLimit;
use crate::config::route::Context;
use crate::config::transport_socket;
use crate::error::{Refusal, Within};
use crate::policy::network::NetworkFilter;
use crate::tls::downstream::DownstreamTls;

/// Our limit for a TLS handshake when the chain does not say; Envoy has none.
const DEFAULT_HANDSHAKE: Duration = Duration::from_secs(15);
const MANAGER: &str = "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager";
const TCP_PROXY: &str = "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy";

/// A compiled filter chain.
#[derive(Debug)]
pub struct FilterChain {
    /// Its name.
    pub name: Box<str>,
    /// Server names of its match, lower case; a chain without any takes every name.
    pub server_names: Box<[Box<str>]>,
    /// TLS that is ended here.
    pub tls: Option<Arc<DownstreamTls>>,
    /// Limit for the TLS handshake.
    pub handshake_timeout: Duration,
    filters: Parts,
    retired: AtomicBool,
}

/// The network filters of a chain, for one connection or for all.
#[derive(Debug)]
pub struct NetworkFilters {
    /// What judges a connection before its bytes go on.
    pub policies: Box<[Arc<NetworkFilter>]>,
    /// Connections at a time.
    pub limit: Option<Arc<ConnectionLimit>>,
    /// The server name names the cluster of a TCP proxy (`sni_cluster`).
    pub by_server_name: bool,
    /// What happens to the bytes.
    pub handler: Handler,
}

/// The terminal network filter.
#[derive(Clone, Debug)]
pub enum Handler {
    /// HTTP.
    Http(Arc<HttpManager>),
    /// Bytes.
    Tcp(Arc<TcpProxy>),
}

#[derive(Debug)]
enum Parts {
    Fixed(Arc<NetworkFilters>),
    /// With filters by ECDS.
    Mixed(Box<[Step]>),
}

#[derive(Debug)]
enum Step {
    Fixed(NetworkPart),
    Discovered(Arc<Place<NetworkPart>>),
}

/// One network filter.
#[derive(Clone, Debug)]
pub(super) enum NetworkPart {
    /// One that has nothing to do here.
    Nothing,
    /// A policy.
    Policy(Arc<NetworkFilter>),
    /// Connections at a time; `None` where it is switched off.
    Limit(Option<Arc<ConnectionLimit>>),
    /// `sni_cluster`.
    ServerName,
    /// The end of the chain.
    Terminal(Handler),
}

/// What a network filter's configuration is read with.
#[derive(Clone, Debug)]
pub(super) struct NetworkOrigin {
    direction: Direction,
    /// The listener's address as statistics name it.
    counted: Arc<str>,
    /// Whether Istio's TCP metrics are kept.
    measured: bool,
    /// Whether it is the last of its chain.
    last: bool,
}

impl FilterChain {
    /// Whether the chain was replaced: its connections should finish what they do and close.
    pub fn is_retired(&self) -> bool {
        self.retired.load(Ordering::Relaxed)
    }

    pub(super) fn retire(&self) {
        self.retired.store(true, Ordering::Relaxed);
    }

    /// The filters for a connection that begins; `None` while the configuration of one has not come, and it has no default.
    pub fn filters(&self) -> Option<Arc<NetworkFilters>> {
        match &self.filters {
            Parts::Fixed(filters) => Some(filters.clone()),
            Parts::Mixed(steps) => {
                let parts = steps
                    .iter()
                    .map(|step| match step {
                        Step::Fixed(part) => Some(part.clone()),
                        Step::Discovered(place) => place.load().map(|part| (*part).clone()),
                    })
                    .collect::<Option<Vec<_>>>()?;
                NetworkFilters::of(parts).map(Arc::new)
            }
        }
    }

    /// The connection manager, where the chain ends with one; it never comes by ECDS.
    pub fn manager(&self) -> Option<&Arc<HttpManager>> {
        let handler = match &self.filters {
            Parts::Fixed(filters) => &filters.handler,
            Parts::Mixed(steps) => match steps.last()? {
                Step::Fixed(NetworkPart::Terminal(handler)) => handler,
                Step::Fixed(_) | Step::Discovered(_) => return None,
            },
        };
        match handler {
            Handler::Http(manager) => Some(manager),
            Handler::Tcp(_) => None,
        }
    }

    /// Network filters whose configuration is a resource of its own.
    pub(super) fn discovered(&self) -> impl Iterator<Item = &dyn AnyPlace> {
        let steps = match &self.filters {
            Parts::Fixed(_) => &[][..],
            Parts::Mixed(steps) => steps,
        };
        steps.iter().filter_map(|step| match step {
            Step::Fixed(_) => None,
            Step::Discovered(place) => Some(&**place as &dyn AnyPlace),
        })
    }

    pub(super) fn compile(
        from: &listener::FilterChain,
        direction: Direction,
        context: &mut Context<'_>,
        listener: &str,
        counted: &Arc<str>,
    ) -> Result<Self, Refusal> {
        let tls = transport_socket::downstream(
            from.transport_socket.as_ref(),
            &mut context.slots.secrets,
            listener,
        )
        .within("transport_socket")?;
        // As for HTTP: measured unless Istio's own filters are there and leave it out.
        let names = || from.filters.iter().map(|filter| filter.name.as_str());
        let measured =
            names().any(|name| name == "istio.stats") || !names().any(|name| name.starts_with("istio."));
        let mut steps = Vec::with_capacity(from.filters.len());
        for (index, filter) in from.filters.iter().enumerate() {
            let origin = NetworkOrigin {
                direction,
                counted: counted.clone(),
                measured,
                last: index + 1 == from.filters.len(),
            };
            steps.push(Step::compile(filter, origin, context).within(format!("filters[{index}]"))?);
        }
        let mut fixed = Vec::with_capacity(steps.len());
        let mut mixed = false;
        for step in &steps {
            match step {
                Step::Fixed(part) => fixed.push(part.clone()),
                Step::Discovered(_) => mixed = true,
            }
        }
        let endless = || Refusal::new("filters", "no http_connection_manager and no tcp_proxy");
        let filters = match steps.last() {
            _ if !mixed => Parts::Fixed(Arc::new(NetworkFilters::of(fixed).ok_or_else(endless)?)),
            Some(Step::Discovered(_) | Step::Fixed(NetworkPart::Terminal(_))) => Parts::Mixed(steps.into()),
            Some(Step::Fixed(_)) | None => return Err(endless()),
        };
        Ok(Self {
            name: from.name.as_str().into(),
            server_names: from
                .filter_chain_match
                .iter()
                .flat_map(|criteria| &criteria.server_names)
                .map(|name| name.to_ascii_lowercase().into())
                .collect(),
            tls,
            handshake_timeout: convert::timeout(from.transport_socket_connect_timeout.as_ref())
                .within("transport_socket_connect_timeout")?
                .unwrap_or(DEFAULT_HANDSHAKE),
            filters,
            retired: AtomicBool::new(false),
        })
    }
}

impl NetworkFilters {
    /// `None` without a terminal filter.
    fn of(parts: Vec<NetworkPart>) -> Option<Self> {
        let (mut policies, mut limit, mut by_server_name, mut handler) = (Vec::new(), None, false, None);
        for part in parts {
            match part {
                NetworkPart::Nothing => {}
                NetworkPart::Policy(policy) => policies.push(policy),
                NetworkPart::Limit(own) => limit = own,
                NetworkPart::ServerName => by_server_name = true,
                NetworkPart::Terminal(own) => handler = Some(own),
            }
        }
        Some(Self {
            policies: policies.into(),
            limit,
            by_server_name,
            handler: handler?,
        })
    }
}

impl Step {
    fn compile(
        filter: &listener::Filter,
        origin: NetworkOrigin,
        context: &mut Context<'_>,
    ) -> Result<Self, Refusal> {
        let any = match &filter.config_type {
            Some(listener::filter::ConfigType::TypedConfig(any)) => Some(any),
            Some(listener::filter::ConfigType::ConfigDiscovery(source)) => {
                return Extensions::place(&filter.name, source, origin, context).map(Self::Discovered);
            }
            None => None,
        };
        // Peers are told apart by HTTP headers and endpoint metadata; without mTLS there is no ALPN to carry the TCP
        // exchange.
        if matches!(filter.name.as_str(), "istio.metadata_exchange" | "istio.stats") {
            return Ok(Self::Fixed(NetworkPart::Nothing));
        }
        NetworkPart::compile(&filter.name, any, &origin, context).map(Self::Fixed)
    }
}

impl NetworkPart {
    /// A filter is known by its configuration's type; where that says nothing, by its name.
    fn compile(
        name: &str,
        any: Option<&Any>,
        origin: &NetworkOrigin,
        context: &mut Context<'_>,
    ) -> Result<Self, Refusal> {
        let type_name = any.map_or("", |any| any.type_url.rsplit('/').next().unwrap_or_default());
        let part = match (type_name, name, any) {
            ("envoy.extensions.filters.network.connection_limit.v3.ConnectionLimit", _, any)
            | ("", "envoy.filters.network.connection_limit", any) => {
                Self::Limit(ConnectionLimit::compile(any)?)
            }
            ("envoy.extensions.filters.network.sni_cluster.v3.SniCluster", ..)
            | ("", "envoy.filters.network.sni_cluster", _) => Self::ServerName,
            (MANAGER, _, Some(any)) => {
                let from = convert::unpack(any, MANAGER)?;
                let manager = HttpManager::compile(&from, origin.direction, &origin.counted, context)?;
                Self::Terminal(Handler::Http(Arc::new(manager)))
            }
            (TCP_PROXY, _, Some(any)) => {
                let proxy = TcpProxy::compile(&convert::unpack(any, TCP_PROXY)?, origin.measured, context)?;
                Self::Terminal(Handler::Tcp(Arc::new(proxy)))
            }
            (_, name, any) => match NetworkFilter::compile(name, any, context)? {
                Some(policy) => Self::Policy(Arc::new(policy)),
                None => {
                    return Err(Refusal::new(
                        "",
                        format!("the network filter {name:?} is not supported"),
                    ));
                }
            },
        };
        match (&part, origin.last) {
            (Self::Terminal(_), false) => Err(Refusal::new(
                "",
                format!("the terminal filter {name:?} must be the last of its chain"),
            )),
            _ => Ok(part),
        }
    }
}

impl Discoverable for NetworkPart {
    const KIND: extension::Kind = extension::Kind::Network;
    type Origin = NetworkOrigin;

    fn discovered(
        name: &str,
        any: &Any,
        origin: &NetworkOrigin,
        context: &mut Context<'_>,
    ) -> Result<Self, Refusal> {
        // Its route configurations would come and go with it; its own filters may come by ECDS.
        if any.type_url.ends_with(MANAGER) {
            return Err(not_by_discovery(any));
        }
        let part = Self::compile(name, Some(any), origin, context).within("typed_config")?;
        match (&part, origin.last) {
            (Self::Terminal(_), _) | (_, false) => Ok(part),
            (_, true) => Err(Refusal::new(
                "typed_config",
                format!("the filter {name:?} ends its chain: {} does not", any.type_url),
            )),
        }
    }
}
