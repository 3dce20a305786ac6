//! Active health checks of a cluster, compiled.

use std::ops::RangeInclusive;
use std::time::Duration;

use http::{HeaderName, HeaderValue, Method};
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::config::core::v3::health_check as pb;
use serin_xds::pb::envoy::r#type::v3 as envoy_type;
use serin_xds::pb::google::protobuf::UInt32Value;

use super::convert::{self, refuse_present};
use super::matchers::StringMatch;
use crate::error::{Refusal, Within};

/// Checks of one cluster at most: their results are bits of one number per host.
pub const MAX_CHECKS: usize = 32;
/// Bytes of a response body that are kept to be compared.
const DEFAULT_RESPONSE_BUFFER: usize = 1024;
/// Envoy's interval for clusters that nobody has sent a request to.
const DEFAULT_NO_TRAFFIC: Duration = Duration::from_secs(60);

/// When to check, and how many results in a row change a host's state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// One check takes no longer.
    pub timeout: Duration,
    /// Between checks of a host that is as it was.
    pub interval: Duration,
    /// Of a host that is down.
    pub unhealthy_interval: Duration,
    /// After the failure that may begin a fall.
    pub unhealthy_edge_interval: Duration,
    /// After the success that may begin a recovery.
    pub healthy_edge_interval: Duration,
    /// While the cluster has had no traffic, for healthy and for other hosts.
    pub no_traffic: (Duration, Duration),
    /// Drawn at random before the first check.
    pub initial_jitter: Duration,
    /// Drawn at random and added to each interval.
    pub jitter: Duration,
    /// In percent of the interval, drawn likewise.
    pub jitter_percent: u32,
    /// Failures in a row that take a host out.
    pub unhealthy_threshold: u32,
    /// Successes in a row that bring it back.
    pub healthy_threshold: u32,
}

/// What is asked, and which answers are good.
#[derive(Debug)]
pub enum Probe {
    /// An HTTP request.
    Http(HttpProbe),
    /// Bytes over TCP, or only a connection.
    Tcp {
        /// Sent first, if any.
        send: Box<[u8]>,
        /// Each must be found, in this order, in what comes back; none means that the connection is enough.
        receive: Box<[Box<[u8]>]>,
    },
    /// `grpc.health.v1.Health/Check`.
    Grpc {
        /// Service asked for; empty for the whole server.
        service: Box<str>,
        /// `:authority`; the cluster's name when not given.
        authority: Option<Box<str>>,
        /// Sent with each question.
        metadata: Box<[(HeaderName, HeaderValue)]>,
    },
}

/// See [`Probe::Http`].
#[derive(Debug)]
pub struct HttpProbe {
    /// `Host`; the endpoint's or the cluster's name when not given.
    pub host: Option<Box<str>>,
    /// Path and query.
    pub path: http::uri::PathAndQuery,
    /// Method.
    pub method: Method,
    /// Whether HTTP/2 is spoken.
    pub http2: bool,
    /// Fields added to the request.
    pub headers: Box<[(HeaderName, HeaderValue)]>,
    /// Good statuses.
    pub expected: Box<[RangeInclusive<u16>]>,
    /// Bad statuses that count towards the threshold; any other takes the host out at once.
    pub retriable: Box<[RangeInclusive<u16>]>,
    /// Must be found, in this order, in the first bytes of the body.
    pub receive: Box<[Box<[u8]>]>,
    /// How many bytes of the body are looked at.
    pub buffer: usize,
    /// What `x-envoy-upstream-healthchecked-cluster` must say.
    pub service: Option<StringMatch>,
}

/// One active health check.
#[derive(Debug)]
pub struct HealthCheck {
    /// When.
    pub schedule: Schedule,
    /// What.
    pub probe: Probe,
    /// Port to check instead of the one that serves.
    pub port: Option<u16>,
    /// Whether a connection is kept for the next check.
    pub reuse: bool,
}

impl HealthCheck {
    /// Compiles the message.
    pub(crate) fn compile(from: &core::HealthCheck) -> Result<Self, Refusal> {
        let needed = |field: &'static str, value: &Option<_>| -> Result<Duration, Refusal> {
            convert::timeout(value.as_ref())
                .within(field)?
                .ok_or_else(|| Refusal::new(field, "must be longer than zero"))
        };
        let optional = |field: &'static str, value: &Option<_>, absent: Duration| {
            Ok::<_, Refusal>(convert::timeout(value.as_ref()).within(field)?.unwrap_or(absent))
        };
        let threshold = |field: &'static str, value: &Option<UInt32Value>| match value {
            Some(value) => Ok(value.value.max(1)),
            None => Err(Refusal::new(field, "must be given")),
        };
        refuse_present(
            &[
                (
                    "event_logger",
                    !from.event_logger.is_empty()
                        || from.event_service.is_some()
                        || !from.event_log_path.is_empty(),
                ),
                (
                    "transport_socket_match_criteria",
                    from.transport_socket_match_criteria.is_some(),
                ),
                ("tls_options", from.tls_options.is_some()),
            ],
            "is not supported",
        )?;
        let interval = needed("interval", &from.interval)?;
        let unhealthy_interval = optional("unhealthy_interval", &from.unhealthy_interval, interval)?;
        let no_traffic = optional(
            "no_traffic_interval",
            &from.no_traffic_interval,
            DEFAULT_NO_TRAFFIC,
        )?;
        let schedule = Schedule {
            timeout: needed("timeout", &from.timeout)?,
            interval,
            unhealthy_interval,
            unhealthy_edge_interval: optional(
                "unhealthy_edge_interval",
                &from.unhealthy_edge_interval,
                unhealthy_interval,
            )?,
            healthy_edge_interval: optional("healthy_edge_interval", &from.healthy_edge_interval, interval)?,
            no_traffic: (
                optional(
                    "no_traffic_healthy_interval",
                    &from.no_traffic_healthy_interval,
                    no_traffic,
                )?,
                no_traffic,
            ),
            initial_jitter: optional("initial_jitter", &from.initial_jitter, Duration::ZERO)?,
            jitter: optional("interval_jitter", &from.interval_jitter, Duration::ZERO)?,
            jitter_percent: from.interval_jitter_percent.min(1000),
            unhealthy_threshold: threshold("unhealthy_threshold", &from.unhealthy_threshold)?,
            healthy_threshold: threshold("healthy_threshold", &from.healthy_threshold)?,
        };
        let probe = match &from.health_checker {
            Some(pb::HealthChecker::HttpHealthCheck(http)) => {
                Probe::Http(compile_http(http).within("http_health_check")?)
            }
            Some(pb::HealthChecker::TcpHealthCheck(tcp)) => compile_tcp(tcp).within("tcp_health_check")?,
            Some(pb::HealthChecker::GrpcHealthCheck(grpc)) => Probe::Grpc {
                metadata: added_headers(&grpc.initial_metadata, &[], "initial_metadata")
                    .within("grpc_health_check")?,
                service: grpc.service_name.as_str().into(),
                authority: (!grpc.authority.is_empty()).then(|| grpc.authority.as_str().into()),
            },
            Some(pb::HealthChecker::CustomHealthCheck(custom)) => {
                return Err(Refusal::new(
                    "custom_health_check",
                    format!("{:?} is not supported", custom.name),
                ));
            }
            None => return Err(Refusal::new("health_checker", "is missing")),
        };
        let port = from
            .alt_port
            .as_ref()
            .map(|port| u16::try_from(port.value).map_err(|_| Refusal::new("alt_port", "is not a port")))
            .transpose()?;
        Ok(Self {
            schedule,
            probe,
            port,
            reuse: from.reuse_connection.as_ref().is_none_or(|reuse| reuse.value),
        })
    }
}

/// Fields that every request of a check has.
fn added_headers(
    from: &[core::HeaderValueOption],
    removed: &[String],
    field: &str,
) -> Result<Box<[(HeaderName, HeaderValue)]>, Refusal> {
    let mut headers = Vec::new();
    for (index, option) in from.iter().enumerate() {
        let Some(header) = &option.header else { continue };
        if removed.iter().any(|name| name.eq_ignore_ascii_case(&header.key)) {
            continue;
        }
        let bad = |what: &str| Refusal::new(format!("{field}[{index}]"), what.to_owned());
        if header.value.contains('%') {
            return Err(bad("variables are not supported in health checks"));
        }
        headers.push((
            HeaderName::from_bytes(header.key.as_bytes()).map_err(|_| bad("the name is no header name"))?,
            HeaderValue::from_str(&header.value).map_err(|_| bad("the value is no header value"))?,
        ));
    }
    Ok(headers.into())
}

fn compile_http(from: &pb::HttpHealthCheck) -> Result<HttpProbe, Refusal> {
    if from.send.is_some() {
        return Err(Refusal::new("send", "is not supported"));
    }
    let path = http::uri::PathAndQuery::try_from(from.path.as_str())
        .ok()
        .filter(|path| path.as_str().starts_with('/'))
        .ok_or_else(|| Refusal::new("path", format!("{:?} is no path", from.path)))?;
    let method = match core::RequestMethod::try_from(from.method) {
        Ok(core::RequestMethod::MethodUnspecified) => Method::GET,
        Ok(core::RequestMethod::Connect) | Err(_) => {
            return Err(Refusal::new(
                "method",
                "CONNECT and unknown methods cannot be used",
            ));
        }
        Ok(method) => Method::from_bytes(method.as_str_name().as_bytes())
            .map_err(|_| Refusal::new("method", "is unknown"))?,
    };
    let http2 = match envoy_type::CodecClientType::try_from(from.codec_client_type) {
        Ok(envoy_type::CodecClientType::Http1) => false,
        Ok(envoy_type::CodecClientType::Http2) => true,
        _ => {
            return Err(Refusal::new(
                "codec_client_type",
                "only HTTP1 and HTTP2 are supported",
            ));
        }
    };
    let removed = &from.request_headers_to_remove;
    let headers = added_headers(&from.request_headers_to_add, removed, "request_headers_to_add")?;
    let ranges = |field: &'static str, from: &[envoy_type::Int64Range]| {
        from.iter()
            .map(|range| {
                let start = u16::try_from(range.start).ok().filter(|start| *start >= 100);
                // Half open in the message.
                let end = u16::try_from(range.end)
                    .ok()
                    .filter(|end| (101..=600).contains(end));
                match (start, end) {
                    (Some(start), Some(end)) if start < end => Ok(start..=end - 1),
                    _ => Err(Refusal::new(
                        field,
                        format!("[{}, {}) is no range of statuses", range.start, range.end),
                    )),
                }
            })
            .collect::<Result<Box<[_]>, _>>()
    };
    let mut expected = ranges("expected_statuses", &from.expected_statuses)?;
    if expected.is_empty() {
        expected = Box::new([200..=200]);
    }
    Ok(HttpProbe {
        host: (!from.host.is_empty()).then(|| from.host.as_str().into()),
        path,
        method,
        http2,
        headers,
        expected,
        retriable: ranges("retriable_statuses", &from.retriable_statuses)?,
        receive: payloads("receive", &from.receive)?,
        buffer: from
            .response_buffer_size
            .as_ref()
            .map_or(DEFAULT_RESPONSE_BUFFER, |size| (size.value as usize).min(1 << 20)),
        service: from
            .service_name_matcher
            .as_ref()
            .map(StringMatch::compile)
            .transpose()
            .within("service_name_matcher")?,
    })
}

fn compile_tcp(from: &pb::TcpHealthCheck) -> Result<Probe, Refusal> {
    if from.proxy_protocol_config.is_some() {
        return Err(Refusal::new("proxy_protocol_config", "is not supported"));
    }
    let send = from.send.as_ref().map(payload).transpose().within("send")?;
    Ok(Probe::Tcp {
        send: send.unwrap_or_default(),
        receive: payloads("receive", &from.receive)?,
    })
}

fn payloads(field: &'static str, from: &[pb::Payload]) -> Result<Box<[Box<[u8]>]>, Refusal> {
    from.iter().map(|one| payload(one).within(field)).collect()
}

/// Text is hexadecimal, as in Envoy.
fn payload(from: &pb::Payload) -> Result<Box<[u8]>, Refusal> {
    let bad = |text: &str| Refusal::new("text", format!("{text:?} is not hexadecimal"));
    match &from.payload {
        None => Err(Refusal::new("payload", "is missing")),
        Some(pb::payload::Payload::Binary(bytes)) => Ok(bytes.as_slice().into()),
        Some(pb::payload::Payload::Text(text)) => {
            if !text.len().is_multiple_of(2) || !text.is_ascii() {
                return Err(bad(text));
            }
            (0..text.len() / 2)
                .map(|at| u8::from_str_radix(&text[2 * at..2 * at + 2], 16).map_err(|_| bad(text)))
                .collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serin_xds::pb::google::protobuf::Duration as PbDuration;

    pub(crate) fn message(checker: pb::HealthChecker) -> core::HealthCheck {
        let seconds = |seconds| Some(PbDuration { seconds, nanos: 0 });
        core::HealthCheck {
            timeout: seconds(1),
            interval: seconds(10),
            unhealthy_threshold: Some(UInt32Value { value: 3 }),
            healthy_threshold: Some(UInt32Value { value: 2 }),
            health_checker: Some(checker),
            ..Default::default()
        }
    }

    fn http(path: &str) -> pb::HttpHealthCheck {
        pb::HttpHealthCheck {
            path: path.to_owned(),
            ..Default::default()
        }
    }

    #[test]
    fn intervals_that_are_not_given_follow_the_ones_that_are() {
        let check =
            HealthCheck::compile(&message(pb::HealthChecker::HttpHealthCheck(http("/healthz")))).unwrap();
        let ten = Duration::from_secs(10);
        assert_eq!(check.schedule.unhealthy_interval, ten);
        assert_eq!(check.schedule.unhealthy_edge_interval, ten);
        assert_eq!(check.schedule.healthy_edge_interval, ten);
        assert_eq!(check.schedule.no_traffic.1, Duration::from_secs(60));
        let Probe::Http(probe) = check.probe else {
            panic!("not HTTP")
        };
        assert_eq!(&*probe.expected, [200..=200]);
    }

    #[test]
    fn what_a_health_check_lacks_or_cannot_have_is_refused_with_its_path() {
        let mut no_interval = message(pb::HealthChecker::HttpHealthCheck(http("/")));
        no_interval.interval = None;
        let mut statuses = http("/");
        statuses.expected_statuses = vec![envoy_type::Int64Range { start: 300, end: 200 }];
        let hex = pb::TcpHealthCheck {
            send: Some(pb::Payload {
                payload: Some(pb::payload::Payload::Text("0g".into())),
            }),
            ..Default::default()
        };
        for (message, path) in [
            (no_interval, "interval"),
            (
                message(pb::HealthChecker::HttpHealthCheck(http("no slash"))),
                "http_health_check.path",
            ),
            (
                message(pb::HealthChecker::HttpHealthCheck(statuses)),
                "http_health_check.expected_statuses",
            ),
            (
                message(pb::HealthChecker::TcpHealthCheck(hex)),
                "tcp_health_check.send.text",
            ),
        ] {
            assert_eq!(HealthCheck::compile(&message).unwrap_err().path, path);
        }
    }
}
