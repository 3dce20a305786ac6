//! The access logs of a connection manager, TCP proxy or listener, compiled.

use std::sync::Arc;

use serin_xds::pb::envoy::config::accesslog::v3 as pb;
use serin_xds::pb::envoy::extensions::access_loggers::{
    file::v3 as file, grpc::v3 as grpc, open_telemetry::v3 as open_telemetry, stream::v3 as stream,
};
use serin_xds::pb::google::protobuf::{Any, Duration};

use super::als::{self, HttpEntry};
use super::batch::{Batches, Limits, Shape};
use super::filter::Filter;
use super::format::{Format, Template};
use super::otlp::{self, LogEntry};
use super::record::{Record, Wants};
use super::sink::{Sink, Target};
use crate::config::convert::{self, each};
use crate::config::route::Context;
use crate::error::{Refusal, Within};
use crate::metrics::flags::Flags;

/// Envoy's names of what the access log service took and what it did not.
const ALS_COUNTERS: [&str; 2] = [
    "envoy_access_logs_grpc_access_log_logs_written",
    "envoy_access_logs_grpc_access_log_logs_dropped",
];
/// The same of an OTLP collector.
const OTLP_COUNTERS: [&str; 2] = [
    "envoy_access_logs_open_telemetry_access_log_logs_written",
    "envoy_access_logs_open_telemetry_access_log_logs_dropped",
];

/// See the module.
#[derive(Debug, Default)]
pub struct AccessLogs {
    logs: Box<[AccessLog]>,
    /// What must be kept of a request for them.
    pub wants: Wants,
}

#[derive(Debug)]
struct AccessLog {
    filter: Option<Filter>,
    output: Output,
}

/// What becomes of a record.
#[derive(Debug)]
enum Output {
    Line(Format, Arc<Sink>),
    Http(HttpEntry, Arc<Batches>),
    Tcp(Arc<Batches>),
    Otlp(Box<LogEntry>, Arc<Batches>),
}

impl AccessLogs {
    /// Compiles the messages; `None` where there are none.
    pub(crate) fn compile(
        from: &[pb::AccessLog],
        context: &mut Context<'_>,
    ) -> Result<Option<Self>, Refusal> {
        if from.is_empty() {
            return Ok(None);
        }
        let mut wants = Wants::default();
        let logs = each(from, "access_log", |log| {
            AccessLog::compile(log, &mut wants, context)
        })?;
        Ok(Some(Self { logs, wants }))
    }

    /// Whether any line may be written about a request of this outcome.
    pub fn may_write(&self, code: u16, duration: std::time::Duration, flags: Flags) -> bool {
        let may_pass = |filter: &Filter| filter.may_pass(code, duration, flags);
        self.logs
            .iter()
            .any(|log| log.filter.as_ref().is_none_or(may_pass))
    }

    /// Writes the lines of a request or connection on behalf of a worker. `flush` gets batches that nobody sends yet.
    pub fn write(
        &self,
        record: &Record<'_>,
        random: &impl Fn() -> u64,
        worker: usize,
        flush: impl Fn(&Arc<Batches>),
    ) {
        for log in &self.logs {
            let wanted = log.filter.as_ref();
            if !wanted.is_none_or(|filter| filter.passes(record, random)) {
                continue;
            }
            let (alone, batches) = match &log.output {
                Output::Line(format, sink) => {
                    sink.append(|out| format.write(record, out));
                    continue;
                }
                Output::Http(entry, batches) => {
                    let entry = entry.of(record);
                    let write = |out: &mut _| prost::encoding::message::encode(1, &entry, out);
                    (batches.add(worker, write), batches)
                }
                Output::Tcp(batches) => {
                    let entry = als::tcp(record);
                    let write = |out: &mut _| prost::encoding::message::encode(1, &entry, out);
                    (batches.add(worker, write), batches)
                }
                Output::Otlp(entry, batches) => {
                    (batches.add(worker, |out| entry.write(record, out)), batches)
                }
            };
            if alone {
                flush(batches);
            }
        }
    }
}

/// How often lines are written of what goes on (`access_log_flush_interval`).
pub(crate) fn interval(from: Option<&Duration>) -> Result<Option<std::time::Duration>, Refusal> {
    let interval = convert::timeout(from).within("access_log_flush_interval")?;
    if interval.is_some_and(|interval| interval < std::time::Duration::from_millis(1)) {
        return Err(Refusal::new("access_log_flush_interval", "must be at least 1ms"));
    }
    Ok(interval)
}

fn default_format(wants: &mut Wants) -> Result<Format, Refusal> {
    Format::standard(wants)
}

impl AccessLog {
    fn compile(from: &pb::AccessLog, wants: &mut Wants, context: &mut Context<'_>) -> Result<Self, Refusal> {
        let Some(pb::access_log::ConfigType::TypedConfig(any)) = &from.config_type else {
            return Err(Refusal::new("typed_config", "is missing"));
        };
        Ok(Self {
            filter: from
                .filter
                .as_ref()
                .map(|filter| Filter::compile(filter, wants))
                .transpose()
                .within("filter")?,
            output: Output::compile(any, wants, context).within("typed_config")?,
        })
    }
}

impl Output {
    fn compile(any: &Any, wants: &mut Wants, context: &mut Context<'_>) -> Result<Self, Refusal> {
        let type_name = any.type_url.rsplit('/').next().unwrap_or_default();
        let common = |config: &Option<grpc::CommonGrpcAccessLogConfig>| {
            config
                .clone()
                .filter(|common| !common.log_name.is_empty())
                .ok_or_else(|| Refusal::new("common_config.log_name", "is missing"))
        };
        Ok(match type_name {
            "envoy.extensions.access_loggers.grpc.v3.HttpGrpcAccessLogConfig" => {
                let message: grpc::HttpGrpcAccessLogConfig = convert::unpack(any, type_name)?;
                let common = common(&message.common_config)?;
                let limits = Limits::of(&common).within("common_config")?;
                let shape = Shape::Http(common.log_name.as_str().into());
                Self::Http(
                    HttpEntry::compile(&message, wants)?,
                    Batches::new(shape, &limits, ALS_COUNTERS, context).within("common_config")?,
                )
            }
            "envoy.extensions.access_loggers.grpc.v3.TcpGrpcAccessLogConfig" => {
                let message: grpc::TcpGrpcAccessLogConfig = convert::unpack(any, type_name)?;
                let common = common(&message.common_config)?;
                let limits = Limits::of(&common).within("common_config")?;
                let shape = Shape::Tcp(common.log_name.as_str().into());
                Self::Tcp(Batches::new(shape, &limits, ALS_COUNTERS, context).within("common_config")?)
            }
            "envoy.extensions.access_loggers.open_telemetry.v3.OpenTelemetryAccessLogConfig" => {
                let message: open_telemetry::OpenTelemetryAccessLogConfig = convert::unpack(any, type_name)?;
                let (limits, name) = otlp::limits(&message)?;
                let shape = Shape::Otlp {
                    fixed: message
                        .resource_attributes
                        .as_ref()
                        .map_or_else(Vec::new, |list| list.values.clone()),
                    log_name: (!message.disable_builtin_labels).then(|| name.into()),
                };
                Self::Otlp(
                    Box::new(LogEntry::compile(&message, wants)?),
                    Batches::new(shape, &limits, OTLP_COUNTERS, context)?,
                )
            }
            _ => {
                let (format, target) = destination(any, wants)?;
                Self::Line(format, context.slots.sinks.open(target)?)
            }
        })
    }
}

fn destination(any: &Any, wants: &mut Wants) -> Result<(Format, Target), Refusal> {
    let type_name = any.type_url.rsplit('/').next().unwrap_or_default();
    match type_name {
        "envoy.extensions.access_loggers.file.v3.FileAccessLog" => {
            use file::file_access_log::AccessLogFormat;
            let message: file::FileAccessLog = convert::unpack(any, type_name)?;
            let format = match &message.access_log_format {
                None => default_format(wants)?,
                Some(AccessLogFormat::Format(text)) if text.is_empty() => default_format(wants)?,
                Some(AccessLogFormat::Format(text)) => {
                    Format::Text(Template::parse(text, false, wants).within("format")?)
                }
                Some(AccessLogFormat::JsonFormat(fields)) => {
                    Format::json(fields, false, wants).within("json_format")?
                }
                Some(AccessLogFormat::TypedJsonFormat(fields)) => {
                    Format::json(fields, false, wants).within("typed_json_format")?
                }
                Some(AccessLogFormat::LogFormat(format)) => {
                    Format::compile(Some(format), wants).within("log_format")?
                }
            };
            let target = match &*message.path {
                "" => return Err(Refusal::new("path", "is missing")),
                "/dev/stdout" => Target::Stdout,
                "/dev/stderr" => Target::Stderr,
                path => Target::File(path.into()),
            };
            Ok((format, target))
        }
        "envoy.extensions.access_loggers.stream.v3.StdoutAccessLog" => {
            use stream::stdout_access_log::AccessLogFormat::LogFormat;
            let message: stream::StdoutAccessLog = convert::unpack(any, type_name)?;
            let format = message.access_log_format.map(|LogFormat(format)| format);
            let format = Format::compile(format.as_ref(), wants).within("log_format")?;
            Ok((format, Target::Stdout))
        }
        "envoy.extensions.access_loggers.stream.v3.StderrAccessLog" => {
            use stream::stderr_access_log::AccessLogFormat::LogFormat;
            let message: stream::StderrAccessLog = convert::unpack(any, type_name)?;
            let format = message.access_log_format.map(|LogFormat(format)| format);
            let format = Format::compile(format.as_ref(), wants).within("log_format")?;
            Ok((format, Target::Stderr))
        }
        other => Err(Refusal::new(
            "",
            format!("the access logger {other} is not supported"),
        )),
    }
}
