//! Who asks, and the fields that say so to the next hop.

use http::request::Parts;
use http::{HeaderMap, HeaderName, HeaderValue};

use crate::config::listener::Direction;
use crate::hygiene::fields::{Present, never_again};
use crate::metrics::peer::{METADATA_HEADER, METADATA_ID_HEADER};
use crate::random;
use crate::worker::exchange::Exchange;
use crate::worker::http::Downstream;

pub(in crate::worker) static X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
pub(in crate::worker) static PEER_METADATA: HeaderName = HeaderName::from_static(METADATA_HEADER);
pub(in crate::worker) static PEER_METADATA_ID: HeaderName = HeaderName::from_static(METADATA_ID_HEADER);
static X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
static X_EXTERNAL_ADDRESS: HeaderName = HeaderName::from_static("x-envoy-external-address");
static X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
/// Fields by which clients could steer an Envoy; taken from outside clients only as text.
const INTERNAL_FIELDS: [&str; 12] = [
    "x-envoy-internal",
    "x-envoy-retry-on",
    "x-envoy-retry-grpc-on",
    "x-envoy-max-retries",
    "x-envoy-upstream-rq-timeout-ms",
    "x-envoy-upstream-rq-per-try-timeout-ms",
    "x-envoy-upstream-alt-stat-name",
    "x-envoy-decorator-operation",
    "x-envoy-hedge-on-per-try-timeout",
    "x-envoy-attempt-count",
    "x-envoy-original-path",
    "x-serin-unprocessed",
];

/// Says who asks. `present` was found in the head as it came.
pub(super) fn identify(conn: &Downstream, exchange: &mut Exchange, parts: &mut Parts, present: Present) {
    let headers = &mut parts.headers;
    take_peer(conn, exchange, headers, present);
    let certificate = present.has(Present::CLIENT_CERT);
    conn.manager
        .client_cert
        .apply(headers, conn.tls.as_deref(), certificate);
    write_forwarded(conn, headers, present);
    if conn.manager.generate_request_id {
        exchange.request_id = Some(give_id(conn, headers, present));
    }
}

/// The workload at the other end, as it tells by metadata exchange; the fields go no further.
fn take_peer(conn: &Downstream, exchange: &mut Exchange, headers: &mut HeaderMap, present: Present) {
    let exchanged = conn.manager.metadata_exchange || conn.direction == Direction::Inbound;
    if exchanged && present.has(Present::PEER) {
        let metadata = headers.remove(&PEER_METADATA);
        headers.remove(&PEER_METADATA_ID);
        if conn.direction == Direction::Inbound {
            exchange.peer = metadata.and_then(|value| conn.worker.peer(&value));
        }
    }
}

/// `x-forwarded-*`, and what outside clients may not say.
fn write_forwarded(conn: &Downstream, headers: &mut HeaderMap, present: Present) {
    let manager = &conn.manager;
    let scheme = HeaderValue::from_static(if conn.tls.is_some() { "https" } else { "http" });
    if manager.use_remote_address {
        if present.has(Present::OWN) {
            for name in INTERNAL_FIELDS {
                headers.remove(name);
            }
        }
        let value = match headers
            .get(&X_FORWARDED_FOR)
            .and_then(|value| value.to_str().ok())
        {
            Some(before) => HeaderValue::try_from(format!("{before},{}", conn.remote.ip().to_canonical())),
            None => Ok(conn.remote_text().clone()),
        };
        if let Ok(value) = value
            && !manager.skip_forwarded_for
        {
            headers.insert(X_FORWARDED_FOR.clone(), value);
        }
        headers.insert(X_FORWARDED_PROTO.clone(), scheme);
        headers.insert(X_EXTERNAL_ADDRESS.clone(), conn.remote_text().clone());
    } else if !present.has(Present::FORWARDED_PROTO) {
        headers.insert(X_FORWARDED_PROTO.clone(), scheme);
    } else {
        // `connection` may have taken it off.
        headers.entry(X_FORWARDED_PROTO.clone()).or_insert(scheme);
    }
}

/// The id of a request: its own, where its client may give one, or a fresh one.
fn give_id(conn: &Downstream, headers: &mut HeaderMap, present: Present) -> HeaderValue {
    let manager = &conn.manager;
    let known = present.has(Present::REQUEST_ID);
    match known.then(|| headers.get_mut(&X_REQUEST_ID)).flatten() {
        Some(value) if !manager.use_remote_address || manager.preserve_request_id => {
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
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_that_outside_clients_may_not_send_is_seen_by_the_look_at_their_heads() {
        for name in INTERNAL_FIELDS {
            let mut headers = HeaderMap::new();
            headers.insert(name, HeaderValue::from_static("1"));
            assert!(Present::of(&headers).has(Present::OWN), "{name}");
        }
        assert!(!Present::of(&HeaderMap::new()).has(Present::OWN));
    }
}
