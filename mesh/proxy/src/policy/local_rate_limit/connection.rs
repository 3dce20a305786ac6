//! The network filter: a token bucket for connections.

use std::sync::Arc;

use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::extensions::filters::network::local_ratelimit::v3 as local;

use crate::config::convert::required;
use crate::error::{Refusal, Within};
use crate::policy::bucket::{Bucket, Fill};
use crate::policy::stats::{Counter, Registry};

/// A compiled `LocalRateLimit` of the network.
#[derive(Debug)]
pub struct ConnectionRateLimit {
    enabled: bool,
    bucket: Arc<Bucket>,
    limited: Arc<Counter>,
}

impl ConnectionRateLimit {
    /// Compiles the message.
    pub(crate) fn compile(
        from: &local::LocalRateLimit,
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
        let bucket = required(from.token_bucket.as_ref(), "token_bucket")?;
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
