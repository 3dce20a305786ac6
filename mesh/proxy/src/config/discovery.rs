//! Where the endpoints of a cluster come from.

use std::time::Duration;

use serin_xds::pb::envoy::config::cluster::v3 as cluster;

use super::convert;
use crate::error::{Refusal, Within};

/// How often names are resolved again when nothing else is said (Envoy's default).
const DEFAULT_DNS_REFRESH: Duration = Duration::from_secs(5);

/// Where the endpoints come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Discovery {
    /// From the cluster itself.
    Static,
    /// From EDS under this name.
    Eds(Box<str>),
    /// Names of the cluster's own assignment are resolved again and again.
    Dns {
        /// Only the first address is used, and old connections are kept.
        logical: bool,
        /// Interval.
        refresh: Duration,
        /// Which addresses count.
        family: Family,
    },
    /// The address that the client wanted to reach; the port may be replaced.
    OriginalDst {
        /// Replacement of the port.
        port: Option<u16>,
    },
}

/// Which of a name's addresses are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4 only.
    V4,
    /// IPv6 only.
    V6,
    /// IPv4, or IPv6 when there is none.
    V4First,
    /// IPv6, or IPv4 when there is none (Envoy's AUTO).
    V6First,
    /// Both.
    All,
}

impl Family {
    /// The addresses that count.
    pub fn choose(self, mut addresses: Vec<std::net::SocketAddr>) -> Vec<std::net::SocketAddr> {
        let (v4, v6) = (
            addresses.iter().any(|a| a.is_ipv4()),
            addresses.iter().any(|a| a.is_ipv6()),
        );
        match self {
            Self::V4 => addresses.retain(|a| a.is_ipv4()),
            Self::V6 => addresses.retain(|a| a.is_ipv6()),
            Self::V4First if v4 => addresses.retain(|a| a.is_ipv4()),
            Self::V6First if v6 => addresses.retain(|a| a.is_ipv6()),
            Self::V4First | Self::V6First | Self::All => {}
        }
        addresses
    }
}

pub(super) fn compile_discovery(from: &cluster::Cluster) -> Result<Discovery, Refusal> {
    use cluster::cluster::{ClusterDiscoveryType, DiscoveryType, LbConfig};
    let kind = match &from.cluster_discovery_type {
        None => DiscoveryType::Static,
        Some(ClusterDiscoveryType::Type(number)) => DiscoveryType::try_from(*number)
            .map_err(|_| Refusal::new("type", format!("{number} is unknown")))?,
        Some(ClusterDiscoveryType::ClusterType(custom)) => {
            return Err(Refusal::new(
                "cluster_type",
                format!("{:?} is not supported", custom.name),
            ));
        }
    };
    Ok(match kind {
        DiscoveryType::Static => Discovery::Static,
        DiscoveryType::Eds => {
            let service = from
                .eds_cluster_config
                .as_ref()
                .map_or("", |config| config.service_name.as_str());
            Discovery::Eds(
                if service.is_empty() {
                    from.name.as_str()
                } else {
                    service
                }
                .into(),
            )
        }
        DiscoveryType::StrictDns | DiscoveryType::LogicalDns => Discovery::Dns {
            logical: kind == DiscoveryType::LogicalDns,
            family: match cluster::cluster::DnsLookupFamily::try_from(from.dns_lookup_family) {
                Ok(cluster::cluster::DnsLookupFamily::V4Only) => Family::V4,
                Ok(cluster::cluster::DnsLookupFamily::V6Only) => Family::V6,
                Ok(cluster::cluster::DnsLookupFamily::V4Preferred) => Family::V4First,
                Ok(cluster::cluster::DnsLookupFamily::All) => Family::All,
                Ok(cluster::cluster::DnsLookupFamily::Auto) | Err(_) => Family::V6First,
            },
            refresh: convert::timeout(from.dns_refresh_rate.as_ref())
                .within("dns_refresh_rate")?
                .unwrap_or(DEFAULT_DNS_REFRESH),
        },
        DiscoveryType::OriginalDst => {
            let mut port = None;
            if let Some(LbConfig::OriginalDstLbConfig(config)) = &from.lb_config {
                if config.use_http_header || config.metadata_key.is_some() {
                    return Err(Refusal::new(
                        "original_dst_lb_config",
                        "destinations named by headers or metadata are not supported",
                    ));
                }
                port = config
                    .upstream_port_override
                    .as_ref()
                    .and_then(|port| u16::try_from(port.value).ok());
            }
            Discovery::OriginalDst { port }
        }
    })
}
