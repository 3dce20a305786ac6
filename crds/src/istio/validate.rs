//! The rules that a schema cannot state, as Istio's admission webhook has them. Pure: an object in, what it breaks out.
//!
//! Every violation names the field and the rule in the words of Istio's own messages where it has one. What Istio accepts is accepted,
//! with one exception: a subset without labels is refused, because it selects every endpoint and is always a slip. Two things that
//! Istio's webhook refuses are accepted, because their meaning is clear: `retries` with conditions and no attempts (retries are off), and
//! the host `*` on `mesh`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use super::{
    ClientTlsMode, ClientTlsSettings, ConnectionPoolSettings, ConsistentHashLb, Delegate, Destination,
    DestinationRuleSpec, Duration, GatewaySpec, HttpRetry, HttpRoute, LoadBalancerSettings, OutlierDetection,
    Percent, RouteDestination, ServerTlsMode, ServiceEntryResolution, ServiceEntrySpec, SidecarSpec,
    StringMatch, TrafficPolicy, VirtualServiceSpec,
};

/// One rule that an object breaks.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Violation {
    /// Path of the field, for example `spec.http[0].route`.
    pub field: String,
    /// The rule, in words.
    pub rule: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.rule)
    }
}

#[derive(Default)]
struct Findings(Vec<Violation>);

impl Findings {
    fn add(&mut self, field: impl Into<String>, rule: impl Into<String>) {
        self.0.push(Violation {
            field: field.into(),
            rule: rule.into(),
        });
    }

    fn at_least_1ms(&mut self, field: &str, value: Option<&Duration>) {
        if let Some(value) = value {
            match value.parse() {
                Ok(duration) if duration >= std::time::Duration::from_millis(1) => {}
                Ok(_) => self.add(field, "must be a valid duration greater than 1ms"),
                Err(error) => self.add(field, error.to_string()),
            }
        }
    }

    fn duration(&mut self, field: &str, value: Option<&Duration>) {
        if let Some(Err(error)) = value.map(Duration::parse) {
            self.add(field, error.to_string());
        }
    }

    fn percent(&mut self, field: &str, value: Option<&Percent>) {
        if let Some(value) = value.and_then(|percent| percent.value)
            && !(0.0..=100.0).contains(&value.0)
        {
            self.add(field, format!("percentage {} is not in range 0..100", value.0));
        }
    }

    fn port(&mut self, field: &str, number: Option<u32>) {
        if let Some(number) = number
            && !(1..=65_535).contains(&number)
        {
            self.add(field, "port must be between 1-65535");
        }
    }

    fn string_match(&mut self, field: &str, value: &StringMatch) {
        if [&value.exact, &value.prefix, &value.regex]
            .iter()
            .filter(|part| part.is_some())
            .count()
            > 1
        {
            self.add(field, "only one of exact, prefix, regex may be set");
        }
    }

    fn host(&mut self, field: &str, host: &str) {
        if host.is_empty() {
            self.add(field, "host is required");
        } else if !is_host(host) {
            self.add(
                field,
                format!("host {host:?} is not a domain name, an IP address or a leading wildcard"),
            );
        }
    }

    fn destination(&mut self, field: &str, destination: &Destination) {
        self.host(&format!("{field}.host"), &destination.host);
        if destination.host.contains('*') {
            self.add(
                format!("{field}.host"),
                format!(
                    "invalid destination host {}: wildcards are not allowed",
                    destination.host
                ),
            );
        }
        if destination.subset.as_deref() == Some("") {
            self.add(format!("{field}.subset"), "subset name cannot be empty");
        }
        self.port(
            &format!("{field}.port.number"),
            destination.port.as_ref().and_then(|port| port.number),
        );
    }

    fn weights(&mut self, field: &str, weights: &[Option<i32>]) {
        if weights.iter().any(|weight| weight.unwrap_or(0) < 0) {
            self.add(field, "weight cannot be negative");
        } else if weights.len() > 1 && weights.iter().all(|weight| weight.unwrap_or(0) == 0) {
            self.add(field, "total destination weight = 0");
        }
    }
}

/// A domain name with at most a leading wildcard label, or an IP address.
fn is_host(host: &str) -> bool {
    if host == "*" || host.parse::<std::net::IpAddr>().is_ok() {
        return true;
    }
    let name = host
        .strip_prefix("*.")
        .or_else(|| host.strip_prefix('*'))
        .unwrap_or(host);
    let name = name
        .strip_prefix('-')
        .filter(|_| host.starts_with('*'))
        .unwrap_or(name);
    let name = name.strip_suffix('.').unwrap_or(name);
    host.len() <= 255
        && !name.is_empty()
        && name.split('.').all(|label| {
            !label.is_empty()
                && label.len() <= 63
                && label
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
        })
}

/// What a VirtualService breaks.
pub fn virtual_service(spec: &VirtualServiceSpec) -> Vec<Violation> {
    let mut found = Findings::default();
    let mut seen = BTreeSet::new();
    for (index, host) in spec.hosts.iter().enumerate() {
        let field = format!("spec.hosts[{index}]");
        found.host(&field, host);
        if !seen.insert(host) {
            found.add(field, format!("duplicate virtual host {host}"));
        }
    }
    if spec.hosts.is_empty() {
        if !spec.gateways.is_empty() {
            found.add(
                "spec.gateways",
                "a delegate virtual service (without hosts) must have no gateways configured",
            );
        }
        if !spec.tcp.is_empty() || !spec.tls.is_empty() {
            found.add("spec.hosts", "virtual service must have at least one host");
        }
    }
    if spec.http.is_empty() && spec.tcp.is_empty() && spec.tls.is_empty() {
        found.add("spec", "http, tcp or tls must be provided in virtual service");
    }
    for (index, route) in spec.http.iter().enumerate() {
        http_route(
            &mut found,
            &format!("spec.http[{index}]"),
            route,
            spec.hosts.is_empty(),
        );
    }
    for (index, route) in spec.tls.iter().enumerate() {
        let field = format!("spec.tls[{index}]");
        if route.matches.is_empty() {
            found.add(
                format!("{field}.match"),
                "TLS route must have at least one match condition",
            );
        }
        for (position, condition) in route.matches.iter().enumerate() {
            let field = format!("{field}.match[{position}]");
            found.port(&format!("{field}.port"), condition.port);
            if condition.sni_hosts.is_empty() {
                found.add(
                    format!("{field}.sniHosts"),
                    "TLS match must have at least one SNI host",
                );
            }
            for sni in &condition.sni_hosts {
                if !spec.hosts.iter().any(|host| host_covers(host, sni)) {
                    found.add(
                        format!("{field}.sniHosts"),
                        format!("SNI host {sni:?} is not a compatible subset of any of the virtual service domains"),
                    );
                }
            }
        }
        connection_route(&mut found, &field, &route.route);
    }
    for (index, route) in spec.tcp.iter().enumerate() {
        let field = format!("spec.tcp[{index}]");
        for (position, condition) in route.matches.iter().enumerate() {
            found.port(&format!("{field}.match[{position}].port"), condition.port);
        }
        connection_route(&mut found, &field, &route.route);
    }
    found.0
}

/// Whether a (possibly wildcard) host includes all that another stands for.
pub fn host_covers(host: &str, inner: &str) -> bool {
    match host.strip_prefix('*') {
        Some(suffix) => inner.strip_prefix('*').unwrap_or(inner).ends_with(suffix),
        None => host.eq_ignore_ascii_case(inner),
    }
}

fn connection_route(found: &mut Findings, field: &str, destinations: &[RouteDestination]) {
    if destinations.is_empty() {
        found.add(
            format!("{field}.route"),
            "a route must have at least one destination",
        );
    }
    for (index, destination) in destinations.iter().enumerate() {
        found.destination(
            &format!("{field}.route[{index}].destination"),
            &destination.destination,
        );
    }
    found.weights(
        &format!("{field}.route"),
        &destinations
            .iter()
            .map(|destination| destination.weight)
            .collect::<Vec<_>>(),
    );
}

fn http_route(found: &mut Findings, field: &str, route: &HttpRoute, delegate: bool) {
    let actions = usize::from(!route.route.is_empty())
        + usize::from(route.redirect.is_some())
        + usize::from(route.direct_response.is_some())
        + usize::from(route.delegate.is_some());
    if actions == 0 {
        found.add(
            field,
            "HTTP route, redirect, direct_response or delegate is required",
        );
    } else if actions > 1 {
        found.add(
            field,
            "HTTP route cannot contain more than one of route, redirect, direct_response and delegate",
        );
    }
    if let Some(Delegate { name, .. }) = &route.delegate {
        if delegate {
            found.add(
                format!("{field}.delegate"),
                "delegate virtual service cannot delegate again",
            );
        }
        if name.as_deref().unwrap_or("").is_empty() {
            found.add(format!("{field}.delegate.name"), "name is required");
        }
    }
    if route.rewrite.is_some() && (route.redirect.is_some() || route.direct_response.is_some()) {
        found.add(
            format!("{field}.rewrite"),
            "HTTP route rules cannot contain both rewrite and redirect or direct_response",
        );
    }
    if let Some(rewrite) = &route.rewrite {
        if rewrite.uri.is_some() && rewrite.uri_regex_rewrite.is_some() {
            found.add(
                format!("{field}.rewrite"),
                "rewrite may only contain one of uri or uriRegexRewrite",
            );
        }
        if rewrite.uri.is_none() && rewrite.authority.is_none() && rewrite.uri_regex_rewrite.is_none() {
            found.add(
                format!("{field}.rewrite"),
                "rewrite must specify at least one of uri, authority, or uriRegexRewrite",
            );
        }
    }
    if let Some(response) = &route.direct_response
        && !(200..=599).contains(&response.status)
    {
        found.add(
            format!("{field}.directResponse.status"),
            format!("HTTP status {} is not in range 200..599", response.status),
        );
    }
    if let Some(code) = route
        .redirect
        .as_ref()
        .and_then(|redirect| redirect.redirect_code)
        && !matches!(code, 301 | 302 | 303 | 307 | 308)
    {
        found.add(
            format!("{field}.redirect.redirectCode"),
            format!("redirect code {code} is not one of 301, 302, 303, 307, 308"),
        );
    }
    for (position, condition) in route.matches.iter().enumerate() {
        let field = format!("{field}.match[{position}]");
        for (name, value) in [
            ("uri", &condition.uri),
            ("scheme", &condition.scheme),
            ("method", &condition.method),
            ("authority", &condition.authority),
        ] {
            if let Some(value) = value {
                found.string_match(&format!("{field}.{name}"), value);
            }
        }
        for (name, values) in [
            ("headers", &condition.headers),
            ("withoutHeaders", &condition.without_headers),
            ("queryParams", &condition.query_params),
        ] {
            named_matches(found, &format!("{field}.{name}"), values);
        }
        found.port(&format!("{field}.port"), condition.port);
    }
    for (index, destination) in route.route.iter().enumerate() {
        found.destination(
            &format!("{field}.route[{index}].destination"),
            &destination.destination,
        );
    }
    found.weights(
        &format!("{field}.route"),
        &route
            .route
            .iter()
            .map(|destination| destination.weight)
            .collect::<Vec<_>>(),
    );
    if let Some(mirror) = &route.mirror {
        found.destination(&format!("{field}.mirror"), mirror);
        if !route.mirrors.is_empty() {
            found.add(
                format!("{field}.mirrors"),
                "HTTP route cannot contain both mirror and mirrors",
            );
        }
    }
    for (index, mirror) in route.mirrors.iter().enumerate() {
        found.destination(
            &format!("{field}.mirrors[{index}].destination"),
            &mirror.destination,
        );
        found.percent(
            &format!("{field}.mirrors[{index}].percentage"),
            mirror.percentage.as_ref(),
        );
    }
    found.percent(
        &format!("{field}.mirrorPercentage"),
        route.mirror_percentage.as_ref(),
    );
    found.at_least_1ms(&format!("{field}.timeout"), route.timeout.as_ref());
    if let Some(retries) = &route.retries {
        retry(found, &format!("{field}.retries"), retries);
    }
    if let Some(cors) = &route.cors_policy {
        found.at_least_1ms(&format!("{field}.corsPolicy.maxAge"), cors.max_age.as_ref());
        for (index, origin) in cors.allow_origins.iter().enumerate() {
            found.string_match(&format!("{field}.corsPolicy.allowOrigins[{index}]"), origin);
        }
    }
    if let Some(fault) = &route.fault {
        if let Some(delay) = &fault.delay {
            found.at_least_1ms(
                &format!("{field}.fault.delay.fixedDelay"),
                delay.fixed_delay.as_ref(),
            );
            found.percent(
                &format!("{field}.fault.delay.percentage"),
                delay.percentage.as_ref(),
            );
            if delay.fixed_delay.is_none() && delay.exponential_delay.is_none() {
                found.add(format!("{field}.fault.delay"), "fixedDelay is required");
            }
        }
        if let Some(abort) = &fault.abort {
            found.percent(
                &format!("{field}.fault.abort.percentage"),
                abort.percentage.as_ref(),
            );
            if let Some(status) = abort.http_status
                && !(200..=599).contains(&status)
            {
                found.add(
                    format!("{field}.fault.abort.httpStatus"),
                    format!("HTTP status {status} is not in range 200..599"),
                );
            }
            if abort.http_status.is_none() && abort.grpc_status.is_none() && abort.http2_error.is_none() {
                found.add(
                    format!("{field}.fault.abort"),
                    "httpStatus or grpcStatus is required",
                );
            }
        }
    }
}

fn named_matches(found: &mut Findings, field: &str, values: &BTreeMap<String, StringMatch>) {
    for (name, value) in values {
        if name.is_empty() {
            found.add(field, "name cannot be empty");
        }
        found.string_match(&format!("{field}[{name}]"), value);
    }
}

fn retry(found: &mut Findings, field: &str, retries: &HttpRetry) {
    if retries.attempts.unwrap_or(0) < 0 {
        found.add(format!("{field}.attempts"), "attempts cannot be negative");
    }
    found.at_least_1ms(
        &format!("{field}.perTryTimeout"),
        retries.per_try_timeout.as_ref(),
    );
    found.at_least_1ms(&format!("{field}.backoff"), retries.backoff.as_ref());
}

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

/// What a Gateway breaks.
pub fn gateway(spec: &GatewaySpec) -> Vec<Violation> {
    let mut found = Findings::default();
    if spec.servers.is_empty() {
        found.add("spec.servers", "gateway must have at least one server");
    }
    for (index, server) in spec.servers.iter().enumerate() {
        let field = format!("spec.servers[{index}]");
        if server.hosts.is_empty() {
            found.add(
                format!("{field}.hosts"),
                "server config must contain at least one host",
            );
        }
        for host in &server.hosts {
            let name = host.split_once('/').map_or(host.as_str(), |(_, name)| name);
            found.host(&format!("{field}.hosts"), name);
        }
        let Some(port) = &server.port else {
            found.add(format!("{field}.port"), "port is required");
            continue;
        };
        match port.number {
            Some(number) => found.port(&format!("{field}.port.number"), Some(number)),
            None => found.add(format!("{field}.port.number"), "port must be between 1-65535"),
        }
        let protocol = port.protocol.as_deref().unwrap_or("").to_ascii_uppercase();
        if ![
            "HTTP", "HTTPS", "GRPC", "GRPC-WEB", "HTTP2", "MONGO", "TCP", "TLS",
        ]
        .contains(&protocol.as_str())
        {
            found.add(
                format!("{field}.port.protocol"),
                format!("protocol {protocol:?} is not supported"),
            );
        }
        let tls = server.tls.as_ref();
        if matches!(protocol.as_str(), "HTTPS" | "TLS") && tls.is_none() {
            found.add(
                format!("{field}.tls"),
                "server must have TLS settings for HTTPS/TLS protocols",
            );
        }
        if !matches!(protocol.as_str(), "HTTPS" | "TLS")
            && tls.is_some_and(|tls| tls.mode.is_some())
            && protocol == "HTTP"
        {
            found.add(
                format!("{field}.tls"),
                "server cannot have TLS settings for plain text HTTP ports",
            );
        }
        if let Some(tls) = tls
            && tls.https_redirect == Some(true)
            && protocol == "HTTPS"
        {
            found.add(
                format!("{field}.tls.httpsRedirect"),
                "tls.httpsRedirect should only be used with http servers",
            );
        }
        if let Some(tls) = tls
            && matches!(
                tls.mode,
                Some(ServerTlsMode::Simple | ServerTlsMode::Mutual | ServerTlsMode::OptionalMutual)
            )
            && tls.credential_name.is_none()
            && tls.credential_names.is_empty()
            && tls.tls_certificates.is_empty()
            && (tls.server_certificate.is_none() || tls.private_key.is_none())
        {
            found.add(
                format!("{field}.tls"),
                "TLS requires a server certificate and a private key, or a credentialName",
            );
        }
    }
    found.0
}

/// What a ServiceEntry breaks.
pub fn service_entry(spec: &ServiceEntrySpec) -> Vec<Violation> {
    let mut found = Findings::default();
    if spec.hosts.is_empty() {
        found.add(
            "spec.hosts",
            "Required value: service entry must have at least one host",
        );
    }
    for (index, host) in spec.hosts.iter().enumerate() {
        let field = format!("spec.hosts[{index}]");
        if host == "*" {
            found.add(field, "hostname cannot be wildcard");
        } else {
            found.host(&field, host);
        }
    }
    if spec.workload_selector.is_some() && !spec.endpoints.is_empty() {
        found.add(
            "spec.endpoints",
            "only one of WorkloadSelector or Endpoints can be set",
        );
    }
    let (mut names, mut numbers) = (BTreeSet::new(), BTreeSet::new());
    for (index, port) in spec.ports.iter().enumerate() {
        let field = format!("spec.ports[{index}]");
        found.port(&format!("{field}.number"), Some(port.number));
        found.port(&format!("{field}.targetPort"), port.target_port);
        if !names.insert(&port.name) {
            found.add(
                format!("{field}.name"),
                format!("Duplicate value: port name {}", port.name),
            );
        }
        if !numbers.insert(port.number) {
            found.add(format!("{field}.number"), "port number cannot be duplicated");
        }
    }
    let cidr = spec.addresses.iter().any(|address| address.contains('/'));
    match spec.resolution.unwrap_or(ServiceEntryResolution::None) {
        ServiceEntryResolution::None => {
            if !spec.endpoints.is_empty() {
                found.add("spec.endpoints", "NONE mode cannot set endpoints");
            }
        }
        ServiceEntryResolution::Static
        | ServiceEntryResolution::Dns
        | ServiceEntryResolution::DnsRoundRobin => {
            if cidr {
                found.add(
                    "spec.addresses",
                    "CIDR addresses are allowed only for NONE resolution types",
                );
            }
        }
        ServiceEntryResolution::DynamicDns => {}
    }
    found.0
}

/// What a Sidecar breaks.
pub fn sidecar(spec: &SidecarSpec) -> Vec<Violation> {
    let mut found = Findings::default();
    for (index, listener) in spec.egress.iter().enumerate() {
        let field = format!("spec.egress[{index}]");
        if listener.hosts.is_empty() {
            found.add(
                format!("{field}.hosts"),
                "sidecar: egress listener must contain at least one host",
            );
        }
        for host in &listener.hosts {
            match host.split_once('/') {
                Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() => {}
                _ => found.add(
                    format!("{field}.hosts"),
                    format!("host {host:?} must be namespace/host"),
                ),
            }
        }
        if listener.port.is_none() && index + 1 != spec.egress.len() {
            found.add(
                format!("{field}.port"),
                "sidecar: only the last egress listener can have an empty port",
            );
        }
    }
    let mut ports = BTreeSet::new();
    for (index, listener) in spec.ingress.iter().enumerate() {
        let field = format!("spec.ingress[{index}]");
        match listener.port.number {
            Some(number) => {
                found.port(&format!("{field}.port.number"), Some(number));
                if !ports.insert(number) {
                    found.add(
                        format!("{field}.port.number"),
                        "sidecar: ports on listener must be unique",
                    );
                }
            }
            None => found.add(format!("{field}.port.number"), "port must be between 1-65535"),
        }
    }
    found.0
}
