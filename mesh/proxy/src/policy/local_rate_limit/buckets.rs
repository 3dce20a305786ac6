//! The buckets of a local rate limit: the default one, those of descriptors, and those that wildcards get as they are used.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;
use serin_xds::pb::envoy::extensions::common::ratelimit::v3 as common;
use serin_xds::pb::envoy::extensions::filters::http::local_ratelimit::v3 as local;

use crate::config::convert::{each, required};
use crate::error::{Refusal, Within};
use crate::policy::bucket::{Bucket, Fill, Taken};
use crate::policy::descriptors::Descriptor;

/// Envoy's number of buckets for values of wildcard descriptors.
const DEFAULT_DYNAMIC: u32 = 20;
/// Ours, at most.
const MAX_DYNAMIC: u32 = 100_000;

/// What buckets are made of.
#[derive(Clone, Debug)]
pub(super) struct Blueprint {
    /// The bucket of requests without a descriptor's.
    pub(super) default: Fill,
    pub(super) descriptors: Arc<[Pattern]>,
    /// Requests with a descriptor's bucket take from the default one as well.
    pub(super) always_default: bool,
    /// Buckets that wildcards may have.
    pub(super) dynamic: usize,
}

/// A descriptor with a bucket; an empty value stands for any, each with a bucket of its own.
#[derive(Debug)]
pub(super) struct Pattern {
    entries: Box<[(Box<str>, Box<str>)]>,
    pub(super) fill: Fill,
    /// It is counted, and limits nobody.
    pub(super) shadow: bool,
    wildcard: bool,
}

impl Blueprint {
    pub(super) fn compile(from: &local::LocalRateLimit, default: Fill) -> Result<Self, Refusal> {
        let dynamic = from
            .max_dynamic_descriptors
            .as_ref()
            .map_or(DEFAULT_DYNAMIC, |value| value.value);
        Ok(Self {
            default,
            descriptors: each(&from.descriptors, "descriptors", Pattern::compile)?,
            always_default: from
                .always_consume_default_token_bucket
                .as_ref()
                .is_none_or(|value| value.value),
            dynamic: dynamic.clamp(1, MAX_DYNAMIC) as usize,
        })
    }

    /// The first pattern that matches, and its place.
    pub(super) fn find(&self, descriptor: &Descriptor) -> Option<(usize, &Pattern)> {
        self.descriptors
            .iter()
            .enumerate()
            .find(|(_, pattern)| pattern.matches(descriptor))
    }
}

impl Pattern {
    fn compile(from: &common::LocalRateLimitDescriptor) -> Result<Self, Refusal> {
        if from.entries.is_empty() {
            return Err(Refusal::new("entries", "is empty"));
        }
        let bucket = required(from.token_bucket.as_ref(), "token_bucket")?;
        let entries: Box<[(Box<str>, Box<str>)]> = from
            .entries
            .iter()
            .map(|entry| (entry.key.as_str().into(), entry.value.as_str().into()))
            .collect();
        Ok(Self {
            wildcard: entries.iter().any(|(_, value)| value.is_empty()),
            entries,
            fill: Fill::compile(bucket).within("token_bucket")?,
            shadow: from.shadow_mode,
        })
    }

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
    dynamic: Mutex<HashMap<(usize, Values), (u64, Arc<Bucket>), foldhash::fast::RandomState>>,
}

impl Buckets {
    pub(super) fn new(blueprint: &Blueprint, now_ms: u64) -> Self {
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

    /// Takes `hits` tokens for a request that no descriptor's bucket is for, or not alone.
    pub(super) fn take_default(&self, hits: u32, now_ms: u64) -> Taken {
        self.default.take(hits, now_ms)
    }

    /// Takes `hits` tokens out of the bucket of the pattern at `index`, or of the descriptor's own where that is a wildcard.
    pub(super) fn take(
        &self,
        blueprint: &Blueprint,
        index: usize,
        descriptor: &Descriptor,
        hits: u32,
        now_ms: u64,
    ) -> Taken {
        match &self.fixed[index] {
            Some(bucket) => bucket.take(hits, now_ms),
            None => self
                .dynamic(blueprint, index, descriptor, now_ms)
                .take(hits, now_ms),
        }
    }

    fn dynamic(
        &self,
        blueprint: &Blueprint,
        index: usize,
        descriptor: &Descriptor,
        now_ms: u64,
    ) -> Arc<Bucket> {
        let values = descriptor.entries.iter().map(|(_, value)| value.clone());
        let key = (index, values.collect::<Values>());
        let mut buckets = self.dynamic.lock();
        if let Some((used, bucket)) = buckets.get_mut(&key) {
            *used = now_ms;
            return bucket.clone();
        }
        if buckets.len() >= blueprint.dynamic {
            let oldest = buckets
                .iter()
                .min_by_key(|(_, (used, _))| *used)
                .map(|(key, _)| key.clone());
            if let Some(oldest) = oldest {
                buckets.remove(&oldest);
            }
        }
        let fill = blueprint.descriptors[index].fill;
        let bucket = Arc::new(Bucket::new(fill, now_ms));
        buckets.insert(key, (now_ms, bucket.clone()));
        bucket
    }
}
