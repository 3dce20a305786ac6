//! Fault injection and CORS, compiled.

use std::time::Duration;

use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use serin_xds::pb::envoy::config::route::v3 as route;
use serin_xds::pb::envoy::extensions::filters::http::{cors::v3 as cors_v3, fault::v3 as fault_v3};
use serin_xds::pb::envoy::r#type::matcher::v3 as matcher;

use super::convert::{self, Fraction};
use super::matchers::{HeaderMatch, RequestView, StringMatch};
use super::runtime::{Runtime, RuntimeFraction};
use crate::error::{Refusal, Within};

/// What the fault filter does to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultAbort {
    /// An HTTP status.
    Http(StatusCode),
    /// A gRPC status, in a 200 answer.
    Grpc(u32),
}

/// A compiled `HTTPFault`.
#[derive(Clone, Debug)]
pub struct Fault {
    delay: Option<(Fraction, Duration)>,
    abort: Option<(Fraction, FaultAbort)>,
    headers: Box<[HeaderMatch]>,
}

impl Fault {
    /// Compiles the message; `None` when it does nothing.
    pub(crate) fn compile(from: &fault_v3::HttpFault) -> Result<Option<Self>, Refusal> {
        use fault_v3::fault_abort::ErrorType;
        use serin_xds::pb::envoy::extensions::filters::common::fault::v3::fault_delay::FaultDelaySecifier;
        if from.response_rate_limit.is_some() {
            return Err(Refusal::new("response_rate_limit", "not supported yet"));
        }
        if !from
            .filter_metadata
            .as_ref()
            .is_none_or(|fields| fields.fields.is_empty())
        {
            return Err(Refusal::new("filter_metadata", "not supported"));
        }
        if from
            .abort
            .as_ref()
            .is_some_and(|abort| !abort.response_body.is_empty())
        {
            return Err(Refusal::new("abort.response_body", "not supported"));
        }
        if from.max_active_faults.is_some() {
            return Err(Refusal::new("max_active_faults", "not supported yet"));
        }
        if !from.upstream_cluster.is_empty() || !from.downstream_nodes.is_empty() {
            return Err(Refusal::new(
                "upstream_cluster",
                "faults by cluster or node are not supported",
            ));
        }
        let none = Fraction::compile(
            Some(&serin_xds::pb::envoy::r#type::v3::FractionalPercent::default()),
            Fraction::ALL,
        )?;
        let delay = match &from.delay {
            None => None,
            Some(delay) => {
                let share = Fraction::compile(delay.percentage.as_ref(), none).within("delay.percentage")?;
                match &delay.fault_delay_secifier {
                    Some(FaultDelaySecifier::FixedDelay(time)) => {
                        Some((share, convert::duration(time).within("delay.fixed_delay")?))
                    }
                    Some(FaultDelaySecifier::HeaderDelay(_)) => {
                        return Err(Refusal::new("delay.header_delay", "not supported"));
                    }
                    None => return Err(Refusal::new("delay", "fixed_delay is missing")),
                }
            }
        };
        let abort = match &from.abort {
            None => None,
            Some(abort) => {
                let share = Fraction::compile(abort.percentage.as_ref(), none).within("abort.percentage")?;
                let kind = match &abort.error_type {
                    Some(ErrorType::HttpStatus(code)) => FaultAbort::Http(
                        u16::try_from(*code)
                            .ok()
                            .filter(|code| (200..600).contains(code))
                            .and_then(|code| StatusCode::from_u16(code).ok())
                            .ok_or_else(|| {
                                Refusal::new("abort.http_status", format!("{code} is not 200 to 599"))
                            })?,
                    ),
                    Some(ErrorType::GrpcStatus(code)) => FaultAbort::Grpc(*code),
                    Some(ErrorType::HeaderAbort(_)) => {
                        return Err(Refusal::new("abort.header_abort", "not supported"));
                    }
                    None => return Err(Refusal::new("abort", "http_status or grpc_status is missing")),
                };
                Some((share, kind))
            }
        };
        let headers = from
            .headers
            .iter()
            .enumerate()
            .map(|(index, header)| HeaderMatch::compile(header).within(format!("headers[{index}]")))
            .collect::<Result<_, _>>()?;
        let active = delay.is_some_and(|(share, _)| !share.is_none())
            || abort.is_some_and(|(share, _)| !share.is_none());
        Ok(active.then_some(Self {
            delay,
            abort,
            headers,
        }))
    }

    /// What happens to this request: a delay, an abort, or both in that order. `random` is called at most twice.
    pub fn decide(
        &self,
        request: &RequestView<'_>,
        mut random: impl FnMut() -> u64,
    ) -> (Option<Duration>, Option<FaultAbort>) {
        if !self.headers.iter().all(|header| header.matches(request)) {
            return (None, None);
        }
        let delay = self
            .delay
            .and_then(|(share, time)| share.hit(random()).then_some(time));
        let abort = self
            .abort
            .and_then(|(share, kind)| share.hit(random()).then_some(kind));
        (delay, abort)
    }
}

/// A compiled CORS policy.
#[derive(Clone, Debug)]
pub struct Cors {
    origins: Box<[StringMatch]>,
    allow_methods: Option<HeaderValue>,
    allow_headers: Option<HeaderValue>,
    expose_headers: Option<HeaderValue>,
    max_age: Option<HeaderValue>,
    allow_credentials: bool,
    forward_unmatched_preflights: bool,
    /// Share of requests that it is for.
    enabled: RuntimeFraction,
}

/// What CORS says about a request.
#[derive(Debug, PartialEq, Eq)]
pub enum CorsVerdict {
    /// Not a cross-origin request, or an origin that is not allowed: nothing is added.
    None,
    /// A preflight to be answered here with these header fields.
    Preflight(Box<HeaderMap>),
    /// A request whose response gets the allow headers for this origin.
    Actual(HeaderValue),
}

impl Cors {
    /// Compiles the filter's own policy message.
    pub(crate) fn compile(from: &cors_v3::CorsPolicy, runtime: &mut Runtime) -> Result<Self, Refusal> {
        let enabled = runtime
            .fraction(from.filter_enabled.as_ref(), Fraction::ALL)
            .within("filter_enabled")?;
        if from
            .allow_private_network_access
            .as_ref()
            .is_some_and(|value| value.value)
        {
            return Err(Refusal::new("allow_private_network_access", "not supported"));
        }
        Self::build(
            &from.allow_origin_string_match,
            [
                &from.allow_methods,
                &from.allow_headers,
                &from.expose_headers,
                &from.max_age,
            ],
            from.allow_credentials.as_ref().is_some_and(|value| value.value),
            from.forward_not_matching_preflights
                .as_ref()
                .is_none_or(|value| value.value),
            enabled,
        )
    }

    /// Compiles the older policy message of routes and virtual hosts.
    pub(crate) fn compile_route(from: &route::CorsPolicy, runtime: &mut Runtime) -> Result<Self, Refusal> {
        let enabled = match &from.enabled_specifier {
            None => Fraction::ALL.into(),
            Some(route::cors_policy::EnabledSpecifier::FilterEnabled(share)) => runtime
                .fraction(Some(share), Fraction::ALL)
                .within("filter_enabled")?,
        };
        Self::build(
            &from.allow_origin_string_match,
            [
                &from.allow_methods,
                &from.allow_headers,
                &from.expose_headers,
                &from.max_age,
            ],
            from.allow_credentials.as_ref().is_some_and(|value| value.value),
            from.forward_not_matching_preflights
                .as_ref()
                .is_none_or(|value| value.value),
            enabled,
        )
    }

    fn build(
        origins: &[matcher::StringMatcher],
        [methods, headers, expose, max_age]: [&String; 4],
        allow_credentials: bool,
        forward_unmatched_preflights: bool,
        enabled: RuntimeFraction,
    ) -> Result<Self, Refusal> {
        let value = |text: &str, field: &str| {
            if text.is_empty() {
                return Ok(None);
            }
            HeaderValue::from_str(text)
                .map(Some)
                .map_err(|_| Refusal::new(field, "is not a header value"))
        };
        Ok(Self {
            origins: origins
                .iter()
                .enumerate()
                .map(|(index, origin)| {
                    StringMatch::compile(origin).within(format!("allow_origin_string_match[{index}]"))
                })
                .collect::<Result<_, _>>()?,
            allow_methods: value(methods, "allow_methods")?,
            allow_headers: value(headers, "allow_headers")?,
            expose_headers: value(expose, "expose_headers")?,
            max_age: value(max_age, "max_age")?,
            allow_credentials,
            forward_unmatched_preflights,
            enabled,
        })
    }

    /// Whether a request is judged at all.
    pub fn applies(&self, random: impl FnOnce() -> u64) -> bool {
        self.enabled.is_all() || self.enabled.hit(random())
    }

    /// Judges a request.
    pub fn judge(&self, method: &Method, request: &HeaderMap) -> CorsVerdict {
        let Some(origin) = request.get(header::ORIGIN) else {
            return CorsVerdict::None;
        };
        let allowed = origin
            .to_str()
            .is_ok_and(|text| self.origins.iter().any(|matcher| matcher.matches(text)));
        let preflight =
            method == Method::OPTIONS && request.contains_key(header::ACCESS_CONTROL_REQUEST_METHOD);
        if !preflight {
            return if allowed {
                CorsVerdict::Actual(origin.clone())
            } else {
                CorsVerdict::None
            };
        }
        if !allowed {
            return if self.forward_unmatched_preflights {
                CorsVerdict::None
            } else {
                CorsVerdict::Preflight(Box::default())
            };
        }
        let mut answer = HeaderMap::new();
        answer.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
        let mut put = |name, value: &Option<HeaderValue>| {
            if let Some(value) = value {
                answer.insert(name, value.clone());
            }
        };
        put(header::ACCESS_CONTROL_ALLOW_METHODS, &self.allow_methods);
        put(header::ACCESS_CONTROL_ALLOW_HEADERS, &self.allow_headers);
        put(header::ACCESS_CONTROL_MAX_AGE, &self.max_age);
        if self.allow_credentials {
            answer.insert(
                header::ACCESS_CONTROL_ALLOW_CREDENTIALS,
                HeaderValue::from_static("true"),
            );
        }
        CorsVerdict::Preflight(Box::new(answer))
    }

    /// Adds the allow headers to the response of an allowed cross-origin request.
    pub fn decorate(&self, origin: HeaderValue, response: &mut HeaderMap) {
        response.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        if self.allow_credentials {
            response.insert(
                header::ACCESS_CONTROL_ALLOW_CREDENTIALS,
                HeaderValue::from_static("true"),
            );
        }
        if let Some(expose) = &self.expose_headers {
            response.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, expose.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy() -> Cors {
        Cors::compile(
            &cors_v3::CorsPolicy {
                allow_origin_string_match: vec![matcher::StringMatcher {
                    match_pattern: Some(matcher::string_matcher::MatchPattern::Exact("https://a".into())),
                    ..Default::default()
                }],
                allow_methods: "GET,POST".into(),
                max_age: "60".into(),
                ..Default::default()
            },
            &mut Runtime::default(),
        )
        .unwrap()
    }

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        pairs
            .iter()
            .map(|(name, value)| {
                (
                    http::HeaderName::from_static(name),
                    HeaderValue::from_static(value),
                )
            })
            .collect()
    }

    #[test]
    fn a_preflight_of_an_allowed_origin_is_answered_by_the_proxy() {
        let request = headers(&[("origin", "https://a"), ("access-control-request-method", "POST")]);
        let CorsVerdict::Preflight(answer) = policy().judge(&Method::OPTIONS, &request) else {
            panic!("not answered");
        };
        assert_eq!(answer["access-control-allow-methods"], "GET,POST");
        assert_eq!(answer["access-control-max-age"], "60");
    }

    #[test]
    fn a_request_of_a_foreign_origin_passes_without_allow_headers() {
        let request = headers(&[("origin", "https://b")]);
        assert_eq!(policy().judge(&Method::GET, &request), CorsVerdict::None);
        let request = headers(&[("origin", "https://a")]);
        assert!(matches!(
            policy().judge(&Method::GET, &request),
            CorsVerdict::Actual(_)
        ));
    }

    #[test]
    fn a_fault_of_half_the_requests_hits_about_half_and_only_matching_ones() {
        let fault = Fault::compile(&fault_v3::HttpFault {
            abort: Some(fault_v3::FaultAbort {
                percentage: Some(serin_xds::pb::envoy::r#type::v3::FractionalPercent {
                    numerator: 50,
                    denominator: 0,
                }),
                error_type: Some(fault_v3::fault_abort::ErrorType::HttpStatus(503)),
                ..Default::default()
            }),
            headers: vec![route::HeaderMatcher {
                name: "x-hit".into(),
                ..Default::default()
            }],
            ..Default::default()
        })
        .unwrap()
        .unwrap();
        let hit = headers(&[("x-hit", "1")]);
        let miss = HeaderMap::new();
        let view = |headers| RequestView {
            method: "GET",
            path: "/",
            query: None,
            authority: Some(""),
            scheme: Some(""),
            headers,
        };
        let mut counter = 0u64;
        let mut spread = move || {
            counter = counter.wrapping_add(0x9E37_79B9_7F4A_7C15);
            counter
        };
        let hits = (0..1000)
            .filter(|_| fault.decide(&view(&hit), &mut spread).1.is_some())
            .count();
        assert!((480..=520).contains(&hits), "{hits}");
        assert_eq!(fault.decide(&view(&miss), &mut spread), (None, None));
    }
}
