//! The on-demand filter: which requests may wait for the virtual host or the cluster that they need.

use std::time::Duration;

use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::extensions::filters::http::on_demand::v3 as on_demand;

use serin_xds::pb::envoy::extensions::filters::network::tcp_proxy::v3::tcp_proxy;

use crate::config::convert;
use crate::error::{Refusal, Within};

/// Envoy's limit for a cluster when the filter does not say.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(5);

/// The same for TCP proxies.
const DEFAULT_TCP_TIMEOUT: Duration = Duration::from_secs(60);

/// Clusters on demand (`OnDemandCds`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OnDemandClusters {
    /// How long a request waits.
    pub timeout: Duration,
}

/// Whether the source is the stream that everything comes on.
pub(crate) fn aggregated(from: Option<&core::ConfigSource>) -> Result<(), Refusal> {
    use core::config_source::ConfigSourceSpecifier;
    match from.and_then(|source| source.config_source_specifier.as_ref()) {
        Some(ConfigSourceSpecifier::Ads(_) | ConfigSourceSpecifier::Self_(_)) => Ok(()),
        Some(_) => Err(Refusal::new("", "only ads: {} is supported")),
        None => Err(Refusal::new("", "is missing; use ads: {}")),
    }
}

impl OnDemandClusters {
    fn compile(from: &on_demand::OnDemandCds) -> Result<Self, Refusal> {
        if !from.resources_locator.is_empty() {
            return Err(Refusal::new("resources_locator", "not supported"));
        }
        aggregated(from.source.as_ref()).within("source")?;
        Ok(Self {
            timeout: convert::timeout(from.timeout.as_ref())
                .within("timeout")?
                .unwrap_or(DEFAULT_TIMEOUT),
        })
    }

    /// Of a TCP proxy; `None` where it does not say where from.
    pub(crate) fn of_tcp(from: &tcp_proxy::OnDemand) -> Result<Option<Self>, Refusal> {
        if !from.resources_locator.is_empty() {
            return Err(Refusal::new("resources_locator", "not supported"));
        }
        let Some(source) = &from.odcds_config else {
            return Ok(None);
        };
        aggregated(Some(source)).within("odcds_config")?;
        Ok(Some(Self {
            timeout: convert::timeout(from.timeout.as_ref())
                .within("timeout")?
                .unwrap_or(DEFAULT_TCP_TIMEOUT),
        }))
    }

    /// Of the filter in a chain.
    pub(crate) fn of_filter(from: &on_demand::OnDemand) -> Result<Option<Self>, Refusal> {
        from.odcds.as_ref().map(Self::compile).transpose().within("odcds")
    }

    /// Of a route; `None` switches clusters on demand off there.
    pub(crate) fn of_route(from: &on_demand::PerRouteConfig) -> Result<Option<Self>, Refusal> {
        from.odcds.as_ref().map(Self::compile).transpose().within("odcds")
    }
}
