//! Admin, readiness and Prometheus ports, served on the control thread.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::Proxy;
use crate::config::listener::Handler;
use crate::error::Error;
use crate::metrics::text;
use crate::worker::DrainPhase;

/// Connections to one of these ports at a time.
const MAX_CONNECTIONS: usize = 64;
/// Limit for a request head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);

/// What a port shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Port {
    /// Everything, and the switches.
    Admin,
    /// `/stats/prometheus` only.
    Prometheus,
    /// `/healthz/ready` only.
    Ready,
}

/// A bound port.
#[derive(Debug)]
pub struct AdminPort {
    listener: TcpListener,
    port: Port,
}

impl AdminPort {
    /// Binds it, or takes the socket of the process before this one; must be called within a runtime.
    pub fn bind(proxy: &Proxy, address: SocketAddr, port: Port) -> Result<Self, Error> {
        let name = format!("{port:?}").to_lowercase();
        let listener = proxy
            .own_socket(&format!("{name} port"), address)
            .and_then(TcpListener::from_std)
            .map_err(|source| Error::Bind {
                name,
                address,
                source,
            })?;
        Ok(Self { listener, port })
    }

    /// Where it listens.
    pub fn address(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until cancelled.
    pub async fn serve(self, proxy: Arc<Proxy>, quit: CancellationToken, cancel: CancellationToken) {
        let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let tasks = TaskTracker::new();
        loop {
            let Ok(permit) = permits.clone().acquire_owned().await else {
                return;
            };
            let accepted = tokio::select! {
                () = cancel.cancelled() => break,
                accepted = self.listener.accept() => accepted,
            };
            let Ok((stream, _)) = accepted else {
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            };
            let (proxy, quit, cancel, port) = (proxy.clone(), quit.clone(), cancel.clone(), self.port);
            tasks.spawn(async move {
                let service = service_fn(move |request| {
                    let (proxy, quit) = (proxy.clone(), quit.clone());
                    async move { Ok::<_, std::convert::Infallible>(answer(&proxy, port, &quit, &request).await) }
                });
                let connection = hyper::server::conn::http1::Builder::new()
                    .timer(TokioTimer::new())
                    .header_read_timeout(HEAD_TIMEOUT)
                    .serve_connection(TokioIo::new(stream), service);
                tokio::select! {
                    // A client that breaks off concerns nobody.
                    _ = connection => {}
                    () = cancel.cancelled() => {}
                }
                drop(permit);
            });
        }
        tasks.close();
        tasks.wait().await;
    }
}

fn reply(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, http::HeaderValue::from_static(content_type));
    response
}

fn plain(status: StatusCode, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    reply(status, "text/plain; charset=utf-8", body)
}

fn json_reply(value: &serde_json::Value) -> Response<Full<Bytes>> {
    reply(StatusCode::OK, "application/json", format!("{value:#}\n"))
}

async fn answer(
    proxy: &Arc<Proxy>,
    port: Port,
    quit: &CancellationToken,
    request: &Request<Incoming>,
) -> Response<Full<Bytes>> {
    let path = request.uri().path();
    let ready = || {
        if proxy.is_ready() {
            return plain(StatusCode::OK, "LIVE\n");
        }
        let missing = proxy.store(|store| store.cold());
        let shown: Vec<_> = missing.iter().take(20).cloned().collect();
        plain(
            StatusCode::SERVICE_UNAVAILABLE,
            format!("not ready; waiting for: {}\n", shown.join(", ")),
        )
    };
    let allowed = match port {
        Port::Admin => true,
        Port::Prometheus => path == "/stats/prometheus",
        Port::Ready => path == "/healthz/ready",
    };
    if !allowed {
        return plain(StatusCode::NOT_FOUND, "not found\n");
    }
    let post = request.method() == Method::POST;
    match path {
        "/ready" | "/healthz/ready" => ready(),
        "/stats/prometheus" | "/metrics" => {
            reply(StatusCode::OK, text::CONTENT_TYPE, text::write(&proxy.metrics()))
        }
        "/stats" => plain(StatusCode::OK, text::write(&proxy.metrics())),
        "/config_dump" => json_reply(&config_dump(proxy)),
        "/certs" => {
            let now = rustls_pki_types::UnixTime::now().as_secs();
            let now = i64::try_from(now).unwrap_or(i64::MAX);
            json_reply(&proxy.store(|store| super::certs::certs(store.secrets(), now)))
        }
        "/clusters" => reply(StatusCode::OK, "text/plain; charset=utf-8", clusters(proxy)),
        "/listeners" => plain(StatusCode::OK, listeners(proxy)),
        "/server_info" => json_reply(&server_info(proxy)),
        "/drain_listeners" | "/quitquitquit" | "/reopen_logs" if !post => plain(
            StatusCode::METHOD_NOT_ALLOWED,
            "use POST for what changes something\n",
        ),
        "/reopen_logs" => {
            proxy.store(|store| store.reopen_logs());
            plain(StatusCode::OK, "OK\n")
        }
        "/drain_listeners" => {
            let graceful = request
                .uri()
                .query()
                .is_some_and(|query| query.contains("graceful"));
            proxy
                .drain(if graceful {
                    DrainPhase::Discouraging
                } else {
                    DrainPhase::Closing
                })
                .await;
            plain(StatusCode::OK, "OK\n")
        }
        "/quitquitquit" => {
            quit.cancel();
            plain(StatusCode::OK, "OK\n")
        }
        "/" | "/help" => plain(
            StatusCode::OK,
            "/ready\n/stats\n/stats/prometheus\n/config_dump\n/certs\n/clusters\n/listeners\n/server_info\n\
             POST /drain_listeners[?graceful]\nPOST /reopen_logs\nPOST /quitquitquit\n",
        ),
        _ => plain(StatusCode::NOT_FOUND, "not found; see /help\n"),
    }
}

fn server_info(proxy: &Proxy) -> serde_json::Value {
    json!({
        "version": concat!("serin-proxy/", env!("CARGO_PKG_VERSION")),
        "state": if proxy.is_ready() { "LIVE" } else { "PRE_INITIALIZING" },
        "node": { "id": proxy.node.id, "cluster": proxy.node.cluster },
    })
}

fn config_dump(proxy: &Proxy) -> serde_json::Value {
    proxy.store(|store| {
        let clusters: Vec<_> = store
            .clusters()
            .filter_map(|slot| {
                let config = slot.config()?;
                Some(json!({
                    "name": &*slot.name,
                    "discovery": format!("{:?}", config.discovery),
                    "lb_policy": format!("{:?}", config.lb),
                    "endpoints": slot.endpoints().map_or(0, |set| set.all.len()),
                }))
            })
            .collect();
        let listeners: Vec<_> = store
            .listeners()
            .map(|listener| {
                let chains: Vec<_> = listener
                    .all_chains()
                    .map(|chain| match &chain.handler {
                        Handler::Http(manager) => json!({
                            "name": &*chain.name,
                            "http": manager.rds_name().as_deref().unwrap_or("inline"),
                        }),
                        Handler::Tcp(_) => json!({ "name": &*chain.name, "tcp": true }),
                    })
                    .collect();
                json!({
                    "name": &*listener.name,
                    "address": listener.address.to_string(),
                    "bound": listener.bind,
                    "filter_chains": chains,
                })
            })
            .collect();
        let routes: Vec<_> = store
            .routes()
            .map(|(name, table, hosts)| json!({ "name": &**name, "live": table.is_some(), "virtual_hosts": hosts }))
            .collect();
        json!({ "clusters": clusters, "listeners": listeners, "routes": routes })
    })
}

fn clusters(proxy: &Proxy) -> String {
    use std::fmt::Write;
    use std::sync::atomic::Ordering;
    let now = crate::clock::now_ms();
    proxy.store(|store| {
        let mut out = String::new();
        for slot in store.clusters() {
            let Some(set) = slot.endpoints() else {
                let _ = writeln!(out, "{}::no endpoints yet", slot.name);
                continue;
            };
            let checks = slot.config().map_or(0, |config| config.health_checks.len());
            for endpoint in &set.all {
                let ejected = endpoint.state.ejected_until.load(Ordering::Relaxed) > now;
                let flags = [
                    (!endpoint.usable(checks) && endpoint.healthy, "/failed_active_hc"),
                    (ejected, "/failed_outlier_check"),
                    (!endpoint.healthy, "/failed_eds_health"),
                ];
                let mut health: String = flags.iter().filter(|flag| flag.0).map(|flag| flag.1).collect();
                if health.is_empty() {
                    health.push_str("healthy");
                }
                // Writing to a String cannot fail.
                let _ = writeln!(
                    out,
                    "{0}::{1}::health_flags::{health}\n{0}::{1}::weight::{2}",
                    slot.name, endpoint.text, endpoint.weight
                );
            }
        }
        out
    })
}

fn listeners(proxy: &Proxy) -> String {
    proxy.store(|store| {
        let mut out = String::new();
        for listener in store.listeners().filter(|listener| listener.bind) {
            for address in proxy.listener_addresses(&listener.name) {
                out.push_str(&format!("{}::{address}\n", listener.name));
            }
        }
        out
    })
}
