//! The local rate limit: token buckets of this proxy, shared by its workers, or one per connection; and, where the
//! configuration says so, its part of a limit that all members of its cluster have together.

mod buckets;
mod connection;

use std::cmp::Reverse;
use std::sync::Arc;

use http::StatusCode;
use serin_xds::pb::envoy::extensions::common::ratelimit::v3 as common;
use serin_xds::pb::envoy::extensions::filters::http::local_ratelimit::v3 as local;

pub use self::buckets::Buckets;
pub use self::connection::ConnectionRateLimit;

use self::buckets::Blueprint;
use super::bucket::{Fill, Taken};
use super::descriptors::{self, Descriptor, RateLimitEntry, VirtualHostLimits};
use super::stats::{Counter, Registry};
use crate::config::convert::{Fraction, denial_status};
use crate::config::headers::HeaderOps;
use crate::config::runtime::{Runtime, RuntimeFraction};
use crate::config::slot::Home;
use crate::error::{Refusal, Within};

/// The bucket of a filter that has none: nobody takes from it.
const UNUSED: Fill = Fill {
    max: u32::MAX,
    per_step: 1,
    step_ms: 1000,
};

/// A compiled `LocalRateLimit`.
#[derive(Debug)]
pub struct LocalRateLimit {
    /// Status of denials.
    pub status: StatusCode,
    /// Share of requests that are judged.
    pub enabled: RuntimeFraction,
    /// Share of these whose verdict counts.
    pub enforced: RuntimeFraction,
    /// For requests that pass although the limit is reached.
    pub request_headers: HeaderOps,
    /// For denials.
    pub response_headers: HeaderOps,
    /// Which `rate_limits` of routes apply.
    pub stage: u32,
    /// What becomes of the virtual host's `rate_limits`.
    pub virtual_host: VirtualHostLimits,
    /// Own entries instead of the route's.
    pub own: Box<[RateLimitEntry]>,
    /// Whether `x-ratelimit-*` is put on responses.
    pub headers: bool,
    /// Whether `retry-after` is put on denials.
    pub retry_after: bool,
    /// gRPC status of denials is RESOURCE_EXHAUSTED instead of UNAVAILABLE.
    pub resource_exhausted: bool,
    /// Each connection has buckets of its own.
    pub per_connection: bool,
    blueprint: Blueprint,
    shared: Buckets,
    counters: Counters,
    /// Whose members share the limit evenly.
    members: Option<Arc<Home>>,
}

#[derive(Debug)]
struct Counters {
    enabled: Arc<Counter>,
    ok: Arc<Counter>,
    limited: Arc<Counter>,
    enforced: Arc<Counter>,
}

/// What the limit says about a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Whether it is over the limit.
    pub limited: bool,
    /// Size of the decisive bucket.
    pub limit: u32,
    /// What it still holds.
    pub remaining: u32,
    /// Seconds until it is filled next.
    pub reset_s: u64,
    /// Whether that is told, where its descriptor says so itself.
    pub headers: Option<bool>,
}

impl Verdict {
    fn of(taken: Taken, fill: Fill) -> Self {
        Self {
            limited: !taken.granted,
            limit: fill.max,
            remaining: taken.remaining,
            reset_s: taken.next_step_ms.div_ceil(1000),
            headers: None,
        }
    }
}

impl LocalRateLimit {
    /// Compiles the message.
    pub(crate) fn compile(
        from: &local::LocalRateLimit,
        workers: usize,
        registry: &mut Registry,
        runtime: &mut Runtime,
        home: Option<&Arc<Home>>,
        now_ms: u64,
    ) -> Result<Self, Refusal> {
        if from.stat_prefix.is_empty() {
            return Err(Refusal::new("stat_prefix", "is missing"));
        }
        // A filter without a bucket does nothing until a route gives it one.
        let (default, enabled, enforced) = match &from.token_bucket {
            Some(bucket) => (
                Fill::compile(bucket).within("token_bucket")?,
                runtime
                    .fraction(from.filter_enabled.as_ref(), Fraction::NONE)
                    .within("filter_enabled")?,
                runtime
                    .fraction(from.filter_enforced.as_ref(), Fraction::NONE)
                    .within("filter_enforced")?,
            ),
            None if from.descriptors.is_empty() => (UNUSED, Fraction::NONE.into(), Fraction::NONE.into()),
            None => {
                return Err(Refusal::new(
                    "token_bucket",
                    "is missing although there are descriptors",
                ));
            }
        };
        let blueprint = Blueprint::compile(from, default)?;
        let labels = [("envoy_local_http_ratelimit_prefix", &*from.stat_prefix)];
        let mut counter = |name| registry.counter(workers, name, &labels);
        Ok(Self {
            status: denial_status(from.status.as_ref(), StatusCode::TOO_MANY_REQUESTS, "status")?,
            enabled,
            enforced,
            request_headers: HeaderOps::compile(&from.request_headers_to_add_when_not_enforced, &[], false)?,
            response_headers: HeaderOps::compile(&from.response_headers_to_add, &[], true)?,
            stage: from.stage,
            virtual_host: VirtualHostLimits::compile(from.vh_rate_limits)?,
            own: descriptors::compile_all(&from.rate_limits)?,
            headers: from.enable_x_ratelimit_headers
                == common::XRateLimitHeadersRfcVersion::DraftVersion03 as i32,
            retry_after: from.enable_retry_after_header,
            resource_exhausted: from.rate_limited_as_resource_exhausted,
            per_connection: from.local_rate_limit_per_downstream_connection,
            shared: Buckets::new(&blueprint, now_ms),
            blueprint,
            members: Self::members(from, home)?,
            counters: Counters {
                enabled: counter("envoy_http_local_rate_limit_enabled"),
                ok: counter("envoy_http_local_rate_limit_ok"),
                limited: counter("envoy_http_local_rate_limit_rate_limited"),
                enforced: counter("envoy_http_local_rate_limit_enforced"),
            },
        })
    }

    /// Whose members share the limit, where they do.
    fn members(from: &local::LocalRateLimit, home: Option<&Arc<Home>>) -> Result<Option<Arc<Home>>, Refusal> {
        let field = "local_cluster_rate_limit";
        if from.local_cluster_rate_limit.is_none() {
            return Ok(None);
        }
        if from.local_rate_limit_per_downstream_connection {
            return Err(Refusal::new(
                field,
                "cannot be combined with local_rate_limit_per_downstream_connection",
            ));
        }
        match home {
            Some(home) => Ok(Some(home.clone())),
            None => Err(Refusal::new(
                field,
                "needs cluster_manager.local_cluster_name in the bootstrap",
            )),
        }
    }

    /// Buckets for one connection.
    pub fn connection_buckets(&self, now_ms: u64) -> Buckets {
        Buckets::new(&self.blueprint, now_ms)
    }

    /// Whether descriptors decide anything.
    pub fn wants_descriptors(&self) -> bool {
        !self.blueprint.descriptors.is_empty()
    }

    /// Takes tokens for a request, out of `own` (the connection's) or the shared buckets.
    pub fn judge(
        &self,
        descriptors: &[Descriptor],
        own: Option<&Buckets>,
        now_ms: u64,
        worker: usize,
    ) -> Verdict {
        let buckets = own.unwrap_or(&self.shared);
        // Each of the members lets its part through: to it a request is as many.
        let share = self.members.as_ref().map_or(1, |home| home.members().max(1));
        self.counters.enabled.add(worker);
        let mut decisive: Option<Verdict> = None;
        let mut weigh = |verdict: Verdict| {
            // The bucket that denies decides, else the one with the least left.
            let rank = |verdict: &Verdict| (verdict.limited, Reverse(verdict.remaining));
            if decisive.is_none_or(|before| rank(&verdict) > rank(&before)) {
                decisive = Some(verdict);
            }
            verdict.limited
        };
        let mut matched = false;
        let mut limited = false;
        for descriptor in descriptors {
            let Some((index, pattern)) = self.blueprint.find(descriptor) else {
                continue;
            };
            matched = true;
            let hits = descriptor
                .hits
                .map_or(1, |hits| u32::try_from(hits).unwrap_or(u32::MAX))
                .saturating_mul(share);
            let taken = buckets.take(&self.blueprint, index, descriptor, hits, now_ms);
            limited = weigh(Verdict {
                limited: !taken.granted && !pattern.shadow,
                headers: descriptor.headers,
                ..Verdict::of(taken, pattern.fill)
            });
            if limited {
                break;
            }
        }
        if !limited && (!matched || self.blueprint.always_default) {
            let taken = buckets.take_default(share, now_ms);
            limited = weigh(Verdict::of(taken, self.blueprint.default));
        }
        if limited {
            self.counters.limited.add(worker);
        } else {
            self.counters.ok.add(worker);
        }
        decisive.unwrap_or_default()
    }

    /// Counts a verdict that was enforced.
    pub fn count_enforced(&self, worker: usize) {
        self.counters.enforced.add(worker);
    }
}

#[cfg(test)]
mod tests;
