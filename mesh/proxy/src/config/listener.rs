//! Listeners and filter chains, compiled.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::config::listener::v3 as listener;

mod tcp;

pub use tcp::{TcpProxy, TcpTargets};

use super::chain_match::ChainMatch;
use super::convert::{self, Address};
use super::extension::Place;
use super::hcm::HttpManager;
use super::listener_filters::{ConnectionLimit, ProxyProtocol, disabled_ports};
use super::route::Context;
use super::transport_socket;
use crate::error::{Refusal, Within};
use crate::observe::access_log::AccessLogs;
use crate::policy::network::NetworkFilter;
use crate::policy::stats::{LISTENER, Traffic};
use crate::tls::downstream::DownstreamTls;
use crate::tls::secret::SecretSlot;

/// Envoy's limit for protocol detection when the listener does not say.
const DEFAULT_DETECTION: Duration = Duration::from_secs(15);
/// Our limit for a TLS handshake when the chain does not say; Envoy has none.
const DEFAULT_HANDSHAKE: Duration = Duration::from_secs(15);
/// Our limit where the configuration switches the limit off (`0s`, as istiod does): a client that waits for the server
/// to speak first gets its connection after this, instead of never.
const UNLIMITED_DETECTION: Duration = Duration::from_millis(500);

/// Which side of the workload a listener serves; decides `reporter` in the metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Towards the local application: `reporter="destination"`.
    Inbound,
    /// From the local application, or a gateway: `reporter="source"`.
    Outbound,
    /// Not said: like outbound, without Istio's metrics.
    Unspecified,
}

/// A compiled listener.
#[derive(Debug)]
pub struct Listener {
    /// Its name.
    pub name: Arc<str>,
    /// Where it listens, or stands for when it is not bound.
    pub address: SocketAddr,
    /// The same with `additional_addresses`.
    pub addresses: Box<[SocketAddr]>,
    /// Connections are spread exactly evenly over the workers.
    pub exact_balance: bool,
    /// A PROXY protocol header comes first.
    pub proxy_protocol: Option<ProxyProtocol>,
    /// Whether it has a socket.
    pub bind: bool,
    /// Connections are handed to the listener of their original destination.
    pub use_original_dst: bool,
    /// The original destination counts as destination (`original_dst` listener filter).
    pub original_dst: bool,
    /// Side.
    pub direction: Direction,
    /// Whether the first bytes are looked at for TLS.
    pub inspect_tls: Inspect,
    /// Whether the first bytes are looked at for HTTP.
    pub inspect_http: Inspect,
    /// How long to wait for these bytes.
    pub detection_timeout: Duration,
    /// Its connections.
    pub traffic: Traffic,
    /// Access logs of its connections.
    pub logs: Option<Arc<AccessLogs>>,
    /// When the time is over: go on without knowledge (or else close).
    pub continue_on_timeout: bool,
    matcher: ChainMatch,
    chains: Box<[Arc<FilterChain>]>,
    default_chain: Option<Arc<FilterChain>>,
}

/// A listener filter and the destination ports for which it is off.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inspect {
    on: bool,
    off_ports: Box<[std::ops::Range<u32>]>,
}

impl Inspect {
    /// Whether connections to `port` are looked at.
    pub fn applies(&self, port: u16) -> bool {
        let off = |range: &std::ops::Range<u32>| range.contains(&u32::from(port));
        self.on && !self.off_ports.iter().any(off)
    }
}

/// What is known of a connection when its chain is chosen.
#[derive(Clone, Debug)]
pub struct ConnectionFacts<'a> {
    /// Where the client wanted to go.
    pub destination: SocketAddr,
    /// Who the client is.
    pub source: SocketAddr,
    /// Who is connected to us: another than the client behind a balancer that speaks the PROXY protocol.
    pub direct_source: SocketAddr,
    /// `tls` or `raw_buffer`.
    pub transport: &'a str,
    /// Name in the TLS ClientHello.
    pub server_name: Option<&'a str>,
    /// `http/1.1`, `h2c`, or what ALPN offers.
    pub application: &'a [&'a str],
}

/// A compiled filter chain.
#[derive(Debug)]
pub struct FilterChain {
    /// Its name.
    pub name: Box<str>,
    /// What judges a connection before its bytes go on.
    pub policies: Box<[NetworkFilter]>,
    /// Server names of its match, lower case; a chain without any takes every name.
    pub server_names: Box<[Box<str>]>,
    /// TLS that is ended here.
    pub tls: Option<Arc<DownstreamTls>>,
    /// Limit for the TLS handshake.
    pub handshake_timeout: Duration,
    /// Connections at a time.
    pub limit: Option<Arc<ConnectionLimit>>,
    /// What happens to the bytes.
    pub handler: Handler,
    retired: AtomicBool,
}

impl FilterChain {
    /// Whether the chain was replaced: its connections should finish what they do and close.
    pub fn is_retired(&self) -> bool {
        self.retired.load(Ordering::Relaxed)
    }
}

/// The terminal network filter.
#[derive(Debug)]
pub enum Handler {
    /// HTTP.
    Http(Arc<HttpManager>),
    /// Bytes.
    Tcp(Arc<TcpProxy>),
}

/// A range of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cidr {
    address: IpAddr,
    length: u8,
}

impl Cidr {
    pub(crate) fn compile(from: &core::CidrRange) -> Result<Self, Refusal> {
        let address: IpAddr = from.address_prefix.parse().map_err(|_| {
            Refusal::new(
                "address_prefix",
                format!("{:?} is no address", from.address_prefix),
            )
        })?;
        let widest = if address.is_ipv4() { 32 } else { 128 };
        let length = from.prefix_len.as_ref().map_or(0, |length| length.value);
        match u8::try_from(length) {
            Ok(length) if length <= widest => Ok(Self { address, length }.masked()),
            _ => Err(Refusal::new(
                "prefix_len",
                format!("{length} is longer than the address"),
            )),
        }
    }

    /// Every address.
    pub(super) fn everything() -> [Self; 2] {
        [IpAddr::from([0; 4]), IpAddr::from([0; 16])].map(|address| Self { address, length: 0 })
    }

    /// Bits that are compared.
    pub(crate) fn length(&self) -> u8 {
        self.length
    }

    /// The address, if there is only one.
    pub(super) fn single(&self) -> Option<IpAddr> {
        let widest = if self.address.is_ipv4() { 32 } else { 128 };
        (self.length == widest).then_some(self.address)
    }

    /// Without the bits that are not compared.
    fn masked(self) -> Self {
        let address = match self.address {
            IpAddr::V4(address) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(self.length)).unwrap_or(0);
                IpAddr::from((u32::from(address) & mask).to_be_bytes())
            }
            IpAddr::V6(address) => {
                let mask = u128::MAX.checked_shl(128 - u32::from(self.length)).unwrap_or(0);
                IpAddr::from((u128::from(address) & mask).to_be_bytes())
            }
        };
        Self { address, ..self }
    }

    /// Whether `address` is in the range; an IPv4-mapped IPv6 address counts as IPv4.
    pub fn contains(&self, address: IpAddr) -> bool {
        match (self.address, address.to_canonical()) {
            (IpAddr::V4(range), IpAddr::V4(address)) => {
                let shift = 32 - u32::from(self.length);
                u32::from(range).checked_shr(shift).unwrap_or(0)
                    == u32::from(address).checked_shr(shift).unwrap_or(0)
            }
            (IpAddr::V6(range), IpAddr::V6(address)) => {
                let shift = 128 - u32::from(self.length);
                u128::from(range).checked_shr(shift).unwrap_or(0)
                    == u128::from(address).checked_shr(shift).unwrap_or(0)
            }
            _ => false,
        }
    }
}

impl Listener {
    /// Compiles the message.
    pub(crate) fn compile(from: &listener::Listener, context: &mut Context<'_>) -> Result<Self, Refusal> {
        let address = match convert::address(from.address.as_ref())? {
            Address::Tcp(address) => address,
            other => return Err(Refusal::new("address", format!("cannot listen on {other}"))),
        };
        let unsupported = [
            ("udp_listener_config", from.udp_listener_config.is_some()),
            ("api_listener", from.api_listener.is_some()),
            ("filter_chain_matcher", from.filter_chain_matcher.is_some()),
            (
                "transparent",
                from.transparent.as_ref().is_some_and(|value| value.value),
            ),
            ("fcds_config", from.fcds_config.is_some()),
        ];
        if let Some((field, _)) = unsupported.iter().find(|(_, present)| *present) {
            return Err(Refusal::new(*field, "not supported"));
        }
        let direction = match core::TrafficDirection::try_from(from.traffic_direction) {
            Ok(core::TrafficDirection::Inbound) => Direction::Inbound,
            Ok(core::TrafficDirection::Outbound) => Direction::Outbound,
            Ok(core::TrafficDirection::Unspecified) | Err(_) => Direction::Unspecified,
        };
        let mut addresses = vec![address];
        for (index, more) in from.additional_addresses.iter().enumerate() {
            let path = format!("additional_addresses[{index}].address");
            match convert::address(more.address.as_ref()).within(&path)? {
                Address::Tcp(address) => addresses.push(address),
                other => return Err(Refusal::new(path, format!("cannot listen on {other}"))),
            }
        }
        use listener::listener::connection_balance_config::BalanceType;
        let balance = from
            .connection_balance_config
            .as_ref()
            .and_then(|config| config.balance_type.as_ref());
        let mut out = Self {
            name: from.name.as_str().into(),
            address,
            addresses: addresses.into(),
            exact_balance: match balance {
                None => false,
                Some(BalanceType::ExactBalance(_)) => true,
                Some(_) => {
                    return Err(Refusal::new(
                        "connection_balance_config",
                        "only exact_balance is supported",
                    ));
                }
            },
            proxy_protocol: None,
            bind: from.bind_to_port.as_ref().is_none_or(|value| value.value)
                && from
                    .deprecated_v1
                    .as_ref()
                    .and_then(|old| old.bind_to_port.as_ref())
                    .is_none_or(|value| value.value),
            use_original_dst: from.use_original_dst.as_ref().is_some_and(|value| value.value),
            original_dst: false,
            direction,
            traffic: {
                let (workers, registry) = context.counters();
                let name = format!("{}_{}", address.ip(), address.port());
                registry.traffic(workers, &LISTENER, &name)
            },
            logs: AccessLogs::compile(&from.access_log, context)?.map(Arc::new),
            inspect_tls: Inspect::default(),
            inspect_http: Inspect::default(),
            detection_timeout: match &from.listener_filters_timeout {
                None => DEFAULT_DETECTION,
                given => convert::timeout(given.as_ref())
                    .within("listener_filters_timeout")?
                    .unwrap_or(UNLIMITED_DETECTION),
            },
            continue_on_timeout: from.continue_on_listener_filters_timeout
                || convert::timeout(from.listener_filters_timeout.as_ref())
                    .ok()
                    .flatten()
                    .is_none(),
            matcher: ChainMatch::default(),
            chains: Box::default(),
            default_chain: None,
        };
        for (index, filter) in from.listener_filters.iter().enumerate() {
            out.add_listener_filter(filter)
                .within(format!("listener_filters[{index}]"))?;
        }
        out.chains = from
            .filter_chains
            .iter()
            .enumerate()
            .map(|(index, chain)| {
                out.matcher
                    .add(index, chain.filter_chain_match.as_ref())
                    .within("filter_chain_match")
                    .and_then(|()| compile_chain(chain, direction, context, &from.name))
                    .map(Arc::new)
                    .within(format!("filter_chains[{index}]"))
            })
            .collect::<Result<_, _>>()?;
        out.default_chain = from
            .default_filter_chain
            .as_ref()
            .map(|chain| compile_chain(chain, direction, context, &from.name).map(Arc::new))
            .transpose()
            .within("default_filter_chain")?;
        if out.matcher.needs_tls() && !out.inspect_tls.on {
            out.inspect_tls.on = true;
        }
        if out.chains.is_empty() && out.default_chain.is_none() {
            return Err(Refusal::new("filter_chains", "a listener needs a filter chain"));
        }
        Ok(out)
    }

    fn add_listener_filter(&mut self, filter: &listener::ListenerFilter) -> Result<(), Refusal> {
        let off_ports = match &filter.filter_disabled {
            None => Box::default(),
            Some(predicate) => disabled_ports(predicate).within("filter_disabled")?.into(),
        };
        let any = match &filter.config_type {
            Some(listener::listener_filter::ConfigType::TypedConfig(any)) => Some(any),
            Some(listener::listener_filter::ConfigType::ConfigDiscovery(_)) => {
                return Err(Refusal::new("config_discovery", "not supported"));
            }
            None => None,
        };
        match filter.name.as_str() {
            "envoy.filters.listener.proxy_protocol" => {
                if filter.filter_disabled.is_some() {
                    return Err(Refusal::new(
                        "filter_disabled",
                        "not supported for proxy_protocol",
                    ));
                }
                self.proxy_protocol = Some(ProxyProtocol::compile(any).within("typed_config")?);
            }
            "envoy.filters.listener.original_dst" => self.original_dst = true,
            "envoy.filters.listener.tls_inspector" => self.inspect_tls = Inspect { on: true, off_ports },
            "envoy.filters.listener.http_inspector" => self.inspect_http = Inspect { on: true, off_ports },
            other => {
                return Err(Refusal::new(
                    "name",
                    format!("the listener filter {other:?} is not supported"),
                ));
            }
        }
        Ok(())
    }

    /// The chain for a connection, or `None` if it must be closed (flag `NR`).
    pub fn select(&self, facts: &ConnectionFacts<'_>) -> Option<&Arc<FilterChain>> {
        self.matcher
            .find(facts)
            .and_then(|index| self.chains.get(index))
            .or(self.default_chain.as_ref())
    }

    /// The slots of secrets that its chains need.
    pub fn secrets(&self) -> impl Iterator<Item = &Arc<SecretSlot>> {
        self.all_chains()
            .filter_map(|chain| chain.tls.as_ref())
            .flat_map(|tls| tls.secrets())
    }

    /// Filters whose configuration is a resource of its own.
    pub fn discovered(&self) -> impl Iterator<Item = &Arc<Place>> {
        self.all_chains().flat_map(|chain| match &chain.handler {
            Handler::Http(manager) => Some(manager.filters.discovered()).into_iter().flatten(),
            Handler::Tcp(_) => None.into_iter().flatten(),
        })
    }

    /// Whether everything that it needs beside routes has come.
    pub fn is_warm(&self) -> bool {
        self.secrets().all(|secret| secret.version() > 0) && self.discovered().all(|place| place.is_settled())
    }

    /// Every chain.
    pub fn all_chains(&self) -> impl Iterator<Item = &Arc<FilterChain>> {
        self.chains.iter().chain(&self.default_chain)
    }

    /// Names of the route configurations that the listener needs.
    pub fn route_names(&self) -> impl Iterator<Item = Arc<str>> {
        self.all_chains().filter_map(|chain| match &chain.handler {
            Handler::Http(manager) => manager.rds_name(),
            Handler::Tcp(_) => None,
        })
    }

    /// Marks every chain as replaced.
    pub fn retire(&self) {
        for chain in self.all_chains() {
            chain.retired.store(true, Ordering::Relaxed);
        }
    }
}

fn compile_chain(
    from: &listener::FilterChain,
    direction: Direction,
    context: &mut Context<'_>,
    listener: &str,
) -> Result<FilterChain, Refusal> {
    let tls = transport_socket::downstream(
        from.transport_socket.as_ref(),
        &mut context.slots.secrets,
        listener,
    )
    .within("transport_socket")?;
    // As for HTTP: measured unless Istio's own filters are there and leave it out.
    let mut measured = !from
        .filters
        .iter()
        .any(|filter| filter.name.starts_with("istio."));
    let (mut handler, mut limit, mut by_server_name) = (None, None, false);
    let mut policies = Vec::new();
    for (index, filter) in from.filters.iter().enumerate() {
        let path = format!("filters[{index}]");
        let any = match &filter.config_type {
            Some(listener::filter::ConfigType::TypedConfig(any)) => Some(any),
            Some(listener::filter::ConfigType::ConfigDiscovery(_)) => {
                return Err(Refusal::new(
                    path,
                    "filters by extension discovery are not supported",
                ));
            }
            None => None,
        };
        match (filter.name.as_str(), any) {
            // Peers are told apart by HTTP headers and endpoint metadata; without mTLS there is no ALPN to carry the
            // TCP exchange.
            ("istio.metadata_exchange", _) => {}
            ("istio.stats", _) => measured = true,
            ("envoy.filters.network.connection_limit", any) => {
                limit = ConnectionLimit::compile(any).within(&path)?;
            }
            ("envoy.filters.network.sni_cluster", _) => by_server_name = true,
            ("envoy.filters.network.http_connection_manager", Some(any)) => {
                let message = convert::unpack(
                    any,
                    "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
                )
                .within(&path)?;
                let manager = HttpManager::compile(&message, direction, context).within(&path)?;
                handler = Some(Handler::Http(Arc::new(manager)));
            }
            ("envoy.filters.network.tcp_proxy", Some(any)) => {
                let message = convert::unpack(any, "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy")
                    .within(&path)?;
                let mut proxy = TcpProxy::compile(&message, measured, context).within(&path)?;
                proxy.by_server_name = by_server_name.then(|| context.slots.directory.clone());
                let by_state = policies.iter().any(
                    |policy| matches!(policy, NetworkFilter::SetFilterState(state) if state.names_cluster()),
                );
                proxy.by_state = by_state.then(|| context.slots.directory.clone());
                handler = Some(Handler::Tcp(Arc::new(proxy)));
            }
            (name, any) => match NetworkFilter::compile(name, any, context).within(&path)? {
                Some(policy) => policies.push(policy),
                None => {
                    return Err(Refusal::new(
                        path,
                        format!("the network filter {name:?} is not supported"),
                    ));
                }
            },
        }
    }
    Ok(FilterChain {
        name: from.name.as_str().into(),
        policies: policies.into(),
        server_names: from
            .filter_chain_match
            .iter()
            .flat_map(|criteria| &criteria.server_names)
            .map(|name| name.to_ascii_lowercase().into())
            .collect(),
        tls,
        limit,
        handshake_timeout: convert::timeout(from.transport_socket_connect_timeout.as_ref())
            .within("transport_socket_connect_timeout")?
            .unwrap_or(DEFAULT_HANDSHAKE),
        handler: handler
            .ok_or_else(|| Refusal::new("filters", "no http_connection_manager and no tcp_proxy"))?,
        retired: AtomicBool::new(false),
    })
}
