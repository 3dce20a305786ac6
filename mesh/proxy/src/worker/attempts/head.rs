//! The head of a request as it goes to a host.

use http::request::Parts;
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderName, HeaderValue, Request, Uri, Version, header};
use tokio::time::Instant;

use super::attempt::Try;
use crate::upstream::cluster::Host;
use crate::upstream::pool::Lease;
use crate::worker::body::UpstreamBody;
use crate::worker::upstream::Plan;

pub(in crate::worker) static X_ATTEMPT_COUNT: HeaderName = HeaderName::from_static("x-envoy-attempt-count");

/// Whether a further attempt may follow this one.
fn may_follow(try_of: &Try<'_>, lease: &Lease) -> bool {
    try_of.again.by_policy || (lease.reused() && try_of.again.quietly)
}

/// Whether fields that are sent over `lease` can be sent again as they are: then they are lent and not copied.
fn lends(plan: &Plan<'_>, try_of: &Try<'_>, lease: &Lease) -> bool {
    !lease.is_http2() && !plan.auto_host && try_of.tunnel.is_none() && !plan.conn.manager.interim_answers
}

/// Gives lent fields back once they have been written.
pub(super) fn give_back(
    plan: &Plan<'_>,
    parts: &mut Parts,
    try_of: &Try<'_>,
    lease: &Lease,
    request: Request<UpstreamBody>,
) {
    if lends(plan, try_of, lease) && may_follow(try_of, lease) {
        parts.headers = request.into_parts().0.headers;
    }
}

/// The request as it goes to `host` over `lease`. Its head is copied only if a further attempt is possible, and not over HTTP/1,
/// where it is lent until it has been written.
pub(super) fn build(
    plan: &Plan<'_>,
    parts: &mut Parts,
    try_of: &Try<'_>,
    host: &Host,
    lease: &Lease,
) -> Request<UpstreamBody> {
    let copies = may_follow(try_of, lease) && !lends(plan, try_of, lease);
    let mut request = Request::new(match plan.source {
        None => UpstreamBody::Empty,
        Some(source) => UpstreamBody::stream(source),
    });
    *request.method_mut() = parts.method.clone();
    *request.headers_mut() = if copies {
        parts.headers.clone()
    } else {
        std::mem::take(&mut parts.headers)
    };
    let headers = request.headers_mut();
    if plan.auto_host
        && !host.endpoint.hostname().is_empty()
        && let Ok(value) = HeaderValue::from_str(host.endpoint.hostname())
    {
        headers.insert(header::HOST, value);
    }
    if plan.routed.host.attempt_count {
        headers.insert(X_ATTEMPT_COUNT.clone(), HeaderValue::from(try_of.number));
    }
    if try_of.number > 1 {
        let left = plan.deadline.filter(|_| !plan.by_stream);
        let left = left.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        plan.times.tell_again(left, headers);
    }
    let uri = parts.uri.clone();
    if lease.is_http2() {
        let scheme = match (plan.conn.manager.origin.match_upstream, lease.tls()) {
            (false, _) => plan.scheme.clone(),
            (true, Some(_)) => Scheme::HTTPS,
            (true, None) => Scheme::HTTP,
        };
        address_http2(plan, &mut request, uri, scheme, try_of);
    } else {
        address_http1(&mut request, uri, try_of);
    }
    request
}

/// `:authority` instead of `Host`, and an absolute target (RFC 9113 section 8.3.1).
fn address_http2(
    plan: &Plan<'_>,
    request: &mut Request<UpstreamBody>,
    uri: Uri,
    scheme: Scheme,
    try_of: &Try<'_>,
) {
    let host = request.headers_mut().remove(header::HOST);
    let authority = host
        .as_ref()
        .and_then(|value| value.to_str().ok())
        .filter(|host| !host.is_empty())
        .unwrap_or("unknown");
    // Parsed once, where it is what the client sent.
    let known = plan.authority.as_ref();
    let parsed = match known.filter(|known| known.as_str() == authority) {
        Some(known) => Some(known.clone()),
        None => Authority::try_from(authority).ok(),
    };
    let absolute = parsed.and_then(|parsed| {
        let mut whole = http::uri::Parts::default();
        whole.path_and_query = uri.path_and_query().cloned();
        whole
            .path_and_query
            .get_or_insert_with(|| PathAndQuery::from_static("/"));
        whole.scheme = Some(scheme.clone());
        whole.authority = Some(parsed);
        Uri::from_parts(whole).ok()
    });
    *request.uri_mut() = absolute.unwrap_or(uri);
    *request.version_mut() = Version::HTTP_2;
    if let Some(tunnel) = try_of.tunnel {
        tunnel.write(request, true, authority, scheme.as_str());
    }
}

fn address_http1(request: &mut Request<UpstreamBody>, uri: Uri, try_of: &Try<'_>) {
    *request.uri_mut() = uri;
    *request.version_mut() = Version::HTTP_11;
    if let Some(tunnel) = try_of.tunnel {
        let host = request.headers().get(header::HOST).cloned();
        let authority = host.as_ref().and_then(|host| host.to_str().ok()).unwrap_or("");
        tunnel.write(request, false, authority, "http");
    }
}
