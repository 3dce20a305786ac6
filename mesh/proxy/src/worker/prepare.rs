//! What a request becomes before it is sent on.

use http::request::Parts;
use http::{HeaderName, HeaderValue, StatusCode, header};

use super::http::Downstream;
use super::local::LocalReply;
use super::request::{PEER_METADATA, PEER_METADATA_ID, Routed};
use crate::config::headers::Variables;
use crate::config::listener::Direction;
use crate::config::route::{Forward, HostRewrite, Target};
use crate::metrics::flags::Flags;
use crate::upstream::cluster::WorkerCluster;

static X_ORIGINAL_PATH: HeaderName = HeaderName::from_static("x-envoy-original-path");
static X_FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");

/// Makes the request what the upstream gets: mutations, rewrites, identity.
pub(super) fn prepare(
    conn: &Downstream,
    routed: &Routed,
    forward: &Forward,
    target: Option<&Target>,
    cluster: &WorkerCluster,
    parts: &mut Parts,
) -> Result<(), LocalReply> {
    let ops = [
        target.map(|target| &target.request_headers),
        Some(&routed.route.request_headers),
        Some(&routed.host.request_headers),
        Some(&routed.table.request_headers),
    ];
    if ops.iter().flatten().any(|ops| !ops.is_empty()) {
        let uri = parts.uri.clone();
        let authority = parts.headers.get(header::HOST).cloned();
        let method = parts.method.clone();
        let variables = Variables {
            downstream_remote: Some(conn.remote),
            downstream_local: Some(conn.local),
            protocol: super::exchange::protocol_text(parts.version),
            route_name: &routed.route.name,
            server_name: conn.server_name().unwrap_or(""),
            upstream_cluster: &cluster.slot.name,
            path: uri.path_and_query().map_or("/", |path| path.as_str()),
            method: method.as_str(),
            authority: authority
                .as_ref()
                .and_then(|value| value.to_str().ok())
                .unwrap_or(""),
            ..Default::default()
        };
        for ops in ops.into_iter().flatten() {
            ops.apply(&mut parts.headers, None, &variables);
        }
    }
    let new_host =
        target
            .and_then(|target| target.host_rewrite.clone())
            .or_else(|| match &forward.host_rewrite {
                None | Some(HostRewrite::Auto) => None,
                Some(HostRewrite::Literal(value)) => Some(value.clone()),
                Some(HostRewrite::Header(name)) => parts.headers.get(name).cloned(),
                Some(HostRewrite::PathRegex(regex, with)) => {
                    HeaderValue::from_str(&regex.replace_all(parts.uri.path(), &**with)).ok()
                }
            });
    if let Some(new) = new_host {
        if forward.append_forwarded_host
            && let Some(old) = parts.headers.get(header::HOST).cloned()
        {
            parts.headers.append(X_FORWARDED_HOST.clone(), old);
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
