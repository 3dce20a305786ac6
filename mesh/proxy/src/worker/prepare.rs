//! What a request becomes before it is sent on.

use std::borrow::Cow;

use http::request::Parts;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};

use super::exchange::Exchange;
use super::local::LocalReply;
use super::request::{PEER_METADATA, PEER_METADATA_ID, Routed};
use super::scene::RequestScene;
use crate::config::headers::HeaderOps;
use crate::config::listener::Direction;
use crate::config::route::{Forward, HostRewrite, Rewrite, Route, Target};
use crate::config::router::RouterOptions;
use crate::hygiene::fields::append;
use crate::metrics::flags::Flags;

static X_ORIGINAL_PATH: HeaderName = HeaderName::from_static("x-envoy-original-path");
static X_ORIGINAL_HOST: HeaderName = HeaderName::from_static("x-envoy-original-host");
static X_FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");

/// Makes the request what the upstream gets: mutations, rewrites, identity.
pub(super) fn prepare(
    exchange: &Exchange,
    routed: &Routed,
    forward: &Forward,
    target: Option<&Target>,
    parts: &mut Parts,
) -> Result<(), LocalReply> {
    let conn = &exchange.conn;
    let apply = |ops: &HeaderOps, parts: &mut Parts| {
        let scene = RequestScene {
            exchange,
            uri: &parts.uri,
            cluster: None,
        };
        ops.apply(&mut parts.headers, &scene);
    };
    // The weighted cluster comes first, and what it does is what the route and the levels above find.
    if let Some(target) = target {
        apply(&target.request_headers, parts);
        if let Some(new) = &target.host_rewrite {
            parts.headers.insert(header::HOST, new.clone());
        }
    }
    let levels = routed.header_levels(None, |route, host, table| {
        [
            &route.request_headers,
            &host.request_headers,
            &table.request_headers,
        ]
    });
    for ops in levels {
        apply(ops, parts);
    }
    let new_host = match forward.host_rewrite.as_deref() {
        None | Some(HostRewrite::Auto) => None,
        Some(HostRewrite::Literal(value)) => Some(value.clone()),
        Some(HostRewrite::Header(name)) => parts.headers.get(name).filter(|value| !value.is_empty()).cloned(),
        Some(HostRewrite::PathRegex(regex, with)) => {
            HeaderValue::from_str(&regex.replace_all(parts.uri.path(), &**with)).ok()
        }
    };
    if let Some(new) = new_host {
        if let Some(old) = parts.headers.get(header::HOST).cloned() {
            if forward.append_forwarded_host {
                append_forwarded_host(&mut parts.headers, &old);
            }
            if !conn.manager.router.suppress_envoy_headers {
                parts.headers.insert(X_ORIGINAL_HOST.clone(), old);
            }
        }
        parts.headers.insert(header::HOST, new);
    }
    // A plain CONNECT has no path.
    if let Some(rewrite) = forward
        .rewrite
        .as_deref()
        .filter(|_| !parts.uri.path().is_empty())
        && let Some(target) = rewritten_target(&conn.manager.router, &routed.route, rewrite, parts)
        && !set_target(parts, &target)
    {
        return Err(LocalReply::new(
            StatusCode::BAD_REQUEST,
            Flags::DOWNSTREAM_PROTOCOL_ERROR,
            "path_rewrite_failed",
            "",
        ));
    }
    if conn.manager.metadata_exchange && conn.direction != Direction::Inbound {
        parts
            .headers
            .insert(PEER_METADATA.clone(), conn.worker.shared.peer_metadata.clone());
        parts
            .headers
            .insert(PEER_METADATA_ID.clone(), conn.worker.shared.peer_id.clone());
    }
    if !conn.manager.interim_answers {
        // It is answered when the body is read; the upstream is not asked.
        parts.headers.remove(header::EXPECT);
    }
    Ok(())
}

/// Adds to the hosts that a request was for before, unless this one is the last of them already.
fn append_forwarded_host(headers: &mut HeaderMap, host: &HeaderValue) {
    let known = headers.get_all(&X_FORWARDED_HOST).iter().next_back();
    let last = known.and_then(|value| value.as_bytes().rsplit(|byte| *byte == b',').next());
    if last.is_none_or(|last| last.trim_ascii() != host.as_bytes()) {
        append(headers, &X_FORWARDED_HOST, host.clone(), false);
    }
}

/// Path and query after `rewrite`, as a text. What they were is kept in `x-envoy-original-path`. Nothing happens where
/// nothing would be left of the path (Envoy).
pub(super) fn rewritten_target(
    options: &RouterOptions,
    route: &Route,
    rewrite: &Rewrite,
    parts: &mut Parts,
) -> Option<String> {
    let path = route.rewritten(rewrite, parts.uri.path());
    if path.is_empty() {
        return None;
    }
    let original = parts.uri.path_and_query().map_or("/", |path| path.as_str());
    if !options.suppress_envoy_headers
        && let Ok(original) = HeaderValue::from_str(original)
    {
        parts.headers.insert(X_ORIGINAL_PATH.clone(), original);
    }
    Some(match parts.uri.query() {
        Some(query) => format!("{path}?{query}"),
        None => path.into_owned(),
    })
}

/// Gives a request this path and query; `false` where they are none. A number sign is escaped: what follows it would be no
/// part of the target (RFC 9112 section 3.2).
pub(super) fn set_target(parts: &mut Parts, target: &str) -> bool {
    let escaped = if target.contains('#') {
        Cow::Owned(target.replace('#', "%23"))
    } else {
        Cow::Borrowed(target)
    };
    if !escaped.starts_with('/') {
        return false;
    }
    match escaped.parse() {
        Ok(uri) => {
            parts.uri = uri;
            true
        }
        Err(_) => false,
    }
}
