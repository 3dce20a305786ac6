//! What a request must look like before anything is done for it: the hygiene rules that need a parsed head.

use std::borrow::Cow;

use http::request::Parts;
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, Version, header};

use crate::config::hcm::Underscores;
use crate::http1::request::valid_host;
use crate::http1::violation::Violation;
use crate::hygiene::path::{Normalized, normalize};
use crate::metrics::events::{CodecEvent, HttpEvent};
use crate::metrics::flags::Flags;
use crate::worker::exchange::Exchange;
use crate::worker::http::Downstream;
use crate::worker::local::LocalReply;
use crate::worker::tunnel;

/// Target forms, authority, path, and what was found while the head came.
pub(super) fn admit(conn: &Downstream, exchange: &mut Exchange, parts: &mut Parts) -> Result<(), LocalReply> {
    refuse_violation(conn, exchange)?;
    if parts.method == Method::CONNECT && !tunnel::may_connect(conn, parts) {
        return Err(refusal(StatusCode::METHOD_NOT_ALLOWED, "connect_not_allowed"));
    }
    judge_underscores(conn, parts)?;
    settle_authority(&conn.manager.default_host, parts)?;
    exchange.authority = parts.headers.get(header::HOST).cloned();
    normalize_target(conn, exchange.grpc, parts)?;
    if conn.manager.strip_port {
        strip_port(exchange, parts);
    }
    Ok(())
}

/// An answer after which the connection ends.
fn refusal(status: StatusCode, details: &'static str) -> LocalReply {
    let mut reply = invalid(details);
    reply.status = status;
    reply.close = true;
    reply
}

fn bad(details: &'static str) -> LocalReply {
    refusal(StatusCode::BAD_REQUEST, details)
}

/// An answer after which the connection goes on.
fn invalid(details: &'static str) -> LocalReply {
    LocalReply::new(
        StatusCode::BAD_REQUEST,
        Flags::DOWNSTREAM_PROTOCOL_ERROR,
        details,
        "",
    )
}

/// What the bytes of the head have broken, if they have.
fn refuse_violation(conn: &Downstream, exchange: &mut Exchange) -> Result<(), LocalReply> {
    let Some(violation) = conn.take_violation() else {
        return Ok(());
    };
    exchange.headless = true;
    if violation == Violation::Unfinished {
        return Err(LocalReply::of_late_head());
    }
    conn.note(HttpEvent::CxProtocolError);
    let status = StatusCode::from_u16(violation.status()).unwrap_or(StatusCode::BAD_REQUEST);
    Err(refusal(status, violation.details()))
}

fn judge_underscores(conn: &Downstream, parts: &mut Parts) -> Result<(), LocalReply> {
    let http2 = parts.version == Version::HTTP_2;
    match conn.manager.underscores {
        Underscores::Keep => Ok(()),
        Underscores::Drop => {
            let event = if http2 {
                CodecEvent::Http2Dropped
            } else {
                CodecEvent::Http1Dropped
            };
            conn.note_codec(event, drop_underscores(&mut parts.headers));
            Ok(())
        }
        Underscores::Reject if parts.headers.keys().any(has_underscore) => {
            let (event, details) = if http2 {
                (CodecEvent::Http2Rejected, "http2.unexpected_underscore")
            } else {
                (CodecEvent::Http1Rejected, "http1.unexpected_underscore")
            };
            conn.note_codec(event, 1);
            Err(bad(details))
        }
        Underscores::Reject => Ok(()),
    }
}

fn has_underscore(name: &HeaderName) -> bool {
    name.as_str().contains('_')
}

/// Returns how many fields there were.
fn drop_underscores(headers: &mut HeaderMap) -> u64 {
    let names: Vec<_> = headers
        .keys()
        .filter(|name| has_underscore(name))
        .cloned()
        .collect();
    let before = headers.len();
    for name in names {
        headers.remove(name);
    }
    (before - headers.len()) as u64
}

/// Makes `Host` the authority: that of the target wins over it (RFC 9112 section 3.2.2, RFC 9113 section 8.3.1). Clients
/// of HTTP/1.0 that name none get `default_host`, where there is one.
fn settle_authority(default_host: &str, parts: &mut Parts) -> Result<(), LocalReply> {
    let http2 = parts.version == Version::HTTP_2;
    let host = parts.headers.get(header::HOST);
    if let Some(authority) = parts.uri.authority() {
        if authority.as_str().contains('@') || !valid_host(authority.as_str().as_bytes()) {
            return Err(bad("invalid_authority"));
        }
        let value = HeaderValue::from_str(authority.as_str()).map_err(|_| bad("invalid_authority"))?;
        if http2 && host.is_some_and(|host| !host.as_bytes().eq_ignore_ascii_case(value.as_bytes())) {
            return Err(bad("host_and_authority_differ"));
        }
        parts.headers.insert(header::HOST, value);
        return Ok(());
    }
    match host {
        Some(host) if http2 && !valid_host(host.as_bytes()) => Err(bad("invalid_authority")),
        Some(_) => Ok(()),
        None if parts.version == Version::HTTP_10 && !default_host.is_empty() => {
            let value = HeaderValue::from_str(default_host).map_err(|_| bad("invalid_authority"))?;
            parts.headers.insert(header::HOST, value);
            Ok(())
        }
        None if http2 => Err(bad("missing_host_header")),
        None => Ok(()),
    }
}

fn strip_port(exchange: &mut Exchange, parts: &mut Parts) {
    let host = parts.headers.get(header::HOST);
    let Some(host) = host.and_then(|value| value.to_str().ok()) else {
        return;
    };
    let stripped = crate::config::table::strip_port(host);
    if stripped.len() < host.len()
        && let Ok(value) = HeaderValue::from_str(stripped)
    {
        exchange.authority = Some(value.clone());
        parts.headers.insert(header::HOST, value);
    }
}

/// Makes the target origin-form with a normalised path.
fn normalize_target(conn: &Downstream, grpc: bool, parts: &mut Parts) -> Result<(), LocalReply> {
    let path = parts.uri.path();
    if path.is_empty() && parts.method == Method::CONNECT {
        return Ok(());
    }
    if path == "*" {
        return if parts.method == Method::OPTIONS {
            Ok(())
        } else {
            Err(invalid("invalid_path"))
        };
    }
    let manager = &conn.manager;
    let normalized = normalize(
        path,
        manager.normalize_path,
        manager.merge_slashes,
        manager.escaped_slashes,
    );
    let target = match &normalized {
        // Callers by gRPC follow no redirects.
        Normalized::Redirect(path) if !grpc => {
            let target = with_query(path, parts);
            return Err(redirect(conn, &target, parts));
        }
        Normalized::Redirect(path) => {
            let seen = with_query(path, parts);
            return Err(refuse_path(conn, &seen, parts));
        }
        Normalized::Refused(path) => {
            let seen = with_query(path, parts);
            return Err(refuse_path(conn, &seen, parts));
        }
        Normalized::Path(Cow::Owned(path)) => with_query(path, parts).parse(),
        // Already origin-form, the usual case for HTTP/1: nothing is rebuilt.
        Normalized::Path(Cow::Borrowed(_))
            if parts.uri.authority().is_none() && parts.uri.scheme().is_none() =>
        {
            return Ok(());
        }
        Normalized::Path(Cow::Borrowed(_)) => {
            let own = parts.uri.path_and_query().cloned();
            Ok(own.unwrap_or_else(|| PathAndQuery::from_static("/")))
        }
    };
    parts.uri = target.map(Uri::from).map_err(|_| invalid("invalid_path"))?;
    Ok(())
}

fn with_query(path: &str, parts: &Parts) -> String {
    match parts.uri.query() {
        Some(query) => format!("{path}?{query}"),
        None => path.to_owned(),
    }
}

/// Sends the client to the path as it should be written.
fn redirect(conn: &Downstream, target: &str, parts: &mut Parts) -> LocalReply {
    conn.note(HttpEvent::RqPathRedirected);
    let (Ok(location), Ok(uri)) = (HeaderValue::from_str(target), target.parse()) else {
        return invalid("path_normalization_failed");
    };
    parts.uri = uri;
    let mut reply = unnormalized(StatusCode::TEMPORARY_REDIRECT);
    reply.headers.insert(header::LOCATION, location);
    reply
}

/// Refuses a path, which logs tell as far as it was normalised.
fn refuse_path(conn: &Downstream, seen: &str, parts: &mut Parts) -> LocalReply {
    conn.note(HttpEvent::RqPathRefused);
    if let Ok(uri) = seen.parse() {
        parts.uri = uri;
    }
    unnormalized(StatusCode::BAD_REQUEST)
}

fn unnormalized(status: StatusCode) -> LocalReply {
    LocalReply::new(status, Flags::default(), "path_normalization_failed", "")
}
