//! Access logs as OTLP log records (`OpenTelemetryAccessLogConfig`); field numbers as in opentelemetry-proto 1.x.

use bytes::{Bytes, BytesMut};
use prost::Message;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::extensions::access_loggers::open_telemetry::v3 as pb;
use serin_xds::pb::opentelemetry::proto::common::v1 as common;

use super::batch::Limits;
use super::format::Template;
use super::record::{Record, Wants};
use crate::config::convert::refuse_present;
use crate::error::{Refusal, Within};

/// A key and its value.
pub type Pair = common::KeyValue;

/// Nesting of values at most.
const MAX_DEPTH: usize = 16;

/// A value with command operators in its texts.
#[derive(Debug)]
enum Node {
    Text(Template),
    Fixed(common::any_value::Value),
    List(Box<[Node]>),
    Map(Box<[(Box<str>, Node)]>),
}

/// What a log record says, compiled.
#[derive(Debug)]
pub struct LogEntry {
    body: Option<Node>,
    attributes: Box<[(Box<str>, Node)]>,
}

/// `opentelemetry.proto.logs.v1.LogRecord`.
#[derive(Clone, PartialEq, Message)]
pub struct LogRecord {
    /// When the request came, since 1970.
    #[prost(fixed64, tag = "1")]
    pub time_unix_nano: u64,
    /// What is said.
    #[prost(message, optional, tag = "5")]
    pub body: Option<common::AnyValue>,
    /// And beside it.
    #[prost(message, repeated, tag = "6")]
    pub attributes: Vec<common::KeyValue>,
    /// Trace.
    #[prost(bytes = "vec", tag = "9")]
    pub trace_id: Vec<u8>,
}

/// `ExportLogsServiceRequest`.
#[derive(Clone, PartialEq, Message)]
pub struct ExportLogsServiceRequest {
    /// One resource: this proxy.
    #[prost(message, repeated, tag = "1")]
    pub resource_logs: Vec<ResourceLogs>,
}

/// `opentelemetry.proto.logs.v1.ResourceLogs`.
#[derive(Clone, PartialEq, Message)]
pub struct ResourceLogs {
    /// Who says it.
    #[prost(message, optional, tag = "1")]
    pub resource: Option<Resource>,
    /// An encoded `ScopeLogs`; on the wire bytes and messages look alike.
    #[prost(bytes = "bytes", tag = "2")]
    pub scope_logs: Bytes,
}

/// `opentelemetry.proto.resource.v1.Resource`.
#[derive(Clone, PartialEq, Message)]
pub struct Resource {
    /// What it is.
    #[prost(message, repeated, tag = "1")]
    pub attributes: Vec<common::KeyValue>,
}

/// A request with entries that are encoded as `log_records` of `ScopeLogs`.
pub(super) fn request(
    fixed: &[Pair],
    log_name: Option<&str>,
    node: &core::Node,
    entries: Bytes,
) -> ExportLogsServiceRequest {
    let mut attributes = Vec::with_capacity(fixed.len() + 4);
    if let Some(log_name) = log_name {
        let zone = node.locality.as_ref().map_or("", |locality| &locality.zone);
        for (key, value) in [
            ("log_name", log_name),
            ("zone_name", zone),
            ("cluster_name", &node.cluster),
            ("node_name", &node.id),
        ] {
            attributes.push(pair(key, common::any_value::Value::StringValue(value.to_owned())));
        }
    }
    attributes.extend_from_slice(fixed);
    ExportLogsServiceRequest {
        resource_logs: vec![ResourceLogs {
            resource: Some(Resource { attributes }),
            scope_logs: entries,
        }],
    }
}

fn pair(key: &str, value: common::any_value::Value) -> Pair {
    Pair {
        key: key.to_owned(),
        value: Some(common::AnyValue { value: Some(value) }),
        ..Default::default()
    }
}

impl Node {
    fn compile(from: &common::AnyValue, wants: &mut Wants, depth: usize) -> Result<Self, Refusal> {
        use common::any_value::Value;
        if depth > MAX_DEPTH {
            return Err(Refusal::new("", "is nested too deeply"));
        }
        Ok(match &from.value {
            Some(Value::StringValue(text)) => Self::Text(Template::parse(text, false, wants)?),
            Some(Value::ArrayValue(list)) => Self::List(
                list.values
                    .iter()
                    .map(|value| Self::compile(value, wants, depth + 1))
                    .collect::<Result<_, _>>()?,
            ),
            Some(Value::KvlistValue(list)) => Self::Map(pairs(list, wants, depth + 1)?),
            Some(fixed) => Self::Fixed(fixed.clone()),
            None => return Err(Refusal::new("value", "is missing")),
        })
    }

    fn value(&self, record: &Record<'_>) -> common::any_value::Value {
        use common::any_value::Value;
        let any = |node: &Self| common::AnyValue {
            value: Some(node.value(record)),
        };
        match self {
            Self::Text(template) => {
                let mut text = String::new();
                template.write(record, &mut text);
                Value::StringValue(text)
            }
            Self::Fixed(value) => value.clone(),
            Self::List(nodes) => Value::ArrayValue(common::ArrayValue {
                values: nodes.iter().map(any).collect(),
            }),
            Self::Map(nodes) => Value::KvlistValue(common::KeyValueList {
                values: nodes
                    .iter()
                    .map(|(key, node)| pair(key, node.value(record)))
                    .collect(),
            }),
        }
    }
}

fn pairs(
    from: &common::KeyValueList,
    wants: &mut Wants,
    depth: usize,
) -> Result<Box<[(Box<str>, Node)]>, Refusal> {
    from.values
        .iter()
        .map(|pair| {
            let value = pair
                .value
                .as_ref()
                .ok_or_else(|| Refusal::new(&*pair.key, "has no value"))?;
            Ok((
                pair.key.as_str().into(),
                Node::compile(value, wants, depth).within(&*pair.key)?,
            ))
        })
        .collect()
}

/// Limits and fixed attributes of the message; its own fields go before those of the older common message.
pub(super) fn limits(from: &pb::OpenTelemetryAccessLogConfig) -> Result<(Limits<'_>, &str), Refusal> {
    refuse_present(
        &[
            ("resource_detectors", !from.resource_detectors.is_empty()),
            ("custom_tags", !from.custom_tags.is_empty()),
            ("formatters", !from.formatters.is_empty()),
        ],
        "not supported",
    )?;
    let mut limits = match &from.common_config {
        Some(common) => Limits::of(common).within("common_config")?,
        None => Limits::default(),
    };
    let common_name = from.common_config.as_ref().map_or("", |common| &*common.log_name);
    limits.service = from.grpc_service.as_ref().or(limits.service);
    limits.http = from.http_service.as_ref();
    limits.interval = from.buffer_flush_interval.as_ref().or(limits.interval);
    limits.size = from
        .buffer_size_bytes
        .as_ref()
        .map(|value| value.value)
        .or(limits.size);
    let name = if from.log_name.is_empty() {
        common_name
    } else {
        &from.log_name
    };
    Ok((limits, name))
}

impl LogEntry {
    /// Compiles the message.
    pub(super) fn compile(
        from: &pb::OpenTelemetryAccessLogConfig,
        wants: &mut Wants,
    ) -> Result<Self, Refusal> {
        Ok(Self {
            body: from
                .body
                .as_ref()
                .map(|body| Node::compile(body, wants, 0))
                .transpose()
                .within("body")?,
            attributes: match &from.attributes {
                Some(list) => pairs(list, wants, 0).within("attributes")?,
                None => Box::default(),
            },
        })
    }

    /// Appends the record of a request, as one of the `log_records` of `ScopeLogs`.
    pub fn write(&self, record: &Record<'_>, out: &mut BytesMut) {
        let entry = LogRecord {
            time_unix_nano: record.start.as_nanos() as u64,
            body: self.body.as_ref().map(|body| common::AnyValue {
                value: Some(body.value(record)),
            }),
            attributes: self
                .attributes
                .iter()
                .map(|(key, node)| pair(key, node.value(record)))
                .collect(),
            trace_id: record
                .trace
                .and_then(|(id, _)| u128::from_str_radix(id, 16).ok())
                .map_or_else(Vec::new, |id| id.to_be_bytes().to_vec()),
        };
        prost::encoding::message::encode(2, &entry, out);
    }
}
