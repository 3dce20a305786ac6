//! Entries of Envoy's access log service (`envoy.service.accesslog.v3`).

use std::collections::HashMap;
use std::time::Duration;

use http::HeaderName;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::data::accesslog::v3 as data;
use serin_xds::pb::envoy::extensions::access_loggers::grpc::v3 as grpc;
use serin_xds::pb::google::protobuf as google;

use super::record::{Record, Side, Wants};
use crate::config::convert;
use crate::error::Refusal;
use crate::metrics::flags::Flags;

/// A field that is kept of a message: its name and its place.
type Kept = (HeaderName, usize);

/// Which fields an HTTP entry tells, compiled.
#[derive(Debug)]
pub struct HttpEntry {
    agent: usize,
    referer: usize,
    forwarded: usize,
    original: usize,
    request: Box<[Kept]>,
    response: Box<[Kept]>,
    trailers: Box<[Kept]>,
}

impl HttpEntry {
    /// Compiles the message.
    pub(super) fn compile(from: &grpc::HttpGrpcAccessLogConfig, wants: &mut Wants) -> Result<Self, Refusal> {
        let mut list = |side: Side, names: &[String], field: &str| {
            names
                .iter()
                .enumerate()
                .map(|(index, name)| {
                    let parsed = HeaderName::from_bytes(name.as_bytes()).map_err(|_| {
                        Refusal::new(
                            format!("{field}[{index}]"),
                            format!("{name:?} is not a header name"),
                        )
                    })?;
                    Ok((parsed.clone(), wants.field(side, parsed)))
                })
                .collect::<Result<Box<[_]>, Refusal>>()
        };
        let request = list(
            Side::Request,
            &from.additional_request_headers_to_log,
            "additional_request_headers_to_log",
        )?;
        let response = list(
            Side::Response,
            &from.additional_response_headers_to_log,
            "additional_response_headers_to_log",
        )?;
        let trailers = list(
            Side::Trailers,
            &from.additional_response_trailers_to_log,
            "additional_response_trailers_to_log",
        )?;
        let mut own = |name: HeaderName| wants.field(Side::Request, name);
        Ok(Self {
            agent: own(http::header::USER_AGENT),
            referer: own(http::header::REFERER),
            forwarded: own(HeaderName::from_static("x-forwarded-for")),
            original: own(HeaderName::from_static("x-envoy-original-path")),
            request,
            response,
            trailers,
        })
    }

    /// The entry of a request.
    pub fn of(&self, record: &Record<'_>) -> data::HttpAccessLogEntry {
        use data::http_access_log_entry::HttpVersion;
        let text = |side: Side, index: usize| {
            record.kept.field(side, index).map_or_else(String::new, |value| {
                String::from_utf8_lossy(value.as_bytes()).into_owned()
            })
        };
        let fields = |side: Side, names: &[Kept]| -> HashMap<String, String> {
            names
                .iter()
                .filter(|(_, index)| record.kept.field(side, *index).is_some())
                .map(|(name, index)| (name.to_string(), text(side, *index)))
                .collect()
        };
        let path = record.kept.path.as_deref().unwrap_or(record.path);
        let original = text(Side::Request, self.original);
        data::HttpAccessLogEntry {
            common_properties: Some(common(record)),
            protocol_version: match record.protocol {
                "HTTP/1.0" => HttpVersion::Http10,
                "HTTP/1.1" => HttpVersion::Http11,
                "HTTP/2" => HttpVersion::Http2,
                _ => HttpVersion::ProtocolUnspecified,
            } as i32,
            request: Some(data::HttpRequestProperties {
                request_method: core::RequestMethod::from_str_name(record.method)
                    .unwrap_or(core::RequestMethod::MethodUnspecified) as i32,
                scheme: record.scheme.to_owned(),
                authority: record.authority.to_owned(),
                path: path.to_owned(),
                original_path: if original.is_empty() && path != record.path {
                    record.path.to_owned()
                } else {
                    original
                },
                user_agent: text(Side::Request, self.agent),
                referer: text(Side::Request, self.referer),
                forwarded_for: text(Side::Request, self.forwarded),
                request_id: record.request_id.unwrap_or("").to_owned(),
                request_body_bytes: record.received,
                request_headers: fields(Side::Request, &self.request),
                ..Default::default()
            }),
            response: Some(data::HttpResponseProperties {
                response_code: (record.code > 0).then(|| google::UInt32Value {
                    value: u32::from(record.code),
                }),
                response_body_bytes: record.sent,
                response_headers: fields(Side::Response, &self.response),
                response_trailers: fields(Side::Trailers, &self.trailers),
                response_code_details: record.details.to_owned(),
                ..Default::default()
            }),
        }
    }
}

/// The entry of a connection.
pub fn tcp(record: &Record<'_>) -> data::TcpAccessLogEntry {
    data::TcpAccessLogEntry {
        common_properties: Some(common(record)),
        connection_properties: Some(data::ConnectionProperties {
            received_bytes: record.received,
            sent_bytes: record.sent,
        }),
    }
}

fn duration(value: Duration) -> Option<google::Duration> {
    Some(google::Duration {
        seconds: value.as_secs() as i64,
        nanos: value.subsec_nanos() as i32,
    })
}

fn common(record: &Record<'_>) -> data::AccessLogCommon {
    let metadata: HashMap<_, _> = record
        .metadata
        .iter()
        .map(|(name, fields)| (name.to_owned(), fields.clone()))
        .collect();
    data::AccessLogCommon {
        sample_rate: 1.0,
        downstream_remote_address: convert::address_of(record.remote),
        downstream_direct_remote_address: convert::address_of(record.direct_remote),
        downstream_local_address: convert::address_of(record.local),
        tls_properties: tls(record),
        start_time: Some(google::Timestamp {
            seconds: record.start.as_secs() as i64,
            nanos: record.start.subsec_nanos() as i32,
        }),
        time_to_last_rx_byte: record.request.and_then(duration),
        time_to_first_upstream_rx_byte: record.response.and_then(duration),
        time_to_last_downstream_tx_byte: duration(record.duration),
        duration: duration(record.duration),
        upstream_remote_address: record
            .upstream_host
            .and_then(|host| host.parse().ok())
            .and_then(convert::address_of),
        upstream_cluster: record.upstream_cluster.unwrap_or("").to_owned(),
        response_flags: (!record.flags.is_empty()).then(|| flags(record.flags)),
        metadata: (!metadata.is_empty()).then(|| core::Metadata {
            filter_metadata: metadata,
            ..Default::default()
        }),
        upstream_transport_failure_reason: record.upstream_failure.unwrap_or("").to_owned(),
        downstream_transport_failure_reason: record.downstream_failure.unwrap_or("").to_owned(),
        route_name: record.route.unwrap_or("").to_owned(),
        upstream_request_attempt_count: record.attempts,
        connection_termination_details: record.termination.to_owned(),
        stream_id: record.request_id.unwrap_or("").to_owned(),
        intermediate_log_entry: record.kind.is_intermediate(),
        access_log_type: record.kind as i32,
        ..Default::default()
    }
}

fn tls(record: &Record<'_>) -> Option<data::TlsProperties> {
    use data::tls_properties::{
        CertificateProperties, TlsVersion,
        certificate_properties::{SubjectAltName, subject_alt_name::San},
    };
    if record.tls.is_none() && record.server_name.is_none() {
        return None;
    }
    Some(data::TlsProperties {
        tls_version: match record.tls.map(|(version, _)| version) {
            Some("TLSv1.2") => TlsVersion::TlSv12,
            Some("TLSv1.3") => TlsVersion::TlSv13,
            _ => TlsVersion::VersionUnspecified,
        } as i32,
        tls_sni_hostname: record.server_name.unwrap_or("").to_owned(),
        peer_certificate_properties: record.peer.map(|peer| CertificateProperties {
            subject_alt_name: peer
                .uri_sans
                .iter()
                .map(|name| San::Uri(name.to_string()))
                .chain(peer.dns_sans.iter().map(|name| San::Dns(name.to_string())))
                .map(|san| SubjectAltName { san: Some(san) })
                .collect(),
            subject: peer.subject.to_owned(),
            ..Default::default()
        }),
        ..Default::default()
    })
}

/// Flags as the service spells them.
fn flags(of: Flags) -> data::ResponseFlags {
    use data::response_flags::{Unauthorized, unauthorized::Reason};
    let has = |flag: Flags| of.has(flag);
    data::ResponseFlags {
        failed_local_healthcheck: has(Flags::FAILED_LOCAL_HEALTH_CHECK),
        no_healthy_upstream: has(Flags::NO_HEALTHY_UPSTREAM),
        upstream_request_timeout: has(Flags::UPSTREAM_TIMEOUT),
        local_reset: has(Flags::LOCAL_RESET),
        upstream_remote_reset: has(Flags::UPSTREAM_RESET),
        upstream_connection_failure: has(Flags::UPSTREAM_CONNECTION_FAILURE),
        upstream_connection_termination: has(Flags::UPSTREAM_CONNECTION_TERMINATION),
        upstream_overflow: has(Flags::UPSTREAM_OVERFLOW),
        no_route_found: has(Flags::NO_ROUTE),
        delay_injected: has(Flags::DELAY_INJECTED),
        fault_injected: has(Flags::FAULT_INJECTED),
        rate_limited: has(Flags::RATE_LIMITED),
        unauthorized_details: has(Flags::UNAUTHORIZED).then_some(Unauthorized {
            reason: Reason::ExternalService as i32,
        }),
        rate_limit_service_error: has(Flags::RATE_LIMIT_SERVICE),
        downstream_connection_termination: has(Flags::DOWNSTREAM_TERMINATION),
        upstream_retry_limit_exceeded: has(Flags::RETRY_LIMIT),
        stream_idle_timeout: has(Flags::STREAM_IDLE),
        invalid_envoy_request_headers: has(Flags::INVALID_ENVOY_HEADERS),
        downstream_protocol_error: has(Flags::DOWNSTREAM_PROTOCOL_ERROR),
        upstream_max_stream_duration_reached: has(Flags::MAX_STREAM_DURATION),
        response_from_cache_filter: has(Flags::FROM_CACHE),
        no_filter_config_found: has(Flags::NO_FILTER_CONFIG),
        duration_timeout: has(Flags::DURATION_TIMEOUT),
        upstream_protocol_error: has(Flags::UPSTREAM_PROTOCOL_ERROR),
        no_cluster_found: has(Flags::NO_CLUSTER),
        overload_manager: has(Flags::OVERLOAD),
        dns_resolution_failure: has(Flags::DNS_FAILURE),
        downstream_remote_reset: has(Flags::DOWNSTREAM_RESET),
    }
}
