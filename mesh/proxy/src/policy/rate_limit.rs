//! The global rate limit: a service (`RateLimitService`) decides by the descriptors of a request.

use std::sync::Arc;
use std::time::Duration;

use http::{HeaderName, HeaderValue, StatusCode};
use serin_xds::pb::envoy::extensions::common::ratelimit::v3 as common;
use serin_xds::pb::envoy::extensions::filters::http::ratelimit::v3 as filter;
use serin_xds::pb::envoy::service::ratelimit::v3 as service;
use serin_xds::pb::google::protobuf::UInt64Value;

use super::descriptors::{self, Descriptor, RateLimitEntry, VirtualHostLimits};
use super::service::{GrpcTarget, header_pair};
use super::stats::{Counter, Registry};
use crate::config::convert::{self, Fraction};
use crate::config::headers::HeaderOps;
use crate::config::route::Context;
use crate::config::runtime::RuntimeFraction;
use crate::error::{Refusal, Within};

/// The method that is called.
pub const PATH: &str = "/envoy.service.ratelimit.v3.RateLimitService/ShouldRateLimit";
/// Envoy's limit of a call.
const DEFAULT_TIMEOUT: Duration = Duration::from_millis(20);

/// A compiled `RateLimit` filter.
#[derive(Debug)]
pub struct RateLimit {
    /// Whom to ask.
    pub service: GrpcTarget,
    /// Limit of a call.
    pub timeout: Duration,
    domain: Box<str>,
    /// Which `rate_limits` apply.
    pub stage: u32,
    /// Own entries instead of the route's.
    pub own: Box<[RateLimitEntry]>,
    /// Share of requests for which the service is asked.
    pub enabled: RuntimeFraction,
    /// Share of verdicts that count.
    pub enforced: RuntimeFraction,
    /// Share of failures of the service that deny.
    pub failure_denies: RuntimeFraction,
    /// Status of denials.
    pub status: StatusCode,
    /// Status when the service fails and that denies.
    pub status_on_error: StatusCode,
    /// For denials.
    pub response_headers: HeaderOps,
    /// Whether `x-ratelimit-*` is put on responses.
    pub headers: bool,
    /// Whether `retry-after` is put on denials.
    pub retry_after: bool,
    /// Whether denials are marked `x-envoy-ratelimited`.
    pub mark: bool,
    /// gRPC status of denials is RESOURCE_EXHAUSTED.
    pub resource_exhausted: bool,
    /// Namespace of what the service tells.
    pub metadata_namespace: Box<str>,
    scope: Scope,
    counters: Counters,
}

/// `request_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scope {
    Internal,
    External,
    Both,
}

#[derive(Debug)]
struct Counters {
    ok: Arc<Counter>,
    over: Arc<Counter>,
    error: Arc<Counter>,
    allowed: Arc<Counter>,
}

/// What a route says (`RateLimitPerRoute`).
#[derive(Debug)]
pub struct PerRouteLimit {
    /// What becomes of the virtual host's `rate_limits`.
    pub virtual_host: VirtualHostLimits,
    /// Own entries.
    pub own: Box<[RateLimitEntry]>,
    /// Own domain.
    pub domain: Option<Box<str>>,
}

impl PerRouteLimit {
    /// Compiles the message.
    pub(crate) fn compile(from: &filter::RateLimitPerRoute) -> Result<Self, Refusal> {
        if from.override_option != 0 {
            return Err(Refusal::new("override_option", "not supported"));
        }
        Ok(Self {
            virtual_host: VirtualHostLimits::compile(from.vh_rate_limits)?,
            own: descriptors::compile_all(&from.rate_limits)?,
            domain: (!from.domain.is_empty()).then(|| from.domain.as_str().into()),
        })
    }
}

/// What the service said.
#[derive(Debug, Default)]
pub struct Said {
    /// Whether the request is over a limit.
    pub over: bool,
    /// `x-ratelimit-*`: limit as text, remaining, seconds until reset.
    pub limit: Option<(String, u32, i64)>,
    /// Seconds until there is room again, where the request is over a limit.
    pub retry_after: Option<i64>,
    /// Fields for the response.
    pub response_headers: Vec<(HeaderName, HeaderValue)>,
    /// Fields for the request.
    pub request_headers: Vec<(HeaderName, HeaderValue)>,
    /// Body of a denial.
    pub body: Vec<u8>,
    /// What later filters may know.
    pub metadata: Option<serin_xds::pb::google::protobuf::Struct>,
}

impl RateLimit {
    /// Compiles the message.
    pub(crate) fn compile(
        from: &filter::RateLimit,
        prefix: &str,
        context: &mut Context<'_>,
    ) -> Result<Self, Refusal> {
        if from.domain.is_empty() {
            return Err(Refusal::new("domain", "is missing"));
        }
        let scope = match from.request_type.as_str() {
            "" | "both" => Scope::Both,
            "internal" => Scope::Internal,
            "external" => Scope::External,
            other => return Err(Refusal::new("request_type", format!("{other:?} is unknown"))),
        };
        let service = GrpcTarget::compile(
            from.rate_limit_service
                .as_ref()
                .and_then(|service| service.grpc_service.as_ref()),
            context,
        )
        .within("rate_limit_service")?;
        let failure = if from.failure_mode_deny {
            Fraction::ALL
        } else {
            Fraction::NONE
        };
        let counters = {
            let (workers, registry): (usize, &mut Registry) = context.counters();
            let labels = [
                ("envoy_http_conn_manager_prefix", prefix),
                ("prefix", from.stat_prefix.as_str()),
            ];
            let mut counter = |name| registry.counter(workers, name, &labels);
            Counters {
                ok: counter("envoy_cluster_ratelimit_ok"),
                over: counter("envoy_cluster_ratelimit_over_limit"),
                error: counter("envoy_cluster_ratelimit_error"),
                allowed: counter("envoy_cluster_ratelimit_failure_mode_allowed"),
            }
        };
        Ok(Self {
            service,
            timeout: convert::timeout(from.timeout.as_ref())
                .within("timeout")?
                .unwrap_or(DEFAULT_TIMEOUT),
            domain: from.domain.as_str().into(),
            stage: from.stage,
            own: descriptors::compile_all(&from.rate_limits)?,
            enabled: context
                .slots
                .runtime
                .fraction(from.filter_enabled.as_ref(), Fraction::ALL)
                .within("filter_enabled")?,
            enforced: context
                .slots
                .runtime
                .fraction(from.filter_enforced.as_ref(), Fraction::ALL)
                .within("filter_enforced")?,
            failure_denies: context
                .slots
                .runtime
                .fraction(from.failure_mode_deny_percent.as_ref(), failure)
                .within("failure_mode_deny_percent")?,
            status: convert::denial_status(
                from.rate_limited_status.as_ref(),
                StatusCode::TOO_MANY_REQUESTS,
                "rate_limited_status",
            )?,
            status_on_error: convert::denial_status(
                from.status_on_error.as_ref(),
                StatusCode::INTERNAL_SERVER_ERROR,
                "status_on_error",
            )?,
            response_headers: HeaderOps::compile(&from.response_headers_to_add, &[], true)?,
            headers: from.enable_x_ratelimit_headers
                == filter::rate_limit::XRateLimitHeadersRfcVersion::DraftVersion03 as i32,
            retry_after: from.enable_retry_after_header,
            mark: !from.disable_x_envoy_ratelimited_header,
            resource_exhausted: from.rate_limited_as_resource_exhausted,
            metadata_namespace: if from.metadata_namespace.is_empty() {
                "envoy.filters.http.ratelimit".into()
            } else {
                from.metadata_namespace.as_str().into()
            },
            scope,
            counters,
        })
    }

    /// Whether requests of that origin are judged.
    pub fn concerns(&self, internal: bool) -> bool {
        match self.scope {
            Scope::Both => true,
            Scope::Internal => internal,
            Scope::External => !internal,
        }
    }

    /// The question for the service.
    pub fn question(&self, descriptors: Vec<Descriptor>, domain: Option<&str>) -> service::RateLimitRequest {
        service::RateLimitRequest {
            domain: domain.unwrap_or(&self.domain).to_owned(),
            descriptors: descriptors
                .into_iter()
                .map(|descriptor| common::RateLimitDescriptor {
                    entries: descriptor
                        .entries
                        .into_iter()
                        .map(|(key, value)| common::rate_limit_descriptor::Entry {
                            key: key.into(),
                            value: value.into(),
                        })
                        .collect(),
                    limit: descriptor
                        .limit
                        .map(|limit| common::rate_limit_descriptor::RateLimitOverride {
                            requests_per_unit: limit.requests_per_unit,
                            unit: limit.unit,
                        }),
                    hits_addend: descriptor.hits.map(|value| UInt64Value { value }),
                    ..Default::default()
                })
                .collect(),
            hits_addend: 0,
        }
    }

    /// Reads the answer. `told` is what descriptors say about `x-ratelimit-*`.
    pub fn read(&self, from: service::RateLimitResponse, told: &[Option<bool>], worker: usize) -> Said {
        let over = from.overall_code == service::rate_limit_response::Code::OverLimit as i32;
        let counter = if over {
            &self.counters.over
        } else {
            &self.counters.ok
        };
        counter.add(worker);
        let fields = |list: &[serin_xds::pb::envoy::config::core::v3::HeaderValue]| {
            // A service's malformed field is left out, it is not a reason to fail the request.
            list.iter().filter_map(|field| header_pair(field).ok()).collect()
        };
        Said {
            over,
            // Descriptors may say themselves whether theirs is told.
            limit: limit_of(from.statuses.iter().enumerate().map(|(index, status)| {
                let own = told.get(index).copied().flatten();
                (status, own.unwrap_or(self.headers))
            })),
            retry_after: from
                .statuses
                .iter()
                .filter(|status| status.code == service::rate_limit_response::Code::OverLimit as i32)
                .map(|status| {
                    status
                        .duration_until_reset
                        .as_ref()
                        .map_or(0, |reset| reset.seconds)
                })
                .max()
                .map(|seconds| seconds.max(1)),
            response_headers: fields(&from.response_headers_to_add),
            request_headers: fields(&from.request_headers_to_add),
            body: from.raw_body,
            metadata: from.dynamic_metadata,
        }
    }

    /// Counts a failure of the service.
    pub fn count_error(&self, allowed: bool, worker: usize) {
        self.counters.error.add(worker);
        if allowed {
            self.counters.allowed.add(worker);
        }
    }
}

/// The status with the least left decides, also whether anything is told; all limits are listed (draft 03).
fn limit_of<'a>(
    statuses: impl Iterator<Item = (&'a service::rate_limit_response::DescriptorStatus, bool)> + Clone,
) -> Option<(String, u32, i64)> {
    use service::rate_limit_response::rate_limit::Unit;
    let with_limit = statuses.filter(|(status, _)| status.current_limit.is_some());
    let (least, told) = with_limit
        .clone()
        .min_by_key(|(status, _)| status.limit_remaining)?;
    if !told {
        return None;
    }
    let limited = || {
        with_limit
            .clone()
            .filter(|(_, told)| *told)
            .map(|(status, _)| status)
    };
    let window = |unit: i32| match Unit::try_from(unit) {
        Ok(Unit::Second) => 1,
        Ok(Unit::Minute) => 60,
        Ok(Unit::Hour) => 3600,
        Ok(Unit::Day) => 86_400,
        Ok(Unit::Week) => 604_800,
        Ok(Unit::Month) => 2_592_000,
        Ok(Unit::Year) => 31_536_000,
        Ok(Unit::Unknown) | Err(_) => 0,
    };
    let mut text = least.current_limit.as_ref()?.requests_per_unit.to_string();
    for limit in limited().filter_map(|status| status.current_limit.as_ref()) {
        let window = window(limit.unit);
        if window == 0 {
            continue;
        }
        text.push_str(&format!(", {};w={window}", limit.requests_per_unit));
        if !limit.name.is_empty() {
            text.push_str(&format!(";name=\"{}\"", limit.name));
        }
    }
    let reset = least
        .duration_until_reset
        .as_ref()
        .map_or(0, |reset| reset.seconds);
    Some((text, least.limit_remaining, reset))
}
