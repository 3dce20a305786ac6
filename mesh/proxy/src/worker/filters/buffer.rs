//! Requests that are read whole before they go on.

use http::request::Parts;
use http::{HeaderValue, StatusCode, header};

use super::{Passed, Verdict};
use crate::metrics::flags::Flags;
use crate::policy::buffer::Buffer;
use crate::policy::per_route::Override;
use crate::worker::body::{Ahead, Inbound};
use crate::worker::http::Downstream;
use crate::worker::local::LocalReply;

/// The bytes that are held at most, where the route lets a request be held.
pub(super) fn limit(chain: &Buffer, own: Option<&Override>) -> Option<usize> {
    match own {
        Some(Override::Buffer(own)) => own.as_ref().map(|own| own.limit),
        _ => Some(chain.limit),
    }
}

/// Reads a request whole before it goes on.
pub(super) async fn hold(
    conn: &Downstream,
    limit: usize,
    parts: &mut Parts,
    body: &mut Option<Inbound>,
) -> Verdict {
    let Some(inbound) = body else {
        return Ok(Passed::On);
    };
    match inbound.read_ahead(limit, conn.manager.stream_idle_timeout).await {
        Err(error) => Err(LocalReply::of_body(&error)),
        Ok(Ahead::Whole) if inbound.held() <= limit => {
            // The length is known now.
            parts.headers.remove(header::TRANSFER_ENCODING);
            parts
                .headers
                .insert(header::CONTENT_LENGTH, HeaderValue::from(inbound.held()));
            Ok(Passed::On)
        }
        Ok(_) => Err(too_large()),
    }
}

/// A body that a filter must hold is too large.
pub(super) fn too_large() -> LocalReply {
    LocalReply::new(
        StatusCode::PAYLOAD_TOO_LARGE,
        Flags::default(),
        "request_payload_too_large",
        "Payload Too Large",
    )
}
