//! The rules of DestinationRules.

use std::collections::BTreeSet;

use super::{Findings, Violation};
use crate::istio::{
    ClientTlsMode, ClientTlsSettings, ConnectionPoolSettings, ConsistentHashLb, DestinationRuleSpec,
    LoadBalancerSettings, OutlierDetection, TrafficPolicy,
};

/// What a DestinationRule breaks.
pub fn destination_rule(spec: &DestinationRuleSpec) -> Vec<Violation> {
    let mut found = Findings::default();
    found.host("spec.host", &spec.host);
    if let Some(policy) = &spec.traffic_policy {
        traffic_policy(&mut found, "spec.trafficPolicy", policy);
    }
    let mut names = BTreeSet::new();
    for (index, subset) in spec.subsets.iter().enumerate() {
        let field = format!("spec.subsets[{index}]");
        if subset.name.is_empty() {
            found.add(format!("{field}.name"), "subset name cannot be empty");
        } else if !names.insert(&subset.name) {
            found.add(
                format!("{field}.name"),
                format!("duplicate subset name {}", subset.name),
            );
        }
        if subset.labels.is_empty() {
            found.add(
                format!("{field}.labels"),
                format!("subset {} has no labels", subset.name),
            );
        }
        if let Some(policy) = &subset.traffic_policy {
            traffic_policy(&mut found, &format!("{field}.trafficPolicy"), policy);
        }
    }
    found.0
}

fn traffic_policy(found: &mut Findings, field: &str, policy: &TrafficPolicy) {
    parts(
        found,
        field,
        policy.load_balancer.as_ref(),
        policy.connection_pool.as_ref(),
        policy.outlier_detection.as_ref(),
        policy.tls.as_ref(),
    );
    for (index, entry) in policy.port_level_settings.iter().enumerate() {
        let field = format!("{field}.portLevelSettings[{index}]");
        match entry.port.as_ref().and_then(|port| port.number) {
            Some(number) => found.port(&format!("{field}.port.number"), Some(number)),
            None => found.add(format!("{field}.port"), "portLevelSettings must have a port"),
        }
        parts(
            found,
            &field,
            entry.load_balancer.as_ref(),
            entry.connection_pool.as_ref(),
            entry.outlier_detection.as_ref(),
            entry.tls.as_ref(),
        );
    }
    if let Some(budget) = &policy.retry_budget {
        found.duration(
            &format!("{field}.retryBudget.budgetInterval"),
            budget.budget_interval.as_ref(),
        );
        if budget
            .percent
            .is_some_and(|percent| !(0.0..=100.0).contains(&percent.0))
        {
            found.add(
                format!("{field}.retryBudget.percent"),
                "Invalid value: must be in range 0..100",
            );
        }
    }
}

fn parts(
    found: &mut Findings,
    field: &str,
    balancer: Option<&LoadBalancerSettings>,
    pool: Option<&ConnectionPoolSettings>,
    outlier: Option<&OutlierDetection>,
    tls: Option<&ClientTlsSettings>,
) {
    if let Some(balancer) = balancer {
        load_balancer(found, &format!("{field}.loadBalancer"), balancer);
    }
    if let Some(pool) = pool {
        connection_pool(found, &format!("{field}.connectionPool"), pool);
    }
    if let Some(outlier) = outlier {
        let field = format!("{field}.outlierDetection");
        found.at_least_1ms(&format!("{field}.interval"), outlier.interval.as_ref());
        found.at_least_1ms(
            &format!("{field}.baseEjectionTime"),
            outlier.base_ejection_time.as_ref(),
        );
        for (name, value) in [
            ("maxEjectionPercent", outlier.max_ejection_percent),
            ("minHealthPercent", outlier.min_health_percent),
        ] {
            if value.is_some_and(|value| !(0..=100).contains(&value)) {
                found.add(format!("{field}.{name}"), "percentage is not in range 0..100");
            }
        }
    }
    if let Some(tls) = tls
        && tls.mode == Some(ClientTlsMode::Mutual)
        && tls.credential_name.is_none()
        && (tls.client_certificate.is_none() || tls.private_key.is_none())
    {
        found.add(
            format!("{field}.tls"),
            "client certificate and private key required for mutual tls",
        );
    }
}

fn load_balancer(found: &mut Findings, field: &str, balancer: &LoadBalancerSettings) {
    if balancer.simple.is_some() && balancer.consistent_hash.is_some() {
        found.add(field, "only one of simple, consistentHash may be set");
    }
    if let Some(hash) = &balancer.consistent_hash {
        consistent_hash(found, &format!("{field}.consistentHash"), hash);
    }
    found.at_least_1ms(
        &format!("{field}.warmupDurationSecs"),
        balancer.warmup_duration_secs.as_ref(),
    );
    if let Some(warmup) = &balancer.warmup {
        found.at_least_1ms(&format!("{field}.warmup.duration"), Some(&warmup.duration));
        if warmup
            .minimum_percent
            .is_some_and(|percent| !(0.0..=100.0).contains(&percent.0))
        {
            found.add(
                format!("{field}.warmup.minimumPercent"),
                "Invalid value: must be in range 0..100",
            );
        }
    }
    if let Some(locality) = &balancer.locality_lb_setting {
        let field = format!("{field}.localityLbSetting");
        if !locality.distribute.is_empty() && !locality.failover.is_empty() {
            found.add(
                &field,
                "can not simultaneously specify 'distribute' and 'failover'",
            );
        }
        for (index, entry) in locality.distribute.iter().enumerate() {
            let total: u64 = entry.to.values().map(|weight| u64::from(*weight)).sum();
            if total != 100 {
                found.add(
                    format!("{field}.distribute[{index}].to"),
                    format!("total locality weight {total} != 100"),
                );
            }
        }
        for (index, entry) in locality.failover.iter().enumerate() {
            if entry.from == entry.to {
                found.add(
                    format!("{field}.failover[{index}]"),
                    "locality lb failover settings must specify different regions",
                );
            }
        }
    }
}

fn consistent_hash(found: &mut Findings, field: &str, hash: &ConsistentHashLb) {
    let keys = usize::from(hash.http_header_name.is_some())
        + usize::from(hash.http_cookie.is_some())
        + usize::from(hash.use_source_ip.is_some())
        + usize::from(hash.http_query_parameter_name.is_some());
    if keys != 1 {
        found.add(
            field,
            "exactly one of httpHeaderName, httpCookie, useSourceIp, httpQueryParameterName must be set",
        );
    }
    if hash.ring_hash.is_some() && hash.maglev.is_some() {
        found.add(field, "only one of ringHash, maglev may be set");
    }
    if let Some(cookie) = &hash.http_cookie {
        if cookie.name.is_empty() {
            found.add(format!("{field}.httpCookie.name"), "name required for HttpCookie");
        }
        found.duration(&format!("{field}.httpCookie.ttl"), cookie.ttl.as_ref());
    }
}

fn connection_pool(found: &mut Findings, field: &str, pool: &ConnectionPoolSettings) {
    if pool.tcp.is_none() && pool.http.is_none() {
        found.add(field, "connection pool must have tcp or http settings");
    }
    if let Some(tcp) = &pool.tcp {
        if tcp.max_connections.is_some_and(|value| value < 0) {
            found.add(
                format!("{field}.tcp.maxConnections"),
                "max connections must be non-negative",
            );
        }
        found.at_least_1ms(
            &format!("{field}.tcp.connectTimeout"),
            tcp.connect_timeout.as_ref(),
        );
        found.at_least_1ms(
            &format!("{field}.tcp.maxConnectionDuration"),
            tcp.max_connection_duration.as_ref(),
        );
        found.duration(&format!("{field}.tcp.idleTimeout"), tcp.idle_timeout.as_ref());
    }
    if let Some(http) = &pool.http {
        for (name, value) in [
            ("http1MaxPendingRequests", http.http1_max_pending_requests),
            ("http2MaxRequests", http.http2_max_requests),
            ("maxRequestsPerConnection", http.max_requests_per_connection),
            ("maxRetries", http.max_retries),
            ("maxConcurrentStreams", http.max_concurrent_streams),
        ] {
            if value.is_some_and(|value| value < 0) {
                found.add(format!("{field}.http.{name}"), "must be non-negative");
            }
        }
        found.at_least_1ms(&format!("{field}.http.idleTimeout"), http.idle_timeout.as_ref());
    }
}
