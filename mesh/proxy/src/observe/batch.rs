//! Entries for a log service: encoded when they arise, kept in one buffer, sent when there is enough of them or when they
//! have waited long enough.
//!
//! Each batch is a call of its own, so that the service's answer says what it has taken. The buffer is bounded: while a
//! service is slow or away, further entries are dropped and counted, and no request waits.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{HeaderName, HeaderValue};
use parking_lot::Mutex;
use prost::Message;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::extensions::access_loggers::grpc::v3 as grpc;
use serin_xds::pb::envoy::service::accesslog::v3 as als;
use tokio::sync::Notify;

use super::tracer::http_service;
use crate::config::convert::{self, refuse_present};
use crate::config::route::Context;
use crate::error::{Refusal, Within};
use crate::policy::service::{GrpcTarget, HttpTarget};
use crate::policy::stats::Counter;

/// Bytes that may wait.
const MAX_WAITING: usize = 1 << 20;
/// Envoy's time for which entries wait for others.
const DEFAULT_INTERVAL: Duration = Duration::from_secs(1);
/// Envoy's size at which entries wait no longer.
const DEFAULT_SIZE: u32 = 16_384;
/// The method of the access log service.
const ALS_PATH: &str = "/envoy.service.accesslog.v3.AccessLogService/StreamAccessLogs";
/// The method of OTLP's log service.
const OTLP_PATH: &str = "/opentelemetry.proto.collector.logs.v1.LogsService/Export";

/// What a batch is a message of.
#[derive(Debug)]
pub enum Shape {
    /// `StreamAccessLogsMessage` with HTTP entries, under that name.
    Http(Box<str>),
    /// `StreamAccessLogsMessage` with TCP entries.
    Tcp(Box<str>),
    /// `ExportLogsServiceRequest` with this resource (an encoded `Resource`).
    Otlp {
        /// What is said of the resource whoever we are.
        fixed: Vec<super::otlp::Pair>,
        /// `log_name`; `None` where Envoy's own labels are left out.
        log_name: Option<Box<str>>,
    },
}

/// Whom batches are sent to.
#[derive(Debug)]
pub enum Destination {
    /// A gRPC service.
    Grpc(GrpcTarget),
    /// OTLP over HTTP, with these fields on each request.
    Http(HttpTarget, Box<[(HeaderName, HeaderValue)]>),
}

#[derive(Debug, Default)]
struct Waiting {
    bytes: BytesMut,
    entries: u64,
}

/// See the module.
#[derive(Debug)]
pub struct Batches {
    /// Whither.
    pub target: Destination,
    /// How long entries wait for others.
    pub interval: Duration,
    shape: Shape,
    size: usize,
    waiting: Mutex<Waiting>,
    flushing: AtomicBool,
    enough: Notify,
    written: Arc<Counter>,
    dropped: Arc<Counter>,
}

/// What is sent with one call.
#[derive(Debug)]
pub struct Batch {
    /// The encoded message.
    pub message: Vec<u8>,
    /// Entries in it.
    pub entries: u64,
}

/// A message whose inner messages are encoded already; on the wire bytes and messages look alike.
#[derive(Clone, PartialEq, Message)]
struct StreamMessage {
    #[prost(message, optional, tag = "1")]
    identifier: Option<als::stream_access_logs_message::Identifier>,
    #[prost(bytes = "bytes", optional, tag = "2")]
    http: Option<Bytes>,
    #[prost(bytes = "bytes", optional, tag = "3")]
    tcp: Option<Bytes>,
}

/// Buffer limits and target as the three configurations give them.
#[derive(Debug, Default)]
pub(super) struct Limits<'a> {
    pub service: Option<&'a core::GrpcService>,
    pub http: Option<&'a core::HttpService>,
    pub interval: Option<&'a serin_xds::pb::google::protobuf::Duration>,
    pub size: Option<u32>,
}

impl<'a> Limits<'a> {
    /// Of the message that the access log service's configurations share.
    pub(super) fn of(common: &'a grpc::CommonGrpcAccessLogConfig) -> Result<Self, Refusal> {
        refuse_present(
            &[
                (
                    "grpc_stream_retry_policy",
                    common.grpc_stream_retry_policy.is_some(),
                ),
                ("custom_tags", !common.custom_tags.is_empty()),
                (
                    "transport_api_version",
                    // AUTO and V3.
                    !matches!(common.transport_api_version, 0 | 2),
                ),
            ],
            "not supported",
        )?;
        Ok(Self {
            service: common.grpc_service.as_ref(),
            http: None,
            interval: common.buffer_flush_interval.as_ref(),
            size: common.buffer_size_bytes.as_ref().map(|value| value.value),
        })
    }
}

impl Batches {
    /// Without entries yet. `name` is Envoy's name of the logger, for the counters.
    pub(super) fn new(
        shape: Shape,
        limits: &Limits<'_>,
        name: [&'static str; 2],
        context: &mut Context<'_>,
    ) -> Result<Arc<Self>, Refusal> {
        let target = match (limits.service, limits.http) {
            (_, None) => GrpcTarget::compile(limits.service, context)
                .map(Destination::Grpc)
                .within("grpc_service")?,
            (None, Some(service)) => {
                let (target, fields) = http_service(service, context).within("http_service")?;
                Destination::Http(target, fields)
            }
            (Some(_), Some(_)) => {
                return Err(Refusal::new(
                    "http_service",
                    "cannot be combined with grpc_service",
                ));
            }
        };
        let interval = convert::timeout(limits.interval).within("buffer_flush_interval")?;
        let (workers, registry) = context.counters();
        Ok(Arc::new(Self {
            target,
            interval: interval.unwrap_or(DEFAULT_INTERVAL),
            shape,
            size: limits.size.unwrap_or(DEFAULT_SIZE) as usize,
            waiting: Mutex::default(),
            flushing: AtomicBool::new(false),
            enough: Notify::new(),
            written: registry.counter(workers, name[0], &[]),
            dropped: registry.counter(workers, name[1], &[]),
        }))
    }

    /// Adds what `write` encodes, one entry with its tag. `true` says that the caller must see to it that it is sent.
    pub fn add(&self, worker: usize, write: impl FnOnce(&mut BytesMut)) -> bool {
        let enough = {
            let mut waiting = self.waiting.lock();
            if waiting.bytes.len() >= MAX_WAITING {
                drop(waiting);
                self.dropped.add(worker);
                return false;
            }
            let before = waiting.bytes.len();
            write(&mut waiting.bytes);
            waiting.entries += 1;
            // Told once per batch; a buffer size of 0 sends each entry at once, as in Envoy.
            (before == 0 || before < self.size) && waiting.bytes.len() >= self.size
        };
        if enough {
            self.enough.notify_one();
        }
        !self.flushing.swap(true, Ordering::AcqRel)
    }

    /// Waits until there is enough for a batch.
    pub async fn full(&self) {
        self.enough.notified().await;
    }

    /// The next batch; when there is none, the next entry asks for a new task.
    pub fn take(&self, node: &core::Node) -> Option<Batch> {
        let waiting = {
            let mut waiting = self.waiting.lock();
            if waiting.entries == 0 {
                self.flushing.store(false, Ordering::Release);
                return None;
            }
            std::mem::take(&mut *waiting)
        };
        let entries = waiting.bytes.freeze();
        let identifier = |name: &str| {
            Some(als::stream_access_logs_message::Identifier {
                node: Some(node.clone()),
                log_name: name.to_owned(),
            })
        };
        let message = match &self.shape {
            Shape::Http(name) => StreamMessage {
                identifier: identifier(name),
                http: Some(entries),
                tcp: None,
            }
            .encode_to_vec(),
            Shape::Tcp(name) => StreamMessage {
                identifier: identifier(name),
                http: None,
                tcp: Some(entries),
            }
            .encode_to_vec(),
            Shape::Otlp { fixed, log_name } => {
                super::otlp::request(fixed, log_name.as_deref(), node, entries).encode_to_vec()
            }
        };
        Some(Batch {
            message,
            entries: waiting.entries,
        })
    }

    /// The method to call.
    pub fn path(&self) -> &'static str {
        match self.shape {
            Shape::Http(_) | Shape::Tcp(_) => ALS_PATH,
            Shape::Otlp { .. } => OTLP_PATH,
        }
    }

    /// Counts a batch that was taken, or not.
    pub fn count(&self, batch: &Batch, taken: bool, worker: usize) {
        let counter = if taken { &self.written } else { &self.dropped };
        counter.add_many(worker, batch.entries);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::slot::Slots;

    fn batches(slots: &mut Slots, size: Option<u32>) -> Arc<Batches> {
        let service = core::GrpcService {
            target_specifier: Some(core::grpc_service::TargetSpecifier::EnvoyGrpc(
                core::grpc_service::EnvoyGrpc {
                    cluster_name: "c".into(),
                    ..Default::default()
                },
            )),
            ..Default::default()
        };
        let limits = Limits {
            service: Some(&service),
            http: None,
            interval: None,
            size,
        };
        let mut context = Context {
            slots,
            workers: 1,
            seed: 0,
        };
        Batches::new(Shape::Http("l".into()), &limits, ["w", "d"], &mut context).unwrap()
    }

    fn entry(bytes: usize) -> impl FnOnce(&mut BytesMut) {
        move |out: &mut BytesMut| {
            let entry = serin_xds::pb::envoy::data::accesslog::v3::HttpAccessLogEntry {
                request: Some(serin_xds::pb::envoy::data::accesslog::v3::HttpRequestProperties {
                    path: "x".repeat(bytes),
                    ..Default::default()
                }),
                ..Default::default()
            };
            prost::encoding::message::encode(1, &entry, out);
        }
    }

    #[test]
    fn a_batch_is_the_message_of_its_service_and_asks_once_for_a_task() {
        let mut slots = Slots::default();
        let batches = batches(&mut slots, None);
        let asked: Vec<bool> = (0..3).map(|_| batches.add(0, entry(5))).collect();
        assert_eq!(asked, [true, false, false]);
        let node = core::Node {
            id: "me".into(),
            ..Default::default()
        };
        let batch = batches.take(&node).unwrap();
        let message = als::StreamAccessLogsMessage::decode(batch.message.as_slice()).unwrap();
        let identifier = message.identifier.unwrap();
        assert_eq!(
            (&*identifier.log_name, &*identifier.node.unwrap().id),
            ("l", "me")
        );
        let Some(als::stream_access_logs_message::LogEntries::HttpLogs(logs)) = message.log_entries else {
            panic!("no HTTP entries");
        };
        assert_eq!((logs.log_entry.len(), batch.entries), (3, 3));
        assert_eq!(logs.log_entry[2].request.as_ref().unwrap().path, "xxxxx");
        assert!(batches.take(&node).is_none());
        assert!(batches.add(0, entry(1)), "the next entry asks again");
    }

    #[tokio::test]
    async fn enough_bytes_are_sent_at_once_and_too_many_are_dropped_and_counted() {
        let mut slots = Slots::default();
        let batches = batches(&mut slots, Some(100));
        batches.add(0, entry(10));
        assert!(futures::FutureExt::now_or_never(batches.full()).is_none());
        batches.add(0, entry(100));
        batches.full().await;
        for _ in 0..3 {
            batches.add(0, entry(MAX_WAITING / 2));
        }
        assert_eq!(batches.dropped.get(), 1);
        let batch = batches.take(&core::Node::default()).unwrap();
        assert_eq!(batch.entries, 4);
        batches.count(&batch, true, 0);
        assert_eq!(batches.written.get(), 4);
    }
}
