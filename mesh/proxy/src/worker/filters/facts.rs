//! Who and what, for matchers.

use std::net::IpAddr;

use http::request::Parts;

use crate::config::matchers::RequestView;
use crate::policy::facts::Facts;
use crate::policy::metadata::Metadata;
use crate::worker::http::Downstream;
use crate::worker::request::view;

/// Of a request as it is now.
pub(super) fn facts<'a>(conn: &'a Downstream, parts: &'a Parts, metadata: &'a Metadata) -> Facts<'a> {
    Facts {
        direct_remote: conn.direct,
        source: conn.remote,
        local: conn.local,
        server_name: conn.server_name(),
        peer: conn.peer_identity(),
        request: Some(view(parts)),
        forwarded: !conn.manager.use_remote_address,
        metadata,
    }
}

/// The client that the fields of a request name, where a trusted hop has written them.
pub(in crate::worker) fn forwarded_client(conn: &Downstream, request: &RequestView<'_>) -> IpAddr {
    let metadata = Metadata::EMPTY;
    let facts = Facts {
        direct_remote: conn.direct,
        source: conn.remote,
        local: conn.local,
        server_name: None,
        peer: None,
        request: Some(*request),
        forwarded: !conn.manager.use_remote_address,
        metadata: &metadata,
    };
    facts.remote()
}
