//! The controllers' own metrics: one registry per process, served as OpenMetrics text on `/metrics`.
//!
//! A controller keeps handles to its families ([`prometheus_client`] types, which are shared when cloned), registers them once
//! and sets them where something happens; a scrape costs nobody else anything.
//!
//! Limits: plain HTTP without authentication, so bind it to loopback or to a pod's own network; 16 connections at a time, each
//! for at most 30 s; nothing but GET and HEAD of `/metrics` is answered.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::debug;

pub use prometheus_client;

use crate::Error;

/// Connections at a time; a scraper needs one.
const CONNECTIONS: usize = 16;
/// How long a connection may last.
const CONNECTION_DEADLINE: Duration = Duration::from_secs(30);
/// Pause after `accept` failed (the process is out of file descriptors).
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// What OpenMetrics text is called.
const CONTENT_TYPE: HeaderValue =
    HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");

/// A listening endpoint that does not serve yet.
#[derive(Debug)]
pub struct Endpoint {
    listener: TcpListener,
    address: SocketAddr,
    registry: Arc<Registry>,
}

impl Endpoint {
    /// Listens on an address; port 0 takes a free one.
    pub async fn bind(address: SocketAddr, registry: Registry) -> Result<Self, Error> {
        let refused = |source| Error::Listen { address, source };
        let listener = TcpListener::bind(address).await.map_err(refused)?;
        let address = listener.local_addr().map_err(refused)?;
        Ok(Self {
            listener,
            address,
            registry: Arc::new(registry),
        })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until `cancel` fires.
    pub async fn run(self, cancel: CancellationToken) {
        let permits = Arc::new(Semaphore::new(CONNECTIONS));
        let mut connections = JoinSet::new();
        loop {
            let accepted = tokio::select! {
                () = cancel.cancelled() => return,
                Some(_) = connections.join_next() => continue,
                accepted = async {
                    let permit = permits.clone().acquire_owned().await;
                    (permit, self.listener.accept().await)
                } => accepted,
            };
            // The semaphore is never closed.
            let (Ok(permit), accepted) = accepted else { return };
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    debug!(%error, "accepting a scraper failed");
                    // Nothing tells when there are descriptors again; at once it would spin.
                    tokio::time::sleep(ACCEPT_RETRY).await;
                    continue;
                }
            };
            let registry = self.registry.clone();
            connections.spawn(async move {
                let _permit = permit;
                let service = service_fn(move |request| {
                    let answer = answer(&request, &registry);
                    async move { Ok::<_, Infallible>(answer) }
                });
                let connection = hyper::server::conn::http1::Builder::new()
                    .timer(TokioTimer::new())
                    .serve_connection(TokioIo::new(stream), service);
                // A scraper that breaks off or lingers is its own affair.
                let _ = tokio::time::timeout(CONNECTION_DEADLINE, connection).await;
            });
        }
    }
}

fn answer(request: &Request<Incoming>, registry: &Registry) -> Response<http_body_util::Full<Bytes>> {
    let (status, content_type, text) = match (request.method(), request.uri().path()) {
        (&Method::GET | &Method::HEAD, "/metrics") => {
            let mut text = String::new();
            match prometheus_client::encoding::text::encode(&mut text, registry) {
                Ok(()) => (StatusCode::OK, CONTENT_TYPE, text),
                Err(error) => (
                    StatusCode::INTERNAL_SERVER_ERROR,
                    HeaderValue::from_static("text/plain"),
                    format!("encode the metrics: {error}\n"),
                ),
            }
        }
        (_, "/metrics") => (
            StatusCode::METHOD_NOT_ALLOWED,
            HeaderValue::from_static("text/plain"),
            "only GET\n".to_owned(),
        ),
        _ => (
            StatusCode::NOT_FOUND,
            HeaderValue::from_static("text/plain"),
            "only /metrics is here\n".to_owned(),
        ),
    };
    let mut response = Response::new(http_body_util::Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, content_type);
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use prometheus_client::metrics::counter::Counter;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    async fn get(address: SocketAddr, path: &str) -> String {
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn a_scrape_shows_what_was_counted_and_nothing_else_is_served() {
        let mut registry = Registry::default();
        let counter = Counter::<u64>::default();
        registry.register("things", "Things", counter.clone());
        let endpoint = Endpoint::bind(([127, 0, 0, 1], 0).into(), registry)
            .await
            .unwrap();
        let address = endpoint.address();
        let cancel = CancellationToken::new();
        let task = tokio::spawn(endpoint.run(cancel.clone()));
        counter.inc_by(3);
        let answer = get(address, "/metrics").await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        assert!(
            answer.contains("things_total 3\n") && answer.ends_with("# EOF\n"),
            "{answer}"
        );
        assert!(get(address, "/debug").await.starts_with("HTTP/1.1 404"));
        cancel.cancel();
        task.await.unwrap();
    }

    #[tokio::test]
    async fn an_address_that_is_taken_is_named() {
        let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = taken.local_addr().unwrap();
        let error = Endpoint::bind(address, Registry::default()).await.unwrap_err();
        assert!(error.to_string().contains(&address.to_string()));
    }
}
