//! Spans on their way to a collector: OTLP over gRPC or HTTP, Zipkin's JSON, Datadog's MessagePack.
//!
//! Encoding is pure and here; sending is the worker's part. A queue is shared by all workers and bounded: spans that a
//! collector is too slow for are dropped and counted.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use http::{HeaderName, HeaderValue};
use parking_lot::Mutex;
use prost::Message;
use serde_json::json;

use crate::policy::service::{GrpcTarget, HttpTarget};
use crate::policy::stats::Counter;

/// Spans that may wait.
const MAX_WAITING: usize = 2048;
/// Spans of one request to a collector.
pub const BATCH: usize = 256;
/// How long spans wait for others.
pub const FLUSH: Duration = Duration::from_secs(1);
/// The method of OTLP's gRPC service.
pub const OTLP_PATH: &str = "/opentelemetry.proto.collector.trace.v1.TraceService/Export";

/// A span that has ended.
#[derive(Clone, Debug)]
pub struct Span {
    /// Trace.
    pub trace: u128,
    /// Own id.
    pub id: u64,
    /// The span before it.
    pub parent: Option<u64>,
    /// Name of the operation.
    pub name: String,
    /// Whether the proxy stands on the caller's side.
    pub client: bool,
    /// When it began, since 1970.
    pub start: Duration,
    /// How long it took.
    pub duration: Duration,
    /// What is known of it.
    pub tags: Vec<(String, String)>,
    /// Whether it failed.
    pub error: bool,
    /// Where the proxy listened.
    pub local: SocketAddr,
}

/// Where spans go.
#[derive(Debug)]
pub enum Collector {
    /// OTLP over gRPC.
    OtlpGrpc(GrpcTarget),
    /// OTLP over HTTP, with these fields on each request.
    OtlpHttp(HttpTarget, Box<[(HeaderName, HeaderValue)]>),
    /// Zipkin's `/api/v2/spans`.
    Zipkin(HttpTarget, bool),
    /// Datadog's agent.
    Datadog(HttpTarget),
}

/// Spans that wait for their collector.
#[derive(Debug)]
pub struct Exporter {
    /// Where they go.
    pub collector: Collector,
    /// As whom.
    pub service: Box<str>,
    waiting: Mutex<Vec<Span>>,
    flushing: AtomicBool,
    /// Spans that were sent.
    pub sent: Arc<Counter>,
    /// Spans that were dropped.
    pub dropped: Arc<Counter>,
}

impl Exporter {
    /// Without spans yet.
    pub fn new(collector: Collector, service: &str, sent: Arc<Counter>, dropped: Arc<Counter>) -> Self {
        Self {
            collector,
            service: service.into(),
            waiting: Mutex::default(),
            flushing: AtomicBool::new(false),
            sent,
            dropped,
        }
    }

    /// Adds a span. `true` says that the caller must see to it that the queue is sent after [`FLUSH`].
    pub fn add(&self, span: Span, worker: usize) -> bool {
        let mut waiting = self.waiting.lock();
        if waiting.len() >= MAX_WAITING {
            self.dropped.add(worker);
            return false;
        }
        waiting.push(span);
        !self.flushing.swap(true, Ordering::AcqRel)
    }

    /// The next batch; when there is none, the next span will ask for a new flush.
    pub fn take(&self) -> Vec<Span> {
        let mut waiting = self.waiting.lock();
        if waiting.is_empty() {
            self.flushing.store(false, Ordering::Release);
        }
        let count = waiting.len().min(BATCH);
        waiting.drain(..count).collect()
    }
}

/// The parts of OTLP that a proxy writes, field numbers as in opentelemetry-proto 1.x.
pub mod otlp {
    #![allow(missing_docs)] // the protocol's names

    use prost::Message;

    #[derive(Clone, PartialEq, Message)]
    pub struct ExportTraceServiceRequest {
        #[prost(message, repeated, tag = "1")]
        pub resource_spans: Vec<ResourceSpans>,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct ResourceSpans {
        #[prost(message, optional, tag = "1")]
        pub resource: Option<Resource>,
        #[prost(message, repeated, tag = "2")]
        pub scope_spans: Vec<ScopeSpans>,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct Resource {
        #[prost(message, repeated, tag = "1")]
        pub attributes: Vec<KeyValue>,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct ScopeSpans {
        #[prost(message, optional, tag = "1")]
        pub scope: Option<Scope>,
        #[prost(message, repeated, tag = "2")]
        pub spans: Vec<Span>,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct Scope {
        #[prost(string, tag = "1")]
        pub name: String,
        #[prost(string, tag = "2")]
        pub version: String,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct Span {
        #[prost(bytes = "vec", tag = "1")]
        pub trace_id: Vec<u8>,
        #[prost(bytes = "vec", tag = "2")]
        pub span_id: Vec<u8>,
        #[prost(bytes = "vec", tag = "4")]
        pub parent_span_id: Vec<u8>,
        #[prost(string, tag = "5")]
        pub name: String,
        #[prost(int32, tag = "6")]
        pub kind: i32,
        #[prost(fixed64, tag = "7")]
        pub start_time_unix_nano: u64,
        #[prost(fixed64, tag = "8")]
        pub end_time_unix_nano: u64,
        #[prost(message, repeated, tag = "9")]
        pub attributes: Vec<KeyValue>,
        #[prost(message, optional, tag = "15")]
        pub status: Option<Status>,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct Status {
        #[prost(int32, tag = "3")]
        pub code: i32,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct KeyValue {
        #[prost(string, tag = "1")]
        pub key: String,
        #[prost(message, optional, tag = "2")]
        pub value: Option<AnyValue>,
    }

    /// Only texts are written.
    #[derive(Clone, PartialEq, Message)]
    pub struct AnyValue {
        #[prost(string, optional, tag = "1")]
        pub string_value: Option<String>,
    }
}

fn attribute(key: &str, value: &str) -> otlp::KeyValue {
    otlp::KeyValue {
        key: key.to_owned(),
        value: Some(otlp::AnyValue {
            string_value: Some(value.to_owned()),
        }),
    }
}

/// Spans as OTLP.
pub fn to_otlp(service: &str, spans: &[Span]) -> otlp::ExportTraceServiceRequest {
    let spans = spans
        .iter()
        .map(|span| otlp::Span {
            trace_id: span.trace.to_be_bytes().to_vec(),
            span_id: span.id.to_be_bytes().to_vec(),
            parent_span_id: span.parent.map_or_else(Vec::new, |id| id.to_be_bytes().to_vec()),
            name: span.name.clone(),
            kind: if span.client { 3 } else { 2 },
            start_time_unix_nano: span.start.as_nanos() as u64,
            end_time_unix_nano: (span.start + span.duration).as_nanos() as u64,
            attributes: span
                .tags
                .iter()
                .map(|(key, value)| attribute(key, value))
                .collect(),
            status: Some(otlp::Status {
                code: if span.error { 2 } else { 0 },
            }),
        })
        .collect();
    otlp::ExportTraceServiceRequest {
        resource_spans: vec![otlp::ResourceSpans {
            resource: Some(otlp::Resource {
                attributes: vec![
                    attribute("service.name", service),
                    attribute("telemetry.sdk.language", "rust"),
                    attribute("telemetry.sdk.name", "serin-proxy"),
                    attribute("telemetry.sdk.version", env!("CARGO_PKG_VERSION")),
                ],
            }),
            scope_spans: vec![otlp::ScopeSpans {
                scope: Some(otlp::Scope {
                    name: "serin-proxy".into(),
                    version: env!("CARGO_PKG_VERSION").into(),
                }),
                spans,
            }],
        }],
    }
}

/// Spans as OTLP's bytes.
pub fn otlp_bytes(service: &str, spans: &[Span]) -> Bytes {
    to_otlp(service, spans).encode_to_vec().into()
}

/// Spans as Zipkin's JSON, version 2. `wide` writes trace ids of 128 bits also where 64 would do.
pub fn zipkin_bytes(service: &str, spans: &[Span], wide: bool) -> Bytes {
    let spans: Vec<_> = spans
        .iter()
        .map(|span| {
            let trace = if wide || span.trace >> 64 != 0 {
                format!("{:032x}", span.trace)
            } else {
                format!("{:016x}", span.trace)
            };
            let mut tags: serde_json::Map<String, serde_json::Value> =
                span.tags.iter().map(|(key, value)| (key.clone(), json!(value))).collect();
            if span.error {
                tags.insert("error".into(), json!("true"));
            }
            let family = if span.local.is_ipv4() { "ipv4" } else { "ipv6" };
            let mut out = json!({
                "traceId": trace,
                "id": format!("{:016x}", span.id),
                "name": span.name,
                "kind": if span.client { "CLIENT" } else { "SERVER" },
                "timestamp": span.start.as_micros() as u64,
                // Zipkin takes no span of no length.
                "duration": (span.duration.as_micros() as u64).max(1),
                "localEndpoint": {"serviceName": service, family: span.local.ip().to_string(), "port": span.local.port()},
                "tags": tags,
            });
            if let Some(parent) = span.parent {
                out["parentId"] = json!(format!("{parent:016x}"));
            }
            out
        })
        .collect();
    serde_json::Value::Array(spans).to_string().into()
}

/// Spans as Datadog's agent takes them (`/v0.4/traces`): a list of traces, each a list of spans, in MessagePack.
pub fn datadog_bytes(service: &str, spans: &[Span]) -> Bytes {
    fn head(out: &mut BytesMut, count: usize, fixed: u8, short: u8) {
        if count < 16 {
            out.put_u8(fixed | count as u8);
        } else {
            out.put_u8(short);
            out.put_u16(count.min(usize::from(u16::MAX)) as u16);
        }
    }
    fn text(out: &mut BytesMut, value: &str) {
        // Texts above 64 KiB do not occur: fields of a request are shorter.
        let bytes = &value.as_bytes()[..value.len().min(usize::from(u16::MAX))];
        out.put_u8(0xda);
        out.put_u16(bytes.len() as u16);
        out.put_slice(bytes);
    }
    fn number(out: &mut BytesMut, key: &str, value: u64) {
        text(out, key);
        out.put_u8(0xcf);
        out.put_u64(value);
    }
    let mut out = BytesMut::with_capacity(spans.len() * 512);
    head(&mut out, spans.len(), 0x90, 0xdc);
    for span in spans {
        head(&mut out, 1, 0x90, 0xdc);
        head(&mut out, 11, 0x80, 0xde);
        for (key, value) in [
            ("service", service),
            ("name", "proxy"),
            ("resource", &*span.name),
            ("type", if span.client { "http" } else { "web" }),
        ] {
            text(&mut out, key);
            text(&mut out, value);
        }
        number(&mut out, "trace_id", span.trace as u64);
        number(&mut out, "span_id", span.id);
        number(&mut out, "parent_id", span.parent.unwrap_or(0));
        number(&mut out, "start", span.start.as_nanos() as u64);
        number(&mut out, "duration", span.duration.as_nanos() as u64);
        number(&mut out, "error", u64::from(span.error));
        text(&mut out, "meta");
        head(&mut out, span.tags.len(), 0x80, 0xde);
        for (key, value) in &span.tags {
            text(&mut out, key);
            text(&mut out, value);
        }
    }
    out.freeze()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::stats::Registry;

    fn span(id: u64) -> Span {
        Span {
            trace: 7,
            id,
            parent: Some(3),
            name: "ingress".into(),
            client: false,
            start: Duration::from_micros(1_000_001),
            duration: Duration::from_micros(20),
            tags: vec![("http.method".into(), "GET".into())],
            error: true,
            local: "10.0.0.1:80".parse().unwrap(),
        }
    }

    #[test]
    fn spans_are_written_as_zipkin_and_otlp_define_them() {
        let zipkin: serde_json::Value =
            serde_json::from_slice(&zipkin_bytes("shop", &[span(1)], false)).unwrap();
        assert_eq!(
            zipkin,
            json!([{
                "traceId": "0000000000000007", "id": "0000000000000001", "parentId": "0000000000000003",
                "name": "ingress", "kind": "SERVER", "timestamp": 1_000_001, "duration": 20,
                "localEndpoint": {"serviceName": "shop", "ipv4": "10.0.0.1", "port": 80},
                "tags": {"http.method": "GET", "error": "true"},
            }])
        );
        let otlp = otlp::ExportTraceServiceRequest::decode(otlp_bytes("shop", &[span(1)])).unwrap();
        let written = &otlp.resource_spans[0].scope_spans[0].spans[0];
        assert_eq!(
            (
                written.trace_id[15],
                written.span_id[7],
                written.parent_span_id[7]
            ),
            (7, 1, 3)
        );
        assert_eq!((written.kind, written.status.clone().unwrap().code), (2, 2));
        assert_eq!(written.end_time_unix_nano - written.start_time_unix_nano, 20_000);
    }

    #[test]
    fn datadogs_list_of_traces_begins_as_message_pack_says() {
        let bytes = datadog_bytes("shop", &[span(1)]);
        // One trace, one span, eleven fields, the first of them `service`.
        assert_eq!(&bytes[..6], &[0x91, 0x91, 0x8b, 0xda, 0, 7]);
        assert_eq!(&bytes[6..13], b"service");
    }

    #[test]
    fn a_queue_is_bounded_and_asks_once_for_a_flush() {
        let mut registry = Registry::default();
        let (sent, dropped) = (
            registry.counter(1, "sent", &[]),
            registry.counter(1, "dropped", &[]),
        );
        let mut slots = crate::config::slot::Slots::default();
        let target = HttpTarget {
            cluster: slots.cluster("c"),
            authority: HeaderValue::from_static("c"),
            path: http::uri::PathAndQuery::from_static("/"),
            timeout: FLUSH,
        };
        let exporter = Exporter::new(Collector::Zipkin(target, false), "s", sent, dropped.clone());
        let asked: Vec<bool> = (0..MAX_WAITING as u64 + 5)
            .map(|id| exporter.add(span(id), 0))
            .collect();
        assert_eq!(asked.iter().filter(|asked| **asked).count(), 1);
        assert_eq!(dropped.get(), 5);
        let mut seen = 0;
        loop {
            let batch = exporter.take();
            if batch.is_empty() {
                break;
            }
            seen += batch.len();
        }
        assert_eq!(seen, MAX_WAITING);
        assert!(exporter.add(span(1), 0), "the next span asks again");
    }
}
