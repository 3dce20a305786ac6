//! Upgraded connections (WebSocket): after the 101 the two sides are joined as bytes.

use http::{HeaderValue, Response, Version, header};
use hyper::body::Incoming;

use super::body::ResponseBody;
use super::exchange::Exchange;
use super::local::Body;
use crate::hygiene::fields::strip_hop_by_hop;
use crate::upstream::cluster::Active;
use crate::upstream::pool::Lease;

/// Joins the two sides of an upgraded connection.
pub(super) fn switch_protocols(
    mut exchange: Box<Exchange>,
    mut response: Response<Incoming>,
    downstream: Option<hyper::upgrade::OnUpgrade>,
    active: Active,
    lease: Lease,
) -> Response<Body> {
    let conn = exchange.conn.clone();
    conn.decide_upgrade(true);
    exchange.code = 101;
    exchange.details = "via_upstream".into();
    let upstream = hyper::upgrade::on(&mut response);
    let (mut head, _) = response.into_parts();
    let protocol = head.headers.get(header::UPGRADE).cloned();
    strip_hop_by_hop(&mut head.headers);
    head.headers
        .insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    if let Some(protocol) = protocol {
        head.headers.insert(header::UPGRADE, protocol);
    }
    head.version = Version::HTTP_11;
    let worker = conn.worker.clone();
    worker.tasks.spawn_local(async move {
        let Some(downstream) = downstream else { return };
        if let (Ok(downstream), Ok(upstream)) = (downstream.await, upstream.await) {
            let mut downstream = hyper_util::rt::TokioIo::new(downstream);
            let mut upstream = hyper_util::rt::TokioIo::new(upstream);
            if let Ok((_, sent)) = tokio::io::copy_bidirectional(&mut downstream, &mut upstream).await {
                exchange.sent = sent;
            }
        }
        drop((active, lease));
        exchange.finish();
    });
    Response::from_parts(head, ResponseBody::Full(None))
}
