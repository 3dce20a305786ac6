//! Endpoints of a service → `envoy.config.endpoint.v3.ClusterLoadAssignment`.

use std::collections::BTreeMap;

use serin_crds::istio::{LocalityLbSetting, TrafficPolicy};
use serin_model::{Endpoint, Locality, Port, Resolution, Service};
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::config::endpoint::v3 as pb;

use super::wire;

/// What decides about the order of localities for a client.
pub(super) struct Nearness<'a> {
    pub(super) client: &'a Locality,
    pub(super) labels: &'a BTreeMap<String, String>,
    pub(super) cluster_id: &'a str,
}

/// The endpoints of a port of a service, or of a subset, by locality.
pub(super) fn assignment(
    cluster: &str,
    service: &Service,
    port: &Port,
    endpoints: &[Endpoint],
    subset: &BTreeMap<String, String>,
    policy: &TrafficPolicy,
    nearness: &Nearness<'_>,
) -> pb::ClusterLoadAssignment {
    let mut by_locality: BTreeMap<&Locality, Vec<(&Endpoint, pb::LbEndpoint)>> = BTreeMap::new();
    for endpoint in endpoints.iter().filter(|endpoint| endpoint.has_labels(subset)) {
        let number = if endpoint.address.starts_with("unix://") {
            Some(&0)
        } else {
            endpoint.ports.get(&port.name)
        };
        let Some(number) = number else { continue };
        by_locality.entry(&endpoint.locality).or_default().push((
            endpoint,
            lb_endpoint(endpoint, *number, service, nearness.cluster_id),
        ));
    }
    let groups: Vec<(&Locality, Vec<(&Endpoint, pb::LbEndpoint)>)> = by_locality.into_iter().collect();
    pb::ClusterLoadAssignment {
        cluster_name: cluster.to_owned(),
        endpoints: localities(groups, service, policy, nearness),
        ..Default::default()
    }
}

fn lb_endpoint(endpoint: &Endpoint, port: u16, service: &Service, cluster_id: &str) -> pb::LbEndpoint {
    let address = match endpoint.address.strip_prefix("unix://") {
        Some(path) => core::Address {
            address: Some(core::address::Address::Pipe(core::Pipe {
                path: path.to_owned(),
                mode: 0,
            })),
        },
        None => wire::address(&endpoint.address, u32::from(port)),
    };
    let workload = endpoint.workload.as_ref().map_or_else(
        || {
            format!(
                "{};{};{};;{cluster_id}",
                service.provenance.object.name, service.namespace, service.provenance.object.name
            )
        },
        |workload| workload.telemetry(cluster_id),
    );
    pb::LbEndpoint {
        host_identifier: Some(pb::lb_endpoint::HostIdentifier::Endpoint(pb::Endpoint {
            address: Some(address),
            ..Default::default()
        })),
        // Only Kubernetes says of its endpoints that they are healthy.
        health_status: if !service.kubernetes
            || matches!(service.resolution, Resolution::Dns | Resolution::DnsRoundRobin)
        {
            core::HealthStatus::Unknown as i32
        } else {
            core::HealthStatus::Healthy as i32
        },
        metadata: Some(wire::metadata(
            "istio",
            wire::structure([("workload", wire::text(&workload))]),
        )),
        load_balancing_weight: Some(wire::uint32(endpoint.weight)),
    }
}

fn group(
    locality: &Locality,
    endpoints: Vec<pb::LbEndpoint>,
    weight: u32,
    priority: u32,
) -> pb::LocalityLbEndpoints {
    pb::LocalityLbEndpoints {
        locality: Some(core::Locality {
            region: locality.region.to_string(),
            zone: locality.zone.to_string(),
            sub_zone: locality.sub_zone.to_string(),
        }),
        lb_endpoints: endpoints,
        load_balancing_weight: Some(wire::uint32(weight)),
        priority,
        ..Default::default()
    }
}

fn localities(
    groups: Vec<(&Locality, Vec<(&Endpoint, pb::LbEndpoint)>)>,
    service: &Service,
    policy: &TrafficPolicy,
    nearness: &Nearness<'_>,
) -> Vec<pb::LocalityLbEndpoints> {
    let weight = |endpoints: &[(&Endpoint, pb::LbEndpoint)]| {
        endpoints
            .iter()
            .fold(0u32, |sum, (endpoint, _)| sum.saturating_add(endpoint.weight))
    };
    let plain = |endpoints: Vec<(&Endpoint, pb::LbEndpoint)>| {
        endpoints.into_iter().map(|(_, built)| built).collect::<Vec<_>>()
    };
    let setting = policy
        .load_balancer
        .as_ref()
        .and_then(|lb| lb.locality_lb_setting.as_ref());
    let enabled = setting.is_none_or(|setting| setting.enabled != Some(false));
    if enabled && let Some(shares) = setting.and_then(|setting| distribution(setting, nearness.client)) {
        return distribute(groups, shares, weight, plain);
    }
    // Failover needs to know what is broken, hence outlier detection; staying close does not.
    let failover = enabled && policy.outlier_detection.is_some();
    if !failover && !service.prefer_close {
        return groups
            .into_iter()
            .map(|(locality, endpoints)| {
                let weight = weight(&endpoints);
                group(locality, plain(endpoints), weight, 0)
            })
            .collect();
    }
    let labels = setting
        .map(|setting| setting.failover_priority.as_slice())
        .unwrap_or_default();
    let mut ranked: BTreeMap<(usize, &Locality), Vec<(&Endpoint, pb::LbEndpoint)>> = BTreeMap::new();
    for (locality, endpoints) in groups {
        for (endpoint, built) in endpoints {
            let rank = if labels.is_empty() {
                locality_rank(nearness.client, locality, setting)
            } else {
                label_rank(labels, nearness, endpoint)
            };
            ranked
                .entry((rank, locality))
                .or_default()
                .push((endpoint, built));
        }
    }
    // Envoy wants priorities without gaps.
    let mut ranks: Vec<usize> = ranked.keys().map(|(rank, _)| *rank).collect();
    ranks.dedup();
    ranked
        .into_iter()
        .map(|((rank, locality), endpoints)| {
            let priority = ranks.iter().position(|known| *known == rank).unwrap_or(0);
            let weight = weight(&endpoints);
            group(
                locality,
                plain(endpoints),
                weight,
                u32::try_from(priority).unwrap_or(0),
            )
        })
        .collect()
}

/// 0 same sub-zone, 1 same zone, 2 same region, 3 the region named for failover (or any other, where none is), 4 any other.
fn locality_rank(client: &Locality, endpoint: &Locality, setting: Option<&LocalityLbSetting>) -> usize {
    if client.region != endpoint.region || client.is_empty() {
        let target = setting
            .into_iter()
            .flat_map(|setting| &setting.failover)
            .find(|failover| failover.from.as_deref() == Some(&*client.region))
            .and_then(|failover| failover.to.as_deref());
        return match target {
            Some(region) if region != &*endpoint.region => 4,
            _ => 3,
        };
    }
    if client.zone != endpoint.zone {
        return 2;
    }
    usize::from(client.sub_zone != endpoint.sub_zone)
}

/// How many labels, from the first on, do not match: the fewer the nearer.
fn label_rank(labels: &[String], nearness: &Nearness<'_>, endpoint: &Endpoint) -> usize {
    let empty = BTreeMap::new();
    let theirs = endpoint
        .workload
        .as_ref()
        .map_or(&empty, |workload| &workload.labels);
    let matching = labels
        .iter()
        .take_while(|label| match label.split_once('=') {
            Some((key, value)) => theirs.get(key).map(String::as_str) == Some(value),
            None => {
                let value = topology(label, &endpoint.locality).or_else(|| theirs.get(*label).cloned());
                value == topology(label, nearness.client).or_else(|| nearness.labels.get(*label).cloned())
            }
        })
        .count();
    labels.len() - matching
}

fn topology(label: &str, locality: &Locality) -> Option<String> {
    match label {
        "topology.kubernetes.io/region" => Some(locality.region.to_string()),
        "topology.kubernetes.io/zone" => Some(locality.zone.to_string()),
        "topology.istio.io/subzone" => Some(locality.sub_zone.to_string()),
        _ => None,
    }
}

/// `region/zone/*` style patterns.
fn locality_matches(pattern: &str, locality: &Locality) -> bool {
    let mut parts = pattern.splitn(3, '/');
    for actual in [&locality.region, &locality.zone, &locality.sub_zone] {
        match parts.next() {
            None | Some("*") => return true,
            Some(wanted) if wanted == &**actual => {}
            Some(_) => return false,
        }
    }
    true
}

fn distribution<'a>(setting: &'a LocalityLbSetting, client: &Locality) -> Option<&'a BTreeMap<String, u32>> {
    setting
        .distribute
        .iter()
        .find(|entry| {
            entry
                .from
                .as_deref()
                .is_some_and(|from| locality_matches(from, client))
        })
        .map(|entry| &entry.to)
}

fn distribute<'a>(
    mut groups: Vec<(&'a Locality, Vec<(&'a Endpoint, pb::LbEndpoint)>)>,
    shares: &BTreeMap<String, u32>,
    weight: impl Fn(&[(&Endpoint, pb::LbEndpoint)]) -> u32,
    plain: impl Fn(Vec<(&'a Endpoint, pb::LbEndpoint)>) -> Vec<pb::LbEndpoint>,
) -> Vec<pb::LocalityLbEndpoints> {
    let mut out = Vec::new();
    for (pattern, share) in shares {
        let (matching, rest): (Vec<_>, Vec<_>) = groups
            .into_iter()
            .partition(|(locality, _)| locality_matches(pattern, locality));
        groups = rest;
        let total: u32 = matching.iter().map(|(_, endpoints)| weight(endpoints)).sum();
        for (locality, endpoints) in matching {
            // A pattern of several localities splits its share by their weights, rounded up so that none gets nothing.
            let part =
                (f64::from(weight(&endpoints)) * f64::from(*share) / f64::from(total.max(1))).ceil() as u32;
            if part > 0 {
                out.push(group(locality, plain(endpoints), part, 0));
            }
        }
    }
    out
}
