//! Conditions of taps: what they are made of, and what they say of an exchange of which a part has come.

use http::HeaderMap;
use serin_xds::pb::envoy::config::route::v3 as route;
use serin_xds::pb::envoy::config::tap::v3 as tap;

use super::search::Search;
use super::{STATUS, Seen};
use crate::config::matchers::{HeaderMatch, RequestView};
use crate::error::{Refusal, Within};

/// How deep conditions may be within conditions.
const MAX_DEPTH: u32 = 16;

/// A condition (`MatchPredicate`).
#[derive(Debug)]
pub(super) enum Condition {
    Any(Vec<Self>),
    All(Vec<Self>),
    Not(Box<Self>),
    Always,
    Request(Vec<HeaderMatch>),
    RequestTrailers(Vec<HeaderMatch>),
    Response(Vec<HeaderMatch>),
    ResponseTrailers(Vec<HeaderMatch>),
    /// By the place of its search.
    RequestBody(usize),
    /// The same.
    ResponseBody(usize),
}

/// What conditions look for in bodies of requests and of responses.
#[derive(Debug, Default)]
pub(super) struct Searches {
    pub(super) request: Vec<Search>,
    pub(super) response: Vec<Search>,
}

impl Condition {
    pub(super) fn compile(
        from: &tap::MatchPredicate,
        searches: &mut Searches,
        depth: u32,
    ) -> Result<Self, Refusal> {
        use tap::match_predicate::Rule;
        if depth > MAX_DEPTH {
            return Err(Refusal::new("", "is nested too deeply"));
        }
        let all =
            |set: &tap::match_predicate::MatchSet, searches: &mut Searches| -> Result<Vec<Self>, Refusal> {
                if set.rules.len() < 2 {
                    return Err(Refusal::new("rules", "at least two are needed"));
                }
                let each = set.rules.iter().enumerate();
                each.map(|(index, rule)| {
                    Self::compile(rule, searches, depth + 1).within(format!("rules[{index}]"))
                })
                .collect()
            };
        let headers = |from: &tap::HttpHeadersMatch, response: bool| -> Result<Vec<HeaderMatch>, Refusal> {
            let each = from.headers.iter().enumerate();
            each.map(|(index, matcher)| {
                let renamed;
                let matcher = if response && matcher.name == ":status" {
                    renamed = route::HeaderMatcher {
                        name: STATUS.to_string(),
                        ..matcher.clone()
                    };
                    &renamed
                } else {
                    matcher
                };
                HeaderMatch::compile(matcher).within(format!("headers[{index}]"))
            })
            .collect()
        };
        Ok(match &from.rule {
            Some(Rule::OrMatch(set)) => Self::Any(all(set, searches).within("or_match")?),
            Some(Rule::AndMatch(set)) => Self::All(all(set, searches).within("and_match")?),
            Some(Rule::NotMatch(inner)) => {
                let inner = Self::compile(inner, searches, depth + 1).within("not_match")?;
                Self::Not(Box::new(inner))
            }
            Some(Rule::AnyMatch(true)) => Self::Always,
            Some(Rule::AnyMatch(false)) => return Err(Refusal::new("any_match", "can only be true")),
            Some(Rule::HttpRequestHeadersMatch(from)) => {
                Self::Request(headers(from, false).within("http_request_headers_match")?)
            }
            Some(Rule::HttpRequestTrailersMatch(from)) => {
                Self::RequestTrailers(headers(from, false).within("http_request_trailers_match")?)
            }
            Some(Rule::HttpResponseHeadersMatch(from)) => {
                Self::Response(headers(from, true).within("http_response_headers_match")?)
            }
            Some(Rule::HttpResponseTrailersMatch(from)) => {
                Self::ResponseTrailers(headers(from, true).within("http_response_trailers_match")?)
            }
            Some(Rule::HttpRequestGenericBodyMatch(from)) => {
                let search = Search::compile(from).within("http_request_generic_body_match")?;
                searches.request.push(search);
                Self::RequestBody(searches.request.len() - 1)
            }
            Some(Rule::HttpResponseGenericBodyMatch(from)) => {
                let search = Search::compile(from).within("http_response_generic_body_match")?;
                searches.response.push(search);
                Self::ResponseBody(searches.response.len() - 1)
            }
            None => return Err(Refusal::new("rule", "is missing")),
        })
    }

    /// Whether it holds, as far as that can be said.
    pub(super) fn judge(&self, seen: &Seen<'_>) -> Option<bool> {
        let fields = |matchers: &[HeaderMatch], headers: Option<&HeaderMap>| {
            headers.map(|headers| {
                let view = RequestView {
                    headers,
                    ..seen.request
                };
                matchers.iter().all(|matcher| matcher.matches(&view))
            })
        };
        match self {
            Self::Always => Some(true),
            Self::Not(inner) => inner.judge(seen).map(|verdict| !verdict),
            Self::Any(all) => decide(all.iter().map(|one| one.judge(seen)), true),
            Self::All(all) => decide(all.iter().map(|one| one.judge(seen)), false),
            Self::Request(matchers) => fields(matchers, Some(seen.request.headers)),
            Self::RequestTrailers(matchers) => fields(matchers, seen.request_trailers),
            Self::Response(matchers) => fields(matchers, seen.response),
            Self::ResponseTrailers(matchers) => fields(matchers, seen.response_trailers),
            Self::RequestBody(search) => seen.request_body.map(|body| body.has_found(*search)),
            Self::ResponseBody(search) => seen.response_body.map(|body| body.has_found(*search)),
        }
    }
}

/// `decisive` if one is; unknown if one that is unknown may be; else its opposite.
fn decide(verdicts: impl Iterator<Item = Option<bool>>, decisive: bool) -> Option<bool> {
    let mut outcome = Some(!decisive);
    for verdict in verdicts {
        match verdict {
            Some(verdict) if verdict == decisive => return Some(decisive),
            Some(_) => {}
            None => outcome = None,
        }
    }
    outcome
}
