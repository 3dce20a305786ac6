//! Model routes → `envoy.config.route.v3.Route`, with Istio's names and defaults.

#![allow(deprecated)] // istiod sends these fields and Envoy 1.40 reads them; their successors are not everywhere yet

use std::time::Duration;

use serin_crds::istio::{ConsistentHashLb, TrafficPolicy};
use serin_model::route::{
    Abort, Action, Backend, Body, Cors, Fault, Forward, HeaderEdit, Mirror, NamedMatch, PathMatch,
    PathRewrite, Redirect, RedirectPort, RequestMatch, Retries, RetryPolicy, Route, TextMatch,
};
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::config::route::v3 as pb;
use serin_xds::pb::envoy::extensions::filters::common::fault::v3 as common_fault;
use serin_xds::pb::envoy::extensions::filters::http::cors::v3 as cors_pb;
use serin_xds::pb::envoy::extensions::filters::http::fault::v3 as fault_pb;
use serin_xds::pb::envoy::extensions::retry::host::previous_hosts::v3::PreviousHostsPredicate;
use serin_xds::pb::envoy::extensions::retry::priority::previous_priorities::v3::PreviousPrioritiesConfig;
use serin_xds::pb::envoy::r#type::matcher::v3 as matcher;

use super::wire;

/// Retry conditions without a VirtualService's own, as in Istio's defaults.
const RETRY_ON: &str = "connect-failure,refused-stream,unavailable,cancelled,retriable-status-codes";
/// Retries without a VirtualService's own.
const RETRY_ATTEMPTS: u32 = 2;
/// How often another host is drawn before a retry goes to one that failed.
const HOST_SELECTION_ATTEMPTS: i64 = 5;

/// What translating a route needs to know about the destinations.
pub(super) trait Destinations {
    /// Name of the cluster of a backend, for a request that came to `port`.
    fn cluster(&self, backend: &Backend, port: u16) -> String;
    /// The policy of a backend's host and port.
    fn policy(&self, backend: &Backend, port: u16) -> Option<TrafficPolicy>;
}

/// Translates a route for requests that come to `port`.
pub(super) fn translate(route: &Route, port: u16, to: &impl Destinations) -> pb::Route {
    let mut out = pb::Route {
        name: route.name.clone(),
        r#match: Some(request_match(&route.matches)),
        metadata: Some(wire::metadata(
            "istio",
            wire::structure([("config", wire::text(&wire::config_path(&root_of(route))))]),
        )),
        stat_prefix: route.stat_prefix.clone().unwrap_or_default(),
        response_headers_to_add: additions(&route.headers.response),
        response_headers_to_remove: route.headers.response.remove.clone(),
        request_headers_to_remove: route.headers.request.remove.clone(),
        ..Default::default()
    };
    let mut request = route.headers.request.clone();
    match &route.action {
        Action::Forward(forward) => {
            let authority = forward.authority.clone().or_else(|| take_authority(&mut request));
            out.action = Some(pb::route::Action::Route(forward_action(
                forward, authority, port, to,
            )));
        }
        Action::Redirect(redirect) => {
            out.action = Some(pb::route::Action::Redirect(redirect_action(redirect, port)))
        }
        Action::Respond { status, body } => {
            out.action = Some(pb::route::Action::DirectResponse(pb::DirectResponseAction {
                status: u32::from(*status),
                body: body.as_ref().map(|body| core::DataSource {
                    specifier: Some(match body {
                        Body::Text(text) => core::data_source::Specifier::InlineString(text.clone()),
                        Body::Bytes(bytes) => core::data_source::Specifier::InlineBytes(bytes.clone()),
                    }),
                    ..Default::default()
                }),
                ..Default::default()
            }));
        }
    }
    out.request_headers_to_add = additions(&request);
    if let Some(fault) = &route.fault {
        out.typed_per_filter_config.insert(
            "envoy.filters.http.fault".to_owned(),
            wire::any(&http_fault(fault)),
        );
    }
    if let Some(cors) = &route.cors {
        out.typed_per_filter_config.insert(
            "envoy.filters.http.cors".to_owned(),
            wire::any(&cors_policy(cors)),
        );
    }
    out
}

/// A delegate's routes point at the root, as in Istio: it is the root that people look for.
fn root_of(route: &Route) -> serin_model::Provenance {
    route.also.first().unwrap_or(&route.provenance).clone()
}

/// The route that a host without rules has.
pub(super) fn default_route(cluster: &str, policy: Option<&TrafficPolicy>) -> pb::Route {
    let mut action = pb::RouteAction {
        cluster_specifier: Some(pb::route_action::ClusterSpecifier::Cluster(cluster.to_owned())),
        timeout: Some(wire::seconds(0)),
        max_grpc_timeout: Some(wire::seconds(0)),
        retry_policy: retry_policy(&Retries::Default, None),
        ..Default::default()
    };
    action.hash_policy = policy.and_then(hash_policy).into_iter().collect();
    pb::Route {
        name: "default".to_owned(),
        r#match: Some(prefix_match("/")),
        action: Some(pb::route::Action::Route(action)),
        ..Default::default()
    }
}

/// The inbound side's only route: to the application, retried only when nothing of the request can have arrived.
pub(super) fn inbound_route(cluster: &str, protocol: serin_model::Protocol) -> pb::Route {
    pb::Route {
        name: "default".to_owned(),
        r#match: Some(prefix_match("/")),
        action: Some(pb::route::Action::Route(pb::RouteAction {
            cluster_specifier: Some(pb::route_action::ClusterSpecifier::Cluster(cluster.to_owned())),
            timeout: Some(wire::seconds(0)),
            // gRPC clients retry on their own.
            retry_policy: (!protocol.is_http2()).then(|| pb::RetryPolicy {
                retry_on: "reset-before-request".to_owned(),
                num_retries: Some(wire::uint32(RETRY_ATTEMPTS)),
                ..Default::default()
            }),
            max_stream_duration: Some(pb::route_action::MaxStreamDuration {
                max_stream_duration: Some(wire::seconds(0)),
                grpc_timeout_header_max: Some(wire::seconds(0)),
                ..Default::default()
            }),
            ..Default::default()
        })),
        ..Default::default()
    }
}

/// A route to a cluster without retries, for what the registry does not know.
pub(super) fn passthrough_route(name: &str, cluster: &str) -> pb::Route {
    pb::Route {
        name: name.to_owned(),
        r#match: Some(prefix_match("/")),
        action: Some(pb::route::Action::Route(pb::RouteAction {
            cluster_specifier: Some(pb::route_action::ClusterSpecifier::Cluster(cluster.to_owned())),
            timeout: Some(wire::seconds(0)),
            max_grpc_timeout: Some(wire::seconds(0)),
            ..Default::default()
        })),
        ..Default::default()
    }
}

pub(super) fn prefix_match(prefix: &str) -> pb::RouteMatch {
    pb::RouteMatch {
        path_specifier: Some(pb::route_match::PathSpecifier::Prefix(prefix.to_owned())),
        ..Default::default()
    }
}

fn string_matcher(value: &TextMatch) -> matcher::StringMatcher {
    use matcher::string_matcher::MatchPattern;
    let pattern = match value {
        TextMatch::Exact(text) => MatchPattern::Exact(text.clone()),
        TextMatch::Prefix(text) => MatchPattern::Prefix(text.clone()),
        TextMatch::Regex(expression) => MatchPattern::SafeRegex(wire::regex(expression)),
        TextMatch::Present => MatchPattern::SafeRegex(wire::regex(".*")),
    };
    matcher::StringMatcher {
        match_pattern: Some(pattern),
        ..Default::default()
    }
}

fn request_match(from: &RequestMatch) -> pb::RouteMatch {
    use pb::route_match::PathSpecifier;
    let path = match &from.path {
        None => PathSpecifier::Prefix("/".to_owned()),
        Some(PathMatch::Exact(path)) => PathSpecifier::Path(path.clone()),
        Some(PathMatch::Prefix(prefix)) => PathSpecifier::Prefix(prefix.clone()),
        // Envoy refuses a separated prefix that ends with a slash.
        Some(PathMatch::SegmentPrefix(prefix)) if prefix == "/" => PathSpecifier::Prefix("/".to_owned()),
        Some(PathMatch::SegmentPrefix(prefix)) => {
            PathSpecifier::PathSeparatedPrefix(prefix.trim_end_matches('/').to_owned())
        }
        Some(PathMatch::Regex(expression)) => PathSpecifier::SafeRegex(wire::regex(expression)),
    };
    pb::RouteMatch {
        path_specifier: Some(path),
        case_sensitive: (!from.unconditional).then(|| wire::boolean(!from.ignore_case)),
        headers: from.headers.iter().map(header_matcher).collect(),
        query_parameters: from
            .query
            .iter()
            .map(|named| pb::QueryParameterMatcher {
                name: named.name.clone(),
                query_parameter_match_specifier: Some(match &named.matcher {
                    TextMatch::Present => {
                        pb::query_parameter_matcher::QueryParameterMatchSpecifier::PresentMatch(true)
                    }
                    other => pb::query_parameter_matcher::QueryParameterMatchSpecifier::StringMatch(
                        string_matcher(other),
                    ),
                }),
            })
            .collect(),
        dynamic_metadata: from
            .claims
            .iter()
            .map(|(path, named)| claim_matcher(path, named))
            .collect(),
        ..Default::default()
    }
}

fn header_matcher(named: &NamedMatch) -> pb::HeaderMatcher {
    use pb::header_matcher::HeaderMatchSpecifier;
    let (specifier, missing_as_empty) = match &named.matcher {
        TextMatch::Present => (HeaderMatchSpecifier::PresentMatch(true), false),
        other => (
            HeaderMatchSpecifier::StringMatch(string_matcher(other)),
            named.negated,
        ),
    };
    pb::HeaderMatcher {
        name: named.name.clone(),
        invert_match: named.negated,
        treat_missing_header_as_empty: missing_as_empty,
        header_match_specifier: Some(specifier),
    }
}

/// A claim is a string or a list of strings; either may match.
fn claim_matcher(path: &[String], named: &NamedMatch) -> matcher::MetadataMatcher {
    use matcher::value_matcher::MatchPattern;
    let text = || matcher::ValueMatcher {
        match_pattern: Some(MatchPattern::StringMatch(string_matcher(&named.matcher))),
    };
    let key = |key: &str| matcher::metadata_matcher::PathSegment {
        segment: Some(matcher::metadata_matcher::path_segment::Segment::Key(
            key.to_owned(),
        )),
    };
    matcher::MetadataMatcher {
        filter: "envoy.filters.http.jwt_authn".to_owned(),
        path: std::iter::once(key("payload"))
            .chain(path.iter().map(|part| key(part)))
            .collect(),
        value: Some(matcher::ValueMatcher {
            match_pattern: Some(MatchPattern::OrMatch(matcher::OrMatcher {
                value_matchers: vec![
                    matcher::ValueMatcher {
                        match_pattern: Some(MatchPattern::ListMatch(Box::new(matcher::ListMatcher {
                            match_pattern: Some(matcher::list_matcher::MatchPattern::OneOf(Box::new(text()))),
                        }))),
                    },
                    text(),
                ],
            })),
        }),
        invert: named.negated,
    }
}

fn additions(edit: &HeaderEdit) -> Vec<core::HeaderValueOption> {
    use core::header_value_option::HeaderAppendAction;
    let option = |(key, value): &(String, String), action: HeaderAppendAction| core::HeaderValueOption {
        header: Some(core::HeaderValue {
            key: key.clone(),
            value: value.clone(),
            ..Default::default()
        }),
        append_action: action as i32,
        ..Default::default()
    };
    let add = edit
        .add
        .iter()
        .map(|pair| option(pair, HeaderAppendAction::AppendIfExistsOrAdd));
    let set = edit
        .set
        .iter()
        .map(|pair| option(pair, HeaderAppendAction::OverwriteIfExistsOrAdd));
    let mut all: Vec<_> = add.chain(set).collect();
    // Sorted by name and action, as istiod does, so that maps have one order.
    all.sort_by(|a, b| {
        let key = |option: &core::HeaderValueOption| {
            option
                .header
                .as_ref()
                .map(|header| header.key.clone())
                .unwrap_or_default()
        };
        key(a).cmp(&key(b))
    });
    all
}

/// Setting the Host header means rewriting the authority.
fn take_authority(edit: &mut HeaderEdit) -> Option<String> {
    let position = edit
        .set
        .iter()
        .position(|(key, _)| key.eq_ignore_ascii_case("host") || key == ":authority")?;
    Some(edit.set.remove(position).1)
}

fn forward_action(
    forward: &Forward,
    authority: Option<String>,
    port: u16,
    to: &impl Destinations,
) -> pb::RouteAction {
    let timeout = forward.timeout.unwrap_or(Duration::ZERO);
    let policy = match forward.backends.as_slice() {
        [only] => to.policy(only, port),
        _ => None,
    };
    let mut action = pb::RouteAction {
        timeout: Some(wire::duration(timeout)),
        max_grpc_timeout: Some(wire::duration(timeout)),
        retry_policy: retry_policy(&forward.retries, policy.as_ref()),
        request_mirror_policies: forward
            .mirrors
            .iter()
            .map(|mirror| mirror_policy(mirror, to.cluster(&mirror.backend, port)))
            .collect(),
        hash_policy: hash_policies(forward, port, to),
        host_rewrite_specifier: authority.map(pb::route_action::HostRewriteSpecifier::HostRewriteLiteral),
        cluster_specifier: Some(cluster_specifier(&forward.backends, port, to)),
        ..Default::default()
    };
    if let [only] = forward.backends.as_slice()
        && only.missing_status == 500
    {
        action.cluster_not_found_response_code =
            pb::route_action::ClusterNotFoundResponseCode::InternalServerError as i32;
    }
    match &forward.path_rewrite {
        None => {}
        Some(PathRewrite::Prefix(prefix)) => action.prefix_rewrite.clone_from(prefix),
        Some(PathRewrite::Regex {
            pattern,
            substitution,
        }) => {
            action.regex_rewrite = Some(matcher::RegexMatchAndSubstitute {
                pattern: Some(wire::regex(pattern)),
                substitution: substitution.clone(),
            });
        }
    }
    action
}

fn mirror_policy(mirror: &Mirror, cluster: String) -> pb::route_action::RequestMirrorPolicy {
    let share = mirror
        .percent
        .map_or_else(|| wire::hundredths(100), wire::fraction);
    pb::route_action::RequestMirrorPolicy {
        cluster,
        runtime_fraction: Some(core::RuntimeFractionalPercent {
            default_value: Some(share),
            ..Default::default()
        }),
        trace_sampled: Some(wire::boolean(false)),
        disable_shadow_host_suffix_append: true,
        ..Default::default()
    }
}

/// What the destinations hash by, each rule once.
fn hash_policies(forward: &Forward, port: u16, to: &impl Destinations) -> Vec<pb::route_action::HashPolicy> {
    let mut all = Vec::new();
    for backend in &forward.backends {
        if let Some(policy) = to.policy(backend, port).and_then(|policy| hash_policy(&policy))
            && !all.contains(&policy)
        {
            all.push(policy);
        }
    }
    all
}

/// One destination by its cluster, whatever its weight, unless header changes need a weighted cluster to hang on.
fn cluster_specifier(
    backends: &[Backend],
    port: u16,
    to: &impl Destinations,
) -> pb::route_action::ClusterSpecifier {
    let clusters = match backends {
        [only] if only.headers == Default::default() => {
            return pb::route_action::ClusterSpecifier::Cluster(to.cluster(only, port));
        }
        [only] => {
            let backend = Backend {
                weight: only.weight.max(1),
                ..only.clone()
            };
            vec![weighted(&backend, to.cluster(only, port))]
        }
        several => several
            .iter()
            .filter(|backend| backend.weight > 0)
            .map(|backend| weighted(backend, to.cluster(backend, port)))
            .collect(),
    };
    pb::route_action::ClusterSpecifier::WeightedClusters(pb::WeightedCluster {
        clusters,
        ..Default::default()
    })
}

fn weighted(backend: &Backend, cluster: String) -> pb::weighted_cluster::ClusterWeight {
    let mut request = backend.headers.request.clone();
    let authority = take_authority(&mut request);
    pb::weighted_cluster::ClusterWeight {
        name: cluster,
        weight: Some(wire::uint32(backend.weight)),
        request_headers_to_add: additions(&request),
        request_headers_to_remove: request.remove.clone(),
        response_headers_to_add: additions(&backend.headers.response),
        response_headers_to_remove: backend.headers.response.remove.clone(),
        host_rewrite_specifier: authority
            .map(pb::weighted_cluster::cluster_weight::HostRewriteSpecifier::HostRewriteLiteral),
        ..Default::default()
    }
}

fn retry_policy(retries: &Retries, policy: Option<&TrafficPolicy>) -> Option<pb::RetryPolicy> {
    let default = RetryPolicy {
        attempts: RETRY_ATTEMPTS,
        per_try_timeout: None,
        retry_on: None,
        // With consistent hashing another host would be the wrong host.
        ignore_previous_hosts: policy.and_then(consistent_hash).is_none(),
        remote_localities: false,
        backoff: None,
    };
    let wanted = match retries {
        Retries::Off => return None,
        Retries::Default => &default,
        Retries::Policy(policy) => policy,
    };
    let (mut conditions, mut codes) = (Vec::new(), Vec::new());
    for word in wanted
        .retry_on
        .as_deref()
        .unwrap_or("")
        .split(',')
        .map(str::trim)
        .filter(|word| !word.is_empty())
    {
        match word.parse::<u32>() {
            Ok(code) => codes.push(code),
            Err(_) => conditions.push(word),
        }
    }
    if !codes.is_empty() {
        conditions.push("retriable-status-codes");
    }
    Some(pb::RetryPolicy {
        retry_on: if wanted.retry_on.is_some() {
            conditions.join(",")
        } else {
            RETRY_ON.to_owned()
        },
        num_retries: Some(wire::uint32(wanted.attempts)),
        per_try_timeout: wanted.per_try_timeout.map(wire::duration),
        retry_host_predicate: wanted
            .ignore_previous_hosts
            .then(|| pb::retry_policy::RetryHostPredicate {
                name: "envoy.retry_host_predicates.previous_hosts".to_owned(),
                config_type: Some(pb::retry_policy::retry_host_predicate::ConfigType::TypedConfig(
                    wire::any(&PreviousHostsPredicate {}),
                )),
            })
            .into_iter()
            .collect(),
        retry_priority: wanted.remote_localities.then(|| pb::retry_policy::RetryPriority {
            name: "envoy.retry_priorities.previous_priorities".to_owned(),
            config_type: Some(pb::retry_policy::retry_priority::ConfigType::TypedConfig(
                wire::any(&PreviousPrioritiesConfig { update_frequency: 2 }),
            )),
        }),
        host_selection_retry_max_attempts: HOST_SELECTION_ATTEMPTS,
        retriable_status_codes: codes,
        retry_back_off: wanted.backoff.map(|base| pb::retry_policy::RetryBackOff {
            base_interval: Some(wire::duration(base)),
            ..Default::default()
        }),
        ..Default::default()
    })
}

fn consistent_hash(policy: &TrafficPolicy) -> Option<&ConsistentHashLb> {
    policy.load_balancer.as_ref()?.consistent_hash.as_ref()
}

fn hash_policy(policy: &TrafficPolicy) -> Option<pb::route_action::HashPolicy> {
    use pb::route_action::hash_policy::{Cookie, CookieAttribute, Header, PolicySpecifier, QueryParameter};
    let hash = consistent_hash(policy)?;
    let specifier = if let Some(header) = &hash.http_header_name {
        PolicySpecifier::Header(Header {
            header_name: header.clone(),
            ..Default::default()
        })
    } else if let Some(cookie) = &hash.http_cookie {
        PolicySpecifier::Cookie(Cookie {
            name: cookie.name.clone(),
            ttl: cookie
                .ttl
                .as_ref()
                .and_then(|ttl| ttl.parse().ok())
                .map(wire::duration),
            path: cookie.path.clone().unwrap_or_default(),
            attributes: cookie
                .attributes
                .iter()
                .map(|attribute| CookieAttribute {
                    name: attribute.name.clone(),
                    value: attribute.value.clone().unwrap_or_default(),
                })
                .collect(),
        })
    } else if hash.use_source_ip == Some(true) {
        PolicySpecifier::ConnectionProperties(pb::route_action::hash_policy::ConnectionProperties {
            source_ip: true,
        })
    } else if let Some(name) = &hash.http_query_parameter_name {
        PolicySpecifier::QueryParameter(QueryParameter { name: name.clone() })
    } else {
        return None;
    };
    Some(pb::route_action::HashPolicy {
        policy_specifier: Some(specifier),
        terminal: false,
    })
}

fn redirect_action(redirect: &Redirect, port: u16) -> pb::RedirectAction {
    use pb::redirect_action::{PathRewriteSpecifier, RedirectResponseCode, SchemeRewriteSpecifier};
    let code = match redirect.status {
        302 => RedirectResponseCode::Found,
        303 => RedirectResponseCode::SeeOther,
        307 => RedirectResponseCode::TemporaryRedirect,
        308 => RedirectResponseCode::PermanentRedirect,
        _ => RedirectResponseCode::MovedPermanently,
    };
    pb::RedirectAction {
        host_redirect: redirect.authority.clone().unwrap_or_default(),
        port_redirect: match redirect.port {
            Some(RedirectPort::Number(number)) => u32::from(number),
            // Envoy derives the default of the scheme when no port is given.
            Some(RedirectPort::OfProtocol) | None => 0,
            Some(RedirectPort::OfRequest) => u32::from(port),
        },
        response_code: code as i32,
        path_rewrite_specifier: match (&redirect.path, &redirect.prefix) {
            (Some(path), _) => Some(PathRewriteSpecifier::PathRedirect(path.clone())),
            (None, Some(prefix)) => Some(PathRewriteSpecifier::PrefixRewrite(prefix.clone())),
            (None, None) => None,
        },
        scheme_rewrite_specifier: redirect
            .scheme
            .clone()
            .map(SchemeRewriteSpecifier::SchemeRedirect),
        ..Default::default()
    }
}

fn http_fault(fault: &Fault) -> fault_pb::HttpFault {
    // Without a percentage nothing is injected, as in Istio.
    let share = |percent: Option<f64>| Some(percent.map_or_else(|| wire::hundredths(0), wire::fraction));
    fault_pb::HttpFault {
        delay: fault.delay.map(|(delay, percent)| common_fault::FaultDelay {
            percentage: share(percent),
            fault_delay_secifier: Some(common_fault::fault_delay::FaultDelaySecifier::FixedDelay(
                wire::duration(delay),
            )),
        }),
        abort: fault.abort.as_ref().map(|(error, percent)| fault_pb::FaultAbort {
            percentage: share(*percent),
            error_type: Some(match error {
                Abort::Http(status) => fault_pb::fault_abort::ErrorType::HttpStatus(u32::from(*status)),
                Abort::Grpc(status) => fault_pb::fault_abort::ErrorType::GrpcStatus(*status),
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn cors_policy(cors: &Cors) -> cors_pb::CorsPolicy {
    cors_pb::CorsPolicy {
        allow_origin_string_match: cors.origins.iter().map(string_matcher).collect(),
        allow_methods: cors.methods.join(","),
        allow_headers: cors.headers.join(","),
        expose_headers: cors.expose.join(","),
        max_age: cors
            .max_age
            .map(|age| age.as_secs().to_string())
            .unwrap_or_default(),
        allow_credentials: cors.credentials.map(wire::boolean),
        filter_enabled: Some(core::RuntimeFractionalPercent {
            default_value: Some(wire::hundredths(100)),
            ..Default::default()
        }),
        forward_not_matching_preflights: Some(wire::boolean(cors.forward_unmatched.unwrap_or(true))),
        ..Default::default()
    }
}
