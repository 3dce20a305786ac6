//! Header mutations of a request and, later, of its response.

use std::sync::Arc;

use http::request::Parts;

use super::levels::levels;
use super::{Encode, state};
use crate::policy::chain::Filter;
use crate::policy::header_mutation::HeaderMutation;
use crate::policy::per_route::Override;
use crate::worker::body::Inbound;
use crate::worker::exchange::Exchange;
use crate::worker::request::Routed;
use crate::worker::scene::RequestScene;

/// The mutations of all levels in the order in which they are applied: the chain's own first; then from the least to
/// the most specific level, or the other way round where the filter says that the least specific has the last word.
fn mutations<'a>(
    filter: &Filter,
    chain: &'a Arc<HeaderMutation>,
    routed: &'a Routed,
) -> impl Iterator<Item = &'a Arc<HeaderMutation>> {
    let mut found: Vec<_> = levels(routed)
        .into_iter()
        .flatten()
        .filter_map(|level| match level.get(&filter.name) {
            Some(Override::HeaderMutation(mutation)) => Some(mutation),
            _ => None,
        })
        .collect();
    if chain.most_specific_wins {
        found.reverse();
    }
    std::iter::once(chain).chain(found)
}

/// Changes a request, and remembers what is to be done to its response.
pub(super) fn mutate(
    exchange: &mut Exchange,
    filter: &Filter,
    chain: &Arc<HeaderMutation>,
    routed: &Routed,
    parts: &mut Parts,
    body: Option<&mut Inbound>,
) {
    let mut trailers = Vec::new();
    let cluster = routed.known_cluster(exchange.conn.worker.id, &parts.headers);
    for mutation in mutations(filter, chain, routed) {
        let scene = RequestScene {
            exchange: &*exchange,
            uri: &parts.uri,
            cluster: cluster.as_deref(),
        };
        mutation.request(&mut parts.headers, &scene);
        let target = mutation.target(&parts.uri, &parts.headers, &scene);
        if body.is_some() {
            trailers.extend(mutation.request_trailers(&parts.headers, &scene));
        }
        if let Some(target) = target {
            parts.uri = target;
        }
    }
    if let Some(body) = body {
        body.change_trailers(trailers);
    }
    remember(exchange, filter, chain, routed, parts);
}

/// Remembers what is to be done to the response.
pub(super) fn remember(
    exchange: &mut Exchange,
    filter: &Filter,
    chain: &Arc<HeaderMutation>,
    routed: &Routed,
    parts: &Parts,
) {
    let first = state(exchange).encode.len();
    for mutation in mutations(filter, chain, routed) {
        if !mutation.spares_responses() {
            let state = state(exchange);
            state.request.get_or_insert_with(|| parts.headers.clone());
            // Responses pass backwards, the levels of one filter do not.
            state.encode.insert(first, Encode::Mutate(mutation.clone()));
        }
    }
}
