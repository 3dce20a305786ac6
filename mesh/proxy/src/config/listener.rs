//! Listeners and filter chains, compiled.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::config::listener::v3 as listener;
use serin_xds::pb::envoy::config::listener::v3::listener::connection_balance_config::BalanceType;

mod chain;
mod tcp;

pub use chain::{FilterChain, Handler, NetworkFilters};
pub use tcp::{TcpProxy, TcpTargets};

use super::chain_match::ChainMatch;
use super::convert::{self, Address, refuse_present};
use super::extension::AnyPlace;
use super::listener_filters::{ListenerFilters, ListenerSteps};
use super::route::Context;
use crate::error::{Refusal, Within};
use crate::observe::access_log::AccessLogs;
use crate::policy::stats::{Counter, LISTENER, Traffic};
use crate::tls::secret::SecretSlot;

/// Envoy's limit for protocol detection when the listener does not say.
const DEFAULT_DETECTION: Duration = Duration::from_secs(15);
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
    /// Whether it has a socket.
    pub bind: bool,
    /// Connections are handed to the listener of their original destination.
    pub use_original_dst: bool,
    /// Side.
    pub direction: Direction,
    /// How long to wait for these bytes.
    pub detection_timeout: Duration,
    /// Its connections.
    pub traffic: Traffic,
    /// Access logs of its connections.
    pub logs: Option<Arc<AccessLogs>>,
    /// When the time is over: go on without knowledge (or else close).
    pub continue_on_timeout: bool,
    filters: ListenerSteps,
    /// Connections closed because the configuration of a listener filter has not come.
    pub without_filter: Arc<Counter>,
    /// The same for a network filter.
    pub without_network_filter: Arc<Counter>,
    matcher: ChainMatch,
    chains: Box<[Arc<FilterChain>]>,
    default_chain: Option<Arc<FilterChain>>,
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

impl Direction {
    fn of(from: &listener::Listener) -> Self {
        match core::TrafficDirection::try_from(from.traffic_direction) {
            Ok(core::TrafficDirection::Inbound) => Self::Inbound,
            Ok(core::TrafficDirection::Outbound) => Self::Outbound,
            Ok(core::TrafficDirection::Unspecified) | Err(_) => Self::Unspecified,
        }
    }
}

fn refuse_unsupported(from: &listener::Listener) -> Result<(), Refusal> {
    refuse_present(
        &[
            ("udp_listener_config", from.udp_listener_config.is_some()),
            ("api_listener", from.api_listener.is_some()),
            ("filter_chain_matcher", from.filter_chain_matcher.is_some()),
            (
                "transparent",
                from.transparent.as_ref().is_some_and(|value| value.value),
            ),
            ("fcds_config", from.fcds_config.is_some()),
        ],
        "not supported",
    )
}

/// Where it listens: its own address first.
fn addresses(from: &listener::Listener) -> Result<Vec<SocketAddr>, Refusal> {
    let tcp = |address, path: &str| match address {
        Address::Tcp(address) => Ok(address),
        other => Err(Refusal::new(path, format!("cannot listen on {other}"))),
    };
    let mut addresses = vec![tcp(convert::address(from.address.as_ref())?, "address")?];
    for (index, more) in from.additional_addresses.iter().enumerate() {
        let path = format!("additional_addresses[{index}].address");
        let address = convert::address(more.address.as_ref()).within(&path)?;
        addresses.push(tcp(address, &path)?);
    }
    Ok(addresses)
}

/// Whether every worker gets as many connections as any other.
fn exact_balance(from: &listener::Listener) -> Result<bool, Refusal> {
    let config = from.connection_balance_config.as_ref();
    match config.and_then(|config| config.balance_type.as_ref()) {
        None => Ok(false),
        Some(BalanceType::ExactBalance(_)) => Ok(true),
        Some(_) => Err(Refusal::new(
            "connection_balance_config",
            "only exact_balance is supported",
        )),
    }
}

/// Whether it has sockets of its own.
fn binds(from: &listener::Listener) -> bool {
    let older = from
        .deprecated_v1
        .as_ref()
        .and_then(|old| old.bind_to_port.as_ref());
    from.bind_to_port.as_ref().is_none_or(|value| value.value) && older.is_none_or(|value| value.value)
}

impl Listener {
    /// Compiles the message.
    pub(crate) fn compile(from: &listener::Listener, context: &mut Context<'_>) -> Result<Self, Refusal> {
        let addresses = addresses(from)?;
        let address = addresses[0];
        refuse_unsupported(from)?;
        let counted: Arc<str> = format!("{}_{}", address.ip(), address.port()).into();
        let logs = AccessLogs::compile(&from.access_log, context)?.map(Arc::new);
        let (workers, registry) = context.counters();
        let mut counter = |name| registry.counter(workers, name, &[(LISTENER.label, &counted)]);
        let (without_filter, without_network_filter) = (
            counter("envoy_listener_extension_config_missing"),
            counter("envoy_listener_network_extension_config_missing"),
        );
        let timeout = convert::timeout(from.listener_filters_timeout.as_ref());
        let timeout = timeout.within("listener_filters_timeout")?;
        let mut out = Self {
            name: from.name.as_str().into(),
            address,
            addresses: addresses.into(),
            exact_balance: exact_balance(from)?,
            bind: binds(from),
            use_original_dst: from.use_original_dst.as_ref().is_some_and(|value| value.value),
            direction: Direction::of(from),
            traffic: registry.traffic(workers, &counted),
            without_filter,
            without_network_filter,
            filters: ListenerSteps::default(),
            logs,
            detection_timeout: match from.listener_filters_timeout {
                None => DEFAULT_DETECTION,
                Some(_) => timeout.unwrap_or(UNLIMITED_DETECTION),
            },
            continue_on_timeout: from.continue_on_listener_filters_timeout || timeout.is_none(),
            matcher: ChainMatch::default(),
            chains: Box::default(),
            default_chain: None,
        };
        for (index, filter) in from.listener_filters.iter().enumerate() {
            out.filters
                .add(filter, context)
                .within(format!("listener_filters[{index}]"))?;
        }
        out.take_chains(from, context, &counted)?;
        Ok(out)
    }

    fn take_chains(
        &mut self,
        from: &listener::Listener,
        context: &mut Context<'_>,
        counted: &Arc<str>,
    ) -> Result<(), Refusal> {
        let direction = self.direction;
        let mut compile =
            |chain| FilterChain::compile(chain, direction, context, &from.name, counted).map(Arc::new);
        self.chains = from
            .filter_chains
            .iter()
            .enumerate()
            .map(|(index, chain)| {
                self.matcher
                    .add(index, chain.filter_chain_match.as_ref())
                    .within("filter_chain_match")
                    .and_then(|()| compile(chain))
                    .within(format!("filter_chains[{index}]"))
            })
            .collect::<Result<_, _>>()?;
        self.default_chain = from
            .default_filter_chain
            .as_ref()
            .map(compile)
            .transpose()
            .within("default_filter_chain")?;
        if self.matcher.needs_tls() {
            self.filters.look_for_tls();
        }
        if self.chains.is_empty() && self.default_chain.is_none() {
            return Err(Refusal::new("filter_chains", "a listener needs a filter chain"));
        }
        Ok(())
    }

    /// What its listener filters do with a connection that begins; `None` while the configuration of one has not come, and it
    /// has no default.
    pub fn before(&self) -> Option<Arc<ListenerFilters>> {
        self.filters.now()
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
    pub fn discovered(&self) -> impl Iterator<Item = &dyn AnyPlace> {
        let of_chains = self.all_chains().flat_map(|chain| {
            let http = chain
                .manager()
                .into_iter()
                .flat_map(|manager| manager.filters.discovered());
            chain.discovered().chain(http)
        });
        self.filters.discovered().chain(of_chains)
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
        self.all_chains().filter_map(|chain| chain.manager()?.rds_name())
    }

    /// Marks every chain as replaced.
    pub fn retire(&self) {
        for chain in self.all_chains() {
            chain.retire();
        }
    }
}
