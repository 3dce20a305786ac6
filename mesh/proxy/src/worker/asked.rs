//! What a request asks of the router about its own time, and what the endpoint is told of that.
//!
//! `x-envoy-upstream-rq-timeout-ms`, `x-envoy-upstream-rq-per-try-timeout-ms`, `x-envoy-upstream-stream-duration-ms`,
//! `x-envoy-hedge-on-per-try-timeout`, `x-envoy-upstream-rq-timeout-alt-response` and, where the router respects it,
//! `x-envoy-expected-rq-timeout-ms`, by Envoy's rules. They are believed of whoever may send them
//! ([`crate::config::origin`]); what is about retries is in [`RetryPolicy::asked`]. A request without such fields costs one
//! look at its names.

use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue};

use crate::config::retry::RetryPolicy;
use crate::config::retry::asked::number;
use crate::config::route::Forward;
use crate::config::router::RouterOptions;

static EXPECTED: HeaderName = HeaderName::from_static("x-envoy-expected-rq-timeout-ms");

const TIMEOUT: &str = "x-envoy-upstream-rq-timeout-ms";
const PER_TRY: &str = "x-envoy-upstream-rq-per-try-timeout-ms";
const STREAM: &str = "x-envoy-upstream-stream-duration-ms";
const HEDGE: &str = "x-envoy-hedge-on-per-try-timeout";
const ALTERNATIVE: &str = "x-envoy-upstream-rq-timeout-alt-response";
const STATISTICS: &str = "x-envoy-upstream-alt-stat-name";

/// The times of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Times {
    /// Of the whole request.
    pub(super) route: Option<Duration>,
    /// Of each try; less than that of the whole.
    pub(super) per_try: Option<Duration>,
    /// Of the stream, where the request says so.
    pub(super) stream: Option<Duration>,
    /// A try that takes too long goes on beside the next one.
    pub(super) hedge: bool,
    /// Timeouts are answered by 204.
    pub(super) no_content: bool,
    /// `x-envoy-expected-rq-timeout-ms` is written for each try.
    pub(super) told: bool,
    /// So is `grpc-timeout`.
    pub(super) told_grpc: bool,
    /// The request asks something about retries as well.
    pub(super) asks: bool,
}

/// Whether the field says something to the router.
fn is_asking(name: &HeaderName) -> bool {
    name.as_str().strip_prefix("x-envoy-").is_some_and(|_| {
        matches!(
            name.as_str(),
            TIMEOUT | PER_TRY | STREAM | HEDGE | ALTERNATIVE | STATISTICS | "x-envoy-expected-rq-timeout-ms"
        ) || RetryPolicy::is_asked_by(name.as_str())
    })
}

impl Times {
    /// Of a request that takes the route; what it asks is taken off, and the endpoint told what is left.
    pub(super) fn of(
        forward: &Forward,
        options: &RouterOptions,
        grpc: bool,
        headers: &mut HeaderMap,
    ) -> Self {
        let asks = headers.keys().any(is_asking);
        let mut times = Self {
            route: forward.timeout_of(grpc, headers),
            per_try: forward.retry.as_ref().and_then(|policy| policy.per_try_timeout),
            stream: None,
            hedge: forward.hedge,
            no_content: false,
            told: !options.suppress_envoy_headers,
            told_grpc: grpc && forward.grpc_timeout.is_some(),
            asks,
        };
        let plain = !asks && times.route == forward.timeout;
        if asks {
            times.obey(options, headers);
        }
        if let (Some(per_try), Some(route)) = (times.per_try, times.route)
            && per_try >= route
        {
            times.per_try = None;
        }
        if times.told && plain {
            if let Some(expected) = &forward.expected {
                headers.insert(EXPECTED.clone(), expected.clone());
            }
        } else {
            times.tell(times.route, headers);
        }
        if times.told_grpc {
            times.tell_grpc(times.route, headers);
        }
        times
    }

    fn obey(&mut self, options: &RouterOptions, headers: &mut HeaderMap) {
        match headers.remove(HEDGE).as_ref().map(HeaderValue::as_bytes) {
            Some(b"true") => self.hedge = true,
            Some(b"false") => self.hedge = false,
            _ => {}
        }
        let expected = headers
            .get(&EXPECTED)
            .filter(|_| options.respect_expected_timeout);
        let asked = match expected {
            Some(expected) => {
                // It stands as the hop before has written it.
                self.told = false;
                number(expected)
            }
            None => headers.remove(TIMEOUT).as_ref().and_then(number),
        };
        if let Some(asked) = asked {
            self.route = limit(asked);
        }
        if let Some(asked) = headers.remove(PER_TRY).as_ref().and_then(number) {
            self.per_try = limit(asked);
        }
        self.stream = headers.remove(STREAM).as_ref().and_then(number).and_then(limit);
        self.no_content = headers.remove(ALTERNATIVE).is_some();
        // Nothing is counted by that name.
        headers.remove(STATISTICS);
    }

    /// What the endpoint may take, of which `left` is left in all.
    fn expected(&self, left: Option<Duration>) -> Option<Duration> {
        match (self.per_try.filter(|_| !self.hedge), left) {
            (Some(per_try), Some(left)) => Some(per_try.min(left)),
            (one, other) => one.or(other),
        }
    }

    /// Tells the endpoint of a further try, when `left` is left of the request's time.
    pub(super) fn tell_again(&self, left: Option<Duration>, headers: &mut HeaderMap) {
        self.tell(left, headers);
        if self.told_grpc {
            self.tell_grpc(left, headers);
        }
    }

    fn tell(&self, left: Option<Duration>, headers: &mut HeaderMap) {
        if let Some(expected) = self.expected(left).filter(|_| self.told) {
            headers.insert(EXPECTED.clone(), in_millis(expected));
        }
    }

    fn tell_grpc(&self, left: Option<Duration>, headers: &mut HeaderMap) {
        if let Some(expected) = self.expected(left) {
            Forward::tell_grpc_timeout(expected, headers);
        }
    }
}

/// None where nothing stands for no limit. Longer than a process lives is as good as none, and can be added to any time.
fn limit(millis: u64) -> Option<Duration> {
    const LONGEST: u64 = 1000 * 60 * 60 * 24 * 365;
    (millis > 0).then(|| Duration::from_millis(millis.min(LONGEST)))
}

/// As a field has it: at least a millisecond, since nothing would stand for no limit.
fn in_millis(time: Duration) -> HeaderValue {
    let millis = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    HeaderValue::from(millis.max(1))
}
