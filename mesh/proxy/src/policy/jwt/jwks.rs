//! Where an issuer's keys come from: the configuration, or a URI from which they are fetched, kept and fetched again.
//!
//! One fetch at a time for all workers. Keys are believed for the cache duration; in its last fifth the next request
//! has them fetched again while it goes on with the old ones, so that a rotation delays nobody. A token with an unknown
//! key id has them fetched at once, though not more often than `ROTATION`.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::extensions::filters::http::jwt_authn::v3 as jwt;
use tokio::sync::Notify;

use super::keys::KeySet;
use crate::config::convert::{self, refuse_present};
use crate::config::route::Context;
use crate::config::slot::Chore;
use crate::error::{Refusal, Within};
use crate::policy::service::{HttpTarget, data};

/// Envoy's time for which fetched keys are believed.
const DEFAULT_CACHE: Duration = Duration::from_secs(600);
/// Fetches because of unknown key ids are this far apart, in milliseconds.
const ROTATION: u64 = 10_000;
/// Envoy's base of the time between tries.
const BACK_OFF: Duration = Duration::from_secs(1);
/// Tries of one fetch at most.
const MAX_RETRIES: u32 = 10;
/// Envoy's time after which keys that could not be fetched ahead are fetched again.
const REFETCH: Duration = Duration::from_secs(1);
/// Keys that are fetched ahead are fetched again so long before they are believed no more.
const EARLY: Duration = Duration::from_secs(5);
/// After a failed fetch the next one waits this long, in milliseconds.
const FAILED: u64 = 1_000;

/// The keys of a provider.
#[derive(Debug)]
pub enum Source {
    /// From the configuration.
    Local(Arc<KeySet>),
    /// From a URI.
    Remote(Arc<Remote>),
}

/// Keys behind a URI.
#[derive(Debug)]
pub struct Remote {
    /// Whence.
    pub target: HttpTarget,
    /// Whose they are.
    pub provider: Box<str>,
    /// How often a fetch is tried again.
    pub retries: Retries,
    /// They are fetched before any request needs them; after a failure again after this time.
    pub ahead: Option<Duration>,
    /// For how long they are believed, in milliseconds.
    cache_ms: u64,
    keys: ArcSwapOption<KeySet>,
    /// When they were fetched, process clock.
    fetched: AtomicU64,
    /// When the last fetch failed.
    failed: AtomicU64,
    fetching: AtomicBool,
    /// Fetches that have ended.
    ended: AtomicU64,
    done: Notify,
}

/// How often a fetch is tried again, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retries {
    /// Tries after the first one.
    pub count: u32,
    base: Duration,
    max: Duration,
}

impl Retries {
    fn compile(from: Option<&core::RetryPolicy>) -> Result<Self, Refusal> {
        let Some(from) = from else {
            return Ok(Self {
                count: 0,
                base: BACK_OFF,
                max: BACK_OFF,
            });
        };
        refuse_present(
            &[
                ("retry_priority", from.retry_priority.is_some()),
                ("retry_host_predicate", !from.retry_host_predicate.is_empty()),
                ("retry_on", !from.retry_on.is_empty()),
            ],
            "not supported",
        )?;
        let span = from.retry_back_off.as_ref();
        let base = convert::timeout(span.and_then(|span| span.base_interval.as_ref()))
            .within("retry_back_off.base_interval")?
            .unwrap_or(BACK_OFF);
        let max = convert::timeout(span.and_then(|span| span.max_interval.as_ref()))
            .within("retry_back_off.max_interval")?
            .unwrap_or(base * 10);
        if max < base {
            return Err(Refusal::new(
                "retry_back_off.max_interval",
                "is shorter than base_interval",
            ));
        }
        let count = from.num_retries.as_ref().map_or(1, |value| value.value);
        Ok(Self {
            count: count.min(MAX_RETRIES),
            base,
            max,
        })
    }

    /// The wait before that retry, the first being 0: somewhere in a span that doubles, as in Envoy.
    pub fn back_off(&self, retry: u32, random: u64) -> Duration {
        let span = self.base.saturating_mul(1 << retry.min(16)).min(self.max);
        let span = span.as_micros() as u64;
        Duration::from_micros(random % span.max(1))
    }
}

/// What a request does for want of keys.
#[derive(Debug)]
pub enum Need {
    /// Nothing; these are good.
    Nothing(Arc<KeySet>),
    /// Goes on with these and has new ones fetched meanwhile.
    Refresh(Arc<KeySet>),
    /// Waits for a fetch.
    Wait,
    /// Fails: the last fetch did, a moment ago.
    Failed,
}

impl Source {
    /// Compiles the source of a provider.
    pub(crate) fn compile(
        from: Option<&jwt::jwt_provider::JwksSourceSpecifier>,
        provider: &str,
        context: &mut Context<'_>,
    ) -> Result<Self, Refusal> {
        use jwt::jwt_provider::JwksSourceSpecifier;
        match from {
            None => Err(Refusal::new("jwks_source_specifier", "is missing")),
            Some(JwksSourceSpecifier::LocalJwks(source)) => {
                let document = data(Some(source)).within("local_jwks")?;
                let keys = KeySet::parse(&document).map_err(|error| Refusal::new("local_jwks", error))?;
                Ok(Self::Local(Arc::new(keys)))
            }
            Some(JwksSourceSpecifier::RemoteJwks(remote)) => {
                let target =
                    HttpTarget::compile(remote.http_uri.as_ref(), context).within("remote_jwks.http_uri")?;
                let cache = convert::timeout(remote.cache_duration.as_ref())
                    .within("remote_jwks.cache_duration")?
                    .unwrap_or(DEFAULT_CACHE);
                let remote = Arc::new(Remote {
                    target,
                    provider: provider.into(),
                    retries: Retries::compile(remote.retry_policy.as_ref())
                        .within("remote_jwks.retry_policy")?,
                    ahead: match &remote.async_fetch {
                        None => None,
                        Some(given) => Some(
                            convert::timeout(given.failed_refetch_duration.as_ref())
                                .within("remote_jwks.async_fetch.failed_refetch_duration")?
                                .unwrap_or(REFETCH),
                        ),
                    },
                    cache_ms: cache.as_millis() as u64,
                    keys: ArcSwapOption::empty(),
                    fetched: AtomicU64::new(0),
                    failed: AtomicU64::new(0),
                    fetching: AtomicBool::new(false),
                    ended: AtomicU64::new(0),
                    done: Notify::new(),
                });
                if remote.ahead.is_some() {
                    context.slots.chores.push(Chore::Keys(Arc::downgrade(&remote)));
                }
                Ok(Self::Remote(remote))
            }
        }
    }
}

impl Remote {
    /// What a request at `now_ms` needs whose token names that key.
    pub fn need(&self, key_id: Option<&str>, now_ms: u64) -> Need {
        let keys = self.keys.load_full();
        let age = now_ms.saturating_sub(self.fetched.load(Ordering::Acquire));
        match keys {
            Some(keys) if age < self.cache_ms => {
                if !keys.knows(key_id) && age >= ROTATION {
                    Need::Wait
                } else if age >= self.cache_ms - self.cache_ms / 5 {
                    Need::Refresh(keys)
                } else {
                    Need::Nothing(keys)
                }
            }
            _ => {
                let failed = self.failed.load(Ordering::Acquire);
                if failed > 0 && now_ms < failed + FAILED {
                    Need::Failed
                } else {
                    Need::Wait
                }
            }
        }
    }

    /// Becomes the one who fetches, if nobody is.
    pub fn begin(&self) -> bool {
        !self.fetching.swap(true, Ordering::AcqRel)
    }

    /// Ends a fetch with what came of it.
    pub fn end(&self, keys: Option<KeySet>, now_ms: u64) {
        match keys {
            Some(keys) => {
                self.keys.store(Some(Arc::new(keys)));
                self.fetched.store(now_ms, Ordering::Release);
                self.failed.store(0, Ordering::Release);
            }
            None => self.failed.store(now_ms, Ordering::Release),
        }
        self.fetching.store(false, Ordering::Release);
        self.ended.fetch_add(1, Ordering::AcqRel);
        self.done.notify_waiters();
    }

    /// When keys that are fetched ahead are fetched next, after a fetch that went well or not.
    pub fn next_fetch(&self, ahead: Duration, well: bool) -> Duration {
        if !well {
            return ahead;
        }
        let cache = Duration::from_millis(self.cache_ms);
        cache.saturating_sub(EARLY).max(cache / 2)
    }

    /// Waits until the fetch that is under way has ended.
    pub async fn wait(&self) {
        let before = self.ended.load(Ordering::Acquire);
        loop {
            let mut notified = std::pin::pin!(self.done.notified());
            notified.as_mut().enable();
            if self.ended.load(Ordering::Acquire) != before || !self.fetching.load(Ordering::Acquire) {
                return;
            }
            notified.await;
        }
    }

    /// The keys as they are, while they are believed.
    pub fn current(&self, now_ms: u64) -> Option<Arc<KeySet>> {
        let age = now_ms.saturating_sub(self.fetched.load(Ordering::Acquire));
        self.keys.load_full().filter(|_| age < self.cache_ms)
    }
}
