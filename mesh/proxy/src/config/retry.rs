//! Retry policies: which outcomes are tried again, how often, and after what wait.

pub mod asked;

use std::time::Duration;

use http::{HeaderMap, HeaderName, StatusCode};
use serin_xds::pb::envoy::config::route::v3 as route;

use super::convert::{self, each};
use super::endpoint::Endpoint;
use super::matchers::{HeaderMatch, RequestView};
use super::subset::Criteria;
use crate::error::{Refusal, Within};

static X_RATE_LIMITED: HeaderName = HeaderName::from_static("x-envoy-ratelimited");
static GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");

/// Envoy's first back-off interval.
const BASE_INTERVAL: Duration = Duration::from_millis(25);
/// Envoy's longest wait that an upstream may ask for.
const MAX_ASKED_INTERVAL: Duration = Duration::from_secs(300);

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
    /// A condition by its name, of those of gRPC or of the others.
    pub fn of(word: &str, grpc: bool) -> Option<Self> {
        Self::parse(word).filter(|one| GRPC_CONDITIONS.has(*one) == grpc)
    }

    /// Whether any of `other` is in the set.
    pub fn has(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }
}

/// What asks for the status of a gRPC call.
const GRPC_CONDITIONS: RetryOn = RetryOn(
    RetryOn::CANCELLED.0
        | RetryOn::DEADLINE_EXCEEDED.0
        | RetryOn::INTERNAL.0
        | RetryOn::RESOURCE_EXHAUSTED.0
        | RetryOn::UNAVAILABLE.0,
);

impl std::ops::BitOr for RetryOn {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// The metadata of hosts that a retry avoids.
fn omitted_metadata(from: &route::retry_policy::RetryHostPredicate) -> Result<Option<Criteria>, Refusal> {
    use serin_xds::pb::envoy::extensions::retry::host::omit_host_metadata::v3::OmitHostMetadataConfig;
    let Some(route::retry_policy::retry_host_predicate::ConfigType::TypedConfig(any)) = &from.config_type
    else {
        return Err(Refusal::new("typed_config", "is missing"));
    };
    let config: OmitHostMetadataConfig = convert::unpack(
        any,
        "envoy.extensions.retry.host.omit_host_metadata.v3.OmitHostMetadataConfig",
    )?;
    let wanted = config
        .metadata_match
        .as_ref()
        .and_then(|metadata| metadata.filter_metadata.get(super::subset::METADATA))
        .map(Criteria::of_struct);
    // Criteria without a key would fit every host; Envoy leaves out none.
    Ok(wanted.filter(|criteria| !criteria.is_empty()))
}

/// After how many tries priorities are avoided.
fn previous_priorities(from: &route::retry_policy::RetryPriority) -> Result<u32, Refusal> {
    use serin_xds::pb::envoy::extensions::retry::priority::previous_priorities::v3::PreviousPrioritiesConfig;
    if !from.name.ends_with("previous_priorities") {
        return Err(Refusal::new(
            "name",
            format!("the priority {:?} is not supported", from.name),
        ));
    }
    let Some(route::retry_policy::retry_priority::ConfigType::TypedConfig(any)) = &from.config_type else {
        return Err(Refusal::new("typed_config", "is missing"));
    };
    let config: PreviousPrioritiesConfig = convert::unpack(
        any,
        "envoy.extensions.retry.priority.previous_priorities.v3.PreviousPrioritiesConfig",
    )?;
    u32::try_from(config.update_frequency)
        .ok()
        .filter(|every| *every > 0)
        .ok_or_else(|| Refusal::new("typed_config.update_frequency", "is not above zero"))
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
    /// Which hosts are avoided beside those.
    pub hosts: Option<HostRules>,
    /// After that many tries the priorities tried are avoided (`previous_priorities`).
    pub priorities_every: Option<u32>,
    /// How often a host is picked anew when a predicate rejects it.
    pub host_selection_attempts: u32,
    status_codes: Box<[u16]>,
    response_headers: Box<[HeaderMatch]>,
    request_headers: Box<[HeaderMatch]>,
    base_interval: Duration,
    max_interval: Duration,
    rate_limited: Option<RateLimitedBackOff>,
}

/// Which hosts a retry avoids, whether they were tried or not.
#[derive(Clone, Debug, Default)]
pub struct HostRules {
    canaries: bool,
    metadata: Vec<Criteria>,
}

impl HostRules {
    /// Whether a retry avoids the endpoint.
    pub fn rejects(&self, endpoint: &Endpoint) -> bool {
        (self.canaries && endpoint.is_canary())
            || self
                .metadata
                .iter()
                .any(|criteria| criteria.fits(endpoint.lb_metadata(), false))
    }
}

/// Waits that the upstream asks for (`rate_limited_retry_back_off`).
#[derive(Clone, Debug)]
struct RateLimitedBackOff {
    headers: Box<[(HeaderName, ResetFormat)]>,
    max_interval: Duration,
}

/// How a field says when to come back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ResetFormat {
    Seconds,
    UnixTimestamp,
}

impl RateLimitedBackOff {
    fn compile(from: &route::retry_policy::RateLimitedRetryBackOff) -> Result<Self, Refusal> {
        let headers = from
            .reset_headers
            .iter()
            .enumerate()
            .map(|(index, header)| {
                let name = HeaderName::from_bytes(header.name.as_bytes()).map_err(|_| {
                    Refusal::new(
                        format!("reset_headers[{index}].name"),
                        format!("{:?} is not a header name", header.name),
                    )
                })?;
                Ok((
                    name,
                    match header.format {
                        0 => ResetFormat::Seconds,
                        1 => ResetFormat::UnixTimestamp,
                        other => {
                            return Err(Refusal::new(
                                format!("reset_headers[{index}].format"),
                                format!("{other} is unknown"),
                            ));
                        }
                    },
                ))
            })
            .collect::<Result<Box<[_]>, _>>()?;
        if headers.is_empty() {
            return Err(Refusal::new("reset_headers", "is empty"));
        }
        Ok(Self {
            headers,
            max_interval: convert::timeout(from.max_interval.as_ref())
                .within("max_interval")?
                .unwrap_or(MAX_ASKED_INTERVAL),
        })
    }

    /// The first wait that the response asks for and that is not too long, and up to half as much more by chance.
    fn wait(&self, headers: &HeaderMap, unix_seconds: u64, random: u64) -> Option<Duration> {
        let wait = self.headers.iter().find_map(|(name, format)| {
            let number: u64 = headers.get(name)?.to_str().ok()?.trim().parse().ok()?;
            let seconds = match format {
                ResetFormat::Seconds => number,
                ResetFormat::UnixTimestamp => number.checked_sub(unix_seconds)?,
            };
            let wait = Duration::from_secs(seconds);
            (wait <= self.max_interval).then_some(wait)
        })?;
        let more = (u128::from(random) * (wait / 2).as_nanos()) >> 64;
        Some(wait + Duration::from_nanos(more as u64))
    }
}

impl RetryPolicy {
    /// Compiles the message; `None` when it names no condition.
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
        // A policy of no retries says when a last try was one too few (`URX`).
        if on == RetryOn::default() {
            return Ok(None);
        }
        let rate_limited = from
            .rate_limited_retry_back_off
            .as_ref()
            .map(RateLimitedBackOff::compile)
            .transpose()
            .within("rate_limited_retry_back_off")?;
        let mut previous_hosts = false;
        let mut hosts: Option<HostRules> = None;
        for (index, predicate) in from.retry_host_predicate.iter().enumerate() {
            let path = || format!("retry_host_predicate[{index}]");
            match predicate.name.rsplit('.').next().unwrap_or_default() {
                "previous_hosts" => previous_hosts = true,
                "omit_canary_hosts" => hosts.get_or_insert_default().canaries = true,
                "omit_host_metadata" => {
                    let criteria = omitted_metadata(predicate).within(path())?;
                    hosts.get_or_insert_default().metadata.extend(criteria);
                }
                _ => {
                    return Err(Refusal::new(
                        path(),
                        format!("the predicate {:?} is not supported", predicate.name),
                    ));
                }
            }
        }
        let priorities_every = from
            .retry_priority
            .as_ref()
            .map(previous_priorities)
            .transpose()
            .within("retry_priority")?;
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
        let headers = |list: &[route::HeaderMatcher], field: &str| each(list, field, HeaderMatch::compile);
        Ok(Some(Self {
            on,
            attempts,
            per_try_timeout: convert::timeout(from.per_try_timeout.as_ref()).within("per_try_timeout")?,
            previous_hosts,
            hosts,
            priorities_every,
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
            rate_limited,
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
            || (on.has(RetryOn::RATE_LIMITED) && headers.contains_key(&X_RATE_LIMITED))
        {
            return true;
        }
        if on.has(RetryOn::HEADERS) {
            let view = RequestView {
                method: "",
                path: "",
                query: None,
                authority: Some(""),
                scheme: Some(""),
                headers,
            };
            if self.response_headers.iter().any(|matcher| matcher.matches(&view)) {
                return true;
            }
        }
        // gRPC says how it went in the head only when there is no body; trailers come too late for a retry.
        if !on.has(GRPC_CONDITIONS) {
            return false;
        }
        match headers.get(&GRPC_STATUS).map(http::HeaderValue::as_bytes) {
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
        self.on.has(
            RetryOn::SERVER_ERROR
                | RetryOn::GATEWAY_ERROR
                | RetryOn::RETRIABLE_4XX
                | RetryOn::RATE_LIMITED
                | RetryOn::HEADERS
                | RetryOn::RESET,
        ) || (self.on.has(RetryOn::STATUS_CODES) && !self.status_codes.is_empty())
            || (is_grpc && self.on.has(GRPC_CONDITIONS))
    }

    /// The wait that a response asks for, at that time since the epoch; `None` to wait as always.
    pub fn asked_wait(&self, outcome: &Outcome<'_>, unix_seconds: u64, random: u64) -> Option<Duration> {
        match (&self.rate_limited, outcome) {
            (Some(rules), Outcome::Response(_, headers)) => rules.wait(headers, unix_seconds, random),
            _ => None,
        }
    }

    /// Whether responses can ask for a wait at all.
    pub fn heeds_asked_waits(&self) -> bool {
        self.rate_limited.is_some()
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
    fn no_condition_is_no_policy_but_no_retries_are_one() {
        let zero = route::RetryPolicy {
            retry_on: "5xx".into(),
            num_retries: Some(serin_xds::pb::google::protobuf::UInt32Value { value: 0 }),
            ..Default::default()
        };
        assert_eq!(RetryPolicy::compile(&zero).unwrap().unwrap().attempts, 0);
        assert!(
            RetryPolicy::compile(&route::RetryPolicy::default())
                .unwrap()
                .is_none()
        );
    }

    #[test]
    fn a_response_may_ask_for_a_longer_wait_up_to_a_limit() {
        use route::retry_policy::{RateLimitedRetryBackOff, ResetHeader};
        let policy = RetryPolicy::compile(&route::RetryPolicy {
            retry_on: "envoy-ratelimited".into(),
            rate_limited_retry_back_off: Some(RateLimitedRetryBackOff {
                reset_headers: vec![
                    ResetHeader {
                        name: "retry-after".into(),
                        format: 0,
                    },
                    ResetHeader {
                        name: "x-reset".into(),
                        format: 1,
                    },
                ],
                max_interval: Some(serin_xds::pb::google::protobuf::Duration {
                    seconds: 60,
                    nanos: 0,
                }),
            }),
            ..Default::default()
        })
        .unwrap()
        .unwrap();
        let ask = |name: &'static str, value: &'static str, random| {
            let mut headers = HeaderMap::new();
            headers.insert(name, http::HeaderValue::from_static(value));
            let outcome = Outcome::Response(StatusCode::TOO_MANY_REQUESTS, &headers);
            policy.asked_wait(&outcome, 1_000, random)
        };
        assert_eq!(ask("retry-after", "10", 0), Some(Duration::from_secs(10)));
        let most = ask("retry-after", "10", u64::MAX).unwrap();
        assert!((14_999..15_000).contains(&most.as_millis()), "{most:?}");
        assert_eq!(ask("x-reset", "1030", 0), Some(Duration::from_secs(30)));
        for (name, value) in [
            ("retry-after", "61"),
            ("retry-after", "soon"),
            ("x-reset", "900"),
            ("x-other", "5"),
        ] {
            assert_eq!(ask(name, value, 0), None, "{name}: {value}");
        }
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
