//! Who and what, for matchers.

use http::request::Parts;

use crate::policy::facts::Facts;
use crate::worker::exchange::Exchange;
use crate::worker::filters::metadata;
use crate::worker::request::view;

/// Of a request as it is now.
pub(super) fn facts<'a>(exchange: &'a Exchange, parts: &'a Parts) -> Facts<'a> {
    let conn = &exchange.conn;
    Facts {
        direct_remote: conn.direct,
        source: conn.remote,
        local: conn.local,
        server_name: conn.server_name(),
        peer: conn.peer_identity(),
        request: Some(view(parts)),
        remote: exchange.remote,
        metadata: metadata(exchange),
    }
}
