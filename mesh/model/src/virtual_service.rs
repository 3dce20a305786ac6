//! Front end: VirtualService → [`RuleSet`].
//!
//! Every match block becomes a route of its own, in order, as in Istio; short names are resolved in the namespace of the object.
//! Delegates are expanded by [`crate::delegate`], so what comes out never delegates.

use std::collections::BTreeMap;
use std::sync::Arc;

use serin_crds::istio::{
    self, CorsPolicy, Destination, Headers, HttpBody, HttpFaultInjection, HttpMatchRequest, HttpRedirect,
    HttpRetry, HttpRewrite, HttpRoute, L4MatchAttributes, RouteDestination, StringMatch, StringMatchKind,
    TlsMatchAttributes, VirtualService,
};

use crate::delegate::merge_delegate;
use crate::host;
use crate::object::{Kind, ObjectKey, Provenance};
use crate::route::*;
use crate::service::Visibility;

/// Where a VirtualService hands over: index of the rule, and the object that it names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Delegation {
    /// Position in `spec.http`.
    pub(crate) rule: usize,
    /// The delegate's key.
    pub(crate) target: ObjectKey,
}

/// The delegations of an object.
pub(crate) fn delegations(object: &VirtualService) -> Vec<Delegation> {
    let own = object.metadata.namespace.as_deref().unwrap_or("default");
    object
        .spec
        .http
        .iter()
        .enumerate()
        .filter_map(|(rule, route)| {
            let delegate = route.delegate.as_ref()?;
            let namespace = delegate
                .namespace
                .as_deref()
                .filter(|namespace| !namespace.is_empty())
                .unwrap_or(own);
            Some(Delegation {
                rule,
                target: ObjectKey::new(
                    Kind::VirtualService,
                    namespace,
                    delegate.name.as_deref().unwrap_or(""),
                ),
            })
        })
        .collect()
}

/// Translates an object. `delegate` gives the object that a rule hands over to, if it exists and is exported to this namespace.
pub(crate) fn compile<'a>(
    object: &VirtualService,
    domain: &str,
    delegate: impl Fn(&ObjectKey) -> Option<&'a VirtualService>,
) -> RuleSet {
    let namespace = object.metadata.namespace.as_deref().unwrap_or("default");
    let name = object.metadata.name.as_deref().unwrap_or("");
    let provenance = Provenance {
        object: ObjectKey::new(Kind::VirtualService, namespace, name),
        generation: object.metadata.generation.unwrap_or(0),
        rule: None,
    };
    let spec = &object.spec;
    let of_rule = |index: usize| Provenance {
        rule: u32::try_from(index).ok(),
        ..provenance.clone()
    };
    let mut http = Vec::new();
    let delegations = delegations(object);
    for (index, rule) in spec.http.iter().enumerate() {
        let origin = of_rule(index);
        match delegations.iter().find(|delegation| delegation.rule == index) {
            None => http.extend(routes(rule, &origin, namespace, domain)),
            Some(delegation) => {
                if let Some(child) = delegate(&delegation.target) {
                    http.extend(merge_delegate(rule, &origin, namespace, child, domain));
                }
            }
        }
    }
    let connection = |index, matches, route: &[RouteDestination]| ConnectionRoute {
        provenance: of_rule(index),
        matches,
        backends: backends(
            route.iter().map(|r| (&r.destination, r.weight, None)),
            namespace,
            domain,
        ),
    };
    let tls = spec.tls.iter().enumerate().map(|(index, rule)| {
        let matches = rule.matches.iter().map(|block| tls_match(block, namespace));
        connection(index, matches.collect(), &rule.route)
    });
    let tcp = spec.tcp.iter().enumerate().map(|(index, rule)| {
        let matches = rule.matches.iter().map(|block| tcp_match(block, namespace));
        connection(index, matches.collect(), &rule.route)
    });
    RuleSet {
        hosts: spec
            .hosts
            .iter()
            .map(|name| host::resolve(name, namespace, domain))
            .collect(),
        gateways: gateways(&spec.gateways, namespace),
        visibility: Visibility::parse(spec.export_to.iter().map(String::as_str), namespace),
        http,
        tls: tls.collect(),
        tcp: tcp.collect(),
        provenance,
    }
}

fn tls_match(block: &TlsMatchAttributes, namespace: &str) -> ConnectionMatch {
    ConnectionMatch {
        audience: audience(
            &block.source_labels,
            block.source_namespace.as_ref(),
            &block.gateways,
            block.port,
            namespace,
        ),
        sni: block.sni_hosts.clone(),
        destinations: block.destination_subnets.clone(),
        source: None,
    }
}

fn tcp_match(block: &L4MatchAttributes, namespace: &str) -> ConnectionMatch {
    ConnectionMatch {
        audience: audience(
            &block.source_labels,
            block.source_namespace.as_ref(),
            &block.gateways,
            block.port,
            namespace,
        ),
        sni: Vec::new(),
        destinations: block.destination_subnets.clone(),
        source: block.source_subnet.clone(),
    }
}

/// Who applies the rules: the mesh, where nobody is named.
fn gateways(names: &[String], namespace: &str) -> Vec<Arc<str>> {
    if names.is_empty() {
        return vec![Arc::from(MESH)];
    }
    names.iter().map(|name| gateway_name(name, namespace)).collect()
}

/// `mesh` stays; a gateway gets the namespace that it is in.
pub(crate) fn gateway_name(gateway: &str, namespace: &str) -> Arc<str> {
    if gateway == MESH {
        MESH.into()
    } else if let Some((space, name)) = gateway.split_once('/') {
        if space == "." {
            format!("{namespace}/{name}").into()
        } else {
            gateway.into()
        }
    } else {
        format!("{namespace}/{gateway}").into()
    }
}

fn audience(
    labels: &BTreeMap<String, String>,
    source_namespace: Option<&String>,
    gateways: &[String],
    port: Option<u32>,
    namespace: &str,
) -> Audience {
    Audience {
        labels: labels.clone(),
        namespace: source_namespace.filter(|name| !name.is_empty()).cloned(),
        gateways: gateways
            .iter()
            .map(|gateway| gateway_name(gateway, namespace))
            .collect(),
        port: port
            .and_then(|port| u16::try_from(port).ok())
            .filter(|port| *port != 0),
    }
}

/// The routes of one rule: one for each match block, or one for all requests.
fn routes(rule: &HttpRoute, origin: &Provenance, namespace: &str, domain: &str) -> Vec<Route> {
    if rule.matches.is_empty() {
        return vec![route(rule, None, origin, namespace, domain)];
    }
    rule.matches
        .iter()
        .map(|block| route(rule, Some(block), origin, namespace, domain))
        .collect()
}

pub(crate) fn route(
    rule: &HttpRoute,
    block: Option<&HttpMatchRequest>,
    origin: &Provenance,
    namespace: &str,
    domain: &str,
) -> Route {
    let rule_name = rule.name.as_deref().unwrap_or("");
    let block_name = block.and_then(|block| block.name.as_deref()).unwrap_or("");
    Route {
        name: join_names(rule_name, block_name),
        provenance: origin.clone(),
        also: Vec::new(),
        audience: block.map_or_else(Audience::default, |block| {
            audience(
                &block.source_labels,
                block.source_namespace.as_ref(),
                &block.gateways,
                block.port,
                namespace,
            )
        }),
        matches: block.map_or_else(
            || RequestMatch {
                unconditional: true,
                ..RequestMatch::default()
            },
            request_match,
        ),
        action: action(rule, namespace, domain),
        headers: header_changes(rule.headers.as_ref()),
        fault: rule.fault.as_ref().map(fault),
        cors: rule.cors_policy.as_ref().map(cors),
        stat_prefix: block
            .and_then(|block| block.stat_prefix.clone())
            .filter(|prefix| !prefix.is_empty()),
    }
}

fn join_names(first: &str, second: &str) -> String {
    match (first.is_empty(), second.is_empty()) {
        (_, true) => first.to_owned(),
        (true, false) => second.to_owned(),
        (false, false) => format!("{first}.{second}"),
    }
}

fn text_match(value: &StringMatch) -> TextMatch {
    match value.kind() {
        StringMatchKind::Exact(text) => TextMatch::Exact(text.to_owned()),
        StringMatchKind::Prefix(text) => TextMatch::Prefix(text.to_owned()),
        StringMatchKind::Regex(text) => TextMatch::Regex(text.to_owned()),
        StringMatchKind::Presence => TextMatch::Present,
    }
}

/// Header names of this form are claims of a verified token.
const CLAIMS: &str = "@request.auth.claims";

fn claim_path(header: &str) -> Option<Vec<String>> {
    let rest = header.strip_prefix(CLAIMS)?;
    if let Some(path) = rest.strip_prefix('.') {
        return Some(path.split('.').map(str::to_owned).collect());
    }
    let inner = rest.strip_prefix('[')?.strip_suffix(']')?;
    Some(inner.split("][").map(str::to_owned).collect())
}

fn request_match(block: &HttpMatchRequest) -> RequestMatch {
    let mut matches = RequestMatch {
        path: block.uri.as_ref().and_then(|uri| match uri.kind() {
            StringMatchKind::Exact(text) => Some(PathMatch::Exact(text.to_owned())),
            StringMatchKind::Prefix(text) => Some(PathMatch::Prefix(text.to_owned())),
            StringMatchKind::Regex(text) => Some(PathMatch::Regex(text.to_owned())),
            StringMatchKind::Presence => None,
        }),
        ignore_case: block.ignore_uri_case == Some(true),
        ..RequestMatch::default()
    };
    for (header, value, negated) in block
        .headers
        .iter()
        .map(|(header, value)| (header, value, false))
        .chain(
            block
                .without_headers
                .iter()
                .map(|(header, value)| (header, value, true)),
        )
    {
        let named = NamedMatch {
            name: header.clone(),
            matcher: text_match(value),
            negated,
        };
        match claim_path(header) {
            Some(path) => matches.claims.push((path, named)),
            None => matches.headers.push(named),
        }
    }
    for (name, value) in [
        (":method", &block.method),
        (":authority", &block.authority),
        (":scheme", &block.scheme),
    ] {
        if let Some(value) = value {
            matches.headers.push(NamedMatch {
                name: name.to_owned(),
                matcher: text_match(value),
                negated: false,
            });
        }
    }
    matches.query = block
        .query_params
        .iter()
        .map(|(name, value)| NamedMatch {
            name: name.clone(),
            matcher: text_match(value),
            negated: false,
        })
        .collect();
    matches
}

fn backend(
    destination: &Destination,
    weight: u32,
    headers: Option<&Headers>,
    namespace: &str,
    domain: &str,
) -> Backend {
    Backend {
        host: host::resolve(&destination.host, namespace, domain),
        subset: destination
            .subset
            .as_deref()
            .filter(|subset| !subset.is_empty())
            .map(Into::into),
        port: destination
            .port
            .as_ref()
            .and_then(|port| port.number)
            .and_then(|port| u16::try_from(port).ok())
            .filter(|port| *port != 0),
        weight,
        headers: header_changes(headers),
        missing_status: 503,
    }
}

fn backends<'a>(
    list: impl Iterator<Item = (&'a Destination, Option<i32>, Option<&'a Headers>)>,
    namespace: &str,
    domain: &str,
) -> Vec<Backend> {
    list.map(|(destination, weight, headers)| {
        backend(
            destination,
            weight.and_then(|weight| u32::try_from(weight).ok()).unwrap_or(0),
            headers,
            namespace,
            domain,
        )
    })
    .collect()
}

fn action(rule: &HttpRoute, namespace: &str, domain: &str) -> Action {
    if let Some(from) = &rule.redirect {
        return Action::Redirect(redirect(from));
    }
    if let Some(response) = &rule.direct_response {
        return Action::Respond {
            status: u16::try_from(response.status).unwrap_or(500),
            body: response.body.as_ref().and_then(body),
        };
    }
    let rewrite = rule.rewrite.as_ref();
    Action::Forward(Forward {
        backends: backends(
            rule.route
                .iter()
                .map(|r| (&r.destination, r.weight, r.headers.as_ref())),
            namespace,
            domain,
        ),
        path_rewrite: rewrite.and_then(path_rewrite),
        authority: rewrite
            .and_then(|rewrite| rewrite.authority.clone())
            .filter(|authority| !authority.is_empty()),
        timeout: rule.timeout.as_ref().and_then(|timeout| timeout.parse().ok()),
        retries: rule.retries.as_ref().map_or(Retries::Default, retries),
        mirrors: mirrors(rule, namespace, domain),
    })
}

fn redirect(from: &HttpRedirect) -> Redirect {
    let filled = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
    let number = from.port.and_then(|port| u16::try_from(port).ok());
    let derived = from.derive_port.map(|derive| match derive {
        istio::RedirectPortSelection::FromProtocolDefault => RedirectPort::OfProtocol,
        istio::RedirectPortSelection::FromRequestPort => RedirectPort::OfRequest,
    });
    Redirect {
        scheme: filled(&from.scheme),
        authority: filled(&from.authority),
        path: filled(&from.uri),
        prefix: filled(&from.prefix_rewrite),
        port: number.map(RedirectPort::Number).or(derived),
        status: from
            .redirect_code
            .and_then(|code| u16::try_from(code).ok())
            .unwrap_or(301),
    }
}

fn body(from: &HttpBody) -> Option<Body> {
    match (&from.string, &from.bytes) {
        (Some(text), _) => Some(Body::Text(text.clone())),
        (None, Some(bytes)) => base64_decode(bytes).map(Body::Bytes),
        (None, None) => None,
    }
}

fn path_rewrite(from: &HttpRewrite) -> Option<PathRewrite> {
    match (&from.uri_regex_rewrite, &from.uri) {
        (Some(regex), _) => Some(PathRewrite::Regex {
            pattern: regex.regex.clone().unwrap_or_default(),
            substitution: regex.rewrite.clone().unwrap_or_default(),
        }),
        (None, Some(uri)) => Some(PathRewrite::Prefix(uri.clone())),
        (None, None) => None,
    }
}

/// No attempts are no retries.
fn retries(from: &HttpRetry) -> Retries {
    let attempts = from.attempts.and_then(|attempts| u32::try_from(attempts).ok());
    let attempts = attempts.unwrap_or(0);
    if attempts == 0 {
        return Retries::Off;
    }
    Retries::Policy(RetryPolicy {
        attempts,
        per_try_timeout: from
            .per_try_timeout
            .as_ref()
            .and_then(|timeout| timeout.parse().ok()),
        retry_on: from.retry_on.clone().filter(|conditions| !conditions.is_empty()),
        ignore_previous_hosts: from.retry_ignore_previous_hosts.unwrap_or(true),
        remote_localities: from.retry_remote_localities.unwrap_or(false),
        backoff: from.backoff.as_ref().and_then(|backoff| backoff.parse().ok()),
    })
}

/// The older field for one mirror, and the list; those that mirror nothing are left out.
fn mirrors(rule: &HttpRoute, namespace: &str, domain: &str) -> Vec<Mirror> {
    let share = |percentage: &istio::Percent| percentage.value.map_or(0.0, |value| value.0);
    let one = rule.mirror.as_ref().map(|mirror| {
        let older = rule.mirror_percent.map(f64::from);
        (mirror, rule.mirror_percentage.as_ref().map(share).or(older))
    });
    let list = rule
        .mirrors
        .iter()
        .map(|mirror| (&mirror.destination, mirror.percentage.as_ref().map(share)));
    one.into_iter()
        .chain(list)
        .filter(|(_, percent)| *percent != Some(0.0))
        .map(|(destination, percent)| Mirror {
            backend: backend(destination, 0, None, namespace, domain),
            percent,
        })
        .collect()
}

fn header_changes(headers: Option<&Headers>) -> HeaderChanges {
    let edit = |operations: Option<&istio::HeaderOperations>| {
        let pairs = |map: &BTreeMap<String, String>| {
            map.iter()
                .map(|(key, value)| (key.clone(), value.clone()))
                .collect()
        };
        operations.map_or_else(HeaderEdit::default, |operations| HeaderEdit {
            set: pairs(&operations.set),
            add: pairs(&operations.add),
            remove: operations.remove.clone(),
        })
    };
    HeaderChanges {
        request: edit(headers.and_then(|headers| headers.request.as_ref())),
        response: edit(headers.and_then(|headers| headers.response.as_ref())),
    }
}

fn fault(fault: &HttpFaultInjection) -> Fault {
    let share = |percentage: Option<&istio::Percent>| {
        percentage.map(|percent| percent.value.map_or(0.0, |value| value.0))
    };
    Fault {
        delay: fault.delay.as_ref().and_then(|delay| {
            let duration = delay.fixed_delay.as_ref()?.parse().ok()?;
            Some((
                duration,
                share(delay.percentage.as_ref()).or(delay.percent.map(f64::from)),
            ))
        }),
        abort: fault.abort.as_ref().and_then(|abort| {
            let error = match (abort.http_status, &abort.grpc_status) {
                (Some(status), _) => Abort::Http(u16::try_from(status).ok()?),
                (None, Some(status)) => Abort::Grpc(grpc_status(status)?),
                (None, None) => return None,
            };
            Some((error, share(abort.percentage.as_ref())))
        }),
    }
}

/// gRPC status codes by name, in numeric order.
const GRPC_STATUS: [&str; 17] = [
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
];

fn grpc_status(text: &str) -> Option<u32> {
    text.parse().ok().or_else(|| {
        GRPC_STATUS
            .iter()
            .position(|name| *name == text)
            .and_then(|code| u32::try_from(code).ok())
    })
}

fn cors(policy: &CorsPolicy) -> Cors {
    let mut origins: Vec<TextMatch> = policy.allow_origins.iter().map(text_match).collect();
    if origins.is_empty() {
        origins = policy
            .allow_origin
            .iter()
            .map(|origin| TextMatch::Exact(origin.clone()))
            .collect();
    }
    Cors {
        origins,
        methods: policy.allow_methods.clone(),
        headers: policy.allow_headers.clone(),
        expose: policy.expose_headers.clone(),
        max_age: policy.max_age.as_ref().and_then(|age| age.parse().ok()),
        credentials: policy.allow_credentials,
        forward_unmatched: policy.unmatched_preflights.and_then(|word| match word {
            istio::UnmatchedPreflights::Unspecified => None,
            istio::UnmatchedPreflights::Forward => Some(true),
            istio::UnmatchedPreflights::Ignore => Some(false),
        }),
    }
}

/// Standard base64, as JSON carries bytes.
fn base64_decode(text: &str) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len() / 4 * 3);
    let (mut bits, mut count) = (0u32, 0u32);
    for byte in text.bytes().filter(|byte| *byte != b'=') {
        let value = match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'+' | b'-' => 62,
            b'/' | b'_' => 63,
            _ => return None,
        };
        bits = bits << 6 | u32::from(value);
        count += 6;
        if count >= 8 {
            count -= 8;
            out.push((bits >> count & 0xff) as u8);
        }
    }
    Some(out)
}
