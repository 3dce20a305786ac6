//! What a listener does with a connection before a filter chain is chosen, and limits of connections.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

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
