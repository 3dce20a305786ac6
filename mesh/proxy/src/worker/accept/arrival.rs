//! Finding out what a connection is: who opened it, where it wanted to go, what it speaks, which filter chain serves it.

use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use socket2::SockRef;
use tokio::net::TcpStream;
use tokio::time::Instant;

use super::chain::{Chosen, HttpConnection, Known};
use super::first_bytes::{read_proxy_header, read_until_detected};
use super::{Closed, Entrance, FIRST_BYTES};
use crate::config::listener::{ConnectionFacts, Handler, Listener, TcpProxy};
use crate::config::listener_filters::{ListenerFilters, ProxyProtocol};
use crate::metrics::events::ListenerEvent;
use crate::metrics::flags::Flags;
use crate::policy::filter_state::FilterState;
use crate::worker::connection_log::ConnectionLog;
use crate::worker::sniff::{Detected, Http};
use crate::worker::{Worker, http, tcp};

/// A connection of which it is not known yet what it is.
struct Arrival<'a> {
    worker: Rc<Worker>,
    /// The listener that serves it, which may be another one than the one that accepted it.
    listener: Arc<Listener>,
    stream: TcpStream,
    /// What was read from it.
    prefix: Vec<u8>,
    /// What that says.
    detected: Detected,
    log: Box<ConnectionLog>,
    entrance: &'a mut Entrance,
}

/// Who speaks first, where a client says nothing for a while.
enum First {
    Client(Detected),
    Server(tcp::Upstream),
}

/// Finds out what a connection is, and serves it unless it is HTTP.
pub(super) async fn classify(
    worker: Rc<Worker>,
    bound: Arc<Listener>,
    stream: TcpStream,
    remote: SocketAddr,
    entrance: &mut Entrance,
) -> Result<Option<HttpConnection>, Closed> {
    // Small messages both ways; failures do no harm.
    let _ = stream.set_nodelay(true);
    let local = stream.local_addr().map_err(|_| Closed)?;
    let mut filters = filters_of(&bound, &worker)?;
    let direct = canonical(remote);
    let own = canonical(local);
    let wanted = if bound.use_original_dst || filters.original_dst {
        original_destination(&stream, own)
    } else {
        own
    };
    let addresses = http::Addresses {
        remote: direct,
        direct,
        local: wanted,
        restored: wanted != own,
        connection: http::next_connection(),
    };
    let mut arrival = Arrival {
        log: ConnectionLog::new(worker.clone(), bound.logs.clone(), addresses),
        worker,
        listener: bound,
        stream,
        prefix: Vec::new(),
        detected: Detected::default(),
        entrance,
    };
    if let Some(rules) = &filters.proxy_protocol {
        arrival.read_proxy_header(rules).await?;
    }
    if let Some(own) = arrival.hand_over()? {
        filters = own;
    }
    let port = arrival.log.addresses.local.port();
    let inspects = filters.inspect_tls.applies(port) || filters.inspect_http.applies(port);
    drop(filters);
    let silent = inspects && arrival.is_silent().await?;
    let chosen = arrival.choose()?;
    arrival.entrance.enter();
    match &chosen.filters.handler {
        Handler::Tcp(proxy) if silent && chosen.chain.tls.is_none() => {
            let proxy = proxy.clone();
            arrival.await_first_word(chosen, proxy).await
        }
        Handler::Tcp(_) | Handler::Http(_) => arrival.known(chosen).enter().await,
    }
}

impl Arrival<'_> {
    /// Takes the addresses out of a PROXY protocol header.
    async fn read_proxy_header(&mut self, rules: &ProxyProtocol) -> Result<(), Closed> {
        let deadline = Instant::now() + self.listener.detection_timeout;
        let noted = &mut self.log.metadata;
        match read_proxy_header(&self.stream, &mut self.prefix, rules, noted, deadline).await {
            Ok(Some((source, told))) => {
                self.log.addresses.remote = source;
                self.log.addresses.local = told;
                self.log.addresses.restored = true;
                Ok(())
            }
            Ok(None) => Ok(()),
            Err(error) => {
                self.note_failure(&error);
                self.log.client_failed(&self.listener, &error);
                Err(Closed)
            }
        }
    }

    /// A listener that is meant by where the client wanted to go takes over from the one that is bound; its filters.
    fn hand_over(&mut self) -> Result<Option<Arc<ListenerFilters>>, Closed> {
        if !self.listener.use_original_dst {
            return Ok(None);
        }
        let virtuals = self.worker.shared.virtual_listeners.load();
        let Some(found) = virtuals.find(self.log.addresses.local) else {
            return Ok(None);
        };
        self.listener = found.clone();
        self.log.follow(self.listener.logs.clone());
        filters_of(&self.listener, &self.worker).map(Some)
    }

    /// Reads until it is known what the connection speaks; whether the client has said nothing at all in the time for that.
    async fn is_silent(&mut self) -> Result<bool, Closed> {
        let deadline = Instant::now() + self.listener.detection_timeout;
        match read_until_detected(&self.stream, &mut self.prefix, deadline).await {
            Ok(Some(found)) => {
                self.detected = found;
                Ok(false)
            }
            Ok(None) => {
                self.entrance.note(ListenerEvent::FilterTimeout);
                if self.listener.continue_on_timeout {
                    return Ok(self.prefix.is_empty());
                }
                self.log.local_close.set("listener_filter_timeout");
                Err(Closed)
            }
            Err(error) => {
                self.note_failure(&error);
                Err(Closed)
            }
        }
    }

    fn note_failure(&self, error: &io::Error) {
        self.entrance.note(match error.kind() {
            io::ErrorKind::TimedOut => ListenerEvent::FilterTimeout,
            io::ErrorKind::UnexpectedEof => ListenerEvent::FilterRemoteClose,
            // What was read is wrong, which is no failure to read (Envoy).
            io::ErrorKind::InvalidData => return,
            _ => ListenerEvent::FilterError,
        });
    }

    /// The chain for the connection and its filters as they are now.
    fn choose(&mut self) -> Result<Chosen, Closed> {
        let detected = &self.detected;
        let addresses = self.log.addresses;
        self.log.server_name = detected.server_name.as_deref().map(Box::from);
        let alpn: Vec<&str> = match detected.http {
            Some(Http::One) => vec!["http/1.1"],
            Some(Http::Two) => vec!["h2c"],
            None => detected.alpn.iter().map(String::as_str).collect(),
        };
        let facts = ConnectionFacts {
            destination: addresses.local,
            source: addresses.remote,
            direct_source: addresses.direct,
            transport: if detected.tls { "tls" } else { "raw_buffer" },
            server_name: detected.server_name.as_deref(),
            application: &alpn,
        };
        let Some(chain) = self.listener.select(&facts).cloned() else {
            self.entrance.note(ListenerEvent::NoFilterChain);
            self.log.flag(Flags::NO_ROUTE);
            self.log
                .tell(&self.listener, "response_code_details", "filter_chain_not_found");
            return Err(Closed);
        };
        match chain.filters() {
            Some(filters) => Ok(Chosen { chain, filters }),
            None => {
                self.listener.without_network_filter.add(self.worker.id);
                self.log.local_close.set("no_filters");
                Err(Closed)
            }
        }
    }

    /// Nobody has spoken. The TCP chain's upstream is asked now, and whoever speaks first decides: a server that greets gets
    /// its TCP connection, a client that was merely slow still gets HTTP, also where nobody answers.
    async fn await_first_word(
        mut self,
        chosen: Chosen,
        proxy: Arc<TcpProxy>,
    ) -> Result<Option<HttpConnection>, Closed> {
        match self.first_word(&proxy).await? {
            First::Client(detected) => {
                self.detected = detected;
                let chosen = self.choose()?;
                self.known(chosen).enter().await
            }
            // What the server has said so far has reached nobody.
            First::Server(upstream) => {
                self.known(chosen).join(proxy, upstream).await?;
                Ok(None)
            }
        }
    }

    async fn first_word(&mut self, proxy: &TcpProxy) -> Result<First, Closed> {
        let Self {
            worker,
            listener,
            stream,
            prefix,
            log,
            ..
        } = self;
        let client = tcp::Client {
            source: log.addresses.remote,
            destination: log.addresses.local,
            tls: None,
            server_name: None,
            by_server_name: false,
            state: &FilterState::EMPTY,
        };
        let greeting = async {
            if let Ok(upstream) = tcp::open(worker, proxy, listener, &client, None).await
                && let Ok(upstream) = upstream.readable().await
            {
                return upstream;
            }
            std::future::pending().await
        };
        tokio::select! {
            biased;
            result = read_until_detected(stream, prefix, Instant::now() + FIRST_BYTES) => match result {
                Ok(Some(found)) => Ok(First::Client(found)),
                Ok(None) | Err(_) => Err(Closed),
            },
            upstream = greeting => Ok(First::Server(upstream)),
            () = worker.closing() => Err(Closed),
        }
    }

    fn known(self, chosen: Chosen) -> Known {
        Known {
            worker: self.worker,
            listener: self.listener,
            chosen,
            stream: self.stream,
            prefix: self.prefix,
            log: self.log,
        }
    }
}

/// The listener's filters as they are now.
fn filters_of(listener: &Listener, worker: &Worker) -> Result<Arc<ListenerFilters>, Closed> {
    listener.before().ok_or_else(|| {
        listener.without_filter.add(worker.id);
        Closed
    })
}

/// Addresses of IPv4 as such, also where they came over a dual-stack socket.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// Where the client wanted to go before interception changed it.
fn original_destination(stream: &TcpStream, local: SocketAddr) -> SocketAddr {
    let socket = SockRef::from(stream);
    // A dual-stack socket with an IPv4 peer must be asked in IPv4's way.
    let answer = if local.is_ipv4() {
        socket.original_dst_v4()
    } else {
        socket.original_dst_v6()
    };
    // Without connection tracking there is no answer, and the destination is the local address.
    answer
        .ok()
        .and_then(|address| address.as_socket())
        .unwrap_or(local)
}
