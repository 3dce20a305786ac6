//! Virtual hosts and routes, compiled: matching and actions.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderName, HeaderValue, StatusCode};
use regex::Regex;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::config::route::v3 as route;
use serin_xds::pb::envoy::r#type::matcher::v3 as matcher;

use super::cluster::Priority;
use super::convert::{self, Fraction};
use super::hash::HashPolicy;
use super::headers::HeaderOps;
use super::matchers::RequestView;
use super::retry::RetryPolicy;
use super::runtime::RuntimeFraction;
use super::slot::{ClusterSlot, Directory, Slots};
use super::subset::Criteria;
use super::table::strip_port;
use super::virtual_cluster::VirtualCluster;
use super::weighted::{Turn, Weights};
use crate::error::{Refusal, Within};
use crate::policy::cors::Cors;
use crate::policy::descriptors::{self, RateLimitEntry};
use crate::policy::metadata::Metadata;
use crate::policy::per_route::PerRoute;
use crate::policy::uri_template::UriTemplate;

/// Envoy's route timeout when none is given.
const DEFAULT_ROUTE_TIMEOUT: Duration = Duration::from_secs(15);
/// Envoy's limit of what is kept of a request for retries (`per_connection_buffer_limit_bytes`, 1 MiB).
pub const DEFAULT_REQUEST_BUFFER: usize = 1 << 20;
/// What compiling a route needs from outside.
pub struct Context<'a> {
    /// Names to slots.
    pub slots: &'a mut Slots,
    /// Number of worker threads.
    pub workers: usize,
    /// A random number for the start of weighted sequences.
    pub seed: u64,
}

impl Context<'_> {
    /// Number of workers, and where filters' counters are kept.
    pub(crate) fn counters(&mut self) -> (usize, &mut crate::policy::stats::Registry) {
        (self.workers, &mut self.slots.counters)
    }
}

/// A compiled virtual host.
#[derive(Debug)]
pub struct VirtualHost {
    /// Its name.
    pub name: Arc<str>,
    /// The domains it answers for.
    pub domains: Box<[Box<str>]>,
    /// Its routes, first match wins.
    pub routes: Box<[Arc<Route>]>,
    /// Mutations for every request of the host.
    pub request_headers: HeaderOps,
    /// Mutations for every response of the host.
    pub response_headers: HeaderOps,
    /// `x-envoy-attempt-count` on requests.
    pub attempt_count: bool,
    /// `x-envoy-attempt-count` on responses.
    pub attempt_count_in_response: bool,
    /// Filter configuration for routes that have none of their own.
    pub per_filter: PerRoute,
    /// Plain requests are redirected to https.
    pub require_tls: bool,
    /// What rate limit filters make of requests to routes that say nothing themselves.
    pub rate_limits: Box<[RateLimitEntry]>,
    /// Kinds of requests that are counted apart; the first that fits counts.
    pub virtual_clusters: Box<[VirtualCluster]>,
}

/// A compiled route.
#[derive(Debug)]
pub struct Route {
    /// Its name (Istio: `default`, or the name of the VirtualService's http route).
    pub name: Box<str>,
    matches: RouteMatch,
    /// What happens to requests that match.
    pub action: Action,
    /// Mutations for requests.
    pub request_headers: HeaderOps,
    /// Mutations for responses.
    pub response_headers: HeaderOps,
    /// Filter configuration.
    pub per_filter: PerRoute,
    /// What is noted of it, for filters.
    pub metadata: Option<Box<Metadata>>,
}

impl Route {
    /// What stands for a route where there is none.
    pub(crate) fn instead(action: Action) -> Self {
        Self {
            name: Box::default(),
            matches: RouteMatch::any(),
            action,
            request_headers: HeaderOps::default(),
            response_headers: HeaderOps::default(),
            metadata: None,
            per_filter: PerRoute::default(),
        }
    }
}

/// What a route does.
#[derive(Debug)]
pub enum Action {
    /// Send the request to a cluster.
    Forward(Box<Forward>),
    /// Answer with a redirect.
    Redirect(Box<Redirect>),
    /// Answer from configuration.
    Direct(Direct),
    /// There is nobody to answer: what stands for a route where none fits.
    Nobody,
    /// Plain requests go to https: what stands for a route where its virtual host says so.
    Tls,
}

/// A direct response.
#[derive(Debug)]
pub struct Direct {
    /// Its status.
    pub status: StatusCode,
    /// Its body.
    pub body: Bytes,
}

/// A redirect.
#[derive(Debug)]
pub struct Redirect {
    /// Its status.
    pub status: StatusCode,
    scheme: Option<Box<str>>,
    host: Option<Box<str>>,
    port: Option<u16>,
    path: Option<Rewrite>,
    strip_query: bool,
}

/// A change of the path.
#[derive(Debug)]
pub enum Rewrite {
    /// The matched prefix is replaced.
    Prefix(Box<str>),
    /// The whole path is replaced.
    Full(Box<str>),
    /// A regular expression is replaced.
    Regex(Regex, Box<str>),
    /// It is made anew of the variables of the template that matched.
    Template(template::TemplateRewrite),
}

/// A change of the authority.
#[derive(Debug)]
pub enum HostRewrite {
    /// To this value.
    Literal(HeaderValue),
    /// To the endpoint's host name.
    Auto,
    /// To the value of that header.
    Header(HeaderName),
    /// To the path after this substitution.
    PathRegex(Regex, Box<str>),
}

/// The cluster of a weighted target.
#[derive(Debug)]
pub enum TargetCluster {
    /// Always the same.
    Fixed(Arc<ClusterSlot>),
    /// The one that this field of the request names.
    Named(HeaderName, Directory),
}

/// A weighted target.
#[derive(Debug)]
pub struct Target {
    /// The cluster.
    pub cluster: TargetCluster,
    /// Mutations for requests that go there.
    pub request_headers: HeaderOps,
    /// Mutations for responses that come from there.
    pub response_headers: HeaderOps,
    /// Authority for requests that go there.
    pub host_rewrite: Option<HeaderValue>,
    /// The subset of the cluster.
    pub criteria: Option<Box<Criteria>>,
    /// Filter configuration.
    pub per_filter: PerRoute,
}

/// Where requests go.
#[derive(Debug)]
pub enum Targets {
    /// One cluster.
    One(Arc<ClusterSlot>),
    /// Several, by weight.
    Weighted(Box<[Target]>, Weights, Turn),
    /// The one that this field of the request names.
    Named(HeaderName, Directory),
    /// Several with no weight at all: nothing can be chosen.
    Empty,
}

/// A copy of the traffic.
#[derive(Debug)]
pub struct Mirror {
    /// Where the copies go.
    pub cluster: Arc<ClusterSlot>,
    /// How much is copied.
    pub share: RuntimeFraction,
    /// `-shadow` is appended to the host.
    pub shadow_suffix: bool,
    /// Or the authority is this.
    pub host_rewrite: Option<HeaderValue>,
}

/// Forwarding.
#[derive(Debug)]
pub struct Forward {
    /// Where to.
    pub targets: Targets,
    /// The subset of the cluster, where the target has none of its own.
    pub criteria: Option<Box<Criteria>>,
    /// What happens when a try takes too long (`hedge_policy`): another is made beside it.
    pub hedge: bool,
    /// Limit for the whole exchange, retries included.
    pub timeout: Option<Duration>,
    /// What the endpoint is told of the limits of requests that say nothing themselves (`x-envoy-expected-rq-timeout-ms`).
    pub expected: Option<HeaderValue>,
    /// Limit of silence on the stream; `None` inherits the listener's.
    pub idle_timeout: Option<Option<Duration>>,
    /// What gRPC calls may say of the limit for the whole exchange (`max_grpc_timeout`).
    pub grpc_timeout: Option<GrpcTimeout>,
    /// Limit of the whole stream.
    pub max_stream_duration: Option<Duration>,
    /// What gRPC calls may say of it (`grpc_timeout_header_max`).
    pub grpc_stream_duration: Option<GrpcTimeout>,
    /// Whether and when to try again.
    pub retry: Option<Arc<RetryPolicy>>,
    /// Path change.
    pub rewrite: Option<Box<Rewrite>>,
    /// Authority change.
    pub host_rewrite: Option<Box<HostRewrite>>,
    /// Old authority goes to `x-forwarded-host`.
    pub append_forwarded_host: bool,
    /// Copies.
    pub mirrors: Box<[Mirror]>,
    /// Status when the cluster does not exist.
    pub cluster_not_found: StatusCode,
    /// For consistent hashing balancers.
    pub hash: Box<[HashPolicy]>,
    /// Bytes of a request body that may be kept for retries.
    pub request_buffer: usize,
    /// Upgrades allowed or forbidden by the route itself.
    pub upgrades: Box<[(Box<str>, bool)]>,
    /// Whose circuit breakers hold.
    pub priority: Priority,
    /// CONNECT ends here: its bytes go to the TCP connection of an endpoint (`connect_config`).
    pub connect_tcp: bool,
    /// What rate limit filters make of requests.
    pub rate_limits: Box<[RateLimitEntry]>,
    /// Whether the virtual host's `rate_limits` count as well.
    pub include_host_rate_limits: bool,
    /// Whether filters must know the target: it is chosen before them instead of after.
    pub target_before_filters: bool,
}

impl VirtualHost {
    /// A virtual host without routes.
    pub fn empty(name: &str) -> Self {
        Self {
            name: name.into(),
            domains: Box::default(),
            routes: Box::default(),
            request_headers: HeaderOps::default(),
            response_headers: HeaderOps::default(),
            attempt_count: false,
            attempt_count_in_response: false,
            per_filter: PerRoute::default(),
            require_tls: false,
            rate_limits: Box::default(),
            virtual_clusters: Box::default(),
        }
    }

    /// Compiles the message.
    pub(crate) fn compile(from: &route::VirtualHost, context: &mut Context<'_>) -> Result<Self, Refusal> {
        if from.domains.is_empty() {
            return Err(Refusal::new("domains", "a virtual host needs a domain"));
        }
        convert::refuse_present(
            &[
                ("matcher", from.matcher.is_some()),
                (
                    "request_body_buffer_limit",
                    from.request_body_buffer_limit.is_some(),
                ),
                (
                    "include_is_timeout_retry_header",
                    from.include_is_timeout_retry_header,
                ),
            ],
            "not supported",
        )?;
        let mut per_filter = PerRoute::compile(&from.typed_per_filter_config, context)?;
        if let Some(cors) = &from.cors {
            let cors = Cors::compile_route(cors, &mut context.slots.runtime).within("cors")?;
            per_filter.cors = Some(Arc::new(cors));
        }
        let routes = from
            .routes
            .iter()
            .enumerate()
            .map(|(index, message)| {
                Route::compile(message, from, context)
                    .map(Arc::new)
                    .within(format!("routes[{index}]"))
            })
            .collect::<Result<_, _>>()?;
        let (request_headers, response_headers) = HeaderOps::of(from)?;
        Ok(Self {
            name: from.name.as_str().into(),
            domains: from.domains.iter().map(|domain| domain.as_str().into()).collect(),
            routes,
            request_headers,
            response_headers,
            attempt_count: from.include_request_attempt_count,
            attempt_count_in_response: from.include_attempt_count_in_response,
            per_filter,
            require_tls: from.require_tls != route::virtual_host::TlsRequirementType::None as i32,
            rate_limits: descriptors::compile_all(&from.rate_limits)?,
            virtual_clusters: VirtualCluster::compile_all(from, context)?,
        })
    }

    /// The first route that matches a request of whose connection nothing is known.
    pub fn find(&self, request: &RequestView<'_>, random: impl Fn() -> u64) -> Option<&Arc<Route>> {
        self.find_with(request, &RouteFacts::default(), random)
    }

    /// The first route that matches.
    pub fn find_with(
        &self,
        request: &RequestView<'_>,
        facts: &RouteFacts<'_>,
        random: impl Fn() -> u64,
    ) -> Option<&Arc<Route>> {
        self.routes
            .iter()
            .find(|route| route.matches.test_with(request, facts, &random))
    }
}

impl Route {
    fn compile(
        from: &route::Route,
        host: &route::VirtualHost,
        context: &mut Context<'_>,
    ) -> Result<Self, Refusal> {
        let message = from
            .r#match
            .as_ref()
            .ok_or_else(|| Refusal::new("match", "is missing"))?;
        let matches = RouteMatch::compile(message, &mut context.slots.runtime).within("match")?;
        convert::refuse_present(
            &[(
                "request_body_buffer_limit",
                from.request_body_buffer_limit.is_some(),
            )],
            "not supported: use per_request_buffer_limit_bytes",
        )?;
        let mut per_filter = PerRoute::compile(&from.typed_per_filter_config, context)?;
        let action = match &from.action {
            Some(route::route::Action::Route(action)) => {
                if let Some(cors) = &action.cors {
                    let cors = Cors::compile_route(cors, &mut context.slots.runtime).within("route.cors")?;
                    per_filter.cors = Some(Arc::new(cors));
                }
                let template = match &matches.path {
                    PathMatch::Template(template) => Some(template),
                    _ => None,
                };
                Action::Forward(Box::new(
                    Forward::compile(action, from, host, template, context).within("route")?,
                ))
            }
            Some(route::route::Action::Redirect(redirect)) => {
                Action::Redirect(Box::new(Redirect::compile(redirect).within("redirect")?))
            }
            Some(route::route::Action::DirectResponse(direct)) => {
                Action::Direct(Direct::compile(direct).within("direct_response")?)
            }
            Some(route::route::Action::FilterAction(_) | route::route::Action::NonForwardingAction(_)) => {
                return Err(Refusal::new(
                    "action",
                    "only route, redirect and direct_response are supported",
                ));
            }
            None => return Err(Refusal::new("action", "is missing")),
        };
        let (request_headers, response_headers) = HeaderOps::of(from)?;
        Ok(Self {
            metadata: Metadata::of_resource(from.metadata.as_ref()),
            name: from.name.as_str().into(),
            matches,
            action,
            request_headers,
            response_headers,
            per_filter,
        })
    }

    /// The path after `rewrite`, for a request that this route matched.
    pub fn rewritten<'a>(&self, rewrite: &'a Rewrite, path: &'a str) -> std::borrow::Cow<'a, str> {
        if let (Rewrite::Template(rewrite), PathMatch::Template(template)) = (rewrite, &self.matches.path) {
            return rewrite.apply(template, path).map_or(path.into(), Into::into);
        }
        rewrite.apply(path, self.matches.matched_prefix_length(path))
    }

    /// The `Location` of an answer to `request`, whose path and query are now `target`: where a redirect leads, or for
    /// answers of other routes the request's own address.
    pub fn location(redirect: Option<&Redirect>, request: &RequestView<'_>, target: &str) -> String {
        let scheme = redirect.and_then(|redirect| redirect.scheme.as_deref());
        let scheme = scheme.unwrap_or(request.scheme());
        let port = redirect.and_then(|redirect| redirect.port);
        let host = match redirect.and_then(|redirect| redirect.host.as_deref()) {
            Some(host) => host,
            None => own_host(request, scheme, port.is_some()),
        };
        let port = port.map(|port| format!(":{port}")).unwrap_or_default();
        let (path, query) = match target.find('?') {
            Some(at) => target.split_at(at),
            None => (target, ""),
        };
        let query = if redirect.is_some_and(|redirect| redirect.strip_query) {
            ""
        } else {
            query
        };
        let path = match redirect.and_then(|redirect| redirect.path.as_ref()) {
            // Its own query counts.
            Some(Rewrite::Full(own)) if own.contains('?') => {
                return format!("{scheme}://{host}{port}{own}");
            }
            Some(Rewrite::Full(own)) => own,
            // Other changes are those of the request itself.
            Some(_) | None => path,
        };
        format!("{scheme}://{host}{port}{path}{query}")
    }
}

impl Redirect {
    /// What it does to the request itself, before it is looked at for the location.
    pub fn rewrite(&self) -> Option<&Rewrite> {
        self.path
            .as_ref()
            .filter(|rewrite| !matches!(rewrite, Rewrite::Full(_)))
    }
}

/// The authority of a request as a redirect to `scheme` repeats it: without its port where there is a new one, and without
/// the old scheme's own port where the scheme changes.
fn own_host<'a>(request: &RequestView<'a>, scheme: &str, new_port: bool) -> &'a str {
    let host = request.authority();
    let bare = strip_port(host);
    let former = (request.scheme(), &host[bare.len()..]);
    let drops = scheme != former.0 && matches!(former, ("https", ":443") | ("http", ":80"));
    if new_port || drops { bare } else { host }
}

pub(super) fn substitution(from: &matcher::RegexMatchAndSubstitute) -> Result<(Regex, Box<str>), Refusal> {
    let pattern = from
        .pattern
        .as_ref()
        .ok_or_else(|| Refusal::new("pattern", "is missing"))?;
    let regex =
        Regex::new(&pattern.regex).map_err(|error| Refusal::new("pattern.regex", error.to_string()))?;
    // RE2 writes groups as \1, the regex crate as ${1}; a literal $ must not be taken for one.
    let mut out = String::with_capacity(from.substitution.len());
    let mut chars = from.substitution.chars();
    while let Some(char) = chars.next() {
        match char {
            '\\' => match chars.next() {
                Some(digit) if digit.is_ascii_digit() => {
                    out.push_str("${");
                    out.push(digit);
                    out.push('}');
                }
                Some('\\') => out.push('\\'),
                _ => {
                    return Err(Refusal::new(
                        "substitution",
                        "a backslash must be followed by a digit or backslash",
                    ));
                }
            },
            '$' => out.push_str("$$"),
            other => out.push(other),
        }
    }
    Ok((regex, out.into()))
}

impl Rewrite {
    fn apply<'a>(&'a self, path: &'a str, matched: usize) -> std::borrow::Cow<'a, str> {
        match self {
            Self::Prefix(with) => format!("{with}{}", path.get(matched..).unwrap_or("")).into(),
            Self::Full(with) => (&**with).into(),
            Self::Regex(regex, with) => regex.replace_all(path, &**with),
            // Needs the template: see `Route::rewritten`.
            Self::Template(_) => path.into(),
        }
    }
}

mod forward;
mod grpc_timeout;
mod local;
mod matching;
mod template;

use grpc_timeout::GrpcTimeout;
use matching::PathMatch;
pub use matching::{RouteFacts, is_grpc};
pub(crate) use matching::{RouteMatch, cookie};
#[cfg(test)]
mod tests;
