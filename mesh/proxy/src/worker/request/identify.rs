//! Who asks, and the fields that say so to the next hop.
//!
//! What is believed is decided by [`crate::config::origin`]; here it is noted in the exchange, for whoever asks for the client
//! later (logs, RBAC, hashes, rate limits), and told in `x-forwarded-for`, `-proto`, `-port`, `x-envoy-internal`,
//! `x-envoy-external-address`, `via`, `x-forwarded-client-cert` and `x-request-id`.

use std::net::SocketAddr;

use http::request::Parts;
use http::uri::Scheme;
use http::{HeaderMap, HeaderName, HeaderValue, header};

use crate::config::listener::Direction;
use crate::config::origin::{Found, Origin};
use crate::hygiene::fields::{Present, join_repeated, never_again, strip_present};
use crate::metrics::events::HttpEvent;
use crate::metrics::flags::Flags;
use crate::metrics::peer::{METADATA_HEADER, METADATA_ID_HEADER};
use crate::random;
use crate::worker::exchange::Exchange;
use crate::worker::http::Downstream;
use crate::worker::local::LocalReply;
use crate::worker::scene::RequestScene;

pub(in crate::worker) static X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
pub(in crate::worker) static PEER_METADATA: HeaderName = HeaderName::from_static(METADATA_HEADER);
pub(in crate::worker) static PEER_METADATA_ID: HeaderName = HeaderName::from_static(METADATA_ID_HEADER);

static X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
static X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
static X_FORWARDED_PORT: HeaderName = HeaderName::from_static("x-forwarded-port");
static X_EXTERNAL_ADDRESS: HeaderName = HeaderName::from_static("x-envoy-external-address");
static X_SERVICE_CLUSTER: HeaderName = HeaderName::from_static("x-envoy-downstream-service-cluster");
static X_SERVICE_NODE: HeaderName = HeaderName::from_static("x-envoy-downstream-service-node");
static X_INTERNAL: HeaderName = HeaderName::from_static("x-envoy-internal");

/// Finds out who asks, and tells it. `present` was found in the head as it came. An answer where the request is refused
/// because that must be known and is not.
pub(super) fn identify(
    exchange: &mut Exchange,
    parts: &mut Parts,
    present: Present,
) -> Result<(), LocalReply> {
    let conn = exchange.conn.clone();
    let manager = &conn.manager;
    let origin = &manager.origin;
    let headers = &mut parts.headers;
    if (manager.metadata_exchange || conn.direction == Direction::Inbound) && present.has(Present::PEER) {
        let metadata = headers.remove(&PEER_METADATA);
        headers.remove(&PEER_METADATA_ID);
        if conn.direction == Direction::Inbound {
            exchange.peer = metadata.and_then(|value| conn.worker.peer(&value));
        }
    }
    let certificate = present.has(Present::CLIENT_CERT);
    manager
        .client_cert
        .apply(headers, conn.tls.as_deref(), certificate);
    let found = origin.find(headers, conn.remote.ip()).map_err(|status| {
        conn.note(HttpEvent::RqClientUnknown);
        LocalReply::new(status, Flags::default(), "rejecting_because_detection_failed", "")
    })?;
    exchange.internal = found.internal;
    if let Some(named) = found.named {
        exchange.remote = SocketAddr::new(named, 0);
    }
    if present.has(Present::OWN) {
        headers.remove(&X_INTERNAL);
        for name in found.may_not_send() {
            headers.remove(name);
        }
    }
    forward_addresses(&conn, exchange, headers, &found);
    forward_scheme(&conn, origin, headers, present);
    exchange.scheme = scheme(&conn, exchange, origin, headers);
    if origin.tells_itself {
        tell_itself(&conn, headers);
    }
    if let Some(via) = &origin.via {
        append_via(headers, via);
    }
    if manager.generate_request_id {
        let known = present.has(Present::REQUEST_ID);
        let value = match known.then(|| headers.get_mut(&X_REQUEST_ID)).flatten() {
            Some(value) if !found.edge || manager.preserve_request_id => {
                never_again(value);
                value.clone()
            }
            _ => {
                let fresh = HeaderValue::from_bytes(&random::uuid());
                let mut value = fresh.unwrap_or(HeaderValue::from_static("-"));
                never_again(&mut value);
                headers.insert(X_REQUEST_ID.clone(), value.clone());
                value
            }
        };
        exchange.request_id = Some(value);
    }
    Ok(())
}

/// Who sends the request on: the cluster and the node that this proxy is of.
fn tell_itself(conn: &Downstream, headers: &mut HeaderMap) {
    let shared = &conn.worker.shared;
    if let Ok(cluster) = HeaderValue::from_str(&shared.cluster) {
        if headers.get(header::USER_AGENT).is_none_or(HeaderValue::is_empty) {
            headers.insert(header::USER_AGENT, cluster.clone());
        }
        headers.insert(X_SERVICE_CLUSTER.clone(), cluster);
    }
    if !shared.peer_id.is_empty() {
        headers.insert(X_SERVICE_NODE.clone(), shared.peer_id.clone());
    }
}

/// Changes fields before anybody looks at them; what is found in them from then on.
pub(super) fn change_early(exchange: &Exchange, parts: &mut Parts) -> Present {
    for mutation in &exchange.conn.manager.early {
        let scene = RequestScene {
            exchange,
            uri: &parts.uri,
            cluster: None,
        };
        mutation.request(&mut parts.headers, &scene);
    }
    join_repeated(&mut parts.headers, false);
    let present = Present::of(&parts.headers);
    // What is of this connection alone cannot be added.
    strip_present(&mut parts.headers, present);
    present
}

/// The addresses of the client and of who is connected.
fn forward_addresses(conn: &Downstream, exchange: &Exchange, headers: &mut HeaderMap, found: &Found) {
    for _ in 0..found.appends {
        let value = match headers.get(&X_FORWARDED_FOR).map(HeaderValue::to_str) {
            Some(Ok("")) | None => Ok(conn.remote_text().clone()),
            Some(Ok(before)) => {
                HeaderValue::try_from(format!("{before},{}", conn.remote.ip().to_canonical()))
            }
            Some(Err(_)) => break,
        };
        if let Ok(value) = value {
            headers.insert(X_FORWARDED_FOR.clone(), value);
        }
    }
    if found.internal {
        headers.insert(X_INTERNAL.clone(), HeaderValue::from_static("true"));
    }
    if found.edge {
        let client = match found.named {
            None => Some(conn.remote_text().clone()),
            Some(_) => HeaderValue::try_from(exchange.remote.ip().to_string()).ok(),
        };
        if let Some(client) = client {
            headers.insert(X_EXTERNAL_ADDRESS.clone(), client);
        }
    }
}

/// How the client is connected, unless a trusted hop says how its own is.
fn forward_scheme(conn: &Downstream, origin: &Origin, headers: &mut HeaderMap, present: Present) {
    let scheme = || {
        let told = conn
            .restored
            .then(|| origin.spoken_at(conn.local.port()))
            .flatten();
        let own = if conn.tls.is_some() { "https" } else { "http" };
        HeaderValue::from_static(told.unwrap_or(own))
    };
    let believed = origin.believes_hops();
    // `connection` may have taken it off.
    if !(believed && present.has(Present::FORWARDED_PROTO) && headers.contains_key(&X_FORWARDED_PROTO)) {
        headers.insert(X_FORWARDED_PROTO.clone(), scheme());
    }
    if origin.append_port && !(believed && headers.contains_key(&X_FORWARDED_PORT)) {
        headers.insert(X_FORWARDED_PORT.clone(), HeaderValue::from(conn.local.port()));
    }
    if let Some(scheme) = &origin.scheme {
        let value = if *scheme == Scheme::HTTPS { "https" } else { "http" };
        headers.insert(X_FORWARDED_PROTO.clone(), HeaderValue::from_static(value));
    }
}

/// The scheme of the request: what the configuration, the client, or a trusted hop says, or else how the client is connected.
fn scheme(conn: &Downstream, exchange: &Exchange, origin: &Origin, headers: &HeaderMap) -> Scheme {
    if let Some(scheme) = origin.scheme.as_ref().or(exchange.uri.scheme())
        && (*scheme == Scheme::HTTP || *scheme == Scheme::HTTPS)
    {
        return scheme.clone();
    }
    let forwarded = headers
        .get(&X_FORWARDED_PROTO)
        .map_or(&b""[..], HeaderValue::as_bytes);
    match () {
        () if forwarded.eq_ignore_ascii_case(b"https") => Scheme::HTTPS,
        () if forwarded.eq_ignore_ascii_case(b"http") => Scheme::HTTP,
        () if conn.tls.is_some() => Scheme::HTTPS,
        () => Scheme::HTTP,
    }
}

/// Adds this proxy to those that a message came by.
pub(in crate::worker) fn append_via(headers: &mut HeaderMap, via: &HeaderValue) {
    let joined = headers
        .get(header::VIA)
        .filter(|before| !before.is_empty())
        .and_then(|before| {
            HeaderValue::from_bytes(&[before.as_bytes(), via.as_bytes()].join(&b", "[..])).ok()
        });
    headers.insert(header::VIA, joined.unwrap_or_else(|| via.clone()));
}
