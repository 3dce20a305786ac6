//! Resolving the endpoints of STRICT_DNS and LOGICAL_DNS clusters, again and again.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::config::endpoint::v3 as endpoint;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::Proxy;
use crate::config::cluster::{Cluster, Discovery, Family};
use crate::config::convert::{self, Address};

/// Limit of one look-up.
const LIMIT: Duration = Duration::from_secs(5);

/// Resolves until cancelled. A name that cannot be resolved keeps its last addresses.
pub async fn run(proxy: Arc<Proxy>, cancel: CancellationToken) {
    let mut due: HashMap<Arc<str>, Instant> = HashMap::new();
    let mut changes = proxy.changes();
    loop {
        changes.borrow_and_update();
        let clusters = proxy.store(|store| store.dns_clusters());
        let present: HashSet<&str> = clusters.iter().map(|cluster| &*cluster.name).collect();
        due.retain(|name, _| present.contains(&**name));
        for cluster in clusters {
            let Discovery::Dns {
                logical,
                refresh,
                family,
            } = cluster.discovery
            else {
                continue;
            };
            if due.get(&cluster.name).is_some_and(|at| Instant::now() < *at) {
                continue;
            }
            if let Some(assignment) = resolve(&cluster, logical, family).await {
                let result = proxy.store(|store| store.set_resolved(&cluster.name, &assignment));
                if let Err(refusal) = result {
                    tracing::warn!(cluster = %cluster.name, %refusal, "resolved endpoints refused");
                }
                proxy.changed();
            } else {
                proxy.store(|store| store.note_unresolved(&cluster.name));
            }
            due.insert(cluster.name.clone(), Instant::now() + refresh);
        }
        let next = due.values().min().copied();
        tokio::select! {
            () = cancel.cancelled() => return,
            changed = changes.changed() => if changed.is_err() { return },
            () = async {
                match next {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            } => {}
        }
    }
}

/// The cluster's assignment with names replaced by addresses; `None` if any could not be resolved.
async fn resolve(
    cluster: &Cluster,
    logical: bool,
    family: Family,
) -> Option<endpoint::ClusterLoadAssignment> {
    let mut out = cluster.to_resolve.as_deref().cloned()?;
    for group in &mut out.endpoints {
        let mut resolved = Vec::new();
        for entry in &group.lb_endpoints {
            let Some(endpoint::lb_endpoint::HostIdentifier::Endpoint(inner)) = &entry.host_identifier else {
                continue;
            };
            match convert::address(inner.address.as_ref()) {
                Ok(Address::Name(name, port)) => {
                    let mut addresses = family.choose(lookup(&name, port).await?);
                    addresses.sort_unstable();
                    addresses.dedup();
                    if logical {
                        addresses.truncate(1);
                    }
                    resolved.extend(
                        addresses
                            .into_iter()
                            .map(|address| with_address(entry, inner, &name, address)),
                    );
                }
                _ => resolved.push(entry.clone()),
            }
        }
        group.lb_endpoints = resolved;
    }
    Some(out)
}

async fn lookup(name: &str, port: u16) -> Option<Vec<SocketAddr>> {
    match tokio::time::timeout(LIMIT, tokio::net::lookup_host((name, port))).await {
        Ok(Ok(addresses)) => Some(addresses.collect()),
        Ok(Err(error)) => {
            tracing::debug!(name, %error, "cannot be resolved");
            None
        }
        Err(_) => {
            tracing::debug!(name, "resolving takes too long");
            None
        }
    }
}

fn with_address(
    entry: &endpoint::LbEndpoint,
    inner: &endpoint::Endpoint,
    name: &str,
    address: SocketAddr,
) -> endpoint::LbEndpoint {
    let socket = core::SocketAddress {
        address: address.ip().to_string(),
        port_specifier: Some(core::socket_address::PortSpecifier::PortValue(u32::from(
            address.port(),
        ))),
        ..Default::default()
    };
    let mut inner = inner.clone();
    inner.address = Some(core::Address {
        address: Some(core::address::Address::SocketAddress(socket)),
    });
    if inner.hostname.is_empty() {
        inner.hostname = name.to_owned();
    }
    endpoint::LbEndpoint {
        host_identifier: Some(endpoint::lb_endpoint::HostIdentifier::Endpoint(inner)),
        ..entry.clone()
    }
}
