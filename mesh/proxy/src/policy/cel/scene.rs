//! Attributes of a request that passes, and of a request or connection that has ended.

use std::borrow::Cow;

use http::HeaderName;

use super::{Attribute, Scene, Value};
use crate::observe::record::{Record, Side};
use crate::policy::facts::Facts;

fn text(value: Option<&str>) -> Option<Value<'_>> {
    value
        .filter(|text| !text.is_empty())
        .map(|text| Value::Text(text.into()))
}

fn name_of(names: Option<&[Box<str>]>) -> Option<Value<'_>> {
    text(names.and_then(|names| names.first()).map(|name| &**name))
}

impl Scene for Facts<'_> {
    fn attribute(&self, attribute: Attribute) -> Option<Value<'_>> {
        let request = self.request.as_ref();
        let field = |name: &str| {
            request
                .and_then(|request| request.headers.get(name))
                .map(|value| Value::Text(String::from_utf8_lossy(value.as_bytes())))
        };
        match attribute {
            Attribute::RequestPath => request.map(|request| match request.query {
                Some(query) => Value::Text(format!("{}?{query}", request.path).into()),
                None => Value::Text(request.path.into()),
            }),
            Attribute::RequestUrlPath => text(request.map(|request| request.path)),
            Attribute::RequestHost => text(request.map(|request| request.authority())),
            Attribute::RequestScheme => text(request.map(|request| request.scheme())),
            Attribute::RequestMethod => text(request.map(|request| request.method)),
            Attribute::RequestQuery => request.map(|request| Value::Text(request.query.unwrap_or("").into())),
            Attribute::RequestReferer => field("referer"),
            Attribute::RequestUserAgent => field("user-agent"),
            Attribute::RequestId => field("x-request-id"),
            Attribute::SourceAddress => Some(Value::Text(self.remote.to_string().into())),
            Attribute::SourcePort => Some(Value::Int(i64::from(self.remote.port()))),
            Attribute::DestinationAddress => Some(Value::Text(self.local.to_string().into())),
            Attribute::DestinationPort => Some(Value::Int(i64::from(self.local.port()))),
            Attribute::ConnectionMtls => Some(Value::Bool(self.peer.is_some())),
            Attribute::ConnectionServerName => Some(Value::Text(self.server_name.unwrap_or("").into())),
            // Over TLS (with a server name) a client without a certificate has an empty one, as in Envoy.
            Attribute::ConnectionSubjectPeer => match (self.peer, self.server_name) {
                (Some(peer), _) => Some(Value::Text(peer.subject.into())),
                (None, Some(_)) => Some(Value::Text("".into())),
                (None, None) => None,
            },
            Attribute::ConnectionDnsSanPeer => name_of(self.peer.map(|peer| peer.dns_sans)),
            Attribute::ConnectionUriSanPeer => name_of(self.peer.map(|peer| peer.uri_sans)),
            Attribute::Metadata => Some(Value::Metadata(self.metadata)),
            Attribute::FilterState => Some(Value::State(&self.metadata.state)),
            // Known at the end only; expressions that ask for these here are refused.
            Attribute::RequestProtocol
            | Attribute::RequestTime
            | Attribute::RequestDuration
            | Attribute::RequestSize
            | Attribute::ResponseCode
            | Attribute::ResponseCodeDetails
            | Attribute::ResponseGrpcStatus
            | Attribute::ResponseSize
            | Attribute::ResponseBackendLatency
            | Attribute::ConnectionId
            | Attribute::ConnectionTlsVersion
            | Attribute::ConnectionTermination
            | Attribute::ConnectionFailure
            | Attribute::UpstreamAddress
            | Attribute::UpstreamPort
            | Attribute::UpstreamLocalAddress
            | Attribute::UpstreamAttempts
            | Attribute::UpstreamFailure
            | Attribute::ClusterName
            | Attribute::RouteName => None,
        }
    }

    fn header(&self, _side: Side, name: &HeaderName, _place: usize) -> Option<Cow<'_, str>> {
        let request = self.request.as_ref()?;
        if *name == http::header::HOST {
            return Some(request.authority().into());
        }
        let mut values = request.headers.get_all(name).iter();
        let first = String::from_utf8_lossy(values.next()?.as_bytes());
        // A field that comes several times is one list.
        Some(values.fold(first, |mut all, value| {
            let all_mut = all.to_mut();
            all_mut.push(',');
            all_mut.push_str(&String::from_utf8_lossy(value.as_bytes()));
            all
        }))
    }

    fn header_names(&self) -> Vec<&str> {
        self.request.as_ref().map_or_else(Vec::new, |request| {
            request.headers.keys().map(HeaderName::as_str).collect()
        })
    }
}

impl Scene for Record<'_> {
    fn attribute(&self, attribute: Attribute) -> Option<Value<'_>> {
        let path = self.path.split_once('?');
        let nanos = |value: std::time::Duration| i64::try_from(value.as_nanos()).ok();
        match attribute {
            Attribute::RequestPath => text(Some(self.path)),
            Attribute::RequestUrlPath => text(Some(path.map_or(self.path, |(path, _)| path))),
            Attribute::RequestQuery if self.path.is_empty() => None,
            Attribute::RequestQuery => Some(Value::Text(path.map_or("", |(_, query)| query).into())),
            Attribute::RequestHost => text(Some(self.authority)),
            Attribute::RequestScheme => text(Some(self.scheme)),
            Attribute::RequestMethod => text(Some(self.method)),
            Attribute::RequestProtocol => text(Some(self.protocol)),
            Attribute::RequestId => text(self.request_id),
            // Kept fields are asked for by place; compiling turns these two into such.
            Attribute::RequestReferer | Attribute::RequestUserAgent => None,
            Attribute::RequestTime => nanos(self.start).map(Value::Timestamp),
            Attribute::RequestDuration => nanos(self.duration).map(Value::Duration),
            Attribute::RequestSize => Some(Value::Int(self.received as i64)),
            Attribute::ResponseCode => (self.code > 0).then_some(Value::Int(i64::from(self.code))),
            Attribute::ResponseCodeDetails => text(Some(self.details)),
            Attribute::ResponseGrpcStatus => self.grpc_status.map(|status| Value::Int(i64::from(status))),
            Attribute::ResponseSize => Some(Value::Int(self.sent as i64)),
            Attribute::ResponseBackendLatency => {
                let (request, response) = self.request.zip(self.response)?;
                nanos(response.saturating_sub(request)).map(Value::Duration)
            }
            Attribute::SourceAddress => Some(Value::Text(self.remote.to_string().into())),
            Attribute::SourcePort => Some(Value::Int(i64::from(self.remote.port()))),
            Attribute::DestinationAddress => Some(Value::Text(self.local.to_string().into())),
            Attribute::DestinationPort => Some(Value::Int(i64::from(self.local.port()))),
            Attribute::ConnectionId => Some(Value::Uint(self.connection)),
            Attribute::ConnectionMtls => Some(Value::Bool(self.peer.is_some())),
            Attribute::ConnectionServerName => Some(Value::Text(self.server_name.unwrap_or("").into())),
            Attribute::ConnectionTlsVersion => text(self.tls.map(|(version, _)| version)),
            Attribute::ConnectionSubjectPeer => text(self.peer.map(|peer| peer.subject)),
            Attribute::ConnectionDnsSanPeer => name_of(self.peer.map(|peer| peer.dns_sans)),
            Attribute::ConnectionUriSanPeer => name_of(self.peer.map(|peer| peer.uri_sans)),
            Attribute::ConnectionTermination => text(Some(self.termination)),
            Attribute::ConnectionFailure => text(self.downstream_failure),
            Attribute::UpstreamAddress => text(self.upstream_host),
            Attribute::UpstreamPort => {
                let at: std::net::SocketAddr = self.upstream_host?.parse().ok()?;
                Some(Value::Int(i64::from(at.port())))
            }
            Attribute::UpstreamLocalAddress => {
                let at = self.upstream_local?;
                Some(Value::Text(at.to_string().into()))
            }
            Attribute::UpstreamAttempts => Some(Value::Uint(u64::from(self.attempts))),
            Attribute::UpstreamFailure => text(self.upstream_failure),
            Attribute::ClusterName => text(self.upstream_cluster),
            Attribute::RouteName => text(self.route),
            Attribute::Metadata => Some(Value::Metadata(self.metadata)),
            Attribute::FilterState => Some(Value::State(&self.metadata.state)),
        }
    }

    fn header(&self, side: Side, _name: &HeaderName, place: usize) -> Option<Cow<'_, str>> {
        self.kept
            .field(side, place)
            .map(|value| String::from_utf8_lossy(value.as_bytes()))
    }
}
