//! Tunnels: CONNECT, upgrades (WebSocket), and upgrades over HTTP/2 (extended CONNECT, RFC 8441), from any of these to
//! any other, or to the bytes of a TCP connection.
//!
//! Within the proxy an upgrade is what it is in HTTP/1, a GET that asks for a protocol, so that routes and filters see
//! the same whichever way it came. What differs is at the two ends: how the request is written, which status grants it
//! (101 in HTTP/1 for an upgrade, 2xx everywhere else), and that HTTP/2 does without the handshake of WebSocket's own.

mod counting;

use std::cell::Cell;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;

use aws_lc_rs::digest;
use base64::Engine as _;
use h2::ext::Protocol;
use http::request::Parts;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri, Version, header};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::oneshot;
use tokio_util::either::Either;

use self::counting::Counting;
use super::attempts::{Permit, no_healthy_upstream};
use super::body::{ResponseBody, UpstreamBody};
use super::exchange::Exchange;
use super::http::Downstream;
use super::http1;
use super::incoming::Incoming;
use super::intervals;
use super::local::{Body, LocalReply};
use super::logging;
use super::streams::TunnelIo;
use super::upstream::Plan;
use crate::hygiene::fields::{Present, requested_upgrade, strip_hop_by_hop, strip_present};
use crate::metrics::events::{ClusterEvent, HttpEvent};
use crate::metrics::flags::Flags;
use crate::observe::record::LogType;
use crate::upstream::balance::Wish;
use crate::upstream::cluster::Active;
use crate::upstream::connect::{self, Speaking};
use crate::upstream::metered::Metered;
use crate::upstream::outlier::Event;
use crate::upstream::pool::Lease;

static WEBSOCKET_KEY: HeaderName = HeaderName::from_static("sec-websocket-key");
static WEBSOCKET_ACCEPT: HeaderName = HeaderName::from_static("sec-websocket-accept");
/// Of RFC 6455 section 1.3.
const WEBSOCKET_GUID: &[u8] = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11";
/// What CONNECT is called in `upgrade_configs`, lower case.
pub(crate) const CONNECT: &str = "connect";

/// The client's end of a tunnel over HTTP/2: there once the tunnel is granted. Travels with the request.
#[derive(Clone, Debug)]
pub(super) struct Later(Arc<Mutex<Option<oneshot::Receiver<TunnelIo>>>>);

impl Later {
    /// Who grants it, and what waits for it.
    pub(super) fn new() -> (oneshot::Sender<TunnelIo>, Self) {
        let (granted, later) = oneshot::channel();
        (granted, Self(Arc::new(Mutex::new(Some(later)))))
    }
}

/// The client's end of a tunnel, as each version has it.
#[derive(Debug)]
enum Client {
    Http1(oneshot::Receiver<http1::Upgraded>),
    Http2(oneshot::Receiver<TunnelIo>),
}

impl Client {
    fn take(conn: &Downstream, parts: &mut Parts) -> Option<Self> {
        match parts.extensions.remove::<Later>() {
            Some(later) => later.0.lock().take().map(Self::Http2),
            None => conn.take_upgrade().map(Self::Http1),
        }
    }

    async fn granted(self) -> Option<Either<Box<http1::Upgraded>, Box<TunnelIo>>> {
        match self {
            Self::Http1(later) => Some(Either::Left(Box::new(later.await.ok()?))),
            Self::Http2(later) => Some(Either::Right(Box::new(later.await.ok()?))),
        }
    }
}

/// What a client asks for instead of an answer.
#[derive(Debug)]
pub(super) struct Tunnel {
    /// `connect`, or the protocol of an upgrade.
    protocol: Box<str>,
    /// Whether the client speaks HTTP/2.
    over_http2: bool,
    /// `sec-websocket-key` of the client.
    key: Option<HeaderValue>,
    /// What becomes the client's end of the tunnel.
    client: Option<Client>,
}

/// Whether a CONNECT request may go on to be routed.
pub(super) fn may_connect(conn: &Downstream, parts: &Parts) -> bool {
    if parts.extensions.get::<Protocol>().is_some() {
        return conn.manager.extended_connect;
    }
    conn.manager.connect
}

/// Takes the hop-by-hop fields off; what was asked for instead of an answer, if it may be forwarded.
/// `present` was found in the head as it came.
pub(super) fn take(
    conn: &Downstream,
    parts: &mut Parts,
    present: Present,
) -> Result<Option<Tunnel>, LocalReply> {
    let over_http2 = parts.version == Version::HTTP_2;
    let protocol: Box<str> = if parts.method == Method::CONNECT {
        match parts.extensions.remove::<Protocol>() {
            None => {
                if !over_http2 {
                    conn.ask_upgrade();
                    conn.make_last();
                }
                CONNECT.into()
            }
            Some(protocol) => {
                // From here on it is what it would be in HTTP/1.
                parts.method = Method::GET;
                protocol.as_str().to_ascii_lowercase().into()
            }
        }
    } else if over_http2 {
        strip_present(&mut parts.headers, present);
        return Ok(None);
    } else {
        let asked = present
            .has(Present::HOP)
            .then(|| requested_upgrade(&parts.headers))
            .flatten();
        if asked.is_some() {
            conn.ask_upgrade();
        }
        match asked {
            None => {
                strip_present(&mut parts.headers, present);
                return Ok(None);
            }
            // h2c by upgrade is deprecated (RFC 9113 section 3.1) and may be ignored.
            Some(protocol) if protocol == "h2c" => {
                strip_present(&mut parts.headers, present);
                conn.decide_upgrade(false);
                return Ok(None);
            }
            Some(protocol) => protocol.into(),
        }
    };
    strip_present(&mut parts.headers, present);
    if !conn.manager.upgrades.iter().any(|allowed| **allowed == *protocol) {
        conn.decide_upgrade(false);
        conn.note(HttpEvent::RqNoUpgrade);
        return Err(refused());
    }
    Ok(Some(Tunnel {
        key: parts.headers.get(&WEBSOCKET_KEY).cloned(),
        protocol,
        over_http2,
        client: Client::take(conn, parts),
    }))
}

/// What is inside of an endpoint's tunnel.
pub(super) type Inside = Either<Box<crate::upstream::http1::Tunnel>, Box<TunnelIo>>;

/// The endpoint's end of a tunnel, if it has granted one.
pub(super) fn inside(response: Response<Incoming>) -> Option<Inside> {
    match response.into_body() {
        Incoming::Upgraded(io) => Some(Either::Left(io)),
        Incoming::Tunnel(io) => Some(Either::Right(io)),
        _ => None,
    }
}

/// An upgrade that is not allowed.
pub(super) fn refused() -> LocalReply {
    LocalReply::new(StatusCode::FORBIDDEN, Flags::default(), "upgrade_failed", "")
}

impl Tunnel {
    /// What is asked for, as `upgrade_configs` calls it.
    pub(super) fn protocol(&self) -> &str {
        &self.protocol
    }

    /// Whether it is a plain CONNECT.
    pub(super) fn is_connect(&self) -> bool {
        *self.protocol == *CONNECT
    }

    /// Writes the request as the endpoint's HTTP version has it. `authority` is its host.
    pub(super) fn write(
        &self,
        request: &mut Request<UpstreamBody>,
        http2: bool,
        authority: &str,
        scheme: &str,
    ) {
        let path = request.uri().path_and_query().cloned();
        let of_authority = || Uri::builder().authority(authority).build();
        match (self.is_connect(), http2) {
            (true, _) => {
                *request.method_mut() = Method::CONNECT;
                if let Ok(uri) = of_authority() {
                    *request.uri_mut() = uri;
                }
            }
            (false, true) => {
                *request.method_mut() = Method::CONNECT;
                request.extensions_mut().insert(Protocol::from(&*self.protocol));
                let uri = Uri::builder()
                    .scheme(scheme)
                    .authority(authority)
                    .path_and_query(path.unwrap_or_else(|| http::uri::PathAndQuery::from_static("/")))
                    .build();
                if let Ok(uri) = uri {
                    *request.uri_mut() = uri;
                }
            }
            (false, false) => {
                let headers = request.headers_mut();
                headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
                if let Ok(value) = HeaderValue::from_str(&self.protocol) {
                    headers.insert(header::UPGRADE, value);
                }
                // A client over HTTP/2 has no key; a server over HTTP/1 wants one.
                if self.key.is_none() && *self.protocol == *"websocket" {
                    headers.insert(WEBSOCKET_KEY.clone(), fresh_key());
                }
            }
        }
    }

    /// Whether the endpoint's answer grants it.
    pub(super) fn granted(&self, status: StatusCode, http2: bool) -> bool {
        if self.is_connect() || http2 {
            status.is_success()
        } else {
            status == StatusCode::SWITCHING_PROTOCOLS
        }
    }

    /// The head that tells the client so.
    fn grant(&self, mut headers: HeaderMap) -> Response<Body> {
        let upgrade = headers.get(header::UPGRADE).cloned();
        strip_hop_by_hop(&mut headers);
        // After the head there is no message any more.
        headers.remove(header::CONTENT_LENGTH);
        let mut status = StatusCode::OK;
        let mut version = Version::HTTP_11;
        if self.over_http2 {
            version = Version::HTTP_2;
            if self.key.is_none() {
                headers.remove(&WEBSOCKET_ACCEPT);
            }
        } else if !self.is_connect() {
            status = StatusCode::SWITCHING_PROTOCOLS;
            headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
            if let Some(protocol) = upgrade.or_else(|| HeaderValue::from_str(&self.protocol).ok()) {
                headers.insert(header::UPGRADE, protocol);
            }
            // An endpoint over HTTP/2 does not prove that it read the key.
            if let Some(key) = &self.key
                && !headers.contains_key(&WEBSOCKET_ACCEPT)
            {
                headers.insert(WEBSOCKET_ACCEPT.clone(), accept_of(key));
            }
        }
        let mut response = Response::new(ResponseBody::Full(None));
        *response.status_mut() = status;
        *response.version_mut() = version;
        *response.headers_mut() = headers;
        response
    }

    /// Joins the two ends of a tunnel that an endpoint has granted.
    pub(super) fn join_http(
        self,
        exchange: Box<Exchange>,
        mut response: Response<Incoming>,
        lease: Lease,
        active: Active,
    ) -> Response<Body> {
        let answer = self.grant(std::mem::take(response.headers_mut()));
        let upstream = std::future::ready(inside(response));
        self.join(exchange, answer, upstream, (lease, active))
    }

    /// Grants a CONNECT to the TCP connection of an endpoint (`connect_config`), or says why not.
    pub(super) async fn join_tcp(
        self,
        mut exchange: Box<Exchange>,
        plan: &Plan<'_>,
        permit: Permit,
    ) -> Result<Response<Body>, (Box<Exchange>, LocalReply)> {
        let cluster = plan.cluster;
        let wish = Wish {
            hash: plan.hash,
            criteria: plan.criteria,
            ..Wish::default()
        };
        let Some(host) = cluster.pick(&wish, Some(plan.conn.local)) else {
            return Err((exchange, no_healthy_upstream()));
        };
        exchange.attempts += 1;
        exchange.host = Some(host.clone());
        let active = Active::on(&host);
        let cells = cluster.cells(&plan.conn.worker.recorder);
        let mut connection = cells.clone().connecting(&host.endpoint.state);
        let work = connect::connect(&cluster.config, &host.endpoint, Speaking::Bytes, &plan.options);
        let connected = match tokio::time::timeout(cluster.config.connect_timeout, work).await {
            Ok(Ok(connected)) => connected,
            failed => {
                cluster.record(&host, Event::LocalFailure);
                let counters = plan.conn.worker.recorder.counters();
                counters.upstream_connect_failures.add(1);
                match &failed {
                    Ok(Err(error)) if connect::is_unbound(error) => connection.unbound(),
                    failed => connection.failed(failed.is_err()),
                }
                plan.note(ClusterEvent::RqPendingFailure);
                exchange.failure = Some(match failed {
                    Ok(Err(error)) => error.to_string().into(),
                    _ => "connection timeout".into(),
                });
                let reply = LocalReply::new(
                    StatusCode::SERVICE_UNAVAILABLE,
                    Flags::UPSTREAM_CONNECTION_FAILURE,
                    "upstream_reset_before_response_started{connection_failure}",
                    "upstream connect error or disconnect/reset before headers. reset reason: connection failure",
                );
                return Err((exchange, reply));
            }
        };
        cluster.record(&host, Event::Status(200));
        plan.conn.worker.recorder.counters().upstream_connections.add(1);
        exchange.upstream_tls = connected.tls;
        let answer = self.grant(HeaderMap::new());
        connection.made();
        let stream = Metered::new(connected.stream, cells.clone());
        let upstream = async move { Some(stream) };
        Ok(self.join(exchange, answer, upstream, (active, permit, connection)))
    }

    /// Answers the client, and moves bytes until either side ends. `held` is given up then.
    fn join<U, H>(
        self,
        mut exchange: Box<Exchange>,
        mut answer: Response<Body>,
        upstream: impl Future<Output = Option<U>> + 'static,
        held: H,
    ) -> Response<Body>
    where
        U: AsyncRead + AsyncWrite + Unpin + 'static,
        H: 'static,
    {
        let conn: Rc<Downstream> = exchange.conn.clone();
        conn.decide_upgrade(true);
        exchange.code = answer.status().as_u16();
        exchange.details = "via_upstream".into();
        if self.over_http2 {
            conn.dress(answer.headers_mut(), Version::HTTP_2);
        }
        if conn.manager.logs_tunnels {
            logging::write_meanwhile(&exchange, LogType::DownstreamTunnelSuccessfullyEstablished);
        }
        let downstream = self.client;
        let open = OpenTunnel::of(conn.clone(), self.over_http2);
        let tasks = conn.worker.tasks.clone();
        tasks.spawn_local(async move {
            let sent = Rc::new(Cell::new(0));
            let mut moving = pin!(async {
                let (downstream, upstream) = tokio::join!(async { downstream?.granted().await }, upstream);
                let mut downstream = Counting {
                    stream: downstream?,
                    written: sent.clone(),
                };
                // Whichever side breaks it off ends it.
                let _ = tokio::io::copy_bidirectional(&mut downstream, &mut upstream?).await;
                Some(())
            });
            let mut intervals = exchange.intervals.take();
            loop {
                let ended = tokio::select! {
                    _ = &mut moving => true,
                    () = intervals::due(intervals.as_deref_mut()) => false,
                };
                exchange.sent = sent.get();
                if ended {
                    break;
                }
                intervals::write(&exchange);
            }
            drop((held, open));
            exchange.finish();
        });
        answer
    }
}

/// Counts a tunnel for as long as it lives.
struct OpenTunnel(Rc<Downstream>, bool);

impl OpenTunnel {
    /// `stream` says that it is one stream of a connection that others share.
    fn of(conn: Rc<Downstream>, stream: bool) -> Self {
        conn.note(HttpEvent::CxUpgrades);
        Self(conn, stream)
    }
}

impl Drop for OpenTunnel {
    fn drop(&mut self) {
        self.0.note(HttpEvent::CxUpgradesEnded);
        self.0.lost.set(!self.1 || self.0.lost.get());
    }
}

/// A key for a handshake of ours (RFC 6455 section 4.1): 16 bytes in base64.
fn fresh_key() -> HeaderValue {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&crate::random::next().to_ne_bytes());
    bytes[8..].copy_from_slice(&crate::random::next().to_ne_bytes());
    let text = base64::engine::general_purpose::STANDARD.encode(bytes);
    HeaderValue::try_from(text).unwrap_or(HeaderValue::from_static("AAAAAAAAAAAAAAAAAAAAAA=="))
}

/// What a server answers to a key (RFC 6455 section 4.2.2).
fn accept_of(key: &HeaderValue) -> HeaderValue {
    let mut context = digest::Context::new(&digest::SHA1_FOR_LEGACY_USE_ONLY);
    context.update(key.as_bytes());
    context.update(WEBSOCKET_GUID);
    let text = base64::engine::general_purpose::STANDARD.encode(context.finish());
    HeaderValue::try_from(text).unwrap_or(HeaderValue::from_static(""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_answered_as_rfc_6455_says() {
        let key = HeaderValue::from_static("dGhlIHNhbXBsZSBub25jZQ==");
        assert_eq!(accept_of(&key), "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
        let fresh = base64::engine::general_purpose::STANDARD.decode(fresh_key().as_bytes());
        assert_eq!(fresh.unwrap().len(), 16);
    }

    #[test]
    fn an_upgrade_is_written_and_granted_as_each_version_has_it() {
        let tunnel = |protocol: &str, over_http2: bool, key: Option<&'static str>| Tunnel {
            protocol: protocol.into(),
            over_http2,
            key: key.map(HeaderValue::from_static),
            client: None,
        };
        let written = |tunnel: &Tunnel, http2: bool| {
            let mut request = Request::new(UpstreamBody::Empty);
            *request.uri_mut() = Uri::from_static("/chat?x=1");
            tunnel.write(&mut request, http2, "a:80", "http");
            request
        };
        let websocket = tunnel("websocket", true, None);
        let request = written(&websocket, false);
        assert_eq!(
            (request.method(), request.headers()["upgrade"].as_bytes()),
            (&Method::GET, &b"websocket"[..])
        );
        assert!(request.headers().contains_key("sec-websocket-key"));
        assert!(websocket.granted(StatusCode::SWITCHING_PROTOCOLS, false));
        assert!(!websocket.granted(StatusCode::OK, false));
        let request = written(&websocket, true);
        assert_eq!(
            (request.method(), request.uri().to_string().as_str()),
            (&Method::CONNECT, "http://a:80/chat?x=1")
        );
        assert_eq!(
            request.extensions().get::<Protocol>().unwrap().as_str(),
            "websocket"
        );
        assert!(websocket.granted(StatusCode::OK, true));
        let answer = tunnel("websocket", false, Some("dGhlIHNhbXBsZSBub25jZQ==")).grant(HeaderMap::new());
        assert_eq!(answer.status(), 101);
        assert_eq!(
            answer.headers()["sec-websocket-accept"],
            "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
        );
        let connect = tunnel("connect", false, None);
        assert_eq!(written(&connect, false).uri().to_string(), "a:80");
        assert_eq!(connect.grant(HeaderMap::new()).status(), 200);
    }
}
