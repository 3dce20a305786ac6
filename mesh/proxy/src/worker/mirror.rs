//! Request mirroring: copies that nobody waits for.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use http::request::Parts;
use http::{HeaderValue, Request, Uri, header};

use super::Worker;
use super::body::{RequestSource, UpstreamBody};
use super::http::Downstream;
use crate::config::route::Forward;
use crate::random;
use crate::upstream::balance::Wish;
use crate::upstream::cluster::{Active, Host, WorkerCluster};
use crate::upstream::connect::ConnectOptions;

/// Sends copies, without waiting for what becomes of them. A body is copied if it has been read whole and fits the
/// buffer; otherwise nothing is mirrored.
pub(super) fn mirror(
    conn: &Rc<Downstream>,
    forward: &Forward,
    head: Parts,
    source: Option<&Rc<RefCell<RequestSource>>>,
) {
    /// Limit of a mirrored exchange.
    const LIMIT: Duration = Duration::from_secs(30);
    let body = match source {
        None => None,
        Some(source) => match source.borrow().copy() {
            Some(bytes) => Some(bytes),
            None => return,
        },
    };
    for mirror in &forward.mirrors {
        if !mirror.share.hit(random::next()) {
            continue;
        }
        let Some(cluster) = conn.worker.cluster(&mirror.cluster) else {
            continue;
        };
        let Some(host) = cluster.pick(&Wish::default(), Some(conn.local)) else {
            continue;
        };
        let mut headers = head.headers.clone();
        headers.remove(header::TRANSFER_ENCODING);
        headers.remove(header::EXPECT);
        if let Some(rewrite) = &mirror.host_rewrite {
            headers.insert(header::HOST, rewrite.clone());
        } else if mirror.shadow_suffix
            && let Some(value) = headers.get(header::HOST).and_then(|value| value.to_str().ok())
            && let Ok(value) = HeaderValue::from_str(&shadow_host(value))
        {
            headers.insert(header::HOST, value);
        }
        let mut request = Request::new(
            body.clone()
                .map_or(UpstreamBody::Empty, |bytes| UpstreamBody::Full(Some(bytes))),
        );
        *request.method_mut() = head.method.clone();
        *request.uri_mut() = head.uri.clone();
        *request.headers_mut() = headers;
        let worker = conn.worker.clone();
        conn.worker.tasks.spawn_local(async move {
            let _active = Active::on(&host);
            let work = send_mirror(&worker, &cluster, &host, request);
            // Fire and forget: nobody waits, nobody is told.
            let _ = tokio::time::timeout(LIMIT, work).await;
        });
    }
}

fn shadow_host(host: &str) -> String {
    let name = crate::config::table::strip_port(host);
    format!("{name}-shadow{}", &host[name.len()..])
}

async fn send_mirror(
    worker: &Worker,
    cluster: &WorkerCluster,
    host: &Host,
    mut request: Request<UpstreamBody>,
) -> Option<()> {
    let speaking = cluster.config.http.for_own_requests();
    // Nobody's client in particular: a mirror is the proxy's own request.
    let options = ConnectOptions {
        server_name: cluster.config.request_server_name(request.headers()),
        ..ConnectOptions::default()
    };
    let mut lease = cluster.lease(worker, host, speaking, &options).await.ok()?;
    if lease.is_http2() {
        let authority = request.headers_mut().remove(header::HOST)?;
        let path = request.uri().path_and_query()?.clone();
        *request.uri_mut() = Uri::builder()
            .scheme("http")
            .authority(authority.to_str().ok()?)
            .path_and_query(path)
            .build()
            .ok()?;
    }
    let response = lease.send(request, None).await.ok()?;
    let mut body = response.into_body();
    while let Some(frame) = http_body_util::BodyExt::frame(&mut body).await {
        frame.ok()?;
    }
    lease.release(
        cluster.config.max_requests_per_connection,
        std::time::Instant::now(),
    );
    Some(())
}
