//! What an operator says of a record.

use std::borrow::Cow;

use super::{Address, Datum, GrpcText, Name, Operator, Owner, What};
use crate::config::table::strip_port;
use crate::metrics::flags::Flags;
use crate::observe::record::Record;
use crate::policy::metadata::to_json;

impl Operator {
    /// The operator's value in a record.
    pub(in crate::observe::format) fn value<'a>(&'a self, record: &'a Record<'a>) -> Datum<'a> {
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
                Some(_) if *typed && let Some(report) = record.metadata.state.reported(key) => {
                    text(report.typed.as_deref())
                }
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
