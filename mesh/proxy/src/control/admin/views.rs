//! What the admin port shows, in the shapes of Envoy's `admin.v3` messages.

use std::fmt::Write;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde_json::{Value, json};

use super::super::{levels, server_stats};
use super::{Proxy, fixed};
use crate::bootstrap::Showing;
use crate::config::cluster::Priority;
use crate::config::convert::Address;
use crate::config::endpoint::{Endpoint, EndpointSet, Locality};
use crate::config::slot::ClusterSlot;

/// Processes that say the same can take over from each other.
pub(super) const HOT_RESTART_VERSION: &str = "serin.1";

/// `/server_info`.
pub(super) fn server_info(proxy: &Proxy) -> Value {
    let uptime = |time: std::time::Duration| format!("{}s", time.as_secs());
    let options = &proxy.started_as;
    let drain = *proxy.drain_time.lock();
    json!({
        "version": server_version(),
        "state": proxy.state(),
        "uptime_current_epoch": uptime(proxy.uptime()),
        "uptime_all_epochs": uptime(proxy.uptime()),
        "hot_restart_version": HOT_RESTART_VERSION,
        "command_line_options": {
            "concurrency": proxy.concurrency(),
            "config_path": options.config_path,
            "disable_hot_restart": options.restart_path.is_empty(),
            "socket_path": options.restart_path,
            "drain_time": uptime(drain),
            "drain_strategy": "Immediate",
            "mode": "Serve",
            "log_level": levels::default_level(),
            "local_address_ip_version": "v4",
            "service_cluster": proxy.node.cluster,
            "service_node": proxy.node.id,
        },
        "node": fixed::node(proxy, &Showing::new()),
    })
}

/// In Envoy's form: revision, version, state of the sources, build, TLS library. Tools read the second.
fn server_version() -> String {
    let build = if cfg!(debug_assertions) {
        "DEBUG"
    } else {
        "RELEASE"
    };
    format!("serin-proxy/{}/Clean/{build}/rustls", env!("CARGO_PKG_VERSION"))
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

/// Endpoints with their priorities and localities.
fn by_locality(set: &EndpointSet) -> impl Iterator<Item = (usize, &Locality, &Arc<Endpoint>)> {
    set.priorities
        .iter()
        .enumerate()
        .flat_map(|(priority, localities)| localities.iter().map(move |locality| (priority, locality)))
        .flat_map(|(priority, locality)| {
            let members = &set.all[locality.members.clone()];
            members.iter().map(move |endpoint| (priority, locality, endpoint))
        })
}

/// The counters of an endpoint as `SimpleMetric`s.
fn stats(endpoint: &Endpoint) -> Value {
    let counts = endpoint.state.counted.read();
    counts
        .named()
        .into_iter()
        .map(|(name, value, gauge)| {
            let mut metric = json!({ "name": name, "value": value.to_string() });
            if gauge {
                metric["type"] = "GAUGE".into();
            }
            metric
        })
        .collect()
}

/// Limits of a cluster's circuit breakers, by Envoy's names.
fn thresholds(slot: &ClusterSlot, priority: Priority) -> Option<[(&'static str, u32); 4]> {
    let config = slot.config()?;
    let limits = config.limits.of(priority);
    Some([
        ("max_connections", limits.connections),
        ("max_pending_requests", limits.pending),
        ("max_requests", limits.requests),
        ("max_retries", limits.retries),
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
            for (priority, of) in Priority::ALL {
                for (limit, value) in thresholds(slot, priority).into_iter().flatten() {
                    let _ = writeln!(out, "{name}::{of}_priority::{limit}::{value}");
                }
            }
            let Some(set) = slot.endpoints() else {
                let _ = writeln!(out, "{name}::no endpoints yet");
                continue;
            };
            let checks = slot.config().map_or(0, |config| config.health_checks.len());
            for (priority, locality, endpoint) in by_locality(&set) {
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
                for (counter, value, _) in endpoint.state.counted.read().named() {
                    let _ = writeln!(out, "{name}::{at}::{counter}::{value}");
                }
                let _ = write!(
                    out,
                    "{name}::{at}::hostname::{}\n{name}::{at}::health_flags::{health}\n{name}::{at}::weight::{}\n",
                    endpoint.hostname(), endpoint.weight
                );
                let parts: [&str; 3] = std::array::from_fn(|index| {
                    locality.zone.splitn(3, '/').nth(index).unwrap_or_default()
                });
                let [region, zone, sub_zone] = parts;
                let _ = write!(
                    out,
                    "{name}::{at}::region::{region}\n{name}::{at}::zone::{zone}\n{name}::{at}::sub_zone::{sub_zone}\n\
                     {name}::{at}::canary::{}\n{name}::{at}::priority::{priority}\n",
                    endpoint.is_canary()
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
                            "stats": stats(endpoint),
                            "address": address(&endpoint.address),
                            "hostname": endpoint.hostname(),
                            "health_status": health,
                            "weight": endpoint.weight,
                        })
                    })
                    .collect();
                let mut status = json!({
                    "name": &*slot.name,
                    "observability_name": &*slot.name,
                    "added_via_api": !store.received().is_static_cluster(&slot.name),
                    "host_statuses": hosts,
                });
                let limits: Vec<Value> = Priority::ALL
                    .into_iter()
                    .filter_map(|(priority, of)| {
                        let mut limits: serde_json::Map<String, Value> = thresholds(slot, priority)?
                            .into_iter()
                            .map(|(name, value)| (name.to_owned(), value.into()))
                            .collect();
                        if priority == Priority::High {
                            limits.insert("priority".to_owned(), of.to_uppercase().into());
                        }
                        Some(limits.into())
                    })
                    .collect();
                status["circuit_breakers"] = json!({ "thresholds": limits });
                status
            })
            .collect()
    });
    json!({ "cluster_statuses": statuses })
}
