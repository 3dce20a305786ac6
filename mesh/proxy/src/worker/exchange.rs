//! One request and its response: what is remembered from the first byte to the last, and what is recorded then.

use std::borrow::Cow;
use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::uri::Scheme;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Uri, Version};

use super::body::RequestSource;
use super::filters::{self, PolicyState};
use super::http::Downstream;
use super::interim::Waiting;
use super::intervals::Intervals;
use super::logging::{self, LogState};
use super::spans::{self, SpanState};
use super::tap::{self, TapState};
use crate::calendar;
use crate::config::listener::Direction;
use crate::config::virtual_cluster::Counted;
use crate::metrics::events::{ClusterEvent, HttpEvent};
use crate::metrics::flags::Flags;
use crate::metrics::peer::{ServiceIdentity, Workload};
use crate::metrics::series::{HttpLabels, Protocol, Reporter};
use crate::tls::info::ConnectionTls;
use crate::upstream::cluster::{Host, WorkerCluster};

/// By name, so that it is not parsed for every response.
pub(super) static GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");

/// How far an attempt has got.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sent {
    /// It has no connection.
    #[default]
    Not,
    /// It is on a connection of its own.
    Http1,
    /// It is a stream of a connection.
    Http2,
}

/// See the module. Recorded when it is finished, or, if the client goes away, when it is dropped.
pub struct Exchange {
    /// The connection it came on.
    pub conn: Rc<Downstream>,
    /// When its head had arrived.
    pub started: Instant,
    /// The client: who is connected, or whom a trusted hop names (without a port).
    pub remote: SocketAddr,
    /// Whether the client is internal.
    pub internal: bool,
    /// The scheme of the request, `http` or `https`.
    pub scheme: Scheme,
    /// Method.
    pub method: Method,
    /// Target as the client sent it.
    pub uri: Uri,
    /// Authority.
    pub authority: Option<HeaderValue>,
    /// What stands here for its head says nothing: the head could not be read.
    pub headless: bool,
    /// Protocol version of the client.
    pub version: Version,
    /// Whether it is gRPC.
    pub grpc: bool,
    /// `x-request-id`.
    pub request_id: Option<HeaderValue>,
    /// The other workload.
    pub peer: Option<Arc<Workload>>,
    /// The cluster that was chosen.
    pub cluster: Option<Rc<WorkerCluster>>,
    /// Name of the cluster, also when it does not exist.
    pub cluster_name: Option<Arc<str>>,
    /// Name of the cluster of its route, where filters may answer before it is asked for.
    pub routed: Option<Arc<str>>,
    /// The endpoint that answered, or was tried last.
    pub host: Option<Rc<Host>>,
    /// Our own end of the connection to that endpoint.
    pub upstream_local: Option<SocketAddr>,
    /// The kind of request that it is counted as.
    pub virtual_cluster: Option<Arc<Counted>>,
    /// TLS towards that endpoint.
    pub upstream_tls: Option<Arc<ConnectionTls>>,
    /// Name of the route.
    pub route: Option<Arc<crate::config::route::Route>>,
    /// Whether the request has content that has not been read, as long as there is no `source`.
    pub unread: bool,
    /// The request's body.
    pub source: Option<Rc<RefCell<RequestSource>>>,
    /// Where interim answers go to a client over HTTP/2.
    pub interims: Option<Arc<Waiting>>,
    /// Whether its time is the stream's (`max_stream_duration`) and not the route's.
    pub stream_limited: bool,
    /// Whether that is the time that the request itself has asked for its stream.
    pub stream_asked: bool,
    /// Attempts made.
    pub attempts: u32,
    /// Whether the last attempt got as far as a connection.
    pub sent_on: Cell<Sent>,
    /// Flags.
    pub flags: Flags,
    /// Status sent.
    pub code: u16,
    /// gRPC status.
    pub grpc_status: Option<u8>,
    /// Why the response is what it is.
    pub details: Cow<'static, str>,
    /// More about a failure.
    pub failure: Option<Box<str>>,
    /// Bytes of the response body.
    pub sent: u64,
    /// What filters remember.
    pub policy: Option<Box<PolicyState>>,
    /// When the response's head came from the upstream, where an access log may tell.
    pub answered: Option<Instant>,
    /// What access logs keep.
    pub log: Option<Box<LogState>>,
    /// When the next line about it is due, where lines are written while it goes on.
    pub intervals: Option<Box<Intervals>>,
    /// Its place in a trace.
    pub span: Option<Box<SpanState>>,
    /// Where somebody looks at it.
    pub tap: Option<Box<TapState>>,
    finished: bool,
}

impl Exchange {
    /// For a request that has just arrived.
    pub fn new(conn: Rc<Downstream>, method: Method, uri: Uri, version: Version) -> Box<Self> {
        Box::new(Self {
            remote: conn.remote,
            internal: false,
            scheme: Scheme::HTTP,
            intervals: conn
                .manager
                .log_interval
                .map(|interval| Box::new(Intervals::every(interval))),
            conn,
            started: Instant::now(),
            method,
            uri,
            authority: None,
            headless: false,
            version,
            grpc: false,
            request_id: None,
            peer: None,
            cluster: None,
            cluster_name: None,
            routed: None,
            host: None,
            upstream_local: None,
            virtual_cluster: None,
            upstream_tls: None,
            route: None,
            unread: false,
            source: None,
            interims: None,
            stream_limited: false,
            stream_asked: false,
            attempts: 0,
            sent_on: Cell::new(Sent::Not),
            flags: Flags::default(),
            code: 0,
            grpc_status: None,
            details: Cow::Borrowed(""),
            failure: None,
            sent: 0,
            policy: None,
            answered: None,
            log: None,
            span: None,
            tap: None,
            finished: false,
        })
    }

    /// Whether the client has sent the whole request, as far as it was looked at. Otherwise nothing can come after it on an
    /// HTTP/1 connection, since the rest of it is not waited for.
    pub fn is_received(&self) -> bool {
        match &self.source {
            Some(source) => source.borrow().is_whole(),
            None => !self.unread,
        }
    }

    /// Reads a gRPC status from a head or from trailers.
    pub fn note_grpc_status(&mut self, fields: &HeaderMap) {
        if let Some(status) = fields.get(&GRPC_STATUS) {
            self.grpc_status = status.to_str().ok().and_then(|text| text.parse().ok());
        }
    }

    /// Records the exchange as ended now; later calls do nothing.
    pub fn finish(&mut self) {
        self.finish_at(Instant::now());
    }

    pub(super) fn finish_at(&mut self, now: Instant) {
        if std::mem::replace(&mut self.finished, true) {
            return;
        }
        self.intervals = None;
        let conn = self.conn.clone();
        if let Some(source) = &self.source {
            source.borrow_mut().let_go();
        }
        conn.request_ended(now);
        let took = now.saturating_duration_since(self.started);
        conn.manager.traffic.request(self.code, took, conn.worker.id);
        if let Some(cluster) = &self.cluster {
            let cells = cluster.cells(&conn.worker.recorder);
            cells.count(self.code, self.attempts, self.flags, took);
        }
        if let Some(counted) = &self.virtual_cluster {
            counted.count(self.code, took, conn.worker.id);
        }
        if conn.manager.stats && conn.direction != Direction::Unspecified {
            self.record(&conn, took);
        }
        if self.policy.is_some() {
            filters::finish(self);
        }
        // Without configured access logs, errors are told all the same, and whom the proxy itself has refused.
        let told = !self.flags.is_empty() || self.code >= 500 || self.details == "path_normalization_failed";
        if !logging::write(self, took) && told {
            conn.worker.log(self.log_line());
        }
        if self.span.is_some() {
            spans::finish(self);
        }
        if self.tap.is_some() {
            tap::finish(self);
        }
    }

    fn record(&self, conn: &Downstream, took: Duration) {
        let (reporter, peer) = match conn.direction {
            Direction::Inbound => (Reporter::Destination, self.peer.clone()),
            Direction::Outbound | Direction::Unspecified => (
                Reporter::Source,
                self.host.as_ref().and_then(|host| host.endpoint.workload.clone()),
            ),
        };
        let series = conn.worker.recorder.http(&HttpLabels {
            reporter,
            peer: peer.unwrap_or_else(Workload::unknown),
            service: self.service(conn),
            protocol: if self.grpc { Protocol::Grpc } else { Protocol::Http },
            code: self.code,
            grpc_status: self.grpc_status,
            flags: self.flags,
            principals: match reporter {
                Reporter::Destination => conn.tls.as_ref(),
                Reporter::Source => self.upstream_tls.as_ref(),
            }
            .and_then(|tls| tls.principals.clone()),
        });
        series.requests.add(1);
        series.duration.observe_thousandths(took.as_micros() as u64);
        series.request_bytes.observe_thousandths(self.received() * 1000);
        series.response_bytes.observe_thousandths(self.sent * 1000);
    }

    /// Bytes of the request's body.
    pub fn received(&self) -> u64 {
        self.source.as_ref().map_or(0, |source| source.borrow().received)
    }

    fn service(&self, conn: &Downstream) -> Arc<ServiceIdentity> {
        if let Some(cluster) = &self.cluster {
            if let Some(service) = &cluster.config.service {
                return service.clone();
            }
            // Passthrough: Istio names the service after the cluster and the destination after the Host header.
            if !conn.manager.disable_host_fallback
                && let Some(host) = self.authority.as_ref().and_then(|value| value.to_str().ok())
            {
                return ServiceIdentity::new(host, &cluster.slot.name, "");
            }
        }
        ServiceIdentity::unknown()
    }

    /// The method, where it could be read.
    pub fn method_text(&self) -> Option<&str> {
        (!self.headless).then_some(self.method.as_str())
    }

    /// Path and query, where they could be read.
    pub fn path_text(&self) -> Option<&str> {
        let path = self.uri.path_and_query();
        (!self.headless).then(|| path.map_or("/", |path| path.as_str()))
    }

    /// The access log line, with the keys of Istio's JSON format.
    fn log_line(&self) -> String {
        let text = |value: &HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
        serde_json::json!({
            "start_time": rfc3339(self.started),
            "method": self.method_text(),
            "path": self.path_text(),
            "authority": self.authority.as_ref().map(text),
            "protocol": protocol_text(self.version),
            "request_id": self.request_id.as_ref().map(text),
            "response_code": self.code,
            "grpc_status": self.grpc_status,
            "response_flags": self.flags.to_string(),
            "response_code_details": self.details,
            "upstream_transport_failure_reason": self.failure,
            "bytes_received": self.received(),
            "bytes_sent": self.sent,
            "duration": self.started.elapsed().as_millis() as u64,
            "attempts": self.attempts,
            "route_name": self.route.as_ref().map(|route| &*route.name),
            "upstream_cluster": self.cluster_name.as_deref(),
            "upstream_host": self.host.as_ref().map(|host| &*host.endpoint.text),
            "downstream_remote_address": self.remote.to_string(),
            "downstream_local_address": self.conn.local.to_string(),
        })
        .to_string()
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        if !self.finished {
            // Dropped before its end: the request was given up because the client is gone.
            self.conn.note(HttpEvent::RqRxReset);
            if self.version != Version::HTTP_2 {
                self.conn.lost.set(true);
            }
            if let Some(cluster) = &self.cluster {
                match self.sent_on.get() {
                    Sent::Not => cluster.slot.counted.note(ClusterEvent::RqCancelled),
                    // Over HTTP/1 nothing is reset: the connection ends.
                    Sent::Http1 => {}
                    Sent::Http2 => cluster.slot.counted.note(ClusterEvent::RqTxReset),
                }
            }
            self.flags.add(Flags::DOWNSTREAM_TERMINATION);
            if self.details.is_empty() || self.details == "via_upstream" {
                self.details = Cow::Borrowed("downstream_remote_disconnect");
            }
            self.finish();
        }
    }
}

/// `HTTP/1.1` and so on.
pub fn protocol_text(version: Version) -> &'static str {
    match version {
        Version::HTTP_10 => "HTTP/1.0",
        Version::HTTP_2 => "HTTP/2",
        _ => "HTTP/1.1",
    }
}

fn rfc3339(instant: Instant) -> String {
    let at = std::time::SystemTime::now() - instant.elapsed();
    let since = at.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let fraction = format!(".{:03}", since.subsec_millis());
    calendar::rfc3339(since.as_secs() as i64, &fraction)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_in_rfc_3339() {
        let text = rfc3339(Instant::now());
        assert_eq!(text.len(), 24, "{text}");
        assert!(
            text.starts_with("20") && text.ends_with('Z') && text.as_bytes()[10] == b'T',
            "{text}"
        );
    }
}
