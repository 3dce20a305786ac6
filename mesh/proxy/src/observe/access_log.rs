//! The access logs of a connection manager or TCP proxy, compiled.

use std::sync::Arc;

use serin_xds::pb::envoy::config::accesslog::v3 as pb;
use serin_xds::pb::envoy::extensions::access_loggers::{file::v3 as file, stream::v3 as stream};
use serin_xds::pb::google::protobuf::Any;

use super::filter::Filter;
use super::format::{Format, Template};
use super::record::{Record, Wants};
use super::sink::{Sink, Sinks, Target};
use crate::config::convert;
use crate::error::{Refusal, Within};

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
    format: Format,
    sink: Arc<Sink>,
}

impl AccessLogs {
    /// Compiles the messages; `None` where there are none.
    pub(crate) fn compile(from: &[pb::AccessLog], sinks: &mut Sinks) -> Result<Option<Box<Self>>, Refusal> {
        if from.is_empty() {
            return Ok(None);
        }
        let mut wants = Wants::default();
        let logs = from
            .iter()
            .enumerate()
            .map(|(index, log)| {
                AccessLog::compile(log, &mut wants, sinks).within(format!("access_log[{index}]"))
            })
            .collect::<Result<_, _>>()?;
        Ok(Some(Box::new(Self { logs, wants })))
    }

    /// Writes the lines of a request that has ended.
    pub fn write(&self, record: &Record<'_>, random: &impl Fn() -> u64) {
        for log in &self.logs {
            if log
                .filter
                .as_ref()
                .is_none_or(|filter| filter.passes(record, random))
            {
                log.sink.append(|out| log.format.write(record, out));
            }
        }
    }
}

fn default_format(wants: &mut Wants) -> Result<Format, Refusal> {
    Format::standard(wants)
}

impl AccessLog {
    fn compile(from: &pb::AccessLog, wants: &mut Wants, sinks: &mut Sinks) -> Result<Self, Refusal> {
        let Some(pb::access_log::ConfigType::TypedConfig(any)) = &from.config_type else {
            return Err(Refusal::new("typed_config", "is missing"));
        };
        let (format, target) = destination(any, wants).within("typed_config")?;
        Ok(Self {
            filter: from
                .filter
                .as_ref()
                .map(|filter| Filter::compile(filter, wants))
                .transpose()
                .within("filter")?,
            format,
            sink: sinks.open(target).within("typed_config")?,
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
            use stream::stdout_access_log::AccessLogFormat;
            let message: stream::StdoutAccessLog = convert::unpack(any, type_name)?;
            let format = message
                .access_log_format
                .as_ref()
                .map(|AccessLogFormat::LogFormat(format)| format);
            Ok((
                Format::compile(format, wants).within("log_format")?,
                Target::Stdout,
            ))
        }
        "envoy.extensions.access_loggers.stream.v3.StderrAccessLog" => {
            use stream::stderr_access_log::AccessLogFormat;
            let message: stream::StderrAccessLog = convert::unpack(any, type_name)?;
            let format = message
                .access_log_format
                .as_ref()
                .map(|AccessLogFormat::LogFormat(format)| format);
            Ok((
                Format::compile(format, wants).within("log_format")?,
                Target::Stderr,
            ))
        }
        other => Err(Refusal::new(
            "",
            format!("the access logger {other} is not supported"),
        )),
    }
}
