//! Admin, readiness and Prometheus ports, served on the control thread.

pub mod counted;
mod dump;
mod fixed;
mod help;
mod port;
mod tap;
mod telling;
mod views;

use std::sync::Arc;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use regex::{Regex, RegexBuilder};
use tokio_util::sync::CancellationToken;

pub use port::{AdminPort, Port};

use self::telling::{Answer, Form, Telling};
use super::drain::Drained;
use super::{Proxy, levels};
use crate::metrics::names::Buckets;
use crate::metrics::select::{Kind, Select};
use crate::metrics::text;

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

fn stats(proxy: &Arc<Proxy>, parameters: &[(&str, &str)], accept: &str) -> Answer {
    let value = |name: &str| {
        parameters
            .iter()
            .find(|(key, _)| *key == name)
            .map(|(_, value)| *value)
    };
    let filter = match pattern(parameters, "filter") {
        Ok(filter) => filter,
        Err(reply) => return reply.into(),
    };
    let select = Select {
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
                )
                .into();
            }
        },
        ..proxy.select()
    };
    let buckets = match value("histogram_buckets") {
        None | Some("none") => Buckets::None,
        Some("cumulative") => Buckets::Cumulative,
        Some("disjoint") => Buckets::Disjoint,
        Some("detailed") => Buckets::Detailed,
        Some(_) => {
            return plain(
                StatusCode::BAD_REQUEST,
                "usage: /stats?histogram_buckets=(cumulative|disjoint|detailed|none)\n",
            )
            .into();
        }
    };
    let form = match value("format") {
        None | Some("text") => Form::Text(buckets),
        Some("json") => Form::Json(buckets),
        Some("prometheus") => return prometheus(proxy, parameters, accept),
        Some(_) => {
            return plain(
                StatusCode::BAD_REQUEST,
                "usage: /stats?format=(text|json|prometheus)\n",
            )
            .into();
        }
    };
    Telling::new(proxy, select, form).answer()
}

/// `/stats/prometheus`, in the format that the client accepts.
fn prometheus(proxy: &Arc<Proxy>, parameters: &[(&str, &str)], accept: &str) -> Answer {
    let filter = match pattern(parameters, "filter") {
        Ok(filter) => filter,
        Err(reply) => return reply.into(),
    };
    let select = Select {
        filter,
        by_family: true,
        used_only: parameters.iter().any(|(key, _)| *key == "usedonly"),
        ..proxy.select()
    };
    Telling::new(proxy, select, Form::Prometheus(text::Encoding::of(accept))).answer()
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

/// Answers a request to one of the ports.
async fn answer(
    proxy: &Arc<Proxy>,
    port: Port,
    quit: &CancellationToken,
    request: Request<Incoming>,
) -> Response<tap::AdminBody> {
    if port == Port::Admin && request.uri().path() == "/tap" && request.method() == Method::POST {
        return tap::serve(proxy, request).await;
    }
    if request.method() != Method::POST
        && let Some(answer) = tell(proxy, port, &request)
    {
        return match answer {
            Answer::Whole(response) => response.map(tap::AdminBody::Whole),
            Answer::Pieces(response) => response.map(tap::AdminBody::Pieces),
        };
    }
    show(proxy, port, quit, &request).await.map(tap::AdminBody::Whole)
}

/// Statistics, if that is what is asked for.
fn tell(proxy: &Arc<Proxy>, port: Port, request: &Request<Incoming>) -> Option<Answer> {
    let path = request.uri().path();
    if !matches!(path, "/stats" | "/stats/prometheus" | "/metrics") || !port.shows(path) {
        return None;
    }
    let accept = request
        .headers()
        .get(header::ACCEPT)
        .and_then(|value| value.to_str().ok())
        .unwrap_or("");
    let parameters = parameters(request);
    Some(match path {
        "/stats" => stats(proxy, &parameters, accept),
        _ => prometheus(proxy, &parameters, accept),
    })
}

/// Answers a request for something that is made at once.
async fn show(
    proxy: &Arc<Proxy>,
    port: Port,
    quit: &CancellationToken,
    request: &Request<Incoming>,
) -> Response<Full<Bytes>> {
    let path = request.uri().path();
    if !port.shows(path) {
        return plain(StatusCode::NOT_FOUND, "not found\n");
    }
    let parameters = parameters(request);
    if path == "/logging" && request.method() != Method::POST && parameters.is_empty() {
        return logging(levels::shown());
    }
    let has = |name: &str| parameters.iter().any(|(key, _)| *key == name);
    let json = parameters.contains(&("format", "json"));
    match path {
        "/ready" | "/healthz/ready" => ready(proxy),
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
        "/" | "/help" => plain(StatusCode::OK, help::text()),
        "/init_dump" => init_dump(proxy, &parameters),
        "/hot_restart_version" => plain(StatusCode::OK, views::HOT_RESTART_VERSION),
        "/runtime" => json_reply(&proxy.store(|store| store.runtime().json())),
        path if request.method() != Method::POST && help::takes_post(path) => plain(
            StatusCode::METHOD_NOT_ALLOWED,
            format!("Method {} not allowed, POST required.", request.method()),
        ),
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
        "/reset_counters" => {
            proxy.reset_counters();
            plain(StatusCode::OK, "OK\n")
        }
        "/drain_listeners" if has("skip_exit") && !has("graceful") => {
            plain(StatusCode::BAD_REQUEST, "skip_exit requires graceful\n")
        }
        "/drain_listeners" => {
            let whose = if has("inboundonly") {
                Drained::Inbound
            } else {
                Drained::All
            };
            if has("graceful") {
                proxy.drain_gracefully(whose, !has("skip_exit")).await;
            } else {
                proxy.close_listeners(whose).await;
            }
            plain(StatusCode::OK, "OK\n")
        }
        "/quitquitquit" => {
            quit.cancel();
            plain(StatusCode::OK, "OK\n")
        }
        _ => plain(StatusCode::NOT_FOUND, format!("invalid path. {}", help::text())),
    }
}

/// What the proxy waits for before it is ready (`envoy.admin.v3.UnreadyTargetsDumps`).
fn init_dump(proxy: &Proxy, parameters: &[(&str, &str)]) -> Response<Full<Bytes>> {
    if let Some((name, _)) = parameters.iter().find(|(name, _)| *name != "mask") {
        return plain(StatusCode::BAD_REQUEST, format!("{name} is not supported\n"));
    }
    let component = parameters.iter().find(|(name, _)| *name == "mask");
    let missing = if proxy.is_ready() {
        Vec::new()
    } else {
        proxy.store(|store| store.cold())
    };
    // Everything is waited for by the one manager of the process.
    if missing.is_empty() || component.is_some_and(|(_, name)| *name != "server") {
        return json_reply(&serde_json::json!({}));
    }
    json_reply(&serde_json::json!({
        "unready_targets_dumps": [{ "name": "server", "target_names": missing }],
    }))
}

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
        .find(|(name, _)| !matches!(*name, "resource" | "name_regex" | "mask" | "include_eds"))
    {
        return plain(StatusCode::BAD_REQUEST, format!("{name} is not supported\n"));
    }
    let named = match pattern(parameters, "name_regex") {
        Ok(named) => named,
        Err(reply) => return reply,
    };
    let value = |name: &str| {
        let found = parameters.iter().find(|(key, _)| *key == name);
        found.map(|(_, value)| unescape(value))
    };
    let (resource, mask) = (value("resource"), value("mask"));
    let wanted = dump::Wanted {
        resource: resource.as_deref(),
        named: named.as_ref(),
        mask: mask.as_deref(),
        endpoints: value("include_eds").is_some(),
    };
    match dump::config_dump(proxy, &wanted) {
        Ok(dump) => {
            // What it was made from is given back to the kernel.
            crate::sys::collect_memory();
            reply(StatusCode::OK, "application/json", dump)
        }
        Err(error) => {
            let status = match error {
                dump::DumpError::NoResource(_) => StatusCode::NOT_FOUND,
                dump::DumpError::Mask(_) => StatusCode::BAD_REQUEST,
            };
            plain(status, format!("{error}\n"))
        }
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
