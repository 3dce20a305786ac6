//! What is remembered of an exchange that somebody looks at, and its trace when it ends, in the shape of Envoy's
//! `envoy.data.tap.v3.TraceWrapper`.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::request::Parts;
use http::{HeaderMap, StatusCode};
use serde_json::{Value, json};

use super::exchange::Exchange;
use super::request::view;
use crate::config::convert::Address;
use crate::config::matchers::RequestView;
use crate::observe::time::TimeFormat;
use crate::policy::stats::Counter;
use crate::policy::tap::{Search, Searching, Seen, Spot, Tap, TapFilter, is_status, with_status};
use crate::random;

/// The first bytes of a body, and the trailers behind it.
#[derive(Debug)]
pub struct Capture {
    bytes: Vec<u8>,
    limit: usize,
    truncated: bool,
    trailers: Option<HeaderMap>,
    searching: Searching,
}

impl Capture {
    fn new(limit: usize, searches: &Arc<[Search]>) -> Self {
        Self {
            bytes: Vec::new(),
            limit,
            truncated: false,
            trailers: None,
            searching: Searching::new(searches),
        }
    }

    /// Bytes of it.
    pub fn data(&mut self, data: &[u8]) {
        self.searching.feed(data);
        let room = self.limit - self.bytes.len();
        self.truncated |= data.len() > room;
        self.bytes.extend_from_slice(&data[..data.len().min(room)]);
    }

    /// Its trailers.
    pub fn trailers(&mut self, trailers: &HeaderMap) {
        self.trailers = Some(trailers.clone());
    }

    fn shown(&self, text: bool) -> Option<Value> {
        if self.bytes.is_empty() && !self.truncated {
            return None;
        }
        Some(if text {
            json!({ "truncated": self.truncated, "as_string": String::from_utf8_lossy(&self.bytes) })
        } else {
            json!({ "truncated": self.truncated, "as_bytes": STANDARD.encode(&self.bytes) })
        })
    }
}

/// See the module.
pub struct TapState {
    tap: Arc<Tap>,
    tapped: Option<Arc<Counter>>,
    connection: bool,
    upstream: bool,
    times: bool,
    method: http::Method,
    target: String,
    authority: String,
    scheme: String,
    request: HeaderMap,
    came: SystemTime,
    /// With its status, and when it came.
    response: Option<(StatusCode, HeaderMap, SystemTime)>,
    answer: Capture,
}

/// A request passes a tap filter.
pub(super) fn pass(exchange: &mut Exchange, filter: &TapFilter, parts: &Parts) {
    if let Some(tap) = filter.spot.tap() {
        begin(exchange, tap, parts, Some(filter));
    }
}

/// A request comes to a connection manager.
pub(super) fn arrive(exchange: &mut Exchange, spot: &Spot, parts: &Parts) {
    if let Some(tap) = spot.tap() {
        begin(exchange, tap, parts, None);
    }
}

fn begin(exchange: &mut Exchange, tap: Arc<Tap>, parts: &Parts, filter: Option<&TapFilter>) {
    let view = view(parts);
    let seen = Seen {
        request: view,
        request_trailers: None,
        response: None,
        response_trailers: None,
        request_body: None,
        response_body: None,
    };
    // Looked at once: who was there first sees it.
    if exchange.tap.is_some()
        || tap.config.wants(&seen) == Some(false)
        || !tap.config.share.hit(random::next())
    {
        return;
    }
    exchange.tap = Some(Box::new(TapState {
        tapped: filter.map(|filter| filter.tapped.clone()),
        connection: filter.is_none_or(|filter| filter.connection),
        upstream: filter.is_some_and(|filter| filter.upstream),
        times: filter.is_none_or(|filter| filter.times),
        method: parts.method.clone(),
        target: parts
            .uri
            .path_and_query()
            .map_or("/", |path| path.as_str())
            .to_owned(),
        authority: view.authority().to_owned(),
        scheme: view.scheme().to_owned(),
        request: parts.headers.clone(),
        came: SystemTime::now(),
        response: None,
        answer: Capture::new(tap.config.response_bytes, &tap.config.in_response),
        tap,
    }));
}

impl TapState {
    /// For the request's body.
    pub(super) fn capture(&self) -> Box<Capture> {
        Box::new(Capture::new(
            self.tap.config.request_bytes,
            &self.tap.config.in_request,
        ))
    }

    /// The response's head.
    pub(super) fn response(&mut self, status: StatusCode, headers: &HeaderMap) {
        self.response = Some((status, with_status(status, headers), SystemTime::now()));
    }

    /// The response's body, and what follows it.
    pub(super) fn answer(&mut self) -> &mut Capture {
        &mut self.answer
    }

    fn request_view(&self) -> RequestView<'_> {
        let (path, query) = match self.target.split_once('?') {
            Some((path, query)) => (path, Some(query)),
            None => (&*self.target, None),
        };
        RequestView {
            method: self.method.as_str(),
            path,
            query,
            authority: Some(&self.authority),
            scheme: Some(&self.scheme),
            headers: &self.request,
        }
    }
}

/// An exchange has ended: its trace, if it matches.
pub(super) fn finish(exchange: &mut Exchange) {
    let Some(state) = exchange.tap.take() else {
        return;
    };
    let source = exchange.source.as_ref().map(|source| source.borrow());
    let captured = source.as_ref().and_then(|source| source.captured());
    let none = HeaderMap::new();
    let nothing = Searching::new(&state.tap.config.in_request);
    let seen = Seen {
        request: state.request_view(),
        request_trailers: Some(captured.and_then(|body| body.trailers.as_ref()).unwrap_or(&none)),
        response: Some(state.response.as_ref().map_or(&none, |(_, headers, _)| headers)),
        response_trailers: Some(state.answer.trailers.as_ref().unwrap_or(&none)),
        request_body: Some(captured.map_or(&nothing, |body| &body.searching)),
        response_body: Some(&state.answer.searching),
    };
    if state.tap.config.wants(&seen) != Some(true) {
        return;
    }
    if let Some(tapped) = &state.tapped {
        tapped.add(exchange.conn.worker.id);
    }
    let text = state.tap.config.text;
    let own = [
        (":method", state.method.as_str()),
        (":authority", &*state.authority),
        (":path", &*state.target),
        (":scheme", &*state.scheme),
    ];
    let mut request = json!({ "headers": fields(own, &state.request) });
    if let Some(body) = captured {
        end_of(&mut request, body, text);
    } else {
        request["trailers"] = json!([]);
    }
    let mut trace = json!({ "request": request });
    if let Some((status, headers, came)) = &state.response {
        let own = [(":status", status.as_str())];
        let mut response = json!({ "headers": fields(own, headers) });
        end_of(&mut response, &state.answer, text);
        if state.times {
            response["headers_received_time"] = time(*came);
        }
        trace["response"] = response;
    }
    if state.times {
        trace["request"]["headers_received_time"] = time(state.came);
    }
    let address = |at: std::net::SocketAddr| json!({ "socket_address": { "address": at.ip().to_string(), "port_value": at.port() } });
    if state.upstream
        && let Some(host) = &exchange.host
    {
        let remote = match &host.endpoint.address {
            Address::Tcp(at) => address(*at),
            other => json!({ "pipe": { "path": other.to_string() } }),
        };
        let mut shown = json!({ "remote_address": remote });
        if let Some(local) = exchange.upstream_local {
            shown["local_address"] = address(local);
        }
        trace["upstream_connection"] = shown;
    }
    if state.connection {
        trace["downstream_connection"] = json!({
            "local_address": address(exchange.conn.local),
            "remote_address": address(exchange.conn.remote),
        });
    }
    let trace = json!({ "http_buffered_trace": trace });
    state.tap.submit(format!("{trace:#}\n"));
}

fn end_of(message: &mut Value, capture: &Capture, text: bool) {
    if let Some(body) = capture.shown(text) {
        message["body"] = body;
    }
    message["trailers"] = capture
        .trailers
        .as_ref()
        .map_or_else(|| json!([]), |trailers| fields([], trailers));
}

fn fields<const N: usize>(own: [(&str, &str); N], headers: &HeaderMap) -> Value {
    let own = own
        .iter()
        .map(|(key, value)| json!({ "key": key, "value": value, "raw_value": "" }));
    // Within the proxy the authority is the host.
    let rest = headers
        .iter()
        .filter(|(name, _)| !is_status(name) && (N != 4 || *name != http::header::HOST))
        .map(|(name, value)| {
            json!({ "key": name.as_str(), "value": String::from_utf8_lossy(value.as_bytes()), "raw_value": "" })
        });
    own.chain(rest).collect()
}

fn time(at: SystemTime) -> Value {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut text = String::with_capacity(24);
    TimeFormat::rfc3339().write(since, &mut text);
    text.into()
}
