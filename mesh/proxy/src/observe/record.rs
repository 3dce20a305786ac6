//! What is known of a request when it has ended, and what must be kept of it until then.

use std::net::SocketAddr;
use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue};

use crate::config::convert::EncodedMetadata;
use crate::config::matchers::{HeaderMatch, RequestView};
use crate::metrics::flags::Flags;
use crate::policy::facts::PeerIdentity;
use crate::policy::metadata::Metadata;
use crate::tls::info::ConnectionTls;

/// The fields that the formats and filters of a connection manager name.
#[derive(Debug, Default)]
pub struct Wants {
    request: Vec<HeaderName>,
    response: Vec<HeaderName>,
    trailers: Vec<HeaderName>,
    matchers: Vec<HeaderMatch>,
}

/// Which message a field belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The request's head.
    Request,
    /// The response's head.
    Response,
    /// The response's trailers.
    Trailers,
}

impl Wants {
    /// The place of a field, from now on kept.
    pub fn field(&mut self, side: Side, name: HeaderName) -> usize {
        let list = match side {
            Side::Request => &mut self.request,
            Side::Response => &mut self.response,
            Side::Trailers => &mut self.trailers,
        };
        list.iter().position(|own| *own == name).unwrap_or_else(|| {
            list.push(name);
            list.len() - 1
        })
    }

    /// Whether fields of responses are among them.
    pub fn looks_at_responses(&self) -> bool {
        !(self.response.is_empty() && self.trailers.is_empty())
    }

    /// The place of a matcher's outcome.
    pub fn matcher(&mut self, matcher: HeaderMatch) -> usize {
        self.matchers.push(matcher);
        self.matchers.len() - 1
    }

    fn take(names: &[HeaderName], from: &HeaderMap) -> Box<[Option<HeaderValue>]> {
        names.iter().map(|name| from.get(name).cloned()).collect()
    }

    /// Whether anything of a request's head is wanted.
    pub fn looks_at_requests(&self) -> bool {
        !(self.request.is_empty() && self.matchers.is_empty())
    }

    /// Keeps what is wanted of a request. Called again after the request was changed.
    pub fn keep_request(&self, request: &RequestView<'_>, kept: &mut Kept) {
        kept.request = Self::take(&self.request, request.headers);
        kept.matched = self
            .matchers
            .iter()
            .map(|matcher| matcher.matches(request))
            .collect();
    }

    /// Keeps what is wanted of a response.
    pub fn keep_response(&self, headers: &HeaderMap, kept: &mut Kept) {
        if !self.response.is_empty() {
            kept.response = Self::take(&self.response, headers);
        }
    }

    /// Keeps what is wanted of the trailers.
    pub fn keep_trailers(&self, trailers: &HeaderMap, kept: &mut Kept) {
        if !self.trailers.is_empty() {
            kept.trailers = Self::take(&self.trailers, trailers);
        }
    }
}

/// What was kept.
#[derive(Debug, Default)]
pub struct Kept {
    request: Box<[Option<HeaderValue>]>,
    response: Box<[Option<HeaderValue>]>,
    trailers: Box<[Option<HeaderValue>]>,
    matched: Box<[bool]>,
    /// Path and query as they were sent on, where they were rewritten.
    pub path: Option<Box<str>>,
    /// The authority, where it is not the one that came any more.
    pub authority: Option<Box<str>>,
}

impl Kept {
    /// A kept field.
    pub fn field(&self, side: Side, index: usize) -> Option<&HeaderValue> {
        let list = match side {
            Side::Request => &self.request,
            Side::Response => &self.response,
            Side::Trailers => &self.trailers,
        };
        list.get(index)?.as_ref()
    }

    /// A matcher's outcome.
    pub fn matched(&self, index: usize) -> bool {
        self.matched.get(index).copied().unwrap_or(false)
    }
}

/// Why a line is written; the numbers are those of Envoy's `AccessLogType`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogType {
    /// A connection has reached its upstream.
    TcpUpstreamConnected = 1,
    /// A connection goes on.
    TcpPeriodic = 2,
    /// A connection has ended.
    TcpConnectionEnd = 3,
    /// A request has come.
    DownstreamStart = 4,
    /// A request goes on.
    DownstreamPeriodic = 5,
    /// A request has ended.
    DownstreamEnd = 6,
    /// A tunnel has been granted.
    DownstreamTunnelSuccessfullyEstablished = 10,
}

impl LogType {
    /// Whether what the line is about goes on.
    pub fn is_intermediate(self) -> bool {
        !matches!(self, Self::TcpConnectionEnd | Self::DownstreamEnd)
    }

    /// Envoy's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::TcpUpstreamConnected => "TcpUpstreamConnected",
            Self::TcpPeriodic => "TcpPeriodic",
            Self::TcpConnectionEnd => "TcpConnectionEnd",
            Self::DownstreamStart => "DownstreamStart",
            Self::DownstreamPeriodic => "DownstreamPeriodic",
            Self::DownstreamEnd => "DownstreamEnd",
            Self::DownstreamTunnelSuccessfullyEstablished => "DownstreamTunnelSuccessfullyEstablished",
        }
    }
}

impl<'a> Record<'a> {
    /// Of a connection of which nothing else is known.
    pub fn of_connection(
        kept: &'a Kept,
        metadata: &'a Metadata,
        remote: SocketAddr,
        local: SocketAddr,
    ) -> Self {
        Self {
            kind: LogType::TcpConnectionEnd,
            start: Duration::ZERO,
            duration: Duration::ZERO,
            request: None,
            response: None,
            kept,
            method: "",
            path: "",
            authority: "",
            scheme: "",
            protocol: "",
            upstream_protocol: None,
            request_id: None,
            code: 0,
            details: "",
            termination: "",
            local_close: "",
            downstream_failure: None,
            grpc_status: None,
            flags: Flags::default(),
            received: 0,
            sent: 0,
            attempts: 0,
            upstream_host: None,
            upstream_local: None,
            virtual_cluster: None,
            upstream_cluster: None,
            upstream_failure: None,
            route: None,
            direct_remote: remote,
            remote,
            local,
            server_name: None,
            peer: None,
            downstream_tls: None,
            upstream_tls: None,
            upstream_name: None,
            upstream_metadata: None,
            cluster_metadata: None,
            tls: None,
            metadata,
            connection: 0,
            trace: None,
        }
    }
}

/// See the module. Durations are since the request's head had arrived, or since the connection was accepted.
#[derive(Clone, Copy, Debug)]
pub struct Record<'a> {
    /// Why the line is written.
    pub kind: LogType,
    /// When the request's head had arrived, since 1970.
    pub start: Duration,
    /// How long everything took.
    pub duration: Duration,
    /// Until the request's last byte was read.
    pub request: Option<Duration>,
    /// Until the response's head came from the upstream.
    pub response: Option<Duration>,
    /// Fields and outcomes.
    pub kept: &'a Kept,
    /// `:method`; empty for a TCP connection, as the other parts of a request are.
    pub method: &'a str,
    /// Path and query as the client sent them.
    pub path: &'a str,
    /// Authority.
    pub authority: &'a str,
    /// `http` or `https`.
    pub scheme: &'a str,
    /// `HTTP/1.1` and so on.
    pub protocol: &'a str,
    /// The same towards the upstream.
    pub upstream_protocol: Option<&'a str>,
    /// `x-request-id`.
    pub request_id: Option<&'a str>,
    /// Status; 0 when there was no response.
    pub code: u16,
    /// Why the response is what it is.
    pub details: &'a str,
    /// Why the connection was ended by a policy.
    pub termination: &'a str,
    /// Why the proxy closed the connection.
    pub local_close: &'a str,
    /// Why the client's connection failed.
    pub downstream_failure: Option<&'a str>,
    /// gRPC status.
    pub grpc_status: Option<u8>,
    /// Flags.
    pub flags: Flags,
    /// Body bytes from the client.
    pub received: u64,
    /// Body bytes to the client.
    pub sent: u64,
    /// Attempts.
    pub attempts: u32,
    /// Endpoint.
    pub upstream_host: Option<&'a str>,
    /// Our own end of the connection to it.
    pub upstream_local: Option<SocketAddr>,
    /// The kind of request that it was counted as.
    pub virtual_cluster: Option<&'a str>,
    /// Cluster.
    pub upstream_cluster: Option<&'a str>,
    /// More about a failed connection.
    pub upstream_failure: Option<&'a str>,
    /// Route.
    pub route: Option<&'a str>,
    /// Who opened the connection.
    pub direct_remote: SocketAddr,
    /// The client, by `x-forwarded-for` of a trusted hop.
    pub remote: SocketAddr,
    /// Where it wanted to go.
    pub local: SocketAddr,
    /// Server name of the TLS handshake.
    pub server_name: Option<&'a str>,
    /// The verified peer.
    pub peer: Option<PeerIdentity<'a>>,
    /// TLS of the client's connection.
    pub downstream_tls: Option<&'a ConnectionTls>,
    /// TLS towards the endpoint.
    pub upstream_tls: Option<&'a ConnectionTls>,
    /// The endpoint's name, where it has one.
    pub upstream_name: Option<&'a str>,
    /// The endpoint's metadata.
    pub upstream_metadata: Option<&'a EncodedMetadata>,
    /// The cluster's.
    pub cluster_metadata: Option<&'a EncodedMetadata>,
    /// TLS version and cipher suite.
    pub tls: Option<(&'a str, &'a str)>,
    /// What filters said.
    pub metadata: &'a Metadata,
    /// Number of the connection within the process.
    pub connection: u64,
    /// Trace id, and whether the trace is recorded.
    pub trace: Option<(&'a str, bool)>,
}
