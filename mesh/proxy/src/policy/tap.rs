//! Tap: requests that match a condition are shown, whole, to somebody who asks over the admin port
//! (`envoy.filters.http.tap` with `admin_config`, `POST /tap`).
//!
//! A filter has a [`Spot`], which is found by its `config_id`; while nobody looks, a request costs it the reading of one
//! flag. Who looks puts a [`Tap`] there. What matches is written as JSON on the worker and handed over a bounded queue: a
//! reader that is too slow loses traces, which are counted, and holds up nobody.
//!
//! Beside the filters' own names there is [`EVERYWHERE`], a spot in front of every connection manager's chain.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use parking_lot::Mutex;
use prost::Message as _;
use serin_xds::pb::envoy::config::tap::v3 as tap;
use serin_xds::pb::envoy::extensions::common::tap::v3::common_extension_config::ConfigType;
use serin_xds::pb::envoy::extensions::filters::http::tap::v3 as filter;
use tokio::sync::mpsc;

mod condition;
mod search;

use condition::{Condition, Searches};
pub use search::{Search, Searching};

use super::stats::Counter;
use crate::config::convert::{self, Fraction, required};
use crate::config::matchers::RequestView;
use crate::config::route::Context;
use crate::error::{Refusal, Within};

/// `config_id` of the spot in front of every connection manager's chain.
pub const EVERYWHERE: &str = "serin.http_connection_managers";
/// Traces that may wait for a reader.
const MAX_TRACES: usize = 256;
/// Bytes of them.
const MAX_WAITING: usize = 8 << 20;
/// Bytes of one body that may be asked for.
const MAX_BODY: u32 = 1 << 20;
/// Bytes of one body that are shown if nothing else is asked for.
const DEFAULT_BODY: u32 = 1024;
/// Traces that a buffered sink may collect.
const MAX_BUFFERED: u64 = 1000;
/// Stands for `:status` among the fields of a response, where no field can have that name.
static STATUS: HeaderName = HeaderName::from_static("serin-tap-status");

/// A place where requests can be looked at.
#[derive(Debug, Default)]
pub struct Spot {
    looked_at: AtomicBool,
    tap: ArcSwapOption<Tap>,
    /// Traces that a slow reader has lost.
    dropped: AtomicU64,
}

impl Spot {
    /// Who looks, if anybody does.
    pub fn tap(&self) -> Option<Arc<Tap>> {
        if !self.looked_at.load(Ordering::Relaxed) {
            return None;
        }
        self.tap.load_full()
    }

    /// Starts to look; `None` if somebody does already.
    pub fn attach(self: &Arc<Self>, config: TapConfig) -> Option<Look> {
        if self.looked_at.swap(true, Ordering::AcqRel) {
            return None;
        }
        let (sender, traces) = mpsc::channel(MAX_TRACES);
        let waiting = Arc::new(AtomicUsize::new(0));
        let sink = config.sink;
        self.tap.store(Some(Arc::new(Tap {
            config,
            sender,
            waiting: waiting.clone(),
            spot: self.clone(),
        })));
        Some(Look {
            spot: self.clone(),
            sink,
            traces,
            waiting,
        })
    }

    /// Traces that were lost.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }
}

/// The reader's half. Looking ends when it is dropped.
#[derive(Debug)]
pub struct Look {
    spot: Arc<Spot>,
    /// How the traces are wanted.
    pub sink: Sink,
    traces: mpsc::Receiver<Bytes>,
    waiting: Arc<AtomicUsize>,
}

impl Look {
    /// The next trace.
    pub fn poll_trace(&mut self, cx: &mut std::task::Context<'_>) -> std::task::Poll<Option<Bytes>> {
        let trace = std::task::ready!(self.traces.poll_recv(cx));
        if let Some(trace) = &trace {
            self.waiting.fetch_sub(trace.len(), Ordering::Relaxed);
        }
        std::task::Poll::Ready(trace)
    }
}

impl Drop for Look {
    fn drop(&mut self) {
        self.spot.tap.store(None);
        self.spot.looked_at.store(false, Ordering::Release);
    }
}

/// Somebody who looks.
#[derive(Debug)]
pub struct Tap {
    /// What is wanted.
    pub config: TapConfig,
    sender: mpsc::Sender<Bytes>,
    waiting: Arc<AtomicUsize>,
    spot: Arc<Spot>,
}

impl Tap {
    /// Hands a trace over, or drops and counts it.
    pub fn submit(&self, trace: String) {
        let length = trace.len();
        let fits = self.waiting.fetch_add(length, Ordering::Relaxed) + length <= MAX_WAITING;
        if !fits || self.sender.try_send(Bytes::from(trace)).is_err() {
            self.waiting.fetch_sub(length, Ordering::Relaxed);
            self.spot.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// The spots of a proxy, by `config_id`.
#[derive(Debug, Default)]
pub struct Spots {
    by_id: Mutex<BTreeMap<Box<str>, Arc<Spot>>>,
}

impl Spots {
    /// The spot of that id, made if need be.
    pub fn spot(&self, id: &str) -> Arc<Spot> {
        self.by_id.lock().entry(id.into()).or_default().clone()
    }

    /// The spot of that id, if some filter has it.
    pub fn find(&self, id: &str) -> Option<Arc<Spot>> {
        self.by_id.lock().get(id).cloned()
    }

    /// Forgets those that no filter has any more.
    pub fn sweep(&self) {
        self.by_id.lock().retain(|_, spot| Arc::strong_count(spot) > 1);
    }

    /// Traces lost, by id.
    pub fn dropped(&self) -> Vec<(String, u64)> {
        let by_id = self.by_id.lock();
        by_id
            .iter()
            .map(|(id, spot)| (id.to_string(), spot.dropped()))
            .collect()
    }
}

/// The filter.
#[derive(Debug)]
pub struct TapFilter {
    /// Where it can be looked at.
    pub spot: Arc<Spot>,
    /// `tap.rq_tapped`.
    pub tapped: Arc<Counter>,
    /// Whether traces say who is connected.
    pub connection: bool,
    /// Whether traces say which endpoint answered.
    pub upstream: bool,
    /// Whether traces say when heads came.
    pub times: bool,
}

impl TapFilter {
    /// Compiles the message.
    pub(crate) fn compile(
        from: &filter::Tap,
        stat_prefix: &str,
        context: &mut Context<'_>,
    ) -> Result<Self, Refusal> {
        let id = match from
            .common_config
            .as_ref()
            .and_then(|common| common.config_type.as_ref())
        {
            Some(ConfigType::AdminConfig(admin)) if !admin.config_id.is_empty() => &admin.config_id,
            Some(ConfigType::AdminConfig(_)) => {
                return Err(Refusal::new("common_config.admin_config.config_id", "is missing"));
            }
            Some(ConfigType::StaticConfig(_)) => {
                return Err(Refusal::new(
                    "common_config.static_config",
                    "not supported: use admin_config and POST /tap",
                ));
            }
            None => return Err(Refusal::new("common_config", "is missing")),
        };
        if id == EVERYWHERE {
            return Err(Refusal::new(
                "common_config.admin_config.config_id",
                format!("{EVERYWHERE} is every connection manager's; choose another"),
            ));
        }
        let (workers, counters) = context.counters();
        Ok(Self {
            spot: counters.spots.spot(id),
            tapped: counters.counter(
                workers,
                "envoy_http_tap_rq_tapped",
                &[("envoy_http_conn_manager_prefix", stat_prefix)],
            ),
            connection: from.record_downstream_connection,
            upstream: from.record_upstream_connection,
            times: from.record_headers_received_time,
        })
    }
}

/// Where traces go, and how many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sink {
    /// One by one as they come, for as long as the reader stays.
    Streaming,
    /// That many together, or fewer after that time.
    Buffered(u64, Option<Duration>),
}

/// What is wanted.
#[derive(Debug)]
pub struct TapConfig {
    matches: Condition,
    /// What is looked for in a request's body.
    pub in_request: Arc<[Search]>,
    /// What is looked for in a response's body.
    pub in_response: Arc<[Search]>,
    /// Of those that match.
    pub share: Fraction,
    /// Bytes of a request's body.
    pub request_bytes: usize,
    /// Bytes of a response's body.
    pub response_bytes: usize,
    /// Bodies are shown as text, not as base64.
    pub text: bool,
    sink: Sink,
}

impl TapConfig {
    /// Compiles the message of an admin request.
    pub fn compile(from: &tap::TapConfig) -> Result<Self, Refusal> {
        #[allow(deprecated)]
        let old = from.match_config.clone();
        let mut searches = Searches::default();
        let matches = match (&from.r#match, old) {
            (Some(new), _) => {
                // The same message under another name, field by field.
                let bytes = new.encode_to_vec();
                let same = tap::MatchPredicate::decode(bytes.as_slice())
                    .map_err(|error| Refusal::new("match", error.to_string()))?;
                Condition::compile(&same, &mut searches, 0).within("match")?
            }
            (None, Some(old)) => Condition::compile(&old, &mut searches, 0).within("match_config")?,
            (None, None) => return Err(Refusal::new("match", "is missing")),
        };
        let output = required(from.output_config.as_ref(), "output_config")?;
        if output.streaming {
            return Err(Refusal::new(
                "output_config.streaming",
                "not supported: traces are of whole exchanges",
            ));
        }
        let [sink] = &*output.sinks else {
            return Err(Refusal::new("output_config.sinks", "exactly one is needed"));
        };
        let text = match tap::output_sink::Format::try_from(sink.format) {
            Ok(tap::output_sink::Format::JsonBodyAsBytes) => false,
            Ok(tap::output_sink::Format::JsonBodyAsString) => true,
            _ => {
                return Err(Refusal::new(
                    "output_config.sinks[0].format",
                    "JSON_BODY_AS_BYTES and JSON_BODY_AS_STRING are supported",
                ));
            }
        };
        use tap::output_sink::OutputSinkType;
        let sink = match &sink.output_sink_type {
            Some(OutputSinkType::StreamingAdmin(_)) => Sink::Streaming,
            Some(OutputSinkType::BufferedAdmin(buffered)) => {
                if buffered.max_traces == 0 || buffered.max_traces > MAX_BUFFERED {
                    return Err(Refusal::new(
                        "output_config.sinks[0].buffered_admin.max_traces",
                        format!("must be between 1 and {MAX_BUFFERED}"),
                    ));
                }
                let timeout = convert::timeout(buffered.timeout.as_ref())
                    .within("output_config.sinks[0].buffered_admin.timeout")?;
                Sink::Buffered(buffered.max_traces, timeout)
            }
            _ => {
                return Err(Refusal::new(
                    "output_config.sinks[0]",
                    "only streaming_admin and buffered_admin are supported",
                ));
            }
        };
        let bytes = |value: &Option<serin_xds::pb::google::protobuf::UInt32Value>| {
            value
                .as_ref()
                .map_or(DEFAULT_BODY, |value| value.value.min(MAX_BODY)) as usize
        };
        let enabled = from
            .tap_enabled
            .as_ref()
            .and_then(|enabled| enabled.default_value.as_ref());
        Ok(Self {
            matches,
            in_request: searches.request.into(),
            in_response: searches.response.into(),
            share: Fraction::compile(enabled, Fraction::ALL).within("tap_enabled")?,
            request_bytes: bytes(&output.max_buffered_rx_bytes),
            response_bytes: bytes(&output.max_buffered_tx_bytes),
            text,
            sink,
        })
    }

    /// Whether an exchange is wanted, as far as that can be said of what has been seen of it.
    pub fn wants(&self, seen: &Seen<'_>) -> Option<bool> {
        self.matches.judge(seen)
    }
}

/// What of an exchange has come so far; `None` for what may still come.
#[derive(Clone, Copy, Debug)]
pub struct Seen<'a> {
    /// The request's head.
    pub request: RequestView<'a>,
    /// The request's trailers.
    pub request_trailers: Option<&'a HeaderMap>,
    /// The response's head, see [`with_status`].
    pub response: Option<&'a HeaderMap>,
    /// The response's trailers.
    pub response_trailers: Option<&'a HeaderMap>,
    /// What was found in the request's body.
    pub request_body: Option<&'a Searching>,
    /// What was found in the response's body.
    pub response_body: Option<&'a Searching>,
}

/// A response's fields, and its status where conditions look for `:status`.
pub fn with_status(status: StatusCode, headers: &HeaderMap) -> HeaderMap {
    let mut headers = headers.clone();
    headers.insert(STATUS.clone(), HeaderValue::from(status.as_u16()));
    headers
}

/// The fields without it.
pub fn is_status(name: &HeaderName) -> bool {
    *name == STATUS
}

#[cfg(test)]
mod tests {
    use serin_xds::pb::envoy::config::route::v3 as route;

    use super::*;
    use tap::match_predicate::{MatchSet, Rule};

    fn header(name: &str, value: &str) -> tap::HttpHeadersMatch {
        tap::HttpHeadersMatch {
            headers: vec![route::HeaderMatcher {
                name: name.into(),
                header_match_specifier: Some(route::header_matcher::HeaderMatchSpecifier::ExactMatch(
                    value.into(),
                )),
                ..Default::default()
            }],
        }
    }

    fn rule(rule: Rule) -> tap::MatchPredicate {
        tap::MatchPredicate { rule: Some(rule) }
    }

    fn config(rule: Rule, sink: tap::output_sink::OutputSinkType) -> tap::TapConfig {
        #[allow(deprecated)]
        tap::TapConfig {
            match_config: Some(tap::MatchPredicate { rule: Some(rule) }),
            output_config: Some(tap::OutputConfig {
                sinks: vec![tap::OutputSink {
                    output_sink_type: Some(sink),
                    ..Default::default()
                }],
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    fn streaming() -> tap::output_sink::OutputSinkType {
        tap::output_sink::OutputSinkType::StreamingAdmin(tap::StreamingAdminSink {})
    }

    fn seen(headers: &HeaderMap) -> Seen<'_> {
        Seen {
            request: RequestView {
                method: "GET",
                path: "/a",
                query: None,
                authority: Some("a"),
                scheme: Some("http"),
                headers,
            },
            request_trailers: None,
            response: None,
            response_trailers: None,
            request_body: None,
            response_body: None,
        }
    }

    #[test]
    fn what_the_request_decides_is_decided_early_and_the_rest_when_it_has_come() {
        let none = HeaderMap::new();
        let condition = |from| Condition::compile(&rule(from), &mut Searches::default(), 0).unwrap();
        let bad = header(":status", "503");
        let ours = header(":path", "/a");
        let both = condition(Rule::AndMatch(MatchSet {
            rules: vec![
                rule(Rule::HttpRequestHeadersMatch(ours.clone())),
                rule(Rule::HttpResponseHeadersMatch(bad.clone())),
            ],
        }));
        assert_eq!(both.judge(&seen(&none)), None);
        for (status, expected) in [(503, true), (200, false)] {
            let response = with_status(StatusCode::from_u16(status).unwrap(), &none);
            let seen = Seen {
                response: Some(&response),
                ..seen(&none)
            };
            assert_eq!(both.judge(&seen), Some(expected));
        }
        let never = condition(Rule::AndMatch(MatchSet {
            rules: vec![
                rule(Rule::NotMatch(Box::new(rule(Rule::HttpRequestHeadersMatch(
                    ours,
                ))))),
                rule(Rule::HttpResponseHeadersMatch(bad.clone())),
            ],
        }));
        assert_eq!(never.judge(&seen(&none)), Some(false));
        let always = condition(Rule::OrMatch(MatchSet {
            rules: vec![
                rule(Rule::HttpResponseHeadersMatch(bad)),
                rule(Rule::AnyMatch(true)),
            ],
        }));
        assert_eq!(always.judge(&seen(&none)), Some(true));
    }

    #[test]
    fn what_cannot_be_shown_is_refused_with_its_path() {
        let file = tap::output_sink::OutputSinkType::FilePerTap(tap::FilePerTapSink::default());
        let buffered = tap::output_sink::OutputSinkType::BufferedAdmin(tap::BufferedAdminSink::default());
        for (from, path) in [
            (
                config(Rule::AnyMatch(false), streaming()),
                "match_config.any_match",
            ),
            (config(Rule::AnyMatch(true), file), "output_config.sinks[0]"),
            (config(Rule::AnyMatch(true), buffered), "max_traces"),
            (
                config(Rule::HttpRequestGenericBodyMatch(Default::default()), streaming()),
                "http_request_generic_body_match.patterns",
            ),
            (tap::TapConfig::default(), "match"),
        ] {
            let refusal = TapConfig::compile(&from).unwrap_err().to_string();
            assert!(refusal.contains(path), "{refusal}");
        }
    }

    #[test]
    fn one_looks_at_a_time_and_a_reader_that_does_not_read_loses_traces_that_are_counted() {
        let spot = Arc::new(Spot::default());
        assert!(spot.tap().is_none());
        let wanted = || TapConfig::compile(&config(Rule::AnyMatch(true), streaming())).unwrap();
        let mut look = spot.attach(wanted()).unwrap();
        assert!(spot.attach(wanted()).is_none());
        let tap = spot.tap().unwrap();
        for _ in 0..MAX_TRACES + 3 {
            tap.submit("trace".into());
        }
        assert_eq!(spot.dropped(), 3);
        tap.submit("x".repeat(MAX_WAITING + 1));
        assert_eq!(spot.dropped(), 4);
        let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
        for _ in 0..MAX_TRACES {
            assert!(look.poll_trace(&mut cx).is_ready());
        }
        assert_eq!(look.waiting.load(Ordering::Relaxed), 0);
        drop(look);
        assert!(spot.tap().is_none());
        assert!(spot.attach(wanted()).is_some());
    }
}
