//! Which requests a route is for.

use regex::Regex;
use serin_xds::pb::envoy::config::route::v3 as route;

use super::template::compile_match;
use crate::config::convert::Fraction;
use crate::config::matchers::{HeaderMatch, QueryMatch, RequestView, StringMatch, full_regex, has_prefix};
use crate::config::runtime::{Runtime, RuntimeFraction};
use crate::error::{Refusal, Within};
use crate::policy::filter_state::StateMatch;
use crate::policy::metadata::{Metadata, MetadataMatch};
use crate::policy::uri_template::UriTemplate;
use crate::tls::info::ConnectionTls;

/// Which requests a route is for.
#[derive(Debug)]
pub(crate) struct RouteMatch {
    pub(super) path: PathMatch,
    case_insensitive: bool,
    headers: Box<[HeaderMatch]>,
    query: Box<[QueryMatch]>,
    grpc: bool,
    fraction: Option<RuntimeFraction>,
    /// Rarely used, and large.
    more: Option<Box<MoreMatch>>,
}

#[derive(Debug)]
pub(super) enum PathMatch {
    /// Every path; so many bytes of it were asked for: `/`, or nothing.
    Any(usize),
    /// CONNECT, which has no path.
    Connect,
    Prefix(Box<str>),
    Exact(Box<str>),
    /// `/a` matches `/a` and `/a/b`, not `/ab`.
    SeparatedPrefix(Box<str>),
    Regex(Regex),
    Template(UriTemplate),
}

impl RouteMatch {
    /// What matches everything.
    pub(super) fn any() -> Self {
        Self {
            path: PathMatch::Any(1),
            case_insensitive: false,
            headers: Box::default(),
            query: Box::default(),
            grpc: false,
            fraction: None,
            more: None,
        }
    }

    /// Compiles the message.
    pub(crate) fn compile(from: &route::RouteMatch, runtime: &mut Runtime) -> Result<Self, Refusal> {
        use route::route_match::PathSpecifier;
        let path = match &from.path_specifier {
            None => return Err(Refusal::new("path_specifier", "is missing")),
            Some(PathSpecifier::Prefix(prefix)) if prefix.is_empty() || prefix == "/" => {
                PathMatch::Any(prefix.len())
            }
            Some(PathSpecifier::Prefix(prefix)) => PathMatch::Prefix(prefix.as_str().into()),
            Some(PathSpecifier::Path(path)) => PathMatch::Exact(path.as_str().into()),
            Some(PathSpecifier::SafeRegex(regex)) => {
                PathMatch::Regex(full_regex(&regex.regex).within("safe_regex")?)
            }
            Some(PathSpecifier::PathSeparatedPrefix(prefix)) => {
                PathMatch::SeparatedPrefix(prefix.trim_end_matches('/').into())
            }
            Some(PathSpecifier::ConnectMatcher(_)) => PathMatch::Connect,
            Some(PathSpecifier::PathMatchPolicy(policy)) => {
                PathMatch::Template(compile_match(policy).within("path_match_policy")?)
            }
        };
        Ok(Self {
            path,
            case_insensitive: from.case_sensitive.as_ref().is_some_and(|value| !value.value),
            headers: from
                .headers
                .iter()
                .enumerate()
                .map(|(index, header)| HeaderMatch::compile(header).within(format!("headers[{index}]")))
                .collect::<Result<_, _>>()?,
            query: from
                .query_parameters
                .iter()
                .enumerate()
                .map(|(index, query)| QueryMatch::compile(query).within(format!("query_parameters[{index}]")))
                .collect::<Result<_, _>>()?,
            grpc: from.grpc.is_some(),
            fraction: from
                .runtime_fraction
                .as_ref()
                .map(|fraction| runtime.fraction(Some(fraction), Fraction::ALL))
                .transpose()
                .within("runtime_fraction")?,
            more: MoreMatch::compile(from)?,
        })
    }

    /// Whether it is for that request.
    pub(crate) fn test_with(
        &self,
        request: &RequestView<'_>,
        facts: &RouteFacts<'_>,
        random: &impl Fn() -> u64,
    ) -> bool {
        let path = request.path;
        let path_matches = match &self.path {
            // CONNECT has no path and is for its own matcher only.
            PathMatch::Any(_) => !path.is_empty(),
            PathMatch::Connect => request.method == "CONNECT",
            PathMatch::Prefix(prefix) => has_prefix(path, prefix, self.case_insensitive),
            PathMatch::Exact(exact) if self.case_insensitive => exact.eq_ignore_ascii_case(path),
            PathMatch::Exact(exact) => &**exact == path,
            PathMatch::SeparatedPrefix(prefix) => {
                has_prefix(path, prefix, self.case_insensitive)
                    && matches!(path.as_bytes().get(prefix.len()), None | Some(b'/'))
            }
            PathMatch::Regex(regex) => regex.is_match(path),
            PathMatch::Template(template) => template.matches(path),
        };
        path_matches
            && self.headers.iter().all(|header| header.matches(request))
            && self.query.iter().all(|query| query.matches(request.query))
            && (!self.grpc || is_grpc(request.headers))
            && self.more.as_ref().is_none_or(|more| more.test(request, facts))
            && self
                .fraction
                .as_ref()
                .is_none_or(|fraction| fraction.hit(random()))
    }

    pub(super) fn matched_prefix_length(&self, path: &str) -> usize {
        match &self.path {
            PathMatch::Any(length) => path.len().min(*length),
            PathMatch::Prefix(prefix) | PathMatch::SeparatedPrefix(prefix) => prefix.len(),
            PathMatch::Exact(_) | PathMatch::Regex(_) | PathMatch::Template(_) | PathMatch::Connect => {
                path.len()
            }
        }
    }
}

/// Conditions that few routes have.
#[derive(Debug, Default)]
struct MoreMatch {
    cookies: Box<[CookieMatch]>,
    metadata: Box<[MetadataMatch]>,
    state: Box<[StateMatch]>,
    /// Whether the client showed a certificate.
    presented: Option<bool>,
    /// Whether that was verified.
    validated: Option<bool>,
}

impl MoreMatch {
    fn compile(from: &route::RouteMatch) -> Result<Option<Box<Self>>, Refusal> {
        if from.cookies.is_empty()
            && from.dynamic_metadata.is_empty()
            && from.filter_state.is_empty()
            && from.tls_context.is_none()
        {
            return Ok(None);
        }
        let flag = |value: &Option<serin_xds::pb::google::protobuf::BoolValue>| {
            value.as_ref().map(|value| value.value)
        };
        let tls = from.tls_context.as_ref();
        Ok(Some(Box::new(Self {
            cookies: from
                .cookies
                .iter()
                .enumerate()
                .map(|(index, message)| CookieMatch::compile(message).within(format!("cookies[{index}]")))
                .collect::<Result<_, _>>()?,
            metadata: from
                .dynamic_metadata
                .iter()
                .enumerate()
                .map(|(index, message)| {
                    MetadataMatch::compile(message).within(format!("dynamic_metadata[{index}]"))
                })
                .collect::<Result<_, _>>()?,
            state: from
                .filter_state
                .iter()
                .enumerate()
                .map(|(index, message)| StateMatch::compile(message).within(format!("filter_state[{index}]")))
                .collect::<Result<_, _>>()?,
            presented: tls.and_then(|tls| flag(&tls.presented)),
            validated: tls.and_then(|tls| flag(&tls.validated)),
        })))
    }

    fn test(&self, request: &RequestView<'_>, facts: &RouteFacts<'_>) -> bool {
        // Envoy: a condition on the certificate is not met by connections without TLS.
        let certificate = |wanted: Option<bool>, has: fn(&ConnectionTls) -> bool| match (wanted, facts.tls) {
            (None, _) => true,
            (Some(_), None) => false,
            (Some(wanted), Some(tls)) => has(tls) == wanted,
        };
        let nothing = Metadata::default();
        let metadata = facts.metadata.unwrap_or(&nothing);
        self.cookies.iter().all(|cookie| cookie.matches(request))
            && self.metadata.iter().all(|matcher| matcher.matches(metadata))
            && self.state.iter().all(|matcher| matcher.matches(&metadata.state))
            && certificate(self.presented, |tls| tls.peer.is_some())
            && certificate(self.validated, |tls| tls.peer_validated)
    }
}

/// What a route may ask beyond the request itself.
#[derive(Clone, Copy, Debug, Default)]
pub struct RouteFacts<'a> {
    /// TLS of the client's connection.
    pub tls: Option<&'a ConnectionTls>,
    /// What filters have noted, where they ran before the route was chosen.
    pub metadata: Option<&'a Metadata>,
}

/// A `CookieMatcher`.
#[derive(Clone, Debug)]
struct CookieMatch {
    name: Box<str>,
    test: StringMatch,
    invert: bool,
}

impl CookieMatch {
    fn compile(from: &route::CookieMatcher) -> Result<Self, Refusal> {
        let test = from
            .string_match
            .as_ref()
            .ok_or_else(|| Refusal::new("string_match", "is missing"))?;
        Ok(Self {
            name: from.name.as_str().into(),
            test: StringMatch::compile(test).within("string_match")?,
            invert: from.invert_match,
        })
    }

    /// A cookie that is absent matches only inverted.
    fn matches(&self, request: &RequestView<'_>) -> bool {
        let found = cookie(request.headers, &self.name);
        found.is_some_and(|value| self.test.matches(value)) != self.invert
    }
}

/// The value of a cookie, without the quotes that may be around it.
pub(crate) fn cookie<'a>(headers: &'a http::HeaderMap, name: &str) -> Option<&'a str> {
    headers
        .get_all(http::header::COOKIE)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(';'))
        .find_map(|pair| {
            let (key, value) = pair.trim().split_once('=')?;
            (key == name).then(|| {
                value
                    .strip_prefix('"')
                    .and_then(|value| value.strip_suffix('"'))
                    .unwrap_or(value)
            })
        })
}

/// Whether the content type says gRPC.
pub fn is_grpc(headers: &http::HeaderMap) -> bool {
    headers.get(http::header::CONTENT_TYPE).is_some_and(|value| {
        let value = value.as_bytes();
        value.starts_with(b"application/grpc") && matches!(value.get(16), None | Some(b'+' | b';'))
    })
}
