//! HTTP routes as the proxies need them: ordered rules with one match each, and what is done with a request that matches.
//!
//! Both front ends end here. What differs between them is expressible: VirtualService prefixes are plain strings and its rules are
//! tried in order; Gateway API prefixes end at path elements ([`PathMatch::SegmentPrefix`]) and a missing backend answers 500
//! ([`Backend::missing_status`]) instead of 503.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crate::object::Provenance;

/// How a string is matched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TextMatch {
    /// Equal.
    Exact(String),
    /// Starts with.
    Prefix(String),
    /// The whole matches an RE2 expression.
    Regex(String),
    /// Anything, as long as it is there.
    Present,
}

/// How the path is matched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PathMatch {
    /// Equal.
    Exact(String),
    /// Starts with, as a string.
    Prefix(String),
    /// Starts with, ending at a path element (Gateway API).
    SegmentPrefix(String),
    /// The whole path matches an RE2 expression.
    Regex(String),
}

/// A condition on something with a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedMatch {
    /// Header or parameter; pseudo-headers with their colon.
    pub name: String,
    /// The condition.
    pub matcher: TextMatch,
    /// Holds when the condition does not.
    pub negated: bool,
}

/// Conditions on a request; all must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RequestMatch {
    /// On the path; none means any.
    pub path: Option<PathMatch>,
    /// The path's case does not matter.
    pub ignore_case: bool,
    /// On headers.
    pub headers: Vec<NamedMatch>,
    /// On claims of a verified token: path of the claim and its condition.
    pub claims: Vec<(Vec<String>, NamedMatch)>,
    /// On query parameters.
    pub query: Vec<NamedMatch>,
    /// No condition was written at all (as opposed to one that holds always).
    pub unconditional: bool,
}

impl RequestMatch {
    /// Every request matches: what comes after such a rule is never reached.
    pub fn is_catch_all(&self) -> bool {
        let path = match &self.path {
            None => true,
            Some(PathMatch::Prefix(prefix) | PathMatch::SegmentPrefix(prefix)) => prefix == "/",
            Some(PathMatch::Regex(regex)) => regex == ".*",
            Some(PathMatch::Exact(_)) => false,
        };
        path && self.headers.is_empty() && self.query.is_empty() && self.claims.is_empty()
    }
}

/// Which proxies a rule is for; evaluated before it is sent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Audience {
    /// Labels that the client workload must have.
    pub labels: BTreeMap<String, String>,
    /// Namespace that the client workload must be in.
    pub namespace: Option<String>,
    /// Gateways that it is for (`namespace/name` or `mesh`); empty means all of the VirtualService's.
    pub gateways: Vec<Arc<str>>,
    /// Port that the request was made to.
    pub port: Option<u16>,
}

/// Where a share of the requests goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backend {
    /// Full host name.
    pub host: Arc<str>,
    /// Subset of its endpoints.
    pub subset: Option<Arc<str>>,
    /// Port; none means the port that the request was made to, or the only one that the host has.
    pub port: Option<u16>,
    /// Share relative to the sum of the rule.
    pub weight: u32,
    /// Header changes for this backend alone.
    pub headers: HeaderChanges,
    /// Status answered when there is no such cluster (503 for VirtualService, 500 for Gateway API).
    pub missing_status: u16,
}

/// Changes to headers on both ways.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HeaderChanges {
    /// Of the request.
    pub request: HeaderEdit,
    /// Of the answer.
    pub response: HeaderEdit,
}

/// Changes to one set of headers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HeaderEdit {
    /// Overwrite or add.
    pub set: Vec<(String, String)>,
    /// Append.
    pub add: Vec<(String, String)>,
    /// Remove.
    pub remove: Vec<String>,
}

/// When a request is tried again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Retries {
    /// The mesh's default policy.
    Default,
    /// Never.
    Off,
    /// As said.
    Policy(RetryPolicy),
}

/// A retry policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RetryPolicy {
    /// Number of retries.
    pub attempts: u32,
    /// Limit of each attempt.
    pub per_try_timeout: Option<Duration>,
    /// Conditions; none means the defaults.
    pub retry_on: Option<String>,
    /// Do not go back to a host that failed.
    pub ignore_previous_hosts: bool,
    /// Prefer other localities on retry.
    pub remote_localities: bool,
    /// Base of the back-off.
    pub backoff: Option<Duration>,
}

/// A copy of the requests.
#[derive(Clone, Debug, PartialEq)]
pub struct Mirror {
    /// Where it goes (weight has no meaning here).
    pub backend: Backend,
    /// Share in percent; none means all, where nothing was written.
    pub percent: Option<f64>,
}

/// What is done to the path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PathRewrite {
    /// Replace the matched prefix, or the whole of an exact match.
    Prefix(String),
    /// Substitute by regular expression.
    Regex {
        /// RE2 expression.
        pattern: String,
        /// Replacement.
        substitution: String,
    },
}

/// What happens to a request that matches.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// It goes to one of the backends.
    Forward(Forward),
    /// It is answered with a redirect.
    Redirect(Redirect),
    /// It is answered directly.
    Respond {
        /// Status.
        status: u16,
        /// Body.
        body: Option<Body>,
    },
}

/// A fixed body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Body {
    /// Text.
    Text(String),
    /// Bytes, decoded.
    Bytes(Vec<u8>),
}

/// Forwarding.
#[derive(Clone, Debug, PartialEq)]
pub struct Forward {
    /// Backends in order, those of weight zero included.
    pub backends: Vec<Backend>,
    /// Path rewrite.
    pub path_rewrite: Option<PathRewrite>,
    /// New authority.
    pub authority: Option<String>,
    /// Limit for the whole request.
    pub timeout: Option<Duration>,
    /// Retries.
    pub retries: Retries,
    /// Copies.
    pub mirrors: Vec<Mirror>,
}

/// A redirect.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Redirect {
    /// New scheme.
    pub scheme: Option<String>,
    /// New authority.
    pub authority: Option<String>,
    /// New path.
    pub path: Option<String>,
    /// Replacement of the matched prefix.
    pub prefix: Option<String>,
    /// New port.
    pub port: Option<RedirectPort>,
    /// Status.
    pub status: u16,
}

/// Port of a redirect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RedirectPort {
    /// This one.
    Number(u16),
    /// The default of the scheme.
    OfProtocol,
    /// That of the request.
    OfRequest,
}

/// An injected fault.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Fault {
    /// Delay and the share in percent (none means the form without a percentage).
    pub delay: Option<(Duration, Option<f64>)>,
    /// Error and the share in percent.
    pub abort: Option<(Abort, Option<f64>)>,
}

/// An injected error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Abort {
    /// HTTP status.
    Http(u16),
    /// gRPC status.
    Grpc(u32),
}

/// Cross-origin policy.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cors {
    /// Allowed origins.
    pub origins: Vec<TextMatch>,
    /// Allowed methods.
    pub methods: Vec<String>,
    /// Allowed headers.
    pub headers: Vec<String>,
    /// Exposed headers.
    pub expose: Vec<String>,
    /// Cache time of preflights.
    pub max_age: Option<Duration>,
    /// Credentials.
    pub credentials: Option<bool>,
    /// Whether preflights of other origins are forwarded; none if not said.
    pub forward_unmatched: Option<bool>,
}

/// One rule.
#[derive(Clone, Debug, PartialEq)]
pub struct Route {
    /// Name for logs and metrics; empty if none.
    pub name: String,
    /// Where it came from.
    pub provenance: Provenance,
    /// Further objects that shaped it (the root of a delegate).
    pub also: Vec<Provenance>,
    /// Which proxies it is for.
    pub audience: Audience,
    /// Which requests it is for.
    pub matches: RequestMatch,
    /// What happens to them.
    pub action: Action,
    /// Header changes for all backends.
    pub headers: HeaderChanges,
    /// Injected fault.
    pub fault: Option<Fault>,
    /// Cross-origin policy.
    pub cors: Option<Cors>,
    /// Prefix of statistics.
    pub stat_prefix: Option<String>,
}

impl Route {
    /// The hosts that the route refers to.
    pub fn hosts(&self) -> impl Iterator<Item = &Backend> {
        let forward = match &self.action {
            Action::Forward(forward) => Some(forward),
            Action::Redirect(_) | Action::Respond { .. } => None,
        };
        forward.into_iter().flat_map(|forward| {
            forward
                .backends
                .iter()
                .chain(forward.mirrors.iter().map(|mirror| &mirror.backend))
        })
    }
}

/// A weighted destination of connections.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectionRoute {
    /// Where it came from.
    pub provenance: Provenance,
    /// Conditions, any of which must hold; empty means all connections.
    pub matches: Vec<ConnectionMatch>,
    /// Backends in order.
    pub backends: Vec<Backend>,
}

/// Conditions on a connection; all must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConnectionMatch {
    /// Which proxies it is for.
    pub audience: Audience,
    /// Server names (TLS only).
    pub sni: Vec<String>,
    /// Destination addresses.
    pub destinations: Vec<String>,
    /// Source addresses.
    pub source: Option<String>,
}

/// All rules of one object.
#[derive(Clone, Debug, PartialEq)]
pub struct RuleSet {
    /// The object.
    pub provenance: Provenance,
    /// Hosts, resolved to full names.
    pub hosts: Vec<Arc<str>>,
    /// `mesh` and `namespace/name` of gateways.
    pub gateways: Vec<Arc<str>>,
    /// Who sees it.
    pub visibility: crate::service::Visibility,
    /// HTTP rules in order.
    pub http: Vec<Route>,
    /// Rules for TLS that is not terminated.
    pub tls: Vec<ConnectionRoute>,
    /// Rules for TCP.
    pub tcp: Vec<ConnectionRoute>,
}

/// The reserved gateway name of all sidecars.
pub const MESH: &str = "mesh";

impl RuleSet {
    /// Whether sidecars use it.
    pub fn in_mesh(&self) -> bool {
        self.gateways.iter().any(|gateway| &**gateway == MESH)
    }

    /// Whom any of its rules sends requests or connections to.
    pub fn destinations(&self) -> impl Iterator<Item = &Backend> {
        let connections = self.tls.iter().chain(&self.tcp);
        let http = self.http.iter().flat_map(Route::hosts);
        http.chain(connections.flat_map(|route| &route.backends))
    }
}
