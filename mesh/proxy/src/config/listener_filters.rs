//! What a listener does with a connection before a filter chain is chosen, and limits of connections.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serin_xds::pb::envoy::config::listener::v3 as listener;
use serin_xds::pb::envoy::extensions::filters::listener::proxy_protocol::v3 as proxy_protocol;
use serin_xds::pb::envoy::extensions::filters::network::connection_limit::v3 as connection_limit;
use serin_xds::pb::google::protobuf as google;

use super::convert;
use super::transport_socket::ProxyVersion;
use crate::error::{Refusal, Within};

/// The `proxy_protocol` listener filter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProxyProtocol {
    /// Connections without a header are served as they are.
    pub optional: bool,
    no_v1: bool,
    no_v2: bool,
}

impl ProxyProtocol {
    pub(super) fn compile(any: Option<&google::Any>) -> Result<Self, Refusal> {
        let Some(any) = any else {
            return Ok(Self::default());
        };
        let from: proxy_protocol::ProxyProtocol = convert::unpack(
            any,
            "envoy.extensions.filters.listener.proxy_protocol.v3.ProxyProtocol",
        )?;
        if !from.rules.is_empty() || from.pass_through_tlvs.is_some() {
            return Err(Refusal::new("rules", "TLVs are not kept"));
        }
        // V1 is 0, V2 is 1.
        Ok(Self {
            optional: from.allow_requests_without_proxy_protocol,
            no_v1: from.disallowed_versions.contains(&0),
            no_v2: from.disallowed_versions.contains(&1),
        })
    }

    /// Whether headers of that version are taken.
    pub fn allows(&self, version: ProxyVersion) -> bool {
        match version {
            ProxyVersion::V1 => !self.no_v1,
            ProxyVersion::V2 => !self.no_v2,
        }
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
    pub fn take(self: &Arc<Self>) -> Option<Place> {
        if self.active.fetch_add(1, Ordering::Relaxed) >= self.most {
            self.active.fetch_sub(1, Ordering::Relaxed);
            self.limited.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        Some(Place(self.clone()))
    }
}

/// A connection's place, given back when dropped.
#[derive(Debug)]
pub struct Place(Arc<ConnectionLimit>);

impl Drop for Place {
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
