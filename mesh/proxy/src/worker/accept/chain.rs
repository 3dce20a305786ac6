//! A connection in its filter chain: its place, its TLS handshake, its network filters, and then its handler.

use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpStream;

use super::first_bytes::read_preface;
use super::{Closed, FIRST_BYTES};
use crate::clock;
use crate::config::hcm::{Codec, HttpManager};
use crate::config::listener::{FilterChain, Handler, Listener, NetworkFilters, TcpProxy};
use crate::config::listener_filters::Taken;
use crate::metrics::events::ListenerEvent;
use crate::metrics::flags::Flags;
use crate::policy::facts::{Facts, PeerIdentity};
use crate::policy::network::NetworkFilter;
use crate::stream::{Layer, Together};
use crate::tls::info::ConnectionTls;
use crate::tls::rewind::Rewind;
use crate::worker::connection_log::ConnectionLog;
use crate::worker::io::{Io, Socket};
use crate::worker::{Worker, http, tcp};

/// The chain of a connection, and its filters as they were when it was chosen.
pub(super) struct Chosen {
    pub(super) chain: Arc<FilterChain>,
    pub(super) filters: Arc<NetworkFilters>,
}

/// A connection that turned out to be HTTP, about to be served.
pub(super) struct HttpConnection {
    connection: http::Connection,
    /// Written when the connection ends, where the listener wants that.
    log: Option<Box<ConnectionLog>>,
    /// Given back when the connection ends.
    place: Option<Taken>,
}

impl HttpConnection {
    pub(super) async fn serve(self) {
        let _ended = (self.log, self.place);
        http::serve(self.connection).await;
    }
}

/// A connection of which is known which chain serves it.
pub(super) struct Known {
    pub(super) worker: Rc<Worker>,
    pub(super) listener: Arc<Listener>,
    pub(super) chosen: Chosen,
    pub(super) stream: TcpStream,
    /// What was read from it.
    pub(super) prefix: Vec<u8>,
    pub(super) log: Box<ConnectionLog>,
}

impl Known {
    /// Does what the chain says; what is HTTP is returned to be served.
    pub(super) async fn enter(self) -> Result<Option<HttpConnection>, Closed> {
        let Self {
            worker,
            listener,
            chosen: Chosen { chain, filters },
            stream,
            mut prefix,
            mut log,
        } = self;
        let addresses = log.addresses;
        let place = take_place(&listener, &filters, &mut log).await?;
        let mut io = shake_hands(&worker, &listener, &chain, stream, &mut prefix, &mut log).await?;
        admit(&worker, &listener, &filters, &mut log).await?;
        match &filters.handler {
            Handler::Tcp(proxy) => {
                log.enter(proxy);
                let _open = tcp::Open::of(proxy, worker.id);
                let (tls, server_name) = (log.tls.clone(), log.server_name.clone());
                let client = tcp::Client {
                    source: addresses.remote,
                    destination: addresses.local,
                    tls: tls.as_deref(),
                    server_name: server_name.as_deref(),
                    by_server_name: filters.by_server_name,
                    state: &log.metadata.state.clone(),
                };
                // A failure has been recorded where it happened; the client sees the connection close.
                if let Ok(upstream) = tcp::open(&worker, proxy, &listener, &client, Some(&mut log)).await {
                    tcp::join(worker, proxy.clone(), io, prefix, upstream, log).await;
                }
                Ok(None)
            }
            Handler::Http(manager) => {
                let direction = listener.direction;
                // Not kept over the life of the connection: the listener may be replaced meanwhile.
                drop(listener);
                let http2 = speaks_http2(&worker, manager, log.tls.as_deref(), &mut io, &mut prefix).await?;
                Ok(Some(HttpConnection {
                    connection: http::Connection {
                        manager: manager.clone(),
                        worker,
                        stream: io,
                        prefix,
                        http2,
                        chain,
                        direction,
                        addresses,
                        tls: log.tls.clone(),
                        server_name: log.server_name.clone(),
                        state: log.metadata.state.clone(),
                    },
                    // Lines of requests are the manager's; those of connections only where the listener wants them.
                    log: log.is_wanted().then_some(log),
                    place,
                }))
            }
        }
    }

    /// Joins a client that has said nothing with a server that has spoken.
    pub(super) async fn join(self, proxy: Arc<TcpProxy>, upstream: tcp::Upstream) -> Result<(), Closed> {
        let Self {
            worker,
            listener,
            chosen,
            stream,
            prefix,
            mut log,
        } = self;
        let _place = take_place(&listener, &chosen.filters, &mut log).await?;
        admit(&worker, &listener, &chosen.filters, &mut log).await?;
        log.enter(&proxy);
        let _open = tcp::Open::of(&proxy, worker.id);
        let stream = Io::Plain(Socket::over(stream, Together));
        tcp::join(worker, proxy, stream, prefix, upstream, log).await;
        Ok(())
    }
}

/// The connection's place in the chain, where places are limited.
async fn take_place(
    listener: &Listener,
    filters: &NetworkFilters,
    log: &mut ConnectionLog,
) -> Result<Option<Taken>, Closed> {
    let Some(limit) = &filters.limit else {
        return Ok(None);
    };
    if let Some(place) = limit.take() {
        return Ok(Some(place));
    }
    log.client_failed(listener, &io::Error::other("connection_limit"));
    tokio::time::sleep(limit.delay).await;
    Err(Closed)
}

/// The TLS handshake, where the chain has one; what it has told is noted in `log`.
async fn shake_hands(
    worker: &Worker,
    listener: &Listener,
    chain: &FilterChain,
    stream: TcpStream,
    prefix: &mut Vec<u8>,
    log: &mut ConnectionLog,
) -> Result<Io, Closed> {
    let stream = Socket::over(stream, Together);
    let Some(context) = &chain.tls else {
        return Ok(Io::Plain(stream));
    };
    match context
        .accept(
            Rewind::new(std::mem::take(prefix), stream),
            chain.handshake_timeout,
        )
        .await
    {
        Ok((stream, facts)) => {
            log.server_name.clone_from(&facts.server_name);
            log.tls = Some(Arc::new(facts));
            Ok(Io::Tls(Box::new(Layer::over(stream, Together))))
        }
        Err(error) => {
            if error.kind() == io::ErrorKind::TimedOut {
                let traffic = &listener.traffic;
                traffic.note_listener(ListenerEvent::HandshakeTimeout, worker.id);
            }
            log.client_failed(listener, &error);
            Err(Closed)
        }
    }
}

/// Whether the chain's network filters let the connection through; a denial is logged, and may take its time.
async fn admit(
    worker: &Worker,
    listener: &Listener,
    filters: &NetworkFilters,
    log: &mut ConnectionLog,
) -> Result<(), Closed> {
    let Err(delay) = judge(worker, listener, filters, log) else {
        return Ok(());
    };
    if let Some(delay) = delay {
        tokio::select! {
            () = tokio::time::sleep(delay) => {}
            () = worker.closing() => {}
        }
    }
    Err(Closed)
}

/// The verdict of the chain's network filters; an error is how long to wait until the connection is closed.
fn judge(
    worker: &Worker,
    listener: &Listener,
    filters: &NetworkFilters,
    log: &mut ConnectionLog,
) -> Result<(), Option<Duration>> {
    let addresses = log.addresses;
    for policy in &filters.policies {
        if let NetworkFilter::SetFilterState(state) = &**policy {
            log.set_state(&state.connected);
            if log.tls.is_some() {
                log.set_state(&state.handshaken);
            }
            continue;
        }
        let facts = Facts {
            direct_remote: addresses.direct,
            source: addresses.remote,
            local: addresses.local,
            server_name: log.server_name.as_deref(),
            peer: log.tls.as_deref().and_then(PeerIdentity::of),
            request: None,
            remote: addresses.remote,
            metadata: &log.metadata,
        };
        let (denied, noted) = policy.judge(&facts, clock::now_ms(), worker.id);
        if let Some(denied) = denied {
            if denied.limited {
                log.flag(Flags::RATE_LIMITED);
            }
            log.termination = denied.details.into();
            log.tell(listener, "connection_termination_details", &log.termination);
            return Err(denied.delay);
        }
        if let Some(noted) = noted {
            log.metadata = noted;
        }
    }
    Ok(())
}

/// Whether the client speaks HTTP/2: by configuration, by what TLS agreed on, or by its first bytes.
async fn speaks_http2(
    worker: &Worker,
    manager: &HttpManager,
    tls: Option<&ConnectionTls>,
    io: &mut Io,
    prefix: &mut Vec<u8>,
) -> Result<bool, Closed> {
    let agreed = tls.and_then(|tls| tls.alpn.as_deref());
    match (manager.codec, agreed) {
        (Codec::Http1, _) => Ok(false),
        (Codec::Http2, _) | (Codec::Auto, Some("h2")) => Ok(true),
        (Codec::Auto, Some("http/1.1" | "http/1.0")) => Ok(false),
        (Codec::Auto, _) => {
            if prefix.is_empty() {
                let wait = manager.idle_timeout.unwrap_or(FIRST_BYTES);
                let read = read_preface(io, prefix, worker, manager.headers_timeout);
                match tokio::time::timeout(wait, read).await {
                    Ok(Ok(())) => {}
                    Ok(Err(_)) | Err(_) => return Err(Closed),
                }
            }
            Ok(prefix.starts_with(b"PRI * HTTP/2"))
        }
    }
}
