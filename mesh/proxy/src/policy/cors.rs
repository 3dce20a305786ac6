//! CORS (`envoy.filters.http.cors`): which origins may ask, and the answers to preflights.

use http::{HeaderMap, HeaderValue, Method, header};
use serin_xds::pb::envoy::config::route::v3 as route;
use serin_xds::pb::envoy::extensions::filters::http::cors::v3 as cors_v3;
use serin_xds::pb::google::protobuf::BoolValue;

use crate::config::convert::{Fraction, each};
use crate::config::matchers::StringMatch;
use crate::config::runtime::{Runtime, RuntimeFraction};
use crate::error::{Refusal, Within};

/// A page of a public network says so when it asks for something within a private one.
const REQUEST_PRIVATE_NETWORK: &str = "access-control-request-private-network";
const ALLOW_PRIVATE_NETWORK: &str = "access-control-allow-private-network";

/// A compiled CORS policy.
#[derive(Clone, Debug)]
pub struct Cors {
    origins: Box<[StringMatch]>,
    allow_methods: Option<HeaderValue>,
    allow_headers: Option<HeaderValue>,
    expose_headers: Option<HeaderValue>,
    max_age: Option<HeaderValue>,
    allow_credentials: Option<bool>,
    forward_unmatched_preflights: Option<bool>,
    /// Pages of public networks may ask.
    private_network: Option<bool>,
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
        let value = |text: &str, field: &str| {
            if text.is_empty() {
                return Ok(None);
            }
            HeaderValue::from_str(text)
                .map(Some)
                .map_err(|_| Refusal::new(field, "is not a header value"))
        };
        let flag = |value: Option<&BoolValue>| value.map(|value| value.value);
        Ok(Self {
            origins: each(
                &from.allow_origin_string_match,
                "allow_origin_string_match",
                StringMatch::compile,
            )?,
            allow_methods: value(&from.allow_methods, "allow_methods")?,
            allow_headers: value(&from.allow_headers, "allow_headers")?,
            expose_headers: value(&from.expose_headers, "expose_headers")?,
            max_age: value(&from.max_age, "max_age")?,
            allow_credentials: flag(from.allow_credentials.as_ref()),
            forward_unmatched_preflights: flag(from.forward_not_matching_preflights.as_ref()),
            private_network: flag(from.allow_private_network_access.as_ref()),
            enabled: runtime
                .fraction(from.filter_enabled.as_ref(), Fraction::ALL)
                .within("filter_enabled")?,
        })
    }

    /// Compiles the older policy message of routes and virtual hosts, which says the same.
    pub(crate) fn compile_route(from: &route::CorsPolicy, runtime: &mut Runtime) -> Result<Self, Refusal> {
        use route::cors_policy::EnabledSpecifier;
        let from = from.clone();
        let message = cors_v3::CorsPolicy {
            allow_origin_string_match: from.allow_origin_string_match,
            allow_methods: from.allow_methods,
            allow_headers: from.allow_headers,
            expose_headers: from.expose_headers,
            max_age: from.max_age,
            allow_credentials: from.allow_credentials,
            filter_enabled: from
                .enabled_specifier
                .map(|EnabledSpecifier::FilterEnabled(share)| share),
            shadow_enabled: from.shadow_enabled,
            allow_private_network_access: from.allow_private_network_access,
            forward_not_matching_preflights: from.forward_not_matching_preflights,
        };
        Self::compile(&message, runtime)
    }

    /// What this policy says, and a less specific one where this one says nothing.
    pub(crate) fn or(&self, less: &Self) -> Self {
        let either =
            |own: &Option<HeaderValue>, other: &Option<HeaderValue>| own.clone().or_else(|| other.clone());
        Self {
            origins: if self.origins.is_empty() {
                less.origins.clone()
            } else {
                self.origins.clone()
            },
            allow_methods: either(&self.allow_methods, &less.allow_methods),
            allow_headers: either(&self.allow_headers, &less.allow_headers),
            expose_headers: either(&self.expose_headers, &less.expose_headers),
            max_age: either(&self.max_age, &less.max_age),
            allow_credentials: self.allow_credentials.or(less.allow_credentials),
            forward_unmatched_preflights: self
                .forward_unmatched_preflights
                .or(less.forward_unmatched_preflights),
            private_network: self.private_network.or(less.private_network),
            enabled: self.enabled.clone(),
        }
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
        let allowed = origin.to_str().is_ok_and(|text| {
            // A star is every origin, as in Envoy.
            let mut origins = self.origins.iter();
            origins.any(|matcher| matcher.matches("*") || matcher.matches(text))
        });
        let asked = request.get(header::ACCESS_CONTROL_REQUEST_METHOD);
        let preflight = method == Method::OPTIONS && asked.is_some_and(|method| !method.is_empty());
        if !preflight {
            return if allowed {
                CorsVerdict::Actual(origin.clone())
            } else {
                CorsVerdict::None
            };
        }
        if !allowed && self.forward_unmatched_preflights.unwrap_or(true) {
            return CorsVerdict::None;
        }
        let mut answer = HeaderMap::new();
        let mut put = |name, value: &Option<HeaderValue>| {
            if let Some(value) = value {
                answer.insert(name, value.clone());
            }
        };
        put(header::ACCESS_CONTROL_ALLOW_METHODS, &self.allow_methods);
        put(header::ACCESS_CONTROL_ALLOW_HEADERS, &self.allow_headers);
        put(header::ACCESS_CONTROL_MAX_AGE, &self.max_age);
        // Without an origin the rest allows nothing.
        if allowed {
            put(header::ACCESS_CONTROL_EXPOSE_HEADERS, &self.expose_headers);
            answer.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
        }
        if self.allow_credentials == Some(true) {
            answer.insert(
                header::ACCESS_CONTROL_ALLOW_CREDENTIALS,
                HeaderValue::from_static("true"),
            );
        }
        let of_private = request.get(REQUEST_PRIVATE_NETWORK);
        if self.private_network == Some(true) && of_private.is_some_and(|asked| asked == "true") {
            answer.insert(ALLOW_PRIVATE_NETWORK, HeaderValue::from_static("true"));
        }
        CorsVerdict::Preflight(Box::new(answer))
    }

    /// Adds the allow headers to the response of an allowed cross-origin request.
    pub fn decorate(&self, origin: HeaderValue, response: &mut HeaderMap) {
        response.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        if self.allow_credentials == Some(true) {
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
    use serin_xds::pb::envoy::r#type::matcher::v3 as matcher;

    use super::*;
    use crate::given::headers;

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

    #[test]
    fn the_older_message_of_routes_is_compiled_and_refused_like_the_filters_own() {
        let older = |age: &str| route::CorsPolicy {
            max_age: age.into(),
            ..Default::default()
        };
        let compile = |age| Cors::compile_route(&older(age), &mut Runtime::default());
        assert_eq!(compile("60").unwrap().max_age.unwrap(), "60");
        assert_eq!(compile("\n").unwrap_err().path, "max_age");
    }

    #[test]
    fn pages_of_public_networks_are_let_in_where_the_most_specific_level_says_so() {
        let with = |allowed: Option<bool>| Cors {
            private_network: allowed,
            ..policy()
        };
        let asks = |value: &'static str| {
            headers(&[
                ("origin", "https://a"),
                ("access-control-request-method", "POST"),
                ("access-control-request-private-network", value),
            ])
        };
        let answer = |cors: &Cors, asked: &'static str| match cors.judge(&Method::OPTIONS, &asks(asked)) {
            CorsVerdict::Preflight(answer) => answer.get(ALLOW_PRIVATE_NETWORK).cloned(),
            other => panic!("{other:?}"),
        };
        let open = with(Some(true));
        assert_eq!(answer(&open, "true").unwrap(), "true");
        assert_eq!(answer(&open, "yes"), None);
        assert_eq!(answer(&with(None), "true"), None);
        assert_eq!(answer(&with(None).or(&open), "true").unwrap(), "true");
        assert_eq!(answer(&with(Some(false)).or(&open), "true"), None);
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
}
