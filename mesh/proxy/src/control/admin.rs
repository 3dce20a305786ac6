//! Admin, readiness and Prometheus ports, served on the control thread.

mod views;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use regex::{Regex, RegexBuilder};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::{Proxy, levels};
use crate::error::Error;
use crate::metrics::collect::Value;
use crate::metrics::names::{self, Kind, Wanted};
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

/// Parameters of a request's query, as they are written.
fn parameters<B>(request: &Request<B>) -> Vec<(&str, &str)> {
    request
        .uri()
        .query()
        .unwrap_or("")
        .split('&')
        .filter(|pair| !pair.is_empty())
        .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
        .collect()
}

/// Undoes percent escapes; what is malformed stays as it is.
fn unescape(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut index = 0;
    while index < bytes.len() {
        let escaped = (bytes[index] == b'%')
            .then(|| text.get(index + 1..index + 3))
            .flatten()
            .and_then(|hex| u8::from_str_radix(hex, 16).ok());
        match escaped {
            Some(byte) => {
                out.push(byte);
                index += 3;
            }
            None => {
                out.push(bytes[index]);
                index += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// A regular expression of a query.
fn pattern(parameters: &[(&str, &str)], name: &str) -> Result<Option<Regex>, Response<Full<Bytes>>> {
    let Some((_, text)) = parameters.iter().find(|(key, _)| *key == name) else {
        return Ok(None);
    };
    RegexBuilder::new(&unescape(text))
        .size_limit(1 << 20)
        .build()
        .map(Some)
        .map_err(|error| plain(StatusCode::BAD_REQUEST, format!("Invalid regex: \"{error}\"\n")))
}

fn stats(proxy: &Proxy, parameters: &[(&str, &str)], accept: &str) -> Response<Full<Bytes>> {
    let value = |name: &str| {
        parameters
            .iter()
            .find(|(key, _)| *key == name)
            .map(|(_, value)| *value)
    };
    let filter = match pattern(parameters, "filter") {
        Ok(filter) => filter,
        Err(reply) => return reply,
    };
    let wanted = Wanted {
        filter,
        used_only: value("usedonly").is_some(),
        kind: match value("type") {
            None | Some("All") => None,
            Some("Counters") => Some(Kind::Counters),
            Some("Gauges") => Some(Kind::Gauges),
            Some("Histograms") => Some(Kind::Histograms),
            Some(_) => {
                return plain(
                    StatusCode::BAD_REQUEST,
                    "invalid &type= param: use All, Counters, Gauges or Histograms\n",
                );
            }
        },
    };
    match value("format") {
        None | Some("text") => plain(StatusCode::OK, names::text(&proxy.metrics(), &wanted)),
        Some("json") => json_reply(&names::json(&proxy.metrics(), &wanted)),
        Some("prometheus") => prometheus(proxy, parameters, accept),
        Some(_) => plain(
            StatusCode::BAD_REQUEST,
            "usage: /stats?format=(text|json|prometheus)\n",
        ),
    }
}

/// `/stats/prometheus`, in the format that the client accepts.
fn prometheus(proxy: &Proxy, parameters: &[(&str, &str)], accept: &str) -> Response<Full<Bytes>> {
    let filter = match pattern(parameters, "filter") {
        Ok(filter) => filter,
        Err(reply) => return reply,
    };
    let mut families = proxy.metrics();
    let used_only = parameters.iter().any(|(key, _)| *key == "usedonly");
    for family in &mut families {
        let name = family.name;
        family.metrics.retain(|(_, value)| {
            let used = match value {
                Value::Counter(value) | Value::Gauge(value) => *value != 0.0,
                Value::Histogram(histogram) => histogram.count() > 0,
            };
            (!used_only || used) && filter.as_ref().is_none_or(|filter| filter.is_match(name))
        });
    }
    let encoding = text::Encoding::of(accept);
    reply(StatusCode::OK, encoding.content_type(), encoding.write(&families))
}

fn runtime_modify(proxy: &Proxy, parameters: &[(&str, &str)]) -> Response<Full<Bytes>> {
    let changes: Vec<_> = parameters
        .iter()
        .map(|(key, value)| (unescape(key), unescape(value)))
        .collect();
    if changes.is_empty() {
        return plain(
            StatusCode::BAD_REQUEST,
            "usage: /runtime_modify?key1=value1&key2=value2&keyN=valueN\n\
             an empty value removes the key\n",
        );
    }
    let changes = changes.iter().map(|(key, value)| (key.as_str(), value.as_str()));
    match proxy.store(|store| store.runtime().modify(changes)) {
        Ok(true) => plain(StatusCode::OK, "OK\n"),
        Ok(false) => plain(StatusCode::SERVICE_UNAVAILABLE, "No admin layer specified\n"),
        Err(refusal) => plain(StatusCode::BAD_REQUEST, format!("{refusal}\n")),
    }
}

async fn answer(
    proxy: &Arc<Proxy>,
    port: Port,
    quit: &CancellationToken,
    request: &Request<Incoming>,
) -> Response<Full<Bytes>> {
    let path = request.uri().path();
    let allowed = match port {
        Port::Admin => true,
        Port::Prometheus => path == "/stats/prometheus",
        Port::Ready => path == "/healthz/ready",
    };
    if !allowed {
        return plain(StatusCode::NOT_FOUND, "not found\n");
    }
    let accept = request
        .headers()
        .get(header::ACCEPT)
        .and_then(|value| value.to_str().ok())
        .unwrap_or("");
    let parameters = parameters(request);
    let has = |name: &str| parameters.iter().any(|(key, _)| *key == name);
    let json = parameters.contains(&("format", "json"));
    match path {
        "/ready" | "/healthz/ready" => ready(proxy),
        "/stats/prometheus" | "/metrics" => prometheus(proxy, &parameters, accept),
        "/stats" => stats(proxy, &parameters, accept),
        "/config_dump" => config_dump(proxy, &parameters),
        "/certs" => {
            let now = rustls_pki_types::UnixTime::now().as_secs();
            let now = i64::try_from(now).unwrap_or(i64::MAX);
            json_reply(&proxy.store(|store| super::certs::certs(store.secrets(), now)))
        }
        "/clusters" if json => json_reply(&views::clusters_json(proxy)),
        "/clusters" => plain(StatusCode::OK, views::clusters(proxy)),
        "/listeners" if json => json_reply(&views::listeners_json(proxy)),
        "/listeners" => plain(StatusCode::OK, views::listeners(proxy)),
        "/server_info" => json_reply(&views::server_info(proxy)),
        "/memory" => json_reply(&views::memory()),
        "/" | "/help" => plain(StatusCode::OK, HELP),
        "/runtime" => json_reply(&proxy.store(|store| store.runtime().json())),
        "/reset_counters" => plain(
            StatusCode::NOT_IMPLEMENTED,
            "counters are cumulative for everybody who reads them, and are not reset\n",
        ),
        "/logging" if request.method() != Method::POST && parameters.is_empty() => logging(levels::shown()),
        "/drain_listeners" | "/quitquitquit" | "/reopen_logs" | "/healthcheck/fail" | "/healthcheck/ok"
        | "/logging" | "/runtime_modify"
            if request.method() != Method::POST =>
        {
            plain(
                StatusCode::METHOD_NOT_ALLOWED,
                "use POST for what changes something\n",
            )
        }
        "/runtime_modify" => runtime_modify(proxy, &parameters),
        "/logging" => logging(levels::change(parameters.iter().copied())),
        "/healthcheck/fail" | "/healthcheck/ok" => {
            proxy.fail_health_check(path.ends_with("fail"));
            plain(StatusCode::OK, "OK\n")
        }
        "/reopen_logs" => {
            proxy.store(|store| store.reopen_logs());
            plain(StatusCode::OK, "OK\n")
        }
        "/drain_listeners" if has("inboundonly") => plain(
            StatusCode::NOT_IMPLEMENTED,
            "inboundonly is not supported: all listeners drain together\n",
        ),
        "/drain_listeners" => {
            let phase = if has("graceful") {
                DrainPhase::Discouraging
            } else {
                DrainPhase::Closing
            };
            proxy.drain(phase).await;
            plain(StatusCode::OK, "OK\n")
        }
        "/quitquitquit" => {
            quit.cancel();
            plain(StatusCode::OK, "OK\n")
        }
        _ => plain(StatusCode::NOT_FOUND, "not found; see /help\n"),
    }
}

const HELP: &str = "/ready\n/stats[?format=text|json|prometheus&filter=REGEX&usedonly&type=Counters|Gauges|Histograms]\n\
    /stats/prometheus\n/config_dump[?resource=FIELD&name_regex=REGEX]\n/certs\n/clusters[?format=json]\n\
    /listeners[?format=json]\n/server_info\n/memory\n/logging\nPOST /logging?level=LEVEL or ?paths=LOGGER:LEVEL,...\n\
    POST /healthcheck/fail\nPOST /healthcheck/ok\nPOST /drain_listeners[?graceful]\nPOST /reopen_logs\n\
    POST /quitquitquit\n";

fn ready(proxy: &Proxy) -> Response<Full<Bytes>> {
    if proxy.is_ready() {
        return plain(StatusCode::OK, "LIVE\n");
    }
    let state = proxy.state();
    let missing = proxy.store(|store| store.cold());
    if missing.is_empty() {
        return plain(StatusCode::SERVICE_UNAVAILABLE, format!("{state}\n"));
    }
    let shown: Vec<_> = missing.iter().take(20).cloned().collect();
    plain(
        StatusCode::SERVICE_UNAVAILABLE,
        format!("{state}\nnot ready; waiting for: {}\n", shown.join(", ")),
    )
}

fn logging(result: Result<String, String>) -> Response<Full<Bytes>> {
    match result {
        Ok(shown) => plain(StatusCode::OK, shown),
        Err(reason) => plain(StatusCode::BAD_REQUEST, reason + "\n"),
    }
}

fn config_dump(proxy: &Proxy, parameters: &[(&str, &str)]) -> Response<Full<Bytes>> {
    if let Some((name, _)) = parameters
        .iter()
        .find(|(name, _)| !matches!(*name, "resource" | "name_regex"))
    {
        return plain(StatusCode::BAD_REQUEST, format!("{name} is not supported\n"));
    }
    let named = match pattern(parameters, "name_regex") {
        Ok(named) => named,
        Err(reply) => return reply,
    };
    let resource = parameters
        .iter()
        .find(|(key, _)| *key == "resource")
        .map(|(_, value)| *value);
    match views::config_dump(proxy, resource, named.as_ref()) {
        Some(dump) => json_reply(&dump),
        None => plain(
            StatusCode::NOT_FOUND,
            format!("{} not found in config dump\n", resource.unwrap_or_default()),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_of_a_query_are_undone_and_malformed_ones_stay() {
        assert_eq!(unescape("%5Eserver%2E.*"), "^server..*");
        assert_eq!(unescape("100%&%4"), "100%&%4");
    }
}
