//! What a listener does with a connection before a filter chain is chosen, and limits of connections.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serin_xds::pb::envoy::config::listener::v3 as listener;
use serin_xds::pb::envoy::extensions::filters::network::connection_limit::v3 as connection_limit;
use serin_xds::pb::google::protobuf as google;

use super::convert;
use super::extension::{self, AnyPlace, Discoverable, Extensions, Place};
use super::route::Context;
use crate::error::{Refusal, Within};

mod proxy_protocol;

pub use proxy_protocol::ProxyProtocol;
pub(crate) use proxy_protocol::{Pass, type_of};

/// What listener filters do with a connection.
#[derive(Clone, Debug, Default)]
pub struct ListenerFilters {
    /// A PROXY protocol header comes first.
    pub proxy_protocol: Option<Arc<ProxyProtocol>>,
    /// The original destination counts as destination (`original_dst`).
    pub original_dst: bool,
    /// Whether the first bytes are looked at for TLS.
    pub inspect_tls: Inspect,
    /// Whether the first bytes are looked at for HTTP.
    pub inspect_http: Inspect,
}

/// A listener filter and the destination ports for which it is off.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inspect {
    on: bool,
    off_ports: Arc<[std::ops::Range<u32>]>,
}

impl Inspect {
    /// Whether connections to `port` are looked at.
    pub fn applies(&self, port: u16) -> bool {
        let off = |range: &std::ops::Range<u32>| range.contains(&u32::from(port));
        self.on && !self.off_ports.iter().any(off)
    }
}

/// One listener filter.
#[derive(Clone, Debug)]
pub enum ListenerFilter {
    /// `proxy_protocol`.
    ProxyProtocol(Arc<ProxyProtocol>),
    /// `original_dst`.
    OriginalDst,
    /// `tls_inspector`.
    TlsInspector,
    /// `http_inspector`.
    HttpInspector,
}

/// What a listener filter's configuration is read with: where it is off.
type OffPorts = Option<Arc<[std::ops::Range<u32>]>>;

impl ListenerFilter {
    /// A filter is known by its configuration's type; where that says nothing, by its name.
    fn compile(name: &str, any: Option<&google::Any>, off: &OffPorts) -> Result<Self, Refusal> {
        let type_name = any.map_or("", |any| any.type_url.rsplit('/').next().unwrap_or_default());
        let filter = match (type_name, name) {
            ("envoy.extensions.filters.listener.proxy_protocol.v3.ProxyProtocol", _)
            | ("", "envoy.filters.listener.proxy_protocol") => {
                Self::ProxyProtocol(Arc::new(ProxyProtocol::compile(any).within("typed_config")?))
            }
            ("envoy.extensions.filters.listener.original_dst.v3.OriginalDst", _)
            | ("", "envoy.filters.listener.original_dst") => Self::OriginalDst,
            ("envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector", _)
            | ("", "envoy.filters.listener.tls_inspector") => Self::TlsInspector,
            ("envoy.extensions.filters.listener.http_inspector.v3.HttpInspector", _)
            | ("", "envoy.filters.listener.http_inspector") => Self::HttpInspector,
            ("", name) => {
                return Err(Refusal::new(
                    "name",
                    format!("the listener filter {name:?} is not supported"),
                ));
            }
            (kind, name) => {
                return Err(Refusal::new(
                    "name",
                    format!("the listener filter {name:?} ({kind}) is not supported"),
                ));
            }
        };
        match &filter {
            Self::ProxyProtocol(_) | Self::OriginalDst if off.is_some() => Err(Refusal::new(
                "filter_disabled",
                "supported for tls_inspector and http_inspector only",
            )),
            _ => Ok(filter),
        }
    }

    fn add_to(self, all: &mut ListenerFilters, off: &OffPorts) {
        let inspect = || Inspect {
            on: true,
            off_ports: off.clone().unwrap_or_default(),
        };
        match self {
            Self::ProxyProtocol(rules) => all.proxy_protocol = Some(rules),
            Self::OriginalDst => all.original_dst = true,
            Self::TlsInspector => all.inspect_tls = inspect(),
            Self::HttpInspector => all.inspect_http = inspect(),
        }
    }
}

impl Discoverable for ListenerFilter {
    const KIND: extension::Kind = extension::Kind::Listener;
    type Origin = OffPorts;

    fn discovered(
        name: &str,
        any: &google::Any,
        off: &OffPorts,
        _context: &mut Context<'_>,
    ) -> Result<Self, Refusal> {
        Self::compile(name, Some(any), off)
    }
}

/// The listener filters of a listener: those that are fixed, taken together, and those by ECDS.
#[derive(Debug, Default)]
pub struct ListenerSteps {
    fixed: Arc<ListenerFilters>,
    discovered: Vec<(Arc<Place<ListenerFilter>>, OffPorts)>,
}

impl ListenerSteps {
    pub(super) fn add(
        &mut self,
        filter: &listener::ListenerFilter,
        context: &mut Context<'_>,
    ) -> Result<(), Refusal> {
        use listener::listener_filter::ConfigType;
        let off: OffPorts = match &filter.filter_disabled {
            None => None,
            Some(predicate) => Some(disabled_ports(predicate).within("filter_disabled")?.into()),
        };
        let any = match &filter.config_type {
            Some(ConfigType::TypedConfig(any)) => Some(any),
            Some(ConfigType::ConfigDiscovery(source)) => {
                let place = Extensions::place(&filter.name, source, off.clone(), context)?;
                self.discovered.push((place, off));
                return Ok(());
            }
            None => None,
        };
        let filter = ListenerFilter::compile(&filter.name, any, &off)?;
        filter.add_to(Arc::make_mut(&mut self.fixed), &off);
        Ok(())
    }

    /// Chains are told apart by what TLS says, whether or not the listener says that somebody looks.
    pub(super) fn look_for_tls(&mut self) {
        if !self.fixed.inspect_tls.on {
            Arc::make_mut(&mut self.fixed).inspect_tls.on = true;
        }
    }

    /// What they do with a connection that begins; `None` while the configuration of one has not come.
    pub(super) fn now(&self) -> Option<Arc<ListenerFilters>> {
        if self.discovered.is_empty() {
            return Some(self.fixed.clone());
        }
        let mut all = ListenerFilters::clone(&self.fixed);
        for (place, off) in &self.discovered {
            ListenerFilter::clone(&*place.load()?).add_to(&mut all, off);
        }
        Some(Arc::new(all))
    }

    /// Those by ECDS.
    pub(super) fn discovered(&self) -> impl Iterator<Item = &dyn AnyPlace> {
        self.discovered.iter().map(|(place, _)| &**place as &dyn AnyPlace)
    }
}

/// The `connection_limit` network filter: so many connections of its chain at a time, over all workers.
#[derive(Debug)]
pub struct ConnectionLimit {
    most: u64,
    /// How long a connection too many is kept before it is closed.
    pub delay: Duration,
    active: AtomicU64,
    /// Connections turned away.
    pub limited: AtomicU64,
}

impl ConnectionLimit {
    pub(super) fn compile(any: Option<&google::Any>) -> Result<Option<Arc<Self>>, Refusal> {
        let any = any.ok_or_else(|| Refusal::new("typed_config", "is missing"))?;
        let from: connection_limit::ConnectionLimit = convert::unpack(
            any,
            "envoy.extensions.filters.network.connection_limit.v3.ConnectionLimit",
        )?;
        let enabled = from
            .runtime_enabled
            .as_ref()
            .and_then(|flag| flag.default_value.as_ref())
            .is_none_or(|value| value.value);
        let most = from
            .max_connections
            .as_ref()
            .map(|value| value.value)
            .filter(|value| *value > 0)
            .ok_or_else(|| Refusal::new("max_connections", "must be at least 1"))?;
        Ok(enabled.then_some(Arc::new(Self {
            most,
            delay: convert::timeout(from.delay.as_ref())
                .within("delay")?
                .unwrap_or_default(),
            active: AtomicU64::new(0),
            limited: AtomicU64::new(0),
        })))
    }

    /// A place for one more connection, or `None` if there are too many.
    pub fn take(self: &Arc<Self>) -> Option<Taken> {
        if self.active.fetch_add(1, Ordering::Relaxed) >= self.most {
            self.active.fetch_sub(1, Ordering::Relaxed);
            self.limited.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        Some(Taken(self.clone()))
    }
}

/// A connection's place, given back when dropped.
#[derive(Debug)]
pub struct Taken(Arc<ConnectionLimit>);

impl Drop for Taken {
    fn drop(&mut self) {
        self.0.active.fetch_sub(1, Ordering::Relaxed);
    }
}

/// One more than the last port.
const PORTS: u32 = 65_536;

/// Destination ports for which a listener filter is off.
pub(super) fn disabled_ports(
    predicate: &listener::ListenerFilterChainMatchPredicate,
) -> Result<Vec<std::ops::Range<u32>>, Refusal> {
    use listener::listener_filter_chain_match_predicate::Rule;
    match &predicate.rule {
        Some(Rule::DestinationPortRange(range)) => {
            let bound = |value: i32| u32::try_from(value.clamp(0, 65_536)).unwrap_or(0);
            let ports = bound(range.start)..bound(range.end);
            Ok(std::iter::once(ports).collect())
        }
        Some(Rule::OrMatch(set)) => {
            let mut all = Vec::new();
            for rule in &set.rules {
                all.extend(disabled_ports(rule)?);
            }
            Ok(all)
        }
        Some(Rule::AnyMatch(true)) => Ok(std::iter::once(0..PORTS).collect()),
        Some(Rule::NotMatch(inner)) => {
            let mut taken = disabled_ports(inner).within("not_match")?;
            taken.sort_by_key(|range| range.start);
            let (mut free, mut next) = (Vec::new(), 0);
            for range in taken {
                if range.start > next {
                    free.push(next..range.start);
                }
                next = next.max(range.end);
            }
            free.push(next..PORTS);
            Ok(free)
        }
        _ => Err(Refusal::new(
            "",
            "and_match is not supported: say it with or_match, not_match, any_match and destination port ranges",
        )),
    }
}

#[cfg(test)]
mod tests {
    use listener::ListenerFilterChainMatchPredicate as Predicate;
    use listener::listener_filter_chain_match_predicate::{MatchSet, Rule};
    use serin_xds::pb::envoy::r#type::v3::Int32Range;

    use super::*;

    fn rule(rule: Rule) -> Predicate {
        Predicate { rule: Some(rule) }
    }

    #[test]
    fn ports_where_a_filter_is_off_may_be_said_by_what_they_are_not() {
        let range = |start, end| rule(Rule::DestinationPortRange(Int32Range { start, end }));
        let either = rule(Rule::OrMatch(MatchSet {
            rules: vec![range(15_006, 15_007), range(80, 90), range(85, 100)],
        }));
        assert_eq!(disabled_ports(&either).unwrap().len(), 3);
        let neither = rule(Rule::NotMatch(Box::new(either)));
        assert_eq!(
            disabled_ports(&neither).unwrap(),
            [0..80, 100..15_006, 15_007..65_536]
        );
        assert_eq!(disabled_ports(&rule(Rule::AnyMatch(true))).unwrap()[0], 0..65_536);
        let refusal = disabled_ports(&rule(Rule::AndMatch(MatchSet::default()))).unwrap_err();
        assert!(refusal.reason.contains("and_match is not"), "{refusal}");
    }
}
