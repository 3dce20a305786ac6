//! Command operators: what they are called, what they need of a request, what their value is.

use std::borrow::Cow;
use std::sync::Arc;

use http::HeaderName;

use super::super::record::{Record, Side, Wants};
use super::super::time::TimeFormat;
use super::certificates::OfCertificate;
use crate::config::table::strip_port;
use crate::error::Refusal;
use crate::metrics::flags::Flags;
use crate::policy::metadata::{Key, to_json};

/// An operator and the length to which its value is cut.
#[derive(Debug)]
pub struct Operator {
    what: What,
    pub(super) limit: Option<usize>,
}

#[derive(Debug)]
enum Name {
    Method,
    Path,
    Authority,
    Scheme,
    Status,
    Kept(Side, usize),
}

#[derive(Clone, Copy, Debug)]
enum Address {
    Whole,
    WithoutPort,
    Port,
}

#[derive(Debug)]
enum What {
    StartTime(TimeFormat),
    EmitTime(TimeFormat),
    Fields(Box<[Name]>),
    PathWithoutQuery(Box<[Name]>),
    Protocol,
    UpstreamProtocol,
    ResponseCode,
    Details,
    Termination,
    LocalClose,
    DownstreamFailure,
    Kind,
    Flags,
    FlagsLong,
    Received,
    Sent,
    Duration,
    RequestDuration,
    ResponseDuration,
    ResponseTxDuration,
    Attempts,
    UpstreamHost(Address),
    UpstreamLocal(Address),
    VirtualCluster,
    UpstreamCluster,
    UpstreamFailure,
    Route,
    Remote(Address),
    DirectRemote(Address),
    Local(Address),
    ServerName,
    OfCertificate(OfCertificate),
    UpstreamTlsVersion,
    UpstreamTlsCipher,
    UpstreamName(bool),
    Query(Box<str>),
    TlsVersion,
    TlsCipher,
    GrpcStatus(GrpcText),
    Metadata(Key),
    /// As a text, or as JSON.
    State(Box<str>, bool),
    /// A field of an object of the filter state.
    StateField(Box<str>, Box<str>),
    MetadataAll(Box<str>),
    /// Of the endpoint, or of the cluster.
    Configured(Owner, Box<[Box<str>]>),
    RequestId,
    Connection,
    TraceId,
    Fixed(Arc<str>),
    /// Known to Envoy, and here never there.
    Absent,
}

/// Whose metadata.
#[derive(Clone, Copy, Debug)]
enum Owner {
    Endpoint,
    Cluster,
}

#[derive(Clone, Copy, Debug)]
enum GrpcText {
    Camel,
    Snake,
    Number,
}

/// A value of an operator.
pub(super) enum Datum<'a> {
    Absent,
    Text(Cow<'a, str>),
    Number(u64),
    Json(serde_json::Value),
    /// A text that is JSON also within a text.
    Quoted(&'a str),
}

impl<'a> Datum<'a> {
    pub(super) fn text(value: Option<&'a str>) -> Self {
        match value {
            Some(text) if !text.is_empty() => Self::Text(Cow::Borrowed(text)),
            _ => Self::Absent,
        }
    }

    fn millis(value: Option<std::time::Duration>) -> Self {
        value.map_or(Self::Absent, |value| Self::Number(value.as_millis() as u64))
    }
}

/// Reads `NAME(arguments):N%` and what follows it.
pub(super) fn parse_operator<'a>(text: &'a str, wants: &mut Wants) -> Result<(Operator, &'a str), Refusal> {
    let wrong = |reason: &str| {
        let shown: String = text.chars().take(40).collect();
        Refusal::new("", format!("%{shown}: {reason}"))
    };
    let end = text
        .find(|char: char| !(char.is_ascii_uppercase() || char.is_ascii_digit() || char == '_'))
        .unwrap_or(text.len());
    let (name, mut rest) = text.split_at(end);
    if name.is_empty() {
        return Err(wrong("an operator is expected, or %% for a percent sign"));
    }
    let mut arguments = None;
    if let Some(inner) = rest.strip_prefix('(') {
        let close = inner.find(')').ok_or_else(|| wrong("a ) is missing"))?;
        arguments = Some(&inner[..close]);
        rest = &inner[close + 1..];
    }
    let mut limit = None;
    if let Some(after) = rest.strip_prefix(':') {
        let digits = after
            .find(|char: char| !char.is_ascii_digit())
            .unwrap_or(after.len());
        limit = Some(
            after[..digits]
                .parse::<usize>()
                .map_err(|_| wrong("a length is expected after :"))?,
        );
        rest = &after[digits..];
    }
    let rest = rest
        .strip_prefix('%')
        .ok_or_else(|| wrong("a % is missing at the end"))?;
    let what = What::of(name, arguments, wants)?;
    Ok((Operator { what, limit }, rest))
}

/// `A?B` of a field operator: the second one counts where the first is not there.
fn names(
    side: Side,
    arguments: Option<&str>,
    operator: &str,
    wants: &mut Wants,
) -> Result<Box<[Name]>, Refusal> {
    let text = arguments
        .filter(|text| !text.is_empty())
        .ok_or_else(|| Refusal::new("", format!("%{operator}% needs the name of a field")))?;
    let parts: Vec<&str> = text.split('?').collect();
    if parts.len() > 2 {
        return Err(Refusal::new(
            "",
            format!("%{operator}({text})%: more than one alternative"),
        ));
    }
    parts
        .into_iter()
        .map(|part| {
            let lower = part.to_ascii_lowercase();
            Ok(match (side, &*lower) {
                (Side::Request, ":method") => Name::Method,
                (Side::Request, ":path") => Name::Path,
                (Side::Request, ":authority" | "host") => Name::Authority,
                (Side::Request, ":scheme") => Name::Scheme,
                (Side::Response, ":status") => Name::Status,
                (side, name) => {
                    let name = HeaderName::from_bytes(name.as_bytes()).map_err(|_| {
                        Refusal::new("", format!("%{operator}({text})%: {part:?} is not a header name"))
                    })?;
                    Name::Kept(side, wants.field(side, name))
                }
            })
        })
        .collect()
}

impl What {
    fn of(name: &str, arguments: Option<&str>, wants: &mut Wants) -> Result<Self, Refusal> {
        let refused = |reason: &str| Refusal::new("", format!("%{name}%: {reason}"));
        let time = || match arguments {
            None | Some("") => Ok(TimeFormat::rfc3339()),
            Some(format) => TimeFormat::parse(format),
        };
        let takes_none = !matches!(
            name,
            "START_TIME"
                | "EMIT_TIME"
                | "REQ"
                | "REQ_WITHOUT_QUERY"
                | "RESP"
                | "TRAILER"
                | "DYNAMIC_METADATA"
                | "METADATA"
                | "FILTER_STATE"
                | "GRPC_STATUS"
                | "ENVIRONMENT"
                | "UPSTREAM_METADATA"
                | "CLUSTER_METADATA"
                | "PATH"
                | "QUERY_PARAM"
        );
        if let Some(found) = OfCertificate::find(name, arguments)? {
            return Ok(Self::OfCertificate(found));
        }
        if takes_none && arguments.is_some() {
            return Err(refused("takes no argument"));
        }
        Ok(match name {
            "START_TIME" => Self::StartTime(time()?),
            "EMIT_TIME" => Self::EmitTime(time()?),
            "REQ" => Self::Fields(names(Side::Request, arguments, name, wants)?),
            "REQ_WITHOUT_QUERY" => Self::PathWithoutQuery(names(Side::Request, arguments, name, wants)?),
            "RESP" => Self::Fields(names(Side::Response, arguments, name, wants)?),
            "TRAILER" => Self::Fields(names(Side::Trailers, arguments, name, wants)?),
            "PROTOCOL" => Self::Protocol,
            "UPSTREAM_PROTOCOL" => Self::UpstreamProtocol,
            "RESPONSE_CODE" => Self::ResponseCode,
            "RESPONSE_CODE_DETAILS" => Self::Details,
            "CONNECTION_TERMINATION_DETAILS" => Self::Termination,
            "DOWNSTREAM_LOCAL_CLOSE_REASON" => Self::LocalClose,
            "DOWNSTREAM_TRANSPORT_FAILURE_REASON" => Self::DownstreamFailure,
            "RESPONSE_FLAGS" => Self::Flags,
            "RESPONSE_FLAGS_LONG" => Self::FlagsLong,
            "BYTES_RECEIVED" => Self::Received,
            "BYTES_SENT" => Self::Sent,
            "DURATION" => Self::Duration,
            "REQUEST_DURATION" => Self::RequestDuration,
            "RESPONSE_DURATION" => Self::ResponseDuration,
            "RESPONSE_TX_DURATION" => Self::ResponseTxDuration,
            "UPSTREAM_REQUEST_ATTEMPT_COUNT" => Self::Attempts,
            "UPSTREAM_HOST" | "UPSTREAM_REMOTE_ADDRESS" => Self::UpstreamHost(Address::Whole),
            "UPSTREAM_REMOTE_ADDRESS_WITHOUT_PORT" => Self::UpstreamHost(Address::WithoutPort),
            "UPSTREAM_REMOTE_PORT" => Self::UpstreamHost(Address::Port),
            "UPSTREAM_LOCAL_ADDRESS" => Self::UpstreamLocal(Address::Whole),
            "UPSTREAM_LOCAL_ADDRESS_WITHOUT_PORT" => Self::UpstreamLocal(Address::WithoutPort),
            "UPSTREAM_LOCAL_PORT" => Self::UpstreamLocal(Address::Port),
            "VIRTUAL_CLUSTER_NAME" => Self::VirtualCluster,
            "UPSTREAM_CLUSTER" | "UPSTREAM_CLUSTER_RAW" => Self::UpstreamCluster,
            "UPSTREAM_TRANSPORT_FAILURE_REASON" => Self::UpstreamFailure,
            "ROUTE_NAME" => Self::Route,
            "DOWNSTREAM_REMOTE_ADDRESS" => Self::Remote(Address::Whole),
            "DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT" => Self::Remote(Address::WithoutPort),
            "DOWNSTREAM_REMOTE_PORT" => Self::Remote(Address::Port),
            "DOWNSTREAM_DIRECT_REMOTE_ADDRESS" => Self::DirectRemote(Address::Whole),
            "DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT" => Self::DirectRemote(Address::WithoutPort),
            "DOWNSTREAM_DIRECT_REMOTE_PORT" => Self::DirectRemote(Address::Port),
            "DOWNSTREAM_LOCAL_ADDRESS" => Self::Local(Address::Whole),
            "DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT" => Self::Local(Address::WithoutPort),
            "DOWNSTREAM_LOCAL_PORT" => Self::Local(Address::Port),
            "REQUESTED_SERVER_NAME" => Self::ServerName,
            "UPSTREAM_TLS_VERSION" => Self::UpstreamTlsVersion,
            "UPSTREAM_TLS_CIPHER" => Self::UpstreamTlsCipher,
            "UPSTREAM_HOST_NAME" => Self::UpstreamName(true),
            "UPSTREAM_HOST_NAME_WITHOUT_PORT" => Self::UpstreamName(false),
            "QUERY_PARAM" => Self::Query(
                arguments
                    .filter(|name| !name.is_empty())
                    .ok_or_else(|| refused("needs the name of a parameter"))?
                    .into(),
            ),
            "PATH" => {
                let mut parts = arguments.unwrap_or_default().split(':');
                let whole = match parts.next() {
                    None | Some("" | "WQ") => true,
                    Some("NQ") => false,
                    Some(other) => return Err(refused(&format!("{other:?} is none of WQ, NQ"))),
                };
                let fields = match (parts.next(), parts.next()) {
                    (None | Some("" | "ORIG_OR_PATH"), None) => "X-ENVOY-ORIGINAL-PATH?:PATH",
                    (Some("ORIG"), None) => "X-ENVOY-ORIGINAL-PATH",
                    (Some("PATH"), None) => ":PATH",
                    _ => return Err(refused("the second argument is ORIG, PATH or ORIG_OR_PATH")),
                };
                let fields = names(Side::Request, Some(fields), name, wants)?;
                if whole {
                    Self::Fields(fields)
                } else {
                    Self::PathWithoutQuery(fields)
                }
            }
            "DOWNSTREAM_TLS_VERSION" => Self::TlsVersion,
            "DOWNSTREAM_TLS_CIPHER" => Self::TlsCipher,
            "GRPC_STATUS" => Self::GrpcStatus(match arguments {
                None | Some("" | "CAMEL_STRING") => GrpcText::Camel,
                Some("SNAKE_STRING") => GrpcText::Snake,
                Some("NUMBER") => GrpcText::Number,
                Some(other) => {
                    return Err(refused(&format!(
                        "{other:?} is none of CAMEL_STRING, SNAKE_STRING, NUMBER"
                    )));
                }
            }),
            "GRPC_STATUS_NUMBER" => Self::GrpcStatus(GrpcText::Number),
            "DYNAMIC_METADATA" => Self::metadata(arguments).ok_or_else(|| refused("needs a namespace"))?,
            "METADATA" => match arguments.and_then(|text| text.split_once(':')) {
                Some(("DYNAMIC", path)) => {
                    Self::metadata(Some(path)).ok_or_else(|| refused("needs a namespace"))?
                }
                Some(("CLUSTER", path)) => Self::configured(Owner::Cluster, Some(path), &refused)?,
                Some(("UPSTREAM_HOST", path)) => Self::configured(Owner::Endpoint, Some(path), &refused)?,
                _ => {
                    return Err(refused(
                        "only METADATA(DYNAMIC:…), METADATA(CLUSTER:…) and METADATA(UPSTREAM_HOST:…) are supported",
                    ));
                }
            },
            "STREAM_ID" | "UNIQUE_ID" => Self::RequestId,
            "CONNECTION_ID" => Self::Connection,
            "TRACE_ID" => Self::TraceId,
            "HOSTNAME" => Self::Fixed(hostname().into()),
            "ENVIRONMENT" => {
                let variable = arguments
                    .filter(|name| !name.is_empty())
                    .ok_or_else(|| refused("needs a name"))?;
                match std::env::var(variable) {
                    Ok(value) if !value.is_empty() => Self::Fixed(value.into()),
                    _ => Self::Absent,
                }
            }
            "ACCESS_LOG_TYPE" => Self::Kind,
            "FILTER_STATE" => {
                let mut parts = arguments.unwrap_or_default().split(':');
                let key = parts.next().filter(|key| !key.is_empty());
                let key = key.ok_or_else(|| refused("needs a key"))?.into();
                match (parts.next(), parts.next()) {
                    (None | Some("TYPED"), None) => Self::State(key, true),
                    (Some("PLAIN"), None) => Self::State(key, false),
                    (Some("FIELD"), Some(field)) => Self::StateField(key, field.into()),
                    _ => return Err(refused("the key may be followed by PLAIN, TYPED or FIELD:name")),
                }
            }
            "UPSTREAM_METADATA" => Self::configured(Owner::Endpoint, arguments, &refused)?,
            "CLUSTER_METADATA" => Self::configured(Owner::Cluster, arguments, &refused)?,
            _ => return Err(refused("this operator is not supported")),
        })
    }

    /// The same of what is configured.
    fn configured(
        owner: Owner,
        arguments: Option<&str>,
        refused: &impl Fn(&str) -> Refusal,
    ) -> Result<Self, Refusal> {
        let text = arguments.unwrap_or_default();
        if text.is_empty() || text.starts_with(':') {
            return Err(refused("needs a namespace"));
        }
        Ok(Self::Configured(owner, text.split(':').map(Into::into).collect()))
    }

    /// `namespace:key:key`.
    fn metadata(arguments: Option<&str>) -> Option<Self> {
        let mut parts = arguments?.split(':');
        let namespace = parts.next().filter(|name| !name.is_empty())?;
        let path: Box<[Box<str>]> = parts.map(Into::into).collect();
        Some(if path.is_empty() {
            Self::MetadataAll(namespace.into())
        } else {
            Self::Metadata(Key {
                namespace: namespace.into(),
                path,
            })
        })
    }
}

fn hostname() -> String {
    nix::unistd::gethostname()
        .ok()
        .and_then(|name| name.into_string().ok())
        .unwrap_or_default()
}

impl Operator {
    /// The operator's value in a record.
    pub(super) fn value<'a>(&'a self, record: &'a Record<'a>) -> Datum<'a> {
        let text = |value: Option<&'a str>| Datum::text(value);
        let address = |at: std::net::SocketAddr, part: Address| match part {
            Address::Whole => Datum::Text(at.to_string().into()),
            Address::WithoutPort => Datum::Text(at.ip().to_string().into()),
            Address::Port => Datum::Number(u64::from(at.port())),
        };
        match &self.what {
            What::StartTime(format) => {
                let mut out = String::with_capacity(24);
                format.write(record.start, &mut out);
                Datum::Text(out.into())
            }
            What::EmitTime(format) => {
                let mut out = String::with_capacity(24);
                format.write(record.start + record.duration, &mut out);
                Datum::Text(out.into())
            }
            What::Fields(names) => names
                .iter()
                .find_map(|name| name.value(record))
                .map_or(Datum::Absent, Datum::Text),
            What::PathWithoutQuery(names) => {
                names
                    .iter()
                    .find_map(|name| name.value(record))
                    .map_or(Datum::Absent, |path| {
                        let end = path.find('?').unwrap_or(path.len());
                        Datum::Text(path[..end].to_owned().into())
                    })
            }
            What::Protocol => text(Some(record.protocol)),
            What::UpstreamProtocol => text(record.upstream_protocol),
            What::ResponseCode => Datum::Number(u64::from(record.code)),
            What::Details => text(Some(record.details)),
            What::Termination => text(Some(record.termination)),
            What::LocalClose => text(Some(record.local_close)),
            What::DownstreamFailure => text(record.downstream_failure),
            What::Kind => text(Some(record.kind.name())),
            // Envoy: also in fields, where everything else that is not there is left out.
            What::Flags | What::FlagsLong if record.flags.is_empty() => Datum::Text("-".into()),
            What::Flags => Datum::Text(record.flags.to_string().into()),
            What::FlagsLong => Datum::Text(long_names(record.flags).into()),
            What::Received => Datum::Number(record.received),
            What::Sent => Datum::Number(record.sent),
            What::Duration => Datum::millis(Some(record.duration)),
            What::RequestDuration => Datum::millis(record.request),
            What::ResponseDuration => Datum::millis(record.response),
            What::ResponseTxDuration => {
                Datum::millis(record.response.map(|at| record.duration.saturating_sub(at)))
            }
            What::Attempts => Datum::Number(u64::from(record.attempts)),
            What::UpstreamHost(Address::Whole) => text(record.upstream_host),
            What::UpstreamHost(part) => match record.upstream_host.and_then(|host| host.parse().ok()) {
                Some(at) => address(at, *part),
                None => Datum::Absent,
            },
            What::UpstreamLocal(part) => record
                .upstream_local
                .map_or(Datum::Absent, |at| address(at, *part)),
            What::VirtualCluster => text(record.virtual_cluster),
            What::UpstreamCluster => text(record.upstream_cluster),
            What::UpstreamFailure => text(record.upstream_failure),
            What::Route => text(record.route),
            What::Remote(part) => address(record.remote, *part),
            What::DirectRemote(part) => address(record.direct_remote, *part),
            What::Local(part) => address(record.local, *part),
            What::ServerName => text(record.server_name),
            What::OfCertificate(operator) => operator.value(record),
            What::UpstreamTlsVersion => text(record.upstream_tls.map(|tls| tls.version)),
            What::UpstreamTlsCipher => text(record.upstream_tls.map(|tls| tls.cipher)),
            What::UpstreamName(with_port) => match record.upstream_name.filter(|name| !name.is_empty()) {
                Some(name) => text(Some(if *with_port { name } else { strip_port(name) })),
                // Endpoints without a name are called by their address.
                None if *with_port => text(record.upstream_host),
                None => match record.upstream_host.and_then(|host| host.parse().ok()) {
                    Some(at) => address(at, Address::WithoutPort),
                    None => Datum::Absent,
                },
            },
            What::Query(name) => {
                let path = record.kept.path.as_deref().unwrap_or(record.path);
                let query = path.split_once('?').map_or("", |(_, query)| query);
                text(query.split('&').find_map(|pair| {
                    let (key, value) = pair.split_once('=')?;
                    (key == &**name).then_some(value)
                }))
            }
            What::TlsVersion => text(record.tls.map(|(version, _)| version)),
            What::TlsCipher => text(record.tls.map(|(_, cipher)| cipher)),
            What::GrpcStatus(how) => record
                .grpc_status
                .map_or(Datum::Absent, |status| grpc_text(status, *how)),
            What::Metadata(key) => key
                .find(record.metadata)
                .map_or(Datum::Absent, |value| Datum::Json(to_json(value))),
            What::MetadataAll(namespace) => record.metadata.get(namespace).map_or(Datum::Absent, |fields| {
                Datum::Json(crate::policy::metadata::struct_to_json(fields))
            }),
            What::Configured(owner, path) => {
                let metadata = match owner {
                    Owner::Endpoint => record.upstream_metadata,
                    Owner::Cluster => record.cluster_metadata,
                };
                metadata
                    .and_then(|metadata| metadata.find(path))
                    .map_or(Datum::Absent, Datum::Json)
            }
            What::State(key, typed) => match record.metadata.state.get(key) {
                None => Datum::Absent,
                Some(value) if *typed => Datum::Quoted(value),
                Some(value) => Datum::Text(value.into()),
            },
            What::StateField(key, field) => text(record.metadata.state.field(key, field)),
            What::RequestId => text(record.request_id),
            What::Connection => Datum::Number(record.connection),
            What::TraceId => text(record.trace.map(|(id, _)| id)),
            What::Fixed(value) => text(Some(value)),
            What::Absent => Datum::Absent,
        }
    }
}

impl Name {
    fn value<'a>(&self, record: &'a Record<'a>) -> Option<Cow<'a, str>> {
        let some = |text: &'a str| (!text.is_empty()).then_some(Cow::Borrowed(text));
        match self {
            Self::Method => some(record.method),
            Self::Path => some(record.kept.path.as_deref().unwrap_or(record.path)),
            Self::Authority => some(record.kept.authority.as_deref().unwrap_or(record.authority)),
            Self::Scheme => some(record.scheme),
            Self::Status => (record.code > 0).then(|| record.code.to_string().into()),
            Self::Kept(side, index) => record
                .kept
                .field(*side, *index)
                .map(|value| String::from_utf8_lossy(value.as_bytes())),
        }
    }
}

fn grpc_text<'a>(status: u8, how: GrpcText) -> Datum<'a> {
    const NAMES: [(&str, &str); 17] = [
        ("OK", "OK"),
        ("Canceled", "CANCELLED"),
        ("Unknown", "UNKNOWN"),
        ("InvalidArgument", "INVALID_ARGUMENT"),
        ("DeadlineExceeded", "DEADLINE_EXCEEDED"),
        ("NotFound", "NOT_FOUND"),
        ("AlreadyExists", "ALREADY_EXISTS"),
        ("PermissionDenied", "PERMISSION_DENIED"),
        ("ResourceExhausted", "RESOURCE_EXHAUSTED"),
        ("FailedPrecondition", "FAILED_PRECONDITION"),
        ("Aborted", "ABORTED"),
        ("OutOfRange", "OUT_OF_RANGE"),
        ("Unimplemented", "UNIMPLEMENTED"),
        ("Internal", "INTERNAL"),
        ("Unavailable", "UNAVAILABLE"),
        ("DataLoss", "DATA_LOSS"),
        ("Unauthenticated", "UNAUTHENTICATED"),
    ];
    match (how, NAMES.get(usize::from(status))) {
        (GrpcText::Camel, Some((camel, _))) => Datum::Text(Cow::Borrowed(camel)),
        (GrpcText::Snake, Some((_, snake))) => Datum::Text(Cow::Borrowed(snake)),
        _ => Datum::Number(u64::from(status)),
    }
}

/// The long names of flags, in the order of their short ones.
fn long_names(flags: Flags) -> String {
    let short = flags.to_string();
    let names: Vec<&str> = short
        .split(',')
        .map(|code| match code {
            "UF" => "UpstreamConnectionFailure",
            "UH" => "NoHealthyUpstream",
            "NR" => "NoRouteFound",
            "NC" => "NoClusterFound",
            "UT" => "UpstreamRequestTimeout",
            "UC" => "UpstreamConnectionTermination",
            "UR" => "UpstreamRemoteReset",
            "UO" => "UpstreamOverflow",
            "URX" => "UpstreamRetryLimitExceeded",
            "DC" => "DownstreamConnectionTermination",
            "DPE" => "DownstreamProtocolError",
            "UPE" => "UpstreamProtocolError",
            "FI" => "FaultInjected",
            "DI" => "DelayInjected",
            "DT" => "DurationTimeout",
            "SI" => "StreamIdleTimeout",
            "UMSDR" => "UpstreamMaxStreamDurationReached",
            "DO" => "DropOverload",
            "LR" => "LocalReset",
            "DR" => "DownstreamRemoteReset",
            "RL" => "RateLimited",
            "UAEX" => "UnauthorizedExternalService",
            "RLSE" => "RateLimitServiceError",
            "LH" => "FailedLocalHealthCheck",
            "IH" => "InvalidEnvoyRequestHeaders",
            "RFCF" => "ResponseFromCacheFilter",
            "NFCF" => "NoFilterConfigFound",
            "OM" => "OverloadManagerTerminated",
            "DF" => "DnsResolutionFailed",
            "UDO" => "UnconditionalDropOverload",
            other => other,
        })
        .collect();
    names.join(",")
}
