//! Retry policies: which outcomes are tried again, how often, and after what wait.

use std::time::Duration;

use http::{HeaderMap, StatusCode};
use serin_xds::pb::envoy::config::route::v3 as route;

use super::convert;
use super::matchers::{HeaderMatch, RequestView};
use crate::error::{Refusal, Within};

/// Envoy's first back-off interval.
const BASE_INTERVAL: Duration = Duration::from_millis(25);

macro_rules! conditions {
    ($($name:ident = $bit:expr, $text:literal;)*) => {
        /// A set of `retry_on` conditions.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
        pub struct RetryOn(u32);
        impl RetryOn {
            $(#[doc = concat!("`", $text, "`.")] pub const $name: Self = Self(1 << $bit);)*
            fn parse(text: &str) -> Option<Self> {
                match text { $($text => Some(Self::$name),)* _ => None }
            }
        }
    };
}

conditions! {
    SERVER_ERROR = 0, "5xx";
    GATEWAY_ERROR = 1, "gateway-error";
    RESET = 2, "reset";
    RESET_BEFORE_REQUEST = 3, "reset-before-request";
    CONNECT_FAILURE = 4, "connect-failure";
    RATE_LIMITED = 5, "envoy-ratelimited";
    RETRIABLE_4XX = 6, "retriable-4xx";
    REFUSED_STREAM = 7, "refused-stream";
    STATUS_CODES = 8, "retriable-status-codes";
    HEADERS = 9, "retriable-headers";
    CANCELLED = 10, "cancelled";
    DEADLINE_EXCEEDED = 11, "deadline-exceeded";
    INTERNAL = 12, "internal";
    RESOURCE_EXHAUSTED = 13, "resource-exhausted";
    UNAVAILABLE = 14, "unavailable";
    HTTP3 = 15, "http3-post-connect-failure";
}

impl RetryOn {
    /// Whether any of `other` is in the set.
    pub fn has(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }
}

impl std::ops::BitOr for RetryOn {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// How an attempt ended, as far as retries care.
#[derive(Clone, Copy, Debug)]
pub enum Outcome<'a> {
    /// A response head.
    Response(StatusCode, &'a HeaderMap),
    /// No connection could be made; nothing was sent.
    ConnectFailure,
    /// The peer said that it did not process the request (`REFUSED_STREAM`, a GOAWAY below the stream, a mesh peer
    /// that could not reach its application).
    Refused,
    /// The connection ended before a response.
    Reset {
        /// Whether any of the request may have reached the peer.
        sent: bool,
    },
    /// The time for this try ran out.
    PerTryTimeout,
}

/// A `RetryPolicy`.
#[derive(Clone, Debug)]
pub struct RetryPolicy {
    /// Which conditions.
    pub on: RetryOn,
    /// How many times, beside the first try.
    pub attempts: u32,
    /// Limit of one try.
    pub per_try_timeout: Option<Duration>,
    /// Hosts already tried are avoided.
    pub previous_hosts: bool,
    /// How often a host is picked anew when a predicate rejects it.
    pub host_selection_attempts: u32,
    status_codes: Box<[u16]>,
    response_headers: Box<[HeaderMatch]>,
    request_headers: Box<[HeaderMatch]>,
    base_interval: Duration,
    max_interval: Duration,
}

impl RetryPolicy {
    /// Compiles the message; `None` when it can never retry anything.
    pub(crate) fn compile(from: &route::RetryPolicy) -> Result<Option<Self>, Refusal> {
        let mut on = RetryOn::default();
        for word in from
            .retry_on
            .split(',')
            .map(str::trim)
            .filter(|word| !word.is_empty())
        {
            // A bare status code is Istio's short form of retriable-status-codes, translated by its control plane;
            // like Envoy, words that we do not know are ignored.
            on = on | RetryOn::parse(word).unwrap_or_default();
        }
        let attempts = from.num_retries.as_ref().map_or(1, |value| value.value);
        if on == RetryOn::default() || attempts == 0 {
            return Ok(None);
        }
        if from.rate_limited_retry_back_off.is_some() {
            return Err(Refusal::new("rate_limited_retry_back_off", "not supported yet"));
        }
        let mut previous_hosts = false;
        for (index, predicate) in from.retry_host_predicate.iter().enumerate() {
            if predicate.name.ends_with("previous_hosts") {
                previous_hosts = true;
            } else {
                return Err(Refusal::new(
                    format!("retry_host_predicate[{index}]"),
                    format!("the predicate {:?} is not supported", predicate.name),
                ));
            }
        }
        let (base_interval, max_interval) = match &from.retry_back_off {
            None => (BASE_INTERVAL, BASE_INTERVAL * 10),
            Some(back_off) => {
                let base = match &back_off.base_interval {
                    Some(interval) => convert::duration(interval).within("retry_back_off.base_interval")?,
                    None => return Err(Refusal::new("retry_back_off.base_interval", "is missing")),
                };
                let max = match &back_off.max_interval {
                    Some(interval) => convert::duration(interval).within("retry_back_off.max_interval")?,
                    None => base * 10,
                };
                (base.max(Duration::from_millis(1)), max)
            }
        };
        let headers = |list: &[route::HeaderMatcher], field: &str| {
            list.iter()
                .enumerate()
                .map(|(index, matcher)| HeaderMatch::compile(matcher).within(format!("{field}[{index}]")))
                .collect::<Result<Box<[_]>, _>>()
        };
        Ok(Some(Self {
            on,
            attempts,
            per_try_timeout: convert::timeout(from.per_try_timeout.as_ref()).within("per_try_timeout")?,
            previous_hosts,
            host_selection_attempts: u32::try_from(from.host_selection_retry_max_attempts)
                .unwrap_or(0)
                .clamp(1, 64),
            status_codes: from
                .retriable_status_codes
                .iter()
                .filter_map(|code| u16::try_from(*code).ok())
                .collect(),
            response_headers: headers(&from.retriable_headers, "retriable_headers")?,
            request_headers: headers(&from.retriable_request_headers, "retriable_request_headers")?,
            base_interval,
            max_interval,
        }))
    }

    /// Whether requests like this one are retried at all (`retriable_request_headers`).
    pub fn applies_to(&self, request: &RequestView<'_>) -> bool {
        self.request_headers.is_empty()
            || self
                .request_headers
                .iter()
                .any(|matcher| matcher.matches(request))
    }

    /// Whether an attempt that ended so should be tried again.
    pub fn wants(&self, outcome: &Outcome<'_>) -> bool {
        let on = self.on;
        match outcome {
            Outcome::ConnectFailure => on.has(
                RetryOn::CONNECT_FAILURE | RetryOn::SERVER_ERROR | RetryOn::GATEWAY_ERROR | RetryOn::RESET,
            ),
            Outcome::Refused => on.has(
                RetryOn::REFUSED_STREAM | RetryOn::CONNECT_FAILURE | RetryOn::RESET | RetryOn::SERVER_ERROR,
            ),
            Outcome::Reset { sent } => {
                on.has(RetryOn::RESET | RetryOn::SERVER_ERROR | RetryOn::GATEWAY_ERROR)
                    || (!sent && on.has(RetryOn::RESET_BEFORE_REQUEST | RetryOn::CONNECT_FAILURE))
            }
            Outcome::PerTryTimeout => on.has(RetryOn::SERVER_ERROR | RetryOn::GATEWAY_ERROR),
            Outcome::Response(status, headers) => self.wants_response(*status, headers),
        }
    }

    fn wants_response(&self, status: StatusCode, headers: &HeaderMap) -> bool {
        let on = self.on;
        let code = status.as_u16();
        if (on.has(RetryOn::SERVER_ERROR) && code >= 500)
            || (on.has(RetryOn::GATEWAY_ERROR) && (502..=504).contains(&code))
            || (on.has(RetryOn::RETRIABLE_4XX) && code == 409)
            || (on.has(RetryOn::STATUS_CODES) && self.status_codes.contains(&code))
            || (on.has(RetryOn::RATE_LIMITED) && headers.contains_key("x-envoy-ratelimited"))
        {
            return true;
        }
        if on.has(RetryOn::HEADERS) {
            let view = RequestView {
                method: "",
                path: "",
                query: None,
                authority: "",
                scheme: "",
                headers,
            };
            if self.response_headers.iter().any(|matcher| matcher.matches(&view)) {
                return true;
            }
        }
        // gRPC says how it went in the head only when there is no body; trailers come too late for a retry.
        match headers.get("grpc-status").map(http::HeaderValue::as_bytes) {
            Some(b"1") => on.has(RetryOn::CANCELLED),
            Some(b"4") => on.has(RetryOn::DEADLINE_EXCEEDED),
            Some(b"8") => on.has(RetryOn::RESOURCE_EXHAUSTED),
            Some(b"13") => on.has(RetryOn::INTERNAL),
            Some(b"14") => on.has(RetryOn::UNAVAILABLE),
            _ => false,
        }
    }

    /// Whether a response, rather than a lost connection, may be cause for a retry: only then must a copy of the
    /// request be kept for every attempt.
    pub fn looks_at_responses(&self, is_grpc: bool) -> bool {
        let grpc = RetryOn::CANCELLED
            | RetryOn::DEADLINE_EXCEEDED
            | RetryOn::INTERNAL
            | RetryOn::RESOURCE_EXHAUSTED
            | RetryOn::UNAVAILABLE;
        self.on.has(
            RetryOn::SERVER_ERROR
                | RetryOn::GATEWAY_ERROR
                | RetryOn::RETRIABLE_4XX
                | RetryOn::RATE_LIMITED
                | RetryOn::HEADERS
                | RetryOn::RESET,
        ) || (self.on.has(RetryOn::STATUS_CODES) && !self.status_codes.is_empty())
            || (is_grpc && self.on.has(grpc))
    }

    /// Fully jittered wait before retry number `retry` (1 for the first): uniform in `[0, (2^retry - 1) * base)`,
    /// capped.
    pub fn back_off(&self, retry: u32, random: u64) -> Duration {
        let span = self
            .base_interval
            .saturating_mul((1u32 << retry.min(20)) - 1)
            .min(self.max_interval);
        let nanos = (u128::from(random) * span.as_nanos()) >> 64;
        Duration::from_nanos(nanos as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(on: &str) -> RetryPolicy {
        RetryPolicy::compile(&route::RetryPolicy {
            retry_on: on.into(),
            retriable_status_codes: vec![418],
            ..Default::default()
        })
        .unwrap()
        .unwrap()
    }

    #[test]
    fn each_condition_retries_what_it_says() {
        let none = HeaderMap::new();
        let mut unavailable = HeaderMap::new();
        unavailable.insert("grpc-status", http::HeaderValue::from_static("14"));
        let status = |code| StatusCode::from_u16(code).unwrap();
        let cases = [
            ("5xx", Outcome::Response(status(500), &none), true),
            ("gateway-error", Outcome::Response(status(500), &none), false),
            ("gateway-error", Outcome::Response(status(503), &none), true),
            ("retriable-4xx", Outcome::Response(status(409), &none), true),
            ("retriable-4xx", Outcome::Response(status(404), &none), false),
            (
                "retriable-status-codes",
                Outcome::Response(status(418), &none),
                true,
            ),
            ("unavailable", Outcome::Response(status(200), &unavailable), true),
            ("cancelled", Outcome::Response(status(200), &unavailable), false),
            ("connect-failure", Outcome::ConnectFailure, true),
            ("refused-stream", Outcome::ConnectFailure, false),
            ("refused-stream", Outcome::Refused, true),
            ("connect-failure", Outcome::Reset { sent: true }, false),
            ("reset", Outcome::Reset { sent: true }, true),
            ("reset-before-request", Outcome::Reset { sent: false }, true),
            ("reset-before-request", Outcome::Reset { sent: true }, false),
            ("5xx", Outcome::PerTryTimeout, true),
            ("reset", Outcome::PerTryTimeout, false),
        ];
        for (on, outcome, expected) in cases {
            assert_eq!(policy(on).wants(&outcome), expected, "{on} {outcome:?}");
        }
    }

    #[test]
    fn zero_attempts_or_no_condition_is_no_policy() {
        let zero = route::RetryPolicy {
            retry_on: "5xx".into(),
            num_retries: Some(serin_xds::pb::google::protobuf::UInt32Value { value: 0 }),
            ..Default::default()
        };
        assert!(RetryPolicy::compile(&zero).unwrap().is_none());
        assert!(
            RetryPolicy::compile(&route::RetryPolicy::default())
                .unwrap()
                .is_none()
        );
    }

    #[test]
    fn back_off_doubles_its_span_up_to_ten_times_the_base() {
        let policy = policy("5xx");
        let most = |retry| policy.back_off(retry, u64::MAX).as_micros();
        assert_eq!(
            [most(1), most(2), most(3), most(4), most(9)],
            [24_999, 74_999, 174_999, 249_999, 249_999]
        );
        assert_eq!(policy.back_off(3, 0), Duration::ZERO);
    }
}
