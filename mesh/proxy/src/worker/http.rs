//! A downstream HTTP connection: what its requests share, whichever version it speaks (`worker::http1`,
//! `worker::http2`).

use std::cell::{Cell, OnceCell, RefCell};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use http::{HeaderMap, HeaderValue, Version, header};
use tokio::sync::{Notify, oneshot};

use super::alarm::Alarms;
use super::http1::Upgraded;
use super::io::Io;
use super::request::append_via;
use super::{DrainPhase, Worker, http1, http2};
use crate::bell::Ear;
use crate::config::hcm::{HttpManager, ServerHeader};
use crate::config::listener::{Direction, FilterChain};
use crate::http1::violation::Violation;
use crate::metrics::events::{CodecEvent, HttpEvent};
use crate::overload::Action;
use crate::policy::facts::PeerIdentity;
use crate::policy::filter_state::FilterState;
use crate::policy::local_rate_limit::{Buckets, LocalRateLimit};
use crate::policy::metadata::Metadata;
use crate::policy::stats::OpenCount;
use crate::random;
use crate::stream::Layer;
use crate::stream::traces::{Traced, Traces};
use crate::tls::info::ConnectionTls;
use crate::tls::rewind::Rewind;

/// What every request of a connection shares.
pub struct Downstream {
    /// The worker.
    pub worker: Rc<Worker>,
    /// The connection manager.
    pub manager: Arc<HttpManager>,
    /// The filter chain, to notice when it is replaced.
    pub chain: Arc<FilterChain>,
    /// Side.
    pub direction: Direction,
    /// The client.
    pub remote: SocketAddr,
    /// Where the client wanted to go.
    pub local: SocketAddr,
    /// Who connected to us, where that is not the client itself (PROXY protocol).
    pub direct: SocketAddr,
    /// Whether somebody has told where the client wanted to go.
    pub restored: bool,
    /// Number of the connection within the process.
    pub id: u64,
    /// TLS, where the connection has it and we end it.
    pub tls: Option<Arc<ConnectionTls>>,
    /// Server name of the TLS handshake, ours or one that we looked into.
    pub server_name: Option<Box<str>>,
    /// What reading and writing it tells.
    traces: Rc<Traces>,
    /// What is wrong with the head of the present request.
    violation: Cell<Option<Violation>>,
    /// Token buckets of this connection, by the limit that they belong to.
    buckets: RefCell<Vec<(Arc<LocalRateLimit>, Rc<Buckets>)>>,
    /// What requests know of what was set on the connection: its filter state.
    pub noted: Metadata,
    /// For the limits of its requests.
    pub(super) alarms: Alarms,
    remote_text: OnceCell<HeaderValue>,
    /// What the client gets who asks for an upgrade or a tunnel over HTTP/1.
    upgrade: Cell<Option<oneshot::Receiver<Upgraded>>>,
    upgrade_asked: Cell<bool>,
    upgraded: Cell<bool>,
    last: Cell<bool>,
    told_end: Cell<bool>,
    requests: Cell<u32>,
    pub(super) running: Cell<u32>,
    /// A request or a tunnel was on it when it ended.
    pub(super) lost: Cell<bool>,
    /// Counts it as open.
    _counted: OpenCount,
    opened: Instant,
    pub(super) last_used: Cell<Instant>,
    pub(super) finishing: Cell<bool>,
    pub(super) finish: Notify,
}

/// Numbers of connections.
static CONNECTIONS: AtomicU64 = AtomicU64::new(0);
/// Limits for which one connection keeps buckets of its own.
const MAX_OWN_BUCKETS: usize = 64;

impl Downstream {
    /// Who the client is, by its verified certificate.
    pub fn peer_identity(&self) -> Option<PeerIdentity<'_>> {
        self.tls.as_deref().and_then(PeerIdentity::of)
    }

    /// The client's address without its port, as fields have it; written once.
    pub fn remote_text(&self) -> &HeaderValue {
        self.remote_text.get_or_init(|| {
            let text = self.remote.ip().to_canonical().to_string();
            HeaderValue::try_from(text).unwrap_or(HeaderValue::from_static("unknown"))
        })
    }

    /// Server name of the client's TLS handshake.
    pub fn server_name(&self) -> Option<&str> {
        self.server_name.as_deref()
    }

    /// The connection's own buckets of a limit.
    pub fn buckets_of(&self, limit: &Arc<LocalRateLimit>, now_ms: u64) -> Rc<Buckets> {
        let mut all = self.buckets.borrow_mut();
        if let Some((_, buckets)) = all.iter().find(|(owner, _)| Arc::ptr_eq(owner, limit)) {
            return buckets.clone();
        }
        if all.len() >= MAX_OWN_BUCKETS {
            // Only a connection that outlives dozens of route changes gets here.
            all.remove(0);
        }
        let buckets = Rc::new(limit.connection_buckets(now_ms));
        all.push((limit.clone(), buckets.clone()));
        buckets
    }

    /// A request begins.
    pub fn request_began(&self, http2: bool) {
        self.requests.set(self.requests.get().saturating_add(1));
        self.manager.traffic.request_began(http2, self.worker.id);
        self.running.set(self.running.get() + 1);
    }

    /// Something rare has happened to it, or to one of its requests.
    pub fn note(&self, event: HttpEvent) {
        self.manager.traffic.note(event, self.worker.id);
    }

    /// That often has something rare happened in reading or writing its HTTP.
    pub fn note_codec(&self, event: CodecEvent, times: u64) {
        self.manager.traffic.note_codec(event, times, self.worker.id);
    }

    /// How many requests have come so far.
    pub fn request_number(&self) -> u32 {
        self.requests.get()
    }

    /// The present request's head cannot be read: it is refused for that.
    pub(super) fn refuse(&self, violation: Violation) {
        self.violation.set(Some(violation));
    }

    /// What is wrong with the head of the present request, once.
    pub(super) fn take_violation(&self) -> Option<Violation> {
        self.violation.take()
    }

    /// The present request may become a tunnel: that is its client's end.
    pub(super) fn offer_upgrade(&self, later: oneshot::Receiver<Upgraded>) {
        self.upgrade.set(Some(later));
    }

    /// The client's end of the tunnel that the present request may become.
    pub(super) fn take_upgrade(&self) -> Option<oneshot::Receiver<Upgraded>> {
        self.upgrade.take()
    }

    /// The present request asks for an upgrade; who serves the connection waits for [`Self::decide_upgrade`].
    pub fn ask_upgrade(&self) {
        self.upgrade_asked.set(true);
    }

    /// No request follows the present one: what comes after a CONNECT that was refused may be meant for its tunnel.
    pub fn make_last(&self) {
        self.last.set(true);
    }

    /// Answers that, if an upgrade was asked for.
    pub fn decide_upgrade(&self, granted: bool) {
        if self.upgrade_asked.replace(false) {
            self.upgraded.set(granted);
        }
    }

    /// Whether the present request has become a tunnel.
    pub(super) fn take_upgrade_decision(&self) -> bool {
        self.upgrade.take();
        self.upgraded.take()
    }

    /// A request has ended.
    pub fn request_ended(&self, now: Instant) {
        self.running.set(self.running.get().saturating_sub(1));
        self.last_used.set(now);
    }

    /// Whether requests for `authority` belong on this connection. Behind TLS whose chain was chosen by server name a
    /// host that the chain does not name belongs on another one, where other rules may hold (RFC 9110 section 15.5.20).
    pub fn serves(&self, authority: &str) -> bool {
        let names = &self.chain.server_names;
        if self.tls.is_none() || names.is_empty() || authority.is_empty() {
            return true;
        }
        let host = crate::config::table::strip_port(authority);
        names.iter().any(|name| match name.strip_prefix('*') {
            None => name.eq_ignore_ascii_case(host),
            Some(suffix) => {
                host.len() > suffix.len()
                    && host
                        .get(host.len() - suffix.len()..)
                        .is_some_and(|end| end.eq_ignore_ascii_case(suffix))
            }
        })
    }

    /// Whether the connection should end after the present request.
    pub fn should_close(&self) -> bool {
        let limit = self.manager.max_requests_per_connection;
        let overload = &self.worker.shared.overload;
        self.worker.phase() != DrainPhase::Serving
            || overload.hits(Action::DisableHttpKeepalive, random::next)
            || self.chain.is_retired()
            || self.last.get()
            || (limit > 0 && self.requests.get() >= limit)
            || self
                .manager
                .max_connection_duration
                .is_some_and(|limit| self.opened.elapsed() >= limit)
    }

    /// What is left of the time that it may last, where there is a limit.
    pub(super) fn age_left(&self) -> Option<Duration> {
        let limit = self.manager.max_connection_duration?;
        Some(limit.saturating_sub(self.opened.elapsed()))
    }

    /// Counts why the connection should end, once.
    pub(super) fn note_end(&self) {
        if self.told_end.replace(true) {
            return;
        }
        let limit = self.manager.max_requests_per_connection;
        let overload = &self.worker.shared.overload;
        let too_old = self.manager.max_connection_duration;
        if self.worker.phase() != DrainPhase::Serving || self.chain.is_retired() {
            self.note(HttpEvent::CxDrainClose);
        } else if limit > 0 && self.requests.get() >= limit {
            self.note(HttpEvent::CxMaxRequests);
        } else if too_old.is_some_and(|limit| self.opened.elapsed() >= limit) {
            self.note(HttpEvent::CxMaxDuration);
        } else if overload.hits(Action::DisableHttpKeepalive, || 0) {
            self.note(HttpEvent::CxOverload);
        }
    }

    /// Puts what every response carries on one: `server`, and `connection: close` when it is time.
    pub fn dress(&self, headers: &mut HeaderMap, version: Version) {
        match &self.manager.server {
            ServerHeader::Overwrite(value) => {
                headers.insert(header::SERVER, value.clone());
            }
            ServerHeader::AppendIfAbsent(value) => {
                headers.entry(header::SERVER).or_insert_with(|| value.clone());
            }
            ServerHeader::PassThrough => {}
        }
        if let Some(via) = &self.manager.origin.via {
            append_via(headers, via);
        }
        if self.should_close() {
            self.note_end();
            if version == Version::HTTP_2 {
                if !self.finishing.replace(true) {
                    self.finish.notify_one();
                }
            } else {
                headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
        }
    }
}

/// What is known of an accepted connection.
#[derive(Clone, Copy, Debug)]
pub struct Addresses {
    /// The client.
    pub remote: SocketAddr,
    /// Who is connected to us.
    pub direct: SocketAddr,
    /// Where the client wanted to go.
    pub local: SocketAddr,
    /// Whether that is another place than where it is connected to: somebody has told it.
    pub restored: bool,
    /// Number of the connection within the process.
    pub connection: u64,
}

/// The number of a new connection.
pub(super) fn next_connection() -> u64 {
    CONNECTIONS.fetch_add(1, Ordering::Relaxed)
}

/// A connection that speaks HTTP, about to be served.
pub(super) struct Connection {
    /// The worker.
    pub worker: Rc<Worker>,
    /// Its bytes.
    pub stream: Io,
    /// Bytes that were read from it already.
    pub prefix: Vec<u8>,
    /// Whether it speaks HTTP/2.
    pub http2: bool,
    /// The filter chain.
    pub chain: Arc<FilterChain>,
    /// The connection manager.
    pub manager: Arc<HttpManager>,
    /// Side.
    pub direction: Direction,
    /// Who is connected with whom.
    pub addresses: Addresses,
    /// TLS, where the connection has it and we end it.
    pub tls: Option<Arc<ConnectionTls>>,
    /// Server name of the TLS handshake, ours or one that we looked into.
    pub server_name: Option<Box<str>>,
    /// What network filters have set.
    pub state: FilterState,
}

/// Serves a connection to its end.
pub(super) async fn serve(connection: Connection) {
    let Connection {
        worker,
        stream,
        prefix,
        http2,
        chain,
        manager,
        direction,
        addresses,
        tls,
        server_name,
        state,
    } = connection;
    let traces = Traces::counting(manager.traffic.bytes(worker.id), prefix.len());
    let now = Instant::now();
    let mut counted = manager.traffic.open(worker.id);
    manager.traffic.speaks(&mut counted, http2, tls.is_some());
    let conn = Rc::new(Downstream {
        worker,
        manager,
        chain,
        direction,
        remote: addresses.remote,
        local: addresses.local,
        direct: addresses.direct,
        restored: addresses.restored,
        id: addresses.connection,
        tls,
        server_name,
        traces: traces.clone(),
        violation: Cell::new(None),
        buckets: RefCell::default(),
        noted: Metadata::of_connection(state),
        alarms: Alarms::default(),
        remote_text: OnceCell::new(),
        upgrade: Cell::new(None),
        upgrade_asked: Cell::new(false),
        upgraded: Cell::new(false),
        last: Cell::new(false),
        told_end: Cell::new(false),
        requests: Cell::new(0),
        running: Cell::new(0),
        lost: Cell::new(false),
        _counted: counted,
        opened: now,
        last_used: Cell::new(now),
        finishing: Cell::new(false),
        finish: Notify::new(),
    });
    if http2 {
        let stream = Rewind::new(prefix, Traced::over(stream, traces));
        // Boxed: HTTP/1 connections, the idle ones above all, do without its two kilobytes.
        Box::pin(http2::serve(conn, Layer::over(stream, Ear::default()))).await
    } else {
        http1::serve(conn, Traced::over(stream, traces), prefix).await
    }
}

/// Counts the end of a connection, whichever way it comes. One that has become a tunnel goes on as that.
impl Drop for Downstream {
    fn drop(&mut self) {
        let by_client = self.traces.ended_by_client();
        self.note(if by_client {
            HttpEvent::CxDestroyRemote
        } else {
            HttpEvent::CxDestroyLocal
        });
        if self.running.get() > 0 || self.lost.get() {
            self.note(HttpEvent::CxDestroyWithRequest);
            self.note(if by_client {
                HttpEvent::CxDestroyRemoteWithRequest
            } else {
                HttpEvent::CxDestroyLocalWithRequest
            });
        }
    }
}
