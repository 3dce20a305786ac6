//! Command operators: what they are called, what they need of a request, what their value is.

mod value;

use std::borrow::Cow;
use std::sync::Arc;

use http::HeaderName;

use super::super::record::{Side, Wants};
use super::super::time::TimeFormat;
use super::certificates::OfCertificate;
use crate::error::Refusal;
use crate::policy::metadata::Key;

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

/// Operators that take arguments.
const TAKE_ARGUMENTS: [&str; 15] = [
    "START_TIME",
    "EMIT_TIME",
    "REQ",
    "REQ_WITHOUT_QUERY",
    "RESP",
    "TRAILER",
    "DYNAMIC_METADATA",
    "METADATA",
    "FILTER_STATE",
    "GRPC_STATUS",
    "ENVIRONMENT",
    "UPSTREAM_METADATA",
    "CLUSTER_METADATA",
    "PATH",
    "QUERY_PARAM",
];

impl What {
    fn of(name: &str, arguments: Option<&str>, wants: &mut Wants) -> Result<Self, Refusal> {
        let refused = |reason: &str| Refusal::new("", format!("%{name}%: {reason}"));
        let time = || match arguments {
            None | Some("") => Ok(TimeFormat::rfc3339()),
            Some(format) => TimeFormat::parse(format),
        };
        if let Some(found) = OfCertificate::find(name, arguments)? {
            return Ok(Self::OfCertificate(found));
        }
        if arguments.is_some() && !TAKE_ARGUMENTS.contains(&name) {
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
            "QUERY_PARAM" => {
                let parameter = arguments.filter(|name| !name.is_empty());
                Self::Query(
                    parameter
                        .ok_or_else(|| refused("needs the name of a parameter"))?
                        .into(),
                )
            }
            "PATH" => Self::path(arguments, wants, &refused)?,
            "DOWNSTREAM_TLS_VERSION" => Self::TlsVersion,
            "DOWNSTREAM_TLS_CIPHER" => Self::TlsCipher,
            "GRPC_STATUS" => Self::grpc_status(arguments, &refused)?,
            "GRPC_STATUS_NUMBER" => Self::GrpcStatus(GrpcText::Number),
            "DYNAMIC_METADATA" => Self::metadata(arguments).ok_or_else(|| refused("needs a namespace"))?,
            "METADATA" => Self::metadata_of(arguments, &refused)?,
            "STREAM_ID" | "UNIQUE_ID" => Self::RequestId,
            "CONNECTION_ID" => Self::Connection,
            "TRACE_ID" => Self::TraceId,
            "HOSTNAME" => Self::Fixed(hostname().into()),
            "ENVIRONMENT" => Self::environment(arguments, &refused)?,
            "ACCESS_LOG_TYPE" => Self::Kind,
            "FILTER_STATE" => Self::filter_state(arguments, &refused)?,
            "UPSTREAM_METADATA" => Self::configured(Owner::Endpoint, arguments, &refused)?,
            "CLUSTER_METADATA" => Self::configured(Owner::Cluster, arguments, &refused)?,
            _ => return Err(refused("this operator is not supported")),
        })
    }

    /// `PATH(WQ|NQ:ORIG|PATH|ORIG_OR_PATH)`.
    fn path(
        arguments: Option<&str>,
        wants: &mut Wants,
        refused: &impl Fn(&str) -> Refusal,
    ) -> Result<Self, Refusal> {
        let mut parts = arguments.unwrap_or_default().split(':');
        let kind = match parts.next() {
            None | Some("" | "WQ") => Self::Fields,
            Some("NQ") => Self::PathWithoutQuery,
            Some(other) => return Err(refused(&format!("{other:?} is none of WQ, NQ"))),
        };
        let fields = match (parts.next(), parts.next()) {
            (None | Some("" | "ORIG_OR_PATH"), None) => "X-ENVOY-ORIGINAL-PATH?:PATH",
            (Some("ORIG"), None) => "X-ENVOY-ORIGINAL-PATH",
            (Some("PATH"), None) => ":PATH",
            _ => return Err(refused("the second argument is ORIG, PATH or ORIG_OR_PATH")),
        };
        names(Side::Request, Some(fields), "PATH", wants).map(kind)
    }

    fn grpc_status(arguments: Option<&str>, refused: &impl Fn(&str) -> Refusal) -> Result<Self, Refusal> {
        match arguments {
            None | Some("" | "CAMEL_STRING") => Ok(Self::GrpcStatus(GrpcText::Camel)),
            Some("SNAKE_STRING") => Ok(Self::GrpcStatus(GrpcText::Snake)),
            Some("NUMBER") => Ok(Self::GrpcStatus(GrpcText::Number)),
            Some(other) => Err(refused(&format!(
                "{other:?} is none of CAMEL_STRING, SNAKE_STRING, NUMBER"
            ))),
        }
    }

    /// A variable of the process, which does not change.
    fn environment(arguments: Option<&str>, refused: &impl Fn(&str) -> Refusal) -> Result<Self, Refusal> {
        let variable = arguments.filter(|name| !name.is_empty());
        match std::env::var(variable.ok_or_else(|| refused("needs a name"))?) {
            Ok(value) if !value.is_empty() => Ok(Self::Fixed(value.into())),
            _ => Ok(Self::Absent),
        }
    }

    /// `FILTER_STATE(key:PLAIN|TYPED)` and `FILTER_STATE(key:FIELD:name)`.
    fn filter_state(arguments: Option<&str>, refused: &impl Fn(&str) -> Refusal) -> Result<Self, Refusal> {
        let mut parts = arguments.unwrap_or_default().split(':');
        let key = parts.next().filter(|key| !key.is_empty());
        let key = key.ok_or_else(|| refused("needs a key"))?.into();
        match (parts.next(), parts.next()) {
            (None | Some("TYPED"), None) => Ok(Self::State(key, true)),
            (Some("PLAIN"), None) => Ok(Self::State(key, false)),
            (Some("FIELD"), Some(field)) => Ok(Self::StateField(key, field.into())),
            _ => Err(refused("the key may be followed by PLAIN, TYPED or FIELD:name")),
        }
    }

    /// `METADATA(type:namespace:key)`.
    fn metadata_of(arguments: Option<&str>, refused: &impl Fn(&str) -> Refusal) -> Result<Self, Refusal> {
        match arguments.and_then(|text| text.split_once(':')) {
            Some(("DYNAMIC", path)) => Self::metadata(Some(path)).ok_or_else(|| refused("needs a namespace")),
            Some(("CLUSTER", path)) => Self::configured(Owner::Cluster, Some(path), refused),
            Some(("UPSTREAM_HOST", path)) => Self::configured(Owner::Endpoint, Some(path), refused),
            _ => Err(refused(
                "only METADATA(DYNAMIC:…), METADATA(CLUSTER:…) and METADATA(UPSTREAM_HOST:…) are supported",
            )),
        }
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
