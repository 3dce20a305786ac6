//! Compression: what the client wants is noted before the request goes on.

use std::sync::Arc;

use http::header;
use http::request::Parts;

use super::{Encode, state};
use crate::policy::compressor::Compressor;
use crate::policy::per_route::Override;
use crate::worker::exchange::Exchange;

/// Notes how much the client wants an encoding, where the route lets its response have one.
pub(super) fn offer(
    exchange: &mut Exchange,
    compressor: &Arc<Compressor>,
    own: Option<&Override>,
    parts: &mut Parts,
) {
    let remove = match own {
        Some(Override::Compressor(None)) => return,
        Some(Override::Compressor(Some(own))) => own.remove_accept_encoding,
        _ => None,
    };
    // A filter before this one may have taken the field off; then it has kept what it said.
    let state = state(exchange);
    let kept = state
        .request
        .as_ref()
        .filter(|_| !parts.headers.contains_key(header::ACCEPT_ENCODING));
    let quality = compressor.quality(kept.unwrap_or(&parts.headers));
    if remove.unwrap_or(compressor.remove_accept_encoding) {
        state.request.get_or_insert_with(|| parts.headers.clone());
        parts.headers.remove(header::ACCEPT_ENCODING);
    }
    state.encode.push(Encode::Compress(compressor.clone(), quality));
}
