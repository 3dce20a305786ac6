//! The rules that a schema cannot state, as Istio's admission webhook has them. Pure: an object in, what it breaks out.
//!
//! Every violation names the field and the rule in the words of Istio's own messages where it has one. What Istio accepts is accepted,
//! with one exception: a subset without labels is refused, because it selects every endpoint and is always a slip. Two things that
//! Istio's webhook refuses are accepted, because their meaning is clear: `retries` with conditions and no attempts (retries are off), and
//! the host `*` on `mesh`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

mod destination_rule;
mod others;

pub use destination_rule::destination_rule;
pub use others::{gateway, service_entry, sidecar};

use super::{
    Delegate, Destination, Duration, HttpRetry, HttpRoute, Percent, RouteDestination, StringMatch,
    VirtualServiceSpec,
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
                Err(error) => self.add(field, format!("invalid duration {error}")),
            }
        }
    }

    fn duration(&mut self, field: &str, value: Option<&Duration>) {
        if let Some(Err(error)) = value.map(Duration::parse) {
            self.add(field, format!("invalid duration {error}"));
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
