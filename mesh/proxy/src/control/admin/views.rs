//! What the admin port shows, in the shapes of Envoy's `admin.v3` messages.

use std::fmt::Write;
use std::net::SocketAddr;
use std::sync::atomic::Ordering;

use serde_json::{Value, json};

use super::super::server_stats;
use super::Proxy;
use crate::config::cluster::Discovery;
use crate::config::convert::Address;
use crate::config::listener::Handler;
use crate::config::slot::ClusterSlot;

/// `/server_info`.
pub(super) fn server_info(proxy: &Proxy) -> Value {
    let uptime = format!("{}s", proxy.uptime().as_secs());
    json!({
        "version": concat!("serin-proxy/", env!("CARGO_PKG_VERSION")),
        "state": proxy.state(),
        "uptime_current_epoch": uptime,
        "uptime_all_epochs": uptime,
        "hot_restart_version": "serin.1",
        "command_line_options": { "concurrency": proxy.concurrency() },
        "node": { "id": proxy.node.id, "cluster": proxy.node.cluster },
    })
}

/// `/memory`.
pub(super) fn memory() -> Value {
    let memory = server_stats::memory();
    json!({
        "allocated": memory.allocated.to_string(),
        "heap_size": memory.heap.to_string(),
        "pageheap_unmapped": "0",
        "pageheap_free": "0",
        "total_thread_cache": "0",
        "total_physical_bytes": memory.physical.to_string(),
    })
}

fn socket_address(at: SocketAddr) -> Value {
    json!({ "socket_address": { "address": at.ip().to_string(), "port_value": at.port() } })
}

fn address(at: &Address) -> Value {
    match at {
        Address::Tcp(at) => socket_address(*at),
        other => json!({ "pipe": { "path": other.to_string() } }),
    }
}

/// `/listeners` as text.
pub(super) fn listeners(proxy: &Proxy) -> String {
    proxy.store(|store| {
        let mut out = String::new();
        for listener in store.listeners().filter(|listener| listener.bind) {
            for address in proxy.listener_addresses(&listener.name) {
                // Writing to a String cannot fail.
                let _ = writeln!(out, "{}::{address}", listener.name);
            }
        }
        out
    })
}

/// `/listeners?format=json`.
pub(super) fn listeners_json(proxy: &Proxy) -> Value {
    let statuses: Vec<Value> = proxy.store(|store| {
        store
            .listeners()
            .filter(|listener| listener.bind)
            .filter_map(|listener| {
                let addresses = proxy.listener_addresses(&listener.name);
                let (first, more) = addresses.split_first()?;
                let mut status = json!({
                    "name": &*listener.name,
                    "local_address": socket_address(*first),
                });
                if !more.is_empty() {
                    let more: Vec<Value> = more.iter().map(|at| socket_address(*at)).collect();
                    status["additional_local_addresses"] = more.into();
                }
                Some(status)
            })
            .collect()
    });
    json!({ "listener_statuses": statuses })
}

/// Whether an endpoint is out: for its active checks, for its answers, as EDS says.
fn flags(endpoint: &crate::config::endpoint::Endpoint, checks: usize, now: u64) -> [bool; 3] {
    [
        !endpoint.usable(checks) && endpoint.healthy,
        endpoint.state.ejected_until.load(Ordering::Relaxed) > now,
        !endpoint.healthy,
    ]
}

/// Limits of a cluster's circuit breakers, by Envoy's names.
fn thresholds(slot: &ClusterSlot) -> Option<[(&'static str, u32); 4]> {
    let config = slot.config()?;
    Some([
        ("max_connections", config.limits.connections),
        ("max_pending_requests", config.limits.pending),
        ("max_requests", config.limits.requests),
        ("max_retries", config.limits.retries),
    ])
}

/// `/clusters` as text.
pub(super) fn clusters(proxy: &Proxy) -> String {
    let now = crate::clock::now_ms();
    proxy.store(|store| {
        let mut out = String::new();
        for slot in store.clusters() {
            let name = &slot.name;
            let _ = writeln!(out, "{name}::observability_name::{name}");
            for (limit, value) in thresholds(slot).into_iter().flatten() {
                let _ = writeln!(out, "{name}::default_priority::{limit}::{value}");
            }
            let Some(set) = slot.endpoints() else {
                let _ = writeln!(out, "{name}::no endpoints yet");
                continue;
            };
            let checks = slot.config().map_or(0, |config| config.health_checks.len());
            for endpoint in &set.all {
                let names = ["/failed_active_hc", "/failed_outlier_check", "/failed_eds_health"];
                let mut health: String = names
                    .iter()
                    .zip(flags(endpoint, checks, now))
                    .filter(|(_, set)| *set)
                    .map(|(name, _)| *name)
                    .collect();
                if health.is_empty() {
                    health.push_str("healthy");
                }
                let at = &endpoint.text;
                let _ = write!(
                    out,
                    "{name}::{at}::hostname::{}\n{name}::{at}::health_flags::{health}\n{name}::{at}::weight::{}\n",
                    endpoint.hostname, endpoint.weight
                );
            }
        }
        out
    })
}

/// `/clusters?format=json`.
pub(super) fn clusters_json(proxy: &Proxy) -> Value {
    let now = crate::clock::now_ms();
    let statuses: Vec<Value> = proxy.store(|store| {
        store
            .clusters()
            .map(|slot| {
                let checks = slot.config().map_or(0, |config| config.health_checks.len());
                let hosts: Vec<Value> = slot
                    .endpoints()
                    .iter()
                    .flat_map(|set| set.all.iter())
                    .map(|endpoint| {
                        let [active, outlier, eds] = flags(endpoint, checks, now);
                        let mut health = json!({
                            "eds_health_status": if eds { "UNHEALTHY" } else { "HEALTHY" },
                        });
                        if active {
                            health["failed_active_health_check"] = true.into();
                        }
                        if outlier {
                            health["failed_outlier_check"] = true.into();
                        }
                        json!({
                            "address": address(&endpoint.address),
                            "hostname": &*endpoint.hostname,
                            "health_status": health,
                            "weight": endpoint.weight,
                        })
                    })
                    .collect();
                let mut status = json!({
                    "name": &*slot.name,
                    "observability_name": &*slot.name,
                    "added_via_api": true,
                    "host_statuses": hosts,
                });
                if let Some(thresholds) = thresholds(slot) {
                    let limits: serde_json::Map<String, Value> = thresholds
                        .into_iter()
                        .map(|(name, value)| (name.to_owned(), value.into()))
                        .collect();
                    status["circuit_breakers"] = json!({ "thresholds": [limits] });
                }
                status
            })
            .collect()
    });
    json!({ "cluster_statuses": statuses })
}

/// `/config_dump`: Envoy's sections, with what of each resource the proxy keeps. `resource` chooses a field of a
/// section, `named` resources by name.
pub(super) fn config_dump(
    proxy: &Proxy,
    resource: Option<&str>,
    named: Option<&regex::Regex>,
) -> Option<Value> {
    let wanted = |name: &str| named.is_none_or(|named| named.is_match(name));
    let (clusters, listeners, routes) = proxy.store(|store| {
        let clusters: Vec<Value> = store
            .clusters()
            .filter(|slot| wanted(&slot.name))
            .filter_map(|slot| {
                let config = slot.config()?;
                let mut cluster = json!({
                    "@type": "type.googleapis.com/envoy.config.cluster.v3.Cluster",
                    "name": &*slot.name,
                    "connect_timeout": format!("{}s", config.connect_timeout.as_secs_f64()),
                });
                cluster["type"] = match &config.discovery {
                    Discovery::Static => "STATIC",
                    Discovery::Eds(_) => "EDS",
                    Discovery::Dns { logical: true, .. } => "LOGICAL_DNS",
                    Discovery::Dns { .. } => "STRICT_DNS",
                    Discovery::OriginalDst { .. } => "ORIGINAL_DST",
                }
                .into();
                if let Discovery::Eds(service) = &config.discovery {
                    cluster["eds_cluster_config"] = json!({ "service_name": &**service });
                }
                Some(json!({ "cluster": cluster, "endpoints": slot.endpoints().map_or(0, |set| set.all.len()) }))
            })
            .collect();
        let listeners: Vec<Value> = store
            .listeners()
            .filter(|listener| wanted(&listener.name))
            .map(|listener| {
                let chains: Vec<Value> = listener
                    .all_chains()
                    .map(|chain| match &chain.handler {
                        Handler::Http(manager) => json!({
                            "name": &*chain.name,
                            "filters": [{
                                "name": "envoy.filters.network.http_connection_manager",
                                "stat_prefix": &*manager.stat_prefix,
                                "route_config_name": manager.rds_name().as_deref().unwrap_or("inline"),
                            }],
                        }),
                        Handler::Tcp(_) => json!({
                            "name": &*chain.name,
                            "filters": [{ "name": "envoy.filters.network.tcp_proxy" }],
                        }),
                    })
                    .collect();
                json!({
                    "name": &*listener.name,
                    "active_state": { "listener": {
                        "@type": "type.googleapis.com/envoy.config.listener.v3.Listener",
                        "name": &*listener.name,
                        "address": socket_address(listener.address),
                        "bind_to_port": listener.bind,
                        "filter_chains": chains,
                    }},
                })
            })
            .collect();
        let routes: Vec<Value> = store
            .routes()
            .filter(|(name, ..)| wanted(name))
            .map(|(name, table, hosts)| {
                json!({
                    "route_config": {
                        "@type": "type.googleapis.com/envoy.config.route.v3.RouteConfiguration",
                        "name": &**name,
                    },
                    "live": table.is_some(),
                    "virtual_hosts": hosts,
                })
            })
            .collect();
        (clusters, listeners, routes)
    });
    let sections = [
        ("ClustersConfigDump", "dynamic_active_clusters", clusters),
        ("ListenersConfigDump", "dynamic_listeners", listeners),
        ("RoutesConfigDump", "dynamic_route_configs", routes),
    ];
    match resource {
        Some(resource) => sections
            .into_iter()
            .find(|(_, field, _)| *field == resource)
            .map(|(_, _, entries)| json!({ "configs": entries })),
        None => {
            let configs: Vec<Value> = sections
                .into_iter()
                .map(|(kind, field, entries)| {
                    json!({ "@type": format!("type.googleapis.com/envoy.admin.v3.{kind}"), field: entries })
                })
                .collect();
            Some(json!({ "configs": configs }))
        }
    }
}
