//! What a request becomes before it is sent on.

use http::request::Parts;
use http::{HeaderName, HeaderValue, StatusCode, header};

use super::exchange::Exchange;
use super::local::LocalReply;
use super::request::{PEER_METADATA, PEER_METADATA_ID, Routed};
use super::scene::RequestScene;
use crate::config::listener::Direction;
use crate::config::route::{Forward, HostRewrite, Target};
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
    let levels = routed.header_levels(
        target.map(|target| &target.request_headers),
        |route, host, table| {
            [
                &route.request_headers,
                &host.request_headers,
                &table.request_headers,
            ]
        },
    );
    for ops in levels {
        let scene = RequestScene {
            exchange,
            uri: &parts.uri,
            cluster: "",
        };
        ops.apply(&mut parts.headers, &scene);
    }
    let new_host =
        target
            .and_then(|target| target.host_rewrite.clone())
            .or_else(|| match &forward.host_rewrite {
                None | Some(HostRewrite::Auto) => None,
                Some(HostRewrite::Literal(value)) => Some(value.clone()),
                Some(HostRewrite::Header(name)) => {
                    parts.headers.get(name).filter(|value| !value.is_empty()).cloned()
                }
                Some(HostRewrite::PathRegex(regex, with)) => {
                    HeaderValue::from_str(&regex.replace_all(parts.uri.path(), &**with)).ok()
                }
            });
    if let Some(new) = new_host {
        if let Some(old) = parts.headers.get(header::HOST).cloned() {
            if forward.append_forwarded_host {
                parts.headers.append(X_FORWARDED_HOST.clone(), old.clone());
            }
            parts.headers.insert(X_ORIGINAL_HOST.clone(), old);
        }
        parts.headers.insert(header::HOST, new);
    }
    // A plain CONNECT has no path.
    if let Some(rewrite) = forward.rewrite.as_ref().filter(|_| !parts.uri.path().is_empty()) {
        let path = routed.route.rewritten(rewrite, parts.uri.path());
        let target = match parts.uri.query() {
            Some(query) => format!("{path}?{query}"),
            None => path.into_owned(),
        };
        if let Ok(original) =
            HeaderValue::from_str(parts.uri.path_and_query().map_or("/", |path| path.as_str()))
        {
            parts.headers.insert(X_ORIGINAL_PATH.clone(), original);
        }
        parts.uri = target.parse().map_err(|_| {
            LocalReply::new(
                StatusCode::BAD_REQUEST,
                Flags::DOWNSTREAM_PROTOCOL_ERROR,
                "path_rewrite_failed",
                "",
            )
        })?;
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
        // hyper answered it, or will when the body is read; the upstream is not asked.
        parts.headers.remove(header::EXPECT);
    }
    Ok(())
}
