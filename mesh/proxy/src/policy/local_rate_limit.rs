//! The local rate limit: token buckets of this proxy, shared by its workers, or one per connection; and, where the
//! configuration says so, its part of a limit that all members of its cluster have together.

use std::sync::Arc;

use http::StatusCode;
use parking_lot::Mutex;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::extensions::common::ratelimit::v3 as common;
use serin_xds::pb::envoy::extensions::filters::http::local_ratelimit::v3 as local;

use super::bucket::{Bucket, Fill, Taken};
use super::descriptors::{self, Descriptor, RateLimitEntry};
use super::stats::{Counter, Registry};
use crate::config::convert::Fraction;
use crate::config::headers::HeaderOps;
use crate::config::runtime::{Runtime, RuntimeFraction};
use crate::config::slot::Home;
use crate::error::{Refusal, Within};

/// Envoy's number of buckets for values of wildcard descriptors.
const DEFAULT_DYNAMIC: u32 = 20;
/// Ours, at most.
const MAX_DYNAMIC: u32 = 100_000;

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

/// `vh_rate_limits`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VirtualHostLimits {
    /// Used where the route has none.
    Override,
    /// Used as well.
    Include,
    /// Not used.
    Ignore,
}

impl VirtualHostLimits {
    pub(crate) fn compile(from: i32) -> Result<Self, Refusal> {
        match from {
            0 => Ok(Self::Override),
            1 => Ok(Self::Include),
            2 => Ok(Self::Ignore),
            other => Err(Refusal::new("vh_rate_limits", format!("{other} is unknown"))),
        }
    }
}

#[derive(Debug)]
struct Counters {
    enabled: Arc<Counter>,
    ok: Arc<Counter>,
    limited: Arc<Counter>,
    enforced: Arc<Counter>,
}

/// What buckets are made of.
#[derive(Clone, Debug)]
struct Blueprint {
    default: Fill,
    descriptors: Arc<[Pattern]>,
    always_default: bool,
    dynamic: usize,
}

/// A descriptor with a bucket; an empty value stands for any, each with a bucket of its own.
#[derive(Debug)]
struct Pattern {
    entries: Box<[(Box<str>, Box<str>)]>,
    fill: Fill,
    shadow: bool,
    wildcard: bool,
}

impl Pattern {
    fn matches(&self, descriptor: &Descriptor) -> bool {
        self.entries.len() == descriptor.entries.len()
            && self
                .entries
                .iter()
                .zip(&descriptor.entries)
                .all(|((key, value), (other_key, other_value))| {
                    key == other_key && (value.is_empty() || value == other_value)
                })
    }
}

type Values = Box<[Box<str>]>;

/// Buckets of all connections, or of one.
#[derive(Debug)]
pub struct Buckets {
    default: Bucket,
    fixed: Box<[Option<Bucket>]>,
    /// For wildcards: pattern and values, with the time of the last use for eviction.
    dynamic:
        Mutex<std::collections::HashMap<(usize, Values), (u64, Arc<Bucket>), foldhash::fast::RandomState>>,
}

impl Buckets {
    fn new(blueprint: &Blueprint, now_ms: u64) -> Self {
        Self {
            default: Bucket::new(blueprint.default, now_ms),
            fixed: blueprint
                .descriptors
                .iter()
                .map(|pattern| (!pattern.wildcard).then(|| Bucket::new(pattern.fill, now_ms)))
                .collect(),
            dynamic: Mutex::default(),
        }
    }

    fn dynamic(
        &self,
        index: usize,
        fill: Fill,
        descriptor: &Descriptor,
        limit: usize,
        now_ms: u64,
    ) -> Arc<Bucket> {
        let key = (
            index,
            descriptor
                .entries
                .iter()
                .map(|(_, value)| value.clone())
                .collect::<Values>(),
        );
        let mut buckets = self.dynamic.lock();
        if let Some((used, bucket)) = buckets.get_mut(&key) {
            *used = now_ms;
            return bucket.clone();
        }
        if buckets.len() >= limit {
            let oldest = buckets
                .iter()
                .min_by_key(|(_, (used, _))| *used)
                .map(|(key, _)| key.clone());
            if let Some(oldest) = oldest {
                buckets.remove(&oldest);
            }
        }
        let bucket = Arc::new(Bucket::new(fill, now_ms));
        buckets.insert(key, (now_ms, bucket.clone()));
        bucket
    }
}

/// What the limit says about a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
        let members = match (&from.local_cluster_rate_limit, home) {
            (None, _) => None,
            (Some(_), _) if from.local_rate_limit_per_downstream_connection => {
                return Err(Refusal::new(
                    "local_cluster_rate_limit",
                    "cannot be combined with local_rate_limit_per_downstream_connection",
                ));
            }
            (Some(_), None) => {
                return Err(Refusal::new(
                    "local_cluster_rate_limit",
                    "needs cluster_manager.local_cluster_name in the bootstrap",
                ));
            }
            (Some(_), Some(home)) => Some(home.clone()),
        };
        let mut out = Self::compile_own(from, workers, registry, runtime, now_ms)?;
        out.members = members;
        Ok(out)
    }

    fn compile_own(
        from: &local::LocalRateLimit,
        workers: usize,
        registry: &mut Registry,
        runtime: &mut Runtime,
        now_ms: u64,
    ) -> Result<Self, Refusal> {
        let none = Fraction::NONE;
        let Some(bucket) = &from.token_bucket else {
            // A filter without a bucket does nothing until a route gives it one.
            if from.descriptors.is_empty() {
                return Self::build(
                    from,
                    Fraction::NONE.into(),
                    Fraction::NONE.into(),
                    None,
                    workers,
                    registry,
                    now_ms,
                );
            }
            return Err(Refusal::new(
                "token_bucket",
                "is missing although there are descriptors",
            ));
        };
        let fill = Fill::compile(bucket).within("token_bucket")?;
        let enabled = runtime
            .fraction(from.filter_enabled.as_ref(), none)
            .within("filter_enabled")?;
        let enforced = runtime
            .fraction(from.filter_enforced.as_ref(), none)
            .within("filter_enforced")?;
        Self::build(from, enabled, enforced, Some(fill), workers, registry, now_ms)
    }

    fn build(
        from: &local::LocalRateLimit,
        enabled: RuntimeFraction,
        enforced: RuntimeFraction,
        fill: Option<Fill>,
        workers: usize,
        registry: &mut Registry,
        now_ms: u64,
    ) -> Result<Self, Refusal> {
        let default = fill.unwrap_or(Fill {
            max: u32::MAX,
            per_step: 1,
            step_ms: 1000,
        });
        let descriptors: Arc<[Pattern]> = from
            .descriptors
            .iter()
            .enumerate()
            .map(|(index, descriptor)| compile_pattern(descriptor).within(format!("descriptors[{index}]")))
            .collect::<Result<_, _>>()?;
        let dynamic = from
            .max_dynamic_descriptors
            .as_ref()
            .map_or(DEFAULT_DYNAMIC, |value| value.value);
        let blueprint = Blueprint {
            default,
            descriptors,
            always_default: from
                .always_consume_default_token_bucket
                .as_ref()
                .is_none_or(|value| value.value),
            dynamic: dynamic.clamp(1, MAX_DYNAMIC) as usize,
        };
        let labels = [("envoy_local_http_ratelimit_prefix", &*from.stat_prefix)];
        let mut counter = |name| registry.counter(workers, name, &labels);
        Ok(Self {
            status: denial_status(from.status.as_ref(), StatusCode::TOO_MANY_REQUESTS)?,
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
            members: None,
            counters: Counters {
                enabled: counter("envoy_http_local_rate_limit_enabled"),
                ok: counter("envoy_http_local_rate_limit_ok"),
                limited: counter("envoy_http_local_rate_limit_rate_limited"),
                enforced: counter("envoy_http_local_rate_limit_enforced"),
            },
        })
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
        let mut decisive: Option<(bool, Taken, Fill, Option<bool>)> = None;
        let mut weigh = |taken: Taken, fill: Fill, shadow: bool, headers: Option<bool>| {
            let limited = !taken.granted && !shadow;
            // The bucket that denies decides, else the one with the least left.
            let closer = decisive.is_none_or(|(was_limited, was, ..)| {
                (limited, std::cmp::Reverse(taken.remaining))
                    > (was_limited, std::cmp::Reverse(was.remaining))
            });
            if closer {
                decisive = Some((limited, taken, fill, headers));
            }
            limited
        };
        let mut matched = false;
        let mut limited = false;
        for descriptor in descriptors {
            let found = self
                .blueprint
                .descriptors
                .iter()
                .enumerate()
                .find(|(_, pattern)| pattern.matches(descriptor));
            let Some((index, pattern)) = found else { continue };
            matched = true;
            let hits = descriptor
                .hits
                .map_or(1, |hits| u32::try_from(hits).unwrap_or(u32::MAX))
                .saturating_mul(share);
            let taken = match &buckets.fixed[index] {
                Some(bucket) => bucket.take(hits, now_ms),
                None => buckets
                    .dynamic(index, pattern.fill, descriptor, self.blueprint.dynamic, now_ms)
                    .take(hits, now_ms),
            };
            limited |= weigh(taken, pattern.fill, pattern.shadow, descriptor.headers);
            if limited {
                break;
            }
        }
        if !limited && (!matched || self.blueprint.always_default) {
            limited = weigh(
                buckets.default.take(share, now_ms),
                self.blueprint.default,
                false,
                None,
            );
        }
        if limited {
            self.counters.limited.add(worker);
        } else {
            self.counters.ok.add(worker);
        }
        let (limit, remaining, next, headers) = decisive
            .map_or((0, 0, 0, None), |(_, taken, fill, headers)| {
                (fill.max, taken.remaining, taken.next_step_ms, headers)
            });
        Verdict {
            limited,
            limit,
            remaining,
            reset_s: next.div_ceil(1000),
            headers,
        }
    }

    /// Counts a verdict that was enforced.
    pub fn count_enforced(&self, worker: usize) {
        self.counters.enforced.add(worker);
    }
}

/// Envoy's rule: statuses below 400 are ignored.
pub(crate) fn denial_status(
    from: Option<&serin_xds::pb::envoy::r#type::v3::HttpStatus>,
    default: StatusCode,
) -> Result<StatusCode, Refusal> {
    match from {
        None => Ok(default),
        Some(status) if status.code < 400 => Ok(default),
        Some(status) => u16::try_from(status.code)
            .ok()
            .and_then(|code| StatusCode::from_u16(code).ok())
            .ok_or_else(|| Refusal::new("status", format!("{} is no HTTP status", status.code))),
    }
}

fn compile_pattern(from: &common::LocalRateLimitDescriptor) -> Result<Pattern, Refusal> {
    if from.entries.is_empty() {
        return Err(Refusal::new("entries", "is empty"));
    }
    let bucket = from
        .token_bucket
        .as_ref()
        .ok_or_else(|| Refusal::new("token_bucket", "is missing"))?;
    let entries: Box<[(Box<str>, Box<str>)]> = from
        .entries
        .iter()
        .map(|entry| (entry.key.as_str().into(), entry.value.as_str().into()))
        .collect();
    Ok(Pattern {
        wildcard: entries.iter().any(|(_, value)| value.is_empty()),
        entries,
        fill: Fill::compile(bucket).within("token_bucket")?,
        shadow: from.shadow_mode,
    })
}

/// The network filter: connections instead of requests.
#[derive(Debug)]
pub struct ConnectionLimit {
    enabled: bool,
    bucket: Arc<Bucket>,
    limited: Arc<Counter>,
}

impl ConnectionLimit {
    /// Compiles the message.
    pub(crate) fn compile(
        from: &serin_xds::pb::envoy::extensions::filters::network::local_ratelimit::v3::LocalRateLimit,
        workers: usize,
        registry: &mut Registry,
        now_ms: u64,
    ) -> Result<Self, Refusal> {
        let enabled = from
            .runtime_enabled
            .as_ref()
            .and_then(|flag| flag.default_value.as_ref());
        if enabled.is_some_and(|value| !value.value) {
            return Err(Refusal::new(
                "runtime_enabled",
                "a filter that is off is left out: there is no runtime layer to switch it on",
            ));
        }
        let bucket = from
            .token_bucket
            .as_ref()
            .ok_or_else(|| Refusal::new("token_bucket", "is missing"))?;
        let flag =
            |flag: &core::RuntimeFeatureFlag| flag.default_value.as_ref().is_none_or(|value| value.value);
        Ok(Self {
            enabled: from.runtime_enabled.as_ref().is_none_or(flag),
            bucket: {
                let fill = Fill::compile(bucket).within("token_bucket")?;
                registry.bucket(&from.share_key, fill, now_ms)
            },
            limited: registry.counter(
                workers,
                "envoy_local_rate_limit_rate_limited",
                &[("envoy_local_ratelimit_prefix", &from.stat_prefix)],
            ),
        })
    }

    /// Whether a new connection is within the limit.
    pub fn admits(&self, now_ms: u64, worker: usize) -> bool {
        let admitted = !self.enabled || self.bucket.take(1, now_ms).granted;
        if !admitted {
            self.limited.add(worker);
        }
        admitted
    }
}

#[cfg(test)]
mod tests {
    use serin_xds::pb::envoy::r#type::v3::{FractionalPercent, TokenBucket};
    use serin_xds::pb::google::protobuf::{BoolValue, Duration, UInt32Value};

    use super::*;

    fn bucket(max: u32) -> Option<TokenBucket> {
        Some(TokenBucket {
            max_tokens: max,
            tokens_per_fill: Some(UInt32Value { value: max }),
            fill_interval: Some(Duration {
                seconds: 60,
                nanos: 0,
            }),
        })
    }

    fn all() -> Option<core::RuntimeFractionalPercent> {
        Some(core::RuntimeFractionalPercent {
            default_value: Some(FractionalPercent {
                numerator: 100,
                denominator: 0,
            }),
            ..Default::default()
        })
    }

    fn descriptor(key: &str, value: &str, max: u32) -> common::LocalRateLimitDescriptor {
        common::LocalRateLimitDescriptor {
            entries: vec![common::rate_limit_descriptor::Entry {
                key: key.into(),
                value: value.into(),
            }],
            token_bucket: bucket(max),
            shadow_mode: false,
        }
    }

    fn compile(message: local::LocalRateLimit) -> LocalRateLimit {
        LocalRateLimit::compile(
            &message,
            1,
            &mut Registry::default(),
            &mut Runtime::default(),
            None,
            0,
        )
        .unwrap()
    }

    fn asked(key: &str, value: &str) -> Vec<Descriptor> {
        vec![Descriptor {
            entries: vec![(key.into(), value.into())],
            ..Default::default()
        }]
    }

    fn message() -> local::LocalRateLimit {
        local::LocalRateLimit {
            stat_prefix: "l".into(),
            token_bucket: bucket(3),
            filter_enabled: all(),
            filter_enforced: all(),
            ..Default::default()
        }
    }

    #[test]
    fn a_descriptor_has_its_own_bucket_and_the_default_one_is_used_as_well_unless_told_otherwise() {
        let mut from = message();
        from.descriptors = vec![descriptor("user", "bob", 1)];
        let limit = compile(from.clone());
        let take = |limit: &LocalRateLimit, who: &str| !limit.judge(&asked("user", who), None, 0, 0).limited;
        assert!(take(&limit, "bob"));
        assert!(!take(&limit, "bob"), "bob's bucket is empty");
        assert!(take(&limit, "eve") && take(&limit, "eve"));
        assert!(
            !take(&limit, "eve"),
            "bob took one of the three of the default bucket"
        );
        from.always_consume_default_token_bucket = Some(BoolValue { value: false });
        let limit = compile(from);
        assert!(take(&limit, "bob") && take(&limit, "eve") && take(&limit, "eve") && take(&limit, "eve"));
        assert!(!take(&limit, "eve"));
    }

    #[test]
    fn a_descriptor_without_a_value_gives_each_value_a_bucket_and_forgets_the_oldest() {
        let mut from = message();
        from.token_bucket = bucket(1000);
        from.descriptors = vec![descriptor("user", "", 1)];
        from.max_dynamic_descriptors = Some(UInt32Value { value: 2 });
        let limit = compile(from);
        let take = |who: &str, now| !limit.judge(&asked("user", who), None, now, 0).limited;
        assert!(take("a", 1) && !take("a", 2) && take("b", 3));
        assert!(take("c", 4), "a is forgotten");
        assert!(take("a", 5), "and starts anew");
    }

    #[test]
    fn what_remains_is_that_of_the_decisive_bucket() {
        let limit = compile(message());
        let verdict = limit.judge(&[], None, 1500, 0);
        assert_eq!((verdict.limit, verdict.remaining, verdict.reset_s), (3, 2, 59));
    }
}
